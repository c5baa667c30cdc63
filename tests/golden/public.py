"""Writes public.safetensors: what the public Python code computes, for public_spec.lua.

usage: python public.py TORCHSCALE DILATED_ATTENTION_PYTORCH OUT.safetensors

The arguments are checkouts of github.com/microsoft/torchscale and of
github.com/DarcStar-Solutions-Tech/dilated-attention-pytorch; PyTorch, einops and numpy must be there. Nothing of that code
is copied: it is imported and run. What it imports for distributed training (fairscale, timm) is replaced by empty
modules, and its flash attention, which needs a GPU, by the definition in four lines. Weights are those of the
constructors, made larger where the constructor leaves them at 0 or 1, so that no parameter could be forgotten.
"""
import json
import struct
import sys
import types

import torch

TORCHSCALE, DARCSTAR, OUT = sys.argv[1:4]
sys.path[:0] = [TORCHSCALE, DARCSTAR]


def stub(name, **names):
    module = types.ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


def same(x, *_, **__):
    return x


stub("fairscale", __version__="0")
stub("fairscale.nn", checkpoint_wrapper=same, wrap=same, MOELayer=object)
stub("timm")
stub("timm.models")
stub("timm.models.layers", drop_path=same)

tensors, about = {}, {}


def put(case, **values):
    for name, value in values.items():
        tensors[case + "/" + name] = value.detach().contiguous().clone()


def state(case, module):
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            put(case, **{"state." + name: value})


def shake(module):
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)


def write():
    header, data, at = {"__metadata__": {k: json.dumps(v) for k, v in about.items()}}, [], 0
    for name, t in tensors.items():
        raw = t.numpy().tobytes()
        kind = {torch.float32: "F32", torch.int32: "I32", torch.bool: "BOOL"}[t.dtype]
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(OUT, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(data))


# ---- torchscale -----------------------------------------------------------------------------------------


def attention(q, k, v, dropout=0.0, bias=None, scale=None, is_causal=False):
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        n, m = s.shape[-2:]
        s = s.masked_fill(torch.ones(n, m, dtype=torch.bool).tril(m - n).logical_not(), float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", s.softmax(-1), v), s.logsumexp(-1)


import torchscale.component.multihead_attention as ts_attention  # noqa: E402
from torchscale.architecture.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig  # noqa: E402
from torchscale.model.LongNet import LongNetDecoder, LongNetEncoder  # noqa: E402

ts_attention.flash_attn_func = attention
SCHEME = dict(segment_length=[4, 8, 16], dilated_ratio=[1, 2, 4])
SIZES = dict(embed_dim=16, ffn_embed_dim=32, attention_heads=4, layers=2)


def sized(side):
    return {f"{side}_{name}": value for name, value in SIZES.items()}


def configured(config, more):
    for name, value in dict(SCHEME, flash_attention=True, seq_parallel=False, no_scale_embedding=False, **more).items():
        setattr(config, name, value)
    return config


def embedding():
    return torch.nn.Embedding(13, 16)


def run(case, module, output, gradients=True, **inputs):
    out = output()
    dout = torch.randn_like(out)
    (out * dout).sum().backward()
    state(case, module)
    put(case, out=out, dout=dout, **inputs)
    for name, p in module.named_parameters() if gradients else ():
        if p.grad is not None:
            put(case, **{"grad." + name: p.grad})
    about[case] = dict(SCHEME, **SIZES)


torch.manual_seed(1)
tokens = torch.randint(0, 13, (2, 16))
config = configured(DecoderConfig(vocab_size=13, subln=True, xpos_rel_pos=True, **sized("decoder")), {})
decoder = LongNetDecoder(config, embed_tokens=embedding())
shake(decoder)
run("torchscale.decoder", decoder, lambda: decoder(tokens)[0], tokens=tokens.int())

config = configured(EncoderConfig(vocab_size=13, subln=True, no_output_layer=True, xpos_rel_pos=True, **sized("encoder")), {})
encoder = LongNetEncoder(config, embed_tokens=embedding())
shake(encoder)
run("torchscale.encoder", encoder, lambda: encoder(tokens)["encoder_out"], False, tokens=tokens.int())

config = configured(
    EncoderDecoderConfig(vocab_size=13, subln=True, no_output_layer=False, xpos_rel_pos=True, **sized("encoder"), **sized("decoder")), {})
both = torch.nn.Module()
config.no_output_layer = True
both.encoder = LongNetEncoder(config, embed_tokens=embedding(), is_encoder_decoder=True)
config.no_output_layer = False
both.decoder = LongNetDecoder(config, embed_tokens=embedding(), is_encoder_decoder=True)
shake(both)
source = torch.randint(0, 13, (2, 8))
run("torchscale.encoder_decoder", both, lambda: both.decoder(tokens, encoder_out=both.encoder(source))[0],
    False, tokens=tokens.int(), source=source.int())

# ragged: 10 positions are no whole number of segments; zero keys enter its softmax
config = configured(DecoderConfig(vocab_size=13, subln=True, xpos_rel_pos=False, **sized("decoder")), {})
layer = LongNetDecoder(config, embed_tokens=embedding()).layers[0].self_attn
x = torch.randn(1, 10, 16)
state("torchscale.ragged", layer)
put("torchscale.ragged", x=x, out=layer(x, x, x)[0])

# ---- DarcStar -------------------------------------------------------------------------------------------

import dilated_attention_pytorch as ds  # noqa: E402
from dilated_attention_pytorch.improved_dilated_attention import ImprovedDilatedAttention  # noqa: E402
from dilated_attention_pytorch.multihead_dilated_attention import MultiheadDilatedAttention  # noqa: E402

torch.manual_seed(2)
for case, causal in (("darcstar.dilated", False), ("darcstar.dilated_causal", True)):
    q, k, v = (torch.randn(2, 16, 6, 4, requires_grad=True) for _ in range(3))
    out = ds.DilatedAttention([4, 8, 16], [1, 2, 4])(q, k, v, is_causal=causal)
    dout = torch.randn_like(out)
    out.backward(dout)
    put(case, q=q, k=k, v=v, out=out, dout=dout, dq=q.grad, dk=k.grad, dv=v.grad)
q, k, v = (torch.randn(1, 16, 6, 4) for _ in range(3))
put("darcstar.improved", q=q, k=k, v=v, out=ImprovedDilatedAttention([4, 8, 16], [1, 2, 4])(q, k, v))
module = MultiheadDilatedAttention(
    24, 6, segment_lengths=[4, 8, 16], dilation_rates=[1, 2, 4], layer_norm=False)
shake(module)
x = torch.randn(2, 16, 24)
run("darcstar.multihead", module, lambda: module(x, x, x, is_causal=True), x=x)

# ---- torch.nn.MultiheadAttention ------------------------------------------------------------------------

torch.manual_seed(3)
mha = torch.nn.MultiheadAttention(16, 4, batch_first=True)
shake(mha)
query, key = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
mask = torch.arange(7)[None] >= torch.tensor([[4], [7]])
out, weights = mha(query, key, key, key_padding_mask=mask)
state("torch.mha", mha)
put("torch.mha", query=query, key=key, key_padding_mask=mask, out=out, weights=weights,
    each=mha(query, key, key, key_padding_mask=mask, average_attn_weights=False)[1])
write()
