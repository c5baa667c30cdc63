--- Writing to indexed places, where the cases of ops_spec do not reach: in place, integers, threads.
--
-- In-place forms agree with the functional ones, count up versions (so that a backward notices) and refuse
-- what the tape could not follow. Repeated indices keep the last source. Halves are summed wide. Nothing
-- depends on the number of threads. Rolls and pads, which write blocks to places, are here too.

local lac = require "lacuna"

local function list(t) return t:totable() end
local function i64(t) return lac.tensor(t, { dtype = "i64" }) end

describe("scatter", function()
  it("writes in place as it writes into copies", function()
    lac.manual_seed(1)
    for _, dtype in ipairs { "f64", "f32", "bf16", "i64", "u8" } do
      local x = lac.randint { 4, 6, low = 0, high = 50, dtype = dtype }
      local idx, src = lac.randint { 5, 6, low = 0, high = 4 }, lac.randint { 5, 6, low = 0, high = 9,
        dtype = dtype }
      local rows, part = i64 { 2, 0, 2 }, lac.randint { 3, 6, low = 0, high = 9, dtype = dtype }
      for name, arguments in pairs {
        scatter = { 1, idx, src }, scatter_add = { 1, idx, src }, scatter_reduce = { 1, idx, src, "amax",
          false },
        index_add = { 1, rows, part, 3 }, index_copy = { 1, rows, part }, index_fill = { 2, rows, 7 },
      } do
        local wanted = lac[name](x, unpack(arguments))
        local wide = lac.zeros { 6, 4, 2, dtype = dtype }
        local y = wide:select(3, 1):t() -- strided destination
        y:copy_(x)
        y[name .. "_"](y, unpack(arguments))
        assert.is_true(lac.equal(y, wanted), name .. " " .. dtype)
        assert.are.equal(0, wide:select(3, 2):sum():item())
      end
    end
  end)

  it("assigns to rows by an index tensor, the last of equal ones staying", function()
    local t = lac.zeros { 4, 2 }
    t[i64 { 3, 1, 3 }] = lac.tensor { { 1, 2 }, { 3, 4 }, { 5, 6 } }
    assert.are.same({ { 0, 0 }, { 3, 4 }, { 0, 0 }, { 5, 6 } }, list(t))
    t[i64 { { 0 }, { 2 } }] = 9
    assert.are.same({ { 9, 9 }, { 3, 4 }, { 9, 9 }, { 5, 6 } }, list(t))
    t[i64 { 0, 1 }] = t[i64 { 1, 0 }]
    assert.are.same({ { 3, 4 }, { 9, 9 } }, list(t[{ { 1, 2 } }]))
    assert.has_error(function()
      t[i64 { 4 }] = 1
      lac.synchronize()
    end)
    assert.has_error(function() t[i64 { 0, 1 }] = lac.zeros { 3, 2 } end)
  end)

  it("fills where a mask is true", function()
    local t = lac.tensor { { 1, 2 }, { 3, 4 } }
    t:masked_fill_(lac.tensor { true, false }, -1)
    assert.are.same({ { -1, 2 }, { -1, 4 } }, list(t))
    assert.has_error(function() t:masked_fill_(lac.ones { 2, 2, 2, dtype = "bool" }, 0) end)
  end)

  it("sums halves wide and rounds once", function()
    local ones = lac.ones { 1000, dtype = "bf16" }
    local zero = lac.zeros { 1, dtype = "bf16" }
    assert.are.equal(1000, zero:scatter_add(1, lac.zeros { 1000, dtype = "i64" }, ones):item())
    assert.are.equal(1000, zero:index_add(1, lac.zeros { 1000, dtype = "i64" }, ones):item())
  end)

  it("does not depend on the number of threads", function()
    lac.manual_seed(2)
    local x, idx, src = lac.randn { 50, 300 }, lac.randint { 400, 300, low = 0, high = 50 }, lac.randn { 400,
      300 }
    local threads, results = lac.threads(), {}
    for _, n in ipairs { 1, 3 } do
      lac.threads(n)
      results[#results + 1] = x:scatter_add(1, idx, src):string() .. x:scatter(1, idx, src):string()
        .. x:index_add(1, idx:select(2, 1):contiguous(), src):string()
    end
    lac.threads(threads)
    assert.are.equal(results[1], results[2])
  end)

  it("tells the tape what it changed and refuses what the tape cannot follow", function()
    local x = lac.randn { 3, grad = true }
    local y = x * 2
    local z = (y * y):sum()
    lac.no_grad(function() y:scatter_(1, i64 { 0 }, 1) end)
    assert.has_error(function() z:backward() end)
    assert.has_error(function() x:scatter_add_(1, i64 { 0 }, 1) end)
    assert.has_error(function() lac.zeros { 3 }:index_add_(1, i64 { 0, 1, 2 }, x) end)
    local idx = i64 { 0, 1, 1 }
    local out = x:gather(1, idx):sum() + x:scatter_add(1, idx, 1):sum()
    idx[1] = 2
    assert.has_error(function() out:backward() end)
    assert.has_error(function() lac.ones { 3, dtype = "bool" }:scatter_add_(1, i64 { 0 }, true) end)
    local base = lac.arange { 6, dtype = "i64" }
    assert.has_error(function() base:scatter_(1, base, 1) end)
  end)

  it("adds along the last axis, into more places than are read at once", function()
    lac.manual_seed(3)
    for _, dtype in ipairs { "f32", "f64", "bf16", "i64" } do
      for _, places in ipairs { 1, 256, 700 } do
        local function numbers(n) return lac.randint { 3, n, low = -9, high = 9 }:to(dtype) end
        local x, src = numbers(places), numbers(2 * 531)[{ {}, { 1, 2 * 531, 2 } }]
        local idx = lac.randint { 3, 531, low = 0, high = places }
        local want, from, at = x:totable(), src:totable(), idx:totable()
        for r = 1, 3 do
          for i = 1, 531 do want[r][at[r][i] + 1] = want[r][at[r][i] + 1] + from[r][i] end
        end
        local exact = lac.tensor(want, { dtype = "f64" }):to(dtype)
        assert.is_true(lac.equal(exact, x:scatter_add(2, idx, src)), dtype .. places)
        assert.is_true(lac.equal(exact, x:scatter_add(2, idx, src:contiguous())), dtype .. places)
      end
    end
  end)

  it("adds columns and takes columns' gradients along the last axis, few and many", function()
    lac.manual_seed(4)
    for _, dtype in ipairs { "f32", "f64", "bf16", "i64" } do
      for _, size in ipairs { { 1, 300 }, { 256, 531 }, { 700, 531 }, { 700, 3 }, { 5, 0 } } do
        local places, n = size[1], size[2]
        local function numbers(count) return lac.randint { 3, count, low = -9, high = 9 }:to(dtype) end
        local x, src = numbers(places):t():contiguous():t(), numbers(0)
        if n > 0 then src = numbers(2 * n)[{ {}, { 1, 2 * n, 2 } }] end
        local idx = n > 0 and lac.randint { n, low = 0, high = places } or lac.zeros { 0, dtype = "i64" }
        local at, from = idx:totable(), src:totable()
        local want, sums = x:totable(), lac.zeros { 3, places }:totable()
        for r = 1, 3 do
          for i = 1, n do
            want[r][at[i] + 1] = want[r][at[i] + 1] + 2 * from[r][i]
            sums[r][at[i] + 1] = sums[r][at[i] + 1] + from[r][i]
          end
        end
        local function exact(t) return lac.tensor(t, { dtype = "f64" }):to(dtype) end
        assert.is_true(lac.equal(exact(want), x:index_add(2, idx, src, 2)), dtype .. places)
        local own = x:clone()
        lac.no_grad(function() own:index_add_(2, idx, src, 2) end)
        assert.is_true(lac.equal(exact(want), own), dtype .. places)
        if dtype ~= "i64" and n > 0 then
          local leaf = x:detach():requires_grad_(true)
          local g = lac.grad(leaf:index_select(2, idx), { leaf }, { grad_outputs = { src } })[1]
          assert.is_true(lac.equal(exact(sums), g), dtype .. places)
          local every = idx:view(1, n):expand(3, n)
          g = lac.grad(leaf:gather(2, every), { leaf }, { grad_outputs = { src } })[1]
          assert.is_true(lac.equal(exact(sums), g), dtype .. places)
          local pairs_of = n % 3 == 0 and idx:view(3, n / 3) -- an index of two axes
          if pairs_of then
            g = lac.grad(leaf:index_select(2, pairs_of), { leaf },
                         { grad_outputs = { src:contiguous():view(3, 3, n / 3) } })[1]
            assert.is_true(lac.equal(exact(sums), g), dtype .. places)
          end
        end
      end
    end
  end)

  it("moves long rows as few blocks: rolls and pads of them", function()
    for _, dtype in ipairs { "f32", "u8" } do
      for _, n in ipairs { 1, 3, 5000 } do
        local row = {}
        for i = 1, n do row[i] = i % 251 end
        local x = lac.tensor(row, { dtype = dtype })
        for _, shift in ipairs { 0, 1, -1, 5, 2999, -5001, 12345 } do
          local want = {}
          for i = 1, n do want[(i - 1 + shift) % n + 1] = row[i] end
          assert.same(want, x:roll(shift):totable(), shift)
          assert.same(want, lac.stack { x, x }:roll(shift, 2)[2]:totable(), shift)
        end
      end
    end
    -- every mode, wider than x where it may be: by the rule of each mode, position by position
    local rules = {
      constant = function(p, n) return p >= 0 and p < n and p or nil end,
      replicate = function(p, n) return math.max(0, math.min(n - 1, p)) end,
      circular = function(p, n) return p % n end,
      reflect = function(p, n) return p < 0 and -p or p >= n and 2 * (n - 1) - p or p end,
    }
    local x = lac.arange { 6 }:to { dtype = "f32" }:view(1, 1, 6)
    for mode, rule in pairs(rules) do
      for before = 0, 5 do
        for after = 0, 5 do
          local got = lac.pad(x, { before, after }, mode == "constant" and { value = 9 } or { mode = mode })
          local want = {}
          for i = 1, 6 + before + after do want[i] = rule(i - 1 - before, 6) or 9 end
          assert.same(want, got:view(6 + before + after):totable(), mode .. before .. after)
        end
      end
    end
  end)
end)
