-- The engine's products, indexing, rotations, random numbers and optimisers through the C interface, on every
-- instruction set (see support/engine.lua); and that no operator's bits depend on the number of threads or on
-- the run.

local d = require "support.cdirect"
local engine = require "support.engine"
local C, ffi = d.C, d.ffi
local tensor, get, shape_of, op, call = d.tensor, d.get, d.shape, d.op, d.call
local FLOATS, ALL, INF, NAN, randoms = engine.FLOATS, engine.ALL, engine.INF, engine.NAN, engine.randoms
local round_all, check_all, equal_all = engine.round_all, engine.check_all, engine.equal_all
local MAP1, map1, map2, fails = engine.MAP1, engine.map1, engine.map2, engine.fails
local original_threads = C.lac_threads(0)

for _, isa in ipairs(d.isas()) do
describe("engine on " .. isa .. ":", function()
  setup(function() engine.use(isa) end)
  teardown(engine.restore)

  describe("matmul", function()
    local function product(a, b, m, n, k, bias)
      local c, size = {}, {}
      for i = 0, m - 1 do
        for j = 0, n - 1 do
          local s, z = bias and bias[j + 1] or 0, 0
          for l = 0, k - 1 do
            local t = a[i * k + l + 1] * b[l * n + j + 1]
            s, z = s + t, z + math.abs(t)
          end
          c[i * n + j + 1], size[i * n + j + 1] = s, z
        end
      end
      return c, size
    end
    it("agrees with the reference for all shapes, dtypes and layouts", function()
      for _, dtype in ipairs(FLOATS) do
        for _, s in ipairs { { 1, 1, 1 }, { 3, 4, 5 }, { 1, 7, 3 }, { 7, 1, 2 }, { 17, 33, 65 }, { 2, 3,
          600 }, { 37, 130, 9 } } do
          local m, n, k = unpack(s)
          local a, b = round_all(dtype, randoms(m * k, -1, 1)), round_all(dtype, randoms(k * n, -1, 1))
          local bias = round_all(dtype, randoms(n, -1, 1))
          local ref, size = product(a, b, m, n, k, bias)
          local slack = {}
          -- the worst case of k + 1 roundings in the compute type
          for i = 1, #ref do slack[i] = (k + 2) * 2 ^ (dtype == "f64" and -53 or -24) * (size[i] + 1) end
          local right = d.layouts(dtype, { k, n }, b)
          for la, ta in pairs(d.layouts(dtype, { m, k }, a)) do
            for lb, tb in pairs(right) do
              local c = op("matmul", ta, tb, tensor(dtype, { n }, bias))
              assert.are.same({ m, n }, shape_of(c))
              check_all(("matmul %d %d %d %s %s"):format(m, n, k, la, lb), dtype, get(c), ref, 1, slack)
              local sum = d.empty(dtype, { m, n }) -- each row the bias: the product is added to it
              local row = tensor(dtype, { n }, bias)
              assert.equal(0, C.lac_copy(d.expand(row, { m, n }), sum))
              assert.equal(0, C.lac_matmul(ta, tb, sum, sum))
              check_all(("matmul added %d %d %d %s %s"):format(m, n, k, la, lb), dtype, get(sum), ref, 1,
                slack)
            end
          end
        end
      end
    end)
    it("batches broadcast, K = 0 gives the bias, NaN spreads", function()
      local a, b = randoms(2 * 3 * 4 * 5, -1, 1), randoms(3 * 5 * 2, -1, 1)
      local ta, tb = tensor("f64", { 2, 3, 4, 5 }, a), tensor("f64", { 3, 5, 2 }, b)
      local got = get(op("matmul", ta, tb, nil))
      for i = 0, 1 do
        for j = 0, 2 do
          local at = (i * 3 + j) * 20
          local ref = product({ unpack(a, at + 1, at + 20) }, { unpack(b, j * 10 + 1, j * 10 + 10) }, 4, 2, 5)
          check_all("batch", "f64", { unpack(got, (i * 3 + j) * 8 + 1, (i * 3 + j) * 8 + 8) }, ref, 8, 1e-15)
        end
      end
      -- one b for all items, from contiguous rows and from a transposed batch
      local shared = tensor("f64", { 5, 2 }, { unpack(b, 1, 10) })
      local ref = product(a, { unpack(b, 1, 10) }, 24, 2, 5)
      check_all("shared b", "f64", get(op("matmul", ta, shared, nil)), ref, 8, 1e-15)
      local swapped = d.transpose(op("matmul", d.transpose(ta, 0, 1), shared, nil), 0, 1)
      check_all("shared b, transposed batch", "f64", get(swapped), ref, 8, 1e-15)
      equal_all("K = 0", get(op("matmul", d.empty("f32", { 2, 0 }), d.empty("f32", { 0, 2 }), tensor("f32",
        { 2 }, { 1, 2 }))), { 1, 2, 1, 2 })
      equal_all("K = 0", get(op("matmul", d.empty("bf16", { 2, 0 }), d.empty("bf16", { 0, 2 }), nil)), { 0,
        0, 0, 0 })
      assert.are.same({ 0, 4 }, shape_of(op("matmul", d.empty("f32", { 0, 3 }), d.empty("f32", { 3, 4 }),
        nil)))
      assert.are.same({ 0, 2, 4 }, shape_of(op("matmul", d.empty("f32", { 0, 2, 3 }), d.empty("f32", { 3,
        4 }), nil)))
      equal_all("NaN", get(op("matmul", tensor("f32", { 1, 2 }, { NAN, 1 }), tensor("f32", { 2, 1 }, { 0,
        1 }), nil)), { NAN })
    end)
  end)

  describe("indexing", function()
    it("index_select for every dtype, axis and layout", function()
      local values = {}
      for i = 1, 24 do values[i] = i end
      for _, dtype in ipairs(ALL) do
        local v = values
        if dtype == "bool" then v = {} for i = 1, 24 do v[i] = i % 3 == 0 and 1 or 0 end end
        for layout, x in pairs(d.layouts(dtype, { 2, 3, 4 }, v)) do
          for dim = 0, 2 do
            local size = ({ 2, 3, 4 })[dim + 1]
            local idx = { size - 1, 0, 0, size - 1, 1, 0 }
            local y = op("index_select", x, dim, tensor(dim == 1 and "i32" or "i64", { 3, 2 }, idx))
            local shape = { 2, 3, 4 }
            table.remove(shape, dim + 1)
            table.insert(shape, dim + 1, 2)
            table.insert(shape, dim + 1, 3)
            assert.are.same(shape, shape_of(y))
            local ref, inner, outer = {}, 1, 1
            for a = dim + 2, 3 do inner = inner * ({ 2, 3, 4 })[a] end
            for a = 1, dim do outer = outer * ({ 2, 3, 4 })[a] end
            for o = 0, outer - 1 do
              for _, i in ipairs(idx) do
                for k = 0, inner - 1 do ref[#ref + 1] = v[(o * size + i) * inner + k + 1] end
              end
            end
            equal_all("index_select " .. dtype .. " " .. layout .. " dim " .. dim, get(y), ref)
          end
        end
      end
    end)
    it("its gradient adds repeated rows", function()
      for _, dtype in ipairs(FLOATS) do
        local idx = { 2, 0, 2, 2 }
        local g = {}
        for i = 1, 2 * 4 * 3 do g[i] = i end
        for layout, tg in pairs(d.layouts(dtype, { 2, 4, 3 }, g)) do
          local ref = {}
          for i = 1, 2 * 5 * 3 do ref[i] = 0 end
          for o = 0, 1 do
            for n, i in ipairs(idx) do
              for k = 1, 3 do
                local at = (o * 5 + i) * 3 + k
                ref[at] = ref[at] + g[(o * 4 + n - 1) * 3 + k]
              end
            end
          end
          local out = op("index_select_bwd", tg, 1, tensor("i64", { 4 }, idx), 5)
          assert.are.same({ 2, 5, 3 }, shape_of(out))
          equal_all("index_select_bwd " .. layout, get(out), ref)
        end
        -- a thousand times the same row: summed in double, rounded once
        local many = tensor(dtype, { 1000, 1 }, setmetatable({}, { __index = function() return 0.25 end }))
        local zeros = d.empty("i32", { 1000 })
        call("fill", zeros, 0)
        equal_all("many", get(op("index_select_bwd", many, 0, zeros, 2)), { d.round(dtype, 250), 0 })
      end
    end)
    it("gather and its gradient", function()
      local x, idx = {}, { 1, 0, 2, 2, 1, 1 }
      for i = 1, 6 do x[i] = i * 10 end
      for _, dtype in ipairs { "f64", "f32", "f16", "bf16", "i64", "i32", "u8" } do
        for layout, t in pairs(d.layouts(dtype, { 2, 3 }, x)) do
          equal_all("gather 1 " .. layout, get(op("gather", t, 1, tensor("i64", { 2, 3 }, idx))), { 20, 10,
            30, 60, 50, 50 })
          equal_all("gather 0 " .. layout, get(op("gather", t, 0, tensor("i32", { 3, 3 }, { 0, 1, 0, 1, 1, 0,
            0, 0, 1 }))),
            { 10, 50, 30, 40, 50, 30, 10, 20, 60 })
        end
      end
      for _, dtype in ipairs(FLOATS) do
        for layout, g in pairs(d.layouts(dtype, { 2, 3 }, { 1, 2, 3, 4, 5, 6 })) do
          equal_all("gather_bwd 1 " .. layout, get(op("gather_bwd", g, 1, tensor("i64", { 2, 3 }, idx), 4)),
            { 2, 1, 3, 0, 0, 11, 4, 0 })
          equal_all("gather_bwd 0 " .. layout, get(op("gather_bwd", g, 0, tensor("i64", { 2, 3 }, { 1, 0, 1,
            1, 2, 0 }), 3)),
            { 0, 2, 6, 5, 0, 3, 0, 5, 0 })
        end
      end
    end)
    it("refuses indices outside the axis, negative ones too", function()
      local x = tensor("f32", { 2, 3 }, { 1, 2, 3, 4, 5, 6 })
      fails("index", "index number 2 is 2 .*outside 0..1", "index_select", x, 0, tensor("i64", { 2 }, { 0,
        2 }), d.out())
      fails("index", "index number 1 is %-1", "gather", x, 1, tensor("i64", { 2, 1 }, { -1, 0 }), d.out())
      fails("index", "outside 0..0", "index_select_bwd", x, 0, tensor("i64", { 2 }, { 0, 1 }), 1, d.out())
      fails("index", "outside", "gather_bwd", x, 1, tensor("i64", { 2, 3 }, { 0, 0, 0, 0, 0, 9 }), 3, d.out())
      fails("index", "outside", "index_select", d.empty("f32", { 0, 3 }), 0, tensor("i64", { 1 }, { 0 }),
        d.out())
      assert.are.same({ 0, 3 }, shape_of(op("index_select", x, 0, d.empty("i64", { 0 }))))
    end)
  end)

  describe("rope", function()
    local B, N, H, D = 2, 3, 2, 8
    local function reference(x, start, base, interleaved, scale_base, sgn, transpose)
      local y = {}
      for i = 0, D / 2 - 1 do
        for row = 0, B * N * H - 1 do
          local p = start + math.floor(row / H) % N
          local angle = p * base ^ (-2 * i / D)
          local f = scale_base > 0 and ((2 * i / D + 0.4) / 1.4) ^ (sgn * p / scale_base) or 1
          local c, s = math.cos(angle) * f, math.sin(angle) * f * (transpose and -1 or 1)
          local a = row * D + (interleaved and 2 * i or i) + 1
          local b = row * D + (interleaved and 2 * i + 1 or i + D / 2) + 1
          y[a], y[b] = x[a] * c - x[b] * s, x[a] * s + x[b] * c
        end
      end
      return y
    end
    it("agrees with the reference in every mode", function()
      for _, dtype in ipairs(FLOATS) do
        local x = round_all(dtype, randoms(B * N * H * D, -1, 1))
        for _, start in ipairs { 0, 1000, -5, 3000000 } do
          for mode = 0, 15 do
            local inter, xpos, negative, trans = mode % 2, math.floor(mode / 2) % 2,
              math.floor(mode / 4) % 2, math.floor(mode / 8)
            local scale_base = xpos == 1 and math.max(512, math.abs(start)) or 0
            local sgn = negative == 1 and -1 or 1
            local ref = reference(x, start, 10000, inter == 1, scale_base, sgn, trans == 1)
            local t = mode == 0 and d.layouts(dtype, { B, N, H, D }, x) or { contiguous = tensor(dtype, { B,
              N, H, D }, x) }
            -- an angle of p is known to p 2^-53; the products round in the compute type
            local slack = dtype == "f64" and 1e-15 * (4 + math.abs(start)) or 2 ^ -21
            for layout, tx in pairs(t) do
              check_all("rope " .. mode .. " " .. layout, dtype, get(op("rope", tx, nil, start, 10000, inter,
                scale_base, sgn, trans)),
                ref, 1, slack)
            end
          end
        end
      end
    end)
    it("the transpose is the adjoint", function()
      local x, y = randoms(B * N * H * D, -1, 1), randoms(B * N * H * D, -1, 1)
      local a = get(op("rope", tensor("f64", { B, N, H, D }, x), nil, 4, 1000, 0, 512, 1, 0))
      local b = get(op("rope", tensor("f64", { B, N, H, D }, y), nil, 4, 1000, 0, 512, 1, 1))
      local s, t = 0, 0
      for i = 1, #x do s, t = s + a[i] * y[i], t + x[i] * b[i] end
      assert.is_true(math.abs(s - t) < 1e-13)
    end)
  end)

  describe("random", function()
    it("Philox gives the published words", function()
      -- Random123's known answers for philox4x32-10; uniform f32 are the upper 24 bits of the words
      local function words(seed, offset)
        local t = d.empty("f32", { 4 })
        call("random", t, C.LAC_UNIFORM, 0, 1, seed, offset)
        return get(t)
      end
      local function units(list)
        local t = {}
        for i, w in ipairs(list) do t[i] = math.floor(w / 256) / 2 ^ 24 end
        return t
      end
      equal_all("zeros", words(0ULL, 0ULL), units { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 })
      -- another vector with our layout: block 0, so counter words 0 and 1 are 0; bits of a 32-bit integer
      -- draw
      local t = d.empty("i64", { 2 })
      call("random", t, C.LAC_INTEGER, 0, 2 ^ 32, 0ULL, 0ULL)
      equal_all("integers are the high words", get(t), { 0xe169c58d, 0x9b00dbd8 })
    end)
    it("has the right moments and bounds", function()
      local n = 40000
      for _, dtype in ipairs(FLOATS) do
        local t = d.empty(dtype, { n })
        call("random", t, C.LAC_UNIFORM, -1, 3, 5, 1)
        local s, low, high = 0, INF, -INF
        for _, v in ipairs(get(t)) do s, low, high = s + v, math.min(low, v), math.max(high, v) end
        assert.is_true(low >= -1 and high < 3, "bounds of " .. dtype)
        assert.is_true(math.abs(s / n - 1) < 5 * 4 / math.sqrt(12 * n), "mean of uniform " .. dtype)
        call("random", t, C.LAC_NORMAL, 2, 3, 5, 2)
        local m, v2 = 0, 0
        for _, v in ipairs(get(t)) do m, v2 = m + v, v2 + (v - 2) ^ 2 end
        assert.is_true(math.abs(m / n - 2) < 5 * 3 / math.sqrt(n), "mean of normal " .. dtype)
        assert.is_true(math.abs(v2 / n - 9) < 5 * 9 * math.sqrt(2 / n), "variance of normal " .. dtype)
        -- a range that rounding would leave: 1 - 2^-9 and up rounds to 1 in bf16
        call("random", t, C.LAC_UNIFORM, 0, 1, 9, 3)
        low, high = INF, -INF
        for _, v in ipairs(get(t)) do low, high = math.min(low, v), math.max(high, v) end
        assert.is_true(low >= 0 and high < 1, dtype)
      end
      for _, dtype in ipairs(ALL) do
        local t = d.empty(dtype, { n })
        call("random", t, C.LAC_BERNOULLI, 0.3, 0, 5, 3)
        local s = 0
        local odd = 0
        for _, v in ipairs(get(t)) do
          s = s + v
          if v ~= 0 and v ~= 1 then odd = odd + 1 end
        end
        assert.are.equal(0, odd)
        assert.is_true(math.abs(s / n - 0.3) < 5 * math.sqrt(0.21 / n), "bernoulli " .. dtype)
        local top = dtype == "bool" and 2 or 7
        call("random", t, C.LAC_INTEGER, 0, top, 5, 4)
        local counts = {}
        for _, v in ipairs(get(t)) do counts[v] = (counts[v] or 0) + 1 end
        for v = 0, top - 1 do
          assert.is_true(math.abs((counts[v] or 0) - n / top) < 6 * math.sqrt(n / top),
            ("integer %d in %s"):format(v, dtype))
        end
      end
    end)
    it("depends on seed, offset and row-major position only", function()
      for kind = 0, 3 do
        local function draw(t, seed, offset)
          call("random", t, kind, kind == 2 and 0.5 or 0, kind == 3 and 100 or 1, seed, offset)
          return get(t)
        end
        local ref = draw(d.empty("f32", { 600 }), 1, 1)
        for layout, t in pairs(d.layouts("f32", { 20, 30 }, randoms(600, 0, 1))) do equal_all("random "
          .. layout, draw(t, 1, 1), ref) end
        equal_all("prefix", draw(d.empty("f32", { 7 }), 1, 1), { unpack(ref, 1, 7) })
        local other, third = draw(d.empty("f32", { 600 }), 2, 1), draw(d.empty("f32", { 600 }), 1, 2)
        local same = 0
        for i = 1, 600 do same = same + (other[i] == ref[i] and 1 or 0) + (third[i] == ref[i] and 1 or 0) end
        assert.is_true(same < (kind == 2 and 750 or 60))
      end
    end)
    it("dropout keeps, scales, and is its own backward", function()
      for _, dtype in ipairs(FLOATS) do
        local x = d.empty(dtype, { 50, 40 })
        call("fill", x, 1)
        local y = get(op("dropout", x, 0.25, 7, 1))
        local kept = 0
        for _, v in ipairs(y) do
          assert.is_true(v == 0 or v == d.round(dtype, 4 / 3) or math.abs(v - 4 / 3) < 1e-6)
          kept = kept + (v ~= 0 and 1 or 0)
        end
        assert.is_true(math.abs(kept / 2000 - 0.75) < 5 * math.sqrt(0.1875 / 2000))
        for layout, t in pairs(d.layouts(dtype, { 50, 40 }, get(x))) do
          equal_all("dropout " .. layout, get(op("dropout", t, 0.25, 7, 1)), y)
        end
        equal_all("p = 0", get(op("dropout", x, 0, 7, 1)), get(x))
      end
    end)
  end)

  describe("optimiser", function()
    local function list(items)
      local a = ffi.new("lac_optim_item[?]", #items)
      for i, t in ipairs(items) do
        a[i - 1].param, a[i - 1].grad, a[i - 1].m, a[i - 1].v = t.p, t.g, t.m, t.v
        a[i - 1].lr, a[i - 1].weight_decay = t.lr, t.wd
      end
      return a
    end
    it("AdamW follows the published algorithm over a list", function()
      for _, dtype in ipairs(FLOATS) do
        local stat = dtype == "f64" and "f64" or "f32"
        local items, refs = {}, {}
        for k, n in ipairs { 3, 700, 0, 20000 } do
          local p, m, v = round_all(dtype, randoms(n, -1, 1)), {}, {}
          for i = 1, n do m[i], v[i] = 0, 0 end
          refs[k] = { p = p, m = m, v = v }
          items[k] = { p = tensor(dtype, { n }, p), g = d.empty(dtype, { n }), m = tensor(stat, { n }, m),
            v = tensor(stat, { n }, v),
                       lr = 0.01 * k, wd = 0.1 * (k - 1) }
        end
        for step = 1, 3 do
          for k, r in ipairs(refs) do
            local g = round_all(dtype, randoms(#r.p, -1, 1))
            d.set(items[k].g, g)
            for i = 1, #r.p do
              local x = g[i] * 0.5
              r.m[i] = 0.9 * r.m[i] + 0.1 * x
              r.v[i] = 0.99 * r.v[i] + 0.01 * x * x
              local mh, vh = r.m[i] / (1 - 0.9 ^ step), r.v[i] / (1 - 0.99 ^ step)
              r.p[i] = r.p[i] - items[k].lr * (mh / (math.sqrt(vh) + 1e-8) + items[k].wd * r.p[i])
            end
          end
          call("adamw_many", list(items), #items, 0.9, 0.99, 1e-8, 0, step, 0.5, 0)
          for k, r in ipairs(refs) do
            check_all("adamw", dtype, get(items[k].p), r.p, 1, stat == "f32" and 2 ^ -21 or 1e-14)
            check_all("adamw m", stat, get(items[k].m), r.m, 2, stat == "f32" and 2 ^ -23 or 1e-15)
            r.p = get(items[k].p) -- the rounding of the parameter is part of the algorithm
          end
        end
      end
    end)
    it("the global norm", function()
      local a, b = tensor("f32", { 2, 2 }, { 1, 2, 3, 4 }), tensor("bf16", { 3 }, { 5, 6, 7 })
      local l, norm = ffi.new("const lac_tensor *[3]"), ffi.new("double[1]")
      local c = d.empty("f64", { 0 })
      l[0], l[1], l[2] = d.transpose(a, 0, 1), b, c
      local keep = { l[0], b, c }
      call("norm_many", l, 3, norm)
      assert.is_true(math.abs(norm[0] - math.sqrt(140)) < 1e-14 and #keep == 3)
      call("norm_many", nil, 0, norm)
      assert.are.equal(0, norm[0])
    end)
  end)

  it("results do not depend on the number of threads, nor on the run", function()
    local function normal(dtype, shape, offset)
      local t = d.empty(dtype, shape)
      call("random", t, C.LAC_NORMAL, 0, 1, 3, offset)
      return t
    end
    -- calls with `outs` outputs at the end and returns them
    local function several(name, outs, ...)
      local args, n, results = { ... }, select("#", ...), {}
      for i = 1, outs do results[i] = d.out() args[n + i] = results[i] end
      call(name, unpack(args, 1, n + outs))
      return unpack(results)
    end
    local function everything()
      local bits = {}
      local function keep(name, ...)
        for i = 1, select("#", ...) do bits[#bits + 1] = { name, d.bits((select(i, ...))) } end
      end
      for _, dtype in ipairs { "f32", "bf16" } do
        local x, y = normal(dtype, { 130, 515 }, 1), normal(dtype, { 515, 130 }, 2)
        keep("random", x, y)
        for name in pairs(MAP1) do keep(name, map1(name, x)) end
        keep("add", map2("add", x, d.transpose(y, 0, 1)))
        for fn = 0, 7 do
          keep("reduce", op("reduce", fn, x, 0, 0), op("reduce", fn, x, 1, 0), op("reduce", fn, x, 2, 0))
        end
        keep("long sum", op("reduce", 0, normal(dtype, { 200001 }, 9), 0, 0))
        keep("softmax", op("softmax", x, 1, 0), op("softmax", x, 0, 1))
        local gamma = normal(dtype, { 515 }, 3)
        local out, mean, rstd = several("layernorm", 3, x, gamma, nil, 1e-5)
        keep("layernorm", out, mean, rstd, several("layernorm_bwd", 3, x, gamma, mean, rstd, out))
        keep("matmul", op("matmul", x, y, nil), op("matmul", y, x, nil), op("matmul", d.transpose(y, 0, 1),
          d.transpose(x, 0, 1), nil))
        keep("matmul", op("matmul", normal(dtype, { 20, 40, 33 }, 4), normal(dtype, { 20, 33, 41 }, 5), nil))
        local idx = d.empty("i64", { 130 })
        call("random", idx, C.LAC_INTEGER, 0, 50, 1, 1)
        keep("index", op("index_select_bwd", x, 0, idx, 50), op("index_select", y, 0, idx))
        local w, bias = normal(dtype, { 60, 515 }, 6), normal(dtype, { 60 }, 10)
        local loss, lse = several("linear_cross_entropy", 2, x, w, bias, idx, nil, -1, 0.1, 37)
        keep("fused", loss, lse,
          several("linear_cross_entropy_bwd", 3, x, w, bias, idx, nil, -1, 0.1, 37, lse, loss))
        keep("dropout", op("dropout", x, 0.5, 1, 1))
        keep("rope", op("rope", normal(dtype, { 2, 70, 4, 64 }, 7), nil, 5, 10000, 0, 0, 1, 0))
        local p, m, v = normal(dtype, { 130, 515 }, 8), d.empty("f32", { 130, 515 }), d.empty("f32", { 130,
          515 })
        call("fill", m, 0) call("fill", v, 0)
        call("adamw_many", ffi.new("lac_optim_item[1]", { { p, x, m, v, 0.1, 0.1 } }), 1, 0.9, 0.99, 1e-8, 0,
          1, 1, 0)
        keep("adamw", p, m, v)
        local norm = ffi.new("double[1]")
        call("norm_many", ffi.new("const lac_tensor *[1]", { x }), 1, norm)
        bits[#bits + 1] = { "norm", ffi.string(norm, 8) }
      end
      return bits
    end
    local first
    for _, threads in ipairs{ 1, 1, 2, 3 } do
      C.lac_threads(threads)
      local bits = everything()
      first = first or bits
      for i, kept in ipairs(bits) do
        assert.is_true(kept[2] == first[i][2], ("%s differs by %d threads"):format(kept[1], threads))
      end
    end
    C.lac_threads(original_threads)
  end)
end)
end
