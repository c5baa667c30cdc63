--- The interface of torch.nn.MultiheadAttention beside torch's own numbers: every option of module and call.
--
-- tests/golden/torch_mha.safetensors was written by torch_mha.py (PyTorch on a CPU, f32): outputs, weights,
-- and gradients of inputs and parameters. What torch cannot do (extra keys with branches, with causal
-- attention, in decoding) is checked against keys that are appended by hand.

local lac = require "lacuna"
local json = require "lacuna.json"
local nn = lac.nn

local all, metadata = lac.io.load "tests/golden/torch_mha.safetensors"
for key, t in pairs(all) do all[key] = t:to { device = lac.default_device() } end

local function far(a, b) return lac.where(a:eq(b), 0, a - b):abs():max():item() end

local function near(expected, got, what)
  assert.same({ unpack(expected:size()) }, { unpack(got:size()) }, what)
  local scale = math.max(1, expected:abs():max():item())
  assert.is_true(far(expected, got) <= 2e-6 * scale, ("%s: %g"):format(what, far(expected, got)))
end

local function below(prefix)
  local found = {}
  for key, t in pairs(all) do
    if key:sub(1, #prefix) == prefix then found[key:sub(#prefix + 1)] = t end
  end
  return found
end

local names = {}
for name in pairs(metadata) do
  if not name:find "^lacuna" then names[#names + 1] = name end
end
table.sort(names)

describe("torch.nn.MultiheadAttention", function()
  it("has its cases", function() assert.equal(22, #names) end)

  for _, name in ipairs(names) do
    it("values, weights and gradients: " .. name, function()
      local about, c = json.decode(metadata[name]), below(name .. "/")
      local o = { embed_dim = 12, heads = 3, variant = "dense", layer_norm = false }
      for key, value in pairs(about.module) do o[key] = value end
      local m = nn.load_foreign(nn.MultiheadDilatedAttention(o), below(name .. "/state."), "torch")
      local call = { need_weights = true }
      for key, value in pairs(about.call) do call[key] = value end
      for key, value in pairs(below(name .. "/call.")) do call[key] = value end
      local q, k, v = c.query:requires_grad_(true), c.key:requires_grad_(true), c.value:requires_grad_(true)
      local out, weights = m(q, k, v, call)
      near(c.out, out, "out")
      assert.equal(c.weights ~= nil, weights ~= nil)
      if weights then near(c.weights, weights, "weights") end
      out:backward(c.dout)
      near(c.dquery, q.grad, "query's gradient")
      near(c.dkey, k.grad, "key's gradient")
      near(c.dvalue, v.grad, "value's gradient")
      local expected = nn.load_foreign(nn.MultiheadDilatedAttention(o), below(name .. "/grad."), "torch")
      local wanted = expected:state_dict()
      for path, p in m:named_parameters() do near(wanted[path], p.grad, path) end
    end)
  end
end)

describe("extra keys", function()
  local E, H, N = 12, 3, 40
  local function make(more)
    lac.manual_seed(4)
    local o = { embed_dim = E, heads = H, layer_norm = false, add_bias_kv = true, add_zero_attn = true,
      dtype = "f64" }
    for name, value in pairs(more) do o[name] = value end
    return nn.MultiheadDilatedAttention(o)
  end
  local CASES = {
    { variant = "dense", causal = true }, { variant = "dense", causal = true, positions = "alibi" },
    { variant = "longnet", segments = { 8, 64 }, dilations = { 1, 2 }, causal = true, positions = "rope" },
    { variant = "dilated", segments = { 8, 64 }, dilations = { 1, 3 } },
    { variant = "ring", ranks = 3, segments = { 8, 64 }, dilations = { 1, 2 }, causal = true },
    { variant = "block_sparse", pattern = "local_window(32)", block = 16, causal = true },
  }

  -- one softmax over a row's scores and the extra ones, from the matrix of weights of the module without them
  local function by_hand(m, x)
    local o = {}
    for name, value in pairs(m.options) do o[name] = value end
    o.add_bias_kv, o.add_zero_attn = false, false
    local plain, state = nn.MultiheadDilatedAttention(o), m:state_dict()
    state.bias_k, state.bias_v = nil, nil
    plain:load_state_dict(state)
    local D = E / H
    local function heads(t) return t:view(t:size(1), t:size(2), H, D) end
    local q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    if o.positions == "rope" then q, k = lac.rope(q), lac.rope(k) end
    local out, lse = plain.attention(q, k, v)
    local share = m.pattern.merge == "mean" and 1 / #m.pattern.segments or 1
    local s = (q * heads(m.bias_k)):sum(4) / math.sqrt(D)
    local sum = lse:exp() + s:exp() + 1
    out = out * (lse:exp() / sum):unsqueeze(4) + heads(m.bias_v) * (s:exp() / sum * share):unsqueeze(4)
    return m.out(out:reshape(x:size(1), x:size(2), E))
  end

  for _, c in ipairs(CASES) do
    it("join the softmax of every row, in decoding too: " .. c.variant, function()
      local m = make(c)
      local x = lac.randn({ 2, N, E }, { dtype = "f64" })
      local out, weights = m(x, x, x, { need_weights = true, average_attn_weights = false })
      assert.is_true(far(out, by_hand(m, x)) < 1e-12)
      assert.same({ 2, H, N, N + 2 }, { unpack(weights:size()) })
      if m.pattern.merge ~= "mean" then
        assert.is_true((weights:sum(4) - 1):abs():max():item() < 1e-12)
      end
      if not c.causal then return end
      m:eval()
      local cache, at = m:cache { batch = 2 }, 1
      for _, n in ipairs { 9, 1, 1, 20, 9 } do
        local part = m:decode(x:narrow(2, at, n):contiguous(), cache)
        assert.is_true(far(part, out:narrow(2, at, n)) < 1e-12)
        at = at + n
      end
    end)
  end

  it("train, and drop out like the others", function()
    local m = make { variant = "longnet", segments = { 8, 64 }, dilations = { 1, 2 }, dropout = 0.5 }
    local x = lac.randn({ 2, N, E }, { dtype = "f64" })
    m(x):square():sum():backward()
    assert.is_true(m.bias_k.grad:abs():max():item() > 0)
    assert.is_true(m.bias_v.grad:abs():max():item() > 0)
    local clean = m:eval()(x)
    assert.is_true(clean:equal(m(x)))
    assert.is_false(clean:equal(m:train()(x)))
    local small = make { variant = "longnet", segments = { 4 }, dilations = { 1 } }
    local ok, report = lac.gradcheck(function(t, k, v)
      local other = small:clone()
      rawset(other, "bias_k", k)
      rawset(other, "bias_v", v)
      return other(t)
    end, { lac.randn({ 1, 6, E }, { dtype = "f64", grad = true }), small.bias_k, small.bias_v })
    assert.is_true(ok, tostring(report))
  end)

  it("are refused where a row has a softmax for each branch", function()
    for _, merge in ipairs { "mean", "sum", "lse_detach" } do
      assert.error_matches(function()
        make { variant = "custom", segments = { 8, 64 }, dilations = { 1, 2 }, merge = merge }
      end, ("add_bias_kv joins a row's softmax, and merge '%s' has one for each of 2 branches"):format(merge))
    end
  end)
end)

describe("positions = 'alibi'", function()
  it("is the attention's option, for the variants that have it", function()
    for _, variant in ipairs { "dense", "longnet", "ring", "block_sparse" } do
      local o = { embed_dim = 12, heads = 3, variant = variant, positions = "alibi", causal = true,
        dtype = "f64" }
      if variant == "longnet" or variant == "ring" then o.segments, o.dilations = { 8, 64 }, { 1, 2 } end
      if variant == "block_sparse" then o.pattern, o.block = "local_window(32)", 16 end
      lac.manual_seed(1)
      local m = nn.MultiheadDilatedAttention(o)
      local x = lac.randn({ 2, 40, 12 }, { dtype = "f64" })
      local function heads(t) return t:view(2, 40, 3, 4) end
      local plain = lac.attention(m.attention.options:with { alibi = false })
      local out = plain(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)),
        { alibi = lac.alibi_slopes(3, { dtype = "f64" }) })
      assert.is_true(far(m.out(m.norm(out:view(2, 40, 12))), m(x)) < 1e-13)
      o.positions = "none"
      local none = nn.MultiheadDilatedAttention(o)
      none:load_state_dict(m:state_dict())
      assert.is_false(none(x):equal(m(x)))
    end
  end)

  it("serves a model, decoded as computed", function()
    lac.manual_seed(2)
    local model = nn.LongNetLM { vocab = 11, layers = 2, width = 12, heads = 3, context = 48,
      positions = "alibi", segments = { 8, 48 }, dilations = { 1, 2 }, dtype = "f64" }:eval()
    local tokens = lac.randint { 2, 40, high = 11, dtype = "i32" }
    local full, cache, at = model(tokens), model:cache { batch = 2 }, 1
    for _, n in ipairs { 11, 1, 1, 27 } do
      local part = model:decode(tokens:narrow(2, at, n):contiguous(), cache)
      assert.is_true(far(part, full:narrow(2, at, n)) < 1e-12)
      at = at + n
    end
  end)
end)
