-- Elementwise operators where the general specs do not look: accuracy over all floats, and large outputs.
--
-- Accuracy: every vector function in f32 against the same function in f64 (libm's) on a hundred thousand bit
-- patterns spread evenly over all floats, so every exponent, subnormals, infinities and NaN are among them.
-- The bound is in units of the last place of the exact result and is what simd.h promises; the one exception
-- is results below 2^-126 (silu: 2^-119, where its sigmoid is below that), which may be flushed to zero.
-- Chosen instruction sets: all that this machine has. Activations of f16 and bf16: every value, the same way.
--
-- Large outputs are written past the caches, by other code than small ones: they must have the same bits as
-- the same operator on small slices, in every dtype, aligned or not.

local lac = require "lacuna"
local lib = require "lacuna.lib"
local ffi = require "ffi"

local C = lib.C
local PATTERNS = 107346 -- 2^32 / 40009, rounded down

local function pointer(t, kind)
  local p = ffi.new("void *[1]")
  lib.check(C.lac_tensor_data(t.c, p))
  return ffi.cast(kind, p[0])
end

-- A NaN whose bits LuaJIT uses for its own values must not be loaded as a number: bits are looked at first.
local function load_f32(p, i)
  return bit.band(ffi.cast("uint32_t *", p)[i], 0x7fffffff) > 0x7f800000 and 0 / 0 or p[i]
end
local function load_f64(p, i)
  return bit.band(ffi.cast("uint32_t *", p)[2 * i + 1], 0x7fffffff) >= 0x7ff80000 and 0 / 0 or p[i]
end

-- largest error in units of the last place, where, and the number of values that are NaN or infinite on one
-- side only
local rounded = ffi.new("float[1]")
local function worst_ulp(got, exact, n, flush)
  local worst, at, wrong = 0, -1, 0
  for i = 0, n - 1 do
    local y, r = load_f32(got, i), load_f64(exact, i)
    rounded[0] = r
    local single = rounded[0]
    if r ~= r or single == math.huge or single == -math.huge then
      if not (y == single or (y ~= y and r ~= r)) then wrong, at = wrong + 1, i end
    elseif y ~= y then
      wrong, at = wrong + 1, i
    elseif not (math.abs(r) < flush and math.abs(y) < flush) then
      local _, e = math.frexp(math.abs(r))
      local error = math.abs(y - r) / 2 ^ math.max(e - 24, -149)
      if error > worst then worst, at = error, i end
    end
  end
  return worst, at, wrong
end

-- promised units of the last place
local PROMISE = { exp = 1.1, expm1 = 1.7, log = 1, log1p = 1.5, tanh = 2.3, sigmoid = 2.5, softplus = 2.3,
                  erf = 2.3, gelu = 6, silu = 3.5, sin = 1, cos = 1, exp2 = 1.3, log2 = 1.5, tan = 1,
                  erfinv = 0.7, lgamma = 1, digamma = 1 }

-- the same of f16 and bf16, of which 0.5 are the rounding; gradient: a slope times another number, which may
-- be just above a power of two, where a relative error is the most units: twice the slope's beyond 0.5
local PROMISE_HALF = { relu = 0, exp = 0.51, sigmoid = 0.51, silu = 0.51, tanh = 0.51, gelu = 0.54,
                       gelu_slope = 0.54, gelu_gradient = 0.58, silu_slope = 0.51, silu_gradient = 0.58 }

local function gradient_of(f)
  return function(x, g)
    local leaf = x:detach():requires_grad_(true)
    return lac.grad(lac[f](leaf), { leaf }, { grad_outputs = { g } })[1]
  end
end

local SPECIAL = {}
for _, f in ipairs { "gelu", "silu" } do
  local gradient = gradient_of(f)
  SPECIAL[f .. "_gradient"] = gradient
  SPECIAL[f .. "_slope"] = function(x) return gradient(x, lac.ones { x:size(1), dtype = x:dtype() }) end
end

-- Other bits? Of silu's gradient, which goes by floats without AVX-512, NaN are the same whatever their sign:
-- that of the operand which a compiler puts first.
local function differs(a, b, f, dtype)
  if a == b then return false end
  local infinity = dtype == "f16" and 0x7c00 or 0x7f80
  return not (f:match("^silu_") and bit.band(a, 0x7fff) > infinity and bit.band(b, 0x7fff) > infinity)
end

-- Largest error in units of the last place of half types, as worst_ulp. Near the root of a slope, if it has
-- one, results below 2^-6 count as it.
local ROOT = { gelu_slope = -0.75, gelu_gradient = -0.75, silu_slope = -1.28, silu_gradient = -1.28 }
local function worst_half(got, exact, x, n, dtype, root, flush)
  local digits, last = 8, -133
  if dtype == "f16" then digits, last = 11, -24 end
  local most = dtype == "f16" and 65520 or 2 ^ 128 - 2 ^ 119 -- rounds to infinity
  local worst, at, wrong = 0, -1, 0
  for i = 0, n - 1 do
    local y, r = load_f64(got, i), load_f64(exact, i)
    if r ~= r or math.abs(r) >= most then
      local rounded_r = r > 0 and math.huge or -math.huge
      if not (y == rounded_r or (y ~= y and r ~= r)) then wrong, at = wrong + 1, i end
    elseif y ~= y then
      wrong, at = wrong + 1, i
    elseif not (math.abs(r) < flush and math.abs(y) < flush) then
      local argument = load_f64(x, i)
      local near_root = root and math.abs(argument - root) < 0.05
      local _, e = math.frexp(math.max(math.abs(r), near_root and 2 ^ -6 or 0))
      local error = math.abs(y - r) / 2 ^ math.max(e - digits, last)
      if error > worst then worst, at = error, i end
    end
  end
  return worst, at, wrong
end

local function isas()
  local list, now = {}, ffi.string(C.lac_isa(nil))
  for _, name in ipairs { "baseline", "avx2", "avx512f", "avx512" } do
    if C.lac_isa(name) ~= nil then list[#list + 1] = name end
  end
  C.lac_isa(now)
  return list
end

describe("elementwise", function()
  local isa = ffi.string(C.lac_isa(nil))
  teardown(function() C.lac_isa(isa) end)

  for _, name in ipairs(isas()) do
    it("functions in f32 keep their promised accuracy over all floats #cpu on " .. name, function()
      assert(C.lac_isa(name) ~= nil)
      local x = lac.empty { PATTERNS, dtype = "f32" }
      local bits = pointer(x, "uint32_t *")
      for i = 0, PATTERNS - 1 do bits[i] = i * 40009 end
      for i, special in ipairs { 0, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 1, 0x80000001,
                                 0x7fffff } do
        bits[i] = special
      end
      local wide = x:to { dtype = "f64" }
      for f, promise in pairs(PROMISE) do
        local y, r = lac[f](x), lac[f](wide)
        local worst, at, wrong = worst_ulp(pointer(y, "float *"), pointer(r, "double *"), PATTERNS,
                                            f == "silu" and 2 ^ -119 or 2 ^ -126)
        local argument = load_f32(pointer(x, "float *"), math.max(at, 0))
        assert.is_true(wrong == 0, ("%s: %d values are NaN or infinite on one side, one at %g")
          :format(f, wrong, argument))
        assert.is_true(worst <= promise, ("%s: %.3f ulp at %.9g"):format(f, worst, argument))
      end
      C.lac_isa(isa)
    end)
  end

  -- powers of 2 below the normal floats may be flushed to zero, but not come out as another number
  for _, name in ipairs(isas()) do
    it("functions in f32 leave the normal floats rightly #cpu on " .. name, function()
      assert(C.lac_isa(name) ~= nil)
      local N = 8192
      local function from(first) return first - lac.arange(N):to { dtype = "f32" } * 2 ^ -13 end
      local function softmax(t) -- terms below a largest of 1
        local row = lac.cat({ lac.zeros { 1, dtype = t:dtype() }, t }, 1)
        return lac.softmax(row, -1)[{ { 2, N + 1 } }]:contiguous()
      end
      -- what is flushed: powers below 2^-126, times a factor, as is half of 2^-149 where they are not
      for f, case in pairs { softplus = { lac.softplus, -87, 2 ^ -126 }, softmax = { softmax, -87, 2 ^ -126 },
                             softmax_least = { softmax, -103.25, 2 ^ -126 },
                             gelu = { lac.gelu, -12.75, 2 ^ -126 },
                             gelu_slope = { SPECIAL.gelu_slope, -12.75, 2 ^ -123 } } do
        local of, x = case[1], from(case[2])
        local y, r = of(x), of(x:to { dtype = "f64" })
        local got, exact = pointer(y, "float *"), pointer(r, "double *")
        for i = 0, N - 1 do
          local flushed = got[i] == 0 and math.abs(exact[i]) < case[3]
          local right = math.abs(got[i] - exact[i]) <= math.abs(exact[i]) * 2 ^ -20 + 2 ^ -147
          assert.is_true(flushed or right, ("%s of %.9g: %g, not %g"):format(f, pointer(x, "float *")[i],
            got[i], exact[i]))
        end
      end
      C.lac_isa(isa)
    end)
  end

  -- lines that go abreast and those that are left over, within gelu's tables and beyond
  for _, name in ipairs(isas()) do
    it("functions computed by lines take no value from a neighbour #cpu on " .. name, function()
      assert(C.lac_isa(name) ~= nil)
      local N = 16 * 10 + 5
      local x = lac.cat({ lac.randn { 64 }, lac.randn { 50 } * 3, lac.randn { N - 114 } * 12 }, 1)
      for i, special in ipairs { 0, -0.0, 1 / 0, -1 / 0, 0 / 0, 3.875, -3.875, 7.875, 40, -88.73, 1e30,
                                 -1e30, 1e-40 } do -- the last is no normal float
        x[{ { 12 * i, 12 * i } }]:fill_(special)
      end
      local g = lac.randn { N }
      local function value(f) return function(t) return f(t) end end
      local function slope(f)
        return function(t, upstream)
          local leaf = t:detach():requires_grad_(true)
          return lac.grad(f(leaf), { leaf }, { grad_outputs = { upstream } })[1]
        end
      end
      local functions = { gelu_slope = slope(lac.gelu), silu_slope = slope(lac.silu),
                          gelu_tanh_slope = slope(lac.gelu_tanh) }
      for _, f in ipairs { "exp", "log", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "softplus" } do
        functions[f] = value(lac[f])
      end
      for _, f in ipairs { "swiglu", "geglu" } do functions[f] = lac[f] end
      for f, of in pairs(functions) do
        local all = of(x, g)
        local whole = pointer(all, "float *")
        for i = 1, N do
          local one = of(x[{ { i, i } }], g[{ { i, i } }])
          local alone, y = load_f32(pointer(one, "float *"), 0), load_f32(whole, i - 1)
          assert.is_true(alone == y or (alone ~= alone and y ~= y), ("%s: %g and %g"):format(f, alone, y))
        end
      end
      C.lac_isa(isa)
    end)

    it("slopes of activations in f32 are those in f64 #cpu on " .. name, function()
      assert(C.lac_isa(name) ~= nil)
      local special = lac.tensor { 0 / 0, 1 / 0, 1e30, -1e30, 1e-40 }
      local x = lac.cat({ lac.arange { -16, 16, 1 / 512 }, special }, 1)
      for f, units in pairs { gelu = 2, silu = 3, gelu_tanh = 3 } do
        local bound = units * 2 ^ -24
        local function slope(dtype)
          local leaf = x:to { dtype = dtype }:requires_grad_(true)
          local y = lac[f](leaf)
          return lac.grad(y, { leaf }, { grad_outputs = { lac.ones(x:size()):to { dtype = dtype } } })[1]
        end
        local single, double = slope "f32", slope "f64"
        local y, r = pointer(single, "float *"), pointer(double, "double *")
        for i = 0, x:size(1) - 1 do
          local a, b = load_f32(y, i), load_f64(r, i)
          assert.is_true((a ~= a and b ~= b) or math.abs(a - b) <= bound,
            ("%s: %.9g, not %.9g"):format(f, a, b))
        end
      end
      C.lac_isa(isa)
    end)
  end

  it("slopes of activations end at 0 and 1", function()
    for _, f in ipairs { "gelu", "gelu_tanh", "silu", "mish" } do
      for _, dtype in ipairs { "f64", "f32", "bf16" } do
        local x = lac.tensor({ 1e30, 1e10, 100, -100, -1e10, -1e30 }, { dtype = dtype, grad = true })
        lac[f](x):sum():backward()
        for i, y in ipairs(x.grad:totable()) do
          local most = dtype == "f64" and 1e-15 or 2 ^ -23 -- an ulp
          assert.is_true(math.abs(y - (i > 3 and 0 or 1)) <= most, ("%s, %s: %.17g"):format(f, dtype, y))
        end
      end
    end
  end)

  for _, name in ipairs(isas()) do
    it("activations are as accurate as promised over all halves, wherever they stand #cpu on " .. name,
       function()
      assert(C.lac_isa(name) ~= nil)
      local N = 65536
      for _, dtype in ipairs { "bf16", "f16" } do
        local x = lac.empty { N, dtype = dtype }
        local bits = pointer(x, "uint16_t *")
        for i = 0, N - 1 do bits[i] = i end
        local wide = x:to { dtype = "f64" }
        -- of both signs, and no power of two: 1 to 2 in size
        local sign = lac.rand { N }:ge(0.5):to { dtype = "f32" } * 2 - 1
        local g = ((lac.rand { N } + 1) * sign):to { dtype = dtype }
        local wide_g = g:to { dtype = "f64" }
        for f, promise in pairs(PROMISE_HALF) do
          local function of(t, upstream)
            if SPECIAL[f] then return SPECIAL[f](t, upstream) end
            return lac[f](t)
          end
          local y, exact = of(x, g), of(wide, wide_g)
          local flush = dtype == "f16" and 0 or f:match("gradient") and 2 ^ -118
            or (f == "silu" or f:match("slope")) and 2 ^ -119 or 2 ^ -126
          local values = y:to { dtype = "f64" }
          local arguments = pointer(wide, "double *")
          local worst, at, wrong = worst_half(pointer(values, "double *"), pointer(exact, "double *"),
                                              arguments, N, dtype, ROOT[f], flush)
          local argument = load_f64(arguments, math.max(at, 0))
          assert.is_true(wrong == 0, ("%s of %s: %d values are NaN or infinite on one side, one at %g")
            :format(f, dtype, wrong, argument))
          assert.is_true(worst <= promise, ("%s of %s: %.4f ulp at %.9g"):format(f, dtype, worst, argument))
          -- other neighbours, other places in a line, strided, the end of a row
          local p = pointer(y, "uint16_t *")
          local parts, q = {}, {}
          for i, range in ipairs { { -1, 1, -1 }, { 8, N - 5 }, { 40, 47 } } do
            parts[i] = of(x[{ range }], g[{ range }])
            q[i] = pointer(parts[i], "uint16_t *")
          end
          local differ = 0
          for i = 0, N - 1 do
            if differs(q[1][N - 1 - i], p[i], f, dtype) then differ = differ + 1 end
            if i >= 7 and i < N - 5 and differs(q[2][i - 7], p[i], f, dtype) then differ = differ + 1 end
            if i >= 39 and i < 47 and differs(q[3][i - 39], p[i], f, dtype) then differ = differ + 1 end
          end
          assert.are.equal(0, differ, f .. " of " .. dtype)
        end
      end
      C.lac_isa(isa)
    end)
  end

  -- large arrays of halves may be looked up; every value in order, so that there are blocks of every kind
  for _, name in ipairs(isas()) do
    it("activations of many halves have the bits of those of few #cpu on " .. name, function()
      assert(C.lac_isa(name) ~= nil)
      local VALUES, N = 65536, 2 ^ 19 + 37
      for _, dtype in ipairs { "bf16", "f16" } do
        local few, few_g = lac.empty { VALUES, dtype = dtype }, lac.randn { VALUES }:to { dtype = dtype }
        local bits, g_bits = pointer(few, "uint16_t *"), pointer(few_g, "uint16_t *")
        for i = 0, VALUES - 1 do bits[i] = i end
        local pair, g = lac.empty { N, 2, dtype = dtype }, lac.empty { N + 16, dtype = dtype }
        local pair_bits, many_g = pointer(pair, "uint16_t *"), pointer(g, "uint16_t *")
        for i = 0, N - 1 do pair_bits[2 * i] = i % VALUES end
        for i = 0, N + 15 do many_g[i] = g_bits[i % VALUES] end
        local strided = pair[{ {}, 1 }]
        local x = lac.cat({ strided, few[{ { 38, 53 } }] }, 1)
        local functions = { gelu_gradient = SPECIAL.gelu_gradient, silu_gradient = SPECIAL.silu_gradient }
        for _, f in ipairs { "exp", "sigmoid", "silu", "tanh", "gelu" } do
          functions[f] = function(t) return lac[f](t) end
        end
        for f, of in pairs(functions) do
          local expected = of(few, few_g)
          local y = pointer(expected, "uint16_t *")
          -- as it is, at the other places of lines, strided
          for first, t in pairs { [0] = x[{ { 1, N } }], [16] = x[{ { 17, N + 16 } }], [-1] = strided } do
            local from = math.max(first, 0)
            local many = of(t, g[{ { from + 1, from + N } }])
            local got, differ = pointer(many, "uint16_t *"), 0
            for i = 0, N - 1 do
              if differs(got[i], y[(i + from) % VALUES], f, dtype) then differ = differ + 1 end
            end
            assert.are.equal(0, differ, ("%s of %s, from %d on"):format(f, dtype, first))
          end
        end
      end
      C.lac_isa(isa)
    end)
  end

  it("pow in f32 has the cases of C's pow", function()
    local inf, nan = math.huge, 0 / 0
    local list = { 0, -0.0, 1, -1, 0.5, -0.5, 2, -2, 3, -3, 2.5, inf, -inf, nan, 1e-40, 1e38, 16777217 }
    local xs, ys = {}, {}
    for _, a in ipairs(list) do
      for _, b in ipairs(list) do xs[#xs + 1], ys[#ys + 1] = a, b end
    end
    local x, y = lac.tensor(xs), lac.tensor(ys)
    local got = (x ^ y):totable()
    local exact = (x:to { dtype = "f64" } ^ y:to { dtype = "f64" }):to { dtype = "f32" }:totable()
    local least = lac.default_device() == "cpu" and 0 or 2 ^ -149 -- CUDA may miss a subnormal by a unit
    for i, r in ipairs(exact) do
      local same = got[i] ~= got[i] and r ~= r or got[i] == r and 1 / got[i] == 1 / r -- the zero's sign too
      same = same or math.abs(got[i] - r) <= math.max(2 ^ -23 * math.abs(r), least) and r ~= 0
      assert.is_true(same, ("%g ^ %g = %g, not %g"):format(xs[i], ys[i], got[i], r))
    end
  end)

  it("knows the corners of the functions of two arguments", function()
    local inf, nan = math.huge, 0 / 0
    local function of(f, a, b, dtype)
      return lac[f](lac.tensor({ a }, { dtype = dtype }), lac.tensor({ b }, { dtype = dtype })):item()
    end
    for _, dtype in ipairs { "f64", "f32", "bf16" } do
      assert.are.equal(-1, of("fmod", -7, 3, dtype))
      assert.are.equal(-3, of("floor_divide", -7, 3, dtype))
      assert.are.equal(inf, of("floor_divide", 7, 0, dtype))
      assert.are.equal(9, of("floor_divide", 1, 0.109375, dtype))
      assert.are.equal(inf, of("hypot", nan, -inf, dtype))
      assert.are.equal(-inf, of("logaddexp", -inf, -inf, dtype))
      assert.are.equal(inf, of("logaddexp", inf, inf, dtype))
      assert.are.equal(3, of("logaddexp", 3, -inf, dtype))
      assert.are.equal(0, of("xlogy", 0, 0, dtype))
      assert.is_true(of("xlogy", 0, nan, dtype) ~= of("xlogy", 0, nan, dtype))
    end
    local shifts = lac.tensor({ -1, 63, 64, 5 }, { dtype = "i64" })
    assert.are.same({ 0, 0, 0, 32 }, (lac.bitwise_left_shift(lac.tensor({ 1, 2, 1, 1 }, { dtype = "i64" }),
      shifts)):totable())
    assert.are.same({ -1, -1, -1, -1 }, (lac.bitwise_right_shift(lac.tensor({ -8, -8, -8, -8 },
      { dtype = "i64" }), shifts)):totable())
    assert.are.same({ 254, 0 }, lac.bitwise_not(lac.tensor({ 1, 255 }, { dtype = "u8" })):totable())
    -- clamp passes the gradient on its bounds, hardtanh does not
    local x = lac.tensor({ -1, 0, 1, 2 }, { grad = true })
    x:clamp(-1, 1):sum():backward()
    assert.are.same({ 1, 1, 1, 0 }, x.grad:totable())
    x.grad = nil
    x:hardtanh():sum():backward()
    assert.are.same({ 0, 1, 0, 0 }, x.grad:totable())
  end)

  it("refuse arguments that they do not have", function()
    local x = lac.ones{ 3 }
    local message = "gelu: takes one tensor, got 'tanh' as well; .* is gelu_tanh"
    assert.error_matches(function() x:gelu("tanh") end, message)
    assert.error_matches(function() x:add(x, 0.5) end, "add: takes two operands, got 0.5 as well")
    assert.error_matches(function() lac.exp(x, false) end, "exp: takes one tensor, got false as well")
  end)

  it("solve and reflect to the ends of their domains (erfinv, lgamma, digamma)", function()
    local function f64(list) return lac.tensor(list, { dtype = "f64" }) end
    local u = f64 { -1 + 2 ^ -53, -1e-300, 0.05, 0.4999, 0.5001, 0.999, 1 - 2 ^ -53 }
    local back = (u:erfinv():erf() - u) / u
    assert.is_true(back:abs():max():item() <= 2 ^ -52)
    assert.is_true(math.abs(u:erfinv()[7]:item() - 5.8635847487551676) < 4e-15)
    assert.are.same({ -1 / 0, 1 / 0 }, f64 { -1, 1 }:erfinv():totable())
    assert.is_true(f64 { 1.5, 0 / 0 }:erfinv():isnan():all():item())
    assert.are.equal(-1 / 0, 1 / f64 { -0.0 }:erfinv():item()) -- the sign of zero stays

    pcall(ffi.cdef, "double lgamma(double);")
    for i = -2000, 2000 do
      local v = i * 0.01137
      local got, exact = f64 { v }:lgamma():item(), ffi.C.lgamma(v)
      assert.is_true(got == exact or math.abs(got - exact) <= math.max(2e-14, 6e-16 * math.abs(exact)), v)
    end
    for _, v in ipairs { 1e-300, 1e10, 1e300, 1 / 0, -1 / 0, 0, -1, -7 } do
      local got, exact = f64 { v }:lgamma():item(), ffi.C.lgamma(v)
      assert.is_true(got == exact or math.abs(got / exact - 1) < 1e-15, v)
    end
    local euler = 0.57721566490153286
    local psi = f64 { 1, 0.5, 2, -0.5, 1e10, 0, -3 }:digamma():totable()
    for i, wanted in ipairs { -euler, -euler - 2 * math.log(2), 1 - euler, 2 - euler - 2 * math.log(2),
                              math.log(1e10) - 0.5e-10 } do
      assert.is_true(math.abs(psi[i] - wanted) < 5e-15 * math.max(1, math.abs(wanted)), i)
    end
    assert.are.equal(-1 / 0, psi[6])
    assert.is_true(psi[7] ~= psi[7])
    for _, dtype in ipairs { "f64", "f32", "bf16" } do -- near the pole it is -1 / x, with its sign at -0 too
      local x = lac.tensor({ 0, -1 / math.huge, 2 ^ -100, -2 ^ -100 }, { dtype = dtype, grad = true })
      local wanted = { -1 / 0, 1 / 0, -2 ^ 100, 2 ^ 100 }
      assert.same(wanted, x:detach():digamma():totable(), dtype)
      x:lgamma():sum():backward()
      assert.same(wanted, x.grad:totable(), dtype)
    end
    local function blocks() -- of what is not garbage
      collectgarbage()
      collectgarbage()
      return lac.memory().live_blocks
    end
    local before = blocks()
    local x = lac.rand { 1000, grad = true }
    local y = x:lgamma():sum()
    assert.is_true(blocks() - before <= 3) -- x, the result and its sum
    y:backward()
    assert.is_true((x.grad - x:detach():digamma()):abs():max():item() == 0)
  end)

  it("have forms in place", function()
    local x = lac.tensor { -2, 0.5, 3 }
    assert.are.equal(x, x:leaky_relu_(0.5))
    assert.are.same({ -1, 0.5, 3 }, x:totable())
    assert.are.same({ -1, 0.5, 2 }, x:clamp_(nil, 2):totable())
    assert.are.same({ 0, 0.75, 1.5 }, x:lerp_(lac.ones { 3 }, 0.5):totable())
    assert.are.same({ 3, 3, 3 }, x:fill_(1):addcmul_(x + 1, x, 1):totable())
  end)

  it("of short rows that are there again for others have the bits of whole ones", function()
    lac.manual_seed(11)
    local function same(x, y, what)
      assert.is_true(lac.equal(x:contiguous():view(-1), y:contiguous():view(-1)), what)
    end
    local function numbers(dtype, ...)
      if dtype == "bool" then return lac.rand(...):gt(0.5) end
      if dtype == "i64" or dtype == "i32" then return lac.randint{ low = -9, high = 9, ... }:to(dtype) end
      return lac.randn(...):to(dtype)
    end
    local shapes = { { 517, 3 }, { 1031, 1 }, { 129, 64 }, { 67, 255 }, { 40, 257 }, { 5, 100 },
      { 7, 11, 5 }, { 300, 2, 2 }, { 70000, 5 }, { 1, 6 }, { 2000, 16 } }
    for _, dtype in ipairs{ "f32", "f64", "bf16", "f16", "i64", "i32" } do
      for _, shape in ipairs(shapes) do
        local x = numbers(dtype, unpack(shape))
        local what = ("%s [%s]"):format(dtype, table.concat(shape, ", "))
        for d = 1, #shape do -- y has one place along d
          local small = { unpack(shape) }
          small[d] = 1
          local y = numbers(dtype, unpack(small))
          local whole = y:expand(unpack(shape)):contiguous()
          same(x - y, x - whole, what)
          same(y * x, whole * x, what)
          same(x:lt(y), x:lt(whole), what)
          same(x:transpose(1, 2) - y:transpose(1, 2), (x - whole):transpose(1, 2), what)
          same(x:clone():add_(y), x + whole, what)
          if dtype == "f32" or dtype == "f64" then
            same(lac.addcmul(x, y, x), lac.addcmul(x, whole, x), what)
            local a, b, c = x:detach():requires_grad_(), y:detach():requires_grad_(), whole:requires_grad_()
            local ga = lac.grad((a / b):square():sum(), { a })[1]
            same(ga, lac.grad((a / c):square():sum(), { a })[1], what .. " gradient")
          end
        end
      end
      -- every second place of a short row, and an axis much longer than the last
      local a, b = numbers(dtype, 37, 1, 90, 1), numbers(dtype, 1, 3, 1, 2)
      same(a * b, a:expand(37, 3, 90, 2):contiguous() * b:expand(37, 3, 90, 2):contiguous(), dtype)
      local strided = numbers(dtype, 50, 6)[{ {}, { 1, 6, 2 } }]
      same(strided + strided[1], strided:contiguous() + strided[1]:expand(50, 3):contiguous(), dtype)
    end
  end)

  it("of powers 3 and -1 are products and quotients, as the powers of f64 are #cpu", function()
    for dtype, most in pairs { f64 = 2 ^ -50, f32 = 2 ^ -22, bf16 = 2 ^ -7, f16 = 2 ^ -9 } do
      local x = lac.tensor({ 0, 1 / -math.huge, 1 / 0, -1 / 0, 0 / 0, 0.3, -1.7, 30, -0.01, 1, 5 },
        { dtype = dtype, grad = true })
      for _, power in ipairs { 3, -1 } do
        local y = x ^ power
        local slope = lac.grad(y:sum(), { x })[1]:totable()
        for k, v in ipairs(x:detach():totable()) do
          local function near(got, wanted)
            local good = got == wanted or got ~= got and wanted ~= wanted
              or math.abs(got - wanted) <= most * math.abs(wanted) + (dtype == "f16" and 2 ^ -24 or 0)
            assert.is_true(good, ("%s: %g ^ %d: %g, not %g"):format(dtype, v, power, got, wanted))
          end
          near(y[k]:item(), v ^ power)
          near(slope[k], power * v ^ (power - 1))
        end
      end
    end
  end)

  it("of truth values are the same by bytes and one by one", function()
    for _, n in ipairs{ 1, 7, 64, 1000, 100003 } do
      local x, y = lac.rand(n):gt(0.4), lac.rand(n):gt(0.6)
      local i, j = x:to "i64", y:to "i64"
      local every = lac.rand(3 * n):gt(0.5)[{ { 1, 3 * n, 3 } }]
      for name, number in pairs{ logical_and = i * j, logical_or = (i + j):gt(0):to "i64",
          logical_xor = i:ne(j):to "i64", eq = i:eq(j):to "i64", ne = i:ne(j):to "i64", lt = i:lt(j):to "i64",
          le = i:le(j):to "i64", gt = i:gt(j):to "i64", ge = i:ge(j):to "i64" } do
        assert.is_true(lac.equal(lac[name](x, y):to "i64", number), name .. n)
        assert.is_true(lac.equal(lac[name](x, every), lac[name](x, every:contiguous())), name .. n)
        assert.is_true(lac.equal(lac[name](x, y[1]), lac[name](x, y[1]:expand(n):contiguous())), name .. n)
      end
      assert.is_true(lac.equal(lac.logical_not(x):to "i64", 1 - i))
    end
  end)

  it("writes large outputs with the bits of small ones", function()
    local N, PIECE = 8 * 1024 * 1024 + 24, 100003
    for _, dtype in ipairs { "f32", "bf16", "f16" } do
      lac.scope(function()
        local n = dtype == "f32" and N / 2 or N
        local x, y = lac.randn { n, dtype = dtype }, lac.randn { n, dtype = dtype }
        local big = { lac.add(x, y), lac.relu(x), lac.mul(x, 3), x:clone(), x:to { dtype = "f32" },
                      lac.gelu(x) }
        local slopes = {} -- from x alone, from the result alone
        for i, f in ipairs { "relu", "sigmoid", "silu", "gelu" } do slopes[i] = gradient_of(f) end
        for _, slope in ipairs(slopes) do big[#big + 1] = slope(x, y) end
        local reversed = lac.sub(x[{ { -1, 1, -1 } }], y)
        for at = 1, n, 2000003 do
          local stop = math.min(at + PIECE, n)
          local function part(t) return t[{ { at, stop } }] end
          local a, b = part(x), part(y)
          local small = { lac.add(a, b), lac.relu(a), lac.mul(a, 3), a, a:to { dtype = "f32" }, lac.gelu(a) }
          for _, slope in ipairs(slopes) do small[#small + 1] = slope(a, b) end
          for i, s in ipairs(small) do
            assert.is_true(part(big[i]):eq(s):all():item(), ("%s: result %d from %d"):format(dtype, i, at))
          end
          local back = x[{ { n + 1 - stop, n + 1 - at } }]
          assert.is_true(part(reversed):eq(back[{ { -1, 1, -1 } }] - b):all():item())
        end
      end)
    end
  end)
end)
