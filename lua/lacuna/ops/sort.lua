--- Order: sort, topk, order statistics, searching, distinct values, positions of what is not zero.
--
-- One order for all of them, in the engine: ascending numbers, every NaN after +inf and equal to every other,
-- -0 equal to 0; equal elements stay as they came, also in descending order. So `descending` puts NaN first,
-- and a result never depends on threads.
--
-- Positions that these operators return are INDEX TENSORS: i64, contents counted from 0, so that
-- x:gather(dim, idx) and index_select take them as they are. (argmax and argmin answer a question about a
-- position and count from 1, like t[i]; kthvalue's k is a rank and counts from 1 too.)
--
-- Gradients flow through values: each goes back to the element it was taken from, by the rule of gather.
-- Order statistics are composed of sort, whose cost is linear in the line's length; a selection per quantile
-- was rejected, since several quantiles of one sort are the common use.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops.base"

local C = lib.C
local call = lib.call
local fail, show = schema.fail, schema.show
local is, adopt, expect, axis, numel = tensor.is, tensor.adopt, tensor.expect, tensor.axis, tensor.numel
local fn = ops.fn
local internal = ops.internal
local new, define = internal.new, internal.define
local finish_taken, at_positions = internal.finish_taken, internal.at_positions

local function check_flag(op, name, v, default)
  if v == nil then return default end
  if type(v) ~= "boolean" then fail(op, "%s must be true or false, got %s", name, show(v)) end
  return v
end

-- a whole tensor as one line
local function flat(x) return fn.reshape(x, numel(x)) end

-- ---- sort and topk ------------------------------------------------------------------------------

local sort_op = { name = "sort", backward = at_positions }
--- Sorted values along dim and the positions they came from; stable.
-- @tparam Tensor x any dtype @tparam[opt=-1] integer dim @tparam[opt=false] boolean descending
-- @treturn Tensor values, of x's shape
-- @treturn Tensor i64 0-based index tensor: x:gather(dim, idx) is the values
function sort_op.forward(x, dim, descending)
  expect("sort", "x", x)
  local k = axis("sort", x, dim == nil and -1 or dim)
  local values, index = new(), new()
  call(C.lac_sort, x.c, k, check_flag("sort", "descending", descending, false) and 1 or 0, values, index)
  return finish_taken(sort_op, x, k, values, index)
end
define(sort_op)

--- The positions that sort x along dim: i64, 0-based, stable.
-- @tparam Tensor x @tparam[opt=-1] integer dim @tparam[opt=false] boolean descending
define { name = "argsort", nondifferentiable = true, forward = function(x, dim, descending)
  expect("argsort", "x", x)
  local k = axis("argsort", x, dim == nil and -1 or dim)
  local values, index = new(), new()
  call(C.lac_sort, x.c, k, check_flag("argsort", "descending", descending, false) and 1 or 0, values, index)
  adopt(values)
  return adopt(index)
end }

local topk_op = { name = "topk", backward = at_positions }
--- The k largest (or smallest) elements along dim in order, and their positions: the first k of sort.
-- @tparam Tensor x @tparam integer k @tparam[opt=-1] integer dim @tparam[opt=true] boolean largest
-- @treturn Tensor values, dim has size k
-- @treturn Tensor i64 0-based index tensor for gather
function topk_op.forward(x, k, dim, largest)
  expect("topk", "x", x)
  schema.check("topk", "k", k == nil and false or k, { type = "integer", min = 0 })
  local at = axis("topk", x, dim == nil and -1 or dim)
  local values, index = new(), new()
  call(C.lac_topk, x.c, at, k, check_flag("topk", "largest", largest, true) and 1 or 0, values, index)
  return finish_taken(topk_op, x, at, values, index)
end
define(topk_op)

-- ---- order statistics ---------------------------------------------------------------------------

-- element `rank` (from 1) of the sorted lines along axis at, with dim kept or not
local function ranked(values, index, at, rank, keepdim)
  values, index = fn.narrow(values, at + 1, rank, 1), fn.narrow(index, at + 1, rank, 1)
  if keepdim then return values, index end
  return fn.squeeze(values, at + 1), fn.squeeze(index, at + 1)
end

-- x with NaN wherever a line holds one: NaN is the largest, so it is last in `sorted`
local function poisoned(x, sorted, at, keepdim)
  if not device.is_float(sorted.c.dtype) then return x end
  local last = ranked(sorted, sorted, at, -1, keepdim)
  return fn.where(fn.isnan(tensor.alias(last)), 0 / 0, x)
end

--- The k-th smallest element along dim (k counts from 1, NaN is the largest) and its 0-based position.
-- @tparam Tensor x @tparam integer k @tparam[opt=-1] integer dim @tparam[opt=false] boolean keepdim
define { name = "kthvalue", composite = true, forward = function(x, k, dim, keepdim)
  expect("kthvalue", "x", x)
  schema.check("kthvalue", "k", k == nil and false or k, { type = "integer", min = 1 })
  local at = axis("kthvalue", x, dim == nil and -1 or dim)
  if k > x.c.shape[at] then
    fail("kthvalue", "k = %d, but dimension %d of %s has %d elements", k, at + 1, show(x),
         tonumber(x.c.shape[at]))
  end
  local values, index = fn.topk(x, k, at + 1, false)
  return ranked(values, index, at, k, check_flag("kthvalue", "keepdim", keepdim, false))
end }

--- The median along dim (of all elements unless given): of an even number the lower of the two in the middle.
-- NaN if a line has one.
-- @tparam Tensor x @tparam[opt] integer dim @tparam[opt=false] boolean keepdim
-- @treturn Tensor values @treturn Tensor 0-based positions (in the flattened tensor without dim)
define { name = "median", composite = true, forward = function(x, dim, keepdim)
  expect("median", "x", x)
  keepdim = check_flag("median", "keepdim", keepdim, false)
  if dim == nil then
    if keepdim then fail("median", "keepdim needs a dim") end
    x, dim = flat(x), 1
  end
  local at = axis("median", x, dim)
  local n = tonumber(x.c.shape[at])
  if n == 0 then fail("median", "dimension %d of %s is empty", at + 1, show(x)) end
  local sorted, index = fn.sort(x, at + 1)
  local values, places = ranked(sorted, index, at, math.floor((n + 1) / 2), keepdim)
  return poisoned(values, sorted, at, keepdim), places
end }

local function one_quantile(sorted, q, at, keepdim)
  local position = q * (tonumber(sorted.c.shape[at]) - 1)
  local low = math.floor(position)
  local weight = position - low
  local a = ranked(sorted, sorted, at, low + 1, keepdim)
  if weight == 0 then return a end
  local b = ranked(sorted, sorted, at, low + 2, keepdim)
  return fn.add(fn.mul(a, 1 - weight), fn.mul(b, weight))
end

--- Quantiles along dim (of all elements unless given), linear between neighbours; NaN if a line has one.
-- @tparam Tensor x floats @tparam number|table q in [0, 1], or a list: the result then has a new first
-- dimension @tparam[opt] integer dim @tparam[opt=false] boolean keepdim
define { name = "quantile", composite = true, forward = function(x, q, dim, keepdim)
  expect("quantile", "x", x)
  keepdim = check_flag("quantile", "keepdim", keepdim, false)
  local list = type(q) == "table" and not is(q) and q or { q }
  schema.check("quantile", "q", list, { type = "numbers", min = 0, max = 1 })
  if not device.is_float(x.c.dtype) then fail("quantile", "x must hold floats, got %s", show(x)) end
  if dim == nil then
    if keepdim then fail("quantile", "keepdim needs a dim") end
    x, dim = flat(x), 1
  end
  local at = axis("quantile", x, dim)
  if x.c.shape[at] == 0 then fail("quantile", "dimension %d of %s is empty", at + 1, show(x)) end
  local sorted, results = fn.sort(x, at + 1), {}
  for i = 1, #list do
    results[i] = poisoned(one_quantile(sorted, list[i], at, keepdim), sorted, at, keepdim)
  end
  return list == q and fn.stack(results) or results[1]
end }

-- ---- searching ----------------------------------------------------------------------------------

--- How many elements of the ascending `sorted` are below each value (with right = true: below or equal): the
-- 0-based place where it would be inserted.
-- @tparam Tensor sorted [n], or [..., n] with the leading sizes of values @tparam Tensor values [..., m]
-- @tparam[opt=false] boolean right
-- @treturn Tensor i64 of values' shape, 0 to n
define { name = "searchsorted", nondifferentiable = true, forward = function(sorted, values, right)
  expect("searchsorted", "sorted", sorted)
  expect("searchsorted", "values", values)
  local c, flag = new(), check_flag("searchsorted", "right", right, false)
  call(C.lac_searchsorted, sorted.c, values.c, flag and 1 or 0, c)
  return adopt(c)
end }

--- The bucket of each element of x between ascending boundaries [n]: 0 to n. Bucket i holds boundaries[i - 1]
-- < x <= boundaries[i]; with right = true, boundaries[i - 1] <= x < boundaries[i] (0-based).
define { name = "bucketize", nondifferentiable = true, forward = function(x, boundaries, right)
  expect("bucketize", "x", x)
  expect("bucketize", "boundaries", boundaries)
  if boundaries.c.ndim ~= 1 then fail("bucketize", "boundaries must be [n], got %s", show(boundaries)) end
  return (fn.searchsorted(boundaries, x, right))
end }

-- ---- distinct values, positions -----------------------------------------------------------------

--- The distinct elements of x in ascending order (NaNs are one), and how they are distributed.
-- @tparam Tensor x any shape and dtype
-- @treturn Tensor values [k]
-- @treturn Tensor inverse, i64 of x's shape: values:index_select(1, inverse) is x
-- @treturn Tensor counts, i64 [k]
define { name = "unique", nondifferentiable = true, forward = function(x)
  expect("unique", "x", x)
  local n = numel(x)
  local sorted, order = fn.sort(flat(tensor.alias(x)))
  local inverse, starts = new(), new()
  call(C.lac_runs, sorted.c, order.c, inverse, starts)
  inverse, starts = adopt(inverse), adopt(starts)
  local ends = fn.cat { starts, create.full({ 1 }, n, { dtype = "i64", device = device.name(x.c.device) }) }
  local k = numel(starts)
  return fn.index_select(sorted, 1, starts), internal.reshape_like(inverse, x),
    fn.sub(fn.narrow(ends, 1, 2, k), fn.narrow(ends, 1, 1, k))
end }

--- Coordinates of the elements that are not zero: i64 [count, dims], 0-based, in row-major order.
define { name = "nonzero", nondifferentiable = true, forward = function(x)
  expect("nonzero", "x", x)
  local c = new()
  call(C.lac_nonzero, x.c, c)
  return adopt(c)
end }

--- The elements of x where mask is true, [count], in row-major order; both broadcast.
define { name = "masked_select", composite = true, forward = function(x, mask)
  expect("masked_select", "x", x)
  expect("masked_select", "mask", mask)
  if mask.c.dtype ~= C.LAC_BOOL then
    fail("masked_select", "mask must be bool, got %s; compare it first", show(mask))
  end
  local sizes = internal.broadcast_sizes("masked_select", x, mask)
  local positions = internal.true_positions(fn.expand(mask, sizes))
  return (fn.index_select(flat(fn.expand(x, sizes)), 1, positions))
end }
