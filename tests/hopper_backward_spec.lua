--- The backward of attention in one pass, by the kernels for Hopper and by the portable ones: against the
-- oracle, the CPU, each other, and themselves.
--
-- Random configurations have what these kernels take: f16 and bf16, any pattern, causal, windows, lengths,
-- grouped heads, all merges, negative scales; on Hopper head dimensions that are multiples of 8, else any
-- up to 128, dropout, padding, and pairs counted once. attn_random says how they are
-- made and poisoned. The CPU in f64 stands in for the oracle past a few tiles; attend_spec holds it against
-- the oracle.

local attn_device = require "support.attn_device"
local it = attn_device.it(it, pending)

local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local attn = require "support.attn_random"
local lac = require "lacuna"
local C = direct.C
local NAN = 0 / 0
local random, pick = attn.random, attn.pick
local GRADIENTS = { "dq", "dk", "dv" }

-- rows of a segment's lattice
local function rows(c, g) return math.floor((math.min(c.segments[g], c.N) - 1) / c.dilations[g]) + 1 end

local function config(kernel, options)
  while true do
    options.D = kernel == "hopper" and pick { 8, 24, 32, 64, 64, 72, 96, 120, 128, 128 }
      or pick { 20, 33, 64, 72, 97, 128 }
    local c = attn.random_config(options)
    local fits = true
    for g = 1, #c.segments do fits = fits and rows(c, g) >= (options.rows or 32) end
    if fits then
      if kernel == "hopper" then c.dropout, c.dedup, c.padding = 0, false, nil end
      return c
    end
  end
end

-- the kernel is forced where the forward, which wants a positive scale, can be forced too
local function on(kernel, dtype, c, lists, layout)
  local forced = (kernel == "portable" or (c.scale or 0) >= 0) and kernel or nil
  local r = attn_device.both(C.LAC_CUDA, dtype, c, lists, layout, forced)
  return { dq = r.dq, dk = r.dk, dv = r.dv }
end

for _, kernel in ipairs { "hopper", "portable" } do
  describe("the backward of attention in one pass, " .. kernel .. " #gpu", function()
    local function one_pass_config(options) return config(kernel, options) end
    local function on_device(...) return on(kernel, ...) end
    local unharmed = attn_device.guard(setup, teardown)

    -- references(c, dtype, lists): exact and naive results
    local function holds(c, seed, dtype, references, peaked)
      local lists = attn_device.inputs(c, seed, dtype, true)
      if attn.chance(peaked or 0.2) then -- peaked: nearly one key a row
        for i, x in ipairs(lists[1]) do lists[1][i] = direct.round[dtype](8 * x) end
      end
      local layout = pick { false, "heads" } or nil
      local got = on_device(dtype, c, lists, layout)
      local exact, naive = references(c, dtype, lists)
      attn_device.judge(dtype, got, exact, naive,
        ("seed %d, layout %s: %s"):format(seed, tostring(layout), attn.text(c)))
    end
    local function by_cpu(...) return attn_device.cpu(attn_device.both, ...) end

    it("equals the oracle in 6 random configurations", function()
      local seed = attn.fresh()
      attn.seed(seed)
      for trial = 1, 6 do
        local c = one_pass_config { most = 90, segment = 90, heads = 1 }
        holds(c, seed + trial, pick { "bf16", "f16" }, attn_device.references)
      end
    end)

    it("equals the CPU across tiles in 200 random configurations", function()
      local seed = attn.fresh() + 1
      attn.seed(seed)
      for trial = 1, 200 do
        local most = trial % 100 == 0 and 1500 or trial % 10 == 0 and 400 or 160
        local c = one_pass_config { most = most, segment = most, heads = 2 }
        holds(c, seed + trial, pick { "bf16", "f16" }, by_cpu)
      end
    end)

    -- Peaked rows have branches with nearly no share of the softmax, which one delta must not be taken from.
    it("equals the CPU where branches have deltas of their own, in 100 random configurations", function()
      local seed = attn.fresh() + 3
      attn.seed(seed)
      for trial = 1, 100 do
        local most = trial % 20 == 0 and 700 or trial % 4 == 0 and 300 or 100
        local c
        repeat
          c = one_pass_config { most = most, segment = most, heads = 1 }
        until #c.segments > 1 and c.heads == "all" and c.merge ~= "lse"
        holds(c, seed + trial, pick { "bf16", "f16" }, by_cpu, 0.5)
      end
    end)

    -- Rows of many branches, whose sums are put down as often; where there are more keys than queries, their
    -- low bits have no room in dq.
    it("equals the CPU where up to eight branches meet", function()
      attn.seed(41)
      for trial = 1, 8 do
        local c = { N = pick { 130, 300 }, Hk = random(2), segments = {}, dilations = {} }
        c.D = kernel == "hopper" and pick { 64, 128 } or pick { 66, 97, 100, 128 }
        c.H, c.M, c.causal = c.Hk * random(2), trial % 3 == 0 and 390 or c.N, attn.chance(0.3)
        -- floats lie behind an odd number of these bits' bytes
        if trial == 6 then c.Hk, c.H, c.M, c.D = 1, 1, 391, kernel == "hopper" and 64 or 97 end
        c.offset, c.merge = pick { "mod", "block" }, pick { "lse", "sum", "lse_detach" }
        for g = 1, 3 + random(5) do
          c.segments[g], c.dilations[g] = pick { 128, 400 }, pick { 1, 1, 2, 3 }
        end
        holds(direct.fill(c), trial, pick { "bf16", "f16" }, by_cpu)
      end
    end)

    -- Tiles walk down over few rows and up over many: 2,100 are few for D = 64, and many for 128.
    it("equals the CPU where causal branches of few or many rows meet", function()
      attn.seed(44)
      for trial, D in ipairs { 64, 128 } do
        local c = { N = 2100, M = 2100, Hk = 1, H = 1, D = D, causal = true, merge = "lse", offset = "mod",
          segments = { 700, 2100, 2100 }, dilations = { 1, 1, 3 } }
        holds(direct.fill(c), trial, pick { "bf16", "f16" }, by_cpu)
      end
    end)

    it("equals the CPU where dilated branches reach all rows, or nearly", function()
      attn.seed(43)
      for trial = 1, 15 do
        local c = attn_device.covering(trial)
        c.D = kernel == "hopper" and pick { 64, 128 } or pick { 66, 128 }
        holds(direct.fill(c), trial, pick { "bf16", "f16" }, by_cpu)
      end
    end)

    it("gives the same bits twice", function()
      attn.seed(12)
      for _ = 1, 4 do
        local dtype = pick { "bf16", "f16" }
        local c = one_pass_config { most = 1200, segment = 1200, heads = 1 }
        local lists = { attn.inputs(c, 3, dtype) }
        local first = on_device(dtype, c, lists)
        for _ = 1, 3 do attn_device.same(on_device(dtype, c, lists), first, attn.text(c)) end
      end
    end)

    -- The second branch's offset is beyond the last key. The third adds to the keys before the first does and
    -- takes longer: many blocks of rows see its keys, one sees those of the first.
    it("adds in the order of branches where one between others has no keys", function()
      attn.seed(17)
      for trial = 1, 6 do
        local split = trial % 2 == 0
        local c = { M = 1, Hk = pick { 2, 6 }, dilations = { 1, 2, 1 }, heads = "all", offset = "branch" }
        if split then
          c = { M = random(2), Hk = 1, dilations = { 1, 8, 1 }, heads = "split", offset = "mod" }
        end
        c.B, c.N, c.H, c.segments = 2, 1500, 6, { 64, 256, 1500 }
        c.D = kernel == "hopper" and pick { 64, 128 } or pick { 72, 128 }
        c.merge = pick { "lse", "lse_detach", "mean" }
        c = direct.fill(c)
        local dtype = pick { "bf16", "f16" }
        local lists = attn_device.inputs(c, trial, dtype, true)
        local first = on_device(dtype, c, lists)
        local exact, naive = by_cpu(c, dtype, lists)
        attn_device.judge(dtype, first, exact, naive, attn.text(c))
        for _ = 1, 3 do attn_device.same(on_device(dtype, c, lists), first, attn.text(c)) end
      end
    end)

    it("cuts long sequences and large batches, and gives the bits of their parts", function()
      local function run(x, options)
        local inputs = {}
        for i = 1, 3 do inputs[i] = x[i]:detach():requires_grad_() end
        local out = lac.attend(inputs[1], inputs[2], inputs[3], options)
        return lac.grad(out, inputs, { grad_outputs = { x[4] } })
      end
      -- positions and items of the whole; those of one part
      local function compare(n, batch, step, items, options)
        local x = {}
        for i = 1, 4 do x[i] = lac.randn({ batch, n, 8, 64 }, { dtype = "bf16", device = "cuda" }) end
        options.return_lse, options.kernel = false, kernel
        local got = run(x, options)
        for at = 0, n - 1, step do for item = 0, batch - 1, items do
          local here = { { item + 1, math.min(item + items, batch) }, { at + 1, math.min(at + step, n) } }
          local part = {}
          for i = 1, 4 do part[i] = x[i][here]:contiguous() end
          for i, want in ipairs(run(part, options)) do
            assert.are.equal(0, (got[i][here] - want):abs():max():item(), GRADIENTS[i])
          end
        end end
      end
      lac.scope(function()
        local long = 2 ^ 18 + 2 ^ 12 + 100
        compare(long, 1, 2 ^ 16, 1, { segments = { 1024, 4096 }, dilations = { 1, 3 }, causal = true })
        compare(long, 1, 2 ^ 16, 1, { segments = { 2048, 4096 }, dilations = { 2, 4 }, merge = "lse_detach" })
        compare(long, 1, long, 1, { segments = { 1000, 4096 }, dilations = { 1, 2 } }) -- no windows: whole
        compare(3000, 50, 3000, 10, { segments = { 1000, 2048 }, dilations = { 1, 2 } })
      end)
    end)

    it("agrees with the other kernel to the rounding of results", function()
      attn.seed(31)
      for trial = 1, 4 do
        local c = one_pass_config { most = 400, segment = 400, heads = 1 }
        local lists = { attn.inputs(c, trial, "bf16") }
        c.dropout, c.dedup, c.padding, c.scale = 0, false, nil, nil
        local second = kernel == "hopper" and "portable" or nil
        local other = attn_device.both(C.LAC_CUDA, "bf16", c, lists, nil, second)
        attn_device.near(on_device("bf16", c, lists), other, attn.text(c))
      end
    end)

    -- One value that is not finite, in one key or one row of batch item 0: nothing that does not see it may
    -- change.
    it("keeps NaN and infinity of masked keys and other rows away, in 12 random configurations", function()
      local seed = attn.fresh() + 2
      attn.seed(seed)
      for trial = 1, 12 do
        local c = one_pass_config { most = trial % 6 == 0 and 150 or 80, segment = 80, heads = 1 }
        local lists = { attn.inputs(c, seed + trial, "bf16") }
        lists[5] = nil
        local want = on_device("bf16", c, lists)
        local which, bad = random(4), pick { NAN, math.huge, -math.huge }
        local key = which == 2 or which == 3
        local position, hit = random(key and c.M or c.N) - 1, lists[which]
        local width = #hit / c.B / (key and c.M or c.N)
        for e = 1, width do hit[position * width + e] = bad end
        local got, most = on_device("bf16", c, lists), {}
        for _, name in ipairs(GRADIENTS) do most[name] = 2 ^ -6 * (1 + direct.largest(want[name])) end
        local function same(name, b, count, row, heads, h)
          for e = 1, c.D do
            local at = ((b * count + row) * heads + h) * c.D + e
            local x, y = got[name][at], want[name][at]
            assert.is_true(x == y or math.abs(x - y) <= most[name],
              ("%s[%d,%d,%d] is %g, was %g before input %d at %d was %g: trial %d of seed %d: %s"):format(
                name, b, row, h, x, y, which, position, bad, trial, seed, attn.text(c)))
          end
        end
        for b = 0, c.B - 1 do for h = 0, c.H - 1 do
          local reached = {}
          local function sees(n, j)
            for g = 1, #c.segments do if oracle.attends(c, g, b, h, n, j) then return true end end
            return false
          end
          for n = 0, c.N - 1 do
            local touched = b == 0 and (key and sees(n, position) or not key and n == position)
            for j = 0, c.M - 1 do if touched and sees(n, j) then reached[j] = true end end
            if not touched then same("dq", b, c.N, n, c.H, h) end
          end
          for j = 0, c.H == c.Hk and c.M - 1 or -1 do
            if not reached[j] then
              same("dk", b, c.M, j, c.Hk, h)
              same("dv", b, c.M, j, c.Hk, h)
            end
          end
        end end
      end
    end)

    it("wrote over no guard bytes", unharmed)
  end)
end
