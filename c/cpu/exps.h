/* exps.h: exponentials of a cache line of floats at a time.
 *
 * e^x = 2^k 2^(j/16) e^r with x = (k + j/16) ln2 + r. With AVX-512 the sixteen powers 2^(j/16) are one register, from
 * which a permutation picks; |r| <= ln2/32 then needs a polynomial of degree 3, and vscalefps multiplies by 2^k with
 * subnormals, zero and infinity as they should be: 9 cycles of a Zen 4 a line instead of 13 for simd.h's v_expf, 8
 * instead of 11 for its v_exp_termf. No scalar expression says that to gcc, which would make a gather of the table.
 * Without AVX-512: the functions of simd.h.
 * The ends of rows are computed as whole lines too (v_part), so that no value depends on where in a line it stands.
 */
#ifndef LAC_CPU_EXPS_H
#define LAC_CPU_EXPS_H
#include "simd.h"

enum { V_FLOATS = V_LINE / 4 };

#if defined(__AVX512F__)
/* 2^(j/16) */
static const float v_powers[16] = {1.0f,        1.04427378f, 1.09050773f, 1.13878864f, 1.18920712f, 1.24185781f,
                                   1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                   1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};

/* e^x by table, 1.1 ulp. `bounded`: x is known to be at most 88; `loose`: as in v_exp_normal */
LAC_INLINE void v_exp_table(float *line, bool bounded, bool loose)
{
    const __m512 magic = _mm512_set1_ps(0x1.8p19f);                           /* its last bit is 1/16 */
    __m512 x = _mm512_max_ps(_mm512_set1_ps(-104.5f), _mm512_loadu_ps(line)); /* NaN passes as the second argument */
    if (!bounded) x = _mm512_min_ps(_mm512_set1_ps(89.0f), x);
    __m512 t = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), magic), n = _mm512_sub_ps(t, magic), r;
    if (loose) {
        r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182f), x);
    } else {
        r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
        r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    }
    /* e^r - 1 on |r| <= ln2/32, 1.6e-9 */
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.166669f), _mm512_set1_ps(0.5000162f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r);
    __m512 power = _mm512_permutexvar_ps(_mm512_castps_si512(t), _mm512_loadu_ps(v_powers));
    _mm512_storeu_ps(line, _mm512_scalef_ps(_mm512_fmadd_ps(power, p, power), n));
}
#define V_EXP_LINE(name, scalar, bounded, loose)                                                                       \
    LAC_INLINE void name(float *line) { v_exp_table(line, bounded, loose); }
#elif defined(__AVX2__)
enum { V8_ABREAST = 4 }; /* vectors at once, at most */
#define V8_EACH _Pragma("GCC unroll 4") for (int k = 0; k < count; k++)

LAC_INLINE __m256 v8_set(float x) { return _mm256_set1_ps(x); }
LAC_INLINE __m256 v8_sign(void) { return v8_set(-0.0f); }
/* 2^(n - 127) from n in the low bits of a float */
LAC_INLINE __m256 v8_power(__m256 t) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23)); }
/* NaN passes as the second argument */
LAC_INLINE __m256 v8_at_least(float least, __m256 x) { return _mm256_max_ps(v8_set(least), x); }
LAC_INLINE __m256 v8_at_most(float most, __m256 x) { return _mm256_min_ps(v8_set(most), x); }
/* v_exp_poly */
LAC_INLINE void v8_exp_poly(const __m256 *r, __m256 *p, int count)
{
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], v8_set(1.3926213835e-3f), v8_set(8.3632029716e-3f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(4.1666554432e-2f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(1.6666576846e-1f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(0.5f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(1.0f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(1.0f));
}
/* what is left of c where t = c log2(e) + magic has been rounded: v_minus_ln2, v_minus_ln2_loose */
LAC_INLINE void v8_reduce(const __m256 *c, const __m256 *t, float magic, bool loose, __m256 *r, int count)
{
    __m256 n[V8_ABREAST];
    V8_EACH n[k] = _mm256_sub_ps(t[k], v8_set(magic));
    V8_EACH r[k] = _mm256_fnmadd_ps(n[k], v8_set(loose ? 0.693147182f : 0.693359375f), c[k]);
    if (!loose) V8_EACH r[k] = _mm256_fmadd_ps(n[k], v8_set(2.12194440e-4f), r[k]);
}
/* v_expf, or what is bounded above and 0 where it leaves the normal floats: v_exp_downf, loose: v_exp_termf */
LAC_INLINE void v8_exp(__m256 *x, bool bounded, bool loose, int count)
{
    const float magic = 12582912.0f + (bounded ? 127.0f : 254.0f);
    __m256 t[V8_ABREAST], r[V8_ABREAST], p[V8_ABREAST];
    V8_EACH x[k] = v8_at_least(bounded ? -88.0f : -104.5f, x[k]);
    if (!bounded) V8_EACH x[k] = v8_at_most(89.0f, x[k]);
    V8_EACH t[k] = _mm256_fmadd_ps(x[k], v8_set(1.44269504f), v8_set(magic));
    v8_reduce(x, t, magic, loose, r, count);
    v8_exp_poly(r, p, count);
    V8_EACH
    {
        __m256i i = _mm256_castps_si256(t[k]), half = _mm256_srli_epi32(i, 1), rest = _mm256_sub_epi32(i, half);
        if (!bounded) p[k] = _mm256_mul_ps(p[k], v8_power(_mm256_castsi256_ps(half)));
        x[k] = _mm256_mul_ps(p[k], bounded ? v8_power(t[k]) : v8_power(_mm256_castsi256_ps(rest)));
    }
}
#define V_EXP_LINE(name, scalar, bounded, loose)                                                                       \
    LAC_INLINE void name(float *line)                                                                                  \
    {                                                                                                                  \
        __m256 x[2] = {_mm256_loadu_ps(line), _mm256_loadu_ps(line + 8)};                                              \
        v8_exp(x, bounded, loose, 2);                                                                                  \
        _mm256_storeu_ps(line, x[0]);                                                                                  \
        _mm256_storeu_ps(line + 8, x[1]);                                                                              \
    }
#else
#define V_EXP_LINE(name, scalar, bounded, loose)                                                                       \
    LAC_INLINE void name(float *line)                                                                                  \
    {                                                                                                                  \
        _Pragma("omp simd") for (int k = 0; k < V_FLOATS; k++) line[k] = scalar(line[k]);                              \
    }
#endif
V_EXP_LINE(v_exp_line, v_expf, false, false)
V_EXP_LINE(v_exp_down_line, v_exp_downf, true, false) /* x <= 0 */
V_EXP_LINE(v_exp_term_line, v_exp_termf, true, true)
#undef V_EXP_LINE

#endif
