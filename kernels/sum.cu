/* sum.cu: sums and means of dense rows, columns and whole tensors of f32, f16 and bf16 on CUDA: the shapes that models
 * sum, at the speed of memory. Everything else is reduce.cu's.
 *
 * What it takes: loads of 16 bytes of which a thread has four or more on the way, types known when compiled, and few
 * partial results, because a tensor of 50 MB is read in 12 us and a second kernel costs two. Rows: a warp adds four
 * rows at a time. Columns: a lane has the columns of one vector, a block of 8 warps takes a run of rows, and a second
 * kernel adds the blocks' shares. All: the last block to finish adds the others' shares, in order. Loads say that
 * nothing is read again (ld.global.cs).
 *
 * On an H200, bf16 [32768, 768], 50 MB, of which a copy's rate would take 11.9 us: everything 14.8 us, the same without
 * the last block's sum 12.9; without the hint 15.1 and 13.4. Columns 15.1 us, without the hint 16.1, in blocks of 16
 * warps with four loads 15.5 and 16.6; the second kernel is 1.8 us of it. Rejected: numbers that are their own message
 * (blocks store them, others look until they are there): for everything no faster than the ticket, for columns, added
 * by all blocks, 12% to 18% slower than a second kernel, added by the last block 9% slower. Asking the second-level
 * cache for a kernel's first bytes before the kernel ahead is done, by lines or in bulk, with or without letting it in
 * early: 0% to 9% slower. Rings in shared memory, filled by cp.async or by bulk copies: no faster for everything, 6%
 * slower for columns; more bytes on the way than some 100 KB a multiprocessor are slower everywhere.
 *
 * Sums are in double, as in reduce.cu; up to eight numbers of a half type, whose sum fits a float but for rounding far
 * below the result's, are added in float first. No atomics but the ticket of the last block: same shape, same bits.
 */
#include "elem.cuh"
#include "sum.cuh"

enum { LANES = 32, TILE = 4, COLUMN_THREADS = 256, COLUMN_WARPS = COLUMN_THREADS / 32, SHARE_THREADS = 1024 };

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

/* ---- columns ---- */

/* shares[part][column]; blockIdx.x: 32 vectors of columns, blockIdx.y: part */
template <int DTYPE> __global__ void __launch_bounds__(COLUMN_THREADS, 2) sum_columns(sum_job j, double *shares)
{
    previous_done();
    constexpr int N = vector_of<DTYPE>, FLIGHT = 8;
    __shared__ double space[COLUMN_WARPS][N][LANES];
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    int64_t column = ((int64_t)blockIdx.x * LANES + lane) * N;
    int64_t begin = blockIdx.y * j.share, end = begin + j.share < j.count ? begin + j.share : j.count;
    bool inside = column < j.outputs;
    const char *x = j.x + column * (16 / N);
    double s[N] = {};
    /* the last rows like the others, with zeros past the end: alone, each would wait for memory once more */
    for (int64_t r = begin + warp; inside && r < end; r += FLIGHT * COLUMN_WARPS) {
        uint4 raw[FLIGHT];
        float v[FLIGHT][8];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++)
            raw[u] =
                r + u * COLUMN_WARPS < end ? __ldcs((const uint4 *)(x + (r + u * COLUMN_WARPS) * j.step)) : uint4{};
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
#pragma unroll
    for (int i = 0; i < N; i++) space[warp][i][lane] = s[i];
    __syncthreads();
    /* a thread adds one column up */
    int of = threadIdx.x / N, number = threadIdx.x % N;
    column += ((int64_t)of - lane) * N + number;
    if (of >= LANES || column >= j.outputs) return;
    double sum = 0;
#pragma unroll
    for (int w = 0; w < COLUMN_WARPS; w++) sum += space[w][number][of];
    shares[blockIdx.y * j.outputs + column] = sum;
}
static_assert(COLUMN_THREADS >= 8 * LANES, "a thread for every column");

/* 32 columns a block, 32 threads deep */
__global__ void __launch_bounds__(SHARE_THREADS) add_shares(sum_job j, const double *shares, int64_t parts)
{
    previous_done();
    __shared__ double space[SHARE_THREADS / LANES][LANES];
    int lane = threadIdx.x % LANES, deep = threadIdx.x / LANES;
    int64_t column = (int64_t)blockIdx.x * LANES + lane;
    constexpr int DEEP = SHARE_THREADS / LANES, FLIGHT = 4;
    double s = 0;
    for (int64_t p = deep; p < parts; p += FLIGHT * DEEP) {
        double v[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++)
            v[u] = p + u * DEEP < parts && column < j.outputs ? shares[(p + u * DEEP) * j.outputs + column] : 0;
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) s += v[u];
    }
    space[deep][lane] = s;
    __syncthreads();
    if (deep || column >= j.outputs) return;
#pragma unroll
    for (int w = 1; w < SHARE_THREADS / LANES; w++) s += space[w][lane];
    store_sum(j, column, s);
}

/* ---- everything ---- */

static __device__ unsigned finished; /* blocks of the call that runs; 0 between calls */

template <int DTYPE> __global__ void __launch_bounds__(THREADS) sum_all(sum_job j, double *shares)
{
    previous_done();
    __shared__ double space[THREADS / 32];
    __shared__ bool last;
    constexpr int N = vector_of<DTYPE>, FLIGHT = 4;
    int64_t vectors = j.count / N, step = (int64_t)gridDim.x * THREADS, i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const uint4 *x = (const uint4 *)j.x;
    double s = 0;
    for (; i < vectors; i += FLIGHT * step) { /* as above */
        uint4 raw[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) raw[u] = i + u * step < vectors ? __ldcs(x + i + u * step) : uint4{};
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) s += add_up<DTYPE>(raw[u]);
    }
    s = block_sum(s, space);
    if (threadIdx.x == 0) {
        unsigned before; /* a fence each way by the ticket itself: 2% less than two of __threadfence() */
        shares[blockIdx.x] = s;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&finished) : "memory");
        last = before == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    s = 0;
    for (int b = threadIdx.x; b < (int)gridDim.x; b += THREADS) s += shares[b];
    s = block_sum(s, space);
    if (threadIdx.x) return;
    finished = 0;
    store_sum(j, 0, s);
}

/* ---- launching ---- */

template <int DTYPE> static int sum_run(sum_job j)
{
    constexpr int N = vector_of<DTYPE>;
    if (j.outputs == 1) {
        unsigned blocks = blocks_filling(j.count / N, THREADS * 4, 8);
        lac_scratch shares("reduce", blocks * sizeof(double));
        if (!shares.data) return LAC_E_MEMORY;
        launch(sum_all<DTYPE>, blocks, THREADS, 0, j, (double *)shares.data);
        return lac_cuda_launched("reduce");
    }
    if (j.along_rows) {
        launch(sum_rows<DTYPE>, blocks_for(j.outputs, THREADS / LANES * TILE), THREADS, 0, j);
        return lac_cuda_launched("reduce");
    }
    int64_t groups = (j.outputs / N + LANES - 1) / LANES, parts = 2 * (int64_t)lac_cuda_processors / groups;
    int64_t most = (j.count + COLUMN_WARPS - 1) / COLUMN_WARPS;
    parts = parts < 1 ? 1 : parts > most ? most : parts;
    j.share = (j.count + parts - 1) / parts;
    lac_scratch shares("reduce", (size_t)(parts * j.outputs) * sizeof(double));
    if (!shares.data) return LAC_E_MEMORY;
    launch(sum_columns<DTYPE>, dim3((unsigned)groups, (unsigned)parts), COLUMN_THREADS, 0, j, (double *)shares.data);
    LAC_TRY(lac_cuda_launched("reduce"));
    launch(add_shares, blocks_for(j.outputs, LANES), SHARE_THREADS, 0, j, (const double *)shares.data, parts);
    return lac_cuda_launched("reduce");
}

bool lac_cuda_sum_fits(const sum_job *j)
{
    int64_t n = j->dtype == LAC_F32 ? 4 : 8, run = j->along_rows || j->outputs == 1 ? j->count : j->outputs;
    bool fits = j->dtype >= LAC_F32 && j->dtype <= LAC_BF16 && j->out_dtype >= LAC_F32 && j->out_dtype <= LAC_BF16;
    fits = fits && run % n == 0 && (uintptr_t)j->x % 16 == 0 && j->step % 16 == 0 && j->step >= 0;
    if (j->outputs == 1) return fits && j->count >= 1 << 14;
    if (j->along_rows) return fits && j->outputs >= 1024 && j->count >= 4 * n && j->count < INT32_MAX;
    return fits && j->outputs >= 64 && j->outputs <= 1 << 16 && j->count >= 256;
}

int lac_cuda_sum(const sum_job *j)
{
    if (j->dtype == LAC_F32) return sum_run<LAC_F32>(*j);
    return j->dtype == LAC_F16 ? sum_run<LAC_F16>(*j) : sum_run<LAC_BF16>(*j);
}
