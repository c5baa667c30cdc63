/* attn_hopper_blocks.cu: instances of the forward on Hopper for calls with active blocks; a file of their own, so that
 * they are compiled beside the others. attn_hopper_blocks.cuh says what they do.
 */
#include "attn_hopper_launch.cuh"

template <class T> int attn_hopper_forward_blocks(const hopper_forward_args &p)
{
    if (!p.small && p.a.head_dim <= 64 && p.a.ranks == 1 && !p.gaps) /* all warps that could fill gaps have work */
        return launch_one<T, 64, false, HOPPER_PLAIN, HOPPER_TEAMS>(p);
    if (!p.small) return launch_shape<T, HOPPER_PLAIN, HOPPER_USUAL>(p);
    return p.a.ranks > 1 ? launch_one<T, 64, true, HOPPER_PLAIN, HOPPER_SMALL>(p)
                         : launch_one<T, 64, false, HOPPER_PLAIN, HOPPER_SMALL>(p);
}
template int attn_hopper_forward_blocks<f16>(const hopper_forward_args &);
template int attn_hopper_forward_blocks<bf16>(const hopper_forward_args &);
