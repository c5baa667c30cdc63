--- bench_spec.lua: the benchmark harness measures what it says.
--
-- Times cannot be asserted, so the clock's consumers are checked through work whose ratio is known by
-- construction (a function that is the other one four times), through counts (turns, calls, `before`), and
-- through a peer that is a ten-line shell script: it speaks the protocol, fails on request and dies on
-- request, so that nothing here needs Python. What matters most is that nothing missing looks measured:
-- absent peers, failing cases and missed targets are told apart in the row, the count and the table.

local lac = require "lacuna"
local bench = require "lacuna.bench"
local device = require "lacuna.device"
local json = require "lacuna.json"
local sys = require "lacuna.sys"

local dir = sys.temporary("-bench")

-- answers in the protocol; case "bad" is refused, case "fatal" kills the process
local PEER = [[
echo '{"shell": true}'
while read -r line; do
  case "$line" in
  *'"case":"bad"'*) echo '{"error": "ValueError: bad case"}' ;;
  *'"case":"fatal"'*) echo 'last words' >&2; exit 3 ;;
  *'"op":"case"'*) echo '{"id": 7, "info": {"loss": 1.5}}' ;;
  *'"op":"turn"'*) echo '{"best": 0.5, "calls": 2}' ;;
  *'"op":"sustained"'*) echo '{"median": 0.25}' ;;
  *'"op":"queued"'*) echo '{"mean": 0.125}' ;;
  *'"op":"peak"'*) echo '{"bytes": 4096}' ;;
  *'"op":"drop"'*) echo '{}' ;;
  esac
done
]]

-- work in proportion to n, within one line: counting lines (make coverage) may not change what it takes
local TEXT, SAME = ("x"):rep(160000), { x = "x" }
local function spin(n) return (TEXT:sub(1, n):gsub("x", SAME)) end

describe("bench", function()
  local lines
  local function run(options)
    lines = {}
    options = options or {}
    options.print = function(line) lines[#lines + 1] = line end
    options.peers = dir
    return bench.run(options)
  end

  setup(function()
    assert(sys.mkdir(dir))
    for name, text in pairs{ good = PEER, dead = "echo 'cannot start' >&2; exit 1\n" } do
      local file = assert(io.open(("%s/%s.py"):format(dir, name), "wb"))
      file:write(text)
      file:close()
    end
    local shell = assert(io.open(dir .. "/shell", "wb")) -- takes Python's option -u
    shell:write('#!/bin/sh\nshift\nexec sh "$@"\n')
    shell:close()
    assert(sys.run("chmod +x " .. sys.quote(dir .. "/shell")) == 0)
  end)
  teardown(function() os.execute("rm -r " .. sys.quote(dir)) end)

  it("lets sides take turns in new orders and gives the median and the least of each", function()
    local said, orders = { { 5, 1, 3 }, { 20, 40, 30 } }, {}
    local calls, sides = { 0, 0 }, {}
    for i = 1, 2 do
      sides[i] = function()
        calls[i] = calls[i] + 1
        orders[#orders + 1] = i
        return said[i][calls[i]]
      end
    end
    assert.same({ { 3, 30 }, { 1, 20 } }, { bench.shuffled(sides, 3, 0) })
    for round = 0, 2 do assert.equal(3, orders[2 * round + 1] + orders[2 * round + 2]) end
    local runs = 0
    assert.is_true(bench.warm(function() runs = runs + 1 end) >= 0)
    assert.equal(2, runs)
  end)

  it("takes the second half of calls without a pause", function()
    local runs, clock, now = 0, sys.time, 0
    finally(function() sys.time = clock end)
    sys.time = function() return now end -- on a busy machine calls of the real one may all be slow
    local seconds = bench.sustained(function()
      runs = runs + 1
      now = now + (runs <= 2 and 0.05 or 0.001)
    end, 0.1105)
    sys.time = clock
    assert.equal(2 + 11, runs)
    assert.near(0.001, seconds, 1e-9)
    runs = 0
    bench.sustained(function() runs = runs + 1 end, 0)
    assert.equal(2, runs)
    assert.error_matches(function() bench.sustained(1, 1) end, "bench.sustained: expected a function, got 1")
    local side = run{ peer = dir .. "/shell" }:case("good", "fine")
    assert.equal(0.25, bench.sides({ side }, 1)[1]())
    assert.equal(0.5, bench.sides{ side }[1]())
    runs = 0
    assert.is_true(bench.sides{ function() runs = runs + 1 end }[1]() >= 0)
    assert.equal(2, runs)
  end)

  it("takes the mean of calls until they return, after one that is not timed", function()
    local runs, waits, clock, wait, now = 0, 0, sys.time, device.synchronize, 0
    finally(function() sys.time, device.synchronize = clock, wait end)
    sys.time = function() return now end
    device.synchronize = function() now, waits = now + 1, waits + 1 end
    local seconds = bench.queued(function()
      runs = runs + 1
      now = now + (runs == 1 and 0.5 or runs == 4 and 0.04 or 0.01)
    end, 3)
    sys.time, device.synchronize = clock, wait
    assert.equal(4, runs)
    assert.equal(4, waits) -- before every call that is timed, and after the last
    assert.near(0.02, seconds, 1e-9)
    assert.error_matches(function() bench.queued(1, 1) end, "bench.queued: expected a function, got 1")
    local side = run{ peer = dir .. "/shell" }:case("good", "fine")
    assert.equal(0.125, side:queued(3))
  end)

  it("measures sides after idling and sustained", function()
    local calls, waited = 0, sys.time()
    local function own()
      calls = calls + 1
      local go = sys.time() + 0.01
      repeat until sys.time() >= go
    end
    local b = run{ peer = dir .. "/shell" }
    local peer = b:case("good", "fine")
    local paces = b:paces({ own, peer }, { rounds = 2, idle = 0.02, long_rounds = 1, long = 0.05 })
    waited = sys.time() - waited
    assert.equal("", paces[1].name)
    assert.equal(", sustained", paces[2].name)
    for _, pace in ipairs(paces) do assert.is_true(pace.times[1] >= 0.01 and pace.times[1] < 1) end
    assert.equal(0.5, paces[1].times[2])
    assert.equal(0.25, paces[2].times[2])
    assert.is_true(calls >= 2 * 2 + 2 and calls <= 2 * 2 + 6) -- two a turn; then 0.05 seconds of them
    assert.is_true(waited >= 4 * 0.02 + calls * 0.01)
    calls = 0
    run{ quick = true }:paces({ own }, { rounds = 5, idle = 0, long = 10 })
    assert.equal(2 + 2, calls)
    assert.error_matches(function() b:paces({ own }, { round = 3 }) end, "bench.paces: unknown option")
  end)

  it("times a function: as many turns as asked, `before` at each", function()
    local before, calls = 0, 0
    local t = bench.time(function() calls = calls + 1 end,
      { seconds = 1e-4, turns = 4, max_turns = 4, before = function() before = before + 1 end })
    assert.equal(4, t.turns)
    assert.equal(4, before)
    assert.is_true(t.min <= t.median and t.median <= t.max)
    assert.is_true(t.calls > 0 and t.calls < calls) -- warm-up calls are not counted
    assert.equal((t.max - t.min) / t.median, t.spread)
  end)

  it("gives the ratio of two functions", function()
    local function light() spin(20000) end
    local function heavy() for _ = 1, 8 do light() end end
    local r = bench.compare(light, heavy, { seconds = 0.05, turns = 3 })
    assert.is_true(r.ratio.median > 2 and r.ratio.median < 40, tostring(r.ratio.median)) -- 8, and noise
    assert.is_true(r.ratio.min <= r.ratio.median and r.ratio.median <= r.ratio.max)
  end)

  it("measures in a scope: nothing is left alive", function()
    collectgarbage()
    collectgarbage()
    local before = lac.memory().live
    bench.time(function() return lac.zeros{ 1000 } end, { seconds = 1e-3 })
    assert.equal(before, lac.memory().live)
  end)

  it("counts extra bytes at the peak", function()
    local bytes, x = bench.peak(function(n)
      local big = lac.zeros{ n, 1024 }
      return big:sum()
    end, 1024)
    assert.is_true(bytes >= 2 ^ 22 and bytes < 2 ^ 22 + 2 ^ 16, tostring(bytes))
    assert.equal(0, x:item())
  end)

  it("compares with a peer and says what it told", function()
    local b, told = run{ peer = dir .. "/shell" }, nil
    local row = b:row{ what = "thing", ours = function() spin(100) end, seconds = 1e-3,
      peer = { script = "good", case = "fine", arguments = { n = 1 } }, at_least = 1.2,
      tell = function(info) told = info end }
    assert.equal(0.5, row.other)
    assert.is_true(row.met and row.ratio > 50)
    assert.equal(1.5, told.loss)
    assert.equal("speedup", row.as)
    local side = b:case("good", "fine")
    assert.equal(4096, side:peak())
    assert.same({ rows = 1, met = 1, missed = 0, unmeasured = 0 }, b:count())
    assert.matches("thing .*500 ms PyTorch.*>= 1.2x +met$", lines[1])
    b:close()
  end)

  it("measures a peer and a floor in the same turns", function()
    local b = run{ peer = dir .. "/shell" }
    local function light() spin(1000) end
    local speed, share = b:row{ what = "thing", ours = function() spin(16000) end, seconds = 0.02, work = 16,
      unit = "B/s", floor = light, other_work = 1, share = 0.4, at_least = 2,
      peer = { script = "good", case = "fine" } }
    assert.same({ "speedup", "share" }, { speed.as, share.as })
    assert.equal(speed.ours, share.ours)
    assert.same({ 0.5, 2, true }, { speed.other, speed.at_least, speed.met })
    assert.equal(0.4, share.at_least)
    assert.is_true(share.ratio > 0.25 and share.ratio < 4, tostring(share.ratio)) -- the same, by work
    b:close()
    -- without the peer the floor is measured still
    b = run{ peer = "no-such-python" }
    speed, share = b:row{ what = "thing", ours = light, seconds = 1e-3, work = 1, unit = "B/s", floor = light,
      share = 0.1, at_least = 2, peer = { script = "good", case = "fine" } }
    assert.matches("no program", speed.problem)
    assert.is_nil(share.problem)
    assert.is_true(share.met)
    assert.same({ rows = 2, met = 1, missed = 0, unmeasured = 1 }, b:count())
  end)

  it("says when a peer is missing, refuses or dies, and counts it as not measured", function()
    local function try(options, script, case, pattern)
      local b = run(options)
      local row
      for _ = 1, 2 do -- a peer that is gone stays gone
        row = b:row{ what = "thing", ours = function() spin(100) end, seconds = 1e-3,
          peer = { script = script, case = case }, at_least = 1.2 }
      end
      assert.is_nil(row.met)
      assert.is_true(row.ours > 0) -- ours is measured all the same
      assert.matches(pattern, row.problem)
      assert.matches(pattern, lines[1])
      assert.same({ rows = 2, met = 0, missed = 0, unmeasured = 2 }, b:count())
      b:close()
    end
    try({ peer = "no-such-python" }, "good", "fine", "peer not available: no program 'no%-such%-python'")
    try({ peer = dir .. "/shell" }, "dead", "fine", "peer not available: cannot start")
    try({ peer = dir .. "/shell" }, "good", "bad", "peer failed: ValueError: bad case")
    try({ peer = dir .. "/shell" }, "good", "fatal", "last words")
    assert.error_matches(function() run():peer("nonesuch") end, "there is no peer script .*nonesuch.py")
  end)

  it("judges targets in both directions, and none in a quick run", function()
    local b = run()
    local slow, fast = function() spin(160000) end, function() spin(10000) end
    local function row(options)
      options.what, options.seconds = "thing", 0.02
      return b:row(options)
    end
    assert.is_true(row{ ours = fast, floor = slow, at_most = 1 }.met)
    assert.is_false(row{ ours = slow, floor = fast, at_most = 1 }.met)
    assert.is_true(row{ ours = fast, floor = slow, at_least = 1 }.met)
    assert.is_false(row{ ours = slow, floor = fast, at_least = 1 }.met)
    assert.same({ rows = 4, met = 2, missed = 2, unmeasured = 0 }, b:count())
    -- per unit of work both are the same, and only then; far apart and in one of some tries, for other work
    -- runs on the machine too
    local even
    for _ = 1, 8 do
      even = row{ ours = slow, floor = fast, work = 16, other_work = 1, unit = "FLOP/s", at_most = 4 }
      if even.met and even.ratio > 0.25 then break end
    end
    assert.equal("time", even.as)
    assert.is_true(even.met and even.ratio > 0.25, tostring(even.ratio))
    assert.matches("MISSED$", lines[2])
    local quick = run{ quick = true }
    quick:row{ what = "thing", ours = fast, floor = slow, at_most = 1 }
    assert.same({ rows = 1, met = 0, missed = 0, unmeasured = 1 }, quick:count())
    assert.matches("not judged", lines[1])
  end)

  it("gives every row a budget, and leaves out rows without a target", function()
    local b = run{ seconds = 0.01, targets = true }
    local function light() spin(100) end
    assert.is_nil(b:row{ what = "no target", ours = light, floor = light })
    assert.is_nil(b:value{ what = "no target", value = 1 })
    local row = b:row{ what = "thing", ours = light, floor = light, at_most = 100, seconds = 60, turns = 1 }
    assert.equal(1, row.turns) -- 25 in the row's own minute
    assert.is_true(row.met)
    assert.is_true(b:value{ what = "memory", value = 7, at_most = 10 }.met)
    assert.matches("why", b:value{ what = "stopped", problem = "why" }.problem) -- never left out
    assert.same({ rows = 3, met = 2, missed = 0, unmeasured = 0 }, b:count())
    assert.equal(3, #lines)
  end)

  it("compares the fastest turns where that is asked for", function()
    local function disturbed(slow_turns) -- a side that is disturbed in all turns but one
      local turn = 0
      return { run = function() spin(turn == 2 and 4000 or slow_turns * 4000) end,
        before = function() turn = turn + 1 end }
    end
    local function measure(options)
      options.seconds = 0.3
      return run(options):row{ what = "thing", ours = disturbed(40), floor = disturbed(10), as = "time",
        turns = 4 }
    end
    local middle, fastest = measure{}, measure{ fastest = true }
    assert.is_true(middle.ratio > 2, tostring(middle.ratio)) -- 4
    assert.is_true(fastest.ratio < 2 and fastest.ratio > 0.5, tostring(fastest.ratio)) -- 1
    assert.is_true(math.abs(fastest.ours / fastest.other - fastest.ratio) < 1e-9)
    assert.is_true(fastest.high > 2, tostring(fastest.high)) -- pairs of turns are shown all the same
  end)

  it("adds the turns of later rounds to a row's", function()
    local b = run{ fastest = true, seconds = 0.05 }
    local function row(ours, other)
      return b:row{ what = "thing", as = "time", at_most = 0.5, ours = function() spin(ours) end,
        floor = function() spin(other) end }
    end
    local first = row(40000, 4000)
    assert.is_true(first.ratio > 2, tostring(first.ratio)) -- 10
    local second = row(4000, 40000) -- now ours is as fast as the other side was
    assert.is_true(second.ratio > 0.4 and second.ratio < 2.5, tostring(second.ratio))
    assert.is_true(second.turns > first.turns)
    assert.same({ first.other, 1 }, { second.other, #b.rows })
    b:value{ what = "size", value = 1 }
    b:value{ what = "size", value = 2 }
    assert.same({ 2, 2 }, { #b.rows, b.rows[2].ours })
    assert.equal(2, b:count().rows)
    b = run{ seconds = 0.05 } -- otherwise each is a row of its own
    row(4000, 4000)
    row(4000, 4000)
    assert.equal(2, #b.rows)
  end)

  it("leaves out rows whose names do not match", function()
    local b = run{ seconds = 0.01, match = "[4, 2] by-r" } -- as a pattern it would find neither
    local function light() spin(100) end
    local row = b:row{ what = "sum of [4, 2] by-rows", ours = light, floor = light }
    assert.is_true(row.ours > 0)
    assert.is_nil(b:row{ what = "sum of [4, 2] by columns", ours = light, floor = light, at_most = 100 })
    assert.equal(1, b:value{ what = "bytes of [4, 2] by-rows", value = 1 }.ours)
    assert.is_nil(b:value{ what = "bytes", value = 1 })
    assert.matches("why", b:value{ what = "stopped", problem = "why" }.problem) -- never left out
    assert.equal(3, b:count().rows)
    local both = run{ seconds = 0.01, match = "thing", targets = true }
    assert.is_nil(both:value{ what = "thing", value = 1 })
    assert.is_nil(both:value{ what = "other", value = 1, at_most = 2 })
    assert.is_true(both:value{ what = "thing", value = 1, at_most = 2 }.met)
  end)

  it("knows how large arrays beyond the caches are", function()
    local cache, n = bench.cache(), run():beyond_caches()
    assert.is_true(cache >= 0 and cache % 1024 == 0)
    assert.is_true(n >= 2 ^ 25 and 4 * n >= 2 * cache and math.log(n, 2) % 1 == 0)
    assert.is_true(n == 2 ^ 25 or 4 * n < 4 * cache)
    assert.equal(2 ^ 12, run{ quick = true }:beyond_caches())
  end)

  it("states values, floors by name, and writes JSON", function()
    local b = run{ quick = true }
    b:header("some")
    assert.is_true(b:value{ what = "memory", value = 7, unit = "%", at_most = 10 }.met)
    assert.is_false(b:value{ what = "memory", value = 11, unit = "%", at_most = 10 }.met)
    assert.is_nil(b:value{ what = "stopped", problem = "why", at_most = 1 }.met)
    b:row{ what = "a sum", ours = function() end, floor = "copy", work = 100, at_most = 1.3 }
    assert.matches("B/s copy", lines[#lines])
    b:row{ what = "a product", ours = function() end, floor = "sgemm", work = 100, at_least = 0.8 }
    assert.matches("FLOP/s sgemm.*>= 80%%", lines[#lines])
    local back = json.decode(b:json{ machine = "m" })
    assert.equal("m", back.machine)
    assert.equal(5, #back.rows)
    assert.equal("some", back.rows[1].section)
    assert.equal("why", back.rows[3].problem)
  end)

  it("refuses rows that say too little or too much", function()
    local b = run{ quick = true }
    local f = function() end
    local function try(pattern, method, options)
      assert.error_matches(function() b[method](b, options) end, pattern)
    end
    try("needs a peer or a floor", "row", { what = "x", ours = f })
    try("share is the target beside a peer", "row", { what = "x", ours = f, floor = f, share = 0.5 })
    try("two targets", "row", { what = "x", ours = f, floor = f, at_least = 1, at_most = 1 })
    try("has work but no unit", "row", { what = "x", ours = f, floor = f, work = 1 })
    try("needs its work, to compare with copy", "row", { what = "x", ours = f, floor = "copy" })
    try("unknown floor 'cpoy', did you mean 'copy'", "row",
      { what = "x", ours = f, floor = "cpoy", work = 1 })
    try("did you mean 'at_least'", "row", { what = "x", ours = f, floor = f, at_lest = 1 })
    try("either a value or a problem", "value", { what = "x" })
    assert.error_matches(function() bench.time(3) end, "expected a function, got 3")
    assert.error_matches(function() bench.compare(f) end, "argument 2 must be a function, got false")
    assert.error_matches(function() bench.peak("x") end, "expected a function, got 'x'")
  end)
end)
