--- Patterns of active blocks that are learned: nn.LearnedBlocks (a score per block) and nn.AdaptiveBlocks (a
-- scorer that looks at the blocks' contents).
--
-- Called, either gives options for lac.attend: block_mask, block and, where scores have to train, a bias.
-- Every row of blocks keeps its `keep` best scores; which those are has no gradient, so the scores reach
-- the result through weights: log softmax(scores / temperature) of the row, added to the attention scores
-- of the block. `soft` adds that number as it is, in training and after. Otherwise its value is taken away
-- again (straight-through): attention among kept blocks is what it would be without weights, and only the
-- gradient passes. While training, Gumbel noise of the temperature's size makes rows try blocks that they
-- would not have taken, else a block that is not kept could never show what it is worth. Small temperatures
-- settle the choice.
--
-- The bias has a number a token pair: learned patterns are trained at lengths where that fits, the mask that
-- they end in costs what it keeps. Batch items of an adaptive pattern never meet: each has its own mask.
--
-- A causal choice must not know what comes later. The means of a block do, for its own first rows. So a row
-- of blocks is judged by the queries of the row before it, looks at the contents of blocks that are complete
-- before it begins, and always keeps those that it stands in itself, with a score of 0. Keys that padding
-- hides do not count in a mean, blocks of nothing else are left out. The variants "adaptive" and "learned" of
-- lac.attention have their scorers from here.

local schema = require "lacuna.schema"
local create = require "lacuna.create"
local ops = require "lacuna.ops"
local attention = require "lacuna.attention"
local base = require "lacuna.nn.module"
local layers = require "lacuna.nn.layers"

local fn = ops.fn
local fail = schema.fail

local COMMON = {
  heads = { type = "integer", min = 1, default = 1 },
  block = { type = "integer", min = 16, default = 128 },
  keep = { type = "integer", min = 1, required = true },
  temperature = { type = "number", above = 0, default = 1 },
  noise = { type = "boolean", default = true },
  soft = { type = "boolean", default = false },
  causal = { type = "boolean", default = false },
  dtype = { type = "string" }, device = { type = "string" },
}

local function with(rules)
  local all = {}
  for name, rule in pairs(COMMON) do all[name] = rule end
  for name, rule in pairs(rules) do all[name] = rule end
  return all
end

-- bool [rows, columns]: which blocks causality leaves
local function allowed(rows, columns, device)
  local i, j = create.arange(0, rows, { device = device }), create.arange(0, columns, { device = device })
  return fn.le(j:view(1, columns), i:view(rows, 1))
end

-- [..., rows, columns] of blocks -> [..., n, m] of tokens
local function spread(x, block, n, m)
  local shape, wide, flat = {}, {}, {}
  local front = x:dim() - 2
  for d = 1, front do shape[d], wide[d], flat[d] = x:size(d), x:size(d), x:size(d) end
  local rows, columns = x:size(front + 1), x:size(front + 2)
  for _, s in ipairs { rows, 1, columns, 1 } do shape[#shape + 1] = s end
  for _, s in ipairs { rows, block, columns, block } do wide[#wide + 1] = s end
  for _, s in ipairs { rows * block, columns * block } do flat[#flat + 1] = s end
  return x:view(shape):expand(wide):reshape(flat):narrow(front + 1, 1, n):narrow(front + 2, 1, m)
end

-- which of `scores` each row keeps: bool like scores. open: blocks that it may have (nil: all), present:
-- those that it always has (nil: none)
local function kept(self, scores, open, present, explore)
  local judged, last = scores:detach(), scores:dim()
  if explore then
    local u = create.rand(judged:size(), { dtype = judged:dtype(), device = judged:device() })
    judged = judged - fn.log(-fn.log(u + 1e-9) + 1e-9) * self.temperature
  end
  if present then judged = judged:masked_fill(present, math.huge) end
  local _, index = fn.topk(judged, math.min(self.keep, scores:size(last)), last)
  local typed = { dtype = judged:dtype(), device = judged:device() }
  local zeros, ones = create.zeros(judged:size(), typed), create.ones(index:size(), typed)
  local on = fn.scatter(zeros, last, index, ones):gt(0)
  if present then on = fn.logical_or(on, present) end
  return open and fn.logical_and(on, open) or on
end

-- what a script may set while it trains
local SET = { keep = COMMON.keep, temperature = COMMON.temperature, noise = COMMON.noise, soft = COMMON.soft }

-- scores [..., rows, columns] -> options of lac.attend
local function choose(self, scores, n, m, open, present, training)
  for name, rule in pairs(SET) do schema.check(base.class_name(self), name, self[name], rule) end
  if present then scores = scores:masked_fill(present, 0) end
  if open then scores = scores:masked_fill(fn.logical_not(open), -math.huge) end
  local on = kept(self, scores, open, present, training and self.noise)
  local options = { block_mask = on, block = self.block }
  if self.soft or training then
    local weights = fn.log_softmax(scores * (1 / self.temperature), scores:dim())
    local finite = weights:masked_fill(fn.logical_not(on), 0) -- of blocks that are not kept nothing is read
    options.bias = spread(self.soft and finite or finite - finite:detach(), self.block, n, m)
  end
  return options
end

-- ---- a score per block ------------------------------------------------------------------------------

local LearnedBlocks = base.define("LearnedBlocks", nil, "n m block causal")

local LEARNED = with { n = { type = "integer", min = 1, required = true }, m = { type = "integer", min = 1 } }

--- A trainable score for each (head, query block, key block).
-- @tparam table options n, keep (blocks a row); m (n), heads (1), block (128), temperature (1), noise (true),
--   soft (false), causal (false), dtype, device; keep, temperature, noise and soft are fields to set as well
function LearnedBlocks:init(options)
  local o = schema.options("LearnedBlocks", options, LEARNED)
  self.n, self.m, self.block, self.keep = o.n, o.m or o.n, o.block, o.keep
  self.temperature, self.noise, self.soft, self.causal = o.temperature, o.noise, o.soft, o.causal
  local rows, columns = math.ceil(self.n / o.block), math.ceil(self.m / o.block)
  self:param("scores", create.randn({ o.heads, rows, columns },
    { std = 0.01, dtype = o.dtype, device = o.device }))
end

-- the scores [H, rows, columns] of the first blocks, and which causality leaves; o: causal, align
local function part_of(self, n, m, o)
  local rows, columns = math.ceil(n / self.block), math.ceil(m / self.block)
  local shift = o.align == "end" and m - n or 0
  local from = shift / self.block
  if from % 1 ~= 0 or from < 0 then
    fail("LearnedBlocks", "with align = 'end' keys and queries must differ by whole blocks of %d, got %d and "
      .. "%d", self.block, m, n)
  end
  if from * self.block + n > self.n or m > self.m then
    fail("LearnedBlocks", "has scores for %d x %d positions, got %d queries and %d keys%s", self.n, self.m,
      n, m, from > 0 and " at the end" or "")
  end
  local open = o.causal and allowed(self.scores:size(2), self.scores:size(3), self.scores:device())
  local function cut(t, dim) return t:narrow(dim, from + 1, rows):narrow(dim + 1, 1, columns) end
  return cut(self.scores, 2), open and cut(open, 1) or nil
end

--- Which blocks attention of q to k keeps.
-- @tparam Tensor q [B, N, H, D] @tparam Tensor k [B, M, Hk, D]
-- @tparam table o causal, align, training
-- @treturn table options of lac.attend; block_mask [H, blocks of queries, blocks of keys]
function LearnedBlocks:choose(q, k, o)
  local n, m = q:size(2), k:size(2)
  local scores, open = part_of(self, n, m, o)
  return choose(self, scores, n, m, open, nil, o.training)
end

--- What the scores keep now, as a pattern of lac.attention.masks.
-- @tparam[opt] table options n, m (the module's), causal (the module's), align
-- @treturn Pattern
function LearnedBlocks:pattern(options)
  local o = schema.options("LearnedBlocks.pattern", options, { n = { type = "integer", min = 1 },
    m = { type = "integer", min = 1 }, causal = { type = "boolean", default = self.causal },
    align = { one_of = { "start", "end" }, default = "start" } })
  local scores, open = part_of(self, o.n or self.n, o.m or o.n or self.m, o)
  local on = choose(self, scores:detach(), 1, 1, open, nil, false).block_mask
  return attention.masks.known("learned", on:totable())
end

--- @treturn table options of lac.attend
function LearnedBlocks:forward()
  local open = self.causal and allowed(self.scores:size(2), self.scores:size(3), self.scores:device()) or nil
  return choose(self, self.scores, self.n, self.m, open, nil, self.training)
end

function LearnedBlocks:extra()
  return ("%d x %d, blocks of %d, %d a row"):format(self.n, self.m, self.block, self.keep)
end

-- ---- a scorer of contents ---------------------------------------------------------------------------

local AdaptiveBlocks = base.define("AdaptiveBlocks", nil, "head_dim rank block causal")

local ADAPTIVE = with { head_dim = { type = "integer", min = 1, required = true },
  hidden = { type = "integer", min = 1, default = 32 }, rank = { type = "integer", min = 1, default = 16 } }
ADAPTIVE.heads = nil

--- Scores from the means of q and k over each block: an MLP on either side, then inner products.
-- @tparam table options head_dim, keep (blocks a row); block (128), hidden (32), rank (16), temperature (1),
--   noise (true), soft (false), causal (false), dtype, device; keep, temperature, noise and soft are fields
--   to set as well
function AdaptiveBlocks:init(options)
  local o = schema.options("AdaptiveBlocks", options, ADAPTIVE)
  self.block, self.keep, self.rank, self.head_dim = o.block, o.keep, o.rank, o.head_dim
  self.temperature, self.noise, self.soft, self.causal = o.temperature, o.noise, o.soft, o.causal
  local typed = { dtype = o.dtype, device = o.device }
  for _, side in ipairs { "query", "key" } do
    self:child(side .. "_in", layers.Linear(o.head_dim, o.hidden, typed))
    self:child(side .. "_out", layers.Linear(o.hidden, o.rank, typed))
  end
end

-- [B, N, H, D] -> [B, H, blocks, D]; keep [B, N] bool: rows that count (nil: all)
local function block_means(x, block, keep)
  local B, N, H, D = x:size(1), x:size(2), x:size(3), x:size(4)
  local rows, typed = math.ceil(N / block), { dtype = x:dtype(), device = x:device() }
  local count = keep and keep:to(x:dtype()):view(B, N, 1, 1) or create.ones({ 1, N, 1, 1 }, typed)
  if keep then x = x:masked_fill(fn.logical_not(keep):view(B, N, 1, 1), 0) end
  local missing = rows * block - N
  if missing > 0 then
    x = fn.cat({ x, create.zeros({ B, missing, H, D }, typed) }, 2)
    count = fn.cat({ count, create.zeros({ count:size(1), missing, 1, 1 }, typed) }, 2)
  end
  local counts = count:view(count:size(1), rows, block, 1, 1):sum(3):clamp(1, N)
  return (x:reshape(B, rows, block, H, D):sum(3) / counts):transpose(2, 3)
end

-- bool [B, M] of keys that are not padding, or nil
local function not_padding(o, k)
  local keep = o.key_padding
  if o.key_lengths then
    local rows = create.arange { k:size(2), dtype = "i64", device = k:device() }
    local within = fn.lt(fn.unsqueeze(rows, 1), fn.unsqueeze(o.key_lengths:to("i64"), 2))
    keep = keep and fn.logical_and(keep, within) or within
  end
  return keep
end

-- blocks that have a key: bool [B, 1, 1, columns]; all of them for an item that has none
local function not_empty(keep, block)
  local B, M = keep:size(1), keep:size(2)
  local columns = math.ceil(M / block)
  local rows = create.zeros({ B, columns * block }, { device = keep:device() })
  rows:narrow(2, 1, M):copy_(keep:to("f32"))
  local full = rows:view(B, columns, block):sum(3):gt(0)
  return fn.logical_or(full, keep:to("f32"):sum(2):eq(0):view(B, 1)):view(B, 1, 1, columns)
end

-- which blocks a causal row may have, and which it stands in: bool [rows, columns]. Row i begins at position
-- i * block + shift.
local function causal_blocks(block, n, m, shift, device)
  local rows, columns = math.ceil(n / block), math.ceil(m / block)
  local open, present = {}, {}
  for i = 0, rows - 1 do
    local first = math.floor((i * block + shift) / block)
    local last = math.floor((math.min((i + 1) * block, n) - 1 + shift) / block)
    open[i + 1], present[i + 1] = {}, {}
    for j = 0, columns - 1 do
      open[i + 1][j + 1] = j <= last
      present[i + 1][j + 1] = j >= first and j <= last
    end
  end
  local typed = { dtype = "bool", device = device }
  return create.tensor(open, typed), create.tensor(present, typed)
end

-- row i is judged by the queries of row i - 1, the first one by none
local function one_later(x)
  local B, H, rows, width = x:size(1), x:size(2), x:size(3), x:size(4)
  local none = create.zeros({ B, H, 1, width }, { dtype = x:dtype(), device = x:device() })
  return rows == 1 and none or fn.cat({ none, x:narrow(3, 1, rows - 1) }, 3)
end

--- Which blocks attention of q to k keeps.
-- @tparam Tensor q [B, N, H, D] @tparam Tensor k [B, M, Hk, D]
-- @tparam table o causal, align, training; key_padding, key_lengths as lac.attend has them
-- @treturn table options of lac.attend; block_mask [B, H, blocks of queries, blocks of keys]
function AdaptiveBlocks:choose(q, k, o)
  if q:size(4) ~= self.head_dim then
    fail("AdaptiveBlocks", "q has %d head dimensions, the scorer %d", q:size(4), self.head_dim)
  end
  local n, m = q:size(2), k:size(2)
  local keep = not_padding(o, k)
  local queries, keys = block_means(q, self.block), block_means(k, self.block, keep)
  local open, present
  if o.causal then
    queries = one_later(queries)
    open, present = causal_blocks(self.block, n, m, o.align == "end" and m - n or 0, q:device())
  end
  if keep then
    local some = not_empty(keep, self.block)
    open = open and fn.logical_and(open, some) or some
  end
  return choose(self, self:scores(queries, keys), n, m, open, present, o.training)
end

--- Scores [B, H, rows, columns] of blocks by their means.
-- @tparam Tensor queries [B, H, rows, D] @tparam Tensor keys [B, Hk, columns, D]
function AdaptiveBlocks:scores(queries, keys)
  local group = queries:size(2) / keys:size(2)
  if group > 1 then keys = fn.repeat_interleave(keys, group, 2) end
  local x = self.query_out(fn.gelu(self.query_in(queries)))
  local y = self.key_out(fn.gelu(self.key_in(keys)))
  return fn.matmul(x, y:transpose(3, 4)) * (1 / math.sqrt(self.rank))
end

--- The same with the module's own mode. @tparam Tensor q @tparam Tensor k
function AdaptiveBlocks:forward(q, k)
  return self:choose(q, k, { causal = self.causal, training = self.training })
end

function AdaptiveBlocks:extra() return ("blocks of %d, %d a row"):format(self.block, self.keep) end

attention.variants:get("adaptive").scorer = function(o)
  local own = {}
  for name in pairs(ADAPTIVE) do own[name] = o[name] end
  return AdaptiveBlocks(own)
end

attention.variants:get("learned").scorer = function(o)
  local own = { n = o.length }
  for name in pairs(COMMON) do own[name] = o[name] end
  return LearnedBlocks(own)
end

return { LearnedBlocks = LearnedBlocks, AdaptiveBlocks = AdaptiveBlocks }
