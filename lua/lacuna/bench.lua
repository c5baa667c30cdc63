--- bench.lua: timings that can be trusted, as ratios of two sides measured in turns.
--
-- A time alone says little: machines drift, neighbours work. So a row compares two sides, ours and another
-- (a peer in a process of its own, a floor such as a copy, or our own second way), that run in turns:
-- ours, other, ours, other, each turn with an untimed call first, because the other side has just emptied
-- the caches. A sample is as many calls as fill a millisecond; a turn's time is its fastest sample (what
-- interrupts only adds); the ratio of a row is the median over pairs of neighbouring turns, so that drift
-- hits both sides; the smallest and largest ratio are shown beside it. Where neighbours of a shared host
-- disturb for longer than a turn, a median says what they did; `fastest` compares the fastest turns instead,
-- of as many as the budget allows, since what disturbs only adds time. Every call runs in a scope and the
-- collector runs between turns, outside of the clock. A sample ends when the device has nothing left to do;
-- samples are longer on CUDA, so that the wait is lost in them, and a row may have two other sides at once.
--
-- Peers are scripts that answer JSON lines (experiments/peers/peer.py). They are started once, by the shell,
-- with their input on a named pipe, because popen gives one direction only; the pipe is opened for reading
-- and writing, so a peer that dies is an end of file and not a signal. A peer that is missing gives a row
-- that says so and why; a target that was not measured is never counted as met.
--
-- Rejected: means (one interrupt moves them), timing each side for itself one after the other (drift), and
-- sharing a process with Python (two OpenMP pools that spin against each other).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local create = require "lacuna.create"
require "lacuna.ops"
local scope = require "lacuna.scope"
local sys = require "lacuna.sys"
local json = require "lacuna.json"
local class = require "lacuna.class"

local fail = schema.fail
local bench = {}

-- seconds; on CUDA a sample must hide a wait of tens of microseconds, and a run has minutes, not hours
local SPANS = { cpu = { sample = 1e-3, turn = 0.04, row = 1.5 },
  cuda = { sample = 4e-3, turn = 0.012, row = 0.1 } }

local function spans() return SPANS[device.default_device():match("^%a+")] end

-- ---- one side ---------------------------------------------------------------------------------------------

local function repeat_calls(fn, n)
  local start = sys.time()
  for _ = 1, n do fn() end
  device.synchronize()
  return (sys.time() - start) / n
end

-- what fn returns is dropped inside the scope, so that nothing survives it
local function scoped(fn)
  local function body() fn() end
  return function() scope.run(body) end
end

-- A side has turn(seconds) -> seconds per call (the fastest sample), and calls (timed ones so far).
local Local = class("bench.Local")

function Local:init(fn, options)
  self.fn, self.before, self.calls = options.scoped and scoped(fn) or fn, options.before, 0
  self.sample = spans().sample
end

function Local:turn(seconds)
  lib.collect()
  if self.before then self.before() end
  local fn, once = self.fn, repeat_calls(self.fn, 1)
  if not self.per_sample then
    once = math.min(once, repeat_calls(fn, 1)) -- the very first call also compiles and touches new memory
    self.per_sample = math.max(1, math.ceil(self.sample / math.max(once, 1e-8)))
    if self.per_sample > 1 then
      once = repeat_calls(fn, self.per_sample)
      self.per_sample = math.max(1, math.ceil(self.sample / math.max(once, 1e-8)))
    end
  end
  local best, spent, n = math.huge, 0, self.per_sample
  repeat
    local t = repeat_calls(fn, n)
    best, spent, self.calls = math.min(best, t), spent + t * n, self.calls + n
  until spent >= seconds
  return best
end

-- ---- peers ------------------------------------------------------------------------------------------------

local Peer = class("bench.Peer")

local function last_line(text)
  local last
  for line in text:gmatch("[^\n]+") do
    if line:match("%S") then last = line end
  end
  return last
end

function Peer:init(python, script, arguments)
  self.script, self.fifo, self.log = script, sys.temporary(".fifo"), sys.temporary(".peer-err")
  local status, _, reason = sys.run("mkfifo -m 600 " .. sys.quote(self.fifo))
  if status ~= 0 then fail("bench", "cannot make a pipe for %s: %s", script, reason) end
  local words = { sys.quote(python), "-u", sys.quote(script) }
  for _, word in ipairs(arguments or {}) do words[#words + 1] = sys.quote(word) end
  self.from = assert(io.popen(("exec %s <%s 2>%s"):format(table.concat(words, " "), sys.quote(self.fifo),
    sys.quote(self.log)), "r"))
  self.to = assert(io.open(self.fifo, "r+e")) -- both ways: does not wait, and a dead reader sends no signal
  self.about, self.reason = self:read()
end

-- the next answer, or nil and why there is none
function Peer:read()
  local line = self.from:read("*l")
  if not line then
    local file = io.open(self.log, "rb")
    local text = file and file:read("*a") or ""
    if file then file:close() end
    self.dead = last_line(text) or "the process ended without a word"
    return nil, self.dead
  end
  local answer, reason = json.decode(line)
  if not answer then return nil, ("not JSON: %s (%s)"):format(line:sub(1, 200), reason) end
  if answer.error then return nil, answer.error end
  return answer
end

--- Send one request and wait for its answer.
-- @tparam table request
-- @treturn ?table the answer, or nil and the reason
function Peer:ask(request)
  if self.dead then return nil, self.dead end
  self.to:write(json.encode(request), "\n")
  self.to:flush()
  return self:read()
end

function Peer:close()
  self.to:close()
  self.from:close()
  os.remove(self.fifo)
  os.remove(self.log)
end

-- a case of a peer as a side
local Remote = class("bench.Remote")

function Remote:init(peer, id) self.peer, self.id, self.calls = peer, id, 0 end

function Remote:turn(seconds)
  local answer, reason = self.peer:ask{ op = "turn", id = self.id, seconds = seconds,
    sample = spans().sample }
  if not answer then fail("bench", "%s: %s", self.peer.script, reason) end
  self.calls = self.calls + answer.calls
  return answer.best
end

--- Seconds of a peer's calls that follow each other without a pause, as bench.sustained gives them.
-- @tparam number seconds
-- @treturn number
function Remote:sustained(seconds)
  local answer, reason = self.peer:ask{ op = "sustained", id = self.id, seconds = seconds }
  if not answer then fail("bench", "%s: %s", self.peer.script, reason) end
  return answer.median
end

--- Seconds that a peer's calls take its host, as bench.queued gives them.
-- @tparam integer times
-- @treturn number
function Remote:queued(times)
  local answer, reason = self.peer:ask{ op = "queued", id = self.id, times = times }
  if not answer then fail("bench", "%s: %s", self.peer.script, reason) end
  return answer.mean
end

--- Extra bytes at the peak of one call of a peer's case, by the system's count (its resident set).
-- @treturn ?number bytes, or nil and the reason
function Remote:peak()
  local answer, reason = self.peer:ask{ op = "peak", id = self.id }
  if not answer then return nil, "peer failed: " .. reason end
  return answer.bytes
end

--- Drop the case: what it holds in the peer's memory is free again.
function Remote:drop() self.peer:ask{ op = "drop", id = self.id } end

-- ---- measuring --------------------------------------------------------------------------------------------

--- The median of a list of numbers; of an even number the mean of the two in the middle.
local function median(list)
  local sorted = {}
  for i = 1, #list do sorted[i] = list[i] end
  table.sort(sorted)
  local n = #sorted
  return n % 2 == 1 and sorted[(n + 1) / 2] or (sorted[n / 2] + sorted[n / 2 + 1]) / 2
end
bench.median = median

-- { median, min, max, spread = (max - min) / median, turns, calls } of a side's turns
local function summary(times, calls)
  local low, high, mid = math.huge, 0, median(times)
  for i = 1, #times do low, high = math.min(low, times[i]), math.max(high, times[i]) end
  return { median = mid, min = low, max = high, spread = (high - low) / mid, turns = #times, calls = calls }
end

local TIME = { seconds = { type = "number", above = 0, default = 1 },
               turns = { type = "integer", min = 1, default = 3 },
               max_turns = { type = "integer", min = 1, default = 25 },
               before = { type = "function" }, scoped = { type = "boolean", default = true } }

-- take turns until the budget is used; at least o.turns, at most o.max_turns
local function take_turns(sides, o)
  local times, start, turn = {}, sys.time(), 0
  for i = 1, #sides do times[i] = {} end
  repeat
    turn = turn + 1
    for i = 1, #sides do times[i][turn] = sides[i]:turn(o.turn or spans().turn) end
  until turn >= o.max_turns or (turn >= o.turns and sys.time() - start >= o.seconds)
  return times
end

--- Time a function.
-- @tparam function fn called without arguments, each time in a scope of its own
-- @tparam[opt] table options seconds = 1 (budget), turns = 3 (at least), max_turns = 25, before = function
--   called before each turn, scoped = true
-- @treturn table median, min, max (seconds per call), spread = (max - min) / median, turns, calls
function bench.time(fn, options)
  if type(fn) ~= "function" then fail("bench.time", "expected a function, got %s", schema.show(fn)) end
  local o = schema.options("bench.time", options, TIME)
  local side = Local(fn, o)
  return summary(take_turns({ side }, o)[1], side.calls)
end

local function compare(a, b, o)
  local times = take_turns({ a, b }, o)
  local ratios = {}
  for i = 1, #times[1] do ratios[i] = times[2][i] / times[1][i] end
  return { a = summary(times[1], a.calls), b = summary(times[2], b.calls), ratio = summary(ratios) }
end

--- Time two functions in turns.
-- @tparam function a
-- @tparam function b
-- @tparam[opt] table options as bench.time
-- @treturn table a, b (as bench.time gives) and ratio = { median, min, max } of b's time over a's: how many
--   times faster a is
function bench.compare(a, b, options)
  for i, fn in ipairs{ a or false, b or false } do
    if type(fn) ~= "function" then
      fail("bench.compare", "argument %d must be a function, got %s", i, schema.show(fn))
    end
  end
  local o = schema.options("bench.compare", options, TIME)
  return compare(Local(a, o), Local(b, o), o)
end

--- Seconds of fn's second call: the first one is not timed.
-- @tparam function fn
-- @treturn number
function bench.warm(fn)
  fn()
  local start = sys.time()
  fn()
  return sys.time() - start
end

--- Seconds of fn's calls when one follows the other without a pause: the median of the second half of them. A
-- GPU that is busy for long lowers its clock, so that a call alone (bench.warm) may be faster.
-- @tparam function fn
-- @tparam number seconds of all calls together, at least; two are made in any case
-- @treturn number
function bench.sustained(fn, seconds)
  if type(fn) ~= "function" then fail("bench.sustained", "expected a function, got %s", schema.show(fn)) end
  local times, start = {}, sys.time()
  local now = start
  repeat
    fn()
    local before = now
    now = sys.time()
    times[#times + 1] = now - before
  until #times > 1 and now - start >= seconds
  local half = math.floor(#times / 2)
  for i = 1, #times do times[i] = times[i + half] end
  return median(times)
end

--- Seconds that fn's calls take the host when the device has nothing else to do: every call is followed by a
-- wait that is not timed. As many calls as let the collector take its part.
-- @tparam function fn queues less than the device's queue holds (about a thousand operators)
-- @tparam integer times calls, after one that is not timed
-- @treturn number seconds of one call, their mean
function bench.queued(fn, times)
  if type(fn) ~= "function" then fail("bench.queued", "expected a function, got %s", schema.show(fn)) end
  local spent = 0
  fn()
  for _ = 1, times do
    device.synchronize()
    local start = sys.time()
    fn()
    spent = spent + sys.time() - start
  end
  device.synchronize()
  return spent / times
end

--- Sides for bench.shuffled.
-- @tparam table calls functions, or a peer's cases
-- @tparam[opt] number seconds of calls without a pause in a turn (bench.sustained); without, one call counts,
--   after one that is not timed (bench.warm)
-- @treturn table
function bench.sides(calls, seconds)
  local sides = {}
  for i, call in ipairs(calls) do
    local own = type(call) == "function"
    sides[i] = function()
      if seconds then return own and bench.sustained(call, seconds) or call:sustained(seconds) end
      return own and bench.warm(call) or call:turn(1e-9)
    end
  end
  return sides
end

--- Times of several sides that take turns in a new order each round, after some idle time: on a GPU the order
-- alone, and what ran before, move results by several percent.
-- @tparam table sides functions that give the seconds of one turn (bench.sides)
-- @tparam integer rounds
-- @tparam number idle seconds before every turn
-- @treturn table median seconds of every side
-- @treturn table the least of every side
function bench.shuffled(sides, rounds, idle)
  local times, least, order = {}, {}, {}
  for i = 1, #sides do times[i], order[i] = {}, i end
  for round = 1, rounds do
    for i = #order, 2, -1 do
      local j = math.random(i)
      order[i], order[j] = order[j], order[i]
    end
    for _, i in ipairs(order) do
      local go = sys.time() + idle
      repeat until sys.time() >= go
      times[i][round] = sides[i]()
    end
  end
  for i = 1, #sides do times[i], least[i] = bench.median(times[i]), math.min(unpack(times[i])) end
  return times, least
end

--- Bytes that a call needs at its peak beyond what was alive before it (the pool counts everything: tensors,
-- workspaces of kernels, saved activations).
-- @tparam function fn
-- @param ... its arguments
-- @treturn number bytes
-- @return what fn returns
function bench.peak(fn, ...)
  if type(fn) ~= "function" then fail("bench.peak", "expected a function, got %s", schema.show(fn)) end
  lib.collect()
  device.reset_peak()
  local code = device.code("bench.peak")
  local before = lib.memory_stats(code).live
  local function after(...) return lib.memory_stats(code).peak - before, ... end
  return after(fn(...))
end

-- ---- a run of many rows -----------------------------------------------------------------------------------

local Run = class("bench.Run")

local RUN = { quick = { type = "boolean", default = false }, peer = { type = "string", default = "python3" },
              peers = { type = "string", default = "experiments/peers" },
              threads = { type = "integer", min = 1, default = 1 },
              seconds = { type = "number", above = 0 }, targets = { type = "boolean", default = false },
              match = { type = "string" }, fastest = { type = "boolean", default = false },
              options = { type = "table" }, print = { type = "function" } }

--- A run collects rows and prints each when it is measured.
-- @tparam[opt] table options quick = false (smallest sizes, two turns, targets not judged); peer = "python3";
--   peers = "experiments/peers" (folder of their scripts); threads = 1;
--   seconds = budget of every row, also of those that name one; targets = false (rows without one are left
--   out); match = text (plain, no pattern: names have brackets) that the names of rows must have, others are
--   left out; fastest = false (the ratio of the fastest turns, not the median of neighbouring ones; a row
--   that is measured again adds its turns to those before); options = table handed to sections;
--   print = function that takes a line
-- @treturn Run
function bench.run(options) return Run(schema.options("bench.run", options, RUN)) end

function Run:init(o)
  self.quick, self.python, self.folder, self.options = o.quick, o.peer, o.peers, o.options or {}
  self.print, self.seconds, self.targets, self.match = o.print or print, o.seconds, o.targets, o.match
  self.fastest = o.fastest
  self.rows, self.places, self.started, self.device = {}, {}, {}, device.default_device():match("^%a+")
  self:set_threads(o.threads)
end

--- Use n threads from here on, in this process and in every peer.
-- @tparam integer n
function Run:set_threads(n)
  device.threads(n)
  self.threads = n
end

--- `full`, or `quick` in a quick run.
function Run:size(full, quick)
  if self.quick then return quick end
  return full
end

--- Start a peer's script once, or say why it cannot be had.
-- @tparam string name of the script: <peers>/<name>.py
-- @treturn ?Peer with ask(request); or nil and the reason
function Run:peer(name)
  local peer = self.started[name]
  if not peer then
    local script = ("%s/%s.py"):format(self.folder, name)
    if not sys.exists(script) then fail("bench", "there is no peer script %s", script) end
    if sys.run("command -v " .. sys.quote(self.python)) == 0 then
      peer = Peer(self.python, script)
    else
      peer = { reason = ("no program '%s' (--peer names a Python with PyTorch)"):format(self.python) }
    end
    self.started[name] = peer
  end
  if not peer.about then return nil, peer.reason end
  if peer.dead then return nil, peer.dead end
  return peer
end

--- Make a case of a peer's script ready.
-- @tparam string name script
-- @tparam string case one of its cases
-- @tparam[opt] table arguments
-- @treturn ?Remote its side, or nil and the reason
-- @treturn ?table what the case tells about itself (a loss, bytes, ...)
function Run:case(name, case, arguments)
  local peer, reason = self:peer(name)
  if not peer then return nil, "peer not available: " .. reason end
  local answer
  answer, reason = peer:ask{ op = "case", case = case, arguments = arguments or {}, threads = self.threads,
    device = self.device }
  if not answer then return nil, "peer failed: " .. reason end
  return Remote(peer, answer.id), answer.info
end

local PACES = {
  rounds = { type = "integer", min = 1, default = 13 }, idle = { type = "number", min = 0, default = 0.03 },
  long_rounds = { type = "integer", min = 1, default = 3 },
  long = { type = "number", min = 0, default = 0.25 },
}

--- Times of several sides that take turns (bench.shuffled), twice: after idling, where a turn is one call,
-- behind one that is not timed; and sustained, where it is `long` seconds of calls without a pause, of which
-- the second half counts, at the clock that a GPU's power allows by then.
-- @tparam table calls functions, or a peer's cases
-- @tparam[opt] table options rounds = 13, idle = 0.03 (seconds before every turn); sustained: long_rounds =
--   3, long = 0.25 (seconds); a quick run has one round of each
-- @treturn table { { name = "", times = median seconds of every side }, { name = ", sustained", times = } }
function Run:paces(calls, options)
  local o = schema.options("bench.paces", options or {}, PACES)
  local function times(seconds, rounds, idle)
    return bench.shuffled(bench.sides(calls, seconds), self:size(rounds, 1), idle)
  end
  return { { name = "", times = times(nil, o.rounds, o.idle) },
    { name = ", sustained", times = times(self:size(o.long, 1e-3), o.long_rounds, 0) } }
end

-- ---- printing ---------------------------------------------------------------------------------------------

local function scaled(value, unit, steps)
  for _, step in ipairs(steps) do
    if value >= step[1] then return ("%.3g %s%s"):format(value / step[1], step[2], unit) end
  end
  return ("%.3g %s"):format(value, unit)
end

local TIMES = { { 1, "s" }, { 1e-3, "ms" }, { 1e-6, "us" }, { 1e-9, "ns" } }
local LARGE = { { 1e12, "T" }, { 1e9, "G" }, { 1e6, "M" }, { 1e3, "k" } }

-- a row's number as text: a time, a rate (`work` per second) or a plain value
local function shown(row, value, work)
  if not value then return "-" end
  if row.kind == "value" then
    if row.unit == "B" then return scaled(value, "B", LARGE) end
    return ("%.4g%s"):format(value, row.unit and " " .. row.unit or "")
  end
  if work then return scaled(work / value, row.unit, LARGE) end
  return (scaled(value, "", TIMES):gsub(" $", ""))
end

local function target_text(row)
  local sign, target = ">=", row.at_least
  if row.at_most then sign, target = "<=", row.at_most end
  if not target then return "" end
  if row.as == "share" then return ("%s %.3g%%"):format(sign, target * 100) end
  if row.kind == "value" then return ("%s %s"):format(sign, shown(row, target)) end
  return ("%s %.3gx"):format(sign, target)
end

local function ratio_text(row)
  if not row.ratio then return "" end
  if row.as == "share" then
    return ("%.1f%%  (%.0f-%.0f%%)"):format(row.ratio * 100, row.low * 100, row.high * 100)
  end
  return ("%.2fx  (%.2f-%.2f)"):format(row.ratio, row.low, row.high)
end

local function verdict(row, quick)
  if row.problem then return row.problem end
  if not (row.at_least or row.at_most) then return "" end
  if quick then return "not judged (quick)" end
  return row.met and "met" or "MISSED"
end

local WIDE, LINE = 50, "  %s %2s  %11s  %-26s %-20s %-9s %s"

local function clip(text, width)
  return text .. (" "):rep(width - #text)
end

-- what tells a row from the others of a run
local function name_of(run, row)
  return ("%s, %s, %s, %d"):format(tostring(run.section), row.what, tostring(row.against), run.threads)
end

-- the same row of an earlier round, whose turns count with `fastest`, and its place
local function earlier(run, row)
  local place = run.fastest and run.places[name_of(run, row)]
  return place and run.rows[place] or {}, place
end

function Run:header(title)
  self.section = title
  self.print(LINE:format(clip("", WIDE), "th", "ours", "against", "ratio", "target", ""))
end

function Run:add(row)
  row.section, row.threads, row.quick = self.section, self.threads, self.quick
  local value = row.ratio or (row.kind == "value" and row.ours)
  if value then
    if row.at_least then row.met = value >= row.at_least end
    if row.at_most then row.met = value <= row.at_most end
  end
  local _, place = earlier(self, row)
  place = place or #self.rows + 1
  self.places[name_of(self, row)], self.rows[place] = place, row
  local other = row.problem and "-" or row.other and ("%s %s"):format(shown(row, row.other, row.other_work),
    row.against) or ""
  self.print((LINE:format(clip(row.what, WIDE), row.threads, shown(row, row.ours, row.work), other,
    ratio_text(row), target_text(row), verdict(row, self.quick)):gsub("%s+$", "")))
  return row
end

-- is this row left out? What cannot be measured (a problem) never is.
function Run:unwanted(o)
  if o.problem then return false end
  return self.targets and not (o.at_least or o.at_most or o.share)
    or self.match ~= nil and not o.what:find(self.match, 1, true)
end

-- ---- rows -------------------------------------------------------------------------------------------------

local ROW = {
  what = { type = "string", required = true },
  ours = { type = { "function", "table" }, required = true },
  peer = { type = "table" }, floor = { type = { "function", "table", "string" } },
  against = { type = "string" },
  work = { type = "number", above = 0 }, other_work = { type = "number", above = 0 },
  unit = { type = "string" },
  as = { one_of = { "speedup", "share", "time" } },
  at_least = { type = "number", above = 0 }, at_most = { type = "number", above = 0 },
  share = { type = "number", above = 0 },
  seconds = { type = "number", above = 0 }, turns = { type = "integer", min = 1 },
  scoped = { type = "boolean", default = true },
  tell = { type = "function" },
}

--- Bytes of the processor's largest cache, 0 where the system does not say.
-- @treturn number
function bench.cache()
  local most, of = 0, { K = 2 ^ 10, M = 2 ^ 20, G = 2 ^ 30 }
  for index = 0, 9 do
    local file = io.open(("/sys/devices/system/cpu/cpu0/cache/index%d/size"):format(index))
    local number, unit = (file and file:read("*a") or ""):match("^(%d+)([KMG]?)")
    if file then file:close() end
    if number then most = math.max(most, tonumber(number) * (of[unit] or 1)) end
  end
  return most
end

--- How many f32 an array has that is beyond the caches: 128 MiB of them on the CPU, more where a cache is
-- larger than half of that, and 1 GiB on CUDA; 4096 in a quick run.
-- @treturn integer a power of two
function Run:beyond_caches()
  local n = self.device == "cpu" and 2 ^ 25 or 2 ^ 28
  while self.device == "cpu" and 4 * n < 2 * bench.cache() do n = 2 * n end
  return self:size(n, 2 ^ 12)
end

-- The two floors that rows name. A copy counts bytes read and bytes written. Of 64 MiB arrays, a cache of 32
-- still held so much from one copy to the next that it took 8.5 cycles a line instead of 9.4; with 128 MiB
-- eight cores of a processor with 300 MB of cache copied 217 GB/s or 120, as they pleased.
local FLOORS = {}

function FLOORS.copy(b)
  local n = b:beyond_caches()
  local from, to = create.zeros({ n }, { dtype = "f32" }), create.zeros({ n }, { dtype = "f32" })
  return function() to:copy_(from) end, 8 * n, "copy"
end

-- OpenBLAS itself: where a processor has a matrix unit, matmul would not be it.
lib.ffi.cdef [[
void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
]]

function FLOORS.sgemm(b)
  local n = b:size(1024, 32)
  local x, y = create.randn({ n, n }, { dtype = "f32" }), create.randn({ n, n }, { dtype = "f32" })
  if b.device ~= "cpu" then return function() return x:matmul(y) end, 2 * n ^ 3, "sgemm" end
  local out = create.empty({ n, n }, { dtype = "f32" })
  local rows, plain = 101, 111 -- CblasRowMajor, CblasNoTrans
  return function()
    lib.C.cblas_sgemm(rows, plain, plain, n, n, n, 1, x:data(), n, y:data(), n, 0, out:data(), n)
  end, 2 * n ^ 3, "sgemm"
end

--- A floor to compare with: "copy" (work in bytes read and written) or "sgemm" (1024 x 1024 matrices in
-- OpenBLAS, work in FLOPs), on the threads that are set.
-- @tparam string name
-- @treturn function what to time
-- @treturn number its work per call
-- @treturn string its name
function Run:floor(name)
  if not FLOORS[name] then schema.unknown("bench", "floor", name, schema.keys(FLOORS)) end
  return FLOORS[name](self)
end

local function local_side(what, given, is_scoped)
  if type(given) == "function" then return Local(given, { scoped = is_scoped }) end
  local o = schema.options(what, given, { run = { type = "function", required = true },
    before = { type = "function" } })
  return Local(o.run, { scoped = is_scoped, before = o.before })
end

-- the other side of a row: a peer's case, or a function of our own; or nil and the problem
function Run:other_side(o)
  if o.floor then return local_side("bench.row floor", o.floor, o.scoped) end
  local p = schema.options("bench.row peer", o.peer, { script = { type = "string", required = true },
    case = { type = "string", required = true }, arguments = { type = "table" } })
  local side, info = self:case(p.script, p.case, p.arguments)
  if side and o.tell then o.tell(info) end
  return side, info
end

-- what is measured beside ours: { key of the answer, side or nil, why not, options of its row }
local function other_sides(self, o)
  local list = {}
  if o.peer then
    local side, problem = self:other_side{ peer = o.peer, tell = o.tell }
    list[1] = { side = side, problem = not side and problem or nil, as = o.as or "speedup",
      against = o.against or "PyTorch", at_least = o.at_least, at_most = o.at_most,
      work = not o.floor and o.other_work or nil }
  end
  if not o.floor then return list end
  local floor, work, name, unit = o.floor, o.other_work, o.against or "floor", o.unit
  if type(floor) == "string" then
    if not o.work then fail("bench.row", "'%s' needs its work, to compare with %s", o.what, floor) end
    unit = floor == "copy" and "B/s" or "FLOP/s"
    floor, work, name = self:floor(floor)
  end
  local least = o.peer and o.share or o.at_least
  list[#list + 1] = { side = self:other_side{ floor = floor, scoped = o.scoped }, work = work, unit = unit,
    as = o.peer and "share" or o.as or (least and "share") or "time", against = name, at_least = least,
    at_most = not o.peer and o.at_most or nil }
  return list
end

-- the row of ours (its times) beside one other side (its times), by the median of neighbouring turns or
-- (fastest) of the fastest ones, also of the same row's earlier rounds
local function paired(run, o, ours, calls, other, times)
  local row = { what = o.what, kind = "time", as = other.as, unit = o.unit or other.unit, work = o.work,
    other_work = o.work and (other.work or o.work), at_least = other.at_least, at_most = other.at_most,
    against = other.against, problem = other.problem }
  local a, before = summary(ours, calls), earlier(run, row)
  row.ours = run.fastest and math.min(a.min, before.ours or math.huge) or a.median
  if not times then return row end
  local ratios = {}
  for i = 1, #ours do ratios[i] = times[i] / ours[i] end
  local b, r = summary(times, other.side.calls), summary(ratios) -- r is other's time over ours
  row.other, row.turns, row.ours_spread, row.other_spread = b.median, a.turns, a.spread, b.spread
  local ratio, scale = r.median, (o.work or 1) / (row.other_work or 1)
  if run.fastest then
    row.other, row.turns = math.min(b.min, before.other or math.huge), a.turns + (before.turns or 0)
    ratio = row.other / row.ours
  end
  if row.as == "time" then
    row.ratio, row.low, row.high = 1 / (ratio * scale), 1 / (r.max * scale), 1 / (r.min * scale)
  else
    row.ratio, row.low, row.high = ratio * scale, r.min * scale, r.max * scale
  end
  return row
end

--- Measure a row: ours against a peer or a floor or both, in turns, and print it.
--
-- The ratio is, by `as`: "speedup" = the other's time over ours (default with a peer); "share" = our rate
-- over the other's, in percent (default with a floor and at_least); "time" = our time over the other's, each
-- for its work (default with a floor and at_most, and without a target). With a peer and a floor there are
-- two rows of one measurement: the speedup with the row's target, and the share of the floor.
-- @tparam table options
--   what = text of the row;
--   ours = function, or { run = , before = called at the start of each turn };
--   peer = { script =, case =, arguments = }; floor = function, { run =, before = }, or "copy" or "sgemm"
--   (see Run:floor; then `work` is in its units: bytes read and written, or FLOPs);
--   against = name of the other side (default "PyTorch" or "floor");
--   work, other_work = units per call (default: the same on both sides; with peer and floor, of the floor),
--   unit = "FLOP/s" or "B/s": shows rates;
--   at_least, at_most = the target of the ratio; share = with both, the least share of the floor;
--   seconds = budget; turns = at least so many;
--   scoped = true: every call of ours in a scope; tell = function that gets what the peer's case tells
-- @treturn ?table the row: ours, other (seconds per call, the median or, of a run with `fastest`, the least),
--   ratio, low, high (of pairs of turns), met, problem; nil where it is left out (targets, match)
-- @treturn ?table the second row, of a row with two
function Run:row(options)
  local o = schema.options("bench.row", options, ROW)
  if not (o.peer or o.floor) then fail("bench.row", "'%s' needs a peer or a floor", o.what) end
  if o.at_least and o.at_most then fail("bench.row", "'%s' has two targets", o.what) end
  if o.share and not (o.peer and o.floor) then
    fail("bench.row", "'%s': share is the target beside a peer; it needs peer and floor", o.what)
  end
  if o.work and not (o.unit or type(o.floor) == "string") then
    fail("bench.row", "'%s' has work but no unit", o.what)
  end
  if self:unwanted(o) then return end
  local budget = { seconds = self.quick and 1e-3 or self.seconds or o.seconds or spans().row,
    turn = self.quick and 1e-3 or spans().turn, turns = self.quick and 2 or o.turns or 3,
    max_turns = self.fastest and 400 or 25 }
  local ours = local_side("bench.row ours", o.ours, o.scoped)
  local others, sides, place = other_sides(self, o), { ours }, {}
  for i, other in ipairs(others) do
    if other.side then
      sides[#sides + 1] = other.side
      place[i] = #sides
    end
  end
  local times, rows = take_turns(sides, budget), {}
  for i, other in ipairs(others) do
    if other.side and other.side.drop then other.side:drop() end
    rows[i] = self:add(paired(self, o, times[1], ours.calls, other, place[i] and times[place[i]]))
  end
  return rows[1], rows[2]
end

local VALUE = {
  what = { type = "string", required = true }, value = { type = "number" }, unit = { type = "string" },
  other = { type = "number" }, against = { type = "string", default = "" },
  at_least = { type = "number" }, at_most = { type = "number" }, problem = { type = "string" },
}

--- Print and keep a number that is no ratio of times: bytes, percent, a difference.
-- @tparam table options what, value, unit ("B" scales), other and against (shown beside it), at_least,
--   at_most (of the value), problem = why there is no value
-- @treturn ?table the row; nil where it is left out (targets, match)
function Run:value(options)
  local o = schema.options("bench.value", options, VALUE)
  if (o.value == nil) == (o.problem == nil) then
    fail("bench.value", "'%s' needs either a value or a problem", o.what)
  end
  if self:unwanted(o) then return end
  return self:add{ what = o.what, kind = "value", ours = o.value, other = o.other, against = o.against,
    unit = o.unit, at_least = o.at_least, at_most = o.at_most, problem = o.problem }
end

--- Count of rows by outcome.
-- @treturn table rows, met, missed, unmeasured (had a target and no measurement)
function Run:count()
  local n = { rows = #self.rows, met = 0, missed = 0, unmeasured = 0 }
  for _, row in ipairs(self.rows) do
    if row.at_least or row.at_most then
      local key = (row.problem or self.quick) and "unmeasured" or row.met and "met" or "missed"
      n[key] = n[key] + 1
    end
  end
  return n
end

--- Everything measured, as JSON.
-- @tparam[opt] table about fields that go in front (machine, arguments)
-- @treturn string
function Run:json(about)
  local all = { rows = json.array(self.rows) }
  for key, value in pairs(about or {}) do all[key] = value end
  return json.encode(all, { indent = 2, nan = "string",
    order = { "section", "what", "threads", "kind", "as", "ours", "other", "against", "ratio" } }) .. "\n"
end

--- End the peers.
function Run:close()
  for _, peer in pairs(self.started) do
    if peer.close then peer:close() end
  end
  self.started = {}
end

return bench
