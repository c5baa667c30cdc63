/* activations_avx2.h: activations of two cache lines of floats at a time, with AVX2.
 *
 * The formulas are those of simd.h, gelu's with exps.h's powers of 2, step by step over four vectors: one vector is a
 * chain of 20 to 30 dependent steps, of which a processor sees few at once, and gcc puts those of a plain loop one
 * after the other. Nanoseconds for a line in the cache of a Zen 3 at 3.1 GHz, and of the plain loop: sigmoid 4.7 and
 * 5.7, tanh 5.4 and 7.8, gelu 9.4 and 11.3. It multiplies in two of its four pipes, and gelu has 24 multiplications and
 * a division for 8 floats.
 * Tried, not kept: two vectors at once (tanh 6.2); gelu by 8 polynomials of degree 6, whose coefficients vpermps picks
 * (9.5: one starts in a cycle); gelu's tail as a power of a polynomial, as halves_avx2.h has it (cancellation costs 20
 * ulp of floats).
 */
#ifndef LAC_CPU_ACTIVATIONS_AVX2_H
#define LAC_CPU_ACTIVATIONS_AVX2_H
#include "exps.h"

/* 2^n by n + 127 in the low bits of a float */
LAC_INLINE __m256 v8_scale(__m256 t) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23)); }

/* 1 + e^-x, infinite below -88.37. With v_exp_poly: tables, as v8_exp's, and clamps out of line were no faster beside
 * the division that follows (4.7 ns a line of a Zen 3; 5.1 so). */
LAC_INLINE void v_logistic(__m256 *x, int count)
{
    const __m256 magic = v8_set(12582912.0f + 127.0f);
    __m256 t[V8_ABREAST], n[V8_ABREAST], r[V8_ABREAST], p[V8_ABREAST];
    V8_EACH x[k] = v8_at_most(87.0f, v8_at_least(-88.8f, x[k]));
    V8_EACH t[k] = _mm256_fnmadd_ps(x[k], v8_set(1.44269504f), magic);
    V8_EACH n[k] = _mm256_sub_ps(t[k], magic);
    V8_EACH r[k] = _mm256_fnmsub_ps(n[k], v8_set(0.693359375f), x[k]);
    V8_EACH r[k] = _mm256_fmadd_ps(n[k], v8_set(2.12194440e-4f), r[k]);
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], v8_set(1.3926213835e-3f), v8_set(8.3632029716e-3f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(4.1666554432e-2f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(1.6666576846e-1f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(0.5f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(1.0f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(1.0f));
    V8_EACH t[k] = v8_scale(t[k]);
    V8_EACH x[k] = _mm256_fmadd_ps(p[k], t[k], v8_set(1.0f));
}

/* v_tanhf with u = |x| for half of what is reduced, whose error in one part, 2e-9, does not count: the slope falls
 * faster */
LAC_INLINE void v_tanh(__m256 *x, int count)
{
    const __m256 magic = v8_set(12582912.0f + 127.0f);
    __m256 u[V8_ABREAST], t[V8_ABREAST], n[V8_ABREAST], r[V8_ABREAST], p[V8_ABREAST];
    V8_EACH u[k] = v8_at_most(10.0f, _mm256_andnot_ps(v8_sign(), x[k]));
    V8_EACH t[k] = _mm256_fmadd_ps(u[k], v8_set(2 * 1.44269504f), magic);
    V8_EACH n[k] = _mm256_sub_ps(t[k], magic);
    V8_EACH r[k] = _mm256_fnmadd_ps(n[k], v8_set(0.693147182f), _mm256_add_ps(u[k], u[k]));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], v8_set(0.000198458816f), v8_set(0.00139406684f)); /* e^r - 1, 3e-10 */
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(0.00833338965f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(0.0416663587f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(0.166666657f));
    V8_EACH p[k] = _mm256_fmadd_ps(r[k], p[k], v8_set(0.5f));
    V8_EACH p[k] = _mm256_fmadd_ps(_mm256_mul_ps(r[k], r[k]), p[k], r[k]);
    V8_EACH t[k] = v8_scale(t[k]);
    V8_EACH p[k] = _mm256_fmadd_ps(t[k], p[k], _mm256_sub_ps(t[k], v8_set(1.0f)));
    V8_EACH p[k] = _mm256_div_ps(p[k], _mm256_add_ps(p[k], v8_set(2.0f)));
    V8_EACH x[k] = _mm256_or_ps(p[k], _mm256_and_ps(v8_sign(), x[k]));
}

/* v_normal_tailf of u, which is at most V_TAIL_END: the ratio, and e^(-u^2/2), 0 from u = 13.223 on */
LAC_INLINE void v8_normal_tail(const __m256 *u, __m256 *ratio, __m256 *e, int count)
{
    __m256 t[V8_ABREAST], n[V8_ABREAST], p[V8_ABREAST], q[V8_ABREAST];
    V8_EACH t[k] = _mm256_mul_ps(u[k], u[k]);
    V8_EACH t[k] = _mm256_fmadd_ps(t[k], v8_set(-0.5f * 1.44269504f), v8_set(V8_MAGIC));
    V8_EACH n[k] = _mm256_sub_ps(t[k], v8_set(V8_MAGIC));
    V8_EACH q[k] = _mm256_mul_ps(n[k], v8_set(2 * 0.693359375f));
    V8_EACH q[k] = _mm256_fmadd_ps(u[k], u[k], q[k]); /* u^2 is not rounded */
    V8_EACH q[k] = _mm256_fnmadd_ps(n[k], v8_set(2 * 2.12194440e-4f), q[k]);
    V8_EACH p[k] = _mm256_fnmadd_ps(q[k], v8_set(0.0416825488f / 16), v8_set(0.166721106f / 8)); /* e^(-q/2) - 1 */
    V8_EACH p[k] = _mm256_fnmadd_ps(q[k], p[k], v8_set(0.5f / 4));
    V8_EACH p[k] = _mm256_fnmadd_ps(q[k], p[k], v8_set(0.5f));
    V8_EACH q[k] = _mm256_mul_ps(q[k], p[k]);
    V8_EACH t[k] = v8_power_flush(t[k]);
    V8_EACH e[k] = _mm256_fnmadd_ps(t[k], q[k], t[k]);
    V8_EACH p[k] = _mm256_fmadd_ps(u[k], v8_set(0.508964f), v8_set(5.0620623f));
    V8_EACH q[k] = _mm256_fmadd_ps(u[k], v8_set(1.2757654f), v8_set(12.689643f));
    V8_EACH p[k] = _mm256_fmadd_ps(u[k], p[k], v8_set(22.953695f));
    V8_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], v8_set(58.79122f));
    V8_EACH p[k] = _mm256_fmadd_ps(u[k], p[k], v8_set(55.158436f));
    V8_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], v8_set(151.22324f));
    V8_EACH p[k] = _mm256_fmadd_ps(u[k], p[k], v8_set(63.300518f));
    V8_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], v8_set(211.32993f));
    V8_EACH q[k] = _mm256_fmadd_ps(u[k], q[k], v8_set(126.601036f));
    V8_EACH ratio[k] = _mm256_div_ps(p[k], q[k]);
}
/* |x|, at most V_TAIL_END; NaN does not pass. As integers, which leaves the multipliers alone. */
LAC_INLINE __m256 v8_tail_argument(__m256 x)
{
    const __m256i most = _mm256_castps_si256(v8_set(V_TAIL_END));
    return _mm256_castsi256_ps(_mm256_min_epi32(_mm256_castps_si256(_mm256_andnot_ps(v8_sign(), x)), most));
}
/* v_geluf; 6.7 ulp over all floats */
LAC_INLINE void v_gelu(__m256 *x, int count)
{
    __m256 u[V8_ABREAST], ratio[V8_ABREAST], e[V8_ABREAST];
    V8_EACH u[k] = v8_tail_argument(x[k]);
    v8_normal_tail(u, ratio, e, count);
    V8_EACH u[k] = _mm256_mul_ps(u[k], ratio[k]);
    V8_EACH x[k] = _mm256_fnmadd_ps(u[k], e[k], v8_at_least(0.0f, x[k]));
}
/* v_gelu_gradf */
LAC_INLINE void v_gelu_grad(__m256 *x, int count)
{
    __m256 u[V8_ABREAST], ratio[V8_ABREAST], e[V8_ABREAST];
    V8_EACH u[k] = v8_at_most(V_TAIL_END, _mm256_andnot_ps(v8_sign(), x[k])); /* NaN passes */
    v8_normal_tail(u, ratio, e, count);
    V8_EACH u[k] = _mm256_fnmadd_ps(u[k], v8_set(0.398942280f), ratio[k]);
    V8_EACH u[k] = _mm256_mul_ps(u[k], e[k]);
    /* by the sign, which is that of a zero or a NaN too: both sides are the same there */
    V8_EACH x[k] = _mm256_blendv_ps(_mm256_sub_ps(v8_set(1.0f), u[k]), u[k], x[k]);
}

#endif
