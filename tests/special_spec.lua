--- Remainders, angles and special functions: exact where that is promised, else in units of the last place.
--
-- Remainders and floor_divide are compared with the C library's fmod in doubles, bit by bit, for operands
-- from all exponents and for those whose quotient is of any length: with the same signs, zeros and
-- infinities. The rest is compared with f64's or with numbers of 40 digits. On every instruction set that
-- this processor has; on a GPU once.

local lac = require "lacuna"
local lib = require "lacuna.lib"
local values = require "support.special_values"
local ffi = require "ffi"

local C = lib.C
pcall(ffi.cdef, "double fmod(double, double); double floor(double); double copysign(double, double);")
local INF, NAN = math.huge, 0 / 0
local on_cpu = lac.default_device() == "cpu"

local state = 1
local function random() -- Park and Miller's minimal standard generator, in [0, 1)
  state = state * 16807 % 2147483647
  return state / 2147483647
end

local function isas()
  if not on_cpu then return { "the device" } end
  local now, list = ffi.string(C.lac_isa(nil)), {}
  for _, name in ipairs { "baseline", "avx2", "avx512" } do
    if C.lac_isa(name) ~= nil then list[#list + 1] = name end
  end
  C.lac_isa(now)
  return list
end

local function tensor(list, dtype) return lac.tensor(list, { dtype = dtype }) end

-- the distance of neighbouring values of the dtype at x
local DIGITS = { f64 = { 53, -1074 }, f32 = { 24, -149 }, bf16 = { 8, -133 }, f16 = { 11, -24 } }
local function ulp(x, dtype)
  local _, e = math.frexp(math.abs(x))
  return 2 ^ math.max(e - DIGITS[dtype][1], DIGITS[dtype][2])
end

-- units of the last place: `ours` of f32 here and 3 of f64, CUDA's of both; bf16 is rounded from f32
local function promise(dtype, ours)
  return dtype == "bf16" and 0.51 or dtype == "f32" and on_cpu and ours or on_cpu and 3 or 4
end

local function same(a, b) return a ~= a and b ~= b or a == b and 1 / a == 1 / b end

-- values of the dtype from all of its exponents, and pairs of them with quotients of up to `bits` bits
local function operands(dtype, n)
  local xs, ys = {}, {}
  local low, high = -1060, 1020
  if dtype ~= "f64" then low, high = -140, 126 end
  local function one(least, most)
    local v = (1 + random()) * 2 ^ math.floor(least + (most - least) * random())
    return random() < 0.5 and -v or v
  end
  local small = { 1, 2, 3, 7, 10, 0.1, 0.3, 0.75, -1, -3, -0.1 }
  for i = 1, n do
    local y = one(low, high)
    local _, e = math.frexp(y)
    local x = i % 3 == 0 and one(low, high) or one(math.max(low, e - 3), math.min(high, e + 5))
    if i % 5 == 0 then x = y * math.floor(random() * 2 ^ 20) end -- whole quotients, and those beside them
    if i % 7 == 0 then x, y = math.floor(random() * 1000), small[i % #small + 1] end
    xs[i], ys[i] = x, y
  end
  local list = { 0, -0.0, 1, -1, 2.5, -2.5, 3, INF, -INF, NAN, 2 ^ low, 2 ^ high, -2 ^ low }
  for _, a in ipairs(list) do
    for _, b in ipairs(list) do xs[#xs + 1], ys[#ys + 1] = a, b end
  end
  local x, y = tensor(xs, "f64"):to { dtype = dtype }, tensor(ys, "f64"):to { dtype = dtype }
  return x, y, x:to { dtype = "f64" }:totable(), y:to { dtype = "f64" }:totable()
end

-- rounded to the dtype
local function round_all(list, dtype)
  return tensor(list, "f64"):to { dtype = dtype }:to { dtype = "f64" }:totable()
end

local EXACT = {
  fmod = function(x, y) return ffi.C.fmod(x, y) end,
  mod = function(x, y)
    local r = ffi.C.fmod(x, y)
    return r ~= 0 and (r < 0) ~= (y < 0) and r + y or r
  end,
}

-- floor(x / y) as PyTorch has it: of the C library's remainder, whose quotient is a whole number
local function floor_divide(x, y)
  if y == 0 then return x / y end
  local r = ffi.C.fmod(x, y)
  local q = (x - r) / y
  local whole = math.floor(q + 0.5)
  if math.abs(q) >= 2 ^ 50 then whole = q end
  return r ~= 0 and (r < 0) ~= (y < 0) and whole - 1 or whole
end

for _, isa in ipairs(isas()) do
  describe("on " .. isa .. ", special:", function()
    local original = on_cpu and ffi.string(C.lac_isa(nil))
    setup(function() if on_cpu then assert(C.lac_isa(isa) ~= nil) end end)
    teardown(function() if on_cpu then C.lac_isa(original) end end)

    for _, dtype in ipairs { "f64", "f32", "bf16" } do
      it("remainders are exact in " .. dtype, function()
        local x, y, xs, ys = operands(dtype, 4000)
        for name, f in pairs(EXACT) do
          local got, wanted = lac[name](x, y):to { dtype = "f64" }:totable(), {}
          for i = 1, #xs do wanted[i] = f(xs[i], ys[i]) end
          wanted = round_all(wanted, dtype)
          for i = 1, #xs do
            if not same(got[i], wanted[i]) then
              error(("%s(%.17g, %.17g) = %.17g, not %.17g"):format(name, xs[i], ys[i], got[i], wanted[i]))
            end
          end
        end
      end)

      it("floor_divide is the quotient rounded down in " .. dtype, function()
        local x, y, xs, ys = operands(dtype, 4000)
        local got, wanted = lac.floor_divide(x, y):to { dtype = "f64" }:totable(), {}
        for i = 1, #xs do wanted[i] = floor_divide(xs[i], ys[i]) end
        wanted = round_all(wanted, dtype)
        for i = 1, #xs do
          local g, w = got[i], wanted[i]
          -- where neighbours are more than 1 apart, one of them
          local slack = math.abs(w) >= 2 ^ (DIGITS[dtype][1] - 4) and math.abs(w) < INF and ulp(w, dtype) or 0
          if not (g == w or g ~= g and w ~= w or math.abs(g - w) <= slack) then
            error(("floor_divide(%.17g, %.17g) = %.17g, not %.17g"):format(xs[i], ys[i], g, w))
          end
        end
      end)
    end

    it("atan2 has the angles of all quadrants, and their limits", function()
      local list = { 0, -0.0, 1, -1, 1e-30, -1e-30, 3e38, -3e38, 1e-40, INF, -INF, NAN }
      local xs, ys = {}, {}
      for _, a in ipairs(list) do
        for _, b in ipairs(list) do xs[#xs + 1], ys[#ys + 1] = a, b end
      end
      for i = 1, 4000 do
        local scale = i % 4 == 0 and 2 ^ (random() * 60 - 30) or 1
        xs[#xs + 1], ys[#ys + 1] = (2 * random() - 1) * scale, 2 * random() - 1
      end
      for _, dtype in ipairs { "f64", "f32", "bf16" } do
        local y, x = tensor(xs, "f64"):to { dtype = dtype }, tensor(ys, "f64"):to { dtype = dtype }
        local got = lac.atan2(y, x):to { dtype = "f64" }:totable()
        local a, b = y:to { dtype = "f64" }:totable(), x:to { dtype = "f64" }:totable()
        for i = 1, #a do
          local wanted = math.atan2(a[i], b[i])
          local bound = promise(dtype, 0.51) * ulp(wanted, dtype)
          if not (same(got[i], wanted) or wanted ~= 0 and math.abs(got[i] - wanted) <= bound) then
            error(("%s: atan2(%.17g, %.17g) = %.17g, not %.17g"):format(dtype, a[i], b[i], got[i], wanted))
          end
        end
      end
    end)

    it("tan is right at poles, zeros and far away", function()
      local list = { 0, -0.0, 1e-30, -1e-40, 524288, 524289, -1e10, 3e38, INF, -INF, NAN }
      for k = -400, 400 do list[#list + 1] = k * math.pi / 2 end
      for k = 1, 400 do list[#list + 1] = (k * 823) * math.pi / 2 end
      for _ = 1, 2000 do list[#list + 1] = 20 * random() - 10 end
      for _, dtype in ipairs { "f64", "f32", "bf16" } do
        local x = tensor(list, "f64"):to { dtype = dtype }
        local got, at = lac.tan(x):to { dtype = "f64" }:totable(), x:to { dtype = "f64" }:totable()
        for i = 1, #at do
          local wanted = math.tan(at[i])
          local bound = promise(dtype, 0.51) * ulp(wanted, dtype)
          if not (same(got[i], wanted) or wanted ~= 0 and math.abs(got[i] - wanted) <= bound) then
            error(("%s: tan(%.17g) = %.17g, not %.17g"):format(dtype, at[i], got[i], wanted))
          end
        end
      end
    end)

    -- largest error of got from the values of a function, in units of the last place of what is largest: the
    -- result or, where it crosses 0, the terms that it is made of
    local function check(name, dtype, got, terms, bound)
      for i, pair in ipairs(values[name]) do
        local wanted = pair[2]
        local unit = ulp(math.max(math.abs(wanted), terms(pair[1])), dtype)
        local off = math.abs(got[i] - wanted) / unit
        local large = dtype == "f32" and wanted > 3.5e38 and got[i] == INF
        if not large and (off > bound or off ~= off) then
          error(("%s of %.17g in %s: %.17g, not %.17g, %.2f ulp"):format(name, pair[1], dtype, got[i],
            wanted, off))
        end
      end
    end
    local function arguments(name, dtype)
      local list = {}
      for i, pair in ipairs(values[name]) do list[i] = pair[1] end
      return tensor(list, dtype)
    end
    local function slope(name, x)
      local leaf = x:detach():requires_grad_(true)
      local g = lac.ones { x:size(1), dtype = x:dtype() }
      return lac.grad(lac[name](leaf), { leaf }, { grad_outputs = { g } })[1]
    end
    local function none() return 0 end
    local function below_0(x) return x < 0 and 8 or 0 end
    local function always() return 4 end

    it("erfinv, lgamma, digamma and their slopes are as precise as promised", function()
      for dtype, bound in pairs { f64 = 6, f32 = 0.6 } do
        check("erfinv", dtype, lac.erfinv(arguments("erfinv", dtype)):totable(), none, bound)
        check("lgamma", dtype, lac.lgamma(arguments("lgamma", dtype)):totable(), below_0,
              dtype == "f64" and 8 or bound)
        check("digamma", dtype, lac.digamma(arguments("digamma", dtype)):totable(), always, bound)
        check("digamma", dtype, slope("lgamma", arguments("digamma", dtype)):totable(), always, bound)
        check("trigamma", dtype, slope("digamma", arguments("trigamma", dtype)):totable(), none,
              dtype == "f64" and 8 or bound)
        local got = slope("erfinv", arguments("erfinv", dtype)):totable()
        for i, pair in ipairs(values.erfinv) do
          local wanted = math.sqrt(math.pi) / 2 * math.exp(pair[2] ^ 2)
          -- an error of y counts 2 y^2 times
          local allowed = dtype == "f64" and 8 + 12 * pair[2] ^ 2 or 0.6 + 0.25 * pair[2] ^ 2
          assert.is_true(math.abs(got[i] - wanted) <= allowed * ulp(wanted, dtype), pair[1])
        end
      end
    end)

    it("special functions know their limits, alone and among others", function()
      local limits = {
        erfinv = { { 0, 0 }, { -0.0, -0.0 }, { 1, INF }, { -1, -INF }, { 1.5, NAN }, { -INF, NAN },
                   { NAN, NAN } },
        lgamma = { { 0, INF }, { -0.0, INF }, { 1, 0 }, { 2, 0 }, { -1, INF }, { -7, INF }, { INF, INF },
                   { -INF, INF }, { NAN, NAN }, { -2 ^ 60, INF } },
        digamma = { { 0, -INF }, { -0.0, INF }, { -1, NAN }, { -8, NAN }, { INF, INF }, { -INF, NAN },
                    { NAN, NAN }, { 2 ^ -100, -2 ^ 100 }, { -2 ^ -100, 2 ^ 100 } },
      }
      for name, list in pairs(limits) do
        for _, dtype in ipairs { "f64", "f32", "bf16" } do
          for _, pair in ipairs(list) do
            local at = {}
            for i = 1, 40 do at[i] = i == 5 and pair[1] or 0.5 end
            local got = lac[name](tensor(at, dtype))
            assert.is_true(same(got[5]:item(), pair[2]), ("%s(%g) in %s is %g"):format(name, pair[1], dtype,
              got[5]:item()))
            -- its neighbours keep their bits
            assert.are.equal(got[4]:item(), lac[name](tensor({ 0.5 }, dtype)):item())
          end
        end
      end
      assert.are.same({ INF, INF, INF, 0 }, slope("digamma", tensor({ 0, -0.0, -3, INF }, "f64")):totable())
      local tiny = lac.lgamma(tensor({ 2 ^ -1070, -2 ^ -1070 }, "f64")):totable()
      for i = 1, 2 do assert.is_true(math.abs(tiny[i] - 1070 * math.log(2)) < 1e-12) end
    end)
  end)
end
