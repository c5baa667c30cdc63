--- Reverse-mode differentiation over the tape.
--
-- The tape is the graph of nodes that ops/ hangs on results; there is no list of all operations, so what a
-- script drops is collected. backward counts the edges of the reachable graph with a work list, then delivers
-- gradients to a node only when all its edges have arrived. Both passes are loops: a graph 100,000 operators
-- deep needs no stack, neither Lua's nor C's. Gradients meet by addition: the first arrival is kept as it is;
-- of two, one that is surely fresh takes the other in, else a fresh sum is made; later ones are added to
-- that. A leaf takes over a gradient that is surely fresh and copies one that may be shared (`alias` rules).
--
-- A rule's saved tensors are let go of when it has run, and values that a module of the library has marked as
-- its own (ops.transient) give their memory back then: those who read them come before the one who made them.
--
-- What is refused, with the reason: a second backward through a freed graph; a saved tensor that was changed
-- in place (version counters); a gradient of the wrong shape or dtype; a non-scalar root without a gradient.
-- Gradients of gradients are not recorded: rules run with the tape off. Rejected: a recursive walk (overflows
-- on recurrent models) and a global tape (keeps everything alive until somebody clears it).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops"

local C = lib.C
local fail, show = schema.fail, schema.show
local is, expect, receiver = tensor.is, tensor.expect, tensor.receiver
local tape, methods, same_shape = tensor.tape, tensor.methods, tensor.same_shape
local call, touch, flags = lib.call, tensor.touch, lib.flags

local BACKWARD_TAG = 1 -- what the engine records meanwhile is part of a backward pass

local grad = {}

local FREED = { name = "freed" }

-- ---- checks -------------------------------------------------------------------------------------

local function stale(op, letter, t)
  local names = { a = "its first input", b = "its second input", c = "its third input",
                  d = "its fourth input", o = "its result", s = "a tensor it saved" }
  fail("backward", "%s needs %s as it was in the forward pass, but %s was changed in place since then; "
    .. "change a clone(), or do it after backward", op.public or op.name, names[letter], show(t))
end

local function check_versions(node)
  local op = node.op
  if op.save_a and node.a and node.a.root.version ~= node.va then stale(op, "a", node.a) end
  if op.save_b and node.b and node.b.root.version ~= node.vb then stale(op, "b", node.b) end
  if op.save_c and node.c and node.c.root.version ~= node.vc then stale(op, "c", node.c) end
  if op.save_d and node.d and node.d.root.version ~= node.vd then stale(op, "d", node.d) end
  if op.save_o and node.o.root.version ~= 0 then stale(op, "o", node.o) end
  local saved = node.saved
  if saved then
    for i = 1, #saved do
      if saved[i].root.version ~= node.saved_versions[i] then stale(op, "s", saved[i]) end
    end
  end
end

local function check_gradient(op, t, g)
  if not is(g) then
    fail("backward", "the rule of %s gave %s as a gradient for %s", op.name, show(g), show(t))
  end
  if not same_shape(t, g) or t.c.dtype ~= g.c.dtype or t.c.device ~= g.c.device then
    fail("backward", "the rule of %s gave the gradient %s for %s", op.name, show(g), show(t))
  end
end

-- ---- accumulation -------------------------------------------------------------------------------

local function sum(a, b)
  local out = tensor.cast(a, a.c.dtype)
  call(C.lac_axpy, 1, b.c, out.c)
  return out
end

-- Add g to the pending gradient of output `slot` of a node. `fresh`: nobody else holds g. node.own says that
-- the pending one is ours: it may be written to, and its bytes go back to the pool when the rule has read it;
-- of further outputs more[-slot] says so.
local function arrive(node, slot, g, fresh)
  if slot == 1 then
    local pending = node.g
    fresh = fresh and g.root == g
    if not pending then
      node.g = g
      if fresh then node.own = true end
    elseif node.own then
      call(C.lac_axpy, 1, g.c, pending.c)
      if fresh then C.lac_tensor_release(g.c) end
    elseif fresh then -- a residual sum's g came first and is shared: add it to the new one
      call(C.lac_axpy, 1, pending.c, g.c)
      node.g, node.own = g, true
    else
      node.g, node.own = sum(pending, g), true
    end
  else
    local more = node.more
    if not more then
      more = {}
      node.more = more
    end
    local pending = more[slot]
    fresh = fresh and g.root == g
    if not pending then
      more[slot], more[-slot] = g, fresh
    elseif more[-slot] then
      call(C.lac_axpy, 1, g.c, pending.c)
      if fresh then C.lac_tensor_release(g.c) end
    else
      more[slot], more[-slot] = sum(pending, g), true
    end
  end
end

local function run_hooks(t, g)
  local hooks = t.hooks
  for i = 1, #hooks do
    local f = hooks[i]
    if f then
      local changed = f(g)
      if changed ~= nil then
        check_gradient({ name = "a hook" }, t, changed)
        g = changed
      end
    end
  end
  return g
end

local noted -- [leaf] = its gradient before, false if there was none; while somebody asks (graph.lua)

--- Note in `into` which tensors get gradients from now on, and what they had before; nil: no longer.
function grad.note_leaves(into) noted = into end

--- Give a leaf a gradient that nobody else holds.
function grad.put(t, g)
  rawset(t, "grad", g)
  C.lac_tensor_role(t.c, C.LAC_ROLE_PARAMETER)
  scope.follow(g, t, C.LAC_ROLE_GRADIENT)
end

-- Add g to the .grad of a tensor. `fresh`: nobody else holds g.
local function accumulate(t, g, fresh)
  local old = rawget(t, "grad")
  if noted and noted[t] == nil then noted[t] = old or false end
  if old then
    if old.root == g.root then g = tensor.cast(g, g.c.dtype) end
    call(C.lac_axpy, 1, g.c, old.c)
    touch(old)
    return
  end
  if not fresh or g.root ~= g or not tensor.is_contiguous(g) then g = tensor.cast(g, g.c.dtype) end
  grad.put(t, g)
end

-- ---- the walk -----------------------------------------------------------------------------------

local function visit(input, work, top, nodes, count)
  if input and input.requires_grad then
    local node = input.node
    if node then
      if node.n == 0 then
        top, count = top + 1, count + 1
        work[top], nodes[count] = node, node
      end
      node.n = node.n + 1
    end
  end
  return top, count
end

-- Find every node below the work list and count the edges into each.
local function discover(work, top, nodes)
  local count = top
  while top > 0 do
    local node = work[top]
    top = top - 1
    if node.op == FREED then
      fail("backward", "this graph was freed by an earlier backward; pass {retain_graph = true} to the first "
        .. "one if you need it twice, or run the forward pass again")
    end
    top, count = visit(node.a, work, top, nodes, count)
    top, count = visit(node.b, work, top, nodes, count)
    local c = node.c
    if c then
      top, count = visit(c, work, top, nodes, count)
      top, count = visit(node.d, work, top, nodes, count)
    end
    local list = node.list
    if list then
      for i = 1, #list do top, count = visit(list[i], work, top, nodes, count) end
    end
  end
  return count
end

local walk = {} -- state of the walk that runs: capture table, pending hooked leaves, the node at work

--- The node whose rule runs, or whose gradients are being handed on; nil outside a backward.
function grad.current() return walk.node end

-- Hand gradient g (or nil) of `input` on; appends nodes that became ready.
local function deliver(op, input, g, ready, top)
  if not input or not input.requires_grad then return top end
  if g then
    check_gradient(op, input, g)
    local capture = walk.capture
    local node = input.node
    if node then
      arrive(node, input.slot or 1, g, not op.alias)
    elseif capture then
      local held = capture[input]
      if held ~= nil then capture[input] = held and sum(held, g) or g end
    elseif input.hooks then
      local held = walk.hooked[input]
      if not held then walk.order[#walk.order + 1] = input end
      walk.hooked[input] = held and sum(held, g) or g
    else
      accumulate(input, g, not op.alias)
    end
  end
  local node = input.node
  if node then
    node.n = node.n - 1
    if node.n == 0 then
      top = top + 1
      ready[top] = node
    end
  end
  return top
end

local function settle_output(o, g)
  if o.hooks then g = run_hooks(o, g) end
  local capture = walk.capture
  if capture then
    if capture[o] ~= nil then capture[o] = g end
  elseif o.retains then
    accumulate(o, g, false)
  end
  return g
end

-- the gradient of a second output, after a rule that hands on that of the first at most
local function release_second(node, more)
  local o = node.outputs[2]
  if more and more[-2] and not (o.hooks or o.retains or walk.capture) then C.lac_tensor_release(more[2].c) end
end

-- Gradients of one node's outputs are complete: run its rule.
local function process(node, retain, ready, top)
  local op, g, more, own, o = node.op, node.g, node.more, node.own, node.o
  node.g, node.own, node.more = false, nil, nil
  local a, b, c, d, list = node.a, node.b, node.c, node.d, node.list
  local ga, gb, gc, gd
  if g then g = settle_output(o, g) end
  if more then
    for slot, output in pairs(node.outputs) do
      if more[slot] then more[slot] = settle_output(output, more[slot]) end
    end
  end
  if g or more then
    check_versions(node)
    walk.node = node
    ga, gb, gc, gd = op.backward(node, g, more, retain)
    -- dead now, unless somebody was shown it or the rule handed it on
    if own and not (op.alias or o.hooks or o.retains or walk.capture) then C.lac_tensor_release(g.c) end
    if op.spends then release_second(node, more) end
  end
  if not retain then
    node.op, node.a, node.b = FREED, false, false
    if node.c ~= nil then node.c, node.d = false, false end
    node.list, node.saved, node.ctx = nil, nil, nil
    -- every rule that could read this value has run; nobody else knows it (ops.transient)
    if node.transient and not (o.hooks or o.retains) then C.lac_tensor_release(o.c) end
    local second = node.fleeting
    if second and not (second.hooks or second.retains) then C.lac_tensor_release(second.c) end
  end
  if list then
    for i = 1, #list do top = deliver(op, list[i], ga and ga[i], ready, top) end
  else
    top = deliver(op, a, ga, ready, top)
    top = deliver(op, b, gb, ready, top)
    if c then top = deliver(op, c, gc, ready, top) end
    if d then top = deliver(op, d, gd, ready, top) end
  end
  return top
end

lib.frame_origin(process) -- what a rule does belongs to the place where its node was recorded

local function walk_body(roots, seeds, retain, nodes, nested)
  local work, top, ready = {}, 0, {}
  for i = 1, #roots do
    local node = roots[i].node
    if node then
      if node.n == 0 then
        top = top + 1
        work[top], nodes[top] = node, node
      end
      node.n = node.n + 1 -- the edge from the caller
    end
  end
  discover(work, top, nodes)
  top = 0
  local root_op = { name = "the caller", alias = true }
  for i = 1, #roots do top = deliver(root_op, roots[i], seeds[i], ready, top) end
  while top > 0 do
    local node = ready[top]
    ready[top] = nil
    top = process(node, retain, ready, top - 1)
  end
  if nested then return end -- leaves with hooks wait for the outer walk to end
  local order = walk.order
  for i = 1, #order do
    local leaf = order[i]
    accumulate(leaf, run_hooks(leaf, walk.hooked[leaf]), false)
  end
end

-- Run the walk with the tape off; whatever happens, no half-counted node stays behind. `nested`: inside a
-- rule of the walk that runs, whose capture table and hooks it serves.
local function run(roots, seeds, retain, capture, nested)
  local enabled, outer, nodes, tag = tape.enabled, walk, {}, flags.tag
  walk = { capture = capture, hooked = nested and outer.hooked or {}, order = nested and outer.order or {} }
  tape.enabled, flags.tag = false, BACKWARD_TAG
  local ok, message = pcall(walk_body, roots, seeds, retain, nodes, nested)
  tape.enabled, walk, flags.tag = enabled, outer, tag
  if not ok then
    for i = 1, #nodes do
      local node = nodes[i]
      node.n, node.g, node.own, node.more = 0, false, nil, nil
    end
    error(message, 0)
  end
end

local function seed_for(op, t, g)
  if g == nil then
    if tensor.numel(t) ~= 1 then
      fail(op, "%s has more than one element; pass a gradient like it, or reduce it (t:sum():backward())",
           show(t))
    end
    local one = tensor.empty_like(t)
    call(C.lac_fill, one.c, 1)
    rawset(one, "unit", true) -- for rules that would multiply by it (ops/loss.lua)
    return one
  end
  expect(op, "the gradient", g)
  if not same_shape(t, g) or t.c.dtype ~= g.c.dtype or t.c.device ~= g.c.device then
    fail(op, "the gradient must be like the tensor: gradient %s, tensor %s", show(g), show(t))
  end
  return g
end

local function check_root(op, t)
  if not t.requires_grad then
    fail(op, "%s does not require a gradient: no input of the computation does, or it ran inside no_grad",
         show(t))
  end
end

--- For a rule that differentiates a graph of its own (recompute.lua): walk it inside the walk that runs.
-- Parameters get their gradients as in the outer walk; those of `leaves` are returned.
-- @tparam table roots tensors @tparam table seeds their gradients @tparam table leaves of that graph
-- @treturn table a gradient or false for each leaf
-- @treturn table gradients that the outer walk holds and that must outlive a scope round this call
function grad.nested(roots, seeds, leaves)
  local capture, grads, held = walk.capture, {}, {}
  if capture then
    for i = 1, #leaves do capture[leaves[i]] = false end
  end
  run(roots, seeds, false, capture, true)
  for i = 1, #leaves do
    local leaf = leaves[i]
    if capture then
      grads[i], capture[leaf] = capture[leaf], nil
    else
      grads[i] = rawget(leaf, "grad") or false
      rawset(leaf, "grad", nil)
    end
  end
  for _, list in ipairs{ capture or {}, walk.hooked } do
    for _, g in pairs(list) do held[#held + 1] = g or nil end
  end
  return grads, held
end

local BACKWARD = { retain_graph = { type = "boolean", default = false } }

--- Accumulate the gradients of t into the .grad of every leaf below it.
-- @tparam Tensor t
-- @tparam[opt] Tensor g gradient of t; may be left out for one element
-- @tparam[opt] table options retain_graph = true keeps the graph for another backward
function methods.backward(t, g, options)
  receiver("backward", t)
  if options == nil and type(g) == "table" and not is(g) then g, options = nil, g end
  local o = schema.options("backward", options, BACKWARD)
  check_root("backward", t)
  run({ t }, { seed_for("backward", t, g) }, o.retain_graph, nil)
end

local GRAD = { retain_graph = { type = "boolean", default = false },
               allow_unused = { type = "boolean", default = false },
               grad_outputs = { type = { "table", "tensor" } } }

local function as_list(op, what, v)
  if is(v) then return { v } end
  if type(v) ~= "table" or #v == 0 then
    fail(op, "%s must be a tensor or a list of tensors, got %s", what, show(v))
  end
  for i = 1, #v do expect(op, ("%s[%d]"):format(what, i), v[i]) end
  return v
end

--- Gradients of outputs towards inputs, without touching any .grad.
-- @tparam Tensor|table outputs @tparam Tensor|table inputs
-- @tparam[opt] table options grad_outputs (one per output; may be left out for one element), retain_graph,
-- allow_unused (an input that the outputs do not depend on gives false instead of an error)
-- @treturn Tensor|table a gradient per input; one tensor if `inputs` was one
function grad.grad(outputs, inputs, options)
  local o = schema.options("grad", options, GRAD)
  local roots, leaves = as_list("grad", "outputs", outputs), as_list("grad", "inputs", inputs)
  local given = o.grad_outputs and as_list("grad", "grad_outputs", o.grad_outputs) or {}
  if o.grad_outputs and #given ~= #roots then
    fail("grad", "grad_outputs has %d tensors for %d outputs", #given, #roots)
  end
  local seeds, capture = {}, {}
  for i = 1, #roots do
    check_root("grad", roots[i])
    seeds[i] = seed_for("grad", roots[i], given[i])
  end
  for i = 1, #leaves do
    if not leaves[i].requires_grad then
      fail("grad", "inputs[%d], %s, does not require a gradient", i, show(leaves[i]))
    end
    capture[leaves[i]] = false
  end
  run(roots, seeds, o.retain_graph, capture)
  local result = {}
  for i = 1, #leaves do
    local g = capture[leaves[i]]
    if not g and not o.allow_unused then
      fail("grad", "the outputs do not depend on inputs[%d], %s; pass allow_unused = true to get false "
        .. "for it", i, show(leaves[i]))
    end
    result[i] = g
  end
  if is(inputs) then return result[1] end
  return result
end

-- ---- switches -----------------------------------------------------------------------------------

local function restore(enabled, ok, ...)
  tape.enabled = enabled
  if not ok then error((...), 0) end
  return ...
end

local function with_tape(op, on, f, ...)
  if type(f) ~= "function" then fail(op, "expected a function, got %s", show(f)) end
  local enabled = tape.enabled
  tape.enabled = on
  return restore(enabled, pcall(f, ...))
end

--- Run f(...) without recording; returns its results. The switch is restored also when f raises; it is one
-- for the whole process, so it stays off while a coroutine has yielded inside.
function grad.no_grad(f, ...) return with_tape("no_grad", false, f, ...) end

--- Run f(...) with recording, inside no_grad.
function grad.enable_grad(f, ...) return with_tape("enable_grad", true, f, ...) end

--- Are operators recorded now?
function grad.is_grad_enabled() return tape.enabled end

--- Set .grad of every tensor in a list (or table of tensors) to nil.
function grad.zero_grad(list)
  if type(list) ~= "table" then
    fail("zero_grad", "expected a tensor or a table of tensors, got %s", show(list))
  end
  if is(list) then
    list.grad = nil
    return
  end
  for key, t in pairs(list) do
    expect("zero_grad", ("element %s"):format(tostring(key)), t)
    t.grad = nil
  end
end

-- ---- methods ------------------------------------------------------------------------------------

--- Turn gradients on (default) or off for a leaf; returns it.
function methods.requires_grad_(t, on)
  receiver("requires_grad_", t)
  if on == nil then on = true end
  if type(on) ~= "boolean" then fail("requires_grad_", "expected true or false, got %s", show(on)) end
  if on and not device.is_float(t.c.dtype) then
    fail("requires_grad_", "only floating-point tensors can require a gradient, got %s", show(t))
  end
  if t.node and not on then
    fail("requires_grad_", "%s is the result of recorded operators; use detach()", show(t))
  end
  if on and t.root ~= t and not t.node and not t.requires_grad then scope.leaf(t) end
  t.requires_grad = on
  return t
end

--- Is t a leaf: not the result of recorded operators?
function methods.is_leaf(t)
  receiver("is_leaf", t)
  return not t.node
end

--- Keep the gradient of a non-leaf in its .grad too; returns it.
function methods.retain_grad(t)
  receiver("retain_grad", t)
  if not t.requires_grad then fail("retain_grad", "%s does not require a gradient", show(t)) end
  if t.node then t.retains = true end
  return t
end

--- Call f(gradient) when t's gradient is complete in a backward; a tensor that f returns replaces it.
-- @treturn function call it to remove the hook
function methods.register_hook(t, f)
  receiver("register_hook", t)
  if type(f) ~= "function" then fail("register_hook", "expected a function, got %s", show(f)) end
  if not t.requires_grad then fail("register_hook", "%s does not require a gradient", show(t)) end
  local hooks = t.hooks
  if not hooks then
    hooks = {}
    t.hooks = hooks
  end
  local at = #hooks + 1
  hooks[at] = f
  return function() hooks[at] = false end
end

-- ---- operators written in Lua -------------------------------------------------------------------

local CUSTOM = { name = { type = "string", required = true },
                 forward = { type = "function", required = true },
                 backward = { type = "function", required = true } }

local Context = {}
Context.__index = Context

--- Remember tensors for the backward pass; changes of them are detected.
function Context:save(...)
  local list = { ... }
  for i = 1, select("#", ...) do
    expect(self.name, ("save: argument %d"):format(i), list[i])
    self.saved[#self.saved + 1] = list[i]
  end
end

local function custom_backward(node, g, more)
  local record = node.op
  local ctx, outputs = node.ctx, node.outputs
  local gs = {}
  for slot = 1, ctx.count do
    local got = slot == 1 and g or more and more[slot]
    gs[slot] = got or ops.raw_zeros_like(outputs[slot])
  end
  local results = { record.rule(ctx, unpack(gs, 1, ctx.count)) }
  local grads = {}
  for i = 1, #node.list do grads[i] = results[node.position[i]] end
  return grads
end

--- Make an operator from Lua functions.
-- forward(ctx, ...) runs with the tape off and returns one or more tensors; ctx:save(t, ...) remembers
-- tensors in ctx.saved; backward(ctx, g, ...) gets a gradient per output and returns a gradient (or nil) per
-- argument of forward.
-- @tparam table definition name, forward, backward
-- @treturn function
function grad.custom_op(definition)
  local o = schema.options("custom_op", definition, CUSTOM)
  local record = { name = o.name, rule = o.backward, backward = custom_backward, alias = true }
  local function finish(inputs, position, versions, ctx, wanted, enabled, ok, ...)
    tape.enabled = enabled
    if not ok then error((...), 0) end
    local count = select("#", ...)
    local outputs = { ... }
    for i = 1, count do expect(o.name, ("result %d of forward"):format(i), outputs[i]) end
    if count == 0 then fail(o.name, "forward must return a tensor, it returned nothing") end
    if not wanted then return ... end
    -- what made it, and others that read it, have recorded gradients of the value that it had
    for i = 1, #inputs do
      if inputs[i].requires_grad and inputs[i].root.version ~= versions[i] then
        fail(o.name, "forward changed its argument %d, %s, in place, which requires a gradient; "
          .. "change a clone()", position[i], show(inputs[i]))
      end
    end
    -- the node is written into the outputs, so each must be a tensor of its own: not an input (that would
    -- close a circle, or make the user's constant require a gradient) and not the same one twice
    local taken = {}
    for i = 1, #inputs do taken[inputs[i]] = true end
    for i = 1, count do
      local out = outputs[i]
      if taken[out] or out.requires_grad or out.node then outputs[i] = tensor.alias(out) end
      taken[outputs[i]] = true
    end
    ctx.count = count
    local node = ops.record(record, outputs[1])
    node.list, node.position, node.ctx, node.outputs = inputs, position, ctx, outputs
    node.saved, node.saved_versions = ctx.saved, {}
    for i = 1, #ctx.saved do node.saved_versions[i] = ctx.saved[i].root.version end
    for slot = 2, count do
      outputs[slot].requires_grad, outputs[slot].node, outputs[slot].slot = true, node, slot
    end
    return unpack(outputs, 1, count)
  end
  return function(...)
    local inputs, position, versions, wanted = {}, {}, {}, false
    for i = 1, select("#", ...) do
      local v = select(i, ...)
      if is(v) then
        inputs[#inputs + 1], position[#position + 1], versions[#versions + 1] = v, i, v.root.version
        wanted = wanted or v.requires_grad
      end
    end
    local ctx = setmetatable({ name = o.name, saved = {} }, Context)
    local enabled = tape.enabled
    tape.enabled = false
    return finish(inputs, position, versions, ctx, wanted and enabled, enabled, pcall(o.forward, ctx, ...))
  end
end

return grad
