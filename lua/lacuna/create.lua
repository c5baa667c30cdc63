--- Factories: tensors from nothing, from tables, from bytes, from the random stream.
--
-- Sizes and options share one table, `lac.randn{2, 3, dtype = "f64", grad = true}`, because that reads best
-- in scripts; sizes as plain arguments with an options table last work too, `lac.zeros(2, 3, {dtype =
-- "i64"})`. Options are validated by schema: a misspelt `dytpe=` is an error and never a default.
--
-- Random numbers come from one global Philox stream (seed, offset). Every draw takes the present offset and
-- advances it by one, so a run is reproduced by its seed, a checkpoint needs two numbers, and neither threads
-- nor device matter. The rejected alternative, generator objects passed around, buys independence that
-- different seeds give already.
--
-- The default dtype holds for every factory, lac.arange included (torch7's habit); integer data asks for it:
-- lac.arange{10, dtype = "i64"}. randint gives i64. Class targets, token ids and other index TENSORS are data
-- and 0-based, everywhere; positions in Lua calls (dims, slices, t[i]) are 1-based.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"

local ffi, C = lib.ffi, lib.C
local fail, show, is_integer = schema.fail, schema.show, schema.is_integer
local create = {}

local stream = { seed = 0, offset = 0, step = 1 }
local MAX_SEED = 2 ^ 53

--- Take the next place of the global random stream.
-- @treturn number seed, number offset
function create.draw()
  local offset = stream.offset
  stream.offset = offset + stream.step
  return stream.seed, offset
end

--- Start the global random stream at a seed.
-- @tparam integer seed 0 to 2^53
function create.manual_seed(seed)
  schema.check("manual_seed", "seed", seed, { type = "integer", min = 0, max = MAX_SEED })
  stream.seed, stream.offset = seed, 0
end

--- The state of the random stream, for checkpoints.
-- @treturn number seed, number offset
function create.rng_state() return stream.seed, stream.offset end

--- Restore the state of the random stream.
function create.set_rng_state(seed, offset)
  schema.check("set_rng_state", "seed", seed, { type = "integer", min = 0, max = MAX_SEED })
  schema.check("set_rng_state", "offset", offset, { type = "integer", min = 0, max = MAX_SEED })
  stream.seed, stream.offset = seed, offset
end

-- distance of the offsets of neighbouring draws: 1, but while a graph is captured
function create.set_draw_step(step) stream.step = step end

-- ---- options ------------------------------------------------------------------------------------

local COMMON = { dtype = { type = "string" }, device = { type = "string" }, grad = { type = "boolean" } }

local function with_common(extra)
  local spec = {}
  for k, v in pairs(COMMON) do spec[k] = v end
  for k, v in pairs(extra or {}) do spec[k] = v end
  return spec
end

-- Split {2, 3, dtype = ...}, or 2, 3, {dtype = ...}, or {2, 3}, {dtype = ...} into numbers and options.
local function split(op, spec, ...)
  local count = select("#", ...)
  local list, options = {}, {}
  local last = count
  local function take_options(t)
    local n = #t
    for k, v in pairs(t) do
      if type(k) ~= "number" then
        options[k] = v
      elseif k < 1 or k > n or k ~= math.floor(k) then
        fail(op, "sizes must be a plain list, it has the key [%s]", show(k))
      end
    end
  end
  local first = ...
  if count == 0 then return list, schema.options(op, options, spec) end
  if type(first) == "table" and not tensor.is(first) then
    for i = 1, #first do list[i] = first[i] end
    take_options(first)
    if count > 2 then fail(op, "expected one table of sizes and options, got %d arguments", count) end
    local second = select(2, ...)
    if second ~= nil then
      if type(second) ~= "table" or tensor.is(second) or #second > 0 then
        fail(op, "the second argument must be a table of options, got %s", show(second))
      end
      take_options(second)
    end
  else
    local tail = select(count, ...)
    if type(tail) == "table" and not tensor.is(tail) then
      if #tail > 0 then fail(op, "expected sizes, then options, got %s", show(tail)) end
      take_options(tail)
      last = count - 1
    end
    for i = 1, last do
      local v = select(i, ...)
      if type(v) ~= "number" then
        fail(op, "size %d must be an integer, got %s%s", i, show(v), tensor.is(v) and (op == "bernoulli"
          and "; lac.rand_like(p):lt(p) draws with the probabilities of a tensor"
          or rawget(create, op .. "_like") and ("; lac.%s_like takes a tensor"):format(op)) or "")
      end
      list[i] = v
    end
  end
  return list, schema.options(op, options, spec)
end

local function finish(op, t, options)
  if options.grad then
    if not device.is_float(t.c.dtype) then
      fail(op, "only floating-point tensors can require a gradient, got grad = true with dtype '%s'",
           device.dtype_name[t.c.dtype])
    end
    t.requires_grad = true
  end
  return t
end

-- An uninitialised tensor for checked sizes.
local function allocate(op, list, options, dtype)
  local n = tensor.sizes(op, false, list)
  return tensor.empty(dtype or device.dtype(op, options.dtype), device.code(op, options.device),
                      tensor.sizes_buffer, n)
end

local PLAIN = with_common()

--- Uninitialised tensor. @tparam integer ... sizes, or one table of sizes and options dtype, device, grad
function create.empty(...)
  local list, options = split("empty", PLAIN, ...)
  return finish("empty", allocate("empty", list, options), options)
end

local function filled(op, value, ...)
  local list, options = split(op, PLAIN, ...)
  local t = allocate(op, list, options)
  lib.call(C.lac_fill, t.c, value)
  return finish(op, t, options)
end

--- Zeros: lac.zeros{2, 3}, lac.zeros(2, 3); options dtype, device, grad, as in all that follow:
-- lac.zeros{2, 3, dtype = "f64", grad = true}.
function create.zeros(...) return filled("zeros", 0, ...) end

--- Ones; options dtype, device, grad.
function create.ones(...) return filled("ones", 1, ...) end

local FULL = with_common { value = { type = { "number", "boolean" } } }

--- Every element the same: lac.full{2, 3, value = 7} or lac.full({2, 3}, 7, {dtype = "i64"}); options
-- dtype, device, grad.
function create.full(sizes, value, options)
  if type(sizes) ~= "table" or tensor.is(sizes) then
    fail("full", "sizes must be a table, got %s", show(sizes))
  end
  local list, o = {}, {}
  for i = 1, #sizes do list[i] = sizes[i] end
  for k, v in pairs(sizes) do
    if type(k) ~= "number" then o[k] = v end
  end
  if value ~= nil then o.value = value end
  if options ~= nil then
    if type(options) ~= "table" then fail("full", "options must be a table, got %s", show(options)) end
    for k, v in pairs(options) do o[k] = v end
  end
  local nan = o.value ~= o.value
  if nan then o.value = 0 end -- schema refuses NaN as a slip, here it is a value
  o = schema.options("full", o, FULL)
  if o.value == nil then fail("full", "value is required: lac.full{2, 3, value = 7}") end
  if type(o.value) == "boolean" then
    o.dtype = o.dtype or "bool"
    o.value = o.value and 1 or 0
  end
  local t = allocate("full", list, o)
  lib.call(C.lac_fill, t.c, nan and 0 / 0 or o.value)
  return finish("full", t, o)
end

local RANDOM = with_common()
local UNIFORM = with_common { low = { type = "number" }, high = { type = "number" } }
local NORMAL = with_common { mean = { type = "number" }, std = { type = "number", min = 0 } }
local INTEGERS = with_common { low = { type = "integer" }, high = { type = "integer" } }
local BERNOULLI = with_common { p = { type = "number", min = 0, max = 1 } }

local function random(t, kind, a, b)
  local seed, offset = create.draw()
  lib.call(C.lac_random, t.c, kind, a, b, seed, offset)
  return t
end
create.random = random

--- Standard normal numbers, or mean and std given as options; also dtype, device, grad.
function create.randn(...)
  local list, options = split("randn", NORMAL, ...)
  local t = allocate("randn", list, options)
  return finish("randn", random(t, C.LAC_NORMAL, options.mean or 0, options.std or 1), options)
end

--- Uniform numbers in [low, high), by default [0, 1); options low, high, dtype, device, grad.
function create.rand(...)
  local list, options = split("rand", UNIFORM, ...)
  local low, high = options.low or 0, options.high or 1
  if low >= high then fail("rand", "low must be below high, got %s and %s", show(low), show(high)) end
  local t = allocate("rand", list, options)
  return finish("rand", random(t, C.LAC_UNIFORM, low, high), options)
end

--- Uniform integers low <= i < high (i64): lac.randint{2, 3, low = 0, high = 10}; low is 0 unless given;
-- also dtype, device (and grad, of floats).
function create.randint(...)
  local list, options = split("randint", INTEGERS, ...)
  local low, high = options.low or 0, options.high
  if high == nil then fail("randint", "high is required: lac.randint{2, 3, high = 10}") end
  if low >= high then fail("randint", "low must be below high, got %s and %s", show(low), show(high)) end
  local t = allocate("randint", list, options, device.dtype("randint", options.dtype or "i64"))
  return finish("randint", random(t, C.LAC_INTEGER, low, high), options)
end

--- Ones with probability p, else zeros; options p, dtype (bool unless given), device,
-- grad (of floats).
function create.bernoulli(...)
  local list, options = split("bernoulli", BERNOULLI, ...)
  if options.p == nil then fail("bernoulli", "p is required: lac.bernoulli{2, 3, p = 0.5}") end
  local t = allocate("bernoulli", list, options, device.dtype("bernoulli", options.dtype or "bool"))
  return finish("bernoulli", random(t, C.LAC_BERNOULLI, options.p, 0), options)
end

--- Evenly spaced numbers: {stop}, {start, stop} or {start, stop, step}, the stop excluded; options dtype,
-- device, grad. lac.arange{4} is 0 1 2 3. The dtype is the default dtype unless given.
function create.arange(...)
  local list, options = split("arange", PLAIN, ...)
  if #list < 1 or #list > 3 then
    fail("arange", "takes {stop}, {start, stop} or {start, stop, step}, got %d numbers", #list)
  end
  local rule = { type = "number", min = -2 ^ 53, max = 2 ^ 53 }
  for i = 1, #list do schema.check("arange", "number " .. i, list[i], rule) end
  local start, stop, step = 0, list[1], list[3] or 1
  if #list > 1 then start, stop = list[1], list[2] end
  if step == 0 then fail("arange", "step must not be 0") end
  local n = math.max(0, math.ceil((stop - start) / step))
  local t = allocate("arange", { n }, options)
  lib.call(C.lac_arange, t.c, start, step)
  return finish("arange", t, options)
end

--- The identity: lac.eye{3} or lac.eye{3, 4}; options dtype, device, grad.
function create.eye(...)
  local list, options = split("eye", PLAIN, ...)
  if #list < 1 or #list > 2 then fail("eye", "takes {n} or {n, m}, got %d numbers", #list) end
  list[2] = list[2] or list[1]
  local t = allocate("eye", list, options)
  lib.call(C.lac_fill, t.c, 0)
  local n = math.min(list[1], list[2])
  if n > 0 then
    local diagonal = tensor.alias(t)
    local c = diagonal.c
    c.ndim, c.shape[0], c.stride[0] = 1, n, list[2] + 1
    lib.call(C.lac_fill, c, 1)
  end
  return finish("eye", t, options)
end

-- sizes and options of a tensor like t
local function sized_like(op, t, options)
  tensor.expect(op, "the first argument", t)
  options = schema.options(op, options, PLAIN)
  local sizes = tensor.shape(t)
  local o = { dtype = options.dtype or device.dtype_name[t.c.dtype],
              device = options.device or device.name(t.c.device), grad = options.grad }
  for i = 1, #sizes do o[i] = sizes[i] end
  return o
end

for _, name in ipairs { "zeros", "ones", "empty", "rand", "randn" } do
  local op, make = name .. "_like", create[name]
  --- The shape, dtype and device of t, unless the options (dtype, device, grad) say otherwise.
  create[op] = function(t, options) return (make(sized_like(op, t, options))) end
end

--- Every element `value`, the shape, dtype and device of t, unless the options (dtype, device, grad) say
-- otherwise.
create.full_like = function(t, value, options)
  return (create.full(sized_like("full_like", t, options), value))
end

-- ---- from Lua data ------------------------------------------------------------------------------

-- Shape of nested tables; every list on a level must have the same length.
local function measure(value)
  local sizes, v = {}, value
  while type(v) == "table" and not tensor.is(v) do
    sizes[#sizes + 1] = #v
    if #sizes > tensor.max_dims then
      fail("tensor", "a tensor has at most %d dimensions, the table is nested deeper", tensor.max_dims)
    end
    if #v == 0 then break end
    v = v[1]
  end
  return sizes, v
end

local TENSOR = with_common { shape = { type = "table" } }

local function flatten(value, sizes, depth, flat, path)
  if depth > #sizes then
    local kind = type(value)
    if kind ~= "number" and kind ~= "boolean" and kind ~= "cdata" then
      fail("tensor", "element [%s] must be a number or a boolean, got %s", table.concat(path, "]["),
           show(value))
    end
    flat[#flat + 1] = value
    return
  end
  if type(value) ~= "table" or tensor.is(value) then
    fail("tensor", "the table is ragged: expected a list of %d at [%s], got %s", sizes[depth],
         table.concat(path, "]["), show(value))
  end
  if #value ~= sizes[depth] then
    fail("tensor", "the table is ragged: expected %d elements%s, got %d", sizes[depth],
         #path > 0 and " at [" .. table.concat(path, "][") .. "]" or "", #value)
  end
  for k in pairs(value) do
    if not is_integer(k) or k < 1 or k > #value then
      fail("tensor", "a table of numbers must be a plain list, it has the key %s%s", show(k),
        #path == 0 and rawget(TENSOR, k)
        and "; options are a second table: lac.tensor({ ... }, { ... })" or "")
    end
  end
  for i = 1, #value do
    path[depth] = i
    flatten(value[i], sizes, depth + 1, flat, path)
  end
  path[depth] = nil
end

-- element range of the integer dtypes that do not hold every double
local RANGE = { [C.LAC_I32] = { -2 ^ 31, 2 ^ 31 - 1 }, [C.LAC_U8] = { 0, 255 },
                [C.LAC_I64] = { -2 ^ 63, 2 ^ 63 - 1024 } }

local function check_element(op, code, v, i)
  if type(v) == "cdata" then return end
  if type(v) == "boolean" then v = v and 1 or 0 end
  local range = RANGE[code]
  if range and (v ~= math.floor(v) or v < range[1] or v > range[2]) then
    fail(op, "element %d does not fit dtype '%s': %s", i, device.dtype_name[code], show(v))
  end
end

-- t on the device, copied there if it is elsewhere
local function place(t, dev)
  if t.c.device == dev then return t end
  local c = tensor.ctype()
  c.dtype, c.device, c.ndim = t.c.dtype, dev, t.c.ndim
  for i = 0, t.c.ndim - 1 do c.shape[i] = t.c.shape[i] end
  lib.call(C.lac_empty, c)
  local out = tensor.adopt(c)
  lib.call(C.lac_copy, t.c, out.c)
  return out
end

-- Write flat into a new tensor of a dtype that Lua can store directly, then cast.
local function from_flat(flat, sizes, code, dev)
  local half = code == C.LAC_F16 or code == C.LAC_BF16
  local stored = half and C.LAC_F64 or code
  local t = tensor.empty(stored, C.LAC_CPU, sizes, #sizes)
  if #flat > 0 then
    local p = tensor.pointer(t)
    for i = 1, #flat do
      local v = flat[i]
      check_element("tensor", code, v, i)
      if type(v) == "boolean" then v = v and 1 or 0 end
      if code == C.LAC_BOOL then v = v ~= 0 and 1 or 0 end
      if type(v) == "cdata" and not tonumber(v) then
        fail("tensor", "element %d must be a number, got %s", i, tostring(v))
      end
      p[i - 1] = v
    end
  end
  if half then t = tensor.cast(t, code) end
  return place(t, dev)
end

-- ---- made on the host -----------------------------------------------------------------------------

--- A random permutation of 0 .. n-1 (i64 unless told): Fisher and Yates's shuffle, by the random stream.
-- @tparam integer n @tparam[opt] table options dtype, device, grad (of floats)
function create.randperm(n, options)
  schema.check("randperm", "n", n, { type = "integer", min = 0 })
  options = schema.options("randperm", options, RANDOM)
  local code = device.dtype("randperm", options.dtype or "i64")
  local t = tensor.empty(C.LAC_I64, C.LAC_CPU, { n }, 1)
  local draws = random(tensor.empty(C.LAC_F64, C.LAC_CPU, { n }, 1), C.LAC_UNIFORM, 0, 1)
  if n > 0 then
    check_element("randperm", code, n - 1, n)
    local p, u = tensor.pointer(t), tensor.pointer(draws)
    for i = 0, n - 1 do p[i] = i end
    for i = n - 1, 1, -1 do
      local j = math.floor(u[i] * (i + 1))
      p[i], p[j] = p[j], p[i]
    end
  end
  if code ~= C.LAC_I64 then t = tensor.cast(t, code) end
  return finish("randperm", place(t, device.code("randperm", options.device)), options)
end

local LINSPACE = with_common { steps = { type = "integer", min = 1 } }

--- steps numbers from start to stop, both included: lac.linspace{0, 1, steps = 5}; options dtype,
-- device, grad.
function create.linspace(...)
  local list, options = split("linspace", LINSPACE, ...)
  if #list ~= (options.steps and 2 or 3) then
    fail("linspace", "takes {start, stop, steps = n} or {start, stop, n}, got %d numbers%s", #list,
         options.steps and " and steps" or "")
  end
  local n = options.steps or list[3]
  schema.check("linspace", "steps", n, LINSPACE.steps)
  local start, stop = list[1], list[2]
  schema.check("linspace", "start", start, { type = "number" })
  schema.check("linspace", "stop", stop, { type = "number" })
  local code = device.dtype("linspace", options.dtype)
  local t = tensor.empty(C.LAC_F64, C.LAC_CPU, { n }, 1)
  -- from the nearer end, so that the last is stop exactly
  local p, last, span, middle = tensor.pointer(t), math.max(n - 1, 1), stop - start, math.ceil((n - 1) / 2)
  for i = 1, middle - 1 do p[i] = start + span * (i / last) end
  for i = math.max(middle, 1), n - 1 do p[i] = stop - span * (1 - i / last) end
  p[0] = start
  for i = 0, RANGE[code] and n - 1 or -1 do check_element("linspace", code, p[i], i + 1) end
  t = place(code == C.LAC_F64 and t or tensor.cast(t, code), device.code("linspace", options.device))
  return finish("linspace", t, options)
end

local CTYPES = { { "double", C.LAC_F64 }, { "float", C.LAC_F32 }, { "int64_t", C.LAC_I64 },
                 { "int32_t", C.LAC_I32 }, { "uint8_t", C.LAC_U8 }, { "bool", C.LAC_BOOL } }

-- A cdata array double[n], float[n], int64_t[n], int32_t[n], uint8_t[n] or bool[n]: its bytes are copied.
local function from_array(value, options)
  local text = tostring(ffi.typeof(value))
  local kind, count = text:match("^ctype<([%w_ ]+) %[(%d*)%??%]>$")
  for _, pair in ipairs(CTYPES) do
    if kind and tostring(ffi.typeof(pair[1])) == "ctype<" .. kind .. ">" then
      local size = device.dtype_size[pair[2]]
      local n = tonumber(count) or ffi.sizeof(value) / size
      local t = tensor.empty(pair[2], C.LAC_CPU, { n }, 1)
      if n > 0 then ffi.copy(tensor.pointer(t), value, n * size) end
      local want = options.dtype and device.dtype("tensor", options.dtype) or pair[2]
      return want == pair[2] and t or tensor.cast(t, want)
    end
  end
  fail("tensor",
       "cannot make a tensor of %s; arrays of double, float, int64_t, int32_t, uint8_t and bool are taken",
       text)
end

--- A tensor of the given values.
-- @param value nested lists of numbers or booleans (booleans give dtype bool), a number or boolean (0-dim), a
-- tensor (copied), or a cdata array (double[n], float[n], ...)
-- @tparam[opt] table options dtype, device, grad, shape
function create.tensor(value, options)
  options = schema.options("tensor", options, TENSOR)
  local t
  if tensor.is(value) then
    local code = options.dtype and device.dtype("tensor", options.dtype) or value.c.dtype
    t = tensor.cast(value, code)
    if options.device then t = place(t, device.code("tensor", options.device)) end
  elseif type(value) == "cdata" and not tonumber(value) then
    t = place(from_array(value, options), device.code("tensor", options.device))
  else
    local kind = type(value)
    if kind ~= "table" and kind ~= "number" and kind ~= "boolean" and kind ~= "cdata" then
      fail("tensor", "expected a table of numbers, a number, a boolean, a tensor or a cdata array, got %s",
           show(value))
    end
    local sizes, leaf = measure(value)
    local flat = {}
    flatten(value, sizes, 1, flat, {})
    local code
    if options.dtype == nil and type(leaf) == "boolean" then
      code = C.LAC_BOOL
    else
      code = device.dtype("tensor", options.dtype)
    end
    t = from_flat(flat, sizes, code, device.code("tensor", options.device))
  end
  if options.shape then t = t:view(options.shape) end
  return finish("tensor", t, options)
end

local BYTES = { dtype = { type = "string", default = "u8" }, shape = { type = "table" },
                device = { type = "string" } }

--- A tensor over a copy of a string's bytes: on the CPU, whatever the default device.
-- @tparam string bytes little-endian elements
-- @tparam[opt] table options dtype ("u8"), shape (one dimension), device
function create.from_string(bytes, options)
  if type(bytes) ~= "string" then fail("from_string", "expected a string, got %s", show(bytes)) end
  options = schema.options("from_string", options, BYTES)
  local code = device.dtype("from_string", options.dtype)
  if options.device and device.code("from_string", options.device) ~= C.LAC_CPU then
    fail("from_string", "makes CPU tensors, got device '%s'; move it with :to{device=}", options.device)
  end
  local size = device.dtype_size[code]
  if #bytes % size ~= 0 then
    fail("from_string", "%d bytes are not a whole number of %s elements of %d bytes", #bytes, options.dtype,
         size)
  end
  local t = tensor.empty(code, C.LAC_CPU, { #bytes / size }, 1)
  if #bytes > 0 then
    local p = ffi.cast("uint8_t *", tensor.pointer(t))
    ffi.copy(p, bytes, #bytes)
    if code == C.LAC_BOOL then -- other byte values are not booleans
      for i = 0, #bytes - 1 do p[i] = p[i] ~= 0 and 1 or 0 end
    end
  end
  return options.shape and t:view(options.shape) or t
end

return create
