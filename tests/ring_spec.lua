--- Attention over virtual ranks: who holds which rows, what the ranks compute together, what they refuse.
--
-- The one-device variant is the oracle (it has its own, attention_spec.lua): out, lse and all gradients of
-- every layout, schedule and number of ranks must equal it, also where shards are uneven, cut segments
-- anywhere, or are empty. The geometry is checked by counting: every pair of the brute-force pattern in
-- exactly one task.

local lac = require "lacuna"
local shard = require "lacuna.attention.shard"

local function refused(pattern, f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  assert.matches(pattern, message)
end

local function positions(list)
  local all = {}
  for _, piece in ipairs(list) do
    for u = 0, piece.count - 1 do all[#all + 1] = piece.first + u * piece.step end
  end
  table.sort(all)
  return all
end

describe("shards", function()
  it("hold every row once, evenly, for any number of ranks", function()
    for _, layout in ipairs(shard.LAYOUTS) do
      for _, case in ipairs { { 12, 4 }, { 13, 4 }, { 3, 5 }, { 7, 1 } } do
        local n, ranks = case[1], case[2]
        local seen, least, most = {}, n, 0
        for _, pieces in ipairs(shard.pieces(n, ranks, layout)) do
          local rows = positions(pieces)
          least, most = math.min(least, #rows), math.max(most, #rows)
          for _, p in ipairs(rows) do seen[p] = (seen[p] or 0) + 1 end
        end
        for p = 0, n - 1 do assert.are.equal(1, seen[p], layout .. " " .. p) end
        assert.is_true(most - least <= (layout == "zigzag" and 2 or 1))
      end
    end
    assert.are.same({ 0, 1, 6, 7 }, positions(shard.pieces(8, 2, "zigzag")[1]))
    assert.are.same({ 1, 4, 7 }, positions(shard.pieces(8, 3, "striped")[2]))
  end)

  it("meet in tasks that hold every pair of a branch once", function()
    local strip = { segment = 9, dilation = 2, offset = 1, head0 = 0, heads = 1, branch = 0 }
    for _, layout in ipairs(shard.LAYOUTS) do
      local pieces, count = shard.pieces(23, 3, layout), {}
      local tasks = shard.tasks({ strip }, pieces, pieces, { causal = true, shift = 0 })
      for i = 1, 3 do
        for j = 1, 3 do
          for _, t in ipairs(tasks[i][j]) do
            for a = 0, t.q.count - 1 do
              for b = 0, t.k.count - 1 do
                local p, k = t.q.first + a * t.q.step, t.k.first + b * t.k.step
                assert.are.equal(p, t.q_piece.first + (t.q.at + a * t.q.hop) * t.q_piece.step)
                if k <= p then count[p * 23 + k] = (count[p * 23 + k] or 0) + 1 end
              end
            end
          end
        end
      end
      for p = 0, 22 do
        for k = 0, p do
          local kept = p % 9 % 2 == 1 and k % 9 % 2 == 1 and math.floor(p / 9) == math.floor(k / 9)
          assert.are.equal(kept and 1 or nil, count[p * 23 + k], ("%s %d %d"):format(layout, p, k))
        end
      end
    end
  end)

  it("send only kept rows, and nothing where segments do not straddle", function()
    local function traffic(segment, dilation, layout, n)
      local strip = { segment = segment, dilation = dilation, offset = 0, head0 = 0, heads = 2, branch = 0 }
      local pieces = shard.pieces(n or 16, 4, layout)
      return shard.traffic(shard.tasks({ strip }, pieces, pieces, { shift = 0 }))
    end
    assert.are.same({ ring = 0, allgather = 0, ring_held = 0, allgather_held = 0 },
                    traffic(4, 1, "contiguous"))
    -- one segment: each of 4 shards of 4 rows has 2 kept ones, for 3 others; 2 heads
    assert.are.same({ ring = 48, allgather = 48, ring_held = 4, allgather_held = 12 },
                    traffic(16, 2, "contiguous"))
    -- two segments: a shard's rows matter to one other rank, which is 1 or 3 steps away on the ring
    local t = traffic(8, 1, "contiguous")
    assert.are.equal(32, t.allgather)
    assert.are.equal(2 * 8 + 2 * 24, t.ring)
  end)
end)

local SEQUENCES = {
  ["all pairs"] = { N = 13 }, causal = { N = 24, causal = true },
  ["window, causal"] = { N = 13, causal = true, window = 5 }, window = { N = 14, window = 3 },
  ["cross, aligned to the end"] = { N = 5, M = 17, causal = true, align = "end" },
  ["cross, window"] = { N = 5, M = 17, window = 6, align = "end" },
  ["more queries than keys"] = { N = 17, M = 5, causal = true },
}
local MERGES = { { merge = "lse" }, { merge = "mean" }, { merge = "lse_detach" }, { scheme = "split" },
                 { merge = "sum", offset = "block" } }

describe("lac.attention over virtual ranks", function()
  local function leaf(...) return lac.randn({ ... }, { dtype = "f64", grad = true }) end
  local function far(a, b) return lac.where(a:eq(b), 0, a - b):abs():max():item() end

  local function compare(c, m, layout, ranks, kv_heads, extra, sizes)
    local M = c.M or c.N
    local q = lac.randn({ 2, c.N, 4, 3 }, { dtype = "f64", grad = true })
    local k = lac.randn({ 2, M, kv_heads, 3 }, { dtype = "f64", grad = true })
    local v = lac.randn({ 2, M, kv_heads, 3 }, { dtype = "f64", grad = true })
    local o = { variant = "custom", heads = 4, kv_heads = kv_heads, segments = { 4, 9, 16 },
                dilations = { 1, 2, 4 }, causal = c.causal, window = c.window, align = c.align }
    for _, from in ipairs { m, sizes } do
      for name, value in pairs(from) do o[name] = value end
    end
    local one = lac.attention(o)
    o.variant, o.of, o.ranks, o.layout = "ring", "custom", ranks, layout
    o.schedule = ranks % 2 == 0 and "allgather" or "ring"
    local many = lac.attention(o)
    local call = { key_lengths = lac.tensor({ M, math.ceil(M / 2) }, { dtype = "i64" }) }
    for name, value in pairs(extra and extra(c.N, M) or {}) do call[name] = value end
    local out1, lse1 = one(q, k, v, call)
    local out2, lse2 = many(q, k, v, call)
    assert.is_true(far(out1, out2) < 1e-12)
    assert.is_true(far(lse1, lse2) < 1e-12)
    local g = { lac.randn({ 2, c.N, 4, 3 }, { dtype = "f64" }),
                lac.where(lse1:eq(-math.huge), 0, lac.randn({ 2, c.N, 4 }, { dtype = "f64" })):detach() }
    local inputs = { q, k, v, call.bias }
    local first = lac.grad({ out1, lse1 }, inputs, { grad_outputs = g })
    local second = lac.grad({ out2, lse2 }, inputs, { grad_outputs = g })
    for i = 1, #inputs do assert.is_true(far(first[i], second[i]) < 1e-11, "gradient " .. i) end
  end

  for name, c in pairs(SEQUENCES) do
    it("equals one device, forward and backward: " .. name, function()
      lac.manual_seed(1)
      for i, m in ipairs(MERGES) do
        for j, layout in ipairs(shard.LAYOUTS) do
          for r, ranks in ipairs { 1, 2, 3, 5 } do -- every second one, all of them in turn
            if (i + j + r) % 2 == 0 and not (c.window and layout == "striped" and ranks > 1) then
              compare(c, m, layout, ranks, ranks == 3 and 2 or 4)
            end
          end
        end
      end
    end)
  end

  -- options of pairs, in the shapes that are allowed; lengths stay in the way
  local PAIRS = {
    mask = function(N, M) return { mask = lac.rand({ N, M }):lt(0.7) } end,
    bias = function(N, M) return { bias = leaf(N, M) } end,
    alibi = function() return { alibi = { 0.5, 0.25, 0.125, 0.7 } } end,
    everything = function(N, M)
      return { mask = lac.rand({ 2, 1, N, M }):lt(0.8), bias = leaf(2, 4, N, M), alibi = true }
    end,
    ["by head"] = function(N, M) return { mask = lac.rand({ 4, N, M }):lt(0.8), bias = leaf(1, N, M) } end,
  }
  for option, extra in pairs(PAIRS) do
    it("cuts what is said of pairs: " .. option, function()
      lac.manual_seed(3)
      local turn = 0
      for _, c in pairs(SEQUENCES) do
        for _, m in ipairs(MERGES) do
          for _, layout in ipairs(shard.LAYOUTS) do
            turn = turn + 1
            local lopsided = layout == "striped" and (c.window or not c.causal)
            if turn % 4 == 0 and not lopsided then
              compare(c, m, layout, turn % 8 < 4 and 2 or 3, turn % 16 < 8 and 2 or 4, extra)
            end
          end
        end
      end
    end)
  end

  -- blocks of 16 and 32 over shards that end with blocks and shards that do not, rows at steps of 1 and 2
  it("runs active blocks only, given with a call or as a pattern of the variant", function()
    lac.manual_seed(6)
    local masks = lac.attention.masks
    local given = {
      masks.local_window(32) + masks.global_tokens(16),
      masks.per_head{ masks.random(0.4, 1), masks.axial(3) },
      lac.rand({ 2, 1, 6, 6 }):lt(0.5),
    }
    local turn = 0
    for _, c in ipairs { { N = 96 }, { N = 96, causal = true }, { N = 96, causal = true, window = 40 },
                         { N = 90, M = 96, causal = true, align = "end" }, { N = 96, window = 20 } } do
      for p, blocks in ipairs(given) do
        for _, layout in ipairs(shard.LAYOUTS) do
          for _, ranks in ipairs { 3, 4, 2 } do
            turn = turn + 1
            local lopsided = layout == "striped" and (c.window or not c.causal)
            if turn % 3 == 0 and not lopsided then
              compare(c, MERGES[turn % 5 + 1], layout, ranks, turn % 2 == 0 and 2 or 4, function(N, M)
                return { block_mask = blocks, block = 16, bias = p == 1 and leaf(N, M) or nil,
                         alibi = p == 2 or nil, mask = p == 3 and lac.rand({ N, M }):lt(0.9) or nil }
              end, { segments = { 32, 96 }, dilations = { 1, 2 } })
            end
          end
        end
      end
    end
    local o = { heads = 2, segments = { 64, 128 }, dilations = { 1, 2 }, causal = true, block = 32,
                pattern = masks.local_window(64) + masks.global_tokens(32) }
    local function make(more)
      local all = {}
      for _, from in ipairs { o, more } do
        for name, value in pairs(from) do all[name] = value end
      end
      return lac.attention(all)
    end
    local one, x = make { variant = "block_sparse", of = "longnet" }, leaf(1, 128, 2, 4)
    for _, layout in ipairs(shard.LAYOUTS) do
      local many = make { variant = "ring", ranks = 4, layout = layout }
      assert.is_true(far(one(x, x, x), many(x, x, x)) < 1e-12)
      local a = lac.grad((one(x, x, x)):square():sum(), { x })[1]
      local b = lac.grad((many(x, x, x)):square():sum(), { x })[1]
      assert.is_true(far(a, b) < 1e-11)
      assert.matches("block 32, pattern local_window%(64%) %+ global_tokens%(32%)", tostring(many))
      assert.matches("\n  blocks  ", many:explain(128))
      assert.matches("K and V, as if all blocks were active\n", many:explain(128))
      assert.is_true(many.options == lac.attention(many.options).options)
    end
  end)

  it("costs its active blocks where shards end with blocks", function()
    local x = lac.randn { 1, 256, 1, 8 }
    -- engine calls, and whether blocks were spelled out as masks of pairs
    local function work(more)
      local o = { variant = "ring", of = "dense", ranks = 4, heads = 1 }
      for name, value in pairs(more) do o[name] = value end
      local attn = lac.attention(o)
      local p = lac.profile(function() lac.no_grad(function() attn(x, x, x) end) end, { print = false })
      local calls = {}
      for _, row in ipairs(p:rows "op") do calls[row.name] = row.calls end
      return calls.attend, calls.index_select ~= nil
    end
    assert.are.same({ 16, false }, { work {} })
    assert.are.same({ 4, false }, { work { pattern = "diagonal()", block = 16 } })
    assert.are.same({ 10, false }, { work { pattern = "local_window(128)", block = 64 } })
    assert.are.same({ 16, false }, { work { pattern = "full()", block = 64, layout = "striped" } })
    assert.are.same({ 16, true }, { work { pattern = "full()", block = 32, layout = "striped" } })
    assert.are.same({ 13, true }, { work { pattern = "diagonal()", block = 64, ranks = 5 } })
  end)

  it("takes packed sequences, each as if alone", function()
    lac.manual_seed(4)
    for _, layout in ipairs(shard.LAYOUTS) do
      for _, m in ipairs { { merge = "lse" }, { merge = "mean" }, { scheme = "split" } } do
        local q, k, v, bias = leaf(1, 29, 4, 3), leaf(1, 29, 2, 3), leaf(1, 29, 2, 3), leaf(29, 29)
        local o = { variant = "custom", heads = 4, kv_heads = 2, segments = { 4, 9, 16 },
                    dilations = { 1, 2, 4 }, causal = true }
        for name, value in pairs(m) do o[name] = value end
        local one = lac.attention(o)
        o.variant, o.of, o.ranks, o.layout = "ring", "custom", 3, layout
        local many, starts = lac.attention(o), { 0, 5, 5, 21, 29 }
        local call = { cu_seqlens = starts, bias = bias, alibi = true }
        local out1, lse1 = one(q, k, v, call)
        local out2, lse2 = many(q, k, v, call)
        assert.is_true(far(out1, out2) < 1e-12)
        assert.is_true(far(lse1, lse2) < 1e-12)
        local g = { lac.randn({ 1, 29, 4, 3 }, { dtype = "f64" }) }
        local a = lac.grad({ out1 }, { q, k, v, bias }, { grad_outputs = g })
        local b = lac.grad({ out2 }, { q, k, v, bias }, { grad_outputs = g })
        for i = 1, 4 do assert.is_true(far(a[i], b[i]) < 1e-11, "gradient " .. i) end
        local third = many(q:narrow(2, 6, 16), k:narrow(2, 6, 16), v:narrow(2, 6, 16),
          { bias = bias:narrow(1, 6, 16):narrow(2, 6, 16), alibi = true })
        assert.is_true(far(third, out2:narrow(2, 6, 16)) < 1e-12)
      end
    end
  end)

  it("passes on the gradient of the log-sum-exp alone", function()
    local o = { variant = "longnet", heads = 2, segments = { 4, 8 }, dilations = { 1, 2 }, causal = true }
    local one = lac.attention(o)
    local many = lac.attention(one.options:with { variant = "ring", ranks = 3 })
    local q, k, v = leaf(1, 9, 2, 2), leaf(1, 9, 2, 2), leaf(1, 9, 2, 2)
    local results = {}
    for i, attn in ipairs { one, many } do
      local _, lse = attn(q, k, v)
      results[i] = lac.grad(lac.where(lse:eq(-math.huge), 0, lse):sum(), { q, k }, { allow_unused = true })
    end
    for i = 1, 2 do assert.is_true(far(results[1][i], results[2][i]) < 1e-12) end
  end)

  it("has the gradients of what it computes, and again at another length", function()
    local attn = lac.attention { variant = "ring", heads = 2, ranks = 3, segments = { 4, 8 },
                                 dilations = { 1, 2 }, causal = true }
    for _, n in ipairs { 7, 4, 7 } do
      local q, k, v = leaf(1, n, 2, 2), leaf(1, n, 2, 2), leaf(1, n, 2, 2)
      local ok, report = lac.gradcheck(function(a, b, c) return (attn(a, b, c)) end, { q, k, v })
      assert.is_true(ok, tostring(report))
    end
  end)

  it("computes in half precision with f32 sums", function()
    lac.manual_seed(2)
    local o = { variant = "longnet", heads = 2, segments = { 8, 32 }, dilations = { 1, 2 } }
    local one = lac.attention(o)
    o.variant, o.ranks = "ring", 4
    local many = lac.attention(o)
    local x = lac.randn { 1, 32, 2, 8, dtype = "bf16" }
    local a, la = one(x, x, x)
    local b, lb = many(x, x, x)
    assert.are.equal("bf16", b:dtype())
    assert.are.equal("f32", lb:dtype())
    assert.is_true((a:float() - b:float()):abs():max():item() < 0.02)
    assert.is_true((la - lb):abs():max():item() < 1e-5)
    for _, dtype in ipairs { "bf16", "f32" } do
      local bias = lac.randn({ 32, 32 }, { dtype = dtype, grad = true })
      local g = {}
      for i, attn in ipairs { one, many } do
        local y = attn(x, x, x, { bias = bias, alibi = true })
        g[i] = lac.grad(y:float():square():sum(), { bias })[1]
        assert.are.equal(dtype, g[i]:dtype())
      end
      assert.is_true((g[1]:float() - g[2]:float()):abs():max():item() < 0.05)
    end
  end)

  it("refuses what shards cannot honour", function()
    local function make(more)
      local o = { variant = "ring", heads = 4, ranks = 2, segments = { 4 }, dilations = { 1 } }
      for name, value in pairs(more) do o[name] = value end
      return lac.attention(o)
    end
    refused("variant 'ring' has no dropout on the weights", make, { dropout = 0.1 })
    refused("variant 'ring' has no dedup", make, { dedup = true })
    refused("no window with layout 'striped'; use 'contiguous' or 'zigzag'", make,
            { window = 2, layout = "striped" })
    refused("unknown layout 'zigzg', did you mean 'zigzag'", make, { layout = "zigzg" })
    refused("unknown schedule 'rings', did you mean 'ring'", make, { schedule = "rings" })
    refused("ranks must be positive, got 0", make, { ranks = 0 })
    refused("pattern must be a block pattern or its text, got 3", make, { pattern = 3 })
    refused("block = 64 is the size of a pattern's blocks", make, { block = 64 })
    refused("cannot wrap 'block_sparse', which wraps another one itself; give 'ring' its pattern", make,
            { of = "block_sparse" })
    local rows, on = lac.randn { 1, 32, 4, 8 }, lac.ones { 2, 2, dtype = "bool" }
    local function blocks(options, more) return make(more or {})(rows, rows, rows, options) end
    refused("block_mask is Tensor bool %[2 x 2%] %S+, 32 queries and 32 keys are 1 x 1 blocks of 128", blocks,
            { block_mask = on })
    refused("block_mask must be bool", blocks, { block_mask = on:float(), block = 16 })
    refused("combined with cu_seqlens", blocks, { block_mask = on, block = 16, cu_seqlens = { 0, 32 } })
    refused("has the pattern full%(%): no block_mask of a call", blocks, { block_mask = on, block = 16 },
            { pattern = "full()" })
    refused("unknown variant 'lonnet', did you mean 'longnet'", make, { of = "lonnet" })
    refused("cannot wrap 'distributed', which wraps another one", make, { of = "distributed" })
    local x = lac.zeros { 1, 8, 4, 2 }
    refused("variant 'ring' has no dropout", make {}, x, x, x, { dropout = 0.5 })
    refused("no alibi with layout 'striped' unless causal", make { layout = "striped" }, x, x, x,
            { alibi = true })
    refused("no alibi with layout 'striped' unless causal", make, { layout = "striped", alibi = true })
    local function call(options) return function() make {}(x, x, x, options) end end
    refused("mask has 7 keys, the call has 8", call { mask = lac.ones({ 8, 7 }, { dtype = "bool" }) })
    refused("bias has 3 heads, the call has 4", call { bias = lac.zeros { 3, 8, 8 } })
    refused("a float mask is a bias", call { mask = lac.zeros { 8, 8 } })
    refused("bias must be %[N, M%]", call { bias = lac.zeros { 8 } })
    refused("must run from 0 to the 8 rows of q, got 0 to 7", call { cu_seqlens = { 0, 7 } })
    refused("cu_seqlens must not fall", call { cu_seqlens = { 0, 5, 3, 8 } })
    refused("does not go with key_lengths", call { cu_seqlens = { 0, 8 },
            key_lengths = lac.tensor({ 8 }, { dtype = "i64" }) })
    local two = lac.zeros { 2, 8, 4, 2 }
    refused("lie in one batch item, q has 2", make {}, two, two, two, { cu_seqlens = { 0, 8 } })
    refused("as many keys as queries, got 5 != 8", make {}, x, x:narrow(2, 1, 5), x:narrow(2, 1, 5),
            { cu_seqlens = { 0, 8 } })
    assert.matches("attention ring%(longnet over 2 ranks, contiguous, 4 heads", tostring(make {}))
  end)

  it("is one configuration with one device's variants", function()
    local attn = lac.attention { variant = "distributed", heads = 4, ranks = 2, segments = { 4, 16 },
                                 dilations = { 1, 2 } }
    assert.are.equal("split", attn.pattern.heads)
    local again = lac.attention(attn.options:with { ranks = 3 })
    assert.are.equal(3, again.options.ranks)
    local x = lac.randn { 1, 16, 4, 2 }
    assert.is_true(attn(x, x, x):allclose((again(x, x, x)), { atol = 1e-6 }))
  end)
end)

describe("the variant 'auto'", function()
  it("chooses by length, density and device, and says why", function()
    local function auto(more)
      local o = { variant = "auto", heads = 4, causal = true, device = "cpu" }
      for name, value in pairs(more) do o[name] = value end
      return lac.attention(o)
    end
    local short, long = auto { length = 511 }, auto { length = 512 }
    assert.matches("^dense: 511 positions are fewer than the 512 from which cpu", short.reason)
    assert.are.same(short.pattern, auto { length = 511, density = 0.1 }.pattern) -- nothing to save there
    assert.are.same({ 128, 256, 512 }, long.pattern.segments)
    assert.are.same({ 1, 2, 4 }, long.pattern.dilations)
    assert.matches("^longnet: 512 positions are at least", long.reason)
    assert.matches("^dense: a density of 1", auto { length = 4096, density = 1 }.reason)
    if lac.default_device():find "^cuda" then
      assert.matches("^dense: 8191 positions .* 8192 from which cuda", auto { length = 8191, device = "cuda",
        density = 0.1 }.reason)
      assert.are.same({ 2048, 4096, 8192 }, auto { length = 8192, device = "cuda" }.pattern.segments)
    end
    local thin = auto { length = 4096, density = 0.05 }
    local function density(attn, n)
      return lac.attention.plan_info(attn.pattern, { n = n, heads = 4 }).pairs / (4 * n * (n + 1) / 2)
    end
    assert.is_true(density(thin, 4096) <= 0.05 and density(thin, 4096) > 0.025)
    for _, n in ipairs { 512, 700, 5000 } do
      for _, d in ipairs { 0.9, 0.5, 0.13 } do -- at most what was asked for, and said
        local some = auto { length = n, density = d }
        local said = tonumber(some.reason:match "keeps ([%d.]+) of the pairs")
        assert.near(said, density(some, n), 0.2 * said)
        assert.is_true(density(some, n) <= 1.1 * d, n .. " " .. d)
      end
    end
    local given = auto { length = 64, segments = { 8, 64 }, dilations = { 1, 4 } }
    assert.are.same({ 8, 64 }, given.pattern.segments)
    assert.matches("segments and dilations were given",
                   auto { length = 64, segments = { 8 }, dilations = { 1 } }.reason)
    refused("length is required", auto, {})
    refused("takes segments or a density, got both", auto,
            { length = 9, density = 0.5, segments = { 4 }, dilations = { 1 } })
    refused("needs segments and dilations together", auto, { length = 9, segments = { 4 } })
    refused("density must be above 0", auto, { length = 9, density = 0 })
  end)
end)
