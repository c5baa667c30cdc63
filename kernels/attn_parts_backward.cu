/* attn_parts_backward.cu: which shapes of attn_parts_backward.cuh's kernels run. */
#include "attn_parts_backward.cuh"

/* tiles of 16 WARPS / SPLIT rows, steps of BN rows of the other side */
template <int DP, int WARPS, int SPLIT, int BN, int MINIMUM> static int keys(attn_pair_args &a, const lac_plan *plan)
{
    return launch<DP, 16 * WARPS / SPLIT, SPLIT, BN>(attn_parts_keys_kernel<DP, 1, WARPS, SPLIT, BN, MINIMUM>, a, plan,
                                                     true, WARPS * 32);
}
template <int DP, int WARPS, int SPLIT, int BN, int MINIMUM> static int queries(attn_pair_args &a, const lac_plan *plan)
{
    return launch<DP, 16 * WARPS / SPLIT, SPLIT, BN>(attn_parts_queries_kernel<DP, 1, WARPS, SPLIT, BN, MINIMUM>, a,
                                                     plan, false, WARPS * 32);
}

int attn_keys_parts(attn_pair_args &a, const lac_plan *plan)
{
    const int rows = attn_block_rows(a);
    if (a.head_dim <= 64)
        return rows <= 16   ? keys<64, 1, 1, 16, 8>(a, plan)
               : rows <= 32 ? keys<64, 2, 1, 32, 4>(a, plan)
                            : keys<64, 4, 1, 32, 2>(a, plan);
    return rows <= 16   ? keys<128, 1, 1, 16, 4>(a, plan)
           : rows <= 32 ? keys<128, 4, 2, 32, 2>(a, plan)
                        : keys<128, 8, 2, 32, 1>(a, plan);
}
int attn_queries_parts(attn_pair_args &a, const lac_plan *plan)
{
    const int rows = attn_block_rows(a);
    if (a.head_dim <= 64)
        return rows <= 16   ? queries<64, 1, 1, 16, 8>(a, plan)
               : rows <= 32 ? queries<64, 2, 1, 32, 4>(a, plan)
                            : queries<64, 4, 1, 32, 2>(a, plan);
    return rows <= 16   ? queries<128, 1, 1, 16, 4>(a, plan)
           : rows <= 32 ? queries<128, 4, 2, 32, 2>(a, plan)
                        : queries<128, 8, 2, 32, 1>(a, plan);
}
