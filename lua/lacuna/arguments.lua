--- Calls with more arguments than a function takes: an error, where Lua would drop them.
--
-- `x:softmax(2, 5)` and PyTorch's `x.var(1, False, True)` in another order would otherwise give other values
-- than were asked for. No function has to check this itself: init.lua passes the functions of the public
-- tables through here once they are complete, classes pass their methods (class.lua) at their first instance.
-- A guarded function is a function of as many arguments and one more, `more`, that calls the one inside;
-- compiled code inlines it. Each is loaded as text of its own, because the compiler keeps one record of hot
-- spots for all closures of one function in the source. Functions that take any number (`...`) or name `more`
-- themselves, as the hottest operators do, stay as they are. Calls inside the library reach what is inside.
--
-- Rejected: a check in every function (four hundred of them, and the next one forgets it), and `...` with
-- select("#", ...), which no longer costs nothing.
--
-- The guard leaves by a tail call, since it does not know how many results there are, and LuaJIT gives up a
-- loop with more tail calls than it would unroll turns of one, 15 by default: a few operators or a module. So
-- that limit is raised.

local lib = require "lacuna.lib"

require("jit.opt").start("loopunroll=60")

local arguments = {}

local inside = setmetatable({}, { __mode = "k" }) -- what a guarded function calls
local guarded = setmetatable({}, { __mode = "k" }) -- and the other way
local signature = setmetatable({}, { __mode = "k" }) -- names of what a function inside takes

--- The function that was written, for one that may be guarded.
function arguments.inner(f) return inside[f] or f end

--- How many arguments a function takes and their names, math.huge for any number of them.
function arguments.of(f)
  f = inside[f] or f
  if signature[f] then return #signature[f], signature[f] end
  local info, names = debug.getinfo(f, "u"), {}
  for i = 1, info.nparams do names[i] = debug.getlocal(f, i) end
  return info.isvararg and math.huge or info.nparams, names
end

--- Raise the error of an argument too many.
-- @tparam string op what starts the message @tparam table names of the arguments
-- @tparam integer from the first name that is shown @param value the argument
function arguments.refuse(op, names, from, value)
  local takes = table.concat(names, ", ", from)
  lib.fail("%s: takes %s, got %s as well", op, takes == "" and "nothing" or "(" .. takes .. ")",
           lib.show(value))
end

--- f, but an argument more than it names is an error.
-- @tparam string op what starts the message
-- @tparam function f
-- @tparam[opt=1] integer from the first argument that the message shows: 2 for a method
-- @tparam[opt] table given names of its arguments, if they are others than it was written with
function arguments.exact(op, f, from, given)
  if guarded[f] or inside[f] then return guarded[f] or f end
  signature[f] = given
  local count, names = arguments.of(f)
  if count == math.huge or names[count] == "more" then return f end
  local list = {}
  for i = 1, count do list[i] = "a" .. i end
  local plain = table.concat(list, ", ")
  list[count + 1] = "more"
  local text = ([[local f, refuse = ...
    return function(%s) if more ~= nil then refuse(more) end return f(%s) end]])
    :format(table.concat(list, ", "), plain)
  local outer = loadstring(text, "@" .. lib.dir .. "/lacuna/arguments.lua")(f, function(value)
    arguments.refuse(op, names, from or 1, value)
  end)
  inside[outer], guarded[f] = f, outer
  return outer
end

local own_prefix = "@" .. lib.dir .. "/lacuna/"

local function is_own(f) return debug.getinfo(f, "S").source:sub(1, #own_prefix) == own_prefix end

-- what a method takes, `self` among it whether it names it or not
local function with_self(f)
  local count, names = arguments.of(f)
  return count == 0 and { "self" } or names, math.max(1, count)
end

local function guard_methods(cls)
  cls.__guarded = true
  local name = rawget(cls, "__name")
  for key, f in next, cls do
    local of_class = key == "__call" or key == "forward" -- what calls the object
    if type(f) == "function" and key ~= "init" and (of_class or not key:find "^_")
      and (key == "forward" or is_own(f)) then
      local names, count = with_self(f)
      local given = count < math.huge and names or nil
      cls[key] = arguments.exact(of_class and name or name .. "." .. key, f, 2, given)
    end
  end
end

--- Before an instance is made: are these arguments of `init`? At the first, guard `forward` of the class and
-- its parents, and the methods that are the library's (a script's own may take and ignore what they like).
function arguments.for_class(cls, ...)
  local c = cls
  while c and not rawget(c, "__guarded") do
    guard_methods(c)
    c = rawget(c, "__parent")
  end
  local init = cls.init
  if not init or select("#", ...) == 0 then return end
  local names, count = with_self(init)
  local extra = select("#", ...) >= count and select(count, ...)
  if extra then arguments.refuse(cls.__name, names, 2, extra) end
end

--- Guard the functions of a table in place; those of classes in it wait for their first instance.
-- @tparam table t @tparam string prefix of the names in messages
function arguments.guard(t, prefix)
  for name, f in next, t do
    if type(f) == "function" and type(name) == "string" then t[name] = arguments.exact(prefix .. name, f) end
  end
end

return arguments
