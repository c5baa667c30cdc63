"""attention.py: PyTorch's side of the section `attention`: scaled_dot_product_attention on gathered inputs.

The inputs are what the peer likes best: contiguous [batch, heads, rows, head_dim], already gathered, so that no cost
of dilation is counted against it. The backward is timed alone, on a graph that is kept.
"""

import peer
import torch


def _inputs(heads, rows, head_dim, dtype, grad):
    shape = (1, heads, rows, head_dim)
    kind = getattr(torch, dtype)
    return [torch.randn(shape).to(kind).requires_grad_(grad) for _ in range(3)]


@peer.case
def forward(heads, rows, head_dim, causal, dtype="float32"):
    q, k, v = _inputs(heads, rows, head_dim, dtype, False)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


@peer.case
def backward(heads, rows, head_dim, causal, dtype="float32"):
    inputs = _inputs(heads, rows, head_dim, dtype, True)
    out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)
    g = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, g, retain_graph=True)


peer.serve()
