--- Random public calls with random arguments must not crash the process, whatever they are.
--
-- tests/support/fuzz.lua does the work and says what it checks: no crash, every error a sentence, guard bytes
-- untouched, the same results and the same memory in use afterwards. It runs in a child process, because a
-- crash has to be observed from outside: the exit status is what is asserted. The number of calls is
-- LACUNA_FUZZ (make it a million overnight), the first seed LACUNA_FUZZ_SEED; a failure prints the command
-- that repeats it. One thread, because the arguments are tiny; so two children, each with half of the calls
-- and a seed of its own, beside each other.
--
-- The last test makes sure that the fuzzer can fail: a method that breaks the promise is put in first, and
-- must be found.

local sys = require "lacuna.sys"

local COUNT = tonumber(os.getenv("LACUNA_FUZZ") or "") or 100000
local SEED = tonumber(os.getenv("LACUNA_FUZZ_SEED") or "") or 1

-- prelude: Lua that the child runs first
local function command(seed, count, prelude)
  return ("OMP_NUM_THREADS=1 LUA_PATH='lua/?.lua;lua/?/init.lua;;' luajit -e %s "
    .. "tests/support/fuzz.lua %d %d"):format(sys.quote(prelude or ""), seed, count)
end
local function fuzz(...) return sys.run(command(...)) end

-- both at once; the status is that of one that failed
local function fuzz_both(seed, count, prelude)
  local half = math.floor(count / 2)
  return sys.run(("%s & first=$!; %s; second=$?; wait $first && (exit $second)"):format(
    command(seed, count - half, prelude), command(seed + 1, half, prelude)))
end

describe("the public interface", function()
  it(("survives %d random calls"):format(COUNT), function()
    local status, out, err = fuzz_both(SEED, COUNT)
    assert.are.equal(0, status, err)
    local sum = 0
    for calls in out:gmatch("(%d+) calls in") do sum = sum + tonumber(calls) end
    assert.is_true(sum >= COUNT, out)
  end)

  it("is watched by a fuzzer that finds defects", function()
    local methods = "require 'lacuna'; local methods = require('lacuna.tensor').methods; "
    local status, _, err = fuzz(1, 10000, methods .. "methods.cos = function() return nil + 1 end")
    assert.are.equal(1, status)
    assert.matches("t:cos%(.*attempt to perform arithmetic", err)
    assert.matches("repeat with: luajit tests/support/fuzz.lua 1 10000", err)
    for seed = 1, 2 do -- a crash of either
      status = fuzz_both(1, 2000, ("if arg[1] == '%d' then os.exit(139) end"):format(seed))
      assert.are.equal(139, status)
    end
    status = fuzz(1, 10000, methods .. "methods.cos = function() os.exit(139) end")
    assert.are.equal(139, status)
    status, _, err = fuzz(1, 10000, methods .. "methods.cos = function(t) KEPT = t:clone() return t end")
    assert.are.equal(1, status)
    assert.matches("bytes are live", err)
  end)
end)
