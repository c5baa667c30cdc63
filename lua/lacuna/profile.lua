--- Where the time goes: operators, modules, script lines, and what lies between them.
--
-- lac.profile(fn) runs fn while the engine records every run of an operator (c/profile.c): when it began and
-- ended, its FLOPs, its bytes, and whether a backward pass was running. Host time is what lies between the
-- records: Lua, checks, allocation. It is added up from the gaps, not computed as a difference, so that
-- operators + host = wall is a statement about the records and not about arithmetic (a spec asserts it).
--
-- Which module or line called is only looked up with trace = true: then the stack is walked after each
-- operator, which takes microseconds; these are measured, too, and shown apart as `tracing`. An operator of
-- the backward pass counts for the module whose forward recorded it (sites.lua). In the table by module
-- `total` holds what is inside a module, `self` what its own forward does between its children's.
--
-- FLOP/s and bytes/s are what the operator's formula needs over the time it took; how FLOPs and bytes are
-- counted is written in c/profile.c. The trace is JSON for chrome://tracing and Perfetto: one timeline,
-- nested as pass, modules, operator. Rejected: a sampling profiler (luajit -jp is there for Lua code),
-- wrapping every function of the library (it slows down what it measures, and misses what is written
-- tomorrow).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local json = require "lacuna.json"
local sys = require "lacuna.sys"
local sites = require "lacuna.sites"

local ffi, C = lib.ffi, lib.C

local CHUNK = 1024

local Profile = { __name = "Profile" }
Profile.__index = Profile

-- ---- recording ------------------------------------------------------------------------------------------

-- marks of the tracer: after which moment the walk began, when it ended, where the operator was called
local function tracer(started)
  local marks = { from = {}, to = {}, site = {}, n = 0 }
  return marks, function()
    local from = C.lac_clock()
    local n = marks.n + 1
    marks.site[n] = sites.here()
    marks.from[n], marks.n = tonumber(from - started), n
    marks.to[n] = tonumber(C.lac_clock() - started)
  end
end

-- names of operators as scripts know them: a map by its function, "tanh", "tanh_bwd"
local function name_of(raw)
  local slot = ffi.string(raw.op)
  if raw["function"] == nil then return slot end
  return ffi.string(raw["function"]) .. (slot:match("_bwd$") or "")
end

-- events as Lua tables, times in seconds from the start
local function read_events(started)
  local raw, list, first = ffi.new("lac_profile_event[?]", CHUNK), {}, 0
  while true do
    local got = tonumber(C.lac_profile_events(first, CHUNK, raw))
    for i = 0, got - 1 do
      local e = raw[i]
      list[#list + 1] = { op = name_of(e), from = tonumber(e.start - started) * 1e-9,
        to = tonumber(e["end"] - started) * 1e-9, flops = e.flops, bytes = tonumber(e.bytes),
        backward = e.tag == 1 }
    end
    first = first + got
    if got < CHUNK then return list end
  end
end

-- each operator belongs to the first walk that began after its end; walks without one answered other calls
local function attribute(events, marks)
  local m = 1
  for _, e in ipairs(events) do
    while m <= marks.n and marks.from[m] * 1e-9 < e.to do m = m + 1 end
    e.site = m <= marks.n and marks.site[m] or 0
    e.traced_until = m <= marks.n and marks.to[m] * 1e-9 or nil
  end
end

-- host time: the gaps between operators, without the tracer's share of them
local function gaps(events, marks, wall)
  local host, tracing, at = 0, 0, 0
  for _, e in ipairs(events) do
    host = host + (e.from - at)
    at = e.to
  end
  host = host + (wall - at)
  for i = 1, marks.n do tracing = tracing + (marks.to[i] - marks.from[i]) * 1e-9 end
  return host - tracing, tracing
end

local function pack(...) return { ... }, select("#", ...) end

local function run_all(fn, runs)
  local results, count
  for _ = 1, runs do results, count = pack(fn()) end
  return results, count
end

-- recorders do not nest: the inner one would forget what the outer has
local running = false

local function start(o)
  if running then schema.fail("profile", "a profile is running already: profiles do not nest") end
  local lost = tonumber(C.lac_profile_lost())
  local started = C.lac_clock()
  local marks, trace = tracer(started)
  running = true
  if o.trace then
    sites.track(true)
    lib.trace(trace)
  end
  lib.check(C.lac_profile(1))
  return { started = started, begun = C.lac_clock(), marks = marks, lost = lost, traced = o.trace }
end

local function stop(r)
  r.wall = tonumber(C.lac_clock() - r.begun) * 1e-9
  C.lac_profile(0)
  if r.traced then
    lib.trace(nil)
    sites.track(false)
  end
  running = false
end

-- the events of a recording that was stopped; the recorder forgets them
local function take(r)
  local events = read_events(r.begun)
  C.lac_profile(-1)
  local lost, marks = tonumber(C.lac_profile_lost()) - r.lost, r.marks
  if lost > 0 then
    schema.fail("profile", "%d events are missing: there was no memory left to record them", lost)
  end
  local shift = tonumber(r.begun - r.started)
  for i = 1, marks.n do marks.from[i], marks.to[i] = marks.from[i] - shift, marks.to[i] - shift end
  return events
end

-- ---- sums -----------------------------------------------------------------------------------------------

local function new_row(name)
  return { name = name, calls = 0, time = 0, forward = 0, backward = 0, flops = 0, bytes = 0 }
end

local function add(row, e)
  local time = e.to - e.from
  local pass = e.backward and "backward" or "forward"
  row.calls, row.time, row[pass] = row.calls + 1, row.time + time, row[pass] + time
  row.flops, row.bytes = row.flops + e.flops, row.bytes + e.bytes
end

local function by_time(a, b)
  if a.time ~= b.time then return a.time > b.time end
  return a.name < b.name
end

local function rows_by(events, key)
  local rows, by = {}, {}
  for _, e in ipairs(events) do
    local name = key(e)
    local row = by[name]
    if not row then
      row = new_row(name)
      by[name], rows[#rows + 1] = row, row
    end
    add(row, e)
  end
  table.sort(rows, by_time)
  return rows
end

local NO_MODULE = "(no module)"

-- "A.b.c" -> "A", "A.b", "A.b.c"
local function prefixes(path)
  local list, at = {}, 0
  while true do
    at = path:find(".", at + 1, true)
    list[#list + 1] = at and path:sub(1, at - 1) or path
    if not at then return list end
  end
end

local function path_of(e)
  local s = sites.get(e.site)
  return s and s.path or NO_MODULE
end

-- a row for every module and its parents; unless `each`, the modules of a list count as one
local function module_rows(events, each)
  local rows, by = {}, {}
  for _, e in ipairs(events) do
    local whole = path_of(e)
    local list = prefixes(each and whole or whole:gsub("%[%d+%]", "[*]"))
    for depth, path in ipairs(list) do
      local row = by[path]
      if not row then
        row = new_row(path)
        row.self, row.depth = 0, depth
        by[path], rows[#rows + 1] = row, row
      end
      add(row, e)
      if depth == #list then row.self = row.self + e.to - e.from end
    end
  end
  return rows
end

local KEYS = {
  op = function(e) return e.op .. (e.backward and "\0" or "") end,
  line = function(e)
    local s = sites.get(e.site)
    return s and s.line or "(no script)"
  end,
}

-- children right after their parents, the most expensive first
local function as_tree(rows)
  local children, list = {}, {}
  for _, row in ipairs(rows) do
    local parent = row.name:match("^(.*)%.[^.]*$") or ""
    children[parent] = children[parent] or {}
    table.insert(children[parent], row)
  end
  local function visit(name)
    local own = children[name] or {}
    table.sort(own, by_time)
    for _, row in ipairs(own) do
      list[#list + 1] = row
      visit(row.name)
    end
  end
  visit("")
  return list
end

--- Sums by operator, module or line.
-- @tparam string by "op" (forward and backward apart), "module" or "line" (these two need trace = true)
-- @tparam[opt] boolean each by module: "layers[1]", "layers[2]", ... apart, not as "layers[*]"
-- @treturn table list of { name, calls, time, forward, backward (seconds), flops, bytes }, largest time
--   first; by op also pass = "fwd" or "bwd"; by module also self (seconds) and depth, children after their
--   parents
function Profile:rows(by, each)
  schema.check("profile:rows", "by", by, { one_of = { "op", "module", "line" } })
  if by ~= "op" and not self.traced then
    schema.fail("profile", "modules and lines were not traced: lac.profile(fn, { trace = true })")
  end
  if by == "module" then return as_tree(module_rows(self.events, each)) end
  local rows = rows_by(self.events, KEYS[by])
  if by == "op" then
    for _, row in ipairs(rows) do
      row.pass = row.name:sub(-1) == "\0" and "bwd" or "fwd"
      row.name = row.name:gsub("%z$", "")
    end
  end
  return rows
end

-- ---- text -----------------------------------------------------------------------------------------------

local function time_text(seconds)
  if seconds >= 1 then return ("%.3f s"):format(seconds) end
  if seconds >= 1e-3 then return ("%.2f ms"):format(seconds * 1e3) end
  return ("%.1f us"):format(seconds * 1e6)
end

local function rate_text(amount, seconds)
  if amount == 0 or seconds <= 0 then return "-" end
  local rate = amount / seconds * 1e-9
  return (rate >= 100 and "%.0f" or rate >= 10 and "%.1f" or "%.2f"):format(rate)
end

local function shorten(text, n)
  return #text > n and "..." .. text:sub(-(n - 3)) or text
end

local function share(self, seconds) return self.wall > 0 and 100 * seconds / self.wall or 0 end

local TABLES = {
  op = { head = ("%-30s %4s %7s %11s %6s %11s %9s %9s"):format("operator", "pass", "calls", "time", "share",
                                                            "mean", "GFLOP/s", "GB/s"),
    row = function(self, r)
      return ("%-30s %4s %7d %11s %5.1f%% %11s %9s %9s"):format(shorten(r.name, 30), r.pass, r.calls,
        time_text(r.time), share(self, r.time), time_text(r.time / r.calls), rate_text(r.flops, r.time),
        rate_text(r.bytes, r.time))
    end },
  module = { head = ("%-34s %6s %11s %6s %11s %11s %11s"):format("module", "calls", "total", "share", "self",
                                                              "forward", "backward"),
    row = function(self, r)
      local name = (" "):rep(2 * (r.depth - 1)) .. (r.depth > 1 and r.name:match("[^.]*$") or r.name)
      return ("%-34s %6d %11s %5.1f%% %11s %11s %11s"):format(shorten(name, 34), r.calls, time_text(r.time),
        share(self, r.time), time_text(r.self), time_text(r.forward), time_text(r.backward))
    end },
  line = { head = ("%-34s %6s %11s %6s %11s %11s %9s"):format("line", "calls", "time", "share", "forward",
                                                            "backward", "GFLOP/s"),
    row = function(self, r)
      return ("%-34s %6d %11s %5.1f%% %11s %11s %9s"):format(shorten(r.name, 34), r.calls, time_text(r.time),
        share(self, r.time), time_text(r.forward), time_text(r.backward), rate_text(r.flops, r.time))
    end },
}

local function put_table(self, lines, by, top, each)
  local rows = self:rows(by, each)
  lines[#lines + 1] = ""
  lines[#lines + 1] = TABLES[by].head
  for i, row in ipairs(rows) do
    if i > top then
      local rest = 0
      for k = i, by == "module" and 0 or #rows do rest = rest + rows[k].time end
      lines[#lines + 1] = ("%d more%s"):format(#rows - top, rest > 0 and ", " .. time_text(rest) or "")
      break
    end
    lines[#lines + 1] = TABLES[by].row(self, row)
  end
end

local REPORT = { by = { one_of = { "op", "module", "line" } },
                 top = { type = "integer", min = 1, default = 25 },
                 each = { type = "boolean", default = false } }

--- The tables as text, at most 100 columns wide.
-- @tparam[opt] table options by = "op", "module" or "line": one table (default: all there are); top = 25
--   rows; each = false: in the table by module, show the modules of a list apart
-- @treturn string
function Profile:report(options)
  local o = schema.options("profile:report", options, REPORT)
  if o.each and (not self.traced or (o.by and o.by ~= "module")) then
    schema.fail("profile:report", "each = true is about the table by module, which %s", self.traced
      and ("by = '%s' leaves out"):format(o.by) or "there is not: lac.profile(fn, { trace = true })")
  end
  local lines = {}
  local function put(format, ...) lines[#lines + 1] = format:format(...) end
  put("profile: %s%s, %d operators, %s GFLOP, %s GFLOP/s in operators", time_text(self.wall),
    self.runs > 1 and (" for %d runs"):format(self.runs) or "", #self.events,
    ("%.3g"):format(self.flops * 1e-9), rate_text(self.flops, self.engine))
  put("  operators %11s %6.1f%%    forward %s, backward %s", time_text(self.engine), share(self, self.engine),
    time_text(self.forward), time_text(self.backward))
  put("  host      %11s %6.1f%%    Lua, checks, allocation: %s for each operator", time_text(self.host),
    share(self, self.host), time_text(#self.events > 0 and self.host / #self.events or 0))
  if self.traced then put("  tracing   %11s %6.1f%%", time_text(self.tracing), share(self, self.tracing)) end
  for _, by in ipairs(o.by and { o.by } or self.traced and { "op", "module", "line" } or { "op" }) do
    put_table(self, lines, by, o.top, o.each)
  end
  return table.concat(lines, "\n")
end

function Profile:__tostring()
  return ("Profile(%s, %d operators; p:report(), p:rows(\"op\"), p:trace(\"trace.json\"))"):format(
    time_text(self.wall), #self.events)
end

-- ---- trace ----------------------------------------------------------------------------------------------

local function microseconds(seconds) return math.floor(seconds * 1e9 + 0.5) / 1e3 end

local function span(name, category, from, to, args)
  local ts = microseconds(from)
  -- the end is rounded, not the length: then what is inside another on the clock is inside in the file
  return { ph = "X", name = name, cat = category, ts = ts, pid = 1, tid = 1,
           dur = math.floor((microseconds(to) - ts) * 1e3 + 0.5) / 1e3, args = args }
end

-- what is open round an operator: its pass, and its modules where they are known
local function stack_of(e, traced)
  local stack = { e.backward and "backward" or "forward" }
  local path = traced and path_of(e) or NO_MODULE
  if path ~= NO_MODULE then
    for part in path:gmatch("[^.]+") do stack[#stack + 1] = part end
  end
  return stack
end

-- Appends spans and operators, outer before inner. Operators in a row with the same stack share its spans; a
-- span ends with the last operator inside, so spans are nested by construction.
local function put_nested(self, list)
  local open = {} -- by depth: { name, from, to, at = index in list }
  local function close(depth)
    for i = #open, depth, -1 do
      local s = open[i]
      list[s.at] = span(s.name, i == 1 and "pass" or "module", s.from, s.to)
      open[i] = nil
    end
  end
  for _, e in ipairs(self.events) do
    local stack, same = stack_of(e, self.traced), 0
    while open[same + 1] and open[same + 1].name == stack[same + 1] do same = same + 1 end
    close(same + 1)
    for i = same + 1, #stack do
      list[#list + 1] = false -- filled in when it closes
      open[i] = { name = stack[i], from = e.from, at = #list }
    end
    for i = 1, #open do open[i].to = e.to end
    local s = self.traced and sites.get(e.site)
    list[#list + 1] = span(e.op, "operator", e.from, e.to,
                           { flops = e.flops, bytes = e.bytes, line = s and s.line or nil })
  end
  close(1)
end

--- Write the events as JSON for chrome://tracing and ui.perfetto.dev.
-- @tparam string path
-- @treturn string path
function Profile:trace(path)
  schema.check("profile:trace", "path", path, { type = "string" })
  local list = json.array()
  list[1] = span("profile", "profile", 0, self.wall, { runs = self.runs })
  put_nested(self, list)
  local text = json.encode({ displayTimeUnit = "ms", traceEvents = list }, { order = { "traceEvents" } })
  local ok, reason = sys.write_file(path, text .. "\n")
  if not ok then schema.fail("profile", "%s", reason) end
  return path
end

-- ---- the function ---------------------------------------------------------------------------------------

local OPTIONS = {
  trace = { type = "boolean", default = false },
  runs = { type = "integer", min = 1, default = 1 },
  warmup = { type = "integer", min = 0, default = 0 },
  print = { type = "boolean", default = true },
  top = REPORT.top,
}

-- what a recording that was stopped says, printed if that is wanted
local function profile_of(r, o)
  local events = take(r)
  if o.trace then attribute(events, r.marks) end
  local self = setmetatable({ events = events, wall = r.wall, runs = o.runs, traced = o.trace }, Profile)
  local sums = new_row("")
  for _, e in ipairs(events) do add(sums, e) end
  self.engine, self.forward, self.backward = sums.time, sums.forward, sums.backward
  self.flops, self.bytes = sums.flops, sums.bytes
  self.host, self.tracing = gaps(events, r.marks, r.wall)
  if o.print then io.stdout:write(self:report{ top = o.top }, "\n") end
  return self
end

--- Run fn() and print where the time went.
-- @tparam function fn
-- @tparam[opt] table options trace = false: find out modules and script lines, too (microseconds for each
--   operator); runs = 1; warmup = 0 runs before that are not recorded; print = true; top = 25 rows
-- @treturn Profile p:report(), p:rows(by), p:trace(path); fields wall, engine, host, tracing, forward,
--   backward (seconds), flops, bytes, events: list of { op, from, to (seconds), flops, bytes, backward }
-- @return what fn returns in its last run
-- @raise what fn raises
local function profile(fn, options, early)
  schema.check("profile", "fn", fn, { type = "function" })
  local o = schema.options("profile", options, OPTIONS)
  if not o.print and options.top then
    schema.fail("profile", "top = %d is about what print = false leaves out; p:report{ top = %d } has it",
      o.top, o.top)
  end
  for _ = 1, o.warmup do fn() end
  local r = start(o)
  -- for repl.profile: a process that ends inside fn ends the recording first, and fn does not return
  if early then
    function early.finish()
      stop(r)
      return profile_of(r, o)
    end
  end
  local ok, results, count = pcall(run_all, fn, o.runs)
  stop(r)
  if not ok then
    C.lac_profile(-1)
    error(results, 0)
  end
  return profile_of(r, o), unpack(results, 1, count)
end

return profile
