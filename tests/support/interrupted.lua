--- interrupted.lua: an interrupt at every instruction of what gives back the storages of dead tensors.
--
-- A program and not a part of the spec, because an interrupt may lose the one storage that is about to be
-- given back, and because collections are fast in a small process. Raises if one is given back that is still
-- used.

package.path = "lua/?.lua;lua/?/init.lua;" .. package.path
local lac = require "lacuna"

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
