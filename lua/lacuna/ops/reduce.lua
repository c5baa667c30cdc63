--- Reductions and softmax.
--
-- sum, mean, max, min, any, all, argmax, argmin run in the engine, over any set of dimensions at once, with
-- pairwise or f64 accumulation; var, norm and logsumexp are composed of them. argmax and argmin give 1-based
-- positions, like all positions in Lua. The gradient of max and min goes to the elements that attain it, in
-- equal shares.
--
-- Options are either positional (dim, keepdim) or one table, checked by schema.lua.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local C = lib.C
local call = lib.call
local fail, show = schema.fail, schema.show
local is, adopt, expect, axis, numel = tensor.is, tensor.adopt, tensor.expect, tensor.axis, tensor.numel
local ctensor, D, fn = tensor.ctype, tensor.sizes_buffer, ops.fn
local internal = ops.internal
local record1, wants, raw_map2 = internal.record1, internal.wants, internal.raw_map2
local raw_scalar, raw_reduce, load_sizes = internal.raw_scalar, internal.raw_reduce, internal.load_sizes
local reshape_like, define, map_id = internal.reshape_like, internal.define, internal.map_id

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
