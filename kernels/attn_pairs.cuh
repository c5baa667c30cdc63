/* attn_pairs.cuh: options of single pairs (mask, bias, slopes, active blocks) as the kernels of attention see them.
 *
 * Kernels on tensor cores are templates over their arguments: attn_args, or attn_pair_args, which add the options. What
 * a kernel asks for here is declared for both, and costs nothing for the first: calls without options run the code that
 * they would run if there were none. The second is one more instance a kernel, which decides at run time what there is.
 * The exact kernels, which wait for arithmetic, have only the second.
 *
 * Mask and bias of a step come to a part of shared memory that is the warp's own, four keys a lane, as one f32 matrix
 * over the scale (which multiplies the scores afterwards); a hidden pair is what makes its score infinitely small. It
 * is then added to the scores in the registers' order, so a mask costs no more than a bias. The exact kernels keep
 * masks, and biases of -inf, as bits of the word that says what a row sees. Rejected: bits for both (a row is a ballot,
 * one after the other), reading the matrix where the scores are (two bytes a lane and load, with code for each of
 * them).
 *
 * Blocks: a tile of rows ends where a block of rows ends, so that all its rows have the same active blocks, and the
 * walk over the other side jumps from run to run. A warp holds 32 cells of the block row as bits: a look at memory for
 * each 32 blocks. Steps do not cross the end of a run. So the cost follows the active blocks, and tiles fit best where
 * a block is a multiple of a tile's height. Rejected: lists of active blocks (another launch and a wait for its sizes),
 * tiles across blocks of rows (a step for the union of what their rows see: at 10% of blocks that is most of them).
 *
 * The gradient of a bias is dS, which the query pass has in its registers: stored one number a pair, as on the CPU, by
 * the one tile of a branch that has the pair, and added in the order of ranks where branches share pairs.
 */
#ifndef LAC_CUDA_ATTN_PAIRS_CUH
#define LAC_CUDA_ATTN_PAIRS_CUH
#include "attn.cuh"

struct attn_pair_args : attn_args {
    const uint8_t *mask, *blocks; /* NULL: none; strides: batch items, heads, rows, columns */
    const char *bias;
    const void *slopes; /* compute type */
    void *dbias;        /* compute type; NULL: not asked for */
    int64_t mask_stride[4], blocks_stride[4], bias_stride[4], dbias_stride[4], slopes_stride;
    int bias_wide;          /* in the compute type, not in that of q */
    int block;              /* rows of a block, 0: no blocks */
    int row_cells, columns; /* blocks of queries and of keys */
    double unit;            /* 1 / scale: scores have not been multiplied yet when something is added to them */
};

/* ---- tiles ---- */

__device__ __forceinline__ int attn_block(const attn_args &) { return 0; }
__device__ __forceinline__ int attn_block(const attn_pair_args &a) { return a.block; }

/* tiles that the rows of one block can be in a segment */
__host__ __device__ inline int attn_pieces(const attn_branch &b, int block, int height)
{
    return ((block < b.segment ? block : b.segment) - 1) / b.dilation / height + 1;
}

/* Rows of tile `number` of its segment. */
template <bool KEYS> __device__ __forceinline__ void attn_rows(const attn_args &, int number, int height, attn_tile &t)
{
    t.first = (KEYS ? 0 : t.q0) + number * height;
    int last = KEYS ? t.keys : t.q1;
    t.end = t.first + height < last ? t.first + height : last;
}
template <bool KEYS>
__device__ __forceinline__ void attn_rows(const attn_pair_args &a, int number, int height, attn_tile &t)
{
    if (!a.block) {
        attn_rows<KEYS>((const attn_args &)a, number, height, t);
        return;
    }
    const int pieces = attn_pieces(a.branch[t.g], a.block, height), shift = KEYS ? 0 : a.shift;
    const int64_t start = t.base - attn_offset(a, t.g, t.h) - shift;
    const int64_t cell = (start > 0 ? start : 0) / a.block + number / pieces, at = cell * a.block + shift;
    const int low = KEYS ? 0 : t.q0, high = KEYS ? t.keys : t.q1;
    const int from = attn_count(t.base, t.r, at), to = attn_count(t.base, t.r, at + a.block);
    const int last = to < high ? to : high;
    t.first = (from > low ? from : low) + number % pieces * height;
    t.end = t.first + height < last ? t.first + height : last;
}

/* Claims the block's next tile; t lies in shared memory, where it costs no registers. False if the tile has no rows. */
template <bool KEYS, class A> __device__ __forceinline__ bool attn_next(const A &a, int height, attn_tile &t)
{
    if (threadIdx.x == 0) {
        int number = attn_decode<KEYS>(a, a.ranks == 1 ? blockIdx.x : (unsigned)atomicAdd(a.counter, 1), t);
        attn_rows<KEYS>(a, number, height, t);
    }
    __syncthreads();
    if (t.first < t.end) return true;
    attn_signal<KEYS>(a, t);
    return false;
}

/* ---- the walk over the other side ---- */

/* KEYS: the tile owns keys and walks over query rows. `seek` gives the first lattice index from k on that the tile must
 * look at (not below `high`: none), and where the step that begins there ends; all lanes of a warp call it. */
template <class A, bool KEYS> struct attn_walk {
    __device__ __forceinline__ void start(const A &, const attn_tile &, int) {}
    __device__ __forceinline__ int seek(const A &, const attn_tile &, int k, int, int step, int *end)
    {
        *end = k + step;
        return k;
    }
};
template <bool KEYS> struct attn_walk<attn_pair_args, KEYS> {
    const uint8_t *on;
    int cell; /* bits: cells [cell, cell + 32) */
    uint32_t bits;
    __device__ __forceinline__ void start(const attn_pair_args &a, const attn_tile &t, int h)
    {
        if (!a.block) return;
        const int64_t position = t.base + (int64_t)t.first * t.r - (KEYS ? 0 : a.shift);
        on = a.blocks + t.b * a.blocks_stride[0] + h * a.blocks_stride[1] +
             position / a.block * a.blocks_stride[KEYS ? 3 : 2];
        cell = -32;
        bits = 0;
    }
    __device__ __forceinline__ int seek(const attn_pair_args &a, const attn_tile &t, int k, int high, int step,
                                        int *end)
    {
        *end = k + step;
        if (!a.block) return k;
        const int64_t zero = t.base - (KEYS ? a.shift : 0);
        while (k < high) {
            const int at = (int)(unsigned)(zero + (int64_t)k * t.r) / a.block;
            if ((unsigned)(at - cell) >= 32) {
                const int mine = at + (int)threadIdx.x % 32;
                cell = at;
                bits = __ballot_sync(~0u, mine < (KEYS ? a.row_cells : a.columns) &&
                                              on[mine * a.blocks_stride[KEYS ? 2 : 3]]);
            }
            const uint32_t rest = bits >> (at - cell);
            const int skip = rest ? __ffs((int)rest) - 1 : 32 - (at - cell);
            if (skip == 0) {
                const int run = ~rest ? __ffs((int)~rest) - 1 : 32;
                const int stop = attn_count(zero, t.r, (int64_t)(at + run) * a.block);
                *end = stop < k + step ? stop : k + step;
                return k;
            }
            k = attn_count(zero, t.r, (int64_t)(at + skip) * a.block);
        }
        return high;
    }
};

/* a step's end, or a tile's, where `last` rows are all that may be loaded */
__device__ __forceinline__ int attn_limit(const attn_args &, int, int last) { return last; }
__device__ __forceinline__ int attn_limit(const attn_pair_args &, int end, int last) { return end < last ? end : last; }

/* ---- pairs that are hidden ---- */

/* does a step of `step` pairs a row that ends before `end` need the words of its rows? */
__device__ __forceinline__ bool attn_hides(const attn_args &) { return false; }
__device__ __forceinline__ bool attn_hides(const attn_pair_args &a) { return a.mask || a.bias; }
__device__ __forceinline__ bool attn_short(const attn_args &, int, int, int) { return false; }
__device__ __forceinline__ bool attn_short(const attn_pair_args &, int first, int end, int step)
{
    return end < first + step;
}

/* bias of a pair */
template <class T> __device__ __forceinline__ compute_t<T> attn_bias(const attn_pair_args &a, int64_t at)
{
    return a.bias_wide ? ((const compute_t<T> *)a.bias)[at] : to_compute(((const T *)a.bias)[at]);
}
__device__ __forceinline__ int64_t attn_pair_at(const int64_t (&stride)[4], int b, int h, int64_t n, int64_t key)
{
    return b * stride[0] + h * stride[1] + n * stride[2] + key * stride[3];
}
/* do mask and bias show the pair of query row n and the key? */
template <class T>
__device__ __forceinline__ bool attn_open(const attn_pair_args &a, int b, int h, int64_t n, int64_t key)
{
    if (a.mask && !a.mask[attn_pair_at(a.mask_stride, b, h, n, key)]) return false;
    return !a.bias || attn_bias<T>(a, attn_pair_at(a.bias_stride, b, h, n, key)) != -(compute_t<T>)INFINITY;
}
/* is the block of the pair active? */
__device__ __forceinline__ bool attn_active(const attn_pair_args &a, int b, int h, int64_t n, int64_t key)
{
    return !a.block || a.blocks[attn_pair_at(a.blocks_stride, b, h, n / a.block, key / a.block)];
}

/* Of the keys first .. +63, below `end`, of query row i: those that the options show; by one warp, all lanes get it.
 * ALONE: the row is not of a walk's step, so blocks have to be looked at. */
template <class T, bool ALONE>
__device__ __forceinline__ uint64_t attn_row_shown(const attn_args &, const attn_tile &, int, int, int, int)
{
    return ~(uint64_t)0;
}
template <class T, bool ALONE>
__device__ __forceinline__ uint64_t attn_row_shown(const attn_pair_args &a, const attn_tile &t, int h, int i, int first,
                                                   int end)
{
    const int64_t n = t.base + (int64_t)i * t.r - a.shift;
    bool shown[2];
#pragma unroll
    for (int x = 0; x < 2; x++) {
        const int j = first + (int)threadIdx.x % 32 + 32 * x;
        const int64_t key = t.base + (int64_t)j * t.r;
        shown[x] = i < t.q1 && j < end && attn_open<T>(a, t.b, h, n, key);
        if (ALONE) shown[x] = shown[x] && attn_active(a, t.b, h, n, key);
    }
    return __ballot_sync(~0u, shown[0]) | (uint64_t)__ballot_sync(~0u, shown[1]) << 32;
}

/* Of the query rows first .. +63, below `end`, of key j: those that the options show. By one lane. */
template <class T, bool ALONE>
__device__ __forceinline__ uint64_t attn_key_shown(const attn_args &, const attn_tile &, int, int, int, int)
{
    return ~(uint64_t)0;
}
template <class T, bool ALONE>
__device__ __forceinline__ uint64_t attn_key_shown(const attn_pair_args &a, const attn_tile &t, int h, int j, int first,
                                                   int end)
{
    uint64_t mine = attn_below(end - first);
    if ((!attn_hides(a) && !ALONE) || j >= t.live) return mine;
    const int64_t key = t.base + (int64_t)j * t.r;
#pragma unroll 4
    for (int i = first; i < end && i < first + 64; i++) {
        const int64_t n = t.base + (int64_t)i * t.r - a.shift;
        if (!attn_open<T>(a, t.b, h, n, key) || (ALONE && !attn_active(a, t.b, h, n, key)))
            mine &= ~((uint64_t)1 << (i - first));
    }
    return mine;
}

/* ---- what is added to scores ---- */

/* bias - slope |p - j| of a visible pair, over the scale */
template <class T>
__device__ __forceinline__ compute_t<T> attn_added(const attn_args &, const attn_tile &, int, int, int)
{
    return 0;
}
template <class T>
__device__ __forceinline__ compute_t<T> attn_added(const attn_pair_args &a, const attn_tile &t, int h, int i, int j)
{
    typedef compute_t<T> C;
    C x = 0;
    const int64_t n = t.base + (int64_t)i * t.r - a.shift, key = t.base + (int64_t)j * t.r;
    if (a.bias) x = attn_bias<T>(a, attn_pair_at(a.bias_stride, t.b, h, n, key)) * (C)a.unit;
    if (a.slopes) {
        const C slope = (C)((double)((const C *)a.slopes)[h * a.slopes_stride] * a.unit);
        x -= slope * (C)((int64_t)t.r * (i < j ? j - i : i - j));
    }
    return x;
}

/* ---- the gradient of the bias ---- */

__device__ __forceinline__ bool attn_wants_bias(const attn_args &) { return false; }
__device__ __forceinline__ bool attn_wants_bias(const attn_pair_args &a) { return a.dbias && !a.deltas; }

/* where the gradient of the pair (query row i, key index j) lies, and how far apart neighbouring keys of the lattice
 * are
 */
template <class C> __device__ __forceinline__ C *attn_dbias(const attn_pair_args &a, const attn_tile &t, int i, int j)
{
    const int64_t n = t.base + (int64_t)i * t.r - a.shift, key = t.base + (int64_t)j * t.r;
    return (C *)a.dbias + attn_pair_at(a.dbias_stride, t.b, t.h, n, key);
}
template <class C> __device__ __forceinline__ void attn_put_dbias(const attn_pair_args &a, C *to, C x)
{
    *to = a.ranks > 1 ? __ldcg(to) + x : x; /* each pair once, or after the branches before */
}

/* ---- launches ---- */

template <class A> constexpr bool attn_paired = false;
template <> inline constexpr bool attn_paired<attn_pair_args> = true;

inline int attn_block_of(const attn_args &) { return 0; }
inline int attn_block_of(const attn_pair_args &a) { return a.block; }

int attn_pairs_forward_tensor(attn_pair_args &a, const lac_plan *plan, int dtype);
int attn_pairs_keys_tensor(attn_pair_args &a, const lac_plan *plan, int dtype);
int attn_pairs_queries_tensor(attn_pair_args &a, const lac_plan *plan, int dtype);
/* f32 and f64 exactly, with or without options */
int attn_forward_exact(attn_pair_args &a, const lac_plan *plan, int dtype);
int attn_keys_exact(attn_pair_args &a, const lac_plan *plan, int dtype);
int attn_queries_exact(attn_pair_args &a, const lac_plan *plan, int dtype);

#endif
