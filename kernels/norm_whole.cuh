/* norm_whole.cuh: layer norms of bf16 (f16 spills) over models' usual rows with gain and bias: of 768 elements on
 * their own (norm.cu), rmsnorm with gain too, of 768 and 3,072 behind gelu (gelu_norm.cu).
 *
 * One block fills a multiprocessor and stays: threads keep their columns of gain and bias, a row comes ahead of its
 * turn (cp.async), the first ones before the kernel ahead is done, and lengths are constants. On an H200, 32768 x 768
 * in bf16, layernorm took 29.6 us by norm.cu's kernel, in which a warp has a row and many small blocks follow each
 * other, 28.3 so and 27.9 with the next kernel let in and its first rows asked for; gelu_norm 31.2, 29.7 and 28.9
 * (3072: 110 and 105). Layernorm of 3072 took 106 both ways. In another run, in turns, rmsnorm took 27.6 us by
 * norm.cu's kernel and 26.6 so, layernorm 27.2, and 26.9 with its first rows asked for by lines (ask_lines()).
 * Rejected: 896 threads that read gain and bias anew for every row (28.7 and 30.7 us); rows dealt out to blocks before
 * teams, so that all end together (28.1); rows that are to leave the second-level cache first (28.8; 3072: 115); gelu's
 * table filled after the first rows were asked for (29.9).
 */
#ifndef LAC_CUDA_NORM_WHOLE_CUH
#define LAC_CUDA_NORM_WHOLE_CUH
#include "norm_bwd.cuh"

enum { WHOLE_KEEP = 24, WHOLE_THREADS = 768 /* 80 registers each */ };
template <class T> struct whole_rows {
    int64_t rows, step; /* between rows of x, in elements */
    float eps;
    const T *x, *gamma, *beta;
    T *out;
    float *mean, *rstd;
};

/* A makes of x what is normalised: TABLE bytes of shared memory that fill() prepares, and elements(). CENTRED is false
 * for rmsnorm, which has neither mean nor bias. */
template <class T, int ROW, bool CENTRED, class A>
__global__ void __launch_bounds__(WHOLE_THREADS, 1) norm_whole_rows(whole_rows<T> a)
{
    constexpr int N = 8, KEEP = WHOLE_KEEP, PER = KEEP / N, COUNT = ROW * KEEP, TEAMS = WHOLE_THREADS / ROW;
    constexpr float count = (float)COUNT, part = 1.0f / count;
    typedef row_access<T, N> vector;
    extern __shared__ float4 norm_space[];
    __shared__ float space[2][TEAMS][ROW / 32];
    int team = threadIdx.x / ROW, lane = threadIdx.x % ROW, rows = (int)a.rows;
    int hop = (int)gridDim.x * TEAMS, r = (int)blockIdx.x * TEAMS + team;
    const T *from = a.x + r * a.step + lane * N;
    vector *mine = (vector *)norm_space + A::TABLE / 16 + threadIdx.x;
    uint32_t mine_at = (uint32_t)__cvta_generic_to_shared(mine);
    let_next_in();
    if (r < rows) ask_lines<COUNT *(int)sizeof(T), ROW>(a.x + r * a.step, lane);
    if (threadIdx.x == 0) {
        ask_ahead(a.gamma, COUNT * (int)sizeof(T));
        if (CENTRED) ask_ahead(a.beta, COUNT * (int)sizeof(T));
    }
    if constexpr (A::TABLE > 0) A::fill(norm_space);
    previous_done();
    auto fetch = [&](int r) {
#pragma unroll
        for (int k = 0; k < KEEP; k += N)
            if (r < rows) fetch16(mine_at + k / N * WHOLE_THREADS * 16, from + k * ROW, true);
        asm volatile("cp.async.commit_group;" ::: "memory");
        from += hop * a.step;
    };
    fetch(r);
    vector gain[PER], bias[PER];
#pragma unroll
    for (int k = 0; k < KEEP; k += N) {
        gain[k / N] = *(const vector *)(a.gamma + k * ROW + lane * N);
        if (CENTRED) bias[k / N] = *(const vector *)(a.beta + k * ROW + lane * N);
    }
    if constexpr (A::TABLE > 0) __syncthreads();
    T *to = a.out + (int64_t)r * COUNT + lane * N;
    for (; r < rows; r += hop, to += (int64_t)hop * COUNT) {
        float e[KEEP], total[1] = {}, square[1] = {}, m = 0;
        fetched(1);
        A::template elements<KEEP>([&](int k) -> vector & { return mine[k / N * WHOLE_THREADS]; }, e, norm_space);
        fetch(r + hop);
        if constexpr (CENTRED) {
#pragma unroll
            for (int k = 0; k < KEEP; k++) total[0] += e[k];
            team_sums(total, space[0][team], ROW, team);
            m = quotient(total[0], count, part);
#pragma unroll
            for (int k = 0; k < KEEP; k++) e[k] -= m;
        }
#pragma unroll
        for (int k = 0; k < KEEP; k++) square[0] += e[k] * e[k];
        static_assert(CENTRED || ROW == 32, "between two sums in one place the team has to meet");
        team_sums(square, space[1][team], ROW, team);
        float s = inverse_deviation<T>(square[0], count, a.eps);
#pragma unroll
        for (int k = 0; k < KEEP; k += N) {
            float p[N], q[N];
            row_unpack<T, N>(gain[k / N], p);
            if (CENTRED) row_unpack<T, N>(bias[k / N], q);
#pragma unroll
            for (int i = 0; i < N; i++) q[i] = CENTRED ? fmaf(e[k + i] * s, p[i], q[i]) : e[k + i] * s * p[i];
            *(vector *)(to + k * ROW) = row_pack<T, N>(q);
        }
        if (CENTRED && lane == 0) a.mean[r] = m;
        if (lane == 0) a.rstd[r] = s;
    }
}

/* x itself */
template <class T> struct rows_themselves {
    enum { TABLE = 0 };
    template <int KEEP, class X> static __device__ __forceinline__ void elements(X x, float (&e)[KEEP], const void *)
    {
        unpack_kept<T, 8>(x, e);
    }
};

/* are rows of n elements such? They are aligned and dense; their distance is free. A bias goes with a mean. */
template <int ROW, class T> bool whole_fits(const whole_rows<T> &a, int64_t n)
{
    return n == ROW * WHOLE_KEEP && a.gamma && !a.beta == !a.mean && a.rows <= 1 << 30;
}
template <int ROW, class A, bool CENTRED = true, class T> int norm_whole(const char *op, const whole_rows<T> &a)
{
    constexpr int SHARED = A::TABLE + WHOLE_THREADS * WHOLE_KEEP * (int)sizeof(T);
    auto kernel = norm_whole_rows<T, ROW, CENTRED, A>;
    static cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    LAC_TRY(lac_cuda_check(op, allowed));
    launch(kernel, blocks_filling(a.rows, WHOLE_THREADS / ROW, 1), WHOLE_THREADS, SHARED, a);
    return lac_cuda_launched(op);
}

#endif
