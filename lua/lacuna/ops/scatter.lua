--- Writing to indexed places: scatter and its reductions, slices by index, counting.
--
-- The inverses of gather and index_select. The engine writes in place, in the order of the indices, so that
-- repeated indices have a defined meaning: `set` keeps the last source, sums have one order for any number of
-- threads. The functional forms here copy x first; the forms with a trailing _ write into it.
--
-- Gradients are exact for repeated indices too: a source that was overwritten by a later one gets zero (the
-- rule finds the winners by scattering positions), equal extremes share, a mean divides by its count. Index
-- tensors hold 0-based contents and have the sizes of x except along dim; a source is expanded to them.
--
-- Rejected: index tensors smaller than x in other dimensions (torch allows it): nobody means it, and it hides
-- a transposed index.

local lib = require "lacuna.lib"
local arguments = require "lacuna.arguments"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops.base"

local C = lib.C
local call, call_as = lib.call, lib.call_as
local fail, show = schema.fail, schema.show
local is, adopt, expect, receiver = tensor.is, tensor.adopt, tensor.expect, tensor.receiver
local axis, methods, numel = tensor.axis, tensor.methods, tensor.numel
local fn = ops.fn
local internal = ops.internal
local record, wants, new, define = internal.record, internal.wants, internal.new, internal.define
local sum_to, scalar_like, raw_map2, map_id = internal.sum_to, internal.scalar_like, internal.raw_map2,
  internal.map_id

local SET, ADD, MEAN, MAX, MIN = C.LAC_SCATTER_SET, C.LAC_SCATTER_ADD, C.LAC_SCATTER_MEAN, C.LAC_SCATTER_MAX,
  C.LAC_SCATTER_MIN

-- ---- without gradients ----------------------------------------------------------------------------

-- a source as a tensor of x's dtype; numbers become 0-dim tensors
local function as_source(op, src, x)
  if type(src) == "boolean" then src = src and 1 or 0 end
  if type(src) == "number" then return scalar_like(src, x) end
  if not is(src) then fail(op, "src must be a tensor or a number, got %s", show(src)) end
  return src
end

local function raw_gather(x, k, idx)
  local c = new()
  call(C.lac_gather, x.c, k, idx.c, c)
  return adopt(c)
end

local function raw_select(x, k, idx)
  local c = new()
  call(C.lac_index_select, x.c, k, idx.c, c)
  return adopt(c)
end

local function raw_scatter(x, k, idx, src, mode, include_self)
  local out = tensor.cast(x, x.c.dtype)
  call(C.lac_scatter, out.c, k, idx.c, src.c, mode, include_self and 1 or 0)
  return out
end

local function raw_put(op, x, k, idx, src, add, alpha)
  local out = tensor.cast(x, x.c.dtype)
  call_as(op, "index_put", C.lac_index_put, out.c, k, idx.c, src.c, add, alpha)
  return out
end

local function raw_where(cond, x, y)
  local c = new()
  call(C.lac_where, cond.c, x.c, y.c, c)
  return adopt(c)
end

-- 0 .. n-1 along axis k, as a view that broadcasts to `rank` axes from the end
local function positions_along(n, k, rank, dev)
  local t = create.arange { n, dtype = "i64", device = device.name(dev) }
  local c = t.c
  c.ndim = rank - k
  for i = 0, c.ndim - 1 do c.shape[i], c.stride[i] = i == 0 and n or 1, 1 end
  return t
end

-- ---- scatter ----------------------------------------------------------------------------------------

local function check(op, x, dim, idx)
  expect(op, "x", x)
  expect(op, "idx", idx)
  return axis(op, x, dim)
end

local function remembered(op, out, x, src, k, idx)
  local node = record(op, out, x, src)
  node.k, node.positions = k, idx
  internal.remember(node, idx)
  return node
end

local scatter_op = { name = "scatter" }
--- x with x[.., idx[i], ..] = src[i] along dim; of several sources for one place the last stays.
-- @tparam Tensor x @tparam integer dim @tparam Tensor idx i64 or i32, 0-based, x's sizes except in dim
-- @tparam Tensor|number src of idx's shape, or expanded to it
function scatter_op.forward(x, dim, idx, src)
  local k = check("scatter", x, dim, idx)
  src = as_source("scatter", src, x)
  local out = raw_scatter(x, k, idx, src, SET, true)
  if wants(x, src) then remembered(scatter_op, out, x, src, k, idx) end
  return out
end
function scatter_op.backward(node, g)
  local x, src, k, idx = node.a, node.b, node.k, node.positions
  local gx, gs
  if x.requires_grad then gx = raw_scatter(g, k, idx, scalar_like(0, g), SET, true) end
  if src.requires_grad then
    local places = positions_along(tonumber(idx.c.shape[k]), k, idx.c.ndim, idx.c.device)
    local last = raw_scatter(tensor.empty_like(x, C.LAC_I64), k, idx, places, SET, true)
    local won = raw_map2(map_id.eq, raw_gather(last, k, idx), places)
    gs = sum_to(raw_where(won, raw_gather(g, k, idx), scalar_like(0, g)), src)
  end
  return gx, gs
end
define(scatter_op)

local add_op = { name = "scatter_add", alias = true }
--- x plus the sum of all sources of each place: x[.., idx[i], ..] += src[i] along dim.
function add_op.forward(x, dim, idx, src)
  local k = check("scatter_add", x, dim, idx)
  src = as_source("scatter_add", src, x)
  local out = raw_scatter(x, k, idx, src, ADD, true)
  if wants(x, src) then remembered(add_op, out, x, src, k, idx) end
  return out
end
function add_op.backward(node, g)
  local src = node.b
  return g, src.requires_grad and sum_to(raw_gather(g, node.k, node.positions), src) or nil
end
define(add_op)

local REDUCE = { sum = ADD, mean = MEAN, amax = MAX, amin = MIN }
local MODES = { one_of = { "sum", "mean", "amax", "amin" } }

-- how many sources each place has, in g's dtype
local function reached(node, g)
  local zeros, one = ops.raw_zeros_like(node.a), scalar_like(1, g)
  return raw_scatter(zeros, node.k, node.positions, one, ADD, true)
end

local reduce_op = { name = "scatter_reduce", saves = "abo" }
--- x with each place combined with all its sources along dim.
-- @tparam Tensor x @tparam integer dim @tparam Tensor idx @tparam Tensor|number src
-- @tparam string reduce "sum", "mean", "amax" or "amin" (NaN wins)
-- @tparam[opt=true] boolean include_self false: places with sources forget x's value; others keep it
function reduce_op.forward(x, dim, idx, src, reduce, include_self)
  local op = "scatter_reduce"
  local k = check(op, x, dim, idx)
  src = as_source(op, src, x)
  schema.check(op, "reduce", reduce, MODES)
  if include_self == nil then include_self = true end
  schema.check(op, "include_self", include_self, { type = "boolean" })
  local out = raw_scatter(x, k, idx, src, REDUCE[reduce], include_self)
  if wants(x, src) then
    local node = remembered(reduce_op, out, x, src, k, idx)
    node.mode, node.include = REDUCE[reduce], include_self
  end
  return out
end

local function mul(a, b) return raw_map2(map_id.mul, a, b) end
local function div(a, b) return raw_map2(map_id.div, a, b) end
local function equal_in(dtype, a, b) return tensor.cast(raw_map2(map_id.eq, a, b), dtype) end

function reduce_op.backward(node, g)
  local x, src, k, idx, mode = node.a, node.b, node.k, node.positions, node.mode
  local count = reached(node, g)
  local untouched = equal_in(g.c.dtype, count, scalar_like(0, g))
  -- how much of x is in each place, and of each source in its own
  local own = node.include and ops.internal.full_like(x, 1) or untouched
  local share, part
  if mode == ADD then
    share = g
  elseif mode == MEAN then
    share = div(g, raw_map2(map_id.add, count, own))
  else
    own = mul(own, equal_in(g.c.dtype, x, node.o))
    part = equal_in(g.c.dtype, raw_gather(node.o, k, idx), src)
    local hits = raw_scatter(ops.raw_zeros_like(x), k, idx, part, ADD, true)
    share = div(g, raw_map2(map_id.add, hits, own))
  end
  local gx = x.requires_grad and mul(share, own) or nil
  if not src.requires_grad then return gx end
  local gs = raw_gather(share, k, idx)
  return gx, sum_to(part and mul(gs, part) or gs, src)
end
define(reduce_op)

-- ---- slices by index --------------------------------------------------------------------------------

local index_add_op = { name = "index_add", alias = true }
--- x plus alpha times slices: x[.., idx[i], ..] += alpha src[.., i, ..] along dim.
-- @tparam Tensor x @tparam integer dim @tparam Tensor idx [n] i64 or i32, 0-based
-- @tparam Tensor|number src x's sizes with n in dim, or expanded to them @tparam[opt=1] number alpha
function index_add_op.forward(x, dim, idx, src, alpha)
  local k = check("index_add", x, dim, idx)
  alpha = alpha == nil and 1 or alpha
  schema.check("index_add", "alpha", alpha, { type = "number" })
  src = as_source("index_add", src, x)
  local out = raw_put("index_add", x, k, idx, src, 1, alpha)
  if wants(x, src) then remembered(index_add_op, out, x, src, k, idx).alpha = alpha end
  return out
end
function index_add_op.backward(node, g)
  local src, gs = node.b, nil
  if src.requires_grad then
    gs = raw_select(g, node.k, node.positions)
    if node.alpha ~= 1 then gs = internal.raw_scalar(map_id.mul, gs, node.alpha) end
    gs = sum_to(gs, src)
  end
  return g, gs
end
define(index_add_op)

local index_copy_op = { name = "index_copy" }
--- x with slices replaced: x[.., idx[i], ..] = src[.., i, ..] along dim; of equal indices the last stays.
-- @tparam Tensor x @tparam integer dim @tparam Tensor idx [n] @tparam Tensor|number src
function index_copy_op.forward(x, dim, idx, src)
  local k = check("index_copy", x, dim, idx)
  src = as_source("index_copy", src, x)
  local out = raw_put("index_copy", x, k, idx, src, 0, 1)
  if wants(x, src) then remembered(index_copy_op, out, x, src, k, idx) end
  return out
end
function index_copy_op.backward(node, g)
  local x, src, k, idx = node.a, node.b, node.k, node.positions
  local gx, gs
  if x.requires_grad then gx = raw_put("index_copy", g, k, idx, scalar_like(0, g), 0, 1) end
  if src.requires_grad then
    local n, rank = tonumber(idx.c.shape[0]), x.c.ndim
    local last = tensor.empty(C.LAC_I64, x.c.device, { tonumber(x.c.shape[k]) }, 1)
    call(C.lac_index_put, last.c, 0, idx.c, positions_along(n, 0, 1, x.c.device).c, 0, 1)
    local won = raw_select(last, 0, idx) -- [n], in the shape of a column along k
    won.c.ndim = rank - k
    for i = 1, rank - k - 1 do won.c.shape[i], won.c.stride[i] = 1, 1 end
    won = raw_map2(map_id.eq, won, positions_along(n, k, rank, x.c.device))
    gs = sum_to(raw_where(won, raw_select(g, k, idx), scalar_like(0, g)), src)
  end
  return gx, gs
end
define(index_copy_op)

--- x with the slices at idx [n] along dim set to a number.
define { name = "index_fill", composite = true, forward = function(x, dim, idx, value)
  check("index_fill", x, dim, idx)
  if type(value) ~= "number" and type(value) ~= "boolean" then
    fail("index_fill", "value must be a number, got %s", show(value))
  end
  return (fn.index_copy(x, dim, idx, value))
end }

--- Elements of x along dim at idx, which broadcast against each other except along dim (gather needs equal
-- sizes); without dim both are flattened.
define { name = "take_along_dim", composite = true, forward = function(x, idx, dim)
  expect("take_along_dim", "x", x)
  expect("take_along_dim", "idx", idx)
  if dim == nil then
    return (fn.gather(fn.reshape(x, numel(x)), 1, fn.reshape(tensor.alias(idx), numel(idx))))
  end
  local k = axis("take_along_dim", x, dim)
  if idx.c.ndim ~= x.c.ndim then
    fail("take_along_dim", "idx must have the %d dimensions of x, got %s", x.c.ndim, show(idx))
  end
  local sx, si = tensor.shape(x), tensor.shape(idx)
  for d = 1, #sx do
    if d ~= k + 1 then
      local a, b = sx[d], si[d]
      if a ~= b and a ~= 1 and b ~= 1 then
        fail("take_along_dim", "x %s and idx %s do not broadcast: %d != %d in dimension %d", show(x),
          show(idx),
             a, b, d)
      end
      sx[d], si[d] = a == 1 and b or a, a == 1 and b or a
    end
  end
  return (fn.gather(fn.expand(x, sx), k + 1, fn.expand(tensor.alias(idx), si)))
end }

-- ---- counting -----------------------------------------------------------------------------------------

local BINCOUNT = { weights = { type = "tensor" }, minlength = { type = "integer", min = 0, default = 0 } }

--- How often each number from 0 on occurs in idx, or the sum of its weights.
-- @tparam Tensor idx i64 or i32, not negative @tparam[opt] table options weights (of idx's shape; gradients
-- flow), minlength (0)
-- @treturn Tensor [max(idx) + 1 or minlength], i64 or the weights' dtype
define { name = "bincount", composite = true, forward = function(idx, options)
  expect("bincount", "idx", idx)
  local o = schema.options("bincount", options, BINCOUNT)
  local n, size, dev = numel(idx), o.minlength, device.name(idx.c.device)
  if idx.c.dtype ~= C.LAC_I64 and idx.c.dtype ~= C.LAC_I32 then
    fail("bincount", "idx must be i64 or i32, got %s", show(idx))
  end
  if n > 0 then
    local top = internal.raw_reduce(C.LAC_MAX, idx, 0, false):item()
    if type(top) == "number" then size = math.max(size, top + 1) else size = 2 ^ 53 end
  end
  local flat, w = fn.reshape(tensor.alias(idx), n), o.weights
  if not w then
    return (fn.scatter_add(create.zeros({ size }, { dtype = "i64", device = dev }), 1, flat, 1))
  end
  if not tensor.same_shape(w, idx) then
    fail("bincount", "weights must have the shape of idx: %s against %s", show(w), show(idx))
  end
  local zeros = create.zeros({ size }, { dtype = device.dtype_name[w.c.dtype], device = dev })
  return (fn.scatter_add(zeros, 1, flat, fn.reshape(w, n)))
end }

--- Counts of x's elements in equal bins over [low, high]; what lies outside, and NaN, is not counted.
-- @tparam Tensor x @tparam integer bins @tparam[opt] number low @tparam[opt] number high x's extremes unless
-- given (an error if there is none: x is empty or holds NaN) @treturn Tensor i64 [bins]
define { name = "histc", nondifferentiable = true, forward = function(x, bins, low, high)
  expect("histc", "x", x)
  schema.check("histc", "bins", bins == nil and false or bins, { type = "integer", min = 1, max = 2 ^ 40 })
  local wide = tensor.cast(x, C.LAC_F64)
  if (low == nil) ~= (high == nil) then fail("histc", "takes both low and high, or neither") end
  if low == nil then
    if numel(x) == 0 then fail("histc", "%s is empty, so low and high must be given", show(x)) end
    low, high = fn.min(wide):item(), fn.max(wide):item()
    if low ~= low then fail("histc", "%s holds NaN, so low and high must be given", show(x)) end
  end
  schema.check("histc", "low", low, { type = "number" })
  schema.check("histc", "high", high, { type = "number" })
  if not (low <= high and low > -math.huge and high < math.huge) then
    fail("histc", "needs finite low <= high, got %s and %s", show(low), show(high))
  end
  if low == high then low, high = low - 0.5, high + 0.5 end
  local inside = fn.masked_select(wide, fn.logical_and(fn.ge(wide, low), fn.le(wide, high)))
  local place = fn.minimum(fn.floor((inside - low) * (bins / (high - low))), bins - 1)
  return (fn.bincount(tensor.cast(place, C.LAC_I64), { minlength = bins }))
end }

-- ---- in place -------------------------------------------------------------------------------------------

-- name_(t, dim, idx, src, ...): what the functional form does, into t
local function in_place(name, run)
  local op = name .. "_"
  local function forward(t, dim, idx, src, p, q)
    receiver(op, t)
    expect(op, "idx", idx)
    local k = axis(op, t, dim)
    src = as_source(op, src, t)
    ops.writable(op, t, src)
    if src.root == t.root then src = tensor.cast(src, src.c.dtype) end
    run(t, k, idx, src, p, q)
    tensor.touch(t)
    return t
  end
  local _, names = arguments.of(run) -- (t, k, idx, src, ...)
  names[2] = "dim"
  methods[op] = arguments.exact(op, forward, 1, names)
end

in_place("scatter", function(t, k, idx, src)
  call_as("scatter_", "scatter", C.lac_scatter, t.c, k, idx.c, src.c, SET, 1)
end)
in_place("scatter_add", function(t, k, idx, src)
  call_as("scatter_add_", "scatter", C.lac_scatter, t.c, k, idx.c, src.c, ADD, 1)
end)
in_place("scatter_reduce", function(t, k, idx, src, reduce, include_self)
  schema.check("scatter_reduce_", "reduce", reduce, MODES)
  if include_self == nil then include_self = true end
  schema.check("scatter_reduce_", "include_self", include_self, { type = "boolean" })
  call_as("scatter_reduce_", "scatter", C.lac_scatter, t.c, k, idx.c, src.c, REDUCE[reduce],
    include_self and 1 or 0)
end)
in_place("index_add", function(t, k, idx, src, alpha)
  alpha = alpha == nil and 1 or alpha
  schema.check("index_add_", "alpha", alpha, { type = "number" })
  call_as("index_add_", "index_put", C.lac_index_put, t.c, k, idx.c, src.c, 1, alpha)
end)
in_place("index_copy", function(t, k, idx, src)
  call_as("index_copy_", "index_put", C.lac_index_put, t.c, k, idx.c, src.c, 0, 1)
end)
methods.index_fill_ = function(t, dim, idx, value)
  if type(value) ~= "number" and type(value) ~= "boolean" then
    fail("index_fill_", "value must be a number, got %s", show(value))
  end
  return (methods.index_copy_(t, dim, idx, value))
end

--- Set the elements of t where mask is true to a number; the mask broadcasts to t.
methods.masked_fill_ = function(t, mask, value)
  receiver("masked_fill_", t)
  expect("masked_fill_", "mask", mask)
  if mask.c.dtype ~= C.LAC_BOOL then
    fail("masked_fill_", "mask must be bool, got %s; compare it first", show(mask))
  end
  if type(value) ~= "number" and type(value) ~= "boolean" then
    fail("masked_fill_", "value must be a number, got %s", show(value))
  end
  ops.writable("masked_fill_", t)
  local out = raw_where(mask, scalar_like(internal.as_number(value), t), t)
  if not tensor.same_shape(out, t) then
    fail("masked_fill_", "mask %s does not broadcast to %s", show(mask), show(t))
  end
  call_as("masked_fill_", "copy", C.lac_copy, out.c, t.c)
  tensor.touch(t)
  return t
end
