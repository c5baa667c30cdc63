/* attn_hopper_feed.cuh: the backward of attention on Hopper: arguments, what lies where in shared memory, and the warps
 * that feed the warpgroups of attn_hopper_keys.cuh and carry sums of dq away. One thread of each works.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_FEED_CUH
#define LAC_CUDA_ATTN_HOPPER_FEED_CUH
#include "attn_hopper_backward.cuh"
#include "attn_hopper_pairs.cuh"
#include "attn_mma.cuh"

enum {
    HOPPER_BLOCKS = 8
}; /* an option of instances beside those of attn_hopper_pairs.cuh: active blocks, without others */

struct hopper_keys_branch {
    CUtensorMap q, k, v, g, dk, dv;
    int blocks, dilation, after, before;
    int rank, meets;   /* meets: others may reach its keys */
    int awaits, needs; /* as in hopper_branch, but warpgroups */
};
struct hopper_keys_args {
    hopper_keys_branch branch[LAC_HOPPER_BRANCHES];
    attn_pair_args a;
    hopper_dropout dropout;
    const hopper_tile *tile;
    float *stats, *dq;
    int *turn, *counter, *ready, *spoilt;
    int tiles, late_first;
    int batch_step[6]; /* tokens from one batch item to the next, in the order of the maps */
    int heads_each, masks;
    float log2_scale, masked, weight, scale; /* masked: the score of a masked pair; weight: what dout is times */
    const hopper_kept *padding;              /* of each batch item; NULL: there is no padding */
    const uint32_t *steps;                   /* active blocks: see hopper_walk */
    const float *scales;                     /* of sums of dq in fixed point */
    hopper_steps place[LAC_HOPPER_BRANCHES];
};

/* Sizes, and addresses in shared memory. */
template <int D_, bool BLOCKS_> struct hopper_shape {
    enum {
        D = D_,
        BLOCKS = BLOCKS_,
        GROUPS = D == 64 && !BLOCKS ? 3 : 2,     /* warpgroups */
        STAGES = D == 64 && BLOCKS ? 4 : GROUPS, /* D = 64: the stage says whose turn it is at dq */
        STAT = BLOCKS ? 768 : 512,               /* bytes: lse, delta and scales of rows */
        CARRIERS = GROUPS,        /* a stage's blocks have one carrier: its barriers tell two rounds apart, not three */
        TILES = 2,                /* stages of k */
        VALUES = D == 64 ? 2 : 1, /* of v: D = 128 has room for sums of dq instead */
        KEYS = 64 * GROUPS,
        THREADS_ = 128 * (GROUPS + 1),
        PANELS = D / 64,
        PANEL = 64 * 128,
        BLOCK = PANELS * PANEL,
        TILE = GROUPS * BLOCK,
        DS = GROUPS * PANEL,
        SUMS = 64 * D * 4 /* of dq */
    };
    enum {
        K = 0,
        V = K + TILES * TILE,
        Q = V + VALUES * TILE,
        G = Q + STAGES * BLOCK,
        S = G + STAGES * BLOCK,
        DQ = S + STAGES * DS, /* D = 128; else sums lie in the stage of dS that they were made from */
        STATS = DQ + (D == 64 ? 0 : SUMS),
        STEP = STATS + STAGES * STAT, /* of two rounds of stages: block, its number, the tile's order, head */
        TILE_INFO = STEP + 2 * STAGES * 16,
        BARRIERS = TILE_INFO + TILES * 64,
        K_FULL = BARRIERS,
        V_FULL = K_FULL + 8 * TILES,
        V_FREE = V_FULL + 8 * TILES, /* D = 128; else v is free when the tile is */
        TILE_FREE = V_FREE + 8,
        Q_FULL = TILE_FREE + 8 * TILES,
        G_FULL = Q_FULL + 8 * STAGES,
        BLOCK_FREE = G_FULL + 8 * STAGES, /* q, dout and statistics */
        DS_FULL = BLOCK_FREE + 8 * STAGES,
        DS_FREE = DS_FULL + 8 * STAGES,
        DQ_FULL = DS_FREE + 8 * STAGES, /* the block's sums have been written */
        DQ_FREE = DQ_FULL + 8 * STAGES, /* D = 128; else the stage of dS is free when its sums are */
        MEMORY = DQ_FREE + 8
    };
    static constexpr __host__ __device__ int value(int tile_stage) { return VALUES == 1 ? 0 : tile_stage; }
    static constexpr int LOADER_REGISTERS = GROUPS == 3 ? 32 : 40, GROUP_REGISTERS = GROUPS == 3 ? 160 : 232;
    static_assert(STAGES % CARRIERS == 0, "one carrier a stage");
    static_assert(MEMORY <= 232448, "shared memory of a thread block");
    static_assert(128 * (LOADER_REGISTERS + GROUPS * GROUP_REGISTERS) <= THREADS_ * (65536 / THREADS_ / 8 * 8),
                  "registers that the launch gives a thread block; hopper_more() waits for ever for others");
};

/* ---- loaders and carriers: one thread each ---- */

/* groups of a tile's rows of k, or of v, from shared memory's `to` on */
template <class M>
HOPPER_FN void hopper_load_groups(uint32_t to, const CUtensorMap *map, uint32_t full, const volatile hopper_tile &t,
                                  int dilation, int step, int groups)
{
    const int row = HOPPER_WRAP - t.live + t.first * 64, z = t.batch * step + t.key0 + t.live * dilation;
    hopper_expect(full, groups * M::BLOCK);
#pragma unroll 1
    for (int g = 0; g < groups; g++)
#pragma unroll
        for (int c = 0; c < M::PANELS; c++)
            hopper_load(to + (c * M::GROUPS + g) * M::PANEL, map, full, 64 * c, row + 64 * g, z, t.kv_head);
}
template <class M>
HOPPER_FN void hopper_load_values(const hopper_keys_args &p, uint32_t memory, const volatile hopper_tile &t,
                                  const hopper_keys_branch &branch, int ts)
{
    hopper_load_groups<M>(memory + M::V + M::value(ts) * M::TILE, &branch.v, memory + M::V_FULL + 8 * M::value(ts), t,
                          branch.dilation, p.batch_step[2], t.width);
}
/* The blocks of rows that a tile meets, from the last to the first, or where tiles with late keys come first the other
 * way round. */
template <bool ACTIVE> struct hopper_walk {
    const hopper_keys_args &p;
    const volatile hopper_tile &at;
    int m;
    __device__ __forceinline__ hopper_walk(const hopper_keys_args &args, const volatile hopper_tile &t) : p(args), at(t)
    {
    }
    __device__ __forceinline__ void begin(int) { m = p.late_first ? at.low - 1 : at.high; }
    __device__ __forceinline__ bool next(int *to)
    {
        *to = m += p.late_first ? 1 : -1;
        return m >= at.low && m < at.high;
    }
    __device__ __forceinline__ int order() const { return at.order; }
};
/* The same of active blocks, from the tile's row of p.steps: a bit a block. */
template <> struct hopper_walk<true> {
    const hopper_keys_args &p;
    const volatile hopper_tile &at;
    const uint32_t *row;
    uint32_t some, then; /* blocks that are looked at, without those that are done; those after them */
    int number, words;
    __device__ __forceinline__ hopper_walk(const hopper_keys_args &args, const volatile hopper_tile &t) : p(args), at(t)
    {
    }
    __device__ __forceinline__ void begin(int member)
    {
        const hopper_steps &place = p.place[at.branch];
        row = p.steps + place.at + ((int64_t)(at.low + member) * place.tiles + at.order) * place.width + 1;
        number = -1, words = place.width - 1, some = 0, then = __ldg(row);
    }
    __device__ __forceinline__ bool next(int *to)
    {
        while (!some) {
            if (++number >= words) return false;
            some = then;
            if (number + 1 < words) then = __ldg(row + number + 1);
        }
        *to = 32 * number + __ffs((int)some) - 1;
        some &= some - 1;
        return true;
    }
    __device__ __forceinline__ int order() const { return 0; }
};

HOPPER_FN int claim(const hopper_keys_args &p) { return atomicAdd(p.counter, 1) + (int)gridDim.x; }
template <class M> HOPPER_FN void hopper_loader(const hopper_keys_args &p, uint32_t memory)
{
    int ts = 0, tp = 1, qs = 0, qp = 1, next = -1;
#pragma unroll 1
    for (int id = blockIdx.x; id < p.tiles; id = M::BLOCKS && next >= 0 ? next : claim(p)) {
        int before = M::STAGES; /* short tiles: the next one is claimed before this one is through */
        next = -1;
        const uint32_t info = memory + M::TILE_INFO + ts * 64;
        const int4 *from = (const int4 *)(p.tile + id);
        hopper_wait(memory + M::TILE_FREE + 8 * ts, tp);
#pragma unroll
        for (int i = 0; i < 4; i++) hopper_put_four(info + 16 * i, __ldg(from + i));
        const hopper_tile *t = (const hopper_tile *)__cvta_shared_to_generic(info);
        const volatile hopper_tile &at = *t;
        const hopper_keys_branch &branch = p.branch[at.branch];
        if (at.width == 0) {
            if (branch.meets) atomicAdd(p.ready + branch.rank, M::GROUPS);
            continue;
        }
        hopper_load_groups<M>(memory + M::K + ts * M::TILE, &branch.k, memory + M::K_FULL + 8 * ts, at, branch.dilation,
                              p.batch_step[1], M::GROUPS); /* all: dq multiplies those of other tiles with zeros */
        if (M::VALUES == M::TILES) hopper_load_values<M>(p, memory, at, branch, ts);
        hopper_walk<M::BLOCKS> walk(p, at);
#pragma unroll 1
        for (unsigned heads = at.heads; heads; heads &= heads - 1) {
            const int member = __ffs((int)heads) - 1;
            walk.begin(member);
#pragma unroll 1
            for (int m; walk.next(&m);) {
                const int row = HOPPER_WRAP - at.rows + 64 * m, token = at.row0 + at.rows * branch.dilation;
                const int head = at.kv_head * p.heads_each + member, block = at.block + member * branch.blocks + m;
                const uint32_t full = memory + M::Q_FULL + 8 * qs, q = memory + M::Q + qs * M::BLOCK;
                hopper_wait(full + M::BLOCK_FREE - M::Q_FULL, qp);
                hopper_put_four(memory + M::STEP + 16 * (qs + M::STAGES * (qp ^ 1)),
                                make_int4(m, block, walk.order(), head));
                hopper_expect(full, M::BLOCK + M::STAT);
#pragma unroll
                for (int c = 0; c < M::PANELS; c++)
                    hopper_load(q + c * M::PANEL, &branch.q, full, 64 * c, row, at.batch * p.batch_step[0] + token,
                                head);
                hopper_load_flat(memory + M::STATS + M::STAT * qs, p.stats + (size_t)block * 128, 512, full);
                if (M::BLOCKS)
                    hopper_load_flat(memory + M::STATS + M::STAT * qs + 512, p.scales + (size_t)block * 64, 256, full);
                hopper_expect(full + 8 * M::STAGES, M::BLOCK);
#pragma unroll
                for (int c = 0; c < M::PANELS; c++)
                    hopper_load(q + M::G - M::Q + c * M::PANEL, &branch.g, full + 8 * M::STAGES, 64 * c, row,
                                at.batch * p.batch_step[3] + token, head);
                if (++qs == M::STAGES) qs = 0, qp ^= 1;
                if (M::BLOCKS && --before == 0) next = claim(p);
            }
        }
        if (++ts == M::TILES) ts = 0, tp ^= 1;
    }
    hopper_wait(memory + M::TILE_FREE + 8 * ts, tp);
    hopper_put_four(memory + M::TILE_INFO + ts * 64 + offsetof(hopper_tile, first) / 16 * 16,
                    make_int4(0, 0, HOPPER_STOP, HOPPER_STOP));
    hopper_arrive(memory + M::K_FULL + 8 * ts);
#pragma unroll 1
    for (int i = 0; i < M::STAGES; i++) { /* the carriers */
        hopper_wait(memory + M::BLOCK_FREE + 8 * qs, qp);
        hopper_put_four(memory + M::STEP + 16 * (qs + M::STAGES * (qp ^ 1)), make_int4(0, HOPPER_STOP, 0, 0));
        hopper_arrive(memory + M::Q_FULL + 8 * qs);
        if (++qs == M::STAGES) qs = 0, qp ^= 1;
    }
}

/* D = 128: v waits for its only stage, which must not hold up what else there is to load. */
template <class M> HOPPER_FN void hopper_value_loader(const hopper_keys_args &p, uint32_t memory)
{
    int ts = 0, tp = 0;
#pragma unroll 1
    for (;;) {
        hopper_wait(memory + M::K_FULL + 8 * ts, tp); /* the tile is known */
        const volatile hopper_tile &t = *(const hopper_tile *)__cvta_shared_to_generic(memory + M::TILE_INFO + ts * 64);
        if (t.width == HOPPER_STOP) return;
        hopper_wait(memory + M::V_FREE, ts ^ 1);
        hopper_load_values<M>(p, memory, t, p.branch[t.branch], ts);
        if (++ts == M::TILES) ts = 0, tp ^= 1;
    }
}

/* bulk sums of whole numbers */
HOPPER_FN void hopper_add_whole(float *to, uint32_t from, int bytes)
{
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}

/* Every block of one stage (where carriers are fewer: every CARRIERS-th block): waits for its turn, sees that the
 * tile's dq is added, passes the turn on. Sums of whole numbers have no turns. */
template <class M> HOPPER_FN void hopper_carrier(const hopper_keys_args &p, uint32_t memory, int stage)
{
#pragma unroll 1
    for (int parity = 0;;) {
        const uint32_t step = memory + M::STEP + 16 * (stage + M::STAGES * parity);
        hopper_wait(memory + M::Q_FULL + 8 * stage, parity);
        const int4 at = hopper_four(step);
        hopper_arrive(memory + M::BLOCK_FREE + 8 * stage);
        if (at.y == HOPPER_STOP) {
            if (M::BLOCKS) hopper_bulk_done();
            return;
        }
        const int fresh = M::BLOCKS ? 0 : hopper_turn(p.turn + at.y, at.z);
        hopper_wait(memory + M::DQ_FULL + 8 * stage, parity);
        hopper_fence();
        float *to = p.dq + (size_t)at.y * 64 * M::D;
        const uint32_t from = memory + (M::D == 64 ? M::S + stage * M::DS : M::DQ);
        if (M::BLOCKS) hopper_add_whole(to, from, M::SUMS);
        else if (fresh) hopper_store_flat(to, from, M::SUMS);
        else hopper_add_flat(to, from, M::SUMS);
        hopper_bulk_commit();
        hopper_bulk_read();
        hopper_arrive(memory + (M::D == 64 ? M::DS_FREE + 8 * stage : M::DQ_FREE));
        if (!M::BLOCKS) {
            hopper_bulk_done();
            hopper_fence();
            hopper_pass(p.turn + at.y, at.z);
        }
        if (M::CARRIERS < M::STAGES) stage += M::CARRIERS - M::STAGES;
        if (M::CARRIERS == M::STAGES || stage >= 0) parity ^= 1;
        else stage += M::STAGES;
    }
}

#endif
