--- Active blocks on Hopper, forward and backward: against the oracle, the CPU, the portable kernel, itself.
--
-- The kernel is forced, so a call that it could not do would fail here. Patterns come with all else that
-- these kernels take (attn_random.lua): ragged ends, dilations, merges, causal, windows, lengths, grouped
-- heads; blocks are of any size, for all heads, a head or a batch item, in any layout, and some rows have
-- none. Rows that no branch keeps are NaN, and in every other trial those that no active block has; in the
-- backward these may also be large, which its scales must not see. The backward wants blocks of 128 rows of
-- every branch, and segments of whole blocks.

local attn_device = require "support.attn_device"
local it = attn_device.it(it, pending)

local direct = require "support.attn_direct"
local attn = require "support.attn_random"
local P = require "support.attn_pairs"
local lac = require "lacuna"
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

-- `bad` in a block of rows or keys of a list [B, rows, heads, D]
local function spoil(c, list, rows, heads, b, h, block, bad)
  for n = block * c.block, math.min((block + 1) * c.block, rows) - 1 do
    local at = ((b * rows + n) * heads + h) * c.D
    for d = 1, c.D do list[at + d] = bad end
  end
end

-- the same in rows of blocks that have no keys, and in keys of blocks that no row of a head of theirs has
local function poison_inactive(c, lists, bad)
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
        if not some then spoil(c, lists[1], c.N, c.H, b, h, i, bad) end
      end
    end
    for j = 0, columns - 1 do
      for n = 2, reached[j] and 1 or 3 do spoil(c, lists[n], c.M, c.Hk, b, hk, j, bad) end
    end
  end end
end

local function inputs(c, seed, dtype, poisoned, backward)
  local lists = attn_device.inputs(c, seed, dtype, backward)
  local large = dtype == "f16" and 6e4 or 1e30
  if poisoned then poison_inactive(c, lists, backward and pick { NAN, large } or NAN) end
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

-- blocks, dilations and segments as the backward on Hopper takes them
local function backward_config(kernel, most)
  while true do
    local r = pick { 1, 1, 2, 3 }
    local block = 128 * r * pick { 1, 1, 2 }
    local c = { B = attn.random(2), N = attn.random(most), D = pick { 64, 64, 128, 128, 8 * attn.random(16) },
                Hk = attn.random(2), segments = {}, dilations = {}, block = block }
    c.M, c.H = chance(0.6) and c.N or attn.random(most), c.Hk * pick { 1, 1, 2, 3 }
    for g = 1, attn.random(3) do
      c.segments[g] = chance(0.4) and 1000000007 or block * attn.random(3)
      c.dilations[g] = pick { 1, r }
    end
    c.heads, c.offset = pick { "all", "split" }, pick { "mod", "block", "branch" }
    c.merge, c.causal = pick { "mean", "sum", "lse", "lse_detach" }, chance(0.5)
    if chance(0.3) then c.window = attn.random(most) - 1 end
    if chance(0.3) then
      c.lengths, c.lengths_dtype = {}, pick { "i32", "i64" }
      for i = 1, c.B do c.lengths[i] = attn.random(c.M + 1) - 1 end
    end
    c.scale = pick { 0, 0.3 }
    c = direct.fill(c)
    P.blocks(c, pick { 0.1, 0.3, 0.7 }, { block })
    c.kernel = kernel
    if c.heads == "all" or c.H >= #c.segments then return c end
  end
end

local function gradients(...)
  local r = attn_device.both(...)
  return { dq = r.dq, dk = r.dk, dv = r.dv }
end

for _, kernel in ipairs{ "hopper", "portable" } do
describe(("active blocks in the backward of kernel '%s' #gpu"):format(kernel), function()
  local unharmed = attn_device.guard(setup, teardown)

  local function holds(trial, seed, most, references)
    local c, dtype = backward_config(kernel, most), pick { "bf16", "f16" }
    local lists = inputs(c, seed + trial, dtype, trial % 2 == 0, true)
    local got = gradients(C.LAC_CUDA, dtype, c, lists, pick { false, "heads" } or nil)
    local exact, naive = references(c, dtype, lists)
    attn_device.judge(dtype, got, exact, naive, ("trial %d of seed %d: %s"):format(trial, seed, P.text(c)))
  end
  local function by_cpu(...) return attn_device.cpu(attn_device.both, ...) end

  it("give the oracle's gradients in 6 random configurations", function()
    local seed = attn.fresh() + 34
    seeded(seed)
    for trial = 1, 6 do holds(trial, seed, 150, attn_device.references) end
  end)

  it("give the CPU's gradients in 60 random configurations", function()
    local seed = attn.fresh() + 35
    seeded(seed)
    for trial = 1, 60 do holds(trial, seed, trial % 10 == 0 and 2000 or 600, by_cpu) end
  end)

  it("give the CPU's gradients where sums do not fit the scales' range", function()
    local seed = attn.fresh() + 37
    seeded(seed)
    for trial = 1, 6 do
      local c = backward_config(kernel, 400)
      local lists = inputs(c, seed + trial, "bf16", false, true)
      for i, x in ipairs(lists[3]) do lists[3][i] = x * 2 ^ 70 end -- squares are beyond f32
      for i, x in ipairs(lists[4]) do lists[4][i] = x * 2 ^ -70 end
      lists[5] = nil
      local got = gradients(C.LAC_CUDA, "bf16", c, lists)
      local exact, naive = by_cpu(c, "bf16", lists)
      got.dv, exact.dv, naive.dv = nil, nil, nil -- 2^-70 times as large
      attn_device.judge("bf16", got, exact, naive, ("trial %d of seed %d: %s"):format(trial, seed, P.text(c)))
    end
  end)

  if kernel == "hopper" then it("refuse other blocks, with the reason", function()
    for block, text in pairs { [64] = "not multiples of 128 rows", [256] = "not made of whole blocks" } do
      local c = direct.fill { B = 1, N = 300, M = 300, D = 64, H = 1, Hk = 1, segments = { 128 },
        dilations = { 1 }, block = block, merge = "lse", heads = "all", offset = "mod", scale = 0 }
      P.blocks(c, 0.5, { block })
      c.kernel = "hopper"
      local ok, message = pcall(gradients, C.LAC_CUDA, "bf16", c, inputs(c, 1, "bf16", false, true))
      assert.is_false(ok)
      assert.matches(text, tostring(message), 1, true)
    end
  end) end

  it("give the same bits twice, and the other kernel's gradients", function()
    local other = kernel == "hopper" and "portable" or "hopper"
    seeded(36)
    for trial = 1, 12 do
      local c, dtype = backward_config(kernel, 1500), pick { "bf16", "f16" }
      local lists = inputs(c, trial, dtype, false, true)
      local first = gradients(C.LAC_CUDA, dtype, c, lists)
      attn_device.near(gradients(C.LAC_CUDA, dtype, c, lists, nil, other), first, P.text(c))
      for _ = 1, 3 do attn_device.same(gradients(C.LAC_CUDA, dtype, c, lists), first, P.text(c)) end
    end
  end)

  it("wrote over no guard bytes", unharmed)
end)
end

-- In one pass tiles of keys add to sums of dq, four bytes for each number of q that a branch keeps. Two
-- passes have nothing as large beside the gradients: statistics take 16 bytes a row. So the pool's peak says
-- what ran.
describe("the portable backward #gpu", function()
  local n, heads, D = 2048, 4, 64

  -- did it take one pass? options of lac.attend; m: keys
  local function one_pass(options, m)
    local o, beside = { segments = { n }, dilations = { 1 }, kernel = "portable", return_lse = false }, nil
    for name, value in pairs(options) do o[name] = value end
    if o.block then
      local cells = math.ceil(n / o.block)
      o.block_mask = lac.ones({ cells, math.ceil((m or n) / o.block) }, { dtype = "bool", device = "cuda" })
    end
    local function random(rows, grad)
      return lac.randn({ 1, rows, heads, D }, { dtype = "bf16", device = "cuda", grad = grad })
    end
    lac.scope(function()
      local q, k, v, dout = random(n, true), random(m or n, true), random(m or n, true), random(n)
      local out = lac.attend(q, k, v, o)
      lac.reset_peak()
      local before = lac.memory("cuda").live
      lac.grad(out, { q, k, v }, { grad_outputs = { dout } })
      beside = lac.memory("cuda").peak - before - 2 * heads * D * (n + 2 * (m or n))
    end)
    local sums = 4 * heads * D * n / o.dilations[1]
    assert.is_true(beside >= sums or beside < sums / 2, ("%d bytes, sums are %d"):format(beside, sums))
    return beside >= sums
  end

  it("takes one pass where tiles of keys lie in one block each, else two", function()
    for _, block in ipairs { 128, 256, 2048 } do assert.is_true(one_pass { block = block }, block) end
    assert.is_true(one_pass { block = 256, dilations = { 2 } })
    assert.is_true(one_pass { block = 128, segments = { 1024 }, causal = true })
    for _, block in ipairs { 16, 64, 192 } do assert.is_false(one_pass { block = block }, block) end
    assert.is_false(one_pass { block = 128, dilations = { 2 } })
    assert.is_false(one_pass { block = 128, segments = { 1000 } })
    assert.is_false(one_pass({ block = 128, align = "end" }, n + 128))
  end)

  it("takes one pass without blocks but for options of pairs", function()
    assert.is_true(one_pass {})
    assert.is_true(one_pass { dropout = 0.1, causal = true })
    assert.is_true(one_pass { key_padding = lac.ones({ 1, n }, { dtype = "bool", device = "cuda" }) })
    assert.is_false(one_pass { alibi = true })
    assert.is_false(one_pass { mask = lac.ones({ n, n }, { dtype = "bool", device = "cuda" }) })
    assert.is_false(one_pass { segments = { 31 } })
  end)
end)
