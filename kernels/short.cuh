/* short.cuh: functions of half types on CUDA: a few units in the last place of f32, thousands of times below theirs, at
 * a third of the instructions. Results below 2^-126 are 0.
 */
#ifndef LAC_CUDA_SHORT_CUH
#define LAC_CUDA_SHORT_CUH
#include <cuda_runtime.h>

static constexpr float LOG2_E = 1.44269504f;
static __device__ __forceinline__ float short_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ float short_exp(float x) { return short_exp2(x * LOG2_E); }
static __device__ __forceinline__ float short_recip(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ float short_sigmoid(float x) { return short_recip(1 + short_exp(-x)); }
static __device__ __forceinline__ float short_silu_grad(float x)
{
    float s = short_sigmoid(x);
    return s * (1 + x * (1 - s));
}
/* The normal distribution function to 2e-5 of itself in both tails, which is below half a unit of f16 and bf16: for
 * m = |x| its tail is t q(t) exp(-m^2 / 2), t = 1 / (1 + 0.4 m / sqrt(2)), the form of Abramowitz and Stegun 7.1.26, q
 * fitted to the relative error. *bell: the exponential. erfcf costs twice what the bytes of a half type do. m is at
 * most 1000, so that nothing is 0 times infinity, and NaN stays. */
static __device__ __forceinline__ float short_tail(float x, float *m, float *bell)
{
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(*m) : "f"(fabsf(x)), "f"(1e3f));
    float t = short_recip(1.0f + 0.28284271f * *m), q = -0.07421994f;
    q = q * t + 0.26891881f;
    q = q * t - 0.07585835f;
    q = q * t + 0.16660841f;
    q = q * t + 0.10082765f;
    q = q * t + 0.11373231f;
    *bell = short_exp2(*m * (*m * -0.72134752f));
    return __fmul_rn(q * t, *bell);
}
/* x cdf(x) = max(x, 0) - |x| tail; its derivative cdf(x) + x bell / sqrt(2 pi). What is one instruction is written out:
 * left to the compiler, the derivative has other bits where nobody asks for the value. */
static __device__ __forceinline__ float short_gelu_both(float x, float *slope)
{
    float m, bell, tail = short_tail(x, &m, &bell), w = fmaf(-0.39894228f * m, bell, tail);
    *slope = x > 0 ? 1.0f - w : w;
    return fmaf(-m, tail, fmaxf(x, 0.0f));
}
/* gelu by tanh, which is x s(u) with the sigmoid s, and its derivative s(u) + x u' s(u) s(-u); e = exp(-|u|), so that
 * neither cancels */
static __device__ __forceinline__ float short_gelu_tanh_both(float x, float *slope)
{
    const float square = x * x, u = x * fmaf(0.07135481627f, square, 1.5957691216f);
    const float e = short_exp(-fabsf(u)), d = short_recip(1.0f + e), s = u > 0 ? d : e * d;
    const float p = x * (e * d * d); /* 0 is multiplied by x, not by x^2, which may be infinite */
    *slope = fmaf(p, 1.5957691216f, s) + 0.21406444881f * (p * x * x);
    return x * s;
}
static __device__ __forceinline__ float short_gelu(float x)
{
    float slope;
    return short_gelu_both(x, &slope);
}
static __device__ __forceinline__ float short_gelu_grad(float x)
{
    float slope;
    short_gelu_both(x, &slope);
    return slope;
}

#endif
