"""demo_model.py: the model of experiments/language_model.lua and its training step in PyTorch.

The same mathematics from the same weights: pre-LayerNorm blocks, XPOS, LongNet attention (every head in every branch,
offset h mod r, one softmax over the union of the branches' keys), LayerNorm on the merged heads and on the hidden
layer, exact GELU, tied output; AdamW (PyTorch's fused kernel), gradient norm clipped to 1. Attention is written in the
two ways that a PyTorch user has on a CPU, and the benchmark takes the faster one on the machine where it runs:

union     one call of scaled_dot_product_attention on all positions with an additive bias [H, N, N]: the logarithm of
          the number of branches that join a pair, -inf for pairs that no branch joins;
branches  one call of the flash kernel per branch and offset on strided views, whose log-sum-exps merge the results;
          the backward gives that kernel the merged output and the merged log-sum-exp, which is the exact gradient.

`compiled` wraps the model in torch.compile (which needs a C++ compiler at run time) and is reported beside it.
"""

import math

import torch
import torch.nn.functional as F

import peer

aten = torch.ops.aten


def xpos_table(n, start, width, base, scale_base, sign):
    half = width // 2
    part = torch.arange(half, dtype=torch.float64) / half
    position = torch.arange(start, start + n, dtype=torch.float64)[:, None]
    angle = position * base ** -part
    factor = torch.exp(sign * position / scale_base * torch.log((part + 0.4) / 1.4))
    return (angle.cos() * factor).float()[:, None, :], (angle.sin() * factor).float()[:, None, :]  # [N, 1, D/2]


def rotate(x, table):  # x [B, N, H, D]
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Lattices:
    """The strided views of every (branch, offset): heads h with h mod r == o see positions o, o + r, ... of a segment."""

    def __init__(self, n, heads, segments, dilations):
        self.parts = []
        for w, r in zip(segments, dilations):
            w = min(w, n)
            assert n % w == 0 and w % r == 0 and heads % r == 0, "the peer's branches divide evenly"
            for o in range(r):
                self.parts.append((w, r, o))

    @staticmethod
    def take(x, w, r, o):  # [B, N, H, ...] -> [B * N/w, w/r, H/r, ...], no copy of more than the kept rows
        b, n, h = x.shape[:3]
        rest = x.shape[3:]
        return x.view(b * (n // w), w // r, r, h // r, r, *rest)[:, :, o, :, o]


class BranchAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lattices):  # [B, N, H, D]
        outs, lses = [], []
        total = q.new_full(q.shape[:3], -math.inf)
        for part in lattices.parts:
            a, b, c = (lattices.take(x, *part).transpose(1, 2) for x in (q, k, v))
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(a, b, c, 0.0, True)
            at = lattices.take(total, *part)
            at.copy_(torch.logaddexp(at, lse.transpose(1, 2)))
            outs.append(out)
            lses.append(lse)
        merged = torch.zeros_like(q)
        for part, out, lse in zip(lattices.parts, outs, lses):
            weight = torch.exp(lse.transpose(1, 2) - lattices.take(total, *part))
            lattices.take(merged, *part).add_(out.transpose(1, 2) * weight[..., None])
        ctx.save_for_backward(q, k, v, merged, total)
        ctx.lattices = lattices
        return merged

    @staticmethod
    def backward(ctx, grad):
        q, k, v, merged, total = ctx.saved_tensors
        grad = grad.contiguous()
        sums = [torch.zeros_like(x) for x in (q, k, v)]
        for part in ctx.lattices.parts:
            g, a, b, c, out = (ctx.lattices.take(x, *part).transpose(1, 2) for x in (grad, q, k, v, merged))
            lse = ctx.lattices.take(total, *part).transpose(1, 2).contiguous()
            pieces = aten._scaled_dot_product_flash_attention_for_cpu_backward(g, a, b, c, out, lse, 0.0, True)
            for into, piece in zip(sums, pieces):
                ctx.lattices.take(into, *part).add_(piece.transpose(1, 2))
        return (*sums, None)


def union_bias(n, heads, segments, dilations):
    p = torch.arange(n)
    count = torch.zeros(heads, n, n)
    for w, r in zip(segments, dilations):
        for h in range(heads):
            kept = (p % w) % r == h % r
            count[h] += (p[:, None] // w == p[None] // w) & kept[:, None] & kept[None] & (p[:, None] >= p[None])
    return count.log()


class Model(torch.nn.Module):
    def __init__(self, weights, o, attention):
        super().__init__()
        self.o, self.attention = o, attention
        self.table = torch.nn.ParameterDict()
        for name, value in weights.items():
            self.table[name.replace(".", "_")] = torch.nn.Parameter(value)
        n, d = o["context"], o["width"] // o["heads"]
        self.tables = [xpos_table(n, -(n // 2), d, 10000.0, 512.0, sign) for sign in (1, -1)]
        self.bias = union_bias(n, o["heads"], o["segments"], o["dilations"])
        self.lattices = Lattices(n, o["heads"], o["segments"], o["dilations"])

    def p(self, name):
        return self.table[name.replace(".", "_")]

    def linear(self, x, name):
        return F.linear(x, self.p(name + ".weight"), self.p(name + ".bias"))

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.p(name + ".weight"), self.p(name + ".bias"), 1e-5)

    def attend(self, x, name):
        b, n, e = x.shape
        q, k, v = (self.linear(x, name + "." + part).view(b, n, self.o["heads"], -1) for part in "qkv")
        q, k = rotate(q, self.tables[0]), rotate(k, self.tables[1])
        if self.attention == "branches":
            out = BranchAttention.apply(q, k, v, self.lattices)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2)
        return self.linear(self.norm(out.reshape(b, n, e), name + ".norm"), name + ".out")

    def forward(self, tokens, targets):
        embedding = self.p("embedding.weight")
        x = F.embedding(tokens, embedding) * math.sqrt(self.o["width"])
        for i in range(1, self.o["layers"] + 1):
            block = "layers.%d." % i
            x = x + self.attend(self.norm(x, block + "norm1"), block + "attention")
            h = F.gelu(self.linear(self.norm(x, block + "norm2"), block + "ffn.up"))
            x = x + self.linear(self.norm(h, block + "ffn.norm"), block + "ffn.down")
        logits = F.linear(self.norm(x, "norm"), embedding)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def prepare(weights, batch, options, decay, attention, compiled):
    data = peer.load(batch)
    model = Model(peer.load(weights), options, attention)
    tokens, targets = data["tokens"].long(), data["targets"].long()
    groups = [{"params": [], "weight_decay": 0.05}, {"params": [], "weight_decay": 0.0}]
    for name in sorted(peer.load(weights)):
        groups[0 if name in decay else 1]["params"].append(model.p(name))
    optimizer = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.98), fused=True)
    run = torch.compile(model) if compiled else model
    parameters = list(model.parameters())

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = run(tokens, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item(), norm.item()

    loss, norm = step()
    return step, {"loss": loss, "norm": norm, "second_loss": step()[0]}


@peer.case
def step(weights, batch, options, decay, attention, compiled=False):
    return prepare(weights, batch, options, decay, attention, compiled)


peer.serve()
