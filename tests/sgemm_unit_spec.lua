--- sgemm_unit_spec.lua: matrix products that the matrix unit takes, where there is one.
--
-- The engine gives f32 products of 2^20 terms and more, with 64 rows and columns and an inner size of 128 at
-- least, and those of half types without the first, to the unit (AMX): sums of parts of bf16, in blocks of
-- 256 inner and of 32 x 32 outputs, over areas that suit the number of threads. The same products are asked
-- of whatever instruction sets this processor has, against f64: sizes around each edge, all layouts of both
-- sides, batches, biases, sums that are added to, half types, values that the unit cannot take. The bound is
-- that of summation (Higham, Accuracy and Stability, 3.5); nothing is tuned.

local lac = require "lacuna"
local lib = require "lacuna.lib"

local UNIT = { f32 = 2 ^ -24, bf16 = 2 ^ -9, f16 = 2 ^ -11 }
local SIZES = { { 64, 64, 256 }, { 65, 64, 257 }, { 90, 95, 128 }, { 96, 97, 160 }, { 127, 64, 255 },
  { 80, 81, 256 }, { 97, 79, 257 }, { 64, 130, 511 }, { 129, 65, 513 }, { 70, 515, 131 }, { 67, 1030, 290 },
  { 515, 66, 300 }, { 1100, 70, 270 } }

local function f64(t) return t:to{ dtype = "f64" } end

-- [rows, columns] of normal numbers, laid out in one of four ways
local LAYOUTS = { "rows", "columns", "steps", "wide" }
local function matrix(rows, columns, dtype, layout)
  if layout == "rows" then return lac.randn{ rows, columns, dtype = dtype } end
  if layout == "columns" then return lac.randn{ columns, rows, dtype = dtype }:transpose(1, 2) end
  if layout == "steps" then
    return lac.randn{ rows, 2 * columns, dtype = dtype }[{ {}, { 1, 2 * columns, 2 } }]
  end
  return lac.randn{ rows + 3, columns + 5, dtype = dtype }[{ { 2, rows + 1 }, { 4, columns + 3 } }]
end

local function within(out, a, b, added)
  local k = a:size(2)
  local want = f64(a):matmul(f64(b))
  local bound = f64(a):abs():matmul(f64(b):abs()) * ((k + 2) * UNIT.f32) + k * 2 ^ -105
  if added then
    want = want + f64(added)
    bound = bound + f64(added):abs() * (4 * UNIT.f32)
  end
  local dtype = out:dtype()
  if dtype ~= "f32" then bound = bound + want:abs() * (2 * UNIT[dtype]) + 1e-6 end
  local excess = ((f64(out) - want):abs() - bound):max():item()
  assert.is_true(excess <= 0, ("%g over the bound"):format(excess))
end

-- what each of the processor's sets computes is given to `judge`
local function with_each_set(judge)
  local best = lib.ffi.string(lib.C.lac_isa(nil))
  for _, set in ipairs{ "amx", "avx512", "avx2", "baseline" } do
    if lib.C.lac_isa(set) ~= nil then
      local ok, reason = pcall(judge, set)
      lib.C.lac_isa(best)
      assert.is_true(ok, set .. ": " .. tostring(reason))
    end
  end
end

describe("products of the matrix unit", function()
  local threads = lac.threads()
  before_each(function() lac.manual_seed(5) end)
  after_each(function() lac.threads(threads) end)

  for _, dtype in ipairs{ "f32", "bf16", "f16" } do
    it("meet the bound at every edge in " .. dtype, function()
      with_each_set(function()
        for i, s in ipairs(SIZES) do
          local a = matrix(s[1], s[3], dtype, LAYOUTS[(i - 1) % 4 + 1])
          local b = matrix(s[3], s[2], dtype, LAYOUTS[(i + math.floor(i / 4)) % 4 + 1])
          within(a:matmul(b), a, b)
        end
      end)
    end)

    it("meet it in all layouts, with a bias too, in " .. dtype, function()
      with_each_set(function()
        local bias = lac.randn{ 97, dtype = dtype }
        for _, left in ipairs(LAYOUTS) do
          for _, right in ipairs(LAYOUTS) do
            local a, b = matrix(70, 300, dtype, left), matrix(300, 97, dtype, right)
            within(a:matmul(b), a, b)
            within(lac.linear(a, b:transpose(1, 2), bias), a, b, bias)
          end
        end
      end)
    end)
  end

  it("are those of each item of a batch, broadcast or not", function()
    with_each_set(function()
      local a, b, one = lac.randn{ 3, 2, 98, 140 }, lac.randn{ 3, 2, 140, 100 }, lac.randn{ 2, 140, 100 }
      local out, shared = a:matmul(b), a:matmul(one)
      for i = 1, 3 do
        for j = 1, 2 do
          within(out[i][j], a[i][j], b[i][j])
          assert.equal(0, (out[i][j] - a[i][j]:matmul(b[i][j])):abs():max():item())
          within(shared[i][j], a[i][j], one[j])
        end
      end
    end)
  end)

  it("add up gradients over uses of one weight", function()
    with_each_set(function()
      local w = lac.randn{ 100, 130, grad = true }
      local x, y = lac.randn{ 300, 130 }, lac.randn{ 257, 130 }
      local gx, gy = lac.randn{ 300, 100 }, lac.randn{ 257, 100 }
      local loss = (lac.linear(x, w) * gx):sum() + (lac.linear(y, w) * gy):sum()
      loss:backward()
      within(w.grad, lac.cat({ gx, gy }, 1):transpose(1, 2), lac.cat({ x, y }, 1))
    end)
  end)

  it("of what is not finite are those of IEEE 754, in their rows and columns only", function()
    with_each_set(function()
      local a, b = lac.ones{ 130, 300 }, lac.ones{ 300, 99 }
      a[{ 7, 3 }], a[{ 40, 290 }], a[{ 129, 300 }] = 0 / 0, -math.huge, math.huge
      b[{ 17, 98 }] = 0
      b[{ 290, 99 }] = 0
      local out = a:matmul(b):totable()
      for j = 1, 99 do
        assert.is_true(out[7][j] ~= out[7][j])
        assert.equal(j == 99 and "nan" or "-inf", tostring(out[40][j]):gsub("-nan", "nan"))
        assert.equal(math.huge, out[129][j])
        for _, i in ipairs{ 1, 8, 33, 39, 41, 130 } do assert.equal(j >= 98 and 299 or 300, out[i][j]) end
      end
    end)
  end)

  it("keep very small and very large numbers", function()
    with_each_set(function()
      local a, b = lac.randn{ 96, 128 }, lac.randn{ 128, 96 }
      for _, scale in ipairs{ { 1e-30, 1e-3 }, { 1e-35, 1e30 }, { 1e-40, 1e20 }, { 1e30, 1e-36 },
        { 1e18, 1e18 }, { 3e-38, 1e-1 } } do
        local x, y = a * scale[1], b * scale[2]
        within(x:matmul(y), x, y)
      end
      local x, y = a:clone(), b:clone()
      x[{ 3, {} }] = 1e-37 -- a row by itself, beside others
      y[{ {}, 5 }] = 1e30
      within(x:matmul(y), x, y)
      x, y = lac.full({ 96, 128 }, 3.4e38), lac.full({ 128, 96 }, 2 ^ -7)
      within(x:matmul(y), x, y)
    end)
  end)

  it("have the same bits with any number of threads and each time", function()
    with_each_set(function()
      for _, c in ipairs{ { 200, 700, 300, "f32" }, { 96, 64, 600, "bf16" }, { 1000, 128, 128, "f16" } } do
        local a, b = lac.randn{ c[1], c[3], dtype = c[4] }, lac.randn{ c[3], c[2], dtype = c[4] }
        a[{ 70, 9 }] = math.huge
        a[{ 71, 9 }] = 0
        lac.threads(1)
        local one = a:matmul(b):to{ dtype = "f64" }:nan_to_num()
        for _, n in ipairs{ 1, 2, 3, 5 } do
          lac.threads(n)
          local again = a:matmul(b):to{ dtype = "f64" }:nan_to_num()
          assert.equal(0, (one - again):abs():max():item())
        end
      end
    end)
  end)
end)
