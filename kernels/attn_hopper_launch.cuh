/* attn_hopper_launch.cuh: the forward's kernel on Hopper and its launch, as a template over what has instances of its
 * own: dtype, head dimension (64, 128), whether branches meet, and whether there are dropout or slopes, or active
 * blocks. Those without are made in attn_hopper_forward.cu, those with in attn_hopper_pairs.cu and
 * attn_hopper_blocks.cu.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_LAUNCH_CUH
#define LAC_CUDA_ATTN_HOPPER_LAUNCH_CUH
#include "attn_hopper_blocks.cuh"
#include "attn_hopper_rows.cuh"
#include "launch.cuh"

template <int D, bool BLOCKS> HOPPER_FN void feed(const hopper_forward_args &p, uint32_t memory)
{
    if constexpr (BLOCKS) hopper_block_feeder<D>(p, memory).run();
    else hopper_feeder<D, false>(p, memory).run();
}

template <class T, int D, bool MEETS, bool PAIRS, bool BLOCKS>
__global__ void __launch_bounds__(hopper_forward_shape<D, BLOCKS>::THREADS_, 1)
    attn_hopper_forward_kernel(const __grid_constant__ hopper_forward_args p)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef hopper_forward_shape<D, BLOCKS> M;
    extern __shared__ __align__(1024) uint8_t bytes[]; /* nothing else is shared: swizzled tiles begin at multiples */
    const uint32_t memory = attn_shared(bytes);
    if (threadIdx.x == 0) {
        hopper_barrier(memory + M::FOUND_FULL, 1);
        hopper_barrier(memory + M::FOUND_FREE, 1);
        for (int i = 0; i < M::SLOTS; i++) {
            hopper_barrier(memory + M::Q_FULL + 8 * i, 1);
            hopper_barrier(memory + M::Q_FREE + 8 * i, M::GROUPS + MEETS);
            hopper_barrier(memory + M::CARRIED + 8 * i, 1);
            hopper_barrier(memory + M::DONE + 8 * i, 4 * M::GROUPS);
        }
        for (int i = 0; i < M::STAGES; i++) {
            hopper_barrier(memory + M::K_FULL + 8 * i, 1);
            hopper_barrier(memory + M::V_FULL + 8 * i, 1);
            hopper_barrier(memory + M::K_FREE + 8 * i, 4 * M::GROUPS); /* every warp */
            hopper_barrier(memory + M::V_FREE + 8 * i, 4 * M::GROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    previous_done();
    __syncthreads();
    if (threadIdx.x < 128) {
        hopper_fewer<M::FEEDER_REGISTERS>();
        if (threadIdx.x < (BLOCKS ? 32 : 1)) feed<D, BLOCKS>(p, memory);
        else if (threadIdx.x / 32 == 1) hopper_scout<D, MEETS, PAIRS, BLOCKS>(p, memory);
        else if (MEETS && threadIdx.x / 32 == 2) hopper_carrier<D, BLOCKS>(p, memory).run();
        else if (threadIdx.x >= 64 && p.gaps) hopper_fill<D>(p, 3 - threadIdx.x / 32, 2 - MEETS);
    } else {
        hopper_more<M::GROUP_REGISTERS>();
        hopper_rows<T, D, MEETS, PAIRS, BLOCKS>(p, memory).run();
    }
#endif
}

template <class T, int D, bool MEETS, bool PAIRS, bool BLOCKS> static int launch_one(const hopper_forward_args &p)
{
    typedef hopper_forward_shape<D, BLOCKS> M;
    auto kernel = attn_hopper_forward_kernel<T, D, MEETS, PAIRS, BLOCKS>;
    const int memory = M::MEMORY;
    const int blocks = p.gaps ? lac_cuda_processors : min(p.tiles, lac_cuda_processors);
    CUDA_TRY("attention", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory));
    launch(kernel, blocks, M::THREADS_, memory, p);
    return lac_cuda_launched("attention");
}
template <class T, bool PAIRS, bool BLOCKS> static int launch_shape(const hopper_forward_args &p)
{
    const bool small = p.a.head_dim <= 64;
    if (p.a.ranks > 1)
        return small ? launch_one<T, 64, true, PAIRS, BLOCKS>(p) : launch_one<T, 128, true, PAIRS, BLOCKS>(p);
    return small ? launch_one<T, 64, false, PAIRS, BLOCKS>(p) : launch_one<T, 128, false, PAIRS, BLOCKS>(p);
}

/* the same with dropout or slopes (attn_hopper_pairs.cu) and with active blocks (attn_hopper_blocks.cu) */
template <class T> int attn_hopper_forward_pairs(const hopper_forward_args &p);
template <class T> int attn_hopper_forward_blocks(const hopper_forward_args &p);

#endif
