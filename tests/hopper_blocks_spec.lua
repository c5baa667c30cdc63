--- Active blocks in the forward on Hopper: against the oracle, the CPU, the portable kernel, and itself.
--
-- The kernel is forced, so a call that it could not do would fail here. Patterns come with all else that
-- these kernels take (attn_random.lua): ragged ends, dilations, merges, causal, windows, lengths, grouped
-- heads; blocks are of any size, for all heads, a head or a batch item, in any layout, and some rows have
-- none. Rows that no branch keeps are NaN, and in every other trial those that no active block has.

local attn_device = require "support.attn_device"
local it = attn_device.it(it, pending)

local direct = require "support.attn_direct"
local attn = require "support.attn_random"
local P = require "support.attn_pairs"
local C = direct.C
local NAN = 0 / 0
local pick, chance = attn.pick, attn.chance
local forward = attn_device.forward
local SIZES = { 16, 17, 32, 64, 64, 100, 128, 128, 128, 192, 256 }

local function seeded(seed)
  attn.seed(seed)
  P.seed(seed)
end

local function config(most, heads)
  local c = attn.random_config { most = most, segment = most, heads = heads,
                                 D = pick { 64, 64, 128, 128, 8 * attn.random(16) } }
  c.dropout, c.dedup, c.padding, c.scale = 0, false, nil, math.abs(c.scale)
  P.blocks(c, pick { 0.05, 0.2, 0.5, 0.9 }, most < 200 and { 16, 17, 32, 50, 64 } or SIZES)
  c.kernel = "hopper"
  return c
end

-- is the block active? b, h, i, j from 0
local function active(c, b, h, i, j)
  local s, n = c.blocks.shape, #c.blocks.shape
  local heads, items = n > 2 and s[n - 2] or 1, n > 3 and s[1] or 1
  local lead = (items > 1 and b or 0) * heads + (heads > 1 and h or 0)
  return c.blocks.data[(lead * s[n - 1] + i) * s[n] + j + 1]
end

-- NaN in a block of rows or keys of a list [B, rows, heads, D]
local function spoil(c, list, rows, heads, b, h, block)
  for n = block * c.block, math.min((block + 1) * c.block, rows) - 1 do
    local at = ((b * rows + n) * heads + h) * c.D
    for d = 1, c.D do list[at + d] = NAN end
  end
end

-- NaN in rows of blocks that have no keys, and in keys of blocks that no row of a head of theirs has
local function poison_inactive(c, lists)
  local s, group = c.blocks.shape, c.H / c.Hk
  local rows, columns = s[#s - 1], s[#s]
  for b = 0, c.B - 1 do for hk = 0, c.Hk - 1 do
    local reached = {}
    for h = hk * group, hk * group + group - 1 do
      for i = 0, rows - 1 do
        local some = false
        for j = 0, columns - 1 do
          if active(c, b, h, i, j) then some, reached[j] = true, true end
        end
        if not some then spoil(c, lists[1], c.N, c.H, b, h, i) end
      end
    end
    for j = 0, columns - 1 do
      for n = 2, reached[j] and 1 or 3 do spoil(c, lists[n], c.M, c.Hk, b, hk, j) end
    end
  end end
end

local function inputs(c, seed, dtype, poisoned)
  local lists = attn_device.inputs(c, seed, dtype)
  if poisoned then poison_inactive(c, lists) end
  return lists
end

describe("active blocks in the forward on Hopper #gpu", function()
  local unharmed = attn_device.guard(setup, teardown)

  it("give the oracle's results in 60 random configurations", function()
    local seed = attn.fresh() + 30
    seeded(seed)
    for trial = 1, 60 do
      local c, dtype = config(trial % 6 == 0 and 150 or 50), pick { "bf16", "f16" }
      local lists = inputs(c, seed + trial, dtype, trial % 2 == 0)
      local got = forward(C.LAC_CUDA, dtype, c, lists, pick { false, "heads" } or nil)
      local exact, naive = attn_device.references(c, dtype, lists)
      attn_device.judge(dtype, got, exact, naive, ("trial %d of seed %d: %s"):format(trial, seed, P.text(c)))
    end
  end)

  it("give the CPU's results across many tiles in 100 random configurations", function()
    local seed = attn.fresh() + 31
    seeded(seed)
    for trial = 1, 100 do
      local c, dtype = config(trial % 5 == 0 and 1500 or 500, 1), pick { "bf16", "f16" }
      local lists = inputs(c, seed + trial, dtype, trial % 2 == 0)
      local peak = chance(0.3) and pick { 4, 20 } -- later keys multiply blocks of scores again
      if peak then attn_device.rise(c, lists[2], peak, dtype) end
      if chance(0.2) then -- nearly one key a row
        for i, x in ipairs(lists[1]) do lists[1][i] = direct.round[dtype](8 * x) end
      end
      local got = forward(C.LAC_CUDA, dtype, c, lists)
      local exact, naive = attn_device.cpu(forward, c, dtype, lists)
      attn_device.judge(dtype, got, exact, naive, ("trial %d of seed %d: %s"):format(trial, seed, P.text(c)))
    end
  end)

  it("give the same bits twice, and the portable kernel's results", function()
    seeded(33)
    for trial = 1, 12 do
      local c, dtype = config(1500, 1), pick { "bf16", "f16" }
      local lists = inputs(c, trial, dtype)
      local first = forward(C.LAC_CUDA, dtype, c, lists)
      attn_device.near(forward(C.LAC_CUDA, dtype, c, lists, nil, "portable"), first, P.text(c))
      for _ = 1, 3 do attn_device.same(forward(C.LAC_CUDA, dtype, c, lists), first, P.text(c)) end
    end
  end)

  it("wrote over no guard bytes", unharmed)
end)
