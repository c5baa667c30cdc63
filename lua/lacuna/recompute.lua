--- recompute.lua: lac.checkpoint, which trades activations for a second forward pass.
--
-- lac.checkpoint(fn, ...) gives fn(...), but keeps only the arguments for the backward pass: what fn makes on
-- the way is released at once, and made again when its gradient is wanted (Chen et al. 2016, arXiv
-- 1604.06174). A model of L blocks then holds L inputs and the activations of one block instead of L blocks,
-- for about a third more arithmetic. The gradients are the same, bit for bit: the operators are
-- deterministic, and the random stream is set back to where it was, so dropout draws the same bits.
--
-- The forward pass runs with the tape on, in a scope. The tape is what tells whether the results depend on
-- anything that is trained, also by way of modules that fn closes over; it is dropped with the scope. In the
-- backward pass fn runs again on detached arguments, a nested walk differentiates that graph, parameters get
-- their gradients there, and the arguments' are handed on. So checkpoints nest, and fn may be a module.
--
-- A walk inside a walk must not reach the outer graph. fn may therefore close over parameters and constants,
-- but a tensor that was computed outside with gradients has to be an argument: in the forward pass an owner
-- is recognised by its scope, in the backward pass everything else by being the same node twice. Both are
-- errors, as are a fn that draws another number of random numbers the second time, and parameters that were
-- changed in between. Rejected: recomputing single operators by their cost (needs a graph), PyTorch's
-- reentrant variant (loses gradients of parameters when no argument requires one).

local schema = require "lacuna.schema"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops"
local grad = require "lacuna.grad"

local fail, show = schema.fail, schema.show
local tape, is = tensor.tape, tensor.is
local WEAK_KEYS = { __mode = "k" }

local function pack(...) return { n = select("#", ...), ... } end

-- arguments with every tensor replaced by a detached one that requires a gradient where it did; these
local function detached(args)
  local given, leaves = { n = args.n }, {}
  for i = 1, args.n do
    local v = args[i]
    if is(v) and v.requires_grad then
      v = tensor.alias(v)
      v.requires_grad = true
      leaves[#leaves + 1] = v
    end
    given[i] = v
  end
  return given, leaves
end

local function complain(t)
  fail("checkpoint", "the function uses %s, which was computed outside of it with gradients: pass it as an "
    .. "argument, so that its gradient can be handed on", show(t))
end

-- Call on_node(node) and on_leaf(tensor) for everything that the results were computed from.
local function each_dependency(results, on_node, on_leaf)
  local work, top, seen = {}, 0, {}
  local function visit(t)
    if not t or not t.requires_grad or seen[t] then return end
    seen[t] = true
    local node = t.node
    if not node then return on_leaf(t) end
    if not seen[node] then
      seen[node] = true
      top = top + 1
      work[top] = node
    end
  end
  for i = 1, results.n do
    if is(results[i]) then visit(results[i]) end
  end
  while top > 0 do
    local node = work[top]
    top = top - 1
    on_node(node)
    visit(node.a)
    visit(node.b)
    if node.c ~= nil then
      visit(node.c)
      visit(node.d)
    end
    for _, t in ipairs(node.list or {}) do visit(t) end
  end
end

local function check_results(results)
  for i = 1, results.n do
    if type(results[i]) == "table" and not is(results[i]) then
      fail("checkpoint", "result %d of the function is a table: return tensors, numbers or strings, one by "
        .. "one", i)
    end
  end
end

-- the results without their graph; the originals lose it too, or the scope would keep what it holds
local function cut(results, depth)
  local outputs = { n = results.n }
  for i = 1, results.n do
    local t = results[i]
    if is(t) and t.requires_grad then
      outputs[i] = tensor.alias(t)
    else
      outputs[i] = t
    end
  end
  for i = 1, results.n do
    local t = results[i]
    if is(t) and t.node then
      t.node = false
      if t.root.level >= depth then t.root.node = false end
    end
  end
  return outputs
end

local function seed_of(slot, g, more)
  if slot == 1 then return g or nil end
  return more and more[slot]
end

-- run the function again; roots and seeds for the nested walk
local function replay(node, given, g, more)
  local ctx = node.ctx
  local results = pack(grad.enable_grad(function() return ctx.fn(unpack(given, 1, given.n)) end))
  local _, offset = create.rng_state()
  if offset ~= ctx.after then
    fail("checkpoint", "the function drew %d random numbers in the forward pass and %d when it was run again;"
      .. " it must do the same both times (was the model switched between train and eval?)",
      ctx.after - ctx.offset, offset - ctx.offset)
  end
  each_dependency(results, function(n)
    if ctx.seen[n] then complain(n.o) end
  end, function() end)
  local roots, seeds = {}, {}
  for slot, at in ipairs(ctx.where) do
    local t, seed, was = results[at], seed_of(slot, g, more), node.outputs[slot]
    if not is(t) or not t.requires_grad or not tensor.same_shape(t, was) or t.c.dtype ~= was.c.dtype then
      fail("checkpoint", "result %d was %s in the forward pass and is %s when the function is run again", at,
        show(was), show(t))
    end
    if seed then roots[#roots + 1], seeds[#seeds + 1] = t, seed end
  end
  return roots, seeds
end

local function backward(node, g, more)
  local ctx = node.ctx
  local seed, offset = create.rng_state()
  create.set_rng_state(ctx.seed, ctx.offset)
  local ok, grads = pcall(scope.run, function()
    local given, leaves = detached(ctx.args)
    local roots, seeds = replay(node, given, g, more)
    return grad.nested(roots, seeds, leaves) -- the second result: what the outer walk must find alive
  end)
  create.set_rng_state(seed, offset)
  if not ok then error(grads, 0) end
  return grads
end

local RECORD = { name = "checkpoint", backward = backward, alias = true }

-- hang one node on all results that depend on something trained
local function record(outputs, ctx, inputs, leaves)
  local first = outputs[ctx.where[1]]
  local node = ops.record(RECORD, first)
  node.list, node.ctx, node.outputs = inputs, ctx, {}
  node.saved, node.saved_versions = {}, {}
  for _, list in ipairs{ inputs, leaves } do
    for _, t in ipairs(list) do
      node.saved[#node.saved + 1] = t
      node.saved_versions[#node.saved] = t.root.version
    end
  end
  for slot, at in ipairs(ctx.where) do
    local t = outputs[at]
    t.requires_grad, t.node, t.slot = true, node, slot
    node.outputs[slot] = t
  end
end

local function callable(fn)
  local mt = type(fn) == "table" and getmetatable(fn)
  return type(fn) == "function" or (type(mt) == "table" and rawget(mt, "__call") ~= nil and not is(fn))
end

-- the forward pass: outputs cut from their graph, the parameters used, the nodes seen, and which outputs
-- require gradients
local function first_run(fn, args)
  local seen, leaves, where = setmetatable({}, WEAK_KEYS), {}, {}
  local outputs = scope.run(function()
    local depth = scope.depth
    local given, own = detached(args)
    local mine = {}
    for i = 1, #own do mine[own[i]] = true end
    local results = pack(fn(unpack(given, 1, given.n)))
    check_results(results)
    each_dependency(results, function(node)
      seen[node] = true
      local o = node.o
      if o.root == o and o.level < depth then complain(o) end
    end, function(t)
      if not mine[t] then leaves[#leaves + 1] = t end
    end)
    for i = 1, results.n do
      if is(results[i]) and results[i].requires_grad then where[#where + 1] = i end
    end
    return cut(results, depth)
  end)
  return outputs, leaves, seen, where
end

local recompute = {}

--- fn(...) without keeping what it makes on the way: the backward pass runs fn again.
-- @tparam function|Module fn may close over modules, parameters and constants; tensors that were computed
--   with gradients must be arguments. Must do the same when it is run again
-- @param ... arguments: tensors and anything else
-- @return what fn returns: tensors, numbers, strings, booleans
-- @raise fn uses a tensor that was computed outside; in backward: fn did something else the second time, or
--   an argument or a parameter was changed in place in between
function recompute.checkpoint(fn, ...)
  if not callable(fn) then fail("checkpoint", "expected a function or a module, got %s", show(fn)) end
  if not tape.enabled then return fn(...) end
  local args = pack(...)
  local seed, offset = create.rng_state()
  local outputs, leaves, seen, where = first_run(fn, args)
  if #where > 0 then
    local _, after = create.rng_state()
    local inputs = {}
    for i = 1, args.n do
      if is(args[i]) and args[i].requires_grad then inputs[#inputs + 1] = args[i] end
    end
    record(outputs, { fn = fn, args = args, seed = seed, offset = offset, after = after, seen = seen,
      where = where }, inputs, leaves)
  end
  return unpack(outputs, 1, outputs.n)
end

return recompute
