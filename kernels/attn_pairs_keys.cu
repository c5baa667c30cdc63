/* attn_pairs_keys.cu: attn_keys.cuh's kernel with options of single pairs. */
#include "attn_keys.cuh"

template <template <int> class Op> static int blocks(attn_block_args &a, const lac_plan *plan)
{
    const int rows = attn_block_rows(a);
    if (a.head_dim <= 64)
        return rows <= 16   ? launch<Op<64>, 64, 1, 1, 16, 12, 3>(a, plan)
               : rows <= 32 ? launch<Op<64>, 64, 2, 1, 32, 8, 3>(a, plan)
               : rows <= 64 ? launch<Op<64>, 64, 2, 2, 32, 4, 3>(a, plan)
                            : launch<Op<64>, 64, 2, 4, 32, 2, 3>(a, plan);
    return rows <= 16   ? launch<Op<128>, 128, 1, 1, 16, 8, 3>(a, plan)
           : rows <= 32 ? launch<Op<128>, 128, 1, 2, 32, 4, 3>(a, plan)
                        : launch<Op<128>, 128, 1, 4, 64, 2, 3>(a, plan);
}

int attn_pairs_keys_tensor(attn_pair_args &a, const lac_plan *plan, int dtype)
{
    if (attn_only_blocks(a) && a.head_dim <= 128 && dtype != LAC_F32)
        return dtype == LAC_BF16 ? blocks<op_bf16>(a, plan) : blocks<op_f16>(a, plan);
    return launch_shape(a, plan, dtype);
}
