/* attn_forward_plain.cuh: the forward of attention on tensor cores without dropout, for half types to D = 128.
 *
 * Tiles, shapes and tables are those of attn_forward.cuh. Nothing stands between exponentials and the product with
 * values, so that those of 16 keys run under the products of the 16 before. Sums are rescaled only where a row's
 * maximum has grown by more than 2^8, and weights may be that large: a warp asks once a step, and mostly passes over
 * it. A last step that sees at most 16 or 32 keys is shorter. Queries come and results leave several rows at a time.
 *
 * bf16 on an H200, TFLOP/s of 4 D a visible pair: this, attn_forward.cuh and PyTorch's FlashAttention-2 in one run (D =
 * 128 with rows dealt out as below):
 *
 *              D = 64          causal        D = 128         causal
 *      1024    273, 244, 281   217, 191, 216   332, 301, 328   258, 224, 251
 *      2048    297, 272, 297   258, 232, 262   355, 334, 345   303, 275, 294
 *      4096    306, 282, 306   281, 256, 289   367, 354, 353   333, 313, 320
 *      8192    309, 289, 312   295, 273, 301   372, 362, 355   351, 338, 332
 *     32768    315, 295, 310   306, 285, 308   375, 368, 357
 *
 * Without shorter last steps D = 64 has 267 and 214 at 1024 rows, 310 and 302 at 32768; D = 128, whose steps are 64
 * keys long, is 0.8% to 1.5% faster without, but spills a word. Rejected: other rows of a tile for the n-th warp from
 * tile to tile, because with causality the last see most keys and the n-th warps of all blocks share a quarter of the
 * multiprocessor: 0% to 1.5% slower, without shorter steps no different. Scores of the next step under the exponentials
 * of this one, in the registers that become free, with queries in registers: two blocks a multiprocessor instead of
 * three for D = 64 (250 at 1024 rows where three blocks had 259, 285 and 303 at 32768; two blocks without that 240 and
 * 281, all with whole last steps), and for D = 128, where queries have to be read again, 277 and 331.
 */
#ifndef LAC_CUDA_ATTN_FORWARD_PLAIN_CUH
#define LAC_CUDA_ATTN_FORWARD_PLAIN_CUH
#include "attn_mma.cuh"
#include <cfloat>
#include <type_traits>

template <class Op, int DP, int M, int WARPS, int BN, int MINIMUM>
__global__ void __launch_bounds__(WARPS * 32, MINIMUM) attn_forward_plain_kernel(const __grid_constant__ attn_args a)
{
    typedef typename Op::T T;
    typedef typename Op::tile Tile;
    constexpr int WM = 16 * M, BM = WM * WARPS, E = DP / 8, QB = BM * Tile::ROW, KB = BN * Tile::ROW,
                  BLOCKS = WARPS * 32;
    constexpr float SLACK = 8; /* log2 of the largest weight */
    static_assert(BN <= 64, "one word has a row's pairs");
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t sq = attn_tiles(memory), sk = sq + QB, sv = sk + 2 * KB;
    __shared__ uint64_t seen[BM];
    __shared__ attn_row<float> rows[BM];
    __shared__ attn_tile t;
    __shared__ const char *origin[2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (!attn_next<false>(a, BM, t)) return;
    const int hk = t.h / a.group, w0 = t.first + warp * WM;
    auto w1 = [&]() { return min(w0 + WM, t.end); }; /* a register less */
    int low, high;
    attn_reach<false>(t, &low, &high);
    const bool pad = a.padding != NULL, quick = attn_quick(a, a.k, t) && attn_quick(a, a.v, t);
    attn_stream<Tile, T, BN, DP, BLOCKS, false> ks(origin[0]), vs(origin[1]);
    ks.start(a, a.k, t, hk, 0, low);
    vs.start(a, a.v, t, hk, 0, low);
    attn_load_once<Tile, T, BM, DP, BLOCKS, true>(sq, a, a.q, t, t.h, a.shift, t.first, t.end, false);
    __syncthreads();
    auto load = [&](int k0, int stage) {
        if (quick) {
            ks.next(sk + stage * KB, a, a.k, t, hk, k0, t.live);
            vs.next(sv + stage * KB, a, a.v, t, hk, k0, t.live);
        } else {
            attn_load<Tile, T, BN, DP, BLOCKS>(sk + stage * KB, a, a.k, t, hk, 0, k0, t.live, pad);
            attn_load<Tile, T, BN, DP, BLOCKS>(sv + stage * KB, a, a.v, t, hk, 0, k0, t.live, pad);
        }
        attn_commit();
    };
    float o[M][E][4], top[M][2], sum[M][2];
    clear(o);
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) top[m][i] = -FLT_MAX, sum[m][i] = 0; /* finite: -inf less this is -inf */
    /* keys k0 to k0 + 16 STEPS - 1, which are in `stage` */
    auto step = [&](auto steps, int k0, int stage) {
        constexpr int STEPS = decltype(steps)::value, N = 2 * STEPS;
        float s[M][N][4], shrink[M][2], more[M][2] = {};
        scores<Op, DP>(s, sq, warp * WM, sk + stage * KB);
        if (a.log2_scale < 0) negate(s);
        if (k0 + 8 * N > t.live || k0 + 8 * N - 1 > w0 + t.after || k0 < w1() - 1 - t.before || pad || a.dedup) {
            const int row = w0 + lane % WM;
            attn_tell<M>(seen, attn_row_keys(a, t, t.h, row, k0, attn_alive(a, t, k0)));
            attn_select(s, seen, BM, -INFINITY);
        }
        bool moved = false;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float most = quad_max(row_max(s[m], i)) * a.log2_magnitude;
                const bool grown = most > top[m][i] + SLACK;
                shrink[m][i] = grown ? attn_ex2(top[m][i] - most) : 1;
                top[m][i] = grown ? most : top[m][i];
                moved = moved || grown;
            }
        if (__any_sync(~0u, moved))
#pragma unroll
            for (int m = 0; m < M; m++) {
                sum[m][0] *= shrink[m][0], sum[m][1] *= shrink[m][1];
#pragma unroll
                for (int e = 0; e < E; e++)
#pragma unroll
                    for (int i = 0; i < 4; i++) o[m][e][i] *= shrink[m][i / 2];
            }
        const uint32_t values = attn_opaque(sv + stage * KB);
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 2 * k; n < 2 * k + 2; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[m][n][i] = attn_ex2(fmaf(s[m][n][i], a.log2_magnitude, -top[m][i / 2]));
                        more[m][i / 2] += s[m][n][i];
                    }
            weighted_step<Op>(o, s, values, k);
        }
#pragma unroll
        for (int m = 0; m < M; m++) sum[m][0] += more[m][0], sum[m][1] += more[m][1];
    };
    load(low, 0);
    int stage = 0;
#pragma unroll 1
    for (int k0 = low; k0 < high; k0 += BN, stage ^= 1) {
        attn_arrived();
        __syncthreads();
        if (k0 + BN < high) load(k0 + BN, stage ^ 1);
        const int left = min(high, w1() + t.after) - k0; /* keys that the warp sees */
        if (w0 >= t.end || left <= 0 || k0 + BN <= w0 - t.before) continue;
        if (left <= 16) step(std::integral_constant<int, 1>(), k0, stage);
        else if (left <= 32) step(std::integral_constant<int, 2>(), k0, stage);
        else step(std::integral_constant<int, BN / 16>(), k0, stage);
    }
    attn_arrived();
    /* a masked value that is not finite spoils rows that do not see it: this rare tile is done again, row by row */
    const bool spoilt = __syncthreads_or((a.causal || a.window >= 0 || a.dedup) && !finite(o));
    attn_wait<false>(a, t);
    attn_leave_forward<T, DP, true>(a, t, lane, attn_floats(memory, 0, warp * WM * DP), rows + warp * WM, w0, w1(),
                                    spoilt, o, top, sum);
    attn_signal<false>(a, t);
}

template <class Op, int DP, int M, int WARPS, int BN, int MINIMUM>
static int launch_plain(attn_args &a, const lac_plan *plan)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, false, 16 * M * WARPS, &tiles));
    return attn_launch(attn_forward_plain_kernel<Op, DP, M, WARPS, BN, MINIMUM>, a, tiles, WARPS * 32,
                       attn_tile_bytes((16 * M * WARPS + 4 * BN) * Op::tile::ROW, 16 * M * WARPS, DP));
}

#endif
