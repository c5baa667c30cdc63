--- Multi-head attention of every variant: the interface of torch.nn.MultiheadAttention, and what every
-- variant must survive: a second forward, another length, a copy, a file, training and evaluation, decoding.
--
-- What a variant computes is tested where it is defined (attention_spec, ring_spec). Here weights are checked
-- by using them: averaged heads, projections and masks are redone from the returned matrix in plain tensor
-- products.

local lac = require "lacuna"
local nn = lac.nn

local E, H = 8, 4

local function far(a, b) return (a - b):abs():max():item() end

-- a configuration of every registered variant; a variant without one fails the suite
local VARIANTS = {
  dense = {}, custom = { scheme = "split" }, dilated = {}, improved = {}, longnet = {},
  auto = { length = 16, segments = { 4, 16 }, dilations = { 1, 2 } },
  ring = { ranks = 3 }, distributed = { ranks = 2, layout = "zigzag" },
  block_sparse = { pattern = "local_window(32)", block = 16 },
  hierarchical = { levels = { { stride = 16, window = 16 } }, block = 16 },
  adaptive = { keep = 2, block = 16 }, learned = { keep = 2, block = 16, length = 40 },
}

local function options_of(variant, more)
  local o = { embed_dim = E, heads = H, variant = variant, dtype = "f64" }
  if not lac.attention.variants:get(variant).bare then o.segments, o.dilations = { 4, 16 }, { 1, 2 } end
  for _, from in ipairs { VARIANTS[variant], more or {} } do
    for name, value in pairs(from) do o[name] = value end
  end
  return o
end

local function make(variant, more)
  lac.manual_seed(5)
  return nn.MultiheadDilatedAttention(options_of(variant, more))
end

local function data(B, N, width) return lac.randn({ B, N, width or E }, { dtype = "f64" }) end

describe("every variant", function()
  for _, variant in ipairs(lac.attention.variants:names()) do
    if variant:find("^test_") then goto continue end -- other specs register variants of their own

    it("has a case here: " .. variant, function() assert.is_table(VARIANTS[variant]) end)

    it("repeats itself, at other lengths in between, copied, saved and loaded: " .. variant, function()
      local m = make(variant, { causal = true, positions = "rope" })
      local x, y = data(2, 13), data(2, 5)
      local first = m(x)
      local short = m(y)
      assert.is_true(first:equal(m(x)))
      assert.is_true(short:equal(m(y)))

      local copy = m:clone()
      assert.is_true(first:equal(copy(x)))
      assert.is_true(copy.options == m.options)
      copy.out.weight:detach():fill_(0)
      assert.is_true(first:equal(m(x)))
      assert.is_false(first:equal(copy(x)))
      assert.is_true(copy.out.weight.requires_grad)

      local path = os.tmpname()
      lac.train.save_checkpoint(path, { model = m })
      local loaded = lac.train.load_model(path)
      os.remove(path)
      assert.is_true(first:equal(loaded(x)))
      assert.is_true(loaded.options == m.options)
    end)

    it("trains a second step: " .. variant, function()
      local m, x = make(variant), data(1, 9)
      local optimizer = lac.optim.adamw(m:parameters(), { lr = 1e-2 })
      local losses = {}
      for i = 1, 3 do
        local loss = (m(x) - 1):pow(2):mean()
        loss:backward()
        optimizer:step()
        optimizer:zero_grad()
        losses[i] = loss:item()
      end
      assert.is_true(losses[3] < losses[2] and losses[2] < losses[1])
    end)

    it("drops weights in training only, or says that it cannot: " .. variant, function()
      local ok, m = pcall(make, variant, { dropout = 0.5 })
      if not ok then
        assert.matches("has no dropout on the weights", m)
        return
      end
      local x = data(1, 12)
      local clean = m:eval()(x)
      assert.is_true(clean:equal(m(x)))
      assert.is_false(clean:equal(m:train()(x)))
      assert.is_true(clean:equal(m:eval()(x)))
      assert.is_true(clean:equal(m:clone()(x)))
    end)

    it("decodes what the full pass computes: " .. variant, function()
      for _, kv_heads in ipairs { H, 2 } do
        local m = make(variant, { causal = true, positions = "xpos", kv_heads = kv_heads }):eval()
        local x = data(2, 21)
        local full, cache, at = m(x), m:cache { batch = 2 }, 1
        for _, n in ipairs { 5, 1, 1, 6, 1, 7 } do
          local part = m:decode(x:narrow(2, at, n):contiguous(), cache)
          assert.is_true(far(part, full:narrow(2, at, n)) < 1e-12)
          at = at + n
        end
      end
      assert.error_matches(function() make(variant):cache {} end, "only causal attention can be decoded")
    end)

    it("returns weights that give its output: " .. variant, function()
      local m = make(variant, { layer_norm = false, kv_heads = 2 })
      local q, k = data(2, 6), data(2, 11)
      local out, all = m(q, k, k, { need_weights = true, average_attn_weights = false })
      assert.are.same({ 2, H, 6, 11 }, { unpack(all:size()) })
      local v = m.v(k):view(2, 11, 2, 2):transpose(2, 3):repeat_interleave(2, 2)
      local merged = lac.matmul(all, v):transpose(2, 3):reshape(2, 6, E)
      assert.is_true(far(out, m.out(merged)) < 1e-13)
      local again, mean = m(q, k, k, { need_weights = true })
      assert.is_true(again:equal(out))
      assert.is_true(far(mean, all:mean(2)) < 1e-15)
      assert.is_nil((select(2, m(q, k))))
    end)
    ::continue::
  end
end)

describe("the interface of nn.MultiheadAttention", function()
  local o = { causal = false, layer_norm = false }

  it("ignores masked keys, by key_padding_mask or key_padding or key_lengths", function()
    local m = make("longnet", o)
    local q, k = data(2, 6), data(2, 9)
    local keep = lac.arange { 9 }:view(1, 9):expand(2, 9):lt(lac.tensor({ { 4 }, { 9 } }))
    local a = m(q, k, k, { key_padding = keep })
    assert.is_true(a:equal(m(q, k, k, { key_padding_mask = keep:logical_not() })))
    assert.is_true(a:equal(m(q, k, k, { key_lengths = lac.tensor({ 4, 9 }, { dtype = "i64" }) })))
    assert.is_false(a:equal(m(q, k)))
    local _, w = m(q, k, k, { key_padding = keep, need_weights = true })
    assert.are.equal(0, w:narrow(1, 1, 1):narrow(3, 5, 5):abs():max():item())
    assert.error_matches(function() m(q, k, k, { key_padding = keep, key_padding_mask = keep }) end,
      "give one")
    assert.error_matches(function() m(q, k, k, { key_padding_mask = lac.ones { 9 } }) end,
      "key_padding_mask must be %[2 x keys%]")
  end)

  it("takes attn_mask: true = not allowed, or a number that is added", function()
    local m, x = make("dense", o), data(2, 6)
    local later = lac.causal_mask(6):logical_not()
    local causal = m(x, x, x, { is_causal = true })
    assert.is_true(far(causal, m(x, x, x, { attn_mask = later })) < 1e-14)
    local added = lac.where(later, -math.huge, lac.zeros { 6, 6, dtype = "f64" })
    assert.is_true(far(causal, m(x, x, x, { attn_mask = added })) < 1e-14)
    local each = later:view(1, 6, 6):expand(2 * H, 6, 6):contiguous()
    assert.is_true(far(causal, m(x, x, x, { attn_mask = each })) < 1e-14)
    local ring = nn.MultiheadDilatedAttention { embed_dim = E, heads = H, variant = "ring", of = "dense",
      ranks = 3, layer_norm = false, dtype = "f64" }
    ring:load_state_dict(m:state_dict())
    assert.is_true(far(causal, ring(x, x, x, { attn_mask = later })) < 1e-14)
  end)

  it("takes is_causal for one call", function()
    local m, x = make("longnet", o), data(1, 9)
    local causal = make("longnet", { causal = true, layer_norm = false })
    causal:load_state_dict(m:state_dict())
    assert.is_true(m(x, x, x, { is_causal = true }):equal(causal(x)))
    assert.is_false(m(x):equal(causal(x)))
    assert.is_true(causal(x, x, x, { is_causal = true }):equal(causal(x)))
    assert.error_matches(function() causal(x, x, x, { is_causal = false }) end, "the module is causal")
  end)

  it("takes the batch first, second or not at all", function()
    local first, second = make("dilated", o), make("dilated", { batch_first = false, layer_norm = false })
    local x, y = data(2, 6), data(2, 9)
    local out, w = first(x, y, nil, { need_weights = true })
    local out2, w2 = second(x:transpose(1, 2), y:transpose(1, 2), nil, { need_weights = true })
    assert.is_true(far(out, out2:transpose(1, 2)) < 1e-15)
    assert.is_true(w:equal(w2))
    assert.is_true(far(second(x:transpose(1, 2)):transpose(1, 2), first(x)) < 1e-15)
    local one = first(x:select(1, 2), y:select(1, 2))
    assert.are.same({ 6, E }, { unpack(one:size()) })
    assert.is_true(far(one, out:select(1, 2)) < 1e-14)
    local mask = lac.zeros { 9, dtype = "bool" }
    assert.is_true(one:equal((first(x:select(1, 2), y:select(1, 2), nil, { key_padding_mask = mask }))))
  end)

  it("refuses positions that XPOS cannot scale by", function()
    local function make_at(origin, dtype)
      return nn.MultiheadDilatedAttention { embed_dim = E, heads = H, variant = "dense", positions = "xpos",
        causal = true, origin = origin, dtype = dtype }
    end
    local x = lac.randn { 1, 10, E }
    assert.is_true(make_at(-34000)(x):abs():max():item() < 1e3)
    assert.is_true(make_at(34000)(x):abs():max():item() < 1e3)
    for _, origin in ipairs { -40000, 40000 } do
      assert.error_matches(function() make_at(origin)(x) end,
        "positions 'xpos' scale by 3.5^%(p / 512%), which leaves the range of f32 at p = 4000")
    end
    assert.error_matches(function() make_at(4000, "f16")(x:to { dtype = "f16" }) end, "the range of f16")
    make_at(40000, "f64")(x:to { dtype = "f64" })
    local m = make_at(-40000)
    assert.error_matches(function() m:decode(x, m:cache {}) end, "leaves the range of f32")
  end)

  it("takes keys and values of other widths", function()
    local m = make("longnet", { kdim = 3, vdim = 5 })
    assert.are.same({ 2, 6, E }, { unpack(m(data(2, 6), data(2, 7, 3), data(2, 7, 5)):size()) })
    assert.error_matches(function() m(data(2, 6)) end, "key must be %[batch x positions x 3%]")
    assert.error_matches(function() make("longnet", { kdim = 3, fused = true }) end,
      "a fused projection has one input: kdim 3")
  end)
end)

describe("named modules", function()
  it("are the module with the variant of their name", function()
    local o = { embed_dim = E, heads = H, segments = { 4, 16 }, dilations = { 1, 2 }, dtype = "f64" }
    local x = data(1, 16)
    local plain = nn.MultiheadDilatedAttention(options_of("dilated", { fused = true }))
    for _, name in ipairs { "Improved", "DistributedImproved" } do
      local m = nn[name .. "MultiheadDilatedAttention"](o)
      m:load_state_dict(plain:state_dict())
      assert.is_true(far(m(x), plain(x)) < 1e-14)
      assert.matches("^" .. name .. "MultiheadDilatedAttention%(8, 4 heads, %a+, segments", tostring(m))
    end
    local ring = nn.RingMultiheadDilatedAttention(o)
    local longnet = nn.MultiheadDilatedAttention(options_of("longnet"))
    ring:load_state_dict(longnet:state_dict())
    assert.is_true(far(ring(x), longnet(x)) < 1e-14)
    o.variant = "dense"
    assert.error_matches(function() nn.RingMultiheadDilatedAttention(o) end, "variant is 'ring', got 'dense'")
  end)

  it("have configurations", function()
    local a = lac.config.multihead(options_of("ring"))
    assert.are.equal(3, a.ranks)
    assert.is_true(a == nn.MultiheadDilatedAttention(a).options)
    assert.matches("^multihead{add_bias_kv = false, add_zero_attn = false, batch_first = true, ", tostring(a))
  end)

  it("serve as the attention of a LongNetLM", function()
    local function model(more)
      lac.manual_seed(2)
      local o = { vocab = 11, layers = 1, width = 8, heads = 4, context = 16, segments = { 4, 16 },
                  dilations = { 1, 2 }, dtype = "f64" }
      for name, value in pairs(more) do o[name] = value end
      return nn.LongNetLM(o)
    end
    local tokens = lac.tensor({ { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 } }, { dtype = "i32" })
    local one, many = model {}, model { variant = "ring", attention = { ranks = 3, layout = "zigzag" } }
    assert.is_true(far(one(tokens), many(tokens)) < 1e-12)
    assert.is_true(far(one(tokens), one:clone()(tokens)) == 0)
  end)
end)
