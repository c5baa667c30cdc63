--- Casts, copies, views and slices.
--
-- A view is another struct on the same storage: no engine call, no copy, and its gradient is the inverse view
-- of the gradient. Slicing follows NumPy with Lua's 1-based, inclusive positions: t[2], t[-1],
-- t[{ { 1, 3 }, {}, 2 }], steps, index tensors and masks. What cannot be a view (an index tensor, a mask, a
-- reshape of strided elements) copies and says so in its documentation.
--
-- The gradient of a slice is a zero tensor with the gradient copied in: simple, and one copy more than
-- needed where a tensor is cut into all its parts; the tape adds them up.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local C = lib.C
local call = lib.call
local fail, show, is_integer = schema.fail, schema.show, schema.is_integer
local is, adopt, expect, receiver = tensor.is, tensor.adopt, tensor.expect, tensor.receiver
local tape, axis, shape, numel = tensor.tape, tensor.axis, tensor.shape, tensor.numel
local contiguous = tensor.contiguous
local ctensor, D, fn = tensor.ctype, tensor.sizes_buffer, ops.fn
local internal = ops.internal
local record1, wants, sum_to = internal.record1, internal.wants, internal.sum_to
local zeros_like, reshape_like, define = internal.zeros_like, internal.reshape_like, internal.define

-- ---- casts and copies ---------------------------------------------------------------------------

local TO = { dtype = { type = "string" }, device = { type = "string" },
             async = { type = "boolean", default = false } }

local function move(t, dtype, dev)
  local c = ctensor()
  c.dtype, c.device, c.ndim = dtype, dev, t.c.ndim
  for i = 0, t.c.ndim - 1 do c.shape[i] = t.c.shape[i] end
  call(C.lac_empty, c)
  local out = adopt(c)
  call(C.lac_copy, t.c, out.c)
  return out
end

local function move_async(t, dtype, dev)
  if dtype ~= t.c.dtype then
    fail("to", "async = true copies bytes as they are: cast before or after, %s to %s", show(t),
      device.dtype_name[dtype])
  end
  if t.c.device == C.LAC_CPU and C.lac_tensor_pinned(t.c) == 0 then
    fail("to", "async = true needs page-locked memory on the cpu: %s:pin() first", show(t))
  end
  local c = ctensor()
  c.device = dev
  call(C.lac_copy_async, t.c, c)
  return adopt(c)
end

local to_op = { name = "to" }
--- The same values in another dtype or on another device; x itself if nothing changes.
-- @tparam Tensor x @tparam table|string options {dtype =, device =}, or just the name of one; async = true:
--   returns at once, while the device copies a pinned, contiguous tensor (t:pin()) or one of its own.
--   Whatever uses either tensor next comes after the copy by itself: operators on the device without holding
--   up the script, reading or writing on the CPU by waiting. Only a pointer taken before (t:data()) is the
--   script's own affair.
function to_op.forward(x, options)
  receiver("to", x)
  if type(options) == "string" then options = device.target(options) end
  options = schema.options("to", options, TO)
  local dtype = options.dtype and device.dtype("to", options.dtype) or x.c.dtype
  local dev = options.device and device.code("to", options.device) or x.c.device
  if dtype == x.c.dtype and dev == x.c.device then return x end
  local out = (options.async and dev ~= x.c.device and move_async or move)(x, dtype, dev)
  -- a cast to integers has no gradient; the result is a constant
  if wants(x) and device.is_float(dtype) then record1(to_op, out, x) end
  return out
end
function to_op.backward(node, g) return move(g, node.a.c.dtype, node.a.c.device) end
define(to_op)

--- A contiguous copy of a CPU tensor in page-locked memory, from which the CUDA device copies by itself
-- (t:to{ device = "cuda", async = true }); t itself if it is that already. Page-locked memory is scarce: keep
-- it for what crosses.
function tensor.methods.pin(t)
  receiver("pin", t)
  device.code("pin", "cuda")
  if t.c.device ~= C.LAC_CPU then fail("pin", "only a tensor on the cpu can be pinned, got %s", show(t)) end
  if C.lac_tensor_pinned(t.c) == 1 and tensor.is_contiguous(t) then return t end
  return move(t, t.c.dtype, C.LAC_PINNED)
end

--- Is the tensor in page-locked memory?
function tensor.methods.is_pinned(t)
  receiver("is_pinned", t)
  return C.lac_tensor_pinned(t.c) == 1
end

local function define_cast(name, dtype)
  define { name = name, composite = true, forward = function(x)
    receiver(name, x)
    return to_op.forward(x, { dtype = dtype })
  end }
end
--- float(x): x in f32, as x:to("f32"); x itself if it is that already, and gradients flow through.
define_cast("float", "f32")
--- double(x): x in f64.
define_cast("double", "f64")
--- half(x): x in f16.
define_cast("half", "f16")
--- bfloat16(x): x in bf16.
define_cast("bfloat16", "bf16")
--- int(x): x in i32, floats towards zero; no gradient, as for all that follow.
define_cast("int", "i32")
--- long(x): x in i64, floats towards zero.
define_cast("long", "i64")
--- byte(x): x in u8.
define_cast("byte", "u8")
--- bool(x): where x is not zero.
define_cast("bool", "bool")

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
  return (fn.transpose(x, 1, 2))
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
  return (fn.expand(x, shape(like)))
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

-- positions (0-based, i64, [count]) of the nonzero elements of the flattened tensor
local function true_positions(mask)
  D[1] = numel(mask)
  local c = ctensor()
  call(C.lac_nonzero, tensor.raw_view("nonzero", mask, 1, true).c, c)
  c.ndim = 1
  return adopt(c)
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

-- the shape that x and y broadcast to, as a table
local function broadcast_sizes(op, x, y)
  local n, sizes = math.max(x.c.ndim, y.c.ndim), {}
  for i = 1, n do
    local kx, ky = i - 1 - (n - x.c.ndim), i - 1 - (n - y.c.ndim)
    local a, b = kx >= 0 and tonumber(x.c.shape[kx]) or 1, ky >= 0 and tonumber(y.c.shape[ky]) or 1
    if a ~= b and a ~= 1 and b ~= 1 then
      fail(op, "%s and %s do not broadcast: %d != %d in dimension %d", show(x), show(y), a, b, i)
    end
    sizes[i] = a == 1 and b or a
  end
  return sizes
end
ops.internal.broadcast_sizes = broadcast_sizes

ops.internal.whole, ops.internal.index_spec, ops.internal.check_mask = whole, index_spec, check_mask
ops.internal.true_positions = true_positions
