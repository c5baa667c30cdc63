--- lac.graph: a step that is captured once and launched as a whole.
--
-- A step of a small model is thousands of launches of a few microseconds each, and the device waits for the
-- next one most of the time. lac.graph(fn) gives a function that takes tensors on cuda and does what fn does.
-- The first call runs fn as it is, the second one captures what fn queues on the device, and from then on a
-- call is one launch: fn is not run any more. The numbers are the same, to the bit: random draws go on from
-- call to call, and gradients of parameters appear in .grad.
--
-- What a launch repeats are the operators, with the sizes, numbers and branches of the captured call. Tensors
-- that fn closes over are read where they are, arguments are copied into the graph's own memory first, and
-- every other argument must be what it was. What cannot be repeated is refused with the reason: reading a
-- value (item, totable, a norm to clip by), operators on the CPU, bringing over a tensor of the CPU, the
-- optimizer's update, whose learning rate and step number are the host's. A gradient that was not there
-- before the captured call may not be there before a later one; where one was, its memory is added to.
--
-- Memory that is taken while capturing stays the graph's own until it is collected or released. Results live
-- there too and end with the next call: clone() what must stay. They carry no gradient: backward belongs
-- inside fn.
-- Rejected: capturing the optimizer's update with its numbers in device memory (it is three launches a step,
-- and clipping, loss scales and schedules are decisions of the host).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local class = require "lacuna.class"
local device = require "lacuna.device"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local grad = require "lacuna.grad"

local ffi, C = lib.ffi, lib.C
local fail, show, is = schema.fail, schema.show, tensor.is

local graph_slot, seed_slot, offset_slot = ffi.new("lac_graph *[1]"), ffi.new("uint64_t[1]"),
  ffi.new("uint64_t[1]")
local step_slot = ffi.new("int[1]")
local number_slot = ffi.new("int[1]")

local Graph = class("Graph", nil, true)
schema.refuse_new_fields(Graph, function() return "" end)

local function pack(...) return { n = select("#", ...), ... } end

-- ---- arguments ------------------------------------------------------------------------------------------

local function check_argument(i, t)
  if t.c.device == C.LAC_CPU then
    fail("graph", "argument %d is %s: a graph works on cuda", i, show(t))
  end
  if t.requires_grad then
    fail("graph", "argument %d requires a gradient: let the function close over parameters instead", i)
  end
end

-- the graph's own copies of the tensors among the arguments
local function own_arguments(args)
  local own = { n = args.n }
  for i = 1, args.n do
    own[i] = args[i]
    if is(args[i]) then
      own[i] = tensor.cast(args[i], args[i].c.dtype)
      own[i].level = 0 -- no scope releases it
    end
  end
  return own
end

local function changed(i, mine, given)
  fail("graph", "argument %d was %s when the graph was captured, now it is %s: make another graph for it", i,
    show(mine), show(given))
end

local function bring_arguments(own, args)
  if args.n ~= own.n then fail("graph", "captured with %d arguments, called with %d", own.n, args.n) end
  for i = 1, own.n do
    local mine, given = own[i], args[i]
    if is(mine) then
      if not is(given) or not tensor.same_shape(mine, given) or mine.c.dtype ~= given.c.dtype
        or mine.c.device ~= given.c.device then
        changed(i, mine, given)
      end
      lib.call(C.lac_copy, given.c, mine.c)
    elseif mine ~= given then
      changed(i, mine, given)
    end
  end
end

-- ---- capturing ------------------------------------------------------------------------------------------

-- The captured tensor itself is given up: each launch makes another one of its memory.
local function result_number(g, t)
  lib.check(C.lac_graph_result(g, t.c, number_slot))
  return number_slot[0]
end

local function give_up(t) C.lac_tensor_release(t.root.c) end

-- numbers of what fn returned: tensors by number, everything else as it is
local function list_results(g, values)
  local results = { n = values.n }
  for i = 1, values.n do
    local v = values[i]
    if type(v) == "table" and not is(v) then
      fail("graph", "result %d is %s: a graph returns tensors, numbers and strings", i, show(v))
    end
    results[i] = is(v) and { number = result_number(g, v) } or { value = v }
  end
  return results
end

-- the gradients that were made or added to
local function list_gradients(g, before)
  local list = {}
  for leaf, old in pairs(before) do
    local now = rawget(leaf, "grad")
    if now then list[#list + 1] = { leaf = leaf, number = result_number(g, now), fresh = not old } end
  end
  return list
end

-- runs fn while the device records; the tape and the random stream are as after an eager run
local function record(self, g)
  local before = {}
  grad.note_leaves(before)
  local ok, values = pcall(function() return pack(scope.run(self.fn, unpack(self.own, 1, self.own.n))) end)
  grad.note_leaves(nil)
  local results, gradients, message
  if ok then
    ok, message = pcall(function()
      results, gradients = list_results(g, values), list_gradients(g, before)
    end)
  else
    message = values
  end
  if not ok then
    for leaf, old in pairs(before) do leaf.grad = old or nil end
    return nil, nil, message
  end
  for i = 1, values.n do
    if is(values[i]) then give_up(values[i]) end
  end
  for _, e in ipairs(gradients) do
    if e.fresh then
      give_up(e.leaf.grad)
      e.leaf.grad = nil
    end
  end
  return results, gradients
end

local function capture(self)
  local seed, offset = create.rng_state()
  lib.check(C.lac_graph_begin(graph_slot, seed_slot, offset_slot, step_slot))
  local g = graph_slot[0]
  create.set_rng_state(tonumber(seed_slot[0]), tonumber(offset_slot[0]))
  create.set_draw_step(step_slot[0])
  local results, gradients, message = record(self, g)
  local _, after = create.rng_state()
  local draws = (after - tonumber(offset_slot[0])) / step_slot[0]
  create.set_rng_state(seed, offset)
  create.set_draw_step(1)
  local status = C.lac_graph_end(g, results and 1 or 0, draws)
  if not results then
    if message == "interrupted" then error(message, 0) end
    error("graph: this function cannot be captured: " .. tostring(message), 0)
  end
  if status ~= 0 then lib.raise(status) end
  self.graph = ffi.gc(g, C.lac_graph_drop)
  self.results, self.gradients, self.draws = results, gradients, draws
end

-- ---- launching ------------------------------------------------------------------------------------------

local function take(self, number)
  local c = tensor.ctype()
  lib.check(C.lac_graph_take(self.graph, number, c))
  return tensor.adopt(c)
end

-- gradients must be where the captured step found them
local function check_gradients(self)
  for _, e in ipairs(self.gradients) do
    local now = rawget(e.leaf, "grad")
    if e.fresh and now then
      fail("graph", "%s has a gradient already, and the captured step began without: zero_grad() comes first",
        show(e.leaf))
    elseif not e.fresh and (not now or C.lac_graph_same(self.graph, e.number, now.c) == 0) then
      fail("graph", "the gradient of %s that the captured step added to is not there any more", show(e.leaf))
    end
  end
end

local function launch(self)
  check_gradients(self)
  local seed, offset = create.rng_state()
  lib.check(C.lac_graph_launch(self.graph, seed, offset))
  create.set_rng_state(seed, offset + self.draws)
  for _, e in ipairs(self.gradients) do
    if e.fresh then grad.put(e.leaf, take(self, e.number)) else tensor.touch(e.leaf.grad) end
  end
  local values = {}
  for i, r in ipairs(self.results) do
    if r.number then values[i] = take(self, r.number) else values[i] = r.value end
  end
  return unpack(values, 1, self.results.n)
end

local function without_tape(...)
  local values = pack(...)
  for i = 1, values.n do
    if is(values[i]) and values[i].requires_grad then values[i] = tensor.alias(values[i]) end
  end
  return unpack(values, 1, values.n)
end

-- ---- the object -----------------------------------------------------------------------------------------

function Graph:init(fn)
  self.fn, self.calls = fn, 0
  self.graph, self.own, self.results, self.gradients, self.draws = false, false, false, false, 0
  schema.complete(self)
end

function Graph:__call(...)
  local args = pack(...)
  for i = 1, args.n do
    if is(args[i]) then check_argument(i, args[i]) end
  end
  self.calls = self.calls + 1
  if self.calls == 1 then return without_tape(self.fn(...)) end -- plans, libraries and the pool are warm then
  if not self.graph then
    self.own = own_arguments(args)
    capture(self)
  end
  bring_arguments(self.own, args)
  return launch(self)
end

--- Drop the graph and its memory now; the next call captures anew.
function Graph:release()
  if self.graph then C.lac_graph_drop(ffi.gc(self.graph, nil)) end
  self.graph, self.own, self.results, self.gradients = false, false, false, false
end

--- Number of the graph's nodes (kernels, copies, fills), and bytes of device memory that it keeps.
function Graph:size()
  if not self.graph then return 0, 0 end
  return tonumber(C.lac_graph_nodes(self.graph)), tonumber(C.lac_graph_bytes(self.graph))
end

function Graph:__tostring()
  if not self.graph then return "Graph(not captured yet)" end
  local nodes, bytes = self:size()
  return ("Graph(%d nodes, %s)"):format(nodes, lib.bytes_text(bytes))
end

--- A function that does what fn does, captured into a CUDA graph at its second call:
--
--     local step = lac.graph(function(x, y)
--       local loss = model:loss(x, y)
--       loss:backward()
--       return loss
--     end)
--     for k = 1, steps do
--       local loss = step(batch(k))
--       optimizer:step()
--       optimizer:zero_grad{ release = true }
--     end
--
-- @tparam function fn of tensors on cuda (others are constants); returns tensors, numbers, strings
-- @treturn Graph call it as fn; size() gives nodes and bytes, release() drops the captured graph
-- @raise what cannot be repeated, with the reason
local function new(fn)
  schema.check("graph", "fn", fn, { type = "function" })
  device.code("graph", "cuda")
  return Graph(fn)
end

return { new = new }
