--- Options of single pairs (mask, bias, slopes, blocks) and packed sequences on CUDA, at the level of the C
-- functions.
--
-- Random configurations are those of support/attn_pairs.lua, with a fresh seed each run; values and
-- gradients, that of the bias among them, are judged as in attend_cuda_spec: against the oracle, or against
-- the CPU in f64 where the oracle takes minutes. attend_pairs_spec holds the CPU against the oracle.

local attn_device = require "support.attn_device"
local it = attn_device.it(it, pending)

local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local attn = require "support.attn_random"
local infinite = require "support.attn_infinite"
local philox = require "support.philox"
local P = require "support.attn_pairs"
local lac = require "lacuna"
local C = direct.C

-- forward and backward on a device
local function run(device, dtype, c, lists, layout)
  direct.device = device
  local ok, found = pcall(P.run, c, lists, { dtype = dtype, layout = layout })
  direct.device = 0
  if not ok then error(found .. " in " .. P.text(c), 0) end
  return found
end

local function with_oracle(c, dtype, lists, layout, what)
  local exact, naive = attn_device.references(c, dtype, lists, run)
  attn_device.judge(dtype, run(C.LAC_CUDA, dtype, c, lists, layout), exact, naive, what)
end

local function with_cpu(c, dtype, lists, layout, what)
  local exact, naive = attn_device.cpu(run, c, dtype, lists)
  attn_device.judge(dtype, run(C.LAC_CUDA, dtype, c, lists, layout), exact, naive, what)
end

-- Causal calls whose last row may not see the last key, by a mask or a bias, and whose dropout drops that
-- pair too, so that no row sees the key: f(c, text). Some have two branches, some blocks, all of them active.
local function hidden_and_dropped(f)
  for _, N in ipairs { 32, 64, 128 } do
    for trial = 0, N < 128 and 15 or 23 do
      local option, two, blocks = trial % 2 == 0 and "mask" or "bias", trial % 4 > 1, trial % 8 > 3
      local D = ({ 8, 64, 128 })[math.floor(trial / 8) + 1]
      local c = direct.fill { N = N, H = 1, D = D, causal = true, dropout = 0.3, seed = 0,
                              rng_offset = 5, segments = two and { N / 2, N } or { N },
                              dilations = two and { 1, 1 } or { 1 } }
      repeat c.seed = c.seed + 1 until not philox.keep(c)(0, 0, N - 1, N - 1)
      c[option] = { shape = { N, N }, data = {}, constant = true }
      for i = 1, N * N do c[option].data[i] = option == "mask" or 0.25 end
      c[option].data[N * N] = option == "bias" and -math.huge
      if blocks then
        c.block, c.blocks = 32, { shape = { N / 32, N / 32 }, data = {} }
        for i = 1, (N / 32) ^ 2 do c.blocks.data[i] = true end
      end
      f(c, ("%s of %d rows, D %d, %d branches%s"):format(option, N, c.D, #c.segments,
        blocks and " of blocks" or ""))
    end
  end
end

local function dtype_of(trial) return ({ "f64", "f32", "bf16", "f16" })[trial % 4 + 1] end
local function layout_of() return P.pick { false, "heads", "inner", "reversed" } or nil end

describe("options of single pairs on CUDA #gpu", function()
  local unharmed = attn_device.guard(setup, teardown)

  it("equal the oracle in every dtype, in 240 random configurations", function()
    local seed = attn.fresh() + 10
    P.seed(seed)
    for trial = 1, 240 do
      local dtype = dtype_of(trial)
      local c = P.config { most = trial % 10 == 0 and 90 or 30, D = P.pick { 3, 8, 16, 33, 64 },
                           blocks = trial % 3 == 0 }
      if c.bias and P.chance(0.3) and dtype ~= "f64" then c.bias.dtype = "f32" end
      local lists = { P.inputs(c, seed + trial, dtype) }
      if P.chance(0.5) then lists[5] = nil end
      local layout = layout_of()
      with_oracle(c, dtype, lists, layout,
        ("trial %d of seed %d, layout %s: %s"):format(trial, seed, tostring(layout), P.text(c)))
    end
  end)

  -- tiles have 16 to 128 rows and columns
  it("equal the CPU across many tiles, in 48 random configurations, D to 256", function()
    local seed = attn.fresh() + 11
    P.seed(seed)
    for trial = 1, 48 do
      local dtype = dtype_of(trial)
      local c = P.config { most = 600, segment = 500, D = P.pick { 16, 33, 64, 80, 128, 136, 256 },
                           blocks = trial % 2 == 0 }
      if c.blocks and P.chance(0.5) then
        c.block = P.pick { 64, 128, 200 }
        c.blocks.shape = { math.ceil(c.N / c.block), math.ceil(c.M / c.block) }
        c.blocks.layout, c.blocks.data = nil, {}
        for i = 1, c.blocks.shape[1] * c.blocks.shape[2] do c.blocks.data[i] = P.chance(0.4) end
      end
      local lists = { P.inputs(c, seed + trial, dtype) }
      with_cpu(c, dtype, lists, P.pick { false, "heads" } or nil,
        ("trial %d of seed %d: %s"):format(trial, seed, P.text(c)))
    end
  end)

  -- half types have kernels of their own for this; tiles have 16 or 32 rows where no block has more, those
  -- of half types 64 too
  it("equal the CPU with active blocks alone, in 120 random configurations", function()
    local seed = attn.fresh() + 14
    P.seed(seed)
    for trial = 1, 120 do
      local dtype = trial % 5 == 0 and "f32" or P.pick { "bf16", "f16" }
      local c = P.config { most = 700, segment = trial % 4 == 0 and 100 or 600,
                           D = P.pick { 8, 33, 64, 80, 128 }, blocks = "alone" }
      P.blocks(c, P.pick { 0.1, 0.3, 0.8 },
        trial % 2 == 0 and { 16, 17, 24, 32, 33, 48, 50, 63 } or { 64, 100, 128, 192, 256 })
      c.kernel = "portable"
      local lists = { P.inputs(c, seed + trial, dtype) }
      if P.chance(0.5) then lists[5] = nil end
      with_cpu(c, dtype, lists, P.pick { false, "heads" } or nil,
        ("trial %d of seed %d: %s"):format(trial, seed, P.text(c)))
    end
  end)

  -- a tile lists some hundred runs of active blocks at a time
  it("equal the CPU where a row or a column has hundreds of runs of active blocks", function()
    P.seed(15)
    for trial = 1, 16 do
      local dtype, long = dtype_of(trial), trial % 2 == 0
      local c = direct.fill { N = long and 20 or 14000, M = long and 14000 or 20, H = 2, Hk = 1,
                              D = P.pick { 16, 80 }, segments = { 16000 }, dilations = { P.pick { 1, 3 } },
                              offset = "mod", kernel = "portable" }
      local rows, columns, data = math.ceil(c.N / 16), math.ceil(c.M / 16), {}
      for i = 0, rows * columns - 1 do
        local along = math.floor(i / columns) + i % columns
        data[i + 1] = along % 2 == 0 and along % 150 < 140 or P.chance(0.05)
      end
      c.block, c.blocks = 16, { shape = { rows, columns }, data = data }
      with_cpu(c, dtype, { P.inputs(c, trial, dtype) }, nil, ("trial %d: %s"):format(trial, P.text(c)))
    end
  end)

  it("round f32 products to 11 bits where use_tf32 allows it, and no more", function()
    P.seed(77)
    for trial = 1, 12 do
      local c = P.config { most = 150, segment = 100, D = P.pick { 16, 40, 64, 128, 200 }, plain = true,
                           blocks = trial % 2 == 0 }
      local lists = { P.inputs(c, trial, "f32") }
      local exact = run(0, "f64", c, lists)
      lac.use_tf32(true)
      local ok, got = pcall(run, C.LAC_CUDA, "f32", c, lists)
      lac.use_tf32(false)
      assert(ok, got)
      for name, data in pairs(attn.together(got)) do
        local want = attn.together(exact)[name]
        local found, most = direct.max_diff(data, want), 2 ^ -8 * (1 + direct.largest(want))
        assert.is_true(found <= most, ("%s: %g > %g in %s"):format(name, found, most, P.text(c)))
      end
    end
  end)

  it("run packed sequences as the CPU runs them, with everything else", function()
    local seed = attn.fresh() + 12
    P.seed(seed)
    for trial = 1, 40 do
      local dtype = dtype_of(trial)
      local c = P.config { most = 12, segment = trial % 4 == 0 and 80 or 20, D = P.pick { 8, 20, 64 } }
      c.B, c.align, c.starts = 1, nil, { 0 }
      local before = 0
      for s = 1, P.random(5) do
        before = s > 1 and P.chance(0.4) and before or P.random(trial % 4 == 0 and 90 or 14) - 1
        c.starts[s + 1] = c.starts[s] + before
      end
      if c.starts[#c.starts] == 0 then c.starts = { 0, 5 } end
      c.N = c.starts[#c.starts]
      c.M = c.N
      local padded, masked, biased = c.padding, c.mask, c.bias
      c.padding, c.mask, c.bias = nil, nil, nil
      if padded then
        c.padding = {}
        for i = 1, c.N do c.padding[i] = P.chance(0.8) end
      end
      if masked then c.mask = P.mask(c, 0.7) end
      if biased then c.bias = P.bias(c, trial, true) end
      local lists = { P.inputs(c, seed + trial, dtype) }
      with_cpu(c, dtype, lists, P.pick { false, "heads" } or nil,
        ("trial %d of seed %d, starts %s: %s"):format(trial, seed, table.concat(c.starts, " "), P.text(c)))
    end
  end)

  it("run packed sequences of bf16 on kernels for Hopper where these fit", function()
    local c = direct.fill { N = 900, H = 2, D = 64, segments = { 256, 1024 }, dilations = { 1, 2 },
                            causal = true, starts = { 0, 300, 600, 900 } }
    local lists = { P.inputs(c, 8, "bf16") }
    with_cpu(c, "bf16", lists, nil, "packed")
  end)

  it("drop the pairs that the CPU drops, beside a mask", function()
    for _, dtype in ipairs { "f64", "f32", "bf16" } do
      local c = direct.fill { B = 2, N = 70, H = 2, D = 70, segments = { 70 }, dilations = { 1 },
                              dropout = 0.4, seed = 9, rng_offset = 77 }
      P.seed(3)
      c.mask = P.mask(c, 0.7)
      local v, zero = {}, {}
      for i = 1, c.B * c.M * c.Hk * c.D do v[i], zero[i] = 0, 0 end
      for b = 0, c.B - 1 do for j = 0, c.M - 1 do for h = 0, c.Hk - 1 do
        v[((b * c.M + j) * c.Hk + h) * c.D + j + 1] = 1
      end end end
      local want = direct.read(direct.forward(c, zero, zero, v).out)
      direct.device = C.LAC_CUDA
      local got = direct.read(direct.forward(c, zero, zero, v, { dtype = dtype }).out)
      direct.device = 0
      for i = 1, #want do assert.are.equal(want[i] == 0, got[i] == 0) end
    end
  end)

  it("give the same bits twice", function()
    P.seed(12)
    for trial = 1, 10 do
      local dtype = P.pick { "f32", "bf16", "f16" }
      local c = P.config { most = 400, segment = 300, D = P.pick { 32, 64, 128 },
                           blocks = trial % 2 == 0 and (trial % 4 == 0 or "alone") }
      local lists = { P.inputs(c, 3, dtype) }
      local first = run(C.LAC_CUDA, dtype, c, lists)
      for _ = 1, 3 do attn_device.same(run(C.LAC_CUDA, dtype, c, lists), first, P.text(c)) end
    end
  end)

  it("keep values that are not finite away from rows that may not see them", function()
    local seed = attn.fresh() + 13
    P.seed(seed)
    for trial = 1, 90 do
      local dtype = ({ "f64", "f32", "bf16" })[trial % 3 + 1]
      local c = P.config { most = trial % 10 == 0 and 200 or 40, D = P.pick { 4, 8 },
                           blocks = trial % 2 == 0 and (trial % 4 == 0 or "alone") }
      local lists = { P.inputs(c, seed + trial, dtype) }
      lists[5] = nil
      local want = run(C.LAC_CUDA, dtype, c, lists)
      local at, bad, key = P.pick { 2, 3 }, P.pick { 0 / 0, math.huge, -math.huge }, P.random(c.M) - 1
      for e = 1, c.Hk * c.D do lists[at][key * c.Hk * c.D + e] = bad end
      local got = run(C.LAC_CUDA, dtype, c, lists)
      local most = ({ f64 = 1e-12, f32 = 2e-6, bf16 = 2 ^ -6 })[dtype]
      local largest = 0
      for _, name in ipairs { "out", "lse", "dq", "dbias" } do
        largest = math.max(largest, direct.largest(want[name] or {}))
      end
      local function same(name, i, b, h, n)
        local x, y = got[name][i], want[name][i]
        if not (x == y or math.abs(x - y) <= most * (1 + largest)) then
          error(("%s %s[%d,%d,%d] is %g, was %g before key %d of input %d: trial %d of seed %d: %s"):format(
            dtype, name, b, n, h, x, y, key, at, trial, seed, P.text(c)), 0)
        end
      end
      for b = 0, c.B - 1 do for h = 0, c.H - 1 do for n = 0, c.N - 1 do
        local sees = false
        for g = 1, #c.segments do sees = sees or b == 0 and oracle.attends(c, g, b, h, n, key) end
        local row = (b * c.N + n) * c.H + h
        for e = 1, sees and 0 or c.D do
          same("out", row * c.D + e, b, h, n)
          same("dq", row * c.D + e, b, h, n)
        end
        if not sees then same("lse", row + 1, b, h, n) end
      end end end
    end
  end)

  -- A weight that is not a number may be in the sum of weights only: dropout takes it out of the result.
  it("keep them away where the pair is dropped as well", function()
    local most = { f64 = 1e-12, f32 = 2e-6, tf32 = 2 ^ -8, bf16 = 2 ^ -6, f16 = 2 ^ -9 }
    local function keeps_away(name, c, what)
      local dtype = name == "tf32" and "f32" or name
      local lists = { P.inputs(c, 1, dtype) }
      lists[5] = nil
      local want = run(C.LAC_CUDA, dtype, c, lists)
      for _, bad in ipairs { 0 / 0, math.huge, -math.huge } do
        for at = 2, 3 do
          local clean, last = lists[at], (c.N - 1) * c.D
          lists[at] = {}
          for i, x in ipairs(clean) do lists[at][i] = i > last and bad or x end
          local got = run(C.LAC_CUDA, dtype, c, lists)
          lists[at] = clean
          for result, list in pairs(want) do
            local found, share = direct.max_diff(got[result], list), most[name]
            if result == "lse" and name:match "f16" then share = 1e-4 end
            if found > share * (1 + direct.largest(list)) then
              error(("%s %s is off by %g with %g in input %d of a %s"):format(name, result, found, bad, at,
                what), 0)
            end
          end
        end
      end
    end
    hidden_and_dropped(function(c, what)
      c.kernel = "portable"
      for _, dtype in ipairs { "f64", "f32", "bf16", "f16" } do keeps_away(dtype, c, what) end
      lac.use_tf32(true)
      local ok, message = pcall(keeps_away, "tf32", c, what)
      lac.use_tf32(false)
      if not ok then error(message, 0) end
      if c.D < 64 or c.N < 128 or c.blocks then return end
      c.kernel = "hopper"
      for _, dtype in ipairs { "bf16", "f16" } do keeps_away(dtype, c, what .. ", for Hopper") end
    end)
  end)

  it("write 0 and -inf for rows that are left without keys", function()
    for _, option in ipairs { "mask", "bias", "blocks" } do
      for _, dtype in ipairs { "f64", "f32", "f16", "bf16" } do
        local c = direct.fill { N = 32, H = 1, D = 3, segments = { 32 }, dilations = { 1 } }
        local data = {}
        for i = 1, 1024 do data[i] = option == "bias" and (i > 512 and 0 or -math.huge) or i > 512 end
        c[option] = { shape = { 32, 32 }, data = data }
        if option == "blocks" then
          c.block, c.blocks = 16, { shape = { 2, 2 }, data = { false, false, true, true } }
        end
        local got = run(C.LAC_CUDA, dtype, c, { P.inputs(c, 1, dtype) })
        for e = 1, 48 do
          assert.equal(0, got.out[e])
          assert.equal(0, got.dq[e])
        end
        assert.equal(-math.huge, got.lse[16])
        assert.is_true(got.lse[17] > -math.huge and got.out[49] ~= 0)
      end
    end
  end)

  it("leave a key whose scores are -inf no weight, and no part in gradients but 0 times infinity", function()
    for _, D in ipairs { 8, 64, 128 } do
      for _, N in ipairs { 24, 200 } do
        infinite.each(D, N, true, function(c)
          for _, dtype in ipairs { "f64", "f32", "f16", "bf16" } do
            infinite.check(c, dtype, infinite.on(C.LAC_CUDA), infinite.cpu, dtype == "f64")
          end
        end)
      end
    end
  end)

  it("are refused by kernels for Hopper by name", function()
    local c = direct.fill { N = 64, H = 1, D = 64, segments = { 64 }, dilations = { 1 },
                            kernel = "hopper" }
    local lists = { P.inputs(c, 1, "bf16") }
    for option, what in pairs { mask = "there is a block_mask, with", bias = "the bias has a gradient",
                                blocks = "blocks are not multiples of 128 rows" } do
      local one = {}
      for key, value in pairs(c) do one[key] = value end
      P.seed(1)
      if option == "mask" then one.mask = P.mask(c, 0.5) end
      if option == "bias" then one.bias = P.bias(c, 1) end
      if option ~= "bias" then P.blocks(one, 0.5) end
      local ok, message = pcall(run, C.LAC_CUDA, "bf16", one, lists)
      assert.is_false(ok)
      assert.matches("kernel 'hopper' cannot do this call: " .. what, message, 1, true)
    end
  end)

  it("write over no guard bytes", unharmed)
end)
