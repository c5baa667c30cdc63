/* attn_hopper_blocks.cuh: the warp that feeds the forward on Hopper where a mask has active blocks.
 *
 * A tile's rows lie in one block of rows, so that all of them have the same active blocks of keys. Their lattice rows
 * form runs, and a run is cut into steps of up to 128 keys: whole ones are code without masks, the last of a run masks
 * what does not belong to it. So cost follows active blocks where they are multiples of 128 lattice rows, and any other
 * size is right, but pays for 128 x 128 pairs.
 *
 * The warp holds 32 cells of the row of blocks as bits, a look at memory for each 32 blocks, some stages ahead of the
 * products. Warpgroups learn what step comes next when they take one (hopper_step), because whether a step has masked
 * pairs chooses their code before its keys have come. Nothing is counted or listed beforehand.
 *
 * Rejected: lists in memory (another launch, and room for all blocks of a head); tiles of 192 rows for D = 64 as
 * without blocks, which cover two rows of blocks: twice the steps, each with some warpgroup idle. Not written: steps of
 * several short runs (bulk copies of 16 rows), for blocks below 128.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_BLOCKS_CUH
#define LAC_CUDA_ATTN_HOPPER_BLOCKS_CUH
#include "attn_hopper_forward.cuh"

template <class M> struct hopper_block_feeder : hopper_feeder<M> {
    typedef hopper_feeder<M> base;
    using base::memory;
    using base::p;
    using base::slot;
    using base::slot_free;
    using base::stage;
    using base::stage_free;
    const int lane;
    uint32_t number; /* steps so far */
    const uint8_t *on;
    uint32_t bits;           /* of cells [window, window + 32) */
    int ahead;               /* the lane's of those that follow */
    int window, cell, cells; /* next cell to look at, and their end */
    int key, stop;           /* keys of the run that are to come */
    __device__ __forceinline__ hopper_block_feeder(const hopper_forward_args &p, uint32_t memory)
        : base(p, memory), lane(threadIdx.x % 32), number(0)
    {
    }

    /* ---- the walk: all lanes do the same ---- */

    __device__ __forceinline__ int low(const volatile hopper_forward_tile &f) const
    {
        return max(f.t.first - f.t.before, 0);
    }
    __device__ __forceinline__ int high(const volatile hopper_forward_tile &f) const
    {
        return min(f.t.live, f.t.end + f.t.after);
    }
    __device__ __forceinline__ int block_of(const volatile hopper_forward_tile &f, int i) const
    {
        return (f.key + i * f.t.r) / hopper_opaque(p.a.block);
    }
    __device__ __forceinline__ void start(const volatile hopper_forward_tile &f)
    {
        const int64_t *stride = p.a.blocks_stride;
        const int row = f.key + f.t.first * f.t.r - p.a.shift;
        on = p.a.blocks + f.t.b * stride[0] + f.t.h * stride[1] + row / hopper_opaque(p.a.block) * stride[2];
        cell = cells = key = stop = 0;
        if (low(f) < high(f)) cell = block_of(f, low(f)), cells = block_of(f, high(f) - 1) + 1;
        window = cell - 32;
        ask();
    }
    __device__ __forceinline__ void ask()
    {
        const int mine = window + 32 + lane;
        ahead = hopper_byte(on + mine * p.a.blocks_stride[3], mine < cells);
    }
    __device__ __forceinline__ uint32_t look() /* at `cell` and what follows; window + 32 is the last to be looked at */
    {
        if (cell == window + 32) {
            window = cell;
            bits = __ballot_sync(~0u, ahead);
            ask();
        }
        return bits >> (cell - window);
    }
    __device__ __forceinline__ bool run_after(const volatile hopper_forward_tile &f)
    {
        while (cell < cells) {
            uint32_t rest = look();
            if (!rest) {
                cell = window + 32;
                continue;
            }
            cell += __ffs((int)rest) - 1;
            key = max(low(f), hopper_count(f.t, (unsigned)cell * (unsigned)p.a.block));
            do {
                rest = ~look();
                cell += rest ? __ffs((int)rest) - 1 : 32;
            } while (cell == window + 32);
            stop = min(high(f), hopper_count(f.t, (unsigned)cell * (unsigned)p.a.block));
            if (key < stop) return true;
        }
        return false;
    }
    /* a hopper_step, which is how it travels */
    __device__ __forceinline__ int4 step_after(const volatile hopper_forward_tile &f)
    {
        if (key >= stop && !run_after(f)) return {0, 0, 0, 0};
        const int first = key, until = min(key + HOPPER_KEYS, stop);
        key = until;
        int kinds = HOPPER_SOME;
#pragma unroll
        for (int w = 0; w < M::GROUPS; w++) {
            const int row = f.t.first + w * 64;
            const bool masked = until - first < HOPPER_KEYS || first + HOPPER_KEYS > row + f.t.after + 1 ||
                                first < row + 63 - f.t.before;
            const bool half = until - first <= HOPPER_KEYS / 2 || first + HOPPER_KEYS / 2 > row + 63 + f.t.after;
            kinds |= (masked * HOPPER_MASKED | half * HOPPER_HALF) << HOPPER_GROUP * w;
        }
        return {first, until, kinds, 0};
    }

    /* ---- copies: one lane asks for them ---- */

    __device__ __forceinline__ void keys(const volatile hopper_forward_tile &f, int first, const int4 then)
    {
        const int live = f.t.live, z = f.t.b * p.k_step + f.key + live * f.t.r;
        const uint32_t barriers = memory + 8 * stage, to = memory + stage * M::BLOCK + M::K;
        hopper_wait(barriers + M::K_FREE, stage_free);
        hopper_put_four(memory + M::STEPS + number % (2 * M::STAGES) * (int)sizeof(hopper_step), then);
        hopper_expect(barriers + M::K_FULL, M::BLOCK);
#pragma unroll
        for (int c = 0; c < M::PANELS; c++)
            hopper_load(to + c * HOPPER_KEYS * 128, &p.map[f.map].k, barriers + M::K_FULL, 64 * c,
                        HOPPER_WRAP - live + first, z, f.kv_head);
    }
    __device__ __forceinline__ void values(const volatile hopper_forward_tile &f, int first)
    {
        const int live = f.t.live, z = f.t.b * p.v_step + f.key + live * f.t.r;
        const uint32_t barriers = memory + 8 * stage, to = memory + stage * M::BLOCK + M::V;
        hopper_wait(barriers + M::V_FREE, stage_free);
        hopper_expect(barriers + M::V_FULL, M::BLOCK);
#pragma unroll
        for (int c = 0; c < M::PANELS; c++)
            hopper_load(to + c * HOPPER_KEYS * 128, &p.map[f.map].v, barriers + M::V_FULL, 64 * c,
                        HOPPER_WRAP - live + first, z, f.kv_head);
    }
    __device__ __forceinline__ void take(uint32_t at, int full) /* the tile that the scout has found */
    {
        hopper_wait(memory + M::Q_FREE + 8 * slot, slot_free);
        hopper_wait(memory + M::FOUND_FULL, full);
#pragma unroll
        for (int i = 0; i < HOPPER_TILE; i += 16) hopper_put_four(at + i, hopper_four(memory + M::FOUND + i));
        hopper_arrive(memory + M::FOUND_FREE);
    }
    __device__ __forceinline__ void run()
    {
        for (int full = 0;; full ^= 1) {
            const uint32_t at = memory + M::TILE + HOPPER_TILE * slot;
            if (lane == 0) take(at, full);
            __syncwarp();
            const volatile hopper_forward_tile &f = *(const hopper_forward_tile *)__cvta_shared_to_generic(at);
            if (f.g == HOPPER_STOP) break;
            start(f);
            int4 now = step_after(f);
            if (lane == 0) {
                hopper_put_four(at + (int)offsetof(hopper_forward_tile, begin), now);
                this->queries(f, p.map[f.map]);
            }
            this->step(slot, slot_free, M::SLOTS);
            int4 then = step_after(f);
            while (now.z) {
                if (lane == 0) keys(f, now.x, then);
                __syncwarp();
                const int4 later = step_after(f); /* while values wait for their stage */
                if (lane == 0) values(f, now.x);
                this->step(stage, stage_free, M::STAGES);
                number++;
                now = then, then = later;
            }
            __syncwarp();
        }
        if (lane == 0) hopper_arrive(memory + M::Q_FULL + 8 * slot);
    }
};

#endif
