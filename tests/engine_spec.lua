-- The engine's operators through the C interface, without the Lua library.
--
-- Every function is compared with plain Lua doubles, for every dtype it takes, in five memory layouts
-- (contiguous, transposed, stepped, reversed, inside a wider array), with broadcasting, empty and
-- 0-dimensional tensors, on every instruction set that this machine has. Accuracy is stated in units of the
-- last place of the dtype around the exact result (`ulps`), with the promise of the kernel as the bound: half
-- precision is computed in f32 and rounded once, so it gets 1; f32 functions get 2; sums and products get
-- what their length allows at worst, never a round number. Gradients are compared with central differences of
-- the Lua reference. Then the properties: bits do not depend on the number of threads or on the run, bad
-- arguments give a status and the documented words and leave nothing behind, and a few thousand calls with
-- random garbage neither crash nor write outside their tensors.

local d = require "support.cdirect"
local C, ffi = d.C, d.ffi
local tensor, get, shape_of, op, call = d.tensor, d.get, d.shape, d.op, d.call

local FLOATS = { "f64", "f32", "f16", "bf16" }
local ALL = { "f64", "f32", "f16", "bf16", "i64", "i32", "u8", "bool" }
local INF, NAN = math.huge, 0 / 0
local PRECISION = { f64 = { 53, -1074 }, f32 = { 24, -149 }, f16 = { 11, -24 }, bf16 = { 8, -133 } }

-- ---- numbers ----

local state = 1
local function random() -- Park and Miller's minimal standard generator, in [0, 1)
  state = state * 16807 % 2147483647
  return state / 2147483647
end
local function randoms(n, low, high)
  local t = {}
  for i = 1, n do t[i] = low + (high - low) * random() end
  return t
end
local function round_all(dtype, values)
  local t = {}
  for i, v in ipairs(values) do t[i] = d.round(dtype, v) end
  return t
end
local function count(shape)
  local n = 1
  for _, s in ipairs(shape) do n = n * s end
  return n
end

-- the distance of neighbouring values of the dtype at x
local function ulp(dtype, x)
  local p = PRECISION[dtype]
  local _, e = math.frexp(math.abs(x))
  return 2 ^ math.max(e - p[1], p[2])
end

-- got is within `ulps` units of ref, plus `slack`; infinities and NaN must agree
local function close(dtype, got, ref, ulps, slack)
  if ref ~= ref then return got ~= got end
  local rounded = d.round(dtype, ref)
  if rounded == INF or rounded == -INF or got == INF or got == -INF then return got == rounded end
  return math.abs(got - ref) <= ulps * ulp(dtype, ref) + (slack or 0)
end

local function check_all(what, dtype, got, ref, ulps, slack)
  assert.are.equal(#ref, #got, what .. ": number of elements")
  for i = 1, #ref do
    local s = slack
    if type(slack) == "table" then s = slack[i] or 0 end
    if not close(dtype, got[i], ref[i], ulps, s) then
      error(("%s %s: element %d is %.17g, expected %.17g (%.3g ulp off)"):format(what, dtype, i, got[i],
        ref[i],
        math.abs(got[i] - ref[i]) / ulp(dtype, ref[i])), 2)
    end
  end
end

local function equal_all(what, got, ref)
  assert.are.equal(#ref, #got, what .. ": number of elements")
  for i = 1, #ref do
    local same = got[i] == ref[i] or (got[i] ~= got[i] and ref[i] ~= ref[i])
    if not same then error(("%s: element %d is %s, expected %s"):format(what, i, got[i], ref[i]), 2) end
  end
end

-- d sum(g f(x)) / dx by central differences, where f takes and returns flat arrays
local function differences(f, x, g)
  local result = {}
  for i = 1, #x do
    local keep, h = x[i], 1e-6 * math.max(1, math.abs(x[i]))
    local sums = {}
    for side = 1, 2 do
      x[i] = keep + (side == 1 and h or -h)
      local y, s = f(x), 0
      for j = 1, #y do s = s + g[j] * y[j] end
      sums[side] = s
    end
    x[i] = keep
    result[i] = (sums[1] - sums[2]) / (2 * h)
  end
  return result
end

-- absolute comparison for differences: their own error is about 1e-10 / 1e-6
local function check_gradient(what, got, ref)
  for i = 1, #ref do
    local far = math.abs(got[i] - ref[i]) > 1e-7 * math.max(1, math.abs(ref[i]))
    if far or got[i] ~= got[i] then
      error(("%s: gradient %d is %.15g, central differences say %.15g"):format(what, i, got[i], ref[i]), 2)
    end
  end
end

local function erf(x) -- a series of positive terms near 0, Lentz's continued fraction for erfc beyond; 1e-16
  local a = math.abs(x)
  if a < 1 then
    local sum, term = a, a
    for n = 1, 80 do
      term = term * 2 * a * a / (2 * n + 1)
      sum = sum + term
    end
    return (x < 0 and -1 or 1) * sum * 2 / math.sqrt(math.pi) * math.exp(-a * a)
  end
  if a > 30 then return x < 0 and -1 or 1 end
  local f = 0
  for k = 200, 1, -1 do f = k / 2 / (a + f) end
  local e = math.exp(-a * a) / math.sqrt(math.pi) / (a + f)
  return x < 0 and e - 1 or 1 - e
end
local function erfc(x)
  if x < 1 then return 1 - erf(x) end
  if x > 30 then return 0 end
  local f = 0
  for k = 200, 1, -1 do f = k / 2 / (x + f) end
  return math.exp(-x * x) / math.sqrt(math.pi) / (x + f)
end
local function expm1(x)
  if math.abs(x) > 0.5 then return math.exp(x) - 1 end
  local sum, term = 0, 1
  for n = 1, 25 do
    term = term * x / n
    sum = sum + term
  end
  return sum
end
local function log1p(x)
  local u = 1 + x
  if u == 1 or u == INF then return x end
  return math.log(u) * (x / (u - 1))
end
local function sigmoid(x) return 1 / (1 + math.exp(-x)) end
local function half_even(x)
  local r = math.floor(x)
  local f = x - r
  if f > 0.5 or (f == 0.5 and r % 2 == 1) then r = r + 1 end
  return r
end
local function sign(x) return x > 0 and 1 or x < 0 and -1 or x end

-- name -> { reference, low, high, absolute slack in units of 2^-24 (cancelling formulas) }
local MAP1 = {
  neg = { function(x) return -x end, -9, 9 },
  abs = { math.abs, -9, 9 },
  sign = { sign, -2, 2 },
  square = { function(x) return x * x end, -9, 9 },
  relu = { function(x) return x ~= x and x or math.max(x, 0) end, -3, 3 },
  floor = { math.floor, -5, 5 },
  ceil = { math.ceil, -5, 5 },
  round = { half_even, -5, 5 },
  exp = { math.exp, -30, 11 },
  expm1 = { expm1, -4, 4 },
  log = { math.log, 1e-3, 1e3 },
  log1p = { log1p, -0.9, 9 },
  sqrt = { math.sqrt, 0, 100 },
  rsqrt = { function(x) return 1 / math.sqrt(x) end, 0.01, 100 },
  recip = { function(x) return 1 / x end, 0.1, 9 },
  sin = { math.sin, -9, 9 },
  cos = { math.cos, -9, 9 },
  tanh = { function(x) local e = expm1(2 * math.abs(x)) return (x < 0 and -1 or 1) * e / (e + 2) end, -6, 6 },
  sigmoid = { sigmoid, -15, 15 },
  silu = { function(x) return x * sigmoid(x) end, -15, 15 },
  gelu = { function(x) return 0.5 * x * erfc(-x / math.sqrt(2)) end, -5, 5 },
  gelu_tanh = { function(x)
    local u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x * sigmoid(2 * u)
  end, -4, 4 },
  softplus = { function(x) return math.max(x, 0) + log1p(math.exp(-math.abs(x))) end, -15, 15 },
  erf = { erf, -5, 5 },
}
local MAP2 = {
  add = function(x, y) return x + y end,
  sub = function(x, y) return x - y end,
  mul = function(x, y) return x * y end,
  div = function(x, y) return x / y end,
  pow = function(x, y) return x ^ y end,
  max = function(x, y) if x ~= x then return x elseif y ~= y then return y end return math.max(x, y) end,
  min = function(x, y) if x ~= x then return x elseif y ~= y then return y end return math.min(x, y) end,
  mod = function(x, y)
    local r = math.fmod(x, y)
    return r ~= 0 and (r < 0) ~= (y < 0) and r + y or r
  end,
}
local CMP2 = {
  eq = function(x, y) return x == y end,
  ne = function(x, y) return x ~= y end,
  lt = function(x, y) return x < y end,
  le = function(x, y) return x <= y end,
  gt = function(x, y) return x > y end,
  ge = function(x, y) return x >= y end,
}
local function map1(name, x) return op("map1", C.lac_map_id(1, name), x) end
local function map2(name, x, y) return op("map2", C.lac_map_id(2, name), x, y) end
-- what two ulp of f32 promise; f64 is libm behind one or two roundings; half types are rounded from f32
local ULPS = { f64 = 4, f32 = 2, f16 = 1, bf16 = 1 }
-- compositions round an intermediate result before an exponential of it; |argument| ulps come on top (f32,
-- f64)
local EXTRA = { gelu_tanh = { 33, 30 }, sigmoid = { 1, 4 }, silu = { 2, 4 }, gelu = { 4, 60 }, rsqrt = { 1,
  1 }, tanh = { 1, 4 },
                softplus = { 1, 2 }, erf = { 1, 8 }, expm1 = { 0, 4 }, log1p = { 0, 2 } }

local function fails(status, pattern, name, ...)
  local args, n = { ... }, select("#", ...)
  local live = ffi.new("lac_memory_stats")
  collectgarbage("stop") -- a finalizer in between would change the count
  C.lac_memory(0, live)
  local before = live.live
  local ok, message = pcall(call, name, unpack(args, 1, n))
  C.lac_memory(0, live)
  collectgarbage("restart")
  assert.is_false(ok, name .. " accepted bad arguments; expected " .. status .. ": " .. pattern)
  message = message:gsub("^[^:]*:%d+: ", "")
  assert.are.equal(status, message:match("^(%w+):"), message)
  assert.is_truthy(message:find(pattern), ("'%s' does not match '%s'"):format(message, pattern))
  assert.are.equal(before, live.live, name .. " left memory behind: " .. message)
end

local original_isa, original_threads = ffi.string(C.lac_isa(nil)), C.lac_threads(0)

for _, isa in ipairs(d.isas()) do
describe("engine on " .. isa .. ":", function()
  setup(function() assert(C.lac_isa(isa) ~= nil) end)
  teardown(function() C.lac_isa(original_isa) C.lac_threads(original_threads) end)

  describe("elementwise", function()
    it("functions of one argument agree with the reference in all layouts", function()
      for name, f in pairs(MAP1) do
        for _, dtype in ipairs(FLOATS) do
          local shape = { 3, 37 }
          local values = round_all(dtype, randoms(count(shape), f[2], f[3]))
          local ref = {}
          for i, v in ipairs(values) do ref[i] = f[1](v) end
          local slack = {}
          local extra = (EXTRA[name] or { 0, 0 })[dtype == "f64" and 2 or 1]
          for i, r in ipairs(ref) do slack[i] = extra * ulp(dtype == "f64" and "f64" or "f32", r) end
          for layout, x in pairs(d.layouts(dtype, shape, values)) do
            local y = map1(name, x)
            assert.are.same(shape, shape_of(y))
            check_all(name .. " " .. layout, dtype, get(y), ref, ULPS[dtype], slack)
          end
        end
      end
    end)

    it("functions of one argument keep NaN and know the limits", function()
      for name in pairs(MAP1) do
        for _, dtype in ipairs(FLOATS) do
          for _, v in ipairs(get(map1(name, tensor(dtype, { 20 }, setmetatable({},
            { __index = function() return NAN end }))))) do
            assert.is_true(v ~= v, name .. " loses NaN in " .. dtype)
          end
        end
      end
      local limits = {
        exp = { { -INF, 0 }, { INF, INF }, { 0, 1 } }, log = { { 0, -INF }, { INF, INF }, { -1, NAN }, { 1,
          0 } },
        expm1 = { { -INF, -1 }, { INF, INF } }, log1p = { { -1, -INF }, { INF, INF }, { -2, NAN } },
        tanh = { { -INF, -1 }, { INF, 1 } }, sigmoid = { { -INF, 0 }, { INF, 1 } }, erf = { { -INF, -1 },
        { INF, 1 } },
        softplus = { { -INF, 0 }, { INF, INF } }, relu = { { -INF, 0 }, { INF, INF } }, sqrt = { { -1, NAN },
        { INF, INF } },
        gelu = { { INF, INF } }, gelu_tanh = { { INF, INF } }, silu = { { INF, INF } }, recip = { { 0, INF },
        { INF, 0 } },
        round = { { 0.5, 0 }, { 1.5, 2 }, { 2.5, 2 }, { -0.5, 0 }, { -1.5, -2 } },
      }
      for name, list in pairs(limits) do
        for _, dtype in ipairs(FLOATS) do
          for _, pair in ipairs(list) do
            equal_all(name .. "(" .. pair[1] .. ") in " .. dtype, get(map1(name, tensor(dtype, { 1 },
              { pair[1] }))), { pair[2] })
          end
        end
      end
      -- subnormal floats
      local tiny = 2 ^ -140
      equal_all("log of a subnormal", { math.abs(get(map1("log", tensor("f32", { 1 },
        { tiny })))[1] - math.log(tiny)) < 1e-5 }, { true })
      check_all("exp to a subnormal", "f32", get(map1("exp", tensor("f32", { 1 }, { -100 }))),
        { math.exp(-100) }, 2)
    end)

    it("isnan, isfinite and not", function()
      local x = { 1, NAN, INF, -INF, 0 }
      for _, dtype in ipairs(FLOATS) do
        equal_all("isnan", get(map1("isnan", tensor(dtype, { 5 }, x))), { 0, 1, 0, 0, 0 })
        equal_all("isfinite", get(map1("isfinite", tensor(dtype, { 5 }, x))), { 1, 0, 0, 0, 1 })
      end
      for _, dtype in ipairs { "i64", "i32", "u8", "bool" } do
        equal_all("isnan", get(map1("isnan", tensor(dtype, { 2 }, { 0, 1 }))), { 0, 0 })
        equal_all("isfinite", get(map1("isfinite", tensor(dtype, { 2 }, { 0, 1 }))), { 1, 1 })
      end
      local n = map1("not", tensor("bool", { 2 }, { 0, 1 }))
      assert.are.equal(d.dtypes.bool, n.dtype)
      equal_all("not", get(n), { 1, 0 })
    end)

    it("functions of one argument on integers", function()
      local values = { -7, -1, 0, 3, 11 }
      local ref = { neg = { 7, 1, 0, -3, -11 }, abs = { 7, 1, 0, 3, 11 }, sign = { -1, -1, 0, 1, 1 },
        square = { 49, 1, 0, 9, 121 },
                    relu = { 0, 0, 0, 3, 11 }, floor = values, ceil = values, round = values }
      for name, r in pairs(ref) do
        for _, dtype in ipairs { "i64", "i32" } do
          for layout, x in pairs(d.layouts(dtype, { 1, 5 }, values)) do equal_all(name .. layout,
            get(map1(name, x)), r) end
        end
      end
      equal_all("u8 wraps", get(map1("neg", tensor("u8", { 2 }, { 1, 0 }))), { 255, 0 })
    end)

    it("gradients of one argument agree with central differences", function()
      for name, f in pairs(MAP1) do
        local x = randoms(40, f[2] + 0.11, f[3])
        local kinks = { floor = true, ceil = true, round = true, sign = true }
        local g = randoms(40, -1, 1)
        local ref = {}
        for i = 1, 40 do
          local h = 1e-5 * math.max(1, math.abs(x[i]))
          if name == "recip" or name == "log" or name == "rsqrt" or name == "sqrt" then h = 1e-5 * x[i] end
          ref[i] = kinks[name] and 0 or g[i] * (f[1](x[i] + h) - f[1](x[i] - h)) / (2 * h)
        end
        local tx, tg = tensor("f64", { 5, 8 }, x), tensor("f64", { 5, 8 }, g)
        local got = get(op("map1_bwd", C.lac_map_id(1, name), tx, map1(name, tx), tg))
        local scaled, wanted = {}, {}
        for i = 1, 40 do -- relative: slopes reach 1e4
          scaled[i], wanted[i] = got[i] / math.max(1, math.abs(ref[i])), ref[i] / math.max(1,
            math.abs(ref[i]))
        end
        check_gradient(name, scaled, wanted)
        -- the other dtypes agree with f64 on the same rounded inputs; y is an input of its own and is rounded
        -- too
        for _, dtype in ipairs { "f32", "f16", "bf16" } do
          local xs, gs = tensor(dtype, { 40 }, x), tensor(dtype, { 40 }, g)
          local ys = map1(name, xs)
          local exact = get(op("map1_bwd", C.lac_map_id(1, name), tensor("f64", { 40 }, get(xs)),
            tensor("f64", { 40 }, get(ys)),
            tensor("f64", { 40 }, get(gs))))
          local slack = {} -- a few f32 roundings of terms no larger than the argument times the slope
          for i = 1, 40 do slack[i] = 2 ^ -22 * (1 + math.abs(x[i])) * math.max(1, math.abs(exact[i])) end
          check_all(name .. " gradient", dtype, get(op("map1_bwd", C.lac_map_id(1, name), xs, ys, gs)),
            exact, ULPS[dtype], slack)
        end
      end
    end)

    it("functions of two arguments, broadcast, in all layouts", function()
      for name, f in pairs(MAP2) do
        for _, dtype in ipairs(FLOATS) do
          local low = name == "pow" and 0.2 or -4
          local x, y = round_all(dtype, randoms(21, low, 4)), round_all(dtype, randoms(7, 0.5, 3))
          local ref, slack = {}, {}
          for i = 1, 3 do
            for j = 1, 7 do
              local at = (i - 1) * 7 + j
              ref[at] = f(x[at], y[j])
              if name == "mod" then slack[at] = 0 end
            end
          end
          for layout, tx in pairs(d.layouts(dtype, { 3, 7 }, x)) do
            local z = map2(name, tx, tensor(dtype, { 7 }, y))
            assert.are.same({ 3, 7 }, shape_of(z))
            check_all(name .. " " .. layout, dtype, get(z), ref, ULPS[dtype], slack)
          end
          -- [1, 7] against [3, 1]: both expand
          local column = tensor(dtype, { 3, 1 }, { x[1], x[2], x[3] })
          local both = {}
          for i = 1, 3 do for j = 1, 7 do both[#both + 1] = f(x[i], y[j]) end end
          check_all(name .. " outer", dtype, get(map2(name, column, tensor(dtype, { 1, 7 }, y))), both,
            ULPS[dtype])
          check_all(name .. " 0-dim", dtype, get(map2(name, tensor(dtype, {}, { x[1] }), tensor(dtype, {},
            { y[1] }))),
            { f(x[1], y[1]) }, ULPS[dtype])
          -- scalars, on either side
          local id = C.lac_map_id(2, name)
          local right, left = {}, {}
          for i = 1, 7 do right[i], left[i] = f(y[i], 1.25), f(1.25, y[i]) end
          check_all(name .. " scalar", dtype, get(op("map2_scalar", id, tensor(dtype, { 7 }, y), 1.25, 0)),
            right, ULPS[dtype])
          check_all(name .. " swapped", dtype, get(op("map2_scalar", id, tensor(dtype, { 7 }, y), 1.25, 1)),
            left, ULPS[dtype])
        end
      end
      for _, dtype in ipairs(FLOATS) do
        for _, name in ipairs { "max", "min" } do
          equal_all(name .. " keeps NaN", get(map2(name, tensor(dtype, { 2 }, { NAN, 1 }), tensor(dtype,
            { 2 }, { 1, NAN }))), { NAN, NAN })
        end
      end
    end)

    it("integer arithmetic: floor division, no traps, wrapping", function()
      local x, y = { 7, -7, 7, -7, 5, 0 }, { 2, 2, -2, -2, 0, 3 }
      for _, dtype in ipairs { "i64", "i32" } do
        local a, b = tensor(dtype, { 6 }, x), tensor(dtype, { 6 }, y)
        equal_all("div", get(map2("div", a, b)), { 3, -4, -4, 3, 0, 0 })
        equal_all("mod", get(map2("mod", a, b)), { 1, 1, -1, -1, 0, 0 })
        equal_all("max", get(map2("max", a, b)), { 7, 2, 7, -2, 5, 3 })
        equal_all("mul", get(map2("mul", a, b)), { 14, -14, -14, 14, 0, 0 })
        equal_all("pow", get(map2("pow", tensor(dtype, { 5 }, { 2, -3, 1, -1, 5 }), tensor(dtype, { 5 },
          { 10, 3, -4, -3, -1 }))),
          { 1024, -27, 1, -1, 0 })
      end
      local least = d.empty("i64", { 1 })
      call("fill", least, -2 ^ 63)
      local minus = tensor("i64", { 1 }, { -1 })
      equal_all("least / -1", get(map2("div", least, minus)), { -2 ^ 63 })
      equal_all("least mod -1", get(map2("mod", least, minus)), { 0 })
      equal_all("u8 wraps", get(map2("add", tensor("u8", { 1 }, { 200 }), tensor("u8", { 1 }, { 100 }))),
        { 44 })
      equal_all("scalar", get(op("map2_scalar", C.lac_map_id(2, "div"), tensor("i32", { 3 }, { 7, -7, 1 }),
        2, 0)), { 3, -4, 0 })
    end)

    it("comparisons give bool for every dtype; and, or, xor take bool", function()
      for name, f in pairs(CMP2) do
        for _, dtype in ipairs(ALL) do
          local x, y = { 0, 1, 1, 0, 1 }, { 1, 0, 1, 0, 1 }
          local ref = {}
          for i = 1, 5 do ref[i] = f(x[i], y[i]) and 1 or 0 end
          for layout, tx in pairs(d.layouts(dtype, { 1, 5 }, x)) do
            local z = map2(name, tx, tensor(dtype, { 5 }, y))
            assert.are.equal(d.dtypes.bool, z.dtype)
            equal_all(name .. " " .. dtype .. " " .. layout, get(z), ref)
          end
          for i = 1, 5 do ref[i] = f(1, x[i]) and 1 or 0 end
          equal_all(name .. " scalar", get(op("map2_scalar", C.lac_map_id(2, name), tensor(dtype, { 5 }, x),
            1, 1)), ref)
        end
      end
      equal_all("NaN ~= NaN", get(map2("ne", tensor("f32", { 1 }, { NAN }), tensor("f32", { 1 }, { NAN }))),
        { 1 })
      local a, b = tensor("bool", { 4 }, { 0, 0, 1, 1 }), tensor("bool", { 4 }, { 0, 1, 0, 1 })
      equal_all("and", get(map2("and", a, b)), { 0, 0, 0, 1 })
      equal_all("or", get(map2("or", a, b)), { 0, 1, 1, 1 })
      equal_all("xor", get(map2("xor", a, b)), { 0, 1, 1, 0 })
    end)

    it("gradients of two arguments agree with central differences", function()
      for name, f in pairs(MAP2) do
        local x, y, g = randoms(12, 0.3, 4), randoms(4, 0.6, 2.9), randoms(12, -1, 1)
        local function of(vx, vy)
          local z = {}
          for i = 1, 12 do z[i] = f(vx[i], vy[(i - 1) % 4 + 1]) end
          return z
        end
        local dx = differences(function(v) return of(v, y) end, x, g)
        local dy = differences(function(v) return of(x, v) end, y, g)
        local tx, ty, tg = tensor("f64", { 3, 4 }, x), tensor("f64", { 4 }, y), tensor("f64", { 3, 4 }, g)
        local id = C.lac_map_id(2, name)
        check_gradient(name .. " dx", get(op("map2_bwd", id, 0, tx, ty, tg)), dx)
        check_gradient(name .. " dy", get(op("sum_to", op("map2_bwd", id, 1, tx, ty, tg), ty)), dy)
        for swapped = 0, 1 do
          local ds = differences(function(v)
            local z = {}
            for i = 1, 12 do z[i] = swapped == 1 and f(1.7, v[i]) or f(v[i], 1.7) end
            return z
          end, x, g)
          check_gradient(name .. " scalar", get(op("map2_scalar_bwd", id, tx, 1.7, swapped, tg)), ds)
        end
      end
      -- documented corners: ties share, powers of 0
      local one, g = tensor("f32", { 2 }, { 1, 1 }), tensor("f32", { 2 }, { 1, 1 })
      equal_all("tie", get(op("map2_bwd", C.lac_map_id(2, "max"), 0, one, one, g)), { 0.5, 0.5 })
      local zero = tensor("f32", { 1 }, { 0 })
      equal_all("0^0", get(op("map2_scalar_bwd", C.lac_map_id(2, "pow"), zero, 0, 0, tensor("f32", { 1 },
        { 1 }))), { 0 })
      equal_all("0^2", get(op("map2_bwd", C.lac_map_id(2, "pow"), 1, zero, tensor("f32", { 1 }, { 2 }),
        tensor("f32", { 1 }, { 1 }))), { 0 })
    end)

    it("where, axpy, scale, fill for every dtype and layout", function()
      for _, dtype in ipairs(ALL) do
        local x, y = { 1, 0, 1, 1, 0, 0 }, { 0, 1, 0, 0, 1, 1 }
        local cond = tensor("bool", { 3 }, { 1, 0, 1 })
        for layout, tx in pairs(d.layouts(dtype, { 2, 3 }, x)) do
          equal_all("where " .. layout, get(op("where", cond, tx, tensor(dtype, { 2, 3 }, y))), { 1, 1, 1, 1,
            1, 0 })
          if dtype ~= "bool" then
            call("axpy", 2, tensor(dtype, { 3 }, { 1, 2, 3 }), tx)
            equal_all("axpy " .. dtype .. layout, get(tx), { 3, 4, 7, 3, 4, 6 })
            call("scale", 3, tx)
            equal_all("scale " .. dtype .. layout, get(tx), { 9, 12, 21, 9, 12, 18 })
          end
          call("fill", tx, 1)
          equal_all("fill " .. dtype .. layout, get(tx), { 1, 1, 1, 1, 1, 1 })
        end
      end
      -- writing a view leaves its neighbours alone
      local whole = tensor("f32", { 7 }, { 0, 0, 0, 0, 0, 0, 0 })
      call("fill", d.slice(whole, 0, 1, 3, 2), 5)
      equal_all("neighbours", get(whole), { 0, 5, 0, 5, 0, 5, 0 })
    end)

    it("copy converts between all dtypes", function()
      local values = { 0, 1, 2, 100, 255 }
      for _, from in ipairs(ALL) do
        for _, to in ipairs(ALL) do
          local v = {}
          for i, x in ipairs(values) do v[i] = from == "bool" and (x ~= 0 and 1 or 0) or x end
          local ref = {}
          for i, x in ipairs(v) do ref[i] = to == "bool" and (x ~= 0 and 1 or 0) or x end
          for layout, src in pairs(d.layouts(from, { 1, 5 }, v)) do
            for _, dst in pairs(d.layouts(to, { 2, 5 }, { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 })) do
              call("copy", src, dst)
              local got = get(dst)
              equal_all(from .. " to " .. to .. " " .. layout, { unpack(got, 6) }, ref)
              equal_all(from .. " to " .. to .. " " .. layout, { unpack(got, 1, 5) }, ref)
            end
          end
        end
      end
    end)

    it("copy rounds once, saturates and truncates", function()
      local function cast(from, to, v)
        local dst = d.empty(to, { 1 })
        call("copy", tensor(from, { 1 }, { v }), dst)
        return get(dst)[1]
      end
      for _, to in ipairs { "f32", "f16", "bf16" } do
        for _, from in ipairs { "f64", "f32" } do
          for i = 1, 400 do
            local v = d.round(from, (random() - 0.5) * 2 ^ (random() * 60 - 35))
            assert.are.equal(d.round(to, v), cast(from, to, v), from .. " to " .. to .. " of case " .. i)
          end
        end
      end
      -- 1 + 2^-11 + 2^-40 is above the tie of f16: rounding through f32 would lose the last bit and round
      -- down
      assert.are.equal(1 + 2 ^ -10, cast("f64", "f16", 1 + 2 ^ -11 + 2 ^ -40))
      assert.are.equal(1, cast("f64", "f16", 1 + 2 ^ -11))
      assert.are.equal(1 + 2 ^ -7, cast("f64", "bf16", 1 + 2 ^ -8 + 2 ^ -40))
      assert.are.equal(INF, cast("f32", "f16", 65520))
      assert.are.equal(65504, cast("f32", "f16", 65519))
      assert.are.equal(2 ^ -24, cast("f32", "f16", 2 ^ -24))
      assert.are.equal(0, cast("f32", "f16", 2 ^ -25))
      assert.is_true(cast("f32", "f16", NAN) ~= cast("f32", "f16", NAN))
      assert.is_true(cast("f64", "bf16", NAN) ~= cast("f64", "bf16", NAN))
      assert.are.equal(-3, cast("f32", "i32", -3.9))
      assert.are.equal(2147483647, cast("f32", "i32", 1e20))
      assert.are.equal(-2147483648, cast("f64", "i32", -INF))
      assert.are.equal(0, cast("f32", "i64", NAN))
      assert.are.equal(2 ^ 63, cast("f64", "i64", INF)) -- 2^63 - 1 as a double
      assert.are.equal(255, cast("f32", "u8", 300))
      assert.are.equal(0, cast("f32", "u8", -1))
      assert.are.equal(44, cast("i32", "u8", 300))
      assert.are.equal(1, cast("f32", "bool", 0.25))
      assert.are.equal(1, cast("i64", "bool", -4))
    end)

    it("every f16 and bf16 bit pattern survives a round trip through f32", function()
      for _, dtype in ipairs { "f16", "bf16" } do
        local half, single, back = d.empty(dtype, { 65536 }), d.empty("f32", { 65536 }), d.empty(dtype,
          { 65536 })
        local p = ffi.new("void *[1]")
        call("tensor_data", half, p)
        local bits = ffi.cast("uint16_t *", p[0])
        for i = 0, 65535 do bits[i] = i end
        call("copy", half, single)
        call("copy", single, back)
        equal_all(dtype .. " values", get(single), get(half))
        equal_all(dtype .. " round trip", get(back), get(half))
      end
    end)

    it("copies between halves of one matrix, refuses real overlap", function()
      local t = tensor("f32", { 2, 4 }, { 1, 2, 3, 4, 5, 6, 7, 8 })
      call("copy", d.slice(t, 1, 0, 2, 1), d.slice(t, 1, 2, 2, 1))
      equal_all("columns", get(t), { 1, 2, 1, 2, 5, 6, 5, 6 })
      fails("argument", "src and dst overlap", "copy", d.slice(t, 1, 0, 2, 1), d.slice(t, 1, 1, 2, 1))
      fails("argument", "x and dst overlap", "axpy", 1, d.transpose(d.slice(t, 1, 0, 2, 1), 0, 1), d.slice(t,
        1, 0, 2, 1))
      call("axpy", 1, t, t) -- the same view is fine
      equal_all("doubled", get(t), { 2, 4, 2, 4, 10, 12, 10, 12 })
      fails("argument", "share memory", "fill", d.expand(tensor("f32", { 1 }, { 0 }), { 3 }), 1)
    end)

    it("copies large transposed planes of every element size", function()
      for _, dtype in ipairs { "f64", "f32", "bf16", "u8" } do
        for _, shape in ipairs { { 70, 65 }, { 3, 40, 67 }, { 8, 700 } } do
          local n, nd = count(shape), #shape
          local values = {}
          for i = 1, n do values[i] = (i * 7) % 251 end
          local x = tensor(dtype, shape, values)
          local turned = d.transpose(x, nd - 2, nd - 1)
          local dst = d.empty(dtype, shape_of(turned))
          call("copy", turned, dst)
          equal_all("transposed " .. dtype, get(dst), get(turned))
          if nd == 3 then -- the first axis against the last
            turned = d.transpose(x, 0, 2)
            dst = d.empty(dtype, shape_of(turned))
            call("copy", turned, dst)
            equal_all("outer transposed " .. dtype, get(dst), get(turned))
          end
        end
      end
    end)

    it("arange", function()
      for _, dtype in ipairs { "f64", "f32", "f16", "bf16", "i64", "i32", "u8" } do
        local t = d.empty(dtype, { 5 })
        call("arange", t, 3, 2)
        equal_all("arange " .. dtype, get(t), { 3, 5, 7, 9, 11 })
      end
      local long = d.empty("i64", { 1000 })
      call("arange", d.slice(long, 0, 999, 1000, -1), 0, 3)
      local v = get(long)
      assert.are.equal(2997, v[1])
      assert.are.equal(0, v[1000])
    end)

    it("empty tensors and names", function()
      for _, dtype in ipairs(FLOATS) do
        local e = d.empty(dtype, { 3, 0 })
        assert.are.same({ 3, 0 }, shape_of(map1("exp", e)))
        assert.are.same({ 3, 0 }, shape_of(map2("add", e, tensor(dtype, { 1 }, { 1 }))))
        call("fill", e, 1)
        call("copy", e, e)
      end
      for arity = 1, 2 do
        local id, seen = 0, {}
        while C.lac_map_name(arity, id) ~= nil do
          local name = ffi.string(C.lac_map_name(arity, id))
          assert.are.equal(id, C.lac_map_id(arity, name))
          assert.is_nil(seen[name])
          seen[name] = true
          id = id + 1
        end
        for name in pairs(arity == 1 and MAP1 or MAP2) do assert.is_true(seen[name], name) end
      end
      assert.are.equal(-1, C.lac_map_id(1, "no such function"))
    end)
  end)

  describe("reductions", function()
    local SHAPE = { 3, 4, 5 }
    local function reference(fn, values, dims)
      local out, order = {}, {}
      for i = 0, 59 do
        local index = { math.floor(i / 20), math.floor(i / 5) % 4, i % 5 }
        local key, flat = 0, 0
        for axis = 1, 3 do
          if dims[axis] then
            flat = flat * SHAPE[axis] + index[axis]
          else
            key = key * SHAPE[axis] + index[axis]
          end
        end
        if not out[key] then out[key] = {} order[#order + 1] = key end
        table.insert(out[key], { values[i + 1], flat })
      end
      table.sort(order)
      local result = {}
      for n, key in ipairs(order) do
        local list = out[key]
        table.sort(list, function(a, b) return a[2] < b[2] end)
        local s, best, at, any, all = 0, nil, nil, 0, 1
        local smallest = fn == "min" or fn == "argmin"
        for _, e in ipairs(list) do
          local v = e[1]
          s = s + v
          if best == nil or (best == best and (v ~= v or (smallest and v < best) or (not smallest
            and v > best))) then best, at = v, e[2] end
          if v ~= 0 then any = 1 else all = 0 end
        end
        result[n] = ({ sum = s, mean = s / #list, max = best, min = best, any = any, all = all, argmax = at,
          argmin = at })[fn]
      end
      return result
    end
    local FNS = { "sum", "mean", "max", "min", "any", "all", "argmax", "argmin" }

    it("agree with the reference for every function, dtype, axis set and layout", function()
      for _, dtype in ipairs(ALL) do
        local values = {}
        for i = 1, 60 do
          local v = math.floor(random() * 8) - (dtype == "u8" and 0 or 3)
          values[i] = dtype == "bool" and (v > 0 and 1 or 0) or v
        end
        if dtype == "f32" then values[13] = NAN end
        local layouts = d.layouts(dtype, SHAPE, values)
        for number, fn in ipairs(FNS) do
          for mask = 0, 7 do
            local dims, axes = {}, 0
            for axis = 1, 3 do
              dims[axis] = mask == 0 or math.floor(mask / 2 ^ (axis - 1)) % 2 == 1
              if dims[axis] then axes = axes + 1 end
            end
            local arg = fn:find("arg")
            local refused = (arg and axes == 2) or (fn == "mean" and not PRECISION[dtype])
            if not refused then
              local ref = reference(fn, values, dims)
              for layout, x in pairs(layouts) do
                local y = op("reduce", number - 1, x, mask, mask % 2)
                -- small integers: every dtype is exact except the mean's last rounding
                if fn == "mean" then check_all("mean " .. layout, dtype, get(y), ref, 1)
                else equal_all(fn .. " " .. dtype .. " " .. layout .. " mask " .. mask, get(y), ref) end
                local wanted = (fn == "any" or fn == "all") and "bool" or arg and "i64"
                  or fn == "sum" and not PRECISION[dtype] and "i64" or dtype
                assert.are.equal(d.dtypes[wanted], y.dtype)
                assert.are.equal(mask % 2 == 1 and 3 or 3 - axes, y.ndim)
              end
            end
          end
        end
      end
    end)

    it("sums are exact to the last rounding, however long", function()
      for _, shape in ipairs { { 100000 }, { 300, 257 }, { 5000, 3 }, { 3, 5000 } } do
        for _, dtype in ipairs { "f64", "f32", "bf16" } do
          local values = round_all(dtype, randoms(count(shape), -1, 1000))
          local x = tensor(dtype, shape, values)
          local s, e = 0, 0
          for _, v in ipairs(values) do -- exact enough: two doubles
            local t = s + v
            e = e + (math.abs(s) >= math.abs(v) and (s - t) + v or (v - t) + s)
            s = t
          end
          -- blocks of 512 doubles are added plainly, hence 8
          check_all("long sum", dtype, get(op("reduce", 0, x, 0, 0)), { s + e }, dtype == "f64" and 8 or 1)
          if #shape == 2 then
            local columns = {}
            for j = 1, shape[2] do
              columns[j] = 0
              for i = 1, shape[1] do columns[j] = columns[j] + values[(i - 1) * shape[2] + j] end
            end
            check_all("column sum", dtype, get(op("reduce", 0, x, 1, 0)), columns, dtype == "f64" and 5000
              or 1)
          end
        end
      end
      -- cancellation that plain f64 summation loses
      equal_all("compensated", get(op("reduce", 0, tensor("f64", { 2000 }, setmetatable({},
        { __index = function(_, i)
        return i == 1 and 1e16 or i == 2000 and -1e16 or (i > 512 and i <= 1536) and 0.5 or 0 end })), 0,
          0)), { 512 })
      equal_all("infinities", get(op("reduce", 0, tensor("f32", { 3 }, { INF, 1, 2 }), 0, 0)), { INF })
    end)

    it("empty reductions and 0 dimensions", function()
      local e = d.empty("f32", { 2, 0 })
      equal_all("sum", get(op("reduce", 0, e, 2, 0)), { 0, 0 })
      equal_all("mean", get(op("reduce", 1, e, 2, 0)), { NAN, NAN })
      equal_all("any", get(op("reduce", 4, e, 2, 0)), { 0, 0 })
      equal_all("all", get(op("reduce", 5, e, 2, 0)), { 1, 1 })
      assert.are.same({ 0 }, shape_of(op("reduce", 2, e, 1, 0)))
      fails("shape", "no elements", "reduce", 2, e, 2, 0, d.out())
      equal_all("0-dim", get(op("reduce", 0, tensor("f32", {}, { 7 }), 0, 0)), { 7 })
    end)

    it("sum_to undoes broadcasting", function()
      local x = {}
      for i = 1, 24 do x[i] = i end
      local t = tensor("f32", { 2, 3, 4 }, x)
      equal_all("to [3, 1]", get(op("sum_to", t, tensor("f32", { 3, 1 }, { 0, 0, 0 }))), { 68, 100, 132 })
      equal_all("to [4]", get(op("sum_to", t, tensor("i64", { 4 }, { 0, 0, 0, 0 }))), { 66, 72, 78, 84 })
      equal_all("to []", get(op("sum_to", t, tensor("f32", {}, { 0 }))), { 300 })
      equal_all("same", get(op("sum_to", d.transpose(t, 0, 1), d.empty("f32", { 3, 2, 4 }))),
        get(d.transpose(t, 0, 1)))
    end)
  end)

  describe("softmax", function()
    local function reference(x, n, logarithm)
      local y = {}
      for at = 0, #x - 1, n do
        local m, s, lost = -INF, 0, 0
        for i = 1, n do m = math.max(m, x[at + i]) end
        for i = 1, n do -- Kahan's sum
          local e = math.exp(x[at + i] - m) - lost
          s, lost = s + e, (s + e) - s - e
        end
        for i = 1, n do y[at + i] = logarithm and x[at + i] - m - math.log(s)
          or math.exp(x[at + i] - m) / s end
      end
      return y
    end
    it("and its logarithm, over the last and other axes", function()
      for _, dtype in ipairs(FLOATS) do
        for _, n in ipairs { 1, 5, 300, 1100 } do
          local x = round_all(dtype, randoms(4 * n, -6, 6))
          for logarithm = 0, 1 do
            local ref = reference(x, n, logarithm == 1)
            -- the exponential of a rounded difference (6 + 6 at most), a sum and a product
            local slack = {}
            -- (the logarithm: of a sum known to a few ulp, absolutely)
            for i, r in ipairs(ref) do
              local kind = dtype == "f64" and "f64" or "f32"
              slack[i] = 16 * ulp(kind, r) + logarithm * 4 * ulp(kind, 1)
            end
            for layout, t in pairs(d.layouts(dtype, { 4, n }, x)) do
              check_all("softmax " .. layout, dtype, get(op("softmax", t, 1, logarithm)), ref, 2, slack)
              local y = op("softmax", d.transpose(t, 0, 1), 0, logarithm) -- down the columns of the transpose
              check_all("softmax columns " .. layout, dtype, get(d.transpose(y, 0, 1)), ref, 2, slack)
            end
          end
        end
      end
      equal_all("masked", get(op("softmax", tensor("f32", { 1, 3 }, { -INF, 2, -INF }), 1, 0)), { 0, 1, 0 })
      equal_all("NaN spreads", get(op("softmax", tensor("f32", { 1, 2 }, { NAN, 2 }), 1, 0)), { NAN, NAN })
      assert.are.same({ 0, 3 }, shape_of(op("softmax", d.empty("f32", { 0, 3 }), -1, 0)))
    end)
    it("gives a row the same bits beside others as alone", function()
      for _, dtype in ipairs(FLOATS) do
        for _, n in ipairs { 1, 15, 16, 37, 1029 } do
          local x = randoms(6 * n, -6, 6)
          x[n + 1], x[3 * n] = NAN, INF
          for i = 3 * n + 1, 4 * n do x[i] = -INF end
          for logarithm = 0, 1 do
            local got = get(op("softmax", tensor(dtype, { 6, n }, x), 1, logarithm))
            for row = 0, 5 do
              local one = tensor(dtype, { 1, n }, { unpack(x, row * n + 1, row * n + n) })
              equal_all("row " .. row, { unpack(got, row * n + 1, row * n + n) }, get(op("softmax", one, 1,
                logarithm)))
            end
          end
        end
      end
    end)
    it("gradients agree with central differences", function()
      local x, g = randoms(15, -2, 2), randoms(15, -1, 1)
      for logarithm = 0, 1 do
        local ref = differences(function(v) return reference(v, 5, logarithm == 1) end, x, g)
        local y = op("softmax", tensor("f64", { 3, 5 }, x), 1, logarithm)
        for layout, tg in pairs(d.layouts("f64", { 3, 5 }, g)) do
          check_gradient("softmax " .. layout, get(op("softmax_bwd", y, tg, 1, logarithm)), ref)
        end
        for _, dtype in ipairs { "f32", "f16", "bf16" } do
          local ty, tg = tensor(dtype, { 3, 5 }, get(y)), tensor(dtype, { 3, 5 }, g)
          local exact = get(op("softmax_bwd", tensor("f64", { 3, 5 }, get(ty)), tensor("f64", { 3, 5 },
            get(tg)), 1, logarithm))
          check_all("softmax_bwd", dtype, get(op("softmax_bwd", ty, tg, 1, logarithm)), exact, 1, 2 ^ -21)
        end
      end
    end)
  end)

  describe("matmul", function()
    local function product(a, b, m, n, k, bias)
      local c, size = {}, {}
      for i = 0, m - 1 do
        for j = 0, n - 1 do
          local s, z = bias and bias[j + 1] or 0, 0
          for l = 0, k - 1 do
            local t = a[i * k + l + 1] * b[l * n + j + 1]
            s, z = s + t, z + math.abs(t)
          end
          c[i * n + j + 1], size[i * n + j + 1] = s, z
        end
      end
      return c, size
    end
    it("agrees with the reference for all shapes, dtypes and layouts", function()
      for _, dtype in ipairs(FLOATS) do
        for _, s in ipairs { { 1, 1, 1 }, { 3, 4, 5 }, { 1, 7, 3 }, { 7, 1, 2 }, { 17, 33, 65 }, { 2, 3,
          600 }, { 37, 130, 9 } } do
          local m, n, k = unpack(s)
          local a, b = round_all(dtype, randoms(m * k, -1, 1)), round_all(dtype, randoms(k * n, -1, 1))
          local bias = round_all(dtype, randoms(n, -1, 1))
          local ref, size = product(a, b, m, n, k, bias)
          local slack = {}
          -- the worst case of k + 1 roundings in the compute type
          for i = 1, #ref do slack[i] = (k + 2) * 2 ^ (dtype == "f64" and -53 or -24) * (size[i] + 1) end
          local right = d.layouts(dtype, { k, n }, b)
          for la, ta in pairs(d.layouts(dtype, { m, k }, a)) do
            for lb, tb in pairs(right) do
              local c = op("matmul", ta, tb, tensor(dtype, { n }, bias))
              assert.are.same({ m, n }, shape_of(c))
              check_all(("matmul %d %d %d %s %s"):format(m, n, k, la, lb), dtype, get(c), ref, 1, slack)
              local sum = d.empty(dtype, { m, n }) -- each row the bias: the product is added to it
              local row = tensor(dtype, { n }, bias)
              assert.equal(0, C.lac_copy(d.expand(row, { m, n }), sum))
              assert.equal(0, C.lac_matmul(ta, tb, sum, sum))
              check_all(("matmul added %d %d %d %s %s"):format(m, n, k, la, lb), dtype, get(sum), ref, 1,
                slack)
            end
          end
        end
      end
    end)
    it("batches broadcast, K = 0 gives the bias, NaN spreads", function()
      local a, b = randoms(2 * 3 * 4 * 5, -1, 1), randoms(3 * 5 * 2, -1, 1)
      local ta, tb = tensor("f64", { 2, 3, 4, 5 }, a), tensor("f64", { 3, 5, 2 }, b)
      local got = get(op("matmul", ta, tb, nil))
      for i = 0, 1 do
        for j = 0, 2 do
          local at = (i * 3 + j) * 20
          local ref = product({ unpack(a, at + 1, at + 20) }, { unpack(b, j * 10 + 1, j * 10 + 10) }, 4, 2, 5)
          check_all("batch", "f64", { unpack(got, (i * 3 + j) * 8 + 1, (i * 3 + j) * 8 + 8) }, ref, 8, 1e-15)
        end
      end
      -- one b for all items, from contiguous rows and from a transposed batch
      local shared = tensor("f64", { 5, 2 }, { unpack(b, 1, 10) })
      local ref = product(a, { unpack(b, 1, 10) }, 24, 2, 5)
      check_all("shared b", "f64", get(op("matmul", ta, shared, nil)), ref, 8, 1e-15)
      local swapped = d.transpose(op("matmul", d.transpose(ta, 0, 1), shared, nil), 0, 1)
      check_all("shared b, transposed batch", "f64", get(swapped), ref, 8, 1e-15)
      equal_all("K = 0", get(op("matmul", d.empty("f32", { 2, 0 }), d.empty("f32", { 0, 2 }), tensor("f32",
        { 2 }, { 1, 2 }))), { 1, 2, 1, 2 })
      equal_all("K = 0", get(op("matmul", d.empty("bf16", { 2, 0 }), d.empty("bf16", { 0, 2 }), nil)), { 0,
        0, 0, 0 })
      assert.are.same({ 0, 4 }, shape_of(op("matmul", d.empty("f32", { 0, 3 }), d.empty("f32", { 3, 4 }),
        nil)))
      assert.are.same({ 0, 2, 4 }, shape_of(op("matmul", d.empty("f32", { 0, 2, 3 }), d.empty("f32", { 3,
        4 }), nil)))
      equal_all("NaN", get(op("matmul", tensor("f32", { 1, 2 }, { NAN, 1 }), tensor("f32", { 2, 1 }, { 0,
        1 }), nil)), { NAN })
    end)
  end)

  describe("layernorm", function()
    local EPS = 1e-5
    local function reference(x, n, gamma, beta)
      local y, mean, rstd = {}, {}, {}
      for at = 0, #x - 1, n do
        local m, s = 0, 0
        for i = 1, n do m = m + x[at + i] / n end
        for i = 1, n do s = s + (x[at + i] - m) ^ 2 / n end
        local r = 1 / math.sqrt(s + EPS)
        mean[#mean + 1], rstd[#rstd + 1] = m, r
        for i = 1, n do y[at + i] = (x[at + i] - m) * r * (gamma and gamma[i] or 1) + (beta and beta[i]
          or 0) end
      end
      return y, mean, rstd
    end
    local function forward(x, gamma, beta)
      local out, mean, rstd = d.out(), d.out(), d.out()
      call("layernorm", x, gamma, beta, EPS, out, mean, rstd)
      return out, mean, rstd
    end
    it("agrees with the reference, also with a large mean", function()
      for _, dtype in ipairs(FLOATS) do
        for _, n in ipairs { 1, 8, 300 } do
          local offset = dtype == "f32" and 1000 or dtype == "f64" and 1e6 or 0
          local x = round_all(dtype, randoms(4 * n, offset - 1, offset + 1))
          local gamma, beta = round_all(dtype, randoms(n, 0.5, 2)), round_all(dtype, randoms(n, -1, 1))
          for case = 0, 3 do
            local ga, be = case % 2 == 1 and gamma or nil, case >= 2 and beta or nil
            local ref, mean, rstd = reference(x, n, ga, be)
            local stat = dtype == "f64" and "f64" or "f32"
            -- the reference rounds its own mean: relative to the offset, in f64
            local slack = (dtype == "f64" and 40 * offset * 2 ^ -53 or 2 ^ -20)
            for layout, t in pairs(d.layouts(dtype, { 4, n }, x)) do
              local y, m, r = forward(t, ga and tensor(dtype, { n }, ga), be and tensor(dtype, { n }, be))
              check_all("layernorm " .. layout, dtype, get(y), ref, 2, n == 1 and slack * 400 or slack * 4)
              check_all("mean", stat, get(m), mean, 4, n == 1 and 0 or slack)
              check_all("rstd", stat, get(r), rstd, 4, n == 1 and 0 or slack * 4)
            end
          end
        end
      end
    end)
    it("gradients agree with central differences", function()
      local n, rows = 6, 5
      local x, g = randoms(n * rows, -2, 2), randoms(n * rows, -1, 1)
      local gamma, beta = randoms(n, 0.5, 2), randoms(n, -1, 1)
      local dx = differences(function(v) return (reference(v, n, gamma, beta)) end, x, g)
      local dgamma = differences(function(v) return (reference(x, n, v, beta)) end, gamma, g)
      local dbeta = differences(function(v) return (reference(x, n, gamma, v)) end, beta, g)
      for layout, tx in pairs(d.layouts("f64", { rows, n }, x)) do
        local tg, tgamma = d.layouts("f64", { rows, n }, g)[layout], tensor("f64", { n }, gamma)
        local _, mean, rstd = forward(tx, tgamma, tensor("f64", { n }, beta))
        local a, b, c = d.out(), d.out(), d.out()
        call("layernorm_bwd", tx, tgamma, mean, rstd, tg, a, b, c)
        check_gradient("dx " .. layout, get(a), dx)
        check_gradient("dgamma", get(b), dgamma)
        check_gradient("dbeta", get(c), dbeta)
        local plain = d.out()
        call("layernorm_bwd", tx, nil, mean, rstd, tg, plain, nil, nil)
        check_gradient("without gamma", get(plain), differences(function(v) return (reference(v, n)) end, x,
          g))
      end
      for _, dtype in ipairs { "f32", "f16", "bf16" } do
        local function both(kind)
          local tx = tensor(dtype, { rows, n }, x)
          local tg, tgamma = tensor(dtype, { rows, n }, g), tensor(dtype, { n }, gamma)
          local _, mean, rstd = forward(tx, tgamma, nil)
          local function as(t, to) return tensor(to, shape_of(t), get(t)) end
          local stat = kind == "f64" and "f64" or "f32"
          local a, b, c = d.out(), d.out(), d.out()
          call("layernorm_bwd", as(tx, kind), as(tgamma, kind), as(mean, stat), as(rstd, stat), as(tg, kind),
            a, b, c)
          return { a, b, c }
        end
        local exact, got = both("f64"), both(dtype)
        for i = 1, 3 do check_all("layernorm_bwd", dtype, get(got[i]), get(exact[i]), 1, 2 ^ -19) end
      end
    end)
    it("gradients of wide and of many rows agree with the formula", function()
      for _, shape in ipairs { { 1, 40 }, { 2, 16 }, { 37, 1061 }, { 2113, 19 } } do
        local rows, n = unpack(shape)
        local x, g, gamma = randoms(rows * n, -2, 2), randoms(rows * n, -1, 1), randoms(n, 0.5, 2)
        local _, mean, rstd = reference(x, n)
        local dx, dgamma, dbeta = {}, {}, {}
        for i = 1, n do dgamma[i], dbeta[i] = 0, 0 end
        for r = 1, rows do
          local at, a, b = (r - 1) * n, 0, 0
          local function h(i) return (x[at + i] - mean[r]) * rstd[r] end
          for i = 1, n do
            a, b = a + g[at + i] * gamma[i] / n, b + g[at + i] * gamma[i] * h(i) / n
            dgamma[i], dbeta[i] = dgamma[i] + g[at + i] * h(i), dbeta[i] + g[at + i]
          end
          for i = 1, n do dx[at + i] = rstd[r] * (g[at + i] * gamma[i] - a - h(i) * b) end
        end
        for dtype, slack in pairs { f64 = 1e-11, f32 = 2 ^ -15 } do
          local tx, tgamma = tensor(dtype, { rows, n }, x), tensor(dtype, { n }, gamma)
          local m, s = tensor(dtype, { rows }, mean), tensor(dtype, { rows }, rstd)
          local got = { d.out(), d.out(), d.out() }
          call("layernorm_bwd", tx, tgamma, m, s, tensor(dtype, { rows, n }, g), unpack(got))
          for i, want in ipairs { dx, dgamma, dbeta } do
            check_all(("layernorm_bwd %d %d"):format(rows, n), dtype, get(got[i]), want, 1, slack)
          end
        end
      end
    end)
  end)

  describe("cross-entropy", function()
    local R, V, E, IGNORE = 7, 11, 5, -100
    local target = { 0, 10, 3, IGNORE, 5, 5, 1 }
    local function losses(x)
      local out, lse = {}, {}
      for r = 0, R - 1 do
        local m, s = -INF, 0
        for i = 1, V do m = math.max(m, x[r * V + i]) end
        for i = 1, V do s = s + math.exp(x[r * V + i] - m) end
        lse[r + 1] = m + math.log(s)
        out[r + 1] = target[r + 1] == IGNORE and 0 or lse[r + 1] - x[r * V + target[r + 1] + 1]
      end
      return out, lse
    end
    local function logits_of(x, w, bias)
      local l = {}
      for r = 0, R - 1 do
        for v = 0, V - 1 do
          local s = bias and bias[v + 1] or 0
          for e = 1, E do s = s + x[r * E + e] * w[v * E + e] end
          l[r * V + v + 1] = s
        end
      end
      return l
    end
    it("of logits, forward and backward", function()
      local values, g = randoms(R * V, -3, 3), randoms(R, -1, 1)
      for _, dtype in ipairs(FLOATS) do
        local stat = dtype == "f64" and "f64" or "f32"
        local x = round_all(dtype, values)
        local ref, lse_ref = losses(x)
        local rg = round_all(stat, g)
        local dref = differences(function(v) return (losses(v)) end, { unpack(x) }, rg)
        for _, index in ipairs { "i64", "i32" } do
          for layout, t in pairs(d.layouts(dtype, { R, V }, x)) do
            local tt, out, lse = tensor(index, { R }, target), d.out(), d.out()
            call("cross_entropy", t, tt, nil, IGNORE, 0, out, lse)
            check_all("loss " .. layout, stat, get(out), ref, 4, stat == "f32" and 2 ^ -21 or 2 ^ -48)
            check_all("lse", stat, get(lse), lse_ref, 4)
            local dx = op("cross_entropy_bwd", t, tt, nil, IGNORE, 0, lse, tensor(stat, { R }, rg))
            assert.are.equal(t.dtype, dx.dtype)
            check_all("dlogits", dtype, get(dx), dref, 1, stat == "f32" and 2 ^ -21 or 1e-7)
          end
        end
      end
    end)
    it("of rows of several blocks: nothing in the first, a maximum that grows and one that stays", function()
      local n, values = 9001, {}
      for row, of in ipairs { function(i) return i <= 5000 and -INF or i % 7 end,
        function(i) return i / 100 - 50 end, function(i) return i == 1 and 9 or -(i % 11) end } do
        for i = 1, n do values[(row - 1) * n + i] = of(i) end
      end
      for _, dtype in ipairs { "f32", "f64" } do
        local x, ref = round_all(dtype, values), {}
        for row = 0, 2 do
          local m, s, lost = -INF, 0, 0 -- lost: by rounding (Kahan)
          for i = 1, n do m = math.max(m, x[row * n + i]) end
          for i = 1, n do
            local y = math.exp(x[row * n + i] - m) - lost
            s, lost = s + y, s + y - s - y
          end
          ref[row + 1] = m + math.log(s)
        end
        local out, lse, targets = d.out(), d.out(), tensor("i64", { 3 }, { n - 1, 0, 0 })
        call("cross_entropy", tensor(dtype, { 3, n }, x), targets, nil, IGNORE, 0, out, lse)
        check_all("lse", dtype, get(lse), ref, 4)
        for row = 1, 3 do ref[row] = ref[row] - x[({ n, n + 1, 2 * n + 1 })[row]] end
        check_all("loss", dtype, get(out), ref, 4, dtype == "f32" and 2 ^ -17 or 2 ^ -45)
      end
    end)
    it("fused with the projection, in chunks of any size", function()
      local vx, vw, vb, g = randoms(R * E, -1, 1), randoms(V * E, -1, 1), randoms(V, -1, 1), randoms(R, -1, 1)
      for _, dtype in ipairs(FLOATS) do
        local stat = dtype == "f64" and "f64" or "f32"
        local x, w, b = round_all(dtype, vx), round_all(dtype, vw), round_all(dtype, vb)
        local rg = round_all(stat, g)
        for _, with_bias in ipairs { false, true } do
          local bias = with_bias and b or nil
          local ref = losses(logits_of(x, w, bias))
          local dx = differences(function(v) return (losses(logits_of(v, w, bias))) end, { unpack(x) }, rg)
          local dw = differences(function(v) return (losses(logits_of(x, v, bias))) end, { unpack(w) }, rg)
          local db = bias and differences(function(v) return (losses(logits_of(x, w, v))) end, { unpack(b) },
            rg)
          for layout, tx in pairs(d.layouts(dtype, { R, E }, x)) do
            for _, chunk in ipairs { 0, 1, 3, 100 } do
              local tw = d.layouts(dtype, { V, E }, w)[layout]
              local tb, tt, tg = bias and tensor(dtype, { V }, b), tensor("i64", { R }, target), tensor(stat,
                { R }, rg)
              local out, lse = d.out(), d.out()
              call("linear_cross_entropy", tx, tw, tb, tt, nil, IGNORE, 0, chunk, out, lse)
              check_all("fused loss " .. layout, stat, get(out), ref, 4, stat == "f32" and 2 ^ -20 or 2 ^ -47)
              local o = { d.out(), d.out(), bias and d.out() or nil }
              call("linear_cross_entropy_bwd", tx, tw, tb, tt, nil, IGNORE, 0, chunk, lse, tg, o[1], o[2],
                   o[3])
              local slack = stat == "f32" and 2 ^ -19 or 1e-7
              check_all("fused dx", dtype, get(o[1]), dx, 1, slack)
              check_all("fused dw", dtype, get(o[2]), dw, 1, slack)
              if bias then check_all("fused dbias", dtype, get(o[3]), db, 1, slack) end
            end
          end
        end
      end
    end)
    it("names the bad target", function()
      local x = tensor("f32", { 2, 3 }, { 1, 2, 3, 4, 5, 6 })
      fails("index", "target number 2 is 3.*outside 0..2", "cross_entropy", x, tensor("i64", { 2 }, { 0,
        3 }), nil, -100, 0, d.out(), d.out())
      fails("index", "target number 1 is %-1", "linear_cross_entropy", x, x, nil, tensor("i32", { 2 }, { -1,
        0 }), nil, -100, 0, 0, d.out(), d.out())
      local out, lse = d.out(), d.out()
      call("cross_entropy", d.empty("f32", { 0, 3 }), d.empty("i64", { 0 }), nil, 0, 0, out, lse)
      assert.are.same({ 0 }, shape_of(out))
    end)
  end)

  describe("indexing", function()
    it("index_select for every dtype, axis and layout", function()
      local values = {}
      for i = 1, 24 do values[i] = i end
      for _, dtype in ipairs(ALL) do
        local v = values
        if dtype == "bool" then v = {} for i = 1, 24 do v[i] = i % 3 == 0 and 1 or 0 end end
        for layout, x in pairs(d.layouts(dtype, { 2, 3, 4 }, v)) do
          for dim = 0, 2 do
            local size = ({ 2, 3, 4 })[dim + 1]
            local idx = { size - 1, 0, 0, size - 1, 1, 0 }
            local y = op("index_select", x, dim, tensor(dim == 1 and "i32" or "i64", { 3, 2 }, idx))
            local shape = { 2, 3, 4 }
            table.remove(shape, dim + 1)
            table.insert(shape, dim + 1, 2)
            table.insert(shape, dim + 1, 3)
            assert.are.same(shape, shape_of(y))
            local ref, inner, outer = {}, 1, 1
            for a = dim + 2, 3 do inner = inner * ({ 2, 3, 4 })[a] end
            for a = 1, dim do outer = outer * ({ 2, 3, 4 })[a] end
            for o = 0, outer - 1 do
              for _, i in ipairs(idx) do
                for k = 0, inner - 1 do ref[#ref + 1] = v[(o * size + i) * inner + k + 1] end
              end
            end
            equal_all("index_select " .. dtype .. " " .. layout .. " dim " .. dim, get(y), ref)
          end
        end
      end
    end)
    it("its gradient adds repeated rows", function()
      for _, dtype in ipairs(FLOATS) do
        local idx = { 2, 0, 2, 2 }
        local g = {}
        for i = 1, 2 * 4 * 3 do g[i] = i end
        for layout, tg in pairs(d.layouts(dtype, { 2, 4, 3 }, g)) do
          local ref = {}
          for i = 1, 2 * 5 * 3 do ref[i] = 0 end
          for o = 0, 1 do
            for n, i in ipairs(idx) do
              for k = 1, 3 do
                local at = (o * 5 + i) * 3 + k
                ref[at] = ref[at] + g[(o * 4 + n - 1) * 3 + k]
              end
            end
          end
          local out = op("index_select_bwd", tg, 1, tensor("i64", { 4 }, idx), 5)
          assert.are.same({ 2, 5, 3 }, shape_of(out))
          equal_all("index_select_bwd " .. layout, get(out), ref)
        end
        -- a thousand times the same row: summed in double, rounded once
        local many = tensor(dtype, { 1000, 1 }, setmetatable({}, { __index = function() return 0.25 end }))
        local zeros = d.empty("i32", { 1000 })
        call("fill", zeros, 0)
        equal_all("many", get(op("index_select_bwd", many, 0, zeros, 2)), { d.round(dtype, 250), 0 })
      end
    end)
    it("gather and its gradient", function()
      local x, idx = {}, { 1, 0, 2, 2, 1, 1 }
      for i = 1, 6 do x[i] = i * 10 end
      for _, dtype in ipairs { "f64", "f32", "f16", "bf16", "i64", "i32", "u8" } do
        for layout, t in pairs(d.layouts(dtype, { 2, 3 }, x)) do
          equal_all("gather 1 " .. layout, get(op("gather", t, 1, tensor("i64", { 2, 3 }, idx))), { 20, 10,
            30, 60, 50, 50 })
          equal_all("gather 0 " .. layout, get(op("gather", t, 0, tensor("i32", { 3, 3 }, { 0, 1, 0, 1, 1, 0,
            0, 0, 1 }))),
            { 10, 50, 30, 40, 50, 30, 10, 20, 60 })
        end
      end
      for _, dtype in ipairs(FLOATS) do
        for layout, g in pairs(d.layouts(dtype, { 2, 3 }, { 1, 2, 3, 4, 5, 6 })) do
          equal_all("gather_bwd 1 " .. layout, get(op("gather_bwd", g, 1, tensor("i64", { 2, 3 }, idx), 4)),
            { 2, 1, 3, 0, 0, 11, 4, 0 })
          equal_all("gather_bwd 0 " .. layout, get(op("gather_bwd", g, 0, tensor("i64", { 2, 3 }, { 1, 0, 1,
            1, 2, 0 }), 3)),
            { 0, 2, 6, 5, 0, 3, 0, 5, 0 })
        end
      end
    end)
    it("refuses indices outside the axis, negative ones too", function()
      local x = tensor("f32", { 2, 3 }, { 1, 2, 3, 4, 5, 6 })
      fails("index", "index number 2 is 2 .*outside 0..1", "index_select", x, 0, tensor("i64", { 2 }, { 0,
        2 }), d.out())
      fails("index", "index number 1 is %-1", "gather", x, 1, tensor("i64", { 2, 1 }, { -1, 0 }), d.out())
      fails("index", "outside 0..0", "index_select_bwd", x, 0, tensor("i64", { 2 }, { 0, 1 }), 1, d.out())
      fails("index", "outside", "gather_bwd", x, 1, tensor("i64", { 2, 3 }, { 0, 0, 0, 0, 0, 9 }), 3, d.out())
      fails("index", "outside", "index_select", d.empty("f32", { 0, 3 }), 0, tensor("i64", { 1 }, { 0 }),
        d.out())
      assert.are.same({ 0, 3 }, shape_of(op("index_select", x, 0, d.empty("i64", { 0 }))))
    end)
  end)

  describe("rope", function()
    local B, N, H, D = 2, 3, 2, 8
    local function reference(x, start, base, interleaved, scale_base, sgn, transpose)
      local y = {}
      for i = 0, D / 2 - 1 do
        for row = 0, B * N * H - 1 do
          local p = start + math.floor(row / H) % N
          local angle = p * base ^ (-2 * i / D)
          local f = scale_base > 0 and ((2 * i / D + 0.4) / 1.4) ^ (sgn * p / scale_base) or 1
          local c, s = math.cos(angle) * f, math.sin(angle) * f * (transpose and -1 or 1)
          local a = row * D + (interleaved and 2 * i or i) + 1
          local b = row * D + (interleaved and 2 * i + 1 or i + D / 2) + 1
          y[a], y[b] = x[a] * c - x[b] * s, x[a] * s + x[b] * c
        end
      end
      return y
    end
    it("agrees with the reference in every mode", function()
      for _, dtype in ipairs(FLOATS) do
        local x = round_all(dtype, randoms(B * N * H * D, -1, 1))
        for _, start in ipairs { 0, 1000, -5, 3000000 } do
          for mode = 0, 15 do
            local inter, xpos, negative, trans = mode % 2, math.floor(mode / 2) % 2,
              math.floor(mode / 4) % 2, math.floor(mode / 8)
            local scale_base = xpos == 1 and math.max(512, math.abs(start)) or 0
            local sgn = negative == 1 and -1 or 1
            local ref = reference(x, start, 10000, inter == 1, scale_base, sgn, trans == 1)
            local t = mode == 0 and d.layouts(dtype, { B, N, H, D }, x) or { contiguous = tensor(dtype, { B,
              N, H, D }, x) }
            -- an angle of p is known to p 2^-53; the products round in the compute type
            local slack = dtype == "f64" and 1e-15 * (4 + math.abs(start)) or 2 ^ -21
            for layout, tx in pairs(t) do
              check_all("rope " .. mode .. " " .. layout, dtype, get(op("rope", tx, nil, start, 10000, inter,
                scale_base, sgn, trans)),
                ref, 1, slack)
            end
          end
        end
      end
    end)
    it("the transpose is the adjoint", function()
      local x, y = randoms(B * N * H * D, -1, 1), randoms(B * N * H * D, -1, 1)
      local a = get(op("rope", tensor("f64", { B, N, H, D }, x), nil, 4, 1000, 0, 512, 1, 0))
      local b = get(op("rope", tensor("f64", { B, N, H, D }, y), nil, 4, 1000, 0, 512, 1, 1))
      local s, t = 0, 0
      for i = 1, #x do s, t = s + a[i] * y[i], t + x[i] * b[i] end
      assert.is_true(math.abs(s - t) < 1e-13)
    end)
  end)

  describe("random", function()
    it("Philox gives the published words", function()
      -- Random123's known answers for philox4x32-10; uniform f32 are the upper 24 bits of the words
      local function words(seed, offset)
        local t = d.empty("f32", { 4 })
        call("random", t, C.LAC_UNIFORM, 0, 1, seed, offset)
        return get(t)
      end
      local function units(list)
        local t = {}
        for i, w in ipairs(list) do t[i] = math.floor(w / 256) / 2 ^ 24 end
        return t
      end
      equal_all("zeros", words(0ULL, 0ULL), units { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 })
      -- another vector with our layout: block 0, so counter words 0 and 1 are 0; bits of a 32-bit integer
      -- draw
      local t = d.empty("i64", { 2 })
      call("random", t, C.LAC_INTEGER, 0, 2 ^ 32, 0ULL, 0ULL)
      equal_all("integers are the high words", get(t), { 0xe169c58d, 0x9b00dbd8 })
    end)
    it("has the right moments and bounds", function()
      local n = 40000
      for _, dtype in ipairs(FLOATS) do
        local t = d.empty(dtype, { n })
        call("random", t, C.LAC_UNIFORM, -1, 3, 5, 1)
        local s, low, high = 0, INF, -INF
        for _, v in ipairs(get(t)) do s, low, high = s + v, math.min(low, v), math.max(high, v) end
        assert.is_true(low >= -1 and high < 3, "bounds of " .. dtype)
        assert.is_true(math.abs(s / n - 1) < 5 * 4 / math.sqrt(12 * n), "mean of uniform " .. dtype)
        call("random", t, C.LAC_NORMAL, 2, 3, 5, 2)
        local m, v2 = 0, 0
        for _, v in ipairs(get(t)) do m, v2 = m + v, v2 + (v - 2) ^ 2 end
        assert.is_true(math.abs(m / n - 2) < 5 * 3 / math.sqrt(n), "mean of normal " .. dtype)
        assert.is_true(math.abs(v2 / n - 9) < 5 * 9 * math.sqrt(2 / n), "variance of normal " .. dtype)
        -- a range that rounding would leave: 1 - 2^-9 and up rounds to 1 in bf16
        call("random", t, C.LAC_UNIFORM, 0, 1, 9, 3)
        low, high = INF, -INF
        for _, v in ipairs(get(t)) do low, high = math.min(low, v), math.max(high, v) end
        assert.is_true(low >= 0 and high < 1, dtype)
      end
      for _, dtype in ipairs(ALL) do
        local t = d.empty(dtype, { n })
        call("random", t, C.LAC_BERNOULLI, 0.3, 0, 5, 3)
        local s = 0
        local odd = 0
        for _, v in ipairs(get(t)) do
          s = s + v
          if v ~= 0 and v ~= 1 then odd = odd + 1 end
        end
        assert.are.equal(0, odd)
        assert.is_true(math.abs(s / n - 0.3) < 5 * math.sqrt(0.21 / n), "bernoulli " .. dtype)
        local top = dtype == "bool" and 2 or 7
        call("random", t, C.LAC_INTEGER, 0, top, 5, 4)
        local counts = {}
        for _, v in ipairs(get(t)) do counts[v] = (counts[v] or 0) + 1 end
        for v = 0, top - 1 do
          assert.is_true(math.abs((counts[v] or 0) - n / top) < 6 * math.sqrt(n / top),
            ("integer %d in %s"):format(v, dtype))
        end
      end
    end)
    it("depends on seed, offset and row-major position only", function()
      for kind = 0, 3 do
        local function draw(t, seed, offset)
          call("random", t, kind, kind == 2 and 0.5 or 0, kind == 3 and 100 or 1, seed, offset)
          return get(t)
        end
        local ref = draw(d.empty("f32", { 600 }), 1, 1)
        for layout, t in pairs(d.layouts("f32", { 20, 30 }, randoms(600, 0, 1))) do equal_all("random "
          .. layout, draw(t, 1, 1), ref) end
        equal_all("prefix", draw(d.empty("f32", { 7 }), 1, 1), { unpack(ref, 1, 7) })
        local other, third = draw(d.empty("f32", { 600 }), 2, 1), draw(d.empty("f32", { 600 }), 1, 2)
        local same = 0
        for i = 1, 600 do same = same + (other[i] == ref[i] and 1 or 0) + (third[i] == ref[i] and 1 or 0) end
        assert.is_true(same < (kind == 2 and 750 or 60))
      end
    end)
    it("dropout keeps, scales, and is its own backward", function()
      for _, dtype in ipairs(FLOATS) do
        local x = d.empty(dtype, { 50, 40 })
        call("fill", x, 1)
        local y = get(op("dropout", x, 0.25, 7, 1))
        local kept = 0
        for _, v in ipairs(y) do
          assert.is_true(v == 0 or v == d.round(dtype, 4 / 3) or math.abs(v - 4 / 3) < 1e-6)
          kept = kept + (v ~= 0 and 1 or 0)
        end
        assert.is_true(math.abs(kept / 2000 - 0.75) < 5 * math.sqrt(0.1875 / 2000))
        for layout, t in pairs(d.layouts(dtype, { 50, 40 }, get(x))) do
          equal_all("dropout " .. layout, get(op("dropout", t, 0.25, 7, 1)), y)
        end
        equal_all("p = 0", get(op("dropout", x, 0, 7, 1)), get(x))
      end
    end)
  end)

  describe("optimiser", function()
    local function list(items)
      local a = ffi.new("lac_optim_item[?]", #items)
      for i, t in ipairs(items) do
        a[i - 1].param, a[i - 1].grad, a[i - 1].m, a[i - 1].v = t.p, t.g, t.m, t.v
        a[i - 1].lr, a[i - 1].weight_decay = t.lr, t.wd
      end
      return a
    end
    it("AdamW follows the published algorithm over a list", function()
      for _, dtype in ipairs(FLOATS) do
        local stat = dtype == "f64" and "f64" or "f32"
        local items, refs = {}, {}
        for k, n in ipairs { 3, 700, 0, 20000 } do
          local p, m, v = round_all(dtype, randoms(n, -1, 1)), {}, {}
          for i = 1, n do m[i], v[i] = 0, 0 end
          refs[k] = { p = p, m = m, v = v }
          items[k] = { p = tensor(dtype, { n }, p), g = d.empty(dtype, { n }), m = tensor(stat, { n }, m),
            v = tensor(stat, { n }, v),
                       lr = 0.01 * k, wd = 0.1 * (k - 1) }
        end
        for step = 1, 3 do
          for k, r in ipairs(refs) do
            local g = round_all(dtype, randoms(#r.p, -1, 1))
            d.set(items[k].g, g)
            for i = 1, #r.p do
              local x = g[i] * 0.5
              r.m[i] = 0.9 * r.m[i] + 0.1 * x
              r.v[i] = 0.99 * r.v[i] + 0.01 * x * x
              local mh, vh = r.m[i] / (1 - 0.9 ^ step), r.v[i] / (1 - 0.99 ^ step)
              r.p[i] = r.p[i] - items[k].lr * (mh / (math.sqrt(vh) + 1e-8) + items[k].wd * r.p[i])
            end
          end
          call("adamw_many", list(items), #items, 0.9, 0.99, 1e-8, 0, step, 0.5, 0)
          for k, r in ipairs(refs) do
            check_all("adamw", dtype, get(items[k].p), r.p, 1, stat == "f32" and 2 ^ -21 or 1e-14)
            check_all("adamw m", stat, get(items[k].m), r.m, 2, stat == "f32" and 2 ^ -23 or 1e-15)
            r.p = get(items[k].p) -- the rounding of the parameter is part of the algorithm
          end
        end
      end
    end)
    it("the global norm", function()
      local a, b = tensor("f32", { 2, 2 }, { 1, 2, 3, 4 }), tensor("bf16", { 3 }, { 5, 6, 7 })
      local l, norm = ffi.new("const lac_tensor *[3]"), ffi.new("double[1]")
      local c = d.empty("f64", { 0 })
      l[0], l[1], l[2] = d.transpose(a, 0, 1), b, c
      local keep = { l[0], b, c }
      call("norm_many", l, 3, norm)
      assert.is_true(math.abs(norm[0] - math.sqrt(140)) < 1e-14 and #keep == 3)
      call("norm_many", nil, 0, norm)
      assert.are.equal(0, norm[0])
    end)
  end)

  it("results do not depend on the number of threads, nor on the run", function()
    local function normal(dtype, shape, offset)
      local t = d.empty(dtype, shape)
      call("random", t, C.LAC_NORMAL, 0, 1, 3, offset)
      return t
    end
    -- calls with `outs` outputs at the end and returns them
    local function several(name, outs, ...)
      local args, n, results = { ... }, select("#", ...), {}
      for i = 1, outs do results[i] = d.out() args[n + i] = results[i] end
      call(name, unpack(args, 1, n + outs))
      return unpack(results)
    end
    local function everything()
      local bits = {}
      local function keep(name, ...)
        for i = 1, select("#", ...) do bits[#bits + 1] = { name, d.bits((select(i, ...))) } end
      end
      for _, dtype in ipairs { "f32", "bf16" } do
        local x, y = normal(dtype, { 130, 515 }, 1), normal(dtype, { 515, 130 }, 2)
        keep("random", x, y)
        for name in pairs(MAP1) do keep(name, map1(name, x)) end
        keep("add", map2("add", x, d.transpose(y, 0, 1)))
        for fn = 0, 7 do
          keep("reduce", op("reduce", fn, x, 0, 0), op("reduce", fn, x, 1, 0), op("reduce", fn, x, 2, 0))
        end
        keep("long sum", op("reduce", 0, normal(dtype, { 200001 }, 9), 0, 0))
        keep("softmax", op("softmax", x, 1, 0), op("softmax", x, 0, 1))
        local gamma = normal(dtype, { 515 }, 3)
        local out, mean, rstd = several("layernorm", 3, x, gamma, nil, 1e-5)
        keep("layernorm", out, mean, rstd, several("layernorm_bwd", 3, x, gamma, mean, rstd, out))
        keep("matmul", op("matmul", x, y, nil), op("matmul", y, x, nil), op("matmul", d.transpose(y, 0, 1),
          d.transpose(x, 0, 1), nil))
        keep("matmul", op("matmul", normal(dtype, { 20, 40, 33 }, 4), normal(dtype, { 20, 33, 41 }, 5), nil))
        local idx = d.empty("i64", { 130 })
        call("random", idx, C.LAC_INTEGER, 0, 50, 1, 1)
        keep("index", op("index_select_bwd", x, 0, idx, 50), op("index_select", y, 0, idx))
        local w, bias = normal(dtype, { 60, 515 }, 6), normal(dtype, { 60 }, 10)
        local loss, lse = several("linear_cross_entropy", 2, x, w, bias, idx, nil, -1, 0.1, 37)
        keep("fused", loss, lse,
          several("linear_cross_entropy_bwd", 3, x, w, bias, idx, nil, -1, 0.1, 37, lse, loss))
        keep("dropout", op("dropout", x, 0.5, 1, 1))
        keep("rope", op("rope", normal(dtype, { 2, 70, 4, 64 }, 7), nil, 5, 10000, 0, 0, 1, 0))
        local p, m, v = normal(dtype, { 130, 515 }, 8), d.empty("f32", { 130, 515 }), d.empty("f32", { 130,
          515 })
        call("fill", m, 0) call("fill", v, 0)
        call("adamw_many", ffi.new("lac_optim_item[1]", { { p, x, m, v, 0.1, 0.1 } }), 1, 0.9, 0.99, 1e-8, 0,
          1, 1, 0)
        keep("adamw", p, m, v)
        local norm = ffi.new("double[1]")
        call("norm_many", ffi.new("const lac_tensor *[1]", { x }), 1, norm)
        bits[#bits + 1] = { "norm", ffi.string(norm, 8) }
      end
      return bits
    end
    C.lac_threads(1)
    local one, again = everything(), everything()
    C.lac_threads(2)
    local two = everything()
    C.lac_threads(3)
    local three = everything()
    C.lac_threads(original_threads)
    for i = 1, #one do
      assert.is_true(one[i][2] == again[i][2], one[i][1] .. " differs between two runs")
      assert.is_true(one[i][2] == two[i][2], one[i][1] .. " differs between 1 and 2 threads")
      assert.is_true(one[i][2] == three[i][2], one[i][1] .. " differs between 1 and 3 threads")
    end
  end)
end)
end

describe("engine errors:", function()
  local f = function(...) return d.empty("f32", { ... }) end
  local i64 = function(...) return d.empty("i64", { ... }) end
  local half = function(...) return d.empty("f16", { ... }) end

  it("name both sides and the offending value", function()
    local exp, add = C.lac_map_id(1, "exp"), C.lac_map_id(2, "add")
    local o = d.out()
    fails("argument", "function id 999", "map1", 999, f(2), o)
    fails("argument", "x is missing", "map1", exp, nil, o)
    fails("argument", "no tensor to fill", "map1", exp, f(2), nil)
    fails("dtype", "exp: x must be a floating%-point.*i64", "map1", exp, i64(2), o)
    fails("dtype", "neg: not defined for bool", "map1", C.lac_map_id(1, "neg"), d.empty("bool", { 2 }), o)
    fails("dtype", "and: x must be bool, got f32", "map2", C.lac_map_id(2, "and"), f(2), f(2), o)
    fails("dtype", "add: x is f32 but y is f16", "map2", add, f(2), half(2), o)
    fails("shape", "%[2, 3%].*%[4%].*3 != 4", "map2", add, f(2, 3), f(4), o)
    fails("argument", "0.5 is not a value of dtype i64", "map2_scalar", add, i64(2), 0.5, 0, o)
    fails("argument", "nan is not a value", "map2_scalar", add, i64(2), NAN, 0, o)
    fails("argument", "has no gradient", "map2_bwd", C.lac_map_id(2, "lt"), 0, f(2), f(2), f(2), o)
    fails("argument", "argument 2, expected 0 or 1", "map2_bwd", add, 2, f(2), f(2), f(2), o)
    fails("shape", "the result is %[2, 3%] but g is %[3%]", "map2_bwd", add, 0, f(2, 3), f(3), f(3), o)
    fails("dtype", "cond must be bool, got f32", "where", f(2), f(2), f(2), o)
    fails("shape", "x %[3%] does not broadcast to dst %[2%]", "axpy", 1, f(3), f(2))
    fails("argument", "300 is not a value of dtype u8", "fill", d.empty("u8", { 2 }), 300)
    fails("shape", "src %[2, 2%] does not broadcast to dst %[2%]", "copy", f(2, 2), f(2))
    fails("shape", "one dimension", "arange", f(2, 2), 0, 1)
    fails("argument", "the last value 299", "arange", d.empty("u8", { 300 }), 0, 1)
    fails("argument", "function id %-1", "reduce", -1, f(2), 0, 0, o)
    fails("argument", "reach past", "reduce", 0, f(2), 2, 0, o)
    fails("argument", "one dimension or all", "reduce", 6, f(2, 2, 2), 3, 0, o)
    fails("dtype", "mean: x must be a floating", "reduce", 1, i64(2), 0, 0, o)
    fails("shape", "like %[3%] does not broadcast to x %[2%]", "sum_to", f(2), f(3), o)
    fails("argument", "dimension 4 of a tensor with 2", "softmax", f(2, 2), 3, 0, o)
    fails("argument", "softmax: dimension", "softmax", f(), 0, 0, o)
    fails("shape", "y is %[2%] but g is %[3%]", "softmax_bwd", f(2), f(3), 0, 0, o)
    fails("shape", "3 != 4", "matmul", f(2, 3), f(4, 2), nil, o)
    fails("shape", "at least 2 dimensions", "matmul", f(3), f(3, 2), nil, o)
    fails("shape", "bias must be %[2%].*got %[3%]", "matmul", f(2, 3), f(3, 2), f(3), o)
    fails("dtype", "a must be a floating", "matmul", i64(2, 2), i64(2, 2), nil, o)
    fails("shape", "do not broadcast", "matmul", f(2, 2, 3), f(3, 3, 2), nil, o)
    for _, c in ipairs{ { "shape", "to be added to, got %[2, 3%]", f(2, 3) },
      { "shape", "to be added to", d.transpose(f(2, 2), 0, 1) },
      { "dtype", "out", tensor("f64", { 2, 2 }, { 1, 2, 3, 4 }) } } do
      fails(c[1], c[2], "matmul", f(2, 3), f(3, 2), c[3], c[3])
    end
    local o2, o3 = d.out(), d.out()
    fails("argument", "eps must be positive and finite, got 0", "layernorm", f(2, 3), nil, nil, 0, o, o2, o3)
    fails("argument", "got %-?nan", "layernorm", f(2, 3), nil, nil, NAN, o, o2, o3)
    fails("shape", "gamma must be %[3%]", "layernorm", f(2, 3), f(2), nil, 1e-5, o, o2, o3)
    fails("shape", "last dimension of at least one", "layernorm", f(2, 0), nil, nil, 1e-5, o, o2, o3)
    fails("argument", "there is no gamma", "layernorm_bwd", f(2, 3), nil, f(2), f(2), f(2, 3), o, o2, nil)
    fails("shape", "mean must be f32 %[2%]", "layernorm_bwd", f(2, 3), nil, f(3), f(2), f(2, 3), o, nil, nil)
    fails("dtype", "target is f16", "cross_entropy", f(2, 3), half(2, 3), nil, 0, 0, o, o2)
    fails("shape", "target is %[2%]", "cross_entropy", f(2, 3), f(2), nil, 0, 0, o, o2)
    fails("shape", "weight must be %[3%]", "cross_entropy", f(2, 3), i64(2), f(2), 0, 0, o, o2)
    fails("argument", "smoothing must be in %[0, 1%], got 2", "cross_entropy", f(2, 3), i64(2), nil, 0, 2, o,
      o2)
    fails("shape", "target must be %[2%]", "cross_entropy", f(2, 3), i64(3), nil, 0, 0, o, o2)
    fails("shape", "at least one class", "cross_entropy", f(2, 0), i64(2), nil, 0, 0, o, o2)
    fails("shape", "losses must be %[rows%] in f32 or f64, got %[2%] of f16", "loss_mean", half(2), i64(2),
      nil, 0, o, o2)
    fails("shape", "target must be %[2%]", "loss_mean", f(2), i64(3), nil, 0, o, o2)
    fails("shape", "weight must be %[classes%]", "loss_mean", f(2), i64(2), f(2, 2), 0, o, o2)
    fails("index", "target number 2 is 5", "loss_mean", f(2), tensor("i64", { 2 }, { 0, 5 }), f(3), -100, o,
      o2)
    fails("argument", "chunk must be at least 1", "linear_cross_entropy", f(2, 3), f(4, 3), nil, i64(2), nil,
      0, 0, -1, o, o2)
    fails("argument", "no place for dbias", "linear_cross_entropy_bwd", f(2, 3), f(4, 3), f(4), i64(2), nil,
      0, 0, 0,
      f(2), f(2), o, o2, nil)
    fails("argument", "there is no bias", "linear_cross_entropy_bwd", f(2, 3), f(4, 3), nil, i64(2), nil, 0,
      0, 0,
      f(2), f(2), o, o2, o3)
    fails("dtype", "lse must be f32", "cross_entropy_bwd", half(2, 3), i64(2), nil, 0, 0, half(2), f(2), o)
    fails("dtype", "index must be i64 or i32", "index_select", f(2), 0, f(2), o)
    fails("shape", "at most 6", "index_select", f(1, 1, 1, 1), 0, i64(1, 1, 1, 1), o)
    fails("shape", "does not have the axes of index", "index_select_bwd", f(2, 3), 0, i64(3), 4, o)
    fails("argument", "must not be negative, got %-1", "index_select_bwd", f(2, 3), 0, i64(2), -1, o)
    fails("shape", "same sizes except in dimension 1", "gather", f(2, 3), 0, i64(2, 2), o)
    fails("shape", "rope: x must be %[batch", "rope", f(2, 3), nil, 0, 1e4, 0, 0, 1, 0, o)
    fails("shape", "even, got 3", "rope", f(1, 1, 1, 3), nil, 0, 1e4, 0, 0, 1, 0, o)
    fails("argument", "base must be finite and above 1, got 1", "rope", f(1, 1, 1, 4), nil, 0, 1, 0, 0, 1, 0,
      o)
    fails("argument", "sign must be", "rope", f(1, 1, 1, 4), nil, 0, 1e4, 0, 512, 0, 0, o)
    fails("argument", "a < b, got a = 1, b = 1", "random", f(2), 0, 1, 1, 1, 1)
    fails("argument", "deviation >= 0", "random", f(2), 1, 0, -1, 1, 1)
    fails("argument", "in %[0, 1%], got 1.5", "random", f(2), 2, 1.5, 0, 1, 1)
    fails("argument", "whole bounds", "random", f(2), 3, 0.5, 3, 1, 1)
    fails("argument", "unknown kind 9", "random", f(2), 9, 0, 1, 1, 1)
    fails("argument", "outside the range of f16", "random", half(2), 0, 0, 1e6, 1, 1)
    fails("argument", "in %[0, 1%), got 1", "dropout", f(2), 1, 1, 1, o)
    fails("argument", "got %-?nan", "dropout", f(2), NAN, 1, 1, o)
  end)

  it("AdamW and the norm check everything before they write", function()
    local function item(p, g, m, v, lr) return ffi.new("lac_optim_item[1]", { { p, g, m, v, lr or 0.1,
      0 } }) end
    local function run(a, n, b1, b2, eps, step) return a, n or 1, b1 or 0.9, b2 or 0.99, eps or 1e-8, 0,
      step or 1, 1, 0 end
    local p, g, m, v = f(3), f(3), f(3), f(3)
    local keep = { p, g, m, v, f(2), half(3), half(3), d.expand(f(1), { 3 }), i64(3) }
    fails("argument", "list of items is missing", "adamw_many", run(nil))
    fails("argument", "a list of %-1 items", "adamw_many", run(item(p, g, m, v), -1))
    fails("argument", "grad of item 1 is missing", "adamw_many", run(item(p, nil, m, v)))
    fails("shape", "the parameter is %[3%] but m of item 1 is %[2%]", "adamw_many", run(item(p, g, keep[5],
      v)))
    fails("dtype", "grad of item 1 must be f32", "adamw_many", run(item(p, keep[6], m, v)))
    fails("dtype", "m of item 1 must be f32 for a f16", "adamw_many", run(item(keep[6], keep[7], keep[6], v)))
    fails("argument", "must be contiguous", "adamw_many", run(item(p, keep[8], m, v)))
    fails("argument", "param and m of item 1 overlap", "adamw_many", run(item(p, g, p, v)))
    fails("dtype", "floating", "adamw_many", run(item(keep[9], g, m, v)))
    fails("argument", "lr must be finite", "adamw_many", run(item(p, g, m, v, INF)))
    fails("argument", "beta1 and beta2", "adamw_many", run(item(p, g, m, v), 1, 1))
    fails("argument", "eps must be", "adamw_many", run(item(p, g, m, v), 1, nil, nil, NAN))
    fails("argument", "steps count from 1, got 0", "adamw_many", run(item(p, g, m, v), 1, nil, nil, nil, 0))
    fails("argument", "adam: eps must be", "adamw_many", item(p, g, m, v), 1, 0.9, 0.9, NAN, 1, 1, 1, 0)
    fails("argument", "grad_scale must be finite", "adamw_many", item(p, g, m, v), 1, 0.9, 0.9, 1, 0, 1,
      INF, 0)
    fails("argument", "grad_limit must be", "lion_many", item(p, g, m, nil), 1, 0.9, 0.9, 1, -1)
    fails("argument", "lion: beta1 and beta2 must be in %[0, 1%)", "lion_many", item(p, g, m, nil), 1, 1, 0,
      1, 0)
    fails("argument", "lion: m of item 1 is missing", "lion_many", item(p, g, nil, nil), 1, 0, 0, 1, 0)
    local function sgd(a, momentum, dampening, nesterov, step)
      return "sgd_many", a, 1, momentum, dampening or 0, nesterov or 0, 1, step or 1, 1, 0
    end
    fails("argument", "momentum must be in %[0, 1%), got 1", sgd(item(p, g, m, nil), 1))
    fails("argument", "dampening must be in %[0, 1%], got 2", sgd(item(p, g, m, nil), 0.5, 2))
    fails("argument", "nesterov needs momentum", sgd(item(p, g, m, nil), 0, 0, 1))
    fails("argument", "steps count from 1, got 0", sgd(item(p, g, m, nil), 0, 0, 0, 0))
    fails("argument", "m of item 1 is missing", sgd(item(p, g, nil, nil), 0.5))
    local function master(q, h, t) return ffi.new("lac_optim_item[1]", { { q, h, m, v, 0.1, 0, t } }) end
    fails("dtype", "master copy, which is for f16 and bf16, but the parameter is f32",
      sgd(master(p, g, f(3)), 0))
    fails("dtype", "master of item 1 must be f32", sgd(master(keep[6], keep[7], half(3)), 0))
    fails("shape", "master of item 1 is %[2%]", sgd(master(keep[6], keep[7], keep[5]), 0))
    local norm = ffi.new("double[1]")
    fails("argument", "nowhere to put", "norm_many", nil, 0, nil)
    fails("argument", "tensor 1 is missing", "norm_many", ffi.new("const lac_tensor *[1]"), 1, norm)
    fails("argument", "list of tensors is missing", "norm_many", nil, 1, norm)
  end)

  it("released, dead and impossible tensors are refused", function()
    local o, exp = d.out(), C.lac_map_id(1, "exp")
    local t = f(3)
    call("tensor_release", t)
    fails("released", "after release", "map1", exp, t, o)
    fails("released", "no storage", "map1", exp, ffi.new("lac_tensor"), o)
    local wild = d.view(f(3))
    wild.shape[0] = 4
    fails("shape", "outside its storage", "map1", exp, wild, o)
    wild.shape[0] = -1
    fails("shape", "negative size", "map1", exp, wild, o)
    wild.shape[0], wild.dtype = 3, 77
    fails("dtype", "unknown dtype 77", "map1", exp, wild, o)
    local huge = d.view(f(3))
    huge.ndim = 2
    huge.shape[0], huge.shape[1], huge.stride[0], huge.stride[1] = 2 ^ 40, 2 ^ 40, 0, 0
    fails("shape", "more elements than 64 bits", "map1", exp, huge, o)
    fails("shape", "more elements than 64 bits", "reduce", 0, huge, 0, 0, o)
    huge.shape[0] = 2 ^ 10
    fails("memory", "", "map1", exp, huge, o)
    local single = d.view(f(3)) -- nobody follows the stride of an axis of one
    single.ndim = 2
    single.shape[0], single.shape[1], single.stride[0], single.stride[1] = 1, 3, -2 ^ 63, 1
    assert.are.same({ 1, 3 }, shape_of(op("map1", exp, single)))
    assert.are.same({ 1 }, shape_of(op("reduce", 0, single, 2, 0)))
  end)

  -- a short operator runs to its end and drops its result: if it succeeded, a host that stops then would
  -- leave a tensor that nobody owns
  it("an interrupt stops long work, and fails short work without losing its result", function()
    local x, threads = d.empty("f32", { 1500, 1500 }), C.lac_threads(0)
    local stats = ffi.new("lac_memory_stats")
    call("fill", x, 1)
    C.lac_threads(2) -- with many threads each has one piece, and a piece that has begun is finished
    C.lac_interrupt(1)
    local ok, message = pcall(op, "map1", C.lac_map_id(1, "exp"), x)
    local three = f(3)
    C.lac_memory(0, stats)
    local live = stats.live
    local small, why = pcall(op, "map1", C.lac_map_id(1, "exp"), three)
    C.lac_memory(0, stats)
    local after = stats.live
    C.lac_interrupt(0)
    C.lac_threads(threads)
    assert.is_false(ok)
    assert.is_truthy(message:find("interrupted: "))
    assert.is_false(small)
    assert.is_truthy(why:find("interrupted: "))
    assert.are.equal(live, after)
    assert.are.equal(1500, op("map1", C.lac_map_id(1, "exp"), x).shape[0])
  end)

  it("garbage never crashes, leaks or writes outside", function()
    local pick = function(list) return list[1 + math.floor(random() * #list)] end
    local integers = { -2147483648, -3, -1, 0, 0, 1, 1, 2, 3, 5, 7, 100, 2147483647 }
    local numbers = { 0, 1, -1, 0.5, 2, 1e-5, 1e300, -1e300, INF, -INF, NAN, 3, 10000 }
    local function wild()
      local r = random()
      if r < 0.03 then return nil end
      if r < 0.06 then return ffi.new("lac_tensor") end
      local shape = {}
      for i = 1, math.floor(random() * 5) do shape[i] = pick { 0, 1, 1, 2, 2, 3, 4 } end
      local t = d.empty(pick { "f32", "f32", "f32", "f64", "bf16", "f16", "i64", "i32", "u8", "bool" }, shape)
      call("fill", t, math.floor(random() * 2))
      if r < 0.3 and t.ndim > 0 then
        local axis = math.floor(random() * t.ndim)
        local v = d.view(t)
        local which = random()
        if which < 0.3 then v.stride[axis] = pick { 0, -1, 2, 2 ^ 62, -2 ^ 63 }
        elseif which < 0.5 then v.shape[axis] = pick { 0, 1, -5, 9, 2 ^ 40, 2 ^ 62 }
        elseif which < 0.6 then v.offset = pick { -1, 1, 2 ^ 62 }
        elseif which < 0.7 then v.dtype = pick { -1, 8, 2, 0 }
        elseif which < 0.8 then v.ndim = pick { -1, 7, 0, 6 }
        elseif which < 0.9 then v.device = pick { 256, -1, 3 }
        else return d.transpose(t, 0, t.ndim - 1) end
        return v
      end
      return t
    end
    local T, O, I, N = wild, d.out, function() return pick(integers) end, function() return pick(numbers) end
    local small = function() return math.floor(random() * 8) end
    local function L() -- sizes for each axis
      local list = ffi.new("int64_t[6]")
      for i = 0, 5 do list[i] = pick { 0, 0, 1, 1, 2, 3, -1, 2 ^ 40, -2 ^ 62 } end
      return list
    end
    local calls = {
      { "map1", function() return math.floor(random() * 30) end, T, O }, { "map1_bwd", I, T, T, T, O },
        { "map2", small, T, T, O },
      { "map2_scalar", small, T, N, I, O }, { "map2_bwd", small, small, T, T, T, O }, { "map2_scalar_bwd",
      small, T, N, I, T, O },
      { "where", T, T, T, O }, { "axpy", N, T, T }, { "scale", N, T }, { "fill", T, N }, { "copy", T, T },
      { "arange", T, N, N },
      { "reduce", small, T, small, I, O }, { "sum_to", T, T, O }, { "softmax", T, I, I, O }, { "softmax_bwd",
      T, T, I, I, O },
      { "matmul", T, T, T, O }, { "layernorm", T, T, T, N, O, O, O }, { "layernorm_bwd", T, T, T, T, T, O, O,
      O },
      { "loss_mean", T, T, T, I, O, O },
      { "cross_entropy", T, T, T, I, N, O, O }, { "cross_entropy_bwd", T, T, T, I, N, T, T, O },
      { "linear_cross_entropy", T, T, T, T, T, I, N, I, O, O },
      { "linear_cross_entropy_bwd", T, T, T, T, T, I, N, I, T, T, O, O, O },
      { "linear_cross_entropy_both", T, T, T, T, T, I, N, I, T, O, O, O, O },
      { "residual_norm", T, T, T, T, N, N, I, I, O, O, O, O },
      { "residual_norm_bwd", T, T, T, T, T, T, N, I, I, O, O, O, O },
      { "gelu_norm", T, T, T, N, O, O, O, O }, { "gelu_norm_bwd", T, T, T, T, T, T, T,
        N, O, O, O, O, O },
      { "linear_act", I, T, T, T, O, O }, { "linear_act_bwd", I, T, T, T, O, O, O },
      { "weight_grad", T, T, O, O },
      { "sort", T, small, small, O, O }, { "topk", T, small, small, small, O, O },
      { "searchsorted", T, T, small, O }, { "runs", T, T, O, O }, { "nonzero", T, O },
      { "scatter", T, small, T, T, small, small }, { "index_put", T, small, T, T, small, N },
      { "pad", T, L, L, small, N, O }, { "pad_bwd", T, L, L, small, O },
      { "conv1d", T, T, T, small, small, small, small, O }, { "conv1d_bwd", T, T, T, small, small, small, O,
        O },
      { "multinomial", T, small, small, small, small, O },
      { "index_select", T, small, T, O }, { "index_select_bwd", T, small, T, small, O }, { "gather", T,
      small, T, O },
      { "gather_bwd", T, small, T, small, O }, { "rope", T, T, I, N, I, N, I, I, O }, { "random", T, small, N,
      N, small, small },
      { "dropout", T, N, small, small, O }, { "empty", T }, { "tensor_check", T },
    }
    collectgarbage()
    local broken = C.lac_memory_guard_errors() -- another spec breaks a block on purpose
    C.lac_memory_guard(1)
    local accepted, refused = 0, 0
    for round = 1, 100 do
      for _, c in ipairs(calls) do
        local args, n = {}, #c - 1
        for i = 1, n do args[i] = c[i + 1]() end
        -- empty() replaces the storage of a live tensor and would leak it; a fresh struct has none
        if c[1] == "empty" and args[1] ~= nil then
          local fresh = d.out()
          fresh.dtype, fresh.device, fresh.ndim = args[1].dtype, args[1].device, args[1].ndim
          for i = 0, 5 do fresh.shape[i] = args[1].shape[i] end
          args[1] = fresh
        end
        local status = C["lac_" .. c[1]](unpack(args, 1, n))
        if status == 0 then accepted = accepted + 1 else refused = refused + 1 end
        if status ~= 0 then assert.is_true(#d.last_error() > 10, c[1]) end
        assert.are_not.equal("internal", ffi.string(C.lac_status_name(status)), c[1] .. ": "
          .. d.last_error())
      end
      if round % 20 == 0 then collectgarbage() end
    end
    C.lac_memory_guard(0)
    collectgarbage()
    assert.are.equal(broken, C.lac_memory_guard_errors())
    assert.is_true(accepted > 300 and refused > 300, accepted .. " accepted, " .. refused .. " refused")
  end)
end)
