--- Attention whose products a matrix unit makes in three parts of bf16 (c/cpu/attn_amx.inc): as exact as f32.
--
-- Every result is compared with the engine's own f64, which attend_spec.lua holds to the oracle, and with f32
-- in multiply-adds, added up in three orders (of a few rows, one may round well by chance): parts may not be
-- worse. The rest is what taking numbers apart could break: infinities and NaN, rows that do not fill a tile,
-- threads. Without such a unit there is nothing to test here, and the spec says so.

local direct = require "support.attn_direct"
local pairs_of = require "support.attn_pairs"
local choices = require "support.random"
local ffi, C = direct.ffi, direct.C

local isa = ffi.string(C.lac_isa(nil)):match("^%w+")
local present = C.lac_isa("amx") ~= nil
C.lac_isa(isa)

local generator = choices.generator()
local largest = direct.largest
local random, pick, chance = generator.random, generator.pick, generator.chance

-- segments of more rows than are answered without packing, of all sizes against tiles of 32 rows and keys
local function random_config(trial)
  local c = { B = random(2), N = 10 + random(trial % 8 == 0 and 600 or 100), segments = {}, dilations = {},
              D = pick { 32, 48, 50, 64, 72, 100 }, heads = "all", offset = pick { "mod", "branch" } }
  c.M = chance(0.7) and c.N or 10 + random(150)
  c.Hk = random(2)
  c.H = c.Hk * pick { 1, 1, 2 }
  for g = 1, random(2) do c.segments[g], c.dilations[g] = 40 + random(c.N), pick { 1, 1, 2, 3 } end
  c.merge = pick { "mean", "lse", "lse_detach" }
  c.causal, c.align = chance(0.6), chance(0.5) and "end" or nil
  if chance(0.4) then c.window = 5 + random(90) end
  if chance(0.3) then
    c.padding = {}
    for i = 1, c.B * c.M do c.padding[i] = chance(0.8) end
  end
  if chance(0.3) then
    c.lengths, c.lengths_dtype = {}, "i32"
    -- none or a good many: of two or three keys dq is what cancelling leaves, in too few numbers to judge by
    for i = 1, c.B do c.lengths[i] = chance(0.1) and 0 or math.min(c.M, 9 + random(c.M)) end
  end
  c.dedup = c.merge == "lse" and chance(0.3)
  if chance(0.2) then c.dropout, c.seed = 0.2, trial end
  return direct.fill(c)
end

-- the same in active blocks, of which a lattice has 128 rows or more, so that the unit takes them
local function random_blocks(trial)
  local c = random_config(trial)
  local thin = math.max(unpack(c.dilations))
  c.N, c.M = c.N + 150 * thin, c.M + 150 * thin
  for g = 1, #c.segments do c.segments[g] = c.segments[g] + 150 * thin end
  if c.padding then
    for i = 1, c.B * c.M do c.padding[i] = chance(0.8) end
  end
  pairs_of.seed(trial)
  pairs_of.blocks(c, pick { 0.3, 0.6 }, { 128 * thin, 128 * thin + 9, 150 * thin, 192 * thin })
  if trial % 4 == 0 then c.mask = pairs_of.mask(c, 0.8) end
  if trial % 4 == 1 then c.bias = pairs_of.bias(c, trial, true) end
  if trial % 4 == 2 then
    c.alibi = {}
    for h = 1, c.H do c.alibi[h] = 2 ^ -h / 4 end
  end
  return c
end

local function inputs(c, seed)
  local nq, nk = c.B * c.N * c.H * c.D, c.B * c.M * c.Hk * c.D
  local all = { direct.numbers(seed, nq), direct.numbers(seed + 1, nk), direct.numbers(seed + 2, nk),
                direct.numbers(seed + 3, nq) }
  -- nearly one key a row, so that the other weights go down to nothing
  for i = 1, seed % 2 == 0 and #all[1] or 0 do all[1][i] = 16 * all[1][i] end
  for _, a in ipairs(all) do
    for i = 1, #a do a[i] = direct.round.f32(a[i]) end
  end
  return all
end

local function run(c, all, dtype, name)
  assert(C.lac_isa(name) ~= nil)
  local r = direct.forward(c, all[1], all[2], all[3], { dtype = dtype })
  local dq, dk, dv = direct.backward(r, all[4])
  return { out = direct.read(r.out), lse = direct.read(r.lse), dq = direct.read(dq), dk = direct.read(dk),
           dv = direct.read(dv) }
end

-- Gradients are judged together: where a row has few keys, dq is what is left of numbers that cancel.
local function together(r)
  local all = {}
  for _, name in ipairs { "dq", "dk", "dv" } do
    for _, x in ipairs(r[name]) do all[#all + 1] = x end
  end
  return { out = r.out, lse = r.lse, gradients = all }
end

describe("attention in parts", function()
  if not present then
    pending("needs a processor with AMX (this one has " .. isa .. ")")
    return
  end
  local threads = C.lac_threads(0)

  setup(function() C.lac_memory_guard(1) end)
  teardown(function()
    C.lac_isa(isa)
    C.lac_threads(threads)
    C.lac_memory_guard(0)
  end)

  local function exact(random_case, trials)
    generator.seed(31)
    local different = 0
    for trial = 1, trials do
      local c = random_case(trial)
      local all = inputs(c, trial)
      local function results(...) return together(run(c, all, ...)) end
      local want, got = results("f64", "amx"), results("f32", "amx")
      local plain = {}
      for i, name in ipairs { "avx512", "avx2", "baseline" } do plain[i] = results("f32", name) end
      if direct.max_diff(got.out, plain[1].out) > 0 then different = different + 1 end
      for name, data in pairs(got) do
        local error_of_plain = 0
        for _, one in ipairs(plain) do
          error_of_plain = math.max(error_of_plain, direct.max_diff(one[name], want[name]))
        end
        local allowed = 2 * error_of_plain + 2 ^ -22 * (1 + largest(want[name]))
        local found = direct.max_diff(data, want[name])
        assert.is_true(found <= allowed,
          ("%s: %g > %g in %s"):format(name, found, allowed, choices.text(c)))
      end
    end
    assert.is_true(different > trials / 2, "multiply-adds have the same bits: the unit was not used")
  end

  it("is as exact as f32 in multiply-adds, in 12 random configurations", function()
    exact(random_config, 12)
  end)
  it("is that in 16 random configurations of active blocks", function() exact(random_blocks, 16) end)
  it("is that where some rows of a tile see none of its keys", function()
    exact(function()
      return direct.fill { N = 300, M = 84, H = 1, D = 64, segments = { 300 }, dilations = { 1 },
                           window = 40 }
    end, 1)
  end)
  it("is that in blocks of many rows, cut by chunks of keys, in a window", function()
    exact(function(trial)
      local c = direct.fill { N = 700, M = 700, H = 1, D = 64, segments = { 700 }, dilations = { 1 },
                              window = trial < 3 and 100 or nil, causal = trial ~= 2, merge = "lse" }
      pairs_of.seed(trial)
      pairs_of.blocks(c, 0.7, { 300 })
      return c
    end, 3)
  end)

  -- of whole pieces, of which products are made while others become probabilities, and pieces that bands cut
  it("is that in long rows of 32, 64 and 128 numbers, whose products overlap", function()
    exact(function(trial)
      return direct.fill { N = 650 + 13 * trial, H = 2, Hk = 1, D = 2 ^ (5 + (trial - 1) % 3),
                           segments = { 650 + 13 * trial }, dilations = { 1 }, causal = trial > 3,
                           window = trial > 6 and 290 or nil, dropout = trial == 2 and 0.2 or 0, seed = trial,
                           lengths = trial == 5 and { 600 } or nil, lengths_dtype = "i32" }
    end, 9)
  end)

  it("is that where a task has more than 32 rows of blocks, whose memory is used again", function()
    C.lac_threads(1)
    exact(function(trial)
      local n = 4400
      local c = direct.fill { N = n, M = n, H = 1, D = 32, segments = { n }, dilations = { 1 },
                              causal = trial == 2 }
      pairs_of.seed(trial)
      pairs_of.blocks(c, 0.06, { 128 })
      return c
    end, 2)
    C.lac_threads(threads)
  end)

  -- One part or two are all of a half number: sums are those of f32, and results differ from f64's by what
  -- rounding them to the half type takes: x * 2^-8 or 2^-11 at most.
  it("takes half types as they are", function()
    local step = { bf16 = 2 ^ -8, f16 = 2 ^ -11 }
    for _, dtype in ipairs { "bf16", "f16" } do
      for _, case in ipairs {
        { N = 150, H = 2, D = 64, segments = { 150 }, dilations = { 1 } },
        { N = 200, H = 2, Hk = 1, D = 72, segments = { 200 }, dilations = { 1 }, causal = true, window = 90 },
        { N = 260, H = 1, D = 128, segments = { 260 }, dilations = { 1 }, dropout = 0.25, seed = 4 },
        -- a third of dout is no half number any more
        { N = 180, H = 1, D = 48, segments = { 60, 90, 180 }, dilations = { 1, 1, 2 }, heads = "all",
          merge = "mean" },
        { N = 200, H = 2, Hk = 1, D = 48, segments = { 200 }, dilations = { 1 }, causal = true,
          sizes = { 137 } },
        { N = 300, H = 1, D = 64, segments = { 300 }, dilations = { 1 }, sizes = { 128 }, merge = "mean" },
      } do
        local c = direct.fill(case)
        if c.sizes then pairs_of.blocks(c, 0.6, c.sizes) end
        local all = inputs(c, 5)
        for _, a in ipairs(all) do
          for i = 1, #a do a[i] = direct.round[dtype](a[i]) end
        end
        local want, got = run(c, all, "f64", "amx"), run(c, all, dtype, "amx")
        for name, data in pairs(got) do
          local most = largest(want[name])
          local slack = 2 ^ -19 * most + (name == "lse" and 0 or 2 ^ -24) -- f16's smallest half step
          -- the deltas are made of out as it was rounded
          if name == "dq" or name == "dk" then slack = slack + step[dtype] * most end
          local factor = name == "lse" and 0 or 1.01 * step[dtype]
          for i, x in ipairs(data) do
            local y = want[name][i]
            local allowed = factor * math.abs(y) + slack
            assert.is_true(x == y or math.abs(x - y) <= allowed,
              ("%s %s[%d]: %g for %g, D = %d"):format(dtype, name, i, x, y, c.D))
          end
        end
      end
    end
  end)

  -- numbers of one sign whose products cancel would show a part that is left out
  it("keeps all digits of numbers that are close to each other", function()
    local c = direct.fill { N = 64, H = 1, D = 64, segments = { 64 }, dilations = { 1 } }
    local all = inputs(c, 7)
    for i = 1, #all[3] do all[3][i] = direct.round.f32(1000 + all[3][i] / 64) end
    local want, plain = run(c, all, "f64", "amx"), run(c, all, "f32", "avx512")
    local got = run(c, all, "f32", "amx")
    assert.is_true(direct.max_diff(got.out, want.out) <= 2 * direct.max_diff(plain.out, want.out))
  end)

  -- results of the unit: finite and equal where those of multiply-adds are
  local function beside_multiply_adds(c, all, dtype)
    local plain, got = run(c, all, dtype, "avx512"), run(c, all, dtype, "amx")
    for _, name in ipairs { "out", "lse", "dq", "dk", "dv" } do
      local scale = (dtype == "f32" and 1e-3 or 2 ^ -6) * (1 + largest(plain[name]))
      for i, x in ipairs(plain[name]) do
        local y = got[name][i]
        local function infinite(z) return z ~= z or math.abs(z) == math.huge end
        local broken = infinite(x) and infinite(y)
        if not (broken or x == y or math.abs(x - y) <= scale) then
          error(("%s[%d]: %g and %g in %s"):format(name, i, x, y, choices.text(c)))
        end
      end
    end
  end

  it("has infinities and NaN where multiply-adds have them", function()
    generator.seed(8)
    for trial = 1, 28 do
      local c = (trial <= 14 and random_config or random_blocks)(trial)
      c.dropout = 0
      local dtype = trial % 3 == 0 and "bf16" or "f32" -- which is looked through as it is
      if dtype == "bf16" then c.causal = true end
      local all = inputs(c, trial)
      local hit = all[dtype == "bf16" and 3 or random(4)] -- 0 times an infinite value is NaN
      hit[random(#hit)] = pick { 0 / 0, math.huge, -math.huge }
      beside_multiply_adds(c, all, dtype)
    end
  end)

  -- The pass of its own that makes such deltas multiplies blocks of keys that are not finite by row panels,
  -- which the pass of the gradients alone once packed.
  it("has them in the deltas of branches in active blocks", function()
    generator.seed(9)
    for trial = 1, 16 do
      local dtype = trial % 4 == 0 and "bf16" or "f32"
      local c = direct.fill { N = 330 + 7 * trial, H = 1, D = pick { 32, 64, 72 }, heads = "all",
                              segments = { 400, 300 }, dilations = { 1, 1 }, causal = true,
                              merge = trial % 2 == 0 and "lse_detach" or "mean" }
      c.M = c.N
      pairs_of.seed(trial)
      pairs_of.blocks(c, 0.8, { 128, 150 })
      if trial % 3 == 0 then c.bias = pairs_of.bias(c, trial, true) end
      local all = inputs(c, 2 * trial + 1)
      local hit = all[dtype == "f32" and trial % 3 == 1 and 2 or 3]
      hit[random(#hit)] = pick { 0 / 0, math.huge, -math.huge }
      beside_multiply_adds(c, all, dtype)
    end
  end)

  it("gives the same bits for any number of threads", function()
    C.lac_isa("amx")
    for _, case in ipairs {
      { B = 2, N = 500, H = 3, D = 48, segments = { 100, 500 }, dilations = { 1, 3 }, causal = true },
      { N = 1700, H = 2, Hk = 1, D = 48, segments = { 1700 }, dilations = { 1 }, window = 300 },
      { N = 1400, H = 1, D = 64, segments = { 1400, 700 }, dilations = { 2, 1 }, merge = "lse_detach" },
      { N = 1300, H = 2, D = 32, segments = { 1300 }, dilations = { 1 } },
      { N = 1100, H = 1, D = 32, segments = { 1100 }, dilations = { 1 }, causal = true },
      { N = 1400, H = 2, Hk = 1, D = 48, segments = { 1400 }, dilations = { 1 }, sizes = { 128 } },
      { N = 1500, H = 1, D = 48, segments = { 1500, 300 }, dilations = { 2, 1 }, merge = "mean",
        sizes = { 270 } },
    } do
      local c = direct.fill(case)
      if c.sizes then pairs_of.blocks(c, 0.2, c.sizes) end
      local all = inputs(c, 3)
      all[1][7 * c.H * c.D + 3] = math.huge -- one row that goes another way
      for _, dtype in ipairs{ "f32", "bf16" } do
        direct.any_threads(function() return run(c, all, dtype, "amx") end)
      end
    end
  end)
end)
