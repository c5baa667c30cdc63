--- nn/adaptive_cache.lua: what a BlockCache stores where blocks are chosen by content.
--
-- A block that was never chosen may be tomorrow, so every row stays, and its query too, because the queries
-- of a block choose for the next one. When a block of queries begins, its blocks are chosen by the means of
-- those that are complete, which are kept, and copied side by side for each item and head. So a token costs
-- what it attends to, `keep` blocks, and a look at the means of all blocks once a block.

local class = require "lacuna.class"
local create = require "lacuna.create"
local tensor = require "lacuna.tensor"
local scope = require "lacuna.scope"
local ops = require "lacuna.ops"

local fn = ops.fn
local floor, max, min = math.floor, math.max, math.min
local ROWS = { "q", "k", "v" }

local Store = class("AdaptiveStore")

-- room for so many rows of blocks; old: how many rows are there already
local function room(self, rows, old)
  local c, block = self.cache, self.cache.decoder.block
  local capacity = math.ceil(rows / block) * block
  for _, name in ipairs(ROWS) do
    local heads = name == "q" and c.heads * c.decoder.group or c.heads
    local new = tensor.empty(c.dtype, c.device, { self.batch, heads, capacity, c.head_dim }, 4)
    scope.keep({ new }, c.anchor)
    if old > 0 then new:narrow(3, 1, old):copy_(self[name]:narrow(3, 1, old)) end
    if self[name] then self[name]:release() end
    self[name] = new
  end
  self.capacity = capacity
end

function Store:init(cache, batch, capacity)
  self.cache, self.batch, self.position, self.lowest, self.row = cache, batch, 0, 0, -1
  room(self, capacity or cache.first_rows, 0)
end

--- Numbers of q, k and v together.
function Store:numbers() return self.q:numel() + self.k:numel() + self.v:numel() end

function Store:release()
  for _, name in ipairs(ROWS) do self[name]:release() end
end

local function append(self, new, first, count)
  if self.position + count > self.capacity then
    room(self, max(2 * self.capacity, self.position + count), self.position)
  end
  for _, name in ipairs(ROWS) do
    local rows = new[name]:narrow(2, first + 1, count):transpose(2, 3)
    self[name]:narrow(3, self.position + 1, count):copy_(rows)
  end
  self.position = self.position + count
end

-- means of complete blocks [from, to) of t [B, heads, rows, D]: [B, heads, to - from, D]
local function means(t, block, from, to)
  local B, H, D = t:size(1), t:size(2), t:size(4)
  return t:narrow(3, from * block + 1, (to - from) * block):reshape(B, H, to - from, block, D):mean(4)
end

-- which blocks before i each item and head has: index [B, H, count], from 0
local function choose(self, i, count)
  local d, had = self.cache.decoder, self.known and self.known:size(3) or 0
  if had < i then
    local new = means(self.k, d.block, had, i)
    self.known = had > 0 and fn.cat({ self.known, new }, 3) or new
    scope.keep({ self.known }, self.cache.anchor)
  end
  local known = self.known:narrow(3, 1, i)
  local scores = d.module.scorer:scores(means(self.q, d.block, i - 1, i), known)
  local _, index = fn.topk(scores, count, 4)
  return index:squeeze(3)
end

-- chosen blocks of t side by side, for each head of the queries: [B, count * block, H, D]
local function gathered(self, t, index)
  local block, Hk, D = self.cache.decoder.block, self.cache.heads, self.cache.head_dim
  local B, H, count, blocks, base = index:size(1), index:size(2), index:size(3), self.capacity / block, {}
  for b = 0, B - 1 do
    for h = 0, H - 1 do base[#base + 1] = (b * Hk + floor(h * Hk / H)) * blocks end
  end
  local place = create.tensor(base, { dtype = "i64", device = t:device() }):view(B, H, 1)
  local rows = t:view(B * Hk * blocks, block * D):index_select(1, (index + place):reshape(B * H * count))
  scope.keep({ rows }, self.cache.anchor)
  return rows:view(B, H, count * block, D):transpose(2, 3)
end

-- the rows that row i of blocks has beside its own block, copied together when it begins
local function begin_row(self, i)
  if self.row == i then return end
  self.row, self.old_k, self.old_v = i, nil, nil
  local count = min(self.cache.decoder.module.scorer.keep - 1, i)
  if count == 0 then return end
  local index = choose(self, i, count)
  self.old_k, self.old_v = gathered(self, self.k, index), gathered(self, self.v, index)
end

--- out, lse of n new rows, which are kept.
function Store:attend(q, k, v, n)
  local d, new, outs, lses, done = self.cache.decoder, { q = q, k = k, v = v }, {}, {}, 0
  if self.position == 0 and n > d.block then -- a prompt: the attention itself
    append(self, new, 0, n)
    local function rows(t) return t:narrow(2, 1, n) end
    return d.module(rows(q), rows(k), rows(v), { training = false, return_lse = true })
  end
  while done < n do
    local i = floor(self.position / d.block)
    local at = self.position - i * d.block
    local count = min(n - done, d.block - at)
    begin_row(self, i)
    append(self, new, done, count)
    local function own(t) return t:narrow(3, i * d.block + 1, at + count):transpose(2, 3) end
    outs[#outs + 1], lses[#lses + 1] = d:attend(q:narrow(2, done + 1, count), at, own(self.k), own(self.v),
      self.old_k, self.old_v)
    done = done + count
  end
  if #outs == 1 then return outs[1], lses[1] end
  return fn.cat(outs, 2), fn.cat(lses, 2)
end

--- Take rows back: all that there were are still here.
function Store:rewind(position)
  local complete = floor(position / self.cache.decoder.block)
  if self.known and self.known:size(3) > complete then
    self.known = complete > 0 and self.known:narrow(3, 1, complete) or nil
  end
  self.position, self.row = position, -1
end

--- A store of some of the items, from 1.
function Store:select(items)
  local other = Store(self.cache, #items, self.capacity)
  for to, from in ipairs(items) do
    for _, name in ipairs(ROWS) do
      local function rows(t, b) return t:narrow(1, b, 1):narrow(3, 1, self.position) end
      if self.position > 0 then rows(other[name], to):copy_(rows(self[name], from)) end
    end
  end
  other.position = self.position
  return other
end

return Store
