--- The public Python code beside ours: the same weights, the same inputs, values and gradients in f32.
--
-- tests/golden/public.safetensors was written by public.py, which runs torchscale, DarcStar's
-- dilated-attention-pytorch and torch.nn.MultiheadAttention. Weights come in by nn.load_foreign and go out
-- again by nn.foreign_state under the same names. Where the public code is wrong, the difference is stated: a
-- test shows what it does, and that we do not.

local lac = require "lacuna"
local nn = lac.nn

local all = lac.io.load "tests/golden/public.safetensors"
for key, t in pairs(all) do all[key] = t:to { device = lac.default_device() } end

-- tensors of a case by name; those below `prefix` only
local function case(name, prefix)
  local found, head = {}, name .. "/" .. (prefix or "")
  for key, t in pairs(all) do
    if key:sub(1, #head) == head then found[key:sub(#head + 1)] = t end
  end
  assert.is_not_nil(next(found), head)
  return found
end

local function far(a, b) return (a - b):abs():max():item() end

local function near(expected, got, what)
  local scale = math.max(1, expected:abs():max():item())
  assert.is_true(far(expected, got) <= 1e-5 * scale, ("%s: %g"):format(what or "values", far(expected, got)))
end

local SIZES = { vocab = 13, layers = 2, width = 16, heads = 4, ffn = 32, context = 16,
                segments = { 4, 8, 16 }, dilations = { 1, 2, 4 }, offset = "block",
                merge = "lse_detach", tied = false }

local function sized(more)
  local o = {}
  for _, from in ipairs { SIZES, more or {} } do
    for name, value in pairs(from) do o[name] = value end
  end
  return o
end

local function without(t, ...)
  local copy = {}
  for name, value in pairs(t) do copy[name] = value end
  for _, name in ipairs { ... } do copy[name] = nil end
  return copy
end

-- what comes in under their names goes out under the same names with the same numbers
local function returns(model, state, dialect)
  local back, count = nn.foreign_state(model, dialect), 0
  for name, t in pairs(state) do
    if not name:find "xpos.scale$" then
      assert.is_truthy(back[name], name)
      assert.is_true(back[name]:equal(t), name)
      count = count + 1
    end
  end
  for _ in pairs(back) do count = count - 1 end
  assert.are.equal(0, count)
end

describe("torchscale", function()
  it("LongNetDecoder: logits, and gradients of every parameter with detached weights", function()
    local c, state = case "torchscale.decoder", case("torchscale.decoder", "state.")
    local model = nn.LongNetLM(sized())
    nn.load_foreign(model, state, "torchscale")
    local logits = model(c.tokens)
    near(c.out, logits)
    logits:backward(c.dout)
    local expected = nn.LongNetLM(sized()) -- gradients have their names and their order of rows as well
    nn.load_foreign(expected, case("torchscale.decoder", "grad."), "torchscale")
    for name, p in model:named_parameters() do near(expected:state_dict()[name], p.grad, name) end
    returns(model, state, "torchscale")
    -- with weights in the gradient, which is what the formula says, it differs
    local exact = nn.LongNetLM(sized { merge = "lse" })
    nn.load_foreign(exact, state, "torchscale")
    local out = exact(c.tokens)
    near(c.out, out)
    out:backward(c.dout)
    local name = "layers.1.attention.q.weight"
    assert.is_true(far(expected:state_dict()[name], exact.layers[1].attention.q.weight.grad) > 1e-3)
  end)

  it("LongNetEncoder", function()
    local c, state = case "torchscale.encoder", case("torchscale.encoder", "state.")
    local o = sized()
    o.tied = nil
    local model = nn.load_foreign(nn.LongNetEncoder(o), state, "torchscale")
    near(c.out, model(c.tokens))
    returns(model, state, "torchscale")
  end)

  it("encoder and decoder with cross-attention", function()
    local c, state = case "torchscale.encoder_decoder", case("torchscale.encoder_decoder", "state.")
    local model = nn.load_foreign(nn.LongNetEncoderDecoder(sized()), state, "torchscale")
    near(c.out, model(c.source, c.tokens))
    returns(model, state, "torchscale")
  end)

  it("lets zero keys into the softmax of a ragged sequence, we do not", function()
    local c, state = case "torchscale.ragged", case("torchscale.ragged", "state.")
    local function layer(n)
      local m = nn.MultiheadDilatedAttention { embed_dim = 16, heads = 4, segments = { 4, 8, n },
        dilations = { 1, 2, 4 }, offset = "block", merge = "lse_detach" }
      return nn.load_foreign(m, state, "torchscale")
    end
    -- they make 10 positions 12, 16 and 12 with zeros as keys and values, and attend without causality here
    assert.is_true(far(c.out, layer(16)(c.x)) > 1e-3)
    local q = lac.zeros { 1, 10, 1, 10 }
    local v = lac.eye { 10 }:view(1, 10, 1, 10)
    local weights = lac.attend(q, q, v, { segments = { 16 }, dilations = { 1 }, return_lse = false })
    assert.is_true(far(weights, lac.full({ 1, 10, 1, 10 }, 0.1)) < 1e-6) -- 10 keys share 1, not 16
  end)
end)

describe("DarcStar", function()
  for _, name in ipairs { "dilated", "dilated_causal" } do
    it("DilatedAttention: values and gradients, " .. name, function()
      local c = case("darcstar." .. name)
      local q, k, v = c.q:requires_grad_(true), c.k:requires_grad_(true), c.v:requires_grad_(true)
      for _, variant in ipairs { "dilated", "improved", "distributed" } do
        local attn = lac.attention { variant = variant, heads = 6, segments = { 4, 8, 16 },
                                     dilations = { 1, 2, 4 }, causal = name == "dilated_causal" }
        local out = attn(q, k, v)
        near(c.out, out)
        local g = lac.grad({ out }, { q, k, v }, { grad_outputs = { c.dout } })
        near(c.dq, g[1], "dq")
        near(c.dk, g[2], "dk")
        near(c.dv, g[3], "dv")
      end
    end)
  end

  it("MultiheadDilatedAttention with its weights", function()
    local c, state = case "darcstar.multihead", case("darcstar.multihead", "state.")
    for _, fused in ipairs { false, true } do
      local m = nn.MultiheadDilatedAttention { embed_dim = 24, heads = 6, variant = "dilated",
        segments = { 4, 8, 16 }, dilations = { 1, 2, 4 }, causal = true, layer_norm = false, fused = fused }
      nn.load_foreign(m, state, "darcstar")
      local out = m(c.x)
      near(c.out, out)
      if not fused then
        out:backward(c.dout)
        for _, part in ipairs { "q", "k", "v", "out" } do
          near(c["grad." .. part .. "_proj.weight"], m[part].weight.grad, part)
        end
        returns(m, state, "darcstar")
      end
    end
  end)

  it("ImprovedDilatedAttention is not the same mathematics there, here it is", function()
    local c = case "darcstar.improved"
    local o = { variant = "improved", heads = 6, segments = { 4, 8, 16 }, dilations = { 1, 2, 4 } }
    local improved = lac.attention(o)(c.q, c.k, c.v)
    assert.is_true(far(c.out, improved) > 1e-2)
    o.variant = "dilated"
    assert.is_true(improved:equal((lac.attention(o)(c.q, c.k, c.v))))
  end)

  it("files that cannot be represented are refused", function()
    local state = case("darcstar.multihead", "state.")
    state["q_ln.weight"] = lac.ones { 4 }
    local m = nn.MultiheadDilatedAttention { embed_dim = 24, heads = 6, variant = "dilated",
      segments = { 16 }, dilations = { 1 }, layer_norm = false }
    assert.error_matches(function() nn.load_foreign(m, state, "darcstar") end, "unexpected: q_ln.weight")
    assert.error_matches(function() nn.load_foreign(m, state, "darkstar") end, "did you mean 'darcstar'")
    assert.error_matches(function() nn.foreign_state(m, "torch") end, "use fused = true")
    assert.error_matches(function() nn.foreign_state(nn.LongNetLM(sized()), "darcstar") end,
      "names the parameters of an attention module, got a LongNetLM")
    local tied = nn.LongNetLM(sized { tied = true })
    assert.error_matches(function()
      nn.load_foreign(tied, case("torchscale.decoder", "state."), "torchscale")
    end, "the file's output layer is not its embedding; make the model with tied = false")
    local written = nn.foreign_state(tied, "torchscale")
    assert.is_true(written["output_projection.weight"]:equal(written["embed_tokens.weight"]))
    nn.load_foreign(nn.LongNetLM(sized { tied = true }), written, "torchscale")
  end)
end)

describe("torch.nn.MultiheadAttention", function()
  it("values and weights, with its mask", function()
    local c, state = case "torch.mha", case("torch.mha", "state.")
    local o = { embed_dim = 16, heads = 4, variant = "dense", layer_norm = false }
    local m = nn.load_foreign(nn.MultiheadDilatedAttention(o), state, "torch")
    local mask = { key_padding_mask = c.key_padding_mask, need_weights = true }
    local out, weights = m(c.query, c.key, c.key, mask)
    near(c.out, out)
    near(c.weights, weights)
    mask.average_attn_weights = false
    near(c.each, (select(2, m(c.query, c.key, c.key, mask))))
    o.fused = true
    returns(nn.load_foreign(nn.MultiheadDilatedAttention(o), state, "torch"), state, "torch")
    assert.error_matches(function()
      nn.load_foreign(nn.MultiheadDilatedAttention(o), without(state, "in_proj_bias"), "torch")
    end, "1 missing: qkv.bias")
  end)
end)
