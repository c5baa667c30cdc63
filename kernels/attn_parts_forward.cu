/* attn_parts_forward.cu: which shape of attn_parts_forward.cuh's kernel runs, and where. */
#include "attn_parts_forward.cuh"

int attn_forward_parts(attn_pair_args &a, const lac_plan *plan)
{
    const int rows = attn_block_rows(a);
    if (a.head_dim <= 64)
        return rows <= 16   ? launch<64, 1, 1, 16, 8>(a, plan)
               : rows <= 32 ? launch<64, 1, 2, 32, 4>(a, plan)
                            : launch<64, 2, 4, 32, 2>(a, plan);
    return rows <= 16   ? launch<128, 1, 1, 16, 4>(a, plan)
           : rows <= 32 ? launch<128, 1, 2, 32, 2>(a, plan)
                        : launch<128, 1, 8, 32, 1>(a, plan);
}

bool attn_parts_fits(int head_dim)
{
    int device, most;
    return head_dim <= 128 && cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
           most >= (head_dim <= 64 ? 116 : 204) * 1024; /* tiles, a mask or bias, and what else a kernel has */
}
