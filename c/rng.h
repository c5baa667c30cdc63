/* rng.h: the one source of random numbers, for C and CUDA.
 *
 * Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011) is counter-based: a block of four 32-bit words is a pure
 * function of (key, counter). So the value of an element depends on the seed, the offset of the call and the
 * element's row-major position only; threads, tiles, devices, recomputation in a backward cannot change it.
 *
 * Mapping, shared by every back end:
 *   key = seed;  counter = (block number: words 0 and 1, call offset: words 2 and 3)
 *   32-bit draws: element i is word i mod 4 of block i / 4. Dropout; uniform and Bernoulli unless dst is f64.
 *   64-bit draws: element i is the words 2(i mod 2) (low half) and 2(i mod 2) + 1 of block i / 2. Integers; uniform and
 *                 Bernoulli of f64.
 *   normals but f64: the words (0, 1) of block i / 4 give elements 0 and 1, (2, 3) give 2 and 3; f64: block i / 2 gives
 *                 two, from its two 64-bit draws
 * The offset of two calls must differ by at least 1; blocks never cross into the next offset.
 * Uniforms have 24 bits (53 for f64) and are never 1; what rounding to the dtype could lift to the upper end is
 * clamped to `top`, the largest value below it (lac_rng_below).
 */
#ifndef LAC_RNG_H
#define LAC_RNG_H
#include <math.h>
#include <stdint.h>
#ifdef __CUDACC__
#define LAC_HD __host__ __device__ static inline
#else
#define LAC_HD static inline __attribute__((unused))
#endif

LAC_HD void lac_philox(uint64_t seed, uint64_t offset, uint64_t block, uint32_t out[4])
{
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = (uint32_t)offset, c3 = (uint32_t)(offset >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* [0, 1) from a word or a pair of words */
LAC_HD float lac_rng_unit24(uint32_t word) { return (float)(word >> 8) * 0x1p-24f; }
LAC_HD uint64_t lac_rng_pair(uint32_t low, uint32_t high) { return (uint64_t)high << 32 | low; }
LAC_HD double lac_rng_unit53(uint64_t pair) { return (double)(pair >> 11) * 0x1p-53; }

/* a <= value < b, before rounding; in double, so that no fused multiply-add can change a float result */
LAC_HD double lac_rng_between(double unit, double a, double b, double top)
{
    double value = a + (b - a) * unit;
    return value > top ? top : value;
}

/* The largest value below b of a float format with `bits` of precision and least exponent `least` (f32 24, -149; f16
 * 11, -24; bf16 8, -133; f64 53, -1074), but not below a: the `top` of uniforms on [a, b). Host only. */
static inline __attribute__((unused)) double lac_rng_below(int bits, int least, double a, double b)
{
    int e;
    double f = frexp(b, &e), top;
    if (b == 0) {
        top = -ldexp(1.0, least);
    } else {
        double unit = ldexp(1.0, e - bits > least ? e - bits : least);
        top = floor(b / unit) * unit;
        if (top >= b) {
            if (f == 0.5 && e - bits > least) unit *= 0.5; /* below a power of two the grid is twice as fine */
            top = b - unit;
        }
    }
    return top < a ? a : top;
}

/* does an event of probability p happen? 24 bits for 32-bit draws, 53 for f64 */
LAC_HD int lac_rng_event(double unit, double p) { return unit < p; }

/* a <= value < b; the bias of the multiplication is below (b - a) / 2^64 */
LAC_HD int64_t lac_rng_integer(uint64_t pair, int64_t a, int64_t b)
{
    uint64_t span = (uint64_t)b - (uint64_t)a;
    uint64_t ll = (pair & 0xffffffffu) * (span & 0xffffffffu), lh = (pair & 0xffffffffu) * (span >> 32);
    uint64_t hl = (pair >> 32) * (span & 0xffffffffu), hh = (pair >> 32) * (span >> 32);
    uint64_t carry = ((ll >> 32) + (lh & 0xffffffffu) + (hl & 0xffffffffu)) >> 32;
    return (int64_t)((uint64_t)a + hh + (lh >> 32) + (hl >> 32) + carry);
}

/* Box-Muller: two standard normals from units in [0, 1); 1 - u is in (0, 1], so the logarithm is finite */
LAC_HD void lac_rng_normal2(double u, double v, double *first, double *second)
{
    double r = sqrt(-2.0 * log(1.0 - u)), angle = 6.28318530717958647692 * v;
    *first = r * cos(angle);
    *second = r * sin(angle);
}

/* dropout keeps an element when the same 24 bits, read as a unit, are at or above p */
LAC_HD int lac_rng_keep(uint32_t word, float p) { return lac_rng_unit24(word) >= p; }

#endif
