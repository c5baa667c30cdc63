--- Options of single pairs (mask, bias, slopes, blocks) and packed sequences at the level of the C functions:
-- values, gradients (that of the bias among them), layouts, dtypes, threads, values that are not finite, bad
-- input.
--
-- support/oracle.lua applies them in the dense matrix, naively; nothing there knows tiles. Random
-- configurations mix them with everything a plan can be, with padding and with dropout.

local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local philox = require "support.philox"
local P = require "support.attn_pairs"
local ffi, C = direct.ffi, direct.C

local function close(got, want, tolerance, what)
  for name, data in pairs(got) do
    local found = direct.max_diff(data, want[name])
    if found > tolerance * (1 + direct.largest(want[name])) then
      error(("%s differs by %g in %s"):format(name, found, what), 0)
    end
  end
end

describe("options of single pairs in attention", function()
  local isa, threads, broken

  setup(function()
    broken = C.lac_memory_guard_errors()
    isa, threads = ffi.string(C.lac_isa(nil)):match("^%w+"), C.lac_threads(0)
    C.lac_memory_guard(1)
  end)
  teardown(function()
    C.lac_isa(isa)
    C.lac_threads(threads)
    C.lac_memory_guard(0)
  end)

  it("equal the oracle in f64, forward and backward, in 160 random configurations", function()
    P.seed(2025)
    for trial = 1, 160 do
      local c = P.config {}
      local lists = { P.inputs(c, trial) }
      if P.chance(0.5) then lists[5] = nil end
      local layout = P.pick { false, "heads", "inner", "reversed" } or nil
      local got = P.run(c, lists, { layout = layout })
      local want = oracle.run(c, lists[1], lists[2], lists[3], lists[4], lists[5], { keep = philox.keep(c) })
      close(got, want, 1e-12, P.text(c) .. " layout=" .. tostring(layout))
    end
  end)

  it("attend to active blocks only, with everything else, in 80 random configurations", function()
    P.seed(99)
    for trial = 1, 80 do
      local c = P.config { most = 70, D = P.pick { 3, 8 }, segment = 70, blocks = true }
      local lists = { P.inputs(c, trial) }
      local layout = P.pick { false, "heads", "inner", "reversed" } or nil
      local got = P.run(c, lists, { layout = layout })
      local want = oracle.run(c, lists[1], lists[2], lists[3], lists[4], lists[5], { keep = philox.keep(c) })
      close(got, want, 1e-12, P.text(c) .. " layout=" .. tostring(layout))
    end
  end)

  it("equal separate calls for packed sequences, whatever else is asked for", function()
    P.seed(12)
    for trial = 1, 25 do
      local c = P.config { most = 12, segment = 20 }
      c.B, c.align, c.starts = 1, nil, { 0 }
      local lengths = {}
      for s = 1, P.random(5) do
        lengths[s] = P.chance(0.4) and lengths[s - 1] or P.random(14) - 1
        c.starts[s + 1] = c.starts[s] + lengths[s]
      end
      c.N = c.starts[#c.starts]
      if c.N == 0 then c.N, lengths[#lengths], c.starts[#c.starts] = 5, 5, 5 end
      c.M = c.N
      c.padding = c.padding and {}
      for i = 1, c.padding and c.N or 0 do c.padding[i] = P.chance(0.8) end
      c.mask, c.bias = P.mask(c, 0.7), P.bias(c, trial, true)
      local drop = c.dropout > 0
      local lists = { P.inputs(c, trial) }
      local got, draws = P.run(c, lists), 0
      -- the same as one plan: each sequence alone
      local dbias, pieces = {}, { out = {}, lse = {}, dq = {}, dk = {}, dv = {} }
      for s, n in ipairs(lengths) do
        if n > 0 then
          local from, one, part = c.starts[s], {}, {}
          for key, value in pairs(c) do one[key] = value end
          one.N, one.M, one.starts = n, n, nil
          for i, width in ipairs { c.H * c.D, c.Hk * c.D, c.Hk * c.D, c.H * c.D, c.H } do
            part[i] = {}
            for e = 1, n * width do part[i][e] = lists[i][from * width + e] end
          end
          one.padding = c.padding and { unpack(c.padding, from + 1, from + n) }
          for _, name in ipairs { "mask", "bias" } do
            local data = {}
            for h = 0, c.H - 1 do for i = from, from + n - 1 do for j = from, from + n - 1 do
              data[#data + 1] = oracle.at(c[name], 0, h, i, j)
            end end end
            one[name] = { shape = { c.H, n, n }, data = data }
          end
          local keep = drop and philox.keep(one, draws) or nil
          draws = draws + c.H * n * n
          local want = oracle.run(one, part[1], part[2], part[3], part[4], part[5], { keep = keep })
          for name, list in pairs(pieces) do
            for _, x in ipairs(want[name]) do list[#list + 1] = x end
          end
          for h = 0, c.H - 1 do for i = 0, n - 1 do for j = 0, n - 1 do
            local _, at = oracle.at(c.bias, 0, h, from + i, from + j)
            dbias[at] = (dbias[at] or 0) + want.dbias[(h * n + i) * n + j + 1]
          end end end
        end
      end
      for i = 1, #c.bias.data do dbias[i] = dbias[i] or 0 end
      pieces.dbias = dbias
      close(got, pieces, 1e-12, P.text(c))
    end
  end)

  it("equal the oracle beyond one tile, for many and for few queries", function()
    P.seed(7)
    for index, case in ipairs {
      { N = 700, H = 1, D = 8, segments = { 600 }, dilations = { 1 }, causal = true },
      { N = 1200, H = 2, Hk = 1, D = 4, segments = { 1200, 64 }, dilations = { 3, 1 }, window = 90 },
      { N = 5, M = 600, H = 4, Hk = 2, D = 8, segments = { 600, 90 }, dilations = { 1, 2 }, align = "end" },
      { N = 150, M = 400, H = 2, D = 33, segments = { 400, 90 }, dilations = { 1, 2 }, merge = "mean" },
    } do
      local c = direct.fill(case)
      c.mask = P.mask(c, 0.6)
      c.bias = P.bias(c, 3, true)
      c.alibi = { 0.5, 0.25, 0.125, 0.1 }
      for h = 4, c.H + 1, -1 do c.alibi[h] = nil end
      if index ~= 4 then P.blocks(c, 0.5) end
      local lists = { P.inputs(c, index) }
      close(P.run(c, lists), oracle.run(c, unpack(lists, 1, 5)), 1e-11, P.text(c))
    end
  end)

  it("have the gradient of the bias that finite differences give, for every merge and shape", function()
    for _, merge in ipairs { "mean", "sum", "lse" } do
      for _, front in ipairs { {}, { 1 }, { 4 }, { 1, 4 }, { 2, 1 }, { 2, 4 } } do
        local c = direct.fill { B = 2, N = 11, M = 13, H = 4, Hk = 2, D = 3, segments = { 8, 14 },
          dilations = { 2, 3 }, merge = merge, dropout = 0.25, seed = 3, alibi = { 0.5, 0.2, 0.1, 0 } }
        local shape, n = {}, c.N * c.M
        for i, s in ipairs(front) do shape[i], n = s, n * s end
        shape[#shape + 1], shape[#shape + 2] = c.N, c.M
        c.bias = { shape = shape, data = direct.numbers(9, n) }
        local lists = { P.inputs(c, 5) }
        local function loss()
          local f, sum = direct.forward(c, lists[1], lists[2], lists[3]), 0
          for i, x in ipairs(direct.read(f.out)) do sum = sum + x * lists[4][i] end
          for i, x in ipairs(direct.read(f.lse)) do
            if x > -math.huge then sum = sum + x * lists[5][i] end
          end
          return sum
        end
        local dbias, base, h = P.run(c, lists).dbias, c.bias.data, 1e-5
        assert.equal(n, #dbias)
        for seed = 1, 2 do
          local u, expected, values = direct.numbers(90 + seed, n), 0, {}
          for i = 1, n do expected = expected + u[i] * dbias[i] end
          for _, sign in ipairs { 1, -1 } do
            c.bias.data = {}
            for i = 1, n do c.bias.data[i] = base[i] + sign * h * u[i] end
            values[sign] = loss()
          end
          c.bias.data = base
          local found = (values[1] - values[-1]) / (2 * h)
          assert.is_true(math.abs(found - expected) < 1e-7 * (1 + math.abs(expected)),
            ("%s: %.12g, differences say %.12g"):format(P.text(c), expected, found))
        end
      end
    end
  end)

  it("keep the tolerance rule in f32, f16 and bf16 on every instruction set", function()
    P.seed(31)
    for index, case in ipairs {
      { N = 70, H = 2, D = 16, segments = { 32, 70 }, dilations = { 1, 3 }, causal = true },
      { N = 61, H = 2, D = 33, segments = { 24, 61 }, dilations = { 2, 3 }, merge = "mean" },
      { N = 4, M = 90, H = 2, Hk = 1, D = 64, segments = { 90 }, dilations = { 1 }, align = "end" },
      { N = 260, H = 2, Hk = 1, D = 64, segments = { 260 }, dilations = { 1 }, sizes = { 130 } },
    } do
      for _, dtype in ipairs { "f32", "f16", "bf16" } do
        local c = direct.fill(case)
        c.mask, c.bias, c.alibi = P.mask(c, 0.7), P.bias(c, 4), { 0.5, 0.125 }
        if c.sizes then P.blocks(c, 0.6, c.sizes) end -- of 128 rows and more: amx takes them
        local lists = { P.inputs(c, index, dtype) }
        local q, k, v, dout = unpack(lists, 1, 4)
        local want = oracle.run(c, q, k, v, dout)
        local naive = oracle.run(c, q, k, v, dout, nil,
          { rounding = { result = direct.round[dtype], sum = direct.round.f32 } })
        for _, name in ipairs { "baseline", "avx2", "avx512", "amx" } do
          if C.lac_isa(name) ~= nil then
            for tensor, data in pairs(P.run(c, { q, k, v, dout }, { dtype = dtype })) do
              local exact, found = want[tensor], direct.max_diff(data, want[tensor])
              local allowed = 2 * direct.max_diff(naive[tensor], exact) + 2 ^ -23 * direct.largest(exact)
              local what = ("%s %s on %s, case %d"):format(dtype, tensor, name, index)
              assert.is_true(found <= allowed, ("%s: %g > %g"):format(what, found, allowed))
            end
          end
        end
        C.lac_isa(isa)
      end
    end
  end)

  it("take a bias in f32 with half inputs, and give its gradient in f32", function()
    local c = direct.fill { N = 20, H = 2, D = 8, segments = { 20 }, dilations = { 1 } }
    c.bias = { shape = { 20, 20 }, data = direct.numbers(1, 400), dtype = "f32" }
    local lists = { P.inputs(c, 1, "bf16") }
    local r = direct.forward(c, lists[1], lists[2], lists[3], { dtype = "bf16" })
    local _, _, _, dbias = direct.backward(r, lists[4])
    assert.equal(1, dbias.dtype)
    local want = oracle.run(c, lists[1], lists[2], lists[3], lists[4])
    assert.is_true(direct.max_diff(direct.read(r.out), want.out) < 0.02)
    assert.is_true(direct.max_diff(direct.read(dbias), want.dbias) < 0.02)
  end)

  it("give the same bits for any number of threads", function()
    P.seed(5)
    for _, case in ipairs {
      { B = 2, N = 300, H = 3, D = 24, segments = { 64, 300 }, dilations = { 1, 3 }, causal = true },
      { N = 1700, H = 2, Hk = 1, D = 8, segments = { 1700 }, dilations = { 1 }, window = 900 },
      { N = 3, M = 900, H = 4, Hk = 2, D = 16, segments = { 900 }, dilations = { 1 }, align = "end" },
    } do
      local c = direct.fill(case)
      c.mask, c.bias, c.alibi = P.mask(c, 0.6), P.bias(c, 4, true), {}
      for h = 1, c.H do c.alibi[h] = 2 ^ -h end
      P.blocks(c, 0.5)
      local lists = { P.inputs(c, 3) }
      direct.any_threads(function() return P.run(c, lists, { dtype = "f32" }) end)
    end
  end)

  it("keep values that are not finite away from rows that may not see them", function()
    P.seed(4711)
    for trial = 1, 60 do
      local c = P.config { most = trial % 20 == 0 and 300 or 40, D = 4, blocks = trial % 2 == 0 }
      local lists = { P.inputs(c, trial) }
      lists[5] = nil
      local want = P.run(c, lists)
      local at, bad = P.pick { 2, 3 }, P.pick { 0 / 0, math.huge, -math.huge }
      local key = P.random(c.M) - 1
      for e = 1, c.Hk * c.D do lists[at][key * c.Hk * c.D + e] = bad end
      local got = P.run(c, lists)
      for b = 0, c.B - 1 do for h = 0, c.H - 1 do for n = 0, c.N - 1 do
        local sees = false
        for g = 1, #c.segments do sees = sees or b == 0 and oracle.attends(c, g, b, h, n, key) end
        local row = ((b * c.N + n) * c.H + h) * c.D
        for _, name in ipairs { "out", "dq" } do
          for e = 1, sees and 0 or c.D do
            local x, y = got[name][row + e], want[name][row + e]
            if not (x == y or math.abs(x - y) <= 1e-12 * (1 + math.abs(y))) then
              error(("%s[%d,%d,%d] is %g, was %g before key %d in %s"):format(name, b, n, h, x, y, key,
                P.text(c)), 0)
            end
          end
        end
      end end end
    end
  end)

  -- A weight that is not a number may be in the sum of weights only: dropout takes it out of the result.
  it("keep them away where the pair is dropped as well", function()
    for _, N in ipairs { 32, 64, 128 } do
      for trial = 1, 6 do
        local c = direct.fill { N = N, H = 1, D = trial % 2 == 0 and 64 or 8, segments = { N },
                                dilations = { 1 }, causal = true, dropout = 0.3, rng_offset = 5, seed = 0 }
        repeat c.seed = c.seed + 1 until not philox.keep(c)(0, 0, N - 1, N - 1)
        local hidden = {}
        for i = 1, N * N do hidden[i] = i < N * N end -- the last row may not see the last key
        c.mask = { shape = { N, N }, data = hidden }
        local bad = ({ 0 / 0, math.huge, -math.huge })[trial % 3 + 1]
        for _, dtype in ipairs { "f64", "f32", "bf16" } do
          local lists = { P.inputs(c, trial, dtype) }
          lists[5] = nil
          local want = P.run(c, lists, { dtype = dtype })
          -- a matrix unit leaves keys that are not finite to multiply-adds, whose sums round elsewhere
          local unit = isa == "amx" and dtype ~= "f64" and c.D >= 32
          for at = 2, 3 do
            local clean = {}
            for e = 1, c.D do
              local i = (N - 1) * c.D + e
              clean[e], lists[at][i] = lists[at][i], bad
            end
            local got = P.run(c, lists, { dtype = dtype })
            for _, name in ipairs { "out", "lse", "dq" } do
              -- lse is f32 always, and products of bf16 are exact in the f32 sums: it rounds as that of f32
              local rounds = (dtype == "f32" or name == "lse") and 2 ^ -20 or 2 ^ -7
              local allowed = unit and rounds * (1 + direct.largest(want[name])) or 0
              local found = direct.max_diff(got[name], want[name])
              assert.is_true(found <= allowed, ("%s %s: %g > %g"):format(dtype, name, found, allowed))
            end
            for e = 1, c.D do lists[at][(N - 1) * c.D + e] = clean[e] end
          end
        end
      end
    end
  end)

  it("write 0 and -inf for rows that the mask or the bias leaves without keys", function()
    for _, option in ipairs { "mask", "bias" } do
      for _, dtype in ipairs { "f64", "f32", "f16", "bf16" } do
        local c = direct.fill { N = 6, H = 1, D = 3, segments = { 6 }, dilations = { 1 } }
        local data = {}
        for i = 1, 36 do data[i] = option == "bias" and (i > 6 and 0 or -math.huge) or i > 6 end
        c[option] = { shape = { 6, 6 }, data = data }
        local lists = { P.inputs(c, 1, dtype) }
        local got = P.run(c, lists, { dtype = dtype })
        for e = 1, 3 do
          assert.equal(0, got.out[e])
          assert.equal(0, got.dq[e])
        end
        assert.equal(-math.huge, got.lse[1])
        assert.is_true(got.lse[2] > -math.huge and got.out[4] ~= 0)
      end
    end
  end)

  it("refuse bad tensors with both sides in the message", function()
    local c = direct.fill { B = 2, N = 8, M = 9, H = 4, Hk = 2, D = 4, segments = { 4 }, dilations = { 1 } }
    local plan = direct.plan(c)
    local q, k = direct.tensor("bf16", { 2, 8, 4, 4 }), direct.tensor("bf16", { 2, 9, 2, 4 })
    local cases = {
      { "mask", "bool", { 7, 9 }, "mask has 7 queries, the plan has 8 (mask is [7, 9])" },
      { "mask", "bool", { 8, 8 }, "mask has 8 keys, the plan has 9 (mask is [8, 8])" },
      { "mask", "bool", { 3, 8, 9 }, "mask has 3 heads, the plan has 4, 1 is for all (mask is [3, 8, 9])" },
      { "mask", "bool", { 3, 1, 8, 9 },
        "mask has 3 batch items, the plan has 2, 1 is for all (mask is [3, 1, 8, 9])" },
      { "mask", "bool", { 9 }, "mask must be [N, M], [H, N, M] or [B, H, N, M], got bool [9]" },
      { "mask", "f32", { 8, 9 }, "mask must be bool (true = attend), got f32; a float mask is a bias" },
      { "bias", "f32", { 8, 10 }, "bias has 10 keys, the plan has 9 (bias is [8, 10])" },
      { "bias", "f16", { 8, 9 }, "bias must be bf16 or f32 like q, got f16" },
      { "alibi", "f32", { 2 }, "alibi must have a slope for each of the 4 heads, got f32 [2]" },
      { "alibi", "bf16", { 4 }, "alibi must be f32 for q of bf16, got bf16" },
      { "block_mask", "bool", { 2, 1 },
        "block_mask has 2 blocks of queries, the plan has 1 (block_mask is [2, 1])" },
      { "block_mask", "f32", { 1, 1 }, "block_mask must be bool (true = active), got f32" },
      { "block_mask", "bool", { 1, 1 }, "block must be at least 16, got 8", 8 },
    }
    for _, case in ipairs(cases) do
      local args = direct.args(c, q, k, k)
      local t = direct.tensor(case[2], case[3])
      args[case[1]], args.block = t, case[5] or 16
      local out, lse = direct.blank(), direct.blank()
      assert.is_true(C.lac_attend(plan, args, out, lse, nil) ~= 0)
      assert.is_true(out.storage == nil and lse.storage == nil)
      assert.equal("attention: " .. case[4], ffi.string(C.lac_last_error()))
    end
    local lists = { P.inputs(c, 1) }
    local function packed(starts, change)
      local one = direct.fill { N = 8, H = 1, D = 4, segments = { 4 }, dilations = { 1 }, starts = starts }
      if change then change(one) end
      local ok, message = pcall(direct.forward, one, lists[1], lists[2], lists[3])
      return not ok and message
    end
    assert.equal("attention: cu_seqlens must run from 0 to the 8 rows of q, got 0 to 7", packed { 0, 7 })
    assert.equal("attention: cu_seqlens must run from 0 to the 8 rows of q, got 1 to 8", packed { 1, 8 })
    assert.equal("attention: cu_seqlens must not fall: [2] is 5, [3] is 3", packed { 0, 5, 3, 8 })
    assert.equal("attention: packed sequences lie in one batch item, q has 2",
      packed({ 0, 8 }, function(x) x.B = 2 end))
    assert.equal("attention: packed sequences need as many keys as queries, got 9 != 8",
      packed({ 0, 8 }, function(x) x.M = 9 end))
    assert.equal("attention: cu_seqlens does not go with key_lengths (shorten the sequences)",
      packed({ 0, 8 }, function(x) x.lengths = { 3 } end))
    local r = direct.forward(c, lists[1], lists[2], lists[3])
    c.bias = { shape = { 8, 9 }, data = direct.numbers(1, 72) } -- asks for its gradient
    local ok, message = pcall(direct.backward, r, lists[4])
    assert.is_false(ok)
    assert.equal("attention: a gradient of bias is asked for, but there is no bias", message)
  end)

  it("have written outside no block", function() assert.equal(broken, C.lac_memory_guard_errors()) end)
end)
