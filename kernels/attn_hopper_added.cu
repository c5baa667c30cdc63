/* attn_hopper_added.cu: instances of the forward on Hopper for calls with a mask or a bias; a file of their own, so
 * that they are compiled beside the others. attn_hopper_pairs.cuh says what they do.
 */
#include "attn_hopper_launch.cuh"

template <class T> int attn_hopper_forward_added(const hopper_forward_args &p)
{
    return launch_shape<T, HOPPER_ALL, false>(p);
}
template int attn_hopper_forward_added<f16>(const hopper_forward_args &);
template int attn_hopper_forward_added<bf16>(const hopper_forward_args &);
