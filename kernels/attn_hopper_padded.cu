/* attn_hopper_padded.cu: instances of the forward on Hopper for calls with padding, and where it ends.
 * attn_hopper_pairs.cuh says what they do.
 */
#include "attn_hopper_launch.cuh"

template <class T> int attn_hopper_forward_padded(const hopper_forward_args &p)
{
    return p.dropout.dropped || p.a.slopes ? launch_shape<T, HOPPER_PADDED | HOPPER_PAIRS, false>(p)
                                           : launch_shape<T, HOPPER_PADDED, false>(p);
}
template int attn_hopper_forward_padded<f16>(const hopper_forward_args &);
template int attn_hopper_forward_padded<bf16>(const hopper_forward_args &);

/* ---- where padding ends ---- */

enum { ENDS_THREADS = 1024 };

/* A batch item a block. */
__global__ void __launch_bounds__(ENDS_THREADS)
    attn_hopper_ends_kernel(const __grid_constant__ attn_args a, int *end, hopper_kept *kept)
{
    __shared__ int all[3];
    previous_done();
    const int b = (int)blockIdx.x;
    int64_t keys = a.m;
    if (a.lengths)
        keys = min(keys, a.lengths_wide ? ((const int64_t *)a.lengths)[b * a.lengths_stride]
                                        : (int64_t)((const int32_t *)a.lengths)[b * a.lengths_stride]);
    const uint8_t *shown = a.padding + b * a.padding_stride[0];
    int first = INT32_MAX, last = 0, count = 0;
    if (threadIdx.x < 3) all[threadIdx.x] = threadIdx.x ? 0 : INT32_MAX;
    __syncthreads();
#pragma unroll 8
    for (int key = (int)threadIdx.x; key < keys; key += ENDS_THREADS)
        if (shown[key * a.padding_stride[1]]) first = min(first, key), last = key + 1, count++;
    first = __reduce_min_sync(~0u, first), last = __reduce_max_sync(~0u, last), count = __reduce_add_sync(~0u, count);
    if (threadIdx.x % 32 == 0) atomicMin(&all[0], first), atomicMax(&all[1], last), atomicAdd(&all[2], count);
    __syncthreads();
    if (threadIdx.x == 0) end[b] = all[1], kept[b] = {min(all[0], all[1]), all[2] < all[1] - all[0]};
}

int attn_hopper_ends(attn_args &a, int *space, const hopper_kept **padding)
{
    *padding = NULL;
    if (!a.padding) return 0;
    hopper_kept *kept = (hopper_kept *)(space + a.batch);
    launch(attn_hopper_ends_kernel, a.batch, ENDS_THREADS, 0, a, space, kept);
    LAC_TRY(lac_cuda_launched("attention"));
    a.lengths = space, a.lengths_stride = 1, a.lengths_wide = 0;
    *padding = kept;
    return 0;
}
