/* attn_forward.cu: which kernel of attn_forward_plain.cuh or attn_forward.cuh runs, and its shape. */
#include "attn_forward.cuh"
#include "attn_forward_plain.cuh"

template <template <int> class Op> static int plain(attn_args &a, const lac_plan *plan)
{
    return a.head_dim <= 64 ? launch_plain<Op<64>, 64, 2, 4, 48, 3>(a, plan)
                            : launch_plain<Op<128>, 128, 2, 4, 64, 2>(a, plan);
}

int attn_forward_tensor(attn_args &a, const lac_plan *plan, int dtype)
{
    int d = a.head_dim;
    if (dtype != LAC_F32 && d <= 128 && a.p == 0)
        return dtype == LAC_BF16 ? plain<op_bf16>(a, plan) : plain<op_f16>(a, plan);
    if (dtype == LAC_BF16)
        return d <= 64    ? launch<op_bf16<64>, 64, 2, 4, 48, 3>(a, plan)
               : d <= 128 ? launch<op_bf16<128>, 128, 2, 4, 64, 2>(a, plan)
                          : launch<op_bf16<256>, 256, 1, 4, 32, 1>(a, plan);
    if (dtype == LAC_F16)
        return d <= 64    ? launch<op_f16<64>, 64, 2, 4, 48, 3>(a, plan)
               : d <= 128 ? launch<op_f16<128>, 128, 2, 4, 64, 2>(a, plan)
                          : launch<op_f16<256>, 256, 1, 4, 32, 1>(a, plan);
    return d <= 64    ? launch<op_tf32<64>, 64, 2, 4, 32, 2>(a, plan)
           : d <= 128 ? launch<op_tf32<128>, 128, 1, 4, 32, 2>(a, plan)
                      : launch<op_tf32<256>, 256, 1, 4, 16, 1>(a, plan);
}
