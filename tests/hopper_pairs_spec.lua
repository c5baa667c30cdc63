--- Dropout, slopes (ALiBi), padding, masks and biases in the kernels for Hopper: against the oracle, the CPU
-- and portable kernels.
--
-- The kernel is forced, so that a call which it could not do would fail here. Random configurations have
-- one to five of them, with whatever else these kernels take; attn_random says how they are made and
-- poisoned. Keys that are padding are sometimes NaN; not always, because rows that are then computed again
-- would hide what the tiles made of them. Which pairs dropout keeps must be the same everywhere, bit by
-- bit: weights that are all equal times values that are one key each show it. The CPU in f64 stands in for
-- the oracle past a few tiles.

local attn_device = require "support.attn_device"
local it = attn_device.it(it, pending)

local direct = require "support.attn_direct"
local attn = require "support.attn_random"
local options_of = require "support.attn_pairs"
local C = direct.C
local random, pick, chance = attn.random, attn.pick, attn.chance
local NAN = 0 / 0

-- keys of every batch item that are none: behind its last one, before its first one, anywhere, all
local function padding(c)
  local kept = {}
  for _ = 1, c.B do
    local kind, from, to = random(8), 1, c.M
    if kind <= 3 or kind == 7 then to = random(c.M + 1) - 1 end
    if kind >= 3 and kind <= 5 then from = random(c.M) end
    for key = 1, c.M do
      kept[#kept + 1] = kind ~= 8 and key >= from and key <= to and (kind < 6 or chance(0.7))
    end
  end
  return kept
end
local function poison_padding(c, lists)
  local width = c.Hk * c.D
  for i = 1, c.padding and chance(0.2) and c.B * c.M or 0 do
    for e = (i - 1) * width + 1, c.padding[i] and 0 or i * width do lists[2][e], lists[3][e] = NAN, NAN end
  end
end
-- a mask, a bias of constants (in f32 on the device, or not), or both; small ones in any shape
local function mask_and_bias(c)
  local one = c.B * c.H * c.N * c.M < 300000 and c or setmetatable({ B = 1, H = 1 }, { __index = c })
  local which = random(3)
  options_of.seed(random(1000000))
  if which ~= 2 then c.mask = options_of.mask(one, pick { 0.9, 0.5, 0.05 }) end
  if which == 1 then return end
  c.bias = options_of.bias(one, random(1000), chance(0.3))
  c.bias.constant, c.bias.wide, c.bias.times = true, chance(0.3), pick { 1, 1, 20 }
end
local function inputs(c, seed, dtype, ...)
  local lists = attn_device.inputs(c, seed, dtype, ...)
  poison_padding(c, lists)
  for i = 1, c.bias and #c.bias.data or 0 do
    c.bias.data[i] = direct.round[dtype](c.bias.data[i] * c.bias.times)
  end
  return lists
end

-- options: those of attn_random; forward: alone, with any number of rows
local function config(options)
  options.D = pick { 64, 128, 8 * random(16) }
  while true do
    local c = attn.random_config(options)
    local fits = true
    for g = 1, #c.segments do
      local rows = math.floor((math.min(c.segments[g], c.N) - 1) / c.dilations[g]) + 1
      fits = fits and (options.forward or rows >= 32)
    end
    if fits then
      c.dedup, c.padding, c.scale, c.kernel = false, nil, pick { 0, 0.3, 0.05 }, "hopper"
      local which = random(8) -- dropout, slopes, both, padding, mask and bias: the last two with anything
      c.padding = (which == 4 or chance(0.4)) and padding(c) or nil
      if which > 5 then mask_and_bias(c) end
      if which > 5 then which = random(5) end
      c.dropout = which ~= 2 and which < 4 and pick { 0.1, 0.5, 0.9 } or 0
      c.seed, c.rng_offset = random(1000), random(1000)
      c.alibi = (which == 2 or which == 3) and {} or nil
      for h = 1, c.alibi and c.H or 0 do c.alibi[h] = direct.round.f32(pick { 0.7, 0.1, 0.004 } * 2 ^ -h) end
      return c
    end
  end
end

local function wide(run)
  return function(where, dtype, c, ...)
    if c.bias then c.bias.dtype = c.bias.wide and where ~= 0 and "f32" or nil end
    return run(where, dtype, c, ...)
  end
end
local forward, both = wide(attn_device.forward), wide(attn_device.both)

describe("options of pairs on Hopper #gpu", function()
  local unharmed = attn_device.guard(setup, teardown)

  it("equal the oracle in 80 random forwards", function()
    local seed = attn.fresh()
    attn.seed(seed)
    for trial = 1, 80 do
      local c, dtype = config { most = trial % 5 == 0 and 150 or 50, segment = 50, forward = true },
                       pick { "bf16", "f16" }
      local lists = inputs(c, seed + trial, dtype)
      local got = forward(C.LAC_CUDA, dtype, c, lists, pick { false, false, "heads" } or nil)
      local exact, naive = attn_device.references(c, dtype, lists)
      attn_device.judge(dtype, got, exact, naive,
        ("trial %d of seed %d: %s"):format(trial, seed, attn.text(c)))
    end
  end)

  it("equal the CPU across tiles in 320 random forwards", function()
    local seed = attn.fresh() + 1
    attn.seed(seed)
    for trial = 1, 320 do
      local most, dtype = trial % 8 == 0 and 1200 or 400, pick { "bf16", "f16" }
      local c = config { most = most, segment = most, heads = 1, forward = true }
      local lists = inputs(c, seed + trial, dtype)
      local got = forward(C.LAC_CUDA, dtype, c, lists, pick { false, false, "heads" } or nil)
      local exact, naive = attn_device.cpu(forward, c, dtype, lists)
      attn_device.judge(dtype, got, exact, naive,
        ("trial %d of seed %d: %s"):format(trial, seed, attn.text(c)))
    end
  end)

  it("have the oracle's gradients in 10 random configurations, the CPU's across tiles in 280", function()
    local seed = attn.fresh() + 2
    attn.seed(seed)
    for trial = 1, 290 do
      local dtype, small = pick { "bf16", "f16" }, trial <= 10
      local most = small and 80 or trial % 40 == 0 and 1000 or trial % 8 == 0 and 400 or 160
      local c = config { most = most, segment = most, heads = small and 1 or 2 }
      local lists = inputs(c, seed + trial, dtype, true)
      local got = both(C.LAC_CUDA, dtype, c, lists, pick { false, false, "heads" } or nil)
      local exact, naive
      if small then exact, naive = attn_device.references(c, dtype, lists, both)
      else exact, naive = attn_device.cpu(both, c, dtype, lists) end
      exact.dbias, naive.dbias = nil, nil -- the bias is a constant
      attn_device.judge(dtype, got, exact, naive,
        ("trial %d of seed %d: %s"):format(trial, seed, attn.text(c)))
    end
  end)

  -- q = 0: all weights of a row are equal; v (forward) and dout (backward) pick out single pairs
  it("keep the pairs that the other kernels keep, bit by bit", function()
    local n, D, seed = 200, 128, attn.fresh() + 3
    attn.seed(seed)
    local function zeros(count)
      local list = {}
      for i = 1, count do list[i] = 0 end
      return list
    end
    local function units(heads, first) -- row first + d of head h is 1 in column d
      local list = zeros(n * heads * D)
      for h = 0, heads - 1 do
        for d = 0, D - 1 do if first + d < n then list[((first + d) * heads + h) * D + d + 1] = 1 end end
      end
      return list
    end
    for trial = 1, 12 do
      local r = pick { 1, 1, 2, 3, 5 }
      local c = direct.fill { N = n, M = n - pick { 0, 0, 1, 2 }, H = 2, Hk = 2, D = D,
                              segments = { pick { 200, 131 } }, dilations = { r }, offset = "mod",
                              causal = chance(0.3), dropout = pick { 0.2, 0.5 },
                              seed = random(1000) * 2 ^ 40 + random(1000), rng_offset = random(1000) * 2 ^ 34,
                              kernel = "hopper" }
      local first = pick { 0, 72 }
      local lists = { zeros(n * 2 * D), zeros(c.M * 2 * D), units(2, first), units(2, first) }
      for i = #lists[3], c.M * 2 * D + 1, -1 do lists[3][i] = nil end
      local mine = both(C.LAC_CUDA, "bf16", c, lists)
      local portable = both(C.LAC_CUDA, "bf16", c, lists, nil, "portable")
      local cpu = both(0, "bf16", c, lists)
      local seen, dropped = 0, 0
      for _, name in ipairs { "out", "dv" } do
        for i, x in ipairs(mine[name]) do
          local kept = x ~= 0
          seen, dropped = seen + 1, dropped + (kept and 0 or 1)
          if kept ~= (portable[name][i] ~= 0) or kept ~= (cpu[name][i] ~= 0) then
            error(("%s[%d]: trial %d of seed %d: %s"):format(name, i, trial, seed, attn.text(c)), 0)
          end
        end
      end
      assert.is_true(dropped < seen)
    end
  end)

  it("give the same bits twice, and keep NaN of masked keys away", function()
    attn.seed(14)
    for _ = 1, 6 do
      local dtype = pick { "bf16", "f16" }
      local c = config { most = 700, segment = 700, heads = 1 }
      c.causal, c.align, c.M = true, nil, c.N
      c.padding = c.padding and padding(c)
      local pairs_too = c.mask or c.bias
      c.mask, c.bias = nil, nil
      if pairs_too then mask_and_bias(c) end
      local lists = { attn.inputs(c, 3, dtype) }
      lists[5] = nil
      local first = both(C.LAC_CUDA, dtype, c, lists)
      attn_device.same(both(C.LAC_CUDA, dtype, c, lists), first, attn.text(c))
      local key = c.N - 2 -- the last two rows of item 0 may see it
      for d = 1, c.Hk * c.D do lists[3][key * c.Hk * c.D + d] = NAN end
      local spoilt = both(C.LAC_CUDA, dtype, c, lists)
      for i = 1, key * c.H * c.D do
        local x, y = spoilt.out[i], first.out[i]
        assert.is_true(math.abs(x - y) <= 2 ^ -6 * (1 + math.abs(y)), ("out[%d]: %s"):format(i, attn.text(c)))
      end
    end
  end)

  it("take padding behind the last key for lengths", function()
    attn.seed(31)
    for trial = 1, 6 do
      local c, dtype = config { most = 700, segment = 700, heads = 1 }, pick { "bf16", "f16" }
      c.dropout, c.alibi, c.mask, c.bias = 0, nil, nil, nil
      local plain = {}
      for key, value in pairs(c) do plain[key] = value end
      plain.padding, plain.lengths, plain.lengths_dtype = nil, {}, "i32"
      c.padding, c.lengths = {}, nil
      for b = 1, c.B do
        plain.lengths[b] = random(c.M + 1) - 1
        for key = 1, c.M do c.padding[#c.padding + 1] = key <= plain.lengths[b] end
      end
      local lists = { attn.inputs(c, trial, dtype) }
      attn_device.near(both(C.LAC_CUDA, dtype, c, lists), both(C.LAC_CUDA, dtype, plain, lists), attn.text(c))
    end
  end)

  it("keep NaN and infinity of padding and hidden pairs away", function()
    attn.seed(41)
    for trial = 1, 16 do
      local c, dtype = config { most = 300, segment = 300, heads = 1 }, pick { "bf16", "f16" }
      c.padding, c.lengths, c.mask, c.bias = {}, nil, nil, nil
      for i = 1, c.B * c.M do c.padding[i] = chance(0.7) end
      local lists = { attn.inputs(c, trial, dtype) }
      lists[5] = nil
      local hidden = trial % 2 == 0 and { shape = { c.B, 1, c.N, c.M }, data = {}, constant = true }
      local key = trial % 4 == 0 and "bias" or "mask"
      for i = 0, hidden and c.B * c.N * c.M - 1 or -1 do
        local kept = c.padding[math.floor(i / (c.N * c.M)) * c.M + i % c.M + 1]
        if key == "bias" then kept = kept and 0 or -math.huge end
        hidden.data[i + 1] = kept
      end
      local kept_keys = c.padding
      if hidden then c[key], c.padding = hidden, nil end
      local first, width = both(C.LAC_CUDA, dtype, c, lists), c.Hk * c.D
      local bad = pick { NAN, math.huge, -math.huge }
      for i = 1, c.B * c.M do
        for e = (i - 1) * width + 1, kept_keys[i] and 0 or i * width do lists[pick { 2, 3 }][e] = bad end
      end
      local spoilt = both(C.LAC_CUDA, dtype, c, lists)
      for name, list in pairs(first) do
        local most = 2 ^ -6 * (1 + direct.largest(list))
        assert.is_true(direct.max_diff(list, spoilt[name]) <= most, name .. " in " .. attn.text(c))
      end
    end
  end)

  it("wrote over no guard bytes", unharmed)
end)
