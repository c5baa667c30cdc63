/* attn_hopper_pairs.cu: instances of the forward on Hopper for calls with dropout or slopes; a file of their own, so
 * that they are compiled beside the others. attn_hopper_pairs.cuh says what they do.
 */
#include "attn_hopper_launch.cuh"

template <class T> int attn_hopper_forward_pairs(const hopper_forward_args &p)
{
    return launch_shape<T, HOPPER_PAIRS, false>(p);
}
template int attn_hopper_forward_pairs<f16>(const hopper_forward_args &);
template int attn_hopper_forward_pairs<bf16>(const hopper_forward_args &);
