--- local lac = require "lacuna"
--
-- The namespace that scripts see: factories, operators, gradients, scopes, attention and the process-wide
-- switches, gathered from the modules that define them; nothing is defined here. Modules above the core (nn,
-- optim, io, train, ...) load when first used, so that a script pays for what it names and the core can be
-- used while an upper module is broken. Reading a name that does not exist raises an error with the nearest
-- one: `lac.zeroes` is a mistake, not nil.
--
-- Index conventions, in one place: dimensions, positions, slices and the results of argmax/argmin are 1-based
-- like all of Lua; the contents of index TENSORS (token ids, class targets, idx of index_select and gather,
-- and what sort, topk, nonzero, unique, searchsorted return) are data and 0-based, because they come from and
-- go to files and into gather; positions inside attention strips are 0-based as in the mathematics.

local lib = require "lacuna.lib"
local arguments = require "lacuna.arguments"
local class = require "lacuna.class"
local schema = require "lacuna.schema"
local synonyms = require "lacuna.synonyms"
local registry = require "lacuna.registry"
local device = require "lacuna.device"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"
require "lacuna.pretty"
local create = require "lacuna.create"
local ops = require "lacuna.ops"
local grad = require "lacuna.grad"
local recompute = require "lacuna.recompute"
local watch = require "lacuna.watch"

local lac = { class = class, registry = registry, schema = schema, is_tensor = tensor.is }

local function export(from, names)
  for name in names:gmatch("[%w_]+") do lac[name] = assert(from[name], name) end
end

export(device, [[default_dtype default_device devices threads version synchronize memory memory_limit
  reset_peak trim empty_cache event use_tf32]])
export(create,
       [[tensor from_string zeros ones full empty rand randn randint randperm bernoulli arange linspace eye
  zeros_like ones_like empty_like full_like rand_like randn_like manual_seed rng_state set_rng_state]])
export(grad, "grad no_grad enable_grad is_grad_enabled zero_grad custom_op")
for name, f in pairs(ops.fn) do
  local record = ops.table[name]
  if not (record and record.internal) and name ~= "slice" then lac[name] = f end
end
lac.scope, lac.keep = scope.run, scope.keep
lac.checkpoint = recompute.checkpoint
lac.nan_watch, lac.detect_anomaly = watch.nan_watch, watch.detect_anomaly

--- The path of the engine that was loaded.
lac.engine = lib.path

-- upper modules by name; each is a file that may or may not be there in a trimmed installation
local LAZY = { "nn", "optim", "io", "data", "log", "train", "bench", "plot", "repl", "profile" }
local lazy = {}
for _, name in ipairs(LAZY) do lazy[name] = true end
lazy.gradcheck, lazy.attend, lazy.attention, lazy.config = true, true, true, true
-- functions of upper modules: { module, name there }
local FUNCTIONS = { memory_report = { "memory", "report" }, memory_tracking = { "memory", "tracking" },
                    leak_check = { "memory", "leak_check" }, memory_profile = { "timeline", "run" },
                    graph = { "graph", "new" }, help = { "help", "about" } }
for name in pairs(FUNCTIONS) do lazy[name] = true end

-- Functions that set something for the whole process, and those of upper modules. They are no fields, so that
-- a write is seen: after lac.default_dtype = "f64" everything would go on in f32.
local settings = {}
for name in ([[default_dtype default_device threads use_tf32 manual_seed set_rng_state memory_limit
  nan_watch]]):gmatch "%S+" do
  settings[name], lac[name], lazy[name] = assert(lac[name], name), nil, true
end

-- reading a field that is not there is an error with the nearest one, as for lac itself, or with all
local function strict(name, t)
  if type(t) ~= "table" or getmetatable(t) then return t end
  return setmetatable(t, { __index = function(_, key)
    local names = {}
    for _, one in ipairs(schema.keys(t)) do
      if one:sub(1, 1) ~= "_" then names[#names + 1] = one end
    end
    local hint = schema.hint(key, names, "lac." .. name .. ".%s")
    lib.fail("there is no lac.%s.%s%s", name, tostring(key),
      hint ~= "" and hint or "; there are " .. table.concat(names, ", "))
  end, __newindex = schema.refuse_values("lac." .. name) })
end

local function load_lazy(name)
  if settings[name] then return settings[name] end
  if name == "config" then -- the owners of the kinds register them
    lac.config = require "lacuna.config"
    for _, owner in ipairs { "attention", "nn", "memory" } do require("lacuna." .. owner) end
    arguments.guard(lac.config, "config.")
    return lac.config
  end
  if name == "attend" or name == "attention" then
    local attention = require "lacuna.attention"
    require "lacuna.nn.masks" -- the scorer of "adaptive"
    --- nn.MultiheadDilatedAttention under the name that attention.matrix tries it by.
    attention.multihead = function(options) return lac.nn.MultiheadDilatedAttention(options) end
    arguments.guard(attention, "")
    arguments.guard(attention.masks, "masks.")
    lac.attend, lac.attention = attention.attend, attention
    return lac[name]
  end
  local from = FUNCTIONS[name]
  if from then
    settings[name] = arguments.exact(name, require("lacuna." .. from[1])[from[2]])
    return settings[name]
  end
  local path = "lacuna." .. name
  if not package.loaded[path] and not package.searchpath(path, package.path) then return nil end
  local value = strict(name, require(path))
  if name == "optim" then
    strict("optim.schedule", value.schedule)
    arguments.guard(value.schedule, "optim.schedule.")
  end
  if type(value) == "table" then arguments.guard(value, name .. ".") end
  lac[name] = type(value) == "function" and arguments.exact(name, value) or value
  return value
end

-- functions of tensors have the names that methods have
local words = setmetatable({}, { __index = function(_, name)
  return synonyms.lac[name] or synonyms.tensor[name]
    or synonyms.dtype[name] and ("the name of a dtype, '%s'"):format(synonyms.dtype[name])
end })

local function unknown(_, name)
  local value = lazy[name] and load_lazy(name)
  if value ~= nil and value ~= false then return value end
  local names = schema.keys(lac)
  for key in pairs(lazy) do names[#names + 1] = key end
  lib.fail("there is no lac.%s%s", tostring(name), schema.hint(name, names, "lac.%s", words))
end

-- numbers, texts and the like are options that somebody means to set
local function set_field(_, name, value)
  local kind = type(value)
  if kind ~= "function" and (settings[name] or kind ~= "table") then
    local shown = schema.show(value)
    lib.fail("there is no lac.%s to set%s", tostring(name), (settings[name] or rawget(lac, name)
      or FUNCTIONS[name]) and (", it is a function: lac.%s(%s)"):format(name, shown)
      or schema.hint(name, schema.keys(settings), "lac.%s(...)", words))
  end
  rawset(lac, name, value)
end

-- only an error needs it
lib.memory_detail = function(pool) return require("lacuna.memory").detail(pool) end

arguments.guard(tensor.methods, "")
arguments.guard(lac, "")
arguments.guard(settings, "")

require("lacuna.environment").check()
local setting = os.getenv("LACUNA_MEMORY")
if setting and setting ~= "" then require("lacuna.memory").configure(setting) end

-- __names: what completion may offer beyond the fields that are there already
return setmetatable(lac, {
  __index = unknown,
  __newindex = set_field,
  __settings = settings,
  __names = lazy,
  __tostring = function() return "lacuna " .. device.version() end,
})
