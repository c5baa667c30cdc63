--- dispatch.lua: what an operator costs before it computes anything.
--
-- Small tensors, with the record for the gradient, 100 calls a turn's sample on both sides (a loop in Lua, a
-- loop in Python). Research code is full of small operators; what they cost is the host's share of a step.
-- The collector of each side runs inside the time: ours as scripts have it, in a scope, Python's reference
-- counts.
--
-- On a GPU one operator is to cost its host less than 3 us. An addition, PyTorch's addition and what is below
-- both, the launch itself (launches.c, a loop in C), take turns in a new order each round, with the wait
-- outside of the clock (bench.queued): what a call takes until it returns. A thread beside the script's makes
-- the launches (kernels/launcher.cu), so that is not all: 2,000 additions and their wait are told as well,
-- and 2,000 launches and theirs. A host is shared with others, so the least of the rounds is told beside the
-- median.
--
-- On the shared Xeon of an H200, while others kept the host busy: an addition 2.0 us until it returns (1.2 at
-- least), 2,000 and their wait 4.1 each (3.4), a launch in C 4.2 (3.4), 2,000 and their wait 4.3 (3.3), an
-- addition of PyTorch's 15.8 (11.4). Processes in turns, without the thread (LACUNA_CUDA_LAUNCHER=0) and with
-- it: an addition until it returns 3.6 to 5.4 us and 1.4 to 1.7, in a row 3.6 to 5.5 and 2.9 to 4.0; a
-- product of 4 x 4 5.9 to 9.1 and 1.0 to 2.0, in a row 6.0 to 9.3 and 5.3 to 7.3; with a wait after each
-- addition 10.5 to 12.5 and 11.3 to 12.8. On a quiet host a launch took 2.6 to 3.4 (2.1 to 2.7 at least).
--
-- What changed nothing in a launch: 8 to 4,000 bytes of arguments, arguments as one buffer, streams of any
-- kind or priority, modules loaded eagerly, one hardware queue, a process bound to a core, another domain of
-- memory. Launching without overlap costs 0.5 us more, the runtime's <<<>>> 0.7 to 1, a copy on the device
-- 1.5 to 2. By samples, 42% of a launch is spent at the locked instructions of the driver's mutexes, where a
-- processor waits until what it has written has left, and 20% where the driver copies to the device. It does
-- not wait beside other work of the same thread: 0.8 us of arithmetic after each launch add 0.8 us.

local ffi = require "ffi"
local lac = require "lacuna"
local bench = require "lacuna.bench"
local sys = require "lacuna.sys"

local CALLS = 100
local LAUNCHED = 3 -- microseconds of an operator on a GPU
local ROUNDS, TIMES = 15, 50 -- of 50 times 100 calls
local LONG = 20 -- times 100 calls in a row, and one wait
local SOURCE = debug.getinfo(1, "S").source:match("^@(.*)dispatch%.lua$") .. "launches.c"

ffi.cdef[[
const char *launches_open(void);
double launches_time(int times, int n, int waits);
]]

-- launches.c; or nil and why not
local function driver()
  local library = sys.temporary("-launches.so")
  local status, _, err = sys.run(("cc -O2 -shared -fPIC -o %s %s -ldl"):format(sys.quote(library),
    sys.quote(SOURCE)))
  if status ~= 0 then return nil, "launches.c cannot be compiled: " .. err end
  local loaded = ffi.load(library)
  os.remove(library)
  local reason = loaded.launches_open()
  if reason ~= nil then return nil, "launches.c: " .. ffi.string(reason) end
  return loaded
end

-- microseconds of one launch by the driver
local function launch(loaded, waits)
  local times, n = waits and 1 or TIMES, waits and LONG * CALLS or CALLS
  local seconds = loaded.launches_time(times, n, waits and 1 or 0)
  if seconds < 0 then error("a launch of launches.c failed") end
  return 1e6 * seconds
end

local function report(b, add)
  local loaded, reason = driver()
  local side, problem = b:case("dispatch", "operator", { name = "add" })
  local times = b:size(TIMES, 2)
  local function scoped() lac.scope(add) end
  local sides, place = { function() return 1e6 * bench.queued(scoped, times) / CALLS end }, {}
  if loaded then
    sides[#sides + 1] = function() return launch(loaded) end
    place.launch = #sides
  end
  sides[#sides + 1] = function()
    scoped()
    lac.synchronize()
    local start = sys.time()
    for _ = 1, LONG do scoped() end
    lac.synchronize()
    return 1e6 * (sys.time() - start) / (LONG * CALLS)
  end
  place.row = #sides
  if loaded then
    sides[#sides + 1] = function() return launch(loaded, true) end
    place.launches = #sides
  end
  if side then
    sides[#sides + 1] = function() return 1e6 * side:queued(times) / CALLS end
    place.peer = #sides
  end
  local median, least = bench.shuffled(sides, b:size(ROUNDS, 1), 0)
  if side then side:drop() end
  local function value(what, list, most)
    b:value{ what = what, value = list[1], unit = "us", other = place.peer and list[place.peer],
      against = place.peer and "PyTorch" or problem, at_most = most }
  end
  value("  an addition until it returns", median, LAUNCHED)
  value("    least of the rounds", least)
  b:value{ what = "    2,000 and their wait, each", value = median[place.row], unit = "us",
    other = least[place.row], against = "at least" }
  if not loaded then return b:value{ what = "    the launch alone", problem = reason } end
  b:value{ what = "    the launch alone, a loop in C", value = median[place.launch], unit = "us",
    other = least[place.launch], against = "at least" }
  b:value{ what = "    the launch alone, 2,000 and their wait", value = median[place.launches], unit = "us",
    other = least[place.launches], against = "at least" }
end

return {
  name = "dispatch",
  about = "host cost of 100 small operators with their tape records, and of a small backward",
  device = "any",
  once = true,
  run = function(b)
    b:set_threads(1)
    local x, y = lac.randn{ 16, grad = true }, lac.randn{ 16, grad = true }
    local m = lac.randn{ 4, 4, grad = true }
    local function row(name, body)
      return b:row{ what = name, ours = body, seconds = 0.5,
        peer = { script = "dispatch", case = "operator", arguments = { name = name } } }
    end
    local function add() for _ = 1, CALLS do local _ = x + y end end
    row("add", add)
    if b.device == "cuda" then report(b, add) end
    row("multiply by a number", function() for _ = 1, CALLS do local _ = x * 2 end end)
    row("tanh", function() for _ = 1, CALLS do local _ = x:tanh() end end)
    row("matmul 4 x 4", function() for _ = 1, CALLS do local _ = m:matmul(m) end end)
    row("view", function() for _ = 1, CALLS do local _ = x:view(4, 4) end end)
    row("(a * b + a):tanh():sum(), backward", function()
      for _ = 1, CALLS do (x * y + x):tanh():sum():backward() end
    end)
  end,
}
