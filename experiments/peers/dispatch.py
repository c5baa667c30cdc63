"""dispatch.py: PyTorch's cost of one small operator with its record for the gradient."""

import peer
import torch

CALLS = 100


def bodies():
    a, b = (torch.randn(16, requires_grad=True) for _ in range(2))
    m = torch.randn(4, 4, requires_grad=True)
    return {
        "add": lambda: a + b,
        "multiply by a number": lambda: a * 2,
        "tanh": lambda: a.tanh(),
        "matmul 4 x 4": lambda: m @ m,
        "view": lambda: a.view(4, 4),
        "(a * b + a):tanh():sum(), backward": lambda: (a * b + a).tanh().sum().backward(),
    }


@peer.case
def operator(name):
    body = bodies()[name]

    def run():
        for _ in range(CALLS):
            body()

    return run


peer.serve()
