/* maps.h: the mathematics behind c/maps.def on the CPU.
 *
 * maps.def writes an expression once for all compute types; the macros F_name(x) below pick the function by the type of
 * x: f_name or v_namef for float, libm or d_name for double, i_name for int64_t. What models call on whole activations
 * is vector code in float (simd.h); rarer functions of floats are computed in double and rounded once; so are sin,
 * cos and tan of arguments up to F_NEAR. Beyond, and for sinc, it is libm, one element at a time, because a reduction
 * of any argument by pi is not worth its code here; so it is for remainders of a quotient too long for one step
 * (f_long_quotient, d_long_quotient). Integers wrap, and neither divide by zero nor trap.
 * Rejected: one function per expression and type by hand (150 names for what the generic macros say in 60 lines).
 */
#ifndef LAC_CPU_MAPS_H
#define LAC_CPU_MAPS_H
#include "cpu.h"
#include "simd.h"
#define SPECIAL LAC_INLINE
#define SPECIAL_LOG(x) v_log_d(x)
#define SPECIAL_EXP(x) v_exp_d(x)
#include "../special.h"

#define K(c) ((T)(c))
#define GENERIC2(x, f, d) _Generic((x), float : f, double : d)
#define GENERIC3(x, f, d, i) _Generic((x), float : f, double : d, int64_t : i)

LAC_INLINE int64_t i_neg(int64_t x) { return (int64_t)(0 - (uint64_t)x); }
LAC_INLINE int64_t i_add(int64_t x, int64_t y) { return (int64_t)((uint64_t)x + (uint64_t)y); }
LAC_INLINE int64_t i_sub(int64_t x, int64_t y) { return (int64_t)((uint64_t)x - (uint64_t)y); }
LAC_INLINE int64_t i_mul(int64_t x, int64_t y) { return (int64_t)((uint64_t)x * (uint64_t)y); }
LAC_INLINE int64_t i_abs(int64_t x) { return x < 0 ? i_neg(x) : x; }
LAC_INLINE int64_t i_sign(int64_t x) { return (x > 0) - (x < 0); }
LAC_INLINE int64_t i_same(int64_t x) { return x; }
LAC_INLINE int64_t i_max(int64_t x, int64_t y) { return x > y ? x : y; }
LAC_INLINE int64_t i_min(int64_t x, int64_t y) { return x < y ? x : y; }
LAC_INLINE int64_t i_div(int64_t x, int64_t y)
{
    if (y == 0) return 0;
    if (y == -1) return i_neg(x); /* the smallest integer / -1 traps on x86 */
    int64_t q = x / y;
    return q - ((x % y != 0) && ((x < 0) != (y < 0)));
}
LAC_INLINE int64_t i_mod(int64_t x, int64_t y)
{
    if (y == 0 || y == -1) return 0;
    int64_t r = x % y;
    return r != 0 && ((r < 0) != (y < 0)) ? r + y : r;
}
LAC_INLINE int64_t i_fmod(int64_t x, int64_t y) { return y == 0 || y == -1 ? 0 : x % y; }
LAC_INLINE int64_t i_shift_left(int64_t x, int64_t n) { return n < 0 || n > 63 ? 0 : (int64_t)((uint64_t)x << n); }
LAC_INLINE int64_t i_shift_right(int64_t x, int64_t n) { return x >> (n < 0 || n > 63 ? 63 : n); }
LAC_INLINE int64_t i_pow(int64_t x, int64_t y)
{
    if (y < 0) return x == 1 ? 1 : x == -1 ? (y & 1 ? -1 : 1) : 0;
    uint64_t r = 1, b = (uint64_t)x;
    for (; y; y >>= 1, b *= b)
        if (y & 1) r *= b;
    return (int64_t)r;
}

#define FLOATS(S, A, SFX, SIGMOID, POW, LOG)                                                                           \
    LAC_INLINE S A##_neg(S x) { return -x; }                                                                           \
    LAC_INLINE S A##_add(S x, S y) { return x + y; }                                                                   \
    LAC_INLINE S A##_sub(S x, S y) { return x - y; }                                                                   \
    LAC_INLINE S A##_mul(S x, S y) { return x * y; }                                                                   \
    LAC_INLINE S A##_div(S x, S y) { return x / y; }                                                                   \
    LAC_INLINE S A##_sign(S x) { return x > 0 ? (S)1 : x < 0 ? (S)-1 : x; }                                            \
    LAC_INLINE S A##_max(S x, S y) { return x > y || x != x ? x : y; }                                                 \
    LAC_INLINE S A##_min(S x, S y) { return x < y || x != x ? x : y; }                                                 \
    /* from r = fmod(x, y) */                                                                                          \
    LAC_INLINE S A##_mod_of(S r, S y) { return r != 0 && ((r < 0) != (y < 0)) ? r + y : r; }                           \
    LAC_INLINE S A##_mod(S x, S y) { return A##_mod_of(fmod##SFX(x, y), y); }                                          \
    LAC_INLINE S A##_pow_dx(S x, S y) { return y == 0 ? (S)0 : y * POW(x, y - 1); }                                    \
    LAC_INLINE S A##_pow_dy(S x, S y) { return x == 0 && y >= 0 ? (S)0 : POW(x, y) * LOG(x); }                         \
    LAC_INLINE S A##_lerp(S x, S y, S w) { return w < (S)0.5 ? x + w * (y - x) : y - (y - x) * (1 - w); }              \
    /* part / whole, 0 where both are 0 */                                                                             \
    LAC_INLINE S A##_share(S part, S whole) { return whole == 0 && part == 0 ? (S)0 : part / whole; }                  \
    LAC_INLINE S A##_silu(S x) { return x * SIGMOID(x); }                                                              \
    /* from x and its sigmoid s */                                                                                     \
    LAC_INLINE S A##_silu_slope(S x, S s) { return s * (1 + x * (1 - s)); }                                            \
    LAC_INLINE S A##_silu_grad(S x) { return A##_silu_slope(x, SIGMOID(x)); }                                          \
    LAC_INLINE S A##_relu(S x) { return x > 0 ? x : 0; }

LAC_INLINE double d_sigmoid(double x) { return 1 / (1 + exp(-x)); }
LAC_INLINE double d_softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }
LAC_INLINE double d_cdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
LAC_INLINE double d_gelu(double x) { return x < -1e3 ? 0 : x * d_cdf(x); } /* 0 at -inf, which x cdf(x) is not */
LAC_INLINE double d_gelu_grad(double x)
{
    return d_cdf(x) + fmin(fmax(x, -1e3), 1e3) * (0.39894228040143267794 * exp(-0.5 * x * x));
}
/* x^y in double, 4e-13 relative; the cases are those of C's pow */
LAC_INLINE float f_pow(float x, float y)
{
    double a = fabs((double)x), r = v_exp_d((double)y * v_log_d(a));
    float whole = floorf(y), half = floorf(0.5f * y), p = (float)(a == 1.0 || y == 0.0f ? 1.0 : r);
    bool integer = whole == y, odd = integer && 0.5f * y != half;
    p = odd ? copysignf(p, x) : p;
    return x < 0.0f && x != -INFINITY && !integer && y == y ? NAN : y != y && x == -1.0f ? NAN : p;
}
FLOATS(float, f, f, v_sigmoidf, f_pow, v_logf)
FLOATS(double, d, , d_sigmoid, pow, log)

/* silu's slope s + x s (1 - s) from q = sigmoid(-|x|), which is s or 1 - s, without cancellation */
LAC_INLINE float f_silu_slope_of(float x, float q) { return (x > 0 ? 1 - q : q) + x * q * (1 - q); }

/* gelu by tanh (Hendrycks and Gimpel 2016): 1 + tanh(u) = 2 sigmoid(2u), without cancellation */
#define GELU_TANH_ARGUMENT(x) (1.59576912160573071175 * ((x) + 0.044715 * (x) * (x) * (x)))
#define GELU_TANH_SLOPE(x) (1.59576912160573071175 * (1 + 3 * 0.044715 * (x) * (x)))
LAC_INLINE double d_gelu_tanh(double x) { return x * d_sigmoid(GELU_TANH_ARGUMENT(x)); }
LAC_INLINE double d_gelu_tanh_grad(double x)
{
    double s = d_sigmoid(GELU_TANH_ARGUMENT(x)), t = d_sigmoid(-GELU_TANH_ARGUMENT(x)); /* 1 - s would cancel */
    return s + x * s * t * GELU_TANH_SLOPE(x);
}
#define F_GELU_TANH_ARGUMENT(x) ((x) * (1.595769122f + 0.0713548163f * ((x) * (x))))
LAC_INLINE float f_gelu_tanh(float x) { return x * v_sigmoidf(F_GELU_TANH_ARGUMENT(x)); }
/* from q = sigmoid(-|argument|), as for silu's; 0 is multiplied by x, not by x^2, which may be infinite */
LAC_INLINE float f_gelu_tanh_slope_of(float x, float q)
{
    float p = x * (q * (1 - q));
    return (x > 0 ? 1 - q : q) + (1.595769122f * p + 0.214064449f * (p * x * x));
}
LAC_INLINE float f_gelu_tanh_grad(float x)
{
    return f_gelu_tanh_slope_of(x, v_sigmoidf(-fabsf(F_GELU_TANH_ARGUMENT(x))));
}

/* The remainder in one step, exactly. Of floats, where the quotient is below 2^29: in double it is not rounded up to a
 * whole number unless it is one, and its whole part times y is exact. Of doubles below 2^53: the quotient may be
 * rounded up to the next whole number, and then the remainder has the wrong sign. */
LAC_INLINE bool f_long_quotient(float x, float y)
{
    double q = fabs((double)x / (double)y);
    return q >= 0x1p29 && q <= 0x1p300; /* infinite ones end in NaN either way */
}
LAC_INLINE float f_fmod_near(float x, float y)
{
    double a = (double)x, b = (double)y, q = trunc(a / b), r = a - q * b;
    return copysignf((float)(q == 0 ? a : r), x); /* 0 times infinity is NaN */
}
LAC_INLINE float f_mod_near(float x, float y) { return f_mod_of(f_fmod_near(x, y), y); }
LAC_INLINE bool d_long_quotient(double x, double y) { return fabs(x / y) >= 0x1p53; }
LAC_INLINE double d_fmod_near(double x, double y)
{
    double q = trunc(x / y), r = fma(-q, y, x);
    r = r != 0 && (r < 0) != (x < 0) ? r + copysign(y, x) : r;
    return copysign(q == 0 ? x : r, x);
}
LAC_INLINE double d_mod_near(double x, double y) { return d_mod_of(d_fmod_near(x, y), y); }
LAC_INLINE double d_floor_divide_near(double x, double y) { return special_floor_divide_d(x, y, d_fmod_near(x, y)); }
LAC_INLINE double d_floor_divide(double x, double y) { return special_floor_divide_d(x, y, fmod(x, y)); }

/* rarer functions: f32 in double inside, rounded once */
#define F_NEAR 524288.0f
LAC_INLINE float f_sin_near(float x)
{
    double s, c;
    v_sincos_d((double)x, &s, &c);
    return x == 0 ? x : (float)s; /* the zero's sign */
}
LAC_INLINE float f_cos_near(float x)
{
    double s, c;
    v_sincos_d((double)x, &s, &c);
    return (float)c;
}
LAC_INLINE float f_sin(float x) { return fabsf(x) > F_NEAR ? sinf(x) : f_sin_near(x); }
LAC_INLINE float f_cos(float x) { return fabsf(x) > F_NEAR ? cosf(x) : f_cos_near(x); }
LAC_INLINE float f_tan_near(float x)
{
    double s, c;
    v_sincos_d((double)x, &s, &c);
    return x == 0 ? x : (float)(s / c);
}
LAC_INLINE float f_tan(float x) { return fabsf(x) > F_NEAR ? tanf(x) : f_tan_near(x); }
LAC_INLINE float f_erfc(float x)
{
    double e = v_erfc_d(fabs((double)x));
    return (float)(x < 0 ? 2 - e : e);
}
LAC_INLINE float f_log10(float x) { return (float)(v_log_d((double)x) * 0.43429448190325182765); }
LAC_INLINE float f_atan(float x) { return (float)v_atan_d((double)x); }
/* the angle of the point (x, y) */
LAC_INLINE float f_atan2(float y, float x)
{
    double a = fabs((double)y), b = fabs((double)x), low = a < b ? a : b, high = a < b ? b : a;
    double s = low == high ? (double)(high != 0) : low / high; /* both may be 0, or infinite */
    double p = v_atan_d(s);
    p = a > b ? 1.57079632679489662 - p : p;
    p = copysignf(1.0f, x) < 0 ? 3.14159265358979324 - p : p;
    return copysignf(x != x || y != y ? NAN : (float)p, y);
}
/* the same of doubles, 2.6 ulp: the angle in the first octant, less an eighth of a turn above tan(pi / 8), and what it
 * is added to in eighths, which three bits hold exactly */
LAC_INLINE double d_atan2(double y, double x)
{
    double a = fabs(y), b = fabs(x), low = a < b ? a : b, high = a < b ? b : a;
    double s = low == high ? (double)(high != 0) : low / high;
    double upper = s > 0.41421356237309504880 ? 1.0 : 0.0, t = upper != 0 ? (s - 1) / (s + 1) : s, z = t * t;
    double p = 0.016285183029865667; /* (atan(t) / t - 1) / t^2 on |t| <= tan(pi / 8), 1e-18 */
    p = p * z - 0.034570044186095536;
    p = p * z + 0.04551573086664191;
    p = p * z - 0.052304498567092406;
    p = p * z + 0.05878928398517232;
    p = p * z - 0.06666424833613552;
    p = p * z + 0.07692296372129964;
    p = p * z - 0.09090908753400499;
    p = p * z + 0.11111111105153429;
    p = p * z - 0.14285714285659806;
    p = p * z + 0.19999999999999804;
    p = p * z - 0.3333333333333333;
    p = t + t * z * p;
    bool steep = a > b, left = copysign(1.0, x) < 0;
    double eighths = steep ? 2 - upper : upper;
    eighths = left ? 4 - eighths : eighths;
    p = steep != left ? -p : p;
    double angle = eighths * 0.7853981633974483 + (eighths * 3.061616997868383e-17 + p);
    return copysign(x != x || y != y ? (double)NAN : angle, y);
}
/* tan of |x| <= 2^19 in double, 2.6 ulp: the remainder by pi / 2 in two parts, from a pi / 2 of 152 bits */
LAC_INLINE double d_tan_near(double x)
{
    const double magic = 6755399441055744.0;
    double k = x * 0.63661977236758134308 + magic, n = k - magic;
    uint64_t odd = v_bits64(k) & 1;
    double r0 = x - n * 1.5707963267341256, r1 = r0 - n * 6.077100506303966e-11;
    double lo = (r0 - r1) - n * 6.077100506303966e-11, r2 = r1 - n * 2.0222662487111665e-21;
    lo = lo + ((r1 - r2) - n * 2.0222662487111665e-21) - n * 8.4784276603689e-32;
    double r = r2 + lo, z = r * r;
    lo = (r2 - r) + lo;
    double s = 1.59179889443187152e-10; /* the polynomials of v_sincos_d */
    s = s * z + -2.50511298959628065e-8;
    s = s * z + 2.75573160931960644e-6;
    s = s * z + -1.98412698367405276e-4;
    s = s * z + 8.33333333333093655e-3;
    s = s * z + -1.66666666666666646e-1;
    s = r + (r * z * s + lo);
    double c = -1.13825446234042903e-11;
    c = c * z + 2.08761450491082804e-9;
    c = c * z + -2.75573172658766157e-7;
    c = c * z + 2.48015872987543983e-5;
    c = c * z + -1.38888888888873898e-3;
    c = c * z + 4.16666666666666654e-2;
    c = 1.0 - (0.5 * z - (z * z * c - r * lo));
    return x == 0 ? x : odd ? -c / s : s / c;
}
LAC_INLINE float f_asin(float x)
{
    double d = (double)x;
    return (float)v_atan_d(d / sqrt((1 - d) * (1 + d)));
}
LAC_INLINE float f_acos(float x)
{
    double d = (double)x;
    return (float)(2 * v_atan_d(sqrt((1 - d) / (1 + d))));
}
LAC_INLINE float f_sinh(float x)
{
    double e = v_expm1_d(fabs((double)x)), y = 0.5 * (e + e / (e + 1));
    return (float)(x < 0 ? -y : y);
}
LAC_INLINE float f_cosh(float x)
{
    double e = v_exp_d(fabs((double)x));
    return (float)(0.5 * (e + 1 / e));
}
LAC_INLINE float f_asinh(float x)
{
    double a = fabs((double)x), root = sqrt(a * a + 1);
    double y = v_log1p_d(a > 1 ? a + (root - 1) : a + a * a / (1 + root));
    return (float)(x < 0 ? -y : y);
}
LAC_INLINE float f_acosh(float x)
{
    double t = (double)x - 1;
    return (float)v_log1p_d(t + sqrt(t * (t + 2)));
}
LAC_INLINE float f_atanh(float x)
{
    double d = (double)x;
    return (float)(0.5 * v_log1p_d(2 * d / (1 - d)));
}
LAC_INLINE double d_sinc(double x)
{
    return x == 0 ? 1 : sin(3.14159265358979323846 * x) / (3.14159265358979323846 * x);
}
LAC_INLINE double d_sinc_grad(double x)
{
    double a = 3.14159265358979323846 * x, b = a * a;
    if (fabs(x) > 0.3) return (cos(a) - d_sinc(x)) / x;
    /* sum of (-1)^k 2k a^(2k) / (2k + 1)! over x, where the quotient above cancels */
    double s = -1.0 / 6758061133824000;
    s = s * b + 1.0 / 22230464256000;
    s = s * b - 1.0 / 93405312000;
    s = s * b + 1.0 / 518918400;
    s = s * b - 1.0 / 3991680;
    s = s * b + 1.0 / 45360;
    s = s * b - 1.0 / 840;
    s = s * b + 1.0 / 30;
    s = s * b - 1.0 / 3;
    return 3.14159265358979323846 * a * s;
}
LAC_INLINE float f_sinc(float x) { return (float)d_sinc((double)x); }
LAC_INLINE float f_sinc_grad(float x) { return (float)d_sinc_grad((double)x); }
LAC_INLINE float f_hypot(float x, float y)
{
    double a = (double)x, b = (double)y;
    return fabsf(x) == INFINITY || fabsf(y) == INFINITY ? INFINITY : (float)sqrt(a * a + b * b);
}

LAC_INLINE float f_erfinv_near(float x) { return (float)special_erfinv_near_f(x); }
LAC_INLINE float f_erfinv(float x) { return (float)special_erfinv_f(x); }
LAC_INLINE float f_erfinv_grad_near(float x) { return (float)special_erfinv_slope(special_erfinv_near_f(x)); }
LAC_INLINE float f_erfinv_grad(float x) { return (float)special_erfinv_slope(special_erfinv_f(x)); }
LAC_INLINE double d_erfinv_grad_of(double y) { return 0.88622692545275801365 * exp(y * y); }
LAC_INLINE double d_erfinv_grad(double x) { return d_erfinv_grad_of(special_erfinv_d(x)); }
LAC_INLINE float f_lgamma_near(float x) { return (float)special_lgamma_positive((double)x); }
LAC_INLINE float f_lgamma_low(float x) { return (float)special_lgamma_low((double)x); }
LAC_INLINE float f_lgamma(float x) { return (float)special_lgamma((double)x); }
LAC_INLINE float f_digamma_near(float x) { return (float)special_digamma_positive((double)x); }
LAC_INLINE float f_digamma_low(float x) { return (float)special_digamma_low((double)x); }
LAC_INLINE float f_digamma(float x) { return (float)special_digamma((double)x); }
LAC_INLINE float f_trigamma_near(float x) { return (float)special_trigamma_positive((double)x); }
LAC_INLINE float f_trigamma_low(float x) { return (float)special_trigamma_low((double)x); }
LAC_INLINE float f_trigamma(float x) { return (float)special_trigamma((double)x); }

/* mish (Misra 2019): x tanh(softplus(x)). In float tanh(log(1 + w)) = n / (n + 2) with w = e^x, n = w (w + 2), which is
 * 1 from x = 20 on; in double that form is off by three units in the last place. */
LAC_INLINE float f_mish(float x)
{
    float w = v_exp_flushf(x > 20 ? 20 : x), n = w * (w + 2);
    return x * (n / (n + 2));
}
LAC_INLINE float f_mish_grad(float x)
{
    float c = x > 20 ? 20 : x, w = v_exp_flushf(c), n = w * (w + 2), r = 1 / (n + 2); /* 1 from 20 on */
    return n * r + c * (4 * w * (1 + w) * r * r);
}
LAC_INLINE double d_mish(double x) { return x * tanh(d_softplus(x)); }
LAC_INLINE double d_mish_grad(double x)
{
    double c = x > 20 ? 20 : x, w = exp(c), n = w * (w + 2), r = 1 / (n + 2);
    return n * r + c * (4 * w * (1 + w) * r * r);
}

/* log(e^x + e^y); equal infinities have no difference */
LAC_INLINE float f_logaddexp(float x, float y)
{
    float d = x == y ? 0.0f : -fabsf(x - y);
    return f_max(x, y) + v_log1p_unit(v_exp_downf(d));
}
LAC_INLINE double d_logaddexp(double x, double y) { return d_max(x, y) + log1p(exp(x == y ? 0 : -fabs(x - y))); }

#define F_neg(x) GENERIC3(x, f_neg, d_neg, i_neg)(x)
#define F_abs(x) GENERIC3(x, fabsf, fabs, i_abs)(x)
#define F_sign(x) GENERIC3(x, f_sign, d_sign, i_sign)(x)
#define F_floor(x) GENERIC3(x, floorf, floor, i_same)(x)
#define F_ceil(x) GENERIC3(x, ceilf, ceil, i_same)(x)
#define F_round(x) GENERIC3(x, rintf, rint, i_same)(x)
#define F_add(x, y) GENERIC3(x, f_add, d_add, i_add)(x, y)
#define F_sub(x, y) GENERIC3(x, f_sub, d_sub, i_sub)(x, y)
#define F_mul(x, y) GENERIC3(x, f_mul, d_mul, i_mul)(x, y)
#define F_div(x, y) GENERIC3(x, f_div, d_div, i_div)(x, y)
#define F_mod(x, y) GENERIC3(x, f_mod, d_mod, i_mod)(x, y)
#define F_pow(x, y) GENERIC3(x, f_pow, pow, i_pow)(x, y)
#define F_max(x, y) GENERIC3(x, f_max, d_max, i_max)(x, y)
#define F_min(x, y) GENERIC3(x, f_min, d_min, i_min)(x, y)
#define F_isnan(x) ((x) != (x))
#define F_isfinite(x) ((x) - (x) == 0)
#define F_exp(x) GENERIC2(x, v_expf, exp)(x)
#define F_expm1(x) GENERIC2(x, v_expm1f, expm1)(x)
#define F_log(x) GENERIC2(x, v_logf, log)(x)
#define F_log1p(x) GENERIC2(x, v_log1pf, log1p)(x)
#define F_sqrt(x) GENERIC2(x, sqrtf, sqrt)(x)
#define F_sin(x) GENERIC2(x, f_sin, sin)(x)
#define F_cos(x) GENERIC2(x, f_cos, cos)(x)
#define F_tanh(x) GENERIC2(x, v_tanhf, tanh)(x)
#define F_erf(x) GENERIC2(x, v_erff, erf)(x)
#define F_sigmoid(x) GENERIC2(x, v_sigmoidf, d_sigmoid)(x)
#define F_softplus(x) GENERIC2(x, v_softplusf, d_softplus)(x)
#define F_silu(x) GENERIC2(x, f_silu, d_silu)(x)
#define F_silu_grad(x) GENERIC2(x, f_silu_grad, d_silu_grad)(x)
#define F_gelu(x) GENERIC2(x, v_geluf, d_gelu)(x)
#define F_gelu_grad(x) GENERIC2(x, v_gelu_gradf, d_gelu_grad)(x)
#define F_gelu_tanh(x) GENERIC2(x, f_gelu_tanh, d_gelu_tanh)(x)
#define F_gelu_tanh_grad(x) GENERIC2(x, f_gelu_tanh_grad, d_gelu_tanh_grad)(x)
#define F_pow_dx(x, y) GENERIC2(x, f_pow_dx, d_pow_dx)(x, y)
#define F_pow_dy(x, y) GENERIC2(x, f_pow_dy, d_pow_dy)(x, y)
#define F_trunc(x) GENERIC3(x, truncf, trunc, i_same)(x)
#define F_fmod(x, y) GENERIC3(x, fmodf, fmod, i_fmod)(x, y)
#define F_floor_divide(x, y) GENERIC3(x, special_floor_divide_f, d_floor_divide, i_div)(x, y)
#define F_shift_left(x, y) i_shift_left(x, y)
#define F_shift_right(x, y) i_shift_right(x, y)
#define F_erfc(x) GENERIC2(x, f_erfc, erfc)(x)
#define F_exp2(x) GENERIC2(x, v_exp2f, exp2)(x)
#define F_log2(x) GENERIC2(x, v_log2f, log2)(x)
#define F_log10(x) GENERIC2(x, f_log10, log10)(x)
#define F_tan(x) GENERIC2(x, f_tan, tan)(x)
#define F_asin(x) GENERIC2(x, f_asin, asin)(x)
#define F_acos(x) GENERIC2(x, f_acos, acos)(x)
#define F_atan(x) GENERIC2(x, f_atan, atan)(x)
#define F_sinh(x) GENERIC2(x, f_sinh, sinh)(x)
#define F_cosh(x) GENERIC2(x, f_cosh, cosh)(x)
#define F_asinh(x) GENERIC2(x, f_asinh, asinh)(x)
#define F_acosh(x) GENERIC2(x, f_acosh, acosh)(x)
#define F_atanh(x) GENERIC2(x, f_atanh, atanh)(x)
#define F_sinc(x) GENERIC2(x, f_sinc, d_sinc)(x)
#define F_sinc_grad(x) GENERIC2(x, f_sinc_grad, d_sinc_grad)(x)
#define F_mish(x) GENERIC2(x, f_mish, d_mish)(x)
#define F_mish_grad(x) GENERIC2(x, f_mish_grad, d_mish_grad)(x)
#define F_atan2(x, y) GENERIC2(x, f_atan2, d_atan2)(x, y)
#define F_hypot(x, y) GENERIC2(x, f_hypot, hypot)(x, y)
#define F_share(x, y) GENERIC2(x, f_share, d_share)(x, y)
#define F_copysign(x, y) GENERIC2(x, copysignf, copysign)(x, y)
#define F_logaddexp(x, y) GENERIC2(x, f_logaddexp, d_logaddexp)(x, y)
#define F_erfinv(x) GENERIC2(x, f_erfinv, special_erfinv_d)(x)
#define F_erfinv_grad(x) GENERIC2(x, f_erfinv_grad, d_erfinv_grad)(x)
#define F_lgamma(x) GENERIC2(x, f_lgamma, special_lgamma)(x)
#define F_digamma(x) GENERIC2(x, f_digamma, special_digamma)(x)
#define F_trigamma(x) GENERIC2(x, f_trigamma, special_trigamma)(x)
#define F_lerp(x, y, z) GENERIC2(x, f_lerp, d_lerp)(x, y, z)

#endif
