--- The order that sort, topk, searchsorted and unique share, where the cases of ops_spec do not reach.
--
-- NaN, infinities and -0; stability in every dtype and at every size at which the engine changes its method;
-- topk as a prefix of sort for few and many elements; the same bits with one thread and with several.

local lac = require "lacuna"

local INTEGER = { i64 = true, i32 = true, u8 = true }
local function random(dtype, n)
  if INTEGER[dtype] then return lac.randint { 2, n, low = 0, high = 200, dtype = dtype } end
  return lac.randn { 2, n, dtype = dtype }
end

describe("order", function()
  local nan, inf = 0 / 0, math.huge

  it("cdist forms a part of the differences at a time where no gradient needs them", function()
    local x, y = lac.randn{ 700, 12 }, lac.randn{ 2, 60, 12 } -- 1,008,000 differences
    local before = lac.memory()
    lac.reset_peak()
    local d = x:cdist(y)
    assert.same({ 2, 700, 60 }, { d:size(1), d:size(2), d:size(3) })
    if lac.default_device() == "cpu" then
      assert.is_true(lac.memory().peak - before.live < 2.5e6) -- 336,000 and the parts, not 4 MB
    end
    local kept = x:clone():requires_grad_(true):cdist(y)
    assert.is_true(lac.equal(d, kept:detach()))
    local asks = x:clone():requires_grad_(true)
    before = lac.memory()
    lac.reset_peak()
    assert.is_true(lac.equal(d, lac.no_grad(function() return asks:cdist(y) end)))
    if lac.default_device() == "cpu" then
      assert.is_true(lac.memory().peak - before.live < 2.5e6) -- no gradient here, although x asks for one
    end
    assert.same({ 0, 60 }, { lac.zeros{ 0, 12 }:cdist(y[1]):size(1), lac.zeros{ 0, 12 }:cdist(y[1]):size(2) })
  end)

  -- in f64 by differences, with its gradients, of what x and y hold
  local function exact_distances(x, y, g)
    local a, b = x:detach():double():requires_grad_(true), y:detach():double():requires_grad_(true)
    local d = lac.norm(lac.unsqueeze(a, -2) - lac.unsqueeze(b, -3), 2, -1)
    d:backward(g:double())
    return d:detach(), a.grad, b.grad
  end

  it("cdist by products is as exact as by differences, near rows and equal ones too #cpu", function()
    lac.manual_seed(5)
    -- of two sizes each, and of a row; some need several parts, some broadcast
    for _, sizes in ipairs { { { 40, 64 }, { 50, 64 } }, { { 3, 40, 16 }, { 50, 16 } },
                             { { 700, 12 }, { 160, 12 } }, { { 2, 1, 10, 8 }, { 3, 20, 8 } },
                             { { 300, 8, 12 }, { 1, 25, 12 } }, { { 1, 9 }, { 1, 9 } } } do
      for _, dtype in ipairs { "f32", "bf16", "f16" } do
        local x, y = lac.randn(sizes[1]), lac.randn(sizes[2])
        local rows, others = x:view(-1, x:size(-1)), y:view(-1, y:size(-1))
        for i = 1, math.min(8, others:size(1), rows:size(1)) do
          local far = i % 2 == 0 and 10 ^ -i or 0
          others:select(1, i):copy_(rows:select(1, i) + far)
        end
        x, y = x:to(dtype), y:to(dtype)
        local d = x:cdist(y)
        local g = lac.randn(d:size()):to(dtype)
        local exact, gx, gy = exact_distances(x, y, g)
        local own, other = x:clone():requires_grad_(true), y:clone():requires_grad_(true)
        local kept = own:cdist(other)
        kept:backward(g)
        assert.is_true(lac.equal(d, kept:detach()), dtype)
        assert.is_true(lac.equal(exact:eq(0), d:eq(0)), dtype)
        -- 1.1 roundings of what is above 0; a gradient: of its largest term, some
        local unit = dtype == "f32" and 2 ^ -24 or dtype == "bf16" and 2 ^ -8 or 2 ^ -11
        local function worst(got, wanted, scale)
          return ((got:double() - wanted):abs() / scale):max():item()
        end
        local scale = lac.where(exact:eq(0), 1, exact)
        assert.is_true(worst(d, exact, scale) <= (dtype == "f32" and 4 or 1.1) * unit, dtype)
        for _, pair in ipairs { { own.grad, gx }, { other.grad, gy } } do
          assert.is_true(worst(pair[1], pair[2], pair[2]:abs():max() + 1e-30) <= 8 * unit, dtype)
        end
      end
    end
  end)

  it("cdist knows equal rows by the thousand, and what is not finite #cpu", function()
    local ones = lac.ones { 300, 16 }
    local x = ones:clone():requires_grad_(true)
    local d = x:cdist(ones)
    d:sum():backward()
    assert.are.equal(0, d:abs():max():item())
    assert.are.equal(0, x.grad:abs():max():item())
    local odd = ones:clone()
    odd[1][1], odd[2][3], odd[3][5] = inf, nan, -inf
    local got = odd:cdist(ones[{ { 1, 2 } }])
    assert.are.same({ inf, inf }, got[1]:totable())
    assert.is_true(got[2]:isnan():all():item())
    assert.are.same({ inf, inf }, got[3]:totable())
    assert.are.equal(0, got[{ { 4, 300 } }]:max():item())
    assert.are.equal(inf, (ones * 3e38):cdist(ones * -3e38):min():item())
    local far = (ones * 1e30):cdist(ones):max():item() -- whose squares f32 could not hold
    assert.is_true(math.abs(far / 4e30 - 1) < 1e-6)
  end)

  it("puts NaN after everything and treats zeros as equal", function()
    for _, dtype in ipairs { "f64", "f32", "f16", "bf16" } do
      local x = lac.tensor({ 3, nan, -inf, inf, 0, -0.0, nan, 2 }, { dtype = dtype })
      assert.are.same({ 2, 4, 5, 7, 0, 3, 1, 6 }, x:argsort():totable())
      assert.are.same({ 1, 6, 3, 0, 7, 4, 5, 2 }, x:argsort(1, true):totable())
      local _, largest = x:topk(3)
      assert.are.same({ 1, 6, 3 }, largest:totable())
      local values, inverse, counts = x:unique()
      assert.are.same({ -inf, 0, 2, 3, inf }, values[{ { 1, 5 } }]:totable())
      assert.are.same({ 1, 2, 1, 1, 1, 2 }, counts:totable())
      assert.are.same({ 3, 5, 0, 4, 1, 1, 5, 2 }, inverse:totable())
      local sorted = x:sort()
      assert.are.same({ 6, 0, 8 }, sorted:searchsorted(lac.tensor({ nan, -inf, inf }, { dtype = dtype }))
        :add(lac.tensor({ 0, 0, 3 }, { dtype = "i64" })):totable())
      assert.are.same({ 8 }, sorted:searchsorted(lac.tensor({ nan }, { dtype = dtype }), true):totable())
      assert.is_true(x:median():isnan():item())
      assert.is_true(x:quantile(0):isnan():item())
    end
  end)

  it("is stable, and topk is its beginning, in every dtype and at every size", function()
    lac.manual_seed(3)
    for _, dtype in ipairs { "f32", "f64", "f16", "bf16", "i64", "i32", "u8" } do
      for _, n in ipairs { 1, 5, 30, 300, 3000 } do
        local x = random(dtype, n)
        for _, down in ipairs { false, true } do
          local s, index = x:sort(2, down)
          assert.is_true(lac.equal(x:gather(2, index), s))
          if n > 1 then
            local a, b = s:narrow(2, 1, n - 1), s:narrow(2, 2, n - 1)
            local ia, ib = index:narrow(2, 1, n - 1), index:narrow(2, 2, n - 1)
            local ahead = down and a:gt(b) or a:lt(b)
            assert.is_true(ahead:logical_or(a:eq(b):logical_and(ia:lt(ib))):all():item())
          end
          for _, k in ipairs { 1, 3, 64, 65, n } do
            if k <= n then
              local t, places = x:topk(k, 2, down)
              assert.is_true(lac.equal(t, s:narrow(2, 1, k)), dtype .. n)
              assert.is_true(lac.equal(places, index:narrow(2, 1, k)))
            end
          end
        end
      end
    end
  end)

  it("orders booleans and 64-bit integers beyond 2^53", function()
    assert.are.same({ 1, 3, 0, 2 }, lac.tensor({ true, false, true, false }):argsort():totable())
    local big = lac.tensor({ 2LL ^ 62 + 1, 2LL ^ 62, -5LL }, { dtype = "i64" })
    assert.are.same({ 2, 1, 0 }, big:argsort():totable())
  end)

  it("does not depend on the number of threads", function()
    lac.manual_seed(4)
    local x, threads, results = lac.randn { 64, 4000 }, lac.threads(), {}
    for _, n in ipairs { 1, 3 } do
      lac.threads(n)
      local values, index = x:sort()
      local _, top = x:topk(300)
      results[#results + 1] = values:string() .. index:string() .. top:string() .. x:gt(1):nonzero():string()
    end
    lac.threads(threads)
    assert.are.equal(results[1], results[2])
  end)

  it("calls equal infinities close and NaN close to nothing; wraps no integers", function()
    local a, b = lac.tensor{ 1, inf, inf, -inf, nan, 3, 1 }, lac.tensor{ 1, inf, -inf, 5, nan, inf, 1.1 }
    assert.are.same({ true, true, false, false, false, false, false }, a:isclose(b):totable())
    local x, y = lac.tensor({ 250, 3 }, { dtype = "u8" }), lac.tensor({ 3, 3 }, { dtype = "u8" })
    assert.are.same({ false, true }, x:isclose(y):totable())
    assert.is_true(x:isclose(y, { atol = 247 }):all():item())
    local p = lac.zeros { 2, 2, grad = true }
    p:cdist(lac.zeros { 2, 2 }):sum():backward() -- the gradient at distance 0 is 0
    assert.are.same({ { 0, 0 }, { 0, 0 } }, p.grad:totable())
  end)

  it("accepts what is empty", function()
    assert.are.same({ 0, 3 }, { unpack(lac.zeros { 0, 3 }:sort(1):size()) })
    assert.are.same({ 2, 0 }, { unpack((lac.zeros { 2, 3 }:topk(0)):size()) })
    assert.are.same({ 0 }, { unpack((lac.zeros { 0 }:unique()):size()) })
    assert.are.same({ 0, 2 }, { unpack(lac.zeros { 2, 2 }:nonzero():size()) })
    assert.are.equal(0, lac.zeros { 0 }:searchsorted(lac.ones { 1 })[1]:item())
  end)
end)
