--- Writing in place, and assignment to slices.
--
-- In-place operators exist for data and optimisers, not for models: outside no_grad a tensor that is on the
-- tape refuses them, and each write counts up the version of the storage's owner, so that a backward that
-- needs the old values says so instead of giving a wrong gradient. Expanded views refuse writes, because
-- several elements share memory.
--
-- Rejected: differentiable in-place operators, which save one copy and need a second tape.

local lib = require "lacuna.lib"
local arguments = require "lacuna.arguments"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops.base"

local C = lib.C
local call_as = lib.call_as
local fail, show = schema.fail, schema.show
local is, expect, receiver, tape = tensor.is, tensor.expect, tensor.receiver, tensor.tape
local methods, same_shape, shape = tensor.methods, tensor.same_shape, tensor.shape
local contiguous = tensor.contiguous
local fn = ops.fn
local internal = ops.internal
local as_number, index_spec, check_mask = internal.as_number, internal.index_spec, internal.check_mask

-- ---- writing in place ---------------------------------------------------------------------------

local function writable(op, t, source)
  if not is(t) then receiver(op, t) end
  local c = t.c
  for i = 0, c.ndim - 1 do
    if c.stride[i] == 0 and c.shape[i] > 1 then
      fail(op, "%s is an expanded view, several of its elements share memory; make it contiguous() first",
           show(t))
    end
  end
  if tape.enabled then
    if t.requires_grad then
      fail(op, "%s requires a gradient, so it cannot be changed in place while gradients are recorded; "
        .. "use the function that returns a new tensor, or lac.no_grad", show(t))
    end
    if source and source.requires_grad then
      fail(op, "writing %s, which requires a gradient, into a tensor in place would lose the gradient; "
        .. "use lac.where, lac.cat or lac.stack, or detach() it", show(source))
    end
  end
end
ops.writable = writable

local touch = tensor.touch

local function write_copy(op, t, source)
  -- a source that shares storage is copied first: the engine refuses overlapping arguments
  if source.root == t.root then source = tensor.cast(source, source.c.dtype) end
  if source.c.dtype ~= t.c.dtype and device.is_float(source.c.dtype) and not device.is_float(t.c.dtype) then
    fail(op, "%s does not fit into %s; convert it with to{dtype=} first", show(source), show(t))
  end
  call_as(op, "copy", C.lac_copy, source.c, t.c)
  touch(t)
  return t
end

local function copy_into(op, t, source)
  if type(source) == "table" and not is(source) then
    source = create.tensor(source, { dtype = device.dtype_name[t.c.dtype] })
  end
  expect(op, "source", source)
  writable(op, t, source)
  return write_copy(op, t, source)
end

--- Write source (a tensor that broadcasts to t, a number, or nested tables) into t; dtypes are converted.
function methods.copy_(t, source)
  receiver("copy_", t)
  if type(source) == "number" or type(source) == "boolean" then return methods.fill_(t, source) end
  return copy_into("copy_", t, source)
end

--- Set every element to a number.
function methods.fill_(t, value)
  receiver("fill_", t)
  value = as_number(value)
  if type(value) ~= "number" then
    fail("fill_", "value must be a number or a boolean, got %s", show(value))
  end
  writable("fill_", t)
  call_as("fill_", "fill", C.lac_fill, t.c, value)
  touch(t)
  return t
end

--- Set every element to 0.
function methods.zero_(t)
  receiver("zero_", t)
  return methods.fill_(t, 0)
end

-- name_ (t, y, ...): t becomes name(t, y, ...), which must have t's shape and dtype
local function in_place(name)
  local f = arguments.exact(name, fn[name])
  local op = name .. "_"
  methods[op] = function(t, y, z, w)
    receiver(op, t)
    writable(op, t, is(y) and y or nil)
    if is(z) then writable(op, t, z) end
    if is(w) then writable(op, t, w) end
    local enabled = tape.enabled
    tape.enabled = false
    local ok, out = pcall(f, t, y, z, w)
    tape.enabled = enabled
    if not ok then error(out, 0) end
    if not same_shape(out, t) then
      fail(op, "the result %s does not have the shape of %s", show(out), show(t))
    end
    if out.c.dtype ~= t.c.dtype then
      fail(op, "the result %s does not have the dtype of %s", show(out), show(t))
    end
    call_as(op, "copy", C.lac_copy, out.c, t.c)
    touch(t)
    return t
  end
end

-- the elementwise functions that PyTorch has in place too
local IN_PLACE = [[
  add sub mul div pow mod fmod floor_divide maximum minimum copysign atan2 hypot xlogy lerp addcmul addcdiv
  clamp neg abs sign square sqrt rsqrt recip floor ceil round trunc frac exp exp2 expm1 log log2 log10 log1p
  sin cos tan asin acos atan sinh cosh asinh acosh atanh sinc erf erfc logit nan_to_num
  tanh sigmoid relu relu6 silu gelu mish softplus leaky_relu elu celu selu hardtanh hardsigmoid hardswish
  threshold bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift
  logical_and logical_or logical_xor logical_not
]]
for name in IN_PLACE:gmatch("[%w_]+") do in_place(name) end

local general_add, general_mul = methods.add_, methods.mul_

--- t += alpha * x, in place, for float tensors in one pass.
function methods.add_(t, x, alpha)
  receiver("add_", t)
  if type(alpha) ~= "nil" and type(alpha) ~= "number" then -- a NULL pointer equals nil
    fail("add_", "alpha must be a number, got %s", show(alpha))
  end
  if is(x) and device.is_float(t.c.dtype) and x.c.dtype == t.c.dtype and x.root ~= t.root then
    writable("add_", t, x)
    call_as("add_", "axpy", C.lac_axpy, alpha or 1, x.c, t.c)
    touch(t)
    return t
  end
  if alpha and alpha ~= 1 then
    if type(x) == "number" then x = alpha * x else x = fn.mul(x, alpha) end
  end
  return (general_add(t, x))
end

--- t *= x in place.
function methods.mul_(t, x)
  receiver("mul_", t)
  if type(x) == "number" and device.is_float(t.c.dtype) then
    writable("mul_", t)
    call_as("mul_", "scale", C.lac_scale, x, t.c)
    touch(t)
    return t
  end
  return (general_mul(t, x))
end

local function fill_random(op, kind, t, a, b)
  receiver(op, t)
  if type(a) ~= "number" or type(b) ~= "number" or a ~= a or b ~= b then
    fail(op, "takes two numbers, got %s and %s", show(a), show(b))
  end
  writable(op, t)
  create.random(t, kind, a, b)
  touch(t)
  return t
end

--- Fill with normal numbers (mean 0, deviation 1 unless given).
function methods.normal_(t, mean, std)
  return (fill_random("normal_", C.LAC_NORMAL, t, mean == nil and 0 or mean, std == nil and 1 or std))
end

--- Fill with uniform numbers in [low, high), by default [0, 1).
function methods.uniform_(t, low, high)
  return (fill_random("uniform_", C.LAC_UNIFORM, t, low == nil and 0 or low, high == nil and 1 or high))
end

--- Fill with ones with probability p, else zeros.
function methods.bernoulli_(t, p)
  if type(p) ~= "number" or not (p >= 0 and p <= 1) then
    fail("bernoulli_", "p must be in [0, 1], got %s", show(p))
  end
  return (fill_random("bernoulli_", C.LAC_BERNOULLI, t, p, 0))
end

-- t[idx] = value for 0-based rows idx of any shape: value broadcasts to [idx's sizes, t's other sizes]; the
-- last of equal rows stays
local function set_rows(t, idx, value)
  if t.c.ndim == 0 then fail("index", "%s has no dimensions to index", show(t)) end
  local sizes, count, rest = shape(idx), tensor.numel(idx), shape(t)
  for i = 2, #rest do sizes[#sizes + 1] = rest[i] end
  rest[1] = count
  if not is(value) then value = create.tensor(value, { dtype = device.dtype_name[t.c.dtype] }) end
  if value.c.dtype ~= t.c.dtype then value = tensor.cast(value, t.c.dtype) end
  local enabled = tape.enabled
  tape.enabled = false
  local ok, source = pcall(function() return fn.reshape(fn.expand(value, sizes), rest) end)
  tape.enabled = enabled
  if not ok then error(source, 0) end
  if source.root == t.root then source = tensor.cast(source, source.c.dtype) end
  local rows = fn.reshape(tensor.alias(idx), count)
  call_as("index assignment", "index_put", C.lac_index_put, t.c, 0, rows.c, source.c, 0, 1)
  touch(t)
end

--- t[key] = value, keys as for reading; value a number, a tensor that broadcasts, or nested tables.
function tensor.set(t, key, value)
  if value == nil then fail("index", "cannot assign nil to a part of %s", show(t)) end
  if is(key) then
    writable("index assignment", t, is(value) and value or nil)
    if key.c.dtype ~= C.LAC_BOOL then
      set_rows(t, key, value)
      return
    end
    check_mask(t, key)
    local sizes = shape(key)
    for i = #sizes + 1, t.c.ndim do sizes[i] = 1 end
    local filled = tape.enabled
    tape.enabled = false
    local ok, out = pcall(fn.where, fn.view(contiguous(key), sizes), value, t)
    tape.enabled = filled
    if not ok then error(out, 0) end
    if not same_shape(out, t) then fail("index", "the value %s does not fit %s", show(value), show(t)) end
    write_copy("index assignment", t, out)
    return
  end
  if t.requires_grad or (is(value) and value.requires_grad) then
    writable("index assignment", t, is(value) and value or nil)
  end
  local part = tensor.raw_slice(t, index_spec(t, key))
  if type(value) == "number" or type(value) == "boolean" then methods.fill_(part, value)
  else copy_into("index assignment", part, value) end
end
