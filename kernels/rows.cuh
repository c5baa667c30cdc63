/* rows.cuh: rows that a warp or a block normalises: softmax, layer norms, cross-entropy.
 *
 * A dense, aligned row is moved 16 bytes at a time. One of at most 512 elements belongs to a warp, of at most 2,048 to
 * a block of 128 threads, of at most 8,192 to a block of 512, and is then read once and kept in registers, 16 elements
 * a thread (32 were tried: the backward of layernorm needs four such sets and spilled). Longer rows, and rows with
 * strides, are read again in every pass, mostly from the second-level cache. `row` hides which: each(f) visits the
 * thread's own elements, store(out, f) writes them.
 */
#ifndef LAC_CUDA_ROWS_CUH
#define LAC_CUDA_ROWS_CUH
#include "common.cuh"

enum { ROW_KEEP = 16, ROW_LONG = 512, ROW_KEPT = ROW_LONG * ROW_KEEP };
/* threads of a block whose rows have ROW threads each */
template <int ROW> inline constexpr int row_threads = ROW == 32 ? THREADS : ROW;

/* T: storage; ROW: threads of a row; N: elements of an access; KEEP: in registers */
template <class T, int ROW, int N, bool KEEP> struct row {
    typedef compute_t<T> C;
    enum { PER = KEEP ? ROW_KEEP / N : 1 };
    struct alignas(N * sizeof(T)) access {
        T at[N];
    };
    const T *x;
    int64_t n, stride; /* stride in elements; 1 if N > 1 */
    int lane;
    C kept[KEEP ? ROW_KEEP : 1];

    __device__ __forceinline__ void read(int64_t first, C *to) const
    {
        if constexpr (N > 1) {
            access a = *(const access *)(x + first);
#pragma unroll
            for (int i = 0; i < N; i++) to[i] = to_compute(a.at[i]);
        } else {
            to[0] = to_compute(x[first * stride]);
        }
    }
    __device__ __forceinline__ row(const T *x_, int64_t n_, int64_t stride_) : x(x_), n(n_), stride(stride_)
    {
        lane = threadIdx.x % ROW;
        if constexpr (KEEP) {
#pragma unroll
            for (int k = 0; k < PER; k++) {
                int64_t first = (int64_t)(k * ROW + lane) * N;
                if (first < n) read(first, kept + k * N);
            }
        }
    }
    /* f(value, position, k): k numbers the kept elements */
    template <class F> __device__ __forceinline__ void each(F f) const
    {
        if constexpr (KEEP) {
#pragma unroll
            for (int k = 0; k < PER; k++) {
                int64_t first = (int64_t)(k * ROW + lane) * N;
                if (first >= n) break;
#pragma unroll
                for (int i = 0; i < N; i++) f(kept[k * N + i], first + i, k * N + i);
            }
        } else {
            for (int64_t first = (int64_t)lane * N; first < n; first += ROW * N) {
                C v[N];
                read(first, v);
#pragma unroll
                for (int i = 0; i < N; i++) f(v[i], first + i, 0);
            }
        }
    }
    /* out[position] = f(value, position), out dense; U its storage type */
    template <class U, class F> __device__ __forceinline__ void store(U *out, F f) const
    {
        struct alignas(N * sizeof(U)) result {
            U at[N];
        };
        if constexpr (KEEP) {
#pragma unroll
            for (int k = 0; k < PER; k++) {
                int64_t first = (int64_t)(k * ROW + lane) * N;
                if (first >= n) break;
                result r;
#pragma unroll
                for (int i = 0; i < N; i++) r.at[i] = from_compute<U>(f(kept[k * N + i], first + i, k * N + i));
                *(result *)(out + first) = r;
            }
        } else {
            for (int64_t first = (int64_t)lane * N; first < n; first += ROW * N) {
                C v[N];
                result r;
                read(first, v);
#pragma unroll
                for (int i = 0; i < N; i++) r.at[i] = from_compute<U>(f(v[i], first + i, 0));
                *(result *)(out + first) = r;
            }
        }
    }
};

template <int ROW, class C> __device__ __forceinline__ C row_sum(C x, void *space)
{
    if constexpr (ROW == 32) return warp_sum(x);
    else return block_sum(x, (C *)space);
}
template <int ROW, class C> __device__ __forceinline__ C row_max(C x, void *space)
{
    if constexpr (ROW == 32) return warp_max(x);
    else return block_max(x, (C *)space);
}

/* calls f(ROW, N, KEEP as constants) with how rows of length n are run */
template <class T, class F> void with_rows(int64_t n, bool dense, F f)
{
    constexpr int N = 16 / sizeof(T);
    std::true_type keep;
    std::false_type again;
    std::integral_constant<int, N> vector;
    std::integral_constant<int, 32> warp;
    std::integral_constant<int, 128> middle;
    std::integral_constant<int, ROW_LONG> longest;
    if (!dense || n % N) f(middle, std::integral_constant<int, 1>(), again);
    else if (n <= 32 * ROW_KEEP) f(warp, vector, keep);
    else if (n <= 128 * ROW_KEEP) f(middle, vector, keep);
    else if (n <= ROW_KEPT) f(longest, vector, keep);
    else f(longest, vector, again);
}

/* are all rows of v (last axis n long, stride 1, other strides whole vectors) aligned for 16-byte accesses? */
inline bool rows_dense(const lac_view *v, int64_t vector)
{
    int last = v->ndim - 1;
    bool fits = last >= 0 && (v->stride[last] == 1 || v->shape[last] == 1) && (uintptr_t)v->data % 16 == 0;
    for (int d = 0; d < last; d++) fits = fits && (v->stride[d] % vector == 0 || v->shape[d] == 1);
    return fits;
}

#endif
