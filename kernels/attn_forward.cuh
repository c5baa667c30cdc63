/* attn_forward.cuh: the forward of attention on tensor cores.
 *
 * A block has 128 query rows (64 for head dimensions above 128) in shared memory and walks over the keys its rows may
 * see, 128 to 32 at a time. Keys and values are double-buffered by cp.async: a step first asks for the next tile, then
 * computes, so there is one barrier a step. Scores, the running maximum and sum, and the output stay in registers
 * (online softmax in base 2, Milakov and Gimelshein 2018); blocks outside the band of the mask are skipped, by whole
 * blocks for all and by steps for each warp. Whatever a step has to mask costs four shuffles and one select a score.
 *
 * Floor: 4 D products a pair on tensor cores, and one ex2 a pair. Shared memory feeds both operands, so a warp owns 32
 * rows: every key fragment serves two products. Rejected: 16 rows a warp with twice the warps (shared memory becomes
 * the limit), keeping the query fragments in registers for D = 128 (spills).
 */
#ifndef LAC_CUDA_ATTN_FORWARD_CUH
#define LAC_CUDA_ATTN_FORWARD_CUH
#include "attn_mma.cuh"
#include "attn_slow.cuh"

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
    if (!attn_next<false>(a, BM, t)) return;
    const int hk = t.h / a.group, w0 = t.first + warp * WM, w1 = w0 + WM < t.end ? w0 + WM : t.end;
    int low = t.first - t.before, high = t.end - 1 + t.after + 1;
    low = low < 0 ? 0 : low; /* not rounded down: decoding has no memory before its reach */
    high = high < t.live ? high : t.live;
    const bool pad = a.padding != NULL;
    float o[M][E][4], top[M][2], sum[M][2];
    const bool quick = attn_quick(a, a.k, t) && attn_quick(a, a.v, t);
    attn_stream<Tile, T, BN, DP, WARPS * 32> ks, vs;
    ks.start(a, a.k, t, hk, 0, low);
    vs.start(a, a.v, t, hk, 0, low);
    auto load = [&](int k0, int k1, int stage) {
        if (quick) {
            if (attn_paired<A>) { /* steps need not follow each other */
                ks.start(a, a.k, t, hk, 0, k0);
                vs.start(a, a.v, t, hk, 0, k0);
            }
            ks.next(sk + stage * KB, a, a.k, t, k0, attn_limit(a, k1, t.live));
            vs.next(sv + stage * KB, a, a.v, t, k0, attn_limit(a, k1, t.live));
        } else {
            attn_load<Tile, T, BN, DP, WARPS * 32>(sk + stage * KB, a, a.k, t, hk, 0, k0, attn_limit(a, k1, t.live),
                                                   pad);
            attn_load<Tile, T, BN, DP, WARPS * 32>(sv + stage * KB, a, a.v, t, hk, 0, k0, attn_limit(a, k1, t.live),
                                                   pad);
        }
    };
    attn_load<Tile, T, BM, DP, WARPS * 32>(sq, a, a.q, t, t.h, a.shift, t.first, t.end, false);
    attn_walk<A, false> walk;
    walk.start(a, t, t.h);
    int end, next = walk.seek(a, t, low, high, BN, &end);
    if (next < high) load(next, end, 0);
    attn_commit();
    clear(o);
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) top[m][i] = -INFINITY, sum[m][i] = 0;
    int stage = 0;
#pragma unroll 1
    for (int k0 = next; k0 < high; k0 = next, stage ^= 1) {
        attn_arrived();
        __syncthreads();
        const int limit = attn_limit(a, end, t.live);
        next = walk.seek(a, t, attn_paired<A> ? end : k0 + BN, high, BN, &end);
        if (next < high) load(next, end, stage ^ 1);
        attn_commit();
        if (w0 >= w1 || k0 > w1 - 1 + t.after || k0 + BN <= w0 - t.before) continue;
        const bool partial = k0 + BN > t.live || k0 + BN - 1 > w0 + t.after || k0 < w1 - 1 - t.before || pad ||
                             a.dedup || attn_cut(a, k0, limit, BN);
#pragma unroll 1
        for (int w = 0; w < WORDS && (partial || a.p > 0); w++) {
            const int row = w0 + lane % WM, first = k0 + 64 * w;
            if (partial)
                attn_tell<M>(seen + w * BM, attn_row_keys(a, t, t.h, row, first, attn_alive(a, t, first)) &
                                                attn_rows_shown<T, WM>(a, t, t.h, w0, first, limit));
            if (a.p > 0) attn_tell<M>(kept + w * BM, attn_kept<false>(a, t, t.h, row, first));
        }
        float s[M][N][4];
        scores<Op, DP>(s, sq, warp * WM, sk + stage * KB);
        attn_add<false, T>(a, t, t.h, w0, w1, k0, limit, s);
        if (a.log2_scale < 0) negate(s);
        if (partial) attn_select(s, seen, BM, -INFINITY);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float most = fmaxf(s[m][0][2 * i], s[m][0][2 * i + 1]);
#pragma unroll
                for (int n = 1; n < N; n++) most = fmaxf(most, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
                most = fmaxf(quad_max(most) * a.log2_magnitude, top[m][i]);
                const float shift = most == -INFINITY ? 0 : most, shrink = attn_ex2(top[m][i] - shift);
                top[m][i] = most;
                float part = 0;
#pragma unroll
                for (int n = 0; n < N; n++) {
                    s[m][n][2 * i] = attn_ex2(fmaf(s[m][n][2 * i], a.log2_magnitude, -shift));
                    s[m][n][2 * i + 1] = attn_ex2(fmaf(s[m][n][2 * i + 1], a.log2_magnitude, -shift));
                    part += s[m][n][2 * i] + s[m][n][2 * i + 1];
                }
                sum[m][i] = fmaf(sum[m][i], shrink, part);
                if (__any_sync(~0u, shrink != 1)) {
#pragma unroll
                    for (int e = 0; e < E; e++) o[m][e][2 * i] *= shrink, o[m][e][2 * i + 1] *= shrink;
                }
            }
        if (a.p > 0) attn_select(s, kept, BM, 0);
        weighted<Op>(o, s, sv + stage * KB);
    }
    attn_arrived();
    /* a masked value that is not finite spoils rows that do not see it: this rare tile is done again, row by row */
    const bool spoilt = __syncthreads_or((a.causal || a.window >= 0 || a.dedup || attn_hides(a)) && !finite(o));
    attn_wait<false>(a, t);
    if (spoilt) {
        for (int i = t.first + warp; i < t.end; i += WARPS) attn_slow_forward<T>(a, t, i);
        attn_signal<false>(a, t);
        return;
    }
    /* a lane finishes a row: maximum and sum reach it through shared memory, and what becomes of the row comes back so
     */
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float total = quad_sum(sum[m][i]);
            if (lane % 4 == 0) rows[warp * WM + 16 * m + 8 * i + lane / 4] = {top[m][i], total, 0, false};
        }
    __syncwarp();
    if (lane < WM && w0 + lane < w1) {
        attn_row<float> *f = rows + warp * WM + lane;
        *f = attn_finish<float>(a, t, w0 + lane, f->own, f->before);
    }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = 16 * m + 8 * i + lane / 4;
            if (w0 + row >= w1) continue;
            const attn_row<float> f = rows[warp * WM + row];
            const float own = f.own * (a.p > 0 ? (float)a.keep_scale : 1.f);
#pragma unroll
            for (int e = 0; e < E; e++)
                attn_put2<T>(a, a.out, a.acc, f.at, 8 * e + lane % 4 * 2, o[m][e][2 * i] * own,
                             o[m][e][2 * i + 1] * own, f.before, f.last);
        }
    attn_signal<false>(a, t);
}

template <class Op, int DP, int M, int WARPS, int BN, int MINIMUM, class A>
static int launch(A &a, const lac_plan *plan)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, false, 16 * M * WARPS, &tiles, attn_block_of(a)));
    return attn_launch(attn_forward_kernel<A, Op, DP, M, WARPS, BN, MINIMUM>, a, tiles, WARPS * 32,
                       (size_t)(16 * M * WARPS + 4 * BN) * Op::tile::ROW + ATTN_ALIGN);
}

#endif
