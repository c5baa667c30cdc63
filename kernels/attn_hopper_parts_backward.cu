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

/* Adds up what warps of both warpgroups have of the same rows, in the first one's sums. True where rows leave. */
template <int SPLIT, int SIZE> HOPPER_FN bool join(float *sums, bool all)
{
    if constexpr (SPLIT > 1) {
        hopper_sync(PARTS_ALL, PARTS_CONSUMERS);
        if (threadIdx.x >= 128) return false;
        if (all)
#pragma unroll 1
            for (int at = threadIdx.x % 32 * 4; at < SIZE; at += 128) {
                float4 x = *(const float4 *)(sums + at);
                const float4 y = *(const float4 *)(sums + 4 * SIZE + at);
                *(float4 *)(sums + at) = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
            }
        __syncwarp();
    }
    return true;
}

template <int N> HOPPER_FN bool finite_all(const float (&x)[N])
{
    float probe = 0;
#pragma unroll
    for (int i = 0; i < N; i++) probe += x[i] * 0;
    return probe == 0;
}

/* ---- dq ---- */

template <int DP>
__global__ void __launch_bounds__(PARTS_THREADS, 1)
    attn_hopper_parts_queries_kernel(const __grid_constant__ attn_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef backward_shape<DP> M;
    constexpr int N = M::WIDE / 8;
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t tiles = (attn_shared(memory) + 1023) & ~1023u;
    __shared__ uint64_t seen[128], kept[128]; /* masks of each warp's rows */
    __shared__ attn_row<float> rows[128];
    __shared__ float stats[4][M::ROWS]; /* lse and delta, each in two parts */
    __shared__ attn_tile t;
    __shared__ parts_barriers<M::STAGES> barrier; /* of the other side: queries or keys, dout or values */
    barrier.start();
    if (!attn_next<false>(a, M::ROWS, t)) return;
    const bool pad = a.padding != NULL;
    int low = t.first - t.before, high = t.end - 1 + t.after + 1;
    low = low < 0 ? 0 : low;
    high = high < t.live ? high : t.live;
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
    if (M::SPLIT == 1 || group == 0)
        parts_own<DP, M::BATCH, M::ROWS>(tiles + M::X, row0, a, a.q, t, t.h, a.shift, g0, t.end, false);
    if (M::SPLIT == 1 || group == 1)
        parts_own<DP, M::BATCH, M::ROWS>(tiles + M::X + M::OWN, row0, a, a.g, t, t.h, a.shift, g0, t.end, false);
    for (int i = threadIdx.x; i < 4 * M::ROWS; i += PARTS_CONSUMERS) {
        const int which = i / M::ROWS, row = t.first + i % M::ROWS;
        const float *from = parts_stats(a, which);
        stats[which][i % M::ROWS] = row < t.end && from ? from[attn_stat(a, t, t.h, row, a.per_branch)]
                                    : which             ? 0
                                                        : INFINITY;
    }
    hopper_sync(PARTS_ALL, PARTS_CONSUMERS);
    float dq[DP / 2], weight[2] = {0, 0}, dot[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < DP / 2; i++) dq[i] = 0;
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
        float s[1][N][4], d[1][N][4];
        auto weights = [&]() {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float lse = row[8 * i], low = row[M::ROWS + 8 * i];
#pragma unroll
                for (int x = 0; x < 2 * N; x++)
                    s[0][x / 2][2 * i + x % 2] = scale.p(s[0][x / 2][2 * i + x % 2], lse, low);
            }
            if (partial) attn_select(s, seen, 0, 0);
        };
        auto masks = [&]() {
            if (partial) attn_tell<1>(seen, attn_row_keys(a, t, t.h, w0 + lane % 16, first, attn_alive(a, t, first)));
            if (a.p > 0) attn_tell<1>(kept, attn_kept<false>(a, t, t.h, w0 + lane % 16, first));
        };
        masks();
        if constexpr (M::SPLIT == 1) {
            float s_low[32], d_low[32];
            float(&s_high)[32] = (float(&)[32])s;
            float(&d_high)[32] = (float(&)[32])d;
            barrier.wait_full(0, now);
            parts_group_scores<DP, M::ROWS, PARTS_STEP, false>(s_high, s_low, mine, k);
            barrier.wait_full(1, now);
            parts_group_scores<DP, M::ROWS, PARTS_STEP, false>(d_high, d_low, mine + M::OWN, v);
            parts_group_scored<1>(s_high, s_low);
            weights();
            parts_group_scored<0>(d_high, d_low);
        } else {
            float high_part[32], low_part[32];
            barrier.wait_full(group, now);
            parts_group_scores<DP, M::ROWS, PARTS_STEP, false>(high_part, low_part, mine + group * M::OWN,
                                                               group ? v : k);
            parts_group_scored<0>(high_part, low_part);
            exchange((float(&)[16])s, (float(&)[16])d, high_part, tiles + M::GIVEN, group);
            barrier.wait_full(1 - group, now);
            weights();
        }
        barrier.arrive(barrier.free(1, now));
        if (a.p > 0) attn_select(d, kept, 0, 0);
        if (a.deltas) {
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    weight[i / 2] += s[0][n][i];
                    dot[i / 2] += s[0][n][i] == 0 ? 0.f : s[0][n][i] * (d[0][n][i] * gz);
                }
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float delta = row[2 * M::ROWS + 8 * i], low = row[3 * M::ROWS + 8 * i];
#pragma unroll
                for (int x = 0; x < 2 * N; x++) {
                    float &z = d[0][x / 2][2 * i + x % 2];
                    z = s[0][x / 2][2 * i + x % 2] * (z * gz - delta - low);
                }
            }
            if (partial) attn_select(d, seen, 0, 0);
            uint32_t left[PARTS][2 * N];
            parts_group_left<N / 2>(left, (const float *)d);
            parts_group_add<DP, PARTS_STEP, N / 2>(dq, left, k + (M::SPLIT == 1 ? 0 : group * M::WIDE * 128));
        }
        barrier.arrive(barrier.free(0, now));
        barrier.next(now);
    }
    if (a.deltas) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = w0 + 8 * i + lane / 4;
            float sum = quad_sum(weight[i]), all = quad_sum(dot[i]);
            if constexpr (M::SPLIT > 1) {
                float *other = &stats[0][16 * w + 8 * i + lane / 4];
                hopper_sync(PARTS_ALL, PARTS_CONSUMERS);
                if (group && lane % 4 == 0) other[0] = sum, other[M::ROWS] = all;
                hopper_sync(PARTS_ALL, PARTS_CONSUMERS);
                sum += other[0], all += other[M::ROWS];
            }
            if (at < w1 && lane % 4 == 0 && (M::SPLIT == 1 || group == 0))
                attn_put_delta<float>(a, t, at, sum == 0 ? 0 : all / sum);
        }
        return;
    }
    const bool spoilt = hopper_sync_or(PARTS_ALL, PARTS_CONSUMERS, !finite_all(dq));
    attn_wait<false>(a, t, parts_consumers_meet());
    float *sums = (float *)(memory + (tiles - attn_shared(memory))) + warp * 16 * DP;
    attn_row<float> *what = rows + warp * 16;
    if (spoilt)
        for (int i = 0; w0 + i < w1 && (M::SPLIT == 1 || group == 0); i++) {
            float x[ATTN_SLOW_PARTS] = {};
            attn_slow_add_query<float>(a, t, w0 + i, x);
            attn_stash_slow<DP>(sums, i, x);
        }
    else attn_stash<DP>(sums, (float(&)[1][DP / 8][4]) dq);
    if (join<M::SPLIT, 16 * DP>(sums, !spoilt)) {
        if (lane < 16 && w0 + lane < w1) what[lane] = attn_summed<false>(a, t, w0 + lane, (float)a.scale);
        __syncwarp();
        attn_write<float, DP>(a, a.out, attn_f32_sums{(float *)a.acc}, sums, what, w1 - w0);
    }
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
    const uint32_t tiles = (attn_shared(memory) + 1023) & ~1023u;
    __shared__ uint64_t seen[128], kept[128]; /* masks of each warp's rows */
    __shared__ attn_row<float> rows[128];
    __shared__ __align__(16) float stats[M::STAGES][4][PARTS_STEP]; /* lse and delta, each in two parts */
    __shared__ attn_tile t;
    __shared__ parts_barriers<M::STAGES> barrier; /* of the other side: queries or keys, dout or values */
    barrier.start();
    if (!attn_next<true>(a, M::ROWS, t)) return;
    if (!attn_leads(a, t.g, t.h)) {
        attn_signal<true>(a, t);
        return;
    }
    const int hk = t.h / a.group;
    const bool pad = a.padding != NULL;
    int low = t.first - t.after, high = t.end - 1 + t.before + 1;
    low = low > t.q0 ? low : t.q0;
    high = high < t.q1 ? high : t.q1;
    if (t.first >= t.live) high = low;
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
    if (M::SPLIT == 1 || group == 0)
        parts_own<DP, M::BATCH, M::ROWS>(tiles + M::X, row0, a, a.k, t, hk, 0, g0, last, pad);
    if (M::SPLIT == 1 || group == 1)
        parts_own<DP, M::BATCH, M::ROWS>(tiles + M::X + M::OWN, row0, a, a.v, t, hk, 0, g0, last, pad);
    hopper_sync(PARTS_ALL, PARTS_CONSUMERS);
    float dk[DP / 2], dv[DP / 2];
#pragma unroll
    for (int i = 0; i < DP / 2; i++) dk[i] = dv[i] = 0;
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
            const float *row = &stats[now.stage][0][column + lane % 4 * 2];
            float s[1][N][4], d[1][N][4];
            auto weights = [&]() {
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const float2 l = *(const float2 *)(row + 8 * n), low = *(const float2 *)(row + PARTS_STEP + 8 * n);
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        s[0][n][e] = scale.p(s[0][n][e], e % 2 ? l.y : l.x, e % 2 ? low.y : low.x);
                }
                if (partial) attn_select(s, seen, 0, 0);
            };
            auto masks = [&]() {
                if (partial) attn_tell<1>(seen, attn_key_rows(a, t, head, w0 + lane % 16, i));
                if (a.p > 0) attn_tell<1>(kept, attn_kept<true>(a, t, head, w0 + lane % 16, i));
            };
            masks();
            if constexpr (M::SPLIT == 1) {
                float s_low[32], d_low[32];
                float(&s_high)[32] = (float(&)[32])s;
                float(&d_high)[32] = (float(&)[32])d;
                barrier.wait_full(0, now);
                parts_group_scores<DP, M::ROWS, PARTS_STEP, true>(s_high, s_low, mine, q);
                barrier.wait_full(1, now);
                parts_group_scores<DP, M::ROWS, PARTS_STEP, true>(d_high, d_low, mine + M::OWN, g);
                parts_group_scored<1>(s_high, s_low);
                weights();
                parts_group_scored<0>(d_high, d_low);
            } else {
                float high_part[32], low_part[32];
                barrier.wait_full(group, now);
                parts_group_scores<DP, M::ROWS, PARTS_STEP, true>(high_part, low_part, mine + group * M::OWN,
                                                                  group ? g : q);
                parts_group_scored<0>(high_part, low_part);
                exchange((float(&)[16])s, (float(&)[16])d, high_part, tiles + M::GIVEN, group);
                barrier.wait_full(1 - group, now);
                weights();
            }
            if (a.p > 0) attn_select(d, kept, 0, 0);
#pragma unroll
            for (int n = 0; n < N; n++) {
                const float2 l = *(const float2 *)(row + 2 * PARTS_STEP + 8 * n);
                const float2 low = *(const float2 *)(row + 3 * PARTS_STEP + 8 * n);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    d[0][n][e] = s[0][n][e] * (d[0][n][e] * gz - (e % 2 ? l.y : l.x) - (e % 2 ? low.y : low.x));
            }
            if (partial) attn_select(d, seen, 0, 0);
            if (a.p > 0) attn_select(s, kept, 0, 0);
            uint32_t left[PARTS][2 * N];
            parts_group_left<N / 2>(left, (const float *)s);
            parts_group_add<DP, PARTS_STEP, N / 2>(dv, left, g + column * 128);
            barrier.arrive(barrier.free(1, now));
            parts_group_left<N / 2>(left, (const float *)d);
            parts_group_add<DP, PARTS_STEP, N / 2>(dk, left, q + column * 128);
            barrier.arrive(barrier.free(0, now));
            barrier.next(now);
        }
    }
    const int w1 = w0 + 16 < t.end ? w0 + 16 : t.end;
    const bool spoilt = hopper_sync_or(PARTS_ALL, PARTS_CONSUMERS, !(finite_all(dk) && finite_all(dv)));
    attn_wait<true>(a, t, parts_consumers_meet());
    float *sums = (float *)(memory + (tiles - attn_shared(memory))) + warp * 16 * DP;
    attn_row<float> *what = rows + warp * 16;
    auto put = [&](int which, auto &x, void *out, void *acc, float own) {
        if (M::SPLIT > 1) hopper_sync(PARTS_ALL, PARTS_CONSUMERS); /* what was there is written */
        if (spoilt)
            for (int i = 0; w0 + i < w1 && (M::SPLIT == 1 || group == 0); i++) {
                float slow[2][ATTN_SLOW_PARTS] = {};
                attn_slow_add_key<float>(a, t, w0 + i, slow[0], slow[1]);
                attn_stash_slow<DP>(sums, i, slow[which]);
            }
        else attn_stash<DP>(sums, (float(&)[1][DP / 8][4]) x);
        if (!join<M::SPLIT, 16 * DP>(sums, !spoilt)) return;
        if (lane < 16 && w0 + lane < w1) what[lane] = attn_summed<true>(a, t, w0 + lane, own);
        __syncwarp();
        attn_write<float, DP>(a, out, attn_f32_sums{(float *)acc}, sums, what, w1 - w0);
    };
    put(0, dk, a.out, a.acc, (float)a.scale);
    put(1, dv, a.out2, a.acc2, spoilt ? 1.f : gz); /* slow rows have it already */
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
