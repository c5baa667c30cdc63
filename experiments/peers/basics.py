"""basics.py: PyTorch's side of the section `floors`: a copy and a matrix product, to see that both sides stand alike."""

import peer
import torch


@peer.case
def copy(elements):
    x, y = torch.randn(elements), torch.empty(elements)
    return lambda: y.copy_(x)


@peer.case
def matmul(n):
    a, b = torch.randn(n, n), torch.randn(n, n)
    return lambda: a @ b


peer.serve()
