/* norm_bwd.cuh: the backward of a layer norm over rows that registers hold, and of what is fused with it (norm.cu,
 * residual.cu, gelu_norm.cu).
 *
 * dx = s (p - mean(p) - z mean(p z)) with p = g gamma and z = (x - m) s: two sums along a row, and two along a column,
 * those of dgamma and dbeta. A block keeps its columns' sums in shared memory, where a thread alone reads and writes
 * what is its own, 16 bytes at a time and without a barrier; the blocks' shares are added in order by a second kernel
 * (norm.cuh). No atomics. Kept in registers, two for each element of a thread, the sums left a multiprocessor 12 warps,
 * which hide neither memory nor each other's arithmetic: half of a copy's bandwidth. A barrier concerns the threads of
 * one row only, and one a row is enough: the sums' places take turns.
 *
 * What is fused is a policy P: where a row's x and g are, what becomes of x before the norm, and of dx behind it. Which
 * products and sums are one instruction is written out, so that dx has the same bits whatever P is.
 */
#ifndef LAC_CUDA_NORM_BWD_CUH
#define LAC_CUDA_NORM_BWD_CUH
#include "norm.cuh"

/* threads of a block, which has one or several rows of ROW threads */
template <int ROW> inline constexpr int back_threads = ROW == 96 ? 288 : 256;

template <class T> struct norm_grad {
    int64_t rows, n;
    const T *gamma;           /* dense, or NULL */
    const float *mean, *rstd; /* mean NULL: rmsnorm, whose mean is 0 */
    float *share;             /* [block][2][n], or NULL */
};

/* registers of a thread: x and g as they are stored, what P keeps, and the rest */
template <class T, int KEEP, class P>
inline constexpr int back_registers = 2 * KEEP *(int)sizeof(T) / 4 + P::template registers<T, KEEP> + 48;
template <int ROW, int KEEP> inline constexpr int back_shared = 2 * KEEP *back_threads<ROW> *(int)sizeof(float);
template <class T, int ROW, int KEEP, class P> constexpr int back_blocks()
{
    int by_registers = 65536 / (back_threads<ROW> * back_registers<T, KEEP, P>),
        by_shared = (224 << 10) / back_shared<ROW, KEEP>;
    int blocks = by_registers < by_shared ? by_registers : by_shared;
    return blocks < 1 ? 1 : blocks > 8 ? 8 : blocks;
}

/* sums of two over a row's threads; `space`: 2 x 2 x warps of a row, of this row of threads alone */
template <int ROW> static __device__ __forceinline__ void team_sums(float *x, float *y, float *space, int turn)
{
    *x = warp_sum(*x);
    *y = warp_sum(*y);
    if constexpr (ROW > 32) {
        constexpr int WARPS = ROW / 32;
        float *at = space + turn * 2 * WARPS;
        int warp = threadIdx.x % ROW / 32;
        if (threadIdx.x % 32 == 0) at[warp] = *x, at[WARPS + warp] = *y;
        asm volatile("bar.sync %0, %1;" ::"r"((int)threadIdx.x / ROW + 1), "n"(ROW) : "memory");
        *x = at[0];
        *y = at[WARPS];
#pragma unroll
        for (int w = 1; w < WARPS; w++) *x += at[w], *y += at[WARPS + w];
    }
}

/* the sums of a thread's columns: dgamma's KEEP, then dbeta's, four at a time */
template <int ROW, int N, int KEEP> struct column_sums {
    enum { BACK = back_threads<ROW> };
    float4 (*cell)[BACK];
    __device__ __forceinline__ column_sums(void *space) : cell((float4(*)[BACK])space)
    {
#pragma unroll
        for (int i = 0; i < KEEP / 2; i++) cell[i][threadIdx.x] = make_float4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void add(int k, const float (&d)[N], const float (&z)[N]) const
    {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            float4 *gamma = &cell[(k + i) / 4][threadIdx.x], *beta = &cell[(KEEP + k + i) / 4][threadIdx.x];
            float4 a = *gamma, b = *beta;
            a.x += d[i] * z[i], a.y += d[i + 1] * z[i + 1], a.z += d[i + 2] * z[i + 2], a.w += d[i + 3] * z[i + 3];
            b.x += d[i], b.y += d[i + 1], b.z += d[i + 2], b.w += d[i + 3];
            *gamma = a;
            *beta = b;
        }
    }
    /* to share[2][n]: every row of threads writes some of what all have of the same columns */
    __device__ __forceinline__ void store(float *share, int n) const
    {
        constexpr int TEAMS = BACK / ROW;
        int team = threadIdx.x / ROW, lane = threadIdx.x % ROW;
        __syncthreads();
        for (int i = team; i < KEEP / 2; i += TEAMS) {
            int k = i % (KEEP / 4) * 4, first = (k / N * ROW + lane) * N + k % N;
            if (first >= n) continue;
            float4 sum = cell[i][lane];
#pragma unroll
            for (int t = 1; t < TEAMS; t++) {
                float4 a = cell[i][t * ROW + lane];
                sum.x += a.x, sum.y += a.y, sum.z += a.z, sum.w += a.w;
            }
            *(float4 *)(share + (i < KEEP / 4 ? 0 : n) + first) = sum;
        }
    }
};

/* q = d gamma, of N columns; gamma may be NULL */
template <int N, class T>
static __device__ __forceinline__ void scaled(const T *gamma, int64_t first, const float (&d)[N], float (&q)[N])
{
    float w[N];
    if (gamma) load_run<N>(gamma, first, 1, w);
#pragma unroll
    for (int i = 0; i < N; i++) q[i] = gamma ? __fmul_rn(w[i], d[i]) : d[i];
}

template <class T, int ROW, int N, int KEEP, class P>
__global__ void __launch_bounds__(back_threads<ROW>, back_blocks<T, ROW, KEEP, P>()) norm_bwd_rows(norm_grad<T> a, P p)
{
    previous_done();
    typedef row<T, ROW, N, KEEP> values;
    constexpr int BACK = back_threads<ROW>;
    extern __shared__ float4 norm_space[];
    __shared__ float space[BACK / 32 * 4];
    column_sums<ROW, N, KEEP> columns(norm_space);
    float share_of_mean = a.mean ? 1.0f / (float)a.n : 0, *team_space = space + threadIdx.x / ROW * (ROW / 32 * 4);
    int turn = 0;
    for (int64_t r = (int64_t)blockIdx.x * (BACK / ROW) + threadIdx.x / ROW; r < a.rows;
         r += (int64_t)gridDim.x * (BACK / ROW), turn ^= 1) {
        values v(p.x_at(r), a.n, 1), w(p.g_at(r), a.n, 1);
        float m = a.mean ? a.mean[r] : 0, s = a.rstd[r], total = 0, dot = 0;
        typename P::template state<ROW, N, KEEP> more(p, r, v);
        v.groups([&](float(&e)[N], int64_t first, int k) {
            float d[N], q[N], z[N];
            w.group(first, k, d);
            scaled<N>(a.gamma, first, d, q);
#pragma unroll
            for (int i = 0; i < N; i++) {
                z[i] = __fmul_rn(e[i] - m, s);
                total += q[i];
                dot = fmaf(q[i], z[i], dot);
            }
            if (a.share) columns.add(k, d, z);
        });
        team_sums<ROW>(&total, &dot, team_space, turn);
        total = __fmul_rn(total, share_of_mean);
        dot /= (float)a.n;
        v.groups([&](float(&e)[N], int64_t first, int k) {
            float d[N], q[N];
            w.group(first, k, d);
            scaled<N>(a.gamma, first, d, q);
#pragma unroll
            for (int i = 0; i < N; i++) e[i] = __fmul_rn(s, fmaf(-__fmul_rn(e[i] - m, s), dot, q[i] - total));
            more.store(p, r * a.n + first, k, e);
        });
    }
    if (a.share) columns.store(a.share + (int64_t)blockIdx.x * 2 * a.n, (int)a.n);
}

/* calls f(ROW, N, KEEP as constants) for rows of length n, which is at most ROW_KEPT: as with_rows, but for the width
 * of many models in f32, where 96 threads with 8 elements are faster than 32 with 24; no instance is made of either
 * where it cannot run */
template <class T, class F> void with_back_rows(int64_t n, F f)
{
    constexpr bool F32 = sizeof(T) == 4;
    if constexpr (F32)
        if (n > 512 && n <= 768)
            return f(std::integral_constant<int, 96>(), std::integral_constant<int, 4>(),
                     std::integral_constant<int, 8>());
    with_rows<T>(n, true, [&](auto rt, auto nt, auto kt) {
        constexpr int ROW = decltype(rt)::value, KEEP = decltype(kt)::value;
        if constexpr (KEEP > 0 && !(F32 && ROW == 32 && KEEP == 24)) f(rt, nt, kt);
    });
}

/* launches it and adds the shares of dgamma and dbeta up; `a` lacks only where those are */
template <class T, class P>
int norm_bwd_run(const char *op, norm_grad<T> a, const P &p, const lac_view *dgamma, const lac_view *dbeta)
{
    int status = 0;
    with_back_rows<T>(a.n, [&](auto rt, auto nt, auto kt) {
        constexpr int ROW = decltype(rt)::value, N = decltype(nt)::value, KEEP = decltype(kt)::value;
        constexpr int BACK = back_threads<ROW>;
        bool shares = dgamma->data || dbeta->data;
        unsigned blocks = blocks_filling(a.rows, BACK / ROW, back_blocks<T, ROW, KEEP, P>());
        lac_scratch share(op, shares ? (size_t)(blocks * 2 * a.n) * sizeof(float) : 1);
        auto kernel = norm_bwd_rows<T, ROW, N, KEEP, P>;
        static cudaError_t allowed =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, back_shared<ROW, KEEP>);
        status = lac_cuda_check(op, allowed);
        if (!share.data) status = LAC_E_MEMORY;
        if (status) return;
        a.share = shares ? (float *)share.data : NULL;
        launch(kernel, blocks, BACK, back_shared<ROW, KEEP>, a, p);
        status = lac_cuda_launched(op);
        if (status || !shares) return;
        launch(layernorm_combine<T>, dim3(blocks_for(a.n, 32), 2), COMBINE, 0, a.n, (int64_t)blocks, a.share,
               (T *)dgamma->data, (T *)dbeta->data);
        status = lac_cuda_launched(op);
    });
    return status;
}

#endif
