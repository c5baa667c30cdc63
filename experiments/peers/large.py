"""large.py: PyTorch's side of the sections `cuda_memory` and `cuda_products`: operators of large tensors.

A case is prepared `copies` times with tensors of its own, and one call runs all of them and keeps their results until
the end, so that nothing that is read or written is still in the cache. The same cases run on a CPU, for a quick run.
"""

import peer
import torch
import torch.nn.functional as F

_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def _cycle(copies, make):
    calls = [make() for _ in range(copies)]
    return lambda: [call() for call in calls]


def _draw(sizes, dtype, grad=False):
    return torch.randn(*sizes).to(_TYPES[dtype]).requires_grad_(grad)


@peer.case
def copy(elements):
    x, y = torch.randn(elements), torch.empty(elements)
    return lambda: y.copy_(x)


def _norm_of(f):
    def make(sizes, dtype, grad=True):
        gain, bias = (_draw(sizes[-1:], dtype, grad) for _ in range(2))
        return lambda x: f(x, gain, bias), [gain, bias]

    return make


_FUNCTIONS = {
    "gelu": lambda *_: (F.gelu, []),
    "silu": lambda *_: (F.silu, []),
    "exp": lambda *_: (torch.exp, []),
    "softmax": lambda *_: (lambda x: torch.softmax(x, -1), []),
    "sum over 1": lambda *_: (lambda x: x.sum(0), []),
    "sum over 2": lambda *_: (lambda x: x.sum(1), []),
    "sum of all": lambda *_: (lambda x: x.sum(), []),
    "max over 2": lambda *_: (lambda x: x.amax(1), []),
    "variance over 2": lambda *_: (lambda x: x.var(1), []),
    "logsumexp over 2": lambda *_: (lambda x: x.logsumexp(1), []),
    "layernorm": _norm_of(lambda x, gain, bias: F.layer_norm(x, x.shape[-1:], gain, bias, 1e-5)),
    "gelu_norm": _norm_of(lambda x, gain, bias: F.layer_norm(F.gelu(x), x.shape[-1:], gain, bias, 1e-5)),
    "rmsnorm": _norm_of(lambda x, gain, bias: F.rms_norm(x, x.shape[-1:], gain, 1e-6)),
}


def _inputs(name, x, more):
    return [x] + more[:1] if name == "rmsnorm" else [x] + more


@peer.case
def forward(name, sizes, dtype, copies):
    def make():
        f, _ = _FUNCTIONS[name](sizes, dtype, False)
        x = _draw(sizes, dtype)
        return lambda: f(x)

    return _cycle(copies, make)


@peer.case
def backward(name, sizes, dtype, copies):
    def make():
        x = _draw(sizes, dtype, True)
        f, more = _FUNCTIONS[name](sizes, dtype)
        out = f(x)
        g = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, _inputs(name, x, more), g, retain_graph=True)

    return _cycle(copies, make)


@peer.case
def both(name, sizes, dtype, copies):
    def make():
        x, g = _draw(sizes, dtype, True), _draw(sizes, dtype)
        f, more = _FUNCTIONS[name](sizes, dtype)
        return lambda: torch.autograd.grad(f(x), _inputs(name, x, more), g)

    return _cycle(copies, make)


@peer.case
def binary(name, sizes, dtype, copies):
    f = {"add": torch.add, "mul": torch.mul}[name]

    def make():
        x, y = _draw(sizes, dtype), _draw(sizes, dtype)
        return lambda: f(x, y)

    return _cycle(copies, make)


@peer.case
def cross_entropy(rows, classes, dtype, copies, gradient):
    def make():
        x, target = _draw((rows, classes), dtype, gradient), torch.randint(0, classes, (rows,))
        if not gradient:
            return lambda: F.cross_entropy(x, target)
        return lambda: torch.autograd.grad(F.cross_entropy(x, target), x)

    return _cycle(copies, make)


@peer.case
def projected_loss(rows, width, classes):
    x, w = _draw((rows, width), "bf16", True), _draw((classes, width), "bf16", True)
    target = torch.randint(0, classes, (rows,))
    return lambda: torch.autograd.grad(F.cross_entropy((x @ w.t()).float(), target), [x, w])


@peer.case
def adamw(sizes):
    parameters = [torch.nn.Parameter(torch.randn(*s)) for s in sizes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    return optimizer.step


@peer.case
def product(m, n, k, kind, dtype):
    """kind: forward [m, k] x [n, k]^T; towards_input [m, n] x [n, k]; towards_weight [m, n]^T x [m, k]"""
    torch.backends.cuda.matmul.allow_tf32 = True
    x, w, g = (_draw(sizes, dtype) for sizes in ((m, k), (n, k), (m, n)))
    if kind == "forward":
        return lambda: x @ w.t()
    return (lambda: g @ w) if kind == "towards_input" else (lambda: g.t() @ x)


@peer.case
def feed_forward(rows, width, hidden, activation, norm, gradient):
    list_ = [(rows, width), (hidden, width), (hidden,), (width, hidden), (width,), (hidden,), (hidden,)]
    inputs = [_draw(s, "bf16", gradient) for s in (list_ if norm else list_[:5])]
    g = _draw((rows, width), "bf16")
    how = "tanh" if activation == "gelu_tanh" else "none"

    def run(x, up, up_bias, down, down_bias, gain=None, bias=None):
        h = F.gelu(F.linear(x, up, up_bias), approximate=how)
        return F.linear(F.layer_norm(h, (hidden,), gain, bias, 1e-5) if norm else h, down, down_bias)

    return (lambda: torch.autograd.grad(run(*inputs), inputs, g)) if gradient else (lambda: run(*inputs))


peer.serve()
