/* attn_pairs.cuh: options of single pairs (mask, bias, slopes, active blocks) as the kernels of attention see them.
 *
 * Kernels on tensor cores are templates over their arguments: attn_args, attn_block_args, which add active blocks, or
 * attn_pair_args, which add the rest. What a kernel asks for here is declared for all, and costs nothing where it is
 * not there: calls without options run the code that they would run if there were none. The last is one more instance a
 * kernel, which decides at run time what there is; the second runs half types to D = 128 that have nothing but blocks,
 * and has steps and tiles of its own.
 * The exact kernels, which wait for arithmetic, have only the last.
 *
 * Mask and bias of a step come to a part of shared memory that is the warp's own, four keys a lane, as one f32 matrix
 * over the scale (which multiplies the scores afterwards); a hidden pair is what makes its score infinitely small. It
 * is then added to the scores in the registers' order, so a mask costs no more than a bias. The exact kernels keep
 * masks, and biases of -inf, as bits of the word that says what a row sees. Rejected: bits for both (a row is a ballot,
 * one after the other), reading the matrix where the scores are (two bytes a lane and load, with code for each of
 * them).
 *
 * Blocks: a tile of rows ends where a block of rows ends, so that all its rows have the same active blocks, and the
 * walk over the other side jumps from run to run. A warp finds the runs of 256 cells of the block row at a time and
 * lists them in shared memory, some hundred steps ahead, so a step reads where it begins and ends. Steps do not cross
 * the end of a run. So the cost follows the active blocks, and tiles fit best where a block is a multiple of a tile's
 * height: where no block has more than 16, 32 or 64 rows, tiles have as many, and steps no more (attn_pairs_forward.cu
 * says what that brings). Rejected: runs looked for in every step, by every warp (a look at memory for each 32 cells
 * and a division a run, all while nothing else is under way: a fifth of a step), lists in memory (another launch and a
 * wait for its sizes), tiles across blocks of rows (a step for the union of what their rows see: at 10% of blocks that
 * is most of them).
 * What a tile does before its first step and behind its last is waited for, and with a tenth of the blocks and
 * causality a tile has some 25 steps. So its number is decoded with few divisions, the side that it keeps is loaded
 * without a loop, and its results leave several rows at a time: for D = 128, 17% of the forward's time was there and
 * 11% is.
 *
 * The gradient of a bias is dS, which the query pass has in its registers: stored one number a pair, as on the CPU, by
 * the one tile of a branch that has the pair, and added in the order of ranks where branches share pairs.
 */
#ifndef LAC_CUDA_ATTN_PAIRS_CUH
#define LAC_CUDA_ATTN_PAIRS_CUH
#include "attn.cuh"

struct attn_block_args : attn_args {
    const uint8_t *blocks; /* NULL: none; strides: batch items, heads, rows, columns */
    int64_t blocks_stride[4];
    int block; /* rows of a block, 0: no blocks */
};
struct attn_pair_args : attn_block_args {
    const uint8_t *mask; /* NULL: none; strides as of blocks */
    const char *bias;
    const void *slopes; /* compute type */
    void *dbias;        /* compute type; NULL: not asked for */
    int64_t mask_stride[4], bias_stride[4], dbias_stride[4], slopes_stride;
    int bias_wide; /* in the compute type, not in that of q */
    double unit;   /* 1 / scale: scores have not been multiplied yet when something is added to them */
};

/* do steps follow each other? */
template <class A> constexpr bool attn_follow = false;
template <> inline constexpr bool attn_follow<attn_args> = true;
/* are active blocks all that there is? */
template <class A> constexpr bool attn_blocks_alone = false;
template <> inline constexpr bool attn_blocks_alone<attn_block_args> = true;

/* ---- tiles ---- */

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
/* The same where blocks part the rows of the segment, which begins with row `start`; most divisions are by one. */
__device__ __forceinline__ unsigned attn_over(unsigned x, unsigned y) { return y == 1 ? x : x / y; }
template <bool KEYS>
__device__ __forceinline__ void attn_rows_in_block(const attn_block_args &a, int64_t start, unsigned number, int height,
                                                   attn_tile &t)
{
    const attn_branch &br = a.branch[t.g];
    const unsigned longest = (unsigned)(a.block < br.segment ? a.block : br.segment) - 1;
    const unsigned pieces = attn_over(longest, (unsigned)t.r) / (unsigned)height + 1, part = attn_over(number, pieces);
    const int64_t cell = (start > 0 ? (unsigned)start / (unsigned)a.block : 0) + part;
    const int64_t at = cell * a.block + (KEYS ? 0 : a.shift);
    const int from = attn_count(t.base, t.r, at), to = attn_count(t.base, t.r, at + a.block);
    const int last = min(to, KEYS ? t.keys : t.q1);
    t.first = max(from, KEYS ? 0 : t.q0) + (int)(number - part * pieces) * height;
    t.end = t.first + height < last ? t.first + height : last;
}
template <bool KEYS>
__device__ __forceinline__ void attn_rows(const attn_block_args &a, int number, int height, attn_tile &t)
{
    if (a.block)
        attn_rows_in_block<KEYS>(a, t.base - attn_offset(a, t.g, t.h) - (KEYS ? 0 : a.shift), (unsigned)number, height,
                                 t);
    else attn_rows<KEYS>((const attn_args &)a, number, height, t);
}

/* Number -> tile. */
template <bool KEYS>
__device__ __forceinline__ void attn_locate(const attn_args &a, int64_t id, int height, attn_tile &t)
{
    const int number = attn_decode<KEYS>(a, id, t);
    attn_rows<KEYS>(a, number, height, t);
}
template <bool KEYS>
__device__ __forceinline__ void attn_locate(const attn_pair_args &a, int64_t id, int height, attn_tile &t)
{
    const int number = attn_decode<KEYS>(a, id, t);
    attn_rows<KEYS>(a, number, height, t);
}
/* The same where blocks are all that there is: tiles are short then, and few divisions are run. Lines (batch items,
 * heads, segments) follow each other, so that the keys of one stay in the cache. With causality, whose tiles
 * differ most, the heavier half of all lines' tiles comes first, then the heavier half of the rest, and so on: a launch
 * ends with the lightest tiles, and as many keys are in use at any time, because lighter tiles see fewer. */
template <bool KEYS>
__device__ __forceinline__ void attn_locate(const attn_block_args &a, int64_t id, int height, attn_tile &t)
{
    int g = 0;
    while (id < a.branch[g].begin || id >= a.branch[g].begin + a.branch[g].tiles) g++;
    const attn_branch &br = a.branch[g];
    const unsigned blocks = (unsigned)br.blocks, segments = (unsigned)br.segments, heads = (unsigned)br.heads;
    const unsigned all = segments * heads * (unsigned)a.batch;
    unsigned number = (unsigned)(id - br.begin), high = blocks, low = 0; /* of the part: how many tiles are lighter */
    if (a.causal)
        for (low = high / 2; number >= (high - low) * all; low = high / 2) {
            number -= (high - low) * all;
            high = low;
        }
    const unsigned line = number / (high - low), lighter = high - 1 - (number - line * (high - low));
    const unsigned block = KEYS ? blocks - 1 - lighter : lighter;
    const unsigned lines = attn_over(line, segments), b = a.batch == 1 ? 0 : lines / heads;
    const int s = br.segment0 + (int)(line - lines * segments), h = br.head0 + (int)(lines - b * heads);
    attn_span(a, g, (int)b, h, s, t);
    attn_rows_in_block<KEYS>(a, (int64_t)s * br.segment - (KEYS ? 0 : a.shift), block, height, t);
}

/* Claims the block's next tile; t lies in shared memory, where it costs no registers. False if the tile has no rows, or
 * (KEYS) another head leads its unit. */
template <bool KEYS, class A> __device__ __forceinline__ bool attn_next(const A &a, int height, attn_tile &t)
{
    if (threadIdx.x == 0)
        attn_locate<KEYS>(a, a.ranks == 1 ? blockIdx.x : (unsigned)atomicAdd(a.counter, 1), height, t);
    __syncthreads();
    if (t.first >= t.end) {
        attn_signal<KEYS>(a, t);
        return false;
    }
    if (KEYS && !attn_leads(a, t.g, t.h)) {
        attn_signal<KEYS>(a, t);
        return false;
    }
    return true;
}

/* ---- the walk over the other side ---- */

/* Runs of active blocks in a part of the row of blocks, as lattice rows [x, y); behind them x = -1: there is more to
 * look at, or `high`. */
struct attn_spans {
    enum { MOST = 256, CELLS = 256 }; /* cells that are looked at together, every other one of which may begin a run */
    int2 run[MOST + 1];
    const char *origin[2]; /* of attn_stream */
};

/* Lists what is active from k on in head h; KEYS: the tile owns keys and walks over query rows. Not inlined: it is run
 * once in some hundred steps, and took registers from all of them. Everybody waits for it, so little of it waits for
 * what was before: all cells of a part are asked for at once, four words of them are worked on side by side, and
 * lattice rows come without branches and divisions (a product with the inverse, which is at most one too small). */
template <bool KEYS>
static __device__ __noinline__ void attn_list(const attn_block_args &a, const attn_tile &t, attn_spans &list, int h,
                                              int k, int high)
{
    __syncthreads(); /* nobody reads what was there */
    if (threadIdx.x < 32) {
        constexpr int WORDS = attn_spans::CELLS / 32;
        const int lane = (int)threadIdx.x, row = (int)(t.base + (int64_t)t.first * t.r - (KEYS ? 0 : a.shift));
        const int zero = (int)(t.base - (KEYS ? a.shift : 0));
        const unsigned r = (unsigned)t.r, inverse = ~0u / r, block = (unsigned)a.block;
        const int64_t hop = a.blocks_stride[KEYS ? 2 : 3];
        const uint8_t *on = a.blocks + t.b * a.blocks_stride[0] + h * a.blocks_stride[1] +
                            (unsigned)row / block * a.blocks_stride[KEYS ? 3 : 2];
        const int cells = k < high ? (int)((unsigned)(zero + (int64_t)(high - 1) * t.r) / block) + 1 : 0;
        int cell = k < high ? (int)((unsigned)(zero + (int64_t)k * t.r) / block) : 0, count = 0;
        /* the first lattice row at or behind a position */
        auto index = [&](int at) {
            const unsigned x = (unsigned)at - (unsigned)zero - 1, low = __umulhi(x, inverse);
            return at > zero ? (int)(low + (x - low * r >= r)) + 1 : 0;
        };
#pragma unroll 1
        for (; cell < cells && count <= attn_spans::MOST - attn_spans::CELLS / 2; cell += attn_spans::CELLS) {
            uint32_t active = 0;
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                const int at = cell + 32 * w + lane;
                if (at < cells && on[at * hop]) active |= 1u << w;
            }
#pragma unroll 1
            for (int w4 = 0; w4 < WORDS && cell + 32 * w4 < cells; w4 += 4)
#pragma unroll
                for (int w = w4; w < w4 + 4; w++) {
                    const uint32_t bits = __ballot_sync(~0u, active >> w & 1), rest = ~(bits >> lane);
                    const unsigned at = (unsigned)(cell + 32 * w + lane), length = rest ? __ffs((int)rest) - 1 : 32;
                    const int first = max(k, index((int)(at * block)));
                    const int end = min(high, index((int)((at + length) * block)));
                    const bool begins = (bits & ~(bits << 1)) >> lane & 1 && first < end;
                    const uint32_t all = __ballot_sync(~0u, begins);
                    if (begins) list.run[count + __popc(all & ((1u << lane) - 1))] = {first, end};
                    count += __popc(all);
                }
        }
        if (lane == 0) list.run[count] = cell < cells ? int2{-1, -1} : int2{high, INT32_MAX};
    }
    __syncthreads();
}

/* `seek` gives the first lattice index from k on that the tile must look at (not below `high`: none), and where the
 * step that begins there ends; k is where the step before ended, or, after `start`, where the walk begins. All threads
 * of a block call it. */
template <class A, bool KEYS> struct attn_walk {
    struct list {
        const char *origin[2];
    };
    __device__ __forceinline__ void start() {}
    __device__ __forceinline__ int seek(const A &, const attn_tile &, list &, int, int k, int, int step, int *end)
    {
        *end = k + step;
        return k;
    }
};
template <bool KEYS> struct attn_walk<attn_block_args, KEYS> {
    typedef attn_spans list;
    int at; /* number of the run */
    __device__ __forceinline__ void start() { at = -1; }
    __device__ __forceinline__ int seek(const attn_block_args &a, const attn_tile &t, attn_spans &list, int h, int k,
                                        int high, int step, int *end)
    {
        int2 run = {-1, -1};
        if (at >= 0) {
            run = list.run[at];
            if (run.y <= k) run = list.run[++at];
        }
        if (run.x < 0) {
            attn_list<KEYS>(a, t, list, h, k, high);
            run = list.run[at = 0];
        }
        k = max(k, run.x);
        *end = min(k + step, run.y);
        return k;
    }
};
template <bool KEYS> struct attn_walk<attn_pair_args, KEYS> : attn_walk<attn_block_args, KEYS> {
    __device__ __forceinline__ int seek(const attn_pair_args &a, const attn_tile &t, attn_spans &list, int h, int k,
                                        int high, int step, int *end)
    {
        if (a.block) return attn_walk<attn_block_args, KEYS>::seek(a, t, list, h, k, high, step, end);
        *end = k + step;
        return k;
    }
};

/* a step's end, or a tile's, where `last` rows are all that may be loaded */
__device__ __forceinline__ int attn_limit(const attn_args &, int, int last) { return last; }
__device__ __forceinline__ int attn_limit(const attn_block_args &, int end, int last)
{
    return end < last ? end : last;
}

/* ---- pairs that are hidden ---- */

__device__ __forceinline__ bool attn_hides(const attn_args &) { return false; }
__device__ __forceinline__ bool attn_hides(const attn_pair_args &a) { return a.mask || a.bias; }
/* does a step of `step` pairs a row that ends before `end` need the words of its rows? */
__device__ __forceinline__ bool attn_short(const attn_args &, int, int, int) { return false; }
__device__ __forceinline__ bool attn_short(const attn_block_args &, int first, int end, int step)
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
template <class T> __device__ __forceinline__ bool attn_open(const attn_args &, int, int, int64_t, int64_t)
{
    return true;
}
template <class T>
__device__ __forceinline__ bool attn_open(const attn_pair_args &a, int b, int h, int64_t n, int64_t key)
{
    if (a.mask && !a.mask[attn_pair_at(a.mask_stride, b, h, n, key)]) return false;
    return !a.bias || attn_bias<T>(a, attn_pair_at(a.bias_stride, b, h, n, key)) != -(compute_t<T>)INFINITY;
}
/* is the block of the pair active? */
__device__ __forceinline__ bool attn_active(const attn_block_args &a, int b, int h, int64_t n, int64_t key)
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
template <class T, bool ALONE, class A>
__device__ __forceinline__ uint64_t attn_row_shown(const A &a, const attn_tile &t, int h, int i, int first, int end)
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
template <class T, bool ALONE, class A>
__device__ __forceinline__ uint64_t attn_key_shown(const A &a, const attn_tile &t, int h, int j, int first, int end)
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

inline int attn_block_of(const attn_args &) { return 0; }
inline int attn_block_of(const attn_block_args &a) { return a.block; }

/* are blocks all that there is? */
inline bool attn_only_blocks(const attn_pair_args &a) { return a.block && !a.mask && !a.bias && !a.slopes; }
/* most rows of a block in any branch; as many as there can be where there are no blocks */
inline int attn_block_rows(const attn_block_args &a)
{
    int most = a.block ? 0 : INT32_MAX;
    for (int g = 0; g < a.branches && a.block; g++) {
        const int rows = attn_pieces(a.branch[g], a.block, 1);
        most = rows > most ? rows : most;
    }
    return most;
}

int attn_pairs_forward_tensor(attn_pair_args &a, const lac_plan *plan, int dtype);
int attn_pairs_keys_tensor(attn_pair_args &a, const lac_plan *plan, int dtype);
int attn_pairs_queries_tensor(attn_pair_args &a, const lac_plan *plan, int dtype);
/* f32 and f64 exactly, with or without options */
int attn_forward_exact(attn_pair_args &a, const lac_plan *plan, int dtype);
int attn_keys_exact(attn_pair_args &a, const lac_plan *plan, int dtype);
int attn_queries_exact(attn_pair_args &a, const lac_plan *plan, int dtype);

#endif
