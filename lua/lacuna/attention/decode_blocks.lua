--- Decoding with active blocks: what a BlockCache asks for the rows of one block of queries.
--
-- All rows of a block of queries have the same active blocks of keys, and these are a few runs. A run of kept
-- rows meets the new queries in tasks (shard.lua), one for each strip that has both, and the results are
-- merged (partial.lua): one softmax over everything that is active, whatever the variant inside. Each task is
-- a call of a plain decoder (decode.lua), so there is one plan for all positions and the cost of a token is
-- that of its active rows. Heads with the same blocks go together.
--
-- Refused: patterns that are drawn for a length (masks.lua, `open`), and dedup, which compares the branches
-- of a row.
--
-- "adaptive" chooses blocks for each item and head when a block of queries begins (its choice is causal). The
-- cache copies them side by side, once for all rows of that block (nn/adaptive_cache.lua), and here a row
-- meets them and the rows of its own block: two calls. That is written for "dense" inside only, since copied
-- rows have no positions: segments, windows and slopes are refused, and soft weights, which are biases.

local schema = require "lacuna.schema"
local class = require "lacuna.class"
local partial = require "lacuna.attention.partial"
local shard = require "lacuna.attention.shard"
local alibi = require "lacuna.attention.alibi"

local ffi = require("lacuna.lib").ffi
local fail = schema.fail
local floor, max, min = math.floor, math.max, math.min
local OP = "attention"
local WHOLE = 2 ^ 40 -- a segment longer than any sequence

local BlockDecoder = class("BlockDecoder", nil, true)

local core

--- @tparam Attention module block_sparse or hierarchical, causal @tparam table pattern of blocks
-- @tparam integer head_dim
function BlockDecoder:init(module, pattern, head_dim)
  local o, p = module.options, module.pattern
  if p.dedup then fail(OP, "%s cannot be decoded row by row with dedup", module.variant) end
  self.module, self.pattern, self.block, self.head_dim = module, p, o.block, head_dim
  self.group, self.alibi, self.scale = o.heads / o.kv_heads, o.alibi or false, o.scale or 0
  self.blocks = pattern:endless { heads = o.heads, block = o.block }
  self.inner = core.decoder(p, { heads = o.heads, kv_heads = o.kv_heads, head_dim = head_dim })
  self.strips = core.info_of(self.inner.plan).strips
  self.dense, self.slopes = {}, {}
  self.place, self.first = ffi.new("int64_t[?]", 1), ffi.new("int64_t[?]", 1)
end

--- The smallest position that a query at `position` or later may attend to, blocks apart.
function BlockDecoder:reach(position) return self.inner:reach(position) end

--- Will some row of blocks from i on have block j?
function BlockDecoder:later(i, j)
  for h = 1, self.blocks.heads do
    if self.blocks.later(h, i, j) then return true end
  end
  return false
end

-- ---- which rows ------------------------------------------------------------------------------------------

-- runs of active positions of head h (from 1) among the kept ones, as { first, last + 1 }
local function active_runs(self, h, i, kept)
  local runs, block = {}, self.block
  for _, run in ipairs(kept) do
    for j = floor(run.first / block), floor((run.first + run.count - 1) / block) do
      if self.blocks.active(h, i, j) then
        local last = runs[#runs]
        if last and last[2] == j * block then
          last[2] = (j + 1) * block
        else
          runs[#runs + 1] = { j * block, (j + 1) * block }
        end
      end
    end
  end
  return runs
end

local function text_of(runs)
  local parts = {}
  for r, run in ipairs(runs) do parts[r] = run[1] .. "-" .. run[2] end
  return table.concat(parts, " ")
end

-- the strips of heads [from, to)
local function strips_of(self, from, to)
  local list = {}
  for _, s in ipairs(self.strips) do
    local head0, last = max(s.head0, from), min(s.head0 + s.heads, to)
    if head0 < last then
      list[#list + 1] = { segment = s.segment, dilation = s.dilation, offset = s.offset, branch = s.branch,
                          head0 = head0, heads = last - head0 }
    end
  end
  return list
end

-- what the rows of block i attend to: a list of { runs, strips }, one for heads with the same blocks. It
-- stays in memo while rows of that block come in.
local function row_of(self, i, kept, memo)
  if memo.i == i then return memo.rows end
  local rows, heads = {}, self.module.options.heads
  local from, text, runs = 0, nil, nil
  for h = 1, self.blocks.heads do
    local own = active_runs(self, h, i, kept)
    local t = text_of(own)
    if t ~= text then
      if text then rows[#rows + 1] = { runs = runs, strips = strips_of(self, from, h - 1) } end
      from, text, runs = h - 1, t, own
    end
  end
  rows[#rows + 1] = { runs = runs, strips = strips_of(self, from, heads) }
  memo.i, memo.rows = i, rows
  return rows
end

-- the active parts of what is kept, as pieces of rows of the space
local function pieces_of(runs, kept)
  local pieces = {}
  for _, run in ipairs(runs) do
    for _, have in ipairs(kept) do
      local first, last = max(run[1], have.first), min(run[2], have.first + have.count)
      if first < last then
        pieces[#pieces + 1] = { first = first, count = last - first, step = 1,
                                at = have.at + first - have.first }
      end
    end
  end
  return pieces
end

-- ---- calls -----------------------------------------------------------------------------------------------

-- the plain decoder for so many heads; window in steps of a lattice
local function dense_of(self, heads, kv_heads, step)
  local window = self.pattern.window and floor(self.pattern.window / step)
  local key = ("%d/%d/%s"):format(heads, kv_heads, tostring(window))
  local found = self.dense[key]
  if not found then
    found = core.decoder({ segments = { WHOLE }, dilations = { 1 }, causal = true, window = window,
                           scale = self.scale ~= 0 and self.scale or nil },
                         { heads = heads, kv_heads = kv_heads, head_dim = self.head_dim })
    self.dense[key] = found
  end
  return found
end

-- slopes of some heads for positions `step` apart
local function slopes_of(self, q, first, count, step)
  if not self.alibi then return nil end
  local key = ("%d/%d/%d/%d/%d"):format(first, count, step, q.c.dtype, q.c.device)
  local found = self.slopes[key]
  if not found or found:is_released() then
    found = alibi.tensor(self.alibi, q):narrow(1, first + 1, count) * step
    self.slopes[key] = found
  end
  return found
end

-- one engine call: (out, lse) of some heads of a task
local function call(self, task, run, q, k, v)
  local part = { q = partial.heads(partial.rows(q, task.q_piece, task.q), run[1], run[2]) }
  for name, t in pairs { k = k, v = v } do
    part[name] = partial.heads(partial.rows(t, task.k_piece, task.k), run[3], run[4])
  end
  local step = task.q.step
  local at = (task.q.first - task.k.first) / step
  for b = 0, q:size(1) - 1 do self.place[b] = at end
  return dense_of(self, run[2], run[4], step):attend_raw(part.q.c, part.k.c, part.v.c, self.place, self.first,
    slopes_of(self, q, run[1], run[2], step))
end

local function all_calls(self, q, position, k, v, kept, memo)
  local list, rows = {}, q:size(2)
  local piece = { first = position, count = rows, step = 1, at = 0 }
  for _, part in ipairs(row_of(self, floor(position / self.block), kept, memo)) do
    local pieces = pieces_of(part.runs, kept)
    local tasks = shard.tasks(part.strips, { { piece } }, { pieces },
                              { causal = true, window = self.pattern.window, shift = 0 })[1][1]
    for _, task in ipairs(tasks) do
      for _, run in ipairs(partial.head_runs(task.strip, self.group)) do
        local out, lse = call(self, task, run, q, k, v)
        list[#list + 1] = { task = task, run = run, out = out, lse = lse }
      end
    end
  end
  return list
end

--- Attend with new queries, all of one block, to the active ones of the kept keys.
-- @tparam Tensor q [B, n, H, D] @tparam integer position of the first
-- @tparam Tensor k [B, R, Hk, D] @tparam Tensor v like k
-- @tparam table kept which rows of k they are: a list of { first (position), count, at (row) }, rising
-- @tparam table memo the caller's, empty at first and after rows were taken back
-- @treturn Tensor out [B, n, H, D] @treturn Tensor lse [B, n, H]
function BlockDecoder:attend(q, position, k, v, kept, memo)
  if q:size(1) > ffi.sizeof(self.place) / 8 then
    self.place, self.first = ffi.new("int64_t[?]", q:size(1)), ffi.new("int64_t[?]", q:size(1))
  end
  local list, p = all_calls(self, q, position, k, v, kept, memo), self.pattern
  local only = #list == 1 and list[1]
  if only and only.task.q.count == q:size(2) and only.run[2] == q:size(3)
    and not (p.merge == "mean" and #p.segments > 1) then
    return only.out, only.lse -- one run, one branch
  end
  local separate = partial.separate(p)
  local sum = partial.begin(q, separate and #p.segments or 1)
  for _, c in ipairs(list) do
    local slot = separate and c.task.strip.branch + 1 or 1
    local function queries(t)
      return partial.heads(partial.rows(t, c.task.q_piece, c.task.q), c.run[1], c.run[2])
    end
    partial.merge(queries(sum.out[slot]), queries(sum.lse[slot]), c.out, c.lse)
  end
  local out, lse = partial.combine(sum, p)
  return out:to(q:dtype()), lse
end

-- ---- blocks chosen by content ----------------------------------------------------------------------------

local AdaptiveDecoder = class("AdaptiveDecoder", nil, true)

--- @tparam Attention module adaptive, causal @tparam integer head_dim
function AdaptiveDecoder:init(module, head_dim)
  local o = module.options
  local refused = o.of ~= "dense" and "of = '" .. o.of .. "'" or o.window and "a window"
    or o.alibi and "alibi" or module.scorer.soft and "soft weights"
  if refused then
    fail(OP, "variant 'adaptive' cannot be decoded row by row with %s: chosen blocks are copied together",
         refused)
  end
  self.module, self.blocks, self.adaptive = module, true, true
  self.block, self.group = o.block, o.heads / o.kv_heads
  local pattern = { segments = { WHOLE }, dilations = { 1 }, causal = true, scale = o.scale }
  self.own = core.decoder(pattern, { heads = o.heads, kv_heads = o.kv_heads, head_dim = head_dim })
  self.chosen = core.decoder(pattern, { heads = o.heads, head_dim = head_dim })
end

--- Attend with rows of one block of queries to the rows of that block so far and to chosen ones before.
-- @tparam Tensor q [B, n, H, D] @tparam integer at place of its first row in the block, from 0
-- @tparam Tensor k [B, at + n, Hk, D] @tparam Tensor v like k
-- @tparam[opt] Tensor old_k [B, R, H, D] @tparam[opt] Tensor old_v
-- @treturn Tensor out @treturn Tensor lse
function AdaptiveDecoder:attend(q, at, k, v, old_k, old_v)
  local out, lse = self.own:attend(q, k, v, at)
  if not old_k then return out, lse end
  local sum = partial.begin(q, 1)
  partial.merge(sum.out[1], sum.lse[1], out, lse)
  partial.merge(sum.out[1], sum.lse[1], self.chosen:attend(q, old_k, old_v, old_k:size(2)))
  return sum.out[1]:to(q:dtype()), sum.lse[1]
end

--- @tparam table c the core of attention
-- @treturn table blocks(module, pattern of blocks, head_dim), adaptive(module, head_dim): decoders
return function(c)
  core = c
  return { blocks = BlockDecoder, adaptive = AdaptiveDecoder }
end
