/* norm.cuh: registers and blocks of normalisations, and sums of their parameters' gradients over rows (norm.cu). */
#ifndef LAC_CUDA_NORM_CUH
#define LAC_CUDA_NORM_CUH
#include "lists.cuh"
#include "rows.cuh"

static __device__ __forceinline__ float root(float x) { return sqrtf(x); }
static __device__ __forceinline__ double root(double x) { return sqrt(x); }
/* the rows of this thread; every thread of a block has as many, because blocks hold one row or rows of one warp each */
#define NEXT_ROWS(ROW, rows)                                                                                           \
    for (int64_t r = (int64_t)blockIdx.x * (row_threads<ROW> / ROW) + threadIdx.x / ROW; r < rows;                     \
         r += (int64_t)gridDim.x * (row_threads<ROW> / ROW))

/* registers that a thread needs beside its elements */
enum { ROW_REGISTERS = 42 };
template <class T, int KEEP> inline constexpr int forward_registers = KEEP *(int)sizeof(T) / 4 + ROW_REGISTERS;
/* of norms, which unpack their elements once: bytes leave room for some 27 instructions an element of a half type */
template <class T, int KEEP> inline constexpr int norm_registers = KEEP *(int)sizeof(compute_t<T>) / 4 + ROW_REGISTERS;

/* total / n, where `part` = 1 / n, in three instructions: rows of equal numbers have their mean exactly, and so become
 * beta, whatever 1 / sqrt(eps) would make of a rounding */
template <class C> static __device__ __forceinline__ C quotient(C total, C n, C part)
{
    C m = total * part;
    return fma(fma(-m, n, total), part, m);
}
/* 1 / sqrt(variance + eps) from the sum of n squares */
template <class T>
static __device__ __forceinline__ compute_t<T> inverse_deviation(compute_t<T> square, compute_t<T> n, compute_t<T> eps)
{
    if constexpr (sizeof(T) == 2) return rsqrtf(__fdividef(square, n) + eps);
    else return compute_t<T>(1) / root(square / n + eps);
}
/* The threads of a row ask for BYTES of it ahead (launch.cuh), a line each. One row a team is what pays: layernorm
 * 0.9%, gelu_norm's backward 0.7%, where one instruction for the whole row gained less; more rows are slower again. */
template <int BYTES, int ROW> static __device__ __forceinline__ void ask_lines(const void *row, int lane)
{
#pragma unroll
    for (int i = 0; i < BYTES; i += ROW * 128)
        if (i + lane * 128 < BYTES) ask_ahead((const char *)row + i + lane * 128);
}
/* N neighbours of a row, normalised: never e s - m s, which loses what e - m is exact in */
template <int N, class T>
static __device__ __forceinline__ void scale_group(compute_t<T> (&e)[N], compute_t<T> m, compute_t<T> s, const T *gamma,
                                                   const T *beta, int64_t first, int64_t gamma_step = 1,
                                                   int64_t beta_step = 1)
{
    compute_t<T> p[N], q[N];
#pragma unroll
    for (int i = 0; i < N; i++) e[i] = (e[i] - m) * s;
    if (sizeof(T) == 2 && gamma && beta) {
        load_run<N>(gamma, first, gamma_step, p);
        load_run<N>(beta, first, beta_step, q);
#pragma unroll
        for (int i = 0; i < N; i++) e[i] = fma(e[i], p[i], q[i]);
        return;
    }
    if (gamma) {
        load_run<N>(gamma, first, gamma_step, p);
#pragma unroll
        for (int i = 0; i < N; i++) e[i] *= p[i];
    }
    if (beta) {
        load_run<N>(beta, first, beta_step, p);
#pragma unroll
        for (int i = 0; i < N; i++) e[i] += p[i];
    }
}

/* layer norm of a row that is in registers; gamma and beta are dense or absent */
template <class T, int ROW, int N, int KEEP>
__device__ __forceinline__ void normalise_row(const row<T, ROW, N, KEEP> &v, float eps, const T *gamma, const T *beta,
                                              T *out, float *mean, float *rstd, float *space)
{
    float total = 0, square = 0, n = (float)v.n;
    v.each([&](float e, int64_t, int) { total += e; });
    float m = quotient(row_sum<ROW>(total, space), n, 1.0f / n);
    v.each([&](float e, int64_t, int) { square += (e - m) * (e - m); });
    float s = inverse_deviation<T>(row_sum<ROW>(square, space), n, eps);
    v.store_groups(out, [&](float(&e)[N], int64_t first, int) { scale_group<N>(e, m, s, gamma, beta, first); });
    if (threadIdx.x % ROW) return;
    *mean = m;
    *rstd = s;
}
/* the same of elements e that are unpacked, which takes more registers and fewer instructions */
template <class T, int ROW, int N, int KEEP>
__device__ __forceinline__ void normalise_row(const row<T, ROW, N, KEEP> &v, const float (&e)[KEEP], float eps,
                                              const T *gamma, const T *beta, T *out, float *mean, float *rstd,
                                              float *space)
{
    float total = 0, square = 0, n = (float)v.n;
    v.places([&](int64_t, int k) {
#pragma unroll
        for (int i = 0; i < N; i++) total += e[k + i];
    });
    float m = quotient(row_sum<ROW>(total, space), n, 1.0f / n);
    v.places([&](int64_t, int k) {
#pragma unroll
        for (int i = 0; i < N; i++) square += (e[k + i] - m) * (e[k + i] - m);
    });
    float s = inverse_deviation<T>(row_sum<ROW>(square, space), n, eps);
    v.places([&](int64_t first, int k) {
        float y[N];
#pragma unroll
        for (int i = 0; i < N; i++) y[i] = e[k + i];
        scale_group<N>(y, m, s, gamma, beta, first);
        *(row_access<T, N> *)(out + first) = row_pack<T, N>(y);
    });
    if (threadIdx.x % ROW) return;
    *mean = m;
    *rstd = s;
}

/* 32 columns a block, 32 threads deep */
enum { COMBINE = 1024 };
template <class T>
__global__ void __launch_bounds__(COMBINE)
    layernorm_combine(int64_t n, int64_t parts, const compute_t<T> *share, T *dgamma, T *dbeta, T *sums)
{
    let_next_in();
    previous_done();
    __shared__ double space[COMBINE / 32][33];
    int tx = threadIdx.x % 32, ty = threadIdx.x / 32;
    int64_t i = (int64_t)blockIdx.x * 32 + tx;
    int columns = gridDim.y;
    const compute_t<T> *from = share + blockIdx.y * n;
    T *out = blockIdx.y == 0 ? dgamma : blockIdx.y == 1 ? dbeta : sums;
    if (!out) return;
    constexpr int DEEP = COMBINE / 32, FLIGHT = 5; /* all at once if every multiprocessor of 160 had a block */
    double s = 0;
    for (int64_t p = ty; p < parts; p += FLIGHT * DEEP) {
        compute_t<T> v[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++)
            v[u] = p + u * DEEP < parts && i < n ? from[(p + u * DEEP) * columns * n + i] : 0;
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) s += (double)v[u];
    }
    space[ty][tx] = s;
    __syncthreads();
    s = warp_sum(space[tx][ty]); /* a warp has a column */
    i += ty - tx;
    if (tx == 0 && i < n) out[i] = from_compute<T>((compute_t<T>)s);
}

/* absent, or readable 16 bytes at a time */
static inline bool parameters_dense(const lac_view *v)
{
    return !v->data || (v->stride[0] == 1 && (uintptr_t)v->data % 16 == 0);
}

/* may kernels that keep rows in registers run on these tensors, which are dense (absent ones fit)? */
static inline bool rows_kept(const lac_view *const *list, int count, const lac_view *gamma, const lac_view *beta)
{
    const lac_view *first = list[0];
    int64_t vector = 16 / dtype_bytes(first->dtype), n = first->shape[first->ndim - 1];
    bool ok = first->dtype != LAC_F64 && n % vector == 0 && n <= ROW_KEPT && parameters_dense(gamma);
    if (beta) ok = ok && parameters_dense(beta);
    for (int i = 0; i < count; i++)
        ok = ok && (!list[i]->data || (view_contiguous(list[i]) && (uintptr_t)list[i]->data % 16 == 0));
    return ok;
}

#endif
