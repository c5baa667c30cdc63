/* attn_hopper_wide.cuh: what a warpgroup does with its rows above a head dimension of 128 (attn_hopper_rows.cuh has the
 * rest): the order of a tile, how results leave its registers, and how those of earlier branches come in.
 *
 * The sums of 64 rows and 256 columns take 128 registers a thread, and the queries of a tile 64 KB, so the next tile's
 * come into the same memory. It is free when the last scores have been made, and is loaded beside the tile's last
 * product and the writing of its results; so these cannot leave through it.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_WIDE_CUH
#define LAC_CUDA_ATTN_HOPPER_WIDE_CUH
#include "attn_hopper_forward.cuh"

/* Four lanes with four words each: lane i's word j becomes lane j's word i. */
HOPPER_FN void hopper_turn(uint32_t (&x)[4], int lane)
{
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool high = lane & step;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            const uint32_t other = __shfl_xor_sync(~0u, high ? x[i] : x[i + step], step);
            if (high) x[i] = other;
            else x[i + step] = other;
        }
    }
}

/* Of a thread's two rows number ROW, `last`: rounded to the results, 16 bytes a thread; else in f32 for the branches
 * that follow. All lanes call this, `live` or not. */
template <int ROW, class R> HOPPER_FN void hopper_put_row(const R &x, int64_t row, float weight, bool live, bool last)
{
    const int dim = x.p.a.head_dim;
    uint16_t *out = (uint16_t *)x.p.a.out + row * dim + x.lane % 4 * 8;
    float *acc = (float *)x.p.a.acc + row * dim + x.lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < R::M::DIM / 32; e++) { /* 32 columns */
        const float *o = x.o + 16 * e + 2 * ROW;
        uint32_t v[4];
#pragma unroll
        for (int c = 0; c < 4; c++) v[c] = x.pair(o[4 * c] * weight, o[4 * c + 1] * weight);
        hopper_turn(v, x.lane);
        if (live && last && 32 * e + x.lane % 4 * 8 < dim)
            *(int4 *)(out + 32 * e) = {(int)v[0], (int)v[1], (int)v[2], (int)v[3]};
        if constexpr (R::MEET)
#pragma unroll
            for (int c = 0; c < 4; c++)
                if (live && !last && 32 * e + 8 * c < dim)
                    *(float2 *)(acc + 32 * e + 8 * c) = {o[4 * c] * weight, o[4 * c + 1] * weight};
    }
}
/* `after`: rows that later branches reach, a bit a row */
template <class R> HOPPER_FN void hopper_put_wide(const R &x, int slot, float weight0, float weight1, uint32_t after)
{
    const volatile hopper_forward_tile &f = x.tile(slot);
    const int i = f.t.first + x.w * 64 + x.warp * 16 + x.lane / 4, end = f.t.end, step = f.step;
    const int64_t at = f.at + (int64_t)i * step;
    hopper_put_row<0>(x, at, weight0, i < end, !(after & 1));
    hopper_put_row<1>(x, at + 8 * (int64_t)step, weight1, i + 8 < end, !(after >> 8 & 1));
}
/* o = o weight + what earlier branches made of row ROW, if they did: 64 columns at a time, for want of registers */
template <int ROW, class R> HOPPER_FN void hopper_add_wide(R &x, int slot, float weight, float old)
{
    const volatile hopper_forward_tile &f = x.tile(slot);
    const int i = f.t.first + x.w * 64 + x.warp * 16 + x.lane / 4 + 8 * ROW, dim = x.p.a.head_dim;
    const float *from = (const float *)x.p.a.acc + (f.at + (int64_t)i * f.step) * dim + x.lane % 4 * 2;
#pragma unroll
    for (int part = 0; part < R::M::DIM / 64; part++) {
        float before[16];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int column = 64 * part + 8 * e;
            before[2 * e] = before[2 * e + 1] = 0;
            hopper_fetch(before[2 * e], before[2 * e + 1], from + column, old != -INFINITY && column < dim);
        }
#pragma unroll
        for (int e = 0; e < 16; e++) {
            float &y = x.o[32 * part + 4 * (e / 2) + 2 * ROW + e % 2];
            y = fmaf(y, weight, before[e]);
        }
    }
}

/* All tiles. What the loop over blocks does not need is read again from the tile's record: registers are scarce. */
template <class R> HOPPER_FN void hopper_run_wide(R &x)
{
    typedef typename R::M M;
    auto record = [&] { return x.memory + M::TILE + HOPPER_TILE * (x.tiles & 1); };
    auto all = [&] { return R::same(hopper_four(record())); };
    auto part = [&] { return R::same(hopper_four(record() + 16 + 16 * x.w)); };
    if (x.w == 0) hopper_meet(R::TURN, 256);
    for (;; x.tiles++) {
        hopper_wait(x.memory + M::Q_FULL + 8 * x.w, x.tiles & 1);
        if (all().x == HOPPER_STOP) break;
        for (int i = part().x; i > 0; i--) x.skip();
        const int4 begin = part();
        if ((begin.y + 1) / 2 > begin.x) {
            const uint32_t start = x.block - begin.x; /* the number that the tile's first block has */
            float old0, old1;
            x.first_block(x.tiles & 1);
            if (R::MEET) x.carry(x.tiles & 1, old0, old1);
            if (begin.x < begin.z || begin.x >= begin.w) x.mask(x.tiles & 1, {all().y + begin.x * (int)R::BN, 0, 0, 0});
            x.first_softmax(x.tiles & 1, old0, old1);
#pragma unroll 1
            for (;;) {
                const int4 now = part();
                const int number = (int)(x.block - start);
                if (number >= (now.y + 1) / 2) break;
                if (number > now.z && number < now.w)
                    x.template later_block<false>(x.tiles & 1, false, {0, 0, 0, 0}, false);
                else
                    x.template later_block<true>(x.tiles & 1, number <= now.z, {all().y + number * (int)R::BN, 0, 0, 0},
                                                 2 * number + 1 == now.y);
                x.block++;
            }
            __syncwarp();
            if (x.lane == 0) hopper_arrive(x.memory + M::PLACE_FREE + 8 * x.w);
            x.wait_values(x.block - 1);
            x.queue_values(x.block - 1);
            x.settle_values(x.block - 1);
            if (!R::MEET) x.finish(x.tiles & 1);
        } else {
            if (x.lane == 0) hopper_arrive(x.memory + M::PLACE_FREE + 8 * x.w);
            if (x.w < all().w) {
                x.begin_alone(x.tiles & 1);
                if (!R::MEET) x.finish(x.tiles & 1);
            }
        }
        if constexpr (R::MEET) {
            if (x.w < all().w) x.finish(x.tiles & 1);
            else x.say_done(x.tiles & 1);
        }
        for (int i = all().z - (part().y + 1) / 2; i > 0; i--) x.skip();
        x.meet(); /* nobody reads the record any more */
        if (x.thread == 0) hopper_arrive(x.memory + M::Q_FREE + 8 * (x.tiles & 1));
    }
    /* There is nothing to wait for. But where no code follows the loop, ptxas gives it the registers that the launch
     * has, not those that have been asked for, and serialises the products (C7512). */
    if (x.thread == 0) hopper_bulk_done();
}

#endif
