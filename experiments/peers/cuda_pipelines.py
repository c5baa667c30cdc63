"""cuda_pipelines.py: PyTorch's side of the section `cuda_pipelines`: dilated attention round SDPA's kernels.

`all` is torchscale's LongNet attention: for every branch, the rows that head h keeps (offset h div ceil(H / r)) are
copied together, one kernel call attends within all segments, results and log-sum-exps are spread over the sequence
again, and branches are weighted by their log-sum-exps; the weights are constants in the gradient. `split` is fkodom's
pipeline: the heads are divided, slices of each group attend, are divided by the sum of their results over the sequence,
and are added to the output at their places. Both are written here for these sizes: segments divide the sequence,
dilations the segments. The copies are fewer than in the projects' own code. `backend` is the kernel inside.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import peer

aten = torch.ops.aten


def attend(q, k, v, causal, backend):  # [S, H, n, D] -> out, lse [S, H, n]
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    if backend == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)[:2]
        return out, lse.reshape(out.shape[:3])
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)[:2]


def together(x, w, r):  # [N, H, D] -> [N/w, H, w/r, D]; head h at offset h div ceil(H / r)
    n, h, d = x.shape
    x = F.pad(x, (0, 0, 0, -h % r))
    x = x.view(n // w, w // r, r, r, x.shape[1] // r, d).diagonal(dim1=2, dim2=3)  # [S, m, H/r, D, r]
    return x.permute(0, 4, 2, 1, 3).reshape(n // w, -1, w // r, d)[:, :h].contiguous()


def spread(x, n, r, empty):  # [S, H, m, D] -> [N, H, D], rows that were not kept are `empty`
    s, h, m, d = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -h % r)).view(s, r, -1, m, d)
    full = x.new_full((s, m, r, r, x.shape[2], d), empty)
    full.diagonal(dim1=2, dim2=3).copy_(x.permute(0, 3, 2, 4, 1))
    return full.view(n, -1, d)[:, :h]


def all_heads(q, k, v, segments, dilations, causal, backend):
    n, outs, lses = q.shape[0], [], []
    for w, r in zip(segments, dilations):
        out, lse = attend(*(together(x, w, r) for x in (q, k, v)), causal, backend)
        outs.append(spread(out, n, r, 0.0))
        lses.append(spread(lse.detach()[..., None], n, r, -math.inf))
    with torch.no_grad():
        weights = torch.softmax(torch.stack(lses), 0)
    return sum(out * weight.to(out.dtype) for out, weight in zip(outs, weights))


def head_groups(q, k, v, segments, dilations, causal, backend):
    n, heads, d = q.shape
    result, at, groups = torch.zeros_like(q), 0, len(segments)
    kernel = SDPBackend.CUDNN_ATTENTION if backend == "cudnn" else SDPBackend.FLASH_ATTENTION
    for i, (w, r) in enumerate(zip(segments, dilations)):
        count = heads // groups + (i < heads % groups)

        def slices(x):
            return x.view(n // w, w, heads, d)[:, i % r::r, at:at + count]

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if q.device.type == "cpu" else kernel):
            out = F.scaled_dot_product_attention(*(slices(x).transpose(1, 2) for x in (q, k, v)), is_causal=causal)
        out = out.transpose(1, 2)
        slices(result).add_(out / out.sum(dim=(0, 1), keepdim=True))
        at += count
    return result / groups


@peer.case
def attention(scheme, sizes, segments, dilations, causal, backward, backend, times, data=None):
    run = all_heads if scheme == "all" else head_groups
    if data:
        q, k, v, grad = (x[0].to(peer.device) for x in map(peer.load(data).get, ("q", "k", "v", "grad")))
    else:
        q, k, v, grad = (torch.randn(sizes, dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]

    def once():
        out = run(*leaves, segments, dilations, causal, backend)
        return out, torch.autograd.grad(out, leaves, grad) if backward else ()

    def several():
        for _ in range(times):
            once()
        if peer.device == "cuda":
            torch.cuda.synchronize()

    out, gradients = once()
    info = {"norm": out.double().norm().item(), "dot": (out.double() * grad.double()).sum().item()}
    if backward:
        info["gradient"] = math.sqrt(sum(x.double().pow(2).sum().item() for x in gradients))
    return several, info


peer.serve()
