"""Writes torch_mha.safetensors: what torch.nn.MultiheadAttention computes, for torch_mha_spec.lua.

usage: python torch_mha.py OUT.safetensors

Every option of the module and of its call, alone and together; values, weights and gradients in f32. Weights are those
of the constructor, made larger where it leaves them at 0 or small.
"""
import json
import struct
import sys

import torch

E, H, B, N, M = 12, 3, 2, 5, 7
tensors, about = {}, {}


def put(case, **values):
    for name, value in values.items():
        tensors[case + "/" + name] = value.detach().contiguous().clone()


def float_mask(*shape):
    mask = torch.randn(*shape)
    mask[..., 1] = float("-inf")
    return mask


def bool_mask(*shape):
    mask = torch.rand(*shape) < 0.4
    mask[..., 0] = False
    return mask


def case(name, module=None, call=None, lengths=(N, M, M), batch=True, first=True):
    torch.manual_seed(len(about) + 1)
    module, call = module or {}, call or {}
    mha = torch.nn.MultiheadAttention(E, H, batch_first=first, **module)
    for p in mha.parameters():
        p.data += 0.2 * torch.randn_like(p)
    widths = (E, module.get("kdim") or E, module.get("vdim") or E)
    inputs = []
    for rows, width in zip(lengths, widths):
        shape = (rows, width) if not batch else (B, rows, width) if first else (rows, B, width)
        inputs.append(torch.randn(*shape, requires_grad=True))
    tensor_options, plain = {}, {}
    for key, value in call.items():
        value = value() if callable(value) else value
        (tensor_options if torch.is_tensor(value) else plain)[key] = value
    out, weights = mha(*inputs, **tensor_options, **plain)
    dout = torch.randn_like(out)
    out.backward(dout)
    about[name] = {"module": dict(module, batch_first=first), "call": plain}
    put(name, query=inputs[0], key=inputs[1], value=inputs[2], out=out, dout=dout, dquery=inputs[0].grad,
        dkey=inputs[1].grad, dvalue=inputs[2].grad, **{"call." + k: v for k, v in tensor_options.items()})
    if weights is not None:
        put(name, weights=weights)
    for key, value in mha.state_dict().items():
        put(name, **{"state." + key: value})
    for key, value in mha.named_parameters():
        put(name, **{"grad." + key: value.grad})


each = {"average_attn_weights": False}
case("plain")
case("no_weights", call={"need_weights": False})
case("each_head", call=each)
case("no_bias", {"bias": False})
case("second", first=False, call=each)
case("unbatched", batch=False, call=each)
case("unbatched_masks", batch=False, call={"key_padding_mask": lambda: bool_mask(M),
                                           "attn_mask": lambda: bool_mask(H, N, M), **each})
case("widths", {"kdim": 5, "vdim": 8}, each)
case("padding_bool", call={"key_padding_mask": lambda: bool_mask(B, M)})
case("padding_float", call={"key_padding_mask": lambda: float_mask(B, M)})
case("mask_bool", call={"attn_mask": lambda: bool_mask(N, M), **each})
case("mask_float", call={"attn_mask": lambda: float_mask(N, M), **each})
case("mask_bool_heads", call={"attn_mask": lambda: bool_mask(B * H, N, M), **each})
case("mask_float_heads", call={"attn_mask": lambda: float_mask(B * H, N, M), **each})
case("masks_float", call={"attn_mask": lambda: float_mask(N, M), "key_padding_mask": lambda: float_mask(B, M)})
case("bias_kv", {"add_bias_kv": True}, each)
case("zero_attn", {"add_zero_attn": True}, each)
case("both", {"add_bias_kv": True, "add_zero_attn": True}, each)
case("both_masks", {"add_bias_kv": True, "add_zero_attn": True},
     {"attn_mask": lambda: bool_mask(N, M), "key_padding_mask": lambda: bool_mask(B, M), **each})
case("both_float", {"add_bias_kv": True, "add_zero_attn": True},
     {"attn_mask": lambda: float_mask(B * H, N, M), "key_padding_mask": lambda: float_mask(B, M), **each})
case("both_widths", {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5, "vdim": 8}, each, first=False)
case("causal", call={"attn_mask": lambda: torch.ones(N, N, dtype=torch.bool).triu(1), "is_causal": True,
                     "need_weights": False}, lengths=(N, N, N))

header, data, at = {"__metadata__": {k: json.dumps(v) for k, v in about.items()}}, [], 0
for name, t in tensors.items():
    raw = t.numpy().tobytes()
    header[name] = {"dtype": "BOOL" if t.dtype == torch.bool else "F32", "shape": list(t.shape),
                    "data_offsets": [at, at + len(raw)]}
    data.append(raw)
    at += len(raw)
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(sys.argv[1], "wb") as f:
    f.write(struct.pack("<Q", len(text)) + text + b"".join(data))
