--- Sites: the place in a script where something was made, as a number.
--
-- A site is a model path and a line, "LongNet.layers[3].attn" and "train.lua:41", found by walking the call
-- stack (lib.place) and given a number, which the engine can keep beside a block of memory and which costs
-- nothing to compare. A walk takes a few microseconds, so nothing is looked up unless a report was asked for:
-- tracking is a counter, switched by memory.lua, timeline.lua and profile.lua, and while it is 0 no operator
-- does anything for it. While it is above 0, every new tensor leaves its site in its storage.
--
-- What runs inside backward belongs to the place of the operator in the forward pass whose rule runs: "line
-- 41 holds 3 GB" must not turn into "the line with :backward() does". The tape's walk is recognised on the
-- stack, its node knows the forward result, and that has its site. A result that is a view shares the
-- storage of another operator's result, so there the last known site stays.
--
-- Rejected: debug hooks (they run at every line, and not at all in compiled code), a table from tensors to
-- lines (a block outlives its tensor until the call after a collection, and then nobody would know it).

local lib = require "lacuna.lib"
local scope = require "lacuna.scope"

local C = lib.C
local sites = {}

local list, ids = {}, {}
local last = 0 -- site of the last forward operator that a backward rule ran for

local function intern(path, line, backward)
  local key = (path or "") .. "\0" .. (line or "") .. (backward and "\0b" or "")
  local id = ids[key]
  if not id then
    id = #list + 1
    list[id] = { path = path, line = line, backward = backward or false }
    ids[key] = id
  end
  return id
end

--- The number of the place that the running script is at.
-- @treturn integer
function sites.here()
  local path, line, node = lib.place(1)
  if not node then
    last = 0
    return intern(path, line)
  end
  local out = node.o
  if out.root == out then
    local made = list[C.lac_tensor_site(out.c, -1)]
    if made then last = intern(made.path, made.line, true) end
  end
  return last > 0 and last or intern(path, line, true)
end

--- A site by number.
-- @treturn ?table { path = model path or nil, line = "file.lua:41" or nil, backward = boolean }; nil for 0
function sites.get(id) return list[id] end

--- Text of a site: "train.lua:41  LongNet.layers[3].attn (backward)"; the last word where the operator's
-- gradient rule made it. "(not tracked)" for 0.
-- @tparam integer id
-- @tparam[opt] boolean short the model path alone where there is one, like layers as one: "LongNet.layers[*]"
function sites.text(id, short)
  local s = list[id]
  if not s then return "(not tracked)" end
  local text = s.line or "(no script)"
  if s.path then text = short and s.path:gsub("%[%d+%]", "[*]") or text .. "  " .. s.path end
  return s.backward and text .. " (backward)" or text
end

local users = 0

local function note(t) C.lac_tensor_site(t.c, sites.here()) end

--- Start or stop leaving sites in new tensors. Every start needs its stop.
function sites.track(on)
  users = users + (on and 1 or -1)
  scope.watch(users > 0 and note or nil)
end

--- Do new tensors get sites now?
function sites.tracked() return users > 0 end

return sites
