--- nn/longnet.lua: LongNet as a decoder-only language model.
--
-- Ding et al. 2023 (arXiv 2307.02486) with the MAGNETO architecture (Wang et al. 2022): pre-LayerNorm blocks
-- with a further LayerNorm inside attention (on the merged heads) and inside the feed-forward part (on the
-- hidden layer), Xavier-normal initial values with gain gamma = sqrt(log(2L)) on v, out and both feed-forward
-- matrices, a final LayerNorm. Positions are XPOS, RoPE or none. The embedding has unit variance after
-- scaling by sqrt(E) and may be shared with the output layer.
--
-- `loss` never makes the logits of all positions: hidden rows go through the fused linear-cross-entropy a
-- chunk at a time, in both directions, which is what allows long sequences with a large vocabulary. `forward`
-- gives logits when they are wanted. What an operator of a block has read and nobody else can see is given
-- back at once or by the backward (ops.transient). Parts that are operators of ops/fused.lua are called as
-- such; a module that a script put in the place of one is called as it is. Rejected after measuring a step of
-- the demo's model on one thread of a CPU: gelu in the product's epilogue (1.0 ns an element from memory as
-- from cache: nothing to save), one pass for a residual sum and the norm that follows (the sums are 0.8% of a
-- step; on CUDA it is one), one product for q, k and v by default (`fused`: 3% slower, because each slice's
-- gradient is a whole tensor). Costs are derived, not guessed: attention from the plan's own count of (query,
-- key) pairs, products from the shapes of the parameters. decode() is forward for tokens that come a few at a
-- time; keys and values of the earlier ones are in a cache (cache.lua). generate() is in generate.lua, for
-- every model that has cache and decode.

local schema = require "lacuna.schema"
local config = require "lacuna.config"
local tensor = require "lacuna.tensor"
local operators = require "lacuna.ops"
local grad = require "lacuna.grad"
local checkpoint = require("lacuna.recompute").checkpoint
local attention = require "lacuna.attention"
local base = require "lacuna.nn.module"
local layers = require "lacuna.nn.layers"
local attn = require "lacuna.nn.attention"
local cache = require "lacuna.nn.cache"
local generate = require "lacuna.nn.generate"

local ops, passed, transient = operators.fn, operators.passed, operators.transient
local fail, show = schema.fail, schema.show
local POSITIVE = { type = "integer", min = 1 }

--- MAGNETO's gain for a decoder- or encoder-only model of L layers, sqrt(log 2L) (Wang et al. 2022, arXiv
-- 2210.06423).
-- @tparam integer count L >= 1
local function magneto_gain(count)
  schema.check("magneto_gain", "layers", count, POSITIVE)
  return math.sqrt(math.log(2 * count))
end

-- ---- feed-forward -----------------------------------------------------------------------------------------

local EPS = 1e-5
local FeedForward = base.define("FeedForward", nil, "layer_norm activation")

--- y = W2 LN(gelu(W1 x)).
-- @tparam integer width
-- @tparam integer hidden
-- @tparam[opt] table options layer_norm = true; activation = "gelu" or "gelu_tanh" (its approximation, which
--   CUDA applies inside the product); gamma = 1; dropout = 0 (after the activation); eps; dtype, device
function FeedForward:init(width, hidden, options)
  schema.check("FeedForward", "width", width, POSITIVE)
  schema.check("FeedForward", "hidden", hidden, POSITIVE)
  local o = schema.options("FeedForward", options, {
    layer_norm = { type = "boolean", default = true },
    activation = { one_of = { "gelu", "gelu_tanh" }, default = "gelu" },
    gamma = { type = "number", above = 0, default = 1 },
    dropout = { type = "number", min = 0, below = 1, default = 0 },
    eps = { type = "number", above = 0, default = EPS },
    dtype = { type = "string" }, device = { type = "string" },
  })
  if not o.layer_norm and o.eps ~= EPS then
    fail("FeedForward", "eps = %s is the LayerNorm's, and layer_norm = false leaves it out", show(o.eps))
  end
  local linear = { gain = o.gamma, dtype = o.dtype, device = o.device }
  self.layer_norm, self.activation = o.layer_norm, o.activation
  self.up = layers.Linear(width, hidden, linear)
  if o.layer_norm then self.norm = layers.LayerNorm(hidden, { eps = o.eps, dtype = o.dtype,
    device = o.device }) end
  self.dropout = layers.Dropout(o.dropout)
  self.down = layers.Linear(hidden, width, linear)
end

-- is m what this file made, with the forward of its class? a script may have put another module in its place
local function plain(m, class) return getmetatable(m) == class and rawget(m, "forward") == nil end

-- one operator, where nothing lies between its parts
local function joined(self)
  return plain(self.up, layers.Linear) and plain(self.down, layers.Linear)
    and (self.dropout.p == 0 or not self.training)
    and (not self.layer_norm or (self.activation == "gelu" and plain(self.norm, layers.LayerNorm)))
end

--- @tparam Tensor x [..., width]
function FeedForward:forward(x)
  local up, down, norm = self.up, self.down, self.layer_norm and self.norm
  if joined(self) then
    return ops.feed_forward(x, up.weight, up.has_bias and up.bias or nil, down.weight,
      down.has_bias and down.bias or nil, { activation = self.activation, norm = self.layer_norm,
        gamma = norm and norm.weight or nil, beta = norm and norm.bias or nil,
        eps = norm and norm.eps or nil })
  end
  local active
  if self.activation == "gelu_tanh" and plain(up, layers.Linear) then
    active = ops.linear_act(x, up.weight, up.has_bias and up.bias or nil, "gelu_tanh")
  else
    local raised = up(x)
    active = ops[self.activation](raised)
    passed(raised, active, x)
  end
  local hidden = self.dropout(active)
  local normed = norm and norm(hidden) or hidden
  local out = down(normed)
  passed(active, hidden)
  passed(hidden, normed)
  passed(normed, out)
  return out
end

-- ---- block ------------------------------------------------------------------------------------------------

local Block = base.define("Block", nil, "has_cross")

--- x + attention(LN x), with `cross` then x + cross(LN x, memory), then x + ffn(LN x).
-- @tparam table options width, ffn, dropout = 0 (on the residual branches), gamma, dtype, device; attention =
--   options of MultiheadDilatedAttention (embed_dim is filled in); cross = the same for attention to a memory
function Block:init(options)
  local o = schema.options("Block", options, {
    width = { type = "integer", min = 1, required = true },
    ffn = { type = "integer", min = 1, required = true },
    dropout = { type = "number", min = 0, below = 1, default = 0 },
    gamma = { type = "number", above = 0, default = 1 },
    attention = { type = "table", required = true }, cross = { type = "table" },
    dtype = { type = "string" }, device = { type = "string" },
  })
  local place = { dtype = o.dtype, device = o.device }
  local function attends(given)
    local inner = { embed_dim = o.width, gamma = o.gamma, dtype = o.dtype, device = o.device }
    for name, value in pairs(given) do inner[name] = value end
    return attn.MultiheadDilatedAttention(inner)
  end
  self.norm1 = layers.LayerNorm(o.width, place)
  self.attention = attends(o.attention)
  self.has_cross = o.cross ~= nil
  if o.cross then
    self.norm_cross = layers.LayerNorm(o.width, place)
    self.cross = attends(o.cross)
  end
  self.norm2 = layers.LayerNorm(o.width, place)
  self.ffn = FeedForward(o.width, o.ffn, { gamma = o.gamma, dtype = o.dtype, device = o.device })
  self.dropout = layers.Dropout(o.dropout)
end

-- x + dropout(part(normed)) and its norm, which the next part reads; what lies between, only the rules know
local function join(self, x, normed, norm, part, ...)
  local out = part(normed, ...)
  local sum, following
  if plain(norm, layers.LayerNorm) and plain(self.dropout, layers.Dropout) then
    sum, following = ops.residual_norm(x, out, norm.weight, norm.bias,
      { p = self.dropout.p, training = self.dropout.training, eps = norm.eps })
  else
    local dropped = self.dropout(out)
    sum = x + dropped
    passed(out, dropped, x)
    out, following = dropped, norm(sum)
  end
  transient(normed, out, x)
  passed(out, sum, x)
  return sum, following
end

--- @tparam Tensor x [B, N, E]
-- @tparam[opt] table options key_padding, key_lengths of x
-- @tparam[opt] Tensor memory [B, M, E], of a block with cross-attention
-- @tparam[opt] table memory_options key_padding, key_lengths of the memory
-- @tparam[opt] Tensor normed the first norm of x, if it is there already
-- @tparam[opt] LayerNorm norm what follows the block, to be taken with its last sum
-- @treturn Tensor [B, N, E] @treturn ?Tensor norm of it
function Block:forward(x, options, memory, memory_options, normed, norm)
  if self.has_cross ~= (memory ~= nil) then
    fail("Block", self.has_cross and "the block has cross-attention and needs a memory [batch x rows x width]"
      or "the block has no cross-attention, but a memory was given")
  end
  if norm ~= nil and not base.is_module(norm) then
    fail("Block", "the norm that follows must be a module, got %s", show(norm))
  end
  local second = memory and self.norm_cross or self.norm2
  local y
  y, normed = join(self, x, normed or self.norm1(x), second, self.attention, nil, nil, options)
  if memory then
    local crossed, after = join(self, y, normed, self.norm2, self.cross, memory, nil, memory_options)
    transient(y, crossed, x)
    y, normed = crossed, after
  end
  if norm then
    local z, following = join(self, y, normed, norm, self.ffn)
    transient(y, z, x)
    return z, following
  end
  local out = self.ffn(normed)
  local dropped = self.dropout(out)
  local z = y + dropped
  transient(normed, out, x)
  passed(out, dropped, x)
  passed(dropped, z, x)
  transient(y, z, x)
  return z
end

--- Blocks one after the other, and the norm behind them; each block's last sum is one pass with what follows.
-- @tparam table list of Block
-- @tparam Tensor x [B, N, E]
-- @tparam LayerNorm norm
-- @tparam boolean sparing true: a block keeps only its input for the backward (lac.checkpoint)
-- @tparam[opt] table options @tparam[opt] Tensor memory @tparam[opt] table memory_options of Block:forward
-- @treturn Tensor [B, N, E]
function Block.stack(list, x, norm, sparing, options, memory, memory_options)
  if not base.is_module(norm) then
    fail("Block", "the norm behind the blocks must be a module, got %s", show(norm))
  end
  local first, normed = x, nil
  for i = 1, #list do
    local block, after, before = list[i], i < #list and list[i + 1] or nil, x
    if sparing or not plain(block, Block) then
      x = sparing and checkpoint(block, x, options, memory, memory_options)
        or block(x, options, memory, memory_options)
      normed = nil
    else
      local follows = not after and norm or plain(after, Block) and after.norm1 or nil
      x, normed = block(x, options, memory, memory_options, normed, follows)
    end
    transient(before, x)
  end
  local out = normed or norm(x)
  transient(x, out, first)
  return out
end

local function attend_next(x, self, state, counts) return self.attention:decode(x, state, counts) end

--- forward for rows that follow those in the cache (MultiheadDilatedAttention:decode).
-- @tparam Tensor x [B, n, E] @tparam KVCache state @tparam[opt] table counts new rows of each item
-- @tparam[opt] Tensor normed the first norm of x, if it is there already
-- @tparam[opt] LayerNorm norm what follows the block, to be taken with its last sum
-- @treturn Tensor [B, n, E] @treturn ?Tensor norm of it
function Block:decode(x, state, counts, normed, norm)
  local y, second = join(self, x, normed or self.norm1(x), self.norm2, attend_next, self, state, counts)
  if norm then return join(self, y, second, norm, self.ffn) end
  return y + self.ffn(second)
end
base.entry_point(Block.decode)

-- ---- language model ---------------------------------------------------------------------------------------

local LongNetLM = base.define("LongNetLM", nil, "options vocab context")

-- The paper's models: with a vocabulary of 50,304 they have the parameters of their names.
local SIZES = {
  ["125M"] = { layers = 12, width = 768, heads = 12 }, ["350M"] = { layers = 24, width = 1024, heads = 16 },
  ["760M"] = { layers = 24, width = 1536, heads = 16 }, ["2.7B"] = { layers = 32, width = 2560, heads = 32 },
}
local SIZE_NAMES = { "125M", "350M", "760M", "2.7B" }
local SIZED = { vocab = 50304, segments = { 2048, 4096, 8192, 16384, 32768 }, dilations = { 1, 2, 4, 6, 12 } }

-- options that only the variant has are not the model's
local function refuse_inner(op, options, spec)
  local name = options.variant
  if type(name) ~= "string" then return end
  local own = attention.options_of(name, options)
  for _, key in ipairs(schema.keys(options)) do
    if own[key] and not spec[key] then
      fail(op, "'%s' is an option of variant '%s', not of the model: attention = { variant = '%s', %s = %s }",
        key, name, name, key, schema.show(options[key]))
    end
  end
end

-- options with those of a size of the paper filled in where the script gives none
local function sized(op, options, spec)
  if options == nil then return nil end
  schema.expect_options(op, options)
  refuse_inner(op, options, spec)
  if rawget(options, "size") == nil then return options end
  schema.check(op, "size", options.size, { one_of = SIZE_NAMES })
  local o = {}
  for name, value in pairs(SIZED) do o[name] = value end
  for name, value in pairs(SIZES[options.size]) do o[name] = value end
  for name, value in pairs(options) do o[name] = value end
  return o
end

-- what all models of such blocks take
local COMMON = {
  size = { one_of = SIZE_NAMES },
  layers = { type = "integer", min = 1, default = 12 },
  width = { type = "integer", min = 1, default = 768 },
  heads = { type = "integer", min = 1, default = 12 },
  kv_heads = { type = "integer", min = 1 },
  ffn = { type = "integer", min = 1 },
  context = { type = "integer", min = 1, required = true },
  positions = { one_of = { "xpos", "rope", "alibi", "none" }, default = "xpos" },
  fused = { type = "boolean", default = false },
  dropout = { type = "number", min = 0, below = 1, default = 0 },
  attention_dropout = { type = "number", min = 0, below = 1, default = 0 },
  checkpoint_activations = { type = "boolean", default = false },
  dtype = { type = "string" }, device = { type = "string" },
}
COMMON.attention = { type = "table" }
for name, rule in pairs(attn.PATTERN) do
  if name ~= "causal" then COMMON[name] = rule end
end

-- a schema: these options and `more`
local function spec(more)
  local all = {}
  for name, rule in pairs(COMMON) do all[name] = rule end
  for name, rule in pairs(more) do all[name] = rule end
  return all
end

-- options of a block's own attention; XPOS wants positions around 0
local function self_attention(o, causal)
  local pattern = { causal = causal, heads = o.heads, kv_heads = o.kv_heads, fused = o.fused,
    dropout = o.attention_dropout, positions = o.positions,
    origin = (o.positions == "rope" or o.positions == "xpos") and -math.floor(o.context / 2) or nil }
  for name in pairs(attn.PATTERN) do
    if name ~= "causal" then pattern[name] = o[name] end
  end
  for name, value in pairs(o.attention or {}) do pattern[name] = value end
  return pattern
end

local OPTIONS = spec{
  vocab = { type = "integer", min = 1, default = 256 },
  tied = { type = "boolean", default = true },
}

-- options that a size or other options decide, unless they are given: config's `with` lets them follow
local function followers(rules)
  local follow = { ffn = rules.ffn and function(o) return 4 * o.width end or nil }
  for _, from in ipairs{ SIZED, SIZES["125M"] } do
    for name in pairs(from) do
      local rule = rules[name]
      if rule then
        follow[name] = function(o)
          if not o.size then return rule.default end
          local own = SIZES[o.size][name]
          return own == nil and SIZED[name] or own
        end
      end
    end
  end
  return follow
end

-- a pattern of blocks as its text, as checkpoints keep it; and no option in both places
local function inner_attention(op, o)
  if not o.attention then return end
  local given = {}
  for name, value in pairs(o.attention) do
    given[name] = attention.masks.is(value) and tostring(value) or value
    local rule = name ~= "variant" and attn.PATTERN[name]
    if rule and o[name] ~= nil and o[name] ~= rule.default and not (o.size and SIZED[name]) then
      fail(op, "%s is given twice, to the model and in `attention`", name)
    end
  end
  o.attention = given
end

-- options of the user -> complete options
local function configure(options)
  local o = schema.options("LongNetLM", sized("LongNetLM", options, OPTIONS), OPTIONS)
  o.ffn = o.ffn or 4 * o.width
  inner_attention("LongNetLM", o)
  return o
end
config.define("language_model", configure, followers(OPTIONS))

--- A causal language model: embedding, blocks of dilated attention and a feed-forward layer, norm, output
-- layer (LongNet, arXiv 2307.02486, with MAGNETO's norms, arXiv 2210.06423).
-- @tparam table options context, segments, dilations; size = "125M" | "350M" | "760M" | "2.7B" (the paper's
--   layers, width, heads, segments and dilations, and vocab = 50304; other options given win); vocab = 256,
--   layers = 12, width = 768, heads = 12, kv_heads, ffn = 4 width; variant, scheme, offset, merge, dedup,
--   window, fp8 as in MultiheadDilatedAttention (always causal); attention = what only the variant takes,
--   { variant = "block_sparse", pattern = ... }; positions = "xpos" | "rope" | "alibi" | "none";
--   tied = true (output layer shares the embedding); fused = false (projections); dropout,
--   attention_dropout = 0; checkpoint_activations = false (true: a block keeps only its input for the
--   backward pass and is computed again there); dtype, device. lac.config.language_model checks them and
--   makes a value of them; model.options is one, and model.options:with{ layers = 4 } another
-- @usage
--     local model = lac.nn.LongNetLM{ vocab = 256, layers = 2, width = 32, heads = 4, context = 64,
--                                     segments = { 16, 64 }, dilations = { 1, 4 } }
--     local text = lac.from_string("In the beginning was the word."):long():view(1, 30)
--     local loss = model:loss(text:narrow(2, 1, 29), text:narrow(2, 2, 29)) -- tokens and targets [B, N]
--     loss:backward()
--     print(loss:item(), model(text)) -- logits [B, N, vocab]
--     print(model:generate("In ", 5))
function LongNetLM:init(options)
  local o = base.settled_options(self, "language_model", configure(options))
  self.options, self.vocab, self.context = o, o.vocab, o.context
  local gamma = magneto_gain(o.layers)
  local pattern = self_attention(o, true)
  self.embedding = layers.Embedding(o.vocab, o.width, { dtype = o.dtype, device = o.device })
  self.dropout = layers.Dropout(o.dropout)
  local blocks = {}
  for i = 1, o.layers do
    blocks[i] = Block{ width = o.width, ffn = o.ffn, dropout = o.dropout, gamma = gamma, attention = pattern,
      dtype = o.dtype, device = o.device }
  end
  self.layers = layers.ModuleList(blocks)
  self.norm = layers.LayerNorm(o.width, { dtype = o.dtype, device = o.device })
  if not o.tied then
    self.head = layers.Linear(o.width, o.vocab, { bias = false, dtype = o.dtype, device = o.device })
  end
end

schema.describe(LongNetLM.init, OPTIONS)

local function check_tokens(self, tokens)
  tensor.expect("LongNetLM", "tokens", tokens)
  if tokens:dim() ~= 2 then fail("LongNetLM", "tokens must be [batch x positions], got %s", show(tokens)) end
  if tokens:size(2) > self.context then
    fail("LongNetLM", "%d positions exceed the context of %d", tokens:size(2), self.context)
  end
  if tokens:numel() == 0 then fail("LongNetLM", "there are no tokens: %s", show(tokens)) end
end

local function output_weight(self) return self.options.tied and self.embedding.weight or self.head.weight end

--- The rows that go into the output layer.
-- @tparam Tensor tokens [B, N] i32 or i64
-- @treturn Tensor [B, N, E]
function LongNetLM:hidden(tokens)
  config.expect_settled(self.options)
  base.expect_sound(self)
  check_tokens(self, tokens)
  local rows = self.embedding(tokens)
  local scaled = rows * math.sqrt(self.options.width)
  local x = self.dropout(scaled)
  transient(rows, scaled)
  passed(scaled, x)
  return Block.stack(self.layers, x, self.norm, self.options.checkpoint_activations)
end

local LOGITS = { counts = { type = "table" }, logits = { one_of = { "all", "last" }, default = "all" } }

-- of [B, n, E] the rows after which a token is wanted: all, or row counts[b] (default n) of every item
local function wanted_rows(x, o)
  if o.logits == "all" then return x end
  if not o.counts then return x:narrow(2, x:size(2), 1) end
  local rows = {}
  for b = 1, x:size(1) do rows[b] = x:narrow(1, b, 1):narrow(2, math.max(o.counts[b], 1), 1) end
  return ops.cat(rows, 1)
end

local function check_counts(op, counts, tokens)
  if counts == nil then return end
  local B, n = tokens:size(1), tokens:size(2)
  if #counts ~= B then fail(op, "counts must have one number for each of %d items, got %s", B,
    show(counts)) end
  for b = 1, B do
    schema.check(op, ("counts[%d]"):format(b), counts[b], { type = "integer", min = 0, max = n })
  end
end

--- @tparam Tensor tokens [B, N] i32 or i64, N <= context
-- @tparam[opt] table options logits = "all" or "last" (only those after each item's last token); counts: list
--   of B, how many of the N tokens an item really has (the rest is padding, also in the result)
-- @treturn Tensor logits [B, N, vocab], or [B, 1, vocab]
function LongNetLM:forward(tokens, options)
  local o = schema.options("LongNetLM", options, LOGITS)
  check_tokens(self, tokens)
  check_counts("LongNetLM", o.counts, tokens)
  local x = self:hidden(tokens)
  local logits = ops.linear(wanted_rows(x, o), output_weight(self))
  transient(x, logits)
  return logits
end

--- Mean cross-entropy in nats, without making all logits at once.
-- @tparam Tensor tokens [B, N]
-- @tparam Tensor targets [B, N]: the class that follows each position; ignore_index is not counted
-- @tparam[opt] table options those of lac.linear_cross_entropy: ignore_index = -100, weight [vocab],
--   label_smoothing = 0, reduction = "mean" | "sum" | "none", chunk = rows at a time (0 chooses)
-- @treturn Tensor 0-dim ([B, N] for "none")
function LongNetLM:loss(tokens, targets, options)
  tensor.expect("LongNetLM.loss", "targets", targets)
  local x = self:hidden(tokens)
  if not tensor.same_shape(tokens, targets) then
    fail("LongNetLM.loss", "tokens and targets must have the same shape: %s and %s", show(tokens),
      show(targets))
  end
  local loss = ops.linear_cross_entropy(x, output_weight(self), nil, targets, options)
  transient(x, loss)
  return loss
end
base.entry_point(LongNetLM.loss)

-- ---- costs ------------------------------------------------------------------------------------------------

--- Floating-point operations for one token of a sequence of `context` tokens (a multiply-add counts as two).
-- @tparam[opt] integer context default: the model's
-- @treturn number forward and backward together (training)
-- @treturn table { forward, backward, attention_forward, attention_backward, linear_forward }
function LongNetLM:flops_per_token(context)
  config.expect_settled(self.options)
  context = context or self.context
  schema.check("flops_per_token", "context", context, { type = "integer", min = 1, max = self.context })
  local linear = 2 * output_weight(self):numel()
  for _, m in ipairs(self:modules()) do
    if getmetatable(m.module) == layers.Linear
      and m.path ~= "head" then linear = linear + 2 * m.module.weight:numel() end
  end
  local o, block = self.options, self.layers[1].attention
  local plan = attention.plan_info(block.pattern, { batch = 1, n = context, heads = o.heads,
    kv_heads = block.kv_heads,
    head_dim = block.head_dim })
  local fwd, bwd = o.layers * plan.flops_forward / context, o.layers * plan.flops_backward / context
  local parts = { linear_forward = linear, attention_forward = fwd, attention_backward = bwd,
    forward = linear + fwd, backward = 2 * linear + bwd }
  return parts.forward + parts.backward, parts
end

--- Bytes that a training step needs at its peak: parameters, gradients and AdamW's moments exactly;
-- activations counted from what the rules of a block's operators read; as temporaries the gradients between
-- two operators at the widest place. What the backward has read is given back as it goes, so it needs no
-- more.
-- @tparam integer batch
-- @tparam[opt] integer context default: the model's
-- @treturn number bytes
-- @treturn table { parameters, gradients, optimizer, activations, temporaries }
function LongNetLM:memory_estimate(batch, context)
  config.expect_settled(self.options)
  context = context or self.context
  schema.check("memory_estimate", "batch", batch, POSITIVE)
  schema.check("memory_estimate", "context", context, { type = "integer", min = 1, max = self.context })
  local o = self.options
  local size = ({ f64 = 8, f32 = 4, f16 = 2, bf16 = 2 })[self.embedding.weight:dtype()]
  local moment = size == 8 and 8 or 4
  local params = self:parameter_count()
  -- a block keeps: 2 norms, q k v, attention output, its norm, 2 residual sums (9 E); up, gelu, norm (3 F;
  -- CUDA makes the last two again, unless dropout lies between); log-sum-exps, means and deviations of norms
  local rows = batch * context
  local hidden = (self.embedding.weight:device() == "cpu" or self.layers[1].ffn.dropout.p > 0) and 3 or 1
  local per_row = (o.checkpoint_activations and 1 or o.layers) * (9 * o.width + hidden * o.ffn + 2 * o.heads)
    + (o.checkpoint_activations and o.layers + 4 or 4) * o.width
  local parts = { parameters = params * size, gradients = params * size, optimizer = 2 * params * moment,
    activations = rows * per_row * size, temporaries = rows * (o.ffn + o.width) * size }
  return parts.parameters + parts.gradients + parts.optimizer + parts.activations + parts.temporaries, parts
end

-- ---- generation -------------------------------------------------------------------------------------------

--- An empty cache for decode.
-- @tparam[opt] table options batch = 1; keep = 0: how many positions cache:rewind can always go back
-- @treturn ModelCache
function LongNetLM:cache(options)
  local o, list = schema.options("LongNetLM.cache", options, { batch = { type = "integer", min = 1,
    default = 1 },
    keep = { type = "integer", min = 0, default = 0 } }), {}
  for i = 1, #self.layers do list[i] = self.layers[i].attention:cache(o) end
  return cache.ModelCache(list)
end

local DECODE = "LongNetLM.decode"

local function check_decode(self, tokens, state, o)
  config.expect_settled(self.options)
  base.expect_sound(self)
  if getmetatable(state) ~= cache.ModelCache or #state.layers ~= #self.layers then
    fail(DECODE, "expected a cache made by model:cache{}, got %s", show(state))
  end
  check_tokens(self, tokens)
  check_counts(DECODE, o.counts, tokens)
  if tokens:size(1) ~= state.batch then
    fail(DECODE, "tokens have %d batch items, the cache has %d", tokens:size(1), state.batch)
  end
  for b, at in ipairs(state:positions()) do
    local count = o.counts and o.counts[b] or tokens:size(2)
    if at + count > self.context then
      fail(DECODE, "%d tokens after the %d of item %d exceed the context of %d", count, at, b, self.context)
    end
  end
  if self.training and self.options.dropout > 0 then
    fail(DECODE, "the model is in training mode with dropout %g; call eval() first", self.options.dropout)
  end
end

local function decode(self, tokens, state, o)
  local x, normed = self.embedding(tokens) * math.sqrt(self.options.width), nil
  for i = 1, #self.layers do
    local norm = i < #self.layers and self.layers[i + 1].norm1 or nil
    x, normed = self.layers[i]:decode(x, state.layers[i], o.counts, normed, norm)
  end
  return (ops.linear(self.norm(wanted_rows(x, o)), output_weight(self)))
end

--- Logits after the tokens that follow those in the cache: the rows that forward gives for the whole
-- sequence, at the cost of the new ones. No gradients, no dropout: the model must be in evaluation mode if it
-- has any.
-- @tparam Tensor tokens [B, n] i32 or i64, the next n >= 1 tokens of every item
-- @tparam ModelCache state made by self:cache{batch = B}; it takes the tokens in
-- @tparam[opt] table options logits, counts as in forward
-- @treturn Tensor [B, n, vocab], or [B, 1, vocab]
function LongNetLM:decode(tokens, state, options)
  local o = schema.options(DECODE, options, LOGITS)
  check_decode(self, tokens, state, o)
  return (grad.no_grad(decode, self, tokens, state, o))
end
base.entry_point(LongNetLM.decode)

--- Continue one prompt, or a batch of them: see generate.lua for options and results.
-- @function LongNetLM:generate
LongNetLM.generate = generate
base.entry_point(LongNetLM.generate)

function LongNetLM:extra()
  local o = self.options
  return ("vocabulary %d, width %d, context %d, %s output, %d parameters"):format(o.vocab, o.width, o.context,
    o.tied and "tied" or "untied", self:parameter_count())
end

-- for the other models of these blocks (encoder.lua)
LongNetLM._parts = { sized = sized, followers = followers, inner_attention = inner_attention, spec = spec,
  self_attention = self_attention, wanted_rows = wanted_rows,
  LOGITS = LOGITS }

return { FeedForward = FeedForward, Block = Block, LongNetLM = LongNetLM, magneto_gain = magneto_gain }
