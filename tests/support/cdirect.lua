--- Drives the engine's C interface directly, without the Lua library.
--
-- The engine's spec must not lean on lua/lacuna (which has its own specs): a defect there could hide one
-- here. So this file declares the header that the library carries, and offers just enough to write tensors
-- and read them back: values travel through plain C arrays of the dtype, half precision is encoded and
-- decoded here by arithmetic that shares nothing with the bit tricks of the engine, and a failing call raises
-- the message of the engine.
-- Tensors are the C structs themselves, with a finalizer; views are copies that keep their owner in a table.
-- Shapes and indices are 0-based as in C. Values are flat Lua arrays (1-based) in row-major order.

local ffi = require "ffi"
local bit = require "bit"

local M = { ffi = ffi }
local path = os.getenv("LACUNA_LIBRARY") or "build/lib/liblacuna.so"
if not path:find("/", 1, true) then path = "./" .. path end
local C = ffi.load(path)
if not pcall(ffi.typeof, "struct lac_tensor") then
  if not pcall(function() return ffi.C.lac_cdef end) then pcall(ffi.cdef, "const char *lac_cdef(void);") end
  ffi.cdef(ffi.string(C.lac_cdef()))
end
M.C = C

M.dtypes = { f64 = 0, f32 = 1, f16 = 2, bf16 = 3, i64 = 4, i32 = 5, u8 = 6, bool = 7 }
M.names = { [0] = "f64", "f32", "f16", "bf16", "i64", "i32", "u8", "bool" }
local ctypes = { [0] = "double", "float", "uint16_t", "uint16_t", "int64_t", "int32_t", "uint8_t", "uint8_t" }
local bytes = { [0] = 8, 4, 2, 2, 8, 4, 1, 1 }
local precision = { f64 = { 53, -1074 }, f32 = { 24, -149 }, f16 = { 11, -24 }, bf16 = { 8, -133 } }
local largest = { f32 = 3.4028234663852886e38, f16 = 65504, bf16 = 3.3895313892515355e38 }
local owners = setmetatable({}, { __mode = "k" })
local tensor_type = ffi.typeof("lac_tensor")

--- x rounded to the dtype (nearest, ties to even), as a Lua number; the reference for every rounding.
function M.round(dtype, x)
  local p = precision[dtype]
  if not p or dtype == "f64" or x ~= x or x == 0 or x == math.huge or x == -math.huge then return x end
  local _, e = math.frexp(x)
  local unit = 2 ^ math.max(e - p[1], p[2])
  local q = x / unit
  local r = math.floor(q)
  local d = q - r
  if d > 0.5 or (d == 0.5 and r % 2 == 1) then r = r + 1 end
  local y = r * unit
  if math.abs(y) > largest[dtype] then return y > 0 and math.huge or -math.huge end
  return y
end

local function encode_half(x, mantissa, bias)
  local exponents = 2 ^ (15 - mantissa)
  local sign = (x < 0 or 1 / x < 0) and 0x8000 or 0
  if x ~= x then return (exponents - 1) * 2 ^ mantissa + 2 ^ (mantissa - 1) end
  x = math.abs(x)
  if x == math.huge then return sign + (exponents - 1) * 2 ^ mantissa end
  if x == 0 then return sign end
  local f, e = math.frexp(x) -- x = f 2^e, 0.5 <= f < 1
  e = e - 1 + bias
  if e <= 0 then return sign + x * 2 ^ (bias - 1 + mantissa) end
  return sign + e * 2 ^ mantissa + (2 * f - 1) * 2 ^ mantissa
end

local function decode_half(h, mantissa, bias)
  local sign = h >= 0x8000 and -1 or 1
  h = h % 0x8000
  local e, m = math.floor(h / 2 ^ mantissa), h % 2 ^ mantissa
  if e == 2 ^ (15 - mantissa) - 1 then return m == 0 and sign * math.huge or 0 / 0 end
  if e == 0 then return sign * m * 2 ^ (1 - bias - mantissa) end
  return sign * (1 + m / 2 ^ mantissa) * 2 ^ (e - bias)
end

local function encode(dtype, x)
  if dtype == 2 then return encode_half(M.round("f16", x), 10, 15) end
  if dtype == 3 then return encode_half(M.round("bf16", x), 7, 127) end
  if dtype == 7 then return (x == true or x == 1) and 1 or 0 end
  return x
end

-- A NaN's bits must not become a Lua number: LuaJIT tags its values in NaN payloads, a foreign one crashes.
local function is_nan(dtype, words, at)
  if dtype == 1 then return bit.band(words[at], 0x7fffffff) > 0x7f800000 end
  local high = bit.band(words[2 * at + 1], 0x7fffffff)
  return high > 0x7ff00000 or (high == 0x7ff00000 and words[2 * at] ~= 0)
end

local function decode(dtype, m, at, words)
  if dtype <= 1 and is_nan(dtype, words, at) then return 0 / 0 end
  if dtype == 2 then return decode_half(m[at], 10, 15) end
  if dtype == 3 then return decode_half(m[at], 7, 127) end
  return tonumber(m[at])
end

--- The message of the last failure.
function M.last_error() return ffi.string(C.lac_last_error()) end

--- Call C.lac_<name>(...); a failure raises "<status>: <message>".
function M.call(name, ...)
  local status = C["lac_" .. name](...)
  if status ~= 0 then error(ffi.string(C.lac_status_name(status)) .. ": " .. M.last_error(), 2) end
end

--- A struct to be filled by a call; the finalizer drops what the call puts there.
function M.out() return ffi.gc(tensor_type(), C.lac_tensor_drop) end

--- Call an operator whose last argument is its only output, and return that.
function M.op(name, ...)
  local n = select("#", ...)
  local args = { ... }
  local result = M.out()
  args[n + 1] = result
  M.call(name, unpack(args, 1, n + 1))
  return result
end

--- An uninitialised tensor. shape is a Lua array.
function M.empty(dtype, shape)
  local t = M.out()
  t.dtype, t.device, t.ndim = M.dtypes[dtype], C.LAC_CPU, #shape
  for i, n in ipairs(shape) do t.shape[i - 1] = n end
  M.call("empty", t)
  return t
end

function M.numel(t)
  local n = 1
  for i = 0, t.ndim - 1 do n = n * tonumber(t.shape[i]) end
  return n
end

function M.shape(t)
  local s = {}
  for i = 0, t.ndim - 1 do s[i + 1] = tonumber(t.shape[i]) end
  return s
end

-- the storage as an array of the dtype; t must be made by this file or by the engine
local function memory(t)
  local base = ffi.new("lac_tensor", t)
  local p = ffi.new("void *[1]")
  M.call("tensor_data", base, p)
  return ffi.cast(ctypes[t.dtype] .. " *", p[0])
end

-- calls f(offset in elements) for every element in row-major order
local function each(t, f)
  local nd = t.ndim
  if M.numel(t) == 0 then return end
  local index, at = {}, 0
  for i = 0, nd - 1 do index[i] = 0 end
  while true do
    f(at)
    local d = nd - 1
    while d >= 0 do
      index[d] = index[d] + 1
      at = at + tonumber(t.stride[d])
      if index[d] < tonumber(t.shape[d]) then break end
      at = at - tonumber(t.stride[d]) * tonumber(t.shape[d])
      index[d] = 0
      d = d - 1
    end
    if d < 0 then return end
  end
end

--- Write flat row-major values into t (any strides).
function M.set(t, values)
  local m, i = memory(t), 0
  each(t, function(at)
    i = i + 1
    m[at] = encode(t.dtype, values[i])
  end)
  return t
end

--- Read t as a flat row-major Lua array of numbers (bool gives 0 and 1).
function M.get(t)
  local values = {}
  if M.numel(t) == 0 then return values end
  local m = memory(t)
  local words = ffi.cast("uint32_t *", m)
  each(t, function(at) values[#values + 1] = decode(t.dtype, m, at, words) end)
  return values
end

--- A new contiguous tensor with these values.
function M.tensor(dtype, shape, values) return M.set(M.empty(dtype, shape), values) end

--- The bytes of a contiguous tensor as a Lua string, for bit-for-bit comparison.
function M.bits(t) return M.numel(t) == 0 and "" or ffi.string(memory(t), M.numel(t) * bytes[t.dtype]) end

-- ---- views: copies of the struct that keep their owner alive ----

local function view(t)
  local v = tensor_type(t)
  owners[v] = owners[t] or t
  if owners[t] == nil then owners[v] = t end
  return v
end
M.view = view

function M.transpose(t, i, j)
  local v = view(t)
  v.shape[i], v.shape[j] = t.shape[j], t.shape[i]
  v.stride[i], v.stride[j] = t.stride[j], t.stride[i]
  return v
end

--- Elements start, start + step, ... (count of them) along axis d; step may be negative.
function M.slice(t, d, start, count, step)
  local v = view(t)
  v.offset = t.offset + start * t.stride[d]
  v.shape[d] = count
  v.stride[d] = t.stride[d] * (step or 1)
  return v
end

--- t expanded to `shape` with stride 0 on new and size-1 axes.
function M.expand(t, shape)
  local v = view(t)
  local added = #shape - t.ndim
  v.ndim = #shape
  for i = #shape, 1, -1 do
    local old = i - 1 - added
    local same = old >= 0 and tonumber(t.shape[old]) == shape[i] and shape[i] ~= 1
    v.stride[i - 1] = same and t.stride[old] or 0
    v.shape[i - 1] = shape[i]
  end
  return v
end

--- The same values in five layouts: contiguous, transposed, stepped, reversed, and inside a wider array.
-- @treturn table name -> tensor of the given shape
function M.layouts(dtype, shape, values)
  local result = { contiguous = M.tensor(dtype, shape, values) }
  local nd = #shape
  if nd == 0 then return result end
  if nd >= 2 then
    local turned = { unpack(shape) }
    turned[nd], turned[nd - 1] = shape[nd - 1], shape[nd]
    result.transposed = M.set(M.transpose(M.empty(dtype, turned), nd - 1, nd - 2), values)
  end
  local double = { unpack(shape) }
  double[nd] = 2 * shape[nd] + 1
  result.stepped = M.set(M.slice(M.empty(dtype, double), nd - 1, 1, shape[nd], 2), values)
  result.reversed = M.set(M.slice(M.empty(dtype, shape), 0, shape[1] - 1, shape[1], -1), values)
  local wide = { unpack(shape) }
  wide[nd] = shape[nd] + 3
  result.inner = M.set(M.slice(M.empty(dtype, wide), nd - 1, 2, shape[nd], 1), values)
  return result
end

--- The instruction sets that this processor and build can run.
function M.isas()
  local list = {}
  for _, name in ipairs { "baseline", "avx2", "avx512" } do
    local now = ffi.string(C.lac_isa(nil))
    if C.lac_isa(name) ~= nil then list[#list + 1] = name end
    C.lac_isa(now)
  end
  return list
end

return M
