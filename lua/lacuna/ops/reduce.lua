--- Reductions and softmax.
--
-- All run in the engine, over any set of dimensions at once, in one pass over memory, accumulated in f64.
-- argmax and argmin give 1-based positions, like all positions in Lua. The gradient of max and min goes to
-- the elements that attain it, in equal shares.
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

--- sum(x, dim, keepdim): the sum over dim, a dimension or a list of them (all unless given). Integers and
-- bools are summed as i64; f16 and bf16 in f32. Both may be named, x:sum{dim = 2, keepdim = true}, as
-- in the reductions that follow.
define_reduction("sum", C.LAC_SUM, function(node, g) return unreduce(g, node.a, node.mask) end)

--- mean(x, dim, keepdim): the mean over dim, a dimension or a list of them (all unless given).
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
--- max(x, dim, keepdim): the largest element over dim (all unless given); NaN wins, equal ones share the
-- gradient.
define_reduction("max", C.LAC_MAX, extreme_rule, "ao")
--- min(x, dim, keepdim): the smallest element over dim (all unless given); NaN wins.
define_reduction("min", C.LAC_MIN, extreme_rule, "ao")
--- any(x, dim, keepdim): is any element over dim nonzero? bool.
define_reduction("any", C.LAC_ANY)
--- all(x, dim, keepdim): is every element over dim nonzero? bool.
define_reduction("all", C.LAC_ALL)

local function define_arg(name, kind)
  define { name = name, nondifferentiable = true, forward = function(x, dim, keepdim)
    if type(dim) == "table" and #dim > 1 then fail(name, "takes one dim or none, got %s", show(dim)) end
    local mask, keep = reduced(name, x, dim, keepdim)
    return raw_scalar(map_id.add, raw_reduce(kind, x, mask, keep), 1)
  end }
end
--- argmax(x, dim, keepdim): where the largest element is. A position, so 1-based like every position in Lua
-- (subtract 1 to compare with class targets, which are data and 0-based); without dim: the position in the
-- flattened tensor.
define_arg("argmax", C.LAC_ARGMAX)
--- argmin(x, dim, keepdim): where the smallest element is; as argmax.
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
--- softmax(x, dim): exp(x) / sum(exp(x)) along dim (the last unless given), without overflow.
define_softmax("softmax", 0)
--- log_softmax(x, dim): the logarithm of softmax, without its rounding.
define_softmax("log_softmax", 1)

--- Product over dim (all unless given). The gradient is exact where elements are zero: one zero takes all of
-- it, two or more leave none.
define_reduction("prod", C.LAC_PROD, function(node, g)
  local x, mask = node.a, node.mask
  local zero = raw_scalar(map_id.eq, x, 0)
  local zeros = tensor.cast(raw_reduce(C.LAC_SUM, zero, mask, true), x.c.dtype)
  local filled = raw_map2(map_id.add, x, tensor.cast(zero, x.c.dtype)) -- 1 in place of 0
  local others = raw_reduce(C.LAC_PROD, filled, mask, true)
  local share = raw_map2(map_id.mul, reshape_like(g, others), others)
  local none = tensor.cast(raw_scalar(map_id.eq, zeros, 0), x.c.dtype)
  local single = tensor.cast(raw_scalar(map_id.eq, zeros, 1), x.c.dtype)
  local plain = raw_map2(map_id.div, raw_map2(map_id.mul, share, none), filled)
  local alone = raw_map2(map_id.mul, raw_map2(map_id.mul, share, single), tensor.cast(zero, x.c.dtype))
  return raw_map2(map_id.add, plain, alone)
end, "a")

--- How many elements are not zero, as i64.
define_reduction("count_nonzero", C.LAC_NONZERO)

--- log(sum(exp(x))) over dim (all unless given), without overflow, in one pass; -inf where every element is
-- -inf.
define_reduction("logsumexp", C.LAC_LOGSUMEXP, function(node, g)
  local shifted = raw_map2(map_id.sub, node.a, unreduce(node.o, node.a, node.mask))
  local weights = internal.raw_map1(map_id["1exp"], shifted)
  -- exp(-inf - -inf): an element of nothing has no share
  local dead = raw_map2(map_id.eq, node.a, unreduce(node.o, node.a, node.mask))
  local infinite = internal.raw_map1(map_id["1isinf"], node.a)
  local keep = tensor.cast(internal.raw_map1(map_id["1not"], raw_map2(map_id["and"], dead, infinite)),
                           node.a.c.dtype)
  weights = fn.where(internal.raw_map1(map_id["1isnan"], weights), keep, weights)
  return raw_map2(map_id.mul, weights, unreduce(g, node.a, node.mask))
end, "ao")

local var_op = { name = "var", saves = "ao" }
--- Variance over dim (all unless given), centred and in one pass; divides by n - correction (1 unless
-- given). Of too few elements it is NaN.
function var_op.forward(x, dim, keepdim, correction)
  if type(dim) == "table" and not is(dim) and #dim == 0 then
    local o = schema.options("var", dim, { dim = { type = { "integer", "integers" } },
      keepdim = { type = "boolean" }, correction = { type = "number" } })
    dim, keepdim, correction = o.dim, o.keepdim == nil and keepdim or o.keepdim, o.correction or correction
  end
  local mask, keep = reduced("var", x, dim, keepdim)
  correction = correction == nil and 1 or correction
  if type(correction) ~= "number" then
    fail("var", "correction must be a number, got %s", show(correction))
  end
  local c = ctensor()
  call(C.lac_var, x.c, mask, keep and 1 or 0, correction, c)
  local out = adopt(c)
  if wants(x) then
    record1(var_op, out, x)
    out.node.mask, out.node.correction = mask, correction
  end
  return out
end
function var_op.backward(node, g)
  local x, mask = node.a, node.mask
  local count = numel(x) / math.max(1, numel(node.o))
  local centred = raw_map2(map_id.sub, x, raw_reduce(C.LAC_MEAN, x, mask, true))
  local scale = 2 / math.max(0, count - node.correction)
  return raw_map2(map_id.mul, raw_scalar(map_id.mul, centred, scale), unreduce(g, x, mask))
end
define(var_op)

--- Standard deviation; arguments as for var.
define { name = "std", composite = true, forward = function(x, dim, keepdim, correction)
  expect("std", "x", x)
  return (fn.sqrt(fn.var(x, dim, keepdim, correction)))
end }

-- total ^ (1 / p), whose gradient at 0 is 0 and not infinite
local function root(total, p)
  local zero = fn.eq(total, 0)
  local safe = fn.where(zero, 1, total)
  return (fn.where(zero, 0, fn.pow(safe, 1 / p)))
end

-- the norms 1, 2 and infinity are one pass; 2: x / norm, 0 for a zero vector
local norm_op = { name = "norm", saves = "ao" }
local NORM = { [1] = C.LAC_NORM1, [2] = C.LAC_NORM2, [math.huge] = C.LAC_NORM_INF }

--- The p-norm (2 unless given; math.huge is the largest magnitude) over dim. The gradient of a zero vector is
-- zero, one of the subgradients.
function norm_op.forward(x, p, dim, keepdim)
  expect("norm", "x", x)
  p = p == nil and 2 or p
  if type(p) ~= "number" or p ~= p or p <= 0 then
    fail("norm", "p must be a positive number, got %s", show(p))
  end
  if not NORM[p] then return root(fn.sum(fn.abs(x) ^ p, dim, keepdim), p) end
  local mask, keep = reduced("norm", x, dim, keepdim)
  local out = raw_reduce(NORM[p], x, mask, keep)
  if wants(x) then
    record1(norm_op, out, x)
    out.node.mask, out.node.p = mask, p
  end
  return out
end
function norm_op.backward(node, g)
  local x, mask = node.a, node.mask
  local direction = internal.raw_map1(map_id["1sign"], x)
  local spread = unreduce(g, x, mask)
  if node.p == 1 then return raw_map2(map_id.mul, direction, spread) end
  if node.p == 2 then
    local norm = unreduce(node.o, x, mask)
    local safe = raw_map2(map_id.add, norm, tensor.cast(raw_scalar(map_id.eq, norm, 0), x.c.dtype))
    return raw_map2(map_id.mul, raw_map2(map_id.div, x, safe), spread)
  end
  local hits = tensor.cast(raw_map2(map_id.eq, internal.raw_map1(map_id["1abs"], x),
                                    unreduce(node.o, x, mask)), x.c.dtype)
  local count = raw_reduce(C.LAC_SUM, hits, mask, true)
  local share = raw_map2(map_id.div, reshape_like(g, count), count)
  return raw_map2(map_id.mul, raw_map2(map_id.mul, hits, direction), share)
end
define(norm_op)
