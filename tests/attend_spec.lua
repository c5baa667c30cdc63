--- Dilated attention at the level of the C functions: exactness, gradients, options, dtypes, threads, bad
-- input.
--
-- The strongest test is the pattern test: with q = 0 every score is 0, and with V = identity row n of the
-- output is the list of weights of the keys that row n attends to. So hundreds of random configurations
-- check strips, masks, offsets, alignment and merges against the dense boolean mask of support/oracle.lua
-- without a tolerance on values (only the rounding of 1 / count). Values and gradients are then compared
-- with the oracle in f64, gradients also with finite differences of the engine's own forward, and lower
-- precisions by the tolerance rule.

local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local choices = require "support.random"
local infinite = require "support.attn_infinite"
local philox = require "support.philox"
local ffi, C = direct.ffi, direct.C

local function filled(n, value)
  local a = {}
  for i = 1, n do a[i] = value end
  return a
end

local generator = choices.generator()
local random, pick, chance = generator.random, generator.pick, generator.chance

-- any valid configuration; segments shorter, equal or longer than N, dilations that do not divide them
local function random_config(options)
  options = options or {}
  while true do
    local c = { B = random(2), N = random(options.most or 36), D = options.D or random(20), segments = {},
                dilations = {} }
    c.M = chance(0.6) and c.N or random(options.most or 36)
    c.Hk = random(3)
    c.H = c.Hk * pick { 1, 1, 2, 3 }
    for g = 1, random(4) do
      c.segments[g] = chance(0.1) and 1000000007 or random(24)
      c.dilations[g] = chance(0.4) and 1 or random(6)
    end
    c.heads = pick { "all", "split" }
    c.offset = pick { "mod", "block", "branch" }
    c.merge = options.merge or pick { "mean", "sum", "lse", "lse_detach" }
    c.causal, c.align = chance(0.5), chance(0.5) and "end" or nil
    if chance(0.3) then c.window = random(12) - 1 end
    if chance(0.3) then
      c.padding = {}
      for i = 1, c.B * c.M do c.padding[i] = chance(0.7) end
    end
    if chance(0.3) then
      c.lengths, c.lengths_dtype = {}, pick { "i32", "i64" }
      for i = 1, c.B do c.lengths[i] = random(c.M + 1) - 1 end
    end
    c.dedup = c.merge == "lse" and chance(0.4)
    c = direct.fill(c)
    local valid = c.heads == "all" or c.H >= #c.segments
    for g = 1, #c.segments do
      for h = 0, c.H - 1 do
        if oracle.runs(c, g, h) and oracle.offset_of(c, g, h) >= c.segments[g] then valid = false end
      end
    end
    if valid then return c end
  end
end

local text, largest = choices.text, direct.largest

local function inputs(c, seed)
  local nq, nk = c.B * c.N * c.H * c.D, c.B * c.M * c.Hk * c.D
  return direct.numbers(seed, nq), direct.numbers(seed + 1, nk), direct.numbers(seed + 2, nk),
    direct.numbers(seed + 3, nq), direct.numbers(seed + 4, c.B * c.N * c.H)
end

local function results(r, dq, dk, dv)
  return { out = direct.read(r.out), lse = direct.read(r.lse), dq = direct.read(dq), dk = direct.read(dk),
           dv = direct.read(dv) }
end

-- ---- specs ---------------------------------------------------------------------------------------

describe("attention in C", function()
  local isa, threads, broken

  setup(function()
    broken = C.lac_memory_guard_errors() -- another spec breaks a block on purpose
    isa, threads = ffi.string(C.lac_isa(nil)):match("^%w+"), C.lac_threads(0)
    C.lac_memory_guard(1)
  end)
  teardown(function()
    C.lac_isa(isa)
    C.lac_threads(threads)
    C.lac_memory_guard(0)
  end)

  it("attends to exactly the keys of the dense mask, in 600 random configurations", function()
    generator.seed(20240611)
    for trial = 1, 600 do
      local c = random_config()
      c.D = c.M
      local v = filled(c.B * c.M * c.Hk * c.D, 0)
      for b = 0, c.B - 1 do for j = 0, c.M - 1 do for h = 0, c.Hk - 1 do
        v[((b * c.M + j) * c.Hk + h) * c.D + j + 1] = 1
      end end end
      local q, k = filled(c.B * c.N * c.H * c.D, 0), direct.numbers(trial, #v)
      local r = direct.forward(c, q, k, v)
      local out, lse = direct.read(r.out), direct.read(r.lse)
      for b = 0, c.B - 1 do for n = 0, c.N - 1 do for h = 0, c.H - 1 do
        local row, row_lse = oracle.pattern_row(c, b, h, n)
        local at = (b * c.N + n) * c.H + h
        local function complain(j)
          error(("row b=%d n=%d h=%d, key %d: weight %.17g, expected %.17g in %s"):format(b, n, h, j - 1,
            out[at * c.D + j] or -1, row[j] or -1, text(c)), 0)
        end
        for j = 1, c.M do
          local x = out[at * c.D + j]
          local close = math.abs(x - row[j]) <= 1e-14 * row[j] -- false for NaN
          if (row[j] == 0) ~= (x == 0) or not close then complain(j) end
        end
        local same = lse[at + 1] == row_lse or math.abs(lse[at + 1] - row_lse) < 1e-14
        assert.is_true(same, ("lse %.17g, expected %.17g in %s"):format(lse[at + 1], row_lse, text(c)))
      end end end
    end
  end)

  it("equals the oracle in f64, forward and backward, in 150 random configurations", function()
    generator.seed(77)
    for trial = 1, 150 do
      local c = random_config { most = 24 }
      c.scale = pick { 0, 0.3, -0.7 }
      if chance(0.25) then c.dropout, c.seed, c.rng_offset = 0.3, trial, 5 end
      local q, k, v, dout, dlse = inputs(c, trial)
      if chance(0.5) then dlse = nil end
      local layout = pick { false, "heads", "inner", "reversed" } or nil
      local r = direct.forward(c, q, k, v, { layout = layout })
      local got = results(r, direct.backward(r, dout, dlse, { layout = layout }))
      local want = oracle.run(c, q, k, v, dout, dlse, { keep = philox.keep(c) })
      for name, data in pairs(got) do
        local found = direct.max_diff(data, want[name])
        assert.is_true(found <= 1e-12 * (1 + largest(want[name])),
          ("%s differs by %g in %s layout=%s"):format(name, found, text(c), tostring(layout)))
      end
    end
  end)

  it("agrees with finite differences for every heads x merge x causal", function()
    for _, heads in ipairs { "all", "split" } do
      for _, merge in ipairs { "mean", "sum", "lse", "lse_detach" } do
        for _, causal in ipairs { false, true } do
          -- the weights of lse_detach are constants in the gradient only, so with several branches it has no
          -- finite difference; the oracle and the golden values cover it
          local branches = not (merge == "lse_detach" and heads == "all")
          local c = direct.fill {
            B = 2, N = 19, H = 4, Hk = 2, D = 5, segments = branches and { 8, 14 } or { 14 },
            dilations = branches and { 2, 3 } or { 3 }, heads = heads, merge = merge, causal = causal,
            padding = {}, dropout = 0.25, seed = 3, window = causal and 9 or nil, dedup = merge == "lse",
          }
          for i = 1, c.B * c.M do c.padding[i] = i % 7 ~= 3 end
          local q, k, v, dout, dlse = inputs(c, 5)
          local r = direct.forward(c, q, k, v)
          local lse0 = direct.read(r.lse)
          local dq, dk, dv = direct.backward(r, dout, dlse)
          local function loss(x)
            local f = direct.forward(c, x[1], x[2], x[3])
            local sum, out, lse = 0, direct.read(f.out), direct.read(f.lse)
            for i = 1, #out do sum = sum + out[i] * dout[i] end
            for i = 1, #lse do if lse0[i] > -math.huge then sum = sum + lse[i] * dlse[i] end end
            return sum
          end
          local gradients = { direct.read(dq), direct.read(dk), direct.read(dv) }
          for which = 1, 3 do
            for seed = 1, 3 do
              local base = { q, k, v }
              local u, expected = direct.numbers(90 + seed, #base[which]), 0
              for i = 1, #u do expected = expected + u[i] * gradients[which][i] end
              local h, values = 1e-5, {}
              for _, sign in ipairs { 1, -1 } do
                local moved = {}
                for i = 1, #u do moved[i] = base[which][i] + sign * h * u[i] end
                local x = { q, k, v }
                x[which] = moved
                values[sign] = loss(x)
              end
              local found = (values[1] - values[-1]) / (2 * h)
              assert.is_true(math.abs(found - expected) < 1e-7 * (1 + math.abs(expected)),
                ("gradient %d: %.12g, differences say %.12g in %s"):format(which, expected, found, text(c)))
            end
          end
        end
      end
    end
  end)

  it("keeps the tolerance rule in f32, f16 and bf16 on every instruction set, D from 1 to 256", function()
    local cases = {
      { N = 70, H = 2, D = 16, segments = { 32, 70 }, dilations = { 1, 3 }, causal = true },
      { N = 61, H = 2, D = 33, segments = { 24, 61 }, dilations = { 2, 3 }, merge = "mean" },
      { B = 6, N = 40, H = 2, D = 1, segments = { 40 }, dilations = { 1 }, merge = "sum", causal = true },
      { N = 20, H = 2, Hk = 1, D = 256, segments = { 16, 20 }, dilations = { 1, 2 }, merge = "lse_detach" },
    }
    for index, case in ipairs(cases) do
      local c = direct.fill(case)
      for _, dtype in ipairs { "f32", "f16", "bf16" } do
        local q, k, v, dout = inputs(c, index)
        for _, a in ipairs { q, k, v, dout } do
          for i = 1, #a do a[i] = direct.round[dtype](a[i]) end
        end
        local want = oracle.run(c, q, k, v, dout)
        local naive = oracle.run(c, q, k, v, dout, nil,
                                 { rounding = { result = direct.round[dtype], sum = direct.round.f32 } })
        for _, name in ipairs { "baseline", "avx2", "avx512", "amx" } do
          if C.lac_isa(name) ~= nil then
            local r = direct.forward(c, q, k, v, { dtype = dtype })
            for tensor, data in pairs(results(r, direct.backward(r, dout))) do
              local exact, found = want[tensor], direct.max_diff(data, want[tensor])
              local allowed = 2 * direct.max_diff(naive[tensor], exact) + 2 ^ -23 * largest(exact)
              local what = ("%s %s on %s, case %d"):format(dtype, tensor, name, index)
              assert.is_true(found <= allowed, ("%s: %g > %g"):format(what, found, allowed))
            end
          end
        end
        C.lac_isa(isa)
      end
    end
  end)

  it("spans several tiles and tasks like the oracle", function()
    for _, case in ipairs {
      { N = 700, H = 1, D = 8, segments = { 600 }, dilations = { 1 }, causal = true },
      { N = 1300, H = 1, D = 4, segments = { 1300 }, dilations = { 1 }, window = 40, causal = true },
      -- chunks of keys of the same work, not of the same size
      { N = 1000, H = 2, Hk = 1, D = 20, segments = { 1000 }, dilations = { 1 }, causal = true },
      { N = 1300, H = 1, D = 4, segments = { 1300, 64 }, dilations = { 3, 1 }, window = 90, merge = "lse" },
      { N = 50, M = 600, H = 1, D = 8, segments = { 600, 90 }, dilations = { 1, 2 }, align = "end",
        causal = true },
      -- a delta per branch: made with the gradients where one task has all keys of a segment, else by itself
      { N = 330, H = 2, Hk = 1, D = 8, segments = { 330, 100 }, dilations = { 1, 3 }, merge = "lse_detach",
        causal = true, lengths = { 290 }, lengths_dtype = "i32" },
      { N = 900, H = 1, D = 4, segments = { 900, 128 }, dilations = { 1, 1 }, merge = "sum", window = 150 },
    } do
      local c = direct.fill(case)
      local q, k, v, dout, dlse = inputs(c, 8)
      if c.merge == "lse_detach" then dlse = nil end
      local r = direct.forward(c, q, k, v)
      local got = results(r, direct.backward(r, dout, dlse))
      local want = oracle.run(c, q, k, v, dout, dlse)
      for name, data in pairs(got) do
        assert.is_true(direct.max_diff(data, want[name]) < 1e-11, name .. " in " .. text(c))
      end
    end
  end)

  it("gives the same bits for any number of threads", function()
    for _, case in ipairs {
      { B = 2, N = 300, H = 3, D = 24, segments = { 64, 300 }, dilations = { 1, 3 }, causal = true },
      { N = 2100, H = 1, D = 8, segments = { 2100 }, dilations = { 1 }, merge = "mean" },
      { B = 1, N = 200, H = 4, Hk = 2, D = 16, segments = { 50, 200 }, dilations = { 2, 3 }, merge = "sum" },
      -- several runs of keys that add to the same rows of dq, and several blocks of rows
      { N = 1700, H = 2, Hk = 1, D = 8, segments = { 1700 }, dilations = { 1 }, causal = true, window = 900 },
      { N = 1800, H = 2, D = 4, segments = { 1800, 900 }, dilations = { 2, 1 }, merge = "lse_detach" },
      { N = 1500, H = 1, D = 8, segments = { 1000 }, dilations = { 1 }, causal = true },
      { N = 700, H = 3, D = 8, segments = { 350, 100 }, dilations = { 1, 1 }, merge = "mean" },
      { N = 3, M = 900, H = 4, Hk = 2, D = 16, segments = { 900 }, dilations = { 1 }, align = "end" },
    } do
      local c = direct.fill(case)
      local q, k, v, dout = inputs(c, 3)
      for _, dtype in ipairs { "f32", "bf16" } do
        direct.any_threads(function()
          local r = direct.forward(c, q, k, v, { dtype = dtype })
          return results(r, direct.backward(r, dout))
        end)
      end
    end
  end)

  it("writes 0 and -inf for rows without keys, and finite gradients", function()
    local c = direct.fill { N = 6, H = 1, D = 3, segments = { 6 }, dilations = { 1 }, lengths = { 0 } }
    local q, k, v, dout, dlse = inputs(c, 1)
    for _, dtype in ipairs { "f64", "f32", "f16", "bf16" } do
      local r = direct.forward(c, q, k, v, { dtype = dtype })
      for name, data in pairs(results(r, direct.backward(r, dout, dlse))) do
        for _, x in ipairs(data) do assert.equal(name == "lse" and -math.huge or 0, x) end
      end
    end
  end)

  it("ends and passes NaN and infinity on, but never from padded keys", function()
    local nan = 0 / 0
    local c = direct.fill { N = 9, H = 1, D = 2, segments = { 3 }, dilations = { 1 }, lengths = { 8 } }
    for _, bad in ipairs { nan, math.huge, -math.huge } do
      for _, dtype in ipairs { "f64", "f32", "bf16" } do
        local q, k, v, dout = inputs(c, 2)
        k[3] = bad -- key 1, first segment
        k[17], v[17], v[18] = nan, nan, bad -- key 8 is padding
        local r = direct.forward(c, q, k, v, { dtype = dtype })
        local got = results(r, direct.backward(r, dout))
        if bad ~= bad then assert.is_true(got.out[1] ~= got.out[1] and got.dq[1] ~= got.dq[1]) end
        for _, name in ipairs { "out", "dq", "dk", "dv" } do
          for i = 7, 18 do assert.is_true(math.abs(got[name][i]) < 100, name .. " of a clean segment") end
        end
      end
    end
  end)

  it("gives a key whose scores are -inf no weight, and no part in gradients but 0 times infinity", function()
    local function exact(c, lists)
      return oracle.run(c, lists[1], lists[2], lists[3], lists[4], nil, { keep = philox.keep(c) })
    end
    for _, D in ipairs { 8, 40, 64 } do
      for _, pairs in ipairs { false, true } do
        infinite.each(D, 24, pairs, function(c)
          for _, dtype in ipairs { "f64", "f32", "f16", "bf16" } do
            infinite.check(c, dtype, infinite.on(0), exact)
          end
        end)
      end
    end
    for _, D in ipairs { 64, 128 } do -- several tiles of rows, blocks of keys
      infinite.each(D, 200, D == 128, function(c)
        for _, dtype in ipairs { "f32", "bf16" } do infinite.check(c, dtype, infinite.on(0), infinite.cpu) end
      end)
    end
  end)

  -- Values that are not finite, in one key or in one row of batch item 0, all heads: nothing that does not
  -- see them may change. A key's gradients may change if a changed row sees it.
  it("keeps NaN and infinity of masked keys and other rows away, in 120 random configurations", function()
    generator.seed(4711)
    for trial = 1, 120 do
      local c = random_config { most = trial % 20 == 0 and 300 or 36, D = 4 }
      if chance(0.3) then c.dropout, c.seed = 0.2, trial end
      local q, k, v, dout = inputs(c, trial)
      local clean = direct.forward(c, q, k, v)
      local want = results(clean, direct.backward(clean, dout))
      local where, bad = pick { "q", "k", "v", "dout" }, pick { 0 / 0, math.huge, -math.huge }
      local position = random((where == "k" or where == "v") and c.M or c.N) - 1
      local hit = ({ q = q, k = k, v = v, dout = dout })[where]
      local width = #hit / c.B / (hit == q and c.N or hit == dout and c.N or c.M)
      for e = 1, width do hit[position * width + e] = bad end
      local r = direct.forward(c, q, k, v)
      local got = results(r, direct.backward(r, dout))
      local function same(name, b, rows, row, heads, h, width_of_row)
        for e = 1, width_of_row do
          local at = ((b * rows + row) * heads + h) * width_of_row + e
          local x, y = got[name][at], want[name][at]
          assert.is_true(x == y or math.abs(x - y) <= 1e-12 * (1 + math.abs(y)),
            ("%s[%d,%d,%d] is %g, was %g before %s of position %d was %g in %s"):format(name, b, row, h, x,
              y, where, position, bad, text(c)))
        end
      end
      oracle.unreached(c, where == "k" or where == "v", position, same)
    end
  end)

  -- several tiles of query rows, several panels of columns: each has a place of its own in the backward
  it("keeps infinity of one of the last keys from other rows and keys, with many and wide rows", function()
    for _, dtype in ipairs { "f64", "f32" } do
      local c = direct.fill { N = 230, H = 1, D = 72, segments = { 230 }, dilations = { 1 }, causal = true,
        window = 20 }
      local q, k, v, dout = inputs(c, 5)
      local clean = direct.forward(c, q, k, v, { dtype = dtype })
      local want = results(clean, direct.backward(clean, dout))
      v[227 * c.D + 70] = math.huge
      local r = direct.forward(c, q, k, v, { dtype = dtype })
      local got = results(r, direct.backward(r, dout))
      local tolerance = dtype == "f64" and 1e-12 or 1e-4
      for i = 1, 206 * c.D do -- the rows that see key 227 see keys from 207 on
        for _, name in ipairs { "out", "dq", "dk", "dv" } do
          local x, y = got[name][i], want[name][i]
          assert.is_true(math.abs(x - y) <= tolerance * (1 + math.abs(y)),
            ("%s of row %d is %g, was %g"):format(name, (i - 1) / c.D, x, y))
        end
      end
    end
  end)

  it("answers few queries like the oracle, with every option and dtype", function()
    generator.seed(99)
    for trial = 1, 40 do
      local c = random_config { most = 8, D = pick { 3, 8, 33, 64 } }
      c.M, c.align, c.causal = 30 + random(90), "end", chance(0.7)
      local pattern = pick { { { c.M }, { 1 } }, { { 64, c.M }, { 1, 3 } } }
      c.segments, c.dilations = pattern[1], pattern[2]
      c.heads, c.offset = "all", "mod"
      c.padding, c.lengths = nil, nil
      if chance(0.4) then
        c.padding = {}
        for i = 1, c.B * c.M do c.padding[i] = chance(0.8) end
      end
      c.window = chance(0.3) and random(60) or nil
      c.dropout, c.seed = chance(0.3) and 0.3 or 0, trial
      local q, k, v = inputs(c, trial)
      for _, dtype in ipairs { "f64", "f32", "bf16" } do
        for _, a in ipairs { q, k, v } do
          for i = 1, #a do a[i] = direct.round[dtype](a[i]) end
        end
        local opts = { keep = philox.keep(c) }
        local want = oracle.run(c, q, k, v, nil, nil, opts)
        local sum = dtype == "f64" and direct.round.f64 or direct.round.f32
        opts.rounding = { result = direct.round[dtype], sum = sum }
        local naive = oracle.run(c, q, k, v, nil, nil, opts)
        local r = direct.forward(c, q, k, v, { dtype = dtype })
        for name, data in pairs { out = direct.read(r.out), lse = direct.read(r.lse) } do
          local found = direct.max_diff(data, want[name])
          local top = largest(want[name])
          local allowed = 2 * direct.max_diff(naive[name], want[name]) + 2 ^ -23 * top
          if dtype == "f64" then allowed = 1e-12 * (1 + top) end
          local what = ("%s %s in %s"):format(dtype, name, text(c))
          assert.is_true(found <= allowed, ("%g > %g: %s"):format(found, allowed, what))
        end
      end
    end
  end)

  it("drops pairs like dropout on the dense f32 weights, the same in forward and backward", function()
    local c = direct.fill { B = 2, N = 12, H = 2, D = 12, segments = { 12 }, dilations = { 2 }, dropout = 0.4,
                            seed = 4000000000, rng_offset = 9 }
    local v = filled(c.B * c.M * c.H * c.D, 0)
    for b = 0, 1 do for j = 0, 11 do for h = 0, 1 do v[((b * 12 + j) * 2 + h) * 12 + j + 1] = 1 end end end
    local r = direct.forward(c, filled(#v, 0), filled(#v, 0), v)
    local out, keep, dropped = direct.read(r.out), philox.keep(c), 0
    for b = 0, 1 do for n = 0, 11 do for h = 0, 1 do for j = 0, 11 do
      local x = out[((b * 12 + n) * 2 + h) * 12 + j + 1]
      local attended = oracle.attends(c, 1, b, h, n, j)
      local want = attended and keep(b, h, n, j) and 1 / 6 / 0.6 or 0
      if attended and want == 0 then dropped = dropped + 1 end
      assert.is_true(math.abs(x - want) < 1e-15)
    end end end end
    assert.is_true(dropped > 30 and dropped < 85) -- of 144
  end)

  it("does not keep branch_lse where the backward does not need it, and asks for it where it does", function()
    local function branch(case)
      local c = direct.fill(case)
      local q, k, v, dout = inputs(c, 1)
      return direct.forward(c, q, k, v), dout
    end
    local r = branch { N = 8, H = 2, D = 4, segments = { 4, 8 }, dilations = { 1, 2 }, merge = "lse" }
    assert.is_true(r.branch_lse.storage == nil)
    local dout
    r, dout = branch { N = 8, H = 2, D = 4, segments = { 4, 8 }, dilations = { 1, 2 }, merge = "mean" }
    assert.equal(4, r.branch_lse.ndim)
    r.branch_lse = nil
    local ok, message = pcall(direct.backward, r, dout)
    assert.is_false(ok)
    assert.equal("attention: merge 'mean' over 2 branches needs the forward's branch_lse in the backward",
      message)
  end)

  it("stays within the working memory that the plan states", function()
    local c = direct.fill { B = 2, N = 700, H = 2, Hk = 1, D = 24, segments = { 128, 512 },
                            dilations = { 1, 2 } }
    local q, k, v, dout = inputs(c, 1)
    C.lac_threads(1)
    C.lac_memory_guard(0)
    local info, stats = direct.info(direct.plan(c)), ffi.new("lac_memory_stats")
    local function peak(f)
      collectgarbage()
      collectgarbage()
      C.lac_memory_reset_peak()
      C.lac_memory(0, stats)
      local before = tonumber(stats.live)
      local result = f()
      C.lac_memory(0, stats)
      return tonumber(stats.peak) - before, result
    end
    local io_bytes = 2 * (2 * 700 * 2 * 24 + 2 * 2 * 700 * 24) + 4 * 2 * 700 * 2
    local forward, r = peak(function() return direct.forward(c, q, k, v, { dtype = "bf16" }) end)
    local extra = 2 * 2 * 700 * 2 * 24
    -- classes of the pool round up by at most a quarter
    local planned = tonumber(info.bytes_workspace_forward + info.bytes_accumulate_forward)
    assert.is_true(forward <= 1.25 * (planned + io_bytes + extra) + 65536)
    local backward = peak(function() return { direct.backward(r, dout) } end)
    planned = tonumber(info.bytes_workspace_backward + info.bytes_accumulate_backward)
    assert.is_true(backward <= 1.25 * (planned + io_bytes + extra) + 65536)
    C.lac_memory_guard(1)
    C.lac_threads(threads)
  end)

  it("states little more working memory than it takes, whatever the instruction set", function()
    local chosen = ffi.string(C.lac_isa(nil)):match("^%w+")
    local stats = ffi.new("lac_memory_stats")
    -- beyond the tensors that a call makes, here of f32, one thread's workspace is left
    local function peak(bytes, f)
      collectgarbage()
      collectgarbage()
      C.lac_memory_reset_peak()
      C.lac_memory(0, stats)
      local before = tonumber(stats.live)
      local result = f()
      C.lac_memory(0, stats)
      return tonumber(stats.peak) - before - bytes, result
    end
    C.lac_threads(1)
    C.lac_memory_guard(0)
    local checked = 0
    for _, set in ipairs { "avx512", "amx" } do
      for _, case in ipairs { { "lse", 512 }, { "lse_detach", 512 }, { "lse_detach", 256 } } do
        local merge, w = case[1], case[2] -- 256: tasks hold all keys of a segment
        if C.lac_isa(set) ~= nil then
          local c = direct.fill { N = 1024, H = 1, D = 64, segments = { w, 2 * w }, dilations = { 1, 2 },
                                  merge = merge }
          local q, k, v, dout = inputs(c, 1)
          local info = direct.info(direct.plan(c))
          local row = 1024 * 4
          local forward, r = peak((4 * 64 + 1) * row, function() -- q, k, v, out, lse
            return direct.forward(c, q, k, v, { dtype = "f32" })
          end)
          local backward = peak(4 * 64 * row, function() return { direct.backward(r, dout) } end)
          local f, b = tonumber(info.bytes_workspace_forward), tonumber(info.bytes_workspace_backward)
          local what = ("%s, %s, %d: forward %d of %d, backward %d of %d")
            :format(set, merge, w, forward, f, backward, b)
          assert(forward >= 0.7 * f and forward <= 1.25 * f + 65536, what)
          assert(backward >= 0.7 * b and backward <= 1.25 * b + 65536, what)
          checked = checked + 1
        end
      end
    end
    assert(checked > 0 or chosen == "avx2" or chosen == "baseline", "nothing was checked")
    assert(C.lac_isa(chosen) ~= nil)
    C.lac_memory_guard(1)
    C.lac_threads(threads)
  end)

  it("gives few long heads the same bits on any threads, however they are cut", function()
    for _, o in ipairs { { H = 1 }, { H = 1, causal = true }, { H = 2, causal = true, wild = true },
                         { H = 3, Hk = 1, dilations = { 2 } }, { H = 1, D = 40, causal = true, wild = true },
                         { B = 2, H = 1, N = 1000, segments = { 500 }, causal = true },
                         { H = 3, D = 80, causal = true } } do
      o.N, o.D, o.segments, o.dilations = o.N or 600, o.D or 24, o.segments or { 600 }, o.dilations or { 1 }
      local wild = o.wild
      o.wild = nil
      local c = direct.fill(o)
      local q, k, v, dout = inputs(c, 7)
      if wild then k[300 * c.D * c.Hk + 5] = -math.huge end -- its block is not multiplied in parts
      for _, dtype in ipairs { "f32", "bf16", "f64" } do
        direct.any_threads(function()
          local r = direct.forward(c, q, k, v, { dtype = dtype })
          local dq, dk, dv = direct.backward(r, dout)
          return results(r, dq, dk, dv)
        end)
      end
      if c.H == 1 and not wild then
        C.lac_threads(2)
        local r = direct.forward(c, q, k, v, { dtype = "f64" })
        local got, want = results(r, direct.backward(r, dout)), oracle.run(c, q, k, v, dout)
        C.lac_threads(threads)
        for name, data in pairs(want) do
          if got[name] then assert(direct.max_diff(got[name], data) < 1e-11, name .. text(c)) end
        end
      end
    end
  end)

  it("stops when asked to, and works again afterwards", function()
    local c = direct.fill { N = 64, H = 2, D = 8, segments = { 16 }, dilations = { 1 } }
    local q, k, v = inputs(c, 1)
    C.lac_interrupt(1)
    local ok, message = pcall(direct.forward, c, q, k, v)
    C.lac_interrupt(0)
    assert.is_false(ok)
    assert.equal("attention: interrupted", message)
    direct.forward(c, q, k, v)
  end)

  it("refuses bad tensors with both sides in the message", function()
    local c = direct.fill { B = 2, N = 8, H = 4, Hk = 2, D = 4, segments = { 4 }, dilations = { 1 },
      merge = "lse" }
    local plan = direct.plan(c)
    local function fresh()
      return { q = direct.tensor("f32", { 2, 8, 4, 4 }), k = direct.tensor("f32", { 2, 8, 2, 4 }),
               v = direct.tensor("f32", { 2, 8, 2, 4 }) }
    end
    local function message_of(change)
      local t, cfg = fresh(), direct.fill(c)
      change(t, cfg)
      local args, keep = direct.args(cfg, t.q, t.k, t.v)
      if t.key_padding then args.key_padding = t.key_padding end
      if t.key_lengths then args.key_lengths = t.key_lengths end
      local out, lse = direct.blank(), direct.blank()
      local status = C.lac_attend(plan, args, out, lse, nil)
      assert.is_true(status ~= 0 and keep ~= nil)
      assert.is_true(out.storage == nil and lse.storage == nil)
      return ffi.string(C.lac_last_error())
    end
    local function with(name, dtype, shape)
      return function(t) t[name] = direct.tensor(dtype, shape) end
    end
    local cases = {
      ["k has 3 heads, the plan has 2 (k is [2, 8, 3, 4])"] = with("k", "f32", { 2, 8, 3, 4 }),
      ["q has 7 queries, the plan has 8 (q is [2, 7, 4, 4])"] = with("q", "f32", { 2, 7, 4, 4 }),
      ["v has 5 head dimensions, the plan has 4 (v is [2, 8, 2, 5])"] = with("v", "f32", { 2, 8, 2, 5 }),
      ["v has 1 batch items, the plan has 2 (v is [1, 8, 2, 4])"] = with("v", "f32", { 1, 8, 2, 4 }),
      ["q must have 4 dimensions, got f32 [8, 4, 4]"] = with("q", "f32", { 8, 4, 4 }),
      ["q is f32 but k is f64"] = with("k", "f64", { 2, 8, 2, 4 }),
      ["q must be a floating-point tensor (f64, f32, f16, bf16), got i32"] = with("q", "i32", { 2, 8, 4, 4 }),
      ["v is missing"] = function(t) t.v = nil end,
      ["v is used after release"] = function(t) C.lac_tensor_release(t.v) end,
      ["dropout must be in [0, 1), got 1"] = function(_, cfg) cfg.dropout = 1 end,
      ["scale must be finite, got inf"] = function(_, cfg) cfg.scale = math.huge end,
      ["key_padding has 7 keys, the plan has 8 (key_padding is [2, 7])"] =
        with("key_padding", "bool", { 2, 7 }),
      ["key_padding must be bool, got f32"] = with("key_padding", "f32", { 2, 8 }),
      ["key_lengths must be i64 or i32, got f32"] = with("key_lengths", "f32", { 2 }),
    }
    for message, change in pairs(cases) do
      assert.equal("attention: " .. message, message_of(change))
    end
  end)

  it("refuses null pointers and wrong saved tensors", function()
    local c = direct.fill { N = 8, H = 2, D = 4, segments = { 4 }, dilations = { 1 } }
    local q, k, v, dout = inputs(c, 1)
    local r = direct.forward(c, q, k, v, { dtype = "f32" })
    local t = direct.blank()
    assert.is_true(C.lac_attend(nil, r.args, t, t, nil) ~= 0)
    assert.is_true(C.lac_attend(r.plan, nil, t, t, nil) ~= 0)
    assert.is_true(C.lac_attend(r.plan, r.args, nil, t, nil) ~= 0)
    assert.is_true(C.lac_attend(r.plan, r.args, t, nil, nil) ~= 0)
    assert.is_true(C.lac_attend_bwd(r.plan, r.args, nil, nil, nil, nil, nil, nil, nil, nil, nil) ~= 0)
    r.dtype = "f64"
    local ok, message = pcall(direct.backward, r, dout)
    assert.is_false(ok)
    assert.equal("attention: dout must be f32, got f64", message)
    r.dtype, r.lse = "f32", direct.tensor("f32", { 1, 8, 3 })
    ok, message = pcall(direct.backward, r, dout)
    assert.is_false(ok)
    assert.equal("attention: lse has 3 heads, the plan has 2 (lse is [1, 8, 3])", message)
  end)

  it("has written outside no block", function() assert.equal(broken, C.lac_memory_guard_errors()) end)
end)
