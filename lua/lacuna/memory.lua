--- What is alive, who made it, and what should not be alive any more.
--
-- The engine's pool is the only book: its list of blocks says how many bytes are in use, of which dtype and
-- shape, and what for (parameters, gradients, an optimizer's state, working memory), without having been
-- asked to keep track. What costs time is the script line, so that is opt-in: lac.memory_tracking(true), or
-- LACUNA_MEMORY=trace in the environment. A report reads the list, so its lines add up to the pool's live
-- bytes exactly, also for tensors that nobody can reach any more and that the collector has not found yet;
-- collecting first is the caller's choice (lac.memory_report{ collect = true }).
--
-- The leak check counts blocks that were made while a function ran and that are alive after it, its results
-- dropped and two collections done. Then nobody may hold them but something that outlives the call: a global,
-- a cache, a closure. The report says which lines made them.
--
-- Rejected: a weak table of all tensors (it does not see what the engine holds, and slows the collector
-- down), sizes summed over tensors (views count twice).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local scope = require "lacuna.scope"
local sites = require "lacuna.sites"
local config = require "lacuna.config"

local ffi, C = lib.ffi, lib.C
local bytes_text = lib.bytes_text
local memory = {}
config.define("pool", device.pool_options)

local USES = { [0] = "other", "parameters", "gradients", "optimizer", "workspace" }
memory.uses = USES

-- ---- reading the pool -----------------------------------------------------------------------------------

local function shape_text(b)
  if b.dtype < 0 then return "workspace of " .. (b.op or "?") end
  local sizes = {}
  for i = 1, b.ndim do sizes[i] = ("%d"):format(tonumber(b.shape[i - 1])) end
  return device.dtype_name[b.dtype] .. " [" .. table.concat(sizes, " x ") .. "]"
end

--- A lac_block_info as a Lua table.
-- @treturn table serial, time (ns), bytes (as taken from the pool), asked, op, kind, use, site, backward,
--   what ("f32 [2 x 3]")
function memory.block(raw)
  local b = { serial = tonumber(raw.serial), time = raw.time, bytes = tonumber(raw.bytes),
              asked = tonumber(raw.asked), op = raw.op ~= nil and ffi.string(raw.op) or nil, kind = raw.kind,
              use = USES[raw.role], site = raw.site, backward = raw.tag == 1, dtype = raw.dtype,
              ndim = raw.ndim, shape = raw.shape }
  b.what = shape_text(b)
  b.shape = nil -- a reference into the struct, which is used again
  return b
end

--- Every block in use, newest first.
-- @tparam[opt] number pool its code; the CPU's unless given
-- @treturn table list of tables as of memory.block
function memory.blocks(pool)
  pool = pool or C.LAC_CPU
  lib.bury()
  local n = tonumber(C.lac_memory_blocks(pool, nil, 0))
  local raw = ffi.new("lac_block_info[?]", math.max(n, 1))
  -- between the calls the collector may have run
  n = math.min(n, tonumber(C.lac_memory_blocks(pool, raw, n)))
  local list = {}
  for i = 1, n do list[i] = memory.block(raw[i - 1]) end
  return list
end

-- ---- groups ---------------------------------------------------------------------------------------------

-- sums by key(block), largest first
local function group(blocks, key)
  local groups, by = {}, {}
  for _, b in ipairs(blocks) do
    local name = key(b)
    local g = by[name]
    if not g then
      g = { name = name, bytes = 0, count = 0 }
      by[name], groups[#groups + 1] = g, g
    end
    g.bytes, g.count = g.bytes + b.bytes, g.count + 1
  end
  table.sort(groups, function(a, b)
    if a.bytes ~= b.bytes then return a.bytes > b.bytes end
    return a.name < b.name
  end)
  return groups
end
memory.group = group

-- where a block was made; working memory has no tensor and so no site
local function line_of(b, short)
  if b.use == "workspace" then return "(workspace of " .. (b.op or "?") .. ")" end
  return sites.text(b.site, short)
end
memory.line_of = line_of

-- serial of a block -> depth of the scope that will release it
local function scope_depths()
  local depths, info = {}, ffi.new("lac_block_info")
  for depth, owners in ipairs(scope.owners()) do
    for _, t in ipairs(owners) do
      if C.lac_tensor_block(t.c, info) == 0 then depths[tonumber(info.serial)] = depth end
    end
  end
  return depths
end

local KEYS = {
  use = function(b) return b.use end,
  shape = function(b) return b.what end,
  line = function(b) return line_of(b) end,
}

local function scope_key()
  local depths = scope_depths()
  return function(b)
    if b.use == "workspace" then return "working memory of operators" end
    local depth = depths[b.serial]
    return depth and ("scope %d"):format(depth) or "outside of scopes"
  end
end

-- ---- the report -----------------------------------------------------------------------------------------

local TITLES = { use = "by use", scope = "by scope (1 is the outermost)", shape = "by dtype and shape",
                 line = "by the line that made it" }
local ORDER = { "use", "scope", "shape", "line" }

local function rows_text(lines, title, groups, total, top)
  lines[#lines + 1] = ""
  lines[#lines + 1] = ("%-58s %12s %7s %7s"):format(title, "bytes", "blocks", "share")
  for i, g in ipairs(groups) do
    if i > top and #groups > top + 1 then
      local bytes, count = 0, 0
      for k = i, #groups do bytes, count = bytes + groups[k].bytes, count + groups[k].count end
      g = { name = ("%d more"):format(#groups - top), bytes = bytes, count = count }
    end
    local name = #g.name > 56 and g.name:sub(1, 53) .. "..." or g.name
    lines[#lines + 1] = ("  %-56s %12s %7d %6.1f%%"):format(name, bytes_text(g.bytes), g.count,
                                                          total > 0 and 100 * g.bytes / total or 0)
    if i > top and #groups > top + 1 then break end
  end
end

local Report = {}
Report.__index = Report

function Report:__tostring()
  local lines = { tostring(self.stats) }
  for _, by in ipairs(ORDER) do
    if self[by] then rows_text(lines, TITLES[by], self[by], self.bytes, self.top) end
  end
  if not self.tracked then
    lines[#lines + 1] = "\nlac.memory_tracking(true), or LACUNA_MEMORY=trace, adds the lines that made it"
  end
  return table.concat(lines, "\n")
end

local REPORT = {
  by = { one_of = { "use", "scope", "shape", "line" } },
  top = { type = "integer", min = 1, default = 10 },
  collect = { type = "boolean", default = false },
  device = { type = "string", default = "cpu" },
}

--- What is alive: bytes and blocks by use, by scope, by dtype and shape, and by script line.
-- @tparam[opt] table options by = "use", "scope", "shape" or "line": only that (default: all; lines only if
--   tracking is on); top = 10 rows of each; collect = false: collect garbage first; device = "cpu": whose
--   pool, as for lac.memory
-- @treturn table print it; fields stats (as of lac.memory()), bytes, tracked, and use, scope, shape, line:
--   lists of { name, bytes, count }, largest first, each of which adds up to `bytes`
function memory.report(options)
  local o = schema.options("memory_report", options, REPORT)
  if o.by == "line" and not sites.tracked() then
    schema.fail("memory_report", "lines are not tracked; call lac.memory_tracking(true) before the tensors "
      .. "are made, or set LACUNA_MEMORY=trace")
  end
  if o.collect then lib.collect() end
  local pool = device.pool("memory_report", o.device)
  local blocks = memory.blocks(pool)
  local report = setmetatable({ stats = lib.memory_stats(pool), bytes = 0, top = o.top,
                                tracked = sites.tracked() }, Report)
  for _, b in ipairs(blocks) do report.bytes = report.bytes + b.bytes end
  for _, by in ipairs(ORDER) do
    local wanted = o.by == by or (not o.by and (by ~= "line" or report.tracked))
    if wanted then report[by] = group(blocks, KEYS[by] or scope_key()) end
  end
  return report
end

-- ---- tracking -------------------------------------------------------------------------------------------

local tracking = false

--- What holds most of a pool, for the error of a full one: by line while lines are tracked, else by dtype
-- and shape.
function memory.detail(pool)
  local parts = {}
  for i, g in ipairs(group(memory.blocks(pool), tracking and KEYS.line or KEYS.shape)) do
    if i > 5 then break end
    parts[i] = ("\n  %12s in %5d blocks  %s"):format(bytes_text(g.bytes), g.count, g.name)
  end
  if #parts == 0 then return "" end
  return "; most of it " .. (tracking and "was made by" or "is (lac.memory_tracking(true) names the lines)")
    .. table.concat(parts) .. "\n"
end

--- Remember for every new tensor which line of the script made it; costs some microseconds a tensor.
-- @tparam[opt] boolean on nil only asks
-- @treturn boolean is tracking on?
function memory.tracking(on)
  if on == nil then return tracking end
  schema.check("memory_tracking", "on", on, { type = "boolean" })
  if on ~= tracking then
    tracking = on
    sites.track(on)
  end
  return tracking
end

-- ---- leaks ----------------------------------------------------------------------------------------------

local Leaks = {}
Leaks.__index = Leaks

function Leaks:__tostring()
  if self.count == 0 then return "no leak: everything that was made is gone" end
  local lines = { ("%d block%s, %s, survive%s:"):format(self.count, self.count == 1 and "" or "s",
    bytes_text(self.bytes), self.count == 1 and "s" or "") }
  rows_text(lines, "made by", self.line, self.bytes, 20)
  rows_text(lines, "dtype and shape", self.shape, self.bytes, 20)
  return table.concat(lines, "\n")
end

--- The living blocks that were made after block number `serial` (lac.memory().allocations of then).
-- @treturn table as the second result of memory.leak_check
function memory.survivors(serial)
  local survivors, bytes = {}, 0
  for _, b in ipairs(memory.blocks()) do
    if b.serial > serial then survivors[#survivors + 1], bytes = b, bytes + b.bytes end
  end
  return setmetatable({ count = #survivors, bytes = bytes, line = group(survivors, KEYS.line),
                        shape = group(survivors, KEYS.shape) }, Leaks)
end

--- Run fn(...), drop its results, collect garbage, and see what it made that is still alive.
-- @tparam function fn
-- @param ... its arguments
-- @treturn boolean true if nothing survives
-- @treturn table print it; count, bytes, and line, shape: lists of { name, bytes, count }
-- @raise what fn raises
function memory.leak_check(fn, ...)
  schema.check("leak_check", "fn", fn, { type = "function" })
  lib.collect()
  local serial = lib.memory_stats().allocations
  sites.track(true)
  local ok, message = pcall(fn, ...)
  sites.track(false)
  if not ok then error(message, 0) end
  message = nil -- luacheck: ignore 311 (the first result must be free to go)
  lib.collect()
  local report = memory.survivors(serial)
  return report.count == 0, report
end

-- ---- the environment ------------------------------------------------------------------------------------

local SETTINGS = { "trace", "exit" }

--- Obey LACUNA_MEMORY: "trace" tracks lines from the start; "exit" does, and the command `lacuna` reports at
-- its end what is still alive.
function memory.configure(setting)
  if setting ~= "trace" and setting ~= "exit" then
    schema.unknown("LACUNA_MEMORY", "setting", setting, SETTINGS)
  end
  memory.tracking(true)
  memory.reports_at_exit = setting == "exit"
end

--- Called by the command `lacuna` when the script has ended.
function memory.at_exit()
  if not memory.reports_at_exit then return end
  lib.collect()
  io.stderr:write("alive at exit: ", tostring(memory.survivors(0)), "\n")
end

return memory
