--- Every operator: its function, its method, its gradient rule, in one record.
--
-- A record is { name, forward, backward, saves }. `forward` is the function users call, as lac.name(x, ...)
-- and as x:name(...). `backward(node, g)` returns the gradients of the inputs node.a, node.b, node.c, node.d
-- (or a list, for node.list). `saves` names by letters which of them the rule reads ("abo": a, b and the
-- output o); grad.lua refuses a backward whose saved tensors were changed in place. `alias = true` marks
-- rules that may return g itself or a view of it, so that grad.lua copies before it writes. A composite (no
-- backward) is written with other operators and inherits their rules.
--
-- The elementwise part registers itself: every function in the engine's c/maps.def becomes an operator here
-- by asking the engine for its names, so a new activation is one line of C. tests/support/cases.lua must have
-- a case for each name; a spec says so.
--
-- Hot path: a call of an elementwise operator or of matmul makes a struct, a tensor table and a tape record,
-- nothing else. No closures (FNEW ends a trace), no varargs, no pairs; tests/dispatch_spec.lua asserts that
-- LuaJIT compiles it. Views copy a struct and need no C call. Rejected: a general `apply(op, ...)` that packs
-- arguments, which costs a microsecond by itself.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"

local ffi, C, flags = lib.ffi, lib.C, lib.flags
local recover, raise, attend, call = lib.recover, lib.raise, lib.attend, lib.call
local fail, show, is_integer = schema.fail, schema.show, schema.is_integer
local is, adopt, expect, receiver = tensor.is, tensor.adopt, tensor.expect, tensor.receiver
local tape, methods, Tensor = tensor.tape, tensor.methods, tensor.class
local ctensor, axis, same_shape = tensor.ctype, tensor.axis, tensor.same_shape
local shape, numel, contiguous = tensor.shape, tensor.numel, tensor.contiguous
local D = tensor.sizes_buffer

-- The compiler cannot record the first use of a C symbol, and a loop may be recorded on its first turn: the
-- symbols of the hot path are resolved now.
for _, name in ipairs { "lac_map1", "lac_map2", "lac_map2_scalar", "lac_matmul", "lac_empty", "lac_copy" } do
  local _ = C[name]
end

--- ops.table: record by name. ops.fn: the function of every operator by name.
local ops = { table = {}, fn = {} }
local fn = ops.fn

local function define(record)
  local saves = record.saves or ""
  for letter in ("abcdo"):gmatch(".") do record["save_" .. letter] = saves:find(letter, 1, true) ~= nil end
  ops.table[record.name] = record
  fn[record.name] = record.forward
  if record.method ~= false then methods[record.name] = record.forward end
  return record
end
ops.define = define

-- ---- the tape -----------------------------------------------------------------------------------
-- A node: op, inputs a b c d (or list), their versions when recorded, the output o, and the walker's fields g
-- (pending gradient) and n (edges not yet delivered). Input-less slots are false.

local function record1(op, out, a)
  out.requires_grad = true
  out.node = { op = op, a = a, b = false, o = out, va = a.root.version, vb = 0, g = false, n = 0 }
end

local function record2(op, out, a, b)
  out.requires_grad = true
  out.node = { op = op, a = a, b = b, o = out, va = a.root.version, vb = b.root.version, g = false, n = 0 }
end

local function version(t) return t and t.root.version or 0 end

local function record(op, out, a, b, c, d)
  out.requires_grad = true
  local node = { op = op, a = a or false, b = b or false, c = c or false, d = d or false, o = out,
                 va = version(a), vb = version(b), vc = version(c), vd = version(d), g = false, n = 0 }
  out.node = node
  return node
end
ops.record = record

--- Should an operator on these inputs be recorded?
local function wants(a, b, c, d)
  return tape.enabled and ((a and a.requires_grad) or (b and b.requires_grad) or (c and c.requires_grad)
    or (d and d.requires_grad)) or false
end
ops.wants = wants

-- ---- helpers for rules: no gradients inside -----------------------------------------------------

local function new() return ctensor() end

local function sum_to(x, like)
  if same_shape(x, like) then return x end
  local c = ctensor()
  call(C.lac_sum_to, x.c, like.c, c)
  return adopt(c)
end
ops.sum_to = sum_to

local function raw_map1(id, x)
  local c = ctensor()
  call(C.lac_map1, id, x.c, c)
  return adopt(c)
end

local function raw_map2(id, x, y)
  local c = ctensor()
  call(C.lac_map2, id, x.c, y.c, c)
  return adopt(c)
end

local function raw_scalar(id, x, y)
  local c = ctensor()
  call(C.lac_map2_scalar, id, x.c, y, 0, c)
  return adopt(c)
end

local function raw_matmul(a, b, bias)
  local c = ctensor()
  call(C.lac_matmul, a.c, b.c, bias and bias.c or nil, c)
  return adopt(c)
end

local function raw_reduce(kind, x, mask, keep)
  local c = ctensor()
  call(C.lac_reduce, kind, x.c, mask, keep and 1 or 0, c)
  return adopt(c)
end

local function scalar_like(value, t)
  local c = ctensor()
  c.dtype, c.device, c.ndim = t.c.dtype, t.c.device, 0
  call(C.lac_empty, c)
  local out = adopt(c)
  call(C.lac_fill, out.c, value)
  return out
end

-- a tensor that a rule reads and that is no input of the node: changes of it are detected
local function remember(node, t)
  node.saved, node.saved_versions = { t }, { t.root.version }
end

local function zeros_like(t)
  local z = tensor.empty_like(t)
  call(C.lac_fill, z.c, 0)
  return z
end
ops.raw_zeros_like = zeros_like

-- D[1..n] := the shape of t
local function load_sizes(t)
  local c = t.c
  for i = 1, c.ndim do D[i] = tonumber(c.shape[i - 1]) end
  return c.ndim
end

-- t's elements in the shape of `like` (same number of elements); a view if possible
local function reshape_like(t, like)
  if same_shape(t, like) then return t end
  return tensor.raw_view("reshape", t, load_sizes(like), true)
end

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

-- ---- casts and copies ---------------------------------------------------------------------------

local TO = { dtype = { type = "string" }, device = { type = "string" } }

local function move(t, dtype, dev)
  local c = ctensor()
  c.dtype, c.device, c.ndim = dtype, dev, t.c.ndim
  for i = 0, t.c.ndim - 1 do c.shape[i] = t.c.shape[i] end
  call(C.lac_empty, c)
  local out = adopt(c)
  call(C.lac_copy, t.c, out.c)
  return out
end

local to_op = { name = "to" }
--- The same values in another dtype or on another device; x itself if nothing changes.
-- @tparam Tensor x @tparam table|string options {dtype =, device =}, or just the name of one
function to_op.forward(x, options)
  receiver("to", x)
  if type(options) == "string" then
    options = device.dtype_code[options] and { dtype = options } or { device = options }
  end
  options = schema.options("to", options, TO)
  local dtype = options.dtype and device.dtype("to", options.dtype) or x.c.dtype
  local dev = options.device and device.code("to", options.device) or x.c.device
  if dtype == x.c.dtype and dev == x.c.device then return x end
  local out = move(x, dtype, dev)
  -- a cast to integers has no gradient; the result is a constant
  if wants(x) and device.is_float(dtype) then record1(to_op, out, x) end
  return out
end
function to_op.backward(node, g) return move(g, node.a.c.dtype, node.a.c.device) end
define(to_op)

local clone_op = { name = "clone", alias = true }
--- A contiguous copy; gradients flow through.
function clone_op.forward(x)
  receiver("clone", x)
  local out = tensor.cast(x, x.c.dtype)
  if wants(x) then record1(clone_op, out, x) end
  return out
end
function clone_op.backward(_, g) return g end
define(clone_op)

local contiguous_op = { name = "contiguous", alias = true }
--- x itself if it is contiguous, else a contiguous copy.
function contiguous_op.forward(x)
  receiver("contiguous", x)
  if tensor.is_contiguous(x) then return x end
  local out = contiguous(x)
  if wants(x) then record1(contiguous_op, out, x) end
  return out
end
function contiguous_op.backward(_, g) return g end
define(contiguous_op)

--- A view of the same elements that the tape does not know.
define { name = "detach", nondifferentiable = true, forward = function(x)
  receiver("detach", x)
  return tensor.alias(x)
end }

-- ---- views --------------------------------------------------------------------------------------

local function shape_rule(node, g) return reshape_like(g, node.a) end

local view_op = { name = "view", alias = true, backward = shape_rule }
--- The same elements in another shape, without a copy; one size may be -1. Raises if strides forbid it.
-- @tparam integer ... sizes, or one table of sizes
function view_op.forward(x, a, b, c, d, e, f, g)
  receiver("view", x)
  local out = tensor.raw_view("view", x, tensor.sizes("view", true, a, b, c, d, e, f, g), false)
  if x.requires_grad and tape.enabled then record1(view_op, out, x) end
  return out
end
define(view_op)

local reshape_op = { name = "reshape", alias = true, backward = shape_rule }
--- Like view, and copies where a view is impossible.
function reshape_op.forward(x, a, b, c, d, e, f, g)
  receiver("reshape", x)
  local out = tensor.raw_view("reshape", x, tensor.sizes("reshape", true, a, b, c, d, e, f, g), true)
  if x.requires_grad and tape.enabled then record1(reshape_op, out, x) end
  return out
end
define(reshape_op)

local flatten_op = { name = "flatten", alias = true, backward = shape_rule }
--- Dimensions first..last (default all) become one.
function flatten_op.forward(x, first, last)
  receiver("flatten", x)
  local nd = x.c.ndim
  if nd == 0 then return fn.reshape(x, 1) end
  local i, j = axis("flatten", x, first or 1), axis("flatten", x, last or -1)
  if i > j then fail("flatten", "first dim %s comes after last dim %s", show(first), show(last)) end
  local n, size = 0, 1
  for k = 0, nd - 1 do
    local s = tonumber(x.c.shape[k])
    if k >= i and k <= j then size = size * s end
    if k < i or k > j then n = n + 1; D[n] = s elseif k == j then n = n + 1; D[n] = size end
  end
  local out = tensor.raw_view("flatten", x, n, true)
  if wants(x) then record1(flatten_op, out, x) end
  return out
end
define(flatten_op)

local squeeze_op = { name = "squeeze", alias = true, backward = shape_rule }
--- Drop dimensions of size 1: all, or dim (unchanged if its size is not 1).
function squeeze_op.forward(x, dim)
  receiver("squeeze", x)
  local only = dim ~= nil and axis("squeeze", x, dim)
  local out = tensor.alias(x)
  local c, old, n = out.c, x.c, 0
  for k = 0, old.ndim - 1 do
    if old.shape[k] ~= 1 or (only and k ~= only) then
      c.shape[n], c.stride[n] = old.shape[k], old.stride[k]
      n = n + 1
    end
  end
  c.ndim = n
  if wants(x) then record1(squeeze_op, out, x) end
  return out
end
define(squeeze_op)

local unsqueeze_op = { name = "unsqueeze", alias = true, backward = shape_rule }
--- Insert a dimension of size 1 at position dim (1 .. dim()+1).
function unsqueeze_op.forward(x, dim)
  receiver("unsqueeze", x)
  if x.c.ndim == tensor.max_dims then
    fail("unsqueeze", "%s has %d dimensions, the most there can be", show(x), tensor.max_dims)
  end
  local at = axis("unsqueeze", x, dim, 1)
  local out = tensor.alias(x)
  local c, old = out.c, x.c
  for k = old.ndim, at + 1, -1 do c.shape[k], c.stride[k] = old.shape[k - 1], old.stride[k - 1] end
  c.shape[at], c.stride[at] = 1, 1
  c.ndim = old.ndim + 1
  if wants(x) then record1(unsqueeze_op, out, x) end
  return out
end
define(unsqueeze_op)

local transpose_op = { name = "transpose", alias = true }
--- Swap dimensions i and j (a view).
function transpose_op.forward(x, i, j)
  receiver("transpose", x)
  local p, q = axis("transpose", x, i), axis("transpose", x, j)
  local out = tensor.raw_transpose(x, p, q)
  if x.requires_grad and tape.enabled then
    record1(transpose_op, out, x)
    out.node.p, out.node.q = p, q
  end
  return out
end
function transpose_op.backward(node, g) return tensor.raw_transpose(g, node.p, node.q) end
define(transpose_op)

--- The transposed matrix: t() of a 2-D tensor.
define { name = "t", composite = true, forward = function(x)
  receiver("t", x)
  if x.c.ndim ~= 2 then
    fail("t", "needs 2 dimensions, got %s; use transpose(i, j) or permute(...)", show(x))
  end
  return fn.transpose(x, 1, 2)
end }

local permute_op = { name = "permute", alias = true }
--- Reorder dimensions (a view): x:permute(2, 1, 3), or one table.
function permute_op.forward(x, ...)
  receiver("permute", x)
  local list = ...
  if type(list) ~= "table" or is(list) then list = { ... } end
  local nd = x.c.ndim
  if #list ~= nd then fail("permute", "needs %d dimensions for %s, got %d", nd, show(x), #list) end
  local order, seen = {}, {}
  for i = 1, nd do
    order[i] = axis("permute", x, list[i])
    if seen[order[i]] then fail("permute", "dimension %s appears twice in %s", show(list[i]), show(list)) end
    seen[order[i]] = true
  end
  local out = tensor.raw_permute(x, order)
  if wants(x) then
    record1(permute_op, out, x)
    out.node.order = order
  end
  return out
end
function permute_op.backward(node, g)
  local inverse = {}
  for i = 1, #node.order do inverse[node.order[i] + 1] = i - 1 end
  return tensor.raw_permute(g, inverse)
end
define(permute_op)

local expand_op = { name = "expand", alias = true }
--- Broadcast dimensions of size 1 (a view with stride 0); -1 keeps a size.
function expand_op.forward(x, a, b, c, d, e, f, g)
  receiver("expand", x)
  local n
  if type(a) == "table" and not is(a) then
    for i = 1, math.min(#a, tensor.max_dims) do D[i] = a[i] end
    n = #a
  else
    n = g ~= nil and 7 or f ~= nil and 6 or e ~= nil and 5 or d ~= nil and 4
      or c ~= nil and 3 or b ~= nil and 2 or a ~= nil and 1 or 0
    D[1], D[2], D[3], D[4], D[5], D[6] = a, b, c, d, e, f
  end
  if n > tensor.max_dims then
    fail("expand", "a tensor has at most %d dimensions, got %d", tensor.max_dims, n)
  end
  for i = 1, n do
    if not is_integer(D[i]) or D[i] < -1 then
      fail("expand", "size %d must be an integer, got %s", i, show(D[i]))
    end
  end
  local out = tensor.raw_expand("expand", x, n)
  if wants(x) then record1(expand_op, out, x) end
  return out
end
function expand_op.backward(node, g) return sum_to(g, node.a) end
define(expand_op)

--- Broadcast x to the shape of `like`.
define { name = "expand_as", composite = true, forward = function(x, like)
  receiver("expand_as", x)
  expect("expand_as", "like", like)
  return fn.expand(x, shape(like))
end }

-- ---- slices -------------------------------------------------------------------------------------

local slice_op = { name = "slice", method = false }
-- spec: see tensor.raw_slice
function slice_op.forward(x, spec)
  local out = tensor.raw_slice(x, spec)
  if x.requires_grad and tape.enabled then
    record1(slice_op, out, x)
    out.node.spec = spec
  end
  return out
end
function slice_op.backward(node, g)
  local z = zeros_like(node.a)
  call(C.lac_copy, g.c, tensor.raw_slice(z, node.spec).c)
  return z
end
define(slice_op)

local function whole(x)
  local spec = { start = {}, count = {}, step = {}, drop = {} }
  for i = 1, x.c.ndim do
    spec.start[i], spec.count[i], spec.step[i], spec.drop[i] = 0, tonumber(x.c.shape[i - 1]), 1, false
  end
  return spec
end

-- 0-based position from 1-based p on axis k; negative from the end
local function position(op, x, k, p)
  local size = tonumber(x.c.shape[k])
  if not is_integer(p) then fail(op, "a position must be an integer, got %s", show(p)) end
  local i = p < 0 and p + size or p - 1
  if i < 0 or i >= size then
    fail(op, "position %d is out of range in dimension %d of %s: %s", p, k + 1, show(x),
         size == 0 and "it is empty" or ("1 to %d, or -%d to -1"):format(size, size))
  end
  return i
end

--- `length` positions of dimension dim from position start (1-based); a view.
define { name = "narrow", composite = true, forward = function(x, dim, start, length)
  receiver("narrow", x)
  local k = axis("narrow", x, dim)
  local size = tonumber(x.c.shape[k])
  if not is_integer(start) then fail("narrow", "start must be an integer, got %s", show(start)) end
  if not is_integer(length) or length < 0 then
    fail("narrow", "length must be an integer that is not negative, got %s", show(length))
  end
  local first = start < 0 and start + size or start - 1
  if first < 0 or first + length > size then
    fail("narrow", "start %d and length %d leave dimension %d of %s", start, length, k + 1, show(x))
  end
  local spec = whole(x)
  spec.start[k + 1], spec.count[k + 1] = first, length
  return slice_op.forward(x, spec)
end }

--- Position p of dimension dim, without that dimension; a view.
define { name = "select", composite = true, forward = function(x, dim, p)
  receiver("select", x)
  local k = axis("select", x, dim)
  local spec = whole(x)
  spec.start[k + 1], spec.count[k + 1], spec.drop[k + 1] = position("select", x, k, p), 1, true
  return slice_op.forward(x, spec)
end }

-- One entry of t[{...}] for axis k: number, {}, {p}, {from, to} or {from, to, step}
local function slice_axis(x, spec, k, entry)
  local i = k + 1
  if type(entry) == "number" then
    spec.start[i], spec.count[i], spec.drop[i] = position("index", x, k, entry), 1, true
    return
  end
  if type(entry) ~= "table" or is(entry) then
    fail("index", "entry %d must be a position, {} or {from, to, step}, got %s", i, show(entry))
  end
  for key in pairs(entry) do
    if not is_integer(key) or key < 1 or key > 3 then
      fail("index", "entry %d must be {}, {p}, {from, to} or {from, to, step}, got %s", i, show(entry))
    end
  end
  local from, to, step = entry[1], entry[2], entry[3] or 1
  if from == nil then
    if next(entry) ~= nil then fail("index", "entry %d has no start: %s", i, show(entry)) end
    return
  end
  if to == nil then
    if entry[3] ~= nil then fail("index", "entry %d has no end: %s", i, show(entry)) end
    spec.start[i], spec.count[i] = position("index", x, k, from), 1
    return
  end
  if not is_integer(step) or step == 0 then
    fail("index", "the step must be an integer other than 0, got %s", show(step))
  end
  -- {from, from - 1} is the empty range; its end is no position, so it is recognised first
  if is_integer(from) and is_integer(to) and step == 1 and from > 0 and to == from - 1
    and from <= tonumber(x.c.shape[k]) + 1 then
    spec.count[i] = 0
    return
  end
  local a, b = position("index", x, k, from), position("index", x, k, to)
  spec.start[i], spec.step[i] = a, step
  spec.count[i] = math.max(0, math.floor((b - a) / step) + 1)
end

local function index_spec(x, key)
  local spec = whole(x)
  if type(key) == "number" then
    if x.c.ndim == 0 then fail("index", "%s has no dimensions to index; use item()", show(x)) end
    slice_axis(x, spec, 0, key)
    return spec
  end
  if type(key) ~= "table" then
    fail("index", "a tensor is indexed by a position, a table of slices or a tensor, got %s", show(key))
  end
  local given = 0
  for k in pairs(key) do
    if not is_integer(k) or k < 1 then
      fail("index", "slices are given by position, got the key %s", show(k))
    end
    given = math.max(given, k)
  end
  if given > x.c.ndim then
    fail("index", "%d slices for the %d dimensions of %s", given, x.c.ndim, show(x))
  end
  for k = 1, given do
    if key[k] == nil then fail("index", "slice %d of %d is nil; {} means everything", k, given) end
    slice_axis(x, spec, k - 1, key[k])
  end
  return spec
end

-- positions (0-based, i64) of the true elements of a bool tensor
local function true_positions(mask)
  local flat, list = tensor.flat_list(mask), {}
  for i = 1, #flat do
    if flat[i] then list[#list + 1] = i - 1 end
  end
  return create.tensor(list, { dtype = "i64", shape = { #list } })
end

local function check_mask(x, mask)
  local m = mask.c
  local fits = m.ndim >= 1 and m.ndim <= x.c.ndim
  for i = 0, m.ndim - 1 do fits = fits and m.shape[i] == x.c.shape[i] end
  if not fits then fail("index", "the mask %s does not have the leading sizes of %s", show(mask), show(x)) end
end

--- t[key]: a position (1-based, negative from the end) selects in dimension 1; a table of slices has per
-- dimension a position (the dimension goes), {} (all), {p}, {from, to} (both included) or {from, to, step} (a
-- negative step reverses); missing ones mean all; {k, k-1} is empty; out of range is an error. All of these
-- are views. A bool tensor selects where it is true (a copy, first dimension = number of hits); an i64 or i32
-- tensor of 0-based rows selects along dimension 1.
function tensor.get(x, key)
  if is(key) then
    if key.c.dtype == C.LAC_BOOL then
      check_mask(x, key)
      local sizes, rest = { numel(key) }, shape(x)
      for i = key.c.ndim + 1, #rest do sizes[#sizes + 1] = rest[i] end
      return fn.index_select(fn.reshape(x, sizes), 1, true_positions(key))
    end
    return fn.index_select(x, 1, key)
  end
  return slice_op.forward(x, index_spec(x, key))
end

-- ---- writing in place ---------------------------------------------------------------------------

local function writable(op, t, source)
  if not is(t) then receiver(op, t) end
  local c = t.c
  for i = 0, c.ndim - 1 do
    if c.stride[i] == 0 and c.shape[i] > 1 then
      fail(op, "%s is an expanded view, several of its elements share memory; make it contiguous() first",
           show(t))
    end
  end
  if tape.enabled then
    if t.requires_grad then
      fail(op, "%s requires a gradient, so it cannot be changed in place while gradients are recorded; "
        .. "use the function that returns a new tensor, or lac.no_grad", show(t))
    end
    if source and source.requires_grad then
      fail(op, "writing %s, which requires a gradient, into a tensor in place would lose the gradient; "
        .. "use lac.where, lac.cat or lac.stack, or detach() it", show(source))
    end
  end
end
ops.writable = writable

local touch = tensor.touch

local function write_copy(op, t, source)
  -- a source that shares storage is copied first: the engine refuses overlapping arguments
  if source.root == t.root then source = tensor.cast(source, source.c.dtype) end
  if source.c.dtype ~= t.c.dtype and device.is_float(source.c.dtype) and not device.is_float(t.c.dtype) then
    fail(op, "%s does not fit into %s; convert it with to{dtype=} first", show(source), show(t))
  end
  call(C.lac_copy, source.c, t.c)
  touch(t)
  return t
end

--- Write source (a tensor that broadcasts to t, a number, or nested tables) into t; dtypes are converted.
function methods.copy_(t, source)
  receiver("copy_", t)
  if type(source) == "number" or type(source) == "boolean" then return methods.fill_(t, source) end
  if type(source) == "table" and not is(source) then
    source = create.tensor(source, { dtype = device.dtype_name[t.c.dtype] })
  end
  expect("copy_", "source", source)
  writable("copy_", t, source)
  return write_copy("copy_", t, source)
end

--- Set every element to a number.
function methods.fill_(t, value)
  receiver("fill_", t)
  value = as_number(value)
  if type(value) ~= "number" then
    fail("fill_", "value must be a number or a boolean, got %s", show(value))
  end
  writable("fill_", t)
  call(C.lac_fill, t.c, value)
  touch(t)
  return t
end

--- Set every element to 0.
function methods.zero_(t)
  receiver("zero_", t)
  return methods.fill_(t, 0)
end

-- name_ (t, y): t becomes name(t, y), which must have t's shape and dtype
local function in_place(name)
  local f = fn[name]
  local op = name .. "_"
  methods[op] = function(t, y)
    receiver(op, t)
    writable(op, t, is(y) and y or nil)
    local enabled = tape.enabled
    tape.enabled = false
    local ok, out = pcall(f, t, y)
    tape.enabled = enabled
    if not ok then error(out, 0) end
    if not same_shape(out, t) then
      fail(op, "the result %s does not have the shape of %s", show(out), show(t))
    end
    if out.c.dtype ~= t.c.dtype then
      fail(op, "the result %s does not have the dtype of %s", show(out), show(t))
    end
    call(C.lac_copy, out.c, t.c)
    touch(t)
    return t
  end
end
for _, name in ipairs { "sub", "div", "pow", "mod", "maximum", "minimum", "neg", "abs", "exp", "log", "sqrt",
                        "tanh", "sigmoid", "relu", "square", "floor", "ceil",
                        "round", "mul", "add" } do
  in_place(name)
end

local general_add, general_mul = methods.add_, methods.mul_

--- t += alpha * x, in place, for float tensors in one pass.
function methods.add_(t, x, alpha)
  receiver("add_", t)
  if alpha ~= nil and type(alpha) ~= "number" then
    fail("add_", "alpha must be a number, got %s", show(alpha))
  end
  if is(x) and device.is_float(t.c.dtype) and x.c.dtype == t.c.dtype and x.root ~= t.root then
    writable("add_", t, x)
    call(C.lac_axpy, alpha or 1, x.c, t.c)
    touch(t)
    return t
  end
  if alpha and alpha ~= 1 then
    if type(x) == "number" then x = alpha * x else x = fn.mul(x, alpha) end
  end
  return general_add(t, x)
end

--- t *= x in place.
function methods.mul_(t, x)
  receiver("mul_", t)
  if type(x) == "number" and device.is_float(t.c.dtype) then
    writable("mul_", t)
    call(C.lac_scale, x, t.c)
    touch(t)
    return t
  end
  return general_mul(t, x)
end

--- Clamp in place.
function methods.clamp_(t, low, high)
  receiver("clamp_", t)
  writable("clamp_", t)
  if low ~= nil then methods.maximum_(t, low) end
  if high ~= nil then methods.minimum_(t, high) end
  return t
end

local function fill_random(op, kind, t, a, b)
  receiver(op, t)
  if type(a) ~= "number" or type(b) ~= "number" or a ~= a or b ~= b then
    fail(op, "takes two numbers, got %s and %s", show(a), show(b))
  end
  writable(op, t)
  create.random(t, kind, a, b)
  touch(t)
  return t
end

--- Fill with normal numbers (mean 0, deviation 1 unless given).
function methods.normal_(t, mean, std)
  return fill_random("normal_", C.LAC_NORMAL, t, mean == nil and 0 or mean, std == nil and 1 or std)
end

--- Fill with uniform numbers in [low, high), by default [0, 1).
function methods.uniform_(t, low, high)
  return fill_random("uniform_", C.LAC_UNIFORM, t, low == nil and 0 or low, high == nil and 1 or high)
end

--- Fill with ones with probability p, else zeros.
function methods.bernoulli_(t, p)
  if type(p) ~= "number" or not (p >= 0 and p <= 1) then
    fail("bernoulli_", "p must be in [0, 1], got %s", show(p))
  end
  return fill_random("bernoulli_", C.LAC_BERNOULLI, t, p, 0)
end

--- t[key] = value, keys as for reading; value a number, a tensor that broadcasts, or nested tables.
function tensor.set(t, key, value)
  if value == nil then fail("index", "cannot assign nil to a part of %s", show(t)) end
  if is(key) then
    writable("index assignment", t, is(value) and value or nil)
    if key.c.dtype ~= C.LAC_BOOL then
      fail("index", "assignment takes positions, slices or a bool mask, got the index tensor %s", show(key))
    end
    check_mask(t, key)
    local sizes = shape(key)
    for i = #sizes + 1, t.c.ndim do sizes[i] = 1 end
    local filled = tape.enabled
    tape.enabled = false
    local ok, out = pcall(fn.where, fn.view(contiguous(key), sizes), value, t)
    tape.enabled = filled
    if not ok then error(out, 0) end
    if not same_shape(out, t) then fail("index", "the value %s does not fit %s", show(value), show(t)) end
    write_copy("index assignment", t, out)
    return
  end
  if t.requires_grad or (is(value) and value.requires_grad) then
    writable("index assignment", t, is(value) and value or nil)
  end
  methods.copy_(tensor.raw_slice(t, index_spec(t, key)), value)
end

-- ---- reductions ---------------------------------------------------------------------------------

-- dim: nil (all), an integer, a list of integers, or {dim = , keepdim = }. Gives the bit mask and keepdim.
local function reduced(op, x, dim, keepdim)
  expect(op, "x", x)
  if type(dim) == "table" and not is(dim) and #dim == 0 then
    local o = schema.options(op, dim, { dim = { type = { "integer", "integers" } },
                                        keepdim = { type = "boolean" } })
    dim, keepdim = o.dim, o.keepdim == nil and keepdim or o.keepdim
  end
  if keepdim ~= nil and type(keepdim) ~= "boolean" then
    fail(op, "keepdim must be true or false, got %s%s", show(keepdim),
         type(dim) == "number" and type(keepdim) == "number" and "; several dims are one list" or "")
  end
  if dim == nil then return 0, keepdim or false end
  if type(dim) == "table" and not is(dim) then
    local mask = 0
    for i = 1, #dim do
      local bit_value = 2 ^ axis(op, x, dim[i])
      if math.floor(mask / bit_value) % 2 == 1 then
        fail(op, "dim %s appears twice in %s", show(dim[i]), show(dim))
      end
      mask = mask + bit_value
    end
    return mask, keepdim or false
  end
  return 2 ^ axis(op, x, dim), keepdim or false
end

-- g of a reduction, as a view that broadcasts over x: kept dims have size 1
local function unreduce(g, x, mask)
  local n = x.c.ndim
  for i = 1, n do
    local gone = mask == 0 or math.floor(mask / 2 ^ (i - 1)) % 2 == 1
    D[i] = gone and 1 or tonumber(x.c.shape[i - 1])
  end
  local kept = tensor.raw_view("reduce", g, n, true)
  load_sizes(x)
  return tensor.raw_expand("reduce", kept, n)
end

local function define_reduction(name, kind, backward, saves)
  local op = { name = name, saves = saves or "", backward = backward, alias = name == "sum" }
  function op.forward(x, dim, keepdim)
    if is(dim) then fail(name, "reduces one tensor; for two tensors use %simum(a, b)", name) end
    local mask, keep = reduced(name, x, dim, keepdim)
    local out = raw_reduce(kind, x, mask, keep)
    if backward and wants(x) then
      record1(op, out, x)
      out.node.mask = mask
    end
    return out
  end
  define(op)
end

define_reduction("sum", C.LAC_SUM, function(node, g) return unreduce(g, node.a, node.mask) end)

define_reduction("mean", C.LAC_MEAN, function(node, g)
  local count = numel(node.a) / numel(node.o)
  return raw_scalar(map_id.mul, unreduce(g, node.a, node.mask), 1 / count)
end)

-- equal extremes share the gradient, as for maximum(a, b)
local function extreme_rule(node, g)
  local x, mask = node.a, node.mask
  local hits = tensor.cast(raw_map2(map_id.eq, x, unreduce(node.o, x, mask)), x.c.dtype)
  local count = raw_reduce(C.LAC_SUM, hits, mask, true)
  local share = raw_map2(map_id.div, reshape_like(g, count), count)
  return raw_map2(map_id.mul, hits, share)
end
define_reduction("max", C.LAC_MAX, extreme_rule, "ao")
define_reduction("min", C.LAC_MIN, extreme_rule, "ao")
define_reduction("any", C.LAC_ANY)
define_reduction("all", C.LAC_ALL)

local function define_arg(name, kind)
  define { name = name, nondifferentiable = true, forward = function(x, dim, keepdim)
    if type(dim) == "table" and #dim > 1 then fail(name, "takes one dim or none, got %s", show(dim)) end
    local mask, keep = reduced(name, x, dim, keepdim)
    return raw_scalar(map_id.add, raw_reduce(kind, x, mask, keep), 1)
  end }
end
-- positions, so 1-based like every position in Lua (subtract 1 to compare with class targets, which are data
-- and 0-based); without dim: the position in the flattened tensor
define_arg("argmax", C.LAC_ARGMAX)
define_arg("argmin", C.LAC_ARGMIN)

local function define_softmax(name, logarithm)
  local op = { name = name, saves = "o" }
  function op.forward(x, dim)
    expect(name, "x", x)
    local k = axis(name, x, dim == nil and -1 or dim)
    local c = ctensor()
    call(C.lac_softmax, x.c, k, logarithm, c)
    local out = adopt(c)
    if wants(x) then
      record1(op, out, x)
      out.node.k = k
    end
    return out
  end
  function op.backward(node, g)
    local c = ctensor()
    call(C.lac_softmax_bwd, node.o.c, g.c, node.k, logarithm, c)
    return adopt(c)
  end
  define(op)
end
define_softmax("softmax", 0)
define_softmax("log_softmax", 1)

--- log(sum(exp(x))) over dim (all unless given), without overflow; -inf where every element is -inf.
define { name = "logsumexp", composite = true, forward = function(x, dim, keepdim)
  local mask, keep = reduced("logsumexp", x, dim, keepdim)
  local top = raw_reduce(C.LAC_MAX, x, mask, true)
  top = fn.where(fn.isfinite(top), top, 0) -- an infinite maximum must not give inf - inf
  local dims = {}
  for i = 1, x.c.ndim do
    if mask == 0 or math.floor(mask / 2 ^ (i - 1)) % 2 == 1 then dims[#dims + 1] = i end
  end
  if #dims == 0 then dims = nil end
  local out = fn.log(fn.sum(fn.exp(fn.sub(x, top)), dims, true)) + top
  if keep then return out end
  local sizes = {}
  for i = 1, x.c.ndim do
    if not (mask == 0 or math.floor(mask / 2 ^ (i - 1)) % 2 == 1) then
      sizes[#sizes + 1] = tonumber(x.c.shape[i - 1])
    end
  end
  return fn.reshape(out, sizes)
end }

--- Variance over dim (all unless given); correction 1 divides by n - 1.
define { name = "var", composite = true, forward = function(x, dim, keepdim, correction)
  local _, keep = reduced("var", x, dim, keepdim)
  correction = correction == nil and 1 or correction
  if type(correction) ~= "number" then
    fail("var", "correction must be a number, got %s", show(correction))
  end
  if type(dim) == "table" and #dim == 0 then dim = dim.dim end
  local mean = fn.mean(x, dim, true)
  local total = fn.sum(fn.square(x - mean), dim, keep)
  local count = numel(x) / math.max(1, numel(mean))
  return total / (count - correction)
end }

--- Standard deviation; arguments as for var.
define { name = "std", composite = true, forward = function(x, dim, keepdim, correction)
  expect("std", "x", x)
  return fn.sqrt(fn.var(x, dim, keepdim, correction))
end }

-- total ^ (1 / p), whose gradient at 0 is 0 and not infinite
local function root(total, p)
  local zero = fn.eq(total, 0)
  local safe = fn.where(zero, 1, total)
  return fn.where(zero, 0, p == 2 and fn.sqrt(safe) or fn.pow(safe, 1 / p))
end

--- The p-norm (2 unless given; math.huge is the largest magnitude) over dim. The gradient of a zero vector is
-- zero, one of the subgradients.
define { name = "norm", composite = true, forward = function(x, p, dim, keepdim)
  expect("norm", "x", x)
  p = p == nil and 2 or p
  if type(p) ~= "number" or p ~= p or p <= 0 then
    fail("norm", "p must be a positive number, got %s", show(p))
  end
  if p == math.huge then return fn.max(fn.abs(x), dim, keepdim) end
  if p == 1 then return fn.sum(fn.abs(x), dim, keepdim) end
  if p == 2 then return root(fn.sum(fn.square(x), dim, keepdim), 2) end
  return root(fn.sum(fn.abs(x) ^ p, dim, keepdim), p)
end }

-- ---- matrix products ----------------------------------------------------------------------------

local matmul_op = { name = "matmul", saves = "ab", method = false }
local function matmul2(a, b)
  local c = ctensor()
  local status = C.lac_matmul(a.c, b.c, nil, c)
  if status ~= 0 then
    if recover(status) then status = C.lac_matmul(a.c, b.c, nil, c) end
    if status ~= 0 then raise(status) end
  end
  if flags.attention ~= 0 then attend() end
  local out = adopt(c)
  if tape.enabled and (a.requires_grad or b.requires_grad) then record2(matmul_op, out, a, b) end
  return out
end

local function last_transposed(t) return tensor.raw_transpose(t, t.c.ndim - 2, t.c.ndim - 1) end

function matmul_op.backward(node, g)
  local a, b = node.a, node.b
  return a.requires_grad and sum_to(raw_matmul(g, last_transposed(b)), a) or nil,
    b.requires_grad and sum_to(raw_matmul(last_transposed(a), g), b) or nil
end

--- Matrix product [..., M, K] x [..., K, N] -> [..., M, N]; batch dimensions broadcast; a vector is a row on
-- the left and a column on the right, and its dimension goes from the result.
function matmul_op.forward(a, b)
  if not (is(a) and is(b)) then
    expect("matmul", "a", a)
    expect("matmul", "b", b)
  end
  local va, vb = a.c.ndim == 1, b.c.ndim == 1
  if not va and not vb then return matmul2(a, b) end
  if va then a = fn.unsqueeze(a, 1) end
  if vb then b = fn.unsqueeze(b, 2) end
  local out = matmul2(a, b)
  if vb then out = fn.squeeze(out, -1) end
  if va then out = fn.squeeze(out, vb and -1 or -2) end
  return out
end
define(matmul_op)
methods.matmul = matmul_op.forward

-- [..., E] as [R, E]
local function rows(op, t)
  D[1], D[2] = -1, tonumber(t.c.shape[t.c.ndim - 1])
  if numel(t) == 0 then
    D[1] = 1
    for i = 0, t.c.ndim - 2 do D[1] = D[1] * tonumber(t.c.shape[i]) end
  end
  return tensor.raw_view(op, t, 2, true)
end

-- give the fresh [R, V] tensor `out` the leading sizes of x
local function set_leading(out, x)
  local c, last = out.c, out.c.shape[1]
  c.ndim = x.c.ndim
  for i = 0, x.c.ndim - 2 do c.shape[i] = x.c.shape[i] end
  c.shape[c.ndim - 1] = last
  local step = 1LL
  for i = c.ndim - 1, 0, -1 do
    c.stride[i] = step
    if c.shape[i] > 1 then step = step * c.shape[i] end
  end
end

local linear_op = { name = "linear", saves = "ab" }
--- x w^T + b: x [..., E], w [V, E], b [V] or nil -> [..., V].
function linear_op.forward(x, w, b)
  expect("linear", "x", x)
  expect("linear", "w", w)
  if b ~= nil then expect("linear", "b", b) end
  if w.c.ndim ~= 2 or x.c.ndim < 1 or x.c.shape[x.c.ndim - 1] ~= w.c.shape[1] then
    fail("linear", "x [..., E] and w [V, E] do not fit: x is %s, w is %s", show(x), show(w))
  end
  if b ~= nil and (b.c.ndim ~= 1 or b.c.shape[0] ~= w.c.shape[0]) then
    fail("linear", "b must be [V] for w [V, E]: b is %s, w is %s", show(b), show(w))
  end
  local out = raw_matmul(rows("linear", x), tensor.raw_transpose(w, 0, 1), b)
  set_leading(out, x)
  if wants(x, w, b) then record(linear_op, out, x, w, b) end
  return out
end
function linear_op.backward(node, g)
  local x, w, b = node.a, node.b, node.c
  local g2 = rows("linear", g)
  local gx, gw, gb
  if x.requires_grad then
    gx = raw_matmul(g2, w)
    set_leading(gx, x)
  end
  if w.requires_grad then gw = raw_matmul(tensor.raw_transpose(g2, 0, 1), rows("linear", x)) end
  if b and b.requires_grad then gb = raw_reduce(C.LAC_SUM, g2, 1, false) end
  return gx, gw, gb
end
define(linear_op)

-- ---- normalisation ------------------------------------------------------------------------------

local layernorm_op = { name = "layernorm", saves = "ab" }
--- Normalise the last dimension: gamma (x - mean) / sqrt(var + eps) + beta.
-- @tparam Tensor x [..., E] @tparam[opt] Tensor gamma [E] @tparam[opt] Tensor beta [E]
-- @tparam[opt] number eps 1e-5
function layernorm_op.forward(x, gamma, beta, eps)
  expect("layernorm", "x", x)
  if gamma ~= nil then expect("layernorm", "gamma", gamma) end
  if beta ~= nil then expect("layernorm", "beta", beta) end
  eps = eps == nil and 1e-5 or eps
  if type(eps) ~= "number" or eps ~= eps or eps < 0 then
    fail("layernorm", "eps must not be negative, got %s", show(eps))
  end
  local c, mean, rstd = new(), new(), new()
  call(C.lac_layernorm, x.c, gamma and gamma.c or nil, beta and beta.c or nil, eps, c, mean, rstd)
  local out = adopt(c)
  mean, rstd = adopt(mean), adopt(rstd)
  if wants(x, gamma, beta) then
    local node = record(layernorm_op, out, x, gamma, beta)
    node.mean, node.rstd = mean, rstd
  end
  return out
end
function layernorm_op.backward(node, g)
  local gamma, beta = node.b, node.c
  local dx = new()
  local dgamma = gamma and gamma.requires_grad and new() or nil
  local dbeta = beta and beta.requires_grad and new() or nil
  call(C.lac_layernorm_bwd, node.a.c, gamma and gamma.c or nil, node.mean.c, node.rstd.c, g.c, dx, dgamma,
       dbeta)
  return adopt(dx), dgamma and adopt(dgamma), dbeta and adopt(dbeta)
end
define(layernorm_op)

-- ---- losses -------------------------------------------------------------------------------------

local rows_ce = { name = "cross_entropy_rows", public = "cross_entropy", saves = "a", method = false,
                  internal = true }
function rows_ce.forward(logits, target, ignore)
  local c, lse = new(), new()
  call(C.lac_cross_entropy, logits.c, target.c, ignore, c, lse)
  local out = adopt(c)
  lse = adopt(lse)
  if wants(logits) then
    local node = record(rows_ce, out, logits)
    remember(node, target)
    node.target, node.ignore, node.lse = target, ignore, lse
  end
  return out
end
function rows_ce.backward(node, g)
  local c = new()
  call(C.lac_cross_entropy_bwd, node.a.c, node.target.c, node.ignore, node.lse.c, contiguous(g).c, c)
  return adopt(c)
end
define(rows_ce)

-- sum, mean over the targets that are not ignored, or nothing
local function reduce_loss(losses, target, o)
  if o.reduction == "none" then return fn.reshape(losses, shape(target)) end
  local total = fn.sum(losses)
  if o.reduction == "sum" then return total end
  local counted = raw_reduce(C.LAC_SUM, raw_scalar(map_id.ne, target, o.ignore_index), 0, false)
  return total / tensor.cast(counted, total.c.dtype)
end

local LOSS = { ignore_index = { type = "integer", default = -100 },
               reduction = { one_of = { "mean", "sum", "none" }, default = "mean" } }

local function check_target(op, logits_name, x, target)
  local t = target.c
  if t.dtype ~= C.LAC_I64 and t.dtype ~= C.LAC_I32 then
    fail(op, "target must hold 0-based classes as i64 or i32, got %s", show(target))
  end
  local fits = x.c.ndim >= 1 and t.ndim == x.c.ndim - 1
  for i = 0, t.ndim - 1 do fits = fits and t.shape[i] == x.c.shape[i] end
  if not fits then
    fail(op, "target must have the shape of %s without its last dimension: target is %s, %s is %s",
         logits_name, show(target), logits_name, show(x))
  end
end

--- -log softmax(logits) at the target class.
-- @tparam Tensor logits [..., V] @tparam Tensor target [...] 0-based classes, i64 or i32
-- @tparam[opt] table options ignore_index (-100: such targets count nothing), reduction "mean" (over the
-- targets that count), "sum" or "none"
define { name = "cross_entropy", composite = true, forward = function(logits, target, options)
  expect("cross_entropy", "logits", logits)
  expect("cross_entropy", "target", target)
  local o = schema.options("cross_entropy", options, LOSS)
  check_target("cross_entropy", "logits", logits, target)
  local flat = target.c.ndim == 1 and target or fn.reshape(target, numel(target))
  local x = logits.c.ndim == 2 and logits or fn.reshape(logits, numel(target), logits:size(-1))
  return reduce_loss(rows_ce.forward(x, flat, o.ignore_index), target, o)
end }

local rows_lce = { name = "linear_cross_entropy_rows", public = "linear_cross_entropy", saves = "abc",
                   method = false, internal = true }
function rows_lce.forward(x, w, bias, target, ignore, chunk)
  local c, lse = new(), new()
  call(C.lac_linear_cross_entropy, x.c, w.c, bias and bias.c or nil, target.c, ignore, chunk, c, lse)
  local out = adopt(c)
  lse = adopt(lse)
  if wants(x, w, bias) then
    local node = record(rows_lce, out, x, w, bias)
    remember(node, target)
    node.target, node.ignore, node.chunk, node.lse = target, ignore, chunk, lse
  end
  return out
end
function rows_lce.backward(node, g)
  local bias = node.c
  local dx, dw, db = new(), new(), bias and new() or nil
  call(C.lac_linear_cross_entropy_bwd, node.a.c, node.b.c, bias and bias.c or nil, node.target.c, node.ignore,
       node.chunk, node.lse.c, contiguous(g).c, dx, dw, db)
  return adopt(dx), adopt(dw), db and adopt(db)
end
define(rows_lce)

local LINEAR_LOSS = { ignore_index = LOSS.ignore_index, reduction = LOSS.reduction,
                      chunk = { type = "integer", min = 0, default = 0 } }

--- cross_entropy(linear(x, w, bias), target) without ever holding the logits: `chunk` rows at a time.
-- @tparam Tensor x [..., E] @tparam Tensor w [V, E] @tparam[opt] Tensor bias [V]
-- @tparam Tensor target [...] 0-based classes
-- @tparam[opt] table options ignore_index, reduction, chunk (0: the engine chooses)
define { name = "linear_cross_entropy", composite = true, forward = function(x, w, bias, target, options)
  expect("linear_cross_entropy", "x", x)
  expect("linear_cross_entropy", "w", w)
  if bias ~= nil then expect("linear_cross_entropy", "bias", bias) end
  expect("linear_cross_entropy", "target", target)
  local o = schema.options("linear_cross_entropy", options, LINEAR_LOSS)
  check_target("linear_cross_entropy", "x", x, target)
  local flat = target.c.ndim == 1 and target or fn.reshape(target, numel(target))
  local x2 = x.c.ndim == 2 and x or fn.reshape(x, numel(target), x:size(-1))
  return reduce_loss(rows_lce.forward(x2, w, bias, flat, o.ignore_index, o.chunk), target, o)
end }

-- ---- indexing -----------------------------------------------------------------------------------

local function define_index(name, forward, backward)
  local op = { name = name, saves = "b" }
  function op.forward(x, dim, idx)
    expect(name, "x", x)
    expect(name, "idx", idx)
    local k = axis(name, x, dim)
    local c = new()
    call(C[forward], x.c, k, idx.c, c)
    local out = adopt(c)
    if wants(x) then
      record2(op, out, x, idx)
      out.node.k = k
    end
    return out
  end
  function op.backward(node, g)
    local c = new()
    call(C[backward], g.c, node.k, node.b.c, node.a.c.shape[node.k], c)
    return adopt(c)
  end
  define(op)
end
--- index_select(x, dim, idx): rows of x along dim at the 0-based positions in idx, whose shape replaces
-- the dim.
define_index("index_select", "lac_index_select", "lac_index_select_bwd")
--- gather(x, dim, idx): elementwise along dim; idx (0-based values) has x's rank and the result's shape.
define_index("gather", "lac_gather", "lac_gather_bwd")

--- Rows of weight [V, E] at the 0-based ids in idx [...] -> [..., E].
define { name = "embedding", composite = true, forward = function(weight, idx)
  expect("embedding", "weight", weight)
  expect("embedding", "idx", idx)
  if weight.c.ndim ~= 2 then fail("embedding", "weight must be [V, E], got %s", show(weight)) end
  return fn.index_select(weight, 1, idx)
end }

local where_op = { name = "where", saves = "a" }
--- x where cond is true, else y; all broadcast; x or y may be numbers.
function where_op.forward(cond, x, y)
  expect("where", "cond", cond)
  x, y = as_number(x), as_number(y)
  if type(x) == "number" and type(y) == "number" then
    local o = { device = device.name(cond.c.device) }
    x, y = create.tensor(x, o), create.tensor(y, o)
  elseif type(x) == "number" and is(y) then
    x = scalar_like(x, y)
  elseif type(y) == "number" and is(x) then
    y = scalar_like(y, x)
  end
  expect("where", "x", x)
  expect("where", "y", y)
  local c = new()
  call(C.lac_where, cond.c, x.c, y.c, c)
  local out = adopt(c)
  if wants(x, y) then record(where_op, out, cond, x, y) end
  return out
end
function where_op.backward(node, g)
  local cond, x, y = node.a, node.b, node.c
  local zero = scalar_like(0, g)
  local gx, gy
  if x.requires_grad then
    local c = new()
    call(C.lac_where, cond.c, g.c, zero.c, c)
    gx = sum_to(adopt(c), x)
  end
  if y.requires_grad then
    local c = new()
    call(C.lac_where, cond.c, zero.c, g.c, c)
    gy = sum_to(adopt(c), y)
  end
  return nil, gx, gy
end
define(where_op)

--- x with `value` (a number) where mask is true.
define { name = "masked_fill", composite = true, forward = function(x, mask, value)
  expect("masked_fill", "x", x)
  expect("masked_fill", "mask", mask)
  value = as_number(value)
  if type(value) ~= "number" then fail("masked_fill", "value must be a number, got %s", show(value)) end
  local out = fn.where(mask, value, x)
  if not same_shape(out, x) then
    fail("masked_fill", "mask %s does not broadcast to x %s", show(mask), show(x))
  end
  return out
end }

--- x limited to [low, high]; either may be nil, a number or a tensor.
define { name = "clamp", composite = true, forward = function(x, low, high)
  expect("clamp", "x", x)
  if type(low) == "table" and not is(low) then
    local o = schema.options("clamp", low, { min = { type = { "number", "tensor" } },
                                             max = { type = { "number", "tensor" } } })
    low, high = o.min, o.max
  end
  if low == nil and high == nil then fail("clamp", "needs a lower or an upper bound") end
  if type(low) == "number" and type(high) == "number" and low > high then
    fail("clamp", "the lower bound %s is above the upper bound %s", show(low), show(high))
  end
  if low ~= nil then x = fn.maximum(x, low) end
  if high ~= nil then x = fn.minimum(x, high) end
  return x
end }

local function triangle(name, compare)
  define { name = name, composite = true, forward = function(x, k)
    expect(name, "x", x)
    k = k == nil and 0 or k
    if not is_integer(k) then fail(name, "the diagonal must be an integer, got %s", show(k)) end
    if x.c.ndim < 2 then fail(name, "needs 2 dimensions or more, got %s", show(x)) end
    local dev = device.name(x.c.device)
    local rows_at = create.arange { k, k + x:size(-2), dtype = "i64", device = dev }:view(x:size(-2), 1)
    local columns = create.arange { x:size(-1), dtype = "i64", device = dev }
    return fn.where(compare(columns, rows_at), x, 0)
  end }
end
--- Lower triangle of the last two dimensions; the rest is 0. k shifts the diagonal to the right.
triangle("tril", fn.le)
--- Upper triangle.
triangle("triu", fn.ge)

--- [..., classes] with 1 at the 0-based class of idx.
define { name = "one_hot", nondifferentiable = true, forward = function(idx, classes, options)
  expect("one_hot", "idx", idx)
  schema.check("one_hot", "classes", classes, { type = "integer", min = 1 })
  local o = schema.options("one_hot", options, { dtype = { type = "string" } })
  local code = idx.c.dtype
  if code ~= C.LAC_I64 and code ~= C.LAC_I32 then
    fail("one_hot", "idx must be i64 or i32, got %s", show(idx))
  end
  if numel(idx) > 0 then
    local low = raw_reduce(C.LAC_MIN, idx, 0, false):item()
    local high = raw_reduce(C.LAC_MAX, idx, 0, false):item()
    if low < 0 or high >= classes then
      fail("one_hot", "class %s is outside 0 to %d", show(low < 0 and low or high), classes - 1)
    end
  end
  local range = create.arange { classes, dtype = device.dtype_name[code], device = device.name(idx.c.device) }
  local hot = fn.eq(fn.unsqueeze(tensor.alias(idx), -1), range)
  return tensor.cast(hot, device.dtype("one_hot", o.dtype))
end }

-- ---- joining ------------------------------------------------------------------------------------

local function check_list(op, list)
  if type(list) ~= "table" or is(list) then fail(op, "expected a list of tensors, got %s", show(list)) end
  if #list == 0 then fail(op, "the list of tensors is empty") end
  for i = 1, #list do
    if not is(list[i]) then fail(op, "element %d of the list must be a tensor, got %s", i, show(list[i])) end
    if list[i].c.dtype ~= list[1].c.dtype or list[i].c.device ~= list[1].c.device then
      fail(op, "tensors differ in dtype or device: 1 is %s, %d is %s", show(list[1]), i, show(list[i]))
    end
  end
end

local cat_op = { name = "cat", method = false }
--- Join tensors along dim (1 unless given).
function cat_op.forward(list, dim)
  check_list("cat", list)
  local first = list[1]
  local k = axis("cat", first, dim == nil and 1 or dim)
  local total, wanted = 0, false
  for i = 1, #list do
    local c = list[i].c
    local fits = c.ndim == first.c.ndim
    for d = 0, c.ndim - 1 do fits = fits and (d == k or c.shape[d] == first.c.shape[d]) end
    if not fits then
      fail("cat", "tensors must agree except in dim %d: 1 is %s, %d is %s", k + 1, show(first), i,
           show(list[i]))
    end
    total = total + tonumber(c.shape[k])
    wanted = wanted or list[i].requires_grad
  end
  local sizes = shape(first)
  sizes[k + 1] = total
  local out = tensor.empty(first.c.dtype, first.c.device, sizes, #sizes)
  local spec, inputs = whole(out), {}
  for i = 1, #list do
    spec.count[k + 1] = tonumber(list[i].c.shape[k])
    if numel(list[i]) > 0 then call(C.lac_copy, list[i].c, tensor.raw_slice(out, spec).c) end
    spec.start[k + 1] = spec.start[k + 1] + spec.count[k + 1]
    inputs[i] = list[i]
  end
  if wanted and tape.enabled then
    local node = record(cat_op, out)
    node.list, node.k = inputs, k
  end
  return out
end
cat_op.alias = true
function cat_op.backward(node, g)
  local spec, k, grads = whole(g), node.k + 1, {}
  for i = 1, #node.list do
    spec.count[k] = tonumber(node.list[i].c.shape[node.k])
    grads[i] = tensor.raw_slice(g, spec)
    spec.start[k] = spec.start[k] + spec.count[k]
  end
  return grads
end
define(cat_op)

--- Join tensors of one shape along a new dimension dim (1 unless given).
define { name = "stack", composite = true, method = false, forward = function(list, dim)
  check_list("stack", list)
  dim = dim == nil and 1 or dim
  local parts = {}
  for i = 1, #list do
    if not same_shape(list[i], list[1]) then
      fail("stack", "tensors must have one shape: 1 is %s, %d is %s", show(list[1]), i, show(list[i]))
    end
    parts[i] = fn.unsqueeze(list[i], dim)
  end
  return fn.cat(parts, dim)
end }

local MAX_PARTS = 2 ^ 20 -- tensors in one Lua table: beyond this it is a mistake

--- Views of consecutive parts along dim (1): a size (the last part may be shorter) or a list of sizes that
-- sum to the dim.
define { name = "split", composite = true, forward = function(x, size, dim)
  receiver("split", x)
  dim = dim == nil and 1 or dim
  local total = tonumber(x.c.shape[axis("split", x, dim)])
  local sizes = size
  if type(size) ~= "table" then
    schema.check("split", "size", size == nil and false or size, { type = "integer", min = 1 })
    sizes = {}
    if total / size > MAX_PARTS then
      fail("split", "size %d cuts dimension %d of %d into more than %d parts", size, dim, total, MAX_PARTS)
    end
    for at = 0, total - 1, size do sizes[#sizes + 1] = math.min(size, total - at) end
  end
  local parts, at = {}, 1
  local sum = 0
  for i = 1, #sizes do
    if not is_integer(sizes[i]) or sizes[i] < 0 then
      fail("split", "size %d must be an integer, got %s", i, show(sizes[i]))
    end
    sum = sum + sizes[i]
  end
  if sum ~= total then
    fail("split", "sizes %s sum to %d, dimension %d has %d", show(sizes), sum, dim, total)
  end
  for i = 1, #sizes do
    parts[i] = fn.narrow(x, dim, at, sizes[i])
    at = at + sizes[i]
  end
  return parts
end }

--- n views of nearly equal parts along dim (1); fewer when the dim is smaller than n.
define { name = "chunk", composite = true, forward = function(x, n, dim)
  receiver("chunk", x)
  schema.check("chunk", "n", n == nil and false or n, { type = "integer", min = 1 })
  local total = tonumber(x.c.shape[axis("chunk", x, dim == nil and 1 or dim)])
  return fn.split(x, math.max(1, math.ceil(total / n)), dim)
end }

-- ---- random and positions -----------------------------------------------------------------------

local dropout_op = { name = "dropout" }
--- In training: zero elements with probability p and scale the others by 1/(1-p). Otherwise x itself.
-- @tparam Tensor x @tparam number p in [0, 1) @tparam[opt] boolean training true unless given
function dropout_op.forward(x, p, training)
  expect("dropout", "x", x)
  if type(p) ~= "number" or not (p >= 0 and p < 1) then
    fail("dropout", "p must be in [0, 1), got %s", show(p))
  end
  if training ~= nil and type(training) ~= "boolean" then
    fail("dropout", "training must be true or false, got %s", show(training))
  end
  if training == false or p == 0 then return x end
  local seed, offset = create.draw()
  local c = new()
  call(C.lac_dropout, x.c, p, seed, offset, c)
  local out = adopt(c)
  if wants(x) then
    record1(dropout_op, out, x)
    local node = out.node
    node.p, node.seed, node.offset = p, seed, offset
  end
  return out
end
function dropout_op.backward(node, g)
  local c = new()
  call(C.lac_dropout, g.c, node.p, node.seed, node.offset, c)
  return adopt(c)
end
define(dropout_op)

local ROPE = {
  start = { type = "integer", default = 0 },
  base = { type = "number", above = 0, default = 10000 },
  interleaved = { type = "boolean", default = false },
  scale_base = { type = "number", min = 0, default = 0 },
  sign = { one_of = { 1, -1 }, default = 1 },
}

local rope_op = { name = "rope" }
--- Rotary positions (Su et al. 2021, eq. 34), and XPOS decay (Sun et al. 2022, eq. 9) if scale_base > 0.
-- @tparam Tensor x [B, N, H, D] @tparam[opt] table options start (position of row 1, 0), base (10000),
-- interleaved (false: pairs are i, i + D/2), scale_base (0: no XPOS), sign (1 for queries, -1 for keys)
function rope_op.forward(x, options)
  expect("rope", "x", x)
  local o = schema.options("rope", options, ROPE)
  local c = new()
  call(C.lac_rope, x.c, o.start, o.base, o.interleaved and 1 or 0, o.scale_base, o.sign, 0, c)
  local out = adopt(c)
  if wants(x) then
    record1(rope_op, out, x)
    out.node.o_rope = o
  end
  return out
end
function rope_op.backward(node, g)
  local o, c = node.o_rope, new()
  call(C.lac_rope, g.c, o.start, o.base, o.interleaved and 1 or 0, o.scale_base, o.sign, 1, c)
  return adopt(c)
end
define(rope_op)

-- ---- comparisons of whole tensors ---------------------------------------------------------------

--- Same shape, dtype and elements? (NaN differs from NaN.)
function fn.equal(a, b)
  expect("equal", "a", a)
  expect("equal", "b", b)
  if not same_shape(a, b) or a.c.dtype ~= b.c.dtype or a.c.device ~= b.c.device then return false end
  if numel(a) == 0 then return true end
  return raw_reduce(C.LAC_ALL, raw_map2(map_id.eq, a, b), 0, false):item()
end
methods.equal = fn.equal

--- Is |a - b| <= atol + rtol |b| everywhere? Equal infinities are close. rtol 1e-5, atol 1e-8 unless given.
function fn.allclose(a, b, options)
  expect("allclose", "a", a)
  expect("allclose", "b", b)
  local o = schema.options("allclose", options, { rtol = { type = "number", min = 0, default = 1e-5 },
                                                  atol = { type = "number", min = 0, default = 1e-8 } })
  if not same_shape(a, b) then fail("allclose", "shapes differ: a is %s, b is %s", show(a), show(b)) end
  local x, y = tensor.flat_list(a), tensor.flat_list(b)
  for i = 1, #x do
    local p, q = as_number(x[i]), as_number(y[i])
    local close = math.abs(p - q) <= o.atol + o.rtol * math.abs(q) -- false for NaN
    if p ~= q and not close then return false end
  end
  return true
end
methods.allclose = fn.allclose

return ops
