/* attn_hopper_launch.cuh: the forward's kernel on Hopper and its launch, as a template over what has instances of its
 * own: dtype, head dimension (64, 128; 256 in attn_hopper_wide.cu), whether branches meet, what options of pairs there
 * are (attn_hopper_pairs.cuh), and whether there are active blocks. Those without are made in attn_hopper_forward.cu,
 * those with in attn_hopper_pairs.cu, attn_hopper_padded.cu, attn_hopper_added.cu and attn_hopper_blocks.cu.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_LAUNCH_CUH
#define LAC_CUDA_ATTN_HOPPER_LAUNCH_CUH
#include "attn_hopper_blocks.cuh"
#include "attn_hopper_rows.cuh"
#include "launch.cuh"

/* All rows are looked at, and those that are not finite done again by `again`, branch after branch; only if one is
 * known to be spoilt. */
template <class T, class F> HOPPER_FN void hopper_redo(const attn_args &a, F &&again)
{
    const int64_t rows = (int64_t)a.batch * a.n * a.heads, warps = (int64_t)gridDim.x * (THREADS / 32);
    for (int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; row < rows; row += warps) {
        const int h = (int)(row % a.heads), n = (int)(row / a.heads % a.n), b = (int)(row / a.heads / a.n);
        const T *out = (const T *)a.out + row * a.head_dim;
        float probe = 0;
        for (int d = threadIdx.x % 32; d < a.head_dim; d += 32) probe += to_compute(out[d]) * 0;
        if (!__any_sync(~0u, probe != 0)) continue;
        const int position = n + a.shift;
        for (int rank = 0; rank < a.ranks; rank++)
            for (int g = 0; g < a.branches; g++) {
                attn_tile t;
                if (a.branch[g].rank != rank || position < 0 || !attn_keeps(a, g, h, (unsigned)position)) continue;
                attn_span(a, g, b, h, position / a.branch[g].segment, t);
                again(t, (int)((position - t.base) / t.r));
            }
    }
}

template <class M> HOPPER_FN void feed(const hopper_forward_args &p, uint32_t memory)
{
    if constexpr (M::STEPPED) hopper_block_feeder<M>(p, memory).run();
    else hopper_feeder<M>(p, memory).run();
}

template <class M, bool MEETS> HOPPER_FN void hopper_barriers(uint32_t memory)
{
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
    for (int i = 0; M::WIDE && i < M::SLOTS; i++) {
        hopper_barrier(memory + M::TAKEN + 8 * i, 1);
        hopper_barrier(memory + M::PLACE_FREE + 8 * i, 4);
    }
    for (int i = 0; M::STEPPED && i < HOPPER_LISTS; i++) {
        hopper_barrier(memory + M::LIST_FULL + 8 * i, 1);
        hopper_barrier(memory + M::LIST_FREE + 8 * i, 1);
    }
}

template <class T, int D, bool MEETS, int OPTIONS, int BLOCKS>
__global__ void __launch_bounds__(hopper_forward_shape<T, D, BLOCKS, (OPTIONS & HOPPER_ADDED) != 0>::THREADS_,
                                  hopper_forward_shape<T, D, BLOCKS, (OPTIONS & HOPPER_ADDED) != 0>::TOGETHER)
    attn_hopper_forward_kernel(const __grid_constant__ hopper_forward_args p)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef hopper_forward_shape<T, D, BLOCKS, (OPTIONS & HOPPER_ADDED) != 0> M;
    extern __shared__ __align__(1024) uint8_t bytes[]; /* nothing else is shared: swizzled tiles begin at multiples */
    const uint32_t memory = attn_shared(bytes);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int team = 0; team < M::TEAMS; team++) hopper_barriers<M, MEETS>(memory + team * M::TEAM);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    previous_done();
    __syncthreads();
    if (threadIdx.x < 128) {
        hopper_fewer<M::FEEDER_REGISTERS>();
        if constexpr (M::TEAMS > 1) {
            const uint32_t own = memory + __shfl_sync(~0u, threadIdx.x / 64, 0) * M::TEAM;
            if (threadIdx.x / 32 % 2) hopper_scout<M, MEETS, OPTIONS>(p, own);
            else if (threadIdx.x % 32 == 0) feed<M>(p, own);
        } else if (threadIdx.x == 0) feed<M>(p, memory);
        else if (threadIdx.x / 32 == 1) hopper_scout<M, MEETS, OPTIONS>(p, memory);
        else if (MEETS && threadIdx.x / 32 == 2) hopper_carrier<M>(p, memory).run();
        else if (threadIdx.x >= 64 && p.gaps) hopper_fill<D>(p, 3 - threadIdx.x / 32, 2 - MEETS);
    } else {
        hopper_more<M::GROUP_REGISTERS>();
        const uint32_t own = M::TEAMS == 1 ? 0 : __shfl_sync(~0u, (threadIdx.x / 128 - 1) / M::GROUPS, 0) * M::TEAM;
        hopper_rows<T, D, MEETS, OPTIONS, BLOCKS>(p, memory + own).run();
    }
#endif
}

template <class T, int D, bool MEETS, int OPTIONS, int BLOCKS> static int launch_one(const hopper_forward_args &p)
{
    typedef hopper_forward_shape<T, D, BLOCKS, (OPTIONS & HOPPER_ADDED) != 0> M;
    auto kernel = attn_hopper_forward_kernel<T, D, MEETS, OPTIONS, BLOCKS>;
    const int memory = M::MEMORY;
    const int most = M::TOGETHER * lac_cuda_processors, blocks = p.gaps ? most : min(p.tiles, most);
    CUDA_TRY("attention", lac_cuda_shared((const void *)kernel, memory));
    if (M::TOGETHER > 1) { /* all thread blocks run at a time: some may wait for others' tiles */
        static cudaError_t whole = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                        cudaSharedmemCarveoutMaxShared);
        LAC_TRY(lac_cuda_check("attention", whole));
    }
    launch(kernel, blocks, M::THREADS_, memory, p);
    return lac_cuda_launched("attention");
}
template <class T, int OPTIONS, int BLOCKS> static int launch_shape(const hopper_forward_args &p)
{
    const bool small = p.a.head_dim <= 64;
    if (p.a.ranks > 1)
        return small ? launch_one<T, 64, true, OPTIONS, BLOCKS>(p) : launch_one<T, 128, true, OPTIONS, BLOCKS>(p);
    return small ? launch_one<T, 64, false, OPTIONS, BLOCKS>(p) : launch_one<T, 128, false, OPTIONS, BLOCKS>(p);
}

/* all arguments but those of eight bits (attn_hopper_forward.cu) */
int attn_hopper_prepare(hopper_forward_args &p, attn_pair_args &a, const lac_a_attend *f, bool gaps,
                        const hopper_kept *padding);

/* The same with dropout or slopes (attn_hopper_pairs.cu), with padding (attn_hopper_padded.cu), with a mask or a bias
 * (attn_hopper_added.cu), and with active blocks (attn_hopper_blocks.cu); and with none of all this above a head
 * dimension of 128 (attn_hopper_wide.cu). */
template <class T> int attn_hopper_forward_pairs(const hopper_forward_args &p);
template <class T> int attn_hopper_forward_padded(const hopper_forward_args &p);
template <class T> int attn_hopper_forward_added(const hopper_forward_args &p);
template <class T> int attn_hopper_forward_blocks(const hopper_forward_args &p);
template <class T> int attn_hopper_forward_wide(const hopper_forward_args &p);

#endif
