"""hopper.py: PyTorch's side of the section `hopper`: SDPA's forward on gathered inputs, on CUDA.

The inputs are contiguous [segments, heads, rows, head_dim], so gathering and scattering are not counted against it.
One call is `times` forwards in a row and a wait, as on the other side, so that launches overlap on both.
"""

import peer
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@peer.case
def forward(segments, heads, rows, head_dim, causal, backend, times):
    shape = (segments, heads, rows, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def run():
        with torch.no_grad(), sdpa_kernel(_BACKENDS[backend]):
            for _ in range(times):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.cuda.synchronize()

    return run


peer.serve()
