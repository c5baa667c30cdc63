/* short.cuh: functions of half types on CUDA: a few units in the last place of f32, thousands of times below theirs, at
 * a third of the instructions. Results below 2^-126 are 0.
 */
#ifndef LAC_CUDA_SHORT_CUH
#define LAC_CUDA_SHORT_CUH
#include <cuda_runtime.h>

static __device__ __forceinline__ float short_exp(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}
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
/* The normal distribution function to 2e-5 of itself in both tails, which is below half a unit of f16 and bf16: erfc(z)
 * = t q(t) exp(-z^2), t = 1 / (1 + 0.4 z), the form of Abramowitz and Stegun 7.1.26, q fitted to the relative error.
 * *bell: exp(-x^2 / 2). erfcf costs twice what the bytes of a half type do. */
static __device__ __forceinline__ float short_cdf(float x, float *bell)
{
    float z = fabsf(x) * 0.70710678f, t = short_recip(1.0f + 0.4f * z);
    float q = -0.14843988f;
    q = q * t + 0.53783761f;
    q = q * t - 0.15171670f;
    q = q * t + 0.33321681f;
    q = q * t + 0.20165529f;
    q = q * t + 0.22746461f;
    *bell = short_exp(-z * z);
    float half = 0.5f * q * t * *bell;
    return x > 0 ? 1.0f - half : half;
}
static __device__ __forceinline__ float short_gelu(float x)
{
    float bell;
    return x < -1e3f ? 0 : x * short_cdf(x, &bell);
}
static __device__ __forceinline__ float short_gelu_grad(float x)
{
    float bell, cdf = short_cdf(x, &bell);
    return cdf + (fabsf(x) < 1e3f ? x : 0) * 0.39894228f * bell;
}

#endif
