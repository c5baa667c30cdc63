--- The forward of attention on Hopper: against the oracle, the CPU, the portable kernel, and itself.
--
-- The kernel is forced, so a call that it could not do would fail here. Random configurations have what it
-- takes: head dimensions to 128, f16 and bf16, any pattern, causal, windows, lengths, grouped heads,
-- all merges. Seeds are fresh and printed by a failure; LACUNA_SEED repeats one. Rows of the inputs that no
-- branch keeps are NaN, and so is the memory that results are made in. The error may be twice that of the
-- naive program in the same dtype (cases.compare); past a few tiles the CPU in f64 stands in for the oracle.

local it = os.getenv "LACUNA_GPU" == "1" and it or pending

local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local choices = require "support.random"
local cases = require "support.cases"
local lac = require "lacuna"
local C = direct.C
local NAN = 0 / 0

local generator = choices.generator()
local random, pick, chance = generator.random, generator.pick, generator.chance
local fresh = choices.fresh

local text = choices.text

local function valid(c)
  if c.heads == "split" and c.H < #c.segments then return false end
  for g = 1, #c.segments do
    for h = 0, c.H - 1 do
      if oracle.runs(c, g, h) and oracle.offset_of(c, g, h) >= c.segments[g] then return false end
    end
  end
  return true
end

-- any valid configuration of what the kernel does; `large` ones have few heads and one batch item
local function random_config(most, large)
  while true do
    local c = { B = large and 1 or random(2), N = random(most), D = pick { 64, 64, 128, 128, 8 * random(16) },
                segments = {}, dilations = {}, kernel = "hopper" }
    c.M = chance(0.7) and c.N or random(most)
    c.Hk = large and 1 or random(2)
    c.H = c.Hk * pick { 1, 1, 2, large and 2 or 3 }
    for g = 1, chance(0.4) and 1 or random(4) do
      c.segments[g] = chance(0.2) and 1000000007 or random(most)
      c.dilations[g] = chance(0.5) and 1 or random(6)
    end
    c.heads, c.offset = pick { "all", "split" }, pick { "mod", "block", "branch" }
    c.merge = pick { "mean", "sum", "lse", "lse_detach" }
    c.causal, c.align = chance(0.5), chance(0.3) and "end" or nil
    if chance(0.3) then c.window = random(most) - 1 end
    if chance(0.2) then
      c.lengths, c.lengths_dtype = {}, pick { "i32", "i64" }
      for i = 1, c.B do c.lengths[i] = random(c.M + 1) - 1 end
    end
    c.scale = pick { 0, 0.3, 0.05 }
    c = direct.fill(c)
    if valid(c) then return c end
  end
end

-- q, k, v rounded to the dtype; `peak` makes later keys outweigh earlier ones more and more
local function inputs(c, seed, dtype, peak)
  local nq, nk = c.B * c.N * c.H * c.D, c.B * c.M * c.Hk * c.D
  local q, k, v = direct.numbers(seed, nq), direct.numbers(seed + 1, nk), direct.numbers(seed + 2, nk)
  for i = 1, peak and nk or 0 do
    k[i] = k[i] * (1 + peak * (math.floor((i - 1) / (c.Hk * c.D)) % c.M) / c.M)
  end
  for _, list in ipairs { q, k, v } do
    for i = 1, #list do list[i] = direct.round[dtype](list[i]) end
  end
  return { q, k, v }
end

-- NaN in rows that no branch keeps
local function poison(c, lists)
  local shift = c.align == "end" and c.M - c.N or 0
  local function kept(h, p)
    for g = 1, #c.segments do
      local at = p >= 0 and (p % c.segments[g]) % c.dilations[g]
      if at == oracle.offset_of(c, g, h) and oracle.runs(c, g, h) then return true end
    end
    return false
  end
  local function spoil(list, rows, heads, keeps)
    for b = 0, c.B - 1 do for n = 0, rows - 1 do for h = 0, heads - 1 do
      local at = ((b * rows + n) * heads + h) * c.D
      for d = 1, keeps(h, n) and 0 or c.D do list[at + d] = NAN end
    end end end
  end
  local group = c.H / c.Hk
  local function key_kept(hk, j)
    for h = hk * group, hk * group + group - 1 do if kept(h, j) then return true end end
    return false
  end
  spoil(lists[1], c.N, c.H, function(h, n) return kept(h, n + shift) end)
  spoil(lists[2], c.M, c.Hk, key_kept)
  spoil(lists[3], c.M, c.Hk, key_kept)
end

-- the pool's free blocks, which results and sums are made in, hold NaN
local function poison_pool(c)
  local held = {}
  for _, n in ipairs { c.B * c.N * c.H * c.D, c.B * c.N * c.H, #c.segments * c.B * c.N * c.H, 4096 } do
    for i = 1, 4 do
      held[#held + 1] = lac.full({ n }, NAN, { dtype = i % 2 == 0 and "f32" or "bf16", device = "cuda" })
    end
  end
  for _, t in ipairs(held) do t:release() end
end

local function run(device, dtype, c, lists, layout, kernel)
  local before = c.kernel
  c.kernel = device ~= 0 and (kernel or before) or nil
  direct.device = device
  local ok, r = pcall(direct.forward, c, lists[1], lists[2], lists[3], { dtype = dtype, layout = layout })
  direct.device, c.kernel = 0, before
  if not ok then error(r, 0) end
  local found = { out = direct.read(r.out), lse = direct.read(r.lse) }
  if r.branch_lse.storage ~= nil then found.branch_lse = direct.read(r.branch_lse) end
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

describe("the forward of attention on Hopper #gpu", function()
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

  local layouts = { false, false, "heads" }

  it("equals the oracle in 60 random configurations", function()
    local seed = fresh()
    generator.seed(seed)
    for trial = 1, 60 do
      local c, dtype = random_config(trial % 6 == 0 and 150 or 50), pick { "bf16", "f16" }
      local lists = inputs(c, seed + trial, dtype)
      poison(c, lists)
      poison_pool(c)
      local layout = pick(layouts) or nil
      local got = run(C.LAC_CUDA, dtype, c, lists, layout)
      local exact = oracle.run(c, lists[1], lists[2], lists[3])
      local rounding = { result = direct.round[dtype], sum = direct.round.f32 }
      local naive = oracle.run(c, lists[1], lists[2], lists[3], nil, nil, { rounding = rounding })
      complain(dtype, got, exact, naive, ("trial %d of seed %d: %s"):format(trial, seed, text(c)))
    end
  end)

  it("equals the CPU across many tiles in 240 random configurations, some with rising scores", function()
    local seed = fresh() + 1
    generator.seed(seed)
    for trial = 1, 240 do
      local c, dtype = random_config(trial % 8 == 0 and 1500 or 500, true), pick { "bf16", "f16" }
      local peak = chance(0.3) and pick { 4, 20 } or nil
      local lists = inputs(c, seed + trial, dtype, peak)
      poison(c, lists)
      poison_pool(c)
      local got = run(C.LAC_CUDA, dtype, c, lists, pick(layouts) or nil)
      complain(dtype, got, run(0, "f64", c, lists), run(0, dtype, c, lists),
               ("trial %d of seed %d, peak %s: %s"):format(trial, seed, tostring(peak), text(c)))
    end
  end)

  it("agrees with the portable kernel and gives the same bits twice", function()
    generator.seed(12)
    for _ = 1, 12 do
      local c, dtype = random_config(1500, true), pick { "bf16", "f16" }
      local lists = inputs(c, 3, dtype)
      local first = run(C.LAC_CUDA, dtype, c, lists)
      for name, data in pairs(run(C.LAC_CUDA, dtype, c, lists, nil, "portable")) do
        local most, largest = direct.max_diff(data, first[name]), 1
        for _, x in ipairs(data) do
          if math.abs(x) < math.huge then largest = math.max(largest, math.abs(x)) end
        end
        assert.is_true(most <= (name == "out" and 2 ^ -6 or 1e-4) * largest, name .. " in " .. text(c))
      end
      for _ = 1, 3 do
        for name, data in pairs(run(C.LAC_CUDA, dtype, c, lists)) do
          assert.are.equal(0, direct.max_diff(data, first[name]), name .. " in " .. text(c))
        end
      end
    end
  end)

  -- one value that is not finite, in one key or row of batch item 0: what does not see it may not change
  it("keeps NaN and infinity of masked keys and other rows away, in 60 random configurations", function()
    local seed = fresh() + 2
    generator.seed(seed)
    for trial = 1, 60 do
      local c = random_config(trial % 6 == 0 and 300 or 90)
      local lists = inputs(c, seed + trial, "bf16")
      local want = run(C.LAC_CUDA, "bf16", c, lists)
      local which, bad = random(3), pick { NAN, math.huge, -math.huge }
      local position, hit = random(which == 1 and c.N or c.M) - 1, lists[which]
      local width = #hit / c.B / (which == 1 and c.N or c.M)
      for e = 1, width do hit[position * width + e] = bad end
      local got = run(C.LAC_CUDA, "bf16", c, lists)
      for b = 0, c.B - 1 do for h = 0, c.H - 1 do for n = 0, c.N - 1 do
        local touched = b == 0 and which == 1 and n == position
        for g = 1, b == 0 and which > 1 and #c.segments or 0 do
          touched = touched or oracle.attends(c, g, b, h, n, position)
        end
        for d = 1, touched and 0 or c.D do
          local at = ((b * c.N + n) * c.H + h) * c.D + d
          local x, y = got.out[at], want.out[at]
          assert.is_true(x == y or math.abs(x - y) <= 2 ^ -6 * (1 + math.abs(y)),
            ("out[%d,%d,%d] is %g, was %g before input %d at %d was %g: trial %d of seed %d: %s"):format(
              b, n, h, x, y, which, position, bad, trial, seed, text(c)))
        end
      end end end
    end
  end)

  it("says why it cannot do a call that it is forced to do", function()
    local function refused(pattern, change, dtype, layout)
      local c = { N = 70, D = 64, segments = { 70 }, dilations = { 1 }, kernel = "hopper" }
      for name, value in pairs(change) do c[name] = value end
      c = direct.fill(c)
      local lists = inputs(c, 1, "bf16")
      local ok, message = pcall(run, C.LAC_CUDA, dtype or "bf16", c, lists, layout)
      assert.is_false(ok)
      assert.matches("kernel 'hopper' cannot do this call: " .. pattern, tostring(message))
      c.kernel = "auto"
      run(C.LAC_CUDA, dtype or "bf16", c, lists, layout)
    end
    refused("tensors are neither f16 nor bf16", {}, "f32")
    refused("head_dim is above 128 or no multiple of 8", { D = 136 })
    refused("head_dim is above 128 or no multiple of 8", { D = 60 })
    refused("the scale is negative", { scale = -1 })
    refused("the head dimension is not contiguous", {}, "bf16", "inner")
    refused("strides do not fit a tensor map", {}, "bf16", "reversed")
    refused("pairs that several branches keep", { segments = { 70, 70 }, dilations = { 1, 2 }, dedup = true })
  end)

  it("wrote over no guard bytes", function()
    collectgarbage()
    collectgarbage()
    lac.trim()
    assert.are.equal(errors, C.lac_memory_guard_errors())
  end)
end)
