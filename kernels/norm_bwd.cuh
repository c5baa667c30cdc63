/* norm_bwd.cuh: the backward of a layer norm over rows that fit a block, and of what is fused with it (norm.cu,
 * residual.cu, gelu_norm.cu).
 *
 * dx = s (q - mean(q) - z mean(q z)) with q = g gamma and z = (x - m) s: two sums along a row, and two along a column,
 * those of dgamma and dbeta. A thread has the same 8, 16 or 24 columns of every row that its team takes, so that the
 * columns' sums stay in registers; the blocks' shares are added in order by a second kernel (norm.cuh). No atomics.
 *
 * Registers could not also hold what hides the latency of memory. So rows come by cp.async, a step ahead; each thread
 * fetches what it will read itself, which takes no barrier. A step is two rows where registers allow it, whose four
 * sums are added up across lanes in six exchanges instead of twenty, and one else. One block fills a multiprocessor:
 * the fewer blocks, the fewer shares there are to add, which nothing hides. Rejected: threads with 24 elements of a
 * row, whose columns' sums lay in shared memory and were read, added to and written there for every row: 68% of a
 * copy's bandwidth at 32768 x 768 in bf16. Two blocks a multiprocessor: 3% to 5% slower. Two steps ahead: no faster.
 * Blocks of 576 threads with 16 elements: ptxas gives them 96 registers, which spill, 1.4 times the time. Rows by bulk
 * copies, two to six ahead: 0% to 7% slower. Statistics of 32 rows at a time, one a lane: 0% to 4% slower.
 *
 * The second-level cache is asked for the first rows before the kernel ahead is done, as long as the kernel that
 * adds the shares lets the next one in while it waits: 45.1 to 43.7 us for 32768 x 768 in bf16; half as many blocks for
 * the shares, which would leave the next one more room: 44.1.
 *
 * Rows of f32, and of f16 behind gelu in models' usual widths, are dealt out to the teams in turn, so that
 * what is on its way lies close together in memory: 3% to 4% faster. Where gelu is looked up too a team takes a run of
 * rows (dealt out, 3072 columns: the same time), and so it does where a step is two rows.
 *
 * What is fused is a policy P: where a row's streams are (x, g and more), what becomes of x before the norm, and of dx
 * behind it; whether dx is summed over rows and the norm's result made once more (COLUMNS = 3); and whether rows of 768
 * and 3,072 of half types have kernels of their own (OWN, norm_bwd_whole.cuh), whose dx has the same bits. Which
 * products and sums are one instruction is written out, so that dx has the same bits whatever P is.
 */
#ifndef LAC_CUDA_NORM_BWD_CUH
#define LAC_CUDA_NORM_BWD_CUH
#include "norm.cuh"

enum { BACK_STAGES = 2, BACK_MOST = 768, BACK_TEAM = 512 /* threads of a row at most */, BACK_WIDE = 384 };

template <class T> struct norm_grad {
    int64_t rows, n;
    const T *gamma;           /* dense, or NULL */
    const float *mean, *rstd; /* mean NULL: rmsnorm, whose mean is 0 */
    float *share;             /* [block][P::COLUMNS][n], or NULL */
};

/* threads of a block: all that a multiprocessor holds, with 80 registers each, 128 or 168 */
template <int KEEP, int ROWS, int COLUMNS>
inline constexpr int back_most = KEEP > 16 || (KEEP > 8 && COLUMNS + ROWS > 3) ? (int)BACK_WIDE
                                 : KEEP > 8 || COLUMNS > 2                     ? (int)BACK_TEAM
                                                                               : (int)BACK_MOST;

/* sums of COUNT numbers, 1, 2 or 4, over a row's threads; lanes share the numbers as they add. `space`: COUNT x warps
 * of this row, not read again after the team's next barrier */
template <int COUNT>
static __device__ __forceinline__ void team_sums(float (&v)[COUNT], float *space, int threads, int team)
{
    const unsigned all = 0xffffffffu;
    int lane = threadIdx.x % 32, warp = (threadIdx.x - team * threads) / 32, warps = threads / 32;
    bool high = lane & 16, odd = lane & 8;
    float x;
    if constexpr (COUNT == 4) {
        float a = (high ? v[2] : v[0]) + __shfl_xor_sync(all, high ? v[0] : v[2], 16);
        float b = (high ? v[3] : v[1]) + __shfl_xor_sync(all, high ? v[1] : v[3], 16);
        x = (odd ? b : a) + __shfl_xor_sync(all, odd ? a : b, 8);
    } else {
        if constexpr (COUNT == 2) x = (high ? v[1] : v[0]) + __shfl_xor_sync(all, high ? v[0] : v[1], 16);
        else x = v[0] + __shfl_xor_sync(all, v[0], 16);
        x += __shfl_xor_sync(all, x, 8);
    }
#pragma unroll
    for (int o = 4; o; o >>= 1) x += __shfl_xor_sync(all, x, o);
    if (COUNT == 1 && warps == 1) {
        v[0] = x;
        return;
    }
    if (lane % (32 / COUNT) == 0) space[warp * COUNT + lane / (32 / COUNT)] = x;
    if (warps == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(threads) : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = space[i];
    for (int w = 1; w < warps; w++)
#pragma unroll
        for (int i = 0; i < COUNT; i++) v[i] += space[w * COUNT + i];
}

/* x(k): N elements from number k on, of KEEP */
template <class T, int N, int KEEP, class X> static __device__ __forceinline__ void unpack_kept(X x, float (&e)[KEEP])
{
#pragma unroll
    for (int k = 0; k < KEEP; k += N) {
        float v[N];
        row_unpack<T, N>(x(k), v);
#pragma unroll
        for (int i = 0; i < N; i++) e[k + i] = v[i];
    }
}

static __device__ __forceinline__ void fetch16(uint32_t to, const void *from, bool valid)
{
    int bytes = valid ? 16 : 0; /* the rest is filled with zeros */
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
/* waits until all but the last `stages` - 1 steps that this thread asked for are there */
static __device__ __forceinline__ void fetched(int stages)
{
    if (stages == 2) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 0;" ::: "memory");
}

/* the sums of the columns of a block's teams, KEEP of dgamma and then of dbeta (and of dx) for each thread, to
 * share[COLUMNS][n] */
template <int N, int KEEP, int COLUMNS>
static __device__ __forceinline__ void store_columns(const float (&sums)[COLUMNS * KEEP], float *share, int n,
                                                     int threads, float4 *space)
{
    int team = threadIdx.x / threads, lane = threadIdx.x % threads, teams = blockDim.x / threads;
#pragma unroll
    for (int i = 0; i < COLUMNS * KEEP / 4; i++)
        space[i * blockDim.x + threadIdx.x] =
            make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    __syncthreads();
    for (int i = team; i < COLUMNS * KEEP / 4; i += teams) {
        int k = i % (KEEP / 4) * 4, first = (k / N * threads + lane) * N + k % N;
        if (first >= n) continue;
        float4 sum = space[i * blockDim.x + lane];
        for (int t = 1; t < teams; t++) {
            float4 a = space[i * blockDim.x + t * threads + lane];
            sum.x += a.x, sum.y += a.y, sum.z += a.z, sum.w += a.w;
        }
        store_words(share + i / (KEEP / 4) * n + first, __float_as_uint(sum.x), __float_as_uint(sum.y),
                    __float_as_uint(sum.z), __float_as_uint(sum.w));
    }
}

/* A team of `threads` takes a run of rows, ROWS in a step; the teams of a block are neighbours. TEAM: threads, of rows
 * with KEEP elements for each, so that nothing is asked of a place; or 0, of any rows. */
template <class T, int KEEP, int ROWS, int TEAM, class P>
__global__ void __launch_bounds__(back_most<KEEP, ROWS, P::COLUMNS>, 1)
    norm_bwd_rows(norm_grad<T> a, int any_threads, int stages, P p)
{
    const int threads = TEAM > 0 ? TEAM : any_threads;
    let_next_in();
    constexpr int N = 16 / sizeof(T), STREAMS = P::STREAMS, COLUMNS = P::COLUMNS;
    constexpr bool WIDE = COLUMNS > 2;
    typedef row_access<T, N> vector;
    extern __shared__ float4 norm_space[];
    __shared__ float space[2][BACK_MOST / 32 * 2 * ROWS];
    int n = (int)a.n, team = threadIdx.x / threads, lane = threadIdx.x % threads, teams = blockDim.x / threads;
    int64_t runs = (int64_t)gridDim.x * teams, run = (int64_t)blockIdx.x * teams + team;
    /* a team's rows lie `runs` apart, so that what is on its way lies close together, or make a run */
    constexpr bool APART = sizeof(T) == 4 || (TEAM > 0 && STREAMS == 2 && P::TABLE == 0);
    static_assert(!APART || ROWS == 1, "a step of rows that are neighbours");
    int64_t begin = APART ? run : a.rows * run / runs, next = APART ? runs : 1;
    int count = (int)(APART ? (a.rows - run + runs - 1) / runs : a.rows * (run + 1) / runs - begin);
    float part = 1.0f / (float)n, *team_space = space[0] + team * (threads / 32) * 2 * ROWS;
    const T *from[STREAMS];
    bool inside[KEEP / N];
#pragma unroll
    for (int stream = 0; stream < STREAMS; stream++) from[stream] = p.row(stream, begin) + lane * N;
#pragma unroll
    for (int k = 0; k < KEEP; k += N) inside[k / N] = TEAM > 0 || (k / N * threads + lane) * N < n;
    vector *mine = (vector *)norm_space + P::TABLE / 16 + threadIdx.x;
    uint32_t mine_at = (uint32_t)__cvta_generic_to_shared(mine);
    asm volatile("" : "+r"(mine_at)); /* not to be computed again for every step */
    auto place = [&](int stage, int u, int stream, int k) {
        return (((stage * ROWS + u) * STREAMS + stream) * (KEEP / N) + k / N) * (int)blockDim.x;
    };
    auto slot = [&](int stage, int u, int stream, int k) { return mine + place(stage, u, stream, k); };
    /* rows r ..; those before were fetched */
    auto fetch = [&](int r, int stage) {
#pragma unroll
        for (int u = 0; u < ROWS; u++)
#pragma unroll
            for (int stream = 0; stream < STREAMS; stream++) {
#pragma unroll
                for (int k = 0; k < KEEP; k += N)
                    fetch16(mine_at + place(stage, u, stream, k) * 16, from[stream] + k * threads,
                            r + u < count && inside[k / N] && (stream < 2 || p.row(stream, 0)));
                from[stream] += next * p.step(stream);
            }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    /* of half types a step ahead, where f32 is 4 to 6% slower so; past the end those of the last row: what they are
     * multiplied with is 0 */
    constexpr bool AHEAD = sizeof(T) == 2;
    const float *mean = (a.mean ? a.mean : a.rstd) + begin, *rstd = a.rstd + begin;
    float m[ROWS], s[ROWS], m_next[ROWS], s_next[ROWS];
    auto statistics = [&](int r) {
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
            int64_t at = (r + u < count ? r + u : count - 1) * next;
            m_next[u] = mean[at], s_next[u] = rstd[at];
        }
    };
    /* before the kernel ahead is done: the first rows and what goes with them */
    if (lane < stages * ROWS && lane < count)
#pragma unroll
        for (int stream = 0; stream < STREAMS; stream++)
            if (stream < 2 || p.row(stream, 0))
                ask_ahead(p.row(stream, begin) + lane * next * p.step(stream), n * (int)sizeof(T));
    if (lane < count && (next > 1 || lane == 0 || lane == count - 1)) {
        if (a.mean) ask_ahead(a.mean + begin + lane * next);
        ask_ahead(a.rstd + begin + lane * next);
    }
    if (threadIdx.x == 0 && a.gamma) ask_ahead(a.gamma, n * (int)sizeof(T));
    if constexpr (P::TABLE > 0) p.fill(norm_space);
    previous_done();
    for (int stage = 0; stage < stages; stage++) fetch(stage * ROWS, stage);
    if (count > 0) statistics(0);
    float w[KEEP], b[WIDE ? KEEP : 1], sums[COLUMNS * KEEP] = {};
#pragma unroll
    for (int k = 0; k < KEEP; k += N) {
        float v[N] = {};
        if (inside[k / N] && a.gamma) load_run<N>(a.gamma, k * threads + lane * N, 1, v);
#pragma unroll
        for (int i = 0; i < N; i++) w[k + i] = a.gamma ? v[i] : 1;
        if constexpr (WIDE) {
            float v[N] = {};
            if (inside[k / N] && p.beta) load_run<N>(p.beta, k * threads + lane * N, 1, v);
#pragma unroll
            for (int i = 0; i < N; i++) b[k + i] = v[i];
        }
    }
    if constexpr (P::TABLE > 0) __syncthreads();
    T *to = p.dx + begin * n + lane * N;
    int stage = 0, turn = 0;
    for (int r = 0; r < count; r += ROWS, turn ^= 1) {
        typename P::template state<N, KEEP, ROWS> more;
        float z[ROWS][KEEP], both[2 * ROWS];
#pragma unroll
        for (int u = 0; u < ROWS; u++) m[u] = a.mean ? m_next[u] : 0, s[u] = s_next[u];
        if (AHEAD) statistics(r + ROWS);
        fetched(stages);
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
            float total = 0, dot = 0, shift = -(m[u] * s[u]); /* its rounding is no more than that of m */
            more.before([&](int k) { return *slot(stage, u, 0, k); }, z[u], u, norm_space);
#pragma unroll
            for (int k = 0; k < KEEP; k += N) {
                float e[N], d[N];
                row_unpack<T, N>(*slot(stage, u, 1, k), d);
#pragma unroll
                for (int i = 0; i < N; i++) e[i] = z[u][k + i];
#pragma unroll
                for (int i = 0; i < N; i++) {
                    float q = __fmul_rn(w[k + i], d[i]);
                    e[i] = sizeof(T) == 2 ? fmaf(e[i], s[u], shift) : __fmul_rn(e[i] - m[u], s[u]);
                    total += q;
                    dot = fmaf(q, e[i], dot);
                    sums[k + i] = fmaf(d[i], e[i], sums[k + i]);
                    sums[KEEP + k + i] += d[i];
                    z[u][k + i] = e[i];
                }
            }
            both[2 * u] = total, both[2 * u + 1] = dot;
        }
        team_sums(both, team_space + turn * (BACK_MOST / 32 * 2 * ROWS), threads, team);
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
            float total = a.mean ? -s[u] * (both[2 * u] * part) : 0, dot = -s[u] * (both[2 * u + 1] * part);
#pragma unroll
            for (int k = 0; k < KEEP; k += N) {
                float e[N];
                if ((ROWS > 1 && r + u >= count) || !inside[k / N]) break;
                row_unpack<T, N>(*slot(stage, u, 1, k), e);
#pragma unroll
                for (int i = 0; i < N; i++) e[i] = fmaf(z[u][k + i], dot, fmaf(__fmul_rn(w[k + i], e[i]), s[u], total));
                more.after(p, to + k * threads, u, k, e, slot(stage, u, STREAMS - 1, k));
                if constexpr (WIDE) {
                    float y[N];
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        sums[2 * KEEP + k + i] += e[i];
                        y[i] = fmaf(z[u][k + i], w[k + i], b[k + i]);
                    }
                    p.again(to + k * threads, y);
                }
            }
            to += next * n;
        }
        fetch(r + stages * ROWS, stage);
        if (!AHEAD) statistics(r + ROWS);
        stage = stages - 1 - stage; /* of one or two */
    }
    if (!a.share) return;
    fetched(1);
    __syncthreads();
    store_columns<N, KEEP, COLUMNS>(sums, a.share + (int64_t)blockIdx.x * COLUMNS * n, n, threads,
                                    norm_space + P::TABLE / 16);
}

/* adds the blocks' shares up, [block][columns][n]: of dgamma, dbeta and the sums of dx */
template <class T>
int add_shares(const char *op, int64_t n, int columns, unsigned blocks, const float *share, const lac_view *dgamma,
               const lac_view *dbeta, const lac_view *dx_sums)
{
    launch(layernorm_combine<T>, dim3(blocks_for(n, 32), (unsigned)columns), COMBINE, 0, n, (int64_t)blocks, share,
           (T *)dgamma->data, (T *)dbeta->data, dx_sums ? (T *)dx_sums->data : NULL);
    return lac_cuda_launched(op);
}
/* launches it and adds the shares of dgamma, dbeta and of the sums of dx up; `a` lacks only where those are */
template <int KEEP, int ROWS, int TEAM, class T, class P>
int norm_bwd_kept(const char *op, norm_grad<T> a, const P &p, const lac_view *dgamma, const lac_view *dbeta,
                  const lac_view *dx_sums)
{
    constexpr int COLUMNS = P::COLUMNS;
    constexpr int STEP = ROWS * P::STREAMS * KEEP * (int)sizeof(T);
    auto kernel = norm_bwd_rows<T, KEEP, ROWS, TEAM, P>;
    static int shared_most = 0;
    static cudaError_t allowed = [&] {
        cudaError_t e = cudaDeviceGetAttribute(&shared_most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
        shared_most -= (1 << 10) + P::TABLE; /* what the kernel has besides */
        return e ? e
                 : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_most + P::TABLE);
    }();
    LAC_TRY(lac_cuda_check(op, allowed));
    int threads = (int)((a.n + 32 * KEEP - 1) / (32 * KEEP)) * 32, stages = BACK_STAGES;
    unsigned block = (unsigned)(threads * (back_most<KEEP, ROWS, COLUMNS> / threads));
    while (stages > 1 && (int)block * STEP * stages > shared_most) stages--;
    while ((int)block > threads && (int)block * STEP > shared_most) block -= (unsigned)threads;
    size_t shared = (size_t)block * STEP * stages, columns = block * KEEP * COLUMNS * sizeof(float);
    unsigned blocks = blocks_filling(a.rows, block / threads, 1);
    bool shares = dgamma->data || dbeta->data || (dx_sums && dx_sums->data);
    lac_scratch share(op, shares ? (size_t)(blocks * COLUMNS * a.n) * sizeof(float) : 1);
    if (!share.data) return LAC_E_MEMORY;
    a.share = shares ? (float *)share.data : NULL;
    launch(kernel, blocks, block, P::TABLE + (shared > columns ? shared : columns), a, threads, stages, p);
    LAC_TRY(lac_cuda_launched(op));
    return shares ? add_shares<T>(op, a.n, COLUMNS, blocks, a.share, dgamma, dbeta, dx_sums) : 0;
}
/* rows of at most ROW_KEPT elements, of half types by instances for models' usual widths (TEAM; f32 of 768 columns went
 * from 91 to 90% of a copy's rate). Few threads with many elements in flight are better than many: each has its share
 * of what is done once a row. */
template <class T, class P>
int norm_bwd_run(const char *op, const norm_grad<T> &a, const P &p, const lac_view *dgamma, const lac_view *dbeta,
                 const lac_view *dx_sums = NULL)
{
    auto run = [&](auto keep, auto rows, auto team) {
        return norm_bwd_kept<decltype(keep)::value, decltype(rows)::value, decltype(team)::value>(op, a, p, dgamma,
                                                                                                  dbeta, dx_sums);
    };
    std::integral_constant<int, 0> any;
    std::integral_constant<int, 1> one;
    std::integral_constant<int, 2> two;
    std::integral_constant<int, 8> keep8;
    std::integral_constant<int, 16> keep16;
    if constexpr (sizeof(T) == 4) {
        /* a block of one team would stand still while that adds up */
        return a.n <= 8 * BACK_WIDE ? run(keep8, one, any) : run(keep16, one, any);
    } else {
        /* 16 elements a thread where that leaves no more of them idle than 8 do */
        bool fits = (a.n + 511) / 512 * 512 == (a.n + 255) / 256 * 256;
        if constexpr (P::COLUMNS == 2) {
            std::integral_constant<int, 24> keep24;
            if constexpr (!P::OWN) {
                if (a.n == 768) return run(keep24, one, std::integral_constant<int, 32>());
                if (a.n == 3072) return run(keep24, one, std::integral_constant<int, 128>());
            }
            if (a.n > 512 && a.n <= 768) return run(keep24, one, any);
            if (fits && a.n <= 8 * BACK_WIDE) return run(keep16, two, any);
        } else if (a.n == 3072) {
            return run(keep16, one, std::integral_constant<int, 192>());
        }
        return a.n <= 8 * BACK_TEAM && !fits ? run(keep8, two, any) : run(keep16, one, any);
    }
}

#endif
