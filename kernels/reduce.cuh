/* reduce.cuh: a reduction as its kernels get it, and what reduce.cu hands to reduce_rows.cu. */
#ifndef LAC_CUDA_REDUCE_CUH
#define LAC_CUDA_REDUCE_CUH
#include "elem.cuh"

struct reduce_job {
    int fn, dtype, out_dtype, kept, reduced;
    int64_t ks[LAC_MAX_DIMS], kx[LAC_MAX_DIMS], ko[LAC_MAX_DIMS]; /* sizes; strides of x and out in elements */
    int64_t rs[LAC_MAX_DIMS], rx[LAC_MAX_DIMS];
    int64_t outputs, count, parts, share; /* share: elements of one part */
    double correction;
    const char *x;
    void *out, *partials; /* [parts][outputs] if parts > 1 */
    int bytes;            /* of an element of x */
};

/* elements from x to output `number`, and from out */
static __device__ __forceinline__ void kept_offsets(const reduce_job &j, int64_t number, int64_t *x, int64_t *out)
{
    int64_t ox = 0, oo = 0;
#pragma unroll 1
    for (int d = j.kept - 1; d >= 0; d--) {
        int64_t q = d ? number / j.ks[d] : 0, i = number - q * j.ks[d];
        number = q;
        ox += i * j.kx[d];
        oo += i * j.ko[d];
    }
    *x = ox;
    *out = oo;
}

/* reduce_rows.cu: is this a function of dense, aligned rows that it has kernels for? */
bool lac_cuda_row_reduction_fits(const reduce_job *j);
int lac_cuda_row_reduction(const reduce_job *j);

#endif
