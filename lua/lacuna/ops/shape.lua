--- Shapes from shapes: padding, tiling, rolling, flipping, diagonals, windows, grids.
--
-- Where strides can say it, the result is a view: flip (negative stride), diagonal (the sum of two strides),
-- unfold (overlapping windows), meshgrid (stride 0). What must copy is one kernel: position i of a padded
-- axis shows position i - before of x, and the mode says what stands outside; a roll is circular padding by
-- (s, -s), tiling is circular padding by a multiple of the size. Gradients follow: the inverse view, or the
-- sum over the places where an element was put.
--
-- Views cost nothing and share memory, where torch copies (flip, meshgrid); writing to overlapping ones is
-- refused by the engine. Rejected: pooling kernels of their own, since a window is a view, and a reduction
-- over its last dimension runs at the speed of memory.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops.base"

local ffi, C = lib.ffi, lib.C
local call = lib.call
local fail, show, is_integer = schema.fail, schema.show, schema.is_integer
local is, adopt, expect, axis, numel = tensor.is, tensor.adopt, tensor.expect, tensor.axis, tensor.numel
local fn = ops.fn
local internal = ops.internal
local record1, wants, new, define = internal.record1, internal.wants, internal.new, internal.define
local zeros_like, whole = internal.zeros_like, internal.whole

-- ---- padding --------------------------------------------------------------------------------------

local int64s = ffi.typeof("int64_t[6]")
local BEFORE, AFTER = int64s(), int64s()
local MODE = { constant = C.LAC_PAD_CONSTANT, reflect = C.LAC_PAD_REFLECT, replicate = C.LAC_PAD_REPLICATE,
               circular = C.LAC_PAD_CIRCULAR }
local PAD = { mode = { one_of = { "constant", "reflect", "replicate", "circular" }, default = "constant" },
              value = { type = "number" } }

local pad_op = { name = "pad" }

-- before and after: a number for each axis
local function padded(x, before, after, mode, value)
  local c = new()
  for i = 1, x.c.ndim do BEFORE[i - 1], AFTER[i - 1] = before[i], after[i] end
  call(C.lac_pad, x.c, BEFORE, AFTER, mode, value, c)
  local out = adopt(c)
  if wants(x) then
    record1(pad_op, out, x)
    out.node.before, out.node.mode = before, mode
  end
  return out
end

--- x with elements added round it, or cropped where a number is negative.
-- @tparam Tensor x
-- @tparam table amounts {before, after} of the last dimension, then of the one before it, and so on
-- @tparam[opt] table options mode "constant" (default), "reflect" (the mirror image without the edge),
-- "replicate" (the edge) or "circular"; value (0), of constant
function pad_op.forward(x, amounts, options)
  expect("pad", "x", x)
  local n = x.c.ndim
  if type(amounts) ~= "table" or is(amounts) then
    fail("pad", "amounts must be a list {before, after, ...}, got %s", show(amounts))
  end
  if #amounts == 0 and next(amounts) ~= nil then
    fail("pad", "amounts must be a list {before, after, ...}, got the key %s", show((next(amounts))))
  end
  for i = 1, #amounts do
    if not is_integer(amounts[i]) then fail("pad", "amount %d must be an integer, got %s", i,
      show(amounts[i])) end
  end
  if #amounts % 2 == 1 or #amounts > 2 * n then
    fail("pad", "amounts come in pairs for at most the %d dimensions of %s, got %d numbers", n, show(x),
      #amounts)
  end
  local o = schema.options("pad", options, PAD)
  if o.value and o.mode ~= "constant" then fail("pad", "value is for mode 'constant', not '%s'", o.mode) end
  local before, after = {}, {}
  for i = 1, n do before[i], after[i] = 0, 0 end
  for i = 1, #amounts / 2 do
    before[n + 1 - i], after[n + 1 - i] = amounts[2 * i - 1], amounts[2 * i]
  end
  return padded(x, before, after, MODE[o.mode], o.value or 0)
end
function pad_op.backward(node, g)
  local c, x = new(), node.a.c
  for i = 1, x.ndim do BEFORE[i - 1], AFTER[i - 1] = node.before[i], x.shape[i - 1] end
  call(C.lac_pad_bwd, g.c, AFTER, BEFORE, node.mode, c)
  return adopt(c)
end
define(pad_op)

-- integers given as arguments or as one table
local function integers(op, what, first, ...)
  local list = first
  if type(first) ~= "table" or is(first) then list = { first, ... } end
  if #list == 0 and next(list) ~= nil then
    fail(op, "%ss are a list, got the key %s", what, show((next(list))))
  end
  for i = 1, #list do
    if not is_integer(list[i]) then fail(op, "%s %d must be an integer, got %s", what, i, show(list[i])) end
  end
  return list
end

--- x repeated along its dimensions: x:tile(2, 3) has the last dimension three times and the one before it
-- twice; dimensions are added in front for more numbers than x has. (torch's repeat, which is a word of Lua.)
define { name = "tile", composite = true, forward = function(x, ...)
  expect("tile", "x", x)
  local times = integers("tile", "the number", ...)
  for i = 1, #times do
    if times[i] < 0 then fail("tile", "the number %d must not be negative, got %d", i, times[i]) end
  end
  local sizes = tensor.shape(x)
  while #sizes < #times do table.insert(sizes, 1, 1) end
  if #sizes > x.c.ndim then x = fn.reshape(x, sizes) end
  local before, after, lead = {}, {}, #sizes - #times
  for i = 1, #sizes do before[i], after[i] = 0, sizes[i] * ((times[i - lead] or 1) - 1) end
  return padded(x, before, after, C.LAC_PAD_CIRCULAR, 0)
end }

--- Elements moved along dimensions, those that leave come in at the other end.
-- @tparam Tensor x @tparam integer|table shifts
-- @tparam[opt] integer|table dims the flattened tensor is rolled unless given
define { name = "roll", composite = true, forward = function(x, shifts, dims)
  expect("roll", "x", x)
  shifts = integers("roll", "shift", shifts)
  if dims == nil then
    if #shifts ~= 1 then fail("roll", "without dims there is one shift, got %s", show(shifts)) end
    return fn.reshape(fn.roll(fn.reshape(x, numel(x)), shifts, 1), tensor.shape(x))
  end
  dims = integers("roll", "dim", dims)
  if #dims ~= #shifts then fail("roll", "shifts and dims must have the same length: %d != %d", #shifts,
    #dims) end
  local before, after = {}, {}
  for i = 1, x.c.ndim do before[i], after[i] = 0, 0 end
  for i = 1, #dims do
    local k = axis("roll", x, dims[i])
    local n = tonumber(x.c.shape[k])
    local s = n == 0 and 0 or (before[k + 1] + shifts[i]) % n
    before[k + 1], after[k + 1] = s, -s
  end
  return padded(x, before, after, C.LAC_PAD_CIRCULAR, 0)
end }

--- Each element of dim several times in a row.
-- @tparam Tensor x @tparam integer|Tensor times one number, or an index tensor [size of dim]
-- @tparam[opt] integer dim of the flattened tensor unless given
define { name = "repeat_interleave", composite = true, forward = function(x, times, dim)
  local op = "repeat_interleave"
  expect(op, "x", x)
  if dim == nil then x, dim = fn.reshape(x, numel(x)), 1 end
  local k = axis(op, x, dim)
  local n = tonumber(x.c.shape[k])
  local counts
  if is(times) then
    if times.c.ndim ~= 1 or times.c.shape[0] ~= n or device.is_float(times.c.dtype) then
      fail(op, "times must be [%d] integers for dimension %d of %s, got %s", n, k + 1, show(x), show(times))
    end
    counts = tensor.flat_list(times)
  else
    schema.check(op, "times", times == nil and false or times, { type = "integer", min = 0 })
    local place = create.arange { n, dtype = "i64", device = device.name(x.c.device) }
    return fn.index_select(x, k + 1, fn.reshape(fn.expand(fn.unsqueeze(place, 2), n, times), n * times))
  end
  local total = 0
  for i = 1, n do
    local v = internal.as_number(counts[i])
    if type(v) ~= "number" or v < 0 or v > 2 ^ 40 then
      fail(op, "times[%d] must not be negative, got %s", i, tostring(v))
    end
    counts[i], total = v, total + v
  end
  local index = tensor.empty(C.LAC_I64, C.LAC_CPU, { total }, 1)
  local p, at = tensor.pointer(index), 0
  for i = 1, n do
    for _ = 1, counts[i] do p[at], at = i - 1, at + 1 end
  end
  if x.c.device ~= C.LAC_CPU then index = fn.to(index, { device = device.name(x.c.device) }) end
  return (fn.index_select(x, k + 1, index))
end }

-- ---- views ------------------------------------------------------------------------------------------

local flip_op = { name = "flip", alias = true }
local function flipped(x, axes)
  local spec = whole(x)
  for i = 1, #axes do
    local a = axes[i] + 1
    spec.start[a], spec.step[a] = spec.count[a] - 1, -1
  end
  return tensor.raw_slice(x, spec)
end
--- x backwards along dims (numbers or one table); a view.
function flip_op.forward(x, ...)
  expect("flip", "x", x)
  local dims, axes, seen = integers("flip", "dim", ...), {}, {}
  if #dims == 0 then fail("flip", "takes the dims to reverse") end
  for i = 1, #dims do
    axes[i] = axis("flip", x, dims[i])
    if seen[axes[i]] then fail("flip", "dim %d appears twice in %s", dims[i], show(dims)) end
    seen[axes[i]] = true
  end
  local out = flipped(x, axes)
  if wants(x) then
    record1(flip_op, out, x)
    out.node.axes = axes
  end
  return out
end
function flip_op.backward(node, g) return flipped(g, node.axes) end
define(flip_op)

-- the diagonal of axes i and j as a last axis
local function diagonal_view(x, offset, i, j)
  local out = tensor.alias(x)
  local c, old, n = out.c, x.c, 0
  local rows, columns = tonumber(old.shape[i]), tonumber(old.shape[j])
  local length = math.max(0, offset >= 0 and math.min(rows, columns - offset) or math.min(rows + offset,
    columns))
  for d = 0, old.ndim - 1 do
    if d ~= i and d ~= j then
      c.shape[n], c.stride[n] = old.shape[d], old.stride[d]
      n = n + 1
    end
  end
  c.shape[n], c.stride[n], c.ndim = length, old.stride[i] + old.stride[j], n + 1
  if length > 0 then
    c.offset = c.offset + (offset >= 0 and offset * old.stride[j] or -offset * old.stride[i])
  end
  return out
end

local function check_offset(op, x, offset)
  expect(op, "x", x)
  offset = offset == nil and 0 or offset
  if not is_integer(offset) then fail(op, "the offset must be an integer, got %s", show(offset)) end
  return offset
end

local diagonal_op = { name = "diagonal" }
--- The diagonal of two dimensions, as a new last dimension; a view. A positive offset lies above.
-- @tparam Tensor x @tparam[opt=0] integer offset @tparam[opt=1] integer dim1 @tparam[opt=2] integer dim2
function diagonal_op.forward(x, offset, dim1, dim2)
  offset = check_offset("diagonal", x, offset)
  if x.c.ndim < 2 then fail("diagonal", "needs 2 dimensions or more, got %s", show(x)) end
  local i, j = axis("diagonal", x, dim1 == nil and 1 or dim1), axis("diagonal", x, dim2 == nil and 2 or dim2)
  if i == j then fail("diagonal", "needs two different dims, got %s twice", show(dim1)) end
  local out = diagonal_view(x, offset, i, j)
  if wants(x) then
    record1(diagonal_op, out, x)
    out.node.offset, out.node.i, out.node.j = offset, i, j
  end
  return out
end
function diagonal_op.backward(node, g)
  local z = zeros_like(node.a)
  if numel(g) > 0 then call(C.lac_copy, g.c, diagonal_view(z, node.offset, node.i, node.j).c) end
  return z
end
define(diagonal_op)

local diag_op = { name = "diag" }
--- A matrix with x [n] on its diagonal, or the diagonal of a matrix.
function diag_op.forward(x, offset)
  offset = check_offset("diag", x, offset)
  if x.c.ndim == 2 then return (fn.diagonal(x, offset)) end
  if x.c.ndim ~= 1 then fail("diag", "x must have 1 or 2 dimensions, got %s", show(x)) end
  local n = numel(x) + math.abs(offset)
  local out = tensor.empty(x.c.dtype, x.c.device, { n, n }, 2)
  call(C.lac_fill, out.c, 0)
  if numel(x) > 0 then call(C.lac_copy, x.c, diagonal_view(out, offset, 0, 1).c) end
  if wants(x) then
    record1(diag_op, out, x)
    out.node.offset = offset
  end
  return out
end
function diag_op.backward(node, g) return diagonal_view(g, node.offset, 0, 1) end
diag_op.alias = true
define(diag_op)

--- The sum of a matrix's diagonal.
define { name = "trace", composite = true, forward = function(x)
  expect("trace", "x", x)
  if x.c.ndim ~= 2 then fail("trace", "x must be a matrix, got %s", show(x)) end
  return (fn.sum(fn.diagonal(x)))
end }

local unfold_op = { name = "unfold" }
local function windows(x, k, size, step)
  local out = tensor.alias(x)
  local c, n = out.c, x.c.ndim
  c.shape[k] = math.floor((tonumber(x.c.shape[k]) - size) / step) + 1
  c.shape[n], c.stride[n], c.ndim = size, x.c.stride[k], n + 1
  c.stride[k] = x.c.stride[k] * step
  return out
end
--- Windows of `size` positions along dim, one every `step` (1), as a new last dimension; an overlapping view.
function unfold_op.forward(x, dim, size, step)
  expect("unfold", "x", x)
  local k = axis("unfold", x, dim)
  local n = tonumber(x.c.shape[k])
  step = step == nil and 1 or step
  schema.check("unfold", "step", step, { type = "integer", min = 1 })
  schema.check("unfold", "size", size == nil and false or size, { type = "integer", min = 1 })
  if size > n then fail("unfold", "windows of %d do not fit into dimension %d of %s", size, k + 1,
    show(x)) end
  if x.c.ndim == tensor.max_dims then
    fail("unfold", "%s has %d dimensions, the most there can be", show(x), tensor.max_dims)
  end
  local out = windows(x, k, size, step)
  if wants(x) then
    record1(unfold_op, out, x)
    out.node.k, out.node.size, out.node.step = k, size, step
  end
  return out
end
function unfold_op.backward(node, g)
  local z = zeros_like(node.a)
  local to = windows(z, node.k, node.size, node.step)
  local from_spec, to_spec, last = whole(g), whole(to), g.c.ndim
  from_spec.count[last], from_spec.drop[last], to_spec.count[last], to_spec.drop[last] = 1, true, 1, true
  for i = 0, node.size - 1 do -- one offset in the window after the other: no two of its elements meet
    from_spec.start[last], to_spec.start[last] = i, i
    call(C.lac_axpy, 1, tensor.raw_slice(g, from_spec).c, tensor.raw_slice(to, to_spec).c)
  end
  return z
end
define(unfold_op)

local GRID = { indexing = { one_of = { "ij", "xy" }, default = "ij" } }
--- Coordinates of a grid: for vectors of n1, n2, ... elements as many tensors [n1, n2, ...], views of them.
-- @tparam table list of tensors with at most one dimension
-- @tparam[opt] table options indexing "ij", or "xy" with the first two dimensions swapped
define { name = "meshgrid", composite = true, method = false, forward = function(list, options)
  if type(list) ~= "table" or is(list) or #list == 0 then
    fail("meshgrid", "expected a list of vectors, got %s", show(list))
  end
  local o, sizes, grids = schema.options("meshgrid", options, GRID), {}, {}
  if #list > tensor.max_dims then
    fail("meshgrid", "a tensor has at most %d dimensions, got %d vectors", tensor.max_dims, #list)
  end
  for i = 1, #list do
    expect("meshgrid", ("list[%d]"):format(i), list[i])
    if list[i].c.ndim > 1 then fail("meshgrid", "list[%d] must be a vector, got %s", i, show(list[i])) end
    sizes[i] = numel(list[i])
  end
  for i = 1, #list do
    local ones = {}
    for d = 1, #list do ones[d] = d == i and sizes[i] or 1 end
    grids[i] = fn.expand(fn.reshape(list[i], ones), sizes)
    if o.indexing == "xy" and #list > 1 then grids[i] = fn.transpose(grids[i], 1, 2) end
  end
  return unpack(grids)
end }

-- ---- pooling ------------------------------------------------------------------------------------------

local POOL = { stride = { type = "integer", min = 1 }, padding = { type = "integer", min = 0, default = 0 } }

local function pool(name, reduce, outside)
  define { name = name, composite = true, forward = function(x, size, options)
    expect(name, "x", x)
    local o = schema.options(name, options, POOL)
    schema.check(name, "size", size == nil and false or size, { type = "integer", min = 1 })
    if x.c.ndim < 1 then fail(name, "x must be [..., N], got %s", show(x)) end
    if not device.is_float(x.c.dtype) then fail(name, "x must hold floats, got %s", show(x)) end
    if o.padding * 2 > size then
      fail(name, "padding must be at most half of the size %d, got %d", size, o.padding)
    end
    if o.padding > 0 then x = fn.pad(x, { o.padding, o.padding }, { value = outside }) end
    if size > x.c.shape[x.c.ndim - 1] then
      fail(name, "windows of %d do not fit into the last dimension of %s", size, show(x))
    end
    return reduce(fn.unfold(x, -1, size, o.stride or size), -1)
  end }
end
--- Means of windows along the last dimension: x [..., N], size; options stride (size), padding (0; the zeros
-- count).
pool("avg_pool1d", fn.mean, 0)
--- Maxima of windows along the last dimension: x [..., N], size; options stride (size), padding (0; what is
-- padded is -inf).
pool("max_pool1d", fn.max, -math.huge)
