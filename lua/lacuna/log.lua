--- log.lua: what a run did, as files that outlive it.
--
-- A run is a folder, runs/<name>-<time>, with config.json (what was asked for), log.jsonl (what happened, one
-- JSON object a line) and whatever else the script puts there. JSON lines, because a line is complete or
-- absent: a killed run leaves a readable log, `tail -f` follows it, and every tool reads it. Each line is
-- flushed. NaN and infinities, which a diverging run does produce, are written as the strings "NaN" and
-- "Infinity" and come back as numbers from log.read.
--
-- A checkpoint remembers how long the log was (position), and a run that goes on from it cuts the log there
-- (rewind): steps that are done again are then written once, and the log of a run that was killed ten times
-- is that of one that never was, but for times.
--
-- The folder is made with mkdir, which fails if it exists, so two runs started in the same second get two
-- folders (-2, -3, ...); checking first and creating later would let them share one. A folder that was named
-- can be named twice: a job that is started again while the first still runs, the same line in two terminals.
-- Two writers would cut each other's records and replace each other's checkpoints, so an open log claims its
-- file (flock: it goes with the process, so a killed run leaves nothing behind) and the second is refused.
-- Within one process the log that was opened last has the claim; one that was dropped is none.
-- lac.log is the logarithm, so this module is reached by require "lacuna.log".
-- Rejected: TensorBoard's event files (protocol buffers, a foreign viewer), CSV (columns change between
-- events).

local lfs = require "lfs"

local json = require "lacuna.json"
local sys = require "lacuna.sys"
local schema = require "lacuna.schema"
local class = require "lacuna.class"

local SPECIAL = { NaN = 0 / 0, Infinity = math.huge, ["-Infinity"] = -math.huge }
local ORDER = { "event", "step", "time" }

-- Written beside and renamed: whoever looks finds the old text or the new one, whole, also when the process
-- was killed or the disk is full. The name beside is always the same, so that the next run writes over what a
-- killed one has left; the claim keeps other processes away.
local function write_file(path, text)
  local temporary = path .. ".tmp"
  local file, reason = io.open(temporary, "wb")
  local ok = file
  if file then
    ok, reason = file:write(text)
    if ok then ok, reason = sys.sync(file) end
    file:close()
  end
  if ok then ok, reason = os.rename(temporary, path) end
  if not ok then
    os.remove(temporary)
    schema.fail("log", "cannot write %s: %s", path, (tostring(reason):gsub("^.*: ", "")))
  end
  sys.sync_directory(sys.dirname(path))
end

local Log = class("Log")
schema.refuse_new_fields(Log, function() return "; options are given to log.open" end)

local holders = setmetatable({}, { __mode = "v" }) -- this process's logs, by file

local function claim(log, path)
  local attributes = lfs.attributes(path)
  local identity = ("%.0f:%.0f"):format(attributes.dev, attributes.ino)
  local mine = sys.claim(log.file)
  if mine == false then
    collectgarbage() -- closes the file of a log that was dropped
    local before = holders[identity]
    if before and before.file then sys.disclaim(before.file) end
    mine = sys.claim(log.file)
  end
  if mine == false then
    log.file:close()
    schema.fail("log", "another process is writing %s: let it end or stop it, or take another folder", path)
  end
  holders[identity] = log
end

function Log:init(dir, append)
  local path = dir .. "/log.jsonl"
  -- always in append mode, so that rewind is a cut and nothing more; e: programs that are started do not
  -- inherit the file, and with it the claim
  local file, reason = io.open(path, "abe")
  if not file then schema.fail("log", "cannot write %s", reason) end
  self.dir, self.file, self.started = dir, file, sys.time()
  claim(self, path)
  if not append then
    local ok, why = sys.truncate(path, 0)
    if not ok then schema.fail("log", "cannot cut %s: %s", path, why) end
  end
  self.bytes = file:seek("end")
  schema.complete(self)
end

function Log:__tostring()
  return ("Log(%s%s)"):format(self.dir, self.file and "" or ", closed")
end

--- A path inside the run's folder.
-- @tparam string name
-- @treturn string
function Log:path(name)
  return self.dir .. "/" .. name
end

--- Append one record; `time` (seconds since the log was opened) is added.
-- @tparam table record string keys; field `event` says what kind of record it is
function Log:write(record)
  if not self.file then schema.fail("log", "%s is closed", self.dir) end
  if type(record) ~= "table" or type(record.event) ~= "string" then
    schema.fail("log", "a record is a table with a string field `event`")
  end
  local copy = {}
  for key, value in pairs(record) do copy[key] = value end
  copy.time = math.floor((sys.time() - self.started) * 1000 + 0.5) / 1000
  local ok, line = pcall(json.encode, copy, { nan = "string", order = ORDER })
  if not ok then error(line, 0) end
  local good, reason = self.file:write(line, "\n")
  if good then good, reason = self.file:flush() end
  if not good then schema.fail("log", "cannot write to %s/log.jsonl: %s", self.dir, tostring(reason)) end
  self.bytes = self.bytes + #line + 1
end

--- Where the log is now: its bytes so far, and its clock.
-- @treturn table { bytes, time }
function Log:position() return { bytes = self.bytes, time = sys.time() - self.started } end

--- Push what was written to the disk, so that a checkpoint never knows of records that a power cut can lose.
function Log:sync()
  local ok, reason = sys.sync(self.file)
  if not ok then schema.fail("log", "cannot write to %s/log.jsonl: %s", self.dir, reason) end
end

--- Go back to an earlier position: later records are cut off, the clock goes on from there.
-- @tparam table position what position() gave, in this process or an earlier one
function Log:rewind(position)
  if not self.file then schema.fail("log", "%s is closed", self.dir) end
  if self.bytes < position.bytes then
    schema.fail("log", "%s/log.jsonl has %d bytes, but had %d when the checkpoint was written: it is another "
      .. "log", self.dir, self.bytes, position.bytes)
  end
  local ok, reason = sys.truncate(self:path("log.jsonl"), position.bytes)
  if not ok then schema.fail("log", "cannot cut %s/log.jsonl: %s", self.dir, reason) end
  self.bytes, self.started = position.bytes, sys.time() - position.time
end

--- Write the configuration to config.json, indented, keys sorted.
-- @tparam table config
function Log:config(config)
  local ok, text = pcall(json.encode, config, { indent = 2, nan = "string" })
  if not ok then error(text, 0) end
  write_file(self:path("config.json"), text .. "\n")
end

--- Write any text file into the run's folder.
-- @tparam string name
-- @tparam string text
function Log:save(name, text)
  write_file(self:path(name), text)
end

--- Close the file. Closing twice is harmless; writing afterwards is an error.
function Log:close()
  if self.file then
    self.file:close()
    self.file = false
  end
end

local log = {}

--- Start a run's folder and its log.
-- @tparam table options name = "run"; dir = "runs" (the parent folder); or path = the very folder to use,
--   with append = true: go on after the records that log.jsonl has (false empties it)
-- @treturn Log
function log.open(options)
  local o = schema.options("log.open", options, {
    name = { type = "string" }, dir = { type = "string" }, path = { type = "string" },
    append = { type = "boolean" },
  })
  if o.path then
    if o.name or o.dir then
      schema.fail("log.open", "path is the whole folder: %s does nothing beside it",
        o.name and "name" or "dir")
    end
    if o.append == nil then o.append = true end
    local ok, reason = sys.mkdir(o.path)
    if not ok then schema.fail("log", "%s", reason) end
    return Log(o.path, o.append)
  end
  if o.append == false then
    schema.fail("log.open", "append = false empties the log of a path; without one the folder is always new")
  end
  o.name, o.dir = o.name or "run", o.dir or "runs"
  if not o.name:match("^[%w%._%-]+$") then
    schema.fail("log.open", "name %q may hold letters, digits, dots, dashes and underscores only", o.name)
  end
  local ok, reason = sys.mkdir(o.dir)
  if not ok then schema.fail("log", "%s", reason) end
  local base, count = ("%s/%s-%s"):format(o.dir, o.name, os.date("%Y%m%d-%H%M%S")), 1
  while true do
    local path = count == 1 and base or base .. "-" .. count
    local made, why = sys.mkdir_new(path)
    if made then return Log(path, true) end
    if made == nil then schema.fail("log", "%s", why) end
    count = count + 1
  end
end

--- The newest run that open has made under a name.
-- @tparam table options name = "run"; dir = "runs"
-- @treturn ?string its folder, nil if there is none
function log.newest(options)
  local o = schema.options("log.newest", options, {
    name = { type = "string", default = "run" },
    dir = { type = "string", default = "runs" },
  })
  local newest, newest_stamp, newest_count
  for _, entry in ipairs(sys.list(o.dir) or {}) do
    local stamp, count = entry:sub(#o.name + 1):match("^%-(%d+%-%d+)%-?(%d*)$")
    count = tonumber(count) or 1
    if entry:sub(1, #o.name) == o.name and stamp
      and (not newest or stamp > newest_stamp or (stamp == newest_stamp and count > newest_count)) then
      newest, newest_stamp, newest_count = o.dir .. "/" .. entry, stamp, count
    end
  end
  return newest
end

--- The configuration that a run's folder has.
-- @tparam string dir
-- @treturn ?table what Log:config was given; nil if there is none, nil and the reason if it cannot be read
function log.config(dir)
  local path = dir .. "/config.json"
  if not sys.exists(path) then return nil end
  local file, reason = io.open(path, "rb")
  if not file then return nil, reason end
  local text = file:read("*a") or ""
  file:close()
  local config, why = json.decode(text)
  if type(config) == "table" then return config end
  return nil, ("%s: %s"):format(path, why or "not an object")
end

local function restore(value)
  if type(value) == "string" then return SPECIAL[value] or value end
  if type(value) == "table" then
    for key, item in pairs(value) do value[key] = restore(item) end
  end
  return value
end

--- Read a log.jsonl back.
-- @tparam string path
-- @treturn table list of records
-- @raise names the line that is not JSON
function log.read(path)
  local file, reason = io.open(path, "rb")
  if not file then schema.fail("log.read", "cannot read %s", reason) end
  local records, number = {}, 0
  for line in file:lines() do
    number = number + 1
    local record, why = json.decode(line)
    if record == nil then
      file:close()
      schema.fail("log.read", "%s, line %d: %s", path, number, why)
    end
    records[number] = restore(record)
  end
  file:close()
  return records
end

return log
