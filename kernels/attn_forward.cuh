/* attn_forward.cuh: the forward of attention on tensor cores. Half types to D = 128 without dropout and without options
 * of single pairs have attn_forward_plain.cuh.
 *
 * A block has 128 query rows (64 for head dimensions above 128) in shared memory and walks over the keys its rows may
 * see, 64 to 16 at a time. Keys and values are double-buffered by cp.async: a step first asks for the next tile, then
 * computes, so there is one barrier a step. Scores, the running maximum and sum, and the output stay in registers
 * (online softmax in base 2, Milakov and Gimelshein 2018); blocks outside the band of the mask are skipped, by whole
 * blocks for all and by steps for each warp. Whatever a step has to mask costs four shuffles and one select a score.
 *
 * Floor: 4 D products a pair on tensor cores, and one ex2 a pair. Shared memory feeds both operands, so a warp owns 32
 * rows: every key fragment serves two products. Rejected: 16 rows a warp with twice the warps (shared memory becomes
 * the limit), keeping the query fragments in registers for D = 128 (spills).
 *
 * The main loop has no branch between its two products but those of masks and dropout: sums are rescaled in every step.
 * Voting whether a maximum moved, row by row, cost 6% for D = 64 and 4% for D = 128; one vote a step is 2% better
 * than none at best. Of shapes, 48 keys a step with three blocks a multiprocessor (168 registers) and, for D = 128, 64
 * keys with two were best, 128 rows a block always. bf16 on an H200, TFLOP/s of 4 D a visible pair, beside what the
 * shapes and votes before reached and PyTorch's FlashAttention-2 in the same run (without dropout, which
 * attn_forward_plain.cuh has now):
 *
 *                      1024 rows          causal          8192 rows          causal
 *     D = 64      234, 210, 278    177, 151, 210     282, 264, 302    261, 245, 284
 *     D = 128     299, 258, 324    210, 184, 240     364, 326, 357    320, 284, 318
 *
 * Slower (D = 64 / D = 128, 8192 rows): 256 rows by eight warps, one block (239 / 298); 16 rows a warp, eight warps,
 * two blocks (241 / 258); 32 keys, three blocks (249) or two (300); 80 keys with one vote, two blocks (285, but 220 at
 * 1024 rows).
 */
#ifndef LAC_CUDA_ATTN_FORWARD_CUH
#define LAC_CUDA_ATTN_FORWARD_CUH
#include "attn_mma.cuh"

template <class A, class Op, int DP, int M, int WARPS, int BN, int MINIMUM>
__global__ void __launch_bounds__(WARPS * 32, MINIMUM) attn_forward_kernel(const __grid_constant__ A a)
{
    typedef typename Op::T T;
    typedef typename Op::tile Tile;
    constexpr int WM = 16 * M, BM = WM * WARPS, N = BN / 8, E = DP / 8, QB = BM * Tile::ROW, KB = BN * Tile::ROW;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t sq = attn_tiles(memory), sk = sq + QB, sv = sk + 2 * KB;
    constexpr int WORDS = (BN + 63) / 64;
    __shared__ uint64_t seen[WORDS * BM], kept[WORDS * BM]; /* masks of each row */
    __shared__ attn_row<float> rows[BM];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __shared__ attn_tile t;
    __shared__ typename attn_walk<A, false>::list list;
    if (!attn_next<false>(a, BM, t)) return;
    const int hk = t.h / a.group, w0 = t.first + warp * WM, w1 = w0 + WM < t.end ? w0 + WM : t.end;
    int low, high;
    attn_reach<false>(t, &low, &high);
    const bool pad = a.padding != NULL;
    float o[M][E][4], top[M][2], sum[M][2];
    const bool quick = attn_quick(a, a.k, t) && attn_quick(a, a.v, t);
    attn_stream<Tile, T, BN, DP, WARPS * 32, attn_follow<A>> ks(list.origin[0]), vs(list.origin[1]);
    ks.start(a, a.k, t, hk, 0, low);
    vs.start(a, a.v, t, hk, 0, low);
    auto load = [&](int k0, int k1, int stage) {
        if (quick) {
            ks.next(sk + stage * KB, a, a.k, t, hk, k0, attn_limit(a, k1, t.live));
            vs.next(sv + stage * KB, a, a.v, t, hk, k0, attn_limit(a, k1, t.live));
        } else {
            attn_load<Tile, T, BN, DP, WARPS * 32>(sk + stage * KB, a, a.k, t, hk, 0, k0, attn_limit(a, k1, t.live),
                                                   pad);
            attn_load<Tile, T, BN, DP, WARPS * 32>(sv + stage * KB, a, a.v, t, hk, 0, k0, attn_limit(a, k1, t.live),
                                                   pad);
        }
    };
    attn_load_once<Tile, T, BM, DP, WARPS * 32>(sq, a, a.q, t, t.h, a.shift, t.first, t.end, false);
    attn_walk<A, false> walk;
    walk.start();
    clear(o);
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) top[m][i] = -INFINITY, sum[m][i] = 0;
    int stage = 1, end = low, next;
#pragma unroll 1
    for (int k0 = -1; k0 < high; k0 = next, stage ^= 1) { /* the first turn only loads */
        attn_arrived();
        __syncthreads();
        const int limit = attn_limit(a, end, t.live);
        next = walk.seek(a, t, list, t.h, end, high, BN, &end);
        if (next < high) load(next, end, stage ^ 1);
        attn_commit();
        if (k0 < 0 || w0 >= w1 || k0 > w1 - 1 + t.after || k0 + BN <= w0 - t.before) continue;
        const bool partial = k0 + BN > t.live || k0 + BN - 1 > w0 + t.after || k0 < w1 - 1 - t.before || pad ||
                             a.dedup || attn_short(a, k0, limit, BN);
#pragma unroll 1
        for (int w = 0; w < WORDS && (partial || a.p > 0); w++) {
            const int row = w0 + lane % WM, first = k0 + 64 * w;
            if (partial)
                attn_tell<M>(seen + w * BM, attn_row_keys(a, t, t.h, row, first, attn_alive(a, t, first)) &
                                                attn_within(a, first, limit));
            if (a.p > 0) attn_tell<M>(kept + w * BM, attn_kept<false>(a, t, t.h, row, first));
        }
        float *extra = attn_floats(memory, QB + 4 * KB, warp * WM * attn_extra_row(BN));
        attn_gather<false, T, WM, BN>(a, t, t.h, w0, w1, k0, limit, extra);
        float s[M][N][4];
        scores<Op, DP>(s, sq, warp * WM, sk + stage * KB);
        attn_add<false>(a, t, t.h, w0, k0, extra, s);
        if (a.log2_scale < 0) negate(s);
        if (partial) attn_select(s, seen, BM, -INFINITY);
        float shrink[M][2];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float most = fmaxf(quad_max(row_max(s[m], i)) * a.log2_magnitude, top[m][i]);
                const float shift = most == -INFINITY ? 0 : most;
                shrink[m][i] = attn_ex2(top[m][i] - shift);
                top[m][i] = most;
                float part = 0;
#pragma unroll
                for (int n = 0; n < N; n++) {
                    s[m][n][2 * i] = attn_ex2(fmaf(s[m][n][2 * i], a.log2_magnitude, -shift));
                    s[m][n][2 * i + 1] = attn_ex2(fmaf(s[m][n][2 * i + 1], a.log2_magnitude, -shift));
                    part += s[m][n][2 * i] + s[m][n][2 * i + 1];
                }
                sum[m][i] = fmaf(sum[m][i], shrink[m][i], part);
            }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int e = 0; e < E; e++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[m][e][i] *= shrink[m][i / 2];
        if (a.p > 0) attn_select(s, kept, BM, 0);
        weighted<Op>(o, s, sv + stage * KB);
    }
    attn_arrived();
    /* A masked value that is not finite spoils rows that do not see it: this rare tile is done again, row by row. Where
     * mask or bias hides a key and dropout drops the pair, only the sum of the weights shows it. */
    const bool hides = attn_hides(a), masks = a.causal || a.window >= 0 || a.dedup || hides;
    const bool spoilt = __syncthreads_or(masks && !(finite(o) && (!hides || finite(sum))));
    attn_wait<false>(a, t);
    attn_leave_forward<T, DP>(a, t, lane, attn_floats(memory, 0, warp * WM * DP), rows + warp * WM, w0, w1, spoilt, o,
                              top, sum);
    attn_signal<false>(a, t);
}

template <class Op, int DP, int M, int WARPS, int BN, int MINIMUM, class A>
static int launch(A &a, const lac_plan *plan)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, false, 16 * M * WARPS, &tiles, attn_block_of(a)));
    return attn_launch(attn_forward_kernel<A, Op, DP, M, WARPS, BN, MINIMUM>, a, tiles, WARPS * 32,
                       attn_tile_bytes((16 * M * WARPS + 4 * BN) * Op::tile::ROW, 16 * M * WARPS, DP) +
                           attn_extra_bytes(a, 16 * M * WARPS, BN));
}

#endif
