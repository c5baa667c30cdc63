/* activations_avx2.h: activations of one or two cache lines of floats at a time, and logarithms, with AVX2.
 *
 * The formulas are those of simd.h, gelu's with exps.h's powers of 2, step by step over two or four vectors: one vector
 * is a chain of 20 to 30 dependent steps, of which a processor sees few at once, and gcc puts those of a plain loop one
 * after the other. Nanoseconds for a line in the cache of a Zen 3 at 3.2 GHz, and of the plain loop: sigmoid 4.8 and
 * 5.7, tanh 5.5 and 7.8, gelu 8.9 and 11.3, log 6.6 and 10.3. It multiplies, blends and looks up (vpermilps) in two of
 * its four pipes, adds and clamps in the other two; a division takes as long as three or four multiplications. gelu has
 * 26 such steps for 8 floats, so 26 cycles a line are its floor, and tanh 15: they take 28 and 18.
 * Four lines abreast in the loops around them (elem.c), as with AVX-512, cost gelu and sigmoid 0.3 to 0.8 ns a line
 * more than one, and tanh 0.6 more than two: results of the first wait on the stack. What computes more around them
 * (silu, gelu by tanh, slopes) is not faster by fewer than four: silu 0.1, gelu's slope 0.7 ns slower by one.
 * Tried, not kept: gelu by 8 polynomials of degree 6, whose coefficients vpermps picks (9.5: one starts in a cycle);
 * gelu's tail as a power of a polynomial, as halves_avx2.h has it (cancellation costs 10 to 20 ulp of floats); the tail
 * as 2^-(u^2 + g(u)) with g of degree 9 up to u = 3.75, without a division, in two passes over 8 lines (5.5 ulp; 9.4 ns
 * in the loop of elem.c, 6.8 in one without its copies, but 17 where numbers are twice the normal ones, because groups
 * with a number beyond are computed both ways); the sigmoid bounded at 16 with what is beyond out of line (the question
 * takes what the clamps and a multiplication did); polynomials split in even and odd parts (tanh 6.0, sigmoid 5.3); an
 * asm that keeps constants in registers, which gcc reads from memory up to four times (no gain: two are read in a
 * cycle).
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

/* v_logf for normal x > 0; the cases of others, which are a third of its steps, are asked for once a line */
LAC_INLINE __m256i v8_log_apart(__m256 x)
{
    const uint32_t least = 0x00800000u, most = 0x7f7fffffu, sign = 0x80000000u; /* from `least` on, unsigned */
    __m256i above = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32((int32_t)(sign - least)));
    return _mm256_cmpgt_epi32(above, _mm256_set1_epi32((int32_t)(sign + (most - least))));
}
static __attribute__((noinline, cold, unused)) __m256 v8_log_far(__m256 x, __m256 values)
{
    float line[8];
    _mm256_storeu_ps(line, x);
    _Pragma("omp simd") for (int k = 0; k < 8; k++) line[k] = v_logf(line[k]);
    return _mm256_blendv_ps(values, _mm256_loadu_ps(line), _mm256_castsi256_ps(v8_log_apart(x)));
}
LAC_INLINE void v8_log(__m256 *x, int count)
{
    __m256 f[V8_ABREAST], n[V8_ABREAST], z[V8_ABREAST], p[V8_ABREAST], q[V8_ABREAST], y[V8_ABREAST];
    __m256i i[V8_ABREAST], apart = _mm256_setzero_si256();
    V8_EACH i[k] = _mm256_sub_epi32(_mm256_castps_si256(x[k]), _mm256_set1_epi32(0x3f3504f3));
    V8_EACH i[k] = _mm256_srai_epi32(i[k], 23); /* the mantissa in [sqrt(1/2), sqrt(2)) */
    V8_EACH n[k] = _mm256_cvtepi32_ps(i[k]);
    V8_EACH i[k] = _mm256_sub_epi32(_mm256_castps_si256(x[k]), _mm256_slli_epi32(i[k], 23));
    V8_EACH f[k] = _mm256_sub_ps(_mm256_castsi256_ps(i[k]), v8_set(1.0f));
    V8_EACH z[k] = _mm256_mul_ps(f[k], f[k]);
    V8_EACH p[k] = _mm256_fmadd_ps(f[k], v8_set(-0.250008196f), v8_set(0.333333313f)); /* v_log_rest */
    V8_EACH q[k] = _mm256_fmadd_ps(f[k], v8_set(-0.166234106f), v8_set(0.200012431f));
    V8_EACH p[k] = _mm256_fmadd_ps(z[k], q[k], p[k]);
    V8_EACH q[k] = _mm256_fmadd_ps(f[k], v8_set(-0.131595507f), v8_set(0.142015398f));
    V8_EACH y[k] = _mm256_fmadd_ps(f[k], v8_set(-0.0763694048f), v8_set(0.127624854f));
    V8_EACH q[k] = _mm256_fmadd_ps(z[k], y[k], q[k]);
    V8_EACH p[k] = _mm256_fmadd_ps(_mm256_mul_ps(z[k], z[k]), q[k], p[k]);
    V8_EACH q[k] = _mm256_mul_ps(n[k], v8_set(2.12194440e-4f));
    V8_EACH p[k] = _mm256_fmsub_ps(_mm256_mul_ps(f[k], z[k]), p[k], q[k]);
    V8_EACH p[k] = _mm256_fnmadd_ps(v8_set(0.5f), z[k], p[k]);
    V8_EACH y[k] = _mm256_fmadd_ps(n[k], v8_set(0.693359375f), _mm256_add_ps(f[k], p[k]));
    V8_EACH apart = _mm256_or_si256(apart, v8_log_apart(x[k]));
    if (__builtin_expect(_mm256_movemask_epi8(apart), 0)) V8_EACH y[k] = v8_log_far(x[k], y[k]);
    V8_EACH x[k] = y[k];
}
#define V_LOG_LINES /* without AVX2, and with AVX-512, gcc's loop of v_logf is as good */
LAC_INLINE void v_log_lines(float (*line)[V_FLOATS], int lines)
{
    for (int j = 0; j < lines; j++) {
        enum { count = 2 };
        __m256 x[count] = {_mm256_loadu_ps(line[j]), _mm256_loadu_ps(line[j] + 8)};
        v8_log(x, count);
        V8_EACH _mm256_storeu_ps(line[j] + 8 * k, x[k]);
    }
}

#endif
