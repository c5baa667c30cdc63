/* attn_queries.cuh: the backward of attention on tensor cores, seen from the queries: dq, and deltas where a branch
 * needs its own.
 *
 * What attn_joint.cuh does not do in one pass (f32, options of pairs, small blocks, D above 128, short lattices, too
 * little shared memory) takes two that share nothing: this one owns query rows and sums over keys (dq), the other
 * owns keys and sums over query rows (attn_keys.cuh). Both recompute the scores, P = exp2(S - lse), dS = P (dP -
 * delta), so seven products run instead of five, but no sum ever crosses blocks: results are the same bits every time,
 * and no f32 copy of dq is written and read back. Merges with one softmax per branch, or with constant weights, run
 * this pass once before, whatever computes the gradients, for the sums of P and P dP over all keys whose quotient is
 * the branch's delta.
 *
 * Rejected: atomic sums of dq (not deterministic).
 */
#ifndef LAC_CUDA_ATTN_QUERIES_CUH
#define LAC_CUDA_ATTN_QUERIES_CUH
#include "attn_mma.cuh"

template <class A, class Op, int DP, int M, int WARPS, int BN, int MINIMUM>
__global__ void __launch_bounds__(WARPS * 32, MINIMUM) attn_queries_kernel(const __grid_constant__ A a)
{
    typedef typename Op::T T;
    typedef typename Op::tile Tile;
    constexpr int WM = 16 * M, BM = WM * WARPS, N = BN / 8, E = DP / 8, QB = BM * Tile::ROW, KB = BN * Tile::ROW;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t sq = attn_tiles(memory), sg = sq + QB, sk = sg + QB, sv = sk + 2 * KB;
    __shared__ uint64_t seen[BM], kept[BM];
    __shared__ attn_row<float> rows[BM];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __shared__ attn_tile t;
    __shared__ typename attn_walk<A, false>::list list;
    if (!attn_next<false>(a, BM, t)) return;
    const int hk = t.h / a.group, w0 = t.first + warp * WM, w1 = w0 + WM < t.end ? w0 + WM : t.end;
    int low, high;
    attn_reach<false>(t, &low, &high);
    const float gz = (float)(a.gscale * a.keep_scale);
    const bool pad = a.padding != NULL;
    float dq[M][E][4], lse[M][2], delta[M][2], weight[M][2] = {}, dot[M][2] = {};
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
    attn_load_once<Tile, T, BM, DP, WARPS * 32>(sg, a, a.g, t, t.h, a.shift, t.first, t.end, false);
    attn_walk<A, false> walk;
    walk.start();
    if (attn_wants_bias(a)) attn_wait<false>(a, t);
    clear(dq);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = w0 + 16 * m + 8 * i + lane / 4;
            const int64_t at = attn_stat(a, t, t.h, row < w1 ? row : t.first, a.per_branch);
            lse[m][i] = row < w1 ? ((const float *)a.lse2)[at] : INFINITY;
            delta[m][i] = row < w1 ? ((const float *)a.delta)[at] : 0;
        }
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
        if (partial)
            attn_tell<M>(seen, attn_row_keys(a, t, t.h, w0 + lane % WM, k0, attn_alive(a, t, k0)) &
                                   attn_within(a, k0, limit));
        if (a.p > 0) attn_tell<M>(kept, attn_kept<false>(a, t, t.h, w0 + lane % WM, k0));
        float *extra = attn_floats(memory, 2 * QB + 4 * KB, warp * WM * attn_extra_row(BN));
        attn_gather<false, T, WM, BN>(a, t, t.h, w0, w1, k0, limit, extra);
        float s[M][N][4], d[M][N][4];
        scores<Op, DP>(s, sq, warp * WM, sk + stage * KB);
        attn_add<false>(a, t, t.h, w0, k0, extra, s);
        scores<Op, DP>(d, sg, warp * WM, sv + stage * KB);
        if (a.p > 0) attn_select(d, kept, BM, 0);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][n][i] = attn_ex2(fmaf(s[m][n][i], a.log2_scale, -lse[m][i / 2]));
        if (a.deltas) {
            attn_clear_hidden(a, extra, s);
            if (partial) {
                attn_select(s, seen, BM, 0);
                attn_select(d, seen, BM, 0);
            }
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        weight[m][i / 2] += s[m][n][i];
                        dot[m][i / 2] = fmaf(s[m][n][i], s[m][n][i] == 0 ? 0.f : d[m][n][i] * gz, dot[m][i / 2]);
                    }
            continue;
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) d[m][n][i] = s[m][n][i] * fmaf(d[m][n][i], gz, -delta[m][i / 2]);
        if (partial) attn_select(d, seen, BM, 0);
        if (attn_wants_bias(a)) attn_add_dbias(a, t, w0, w1, k0, limit, extra, d);
        weighted<Op>(dq, d, sk + stage * KB);
    }
    attn_arrived();
    if (a.deltas) {
        attn_put_deltas(a, t, lane, w0, w1, weight, dot);
        return;
    }
    const bool spoilt = __syncthreads_or((a.causal || a.window >= 0 || a.dedup || attn_hides(a)) && !finite(dq));
    attn_wait<false>(a, t);
    attn_leave_backward<false, T, DP>(a, t, lane, 0, (float)a.scale, attn_floats(memory, 0, warp * WM * DP),
                                      rows + warp * WM, w0, w1, spoilt, dq);
    attn_signal<false>(a, t);
}

template <class Op, int DP, int M, int WARPS, int BN, int MINIMUM, class A>
static int launch(A &a, const lac_plan *plan)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, false, 16 * M * WARPS, &tiles, attn_block_of(a)));
    return attn_launch(attn_queries_kernel<A, Op, DP, M, WARPS, BN, MINIMUM>, a, tiles, WARPS * 32,
                       attn_tile_bytes((32 * M * WARPS + 4 * BN) * Op::tile::ROW, 16 * M * WARPS, DP) +
                           attn_extra_bytes(a, 16 * M * WARPS, BN));
}

#endif
