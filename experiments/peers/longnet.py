"""longnet.py: LongNet-125M and its training step in PyTorch, in bf16, for the section `cuda_step`.

The model of lua/lacuna/nn/longnet.lua from the same weights: pre-LayerNorm blocks, XPOS, dilated attention, LayerNorm
on the merged heads and on the hidden layer, exact GELU, tied output; parameters and activations in bf16. AdamW is
PyTorch's fused kernel, which keeps its moments in bf16 and has no f32 masters: it moves half of what ours does.

Attention gathers the kept rows of every branch (views of the segments, made dense), calls a fused kernel once per
branch, and scatters. `all`: every head in every branch, offset h mod r, merged by the log-sum-exps. With kernel "flash"
the backward gives each branch's kernel the merged output and the merged log-sum-exp, which is the exact gradient;
cuDNN's backward cannot be called so, and there the merge's weights are constants, as in torchscale. `split`: heads are
divided over the branches, branch i at offset i mod r, and the output is divided by their number. On a CPU there is one
kernel. `compiled` compiles embedding, block and loss with torch.compile: a block once for all layers.
"""

import math

import torch
import torch.nn.functional as F

import peer

aten = torch.ops.aten


# ---- one branch: q, k, v [S, H, n, D] ----


def flash_forward(q, k, v):  # -> out, lse [S, H, n], what the backward needs
    if q.device.type == "cpu":
        return (*aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True), ())
    r = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    return r[0], r[1], (r[2], r[3], r[4], r[5], r[6], r[7])


def flash_backward(g, q, k, v, out, lse, more):
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, out, lse, 0.0, True)
    cum_q, cum_k, max_q, max_k, seed, offset = more
    return aten._scaled_dot_product_flash_attention_backward(g, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0,
                                                             True, seed, offset)


def gather(x, w, r):
    """[N, H, ...] -> [N/w, H, ceil(w/r), ...], head h at offset h mod r; what lies past a segment is 0 and never seen,
    because it comes last and attention is causal."""
    n, h = x.shape[:2]
    x = x.view(n // w, w, *x.shape[1:])
    more = -w % r
    if more:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, more))
    x = x.view(n // w, (w + more) // r, r, h // r, r, *x.shape[3:])
    x = x.diagonal(dim1=2, dim2=4)  # [S, m, H/r, ..., r]
    order = (0, x.dim() - 1, 2, 1) + tuple(range(3, x.dim() - 1))
    return x.permute(order).reshape(n // w, h, (w + more) // r, *x.shape[3:-1])


def scatter(y, n, w, r, empty):
    """The inverse of gather; rows that were not kept are `empty`."""
    s, h, m = y.shape[:3]
    rest = y.shape[3:]
    full = y.new_full((s, m, r, h // r, r, *rest), empty)
    y = y.view(s, r, h // r, m, *rest)
    order = (0, 3, 2) + tuple(range(4, y.dim())) + (1,)
    full.diagonal(dim1=2, dim2=4).copy_(y.permute(order))
    return full.view(s, m * r, h, *rest)[:, :w].reshape(n, h, *rest)


def merge(outs, lses):
    total = torch.logsumexp(torch.stack(lses), 0)
    return sum(out * torch.exp(lse - total)[..., None] for out, lse in zip(outs, lses)).to(outs[0].dtype), total


class MergedBranches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, segments, dilations):  # [N, H, D]
        n, outs, lses, ctx.more = q.shape[0], [], [], []
        for w, r in zip(segments, dilations):
            out, lse, more = flash_forward(*(gather(x, w, r) for x in (q, k, v)))
            outs.append(scatter(out, n, w, r, 0.0))
            lses.append(scatter(lse, n, w, r, -math.inf))
            ctx.more.append(more)
        merged, total = merge(outs, lses)
        ctx.save_for_backward(q, k, v, merged, total)
        ctx.setting = segments, dilations
        return merged

    @staticmethod
    def backward(ctx, g):
        q, k, v, merged, total = ctx.saved_tensors
        sums = None
        for w, r, more in zip(*ctx.setting, ctx.more):
            parts = [gather(x, w, r) for x in (g, q, k, v, merged, total)]
            pieces = [scatter(x, q.shape[0], w, r, 0.0).float() for x in flash_backward(*parts, more)]
            sums = pieces if sums is None else [a + b for a, b in zip(sums, pieces)]
        return (*(x.to(q.dtype) for x in sums), None, None)


def detached_branches(q, k, v, segments, dilations):
    n, outs, lses = q.shape[0], [], []
    for w, r in zip(segments, dilations):
        parts = [gather(x, w, r) for x in (q, k, v)]
        out, lse = aten._scaled_dot_product_cudnn_attention(*parts, None, True, 0.0, True, False)[:2]
        outs.append(scatter(out, n, w, r, 0.0))
        lses.append(scatter(lse.detach().reshape(out.shape[:3]), n, w, r, -math.inf))
    return merge(outs, lses)[0]


def split_attention(q, k, v, segments, dilations, kernel):  # [N, H, D]
    n, heads, branches = q.shape[0], q.shape[1], len(segments)
    at, parts = 0, []
    backend = torch.nn.attention.SDPBackend
    chosen = [backend.FLASH_ATTENTION if kernel == "flash" or q.device.type == "cpu" else backend.CUDNN_ATTENTION]
    for i, (w, r) in enumerate(zip(segments, dilations)):
        count = heads // branches + (i < heads % branches)
        more = -w % r

        def lattice(x):
            x = x[:, at:at + count].view(n // w, w, count, -1)
            x = F.pad(x, (0, 0, 0, 0, 0, more)) if more else x
            return x.view(n // w, (w + more) // r, r, count, -1)[:, :, i % r].transpose(1, 2)

        with torch.nn.attention.sdpa_kernel(chosen):
            out = F.scaled_dot_product_attention(*(lattice(x) for x in (q, k, v)), is_causal=True)
        out = F.pad(out.transpose(1, 2)[:, :, None], (0, 0, 0, 0, i % r, r - 1 - i % r))
        parts.append(out.reshape(n // w, w + more, count, -1)[:, :w].reshape(n, count, -1))
        at += count
    return torch.cat(parts, 1) / branches


# ---- the model ----


def xpos_table(n, start, width, sign, base=10000.0, scale_base=512.0):
    half = width // 2
    part = torch.arange(half, dtype=torch.float64) / half
    position = torch.arange(start, start + n, dtype=torch.float64)[:, None]
    angle = position * base ** -part
    factor = torch.exp(sign * position / scale_base * torch.log((part + 0.4) / 1.4))
    return (angle.cos() * factor).float()[:, None, :], (angle.sin() * factor).float()[:, None, :]  # [N, 1, D/2]


def rotate(x, cos, sin):  # x [N, H, D]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Layer(torch.nn.Module):
    """A linear map or a norm by its weight and bias."""

    def __init__(self, weights, name):
        super().__init__()
        self.weight = torch.nn.Parameter(weights[name + ".weight"])
        self.bias = torch.nn.Parameter(weights[name + ".bias"])

    def linear(self, x):
        return F.linear(x, self.weight, self.bias)

    def norm(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-5)


class Block(torch.nn.Module):
    def __init__(self, weights, name, o):
        super().__init__()
        self.o = o
        names = {"norm1": "norm1", "q": "attention.q", "k": "attention.k", "v": "attention.v",
                 "inner": "attention.norm", "out": "attention.out", "norm2": "norm2", "up": "ffn.up",
                 "hidden": "ffn.norm", "down": "ffn.down"}
        for key, path in names.items():
            setattr(self, key, Layer(weights, name + path))

    def forward(self, x, tables):  # [N, E]
        n, o = x.shape[0], self.o
        y = self.norm1.norm(x)
        q, k, v = (part.linear(y).view(n, o["heads"], -1) for part in (self.q, self.k, self.v))
        q, k = rotate(q, *tables[0]), rotate(k, *tables[1])
        if o["scheme"] == "all":
            attend = detached_branches if o["kernel"] == "cudnn" else MergedBranches.apply
            a = attend(q, k, v, o["segments"], o["dilations"])
        else:
            a = split_attention(q, k, v, o["segments"], o["dilations"], o["kernel"])
        x = x + self.out.linear(self.inner.norm(a.reshape(n, -1)))
        return x + self.down.linear(self.hidden.norm(F.gelu(self.up.linear(self.norm2.norm(x)))))


def embed(table, tokens):
    return F.embedding(tokens, table) * math.sqrt(table.shape[1])


def loss_of(norm, table, x, targets):
    return F.cross_entropy(F.linear(norm.norm(x), table).float(), targets)


class Model(torch.nn.Module):
    def __init__(self, weights, o, compiled):
        super().__init__()
        weights = {name: x.to(peer.device) for name, x in weights.items()}
        self.table = torch.nn.Parameter(weights["embedding.weight"])
        self.blocks = torch.nn.ModuleList(Block(weights, "layers.%d." % i, o) for i in range(1, o["layers"] + 1))
        self.norm = Layer(weights, "norm")
        n, d = o["context"], o["width"] // o["heads"]
        self.tables = [xpos_table(n, -(n // 2), d, sign) for sign in (1, -1)]
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.embed, self.block, self.loss_of = wrap(embed), wrap(Block.forward), wrap(loss_of)

    def forward(self, tokens, targets):
        x = self.embed(self.table, tokens)
        for block in self.blocks:
            x = self.block(block, x, self.tables)
        return self.loss_of(self.norm, self.table, x, targets)


@peer.case
def step(weights, batch, options, decay, kernel="flash", compiled=False):
    data = peer.load(batch)
    loaded = peer.load(weights)
    model = Model(loaded, dict(options, kernel=kernel), compiled)
    tokens, targets = (data[name].long().view(-1).to(peer.device) for name in ("tokens", "targets"))
    rest = [p for p in model.parameters() if p.dim() < 2] + [model.table]
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not model.table]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.98), fused=True)

    def run():
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    if peer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    info = {"loss": run(), "second_loss": run()}
    if peer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        info["peak"] = torch.cuda.max_memory_allocated()
    return run, info


peer.serve()
