/* attn_exact_forward.cuh: the forward of attention in f32 (without TF32) and f64: attn_forward.cuh's walk with plain
 * products.
 *
 * Exponentials are exp2f and exp2, not the fast instruction: what is asked for here is the accuracy of the CPU. Keys
 * and values are not double-buffered; shared memory holds two or three blocks a multiprocessor instead, and one
 * computes while others wait. Bound by multiply-adds: 4 D a pair at 2 D operations each.
 */
#ifndef LAC_CUDA_ATTN_EXACT_FORWARD_CUH
#define LAC_CUDA_ATTN_EXACT_FORWARD_CUH
#include "attn_exact.cuh"

template <class X>
__global__ void __launch_bounds__(EXACT_THREADS, 3) attn_exact_forward_kernel(const __grid_constant__ attn_pair_args a)
{
    typedef typename X::C C;
    constexpr int R = X::R, S = X::S, BM = X::BM, BN = X::BN, E = X::E;
    extern __shared__ __align__(128) uint8_t memory[];
    C *q = (C *)memory, *k = q + BM * X::ROW, *v = k + BN * X::ROW, *p = v + BN * X::ROW;
    __shared__ uint64_t seen[BM], kept[BM];
    __shared__ attn_tile t;
    __shared__ attn_spans list;
    if (!attn_next<false>(a, BM, t)) return;
    const int hk = t.h / a.group;
    int low, high;
    attn_reach<false>(t, &low, &high);
    const C log2_scale = (C)(a.scale * ATTN_LOG2E);
    const bool pad = a.padding != NULL;
    C o[R][E], top[R], sum[R];
    X::clear(o);
#pragma unroll
    for (int i = 0; i < R; i++) top[i] = -(C)INFINITY, sum[i] = 0;
    attn_load<X, C, BM, X::DP, EXACT_THREADS>(attn_shared(q), a, a.q, t, t.h, a.shift, t.first, t.end, false);
    attn_walk<attn_pair_args, false> walk;
    walk.start();
#pragma unroll 1
    for (int end = low, k0; (k0 = walk.seek(a, t, list, t.h, end, high, BN, &end)) < high;) {
        const int limit = attn_limit(a, end, t.live);
        __syncthreads();
        attn_load<X, C, BN, X::DP, EXACT_THREADS>(attn_shared(k), a, a.k, t, hk, 0, k0, limit, pad);
        attn_load<X, C, BN, X::DP, EXACT_THREADS>(attn_shared(v), a, a.v, t, hk, 0, k0, limit, pad);
        attn_commit();
        const bool partial = k0 + BN > t.live || k0 + BN - 1 > t.first + t.after || k0 < t.end - 1 - t.before || pad ||
                             a.dedup || attn_hides(a) || attn_short(a, k0, limit, BN);
        if (partial) {
            const uint64_t alive = attn_alive(a, t, k0);
            for (int i = threadIdx.x; i < BM; i += EXACT_THREADS)
                seen[i] = attn_row_keys(a, t, t.h, t.first + i, k0, alive);
            X::hide(a, t, seen, k0, limit);
        }
        if (a.p > 0)
            for (int i = threadIdx.x; i < BM; i += EXACT_THREADS)
                kept[i] = attn_kept<false>(a, t, t.h, t.first + i, k0);
        X::template gather<false>(a, t, t.h, t.end, k0, limit, p);
        attn_arrived();
        __syncthreads();
        C s[R][S];
        X::scores(s, q, k);
        X::add(a, p, s);
#pragma unroll
        for (int i = 0; i < R; i++) {
            C most = -(C)INFINITY, part = 0;
#pragma unroll
            for (int j = 0; j < S; j++) {
                s[i][j] *= log2_scale;
                if (partial && !X::bit(seen, i, j)) s[i][j] = -(C)INFINITY;
                most = s[i][j] > most ? s[i][j] : most;
            }
            most = X::row_max(most);
            most = most > top[i] ? most : top[i];
            const C shift = most == -(C)INFINITY ? C(0) : most, shrink = attn_exp2(top[i] - shift);
            top[i] = most;
#pragma unroll
            for (int j = 0; j < S; j++) {
                s[i][j] = attn_exp2(s[i][j] - shift);
                part += s[i][j];
                if (a.p > 0 && !X::bit(kept, i, j)) s[i][j] = 0;
            }
            sum[i] = sum[i] * shrink + part;
#pragma unroll
            for (int e = 0; e < E; e++) o[i][e] *= shrink;
        }
        X::put(p, s);
        __syncthreads();
        X::weighted(o, p, v);
    }
    attn_arrived();
    const bool spoilt = __syncthreads_or((a.causal || a.window >= 0 || a.dedup || attn_hides(a)) && !X::finite(o));
    attn_wait<false>(a, t);
    const C z = a.p > 0 ? (C)a.keep_scale : C(1);
    if (spoilt)
        for (int i = t.first + threadIdx.x / 32; i < t.end; i += EXACT_THREADS / 32) attn_slow_forward<C>(a, t, i);
    else
#pragma unroll
        for (int i = 0; i < R; i++) {
            const int row = t.first + X::row() + 16 * i;
            const C total = X::row_sum(sum[i]);
            const attn_row<C> f = attn_finish_shared<C, 8>(a, t, row, row < t.end, top[i], total);
            if (row < t.end)
#pragma unroll
                for (int e = 0; e < E; e++)
                    X::store(a, a.out, a.acc, f.at, X::place(e), o[i][e] * f.own * z, f.before, f.last);
        }
    attn_signal<false>(a, t);
}

template <class X> static int launch(attn_pair_args &a, const lac_plan *plan)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, false, X::BM, &tiles, attn_block_of(a)));
    size_t bytes = (size_t)((X::BM + 2 * X::BN) * X::ROW + X::BM * X::P_ROW) * sizeof(typename X::C);
    return attn_launch(attn_exact_forward_kernel<X>, a, tiles, EXACT_THREADS, bytes);
}

#endif
