/* attn_parts_forward.cu: which shape of attn_parts_forward.cuh's kernel runs, and where. */
#include "attn_parts_forward.cuh"

int attn_forward_parts(attn_pair_args &a, const lac_plan *plan)
{
    return a.head_dim <= 64 ? launch<64, 2, 4, 32, 2>(a, plan) : launch<128, 1, 8, 32, 1>(a, plan);
}

bool attn_parts_fits(int head_dim)
{
    int device, most;
    return head_dim <= 128 && cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
           most >= (head_dim <= 64 ? 116 : 204) * 1024; /* tiles, a mask or bias, and what else a kernel has */
}
