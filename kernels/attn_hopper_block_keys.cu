/* attn_hopper_block_keys.cu: the backward of attention on Hopper where a mask has active blocks: which blocks of rows a
 * tile of keys meets, largest keys and values, and instances of the tiles.
 *
 * Tiles have 128 keys, all of one block of the mask, so that every warpgroup has work in every step, and only blocks of
 * rows with an active block are walked over: a bit each, from a kernel before the list.
 *
 * Sums of dq are whole numbers of 32 bits, so that they are the same in any order and no tile waits for another one.
 * (With turns, as dense tiles have them, tiles wait at every block of rows that an earlier one has still to reach, and
 * random patterns make chains of such waits, shorter only where tiles of many heads are in turn, which then do not stay
 * in the cache. Storing what comes first instead of clearing needs a look at every step and a wait where several tiles
 * come at once: tiles of D = 64 took 4.63 ms for 4.36, causal and D = 128 the same, where clearing takes 0.04.)
 *
 * A row's unit is a power of two, 2^-30 of what no sum of the row exceeds: weights add up to 1, so
 *   |sum over j of dS_ij k_j| <= (|dout_i| max |v| gscale + |delta_i|) max |k|
 * over keys that are finite, kept by a branch, before the item's length and active for any row; half as much again
 * covers rounding. What a tile adds beyond that, or what is not finite, marks the block of rows, whose rows are then
 * done again one by one (attn_slow.cuh). For normal numbers and 2048 keys the unit's error is 1/2500 of what rounding
 * to bf16 does to the naive program's dq, 1/200 for f16; keys and values a thousand times as large as the others cost
 * as many bits each if no row attends to them. Norms of dout come from the pass that reads it for delta, and the list
 * makes units of all that, so that nothing is read for their sake but keys and values, while sums are cleared.
 */
#include "attn_hopper_keys.cuh"
#include "attn_slow.cuh"

/* A warp a tile: blocks of rows that it meets. */
static __global__ void __launch_bounds__(THREADS)
    hopper_steps_kernel(const __grid_constant__ attn_block_args a, const __grid_constant__ hopper_args p)
{
    enum { AHEAD = 8 }; /* words whose cells are asked for at once */
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
        const unsigned base = (unsigned)t.base, r = (unsigned)t.r, block = (unsigned)a.block;
        const uint8_t *cells = a.blocks + t.b * a.blocks_stride[0] + h * a.blocks_stride[1] +
                               (base + (unsigned)first * r) / block * a.blocks_stride[3];
        uint32_t *const to = p.steps + place.at + id * place.width;
        int count = 0;
        for (int begin = 0; begin < place.width - 1; begin += AHEAD) {
            bool meets[AHEAD];
#pragma unroll
            for (int e = 0; e < AHEAD; e++) {
                const int row = (32 * (begin + e) + lane) * HOPPER_ROWS, end = min(row + HOPPER_ROWS, rows) - 1;
                meets[e] = row <= end && first <= last && first - end <= t.after && row - last <= t.before &&
                           cells[(base + (unsigned)row * r) / block * a.blocks_stride[2]];
            }
#pragma unroll
            for (int e = 0; e < AHEAD; e++) {
                const unsigned all = __ballot_sync(~0u, meets[e]);
                if (lane == 0 && begin + e < place.width - 1) to[1 + begin + e] = all;
                count += __popc(all);
            }
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
/* x[e]: a lane's part of row e. The sum of one row over LANES lanes, which have all four rows between them. */
template <int LANES> static __device__ __forceinline__ float lanes_sum(const float (&x)[4])
{
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const float a = (odd ? x[2] : x[0]) + __shfl_xor_sync(~0u, odd ? x[0] : x[2], 1);
    const float b = (odd ? x[3] : x[1]) + __shfl_xor_sync(~0u, odd ? x[1] : x[3], 1);
    float sum = (upper ? b : a) + __shfl_xor_sync(~0u, upper ? a : b, 2);
#pragma unroll
    for (int i = 4; i < LANES; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
    return sum;
}
/* The largest absolute values of `most` and of x where that is finite; two numbers of T a word, as bits, which are in
 * the order of what they mean. */
template <class T> static __device__ __forceinline__ uint32_t most_of(uint32_t most, const chunk<T> &x)
{
    const uint32_t infinite = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;
    const uint4 four = *(const uint4 *)&x;
    const uint32_t word[4] = {four.x, four.y, four.z, four.w};
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) all = __vmaxu2(all, word[i] & 0x7fff7fff);
    if (all >> 16 >= infinite || (all & 0xffff) >= infinite) {
        all = 0;
        for (int i = 0; i < 8; i++) {
            const uint32_t one = word[i / 2] >> i % 2 * 16 & 0x7fff;
            if (one < infinite && one > all) all = one;
        }
    }
    return __vmaxu2(most, all);
}

/* A column of the mask, for a batch item and key/value head: its largest keys and values. LANES: of a row. The first
 * rows are asked for before it is known that the column is active; only what is larger than all before is told. Clears
 * the sums of dq beside that: reading alone does not fill the memory's time. */
template <class T, int LANES>
static __global__ void __launch_bounds__(THREADS)
    hopper_most_kernel(const __grid_constant__ attn_block_args a, const __grid_constant__ hopper_args p)
{
    enum { AHEAD = 4, ROWS = THREADS / LANES };
    const int columns = (a.m - 1) / a.block + 1, rows = (a.n - 1) / a.block + 1;
    const int item = (int)(blockIdx.x / (unsigned)columns), column = (int)(blockIdx.x % (unsigned)columns);
    const int b = item / a.kv_heads, hk = item % a.kv_heads, at = threadIdx.x % LANES * 8;
    int end = (int)min((int64_t)(column + 1) * a.block, (int64_t)a.m);
    bool all = false, known = false; /* does a branch keep all keys? is the column known to be active? */
    for (int g = 0; g < a.branches; g++) all = all || (a.branch[g].dilation == 1 && a.branch[g].heads == a.heads);
    previous_done();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < p.sums / 4; i += (int64_t)gridDim.x * THREADS)
        ((uint4 *)p.dq)[i] = uint4{};
    if (a.lengths)
        end = (int)min((int64_t)end, a.lengths_wide ? ((const int64_t *)a.lengths)[b * a.lengths_stride]
                                                    : (int64_t)((const int32_t *)a.lengths)[b * a.lengths_stride]);
    uint32_t most = 0;
    float squares = 0;
#pragma unroll 1
    for (int from = column * a.block; from < end; from += AHEAD * ROWS) {
        const int first = from + (int)threadIdx.x / LANES;
        const T *const keys = attn_at<T>(a.k, b, first, hk) + at, *const values = attn_at<T>(a.v, b, first, hk) + at;
        chunk<T> k[AHEAD], v[AHEAD];
#pragma unroll
        for (int e = 0; e < AHEAD; e++) {
            const int key = first + e * ROWS;
            const bool there = key < end && at < a.head_dim && (all || kept_key(a, hk, key));
            k[e] = chunk_of(keys + e * ROWS * a.k.stride[1], there);
            v[e] = chunk_of(values + e * ROWS * a.v.stride[1], there);
        }
        if (!known) {
            bool active = false;
            for (int i = threadIdx.x; i < rows * a.group; i += THREADS)
                active = active || a.blocks[b * a.blocks_stride[0] + (hk * a.group + i % a.group) * a.blocks_stride[1] +
                                            i / a.group * a.blocks_stride[2] + column * a.blocks_stride[3]];
            if (!__syncthreads_or(active)) return;
            known = true;
        }
        float sum[AHEAD];
#pragma unroll
        for (int e = 0; e < AHEAD; e++) most = most_of(most, k[e]), sum[e] = squares_of(v[e]);
        squares = fmaxf(squares, lanes_sum<LANES>(sum)); /* not NaN; infinite also where numbers are: nothing fits */
    }
    union {
        uint16_t bits;
        T number;
    } largest;
    largest.bits = (uint16_t)warp_max(max(most >> 16, most & 0xffff));
    squares = warp_max(squares);
    if (threadIdx.x % 32) return;
    int *const to = p.most + 2 * item;
    const int bits[2] = {__float_as_int(to_compute(largest.number)), __float_as_int(squares)};
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (bits[i] > __ldcg(to + i)) atomicMax(to + i, bits[i]);
}

template <class T> static int steps(const attn_block_args &a, const hopper_args &p)
{
    int64_t most = 1;
    for (int g = 0; g < a.branches; g++)
        most = max(most, (int64_t)a.batch * p.branch[g].segments * a.branch[g].heads * p.place[g].tiles);
    const int64_t items = (int64_t)a.batch * a.kv_heads;
    CUDA_TRY("attention", lac_cuda_fill_bytes(p.most, 0, (size_t)items * 2 * sizeof(int)));
    launch(hopper_steps_kernel, dim3(blocks_filling(most, THREADS / 32), (unsigned)a.branches), THREADS, 0, a, p);
    launch(a.head_dim <= 64 ? hopper_most_kernel<T, 8> : hopper_most_kernel<T, 16>,
           (unsigned)(items * ((a.m - 1) / a.block + 1)), THREADS, 0, a, p);
    return lac_cuda_launched("attention");
}
int attn_hopper_steps(const attn_pair_args &a, const hopper_args &p, int dtype)
{
    return dtype == LAC_F16 ? steps<f16>(a, p) : steps<bf16>(a, p);
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
