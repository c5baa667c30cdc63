/* attn_keys.cu: attn_keys.cuh's kernel without options of single pairs. */
#include "attn_keys.cuh"

int attn_keys_tensor(attn_args &a, const lac_plan *plan, int dtype) { return launch_shape(a, plan, dtype); }
