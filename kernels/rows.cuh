/* rows.cuh: rows that a warp or a block normalises: softmax, layer norms.
 *
 * A dense, aligned row of f32, f16 or bf16 is moved 16 bytes at a time, and read once: it stays in registers as it is
 * stored, so that a half type needs half of them, and a thread has 8, 16, 24 or 32 elements, whatever fits the row
 * best. A row of at most 1,024 elements belongs to a warp, which needs no barrier; up to 4,096 to 128 threads and up to
 * 8,192 to 256. What hides the latency of memory is the number of rows that a multiprocessor has on the way, so few
 * threads a row are better than many: with 512 threads a row of 3,072 moved at a third of a copy's bandwidth. Longer
 * rows, rows with strides, and f64, are read again in every pass, mostly from the second-level cache. `row` hides
 * which: each(f) visits the thread's own elements, store(out, f) writes them.
 */
#ifndef LAC_CUDA_ROWS_CUH
#define LAC_CUDA_ROWS_CUH
#include "launch.cuh"

enum { ROW_LONG = 256, ROW_KEPT = ROW_LONG * 32 };
/* threads of a block whose rows have ROW threads each */
template <int ROW> inline constexpr int row_threads = ROW == 32 ? 128 : ROW;
/* blocks that a multiprocessor must hold, of threads with `registers` each */
template <int ROW> constexpr int row_blocks(int registers)
{
    int blocks = 65536 / (row_threads<ROW> * registers);
    return blocks < 1 ? 1 : blocks > 2048 / row_threads<ROW> ? 2048 / row_threads<ROW> : blocks;
}

/* N neighbours, moved at once: 16 bytes, or one. Half types are kept as words: the compiler gives elements of 16 bits a
 * register each. */
template <class T, int N> struct row_access {
    uint4 word;
};
template <class T> struct row_access<T, 1> {
    T word;
};
template <class T, int N> __device__ __forceinline__ void row_unpack(const row_access<T, N> &a, compute_t<T> (&v)[N])
{
    if constexpr (N == 1) {
        v[0] = to_compute(a.word);
    } else {
        const uint32_t word[4] = {a.word.x, a.word.y, a.word.z, a.word.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (std::is_same_v<T, float>) {
                v[i] = __uint_as_float(word[i]);
            } else if constexpr (std::is_same_v<T, bf16>) {
                v[2 * i] = __uint_as_float(word[i] << 16), v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
            } else {
                float2 pair = __half22float2(*(const __half2 *)&word[i]);
                v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
            }
        }
    }
}
template <class T, int N> __device__ __forceinline__ row_access<T, N> row_pack(const compute_t<T> (&v)[N])
{
    row_access<T, N> a;
    if constexpr (N == 1) {
        a.word = from_compute<T>(v[0]);
    } else {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (std::is_same_v<T, float>) word[i] = __float_as_uint(v[i]);
            else if constexpr (std::is_same_v<T, bf16>)
                *(__nv_bfloat162 *)&word[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
            else *(__half2 *)&word[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
        }
        a.word = make_uint4(word[0], word[1], word[2], word[3]);
    }
    return a;
}

/* One instruction where the compiler would make four of it, as of what is stored through a policy (norm_bwd.cuh) */
static __device__ __forceinline__ void store_words(void *to, uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
template <class T, int N> __device__ __forceinline__ void row_store(T *to, const row_access<T, N> &a)
{
    if constexpr (N == 1) *to = a.word;
    else store_words(to, a.word.x, a.word.y, a.word.z, a.word.w);
}

/* T: storage; ROW: threads of a row; N: elements of an access; KEEP: how many a thread keeps in registers, or 0 */
template <class T, int ROW, int N, int KEEP> struct row {
    typedef compute_t<T> C;
    enum { PER = KEEP ? KEEP / N : 1 };
    const T *x;
    int64_t n, stride; /* stride in elements; 1 if N > 1 */
    int lane;
    row_access<T, N> kept[PER];

    __device__ __forceinline__ row_access<T, N> read(int64_t first) const
    {
        return *(const row_access<T, N> *)(x + (N > 1 ? first : first * stride));
    }
    __device__ __forceinline__ row(const T *x_, int64_t n_, int64_t stride_) : x(x_), n(n_), stride(stride_)
    {
        lane = threadIdx.x % ROW;
        if constexpr (KEEP) {
#pragma unroll
            for (int k = 0; k < PER; k++)
                if ((k * ROW + lane) * N < (int)n) kept[k] = read((k * ROW + lane) * N);
        }
    }
    /* the N elements from position `first` on, of which the first kept has number k */
    __device__ __forceinline__ void group(int64_t first, int k, C (&v)[N]) const
    {
        row_unpack<T, N>(KEEP ? kept[k / N] : read(first), v);
    }
    /* f(position of the first, number of the first among the kept): N neighbours at a time, of kept rows */
    template <class F> __device__ __forceinline__ void places(F f) const
    {
#pragma unroll
        for (int k = 0; k < PER; k++) {
            int first = (k * ROW + lane) * N;
            if (first >= (int)n) break;
            f((int64_t)first, k * N);
        }
    }
    /* f(values, position of the first, number of the first among the kept): N neighbours at a time */
    template <class F> __device__ __forceinline__ void groups(F f) const
    {
        if constexpr (KEEP) {
#pragma unroll
            for (int k = 0; k < PER; k++) {
                int first = (k * ROW + lane) * N;
                if (first >= (int)n) break;
                C v[N];
                row_unpack<T, N>(kept[k], v);
                f(v, (int64_t)first, k * N);
            }
        } else {
            for (int64_t first = (int64_t)lane * N; first < n; first += ROW * N) {
                row_access<T, N> a = read(first);
                C v[N];
                row_unpack<T, N>(a, v);
                f(v, first, 0);
            }
        }
    }
    /* f(value, position, k): k numbers the kept elements */
    template <class F> __device__ __forceinline__ void each(F f) const
    {
        groups([&](C(&v)[N], int64_t first, int k) {
#pragma unroll
            for (int i = 0; i < N; i++) f(v[i], first + i, k + i);
        });
    }
    /* out[first ..] = values after f(values, first, k); U: storage type of out, which is dense */
    template <class U, class F> __device__ __forceinline__ void store_groups(U *out, F f) const
    {
        groups([&](C(&v)[N], int64_t first, int k) {
            f(v, first, k);
            *(row_access<U, N> *)(out + first) = row_pack<U, N>(v);
        });
    }
    /* out[position] = f(value, position, k) */
    template <class U, class F> __device__ __forceinline__ void store(U *out, F f) const
    {
        store_groups(out, [&](C(&v)[N], int64_t first, int k) {
#pragma unroll
            for (int i = 0; i < N; i++) v[i] = f(v[i], first + i, k + i);
        });
    }
};

/* N neighbours of a vector of parameters; N > 1: dense and aligned */
template <int N, class T>
__device__ __forceinline__ void load_run(const T *p, int64_t first, int64_t stride, compute_t<T> (&v)[N])
{
    row_unpack<T, N>(*(const row_access<T, N> *)(p + (N > 1 ? first : first * stride)), v);
}

/* sums over a row's threads of ROW / 32 warps; `space` has as many values and may be reused after the call */
template <int ROW, class C> __device__ __forceinline__ C row_sum(C x, C *space)
{
    x = warp_sum(x);
    if constexpr (ROW > 32) {
        if (threadIdx.x % 32 == 0) space[threadIdx.x / 32] = x;
        __syncthreads();
        x = space[0];
#pragma unroll
        for (int w = 1; w < ROW / 32; w++) x += space[w];
        __syncthreads();
    }
    return x;
}
/* two at once; `space` has twice as many */
template <int ROW, class C> __device__ __forceinline__ void row_sums(C *x, C *y, C *space)
{
    *x = warp_sum(*x);
    *y = warp_sum(*y);
    if constexpr (ROW > 32) {
        if (threadIdx.x % 32 == 0) space[threadIdx.x / 32] = *x, space[ROW / 32 + threadIdx.x / 32] = *y;
        __syncthreads();
        *x = space[0];
        *y = space[ROW / 32];
#pragma unroll
        for (int w = 1; w < ROW / 32; w++) *x += space[w], *y += space[ROW / 32 + w];
        __syncthreads();
    }
}
template <int ROW, class C> __device__ __forceinline__ C row_max(C x, C *space)
{
    x = warp_max(x);
    if constexpr (ROW > 32) {
        if (threadIdx.x % 32 == 0) space[threadIdx.x / 32] = x;
        __syncthreads();
        x = space[0];
#pragma unroll
        for (int w = 1; w < ROW / 32; w++) x = space[w] > x ? space[w] : x;
        __syncthreads();
    }
    return x;
}

/* calls f(ROW, N, KEEP as constants) with how rows of length n are run */
template <class T, class F> void with_rows(int64_t n, bool dense, F f)
{
    constexpr int N = 16 / sizeof(T);
    std::integral_constant<int, 0> again;
    std::integral_constant<int, 32> warp, keep32;
    std::integral_constant<int, 16> keep16;
    std::integral_constant<int, 24> keep24;
    std::integral_constant<int, 128> middle;
    std::integral_constant<int, ROW_LONG> longest;
    if constexpr (sizeof(T) < 8) {
        std::integral_constant<int, N> vector;
        if (dense && n % N == 0) {
            if (n <= 256) return f(warp, vector, std::integral_constant<int, 8>());
            if (n <= 512) return f(warp, vector, keep16);
            if (n <= 768) return f(warp, vector, keep24);
            if (n <= 1024) return f(warp, vector, keep32);
            if (n <= 2048) return f(middle, vector, keep16);
            if (n <= 3072) return f(middle, vector, keep24);
            if (n <= 4096) return f(middle, vector, keep32);
            if (n <= ROW_KEPT) return f(longest, vector, keep32);
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
