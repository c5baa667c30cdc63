--- What analyses ask of two tensors, or of neighbours in one: differences, closeness, products of all pairs.
--
-- Compositions of other operators, so that gradients need no rule.

local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local fail, show = schema.fail, schema.show
local expect, axis = tensor.expect, tensor.axis
local fn = ops.fn
local define = ops.internal.define

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
  return (fn.logical_or(near, fn.eq(a, b)))
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
  return (fn.reshape(fn.reshape(a, left) * fn.reshape(b, right), sizes))
end }
