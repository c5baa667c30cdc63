--- The tensor: a Lua table round a view struct of the engine.
--
-- A tensor is { c = lac_tensor, root = the owner of the bytes, node = tape record or false, requires_grad,
-- version, level }. An owner is its own root, and lib.own watches its cdata; a view copies the struct (no
-- C call at all) and keeps the owner alive by `root`. `version` counts in-place writes and lives on the root,
-- so that the tape can tell that a saved tensor was changed through any view. `level` belongs to scope.lua.
--
-- A table and not a bare cdata with a metatype: a script wants to hang a name, a gradient and hooks on it,
-- and cdata with Lua references has to be kept alive by tables on the side anyway. The cost is one small
-- table per operator.
--
-- Reading an unknown field raises an error with the nearest valid name: `t.shpae` is never nil. Integers and
-- tables as keys are positions and slices. All fields are made at once by one constructor, because a table
-- that changes shape makes traces longer. This file has what needs no gradient: construction from engine
-- results, raw views, host access. Differentiable operators are in ops/, factories in create.lua, printing
-- in pretty.lua; they add themselves to `methods`.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local synonyms = require "lacuna.synonyms"
local device = require "lacuna.device"
local scope = require "lacuna.scope"

local ffi, C, flags = lib.ffi, lib.C, lib.flags
local recover, raise, attend = lib.recover, lib.raise, lib.attend
local fail, show, is_integer = schema.fail, schema.show, schema.is_integer
local dtype_name = device.dtype_name

local ctensor = ffi.typeof("lac_tensor")
local SIZE = ffi.sizeof(ctensor)
local MAX_DIMS = tonumber(C.LAC_MAX_DIMS)
local own, ffi_copy = lib.own, ffi.copy

local tensor = {}
local Tensor = { __name = "Tensor" }
local methods = {}
tensor.class, tensor.methods, tensor.ctype, tensor.max_dims = Tensor, methods, ctensor, MAX_DIMS

--- The tape's switch, shared by ops/ and grad.lua: are operators recorded?
tensor.tape = { enabled = true }

-- fields that may be absent: reading them gives nil
local OPTIONAL = { grad = true, name = true, hooks = true, slot = true, retains = true, parameter = true }
local FIXED = { c = true, root = true, node = true, requires_grad = true, version = true, level = true }

-- ---- making -------------------------------------------------------------------------------------

--- Wrap a struct that the engine has just filled: the new tensor owns its storage.
-- @tparam cdata c lac_tensor with one reference
-- @treturn Tensor
local function adopt(c)
  own(c)
  local t = setmetatable({ c = c, root = false, node = false, requires_grad = false, version = 0, level = 0 },
                         Tensor)
  t.root = t
  if scope.watching then scope.enter(t) end
  return t
end
tensor.adopt = adopt

--- A second view of the same elements: a copy of the struct that keeps the owner alive. No gradient.
local function alias(t)
  local c = ctensor()
  ffi_copy(c, t.c, SIZE)
  return setmetatable({ c = c, root = t.root, node = false, requires_grad = false, version = 0,
                        level = scope.depth }, Tensor)
end
tensor.alias = alias

--- Is x a tensor?
local function is(x) return type(x) == "table" and getmetatable(x) == Tensor end
tensor.is = is

--- Raise unless x is a tensor: "matmul: b must be a tensor, got 3".
function tensor.expect(op, name, x)
  if not is(x) then fail(op, "%s must be a tensor, got %s", name, show(x)) end
end
local expect = tensor.expect

-- `self` of a method called with a dot instead of a colon is the usual culprit, so the message says so
local function receiver(op, x)
  if not is(x) then fail(op, "must be called on a tensor (t:%s(...), with a colon), got %s", op, show(x)) end
end
tensor.receiver = receiver

--- An uninitialised tensor.
-- @tparam number dtype code
-- @tparam number dev device code
-- @tparam table dims numbers, dims[1..n], checked already
-- @tparam number n
function tensor.empty(dtype, dev, dims, n)
  local c = ctensor()
  c.dtype, c.device, c.ndim = dtype, dev, n
  for i = 1, n do c.shape[i - 1] = dims[i] end
  local status = C.lac_empty(c)
  if status ~= 0 then
    if recover(status) then status = C.lac_empty(c) end
    if status ~= 0 then raise(status) end
  end
  if flags.attention ~= 0 then attend() end
  return adopt(c)
end

--- An uninitialised contiguous tensor of t's shape.
function tensor.empty_like(t, dtype)
  local c = ctensor()
  local tc = t.c
  c.dtype, c.device, c.ndim = dtype or tc.dtype, tc.device, tc.ndim
  for i = 0, tc.ndim - 1 do c.shape[i] = tc.shape[i] end
  lib.call(C.lac_empty, c)
  return adopt(c)
end

-- ---- shapes -------------------------------------------------------------------------------------

local Size = {}
Size.__index = Size
function Size:__tostring() return "[" .. table.concat(self, " x ") .. "]" end
function Size.__eq(a, b)
  if #a ~= #b then return false end
  for i = 1, #a do
    if a[i] ~= b[i] then return false end
  end
  return true
end
function Size.__concat(a, b) return tostring(a) .. tostring(b) end

--- The shape as a table of numbers that prints as [2 x 3].
local function shape(t)
  local c, s = t.c, {}
  for i = 1, c.ndim do s[i] = tonumber(c.shape[i - 1]) end
  return setmetatable(s, Size)
end
tensor.shape = shape

--- Number of elements.
local function numel(t)
  local c, n = t.c, 1
  for i = 0, c.ndim - 1 do n = n * tonumber(c.shape[i]) end
  return n
end
tensor.numel = numel

--- Text for messages: "f32 [2 x 3] cpu".
local function describe(t)
  return ("%s %s %s"):format(dtype_name[t.c.dtype] or "?", tostring(shape(t)), device.name(t.c.device))
end
tensor.describe = describe
Tensor.__names = methods -- for completion, which never calls an __index function
function Tensor.__describe(t) return "Tensor " .. describe(t) end

--- Do two tensors have the same shape?
function tensor.same_shape(a, b)
  local x, y = a.c, b.c
  if x.ndim ~= y.ndim then return false end
  for i = 0, x.ndim - 1 do
    if x.shape[i] ~= y.shape[i] then return false end
  end
  return true
end

--- 0-based axis from a 1-based dim; negative counts from the end. `extra` allows positions past the last.
local function axis(op, t, dim, extra)
  local n = t.c.ndim + (extra or 0)
  if not is_integer(dim) then fail(op, "dim must be an integer, got %s", show(dim)) end
  local k = dim < 0 and dim + n or dim - 1
  if k < 0 or k >= n then
    fail(op, "dim %d is out of range for %s: %s", dim, Tensor.__describe(t),
         n == 0 and "it has no dimensions" or ("1 to %d, or -%d to -1"):format(n, n))
  end
  return k
end
tensor.axis = axis

-- Sizes that the last call of `sizes` parsed; a module-level buffer, so that a view makes no garbage.
local D = {}
tensor.sizes_buffer = D

--- Parse sizes given as numbers or as one table into tensor.sizes_buffer.
-- @tparam string op
-- @tparam boolean infer allow one -1
-- @treturn number how many
local function sizes(op, infer, a, b, c, d, e, f, g)
  local n
  if type(a) == "table" then
    if is(a) then fail(op, "expected sizes, got %s", show(a)) end
    if b ~= nil then fail(op, "sizes are numbers or one table, got %s after a table", show(b)) end
    n = #a
    for i = 1, math.min(n, MAX_DIMS) do D[i] = a[i] end
  else
    D[1], D[2], D[3], D[4], D[5], D[6] = a, b, c, d, e, f
    n = g ~= nil and 7 or f ~= nil and 6 or e ~= nil and 5 or d ~= nil and 4
      or c ~= nil and 3 or b ~= nil and 2 or a ~= nil and 1 or 0
  end
  if n > MAX_DIMS then fail(op, "a tensor has at most %d dimensions, got %d or more", MAX_DIMS, n) end
  local inferred = false
  for i = 1, n do
    local v = D[i]
    if not is_integer(v) then fail(op, "size %d must be an integer, got %s", i, show(v)) end
    if v < 0 then
      if not (infer and v == -1) then fail(op, "size %d must not be negative, got %s", i, show(v)) end
      if inferred then fail(op, "only one size can be -1") end
      inferred = true
    end
  end
  return n
end
tensor.sizes = sizes

local function sizes_text(n) return "[" .. table.concat(D, " x ", 1, n) .. "]" end

-- ---- raw views (no gradient; ops/ wraps them) ------------------------------------------------

--- Strides as if contiguous, into c, from its shape.
local function set_contiguous_strides(c)
  local step = 1LL
  for i = c.ndim - 1, 0, -1 do
    c.stride[i] = step
    if c.shape[i] > 1 then step = step * c.shape[i] end
  end
end

tensor.set_contiguous_strides = set_contiguous_strides

local function is_contiguous(c)
  local step = 1LL
  for i = c.ndim - 1, 0, -1 do
    local n = c.shape[i]
    if n == 0 then return true end
    if n ~= 1 then
      if c.stride[i] ~= step then return false end
      step = step * n
    end
  end
  return true
end

--- Is t laid out row-major without gaps?
function tensor.is_contiguous(t) return is_contiguous(t.c) end

--- A contiguous tensor with t's elements: t itself if it is contiguous already.
local function contiguous(t)
  if is_contiguous(t.c) then return t end
  local out = tensor.empty_like(t)
  lib.call(C.lac_copy, t.c, out.c)
  return out
end
tensor.contiguous = contiguous

-- Resolve a -1 in D[1..n] for t and check the number of elements.
local function resolve(op, t, n)
  local total, known, hole = numel(t), 1, nil
  for i = 1, n do
    if D[i] == -1 then hole = i else known = known * D[i] end
  end
  if hole then
    if known == 0 or total % known ~= 0 then
      fail(op, "%s: the size at -1 cannot be found: %d elements of %s do not divide by %d",
           sizes_text(n), total, Tensor.__describe(t), known)
    end
    D[hole] = total / known
  elseif known ~= total then
    fail(op, "shape %s has %.14g elements, %s has %d", sizes_text(n), known, Tensor.__describe(t), total)
  end
end

-- Strides that show view `old` with the shape D[1..n] without a copy, into c; false if there are none. Runs
-- of old axes that are contiguous with each other form a chunk; every new axis must fall inside one chunk.
local function regroup(old, c, n)
  local d = n              -- the next new axis to place, from the last
  local chunk = 1          -- elements of the current chunk of old axes
  local base               -- its innermost stride
  for i = old.ndim - 1, 0, -1 do
    local size = tonumber(old.shape[i])
    if size ~= 1 then
      if not base then base = tonumber(old.stride[i]) end
      chunk = chunk * size
      local outer = i - 1  -- the next old axis outwards that is not of size 1
      while outer >= 0 and old.shape[outer] == 1 do outer = outer - 1 end
      if outer < 0 or tonumber(old.stride[outer]) ~= base * chunk then
        local placed = 1
        while placed < chunk do
          if d < 1 or chunk % (placed * D[d]) ~= 0 then return false end
          c.stride[d - 1] = base * placed
          placed = placed * D[d]
          d = d - 1
        end
        chunk, base = 1, nil
      end
    end
  end
  while d >= 1 do          -- only sizes of 1 are left
    c.stride[d - 1] = 1
    d = d - 1
  end
  return true
end

--- View with the shape in D[1..n] (as `sizes` left it). Raises if a copy would be needed, unless `copy`.
function tensor.raw_view(op, t, n, copy)
  resolve(op, t, n)
  if not is_contiguous(t.c) then
    local v = alias(t)
    local c = v.c
    c.ndim = n
    for i = 1, n do c.shape[i - 1] = D[i] end
    if regroup(t.c, c, n) then return v end
    if not copy then
      fail(op, "%s with strides %s cannot be seen as %s without a copy; use reshape, or "
        .. "contiguous():view(...)", Tensor.__describe(t), tostring(t:stride()), sizes_text(n))
    end
    t = contiguous(t)
  end
  local v = alias(t)
  local c = v.c
  c.ndim = n
  for i = 1, n do c.shape[i - 1] = D[i] end
  set_contiguous_strides(c)
  return v
end

--- Swap two 0-based axes.
function tensor.raw_transpose(t, i, j)
  local v = alias(t)
  local c = v.c
  c.shape[i], c.shape[j] = c.shape[j], c.shape[i]
  c.stride[i], c.stride[j] = c.stride[j], c.stride[i]
  return v
end

--- Axes in the order order[1..ndim] (0-based axes of t).
function tensor.raw_permute(t, order)
  local v = alias(t)
  local c, old = v.c, t.c
  for i = 1, old.ndim do
    c.shape[i - 1], c.stride[i - 1] = old.shape[order[i]], old.stride[order[i]]
  end
  return v
end

--- Broadcast to the shape in D[1..n]; -1 keeps a size.
function tensor.raw_expand(op, t, n)
  local old = t.c
  local lead = n - old.ndim
  if lead < 0 then
    fail(op, "%s cannot be expanded to the %d dimensions of %s", Tensor.__describe(t), n, sizes_text(n))
  end
  local v = alias(t)
  local c = v.c
  c.ndim = n
  for i = n, 1, -1 do
    local k = i - 1 - lead
    local size = k >= 0 and tonumber(old.shape[k]) or 1
    local want = D[i]
    if want == -1 then
      if k < 0 then fail(op, "size %d is -1, but %s has no such dimension", i, Tensor.__describe(t)) end
      want = size
    end
    if want ~= size and size ~= 1 then
      fail(op, "%s cannot be expanded to %s: dimension %d has %d, not 1",
           Tensor.__describe(t), sizes_text(n), i, size)
    end
    c.shape[i - 1] = want
    c.stride[i - 1] = (k >= 0 and want == size) and old.stride[k] or 0
  end
  return v
end

--- The general slice: for each axis a 0-based start, a count and a step, or drop the axis.
-- @tparam Tensor t
-- @tparam table spec {start = {}, count = {}, step = {}, drop = {}}, lists over t's axes
function tensor.raw_slice(t, spec)
  local v = alias(t)
  local c, old = v.c, t.c
  local n = 0
  for i = 1, old.ndim do
    if spec.count[i] > 0 then c.offset = c.offset + spec.start[i] * old.stride[i - 1] end
    if not spec.drop[i] then
      c.shape[n] = spec.count[i]
      c.stride[n] = old.stride[i - 1] * spec.step[i]
      n = n + 1
    end
  end
  c.ndim = n
  return v
end

-- ---- host access --------------------------------------------------------------------------------

local POINTER = { [C.LAC_F64] = ffi.typeof("double *"), [C.LAC_F32] = ffi.typeof("float *"),
                  [C.LAC_F16] = ffi.typeof("uint16_t *"), [C.LAC_BF16] = ffi.typeof("uint16_t *"),
                  [C.LAC_I64] = ffi.typeof("int64_t *"), [C.LAC_I32] = ffi.typeof("int32_t *"),
                  [C.LAC_U8] = ffi.typeof("uint8_t *"), [C.LAC_BOOL] = ffi.typeof("uint8_t *") }
local address = ffi.new("void *[1]")

--- Typed pointer to element 0 (halves as uint16_t bits, bool as 0/1 bytes); valid while the tensor is alive.
local function pointer(t)
  lib.check(C.lac_tensor_data(t.c, address))
  return ffi.cast(POINTER[t.c.dtype], address[0])
end
tensor.pointer = pointer

--- A copy of t in another dtype (code), contiguous. Not differentiable.
function tensor.cast(t, dtype)
  local out = tensor.empty_like(t, dtype)
  lib.call(C.lac_copy, t.c, out.c)
  return out
end

-- A contiguous host tensor whose elements Lua can read: halves become f32.
local function readable(t)
  if t.c.device ~= C.LAC_CPU then t = tensor.to_host(t) end
  if t.c.dtype == C.LAC_F16 or t.c.dtype == C.LAC_BF16 then return tensor.cast(t, C.LAC_F32) end
  return contiguous(t)
end

--- A CPU copy of a tensor on another device.
function tensor.to_host(t)
  local c = ctensor()
  c.dtype, c.device, c.ndim = t.c.dtype, C.LAC_CPU, t.c.ndim
  for i = 0, t.c.ndim - 1 do c.shape[i] = t.c.shape[i] end
  lib.call(C.lac_empty, c)
  local out = adopt(c)
  lib.call(C.lac_copy, t.c, out.c)
  return out
end

local WORDS = ffi.typeof("const uint32_t *")
local NAN = 0 / 0

-- Is element i a NaN? Asked of its bits, because LuaJIT keeps its type tags in NaN payloads: loading a NaN
-- with arbitrary bits (from a file, from lac.empty) as a number would forge a value of another type.
local function is_nan_at(dtype, p, i)
  local words = ffi.cast(WORDS, p)
  if dtype == C.LAC_F32 then return bit.band(words[i], 0x7fffffff) > 0x7f800000 end
  local high = bit.band(words[2 * i + 1], 0x7fffffff)
  return high > 0x7ff00000 or (high == 0x7ff00000 and words[2 * i] ~= 0)
end

--- Element i (0-based) behind a pointer of methods.data as a Lua value; f16 and bf16 are not read this way.
-- int64 beyond 2^53 stays a cdata integer: a number would silently be another one.
local function element(dtype, p, i)
  if dtype <= C.LAC_F32 then return is_nan_at(dtype, p, i) and NAN or tonumber(p[i]) end
  local v = p[i]
  if dtype == C.LAC_BOOL then return v ~= 0 end
  if dtype == C.LAC_I64 and (v > 9007199254740992LL or v < -9007199254740992LL) then return v end
  return tonumber(v)
end
tensor.element = element

--- All elements in row-major order as a flat Lua list, for printing and tests.
function tensor.flat_list(t)
  local host = readable(t)
  local n, list = numel(host), {}
  if n == 0 then
    lib.check(C.lac_tensor_check(t.c))
    return list
  end
  local p, dtype = pointer(host), host.c.dtype
  for i = 0, n - 1 do list[i + 1] = element(dtype, p, i) end
  return list
end

--- Address of element 0, as a typed cdata pointer. The tensor must be contiguous to be walked by it.
-- @treturn cdata double*, float*, uint16_t* (bits of f16, bf16), int64_t*, int32_t* or uint8_t*
function methods.data(t)
  receiver("data", t)
  return pointer(t)
end

--- The bytes of the elements in row-major order, as a Lua string.
function methods.string(t)
  receiver("string", t)
  local host = contiguous(t.c.device == C.LAC_CPU and t or tensor.to_host(t))
  local n = numel(host)
  if n == 0 then return "" end
  return ffi.string(pointer(host), n * device.dtype_size[host.c.dtype])
end

--- The value of a tensor with one element.
-- @treturn number|boolean an int64 cdata when an i64 does not fit a double
function methods.item(t)
  receiver("item", t)
  if numel(t) ~= 1 then fail("item", "needs a tensor with one element, got %s", show(t)) end
  local host = readable(t)
  return element(host.c.dtype, pointer(host), 0)
end

--- The elements as nested Lua tables; a 0-dim tensor gives its value.
function methods.totable(t)
  receiver("totable", t)
  local s = shape(t)
  local flat, at = tensor.flat_list(t), 0
  local function build(d)
    if d > #s then
      at = at + 1
      return flat[at]
    end
    local list = {}
    for i = 1, s[d] do list[i] = build(d + 1) end
    return list
  end
  return build(1)
end

-- ---- properties ---------------------------------------------------------------------------------

--- The shape, or one size.
-- @tparam[opt] integer dim 1-based, negative from the end
-- @treturn table|number a table that prints as [2 x 3]
function methods.size(t, dim)
  receiver("size", t)
  if dim == nil then return shape(t) end
  return tonumber(t.c.shape[axis("size", t, dim)])
end

--- Strides in elements, or one of them.
function methods.stride(t, dim)
  receiver("stride", t)
  if dim ~= nil then return tonumber(t.c.stride[axis("stride", t, dim)]) end
  local s = {}
  for i = 1, t.c.ndim do s[i] = tonumber(t.c.stride[i - 1]) end
  return setmetatable(s, Size)
end

--- Number of dimensions.
function methods.dim(t)
  receiver("dim", t)
  return t.c.ndim
end

--- "f32", "f64", "f16", "bf16", "i64", "i32", "u8" or "bool".
function methods.dtype(t)
  receiver("dtype", t)
  return dtype_name[t.c.dtype]
end

--- "cpu" or "cuda:0".
function methods.device(t)
  receiver("device", t)
  return device.name(t.c.device)
end

--- Number of elements.
function methods.numel(t)
  receiver("numel", t)
  return numel(t)
end

--- Is the tensor row-major without gaps?
function methods.is_contiguous(t)
  receiver("is_contiguous", t)
  return is_contiguous(t.c)
end

--- Free the storage now. Later use of this tensor or of a view of it is an error; releasing twice is not.
function methods.release(t)
  receiver("release", t)
  if t.root ~= t then
    fail("release", "%s is a view; release the tensor that owns the storage", show(t))
  end
  lib.check(C.lac_tensor_release(t.c))
end

--- Was the storage released?
function methods.is_released(t)
  receiver("is_released", t)
  return C.lac_tensor_check(t.c) == lib.status.released
end

--- Tell the tape that the engine has written to t behind its back (optimizers): a graph that saved t is
-- invalid from now on.
function tensor.touch(t)
  local root = t.root
  root.version = root.version + 1
end

-- ---- fields -------------------------------------------------------------------------------------

local function field_names()
  local names = schema.keys(methods)
  for name in pairs(OPTIONAL) do names[#names + 1] = name end
  names[#names + 1] = "requires_grad"
  return names
end

-- of a name that only its form in place is missing of: write the result, if there is one that fits
local words = setmetatable({}, { __index = function(_, key)
  local word, plain = synonyms.tensor[key], key:match("^(.+)_$")
  if word or not plain then return word end
  word = synonyms.tensor[plain]
  if word and word:sub(1, 1) == ";" then return word end
  return synonyms.in_place[plain] and ("x:copy_(%s)"):format(word or ("x:%s(...)"):format(plain)) or nil
end })

local function special(t, key)
  local kind = type(key)
  if kind == "string" then
    if OPTIONAL[key] then return nil end
    fail("tensor", "there is no field or method '%s'%s", key,
         schema.hint(key, field_names(), nil, words))
  end
  return tensor.get(t, key) -- ops/view.lua
end

function Tensor.__index(t, key)
  local method = methods[key]
  if method ~= nil then return method end
  return special(t, key)
end

function Tensor.__newindex(t, key, value)
  if type(key) ~= "string" then return tensor.set(t, key, value) end -- ops/inplace.lua
  if key == "grad" and value ~= nil then
    expect("grad", "the gradient", value)
    if not tensor.same_shape(t, value) or t.c.dtype ~= value.c.dtype or t.c.device ~= value.c.device then
      fail("grad", "a gradient has its tensor's shape, dtype and device: %s against %s", show(value), show(t))
    end
  elseif not OPTIONAL[key] and not FIXED[key] then
    fail("tensor", "there is no field '%s' to set%s (grad, name, t[position])", key,
         schema.hint(key, field_names()))
  end
  rawset(t, key, value)
end

return tensor
