/* attn_hopper_deltas.cu: deltas of branches on Hopper, for merges whose gradient has one of its own in every branch
 * (lse_detach, mean, sum over several branches).
 *
 * A branch's delta is the mean of dP over the branch's keys, weighted by P: S = Q K^T and dP = dO V^T again, 4 D
 * products a pair, and two sums a row that no product needs.
 *
 * A thread block owns three warpgroups with 64 query rows each and walks over blocks of 128 keys; one thread loads. No
 * turns: while one warpgroup takes exponentials the products of the others run.
 *
 * Rejected: branches' results kept by the forward (twice the output's memory, from the forward to the backward), the
 * portable pass over the queries (attn_queries.cuh; mma.sync reaches a third of the rate), sums seen from the keys (a
 * row's would cross tiles), one branch's delta from what the others leave of dout times out (half the work for LongNet,
 * but out is rounded: peaked rows were seven times less exact; kernels/HOPPER.md).
 */
#include "attn_hopper_backward.cuh"
#include "attn_mma.cuh"
#include "launch.cuh"

enum { KEYS = 128, GROUPS = 3 }; /* keys of a block; warpgroups, each with 64 rows */
enum { TOGETHER = 24 << 20 };    /* bytes of keys and values of interleaved items; they stay in the cache */

struct hopper_delta_branch {
    CUtensorMap q, k, v, g;
    int first, tiles, items, group; /* of the list: first tile, tiles of an item, items, items that are interleaved */
    int segments, after, before;
};
struct hopper_delta_args {
    hopper_delta_branch branch[LAC_HOPPER_BRANCHES];
    attn_args a;
    hopper_delta_tile *tile;
    int *counter;
    int tiles;
    int batch_step[4]; /* tokens from one batch item to the next: q, k, v, dout */
    int64_t rows;      /* B N H */
    float log2_scale, masked, weight;
};

template <int D> struct hopper_delta_shape {
    enum {
        STAGES = D == 64 ? 4 : 2, /* of keys and values */
        SLOTS = D == 64 ? 2 : 1,  /* of q and dout */
        PANELS = D / 64,
        PANEL = 64 * 128,
        ROWS = GROUPS * PANELS * PANEL,
        BLOCK = KEYS * D * 2,
        THREADS_ = 128 * (GROUPS + 1)
    };
    enum {
        Q = 0,
        G = Q + SLOTS * ROWS,
        K = G + SLOTS * ROWS,
        V = K + STAGES * BLOCK,
        TILE = V + STAGES * BLOCK,
        Q_FULL = TILE + SLOTS * 64,
        Q_FREE = Q_FULL + 8 * SLOTS,
        K_FULL = Q_FREE + 8 * SLOTS,
        V_FULL = K_FULL + 8 * STAGES,
        FREE = V_FULL + 8 * STAGES,
        MEMORY = FREE + 8 * STAGES
    };
    static_assert(MEMORY <= 232448, "shared memory of a thread block");
};

/* ---- the list ---- */

/* number of a tile; with masks those of several items are interleaved, late rows, which see most, first */
HOPPER_FN int tile_number(const hopper_delta_args &p, int g, int item, int tile)
{
    const hopper_delta_branch &br = p.branch[g];
    const int part = item / br.group, members = min(br.group, br.items - part * br.group);
    return br.first + part * br.group * br.tiles + (br.tiles - 1 - tile) * members + item % br.group;
}

static __global__ void __launch_bounds__(THREADS) hopper_delta_list_kernel(const __grid_constant__ hopper_delta_args p)
{
    const attn_args &a = p.a;
    const int g = blockIdx.y, heads = a.branch[g].heads;
    const hopper_delta_branch &br = p.branch[g];
    previous_done();
    if (blockIdx.x + blockIdx.y + threadIdx.x == 0) *p.counter = 0;
    for (int id = blockIdx.x * THREADS + threadIdx.x; id < br.items * br.tiles; id += gridDim.x * THREADS) {
        const int item = id / br.tiles, tile = id % br.tiles, h = a.branch[g].head0 + item % heads;
        const int s = item / heads % br.segments, b = item / heads / br.segments;
        attn_tile t;
        attn_span(a, g, b, h, s, t);
        hopper_delta_tile x = {};
        x.branch = g, x.batch = b, x.head = h;
        x.rows = t.q1 - t.q0, x.first = tile * GROUPS * 64, x.query0 = t.q0;
        x.row0 = (int)(t.base + (int64_t)t.q0 * t.r - a.shift);
        x.groups = max(0, min(GROUPS, (x.rows - x.first + 63) / 64));
        x.live = t.live, x.key0 = (int)t.base;
        const int first = t.q0 + x.first, last = min(first + GROUPS * 64, t.q1) - 1;
        x.low = max(first - t.before, 0) / KEYS;
        x.high = max(x.low, (min(t.live, last + t.after + 1) + KEYS - 1) / KEYS);
        p.tile[tile_number(p, g, item, tile)] = x;
    }
}

/* ---- the loader: one thread ---- */

template <int D> HOPPER_FN void hopper_delta_loader(const hopper_delta_args &p, uint32_t memory)
{
    typedef hopper_delta_shape<D> M;
    int slot = 0, slot_free = 1, stage = 0, stage_free = 1;
#pragma unroll 1
    for (int id = blockIdx.x; id < p.tiles; id = atomicAdd(p.counter, 1) + (int)gridDim.x) {
        const int4 *from = (const int4 *)(p.tile + id);
        const uint32_t info = memory + M::TILE + 64 * slot;
        hopper_wait(memory + M::Q_FREE + 8 * slot, slot_free);
#pragma unroll
        for (int i = 0; i < 4; i++) hopper_put_four(info + 16 * i, from[i]);
        const volatile hopper_delta_tile &t = *(const hopper_delta_tile *)__cvta_shared_to_generic(info);
        if (t.groups == 0) continue;
        const hopper_delta_branch &br = p.branch[t.branch];
        const int r = p.a.branch[t.branch].dilation, head = t.head, batch = t.batch;
        {
            const uint32_t full = memory + M::Q_FULL + 8 * slot, to = memory + M::Q + slot * M::ROWS;
            const int row = HOPPER_WRAP - t.rows + t.first, token = t.row0 + t.rows * r, groups = t.groups;
            hopper_expect(full, groups * 2 * M::PANELS * M::PANEL);
#pragma unroll 1
            for (int g = 0; g < groups; g++)
#pragma unroll
                for (int c = 0; c < M::PANELS; c++) {
                    const uint32_t at = to + (c * GROUPS + g) * M::PANEL;
                    hopper_load(at, &br.q, full, 64 * c, row + 64 * g, batch * p.batch_step[0] + token, head);
                    hopper_load(at + M::G - M::Q, &br.g, full, 64 * c, row + 64 * g, batch * p.batch_step[3] + token,
                                head);
                }
        }
        const int row = HOPPER_WRAP - t.live, token = t.key0 + t.live * r, kv_head = head / p.a.group, high = t.high;
#pragma unroll 1
        for (int i = t.low; i < high; i++) {
            const uint32_t full = memory + M::K_FULL + 8 * stage, to = memory + M::K + stage * M::BLOCK;
            hopper_wait(memory + M::FREE + 8 * stage, stage_free);
            hopper_expect(full, M::BLOCK);
#pragma unroll
            for (int c = 0; c < M::PANELS; c++)
                hopper_load(to + c * KEYS * 128, &br.k, full, 64 * c, row + i * KEYS, batch * p.batch_step[1] + token,
                            kv_head);
            hopper_expect(full + 8 * M::STAGES, M::BLOCK);
#pragma unroll
            for (int c = 0; c < M::PANELS; c++)
                hopper_load(to + M::V - M::K + c * KEYS * 128, &br.v, full + 8 * M::STAGES, 64 * c, row + i * KEYS,
                            batch * p.batch_step[2] + token, kv_head);
            if (++stage == M::STAGES) stage = 0, stage_free ^= 1;
        }
        if (++slot == M::SLOTS) slot = 0, slot_free ^= 1;
    }
    hopper_wait(memory + M::Q_FREE + 8 * slot, slot_free);
    hopper_put_four(memory + M::TILE + 64 * slot, make_int4(HOPPER_STOP, 0, 0, 0));
    hopper_arrive(memory + M::Q_FULL + 8 * slot);
}

/* ---- the warpgroups ---- */

/* 64 rows: a thread has numbers of two of them, lane / 4 of its warp's 16 and that plus 8. */
template <class T, int D> struct hopper_delta_rows {
    typedef hopper_delta_shape<D> M;
    const hopper_delta_args &p;
    const uint32_t memory;
    const int w, lane, warp;
    float s[64], d[64], lse[2], sum[2], dot[2]; /* S, then P; dP; of the rows: lse, sums of P and of P dP */
    int slot = 0, slot_parity = 0, stage = 0, parity = 0;

    __device__ __forceinline__ hopper_delta_rows(const hopper_delta_args &args, uint32_t at)
        : p(args), memory(at), w(__shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0)), lane(threadIdx.x % 32),
          warp(threadIdx.x % 128 / 32)
    {
    }
    /* x = rows times the stage's keys or values */
    __device__ __forceinline__ void scores(float (&x)[64], uint32_t rows, uint32_t keys)
    {
        const uint32_t a = hopper_operand(rows + slot * M::ROWS + w * M::PANEL, 16);
        const uint32_t b = hopper_operand(keys + stage * M::BLOCK, 16);
        hopper_product_fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            hopper_product<T, 0>(x, hopper_descriptor(a, (i / 4) * GROUPS * M::PANEL + i % 4 * 32),
                                 hopper_descriptor(b, (i / 4) * KEYS * 128 + i % 4 * 32), i > 0);
        hopper_product_commit();
    }
    /* pairs that are not seen; from: the block's first key less the warpgroup's first row; left: keys before the end */
    __device__ __forceinline__ void mask(int from, int left, int after, int before)
    {
#pragma unroll
        for (int i = 0; i < 64; i++) {
            const int key = i / 4 * 8 + lane % 4 * 2 + i % 2,
                      further = from + key - warp * 16 - lane / 4 - i % 4 / 2 * 8;
            if (key >= left || further > after || further < -before) s[i] = p.masked, d[i] = 0;
        }
    }
    __device__ __forceinline__ void wait_stage()
    {
        hopper_wait(memory + M::K_FULL + 8 * stage, parity);
        hopper_wait(memory + M::V_FULL + 8 * stage, parity);
    }
    __device__ __forceinline__ void free_stage()
    {
        if (lane == 0) hopper_arrive(memory + M::FREE + 8 * stage);
        if (++stage == M::STAGES) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ void block(bool masked, int from, int left, int after, int before)
    {
        hopper_wait(memory + M::K_FULL + 8 * stage, parity);
        hopper_pin(s);
        scores(s, memory + M::Q, memory + M::K);
        hopper_wait(memory + M::V_FULL + 8 * stage, parity);
        hopper_pin(d);
        scores(d, memory + M::G, memory + M::V);
        if (masked) {
            hopper_product_wait<0>();
            hopper_pin(s);
            hopper_pin(d);
            mask(from, left, after, before);
        }
        hopper_product_wait<1>();
        hopper_pin(s);
#pragma unroll
        for (int i = 0; i < 64; i++) s[i] = attn_ex2(fmaf(s[i], p.log2_scale, -lse[i % 4 / 2]));
        hopper_product_wait<0>();
        hopper_pin(d);
        free_stage();
        float x[4] = {}, y[4] = {};
#pragma unroll
        for (int i = 0; i < 64; i++) x[i % 4] += s[i], y[i % 4] = fmaf(s[i], d[i], y[i % 4]);
#pragma unroll
        for (int i = 0; i < 2; i++) sum[i] += x[2 * i] + x[2 * i + 1], dot[i] += y[2 * i] + y[2 * i + 1];
    }
    /* what the gradient of lse takes from branch g's delta in row (b N + n) H + h; at: the row's place in the branch */
    __device__ __forceinline__ float lse_gradient(int64_t at, int64_t row) const
    {
        const attn_args &a = p.a;
        const attn_tensor &x = a.dlse;
        if (!x.data) return 0;
        const int h = (int)(row % a.heads), n = (int)(row / a.heads % a.n), b = (int)(row / a.heads / a.n);
        const float lost = ((const float *)x.data)[b * x.stride[0] + n * x.stride[1] + h * x.stride[2]];
        if (lost == 0 || !a.sum) return lost; /* one softmax: P has its share in it */
        const double mine = (double)((const float *)a.lse2)[at] + (double)((const float *)a.lse2_low)[at];
        return mine == INFINITY ? lost : lost * (float)exp2(mine - a.lse_all[row]);
    }
    __device__ __forceinline__ void tile(const volatile hopper_delta_tile &t)
    {
        const int g = __shfl_sync(~0u, t.branch, 0), low = __shfl_sync(~0u, t.low, 0);
        const int blocks = __shfl_sync(~0u, t.high, 0) - low, row = __shfl_sync(~0u, t.first, 0) + w * 64;
        const int from = low * KEYS - t.query0 - row, left = t.live - low * KEYS;
        const int after = p.branch[g].after, before = p.branch[g].before;
        const bool busy = w < __shfl_sync(~0u, t.groups, 0);
        int64_t at[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int mine = row + warp * 16 + lane / 4 + 8 * i;
            const int64_t n = t.row0 + (int64_t)mine * p.a.branch[g].dilation;
            at[i] = mine < t.rows ? g * p.rows + ((int64_t)t.batch * p.a.n + n) * p.a.heads + t.head : -1;
            lse[i] = at[i] < 0 ? INFINITY : ((const float *)p.a.lse2)[at[i]];
            sum[i] = dot[i] = 0;
        }
#pragma unroll 1
        for (int i = 0; i < blocks; i++) {
            const int here = from + i * KEYS;
            if (!busy || here - 63 > after || here + KEYS - 1 < -before) { /* no pair is seen */
                wait_stage();
                free_stage();
            } else
                block(i * KEYS + KEYS > left || here + KEYS - 1 > after || here - 63 < -before, here, left - i * KEYS,
                      after, before);
        }
        __syncwarp();
        if (lane == 0) hopper_arrive(memory + M::Q_FREE + 8 * slot);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float all = quad_sum(sum[i]), mean = quad_sum(dot[i]) * p.weight / (all == 0 ? 1 : all);
            if (at[i] >= 0 && lane % 4 == 0)
                ((float *)p.a.delta)[at[i]] = mean - lse_gradient(at[i], at[i] - g * p.rows);
        }
        if (++slot == M::SLOTS) slot = 0, slot_parity ^= 1;
    }
    __device__ __forceinline__ void run()
    {
        for (;;) {
            hopper_wait(memory + M::Q_FULL + 8 * slot, slot_parity);
            const volatile hopper_delta_tile &t =
                *(const hopper_delta_tile *)__cvta_shared_to_generic(memory + M::TILE + 64 * slot);
            if (__shfl_sync(~0u, t.branch, 0) == HOPPER_STOP) break;
            tile(t);
        }
    }
};

template <class T, int D>
__global__ void __launch_bounds__(hopper_delta_shape<D>::THREADS_, 1)
    hopper_delta_kernel(const __grid_constant__ hopper_delta_args p)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef hopper_delta_shape<D> M;
    extern __shared__ __align__(1024) uint8_t bytes[]; /* nothing else is shared */
    const uint32_t memory = attn_shared(bytes);
    if (threadIdx.x == 0) {
        for (int i = 0; i < M::SLOTS; i++) {
            hopper_barrier(memory + M::Q_FULL + 8 * i, 1);
            hopper_barrier(memory + M::Q_FREE + 8 * i, 4 * GROUPS); /* every warp */
        }
        for (int i = 0; i < M::STAGES; i++) {
            hopper_barrier(memory + M::K_FULL + 8 * i, 1);
            hopper_barrier(memory + M::V_FULL + 8 * i, 1);
            hopper_barrier(memory + M::FREE + 8 * i, 4 * GROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    previous_done();
    __syncthreads();
    if (threadIdx.x < 128) {
        hopper_fewer<32>();
        if (threadIdx.x == 0) hopper_delta_loader<D>(p, memory);
    } else {
        hopper_more<160>();
        hopper_delta_rows<T, D>(p, memory).run();
    }
#endif
}

/* ---- the host's side ---- */

static int make_branches(hopper_delta_args &p, const hopper_args &h, const lac_a_attend_bwd *w)
{
    const lac_view *view[] = {&w->forward.q, &w->forward.k, &w->forward.v, &w->dout};
    const lac_plan *plan = w->forward.plan;
    const attn_args &a = p.a;
    for (int i = 0; i < 4; i++) p.batch_step[i] = hopper_batch_step(view[i]);
    for (int g = 0; g < a.branches; g++) {
        hopper_delta_branch &b = p.branch[g];
        const attn_branch &ab = a.branch[g];
        const int r = ab.dilation;
        CUtensorMap *map[] = {&b.q, &b.k, &b.v, &b.g};
        for (int i = 0; i < 4; i++) LAC_TRY(hopper_map(map[i], view[i], r, i == 1 || i == 2 ? KEYS : 64));
        const int64_t keys = hopper_lattice_rows(plan, g, plan->desc.m);
        const int64_t together = a.causal || a.window >= 0 ? TOGETHER / (keys * a.head_dim * 4) : 1;
        b.segments = h.branch[g].segments;
        b.items = a.batch * b.segments * ab.heads;
        b.tiles = (int)((hopper_lattice_rows(plan, g, plan->desc.n) - 1) / (64 * GROUPS)) + 1;
        b.group = (int)(together < 1 ? 1 : together > b.items ? b.items : together);
        b.before = a.window < 0 ? 1 << 30 : a.window / r;
        b.after = a.causal ? 0 : b.before;
        b.first = p.tiles;
        p.tiles += b.items * b.tiles;
    }
    return 0;
}

template <class T, int D> static int launch(const hopper_delta_args &p)
{
    auto kernel = hopper_delta_kernel<T, D>;
    const int memory = hopper_delta_shape<D>::MEMORY;
    if (p.tiles == 0) return 0;
    CUDA_TRY("attention", lac_cuda_shared((const void *)kernel, memory));
    launch(kernel, min(p.tiles, lac_cuda_processors), hopper_delta_shape<D>::THREADS_, memory, p);
    return lac_cuda_launched("attention");
}

int attn_hopper_deltas(const attn_args &a, const hopper_args &h, const lac_a_attend_bwd *w)
{
    hopper_delta_args p = {};
    p.a = a;
    p.tile = h.delta_tile, p.counter = h.delta_counter;
    p.rows = (int64_t)a.batch * a.n * a.heads;
    p.log2_scale = a.log2_scale, p.masked = a.scale > 0 ? -INFINITY : INFINITY;
    p.weight = (float)a.gscale;
    LAC_TRY(make_branches(p, h, w));
    int64_t most = 0;
    for (int g = 0; g < a.branches; g++) most = max(most, (int64_t)p.branch[g].items * p.branch[g].tiles);
    const dim3 grid(blocks_filling(most, THREADS), (unsigned)a.branches);
    launch(hopper_delta_list_kernel, grid, THREADS, 0, p);
    LAC_TRY(lac_cuda_launched("attention"));
    const bool half = w->forward.q.dtype == LAC_F16;
    if (a.head_dim <= 64) return half ? launch<f16, 64>(p) : launch<bf16, 64>(p);
    return half ? launch<f16, 128>(p) : launch<bf16, 128>(p);
}
