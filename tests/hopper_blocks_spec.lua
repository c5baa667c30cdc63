--- Active blocks in the forward on Hopper: against the oracle, the CPU, the portable kernel, and itself.
--
-- The kernel is forced, so a call that it could not do would fail here. Patterns come with all else that
-- these kernels take (attn_random.lua): ragged ends, dilations, merges, causal, windows, lengths, grouped
-- heads; blocks are of any size, for all heads, a head or a batch item, in any layout, and some rows have
-- none. Rows that no branch keeps are NaN, and in every other trial those that no active block has.

local it = os.getenv "LACUNA_GPU" == "1" and it or pending

local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local attn = require "support.attn_random"
local P = require "support.attn_pairs"
local cases = require "support.cases"
local lac = require "lacuna"
local C = direct.C
local NAN = 0 / 0
local pick, chance = attn.pick, attn.chance
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
  local lists = { attn.inputs(c, seed, dtype) }
  attn.poison(c, unpack(lists, 1, 4))
  if poisoned then poison_inactive(c, lists) end
  attn.poison_pool(c)
  return lists
end

local function run(device, dtype, c, lists, kernel, layout)
  local before = c.kernel
  c.kernel = device ~= 0 and (kernel or before) or nil
  direct.device = device
  local ok, r = pcall(direct.forward, c, lists[1], lists[2], lists[3], { dtype = dtype, layout = layout })
  local found = ok and { out = direct.read(r.out), lse = direct.read(r.lse),
                         branch_lse = r.branch_lse.storage ~= nil and direct.read(r.branch_lse) or nil }
  direct.device, c.kernel = 0, before
  if not ok then error(r, 0) end
  return found
end

local function complain(dtype, got, exact, naive, what)
  for _, name in ipairs { "out", "lse", "branch_lse" } do
    if exact[name] and got[name] then
      local message = cases.compare(name == "out" and dtype or "f32", got[name], exact[name], naive[name])
      if message then error(("%s %s: %s in %s"):format(dtype, name, message, what), 0) end
    end
  end
end

describe("active blocks in the forward on Hopper #gpu", function()
  local errors
  setup(function()
    if os.getenv "LACUNA_GPU" == "1" then lac.zeros{ 1, device = "cuda" } end -- loads the plug-in
    C.lac_memory_guard(1)
    errors = C.lac_memory_guard_errors()
  end)
  teardown(function()
    direct.device = 0
    C.lac_memory_guard(0)
  end)

  it("give the oracle's results in 60 random configurations", function()
    local seed = attn.fresh() + 30
    seeded(seed)
    for trial = 1, 60 do
      local c, dtype = config(trial % 6 == 0 and 150 or 50), pick { "bf16", "f16" }
      local lists = inputs(c, seed + trial, dtype, trial % 2 == 0)
      local got = run(C.LAC_CUDA, dtype, c, lists, nil, pick { false, "heads" } or nil)
      local exact = oracle.run(c, lists[1], lists[2], lists[3])
      local rounding = { result = direct.round[dtype], sum = direct.round.f32 }
      local naive = oracle.run(c, lists[1], lists[2], lists[3], nil, nil, { rounding = rounding })
      complain(dtype, got, exact, naive, ("trial %d of seed %d: %s"):format(trial, seed, P.text(c)))
    end
  end)

  it("give the CPU's results across many tiles in 100 random configurations", function()
    local seed = attn.fresh() + 31
    seeded(seed)
    for trial = 1, 100 do
      local c, dtype = config(trial % 5 == 0 and 1500 or 500, 1), pick { "bf16", "f16" }
      local lists = inputs(c, seed + trial, dtype, trial % 2 == 0)
      if chance(0.2) then -- peaked: nearly one key a row
        for i, x in ipairs(lists[1]) do lists[1][i] = direct.round[dtype](8 * x) end
      end
      local got = run(C.LAC_CUDA, dtype, c, lists)
      complain(dtype, got, run(0, "f64", c, lists), run(0, dtype, c, lists),
               ("trial %d of seed %d: %s"):format(trial, seed, P.text(c)))
    end
  end)

  it("give the same bits twice, and the portable kernel's results", function()
    seeded(33)
    for trial = 1, 12 do
      local c, dtype = config(1500, 1), pick { "bf16", "f16" }
      local lists = inputs(c, trial, dtype)
      local first = run(C.LAC_CUDA, dtype, c, lists)
      for name, data in pairs(run(C.LAC_CUDA, dtype, c, lists, "portable")) do
        assert.is_true(direct.max_diff(data, first[name]) <= 2 ^ -6 * (1 + direct.largest(data)),
                       name .. " in " .. P.text(c))
      end
      for _ = 1, 3 do
        for name, data in pairs(run(C.LAC_CUDA, dtype, c, lists)) do
          assert.are.equal(0, direct.max_diff(data, first[name]), name .. " in " .. P.text(c))
        end
      end
    end
  end)

  it("wrote over no guard bytes", function()
    collectgarbage()
    collectgarbage()
    lac.trim()
    assert.are.equal(errors, C.lac_memory_guard_errors())
  end)
end)
