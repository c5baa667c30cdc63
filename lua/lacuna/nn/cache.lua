--- nn/cache.lua: the keys and values that a decoder-only model keeps between tokens.
--
-- A KVCache belongs to one attention layer. It holds K and V as the attention reads them (after rotary
-- positions, at absolute positions) for the positions that a later query can still attend to: a row behind
-- every branch's current segment, or behind the window, is out of reach for good and is dropped. So memory
-- is O(longest segment) however long the text grows, and O(length) only where a branch spans everything. What
-- is in reach is the plan's answer (Decoder:reach); nothing about segments is known here.
--
-- Rows lie as [batch, heads, rows, head_dim]: a head's keys are neighbours in memory, so a new query streams
-- them. Space doubles when more than half of it is in reach, else the rows in reach move to the front: both
-- are paid for by the tokens since. At most four times the rows in reach are ever held. When nothing is in
-- reach (the start, the border of all segments) new queries attend to their own keys directly: a prompt of
-- any length is stored only as far as it can matter.
--
-- A token costs a few copies and one call per layer, and is handled as the engine's structs: views that are
-- made and thrown away as tensors would cost as much as the attention. Items of a batch may stand at
-- different positions (prompts of unequal length, each computed as if alone). `rewind` takes tokens back,
-- for drafts that were rejected; `keep` says how far that must always be possible. Rejected: storage per
-- lattice (three times smaller for LongNet's segments, but each branch would keep copies of shared rows, and
-- the rules of every future variant would have to be repeated here), a ring of rows (two pieces at every
-- wrap, for which the kernels would need a second address).

local schema = require "lacuna.schema"
local class = require "lacuna.class"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local scope = require "lacuna.scope"
local lib = require "lacuna.lib"

local ffi, C = lib.ffi, lib.C
local fail, show = schema.fail, schema.show
local max, min = math.max, math.min

local FIRST_ROWS = 64

-- ---- one layer --------------------------------------------------------------------------------------------

local Cache = class("KVCache", nil, true)
schema.refuse_new_fields(Cache, function() return "; make another: m:cache{ ... }" end, "decoder")

local OPTIONS = {
  decoder = { required = true, check = function(d)
    if type(d) ~= "table" or rawget(d, "plan") == nil then return "must be a lac.attention.decoder" end
  end },
  batch = { type = "integer", min = 1, default = 1 },
  heads = { type = "integer", min = 1, required = true },
  head_dim = { type = "integer", min = 1, required = true },
  keep = { type = "integer", min = 0, default = 0 },
  rows = { type = "integer", min = 1, default = FIRST_ROWS },
  dtype = { type = "string" }, device = { type = "string" },
}

local function space(self, batch, rows)
  return tensor.empty(self.dtype, self.device, { batch, self.heads, rows, self.head_dim }, 4)
end

--- Make an empty cache. attention:cache{} and model:cache{} do this with the sizes of a module.
-- @tparam table options decoder = lac.attention.decoder(...); batch = 1; heads = key/value heads; head_dim;
--   keep = 0 (positions that rewind can always go back); rows = 64 (space to begin with); dtype, device
function Cache:init(options)
  local o = schema.options("KVCache", options, OPTIONS)
  self.decoder, self.keep = o.decoder, o.keep
  self.batch, self.heads, self.head_dim = o.batch, o.heads, o.head_dim
  self.dtype, self.device = device.dtype("KVCache", o.dtype), device.code("KVCache", o.device)
  self.capacity = o.rows
  self.k, self.v = space(self, o.batch, o.rows), space(self, o.batch, o.rows)
  -- scratch: two views, and the places of the items
  self.to, self.from = tensor.ctype(), tensor.ctype()
  self.place, self.first = ffi.new("int64_t[?]", o.batch), ffi.new("int64_t[?]", o.batch)
  self:reset()
  schema.complete(self)
end

--- Forget everything. @treturn KVCache self
function Cache:reset()
  self.positions, self.starts = {}, {}
  for b = 1, self.batch do self.positions[b], self.starts[b] = 0, 0 end
  return self
end

-- first position of item b that must be kept
local function low(self, b) return self.decoder:reach(max(self.positions[b] - self.keep, 0)) end

-- are all items alike in these lists?
local function alike(first, second)
  for b = 2, #first do
    if first[b] ~= first[1] or second[b] ~= second[1] then return false end
  end
  return true
end

-- Makes `view` rows [first, first + count) (from 0) of item b (0: all) of the tensor c, which has its rows
-- on axis `rows` and its heads on axis `heads`; the view has rows on axis 2 (as stored) or 1 (as the
-- attention reads).
local function view_rows(view, c, rows, heads, b, first, count, as_stored)
  view.storage, view.dtype, view.device, view.ndim = c.storage, c.dtype, c.device, 4
  view.offset = c.offset + max(b - 1, 0) * c.stride[0] + first * c.stride[rows]
  view.shape[0], view.stride[0] = b == 0 and c.shape[0] or 1, c.stride[0]
  local row_axis, head_axis = as_stored and 2 or 1, as_stored and 1 or 2
  view.shape[row_axis], view.stride[row_axis] = count, c.stride[rows]
  view.shape[head_axis], view.stride[head_axis] = c.shape[heads], c.stride[heads]
  view.shape[3], view.stride[3] = c.shape[3], c.stride[3]
  return view
end

-- copies rows of new tensors [B, n, Hk, D] into the space
local function store(self, k, v, b, at, first, count)
  local to, from = self.to, self.from
  lib.call(C.lac_copy, view_rows(from, k.c, 1, 2, b, first, count, true),
    view_rows(to, self.k.c, 2, 1, b, at, count, true))
  lib.call(C.lac_copy, view_rows(from, v.c, 1, 2, b, first, count, true),
    view_rows(to, self.v.c, 2, 1, b, at, count, true))
end

-- rows [first, first + count) from 1 of item b (0: all) of a [B, Hk, R, D] space, as a tensor
local function rows_of(t, b, first, count)
  local part = t:narrow(3, first, count)
  return b == 0 and part or part:narrow(1, b, 1)
end

-- a list of positions for the engine
local function fill(array, list)
  for b = 1, #list do array[b - 1] = list[b] end
  return array
end

-- moves the rows in reach into space of `capacity` rows, their own or new
local function move(self, capacity, lows)
  local k, v, old_k, old_v = self.k, self.v, self.k, self.v
  if capacity ~= self.capacity then
    k, v = space(self, self.batch, capacity), space(self, self.batch, capacity)
    scope.keep({ k, v }, old_k) -- as long-lived as the cache
  end
  for b = 1, self.batch do
    local count, from = self.positions[b] - lows[b], lows[b] - self.starts[b]
    if count > 0 and not (k == old_k and from == 0) then
      rows_of(k, b, 1, count):copy_(rows_of(old_k, b, from + 1, count))
      rows_of(v, b, 1, count):copy_(rows_of(old_v, b, from + 1, count))
    end
  end
  if k ~= old_k then
    old_k:release()
    old_v:release()
  end
  self.k, self.v, self.capacity, self.starts = k, v, capacity, lows
end

-- makes room for n more rows of every item
local function make_room(self, n)
  local used = 0
  for b = 1, self.batch do used = max(used, self.positions[b] - self.starts[b]) end
  if used + n <= self.capacity then return end
  local lows, live = {}, 0
  for b = 1, self.batch do
    lows[b] = max(low(self, b), self.starts[b])
    live = max(live, self.positions[b] - lows[b])
  end
  local fits = live + n <= self.capacity and 2 * live <= self.capacity
  move(self, fits and self.capacity or max(2 * self.capacity, live + n), lows)
end

-- nothing that is stored can matter any more
local function nothing_in_reach(self)
  for b = 1, self.batch do
    if low(self, b) < self.positions[b] then return false end
  end
  return true
end

local function check_counts(self, counts, n)
  if counts == nil then return end
  if type(counts) ~= "table" or #counts ~= self.batch then
    fail("KVCache", "counts must be a list of %d numbers of new rows, got %s", self.batch, show(counts))
  end
  for b = 1, self.batch do
    if not schema.is_integer(counts[b]) or counts[b] < 0 or counts[b] > n then
      fail("KVCache", "counts[%d] must be from 0 to the %d new rows, got %s", b, n, show(counts[b]))
    end
  end
end

local function check_new(self, q, k, v)
  for _, t in ipairs{ q, k, v } do tensor.expect("KVCache", "a new row", t) end
  local shape = k.c.shape
  if k.c.ndim ~= 4 or shape[0] ~= self.batch or shape[2] ~= self.heads or shape[3] ~= self.head_dim
    or k.c.dtype ~= self.dtype or not tensor.same_shape(k, v) then
    fail("KVCache", "k and v must be %s [%d x rows x %d x %d], got %s and %s", device.dtype_name[self.dtype],
      self.batch, self.heads, self.head_dim, show(k), show(v))
  end
  if q.c.ndim ~= 4 or q.c.shape[1] ~= shape[1] then
    fail("KVCache", "q must be [batch x rows x heads x head_dim] with the rows of k, got %s and %s", show(q),
      show(k))
  end
end

--- Complaints about what attend is given.
function Cache:check(q, k, v, counts)
  check_new(self, q, k, v)
  check_counts(self, counts, tonumber(k.c.shape[1]))
end

--- Is this a cache of one layer?
function Cache.is(x)
  local mt = type(x) == "table" and getmetatable(x)
  return mt and (mt == Cache or rawget(mt, "__parent") == Cache) or false
end

local function advance(self, n, counts)
  local positions = {}
  for b = 1, self.batch do positions[b] = self.positions[b] + (counts and counts[b] or n) end
  self.positions = positions
end

-- nothing stored matters: the new queries see the new keys, and of these the last ones are stored
local function attend_directly(self, q, k, v, counts)
  local n = tonumber(k.c.shape[1])
  local before = self.positions
  local place = fill(self.place, before)
  local out, lse = self.decoder:attend_raw(q.c, k.c, v.c, place, place)
  advance(self, n, counts)
  self.starts = self.positions -- nothing is stored now
  local lows, most = {}, 0
  for b = 1, self.batch do
    lows[b] = max(low(self, b), before[b])
    most = max(most, self.positions[b] - lows[b])
  end
  if most > self.capacity then move(self, max(2 * self.capacity, most), self.positions) end
  self.starts = lows
  local whole = alike(before, self.positions)
  for b = 1, whole and 1 or self.batch do
    local count = self.positions[b] - lows[b]
    if count > 0 then store(self, k, v, whole and 0 or b, 0, lows[b] - before[b], count) end
  end
  return out, lse
end

--- Store new keys and values and attend to everything in reach with the new queries: row i of item b gets
-- what row positions[b] + i of the full causal pass gets.
-- @tparam Tensor q [B, n, H, D] @tparam Tensor k [B, n, Hk, D] @tparam Tensor v like k
-- @tparam[opt] table counts new rows of each item, at most n; rows past it are padding: not stored, and their
--   results have no meaning
-- @treturn Tensor out [B, n, H, D] @treturn Tensor lse [B, n, H]
function Cache:attend(q, k, v, counts)
  self:check(q, k, v, counts)
  local n = tonumber(k.c.shape[1])
  if nothing_in_reach(self) then return attend_directly(self, q, k, v, counts) end
  make_room(self, n)
  local rows, whole = 0, alike(self.positions, self.starts)
  for b = 1, whole and 1 or self.batch do
    local at = self.positions[b] - self.starts[b]
    store(self, k, v, whole and 0 or b, at, 0, n)
    rows = max(rows, at + n)
  end
  local out, lse = self.decoder:attend_raw(q.c, view_rows(self.to, self.k.c, 2, 1, 0, 0, rows, false),
    view_rows(self.from, self.v.c, 2, 1, 0, 0, rows, false), fill(self.place, self.positions),
    fill(self.first, self.starts))
  advance(self, n, counts)
  return out, lse
end

-- where item b of a cache of either kind is to go back to
function Cache:rewound(b, position)
  local p = position
  if type(position) == "table" then p = position[b] end
  if not schema.is_integer(p) or p < 0 or p > self.positions[b] then
    fail(getmetatable(self).__name, "rewind takes positions from 0 to the present one (%d for item %d), "
      .. "got %s", self.positions[b], b, show(p))
  end
  return p
end

--- Take tokens back: the next one will be at this position.
-- @tparam integer|table position one for all items, or a list of one for each
-- @treturn KVCache self
function Cache:rewind(position)
  local positions = {}
  for b = 1, self.batch do
    local p = self:rewound(b, position)
    local first = self.decoder:reach(p)
    if first < self.starts[b] then
      fail("KVCache", "cannot rewind item %d to position %d: it reaches back to %d, and only rows from %d on "
        .. "are kept; make the cache with keep = %d or more", b, p, first, self.starts[b],
        self.positions[b] - p)
    end
    positions[b] = p
  end
  self.positions = positions
  return self
end

--- Keep only some items of the batch, in the given order.
-- @tparam table items from 1, a list @treturn KVCache self
function Cache:select(items)
  schema.check("KVCache", "items", items, { type = "integers", min = 1, max = self.batch })
  local k, v = space(self, #items, self.capacity), space(self, #items, self.capacity)
  scope.keep({ k, v }, self.k)
  local positions, starts = {}, {}
  for i, b in ipairs(items) do
    positions[i], starts[i] = self.positions[b], self.starts[b]
    local count = positions[i] - starts[i]
    if count > 0 then
      rows_of(k, i, 1, count):copy_(rows_of(self.k, b, 1, count))
      rows_of(v, i, 1, count):copy_(rows_of(self.v, b, 1, count))
    end
  end
  self.k:release()
  self.v:release()
  self.k, self.v, self.batch, self.positions, self.starts = k, v, #items, positions, starts
  return self
end

--- Bytes of K and V together.
function Cache:bytes()
  return 2 * self.batch * self.heads * self.capacity * self.head_dim * device.dtype_size[self.dtype]
end

local function position_text(positions)
  local low_at, high_at = positions[1], positions[1]
  for b = 2, #positions do low_at, high_at = min(low_at, positions[b]), max(high_at, positions[b]) end
  return low_at == high_at and ("position %d"):format(low_at) or ("positions %d to %d"):format(low_at,
    high_at)
end

function Cache:__tostring()
  return ("%s(%d x %d heads x %d, %s, %s, %s)"):format(getmetatable(self).__name, self.batch, self.heads,
    self.head_dim, device.dtype_name[self.dtype], position_text(self.positions),
    lib.bytes_text(self:bytes()))
end

-- ---- all layers of a model --------------------------------------------------------------------------------

local Model = class("ModelCache", nil, true)
schema.refuse_new_fields(Model, function() return "; make another: m:cache{ ... }" end)

--- @tparam table layers a KVCache for each layer, of one batch size
function Model:init(layers)
  local listed = type(layers) == "table" and not tensor.is(layers)
  for i, layer in ipairs(listed and layers or {}) do
    if not Cache.is(layer) or layer.batch ~= layers[1].batch then
      fail("ModelCache", "item %d must be a KVCache of the batch size of the first, got %s", i, show(layer))
    end
  end
  if not listed or layers[1] == nil then
    fail("ModelCache", "takes a list of KVCache, one for each layer, got %s", show(layers))
  end
  self.layers, self.batch = layers, layers[1].batch
  schema.complete(self)
end

--- Position of the next token of every item, counted from 0: how many tokens it has. @treturn table
function Model:positions() return self.layers[1].positions end

for _, method in ipairs{ "reset", "rewind", "select" } do
  Model[method] = function(self, ...)
    for i = 1, #self.layers do self.layers[i][method](self.layers[i], ...) end
    self.batch = self.layers[1].batch
    return self
  end
end

--- Bytes of all layers.
function Model:bytes()
  local sum = 0
  for i = 1, #self.layers do sum = sum + self.layers[i]:bytes() end
  return sum
end

function Model:__tostring()
  return ("ModelCache(%d layers, batch %d, %s, %s)"):format(#self.layers, self.batch,
    position_text(self:positions()), lib.bytes_text(self:bytes()))
end

return { KVCache = Cache, ModelCache = Model }
