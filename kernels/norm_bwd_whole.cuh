/* norm_bwd_whole.cuh: the backward of layer norms of half types over models' usual rows, of 768 and 3,072 elements:
 * layernorm and rmsnorm (norm.cu), and behind gelu (gelu_norm.cu).
 *
 * As norm_bwd.cuh, whose formulas and bits of dx it has, with less to do for a row: lengths are constants, gamma stays
 * as it is stored, a thread reads what was fetched once and asks for the row after the next at once, and g gamma stays
 * in registers between the two passes: 355 instructions a row and warp instead of 443. On an H200, 32768 x 768 in bf16,
 * in turns: layernorm 40.7 to 39.6 us; of 3,072 156.8 to 147.3. Rejected: three rows ahead (1% to 2% slower), runs of
 * rows (0% to 3%), the second stage in the same launch (3 to 5%; HOPPER_PIPELINES.md).
 *
 * The shares are added up by blocks so small that they come in beside those of the kernel ahead, where blocks of 1,024
 * threads waited for a multiprocessor of their own and kept the next kernel's away from it: layernorm 40.0 to 39.2 us.
 * Registers for both is the condition (168 a thread: gelu_norm 42.8 to 44.2 us), and one round of loads: 64 columns a
 * block, in five rounds, took 43.9 us for layernorm. Behind gelu, see gelu_norm.cu.
 */
#ifndef LAC_CUDA_NORM_BWD_WHOLE_CUH
#define LAC_CUDA_NORM_BWD_WHOLE_CUH
#include "norm_bwd.cuh"

enum { BACK_KEEP = 24, BACK_THREADS = 384, BACK_REGISTERS = 160 };
enum { BESIDE = 128 /* threads, 32 registers each: what a block of 384 with 160 each leaves */ };
template <class T> struct whole_grad {
    int64_t rows, x_step, g_step; /* steps between rows in elements */
    const T *x, *g, *gamma;       /* gamma may be NULL */
    const float *mean, *rstd;     /* mean NULL: rmsnorm, whose mean is 0 */
    T *dx;
    float *share; /* [block][2][elements of a row], or NULL */
};

/* two sums over a warp, as team_sums() adds them, but without shared memory */
static __device__ __forceinline__ void warp_sums(float (&v)[2])
{
    const unsigned all = 0xffffffffu;
    const bool high = threadIdx.x & 16;
    float x = (high ? v[1] : v[0]) + __shfl_xor_sync(all, high ? v[0] : v[1], 16);
#pragma unroll
    for (int o = 8; o; o >>= 1) x += __shfl_xor_sync(all, x, o);
    float other = __shfl_xor_sync(all, x, 16);
    v[0] = high ? other : x, v[1] = high ? x : other;
}

/* A makes of x what was normalised, and of its gradient that of x: TABLE bytes of shared memory that fill() prepares,
 * and state's before() and after(). A team of ROW threads takes rows that lie as far apart as there are teams. LEAN:
 * what before() computes has more registers, because gamma is in shared memory and g is read behind it. */
template <class T, int ROW, class A> static __device__ __forceinline__ void norm_bwd_whole_of(const whole_grad<T> &a)
{
    constexpr int N = 8, KEEP = BACK_KEEP, PER = KEEP / N, COUNT = ROW * KEEP, TEAMS = BACK_THREADS / ROW;
    constexpr int STAGE = 2 * PER * BACK_THREADS; /* vectors */
    constexpr float part = 1.0f / (float)COUNT;
    typedef row_access<T, N> vector;
    extern __shared__ float4 norm_space[];
    __shared__ float space[2][BACK_THREADS / 32 * 2];
    let_next_in();
    const int team = threadIdx.x / ROW, lane = threadIdx.x % ROW, rows = (int)a.rows;
    const int hop = (int)gridDim.x * TEAMS, first = (int)blockIdx.x * TEAMS + team;
    vector *mine = (vector *)norm_space + A::TABLE / 16 + threadIdx.x;
    uint32_t mine_at = (uint32_t)__cvta_generic_to_shared(mine);
    asm volatile("" : "+r"(mine_at)); /* not to be computed again for every row */
    const T *x = a.x + first * a.x_step + lane * N, *g = a.g + first * a.g_step + lane * N;
    auto fetch = [&](int r, int stage) {
#pragma unroll
        for (int k = 0; k < PER; k++)
            if (r < rows) {
                fetch16(mine_at + (stage * STAGE + k * BACK_THREADS) * 16, x + k * ROW * N, true);
                fetch16(mine_at + (stage * STAGE + (PER + k) * BACK_THREADS) * 16, g + k * ROW * N, true);
            }
        x += hop * a.x_step, g += hop * a.g_step;
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    /* past the end those of the last row, which nobody reads */
    float m_next = 0, s_next = 0;
    auto statistics = [&](int r) {
        int at = r < rows ? r : rows - 1;
        if (a.mean) m_next = a.mean[at];
        s_next = a.rstd[at];
    };
    /* before the kernel ahead is done: the first row and what goes with all */
    if (first < rows) {
        ask_lines<COUNT *(int)sizeof(T), ROW>(a.x + first * a.x_step, lane);
        ask_lines<COUNT *(int)sizeof(T), ROW>(a.g + first * a.g_step, lane);
    }
    for (int r = first + lane * hop; r < rows; r += ROW * hop) {
        if (a.mean) ask_ahead(a.mean + r);
        ask_ahead(a.rstd + r);
    }
    if (threadIdx.x == 0 && a.gamma) ask_ahead(a.gamma, COUNT * (int)sizeof(T));
    if constexpr (A::TABLE > 0) A::fill(norm_space);
    previous_done();
#pragma unroll
    for (int s = 0; s < BACK_STAGES; s++) fetch(first + s * hop, s);
    if (first < rows) statistics(first);
    auto gain = [&](int at) {
        float one[N];
#pragma unroll
        for (int i = 0; i < N; i++) one[i] = 1;
        return a.gamma ? *(const vector *)(a.gamma + at * N) : row_pack<T, N>(one);
    };
    vector w[A::LEAN ? 1 : PER], *gains = (vector *)norm_space + A::TABLE / 16 + BACK_STAGES * STAGE;
    if constexpr (A::LEAN) {
        for (int i = threadIdx.x; i < COUNT / N; i += BACK_THREADS) gains[i] = gain(i);
        gains += lane;
    } else {
#pragma unroll
        for (int k = 0; k < PER; k++) w[k] = gain(k * ROW + lane);
    }
    if constexpr (A::TABLE > 0 || A::LEAN) __syncthreads();
    float sums[2 * KEEP] = {};
    T *to = a.dx + (int64_t)first * COUNT + lane * N;
    int stage = 0;
    for (int r = first; r < rows; r += hop, stage ^= 1) {
        typename A::template state<KEEP> more;
        float m = m_next, s = s_next, shift = -(m * s), z[KEEP], q[KEEP], both[2] = {};
        statistics(r + hop);
        fetched(BACK_STAGES);
        const vector *at = mine + stage * STAGE;
        vector d_words[PER];
        auto read = [&] {
#pragma unroll
            for (int k = 0; k < PER; k++) d_words[k] = at[(PER + k) * BACK_THREADS];
        };
        if constexpr (!A::LEAN) read();
        more.before([&](int k) -> const vector & { return at[k / N * BACK_THREADS]; }, z, norm_space);
        if constexpr (A::LEAN) {
            asm volatile("" ::: "memory"); /* not before */
            read();
        }
        fetch(r + BACK_STAGES * hop, stage);
#pragma unroll
        for (int k = 0; k < KEEP; k += N) {
            float d[N], p[N];
            row_unpack<T, N>(d_words[k / N], d),
                row_unpack<T, N>(A::LEAN ? gains[k / N * ROW] : w[A::LEAN ? 0 : k / N], p);
#pragma unroll
            for (int i = 0; i < N; i++) {
                q[k + i] = __fmul_rn(p[i], d[i]);
                z[k + i] = fmaf(z[k + i], s, shift);
                both[0] += q[k + i];
                both[1] = fmaf(q[k + i], z[k + i], both[1]);
                sums[k + i] = fmaf(d[i], z[k + i], sums[k + i]);
                sums[KEEP + k + i] += d[i];
            }
        }
        if constexpr (ROW == 32) warp_sums(both);
        else team_sums(both, space[stage] + team * (ROW / 32) * 2, ROW, team);
        float total = a.mean ? -s * (both[0] * part) : 0, dot = -s * (both[1] * part);
#pragma unroll
        for (int k = 0; k < KEEP; k += N) {
            float e[N];
#pragma unroll
            for (int i = 0; i < N; i++) e[i] = fmaf(z[k + i], dot, fmaf(q[k + i], s, total));
            more.after(e, k);
            row_store(to + k * ROW, row_pack<T, N>(e));
        }
        to += (int64_t)hop * COUNT;
    }
    if (!a.share) return;
    fetched(1);
    __syncthreads();
    store_columns<N, KEEP, 2>(sums, a.share + (int64_t)blockIdx.x * 2 * COUNT, COUNT, ROW, norm_space + A::TABLE / 16);
}

template <class T, int ROW, class A>
__global__ void __launch_bounds__(BACK_THREADS, 1) norm_bwd_whole_rows(const whole_grad<T> a)
{
    norm_bwd_whole_of<T, ROW, A>(a);
}
/* the same with registers left for add_shares_beside() */
template <class T, int ROW, class A>
__global__ void __maxnreg__(BACK_REGISTERS) norm_bwd_whole_beside(const whole_grad<T> a)
{
    norm_bwd_whole_of<T, ROW, A>(a);
}

/* Adds the blocks' shares up, [parts][2][n], 16 columns a block, each by 32 threads: in doubles, in an order of their
 * own. Blocks that are this small come in beside those of the kernel ahead. */
template <class T>
__global__ void __launch_bounds__(BESIDE, 65536 / (BESIDE * 32))
    add_shares_beside(int n, int parts, const float *share, T *dgamma, T *dbeta)
{
    let_next_in();
    previous_done();
    constexpr int COLUMNS = 16, LANES = COLUMNS / 4, DEEP = BESIDE / LANES, FLIGHT = 5;
    __shared__ double space[BESIDE / 32][COLUMNS];
    const int lane = threadIdx.x % LANES;
    const float4 *from = (const float4 *)(share + blockIdx.x * COLUMNS) + lane;
    double s[4] = {};
    for (int p = threadIdx.x / LANES; p < parts; p += FLIGHT * DEEP) {
        float4 v[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++)
            v[u] = p + u * DEEP < parts ? from[(p + u * DEEP) * (n / 2)] : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) s[0] += v[u].x, s[1] += v[u].y, s[2] += v[u].z, s[3] += v[u].w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int o = LANES; o < 32; o *= 2) s[i] += __shfl_xor_sync(0xffffffffu, s[i], o);
        if (threadIdx.x % 32 < LANES) space[threadIdx.x / 32][lane * 4 + i] = s[i];
    }
    __syncthreads();
    if (threadIdx.x >= COLUMNS) return;
    double total = 0;
#pragma unroll
    for (int w = 0; w < BESIDE / 32; w++) total += space[w][threadIdx.x];
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    T *out = column < n ? dgamma : dbeta;
    if (out) out[column % n] = from_compute<T>((float)total);
}

/* x itself */
template <class T> struct back_themselves {
    enum { TABLE = 0, LEAN = false, CAPPED = std::is_same_v<T, f16> /* bf16 takes no more by itself */ };
    template <int KEEP> struct state {
        template <class X> __device__ __forceinline__ void before(X x, float (&e)[KEEP], const void *)
        {
            unpack_kept<T, 8>(x, e);
        }
        __device__ __forceinline__ void after(float (&)[8], int) const {}
    };
};

/* are rows of n elements such? They are aligned and dense; their distance is free */
template <class T> bool back_whole_fits(int64_t rows, int64_t n)
{
    return sizeof(T) == 2 && (n == 32 * BACK_KEEP || n == 128 * BACK_KEEP) && rows <= 1 << 30;
}
template <int ROW, class A, class T>
int norm_bwd_whole(const char *op, whole_grad<T> a, const lac_view *dgamma, const lac_view *dbeta)
{
    constexpr int COUNT = ROW * BACK_KEEP;
    constexpr int STAGES = BACK_STAGES * 2 * BACK_KEEP * (int)sizeof(T) * BACK_THREADS;
    constexpr int SHARED = A::TABLE + STAGES + (A::LEAN ? COUNT * (int)sizeof(T) : 0);
    static_assert(STAGES >= 2 * BACK_KEEP * (int)sizeof(float) * BACK_THREADS, "room for the columns' sums");
    void (*kernel)(const whole_grad<T>);
    if constexpr (A::CAPPED) kernel = norm_bwd_whole_beside<T, ROW, A>;
    else kernel = norm_bwd_whole_rows<T, ROW, A>;
    static cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    LAC_TRY(lac_cuda_check(op, allowed));
    unsigned blocks = blocks_filling(a.rows, BACK_THREADS / ROW, 1);
    bool shares = dgamma->data || dbeta->data;
    lac_scratch share(op, shares ? (size_t)blocks * 2 * COUNT * sizeof(float) : 1);
    if (!share.data) return LAC_E_MEMORY;
    a.share = shares ? (float *)share.data : NULL;
    launch(kernel, blocks, BACK_THREADS, SHARED, a);
    LAC_TRY(lac_cuda_launched(op));
    if (!shares) return 0;
    launch(add_shares_beside<T>, 2 * COUNT / 16, BESIDE, 0, COUNT, (int)blocks, (const float *)a.share,
           (T *)dgamma->data, (T *)dbeta->data);
    return lac_cuda_launched(op);
}

#endif
