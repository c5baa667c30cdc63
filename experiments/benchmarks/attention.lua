--- attention.lua: attention's kernels beside OpenBLAS's product, PyTorch's SDPA, and the machine's memory.
--
-- What was tried for the kernels (c/cpu/attn*): the expectation, what came out, on one and two cores of an
-- AMD EPYC with AVX2. One core does 102 GFLOP/s in a bare loop of multiply-adds, 88 in sgemm.
--
--   * Backward split over runs of keys, dq added in the order of the runs. Expected: two threads 1.8x on one
--     long segment (they gave 1.02x), one thread a little slower. Measured: 1.87x; one thread 91% -> 89%
--     of sgemm at D = 64, 88% -> 80% at D = 32, where packing a row once per run is dear. Kept.
--   * Forward tasks cut by the number of threads (a row's sums do not depend on the cut). Cut finely by
--     shape alone, one thread fell from 90% to 84% at D = 64: keys were packed nine times. By threads: 89%.
--   * Dilation, r = 16 against r = 1, was 1.06-1.16 of the time. Huge pages behind large tensors (a row of a
--     page each overflows the processor's 2048 translations): forward D = 64 -5%. One tensor walked after the
--     other (q, dout and out evict one another from the first cache if their rows agree modulo 4096), query
--     rows loaded once for several runs of keys, rows of results asked for ahead, zeros by CLZERO: 1.02-1.06
--     forward, 0.98-1.05 backward. Asking into the second cache, or farther ahead: no difference.
--     By --fastest --rounds 3, 2048 rows at r = 4 and 16 and 8192 at 16, D = 32, 64, 128: forward 1.01,
--     1.03, 1.02; 1.04, 1.00, 1.05; 1.02, 1.00, 1.053; backward 1.03, 1.03, 1.04; 1.03, 1.02, 1.04; 1.03,
--     1.03, 1.01.
--   * Softmax: a maximum instruction instead of compare and blend, four vectors in step, 512 keys a tile
--     instead of 256: forward -3% at D = 64, -7% at D = 32, -1% at D = 128 (which keeps 256).
--   * The backward's first runs of keys of all heads before their second ones, so that nobody waits for a
--     turn: two threads on 8 causal heads 1.38x -> 1.94x.
--   * Few heads on two threads: as many forward tasks for each (three heads: 12 instead of 9, of which one
--     thread had 5), and a power of two of runs of keys (one head of 2048: 8 alike instead of 5 and a short
--     one). By count the busier thread had 0.56 of the rows, now it has half. One causal head of 1024 rows
--     stays at 1.6x in the backward: the second run of keys waits for the first to add to the same rows.
--   * Few queries: the keys of all heads at one position read together: 4.3 -> 10.7 GB/s of 17 that a bare
--     loop reads. The copy into the caches is what is left; reading in place is not done.
--
-- On one core of an AVX-512 Xeon (Sapphire Rapids; 160 to 170 GFLOP/s in the bare loop, MKL's sgemm 0.97 of
-- it), by processor time, the fastest of many calls, because the machine was shared:
--   * The forward at D = 64 spent 14% in the softmax and 3% in packing; its products ran at 0.90 of the bare
--     loop. A micro-kernel that starts and ends without branches: 0.96 by itself. The softmax of 12 rows in
--     step. N = 2048, share of the bare loop, before, now, SDPA: D = 32 0.63, 0.73, 0.62; D = 64 0.77, 0.83,
--     0.75; D = 128 0.82, 0.87, 0.83. What is left is 14 instructions per vector of exponentials.
--   * The backward gained 0 to 3%: D = 32 0.77 (SDPA 0.75), D = 64 0.82 (0.81), D = 128 0.81 (0.91). There
--     1.3 times SDPA lies beyond multiply-adds at D = 64, 128, as does 1.2 in the forward at D = 128.
--   * The matrix unit, f32 in three parts of bf16 (c/cpu/attn_amx.inc). Expected of 425 GFLOP/s in a loop
--     against 163: twice the forward, more than twice the backward. Measured for N = 2048, times of SDPA over
--     ours, with multiply-adds and with the unit: forward D = 64 1.14 -> 1.44, causal 1.46 -> 1.67; D = 128
--     1.08 -> 1.56, causal 1.27 -> 1.82; backward D = 64 1.05 -> 1.29, causal 1.37 -> 1.56; D = 128
--     1.02 -> 1.34, causal 1.25 -> 1.52. At D = 32 nothing (1.24 and 1.01).
--     Errors against f64 are 0.5 to 0.9 of those of multiply-adds. Neighbours on the host slow the
--     unit, and it alone, to 110 GFLOP/s for milliseconds to minutes; then it is 0.7 to 0.9 of multiply-adds.
--     Over 100 minutes on a busy host, 77 pairs of calls 75 s apart, medians and, in brackets, ratios of the
--     mean times: 1.22 (1.10) forward and 1.18 (1.05) backward at D = 64, 1.48 (1.33) and 1.33 (1.20) at
--     D = 128. It was the slower one in 21, 20, 12 and 15 of the pairs.
--     So it is the default.
--   * Half types take as few parts as they have, bf16 one product of keys instead of six, of values three.
--     P and dS taken apart as they are made, for 32 rows and 128 keys at a time. Expected of counting: 24
--     instructions a vector of scores in the forward, 35 in the backward. By processor time, N = 2048, 2
--     heads, ms before and after, forward and backward: bf16 D = 64 13.0 -> 9.4 and 34 -> 21.2, D = 128
--     21.5 -> 13.3 and 62 -> 38; f32 D = 64 13.5 -> 12.3 and 35.0 -> 32.0, D = 128 21.3 -> 20.5 and
--     62 -> 59. At D = 32, where multiply-adds took 10 and 23: f32 9.5 and 20, bf16 8.1 and 16; so rows of
--     32 numbers on have it. What is left of f32 are products: 1.2 to 1.8 of the time they take in the loop.
--     Beside SDPA, processes in turns, the fastest of four turns of 8 calls on a busy host, SDPA's time over
--     ours, forward and backward, with the unit (with multiply-adds): D = 32 1.19 and 1.18 (1.13, 1.02),
--     D = 64 1.47 and 1.38 (1.12, 1.08), D = 128 1.64 and 1.37 (1.04, 0.97). In bf16, where SDPA rounds P to
--     bf16 as well, D = 32 0.95 and 2.0, D = 64 0.83 and 1.8, D = 128 0.71 and 1.25. In the first turn the
--     unit was slow: D = 64 0.67 and 0.65 of SDPA, where multiply-adds, as disturbed, had 0.72 and 0.68.
--     This section by itself, wall time, N = 2048, half a minute on the same host: D = 32 1.19 and 1.23,
--     D = 64 1.32 and 1.02, D = 128 1.02 and 1.76, ratios of turns between 0.7 and 2.3: 1.2 and 1.3 of SDPA
--     are there at D = 64 and 128 while the unit is left alone, and not shown otherwise, nor at D = 32.
--   * Tiles of other sizes (12, 48 rows; 256, 384, 1024 keys; in the backward 48, 192 rows, 64 to 256 keys):
--     within 3%, or slower.
--   * lse_detach, three branches with segments of 1024 rows: deltas made in the pass of the gradients:
--     forward and backward together 567 -> 451 ms (the pattern of torchscale in pipelines.lua).
--
-- On one core of an EPYC with AVX-512 (Zen 4, 118 GFLOP/s in the bare loop, sgemm 0.79 to 0.85 of it), the
-- pattern of pipelines.lua with every head in every branch, processor time, fastest of many calls in
-- turns:
--   * What follows is asked for between the products (attn_forward.inc). In the caches a segment of 1024
--     rows takes 1.44 ms, beyond them 1.50, so 4% was expected. Measured: 127 -> 122 ms, heads divided
--     over branches 42.7 -> 40.7. In the backward (in the caches 3.60, beyond them 3.70): 332 -> 332 ms,
--     dropped.
--   * The sums of P and P dP in vectors, where a chain of scalar additions had been 31 ms of 386, and the
--     tiles of the gradients from the last to the first, while they are in the second cache: 386 -> 335
--     ms. Tiles of 48 rows instead of 96, which halves what is held: the same time.
--   * Of the three branches the last one has 12 segments in its phase. Cut into 16 runs of keys at least, as
--     plans did, none was whole, and its S and dP were made twice: 14% more of both in all. Now branches with
--     deltas are cut into 8: backward 332 -> 310 ms. P, dS and the sums for deltas in one walk over a row,
--     half a panel of scores where the band ends, rows of tiles an odd number of lines apart: 310 -> 305;
--     dense backward D = 64 54.7 -> 53.2 ms, D = 128 and the forward 0 to 2%. On a Xeon with the matrix
--     unit the same: 239 to 261 ms -> 216 to 224, with multiply-adds 258 to 269 -> 237 to 241.
--     Results of the first branch stored where they were cleared and added to: 0 to 0.5%, kept for its
--     memory traffic.
--   * Tried there without gain. All three branches of one head and 4096 rows before the next, so that rows
--     are read again from the third cache: 1% of the backward; with everything in that cache, 2%: so much is
--     memory at most. Asking between the products for the next rows and keys: 0.5%. In the micro-kernel by
--     itself, which reaches 113 to 117 GFLOP/s from the second cache: asking for panels, rows or results
--     ahead, adding the result at the end, dk apart from dv: within 1%, or slower. Exponentials by a table of
--     16 powers: 14 to 16 instructions a vector either way; not built.
--   * The products run at 0.90 to 0.97 of the bare loop there (samples of a dense call); 1.3 of SDPA's
--     backward at D = 128, N = 2048 would be 0.95 of it for everything, and is 0.85.
--
-- On one core of an EPYC with AVX2 (Zen 3, 512 KB of second cache), where the cycles of the backward go.
-- 12 multiply-adds of 8 floats are 6 cycles, 102 GFLOP/s at its usual clock; the micro-kernel on data in
-- the first cache reaches 1.00 of that, so "bound by products" has to mean what feeds them. Clocks around
-- every step, N = 2048, D = 128: S and dP 34% of the time at 0.94 of the bare loop, dq 18% at 0.89, dk and
-- dv 40% at 0.81, P and dS 3%, loading, packing and results 6%; D = 64 and 32 the same but for P and dS, 6
-- and 10%. No product can be left out: S and dP are needed again, and tiles and panels outside of the band
-- are.
--   * dk apart from dv (0.81 -> 0.90: together they want columns of two tiles and two panels in the first
--     cache, 24 of its 32 KB), S and dP from the panels of dk and dv instead of rows that lie a second time
--     (S and dP 0.96, dq 0.93, dk and dv 0.93), no micro-panel of one to three keys (0.945), keys transposed
--     within halves of vectors (2.5 -> 1.7 cycles a vector). All of it, processor time, the fastest of many
--     calls in turns, GFLOP/s: N = 2048 D = 128 79.1 -> 87.3, causal 79.2 -> 83.2, D = 64 80.6 -> 85.3,
--     causal 78.2 -> 82.2, D = 32 77.3 -> 79.0; the bits are the same. On the Xeon with AVX-512 D = 128
--     139 -> 146, causal 138 -> 144, D = 64 136 -> 136, causal 133 -> 138, D = 32 130 -> 133; with its matrix
--     unit nothing changes (within 2%). The scores of the pass that makes deltas in active blocks, where keys
--     or values are not finite, then came from panels that only the gradients had packed: a spec on a
--     processor with the unit found it, attend_parts_spec.lua now has a case of its own for it.
--   * Tried without gain. S, dP, P and dS by 6, 12 or 24 rows, which stay in the first cache (0 to
--     2%, D = 32 2 to 4%); asking for dq's rows, or for the next panel of keys in the forward (-2%);
--     instructions in the order that the micro-kernel is written in (GCC adds seven moves an iteration,
--     which cost nothing); 4 KB or huge pages; 64 or 96 keys, 192 rows a tile, 384 or 1536 rows a block;
--     in the forward 48 or 96 rows, 128 keys, two or three vectors of exponentials in step.
--   * The forward there: S 0.93, P V 0.955, the softmax 6.5% of the time at D = 128, 11 at 64, 19 at 32 (8
--     to 9 cycles a vector of eight, of which three are what a row costs), loading and packing 4%.
--   * Scores that become probabilities as soon as a panel of them is there, with a maximum that moves on
--     only when one is 2^8 above it. Expected: no pass for maxima, no cost by row, 4 to 5 cycles a vector
--     instead of 9. Measured: 12 vectors by themselves take 84 to 94 cycles, 7 a vector, because the steps
--     of one take 50 cycles and the processor has registers for 40 cycles ahead: the forward 0 to 5%
--     slower. The same between the multiply-adds of the next panel: compiled, a fifth slower (sums go to
--     memory); as instructions written down, with half of the panel of keys read from memory to have two
--     registers free, 7 to 19% slower. Two vectors are loaded in a cycle: a step of 12 multiply-adds then
--     has 13 loads in its 6 cycles, and a vector of exponentials 16 more.
--   * Powers of quarters from a register, as exps.h has them: seven of the instructions that multiply
--     instead of nine, 4.9 -> 4.5 ticks a vector by itself. Calls of the forward 0 to 3% faster, but
--     probabilities are a sixth less exact, and the golden spec's dv beyond its bound in one case. With
--     what each power lacks picked as well they are more exact than now, and take 5.2 ticks. Maxima taken
--     by the micro-kernel as it stores scores, without a pass over the row: D = 32 -2 to -3%, D = 64 1% or
--     -2%. Maxima rounded to whole numbers save one instruction of 14, but ten of the others multiply
--     instead of nine: not built.
--   * Nor did constants of exponentials in registers bring anything (6.3 cycles a vector either way), nor
--     multiply-adds four steps at a time: in the first cache a panel of scores saves 20 of 410 cycles at
--     D = 64, its loop's end being guessed, but calls took 2% less to 3% more, and products of values and
--     the backward up to 5% more.
--   * Beside SDPA there, one thread, processor time in turns, the fastest of two turns on a busy host, N
--     = 512 and 2048 with 4 heads: forward D = 32 1.16 and 1.32, D = 64 1.20 and 1.12, D = 128 1.17 and
--     1.04, causal 1.4 to 2.2; backward D = 32 1.52 and 1.62, D = 64 1.30 and 1.38, D = 128 1.15 and
--     1.16, causal 1.4 to 3.0; forward N = 8192, one head, causal, D = 32 1.40, D = 64 1.14, D = 128
--     1.13. So 1.2 is not shown for the forward at D = 64, nor reached at D = 128, nor 1.3 for its
--     backward. In calmer turns SDPA runs at 0.75 to 0.81 of the bare loop in the forward at D = 128 and
--     0.70 to 0.75 in the backward: 1.2 and 1.3 of it are 0.90 to 0.97 and 0.91 to 0.97, and ours 0.82
--     to 0.86 and 0.82 to 0.86; D = 64 backward 0.62 to 0.66, 1.3 of it is 0.81 to 0.86, and ours 0.78
--     to 0.81. Two threads by the wall clock, N = 2048, two runs of the same library, forward and backward:
--     D = 32 0.94, 1.31 and 1.42, 1.54, D = 64 0.93, 1.13 and 0.97, 1.00, D = 128 0.81, 0.93 and 1.13, 1.17;
--     the backward at D = 64 took 82 ms in both and 66 in a run without SDPA: a thread is disturbed at one
--     time and not at another. They are 2.0 times one thread in the backward at D = 64 and the forward at D
--     = 128.
--   * This section on a core of a shared Xeon (Sapphire Rapids or later) in one run, with the matrix unit,
--     while sgemm had 83 to 97 GFLOP/s a core, 0.6 of a quiet hour's: of sgemm forward 0.73 to 1.09, backward
--     0.78 to 1.15, all met; of SDPA, where 1.2 and 1.3 are asked, D = 64 forward 1.6 to 2.6, backward 1.07
--     to 1.80, D = 128 0.97 to 1.96 and 0.88 to 1.81, D = 32 0.99 to 2.25 and 0.92 to 1.69, the causal ones
--     above 1.5 but for D = 32's backward and D = 64's at N = 2048 (1.19): what the neighbours leave of the
--     unit decides.
--   * f32 there by clocks around every step, N = 2048, D = 32, ticks for 32 x 32 pairs: the forward 3490,
--     of which the exponentials and the scores beside them were 1700, the first scores of four 250, values
--     1150, maxima 120, keys 100, results 100; the backward 4540, S and dP 990, P and dS 1170, dQ 720, dK
--     and dV 870, loading, packing and results 690. The forward's products take 560 from the first cache,
--     and the other instructions 430 by counting, the backward's 1390 and 730. So values are added while
--     the next keys become probabilities, S and dP of the next pairs and dQ of the last ones made beside P
--     and dS, and exponentials are nine instructions instead of twelve (vreduceps, vscalefps; at most 1.0
--     of half a last bit instead of 1.4). Expected: the larger of the two sums instead of both. Measured:
--     forward 2960, in a calmer run 1920, backward 4050. SDPA's time over ours, one run in turns,
--     processor time, before and now: forward D = 32, N = 512 1.23 and 1.56, N = 2048 1.27 and 1.63,
--     causal 1.56 and 1.92; D = 64 1.50 and 1.64, 1.60 and 1.79; D = 128 1.65 and 1.72; backward D = 32
--     1.26 and 1.35, 1.24 and 1.34, causal 1.38 and 1.52; D = 64 1.48 and 1.50, D = 128 1.37 and 1.42. In
--     another run, where SDPA's backward was a tenth faster: forward D = 32 1.25 and 1.62, 1.30 and 1.69;
--     backward 1.08 and 1.11, 1.15 and 1.21, D = 64 1.28 and 1.34, D = 128 1.35 and 1.34. In a third run,
--     of what is kept: forward 1.36 and 1.62, 1.37 and 1.66; backward D = 32 1.32 and 1.26 (1.40 before
--     the last step below), 1.27 and 1.32, causal 1.46 and 1.45; D = 64 1.41 and 1.46, D = 128 1.41 and
--     1.42. So 1.2 is there for the forward, and 1.3 for the backward but at D = 32, where it is met in
--     some turns and not in others. What is between the two sums and what is measured was not found.
--   * Tried there without gain. What the unit loads next asked for ahead, an eighth between each two
--     turns: 3 to 5% slower, D = 128 a fifth; of probabilities, too, 2% more. Pieces of 64 keys, which
--     halves what is held: 0 to 8% slower. In the forward no steps beside the last two turns of eight, and
--     the sides of a product loaded before the one before it is stored: D = 32 2% slower, D = 128 2%
--     faster; in the backward that gave, in two runs, 3 and -10% at D = 32 and N = 512, 3 and 1% at N =
--     2048, -1 and 4% at D = 64, 0 and 5% at D = 128, and is kept. No asking ahead for the lines that
--     parts of P and dS are written to: D = 32 1 to 6% slower, D = 64 6% faster, D = 128 2% slower.
--   * f32 there while the unit had its full speed (24 products of tiles in 136 ns from the first cache, 16
--     cycles each), N = 2048, D = 32, 4 heads, backward with parts of it left out, ms: all 31.4; no dK and dV
--     24.2; no dQ 28.0; no S and dP 28.0; no P and dS 21.3; P and dS alone 12.9; none of them 2.7, of which
--     rows loaded 0.9, keys taken apart 0.8, rows 0.5, results 0.5, row panels in f32 0.2. So the products
--     take 18.6 where 16 cycles each are 11.1, and P and dS 8.6 to 10, 23 to 27 cycles a vector of 16, of
--     which 33 instructions on two ports are 17; and what is made beside each other takes nearly the sum.
--     Tried: all five products beside P and dS of each 32 x 32 pairs, whose parts never leave the first cache
--     (expected: products alone, a quarter less; 31.6, without P and dS 22.6 instead of 21.3: each product
--     has sums to fetch and store, which dK and dV otherwise have once for three), a step at a time between P
--     and dS there (31.9), lines not asked for ahead there (31.8). The exponentials of the next rows between
--     the instructions that take these rows apart: P and dS alone 12.2, all of it within 1% at D = 32, 64 and
--     128. Row panels of q and dout packed only for the blocks that are not made in parts: medians of two or
--     three runs, D = 32 -1, -1 and 3% at N = 512, -1 and -1% at N = 2048, D = 64 -1 and -1%, D = 128 -1 and
--     0%: kept, for what is not done.
--   * Dilation there, r = 16 against r = 1, with and without anything cleared: forward D = 32 1.09 and 1.02,
--     D = 64 1.11 and 1.02, backward 1.11 and 1.03, 1.15 and 1.04. So what misses 1.05 are zeros: 16 MB and
--     48 MB at 17 to 19 GB/s. One core clears 24 GB/s by stores past the caches, 27 by stores, 30 by "rep
--     stosb" of 16 MB at once, which for pieces of 256 KB made the call 4% slower (14.6 instead of 14.0 ms),
--     ordinary stores 8% (15.2). Beside products whose tiles stay in the first cache zeros cost nothing ("rep
--     stosb" of 4 KB or stores, up to 12 lines for 24 products; stores past the caches 12 to 16 ns a line
--     where there are one or two), so it was built: tasks cleared rows that no branch keeps, 4 KB between two
--     blocks of 32 x 32 pairs, and stored the others. Expected: 1.03. Measured: forward D = 32 16.0 ms
--     instead of 14.3, D = 64 12.6 instead of 11.0, D = 128 12.0 instead of 10.2, backward 40.3 instead of
--     36.1, 35.5 instead of 30.5, 33.9 instead of 30.2, at r = 4 within 4%: a line takes 7 to 10 ns, most
--     likely because tiles come from the second cache, whose lines zeros push out and whose buffers they
--     fill. By stores past the caches, 1, 4 or 16 KB at a time, in another run (medians) 13.4 instead of 12.8
--     and 9.9 to 10.2 instead of 10.4 forward, 34.0 to 34.7 instead of 33.0 and 29.1 to 33.5 instead of 29.6
--     backward. Dropped.
--   * Two threads there, N = 1024: two processes of one thread beside each other take the time of one (1.81
--     and 1.82 ms, one causal head), and the system knows of no siblings among the processors, so the host is
--     not what misses 1.8. Best turns, forward with 1, 3 and 8 heads 1.4 to 1.6, 1.6 and 2.0, causal 1.7, 1.6
--     and 1.9, backward 1.7, 1.7 and 1.9 to 2.0, causal 1.4, 1.5 and 1.9: eight heads have it, and few heads,
--     which have to be cut, pack their keys (forward) or rows (backward) once for each piece. Of one causal
--     head's two runs of keys in the backward, cut at multiples of 128, the longer has 0.56 of the pairs,
--     1.78 at best; but cut at multiples of 32 (0.52) the backward of one and three causal heads stays at
--     1.43 to 1.55, as before, so it is not the balance.
--   * Two threads there, later: one head of 1024 rows was cut into four chunks of 288, 288, 288 and 160
--     rows, so that one thread had 576, and each packed all keys; in the backward four runs of keys packed
--     all rows.
--     Few heads now get no more pieces than every thread needs, as even as multiples of 96 allow (480 and
--     544), and a backward task with two runs keeps what a run adds to dq until its turn comes instead of
--     waiting. Fastest turns before and now, one head: forward 1.54 and 1.88, backward 1.68 and 1.94. The
--     fastest of 31 turns in another run, 1, 2, 3 and 8 heads: forward 1.79, 1.86, 1.91, 1.85, backward 1.82,
--     1.86, 1.88, 1.91; causal forward 1.27, 1.73, 1.75, 1.79, backward 1.48, 1.74, 1.67, 1.89. Of one causal
--     head the longer run of keys has 0.56 of the pairs; cut at multiples of 32 it was not tried again.
--   * Two threads there, a third time, by the fastest of 8 to 21 turns in several runs that neighbours
--     disturbed. The backward's runs of keys cut at multiples of 32, since no thread waits now: one causal
--     head 1.29, 1.36 and 1.65 ms before, 1.14, 1.16 and 1.30 with it: kept. Packed keys shared by the runs
--     of a head, each block packed by whoever needs it first (expected: one packing instead of two to three,
--     a tenth of one head's forward): one head 0.66 before, 0.74 ms with it, causal 0.46 and 0.51, two heads
--     1.43 and 1.29, causal 0.90 and 0.86, three 2.03 and 1.89, causal 1.29 and 1.34: what another core has
--     packed comes from its cache. Causal rows of few heads in as many runs as threads, of as many pairs
--     each, instead of five even ones taken as threads come (1.7 packings instead of 3): a Zen 3 0.98 and
--     1.03 ms, 1.95 and 2.03, 3.16 and 2.98; and a core that is disturbed keeps the other waiting. Both
--     dropped.
--   * Dilation there with 8192 kept rows, r = 16 against r = 1, the fastest of seven turns, D = 32, 64, 128:
--     forward 0.98, 1.02, 1.08, backward 1.06, 1.09, 1.08, where in the same run 2048 rows had 1.10, 1.12,
--     1.13 and 1.11, 1.12, 1.14, and r = 4 1.04, 1.06, 1.09 and 0.99, 1.06, 1.08.
--   * Zeros there once more, in a bare loop of products from 256 KB (9.5 ms alone) with 16 MB of zeros: all
--     at once past the caches 0.65 ms more, a line each 64 products' time 0.85, by whole lines (movdir64b)
--     0.5 to 0.8, by stores 0.8 to 1.0. So hiding them saves nothing, and in the engine no way to store made
--     a difference: with the unit at full speed r = 16 took, of 2048 rows, 1.14 to 1.17 by lines of 64 bytes,
--     1.14 by movdir64b, 1.11 to 1.20 by "rep stosb", 1.12 to 1.26 through the caches. When neighbours leave
--     the unit a quarter of its speed it is 1.04 to 1.07, whatever stores.
--
-- The other side is measured in turns with ours (see lua/lacuna/bench.lua); gathering is not counted against
-- PyTorch: its inputs are contiguous and gathered already.

local lac = require "lacuna"

local function inputs(o)
  local n = o.rows * (o.dilation or 1)
  local options = { dtype = o.dtype, grad = o.grad }
  local q = lac.randn({ 1, o.queries or n, o.heads, o.width }, options)
  local k = lac.randn({ 1, n, o.heads, o.width }, options)
  local v = lac.randn({ 1, n, o.heads, o.width }, options)
  local pattern = { segments = { n }, dilations = { o.dilation or 1 }, offset = "branch", causal = o.causal,
                    align = o.queries and "end" or nil, return_lse = false }
  return q, k, v, pattern
end

local function forward(o)
  local q, k, v, pattern = inputs(o)
  return function() return lac.attend(q, k, v, pattern) end
end

local function backward(o)
  o.grad = true
  local q, k, v, pattern = inputs(o)
  local out = lac.attend(q, k, v, pattern)
  local g = lac.randn(out:size(), { dtype = o.dtype })
  local options = { grad_outputs = { g }, retain_graph = true }
  return function() return lac.grad(out, { q, k, v }, options) end
end

-- pairs times 4 D forward, 10 D backward (five products)
local function flops(o, each)
  local pairs_of = o.causal and o.rows * (o.rows + 1) / 2 or o.rows * o.rows
  return each * o.width * o.heads * pairs_of
end

local TARGET = { [32] = { 0.7, 0.5 }, [64] = { 0.8, 0.6 }, [128] = { 0.7, 0.5 } }

local function kernels(b)
  for _, width in ipairs{ 32, 64, 128 } do
    for _, causal in ipairs{ false, true } do
      local o = { rows = b:size(2048, 64), heads = 128 / width, width = width, causal = causal }
      local name = ("D %d%s"):format(width, causal and " causal" or "")
      local one = b.threads == 1
      b:row{ what = "forward " .. name, ours = forward(o), floor = "sgemm", work = flops(o, 4),
        as = "share", at_least = one and TARGET[width][1] or nil }
      b:row{ what = "backward " .. name, ours = backward(o), floor = "sgemm", work = flops(o, 10),
        as = "share", at_least = one and TARGET[width][2] or nil }
    end
  end
end

-- Rows that no branch keeps have to be cleared at the pace of memory, however little is computed for the
-- others: of 2048 kept rows at r = 16 as much as a tenth of the time, of 8192 it should be a quarter of that.
local function dilations(b)
  for _, case in ipairs{ { 2048, 4 }, { 2048, 16 }, { 8192, 16 } } do
    local rows, r = case[1], case[2]
    for _, width in ipairs{ 32, 64, 128 } do
      local dense = { rows = b:size(rows, 64), heads = 128 / width, width = width }
      local dilated = { rows = dense.rows, heads = dense.heads, width = width, dilation = r }
      local text = ("%%s D %d, %d rows, r = %d against r = 1"):format(width, dense.rows, r)
      b:row{ what = text:format("forward"), ours = forward(dilated), floor = forward(dense),
        against = "r = 1", as = "time", at_most = 1.05 }
      b:row{ what = text:format("backward"), ours = backward(dilated), floor = backward(dense),
        against = "r = 1", as = "time", at_most = 1.05 }
    end
  end
end

-- all threads against one: few heads are the hard case, because a head has to be cut
local function threads(b)
  local n = b.threads
  local function on(count, fn)
    return function()
      lac.threads(count)
      return fn()
    end
  end
  local sgemm = b:floor("sgemm")
  b:row{ what = ("sgemm, %d threads against 1: the ceiling"):format(n), ours = on(n, sgemm),
    floor = on(1, sgemm), against = "1 thread", as = "speedup" }
  for _, heads in ipairs{ 1, 3, 8 } do
    for _, causal in ipairs{ false, true } do
      local o = { rows = b:size(1024, 64), heads = heads, width = 64, causal = causal }
      local text = ("%%s %d heads%s, %d threads against 1"):format(heads, causal and " causal" or "", n)
      local f, g = forward(o), backward(o)
      b:row{ what = text:format("forward"), ours = on(n, f), floor = on(1, f), against = "1 thread",
        as = "speedup", at_least = n == 2 and 1.8 or nil }
      b:row{ what = text:format("backward"), ours = on(n, g), floor = on(1, g), against = "1 thread",
        as = "speedup", at_least = n == 2 and 1.8 or nil }
    end
  end
  lac.threads(n)
end

local function peers(b)
  for _, width in ipairs{ 32, 64, 128 } do
    for _, rows in ipairs(b:size({ 512, 2048, 8192 }, { 64 })) do
      for _, causal in ipairs{ false, true } do
        local o = { rows = rows, heads = rows > 2048 and 1 or 4, width = width, causal = causal }
        local arguments = { heads = o.heads, rows = rows, head_dim = width, causal = causal }
        local name = ("N %d, D %d%s"):format(rows, width, causal and ", causal" or "")
        b:row{ what = "forward " .. name, ours = forward(o), work = flops(o, 4), unit = "FLOP/s",
          at_least = 1.2, against = "SDPA",
          peer = { script = "attention", case = "forward", arguments = arguments } }
        b:row{ what = "backward " .. name, ours = backward(o), work = flops(o, 10), unit = "FLOP/s",
          at_least = 1.3, against = "SDPA",
          peer = { script = "attention", case = "backward", arguments = arguments } }
      end
    end
  end
end

local function others(b)
  for _, dtype in ipairs{ "bf16", "f16" } do
    local o = { rows = b:size(2048, 64), heads = 2, width = 64 }
    local half = { rows = o.rows, heads = 2, width = 64, dtype = dtype }
    b:row{ what = ("forward %s against f32"):format(dtype), ours = forward(half), floor = forward(o),
      against = "f32", as = "time" }
    b:row{ what = ("backward %s against f32"):format(dtype), ours = backward(half), floor = backward(o),
      against = "f32", as = "time" }
  end
  for _, queries in ipairs{ 1, 8 } do
    local o = { rows = b:size(32768, 64), heads = 8, width = 64, queries = queries, causal = true }
    b:row{ what = ("decoding, %d queries, %d keys"):format(queries, o.rows), ours = forward(o),
      floor = "copy",
      work = 2 * 4 * o.rows * o.heads * o.width, as = "share" }
  end
end

return {
  name = "attention",
  about = "attention's kernels: sgemm, dilation, threads, PyTorch's SDPA, half precision, decoding",
  run = function(b)
    kernels(b)
    dilations(b)
    if b.threads > 1 then threads(b) end
    peers(b)
    others(b)
  end,
}
