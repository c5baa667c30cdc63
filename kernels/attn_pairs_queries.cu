/* attn_pairs_queries.cu: attn_queries.cuh's kernel with options of single pairs.
 *
 * Both passes with blocks of 32 alone, time over density x that of dense attention's backward, bf16 on an H200: D = 64
 * 1.85; queries by two warps 1.93, with 16 keys a step 1.97; keys by two warps 1.97, with 16 rows a step 2.15. D = 128
 * 1.75; queries by one warp 1.85, with 16 keys a step 1.83. Blocks of 16: 3.12 and 2.61. By tiles of 64 rows it was
 * 3.9 for blocks of 32, 16.1 and 13.4 for blocks of 16.
 */
#include "attn_queries.cuh"

template <template <int> class Op> static int blocks(attn_block_args &a, const lac_plan *plan)
{
    const int rows = attn_block_rows(a);
    if (a.head_dim <= 64)
        return rows <= 16   ? launch<Op<64>, 64, 1, 1, 16, 16>(a, plan)
               : rows <= 32 ? launch<Op<64>, 64, 2, 1, 32, 8>(a, plan)
               : rows <= 64 ? launch<Op<64>, 64, 2, 2, 64, 4>(a, plan)
                            : launch<Op<64>, 64, 2, 4, 64, 2>(a, plan);
    return rows <= 16   ? launch<Op<128>, 128, 1, 1, 16, 12>(a, plan)
           : rows <= 32 ? launch<Op<128>, 128, 1, 2, 32, 5>(a, plan)
           : rows <= 64 ? launch<Op<128>, 128, 2, 2, 32, 3>(a, plan)
                        : launch<Op<128>, 128, 2, 4, 32, 2>(a, plan);
}

int attn_pairs_queries_tensor(attn_pair_args &a, const lac_plan *plan, int dtype)
{
    int d = a.head_dim;
    if (attn_only_blocks(a) && d <= 128 && dtype != LAC_F32)
        return dtype == LAC_BF16 ? blocks<op_bf16>(a, plan) : blocks<op_f16>(a, plan);
    if (dtype == LAC_BF16)
        return d <= 64    ? launch<op_bf16<64>, 64, 2, 4, 32, 2>(a, plan)
               : d <= 128 ? launch<op_bf16<128>, 128, 1, 4, 32, 2>(a, plan)
                          : launch<op_bf16<256>, 256, 1, 4, 16, 1>(a, plan);
    if (dtype == LAC_F16)
        return d <= 64    ? launch<op_f16<64>, 64, 2, 4, 32, 2>(a, plan)
               : d <= 128 ? launch<op_f16<128>, 128, 1, 4, 32, 2>(a, plan)
                          : launch<op_f16<256>, 256, 1, 4, 16, 1>(a, plan);
    return d <= 64    ? launch<op_tf32<64>, 64, 1, 4, 32, 2>(a, plan)
           : d <= 128 ? launch<op_tf32<128>, 128, 1, 4, 32, 1>(a, plan)
                      : launch<op_tf32<256>, 256, 1, 2, 16, 1>(a, plan);
}
