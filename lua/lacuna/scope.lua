--- Scopes: release every tensor that was made inside and not returned.
--
-- The garbage collector frees tensors when it gets round to it; a scope frees them at a known moment, which
-- keeps the peak of a training step flat. Every owner (a tensor with its own storage; views have none) that
-- is made while a scope runs is listed in it, weakly, so that the collector may be faster (what it has found
-- dead leaves the list, and its bytes come back at the engine's next call). At the end the owners that are
-- reachable from the returned values survive into the outer scope; the others are released at once, also when
-- the function raises.
--
-- What survives: returned tensors and tensors in returned tables (deep, through metatables' instances, not
-- through closures); the owner behind a returned view; gradients of tensors from outside; the saved tensors
-- of a returned tensor's graph, as long as backward has not freed it; everything passed to lac.keep. A view
-- of an outer tensor that was made inside releases nothing: only owners are listed. Each owner has a `level`,
-- the depth of the scope that will release it; moving a tensor outwards only lowers its level, and list
-- entries whose level does not match are skipped. A view's level is the scope that made it: a view that
-- requires a gradient (x:detach():requires_grad_()) is listed too, and its gradient ends with it, not with
-- the tensor that it looks into. Rejected: reference counts in Lua (every assignment of a script would have
-- to take part).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"

local C = lib.C
local scope = { depth = 0, watching = false } -- watching: has scope.enter to be told of new owners?
local stack = {} -- stack[depth] = { n = number of entries, list = weak list of owners }
local WEAK = { __mode = "v" }

local watcher = nil

--- Call f(t) for every new owner from now on (memory.lua); nil: no longer.
function scope.watch(f)
  watcher = f
  scope.watching = f ~= nil or scope.depth > 0
end

--- A new owner: list it in the innermost scope. Called by tensor.adopt, only while scope.watching.
function scope.enter(t)
  local depth = scope.depth
  if depth > 0 then
    local s = stack[depth]
    local n = s.n + 1
    s.n = n
    s.list[n] = t
    t.level = depth
  end
  if watcher then watcher(t) end
end

--- The living owners that the running scopes will release, by scope.
-- @treturn table list by depth, outermost first, of lists of tensors
function scope.owners()
  local result = {}
  for depth = 1, scope.depth do
    local list, s = {}, stack[depth]
    for i = 1, s.n do
      local t = s.list[i]
      if t and t.level == depth and t.root == t then list[#list + 1] = t end
    end
    result[depth] = list
  end
  return result
end

local function enlist(t, level)
  t.level = level
  if level > 0 then
    local s = stack[level]
    s.n = s.n + 1
    s.list[s.n] = t
  end
end

local function move(t, level)
  if t.level > level then enlist(t, level) end
end

--- A view that begins to require a gradient.
function scope.leaf(t) enlist(t, math.min(t.level, scope.depth)) end

--- Let tensor t live at least as long as the tensor `holder` does: a gradient and its leaf, a moment and
-- its parameter. Reports of memory call it `role`, by default what an optimizer keeps.
function scope.follow(t, holder, role)
  move(t.root, holder.level)
  C.lac_tensor_role(t.c, role or C.LAC_ROLE_OPTIMIZER)
end

-- Visit everything reachable from `value`; move owners to `level`. A work list, because a graph can be
-- 100,000 deep.
local function move_reachable(value, level)
  local seen = { [_G] = true, [package.loaded] = true, [stack] = true }
  local work, n = { value }, 1
  local function push(v)
    if type(v) == "table" and not seen[v] then
      seen[v] = true
      n = n + 1
      work[n] = v
    end
  end
  while n > 0 do
    local v = work[n]
    work[n] = nil
    n = n - 1
    if type(v) == "table" then
      local root = rawget(v, "root")
      if root and rawget(v, "c") then
        move(root, level)
        if v ~= root then move(v, level) end
      end
      for key, item in next, v do
        push(key)
        push(item)
      end
    end
  end
end

--- Keep a tensor, or every tensor in a table, when the running scope ends: it moves to the scope around it.
-- @tparam Tensor|table value
-- @tparam[opt] Tensor holder keep it as long as this tensor instead (an optimizer's moment: its parameter)
-- @return value
function scope.keep(value, holder)
  if type(value) ~= "table" then
    schema.fail("keep", "expected a tensor or a table of tensors, got %s", schema.show(value))
  end
  if holder ~= nil and not (type(holder) == "table" and rawget(holder, "root")) then
    schema.fail("keep", "the holder must be a tensor, got %s", schema.show(holder))
  end
  local level = holder and holder.root.level or math.max(scope.depth - 1, 0)
  if scope.depth > 0 then move_reachable(value, level) end
  return value
end

-- Leave the innermost scope: survivors move out, the rest is released.
local function leave(results, count)
  local depth = scope.depth
  local s = stack[depth]
  for i = 2, count do
    if type(results[i]) == "table" then move_reachable(results[i], depth - 1) end
  end
  stack[depth] = nil
  scope.depth = depth - 1
  scope.watching = depth > 1 or watcher ~= nil
  local list = s.list
  for i = 1, s.n do
    local t = list[i]
    if t and t.level == depth then
      if t.root == t then
        t.level = 0
        C.lac_tensor_release(t.c)
      else
        move(t, depth - 1) -- the script may hold it
      end
    end
  end
  lib.bury()
end

local function on_error(message)
  lib.last_traceback = debug.traceback(message, 2) -- the REPL shows it; the message itself stays as it was
  return message
end

local function pack(...) return { ... }, select("#", ...) end

--- Run fn(...) and release every tensor made inside that is not returned. While a coroutine has yielded
-- inside, the scope is open for all, and what others make is released with it.
-- @tparam function fn
-- @param ... its arguments
-- @return what fn returns; an error passes through unchanged after the release
function scope.run(fn, ...)
  if type(fn) ~= "function" then schema.fail("scope", "expected a function, got %s", schema.show(fn)) end
  local depth = scope.depth + 1
  stack[depth] = { n = 0, list = setmetatable({}, WEAK) }
  scope.depth, scope.watching = depth, true
  local results, count = pack(xpcall(fn, on_error, ...))
  local ok = results[1]
  leave(results, ok and count or 0)
  if not ok then error(results[2], 0) end
  return unpack(results, 2, count)
end

return scope
