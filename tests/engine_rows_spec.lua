-- The engine's reductions, softmax, norms and cross-entropy through the C interface, on every instruction
-- set: see support/engine.lua.

local d = require "support.cdirect"
local engine = require "support.engine"
local tensor, get, shape_of, op, call = d.tensor, d.get, d.shape, d.op, d.call
local FLOATS, ALL, INF, NAN, PRECISION = engine.FLOATS, engine.ALL, engine.INF, engine.NAN, engine.PRECISION
local random, randoms, round_all, count = engine.random, engine.randoms, engine.round_all, engine.count
local ulp, check_all, equal_all = engine.ulp, engine.check_all, engine.equal_all
local differences, check_gradient, fails = engine.differences, engine.check_gradient, engine.fails

for _, isa in ipairs(d.isas()) do
describe("engine on " .. isa .. ":", function()
  setup(function() engine.use(isa) end)
  teardown(engine.restore)

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

    it("log-sum-exp of rows, with terms down to where floats end", function()
      for _, dtype in ipairs(FLOATS) do
        for _, n in ipairs { 1, 15, 16, 37, 48, 513, 1029, 2080 } do
          local x, ref = round_all(dtype, randoms(4 * n, -6, 6)), {}
          for i = n + 1, 2 * n do x[i] = i % n == 2 and 3 or i % 3 == 0 and -INF or -80 - i % 17 end
          for i = 2 * n + 1, 3 * n do x[i] = -INF end
          for row = 0, 3 do
            local m, s = -INF, 0
            for i = row * n + 1, row * n + n do m = math.max(m, x[i]) end
            for i = row * n + 1, row * n + n do s = s + (m == -INF and 0 or math.exp(x[i] - m)) end
            ref[row + 1] = m == -INF and m or m + math.log(s)
          end
          local y = op("reduce", 10, tensor(dtype, { 4, n }, x), 2, 0)
          check_all("logsumexp of " .. n, dtype, get(y), ref, 4, dtype == "f64" and 2 ^ -46 or 2 ^ -20)
        end
      end
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
    it("finds terms down to where floats end, and nothing below", function()
      local x, n = {}, 41
      for i = 1, 6 * n do x[i] = i % n == 0 and 0 or i % n == 7 and -INF or -80 - (i * 7 % 173) / 10 end
      x = round_all("f32", x)
      for _, rows in ipairs { 1, 6 } do -- alone, and in steps with others
        local got = get(op("softmax", tensor("f32", { rows, n }, { unpack(x, 1, rows * n) }), 1, 0))
        for i, r in ipairs(reference({ unpack(x, 1, rows * n) }, n, false)) do
          local flushed = got[i] == 0 and r < 2 ^ -126
          assert(flushed or math.abs(got[i] - r) <= 2 ^ -20 * r + 2 ^ -147,
                 ("%g: %g, not %g"):format(x[i], got[i], r))
          assert(x[i] > -INF or got[i] == 0)
        end
      end
    end)
    it("gives a row the same bits beside others as alone", function()
      for _, dtype in ipairs(FLOATS) do
        for _, n in ipairs { 1, 15, 16, 37, 48, 1029, 2080 } do
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
    it("gradients of wide rows are right, and have the same bits beside others as alone", function()
      for _, dtype in ipairs(FLOATS) do
        for _, n in ipairs { 1, 15, 16, 37, 1029 } do
          local g = tensor(dtype, { 4, n }, randoms(4 * n, -1, 1))
          for logarithm = 0, 1 do
            local y = op("softmax", tensor(dtype, { 4, n }, randoms(4 * n, -3, 3)), 1, logarithm)
            local ys, gs, exact = get(y), get(g), {}
            for first = 0, 3 * n, n do
              local sum = 0
              for i = first + 1, first + n do sum = sum + (logarithm == 1 and gs[i] or ys[i] * gs[i]) end
              for i = first + 1, first + n do
                exact[i] = logarithm == 1 and gs[i] - math.exp(ys[i]) * sum or ys[i] * (gs[i] - sum)
              end
            end
            local got = get(op("softmax_bwd", y, g, 1, logarithm))
            check_all(("softmax_bwd of %d, %d"):format(n, logarithm), dtype, got, exact, 1, 2 ^ -20)
            for row = 0, 3 do
              local one = tensor(dtype, { 1, n }, { unpack(ys, row * n + 1, row * n + n) })
              local up = tensor(dtype, { 1, n }, { unpack(gs, row * n + 1, row * n + n) })
              equal_all("row " .. row, { unpack(got, row * n + 1, row * n + n) }, get(op("softmax_bwd", one,
                up, 1, logarithm)))
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

  describe("rmsnorm", function()
    local EPS = 1e-5
    local function forward(x, gamma)
      local out, rstd = d.out(), d.out()
      call("rmsnorm", x, gamma, EPS, out, rstd)
      return out, rstd
    end
    it("agrees with the definition, and gives a row the same bits beside others as alone", function()
      for _, dtype in ipairs(FLOATS) do
        for _, n in ipairs { 1, 15, 64, 77, 600, 1029, 6001 } do
          local rows = 6
          local x, gamma = round_all(dtype, randoms(rows * n, -2, 9)), round_all(dtype, randoms(n, -2, 2))
          local y, r = forward(tensor(dtype, { rows, n }, x), tensor(dtype, { n }, gamma))
          local got, exact, rstd = get(y), {}, {}
          for row = 0, rows - 1 do
            local s, lost = 0, 0
            for i = row * n + 1, row * n + n do -- Kahan's sum
              local square = x[i] ^ 2 - lost
              s, lost = s + square, (s + square) - s - square
            end
            rstd[row + 1] = 1 / math.sqrt(s / n + EPS)
            for i = 1, n do exact[row * n + i] = x[row * n + i] * rstd[row + 1] * gamma[i] end
            local one = { forward(tensor(dtype, { 1, n }, { unpack(x, row * n + 1, row * n + n) }),
              tensor(dtype, { n }, gamma)) }
            equal_all("row " .. row, { unpack(got, row * n + 1, row * n + n) }, get(one[1]))
            equal_all("rstd of row " .. row, { get(r)[row + 1] }, get(one[2]))
          end
          check_all("rmsnorm of " .. n, dtype, got, exact, 2, 2 ^ -20)
          check_all("rstd of " .. n, dtype == "f64" and "f64" or "f32", get(r), rstd, 4, 0)
        end
      end
    end)
    it("keeps what is no number in its row", function()
      local n = 40
      local x = randoms(5 * n, -1, 1)
      x[n + 3], x[3 * n] = NAN, INF
      local got = get(forward(tensor("f32", { 5, n }, x), nil))
      for i = 1, 5 * n do
        local row = math.floor((i - 1) / n)
        if row == 1 then assert(got[i] ~= got[i])
        elseif row ~= 2 then assert(got[i] == got[i] and math.abs(got[i]) < INF) end
      end
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
    it("gives a row the same bits beside others as alone", function()
      for _, dtype in ipairs(FLOATS) do
        for _, n in ipairs { 1, 15, 64, 77, 600, 1029, 6001 } do
          local x = randoms(6 * n, 2, 9)
          x[n + 1], x[3 * n], x[4 * n + 1] = NAN, INF, -INF
          local gamma = tensor(dtype, { n }, randoms(n, -2, 2))
          local beta = tensor(dtype, { n }, randoms(n, -1, 1))
          local all = { forward(tensor(dtype, { 6, n }, x), gamma, beta) }
          for row = 0, 5 do
            local values = { unpack(x, row * n + 1, row * n + n) }
            for i, one in ipairs { forward(tensor(dtype, { 1, n }, values), gamma, beta) } do
              local got, each = get(all[i]), i == 1 and n or 1
              equal_all("row " .. row, { unpack(got, row * each + 1, row * each + each) }, get(one))
            end
          end
        end
      end
    end)
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

  -- Large results are written past the caches, and rows that do not begin on a cache line by blocks
  it("rows are the same in an array beyond the caches as a few at a time", function()
    local NORMAL, EPS, FEW = 1, 1e-5, 3
    for _, case in ipairs { { "f32", 77 }, { "f32", 200 }, { "f32", 333 }, { "f32", 1029 }, { "f32", 17001 },
      { "f32", 41001 }, { "f64", 333 }, { "f64", 21001 } } do
      local dtype, n = case[1], case[2]
      local rows = math.ceil(2 ^ 24 / (n * (dtype == "f32" and 4 or 8))) + FEW
      local x, g = d.empty(dtype, { rows, n }), d.empty(dtype, { rows, n })
      local gamma, beta = d.empty(dtype, { n }), d.empty(dtype, { n })
      for seed, t in ipairs { x, g, gamma, beta } do call("random", t, NORMAL, 0, 1, seed, 0) end
      local function all(from, many, kept)
        local function part(t) return d.slice(t, 0, from, many) end
        local xs, gs, got, stats = part(x), part(g), {}, {}
        for logarithm = 0, 1 do
          local y = op("softmax", xs, 1, logarithm)
          got[#got + 1] = y
          got[#got + 1] = op("softmax_bwd", kept and part(kept[#got]) or y, gs, 1, logarithm)
        end
        for k = 1, 8 do stats[k] = d.out() end
        call("layernorm", xs, gamma, beta, EPS, stats[1], stats[2], stats[3])
        call("layernorm_bwd", xs, gamma, stats[2], stats[3], gs, stats[4], d.out(), d.out())
        call("rmsnorm", xs, gamma, EPS, stats[5], stats[6])
        call("rmsnorm_bwd", xs, gamma, stats[6], gs, stats[7], d.out())
        for _, k in ipairs { 1, 4, 5, 7 } do got[#got + 1] = stats[k] end
        return got
      end
      local whole = all(0, rows)
      local froms = n < 20000 and { 0, 1, math.floor(rows / 2), rows - FEW } or { rows - FEW }
      for _, from in ipairs(froms) do
        for k, few in ipairs(all(from, FEW, whole)) do
          local what = ("%s, rows of %d, result %d from row %d"):format(dtype, n, k, from)
          local same = d.slice(whole[k], 0, from, FEW)
          -- norms' gradients: a row's place among others decides which terms the compiler contracts
          if k == 6 or k == 8 then
            check_all(what, dtype, get(few), get(same), 1, dtype == "f64" and 2 ^ -47 or 2 ^ -19)
          else
            assert(d.bits(few) == d.bits(same), what)
          end
        end
      end
    end
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
end)
end
