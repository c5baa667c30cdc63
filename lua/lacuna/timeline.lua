--- The memory of a step over time: who held what, and who held it at the worst moment.
--
-- lac.memory_profile(fn) runs fn while the pool writes down every block that is taken and given back, with
-- its time, and every new tensor leaves the line that made it (sites.lua). What a block was for is only
-- known afterwards, so blocks are sorted into categories when fn has ended: parameters, gradients and an
-- optimizer's state by the role that the engine keeps with them; activations, which are what a forward pass
-- leaves for its backward: made outside of one and alive when one begins; workspace, an operator's own;
-- temporaries, all other blocks that fn made; and what was there before.
--
-- The picture is stacked areas over time. Between the pixels of a column the moment of the largest total is
-- drawn, so the peak of the picture is the peak. Bytes are those taken from the pool (size classes, at most a
-- quarter above what was asked for), because these are what a limit counts.
--
-- Rejected: sampling with a timer (it misses the peak, which may last 20 us), a hook at each operator
-- (workspaces come and go inside one).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local json = require "lacuna.json"
local sys = require "lacuna.sys"
local sites = require "lacuna.sites"
local memory = require "lacuna.memory"
local plot = require "lacuna.plot"

local ffi, C = lib.ffi, lib.C
local bytes_text = lib.bytes_text
local timeline = {}

-- bottom to top; the letter is for the terminal
local CATEGORIES = {
  { name = "before", label = "there before", letter = "b", colour = "#c9ced6" },
  { name = "parameters", label = "parameters", letter = "P", colour = "#1f6fb4" },
  { name = "optimizer", label = "optimizer", letter = "O", colour = "#5b4bb5" },
  { name = "gradients", label = "gradients", letter = "G", colour = "#2a9d63" },
  { name = "activations", label = "activations", letter = "A", colour = "#d9601a" },
  { name = "temporaries", label = "temporaries", letter = "t", colour = "#e3b23c" },
  { name = "workspace", label = "workspace", letter = "w", colour = "#b03a8c" },
}
local CHUNK = 1024
local BEFORE = "there before" -- the layer of all that fn did not make, where layers are lines

local Timeline = { __name = "MemoryProfile" }
Timeline.__index = Timeline

-- ---- reading --------------------------------------------------------------------------------------------

local function read_events()
  local raw, list, first = ffi.new("lac_block_info[?]", CHUNK), {}, 0
  while true do
    local got = tonumber(C.lac_memory_events(first, CHUNK, raw))
    for i = 0, got - 1 do list[#list + 1] = memory.block(raw[i]) end
    first = first + got
    if got < CHUNK then return list end
  end
end

-- blocks by serial, each with what is known of it in the end (roles and sites come after the taking)
local function join(before, events, after)
  local blocks = {}
  for _, b in ipairs(before) do
    b.before = true
    blocks[b.serial] = b
  end
  for _, e in ipairs(events) do
    if e.kind == C.LAC_BLOCK_TAKEN then
      blocks[e.serial] = e
    else
      local b = blocks[e.serial]
      b.given = true
      b.use, b.site = e.use, e.site
    end
  end
  for _, b in ipairs(after) do
    local known = blocks[b.serial]
    if known then known.use, known.site = b.use, b.site end
  end
  return blocks
end

-- mark what is alive whenever a backward pass begins
local function mark_activations(events, blocks)
  local forward, backward = {}, false
  for _, e in ipairs(events) do
    if e.backward and not backward then
      for serial in pairs(forward) do blocks[serial].activation = true end
      forward = {}
    end
    backward = e.backward
    if e.kind == C.LAC_BLOCK_GIVEN then
      forward[e.serial] = nil
    elseif not e.backward then
      forward[e.serial] = true
    end
  end
end

local function categorise(b)
  if b.use ~= "other" then return b.use end
  if b.before then return "before" end
  return b.activation and "activations" or "temporaries"
end

-- ---- what follows from it -------------------------------------------------------------------------------

-- who held what at the moment of the largest total: groups of like blocks, largest first
local function find_peak(events, blocks, start)
  local live, most, at, index = start, start, 0, 0
  for i, e in ipairs(events) do
    live = live + e.change
    if live > most then most, at, index = live, e.at, i end
  end
  local alive = {}
  for serial, b in pairs(blocks) do alive[serial] = b.before end
  for i = 1, index do alive[events[i].serial] = events[i].change > 0 end
  local list = {}
  for serial, is_alive in pairs(alive) do
    if is_alive then list[#list + 1] = blocks[serial] end
  end
  return { bytes = most, at = at, blocks = list }
end

local function build(before, events, after, started, wall)
  local blocks = join(before, events, after)
  mark_activations(events, blocks)
  local start, totals = 0, {}
  for _, category in ipairs(CATEGORIES) do totals[category.name] = 0 end
  for _, b in pairs(blocks) do
    b.category = categorise(b)
    if b.before then
      start = start + b.bytes
      totals[b.category] = totals[b.category] + b.bytes
    end
  end
  for _, e in ipairs(events) do
    local b = blocks[e.serial]
    e.at = tonumber(e.time - started) * 1e-9
    e.change = e.kind == C.LAC_BLOCK_TAKEN and e.bytes or -e.bytes
    e.category, e.line = b.category, memory.line_of(b)
    e.layer = b.before and BEFORE or memory.line_of(b, true)
  end
  for _, b in pairs(blocks) do b.layer = b.before and BEFORE or memory.line_of(b, true) end
  local self = setmetatable({ events = events, start_bytes = start, start = totals, wall = wall }, Timeline)
  self.peak = find_peak(events, blocks, start)
  return self
end

local function pack(...) return { ... }, select("#", ...) end

local PROFILE = { track = { type = "boolean", default = true } }

--- Run fn() and record every change of the pool.
-- @tparam function fn
-- @tparam[opt] table options track = true: remember which line made each tensor (some microseconds each,
--   which stretch the time axis)
-- @treturn MemoryProfile print it for the peak and its holders; p:plot{}, p:chart(), p:json(path); fields
--   wall (seconds), start_bytes, peak { bytes, at, blocks }, events: list of { at (seconds), change (bytes,
--   negative when given back), serial, op, category, line, what, backward }
-- @return what fn returns
-- @raise what fn raises
function timeline.run(fn, options)
  schema.check("memory_profile", "fn", fn, { type = "function" })
  local o = schema.options("memory_profile", options, PROFILE)
  lib.collect()
  local before = memory.blocks()
  if o.track then sites.track(true) end
  local lost = tonumber(C.lac_profile_lost())
  lib.check(C.lac_memory_record(1))
  local started = C.lac_clock()
  local results, count = pack(pcall(fn))
  local wall = tonumber(C.lac_clock() - started) * 1e-9
  lib.bury() -- what the last collection of fn has found is its own
  lib.check(C.lac_memory_record(0))
  if o.track then sites.track(false) end
  local events = read_events()
  lost = tonumber(C.lac_profile_lost()) - lost
  lib.check(C.lac_memory_record(-1))
  if not results[1] then error(results[2], 0) end
  if lost > 0 then
    schema.fail("memory_profile", "%d events are missing: there was no memory left to record them", lost)
  end
  return build(before, events, memory.blocks(), started, wall), unpack(results, 2, count)
end

-- ---- series ---------------------------------------------------------------------------------------------

-- a list of columns; each is the state (bytes by layer) at its largest total
local function columns(self, by, count)
  local key = by == "category" and "category" or "layer"
  local state, live, i, n = {}, self.start_bytes, 1, #self.events
  for name, bytes in pairs(self.start) do
    local k = by == "category" and name or BEFORE
    state[k] = (state[k] or 0) + bytes
  end
  local list = {}
  for column = 1, count do
    local stop = column == count and math.huge or self.wall * column / count
    local best, most = nil, -1
    local function look()
      if live <= most then return end
      best, most = {}, live
      for k, bytes in pairs(state) do best[k] = bytes end
    end
    look()
    while i <= n and self.events[i].at < stop do
      local e = self.events[i]
      local k = e[key]
      state[k], live = (state[k] or 0) + e.change, live + e.change
      look()
      i = i + 1
    end
    list[column] = best
  end
  return list
end

-- begin and end of the passes: { { name, from, to }, ... } in seconds
local function phases(self)
  local list = {}
  for _, e in ipairs(self.events) do
    local name = e.backward and "backward" or "forward"
    local current = list[#list]
    if not current or current.name ~= name then
      list[#list + 1] = { name = name, from = e.at, to = e.at }
    else
      current.to = e.at
    end
  end
  return list
end

local function unit_of(bytes)
  if bytes >= 2 ^ 30 then return 2 ^ 30, "GiB" end
  if bytes >= 2 ^ 20 then return 2 ^ 20, "MiB" end
  return 2 ^ 10, "KiB"
end

-- the layers of the picture, bottom to top: { { label, colour, letter, key }, ... }
local function layers(self, by, top)
  if by == "category" then
    local used, list = {}, {}
    for name, bytes in pairs(self.start) do used[name] = bytes > 0 end
    for _, e in ipairs(self.events) do used[e.category] = true end
    for _, c in ipairs(CATEGORIES) do
      if used[c.name] then
        list[#list + 1] = { key = c.name, label = c.label, colour = c.colour, letter = c.letter }
      end
    end
    return list
  end
  local groups = memory.group(self.peak.blocks, function(b) return b.layer end)
  local list = { { key = BEFORE, label = BEFORE, colour = CATEGORIES[1].colour,
                   letter = "." } }
  for _, g in ipairs(groups) do
    if g.name ~= BEFORE and #list <= top then
      list[#list + 1] = { key = g.name, label = g.name, letter = string.char(96 + #list) }
    end
  end
  list[#list + 1] = { key = "other", label = "all others", colour = "#8c8f96", letter = "z" }
  return list
end

local function fold(column, known)
  local other = 0
  for key, bytes in pairs(column) do
    if not known[key] then other = other + bytes end
  end
  return other
end

local PLOT = {
  by = { one_of = { "category", "line" }, default = "category" },
  top = { type = "integer", min = 1, max = 20, default = 7 },
  output = { type = "string", required = true },
  title = { type = "string" },
  size = { type = "integers", min = 1 },
}

--- Draw the timeline as stacked areas.
-- @tparam table options output = "memory.png" or ".svg"; by = "category" (default) or "line"; top = 7 lines;
--   title; size = {width, height}
-- @treturn string the path
function Timeline:plot(options)
  local o = schema.options("memory_profile:plot", options, PLOT)
  local list, count = layers(self, o.by, o.top), 900
  local states, known, x = columns(self, o.by, count), {}, {}
  for _, layer in ipairs(list) do known[layer.key] = true end
  local scale, unit = unit_of(self.peak.bytes)
  local series = {}
  for i, layer in ipairs(list) do series[i] = { label = layer.label, colour = layer.colour, y = {} } end
  for column = 1, count do
    x[column] = self.wall * 1e3 * (column - 0.5) / count
    for i, layer in ipairs(list) do
      local bytes = layer.key == "other" and fold(states[column], known) or states[column][layer.key] or 0
      series[i].y[column] = math.max(0, bytes) / scale
    end
  end
  local marks = {}
  for _, p in ipairs(phases(self)) do
    if p.name == "backward" then
      marks[#marks + 1] = { x = p.from * 1e3, label = "backward" }
      marks[#marks + 1] = { x = p.to * 1e3 }
    end
  end
  return plot.area{ x = x, series = series, marks = marks, output = o.output, size = o.size,
    title = o.title or ("Memory of one step: peak %s at %.1f ms"):format(bytes_text(self.peak.bytes),
                                                                    self.peak.at * 1e3),
    xlabel = "ms", ylabel = unit, xrange = { 0, self.wall * 1e3 } }
end

-- ---- text -----------------------------------------------------------------------------------------------

local CHART = {
  by = { one_of = { "category", "line" }, default = "category" },
  top = { type = "integer", min = 1, max = 20, default = 7 },
  width = { type = "integer", min = 10, default = 72 },
  height = { type = "integer", min = 4, default = 16 },
}

--- The timeline for a terminal: a letter for each category, stacked.
-- @tparam[opt] table options by, top as in plot; width = 72, height = 16 characters
-- @treturn string
function Timeline:chart(options)
  local o = schema.options("memory_profile:chart", options, CHART)
  local list = layers(self, o.by, o.top)
  local states, known, most = columns(self, o.by, o.width), {}, self.peak.bytes
  for _, layer in ipairs(list) do known[layer.key] = true end
  local grid = {}
  for column, state in ipairs(states) do
    local height, filled = 0, 0
    for _, layer in ipairs(list) do
      height = height + (layer.key == "other" and fold(state, known) or state[layer.key] or 0)
      local rows = most > 0 and math.floor(height / most * o.height + 0.5) or 0
      for row = filled + 1, rows do
        grid[row] = grid[row] or {}
        grid[row][column] = layer.letter
      end
      filled = math.max(filled, rows)
    end
  end
  local lines = {}
  for row = o.height, 1, -1 do
    local cells = {}
    for column = 1, o.width do cells[column] = (grid[row] or {})[column] or " " end
    local label = (row == o.height or row == math.floor(o.height / 2 + 0.5))
      and bytes_text(most * row / o.height) or ""
    lines[#lines + 1] = (("%10s |"):format(label) .. table.concat(cells)):gsub("%s+$", "")
  end
  lines[#lines + 1] = (" "):rep(10) .. " +" .. ("-"):rep(o.width)
  lines[#lines + 1] = (" "):rep(12) .. ("0%" .. (o.width - 1) .. "s"):format(("%.1f ms"):format(self.wall
    * 1e3))
  for i, layer in ipairs(list) do -- the legend: as many on a line as fit
    local text, line = layer.letter .. " " .. layer.label, lines[#lines]
    if i > 1 and o.by == "category" and #line + #text + 2 <= 12 + o.width then
      lines[#lines] = line .. ", " .. text
    else
      lines[#lines + 1] = (" "):rep(12) .. text
    end
  end
  return table.concat(lines, "\n")
end

local SHOWN = 12

--- Who held what at the peak.
-- @treturn table list of { category, place, what, bytes, count }, largest first; like layers of a model
--   count as one
function Timeline:holders()
  local list, by = {}, {}
  for _, b in ipairs(self.peak.blocks) do
    local key = table.concat({ b.category, b.what, b.layer }, "\0")
    local g = by[key]
    if not g then
      g = { category = b.category, place = b.layer, what = b.what, bytes = 0, count = 0 }
      by[key], list[#list + 1] = g, g
    end
    g.bytes, g.count = g.bytes + b.bytes, g.count + 1
  end
  table.sort(list, function(a, b)
    if a.bytes ~= b.bytes then return a.bytes > b.bytes end
    return a.what .. a.place .. a.category < b.what .. b.place .. b.category
  end)
  return list
end

local function shorten(text, n)
  return #text > n and text:sub(1, n - 3) .. "..." or text
end

function Timeline:__tostring()
  local peak, lines = self.peak, {}
  local function put(format, ...) lines[#lines + 1] = format:format(...) end
  local taken = 0
  for _, e in ipairs(self.events) do taken = taken + (e.change > 0 and 1 or 0) end
  put("memory: %.1f ms, %d blocks taken, %s at the start, peak %s at %.1f ms", self.wall * 1e3, taken,
    bytes_text(self.start_bytes), bytes_text(peak.bytes), peak.at * 1e3)
  put("")
  lines[#lines + 1] = self:chart()
  put("")
  put("at the peak:")
  local groups = memory.group(peak.blocks, function(b) return b.category end)
  for _, g in ipairs(groups) do
    put("  %-14s %12s %6d blocks %6.1f%%", g.name, bytes_text(g.bytes), g.count, 100 * g.bytes / peak.bytes)
  end
  put("")
  put("  %-12s %11s %6s  %-24s %s", "category", "bytes", "blocks", "what", "made at")
  local holders = self:holders()
  for i = 1, math.min(SHOWN, #holders) do
    local h = holders[i]
    put("  %-12s %11s %6d  %-24s %s", h.category, bytes_text(h.bytes), h.count, shorten(h.what, 24),
      shorten(h.place, 40))
  end
  if #holders > SHOWN then put("  %d more", #holders - SHOWN) end
  return table.concat(lines, "\n")
end

--- Write everything as JSON: wall, start_bytes, start (bytes by category), peak, holders, events.
-- @tparam string path
-- @treturn string path
function Timeline:json(path)
  schema.check("memory_profile:json", "path", path, { type = "string" })
  local events = json.array()
  for i, e in ipairs(self.events) do
    events[i] = { at = e.at, change = e.change, serial = e.serial, op = e.op, category = e.category,
                  line = e.line, what = e.what, backward = e.backward }
  end
  local text = json.encode({ wall = self.wall, start_bytes = self.start_bytes, start = self.start,
    peak = { bytes = self.peak.bytes, at = self.peak.at }, holders = json.array(self:holders()),
    events = events }, { order = { "wall", "start_bytes", "start", "peak", "holders", "events" } })
  local ok, reason = sys.write_file(path, text .. "\n")
  if not ok then schema.fail("memory_profile", "%s", reason) end
  return path
end

return timeline
