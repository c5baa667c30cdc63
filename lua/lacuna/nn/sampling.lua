--- nn/sampling.lua: from a row of logits to a token.
--
-- A sampler is a few numbers: temperature, top_k, top_p, min_p, repetition_penalty. They apply in this order:
-- the penalty to the logits (Keskar et al. 2019, CTRL: a seen token's logit is divided by it if positive,
-- multiplied if negative), the temperature, then each filter to what the one before has left: the k most
-- likely tokens, the smallest set of the most likely ones whose probability reaches p (nucleus, Holtzman et
-- al. 2020), and those at least min_p as likely as the most likely one. The draw is the inverse of the
-- cumulative distribution, from the most likely token down, at one uniform number that the caller brings: so
-- a row's tokens depend on its own numbers alone, whatever else is in the batch. Equal logits rank by token.
--
-- Candidates come off a binary heap one by one, as many as the filters or the draw ask for: O(V) for a row of
-- V logits instead of a sort, with no allocation. NaN is an error that names the token; -inf is a token that
-- cannot be drawn. Rejected: sampling in tensors (a handful of launches for a row that is on the host
-- anyway).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local class = require "lacuna.class"
local config = require "lacuna.config"
local tensor = require "lacuna.tensor"

local ffi = lib.ffi
local fail = schema.fail
local exp, log = math.exp, math.log

local SPEC = {
  temperature = { type = "number", min = 0, default = 1,
    check = function(v) if v == math.huge then return "must be finite" end end },
  top_k = { type = "integer", min = 1 },
  top_p = { type = "number", above = 0, max = 1 },
  min_p = { type = "number", min = 0, max = 1 },
  repetition_penalty = { type = "number", above = 0,
    check = function(v) if v == math.huge then return "must be finite" end end },
}

local Sampler = class("Sampler", nil, true)
schema.refuse_new_fields(Sampler, function() return "; options are given to nn.Sampler" end,
  "options vocab")

--- Draws the next token from logits: penalty, temperature, top_k, top_p, min_p, in this order.
-- @tparam integer vocab number of tokens
-- @tparam[opt] table options temperature = 1 (0: always the most likely token); top_k; top_p in (0, 1]; min_p
--   in [0, 1]; repetition_penalty (1 changes nothing, 1.2 is common)
function Sampler:init(vocab, options)
  schema.check("sampler", "vocab", vocab, { type = "integer", min = 1, max = 2 ^ 24 })
  local o = schema.options("sampler", options, SPEC)
  self.vocab, self.options = vocab, config.settle("sampler", "options", o,
    ("nn.Sampler(%d, { %%s, ... })"):format(vocab))
  self.work, self.heap = ffi.new("double[?]", vocab), ffi.new("int32_t[?]", vocab + 1)
  self.weights, self.tokens, self.row = {}, {}, false -- of the present draw: candidates, logits
  schema.complete(self)
end

-- is token a before token b?
local function before(z, a, b)
  local x, y = z[a], z[b]
  return x > y or (x == y and a < b)
end

-- heap[1 .. n] of tokens, the first one on top
local function sift(z, heap, n, i)
  local token = heap[i]
  while 2 * i <= n do
    local child = 2 * i
    if child < n and before(z, heap[child + 1], heap[child]) then child = child + 1 end
    if not before(z, heap[child], token) then break end
    heap[i] = heap[child]
    i = child
  end
  heap[i] = token
end

local function check_row(logits, vocab)
  local best = 0
  for i = 0, vocab - 1 do
    if logits[i] ~= logits[i] then fail("sampler", "the logit of token %d is nan", i) end
    if logits[i] > logits[best] then best = i end
  end
  if logits[best] == -math.huge then fail("sampler", "no token is possible: all logits are -inf") end
  if logits[best] == math.huge then fail("sampler", "the logit of token %d is infinite", best) end
  return best
end

local function penalise(z, seen, penalty)
  for token in pairs(seen) do
    local x = z[token]
    z[token] = x > 0 and x / penalty or x * penalty
  end
end

-- appends the next candidate off the heap of n tokens, with its weight exp((z - top) / temperature); returns
-- that
local function take(self, n, count, top)
  local z, heap = self.work, self.heap
  local token = heap[1]
  heap[1] = heap[n]
  if n > 1 then sift(z, heap, n - 1, 1) end
  local weight = exp((z[token] - top) / self.options.temperature)
  self.tokens[count], self.weights[count] = token, weight
  return weight
end

-- Takes what top_k, top_p and min_p leave; returns how many and their weight. Without top_k and top_p nothing
-- is taken yet: the total weight alone is enough, and the draw takes what it needs.
local function candidates(self, top)
  local o, vocab, z, weights = self.options, self.vocab, self.work, self.weights
  local limit, p, least = math.min(o.top_k or vocab, vocab), o.top_p or 1, o.min_p or 0
  local all = 0
  if limit == vocab then
    for i = 0, vocab - 1 do
      local weight = exp((z[i] - top) / o.temperature)
      if weight >= least or p < 1 then all = all + weight end
    end
    if p == 1 then return 0, all end
  end
  local count, sum = 0, 0
  repeat
    count = count + 1
    sum = sum + take(self, vocab - count + 1, count, top)
  until count == limit or (limit == vocab and sum >= p * all)
  if limit < vocab and p < 1 then -- the probabilities are those after top_k
    local n, part = 0, 0
    repeat
      n = n + 1
      part = part + weights[n]
    until part >= p * sum or n == count
    count, sum = n, part
  end
  while weights[count] == 0 or weights[count] < least do -- the first one has weight 1
    sum, count = sum - weights[count], count - 1
  end
  return count, sum
end

-- the candidate at u of the cumulative distribution
local function pick(self, top, u)
  local heap, vocab, least = self.heap, self.vocab, self.options.min_p or 0
  for i = 1, vocab do heap[i] = i - 1 end
  for i = math.floor(vocab / 2), 1, -1 do sift(self.work, heap, vocab, i) end
  local count, total = candidates(self, top)
  local at, last = u * total, nil
  for i = 1, count > 0 and count or vocab do
    local weight = count > 0 and self.weights[i] or take(self, vocab - i + 1, i, top)
    if weight == 0 or weight < least then break end -- the rest is out; only rounding can lead here
    at, last = at - weight, i
    if at < 0 then break end
  end
  return self.tokens[last]
end

-- double[vocab] of a row of logits; self.row keeps it alive
local function doubles(self, logits)
  if type(logits) == "cdata" then return logits end
  tensor.expect("sampler", "logits", logits)
  if tensor.numel(logits) ~= self.vocab then
    fail("sampler", "expected %d logits, got %s", self.vocab, schema.show(logits))
  end
  self.row = logits:detach():to{ dtype = "f64", device = "cpu" }:contiguous()
  return tensor.pointer(self.row)
end

--- Draw a token.
-- @tparam Tensor|cdata logits vocab of them: a tensor, or double[vocab]
-- @tparam number u uniform in [0, 1)
-- @tparam[opt] table seen set of tokens that repetition_penalty applies to: seen[token] = true
-- @treturn integer token, from 0
function Sampler:draw(logits, u, seen)
  local o, z, vocab = self.options, self.work, self.vocab
  if type(u) ~= "number" or not (u >= 0 and u < 1) then
    fail("sampler", "u must be in [0, 1), got %s", schema.show(u))
  end
  config.expect_settled(o)
  local row = doubles(self, logits)
  check_row(row, vocab)
  ffi.copy(z, row, 8 * vocab)
  if o.repetition_penalty and seen then penalise(z, seen, o.repetition_penalty) end
  local best = check_row(z, vocab)
  if o.temperature == 0 then return best end
  return pick(self, z[best], u)
end

--- log softmax(logits)[token]: the model's own log-probability, before any option of the sampler.
-- @tparam Tensor|cdata logits as for draw @tparam integer token from 0
function Sampler:log_probability(logits, token)
  schema.check("sampler", "token", token == nil and false or token, { type = "integer", min = 0,
    max = self.vocab - 1 })
  local row = doubles(self, logits)
  local top, sum = row[check_row(row, self.vocab)], 0
  for i = 0, self.vocab - 1 do sum = sum + exp(row[i] - top) end
  return row[token] - top - log(sum)
end

function Sampler:__tostring()
  local parts = {}
  for _, name in ipairs(schema.keys(SPEC)) do
    if self.options[name] ~= nil then parts[#parts + 1] = ("%s = %g"):format(name, self.options[name]) end
  end
  return ("Sampler(%d tokens, %s)"):format(self.vocab, table.concat(parts, ", "))
end

return { Sampler = Sampler, SAMPLING = SPEC }
