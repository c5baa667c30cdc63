--- What analyses ask of two tensors, or of neighbours in one: differences, distances, closeness, products of
-- all pairs.
--
-- Compositions of other operators, so that gradients need no rule.

local schema = require "lacuna.schema"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local fail, show = schema.fail, schema.show
local expect, axis = tensor.expect, tensor.axis
local fn = ops.fn
local define = ops.internal.define

local DIFFERENCES = 2 ^ 18 -- that cdist forms at once: they stay in the caches

--- Differences of neighbours along dim (the last unless given): x[i + 1] - x[i], n times over (once unless
-- given); each time one element fewer.
-- @tparam Tensor x @tparam[opt] integer n @tparam[opt] integer dim
define { name = "diff", composite = true, forward = function(x, n, dim)
  expect("diff", "x", x)
  n = n == nil and 1 or n
  schema.check("diff", "n", n, { type = "integer", min = 0 })
  local k = axis("diff", x, dim == nil and -1 or dim) + 1
  for _ = 1, n do
    local size = x:size(k)
    if size == 0 then fail("diff", "dim %d of %s is too short for n = %d", k, show(x), n) end
    x = fn.sub(fn.narrow(x, k, 2, size - 1), fn.narrow(x, k, 1, size - 1))
  end
  return x
end }

local CLOSE = { rtol = { type = "number", min = 0, default = 1e-5 },
                atol = { type = "number", min = 0, default = 1e-8 } }

--- Where is |a - b| <= atol + rtol |b|? bool, broadcasting. Equal infinities are close, NaN is close to
-- nothing; halves are compared in f32, integers in f64. `allclose` asks it of all.
-- @tparam Tensor a @tparam Tensor b
-- @tparam[opt] table options rtol = 1e-5, atol = 1e-8
define { name = "isclose", composite = true, nondifferentiable = true, forward = function(a, b, options)
  expect("isclose", "a", a)
  expect("isclose", "b", b)
  local o = schema.options("isclose", options, CLOSE)
  if a.c.dtype ~= b.c.dtype then
    fail("isclose", "dtypes differ: a is %s, b is %s", a:dtype(), b:dtype())
  end
  local wide = a:dtype()
  wide = (wide == "f16" or wide == "bf16") and "f32" or (wide == "f32" or wide == "f64") and wide or "f64"
  local x, y = a:detach():to{ dtype = wide }, b:detach():to{ dtype = wide }
  local far = fn.abs(x - y)
  local near = fn.logical_and(fn.isfinite(far), fn.le(far, fn.abs(y) * o.rtol + o.atol))
  return fn.logical_or(near, fn.eq(a, b))
end }

--- Distances of all pairs of rows: x [..., N, D], y [..., M, D] -> [..., N, M], the p-norm (2 unless given,
-- math.huge the largest difference) of x_i - y_j. Exact near zero, where its gradient is 0: the differences
-- are formed, not |x|^2 + |y|^2 - 2 x y. With a gradient all N M D of them are kept on the way, without one
-- a part of the rows at a time.
-- @tparam Tensor x @tparam Tensor y @tparam[opt] number p above 0
define { name = "cdist", composite = true, forward = function(x, y, p)
  expect("cdist", "x", x)
  expect("cdist", "y", y)
  if x.c.ndim < 2 or y.c.ndim < 2 or x:size(-1) ~= y:size(-1) then
    fail("cdist", "needs x [..., N, D] and y [..., M, D], got %s and %s", show(x), show(y))
  end
  x, y = fn.unsqueeze(x, -2), fn.unsqueeze(y, -3)
  local rows = x:size(-3)
  local others = math.max(1, y:numel() * x:numel() / math.max(1, rows * x:size(-1))) -- at most, of one row
  local at_once = math.max(1, math.floor(DIFFERENCES / others))
  -- a gradient keeps all differences anyway
  if rows <= at_once or x.requires_grad or y.requires_grad then return fn.norm(x - y, p, -1) end
  local parts = {}
  for first = 1, rows, at_once do
    local part = fn.narrow(x, -3, first, math.min(at_once, rows - first + 1))
    parts[#parts + 1] = scope.run(function() return fn.norm(part - y, p, -1) end)
  end
  return fn.cat(parts, -2)
end }

--- The Kronecker product: each element of a times all of b, block by block; a tensor of fewer dimensions gets
-- ones in front. a [N, M], b [P, Q] -> [N P, M Q].
-- @tparam Tensor a @tparam Tensor b
define { name = "kron", composite = true, forward = function(a, b)
  expect("kron", "a", a)
  expect("kron", "b", b)
  local n = math.max(a.c.ndim, b.c.ndim)
  if 2 * n > tensor.max_dims then
    fail("kron", "at most %d dimensions, got %s and %s", tensor.max_dims / 2, show(a), show(b))
  end
  local left, right, sizes = {}, {}, {}
  for d = 1, n do
    local i, j = d - n + a.c.ndim, d - n + b.c.ndim
    local p, q = i > 0 and a:size(i) or 1, j > 0 and b:size(j) or 1
    left[2 * d - 1], left[2 * d], right[2 * d - 1], right[2 * d] = p, 1, 1, q
    sizes[d] = p * q
  end
  return fn.reshape(fn.reshape(a, left) * fn.reshape(b, right), sizes)
end }
