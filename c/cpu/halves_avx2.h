/* halves_avx2.h: activations of f16 and bf16, 16 values at a time, with AVX2.
 *
 * The same functions as halves.h has for AVX-512, for two vectors of 8 floats that go abreast, and as accurate; but
 * tables of a register hold four floats here, so polynomials are longer. gelu's tail comes from squares: Q(u)^(1/32),
 * Q being the upper tail of the normal distribution, is a polynomial of degree 6, and five squarings leave 2^-17 of
 * error. tanh is a quotient of polynomials; quotients are products with an estimate and a Newton step.
 * The words of bf16 at even and at odd places are two vectors of floats after a shift and a mask; they come back by an
 * addition each, a shift and a blend. What the formulas do not cover (`far`) is computed again out of line.
 * Two abreast, not four, leave registers for the constants (h_set), which otherwise are read again for every use.
 * A line of 32 values is 60 to 150 steps, of which about three start in a cycle of a Zen 3: two of its four pipes
 * multiply, and others' work gets in their way. Large arrays have half of their values from tables: halves_tables.h.
 */
#ifndef LAC_CPU_HALVES_AVX2_H
#define LAC_CPU_HALVES_AVX2_H
#include "exps.h"
#include "maps.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define V_HALF_LINES
enum { HALF_LINE = 16 }; /* values at once; `half`: f16 (1) or bf16 (2), as everywhere */
enum { H_COUNT = 2 };    /* vectors of floats */
#define H_EACH _Pragma("GCC unroll 2") for (int k = 0; k < H_COUNT; k++)

typedef __m256i h_words;

/* a constant in a register: as gcc knows it no longer, it does not read it from memory for every use instead */
LAC_INLINE __m256 h_set(float x)
{
    __m256 v = _mm256_set1_ps(x);
    __asm__("" : "+x"(v));
    return v;
}
LAC_INLINE __m256i h_load(const uint16_t *words) { return _mm256_loadu_si256((const __m256i *)words); }
LAC_INLINE void h_put(uint16_t *out, h_words w, bool past)
{
    if (past) _mm256_stream_si256((__m256i *)out, w);
    else _mm256_storeu_si256((__m256i *)out, w);
}
/* words as floats: those of f16 in order, those of bf16 by even and odd places */
LAC_INLINE void h_take(int half, const uint16_t *words, __m256 *x)
{
    if (half == 1) {
        H_EACH x[k] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)words + k));
        return;
    }
    __m256i w = h_load(words);
    x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    x[1] = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000)));
}
LAC_INLINE __m256i h_join(int half, const __m256 *y)
{
    if (half == 1)
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(y[0], 0)), _mm256_cvtps_ph(y[1], 0), 1);
    const __m256i up = _mm256_set1_epi32(0x8000);
    __m256i even = _mm256_add_epi32(_mm256_castps_si256(y[0]), up);
    __m256i odd = _mm256_add_epi32(_mm256_castps_si256(y[1]), up);
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}

/* e^x or e^-x for |x| <= 87: bf16 2^-15.2, f16 2^-21.7 */
LAC_INLINE void h_power(int half, __m256 *x, bool minus)
{
    const __m256 magic = h_set(V8_MAGIC), ln2 = h_set(0.693147182f);
    __m256 t[H_COUNT], n[H_COUNT], p[H_COUNT];
    H_EACH t[k] = _mm256_fmadd_ps(x[k], h_set(minus ? -1.44269504f : 1.44269504f), magic);
    H_EACH n[k] = _mm256_sub_ps(t[k], magic);
    H_EACH x[k] = minus ? _mm256_fnmsub_ps(n[k], ln2, x[k]) : _mm256_fnmadd_ps(n[k], ln2, x[k]);
    if (half == 2) {
        H_EACH p[k] = _mm256_fmadd_ps(x[k], h_set(0.499764338f), h_set(1.00093697f));
    } else {
        H_EACH p[k] = _mm256_fmadd_ps(x[k], h_set(0.166604057f), h_set(0.500312924f));
        H_EACH p[k] = _mm256_fmadd_ps(x[k], p[k], h_set(1.0f));
    }
    H_EACH p[k] = _mm256_mul_ps(x[k], p[k]);
    H_EACH t[k] = v8_power(t[k]);
    H_EACH x[k] = _mm256_fmadd_ps(t[k], p[k], t[k]);
}
/* 1 / d for d within 2^-125 and 2^125.9 */
LAC_INLINE void h_invert(__m256 *d)
{
    __m256 y[H_COUNT];
    H_EACH y[k] = _mm256_rcp_ps(d[k]);
    H_EACH d[k] = _mm256_fnmadd_ps(d[k], y[k], h_set(1.0f));
    H_EACH d[k] = _mm256_fmadd_ps(d[k], y[k], y[k]);
}
LAC_INLINE void h_exp_floats(int half, __m256 *x) { h_power(half, x, false); }
LAC_INLINE void h_sigmoid_floats(int half, __m256 *x)
{
    h_power(half, x, true);
    H_EACH x[k] = _mm256_add_ps(x[k], h_set(1.0f));
    h_invert(x);
}
LAC_INLINE void h_silu_floats(int half, __m256 *x)
{
    __m256 s[H_COUNT];
    H_EACH s[k] = x[k];
    h_sigmoid_floats(half, s);
    H_EACH x[k] = _mm256_mul_ps(x[k], s[k]);
}

/* what is beyond: out of line, so that the loops keep their registers */
LAC_INLINE void h_floats(int half, const uint16_t *words, float *x)
{
    LAC_CPU(load)(half == 1 ? LAC_F16 : LAC_BF16, words, 2, HALF_LINE, x);
}
LAC_INLINE __m256i h_round(int half, const float *y)
{
    uint16_t words[HALF_LINE];
    LAC_CPU(store)(half == 1 ? LAC_F16 : LAC_BF16, y, words, 2, HALF_LINE);
    return h_load(words);
}
#define H_FAR(name, scalar)                                                                                            \
    static __attribute__((noinline)) __m256i name(int half, const uint16_t *words)                                     \
    {                                                                                                                  \
        float line[HALF_LINE];                                                                                         \
        h_floats(half, words, line);                                                                                   \
        _Pragma("omp simd") for (int k = 0; k < HALF_LINE; k++) line[k] = scalar(line[k]);                             \
        return h_round(half, line);                                                                                    \
    }
H_FAR(h_exp_far, v_expf)
H_FAR(h_sigmoid_far, v_sigmoidf)
H_FAR(h_silu_far, f_silu)
H_FAR(h_gelu_far, v_geluf)
#undef H_FAR

/* places where |x| > bound, or x < -bound: of NaN as well, in the latter of negative ones */
LAC_INLINE __m256i h_beyond(__m256i w, int bound)
{
    return _mm256_cmpgt_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x7fff)), _mm256_set1_epi16((short)bound));
}
LAC_INLINE __m256i h_below(__m256i w, int bound)
{
    const __m256i first = _mm256_set1_epi16((short)(0x8000 | (bound + 1)));
    return _mm256_cmpeq_epi16(_mm256_max_epu16(w, first), w);
}
/* y, but `values` where far */
#define H_OR_FAR(y, far, values)                                                                                       \
    (__builtin_expect(_mm256_movemask_epi8(far), 0) ? _mm256_blendv_epi8(y, values, far) : (y))
enum { H_EXP_BF16 = 0x42ae, H_EXP_F16 = 0x5400, H_FOUR_BF16 = 0x4080, H_FOUR_F16 = 0x4400 }; /* 87, 64, 4 */

/* 0 for what is below 0: -0 and NaN are not */
LAC_INLINE __m256i h_relu(int half, const uint16_t *words)
{
    const __m256i first = _mm256_set1_epi16(half == 2 ? 0x7f80 : 0x7c00); /* after -inf, counted from -0's next on */
    __m256i w = h_load(words), from = _mm256_add_epi16(w, _mm256_set1_epi16(0x7fff));
    return _mm256_and_si256(w, _mm256_cmpeq_epi16(_mm256_max_epu16(from, first), from));
}

/* a function of words by one of floats; `near`: of words that are not far */
#define H_MAP(name)                                                                                                    \
    LAC_INLINE __m256i name##_near(int half, const uint16_t *words)                                                    \
    {                                                                                                                  \
        __m256 x[H_COUNT];                                                                                             \
        h_take(half, words, x);                                                                                        \
        name##_floats(half, x);                                                                                        \
        return h_join(half, x);                                                                                        \
    }                                                                                                                  \
    LAC_INLINE __m256i name(int half, const uint16_t *words)                                                           \
    {                                                                                                                  \
        const __m256i far = h_beyond(h_load(words), half == 2 ? H_EXP_BF16 : H_EXP_F16);                               \
        __m256i y = name##_near(half, words);                                                                          \
        return H_OR_FAR(y, far, name##_far(half, words));                                                              \
    }
H_MAP(h_exp)
H_MAP(h_sigmoid)
H_MAP(h_silu)
#undef H_MAP

/* u P(u^2) / Q(u^2): bf16 to 3.6, 2^-17, f16 to 4.6, 2^-19.8; from there on it rounds to 1 */
LAC_INLINE __m256i h_tanh(int half, const uint16_t *words)
{
    const float most = half == 2 ? 3.6f : 4.6f;
    __m256 x[H_COUNT], z[H_COUNT], p[H_COUNT], q[H_COUNT];
    h_take(half, words, x);
    H_EACH x[k] = _mm256_min_ps(h_set(most), _mm256_max_ps(h_set(-most), x[k]));
    H_EACH z[k] = _mm256_mul_ps(x[k], x[k]);
    if (half == 2) {
        H_EACH p[k] = _mm256_fmadd_ps(z[k], h_set(0.000811045058f), h_set(0.106356278f));
        H_EACH q[k] = _mm256_fmadd_ps(z[k], h_set(0.0141005823f), h_set(0.439633608f));
        H_EACH p[k] = _mm256_fmadd_ps(z[k], p[k], h_set(0.999993265f));
    } else {
        H_EACH p[k] = _mm256_fmadd_ps(z[k], h_set(0.00168521353f), h_set(0.117271028f));
        H_EACH q[k] = _mm256_fmadd_ps(z[k], h_set(6.78871438e-05f), h_set(0.0185636431f));
        H_EACH p[k] = _mm256_fmadd_ps(z[k], p[k], h_set(0.999998927f));
        H_EACH q[k] = _mm256_fmadd_ps(z[k], q[k], h_set(0.450595021f));
    }
    H_EACH q[k] = _mm256_fmadd_ps(z[k], q[k], h_set(1.0f));
    H_EACH p[k] = _mm256_mul_ps(p[k], x[k]);
    h_invert(q);
    H_EACH x[k] = _mm256_mul_ps(p[k], q[k]);
    return h_join(half, x);
}

/* Q(u): bf16 Q^(1/16) up to 4, 2^-15.6, f16 Q^(1/32) up to 5.8, 2^-17.1 */
LAC_INLINE void h_tail(int half, const __m256 *u, __m256 *q)
{
    if (half == 2) {
        H_EACH q[k] = _mm256_fmadd_ps(u[k], h_set(-4.65194935e-05f), h_set(0.000697584124f));
        H_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], h_set(-0.00140244095f));
        H_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], h_set(-0.0177729782f));
        H_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], h_set(-0.047769025f));
        H_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], h_set(0.957602918f));
    } else {
        H_EACH q[k] = _mm256_fmadd_ps(u[k], h_set(3.09736123e-07f), h_set(-1.60862619e-05f));
        H_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], h_set(0.000260673347f));
        H_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], h_set(-0.000915201905f));
        H_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], h_set(-0.00940490887f));
        H_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], h_set(-0.0244052075f));
        H_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], h_set(0.978572249f));
        H_EACH q[k] = _mm256_mul_ps(q[k], q[k]);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) H_EACH q[k] = _mm256_mul_ps(q[k], q[k]);
}
/* gelu(x) = relu(x) - u Q(u). bf16 is far below -4; f16 rounds to 0 from -5.8 on. NaN comes through relu. */
LAC_INLINE __m256i h_gelu_near(int half, const uint16_t *words)
{
    const __m256i most = _mm256_castps_si256(h_set(half == 2 ? 4.0f : 5.8f));
    __m256 x[H_COUNT], u[H_COUNT], q[H_COUNT];
    h_take(half, words, x);
    H_EACH u[k] = _mm256_andnot_ps(v8_sign(), x[k]);
    H_EACH u[k] = _mm256_castsi256_ps(_mm256_min_epi32(_mm256_castps_si256(u[k]), most));
    h_tail(half, u, q);
    H_EACH x[k] = _mm256_fnmadd_ps(u[k], q[k], _mm256_max_ps(_mm256_setzero_ps(), x[k]));
    return h_join(half, x);
}
LAC_INLINE __m256i h_gelu(int half, const uint16_t *words)
{
    __m256i y = h_gelu_near(half, words);
    if (half == 1) return y;
    const __m256i far = h_below(h_load(words), H_FOUR_BF16);
    return H_OR_FAR(y, far, h_gelu_far(half, words));
}
/* the slope: Q(u) - u density(u) = Q(u) S(u) or, for x > 0, 1 less that; far from 4 on. S: bf16 2^-13.2, f16 2^-17.8
 * of itself, or of 0.07 near its root. */
LAC_INLINE float h_slope_of(float x) { return x == x ? v_gelu_gradf(x) : x; } /* h_join leaves such NaN alone */
V8_FAR(h_slope_far, h_slope_of)
LAC_INLINE void h_slope(int half, const uint16_t *words, __m256 *q)
{
    const __m256i far = h_beyond(h_load(words), half == 2 ? H_FOUR_BF16 : H_FOUR_F16);
    __m256 x[H_COUNT], u[H_COUNT], s[H_COUNT];
    h_take(half, words, x);
    H_EACH u[k] = _mm256_andnot_ps(v8_sign(), x[k]);
    h_tail(half, u, q);
    if (half == 2) {
        H_EACH s[k] = _mm256_fmadd_ps(u[k], h_set(-0.00123484933f), h_set(0.0170610342f));
        H_EACH s[k] = _mm256_fmadd_ps(u[k], s[k], h_set(-0.102226198f));
        H_EACH s[k] = _mm256_fmadd_ps(u[k], s[k], h_set(-0.642530322f));
        H_EACH s[k] = _mm256_fmadd_ps(u[k], s[k], h_set(-0.796050429f));
        H_EACH s[k] = _mm256_fmadd_ps(u[k], s[k], h_set(0.99989295f));
    } else {
        H_EACH s[k] = _mm256_fmadd_ps(u[k], h_set(0.000150155422f), h_set(-0.00275254017f));
        H_EACH s[k] = _mm256_fmadd_ps(u[k], s[k], h_set(0.0226202235f));
        H_EACH s[k] = _mm256_fmadd_ps(u[k], s[k], h_set(-0.111307576f));
        H_EACH s[k] = _mm256_fmadd_ps(u[k], s[k], h_set(-0.635876119f));
        H_EACH s[k] = _mm256_fmadd_ps(u[k], s[k], h_set(-0.797966599f));
        H_EACH s[k] = _mm256_fmadd_ps(u[k], s[k], h_set(0.999998689f));
    }
    H_EACH q[k] = _mm256_mul_ps(q[k], s[k]);
    H_EACH q[k] = _mm256_blendv_ps(_mm256_sub_ps(h_set(1.0f), q[k]), q[k], x[k]);
    if (__builtin_expect(_mm256_movemask_epi8(far), 0)) H_EACH q[k] = h_slope_far(x[k], q[k], 4.0f);
}
LAC_INLINE __m256i h_gelu_bwd(int half, const uint16_t *words, const uint16_t *g)
{
    __m256 x[H_COUNT], slope[H_COUNT];
    h_slope(half, words, slope);
    h_take(half, g, x);
    H_EACH x[k] = _mm256_mul_ps(slope[k], x[k]);
    return h_join(half, x);
}
#undef H_OR_FAR
#undef H_EACH
#endif

#endif
