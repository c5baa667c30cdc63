--- Cases of the elementwise functions, reductions, scans and norms beyond the first set in cases.lua.
--
-- Written like those of cases.lua, with its helpers; tests/ops_spec.lua makes the tests. References are the
-- formulas as textbooks print them, in plain Lua doubles: a log-sum-exp takes out the maximum, a variance is
-- centred, a scan is a loop. Functions with constants are tested with other values than the defaults, so that
-- a constant that is ignored cannot pass. tests/elem_spec.lua has what random inputs do not show: accuracy
-- over all floats, NaN and infinities, large arrays.

local ffi = require "ffi"
local special = require "support.special"

return function(cases)
  local h = cases.helpers
  local case = h.case
  local build, at = cases.build, cases.at

  -- ---- one tensor -------------------------------------------------------------------------------

  local function sign(x) return x > 0 and 1 or x < 0 and -1 or 0 end
  local function trunc(x) return x < 0 and math.ceil(x) or math.floor(x) end
  local function sigmoid(x) return 1 / (1 + math.exp(-x)) end
  local function clip(x, low, high) return math.min(math.max(x, low), high) end
  local function asinh(x) return sign(x) * math.log(math.abs(x) + math.sqrt(x * x + 1)) end
  local function softplus(x) return math.log(1 + math.exp(x)) end

  for name, spec in h.ordered {
    trunc = { trunc }, frac = { function(x) return x - trunc(x) end },
    exp2 = { function(x) return 2 ^ x end },
    log2 = { function(x) return math.log(x) / math.log(2) end, "positive" },
    log10 = { function(x) return math.log10(x) end, "positive" },
    tan = { math.tan, "fraction" }, asin = { math.asin, "fraction" }, acos = { math.acos, "fraction" },
    atan = { math.atan }, sinh = { math.sinh }, cosh = { math.cosh }, asinh = { asinh },
    acosh = { function(x) return math.log(x + math.sqrt(x * x - 1)) end, "above" },
    atanh = { function(x) return 0.5 * math.log((1 + x) / (1 - x)) end, "fraction" },
    erfc = { special.erfc },
    sinc = { function(x) return x == 0 and 1 or math.sin(math.pi * x) / (math.pi * x) end,
             derivative = function(R, x)
               local a = R(R(math.pi) * x)
               if math.abs(x) > 0.3 then return R(R(R(math.cos(a)) - R(R(math.sin(a)) / a)) / x) end
               local square, term, sum = R(a * a), 1, 0 -- Taylor's series, because the difference cancels
               for k = 1, 9 do
                 term = R(-R(term * square) / (2 * k * (2 * k + 1)))
                 sum = R(sum + R(2 * k * term))
               end
               return R(sum / x)
             end },
    logit = { function(x) return math.log(x / (1 - x)) end, "fraction" },
    logsigmoid = { function(x) return -softplus(-x) end },
    mish = { function(x) return x * math.tanh(softplus(x)) end },
    selu = { function(x)
      local scale, alpha = 1.0507009873554804934, 1.6732632423543772848
      return scale * (x > 0 and x or alpha * (math.exp(x) - 1))
    end, "away" },
    relu6 = { function(x) return clip(x, 0, 6) end, "away" },
    softsign = { function(x) return x / (1 + math.abs(x)) end, "away" },
    hardsigmoid = { function(x) return clip(x + 3, 0, 6) / 6 end },
    hardswish = { function(x) return x * clip(x + 3, 0, 6) / 6 end },
    isinf = { function(x) return math.abs(x) == math.huge and 1 or 0 end, grad = false },
  } do
    case { name = name, inputs = { { 3, 4, kind = spec[2] } }, grad = spec.grad,
           ref = function(R, x) return build(x.shape, function(i) return R(spec[1](at(x, i))) end) end,
           derivative = spec.derivative and function(R, x)
             return build(x.shape, function(i) return spec.derivative(R, at(x, i)) end)
           end,
           bad = { { function(lac) return lac[name]("no") end, name .. ": x must be a tensor, got 'no'" } } }
  end
  case { name = "isinf", label = "infinities", inputs = { { 4, kind = "away" } }, grad = false,
         call = function(lac, x) return lac.isinf(lac.where(x:gt(0), 1 / 0, x)) end,
         ref = function(_, x) return build(x.shape, function(i) return at(x, i) > 0 and 1 or 0 end) end }

  -- ---- special functions --------------------------------------------------------------------------

  -- of x or, where there is `moved`, of moved(x), whose slope is -1; slope: the derivative of f
  local function special_case(name, label, kind, moved, f, slope)
    case { name = name, label = label, inputs = { { 3, 4, kind = kind } },
           rough = moved and "f32" or nil, -- near a pole the rounding of what is moved decides
           call = function(lac, x) return lac[name](moved and moved(x) or x) end,
           ref = function(R, x)
             return build(x.shape, function(i)
               return f(R, moved and R(moved(at(x, i))) or at(x, i))
             end)
           end,
           derivative = function(R, x) -- doubles whatever the dtype
             return build(x.shape, function(i)
               return moved and -slope(R, R(moved(at(x, i)))) or slope(R, at(x, i))
             end)
           end,
           bad = { { function(lac) return lac[name](lac.ones { 2, dtype = "i64" }) end,
                     name .. ": x must be a floating%-point tensor" },
                   { function(lac, x) return lac[name](x, 2) end, "takes one tensor, got 2 as well" } } }
  end
  local function minus(x) return -x - 1 end -- of a fraction: between -2 and -1

  local function erfinv(R, x) -- Newton's method, which for x > 0 comes to the solution from below
    local size, scale = math.abs(x), R(2 / math.sqrt(math.pi))
    local y = R(size / scale)
    for _ = 1, 40 do y = R(y - R(R(R(special.erf(y)) - size) / R(scale * R(math.exp(-R(y * y)))))) end
    return sign(x) * y
  end
  local function erfinv_slope(R, x)
    local y = erfinv(R, x)
    return R(R(math.exp(R(y * y))) * R(math.sqrt(math.pi) / 2))
  end
  special_case("erfinv", nil, "fraction", nil, erfinv, erfinv_slope)
  special_case("erfinv", "below 0", "fraction", function(x) return -x end, erfinv, erfinv_slope)

  -- with the C library's in doubles, and by Stirling's series where every step is rounded
  ffi.cdef "double lgamma(double);"
  local function lgamma(R, x)
    if R(0.1) == 0.1 then return ffi.C.lgamma(x) end
    if x < 0.5 then
      local sine = R(math.log(R(math.abs(math.sin(math.pi * x)))))
      return R(R(math.log(math.pi)) - R(sine + lgamma(R, R(1 - x))))
    end
    local product, w = 1, x
    while w < 8 do product, w = R(product * w), w + 1 end
    local value = R(R(R(w - 0.5) * R(math.log(w))) - w)
    value = R(value + R(R(0.5 * math.log(2 * math.pi)) + R(R(1 / 12) / w)))
    return R(value - R(math.log(product)))
  end
  local function digamma(R, x)
    if x < 0.5 then return R(digamma(R, R(1 - x)) - R(math.pi / R(math.tan(math.pi * x)))) end
    local sum, w = 0, x
    while w < 60 do sum, w = R(sum - R(1 / w)), w + 1 end
    local u = R(1 / R(w * w))
    local rest = R(u * R(R(1 / 12) - R(u * R(R(1 / 120) - R(u / 252)))))
    return R(R(sum + R(R(math.log(w)) - R(0.5 / w))) - rest)
  end

  local function trigamma(R, x)
    if x < 0.5 then return R(R(R(math.pi / R(math.sin(math.pi * x))) ^ 2) - trigamma(R, R(1 - x))) end
    local sum, w = 0, x
    while w < 60 do sum, w = R(sum + R(1 / R(w * w))), w + 1 end
    local u = R(1 / R(w * w))
    return R(sum + R(R(1 / w) + R(R(u / 2) + R(R(u / w) * R(1 / 6 - R(u / 30))))))
  end
  special_case("lgamma", nil, "positive", nil, lgamma, digamma)
  special_case("lgamma", "below 0", "fraction", minus, lgamma, digamma)
  special_case("digamma", nil, "positive", nil, digamma, trigamma)
  special_case("digamma", "below 0", "fraction", minus, digamma, trigamma)

  -- ---- one tensor and constants -------------------------------------------------------------------

  local function with_constants(name, label, f, spec, ...)
    local args = { ... }
    case { name = name, label = label, inputs = { { 3, 4, kind = spec.kind } },
           call = function(lac, x) return lac[name](x, unpack(args)) end,
           ref = function(R, x) return build(x.shape, function(i) return R(f(at(x, i))) end) end,
           bad = spec.bad }
  end
  local function bad(name, argument, pattern)
    return { { function(lac, x) return lac[name](x, argument) end, pattern } }
  end
  local AWAY = { kind = "away" }
  with_constants("leaky_relu", nil, function(x) return x > 0 and x or 0.25 * x end, { kind = "away",
    bad = bad("leaky_relu", "a", "slope must be a number, got 'a'") }, 0.25)
  with_constants("leaky_relu", "default", function(x) return x > 0 and x or 0.01 * x end, AWAY)
  with_constants("leaky_relu", "table", function(x) return x > 0 and x or 0.5 * x end, { kind = "away",
    bad = bad("leaky_relu", { slop = 1 }, "unknown option 'slop', did you mean 'slope'") }, { slope = 0.5 })
  with_constants("elu", nil, function(x) return x > 0 and x or 1.5 * (math.exp(x) - 1) end, AWAY, 1.5)
  with_constants("celu", nil, function(x) return x > 0 and x or 1.5 * (math.exp(x / 1.5) - 1) end,
    { kind = "away", bad = bad("celu", 0, "alpha must not be 0") }, 1.5)
  with_constants("hardtanh", nil, function(x) return clip(x, -0.5, 0.75) end,
    { bad = bad("hardtanh", 3, "min 3 is above max 1") }, -0.5, 0.75)
  with_constants("threshold", nil, function(x) return x > 0.3 and x or 7 end,
    { bad = bad("threshold", 3, "value must be a number, got nil") }, 0.3, 7)
  with_constants("softshrink", nil, function(x) return x > 0.3 and x - 0.3 or x < -0.3 and x + 0.3 or 0 end,
    { bad = bad("softshrink", -1, "lambda must not be negative, got %-1") }, 0.3)
  with_constants("hardshrink", nil, function(x) return math.abs(x) > 0.3 and x or 0 end,
    { bad = bad("hardshrink", -1, "lambda must not be negative, got %-1") }, 0.3)
  case { name = "nan_to_num", inputs = { { 3, 4, kind = "away" } },
         call = function(lac, x)
           local holes = lac.where(x:gt(1), 1 / 0, lac.where(x:lt(-1), -1 / 0, lac.where(x:lt(0), 0 / 0, x)))
           return lac.nan_to_num(holes, 5, 6, 7)
         end,
         ref = function(_, x)
           return build(x.shape, function(i)
             local v = at(x, i)
             return v > 1 and 6 or v < -1 and 7 or v < 0 and 5 or v
           end)
         end, bad = {
           { function(lac, x) return lac.nan_to_num(x, "a") end, "nan must be a number, got 'a'" } } }
  case { name = "clamp", label = "one bound", inputs = { { 3, 4 } },
         call = function(_, x) return x:clamp { max = 0.25 } end,
         ref = function(_, x) return build(x.shape, function(i) return math.min(at(x, i), 0.25) end) end }
  case { name = "clamp", label = "tensors", inputs = { { 3, 4 }, { 4, kind = "positive" } },
         call = function(_, x, y) return x:clamp(-y, y) end,
         ref = function(_, x, y)
           return build(x.shape, function(i) return clip(at(x, i), -at(y, i), at(y, i)) end)
         end }

  -- ---- two tensors --------------------------------------------------------------------------------

  local map2 = h.map2
  local function fmod(x, y) return math.fmod(x, y) end
  local function logaddexp(x, y)
    local m = math.max(x, y)
    return m + math.log(math.exp(x - m) + math.exp(y - m))
  end
  map2("fmod", fmod, { kinds = { "positive", "positive" } })
  map2("floor_divide", function(x, y) return math.floor(x / y) end, { kinds = { "positive", "positive" } })
  map2("atan2", math.atan2, { kinds = { "away", "away" } })
  map2("hypot", function(x, y) return math.sqrt(x * x + y * y) end, { kinds = { "away", "away" } })
  map2("copysign", function(x, y) return y < 0 and -math.abs(x) or math.abs(x) end,
       { kinds = { "away", "away" } })
  map2("logaddexp", logaddexp)
  map2("xlogy", function(x, y) return x == 0 and 0 or x * math.log(y) end, { kinds = { "away", "positive" } })
  map2("swiglu", function(x, y) return x * sigmoid(x) * y end)
  map2("geglu", function(x, y) return x * special.phi(x) * y end)

  local bit = require "bit"
  local INTS = { { 3, 4, kind = "index", high = 16 }, { 4, kind = "index", high = 5 } }
  for name, f in h.ordered {
    bitwise_and = bit.band, bitwise_or = bit.bor, bitwise_xor = bit.bxor,
    bitwise_left_shift = function(x, y) return x * 2 ^ y end,
    bitwise_right_shift = function(x, y) return math.floor(x / 2 ^ y) end,
  } do
    case { name = name, inputs = INTS, grad = false,
           ref = function(_, x, y)
             return build(x.shape, function(i) return f(at(x, i), at(y, i)) end)
           end,
           bad = { { function(lac, x) return lac[name](x:to { dtype = "f32" }, 1) end,
                     name .. ": x must be i64, i32 or u8, got f32" },
                   { function(lac, x) return lac[name](x:ne(0), x:ne(0)) end,
                     "for bool there are and, or" } } }
  end
  case { name = "bitwise_not", inputs = { INTS[1] }, grad = false,
         ref = function(_, x) return build(x.shape, function(i) return -1 - at(x, i) end) end }

  -- ---- reductions ---------------------------------------------------------------------------------

  local reduction = h.reduction
  reduction("prod", function(R, v)
    local p = 1
    for k = 1, #v do p = R(p * v[k]) end
    return p
  end, { kind = "away" })
  case { name = "prod", label = "zeros", inputs = { { 3, 4 } },
         call = function(lac, x)
           -- none, one and two zeros in a row
           local mask = { { 1, 1, 1, 1 }, { 1, 0, 1, 1 }, { 0, 1, 1, 0 } }
           mask = lac.tensor(mask, { dtype = x:dtype() })
           return lac.prod(x * mask, 2)
         end,
         ref = function(R, x)
           local p = 1
           for k = 1, 4 do p = R(p * x.data[k]) end
           return { shape = { 3 }, data = { p, 0, 0 } }
         end }
  reduction("count_nonzero", function(_, v)
    local n = 0
    for k = 1, #v do n = n + (v[k] ~= 0 and 1 or 0) end
    return n
  end, { kind = "bool", grad = false })
  local function variance(correction)
    return function(R, v)
      local m, s = h.mean(R, v), 0
      for k = 1, #v do s = R(s + R(R(v[k] - m) ^ 2)) end
      return R(s / (#v - correction))
    end
  end
  case { name = "var", label = "correction", inputs = { { 5, 4 } },
         call = function(_, x) return x:var { dim = 1, correction = 0.5 } end,
         ref = h.fold(1, variance(0.5)),
         bad = { { function(_, x) return x:var(1, false, "a") end,
                   "correction must be a number, got 'a'" } } }
  for p, f in h.ordered {
    [1] = function(R, v)
      local s = 0
      for k = 1, #v do s = R(s + math.abs(v[k])) end
      return s
    end,
    [math.huge] = function(_, v)
      local m = 0
      for k = 1, #v do m = math.max(m, math.abs(v[k])) end
      return m
    end,
  } do
    case { name = "norm", label = "p = " .. p, inputs = { { 3, 4, kind = "away" } },
           call = function(_, x) return x:norm(p, 1) end, ref = h.fold(1, f) }
  end

  -- ---- norms --------------------------------------------------------------------------------------

  local function rms(R, x, i, eps)
    local s, E = 0, x.shape[#x.shape]
    for k = 1, E do s = R(s + R(at(x, h.with(i, #i, k)) ^ 2)) end
    return R(1 / math.sqrt(R(R(s / E) + eps)))
  end
  case { name = "rmsnorm", inputs = { { 2, 3, 5 }, { 5 } },
         call = function(lac, x, gamma) return lac.rmsnorm(x, gamma, 1e-3) end,
         ref = function(R, x, gamma)
           return build(x.shape, function(i)
             return R(R(at(x, i) * rms(R, x, i, 1e-3)) * gamma.data[i[3]])
           end)
         end,
         bad = { { function(lac, x) return lac.rmsnorm(x, lac.zeros { 4, dtype = x:dtype() }) end,
                   "gamma must be %[5%]" },
                 { function(lac, x) return lac.rmsnorm(x, nil, 0) end, "eps must be positive, got 0" } } }
  case { name = "rmsnorm", label = "no gamma", inputs = { { 3, 4 } },
         ref = function(R, x)
           return build(x.shape, function(i) return R(at(x, i) * rms(R, x, i, 1e-6)) end)
         end }
  case { name = "layernorm", label = "no vectors", inputs = { { 3, 4 } },
         ref = function(R, x)
           return build(x.shape, function(i)
             local v = {}
             for k = 1, 4 do v[k] = at(x, { i[1], k }) end
             local m, s = h.mean(R, v), 0
             for k = 1, 4 do s = R(s + R(R(v[k] - m) ^ 2)) end
             return R(R(v[i[2]] - m) * R(1 / math.sqrt(R(R(s / 4) + 1e-5))))
           end)
         end }

  -- ---- three tensors ------------------------------------------------------------------------------

  local THREE = { { 2, 3, 4 }, { 3, 1 }, { 4, kind = "away" } }
  local function map3(name, label, call, f, spec)
    case { name = name, label = label, inputs = THREE, call = call, bad = spec,
           ref = function(R, x, y, z)
             return build(x.shape, function(i) return f(R, at(x, i), at(y, i), at(z, i)) end)
           end }
  end
  map3("lerp", nil, nil, function(R, x, y, w) return R(x + R(w * R(y - x))) end,
       { { function(lac, x) return lac.lerp(x, x, "w") end, "the weight must be a tensor or a number" } })
  map3("lerp", "number", function(lac, x, y) return lac.lerp(x, y, 0.75) end,
       function(R, x, y) return R(x + R(0.75 * R(y - x))) end)
  map3("addcmul", nil, function(lac, x, y, z) return lac.addcmul(x, y, z, 1.5) end,
       function(R, x, y, z) return R(x + R(1.5 * R(y * z))) end,
       { { function(lac, x) return lac.addcmul(x, x, x, "v") end, "value must be a number, got 'v'" } })
  map3("addcdiv", nil, function(lac, x, y, z) return lac.addcdiv(x, y, z, 1.5) end,
       function(R, x, y, z) return R(x + R(1.5 * R(y / z))) end,
       { { function(lac, x) return lac.addcdiv(x, x, 1) end, "z must be a tensor, got 1" } })
end
