/* attn_forward.cu: which shape of attn_forward.cuh's kernel runs. */
#include "attn_forward.cuh"

int attn_forward_tensor(attn_args &a, const lac_plan *plan, int dtype)
{
    int d = a.head_dim;
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
