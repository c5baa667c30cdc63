/* attn_joint_blocks.cu: instances of the backward in one pass (attn_joint.cuh) for active blocks. */
#include "attn_joint.cuh"

int attn_joint_block_tiles(const attn_args &a, const hopper_args &p, int dtype)
{
    return joint_tiles<true>(a, p, dtype);
}
