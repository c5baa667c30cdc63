--- Random public calls with random arguments must not crash the process, whatever they are.
--
-- tests/support/fuzz.lua does the work and says what it checks: no crash, every error a sentence, guard bytes
-- untouched, the same results and the same memory in use afterwards. It runs in a child process, because a
-- crash has to be observed from outside: the exit status is what is asserted. The number of calls is
-- LACUNA_FUZZ (make it a million overnight), the seed LACUNA_FUZZ_SEED; a failure prints the command that
-- repeats it. One thread, because the arguments are tiny.
--
-- The last test makes sure that the fuzzer can fail: a method that breaks the promise is put in first, and
-- must be found.

local sys = require "lacuna.sys"

local COUNT = tonumber(os.getenv("LACUNA_FUZZ") or "") or 100000
local SEED = tonumber(os.getenv("LACUNA_FUZZ_SEED") or "") or 1

-- prelude: Lua that the child runs first
local function fuzz(seed, count, prelude)
  return sys.run(("OMP_NUM_THREADS=1 LUA_PATH='lua/?.lua;lua/?/init.lua;;' luajit -e %s "
    .. "tests/support/fuzz.lua %d %d"):format(sys.quote(prelude or ""), seed, count))
end

describe("the public interface", function()
  it(("survives %d random calls"):format(COUNT), function()
    local status, out, err = fuzz(SEED, COUNT)
    assert.are.equal(0, status, err)
    assert.matches("calls in", out)
  end)

  it("is watched by a fuzzer that finds defects", function()
    local methods = "require 'lacuna'; local methods = require('lacuna.tensor').methods; "
    local status, _, err = fuzz(1, 10000, methods .. "methods.cos = function() return nil + 1 end")
    assert.are.equal(1, status)
    assert.matches("t:cos%(.*attempt to perform arithmetic", err)
    assert.matches("repeat with: luajit tests/support/fuzz.lua 1 10000", err)
    status = fuzz(1, 10000, methods .. "methods.cos = function() os.exit(139) end")
    assert.are.equal(139, status) -- a crash
    status, _, err = fuzz(1, 10000, methods .. "methods.cos = function(t) KEPT = t:clone() return t end")
    assert.are.equal(1, status)
    assert.matches("bytes are live", err)
  end)
end)
