--- io.lua: tensors in files, in the safetensors format.
--
-- The format: 8 bytes, the little-endian length of a JSON header; the header, which maps each name to its
-- dtype, shape and byte range and "__metadata__" to a map of strings; then the data. It is what the rest of
-- the world reads, it holds raw values only (nothing in it can run), and a reader needs one pass.
--
-- A file is untrusted. Everything the header says is checked before a byte of data is read: its length
-- against the file and against 100 MB (the reference reader's limit), UTF-8, JSON, keys that occur twice
-- (which a JSON parser resolves silently), dtypes, shapes, and that the byte ranges have the size that dtype
-- and shape demand and tile the data without a hole or an overlap. Whatever is wrong is an error that names
-- file and tensor.
--
-- Reading and writing go straight between the file and a tensor's memory in pieces, so no copy of the data
-- exists beside the tensor. Saving writes a temporary file beside the target, syncs it and renames it: an
-- interrupted save leaves the old checkpoint. Integer types that the engine lacks are widened exactly
-- (I8, I16, U16 to i32; U32, U64 to i64). Rejected: mapping the file (its pages would change under the
-- tensors when the file is rewritten in place by another program).
--
-- A file saved with `checksum = true` carries the CRC-32C of all its bytes, header and length included, as
-- the first entry of its metadata; while the sum is computed its own eight digits count as zeros. So the file
-- is an ordinary safetensors file, and every flipped bit and every missing byte is found when it is read
-- here.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local json = require "lacuna.json"
local sys = require "lacuna.sys"

local ffi = lib.ffi

local HEADER_LIMIT = 100 * 1000 * 1000
local PIECE = 4 * 1024 * 1024
local MAX_DIMS = 6
local EXACT = 2 ^ 53
local SUM_KEY = "lacuna.crc32c"
local SUM_BEFORE, SUM_ZERO = ('{"__metadata__":{"%s":"'):format(SUM_KEY), ("0"):rep(8)
local SUM_AT = 8 + #SUM_BEFORE -- where the digits stand in the file, 0-based

-- safetensors name -> bytes, our dtype, and for widened types the C type in the file and in memory
local TYPES = {
  F64 = { 8, "f64" }, F32 = { 4, "f32" }, F16 = { 2, "f16" }, BF16 = { 2, "bf16" },
  I64 = { 8, "i64" }, I32 = { 4, "i32" }, U8 = { 1, "u8" }, BOOL = { 1, "bool" },
  I8 = { 1, "i32", "int8_t", "int32_t" }, I16 = { 2, "i32", "int16_t", "int32_t" },
  U16 = { 2, "i32", "uint16_t", "int32_t" }, U32 = { 4, "i64", "uint32_t", "int64_t" },
  U64 = { 8, "i64", "int64_t", "int64_t" },
}
local NAMES = { f64 = "F64", f32 = "F32", f16 = "F16", bf16 = "BF16", i64 = "I64", i32 = "I32", u8 = "U8",
  bool = "BOOL" }

local function is_count(value)
  return type(value) == "number" and value >= 0 and value % 1 == 0 and value <= EXACT
end

-- one entry of the header, checked on its own; returns {name, dtype, shape, first, last} (0-based, last
-- exclusive)
local function check_entry(name, entry, data_size, fail)
  local function bad(format, ...) fail(("tensor %q: " .. format):format(name, ...)) end
  if type(entry) ~= "table" then bad("its entry is a %s, not an object", type(entry)) end
  for key in pairs(entry) do
    if key ~= "dtype" and key ~= "shape" and key ~= "data_offsets" then bad("unknown field %q",
      tostring(key)) end
  end
  local kind = TYPES[entry.dtype]
  if not kind then bad("unsupported dtype %s", json.encode(entry.dtype)) end
  if type(entry.shape) ~= "table" then bad("shape is missing or not a list") end
  local count, dims = 1, 0
  for key in pairs(entry.shape) do
    if type(key) ~= "number" then bad("shape is an object, not a list") end
    dims = dims + 1
  end
  if dims > MAX_DIMS then bad("%d dimensions; at most %d are supported", dims, MAX_DIMS) end
  for i = 1, dims do
    local size = entry.shape[i]
    if not is_count(size) then bad("shape[%d] must be a whole number >= 0, got %s", i, json.encode(size,
      { nan = "string" })) end
    count = count * size
    if count > EXACT then bad("shape %s has too many elements", json.encode(entry.shape)) end
  end
  local range = entry.data_offsets
  if type(range) ~= "table" or #range ~= 2 or not is_count(range[1]) or not is_count(range[2]) then
    bad("data_offsets must be two whole numbers >= 0, got %s", json.encode(range, { nan = "string" }))
  end
  local first, last = range[1], range[2]
  if last < first then bad("data_offsets [%.0f, %.0f] end before they begin", first, last) end
  if last > data_size then bad("data_offsets [%.0f, %.0f] reach past the data (%.0f bytes)", first, last,
    data_size) end
  if last - first ~= count * kind[1] then
    bad("dtype %s and shape %s need %.0f bytes, data_offsets give %.0f", entry.dtype,
      json.encode(json.array(entry.shape)),
      count * kind[1], last - first)
  end
  return { name = name, dtype = entry.dtype, shape = entry.shape, count = count, first = first, last = last }
end

local function check_tiling(entries, data_size, fail)
  table.sort(entries, function(a, b)
    if a.first ~= b.first then return a.first < b.first end
    if a.last ~= b.last then return a.last < b.last end
    return a.name < b.name
  end)
  local at, previous = 0, "the header"
  for _, entry in ipairs(entries) do
    if entry.first < at then
      fail(("the data of tensors %q and %q overlap"):format(previous, entry.name))
    elseif entry.first > at then
      fail(("%.0f bytes before tensor %q belong to no tensor"):format(entry.first - at, entry.name))
    end
    at, previous = entry.last, entry.name
  end
  if at ~= data_size then
    fail(("%.0f bytes of data after the last tensor belong to no tensor"):format(data_size - at))
  end
end

local loaded = setmetatable({}, { __mode = "k" }) -- metadata that load has returned

local function check_metadata(metadata, fail)
  if metadata == nil then return {} end
  if type(metadata) ~= "table" then fail("__metadata__ is not an object") end
  for key, value in pairs(metadata) do
    if type(key) ~= "string" or type(value) ~= "string" then
      fail(("__metadata__ must map strings to strings, but %s is a %s"):format(tostring(key), type(value)))
    end
  end
  return metadata
end

-- header text -> sorted entries, metadata
local function parse_header(text, data_size, fail)
  if text:sub(1, 1) ~= "{" then fail("the header does not begin with {") end
  local wrong = json.invalid_utf8(text)
  if wrong then fail(("the header is not UTF-8 (byte %d)"):format(wrong)) end
  local header, reason = json.decode(text)
  if type(header) ~= "table" then fail("the header is not JSON: " .. tostring(reason)) end
  local twice = json.duplicate_key(text)
  if twice then fail(("the header holds the key %q twice"):format(twice)) end
  local metadata = check_metadata(header.__metadata__, fail)
  local entries, names = {}, {}
  for name in pairs(header) do
    if name ~= "__metadata__" then names[#names + 1] = name end
  end
  table.sort(names) -- so that of several wrong tensors the same one is reported every time
  for i, name in ipairs(names) do entries[i] = check_entry(name, header[name], data_size, fail) end
  check_tiling(entries, data_size, fail)
  return entries, metadata
end

-- the sum that the file claims, checked to stand where it belongs; header without its digits
local function claimed_sum(text, metadata, fail)
  local digits = metadata[SUM_KEY]
  if not digits then return nil end
  metadata[SUM_KEY] = nil
  local after = #SUM_BEFORE + #digits
  if not digits:match("^[0-9a-f]+$") or #digits ~= 8 or text:sub(1, #SUM_BEFORE) ~= SUM_BEFORE
    or text:sub(#SUM_BEFORE + 1, after) ~= digits then
    fail(("its checksum (metadata %s) is not as this program writes it: the header is damaged or was written "
      .. "again by another program (verify = false reads it as it is)"):format(SUM_KEY))
  end
  return tonumber(digits, 16), SUM_BEFORE .. SUM_ZERO .. text:sub(after + 1)
end

-- a file being read: `sum` is the running checksum (false: not wanted), `claimed` what it must become
local function new_reader(file, fail) return { file = file, fail = fail, sum = false, claimed = false } end

-- what is often taken for a safetensors file: its first bytes, and what to say where they are no size
local FOREIGN = {
  { "^PK\3\4", "a zip archive, as torch.save writes; safetensors.torch.save_file writes what is read here" },
  { "^\128[\2-\5]", "a pickle, as torch.save wrote; safetensors.torch.save_file writes what is read here" },
  { "^\147NUMPY", "an array of NumPy; safetensors.numpy.save_file writes what is read here" },
  { "^GGUF", "a GGUF file" },
}

local function refuse_length(prefix, why, fail)
  for _, kind in ipairs(FOREIGN) do
    if prefix:find(kind[1]) then fail("it is " .. kind[2]) end
  end
  fail(why)
end

local function read_header(reader, verify)
  local file, fail = reader.file, reader.fail
  local size, reason = file:seek("end")
  if not size then fail("cannot find its size: " .. tostring(reason)) end
  file:seek("set", 0)
  if size < 8 then fail(("%.0f bytes are too few for a safetensors file"):format(size)) end
  local prefix = file:read(8)
  if not prefix or #prefix < 8 then fail("cannot read its first 8 bytes") end
  local length = 0
  for i = 8, 1, -1 do length = length * 256 + prefix:byte(i) end
  if length > HEADER_LIMIT then
    refuse_length(prefix, ("it claims a header of %.0f bytes; more than %d are refused"):format(length,
      HEADER_LIMIT), fail)
  end
  if length > size - 8 then
    refuse_length(prefix, ("it claims a header of %.0f bytes, but only %.0f follow (truncated?)"):format(
      length, size - 8), fail)
  end
  local text = length > 0 and file:read(length) or ""
  if #text < length then fail("cannot read its header") end
  local entries, metadata = parse_header(text, size - 8 - length, fail)
  if verify then
    local claimed, zeroed = claimed_sum(text, metadata, fail)
    if claimed then
      reader.claimed = claimed
      reader.sum = lib.C.lac_crc32c(lib.C.lac_crc32c(0, prefix, 8), zeroed, #zeroed)
    end
  else
    metadata[SUM_KEY] = nil
  end
  return entries, metadata
end

local function read_data(reader, pointer, bytes, what)
  local at = 0
  while at < bytes do
    local piece = math.min(PIECE, bytes - at)
    local got = sys.read_into(reader.file, pointer + at, piece)
    if got ~= piece then
      reader.fail(("the data of %s ends %.0f bytes early"):format(what, bytes - at - got))
    end
    if reader.sum then reader.sum = lib.C.lac_crc32c(reader.sum, pointer + at, piece) end
    at = at + piece
  end
end

-- data that nobody wants: read for the checksum alone
local function skip_data(reader, bytes, what)
  if not reader.sum then
    reader.file:seek("cur", bytes)
    return
  end
  reader.buffer = reader.buffer or ffi.new("uint8_t[?]", PIECE)
  local at = 0
  while at < bytes do
    local piece = math.min(PIECE, bytes - at)
    read_data(reader, reader.buffer, piece, what)
    at = at + piece
  end
end

-- after the last byte: is the sum what the file claims? returns whether there was one
local function check_sum(reader)
  if not reader.claimed then return false end
  if reader.sum ~= reader.claimed then
    reader.fail(("it is damaged: its bytes have the checksum %08x, it claims %08x"):format(reader.sum,
      reader.claimed))
  end
  return true
end

-- integers of a type that the engine lacks, widened into the tensor's memory
local function widen(reader, entry, kind, pointer)
  local size, from_type = kind[1], kind[3]
  local per_piece = math.floor(PIECE / 8)
  local piece = ffi.new(from_type .. "[?]", math.min(per_piece, math.max(1, entry.count)))
  local to = ffi.cast(kind[4] .. " *", pointer)
  local at = 0
  while at < entry.count do
    local n = math.min(per_piece, entry.count - at)
    read_data(reader, ffi.cast("uint8_t *", piece), n * size, ("tensor %q"):format(entry.name))
    for i = 0, n - 1 do
      if entry.dtype == "U64" and piece[i] < 0 then
        reader.fail(("tensor %q: element %.0f does not fit a signed 64-bit integer"):format(entry.name,
          at + i))
      end
      to[at + i] = piece[i]
    end
    at = at + n
  end
end

local function check_bool(pointer, entry, fail)
  for i = 0, entry.count - 1 do
    if pointer[i] > 1 then
      fail(("tensor %q: element %.0f is %d, a bool must be 0 or 1"):format(entry.name, i, pointer[i]))
    end
  end
end

local function load_tensor(reader, entry)
  local kind = TYPES[entry.dtype]
  local t = tensor.empty(device.dtype_code[kind[2]], lib.C.LAC_CPU, entry.shape, #entry.shape)
  if entry.count == 0 then return t end
  local pointer = ffi.cast("uint8_t *", t:data())
  if kind[3] then
    widen(reader, entry, kind, pointer)
  else
    read_data(reader, pointer, entry.last - entry.first, ("tensor %q"):format(entry.name))
    if entry.dtype == "BOOL" then check_bool(pointer, entry, reader.fail) end
  end
  return t
end

-- run fn(reader, fail); close the file whatever happens
local function with_file(op, path, fn)
  if type(path) ~= "string" then schema.fail(op, "expected a path, got a %s", type(path)) end
  local file, reason = io.open(path, "rb")
  if not file then schema.fail(op, "cannot read %s", reason) end
  local function fail(message) error({ message = path .. ": " .. message }, 0) end
  local results = { pcall(fn, new_reader(file, fail), fail) }
  file:close()
  if results[1] then return unpack(results, 2) end
  local why = results[2]
  if type(why) == "table" and why.message then schema.fail(op, "%s", why.message) end
  error(why, 0)
end

local function check_names(tensors, metadata)
  if type(tensors) ~= "table" or tensor.is(tensors) then
    schema.fail("io.save", "expected a table { name = tensor, ... }, got %s", schema.show(tensors))
  end
  if getmetatable(tensors) and type(tensors.state_dict) == "function" then
    schema.fail("io.save", "expected a table { name = tensor, ... }, got %s: its state_dict() is one",
      rawget(getmetatable(tensors), "__name") or "an object")
  end
  local list = {}
  for name, t in pairs(tensors) do
    if type(name) ~= "string" then
      schema.fail("io.save", "names are strings, got the %s %s", type(name), tostring(name))
    end
    if name == "__metadata__" then schema.fail("io.save",
      "the name __metadata__ is reserved by the format") end
    if json.invalid_utf8(name) then schema.fail("io.save", "the name %q is not UTF-8", name) end
    if not tensor.is(t) then
      schema.fail("io.save", "%q is a %s, not a tensor", name, type(t))
    end
    list[#list + 1] = { name = name, tensor = t, dtype = NAMES[t:dtype()] }
  end
  for key, value in pairs(metadata) do
    if type(key) ~= "string" or type(value) ~= "string" then
      schema.fail("io.save", "metadata must map strings to strings, but %s is a %s", tostring(key),
        type(value))
    end
    if key == SUM_KEY then
      schema.fail("io.save", "the metadata key %s is reserved for the checksum", SUM_KEY)
    end
    if json.invalid_utf8(key) or json.invalid_utf8(value) then
      schema.fail("io.save", "metadata %q is not UTF-8", key)
    end
  end
  -- widest types first: every tensor then starts at a multiple of its element size
  table.sort(list, function(a, b)
    local wa, wb = TYPES[a.dtype][1], TYPES[b.dtype][1]
    if wa ~= wb then return wa > wb end
    return a.name < b.name
  end)
  return list
end

local function make_header(list, metadata, checksum)
  local parts, at = {}, 0
  if checksum then
    local rest = next(metadata) and "," .. json.encode(metadata):sub(2, -2) or ""
    parts[1] = SUM_BEFORE:sub(2) .. SUM_ZERO .. '"' .. rest .. "}"
  elseif next(metadata) then
    parts[1] = '"__metadata__":' .. json.encode(metadata)
  end
  for _, item in ipairs(list) do
    local shape, count = json.array(), 1
    for i, n in ipairs(item.tensor:size()) do
      shape[i] = n
      count = count * n
    end
    item.bytes = count * TYPES[item.dtype][1]
    parts[#parts + 1] = ('%s:{"dtype":"%s","shape":%s,"data_offsets":[%.0f,%.0f]}')
      :format(json.encode(item.name), item.dtype, json.encode(shape), at, at + item.bytes)
    at = at + item.bytes
  end
  local text = "{" .. table.concat(parts, ",") .. "}"
  text = text .. (" "):rep(-#text % 8)
  local length, prefix = #text, {}
  for i = 1, 8 do
    prefix[i] = string.char(length % 256)
    length = math.floor(length / 256)
  end
  return table.concat(prefix) .. text, #text
end

local function write_all(file, header, list, checksum)
  local sum = checksum and lib.C.lac_crc32c(0, header, #header)
  local ok, reason = file:write(header)
  if not ok then return nil, reason end
  for _, item in ipairs(list) do
    if item.bytes > 0 then
      local t = item.tensor:detach():to{ device = "cpu" }:contiguous()
      local pointer, at = ffi.cast("const uint8_t *", t:data()), 0
      while at < item.bytes do
        local piece = math.min(PIECE, item.bytes - at)
        ok, reason = sys.write_from(file, pointer + at, piece)
        if not ok then return nil, reason end
        if sum then sum = lib.C.lac_crc32c(sum, pointer + at, piece) end
        at = at + piece
      end
    end
  end
  if sum then
    ok, reason = file:seek("set", SUM_AT)
    if ok then ok, reason = file:write(("%08x"):format(sum)) end
    if not ok then return nil, reason end
  end
  return sys.sync(file)
end

local M = {}

-- is this what load returned second?
function M._is_metadata(value) return type(value) == "table" and loaded[value] == true end

local LOAD = { verify = { type = "boolean", default = true }, only = { type = "function" } }

--- Load the tensors of a safetensors file (to the CPU).
-- @tparam string path
-- @tparam[opt] table options verify = true: compare the checksum, if the file has one; only = function(name)
--   -> should this tensor be loaded? (default: all)
-- @treturn table { name = tensor, ... }
-- @treturn table metadata { string = string, ... } (empty if the file has none)
-- @treturn boolean was there a checksum? (It fitted, then.)
-- @raise one sentence that names the file and what is wrong with it
function M.load(path, options)
  local o = schema.options("io.load", options, LOAD)
  return with_file("io.load", path, function(reader)
    local entries, metadata = read_header(reader, o.verify)
    local tensors = {}
    for _, entry in ipairs(entries) do
      if not o.only or o.only(entry.name) then
        tensors[entry.name] = load_tensor(reader, entry)
      else
        skip_data(reader, entry.last - entry.first, ("tensor %q"):format(entry.name))
      end
    end
    loaded[metadata] = true
    return tensors, metadata, check_sum(reader)
  end)
end

--- Read a file through and compare its checksum, without keeping anything.
-- @tparam string path
-- @treturn boolean true; false if the file is sound as far as its header tells, but carries no checksum
-- @treturn table metadata
-- @raise one sentence that names the file and what is wrong with it
function M.verify(path)
  return with_file("io.verify", path, function(reader)
    local entries, metadata = read_header(reader, true)
    for _, entry in ipairs(entries) do
      skip_data(reader, entry.last - entry.first, ("tensor %q"):format(entry.name))
    end
    return check_sum(reader), metadata
  end)
end

--- What a safetensors file holds, without reading its data.
-- @tparam string path
-- @treturn table list of { name, dtype = "F32", shape = {...}, bytes } in file order
-- @treturn table metadata
function M.inspect(path)
  return with_file("io.inspect", path, function(reader)
    local entries, metadata = read_header(reader, false)
    local list = {}
    for i, entry in ipairs(entries) do
      list[i] = { name = entry.name, dtype = entry.dtype, shape = entry.shape,
        bytes = entry.last - entry.first }
    end
    return list, metadata
  end)
end

--- Save tensors atomically: the file at `path` is the old one or the whole new one at every moment.
-- @tparam string path
-- @tparam table tensors { name = tensor, ... }; any strides, any device; values are written exactly
-- @tparam ?table metadata { string = string, ... }
-- @tparam[opt] table options checksum = false: the file carries the CRC-32C of all its bytes
-- @treturn string path
function M.save(path, tensors, metadata, options)
  local checksum = schema.options("io.save", options,
    { checksum = { type = "boolean", default = false } }).checksum
  if type(path) ~= "string" then schema.fail("io.save", "expected a path, got a %s", type(path)) end
  if metadata ~= nil and type(metadata) ~= "table" then
    schema.fail("io.save", "metadata must be a table of strings, got a %s", type(metadata))
  end
  metadata = metadata or {}
  local list = check_names(tensors, metadata)
  local header, length = make_header(list, metadata, checksum)
  if length > HEADER_LIMIT then
    schema.fail("io.save", "the header would have %d bytes; the format allows %d", length, HEADER_LIMIT)
  end
  local temporary = sys.temporary_beside(path)
  local file, reason = io.open(temporary, "wb")
  if not file then schema.fail("io.save", "cannot write %s", reason) end
  local called, ok, why = pcall(write_all, file, header, list, checksum)
  file:close()
  if called and ok then
    ok, why = os.rename(temporary, path)
  end
  if not called or not ok then
    os.remove(temporary)
    if not called then error(ok, 0) end
    schema.fail("io.save", "cannot write %s: %s", path, tostring(why))
  end
  sys.sync_directory(sys.dirname(path))
  return path
end

return M
