/* maps.cuh: the type-generic mathematics that c/maps.def is written in, for device code.
 *
 * Every F_* function of the CPU's maps.h exists here by overloading on float, double and int64_t, with the same
 * definitions where the definition is a promise (integer division, mod, pow of integers, max and min with NaN, halves
 * of ties). Transcendental functions are CUDA's, gelu in f32 our own: at most a few units in the last place from the
 * CPU's, never the __fast ones, because an exp that is off by 1e-5 would be the largest error of a softmax.
 */
#ifndef LAC_CUDA_MAPS_CUH
#define LAC_CUDA_MAPS_CUH
#include "common.cuh"
#include "short.cuh"

#define MAP_FN static __device__ __forceinline__
/* Long functions are called, not copied into every unrolled loop: their own instructions cost more than the call, and
 * the file would take minutes to compile. */
#define MAP_LONG static __device__ __noinline__
#define SPECIAL static __device__ __forceinline__
#define SPECIAL_LOG(x) log(x)
#define SPECIAL_EXP(x) exp(x)
#include "special.h"

MAP_FN float F_neg(float x) { return -x; }
MAP_FN double F_neg(double x) { return -x; }
MAP_FN int64_t F_neg(int64_t x) { return (int64_t)(0 - (uint64_t)x); }
MAP_FN float F_abs(float x) { return fabsf(x); }
MAP_FN double F_abs(double x) { return fabs(x); }
MAP_FN int64_t F_abs(int64_t x) { return x < 0 ? F_neg(x) : x; }
MAP_FN float F_sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }
MAP_FN double F_sign(double x) { return x > 0 ? 1.0 : x < 0 ? -1.0 : x; }
MAP_FN int64_t F_sign(int64_t x) { return (x > 0) - (x < 0); }
MAP_FN float F_floor(float x) { return floorf(x); }
MAP_FN double F_floor(double x) { return floor(x); }
MAP_FN int64_t F_floor(int64_t x) { return x; }
MAP_FN float F_ceil(float x) { return ceilf(x); }
MAP_FN double F_ceil(double x) { return ceil(x); }
MAP_FN int64_t F_ceil(int64_t x) { return x; }
MAP_FN float F_round(float x) { return rintf(x); }
MAP_FN double F_round(double x) { return rint(x); }
MAP_FN int64_t F_round(int64_t x) { return x; }
template <class T> MAP_FN T F_add(T x, T y) { return x + y; }
template <class T> MAP_FN T F_sub(T x, T y) { return x - y; }
template <class T> MAP_FN T F_mul(T x, T y) { return x * y; }
template <> __device__ __forceinline__ int64_t F_add(int64_t x, int64_t y)
{
    return (int64_t)((uint64_t)x + (uint64_t)y);
}
template <> __device__ __forceinline__ int64_t F_sub(int64_t x, int64_t y)
{
    return (int64_t)((uint64_t)x - (uint64_t)y);
}
template <> __device__ __forceinline__ int64_t F_mul(int64_t x, int64_t y)
{
    return (int64_t)((uint64_t)x * (uint64_t)y);
}
MAP_FN float F_div(float x, float y) { return x / y; }
MAP_LONG double F_div(double x, double y) { return x / y; }
MAP_LONG int64_t F_div(int64_t x, int64_t y)
{
    if (y == 0) return 0;
    if (y == -1) return F_neg(x);
    int64_t q = x / y;
    return q - ((x % y != 0) && ((x < 0) != (y < 0)));
}
MAP_LONG float F_mod(float x, float y)
{
    float r = fmodf(x, y);
    return r != 0 && ((r < 0) != (y < 0)) ? r + y : r;
}
MAP_LONG double F_mod(double x, double y)
{
    double r = fmod(x, y);
    return r != 0 && ((r < 0) != (y < 0)) ? r + y : r;
}
MAP_LONG int64_t F_mod(int64_t x, int64_t y)
{
    if (y == 0 || y == -1) return 0;
    int64_t r = x % y;
    return r != 0 && ((r < 0) != (y < 0)) ? r + y : r;
}
MAP_LONG float F_pow(float x, float y) { return powf(x, y); }
MAP_LONG double F_pow(double x, double y) { return pow(x, y); }
MAP_LONG int64_t F_pow(int64_t x, int64_t y)
{
    if (y < 0) return x == 1 ? 1 : x == -1 ? (y & 1 ? -1 : 1) : 0;
    uint64_t r = 1, b = (uint64_t)x;
    for (; y; y >>= 1, b *= b)
        if (y & 1) r *= b;
    return (int64_t)r;
}
template <class T> MAP_FN T F_max(T x, T y) { return x > y || x != x ? x : y; }
template <class T> MAP_FN T F_min(T x, T y) { return x < y || x != x ? x : y; }
#define F_isnan(x) ((x) != (x))
#define F_isfinite(x) ((x) - (x) == 0)

/* name of the float and of the double function; LONG ones are called */
#define MAP_FLOATS(name, f, d)                                                                                         \
    MAP_FN float F_##name(float x) { return f(x); }                                                                    \
    MAP_LONG double F_##name(double x) { return d(x); }
#define MAP_LONG_FLOATS(name, f, d)                                                                                    \
    MAP_LONG float F_##name(float x) { return f(x); }                                                                  \
    MAP_LONG double F_##name(double x) { return d(x); }
MAP_FLOATS(exp, expf, exp)
MAP_LONG_FLOATS(expm1, expm1f, expm1)
MAP_FLOATS(log, logf, log)
MAP_LONG_FLOATS(log1p, log1pf, log1p)
MAP_FLOATS(sqrt, sqrtf, sqrt)
MAP_LONG_FLOATS(sin, sinf, sin)
MAP_LONG_FLOATS(cos, cosf, cos)
MAP_FLOATS(tanh, tanhf, tanh)
MAP_LONG_FLOATS(erf, erff, erf)

template <class T> MAP_FN T F_sigmoid(T x) { return T(1) / (T(1) + F_exp(-x)); }
template <class T> MAP_FN T F_silu(T x) { return x / (T(1) + F_exp(-x)); }
template <class T> MAP_FN T F_silu_grad(T x)
{
    T s = F_sigmoid(x);
    return s * (T(1) + x * (T(1) - s));
}
MAP_LONG float F_softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))) + (x - x); }
MAP_LONG double F_softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))) + (x - x); }
/* The normal distribution function. In f64 erfc keeps the far tail that 1 + erf would cancel. */
MAP_LONG double map_cdf(double x) { return 0.5 * erfc(-0.70710678118654752440 * x); }
/* 0 at -inf, which x cdf(x) is not */
MAP_FN double F_gelu(double x) { return x < -1e3 ? 0 : x * map_cdf(x); }
MAP_FN double F_gelu_grad(double x)
{
    double near = x < -1e3 ? -1e3 : x > 1e3 ? 1e3 : x;
    return fma(near, 0.39894228040143267794 * F_exp(-0.5 * x * x), map_cdf(x));
}
/* In f32 its tail for m = |x|, in 24 instructions where erfcf takes 55, more than the bytes do: R(t) exp(-m^2 / 2), t =
 * 1 / (m + 3), R fitted to 7e-9 of itself; with roundings some five units in the last place. The exponent's own
 * rounding, which the exponential would multiply, is `rest`. *bell: the exponential. m is at most 1000, so that nothing
 * is 0 times infinity, and NaN stays. Below 2^-126 it is 0. */
MAP_FN float map_tail(float x, float *m, float *bell)
{
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(*m) : "f"(fabsf(x)), "f"(1e3f));
    float t = short_recip(*m + 3.0f), q = -545.709473f;
    q = fmaf(q, t, 1013.46136f);
    q = fmaf(q, t, -710.419067f);
    q = fmaf(q, t, 206.876846f);
    q = fmaf(q, t, -24.7468567f);
    q = fmaf(q, t, 11.5882893f);
    q = fmaf(q, t, 2.84502363f);
    q = fmaf(q, t, 1.21402001f);
    q = fmaf(q, t, 0.398454577f);
    q = fmaf(q, t, 6.01698457e-06f);
    float square = __fmul_rn(*m, *m), power = __fmul_rn(square, -0.72134752f);
    float rest = fmaf(square, -0.72134752f, -power);
    rest = fmaf(fmaf(*m, *m, -square), -0.72134752f, rest);
    rest = fmaf(square, -9.62981517e-09f, rest);
    float e = short_exp2(power);
    *bell = fmaf(__fmul_rn(e, 0.69314718f), rest, e);
    return __fmul_rn(q, *bell);
}
/* x cdf(x) = max(x, 0) - |x| tail, and its derivative cdf(x) + x bell / sqrt(2 pi): the same bits together and apart */
MAP_FN float F_gelu_both(float x, float *slope)
{
    float m, bell, tail = map_tail(x, &m, &bell), w = fmaf(__fmul_rn(-0.39894228f, m), bell, tail);
    *slope = x > 0 ? 1.0f - w : w;
    return fmaf(-m, tail, fmaxf(x, 0.0f));
}
MAP_FN float F_gelu(float x)
{
    float slope;
    return F_gelu_both(x, &slope);
}
MAP_FN float F_gelu_grad(float x)
{
    float slope;
    F_gelu_both(x, &slope);
    return slope;
}
/* gelu by tanh (Hendrycks and Gimpel 2016): 1 + tanh(u) = 2 sigmoid(2u), without cancellation */
template <class T> MAP_FN T F_gelu_tanh(T x)
{
    return x * F_sigmoid(T(1.59576912160573071175) * (x + T(0.044715) * x * x * x));
}
/* s (1 - s) from the exponential itself: 1 - s would cancel, and its error is multiplied by x^3 */
template <class T> MAP_FN T F_gelu_tanh_grad(T x)
{
    T u = T(1.59576912160573071175) * (x + T(0.044715) * x * x * x), e = F_exp(-F_abs(u)), d = T(1) / (T(1) + e);
    T p = T(1.59576912160573071175) * (x * (e * d * d)); /* 0 is multiplied by x, not by x^2, which may be infinite */
    return (u > T(0) ? d : e * d) + (p + T(3 * 0.044715) * (p * x * x));
}
MAP_LONG float F_pow_dx(float x, float y) { return y == 0 ? 0.0f : y * powf(x, y - 1); }
MAP_LONG double F_pow_dx(double x, double y) { return y == 0 ? 0.0 : y * pow(x, y - 1); }
MAP_LONG float F_pow_dy(float x, float y) { return x == 0 && y >= 0 ? 0.0f : powf(x, y) * logf(x); }
MAP_LONG double F_pow_dy(double x, double y) { return x == 0 && y >= 0 ? 0.0 : pow(x, y) * log(x); }

MAP_FN float F_trunc(float x) { return truncf(x); }
MAP_FN double F_trunc(double x) { return trunc(x); }
MAP_FN int64_t F_trunc(int64_t x) { return x; }
MAP_LONG float F_fmod(float x, float y) { return fmodf(x, y); }
MAP_LONG double F_fmod(double x, double y) { return fmod(x, y); }
MAP_LONG int64_t F_fmod(int64_t x, int64_t y) { return y == 0 || y == -1 ? 0 : x % y; }
MAP_LONG float F_floor_divide(float x, float y) { return special_floor_divide_f(x, y); }
MAP_LONG double F_floor_divide(double x, double y) { return special_floor_divide_d(x, y, fmod(x, y)); }
MAP_FN int64_t F_floor_divide(int64_t x, int64_t y) { return F_div(x, y); }
MAP_FN int64_t F_shift_left(int64_t x, int64_t n) { return n < 0 || n > 63 ? 0 : (int64_t)((uint64_t)x << n); }
MAP_FN int64_t F_shift_right(int64_t x, int64_t n) { return x >> (n < 0 || n > 63 ? 63 : n); }
MAP_LONG_FLOATS(erfc, erfcf, erfc)
MAP_LONG_FLOATS(exp2, exp2f, exp2)
MAP_LONG_FLOATS(log2, log2f, log2)
MAP_LONG_FLOATS(log10, log10f, log10)
MAP_LONG_FLOATS(tan, tanf, tan)
MAP_LONG_FLOATS(asin, asinf, asin)
MAP_LONG_FLOATS(acos, acosf, acos)
MAP_LONG_FLOATS(atan, atanf, atan)
MAP_LONG_FLOATS(sinh, sinhf, sinh)
MAP_LONG_FLOATS(cosh, coshf, cosh)
MAP_LONG_FLOATS(asinh, asinhf, asinh)
MAP_LONG_FLOATS(acosh, acoshf, acosh)
MAP_LONG_FLOATS(atanh, atanhf, atanh)
MAP_LONG double F_sinc(double x) { return x == 0 ? 1 : sin(3.14159265358979323846 * x) / (3.14159265358979323846 * x); }
MAP_LONG double F_sinc_grad(double x)
{
    double a = 3.14159265358979323846 * x, b = a * a;
    if (fabs(x) > 0.3) return (cos(a) - F_sinc(x)) / x;
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
MAP_FN float F_sinc(float x) { return (float)F_sinc((double)x); }
MAP_FN float F_sinc_grad(float x) { return (float)F_sinc_grad((double)x); }
MAP_LONG float F_hypot(float x, float y) { return hypotf(x, y); }
MAP_LONG double F_hypot(double x, double y) { return hypot(x, y); }
MAP_LONG float F_atan2(float x, float y) { return atan2f(x, y); }
MAP_LONG double F_atan2(double x, double y) { return atan2(x, y); }
MAP_FN float F_copysign(float x, float y) { return copysignf(x, y); }
MAP_FN double F_copysign(double x, double y) { return copysign(x, y); }
/* part / whole, 0 where both are 0 */
template <class T> MAP_FN T F_share(T part, T whole) { return whole == 0 && part == 0 ? T(0) : part / whole; }
/* log(e^x + e^y); equal infinities have no difference */
template <class T> MAP_LONG T F_logaddexp(T x, T y)
{
    return F_max(x, y) + F_log1p(F_exp(x == y ? T(0) : -F_abs(x - y)));
}
template <class T> MAP_FN T F_lerp(T x, T y, T w) { return w < T(0.5) ? x + w * (y - x) : y - (y - x) * (T(1) - w); }
/* mish (Misra 2019): tanh(log(1 + w)) = n / (n + 2) with w = e^x, n = w (w + 2); from x = 20 on it is 1 */
template <class T> MAP_LONG T F_mish(T x)
{
    T w = F_exp(x > 20 ? T(20) : x), n = w * (w + 2);
    return x * (n / (n + 2));
}
template <class T> MAP_LONG T F_mish_grad(T x)
{
    T c = x > 20 ? T(20) : x, w = F_exp(c), n = w * (w + 2), r = 1 / (n + 2); /* 1 from 20 on */
    return n * r + c * (4 * w * (1 + w) * r * r);
}

/* in f32 by the functions of f64, as on the CPU */
MAP_LONG double F_erfinv(double x) { return special_erfinv_d(x); }
MAP_LONG float F_erfinv(float x) { return (float)special_erfinv_f(x); }
MAP_LONG double F_erfinv_grad(double x) { return special_erfinv_slope(special_erfinv_d(x)); }
MAP_LONG float F_erfinv_grad(float x) { return (float)special_erfinv_slope(special_erfinv_f(x)); }
MAP_LONG double F_lgamma(double x) { return special_lgamma(x); }
MAP_LONG double F_digamma(double x) { return special_digamma(x); }
MAP_LONG double F_trigamma(double x) { return special_trigamma(x); }
MAP_FN float F_lgamma(float x) { return (float)F_lgamma((double)x); }
MAP_FN float F_digamma(float x) { return (float)F_digamma((double)x); }
MAP_FN float F_trigamma(float x) { return (float)F_trigamma((double)x); }

#endif
