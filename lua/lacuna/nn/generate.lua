--- nn/generate.lua: continue prompts with a model that has cache and decode.
--
-- A model is anything with vocab, context, cache{batch =}, decode(tokens, state, options) and forward(tokens,
-- options), whose options are counts and logits = "last"; nothing here knows its layers. The prompts of a
-- batch may have any lengths: every item stands at its own position, nothing is padded on the left, and item
-- b draws from the Philox stream of seed + b - 1. So each continuation is the one that the prompt would get
-- alone (up to the rounding of products, whose order depends on the number of rows). Items that stop early
-- leave the batch.
--
-- The end of the context. A model is trained on windows of `context` tokens whose positions start at 0, and
-- this is what it gets: token T + 1 is computed from the window of tokens S + 1 .. T, where S is the smallest
-- multiple of `stride` with T - S <= context. While S stays, the cache grows by a token at a time; when S
-- moves, the window is computed anew, because the positions and segments of all of its tokens change. stride
-- = context / 2 (the default) makes that one pass over half a context per half a context of tokens; stride =
-- 1 always uses the last `context` tokens, and from there on costs a whole pass per token. With and without
-- cache the rule is the same, so the tokens are too. Rejected: positions beyond the trained ones (what XPOS
-- extrapolates to is a question for research, not a default) and keeping old keys in a moved window (they
-- were computed at other positions).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local scope = require "lacuna.scope"
local grad = require "lacuna.grad"
local sampling = require "lacuna.nn.sampling"

local C = lib.C
local fail, show = schema.fail, schema.show
local OP = "generate"

local SPEC = {
  seed = { type = { "integer", "integers" }, min = 0, default = 0 },
  stop = { type = "any" },
  stride = { type = "integer", min = 1 },
  cache = { type = "boolean", default = true },
  logprobs = { type = "boolean", default = false },
  on_token = { type = "function" },
}
for name, rule in pairs(sampling.SAMPLING) do SPEC[name] = rule end

-- ---- prompts and options ----------------------------------------------------------------------------------

local function tokens_of(vocab, prompt, name)
  local tokens = {}
  if type(prompt) == "string" then
    if vocab > 256 then
      fail(OP, "a model of vocabulary %d does not speak bytes: give the prompt as a list of tokens", vocab)
    end
    for i = 1, #prompt do tokens[i] = prompt:byte(i) end
  elseif type(prompt) == "table" and not tensor.is(prompt) then
    for i = 1, #prompt do tokens[i] = prompt[i] end
  else
    fail(OP, "the prompt must be a string or a list of tokens, or a list of prompts, got %s", show(prompt))
  end
  if #tokens == 0 then fail(OP, "%s must not be empty", name == "prompt" and "the prompt" or name) end
  for i, t in ipairs(tokens) do
    if not schema.is_integer(t) or t < 0 or t >= vocab then
      fail(OP, "%s[%d] must be a token from 0 to %d, got %s", name, i, vocab - 1, show(t))
    end
  end
  return tokens
end

local function is_batch(prompt)
  return type(prompt) == "table" and not tensor.is(prompt)
    and (type(prompt[1]) == "string" or type(prompt[1]) == "table")
end

-- stop: a token, a string, or a list of them; returns a list of token lists
local function stop_lists(vocab, stop)
  if stop == nil then return {} end
  local list = type(stop) == "table" and not tensor.is(stop) and stop or { stop }
  local result = {}
  for i, s in ipairs(list) do
    if type(s) == "number" then s = { s } end
    result[i] = tokens_of(vocab, s, ("stop[%d]"):format(i))
  end
  if #result == 0 then fail(OP, "stop must be a token, a string or a list of them, got %s", show(stop)) end
  return result
end

local function ends_with(tokens, first, stop)
  local shift = #tokens - #stop
  if shift + 1 < first then return false end -- no part of a stop is in the prompt
  for i = 1, #stop do
    if tokens[shift + i] ~= stop[i] then return false end
  end
  return true
end

local function uniforms(seed, n)
  local t = tensor.empty(C.LAC_F64, C.LAC_CPU, { n }, 1)
  lib.check(C.lac_random(t.c, C.LAC_UNIFORM, 0, 1, seed, 0))
  return t:totable()
end

-- one item of the batch: all its tokens, where the continuation starts, its draws, what it has seen
local function make_item(model, prompt, name, index, n, o)
  local tokens = tokens_of(model.vocab, prompt, name)
  local seed = o.seed
  if type(seed) == "table" then seed = seed[index] else seed = seed + index - 1 end
  local seen = {}
  for _, t in ipairs(tokens) do seen[t] = true end
  return { index = index, bytes = type(prompt) == "string", tokens = tokens, first = #tokens + 1, seen = seen,
    draws = n > 0 and uniforms(seed, n) or {}, logprobs = o.logprobs and {} or nil, stop = "length",
      start = 0 }
end

-- ---- tokens -----------------------------------------------------------------------------------------------

-- tokens before the window of the next token
local function window_start(count, context, stride)
  return count <= context and 0 or math.ceil((count - context) / stride) * stride
end

-- tokens from `from[b] + 1` on of every item, padded on the right with 0; and how many each has
local function batch_of(items, from, device)
  local counts, most = {}, 0
  for b, item in ipairs(items) do
    counts[b] = #item.tokens - from[b]
    most = math.max(most, counts[b])
  end
  local input = tensor.empty(C.LAC_I32, C.LAC_CPU, { #items, most }, 2)
  local pointer = tensor.pointer(input)
  for b, item in ipairs(items) do
    for i = 1, most do pointer[(b - 1) * most + i - 1] = item.tokens[from[b] + i] or 0 end
  end
  return input:to{ device = device }, counts
end

-- logits [B, 1, vocab] f64 on the host, of the token after each item's last
local function next_logits(model, items, state, o, device)
  local from, moved = {}, not state
  for b, item in ipairs(items) do
    local start = window_start(#item.tokens, model.context, o.stride)
    moved = moved or start ~= item.start or #item.tokens == item.first - 1
    item.start, from[b] = start, start
  end
  if moved and state then state:reset() end
  for b, item in ipairs(moved and {} or items) do from[b] = #item.tokens - 1 end
  local tokens, counts = batch_of(items, from, device)
  local options = { counts = #items > 1 and counts or nil, logits = "last" }
  local logits = state and model:decode(tokens, state, options) or model(tokens, options)
  return logits:to{ device = "cpu", dtype = "f64" }
end

-- takes one token for an item; true if the item has ended
local function add_token(item, sampler, logits, o, stops)
  local count = #item.tokens - item.first + 2
  local token = sampler:draw(logits, item.draws[count], item.seen)
  item.tokens[#item.tokens + 1], item.seen[token] = token, true
  if item.logprobs then item.logprobs[count] = sampler:log_probability(logits, token) end
  if o.on_token then
    local go_on = o.on_token(item.bytes and string.char(token) or token, item.index, item.logprobs
      and item.logprobs[count])
    if go_on == false then item.stop = "on_token" end
  end
  for _, stop in ipairs(stops) do
    if ends_with(item.tokens, item.first, stop) then item.stop = "stop" end
  end
  return item.stop ~= "length" or count == #item.draws
end

local function run(model, items, o, stops)
  local sampler_options = {}
  for name in pairs(sampling.SAMPLING) do sampler_options[name] = o[name] end
  local sampler = sampling.Sampler(model.vocab, sampler_options)
  local device = model:parameters()[1]:device()
  local state = o.cache and model:cache{ batch = #items } or nil
  while #items > 0 do
    local going = {}
    scope.run(function()
      local rows = tensor.pointer(next_logits(model, items, state, o, device))
      for b, item in ipairs(items) do
        if not add_token(item, sampler, rows + (b - 1) * model.vocab, o, stops) then going[#going + 1] = b end
      end
    end)
    if #going < #items then
      local left = {}
      for i, b in ipairs(going) do left[i] = items[b] end
      if #left > 0 and state then state:select(going) end
      items = left
    end
  end
end

-- ---- the method -------------------------------------------------------------------------------------------

local Info = { __tostring = function(info)
  return ("generated %d tokens, ended by %s"):format(#info.tokens, info.stop)
end }

local function result_of(item)
  local added = {}
  for i = item.first, #item.tokens do added[#added + 1] = item.tokens[i] end
  local info = setmetatable({ tokens = added, logprobs = item.logprobs, stop = item.stop }, Info)
  if not item.bytes then return added, info end
  local bytes = {}
  for i, token in ipairs(added) do bytes[i] = string.char(token) end
  return table.concat(bytes), info
end

--- Continue one prompt or several. The model is in evaluation mode meanwhile.
-- @tparam string|table|Tensor prompt bytes, or a list of tokens [N]; or a list of such prompts, of any
--   lengths ([B, N])
-- @tparam integer n tokens to add at most
-- @tparam[opt] table options temperature = 1 (0: the most likely), top_k, top_p, min_p, repetition_penalty
--   (see sampling.lua); seed = 0 (item b of a batch draws from seed + b - 1; or a list of one per item); stop
--   = a token, a string or a list of them: the continuation ends with the first that it contains; on_token =
--   function(byte or token, item, log-probability) called for every token, false ends the item; logprobs =
--   false; cache = true; stride = context / 2: by how much the window moves when the context is full
-- @treturn string|table the continuation alone, of the prompt's type (a list of them for a list of prompts;
--   lists for tensors)
-- @treturn table { tokens =, stop = "length" | "stop" | "on_token", logprobs = natural logarithms of the
--   model's own probabilities, before temperature and filters, if asked for } (a list of these for a list of
--   prompts)
return function(model, prompt, n, options)
  local o = schema.options(OP, options, SPEC)
  schema.check(OP, "n", n, { type = "integer", min = 0 })
  o.stride = o.stride or math.max(1, math.floor(model.context / 2))
  if o.stride > model.context then
    fail(OP, "stride %d must not exceed the context of %d", o.stride, model.context)
  end
  if tensor.is(prompt) and (prompt:dim() == 1 or prompt:dim() == 2) then prompt = prompt:totable() end
  local batch = is_batch(prompt)
  local prompts, items, stops = batch and prompt or { prompt }, {}, stop_lists(model.vocab, o.stop)
  if type(o.seed) == "table" and #o.seed ~= #prompts then
    fail(OP, "seed must be one number or one for each of the %d prompts, got %s", #prompts, show(o.seed))
  end
  for b, p in ipairs(prompts) do
    items[b] = make_item(model, p, batch and ("prompt[%d]"):format(b) or "prompt", b, n, o)
  end
  local training = model.training
  model:eval()
  local ok, reason = pcall(grad.no_grad, function()
    if n > 0 then run(model, items, o, stops) end
  end)
  model:train(training)
  if not ok then error(reason, 0) end
  if not batch then return result_of(items[1]) end
  local texts, infos = {}, {}
  for b, item in ipairs(items) do texts[b], infos[b] = result_of(item) end
  return texts, infos
end
