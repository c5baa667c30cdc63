/* attn_hopper_parts_backward.cu: the backward of attention in f32 without TF32 on Hopper (attn_hopper_parts.cuh): a
 * pass over query rows and one over keys, as attn_parts_backward.cuh has them.
 *
 * For D = 128 the tiles of 64 rows of both sides take all of shared memory. Two warpgroups share the 64 rows that the
 * block owns: one multiplies for S and one for dP, they give each other halves of them, and each goes on with half of
 * the step's columns and sums of its own, which are added up at the end.
 */
#include "attn_hopper_parts.cuh"
#include "attn_parts_backward.cuh"

template <int DP> struct backward_shape {
    enum {
        SPLIT = DP > 64 ? 2 : 1,
        ROWS = 64 * PARTS_GROUPS / SPLIT,
        WIDE = PARTS_STEP / SPLIT, /* columns of a warpgroup */
        STAGES = DP > 64 ? 1 : 2,
        FIRST = SPLIT - 1, /* tile that is fed first: with one stage the one that is free first */
        BATCH = 1,         /* this and FIRST: 1.05 to 1.08 times the speed for D = 128, the same for D = 64 */
        OWN = parts_panels<DP, ROWS>::BYTES,
        TILE = parts_panels<DP, PARTS_STEP>::BYTES,
        X = 0, /* own: queries or keys, then dout or values */
        Y = 2 * OWN,
        Z = Y + STAGES * TILE,
        GIVEN = Z + STAGES * TILE, /* halves that warpgroups give each other */
        MEMORY = GIVEN + (SPLIT > 1 ? 2 * 16 * 128 * 4 : 0)
    };
    static_assert(SPLIT == 1 || STAGES == 1, "halves are read before the tile is free; the next step waits for it");
};

/* x: 64 x 64, S in warpgroup 0, dP in 1; s and d: both, columns 32 group .. + 31 */
__device__ __forceinline__ void exchange(float (&s)[16], float (&d)[16], const float (&x)[32], uint32_t given,
                                         int group)
{
    const uint32_t lane = threadIdx.x % 128 * 16;
    float mine[16];
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        float4 away;
        away.x = group ? x[i] : x[16 + i], away.y = group ? x[i + 1] : x[17 + i];
        away.z = group ? x[i + 2] : x[18 + i], away.w = group ? x[i + 3] : x[19 + i];
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(given + group * 8192 + i * 512 + lane),
                     "f"(away.x), "f"(away.y), "f"(away.z), "f"(away.w)
                     : "memory");
    }
#pragma unroll
    for (int i = 0; i < 16; i++) mine[i] = group ? x[16 + i] : x[i];
    hopper_sync(PARTS_ALL, PARTS_CONSUMERS);
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        float4 v;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                     : "r"(given + (group ^ 1) * 8192 + i * 512 + lane)
                     : "memory");
        const float got[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int e = 0; e < 4; e++) s[i + e] = group ? got[e] : mine[i + e], d[i + e] = group ? mine[i + e] : got[e];
    }
}

/* Scores s and dP d of a warpgroup's columns of a step, from its own rows at `mine` and the step's at `y` and `z`, as
 * soon as these are there; `weights` makes P of s meanwhile. */
template <int DP, bool FLIP, int N, int STAGES, class F>
HOPPER_FN void parts_group_both(float (&s)[1][N][4], float (&d)[1][N][4], uint32_t mine, uint32_t y, uint32_t z,
                                uint32_t given, const parts_barriers<STAGES> &barrier, parts_turn now, F &&weights)
{
    typedef backward_shape<DP> M;
    if constexpr (M::SPLIT == 1) {
        float s_low[32], d_low[32];
        float(&s_high)[32] = (float(&)[32])s;
        float(&d_high)[32] = (float(&)[32])d;
        barrier.wait_full(0, now);
        parts_group_scores<DP, M::ROWS, PARTS_STEP, FLIP>(s_high, s_low, mine, y);
        barrier.wait_full(1, now);
        parts_group_scores<DP, M::ROWS, PARTS_STEP, FLIP>(d_high, d_low, mine + M::OWN, z);
        parts_group_scored<1>(s_high, s_low);
        weights();
        parts_group_scored<0>(d_high, d_low);
    } else {
        const int group = threadIdx.x / 128;
        float high[32], low[32];
        barrier.wait_full(group, now);
        parts_group_scores<DP, M::ROWS, PARTS_STEP, FLIP>(high, low, mine + group * M::OWN, group ? z : y);
        parts_group_scored<0>(high, low);
        exchange((float(&)[16])s, (float(&)[16])d, high, given, group);
        barrier.wait_full(1 - group, now);
        weights();
    }
}

/* The 64 rows that a warpgroup keeps of x and of y, by both of them where they share rows. */
template <int DP>
HOPPER_FN void parts_own_two(uint32_t tiles, int row0, const attn_args &a, const attn_tensor &x, const attn_tensor &y,
                             const attn_tile &t, int h, int shift, int first, int limit, bool padding)
{
    typedef backward_shape<DP> M;
    const int group = threadIdx.x / 128;
    if (M::SPLIT == 1 || group == 0)
        parts_own<DP, M::BATCH, M::ROWS>(tiles + M::X, row0, a, x, t, h, shift, first, limit, padding);
    if (M::SPLIT == 1 || group == 1)
        parts_own<DP, M::BATCH, M::ROWS>(tiles + M::X + M::OWN, row0, a, y, t, h, shift, first, limit, padding);
}

/* warps of both warpgroups that share rows */
template <int DP> using parts_shared_rows = attn_split<backward_shape<DP>::SPLIT, 4, parts_consumers_meet>;

/* ---- dq ---- */

template <int DP>
__global__ void __launch_bounds__(PARTS_THREADS, 1)
    attn_hopper_parts_queries_kernel(const __grid_constant__ attn_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef backward_shape<DP> M;
    constexpr int N = M::WIDE / 8;
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t tiles = parts_tiles(memory);
    __shared__ uint64_t seen[128], kept[128]; /* masks of each warp's rows */
    __shared__ attn_row<float> rows[128];
    __shared__ float stats[4][M::ROWS]; /* lse and delta, each in two parts */
    __shared__ attn_tile t;
    __shared__ parts_barriers<M::STAGES> barrier; /* of the other side: queries or keys, dout or values */
    barrier.start();
    if (!attn_next<false>(a, M::ROWS, t)) return;
    const bool pad = a.padding != NULL;
    int low, high;
    attn_reach<false>(t, &low, &high);
    if (threadIdx.x >= PARTS_CONSUMERS) {
        hopper_fewer<PARTS_FEEDER_REGISTERS>();
        parts_feed_keys<DP, M::FIRST, M::BATCH>(a, t, low, high, tiles + M::Y, tiles + M::Z, barrier);
        return;
    }
    hopper_more<PARTS_GROUP_REGISTERS>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int row0 = M::SPLIT == 1 ? 64 * group : 0, w = M::SPLIT == 1 ? warp : warp % 4;
    const int g0 = t.first + row0, g1 = g0 + 64 < t.end ? g0 + 64 : t.end;
    const int w0 = t.first + 16 * w, w1 = w0 + 16 < t.end ? w0 + 16 : t.end;
    const parts_scale scale(a);
    const float gz = (float)(a.gscale * a.keep_scale);
    parts_own_two<DP>(tiles, row0, a, a.q, a.g, t, t.h, a.shift, g0, t.end, false);
    parts_load_stats<M::ROWS, PARTS_CONSUMERS>(stats, a, t);
    hopper_sync(PARTS_ALL, PARTS_CONSUMERS);
    float dq[1][DP / 8][4], weight[1][2] = {}, dot[1][2] = {};
    clear(dq);
    const float *row = &stats[0][16 * w + lane / 4];
    const uint32_t mine = tiles + M::X + row0 * 128;
    parts_turn now = {0, 0};
#pragma unroll 1
    for (int k0 = low; k0 < high; k0 += PARTS_STEP) {
        const bool idle = g0 >= g1 || k0 > g1 - 1 + t.after || k0 + PARTS_STEP <= g0 - t.before;
        const uint32_t k = tiles + M::Y + now.stage * M::TILE, v = tiles + M::Z + now.stage * M::TILE;
        if (idle) {
            barrier.pass(now);
            continue;
        }
        const int first = k0 + (M::SPLIT == 1 ? 0 : M::WIDE * group);
        const bool partial = first + M::WIDE > t.live || first + M::WIDE - 1 > w0 + t.after ||
                             first < w1 - 1 - t.before || pad || a.dedup;
        if (partial) attn_tell<1>(seen, attn_row_keys(a, t, t.h, w0 + lane % 16, first, attn_alive(a, t, first)));
        if (a.p > 0) attn_tell<1>(kept, attn_kept<false>(a, t, t.h, w0 + lane % 16, first));
        float s[1][N][4], d[1][N][4];
        parts_group_both<DP, false>(s, d, mine, k, v, tiles + M::GIVEN, barrier, now, [&]() {
            parts_weigh_rows(s, scale, row, M::ROWS);
            if (partial) attn_select(s, seen, 0, 0);
        });
        barrier.arrive(barrier.free(1, now));
        if (a.p > 0) attn_select(d, kept, 0, 0);
        if (a.deltas) parts_add_deltas(weight, dot, s, d, gz);
        else {
            parts_differ_rows(d, s, gz, row, M::ROWS);
            if (partial) attn_select(d, seen, 0, 0);
            uint32_t left[PARTS][2 * N];
            parts_group_left<N / 2>(left, (const float *)d);
            parts_group_add<DP, PARTS_STEP, N / 2>((float(&)[DP / 2]) dq, left,
                                                   k + (M::SPLIT == 1 ? 0 : group * M::WIDE * 128));
        }
        barrier.arrive(barrier.free(0, now));
        barrier.next(now);
    }
    typedef parts_shared_rows<DP> Split;
    if (a.deltas) {
        attn_put_deltas<float, Split>(a, t, lane, w0, w1, weight, dot, &stats[0][16 * w], M::ROWS);
        return;
    }
    const bool spoilt = hopper_sync_or(PARTS_ALL, PARTS_CONSUMERS, !finite(dq));
    attn_wait<false>(a, t, parts_consumers_meet());
    attn_leave_backward<false, float, DP, Split>(a, t, lane, 0, (float)a.scale, parts_sums<DP>(memory),
                                                 rows + warp * 16, w0, w1, spoilt, dq);
    attn_signal<false>(a, t, parts_consumers_meet());
#endif
}

/* ---- dk and dv ---- */

template <int DP>
__global__ void __launch_bounds__(PARTS_THREADS, 1) attn_hopper_parts_keys_kernel(const __grid_constant__ attn_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef backward_shape<DP> M;
    constexpr int N = M::WIDE / 8;
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t tiles = parts_tiles(memory);
    __shared__ uint64_t seen[128], kept[128]; /* masks of each warp's rows */
    __shared__ attn_row<float> rows[128];
    __shared__ __align__(16) float stats[M::STAGES][4][PARTS_STEP]; /* lse and delta, each in two parts */
    __shared__ attn_tile t;
    __shared__ parts_barriers<M::STAGES> barrier; /* of the other side: queries or keys, dout or values */
    barrier.start();
    if (!attn_next<true>(a, M::ROWS, t)) return;
    const int hk = t.h / a.group;
    const bool pad = a.padding != NULL;
    int low, high;
    attn_reach<true>(t, &low, &high);
    if (threadIdx.x >= PARTS_CONSUMERS) {
        hopper_fewer<PARTS_FEEDER_REGISTERS>();
        parts_turn now = {0, 0};
        parts_rows<DP, M::BATCH> rows;
        const int thread = threadIdx.x % 128, which = thread / PARTS_STEP;
        float stat[2];
        int h = t.h, i0 = low;
        /* rows from i on of a turn, of queries or dout */
        auto load = [&](int tile, int i, int turn) {
            rows.load(turn, a, tile ? a.g : a.q, t, h, a.shift, i0 + i, h < 0 ? 0 : t.q1, false);
        };
        /* statistics of the step's rows */
        auto look = [&]() {
            const int i = i0 + thread % PARTS_STEP;
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float *from = parts_stats(a, which + 2 * x);
                stat[x] = h >= 0 && i < t.q1 && from ? from[attn_stat(a, t, h, i, a.per_branch)]
                          : which + x                ? 0
                                                     : INFINITY;
            }
        };
        auto tell = [&](int stage) {
            stats[stage][which][thread % PARTS_STEP] = stat[0];
            stats[stage][which + 2][thread % PARTS_STEP] = stat[1];
        };
        if (low >= high) h = -1;
        look();
#pragma unroll
        for (int turn = 0; turn < PARTS_TURNS; turn += M::BATCH) load(M::FIRST, 0, turn);
#pragma unroll 1
        while (h >= 0) {
            const int stage = now.stage;
            barrier.wait_free(M::FIRST, now);
            if (!M::FIRST) tell(stage);
            parts_feed(rows, tiles + (M::FIRST ? M::Z : M::Y) + stage * M::TILE,
                       [&](int i, int turn) { load(i ? M::FIRST : 1 - M::FIRST, i, turn); });
            barrier.arrive(barrier.full(M::FIRST, now));
            barrier.wait_free(1 - M::FIRST, now);
            if (M::FIRST) tell(stage);
            parts_feed(rows, tiles + (M::FIRST ? M::Y : M::Z) + stage * M::TILE, [&](int i, int turn) {
                if (i == 0 && turn == 0) {
                    i0 += PARTS_STEP;
                    if (i0 >= high) h = attn_follows(a, t.g, h), i0 = low;
                    look();
                }
                load(i ? 1 - M::FIRST : M::FIRST, i, turn);
            });
            barrier.arrive(barrier.full(1 - M::FIRST, now));
            barrier.next(now);
        }
        return;
    }
    hopper_more<PARTS_GROUP_REGISTERS>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int row0 = M::SPLIT == 1 ? 64 * group : 0, w = M::SPLIT == 1 ? warp : warp % 4;
    const int g0 = t.first + row0;
    const int w0 = t.first + 16 * w;
    const parts_scale scale(a);
    const float gz = (float)(a.gscale * a.keep_scale);
    const int last = t.end < t.live ? t.end : t.live;
    parts_own_two<DP>(tiles, row0, a, a.k, a.v, t, hk, 0, g0, last, pad);
    hopper_sync(PARTS_ALL, PARTS_CONSUMERS);
    float dk[1][DP / 8][4], dv[1][DP / 8][4];
    clear(dk);
    clear(dv);
    const uint32_t mine = tiles + M::X + row0 * 128;
    parts_turn now = {0, 0};
#pragma unroll 1
    for (int head = low < high ? t.h : -1; head >= 0; head = attn_follows(a, t.g, head)) {
#pragma unroll 1
        for (int i0 = low; i0 < high; i0 += PARTS_STEP) {
            const bool idle = g0 >= t.end || i0 + PARTS_STEP - 1 < g0 - t.after || i0 > g0 + 63 + t.before;
            const uint32_t q = tiles + M::Y + now.stage * M::TILE, g = tiles + M::Z + now.stage * M::TILE;
            if (idle) {
                barrier.pass(now);
                continue;
            }
            const int column = M::SPLIT == 1 ? 0 : M::WIDE * group, i = i0 + column;
            const bool partial =
                w0 + 16 > t.live || i < w0 + 15 - t.after || i + M::WIDE - 1 > w0 + t.before || pad || a.dedup;
            if (partial) attn_tell<1>(seen, attn_key_rows(a, t, head, w0 + lane % 16, i));
            if (a.p > 0) attn_tell<1>(kept, attn_kept<true>(a, t, head, w0 + lane % 16, i));
            const float *row = &stats[now.stage][0][column + lane % 4 * 2];
            float s[1][N][4], d[1][N][4];
            parts_group_both<DP, true>(s, d, mine, q, g, tiles + M::GIVEN, barrier, now, [&]() {
                parts_weigh_columns(s, scale, row, PARTS_STEP);
                if (partial) attn_select(s, seen, 0, 0);
            });
            if (a.p > 0) attn_select(d, kept, 0, 0);
            parts_differ_columns(d, s, gz, row, PARTS_STEP);
            if (partial) attn_select(d, seen, 0, 0);
            if (a.p > 0) attn_select(s, kept, 0, 0);
            uint32_t left[PARTS][2 * N];
            parts_group_left<N / 2>(left, (const float *)s);
            parts_group_add<DP, PARTS_STEP, N / 2>((float(&)[DP / 2]) dv, left, g + column * 128);
            barrier.arrive(barrier.free(1, now));
            parts_group_left<N / 2>(left, (const float *)d);
            parts_group_add<DP, PARTS_STEP, N / 2>((float(&)[DP / 2]) dk, left, q + column * 128);
            barrier.arrive(barrier.free(0, now));
            barrier.next(now);
        }
    }
    const int w1 = w0 + 16 < t.end ? w0 + 16 : t.end;
    const bool spoilt = hopper_sync_or(PARTS_ALL, PARTS_CONSUMERS, !(finite(dk) && finite(dv)));
    attn_wait<true>(a, t, parts_consumers_meet());
    auto leave = [&](int which, auto &x, float own) {
        if (M::SPLIT > 1) hopper_sync(PARTS_ALL, PARTS_CONSUMERS); /* what was there is written */
        attn_leave_backward<true, float, DP, parts_shared_rows<DP>>(a, t, lane, which, own, parts_sums<DP>(memory),
                                                                    rows + warp * 16, w0, w1, spoilt, x);
    };
    leave(0, dk, (float)a.scale);
    leave(1, dv, spoilt ? 1.f : gz); /* slow rows have it already */
    attn_signal<true>(a, t, parts_consumers_meet());
#endif
}

template <int DP, class K> static int launch_pass(K kernel, attn_args &a, const lac_plan *plan, bool keys)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, keys, backward_shape<DP>::ROWS, &tiles));
    return attn_launch(kernel, a, tiles, PARTS_THREADS, backward_shape<DP>::MEMORY + 1024);
}

int attn_hopper_parts_keys(attn_args &a, const lac_plan *plan)
{
    return a.head_dim <= 64 ? launch_pass<64>(attn_hopper_parts_keys_kernel<64>, a, plan, true)
                            : launch_pass<128>(attn_hopper_parts_keys_kernel<128>, a, plan, true);
}
int attn_hopper_parts_queries(attn_args &a, const lac_plan *plan)
{
    return a.head_dim <= 64 ? launch_pass<64>(attn_hopper_parts_queries_kernel<64>, a, plan, false)
                            : launch_pass<128>(attn_hopper_parts_queries_kernel<128>, a, plan, false);
}
