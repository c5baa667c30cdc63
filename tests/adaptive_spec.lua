--- The variant "adaptive": blocks that a scorer keeps for their contents.
--
-- The scorer has tests of its own (masks_spec.lua); that it learns what a random pattern misses is
-- learned_blocks_spec.lua. Here: the variant equals the variant inside under the chosen blocks written out as
-- a dense mask; a causal choice knows nothing of later rows, whatever the mode; parameters are where a module
-- trains, copies and saves them; what a call returns belongs together although it draws.

local lac = require "lacuna"
local nn = lac.nn

local H, D, BLOCK = 4, 4, 16

local function far(a, b) return (a - b):abs():max():item() end
local function randn(...) return lac.randn({ ... }, { dtype = "f64", grad = true }) end

local function make(more)
  lac.manual_seed(9)
  local o = { variant = "adaptive", heads = H, kv_heads = 2, head_dim = D, keep = 2, block = BLOCK,
    dtype = "f64" }
  for name, value in pairs(more or {}) do o[name] = value end
  return lac.attention(o)
end

-- [B, H, blocks, blocks] -> [B, H, n, m]
local function spelled(mask, n, m)
  local rows = mask:to("f64"):repeat_interleave(BLOCK, 3):repeat_interleave(BLOCK, 4)
  return rows:narrow(3, 1, n):narrow(4, 1, m):gt(0)
end

local CASES = {
  { of = "dense" }, { of = "dense", causal = true }, { of = "dense", causal = true, soft = true },
  { of = "longnet", segments = { 32, 80 }, dilations = { 1, 2 }, causal = true },
  { of = "dense", causal = true, align = "end", m = 83 }, { of = "dense", m = 31, window = 9 },
}

describe("the variant 'adaptive'", function()
  for number, c in ipairs(CASES) do
    it("is the variant inside under the chosen blocks, with its gradients: case " .. number, function()
      local o = {}
      for name, value in pairs(c) do if name ~= "m" then o[name] = value end end
      local attn = make(o):eval()
      local n, m = 70, c.m or 70
      local q, k, v = randn(2, n, H, D), randn(2, m, 2, D), randn(2, m, 2, D)
      local chosen = attn.scorer:choose(q, k, { causal = c.causal, align = c.align, training = false })
      local base = { variant = c.of, heads = H, kv_heads = 2, causal = c.causal, segments = c.segments,
        dilations = c.dilations, align = c.align, window = c.window }
      local out, lse = attn(q, k, v)
      local expected, lse2 = lac.attention(base)(q, k, v,
        { mask = spelled(chosen.block_mask, n, m), bias = chosen.bias })
      assert.is_true(far(out, expected) < 1e-13)
      assert.is_true(far(lac.where(lse:eq(lse2), 0, lse - lse2), lac.zeros { 1, dtype = "f64" }) < 1e-13)
      local g = lac.randn({ 2, n, H, D }, { dtype = "f64" })
      local a = lac.grad({ out }, { q, k, v }, { grad_outputs = { g }, retain_graph = true })
      local b = lac.grad({ expected }, { q, k, v }, { grad_outputs = { g } })
      for i = 1, 3 do assert.is_true(far(a[i], b[i]) < 1e-12) end
    end)
  end

  it("keeps what it says, the diagonal among it", function()
    local attn, q = make { causal = true }, randn(1, 96, H, D)
    local on = attn.scorer:choose(q, q:narrow(3, 1, 2), { causal = true }).block_mask:to("f64")
    assert.same({ 1, 2, 2, 2, 2, 2 }, on:sum(4)[1][1]:totable())
    for i = 1, 6 do assert.equal(1, on[1][3][i][i]:item()) end
    local t = attn:explain(96, { as = "table" })
    assert.equal(11, t.blocks.active)
    assert.matches("blocks +11 of 36 a head active", attn:explain(96))
    assert.matches("some branch may attend to: contents choose the blocks", attn:explain(96))
  end)

  it("knows nothing of later rows where it is causal, in training and after", function()
    for _, soft in ipairs { false, true } do
      for _, training in ipairs { false, true } do
        local attn = make { causal = true, soft = soft }:train(training)
        local q, k, v = randn(1, 75, H, D), randn(1, 75, 2, D), randn(1, 75, 2, D)
        local out = attn(q, k, v)
        for _, p in ipairs { 1, 16, 17, 40, 63, 74 } do -- rows that stay
          local function changed(t)
            return lac.cat({ t:narrow(2, 1, p), t:narrow(2, p + 1, 75 - p) * 3 + 1 }, 2)
          end
          local other = attn(changed(q), changed(k), changed(v))
          assert.is_true(far(out:narrow(2, 1, p), other:narrow(2, 1, p)) < 1e-13, p)
        end
      end
    end
  end)

  it("does not see what padding hides", function()
    local attn = make()
    local q, k, v = randn(2, 40, H, D), randn(2, 70, 2, D), randn(2, 70, 2, D)
    local lengths = lac.tensor({ 33, 70 }, { dtype = "i64" })
    local keep = lac.arange { 70 }:view(1, 70):lt(lengths:to("f32"):view(2, 1))
    local out = attn(q, k, v, { key_lengths = lengths })
    local hidden = keep:logical_not():view(2, 70, 1, 1)
    local other = attn(q, k:masked_fill(hidden, 1e6), v:masked_fill(hidden, 1e6), { key_padding = keep })
    assert.is_true(far(out, other) < 1e-13)
    local function first(t, rows) return t:narrow(1, 1, 1):narrow(2, 1, rows) end
    local alone = attn(first(q, 40), first(k, 33), first(v, 33))
    assert.is_true(far(alone, out:narrow(1, 1, 1)) < 1e-13)
  end)

  it("returns the weights of the very blocks and drops that it drew", function()
    local attn = make { noise = true, dropout = 0.3 }
    local q, k, v = randn(1, 70, H, D), randn(1, 70, 2, D), randn(1, 70, 2, D)
    local out, _, weights = attn(q, k, v, { need_weights = true })
    local values = v:transpose(2, 3):repeat_interleave(2, 2)
    assert.is_true(far(lac.matmul(weights, values):transpose(2, 3), out) < 1e-13)
    assert.is_false(out:equal((attn(q, k, v))))
    local sparse = lac.attention { variant = "block_sparse", pattern = "random(0.5)", block = 16, heads = H,
      kv_heads = 2, dropout = 0.3 }
    local out2, _, weights2 = sparse(q, k, v, { need_weights = true })
    assert.is_true(far(lac.matmul(weights2, values):transpose(2, 3), out2) < 1e-13)
  end)

  it("adds its bias to that of the call", function()
    local attn = make { soft = true }:eval()
    local q, k, v = randn(1, 50, H, D), randn(1, 50, 2, D), randn(1, 50, 2, D)
    local bias = randn(50, 50)
    local chosen = attn.scorer:choose(q, k, {})
    local out = attn(q, k, v, { bias = bias })
    local expected = lac.attention { variant = "dense", heads = H, kv_heads = 2 }(q, k, v,
      { mask = spelled(chosen.block_mask, 50, 50), bias = bias + chosen.bias })
    assert.is_true(far(out, expected) < 1e-13)
    local half = make { soft = true, dtype = "bf16" }:eval()
    local function low(t) return t:detach():to { dtype = "bf16" } end
    local exact = half(low(q), low(k), low(v), { bias = low(bias):float() })
    local mixed = half(low(q), low(k), low(v), { bias = low(bias) })
    assert.is_true((exact:float() - mixed:float()):abs():max():item() == 0)
  end)

  it("has a scorer that a module trains, copies and saves", function()
    lac.manual_seed(2)
    local m = nn.MultiheadDilatedAttention { embed_dim = 16, heads = 4, variant = "adaptive", keep = 2,
      block = 16, dtype = "f64" }
    local x = lac.randn({ 2, 64, 16 }, { dtype = "f64" })
    assert.is_not_nil(m:state_dict()["scorer.query_in.weight"])
    m(x):square():sum():backward()
    assert.is_true(m.scorer.query_in.weight.grad:abs():max():item() > 0)
    assert.is_true(m.scorer.key_out.weight.grad:abs():max():item() > 0)
    local before, causal = m(x), m(x, x, x, { is_causal = true })
    local copy = m:clone()
    for _, p in ipairs(copy.scorer:parameters()) do p:detach():mul_(-3) end
    assert.is_true(before:equal(m(x)))
    assert.is_false(before:equal(copy(x)))
    assert.is_false(causal:equal((copy(x, x, x, { is_causal = true }))))
    copy:load_state_dict(m:state_dict())
    assert.is_true(before:equal(copy(x)))
    assert.is_true(causal:equal(copy(x, x, x, { is_causal = true })))
    local attn = make()
    local q = randn(1, 64, H, D)
    local k = q:narrow(3, 1, 2)
    local twin = attn:clone()
    assert.is_true(attn(q, k, k):equal((twin(q, k, k))))
    assert.is_true(twin.scorer ~= attn.scorer and twin.options == attn.options)
  end)

  it("is decoded as it is computed, items at places of their own and taken back", function()
    for _, keep in ipairs { 1, 2, 4 } do
      local attn = make { causal = true, keep = keep }:eval()
      local q, k, v = randn(2, 150, H, D), randn(2, 150, 2, D), randn(2, 150, 2, D)
      q, k, v = q:detach(), k:detach(), v:detach()
      local out, lse = attn(q, k, v)
      local function cache_of()
        return nn.BlockCache { decoder = attn:decoder(D), batch = 2, heads = 2, head_dim = D, dtype = "f64",
          rows = 5 }
      end
      local function step(cache, at, n, counts)
        local function rows(t)
          local function item(b) return t[{ { b }, { at[b] + 1, at[b] + n } }] end
          return lac.cat({ item(1), item(2) }, 1)
        end
        local a, b = cache:attend(rows(q), rows(k), rows(v), counts)
        for i = 1, 2 do
          local count = counts and counts[i] or n
          local function own(t) return t:narrow(1, i, 1):narrow(2, 1, count) end
          local function whole(t) return t:narrow(1, i, 1):narrow(2, at[i] + 1, count) end
          assert.is_true(far(own(a), whole(out)) < 1e-12, ("keep %d, item %d at %d"):format(keep, i, at[i]))
          assert.is_true(far(own(b), whole(lse)) < 1e-12)
        end
      end
      for _, steps in ipairs { { 40, 1, 1, 7, 30, 1, 20, 50 }, { 1, 1, 30, 5, 60, 53 } } do
        local cache, at = cache_of(), 0
        for _, n in ipairs(steps) do
          lac.scope(function() step(cache, { at, at }, n) end)
          at = at + n
        end
        cache:rewind(77)
        step(cache, { 77, 77 }, 40)
      end
      local cache = cache_of()
      step(cache, { 0, 0 }, 60, { 60, 21 })
      step(cache, { 60, 21 }, 30, { 5, 30 })
      cache:select { 2, 1 }
      assert.same({ 51, 65 }, cache.positions)
      cache:select { 2, 1 }
      step(cache, { 65, 51 }, 40)
      assert.equal(8 * D * (H + 4) * (cache.stores[1].capacity + cache.stores[2].capacity), cache:bytes())
    end
  end)

  it("names what is wrong", function()
    assert.error_matches(function() lac.attention { variant = "adaptive", heads = 2 } end,
      "head_dim is required")
    assert.error_matches(function() make { of = "ring" } end, "cannot wrap 'ring', which wraps another")
    assert.error_matches(function() make { keep = 0 } end, "keep must be")
    assert.error_matches(function()
      nn.MultiheadDilatedAttention { embed_dim = 16, heads = 4, variant = "adaptive", head_dim = 5 }
    end, "head_dim is embed_dim / heads = 4, got 5")
    assert.error_matches(function() make()(randn(1, 8, H, 6), randn(1, 8, 2, 6), randn(1, 8, 2, 6)) end,
      "q has 6 head dimensions, the scorer 4")
    for text, o in pairs { ["a window"] = { window = 9 }, alibi = { alibi = true },
      ["soft weights"] = { soft = true },
      ["of = 'longnet'"] = { of = "longnet", segments = { 8 }, dilations = { 1 } } } do
      o.causal = true
      assert.error_matches(function() make(o):decoder(D) end,
        "'adaptive' cannot be decoded row by row with " .. text)
    end
    assert.error_matches(function() make():decoder(D) end, "only causal attention can be decoded")
  end)
end)
