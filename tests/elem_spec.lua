-- Elementwise operators where the general specs do not look: accuracy over all floats, and large outputs.
--
-- Accuracy: every vector function in f32 against the same function in f64 (libm's) on a hundred thousand bit
-- patterns spread evenly over all floats, so every exponent, subnormals, infinities and NaN are among them.
-- The bound is in units of the last place of the exact result and is what simd.h promises; the one exception
-- is results below 2^-126 (silu: 2^-119, where its sigmoid is below that), which may be flushed to zero.
-- Chosen instruction sets: all that this machine has.
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

-- largest error in units of the last place, where, and the number of values that are NaN or infinite on one
-- side only
local rounded = ffi.new("float[1]")
local function worst_ulp(got, exact, n, flush)
  local worst, at, wrong = 0, -1, 0
  for i = 0, n - 1 do
    local y, r = got[i], exact[i]
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
                  erf = 2.3, gelu = 6, silu = 3.5 }

local function isas()
  local list, now = {}, ffi.string(C.lac_isa(nil))
  for _, name in ipairs { "baseline", "avx2", "avx512" } do
    if C.lac_isa(name) ~= nil then list[#list + 1] = name end
  end
  C.lac_isa(now)
  return list
end

describe("elementwise", function()
  local isa = ffi.string(C.lac_isa(nil))
  teardown(function() C.lac_isa(isa) end)

  for _, name in ipairs(isas()) do
    it("functions in f32 keep their promised accuracy over all floats on " .. name, function()
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
        local argument = pointer(x, "float *")[math.max(at, 0)]
        assert.is_true(wrong == 0, ("%s: %d values are NaN or infinite on one side, one at %g")
          :format(f, wrong, argument))
        assert.is_true(worst <= promise, ("%s: %.3f ulp at %.9g"):format(f, worst, argument))
      end
      C.lac_isa(isa)
    end)
  end

  it("writes large outputs with the bits of small ones", function()
    local N, PIECE = 8 * 1024 * 1024 + 24, 100003
    for _, dtype in ipairs { "f32", "bf16", "f16" } do
      lac.scope(function()
        local n = dtype == "f32" and N / 2 or N
        local x, y = lac.randn { n, dtype = dtype }, lac.randn { n, dtype = dtype }
        local big = { lac.add(x, y), lac.relu(x), lac.mul(x, 3), x:clone(), x:to { dtype = "f32" },
                      lac.gelu(x) }
        local reversed = lac.sub(x[{ { -1, 1, -1 } }], y)
        for at = 1, n, 2000003 do
          local stop = math.min(at + PIECE, n)
          local function part(t) return t[{ { at, stop } }] end
          local a, b = part(x), part(y)
          local small = { lac.add(a, b), lac.relu(a), lac.mul(a, 3), a, a:to { dtype = "f32" }, lac.gelu(a) }
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
