/* attn_joint.cu: the backward in one pass (attn_joint.cuh): its launch, and where it can run. */
#include "attn_joint.cuh"

int attn_joint_tiles(const attn_args &a, const hopper_args &p, int dtype)
{
    return p.steps ? attn_joint_block_tiles(a, p, dtype) : joint_tiles<false>(a, p, dtype);
}

bool attn_joint_runs(int head_dim)
{
    if (head_dim > 128) return false;
    if (head_dim > 64)
        return joint_limit(cudaDevAttrMaxSharedMemoryPerBlockOptin) >=
               joint_shape<op_bf16<128>, 128>::MEMORY + ATTN_ALIGN + JOINT_STATIC;
    return joint_limit(cudaDevAttrMaxSharedMemoryPerMultiprocessor) >= /* two blocks; each has 1 KiB of the system's */
           2 * (joint_shape<op_bf16<64>, 64>::LATE + ATTN_ALIGN + JOINT_STATIC + 1024);
}
