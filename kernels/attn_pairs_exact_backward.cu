/* attn_pairs_exact_backward.cu: attn_exact_backward.cuh's kernels with options of single pairs. */
#include "attn_exact_backward.cuh"

int attn_pairs_keys_exact(attn_pair_args &a, const lac_plan *plan, int dtype) { EACH(attn_exact_keys_kernel, true); }
int attn_pairs_queries_exact(attn_pair_args &a, const lac_plan *plan, int dtype)
{
    EACH(attn_exact_queries_kernel, false);
}
