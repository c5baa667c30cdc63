/* attn_hopper_pairs.cuh: options of single pairs in the kernels for Hopper, which have instances of their own for calls
 * with dropout or slopes (ALiBi), with padding, and with a mask or a bias, so that all others run the code that they
 * would run if there were none.
 *
 * Bits of dropout are those of every other kernel (rng.h): the pair (b, h, n, key) has word `at` % 4 of Philox' block
 * `at` / 4, where `at` is its place in a dense [B, H, N, M] tensor. A block is ten rounds, some 45 instructions, and
 * has the words of four keys that are neighbours. Where they are neighbours in the lattice as well, four lanes of a
 * warpgroup's accumulators share them: each works out one block in four, and they exchange bits, not words. With a
 * dilation, or where M or the first key's position is no multiple of four, a lane works out what its own pairs need, up
 * to a block a pair. Bits are asked for before a block's scores are queued, when their registers are free.
 *
 * A word is kept if its upper 24 bits, as a unit, are at or above p (lac_rng_keep): as integers, if it is larger than
 * `dropped`. The keys of Philox' rounds come with the arguments, which instructions read without a register.
 *
 * Slopes: a score loses slope times the distance of row and key, which the portable kernels work out the same way. Near
 * keys may weigh more than the first block's by far, so these instances keep a running maximum, as others do not
 * (attn_hopper_rows.cuh); it is followed in steps of RISE bits, so that results are seldom scaled.
 *
 * Padding: keys behind a batch item's last one are not there, as with lengths, and those before its first one are
 * skipped; a kernel before the attention finds both (attn_hopper_padded.cu). Only items with padding between are asked
 * about single keys: a bit a pair, made by the warp from the block's 128 bytes.
 *
 * Mask and bias are read where they lie, whatever their strides and the dilation, a number a pair. In the forward a
 * mask's 0 or -inf go to the registers of a block's scores before their product is queued, which adds to what it finds
 * there. A bias, over the scale, is added after it: sums of tensor cores cut off what is small beside it. In the
 * backward both go to the registers of dP while scores are multiplied, and are added before that product is queued: the
 * registers of scores hold dq until then. A hidden pair whose product is NaN or infinity becomes NaN, and its row is
 * computed again.
 *
 * Rejected: bits from warps of their own (two of sixteen warps, for more work than a softmax is), bits in memory
 * beforehand (a bit a pair is 4 GB for 32 heads of 32k rows), bits after the softmax (1 KB of spills), a reference
 * without the slopes (a sum may vanish), fewer rounds or bits a pair (other pairs than the CPU's).
 */
#ifndef LAC_CUDA_ATTN_HOPPER_PAIRS_CUH
#define LAC_CUDA_ATTN_HOPPER_PAIRS_CUH
#include "attn_pairs.cuh"
#include "hopper.cuh"

/* Options of instances, as bits: none; dropout and slopes; padding; masks and biases, always with the others. */
enum { HOPPER_PLAIN, HOPPER_PAIRS, HOPPER_PADDED, HOPPER_ADDED = 4, HOPPER_ALL = 7 };

/* ---- dropout ---- */

/* The keys of Philox' ten rounds, added up by the host: as arguments of the kernel they take no registers. */
struct hopper_dropout {
    uint32_t key[20];
    uint32_t offset[2];
    uint32_t dropped; /* largest word whose pair is dropped; 0: there is no dropout */
};
/* Which of four neighbours are kept? Four bits; lac_philox() of rng.h. */
HOPPER_FN uint32_t hopper_kept_four(const hopper_dropout &x, uint64_t block)
{
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = x.offset[0], c3 = x.offset[1];
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t u = (uint64_t)0xD2511F53u * c0, v = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(v >> 32) ^ c1 ^ x.key[2 * round];
        c1 = (uint32_t)v;
        c2 = (uint32_t)(u >> 32) ^ c3 ^ x.key[2 * round + 1];
        c3 = (uint32_t)u;
    }
    return (uint32_t)(c0 > x.dropped) | (uint32_t)(c1 > x.dropped) << 1 | (uint32_t)(c2 > x.dropped) << 2 |
           (uint32_t)(c3 > x.dropped) << 3;
}
/* Of a warpgroup's accumulators, rows queries and columns keys: the pairs of 64 keys, r apart, that are kept. Bit 4 i +
 * e is register 4 i + e. at: the element of the lane's first row with the first of these keys. One loop, whose turns
 * give four bits or one: with a loop for each, registers go to memory. */
HOPPER_FN uint32_t hopper_kept_keys(const hopper_dropout &x, uint64_t at, int m, int r)
{
    const uint32_t lane = threadIdx.x % 4;
    const uint64_t below = (uint64_t)m * (uint64_t)(8 * r); /* from a row to the lane's other one */
    const bool four = __all_sync(~0u, r == 1 && !((at | (uint64_t)m) & 3));
    uint32_t kept = 0;
    /* four: a lane has one of the two rows and one half of eight keys */
    at += four ? (lane & 1 ? below : 0) + lane / 2 * 4 : (uint64_t)(lane * 2 * (uint32_t)r);
#pragma unroll 1
    for (int i = 0; i < 32; i += four ? 4 : 1) {
        const uint64_t mine = at + (uint64_t)((i / 4 * 8 + i % 2) * r) + (i & 2 ? below : 0);
        const uint32_t bits = hopper_kept_four(x, mine / 4);
        kept |= (four ? bits : bits >> (mine & 3) & 1) << i;
    }
    const uint32_t other = __shfl_xor_sync(~0u, kept, 1);
    const uint32_t shift = lane % 2 * 2, row0 = lane & 1 ? other : kept, row1 = lane & 1 ? kept : other;
    return four ? (row0 >> shift & 0x33333333u) | (row1 >> shift & 0x33333333u) << 2 : kept;
}

/* The same where rows are 64 keys and columns 64 queries; at: the element of the lane's first key with the first
 * query of its columns. Keys that are neighbours lie in four lanes, each of which works out one of the four registers.
 */
HOPPER_FN uint32_t hopper_kept_rows(const hopper_dropout &x, uint64_t at, int m, int r)
{
    const uint32_t lane = threadIdx.x % 32, key = lane / 4 % 4;
    const uint64_t row = (uint64_t)m * (uint64_t)r; /* from a query to the next */
    const bool four = __all_sync(~0u, r == 1 && !((at - key | (uint64_t)m) & 3));
    uint32_t kept = 0;
    if (four) {
        at += (key & 1 ? row : 0) + (uint64_t)(key / 2 * 8) - key;
#pragma unroll 1
        for (int i = 0; i < 8; i++, at += 8 * row) kept |= hopper_kept_four(x, at >> 2) << 4 * i;
    } else {
#pragma unroll 1
        for (int i = 0; i < 32; i++, at += i & 3 ? 0 : 8 * row) {
            const uint64_t mine = at + (i & 1 ? row : 0) + (uint64_t)(i & 2 ? 8 * r : 0);
            kept |= (hopper_kept_four(x, mine >> 2) >> (mine & 3) & 1) << i;
        }
    }
    uint32_t mine = 0;
#pragma unroll
    for (uint32_t e = 0; e < 4; e++) mine |= (__shfl_sync(~0u, kept, (lane & 19) | e << 2) >> key & 0x11111111u) << e;
    return four ? mine : kept;
}

/* ---- slopes ---- */

/* what a score, before the scale, loses for each key of a lattice of dilation r between it and the row; 0: no slopes */
HOPPER_FN float hopper_slope(const attn_pair_args &a, int h, int r)
{
    return a.slopes ? (float)((double)((const float *)a.slopes)[h * a.slopes_stride] * a.unit * r) : 0.f;
}

/* ---- masks and biases ---- */

/* Scores that are hidden become this before the scale; it is -inf after it. */
HOPPER_FN float hopper_nothing(const attn_pair_args &a) { return a.scale < 0 ? INFINITY : -INFINITY; }

/* x[4 i + 2 y + e] = f(x[...], what line y has at place 8 i + e), places `step` apart; zero from place `left` on. In
 * PARTS, one after the other, where registers do not hold what all of x needs. */
template <int PARTS, class V, int N, class F>
HOPPER_FN void hopper_each(float (&x)[N], const V *line0, const V *line1, int64_t step, int left, F &&f)
{
#pragma unroll
    for (int i = 0; i < N / 4; i++, line0 += 8 * step, line1 += 8 * step) {
        if (i && i % (N / 4 / PARTS) == 0) hopper_pin(x);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const bool there = 8 * i + e < left;
            x[4 * i + e] = f(x[4 * i + e], there ? line0[e * step] : V{});
            x[4 * i + 2 + e] = f(x[4 * i + 2 + e], there ? line1[e * step] : V{});
        }
    }
}
/* the same of neighbours in memory, two at a time; W: two V */
template <int PARTS, class V, class W, int N, class F>
HOPPER_FN void hopper_each_two(float (&x)[N], const V *line0, const V *line1, int left, F &&f)
{
    static_assert(sizeof(W) == 2 * sizeof(V), "two at a time");
    const W *const from[2] = {(const W *)line0, (const W *)line1};
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        if (i && i % (N / 4 / PARTS) == 0) hopper_pin(x);
#pragma unroll
        for (int y = 0; y < 2; y++) {
            const W both = 8 * i < left ? from[y][4 * i] : W{};
            V each[2];
            memcpy(each, &both, sizeof both);
#pragma unroll
            for (int e = 0; e < 2; e++) x[4 * i + 2 * y + e] = f(x[4 * i + 2 * y + e], each[e]);
        }
    }
}
/* Where lines begin, in a mask or a bias: elements of a line are `step` apart. `left`: how many there are. */
struct hopper_lines {
    int64_t mask[2], bias[2], mask_step, bias_step;
    int left;
};
template <class V> HOPPER_FN bool hopper_even(const V *line0, const V *line1, int64_t step)
{
    return step == 1 && !(((uintptr_t)line0 | (uintptr_t)line1) % (2 * sizeof(V)));
}
/* x = 0, or `nothing` where the mask hides the pair. TWO: places are keys, which may be neighbours in memory. */
template <bool TWO, int N> HOPPER_FN void hopper_mask(const attn_pair_args &a, float (&x)[N], const hopper_lines &at)
{
    const float nothing = hopper_nothing(a);
    const auto shown = [=](float, uint8_t m) { return m ? 0.f : nothing; };
    const uint8_t *line0 = a.mask + at.mask[0], *line1 = a.mask + at.mask[1];
    if (TWO && a.m % 2 == 0 && hopper_even(line0, line1, at.mask_step))
        hopper_each_two<1, uint8_t, uint16_t>(x, line0, line1, at.left, shown);
    else hopper_each<1>(x, line0, line1, at.mask_step, at.left, shown);
}
/* x += bias over the scale; T: of the bias, if it is not f32 */
template <class T, bool TWO, int PARTS, int N>
HOPPER_FN void hopper_bias(const attn_pair_args &a, float (&x)[N], const hopper_lines &at)
{
    const float unit = (float)a.unit;
    const auto biased = [=](float s, auto b) { return fmaf(to_compute(b), unit, s); };
    if (a.bias_wide) {
        const float *bias = (const float *)a.bias;
        hopper_each<PARTS>(x, bias + at.bias[0], bias + at.bias[1], at.bias_step, at.left, biased);
        return;
    }
    const T *line0 = (const T *)a.bias + at.bias[0], *line1 = (const T *)a.bias + at.bias[1];
    if (TWO && a.m % 2 == 0 && hopper_even(line0, line1, at.bias_step))
        hopper_each_two<PARTS, T, uint32_t>(x, line0, line1, at.left, biased);
    else hopper_each<PARTS>(x, line0, line1, at.bias_step, at.left, biased);
}

/* ---- padding ---- */

/* of a batch item: its first key, and whether there is padding between that and the last one */
struct hopper_kept {
    int first, holes;
};
HOPPER_FN bool hopper_padded(const attn_pair_args &a, int b, int key)
{
    return !a.padding[b * a.padding_stride[0] + key * a.padding_stride[1]];
}
/* Of a warpgroup's accumulators, columns keys: which of 128 keys of a lattice are no padding? Bit i % 4 * 8 + i / 4 * 2
 * + e is registers 4 i + e and 4 i + 2 + e. By a warp; live: keys that there are, of which the first is `position`. */
HOPPER_FN uint32_t hopper_shown_keys(const attn_pair_args &a, int b, int position, int r, int live)
{
    const int lane = threadIdx.x % 32;
    const uint8_t *at = a.padding + b * a.padding_stride[0] + (position + (int64_t)lane * r) * a.padding_stride[1];
    const int64_t step = 32 * r * a.padding_stride[1];
    int byte[4];
#pragma unroll
    for (int k = 0; k < 4; k++) byte[k] = hopper_byte(at + k * step, lane + 32 * k < live);
    uint32_t shown = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t keys = __ballot_sync(~0u, byte[k] || lane + 32 * k >= live);
        shown |= (keys >> lane % 4 * 2 & 0x03030303u) << 2 * k;
    }
    return shown;
}

/* ---- the host's side ---- */

/* NULL, or the first option of a call that kernels for Hopper have not */
inline const char *hopper_no_pairs(const lac_a_attend *f) { return f->blocks.data ? "there is a block_mask" : NULL; }
/* options that a call's instance has */
inline int hopper_options(const attn_pair_args &a)
{
    if (a.mask || a.bias) return HOPPER_ALL;
    return (a.p > 0 || a.slopes ? HOPPER_PAIRS : HOPPER_PLAIN) | (a.padding ? HOPPER_PADDED : HOPPER_PLAIN);
}

inline hopper_dropout hopper_dropout_of(const attn_args &a)
{
    hopper_dropout x = {};
    if (!(a.p > 0)) return x;
    for (uint32_t round = 0; round < 10; round++) {
        x.key[2 * round] = (uint32_t)a.seed + round * 0x9E3779B9u;
        x.key[2 * round + 1] = (uint32_t)(a.seed >> 32) + round * 0xBB67AE85u;
    }
    x.offset[0] = (uint32_t)a.offset, x.offset[1] = (uint32_t)(a.offset >> 32);
    x.dropped = (uint32_t)((uint64_t)ceil((double)a.p * 0x1p24) * 256 - 1);
    return x;
}

int attn_hopper_forward(attn_pair_args &a, const lac_a_attend *f, bool gaps, const hopper_kept *padding);
/* Padding: a's lengths become those up to the last key of each batch item; *padding, NULL where there is none, says
 * more. Both lie in `space`, of so many bytes. */
inline size_t attn_hopper_ends_bytes(const attn_args &a)
{
    return a.padding ? (size_t)a.batch * (sizeof(int) + sizeof(hopper_kept)) : 0;
}
int attn_hopper_ends(attn_args &a, int *space, const hopper_kept **padding);

#endif
