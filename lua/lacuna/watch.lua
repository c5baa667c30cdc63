--- watch.lua: which operator made the first NaN or infinity, in which module, on which line.
--
-- A loss that is NaN says nothing about its cause, a hundred operators earlier. While the watch is on, the
-- engine reads every result through (c/watch.c) and this file raises an error at the first that is not
-- finite: operator, position, shapes, what its inputs held, and the module path and script line of the call.
-- When the value arises in the backward pass, the line that matters is that of the forward call: while the
-- watch is on, the place of every call is noted beside the storage of its result, and the node at work knows
-- its result.
--
-- The engine sets the attention flag after every operator, so the library's one slow path (lib.attend) comes
-- here; while the watch is off nothing is added to the hot path but what the engine's recorder costs anyway.
-- Rejected: wrapping operators in Lua (they reach each other as upvalues), storing a traceback in every node
-- (a field more in the record of the hot path).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local grad = require "lacuna.grad"

local ffi, C = lib.ffi, lib.C
local KINDS = { "nan", "inf", "-inf" }

local info = ffi.new("lac_watch_info")
local sites = {} -- address of a storage -> text of the place where its last result was made
local on = false

local function address(storage) return tonumber(ffi.cast("intptr_t", storage)) end

local function shape_text(operand)
  local list = {}
  for i = 1, operand.ndim do list[i] = tostring(tonumber(operand.shape[i - 1])) end
  return ("%s [%s]"):format(device.dtype_name[operand.dtype], table.concat(list, " x "))
end

-- 1-based position of row-major element `first`
local function position(operand, first)
  local list = {}
  for i = operand.ndim, 1, -1 do
    local size = tonumber(operand.shape[i - 1])
    list[i] = first % size + 1
    first = math.floor(first / size)
  end
  return table.concat(list, ", ")
end

local function held(operand)
  local nan, inf = tonumber(operand.nan), tonumber(operand.inf)
  if nan + inf == 0 then return "finite" end
  return ("%d nan, %d inf"):format(nan, inf)
end

local function sentence()
  local op, node = ffi.string(info.op), grad.current()
  local head = ("%s made %s"):format(op, KINDS[info.kind])
  if node then head = ("the backward of %s: %s"):format(node.op.public or node.op.name, head) end
  local inputs = {}
  for i = 1, math.min(info.inputs, 8) do
    local o = info.input[i - 1]
    inputs[i] = ("%s %s (%s)"):format(ffi.string(o.name), shape_text(o), held(o))
  end
  local text = ("%s at [%s] of %s (%s); inputs: %s"):format(head, position(info.output, tonumber(info.first)),
    shape_text(info.output), held(info.output), #inputs > 0 and table.concat(inputs, ", ") or "none")
  if node then
    local site = sites[address(node.o.root.c.storage)]
    text = text .. (site and site ~= "" and "; forward called at" .. site
      or "; its forward pass ran before the watch was on")
  end
  return text
end

local function watcher()
  C.lac_watch_last(info)
  if info.found == 0 then
    if info.storage ~= nil and not grad.current() then sites[address(info.storage)] = lib.where() end
    return
  end
  local text = sentence()
  C.lac_watch(1) -- starts afresh: a script that catches the error may go on
  schema.fail("nan_watch", "%s", text)
end

local watch = {}

--- Look at the result of every operator, forward and backward, from now on: the first that makes a NaN or an
-- infinity raises an error that names it. Infinities that an input already held are let through (masks are
-- made of them). Costs a reading of every result while it is on, and on a device a wait for every
-- operator; nothing while it is off.
-- @tparam boolean wanted
-- @treturn boolean was it on?
function watch.nan_watch(wanted)
  if type(wanted) ~= "boolean" then
    schema.fail("nan_watch", "expected true or false, got %s", schema.show(wanted))
  end
  local was = on
  on, sites = wanted, {}
  lib.check(C.lac_watch(wanted and 1 or 0))
  lib.watcher = wanted and watcher or nil
  return was
end

local function finish(was, ok, ...)
  watch.nan_watch(was)
  if not ok then error((...), 0) end
  return ...
end

--- Run fn(...) under the watch; returns its results.
-- @tparam function fn @param ... its arguments
-- @raise the first NaN or infinity: "nan_watch: log made -inf at [2] of f32 [3] (0 nan, 1 inf); inputs: x f32
--   [3] (finite) [Net.layers[2], script.lua:10]"
function watch.detect_anomaly(fn, ...)
  if type(fn) ~= "function" then
    schema.fail("detect_anomaly", "expected a function, got %s", schema.show(fn))
  end
  local was = on
  if not was then watch.nan_watch(true) end
  return finish(was, pcall(fn, ...))
end

return watch
