"""ops.py: PyTorch's side of the section `ops`: sorting, indexing, convolutions and losses."""

import peer
import torch
import torch.nn.functional as F


@peer.case
def sort(rows, n):
    x = torch.randn(rows, n)
    return lambda: torch.sort(x, dim=-1, stable=True)


@peer.case
def topk(rows, n, k):
    x = torch.randn(rows, n)
    return lambda: torch.topk(x, k, dim=-1)


@peer.case
def subtract(rows):
    x, y = torch.randn(rows, 4), torch.randn(4)
    return lambda: x - y


@peer.case
def multiply(rows):
    x, y = torch.randn(rows // 16, 64), torch.randn(64)
    return lambda: x * y


@peer.case
def sum_short(rows):
    x = torch.randn(rows, 4)
    return lambda: x.sum(1)


@peer.case
def max_pool1d(rows):
    x = torch.randn(rows // 16, 64)
    return lambda: F.max_pool1d(x, 4)


@peer.case
def logical_and(rows):
    x = torch.randn(rows, 4)
    mask, other = x > 0, x < 1
    return lambda: torch.logical_and(mask, other)


@peer.case
def scatter_last(rows):
    x, at = torch.randn(rows // 64, 256), torch.randint(0, 256, (rows // 64, 256))
    return lambda: x.scatter_add(1, at, x)


@peer.case
def scatter_add(rows, n, width):
    index, source = torch.randint(0, rows, (n, width)), torch.randn(n, width)
    base = torch.zeros(rows, width)
    return lambda: base.scatter_add(0, index, source)


@peer.case
def embedding_backward(rows, width, tokens):
    table = torch.randn(rows, width, requires_grad=True)
    index, g = torch.randint(0, rows, (tokens,)), torch.randn(tokens, width)
    out = F.embedding(index, table)
    return lambda: torch.autograd.grad(out, table, g, retain_graph=True)


def _conv(batch, channels, n, kernel, groups):
    x = torch.randn(batch, channels, n, requires_grad=True)
    w = torch.randn(channels, channels // groups, kernel, requires_grad=True)
    return x, w


@peer.case
def conv1d(batch, channels, n, kernel, groups):
    x, w = _conv(batch, channels, n, kernel, groups)
    x, w = x.detach(), w.detach()
    return lambda: F.conv1d(x, w, padding=kernel // 2, groups=groups)


@peer.case
def conv1d_backward(batch, channels, n, kernel, groups):
    x, w = _conv(batch, channels, n, kernel, groups)
    out = F.conv1d(x, w, padding=kernel // 2, groups=groups)
    g = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (x, w), g, retain_graph=True)


@peer.case
def cross_entropy(rows, classes):
    x, target = torch.randn(rows, classes), torch.randint(0, classes, (rows,))
    return lambda: F.cross_entropy(x, target)


@peer.case
def cross_entropy_backward(rows, classes):
    x, target = torch.randn(rows, classes, requires_grad=True), torch.randint(0, classes, (rows,))
    out = F.cross_entropy(x, target)
    return lambda: torch.autograd.grad(out, x, retain_graph=True)


@peer.case
def einsum(batch, n, heads, width):
    q, k = torch.randn(batch, n, heads, width), torch.randn(batch, n, heads, width)
    return lambda: torch.einsum("bnhd,bmhd->bhnm", q, k)


peer.serve()
