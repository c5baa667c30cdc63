--- train/checkpoint.lua: everything that a run needs to go on, in one file that is whole or absent.
--
-- A checkpoint is a safetensors file: the model's and the optimizer's tensors, and as metadata the step, the
-- state of the random stream, the configuration of run, model and optimizer, and what train.fit knows (its
-- averages, the position of its log). Data needs nothing but the step, because a batch is a function of it.
-- The file is written beside its place, synced, renamed; the directory is synced. So at every moment the path
-- holds the old checkpoint or the new one. Every byte is under a checksum, which loading compares: a file
-- that was cut off or in which a bit fell over is refused, never trained on.
--
-- `path` is always the newest. With keep > 1 the one before it gets a second name with its step,
-- checkpoint-00000200.safetensors, before the new one takes the path; the oldest beyond `keep` is removed
-- last. latest() looks at all of them, newest first, and gives the first that verifies, with the reasons
-- against the newer ones. Temporary files of processes that are gone are removed when a run starts, at each
-- of its writes and at its end.
--
-- Rejected: numbered files and a pointer file "latest" (two files that have to agree after a crash); a
-- directory per checkpoint (its rename is atomic only if the target is absent); pickled objects (code in
-- data).

local schema = require "lacuna.schema"
local create = require "lacuna.create"
local json = require "lacuna.json"
local sys = require "lacuna.sys"
local store = require "lacuna.io"
local config = require "lacuna.config"
local nn = require "lacuna.nn"

local fail, show = schema.fail, schema.show
local FORMAT = "lacuna-checkpoint-2"
local NAME = "checkpoint.safetensors" -- in a run's folder

local checkpoint = { format = FORMAT }

-- ---- names ------------------------------------------------------------------------------------------------

-- a folder means the checkpoint in it
local function file_of(path)
  if sys.is_directory(path) then return path .. "/" .. NAME end
  return path
end

local function split(path)
  local dir, base = sys.dirname(path), path:match("[^/]*$")
  local stem, extension = base:match("^(.+)(%.[^.]+)$")
  return dir, base, stem or base, extension or ""
end

-- files beside `path` named head .. middle .. tail: list of { path, middle }
local function siblings(path, head, pattern, tail)
  local dir, list = sys.dirname(path), {}
  for _, name in ipairs(sys.list(dir) or {}) do
    local middle = name:sub(#head + 1, #name - #tail)
    if name == head .. middle .. tail and middle:match(pattern) then
      list[#list + 1] = { path = path:sub(1, #path - #path:match("[^/]*$")) .. name, middle = middle }
    end
  end
  return list
end

local function numbered(path, step)
  local _, base, stem, extension = split(path)
  return ("%s%s-%08d%s"):format(path:sub(1, #path - #base), stem, step, extension)
end

-- older checkpoints beside `path`, in the order of their steps: list of { path, step }
local function older(path)
  local _, _, stem, extension = split(path)
  local list = siblings(path, stem .. "-", "^%d%d%d%d%d%d%d%d+$", extension)
  for _, file in ipairs(list) do file.step = tonumber(file.middle) end
  table.sort(list, function(x, y) return x.step < y.step end)
  return list
end

--- Remove the temporary files that killed processes have left beside a checkpoint.
-- @tparam string path of the checkpoint
-- @treturn table paths that were removed
function checkpoint.clean(path)
  local _, base = split(path)
  local removed = {}
  for _, file in ipairs(siblings(path, base .. ".", "^%d+%-%d+$", ".tmp")) do
    local pid = tonumber(file.middle:match("^%d+"))
    if pid ~= sys.pid() and not sys.process_exists(pid) and os.remove(file.path) then
      removed[#removed + 1] = file.path
    end
  end
  return removed
end

-- ---- writing ----------------------------------------------------------------------------------------------

local SAVE = {
  model = { type = "table", required = true },
  optimizer = { type = "table" },
  step = { type = "integer", min = 0, default = 0 },
  config = { type = "table" },
  fit = { type = "table" },
  rng = { type = "table" },
  keep = { type = "integer", min = 1, default = 1 },
  fresh = { type = "boolean", default = false },
}

-- class and options of a model that lac.nn can make again, else nothing
local function model_config(model)
  local class = getmetatable(model)
  local name = type(class) == "table" and rawget(class, "__name")
  local options = schema.own_field(model, "options")
  if not name or type(options) ~= "table" or rawget(nn, name) ~= class then return nil end
  config.expect_settled(options)
  return { class = name, options = options }
end

local function contents(o)
  local tensors = {}
  for name, t in pairs(o.model:state_dict()) do tensors["model." .. name] = t end
  local rng = o.rng
  if not rng then
    local seed, offset = create.rng_state()
    rng = { seed = seed, offset = offset }
  end
  local metadata = { format = FORMAT, step = ("%d"):format(o.step), config = json.encode(o.config or {}),
    rng = json.encode(rng) }
  local model = model_config(o.model)
  if model then metadata.model = json.encode(model) end
  if o.fit then metadata.fit = json.encode(o.fit, { nan = "string" }) end
  if o.optimizer then
    local state, steps = o.optimizer:state_dict()
    for name, t in pairs(state) do tensors["optimizer." .. name] = t end
    metadata.optimizer_steps = ("%d"):format(steps)
    metadata.optimizer = json.encode(o.optimizer:config())
  end
  return tensors, metadata
end

-- give the checkpoint that is about to be replaced a name of its own, unless it is no older than the new one
local function archive(path, step)
  local ok, _, metadata = pcall(store.inspect, path)
  local old = ok and tonumber(metadata.step)
  if not old or old >= step then return end
  local name = numbered(path, old)
  os.remove(name) -- from a run that was killed between this link and the rename that follows it
  if not sys.link(path, name) then os.rename(path, name) end -- a file system without hard links
end

local function prune(path, step, keep)
  local list = older(path)
  for i = #list, 1, -1 do
    if list[i].step >= step then os.remove(table.remove(list, i).path) end
  end
  for i = 1, #list - (keep - 1) do os.remove(list[i].path) end
end

--- Write model, optimizer, step, configuration and the state of the random stream to one safetensors file,
-- atomically and under a checksum.
-- @tparam string path
-- @tparam table options model; optimizer; step = 0; config = any table that JSON can hold; keep = 1: how many
--   checkpoints stay (the older ones as <name>-<step>.safetensors beside it); fresh = true: a new run, no
--   older one stays. (train.fit also gives rng and fit, its own state.)
-- @treturn string path
-- @raise the file cannot be written (disk full, no such directory, ...); the previous checkpoint is intact
function checkpoint.save(path, options)
  local o = schema.options("save_checkpoint", options, SAVE)
  schema.check("save_checkpoint", "path", path, { type = "string" })
  path = file_of(path)
  checkpoint.clean(path) -- again: a process that was just killed may have counted as alive at the start
  local tensors, metadata = contents(o)
  if o.keep > 1 and not o.fresh then archive(path, o.step) end
  store.save(path, tensors, metadata, { checksum = true })
  if o.fresh then
    prune(path, 0, 1)
  elseif o.keep > 1 then
    prune(path, o.step, o.keep)
  end
  return path
end

-- ---- reading ----------------------------------------------------------------------------------------------

-- why a file is no sound checkpoint, or nil and its metadata
local function complaint(path)
  local ok, checked, metadata = pcall(store.verify, path)
  if not ok then return (tostring(checked):gsub("^io%.%a+: ", ""):gsub(" %[[^%]]*%]$", "")) end
  if metadata.format ~= FORMAT then
    return ("%s is not a %s file: its metadata `format` is %s"):format(path, FORMAT, show(metadata.format))
  end
  if not checked then return path .. " carries no checksum" end
  return nil, metadata
end

--- The newest checkpoint that verifies.
-- @tparam string path a checkpoint, or a folder that holds checkpoint.safetensors; the older ones beside it
--   (see keep) are looked at too
-- @treturn ?string path of that file; nil if there is no checkpoint at all
-- @treturn ?number its step
-- @treturn table damaged newer ones: list of { path, reason }
-- @raise there are checkpoints, but none verifies
function checkpoint.latest(path)
  schema.check("latest", "path", path, { type = "string" })
  path = file_of(path)
  local list, damaged = older(path), {}
  if sys.exists(path) then list[#list + 1] = { path = path } end
  for i = #list, 1, -1 do
    local reason, metadata = complaint(list[i].path)
    if not reason then return list[i].path, tonumber(metadata.step), damaged end
    damaged[#damaged + 1] = { path = list[i].path, reason = reason }
  end
  if #damaged > 0 then
    local reasons = {}
    for i, d in ipairs(damaged) do reasons[i] = d.reason end
    fail("latest", "no checkpoint verifies: %s", table.concat(reasons, "; "))
  end
  return nil, nil, damaged
end

local function decode(path, metadata, key)
  local value, reason = json.decode(metadata[key] or "")
  if type(value) ~= "table" then
    fail("load_checkpoint", "%s: metadata `%s` is not JSON: %s", path, key, tostring(reason))
  end
  return value
end

-- tensors of a file by owner; checks format and checksum
local function read(path, with_optimizer)
  local tensors, metadata, checked = store.load(path, { only = function(name)
    return with_optimizer or name:sub(1, 10) ~= "optimizer."
  end })
  if metadata.format ~= FORMAT then
    fail("load_checkpoint", "%s is not a %s file: its metadata `format` is %s", path, FORMAT,
      show(metadata.format))
  end
  if not checked then fail("load_checkpoint", "%s carries no checksum", path) end
  local model, state = {}, {}
  for name, t in pairs(tensors) do
    local part, rest = name:match("^(%a+)%.(.+)$")
    local into = part == "model" and model or part == "optimizer" and state
    if not into then
      fail("load_checkpoint", "%s holds a tensor %q that belongs to neither model nor optimizer", path, name)
    end
    into[rest] = t
  end
  return metadata, model, state
end

-- what a script may change between the sessions of a run: schedules do it at every step
local FREE = { lr = true, weight_decay = true }

local function load_optimizer(path, optimizer, metadata, state)
  local steps = tonumber(metadata.optimizer_steps)
  if not steps then fail("load_checkpoint", "%s holds no optimizer state", path) end
  local saved, own = decode(path, metadata, "optimizer"), optimizer:config()
  if saved.kind ~= own.kind then
    fail("load_checkpoint", "%s holds the state of %s, but the optimizer is %s", path, show(saved.kind),
      show(own.kind))
  end
  local differences = {}
  for _, name in ipairs(schema.keys(own)) do
    -- what an older file does not hold cannot be compared
    if not FREE[name] and saved[name] ~= nil and json.encode(saved[name]) ~= json.encode(own[name]) then
      differences[#differences + 1] = ("%s was %s and is %s"):format(name, show(saved[name]), show(own[name]))
    end
  end
  if #differences > 0 then
    fail("load_checkpoint", "the optimizer is not the one whose state %s holds: %s", path,
      table.concat(differences, ", "))
  end
  optimizer:load_state_dict(state, steps)
end

--- Restore what save_checkpoint wrote.
-- @tparam string path a checkpoint, or a folder that holds checkpoint.safetensors
-- @tparam[opt] table options model, optimizer: what to restore into; rng = true restores the random stream
--   too
-- @treturn table { step, config, model = { class, options } if lac.nn can make it again, optimizer = its
--   configuration, fit = what train.fit stored }
-- @raise not a checkpoint of this kind; damaged; names or shapes that do not fit; an optimizer of another
-- kind
--   or with other options than the one that was saved (lr and weight_decay may differ)
function checkpoint.load(path, options)
  local o = schema.options("load_checkpoint", options, { model = { type = "table" },
    optimizer = { type = "table" },
    rng = { type = "boolean", default = false } })
  schema.check("load_checkpoint", "path", path == nil and false or path, { type = "string" })
  path = file_of(path)
  local metadata, model, state = read(path, o.optimizer ~= nil)
  local info = { path = path, step = tonumber(metadata.step), config = decode(path, metadata, "config"),
    model = metadata.model and decode(path, metadata, "model"),
    optimizer = metadata.optimizer and decode(path, metadata, "optimizer"),
    fit = metadata.fit and decode(path, metadata, "fit") }
  local rng = decode(path, metadata, "rng")
  if o.model then o.model:load_state_dict(model) end
  if o.optimizer then load_optimizer(path, o.optimizer, metadata, state) end
  if o.rng then create.set_rng_state(rng.seed, rng.offset) end
  return info
end

--- Make the model of a checkpoint again and load its weights. The random stream is left as it was.
-- @tparam string path a checkpoint, or a run's folder (then the newest that verifies)
-- @tparam[opt] table options build = function(config, model configuration) -> Module, for models that are not
--   classes of lac.nn
-- @treturn Module in evaluation mode
-- @treturn table what load_checkpoint returns
function checkpoint.load_model(path, options)
  local o = schema.options("load_model", options, { build = { type = "function" } })
  schema.check("load_model", "path", path == nil and false or path, { type = "string" })
  if sys.is_directory(path) then
    local found = checkpoint.latest(path)
    if not found then fail("load_model", "there is no checkpoint in %s", path) end
    path = found
  end
  local metadata, state = read(path, false)
  local described = metadata.model and decode(path, metadata, "model")
  local seed, offset = create.rng_state()
  local model
  if o.build then
    model = o.build(decode(path, metadata, "config"), described)
    if not nn.is_module(model) then fail("load_model", "build must return a module, got %s", show(model)) end
  elseif not described then
    fail("load_model", "%s does not say how to make its model (only classes of lac.nn with an options table "
      .. "are described): give build = function(config) ... end", path)
  elseif rawget(nn, described.class) == nil then
    fail("load_model", "%s holds a %s, which lac.nn does not have", path, show(described.class))
  else
    model = nn[described.class](described.options)
  end
  create.set_rng_state(seed, offset)
  model:load_state_dict(state):eval()
  return model, { path = path, step = tonumber(metadata.step), config = decode(path, metadata, "config"),
    model = described }
end

--- Take damaged files out of the way, so that no later run looks at them: they get the ending .damaged.
-- @tparam table damaged as latest gives it
function checkpoint.set_aside(damaged)
  for _, d in ipairs(damaged) do os.rename(d.path, d.path .. ".damaged") end
end

checkpoint.file_of = file_of

return checkpoint
