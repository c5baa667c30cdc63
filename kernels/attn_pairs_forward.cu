/* attn_pairs_forward.cu: attn_forward.cuh's kernel with options of single pairs.
 *
 * Steps are a power of two long, so that blocks are multiples of them, and with other options than blocks shorter where
 * registers are scarce. Tiles have 64 rows, by two warps, where no block has more.
 *
 * Blocks of 128 alone for D = 64, causal, time over density x dense: as they are 1.255; 32 keys a step, three blocks a
 * multiprocessor 1.372; tiles of 64 rows with 64 keys and four blocks 1.280, with 32 keys and six 1.399.
 */
#include "attn_forward.cuh"

template <template <int> class Op> static int blocks(attn_block_args &a, const lac_plan *plan)
{
    const bool low = attn_low_blocks(a);
    if (a.head_dim <= 64)
        return low ? launch<Op<64>, 64, 2, 2, 64, 4>(a, plan) : launch<Op<64>, 64, 2, 4, 64, 2>(a, plan);
    return low ? launch<Op<128>, 128, 2, 2, 32, 4>(a, plan) : launch<Op<128>, 128, 2, 4, 64, 2>(a, plan);
}

int attn_pairs_forward_tensor(attn_pair_args &a, const lac_plan *plan, int dtype)
{
    int d = a.head_dim;
    if (attn_only_blocks(a) && d <= 128 && dtype != LAC_F32)
        return dtype == LAC_BF16 ? blocks<op_bf16>(a, plan) : blocks<op_f16>(a, plan);
    if (dtype == LAC_BF16)
        return d <= 64    ? launch<op_bf16<64>, 64, 2, 4, 64, 2>(a, plan)
               : d <= 128 ? launch<op_bf16<128>, 128, 2, 4, 32, 2>(a, plan)
                          : launch<op_bf16<256>, 256, 1, 4, 32, 1>(a, plan);
    if (dtype == LAC_F16)
        return d <= 64    ? launch<op_f16<64>, 64, 2, 4, 64, 2>(a, plan)
               : d <= 128 ? launch<op_f16<128>, 128, 2, 4, 32, 2>(a, plan)
                          : launch<op_f16<256>, 256, 1, 4, 32, 1>(a, plan);
    return d <= 64    ? launch<op_tf32<64>, 64, 2, 4, 32, 2>(a, plan)
           : d <= 128 ? launch<op_tf32<128>, 128, 1, 4, 32, 2>(a, plan)
                      : launch<op_tf32<256>, 256, 1, 4, 16, 1>(a, plan);
}
