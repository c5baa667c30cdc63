/* attn_exact_forward.cu: which shape of attn_exact_forward.cuh's kernel runs. */
#include "attn_exact_forward.cuh"

int attn_forward_exact(attn_pair_args &a, const lac_plan *plan, int dtype)
{
    int d = a.head_dim;
    if (dtype == LAC_F64)
        return d <= 64    ? launch<exact<double, 64, 4, 4>>(a, plan)
               : d <= 128 ? launch<exact<double, 128, 2, 4>>(a, plan)
                          : launch<exact<double, 256, 1, 2>>(a, plan);
    return d <= 64    ? launch<exact<float, 64, 4, 8>>(a, plan)
           : d <= 128 ? launch<exact<float, 128, 4, 4>>(a, plan)
                      : launch<exact<float, 256, 2, 4>>(a, plan);
}
