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
-- gives logits when they are wanted. Costs are derived, not guessed: attention from the plan's own count of
-- (query, key) pairs, products from the shapes of the parameters. generate() recomputes the window for every
-- token: simple and right; a cache is another file's matter.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local scope = require "lacuna.scope"
local ops = require("lacuna.ops").fn
local grad = require "lacuna.grad"
local attention = require "lacuna.attention"
local base = require "lacuna.nn.module"
local layers = require "lacuna.nn.layers"
local attn = require "lacuna.nn.attention"

local C = lib.C
local fail, show = schema.fail, schema.show
local POSITIVE = { type = "integer", min = 1 }

--- MAGNETO's gain for a decoder- or encoder-only model of L layers.
-- @tparam integer count L >= 1
local function magneto_gain(count)
  schema.check("magneto_gain", "layers", count, POSITIVE)
  return math.sqrt(math.log(2 * count))
end

-- ---- feed-forward -----------------------------------------------------------------------------------------

local FeedForward = base.define("FeedForward")

--- y = W2 LN(gelu(W1 x)).
-- @tparam integer width
-- @tparam integer hidden
-- @tparam[opt] table options layer_norm = true; gamma = 1; dropout = 0 (after the activation); eps; dtype,
--   device
function FeedForward:init(width, hidden, options)
  schema.check("FeedForward", "width", width, POSITIVE)
  schema.check("FeedForward", "hidden", hidden, POSITIVE)
  local o = schema.options("FeedForward", options, {
    layer_norm = { type = "boolean", default = true },
    gamma = { type = "number", above = 0, default = 1 },
    dropout = { type = "number", min = 0, below = 1, default = 0 },
    eps = { type = "number", above = 0, default = 1e-5 },
    dtype = { type = "string" }, device = { type = "string" },
  })
  local linear = { gain = o.gamma, dtype = o.dtype, device = o.device }
  self.layer_norm = o.layer_norm
  self.up = layers.Linear(width, hidden, linear)
  if o.layer_norm then self.norm = layers.LayerNorm(hidden, { eps = o.eps, dtype = o.dtype,
    device = o.device }) end
  self.dropout = layers.Dropout(o.dropout)
  self.down = layers.Linear(hidden, width, linear)
end

--- @tparam Tensor x [..., width]
function FeedForward:forward(x)
  local hidden = self.dropout(self.up(x):gelu())
  if self.layer_norm then hidden = self.norm(hidden) end
  return self.down(hidden)
end

-- ---- block ------------------------------------------------------------------------------------------------

local Block = base.define("Block")

--- x + attention(LN x), then x + ffn(LN x).
-- @tparam table options width, ffn, dropout = 0 (on both residual branches), gamma; attention = options of
--   MultiheadDilatedAttention (embed_dim is filled in)
function Block:init(options)
  local o = schema.options("Block", options, {
    width = { type = "integer", min = 1, required = true },
    ffn = { type = "integer", min = 1, required = true },
    dropout = { type = "number", min = 0, below = 1, default = 0 },
    gamma = { type = "number", above = 0, default = 1 },
    attention = { type = "table", required = true },
    dtype = { type = "string" }, device = { type = "string" },
  })
  local place = { dtype = o.dtype, device = o.device }
  local inner = { embed_dim = o.width, gamma = o.gamma, dtype = o.dtype, device = o.device }
  for name, value in pairs(o.attention) do inner[name] = value end
  self.norm1 = layers.LayerNorm(o.width, place)
  self.attention = attn.MultiheadDilatedAttention(inner)
  self.norm2 = layers.LayerNorm(o.width, place)
  self.ffn = FeedForward(o.width, o.ffn, { gamma = o.gamma, dtype = o.dtype, device = o.device })
  self.dropout = layers.Dropout(o.dropout)
end

--- @tparam Tensor x [B, N, E]
function Block:forward(x)
  x = x + self.dropout(self.attention(self.norm1(x)))
  return x + self.dropout(self.ffn(self.norm2(x)))
end

-- ---- language model ---------------------------------------------------------------------------------------

local LongNetLM = base.define("LongNetLM")

local OPTIONS = {
  vocab = { type = "integer", min = 1, default = 256 },
  layers = { type = "integer", min = 1, default = 12 },
  width = { type = "integer", min = 1, default = 768 },
  heads = { type = "integer", min = 1, default = 12 },
  kv_heads = { type = "integer", min = 1 },
  ffn = { type = "integer", min = 1 },
  context = { type = "integer", min = 1, required = true },
  positions = { one_of = { "xpos", "rope", "none" }, default = "xpos" },
  tied = { type = "boolean", default = true },
  fused = { type = "boolean", default = false },
  dropout = { type = "number", min = 0, below = 1, default = 0 },
  attention_dropout = { type = "number", min = 0, below = 1, default = 0 },
  dtype = { type = "string" }, device = { type = "string" },
}
for name, rule in pairs(attn.PATTERN) do
  if name ~= "causal" then OPTIONS[name] = rule end
end

--- @tparam table options context, segments, dilations; vocab = 256, layers = 12, width = 768, heads = 12,
--   kv_heads, ffn = 4 width; scheme, offset, merge, dedup, window as in MultiheadDilatedAttention (always
--   causal); positions = "xpos" | "rope" | "none"; tied = true (output layer shares the embedding); fused =
--   false (projections); dropout, attention_dropout = 0; dtype, device
function LongNetLM:init(options)
  local o = schema.options("LongNetLM", options, OPTIONS)
  o.ffn = o.ffn or 4 * o.width
  self.options, self.vocab, self.context = o, o.vocab, o.context
  local gamma = magneto_gain(o.layers)
  local pattern = { causal = true, heads = o.heads, kv_heads = o.kv_heads, fused = o.fused,
    dropout = o.attention_dropout,
    positions = o.positions, origin = -math.floor(o.context / 2) }
  for name in pairs(attn.PATTERN) do
    if name ~= "causal" then pattern[name] = o[name] end
  end
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
  check_tokens(self, tokens)
  local x = self.dropout(self.embedding(tokens) * math.sqrt(self.options.width))
  for i = 1, #self.layers do x = self.layers[i](x) end
  return self.norm(x)
end

--- @tparam Tensor tokens [B, N] i32 or i64, N <= context
-- @treturn Tensor logits [B, N, vocab]
function LongNetLM:forward(tokens)
  return (ops.linear(self:hidden(tokens), output_weight(self)))
end

--- Mean cross-entropy in nats, without making all logits at once.
-- @tparam Tensor tokens [B, N]
-- @tparam Tensor targets [B, N]: the class that follows each position; ignore_index is not counted
-- @tparam[opt] table options ignore_index = -100; reduction = "mean" | "sum" | "none"; chunk = rows at a time
--   (0 chooses)
-- @treturn Tensor 0-dim ([B, N] for "none")
function LongNetLM:loss(tokens, targets, options)
  local o = schema.options("LongNetLM.loss", options, {
    ignore_index = { type = "integer", default = -100 }, chunk = { type = "integer", min = 0, default = 0 },
    reduction = { one_of = { "mean", "sum", "none" }, default = "mean" } })
  tensor.expect("LongNetLM.loss", "targets", targets)
  local x = self:hidden(tokens)
  if not tensor.same_shape(tokens, targets) then
    fail("LongNetLM.loss", "tokens and targets must have the same shape: %s and %s", show(tokens),
      show(targets))
  end
  local loss = ops.linear_cross_entropy(x, output_weight(self), nil, targets, o)
  return loss
end
base.entry_point(LongNetLM.loss)

-- ---- costs ------------------------------------------------------------------------------------------------

--- Floating-point operations for one token of a sequence of `context` tokens (a multiply-add counts as two).
-- @tparam[opt] integer context default: the model's
-- @treturn number forward and backward together (training)
-- @treturn table { forward, backward, attention_forward, attention_backward, linear_forward }
function LongNetLM:flops_per_token(context)
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
-- activations counted from the formulas of a block's operators (measured: within 5%); temporaries of the
-- backward, which live until the step's scope ends and are about as large again.
-- @tparam integer batch
-- @tparam[opt] integer context default: the model's
-- @treturn number bytes
-- @treturn table { parameters, gradients, optimizer, activations, temporaries }
function LongNetLM:memory_estimate(batch, context)
  context = context or self.context
  schema.check("memory_estimate", "batch", batch, POSITIVE)
  schema.check("memory_estimate", "context", context, { type = "integer", min = 1, max = self.context })
  local o = self.options
  local size = ({ f64 = 8, f32 = 4, f16 = 2, bf16 = 2 })[self.embedding.weight:dtype()]
  local moment = size == 8 and 8 or 4
  local params = self:parameter_count()
  -- a block keeps about: 2 norms, q k v before and after rotation, attention output, its norm, out, 2
  -- residuals (14 E); up, gelu, norm (3 F)
  local rows = batch * context
  local per_row = o.layers * (14 * o.width + 3 * o.ffn + 2 * o.heads) + 4 * o.width
  local parts = { parameters = params * size, gradients = params * size, optimizer = 2 * params * moment,
    activations = rows * per_row * size, temporaries = rows * per_row * size }
  return parts.parameters + parts.gradients + parts.optimizer + parts.activations + parts.temporaries, parts
end

-- ---- generation -------------------------------------------------------------------------------------------

local function prompt_tokens(self, prompt)
  local tokens = {}
  if type(prompt) == "string" then
    for i = 1, #prompt do tokens[i] = prompt:byte(i) end
  elseif type(prompt) == "table" and not tensor.is(prompt) then
    for i = 1, #prompt do tokens[i] = prompt[i] end
  else
    fail("generate", "the prompt must be a string or a list of tokens, got %s", show(prompt))
  end
  if #tokens == 0 then fail("generate", "the prompt must not be empty") end
  for i, t in ipairs(tokens) do
    if not schema.is_integer(t) or t < 0 or t >= self.vocab then
      fail("generate", "prompt[%d] must be a token from 0 to %d, got %s", i, self.vocab - 1, show(t))
    end
  end
  return tokens
end

-- draw from softmax(logits / temperature) restricted to the top_k largest, with the uniform number u
local function sample(logits, temperature, top_k, u)
  local order = {}
  for i = 1, #logits do
    if logits[i] ~= logits[i] then fail("generate", "the logit of token %d is nan", i - 1) end
    order[i] = i
  end
  table.sort(order, function(a, b)
    if logits[a] ~= logits[b] then return logits[a] > logits[b] end
    return a < b
  end)
  if temperature == 0 then return order[1] - 1 end
  local n = math.min(top_k or #order, #order)
  local weights, total = {}, 0
  for i = 1, n do
    weights[i] = math.exp((logits[order[i]] - logits[order[1]]) / temperature)
    total = total + weights[i]
  end
  local at = u * total
  for i = 1, n do
    at = at - weights[i]
    if at < 0 then return order[i] - 1 end
  end
  return order[n] - 1
end

local function next_logits(self, tokens)
  local first = math.max(1, #tokens - self.context + 1)
  local n = #tokens - first + 1
  return scope.run(function()
    local input = tensor.empty(C.LAC_I32, C.LAC_CPU, { 1, n }, 2)
    local pointer = tensor.pointer(input)
    for i = 0, n - 1 do pointer[i] = tokens[first + i] end
    input = input:to{ device = self.embedding.weight:device() }
    local last = self:hidden(input):narrow(2, n, 1)
    return ops.linear(last, output_weight(self)):view(self.vocab):to{ dtype = "f64" }:totable()
  end)
end

--- Continue a prompt. Every token is computed from the last `context` tokens; the model is in evaluation mode
-- meanwhile.
-- @tparam string|table prompt bytes, or a list of tokens
-- @tparam integer n tokens to add
-- @tparam[opt] table options temperature = 1 (0: the most likely); top_k = largest candidates kept (default
--   all); seed = 0
-- @treturn string|table the continuation alone, of the prompt's type
function LongNetLM:generate(prompt, n, options)
  local o = schema.options("generate", options, {
    temperature = { type = "number", min = 0, default = 1 }, top_k = { type = "integer", min = 1 },
    seed = { type = "integer", min = 0, default = 0 } })
  schema.check("generate", "n", n, { type = "integer", min = 0 })
  local tokens, added = prompt_tokens(self, prompt), {}
  if n == 0 then return type(prompt) == "string" and "" or added end
  if type(prompt) == "string" and self.vocab > 256 then
    fail("generate", "a model of vocabulary %d does not speak bytes: give the prompt as a list of tokens",
      self.vocab)
  end
  local uniform = tensor.empty(C.LAC_F64, C.LAC_CPU, { n }, 1)
  lib.check(C.lac_random(uniform.c, C.LAC_UNIFORM, 0, 1, o.seed, 0))
  local draws, training = uniform:totable(), self.training
  self:eval()
  local ok, reason = pcall(grad.no_grad, function()
    for i = 1, n do
      local token = sample(next_logits(self, tokens), o.temperature, o.top_k, draws[i])
      tokens[#tokens + 1], added[i] = token, token
    end
  end)
  self:train(training)
  if not ok then error(reason, 0) end
  if type(prompt) ~= "string" then return added end
  for i = 1, n do added[i] = string.char(added[i]) end
  return table.concat(added)
end
base.entry_point(LongNetLM.generate)

function LongNetLM:extra()
  local o = self.options
  return ("vocabulary %d, width %d, context %d, %s output, %d parameters"):format(o.vocab, o.width, o.context,
    o.tied and "tied" or "untied", self:parameter_count())
end

return { FeedForward = FeedForward, Block = Block, LongNetLM = LongNetLM, magneto_gain = magneto_gain }
