/* attn_parts_backward.cuh: the backward of attention in f32 without TF32, on tensor cores (attn_parts.cuh): the two
 * passes of attn_queries.cuh and attn_keys.cuh with products of parts.
 *
 * Exponents are base-2 differences in two parts, as in attn_exact_backward.cuh, for the same reason.
 *
 * For D = 128 shared memory holds one block's tiles of 64 rows. SPLIT warps share rows there: each has a part of a
 * step's columns and sums of its own, which are added up at the end. So eight warps run instead of four.
 *
 * TFLOP/s of five products on an H200, 1024 and 8192 rows. D = 64: this 36.1, 39.6; queries by eight warps in one block
 * 35.8, 39.3, the same with 32 rows and half of the columns 34.9, 38.9; keys so 36.5, 40.0 and 35.4, 39.8 (spills).
 * D = 128: this 30.6, 33.5; four warps, not split, 23.7, 25.8. Products keep the tensor cores busy for half of the time
 * (D = 64); what the rest waits for is what it is in the forward.
 */
#ifndef LAC_CUDA_ATTN_PARTS_BACKWARD_CUH
#define LAC_CUDA_ATTN_PARTS_BACKWARD_CUH
#include "attn_parts.cuh"

/* Not attn_two_scales(): a score of -inf comes of keys that do not survive being taken apart, whose rows are repeated
 * by attn_slow.cuh, or of numbers that overflow; then the weight is right, or NaN, and the rows are repeated as well.
 * With both parts of one sign the pass over keys spilled two registers for D = 128 on sm_80, or three more for D = 64.
 */
struct parts_scale {
    float high, low; /* of base-2 scores, in two parts */
    __device__ __forceinline__ parts_scale(const attn_args &a)
        : high((float)(a.scale * ATTN_LOG2E)), low((float)(a.scale * ATTN_LOG2E - (double)high))
    {
    }
    __device__ __forceinline__ float p(float s, float lse, float lse_low) const
    {
        return lse == INFINITY ? 0.f : attn_ex2((s * high - lse) + (s * low - lse_low));
    }
};

/* statistics of rows: lse and its low part, delta and its low part (NULL: zeros) */
__device__ __forceinline__ const float *parts_stats(const attn_args &a, int which)
{
    return (const float *)(which < 2 ? which ? a.lse2_low : a.lse2 : which > 2 ? a.delta_low : a.delta);
}

/* those of a tile's HEIGHT query rows, by THREADS_ threads */
template <int HEIGHT, int THREADS_>
__device__ __forceinline__ void parts_load_stats(float (&stats)[4][HEIGHT], const attn_args &a, const attn_tile &t)
{
    for (int i = threadIdx.x; i < 4 * HEIGHT; i += THREADS_) {
        const int which = i / HEIGHT, row = t.first + i % HEIGHT;
        const float *from = parts_stats(a, which);
        stats[which][i % HEIGHT] = row < t.end && from ? from[attn_stat(a, t, t.h, row, a.per_branch)]
                                   : which             ? 0
                                                       : INFINITY;
    }
}

/* ---- scores s become P, and d, which is dP, becomes dS ---- */

/* Rows are query rows: `stats` are those of the lane's first one, each `height` behind the one before. */
template <int M, int N>
__device__ __forceinline__ void parts_weigh_rows(float (&s)[M][N][4], const parts_scale &scale, const float *stats,
                                                 int height)
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float lse = stats[16 * m + 8 * i], low = stats[height + 16 * m + 8 * i];
#pragma unroll
            for (int x = 0; x < 2 * N; x++) s[m][x / 2][2 * i + x % 2] = scale.p(s[m][x / 2][2 * i + x % 2], lse, low);
        }
}
template <int M, int N>
__device__ __forceinline__ void parts_differ_rows(float (&d)[M][N][4], const float (&p)[M][N][4], float gz,
                                                  const float *stats, int height)
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float delta = stats[2 * height + 16 * m + 8 * i], low = stats[3 * height + 16 * m + 8 * i];
#pragma unroll
            for (int x = 0; x < 2 * N; x++) {
                float &z = d[m][x / 2][2 * i + x % 2];
                z = p[m][x / 2][2 * i + x % 2] * (z * gz - delta - low);
            }
        }
}
/* Columns are query rows: `stats` are those of the lane's first two. */
template <int M, int N>
__device__ __forceinline__ void parts_weigh_columns(float (&s)[M][N][4], const parts_scale &scale, const float *stats,
                                                    int width)
{
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float2 l = *(const float2 *)(stats + 8 * n), low = *(const float2 *)(stats + width + 8 * n);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][n][e] = scale.p(s[m][n][e], e % 2 ? l.y : l.x, e % 2 ? low.y : low.x);
    }
}
template <int M, int N>
__device__ __forceinline__ void parts_differ_columns(float (&d)[M][N][4], const float (&p)[M][N][4], float gz,
                                                     const float *stats, int width)
{
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float2 l = *(const float2 *)(stats + 2 * width + 8 * n);
        const float2 low = *(const float2 *)(stats + 3 * width + 8 * n);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                d[m][n][e] = p[m][n][e] * (d[m][n][e] * gz - (e % 2 ? l.y : l.x) - (e % 2 ? low.y : low.x));
    }
}
/* what attn_put_deltas() sums */
template <int M, int N>
__device__ __forceinline__ void parts_add_deltas(float (&weight)[M][2], float (&dot)[M][2], const float (&p)[M][N][4],
                                                 const float (&d)[M][N][4], float gz)
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                weight[m][i / 2] += p[m][n][i];
                dot[m][i / 2] += p[m][n][i] == 0 ? 0.f : p[m][n][i] * (d[m][n][i] * gz);
            }
}

/* ---- the passes ---- */

template <int DP, int M, int WARPS, int SPLIT, int BN, int MINIMUM>
__global__ void __launch_bounds__(WARPS * 32, MINIMUM)
    attn_parts_queries_kernel(const __grid_constant__ attn_pair_args a)
{
    typedef parts_raw<DP> Raw;
    constexpr int WM = 16 * M, BM = WM * WARPS / SPLIT, WN = BN / SPLIT, N = WN / 8, E = DP / 8, THREADS_ = 32 * WARPS;
    constexpr int QB = parts_bytes<DP>(BM), KB = parts_bytes<DP>(BN), RB = BN * Raw::ROW;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t sq = attn_tiles(memory), sg = sq + QB, sk = sg + QB, sv = sk + KB, raw = sv + KB;
    __shared__ uint64_t seen[SPLIT * BM], kept[SPLIT * BM];
    __shared__ attn_row<float> rows[SPLIT * BM];
    __shared__ float stats[4][BM]; /* lse and delta, each in two parts */
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % SPLIT; /* of a step's columns */
    __shared__ attn_tile t;
    __shared__ attn_spans list;
    if (!attn_next<false>(a, BM, t)) return;
    const int hk = t.h / a.group, w0 = t.first + warp / SPLIT * WM, w1 = w0 + WM < t.end ? w0 + WM : t.end;
    int low, high;
    attn_reach<false>(t, &low, &high);
    const parts_scale scale(a);
    const float gz = (float)(a.gscale * a.keep_scale);
    const bool pad = a.padding != NULL;
    const bool quick = attn_quick(a, a.k, t) && attn_quick(a, a.v, t);
    typedef parts_stream<DP, BN, THREADS_> stream;
    stream::start(list.origin[0], a.k, t, 0);
    stream::start(list.origin[1], a.v, t, 0);
    auto load = [&](int k0, int k1) {
        parts_load_two<DP, BN, THREADS_>(quick, raw, list.origin, a, a.k, a.v, t, hk, 0, k0, attn_limit(a, k1, t.live),
                                         pad);
    };
    parts_load<DP, BM, 2 * BN, THREADS_>(sq, raw, a, a.q, t, t.h, a.shift, t.first, t.end, false);
    parts_load<DP, BM, 2 * BN, THREADS_>(sg, raw, a, a.g, t, t.h, a.shift, t.first, t.end, false);
    attn_walk<attn_pair_args, false> walk;
    walk.start();
    if (attn_wants_bias(a)) attn_wait<false>(a, t);
    parts_load_stats<BM, THREADS_>(stats, a, t);
    float dq[M][E][4], weight[M][2] = {}, dot[M][2] = {};
    clear(dq);
    const float *row = &stats[0][warp / SPLIT * WM + lane / 4];
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
        const int first = k0 + part * WN;
        if (k0 < 0 || w0 >= w1 || first >= limit || first > w1 - 1 + t.after || first + WN <= w0 - t.before) continue;
        const bool partial = first + WN > t.live || first + WN - 1 > w0 + t.after || first < w1 - 1 - t.before || pad ||
                             a.dedup || attn_short(a, first, limit, WN);
        if (partial)
            attn_tell<M>(seen, attn_row_keys(a, t, t.h, w0 + lane % WM, first, attn_alive(a, t, first)) &
                                   attn_within(a, first, limit));
        if (a.p > 0) attn_tell<M>(kept, attn_kept<false>(a, t, t.h, w0 + lane % WM, first));
        float *extra = attn_floats(memory, 2 * QB + 2 * KB + 2 * RB, warp * WM * attn_extra_row(WN));
        attn_gather<false, float, WM, WN>(a, t, t.h, w0, w1, first, limit, extra);
        float s[M][N][4], d[M][N][4];
        parts_scores<DP, BM, BN, false>(s, sq, warp / SPLIT * WM, sk, part * WN);
        attn_add<false>(a, t, t.h, w0, first, extra, s);
        parts_weigh_rows(s, scale, row, BM);
        attn_clear_hidden(a, extra, s);
        if (partial) attn_select(s, seen, BM, 0);
        parts_scores<DP, BM, BN, false>(d, sg, warp / SPLIT * WM, sv, part * WN);
        if (a.p > 0) attn_select(d, kept, BM, 0);
        if (a.deltas) {
            parts_add_deltas(weight, dot, s, d, gz);
            continue;
        }
        parts_differ_rows(d, s, gz, row, BM);
        if (partial) attn_select(d, seen, BM, 0);
        if (attn_wants_bias(a)) attn_add_dbias(a, t, w0, w1, first, limit, extra, d);
        parts_weighted<DP, BN>(dq, d, sk, part * WN);
    }
    attn_arrived();
    typedef attn_split<SPLIT> Split;
    if (a.deltas) {
        attn_put_deltas<float, Split>(a, t, lane, w0, w1, weight, dot, &stats[0][warp / SPLIT * WM], BM);
        return;
    }
    const bool spoilt = __syncthreads_or(!finite(dq));
    attn_wait<false>(a, t);
    attn_leave_backward<false, float, DP, Split>(a, t, lane, 0, (float)a.scale, attn_floats(memory, 0, warp * WM * DP),
                                                 rows + warp * WM, w0, w1, spoilt, dq);
    attn_signal<false>(a, t);
}

template <int DP, int M, int WARPS, int SPLIT, int BQ, int MINIMUM>
__global__ void __launch_bounds__(WARPS * 32, MINIMUM) attn_parts_keys_kernel(const __grid_constant__ attn_pair_args a)
{
    typedef parts_raw<DP> Raw;
    constexpr int WM = 16 * M, BK = WM * WARPS / SPLIT, WN = BQ / SPLIT, N = WN / 8, E = DP / 8, THREADS_ = 32 * WARPS;
    constexpr int KB = parts_bytes<DP>(BK), QB = parts_bytes<DP>(BQ), RB = BQ * Raw::ROW;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t sk = attn_tiles(memory), sv = sk + KB, sq = sv + KB, sg = sq + QB, raw = sg + QB;
    __shared__ uint64_t seen[SPLIT * BK], kept[SPLIT * BK];
    __shared__ attn_row<float> rows[SPLIT * BK];
    __shared__ __align__(16) float stats[2][4][BQ]; /* of two steps: lse and delta, each in two parts */
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % SPLIT; /* of a step's columns */
    __shared__ attn_tile t;
    __shared__ attn_spans list;
    if (!attn_next<true>(a, BK, t)) return;
    const int hk = t.h / a.group, w0 = t.first + warp / SPLIT * WM, w1 = w0 + WM < t.end ? w0 + WM : t.end;
    int low, high;
    attn_reach<true>(t, &low, &high);
    const parts_scale scale(a);
    const float gz = (float)(a.gscale * a.keep_scale);
    const bool pad = a.padding != NULL;
    __shared__ bool quick;
    if (threadIdx.x == 0) quick = attn_quick(a, a.q, t) && attn_quick(a, a.g, t);
    typedef parts_stream<DP, BQ, THREADS_> stream;
    stream::start(list.origin[0], a.q, t, a.shift);
    stream::start(list.origin[1], a.g, t, a.shift);
    auto load = [&](int h, int i0, int i2, int stage) {
        const int limit = attn_limit(a, i2, t.q1);
        parts_load_two<DP, BQ, THREADS_>(quick, raw, list.origin, a, a.q, a.g, t, h, a.shift, i0, limit, false);
#pragma unroll 1
        for (int at = threadIdx.x; at < 4 * BQ; at += THREADS_) {
            const int which = at / BQ, i = i0 + at % BQ;
            const float *from = parts_stats(a, which);
            float *to = &stats[stage][which][at % BQ];
            if (i < limit && from) attn_copy4(attn_shared(to), from + attn_stat(a, t, h, i, a.per_branch));
            else *to = which ? 0 : INFINITY;
        }
    };
    parts_load<DP, BK, 2 * BQ, THREADS_>(sk, raw, a, a.k, t, hk, 0, t.first, attn_limit(a, t.end, t.live), pad);
    parts_load<DP, BK, 2 * BQ, THREADS_>(sv, raw, a, a.v, t, hk, 0, t.first, attn_limit(a, t.end, t.live), pad);
    attn_walk<attn_pair_args, true> walk;
    walk.start();
    int end = low, i1 = -1, next = t.h;
    float dk[M][E][4], dv[M][E][4];
    clear(dk);
    clear(dv);
    int stage = 1;
#pragma unroll 1
    for (; low < high && next >= 0; stage ^= 1) { /* the first turn only loads */
        attn_arrived();
        __syncthreads(); /* nobody computes with the step before */
        if (i1 >= 0) {
            parts_put<DP, BQ, THREADS_>(sq, BQ, 0, raw);
            parts_put<DP, BQ, THREADS_>(sg, BQ, 0, raw + RB);
            __syncthreads();
        }
        const bool any = i1 >= 0;
        const int i = i1 + part * WN, head = next, limit = attn_limit(a, end, t.q1);
        while ((i1 = walk.seek(a, t, list, next, end, high, BQ, &end)) >= high) {
            if ((next = attn_follows(a, t.g, next)) < 0) break;
            walk.start(); /* may end at once: a head may have no active block */
            end = low;
        }
        if (next >= 0) load(next, i1, end, stage ^ 1);
        attn_commit();
        if (!any || w0 >= w1 || i >= limit || i + WN - 1 < w0 - t.after || i > w1 - 1 + t.before) continue;
        const bool partial = w0 + WM > t.live || i < w1 - 1 - t.after || i + WN - 1 > w0 + t.before || pad || a.dedup ||
                             attn_short(a, i, limit, WN);
        if (partial) attn_tell<M>(seen, attn_key_rows(a, t, head, w0 + lane % WM, i) & attn_within(a, i, limit));
        if (a.p > 0) attn_tell<M>(kept, attn_kept<true>(a, t, head, w0 + lane % WM, i));
        float *extra = attn_floats(memory, 2 * KB + 2 * QB + 2 * RB, warp * WM * attn_extra_row(WN));
        attn_gather<true, float, WM, WN>(a, t, head, w0, w1 < t.live ? w1 : t.live, i, limit, extra);
        const float *row = &stats[stage][0][part * WN + lane % 4 * 2];
        float s[M][N][4], d[M][N][4];
        parts_scores<DP, BK, BQ, true>(s, sk, warp / SPLIT * WM, sq, part * WN);
        attn_add<true>(a, t, head, w0, i, extra, s);
        parts_weigh_columns(s, scale, row, BQ);
        attn_clear_hidden(a, extra, s);
        if (partial) attn_select(s, seen, BK, 0);
        parts_scores<DP, BK, BQ, true>(d, sv, warp / SPLIT * WM, sg, part * WN);
        if (a.p > 0) attn_select(d, kept, BK, 0);
        parts_differ_columns(d, s, gz, row, BQ);
        if (partial) attn_select(d, seen, BK, 0);
        if (a.p > 0) attn_select(s, kept, BK, 0);
        parts_weighted<DP, BQ>(dk, d, sq, part * WN);
        parts_weighted<DP, BQ>(dv, s, sg, part * WN);
    }
    attn_arrived();
    const bool spoilt = __syncthreads_or(!(finite(dk) && finite(dv)));
    attn_wait<true>(a, t);
    float *sums = attn_floats(memory, 0, warp * WM * DP);
    attn_row<float> *mine = rows + warp * WM;
    auto leave = [&](int which, auto &x, float own) {
        if (SPLIT > 1) __syncthreads(); /* what was there is written */
        attn_leave_backward<true, float, DP, attn_split<SPLIT>>(a, t, lane, which, own, sums, mine, w0, w1, spoilt, x);
    };
    leave(0, dk, (float)a.scale);
    leave(1, dv, spoilt ? 1.f : gz); /* slow rows have it already */
    attn_signal<true>(a, t);
}

template <int DP, int OWN, int SPLIT, int OTHER, class K>
static int launch(K kernel, attn_pair_args &a, const lac_plan *plan, bool keys, int threads)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, keys, OWN, &tiles, attn_block_of(a)));
    return attn_launch(kernel, a, tiles, threads,
                       attn_tile_bytes(parts_memory<DP>(2 * OWN, 2 * OTHER), SPLIT * OWN, DP) +
                           attn_extra_bytes(a, SPLIT * OWN, OTHER / SPLIT));
}

#endif
