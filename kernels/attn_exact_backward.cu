/* attn_exact_backward.cu: which shapes of attn_exact_backward.cuh's kernels run. */
#include "attn_exact_backward.cuh"

int attn_keys_exact(attn_pair_args &a, const lac_plan *plan, int dtype) { EACH(attn_exact_keys_kernel, true); }
int attn_queries_exact(attn_pair_args &a, const lac_plan *plan, int dtype) { EACH(attn_exact_queries_kernel, false); }
