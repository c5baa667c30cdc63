/* attn_slow.cuh: one row of attention by one warp, with plain loops: what tiles with values that are not finite fall
 * to.
 *
 * Tensor cores multiply whole tiles, and a masked pair is a product with zero; zero times NaN or infinity is NaN, so a
 * value that is not finite would spoil rows that must not see it. The fast kernels notice that a result is not finite
 * and have the tile's rows done here, pair by pair: only visible pairs are ever multiplied. This is as slow as it looks
 * and runs only where there are NaNs, in which case the numbers are lost anyway; what counts is that they stay where
 * they belong, as on the CPU. Rejected: looking at every tile beforehand (5% of short causal segments), a careful
 * variant of the main loop (its registers spilled).
 *
 * A lane takes pairs lane, lane + 32, ... for scores, and head dimensions lane, lane + 32, ... for sums.
 */
#ifndef LAC_CUDA_ATTN_SLOW_CUH
#define LAC_CUDA_ATTN_SLOW_CUH
#include "attn_pairs.cuh"

enum { ATTN_SLOW_PARTS = 8 }; /* head dimensions of one lane: 256 / 32 */

template <class T> __device__ __forceinline__ const T *attn_at(const attn_tensor &x, int b, int64_t row, int h)
{
    return (const T *)x.data + b * x.stride[0] + row * x.stride[1] + h * x.stride[2];
}
/* exp2 without the errors of the fast instruction */
__device__ __forceinline__ float attn_exp2(float x) { return exp2f(x); }
__device__ __forceinline__ double attn_exp2(double x) { return exp2(x); }

/* keys `first` .. +63 that query row i may see; by one warp */
template <class T, class A> static __device__ uint64_t attn_slow_keys(const A &a, const attn_tile &t, int i, int first)
{
    uint64_t alive = attn_alive(a, t, first), shown = attn_row_shown<T, true>(a, t, t.h, i, first, t.live);
    return attn_row_keys(a, t, t.h, i, first, alive) & shown;
}

/* sums over a warp of x[d] y[d] */
template <class T>
static __device__ compute_t<T> attn_warp_dot(const attn_args &a, const attn_tensor &x, const T *xr,
                                             const attn_tensor &y, const T *yr)
{
    compute_t<T> sum = 0;
#pragma unroll 1
    for (int d = threadIdx.x % 32; d < a.head_dim; d += 32)
        sum += to_compute(xr[d * x.stride[3]]) * to_compute(yr[d * y.stride[3]]);
    return warp_sum(sum);
}

/* Row i of the tile, not yet divided by the sum of its softmax: o is the lane's, soft[0] the base-2 maximum, soft[1]
 * the sum. Loops are not unrolled, here and below: arrays in memory are slow, but so is the rest, and every kernel has
 * a copy. */
template <class T, class A>
static __device__ __noinline__ void attn_slow_row(const A &a, const attn_tile &t, int i,
                                                  compute_t<T> (&o)[ATTN_SLOW_PARTS], compute_t<T> (&soft)[2])
{
    typedef compute_t<T> C;
    const int lane = threadIdx.x % 32, hk = t.h / a.group;
    const C scale = (C)(a.scale * ATTN_LOG2E);
    const T *q = attn_at<T>(a.q, t.b, t.base + (int64_t)i * t.r - a.shift, t.h);
    C top = -INFINITY, sum = 0;
#pragma unroll 1
    for (int e = 0; e < ATTN_SLOW_PARTS; e++) o[e] = 0;
#pragma unroll 1
    for (int first = 0; first < t.live; first += 64) {
        uint64_t seen = attn_slow_keys<T>(a, t, i, first), kept = a.p > 0 ? attn_kept<false>(a, t, t.h, i, first) : 0;
#pragma unroll 1
        for (; seen; seen &= seen - 1) {
            int j = __ffsll((long long)seen) - 1;
            int64_t key = t.base + (int64_t)(first + j) * t.r;
            const T *k = attn_at<T>(a.k, t.b, key, hk), *v = attn_at<T>(a.v, t.b, key, hk);
            C s = (attn_warp_dot<T>(a, a.q, q, a.k, k) + attn_added<T>(a, t, t.h, i, first + j)) * scale;
            C most = s > top ? s : top, shift = most == -INFINITY ? C(0) : most, shrink = attn_exp2(top - shift);
            C p = attn_exp2(s - shift), z = a.p > 0 ? (kept >> j & 1 ? (C)a.keep_scale : C(0)) : C(1);
            top = most;
            sum = sum * shrink + p;
#pragma unroll 1
            for (int e = 0, d = lane; d < a.head_dim; e++, d += 32)
                o[e] = o[e] * shrink + p * z * to_compute(v[d * a.v.stride[3]]);
        }
    }
    soft[0] = top, soft[1] = sum;
}

/* Row i of the tile: out, lse. */
template <class T, class A> static __device__ __noinline__ void attn_slow_forward(const A &a, const attn_tile &t, int i)
{
    typedef compute_t<T> C;
    const int lane = threadIdx.x % 32;
    C o[ATTN_SLOW_PARTS], soft[2];
    attn_slow_row<T>(a, t, i, o, soft);
    attn_row<C> f = {};
    if (lane == 0) f = attn_finish<C>(a, t, i, soft[0], soft[1]);
    f.own = __shfl_sync(~0u, f.own, 0), f.before = __shfl_sync(~0u, f.before, 0), f.at = __shfl_sync(~0u, f.at, 0);
    f.last = __shfl_sync(~0u, (int)f.last, 0);
#pragma unroll 1
    for (int e = 0, d = lane; d < a.head_dim; e++, d += 32) {
        C *acc = (C *)a.acc + f.at * a.head_dim + d, x = o[e] * f.own;
        if (f.before != 0) x += f.before * __ldcg(acc);
        if (f.last) ((T *)a.out)[f.at * a.head_dim + d] = from_compute<T>(x);
        else *acc = x;
    }
}

/* P, before dropout, and dP, after it, of a visible pair; the same in every lane. Returns what P is multiplied by where
 * it weighs dout. */
template <class T, class A>
static __device__ compute_t<T> attn_pair_weight(const A &a, const attn_tile &t, int h, int i, int j, bool kept,
                                                compute_t<T> *p, compute_t<T> *dp)
{
    typedef compute_t<T> C;
    const int64_t key = t.base + (int64_t)j * t.r;
    int64_t n = t.base + (int64_t)i * t.r - a.shift, at = attn_stat(a, t, h, i, a.per_branch);
    const T *q = attn_at<T>(a.q, t.b, n, h), *g = attn_at<T>(a.g, t.b, n, h);
    const T *k = attn_at<T>(a.k, t.b, key, h / a.group), *v = attn_at<T>(a.v, t.b, key, h / a.group);
    C s = attn_warp_dot<T>(a, a.q, q, a.k, k), d = attn_warp_dot<T>(a, a.g, g, a.v, v);
    C high, low, lse = ((const C *)a.lse2)[at], z = kept ? (C)(a.gscale * a.keep_scale) : C(0);
    attn_two_scales(a, high, low);
    s += attn_added<T>(a, t, h, i, j);
    *p = lse == INFINITY ? C(0) /* the row has no key */
                         : attn_exp2((s * high - lse) + (s * low - ((const C *)a.lse2_low)[at]));
    *dp = d * z;
    return z;
}

/* P and dS of a visible pair; the same in every lane. Returns P as it weighs dout (after dropout). */
template <class T, class A>
static __device__ compute_t<T> attn_pair(const A &a, const attn_tile &t, int h, int i, int j, bool kept,
                                         compute_t<T> *ds)
{
    typedef compute_t<T> C;
    const int64_t at = attn_stat(a, t, h, i, a.per_branch);
    C p, dp, z = attn_pair_weight<T>(a, t, h, i, j, kept, &p, &dp);
    *ds = 0;
    if (((const C *)a.lse2)[at] == INFINITY) return 0;
    *ds = p * (dp - ((const C *)a.delta)[at] - attn_delta_low<C>(a, at));
    return p * z;
}

/* The branch's own delta of row i, by one warp. */
template <class T, class A> static __device__ __noinline__ void attn_slow_delta(const A &a, const attn_tile &t, int i)
{
    typedef compute_t<T> C;
    C weight = 0, dot = 0, p, dp;
#pragma unroll 1
    for (int first = 0; first < t.live; first += 64) {
        uint64_t seen = attn_slow_keys<T>(a, t, i, first),
                 kept = a.p > 0 ? attn_kept<false>(a, t, t.h, i, first) : ~(uint64_t)0;
#pragma unroll 1
        for (; seen; seen &= seen - 1) {
            int j = __ffsll((long long)seen) - 1;
            attn_pair_weight<T>(a, t, t.h, i, first + j, kept >> j & 1, &p, &dp);
            weight += p;
            dot += p == 0 ? C(0) : p * dp;
        }
    }
    if (threadIdx.x % 32 == 0) attn_put_delta<C>(a, t, i, weight == 0 ? C(0) : dot / weight);
}

/* Adds to row i of dq, before the scale. */
template <class T, class A>
static __device__ __noinline__ void attn_slow_add_query(const A &a, const attn_tile &t, int i,
                                                        compute_t<T> (&dq)[ATTN_SLOW_PARTS])
{
    typedef compute_t<T> C;
    const int lane = threadIdx.x % 32, hk = t.h / a.group;
    C ds;
#pragma unroll 1
    for (int first = 0; first < t.live; first += 64) {
        uint64_t seen = attn_slow_keys<T>(a, t, i, first),
                 kept = a.p > 0 ? attn_kept<false>(a, t, t.h, i, first) : ~(uint64_t)0;
#pragma unroll 1
        for (; seen; seen &= seen - 1) {
            int j = __ffsll((long long)seen) - 1;
            int64_t key = t.base + (int64_t)(first + j) * t.r;
            attn_pair<T>(a, t, t.h, i, first + j, kept >> j & 1, &ds);
            const T *k = attn_at<T>(a.k, t.b, key, hk);
#pragma unroll 1
            for (int e = 0, d = lane; d < a.head_dim; e++, d += 32) dq[e] += ds * to_compute(k[d * a.k.stride[3]]);
        }
    }
}

/* Row i of dq. */
template <class T, class A> static __device__ __noinline__ void attn_slow_query(const A &a, const attn_tile &t, int i)
{
    typedef compute_t<T> C;
    const int lane = threadIdx.x % 32;
    C dq[ATTN_SLOW_PARTS] = {};
    attn_slow_add_query<T>(a, t, i, dq);
    int others = attn_others<false>(a, t, (unsigned)(t.base + (int64_t)i * t.r));
    int64_t at = attn_stat(a, t, t.h, i, false);
#pragma unroll 1
    for (int e = 0, d = lane; d < a.head_dim; e++, d += 32) {
        C *acc = (C *)a.acc + at * a.head_dim + d, x = dq[e] * (C)a.scale;
        if (others & 1) x += __ldcg(acc);
        if (others & 2) *acc = x;
        else ((T *)a.out)[at * a.head_dim + d] = from_compute<T>(x);
    }
}

/* Adds to rows j of dk, before the scale, and dv. */
template <class T, class A>
static __device__ __noinline__ void attn_slow_add_key(const A &a, const attn_tile &t, int j,
                                                      compute_t<T> (&dk)[ATTN_SLOW_PARTS],
                                                      compute_t<T> (&dv)[ATTN_SLOW_PARTS])
{
    typedef compute_t<T> C;
    const int lane = threadIdx.x % 32;
    C ds;
#pragma unroll 1
    for (int h = t.h; h >= 0; h = attn_follows(a, t.g, h))
#pragma unroll 1
        for (int first = t.q0; first < t.q1; first += 64) {
            uint64_t seen = attn_key_rows(a, t, h, j, first) & attn_key_shown<T, true>(a, t, h, j, first, t.q1);
            uint64_t kept = a.p > 0 ? attn_kept<true>(a, t, h, j, first) : ~(uint64_t)0;
#pragma unroll 1
            for (; seen; seen &= seen - 1) {
                int i = first + __ffsll((long long)seen) - 1;
                int64_t n = t.base + (int64_t)i * t.r - a.shift;
                if (((const C *)a.lse2)[attn_stat(a, t, h, i, a.per_branch)] == INFINITY) continue;
                C p = attn_pair<T>(a, t, h, i, j, kept >> (i - first) & 1, &ds);
                const T *q = attn_at<T>(a.q, t.b, n, h), *g = attn_at<T>(a.g, t.b, n, h);
#pragma unroll 1
                for (int e = 0, d = lane; d < a.head_dim; e++, d += 32) {
                    dk[e] += ds * to_compute(q[d * a.q.stride[3]]);
                    dv[e] += p * to_compute(g[d * a.g.stride[3]]);
                }
            }
        }
}

/* Rows j of dk and dv, as far as they are asked for. */
template <class T, class A>
static __device__ __noinline__ void attn_slow_key(const A &a, const attn_tile &t, int j, bool want_dk, bool want_dv)
{
    typedef compute_t<T> C;
    const int lane = threadIdx.x % 32;
    const int64_t key = t.base + (int64_t)j * t.r, at = ((int64_t)t.b * a.m + key) * a.kv_heads + t.h / a.group;
    C dk[ATTN_SLOW_PARTS] = {}, dv[ATTN_SLOW_PARTS] = {};
    attn_slow_add_key<T>(a, t, j, dk, dv);
    int others = attn_others<true>(a, t, (unsigned)key);
#pragma unroll 1
    for (int which = 0; which < 2; which++)
#pragma unroll 1
        for (int e = 0, d = lane; d < a.head_dim; e++, d += 32) {
            if (!(which ? want_dv : want_dk)) break;
            C *acc = (C *)(which ? a.acc2 : a.acc) + at * a.head_dim + d, x = which ? dv[e] : dk[e] * (C)a.scale;
            if (others & 1) x += __ldcg(acc);
            if (others & 2) *acc = x;
            else ((T *)(which ? a.out2 : a.out))[at * a.head_dim + d] = from_compute<T>(x);
        }
}

#endif
