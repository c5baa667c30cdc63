/* attn_hopper_backward.cu: the backward of attention in one pass: which calls it serves, its work list, and what
 * happens before and after the tiles, which Hopper's kernels compute (attn_hopper_keys.cu) or, `joint`, the portable
 * ones (attn_joint.cuh).
 *
 * Launches: the list (tiles, turns, statistics block by block), the tiles of all branches, dq from the sums of all
 * branches, and, where masks can meet NaN, a look at whether anything has to be done again. Nothing is cleared
 * beforehand (but dq's sums with active blocks, attn_hopper_block_keys.cu, and dk and dv where their rows are not those
 * of dq and some may be reached by no branch): dq's pass writes every row, also those that no branch keeps, with zeros
 * for dk and dv there, and the list's kernel clears the counters. Each starts while the one before it ends
 * (launch.cuh); so does the forward's launch (attn_hopper_launch.cuh).
 *
 * The list is made on the device by arithmetic, so nothing is uploaded. Tiles of several items are interleaved in it:
 * heavy tiles come early, and neighbours in the list, which run at the same time, add to different blocks.
 *
 * Memory: f32 sums of dq for every branch (rows of its lattices, rounded up to blocks), 8 bytes a row and head for the
 * statistics. Sums of dk and dv between branches are in the results' memory (attn_sums.cuh). Rejected: one f32 copy of
 * dq for all branches (sums of rows that are no neighbours cannot be added in bulk), dq by a pass of its own (two
 * products more, 40%).
 */
#include "attn_hopper_backward.cuh"
#include "attn_hopper_pairs.cuh"
#include "attn_slow.cuh"
#include "launch.cuh"

/* ---- geometry ---- */

__host__ __device__ static int up(int64_t n, int64_t by) { return (int)((n + by - 1) / by); }

static bool masked(const lac_attn_desc *d) { return d->causal || d->window >= 0; }

/* Masks: do tiles with late keys come first, and meet their blocks of rows from the first to the last? They begin at
 * later blocks then, which they are done with when tiles that began earlier get there: nobody waits for a turn, but the
 * heaviest tiles of causal attention are the last ones. Else early keys come first, and rows from the last to the
 * first: every tile begins at the last block, and waits for as many turns as there are tiles before it. That is less
 * than what tiles of a rank wait for the last ones of the rank before, where there are several, and a strip's rows are
 * few: 4096 with D = 64, 2048 with 128. */
enum { FEW_ROWS = 1 << 18 };
static bool late_keys_first(const lac_plan *p, bool joint, bool blocks)
{
    const lac_attn_desc *d = &p->desc;
    bool long_rows = false;
    for (int g = 0; g < d->branches; g++)
        long_rows = long_rows || hopper_lattice_rows(p, g, d->n) * d->head_dim > FEW_ROWS;
    return masked(d) && !blocks && (joint || p->backward_phases == 1 || long_rows);
}

/* Items whose tiles are interleaved, so that tiles of one item are not claimed at the same time, when all but one would
 * wait for their turns. Late keys first, and the portable kernel, of which more tiles run at once: as many as stay in
 * the cache. Hopper's without masks: as many as the device runs at once, D = 64 a sixth more, so that a part's tiles do
 * not all begin together; early keys first twice as many. Measured: HOPPER_BACKWARD.md, "Dilation". */
static int64_t interleaved(const lac_plan *p, int64_t tiles, int64_t rows, bool joint, bool blocks)
{
    const lac_attn_desc *d = &p->desc;
    const bool masks = masked(d), small = d->head_dim <= 64, late = late_keys_first(p, joint, blocks);
    const int64_t bytes = !masks ? 40 << 20 : joint || small || !late ? 24 << 20 : 16 << 20; /* q, dout, sums of dq */
    const int64_t kept = bytes / (rows * d->head_dim * 8), device = lac_cuda_processors;
    if (blocks) return 1; /* nobody waits: sums of dq have no turns */
    if (joint || late) return max(kept, (int64_t)1);
    if (masks) return max(kept, (2 * device + tiles - 1) / tiles);
    return max(small ? (device * 7 / 6 + tiles - 1) / tiles : device / tiles, (int64_t)1);
}

/* groups of 64 keys of a tile */
static int tile_groups(int head_dim, bool joint, bool blocks)
{
    return joint ? 2 : attn_hopper_groups(head_dim, blocks);
}

struct hopper_sizes {
    int64_t blocks, tiles, steps;
};
/* has the branch keys at all? not where there are no more of them than its lattices' offset */
static bool has_keys(const lac_plan *p, int g)
{
    for (int h = p->head0[g]; h < p->head0[g] + p->heads[g]; h++)
        if (lac_plan_offset(&p->desc, g, h) < p->desc.m) return true;
    return false;
}
static int64_t items_of(const hopper_args &h, const lac_plan *p, int g)
{
    return p->desc.batch * h.branch[g].segments * p->heads[g];
}
/* Branches from g on whose lattices differ in their offsets alone, and all differ: a row is in one at most. */
static int alike(const lac_plan *p, int g)
{
    const lac_attn_desc *d = &p->desc;
    int n = 1;
    if (d->offset_rule != LAC_OFFSET_BRANCH) return n;
    for (int e = g + 1; e < d->branches && n < d->dilation[g]; e++, n++)
        if (p->segment[e] != p->segment[g] || d->dilation[e] != d->dilation[g] || p->head0[e] != p->head0[g] ||
            p->heads[e] != p->heads[g])
            break;
    return n;
}
/* Branches of one rank that follow each other are a pool if their items have as many blocks and tiles: these are
 * interleaved as if they were one branch's, in parts of as many items but for one: the last part, with which few others
 * run, has its share. Those that are alike but for their offsets take turns, so that neighbours have neighbouring rows.
 */
static void list_pools(hopper_args &h, const lac_plan *p, bool joint, bool blocks)
{
    const lac_attn_desc *d = &p->desc;
    for (int g = 0; g < d->branches; g++) {
        hopper_branch &b = h.branch[g];
        int64_t items = 0;
        for (int e = 0; e < d->branches; e++)
            if (h.branch[e].first_tile == b.first_tile) items += items_of(h, p, e);
        const int64_t most = interleaved(p, b.tiles, (int64_t)b.blocks * HOPPER_ROWS, joint, blocks);
        const int64_t parts = items > most ? (items + most - 1) / most : 1;
        b.group = (int)(items / parts), b.larger = (int)(items % parts);
    }
    for (int g = 0; g < d->branches; g += h.branch[g].alike) {
        hopper_branch *const b = h.branch + g;
        bool pooled = true;
        for (int e = 1; e < b->alike; e++) pooled = pooled && b[e].first_tile == b->first_tile;
        for (int e = 0; pooled && e < b->alike; e++) b[e].earlier = b->earlier + e, b[e].stride = b->alike;
    }
}
/* The branches of the list; their segments are those with keys. Tiles are claimed in the order of ranks: where branches
 * meet, a tile adds its keys' gradients to those of smaller rank. */
static hopper_sizes list_branches(hopper_args &h, const lac_plan *p, bool joint, bool blocks)
{
    const lac_attn_desc *d = &p->desc;
    const int groups = tile_groups(d->head_dim, joint, blocks);
    hopper_sizes all = {};
    int64_t before = 0;                    /* tiles of all ranks before */
    int awaits = -1, needs = 0, last = -1; /* last: the rank's branch before */
    bool keys = false;                     /* has the rank any, so far? */
    for (int i = 0, rank = 0; i < d->branches * p->backward_phases; i++, rank = i / d->branches) {
        if (i % d->branches == 0) {
            if (keys) awaits = rank - 1, needs = (int)(all.tiles - before);
            before = all.tiles, keys = false, last = -1;
        }
        const int g = i % d->branches;
        if (p->backward_phase[g] != p->backward_phases - 1 - rank) continue;
        hopper_branch &b = h.branch[g];
        b.segments = (int)((d->m - 1) / p->segment[g]) + 1;
        b.blocks = up(hopper_lattice_rows(p, g, d->n), HOPPER_ROWS);
        b.tiles = up(up(hopper_lattice_rows(p, g, d->m), HOPPER_ROWS), groups);
        const int64_t items = items_of(h, p, g);
        b.awaits = awaits, b.needs = needs;
        keys = keys || has_keys(p, g);
        b.first_block = (int)all.blocks, b.first_tile = (int)all.tiles, b.earlier = 0, b.stride = 1;
        if (last >= 0 && h.branch[last].tiles == b.tiles && h.branch[last].blocks == b.blocks) {
            b.first_tile = h.branch[last].first_tile;
            b.earlier = h.branch[last].earlier + (int)items_of(h, p, last);
        }
        last = g;
        b.alike = alike(p, g);
        b.segment = divider((uint32_t)p->segment[g]);
        b.dilation = divider((uint32_t)(d->dilation[g] < INT32_MAX ? d->dilation[g] : INT32_MAX));
        all.blocks += items * b.blocks, all.tiles += items * b.tiles;
        if (!blocks) continue;
        h.place[g] = {all.steps, b.tiles, up(b.blocks, 32) + 1};
        all.steps += items * b.tiles * h.place[g].width;
    }
    list_pools(h, p, joint, blocks);
    return all;
}

/* ---- the list ---- */

/* number of an item's first block */
__device__ __forceinline__ int item_block(const attn_args &a, const hopper_args &p, int g, int b, int s, int h)
{
    const hopper_branch &br = p.branch[g];
    return br.first_block + ((b * br.segments + s) * a.branch[g].heads + h - a.branch[g].head0) * br.blocks;
}

/* The groups of 64 keys of an item are spread evenly over its tiles, so that none is left with one busy warpgroup; with
 * active blocks (`even`) all tiles but the last have as many, because each belongs to a block. */
struct hopper_split {
    int64_t groups, tiles;
    __device__ __forceinline__ hopper_split(int keys, int most, bool even)
        : groups((keys + HOPPER_ROWS - 1) / HOPPER_ROWS), tiles((groups + most - 1) / most)
    {
        if (even) groups = tiles * most;
    }
    __device__ __forceinline__ int first(int64_t tile) const { return (int)(tile * groups / tiles); }
    __device__ __forceinline__ int owner(int64_t key) const
    {
        return (int)(((key / HOPPER_ROWS + 1) * tiles - 1) / groups);
    }
};

/* where it is in the list */
static __device__ int place_of_tile(const hopper_branch &br, int item, int order)
{
    const int all = br.earlier + item * br.stride, more = br.larger * (br.group + 1); /* items of the larger parts */
    const int members = br.group + (all < more), at = all < more ? all : all - more;
    return br.first_tile + (all - at % members) * br.tiles + order * members + at % members;
}
static __device__ hopper_tile make_tile(const attn_args &a, const hopper_args &p, int g, int most, int item, int order)
{
    const hopper_branch &br = p.branch[g];
    const int heads = a.branch[g].heads, s = item % br.segments; /* segments first: see HOPPER_BACKWARD.md */
    const int h = a.branch[g].head0 + item / br.segments % heads, b = item / br.segments / heads;
    hopper_tile x = {};
    x.branch = g;
    attn_tile t;
    attn_span(a, g, b, h, s, t);
    if (t.keys == 0 || !attn_leads(a, g, h)) return x;
    const hopper_split split(t.keys, most, p.steps);
    if (order >= split.tiles) return x;
    const int64_t tile = p.late_first ? split.tiles - 1 - order : order;
    x.batch = b, x.kv_head = h / a.group, x.order = order;
    for (int e = h; e >= 0; e = attn_follows(a, g, e)) x.heads |= 1u << (e - x.kv_head * a.group);
    x.keys = t.keys, x.live = t.live, x.key0 = (int)t.base;
    x.rows = t.q1 - t.q0, x.row0 = (int)(t.base + (int64_t)t.q0 * t.r - a.shift), x.query0 = t.q0;
    x.first = split.first(tile), x.width = min(split.first(tile + 1), up(t.keys, HOPPER_ROWS)) - x.first;
    x.block = item_block(a, p, g, b, s, x.kv_head * a.group);
    if (p.steps) {
        const hopper_steps &place = p.place[g];
        x.low = (x.block - br.first_block) / br.blocks;
        for (unsigned rest = x.heads; rest; rest &= rest - 1)
            x.high +=
                (int)p.steps[place.at + ((int64_t)(x.low + __ffs((int)rest) - 1) * place.tiles + order) * place.width];
        return x;
    }
    const int first = x.first * HOPPER_ROWS, last = min((x.first + x.width) * HOPPER_ROWS, t.live) - 1;
    if (first > last || x.rows == 0) return x;
    const int low = max(first - t.q0 - t.after, 0) / HOPPER_ROWS, reach = last - t.q0 + t.before;
    x.low = low;
    x.high = max(low, min((x.rows - 1) / HOPPER_ROWS, reach < 0 ? -1 : reach / HOPPER_ROWS) + 1);
    return x;
}

/* the order of the first tile that adds to block m, if one does: of the first key that the block's rows may see, or of
 * the last one */
__device__ __forceinline__ int first_turn(const hopper_args &p, const attn_tile &t, int m, int most)
{
    if (t.live == 0) return 0;
    const hopper_split split(t.keys, most, false);
    const int row = t.q0 + m * HOPPER_ROWS, key = p.late_first ? row + HOPPER_ROWS - 1 + t.after : row - t.before;
    const int tile = split.owner(max(0, min(key, t.live - 1)));
    return p.late_first ? (int)split.tiles - 1 - tile : tile;
}

enum { LIST_BLOCKS = 4 }; /* of a warp at a time */
enum { COUNTERS = 3 };    /* beside those of ranks, see carve() */

/* What a row's sums of dq are times, as whole numbers (attn_hopper_block_keys.cu); 0: they may be any. keys, values:
 * the largest key, and gscale times the largest norm of a value */
__device__ __forceinline__ float scale_of(float keys, float values, float squares, float delta)
{
    const float most = 1.5f * keys * (sqrtf(squares) * values + fabsf(delta));
    int exponent;
    frexpf(most, &exponent);
    return most < INFINITY ? ldexpf(1, min(30 - exponent, 126)) : 0;
}

/* Turns of the branch's blocks, and their statistics. A lane works out what one of the warp's blocks is; then all lanes
 * copy them, of which everything is read before it is written. BLOCKS: there are active blocks. */
template <bool BLOCKS>
__device__ __forceinline__ void list_blocks(const attn_args &a, const hopper_args &p, int g, int most)
{
    const hopper_branch &br = p.branch[g];
    const int heads = a.branch[g].heads, blocks = a.batch * br.segments * heads * br.blocks, lane = threadIdx.x % 32;
    const int warp = (int)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, warps = (int)gridDim.x * (THREADS / 32);
    const int64_t step = (int64_t)a.branch[g].dilation * a.heads, stats = (int64_t)a.batch * a.n * a.heads;
    for (int first = warp * LIST_BLOCKS; first < blocks; first += warps * LIST_BLOCKS) {
        /* heads vary fastest: their statistics lie side by side */
        const int id = min(first + lane % LIST_BLOCKS, blocks - 1), m = id / heads % br.blocks;
        const int segment = id / heads / br.blocks, h = a.branch[g].head0 + id % heads;
        attn_tile t;
        attn_span(a, g, segment / br.segments, h, segment % br.segments, t);
        const int block = item_block(a, p, g, t.b, segment % br.segments, h) + m, i = t.q0 + m * HOPPER_ROWS;
        const int rows = t.q1 - i;
        const int64_t from = attn_stat(a, t, h, i, a.per_branch);
        if (!BLOCKS && lane < LIST_BLOCKS) p.turn[block] = first_turn(p, t, m, most) | HOPPER_FRESH;
        float lse[2 * LIST_BLOCKS], delta[2 * LIST_BLOCKS], squares[2 * LIST_BLOCKS], keys, values;
        if constexpr (BLOCKS) {
            const int *const all = p.most + 2 * (t.b * a.kv_heads + h / a.group);
            keys = __int_as_float(all[0]), values = sqrtf(__int_as_float(all[1])) * (float)a.gscale;
        }
#pragma unroll
        for (int e = 0; e < 2 * LIST_BLOCKS; e++) { /* 32 rows */
            const int row = e % 2 * 32 + lane, left = __shfl_sync(~0u, rows, e / 2);
            const int64_t at = __shfl_sync(~0u, from, e / 2) + row * step;
            lse[e] = row < left ? ((const float *)a.lse2)[at] : 0; /* rows past the end: q and dout are zeros there, */
            delta[e] = row < left ? ((const float *)a.delta)[at] : 0; /* any finite P and delta will do */
            if (BLOCKS) squares[e] = row < left ? p.squares[a.per_branch ? at - g * stats : at] : 0;
        }
        int fits = ~0; /* a bit a block */
#pragma unroll
        for (int e = 0; e < 2 * LIST_BLOCKS; e++) {
            float *to = p.stats + (int64_t)__shfl_sync(~0u, block, e / 2) * 2 * HOPPER_ROWS + e % 2 * 32 + lane;
            to[0] = lse[e], to[HOPPER_ROWS] = delta[e];
            if constexpr (!BLOCKS) continue;
            const float scale =
                scale_of(__shfl_sync(~0u, keys, e / 2), __shfl_sync(~0u, values, e / 2), squares[e], delta[e]);
            p.scales[(int64_t)__shfl_sync(~0u, block, e / 2) * HOPPER_ROWS + e % 2 * 32 + lane] =
                scale == 0 ? 1 : scale;
            if (__any_sync(~0u, scale == 0)) fits &= ~(1 << e / 2);
        }
        if (BLOCKS && lane < LIST_BLOCKS) p.turn[block] = fits >> lane & 1 ? 0 : HOPPER_SPOILT;
    }
}

template <bool BLOCKS>
static __global__ void __launch_bounds__(THREADS)
    hopper_list_kernel(const __grid_constant__ attn_args a, const __grid_constant__ hopper_args p, int most)
{
    const int g = blockIdx.y;
    const hopper_branch &br = p.branch[g];
    const int tiles = a.batch * br.segments * a.branch[g].heads * br.tiles;
    previous_done();
    if (blockIdx.x + blockIdx.y == 0 && threadIdx.x < a.ranks + COUNTERS) p.counter[threadIdx.x] = 0;
    for (int id = blockIdx.x * THREADS + threadIdx.x; id < tiles; id += gridDim.x * THREADS) {
        const hopper_tile x = make_tile(a, p, g, most, id / br.tiles, id % br.tiles);
        int again = id; /* hidden from the compiler, which would keep the place in registers that there are not */
        asm volatile("" : "+r"(again));
        p.tile[place_of_tile(br, again / br.tiles, again % br.tiles)] = x;
    }
    list_blocks<BLOCKS>(a, p, g, most);
}

/* ---- dq ---- */

/* where sums of row (b, n, h) lie in branch g or one of those alike: block * 64 + row of the block; -1: nowhere */
__device__ __forceinline__ int place_of(const attn_args &a, const hopper_args &p, int g, int b, int n, int h)
{
    const attn_branch &ab = a.branch[g];
    const hopper_branch &br = p.branch[g];
    const int position = n + a.shift;
    if (h < ab.head0 || h >= ab.head0 + ab.heads || position < 0) return -1;
    const int s = (int)br.segment.divide((uint32_t)position), start = s * ab.segment;
    if (s >= br.segments) return -1;
    int i = (int)br.dilation.divide((uint32_t)(position - start));
    const int offset = position - start - i * ab.dilation;
    int further = offset - attn_offset(a, g, h); /* the branch's place among those alike, whose offsets go round */
    if (further < 0) further += ab.dilation;
    if (further >= br.alike) return -1;
    i -= attn_count((int64_t)start + offset, ab.dilation, a.shift); /* rows of the lattice before the first query */
    return item_block(a, p, g + further, b, s, h) * HOPPER_ROWS + i;
}

enum { DQ_SETS = 4, DQ_ROWS = 8 * DQ_SETS * (THREADS / 32), DQ_COLUMNS = 64 }; /* of a thread block */

/* 1 << wide thread blocks have the rows of as many times DQ_ROWS; those of all rows */
__host__ __device__ static unsigned dq_slabs(int n, int wide)
{
    const unsigned rows = DQ_ROWS << wide;
    return (((unsigned)n + rows - 1) / rows) << wide;
}
/* Where all dilations are multiples of 16, so are the steps between a warp's rows: else half of them are of a branch
 * and half of another. */
static int dq_wide(const attn_args &a)
{
    int all = 0;
    for (int g = 0; g < a.branches; g++) all |= a.branch[g].dilation;
    return all % 16 != 0 ? 0 : all % 32 != 0 ? 1 : 2;
}

/* 16 numbers of a row of `width`, of which `left` exist; FULL: all do, and rows are aligned */
template <bool FULL, class T>
__device__ __forceinline__ void put_columns(T *to, const uint32_t (&u)[8], int left, int width)
{
    if (FULL || (left >= 16 && width % 8 == 0 && (uintptr_t)to % 16 == 0)) {
        ((uint4 *)to)[0] = {u[0], u[1], u[2], u[3]};
        ((uint4 *)to)[1] = {u[4], u[5], u[6], u[7]};
        return;
    }
    const T *const from = (const T *)u;
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (i < left) to[i] = from[i];
}

/* Rows and 64 columns of a head, the sums of all branches in their order. The order of a block is that of the products'
 * registers: rows eight apart share sixteen bytes. A lane finds out where one row is, once for branches that are alike
 * but for their offsets; then four lanes take a row of eight a set. A warp's rows are 8 << `wide` apart: they share
 * those bytes in most branches, and those which dilated branches reach are together in few warps. All of two sets is
 * asked for before any is used, and beside it whether anything has been added to the blocks at all. FULL: rows are D
 * numbers and aligned, as nearly always on Hopper; else they have up to D columns. dk and dv: NULL, or what gets zeros
 * where no branch reaches the row. BLOCKS: there are active blocks, and sums are whole numbers in units of rows; those
 * that did not fit become NaN, so that they are done again. */
template <class T, int D, bool FULL, bool BLOCKS>
__global__ void __launch_bounds__(THREADS, FULL ? 2 : 1)
    hopper_dq_kernel(const __grid_constant__ attn_args a, const __grid_constant__ hopper_args p, T *dq, T *dk, T *dv,
                     bool masks, int wide)
{
    constexpr unsigned PARTS = D / DQ_COLUMNS;
    const unsigned heads = (unsigned)a.heads, slabs = dq_slabs(a.n, wide);
    const unsigned rest = blockIdx.x / PARTS / heads;
    const int begin = (int)(blockIdx.x % PARTS) * DQ_COLUMNS, lane = threadIdx.x % 32;
    const int h = (int)(blockIdx.x / PARTS % heads), b = (int)(rest / slabs);
    const int width = FULL ? D : a.head_dim, columns = FULL ? D : p.columns;
    const int slab = (int)(rest % slabs), apart = 8 << wide;
    const int n0 = ((slab >> wide) * DQ_ROWS << wide) + (slab & ((1 << wide) - 1)) * 8 + threadIdx.x / 32;
    const int mine = n0 + lane * apart; /* the row that the lane looks up */
    const float *sums = p.dq + begin * HOPPER_ROWS + lane % 4 * 4;
    float x[DQ_SETS][16] = {};
    bool reached = false; /* is the lane's row in any branch? */
    previous_done();
#pragma unroll 1
    for (int g = 0; g < a.branches; g += p.branch[g].alike) {
        const int at = mine < a.n ? place_of(a, p, g, b, mine, h) : -1;
        reached = reached || at >= 0;
        if (!__any_sync(~0u, at >= 0)) continue;
#pragma unroll
        for (int e0 = 0; e0 < DQ_SETS; e0 += 2) {
            float2 v[2][8];
            int turn[2];
            float scale[2];
            asm volatile("" ::: "memory"); /* registers for what is asked for of two sets, beside sums of all */
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int i = __shfl_sync(~0u, at, (e0 + e) * 8 + lane / 4), r = i % HOPPER_ROWS;
                const float *from = sums + (int64_t)(i / HOPPER_ROWS) * (HOPPER_ROWS * columns) +
                                    (r / 16 * 32 + r % 8 * 4) * 4 + r / 8 % 2 * 2;
                turn[e] = HOPPER_FRESH;
                if (i >= 0) turn[e] = p.turn[i / HOPPER_ROWS];
                if (BLOCKS) scale[e] = i >= 0 ? p.scales[i] : 1;
#pragma unroll
                for (int k = 0; k < 8; k++)
                    if (i >= 0 && (FULL || begin + 8 * k < columns)) v[e][k] = *(const float2 *)(from + 512 * k);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float unit = BLOCKS && turn[e] == HOPPER_SPOILT ? NAN : 1 / scale[e];
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    if (turn[e] & HOPPER_FRESH || (!FULL && begin + 8 * k >= columns)) continue;
                    float *const to = x[e0 + e] + 2 * k;
                    if constexpr (BLOCKS) {
                        to[0] = fmaf((float)__float_as_int(v[e][k].x), unit, to[0]);
                        to[1] = fmaf((float)__float_as_int(v[e][k].y), unit, to[1]);
                    } else to[0] += v[e][k].x, to[1] += v[e][k].y;
                }
            }
        }
    }
    float probe = 0;
#pragma unroll
    for (int e = 0; e < DQ_SETS; e++) {
        const int n = n0 + (e * 8 + lane / 4) * apart, left = width - begin - lane % 4 * 16;
        const bool empty = dk && !__shfl_sync(~0u, reached, e * 8 + lane / 4);
        union {
            uint32_t u[8];
            T out[16];
        };
#pragma unroll
        for (int i = 0; i < 16; i++) {
            probe += x[e][i] * 0;
            out[i] = from_compute<T>(x[e][i] * (float)a.scale);
        }
        hopper_sort_columns(u);
        const int64_t at = (((int64_t)b * a.n + n) * a.heads + h) * width + begin + lane % 4 * 16;
        if (n >= a.n) continue;
        put_columns<FULL>(dq + at, u, left, width);
        if (!empty) continue;
        const uint32_t zeros[8] = {};
        put_columns<FULL>(dk + at, zeros, left, width);
        put_columns<FULL>(dv + at, zeros, left, width);
    }
    if (masks && probe != 0) *p.spoilt = 1;
}

/* eight columns of dq; `whole`: they can be written at once. Not zero where they are not finite. */
template <class T> __device__ __forceinline__ float put_dq(T *to, const float (&x)[8], float scale, bool whole)
{
    struct alignas(16) chunk {
        T at[8];
    } out;
    float probe = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        probe += x[i] * 0;
        out.at[i] = from_compute<T>(x[i] * scale);
    }
    if (whole) *(chunk *)to = out;
    else
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = out.at[i];
    return probe;
}

/* The same with active blocks and portable tiles (attn_joint.cuh): eight columns of a row lie side by side, two in one
 * number of 64 bits, to which the lower one, when it is negative, has added -1 above itself. Two rows a thread. */
template <class T, int D>
__global__ void __launch_bounds__(THREADS)
    hopper_block_dq_kernel(const __grid_constant__ attn_args a, const __grid_constant__ hopper_args p, T *dq)
{
    constexpr unsigned UNIT = D; /* threads: 8 pairs of rows, D / 8 chunks of columns */
    const unsigned heads = (unsigned)a.heads, slabs = ((unsigned)a.n + 15) / 16;
    const unsigned unit = blockIdx.x * (THREADS / UNIT) + threadIdx.x / UNIT, rest = unit / heads;
    const int h = (int)(unit % heads), b = (int)(rest / slabs), chunk = (int)(threadIdx.x % UNIT / 8);
    const int n = (int)(rest % slabs * 16 + threadIdx.x % 8);
    previous_done();
    if (b >= a.batch || chunk * 8 >= a.head_dim) return;
    float x[2][8] = {};
    for (int g = 0; g < a.branches; g += p.branch[g].alike) {
        float factor[2];
        int4 v[2][2] = {};
#pragma unroll
        for (int y = 0; y < 2; y++) {
            const int at = n + 8 * y < a.n ? place_of(a, p, g, b, n + 8 * y, h) : -1, r = at % HOPPER_ROWS;
            factor[y] = at < 0 ? 0 : p.turn[at / HOPPER_ROWS] == HOPPER_SPOILT ? NAN : 1 / p.scales[at];
            const float *const from = p.dq + (int64_t)(at / HOPPER_ROWS) * (HOPPER_ROWS * p.columns) + chunk * 512 +
                                      r / 16 * 128 + r / 8 % 2 * 64 + r % 8 * 8;
#pragma unroll
            for (int k = 0; k < 2; k++)
                if (at >= 0) v[y][k] = ((const int4 *)from)[k];
        }
#pragma unroll
        for (int y = 0; y < 2; y++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float *const to = x[y] + 4 * k;
                const int4 two = v[y][k];
                to[0] = fmaf((float)two.x, factor[y], to[0]);
                to[1] = fmaf((float)(two.y + (two.x < 0)), factor[y], to[1]);
                to[2] = fmaf((float)two.z, factor[y], to[2]);
                to[3] = fmaf((float)(two.w + (two.z < 0)), factor[y], to[3]);
            }
    }
    T *const to = dq + (((int64_t)b * a.n + n) * a.heads + h) * a.head_dim + chunk * 8;
    const bool whole = (uintptr_t)dq % 16 == 0;
    float probe = 0;
    if (n < a.n) probe += put_dq(to, x[0], (float)a.scale, whole);
    if (n + 8 < a.n) probe += put_dq(to + (int64_t)8 * a.heads * a.head_dim, x[1], (float)a.scale, whole);
    if (probe != 0) *p.spoilt = 1;
}

/* ---- values that are not finite ---- */

/* A masked pair is a product with zero here as well, and zero times NaN is NaN: rows that are not finite are computed
 * again from the pairs that they see (attn_slow.cuh). All rows are looked at, but only if one is known to be spoilt. */
template <class T> __device__ __forceinline__ bool spoilt_row(const attn_args &a, const T *row)
{
    float probe = 0;
    for (int d = threadIdx.x % 32; d < a.head_dim; d += 32) probe += to_compute(row[d]) * 0;
    return __any_sync(~0u, probe != 0);
}
template <class T>
__device__ __forceinline__ void put_row(const attn_args &a, T *row, const float (&x)[ATTN_SLOW_PARTS], float scale)
{
#pragma unroll
    for (int e = 0; e < ATTN_SLOW_PARTS; e++) {
        const int d = threadIdx.x % 32 + 32 * e;
        if (d < a.head_dim) row[d] = from_compute<T>(x[e] * scale);
    }
}
/* the lattice row of `position` for head h in branch g, if it is kept */
__device__ __forceinline__ bool row_of(const attn_args &a, int g, int b, int h, int position, attn_tile &t, int *i)
{
    if (position < 0 || !attn_keeps(a, g, h, (unsigned)position)) return false;
    attn_span(a, g, b, h, position / a.branch[g].segment, t);
    *i = (int)((position - t.base) / t.r);
    return true;
}

template <class T, class A>
__global__ void __launch_bounds__(THREADS)
    hopper_redo_kernel(const __grid_constant__ A a, const int *spoilt, T *dq, T *dk, T *dv)
{
    previous_done();
    if (!*spoilt) return;
    const int64_t queries = (int64_t)a.batch * a.n * a.heads, keys = (int64_t)a.batch * a.m * a.kv_heads;
    const int64_t warp = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, warps = gridDim.x * (THREADS / 32);
    attn_tile t;
    int i;
    for (int64_t row = warp; row < queries; row += warps) {
        const int h = (int)(row % a.heads), n = (int)(row / a.heads % a.n), b = (int)(row / a.heads / a.n);
        if (!spoilt_row(a, dq + row * a.head_dim)) continue;
        float x[ATTN_SLOW_PARTS] = {};
        for (int g = 0; g < a.branches; g++)
            if (row_of(a, g, b, h, n + a.shift, t, &i)) attn_slow_add_query<T>(a, t, i, x);
        put_row(a, dq + row * a.head_dim, x, (float)a.scale);
    }
    for (int64_t row = warp; row < keys; row += warps) {
        const int hk = (int)(row % a.kv_heads), m = (int)(row / a.kv_heads % a.m), b = (int)(row / a.kv_heads / a.m);
        if (!spoilt_row(a, dk + row * a.head_dim) && !spoilt_row(a, dv + row * a.head_dim)) continue;
        float x[ATTN_SLOW_PARTS] = {}, y[ATTN_SLOW_PARTS] = {};
        for (int g = 0; g < a.branches; g++)
            for (int h = hk * a.group; h < (hk + 1) * a.group; h++)
                if (row_of(a, g, b, h, m, t, &i) && attn_leads(a, g, h)) attn_slow_add_key<T>(a, t, i, x, y);
        put_row(a, dk + row * a.head_dim, x, (float)a.scale);
        put_row(a, dv + row * a.head_dim, y, 1.f);
    }
}

/* ---- the whole ---- */

/* are blocks and tiles few enough for the list's numbers? */
static bool countable(const lac_plan *p, bool joint)
{
    hopper_args h;
    const hopper_sizes n = list_branches(h, p, joint, false);
    return n.blocks <= INT32_MAX / HOPPER_ROWS && n.tiles <= INT32_MAX / HOPPER_ROWS;
}

/* NULL, or why neither Hopper's tiles nor, with active blocks, the portable ones can do the call */
static const char *no_tiles(const lac_a_attend_bwd *w)
{
    const lac_a_attend *f = &w->forward;
    const lac_view *read[] = {&f->q, &f->k, &f->v, &w->dout};
    const char *why = lac_plan_no_hopper_beyond(f->plan, f->q.dtype);
    if (!why && f->blocks.data)
        why = f->mask.data || f->bias.data || f->slopes.data || f->padding.data || f->dropout > 0
                  ? "there is a block_mask, with other options of pairs, padding or dropout"
                  : lac_plan_no_hopper_blocks(f->plan, f->block);
    for (int i = 0; i < 4 && !why; i++) hopper_readable(read[i], &why);
    return why;
}

bool attn_joint_fits(const lac_a_attend_bwd *w)
{
    const lac_a_attend *f = &w->forward;
    if (f->blocks.data ? no_tiles(w) : lac_attend_pairs(f)) return false;
    if (f->q.dtype != LAC_BF16 && f->q.dtype != LAC_F16) return false;
    return lac_plan_one_pass(f->plan) && countable(f->plan, true) && attn_joint_runs(f->plan->desc.head_dim);
}

const char *attn_hopper_backward_fits(const lac_a_attend_bwd *w)
{
    const lac_a_attend *f = &w->forward;
    const lac_plan *p = f->plan;
    const lac_attn_desc *d = &p->desc;
    const lac_view *read[] = {&f->q, &f->k, &f->v, &w->dout};
    const char *why = no_tiles(w);
    if (why) return why;
    if (w->dbias.data) return "the bias has a gradient";
    if (d->heads / d->kv_heads > 32) return "more than 32 query heads share a key/value head";
    for (int g = 0; g < d->branches; g++)
        for (int i = 0; i < 4; i++)
            if (d->dilation[g] > (((int64_t)1 << 33) - 1) / (read[i]->shape[1] > 1 ? read[i]->stride[1] : d->head_dim))
                return "a dilation steps over more than 2^34 bytes";
    if (!countable(p, false)) return "there are more than 2^31 rows";
    if (!attn_hopper_keys_exist()) return "the device is not a Hopper, or the plug-in was not compiled for it";
    return NULL;
}

static size_t rounded(size_t bytes) { return (bytes + 127) / 128 * 128; }

/* the list's parts in `space`, one after the other; returns their size */
static size_t carve(hopper_args &h, const lac_plan *p, bool joint, bool blocked, char *space, size_t *sums)
{
    const hopper_sizes n = list_branches(h, p, joint, blocked);
    const size_t blocks = (size_t)n.blocks;
    const size_t stats = blocks * 2 * HOPPER_ROWS * sizeof(float), tiles = (size_t)n.tiles * sizeof(hopper_tile);
    const size_t turns = rounded(blocks * sizeof(int)),
                 counters = (size_t)(p->backward_phases + COUNTERS) * sizeof(int);
    h.columns = joint ? (p->desc.head_dim + 7) / 8 * 8 : attn_hopper_columns(p->desc.head_dim);
    *sums = blocks * HOPPER_ROWS * (size_t)h.columns * sizeof(float);
    h.stats = (float *)space;
    h.tile = (hopper_tile *)(space + stats);
    h.turn = (int *)(space + stats + rounded(tiles));
    h.counter = (int *)(space + stats + rounded(tiles) + turns);
    h.spoilt = h.counter + 1, h.delta_counter = h.counter + 2, h.ready = h.counter + 3;
    h.tiles = (int)n.tiles;
    const size_t list = stats + rounded(tiles) + turns + rounded(counters);
    if (!blocked) return list;
    const size_t steps = rounded((size_t)n.steps * sizeof(uint32_t)), scales = blocks * HOPPER_ROWS * sizeof(float);
    h.scales = (float *)(space + list);
    h.steps = (uint32_t *)(space + list + scales);
    h.most = (int *)(space + list + scales + steps);
    return list + scales + steps + (size_t)(p->desc.batch * p->desc.kv_heads * 2) * sizeof(int);
}

size_t attn_hopper_backward_bytes(const lac_plan *plan, bool joint, bool blocks, size_t *sums)
{
    hopper_args h = {};
    return carve(h, plan, joint, blocks, NULL, sums);
}

template <class T, class A> static int redo(const A &a, const hopper_args &h, const lac_a_attend_bwd *w)
{
    const int64_t rows = (int64_t)a.batch * a.n * a.heads;
    launch(hopper_redo_kernel<T, A>, blocks_filling(rows, THREADS / 32, 2), THREADS, 0, a, h.spoilt, (T *)w->dq.data,
           (T *)w->dk.data, (T *)w->dv.data);
    return lac_cuda_launched("attention");
}

bool attn_hopper_zeros(const attn_pair_args &a) { return a.n == a.m && a.shift == 0 && a.group == 1 && !a.block; }
template <class T, int D>
static void launch_dq(const attn_pair_args &a, const hopper_args &h, const lac_a_attend_bwd *w, unsigned blocks,
                      bool masks, bool zeros)
{
    T *const dq = (T *)w->dq.data, *const dk = zeros ? (T *)w->dk.data : NULL, *dv = zeros ? (T *)w->dv.data : NULL;
    const bool full = a.head_dim == D && ((uintptr_t)dq | (uintptr_t)dk | (uintptr_t)dv) % 16 == 0;
    const auto all = full ? hopper_dq_kernel<T, D, true, false> : hopper_dq_kernel<T, D, false, false>;
    const auto some = full ? hopper_dq_kernel<T, D, true, true> : hopper_dq_kernel<T, D, false, true>;
    launch(a.block ? some : all, blocks, THREADS, 0, a, h, dq, dk, dv, masks, dq_wide(a));
}
template <class T> static void launch_block_dq(const attn_args &a, const hopper_args &h, T *dq)
{
    const int wide = a.head_dim <= 64 ? 64 : 128;
    const unsigned blocks = blocks_for((int64_t)a.batch * ((a.n + 15) / 16) * a.heads * wide, THREADS);
    launch(wide == 64 ? hopper_block_dq_kernel<T, 64> : hopper_block_dq_kernel<T, 128>, blocks, THREADS, 0, a, h, dq);
}
template <class T>
static int finish(const attn_pair_args &a, const hopper_args &h, const lac_a_attend_bwd *w, bool joint, bool zeros)
{
    const bool masks = a.causal || a.window >= 0 || a.lengths || a.padding || a.dedup || a.mask || a.bias || a.block;
    const unsigned blocks =
        (unsigned)a.batch * dq_slabs(a.n, dq_wide(a)) * (unsigned)(a.heads * (a.head_dim <= DQ_COLUMNS ? 1 : 2));
    if (a.block && joint) launch_block_dq<T>(a, h, (T *)w->dq.data);
    else if (a.head_dim <= 64) launch_dq<T, 64>(a, h, w, blocks, masks, zeros);
    else launch_dq<T, 128>(a, h, w, blocks, masks, zeros);
    LAC_TRY(lac_cuda_launched("attention"));
    if (!masks) return 0;
    return hopper_options(a) || a.block ? redo<T>(a, h, w) : redo<T>((const attn_args &)a, h, w);
}

int attn_hopper_backward(attn_pair_args &a, const lac_a_attend_bwd *w, bool joint, void *space, void *sums,
                         void *dk_acc, void *dv_acc, const hopper_kept *padding, bool zeros)
{
    hopper_args h = {};
    size_t bytes;
    const lac_plan *p = w->forward.plan;
    carve(h, p, joint, a.block, (char *)space, &bytes);
    h.dq = (float *)sums, h.delta_tile = (hopper_delta_tile *)sums;
    h.squares = (const float *)w->dq.data, h.sums = (int64_t)(bytes / sizeof(float));
    int64_t most = 1;
    h.late_first = late_keys_first(p, joint, a.block);
    a.ranks = p->backward_phases;
    for (int g = 0; g < a.branches; g++) {
        const hopper_branch &b = h.branch[g];
        const int64_t items = (int64_t)a.batch * b.segments * a.branch[g].heads;
        a.branch[g].rank = p->backward_phases - 1 - p->backward_phase[g];
        a.branch[g].segment0 = 0, a.branch[g].segments = b.segments;
        if (items * b.blocks > most) most = items * b.blocks;
    }
    if (a.per_branch && !joint && !hopper_options(a) && !a.block) LAC_TRY(attn_hopper_deltas(a, h, w));
    if (a.block) LAC_TRY(attn_hopper_steps(a, h, w->forward.q.dtype));
    const dim3 grid(blocks_filling(most, LIST_BLOCKS * (THREADS / 32)), (unsigned)a.branches);
    launch(a.block ? hopper_list_kernel<true> : hopper_list_kernel<false>, grid, THREADS, 0, a, h,
           tile_groups(a.head_dim, joint, a.block));
    LAC_TRY(lac_cuda_launched("attention"));
    a.out = w->dk.data, a.acc = dk_acc, a.out2 = w->dv.data, a.acc2 = dv_acc;
    LAC_TRY(joint ? attn_joint_tiles(a, h, w->forward.q.dtype) : attn_hopper_keys(a, h, w, padding));
    return w->forward.q.dtype == LAC_F16 ? finish<f16>(a, h, w, joint, zeros) : finish<bf16>(a, h, w, joint, zeros);
}
