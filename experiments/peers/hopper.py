"""hopper.py: PyTorch's side of the sections `hopper` and `cuda_exact`: SDPA's forward on gathered inputs, on CUDA.

The inputs are contiguous [segments, heads, rows, head_dim], so gathering and scattering are not counted against it.
One call is `times` forwards in a row and a wait, as on the other side, so that launches overlap on both.
"""

import peer
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION}


@peer.case
def forward(segments, heads, rows, head_dim, causal, backend, times, dtype="bfloat16"):
    shape = (segments, heads, rows, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for _ in range(3))

    def run():
        with torch.no_grad(), sdpa_kernel(_BACKENDS[backend]):
            for _ in range(times):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.cuda.synchronize()

    return run


peer.serve()
