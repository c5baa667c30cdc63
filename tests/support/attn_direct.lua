--- Drives the engine's attention through its C functions, below the Lua library.
--
-- The specs of the plan and of the kernels must not depend on lacuna.tensor or lacuna.attention, which are
-- tested by their own specs and are built on what is tested here. So this file knows only lacuna.lib
-- (library, declarations) and moves numbers between flat Lua arrays and engine tensors of any dtype and
-- memory layout. It also reads safetensors files, for the golden values; the library's own reader is not
-- used for the same reason. Conversions of f16 and bf16 are written here by arithmetic, independently of the
-- engine's bit manipulation.
--
-- Configurations are plain tables with the fields of lacuna.attend (segments, dilations, heads, offset,
-- merge, causal, window, dedup, align) plus B, N, M, H, Hk, D; missing ones have the defaults of `fill`.

local lib = require "lacuna.lib"
local choices = require "support.random"
local ffi, C = lib.ffi, lib.C

local direct = { C = C, ffi = ffi }

--- Device of the tensors that are made from here on: 0, or C.LAC_CUDA. Numbers cross by lac_copy.
direct.device = 0

local DTYPE = { f64 = 0, f32 = 1, f16 = 2, bf16 = 3, i64 = 4, i32 = 5, u8 = 6, bool = 7 }
local CTYPE = { f64 = "double*", f32 = "float*", f16 = "uint16_t*", bf16 = "uint16_t*", i64 = "int64_t*",
                i32 = "int32_t*", u8 = "uint8_t*", bool = "uint8_t*" }
local NAME = {}
for name, code in pairs(DTYPE) do NAME[code] = name end

-- ---- half precision by arithmetic ---------------------------------------------------------------

-- x rounded to `bits` bits of mantissa (with the leading one), ties to even, smallest exponent `least`
local function round_bits(x, bits, least, largest)
  if x == 0 or x ~= x or math.abs(x) == math.huge then return x end
  local _, e = math.frexp(x)
  local ulp = math.ldexp(1, math.max(e, least) - bits)
  local q = x / ulp
  local f = math.floor(q)
  local rest = q - f
  if rest > 0.5 or (rest == 0.5 and f % 2 == 1) then f = f + 1 end
  local y = f * ulp
  if math.abs(y) > largest then return y < 0 and -math.huge or math.huge end
  return y
end

local F16_MAX, BF16_MAX = 65504, math.ldexp(255, 120)
local float1 = ffi.new("float[1]")

--- Round a number to the nearest value of a dtype.
direct.round = {
  f64 = function(x) return x end,
  f32 = function(x) float1[0] = x; return tonumber(float1[0]) end,
  f16 = function(x) return round_bits(x, 11, -13, F16_MAX) end,
  bf16 = function(x) return round_bits(x, 8, -125, BF16_MAX) end,
}

local pun = ffi.new("union { float f; uint32_t u; }")
local function bf16_bits(x) pun.f = direct.round.bf16(x); return math.floor(pun.u / 65536) end
local function bf16_value(b)
  if b % 32768 > 0x7f80 then return 0 / 0 end -- see nan_test
  pun.u = b * 65536
  return tonumber(pun.f)
end

local function f16_bits(x)
  x = direct.round.f16(x)
  local sign = (x < 0 or 1 / x < 0) and 0x8000 or 0
  if x ~= x then return 0x7e00 end
  x = math.abs(x)
  if x == math.huge then return sign + 0x7c00 end
  if x < math.ldexp(1, -14) then return sign + x * math.ldexp(1, 24) end
  local m, e = math.frexp(x) -- x = m 2^e, m in [0.5, 1)
  return sign + (e + 14) * 1024 + (m * 2 - 1) * 1024
end
local function f16_value(b)
  local sign = b >= 0x8000 and -1 or 1
  b = b % 0x8000
  local e, m = math.floor(b / 1024), b % 1024
  if e == 31 then return m == 0 and sign * math.huge or 0 / 0 end
  if e == 0 then return sign * math.ldexp(m, -24) end
  return sign * math.ldexp(1 + m / 1024, e - 15)
end

local ENCODE = { f16 = f16_bits, bf16 = bf16_bits }
local DECODE = { f16 = f16_value, bf16 = bf16_value }

-- ---- tensors ------------------------------------------------------------------------------------

local function check(status)
  if status ~= 0 then error(ffi.string(C.lac_last_error()), 0) end
end
direct.check = check

--- An engine struct whose storage is dropped with it.
function direct.blank() return ffi.gc(ffi.new("lac_tensor"), C.lac_tensor_drop) end

--- A new tensor.
-- @tparam string dtype
-- @tparam table shape
-- @param values flat row-major array (from 1), or nil to leave it uninitialised
-- @tparam[opt] string layout nil contiguous; "heads" memory order [B, H, N, D]; "inner" the last axis has
-- stride 3; "reversed" the second axis runs backwards
function direct.tensor(dtype, shape, values, layout)
  local t, n = direct.blank(), #shape
  t.dtype, t.device, t.ndim = DTYPE[dtype], direct.device, n
  for i = 1, n do t.shape[i - 1] = shape[i] end
  if layout == "heads" then t.shape[1], t.shape[2] = shape[3], shape[2] end
  if layout == "inner" then t.shape[n - 1] = shape[n] * 3 end
  check(C.lac_empty(t))
  if layout == "heads" then
    t.shape[1], t.shape[2] = shape[2], shape[3]
    t.stride[1], t.stride[2] = t.stride[2], t.stride[1]
  elseif layout == "inner" then
    t.shape[n - 1], t.stride[n - 1], t.offset = shape[n], 3, 1
  elseif layout == "reversed" then
    t.offset = t.stride[1] * (shape[2] - 1)
    t.stride[1] = -t.stride[1]
  end
  if values then direct.write(t, values) end
  return t
end

-- calls f(flat row-major index from 1, element offset) for every element
local function each(t, f)
  local index, n, total = {}, t.ndim, 1
  for i = 0, n - 1 do
    index[i] = 0
    total = total * tonumber(t.shape[i])
  end
  for flat = 1, total do
    local at = 0
    for i = 0, n - 1 do at = at + index[i] * tonumber(t.stride[i]) end
    f(flat, at)
    for i = n - 1, 0, -1 do
      index[i] = index[i] + 1
      if index[i] < t.shape[i] then break end
      index[i] = 0
    end
  end
end

local function address(t)
  local p = ffi.new("void*[1]")
  check(C.lac_tensor_data(t, p))
  return ffi.cast(CTYPE[NAME[t.dtype]], p[0])
end
direct.address = address

-- an uninitialised contiguous host tensor of t's shape and dtype
local function on_host(t)
  local h = direct.blank()
  h.dtype, h.device, h.ndim = t.dtype, 0, t.ndim
  for i = 0, t.ndim - 1 do h.shape[i] = t.shape[i] end
  check(C.lac_empty(h))
  return h
end

function direct.write(t, values)
  if t.device ~= 0 then
    local h = on_host(t)
    direct.write(h, values)
    return check(C.lac_copy(h, t))
  end
  local p, encode = address(t), ENCODE[NAME[t.dtype]]
  each(t, function(i, at) p[at] = encode and encode(values[i]) or values[i] end)
end

-- A NaN's bits must not become a Lua number: LuaJIT tags its values in NaN payloads, a foreign one crashes.
local BITS = { f32 = { "uint32_t *", 0x7f800000 }, f64 = { "uint64_t *", 0x7ff0000000000000ULL } }
local function nan_test(t)
  local known = BITS[NAME[t.dtype]]
  if not known then return function() return false end end
  local words, most = ffi.cast(known[1], address(t)), known[2]
  if NAME[t.dtype] == "f64" then
    return function(at) return bit.band(words[at], 0x7fffffffffffffffULL) > most end
  end
  return function(at) return bit.band(words[at], 0x7fffffff) > most end
end

--- Flat row-major array of a tensor's numbers.
function direct.read(t)
  if t.device ~= 0 then
    local h = on_host(t)
    check(C.lac_copy(t, h))
    t = h
  end
  local p, decode, out, is_nan = address(t), DECODE[NAME[t.dtype]], {}, nan_test(t)
  each(t, function(i, at)
    local x = is_nan(at) and 0 / 0 or tonumber(p[at])
    out[i] = decode and decode(x) or x
  end)
  return out
end

-- ---- plans and calls ----------------------------------------------------------------------------

local HEADS = { split = 0, all = 1 }
local OFFSET = { branch = 0, mod = 1, block = 2 }
local MERGE = { mean = 0, sum = 1, lse = 2, lse_detach = 3 }
local KERNEL = { auto = 0, portable = 1, hopper = 2 }

--- A copy of a configuration with the defaults filled in.
function direct.fill(cfg)
  local c = {}
  for key, value in pairs(cfg) do c[key] = value end
  c.B, c.N, c.H, c.D = c.B or 1, c.N or 1, c.H or 1, c.D or 1
  c.M, c.Hk = c.M or c.N, c.Hk or c.H
  c.heads, c.merge = c.heads or "all", c.merge or "lse"
  c.offset = c.offset or (c.heads == "split" and "branch" or "mod")
  c.dropout = c.dropout or 0
  return c
end

--- The C description of a (filled) configuration.
function direct.desc(c)
  local d = ffi.new("lac_attn_desc")
  d.batch, d.n, d.m, d.heads, d.kv_heads, d.head_dim = c.B, c.N, c.M, c.H, c.Hk, c.D
  d.branches = #c.segments
  for i = 1, #c.segments do
    d.segment[i - 1], d.dilation[i - 1] = c.segments[i], c.dilations[i]
  end
  d.heads_scheme, d.offset_rule, d.merge = HEADS[c.heads], OFFSET[c.offset], MERGE[c.merge]
  d.causal, d.dedup, d.align_end = c.causal and 1 or 0, c.dedup and 1 or 0, c.align == "end" and 1 or 0
  d.window = c.window or -1
  return d
end

function direct.plan_of(desc)
  local p = ffi.new("lac_plan*[1]")
  check(C.lac_plan_get(desc, p))
  return ffi.gc(p[0], C.lac_plan_drop)
end
function direct.plan(c) return direct.plan_of(direct.desc(c)) end

function direct.info(plan)
  local info = ffi.new("lac_plan_info")
  check(C.lac_plan_describe(plan, info))
  return info
end

--- The arguments struct; returns it and a list that keeps its tensors alive.
function direct.args(c, q, k, v)
  local dtype = NAME[q.dtype]
  local a, keep = ffi.new("lac_attn_args"), { q, k, v }
  a.q, a.k, a.v = q, k, v
  a.scale, a.dropout, a.seed, a.offset = c.scale or 0, c.dropout or 0, c.seed or 0, c.rng_offset or 0
  a.kernel = KERNEL[c.kernel or "auto"]
  a.fp8 = c.fp8 and 1 or 0
  if c.padding then -- flat [B * M] booleans
    local bytes = {}
    for i, keep_key in ipairs(c.padding) do bytes[i] = keep_key and 1 or 0 end
    keep.padding = direct.tensor("bool", { c.B, c.M }, bytes)
    a.key_padding = keep.padding
  end
  if c.lengths then
    keep.lengths = direct.tensor(c.lengths_dtype or "i64", { c.B }, c.lengths)
    a.key_lengths = keep.lengths
  end
  if c.mask then
    local bytes = {}
    for i, on in ipairs(c.mask.data) do bytes[i] = on and 1 or 0 end
    keep.mask = direct.tensor("bool", c.mask.shape, bytes, c.mask.layout)
    a.mask = keep.mask
  end
  if c.blocks then
    local bytes = {}
    for i, on in ipairs(c.blocks.data) do bytes[i] = on and 1 or 0 end
    keep.blocks = direct.tensor("bool", c.blocks.shape, bytes, c.blocks.layout)
    a.block_mask, a.block = keep.blocks, c.block
  end
  if c.starts then -- from 0
    keep.starts = ffi.new("int64_t[?]", #c.starts, c.starts)
    a.starts, a.sequences = keep.starts, #c.starts - 1
  end
  if c.bias then
    keep.bias = direct.tensor(c.bias.dtype or dtype, c.bias.shape, c.bias.data, c.bias.layout)
    a.bias = keep.bias
  end
  if c.alibi then
    keep.alibi = direct.tensor(dtype == "f64" and "f64" or "f32", { #c.alibi }, c.alibi)
    a.alibi = keep.alibi
  end
  return a, keep
end

--- One forward on flat arrays. Returns a record for `backward` with tensors out, lse, branch_lse.
-- opts: dtype (default f64), layout
function direct.forward(c, q, k, v, opts)
  opts = opts or {}
  local dtype, layout = opts.dtype or "f64", opts.layout
  local r = { c = c, dtype = dtype, plan = direct.plan(c) }
  r.q = direct.tensor(dtype, { c.B, c.N, c.H, c.D }, q, layout)
  r.k = direct.tensor(dtype, { c.B, c.M, c.Hk, c.D }, k, layout)
  r.v = direct.tensor(dtype, { c.B, c.M, c.Hk, c.D }, v, layout)
  r.args, r.keep = direct.args(c, r.q, r.k, r.v)
  r.out, r.lse, r.branch_lse = direct.blank(), direct.blank(), direct.blank()
  check(C.lac_attend(r.plan, r.args, r.out, r.lse, r.branch_lse))
  return r
end

--- Gradients for a forward's record: tensors dq, dk, dv and, if there is a bias that is not `constant`,
-- dbias. dout and dlse (or nil) are flat arrays.
function direct.backward(r, dout, dlse, opts)
  local c = r.c
  local stats = r.dtype == "f64" and "f64" or "f32"
  local g = direct.tensor(r.dtype, { c.B, c.N, c.H, c.D }, dout, opts and opts.layout)
  local gl = dlse and direct.tensor(stats, { c.B, c.N, c.H }, dlse)
  local dq, dk, dv = direct.blank(), direct.blank(), direct.blank()
  local dbias = c.bias and not c.bias.constant and direct.blank() or nil
  check(C.lac_attend_bwd(r.plan, r.args, r.out, r.lse, r.branch_lse, g, gl, dq, dk, dv, dbias))
  return dq, dk, dv, dbias
end

--- Deterministic normal-like numbers in [-2, 2), n of them.
function direct.numbers(seed, n)
  local x, out = (seed * 7919 + 12345) % 2147483648, {}
  for i = 1, n do
    local sum = 0
    for _ = 1, 2 do
      x = choices.step(x)
      sum = sum + math.floor(x / 1024) / 2097152
    end
    out[i] = (sum - 1) * 2
  end
  return out
end

--- Largest finite magnitude.
function direct.largest(a)
  local most = 0
  for i = 1, #a do
    local x = math.abs(a[i])
    if x > most and x < math.huge then most = x end
  end
  return most
end

--- Largest absolute difference; NaN against NaN and equal infinities count as equal.
function direct.max_diff(a, b)
  assert(#a == #b, "different lengths")
  local most = 0
  for i = 1, #a do
    local same = a[i] == b[i] or (a[i] ~= a[i] and b[i] ~= b[i])
    local d = same and 0 or math.abs(a[i] - b[i])
    if d ~= d then return math.huge end
    if d > most then most = d end
  end
  return most
end

--- run() must give the same bits by one to four threads.
-- @tparam function run returns { name = flat array }
function direct.any_threads(run)
  local threads, first = C.lac_threads(0), nil
  for n = 1, 4 do
    C.lac_threads(n)
    local got = run()
    first = first or got
    for name, data in pairs(got) do
      if direct.max_diff(data, first[name]) ~= 0 then error(("%s differs by %d threads"):format(name, n)) end
    end
  end
  C.lac_threads(threads)
end

-- ---- safetensors --------------------------------------------------------------------------------

--- Reads a file: { name = { dtype =, shape =, data = flat array } }, and its metadata.
function direct.safetensors(path)
  local json = require "cjson"
  local f = assert(io.open(path, "rb"))
  local all = f:read("*a")
  f:close()
  local size = tonumber(ffi.cast("const uint64_t*", all)[0])
  local header = json.decode(all:sub(9, 8 + size))
  local base, tensors = ffi.cast("const char*", all) + 8 + size, {}
  for name, e in pairs(header) do
    if name ~= "__metadata__" then
      local p = ffi.cast(CTYPE[e.dtype:lower()], base + e.data_offsets[1])
      local data = {}
      for i = 1, (e.data_offsets[2] - e.data_offsets[1]) / (e.dtype == "F64" and 8 or 4) do
        data[i] = tonumber(p[i - 1])
      end
      tensors[name] = { dtype = e.dtype:lower(), shape = e.shape, data = data }
    end
  end
  return tensors, header.__metadata__
end

return direct
