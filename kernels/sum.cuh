/* sum.cuh: what reduce.cu hands to sum.cu: sums of dense float tensors; and sums over rows. */
#ifndef LAC_CUDA_SUM_CUH
#define LAC_CUDA_SUM_CUH
#include "common.cuh"

/* out[i] = sum over `count` elements, `outputs` of them, dense. along_rows: output i has the dense row at i * step;
 * else the dense columns i of rows that are `step` apart. One output: a dense run. */
struct sum_job {
    const char *x;
    void *out;
    int dtype, out_dtype, out_bytes;
    bool along_rows, mean;
    int64_t outputs, count, step, share; /* step in bytes; share: rows of a part (sum.cu's) */
};
bool lac_cuda_sum_fits(const sum_job *j);
int lac_cuda_sum(const sum_job *j);
/* linear.cu: out [E] = sums of x [..., E] over rows; nothing where out has no data */
int lac_cuda_column_sums(const lac_view *x, const lac_view *out);

#endif
