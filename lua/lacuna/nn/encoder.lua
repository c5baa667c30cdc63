--- nn/encoder.lua: LongNet that reads a whole sequence: encoder, classifier, encoder-decoder.
--
-- The blocks are those of the language model (longnet.lua), not causal in an encoder. A decoder's block
-- has a second attention, from its rows to the encoder's output (the memory), without the LayerNorm
-- inside, and reaches every position of it unless `cross_segments` says otherwise. Gains are MAGNETO's
-- (Wang et al. 2022, table 2): sqrt(log 2L) for an encoder alone; with a decoder of Ld layers beside an
-- encoder of Le, sqrt(log(3 Ld) log(2 Le) / 3) in the encoder and sqrt(log 3 Ld) in the decoder. Padding
-- is given by the caller (key_padding or key_lengths) and reaches every attention that reads the padded
-- sequence; rows that are padding themselves are computed and mean nothing.
--
-- To generate, the memory and every layer's keys and values of it are computed once: model:given(source)
-- is what generate.lua takes for a model. Rejected: a decoder with causal segments over the memory, whose
-- positions have nothing to do with the decoder's.

local schema = require "lacuna.schema"
local class = require "lacuna.class"
local tensor = require "lacuna.tensor"
local config = require "lacuna.config"
local create = require "lacuna.create"
local operators = require "lacuna.ops"
local grad = require "lacuna.grad"
local attention = require "lacuna.attention"
local base = require "lacuna.nn.module"
local layers = require "lacuna.nn.layers"
local longnet = require "lacuna.nn.longnet"
local cache = require "lacuna.nn.cache"
local generate = require "lacuna.nn.generate"

local ops, passed, transient = operators.fn, operators.passed, operators.transient
local fail, show = schema.fail, schema.show
local Block, parts = longnet.Block, longnet.LongNetLM._parts
local spec, self_attention, wanted_rows = parts.spec, parts.self_attention, parts.wanted_rows

local EVERYWHERE = 2 ^ 40 -- a segment longer than any sequence
local PADDING = { key_padding = { type = "tensor" }, key_lengths = { type = "tensor" } }

-- ---- options ----------------------------------------------------------------------------------------------

local function make_blocks(o, count, gamma, pattern, cross)
  local list = {}
  for i = 1, count do
    list[i] = Block{ width = o.width, ffn = o.ffn or 4 * o.width, dropout = o.dropout, gamma = gamma,
      attention = pattern, cross = cross, dtype = o.dtype, device = o.device }
  end
  return layers.ModuleList(list)
end

local function embedding(o, count)
  return layers.Embedding(count, o.width, { dtype = o.dtype, device = o.device })
end

local function check_tokens(op, tokens, context)
  tensor.expect(op, "tokens", tokens)
  if tokens:dim() ~= 2 or tokens:numel() == 0 then
    fail(op, "tokens must be [batch x positions], not empty, got %s", show(tokens))
  end
  if tokens:size(2) > context then
    fail(op, "%d positions exceed the context of %d", tokens:size(2), context)
  end
end

-- embedded tokens with unit variance, as the language model has them
local function embed(table_, dropout, tokens, width)
  local rows = table_(tokens)
  local scaled = rows * math.sqrt(width)
  local x = dropout(scaled)
  transient(rows, scaled)
  passed(scaled, x)
  return x
end

-- ---- encoder ----------------------------------------------------------------------------------------------

local Encoder = base.define("LongNetEncoder", nil, "options context has_vocab")

local ENCODER = spec{
  vocab = { type = "integer", min = 1 },
  gamma = { type = "number", above = 0 },
}

local function configure_encoder(options)
  local o = schema.options("LongNetEncoder", parts.sized("LongNetEncoder", options, ENCODER), ENCODER)
  parts.inner_attention("LongNetEncoder", o)
  return o
end
config.define("encoder", configure_encoder, parts.followers(ENCODER))

--- The blocks of LongNetLM without a causal mask: rows [B, N, width] for tokens or rows.
-- @tparam table options context, segments, dilations; vocab (without it the inputs are rows [B, N, width],
--   not tokens); size, layers = 12, width = 768, heads = 12, kv_heads, ffn = 4 width, variant, scheme,
--   offset, merge, dedup, window, fp8, attention, positions = "xpos", fused, dropout, attention_dropout,
--   checkpoint_activations, dtype, device as in LongNetLM; gamma = MAGNETO's gain of an encoder alone
-- @usage
--     local encoder = lac.nn.LongNetEncoder{ vocab = 256, layers = 2, width = 32, heads = 4, context = 64,
--                                            segments = { 16, 64 }, dilations = { 1, 4 } }
--     print(encoder(lac.from_string("read as a whole"):long():view(1, 15))) -- tokens [B, N] to [B, N, width]
function Encoder:init(options)
  local o = base.settled_options(self, "encoder", configure_encoder(options))
  self.options, self.context, self.has_vocab = o, o.context, o.vocab ~= nil
  if o.vocab then self.embedding = embedding(o, o.vocab) end
  self.dropout = layers.Dropout(o.dropout)
  self.layers = make_blocks(o, o.layers, o.gamma or longnet.magneto_gain(o.layers),
    self_attention(o, false))
  self.norm = layers.LayerNorm(o.width, { dtype = o.dtype, device = o.device })
end

schema.describe(Encoder.init, ENCODER)

local function check_rows(self, x)
  tensor.expect("LongNetEncoder", "the input", x)
  if x:dim() ~= 3 or x:size(3) ~= self.options.width or x:numel() == 0 then
    fail("LongNetEncoder", "without a vocabulary the input must be [batch x positions x %d], got %s",
      self.options.width, show(x))
  end
  if x:size(2) > self.context then
    fail("LongNetEncoder", "%d positions exceed the context of %d", x:size(2), self.context)
  end
end

--- @tparam Tensor input tokens [B, N] i32 or i64; rows [B, N, width] of an encoder without a vocabulary
-- @tparam[opt] table options key_padding [B, N] bool (true = keep), key_lengths [B]
-- @treturn Tensor [B, N, width], after the last LayerNorm
function Encoder:forward(input, options)
  config.expect_settled(self.options)
  local o = schema.options("LongNetEncoder", options, PADDING)
  local x
  if self.has_vocab then
    check_tokens("LongNetEncoder", input, self.context)
    x = embed(self.embedding, self.dropout, input, self.options.width)
  else
    check_rows(self, input)
    x = self.dropout(input)
  end
  return Block.stack(self.layers, x, self.norm, self.options.checkpoint_activations, o)
end

function Encoder:extra()
  local o = self.options
  local vocabulary = o.vocab and ("vocabulary %d, "):format(o.vocab) or ""
  return ("%swidth %d, context %d, %d parameters"):format(vocabulary, o.width, o.context,
    self:parameter_count())
end

-- ---- classifier -------------------------------------------------------------------------------------------

local Classifier = base.define("LongNetClassifier", nil, "pool classes")

--- An encoder, its rows pooled, and a linear layer: logits [B, classes].
-- @tparam table options those of LongNetEncoder; classes; pool = "mean" (of the rows that are not padding) |
--   "first" (a class token)
-- @usage
--     local model = lac.nn.LongNetClassifier{ classes = 3, vocab = 256, layers = 2, width = 32, heads = 4,
--                                             context = 64, segments = { 16, 64 }, dilations = { 1, 4 } }
--     local tokens, target = lac.randint{ 2, 64, high = 256 }, lac.tensor({ 0, 2 }, { dtype = "i64" })
--     print(model(tokens), model:loss(tokens, target)) -- tokens [B, N], logits [B, classes], target [B]
function Classifier:init(options)
  schema.expect_options("LongNetClassifier", options)
  local inner = {}
  for name, value in pairs(options) do inner[name] = value end
  local classes, pool = inner.classes, inner.pool or "mean"
  inner.classes, inner.pool = nil, nil
  if classes == nil then fail("LongNetClassifier", "classes is required") end
  schema.check("LongNetClassifier", "classes", classes, { type = "integer", min = 1 })
  schema.check("LongNetClassifier", "pool", pool, { one_of = { "mean", "first" } })
  self.pool, self.classes = pool, classes
  self.encoder = Encoder(inner)
  local o = self.encoder.options
  self.head = layers.Linear(o.width, classes, { dtype = o.dtype, device = o.device })
end

-- [B, N, 1]: 1 where a row counts; nil: everywhere
local function counted(x, o)
  if not o.key_padding and not o.key_lengths then return nil end
  local B, N, keep = x:size(1), x:size(2), o.key_padding
  if o.key_lengths then
    local at = create.arange{ N, dtype = o.key_lengths:dtype(), device = x:device() }:view(1, N)
    local inside = at:lt(o.key_lengths:view(B, 1))
    keep = keep and keep:logical_and(inside) or inside
  end
  return keep:to{ dtype = x:dtype() }:view(B, N, 1)
end

local function pooled(self, x, o)
  if self.pool == "first" then return x:narrow(2, 1, 1):reshape(x:size(1), x:size(3)) end
  local weight = counted(x, o)
  if not weight then return x:mean(2) end
  return (x * weight):sum(2) / weight:sum(2):clamp{ min = 1 }
end

--- @tparam Tensor input as of LongNetEncoder
-- @tparam[opt] table options key_padding, key_lengths
-- @treturn Tensor [B, classes]
function Classifier:forward(input, options)
  local o = schema.options("LongNetClassifier", options, PADDING)
  return self.head(pooled(self, self.encoder(input, o), o))
end

--- Mean cross-entropy in nats.
-- @tparam Tensor input @tparam Tensor target [B] i32 or i64
-- @tparam[opt] table options key_padding, key_lengths
-- @treturn Tensor 0-dim
function Classifier:loss(input, target, options)
  return (ops.cross_entropy(self:forward(input, options), target))
end
base.entry_point(Classifier.loss)

function Classifier:extra() return ("%d classes, %s of the rows"):format(self.classes, self.pool) end

-- ---- encoder-decoder --------------------------------------------------------------------------------------

local EncoderDecoder = base.define("LongNetEncoderDecoder", nil, "options vocab context")
local ED = "LongNetEncoderDecoder"

local BOTH = spec{
  vocab = { type = "integer", min = 1, default = 256 },
  source_vocab = { type = "integer", min = 1 },
  source_context = { type = "integer", min = 1 },
  encoder_layers = { type = "integer", min = 1 },
  tied = { type = "boolean", default = true },
  cross_segments = { type = "integers", min = 1 },
  cross_dilations = { type = "integers", min = 1 },
}

local function configure_both(options)
  local o = schema.options(ED, parts.sized(ED, options, BOTH), BOTH)
  if (o.cross_segments == nil) ~= (o.cross_dilations == nil) then
    fail(ED, "cross_segments and cross_dilations come together")
  end
  o.encoder_layers = o.encoder_layers or o.layers
  o.source_vocab, o.source_context = o.source_vocab or o.vocab, o.source_context or o.context
  parts.inner_attention(ED, o)
  return o
end
local followers = parts.followers(BOTH)
followers.encoder_layers = function(o) return o.layers end
followers.source_vocab = function(o) return o.vocab end
followers.source_context = function(o) return o.context end
config.define("encoder_decoder", configure_both, followers)

--- An encoder and a causal decoder whose blocks attend to the encoder's rows too.
-- @tparam table options those of LongNetLM (for the decoder); source_vocab = vocab, source_context =
--   context, encoder_layers = layers; cross_segments, cross_dilations (default: every row reads the whole
--   memory)
-- @usage
--     local model = lac.nn.LongNetEncoderDecoder{ vocab = 256, layers = 2, width = 32, heads = 4,
--                                                 context = 64, segments = { 16, 64 }, dilations = { 1, 4 } }
--     local source = lac.from_string("abcd"):long():view(1, 4)
--     local target = lac.from_string(" dcba"):long():view(1, 5)
--     print(model:loss(source, target:narrow(2, 1, 4), target:narrow(2, 2, 4))) -- [B, M], [B, N], [B, N]
--     print(model:given(source):generate(" ", 4))
function EncoderDecoder:init(options)
  local o = base.settled_options(self, "encoder_decoder", configure_both(options))
  self.options, self.vocab, self.context = o, o.vocab, o.context
  local inner = { vocab = o.source_vocab, context = o.source_context, layers = o.encoder_layers,
    gamma = math.sqrt(math.log(3 * o.layers) * math.log(2 * o.encoder_layers) / 3) }
  for name in pairs(spec{}) do
    if inner[name] == nil and name ~= "size" then inner[name] = o[name] end
  end
  self.encoder = Encoder(inner)
  self.embedding = embedding(o, o.vocab)
  self.dropout = layers.Dropout(o.dropout)
  local cross = { heads = o.heads, kv_heads = o.kv_heads, dropout = o.attention_dropout, layer_norm = false,
    segments = o.cross_segments or { EVERYWHERE }, dilations = o.cross_dilations or { 1 } }
  self.layers = make_blocks(o, o.layers, math.sqrt(math.log(3 * o.layers)), self_attention(o, true), cross)
  self.norm = layers.LayerNorm(o.width, { dtype = o.dtype, device = o.device })
  if not o.tied then
    self.head = layers.Linear(o.width, o.vocab, { bias = false, dtype = o.dtype, device = o.device })
  end
end

schema.describe(EncoderDecoder.init, BOTH)

local function output_weight(self) return self.options.tied and self.embedding.weight or self.head.weight end

--- The encoder's output.
-- @tparam Tensor source [B, M] tokens @tparam[opt] table options key_padding, key_lengths
-- @treturn Tensor memory [B, M, width]
function EncoderDecoder:encode(source, options) return self.encoder(source, options) end
base.entry_point(EncoderDecoder.encode)

-- rows for the output layer
local function hidden(self, source, tokens, options)
  config.expect_settled(self.options)
  base.expect_sound(self)
  local o = schema.options(ED, options, PADDING)
  check_tokens(ED, tokens, self.context)
  local memory = self.encoder(source, o)
  if memory:size(1) ~= tokens:size(1) then
    fail(ED, "source has %d batch items, tokens have %d", memory:size(1), tokens:size(1))
  end
  local x = embed(self.embedding, self.dropout, tokens, self.options.width)
  return Block.stack(self.layers, x, self.norm, self.options.checkpoint_activations, nil, memory, o)
end

--- @tparam Tensor source [B, M] @tparam Tensor tokens [B, N]
-- @tparam[opt] table options key_padding [B, M], key_lengths [B] of the source
-- @treturn Tensor logits [B, N, vocab]
function EncoderDecoder:forward(source, tokens, options)
  return (ops.linear(hidden(self, source, tokens, options), output_weight(self)))
end

--- Mean cross-entropy in nats of the targets, without making all logits at once.
-- @tparam Tensor source [B, M] @tparam Tensor tokens [B, N]
-- @tparam Tensor targets [B, N]: what follows each token; -100 is not counted
-- @tparam[opt] table options key_padding, key_lengths of the source
-- @treturn Tensor 0-dim
function EncoderDecoder:loss(source, tokens, targets, options)
  tensor.expect(ED .. ".loss", "targets", targets)
  if not tensor.same_shape(tokens, targets) then
    fail(ED .. ".loss", "tokens and targets must have the same shape: %s and %s", show(tokens), show(targets))
  end
  return (ops.linear_cross_entropy(hidden(self, source, tokens, options), output_weight(self), nil, targets))
end
base.entry_point(EncoderDecoder.loss)

function EncoderDecoder:extra()
  local o = self.options
  return ("vocabulary %d from %d, width %d, context %d from %d, %d parameters"):format(o.vocab,
    o.source_vocab, o.width, o.context, o.source_context, self:parameter_count())
end

-- ---- generation -------------------------------------------------------------------------------------------

-- The decoder's cache: rows of the decoder in a ModelCache, keys and values of the memory beside it.
local State = class("MemoryCache", nil, true)

function State:init(rows, memory) self.rows, self.memory, self.batch = rows, memory, rows.batch end
function State:positions() return self.rows:positions() end
function State:reset()
  self.rows:reset()
  return self
end

-- keeps items of the batch, in the given order
function State:select(items)
  self.rows:select(items)
  self.memory, self.batch = self.memory:select(items), #items
  return self
end

-- Keys and values of the memory, for every layer.
local Memory = class("Memory", nil, true)

function Memory:init(list, options) self.list, self.options = list, options end

local function take(t, index) return t and ops.index_select(t, 1, index) or nil end

function Memory:select(items)
  local list, first = {}, self.list[1].k
  local at = {}
  for i, b in ipairs(items) do at[i] = b - 1 end -- contents of an index count from 0
  local index = create.tensor(at, { dtype = "i64", device = first:device() })
  for i, layer in ipairs(self.list) do list[i] = { k = take(layer.k, index), v = take(layer.v, index) } end
  return Memory(list, { key_padding = take(self.options.key_padding, index),
    key_lengths = take(self.options.key_lengths, index) })
end

-- dense attention of rows x [B, n, E] to keys and values that are there already
local function attend_memory(cross, x, layer, options)
  local q = cross.q(x):view(x:size(1), x:size(2), cross.heads, cross.head_dim)
  local call = { return_lse = false, key_padding = options.key_padding, key_lengths = options.key_lengths }
  for name, setting in pairs(cross.pattern) do call[name] = setting end
  local out = attention.attend(q, layer.k, layer.v, call)
  return cross.out(out:view(x:size(1), x:size(2), cross.embed_dim))
end

--- The decoder for one source: has generate, forward, cache and decode as LongNetLM has.
local Given = class("LongNetGiven", nil, true)
schema.refuse_new_fields(Given, function() return "; make another: m:given(source)" end,
  "model vocab context memory batch")

local function memory_of(model, source, options)
  local memory, list = model.encoder(source, options), {}
  for i = 1, #model.layers do
    local cross = model.layers[i].cross
    local function heads(projection)
      return projection(memory):view(memory:size(1), memory:size(2), cross.kv_heads, cross.head_dim)
    end
    list[i] = { k = heads(cross.k), v = heads(cross.v) }
  end
  return Memory(list, options)
end

function Given:init(model, source, options)
  self.model, self.vocab, self.context, self.training = model, model.vocab, model.context, false
  self.memory = grad.no_grad(memory_of, model, source, options)
  self.batch = source:size(1)
  schema.complete(self)
end

function Given:parameters() return self.model:parameters() end
function Given:train(_) return self end -- the memory was computed in evaluation mode, and decoding is, too
function Given:eval() return self end

--- An empty cache. @tparam table options batch (must be the source's)
function Given:cache(options)
  if options.batch ~= self.batch then
    fail(ED, "there are %d prompts for %d sources", options.batch, self.batch)
  end
  local list = {}
  for i = 1, #self.model.layers do list[i] = self.model.layers[i].attention:cache{ batch = options.batch } end
  return State(cache.ModelCache(list), self.memory)
end

local function decode(self, tokens, state, o)
  local model = self.model
  local x = model.embedding(tokens) * math.sqrt(model.options.width)
  for i = 1, #model.layers do
    local block = model.layers[i]
    x = x + block.attention:decode(block.norm1(x), state.rows.layers[i], o.counts)
    x = x + attend_memory(block.cross, block.norm_cross(x), state.memory.list[i], state.memory.options)
    x = x + block.ffn(block.norm2(x))
  end
  return (ops.linear(model.norm(wanted_rows(x, o)), output_weight(model)))
end

--- Logits after tokens [B, n] that follow those in the state, as LongNetLM.decode.
function Given:decode(tokens, state, options)
  local o = schema.options(ED .. ".decode", options, parts.LOGITS)
  check_tokens(ED .. ".decode", tokens, self.context)
  local training = self.model.training
  self.model:eval()
  local ok, out = pcall(grad.no_grad, decode, self, tokens, state, o)
  self.model:train(training)
  if not ok then error(out, 0) end
  return out
end

--- Logits of whole sequences of tokens. @tparam table options counts, logits as in LongNetLM.forward
function Given:__call(tokens, options)
  return self:decode(tokens, self:cache{ batch = tokens:size(1) }, options)
end

--- Continue prompts (one for each item of the source): see generate.lua for options and results.
-- @function LongNetGiven:generate
Given.generate = generate

function Given:__tostring() return ("%s with a memory of %d items"):format(ED, self.batch) end

--- The decoder for a source: model:given(source):generate({ 0 }, 20). The encoder runs once, in evaluation
-- mode.
-- @tparam Tensor source [B, M] @tparam[opt] table options key_padding, key_lengths
-- @treturn LongNetGiven
function EncoderDecoder:given(source, options)
  config.expect_settled(self.options)
  local o = schema.options(ED .. ".given", options, PADDING)
  if self.options.cross_segments then
    fail(ED .. ".given", "rows can be decoded one by one only if each reads the whole memory; the model has "
      .. "cross_segments")
  end
  local training = self.training
  self:eval()
  local ok, made = pcall(Given, self, source, o)
  self:train(training)
  if not ok then error(made, 0) end
  return made
end
base.entry_point(EncoderDecoder.given)

return { LongNetEncoder = Encoder, LongNetClassifier = Classifier, LongNetEncoderDecoder = EncoderDecoder }
