-- The engine's elementwise operators through the C interface, on every instruction set:
-- see support/engine.lua.

local d = require "support.cdirect"
local engine = require "support.engine"
local C, ffi = d.C, d.ffi
local tensor, get, shape_of, op, call = d.tensor, d.get, d.shape, d.op, d.call
local FLOATS, ALL, INF, NAN, random = engine.FLOATS, engine.ALL, engine.INF, engine.NAN, engine.random
local randoms, round_all, count, ulp = engine.randoms, engine.round_all, engine.count, engine.ulp
local check_all, equal_all, differences = engine.check_all, engine.equal_all, engine.differences
local check_gradient, MAP1, MAP2, CMP2 = engine.check_gradient, engine.MAP1, engine.MAP2, engine.CMP2
local map1, map2, ULPS, EXTRA, fails = engine.map1, engine.map2, engine.ULPS, engine.EXTRA, engine.fails

for _, isa in ipairs(d.isas()) do
describe("engine on " .. isa .. ":", function()
  setup(function() engine.use(isa) end)
  teardown(engine.restore)

  describe("elementwise", function()
    it("functions of one argument agree with the reference in all layouts", function()
      for name, f in pairs(MAP1) do
        for _, dtype in ipairs(FLOATS) do
          local shape = { 3, 37 }
          local values = round_all(dtype, randoms(count(shape), f[2], f[3]))
          local ref = {}
          for i, v in ipairs(values) do ref[i] = f[1](v) end
          local slack = {}
          local extra = (EXTRA[name] or { 0, 0 })[dtype == "f64" and 2 or 1]
          for i, r in ipairs(ref) do slack[i] = extra * ulp(dtype == "f64" and "f64" or "f32", r) end
          for layout, x in pairs(d.layouts(dtype, shape, values)) do
            local y = map1(name, x)
            assert.are.same(shape, shape_of(y))
            check_all(name .. " " .. layout, dtype, get(y), ref, ULPS[dtype], slack)
          end
        end
      end
    end)

    it("functions of one argument keep NaN and know the limits", function()
      for name in pairs(MAP1) do
        for _, dtype in ipairs(FLOATS) do
          for _, v in ipairs(get(map1(name, tensor(dtype, { 20 }, setmetatable({},
            { __index = function() return NAN end }))))) do
            assert.is_true(v ~= v, name .. " loses NaN in " .. dtype)
          end
        end
      end
      local limits = {
        exp = { { -INF, 0 }, { INF, INF }, { 0, 1 } }, log = { { 0, -INF }, { INF, INF }, { -1, NAN }, { 1,
          0 } },
        expm1 = { { -INF, -1 }, { INF, INF } }, log1p = { { -1, -INF }, { INF, INF }, { -2, NAN } },
        tanh = { { -INF, -1 }, { INF, 1 } }, sigmoid = { { -INF, 0 }, { INF, 1 } }, erf = { { -INF, -1 },
        { INF, 1 } },
        softplus = { { -INF, 0 }, { INF, INF } }, relu = { { -INF, 0 }, { INF, INF } }, sqrt = { { -1, NAN },
        { INF, INF } },
        gelu = { { INF, INF } }, gelu_tanh = { { INF, INF } }, silu = { { INF, INF } }, recip = { { 0, INF },
        { INF, 0 } },
        round = { { 0.5, 0 }, { 1.5, 2 }, { 2.5, 2 }, { -0.5, 0 }, { -1.5, -2 } },
      }
      for name, list in pairs(limits) do
        for _, dtype in ipairs(FLOATS) do
          for _, pair in ipairs(list) do
            equal_all(name .. "(" .. pair[1] .. ") in " .. dtype, get(map1(name, tensor(dtype, { 1 },
              { pair[1] }))), { pair[2] })
          end
        end
      end
      -- subnormal floats
      local tiny = 2 ^ -140
      equal_all("log of a subnormal", { math.abs(get(map1("log", tensor("f32", { 1 },
        { tiny })))[1] - math.log(tiny)) < 1e-5 }, { true })
      check_all("exp to a subnormal", "f32", get(map1("exp", tensor("f32", { 1 }, { -100 }))),
        { math.exp(-100) }, 2)
    end)

    it("isnan, isfinite and not", function()
      local x = { 1, NAN, INF, -INF, 0 }
      for _, dtype in ipairs(FLOATS) do
        equal_all("isnan", get(map1("isnan", tensor(dtype, { 5 }, x))), { 0, 1, 0, 0, 0 })
        equal_all("isfinite", get(map1("isfinite", tensor(dtype, { 5 }, x))), { 1, 0, 0, 0, 1 })
      end
      for _, dtype in ipairs { "i64", "i32", "u8", "bool" } do
        equal_all("isnan", get(map1("isnan", tensor(dtype, { 2 }, { 0, 1 }))), { 0, 0 })
        equal_all("isfinite", get(map1("isfinite", tensor(dtype, { 2 }, { 0, 1 }))), { 1, 1 })
      end
      local n = map1("not", tensor("bool", { 2 }, { 0, 1 }))
      assert.are.equal(d.dtypes.bool, n.dtype)
      equal_all("not", get(n), { 1, 0 })
    end)

    it("functions of one argument on integers", function()
      local values = { -7, -1, 0, 3, 11 }
      local ref = { neg = { 7, 1, 0, -3, -11 }, abs = { 7, 1, 0, 3, 11 }, sign = { -1, -1, 0, 1, 1 },
        square = { 49, 1, 0, 9, 121 },
                    relu = { 0, 0, 0, 3, 11 }, floor = values, ceil = values, round = values }
      for name, r in pairs(ref) do
        for _, dtype in ipairs { "i64", "i32" } do
          for layout, x in pairs(d.layouts(dtype, { 1, 5 }, values)) do equal_all(name .. layout,
            get(map1(name, x)), r) end
        end
      end
      equal_all("u8 wraps", get(map1("neg", tensor("u8", { 2 }, { 1, 0 }))), { 255, 0 })
    end)

    it("gradients of one argument agree with central differences", function()
      for name, f in pairs(MAP1) do
        local x = randoms(40, f[2] + 0.11, f[3])
        local kinks = { floor = true, ceil = true, round = true, sign = true }
        local g = randoms(40, -1, 1)
        local ref = {}
        for i = 1, 40 do
          local h = 1e-5 * math.max(1, math.abs(x[i]))
          if name == "recip" or name == "log" or name == "rsqrt" or name == "sqrt" then h = 1e-5 * x[i] end
          ref[i] = kinks[name] and 0 or g[i] * (f[1](x[i] + h) - f[1](x[i] - h)) / (2 * h)
        end
        local tx, tg = tensor("f64", { 5, 8 }, x), tensor("f64", { 5, 8 }, g)
        local got = get(op("map1_bwd", C.lac_map_id(1, name), tx, map1(name, tx), tg))
        local scaled, wanted = {}, {}
        for i = 1, 40 do -- relative: slopes reach 1e4
          scaled[i], wanted[i] = got[i] / math.max(1, math.abs(ref[i])), ref[i] / math.max(1,
            math.abs(ref[i]))
        end
        check_gradient(name, scaled, wanted)
        -- the other dtypes agree with f64 on the same rounded inputs; y is an input of its own and is rounded
        -- too
        for _, dtype in ipairs { "f32", "f16", "bf16" } do
          local xs, gs = tensor(dtype, { 40 }, x), tensor(dtype, { 40 }, g)
          local ys = map1(name, xs)
          local exact = get(op("map1_bwd", C.lac_map_id(1, name), tensor("f64", { 40 }, get(xs)),
            tensor("f64", { 40 }, get(ys)),
            tensor("f64", { 40 }, get(gs))))
          local slack = {} -- a few f32 roundings of terms no larger than the argument times the slope
          for i = 1, 40 do slack[i] = 2 ^ -22 * (1 + math.abs(x[i])) * math.max(1, math.abs(exact[i])) end
          check_all(name .. " gradient", dtype, get(op("map1_bwd", C.lac_map_id(1, name), xs, ys, gs)),
            exact, ULPS[dtype], slack)
        end
      end
    end)

    it("functions of two arguments, broadcast, in all layouts", function()
      for name, f in pairs(MAP2) do
        for _, dtype in ipairs(FLOATS) do
          local low = name == "pow" and 0.2 or -4
          local x, y = round_all(dtype, randoms(21, low, 4)), round_all(dtype, randoms(7, 0.5, 3))
          local ref, slack = {}, {}
          for i = 1, 3 do
            for j = 1, 7 do
              local at = (i - 1) * 7 + j
              ref[at] = f(x[at], y[j])
              if name == "mod" then slack[at] = 0 end
            end
          end
          for layout, tx in pairs(d.layouts(dtype, { 3, 7 }, x)) do
            local z = map2(name, tx, tensor(dtype, { 7 }, y))
            assert.are.same({ 3, 7 }, shape_of(z))
            check_all(name .. " " .. layout, dtype, get(z), ref, ULPS[dtype], slack)
          end
          -- [1, 7] against [3, 1]: both expand
          local column = tensor(dtype, { 3, 1 }, { x[1], x[2], x[3] })
          local both = {}
          for i = 1, 3 do for j = 1, 7 do both[#both + 1] = f(x[i], y[j]) end end
          check_all(name .. " outer", dtype, get(map2(name, column, tensor(dtype, { 1, 7 }, y))), both,
            ULPS[dtype])
          check_all(name .. " 0-dim", dtype, get(map2(name, tensor(dtype, {}, { x[1] }), tensor(dtype, {},
            { y[1] }))),
            { f(x[1], y[1]) }, ULPS[dtype])
          -- scalars, on either side
          local id = C.lac_map_id(2, name)
          local right, left = {}, {}
          for i = 1, 7 do right[i], left[i] = f(y[i], 1.25), f(1.25, y[i]) end
          check_all(name .. " scalar", dtype, get(op("map2_scalar", id, tensor(dtype, { 7 }, y), 1.25, 0)),
            right, ULPS[dtype])
          check_all(name .. " swapped", dtype, get(op("map2_scalar", id, tensor(dtype, { 7 }, y), 1.25, 1)),
            left, ULPS[dtype])
        end
      end
      for _, dtype in ipairs(FLOATS) do
        for _, name in ipairs { "max", "min" } do
          equal_all(name .. " keeps NaN", get(map2(name, tensor(dtype, { 2 }, { NAN, 1 }), tensor(dtype,
            { 2 }, { 1, NAN }))), { NAN, NAN })
        end
      end
    end)

    it("integer arithmetic: floor division, no traps, wrapping", function()
      local x, y = { 7, -7, 7, -7, 5, 0 }, { 2, 2, -2, -2, 0, 3 }
      for _, dtype in ipairs { "i64", "i32" } do
        local a, b = tensor(dtype, { 6 }, x), tensor(dtype, { 6 }, y)
        equal_all("div", get(map2("div", a, b)), { 3, -4, -4, 3, 0, 0 })
        equal_all("mod", get(map2("mod", a, b)), { 1, 1, -1, -1, 0, 0 })
        equal_all("max", get(map2("max", a, b)), { 7, 2, 7, -2, 5, 3 })
        equal_all("mul", get(map2("mul", a, b)), { 14, -14, -14, 14, 0, 0 })
        equal_all("pow", get(map2("pow", tensor(dtype, { 5 }, { 2, -3, 1, -1, 5 }), tensor(dtype, { 5 },
          { 10, 3, -4, -3, -1 }))),
          { 1024, -27, 1, -1, 0 })
      end
      local least = d.empty("i64", { 1 })
      call("fill", least, -2 ^ 63)
      local minus = tensor("i64", { 1 }, { -1 })
      equal_all("least / -1", get(map2("div", least, minus)), { -2 ^ 63 })
      equal_all("least mod -1", get(map2("mod", least, minus)), { 0 })
      equal_all("u8 wraps", get(map2("add", tensor("u8", { 1 }, { 200 }), tensor("u8", { 1 }, { 100 }))),
        { 44 })
      equal_all("scalar", get(op("map2_scalar", C.lac_map_id(2, "div"), tensor("i32", { 3 }, { 7, -7, 1 }),
        2, 0)), { 3, -4, 0 })
    end)

    it("comparisons give bool for every dtype; and, or, xor take bool", function()
      for name, f in pairs(CMP2) do
        for _, dtype in ipairs(ALL) do
          local x, y = { 0, 1, 1, 0, 1 }, { 1, 0, 1, 0, 1 }
          local ref = {}
          for i = 1, 5 do ref[i] = f(x[i], y[i]) and 1 or 0 end
          for layout, tx in pairs(d.layouts(dtype, { 1, 5 }, x)) do
            local z = map2(name, tx, tensor(dtype, { 5 }, y))
            assert.are.equal(d.dtypes.bool, z.dtype)
            equal_all(name .. " " .. dtype .. " " .. layout, get(z), ref)
          end
          for i = 1, 5 do ref[i] = f(1, x[i]) and 1 or 0 end
          equal_all(name .. " scalar", get(op("map2_scalar", C.lac_map_id(2, name), tensor(dtype, { 5 }, x),
            1, 1)), ref)
        end
      end
      equal_all("NaN ~= NaN", get(map2("ne", tensor("f32", { 1 }, { NAN }), tensor("f32", { 1 }, { NAN }))),
        { 1 })
      local a, b = tensor("bool", { 4 }, { 0, 0, 1, 1 }), tensor("bool", { 4 }, { 0, 1, 0, 1 })
      equal_all("and", get(map2("and", a, b)), { 0, 0, 0, 1 })
      equal_all("or", get(map2("or", a, b)), { 0, 1, 1, 1 })
      equal_all("xor", get(map2("xor", a, b)), { 0, 1, 1, 0 })
    end)

    it("gradients of two arguments agree with central differences", function()
      for name, f in pairs(MAP2) do
        local x, y, g = randoms(12, 0.3, 4), randoms(4, 0.6, 2.9), randoms(12, -1, 1)
        local function of(vx, vy)
          local z = {}
          for i = 1, 12 do z[i] = f(vx[i], vy[(i - 1) % 4 + 1]) end
          return z
        end
        local dx = differences(function(v) return of(v, y) end, x, g)
        local dy = differences(function(v) return of(x, v) end, y, g)
        local tx, ty, tg = tensor("f64", { 3, 4 }, x), tensor("f64", { 4 }, y), tensor("f64", { 3, 4 }, g)
        local id = C.lac_map_id(2, name)
        check_gradient(name .. " dx", get(op("map2_bwd", id, 0, tx, ty, tg)), dx)
        check_gradient(name .. " dy", get(op("sum_to", op("map2_bwd", id, 1, tx, ty, tg), ty)), dy)
        for swapped = 0, 1 do
          local ds = differences(function(v)
            local z = {}
            for i = 1, 12 do z[i] = swapped == 1 and f(1.7, v[i]) or f(v[i], 1.7) end
            return z
          end, x, g)
          check_gradient(name .. " scalar", get(op("map2_scalar_bwd", id, tx, 1.7, swapped, tg)), ds)
        end
      end
      -- documented corners: ties share, powers of 0
      local one, g = tensor("f32", { 2 }, { 1, 1 }), tensor("f32", { 2 }, { 1, 1 })
      equal_all("tie", get(op("map2_bwd", C.lac_map_id(2, "max"), 0, one, one, g)), { 0.5, 0.5 })
      local zero = tensor("f32", { 1 }, { 0 })
      equal_all("0^0", get(op("map2_scalar_bwd", C.lac_map_id(2, "pow"), zero, 0, 0, tensor("f32", { 1 },
        { 1 }))), { 0 })
      equal_all("0^2", get(op("map2_bwd", C.lac_map_id(2, "pow"), 1, zero, tensor("f32", { 1 }, { 2 }),
        tensor("f32", { 1 }, { 1 }))), { 0 })
    end)

    it("where, axpy, scale, fill for every dtype and layout", function()
      for _, dtype in ipairs(ALL) do
        local x, y = { 1, 0, 1, 1, 0, 0 }, { 0, 1, 0, 0, 1, 1 }
        local cond = tensor("bool", { 3 }, { 1, 0, 1 })
        for layout, tx in pairs(d.layouts(dtype, { 2, 3 }, x)) do
          equal_all("where " .. layout, get(op("where", cond, tx, tensor(dtype, { 2, 3 }, y))), { 1, 1, 1, 1,
            1, 0 })
          if dtype ~= "bool" then
            call("axpy", 2, tensor(dtype, { 3 }, { 1, 2, 3 }), tx)
            equal_all("axpy " .. dtype .. layout, get(tx), { 3, 4, 7, 3, 4, 6 })
            call("scale", 3, tx)
            equal_all("scale " .. dtype .. layout, get(tx), { 9, 12, 21, 9, 12, 18 })
          end
          call("fill", tx, 1)
          equal_all("fill " .. dtype .. layout, get(tx), { 1, 1, 1, 1, 1, 1 })
        end
      end
      -- writing a view leaves its neighbours alone
      local whole = tensor("f32", { 7 }, { 0, 0, 0, 0, 0, 0, 0 })
      call("fill", d.slice(whole, 0, 1, 3, 2), 5)
      equal_all("neighbours", get(whole), { 0, 5, 0, 5, 0, 5, 0 })
    end)

    it("copy converts between all dtypes", function()
      local values = { 0, 1, 2, 100, 255 }
      for _, from in ipairs(ALL) do
        for _, to in ipairs(ALL) do
          local v = {}
          for i, x in ipairs(values) do v[i] = from == "bool" and (x ~= 0 and 1 or 0) or x end
          local ref = {}
          for i, x in ipairs(v) do ref[i] = to == "bool" and (x ~= 0 and 1 or 0) or x end
          for layout, src in pairs(d.layouts(from, { 1, 5 }, v)) do
            for _, dst in pairs(d.layouts(to, { 2, 5 }, { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 })) do
              call("copy", src, dst)
              local got = get(dst)
              equal_all(from .. " to " .. to .. " " .. layout, { unpack(got, 6) }, ref)
              equal_all(from .. " to " .. to .. " " .. layout, { unpack(got, 1, 5) }, ref)
            end
          end
        end
      end
    end)

    it("copy rounds once, saturates and truncates", function()
      local function cast(from, to, v)
        local dst = d.empty(to, { 1 })
        call("copy", tensor(from, { 1 }, { v }), dst)
        return get(dst)[1]
      end
      for _, to in ipairs { "f32", "f16", "bf16" } do
        for _, from in ipairs { "f64", "f32" } do
          for i = 1, 400 do
            local v = d.round(from, (random() - 0.5) * 2 ^ (random() * 60 - 35))
            assert.are.equal(d.round(to, v), cast(from, to, v), from .. " to " .. to .. " of case " .. i)
          end
        end
      end
      -- 1 + 2^-11 + 2^-40 is above the tie of f16: rounding through f32 would lose the last bit and round
      -- down
      assert.are.equal(1 + 2 ^ -10, cast("f64", "f16", 1 + 2 ^ -11 + 2 ^ -40))
      assert.are.equal(1, cast("f64", "f16", 1 + 2 ^ -11))
      assert.are.equal(1 + 2 ^ -7, cast("f64", "bf16", 1 + 2 ^ -8 + 2 ^ -40))
      assert.are.equal(INF, cast("f32", "f16", 65520))
      assert.are.equal(65504, cast("f32", "f16", 65519))
      assert.are.equal(2 ^ -24, cast("f32", "f16", 2 ^ -24))
      assert.are.equal(0, cast("f32", "f16", 2 ^ -25))
      assert.is_true(cast("f32", "f16", NAN) ~= cast("f32", "f16", NAN))
      assert.is_true(cast("f64", "bf16", NAN) ~= cast("f64", "bf16", NAN))
      assert.are.equal(-3, cast("f32", "i32", -3.9))
      assert.are.equal(2147483647, cast("f32", "i32", 1e20))
      assert.are.equal(-2147483648, cast("f64", "i32", -INF))
      assert.are.equal(0, cast("f32", "i64", NAN))
      assert.are.equal(2 ^ 63, cast("f64", "i64", INF)) -- 2^63 - 1 as a double
      assert.are.equal(255, cast("f32", "u8", 300))
      assert.are.equal(0, cast("f32", "u8", -1))
      assert.are.equal(44, cast("i32", "u8", 300))
      assert.are.equal(1, cast("f32", "bool", 0.25))
      assert.are.equal(1, cast("i64", "bool", -4))
    end)

    it("copy makes integers of blocks, near and far", function()
      local function cast(from, to, list)
        local dst = d.empty(to, { #list })
        call("copy", tensor(from, { #list }, list), dst)
        return get(dst)
      end
      local low = { i32 = -2 ^ 31, u8 = 0, i64 = -2 ^ 63 }
      local high = { i32 = 2 ^ 31 - 1, u8 = 255, i64 = 2 ^ 63 }
      for _, from in ipairs { "f64", "f32" } do
        -- blocks of small numbers, of those that 51 bits hold, and of all with NaN and infinities
        for _, powers in ipairs { { -4, 8 }, { 20, 50 }, { -10, 70 } } do
          local x = {}
          for i = 1, 1200 do
            local size = 2 ^ (powers[1] + (powers[2] - powers[1]) * random())
            x[i] = d.round(from, (random() < 0.5 and -1 or 1) * size)
          end
          if powers[2] == 70 then x[5], x[600], x[1199] = NAN, INF, -INF end
          for _, to in ipairs { "i32", "u8", "i64" } do
            local ref = {}
            for i, v in ipairs(x) do
              local whole = v < 0 and math.ceil(v) or math.floor(v)
              ref[i] = v ~= v and 0 or math.max(low[to], math.min(high[to], whole))
            end
            equal_all(from .. " to " .. to, cast(from, to, x), ref)
          end
          local truth = {}
          for i, v in ipairs(x) do truth[i] = v ~= 0 and 1 or 0 end
          equal_all(from .. " to bool", cast(from, "bool", x), truth)
        end
      end
      local x, single = {}, {}
      for _, most in ipairs { 30, 52 } do
        for i = 1, 1200 do
          x[i] = math.floor((random() - 0.5) * 2 ^ most)
          single[i] = d.round("f32", x[i])
        end
        x[1], x[2] = -2 ^ 31, 2 ^ 31 - 1
        single[1], single[2] = x[1], 2 ^ 31
        equal_all("i64 to f64", cast("i64", "f64", x), x)
        equal_all("i64 to f32", cast("i64", "f32", x), single)
      end
    end)

    it("every f16 and bf16 bit pattern survives a round trip through f32", function()
      for _, dtype in ipairs { "f16", "bf16" } do
        local half, single, back = d.empty(dtype, { 65536 }), d.empty("f32", { 65536 }), d.empty(dtype,
          { 65536 })
        local p = ffi.new("void *[1]")
        call("tensor_data", half, p)
        local bits = ffi.cast("uint16_t *", p[0])
        for i = 0, 65535 do bits[i] = i end
        call("copy", half, single)
        call("copy", single, back)
        equal_all(dtype .. " values", get(single), get(half))
        equal_all(dtype .. " round trip", get(back), get(half))
      end
    end)

    it("copies between halves of one matrix, refuses real overlap", function()
      local t = tensor("f32", { 2, 4 }, { 1, 2, 3, 4, 5, 6, 7, 8 })
      call("copy", d.slice(t, 1, 0, 2, 1), d.slice(t, 1, 2, 2, 1))
      equal_all("columns", get(t), { 1, 2, 1, 2, 5, 6, 5, 6 })
      fails("argument", "src and dst overlap", "copy", d.slice(t, 1, 0, 2, 1), d.slice(t, 1, 1, 2, 1))
      fails("argument", "x and dst overlap", "axpy", 1, d.transpose(d.slice(t, 1, 0, 2, 1), 0, 1), d.slice(t,
        1, 0, 2, 1))
      call("axpy", 1, t, t) -- the same view is fine
      equal_all("doubled", get(t), { 2, 4, 2, 4, 10, 12, 10, 12 })
      fails("argument", "share memory", "fill", d.expand(tensor("f32", { 1 }, { 0 }), { 3 }), 1)
    end)

    it("copies large transposed planes of every element size", function()
      for _, dtype in ipairs { "f64", "f32", "bf16", "u8" } do
        for _, shape in ipairs { { 70, 65 }, { 3, 40, 67 }, { 8, 700 } } do
          local n, nd = count(shape), #shape
          local values = {}
          for i = 1, n do values[i] = (i * 7) % 251 end
          local x = tensor(dtype, shape, values)
          local turned = d.transpose(x, nd - 2, nd - 1)
          local dst = d.empty(dtype, shape_of(turned))
          call("copy", turned, dst)
          equal_all("transposed " .. dtype, get(dst), get(turned))
          if nd == 3 then -- the first axis against the last
            turned = d.transpose(x, 0, 2)
            dst = d.empty(dtype, shape_of(turned))
            call("copy", turned, dst)
            equal_all("outer transposed " .. dtype, get(dst), get(turned))
          end
        end
      end
    end)

    it("arange", function()
      for _, dtype in ipairs { "f64", "f32", "f16", "bf16", "i64", "i32", "u8" } do
        local t = d.empty(dtype, { 5 })
        call("arange", t, 3, 2)
        equal_all("arange " .. dtype, get(t), { 3, 5, 7, 9, 11 })
      end
      local long = d.empty("i64", { 1000 })
      call("arange", d.slice(long, 0, 999, 1000, -1), 0, 3)
      local v = get(long)
      assert.are.equal(2997, v[1])
      assert.are.equal(0, v[1000])
    end)

    it("empty tensors and names", function()
      for _, dtype in ipairs(FLOATS) do
        local e = d.empty(dtype, { 3, 0 })
        assert.are.same({ 3, 0 }, shape_of(map1("exp", e)))
        assert.are.same({ 3, 0 }, shape_of(map2("add", e, tensor(dtype, { 1 }, { 1 }))))
        call("fill", e, 1)
        call("copy", e, e)
      end
      for arity = 1, 2 do
        local id, seen = 0, {}
        while C.lac_map_name(arity, id) ~= nil do
          local name = ffi.string(C.lac_map_name(arity, id))
          assert.are.equal(id, C.lac_map_id(arity, name))
          assert.is_nil(seen[name])
          seen[name] = true
          id = id + 1
        end
        for name in pairs(arity == 1 and MAP1 or MAP2) do assert.is_true(seen[name], name) end
      end
      assert.are.equal(-1, C.lac_map_id(1, "no such function"))
    end)
  end)
end)
end
