--- Elementwise operators, made from the engine's own list.
--
-- Every function of c/maps.def becomes an operator here by asking the engine for names and ids, so a new
-- activation is one line of C and nothing in Lua. A function of two arguments takes tensors that broadcast,
-- or one tensor and a number; a gradient towards a broadcast argument is summed back to its shape.
--
-- These are the hottest functions of the library: one struct, one call, one tensor, one tape node, written
-- out four times rather than passed through a general helper with varargs, which LuaJIT would not compile.
-- add and sub have rules of their own, because their gradients need no engine call at all. Functions with
-- constants (leaky_relu's slope, clamp's bounds) and functions of three tensors are rarer: one general form
-- each, at the end.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local ffi, C, flags = lib.ffi, lib.C, lib.flags
local recover, raise, attend, call = lib.recover, lib.raise, lib.attend, lib.call
local fail, show = schema.fail, schema.show
local is, adopt, expect, tape = tensor.is, tensor.adopt, tensor.expect, tensor.tape
local Tensor, ctensor, fn = tensor.class, tensor.ctype, ops.fn
local internal = ops.internal
local record, record1, record2 = internal.record, internal.record1, internal.record2
local sum_to, wants, scalar_like = internal.sum_to, internal.wants, internal.scalar_like
local raw_map1, define = internal.raw_map1, internal.define

-- ---- elementwise, from the engine's list --------------------------------------------------------

-- max and min of one tensor are reductions; and, or, not are keywords of Lua
local RENAME = { max = "maximum", min = "minimum", ["and"] = "logical_and", ["or"] = "logical_or",
                 xor = "logical_xor", ["not"] = "logical_not" }
local NO_GRADIENT = { isnan = true, isfinite = true, isinf = true, bitwise_not = true, bitwise_and = true,
                      bitwise_or = true, bitwise_xor = true, bitwise_left_shift = true,
                      bitwise_right_shift = true, eq = true, ne = true, lt = true, le = true, gt = true,
                      ge = true, logical_not = true, logical_and = true, logical_or = true,
                      logical_xor = true }

-- Lua drops arguments that a function does not name; PyTorch's gelu(x, "tanh") and add(x, y, alpha) would
-- give other values than asked for
local function too_many(name, count, argument)
  local hint = name == "gelu" and "; the approximation by tanh is gelu_tanh" or ""
  fail(name, "takes %s, got %s as well%s", count, show(argument), hint)
end

local function define_map1(engine_name, id)
  local name = RENAME[engine_name] or engine_name
  local op = { name = name, map = 1, saves = "ao" }
  local differentiable = not NO_GRADIENT[name]
  function op.forward(x, more)
    if not is(x) then expect(name, "x", x) end
    if more ~= nil then too_many(name, "one tensor", more) end
    local c = ctensor()
    local status = C.lac_map1(id, x.c, c)
    if status ~= 0 then
      if recover(status) then status = C.lac_map1(id, x.c, c) end
      if status ~= 0 then raise(status, name, engine_name) end
    end
    if flags.attention ~= 0 then attend() end
    local out = adopt(c)
    if differentiable and x.requires_grad and tape.enabled then record1(op, out, x) end
    return out
  end
  if differentiable then
    function op.backward(node, g)
      local c = ctensor()
      call(C.lac_map1_bwd, id, node.a.c, node.o.c, g.c, c)
      return adopt(c)
    end
  end
  define(op)
end

-- map2 of a tensor and a number
local function map2_scalar(op, id, differentiable, x, y, swapped)
  local c = ctensor()
  local status = C.lac_map2_scalar(id, x.c, y, swapped, c)
  if status ~= 0 then
    if recover(status) then status = C.lac_map2_scalar(id, x.c, y, swapped, c) end
    if status ~= 0 then raise(status, op.name, op.engine_name) end
  end
  if flags.attention ~= 0 then attend() end
  local out = adopt(c)
  if differentiable and x.requires_grad and tape.enabled then
    out.requires_grad = true
    -- the number sits in vb, where a second input's version would be, and the order in the record: two fields
    -- more would double the node's size
    out.node = { op = swapped == 0 and op or op.swapped, a = x, b = false, o = out, va = x.root.version,
                 vb = y, g = false, n = 0 }
  end
  return out
end

local function bad_operands(name, x, y)
  if is(x) then fail(name, "the second operand must be a tensor or a number, got %s", show(y)) end
  fail(name, "the first operand must be a tensor or a number, got %s", show(x))
end

local function as_number(v)
  if type(v) == "boolean" then return v and 1 or 0 end
  return v
end

local function define_map2(name, id)
  local passes = name == "add" or name == "sub" -- their rules hand g on and read no input
  local op = { name = RENAME[name] or name, engine_name = name, map = 2, saves = passes and "" or "ab",
               alias = passes }
  local differentiable = not NO_GRADIENT[op.name]
  function op.forward(x, y, more)
    if more ~= nil then too_many(op.name, "two operands", more) end
    if not is(y) then
      y = as_number(y)
      if type(y) ~= "number" or not is(x) then bad_operands(op.name, x, y) end
      return map2_scalar(op, id, differentiable, x, y, 0)
    elseif not is(x) then
      x = as_number(x)
      if type(x) ~= "number" then bad_operands(op.name, x, y) end
      return map2_scalar(op, id, differentiable, y, x, 1)
    end
    local c = ctensor()
    local status = C.lac_map2(id, x.c, y.c, c)
    if status ~= 0 then
      if recover(status) then status = C.lac_map2(id, x.c, y.c, c) end
      if status ~= 0 then raise(status, op.name, op.engine_name) end
    end
    if flags.attention ~= 0 then attend() end
    local out = adopt(c)
    if differentiable and tape.enabled and (x.requires_grad or y.requires_grad) then
      record2(op, out, x, y)
    end
    return out
  end
  if differentiable then
    function op.backward(node, g)
      local a, b = node.a, node.b
      if not b then
        local c = ctensor()
        call(C.lac_map2_scalar_bwd, id, a.c, node.vb, node.op == op and 0 or 1, g.c, c)
        return adopt(c)
      end
      local ga, gb
      if a.requires_grad and b.requires_grad then
        local c, d = ctensor(), ctensor()
        call(C.lac_map2_bwd_both, id, a.c, b.c, g.c, c, d)
        ga, gb = adopt(c), adopt(d)
        return sum_to(ga, a), sum_to(gb, b)
      end
      if a.requires_grad then
        local c = ctensor()
        call(C.lac_map2_bwd, id, 0, a.c, b.c, g.c, c)
        ga = sum_to(adopt(c), a)
      end
      if b.requires_grad then
        local c = ctensor()
        call(C.lac_map2_bwd, id, 1, a.c, b.c, g.c, c)
        gb = sum_to(adopt(c), b)
      end
      return ga, gb
    end
  end
  define(op)
  op.swapped = setmetatable({}, { __index = op }) -- the same operator on (number, tensor)
end

local map_id = {} -- engine id of a binary function by its engine name
for arity = 1, 2 do
  local id = 0
  while true do
    local name = C.lac_map_name(arity, id)
    if name == nil then break end
    name = ffi.string(name)
    if arity == 1 then
      define_map1(name, id)
      map_id["1" .. name] = id
    else
      define_map2(name, id)
      map_id[name] = id
    end
    id = id + 1
  end
end

-- sums pass gradients through: no multiplication by one
ops.table.add.backward = function(node, g)
  local b = node.b
  if not b then return g end
  return node.a.requires_grad and sum_to(g, node.a) or nil, b.requires_grad and sum_to(g, b) or nil
end

ops.table.sub.backward = function(node, g)
  local a, b = node.a, node.b
  if not b then
    if node.op == ops.table.sub then return g end
    return raw_map1(map_id["1neg"], g)
  end
  return a.requires_grad and sum_to(g, a) or nil,
    b.requires_grad and raw_map1(map_id["1neg"], sum_to(g, b)) or nil
end

-- ---- functions with constants --------------------------------------------------------------------

-- public options in the order of the engine's constants; a default of nil means that it must be given
local CONSTANTS = {
  leaky_relu = { { "slope", 0.01 } },
  elu = { { "alpha", 1 } },
  celu = { { "alpha", 1 } },
  hardtanh = { { "min", -1 }, { "max", 1 } },
  threshold = { { "threshold" }, { "value" } },
  softshrink = { { "lambda", 0.5 } },
  hardshrink = { { "lambda", 0.5 } },
  nan_to_num = { { "nan", 0 }, { "posinf", false }, { "neginf", false } },
  clamp = { { "min", false }, { "max", false } },
}
-- the largest finite value of a dtype: what nan_to_num makes of an infinity
local LARGEST = { [tonumber(C.LAC_F64)] = 1.7976931348623157e308,
                  [tonumber(C.LAC_F32)] = 3.4028234663852886e38, [tonumber(C.LAC_F16)] = 65504,
                  [tonumber(C.LAC_BF16)] = 3.3895313892515355e38 }

local doubles = ffi.typeof("double[3]")

local function mapp(op, x, p, q, r)
  local constants, c = doubles(p, q or 0, r or 0), ctensor()
  call(C.lac_mapp, op.id, x.c, constants, c)
  local out = adopt(c)
  if x.requires_grad and tape.enabled then
    record1(op, out, x)
    out.node.constants = constants
  end
  return out
end

local function mapp_backward(node, g)
  local c = ctensor()
  call(C.lac_mapp_bwd, node.op.id, node.a.c, node.o.c, g.c, node.constants, c)
  return adopt(c)
end

-- p, q, r may be one table of options instead: x:leaky_relu { slope = 0.2 }
local function constants_of(name, p, q, r)
  local list = CONSTANTS[name]
  if type(p) == "table" and not is(p) then
    if q ~= nil then too_many(name, "one table of options", q) end
    local allowed = {}
    for _, entry in ipairs(list) do allowed[entry[1]] = { type = { "number", "tensor" } } end
    local o = schema.options(name, p, allowed)
    p, q, r = o[list[1][1]], list[2] and o[list[2][1]], list[3] and o[list[3][1]]
  end
  return p, q, r
end

local function constant(name, i, value)
  local entry = CONSTANTS[name][i]
  if not entry then
    if value ~= nil then
      too_many(name, i == 1 and "one tensor" or i == 2 and "one constant" or "two constants", value)
    end
    return 0
  end
  if value == nil then value = entry[2] end
  if type(value) ~= "number" then
    fail(name, "%s must be a number, got %s", entry[1], value == false and "nothing" or show(value))
  end
  return value
end

local function define_mapp(name, id)
  local op = { name = name, saves = "ao", id = id, backward = mapp_backward }
  function op.forward(x, p, q, r)
    expect(name, "x", x)
    p, q, r = constants_of(name, p, q, r)
    if name == "nan_to_num" then
      local largest = LARGEST[x.c.dtype]
      if q == nil then q = largest or 0 end
      if r == nil then r = -(largest or 0) end
    end
    p, q, r = constant(name, 1, p), constant(name, 2, q), constant(name, 3, r)
    if name == "hardtanh" and p > q then fail(name, "min %s is above max %s", show(p), show(q)) end
    if name:find("shrink", 1, true) and (p < 0 or p ~= p) then
      fail(name, "lambda must not be negative, got %s", show(p))
    end
    if name == "celu" and p == 0 then fail(name, "alpha must not be 0") end
    return mapp(op, x, p, q, r)
  end
  return define(op)
end

-- ---- functions of three tensors ------------------------------------------------------------------

local function map3(op, x, y, z, p)
  local c = ctensor()
  call(C.lac_map3, op.id, x.c, y.c, z.c, p, c)
  local out = adopt(c)
  if wants(x, y, z) then record(op, out, x, y, z).constant = p end
  return out
end

local function map3_backward(node, g)
  local function towards(which, t)
    if not t.requires_grad then return nil end
    local c = ctensor()
    call(C.lac_map3_bwd, node.op.id, which, node.a.c, node.b.c, node.c.c, node.constant, g.c, c)
    return sum_to(adopt(c), t)
  end
  return towards(0, node.a), towards(1, node.b), towards(2, node.c)
end

local function define_map3(name, id, forward)
  local op = { name = name, saves = "abc", id = id, backward = map3_backward }
  op.forward = function(x, y, z, value) return forward(op, x, y, z, value) end
  define(op)
end

local MAP3 = {
  -- lerp(x, y, w) = x + w (y - x); w a tensor or a number
  lerp = function(op, x, y, w, more)
    if more ~= nil then too_many("lerp", "(x, y, w)", more) end
    expect("lerp", "x", x)
    expect("lerp", "y", y)
    if type(w) == "number" then w = scalar_like(w, x) end
    if not is(w) then fail("lerp", "the weight must be a tensor or a number, got %s", show(w)) end
    return map3(op, x, y, w, 0)
  end,
}
-- addcmul(x, y, z, value) = x + value y z and addcdiv(x, y, z, value) = x + value y / z; value 1 unless given
for _, name in ipairs { "addcmul", "addcdiv" } do
  MAP3[name] = function(op, x, y, z, value)
    expect(name, "x", x)
    expect(name, "y", y)
    expect(name, "z", z)
    value = value == nil and 1 or value
    if type(value) ~= "number" then fail(name, "value must be a number, got %s", show(value)) end
    return map3(op, x, y, z, value)
  end
end

for arity, define_one in pairs { [0] = define_mapp, [3] = function(name, id)
  define_map3(name, id, MAP3[name])
end } do
  local id = 0
  while true do
    local name = C.lac_map_name(arity, id)
    if name == nil then break end
    define_one(ffi.string(name), id)
    id = id + 1
  end
end

--- x limited to [low, high]; either may be nil, a number or a tensor. One pass where both are numbers (or x
-- is a float and one is missing); the gradient is then 1 on the bounds, as PyTorch's.
local clamp_op = ops.table.clamp
function clamp_op.forward(x, low, high)
  expect("clamp", "x", x)
  low, high = constants_of("clamp", low, high)
  if low == nil and high == nil then fail("clamp", "needs a lower or an upper bound") end
  if type(low) == "number" and type(high) == "number" and low > high then
    fail("clamp", "the lower bound %s is above the upper bound %s", show(low), show(high))
  end
  local p, q = low, high
  if LARGEST[x.c.dtype] then p, q = low or -math.huge, high or math.huge end
  if type(p) == "number" and type(q) == "number" and p == p and q == q then return mapp(clamp_op, x, p, q) end
  if low ~= nil then x = fn.maximum(x, low) end
  if high ~= nil then x = fn.minimum(x, high) end
  return x
end
define(clamp_op)

Tensor.__add, Tensor.__sub, Tensor.__mul, Tensor.__div = fn.add, fn.sub, fn.mul, fn.div
Tensor.__pow, Tensor.__mod = fn.pow, fn.mod
Tensor.__unm = function(x) return fn.neg(x) end
Tensor.__lt = function()
  fail("tensor", "'<' and '>' between tensors would give one boolean; use a:lt(b), a:gt(b)")
end
Tensor.__le = function()
  fail("tensor", "'<=' and '>=' between tensors would give one boolean; use a:le(b), a:ge(b)")
end
Tensor.__concat = function(a, b) return tostring(a) .. tostring(b) end

ops.internal.as_number, ops.internal.map_id = as_number, map_id
