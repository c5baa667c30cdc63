--- Elementwise operators, made from the engine's own list.
--
-- Every function of c/maps.def becomes an operator here by asking the engine for names and ids, so a new
-- activation is one line of C and nothing in Lua. A function of two arguments takes tensors that broadcast,
-- or one tensor and a number; a gradient towards a broadcast argument is summed back to its shape.
--
-- These are the hottest functions of the library: one struct, one call, one tensor, one tape node, written
-- out four times rather than passed through a general helper with varargs, which LuaJIT would not compile.
-- add and sub have rules of their own, because their gradients need no engine call at all.

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
local record1, record2, sum_to = internal.record1, internal.record2, internal.sum_to
local raw_map1, define = internal.raw_map1, internal.define

-- ---- elementwise, from the engine's list --------------------------------------------------------

-- max and min of one tensor are reductions; and, or, not are keywords of Lua
local RENAME = { max = "maximum", min = "minimum", ["and"] = "logical_and", ["or"] = "logical_or",
                 xor = "logical_xor", ["not"] = "logical_not" }
local NO_GRADIENT = { isnan = true, isfinite = true, eq = true, ne = true, lt = true, le = true, gt = true,
                      ge = true, logical_not = true, logical_and = true, logical_or = true,
                      logical_xor = true }

local function define_map1(engine_name, id)
  local name = RENAME[engine_name] or engine_name
  local op = { name = name, map = 1, saves = "ao" }
  local differentiable = not NO_GRADIENT[name]
  function op.forward(x)
    if not is(x) then expect(name, "x", x) end
    local c = ctensor()
    local status = C.lac_map1(id, x.c, c)
    if status ~= 0 then
      if recover(status) then status = C.lac_map1(id, x.c, c) end
      if status ~= 0 then raise(status) end
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
    if status ~= 0 then raise(status) end
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
  local op = { name = RENAME[name] or name, map = 2, saves = passes and "" or "ab", alias = passes }
  local differentiable = not NO_GRADIENT[op.name]
  function op.forward(x, y)
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
      if status ~= 0 then raise(status) end
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
