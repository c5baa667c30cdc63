--- Indexing, joining, dropout, and comparisons of whole tensors.
--
-- index_select, gather and embedding take index TENSORS, whose contents are 0-based data (token ids come from
-- files); numbers given as positions are 1-based. Their gradients add rows in a fixed order in the engine, so
-- that training is deterministic. cat and stack copy each part once into the result; their gradients are
-- views. dropout draws from the global Philox stream and repeats its draw in the backward: no mask is stored.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops.base"

local C = lib.C
local call = lib.call
local fail, show, is_integer = schema.fail, schema.show, schema.is_integer
local is, adopt, expect, receiver = tensor.is, tensor.adopt, tensor.expect, tensor.receiver
local tape, methods, axis, same_shape = tensor.tape, tensor.methods, tensor.axis, tensor.same_shape
local shape, numel = tensor.shape, tensor.numel
local fn = ops.fn
local internal = ops.internal
local record1, record2, record = internal.record1, internal.record2, internal.record
local wants, new, sum_to, raw_map2 = internal.wants, internal.new, internal.sum_to, internal.raw_map2
local raw_reduce, scalar_like, define = internal.raw_reduce, internal.scalar_like, internal.define
local as_number, map_id, whole = internal.as_number, internal.map_id, internal.whole

-- ---- indexing -----------------------------------------------------------------------------------

local function define_index(name, forward, backward)
  local op = { name = name, saves = "b" }
  -- called: what messages begin with
  local function run(called, x, dim, idx)
    expect(called, "x", x)
    expect(called, "idx", idx)
    local k = axis(called, x, dim)
    local c = new()
    lib.call_as(called, name, C[forward], x.c, k, idx.c, c)
    local out = adopt(c)
    if wants(x) then
      record2(op, out, x, idx)
      out.node.k = k
    end
    return out
  end
  function op.forward(x, dim, idx) return run(name, x, dim, idx) end
  function op.backward(node, g)
    local c = new()
    call(C[backward], g.c, node.k, node.b.c, node.a.c.shape[node.k], c)
    return adopt(c)
  end
  op.run = run
  define(op)
end
--- index_select(x, dim, idx): rows of x along dim at the 0-based positions in idx, whose shape replaces
-- the dim.
define_index("index_select", "lac_index_select", "lac_index_select_bwd")
--- gather(x, dim, idx): elementwise along dim; idx (0-based values) has x's rank and the result's shape.
define_index("gather", "lac_gather", "lac_gather_bwd")

--- Rows of weight [V, E] at the 0-based ids in idx [...] -> [..., E].
define { name = "embedding", composite = true, forward = function(weight, idx)
  expect("embedding", "weight", weight)
  expect("embedding", "idx", idx)
  if weight.c.ndim ~= 2 then fail("embedding", "weight must be [V, E], got %s", show(weight)) end
  return ops.table.index_select.run("embedding", weight, 1, idx)
end }

local where_op = { name = "where", saves = "a" }
--- x where cond is true, else y; all broadcast; x or y may be numbers.
function where_op.forward(cond, x, y)
  expect("where", "cond", cond)
  x, y = as_number(x), as_number(y)
  if type(x) == "number" and type(y) == "number" then
    local o = { device = device.name(cond.c.device) }
    x, y = create.tensor(x, o), create.tensor(y, o)
  elseif type(x) == "number" and is(y) then
    x = scalar_like(x, y)
  elseif type(y) == "number" and is(x) then
    y = scalar_like(y, x)
  end
  expect("where", "x", x)
  expect("where", "y", y)
  local c = new()
  call(C.lac_where, cond.c, x.c, y.c, c)
  local out = adopt(c)
  if wants(x, y) then record(where_op, out, cond, x, y) end
  return out
end
function where_op.backward(node, g)
  local cond, x, y = node.a, node.b, node.c
  local zero = scalar_like(0, g)
  local gx, gy
  if x.requires_grad then
    local c = new()
    call(C.lac_where, cond.c, g.c, zero.c, c)
    gx = sum_to(adopt(c), x)
  end
  if y.requires_grad then
    local c = new()
    call(C.lac_where, cond.c, zero.c, g.c, c)
    gy = sum_to(adopt(c), y)
  end
  return nil, gx, gy
end
define(where_op)

--- x with `value` (a number) where mask is true.
define { name = "masked_fill", composite = true, forward = function(x, mask, value)
  expect("masked_fill", "x", x)
  expect("masked_fill", "mask", mask)
  if mask.c.dtype ~= C.LAC_BOOL then
    fail("masked_fill", "mask must be bool, got %s; compare it first", show(mask))
  end
  value = as_number(value)
  if type(value) ~= "number" then fail("masked_fill", "value must be a number, got %s", show(value)) end
  local out = fn.where(mask, value, x)
  if not same_shape(out, x) then
    fail("masked_fill", "mask %s does not broadcast to x %s", show(mask), show(x))
  end
  return out
end }

local function triangle(name, compare)
  define { name = name, composite = true, forward = function(x, k)
    expect(name, "x", x)
    k = k == nil and 0 or k
    if not is_integer(k) then fail(name, "the diagonal must be an integer, got %s", show(k)) end
    if x.c.ndim < 2 then fail(name, "needs 2 dimensions or more, got %s", show(x)) end
    local dev = device.name(x.c.device)
    local rows_at = create.arange { k, k + x:size(-2), dtype = "i64", device = dev }:view(x:size(-2), 1)
    local columns = create.arange { x:size(-1), dtype = "i64", device = dev }
    return fn.where(compare(columns, rows_at), x, 0)
  end }
end
--- Lower triangle of the last two dimensions; the rest is 0. k shifts the diagonal to the right.
triangle("tril", fn.le)
--- Upper triangle.
triangle("triu", fn.ge)

--- [..., classes] with 1 at the 0-based class of idx.
-- @tparam Tensor idx i64 or i32 @tparam integer classes @tparam[opt] table options dtype (the default dtype)
define { name = "one_hot", nondifferentiable = true, forward = function(idx, classes, options)
  expect("one_hot", "idx", idx)
  schema.check("one_hot", "classes", classes, { type = "integer", min = 1 })
  local o = schema.options("one_hot", options, { dtype = { type = "string" } })
  local code = idx.c.dtype
  if code ~= C.LAC_I64 and code ~= C.LAC_I32 then
    fail("one_hot", "idx must be i64 or i32, got %s", show(idx))
  end
  if numel(idx) > 0 then
    local low = raw_reduce(C.LAC_MIN, idx, 0, false):item()
    local high = raw_reduce(C.LAC_MAX, idx, 0, false):item()
    if low < 0 or high >= classes then
      fail("one_hot", "class %s is outside 0 to %d", show(low < 0 and low or high), classes - 1)
    end
  end
  local range = create.arange { classes, dtype = device.dtype_name[code], device = device.name(idx.c.device) }
  local hot = fn.eq(fn.unsqueeze(tensor.alias(idx), -1), range)
  return tensor.cast(hot, device.dtype("one_hot", o.dtype))
end }

-- ---- joining ------------------------------------------------------------------------------------

local function check_list(op, list)
  if type(list) ~= "table" or is(list) then fail(op, "expected a list of tensors, got %s", show(list)) end
  if #list == 0 then fail(op, "the list of tensors is empty") end
  for i = 1, #list do
    if not is(list[i]) then fail(op, "element %d of the list must be a tensor, got %s", i, show(list[i])) end
    if list[i].c.dtype ~= list[1].c.dtype or list[i].c.device ~= list[1].c.device then
      fail(op, "tensors differ in dtype or device: 1 is %s, %d is %s", show(list[1]), i, show(list[i]))
    end
  end
end

local cat_op = { name = "cat", method = false }
--- Join tensors along dim (1 unless given).
function cat_op.forward(list, dim)
  check_list("cat", list)
  local first = list[1]
  local k = axis("cat", first, dim == nil and 1 or dim)
  local total, wanted = 0, false
  for i = 1, #list do
    local c = list[i].c
    local fits = c.ndim == first.c.ndim
    for d = 0, c.ndim - 1 do fits = fits and (d == k or c.shape[d] == first.c.shape[d]) end
    if not fits then
      fail("cat", "tensors must agree except in dim %d: 1 is %s, %d is %s", k + 1, show(first), i,
           show(list[i]))
    end
    total = total + tonumber(c.shape[k])
    wanted = wanted or list[i].requires_grad
  end
  local sizes = shape(first)
  sizes[k + 1] = total
  local out = tensor.empty(first.c.dtype, first.c.device, sizes, #sizes)
  local spec, inputs = whole(out), {}
  for i = 1, #list do
    spec.count[k + 1] = tonumber(list[i].c.shape[k])
    if numel(list[i]) > 0 then call(C.lac_copy, list[i].c, tensor.raw_slice(out, spec).c) end
    spec.start[k + 1] = spec.start[k + 1] + spec.count[k + 1]
    inputs[i] = list[i]
  end
  if wanted and tape.enabled then
    local node = record(cat_op, out)
    node.list, node.k = inputs, k
  end
  return out
end
cat_op.alias = true
function cat_op.backward(node, g)
  local spec, k, grads = whole(g), node.k + 1, {}
  for i = 1, #node.list do
    spec.count[k] = tonumber(node.list[i].c.shape[node.k])
    grads[i] = tensor.raw_slice(g, spec)
    spec.start[k] = spec.start[k] + spec.count[k]
  end
  return grads
end
define(cat_op)

--- Join tensors of one shape along a new dimension dim (1 unless given).
define { name = "stack", composite = true, method = false, forward = function(list, dim)
  check_list("stack", list)
  dim = dim == nil and 1 or dim
  local parts = {}
  for i = 1, #list do
    if not same_shape(list[i], list[1]) then
      fail("stack", "tensors must have one shape: 1 is %s, %d is %s", show(list[1]), i, show(list[i]))
    end
    parts[i] = fn.unsqueeze(list[i], dim)
  end
  return fn.cat(parts, dim)
end }

local MAX_PARTS = 2 ^ 20 -- tensors in one Lua table: beyond this it is a mistake

--- Views of consecutive parts along dim (1): a size (the last part may be shorter, the one part of
-- an empty dim is empty) or a list of sizes that
-- sum to the dim.
define { name = "split", composite = true, forward = function(x, size, dim)
  receiver("split", x)
  dim = dim == nil and 1 or dim
  local total = tonumber(x.c.shape[axis("split", x, dim)])
  local sizes = size
  if type(size) ~= "table" then
    schema.check("split", "size", size == nil and false or size, { type = "integer", min = 1 })
    sizes = {}
    if total / size > MAX_PARTS then
      fail("split", "size %d cuts dimension %d of %d into more than %d parts", size, dim, total, MAX_PARTS)
    end
    for at = 0, total - 1, size do sizes[#sizes + 1] = math.min(size, total - at) end
    if total == 0 then sizes[1] = 0 end -- the parts join to x again
  end
  local parts, at = {}, 1
  local sum = 0
  for i = 1, #sizes do
    if not is_integer(sizes[i]) or sizes[i] < 0 then
      fail("split", "size %d must be an integer, got %s", i, show(sizes[i]))
    end
    sum = sum + sizes[i]
  end
  if sum ~= total then
    fail("split", "sizes %s sum to %d, dimension %d has %d", show(sizes), sum, dim, total)
  end
  for i = 1, #sizes do
    parts[i] = fn.narrow(x, dim, at, sizes[i])
    at = at + sizes[i]
  end
  return parts
end }

--- n views of nearly equal parts along dim (1); fewer when the dim is smaller than n.
define { name = "chunk", composite = true, forward = function(x, n, dim)
  receiver("chunk", x)
  schema.check("chunk", "n", n == nil and false or n, { type = "integer", min = 1 })
  local total = tonumber(x.c.shape[axis("chunk", x, dim == nil and 1 or dim)])
  return (fn.split(x, math.max(1, math.ceil(total / n)), dim))
end }

-- ---- random -----------------------------------------------------------------------

local dropout_op = { name = "dropout" }
--- In training: zero elements with probability p and scale the others by 1/(1-p). Otherwise x itself.
-- @tparam Tensor x @tparam number p in [0, 1) @tparam[opt] boolean training true unless given
function dropout_op.forward(x, p, training)
  expect("dropout", "x", x)
  if type(p) ~= "number" or not (p >= 0 and p < 1) then
    fail("dropout", "p must be in [0, 1), got %s", show(p))
  end
  if training ~= nil and type(training) ~= "boolean" then
    fail("dropout", "training must be true or false, got %s", show(training))
  end
  if training == false or p == 0 then return x end
  local seed, offset = create.draw()
  local c = new()
  call(C.lac_dropout, x.c, p, seed, offset, c)
  local out = adopt(c)
  if wants(x) then
    record1(dropout_op, out, x)
    local node = out.node
    node.p, node.seed, node.offset = p, seed, offset
  end
  return out
end
function dropout_op.backward(node, g)
  local c = new()
  call(C.lac_dropout, g.c, node.p, node.seed, node.offset, c)
  return adopt(c)
end
define(dropout_op)

-- ---- comparisons of whole tensors ---------------------------------------------------------------

--- Same shape, dtype and elements? (NaN differs from NaN.)
function fn.equal(a, b)
  expect("equal", "a", a)
  expect("equal", "b", b)
  if not same_shape(a, b) or a.c.dtype ~= b.c.dtype or a.c.device ~= b.c.device then return false end
  if numel(a) == 0 then return true end
  return raw_reduce(C.LAC_ALL, raw_map2(map_id.eq, a, b), 0, false):item()
end
methods.equal = fn.equal

--- Is |a - b| <= atol + rtol |b| everywhere? Equal infinities are close. rtol 1e-5, atol 1e-8 unless given.
function fn.allclose(a, b, options)
  expect("allclose", "a", a)
  expect("allclose", "b", b)
  local o = schema.options("allclose", options, { rtol = { type = "number", min = 0, default = 1e-5 },
                                                  atol = { type = "number", min = 0, default = 1e-8 } })
  if not same_shape(a, b) then fail("allclose", "shapes differ: a is %s, b is %s", show(a), show(b)) end
  local x, y = tensor.flat_list(a), tensor.flat_list(b)
  for i = 1, #x do
    if x[i] ~= y[i] then
      local p, q = as_number(x[i]), as_number(y[i]) -- integers beyond 2^53 are cdata
      local far, scale = math.abs(tonumber(p - q)), math.abs(tonumber(q))
      local close = far < math.huge and far <= o.atol + o.rtol * scale -- false for NaN
      if not close then return false end
    end
  end
  return true
end
methods.allclose = fn.allclose
