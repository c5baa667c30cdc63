/* attn_sums.cuh: sums that branches leave for each other where they meet in a row.
 *
 * f16 and bf16 results are rounded once, by the last branch of a row; what earlier ones add is kept more exactly. Most
 * kernels keep it in f32, in memory beside the tensors. The backward in one pass has no memory for that: its dk and dv
 * are kept in 24 bits, the upper ones of an f32, of which sixteen lie in the results' own memory and eight in dq's,
 * which is written when all tiles are done (lac_plan_sum_bytes() says where that does not fit).
 *
 * Error. 24 bits are a sign, eight of the exponent and sixteen of precision: a sum is off by at most 2^-16 of itself
 * each time that it is put down, one time less than branches meet, beside 2^-8 (bf16) and 2^-11 (f16) of the result's
 * own rounding. Rounding is to the nearest, halves away from zero; cutting would be twice as far off, always to the
 * same side. NaN and infinity stay what they are, and the range is that of f32.
 */
#ifndef LAC_CUDA_ATTN_SUMS_CUH
#define LAC_CUDA_ATTN_SUMS_CUH
#include "common.cuh"

/* x rounded to its upper 24 bits; the others are left as they come. NaN that arithmetic makes has its upper bits set.
 */
__device__ __forceinline__ uint32_t attn_cut(float x)
{
    const uint32_t bits = __float_as_uint(x);
    return fabsf(x) < INFINITY ? bits + 0x80 : bits;
}
__device__ __forceinline__ float attn_joined(uint32_t upper, uint32_t low)
{
    return __uint_as_float(upper << 16 | low << 8);
}

/* Two neighbours: `upper` holds their sixteen bits each, half `half` of `low` their eight. */
__device__ __forceinline__ float2 attn_joined_two(uint32_t upper, uint32_t low, int half)
{
    return {__uint_as_float(__byte_perm(upper, low, half ? 0x1066 : 0x1044) & 0xffffff00),
            __uint_as_float(__byte_perm(upper, low, half ? 0x3277 : 0x3255) & 0xffffff00)};
}
__device__ __forceinline__ uint32_t attn_upper_two(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }
__device__ __forceinline__ uint32_t attn_low_two(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x0051); }

/* Where attn_write() finds sums so far and leaves its own; `at` counts elements of the result. */
struct attn_f32_sums {
    float *sum;
    __device__ __forceinline__ bool aligned() const { return (uintptr_t)sum % 16 == 0; }
    __device__ __forceinline__ float one(int64_t at) const { return __ldcg(sum + at); }
    __device__ __forceinline__ float4 four(int64_t at) const { return __ldcg((const float4 *)(sum + at)); }
    __device__ __forceinline__ void put(int64_t at, float x) const { sum[at] = x; }
    __device__ __forceinline__ void put_four(int64_t at, const float (&x)[4]) const
    {
        *(float4 *)(sum + at) = {x[0], x[1], x[2], x[3]};
    }
};
struct attn_cut_sums {
    uint16_t *upper; /* the result */
    uint8_t *low;
    __device__ __forceinline__ bool aligned() const { return (uintptr_t)upper % 8 == 0 && (uintptr_t)low % 4 == 0; }
    __device__ __forceinline__ float one(int64_t at) const { return attn_joined(__ldcg(upper + at), __ldcg(low + at)); }
    __device__ __forceinline__ float4 four(int64_t at) const
    {
        const uint2 u = __ldcg((const uint2 *)(upper + at));
        const uint32_t rest = __ldcg((const uint32_t *)(low + at));
        const float2 x = attn_joined_two(u.x, rest, 0), y = attn_joined_two(u.y, rest, 1);
        return {x.x, x.y, y.x, y.y};
    }
    __device__ __forceinline__ void put(int64_t at, float x) const
    {
        const uint32_t bits = attn_cut(x);
        upper[at] = (uint16_t)(bits >> 16), low[at] = (uint8_t)(bits >> 8);
    }
    __device__ __forceinline__ void put_four(int64_t at, const float (&x)[4]) const
    {
        const uint32_t a = attn_cut(x[0]), b = attn_cut(x[1]), c = attn_cut(x[2]), d = attn_cut(x[3]);
        *(uint2 *)(upper + at) = {attn_upper_two(a, b), attn_upper_two(c, d)};
        *(uint32_t *)(low + at) = __byte_perm(attn_low_two(a, b), attn_low_two(c, d), 0x5410);
    }
};

#endif
