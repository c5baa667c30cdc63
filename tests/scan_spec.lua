--- scan_spec.lua: what a case of cases_scan.lua cannot say of running sums, products and extremes.
--
-- Dtypes of results for integers and bools, equal extremes, NaN and infinities, zeros in the gradient of a
-- product, long lines against the definition of the gradient, and the same bits for every number of threads.

local lac = require "lacuna"

local inf, nan = math.huge, 0 / 0

-- lists whose NaNs compare equal
local function same(expected, t)
  local got = t:totable()
  assert.equal(#expected, #got)
  for i = 1, #expected do
    assert.is_true(got[i] == expected[i] or (got[i] ~= got[i] and expected[i] ~= expected[i]),
                   ("element %d is %s instead of %s"):format(i, tostring(got[i]), tostring(expected[i])))
  end
end

describe("scans", function()
  it("sum and multiply integers and bools as i64, and keep the dtype of extremes", function()
    for _, dtype in ipairs{ "i64", "i32", "u8" } do
      local x = lac.tensor({ 3, 1, 200 }, { dtype = dtype })
      assert.equal("i64", x:cumsum():dtype())
      same({ 3, 4, 204 }, x:cumsum())
      same({ 3, 3, 600 }, x:cumprod())
      assert.equal(dtype, x:cummax():dtype())
      same({ 3, 3, 200 }, (x:cummax()))
      same({ 3, 1, 1 }, (x:cummin()))
      same({ 0, 1, 1 }, (select(2, x:cummin())))
      assert.error_matches(function() return x:logcumsumexp() end, "logcumsumexp: x must .*float")
    end
    local b = lac.tensor{ 0, 2, 1, 0 }:bool()
    same({ 0, 1, 2, 2 }, b:cumsum())
    same({ false, true, true, true }, (b:cummax()))
    assert.equal("bool", b:cummax():dtype())
    same({ -5, -5 }, (lac.tensor({ -5, -9 }, { dtype = "i64" }):cummax()))
  end)

  it("show the latest of equal extremes, and let NaN win", function()
    local values, index = lac.tensor{ 1, 1, 0, 1 }:cummax()
    same({ 1, 1, 1, 1 }, values)
    same({ 0, 1, 1, 3 }, index)
    values, index = lac.tensor{ 2, nan, 1, nan, 3 }:cummin()
    same({ 2, nan, nan, nan, nan }, values)
    same({ 0, 1, 1, 3, 3 }, index)
    values, index = lac.tensor{ -inf, -inf, 0 }:cummax()
    same({ -inf, -inf, 0 }, values)
    same({ 0, 1, 2 }, index)
  end)

  it("take a log-sum-exp of infinities and of large numbers without overflow", function()
    same({ -inf, -inf, 1, inf, inf, inf }, lac.tensor{ -inf, -inf, 1, inf, 3, inf }:logcumsumexp())
    same({ 1, nan, nan }, lac.tensor{ 1, nan, 5 }:logcumsumexp())
    same({ 1000, 1000 + math.log(2) }, lac.tensor({ 1000, 1000 }, { dtype = "f64" }):logcumsumexp())
    local x = lac.tensor({ -inf, 2, -inf, 2 }, { dtype = "f64" }):requires_grad_(true)
    x:logcumsumexp():narrow(1, 2, 3):sum():backward()
    local grad = x.grad:totable()
    for i, expected in ipairs{ 0, 2.5, 0, 0.5 } do
      assert.is_true(math.abs(grad[i] - expected) <= 4 * 2.3e-16)
    end
  end)

  it("have the exact gradient of a product with zeros", function()
    for zeros = 0, 3 do
      local x = lac.tensor({ 2, zeros > 0 and 0 or 3, 5, zeros > 1 and 0 or 7, zeros > 2 and 0 or 4 },
                           { dtype = "f64" }):requires_grad_(true)
      local weights = lac.tensor({ 1, 2, 3, 4, 5 }, { dtype = "f64" })
      ;(x:cumprod() * weights):sum():backward()
      local v, expected = x:totable(), {}
      for i = 1, 5 do
        expected[i] = 0
        for j = i, 5 do
          local p = j
          for k = 1, j do if k ~= i then p = p * v[k] end end
          expected[i] = expected[i] + p
        end
      end
      same(expected, x.grad)
    end
  end)

  it("have the right gradient on lines longer than a tile", function()
    local x = (lac.rand{ 1, 1300, dtype = "f64" } * 0.2 + 0.9):requires_grad_(true)
    local g = lac.randn{ 1, 1300, dtype = "f64" }
    local want = { cumsum = {}, logcumsumexp = {}, cumprod = {} }
    local v, w = x:totable()[1], g:totable()[1]
    local y = x:detach():logcumsumexp():totable()[1]
    local s, t, p = 0, 0, 0 -- from the end: sums of g, of g exp(-y), of g times the product so far
    local products, run = {}, 1
    for i = 1, 1300 do
      run = run * v[i]
      products[i] = run
    end
    for i = 1300, 1, -1 do
      s, t, p = s + w[i], t + w[i] * math.exp(-y[i]), p + w[i] * products[i]
      want.cumsum[i], want.logcumsumexp[i], want.cumprod[i] = s, t * math.exp(v[i]), p / v[i]
    end
    for name, expected in pairs(want) do
      x.grad = nil
      ;(x[name](x) * g):sum():backward()
      local got = x.grad:totable()[1]
      for i = 1, 1300 do
        local error = math.abs(got[i] - expected[i])
        assert.is_true(error <= 1e-9 * (1 + math.abs(expected[i])), name .. " at " .. i)
      end
    end
  end)

  it("do not depend on the number of threads", function()
    local threads = lac.threads()
    local x = lac.randn{ 65, 40, 70 }
    for _, name in ipairs{ "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp" } do
      for dim = 1, 3 do
        local results = {}
        for _, n in ipairs{ 1, 2, 3 } do
          lac.threads(n)
          local leaf = x:clone():requires_grad_(true)
          local out = leaf[name](leaf, dim)
          out:sum():backward()
          results[#results + 1] = out:detach():string() .. leaf.grad:string()
        end
        assert.is_true(results[1] == results[2] and results[1] == results[3], name .. " along " .. dim)
      end
    end
    lac.threads(threads)
  end)

  -- results beyond the caches are written past them; halves of these are not
  it("give large arrays the bits of their parts, forward and backward", function()
    lac.scope(function()
      local columns = 1030
      for dtype, rows in pairs{ f32 = 4203, f64 = 2103 } do
        local x = lac.rand({ rows, columns }, { dtype = dtype }):add(0.5)
        local g = lac.rand({ rows, columns }, { dtype = dtype })
        for _, name in ipairs{ "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp" } do
          for dim = 1, 2 do
            local across = 3 - dim
            local n = x:size(across)
            local function run(at, width)
              return lac.scope(function()
                local part = x:narrow(across, at, width):contiguous():detach():requires_grad_()
                local values, index = lac[name](part, dim)
                values:backward(g:narrow(across, at, width):contiguous())
                return values:detach(), part.grad, index or values:detach()
              end)
            end
            local whole = { run(1, n) }
            for at = 1, n, 500 do
              local width = math.min(500, n - at + 1)
              for i, piece in ipairs{ run(at, width) } do
                assert.is_true(whole[i]:narrow(across, at, width):eq(piece):all():item(),
                  ("%s %s over dimension %d, result %d, from %d"):format(name, dtype, dim, i, at))
              end
            end
          end
        end
      end
    end)
  end)

  it("do nothing to what is empty", function()
    assert.same({ 0, 3 }, { unpack(lac.zeros{ 0, 3 }:cumsum(1):size()) })
    assert.same({ 2, 0 }, { unpack((lac.zeros{ 2, 0 }:cummax()):size()) })
  end)
end)
