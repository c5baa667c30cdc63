--- sgemm_spec.lua: tall products, which the engine's own kernel computes, at every edge of its blocks.
--
-- The cases of matmul in support/cases.lua are small and go to BLAS; here rows, columns and inner sizes are
-- around the kernel's strips (6 or 12 rows), panels (16 or 32 columns) and blocks (256 inner), with B in
-- place and transposed, with a bias, in f32 and in half types (whose long inner sizes accumulate panel by
-- panel). A result may differ from that of f64 by the bound
-- of summation (Higham, Accuracy and Stability, 3.5), plus the rounding of a half-precision result; nothing
-- is tuned. The best instruction set and the baseline build (BLAS alone) must both meet it, and the number of
-- threads must not change a bit.

local lac = require "lacuna"
local lib = require "lacuna.lib"

local UNIT = { f32 = 2 ^ -24, bf16 = 2 ^ -9, f16 = 2 ^ -11 }
local SIZES = { { 128, 32, 1 }, { 129, 33, 7 }, { 131, 47, 64 }, { 200, 63, 255 }, { 139, 64, 256 },
  { 300, 35, 257 }, { 157, 128, 512 }, { 1100, 129, 130 }, { 135, 600, 300 }, { 128, 40, 513 } }

local function f64(t) return t:to{ dtype = "f64" } end

local function check(m, n, k, dtype, flip, bias)
  local a = lac.randn{ m, k, dtype = dtype }
  local b = flip and lac.randn{ n, k, dtype = dtype }:transpose(1, 2) or lac.randn{ k, n, dtype = dtype }
  local out, reference
  if bias then
    out = lac.linear(a, b:transpose(1, 2), bias:to{ dtype = dtype })
    reference = f64(a):matmul(f64(b)) + f64(bias:to{ dtype = dtype })
  else
    out, reference = a:matmul(b), f64(a):matmul(f64(b))
  end
  local bound = f64(a):abs():matmul(f64(b):abs()) * ((k + 2) * UNIT.f32)
  if bias then bound = bound + f64(bias):abs() * (4 * UNIT.f32) end
  if dtype ~= "f32" then bound = bound + reference:abs() * (2 * UNIT[dtype]) + 1e-6 end
  local excess = ((f64(out) - reference):abs() - bound):max():item()
  assert.is_true(excess <= 0, ("%d x %d x %d %s: %g over the bound"):format(m, n, k, dtype, excess))
  return out
end

describe("tall products", function()
  local threads = lac.threads()
  before_each(function() lac.manual_seed(3) end)
  after_each(function() lac.threads(threads) end)

  for _, dtype in ipairs{ "f32", "bf16", "f16" } do
    it("meet the error bound in " .. dtype, function()
      for _, s in ipairs(SIZES) do
        for _, flip in ipairs{ false, true } do check(s[1], s[2], s[3], dtype, flip) end
        check(s[1], s[2], s[3], dtype, true, lac.randn{ s[2] })
      end
    end)
  end

  it("meet it on the baseline build too", function()
    local best = lib.ffi.string(lib.C.lac_isa(nil))
    assert.is_true(lib.C.lac_isa("baseline") ~= nil)
    local ok, reason = pcall(check, 300, 35, 257, "f32", true)
    assert.is_true(lib.C.lac_isa(best) ~= nil)
    assert.is_true(ok, tostring(reason))
  end)

  it("read rows with a stride and batches, and write nothing outside", function()
    local wide = lac.randn{ 2, 150, 80 }
    local a, b = wide[{ {}, {}, { 9, 72 } }], lac.randn{ 2, 64, 45 }
    local out = a:matmul(b)
    for i = 1, 2 do
      assert.equal(0, (out[i] - a[i]:contiguous():matmul(b[i])):abs():max():item())
    end
    local bound = f64(a):abs():matmul(f64(b):abs()) * (66 * UNIT.f32)
    assert.is_true(((f64(out) - f64(a):matmul(f64(b))):abs() - bound):max():item() <= 0)
  end)

  it("pass NaN and infinity on, to their rows only", function()
    local a, b = lac.ones{ 130, 40 }, lac.ones{ 40, 33 }
    a[{ 7, 3 }] = 0 / 0
    a[{ 129, 40 }] = math.huge
    local out = a:matmul(b):totable()
    for j = 1, 33 do
      assert.is_true(out[7][j] ~= out[7][j])
      assert.equal(math.huge, out[129][j])
      assert.equal(40, out[8][j])
      assert.equal(40, out[130][j])
    end
  end)

  it("do not depend on the number of threads", function()
    local a, b = lac.randn{ 1000, 128 }, lac.randn{ 128, 96 }
    lac.threads(1)
    local one = a:matmul(b)
    lac.threads(3)
    assert.equal(0, (one - a:matmul(b)):abs():max():item())
  end)
end)
