/* simd.h: mathematics and conversions that gcc vectorises.
 *
 * Every function here is branch-free, static inline and free of library calls, so that a plain loop over an array
 * becomes SSE2, AVX2 or AVX-512 code according to the flags of the translation unit. That is why there are no
 * intrinsics (except for half-precision conversions and stores past the caches, which gcc cannot express), and why libm
 * is not called: its functions are scalar, and its vector variants need -ffast-math, which would break -inf and NaN.
 *
 * The functions that models call on whole activations (exp, exp2, expm1, log, log2, log1p, tanh, sigmoid, softplus,
 * erf, the normal distribution) are computed in float, below 2 ulp; tests/elem_spec.lua measures each over all of its
 * range. Long polynomials are split in even and odd parts (Estrin): a loop body then is not one chain of dependent
 * multiplications that the processor's window cannot overlap. Rarer float functions are computed in double inside, to a
 * relative 1e-10, and rounded once: no ulp analysis, and still 4 to 8 lanes. Functions of double arguments go to libm:
 * f64 exists for gradient checks, where accuracy is everything. Polynomials are our own fits, nearly minimax; the range
 * and the largest error stand next to each. Rejected: tables (gathers are slow; exps.h and activations.h have some that
 * fit registers), _Float16 (library calls without AVX512-FP16).
 */
#ifndef LAC_CPU_SIMD_H
#define LAC_CPU_SIMD_H
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
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

/* ---- vectors, for loops whose sums gcc would not keep in enough registers ---- */

#if defined(__AVX512F__)
enum { V_WIDTH = 64 };
#elif defined(__AVX__)
enum { V_WIDTH = 32 };
#else
enum { V_WIDTH = 16 };
#endif
typedef float v_floats __attribute__((vector_size(V_WIDTH), aligned(4), may_alias));
typedef double v_doubles __attribute__((vector_size(V_WIDTH), aligned(8), may_alias));

/* the sum of all lanes, by halves; unrolled, or it goes through memory */
LAC_INLINE float v_sum_f(v_floats v)
{
    float t[V_WIDTH / sizeof(float)];
    memcpy(t, &v, sizeof t);
#pragma GCC unroll 4
    for (int w = V_WIDTH / (int)sizeof(float) / 2; w > 0; w /= 2)
#pragma GCC unroll 8
        for (int k = 0; k < w; k++) t[k] += t[k + w];
    return t[0];
}
LAC_INLINE double v_sum_d(v_doubles v)
{
    double t[V_WIDTH / sizeof(double)];
    memcpy(t, &v, sizeof t);
#pragma GCC unroll 4
    for (int w = V_WIDTH / (int)sizeof(double) / 2; w > 0; w /= 2)
#pragma GCC unroll 8
        for (int k = 0; k < w; k++) t[k] += t[k + w];
    return t[0];
}

/* ---- float exp ---- */

/* c - n ln2. With fused multiplications one constant does where an error of 2e-9 n does not count (LOOSE). */
LAC_INLINE float v_minus_ln2(float c, float n)
{
    float r = c - n * 0.693359375f; /* 9 bits: the product is exact */
    return r + n * 2.12194440e-4f;
}
LAC_INLINE float v_minus_ln2_loose(float c, float n)
{
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(-n, 0.693147182f, c); /* said, because -O1 does not fuse by itself */
#else
    return v_minus_ln2(c, n);
#endif
}

/* e^r for |r| <= ln2/2, 8e-9 before rounding */
LAC_INLINE float v_exp_poly(float r)
{
    float p = 1.3926213835e-3f;
    p = p * r + 8.3632029716e-3f;
    p = p * r + 4.1666554432e-2f;
    p = p * r + 1.6666576846e-1f;
    p = p * r + 5.0000000000e-1f;
    p = p * r + 1.0f;
    return p * r + 1.0f;
}

/* c log2(e) + magic, at most `top`: a comparison of integers, which takes one step less and lets a NaN pass through
 * what is computed from c itself */
LAC_INLINE float v_exponent(float c, float magic, float top)
{
    int32_t t = (int32_t)v_bits(c * 1.44269504f + magic), most = (int32_t)v_bits(magic + top);
    return v_float((uint32_t)(t < most ? t : most));
}

/* e^x. Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits: no conversion that traps on
 * NaN. The factor 2^n is applied in two halves, so that results down to the subnormals come out right; 254 more in the
 * low bits is the bias of both, and what stands above them falls off the end of the shifts. */
LAC_INLINE float v_expf(float x)
{
    const float magic = 12582912.0f + 254.0f;
    float c = x < -104.5f ? -104.5f : x, t = v_exponent(c, magic, 128.0f);
    float p = v_exp_poly(v_minus_ln2(c, t - magic));
    uint32_t half = v_bits(t) >> 1, rest = v_bits(t) - half;
    return p * v_float(half << 23) * v_float(rest << 23);
}

/* 2^x, with the exponent as in v_expf; r = x - n is exact */
LAC_INLINE float v_exp2f(float x)
{
    const float magic = 12582912.0f + 254.0f;
    float c = x < -150.5f ? -150.5f : x;
    int32_t sum = (int32_t)v_bits(c + magic), most = (int32_t)v_bits(magic + 128.0f);
    float t = v_float((uint32_t)(sum < most ? sum : most)), r = c - (t - magic);
    float p = 1.5594678169e-4f; /* 2^r on |r| <= 1/2, 3e-9 */
    p = p * r + 1.3406643902e-3f;
    p = p * r + 9.6176929730e-3f;
    p = p * r + 5.5503105510e-2f;
    p = p * r + 2.4022652783e-1f;
    p = p * r + 6.9314721497e-1f;
    p = p * r + 1.0f;
    uint32_t half = v_bits(t) >> 1, rest = v_bits(t) - half;
    return p * v_float(half << 23) * v_float(rest << 23);
}

/* v_expf in fewer steps: 0 below -87.68 and infinity above 88.37, where e^x leaves the normal floats. `bounded`: x is
 * known to be at most 88; `loose`: for terms of a sum whose largest is 1 (relative error 3e-9 |x| more). */
LAC_INLINE float v_exp_normal(float x, bool bounded, bool loose)
{
    const float magic = 12582912.0f + 127.0f; /* with the bias of an exponent, as above */
    float c = x < -88.0f ? -88.0f : x, t = bounded ? c * 1.44269504f + magic : v_exponent(c, magic, 128.0f);
    float r = loose ? v_minus_ln2_loose(c, t - magic) : v_minus_ln2(c, t - magic);
    return v_exp_poly(r) * v_float(v_bits(t) << 23);
}
LAC_INLINE float v_exp_flushf(float x) { return v_exp_normal(x, false, false); }
LAC_INLINE float v_exp_downf(float x) { return v_exp_normal(x, true, false); } /* x <= 0 */
LAC_INLINE float v_exp_termf(float x) { return v_exp_normal(x, true, true); }

/* the smaller of two floats >= 0, compared as integers: a NaN is the larger one. (gcc makes several blends of a
 * comparison of floats, because it follows the constant through the arithmetic.) */
LAC_INLINE float v_at_most(float x, float most)
{
    int32_t a = (int32_t)v_bits(x), b = (int32_t)v_bits(most);
    return v_float((uint32_t)(a < b ? a : b));
}
/* all bits where x is NaN: to put it back by `or` */
LAC_INLINE uint32_t v_nan_bits(float x) { return x != x ? 0xffffffffu : 0u; }

/* e^r - 1 for y = k ln2 + r, and k as an exponent to shift; |y| <= 89, NaN passes */
LAC_INLINE float v_expm1_reduce(float y, uint32_t *k)
{
    const float magic = 12582912.0f;
    float t = y * 1.44269504f + magic, n = t - magic;
    *k = v_bits(t); /* the bits of `magic` fall off the end of every shift by 23 */
    float r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float z = r * r; /* (e^r - 1 - r) / r^2, 4e-10 of e^r - 1 */
    float p = (0.5f + 0.166666657f * r) +
              z * ((0.0416664928f + 0.00833354332f * r) + z * (0.00139323424f + 0.000197642454f * r));
    return r + z * p;
}

LAC_INLINE float v_expm1f(float x)
{
    uint32_t k;
    float c = x > 89.0f ? 89.0f : x;
    c = c < -40.0f ? -40.0f : c;
    float p = v_expm1_reduce(c, &k), s = v_float((k << 23) + 0x3f000000u); /* half of 2^k: 2^128 is no float */
    return 2.0f * (s * p + (s - 0.5f));
}

/* tanh = e / (e + 2) with e = expm1(2 |x|): one path for all x, relative accuracy at 0 */
LAC_INLINE float v_tanhf(float x)
{
    uint32_t k, sign = v_bits(x) & 0x80000000u;
    float a = v_at_most(v_float(v_bits(x) ^ sign), 10.0f);
    float p = v_expm1_reduce(2.0f * a, &k), s = v_float((k << 23) + 0x3f800000u);
    float e = s * p + (s - 1.0f), y = e / (e + 2.0f);
    return v_float(v_bits(y) | sign | v_nan_bits(x));
}

/* 2.5 ulp, 0 below -88.37 */
LAC_INLINE float v_sigmoidf(float x) { return 1.0f / (1.0f + v_exp_flushf(-x)); }

/* ---- float log ---- */

/* log(1 + f) - f + f^2/2 for 1 + f in [sqrt(1/2), sqrt(2)]; z = f^2 */
LAC_INLINE float v_log_rest(float f, float z)
{
    float z2 = z * z; /* over f^3, 6e-9 of log(1 + f) */
    float p = ((0.333333313f - 0.250008196f * f) + (0.200012431f - 0.166234106f * f) * z) +
              ((0.142015398f - 0.131595507f * f) + (0.127624854f - 0.0763694048f * f) * z) * z2;
    return f * z * p;
}

/* log(1 + f) + k ln2 */
LAC_INLINE float v_log_poly(float f, float k)
{
    float z = f * f, t = v_log_rest(f, z) - k * 2.12194440e-4f;
    t = t - 0.5f * z;
    return (f + t) + k * 0.693359375f;
}

/* x = (1 + f) 2^k for x > 0 */
LAC_INLINE float v_log_split(float x, float *k)
{
    float big = x < 0x1p-126f ? x * 0x1p23f : x, extra = x < 0x1p-126f ? -23.0f : 0.0f;
    int32_t n = (int32_t)(v_bits(big) - 0x3f3504f3u) >> 23; /* the mantissa in [sqrt(1/2), sqrt(2)) */
    *k = (float)n + extra;
    return v_float(v_bits(big) - ((uint32_t)n << 23)) - 1.0f;
}

/* y = log of x > 0 in some base, with what is special about the others */
LAC_INLINE float v_log_cases(float x, float y)
{
    y = x == INFINITY ? x : y;
    y = x == 0.0f ? -INFINITY : y;
    return x >= 0.0f ? y : NAN;
}

LAC_INLINE float v_logf(float x)
{
    float k, f = v_log_split(x, &k);
    return v_log_cases(x, v_log_poly(f, k));
}

/* log(1 + f) is a sum u + e of two floats here, and so is log2(e): their product is rounded once */
LAC_INLINE float v_log2f(float x)
{
    float k, f = v_log_split(x, &k), z = f * f, t = v_log_rest(f, z) - 0.5f * z, u = f + t, e = (f - u) + t;
    return v_log_cases(x, (u * 1.44269502f + (e * 1.44269502f + u * 1.92596299e-8f)) + k);
}

/* what 1 + x rounds away is added to the mantissa: near 0 the polynomial then sees x itself */
LAC_INLINE float v_log1pf(float x)
{
    float u = 1.0f + x, lost = x - (u - 1.0f);
    int32_t k = (int32_t)(v_bits(u) - 0x3f3504f3u) >> 23, scale = k > 126 ? 126 : k;
    float m = v_float(v_bits(u) - ((uint32_t)k << 23));
    float y = v_log_poly((m - 1.0f) + lost * v_float((uint32_t)(127 - scale) << 23), (float)k);
    y = x == INFINITY ? x : y;
    y = x == -1.0f ? -INFINITY : y;
    return x >= -1.0f ? y : NAN;
}

/* log(1 + e) for 0 <= e <= 1; NaN passes */
LAC_INLINE float v_log1p_unit(float e)
{
    float z = e * e, z2 = z * z; /* log(1 + e) / e, 5e-9 */
    float p = (-0.499999315f + 0.333304763f * e) + (-0.249582469f + 0.196937457f * e) * z;
    float q = (-0.153508499f + 0.10673169f * e) + (-0.057594087f + 0.0201682653f * e) * z - 0.003310628f * z2;
    return e + z * (p + q * z2);
}

/* log(1 + e^x) */
LAC_INLINE float v_softplusf(float x)
{
    float below = v_float(v_bits(x) | 0x80000000u); /* -|x|; a NaN comes through e */
    return (x > 0.0f ? x : 0.0f) + v_log1p_unit(v_exp_downf(below));
}

/* ---- float erf and the normal distribution ---- */

/* erf(u) = -expm1(-u q(u)): q = -log(erfc(u))/u is smooth, so there is one branch and no cancellation near 0.
 * Rejected, here and for tanh: u P(u^2) / Q(u^2), half the steps, but off by 5.8 ulp (tanh 4.7) where it nears 1. */
LAC_INLINE float v_erff(float x)
{
    uint32_t k, sign = v_bits(x) & 0x80000000u;
    float u = v_at_most(v_float(v_bits(x) ^ sign), 4.0f);
    float z = u * u, z2 = z * z; /* q on 0 <= u <= 4, 4e-9 of erf; the first coefficient is in two parts */
    float q = (0.636619508f + 0.102776863f * u) + (-0.0191498641f - 0.000165820034f * u) * z;
    q = q + ((0.00167208444f - 0.000635445409f * u) + (0.00011833592f - 9.33046886e-06f * u) * z) * z2;
    float y = 1.12837923f * u + u * (q * u - 5.8635383e-8f);
    float p = v_expm1_reduce(-y, &k), s = v_float((k << 23) + 0x3f800000u);
    return v_float(v_bits((1.0f - s) - s * p) | sign | v_nan_bits(x));
}

/* The upper tail of the normal distribution Q(u) = erfc(u / sqrt(2)) / 2, u >= 0, as a product of its density
 * *e = e^(-u^2/2) (0 from u = 13.25 on, below the normal floats) and the returned ratio, a quotient of polynomials
 * whose coefficients are all positive, so that nothing cancels. -u^2/2 is not rounded before its whole part is taken
 * off: that would cost 8 ulp at u = 5. Rejected: a polynomial in (u - 2) / (u + 3), which needs the division too and
 * 8 steps more; 1 / y by Newton's steps, which take more of AVX-512's two ports than a division does. */
#define V_TAIL_END 13.27f /* e^(-u^2/2) rounds to 2^-127 there, whose bits are those of 0 */
LAC_INLINE float v_normal_tailf(float u, float *e)
{
    const float magic = 12582912.0f + 127.0f; /* with the bias of an exponent, as above */
    float c = v_at_most(u, V_TAIL_END), half = -0.5f * c;
#ifdef __FP_FAST_FMAF
    float t = half * c * 1.44269504f + magic, n = t - magic;
    float r = __builtin_fmaf(half, c, n * -0.693359375f) + n * 2.12194440e-4f;
#else
    float head = v_float(v_bits(c) & 0xfffff000u), low = (c - head) * (half + -0.5f * head), h = -0.5f * head * head;
    float t = h * 1.44269504f + magic, n = t - magic; /* head has 12 bits: its square is exact */
    float r = ((h - n * 0.693359375f) + n * 2.12194440e-4f) + low;
#endif
    *e = v_exp_poly(r) * v_float(v_bits(t) << 23);
    float p = 0.508964f * c + 5.0620623f, q = 1.2757654f * c + 12.689643f; /* Q / e = p / q, 9e-9 */
    p = p * c + 22.953695f;
    p = p * c + 55.158436f;
    p = p * c + 63.300518f;
    q = q * c + 58.79122f;
    q = q * c + 151.22324f;
    q = q * c + 211.32993f;
    q = q * c + 126.601036f;
    return p / q;
}

/* gelu(x) = x cdf(x) = relu(x) - |x| Q(|x|): 6.5 ulp over all floats with AVX2, also in the lower tail down to 2^-126
 * (0 below) */
LAC_INLINE float v_geluf(float x)
{
    float e, u = fabsf(x), ratio = v_normal_tailf(u, &e);
    /* the bound keeps inf * 0 away; NaN comes through relu */
    return (x < 0.0f ? 0.0f : x) - v_at_most(u, V_TAIL_END) * ratio * e;
}
/* its slope, cdf(x) + x density(x) */
LAC_INLINE float v_gelu_gradf(float x)
{
    float e, u = fabsf(x), ratio = v_normal_tailf(u, &e);
    float d = (ratio - v_at_most(u, V_TAIL_END) * 0.398942280f) * e;
    return v_float(v_bits(x > 0.0f ? 1.0f - d : d) | v_nan_bits(x));
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

/* atan of any double */
LAC_INLINE double v_atan_d(double x)
{
    double a = fabs(x), s = a > 1.0 ? 1.0 / a : a, z = s * s;
    double p = 4.4139129610410815e-4; /* atan(s) / s on |s| <= 1, 8e-12 */
    p = p * z - 3.3288471460828153e-3;
    p = p * z + 1.1779152225719514e-2;
    p = p * z - 2.6538231338160245e-2;
    p = p * z + 4.415786993611414e-2;
    p = p * z - 6.0546545521461095e-2;
    p = p * z + 7.5090171694592603e-2;
    p = p * z - 9.0530191423927567e-2;
    p = p * z + 1.1105987013775598e-1;
    p = p * z - 1.4285296802951922e-1;
    p = p * z + 1.9999982191926624e-1;
    p = p * z - 3.3333333033620349e-1;
    p = p * z + 9.9999999999163069e-1;
    p = p * s;
    p = a > 1.0 ? 1.57079632679489662 - p : p;
    return x < 0.0 ? -p : p;
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
/* gcc narrows 32-bit lanes in many small steps, so these are written out */
#if defined(__AVX512F__)
LAC_INLINE __m256i v_round_bf16(__m512 f)
{
    const __m512i high_words = _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019,
                                                 0x1f001d, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512i b = _mm512_castps_si512(f), r = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
    __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000)), nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    r = _mm512_mask_add_epi32(r, odd, b, _mm512_set1_epi32(0x8000));
    if (__builtin_expect(nan, 0)) r = _mm512_mask_or_epi32(r, nan, b, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(high_words, r));
}
/* 16 words into the upper halves of 16 floats, in one step */
LAC_INLINE __m512 v_widen_bf16(__m256i h)
{
    const __m512i words = _mm512_setr_epi32(0, 1 << 16, 2 << 16, 3 << 16, 4 << 16, 5 << 16, 6 << 16, 7 << 16, 8 << 16,
                                            9 << 16, 10 << 16, 11 << 16, 12 << 16, 13 << 16, 14 << 16, 15 << 16);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, words, _mm512_castsi256_si512(h)));
}
#endif
LAC_INLINE void v_store_bf16(const float *restrict x, uint16_t *restrict y, int64_t n)
{
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i *)(y + i), v_round_bf16(_mm512_loadu_ps(x + i)));
#elif defined(__AVX2__)
    const __m256i bias = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1), quiet = _mm256_set1_epi32(0x40);
    for (; i + 16 <= n; i += 16) {
        __m256i r[2];
        for (int k = 0; k < 2; k++) {
            __m256 f = _mm256_loadu_ps(x + i + 8 * k);
            __m256i b = _mm256_castps_si256(f), high = _mm256_srli_epi32(b, 16);
            r[k] = _mm256_add_epi32(_mm256_add_epi32(b, bias), _mm256_and_si256(high, one));
            r[k] = _mm256_blendv_epi8(_mm256_srli_epi32(r[k], 16), _mm256_or_si256(high, quiet),
                                      _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
        }
        _mm256_storeu_si256((__m256i *)(y + i), _mm256_permute4x64_epi64(_mm256_packus_epi32(r[0], r[1]), 0xd8));
    }
#endif
    for (; i < n; i++) y[i] = v_to_bf16(x[i]);
}

/* ---- writing past the caches ---- */

/* Copies a block to memory that will not be read soon. After the last one of a thread: v_stream_end(), which orders
 * them before whatever tells other threads. */
LAC_INLINE void v_stream(void *out, const void *x, size_t bytes)
{
    size_t i = 0;
    char *to = out;
    const char *from = x;
#if defined(__AVX512F__)
    if (((uintptr_t)to & 63) == 0)
        for (; i + 64 <= bytes; i += 64)
            _mm512_stream_si512((__m512i *)(to + i), _mm512_loadu_si512((const __m512i *)(from + i)));
#elif defined(__AVX__)
    if (((uintptr_t)to & 31) == 0)
        for (; i + 32 <= bytes; i += 32)
            _mm256_stream_si256((__m256i *)(to + i), _mm256_loadu_si256((const __m256i *)(from + i)));
#elif defined(__SSE2__)
    if (((uintptr_t)to & 15) == 0)
        for (; i + 16 <= bytes; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
#endif
    memcpy(to + i, from + i, bytes - i);
}
LAC_INLINE void v_prefetch(const char *x, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(x + i);
}
/* Should an array that is only read be asked for ahead? Intel's hardware starts anew at every page, so one stream alone
 * gets two thirds of the memory's speed; that of Zen 4 goes on, and loses a fifth to a third where it is asked. */
LAC_INLINE bool v_asks(void)
{
#ifdef __x86_64__
    return __builtin_cpu_is("intel");
#else
    return true;
#endif
}
/* asks for what comes two pages after x */
LAC_INLINE void v_ask(const void *x)
{
    if (v_asks()) __builtin_prefetch((const char *)x + 8192, 0, 2);
}
/* One cache line of results to `out`, past the caches or not. `r` is a local array that a loop of fixed length has just
 * filled, so it never leaves the registers. */
enum { V_LINE = 64 };
LAC_INLINE void v_put_line(void *out, const void *r, bool stream)
{
#if defined(__AVX512F__)
    __m512i line = _mm512_loadu_si512(r);
    if (stream) _mm512_stream_si512(out, line);
    else _mm512_storeu_si512(out, line);
#elif defined(__AVX__)
    __m256i low = _mm256_loadu_si256(r), high = _mm256_loadu_si256((const __m256i *)r + 1);
    if (stream) _mm256_stream_si256(out, low), _mm256_stream_si256((__m256i *)out + 1, high);
    else _mm256_storeu_si256(out, low), _mm256_storeu_si256((__m256i *)out + 1, high);
#else
    (void)stream;
    memcpy(out, r, V_LINE);
#endif
}
/* The same for what is read, and for 16 values on their way from or to f16 (half = 1) or bf16 (2), so that they are
 * converted in registers between loading and storing. */
/* a cache line into registers: memcpy would go by 16 bytes, which a wider load has to wait for */
LAC_INLINE void v_take_line(const void *x, void *line)
{
#pragma GCC unroll 4
    for (int k = 0; k < V_LINE / V_WIDTH; k++) *((v_floats *)line + k) = *((const v_floats *)x + k);
}
#ifdef __AVX2__
enum { V_HALVES = 1 };
/* 16 values of f32, f16 or bf16 (half = 0, 1, 2). Which one is decided before the only store to `line`: a store in each
 * branch would send every line through memory. */
LAC_INLINE void v_take(int half, const void *x, float *line)
{
#if defined(__AVX512F__)
    __m512 f;
    if (half == 0) f = _mm512_loadu_ps(x);
    else if (half == 1) f = _mm512_cvtph_ps(_mm256_loadu_si256(x));
    else f = v_widen_bf16(_mm256_loadu_si256(x));
    _mm512_storeu_ps(line, f);
#else
    const __m128i *h = x;
    __m256 low, high;
    if (half == 0) {
        low = _mm256_loadu_ps(x);
        high = _mm256_loadu_ps((const float *)x + 8);
    } else if (half == 1) {
        low = _mm256_cvtph_ps(_mm_loadu_si128(h));
        high = _mm256_cvtph_ps(_mm_loadu_si128(h + 1));
    } else {
        low = (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(h)), 16);
        high = (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(h + 1)), 16);
    }
    _mm256_storeu_ps(line, low);
    _mm256_storeu_ps(line + 8, high);
#endif
}
LAC_INLINE void v_put_half(int half, void *out, const float *line, bool stream)
{
    __m256i h;
#if defined(__AVX512F__)
    __m512 f = _mm512_loadu_ps(line);
    h = half == 2 ? v_round_bf16(f) : _mm512_cvtps_ph(f, 0);
#else
    uint16_t r[16];
    if (half == 2) {
        v_store_bf16(line, r, 16);
        h = _mm256_loadu_si256((const __m256i *)r);
    } else {
        __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(line), 0), high = _mm256_cvtps_ph(_mm256_loadu_ps(line + 8), 0);
        h = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
#endif
    if (stream) _mm256_stream_si256(out, h);
    else _mm256_storeu_si256(out, h);
}
#else
enum { V_HALVES = 0 }; /* conversions are long there: by tiles, in one place */
LAC_INLINE void v_take(int half, const void *x, float *line)
{
    (void)half;
    v_take_line(x, line);
}
LAC_INLINE void v_put_half(int half, void *out, const float *line, bool stream)
{
    (void)half, (void)out, (void)line, (void)stream;
}
#endif
LAC_INLINE void v_stream_end(void)
{
#ifdef __SSE2__
    _mm_sfence();
#endif
}

#endif
