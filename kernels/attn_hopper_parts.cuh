/* attn_hopper_parts.cuh: attention in f32 without TF32 on Hopper: products of parts (attn_parts.cuh) by warpgroups.
 *
 * The same six products, in the same order, as mma.sync has them, but both operands of scores and the right one of
 * weighted sums come from shared memory by themselves: no fragments are fetched, and a warpgroup's products run at
 * twice mma.sync's rate beside the other warpgroup's arithmetic.
 *
 * A block is two warpgroups that multiply and one that feeds them: it reads rows of f32 into registers, takes them
 * apart and puts the parts into panels that products read. A step is 64 rows of the other side. Tiles are handed over
 * by barriers, so the warpgroups do not wait for each other, and what one does beside products hides behind the
 * other's.
 *
 * Floor: a sixth of what wgmma does in bf16, 165 TFLOP/s of f32 on an H200, in the backward (seven products for five)
 * 118. What is beside products in a step of 128 x 64 pairs for D = 64 (3,072 cycles of them in the forward): some 1,000
 * cycles for softmax, P in parts and sums, 700 for taking tiles apart. kernels/HOPPER.md has what was reached.
 *
 * Rejected: parts made beforehand in memory (6 bytes a number instead of 4: for D = 128 and 64 rows 21 bytes a cycle
 * and multiprocessor from the L2 cache, which gives some 24), one pass for the backward (sums of dq in memory, turns
 * among tiles: where products run twice as fast they are not what a backward waits for).
 */
#ifndef LAC_CUDA_ATTN_HOPPER_PARTS_CUH
#define LAC_CUDA_ATTN_HOPPER_PARTS_CUH
#include "attn_parts.cuh"
#include "hopper.cuh"

/* f32 exactly, without options of single pairs: has the device kernels for it? */
bool attn_hopper_parts_runs();
int attn_hopper_parts_forward(attn_args &a, const lac_plan *plan);
int attn_hopper_parts_keys(attn_args &a, const lac_plan *plan);
int attn_hopper_parts_queries(attn_args &a, const lac_plan *plan);

enum { PARTS_STEP = 64, PARTS_GROUPS = 2, PARTS_CONSUMERS = 256, PARTS_THREADS = 384 };
/* of the 168 that each thread is launched with: a block cannot have more than it began with */
enum { PARTS_FEEDER_REGISTERS = 72, PARTS_GROUP_REGISTERS = 216 };
static_assert(PARTS_FEEDER_REGISTERS + PARTS_GROUPS * PARTS_GROUP_REGISTERS <= (PARTS_GROUPS + 1) * 168, "registers");

/* The warpgroups that multiply meet by a named barrier; the one that feeds ends when it has fed the last tile. */
enum { PARTS_ALL = 3 };
struct parts_consumers_meet {
    __device__ __forceinline__ void operator()() const { hopper_sync(PARTS_ALL, PARTS_CONSUMERS); }
};

/* ---- tiles: parts one behind the other, each in panels of 64 columns, rows of 128 bytes (hopper_operand) ---- */

template <int DP, int ROWS> struct parts_panels {
    enum { PANEL = ROWS * 128, PART = ROWS * DP * 2, BYTES = PARTS * PART };
};

enum { PARTS_TURNS = 4 };
/* where the tiles begin, and what a warp has of them for the sums of its 16 rows when they are done */
__device__ __forceinline__ uint32_t parts_tiles(const void *memory) { return (attn_shared(memory) + 1023) & ~1023u; }
template <int DP> __device__ __forceinline__ float *parts_sums(uint8_t *memory)
{
    return (float *)(memory + (parts_tiles(memory) - attn_shared(memory))) + threadIdx.x / 32 * 16 * DP;
}

/* ROWS rows that a warpgroup takes apart, in turns, BATCH of them (1 or all) at a time: a thread has the same eight
 * columns of some of them */
template <int DP, int BATCH> struct parts_rows {
    enum { CHUNKS = DP / 8, EACH = 128 / CHUNKS, ROWS = EACH * PARTS_TURNS };
    static_assert(BATCH == 1 || BATCH == PARTS_TURNS, "a turn or all");
    float x[PARTS_TURNS][8];
    static __device__ __forceinline__ int row() { return (int)threadIdx.x % 128 / CHUNKS; }
    static __device__ __forceinline__ int chunk() { return (int)threadIdx.x % CHUNKS; }

    __device__ __forceinline__ void load_turn(int i, const float *at, int left, bool valid)
    {
#pragma unroll
        for (int e = 0; e < 8; e += 4) {
            float4 v = {0, 0, 0, 0};
            if (valid && left > e) v = *(const float4 *)(at + e);
            x[i][e] = v.x, x[i][e + 1] = v.y, x[i][e + 2] = v.z, x[i][e + 3] = v.w;
        }
    }
    __device__ __forceinline__ void put_turn(int i, uint32_t to, int part_bytes) const
    {
        uint32_t part[4][PARTS];
#pragma unroll
        for (int e = 0; e < 4; e++) parts_of(part[e], x[i][2 * e], x[i][2 * e + 1]);
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            hopper_put_four(to + p * part_bytes, {(int)part[0][p], (int)part[1][p], (int)part[2][p], (int)part[3][p]});
    }
    /* a batch from turn `turn` on of lattice rows from `first` on of head h; zeros from `limit` on, past the head
     * dimension, and (`padding`) where rows are padding. Addresses are written once for each kind of batch: one
     * form for both spilled in the backward. */
    __device__ __forceinline__ void load(int turn, const attn_args &a, const attn_tensor &from, const attn_tile &t,
                                         int h, int shift, int first, int limit, bool padding)
    {
        if (BATCH > 1) {
            const int64_t step = t.r * from.stride[1];
            const float *at = (const float *)from.data + t.b * from.stride[0] + h * from.stride[2] +
                              (t.base - shift) * from.stride[1] + (first + row()) * step + chunk() * 8;
            const int left = a.head_dim - chunk() * 8;
#pragma unroll
            for (int i = 0; i < PARTS_TURNS; i++, at += EACH * step) {
                const int index = first + row() + i * EACH;
                bool valid = index < limit;
                if (padding) valid = valid && !attn_padded(a, t.b, t.base + (int64_t)index * t.r);
                load_turn(i, at, left, valid);
            }
        } else {
            const int index = first + row() + turn * EACH, left = a.head_dim - chunk() * 8;
            const float *at = (const float *)from.data + t.b * from.stride[0] + h * from.stride[2] +
                              (t.base - shift) * from.stride[1] + index * (t.r * from.stride[1]) + chunk() * 8;
            bool valid = index < limit;
            if (padding) valid = valid && !attn_padded(a, t.b, t.base + (int64_t)index * t.r);
            load_turn(turn, at, left, valid);
        }
    }
    /* a batch from turn `turn` on to rows from `row0` on of a tile of HEIGHT rows; single turns without the fence that
     * products need */
    template <int HEIGHT> __device__ __forceinline__ void put(int turn, uint32_t to, int row0) const
    {
        typedef parts_panels<DP, HEIGHT> Tile;
        to += chunk() / 8 * Tile::PANEL + (row0 + row() + turn * EACH) * 128 + ((chunk() % 8 ^ row() % 8) << 4);
#pragma unroll
        for (int i = 0; i < BATCH; i++) put_turn(turn + i, to + i * EACH * 128, Tile::PART);
        if (BATCH > 1) hopper_shared_fence();
    }
};

/* 64 rows that a warpgroup keeps, from `first` on, at rows from `row0` on of a tile of HEIGHT */
template <int DP, int BATCH, int HEIGHT>
__device__ __forceinline__ void parts_own(uint32_t to, int row0, const attn_args &a, const attn_tensor &x,
                                          const attn_tile &t, int h, int shift, int first, int limit, bool padding)
{
#pragma unroll 1
    for (int i = 0; i < PARTS_STEP; i += parts_rows<DP, BATCH>::ROWS) {
        parts_rows<DP, BATCH> rows;
#pragma unroll
        for (int turn = 0; turn < PARTS_TURNS; turn += BATCH)
            rows.load(turn, a, x, t, h, shift, first + i, limit, padding);
#pragma unroll
        for (int turn = 0; turn < PARTS_TURNS; turn += BATCH) rows.template put<HEIGHT>(turn, to, row0 + i);
    }
    if (BATCH == 1) hopper_shared_fence();
}

/* ---- handing tiles over ---- */

/* The step that a warp is at: where its tiles lie, and the parity that says that they are there. */
struct parts_turn {
    int stage, phase;
};
/* Two tiles a step, each with a barrier that says that it is full, which every warp that feeds arrives at, and one that
 * says that it is free, for every warp that multiplies. */
template <int STAGES> struct parts_barriers {
    uint64_t at[4][STAGES];
    __device__ __forceinline__ uint32_t full(int tile, parts_turn x) const { return attn_shared(&at[tile][x.stage]); }
    __device__ __forceinline__ uint32_t free(int tile, parts_turn x) const
    {
        return attn_shared(&at[2 + tile][x.stage]);
    }
    __device__ __forceinline__ void start() const
    {
        if (threadIdx.x) return;
        for (int i = 0; i < STAGES; i++)
            for (int tile = 0; tile < 2; tile++) {
                hopper_barrier(full(tile, {i, 0}), 4);
                hopper_barrier(free(tile, {i, 0}), 4 * PARTS_GROUPS);
            }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __device__ __forceinline__ void next(parts_turn &x) const
    {
        if (++x.stage == STAGES) x.stage = 0, x.phase ^= 1;
    }
    __device__ __forceinline__ void wait_full(int tile, parts_turn x) const { hopper_wait(full(tile, x), x.phase); }
    __device__ __forceinline__ void wait_free(int tile, parts_turn x) const { hopper_wait(free(tile, x), x.phase ^ 1); }
    __device__ __forceinline__ void arrive(uint32_t barrier) const
    {
        __syncwarp();
        if (threadIdx.x % 32 == 0) hopper_arrive(barrier);
    }
    /* a step whose tiles nobody looks at */
    __device__ __forceinline__ void pass(parts_turn &x) const
    {
        for (int tile = 0; tile < 2; tile++) {
            wait_full(tile, x);
            arrive(free(tile, x));
        }
        next(x);
    }
};

/* A step's tile: `rows` has its first rows already; `load(i, turn)` loads those from row i on, or what follows (0), a
 * batch at a time as soon as it has been put. */
template <int DP, int BATCH, class F>
__device__ __forceinline__ void parts_feed(parts_rows<DP, BATCH> &rows, uint32_t to, F &&load)
{
#pragma unroll
    for (int i = 0; i < PARTS_STEP; i += rows.ROWS)
#pragma unroll
        for (int turn = 0; turn < PARTS_TURNS; turn += BATCH) {
            rows.template put<PARTS_STEP>(turn, to, i);
            load((i + rows.ROWS) % PARTS_STEP, turn);
        }
    if (BATCH == 1) hopper_shared_fence();
}
/* Feeds keys [low, high) to tiles from `k` on, values to those from `v` on; FIRST: which of them (0, 1) goes first. */
template <int DP, int FIRST, int BATCH, int STAGES>
__device__ __forceinline__ void parts_feed_keys(const attn_args &a, const attn_tile &t, int low, int high, uint32_t k,
                                                uint32_t v, const parts_barriers<STAGES> &barrier)
{
    constexpr int TILE = parts_panels<DP, PARTS_STEP>::BYTES, LAST = 1 - FIRST;
    const attn_tensor &x = FIRST ? a.v : a.k, &y = FIRST ? a.k : a.v;
    const int hk = t.h / a.group;
    const bool pad = a.padding != NULL;
    parts_turn now = {0, 0};
    parts_rows<DP, BATCH> rows;
#pragma unroll
    for (int turn = 0; turn < PARTS_TURNS; turn += BATCH) rows.load(turn, a, x, t, hk, 0, low, t.live, pad);
#pragma unroll 1
    for (int k0 = low; k0 < high; k0 += PARTS_STEP) {
        barrier.wait_free(FIRST, now);
        parts_feed(rows, (FIRST ? v : k) + now.stage * TILE, [&](int i, int turn) {
            if (i) rows.load(turn, a, x, t, hk, 0, k0 + i, t.live, pad);
            else rows.load(turn, a, y, t, hk, 0, k0, t.live, pad);
        });
        barrier.arrive(barrier.full(FIRST, now));
        barrier.wait_free(LAST, now);
        parts_feed(rows, (FIRST ? k : v) + now.stage * TILE, [&](int i, int turn) {
            if (i) rows.load(turn, a, y, t, hk, 0, k0 + i, t.live, pad);
            else rows.load(turn, a, x, t, hk, 0, k0 + PARTS_STEP, t.live, pad);
        });
        barrier.arrive(barrier.full(LAST, now));
        barrier.next(now);
    }
}

/* ---- products of a warpgroup; x, y: where its rows of a tile begin ---- */

/* high + low = X Y^T, 64 x 64, once they are waited for; X is in a tile of XH rows, Y of YH */
template <int DP, int XH, int YH, bool FLIP>
HOPPER_FN void parts_group_scores(float (&high)[32], float (&low)[32], uint32_t x, uint32_t y)
{
    typedef parts_panels<DP, XH> X;
    typedef parts_panels<DP, YH> Y;
    const uint32_t a = hopper_operand(x, 16), b = hopper_operand(y, 16);
    hopper_pin(high);
    hopper_pin(low);
    hopper_product_fence();
#pragma unroll
    for (int k = 0; k < DP / 16; k++)
#pragma unroll
        for (int i = 0; i < PARTS_PRODUCTS; i++) {
            const uint64_t left = hopper_descriptor(a, parts_left<FLIP>(i) * X::PART + k / 4 * X::PANEL + k % 4 * 32);
            const uint64_t right = hopper_descriptor(b, parts_right<FLIP>(i) * Y::PART + k / 4 * Y::PANEL + k % 4 * 32);
            if (i < PARTS_PRODUCTS - 1) hopper_product<bf16, 0>(low, left, right, k + i > 0);
            else hopper_product<bf16, 0>(high, left, right, k > 0);
        }
    hopper_product_commit();
}
template <int PENDING> HOPPER_FN void parts_group_scored(float (&high)[32], float (&low)[32])
{
    hopper_pin(high);
    hopper_pin(low);
    hopper_product_wait<PENDING>();
    hopper_pin(high);
    hopper_pin(low);
#pragma unroll
    for (int i = 0; i < 32; i++) high[i] += low[i];
}

/* P in parts, as the left operand; column blocks `from` .. + 2 K of it */
template <int K> HOPPER_FN void parts_group_left(uint32_t (&left)[PARTS][4 * K], const float *p)
{
#pragma unroll
    for (int i = 0; i < 4 * K; i++) {
        uint32_t part[PARTS];
        parts_of(part, p[2 * i], p[2 * i + 1]);
#pragma unroll
        for (int x = 0; x < PARTS; x++) left[x][i] = part[x];
    }
}
/* sum (+)= A B, 64 x 64, 16 deep, A in registers: hopper_product_from() that can begin a sum */
HOPPER_FN void parts_group_product(float (&sum)[32], const uint32_t *a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n" HOPPER_PRODUCT("64", "bf16") HOPPER_REGISTERS_32
                 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"
                 : HOPPER_F32(sum, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
/* c = c times the row's factor + P Y[16 K rows][all columns], 64 columns at a time. The sum of the large products goes
 * on from that of the small ones, which begins at zero. */
template <int DP, int YH, int K>
HOPPER_FN void parts_group_add(float (&c)[DP / 2], const float (&factor)[2], uint32_t (&left)[PARTS][4 * K], uint32_t y)
{
    typedef parts_panels<DP, YH> Y;
    const uint32_t b = hopper_operand(y, 16);
#pragma unroll
    for (int panel = 0; panel < DP / 64; panel++) {
        float sum[32];
        hopper_pin(sum);
        hopper_product_fence();
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < PARTS_PRODUCTS - 1; i++)
                parts_group_product(sum, left[parts_left<false>(i)] + 4 * k,
                                    hopper_descriptor(b, parts_right<false>(i) * Y::PART + panel * Y::PANEL + k * 2048),
                                    k + i > 0);
#pragma unroll
        for (int k = 0; k < K; k++)
            parts_group_product(sum, left[0] + 4 * k, hopper_descriptor(b, panel * Y::PANEL + k * 2048), 1);
        hopper_product_commit();
        hopper_pin(sum);
        hopper_product_wait<0>();
        hopper_pin(sum);
#pragma unroll
        for (int i = 0; i < 32; i++) c[32 * panel + i] = fmaf(c[32 * panel + i], factor[i / 2 % 2], sum[i]);
    }
#pragma unroll
    for (int x = 0; x < PARTS; x++) hopper_pin(left[x]);
}

template <int DP, int YH, int K>
HOPPER_FN void parts_group_add(float (&c)[DP / 2], uint32_t (&left)[PARTS][4 * K], uint32_t y)
{
    const float one[2] = {1, 1};
    parts_group_add<DP, YH, K>(c, one, left, y);
}

#endif
