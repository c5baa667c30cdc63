--- Configurations as values: defaults, printing, equality, changed copies, JSON.
--
-- Which options there are is tested where they are used; here it is that an object made of them behaves as a
-- value.

local lac = require "lacuna"
local json = require "lacuna.json"

describe("lac.config", function()
  local given = { variant = "longnet", segments = { 4, 8 }, dilations = { 1, 2 }, heads = 2 }

  it("fills in defaults, prints in one order, compares by content", function()
    local a, b = lac.config.attention(given), lac.config.attention(given)
    assert.are.equal(2, a.kv_heads)
    assert.is_false(a.causal)
    assert.is_true(a == b)
    assert.are.equal(tostring(a), tostring(b))
    assert.matches("^attention{align = 'start', causal = false, dedup = false, ", tostring(a))
    assert.is_false(a == a:with { causal = true })
    assert.is_true(a == a:with { causal = true }:with { causal = false })
    assert.is_nil(a:with { window = 3 }:with { window = false }.window)
    assert.error_matches(function() a:with { windou = false } end, "unknown option 'windou'")
    assert.error_matches(function() a:with { heads = false } end, "heads is required")
    assert.are.equal("attention", a:kind())
    assert.is_true(lac.config.is(a, "attention"))
    assert.is_false(lac.config.is(given))
  end)

  it("lets what depends on other fields follow them, unless it was given", function()
    local a = lac.config.attention(given)
    assert.are.equal(4, a:with { heads = 4 }.kv_heads)
    assert.are.equal(1, a:with { kv_heads = 1 }:with { heads = 4 }.kv_heads)
    assert.are.equal(2, a:with { heads = 4, kv_heads = 2 }.kv_heads)
    local m = lac.config.multihead { embed_dim = 32, heads = 4, variant = "dense" }
    local wide = m:with { embed_dim = 64, heads = 8 }
    assert.are.same({ 8, 64, 64 }, { wide.kv_heads, wide.kdim, wide.vdim })
    assert.are.equal(24, m:with { kdim = 24 }:with { embed_dim = 64 }.kdim)
    local scored = lac.config.multihead { embed_dim = 32, heads = 4, variant = "adaptive", keep = 2 }
    assert.are.same({ 8, 4 }, { scored.head_dim, scored:with { heads = 8 }.head_dim })
    assert.are.equal(2, lac.nn.MultiheadDilatedAttention(m:with { heads = 2 }).kv_heads)
  end)

  it("is what modules keep, and what they take", function()
    local attn = lac.attention(lac.config.attention(given))
    assert.is_true(attn.options == lac.config.attention(given))
    assert.is_true(attn:clone().options == attn.options)
    local again = lac.config.attention(json.decode(json.encode(attn.options)))
    assert.is_true(again == attn.options)
  end)

  it("composes: shards or blocks onto an attention, a pool onto the process", function()
    local ring = lac.config.ring { ranks = 3 }
    assert.are.equal("ring{layout = 'contiguous', of = 'longnet', ranks = 3, schedule = 'ring'}",
      tostring(ring))
    assert.are.equal("distributed{layout = 'contiguous', of = 'improved', ranks = 1, schedule = 'auto'}",
      tostring(lac.config.distributed()))
    local o = lac.config.attention(given):with { variant = "ring" }:with(ring)
    assert.are.equal(3, lac.attention(o).options.ranks)
    assert.error_matches(function() lac.config.ring { rank = 3 } end, "did you mean 'ranks'")
    local sparse = lac.config.sparse { pattern = lac.attention.masks.local_window(64) }
    assert.are.equal("sparse{block = 128, of = 'dense', pattern = 'local_window(64)'}", tostring(sparse))
    assert.is_true(sparse == lac.config.sparse { pattern = "local_window(64)" })
    assert.is_false(sparse == sparse:with { block = 64 })
    assert.is_true(sparse == lac.config.sparse(json.decode(json.encode(sparse))))
    local full = lac.config.attention { variant = "block_sparse", heads = 2, pattern = "full()" }
    assert.are.equal("local_window(64)", lac.attention(full:with(sparse)).options.pattern)
    assert.error_matches(function() lac.config.sparse() end, "pattern is required")
    assert.error_matches(function() lac.config.sparse { pattern = "f()" } end,
      "pattern must be an expression")
    local pool = lac.config.pool { limit = 2 ^ 40, soft = 2 ^ 39 }
    assert.matches("^pool{device = 'cpu', limit = 1099511627776, soft = ", tostring(pool))
    lac.memory_limit(pool)
    lac.memory_limit(lac.config.pool())
    assert.error_matches(function() pool:with { limit = 5 } end, "the soft limit must not be above the hard")
  end)

  local small = { vocab = 16, layers = 1, width = 16, heads = 2, context = 16, segments = { 8, 16 },
    dilations = { 1, 2 } }

  it("holds a language model's options, and changes them with what follows from them", function()
    local a = lac.config.language_model(small)
    assert.are.same({ 64, "xpos", true }, { a.ffn, a.positions, a.tied })
    local model = lac.nn.LongNetLM(a)
    assert.is_true(model.options == a)
    assert.is_true(lac.config.is(model.options, "language_model"))
    assert.matches("^language_model{.*context = 16, .*segments = {8, 16}", tostring(a))
    local wide = model.options:with{ width = 32, layers = 3, tied = false }
    assert.are.same({ 32, 128, 3, false }, { wide.width, wide.ffn, wide.layers, wide.tied })
    assert.are.same({ 16, 1 }, { a.width, a.layers })
    local bigger = lac.nn.LongNetLM(wide)
    assert.are.same({ 3, 128, 16 }, { #bigger.layers, bigger.layers[1].ffn.up.weight:size(1),
      bigger.head.weight:size(1) })
    assert.are.equal(40, a:with{ ffn = 40 }:with{ width = 32 }.ffn)
    assert.is_true(lac.config.language_model(json.decode(json.encode(wide))) == wide)
    assert.error_matches(function() a:with{ widht = 3 } end, "LongNetLM: unknown option 'widht', did you")
    assert.error_matches(function() a:with{ layers = 0 } end, "LongNetLM: layers must be positive, got 0")
  end)

  it("lets what a size decides follow the size", function()
    local a = lac.config.language_model{ size = "125M", context = 64, layers = 7 }
    local b = a:with{ size = "350M" }
    assert.are.same({ 7, 1024, 4096, 16, 50304 }, { b.layers, b.width, b.ffn, b.heads, b.vocab })
    assert.are.same({ 24, 256 }, { lac.config.language_model{ size = "125M", context = 64, vocab = 256 }
      :with{ size = "350M" }.layers, a:with{ vocab = 256 }:with{ size = "760M" }.vocab })
    local c = lac.config.language_model{ context = 64, segments = { 8 }, dilations = { 1 } }
    assert.are.same({ 24, 8 }, { c:with{ size = "350M" }.layers, c:with{ size = "350M" }.segments[1] })
  end)

  it("holds the options of encoders and of encoder and decoder", function()
    local e = lac.config.encoder(small):with{ width = 8 }
    assert.is_true(lac.nn.LongNetEncoder(e).options == e)
    local both = lac.config.encoder_decoder(small)
    local wide = both:with{ vocab = 20, layers = 2, context = 32 }
    assert.are.same({ 20, 2, 32 }, { wide.source_vocab, wide.encoder_layers, wide.source_context })
    assert.are.equal(5, both:with{ source_vocab = 5 }:with{ vocab = 20 }.source_vocab)
    assert.is_true(lac.nn.LongNetEncoderDecoder(both).options == both)
  end)

  it("refuses an option in two places, and fields that would change nothing", function()
    assert.error_matches(function()
      lac.config.language_model(small):with{ window = 4, attention = { window = 3 } }
    end, "LongNetLM: window is given twice, to the model and in `attention`")
    assert.error_matches(function()
      lac.nn.LongNetEncoder(lac.config.encoder(small):with{ attention = { segments = { 4 } } })
    end, "LongNetEncoder: segments is given twice")
    local model = lac.nn.LongNetLM(small)
    assert.error_matches(function() model.options.droput = 0.5 end,
      "language_model has no field 'droput' to set; make another: c:with{ droput = %.%.%. }")
    local plain = lac.config.attention(given)
    assert.error_matches(function() plain.window = 3 end, "attention has no field 'window' to set")
  end)

  it("refuses what its owner refuses", function()
    assert.error_matches(function() return lac.config.atention end, "did you mean 'attention'")
    assert.error_matches(function() lac.config.attention(given):with { casual = true } end,
      "unknown option 'casual', did you mean 'causal'")
    assert.error_matches(function() lac.config.attention { variant = "dense" } end, "heads is required")
  end)
end)
