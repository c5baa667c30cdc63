/* attn_parts_forward.cuh: the forward of attention in f32 without TF32, on tensor cores (attn_parts.cuh):
 * attn_forward.cuh's walk with products of parts.
 *
 * Keys and values of the next step arrive while a step computes; they are taken apart between two barriers, by as many
 * threads as share them. ex2 is good for f32: exp2f is the same instruction with a detour for results below 2^-126.
 *
 * Floor: 12 D products of bf16 a visible pair, a sixth of what mma.sync does in bf16: about 100 TFLOP/s on an H200.
 * Reached: 54 to 59 (D = 64 and 128). Products keep the tensor cores busy for 56% of the time; there are 4.4
 * instructions for one of them, and two warps a scheduler wait 1.9 of 4.7 cycles an instruction for the one before.
 * Fewer instructions (15%: sums of weighted rows that go on from the small products, ex2, no accumulators to clear)
 * brought 1 to 2%.
 *
 * TFLOP/s, D = 64, 1024 and 8192 rows: this 54.2, 59.1; eight warps of 32 rows, one block 54.0, 59.7; eight warps of 16
 * rows, two blocks (spills) 53.3, 58.0. D = 128: this 53.8, 58.1; four warps 33.8, 36.5.
 */
#ifndef LAC_CUDA_ATTN_PARTS_FORWARD_CUH
#define LAC_CUDA_ATTN_PARTS_FORWARD_CUH
#include "attn_parts.cuh"

template <int DP, int M, int WARPS, int BN, int MINIMUM>
__global__ void __launch_bounds__(WARPS * 32, MINIMUM)
    attn_parts_forward_kernel(const __grid_constant__ attn_pair_args a)
{
    typedef parts_raw<DP> Raw;
    constexpr int WM = 16 * M, BM = WM * WARPS, N = BN / 8, E = DP / 8, THREADS_ = 32 * WARPS;
    constexpr int QB = parts_bytes<DP>(BM), KB = parts_bytes<DP>(BN), RB = BN * Raw::ROW;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t sq = attn_tiles(memory), sk = sq + QB, sv = sk + KB, raw = sv + KB;
    __shared__ uint64_t seen[BM], kept[BM]; /* masks of each row */
    __shared__ attn_row<float> rows[BM];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __shared__ attn_tile t;
    __shared__ attn_spans list;
    if (!attn_next<false>(a, BM, t)) return;
    const int hk = t.h / a.group, w0 = t.first + warp * WM, w1 = w0 + WM < t.end ? w0 + WM : t.end;
    int low, high;
    attn_reach<false>(t, &low, &high);
    const float log2_scale = (float)(a.scale * ATTN_LOG2E);
    const bool pad = a.padding != NULL;
    float o[M][E][4], top[M][2], sum[M][2];
    const bool quick = attn_quick(a, a.k, t) && attn_quick(a, a.v, t);
    typedef parts_stream<DP, BN, THREADS_> stream;
    stream::start(list.origin[0], a.k, t, 0);
    stream::start(list.origin[1], a.v, t, 0);
    auto load = [&](int k0, int k1) {
        parts_load_two<DP, BN, THREADS_>(quick, raw, list.origin, a, a.k, a.v, t, hk, 0, k0, attn_limit(a, k1, t.live),
                                         pad);
    };
    parts_load<DP, BM, 2 * BN, THREADS_>(sq, raw, a, a.q, t, t.h, a.shift, t.first, t.end, false);
    attn_walk<attn_pair_args, false> walk;
    walk.start();
    clear(o);
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) top[m][i] = -INFINITY, sum[m][i] = 0;
    int end = low, next;
#pragma unroll 1
    for (int k0 = -1; k0 < high; k0 = next) { /* the first turn only loads */
        attn_arrived();
        __syncthreads(); /* nobody computes with the step before */
        if (k0 >= 0) {
            parts_put<DP, BN, THREADS_>(sk, BN, 0, raw);
            parts_put<DP, BN, THREADS_>(sv, BN, 0, raw + RB);
            __syncthreads();
        }
        const int limit = attn_limit(a, end, t.live);
        next = walk.seek(a, t, list, t.h, end, high, BN, &end);
        if (next < high) load(next, end);
        attn_commit();
        if (k0 < 0 || w0 >= w1 || k0 > w1 - 1 + t.after || k0 + BN <= w0 - t.before) continue;
        const bool partial = k0 + BN > t.live || k0 + BN - 1 > w0 + t.after || k0 < w1 - 1 - t.before || pad ||
                             a.dedup || attn_short(a, k0, limit, BN);
        if (partial)
            attn_tell<M>(seen, attn_row_keys(a, t, t.h, w0 + lane % WM, k0, attn_alive(a, t, k0)) &
                                   attn_within(a, k0, limit));
        if (a.p > 0) attn_tell<M>(kept, attn_kept<false>(a, t, t.h, w0 + lane % WM, k0));
        float *extra = attn_floats(memory, QB + 2 * KB + 2 * RB, warp * WM * attn_extra_row(BN));
        attn_gather<false, float, WM, BN>(a, t, t.h, w0, w1, k0, limit, extra);
        float s[M][N][4], shrink[M][2];
        parts_scores<DP, BM, BN, false>(s, sq, warp * WM, sk, 0);
        attn_add<false>(a, t, t.h, w0, k0, extra, s);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][n][i] *= log2_scale;
        if (partial) attn_select(s, seen, BM, -INFINITY);
        parts_soften(s, top, sum, shrink);
        if (a.p > 0) attn_select(s, kept, BM, 0);
        parts_weighted<DP, BN>(o, shrink, s, sv, 0);
    }
    attn_arrived();
    /* Taken apart or hidden: this rare tile is done again. Of a dropped pair only the sum of the weights shows it. */
    const bool spoilt = __syncthreads_or(!(finite(o) && finite(sum)));
    attn_wait<false>(a, t);
    attn_leave_forward<float, DP>(a, t, lane, attn_floats(memory, 0, warp * WM * DP), rows + warp * WM, w0, w1, spoilt,
                                  o, top, sum);
    attn_signal<false>(a, t);
}

template <int DP, int M, int WARPS, int BN, int MINIMUM> static int launch(attn_pair_args &a, const lac_plan *plan)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, false, 16 * M * WARPS, &tiles, attn_block_of(a)));
    return attn_launch(attn_parts_forward_kernel<DP, M, WARPS, BN, MINIMUM>, a, tiles, WARPS * 32,
                       attn_tile_bytes(parts_memory<DP>(16 * M * WARPS, 2 * BN), 16 * M * WARPS, DP) +
                           attn_extra_bytes(a, 16 * M * WARPS, BN));
}

#endif
