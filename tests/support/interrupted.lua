--- interrupted.lua: an interrupt at every instruction of what gives back the storages of dead tensors, and
--- of what lists a tensor for whom the list must grow.
--
-- A program and not a part of the spec, because an interrupt may lose the one storage that is about to be
-- given back or listed, and because collections are fast in a small process. Raises if one is given back that
-- is still used, or if more are lost.

package.path = "lua/?.lua;lua/?/init.lua;" .. package.path
local lac = require "lacuna"
local lib = require "lacuna.lib"
local ffi, C = lib.ffi, lib.C

local function storages()
  collectgarbage()
  return lac.memory("cpu").storages
end

local function interrupt()
  debug.sethook()
  error "interrupted"
end

jit.off() -- compiled code has no such hooks

-- f stopped after `at` instructions; true if it was over before
local function stopped(at, f)
  local through = pcall(function()
    debug.sethook(interrupt, "", at)
    f()
    debug.sethook()
  end)
  debug.sethook()
  return through
end

local through, lost_one, at = false, false, 0
while not through do
  at = at + 1
  local before, kept = storages(), {}
  for i = 1, 12 do
    local t = lac.full({ 2 }, at + i, { device = "cpu" })
    if i % 2 == 0 then kept[#kept + 1] = { at + i, t } end
  end
  collectgarbage()
  through = stopped(at, function() lac.memory("cpu") end)
  local lost = storages() - before - #kept
  assert(lost == 0 or lost == 1, ("%d lost by an interrupt at %d"):format(lost, at))
  lost_one = lost_one or lost == 1
  for _, pair in ipairs(kept) do assert(pair[2]:max():item() == pair[1], "another tensor's number") end
end
assert(at > 100 and lost_one, "nothing was interrupted")

-- Libraries of their own, because a list that has grown does not grow again soon. What is listed after the
-- interrupt must find its place: the list is filled, and grows once more.
local ROOM = 1024 -- of a new list

local function tensor(value)
  local c = ffi.new("lac_tensor", { dtype = C.LAC_F32, device = C.LAC_CPU, ndim = 1, shape = { 2 } })
  lib.check(C.lac_empty(c))
  lib.check(C.lac_fill(c, value))
  return c
end

local function value_of(c)
  local data = ffi.new "void *[1]"
  lib.check(C.lac_tensor_data(c, data))
  return ffi.cast("float *", data[0])[0]
end

through, lost_one, at = false, false, 0
while not through do
  at = at + 1
  local library, before, kept = assert(loadfile "lua/lacuna/lib.lua")(), storages(), {}
  local function list(first, last)
    for i = first, last do
      local c = tensor(i)
      library.own(c)
      if i % 97 == 0 then kept[#kept + 1] = { i, c } end
    end
  end
  list(1, ROOM)
  do
    local c = tensor(0)
    through = stopped(at, function() library.own(c) end)
  end
  list(ROOM + 1, 2 * ROOM + 2)
  collectgarbage()
  library.bury()
  local lost = storages() - before - #kept
  assert(lost == 0 or lost == 1, ("%d lost by an interrupt at %d of growth"):format(lost, at))
  lost_one = lost_one or lost == 1
  for _, pair in ipairs(kept) do assert(value_of(pair[2]) == pair[1], "another tensor's number") end
  for _, pair in ipairs(kept) do C.lac_tensor_drop(pair[2]) end
end
assert(at > 20 and lost_one, "no growth was interrupted")
