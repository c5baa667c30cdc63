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

local schema = require "lacuna.schema"
local create = require "lacuna.create"
local ops = require "lacuna.ops"
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

-- scores [..., rows, columns] -> options of lac.attend
local function choose(self, scores, n, m)
  local last, open = scores:dim(), nil
  if self.causal then
    open = allowed(scores:size(last - 1), scores:size(last), scores:device())
    scores = scores:masked_fill(fn.logical_not(open), -math.huge)
  end
  local weights = fn.log_softmax(scores * (1 / self.temperature), last)
  local judged = scores:detach()
  if self.training and self.noise then
    local u = create.rand(judged:size(), { dtype = judged:dtype(), device = judged:device() })
    judged = judged - fn.log(-fn.log(u + 1e-9) + 1e-9) * self.temperature
  end
  local keep = math.min(self.keep, scores:size(last))
  local _, index = fn.topk(judged, keep, last)
  local typed = { dtype = judged:dtype(), device = judged:device() }
  local zeros, ones = create.zeros(judged:size(), typed), create.ones(index:size(), typed)
  local on = fn.scatter(zeros, last, index, ones):gt(0)
  if open then on = fn.logical_and(on, open) end
  local options = { block_mask = on, block = self.block }
  if self.soft or self.training then
    local finite = weights:masked_fill(fn.logical_not(on), 0) -- of blocks that are not kept nothing is read
    options.bias = spread(self.soft and finite or finite - finite:detach(), self.block, n, m)
  end
  return options
end

-- ---- a score per block ------------------------------------------------------------------------------

local LearnedBlocks = base.define("LearnedBlocks")

local LEARNED = with { n = { type = "integer", min = 1, required = true }, m = { type = "integer", min = 1 } }

--- A trainable score for each (head, query block, key block).
-- @tparam table options n, keep (blocks a row); m (n), heads (1), block (128), temperature (1), noise (true),
--   soft (false), causal (false), dtype, device
function LearnedBlocks:init(options)
  local o = schema.options("LearnedBlocks", options, LEARNED)
  self.n, self.m, self.block, self.keep = o.n, o.m or o.n, o.block, o.keep
  self.temperature, self.noise, self.soft, self.causal = o.temperature, o.noise, o.soft, o.causal
  local rows, columns = math.ceil(self.n / o.block), math.ceil(self.m / o.block)
  self:param("scores", create.randn({ o.heads, rows, columns },
    { std = 0.01, dtype = o.dtype, device = o.device }))
end

--- @treturn table options of lac.attend
function LearnedBlocks:forward() return choose(self, self.scores, self.n, self.m) end

function LearnedBlocks:extra()
  return ("%d x %d, blocks of %d, %d a row"):format(self.n, self.m, self.block, self.keep)
end

-- ---- a scorer of contents ---------------------------------------------------------------------------

local AdaptiveBlocks = base.define("AdaptiveBlocks")

local ADAPTIVE = with { head_dim = { type = "integer", min = 1, required = true },
  hidden = { type = "integer", min = 1, default = 32 }, rank = { type = "integer", min = 1, default = 16 } }
ADAPTIVE.heads = nil

--- Scores from the means of q and k over each block: an MLP on either side, then inner products.
-- @tparam table options head_dim, keep (blocks a row); block (128), hidden (32), rank (16), temperature (1),
--   noise (true), soft (false), causal (false), dtype, device
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

-- [B, N, H, D] -> [B, H, blocks, D]
local function block_means(x, block)
  local B, N, H, D = x:size(1), x:size(2), x:size(3), x:size(4)
  local rows = math.ceil(N / block)
  local missing = rows * block - N
  if missing > 0 then
    x = fn.cat({ x, create.zeros({ B, missing, H, D }, { dtype = x:dtype(), device = x:device() }) }, 2)
  end
  local sum = x:reshape(B, rows, block, H, D):sum(3)
  local counts = {}
  for i = 1, rows do counts[i] = 1 / math.min(block, N - (i - 1) * block) end
  local share = create.tensor(counts, { dtype = x:dtype(), device = x:device() })
  return (sum * share:view(1, rows, 1, 1)):transpose(2, 3)
end

--- @tparam Tensor q [B, N, H, D] @tparam Tensor k [B, M, Hk, D]
-- @treturn table options of lac.attend; block_mask [B, H, blocks of queries, blocks of keys]
function AdaptiveBlocks:forward(q, k)
  if q:size(4) ~= self.head_dim then
    fail("AdaptiveBlocks", "q has %d head dimensions, the scorer %d", q:size(4), self.head_dim)
  end
  local group = q:size(3) / k:size(3)
  if group > 1 then k = fn.repeat_interleave(k, group, 3) end
  local x = self.query_out(fn.gelu(self.query_in(block_means(q, self.block))))
  local y = self.key_out(fn.gelu(self.key_in(block_means(k, self.block))))
  local scores = fn.matmul(x, y:transpose(3, 4)) * (1 / math.sqrt(self.rank))
  return choose(self, scores, q:size(2), k:size(2))
end

function AdaptiveBlocks:extra() return ("blocks of %d, %d a row"):format(self.block, self.keep) end

return { LearnedBlocks = LearnedBlocks, AdaptiveBlocks = AdaptiveBlocks }
