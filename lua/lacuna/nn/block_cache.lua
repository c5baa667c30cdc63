--- nn/block_cache.lua: the keys and values of attention with active blocks, between tokens.
--
-- A KVCache to everybody who uses it. But what can still be attended to is not one run of positions: global
-- tokens and a local window leave out nearly everything between them. So a store keeps runs of blocks,
-- packed one after the other in its space, and new rows behind them; when the space is full, blocks that no
-- later row of blocks will have, or that the variant inside cannot reach any more, are left behind, and the
-- space doubles when more than half of it is live. At most four times the live rows are held.
--
-- Which blocks those are, and attention to them, is the decoder's answer (attention/decode_blocks.lua). All
-- new rows of one call to it lie in one block of queries, so a prompt comes in pieces of a block, and into an
-- empty cache as one call of the attention itself. Items of a batch share a store while they stand at the
-- same position; from the first call whose items take different numbers of rows on, each has its own. Where
-- blocks are chosen by content a store is another one (adaptive_cache.lua).

local schema = require "lacuna.schema"
local class = require "lacuna.class"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local scope = require "lacuna.scope"
local device = require "lacuna.device"
local ops = require "lacuna.ops"
local KVCache = require("lacuna.nn.cache").KVCache
local AdaptiveStore = require "lacuna.nn.adaptive_cache"

local fn = ops.fn
local fail = schema.fail
local floor, max, min = math.floor, math.max, math.min

-- ---- items at one position --------------------------------------------------------------------------------

local Store = class("Store")

local function space(c, batch, rows)
  return tensor.empty(c.dtype, c.device, { batch, c.heads, rows, c.head_dim }, 4)
end

function Store:init(cache, batch, capacity)
  self.cache, self.batch, self.position, self.lowest, self.used = cache, batch, 0, 0, 0
  self.runs, self.memo = {}, {}
  self.capacity = capacity or cache.first_rows
  self.k, self.v = space(cache, batch, self.capacity), space(cache, batch, self.capacity)
  scope.keep({ self.k, self.v }, cache.anchor)
end

-- Of rows in `runs`, those that some row at `position` or later may have, as runs of the same form.
local function live_runs(c, runs, position)
  local d, live = c.decoder, {}
  local i, low = floor(position / d.block), d:reach(position)
  for _, run in ipairs(runs) do
    for j = floor(run.first / d.block), floor((run.first + run.count - 1) / d.block) do
      local first, last = max(run.first, j * d.block, low), min(run.first + run.count, (j + 1) * d.block)
      if first < last and d:later(i, j) then
        local before = live[#live]
        if before and before.first + before.count == first then
          before.count = before.count + last - first
        else
          live[#live + 1] = { first = first, count = last - first, at = run.at + first - run.first }
        end
      end
    end
  end
  return live
end

-- Takes the live ones of the rows in `runs` of k and v [B, heads, rows, head_dim] into a new space with room
-- for `more`; position: of the next row.
local function take(self, k, v, runs, position, more)
  local c = self.cache
  local lowest = max(position - c.keep, 0)
  local live, count = live_runs(c, runs, lowest), 0
  for _, run in ipairs(live) do count = count + run.count end
  local capacity = self.capacity
  if count + more > capacity or 2 * count > capacity then capacity = max(2 * capacity, count + more) end
  local new_k, new_v, at = space(c, self.batch, capacity), space(c, self.batch, capacity), 0
  scope.keep({ new_k, new_v }, c.anchor)
  for _, run in ipairs(live) do
    new_k:narrow(3, at + 1, run.count):copy_(k:narrow(3, run.at + 1, run.count))
    new_v:narrow(3, at + 1, run.count):copy_(v:narrow(3, run.at + 1, run.count))
    run.at, at = at, at + run.count
  end
  self.k:release()
  self.v:release()
  self.k, self.v, self.capacity, self.runs, self.used, self.lowest = new_k, new_v, capacity, live, at, lowest
end

-- stores rows [first, first + count) (from 0) of k and v [B, n, heads, head_dim] behind the others
local function append(self, k, v, first, count)
  if self.used + count > self.capacity then take(self, self.k, self.v, self.runs, self.position, count) end
  local function rows(t) return t:narrow(2, first + 1, count):transpose(2, 3) end
  self.k:narrow(3, self.used + 1, count):copy_(rows(k))
  self.v:narrow(3, self.used + 1, count):copy_(rows(v))
  local last = self.runs[#self.runs]
  if last and last.first + last.count == self.position then
    last.count = last.count + count
  else
    self.runs[#self.runs + 1] = { first = self.position, count = count, at = self.used }
  end
  self.position, self.used = self.position + count, self.used + count
end

-- an empty store and more than a block: the attention itself
local function prompt(self, q, k, v, n)
  local out, lse = self.cache.decoder.module(q, k, v, { training = false, return_lse = true })
  take(self, k:transpose(2, 3), v:transpose(2, 3), { { first = 0, count = n, at = 0 } }, n, 0)
  self.position = n
  return out, lse
end

--- out, lse of n new rows; those of k and v are kept.
function Store:attend(q, k, v, n)
  local d = self.cache.decoder
  if self.position == 0 and n > d.block then return prompt(self, q, k, v, n) end
  local outs, lses, at = {}, {}, 0
  while at < n do
    local position = self.position
    local count = min(n - at, (floor(position / d.block) + 1) * d.block - position)
    append(self, k, v, at, count)
    outs[#outs + 1], lses[#lses + 1] = d:attend(q:narrow(2, at + 1, count), position, self.k:transpose(2, 3),
      self.v:transpose(2, 3), self.runs, self.memo)
    at = at + count
  end
  if #outs == 1 then return outs[1], lses[1] end
  return fn.cat(outs, 2), fn.cat(lses, 2)
end

--- Take rows back; not below `lowest`.
function Store:rewind(position)
  local runs, used = {}, 0
  for _, run in ipairs(self.runs) do
    local count = min(run.count, position - run.first)
    if count > 0 then
      runs[#runs + 1] = { first = run.first, count = count, at = run.at }
      used = run.at + count
    end
  end
  self.runs, self.used, self.position, self.memo = runs, used, position, {}
end

--- A store of some of the items, from 1.
function Store:select(items)
  local other = Store(self.cache, #items, self.capacity)
  for to, from in ipairs(items) do
    for _, name in ipairs { "k", "v" } do
      local function rows(t, b) return t:narrow(1, b, 1):narrow(3, 1, self.used) end
      if self.used > 0 then rows(other[name], to):copy_(rows(self[name], from)) end
    end
  end
  for r, run in ipairs(self.runs) do
    other.runs[r] = { first = run.first, count = run.count, at = run.at }
  end
  other.used, other.position, other.lowest = self.used, self.position, self.lowest
  return other
end

--- Numbers of K and V together.
function Store:numbers() return self.k:numel() + self.v:numel() end

function Store:release()
  self.k:release()
  self.v:release()
end

-- ---- the cache --------------------------------------------------------------------------------------------

local Cache = class("BlockCache", KVCache, true)
schema.refuse_new_fields(Cache, function() return "; make another: m:cache{ ... }" end, "decoder")

local OPTIONS = {
  decoder = { required = true, check = function(d)
    if type(d) ~= "table" or rawget(d, "blocks") == nil then return "must be a decoder of active blocks" end
  end },
  batch = { type = "integer", min = 1, default = 1 },
  heads = { type = "integer", min = 1, required = true },
  head_dim = { type = "integer", min = 1, required = true },
  keep = { type = "integer", min = 0, default = 0 },
  rows = { type = "integer", min = 1, default = 64 },
  dtype = { type = "string" }, device = { type = "string" },
}

--- Make an empty cache; attention:cache{} does this. @tparam table options those of KVCache
function Cache:init(options)
  local o = schema.options("BlockCache", options, OPTIONS)
  self.decoder, self.keep, self.first_rows = o.decoder, o.keep, o.rows
  self.batch, self.heads, self.head_dim = o.batch, o.heads, o.head_dim
  self.dtype, self.device = device.dtype("BlockCache", o.dtype), device.code("BlockCache", o.device)
  self.anchor = tensor.empty(self.dtype, self.device, { 1 }, 1) -- as long-lived as the cache
  self.kind = rawget(o.decoder, "adaptive") and AdaptiveStore or Store
  self.stores = { self.kind(self, o.batch) }
  self:settle()
  schema.complete(self)
end

-- positions of the items, from their stores
function Cache:settle()
  local positions = {}
  for b = 1, self.batch do positions[b] = (self.stores[b] or self.stores[1]).position end
  self.positions = positions
  return self
end

local function replace(self, stores)
  for _, store in ipairs(self.stores) do store:release() end
  self.stores = stores
end

-- a store for each item
local function split(self)
  if #self.stores == self.batch then return end
  local stores = {}
  for b = 1, self.batch do stores[b] = self.stores[1]:select{ b } end
  replace(self, stores)
end

--- Forget everything. @treturn BlockCache self
function Cache:reset()
  replace(self, { self.kind(self, self.batch) })
  return self:settle()
end

-- do the numbers differ?
local function differ(list)
  for b = 2, #list do
    if list[b] ~= list[1] then return true end
  end
  return false
end

-- `t` [B, count, ...] with zeros for the rows up to n; nil: nothing but those. shape: of the result.
local function filled(t, shape, dtype, q)
  local count = t and t:size(2) or 0
  if count == shape[2] then return t end
  shape[2] = shape[2] - count
  local rest = create.zeros(shape, { dtype = dtype, device = q:device() })
  return t and fn.cat({ t, rest }, 2) or rest
end

--- See KVCache:attend. @treturn Tensor out @treturn Tensor lse
function Cache:attend(q, k, v, counts)
  self:check(q, k, v, counts)
  local n, H, D = q:size(2), q:size(3), q:size(4)
  if counts and differ(counts) then split(self) end
  local outs, lses, whole = {}, {}, #self.stores == 1
  for s, store in ipairs(self.stores) do
    local function own(t) return whole and t or t:narrow(1, s, 1) end
    local count, out, lse = counts and counts[s] or n, nil, nil
    if count > 0 then out, lse = store:attend(own(q):narrow(2, 1, count), own(k), own(v), count) end
    outs[s] = filled(out, { store.batch, n, H, D }, q:dtype(), q)
    lses[s] = filled(lse, { store.batch, n, H }, q:dtype() == "f64" and "f64" or "f32", q)
  end
  self:settle()
  if whole then return outs[1], lses[1] end
  return fn.cat(outs, 1), fn.cat(lses, 1)
end

--- Take tokens back: the next one will be at this position. @tparam integer|table position
-- @treturn BlockCache self
function Cache:rewind(position)
  local positions = {}
  for b = 1, self.batch do
    local p = self:rewound(b, position)
    local lowest = (self.stores[b] or self.stores[1]).lowest
    if p < lowest then
      fail("BlockCache", "cannot rewind item %d to position %d: rows were dropped that only positions from "
        .. "%d on do without; make the cache with keep = %d or more", b, p, lowest, self.positions[b] - p)
    end
    positions[b] = p
  end
  if differ(positions) then split(self) end
  for s, store in ipairs(self.stores) do store:rewind(positions[s]) end
  return self:settle()
end

--- Keep only some items of the batch, in the given order. @tparam table items from 1
-- @treturn BlockCache self
function Cache:select(items)
  schema.check("BlockCache", "items", items, { type = "integers", min = 1, max = self.batch })
  local stores = {}
  if #self.stores == 1 then
    stores[1] = self.stores[1]:select(items)
  else
    for s, b in ipairs(items) do stores[s] = self.stores[b]:select{ 1 } end
  end
  replace(self, stores)
  self.batch = #items
  return self:settle()
end

--- Bytes of all that is kept.
function Cache:bytes()
  local numbers = 0
  for _, store in ipairs(self.stores) do numbers = numbers + store:numbers() end
  return numbers * device.dtype_size[self.dtype]
end

Cache.__tostring = KVCache.__tostring

return { BlockCache = Cache }
