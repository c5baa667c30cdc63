/* attn_keys.cuh: the backward of attention on tensor cores, seen from the keys: dk and dv. What takes two passes, of
 * which this is one, attn_queries.cuh says.
 *
 * A block owns keys of one unit (the heads of a branch that share a key/value head and an offset) and walks over the
 * query rows that may see them, head after head. Scores come out transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T
 * and dS^T are, in the registers where they are made, the left operands of dV += P^T dO and dK += dS^T Q: nothing
 * passes through shared memory but the operands themselves. The lse and delta of the query rows run along with them.
 *
 * Units are found by arithmetic: the first head of a key/value head's group with an offset leads, the tiles of the
 * other heads with the same offset end at once. Head dimensions above 128 run twice, for dk and for dv, because both
 * sums do not fit into registers. Rejected: one block per head and sums over heads afterwards.
 */
#ifndef LAC_CUDA_ATTN_KEYS_CUH
#define LAC_CUDA_ATTN_KEYS_CUH
#include "attn_mma.cuh"

enum { PART_DK = 1, PART_DV = 2 };

template <class A, class Op, int DP, int M, int WARPS, int BQ, int MINIMUM, int PARTS>
__global__ void __launch_bounds__(WARPS * 32, MINIMUM) attn_keys_kernel(const __grid_constant__ A a)
{
    typedef typename Op::T T;
    typedef typename Op::tile Tile;
    constexpr int WM = 16 * M, BK = WM * WARPS, N = BQ / 8, E = DP / 8, KB = BK * Tile::ROW, QB = BQ * Tile::ROW;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t sk = attn_tiles(memory), sv = sk + KB, sq = sv + KB, sg = sq + 2 * QB;
    __shared__ uint64_t seen[BK], kept[BK];
    __shared__ attn_row<float> rows[BK];
    __shared__ __align__(16) float lse[2][BQ], delta[2][BQ];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __shared__ attn_tile t;
    __shared__ typename attn_walk<A, true>::list list;
    if (!attn_next<true>(a, BK, t)) return;
    const int hk = t.h / a.group, w0 = t.first + warp * WM, w1 = w0 + WM < t.end ? w0 + WM : t.end;
    int low, high;
    attn_reach<true>(t, &low, &high);
    const float gz = (float)(a.gscale * a.keep_scale);
    const bool pad = a.padding != NULL;
    const bool quick = attn_quick(a, a.q, t) && attn_quick(a, a.g, t);
    attn_stream<Tile, T, BQ, DP, WARPS * 32, attn_follow<A>> qs(list.origin[0]), gs(list.origin[1]);
    auto begin = [&](int h) {
        qs.start(a, a.q, t, h, a.shift, low);
        gs.start(a, a.g, t, h, a.shift, low);
    };
    begin(t.h);
    auto load = [&](int h, int i0, int i2, int stage) {
        if (quick) {
            qs.next(sq + stage * QB, a, a.q, t, h, i0, attn_limit(a, i2, t.q1));
            gs.next(sg + stage * QB, a, a.g, t, h, i0, attn_limit(a, i2, t.q1));
        } else {
            attn_load<Tile, T, BQ, DP, WARPS * 32>(sq + stage * QB, a, a.q, t, h, a.shift, i0, attn_limit(a, i2, t.q1),
                                                   false);
            attn_load<Tile, T, BQ, DP, WARPS * 32>(sg + stage * QB, a, a.g, t, h, a.shift, i0, attn_limit(a, i2, t.q1),
                                                   false);
        }
        if ((int)threadIdx.x < BQ) {
            const int i = i0 + (int)threadIdx.x;
            const uint32_t l = attn_shared(&lse[stage][threadIdx.x]), d = attn_shared(&delta[stage][threadIdx.x]);
            if (i < attn_limit(a, i2, t.q1)) {
                const int64_t at = attn_stat(a, t, h, i, a.per_branch);
                attn_copy4(l, (const float *)a.lse2 + at);
                attn_copy4(d, (const float *)a.delta + at);
            } else {
                lse[stage][threadIdx.x] = INFINITY;
                delta[stage][threadIdx.x] = 0;
            }
        }
    };
    attn_load_once<Tile, T, BK, DP, WARPS * 32>(sk, a, a.k, t, hk, 0, t.first, attn_limit(a, t.end, t.live), pad);
    attn_load_once<Tile, T, BK, DP, WARPS * 32>(sv, a, a.v, t, hk, 0, t.first, attn_limit(a, t.end, t.live), pad);
    attn_commit(); /* by itself: without query rows the loop commits nothing, and keys would fall on the results */
    attn_walk<A, true> walk;
    walk.start();
    int end = low, i1 = -1, next = t.h;
    float dk[M][PARTS & PART_DK ? E : 1][4], dv[M][PARTS & PART_DV ? E : 1][4];
    clear(dk);
    clear(dv);
    int stage = 1;
#pragma unroll 1
    for (; low < high && next >= 0; stage ^= 1) { /* the first turn only loads */
        attn_arrived();
        __syncthreads();
        const int i = i1, head = next, limit = attn_limit(a, end, t.q1);
        while ((i1 = walk.seek(a, t, list, next, end, high, BQ, &end)) >= high) {
            if ((next = attn_follows(a, t.g, next)) < 0) break;
            walk.start(); /* may end at once: a head may have no active block */
            if (attn_follow<A>) begin(next);
            end = low;
        }
        if (next >= 0) load(next, i1, end, stage ^ 1);
        attn_commit();
        if (i < 0 || w0 >= w1 || i + BQ - 1 < w0 - t.after || i > w1 - 1 + t.before) continue;
        const bool partial = w0 + WM > t.live || i < w1 - 1 - t.after || i + BQ - 1 > w0 + t.before || pad || a.dedup ||
                             attn_short(a, i, limit, BQ);
        if (partial) attn_tell<M>(seen, attn_key_rows(a, t, head, w0 + lane % WM, i) & attn_within(a, i, limit));
        if (a.p > 0) attn_tell<M>(kept, attn_kept<true>(a, t, head, w0 + lane % WM, i));
        float *extra = attn_floats(memory, 2 * KB + 4 * QB, warp * WM * attn_extra_row(BQ));
        attn_gather<true, T, WM, BQ>(a, t, head, w0, w1 < t.live ? w1 : t.live, i, limit, extra);
        float s[M][N][4];
        scores<Op, DP>(s, sk, warp * WM, sq + stage * QB);
        attn_add<true>(a, t, head, w0, i, extra, s);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float2 l = *(const float2 *)&lse[stage][8 * n + lane % 4 * 2];
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] = attn_ex2(fmaf(s[m][n][e], a.log2_scale, e % 2 ? -l.y : -l.x));
        }
        if constexpr (PARTS & PART_DK) {
            float d[M][N][4];
            scores<Op, DP>(d, sv, warp * WM, sg + stage * QB);
            if (a.p > 0) attn_select(d, kept, BK, 0);
#pragma unroll
            for (int n = 0; n < N; n++) {
                const float2 l = *(const float2 *)&delta[stage][8 * n + lane % 4 * 2];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++) d[m][n][e] = s[m][n][e] * fmaf(d[m][n][e], gz, e % 2 ? -l.y : -l.x);
            }
            if (partial) attn_select(d, seen, BK, 0);
            weighted<Op>(dk, d, sq + stage * QB);
        }
        if constexpr (PARTS & PART_DV) {
            if (partial) attn_select(s, seen, BK, 0);
            if (a.p > 0) attn_select(s, kept, BK, 0);
            weighted<Op>(dv, s, sg + stage * QB);
        }
    }
    attn_arrived();
    const bool masks = a.causal || a.window >= 0 || a.dedup || a.lengths || pad || attn_hides(a);
    const bool spoilt = __syncthreads_or(masks && !(finite(dk) && finite(dv)));
    attn_wait<true>(a, t);
    float *sums = attn_floats(memory, 0, warp * WM * DP);
    attn_row<float> *mine = rows + warp * WM;
    auto leave = [&](int which, auto &x, float own) {
        attn_leave_backward<true, T, DP>(a, t, lane, which, own, sums, mine, w0, w1, spoilt, x);
    };
    if constexpr (PARTS & PART_DK) leave(0, dk, (float)a.scale);
    if constexpr (PARTS & PART_DV) leave(1, dv, spoilt ? 1.f : gz); /* slow rows have it already */
    attn_signal<true>(a, t);
}

template <class Op, int DP, int M, int WARPS, int BQ, int MINIMUM, int PARTS, class A>
static int launch(A &a, const lac_plan *plan)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, true, 16 * M * WARPS, &tiles, attn_block_of(a)));
    return attn_launch(attn_keys_kernel<A, Op, DP, M, WARPS, BQ, MINIMUM, PARTS>, a, tiles, WARPS * 32,
                       attn_tile_bytes((32 * M * WARPS + 4 * BQ) * Op::tile::ROW, 16 * M * WARPS, DP) +
                           attn_extra_bytes(a, 16 * M * WARPS, BQ));
}
template <class Op, int DP, int M, int WARPS, int BQ, int MINIMUM, class A>
static int launch2(A &a, const lac_plan *plan)
{
    LAC_TRY((launch<Op, DP, M, WARPS, BQ, MINIMUM, PART_DK>(a, plan)));
    return launch<Op, DP, M, WARPS, BQ, MINIMUM, PART_DV>(a, plan);
}

/* which shape runs, with options of single pairs or without */
template <class A> static int launch_shape(A &a, const lac_plan *plan, int dtype)
{
    const int d = a.head_dim;
    if (dtype == LAC_BF16)
        return d <= 64    ? launch<op_bf16<64>, 64, 2, 4, 32, 2, 3>(a, plan)
               : d <= 128 ? launch<op_bf16<128>, 128, 1, 4, 32, 2, 3>(a, plan)
                          : launch2<op_bf16<256>, 256, 1, 4, 32, 1>(a, plan);
    if (dtype == LAC_F16)
        return d <= 64    ? launch<op_f16<64>, 64, 2, 4, 32, 2, 3>(a, plan)
               : d <= 128 ? launch<op_f16<128>, 128, 1, 4, 32, 2, 3>(a, plan)
                          : launch2<op_f16<256>, 256, 1, 4, 32, 1>(a, plan);
    return d <= 64    ? launch<op_tf32<64>, 64, 2, 4, 16, 2, 3>(a, plan)
           : d <= 128 ? launch<op_tf32<128>, 128, 1, 4, 16, 1, 3>(a, plan)
                      : launch2<op_tf32<256>, 256, 1, 2, 16, 1>(a, plan);
}

#endif
