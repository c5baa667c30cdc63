--- Positions and masks: RoPE, XPOS, ALiBi, causal masks; and draws by weight.
--
-- rope is a kernel: angles in double, one table per call, its gradient the transposed rotation. Positions are
-- start, start + 1, ... or a tensor of them, which serves packed sequences and batches whose rows stand at
-- different places. ALiBi (Press, Smith and Lewis 2022) and masks are small tensors made from aranges; they
-- are built in f32 or bool and on demand, because a model that needs them every step keeps them.
--
-- Where queries and keys differ in number, the last query sits at the last key: that is what decoding means.
-- multinomial draws from the global Philox stream; a draw depends on its row and place only, not on threads.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops.base"

local C = lib.C
local call = lib.call
local adopt, expect = tensor.adopt, tensor.expect
local fn = ops.fn
local internal = ops.internal
local record1, wants, new, define = internal.record1, internal.wants, internal.new, internal.define

-- ---- rotary positions -----------------------------------------------------------------------------

local ROPE = {
  start = { type = "integer", default = 0 },
  positions = { type = "tensor" },
  base = { type = "number", above = 0, default = 10000 },
  interleaved = { type = "boolean", default = false },
  scale_base = { type = "number", min = 0, default = 0 },
  sign = { one_of = { 1, -1 }, default = 1 },
}

local function rotated(x, o, transpose)
  local c, p = new(), o.positions
  call(C.lac_rope, x.c, p and p.c or nil, o.start, o.base, o.interleaved and 1 or 0, o.scale_base, o.sign,
    transpose,
       c)
  return adopt(c)
end

local rope_op = { name = "rope" }
--- Rotary positions (Su et al. 2021, eq. 34), and XPOS decay (Sun et al. 2022, eq. 9) if scale_base > 0.
-- @tparam Tensor x [B, N, H, D]
-- @tparam[opt] table options positions (i64 or i32 [N] or [B, N], at least 0; 0, 1, ... unless given), start
-- (added to them, 0), base (10000), interleaved (false: pairs are i, i + D/2), scale_base (0: no XPOS), sign
-- (1 for queries, -1 for keys)
function rope_op.forward(x, options)
  expect("rope", "x", x)
  local o = schema.options("rope", options, ROPE)
  if o.sign < 0 and o.scale_base == 0 then
    schema.fail("rope", "sign = -1 is of XPOS' decay, and without scale_base there is none: keys rotate as "
      .. "queries do")
  end
  local out = rotated(x, o, 0)
  if wants(x) then
    record1(rope_op, out, x)
    out.node.o_rope = o
    if o.positions then internal.remember(out.node, o.positions) end
  end
  return out
end
function rope_op.backward(node, g) return rotated(g, node.o_rope, 1) end
define(rope_op)

-- ---- masks and linear biases ------------------------------------------------------------------------

local POSITIVE = { type = "integer", min = 1, max = 2 ^ 31 }

-- query minus key position, f32 [n, m]: the last query at the last key unless offset says otherwise
local function distances(n, m, offset, dev)
  local rows = create.arange({ offset, offset + n }, { dtype = "i64", device = dev })
  return fn.unsqueeze(rows, 2) - create.arange({ m }, { dtype = "i64", device = dev })
end

local MASK = { offset = { type = "integer" }, device = { type = "string" } }

local function counts(op, n, m)
  schema.check(op, "n", n == nil and false or n, POSITIVE)
  m = m == nil and n or m
  schema.check(op, "m", m, POSITIVE)
  return m
end

--- Which of m keys each of n queries may see: bool [n, m], true at and before its own position.
-- @tparam integer n @tparam[opt=n] integer m
-- @tparam[opt] table options offset (position of the first query, m - n), device
define { name = "causal_mask", nondifferentiable = true, method = false, forward = function(n, m, options)
  m = counts("causal_mask", n, m)
  local o = schema.options("causal_mask", options, MASK)
  return fn.ge(distances(n, m, o.offset or m - n, o.device), 0)
end }

local function geometric(heads)
  local slopes = {}
  for i = 1, heads do slopes[i] = 2 ^ (-8 * i / heads) end
  return slopes
end

local TYPED = { dtype = { type = "string" }, device = { type = "string" } }

--- The slopes of ALiBi (Press, Smith and Lewis 2022, section 3): 2^(-8 i / H) for a power of two; else those
-- of the next smaller power of two and every second of the next larger one.
-- @tparam integer heads @tparam[opt] table options dtype, device
-- @treturn Tensor [heads]
define { name = "alibi_slopes", nondifferentiable = true, method = false, forward = function(heads, options)
  schema.check("alibi_slopes", "heads", heads == nil and false or heads, { type = "integer", min = 1,
    max = 4096 })
  local o = schema.options("alibi_slopes", options, TYPED)
  local power = 1
  while power * 2 <= heads do power = power * 2 end
  local slopes, finer = geometric(power), geometric(2 * power)
  for i = 1, 2 * (heads - power), 2 do slopes[#slopes + 1] = finer[i] end
  return create.tensor(slopes, { dtype = o.dtype or "f32", device = o.device })
end }

local BIAS = { offset = MASK.offset, device = MASK.device, dtype = TYPED.dtype,
               causal = { type = "boolean", default = false } }

--- ALiBi's bias for attention scores: -slope |query position - key position|.
-- @tparam integer heads @tparam integer n queries @tparam[opt=n] integer m keys
-- @tparam[opt] table options causal (false; true: -inf after the query), offset (position of the first query,
-- m - n), dtype, device
-- @treturn Tensor [heads, n, m]
define { name = "alibi_bias", nondifferentiable = true, method = false, forward = function(heads, n, m,
  options)
  m = counts("alibi_bias", n, m)
  local o = schema.options("alibi_bias", options, BIAS)
  local dtype = device.dtype("alibi_bias", o.dtype or "f32")
  local slopes = fn.alibi_slopes(heads, { dtype = "f32", device = o.device })
  local far = distances(n, m, o.offset or m - n, o.device)
  local bias = fn.mul(tensor.cast(fn.neg(fn.abs(far)), C.LAC_F32), slopes:view(heads, 1, 1))
  if o.causal then bias = fn.where(fn.ge(far, 0), bias, -math.huge) end
  return dtype == C.LAC_F32 and bias or tensor.cast(bias, dtype)
end }

-- ---- draws by weight ----------------------------------------------------------------------------------

--- Random indices in proportion to weights.
-- @tparam Tensor weights [N] or [R, N] floats, not negative; they need not sum to 1
-- @tparam integer samples @tparam[opt=false] boolean replacement false: each index at most once, in the order
-- in which they would be drawn one after the other
-- @treturn Tensor i64 [samples] or [R, samples], 0-based
define { name = "multinomial", nondifferentiable = true, forward = function(weights, samples, replacement)
  expect("multinomial", "weights", weights)
  schema.check("multinomial", "samples", samples == nil and false or samples, { type = "integer", min = 0 })
  if replacement ~= nil then schema.check("multinomial", "replacement", replacement, { type = "boolean" }) end
  local seed, offset = create.draw()
  local c = new()
  call(C.lac_multinomial, weights.c, samples, replacement and 1 or 0, seed, offset, c)
  return adopt(c)
end }
