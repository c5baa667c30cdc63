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
-- position 10^5; only differences of positions matter, so `origin` shifts p to be small where the data is.
-- `decode` is forward for rows that come one by one: it keeps keys and values in a KVCache (cache.lua).
-- Attention options are checked here once and passed on by name; nothing is accepted that lac.attend would
-- ignore. Rejected: a separate class per variant (the variants are options of one formula).

local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local operators = require "lacuna.ops"
local attention = require "lacuna.attention"
local grad = require "lacuna.grad"
local base = require "lacuna.nn.module"
local layers = require "lacuna.nn.layers"
local KVCache = require("lacuna.nn.cache").KVCache

local ops, passed, transient = operators.fn, operators.passed, operators.transient
local fail, show = schema.fail, schema.show
local OP = "MultiheadDilatedAttention"

--- Options that go to the attention as they are; models that contain this module accept them too.
local PATTERN = {
  segments = { type = "integers", min = 1, required = true },
  dilations = { type = "integers", min = 1, required = true },
  scheme = { one_of = { "split", "all" }, default = "all" },
  offset = { one_of = { "branch", "mod", "block" } },
  merge = { one_of = { "mean", "sum", "lse", "lse_detach" } },
  dedup = { type = "boolean", default = false },
  causal = { type = "boolean", default = false },
  window = { type = "integer", min = 0 },
}

local OPTIONS = {
  embed_dim = { type = "integer", min = 1, required = true },
  heads = { type = "integer", min = 1, required = true },
  kv_heads = { type = "integer", min = 1 },
  scale = { type = "number", above = 0 },
  dropout = { type = "number", min = 0, below = 1, default = 0 },
  bias = { type = "boolean", default = true },
  fused = { type = "boolean", default = false },
  layer_norm = { type = "boolean", default = true },
  eps = { type = "number", above = 0, default = 1e-5 },
  gamma = { type = "number", above = 0, default = 1 },
  positions = { one_of = { "none", "rope", "xpos" }, default = "none" },
  rope_base = { type = "number", above = 1, default = 10000 },
  xpos_base = { type = "number", above = 0, default = 512 },
  origin = { type = "integer", default = 0 },
  dtype = { type = "string" }, device = { type = "string" },
}
for name, rule in pairs(PATTERN) do OPTIONS[name] = rule end

local Attention = base.define(OP)

local function check_heads(o)
  if o.embed_dim % o.heads ~= 0 then
    fail(OP, "embed_dim %d is not divisible by heads %d", o.embed_dim, o.heads)
  end
  if o.heads % o.kv_heads ~= 0 then
    fail(OP, "heads %d is not divisible by kv_heads %d", o.heads, o.kv_heads)
  end
  if o.positions ~= "none" and o.embed_dim / o.heads % 2 ~= 0 then
    fail(OP, "positions '%s' rotate pairs: the head dimension must be even, got %d", o.positions,
      o.embed_dim / o.heads)
  end
  if #o.segments ~= #o.dilations then
    fail(OP, "segments and dilations must have the same length: %d != %d", #o.segments, #o.dilations)
  end
end

--- The published defaults of a scheme: split heads are averaged with the offset of their branch (fkodom), all
-- heads are merged by their softmax weights with the offset of their head (LongNet).
local function pattern_options(o)
  local split = o.scheme == "split"
  return { segments = o.segments, dilations = o.dilations, heads = o.scheme,
    offset = o.offset or (split and "branch" or "mod"), merge = o.merge or (split and "mean" or "lse"),
    dedup = o.dedup, causal = o.causal, window = o.window, scale = o.scale }
end

--- Make the module.
-- @tparam table options embed_dim E, heads H, segments, dilations; kv_heads = heads; scheme = "all" |
--   "split"; offset, merge (default: the scheme's), dedup, causal, window, scale; dropout = 0 (on the
--   attention weights, in training); bias = true; fused = false; layer_norm = true; gamma = 1; positions =
--   "none" | "rope" | "xpos", rope_base, xpos_base, origin (position of the first row); dtype, device
function Attention:init(options)
  local o = schema.options(OP, options, OPTIONS)
  o.kv_heads = o.kv_heads or o.heads
  check_heads(o)
  local E, D = o.embed_dim, o.embed_dim / o.heads
  local Ek = o.kv_heads * D
  self.options, self.embed_dim, self.heads, self.kv_heads, self.head_dim = o, E, o.heads, o.kv_heads, D
  self.pattern = pattern_options(o)
  -- what depends on heads and offsets is the plan's to refuse, and now rather than at the first batch
  attention.plan_info(self.pattern, { n = 1, heads = o.heads, kv_heads = o.kv_heads, head_dim = D })
  local function linear(inputs, outputs, gain, parts)
    return layers.Linear(inputs, outputs, { gain = gain, parts = parts, bias = o.bias, dtype = o.dtype,
      device = o.device })
  end
  if o.fused then
    self.qkv = linear(E, E + 2 * Ek, { 1, 1, o.gamma }, { E, Ek, Ek })
  else
    self.q = linear(E, E, 1) -- one by one: a multiple assignment would register them from the right
    self.k = linear(E, Ek, 1)
    self.v = linear(E, Ek, o.gamma)
  end
  if o.layer_norm then self.norm = layers.LayerNorm(E, { eps = o.eps, dtype = o.dtype,
    device = o.device }) end
  self.out = linear(E, E, o.gamma)
end

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

-- start: position of row 1 from 0, one for the whole batch or a list of one per item
local function rotate(self, x, sign, start)
  local o = self.options
  if o.positions == "none" then return x end
  local single = type(start) == "number"
  return ops.rope(x, { base = o.rope_base, sign = sign, start = o.origin + (single and start or 0),
    scale_base = o.positions == "xpos" and o.xpos_base or nil,
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

local function check_input(self, name, x)
  tensor.expect(OP, name, x)
  if x:dim() ~= 3 or x:size(3) ~= self.embed_dim then
    fail(OP, "%s must be [batch x positions x %d], got %s", name, self.embed_dim, show(x))
  end
end

--- @tparam Tensor query [B, N, E]
-- @tparam[opt] Tensor key [B, M, E], default query
-- @tparam[opt] Tensor value [B, M, E], default key
-- @tparam[opt] table options key_padding [B, M] bool (true = keep), key_lengths [B]
-- @treturn Tensor [B, N, E]
function Attention:forward(query, key, value, options)
  local o = schema.options(OP, options, { key_padding = { type = "tensor" },
    key_lengths = { type = "tensor" } })
  key = key or query
  value = value or key
  check_input(self, "query", query)
  check_input(self, "key", key)
  check_input(self, "value", value)
  local q, k, v, projected = heads_at(self, query, key, value, 0)
  local call = { dropout = self.training and self.options.dropout or 0, key_padding = o.key_padding,
    key_lengths = o.key_lengths, return_lse = false }
  for name, setting in pairs(self.pattern) do call[name] = setting end
  local out = attention.attend(q, k, v, call)
  transient(q, out, query)
  transient(k, out, key)
  transient(projected, out, value)
  return finish(self, out)
end

local CACHE = { batch = { type = "integer", min = 1, default = 1 },
  keep = { type = "integer", min = 0, default = 0 }, rows = { type = "integer", min = 1 } }

--- An empty cache for decode.
-- @tparam[opt] table options batch = 1; keep = 0 (positions that cache:rewind can always go back); rows =
--   space to begin with
-- @treturn KVCache
function Attention:cache(options)
  local o = schema.options(OP .. ".cache", options, CACHE)
  if not self.pattern.causal then
    fail(OP .. ".cache",
      "only causal attention can be decoded row by row; make the module with causal = true")
  end
  local sizes = { heads = self.heads, kv_heads = self.kv_heads, head_dim = self.head_dim }
  return KVCache{ decoder = attention.decoder(self.pattern, sizes), batch = o.batch, keep = o.keep,
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
  return finish(self, (cache:attend(q, k, v, counts)))
end

--- The rows that follow those in the cache: equal to these rows of forward over the whole sequence, at the
-- cost of what they attend to. No gradients; in evaluation mode if the module has dropout.
-- @tparam Tensor x [B, n, E] n >= 1 new rows of every item
-- @tparam KVCache cache made by self:cache{batch = B}; it takes the rows in
-- @tparam[opt] table counts new rows of each item where they differ (the rest of x is padding)
-- @treturn Tensor [B, n, E]
function Attention:decode(x, cache, counts)
  check_input(self, "x", x)
  if getmetatable(cache) ~= KVCache then
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

function Attention:extra()
  local p, o = self.pattern, self.options
  local kv = self.kv_heads ~= self.heads and ("/%d"):format(self.kv_heads) or ""
  local text = ("%d, %d%s heads, segments {%s}, dilations {%s}, %s, offset %s, merge %s"):format(
    self.embed_dim, self.heads, kv, table.concat(p.segments, ", "), table.concat(p.dilations, ", "), p.heads,
    p.offset, p.merge)
  if p.causal then text = text .. ", causal" end
  if p.window then text = ("%s, window %d"):format(text, p.window) end
  return o.positions == "none" and text or text .. ", " .. o.positions
end

return { MultiheadDilatedAttention = Attention, PATTERN = PATTERN }
