--- Block-sparse variants: what they compute, how their configurations behave, what they say of themselves.
--
-- The engine's block masks and the patterns have specs of their own. Here a variant must equal the same
-- attention with the pattern written out as a dense mask, one softmax over everything that is active.

local lac = require "lacuna"
local masks = require "lacuna.attention.masks"

local function far(a, b) return (a - b):abs():max():item() end
local function randn(...) return lac.randn({ ... }, { dtype = "f64", grad = true }) end

-- [heads, n, m] bool of a pattern, token by token
local function dense_mask(pattern, heads, n, m, block, causal)
  local cells, all = pattern:cells { n = n, m = m, heads = heads, block = block, causal = causal }, {}
  for h = 1, heads do
    all[h] = {}
    for i = 1, n do
      local row = cells[#cells == 1 and 1 or h][math.floor((i - 1) / block) + 1]
      all[h][i] = {}
      for j = 1, m do all[h][i][j] = row[math.floor((j - 1) / block) + 1] end
    end
  end
  return lac.tensor(all, { dtype = "bool" })
end

describe("the variant 'block_sparse'", function()
  local PATTERNS = { masks.local_window(32) + masks.global_tokens(16), masks.random(0.4, 3),
                     masks.axial(2) - masks.diagonal(), masks.full() * masks.dilated_sparse { 1, 2 } }

  for _, pattern in ipairs(PATTERNS) do
    it("is one softmax over the active blocks, with its gradients: " .. tostring(pattern), function()
      lac.manual_seed(4)
      for _, c in ipairs { { of = "dense" }, { of = "dense", causal = true },
                           { of = "longnet", segments = { 32, 80 }, dilations = { 1, 2 } } } do
        local q, k, v = randn(2, 70, 4, 4), randn(2, 70, 2, 4), randn(2, 70, 2, 4)
        local o = { variant = "block_sparse", heads = 4, kv_heads = 2, pattern = pattern, block = 16 }
        for name, value in pairs(c) do o[name] = value end
        local base = { variant = c.of, heads = 4, kv_heads = 2, causal = c.causal, segments = c.segments,
                       dilations = c.dilations }
        local out, lse = lac.attention(o)(q, k, v)
        local expected, lse2 = lac.attention(base)(q, k, v,
          { mask = dense_mask(pattern, 4, 70, 70, 16, c.causal) })
        assert.is_true(far(out, expected) < 1e-13)
        assert.is_true(far(lac.where(lse:eq(lse2), 0, lse - lse2), lac.zeros { 1, dtype = "f64" }) < 1e-13)
        local g = lac.randn({ 2, 70, 4, 4 }, { dtype = "f64" })
        local a = lac.grad({ out }, { q, k, v }, { grad_outputs = { g } })
        local b = lac.grad({ expected }, { q, k, v }, { grad_outputs = { g } })
        for i = 1, 3 do assert.is_true(far(a[i], b[i]) < 1e-12) end
      end
    end)
  end

  it("with every block active is the variant inside; values of 1 give 1", function()
    local x = randn(1, 50, 2, 4)
    local o = { variant = "block_sparse", of = "dilated", pattern = "full()", block = 16, heads = 2,
                segments = { 8, 64 }, dilations = { 1, 2 } }
    local full = lac.attention(o)(x, x, x)
    o.variant, o.of, o.pattern, o.block = "dilated", nil, nil, nil
    assert.is_true(far(full, (lac.attention(o)(x, x, x))) < 1e-14)
    local ones = lac.ones { 1, 50, 2, 4, dtype = "f64" }
    local sparse = lac.attention { variant = "block_sparse", pattern = "random(0.3, 1)", block = 16,
                                   heads = 2 }
    assert.is_true(far((sparse(x, x, ones)), ones) < 1e-14)
  end)

  it("keeps its pattern as text, whatever it was given as", function()
    local pattern = masks.local_window(64) + masks.global_tokens(16)
    local a = lac.attention { variant = "block_sparse", pattern = pattern, heads = 2 }
    local b = lac.attention { variant = "block_sparse", pattern = tostring(pattern), heads = 2 }
    assert.is_true(a.options == b.options)
    assert.matches("pattern = 'local_window%(64%) %+ global_tokens%(16%)'", tostring(a.options))
    for _, text in ipairs { "os.exit()", "(function() while true do end end)()", "local_window", "1",
                            "loca(3)", "'a'" } do
      assert.error_matches(function()
        lac.attention { variant = "block_sparse", pattern = text, heads = 2 }
      end, "pattern must be an expression of block patterns")
    end
    for text, why in pairs {
      ["full() + globl_tokens(3)"] = "; unknown pattern 'globl_tokens', did you mean 'global_tokens'%?",
      ["local_window(0)"] = "; window must be an integer of at least 1, got 0",
      ["full("] = "; unexpected symbol near '<eof>'" } do
      assert.error_matches(function()
        lac.attention { variant = "block_sparse", pattern = text, heads = 2 }
      end, why)
    end
    assert.equal("random(0.1234567, 3)", tostring(masks.random(0.1234567, 3))) -- read back, it is the same
    assert.error_matches(function()
      local mine = masks.rule("mine", function() return true end)
      lac.attention { variant = "block_sparse", pattern = mine, heads = 2 }
    end, "pattern must be an expression")
    assert.error_matches(function() lac.attention { variant = "block_sparse", heads = 2 } end,
      "pattern is required")
    assert.error_matches(function()
      lac.attention { variant = "block_sparse", of = "ring", pattern = "full()", heads = 2 }
    end, "cannot wrap 'ring'")
    assert.error_matches(function() a:clone():train(false):decoder(4) end, "only causal attention")
  end)

  it("says how many blocks, pairs and FLOPs there are", function()
    local attn = lac.attention { variant = "block_sparse", pattern = "local_window(32)", block = 16,
                                 heads = 2, causal = true }
    local t = attn:explain(64, { as = "table", head_dim = 8 })
    assert.are.equal(7, t.blocks.active) -- 4 on the diagonal, 3 beside it
    assert.are.equal(10, t.blocks.allowed)
    assert.are.equal(2 * (4 * 136 + 3 * 256), t.pairs)
    assert.are.equal(4 * 8 * t.pairs, t.flops_forward)
    local pairs_ = 0
    for _, g in ipairs(t.coverage) do
      for d = g.from, g.to do pairs_ = pairs_ + g.share * (64 - d) * 2 end
    end
    assert.is_true(pairs_ / t.pairs > 0.95 and pairs_ / t.pairs < 1.05) -- shares of groups, not of distances
    assert.matches("blocks +7 of 16 a head active, density 0.7000", attn:explain(64))
  end)
end)

describe("the variant 'hierarchical'", function()
  it("is the union of its levels", function()
    local levels = { { stride = 16, window = 16 }, { stride = 32, window = -1 } }
    local x = randn(1, 64, 2, 4)
    local o = { variant = "hierarchical", heads = 2, block = 16, levels = levels }
    local attn = lac.attention(o)
    local same = lac.attention { variant = "block_sparse", heads = 2, block = 16,
                                 pattern = masks.hierarchical(levels) }
    assert.is_true(attn(x, x, x):equal((same(x, x, x))))
    assert.is_true(lac.attention(attn.options).options == attn.options)
    o.levels = nil
    assert.error_matches(function() lac.attention(o) end, "levels is required by variant 'hierarchical'")
  end)
end)
