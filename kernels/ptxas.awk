# ptxas.awk: reads what `ptxas -v` says of attention kernels and fails where one would be slow for a reason that shows
# nowhere else: registers that are kept in memory (spills), and asynchronous products that the compiler made wait for
# each other (C7500 to C7599). Kernels that may spill are named below, with the reason.

BEGIN {
    # a part of the entry function's mangled name and an architecture -> most bytes stored.
    for (i = split("sm_80 sm_90 sm_90a", name, " "); i > 0; i--) {
        # The forward, whose sums take half of the registers: two words (where the keys end, how rows are loaded) that
        # are stored before the main loop and read in every step (SASS). On sm_80 also one sum of a row's softmax a
        # thread for D = 64 (20 bytes) and three for D = 128 (44), read and stored once in a step of 700 and 1,100
        # instructions; not measured on an A100. Both words in shared memory leave 8 bytes (24 on sm_80), of sums.
        # Fewer columns a step cost more. The query pass for D = 64 may keep two words, and keeps none on sm_90.
        for (j = split("bf16 f16", half, " "); j > 0; j--) {
            prefix = length(half[j]) + 3 "op_" half[j]
            allowed["attn_forward_kernelI9attn_args" prefix " " name[i]] = name[i] == "sm_80" ? 44 : 8
            allowed["attn_queries_kernelI9attn_args" prefix "ILi64E " name[i]] = 8
        }
        # Instances with options of single pairs have addresses beside what the others have: a few words.
        allowed["I14attn_pair_args " name[i]] = 24
        # The exact forward decides about options at run time and waits for arithmetic: 40 bytes for D = 64 in f32,
        # six words that are stored and read once in a step of 64 keys.
        allowed["attn_exact_forward_kernel " name[i]] = 40
        # What repeats rows with values that are not finite is slow in any case.
        allowed["hopper_redo_kernel " name[i]] = 64
    }
    # So does the exact query pass, and both have more sums than registers on sm_80 for D above 128: the forward keeps
    # eight of them in memory, also within the product with v.
    allowed["attn_exact_queries_kernel sm_80"] = 120
    allowed["attn_exact_forward_kernelI5exactIfLi256E sm_80"] = 200
}
/Compiling entry function/ {
    split($0, part, "'")
    kernel = part[2]
    architecture = part[4]
}
/bytes spill stores/ {
    match($0, /[0-9]+ bytes spill stores/)
    bytes = substr($0, RSTART) + 0
    most = 0
    for (key in allowed) {
        split(key, name, " ")
        if (index(kernel, name[1]) && architecture == name[2]) most = allowed[key]
    }
    if (bytes > most) {
        printf "%s for %s spills %d bytes\n", kernel, architecture, bytes
        failed = 1
    }
}
/\(C75[0-9][0-9]\)/ {
    print
    failed = 1
}
/error|warning/ && !/ptxas info/ { print }
END { exit failed }
