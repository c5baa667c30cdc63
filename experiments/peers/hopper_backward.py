"""hopper_backward.py: PyTorch's side of the sections `hopper_backward` and `cuda_exact`: SDPA's backward on gathered inputs, on CUDA.

The inputs are contiguous [segments, heads, rows, head_dim], so gathering and scattering are not counted against it.
One call is `times` backwards in a row and a wait, as on the other side, so that launches overlap on both.
"""

import peer
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION}


@peer.case
def backward(segments, heads, rows, head_dim, causal, backend, times, dtype="bfloat16"):
    shape = (segments, heads, rows, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=getattr(torch, dtype), requires_grad=True) for _ in range(3))
    with sdpa_kernel(_BACKENDS[backend]):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    g = torch.randn_like(out)

    def run():
        for _ in range(times):
            torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
        torch.cuda.synchronize()

    return run


peer.serve()
