--- nn/attention.lua: multi-head dilated attention with its projections.
--
-- x [B, N, E] -> q, k, v projections -> heads [B, N, H, D] -> positions (RoPE or XPOS) -> dilated attention
-- (any scheme of lacuna.attention) -> heads merged [B, N, E] -> LayerNorm (MAGNETO's sub-LN) -> output
-- projection.
--
-- The projections are separate or fused; fused is one [E + 2 Ek, E] product, initialised slice by slice, so
-- that both forms start from the same distribution. MAGNETO's gains: 1 for q and k, gamma for v and out. Key
-- and value may come from another sequence (cross-attention) and may have fewer heads (grouped queries).
--
-- XPOS multiplies queries and keys by zeta^(+-p / scale_base), which leaves the range of a float long before
-- position 10^5, an error here; only differences of positions matter, so `origin` shifts p to be small where
-- the data is.
-- `decode` is forward for rows that come one by one: it keeps keys and values in a KVCache (cache.lua). The
-- attention itself is a lac.attention of any variant, made with the module; its options are taken here by
-- their names and passed on. ALiBi is an option of the attention, not of q and k. Calls have the interface of
-- torch.nn.MultiheadAttention, with its meaning of masks (true = ignore, numbers are added); key_padding,
-- ours, is true = keep. The modules that the published code names are
-- this one with other defaults. Rejected: a class with code of its own per variant (they are options of one
-- formula).

local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local is_float = require("lacuna.device").is_float
local operators = require "lacuna.ops"
local attention = require "lacuna.attention"
local config = require "lacuna.config"
local grad = require "lacuna.grad"
local base = require "lacuna.nn.module"
local layers = require "lacuna.nn.layers"
local extra_keys = require "lacuna.nn.extra_keys"
local KVCache = require("lacuna.nn.cache").KVCache
local BlockCache = require("lacuna.nn.block_cache").BlockCache

local ops, passed, transient = operators.fn, operators.passed, operators.transient
local fail, show = schema.fail, schema.show
local OP = "MultiheadDilatedAttention"

--- Options that go to the attention as they are; models that contain this module accept them too.
local PATTERN = {
  variant = { type = "string", default = "custom" },
  segments = { type = "integers", min = 1 },
  dilations = { type = "integers", min = 1 },
  scheme = { one_of = { "split", "all" } },
  offset = { one_of = { "branch", "mod", "block" } },
  merge = { one_of = { "mean", "sum", "lse", "lse_detach" } },
  dedup = { type = "boolean", default = false },
  causal = { type = "boolean", default = false },
  window = { type = "integer", min = 0 },
  fp8 = { type = "boolean", default = false },
}

local OPTIONS = {
  embed_dim = { type = "integer", min = 1, required = true },
  heads = { type = "integer", min = 1, required = true },
  kv_heads = { type = "integer", min = 1 },
  kdim = { type = "integer", min = 1 }, vdim = { type = "integer", min = 1 },
  batch_first = { type = "boolean", default = true },
  scale = { type = "number", above = 0 },
  dropout = { type = "number", min = 0, below = 1, default = 0 },
  bias = { type = "boolean", default = true },
  add_bias_kv = { type = "boolean", default = false }, add_zero_attn = { type = "boolean", default = false },
  fused = { type = "boolean", default = false },
  layer_norm = { type = "boolean", default = true },
  eps = { type = "number", above = 0, default = 1e-5 },
  gamma = { type = "number", above = 0, default = 1 },
  positions = { one_of = { "none", "rope", "xpos", "alibi" }, default = "none" },
  rope_base = { type = "number", above = 1, default = 10000 },
  xpos_base = { type = "number", above = 0, default = 512 },
  origin = { type = "integer", default = 0 },
  dtype = { type = "string" }, device = { type = "string" },
}
for name, rule in pairs(PATTERN) do OPTIONS[name] = rule end

local ROTATES = { rope = true, xpos = true }

local Attention = base.define(OP, nil, "options embed_dim heads kv_heads head_dim attention pattern")

-- options that are read only where another one asks for them, and what asks
local function rotates(o) return ROTATES[o.positions] end
local READ = {
  rope_base = { rotates, "positions = 'rope' or 'xpos'" },
  origin = { rotates, "positions = 'rope' or 'xpos'" },
  xpos_base = { function(o) return o.positions == "xpos" end, "positions = 'xpos'" },
  eps = { function(o) return o.layer_norm end, "layer_norm = true" },
}

local function check_sizes(o)
  for _, name in ipairs(schema.keys(READ)) do
    local read = READ[name]
    if o[name] ~= OPTIONS[name].default and not read[1](o) then
      fail(OP, "%s = %s is read with %s only", name, show(o[name]), read[2])
    end
  end
  if o.embed_dim % o.heads ~= 0 then
    fail(OP, "embed_dim %d is not divisible by heads %d", o.embed_dim, o.heads)
  end
  if o.heads % o.kv_heads ~= 0 then
    fail(OP, "heads %d is not divisible by kv_heads %d", o.heads, o.kv_heads)
  end
  if ROTATES[o.positions] and o.embed_dim / o.heads % 2 ~= 0 then
    fail(OP, "positions '%s' rotate pairs: the head dimension must be even, got %d", o.positions,
      o.embed_dim / o.heads)
  end
  if o.head_dim and o.head_dim ~= o.embed_dim / o.heads then
    fail(OP, "head_dim is embed_dim / heads = %d, got %d", o.embed_dim / o.heads, o.head_dim)
  end
  if o.fused and (o.kdim ~= o.embed_dim or o.vdim ~= o.embed_dim) then
    fail(OP, "a fused projection has one input: kdim %d and vdim %d must be embed_dim %d", o.kdim, o.vdim,
      o.embed_dim)
  end
end

-- options of the user -> complete options, and the attention that they describe
local function configure(options)
  local rules, own = {}, {}
  if options ~= nil then schema.expect_options(OP, options) end
  local variant = options and options.variant or PATTERN.variant.default
  for name, rule in pairs(attention.options_of(variant, options or {})) do
    rules[name], own[name] = rule, true
  end
  for name, rule in pairs(OPTIONS) do rules[name] = rules[name] or rule end
  if own.head_dim then rules.head_dim = { type = "integer", min = 1 } end
  local o = schema.options(OP, options, rules)
  o.kv_heads, o.kdim, o.vdim = o.kv_heads or o.heads, o.kdim or o.embed_dim, o.vdim or o.embed_dim
  check_sizes(o)
  local inner = { heads = o.heads, kv_heads = o.kv_heads, scale = o.scale, dropout = o.dropout }
  if own.head_dim then o.head_dim = o.embed_dim / o.heads end
  if o.positions == "alibi" then inner.alibi = true end
  for name in pairs(own) do inner[name] = o[name] end
  for name in pairs(PATTERN) do inner[name] = o[name] end
  local made = attention(inner)
  for name in pairs(own) do -- a pattern of blocks as its text: that prints, compares and goes to a checkpoint
    if attention.masks.is(o[name]) then o[name] = made.options[name] end
  end
  extra_keys.check(OP, o, made.pattern)
  return o, made
end
local function width_of(o) return o.embed_dim end
config.define("multihead", function(options) return (configure(options)) end, {
  kv_heads = function(o) return o.heads end, kdim = width_of, vdim = width_of,
  head_dim = function(o) return o.embed_dim / o.heads end,
})

--- Multi-head attention of any variant, with the projections: the interface of torch.nn.MultiheadAttention.
-- @tparam table options embed_dim E, heads H; variant = "custom" (any of lac.attention's) and what it takes:
--   segments, dilations, for "custom" scheme = "all" | "split"; offset, merge (default: the variant's),
--   dedup, causal, window, scale, fp8 (no gradients, no decoding); kv_heads = heads; kdim, vdim = E (widths
--   of key and value); dropout = 0 (on the attention weights, in training); bias = true; fused = false;
--   layer_norm = true (eps = 1e-5); gamma = 1; positions
--   = "none" | "rope" | "xpos" | "alibi", rope_base = 10000, xpos_base = 512, origin = 0
--   (position of the first row);
--   add_bias_kv, add_zero_attn = false (a learned key and value, a key and value of zeros, that every query
--   has too); batch_first = true; dtype, device
-- @usage
--     local layer = lac.nn.MultiheadDilatedAttention{ embed_dim = 32, heads = 4, segments = { 16, 64 },
--                                                     dilations = { 1, 4 }, causal = true }
--     local out = layer(lac.randn{ 2, 64, 32 }) -- query [B, N, E]; key and value are the query unless given
--     print(out)
function Attention:init(options)
  local o, inner = configure(options)
  local E, D = o.embed_dim, o.embed_dim / o.heads
  local Ek = o.kv_heads * D
  self.options = base.settled_options(self, "multihead", o)
  self.embed_dim, self.heads, self.kv_heads, self.head_dim = E, o.heads, o.kv_heads, D
  self.attention, self.pattern, self.causal_form = inner, inner.pattern, o.causal and inner
  local function linear(inputs, outputs, gain, parts)
    return layers.Linear(inputs, outputs, { gain = gain, parts = parts, bias = o.bias, dtype = o.dtype,
      device = o.device })
  end
  if o.fused then
    self.qkv = linear(E, E + 2 * Ek, { 1, 1, o.gamma }, { E, Ek, Ek })
  else
    self.q = linear(E, E, 1) -- one by one: a multiple assignment would register them from the right
    self.k = linear(o.kdim, Ek, 1)
    self.v = linear(o.vdim, Ek, o.gamma)
  end
  if inner.record.scorer then self.scorer = inner.scorer end
  if o.add_bias_kv then
    local typed = { std = 1 / math.sqrt(Ek), dtype = o.dtype, device = o.device }
    self:param("bias_k", create.randn({ 1, 1, Ek }, typed), "bias")
    typed.std = o.gamma * typed.std
    self:param("bias_v", create.randn({ 1, 1, Ek }, typed), "bias")
  end
  if o.layer_norm then self.norm = layers.LayerNorm(E, { eps = o.eps, dtype = o.dtype,
    device = o.device }) end
  self.out = linear(E, E, o.gamma)
end

schema.describe(Attention.init, OPTIONS)

local function project_fused(self, x)
  local E, Ek = self.embed_dim, self.kv_heads * self.head_dim
  local all = self.qkv(x)
  return all:narrow(-1, 1, E), all:narrow(-1, E + 1, Ek), all:narrow(-1, E + Ek + 1, Ek)
end

local function project(self, query, key, value)
  if self.options.fused then
    if key ~= query or value ~= query then
      fail(OP, "a fused projection needs query, key and value to be the same tensor; use fused = false")
    end
    return project_fused(self, query)
  end
  return self.q(query), self.k(key), self.v(value)
end

local function split_heads(x, heads, D)
  return x:view(x:size(1), x:size(2), heads, D) -- [B, N, H, D]
end

-- [B, n] i64: row i of item b stands at start[b] + i - 1
local function positions_from(start, n, device)
  local first = create.tensor(start, { dtype = "i64", device = device })
  return first:view(#start, 1) + create.arange{ n, dtype = "i64", device = device }
end

-- XPOS scales by up to 3.5^(p / xpos_base): natural logarithms that leave room for the numbers themselves
local XPOS_MOST = { f16 = 9, bf16 = 84, f32 = 84, f64 = 690 }

local function check_xpos(o, x, start)
  local n, dtype = x:size(2), x:dtype()
  for b = 1, type(start) == "table" and #start or 1 do
    local first = o.origin + (type(start) == "table" and start[b] or start)
    local farthest = math.max(math.abs(first), math.abs(first + n - 1))
    if farthest / o.xpos_base * math.log(3.5) > XPOS_MOST[dtype] then
      fail(OP, "positions 'xpos' scale by 3.5^(p / %g), which leaves the range of %s at p = %d; take 'rope', "
        .. "a larger xpos_base, or an origin such that positions are around 0", o.xpos_base, dtype, farthest)
    end
  end
end

-- start: position of row 1 from 0, one for the whole batch or a list of one per item
local function rotate(self, x, sign, start)
  local o = self.options
  if not ROTATES[o.positions] then return x end
  if o.positions == "xpos" then check_xpos(o, x, start) end
  local single = type(start) == "number"
  local xpos = o.positions == "xpos"
  return ops.rope(x, { base = o.rope_base, start = o.origin + (single and start or 0),
    sign = xpos and sign or nil, scale_base = xpos and o.xpos_base or nil,
    positions = not single and positions_from(start, x:size(2), x:device()) or nil })
end

-- q, k, v [B, N, heads, D] as the attention takes them
local function heads_at(self, query, key, value, start)
  local q, k, v = project(self, query, key, value)
  local rq = rotate(self, split_heads(q, self.heads, self.head_dim), 1, start)
  local rk = rotate(self, split_heads(k, self.kv_heads, self.head_dim), -1, start)
  passed(q, rq, query)
  passed(k, rk, key)
  return rq, rk, split_heads(v, self.kv_heads, self.head_dim), v
end

local function finish(self, out)
  local merged = out:view(out:size(1), out:size(2), self.embed_dim)
  local normed = self.options.layer_norm and self.norm(merged) or merged
  local result = self.out(normed)
  passed(out, normed)
  transient(normed, result)
  return result
end

local function check_input(name, x, width)
  tensor.expect(OP, name, x)
  if x:dim() ~= 3 or x:size(3) ~= width then
    fail(OP, "%s must be [batch x positions x %d], got %s", name, width, show(x))
  end
end

-- ---- one call ---------------------------------------------------------------------------------------------

local FORWARD = {
  key_padding = { type = "tensor" }, key_padding_mask = { type = "tensor" },
  key_lengths = { type = "tensor" },
  attn_mask = { type = "tensor" }, is_causal = { type = "boolean" },
  need_weights = { type = "boolean", default = false },
  average_attn_weights = { type = "boolean", default = true },
}

local function check_mask(name, mask)
  local dtype = mask:dtype()
  if dtype ~= "bool" and not is_float(mask.c.dtype) then
    fail(OP, "%s must be bool (true = ignore) or a number that is added, got %s", name, show(mask))
  end
  return dtype == "bool"
end

-- torch's key_padding_mask [B, M]: bool (true = ignore) or a number that is added to the scores of a key
local function key_mask(call, mask, batch, n)
  if check_mask("key_padding_mask", mask) then
    call.key_padding = ops.logical_not(mask)
  elseif mask:dim() ~= 2 or mask:size(1) ~= batch then
    fail(OP, "key_padding_mask must be [%d x keys], got %s", batch, show(mask))
  else
    call.bias = mask:view(batch, 1, 1, mask:size(2)):expand(batch, 1, n, mask:size(2))
  end
end

-- torch's attn_mask: bool (true = not allowed) or a number that is added; [N, M] or [B H, N, M]
local function pair_mask(self, call, mask, batch)
  local bool = check_mask("attn_mask", mask)
  if mask:dim() == 3 then
    if mask:size(1) ~= batch * self.heads then
      fail(OP, "attn_mask must be [N, M] or [%d x N x M] for %d items and %d heads, got %s",
        batch * self.heads, batch, self.heads, show(mask))
    end
    mask = mask:view(batch, self.heads, mask:size(2), mask:size(3))
  end
  if bool then
    call.mask = ops.logical_not(mask)
  else
    call.bias = call.bias and call.bias + mask or mask
  end
end

-- the attention of this call; is_causal may ask for the causal form of a module that is not
local function form(self, o)
  local inner = self.attention
  if o.is_causal ~= nil and o.is_causal ~= self.options.causal then
    if not o.is_causal then fail(OP, "the module is causal: is_causal = false cannot take that back") end
    self.causal_form = self.causal_form or attention(inner.options:with{ causal = true })
    inner = self.causal_form
  end
  if inner.record.scorer then inner.scorer = self.scorer end -- the one that is trained, saved and copied
  return inner
end

local function attend(self, query, key, value, o)
  config.expect_settled(self.options)
  check_input("query", query, self.embed_dim)
  check_input("key", key, self.options.kdim)
  check_input("value", value, self.options.vdim)
  if o.key_padding and o.key_padding_mask then
    fail(OP, "key_padding (true = keep) and key_padding_mask (true = ignore) say the same: give one")
  end
  local q, k, v, projected = heads_at(self, query, key, value, 0)
  local joined = self.options.add_bias_kv or self.options.add_zero_attn
  local call = { key_lengths = o.key_lengths, need_weights = o.need_weights, return_lse = true,
    training = self.training, key_padding = o.key_padding }
  if o.key_padding_mask then key_mask(call, o.key_padding_mask, query:size(1), query:size(2)) end
  if o.attn_mask then pair_mask(self, call, o.attn_mask, query:size(1)) end
  local out, lse, weights = form(self, o)(q, k, v, call)
  if joined then out, weights = extra_keys.join(self, q, out, lse, weights) end
  transient(q, out, query)
  transient(k, out, key)
  transient(projected, out, value)
  if weights and o.average_attn_weights then weights = weights:mean(2) end
  return finish(self, out), weights
end

-- forward for one item without a batch dimension
local function attend_one(self, query, key, value, o)
  local function lift(x) return tensor.is(x) and x:unsqueeze(1) or x end
  local q, call = lift(query), {}
  local k = key == query and q or lift(key)
  for name, setting in pairs(o) do call[name] = setting end
  call.key_padding, call.key_padding_mask = lift(o.key_padding), lift(o.key_padding_mask)
  local out, weights = attend(self, q, k, value == key and k or lift(value), call)
  return out:squeeze(1), weights and weights:squeeze(1)
end

--- The interface of torch.nn.MultiheadAttention.
-- @tparam Tensor query [B, N, E] ([N, B, E] with batch_first = false; [N, E] for one item)
-- @tparam[opt] Tensor key [B, M, kdim], default query
-- @tparam[opt] Tensor value [B, M, vdim], default key
-- @tparam[opt] table options key_padding_mask [B, M] bool (true = ignore) or key_padding (true = keep),
--   key_lengths [B]; attn_mask [N, M] or [B H, N, M], bool (true = not allowed) or added to the scores (a
--   key_padding_mask may be numbers, too); is_causal; need_weights = false, average_attn_weights = true
-- @treturn Tensor like query
-- @treturn ?Tensor weights [B, N, M], or [B, H, N, M] with average_attn_weights = false; extra keys are the
--   last columns
function Attention:forward(query, key, value, options)
  local o = schema.options(OP, options, FORWARD)
  if not o.average_attn_weights and not o.need_weights then
    fail(OP, "average_attn_weights = false is about weights that need_weights = true asks for")
  end
  key = key or query
  value = value or key
  if tensor.is(query) and query:dim() == 2 then return attend_one(self, query, key, value, o) end
  if self.options.batch_first then return attend(self, query, key, value, o) end
  local function turn(x) return tensor.is(x) and x:dim() == 3 and x:transpose(1, 2) or x end
  local q = turn(query)
  local k = key == query and q or turn(key)
  local out, weights = attend(self, q, k, value == key and k or turn(value), o)
  return turn(out), weights
end

-- ---- decoding ---------------------------------------------------------------------------------------------

local CACHE = { batch = { type = "integer", min = 1, default = 1 },
  keep = { type = "integer", min = 0, default = 0 }, rows = { type = "integer", min = 1 } }

--- An empty cache for decode.
-- @tparam[opt] table options batch = 1; keep = 0 (positions that cache:rewind can always go back); rows =
--   space to begin with
-- @treturn KVCache
function Attention:cache(options)
  config.expect_settled(self.options)
  local o = schema.options(OP .. ".cache", options, CACHE)
  if not self.pattern.causal then
    fail(OP .. ".cache",
      "only causal attention can be decoded row by row; make the module with causal = true")
  end
  local kind = self.attention:in_blocks() and BlockCache or KVCache
  form(self, {})
  return kind{ decoder = self.attention:decoder(self.head_dim), batch = o.batch, keep = o.keep,
    rows = o.rows, heads = self.kv_heads, head_dim = self.head_dim,
    dtype = self.out.weight:dtype(), device = self.out.weight:device() }
end

local function decode(self, x, cache, counts)
  local start = cache.positions
  local same = start[1]
  for b = 2, #start do
    if start[b] ~= same then same = nil end
  end
  local q, k, v = heads_at(self, x, x, x, same or start)
  form(self, {})
  local out, lse = cache:attend(q, k, v, counts)
  if self.options.add_bias_kv or self.options.add_zero_attn then
    out = extra_keys.join(self, q, out, lse)
  end
  return finish(self, out)
end

--- The rows that follow those in the cache: equal to these rows of forward over the whole sequence, at the
-- cost of what they attend to. No gradients; in evaluation mode if the module has dropout.
-- @tparam Tensor x [B, n, E] n >= 1 new rows of every item
-- @tparam KVCache cache made by self:cache{batch = B}; it takes the rows in
-- @tparam[opt] table counts new rows of each item where they differ (the rest of x is padding)
-- @treturn Tensor [B, n, E]
function Attention:decode(x, cache, counts)
  config.expect_settled(self.options)
  check_input("x", x, self.embed_dim)
  if not KVCache.is(cache) then
    fail(OP .. ".decode", "expected a cache made by self:cache{}, got %s", show(cache))
  end
  if x:size(1) ~= cache.batch then
    fail(OP .. ".decode", "x has %d batch items, the cache has %d", x:size(1), cache.batch)
  end
  if self.training and self.options.dropout > 0 then
    fail(OP .. ".decode", "the module is in training mode with dropout %g; call eval() first",
      self.options.dropout)
  end
  return grad.no_grad(decode, self, x, cache, counts)
end
base.entry_point(Attention.decode)

--- What the attention does at a length (see lac.attention): strips, coverage, costs.
-- @tparam integer n @tparam[opt] table sizes as there; head_dim, dtype and device are the module's
function Attention:explain(n, sizes)
  if sizes ~= nil then schema.check(OP .. ".explain", "sizes", sizes, { type = "table" }) end
  local z = { head_dim = self.head_dim, dtype = self.out.weight:dtype(), device = self.out.weight:device() }
  for name, value in pairs(sizes or {}) do z[name] = value end
  return self.attention:explain(n, z)
end

function Attention:extra()
  local p, o = self.pattern, self.options
  local kv = self.kv_heads ~= self.heads and ("/%d"):format(self.kv_heads) or ""
  local text = ("%d, %d%s heads, "):format(self.embed_dim, self.heads, kv)
  if o.variant ~= "custom" then text = text .. o.variant .. ", " end
  if o.segments then
    text = ("%ssegments {%s}, dilations {%s}, "):format(text, table.concat(p.segments, ", "),
      table.concat(p.dilations, ", "))
  end
  text = ("%s%s, offset %s, merge %s"):format(text, p.heads, p.offset, p.merge)
  if p.causal then text = text .. ", causal" end
  if p.window then text = ("%s, window %d"):format(text, p.window) end
  text = text .. self.attention.own_text(self.attention.options, self.attention.record)
  return o.positions == "none" and text or text .. ", " .. o.positions
end

-- ---- the named modules ------------------------------------------------------------------------------------

-- the module with other defaults, under the name that the published code gives it
local function named(name, defaults)
  local Named, fixed = base.define(name, Attention), {}
  for _, key in ipairs(schema.keys(defaults)) do
    if key ~= "variant" then fixed[#fixed + 1] = ("%s = %s unless given"):format(key, show(defaults[key])) end
  end
  table.insert(fixed, 1, ("variant = '%s'"):format(defaults.variant))
  Named.__about = { "(options)",
    ("MultiheadDilatedAttention, options as there, with %s."):format(table.concat(fixed, ", ")) }
  function Named:init(options)
    local o = {}
    for key, value in pairs(defaults) do o[key] = value end
    if options ~= nil then schema.expect_options(name, options) end
    for key, value in pairs(options or {}) do o[key] = value end
    if o.variant ~= defaults.variant then
      fail(name, "variant is '%s', got %s; MultiheadDilatedAttention takes any", defaults.variant,
        show(o.variant))
    end
    Attention.init(self, o)
  end
  return Named
end

return {
  PATTERN = PATTERN,
  MultiheadDilatedAttention = Attention,
  ImprovedMultiheadDilatedAttention = named("ImprovedMultiheadDilatedAttention",
    { variant = "improved", fused = true }),
  RingMultiheadDilatedAttention = named("RingMultiheadDilatedAttention", { variant = "ring" }),
  DistributedImprovedMultiheadDilatedAttention = named("DistributedImprovedMultiheadDilatedAttention",
    { variant = "distributed", of = "improved", fused = true }),
}
