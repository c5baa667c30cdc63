/* attn_few.cuh: attention of a few rows to many keys, as decoding has it: can attn_few.cu do a call? and the call.
 */
#ifndef LAC_CUDA_ATTN_FEW_CUH
#define LAC_CUDA_ATTN_FEW_CUH
#include "attn.cuh"

bool attn_few_fits(const lac_a_attend *f);
int attn_few_forward(attn_args &a, const lac_a_attend *f);

#endif
