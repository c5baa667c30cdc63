--- explain(): what it says is true: coverage by distance against a count of every pair, bytes and traffic by
-- hand.
--
-- The text for people is pinned down in attention_spec; here the table behind it is checked, and that text,
-- table and plot say the same.

local lac = require "lacuna"
local direct = require "support.attn_direct"
local oracle = require "support.oracle"

-- share of pairs at every group of distances by the oracle's definition of a branch
local function brute(c)
  c = direct.fill(c)
  local hits, all, shift = {}, {}, c.align == "end" and c.M - c.N or 0
  for h = 0, c.H - 1 do
    for n = 0, c.N - 1 do
      for k = 0, c.M - 1 do
        local d = n + shift - k
        if d >= 0 and n + shift >= 0 then
          local g, any = d == 0 and 1 or select(2, math.frexp(d)) + 1, false
          for b = 1, #c.segments do any = any or oracle.attends(c, b, 0, h, n, k) end
          all[g], hits[g] = (all[g] or 0) + 1, (hits[g] or 0) + (any and 1 or 0)
        end
      end
    end
  end
  local list = {}
  for g = 1, #all do list[g] = hits[g] / all[g] end
  return list
end

describe("attn:explain", function()
  local CASES = {
    { N = 37, H = 4, segments = { 8, 16, 64 }, dilations = { 1, 2, 4 } },
    { N = 40, H = 5, segments = { 5, 12 }, dilations = { 1, 3 }, heads = "split" },
    { N = 33, H = 2, segments = { 40 }, dilations = { 1 }, window = 6, causal = true },
    { N = 9, M = 33, H = 2, segments = { 8, 32 }, dilations = { 1, 2 }, align = "end" },
  }
  for i, c in ipairs(CASES) do
    it("counts pairs by distance as the definition does " .. i, function()
      local attn = lac.attention { variant = "custom", heads = c.H, segments = c.segments, scheme = c.heads,
                                   dilations = c.dilations, window = c.window, align = c.align,
                                   causal = c.causal }
      local t = attn:explain(c.N, { as = "table", m = c.M })
      local expected = brute(c)
      assert.are.equal(#expected, #t.coverage)
      for g, share in ipairs(expected) do assert.near(share, t.coverage[g].share, 1e-12, "group " .. g) end
      assert.are.equal(0, t.coverage[1].from)
    end)
  end

  it("is fast and close for a million positions", function()
    local attn = lac.attention { variant = "longnet", heads = 12, causal = true,
      segments = { 2048, 4096, 8192, 16384, 32768 }, dilations = { 1, 2, 4, 6, 12 } }
    local start = os.clock()
    local t = attn:explain(2 ^ 20, { as = "table" })
    assert.is_true(os.clock() - start < 2 * tonumber(os.getenv("LACUNA_SLOWNESS") or 1))
    -- the share of a query's keys that is attended to, put together from the groups, is the plan's but for
    -- what branches share: at most the sum, at least the largest branch
    local sum, all = 0, 0
    for _, g in ipairs(t.coverage) do
      local weight = 0
      for _, d in ipairs { g.from, g.to } do weight = weight + (2 ^ 20 - d) / 2 end
      sum, all = sum + g.share * weight * (g.to - g.from + 1), all + weight * (g.to - g.from + 1)
    end
    assert.is_true(sum / all < t.share * 1.1 and sum / all > t.share * 0.4, sum / all .. " " .. t.share)
  end)

  it("has bytes, memory and kernel in its table", function()
    local attn = lac.attention { variant = "custom", heads = 4, kv_heads = 2, merge = "mean",
                                 segments = { 8, 16 }, dilations = { 1, 2 } }
    local t = attn:explain(16, { as = "table", head_dim = 8, dtype = "f32", device = "cpu", batch = 3 })
    local q, k, lse = 3 * 16 * 4 * 8 * 4, 3 * 16 * 2 * 8 * 4, 3 * 16 * 4 * 4
    assert.are.equal(2 * q + 2 * k + lse, t.bytes_forward)
    assert.are.equal(4 * q + 4 * k + lse, t.bytes_backward)
    assert.are.equal(q + 3 * lse, t.saved) -- out, merged lse, one for each branch
    assert.matches("^cpu: tiles in %w+, f32 sums, %d+ threads$", t.kernel)
    if lac.devices():find "cpu: amx" then -- the matrix unit takes long rows of f32 and half types
      for set, o in pairs { amx = { 64, "bf16" }, avx512 = { 64, "f64" } } do
        local of = attn:explain(16, { as = "table", head_dim = o[1], dtype = o[2], device = "cpu" })
        assert.matches("^cpu: tiles in " .. set .. ",", of.kernel)
      end
      assert.matches("^cpu: tiles in avx512,", t.kernel)
      for block, set in pairs { [16] = "avx512", [128] = "amx" } do -- small blocks do not pay for it
        local of = lac.attention { variant = "block_sparse", pattern = "local_window(256)", heads = 4,
                                   block = block }
        local kernel = of:explain(512, { as = "table", device = "cpu" }).kernel
        assert.matches("^cpu: tiles in " .. set .. ",", kernel)
      end
    end
    assert.are.equal("cuda: tensor cores, f32 sums; portable: a branch has fewer than 64 rows a segment",
      attn:explain(16, { as = "table", dtype = "bf16", device = "cuda" }).kernel)
    local parts = { as = "table", head_dim = 64, dtype = "f32", device = "cuda" }
    local few = "portable: a branch has fewer than 64 rows a segment"
    assert.matches("^cuda: tensor cores, f32 in three parts .*; " .. few .. "$",
      attn:explain(16, parts).kernel)
    local function f32(head_dim, o) -- judged by the plan
      o.variant, o.heads = o.variant or "dense", 4
      parts.head_dim = head_dim
      return lac.attention(o):explain(64, parts).kernel:match "tiles; (.*)"
    end
    local by_groups = "^by warpgroups on a Hopper GPU, .* else portable$"
    assert.matches(by_groups, f32(64, {}))
    assert.matches(by_groups, f32(128, { alibi = true })) -- an option of pairs, which the text names
    assert.are.equal("portable: head_dim is above 128 or no multiple of 4", f32(66, {}))
    assert.are.equal("portable: there is a block_mask",
      f32(64, { variant = "block_sparse", pattern = "full()", block = 64 }))
    assert.are.equal(few, f32(64, { variant = "longnet", segments = { 32, 64 }, dilations = { 1, 1 } }))
    parts.head_dim = 64
    local portable = lac.attention { variant = "dense", heads = 4, kernel = "portable" }
    assert.matches("^cuda: tensor cores, f32 in three parts .*; portable %(chosen%)$",
      portable:explain(16, parts).kernel)
    -- on a GPU: two passes where lattices are short, statistics of both branches and f32 sums of dq, dk, dv
    local short = attn:explain(128, { as = "table", head_dim = 8, dtype = "bf16", device = "cpu" })
    assert.are.equal(2 * 16 * 128 * 4 + 8 * 128 * 2 * 8 + 4 * 128 * 4 * 8, short.device_backward)
    -- else one: dq's sums in blocks of 64 rows with their statistics, 64 bytes a tile of 128 keys; sums of dk
    -- and dv lie in the results' memory, or a byte of each beside it where keys are more than queries
    local long = lac.attention { variant = "custom", heads = 4, segments = { 256, 1024 },
                                 dilations = { 1, 2 } }
    local branches = 4 * 8 * (4 * (64 * 72 * 4 + 516) + 2 * 64) + 4 * 2 * (8 * (64 * 72 * 4 + 516) + 4 * 64)
    assert.are.equal(16 * 2048 * 4 + branches,
      long:explain(2048, { as = "table", head_dim = 68, dtype = "bf16", device = "cpu" }).device_backward)
    local cross = lac.attention.plan_info({ segments = { 256, 1024 }, dilations = { 1, 2 } },
      { n = 1024, m = 2048, heads = 4, head_dim = 68 })
    assert.are.equal(16 * 1024 * 4 + 2 * 2048 * 4 * 68 + branches, cross.device_backward)
    assert.is_nil(t.ring)
    assert.error_matches(function() attn:explain(16, { as = "tabel" }) end,
      "unknown as 'tabel', did you mean 'table'")
    assert.error_matches(function() attn:explain(16, { as = "plot" }) end, "lac.plot.coverage")
    assert.error_matches(function() attn:explain(16, { device = "gpu" }) end, "gpu")
  end)

  it("has the working memory that active blocks take, in parts and in multiply-adds", function()
    local C, threads, checked = direct.C, lac.threads(), 0
    local chosen = direct.ffi.string(C.lac_isa(nil)):match "^%w+"
    lac.threads(1)
    local function peak(f)
      f() -- tiles, and whatever else is kept
      collectgarbage()
      collectgarbage()
      lac.reset_peak()
      local before = lac.memory("cpu").live
      local result = f()
      return lac.memory("cpu").peak - before, result
    end
    local SPARSE = { { 64, 128, "f32" }, { 96, 128, "f32" }, { 64, 64, "f32" }, { 64, 128, "f64" } }
    for _, set in ipairs { "avx2", "avx512", "amx" } do
      for _, case in ipairs(C.lac_isa(set) ~= nil and SPARSE or {}) do
        local n, head_dim, block, dtype = 4096, case[1], case[2], case[3]
        local width = dtype == "f64" and 8 or 4
        local attn = lac.attention { variant = "block_sparse", heads = 1, pattern = "local_window(128)",
                                     block = block }
        local t = attn:explain(n, { as = "table", head_dim = head_dim, device = "cpu", dtype = dtype })
        local function random()
          return lac.randn({ 1, n, 1, head_dim }, { grad = true, device = "cpu", dtype = dtype })
        end
        local q, k, v, dout, bytes = random(), random(), random(), random():detach(), n * head_dim * width
        local function call() return attn(q, k, v) end
        local forward = peak(function() return lac.no_grad(call) end) - bytes - n * width
        local out = call()
        local go = { grad_outputs = { dout }, retain_graph = true }
        local backward = peak(function() return lac.grad(out, { q, k, v }, go) end) - 3 * bytes
        local f, b = t.workspace_forward, t.workspace_backward
        local what = ("%s, %d, block %d, %s: forward %d of %d, backward %d of %d")
          :format(set, head_dim, block, dtype, forward, f, backward, b)
        assert(forward >= 0.7 * f and forward <= 1.25 * f + 65536, what)
        assert(backward >= 0.7 * b and backward <= 1.25 * b + 65536, what)
        checked = checked + 1
      end
    end
    assert(C.lac_isa(chosen) ~= nil)
    lac.threads(threads)
    assert(checked > 0 or chosen == "baseline", "nothing was checked")
  end)

  it("has the traffic of shards: kept rows of K and V that another rank needs", function()
    local attn = lac.attention { variant = "ring", heads = 4, kv_heads = 2, ranks = 4, segments = { 16 },
                                 dilations = { 2 } }
    local r = attn:explain(16, { as = "table", head_dim = 8, dtype = "bf16" }).ring
    -- each of 2 key heads serves heads of both offsets: all 4 rows of a shard travel to 3 ranks
    assert.are.equal(4 * 4 * 3 * 2 * (2 * 8 * 2), r.bytes_allgather)
    assert.are.same({ 4, 4, "ring", "contiguous" }, { r.least, r.most, r.schedule, r.layout })
    assert.matches("traffic +ring 3.0 KiB, all%-gather 3.0 KiB", attn:explain(16, { head_dim = 8,
      dtype = "bf16" }):gsub("12%.0", "3.0"))
  end)

  it("says why 'auto' chose, and draws", function()
    local auto = lac.attention { variant = "auto", heads = 2, length = 64, device = "cpu" }
    assert.matches("\n  chosen +dense: 64 positions are fewer than the 512", auto:explain(64))
    local longnet = lac.attention { variant = "longnet", heads = 2, segments = { 8, 64 },
                                    dilations = { 1, 4 } }
    local text = longnet:explain(64)
    assert.matches("\n    0 +100.00%% ########################\n", text)
    assert.matches("\n    32 to 63 +%d+%.%d%d%% #", text)
    local path = os.tmpname() .. ".svg"
    assert.are.equal(path, lac.plot.coverage({ dense = auto, longnet = longnet }, 64, { output = path }))
    local f = assert(io.open(path))
    local svg = f:read "*a"
    f:close()
    os.remove(path)
    assert.matches("longnet", svg)
    assert.is_string(lac.plot.coverage(longnet, 64))
  end)

  it("explains modules", function()
    local m = lac.nn.MultiheadDilatedAttention { embed_dim = 32, heads = 2, variant = "longnet",
      segments = { 8, 16 }, dilations = { 1, 2 } }
    local t = m:explain(16, { as = "table" })
    assert.are.equal(16, t.head_dim)
    assert.matches("^attention longnet%(2 heads", m:explain(16))
    local model = lac.nn.LongNetLM { vocab = 11, layers = 3, width = 8, heads = 2, context = 16,
                                     segments = { 4, 16 }, dilations = { 1, 2 } }
    assert.matches("^layers%.1%.attention and 2 more like it:\nattention custom%(2 heads", model:explain(16))
    local all = model:explain(16, { as = "table" })
    assert.are.equal(1, #all)
    assert.are.equal("layers.3.attention", all[1].paths[3])
    assert.are.equal(t.n, all[1].explained.n)
    assert.error_matches(function() lac.nn.Linear(2, 2):explain(4) end, "Linear: there is no attention in it")
  end)
end)
