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
    int d = a.head_dim;
    if (attn_only_blocks(a) && d <= 128 && dtype != LAC_F32)
        return dtype == LAC_BF16 ? blocks<op_bf16>(a, plan) : blocks<op_f16>(a, plan);
    if (dtype == LAC_BF16)
        return d <= 64    ? launch<op_bf16<64>, 64, 2, 4, 32, 2, 3>(a, plan)
               : d <= 128 ? launch<op_bf16<128>, 128, 1, 4, 32, 2, 3>(a, plan)
                          : launch2<op_bf16<256>, 256, 1, 4, 32, 1>(a, plan);
    if (dtype == LAC_F16)
        return d <= 64    ? launch<op_f16<64>, 64, 2, 4, 32, 2, 3>(a, plan)
               : d <= 128 ? launch<op_f16<128>, 128, 1, 4, 32, 2, 3>(a, plan)
                          : launch2<op_f16<256>, 256, 1, 4, 32, 1>(a, plan);
    return d <= 64    ? launch<op_tf32<64>, 64, 2, 4, 16, 2, 3>(a, plan)
           : d <= 128 ? launch<op_tf32<128>, 128, 1, 4, 16, 1, 3>(a, plan)
                      : launch2<op_tf32<256>, 256, 1, 2, 16, 1>(a, plan);
}
