/* attn_pairs_forward.cu: attn_forward.cuh's kernel with options of single pairs.
 *
 * Steps are a power of two long, so that blocks are multiples of them, and with other options than blocks shorter where
 * registers are scarce. Tiles have 64 rows, by two warps, where no block has more.
 *
 * Where no block has more than 32 rows, or 16, so have tiles and steps, by one warp or (D = 128, 32 rows) two, and 6 to
 * 16 thread blocks a multiprocessor hide each other's waits. Floor: a block of 16 brings 64 D bytes for 1024 D
 * operations. At 5.5 TB/s from the cache that is 90 TFLOP/s, 3.2 times density x the time of dense attention for
 * D = 64; blocks of 32 half of it. No two rows of blocks need share a key, so nothing is to be had from sharing.
 * Measured on an H200 (bf16, a random tenth), blocks of 16 and 32: D = 64 2.64 and 1.57, D = 128 3.04 and 1.78; by
 * tiles of 64 rows 18.6 and 4.84, 10.8 and 2.71. With blocks of 16 (D = 64) the cache gives 6.7 TB/s, and 2.6
 * instructions a cycle are issued, 367 a step, of which 16 are products. Blocks of 32 otherwise: D = 64 two warps 1.65,
 * 16 keys a step 1.95; D = 128 one warp 1.90, 16 keys 2.16. Blocks of 48 pay for tiles of 64: 2.43 and 2.49.
 *
 * Blocks of 128 alone for D = 64, causal, time over density x dense: as they are 1.255; 32 keys a step, three blocks a
 * multiprocessor 1.372; tiles of 64 rows with 64 keys and four blocks 1.280, with 32 keys and six 1.399.
 */
#include "attn_forward.cuh"

template <template <int> class Op> static int blocks(attn_block_args &a, const lac_plan *plan)
{
    const int rows = attn_block_rows(a);
    if (a.head_dim <= 64)
        return rows <= 16   ? launch<Op<64>, 64, 1, 1, 16, 16>(a, plan)
               : rows <= 32 ? launch<Op<64>, 64, 2, 1, 32, 8>(a, plan)
               : rows <= 64 ? launch<Op<64>, 64, 2, 2, 64, 4>(a, plan)
                            : launch<Op<64>, 64, 2, 4, 64, 2>(a, plan);
    return rows <= 16   ? launch<Op<128>, 128, 1, 1, 16, 12>(a, plan)
           : rows <= 32 ? launch<Op<128>, 128, 1, 2, 32, 6>(a, plan)
           : rows <= 64 ? launch<Op<128>, 128, 2, 2, 32, 4>(a, plan)
                        : launch<Op<128>, 128, 2, 4, 64, 2>(a, plan);
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
