--- The forward of attention on Hopper: against the oracle, the CPU, the portable kernel, and itself.
--
-- The kernel is forced, so a call that it could not do would fail here. Random configurations have what it
-- takes: head dimensions to 256, f16 and bf16, any pattern, causal, windows, lengths, grouped heads, all
-- merges; attn_random says how they are made, poisoned and judged. Past a few tiles the CPU in f64 stands in
-- for the oracle.

local attn_device = require "support.attn_device"
local it = attn_device.it(it, pending)

local direct = require "support.attn_direct"
local attn = require "support.attn_random"
local lac = require "lacuna"
local C = direct.C
local random, pick, chance, text = attn.random, attn.pick, attn.chance, attn.text
local forward = attn_device.forward

-- any valid configuration of what the kernel does; heads: of keys, at most
local function random_config(dims, most, heads)
  local c = attn.random_config { most = most, segment = most, heads = heads or 2, D = dims() }
  c.dropout, c.dedup, c.padding, c.scale = 0, false, nil, pick { 0, 0.3, 0.05 }
  c.kernel = "hopper"
  return c
end

local function to_128() return pick { 64, 64, 128, 128, 8 * random(16) } end
local function above_128() return pick { 256, 256, 192, 136, 8 * (16 + random(16)) } end

describe("the forward of attention on Hopper #gpu", function()
  local unharmed = attn_device.guard(setup, teardown)

  -- rows at most, where tiles are many; lists of wider rows would take what memory Lua has
  local ranges = { { "head_dim to 128", to_128, 1500, 500 }, { "head_dim above 128", above_128, 600, 250 } }
  for _, range in ipairs(ranges) do
    local name, dims, many, some = unpack(range)
    it("equals the oracle in 60 random configurations, " .. name, function()
      local seed = attn.fresh()
      attn.seed(seed)
      for trial = 1, 60 do
        local c, dtype = random_config(dims, trial % 6 == 0 and 150 or 50), pick { "bf16", "f16" }
        local lists = attn_device.inputs(c, seed + trial, dtype)
        local got = forward(C.LAC_CUDA, dtype, c, lists, pick { false, false, "heads" } or nil)
        local exact, naive = attn_device.references(c, dtype, lists)
        attn_device.judge(dtype, got, exact, naive, ("trial %d of seed %d: %s"):format(trial, seed, text(c)))
      end
    end)

    it("equals the CPU across many tiles in 240 random configurations, some with rising scores, " .. name,
      function()
        local seed = attn.fresh() + 1
        attn.seed(seed)
        for trial = 1, 240 do
          local c, dtype = random_config(dims, trial % 8 == 0 and many or some, 1), pick { "bf16", "f16" }
          local peak = chance(0.3) and pick { 4, 20 } or nil
          local lists = attn_device.inputs(c, seed + trial, dtype)
          if peak then attn_device.rise(c, lists[2], peak, dtype) end
          local got = forward(C.LAC_CUDA, dtype, c, lists, pick { false, false, "heads" } or nil)
          local exact, naive = attn_device.cpu(forward, c, dtype, lists)
          attn_device.judge(dtype, got, exact, naive,
            ("trial %d of seed %d, peak %s: %s"):format(trial, seed, tostring(peak), text(c)))
        end
      end)

    it("agrees with the portable kernel and gives the same bits twice, " .. name, function()
      attn.seed(12)
      for _ = 1, 12 do
        local c, dtype = random_config(dims, many, 1), pick { "bf16", "f16" }
        local lists = attn_device.inputs(c, 3, dtype)
        local first = forward(C.LAC_CUDA, dtype, c, lists)
        attn_device.near(forward(C.LAC_CUDA, dtype, c, lists, nil, "portable"), first, text(c))
        for _ = 1, 3 do attn_device.same(forward(C.LAC_CUDA, dtype, c, lists), first, text(c)) end
      end
    end)

    it("keeps NaN and infinity of masked keys and other rows away, in 60 random configurations, " .. name,
      function()
        local seed = attn.fresh() + 2
        attn.seed(seed)
        local function allowed(y) return 2 ^ -6 * (1 + math.abs(y)) end
        for trial = 1, 60 do
          local c = random_config(dims, trial % 6 == 0 and 300 or 90)
          attn_device.keeps_away(c, { attn.inputs(c, seed + trial, "bf16") }, allowed,
            ("trial %d of seed %d: %s"):format(trial, seed, text(c)))
        end
      end)
  end

  it("equals the CPU where dilated branches reach all rows, or nearly", function()
    attn.seed(44)
    for trial = 1, 15 do
      local c, dtype = attn_device.covering(trial), pick { "bf16", "f16" }
      c.D, c.kernel = pick { 64, 128 }, "hopper"
      c = direct.fill(c)
      local lists = attn_device.inputs(c, trial, dtype)
      local exact, naive = attn_device.cpu(forward, c, dtype, lists)
      attn_device.judge(dtype, forward(C.LAC_CUDA, dtype, c, lists), exact, naive, text(c))
    end
  end)

  it("equals the CPU where branches that take turns have several tiles an item", function()
    attn.seed(45)
    for trial = 1, 9 do
      local r, dtype = pick { 2, 3, 4 }, pick { "bf16", "f16" }
      local w, heads = r * pick { 129, 200, 400 } + pick { 0, 1 }, random(2)
      local c = { N = 2 * w + pick { 0, 70 * r }, Hk = heads, H = heads * random(2), D = pick { 64, 128 },
        offset = "branch", segments = {}, dilations = {}, causal = trial % 3 == 0, kernel = "hopper" }
      for i = 1, r do c.segments[i], c.dilations[i] = w, r end
      c.M = c.N
      c = direct.fill(c)
      local lists = attn_device.inputs(c, trial, dtype)
      local exact, naive = attn_device.cpu(forward, c, dtype, lists)
      attn_device.judge(dtype, forward(C.LAC_CUDA, dtype, c, lists), exact, naive, text(c))
    end
  end)

  it("says why it cannot do a call that it is forced to do", function()
    local function refused(pattern, change, dtype, layout)
      local c = { N = 70, D = 64, segments = { 70 }, dilations = { 1 }, kernel = "hopper" }
      for name, value in pairs(change) do c[name] = value end
      c = direct.fill(c)
      local lists = { attn.inputs(c, 1, "bf16") }
      local ok, message = pcall(forward, C.LAC_CUDA, dtype or "bf16", c, lists, layout)
      assert.is_false(ok)
      assert.matches("kernel 'hopper' cannot do this call: " .. pattern, tostring(message))
      c.kernel = "auto"
      forward(C.LAC_CUDA, dtype or "bf16", c, lists, layout)
    end
    refused("tensors are neither f16 nor bf16", {}, "f32")
    refused("head_dim is above 256 or no multiple of 8", { D = 60 })
    refused("head_dim is above 256 or no multiple of 8", { D = 132 })
    refused("the scale is negative", { scale = -1 })
    refused("the head dimension is not contiguous", {}, "bf16", "inner")
    refused("strides do not fit a tensor map", {}, "bf16", "reversed")
    refused("pairs that several branches keep", { segments = { 70, 70 }, dilations = { 1, 2 }, dedup = true })
    local kept = {}
    for i = 1, 70 do kept[i] = i % 3 > 0 end
    refused("head_dim is above 128, with padding", { D = 256, padding = kept })
    refused("head_dim is above 128, with dropout", { D = 136, dropout = 0.5 })
    refused("head_dim is above 128, with alibi slopes", { D = 256, alibi = { 0.5 } })
  end)

  it("wrote over no guard bytes", unharmed)
end)

-- Kernels add in different orders, so that f16 results of some ten thousand numbers tell them apart.
describe("the kernel of a plan on Hopper #gpu", function()
  local function same(a, b)
    for i, x in ipairs(a) do if (x - b[i]):abs():max():item() ~= 0 then return false end end
    return true
  end

  local function normal(n, heads, head_dim)
    return lac.randn({ 1, n, heads, head_dim }, { dtype = "f16", device = "cuda" })
  end

  -- { out }, and the gradients or nil and why there are none
  local function results(options, inputs, dout)
    local x = {}
    for i, t in ipairs(inputs) do x[i] = t:detach():requires_grad_() end
    local out = lac.attention(options)(unpack(x))
    local ok, found = pcall(lac.grad, out, x, { grad_outputs = { dout } })
    return { out:detach() }, ok and found, tostring(found)
  end

  -- what explain() says: forward, backward, its words
  local function said(options, n, head_dim)
    local words = lac.attention(options):explain(n, { dtype = "f16", device = "cuda", head_dim = head_dim,
                                                      as = "table" }).kernel
    local one = words:match "; forward (%w+)" or words:match "; (%w+)"
    return one, words:match "backward (%w+) on" or words:match "backward %(" and "portable" or one, words
  end

  local CASES = { -- rows, head dimension, forward, backward, options
    { 64, 64, "hopper", "hopper" }, { 63, 64, "portable", "hopper" }, { 31, 64, "portable", "portable" },
    { 300, 128, "hopper", "hopper", { causal = true } }, { 300, 136, "hopper", "portable" },
    { 300, 36, "portable", "portable" }, { 100, 64, "hopper", "portable", { heads = 33, kv_heads = 1 } },
    { 512, 64, "hopper", "hopper", { block = 128 } }, { 512, 128, "hopper", "portable", { block = 64 } },
    { 512, 64, "portable", "portable", { block = 48 } },
  }
  for number, case in ipairs(CASES) do
    local n, head_dim, one, two, more = unpack(case, 1, 5)
    it(("is what explain() says, %d: forward %s, backward %s"):format(number, one, two), function()
      local o = { variant = "dense", heads = 16 }
      for name, value in pairs(more or {}) do o[name] = value end
      if o.block then o.variant, o.pattern = "block_sparse", "local_window(100)" end
      local says = { said(o, n, head_dim) }
      assert.are.same({ one, two }, { says[1], says[2] }, says[3])
      lac.scope(function()
        local inputs = { normal(n, o.heads, head_dim) }
        for i = 2, 3 do inputs[i] = normal(n, o.kv_heads or o.heads, head_dim) end
        local dout = normal(n, o.heads, head_dim)
        local out, gradients = results(o, inputs, dout)
        o.kernel = "portable"
        local other, theirs = results(o, inputs, dout)
        assert.are.equal(one == "portable", same(out, other))
        if one == two then assert.are.equal(one == "portable", same(gradients, theirs)) end
        if one == "portable" then return end -- a single tile's gradients are the same by both kernels
        o.kernel = "hopper"
        local forced, its, why = results(o, inputs, dout)
        assert.is_true(same(out, forced))
        if two == "hopper" then return assert.is_true(same(gradients, its)) end
        assert.matches("kernel 'hopper' cannot do this call: ", why)
      end)
    end)
  end
end)
