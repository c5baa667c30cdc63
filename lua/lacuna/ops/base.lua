--- The tape's records and what every file of operators builds on.
--
-- A record is { name, forward, backward, saves }. `forward` is the function users call, as lac.name(x, ...)
-- and as x:name(...). `backward(node, g)` returns the gradients of the inputs node.a, node.b, node.c, node.d
-- (or a list, for node.list); it also gets the gradients of further outputs and whether the graph is
-- retained. `saves` names by letters which of them the rule reads ("abo": a, b and the output o); grad.lua
-- refuses a backward whose saved tensors were changed in place. `alias = true` marks rules that may return g
-- itself or a view of it, so that grad.lua copies before it writes; `spends = true` those of two outputs that
-- never return the second one's gradient. A composite (no backward) is written with other operators and
-- inherits their rules.
--
-- ops.internal is for the files of this package: helpers without gradients, and what one file of operators
-- needs of another. Everything else of `ops` is public to the library.

local lib = require "lacuna.lib"
local tensor = require "lacuna.tensor"

local C, call = lib.C, lib.call
local adopt, tape, methods, same_shape = tensor.adopt, tensor.tape, tensor.methods, tensor.same_shape
local ctensor, D = tensor.ctype, tensor.sizes_buffer

-- The compiler cannot record the first use of a C symbol, and a loop may be recorded on its first turn: the
-- symbols of the hot path are resolved now.
for _, name in ipairs { "lac_map1", "lac_map2", "lac_map2_scalar", "lac_matmul", "lac_empty", "lac_copy" } do
  local _ = C[name]
end

--- ops.table: record by name. ops.fn: the function of every operator by name.
local ops = { table = {}, fn = {} }
local fn = ops.fn

local function define(record)
  local saves = record.saves or ""
  for letter in ("abcdo"):gmatch(".") do record["save_" .. letter] = saves:find(letter, 1, true) ~= nil end
  ops.table[record.name] = record
  fn[record.name] = record.forward
  if record.method ~= false then methods[record.name] = record.forward end
  return record
end
ops.define = define

-- ---- the tape -----------------------------------------------------------------------------------
-- A node: op, inputs a b c d (or list), their versions when recorded, the output o, and the walker's fields g
-- (pending gradient) and n (edges not yet delivered). Input-less slots are false.

local function record1(op, out, a)
  out.requires_grad = true
  out.node = { op = op, a = a, b = false, o = out, va = a.root.version, vb = 0, g = false, n = 0 }
end

local function record2(op, out, a, b)
  out.requires_grad = true
  out.node = { op = op, a = a, b = b, o = out, va = a.root.version, vb = b.root.version, g = false, n = 0 }
end

local function version(t) return t and t.root.version or 0 end

local function record(op, out, a, b, c, d)
  out.requires_grad = true
  local node = { op = op, a = a or false, b = b or false, c = c or false, d = d or false, o = out,
                 va = version(a), vb = version(b), vc = version(c), vd = version(d), g = false, n = 0 }
  out.node = node
  return node
end
ops.record = record

--- Should an operator on these inputs be recorded?
local function wants(a, b, c, d)
  return tape.enabled and ((a and a.requires_grad) or (b and b.requires_grad) or (c and c.requires_grad)
    or (d and d.requires_grad)) or false
end
ops.wants = wants

-- ---- values between operators --------------------------------------------------------------------
-- Lua has no reference counts, so what the tape holds lives until its scope ends, unless a module says that a
-- value of its forward is nobody else's. Only modules of the library do, of values that never leave them;
-- what the script can see stays as it is.

--- t, from which `by` was made, will not be read again but by rules: the backward gives its memory back as
-- soon as none of them needs it, and if nothing is recorded it goes at once. `input`: what the module was
-- called with; that is the caller's and stays (a submodule may have returned it as it is).
function ops.transient(t, by, input)
  if t.root ~= t or by.root == t or (input and input.root == t) then return end
  local node = t.node
  if node then
    if not tape.enabled then return end
    if node.o == t then
      node.transient = true
    elseif node.outputs and node.outputs[t.slot] == t then
      node.fleeting = t
    end
  elseif not t.requires_grad and not by.requires_grad then
    C.lac_tensor_release(t.c)
  end
end

local function reads(node, t)
  local op = node.op
  if node.list or (node.saved and node.saved[1]) then return true end
  return (node.a and node.a.root == t and op.save_a) or (node.b and node.b.root == t and op.save_b)
    or (node.c and node.c.root == t and op.save_c) or (node.d and node.d.root == t and op.save_d)
end

--- As transient, where the operator that made `by` is the only one that t has been given to: if its rule does
-- not read t, and the rule that t came from does not either, the memory goes at once.
function ops.passed(t, by, input)
  local node, producer = by.node, t.node
  if node and producer and t.root == t and not (input and input.root == t) and by.root ~= t
    and not producer.op.save_o and not t.hooks and not t.retains and not reads(node, t) then
    C.lac_tensor_release(t.c)
  else
    ops.transient(t, by, input)
  end
end

-- ---- helpers for rules: no gradients inside -----------------------------------------------------

local function new() return ctensor() end

local function sum_to(x, like)
  if same_shape(x, like) then return x end
  local c = ctensor()
  call(C.lac_sum_to, x.c, like.c, c)
  return adopt(c)
end
ops.sum_to = sum_to

local function raw_map1(id, x)
  local c = ctensor()
  call(C.lac_map1, id, x.c, c)
  return adopt(c)
end

local function raw_map2(id, x, y)
  local c = ctensor()
  call(C.lac_map2, id, x.c, y.c, c)
  return adopt(c)
end

local function raw_scalar(id, x, y)
  local c = ctensor()
  call(C.lac_map2_scalar, id, x.c, y, 0, c)
  return adopt(c)
end

local function raw_matmul(a, b, bias)
  local c = ctensor()
  call(C.lac_matmul, a.c, b.c, bias and bias.c or nil, c)
  return adopt(c)
end

local function raw_reduce(kind, x, mask, keep)
  local c = ctensor()
  call(C.lac_reduce, kind, x.c, mask, keep and 1 or 0, c)
  return adopt(c)
end

local function scalar_like(value, t)
  local c = ctensor()
  c.dtype, c.device, c.ndim = t.c.dtype, t.c.device, 0
  call(C.lac_empty, c)
  local out = adopt(c)
  call(C.lac_fill, out.c, value)
  return out
end

-- a tensor that a rule reads and that is no input of the node: changes of it are detected
local function remember(node, t)
  node.saved, node.saved_versions = { t }, { t.root.version }
end

-- what `op` took from x along axis k, and from where (both fresh): the tensors; then such operators' rule
local function finish_taken(op, x, k, values, index)
  values, index = adopt(values), adopt(index)
  if wants(x) then
    record1(op, values, x)
    values.node.k, values.node.positions = k, index
    remember(values.node, index)
  end
  return values, index
end
local function at_positions(node, g)
  local c = ctensor()
  call(C.lac_gather_bwd, g.c, node.k, node.positions.c, node.a.c.shape[node.k], c)
  return adopt(c)
end

-- the gradient of t that other rules have left, if a rule may add its own to it in place: nobody else holds
-- it (`own`, grad.lua)
local function pending(t)
  local node, slot = t.node, t.slot or 1
  if not node then return nil end
  local g, own = node.g, node.own
  if slot > 1 then
    local more = node.more
    g, own = more and more[slot], more and more[-slot]
  end
  return own and g and tensor.is_contiguous(g) and g or nil
end

local function zeros_like(t)
  local z = tensor.empty_like(t)
  call(C.lac_fill, z.c, 0)
  return z
end
ops.raw_zeros_like = zeros_like

local function full_like(t, value)
  local z = tensor.empty_like(t)
  call(C.lac_fill, z.c, value)
  return z
end

-- D[1..n] := the shape of t
local function load_sizes(t)
  local c = t.c
  for i = 1, c.ndim do D[i] = tonumber(c.shape[i - 1]) end
  return c.ndim
end

-- t's elements in the shape of `like` (same number of elements); a view if possible
local function reshape_like(t, like)
  if same_shape(t, like) then return t end
  return tensor.raw_view("reshape", t, load_sizes(like), true)
end

ops.internal = {
  record1 = record1, record2 = record2, record = record, wants = wants, new = new, sum_to = sum_to,
  raw_map1 = raw_map1, raw_map2 = raw_map2, raw_scalar = raw_scalar, raw_matmul = raw_matmul,
  raw_reduce = raw_reduce, scalar_like = scalar_like, remember = remember, zeros_like = zeros_like,
  full_like = full_like, pending = pending, load_sizes = load_sizes, reshape_like = reshape_like,
  define = define, finish_taken = finish_taken, at_positions = at_positions,
}

return ops
