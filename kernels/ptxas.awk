# ptxas.awk: reads what `ptxas -v` says of attention kernels and fails where one would be slow for a reason that shows
# nowhere else: registers that are kept in memory (spills), and asynchronous products that the compiler made wait for
# each other (C7500 to C7599). Kernels that may spill are named below, with the reason.

BEGIN {
    # a part of the entry function's mangled name and an architecture -> most bytes stored.
    for (i = split("sm_80 sm_90 sm_90a", name, " "); i > 0; i--) {
        # The forward, whose sums take half of the registers: two words (where the keys end, how rows are loaded) that
        # are stored before the main loop and read in every step (SASS). On sm_80 also one sum of a row's softmax a
        # thread for D = 64 (20 bytes) and three for D = 128 (44), read and stored once in a step of 700 and 1,100
        # instructions; not measured on an A100. With active blocks for D = 128 four sums and words that are stored
        # before the loop. Both words in shared memory leave 12 bytes (36 on sm_80), of sums, and cost 2% for D = 64, 5%
        # for D = 128. Fewer columns a step cost more.
        # The pass over the keys of active blocks keeps two words.
        for (j = split("bf16 f16", half, " "); j > 0; j--) {
            prefix = length(half[j]) + 3 "op_" half[j]
            allowed["attn_forward_kernelI9attn_args" prefix " " name[i]] = name[i] == "sm_80" ? 44 : 8
            allowed["attn_forward_kernelI15attn_block_args" prefix "ILi128E " name[i]] = 60
            allowed["attn_keys_kernelI15attn_block_args" prefix "ILi64E sm_80"] = 8
        }
        # f32 in parts, on sm_80 alone: the forward for D = 64 keeps four words, of which three are read and stored once
        # in a step of 3,000 instructions (SASS), for D = 128 one before the loop; not measured on an A100.
        allowed["attn_parts_forward_kernel sm_80"] = 36
        allowed["attn_parts_keys_kernelILi64E sm_80"] = 32
        # Around a call that lists active blocks, once in some hundred steps.
        allowed["attn_queries_kernelI14attn_pair_args7op_tf32ILi256E " name[i]] = 60
        # What repeats rows with values that are not finite is slow in any case.
        allowed["hopper_redo_kernel " name[i]] = 64
    }
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
