/* attn_hopper_block_keys.cu: the backward of attention on Hopper where a mask has active blocks: which blocks of rows a
 * tile of keys meets, scales of the sums of dq, and instances of the tiles.
 *
 * Tiles have 128 keys, all of one block of the mask, so that every warpgroup has work in every step, and only blocks of
 * rows with an active block are walked over: a bit each, from a kernel before the list.
 *
 * Sums of dq are whole numbers of 32 bits, so that they are the same in any order and no tile waits for another one.
 * (With turns, as dense tiles have them, tiles wait at every block of rows that an earlier one has still to reach, and
 * random patterns make chains of such waits, shorter only where tiles of many heads are in turn, which then do not stay
 * in the cache.) A row's unit is a power of two, 2^-30 of what no sum of the row exceeds: weights add up to 1, so
 *   |sum over j of dS_ij k_j| <= (|dout_i| max |v| gscale + |delta_i|) max |k|
 * over keys that are finite, kept by a branch, before the item's length and active for any row; half as much again
 * covers rounding. What a tile adds beyond that, or what is not finite, marks the block of rows, whose rows are then
 * done again one by one (attn_slow.cuh). For normal numbers and 2048 keys the unit's error is 1/2500 of what rounding
 * to bf16 does to the naive program's dq, 1/200 for f16; keys and values a thousand times as large as the others cost
 * as many bits each if no row attends to them.
 */
#include "attn_hopper_keys.cuh"
#include "attn_slow.cuh"

/* A warp a tile: blocks of rows that it meets. */
static __global__ void __launch_bounds__(THREADS)
    hopper_steps_kernel(const __grid_constant__ attn_block_args a, const __grid_constant__ hopper_args p)
{
    const int g = blockIdx.y, heads = a.branch[g].heads, lane = threadIdx.x % 32;
    const hopper_steps &place = p.place[g];
    const int64_t tiles = (int64_t)a.batch * p.branch[g].segments * heads * place.tiles;
    previous_done();
    for (int64_t id = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; id < tiles;
         id += gridDim.x * (THREADS / 32)) {
        const int item = (int)(id / place.tiles), h = a.branch[g].head0 + item % heads;
        attn_tile t;
        attn_span(a, g, item / heads / p.branch[g].segments, h, item / heads % p.branch[g].segments, t);
        const int first = (int)(id % place.tiles) * LAC_HOPPER_BLOCK, last = min(first + LAC_HOPPER_BLOCK, t.live) - 1;
        const int rows = t.q1 - t.q0;
        const uint8_t *cells = a.blocks + t.b * a.blocks_stride[0] + h * a.blocks_stride[1] +
                               (t.base + (int64_t)first * t.r) / a.block * a.blocks_stride[3];
        uint32_t *const to = p.steps + place.at + id * place.width;
        int count = 0;
        for (int word = 0; word < place.width - 1; word++) {
            const int row = (32 * word + lane) * HOPPER_ROWS, end = min(row + HOPPER_ROWS, rows) - 1;
            const bool meets = row <= end && first <= last && first - end <= t.after && row - last <= t.before &&
                               cells[(t.base + (int64_t)row * t.r) / a.block * a.blocks_stride[2]];
            const unsigned all = __ballot_sync(~0u, meets);
            if (lane == 0) to[1 + word] = all;
            count += __popc(all);
        }
        if (lane == 0) to[0] = (unsigned)count;
    }
}

/* does any branch keep the key for a head that shares it? */
static __device__ bool kept_key(const attn_args &a, int hk, int key)
{
    for (int g = 0; g < a.branches; g++) {
        if (a.branch[g].dilation == 1 && a.branch[g].heads == a.heads) return true;
        for (int h = hk * a.group; h < (hk + 1) * a.group; h++)
            if (attn_keeps(a, g, h, (unsigned)key)) return true;
    }
    return false;
}
/* eight numbers of a row, or zeros */
template <class T> struct alignas(16) chunk {
    T at[8];
};
template <class T> static __device__ __forceinline__ chunk<T> chunk_of(const T *row, bool there)
{
    const uint4 x = there ? *(const uint4 *)row : uint4{};
    return *(const chunk<T> *)&x;
}
template <class T> static __device__ __forceinline__ float squares_of(const chunk<T> &x)
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += to_compute(x.at[i]) * to_compute(x.at[i]);
    return sum;
}
template <int LANES> static __device__ __forceinline__ float lanes_sum(float x)
{
#pragma unroll
    for (int i = 1; i < LANES; i *= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

/* A column of the mask, for a batch item and key/value head: its largest keys and values. LANES: of a row. */
template <class T, int LANES>
static __global__ void __launch_bounds__(THREADS)
    hopper_most_kernel(const __grid_constant__ attn_block_args a, const __grid_constant__ hopper_args p)
{
    enum { AHEAD = 4, ROWS = THREADS / LANES };
    const int columns = (a.m - 1) / a.block + 1, rows = (a.n - 1) / a.block + 1;
    const int item = (int)(blockIdx.x / (unsigned)columns), column = (int)(blockIdx.x % (unsigned)columns);
    const int b = item / a.kv_heads, hk = item % a.kv_heads, at = threadIdx.x % LANES * 8;
    previous_done();
    bool active = false;
    for (int i = threadIdx.x; i < rows * a.group; i += THREADS)
        active = active || a.blocks[b * a.blocks_stride[0] + (hk * a.group + i % a.group) * a.blocks_stride[1] +
                                    i / a.group * a.blocks_stride[2] + column * a.blocks_stride[3]];
    if (!__syncthreads_or(active)) return;
    int64_t end = min((int64_t)(column + 1) * a.block, (int64_t)a.m);
    if (a.lengths)
        end = min(end, a.lengths_wide ? ((const int64_t *)a.lengths)[b * a.lengths_stride]
                                      : (int64_t)((const int32_t *)a.lengths)[b * a.lengths_stride]);
    float most = 0, squares = 0;
    for (int64_t from = (int64_t)column * a.block; from < end; from += AHEAD * ROWS) {
        chunk<T> k[AHEAD], v[AHEAD];
#pragma unroll
        for (int e = 0; e < AHEAD; e++) {
            const int64_t key = from + e * ROWS + threadIdx.x / LANES;
            const bool there = key < end && at < a.head_dim && kept_key(a, hk, (int)key);
            k[e] = chunk_of(attn_at<T>(a.k, b, key, hk) + at, there);
            v[e] = chunk_of(attn_at<T>(a.v, b, key, hk) + at, there);
        }
#pragma unroll
        for (int e = 0; e < AHEAD; e++) {
            const float sum = lanes_sum<LANES>(squares_of(v[e]));
            squares = fmaxf(squares, sum); /* not NaN; infinite also where numbers are: then nothing fits */
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float x = fabsf(to_compute(k[e].at[i]));
                if (x < INFINITY) most = fmaxf(most, x);
            }
        }
    }
    most = warp_max(most), squares = warp_max(squares);
    if (threadIdx.x % 32) return;
    atomicMax(p.most + 2 * item, __float_as_int(most));
    atomicMax(p.most + 2 * item + 1, __float_as_int(squares));
}

/* A warp a block of rows: what its sums of dq are times, as whole numbers; clears them. */
template <class T, int LANES>
static __global__ void __launch_bounds__(THREADS)
    hopper_scales_kernel(const __grid_constant__ attn_args a, const __grid_constant__ hopper_args p)
{
    enum { AHEAD = 8, ROWS = 32 / LANES };
    const int g = blockIdx.y, heads = a.branch[g].heads, lane = threadIdx.x % 32, at = lane % LANES * 8;
    const hopper_branch &br = p.branch[g];
    const int blocks = a.batch * br.segments * heads * br.blocks; /* countable() */
    previous_done();
    for (int id = (int)(blockIdx.x * (THREADS / 32) + threadIdx.x / 32); id < blocks;
         id += (int)(gridDim.x * (THREADS / 32))) {
        const int unit = id / heads, m = unit % br.blocks, segment = unit / br.blocks, head = id % heads;
        attn_tile t;
        attn_span(a, g, segment / br.segments, a.branch[g].head0 + head, segment % br.segments, t);
        const int block = br.first_block + (segment * heads + head) * br.blocks + m, row0 = t.q0 + m * HOPPER_ROWS;
        const int *const all = p.most + 2 * (t.b * a.kv_heads + t.h / a.group);
        const float keys = 1.5f * __int_as_float(all[0]), values = sqrtf(__int_as_float(all[1])) * (float)a.gscale;
        const float *const delta = p.stats + (int64_t)block * 2 * HOPPER_ROWS + HOPPER_ROWS;
        float *const scale = p.scales + (int64_t)block * HOPPER_ROWS;
        uint4 *const sums = (uint4 *)(p.dq + (int64_t)block * HOPPER_ROWS * p.columns);
        for (int i = lane; i < HOPPER_ROWS * p.columns / 4; i += 32) sums[i] = uint4{};
#pragma unroll 1
        for (int first = 0; first < HOPPER_ROWS; first += AHEAD * ROWS) {
            chunk<T> x[AHEAD];
#pragma unroll
            for (int e = 0; e < AHEAD; e++) {
                const int i = row0 + first + e * ROWS + lane / LANES;
                x[e] = chunk_of(attn_at<T>(a.g, t.b, t.base + (int64_t)i * t.r - a.shift, t.h) + at,
                                i < t.q1 && at < a.head_dim);
            }
#pragma unroll
            for (int e = 0; e < AHEAD; e++) {
                const int row = first + e * ROWS + lane / LANES;
                const float squares = lanes_sum<LANES>(squares_of(x[e]));
                if (lane % LANES) continue;
                const float most = keys * (sqrtf(squares) * values + fabsf(delta[row]));
                int exponent;
                frexpf(most, &exponent);
                const bool fits = most < INFINITY;
                scale[row] = fits ? ldexpf(1, min(30 - exponent, 126)) : 1;
                if (!fits) p.turn[block] = HOPPER_SPOILT;
            }
        }
    }
}

template <class T> static int steps(const attn_block_args &a, const hopper_args &p)
{
    int64_t most = 1;
    for (int g = 0; g < a.branches; g++)
        most = max(most, (int64_t)a.batch * p.branch[g].segments * a.branch[g].heads * p.place[g].tiles);
    const int64_t items = (int64_t)a.batch * a.kv_heads;
    CUDA_TRY("attention", cudaMemsetAsync(p.most, 0, (size_t)items * 2 * sizeof(int), lac_cuda_stream));
    launch(hopper_steps_kernel, dim3(blocks_filling(most, THREADS / 32), (unsigned)a.branches), THREADS, 0, a, p);
    launch(a.head_dim <= 64 ? hopper_most_kernel<T, 8> : hopper_most_kernel<T, 16>,
           (unsigned)(items * ((a.m - 1) / a.block + 1)), THREADS, 0, a, p);
    return lac_cuda_launched("attention");
}
int attn_hopper_steps(const attn_pair_args &a, const hopper_args &p, int dtype)
{
    return dtype == LAC_F16 ? steps<f16>(a, p) : steps<bf16>(a, p);
}

template <class T> static int scales(const attn_args &a, const hopper_args &p, dim3 grid)
{
    launch(a.head_dim <= 64 ? hopper_scales_kernel<T, 8> : hopper_scales_kernel<T, 16>, grid, THREADS, 0, a, p);
    return lac_cuda_launched("attention");
}
int attn_hopper_scales(const attn_pair_args &a, const hopper_args &p, int dtype)
{
    int64_t most = 1;
    for (int g = 0; g < a.branches; g++)
        most = max(most, (int64_t)a.batch * p.branch[g].segments * a.branch[g].heads * p.branch[g].blocks);
    const dim3 grid(blocks_filling(most, THREADS / 32, 16), (unsigned)a.branches);
    return dtype == LAC_F16 ? scales<f16>(a, p, grid) : scales<bf16>(a, p, grid);
}

template <class T, int D> static int launch_masks(const hopper_keys_args &p, bool masks)
{
    return masks ? launch_keys<T, D, true, HOPPER_BLOCKS>(p) : launch_keys<T, D, false, HOPPER_BLOCKS>(p);
}
int attn_hopper_block_keys(const hopper_keys_args &p, bool half, bool masks)
{
    if (p.a.head_dim <= 64) return half ? launch_masks<f16, 64>(p, masks) : launch_masks<bf16, 64>(p, masks);
    return half ? launch_masks<f16, 128>(p, masks) : launch_masks<bf16, 128>(p, masks);
}
