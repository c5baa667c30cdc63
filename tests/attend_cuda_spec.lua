--- Attention on CUDA at the level of the C functions: against the oracle, the CPU, and itself.
--
-- Random configurations and their poison are those of support/attn_random.lua, with a fresh seed each run.
--
-- Values and gradients obey the tolerance rule of cases.compare. Exact is the oracle, naive the worse of the
-- oracle in the dtype's rounding and the CPU in the dtype. For sizes where the oracle takes minutes, past one
-- tile in every direction, the CPU stands in for it, which attend_spec holds against the oracle.

local attn_device = require "support.attn_device"
local it = attn_device.it(it, pending)

local direct = require "support.attn_direct"
local infinite = require "support.attn_infinite"
local oracle = require "support.oracle"
local lac = require "lacuna"
local C = direct.C
local NAN = 0 / 0

local attn = require "support.attn_random"
local random, pick, fresh, text = attn.random, attn.pick, attn.fresh, attn.text
local random_config, inputs, run, together = attn.random_config, attn.inputs, attn.run, attn.together
local judge = attn_device.judge

local function dtype_of(trial) return ({ "f64", "f32", "bf16", "f16" })[trial % 4 + 1] end
local function layout_of() return pick { false, "heads", "inner", "reversed" } or nil end

describe("attention on CUDA #gpu", function()
  local unharmed = attn_device.guard(setup, teardown)

  it("equals the oracle in every dtype, in 320 random configurations", function()
    local seed = fresh()
    attn.seed(seed)
    for trial = 1, 320 do
      local dtype, layout = dtype_of(trial), layout_of()
      local most, D = trial % 10 == 0 and 90 or 30, trial % 3 == 0 and pick { 8, 16, 24, 64 } or nil
      local c = random_config { most = most, D = D }
      local lists = attn_device.inputs(c, seed + trial, dtype, true)
      local got = run(C.LAC_CUDA, dtype, c, lists, layout)
      local exact, naive = attn_device.references(c, dtype, lists)
      judge(dtype, got, exact, naive,
        ("trial %d of seed %d, layout %s: %s"):format(trial, seed, tostring(layout), text(c)))
    end
  end)

  -- attn_few.cu; what it leaves to others (padding, lengths, dropout) is left out
  it("equals the oracle for up to four rows and many keys, in 120 random configurations", function()
    local seed = fresh() + 3
    attn.seed(seed)
    for trial = 1, 120 do
      local dtype, layout = dtype_of(trial), layout_of()
      local c = random_config { most = trial % 3 == 0 and 500 or 60, segment = 400,
                                D = pick { 1, 3, 8, 16, 40, 64, 72, 128, 130, 256 } }
      c.N, c.align, c.padding, c.lengths, c.dropout = random(4), "end", nil, nil, 0
      local lists = attn_device.inputs(c, seed + trial, dtype, true)
      local got = run(C.LAC_CUDA, dtype, c, lists, layout)
      local exact, naive = attn_device.references(c, dtype, lists)
      judge(dtype, got, exact, naive,
        ("trial %d of seed %d, layout %s: %s"):format(trial, seed, tostring(layout), text(c)))
    end
  end)

  -- tiles have 16 to 128 rows and columns
  it("equals the CPU across many tiles, in 40 random configurations, D to 256", function()
    local seed = fresh() + 1
    attn.seed(seed)
    for trial = 1, 40 do
      local dtype = dtype_of(trial)
      local c = random_config { most = 700, segment = 500, heads = 2,
                                D = pick { 16, 33, 64, 80, 128, 136, 256 } }
      local lists = attn_device.inputs(c, seed + trial, dtype, true)
      local got = run(C.LAC_CUDA, dtype, c, lists, pick { false, "heads" } or nil)
      local exact, naive = attn_device.cpu(run, c, dtype, lists)
      judge(dtype, got, exact, naive, ("trial %d of seed %d: %s"):format(trial, seed, text(c)))
    end
  end)

  it("drops the pairs that the CPU drops", function()
    for _, dtype in ipairs { "f64", "f32", "bf16" } do
      for r = 1, 3, 2 do
        local c = direct.fill { B = 2, N = 70, H = 2, D = 70, segments = { 70 }, dilations = { r },
                                dropout = 0.4, seed = 9, rng_offset = 77 }
        local v = {}
        for i = 1, c.B * c.M * c.Hk * c.D do v[i] = 0 end
        for b = 0, c.B - 1 do for j = 0, c.M - 1 do for h = 0, c.Hk - 1 do
          v[((b * c.M + j) * c.Hk + h) * c.D + j + 1] = 1
        end end end
        local zero = {}
        for i = 1, #v do zero[i] = 0 end
        direct.device = C.LAC_CUDA
        local got = direct.read(direct.forward(c, zero, zero, v, { dtype = dtype }).out)
        direct.device = 0
        local want = direct.read(direct.forward(c, zero, zero, v).out)
        local dropped = 0
        for i = 1, #want do
          assert.are.equal(want[i] == 0, got[i] == 0)
          dropped = dropped + (want[i] == 0 and 1 or 0)
        end
        assert.is_true(dropped > 0)
      end
    end
  end)

  it("gives the same bits twice", function()
    attn.seed(12)
    for _ = 1, 12 do
      local dtype = pick { "f32", "bf16", "f16" }
      local c = random_config { most = 600, segment = 300, D = pick { 32, 64, 128 } }
      local lists = { inputs(c, 3, dtype) }
      local first = run(C.LAC_CUDA, dtype, c, lists)
      for _ = 1, 3 do attn_device.same(run(C.LAC_CUDA, dtype, c, lists), first, text(c)) end
    end
  end)

  it("gives a key whose scores are -inf no weight, and no part in gradients but 0 times infinity", function()
    for _, D in ipairs { 8, 64, 128, 200 } do
      for _, N in ipairs { 24, 200 } do
        infinite.each(D, N, false, function(c)
          for _, dtype in ipairs { "bf16", "f16" } do
            for _, kernel in ipairs { "auto", "portable" } do
              c.kernel = kernel
              infinite.check(c, dtype, infinite.on(C.LAC_CUDA), infinite.cpu, false)
            end
          end
        end)
      end
    end
  end)

  -- A value that is not finite, in one key or one row of batch item 0, all heads: nothing that does not
  -- see it may change.
  it("keeps NaN and infinity of masked keys and other rows away, in 150 random configurations", function()
    local seed = fresh() + 2
    attn.seed(seed)
    for trial = 1, 150 do
      local dtype = ({ "f64", "f32", "bf16" })[trial % 3 + 1]
      local c = random_config { most = trial % 10 == 0 and 200 or 40, D = pick { 4, 8, 16 } }
      local lists = { inputs(c, seed + trial, dtype) }
      lists[5] = nil
      local want = run(C.LAC_CUDA, dtype, c, lists)
      local which, bad = random(4), pick { NAN, math.huge, -math.huge }
      local key = which == 2 or which == 3
      local position, hit = random(key and c.M or c.N) - 1, lists[which]
      local width = #hit / c.B / (key and c.M or c.N)
      for e = 1, width do hit[position * width + e] = bad end
      local got = run(C.LAC_CUDA, dtype, c, lists)
      local most = { f64 = 1e-12, f32 = 2e-6, bf16 = 2 ^ -6 }
      local largest = 0
      for _, name in ipairs { "out", "dq", "dk", "dv" } do
        for _, x in ipairs(want[name]) do largest = math.max(largest, x == x and math.abs(x) or 0) end
      end
      local function same(name, b, rows, row, heads, h, n)
        for e = 1, n do
          local at = ((b * rows + row) * heads + h) * n + e
          local x, y = got[name][at], want[name][at]
          assert.is_true(x == y or math.abs(x - y) <= most[dtype] * (1 + largest),
            ("%s %s[%d,%d,%d] is %g, was %g before input %d at %d was %g: trial %d of seed %d: %s"):format(
              dtype, name, b, row, h, x, y, which, position, bad, trial, seed, text(c)))
        end
      end
      oracle.unreached(c, key, position, same)
    end
  end)

  it("rounds f32 products to 11 bits where use_tf32 allows it, and only there", function()
    local function eleven(x)
      if x == 0 or x ~= x or math.abs(x) == math.huge then return x end
      local _, e = math.frexp(x)
      return math.floor(x / 2 ^ (e - 11) + 0.5) * 2 ^ (e - 11)
    end
    attn.seed(5)
    for trial = 1, 12 do
      local c = random_config { most = 150, segment = 100, D = pick { 16, 40, 64, 128, 200 } }
      c.dropout = 0
      local lists = { inputs(c, trial, "f32") }
      local q, k, v, dout, dlse = unpack(lists, 1, 5)
      local exact = oracle.run(c, q, k, v, dout, dlse)
      local naive = oracle.run(c, q, k, v, dout, dlse,
                               { rounding = { result = eleven, sum = direct.round.f32 } })
      exact, naive = together(exact), together(naive)
      lac.use_tf32(true)
      local got = together(run(C.LAC_CUDA, "f32", c, lists))
      lac.use_tf32(false)
      for name, data in pairs(got) do
        attn.complain("f16", name .. " in tf32", data, exact[name], naive[name], text(c))
      end
      local again = together(run(C.LAC_CUDA, "f32", c, lists))
      local plain = oracle.run(c, q, k, v, dout, dlse,
                               { rounding = { result = direct.round.f32, sum = direct.round.f32 } })
      plain = together(plain)
      for name, data in pairs(again) do
        attn.complain("f32", name, data, exact[name], plain[name], text(c))
      end
    end
  end)

  it("takes the working memory for a backward that the plan states", function()
    local pattern = { segments = { 512, 2048 }, dilations = { 1, 4 }, return_lse = false }
    for _, case in ipairs { { 1, 4096, 64, "lse" }, { 2, 3000, 80, "mean" }, { 3, 2 ^ 16, 128, "lse" },
                            { 1, 2048, 160, "lse" } } do
      local batch, n, head_dim = unpack(case)
      pattern.merge = case[4]
      lac.scope(function()
        local x = {}
        for i = 1, 4 do
          x[i] = lac.randn({ batch, n, 4, head_dim }, { dtype = "bf16", device = "cuda", grad = i < 4 })
        end
        local out = lac.attend(x[1], x[2], x[3], pattern)
        local before = lac.memory("cuda").live
        lac.reset_peak()
        lac.grad(out, { x[1], x[2], x[3] }, { grad_outputs = { x[4] } })
        local taken = lac.memory("cuda").peak - before - 3 * 2 * x[1]:numel()
        local stated = lac.attention.plan_info({ segments = pattern.segments, dilations = pattern.dilations,
          merge = pattern.merge }, { batch = batch, n = n, heads = 4, head_dim = head_dim })
        stated = stated.device_backward
        -- classes of the pool round up by at most a quarter
        assert.is_true(taken >= 0.9 * stated and taken <= 1.25 * (stated + 3 * 2 * x[1]:numel()) + 65536,
          ("%d bytes taken, %d stated: batch %d, n %d, D %d"):format(taken, stated, batch, n, head_dim))
      end)
    end
  end)

  it("refuses a head dimension above 256 by name", function()
    local c = direct.fill { N = 4, D = 264, segments = { 4 }, dilations = { 1 } }
    local lists = { inputs(c, 1, "f32") }
    direct.device = C.LAC_CUDA
    local ok, message = pcall(direct.forward, c, lists[1], lists[2], lists[3], { dtype = "f32" })
    direct.device = 0
    assert.is_false(ok)
    assert.matches("head_dim 264 is not supported on cuda, the largest is 256", tostring(message))
  end)

  it("wrote over no guard bytes", unharmed)
end)
