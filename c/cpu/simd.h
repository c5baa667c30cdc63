/* simd.h: mathematics and conversions that gcc vectorises.
 *
 * Every function here is branch-free, static inline and free of library calls, so that a plain loop over an array
 * becomes SSE2, AVX2 or AVX-512 code according to the flags of the translation unit. That is why there are no
 * intrinsics (except for the half-precision conversions that F16C does in one instruction), and why libm is not
 * called: its functions are scalar, and its vector variants need -ffast-math, which would break -inf and NaN.
 *
 * exp and the sigmoid carry softmax and silu and are computed in float (1 to 1.5 ulp). The other float functions are
 * computed in double inside, to a relative 1e-10, and rounded once: no ulp analysis, and still 4 to 8 lanes. Functions
 * of double arguments go to libm: f64 exists for gradient checks, where accuracy is everything. Polynomials are our own
 * Chebyshev fits; the range and the largest error stand next to each. Rejected: tables (gathers are slow before
 * AVX-512), _Float16 (library calls without AVX512-FP16).
 */
#ifndef LAC_CPU_SIMD_H
#define LAC_CPU_SIMD_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define LAC_INLINE static inline __attribute__((always_inline, unused))

LAC_INLINE float v_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
LAC_INLINE uint32_t v_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}
LAC_INLINE double v_double(uint64_t bits)
{
    double d;
    memcpy(&d, &bits, 8);
    return d;
}
LAC_INLINE uint64_t v_bits64(double d)
{
    uint64_t bits;
    memcpy(&bits, &d, 8);
    return bits;
}

/* ---- float exp ---- */

/* e^x. Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits: no conversion that traps on
 * NaN. The factor 2^n is applied in two halves, so that results down to the subnormals come out right. */
LAC_INLINE float v_expf(float x)
{
    const float magic = 12582912.0f;
    float c = x > 89.0f ? 89.0f : x;
    c = c < -104.5f ? -104.5f : c; /* a NaN fails both comparisons and stays */
    float t = c * 1.44269504f + magic, n = t - magic;
    int32_t k = (int32_t)(v_bits(t) - v_bits(magic));
    float r = c - n * 0.693359375f; /* 9 bits: the product is exact */
    r = r + n * 2.12194440e-4f;
    float p = 1.3926213835e-3f; /* (e^r - 1 - r) / r^2 on |r| <= ln2/2, 6.6e-8 */
    p = p * r + 8.3632029716e-3f;
    p = p * r + 4.1666554432e-2f;
    p = p * r + 1.6666576846e-1f;
    p = p * r + 5.0000000000e-1f;
    p = 1.0f + (r + r * r * p);
    uint32_t half = (uint32_t)(k >> 1), rest = (uint32_t)k - half;
    return p * v_float((half + 127u) << 23) * v_float((rest + 127u) << 23);
}

/* ---- cores in double, relative 1e-10, for float results ---- */

/* y = k ln2 + r; returns expm1(r) and puts 2^k into *scale; |y| <= 700, NaN passes */
LAC_INLINE double v_exp_core(double y, double *scale)
{
    const double magic = 6755399441055744.0;
    double c = y > 700.0 ? 700.0 : y;
    c = c < -700.0 ? -700.0 : c;
    double t = c * 1.4426950408889634 + magic, n = t - magic;
    double r = c - n * 0.69314718036912381649;
    r = r - n * 1.9082149292705878e-10;
    double p = 2.8305730782355689e-6; /* expm1(r) / r on |r| <= ln2/2, 4e-13 */
    p = p * r + 2.4876238719940972e-5;
    p = p * r + 1.98393675462963113e-4;
    p = p * r + 1.38888215429860978e-3;
    p = p * r + 8.33333501398070814e-3;
    p = p * r + 4.16666668916311572e-2;
    p = p * r + 1.66666666611034581e-1;
    p = p * r + 4.99999999997971243e-1;
    p = p * r + 1.0000000000005;
    *scale = v_double((v_bits64(t) << 52) + 0x3ff0000000000000ull);
    return p * r;
}

LAC_INLINE double v_exp_d(double y)
{
    double scale, p = v_exp_core(y, &scale);
    return scale + scale * p;
}

LAC_INLINE double v_expm1_d(double y)
{
    double scale, p = v_exp_core(y, &scale);
    return scale * p + (scale - 1.0);
}

/* log of any double that came from a float or from 1 + float (normal numbers, 0, inf, NaN, negatives) */
LAC_INLINE double v_log_d(double x)
{
    uint64_t bits = v_bits64(x);
    /* the mantissa in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2), the exponent of the rest is k */
    uint64_t shifted = bits - 0x3fe6a09e667f3bcdull;
    /* shift right arithmetically by 52 without a 64-bit arithmetic shift, which SSE2 and AVX2 do not have */
    uint64_t biased = (shifted + 0x4000000000000000ull) >> 52;
    double m = v_double(bits - ((biased - 1024u) << 52));
    double k = v_double(0x4330000000000000ull | biased) - 4503599627371520.0; /* 2^52 + 1024 */
    double s = (m - 1.0) / (m + 1.0), z = s * s;
    double p = 0.0730851877439582507; /* (atanh(s)/s - 1) / s^2 in s^2 <= 0.0295, 2e-16: random.c needs that */
    p = p * z + 0.0766583701508393093;
    p = p * z + 0.0909144527834780176;
    p = p * z + 0.111111055575720808;
    p = p * z + 0.142857143130479458;
    p = p * z + 0.199999999999496195;
    p = p * z + 0.333333333333333485;
    double y = 2.0 * (s + s * z * p) + k * 0.69314718055994530942;
    y = x == (double)INFINITY ? x : y;
    y = x == 0.0 ? -(double)INFINITY : y;
    return x >= 0.0 ? y : (double)NAN;
}

/* log(1 + x); the rounding of 1 + x is put back by the quotient. Good for |x| down to the smallest double. */
LAC_INLINE double v_log1p_d(double x)
{
    double u = 1.0 + x, c = (x - (u - 1.0)) / u;
    c = u > 0.0 ? c : 0.0;
    c = u < (double)INFINITY ? c : 0.0;
    return v_log_d(u) + c;
}

/* erfc(u) for u >= 0 through erfcx(u) (1 + 2u), a smooth function of t = (u - 3)/(u + 3); 2e-10 relative */
LAC_INLINE double v_erfc_d(double u)
{
    u = u > 60.0 ? 60.0 : u; /* zero in double long before; keeps inf / inf away */
    double t = (u - 3.0) / (u + 3.0);
    double p = -1.14816414689610092e-5;
    p = p * t + 3.85882687050133364e-6;
    p = p * t + 1.14629957011118173e-4;
    p = p * t + -1.04121541024427316e-4;
    p = p * t + -7.73109938915648993e-4;
    p = p * t + 1.88810239579351941e-3;
    p = p * t + 2.5271155205983213e-3;
    p = p * t + -2.37703291485447119e-2;
    p = p * t + 6.8308399692814994e-2;
    p = p * t + -1.19273692646682383e-1;
    p = p * t + 1.29645135648455676e-1;
    p = p * t + -4.75622925783465018e-2;
    p = p * t + -1.35621105889765261e-1;
    p = p * t + 1.25300805825171887;
    return v_exp_d(-u * u) * p / (1.0 + 2.0 * u);
}

/* ---- float functions ---- */

LAC_INLINE float v_expm1f(float x) { return (float)v_expm1_d((double)x); }
LAC_INLINE float v_logf(float x) { return (float)v_log_d((double)x); }
LAC_INLINE float v_log1pf(float x) { return (float)v_log1p_d((double)x); }

LAC_INLINE float v_tanhf(float x)
{
    double a = fabs((double)x);
    a = a > 20.0 ? 20.0 : a;
    double e = v_expm1_d(2.0 * a), y = e / (e + 2.0);
    return (float)(x < 0.0f ? -y : y);
}

/* erf(u) = -expm1(-u q(u)): q = -log(erfc(u))/u is smooth, so there is one branch and no cancellation near 0 */
LAC_INLINE float v_erff(float x)
{
    double u = fabs((double)x);
    u = u > 4.0 ? 4.0 : u;
    double t = 0.5 * u - 1.0;
    double q = 5.94714392731375832e-8; /* on 0 <= u <= 4, 4e-12 */
    q = q * t + 7.67456335952611167e-7;
    q = q * t + -3.24445461623821807e-6;
    q = q * t + 3.83863093972353251e-6;
    q = q * t + 7.72743762106204422e-7;
    q = q * t + -1.12657033164074996e-5;
    q = q * t + 3.75559457453111594e-5;
    q = q * t + -9.66002620355222111e-5;
    q = q * t + 1.86561623049824674e-4;
    q = q * t + -2.38761717465516647e-4;
    q = q * t + -1.15452741465719339e-5;
    q = q * t + 1.33677243044764381e-3;
    q = q * t + -5.66659064532112421e-3;
    q = q * t + 1.7384979176290109e-2;
    q = q * t + -4.59510376338513492e-2;
    q = q * t + 1.11811510245376785e-1;
    q = q * t + 1.73569017368745589;
    q = q * t + 2.68247063230656176;
    double y = -v_expm1_d(-u * q);
    return (float)(x < 0.0f ? -y : y);
}

/* in float, for speed: about 1.5 ulp, 0 below -89 */
LAC_INLINE float v_sigmoidf(float x) { return 1.0f / (1.0f + v_expf(-x)); }
LAC_INLINE float v_softplusf(float x)
{
    double d = (double)x, e = v_exp_d(-fabs(d));
    return (float)((d > 0.0 ? d : 0.0) + v_log1p_d(e)); /* a NaN comes through e */
}

/* the normal distribution function, without cancellation in the lower tail */
LAC_INLINE double v_normal_cdf(double x)
{
    double half = 0.5 * v_erfc_d(fabs(x) * 0.70710678118654752440);
    return x < 0.0 ? half : 1.0 - half;
}

/* sin and cos of a double angle, |a| <= 2^19 (k below 2^19, so that k * 33 bits is exact); 1e-15 absolute */
LAC_INLINE void v_sincos_d(double a, double *sine, double *cosine)
{
    const double magic = 6755399441055744.0;
    double t = a * 0.63661977236758134308 + magic, n = t - magic;
    uint64_t quadrant = v_bits64(t);
    double r = a - n * 1.5707963267341256142;
    r = r - n * 6.0771005063039659766e-11;
    r = r - n * 2.0222662487959507e-21;
    double z = r * r;
    double s = 1.59179889443187152e-10; /* (sin(r)/r - 1)/r^2 on |r| <= pi/4, 2e-17 */
    s = s * z + -2.50511298959628065e-8;
    s = s * z + 2.75573160931960644e-6;
    s = s * z + -1.98412698367405276e-4;
    s = s * z + 8.33333333333093655e-3;
    s = s * z + -1.66666666666666646e-1;
    s = r + r * z * s;
    double c = -1.13825446234042903e-11; /* (cos(r) - 1 + r^2/2)/r^4, 1e-18 */
    c = c * z + 2.08761450491082804e-9;
    c = c * z + -2.75573172658766157e-7;
    c = c * z + 2.48015872987543983e-5;
    c = c * z + -1.38888888888873898e-3;
    c = c * z + 4.16666666666666654e-2;
    c = 1.0 - 0.5 * z + z * z * c;
    double s1 = quadrant & 1 ? c : s, c1 = quadrant & 1 ? s : c;
    *sine = quadrant & 2 ? -s1 : s1;
    *cosine = (quadrant + 1) & 2 ? -c1 : c1;
}

/* ---- half precision, one element: round to nearest, ties to even; NaN stays NaN, overflow is inf ---- */

LAC_INLINE float v_from_bf16(uint16_t h) { return v_float((uint32_t)h << 16); }
LAC_INLINE uint16_t v_to_bf16(float f)
{
    uint32_t b = v_bits(f), rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16, quiet = (b >> 16) | 0x40u;
    return (uint16_t)((b & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

/* The exponent is moved by a multiplication with 2^112, which also makes subnormals normal; NaNs become quiet ones, as
 * the processor's own conversion does. */
LAC_INLINE float v_from_f16(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13, sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t finite = v_bits(v_float(magnitude) * 0x1p112f), special = magnitude | 0x7f800000u;
    special |= magnitude > 0x0f800000u ? 0x400000u : 0u;
    return v_float(sign | (magnitude >= 0x0f800000u ? special : finite));
}
LAC_INLINE uint16_t v_to_f16(float f)
{
    uint32_t b = v_bits(f), a = b & 0x7fffffffu, sign = (b >> 16) & 0x8000u;
    uint32_t normal = (a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13; /* exponent - 112, rounded */
    /* below 2^-14: adding 0.5 lets the float adder round at 2^-24, the unit of f16's subnormals */
    uint32_t tiny = v_bits(v_float(a) + 0.5f) - 0x3f000000u;
    uint32_t h = a < 0x38800000u ? tiny : normal;
    h = a >= 0x477ff000u ? 0x7c00u : h; /* 65520 and above round to infinity */
    h = a > 0x7f800000u ? 0x7e00u | ((a >> 13) & 0x3ffu) : h;
    return (uint16_t)(sign | h);
}

/* double to float with rounding to odd: a later rounding to half precision is then as if done once */
LAC_INLINE float v_round_odd(double d)
{
    float f = (float)d;
    uint32_t b = v_bits(f), up = fabs(d) > fabs((double)f);
    uint32_t odd = up ? b + 1u : b - 1u;
    uint32_t inexact = (double)f != d && d == d && !(b & 1u);
    return v_float(inexact ? odd : b);
}

/* ---- half precision, contiguous blocks ---- */

LAC_INLINE void v_load_f16(const uint16_t *restrict x, float *restrict y, int64_t n)
{
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
#endif
    for (; i < n; i++) y[i] = v_from_f16(x[i]);
}
LAC_INLINE void v_store_f16(const float *restrict x, uint16_t *restrict y, int64_t n)
{
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i *)(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
#endif
    for (; i < n; i++) y[i] = v_to_f16(x[i]);
}
LAC_INLINE void v_load_bf16(const uint16_t *restrict x, float *restrict y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = v_from_bf16(x[i]);
}
LAC_INLINE void v_store_bf16(const float *restrict x, uint16_t *restrict y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = v_to_bf16(x[i]);
}

#endif
