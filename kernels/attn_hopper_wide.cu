/* attn_hopper_wide.cu: instances of the forward on Hopper for head dimensions above 128, without options of pairs and
 * active blocks; a file of their own, so that they are compiled beside the others.
 *
 * 64 rows of 256 sums are 128 registers a thread, which leaves room for the scores of 80 keys, and for one tile's
 * queries in shared memory. kernels/HOPPER.md says what bounds them.
 */
#include "attn_hopper_launch.cuh"

template <class T> int attn_hopper_forward_wide(const hopper_forward_args &p)
{
    return p.a.ranks > 1 ? launch_one<T, 256, true, HOPPER_PLAIN, false>(p)
                         : launch_one<T, 256, false, HOPPER_PLAIN, false>(p);
}
template int attn_hopper_forward_wide<f16>(const hopper_forward_args &);
template int attn_hopper_forward_wide<bf16>(const hopper_forward_args &);
