/* attn_pairs_keys.cu: attn_keys.cuh's kernel with options of single pairs. */
#include "attn_keys.cuh"

template <template <int> class Op> static int blocks(attn_block_args &a, const lac_plan *plan)
{
    if (a.head_dim > 64) return launch<Op<128>, 128, 1, 4, 64, 2, 3>(a, plan);
    return attn_low_blocks(a) ? launch<Op<64>, 64, 2, 2, 32, 4, 3>(a, plan)
                              : launch<Op<64>, 64, 2, 4, 32, 2, 3>(a, plan);
}

int attn_pairs_keys_tensor(attn_pair_args &a, const lac_plan *plan, int dtype)
{
    if (attn_only_blocks(a) && a.head_dim <= 128 && dtype != LAC_F32)
        return dtype == LAC_BF16 ? blocks<op_bf16>(a, plan) : blocks<op_f16>(a, plan);
    return launch_shape(a, plan, dtype);
}
