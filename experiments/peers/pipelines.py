"""pipelines.py: dilated attention as two public projects compute it, on a CPU, from q, k, v to the merged output.

Their files are imported from the folders given (dilated-attention-pytorch by fkodom, torchscale by Microsoft) and run
as they are. What they call for attention itself exists on CUDA only: xformers' memory_efficient_attention and the
flash_attn package. Both calls are answered here by PyTorch's CPU flash kernel, the fastest thing that takes their
place, so what is measured is their pipeline round the best available kernel. Needs the package einops.
"""

import importlib
import importlib.util
import math
import sys
import types

import torch

import peer

try:
    import einops  # noqa: F401: both projects need it
except ImportError as error:
    sys.exit("no einops in %s: %s" % (sys.executable, error))

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def efficient_attention(query, key, value, op=None, attn_bias=None):  # [B, N, H, D], as xformers
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=attn_bias is not None).transpose(1, 2)


def flash_attention(q, k, v, dropout=0.0, bias=None, softmax_scale=None, is_causal=False):  # as flash_attn
    out, lse = flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout, is_causal)
    return out.transpose(1, 2), lse


def fkodom_module(folder, segments, dilations):
    ops = types.SimpleNamespace(memory_efficient_attention=efficient_attention, LowerTriangularMask=object,
                                AttentionOp=object)
    package = types.ModuleType("xformers")
    package.ops = ops
    sys.modules["xformers"], sys.modules["xformers.ops"] = package, ops
    spec = importlib.util.spec_from_file_location("fkodom_attention",
                                                  folder + "/dilated_attention_pytorch/dilated_attention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    attention = module.DilatedAttention(segments, dilations)
    return lambda q, k, v, causal: attention(q, k, v, is_causal=causal)


def torchscale_module(folder, segments, dilations, heads, width):
    sys.path.insert(0, folder)
    module = importlib.import_module("torchscale.component.dilated_attention")
    base = importlib.import_module("torchscale.component.multihead_attention")
    base.flash_attn_func = flash_attention
    args = types.SimpleNamespace(multiway=False, flash_attention=True, xpos_rel_pos=False, layernorm_eps=1e-5,
                                 segment_length=segments, dilated_ratio=dilations, seq_parallel=False)
    attention = module.DilatedAttention(args, width, heads, self_attention=True)

    def run(q, k, v, causal):  # the body of its forward between the projections
        outs, lses = [], []
        for sl, dr in zip(segments, dilations):
            ki, vi, qi = (attention.gathering(x, dr, sl, is_causal=causal, is_kv=kv, seq_parall=False)
                          for x, kv in ((k, True), (v, True), (q, False)))
            out, lse = attention.attention_ops(qi, ki, vi, is_causal=causal)
            outs.append(out)
            lses.append(lse)
        return attention.scattering(outs, lses, q.shape[1], q.shape[0]).view(q.shape)

    return run


@peer.case
def attention(project, folder, data, segments, dilations, causal, backward):
    tensors = peer.load(data)
    q, k, v, grad = (tensors[name] for name in ("q", "k", "v", "grad"))
    if project == "fkodom":
        run = fkodom_module(folder, segments, dilations)
    else:
        run = torchscale_module(folder, segments, dilations, q.shape[2], q.shape[2] * q.shape[3])
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]

    def once():
        out = run(*leaves, causal)
        if backward:
            for x in leaves:
                x.grad = None
            out.backward(grad)
        return out.detach()

    out = once()
    info = {"norm": out.double().norm().item(), "dot": (out.double() * grad).sum().item()}
    if backward:
        info["gradient"] = math.sqrt(sum(x.grad.double().pow(2).sum().item() for x in leaves))
    return once, info


peer.serve()
