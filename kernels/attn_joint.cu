/* attn_joint.cu: the backward in one pass (attn_joint.cuh): its launch, and where it can run. */
#include "attn_joint.cuh"

enum { JOINT_STATIC = 512 }; /* what else the kernel has in shared memory, at most */

static int limit(cudaDeviceAttr which)
{
    int device, most;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&most, which, device) != cudaSuccess) return 0;
    return most;
}

template <class Op, int DP> static int launch(const attn_args &a, const hopper_args &p)
{
    typedef joint_shape<Op, DP> M;
    const int late = limit(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= M::LATE + ATTN_ALIGN + JOINT_STATIC;
    const int memory = (late ? M::LATE : M::MEMORY) + ATTN_ALIGN;
    if (p.tiles == 0) return 0;
    CUDA_TRY("attention",
             cudaFuncSetAttribute(attn_joint_kernel<Op, DP>, cudaFuncAttributeMaxDynamicSharedMemorySize, memory));
    attn_joint_kernel<Op, DP><<<(unsigned)p.tiles, M::THREADS_, memory, lac_cuda_stream>>>(a, p, late);
    return lac_cuda_launched("attention");
}

int attn_joint_tiles(const attn_args &a, const hopper_args &p, int dtype)
{
    if (a.head_dim <= 64) return dtype == LAC_BF16 ? launch<op_bf16<64>, 64>(a, p) : launch<op_f16<64>, 64>(a, p);
    return dtype == LAC_BF16 ? launch<op_bf16<128>, 128>(a, p) : launch<op_f16<128>, 128>(a, p);
}

bool attn_joint_runs(int head_dim)
{
    if (head_dim > 128) return false;
    if (head_dim > 64)
        return limit(cudaDevAttrMaxSharedMemoryPerBlockOptin) >=
               joint_shape<op_bf16<128>, 128>::MEMORY + ATTN_ALIGN + JOINT_STATIC;
    return limit(cudaDevAttrMaxSharedMemoryPerMultiprocessor) >= /* two blocks; each has 1 KiB of the system's */
           2 * (joint_shape<op_bf16<64>, 64>::LATE + ATTN_ALIGN + JOINT_STATIC + 1024);
}
