/* attn_parts_backward.cu: which shapes of attn_parts_backward.cuh's kernels run. */
#include "attn_parts_backward.cuh"

int attn_keys_parts(attn_pair_args &a, const lac_plan *plan)
{
    return a.head_dim <= 64 ? launch<64, 64, 1, 32>(attn_parts_keys_kernel<64, 1, 4, 1, 32, 2>, a, plan, true, 128)
                            : launch<128, 64, 2, 32>(attn_parts_keys_kernel<128, 1, 8, 2, 32, 1>, a, plan, true, 256);
}
int attn_queries_parts(attn_pair_args &a, const lac_plan *plan)
{
    return a.head_dim <= 64
               ? launch<64, 64, 1, 32>(attn_parts_queries_kernel<64, 1, 4, 1, 32, 2>, a, plan, false, 128)
               : launch<128, 64, 2, 32>(attn_parts_queries_kernel<128, 1, 8, 2, 32, 1>, a, plan, false, 256);
}
