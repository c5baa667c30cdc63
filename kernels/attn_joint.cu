/* attn_joint.cu: the backward in one pass (attn_joint.cuh): its launch, and where it can run. */
#include "attn_joint.cuh"

template <class Op> static int launch(const attn_args &a, const hopper_args &p)
{
    typedef joint_shape<Op> M;
    const int memory = M::MEMORY + ATTN_ALIGN;
    if (p.tiles == 0) return 0;
    CUDA_TRY("attention",
             cudaFuncSetAttribute(attn_joint_kernel<Op>, cudaFuncAttributeMaxDynamicSharedMemorySize, memory));
    attn_joint_kernel<Op><<<(unsigned)p.tiles, M::THREADS_, memory, lac_cuda_stream>>>(a, p);
    return lac_cuda_launched("attention");
}

int attn_joint_tiles(const attn_args &a, const hopper_args &p, int dtype)
{
    return dtype == LAC_BF16 ? launch<op_bf16<JOINT_COLUMNS>>(a, p) : launch<op_f16<JOINT_COLUMNS>>(a, p);
}

bool attn_joint_runs(int head_dim)
{
    int device, most;
    return head_dim > 64 && head_dim <= JOINT_COLUMNS && cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
           most >= joint_shape<op_bf16<JOINT_COLUMNS>>::MEMORY + ATTN_ALIGN + 512; /* and what else the kernel has */
}
