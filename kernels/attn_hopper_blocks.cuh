/* attn_hopper_blocks.cuh: the warp that feeds the forward on Hopper where a mask has active blocks.
 *
 * A tile's rows lie in one block of rows, so that all of them have the same active blocks of keys. Their lattice rows
 * form runs, and runs are cut into pieces of up to 64 keys, of which a step takes two, neighbours or not: steps of two
 * whole pieces are code without masks. So cost follows active blocks where they are multiples of 64 lattice keys, and
 * of 128 rows.
 *
 * The scout's warp, which is a tile ahead, lists the pieces: it holds 32 cells of the row of blocks as bits, a look at
 * memory for each 32 blocks, and every lane works out where its cell's keys lie. Lists of 32 pieces are handed over to
 * the warp that loads; a tile begins with a new one. Warpgroups learn what step comes next when they take one
 * (hopper_step), because whether a step has masked pairs chooses their code before its keys have come.
 *
 * Blocks of at most 64 rows, with rows of at most 64 numbers, have tiles of 64: one warpgroup a thread block, and two
 * thread blocks a multiprocessor, which take turns by themselves (HOPPER_SMALL).
 *
 * Larger blocks with rows of at most 64 numbers, without branches that meet or gaps, have two teams a thread block
 * (HOPPER_TEAMS): two warpgroups each, a loader and a scout, shared memory and turns of their own. A step is one piece,
 * so that scores and weights of four warpgroups have room, and a piece that a warpgroup's rows do not see is passed
 * over. One team's first and last steps run under the products of the other.
 *
 * Keys come a step ahead of values, whose room is free later: scores are what a warpgroup waits for first.
 *
 * Rejected: lists in device memory (another launch, and room for all blocks of a head); the loading warp walking over
 * the bits, a run at a time (some 1000 cycles each, which products of single blocks do not hide); tiles of 192 rows for
 * D = 64 as without blocks, which cover two rows of blocks: twice the steps, each with some warpgroup idle.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_BLOCKS_CUH
#define LAC_CUDA_ATTN_HOPPER_BLOCKS_CUH
#include "attn_hopper_forward.cuh"

/* A warp's part of what both sides need: which list, and the parity of its phase */
template <class M> HOPPER_FN uint32_t hopper_list_barrier(uint32_t memory, int barriers, uint32_t at)
{
    return memory + barriers + at / HOPPER_LIST % HOPPER_LISTS * 8;
}
HOPPER_FN int hopper_list_parity(uint32_t at) { return at / HOPPER_LIST / HOPPER_LISTS & 1; }
HOPPER_FN uint32_t hopper_list_slot(uint32_t at)
{
    return at % (HOPPER_LIST * HOPPER_LISTS) * (int)sizeof(hopper_piece);
}

/* one piece is both */
HOPPER_FN void hopper_piece_at(uint32_t at, int4 &step)
{
    asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(step.x), "=r"(step.y) : "r"(at));
    step.z = step.x, step.w = step.y;
}

/* keys [first, until), of a run or none, become pieces */
template <class M>
HOPPER_FN void hopper_list_run(const hopper_forward_tile &f, uint32_t memory, uint32_t &tail, int first, int until)
{
    const hopper_own_if<M::TEAMED, 0, 32> lane((int)(threadIdx.x % 32));
    do {
        const int at = (int)(tail % HOPPER_LIST), room = HOPPER_LIST - at;
        const int some = first < until ? min((until - first + 63) / 64, room) : room; /* none: empty ones, to the end */
        if (at == 0) hopper_wait(hopper_list_barrier<M>(memory, M::LIST_FREE, tail), !hopper_list_parity(tail));
        if (lane < some) {
            const int key = first + 64 * lane, count = min(64, max(until - key, 0));
            int about = count;
#pragma unroll
            for (int w = 0; w < M::GROUPS; w++) {
                const int row = f.t.first + 64 * w;
                const bool masked = count < 64 || key + 63 > row + f.t.after || key < row + 63 - f.t.before;
                const bool beyond = count == 0 || key > row + 63 + f.t.after;
                about |= (masked * HOPPER_MASKED | beyond * HOPPER_HALF) << (8 + HOPPER_GROUP * w);
            }
            hopper_put_two(memory + M::LIST + hopper_list_slot(tail + lane), count ? key : f.t.live, about);
        }
        if (some == room) {
            __syncwarp();
            if (lane == 0) hopper_arrive(hopper_list_barrier<M>(memory, M::LIST_FULL, tail));
        }
        first += 64 * some;
        tail += some;
    } while (first < until);
}
template <class M>
HOPPER_FN void hopper_list(const hopper_forward_args &p, const hopper_forward_tile &f, uint32_t memory, uint32_t &tail)
{
    const hopper_own_if<M::TEAMED, 0, 32> lane((int)(threadIdx.x % 32));
    const int block = hopper_opaque(p.a.block);
    const int64_t *stride = p.a.blocks_stride;
    const uint8_t *on = p.a.blocks + f.t.b * stride[0] + f.t.h * stride[1] +
                        (f.key + f.t.first * f.t.r - p.a.shift) / block * stride[2];
    const int low = max(f.t.first - f.t.before, 0), high = min(f.t.live, f.t.end + f.t.after);
    int cell = (f.key + low * f.t.r) / block + lane; /* the lane's */
    const int cells = low < high ? (f.key + (high - 1) * f.t.r) / block + 1 : 0;
    int active = hopper_byte(on + cell * stride[3], cell < cells);
    for (; cell - lane < cells; cell += 32) {
        const uint32_t bits = __ballot_sync(~0u, active);
        active = hopper_byte(on + (cell + 32) * stride[3], cell + 32 < cells);
        if (!bits) continue;
        const int first = max(low, hopper_count(f.t, (unsigned)cell * (unsigned)block));
        const int until = min(high, hopper_count(f.t, (unsigned)(cell + 1) * (unsigned)block));
        const uint32_t rest = ~(bits >> lane); /* a run ends where the next cell is not active */
        const int stop = __shfl_sync(~0u, until, lane + (rest ? __ffs((int)rest) - 2 : 31 - lane));
        for (uint32_t starts = bits & ~(bits << 1); starts; starts &= starts - 1) {
            const int from = __ffs((int)starts) - 1, a = __shfl_sync(~0u, first, from),
                      b = __shfl_sync(~0u, stop, from);
            if (a < b) hopper_list_run<M>(f, memory, tail, a, b);
        }
    }
    /* an empty step is the end; the other half of the last one may take the list's last place */
    const bool split = M::PIECES == 2 && tail % HOPPER_LIST == HOPPER_LIST - 1;
    hopper_list_run<M>(f, memory, tail, 0, 0);
    if (split) hopper_list_run<M>(f, memory, tail, 0, 0);
}

template <class M> struct hopper_block_feeder : hopper_feeder<M> {
    typedef hopper_feeder<M> base;
    using base::memory;
    using base::p;
    using base::slot;
    using base::slot_free;
    /* pieces so far, and what follows them in lists; steps whose keys, whose values have been asked for */
    uint32_t head, number, valued;
    __device__ __forceinline__ hopper_block_feeder(const hopper_forward_args &p, uint32_t memory)
        : base(p, memory), head(0), number(0), valued(0)
    {
    }
    /* a hopper_step, which is how it travels; `ended`: the tile has no more */
    __device__ __forceinline__ int4 step_after(bool &ended)
    {
        constexpr int MASKED = HOPPER_MASKED * 0x111, HALF = HOPPER_HALF * 0x111;
        if (ended) return {0, 0, 0, 0};
        if (head % HOPPER_LIST == 0)
            hopper_wait(hopper_list_barrier<M>(memory, M::LIST_FULL, head), hopper_list_parity(head));
        int4 two;
        if (M::PIECES == 2) two = hopper_four(memory + M::LIST + hopper_list_slot(head));
        else hopper_piece_at(memory + M::LIST + hopper_list_slot(head), two);
        const int some = two.y & 0xff, more = two.w & 0xff, one = two.y >> 8, other = two.w >> 8;
        const uint32_t last = head;
        ended = some == 0;
        head = ended ? (head / HOPPER_LIST + 1) * HOPPER_LIST : head + M::PIECES;
        if (head % HOPPER_LIST == 0) hopper_arrive(hopper_list_barrier<M>(memory, M::LIST_FREE, last));
        if (ended) return {0, 0, 0, 0};
        const int kinds = HOPPER_SOME | ((one | other) & MASKED) | (other & HALF) | some << HOPPER_COUNT;
        return {two.x, two.z, kinds, M::PIECES == 1 ? kinds : some | more << 16};
    }

    /* ---- copies ---- */

    __device__ __forceinline__ void copy(const volatile hopper_forward_tile &f, const CUtensorMap *map, int each,
                                         uint32_t to, uint32_t full, const int4 &step)
    {
        const int live = f.t.live, z = f.t.b * each + f.key + live * f.t.r, head = f.kv_head;
        const int first = HOPPER_WRAP - live + step.x, second = HOPPER_WRAP - live + step.y;
        hopper_expect(full, M::BLOCK);
#pragma unroll
        for (int c = 0; c < M::PANELS; c++) {
            hopper_load(to + c * M::KEYS * 128, map, full, 64 * c, first, z, head);
            if (M::PIECES == 2) hopper_load(to + c * M::KEYS * 128 + 64 * 128, map, full, 64 * c, second, z, head);
        }
    }
    __device__ __forceinline__ void keys(const volatile hopper_forward_tile &f, const int4 &step, const int4 &then)
    {
        if (!step.z) return;
        const int at = number % M::STAGES;
        hopper_wait(memory + M::K_FREE + 8 * at, ~(number / M::STAGES) & 1);
        hopper_put_four(memory + M::STEPS + number % (2 * M::STAGES) * (int)sizeof(hopper_step), then);
        copy(f, &p.map[f.map].k, p.k_step, memory + M::K + at * M::BLOCK, memory + M::K_FULL + 8 * at, step);
        number++;
    }
    __device__ __forceinline__ void values(const volatile hopper_forward_tile &f, const int4 &step)
    {
        const int at = valued % M::STAGES;
        hopper_wait(memory + M::V_FREE + 8 * at, ~(valued / M::STAGES) & 1);
        copy(f, &p.map[f.map].v, p.v_step, memory + M::V + at * M::BLOCK, memory + M::V_FULL + 8 * at, step);
        valued++;
    }
    __device__ __forceinline__ void run()
    {
        for (uint32_t tiles = 0;; tiles++) {
            slot = tiles & 1, slot_free = ~(tiles >> 1) & 1;
            const uint32_t at = memory + M::TILE + HOPPER_TILE * slot;
            this->take(at, tiles & 1);
            const volatile hopper_forward_tile &f = *(const hopper_forward_tile *)__cvta_shared_to_generic(at);
            if (f.g == HOPPER_STOP) break;
            bool ended = false;
            int4 now = step_after(ended);
            hopper_put_four(at + (int)offsetof(hopper_forward_tile, begin), now);
            this->queries(f, p.map[f.map]);
            int4 then = step_after(ended);
            keys(f, now, then);
            while (now.z) {
                const int4 later = step_after(ended);
                keys(f, then, later);
                values(f, now);
                now = then, then = later;
            }
        }
        hopper_arrive(memory + M::Q_FULL + 8 * slot);
    }
};

#endif
