"""elementwise.py: PyTorch's side of the section `elementwise`."""

import peer
import torch
import torch.nn.functional as F

_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_UNARY = {"relu": torch.relu, "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu,
          "gelu": F.gelu}


@peer.case
def unary(name, n, dtype):
    x, f = torch.randn(n).to(_TYPES[dtype]), _UNARY[name]
    return lambda: f(x)


@peer.case
def unary_backward(name, n, dtype):
    return _backward(_UNARY[name], torch.randn(n).to(_TYPES[dtype]))


@peer.case
def add(n, dtype):
    x, y = torch.randn(n).to(_TYPES[dtype]), torch.randn(n).to(_TYPES[dtype])
    return lambda: x + y


def _backward(f, x):
    x.requires_grad_(True)
    out = f(x)
    g = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, x, g, retain_graph=True)


def _along(name, f):
    def forward(rows, width, dim):
        x = torch.randn(rows, width)
        return lambda: f(x, dim)

    def backward(rows, width, dim):
        return _backward(lambda x: f(x, dim), torch.randn(rows, width))

    forward.__name__, backward.__name__ = name, name + "_backward"
    peer.case(forward)
    peer.case(backward)


for _name, _f in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax), ("sum", torch.sum),
                  ("max", torch.amax), ("var", torch.var), ("logsumexp", torch.logsumexp)):
    _along(_name, _f)


def _norm(name, f):
    def forward(rows, width):
        x = torch.randn(rows, width)
        return lambda: f(x, width)

    def backward(rows, width):
        return _backward(lambda x: f(x, width), torch.randn(rows, width))

    forward.__name__, backward.__name__ = name, name + "_backward"
    peer.case(forward)
    peer.case(backward)


_norm("layernorm", lambda x, width: F.layer_norm(x, (width,), torch.ones(width), torch.zeros(width)))
_norm("rmsnorm", lambda x, width: F.rms_norm(x, (width,), torch.ones(width), 1e-6))


@peer.case
def adamw(n):
    p = torch.randn(n, requires_grad=True)
    p.grad = torch.randn(n)
    return torch.optim.AdamW([p], lr=1e-4, weight_decay=0.01, fused=True).step


peer.serve()
