/* attn_exact_backward.cuh: the backward of attention in f32 (without TF32) and f64: the two passes of attn_queries.cuh
 * and attn_keys.cuh with plain products.
 *
 * Exponents are base-2 differences in two parts, (S high - lse) + (S low - lse low): P would be off by the rounding of
 * the scale and of the lse otherwise, and dS = P (dP - delta) is a difference of nearly equal numbers where P is
 * peaked.
 */
#ifndef LAC_CUDA_ATTN_EXACT_BACKWARD_CUH
#define LAC_CUDA_ATTN_EXACT_BACKWARD_CUH
#include "attn_exact.cuh"

template <class X> struct exact_stats { /* per row of the own side (queries), or per column (keys) */
    typedef typename X::C C;
    static __device__ __forceinline__ C p(C s, C high, C low, C lse, C lse_low)
    {
        return lse == (C)INFINITY ? C(0) : attn_exp2((s * high - lse) + (s * low - lse_low));
    }
};

template <class X>
__global__ void __launch_bounds__(EXACT_THREADS, 2) attn_exact_queries_kernel(const __grid_constant__ attn_pair_args a)
{
    typedef typename X::C C;
    constexpr int R = X::R, S = X::S, BM = X::BM, BN = X::BN, E = X::E;
    extern __shared__ __align__(128) uint8_t memory[];
    C *q = (C *)memory, *g = q + BM * X::ROW, *k = g + BM * X::ROW, *v = k + BN * X::ROW, *p = v + BN * X::ROW;
    __shared__ uint64_t seen[BM], kept[BM];
    __shared__ attn_tile t;
    __shared__ attn_spans list;
    if (!attn_next<false>(a, BM, t)) return;
    const int hk = t.h / a.group;
    int low, high;
    attn_reach<false>(t, &low, &high);
    C log2_scale, log2_low;
    attn_two_scales(a, log2_scale, log2_low);
    const C gz = (C)(a.gscale * a.keep_scale);
    const bool pad = a.padding != NULL;
    C dq[R][E], lse[R], lse_low[R], delta[R], delta_low[R], weight[R], dot[R];
    X::clear(dq);
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int row = t.first + X::row() + 16 * i;
        const int64_t at = attn_stat(a, t, t.h, row < t.end ? row : t.first, a.per_branch);
        lse[i] = row < t.end ? ((const C *)a.lse2)[at] : (C)INFINITY;
        lse_low[i] = ((const C *)a.lse2_low)[at];
        delta[i] = ((const C *)a.delta)[at];
        delta_low[i] = attn_delta_low<C>(a, at);
        weight[i] = dot[i] = 0;
    }
    attn_load<X, C, BM, X::DP, EXACT_THREADS>(attn_shared(q), a, a.q, t, t.h, a.shift, t.first, t.end, false);
    attn_load<X, C, BM, X::DP, EXACT_THREADS>(attn_shared(g), a, a.g, t, t.h, a.shift, t.first, t.end, false);
    if (attn_wants_bias(a)) attn_wait<false>(a, t);
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
        C s[R][S], d[R][S];
        X::scores(s, q, k);
        X::add(a, p, s);
        X::scores(d, g, v);
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < S; j++) {
                C w = exact_stats<X>::p(s[i][j], log2_scale, log2_low, lse[i], lse_low[i]);
                C dp = a.p > 0 && !X::bit(kept, i, j) ? C(0) : d[i][j] * gz;
                const bool visible = !partial || X::bit(seen, i, j);
                d[i][j] = visible ? w * (dp - delta[i] - delta_low[i]) : C(0);
                weight[i] += visible ? w : C(0);
                dot[i] += visible && w != 0 ? w * dp : C(0);
            }
        if (a.deltas) continue;
        X::put(p, d);
        __syncthreads();
        if (attn_wants_bias(a)) X::add_dbias(a, t, k0, limit, p);
        X::weighted(dq, p, k);
    }
    attn_arrived();
    if (a.deltas) {
#pragma unroll
        for (int i = 0; i < R; i++) {
            const int row = t.first + X::row() + 16 * i;
            const C sum = X::row_sum(weight[i]), all = X::row_sum(dot[i]);
            if (row < t.end && X::column() == 0) attn_put_delta<C>(a, t, row, sum == 0 ? C(0) : all / sum);
        }
        return;
    }
    const bool spoilt = __syncthreads_or((a.causal || a.window >= 0 || a.dedup || attn_hides(a)) && !X::finite(dq));
    attn_wait<false>(a, t);
    if (spoilt)
        for (int i = t.first + threadIdx.x / 32; i < t.end; i += EXACT_THREADS / 32) attn_slow_query<C>(a, t, i);
    else
#pragma unroll
        for (int i = 0; i < R; i++) {
            const int row = t.first + X::row() + 16 * i;
            if (row >= t.end) continue;
            const int others = attn_others<false>(a, t, (unsigned)(t.base + (int64_t)row * t.r));
            const int64_t at = attn_stat(a, t, t.h, row, false);
#pragma unroll
            for (int e = 0; e < E; e++)
                X::store(a, a.out, a.acc, at, X::place(e), dq[i][e] * (C)a.scale, others & 1 ? C(1) : C(0),
                         !(others & 2));
        }
    attn_signal<false>(a, t);
}

template <class X>
__global__ void __launch_bounds__(EXACT_THREADS) attn_exact_keys_kernel(const __grid_constant__ attn_pair_args a)
{
    typedef typename X::C C;
    constexpr int R = X::R, S = X::S, BM = X::BM, BN = X::BN, E = X::E;
    extern __shared__ __align__(128) uint8_t memory[];
    C *k = (C *)memory, *v = k + BM * X::ROW, *q = v + BM * X::ROW, *g = q + BN * X::ROW, *p = g + BN * X::ROW;
    __shared__ uint64_t seen[BM], kept[BM];
    __shared__ C lse[BN], lse_low[BN], delta[BN], delta_low[BN];
    __shared__ attn_tile t;
    __shared__ attn_spans list;
    if (!attn_next<true>(a, BM, t)) return;
    const int hk = t.h / a.group;
    int low, high;
    attn_reach<true>(t, &low, &high);
    C log2_scale, log2_low;
    attn_two_scales(a, log2_scale, log2_low);
    const C gz = (C)(a.gscale * a.keep_scale);
    const bool pad = a.padding != NULL;
    C dk[R][E], dv[R][E];
    X::clear(dk);
    X::clear(dv);
    attn_load<X, C, BM, X::DP, EXACT_THREADS>(attn_shared(k), a, a.k, t, hk, 0, t.first, attn_limit(a, t.end, t.live),
                                              pad);
    attn_load<X, C, BM, X::DP, EXACT_THREADS>(attn_shared(v), a, a.v, t, hk, 0, t.first, attn_limit(a, t.end, t.live),
                                              pad);
    attn_walk<attn_pair_args, true> walk;
#pragma unroll 1
    for (int h = t.h; h >= 0; h = attn_follows(a, t.g, h)) {
        walk.start();
#pragma unroll 1
        for (int end = low, i0; (i0 = walk.seek(a, t, list, h, end, high, BN, &end)) < high;) {
            const int limit = attn_limit(a, end, t.q1);
            __syncthreads();
            attn_load<X, C, BN, X::DP, EXACT_THREADS>(attn_shared(q), a, a.q, t, h, a.shift, i0, limit, false);
            attn_load<X, C, BN, X::DP, EXACT_THREADS>(attn_shared(g), a, a.g, t, h, a.shift, i0, limit, false);
            attn_commit();
            for (int j = threadIdx.x; j < BN; j += EXACT_THREADS) {
                const bool in = i0 + j < limit;
                const int64_t at = attn_stat(a, t, h, in ? i0 + j : t.q0, a.per_branch);
                lse[j] = in ? ((const C *)a.lse2)[at] : (C)INFINITY;
                lse_low[j] = ((const C *)a.lse2_low)[at];
                delta[j] = ((const C *)a.delta)[at];
                delta_low[j] = attn_delta_low<C>(a, at);
            }
            for (int i = threadIdx.x; i < BM; i += EXACT_THREADS)
                seen[i] =
                    attn_key_rows(a, t, h, t.first + i, i0) & attn_key_shown<C, false>(a, t, h, t.first + i, i0, limit);
            if (a.p > 0)
                for (int i = threadIdx.x; i < BM; i += EXACT_THREADS)
                    kept[i] = attn_kept<true>(a, t, h, t.first + i, i0);
            X::template gather<true>(a, t, h, attn_limit(a, t.end, t.live), i0, limit, p);
            attn_arrived();
            __syncthreads();
            C s[R][S], d[R][S];
            X::scores(s, k, q);
            X::add(a, p, s);
            X::scores(d, v, g);
#pragma unroll
            for (int i = 0; i < R; i++)
#pragma unroll
                for (int j = 0; j < S; j++) {
                    const int c = X::column() + 8 * j;
                    C w = exact_stats<X>::p(s[i][j], log2_scale, log2_low, lse[c], lse_low[c]);
                    const bool keep = !(a.p > 0) || X::bit(kept, i, j);
                    const bool visible = X::bit(seen, i, j);
                    d[i][j] = visible ? w * ((keep ? d[i][j] * gz : C(0)) - delta[c] - delta_low[c]) : C(0);
                    s[i][j] = visible && keep ? w : C(0);
                }
            X::put(p, d);
            __syncthreads();
            X::weighted(dk, p, q);
            __syncthreads();
            X::put(p, s);
            __syncthreads();
            X::weighted(dv, p, g);
        }
    }
    attn_arrived();
    const bool masks = a.causal || a.window >= 0 || a.dedup || a.lengths || pad || attn_hides(a);
    const bool spoilt = __syncthreads_or(masks && !(X::finite(dk) && X::finite(dv)));
    attn_wait<true>(a, t);
    if (spoilt)
        for (int j = t.first + threadIdx.x / 32; j < t.end; j += EXACT_THREADS / 32)
            attn_slow_key<C>(a, t, j, true, true);
    else
#pragma unroll
        for (int i = 0; i < R; i++) {
            const int row = t.first + X::row() + 16 * i;
            if (row >= t.end) continue;
            const int64_t position = t.base + (int64_t)row * t.r;
            const int64_t at = ((int64_t)t.b * a.m + position) * a.kv_heads + hk;
            const int others = attn_others<true>(a, t, (unsigned)position);
            const C before = others & 1 ? C(1) : C(0);
#pragma unroll
            for (int e = 0; e < E; e++) {
                X::store(a, a.out, a.acc, at, X::place(e), dk[i][e] * (C)a.scale, before, !(others & 2));
                X::store(a, a.out2, a.acc2, at, X::place(e), dv[i][e] * gz, before, !(others & 2));
            }
        }
    attn_signal<true>(a, t);
}

template <class X, class K> static int launch(K kernel, attn_pair_args &a, const lac_plan *plan, bool keys)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, keys, X::BM, &tiles, attn_block_of(a)));
    size_t bytes = (size_t)(2 * (X::BM + X::BN) * X::ROW + X::BM * X::P_ROW) * sizeof(typename X::C);
    return attn_launch(kernel, a, tiles, EXACT_THREADS, bytes);
}

#define EACH(kernel, keys)                                                                                             \
    int d = a.head_dim;                                                                                                \
    typedef exact<double, 64, 2, 4> D64;                                                                               \
    typedef exact<double, 128, 2, 2> D128;                                                                             \
    typedef exact<double, 256, 1, 2> D256;                                                                             \
    typedef exact<float, 64, 4, 8> F64;                                                                                \
    typedef exact<float, 128, 4, 4> F128;                                                                              \
    typedef exact<float, 256, 2, 2> F256;                                                                              \
    if (dtype == LAC_F64)                                                                                              \
        return d <= 64    ? launch<D64>(kernel<D64>, a, plan, keys)                                                    \
               : d <= 128 ? launch<D128>(kernel<D128>, a, plan, keys)                                                  \
                          : launch<D256>(kernel<D256>, a, plan, keys);                                                 \
    return d <= 64    ? launch<F64>(kernel<F64>, a, plan, keys)                                                        \
           : d <= 128 ? launch<F128>(kernel<F128>, a, plan, keys)                                                      \
                      : launch<F256>(kernel<F256>, a, plan, keys)

#endif
