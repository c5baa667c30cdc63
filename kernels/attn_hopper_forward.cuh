/* attn_hopper_forward.cuh: the work of the forward on Hopper: arguments, places in shared memory, and the two threads
 * that feed the warpgroups.
 *
 * The scout claims the next tile from a counter and works out what it is: branch, segment, head, rows, keys. The loader
 * takes the result over, asks for queries, keys and values, and hands both to the warpgroups. They are two threads,
 * because a dozen divisions would otherwise stand between the last block of one tile and the first of the next.
 *
 * A tile is up to 64 rows for each warpgroup. The groups of 64 rows of a segment are spread evenly over its tiles, so
 * that none is left with a single busy warpgroup; later tiles get what remains, because the last rows have the most
 * work where there is a mask. Tiles of several (item, segment, head) are interleaved where rows have different work
 * (causal): heavy ones first, as many as have their keys and values in half the cache together.
 *
 * Rows shorter than 64 or 128 numbers are padded with zeros by the bulk copies, which neither read nor write what lies
 * beyond a row's end.
 *
 * Two more warps write zeros where no branch reaches (hopper_fill), beside the products. Rejected: a pass before the
 * launch, which took half as long as the attention itself at a dilation of 16.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_FORWARD_CUH
#define LAC_CUDA_ATTN_HOPPER_FORWARD_CUH
#include "attn.cuh"
#include "hopper.cuh"

enum { HOPPER_BRANCHES = 16 }; /* most branches of a plan: every one has its tensor maps among the arguments */
enum { HOPPER_KEYS = 128 };    /* keys of a block */
enum { HOPPER_TILE = 160 };    /* bytes that describe a tile */
enum { HOPPER_STOP = -1 };     /* instead of a branch: there are no more tiles */

/* x / d of 0 <= x < 2^31 by a product: e = factor d - 2^shift is below d <= 2^(shift - 31), so that e x < 2^shift */
struct hopper_divisor {
    uint32_t factor, shift;
    __device__ __forceinline__ int of(int x) const { return (int)((uint64_t)(uint32_t)x * factor >> shift); }
};

struct hopper_forward_maps {
    CUtensorMap q, k, v, out;
};
/* what tells rows that no branch reaches */
struct hopper_gaps {
    struct of {
        hopper_divisor segment, dilation, rule;
        int offset;
    } branch[HOPPER_BRANCHES];
    hopper_divisor heads, n;
    bool any; /* may there be some? */
};
struct hopper_forward_args {
    hopper_forward_maps map[HOPPER_BRANCHES];
    attn_args a;
    int tiles, items[HOPPER_BRANCHES], together[HOPPER_BRANCHES]; /* items of a branch; and those interleaved */
    int q_step, k_step, v_step, out_step;                         /* tokens from one batch item to the next */
    hopper_gaps gaps;
    bool masks;  /* can a row miss keys of a block that holds some of its own? */
    int *claims; /* tiles claimed beyond the first of each thread block; thread blocks that have ended */
    int *spoilt,
        call; /* the number of the last call with a result that is not finite where pairs are masked; and of this */
};

/* Of a tile's blocks of keys, what one warpgroup needs: blocks [lead, ends / 2) hold keys of its rows, and if `ends` is
 * odd, half of one more does; [plain, full) hold no masked pair. */
struct alignas(16) hopper_forward_part {
    int lead, ends, plain, full;
};
struct alignas(16) hopper_forward_tile {
    int g, low, blocks, groups; /* g HOPPER_STOP: none; first key that any row sees; blocks of keys; of 64 rows */
    hopper_forward_part part[3];
    attn_tile t;
    int64_t at;     /* (b N + n) H + h of row 0 of the lattice */
    int step, rows; /* from row to row; query rows of the segment's lattice */
    int query, key; /* positions of the lattice's first query row and key, in tokens of the item */
    int kv_head, spare;
};
static_assert(sizeof(hopper_forward_tile) == HOPPER_TILE, "copied by 16 bytes");

/* Sizes, and addresses in shared memory. */
template <int D> struct hopper_forward_shape {
    enum {
        GROUPS = D == 64 ? 3 : 2, /* warpgroups with rows */
        STAGES = D == 64 ? 4 : 2, /* of keys, and of values; a power of two: others cost registers */
        SLOTS = 2,                /* of queries; results leave through the same memory */
        LATE = D == 64 ? 12 : 8,  /* columns, in eighths, exponentiated before the product with values is waited for */
        THREADS_ = 128 * (GROUPS + 1),
        PANELS = D / 64,
        PANEL = 64 * 128, /* 64 rows of 64 columns */
        QUERIES = GROUPS * PANELS * PANEL,
        BLOCK = HOPPER_KEYS * D * 2
    };
    enum {
        Q = 0,
        K = Q + SLOTS * QUERIES,
        V = K + STAGES * BLOCK,
        TILE = V + STAGES * BLOCK, /* of each slot; then what the scout has found */
        FOUND = TILE + SLOTS * HOPPER_TILE,
        FOUND_FULL = FOUND + HOPPER_TILE,
        FOUND_FREE = FOUND_FULL + 8,
        Q_FULL = FOUND_FREE + 8,
        Q_FREE = Q_FULL + 8 * SLOTS,
        K_FULL = Q_FREE + 8 * SLOTS,
        K_FREE = K_FULL + 8 * STAGES,
        V_FULL = K_FREE + 8 * STAGES,
        V_FREE = V_FULL + 8 * STAGES,
        MEMORY = V_FREE + 8 * STAGES
    };
    static constexpr int FEEDER_REGISTERS = D == 64 ? 32 : 40, GROUP_REGISTERS = D == 64 ? 160 : 232;
    static_assert(MEMORY <= 232448, "shared memory of a thread block");
};

/* Hides from the compiler where a divisor comes from: it would keep reciprocals in registers that there are not. */
HOPPER_FN int hopper_opaque(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}

HOPPER_FN void hopper_say_done(const hopper_forward_args &p, const attn_tile &t, int count)
{
    if (p.a.ranks > 1) atomicAdd(attn_done<false>(p.a, t, t.g), count);
}

HOPPER_FN void hopper_part(hopper_forward_tile &f, int w)
{
    const attn_tile &t = f.t;
    const int row = t.first + w * 64, low = f.low, blocks = f.blocks;
    const int least = max(row - t.before - low, 0), highest = min(t.live, row + 64 + t.after) - low;
    const int lead = min(least / HOPPER_KEYS, blocks);
    const int halves = min((highest + HOPPER_KEYS / 2 - 1) / (HOPPER_KEYS / 2), 2 * blocks);
    f.part[w].lead = lead;
    f.part[w].ends = highest > least && row < t.end ? halves : 2 * lead;
    f.part[w].plain = (max(row + 63 - t.before - low, 0) + HOPPER_KEYS - 1) / HOPPER_KEYS;
    f.part[w].full = max(min(t.live, row + t.after + 1) - low, 0) / HOPPER_KEYS;
}

/* Tile number -> tile; false if it has no rows. */
template <int D> HOPPER_FN bool hopper_find(const hopper_forward_args &p, int id, hopper_forward_tile &f)
{
    constexpr int GROUPS = hopper_forward_shape<D>::GROUPS;
    const attn_args &a = p.a;
    int g = 0;
#pragma unroll 1
    while (id < (int)a.branch[g].begin || id >= (int)(a.branch[g].begin + a.branch[g].tiles)) g++;
    const attn_branch &br = a.branch[g];
    attn_tile &t = f.t;
    id -= (int)br.begin;
    const int together = p.together[g], part = id / hopper_opaque(together * br.blocks);
    id -= part * together * br.blocks;
    const int members = min(together, p.items[g] - part * together);
    int block = id / hopper_opaque(members), item = part * together + id - block * members;
    if (a.causal) block = br.blocks - 1 - block;
    const int segment = item / hopper_opaque(br.heads), h = br.head0 + item - segment * br.heads;
    const int b = segment / hopper_opaque(br.segments), s = br.segment0 + segment - b * br.segments;
    attn_span(a, g, b, h, s, t);
    f.rows = t.q1 - t.q0;
    const int groups = (f.rows + 63) / 64, tiles = (groups + GROUPS - 1) / GROUPS;
    if (block >= tiles) return false;
    const int each = groups / hopper_opaque(tiles), fewer = tiles - (groups - each * tiles);
    f.groups = each + (block >= fewer); /* the last ones have one more: where causal, they have the most keys */
    t.first = t.q0 + 64 * (block * each + max(block - fewer, 0));
    t.end = min(t.q1, t.first + 64 * f.groups);
    const int low = max(t.first - t.before, 0), high = min(t.live, t.end + t.after);
    f.g = g;
    f.low = low;
    f.blocks = high > low ? (high - low + HOPPER_KEYS - 1) / HOPPER_KEYS : 0;
#pragma unroll 1
    for (int w = 0; w < GROUPS; w++) hopper_part(f, w);
    f.query = (int)(t.base + (int64_t)t.q0 * t.r - a.shift);
    f.key = (int)t.base;
    f.at = ((int64_t)b * a.n + (t.base - a.shift)) * a.heads + h;
    f.step = t.r * a.heads;
    f.kv_head = h / hopper_opaque(a.group);
    return true;
}

template <int D> HOPPER_FN void hopper_scout(const hopper_forward_args &p, uint32_t memory)
{
    typedef hopper_forward_shape<D> M;
    hopper_forward_tile &f = *(hopper_forward_tile *)__cvta_shared_to_generic(memory + M::FOUND);
    int id = blockIdx.x, free = 1;
#pragma unroll 1
    while (id < p.tiles) {
        const int next = atomicAdd(p.claims, 1) + (int)gridDim.x; /* asked for early: it takes a while */
        hopper_wait(memory + M::FOUND_FREE, free);
        if (hopper_find<D>(p, id, f)) {
            hopper_arrive(memory + M::FOUND_FULL);
            free ^= 1;
        } else hopper_say_done(p, f.t, M::GROUPS);
        id = next;
    }
    hopper_wait(memory + M::FOUND_FREE, free);
    f.g = HOPPER_STOP;
    hopper_arrive(memory + M::FOUND_FULL);
    if (atomicAdd(p.claims + 1, 1) == (int)gridDim.x - 1) p.claims[0] = p.claims[1] = 0; /* for the next launch */
}

/* does branch g reach `position` for head h? as attn_keeps, without divisions */
HOPPER_FN bool hopper_keeps(const hopper_forward_args &p, int g, int h, int position)
{
    const attn_branch &br = p.a.branch[g];
    const hopper_gaps::of &x = p.gaps.branch[g];
    if (!attn_runs(p.a, g, h)) return false;
    const int s = x.segment.of(position), inner = x.rule.of(h);
    const int offset = p.a.offset_rule == LAC_OFFSET_BRANCH ? x.offset
                       : p.a.offset_rule == LAC_OFFSET_MOD  ? h - inner * br.dilation
                                                            : inner;
    const int at = position - s * br.segment - offset;
    return at >= 0 && at == x.dilation.of(at) * br.dilation && s >= br.segment0 && s < br.segment0 + br.segments;
}

/* Zeros, and lse -inf, in rows that no branch reaches, by two warps that have nothing else to do: D numbers a row from
 * 32 rows at a time that are neighbours in memory. They run beside the products, which leave the memory alone. */
template <int D> HOPPER_FN void hopper_fill(const hopper_forward_args &p, int warp)
{
    const attn_args &a = p.a;
    const unsigned lane = threadIdx.x % 32, rows = (unsigned)(a.batch * a.n) * (unsigned)a.heads;
    const int4 zeros = {0, 0, 0, 0};
    const int chunks = a.head_dim / 8; /* of 16 bytes in a row */
    const bool writes = (int)lane % (D / 8) < chunks;
#pragma unroll 1
    for (unsigned first = (blockIdx.x * 2 + warp) * 32; first < rows; first += gridDim.x * 64) {
        const int row = (int)(first + lane), token = p.gaps.heads.of(row), h = row - token * a.heads;
        const int position = token - p.gaps.n.of(token) * a.n + a.shift;
        bool reached = (unsigned)row >= rows;
#pragma unroll 1
        for (int g = 0; g < a.branches && position >= 0; g++) reached = reached || hopper_keeps(p, g, h, position);
        if (!reached) ((float *)a.lse)[row] = -INFINITY;
        const unsigned gaps = __ballot_sync(~0u, !reached) >> lane / (D / 8);
        int4 *to = (int4 *)a.out + (size_t)(first + lane / (D / 8)) * chunks + lane % (D / 8);
#pragma unroll
        for (int i = 0; i < D / 8; i++, to += 256 / D * chunks)
            if (writes && gaps >> 256 / D * i & 1) *to = zeros;
    }
}

template <int D> struct hopper_feeder {
    typedef hopper_forward_shape<D> M;
    const hopper_forward_args &p;
    const uint32_t memory;
    int slot, slot_free, stage, stage_free;
    __device__ __forceinline__ hopper_feeder(const hopper_forward_args &p, uint32_t memory)
        : p(p), memory(memory), slot(0), slot_free(1), stage(0), stage_free(1)
    {
    }
    __device__ __forceinline__ void step(int &at, int &parity, int count)
    {
        if (++at == count) at = 0, parity ^= 1;
    }
    __device__ __forceinline__ void queries(const volatile hopper_forward_tile &f, const hopper_forward_maps &map)
    {
        const int rows = f.rows, row = HOPPER_WRAP - rows + f.t.first - f.t.q0, head = f.t.h, groups = f.groups;
        const int z = f.t.b * p.q_step + f.query + rows * f.t.r;
        const uint32_t to = memory + M::Q + slot * M::QUERIES, full = memory + M::Q_FULL + 8 * slot;
        hopper_expect(full, groups * (int)M::PANELS * (int)M::PANEL);
#pragma unroll 1
        for (int g = 0; g < groups; g++)
#pragma unroll
            for (int c = 0; c < M::PANELS; c++)
                hopper_load(to + (c * M::GROUPS + g) * M::PANEL, &map.q, full, 64 * c, row + 64 * g, z, head);
    }
    __device__ __forceinline__ void keys(const volatile hopper_forward_tile &f, const hopper_forward_maps &map)
    {
        const int live = f.t.live, row = HOPPER_WRAP - live + f.low, token = f.key + live * f.t.r, blocks = f.blocks;
        const int k = f.t.b * p.k_step + token, v = f.t.b * p.v_step + token, head = f.kv_head;
#pragma unroll 1
        for (int i = 0; i < blocks; i++) {
            const uint32_t barriers = memory + 8 * stage, to = memory + stage * M::BLOCK;
            hopper_wait(barriers + M::K_FREE, stage_free);
            hopper_expect(barriers + M::K_FULL, M::BLOCK);
#pragma unroll
            for (int c = 0; c < M::PANELS; c++)
                hopper_load(to + M::K + c * HOPPER_KEYS * 128, &map.k, barriers + M::K_FULL, 64 * c,
                            row + i * HOPPER_KEYS, k, head);
            hopper_wait(barriers + M::V_FREE, stage_free);
            hopper_expect(barriers + M::V_FULL, M::BLOCK);
#pragma unroll
            for (int c = 0; c < M::PANELS; c++)
                hopper_load(to + M::V + c * HOPPER_KEYS * 128, &map.v, barriers + M::V_FULL, 64 * c,
                            row + i * HOPPER_KEYS, v, head);
            step(stage, stage_free, M::STAGES);
        }
    }
    __device__ __forceinline__ void run()
    {
        for (int full = 0;; full ^= 1) {
            const uint32_t at = memory + M::TILE + HOPPER_TILE * slot;
            hopper_wait(memory + M::Q_FREE + 8 * slot, slot_free);
            hopper_wait(memory + M::FOUND_FULL, full);
#pragma unroll
            for (int i = 0; i < HOPPER_TILE; i += 16) hopper_put_four(at + i, hopper_four(memory + M::FOUND + i));
            hopper_arrive(memory + M::FOUND_FREE);
            const volatile hopper_forward_tile &f = *(const hopper_forward_tile *)__cvta_shared_to_generic(at);
            if (f.g == HOPPER_STOP) break;
            queries(f, p.map[f.g]);
            step(slot, slot_free, M::SLOTS);
            keys(f, p.map[f.g]);
        }
        hopper_arrive(memory + M::Q_FULL + 8 * slot);
    }
};

#endif
