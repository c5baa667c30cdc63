/* attn_joint.cuh: the backward of attention on tensor cores (mma.sync) in one pass over the keys: dk, dv and dq.
 *
 * A block owns a tile of 128 keys of one unit (attn_keys.cuh) and walks over blocks of query rows, head after head:
 * five products and one exponential a pair, where a pass over the keys and one over the queries take seven and two.
 * Scores come out transposed, S^T = K Q^T and dP^T = V dO^T. What the tile adds to dq, dS K, needs dS of all its keys:
 * dS passes through shared memory, and the sums lie in device memory in f32, blocks of 64 rows in the order of the
 * products' registers, to which tiles add in turns. Work list, turns and what happens to the sums afterwards are those
 * of the Hopper backward (attn_hopper_backward.cuh); only the tiles are computed differently.
 *
 * Floor, D = 128: shared memory. A matrix that is fetched for two products costs as much time as they do (four cycles
 * beside 3.2), so every warp has tiles of 32 x 32 of S and dP and 32 keys x 64 columns of dk and dv: 128 registers of
 * sums, 64 of scores, nothing spills. Eight warps, 64 query rows a step; two warps share 32 keys, each has the scores
 * of half of the rows and the results of half of the columns, so they give each other their halves of P^T and dS^T by
 * way of shared memory, as they do with dS for dq. Fetches and stores for 320 products of 16 x 8 x 16: 144, where the
 * two passes had 272 for 448, and FlashAttention-2's tiles take 152. At the share of their floor that the two passes
 * reach, 77%, that would be 1.2 times FlashAttention-2's speed. It is not reached; barriers and waits with two warps a
 * scheduler may be why, which no profile has shown.
 *
 * A step has two barriers: one when its rows are there, one when its dS are. A turn is looked at by one thread a step
 * ahead; the sums so far become the accumulators of dS K, so nothing is added, and they are asked for while products of
 * dk and dv run. The turn is passed on in the next step, when the stores have long arrived, behind a fence that comes
 * before anything is asked for. A form with look and fence in one place in the step, what each warp sees worked out
 * anew, and a loop over keys that was not unrolled gave 205, 225, 241, 240 (causal 164, 198, 235, 246) in another run.
 *
 * Measured, bf16, one H200, 32768 rows in all, heads x D = 2048, TFLOP/s, medians of five: this, two passes, and
 * PyTorch's FlashAttention-2 in the same run (target 0.9 of it):
 *
 *     rows            1k                 2k                 8k                 32k
 *     D = 128         211, 174, 229      232, 189, 267      249, 203, 301      250, 206, 308
 *     causal          166, 142, 169      202, 169, 221      242, 196, 288      254, 210, 316
 *
 * 0.92, 0.87, 0.83, 0.81 and 0.98, 0.91, 0.84, 0.80: missed from 2k rows on, causal from 8k; the benchmark's section
 * read 0.96 and 0.92 at 1k and 2k (218, 240) later. Of that earlier form: turns that are not waited for, 0 to 2%
 * faster; neither those nor dq read or stored, 5 to 10%; vector atomics instead of loads and stores, within 1%.
 *
 * D = 64 was written as well (four warps, P^T and dS^T in registers, two blocks a multiprocessor: 152 fetches where the
 * two passes have 200): 182, 199, 214, 217 and causal 144, 174, 206, 214, where two passes reach 189, 207, 224, 228 and
 * 142, 175, 212, 229. So head dimensions up to 64 take two passes.
 *
 * Rejected: 16 keys a warp with all rows (180 fetches), atomic additions (order, and four narrow ones on sm_80 where a
 * load and a store are wide).
 */
#ifndef LAC_CUDA_ATTN_JOINT_CUH
#define LAC_CUDA_ATTN_JOINT_CUH
#include "attn_hopper_backward.cuh"
#include "attn_mma.cuh"

/* Sizes, and places in shared memory; for head dimensions above 64. */
enum { JOINT_COLUMNS = 128 };
template <class Op> struct joint_shape {
    enum {
        WARPS = 8,
        THREADS_ = 32 * WARPS,
        KEYS = 128,
        ROWS = HOPPER_ROWS, /* query rows of a step */
        K_BYTES = KEYS * Op::tile::ROW,
        Q_BYTES = ROWS * Op::tile::ROW,
        PART = 32 * 32 * 2, /* P^T or dS^T of a warp */
        K = 0,
        V = K + K_BYTES,
        Q = V + K_BYTES, /* two stages */
        G = Q + 2 * Q_BYTES,
        S = G + 2 * Q_BYTES,
        P = S + WARPS * PART,
        STATS = P + WARPS * PART,
        MEMORY = STATS + 2 * 2 * ROWS * 4,
        SUMS = WARPS * 32 * 64 * 4 /* results on their way out, then what becomes of their rows */
    };
    static_assert(SUMS + (int)sizeof(attn_row<float>) * THREADS_ <= MEMORY, "room for results");
};

/* ---- P^T and dS^T ---- */

/* They lie in shared memory as 4 x 4 blocks of 8 keys x 8 rows, 128 bytes each: no address meets a bank twice, neither
 * here nor when matrices are fetched, as they are or transposed. */
template <class Op> __device__ __forceinline__ void joint_put(uint32_t part, const uint32_t (&x)[2][2][4])
{
    part += threadIdx.x % 32 * 4;
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
__device__ __forceinline__ void joint_get(uint32_t (&x)[4], uint32_t part, int m, int k)
{
    const int lane = threadIdx.x % 32;
    ldmatrix(x, part + (lane / 8 % 2 * 4 + lane / 16) * 128 + lane % 8 * 16 + (8 * m + 2 * k) * 128);
}
/* 16 rows x 16 keys */
__device__ __forceinline__ void joint_get_rows(uint32_t (&x)[4], uint32_t part, int m, int k)
{
    const int lane = threadIdx.x % 32;
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
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < 2; k++) joint_get(left[m][k], part, m, k);
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
};
__device__ __forceinline__ joint_step joint_after(const hopper_tile &x, joint_step s)
{
    s.row += HOPPER_ROWS;
    if (s.row < min(x.rows, x.high * HOPPER_ROWS)) return s;
    const unsigned more = x.heads & ~0u << s.head << 1;
    return {more ? __ffs((int)more) - 1 : -1, x.low * HOPPER_ROWS};
}

/* By one thread: a look at a turn, a step before it is acted on; and, behind the fence that orders both what others
 * added and what this block did for them, the turn of the step before is passed on. */
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

template <class Op>
__global__ void __launch_bounds__(joint_shape<Op>::THREADS_, 1)
    attn_joint_kernel(const __grid_constant__ attn_args a, const __grid_constant__ hopper_args p)
{
    typedef typename Op::T T;
    typedef typename Op::tile Tile;
    typedef joint_shape<Op> M;
    constexpr int DP = JOINT_COLUMNS, WIDE = 32; /* columns of dq of a warp */
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ hopper_tile x;
    __shared__ attn_tile t;
    __shared__ int fresh, blocks; /* has nobody added to the block? blocks of one head */
    __shared__ int done, coming;  /* block whose turn is to be passed on, or -1; what was seen of the next one's */
    const uint32_t tiles = attn_tiles(memory);
    if (!joint_claim(a, p, x, t, blocks)) {
        if (a.ranks > 1 && threadIdx.x == 0) atomicAdd(p.ready + a.branch[x.branch].rank, 1);
        return;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, mine = warp / 2, half = warp % 2;
    const int w0 = t.first + 32 * mine, hk = x.kv_head;
    const int columns = (a.head_dim + 7) / 8 * 8; /* of the sums of dq */
    const float gz = (float)(a.gscale * a.keep_scale);
    const bool pad = a.padding != NULL;
    __shared__ bool quick;
    if (threadIdx.x == 0) quick = attn_quick(a, a.q, t) && attn_quick(a, a.g, t);
    attn_stream<Tile, T, M::ROWS, DP, M::THREADS_, true> qs, gs;
    auto block_of = [&](joint_step s) { return x.block + s.head * blocks + s.row / HOPPER_ROWS; };
    auto load = [&](joint_step s, int stage) {
        const int h = hk * a.group + s.head, i0 = t.q0 + s.row;
        const uint32_t to = tiles + stage * M::Q_BYTES;
        if (quick) {
            if (s.row == x.low * HOPPER_ROWS) {
                qs.start(a, a.q, t, h, a.shift, i0);
                gs.start(a, a.g, t, h, a.shift, i0);
            }
            qs.next(to + M::Q, a, a.q, t, h, i0, t.q1);
            gs.next(to + M::G, a, a.g, t, h, i0, t.q1);
        } else {
            attn_load<Tile, T, M::ROWS, DP, M::THREADS_>(to + M::Q, a, a.q, t, h, a.shift, i0, t.q1, false);
            attn_load<Tile, T, M::ROWS, DP, M::THREADS_>(to + M::G, a, a.g, t, h, a.shift, i0, t.q1, false);
        }
        if ((int)threadIdx.x < M::ROWS / 2) { /* lse, then delta */
            const int which = threadIdx.x / (M::ROWS / 4), at = threadIdx.x % (M::ROWS / 4) * 4;
            attn_copy16(tiles + M::STATS + ((2 * stage + which) * M::ROWS + at) * 4,
                        p.stats + ((int64_t)block_of(s) * 2 + which) * HOPPER_ROWS + at, true);
        }
    };
    /* may any of the 32 rows from lattice index i on see any of the tile's 32 keys number `which`? */
    auto visible = [&](int which, int i) {
        const int k0 = t.first + 32 * which, k1 = min(min(k0 + 32, t.end), t.live);
        return k0 < k1 && i < t.q1 && i + 31 >= k0 - t.after && i <= k1 - 1 + t.before;
    };
    attn_load<Tile, T, M::KEYS, DP, M::THREADS_>(tiles + M::K, a, a.k, t, hk, 0, t.first, min(t.end, t.live), pad);
    attn_load<Tile, T, M::KEYS, DP, M::THREADS_>(tiles + M::V, a, a.v, t, hk, 0, t.first, min(t.end, t.live), pad);
    float dk[2][8][4], dv[2][8][4];
    clear(dk);
    clear(dv);
    joint_step now = {-1, 0}, next = {x.low < x.high ? __ffs((int)x.heads) - 1 : -1, x.low * HOPPER_ROWS};
    if (threadIdx.x == 0) done = -1;
#pragma unroll 1
    for (int stage = 1;; stage ^= 1) { /* the first turn only loads */
        attn_arrived();
        __syncthreads();
        int ahead = 0;
        if (threadIdx.x == 0) { /* before anything is asked for that the fence would wait for */
            __threadfence();
            if (done >= 0) joint_pass(p.turn + done, x.order);
            if (next.head >= 0) ahead = joint_look(p.turn + block_of(next));
        }
        if (next.head >= 0) load(next, stage ^ 1);
        attn_commit();
        if (now.head >= 0) {
            const int block = block_of(now), h = hk * a.group + now.head, i = t.q0 + now.row + 32 * half;
            const uint32_t part = tiles + M::S + warp * M::PART;
            const uint32_t rows = tiles + M::Q + stage * M::Q_BYTES + 32 * half * Tile::ROW;
            uint32_t p_left[2][2][4], d_left[2][2][4];
            /* bit: 32 keys, 32 rows */
            const unsigned sees = __ballot_sync(~0u, visible(lane % 4, t.q0 + now.row + lane / 4 % 2 * 32));
            const bool shown = sees >> (4 * half + mine) & 1;
            if (shown) {
                const int w1 = min(w0 + 32, t.end);
                const bool partial =
                    w0 + 32 > t.live || i < w1 - 1 - t.after || i + 31 > w0 + t.before || pad || a.dedup;
                uint64_t *seen = (uint64_t *)attn_floats(memory, M::S + warp * M::PART, 0) - 32 * warp;
                if (partial) attn_tell<2>(seen, attn_key_rows(a, t, h, w0 + lane, i));
                if (a.p > 0) attn_tell<2>(seen + 32, attn_kept<true>(a, t, h, w0 + lane, i));
                const float *lse = attn_floats(memory, M::STATS, 2 * stage * M::ROWS + 32 * half + lane % 4 * 2);
                float s[2][4][4], d[2][4][4];
                scores<Op, DP>(s, tiles + M::K, 32 * mine, rows);
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const float2 l = *(const float2 *)(lse + 8 * n);
#pragma unroll
                    for (int m = 0; m < 2; m++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            s[m][n][e] = attn_ex2(fmaf(s[m][n][e], a.log2_scale, e % 2 ? -l.y : -l.x));
                }
                scores<Op, DP>(d, tiles + M::V, 32 * mine, rows + M::G - M::Q);
                if (a.p > 0) attn_select(d, seen + 32, 0, 0);
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const float2 l = *(const float2 *)(lse + M::ROWS + 8 * n);
#pragma unroll
                    for (int m = 0; m < 2; m++)
#pragma unroll
                        for (int e = 0; e < 4; e++) d[m][n][e] = s[m][n][e] * fmaf(d[m][n][e], gz, e % 2 ? -l.y : -l.x);
                }
                if (partial) {
                    attn_select(d, seen, 0, 0);
                    attn_select(s, seen, 0, 0);
                }
                if (a.p > 0) attn_select(s, seen + 32, 0, 0);
                joint_pack<Op>(d_left, d);
                joint_pack<Op>(p_left, s);
                __syncwarp(); /* the words of masks lie where dS goes */
                joint_put<Op>(part, d_left);
                joint_put<Op>(part + M::P - M::S, p_left);
                joint_add<Op>(dv, p_left, rows + M::G - M::Q, 64 * half);
                joint_add<Op>(dk, d_left, rows, 64 * half);
            }
            if (threadIdx.x == 0) {
                int turn = coming;
                if ((turn & ~HOPPER_FRESH) != x.order) turn = hopper_turn(p.turn + block, x.order);
                fresh = turn & HOPPER_FRESH;
                coming = ahead;
            }
            __syncthreads();
            float dq[2][WIDE / 8][4];
            float *sums =
                p.dq + (int64_t)block * (HOPPER_ROWS * columns) + WIDE / 8 * 512 * mine + 2 * half * 128 + lane * 4;
            const int there = columns / 8 - WIDE / 8 * mine;
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < WIDE / 8; n++) {
                    float4 old = {0, 0, 0, 0};
                    if (!fresh && n < there) old = __ldcg((const float4 *)(sums + n * 512 + m * 128));
                    dq[m][n][0] = old.x, dq[m][n][1] = old.y, dq[m][n][2] = old.z, dq[m][n][3] = old.w;
                }
            if (sees >> (4 * (half ^ 1) + mine) & 1) {
                const uint32_t other = tiles + M::S + (warp ^ 1) * M::PART;
                const uint32_t y = tiles + M::Q + stage * M::Q_BYTES + 32 * (half ^ 1) * Tile::ROW;
                joint_add_from<Op>(dv, other + M::P - M::S, y + M::G - M::Q, 64 * half);
                joint_add_from<Op>(dk, other, y, 64 * half);
            }
#pragma unroll
            for (int keys = 0; keys < 4; keys++) {
                if (!(sees >> (4 * half + keys) & 1)) continue;
                const uint32_t from = tiles + M::S + (keys * 2 + half) * M::PART;
                const uint32_t y = tiles + M::K + 32 * keys * Tile::ROW;
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    uint32_t left[2][4], b[4];
#pragma unroll
                    for (int m = 0; m < 2; m++) joint_get_rows(left[m], from, m, k);
#pragma unroll
                    for (int e = 0; e < WIDE / 8; e += 2) {
                        Op::bt(b, y, WIDE * mine + 8 * e, k);
#pragma unroll
                        for (int m = 0; m < 2; m++) {
                            Op::mma(dq[m][e], left[m], b[0], b[1]);
                            Op::mma(dq[m][e + 1], left[m], b[2], b[3]);
                        }
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < WIDE / 8; n++)
                    if (n < there)
                        *(float4 *)(sums + n * 512 + m * 128) = {dq[m][n][0], dq[m][n][1], dq[m][n][2], dq[m][n][3]};
            if (threadIdx.x == 0) done = block;
        } else if (threadIdx.x == 0) coming = ahead;
        if (next.head < 0) break;
        now = next;
        next = joint_after(x, next);
    }
    attn_arrived();
    __syncthreads();
    if (threadIdx.x == 0 && done >= 0) hopper_pass(p.turn + done, x.order);
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
                          64 * half);
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

#endif
