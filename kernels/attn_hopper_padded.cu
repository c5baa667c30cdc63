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

/* A batch item a block: keys up to the last one that is no padding, and whether there is padding before it. */
__global__ void __launch_bounds__(ENDS_THREADS)
    attn_hopper_ends_kernel(const __grid_constant__ attn_args a, int *end, int *holes)
{
    __shared__ int all[2];
    previous_done();
    const int b = (int)blockIdx.x;
    int64_t keys = a.m;
    if (a.lengths)
        keys = min(keys, a.lengths_wide ? ((const int64_t *)a.lengths)[b * a.lengths_stride]
                                        : (int64_t)((const int32_t *)a.lengths)[b * a.lengths_stride]);
    const uint8_t *shown = a.padding + b * a.padding_stride[0];
    int last = 0, count = 0;
    if (threadIdx.x < 2) all[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 8
    for (int key = (int)threadIdx.x; key < keys; key += ENDS_THREADS)
        if (shown[key * a.padding_stride[1]]) last = key + 1, count++;
    last = __reduce_max_sync(~0u, last), count = __reduce_add_sync(~0u, count);
    if (threadIdx.x % 32 == 0) atomicMax(&all[0], last), atomicAdd(&all[1], count);
    __syncthreads();
    if (threadIdx.x == 0) end[b] = all[0], holes[b] = all[1] < all[0];
}

int attn_hopper_ends(attn_args &a, int *space, const int **holes)
{
    *holes = NULL;
    if (!a.padding) return 0;
    launch(attn_hopper_ends_kernel, a.batch, ENDS_THREADS, 0, a, space, space + a.batch);
    LAC_TRY(lac_cuda_launched("attention"));
    a.lengths = space, a.lengths_stride = 1, a.lengths_wide = 0;
    *holes = space + a.batch;
    return 0;
}
