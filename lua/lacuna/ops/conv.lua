--- The one-dimensional convolution.
--
-- torch's convention: x [B, C, N], w [O, C / groups, K], a correlation. The engine unfolds the input a chunk
-- at a time for one matrix product and adds rows directly where there is little to multiply (depthwise), so
-- the unfolded input never exists as a whole; groups, stride, dilation and any padding are the same code.
--
-- padding = "same" gives L = N for stride 1 (an even kernel pads one more behind, as torch does); "causal"
-- pads in front only, so that position n sees none after n. Both gradients are kernels; that of the bias is a
-- sum. Rejected: channels-last input, which would be a transposed copy inside: write x:transpose(2, 3) and
-- see it.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local C = lib.C
local call = lib.call
local fail, show, is_integer = schema.fail, schema.show, schema.is_integer
local adopt, expect = tensor.adopt, tensor.expect
local internal = ops.internal
local record, wants, new, define = internal.record, internal.wants, internal.new, internal.define

local MOST = 2 ^ 40

-- padding: an integer, {before, after}, "valid", "same" or "causal"
local function check_padding(v)
  if v == "valid" or v == "same" or v == "causal" then return end
  if type(v) == "string" then return "must be an integer, {before, after}, 'valid', 'same' or 'causal'" end
  local list = type(v) == "table" and v or { v, v }
  if #list ~= 2 then return "must be one integer or {before, after}" end
  for i = 1, 2 do
    if not is_integer(list[i]) or list[i] < 0 or list[i] > MOST then return "must not be negative" end
  end
end

local CONV = {
  stride = { type = "integer", min = 1, max = MOST, default = 1 },
  dilation = { type = "integer", min = 1, max = MOST, default = 1 },
  groups = { type = "integer", min = 1, default = 1 },
  padding = { type = { "integer", "integers", "string" }, default = 0, check = check_padding },
}

-- elements in front of and behind the N positions
local function margins(o, kernel)
  local span = o.dilation * (kernel - 1)
  if o.padding == "valid" then return 0, 0 end
  if o.padding == "causal" then return span, 0 end
  if o.padding == "same" then
    if o.stride ~= 1 then fail("conv1d", "padding 'same' needs stride 1, got %d", o.stride) end
    return math.floor(span / 2), span - math.floor(span / 2)
  end
  if type(o.padding) == "table" then return o.padding[1], o.padding[2] end
  return o.padding, o.padding
end

local conv_op = { name = "conv1d", saves = "ab" }
--- out[b, o, l] = bias[o] + sum over c, k of w[o, c, k] x[b, c, l stride + k dilation - before], 0 outside.
-- @tparam Tensor x [B, C, N] @tparam Tensor w [O, C / groups, K] @tparam[opt] Tensor bias [O]
-- @tparam[opt] table options stride (1), dilation (1), groups (1), padding: an integer for both sides (0),
-- {before, after}, "valid" (none), "same" (stride 1: as many positions as x) or "causal" (all in front)
-- @treturn Tensor [B, O, L], L = floor((N + before + after - dilation (K - 1) - 1) / stride) + 1
function conv_op.forward(x, w, bias, options)
  expect("conv1d", "x", x)
  expect("conv1d", "w", w)
  if bias ~= nil then expect("conv1d", "bias", bias) end
  local o = schema.options("conv1d", options, CONV)
  if x.c.ndim ~= 3 or w.c.ndim ~= 3 or x.c.shape[1] ~= w.c.shape[1] * o.groups then
    fail("conv1d", "x must be [B, C, N] and w [O, C / groups, K]: x is %s, w %s, groups %d", show(x), show(w),
         o.groups)
  end
  local before, after = margins(o, tonumber(w.c.shape[2]))
  local c = new()
  call(C.lac_conv1d, x.c, w.c, bias and bias.c or nil, o.stride, o.dilation, before, after, c)
  local out = adopt(c)
  if wants(x, w, bias) then
    local node = record(conv_op, out, x, w, bias)
    node.o_conv, node.before = o, before
  end
  return out
end
function conv_op.backward(node, g)
  local x, w, bias, o = node.a, node.b, node.c, node.o_conv
  local dx, dw = x.requires_grad and new() or nil, w.requires_grad and new() or nil
  if dx or dw then call(C.lac_conv1d_bwd, x.c, w.c, g.c, o.stride, o.dilation, node.before, dx, dw) end
  return dx and adopt(dx), dw and adopt(dw),
    bias and bias.requires_grad and internal.raw_reduce(C.LAC_SUM, g, 5, false) or nil
end
define(conv_op)
