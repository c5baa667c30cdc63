--- data.lua: text as bytes, in an order that is a function of (seed, batch number).
--
-- A corpus is a memory-mapped file. A split cuts it once: the beginning trains, the end is held out and never
-- seen. A batch is B windows of context + 1 bytes; batch k is a pure function of the seed and of k, so a run
-- can be resumed from a counter, two configurations can be compared on the very same data, and nothing
-- depends on how often something was called before. There is no iterator state to save.
--
-- The order is a shuffle, not independent draws: window i of pass e is P(i), P a permutation of the windows
-- keyed by (seed, e), so that every byte of the training part is used once per pass. P is a 4-round Feistel
-- network on an even number of bits that covers the number of windows, walked until it lands inside (cycle
-- walking). A further hash moves each pass's window grid by less than one context, so window borders differ
-- between passes. Rejected: a table of shuffled indices (memory, state), math.random (differs between
-- builds).
--
-- The two baselines that a language model must be put beside are here, because they read the same bytes: an
-- order-2 byte model (Witten-Bell) and xz.

local bit = require "bit"
local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local class = require "lacuna.class"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local sys = require "lacuna.sys"

local ffi, C = lib.ffi, lib.C
local I32, CPU = C.LAC_I32, C.LAC_CPU

local band, bxor, rshift, lshift, tobit = bit.band, bit.bxor, bit.rshift, bit.lshift, bit.tobit

-- 32-bit product without losing low bits in a double
local function mul32(a, b)
  a, b = a % 4294967296, b % 4294967296
  local high = math.floor(a / 65536) * b % 65536
  return tobit((a % 65536) * b % 4294967296 + high * 65536)
end

-- one avalanche round: every output bit depends on every input bit
local function mix(x)
  x = bxor(x, rshift(x, 16))
  x = mul32(x, 0x7feb352d)
  x = bxor(x, rshift(x, 15))
  x = mul32(x, 0x846ca68b)
  return bxor(x, rshift(x, 16))
end

local function hash(seed, a, b)
  local low, high = seed % 4294967296, math.floor(seed / 4294967296)
  local h = mix(tobit(low))
  h = mix(bxor(h, tobit(high % 4294967296)))
  h = mix(bxor(h, tobit(a % 4294967296)))
  return mix(bxor(h, tobit(b % 4294967296)))
end

-- i in [0, n) -> [0, n), a bijection for every (seed, pass)
local function permute(i, n, seed, pass)
  if n <= 1 then return 0 end
  local half = 1
  while 4 ^ half < n do half = half + 1 end
  local mask = lshift(1, half) - 1
  local keys = { hash(seed, pass, 101), hash(seed, pass, 102), hash(seed, pass, 103), hash(seed, pass, 104) }
  repeat
    local left, right = math.floor(i / 2 ^ half), i % 2 ^ half
    for round = 1, 4 do
      left, right = right, bxor(left, band(mix(bxor(right, keys[round])), mask))
    end
    i = left * 2 ^ half + right
  until i < n
  return i
end

-- tokens[b][t] = byte p_b + t, targets the byte after it, for 0-based positions p_b; pointers to int32_t [B,
-- N]
local function fill(bytes, starts, context, tokens, targets)
  for b = 1, #starts do
    local from, at = bytes.pointer + starts[b], (b - 1) * context
    for t = 0, context - 1 do
      tokens[at + t] = from[t]
      targets[at + t] = from[t + 1]
    end
  end
end

local Bytes = class("Bytes", nil, true)
schema.refuse_new_fields(Bytes, function() return "; there are b:slice(first, last) and data.open(path)" end,
  "pointer size owner path")

local function expect_bytes(op, value)
  if type(value) ~= "table" or getmetatable(value) ~= Bytes then
    schema.fail(op, "expected bytes (data.open, data.string), got %s", schema.show(value))
  end
end

function Bytes:init(pointer, size, owner, path)
  self.pointer, self.size, self.owner, self.path = pointer, size, owner, path
  schema.complete(self)
end

function Bytes:__len() return self.size end

function Bytes:__tostring()
  return ("Bytes(%d from %s)"):format(self.size, self.path)
end

--- A part of the bytes, without a copy.
-- @tparam number first 1-based index of the first byte
-- @tparam number last index of the last byte, inclusive
-- @treturn Bytes
function Bytes:slice(first, last)
  if type(first) ~= "number" or type(last) ~= "number" or first < 1 or last > self.size or last < first - 1
    or first % 1 ~= 0 or last % 1 ~= 0 then
    schema.fail("data", "slice [%s, %s] is outside the %d bytes", tostring(first), tostring(last), self.size)
  end
  return Bytes(self.pointer + (first - 1), last - first + 1, self.owner, self.path)
end

--- The bytes as a Lua string (a copy).
-- @treturn string
function Bytes:text()
  return ffi.string(self.pointer, self.size)
end

--- Cut into a training part (the beginning) and a held-out part (the end).
-- @tparam table options held_out = fraction in (0, 1), or a number of bytes when >= 1
-- @treturn Bytes train
-- @treturn Bytes held-out
function Bytes:split(options)
  local share = schema.options("data.split", options, { held_out = { type = "number",
    default = 0.05 } }).held_out
  if share <= 0 then schema.fail("data.split", "held_out must be positive, got %s", tostring(share)) end
  local size = share < 1 and math.floor(self.size * share) or share
  if size % 1 ~= 0 or size < 2 or size > self.size - 2 then
    schema.fail("data.split",
      "%s held-out bytes do not leave two parts of at least 2 bytes in %d bytes of %s",
      tostring(size), self.size, self.path)
  end
  return self:slice(1, self.size - size), self:slice(self.size - size + 1, self.size)
end

--- CRC-32C of the bytes: to tell whether a text is still the same one.
-- @treturn number
function Bytes:checksum() return lib.C.lac_crc32c(0, self.pointer, self.size) end

local BATCH = {
  batch = { type = "integer", min = 1, required = true },
  context = { type = "integer", min = 1, required = true },
  seed = { type = "integer", min = 0, default = 0 },
  device = { type = "string" },
}

--- The 0-based starting bytes of the windows of batch k.
-- @tparam number k batch number, from 1
-- @tparam table options batch, context, seed
-- @treturn table list of `batch` positions p with p + context + 1 <= size
function Bytes:window_starts(k, options)
  if type(k) ~= "number" or k < 1 or k % 1 ~= 0 then
    schema.fail("data.batch", "batches are numbered from 1, got %s", schema.show(k))
  end
  local o = schema.options("data.batch", options, BATCH) -- `device` is for batch()
  local last = self.size - o.context - 1 -- the last possible start
  if last < 0 then
    schema.fail("data.batch", "context %d needs %d bytes, %s has %d", o.context, o.context + 1, self.path,
      self.size)
  end
  -- every pass leaves out a phase of less than one context at the start, so that its grid always fits
  local windows = math.max(1, math.floor(last / o.context))
  local starts = {}
  for b = 1, o.batch do
    local serial = (k - 1) * o.batch + b - 1
    local pass, index = math.floor(serial / windows), serial % windows
    local room = math.min(o.context, last - (windows - 1) * o.context + 1)
    local phase = hash(o.seed, pass, 7) % 4294967296 % room
    starts[b] = phase + permute(index, windows, o.seed, pass) * o.context
  end
  return starts
end

--- Batch k as two tensors.
-- @tparam number k batch number, from 1
-- @tparam table options batch B, context N, seed; device (the default device)
-- @treturn Tensor tokens [B, N] i32
-- @treturn Tensor targets [B, N] i32: the next byte
function Bytes:batch(k, options)
  local starts = self:window_starts(k, options)
  local name = options.device or device.default_device()
  local tokens, targets = self:tensors(starts, options.context)
  return tokens:to{ device = name }, targets:to{ device = name }
end

--- Windows at given places as two tensors.
-- @tparam table starts B 0-based positions
-- @tparam number context N
-- @treturn Tensor tokens [B, N] i32, on the CPU
-- @treturn Tensor targets [B, N] i32, on the CPU
function Bytes:tensors(starts, context)
  schema.check("data.tensors", "context", context, { type = "integer", min = 1, max = self.size - 1 })
  schema.check("data.tensors", "starts", starts, { type = "integers", min = 0,
    max = self.size - context - 1 })
  local size = { #starts, context }
  local tokens, targets = tensor.empty(I32, CPU, size, 2), tensor.empty(I32, CPU, size, 2)
  fill(self, starts, context, tensor.pointer(tokens), tensor.pointer(targets))
  return tokens, targets
end

--- Go through the bytes once, window by window, for evaluation: every byte but the first is a target exactly
-- once. With stride < context, windows overlap and only the last `stride` targets of a window count (the
-- first window counts whole): every counted byte then sees at least context - stride bytes. The others are
-- `ignore_index`.
-- @tparam table options batch, context, stride (default context), ignore_index (default -100), device (the
--   default device)
-- @treturn function iterator of tokens [B, N], targets [B, N] (i32), number of counted targets
function Bytes:windows(options)
  local o = schema.options("data.windows", options, {
    batch = { type = "integer", min = 1, required = true },
    context = { type = "integer", min = 1, required = true },
    stride = { type = "integer", min = 1 },
    ignore_index = { type = "integer", default = -100, max = -1 },
    device = { type = "string", default = device.default_device() },
  })
  local stride = o.stride or o.context
  if stride > o.context then
    schema.fail("data.windows", "stride %d exceeds context %d: bytes would be left out", stride, o.context)
  end
  if self.size < 2 then schema.fail("data.windows", "fewer than 2 bytes have no next byte") end
  local context = math.min(o.context, self.size - 1)
  local next_start, scored = 0, 0 -- scored: targets 1 .. scored (as byte positions) are done
  return function()
    if scored >= self.size - 1 then return nil end
    local starts, from = {}, {}
    while #starts < o.batch and scored < self.size - 1 do
      local start = math.min(next_start, self.size - 1 - context)
      starts[#starts + 1], from[#from + 1] = start, scored - start -- first counted column, 0-based
      scored = start + context
      next_start = start + stride
    end
    local tokens, targets = self:tensors(starts, context)
    local pointer, count = tensor.pointer(targets), 0
    for b = 1, #starts do
      for t = 0, from[b] - 1 do pointer[(b - 1) * context + t] = o.ignore_index end
      count = count + context - from[b]
    end
    return tokens:to{ device = o.device }, targets:to{ device = o.device }, count
  end
end

local Order2 = class("Order2", nil, true)
schema.refuse_new_fields(Order2, function() return "" end)

--- Counts of a byte after the two, one and zero bytes before it.
function Order2:init(bytes)
  expect_bytes("data.order2", bytes)
  if bytes.size < 3 then schema.fail("data.order2", "needs at least 3 bytes to count") end
  self.c2 = ffi.new("uint32_t[?]", 65536 * 256)
  self.c1 = ffi.new("uint32_t[?]", 256 * 256)
  self.c0 = ffi.new("uint32_t[?]", 256)
  self.n2, self.t2 = ffi.new("uint32_t[?]", 65536), ffi.new("uint32_t[?]", 65536)
  self.n1, self.t1 = ffi.new("uint32_t[?]", 256), ffi.new("uint32_t[?]", 256)
  self.n0 = bytes.size
  local p, size, c2, c1, c0 = bytes.pointer, bytes.size, self.c2, self.c1, self.c0
  for i = 0, size - 1 do c0[p[i]] = c0[p[i]] + 1 end
  for i = 1, size - 1 do
    local at = p[i - 1] * 256 + p[i]
    c1[at] = c1[at] + 1
  end
  for i = 2, size - 1 do
    local at = (p[i - 2] * 256 + p[i - 1]) * 256 + p[i]
    c2[at] = c2[at] + 1
  end
  local function totals(counts, contexts, n, types)
    for context = 0, contexts - 1 do
      local total, kinds = 0, 0
      for s = 0, 255 do
        local c = counts[context * 256 + s]
        if c > 0 then total, kinds = total + c, kinds + 1 end
      end
      n[context], types[context] = total, kinds
    end
  end
  totals(c2, 65536, self.n2, self.t2)
  totals(c1, 256, self.n1, self.t1)
  schema.complete(self)
end

local BYTE = { type = "integer", min = 0, max = 255 }

local function probability(model, a, b, s)
  local p = (model.c0[s] + 1) / (model.n0 + 256)
  if not b then return p end
  local n, t = model.n1[b], model.t1[b]
  if n > 0 then p = (model.c1[b * 256 + s] + t * p) / (n + t) end
  if not a then return p end
  local at = a * 256 + b
  n, t = model.n2[at], model.t2[at]
  if n > 0 then p = (model.c2[at * 256 + s] + t * p) / (n + t) end
  return p
end

--- Probability of byte s after bytes a, b (b is the nearer one; nil where the text starts).
-- Witten-Bell interpolation: p_k(s) = (n_k(s) + T_k p_{k-1}(s)) / (N_k + T_k), with n_k(s) how often s
-- followed this context of k bytes in training, N_k their sum and T_k the number of different bytes that did;
-- an unseen context leaves p_{k-1}. The recursion ends in p_0(s) = (n_0(s) + 1) / (N_0 + 256), so every
-- probability is positive.
-- @tparam ?number a
-- @tparam ?number b
-- @tparam number s
-- @treturn number
function Order2:probability(a, b, s)
  schema.check("order2", "s", s, BYTE)
  if b ~= nil then schema.check("order2", "b", b, BYTE) end
  if a ~= nil then schema.check("order2", "a", a, BYTE) end
  return probability(self, a, b, s)
end

--- Mean bits for each byte of a text but its first, as a language model is scored.
-- @tparam Bytes bytes
-- @treturn number bits per byte
-- @treturn number bytes counted
function Order2:bits_per_byte(bytes)
  expect_bytes("order2.bits_per_byte", bytes)
  if bytes.size < 2 then schema.fail("data.order2", "fewer than 2 bytes have no next byte") end
  local p, total = bytes.pointer, 0
  total = total - math.log(probability(self, nil, p[0], p[1]))
  for i = 2, bytes.size - 1 do total = total - math.log(probability(self, p[i - 2], p[i - 1], p[i])) end
  return total / math.log(2) / (bytes.size - 1), bytes.size - 1
end

local data = { _permute = permute, _hash = hash }

--- Map a file into memory. The file must not be made shorter by another program while it is in use.
-- @tparam string path
-- @treturn Bytes
-- @raise the file is missing, unreadable or empty
function data.open(path)
  if type(path) ~= "string" then schema.fail("data.open", "expected a path, got a %s", type(path)) end
  local size, reason = sys.file_size(path)
  if not size then schema.fail("data.open", "cannot read %s", reason) end
  if size == 0 then schema.fail("data.open", "%s is empty", path) end
  -- the struct itself is the owner, not a Tensor: a scope that is open now must not release a corpus
  local mapped, address = tensor.ctype(), ffi.new("void *[1]")
  lib.call(C.lac_map_file, path, mapped)
  ffi.gc(mapped, C.lac_tensor_drop)
  lib.check(C.lac_tensor_data(mapped, address))
  return Bytes(ffi.cast("const uint8_t *", address[0]), tonumber(mapped.shape[0]), mapped, path)
end

--- Bytes of a Lua string (tests, small texts).
-- @tparam string text
-- @treturn Bytes
function data.string(text)
  if type(text) ~= "string" then schema.fail("data.string", "expected a string, got a %s", type(text)) end
  return Bytes(ffi.cast("const uint8_t *", text), #text, text, "a string")
end

--- The order-2 byte model of a text (Witten-Bell interpolation; see Order2:probability).
-- @tparam Bytes bytes the training part
-- @treturn Order2
function data.order2(bytes)
  return Order2(bytes)
end

--- Bytes that `xz -9` makes of a text.
-- @tparam Bytes ... parts, compressed as one stream
-- @treturn number bytes
-- @raise xz is not installed (Debian package xz-utils)
function data.xz_size(...)
  for i = 1, select("#", ...) do expect_bytes("data.xz_size", (select(i, ...))) end
  if not sys.has_program("xz") then
    schema.fail("data.xz_size", "xz is not installed; install the Debian package xz-utils")
  end
  local path = sys.temporary(".bytes")
  local file, reason = io.open(path, "wb")
  if not file then schema.fail("data.xz_size", "cannot write %s", reason) end
  for _, part in ipairs{ ... } do
    local ok, why = sys.write_from(file, part.pointer, part.size)
    if not ok then
      file:close()
      os.remove(path)
      schema.fail("data.xz_size", "cannot write %s: %s", path, why)
    end
  end
  local closed, late = file:close()
  if not closed then
    os.remove(path)
    schema.fail("data.xz_size", "cannot write %s: %s", path, late)
  end
  local packed = path .. ".xz"
  local status, _, err = sys.run(("xz -9 -c -T1 <%s >%s"):format(sys.quote(path), sys.quote(packed)))
  local size = sys.file_size(packed)
  os.remove(path)
  os.remove(packed)
  if status ~= 0 or not size then schema.fail("data.xz_size", "xz failed with status %d: %s", status, err) end
  return size
end

--- The default text: the King James Bible of the Debian packages bible-kjv and bible-kjv-text (4.4 MB, public
-- domain), one verse a line ("Ge1:1 In the beginning ..."), made once and kept in the user's cache directory.
-- @treturn Bytes
-- @raise names the packages when the program `bible` is missing
function data.bible()
  local home = os.getenv("HOME")
  local cache = os.getenv("XDG_CACHE_HOME")
  if not cache or cache == "" then cache = (home and home ~= "" and home or "/tmp") .. "/.cache" end
  local dir = cache .. "/lacuna"
  local path = dir .. "/kjv.txt"
  if not sys.exists(path) then
    if not sys.has_program("bible") then
      schema.fail("data.bible",
        "the default text is not installed: apt-get install bible-kjv bible-kjv-text, or "
        .. "give a file of your own")
    end
    local ok, reason = sys.mkdir(dir)
    if not ok then
      schema.fail("data.bible", "%s; XDG_CACHE_HOME names another place for it, data.open(path) takes "
        .. "another text", reason)
    end
    local temporary = sys.temporary_beside(path)
    local status, _, err = sys.run("bible -f gen1:1-rev22:21 >" .. sys.quote(temporary))
    local size = sys.file_size(temporary) or 0
    if status ~= 0 or size < 4e6 then
      os.remove(temporary)
      if status == 0 then -- the program does not look whether its text was written
        schema.fail("data.bible", "only %d bytes of some 4,400,000 were written to %s: the disk is full, or "
          .. "the package bible-kjv-text is incomplete; XDG_CACHE_HOME names another place", size, dir)
      end
      schema.fail("data.bible", "`bible -f gen1:1-rev22:21` failed with status %d after %d bytes: %s",
        status, size, err)
    end
    assert(os.rename(temporary, path))
  end
  return data.open(path)
end

return data
