/* attn_hopper_forward.cuh: the work of the forward on Hopper: arguments, places in shared memory, and the warps that
 * feed the warpgroups.
 *
 * The scout claims the next tile from a counter and works out what it is: branch, segment, head, rows, keys. The loader
 * takes the result over, asks for queries, keys and values, and hands both to the warpgroups. They are two warps,
 * because a dozen divisions would otherwise stand between the last block of one tile and the first of the next.
 *
 * A tile is up to 64 rows for each warpgroup. The groups of 64 rows of a segment are spread evenly over its tiles, so
 * that none is left with a single busy warpgroup; later tiles get what remains, because the last rows have the most
 * work where there is a mask. Tiles of several (item, segment, head) are interleaved where rows have different work
 * (causal): heavy ones first, as many as have their keys and values in half the cache together. Where branches meet,
 * only those of the last branch are, and the others run head by head: the next branch can begin with what is done.
 *
 * Rows shorter than 64 or 128 numbers are padded with zeros by the bulk copies, which neither read nor write what lies
 * beyond a row's end.
 *
 * Where branches meet, a tile begins with what earlier branches made of its rows. The scout's warp finds out for each
 * row whether others reach it, before and after; another warp (hopper_carrier) waits until what is before is out, and
 * says so when the tile's own sums are. Tensor cores wait for neither, as long as it is done a tile ahead.
 *
 * Above a head dimension of 128 the queries take 64 KB and have one place. Each warpgroup gives its part of it back
 * when its last scores are out, and gets the next tile's beside its last product and its results, which leave from
 * registers.
 *
 * Two more warps, or one, write zeros where no branch reaches (hopper_fill), beside the products. Rejected: a pass
 * before the launch, which took half as long as the attention itself at a dilation of 16.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_FORWARD_CUH
#define LAC_CUDA_ATTN_HOPPER_FORWARD_CUH
#include "attn_hopper_fp8.cuh"
#include "attn_hopper_pairs.cuh"
#include "hopper.cuh"
#include <cfloat>

enum { HOPPER_BRANCHES = 16 }; /* most branches of a plan: every one has its tensor maps among the arguments */
enum { HOPPER_KEYS = 128, HOPPER_KEYS_WIDE = 80 };     /* keys of a block; above a head dimension of 128 */
enum { HOPPER_TILE = 224 };                            /* bytes that describe a tile */
enum { HOPPER_USUAL = 1, HOPPER_SMALL, HOPPER_TEAMS }; /* active blocks; of at most 64 rows; see there */
enum { HOPPER_STOP = -1 };                             /* instead of a branch: there are no more tiles */
enum { HOPPER_LIST = 32, HOPPER_LISTS = 4 };           /* pieces of a list, and lists (attn_hopper_blocks.cuh) */

/* x / d of 0 <= x < 2^31 by a product: e = factor d - 2^(31 + shift) is below d <= 2^shift, so that e x < 2^(31 +
 * shift) */
struct hopper_divisor {
    uint32_t factor, shift;
    __device__ __forceinline__ int of(int x) const { return (int)(__umulhi(2 * (uint32_t)x, factor) >> shift); }
};

struct hopper_forward_maps {
    CUtensorMap q, k, v, out;
};
/* what tells which branches reach a row */
struct hopper_lattices {
    struct of {
        hopper_divisor segment, dilation, rule;
        int offset, each, inner; /* offset + each h + inner (h / rule), whatever the rule: fewer registers */
    } branch[HOPPER_BRANCHES];
    hopper_divisor heads, n;
};
struct hopper_forward_args {
    hopper_forward_maps map[HOPPER_BRANCHES];
    attn_pair_args a;
    int same[HOPPER_BRANCHES]; /* the first branch of the same dilation, whose maps serve all of them */
    int tiles, items[HOPPER_BRANCHES], together[HOPPER_BRANCHES]; /* items of a branch; and those interleaved */
    int turns, each;                                              /* branches that take turns, or 1; tiles of a turn */
    int q_step, k_step, v_step, out_step;                         /* tokens from one batch item to the next */
    hopper_lattices lattices;
    bool gaps;   /* may there be rows that no branch reaches? */
    bool masks;  /* can a row miss keys of a block that holds some of its own? */
    bool small;  /* HOPPER_SMALL */
    int *claims; /* tiles claimed beyond the first of each thread block; thread blocks that have ended */
    int *spoilt,
        call; /* the number of the last call with a result that is not finite where pairs are masked; and of this */
    hopper_dropout dropout;
    hopper_eight eight;
    const hopper_kept *padding; /* of each batch item; NULL: there is no padding */
};

/* Of a tile's blocks of keys, what one warpgroup needs: blocks [lead, ends / 2) hold keys of its rows, and if `ends` is
 * odd, half of one more does; [plain, full) hold no masked pair. */
struct alignas(16) hopper_forward_part {
    int lead, ends, plain, full;
};
/* Where there are active blocks: up to 64 keys that are neighbours; `about`: how many, and from bit 8 on
 * four bits a warpgroup (HOPPER_MASKED). */
struct alignas(8) hopper_piece {
    int first, about;
};
/* The next keys of the tile, two pieces; `counts`: of both, the second's in the high half. `kinds`: 0 if there are
 * none; four bits a warpgroup. With one piece a step `second` is `first`, and `counts` is `kinds`, whose bits from
 * HOPPER_COUNT on are the count: two registers a step for the feeder. */
struct alignas(16) hopper_step {
    int first, second, kinds, counts;
};
enum { HOPPER_MASKED = 1, HOPPER_HALF = 2, HOPPER_GROUP = 4, HOPPER_SOME = 1 << 16, HOPPER_COUNT = 20 };
struct alignas(16) hopper_forward_tile {
    int g, low, blocks, groups; /* g HOPPER_STOP: none; first key that any row sees; blocks of keys; of 64 rows */
    union {
        hopper_forward_part part[3];
        hopper_step begin;
    };
    attn_tile t;
    int64_t at;     /* (b N + n) H + h of row 0 of the lattice */
    int step, rows; /* from row to row; query rows of the segment's lattice */
    int query, key; /* positions of the lattice's first query row and key, in tokens of the item */
    int kv_head, map;
    uint32_t before[6], after[6]; /* where branches meet: rows that earlier, later ones reach, a bit a row */
    float slope;                  /* what a score loses for each key of the lattice between it and the row */
    /* eight bits: base-2 scores are products times `score`, results sums times `value`; the lattice's values */
    float score, value;
    union {
        int values;
        int holes; /* may keys of the tile be padding? */
    };
};
static_assert(sizeof(hopper_forward_tile) == HOPPER_TILE, "copied by 16 bytes");

/* Warpgroups with rows; the usual block has 128. Of small ones, two thread blocks share a multiprocessor. */
constexpr int hopper_groups(int d, int blocks, bool two)
{
    if (blocks == HOPPER_SMALL) return 1;
    return d == 64 && !blocks && !two ? 3 : 2;
}
/* Sizes, and addresses in shared memory. T: of q, k and v. BLOCKS: there are active blocks (attn_hopper_blocks.cuh).
 * ADDED: there are masks and biases, for whose addresses three warpgroups of D = 64 have no registers. Of
 * eight bits, rows of 64 numbers take the 128 bytes of an operand's rows too. */
template <class T, int D, int BLOCKS, bool ADDED = false> struct hopper_forward_shape {
    static constexpr bool EIGHT = std::is_same_v<T, e4m3>, STEPPED = BLOCKS > 0, SMALL = BLOCKS == HOPPER_SMALL;
    static constexpr bool TEAMED = BLOCKS == HOPPER_TEAMS;
    enum {
        DIM = D,
        WIDE = D > 128,
        KEYS = WIDE     ? HOPPER_KEYS_WIDE
               : TEAMED ? HOPPER_KEYS / 2
                        : HOPPER_KEYS,
        PIECES = KEYS / 64,     /* of a step */
        TEAMS = TEAMED ? 2 : 1, /* warpgroups with a tile, and warps that feed them; each with memory of its own */
        GROUPS = hopper_groups(D, BLOCKS, EIGHT || ADDED),
        TOGETHER = SMALL ? 2 : 1,                      /* thread blocks of a multiprocessor */
        STAGES = !SMALL && (D == 64 || EIGHT) ? 4 : 2, /* of keys, values; powers of two: others cost registers */
        SLOTS = 2,                                     /* of queries; results leave through the same memory */
        PLACES = WIDE ? 1 : SLOTS,                     /* of queries themselves */
        LATE = TEAMED    ? 6
               : D == 64 ? 12
               : WIDE    ? 10
                         : 8, /* eight columns each, whose weights do not wait for product with values */
        THREADS_ = 128 * (GROUPS * TEAMS + 1),
        PANELS = D / 64,
        PANEL = 64 * 128, /* 64 rows of 64 columns */
        QUERIES = GROUPS * PANELS * PANEL,
        READ = EIGHT ? 1 : PANELS, /* panels of queries and keys: 128 bytes of a row each */
        ALIGNED = EIGHT ? 16 : 1,  /* blocks of keys begin at multiples */
        BLOCK = KEYS * READ * 128
    };
    enum {
        Q = 0,
        K = Q + PLACES * QUERIES,
        V = K + STAGES * BLOCK,
        TILE = V + STAGES * BLOCK, /* of each slot; then what the scout has found */
        FOUND = TILE + SLOTS * HOPPER_TILE,
        BEFORE = FOUND + HOPPER_TILE, /* of each slot's rows: base-2 lse of earlier branches */
        FOUND_FULL = BEFORE + SLOTS * GROUPS * 64 * 4,
        FOUND_FREE = FOUND_FULL + 8,
        Q_FULL = FOUND_FREE + 8,
        Q_FREE = Q_FULL + 8 * SLOTS,
        K_FULL = Q_FREE + 8 * SLOTS,
        K_FREE = K_FULL + 8 * STAGES,
        V_FULL = K_FREE + 8 * STAGES,
        V_FREE = V_FULL + 8 * STAGES,
        CARRIED = V_FREE + 8 * STAGES,             /* BEFORE holds a slot's, and earlier branches' sums are out */
        DONE = CARRIED + 8 * SLOTS,                /* the sums of a slot's tile are out */
        STEPS = (DONE + 8 * SLOTS + 15) / 16 * 16, /* BLOCKS: of each stage the step that follows, twice as long */
        LIST = STEPS + STEPPED * 2 * STAGES * (int)sizeof(hopper_step), /* BLOCKS: pieces */
        LIST_FULL = LIST + STEPPED * HOPPER_LISTS * HOPPER_LIST * (int)sizeof(hopper_piece),
        LIST_FREE = LIST_FULL + STEPPED * HOPPER_LISTS * 8,
        TAKEN = LIST_FREE + STEPPED * HOPPER_LISTS * 8, /* WIDE: a slot's tile is known; Q_FULL is a warpgroup's then */
        PLACE_FREE = TAKEN + WIDE * 8 * SLOTS,          /* WIDE: of each warpgroup's queries */
        NEXT = PLACE_FREE + WIDE * 8 * GROUPS,          /* TEAMED: the number of the scout's next tile */
        ENDS = NEXT + TEAMED * 8,
        TEAM = (ENDS + 1023) / 1024 * 1024, /* from the memory of one to that of the next */
        MEMORY = TEAMS == 1 ? (int)ENDS : TEAMS * TEAM
    };
    static constexpr int FEEDER_REGISTERS = GROUPS == 3 || TEAMED ? 32 : 40;
    /* a launch gives all threads equally many */
    static constexpr int REGISTERS = 65536 / TOGETHER / THREADS_ / 8 * 8 * THREADS_ / 128;
    static constexpr int GROUP_REGISTERS = (REGISTERS - FEEDER_REGISTERS) / (GROUPS * TEAMS) / 8 * 8;
    static_assert(!WIDE || (int)GROUPS == (int)SLOTS, "as many barriers Q_FULL");
    static_assert(MEMORY <= 232448 && TOGETHER * (MEMORY + 1024) <= 233472, "shared memory of a multiprocessor");
};

/* Hides from the compiler where a divisor comes from: it would keep reciprocals in registers that there are not. */
HOPPER_FN int hopper_opaque(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}

/* Bits of the thread's number, read where they are used: registers that the main loop does not have. */
template <int SHIFT, int COUNT> struct hopper_own {
    __device__ __forceinline__ hopper_own(int) {}
    __device__ __forceinline__ operator int() const
    {
        int x;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
        return x >> SHIFT & (COUNT - 1);
    }
};
template <bool LAZY, int SHIFT, int COUNT>
using hopper_own_if = std::conditional_t<LAZY, hopper_own<SHIFT, COUNT>, int>;

HOPPER_FN float hopper_log2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/* A branch that is never taken, on a value of at least 0: what waits for products may not move above what made it. */
HOPPER_FN void hopper_hold(float x)
{
    if (x < 0) asm volatile("trap;");
}
/* x plus two products of halves */
template <class T> HOPPER_FN float hopper_dot(uint32_t a, uint32_t b, float x)
{
    if constexpr (std::is_same_v<T, bf16>) {
        x = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), x);
        return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), x);
    }
    const float2 u = __half22float2(*(const __half2 *)&a), v = __half22float2(*(const __half2 *)&b);
    return fmaf(u.y, v.y, fmaf(u.x, v.x, x));
}

/* x += scores of two rows by N / 4 pairs of keys, two columns at a time, where there are no registers for more: q and k
 * are where the first row and the first pair's keys are in shared memory; what their chunks are swizzled by. */
template <class T, int D, int N>
HOPPER_FN void hopper_scores_again(float (&x)[N], uint32_t q, uint32_t k, int row, int key)
{
    static_assert(D == 64, "one panel");
#pragma unroll 1
    for (int d = 0; d < D / 2; d++) {
        const uint32_t from = q + (((d >> 2) ^ row) << 4) + (d & 3) * 4;
        const uint32_t u = hopper_word(from), v = hopper_word(from + 1024);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const uint32_t at = k + e * 128 + (((d >> 2) ^ (key + e)) << 4) + (d & 3) * 4;
#pragma unroll
            for (int i = 0; i < N / 4; i++) {
                const uint32_t c = hopper_word(at + i * 1024);
                x[4 * i + e] = hopper_dot<T>(u, c, x[4 * i + e]);
                x[4 * i + 2 + e] = hopper_dot<T>(v, c, x[4 * i + 2 + e]);
            }
        }
    }
}

/* The same, eight columns at a time, of panels of 64 rows for each of GROUPS warpgroups */
template <class T, int D, int GROUPS, int N>
HOPPER_FN void hopper_scores_again_by_eight(float (&x)[N], uint32_t q, uint32_t k, int row, int key)
{
#pragma unroll 1
    for (int d = 0; d < D / 8; d++) {
        const uint32_t from = q + (d >> 3) * GROUPS * 64 * 128 + (((d & 7) ^ row) << 4);
        const int4 y = hopper_four(from), z = hopper_four(from + 1024);
        const uint32_t u[4] = {(uint32_t)y.x, (uint32_t)y.y, (uint32_t)y.z, (uint32_t)y.w};
        const uint32_t v[4] = {(uint32_t)z.x, (uint32_t)z.y, (uint32_t)z.z, (uint32_t)z.w};
#pragma unroll
        for (int i = 0; i < N / 4; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int4 w =
                    hopper_four(k + (d >> 3) * 2 * N * 128 + (8 * i + e) * 128 + (((d & 7) ^ (key + e)) << 4));
                const uint32_t c[4] = {(uint32_t)w.x, (uint32_t)w.y, (uint32_t)w.z, (uint32_t)w.w};
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    x[4 * i + e] = hopper_dot<T>(u[n], c[n], x[4 * i + e]);
                    x[4 * i + 2 + e] = hopper_dot<T>(v[n], c[n], x[4 * i + 2 + e]);
                }
            }
    }
}

/* scouts of the launch */
template <class M> HOPPER_FN int hopper_scouts()
{
    if constexpr (M::TEAMED) {
        int x;
        asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(x));
        return M::TEAMS * x;
    } else return (int)gridDim.x;
}

/* of an item and head in branch g: tiles that are done */
HOPPER_FN int *hopper_done(const hopper_forward_args &p, const volatile attn_tile &t, int g)
{
    return p.a.counter + 1 + ((int64_t)g * p.a.batch + t.b) * p.a.heads + t.h;
}

template <int KEYS> HOPPER_FN void hopper_part(hopper_forward_tile &f, int w)
{
    const attn_tile &t = f.t;
    const int row = t.first + w * 64, low = f.low, blocks = f.blocks;
    const int least = max(row - t.before - low, 0), highest = min(t.live, row + 64 + t.after) - low;
    const int lead = min(least / KEYS, blocks);
    const int halves = min((highest + KEYS / 2 - 1) / (KEYS / 2), 2 * blocks);
    f.part[w].lead = lead;
    f.part[w].ends = highest > least && row < t.end ? halves : 2 * lead;
    f.part[w].plain = (max(row + 63 - t.before - low, 0) + KEYS - 1) / KEYS;
    f.part[w].full = max(min(t.live, row + t.after + 1) - low, 0) / KEYS;
}

/* Row number of a lattice at or after a position that is below 2^31. */
HOPPER_FN int hopper_count(const volatile attn_tile &t, unsigned position)
{
    const unsigned base = (unsigned)t.base;
    const unsigned last = position - base - 1;
    return position <= base ? 0 : (int)(t.r == 1 ? last : last / (unsigned)t.r) + 1;
}
/* attn_rows in 32 bits: the tile's rows, all of one block of rows. False if there are none. */
HOPPER_FN bool hopper_block_rows(const attn_pair_args &a, int number, int height, attn_tile &t)
{
    const attn_branch &br = a.branch[t.g];
    const int pieces = attn_pieces(br, a.block, height), each = number / hopper_opaque(pieces);
    const int start = (int)t.base - attn_offset(a, t.g, t.h) - a.shift;
    const int cell = max(start, 0) / hopper_opaque(a.block) + each, at = cell * a.block + a.shift;
    const int from = hopper_count(t, (unsigned)max(at, 0)), to = hopper_count(t, (unsigned)max(at + a.block, 0));
    t.first = max(from, t.q0) + (number - each * pieces) * height;
    t.end = min(t.first + height, min(to, t.q1));
    return t.first < t.end;
}

/* eight bits: what turns products into scores and sums into results, and where the values are */
HOPPER_FN void hopper_scales(const hopper_forward_args &p, hopper_forward_tile &f, int segment)
{
    const hopper_eight &x = p.eight;
    const int kv = f.t.b * p.a.kv_heads + f.kv_head;
    f.score = (float)((double)x.q[f.t.b * p.a.heads + f.t.h] * (double)x.k[kv] * (p.a.scale * ATTN_LOG2E));
    f.score = fmaxf(f.score, FLT_MIN); /* masked scores are -inf, and zero times that is NaN */
    f.value = x.v[kv];
    f.values = (hopper_values(x, p.a.branch[f.g], f.g, f.t.b, f.t.h, segment) + 1) * p.a.head_dim;
}

/* Active blocks: which block of rows of which item is tile number id of branch g? Where causal, the upper half of all
 * items' tiles comes first, then the upper half of the rest, and so on: a launch ends with light tiles, which even out
 * when thread blocks end. Each time twice as many items are interleaved, which have half as many keys. */
HOPPER_FN void hopper_place(const hopper_forward_args &p, int g, int id, int &block, int &item)
{
    const int items = p.items[g];
    int together = p.together[g], low = 0, high = p.a.branch[g].blocks;
    const bool halves = p.a.causal && p.a.branch[g].rank == p.a.ranks - 1;
#pragma unroll 1
    for (; halves && together < items && high > 1; together = min(2 * together, items)) {
        const int half = high / 2, tiles = items * (high - half);
        if (id < tiles) {
            low = half;
            break;
        }
        id -= tiles, high = half;
    }
    const int blocks = high - low, part = id / hopper_opaque(together * blocks);
    id -= part * together * blocks;
    const int members = min(together, items - part * together);
    block = id / hopper_opaque(members), item = part * together + id - block * members;
    if (p.a.causal) block = high - 1 - block;
}

/* Tile number -> tile; false if it has no rows. */
template <class M, int OPTIONS> HOPPER_FN bool hopper_find(const hopper_forward_args &p, int id, hopper_forward_tile &f)
{
    constexpr int GROUPS = M::GROUPS;
    const attn_pair_args &a = p.a;
    int g = 0;
    if (p.turns > 1) {
        const int tiles = (int)a.branch[0].tiles, turn = id / hopper_opaque(p.turns * p.each), from = turn * p.each;
        const int each = min(p.each, tiles - from); /* p.each divides tiles, so never the second; measured with it */
        id -= from * p.turns;
        g = id / hopper_opaque(each);
        id += (int)a.branch[g].begin + from - g * each;
    }
#pragma unroll 1
    while (id < (int)a.branch[g].begin || id >= (int)(a.branch[g].begin + a.branch[g].tiles)) g++;
    const attn_branch &br = a.branch[g];
    attn_tile &t = f.t;
    id -= (int)br.begin;
    int block, item;
    if constexpr (M::STEPPED) hopper_place(p, g, id, block, item);
    else {
        const int together = p.together[g], part = id / hopper_opaque(together * br.blocks);
        id -= part * together * br.blocks;
        const int members = min(together, p.items[g] - part * together);
        block = id / hopper_opaque(members), item = part * together + id - block * members;
        if (a.causal) block = br.blocks - 1 - block;
    }
    /* items one segment after the other; where branches meet, one head after the other, so that heads are done early */
    const int inner = hopper_opaque(a.ranks > 1 ? br.segments : br.heads), outer = item / inner;
    const int span = a.ranks > 1 ? br.heads : br.segments, b = outer / hopper_opaque(span);
    const int x = item - outer * inner, y = outer - b * span;
    attn_span(a, g, b, br.head0 + (a.ranks > 1 ? y : x), br.segment0 + (a.ranks > 1 ? x : y), t);
    f.rows = t.q1 - t.q0;
    if constexpr (M::STEPPED) {
        if (!hopper_block_rows(a, block, 64 * GROUPS, t)) return false;
        f.groups = (t.end - t.first + 63) / 64;
    } else {
        const int groups = (f.rows + 63) / 64, tiles = (groups + GROUPS - 1) / GROUPS;
        if (block >= tiles) return false;
        const int each = groups / hopper_opaque(tiles), fewer = tiles - (groups - each * tiles);
        f.groups = each + (block >= fewer); /* the last ones have one more: where causal, they have the most keys */
        t.first = t.q0 + 64 * (block * each + max(block - fewer, 0));
        t.end = min(t.q1, t.first + 64 * f.groups);
    }
    int least = max(t.first - t.before, 0);
    const int high = min(t.live, t.end + t.after);
    if (OPTIONS & HOPPER_PADDED && p.padding) {
        least = max(least, hopper_count(t, (unsigned)p.padding[b].first));
        f.holes = p.padding[b].holes;
    } else if (OPTIONS & HOPPER_PADDED) f.holes = 0;
    const int low = least / M::ALIGNED * M::ALIGNED;
    f.g = g;
    f.low = low;
    f.blocks = high > least ? (high - low + M::KEYS - 1) / M::KEYS : 0;
    if constexpr (!M::STEPPED) {
#pragma unroll 1
        for (int w = 0; w < GROUPS; w++) hopper_part<M::KEYS>(f, w);
    }
    f.query = (int)(t.base + (int64_t)t.q0 * t.r - a.shift);
    f.key = (int)t.base;
    f.at = ((int64_t)b * a.n + (t.base - a.shift)) * a.heads + t.h;
    f.step = t.r * a.heads;
    f.kv_head = t.h / hopper_opaque(a.group);
    f.map = p.same[g];
    if constexpr (M::EIGHT) hopper_scales(p, f, a.ranks > 1 ? x : y);
    return true;
}

/* attn_offset and attn_keeps without divisions; the latter of a branch that runs for the head */
HOPPER_FN int hopper_offset(const hopper_forward_args &p, int g, int h)
{
    const hopper_lattices::of &x = p.lattices.branch[g];
    return x.offset + x.each * h + x.inner * x.rule.of(h);
}
HOPPER_FN bool hopper_keeps(const hopper_forward_args &p, int g, int offset, int position)
{
    const attn_branch &br = p.a.branch[g];
    const hopper_lattices::of &x = p.lattices.branch[g];
    const int s = x.segment.of(position), at = position - s * br.segment - offset;
    /* no branches: where a warp takes many of them, the warpgroups' registers suffer */
    return (at >= 0) & (at == x.dilation.of(at) * br.dilation) & ((unsigned)(s - br.segment0) < (unsigned)br.segments);
}

/* Which rows of the tile do other branches reach? By a warp. */
template <int GROUPS> HOPPER_FN void hopper_others(const hopper_forward_args &p, hopper_forward_tile &f, int lane)
{
    int offset = 0, order = 0; /* of the branch with the lane's number */
    if (lane < p.a.branches && attn_runs(p.a, lane, f.t.h)) {
        offset = hopper_offset(p, lane, f.t.h);
        order = p.a.branch[lane].rank - p.a.branch[f.g].rank;
    }
#pragma unroll 1
    for (int e = 0; e < 2 * GROUPS; e++) { /* 32 rows */
        const int i = f.t.first + 32 * e + lane;
        bool before = false, after = false;
#pragma unroll 1
        for (int g = 0; g < p.a.branches; g++) {
            const int from = __shfl_sync(~0u, offset, g), other = __shfl_sync(~0u, order, g);
            if (other == 0) continue;
            const bool kept = (i < f.t.end) & hopper_keeps(p, g, from, f.key + i * f.t.r);
            before |= kept & (other < 0);
            after |= kept & (other > 0);
        }
        f.before[e] = __ballot_sync(~0u, before);
        f.after[e] = __ballot_sync(~0u, after);
    }
}

/* Where there are active blocks: the tile's keys, in pieces, for the warp that loads; `tail`: pieces so far, and room
 * that was left (attn_hopper_blocks.cuh). */
template <class M>
HOPPER_FN void hopper_list(const hopper_forward_args &p, const hopper_forward_tile &f, uint32_t memory, uint32_t &tail);

/* All lanes do the same, except where branches meet. */
template <class M, bool MEETS, int OPTIONS> HOPPER_FN void hopper_scout(const hopper_forward_args &p, uint32_t memory)
{
    hopper_forward_tile &f = *(hopper_forward_tile *)__cvta_shared_to_generic(memory + M::FOUND);
    const hopper_own_if<M::TEAMED, 0, 32> lane((int)(threadIdx.x % 32));
    int id = (int)blockIdx.x + (M::TEAMED ? threadIdx.x / 64 * gridDim.x : 0), free = 1;
    uint32_t tail = 0;
#pragma unroll 1
    while (id < p.tiles) {
        hopper_wait(memory + M::FOUND_FREE, free);
        int next = 0;
        if (lane == 0) next = atomicAdd(p.claims, 1) + hopper_scouts<M>(); /* takes a while, and not too early */
        if (M::TEAMED && lane == 0) hopper_put_two(memory + M::NEXT, next, 0);
        const bool rows = hopper_find<M, OPTIONS>(p, id, f);
        __syncwarp();
        if (rows) {
            if (OPTIONS & HOPPER_PAIRS) f.slope = hopper_slope(p.a, f.t.h, f.t.r);
            if (MEETS) hopper_others<M::GROUPS>(p, f, lane);
            __syncwarp();
            if (lane == 0) hopper_arrive(memory + M::FOUND_FULL);
            if constexpr (M::STEPPED) hopper_list<M>(p, f, memory, tail);
            free ^= 1;
        } else if (MEETS && lane == 0) atomicAdd(hopper_done(p, f.t, f.t.g), 1);
        if constexpr (M::TEAMED) {
            id = (int)hopper_word(memory + M::NEXT);
            __syncwarp();
        } else id = __shfl_sync(~0u, next, 0);
    }
    hopper_wait(memory + M::FOUND_FREE, free);
    if (lane != 0) return;
    f.g = HOPPER_STOP;
    hopper_arrive(memory + M::FOUND_FULL);
    if (atomicAdd(p.claims + 1, 1) == hopper_scouts<M>() - 1) p.claims[0] = p.claims[1] = 0; /* for the next launch */
}

/* Zeros, and lse -inf, in rows that no branch reaches, by one of `warps` warps that have nothing else to do: D numbers
 * a row from 32 rows at a time that are neighbours in memory. They run beside the products, which leave the memory
 * alone.
 */
template <int D> HOPPER_FN void hopper_fill(const hopper_forward_args &p, int warp, int warps)
{
    const attn_args &a = p.a;
    const unsigned lane = threadIdx.x % 32, rows = (unsigned)(a.batch * a.n) * (unsigned)a.heads;
    const int4 zeros = {0, 0, 0, 0};
    const int chunks = a.head_dim / 8; /* of 16 bytes in a row */
    const bool writes = (int)lane % (D / 8) < chunks;
#pragma unroll 1
    for (unsigned first = (blockIdx.x * warps + warp) * 32; first < rows; first += gridDim.x * warps * 32) {
        const int row = (int)(first + lane), token = p.lattices.heads.of(row), h = row - token * a.heads;
        const int position = token - p.lattices.n.of(token) * a.n + a.shift;
        bool reached = (unsigned)row >= rows;
#pragma unroll 1
        for (int g = 0; g < a.branches && position >= 0; g++)
            reached = reached || (attn_runs(a, g, h) && hopper_keeps(p, g, hopper_offset(p, g, h), position));
        if (!reached) ((float *)a.lse)[row] = -INFINITY;
        const unsigned gaps = __ballot_sync(~0u, !reached) >> lane / (D / 8);
        int4 *to = (int4 *)a.out + (size_t)(first + lane / (D / 8)) * chunks + lane % (D / 8);
#pragma unroll
        for (int i = 0; i < D / 8; i++, to += 256 / D * chunks)
            if (writes && gaps >> 256 / D * i & 1) *to = zeros;
    }
}

/* Where branches meet: a warp that fetches the lse that a tile's rows begin with, once all earlier branches' sums are
 * out, and that says when a tile's own are. It never waits for one of the two, because the other may be what some tile
 * that it waits for is waiting for. */
template <class M> struct hopper_carrier {
    const hopper_forward_args &p;
    const uint32_t memory;
    const int lane;
    int ready, told; /* tiles that are prepared; that are known to be done */
    __device__ __forceinline__ hopper_carrier(const hopper_forward_args &p, uint32_t memory)
        : p(p), memory(memory), lane(threadIdx.x % 32), ready(0), told(0)
    {
    }
    __device__ __forceinline__ const volatile hopper_forward_tile &tile(int number) const
    {
        return *(const hopper_forward_tile *)__cvta_shared_to_generic(memory + M::TILE + HOPPER_TILE * (number & 1));
    }
    __device__ __forceinline__ bool ended(int barriers, int number) const
    {
        return __all_sync(~0u, hopper_ended(memory + barriers + 8 * (number & 1), number >> 1 & 1));
    }
    /* are all tiles of smaller rank of the tile's item and head done? */
    __device__ __forceinline__ bool out(const volatile hopper_forward_tile &f) const
    {
        int missing = 0;
        if (lane < p.a.branches && p.a.branch[lane].rank < p.a.branch[f.g].rank && attn_runs(p.a, lane, f.t.h)) {
            const attn_branch &br = p.a.branch[lane];
            int seen;
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                         : "=r"(seen)
                         : "l"(hopper_done(p, f.t, lane))
                         : "memory");
            missing = br.segments * br.blocks - seen;
        }
        return __all_sync(~0u, missing <= 0);
    }
    __device__ __forceinline__ void prepare(int number) const
    {
        const volatile hopper_forward_tile &f = tile(number);
        float *before = (float *)__cvta_shared_to_generic(memory + M::BEFORE + 256 * M::GROUPS * (number & 1));
        const float *lse = (const float *)p.a.lse + f.at + (int64_t)(f.t.first + lane) * f.step;
        float old[2 * M::GROUPS];
#pragma unroll
        for (int e = 0; e < 2 * M::GROUPS; e++, lse += (int64_t)32 * f.step)
            old[e] = f.before[e] >> lane & 1 ? __ldcg(lse) : -INFINITY;
#pragma unroll
        for (int e = 0; e < 2 * M::GROUPS; e++) before[32 * e + lane] = old[e] * (float)ATTN_LOG2E;
        __syncwarp();
    }
    __device__ __forceinline__ void run()
    {
        for (bool more = true; more || told < ready;) {
            if (told < ready && ended(M::DONE, told)) {
                if (lane == 0) {
                    __threadfence();
                    atomicAdd(hopper_done(p, tile(told).t, tile(told).g), 1);
                    hopper_arrive(memory + M::Q_FREE + 8 * (told & 1));
                }
                told++;
            }
            if (more && ended(M::WIDE ? M::TAKEN : M::Q_FULL, ready)) {
                more = tile(ready).g != HOPPER_STOP;
                if (more && out(tile(ready))) {
                    prepare(ready);
                    if (lane == 0) hopper_arrive(memory + M::CARRIED + 8 * (ready & 1));
                    ready++;
                }
            }
            __nanosleep(50);
        }
    }
};

template <class M> struct hopper_feeder {
    const hopper_forward_args &p;
    const uint32_t memory;
    int slot, slot_free, stage, stage_free, place_free;
    __device__ __forceinline__ hopper_feeder(const hopper_forward_args &p, uint32_t memory)
        : p(p), memory(memory), slot(0), slot_free(1), stage(0), stage_free(1), place_free(1)
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
        hopper_expect(full, groups * (int)M::READ * (int)M::PANEL);
#pragma unroll 1
        for (int g = 0; g < groups; g++)
#pragma unroll
            for (int c = 0; c < M::READ; c++)
                hopper_load(to + (c * M::GROUPS + g) * M::PANEL, &map.q, full, 64 * c, row + 64 * g, z, head);
    }
    /* WIDE: those of each warpgroup when it has no more use for the last ones */
    __device__ __forceinline__ void queries_apart(const volatile hopper_forward_tile &f, const hopper_forward_maps &map)
    {
        const int rows = f.rows, row = HOPPER_WRAP - rows + f.t.first - f.t.q0, head = f.t.h, groups = f.groups;
        const int z = f.t.b * p.q_step + f.query + rows * f.t.r;
#pragma unroll 1
        for (int g = 0; g < M::GROUPS; g++) {
            const uint32_t full = memory + M::Q_FULL + 8 * g, to = memory + M::Q + g * M::PANEL;
            hopper_wait(memory + M::PLACE_FREE + 8 * g, place_free);
            if (g >= groups) { /* no rows, but the warpgroup frees what it does not need */
                hopper_arrive(full);
                continue;
            }
            hopper_expect(full, M::PANELS * M::PANEL);
#pragma unroll
            for (int c = 0; c < M::PANELS; c++)
                hopper_load(to + c * M::GROUPS * M::PANEL, &map.q, full, 64 * c, row + 64 * g, z, head);
        }
        place_free ^= 1;
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
            for (int c = 0; c < M::READ; c++)
                hopper_load(to + M::K + c * M::KEYS * 128, &map.k, barriers + M::K_FULL, 64 * c, row + i * M::KEYS, k,
                            head);
            if (M::WIDE && i == 0) queries_apart(f, map); /* they may have to wait */
            hopper_wait(barriers + M::V_FREE, stage_free);
            if constexpr (M::EIGHT) { /* D rows of keys */
                hopper_expect(barriers + M::V_FULL, M::DIM * 128);
                hopper_load(to + M::V, &p.map[f.g].v, barriers + M::V_FULL, f.low + i * HOPPER_KEYS,
                            HOPPER_WRAP - p.a.head_dim, f.values, 0);
            } else {
                hopper_expect(barriers + M::V_FULL, M::BLOCK);
#pragma unroll
                for (int c = 0; c < M::PANELS; c++)
                    hopper_load(to + M::V + c * M::KEYS * 128, &map.v, barriers + M::V_FULL, 64 * c, row + i * M::KEYS,
                                v, head);
            }
            step(stage, stage_free, M::STAGES);
        }
    }
    __device__ __forceinline__ void take(uint32_t at, int full) /* the tile that the scout has found */
    {
        hopper_wait(memory + M::Q_FREE + 8 * slot, slot_free);
        hopper_wait(memory + M::FOUND_FULL, full);
#pragma unroll(M::TEAMED ? 2 : HOPPER_TILE / 16)
        for (int i = 0; i < HOPPER_TILE; i += 16) hopper_put_four(at + i, hopper_four(memory + M::FOUND + i));
        hopper_arrive(memory + M::FOUND_FREE);
    }
    __device__ __forceinline__ void run()
    {
        for (int full = 0;; full ^= 1) {
            const uint32_t at = memory + M::TILE + HOPPER_TILE * slot;
            take(at, full);
            const volatile hopper_forward_tile &f = *(const hopper_forward_tile *)__cvta_shared_to_generic(at);
            if (f.g == HOPPER_STOP) break;
            if constexpr (M::WIDE) {
                hopper_arrive(memory + M::TAKEN + 8 * slot);
                if (f.blocks == 0) queries_apart(f, p.map[f.map]);
            } else queries(f, p.map[f.map]);
            step(slot, slot_free, M::SLOTS);
            keys(f, p.map[f.map]);
        }
        if constexpr (M::WIDE) {
            hopper_arrive(memory + M::TAKEN + 8 * slot);
            for (int g = 0; g < M::GROUPS; g++) { /* the last queries may still be on their way */
                hopper_wait(memory + M::PLACE_FREE + 8 * g, place_free);
                hopper_arrive(memory + M::Q_FULL + 8 * g);
            }
        } else hopper_arrive(memory + M::Q_FULL + 8 * slot);
    }
};

#endif
