/* halves_tables.h: activations of f16 and bf16 from tables of all their values, with AVX2.
 *
 * A function of one half has 65,536 values: 128 KB, made once by the functions of halves_avx2.h, so that results have
 * the same bits whichever way they come. Of normal numbers 6 KB (bf16) or 45 KB (f16) are read, which stay near.
 * Looking up is work for integer units and ports that load: 24 cycles of a Zen 3 for 32 values, where functions take 19
 * (exp) to 36 by vectors. These wait for the two pipes that multiply, so both ways go side by side: every second vector
 * of words is looked up, and 32 values take 17 (exp) to 23 cycles. A block with a value that is `far` (halves_avx2.h)
 * is looked up as a whole; blocks are asked at once, as asking for every vector takes 4 cycles. gelu's gradient
 * multiplies: its slopes are a table of floats, and none is computed.
 *
 * Tables are static memory, none of the pool's, and take some as they are made: 128 KB for a function and a half type,
 * 256 KB for slopes, 1.8 MB at most. Making one takes 0.2 ms, 1 ms for exp, so arrays of fewer than H_LEAST go without.
 * Values of any exponents, which miss the first cache, take 12 to 20 ns for 32: where many were far that is a third of
 * the time, of tanh in f16 a quarter more than without a table. exp of ordinary numbers gains nothing by its own.
 *
 * Tried: entries of 8 bytes, whose four words meet by three `or` (10 steps for four values, not 11, and a cycle less,
 * but 512 KB); four words joined for one store (a shift more each: 7% slower); gathers (48 cycles).
 */
#ifndef LAC_CPU_HALVES_TABLES_H
#define LAC_CPU_HALVES_TABLES_H
#include "halves_avx2.h"

#if defined(V_HALF_LINES) && defined(__AVX2__) && !defined(__AVX512F__)
#define H_TABLES
enum { H_EXP, H_SIGMOID, H_SILU, H_TANH, H_GELU, H_MAPS, H_GELU_BWD = H_MAPS };
enum { H_VALUES = 65536, H_LEAST = 1 << 19, H_BLOCK = 512, H_AHEAD = 2048 };
enum { H_MARGIN = 1 }; /* a pair is read from one word before its upper value */

/* by function and half type; untouched, so without memory, until they are made */
static uint16_t h_table_words[H_MAPS][2][H_MARGIN + H_VALUES];
static float h_table_slopes[2][H_VALUES];
static uint8_t h_table_state[H_MAPS + 1][2]; /* 0: none, 1: being made, 2: there */

/* ---- making ---- */

static __attribute__((noinline)) void h_table_make(int map, int half)
{
    for (int i = 0; i < H_VALUES; i += HALF_LINE) {
        uint16_t words[HALF_LINE];
        for (int k = 0; k < HALF_LINE; k++) words[k] = (uint16_t)(i + k);
        if (map == H_GELU_BWD) {
            __m256 slope[H_COUNT];
            float *to = h_table_slopes[half - 1] + i;
            h_slope(half, words, slope);
            if (half == 2) { /* from even and odd places */
                __m256 low = _mm256_unpacklo_ps(slope[0], slope[1]), high = _mm256_unpackhi_ps(slope[0], slope[1]);
                slope[0] = _mm256_permute2f128_ps(low, high, 0x20);
                slope[1] = _mm256_permute2f128_ps(low, high, 0x31);
            }
            for (int k = 0; k < H_COUNT; k++) _mm256_storeu_ps(to + 8 * k, slope[k]);
            continue;
        }
        h_words y = map == H_EXP       ? h_exp(half, words)
                    : map == H_SIGMOID ? h_sigmoid(half, words)
                    : map == H_SILU    ? h_silu(half, words)
                    : map == H_TANH    ? h_tanh(half, words)
                                       : h_gelu(half, words);
        h_put(h_table_words[map][half - 1] + H_MARGIN + i, y, false);
    }
}
/* The table of a function for n values; NULL: none, compute them. Threads that come while it is made go without. */
static const void *h_table(int map, int half, int64_t n)
{
    uint8_t *state = &h_table_state[map][half - 1], none = 0;
    if (n < H_LEAST) return NULL;
    if (__atomic_load_n(state, __ATOMIC_ACQUIRE) != 2) {
        if (!__atomic_compare_exchange_n(state, &none, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return NULL;
        h_table_make(map, half);
        __atomic_store_n(state, 2, __ATOMIC_RELEASE);
    }
    return map == H_GELU_BWD ? (const void *)h_table_slopes[half - 1] : h_table_words[map][half - 1] + H_MARGIN;
}

/* ---- looking up ---- */

/* the values of two words as a pair */
LAC_INLINE uint32_t h_pair(const uint16_t *table, uint64_t low, uint64_t high)
{
    uint32_t two; /* with a neighbour below, whose place the other takes: one step, of which gcc makes four */
    memcpy(&two, table + high - H_MARGIN, sizeof two);
    __asm__("movw %1, %w0" : "+r"(two) : "m"(table[low]));
    return two;
}
LAC_INLINE void h_put_pair(uint16_t *out, uint32_t two, bool past)
{
    if (past) _mm_stream_si32((int *)out, (int)two);
    else memcpy(out, &two, sizeof two);
}
LAC_INLINE void h_look_up(const uint16_t *table, const uint16_t *words, uint16_t *out, bool past)
{
    _Pragma("GCC unroll 4") for (int k = 0; k < HALF_LINE; k += 4)
    {
        uint64_t w;
        memcpy(&w, words + k, sizeof w);
        h_put_pair(out + k, h_pair(table, w & 0xffff, _bextr_u64(w, 16, 16)), past);
        h_put_pair(out + k + 2, h_pair(table, _bextr_u64(w, 32, 16), w >> 48), past);
    }
}
/* is any of every second vector's values far? above: of those below zero alone */
LAC_INLINE bool h_block_is_far(const uint16_t *x, int64_t n, int bound, bool above)
{
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = HALF_LINE; i < n; i += 2 * HALF_LINE)
        most = _mm256_max_epu16(most, above ? _mm256_slli_epi16(h_load(x + i), 1) : h_load(x + i));
    const __m256i first = _mm256_set1_epi16((short)(above ? 2 * (bound + 1) : 0x8000 | (bound + 1)));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_max_epu16(most, first), most)) != 0;
}

LAC_INLINE void h_ask_ahead(const uint16_t *x, bool past)
{
    if (past) __builtin_prefetch((const char *)x + H_AHEAD, 0, 2);
}
/* n values: whole vectors, or one */
LAC_INLINE void h_map_block(int half, const uint16_t *table, const uint16_t *x, int64_t n, uint16_t *out, bool past,
                            bool far, h_words (*near)(int, const uint16_t *))
{
    int64_t i = 0;
    for (; !far && i + 2 * HALF_LINE <= n; i += 2 * HALF_LINE) {
        h_ask_ahead(x + i, past);
        h_words y = near(half, x + i + HALF_LINE);
        h_look_up(table, x + i, out + i, past);
        h_put(out + i + HALF_LINE, y, past);
    }
    for (; i < n; i += HALF_LINE) {
        h_ask_ahead(x + i, past);
        h_look_up(table, x + i, out + i, past);
    }
}
#define H_TABLE_MAP(name, near, far)                                                                                   \
    LAC_INLINE void name##_by_table(int half, const void *table, const uint16_t *x, const uint16_t *g, int64_t n,      \
                                    uint16_t *out, bool past)                                                          \
    {                                                                                                                  \
        (void)g;                                                                                                       \
        for (int64_t at = 0; at < n; at += H_BLOCK) {                                                                  \
            const int64_t m = n - at < H_BLOCK ? n - at : H_BLOCK;                                                     \
            const uint16_t *from = x + at;                                                                             \
            if (past) h_map_block(half, table, from, m, out + at, true, far, near);                                    \
            else h_map_block(half, table, from, m, out + at, false, far, near);                                        \
        }                                                                                                              \
    }
#define H_EXP_IS_FAR h_block_is_far(from, m, half == 2 ? H_EXP_BF16 : H_EXP_F16, true)
H_TABLE_MAP(h_exp, h_exp_near, H_EXP_IS_FAR)
H_TABLE_MAP(h_sigmoid, h_sigmoid_near, H_EXP_IS_FAR)
H_TABLE_MAP(h_silu, h_silu_near, H_EXP_IS_FAR)
H_TABLE_MAP(h_tanh, h_tanh, false)
H_TABLE_MAP(h_gelu, h_gelu_near, half == 2 && h_block_is_far(from, m, H_FOUR_BF16, false))
#undef H_EXP_IS_FAR
#undef H_TABLE_MAP

LAC_INLINE __m128 h_four_slopes(const float *table, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    __m128 v = _mm_insert_ps(_mm_load_ss(table + a), _mm_load_ss(table + b), 0x10);
    return _mm_insert_ps(_mm_insert_ps(v, _mm_load_ss(table + c), 0x20), _mm_load_ss(table + d), 0x30);
}
/* of 8 values: those of f16 in order, those of bf16 by even and odd places */
LAC_INLINE void h_eight_slopes(int half, const float *table, const uint16_t *x, __m128 *slope)
{
    uint64_t w[2];
    memcpy(w, x, sizeof w);
    const uint64_t at[8] = {w[0] & 0xffff, _bextr_u64(w[0], 16, 16), _bextr_u64(w[0], 32, 16), w[0] >> 48,
                            w[1] & 0xffff, _bextr_u64(w[1], 16, 16), _bextr_u64(w[1], 32, 16), w[1] >> 48};
    const int step = half == 2 ? 2 : 1, second = half == 2 ? 1 : 4;
    for (int k = 0, from = 0; k < 2; k++, from = second)
        slope[k] = h_four_slopes(table, at[from], at[from + step], at[from + 2 * step], at[from + 3 * step]);
}
LAC_INLINE void h_gelu_bwd_by_table(int half, const void *table, const uint16_t *x, const uint16_t *g, int64_t n,
                                    uint16_t *out, bool past)
{
    for (int64_t i = 0; i < n; i += HALF_LINE) {
        __m256 y[H_COUNT];
        h_ask_ahead(x + i, past);
        h_ask_ahead(g + i, past);
        h_take(half, g + i, y);
        __m128 low[2], high[2];
        h_eight_slopes(half, table, x + i, low);
        h_eight_slopes(half, table, x + i + 8, high);
        y[0] = _mm256_mul_ps(y[0], _mm256_set_m128(half == 2 ? high[0] : low[1], low[0]));
        y[1] = _mm256_mul_ps(y[1], _mm256_set_m128(high[1], half == 2 ? low[1] : high[0]));
        h_put(out + i, h_join(half, y), past);
    }
}
#endif

#endif
