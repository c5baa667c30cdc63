/* attn_hopper_parts_forward.cu: the forward of attention in f32 without TF32 on Hopper (attn_hopper_parts.cuh). */
#include "attn_hopper_parts.cuh"

template <int DP> struct forward_shape {
    enum {
        ROWS = 64 * PARTS_GROUPS,
        STAGES = DP > 64 ? 1 : 2,
        BATCH = PARTS_TURNS, /* one at a time ran at 0.88 to 0.92 of its speed */
        Q = 0,
        K = Q + parts_panels<DP, ROWS>::BYTES,
        TILE = parts_panels<DP, PARTS_STEP>::BYTES,
        V = K + STAGES * TILE,
        MEMORY = V + STAGES * TILE
    };
};

template <int DP>
__global__ void __launch_bounds__(PARTS_THREADS, 1)
    attn_hopper_parts_forward_kernel(const __grid_constant__ attn_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef forward_shape<DP> M;
    constexpr int N = PARTS_STEP / 8;
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t tiles = parts_tiles(memory);
    __shared__ uint64_t seen[M::ROWS], kept[M::ROWS]; /* masks of each row */
    __shared__ attn_row<float> rows[M::ROWS];
    __shared__ attn_tile t;
    __shared__ parts_barriers<M::STAGES> barrier; /* keys, values */
    barrier.start();
    if (!attn_next<false>(a, M::ROWS, t)) return;
    const bool pad = a.padding != NULL;
    int low, high;
    attn_reach<false>(t, &low, &high);
    if (threadIdx.x >= PARTS_CONSUMERS) {
        hopper_fewer<PARTS_FEEDER_REGISTERS>();
        parts_feed_keys<DP, 0, M::BATCH>(a, t, low, high, tiles + M::K, tiles + M::V, barrier);
        return;
    }
    hopper_more<PARTS_GROUP_REGISTERS>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int g0 = t.first + 64 * group, g1 = g0 + 64 < t.end ? g0 + 64 : t.end;
    const int w0 = t.first + 16 * warp, w1 = w0 + 16 < t.end ? w0 + 16 : t.end;
    const uint32_t q = tiles + M::Q + group * 64 * 128;
    parts_own<DP, M::BATCH, M::ROWS>(tiles + M::Q, 64 * group, a, a.q, t, t.h, a.shift, g0, t.end, false);
    hopper_sync(1 + group, 128);
    float o[1][DP / 8][4], top[1][2] = {{-INFINITY, -INFINITY}}, sum[1][2] = {};
    clear(o);
    const int last = g0 < g1 ? g1 - 1 + t.after : -1; /* key that any row may see */
    parts_turn now = {0, 0};
#pragma unroll 1
    for (int k0 = low; k0 < high; k0 += PARTS_STEP) {
        const bool idle = k0 > last || k0 + PARTS_STEP <= g0 - t.before;
        const uint32_t k = tiles + M::K + now.stage * M::TILE, v = tiles + M::V + now.stage * M::TILE;
        if (idle) {
            barrier.pass(now);
            continue;
        }
        const bool partial =
            k0 + PARTS_STEP > t.live || k0 + PARTS_STEP - 1 > w0 + t.after || k0 < w1 - 1 - t.before || pad || a.dedup;
        if (partial) attn_tell<1>(seen, attn_row_keys(a, t, t.h, w0 + lane % 16, k0, attn_alive(a, t, k0)));
        if (a.p > 0) attn_tell<1>(kept, attn_kept<false>(a, t, t.h, w0 + lane % 16, k0));
        barrier.wait_full(0, now);
        float s[1][N][4], s_low[32], shrink[1][2];
        parts_group_scores<DP, M::ROWS, PARTS_STEP, false>((float(&)[32])s, s_low, q, k);
        parts_group_scored<0>((float(&)[32])s, s_low);
        barrier.arrive(barrier.free(0, now));
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[0][n][i] *= a.log2_scale;
        if (partial) attn_select(s, seen, 0, -INFINITY);
        parts_soften(s, top, sum, shrink);
        if (a.p > 0) attn_select(s, kept, 0, 0);
        uint32_t left[PARTS][16];
        parts_group_left<4>(left, (const float *)s);
        barrier.wait_full(1, now);
        parts_group_add<DP, PARTS_STEP, 4>((float(&)[DP / 2]) o, shrink[0], left, v);
        barrier.arrive(barrier.free(1, now));
        barrier.next(now);
    }
    /* Taken apart or hidden: this rare tile is done again. Of a dropped pair only the sum of the weights shows it. */
    const bool spoilt = hopper_sync_or(PARTS_ALL, PARTS_CONSUMERS, !(finite(o) && finite(sum)));
    attn_wait<false>(a, t, parts_consumers_meet());
    attn_leave_forward<float, DP>(a, t, lane, parts_sums<DP>(memory), rows + warp * 16, w0, w1, spoilt, o, top, sum);
    attn_signal<false>(a, t, parts_consumers_meet());
#endif
}

template <int DP> static int launch(attn_args &a, const lac_plan *plan)
{
    int64_t tiles;
    LAC_TRY(attn_number(a, plan, false, forward_shape<DP>::ROWS, &tiles));
    return attn_launch(attn_hopper_parts_forward_kernel<DP>, a, tiles, PARTS_THREADS, forward_shape<DP>::MEMORY + 1024);
}

bool attn_hopper_parts_runs()
{
    static int compiled = -1; /* unknown; asking takes microseconds */
    if (compiled < 0) compiled = hopper_compiled((const void *)attn_hopper_parts_forward_kernel<64>);
    return compiled != 0;
}
int attn_hopper_parts_forward(attn_args &a, const lac_plan *plan)
{
    return a.head_dim <= 64 ? launch<64>(a, plan) : launch<128>(a, plan);
}
