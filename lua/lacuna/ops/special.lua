--- Special functions of analysis: the inverse of erf, the logarithm of the gamma function and its derivative.
--
-- They are rare, in sampling and in statistics rather than in a model's layers, so they are no kernels: each
-- is a formula over the elementwise operators, on every device, computed in f64 whatever the dtype and
-- rounded once at the end. That costs some forty passes over the tensor. Gradients are formulas of the same
-- kind: nothing of the way is kept, only x or the result.
--
-- erfinv solves erf(y) = x by Halley's method, three steps from Winitzki's closed approximation (2008), which
-- is off by at most 2 parts in a thousand; on the side where 1 - |x| has more digits than x it solves
-- erfc(y) = 1 - |x|. The gamma functions move their argument up by recurrence until Stirling's series holds
-- to the last digit, and left of 1/2 they are reflected (Abramowitz and Stegun, 6.1.15 to 6.4.7).

local schema = require "lacuna.schema"
local device = require "lacuna.device"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local fn = ops.fn
local internal = ops.internal
local record1, wants, define = internal.record1, internal.wants, internal.define
local HALF_ROOT_PI, HUGE = math.sqrt(math.pi) / 2, math.huge

-- f of x in f64, in x's dtype; nothing is recorded, and what f makes on the way is given back
local function in_doubles(x, f)
  return scope.run(function()
    return f(x:detach():to { dtype = "f64" }):to { dtype = x:dtype() }
  end)
end

-- sum over k of coefficients[k] u^(k - 1)
local function series(u, coefficients)
  local sum = u * coefficients[#coefficients]
  for k = #coefficients - 1, 2, -1 do sum = (sum + coefficients[k]) * u end
  return sum + coefficients[1]
end

-- ---- the inverse of erf ---------------------------------------------------------------------------------

local function erfinv(x)
  local a = fn.abs(x)
  local rest, small = 1 - a, fn.lt(a, 0.5)
  local l = fn.log(rest * (1 + a))
  local t = l / 2 + 2 / (math.pi * 0.147)
  local y = fn.where(fn.lt(a, 0.1), a * HALF_ROOT_PI, fn.sqrt(fn.sqrt(t * t - l / 0.147) - t))
  for _ = 1, 3 do
    local off = fn.where(small, fn.erf(y) - a, rest - fn.erfc(y)) * fn.exp(y * y) * HALF_ROOT_PI
    y = y - off / (1 + y * off)
  end
  return fn.copysign(fn.where(fn.eq(a, 1), HUGE, y), x)
end

-- ---- the gamma function ---------------------------------------------------------------------------------

local STEPS = 10 -- of the recurrence; the series' terms below are those that count from there on

-- f(z, w, low) for the argument z >= 1/2 that x or its reflection has: w is z or, where it is low, z + STEPS
local function raised(x, f)
  local left = fn.lt(x, 0.5)
  local z = fn.where(left, 1 - x, x)
  local low = fn.lt(z, STEPS)
  return f(z, fn.where(low, z + STEPS, z), low), left
end

-- pi times x's distance from the nearest integer, with its sign: sines and tangents of pi x are those of it
local function angle(x) return (x - fn.round(x)) * math.pi end

local LGAMMA = { 1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156 }
local function lgamma(x)
  local value, left = raised(x, function(z, w, low)
    local product = z
    for k = 1, STEPS - 1 do product = product * (z + k) end
    local stirling = (w - 0.5) * fn.log(w) - w + 0.5 * math.log(2 * math.pi) + series(1 / (w * w), LGAMMA) / w
    return fn.where(low, stirling - fn.log(product), stirling)
  end)
  value = fn.where(left, math.log(math.pi) - fn.log(fn.abs(fn.sin(angle(x)))) - value, value)
  return fn.where(fn.isinf(x), HUGE, value)
end

local DIGAMMA = { 1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12 }
local function digamma(x)
  local value, left = raised(x, function(z, w, low)
    local sum = 1 / z
    for k = 1, STEPS - 1 do sum = sum + 1 / (z + k) end
    local u = 1 / (w * w)
    return fn.log(w) - 0.5 / w - u * series(u, DIGAMMA) - fn.where(low, sum, 0)
  end)
  value = fn.where(left, value - math.pi / fn.tan(angle(x)), value)
  value = fn.where(fn.eq(x, 0), -1 / x, value) -- x - round(x) has lost the sign of 0
  return fn.where(fn.logical_and(fn.lt(x, 0), fn.eq(x, fn.floor(x))), 0 / 0, value) -- a pole without a side
end

local TRIGAMMA = { 1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6 }
local function trigamma(x)
  local value, left = raised(x, function(z, w, low)
    local sum = 1 / (z * z)
    for k = 1, STEPS - 1 do sum = sum + fn.square(1 / (z + k)) end
    local r = 1 / w
    local u = r * r
    return r + u / 2 + r * u * series(u, TRIGAMMA) + fn.where(low, sum, 0)
  end)
  return fn.where(left, fn.square(math.pi / fn.sin(angle(x))) - value, value)
end

-- ---- the operators --------------------------------------------------------------------------------------

-- slope(x, y): the derivative, of x and the result in f64
local function special(name, f, saves, slope)
  local op = { name = name, saves = saves }
  function op.forward(x)
    tensor.expect(name, "x", x)
    if not device.is_float(x.c.dtype) then
      schema.fail(name, "x must be a floating-point tensor (f64, f32, f16, bf16), got %s", x:dtype())
    end
    local out = in_doubles(x, f)
    if wants(x) then record1(op, out, x) end
    return out
  end
  function op.backward(node, g)
    return in_doubles(g, function(wide) return wide * slope(node) end)
  end
  define(op)
end

local function wide(t) return t:detach():to { dtype = "f64" } end

--- erfinv(x): the inverse of erf, of [-1, 1]. sqrt(2) erfinv(u) is a normal number if u is a uniform one.
special("erfinv", erfinv, "o", function(node) return fn.exp(fn.square(wide(node.o))) * HALF_ROOT_PI end)

--- lgamma(x): log |Gamma(x)|; infinite at 0, -1, -2, ... In f64 off by 2e-14 or 6e-16 of itself at most.
special("lgamma", lgamma, "a", function(node) return digamma(wide(node.a)) end)

--- digamma(x): the derivative of lgamma; -inf at 0, inf at -0, NaN at negative integers.
special("digamma", digamma, "a", function(node) return trigamma(wide(node.a)) end)
