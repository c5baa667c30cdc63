/* sum.cu: sums and means of dense rows, columns and whole tensors of f32, f16 and bf16 on CUDA: the shapes that models
 * sum, at the speed of memory. Everything else is reduce.cu's.
 *
 * What it takes: loads of 16 bytes of which a thread has four or more on the way, types known when compiled, and little
 * behind the last load, because a tensor of 50 MB is read in 12 us and a second kernel costs two. Rows: a warp adds
 * four rows at a time. Columns: a block has some columns of a run of rows; the last block of those columns adds the
 * others' shares, in order. All: the last block of all does. Loads say that nothing is read again (ld.global.cs).
 *
 * On an H200, bf16 [32768, 768], 50 MB, of which a copy's rate would take 11.9 us, medians of one run: columns by a
 * second kernel 15.4 us, with the next kernel let in early 15.4 to 15.8; the last block of 256 columns adds 88 shares
 * of them, 17.9, of 128 columns 44, 15.5, of 64 columns 22, 14.4 (13.3 without that), of 32 columns 11, 16.5.
 * Everything 14.3, without the last block's sum 12.6; without the hint 0.3 to 1 us more each.
 *
 * Memory rests while a sum ends and the next begins. So the next kernel is let in when a block's last loads are on
 * their way, and its blocks ask the second-level cache for what they read first, a line an instruction, before they
 * wait: two vectors a thread for everything, four for columns. In turns with neither: everything 14.41 to 13.30 us,
 * columns 14.28 to 13.38. Twice as much 13.54 and 13.79, four times 14.42 and 14.35; let in without asking 14.12
 * and 14.63, from the start on and asked for four 14.31 and 13.55. Blocks that come early go where there is room first:
 * of everything, of which a multiprocessor could have four blocks, most came to those that were done first, and it
 * took 18.1 us until its blocks took so much shared memory that there is room for two.
 *
 * Rejected: clusters. Of 2 to 8 blocks that add up in each other's shared memory before they leave a share:
 * columns 15.2 to 22, everything 17.1 to 22.6; of 8 or 16 blocks that have all rows of a strip of columns, so that
 * nothing is left: 20.6 to 28. Numbers that are their own message (blocks store them, others look until they are
 * there): for everything 2% slower than the ticket, for columns 2% to 3% faster, but they need memory of their own;
 * a ticket that is no fence, with such numbers: 0.5% to 2% slower. Small blocks that come and go, 1,024 to
 * 4,096, for everything: 12% to 48% slower, for the tickets take turns. Rings in shared memory, filled by cp.async or
 * by bulk copies: no faster for everything, 6% slower for columns; more bytes on the way than some 100 KB a
 * multiprocessor are slower everywhere. Loads that fetch 256 bytes into the second-level cache: 4% slower.
 *
 * Sums are in double, as in reduce.cu; up to eight numbers of a half type, whose sum fits a float but for rounding far
 * below the result's, are added in float first. No atomics but the ticket of the last block: same shape, same bits.
 */
#include "elem.cuh"
#include "sum.cuh"

enum { LANES = 32, TILE = 4, COLUMN_THREADS = 256, ALL_THREADS = 512 };

template <int DTYPE> inline constexpr int vector_of = DTYPE == LAC_F32 ? 4 : 8;

static __device__ __forceinline__ void store_sum(const sum_job &j, int64_t at, double s)
{
    if (j.mean) s /= (double)j.count;
    store_element<float>(j.out_dtype, (char *)j.out + at * j.out_bytes, (float)s);
}

/* the sum of a vector's elements */
template <int DTYPE> static __device__ __forceinline__ double add_up(const uint4 &raw)
{
    float v[8];
    unpack(DTYPE, raw, v);
    if (DTYPE == LAC_F32) return ((double)v[0] + (double)v[1]) + ((double)v[2] + (double)v[3]);
    return (double)(((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])));
}

/* ---- rows ---- */

template <int DTYPE> __global__ void __launch_bounds__(THREADS) sum_rows(sum_job j)
{
    previous_done();
    int lane = threadIdx.x % LANES;
    int64_t first = ((int64_t)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES) * TILE;
    int vectors = (int)(j.count / vector_of<DTYPE>);
    const uint4 *x[TILE];
    double s[TILE] = {};
    if (first >= j.outputs) return;
#pragma unroll
    for (int t = 0; t < TILE; t++) { /* rows past the end are the last once more */
        int64_t r = first + t < j.outputs ? first + t : j.outputs - 1;
        x[t] = (const uint4 *)(j.x + r * j.step);
    }
#pragma unroll 2
    for (int i = lane; i < vectors; i += LANES) {
        uint4 raw[TILE];
#pragma unroll
        for (int t = 0; t < TILE; t++) raw[t] = x[t][i];
#pragma unroll
        for (int t = 0; t < TILE; t++) s[t] += add_up<DTYPE>(raw[t]);
    }
#pragma unroll
    for (int t = 0; t < TILE; t++) s[t] = warp_sum(s[t]);
#pragma unroll
    for (int t = 0; t < TILE; t++)
        if (lane == t && first + t < j.outputs) store_sum(j, first + t, s[t]);
}

/* ---- the last block ---- */

enum { MOST_GROUPS = 1024, MOST_COLUMNS = 1 << 16 };
static_assert(MOST_COLUMNS / (4 * 32) <= MOST_GROUPS, "a ticket for every group of columns");
/* blocks of the call that runs which have left their share, of each group; 0 between calls, which one stream has */
static __device__ unsigned finished[MOST_GROUPS];

/* Is this block the last of `blocks` of its group? One thread asks; its own writes before, and those that a barrier has
 * put before, are seen by the last, and those of the others are seen after. A fence each way by the ticket itself: 2%
 * less than two of __threadfence(). */
static __device__ __forceinline__ bool last_of(unsigned group, unsigned blocks)
{
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&finished[group]) : "memory");
    bool last = before == blocks - 1;
    if (last) finished[group] = 0;
    return last;
}

/* ---- columns ---- */

/* shares[part][column]; blockIdx.x: ROW vectors of columns, of which a warp reads 32 / ROW rows at a time, blockIdx.y:
 * part */
template <int DTYPE, int ROW>
__global__ void __launch_bounds__(COLUMN_THREADS, 2) sum_columns(sum_job j, double *shares)
{
    constexpr int N = vector_of<DTYPE>, FLIGHT = 8, ROWS = COLUMN_THREADS / ROW, COLUMNS = ROW * N;
    constexpr int WARPS = COLUMN_THREADS / LANES, DEEP = COLUMN_THREADS / COLUMNS, KEEP = N * ROW / LANES;
    __shared__ double sums[WARPS][COLUMNS];
    __shared__ bool last;
    int lane = threadIdx.x % ROW;
    int64_t column = ((int64_t)blockIdx.x * ROW + lane) * N;
    int64_t begin = blockIdx.y * j.share, end = begin + j.share < j.count ? begin + j.share : j.count;
    bool inside = column < j.outputs;
    const char *x = j.x + column * (16 / N);
    constexpr int AHEAD = 4; /* rows of a thread that are asked for before the kernel ahead is done */
    if (threadIdx.x < AHEAD * ROWS * (ROW / 8)) {
        int64_t r = begin + threadIdx.x / (ROW / 8),
                c = (int64_t)blockIdx.x * COLUMNS + threadIdx.x % (ROW / 8) * (8 * N);
        if (r < end && c < j.outputs) ask_ahead(j.x + r * j.step + c * (16 / N));
    }
    previous_done();
    double s[N] = {};
    /* the last rows like the others, with zeros past the end: alone, each would wait for memory once more */
    for (int64_t r = begin + threadIdx.x / ROW; inside && r < end; r += FLIGHT * ROWS) {
        uint4 raw[FLIGHT];
        float v[FLIGHT][8];
        if (r + FLIGHT * ROWS >= end) let_next_in();
#pragma unroll
        for (int u = 0; u < FLIGHT; u++)
            raw[u] = r + u * ROWS < end ? __ldcs((const uint4 *)(x + (r + u * ROWS) * j.step)) : uint4{};
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) unpack(DTYPE, raw[u], v[u]);
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int u = 0; u < FLIGHT; u += 4) {
                const float a = v[u][i], b = v[u + 1][i], c = v[u + 2][i], d = v[u + 3][i];
                if (DTYPE == LAC_F32) s[i] += ((double)a + (double)b) + ((double)c + (double)d);
                else s[i] += (double)((a + b) + (c + d));
            }
    }
    /* lanes of the same columns share their columns out: each step leaves half of them, of twice as many rows */
    int number = lane * N;
#pragma unroll
    for (int o = 16, keep = N / 2; o >= ROW; o >>= 1, keep >>= 1) {
        const bool upper = threadIdx.x & o;
        number += upper ? keep : 0;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            if (i >= keep) break;
            double other = __shfl_xor_sync(0xffffffffu, upper ? s[i] : s[i + keep], o);
            s[i] = (upper ? s[i + keep] : s[i]) + other;
        }
    }
#pragma unroll
    for (int i = 0; i < KEEP; i++) sums[threadIdx.x / LANES][number + i] = s[i];
    __syncthreads();
    /* a thread has a column, and of one run of the parts */
    const int run = threadIdx.x / COLUMNS;
    number = threadIdx.x % COLUMNS;
    column = (int64_t)blockIdx.x * COLUMNS + number;
    inside = column < j.outputs;
    auto total = [&](int rows) {
        double t = 0;
#pragma unroll
        for (int w = 0; w < rows; w++) t += sums[w][number];
        return t;
    };
    if (run == 0 && inside) shares[blockIdx.y * j.outputs + column] = total(WARPS);
    __syncthreads();
    if (threadIdx.x == 0) last = last_of(blockIdx.x, gridDim.y);
    __syncthreads();
    if (!last) return;
    double sum = 0;
    for (int p = run; p < (int)gridDim.y && inside; p += FLIGHT * DEEP) {
        double v[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++)
            v[u] = p + u * DEEP < (int)gridDim.y ? __ldcg(shares + (p + u * DEEP) * j.outputs + column) : 0;
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) sum += v[u];
    }
    sums[run][number] = sum;
    __syncthreads();
    if (run == 0 && inside) store_sum(j, column, total(DEEP));
}

/* ---- everything ---- */

template <int DTYPE> __global__ void __launch_bounds__(ALL_THREADS) sum_all(sum_job j, double *shares)
{
    __shared__ double space[ALL_THREADS / LANES];
    constexpr int N = vector_of<DTYPE>, FLIGHT = 4, AHEAD = 2, LINES = ALL_THREADS / 8;
    int64_t vectors = j.count / N, step = (int64_t)gridDim.x * ALL_THREADS,
            i = (int64_t)blockIdx.x * ALL_THREADS + threadIdx.x;
    const uint4 *x = (const uint4 *)j.x;
    if (threadIdx.x < AHEAD * LINES) {
        int64_t line = i - threadIdx.x + threadIdx.x / LINES * step + threadIdx.x % LINES * 8;
        if (line < vectors) ask_ahead(x + line);
    }
    previous_done();
    double s = 0;
    for (; i < vectors; i += FLIGHT * step) { /* as above */
        uint4 raw[FLIGHT];
        if (i + FLIGHT * step >= vectors) let_next_in();
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) raw[u] = i + u * step < vectors ? __ldcs(x + i + u * step) : uint4{};
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) s += add_up<DTYPE>(raw[u]);
    }
    s = warp_sum(s);
    if (threadIdx.x % LANES == 0) space[threadIdx.x / LANES] = s;
    __syncthreads();
    if (threadIdx.x >= LANES) return;
    /* one warp, which needs no barriers */
    s = warp_sum(threadIdx.x < ALL_THREADS / LANES ? space[threadIdx.x] : 0);
    bool last = false;
    if (threadIdx.x == 0) {
        shares[blockIdx.x] = s;
        last = last_of(0, gridDim.x);
    }
    if (!__shfl_sync(0xffffffffu, (int)last, 0)) return;
    s = 0;
#pragma unroll 8
    for (int b = threadIdx.x; b < (int)gridDim.x; b += LANES) s += __ldcg(shares + b);
    s = warp_sum(s);
    if (threadIdx.x == 0) store_sum(j, 0, s);
}

/* ---- launching ---- */

template <int DTYPE, int ROW> static int columns_run(sum_job j)
{
    int64_t groups = (j.outputs / vector_of<DTYPE> + ROW - 1) / ROW, parts = 2 * (int64_t)lac_cuda_processors / groups;
    int64_t most = (j.count + COLUMN_THREADS / ROW - 1) / (COLUMN_THREADS / ROW);
    parts = parts < 1 ? 1 : parts > most ? most : parts;
    j.share = (j.count + parts - 1) / parts;
    lac_scratch shares("reduce", (size_t)(parts * j.outputs) * sizeof(double));
    if (!shares.data) return LAC_E_MEMORY;
    dim3 grid((unsigned)groups, (unsigned)parts);
    launch(sum_columns<DTYPE, ROW>, grid, COLUMN_THREADS, 0, j, (double *)shares.data);
    return lac_cuda_launched("reduce");
}

template <int DTYPE> static int sum_run(sum_job j)
{
    constexpr int N = vector_of<DTYPE>;
    if (j.outputs == 1) {
        /* all threads that a multiprocessor can have for long sums, half of them, whose shares are few, for short ones:
         * these take a third of its shared memory, so that it has two blocks and not more, where the next sum's come
         * early: those that ended first would get all of them */
        bool large = j.count / N > (int64_t)lac_cuda_processors * ALL_THREADS * 64;
        unsigned blocks = blocks_filling(j.count / N, ALL_THREADS * 4, large ? 4 : 2);
        static int third = 0;
        static cudaError_t allowed = [] {
            cudaError_t e = cudaDeviceGetAttribute(&third, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0);
            third /= 3;
            return e ? e : cudaFuncSetAttribute(sum_all<DTYPE>, cudaFuncAttributeMaxDynamicSharedMemorySize, third);
        }();
        LAC_TRY(lac_cuda_check("reduce", allowed));
        lac_scratch shares("reduce", blocks * sizeof(double));
        if (!shares.data) return LAC_E_MEMORY;
        launch(sum_all<DTYPE>, blocks, ALL_THREADS, large ? 0 : third, j, (double *)shares.data);
        return lac_cuda_launched("reduce");
    }
    if (j.along_rows) {
        launch(sum_rows<DTYPE>, blocks_for(j.outputs, THREADS / LANES * TILE), THREADS, 0, j);
        return lac_cuda_launched("reduce");
    }
    /* few parts of many groups: the last block of a group has little to add, as long as the groups divide the device */
    if (j.outputs / N <= 24 * 8) return columns_run<DTYPE, 8>(j);
    return j.outputs / N <= 24 * 16 ? columns_run<DTYPE, 16>(j) : columns_run<DTYPE, 32>(j);
}

bool lac_cuda_sum_fits(const sum_job *j)
{
    int64_t n = j->dtype == LAC_F32 ? 4 : 8, run = j->along_rows || j->outputs == 1 ? j->count : j->outputs;
    bool fits = j->dtype >= LAC_F32 && j->dtype <= LAC_BF16 && j->out_dtype >= LAC_F32 && j->out_dtype <= LAC_BF16;
    fits = fits && run % n == 0 && (uintptr_t)j->x % 16 == 0 && j->step % 16 == 0 && j->step >= 0;
    if (j->outputs == 1) return fits && j->count >= 1 << 14;
    if (j->along_rows) return fits && j->outputs >= 1024 && j->count >= 4 * n && j->count < INT32_MAX;
    return fits && j->outputs >= 64 && j->outputs <= MOST_COLUMNS && j->count >= 256;
}

int lac_cuda_sum(const sum_job *j)
{
    if (j->dtype == LAC_F32) return sum_run<LAC_F32>(*j);
    return j->dtype == LAC_F16 ? sum_run<LAC_F16>(*j) : sum_run<LAC_BF16>(*j);
}
