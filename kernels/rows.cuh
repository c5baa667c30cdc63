/* rows.cuh: rows that a warp or a block normalises: softmax, layer norms, cross-entropy.
 *
 * A dense, aligned row of f32, f16 or bf16 is moved 16 bytes at a time, and read once: forward, one of at most 1,024
 * elements belongs to a warp, which needs no barrier and keeps 32 a thread; backward, where four such sets live in
 * registers, to a warp up to 512 and to 128 threads with 8 each up to 1,024. Up to 2,048 a block of 128 threads keeps
 * 16, up to 8,192 one of 512. Longer rows, rows with strides, and f64, are read again in every pass, mostly from the
 * second-level cache. `row` hides which: each(f) visits the thread's own elements, store(out, f) writes them.
 */
#ifndef LAC_CUDA_ROWS_CUH
#define LAC_CUDA_ROWS_CUH
#include "common.cuh"

enum { ROW_LONG = 512, ROW_KEPT = ROW_LONG * 16 };
/* threads of a block whose rows have ROW threads each */
template <int ROW> inline constexpr int row_threads = ROW == 32 ? THREADS : ROW;

/* T: storage; ROW: threads of a row; N: elements of an access; KEEP: how many a thread keeps in registers, or 0 */
template <class T, int ROW, int N, int KEEP> struct row {
    typedef compute_t<T> C;
    enum { PER = KEEP ? KEEP / N : 1 };
    struct alignas(N * sizeof(T)) access {
        T at[N];
    };
    const T *x;
    int64_t n, stride; /* stride in elements; 1 if N > 1 */
    int lane;
    C kept[KEEP ? KEEP : 1];

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
    /* out[first ..] = values after f(values, first): N neighbours at a time */
    template <class U, class F> __device__ __forceinline__ void store_groups(U *out, F f) const
    {
        struct alignas(N * sizeof(U)) result {
            U at[N];
        };
        auto group = [&](C(&v)[N], int64_t first) {
            result r;
            f(v, first);
#pragma unroll
            for (int i = 0; i < N; i++) r.at[i] = from_compute<U>(v[i]);
            *(result *)(out + first) = r;
        };
        if constexpr (KEEP) {
#pragma unroll
            for (int k = 0; k < PER; k++) {
                C v[N];
                if ((int64_t)(k * ROW + lane) * N >= n) break;
#pragma unroll
                for (int i = 0; i < N; i++) v[i] = kept[k * N + i];
                group(v, (int64_t)(k * ROW + lane) * N);
            }
        } else {
            for (int64_t first = (int64_t)lane * N; first < n; first += ROW * N) {
                C v[N];
                read(first, v);
                group(v, first);
            }
        }
    }
    /* the kept elements become f(value) */
    template <class F> __device__ __forceinline__ void change(F f)
    {
#pragma unroll
        for (int k = 0; k < PER; k++) {
            if ((int64_t)(k * ROW + lane) * N >= n) break;
#pragma unroll
            for (int i = 0; i < N; i++) kept[k * N + i] = f(kept[k * N + i]);
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

/* N neighbours of a vector of parameters; N > 1: dense and aligned */
template <int N, class T>
__device__ __forceinline__ void load_run(const T *p, int64_t first, int64_t stride, compute_t<T> (&v)[N])
{
    struct alignas(N * sizeof(T)) access {
        T at[N];
    };
    if constexpr (N > 1) {
        access a = *(const access *)(p + first);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = to_compute(a.at[i]);
    } else {
        v[0] = to_compute(p[first * stride]);
    }
}

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
template <class T, bool FORWARD, class F> void with_rows(int64_t n, bool dense, F f)
{
    constexpr int N = 16 / sizeof(T);
    std::integral_constant<int, 0> again;
    std::integral_constant<int, 8> keep8;
    std::integral_constant<int, 16> keep16;
    std::integral_constant<int, 32> warp, keep32;
    std::integral_constant<int, 128> middle;
    std::integral_constant<int, ROW_LONG> longest;
    std::integral_constant<int, N> vector;
    if constexpr (sizeof(T) < 8) {
        if (dense && n % N == 0) {
            if constexpr (FORWARD) {
                if (n <= 1024) return f(warp, vector, keep32);
            } else {
                if (n <= 512) return f(warp, vector, keep16);
                if (n <= 1024) return f(middle, vector, keep8);
            }
            if (n <= 2048) return f(middle, vector, keep16);
            if (n <= ROW_KEPT) return f(longest, vector, keep16);
            return f(longest, vector, again);
        }
    }
    f(middle, std::integral_constant<int, 1>(), again);
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
