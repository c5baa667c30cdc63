/* attn_joint.cuh: the backward of attention on tensor cores (mma.sync) in one pass over the keys: dk, dv and dq.
 *
 * A block owns a tile of 128 keys of one unit (attn_keys.cuh) and walks over blocks of query rows, head after head:
 * five products and one exponential a pair, where a pass over the keys and one over the queries take seven and two.
 * Scores come out transposed, S^T = K Q^T and dP^T = V dO^T. What the tile adds to dq, dS K, needs dS of all its keys:
 * dS passes through shared memory, and the sums lie in device memory in f32, blocks of 64 rows in the order of the
 * products' registers, to which tiles add in turns. Work list, turns and what happens to the sums afterwards are those
 * of the Hopper backward (attn_hopper_backward.cuh); only the tiles are computed differently.
 *
 * Floor: tensor cores and shared memory. A matrix that is fetched for two products costs as much time as they do (four
 * cycles beside 3.2), so every warp has tiles of 32 x 32 of S, dP and dq and 32 keys x 64 columns of dk and dv: 128
 * registers of sums, 64 of scores. Up to D = 64 a warp has all columns of its keys, P^T and dS^T stay in registers:
 * four warps, two blocks a multiprocessor, 136 fetches and stores for 320 products of 16 x 8 x 16 (the two passes have
 * 200 for 448, FlashAttention-2's tiles 160). For D = 128 two warps share 32 keys, each has the scores of half of the
 * rows and the results of half of the columns, and they give each other their halves of P^T and dS^T by way of shared
 * memory: 144 (272, 152). What is left is waiting.
 *
 * So a step has one barrier: dS K of a step's rows is computed a step later, when all warps have long stored their dS
 * (two buffers; where they do not fit, on sm_80 for D = 128, in the same step behind a second barrier), and for D = 128
 * half of the warps do that before their own scores, the others behind them, so that two warps of a scheduler are not
 * at exponentials at the same time (4%). Partners wait for each other alone. The sums so far are asked for before dS K
 * and added behind it. A turn is looked at by one thread at the beginning of a step, and one fence later in it serves
 * both what others added, which the look saw, and what this block added a step ago, whose turn is passed on then.
 *
 * Turns are what makes tiles wait: an item's tiles follow one another at a distance of a step and a half, and a fifth
 * of the samples of a profile (D = 64, 8192 rows, 16 items interleaved) lay at the barrier behind the wait. The list
 * therefore interleaves as many items as stay in the cache (attn_hopper_backward.cu): few tiles of one item run at a
 * time. Registers are all taken, so words of the loop lie in shared memory: a form with 52 bytes of spills was 13%
 * slower for D = 64; the fence empties the first cache, from which spilled words would come.
 *
 * Measured, bf16, one H200, 32768 rows in all, heads x D = 2048, medians of seven rounds in turns: the speed as a share
 * of PyTorch's FlashAttention-2 in the same run (target 0.9).
 *
 *     rows            1k       2k       8k       32k
 *     D = 64          1.15     1.10     1.03     1.025
 *     causal          1.22     1.16     1.10     1.07
 *     D = 128         1.06     1.01     0.99     0.98
 *     causal          1.10     1.05     0.99     0.96
 *
 * Items that are interleaved had 40 MB without masks, 24 with causal masks. 24 MB without: as fast or up to 3% slower
 * (D = 64, 32k rows); 40 MB with: the same within 1%; 64 MB: up to 3% slower without, up to 6% with (8k). Two passes
 * had, in a run of an earlier form, 0.88, 0.83, 0.79, 0.78 for D = 64, causal 0.93, 0.89, 0.83, 0.83.
 *
 * Active blocks (BLOCKS): steps are the blocks of rows that the list has bits for, looked for 1024 at a time. Sums of
 * dq are whole numbers without turns, as on Hopper (attn_hopper_block_keys.cu says why), so nobody looks, waits or
 * fences. Two of a row are added as one number of 64 bits, and what a warp adds at once lies side by side. Time as a
 * multiple of the dense kernel's times density, a tenth of the blocks, otherwise as above (target 1.3; two passes had
 * 1.5 and 1.55 for D = 64):
 *
 *     blocks of       128      causal   256      causal
 *     D = 64          1.15     1.28     1.17     1.25
 *     D = 128         1.16     1.27     1.15     1.23
 *
 * About half of what is above 1 are the passes before and after the tiles, which take as long for a tenth of the
 * blocks as for all: largest keys and values 0.19 ms of 8.5 (causal 4.8), scales 0.13, sums of dq to their type 0.18,
 * clearing them. The rest was not taken apart; tiles begin and end ten times as often for as much work.
 *
 * Rejected: 16 keys a warp with all rows (180 fetches), atomic additions (order, and four narrow ones on sm_80 where a
 * load and a store are wide), fetching the sums to the second cache a step ahead (D = 128: as fast or up to 4% slower),
 * tiles of an item that begin at different rows so that nobody waits (tiles would wait for some that do not run yet), a
 * fence every other step (D = 128: 1.07, 1.01, 0.97, 0.96, causal 1.10, 1.04, 0.95, 0.91).
 */
#ifndef LAC_CUDA_ATTN_JOINT_CUH
#define LAC_CUDA_ATTN_JOINT_CUH
#include "attn_hopper_backward.cuh"
#include "attn_mma.cuh"
#include "launch.cuh"
#include <type_traits>

/* Sizes, and places in shared memory. DP: columns that are computed, 64 or 128. */
template <class Op, int DP> struct joint_shape {
    enum {
        PAIRS = DP > 64, /* do two warps share 32 keys? */
        WARPS = PAIRS ? 8 : 4,
        THREADS_ = 32 * WARPS,
        KEYS = 128,
        ROWS = HOPPER_ROWS, /* query rows of a step */
        K_BYTES = KEYS * Op::tile::ROW,
        Q_BYTES = ROWS * Op::tile::ROW,
        PART = 32 * 32 * 2, /* P^T or dS^T of 32 keys and 32 rows */
        PARTS_ = KEYS * ROWS * 2,
        K = 0,
        V = K + K_BYTES,
        Q = V + K_BYTES, /* two stages */
        G = Q + 2 * Q_BYTES,
        STATS = G + 2 * Q_BYTES, /* lse and delta, two stages */
        P = STATS + 2 * 2 * ROWS * 4,
        S = P + (PAIRS ? PARTS_ : 0),
        MEMORY = S + PARTS_,       /* dS^T is used in the step in which it is made, */
        LATE = MEMORY + PARTS_,    /* or, `late`, in the next */
        SUMS = WARPS * 32 * 64 * 4 /* results on their way out, then what becomes of their rows */
    };
    static_assert(SUMS + (int)sizeof(attn_row<float>) * THREADS_ <= MEMORY, "room for results");
};

/* ---- P^T and dS^T ---- */

/* They lie in shared memory as 4 x 4 blocks of 8 keys x 8 rows, 128 bytes each: no address meets a bank twice, neither
 * here nor when matrices are fetched, as they are or transposed. */
template <class Op> __device__ __forceinline__ void joint_put(uint32_t part, const uint32_t (&x)[2][2][4])
{
    part += attn_opaque(threadIdx.x) % 32 * 4;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(part + ((2 * m + i % 2) * 4 + 2 * k + i / 2) * 128),
                             "r"(x[m][k][i])
                             : "memory");
}
/* 16 keys x 16 rows, as joint_put had them */
__device__ __forceinline__ void joint_get(uint32_t (&x)[4], uint32_t part, int lane, int m, int k)
{
    ldmatrix(x, part + (lane / 8 % 2 * 4 + lane / 16) * 128 + lane % 8 * 16 + (8 * m + 2 * k) * 128);
}
/* 16 rows x 16 keys */
__device__ __forceinline__ void joint_get_rows(uint32_t (&x)[4], uint32_t part, int lane, int m, int k)
{
    ldmatrix_t(x, part + (lane / 16 * 4 + lane / 8 % 2) * 128 + lane % 8 * 16 + (8 * k + 2 * m) * 128);
}

/* c += left operand (32 keys x 32 rows) times 64 columns of the 32 rows from y on */
template <class Op>
__device__ __forceinline__ void joint_add(float (&c)[2][8][4], const uint32_t (&left)[2][2][4], uint32_t y, int column)
{
    y = attn_opaque(y);
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            uint32_t b[4];
            Op::bt(b, y, column + 8 * e, k);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                Op::mma(c[m][e], left[m][k], b[0], b[1]);
                Op::mma(c[m][e + 1], left[m][k], b[2], b[3]);
            }
        }
}
/* the same for what another warp has put there */
template <class Op>
__device__ __forceinline__ void joint_add_from(float (&c)[2][8][4], uint32_t part, uint32_t y, int column)
{
    uint32_t left[2][2][4];
    const int lane = (int)attn_opaque(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < 2; k++) joint_get(left[m][k], part, lane, m, k);
    joint_add<Op>(c, left, y, column);
}

template <class Op> __device__ __forceinline__ void joint_pack(uint32_t (&left)[2][2][4], const float (&x)[2][4][4])
{
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < 2; k++) Op::left(left[m][k], x[m][2 * k], x[m][2 * k + 1]);
}

/* ---- the walk over query rows ---- */

struct joint_step {
    int head, row; /* head: bit of the unit's heads, -1: there is none; row: of the item's query rows */
    int block;     /* its number; -1: there is none */
    unsigned sees; /* bit 4 i + j: may any of its 32 rows number i see any of the tile's 32 keys number j? 8 bits on:
                    * not every row every key? */
};

/* By one thread: a look at a turn, before a fence and before it is acted on; and, behind the fence, the turn of the
 * step before is passed on. */
__device__ __forceinline__ int joint_look(const int *turn)
{
    int seen;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(turn) : "memory");
    return seen;
}
__device__ __forceinline__ void joint_pass(int *turn, int order)
{
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(order + 1) : "memory");
}

/* Claims the block's tile: the list's entry and its lattice. */
__device__ __forceinline__ bool joint_claim(const attn_args &a, const hopper_args &p, hopper_tile &x, attn_tile &t,
                                            int &blocks)
{
    if (threadIdx.x == 0) {
        x = p.tile[atomicAdd(p.counter, 1)];
        if (x.width > 0) {
            attn_span(a, x.branch, x.batch, x.kv_head * a.group + __ffs((int)x.heads) - 1,
                      x.key0 / a.branch[x.branch].segment, t);
            blocks = p.branch[x.branch].blocks;
            t.first = x.first * HOPPER_ROWS;
            t.end = min(t.keys, t.first + x.width * HOPPER_ROWS);
        }
    }
    __syncthreads();
    return x.width > 0;
}

/* waits for the warp's partner */
__device__ __forceinline__ void joint_pair(int which) { asm volatile("bar.sync %0, 64;" ::"r"(1 + which) : "memory"); }

/* adds whole numbers to two sums of dq, as one number of 64 bits: the dq pass takes them apart again */
__device__ __forceinline__ void joint_add_whole(float *sums, int low, int high)
{
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(sums), "l"((int64_t)high * ((int64_t)1 << 32) + low)
                 : "memory");
}

/* BLOCKS: there are active blocks */
template <class Op, int DP, bool BLOCKS>
__global__ void __launch_bounds__(joint_shape<Op, DP>::THREADS_, joint_shape<Op, DP>::PAIRS ? 1 : 2)
    attn_joint_kernel(const __grid_constant__ attn_args a, const __grid_constant__ hopper_args p, int late)
{
    typedef typename Op::T T;
    typedef typename Op::tile Tile;
    typedef joint_shape<Op, DP> M;
    constexpr int WIDE = 32; /* columns of dq of a warp */
    constexpr bool PAIRS = M::PAIRS;
    if (!PAIRS) late = 1;
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ hopper_tile x;
    __shared__ attn_tile t;
    __shared__ int fresh[2], blocks; /* has nobody added to the block? blocks of one head */
    __shared__ int done;             /* block whose turn is to be passed on, or -1 */
    const uint32_t tiles = attn_tiles(memory);
    if (!joint_claim(a, p, x, t, blocks)) {
        if (a.ranks > 1 && threadIdx.x == 0) atomicAdd(p.ready + a.branch[x.branch].rank, 1);
        return;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = warp % 2;
    const int mine = PAIRS ? warp / 2 : warp; /* which 32 keys */
    const int w0 = t.first + 32 * mine, hk = x.kv_head;
    const int columns = BLOCKS ? p.columns : (a.head_dim + 7) / 8 * 8; /* of the sums of dq */
    const float gz = (float)(a.gscale * a.keep_scale);
    const bool pad = a.padding != NULL;
    __shared__ bool quick;
    if (threadIdx.x == 0) quick = attn_quick(a, a.q, t) && attn_quick(a, a.g, t);
    __shared__ const char *origin[2];
    attn_stream<Tile, T, M::ROWS, DP, M::THREADS_, false> qs(origin[0]), gs(origin[1]);
    qs.start(a, a.q, t, 0, a.shift, 0);
    gs.start(a, a.g, t, 0, a.shift, 0);
    auto load = [&](const joint_step &s, int stage) {
        const int h = hk * a.group + s.head, i0 = t.q0 + s.row;
        const uint32_t to = tiles + stage * M::Q_BYTES;
        if (quick) {
            qs.next(to + M::Q, a, a.q, t, h, i0, t.q1);
            gs.next(to + M::G, a, a.g, t, h, i0, t.q1);
        } else {
            attn_load<Tile, T, M::ROWS, DP, M::THREADS_>(to + M::Q, a, a.q, t, h, a.shift, i0, t.q1, false);
            attn_load<Tile, T, M::ROWS, DP, M::THREADS_>(to + M::G, a, a.g, t, h, a.shift, i0, t.q1, false);
        }
        if ((int)threadIdx.x < M::ROWS / 2) { /* lse, then delta */
            const int which = threadIdx.x / (M::ROWS / 4), at = threadIdx.x % (M::ROWS / 4) * 4;
            attn_copy16(tiles + M::STATS + ((2 * stage + which) * M::ROWS + at) * 4,
                        p.stats + ((int64_t)s.block * 2 + which) * HOPPER_ROWS + at, true);
        }
    };
    /* may any of the 32 rows from lattice index i on see any of the tile's 32 keys number `which`? */
    auto visible = [&](int which, int i) {
        const int k0 = t.first + 32 * which, k1 = min(min(k0 + 32, t.end), t.live);
        return k0 < k1 && i < t.q1 && i + 31 >= k0 - t.after && i <= k1 - 1 + t.before;
    };
    /* By one warp: what steps do lies in shared memory, to which the loop has no register to spare. */
    __shared__ joint_step steps[4];
    auto plan = [&](int at, int head, int row) {
        const int i = t.q0 + row, last = t.first + M::KEYS - 1;
        unsigned sees = 255;
        if (last >= min(t.end, t.live) || pad || a.dedup || i + M::ROWS > t.q1 || i < last - t.after ||
            i + M::ROWS - 1 > t.first + t.before) {
            const int j = lane % 4, r = i + lane / 4 % 2 * 32, k0 = t.first + 32 * j, k1 = min(k0 + 32, t.end);
            const bool partial = k0 + 32 > t.live || r < k1 - 1 - t.after || r + 31 > k0 + t.before || pad || a.dedup;
            sees = (__ballot_sync(~0u, visible(j, r)) & 255) | (__ballot_sync(~0u, partial) & 255) << 8;
        }
        if (lane == 0) steps[at & 3] = {head, row, head < 0 ? -1 : x.block + head * blocks + row / HOPPER_ROWS, sees};
    };
    /* BLOCKS: the step of the first active block of rows from number m on, or else of a head that follows */
    __shared__ unsigned active[BLOCKS ? 32 : 1]; /* 1024 blocks of rows, a bit each */
    auto seek = [&](int at, int head, int m) {
        const hopper_steps &place = p.place[x.branch];
        const int lane = (int)attn_opaque(threadIdx.x) % 32;
        unsigned words = 0;
        for (; head >= 0; m = 0) {
            const uint32_t *row = p.steps + place.at + ((int64_t)(x.low + head) * place.tiles + x.order) * place.width;
            for (; m < blocks; m = (m / 1024 + 1) * 1024) {
                const int word = m / 32 + lane, first = m / 32 % 32;
                if (m % 1024 == 0) active[lane] = word < place.width - 1 ? __ldg(row + 1 + word) : 0;
                const unsigned some = active[lane] & (lane < first ? 0 : lane > first ? ~0u : ~0u << m % 32);
                words = __ballot_sync(~0u, some);
                if (words == 0) continue;
                const int next = __ffs((int)words) - 1;
                m = m / 1024 * 1024 + 32 * next + __ffs(__shfl_sync(~0u, (int)some, next)) - 1;
                break;
            }
            if (words) break;
            const unsigned more = x.heads & ~0u << head << 1;
            head = more ? __ffs((int)more) - 1 : -1;
        }
        plan(at, head, m * HOPPER_ROWS);
    };
    auto plan_after = [&](int at, const joint_step &s) {
        const int row = s.row + HOPPER_ROWS;
        if constexpr (BLOCKS) return seek(at, s.head, row / HOPPER_ROWS);
        if (s.head < 0 || row < min(x.rows, x.high * HOPPER_ROWS)) return plan(at, s.head, row);
        const unsigned more = x.heads & ~0u << s.head << 1;
        plan(at, more ? __ffs((int)more) - 1 : -1, x.low * HOPPER_ROWS);
    };
    attn_load<Tile, T, M::KEYS, DP, M::THREADS_>(tiles + M::K, a, a.k, t, hk, 0, t.first, min(t.end, t.live), pad);
    attn_load<Tile, T, M::KEYS, DP, M::THREADS_>(tiles + M::V, a, a.v, t, hk, 0, t.first, min(t.end, t.live), pad);
    float dk[2][8][4], dv[2][8][4];
    clear(dk);
    clear(dv);

    /* The warp's keys and 32 rows from lattice index i on, number `which` of the step: P^T and dS^T, and what they add
     * to dv and dk. OPTIONS: there may be masks or dropout. */
    auto own = [&](auto options, const joint_step &now, int stage, int which, uint32_t part, bool partial) {
        constexpr bool OPTIONS = decltype(options)::value;
        const uint32_t rows = tiles + M::Q + stage * M::Q_BYTES + 32 * which * Tile::ROW;
        uint64_t *seen = (uint64_t *)attn_floats(memory, (int)(part - tiles), 0) - 32 * warp;
        if (OPTIONS) {
            const int h = hk * a.group + now.head, i = t.q0 + now.row + 32 * which;
            if (partial) attn_tell<2>(seen, attn_key_rows(a, t, h, w0 + lane, i));
            if (a.p > 0) attn_tell<2>(seen + 32, attn_kept<true>(a, t, h, w0 + lane, i));
        }
        const float *lse = attn_floats(memory, M::STATS, 2 * stage * M::ROWS + 32 * which + lane % 4 * 2);
        float s[2][4][4], d[2][4][4];
        uint32_t p_left[2][2][4], d_left[2][2][4];
        scores<Op, DP>(s, tiles + M::K, 32 * mine, rows);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float2 l = *(const float2 *)(lse + 8 * n);
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] = attn_ex2(fmaf(s[m][n][e], a.log2_scale, e % 2 ? -l.y : -l.x));
        }
        scores<Op, DP>(d, tiles + M::V, 32 * mine, rows + M::G - M::Q);
        if (OPTIONS && a.p > 0) attn_select(d, seen + 32, 0, 0);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float2 l = *(const float2 *)(lse + M::ROWS + 8 * n);
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) d[m][n][e] = s[m][n][e] * fmaf(d[m][n][e], gz, e % 2 ? -l.y : -l.x);
        }
        if (OPTIONS) {
            if (partial) {
                attn_select(d, seen, 0, 0);
                attn_select(s, seen, 0, 0);
            }
            if (a.p > 0) attn_select(s, seen + 32, 0, 0);
            __syncwarp(); /* the words of masks lie where dS goes */
        }
        joint_pack<Op>(d_left, d);
        joint_pack<Op>(p_left, s);
        joint_put<Op>(part, d_left);
        if (PAIRS) joint_put<Op>(tiles + M::P + warp * M::PART, p_left);
        joint_add<Op>(dv, p_left, rows + M::G - M::Q, PAIRS ? 64 * half : 0);
        joint_add<Op>(dk, d_left, rows, PAIRS ? 64 * half : 0);
    };
    /* 32 rows (`half` of them) and 32 columns of the block's dq += dS K */
    auto queries = [&](int block, unsigned sees, uint32_t parts, bool first) {
        float dq[2][WIDE / 8][4];
        const int id = (int)attn_opaque(threadIdx.x), lane = id % 32, half = id / 32 % 2, strip = id / 64;
        float *sums =
            p.dq + (int64_t)block * (HOPPER_ROWS * columns) + WIDE / 8 * 512 * strip + 2 * half * 128 + lane * 4;
        const int there = columns / 8 - WIDE / 8 * strip;
        float scales[2][2]; /* BLOCKS */
        if constexpr (BLOCKS) {
            const float *from = p.scales + (int64_t)block * HOPPER_ROWS + 32 * half + lane / 4;
#pragma unroll
            for (int i = 0; i < 4; i++) scales[i / 2][i % 2] = __ldcg(from + 8 * i);
        }
        float4 old[2][WIDE / 8];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < WIDE / 8; n++) {
                old[m][n] = {0, 0, 0, 0};
                if (!BLOCKS && !first && n < there) old[m][n] = __ldcg((const float4 *)(sums + n * 512 + m * 128));
            }
        clear(dq);
        auto add = [&](int keys) {
            const uint32_t from = parts + (keys * 2 + half) * M::PART, y = tiles + M::K + 32 * keys * Tile::ROW;
#pragma unroll
            for (int k = 0; k < 2; k++) {
                uint32_t left[2][4], b[4];
#pragma unroll
                for (int m = 0; m < 2; m++) joint_get_rows(left[m], from, lane, m, k);
#pragma unroll
                for (int e = 0; e < WIDE / 8; e += 2) {
                    Op::bt(b, y, WIDE * strip + 8 * e, k);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        Op::mma(dq[m][e], left[m], b[0], b[1]);
                        Op::mma(dq[m][e + 1], left[m], b[2], b[3]);
                    }
                }
            }
        };
        if ((sees >> 4 * half & 15) == 15) {
#pragma unroll
            for (int keys = 0; keys < 4; keys++) add(keys);
        } else {
#pragma unroll 1
            for (int keys = 0; keys < 4; keys++)
                if (sees >> (4 * half + keys) & 1) add(keys);
        }
        if constexpr (BLOCKS) {
            bool fits = true;
            sums -= 2 * lane;
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < WIDE / 8; n++) {
                    int whole[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float sum = dq[m][n][i] * scales[m][i / 2];
                        fits = fits && fabsf(sum) < HOPPER_WHOLE;
                        whole[i] = __float2int_rn(sum);
                    }
                    if (WIDE * strip + 8 * n >= p.columns) continue; /* not n >= there: no register to spare */
                    joint_add_whole(sums + n * 512 + m * 128, whole[0], whole[1]);
                    joint_add_whole(sums + n * 512 + m * 128 + 64, whole[2], whole[3]);
                }
            if (!fits) p.turn[block] = HOPPER_SPOILT;
        } else {
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < WIDE / 8; n++)
                    if (n < there)
                        *(float4 *)(sums + n * 512 + m * 128) = {old[m][n].x + dq[m][n][0], old[m][n].y + dq[m][n][1],
                                                                 old[m][n].z + dq[m][n][2], old[m][n].w + dq[m][n][3]};
        }
    };

    auto parts_of = [&](int stage) { return tiles + M::S + late * stage * M::PARTS_; }; /* dS^T of a step */
    const bool before = PAIRS && late && warp >= 4;
    if (warp == 1) {
        plan(-1, -1, 0);
        plan(0, -1, 0);
        if constexpr (BLOCKS) seek(1, x.high > 0 ? __ffs((int)x.heads) - 1 : -1, 0);
        else plan(1, x.low < x.high ? __ffs((int)x.heads) - 1 : -1, x.low * HOPPER_ROWS);
    }
    if (!BLOCKS && threadIdx.x == 0) done = -1;
    __shared__ volatile int where[M::WARPS]; /* the step, while sums and products take all registers */
#pragma unroll 1
    for (int n = 0;; n++) { /* the first turn only loads */
        attn_arrived();
        __syncthreads();
        int coming = 0;
        where[warp] = n;
        {
            const joint_step &past = steps[(n - 1) & 3], &now = steps[n & 3], &next = steps[(n + 1) & 3];
            const int stage = n & 1;
            if (!BLOCKS && threadIdx.x == 0 && now.head >= 0) coming = joint_look(p.turn + now.block);
            if (next.head >= 0) load(next, stage ^ 1);
            attn_commit();
            if (warp == 1) plan_after(n + 2, next);
            if (before && past.head >= 0) queries(past.block, past.sees, parts_of(stage ^ 1), fresh[stage]);
            const uint32_t parts = parts_of(stage);
            if (now.head >= 0) {
#pragma unroll 1
                for (int which = PAIRS ? half : 0; which < (PAIRS ? half + 1 : 2); which++) {
                    if (!(now.sees >> (4 * which + mine) & 1)) continue;
                    const uint32_t part = parts + (mine * 2 + which) * M::PART;
                    const bool partial = now.sees >> (8 + 4 * which + mine) & 1;
                    if (partial || a.p > 0) own(std::true_type(), now, stage, which, part, partial);
                    else own(std::false_type(), now, stage, which, part, false);
                }
            }
        }
        __syncwarp();
        n = where[warp];
        const joint_step &past = steps[(n - 1) & 3], &now = steps[n & 3], &next = steps[(n + 1) & 3];
        const int stage = n & 1;
        /* One fence for what others added, which the look saw, and for what this block did a step ago. */
        if (!BLOCKS && threadIdx.x == 0) {
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
            if (done >= 0) joint_pass(p.turn + done, x.order);
        }
        auto settle = [&](int to) {
            if (!BLOCKS && threadIdx.x == 0 && now.head >= 0) {
                if ((coming & ~HOPPER_FRESH) != x.order) coming = hopper_turn(p.turn + now.block, x.order);
                fresh[to] = coming & HOPPER_FRESH;
            }
        };
        if (!late) {
            settle(stage);
            __syncthreads();
        }
        const joint_step &ripe = late ? past : now;
        if (!before && ripe.head >= 0) queries(ripe.block, ripe.sees, parts_of(late ? stage ^ 1 : stage), fresh[stage]);
        if (PAIRS && now.head >= 0) {
            joint_pair(mine);
            if (now.sees >> (4 * (half ^ 1) + mine) & 1) {
                const uint32_t other = parts_of(stage) + (warp ^ 1) * M::PART;
                const uint32_t y = tiles + M::Q + stage * M::Q_BYTES + 32 * (half ^ 1) * Tile::ROW;
                joint_add_from<Op>(dv, tiles + M::P + (warp ^ 1) * M::PART, y + M::G - M::Q, 64 * half);
                joint_add_from<Op>(dk, other, y, 64 * half);
            }
        }
        if (!BLOCKS && threadIdx.x == 0) done = ripe.block;
        if (next.head < 0 && now.head < 0) break;
        if (late) settle(stage ^ 1);
    }
    attn_arrived();
    __syncthreads();
    if (!BLOCKS && threadIdx.x == 0 && done >= 0) hopper_pass(p.turn + done, x.order);
    const bool masks = a.causal || a.window >= 0 || a.dedup || a.lengths || pad;
    if (masks && !(finite(dk) && finite(dv))) *p.spoilt = 1;
    const int awaits = p.branch[t.g].awaits;
    if (awaits >= 0) {
        if (threadIdx.x == 0) hopper_counted(p.ready + awaits, p.branch[t.g].needs);
        __syncthreads();
    }
    float *sums = attn_floats(memory, 0, warp * (32 * 64));
    attn_row<float> *what = (attn_row<float> *)attn_floats(memory, M::SUMS, 0) + warp * 32;
    auto put = [&](const float(&c)[2][8][4], void *out, void *low, float own) {
        attn_stash<64>(sums, c);
        if (w0 + lane < t.end) what[lane] = attn_summed<true>(a, t, w0 + lane, own);
        __syncwarp();
        attn_write<T, 64>(a, out, attn_cut_sums{(uint16_t *)out, (uint8_t *)low}, sums, what, min(32, t.end - w0),
                          PAIRS ? 64 * half : 0);
    };
    put(dk, a.out, a.acc, (float)a.scale);
    put(dv, a.out2, a.acc2, gz);
    if (a.ranks == 1) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(p.ready + a.branch[t.g].rank, 1);
    }
}

/* ---- launch ---- */

enum { JOINT_STATIC = 512 }; /* what else the kernel has in shared memory, at most */

static int joint_limit(cudaDeviceAttr which)
{
    int device, most;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&most, which, device) != cudaSuccess) return 0;
    return most;
}

template <class Op, int DP, bool BLOCKS> static int joint_launch(const attn_args &a, const hopper_args &p)
{
    typedef joint_shape<Op, DP> M;
    const int late = joint_limit(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= M::LATE + ATTN_ALIGN + JOINT_STATIC;
    const int memory = (late ? M::LATE : M::MEMORY) + ATTN_ALIGN;
    if (p.tiles == 0) return 0;
    auto kernel = attn_joint_kernel<Op, DP, BLOCKS>;
    CUDA_TRY("attention", lac_cuda_shared((const void *)kernel, (size_t)memory));
    launch_after(kernel, (unsigned)p.tiles, M::THREADS_, (size_t)memory, a, p, late);
    return lac_cuda_launched("attention");
}
template <bool BLOCKS> static int joint_tiles(const attn_args &a, const hopper_args &p, int dtype)
{
    if (a.head_dim <= 64)
        return dtype == LAC_BF16 ? joint_launch<op_bf16<64>, 64, BLOCKS>(a, p)
                                 : joint_launch<op_f16<64>, 64, BLOCKS>(a, p);
    return dtype == LAC_BF16 ? joint_launch<op_bf16<128>, 128, BLOCKS>(a, p)
                             : joint_launch<op_f16<128>, 128, BLOCKS>(a, p);
}
int attn_joint_block_tiles(const attn_args &a, const hopper_args &p, int dtype); /* attn_joint_blocks.cu */

#endif
