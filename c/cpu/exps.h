/* exps.h: exponentials of a cache line of floats at a time.
 *
 * e^x = 2^k 2^(j/16) e^r with x = (k + j/16) ln2 + r. With AVX-512 the sixteen powers 2^(j/16) are one register, from
 * which a permutation picks; |r| <= ln2/32 then needs a polynomial of degree 3, and vscalefps multiplies by 2^k with
 * subnormals, zero and infinity as they should be: 9 cycles of a Zen 4 a line instead of 13 for simd.h's v_expf, 8
 * instead of 11 for its v_exp_termf. No scalar expression says that to gcc, which would make a gather of the table.
 * With AVX2 a permutation picks from four powers 2^(j/4), which leaves three multiplications less, and comparisons go
 * by integers: a Zen 3 has four pipes, but multiplies, compares and clamps floats in two of them. 4.0 ns a line for
 * exp, not 5.0 (v_expf by vectors) or 5.9 (as gcc has it, with blends for clamps). Eight powers would take vpermps, of
 * which one starts in a cycle. Without either: the functions of simd.h.
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

/* e^x by table, 1.1 ulp. `bounded`: x is known to be at most 88, and e^x is 0 where it is below the normal floats;
 * `loose`: as in v_exp_normal */
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
    power = _mm512_fmadd_ps(power, p, power);
    /* An Intel processor takes hundreds of cycles for a line with a subnormal result, which a row's missing end is.
     * The bound is that of the normal floats, -126 ln2; NaN is not less. */
    __mmask16 normal = bounded ? _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ) : 0xffff;
    x = bounded ? _mm512_maskz_scalef_ps(normal, power, n) : _mm512_scalef_ps(power, n);
    _mm512_storeu_ps(line, x);
}
#define V_EXP_LINE(name, scalar, bounded, loose)                                                                       \
    LAC_INLINE void name(float *line) { v_exp_table(line, bounded, loose); }
#elif defined(__AVX2__)
enum { V8_ABREAST = 4 }; /* vectors at once, at most */
#define V8_EACH _Pragma("GCC unroll 4") for (int k = 0; k < count; k++)

LAC_INLINE __m256 v8_set(float x) { return _mm256_set1_ps(x); }
LAC_INLINE __m256 v8_sign(void) { return v8_set(-0.0f); }
/* NaN passes as the second argument */
LAC_INLINE __m256 v8_at_least(float least, __m256 x) { return _mm256_max_ps(v8_set(least), x); }
LAC_INLINE __m256 v8_at_most(float most, __m256 x) { return _mm256_min_ps(v8_set(most), x); }
/* is any |x| larger, or NaN? As integers, which leaves the multipliers alone. */
LAC_INLINE __m256i v8_beyond(__m256 x, float bound)
{
    return _mm256_cmpgt_epi32(_mm256_castps_si256(_mm256_andnot_ps(v8_sign(), x)), _mm256_castps_si256(v8_set(bound)));
}
LAC_INLINE bool v8_any_beyond(const __m256 *x, float bound, int count)
{
    __m256i any = v8_beyond(x[0], bound);
    for (int k = 1; k < count; k++) any = _mm256_or_si256(any, v8_beyond(x[k], bound));
    return __builtin_expect(_mm256_movemask_epi8(any), 0);
}

/* e^x = 2^(n + j/4) e^r for |x| <= 88: t = x log2(e) + magic has n + 127 and j in its low bits */
#define V8_MAGIC (0x1.8p21f + 127.0f)
/* 2^(n + j/4) by t: the table has the bits of 2^(j/4) less those of 1 and of j */
LAC_INLINE __m256 v8_power(__m256 t)
{
    const __m256i by4 = _mm256_setr_epi32(0, -0x7c810, -0xafb0d, -0x8bb03, 0, -0x7c810, -0xafb0d, -0x8bb03);
    __m256i i = _mm256_castps_si256(t), bits = _mm256_castps_si256(_mm256_permutevar_ps(_mm256_castsi256_ps(by4), i));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(i, 21), bits));
}
/* the same, and 0 below the normal floats, where n + 127 = 0 leaves the bits of 2^(j/4) without their leading 1 */
LAC_INLINE __m256 v8_power_flush(__m256 t)
{
    __m256i normal = _mm256_cmpgt_epi32(_mm256_castps_si256(t), _mm256_castps_si256(v8_set(V8_MAGIC - 126.25f)));
    return _mm256_and_ps(v8_power(t), _mm256_castsi256_ps(normal));
}
/* e^r - 1 on |r| <= ln2/8, 5e-9 */
LAC_INLINE void v8_expm1_poly(const __m256 *r, __m256 *p, int count)
{
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], v8_set(0.0416825488f), v8_set(0.166721106f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(0.5f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(1.0f));
    V8_EACH p[k] = _mm256_mul_ps(r[k], p[k]);
}
/* what is left of x once t is rounded: v_minus_ln2, v_minus_ln2_loose */
LAC_INLINE void v8_reduce(const __m256 *x, const __m256 *t, bool loose, __m256 *r, int count)
{
    __m256 n[V8_ABREAST];
    V8_EACH n[k] = _mm256_sub_ps(t[k], v8_set(V8_MAGIC));
    V8_EACH r[k] = _mm256_fnmadd_ps(n[k], v8_set(loose ? 0.693147182f : 0.693359375f), x[k]);
    if (!loose) V8_EACH r[k] = _mm256_fmadd_ps(n[k], v8_set(2.12194440e-4f), r[k]);
}
/* e^x for |x| <= 87, 1.1 ulp; `flush`: for |x| <= 88, and 0 below -87.42, where n + j/4 < -126; `loose`: as in
 * v_exp_normal */
LAC_INLINE void v8_exp(__m256 *x, bool flush, bool loose, int count)
{
    __m256 t[V8_ABREAST], r[V8_ABREAST], p[V8_ABREAST];
    V8_EACH t[k] = _mm256_fmadd_ps(x[k], v8_set(1.44269504f), v8_set(V8_MAGIC));
    v8_reduce(x, t, loose, r, count);
    v8_expm1_poly(r, p, count);
    V8_EACH t[k] = flush ? v8_power_flush(t[k]) : v8_power(t[k]);
    V8_EACH x[k] = _mm256_fmadd_ps(t[k], p[k], t[k]);
}
/* values, but where |x| is beyond the bound those of the function of one float: out of line */
#define V8_FAR(name, scalar)                                                                                           \
    static __attribute__((noinline, cold, unused)) __m256 name(__m256 x, __m256 values, float bound)                   \
    {                                                                                                                  \
        float line[8];                                                                                                 \
        _mm256_storeu_ps(line, x);                                                                                     \
        _Pragma("omp simd") for (int k = 0; k < 8; k++) line[k] = scalar(line[k]);                                     \
        return _mm256_blendv_ps(values, _mm256_loadu_ps(line), _mm256_castsi256_ps(v8_beyond(x, bound)));              \
    }
V8_FAR(v8_exp_far, v_expf)
/* a line; bounded: x is at most 88, and e^x is 0 below the normal floats */
LAC_INLINE void v8_exp_line(float *line, bool bounded, bool loose)
{
    enum { count = 2 };
    __m256 x[count] = {_mm256_loadu_ps(line), _mm256_loadu_ps(line + 8)}, y[count];
    V8_EACH y[k] = bounded ? v8_at_least(-88.0f, x[k]) : x[k];
    v8_exp(y, bounded, loose, count);
    if (!bounded && v8_any_beyond(x, 87.0f, count)) V8_EACH y[k] = v8_exp_far(x[k], y[k], 87.0f);
    V8_EACH _mm256_storeu_ps(line + 8 * k, y[k]);
}
#define V_EXP_LINE(name, scalar, bounded, loose)                                                                       \
    LAC_INLINE void name(float *line) { v8_exp_line(line, bounded, loose); }
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
