--- What the engine's specs share: they ask the operators through the C interface, without the Lua library.
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
local special = require "support.special"
local C, ffi = d.C, d.ffi
local op, call = d.op, d.call
local assert = require "luassert"

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

local function sigmoid(x) return 1 / (1 + math.exp(-x)) end
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
  round = { special.half_even, -5, 5 },
  exp = { math.exp, -30, 11 },
  expm1 = { special.expm1, -4, 4 },
  log = { math.log, 1e-3, 1e3 },
  log1p = { special.log1p, -0.9, 9 },
  sqrt = { math.sqrt, 0, 100 },
  rsqrt = { function(x) return 1 / math.sqrt(x) end, 0.01, 100 },
  recip = { function(x) return 1 / x end, 0.1, 9 },
  sin = { math.sin, -9, 9 },
  cos = { math.cos, -9, 9 },
  tanh = { math.tanh, -6, 6 },
  sigmoid = { sigmoid, -15, 15 },
  silu = { function(x) return x * sigmoid(x) end, -15, 15 },
  gelu = { function(x) return x * special.phi(x) end, -5, 5 },
  gelu_tanh = { function(x)
    local u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x * sigmoid(2 * u)
  end, -4, 4 },
  softplus = { function(x) return math.max(x, 0) + special.log1p(math.exp(-math.abs(x))) end, -15, 15 },
  erf = { special.erf, -5, 5 },
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

--- Goes on with an instruction set of this processor; `restore` goes back to what was chosen at the start.
local function use(isa) assert(C.lac_isa(isa) ~= nil) end
local function restore() C.lac_isa(original_isa) C.lac_threads(original_threads) end

return {
  FLOATS = FLOATS, ALL = ALL, INF = INF, NAN = NAN, PRECISION = PRECISION, random = random,
  randoms = randoms, round_all = round_all, count = count, ulp = ulp, check_all = check_all,
  equal_all = equal_all, differences = differences, check_gradient = check_gradient, MAP1 = MAP1,
  MAP2 = MAP2, CMP2 = CMP2, map1 = map1, map2 = map2, ULPS = ULPS, EXTRA = EXTRA, fails = fails, use = use,
  restore = restore,
}
