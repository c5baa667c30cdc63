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
-- Operators listed in NAMED also take their arguments by name, all or the last of them, in one table:
-- x:sum{ dim = 2, keepdim = true }, x:topk(3, { largest = false }). The guard puts them in their places, so
-- that the operators know nothing of it; their names are those that help shows. What other libraries call an
-- argument is answered with the name here, never taken: an alias is a second thing to document and to keep.
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

-- operators whose arguments after the first may be named, with the names
local NAMED = {}
for line in ([[
  sum x dim keepdim; mean x dim keepdim; prod x dim keepdim; max x dim keepdim; min x dim keepdim
  any x dim keepdim; all x dim keepdim; count_nonzero x dim keepdim; logsumexp x dim keepdim
  argmax x dim keepdim; argmin x dim keepdim; median x dim keepdim; norm x p dim keepdim
  var x dim keepdim correction; std x dim keepdim correction
  kthvalue x k dim keepdim; quantile x q dim keepdim; topk x k dim largest
  sort x dim descending; argsort x dim descending
  searchsorted sorted values right; bucketize x boundaries right; histc x bins low high
  softmax x dim; log_softmax x dim; cumsum x dim; cumprod x dim; logcumsumexp x dim; cummax x dim
  cummin x dim; diff x n dim
  cat list dim; stack list dim; split x size dim; chunk x n dim; narrow x dim start length
  select x dim index; squeeze x dim; unsqueeze x dim; transpose x i j; flatten x first last
  unfold x dim size step; diagonal x offset dim1 dim2; diag x offset; tril x k; triu x k
  roll x shifts dims; repeat_interleave x times dim; tensordot a b dims
  gather x dim idx; index_select x dim idx; take_along_dim x idx dim; index_add x dim idx src alpha
  index_copy x dim idx src; index_fill x dim idx value; masked_fill x mask value
  scatter x dim idx src; scatter_add x dim idx src; scatter_reduce x dim idx src reduce include_self
  index_add_ t dim idx src alpha; index_copy_ t dim idx src; index_fill_ t dim idx value
  masked_fill_ t mask value; scatter_ t dim idx src; scatter_add_ t dim idx src
  scatter_reduce_ t dim idx src reduce include_self
  dropout x p training; cdist x y p; cosine_similarity a b dim eps
  layernorm x gamma beta eps; rmsnorm x gamma eps; group_norm x groups gamma beta eps
  multinomial weights samples replacement; normal_ t mean std; uniform_ t low high; bernoulli_ t p
  size t dim; stride t dim
]]):gmatch "[^;\n]+" do
  local names = {}
  for name in line:gmatch "%S+" do names[#names + 1] = name end
  if names[1] then NAMED[table.remove(names, 1)] = names end
end

-- what PyTorch and NumPy call arguments
local WORDS = { axis = "dim", axes = "dim", dimension = "dim", keepdims = "keepdim", index = "idx",
  indices = "idx", unbiased = "correction", ddof = "correction", source = "src", start_dim = "first",
  end_dim = "last", dim0 = "i", dim1 = "j", chunks = "n", split_size = "size", repeats = "times",
  num_samples = "samples", diagonal = "k", min = "low", max = "high", from = "low", to = "high",
  ord = "p", weight = "gamma", bias = "beta", num_groups = "groups" }

--- The names of an operator's arguments if they may be named, else nil.
-- @tparam string op
function arguments.named(op) return NAMED[op] end

--- The operators whose arguments may be named, in the order of the alphabet.
function arguments.with_names()
  local list = {}
  for op in next, NAMED do list[#list + 1] = op end
  table.sort(list)
  return list
end

-- the arguments in their places: those before `at` as given, the others out of the table that stands there
local function placed(op, names, at, ...)
  local count, given = #names, { ... }
  for i = at + 1, count do
    if given[i] ~= nil then
      lib.fail("%s: named arguments come last, in one table; got %s after it", op, lib.show(given[i]))
    end
  end
  local place, by_name = {}, given[at]
  for i = 1, count do place[names[i]] = i end
  given[at] = nil
  for name, value in next, by_name do
    local i = place[name]
    if i and i < at then lib.fail("%s: %s is given twice, by its place and by its name", op, name) end
    if not i then
      local free = { unpack(names, at) }
      local word, near = place[WORDS[name]] and WORDS[name], nil
      if not word then near = lib.nearest and lib.nearest(tostring(name), free) end
      lib.fail("%s: unknown argument %s%s valid: %s", op, lib.show(name),
               (word or near) and (", did you mean '%s'?"):format(word or near) or ";",
               table.concat(free, ", "))
    end
    given[i] = value
  end
  return unpack(given, 1, count)
end

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

-- what runs operators of the script, or of a tape: errors are theirs
local RUNS = {}
for name in ([[backward grad gradcheck scope keep no_grad enable_grad checkpoint custom_op detect_anomaly
  nan_watch graph profile memory_profile leak_check help attend attention]]):gmatch "%S+" do
  RUNS[name] = true
end

--- f, but an argument more than it names is an error.
-- @tparam string op what starts the message
-- @tparam function f
-- @tparam[opt=1] integer from the first argument that the message shows: 2 for a method
-- @tparam[opt] table given names of its arguments, if they are others than it was written with
function arguments.exact(op, f, from, given)
  if not op:find "[.%u]" and not RUNS[op] then lib.operator(inside[f] or f, op) end
  if guarded[f] or inside[f] then return guarded[f] or f end
  signature[f] = given
  local count, names = arguments.of(f)
  if count == math.huge or names[count] == "more" then return f end
  local list = {}
  for i = 1, count do list[i] = "a" .. i end
  local plain = table.concat(list, ", ")
  list[count + 1] = "more"
  local by_name = {}
  if NAMED[op] then
    assert(#NAMED[op] == count, op)
    for i = 2, count do -- a table with names and no list in it, which is no object
      by_name[#by_name + 1] = (
        'if type(a%d) == "table" and getmetatable(a%d) == nil and a%d[1] == nil and next(a%d) ~= nil then '
        .. "return f(placed(%d, %s)) end "):format(i, i, i, i, i, plain)
    end
    signature[f], names = NAMED[op], NAMED[op]
  end
  local text = ([[local f, refuse, placed = ...
    return function(%s) if more ~= nil then refuse(more) end %s return f(%s) end]])
    :format(table.concat(list, ", "), table.concat(by_name), plain)
  local outer = loadstring(text, "@" .. lib.dir .. "/lacuna/arguments.lua")(f, function(value)
    arguments.refuse(op, names, from or 1, value)
  end, function(at, ...) return placed(op, names, at, ...) end)
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
