--- The price of an operator: hot loops must be compiled by LuaJIT without aborts, and stay cheap.
--
-- A spec that only measured time would be red on slow machines and green on broken code on fast ones. So the
-- first thing asserted is that LuaJIT compiles the loop: jit.attach reports every trace that is stopped or
-- aborted while the loop runs. An abort in the library's dispatch (a closure made per call, a vararg, pairs)
-- fails the spec by name. LuaJIT never forgets a function that it could not compile where another spec drove
-- it through errors, so the loops run in a process of their own, which is this file once more. Time is
-- asserted under a bound that only an interpreter-speed regression reaches, and printed so that drift can be
-- seen.

local lac = require "lacuna"
local jutil = require "jit.util"
local vmdef = require "jit.vmdef"
local sys = require "lacuna.sys"

local ITERATIONS = 4000
local FASTEST_US = 5 * tonumber(os.getenv("LACUNA_SLOWNESS") or 1) -- more of an instrumented build
local FRESH = os.getenv "LACUNA_FRESH" ~= nil -- this is that process

-- run body(n) under a fresh compiler; gives the number of finished traces and the reasons of aborts
local function traced(body)
  collectgarbage()
  collectgarbage()
  -- a finalizer that runs while a trace is recorded aborts it; LuaJIT tries again later, so that says
  -- nothing about the code
  collectgarbage("stop")
  jit.flush()
  local stops, aborts = 0, {}
  local function observe(what, _, func, pc, code, reason)
    if what == "stop" then
      stops = stops + 1
    elseif what == "abort" then
      local info = jutil.funcinfo(func, pc)
      local text = tostring(vmdef.traceerr[code] or code):gsub("%%[sd]", tostring(reason))
      aborts[#aborts + 1] = ("%s at %s"):format(text, info.loc or "?")
    end
  end
  jit.attach(observe, "trace")
  body(ITERATIONS)
  jit.attach(observe)
  collectgarbage("restart")
  return stops, aborts
end

-- aborts that say only that a trace is being tried elsewhere are part of LuaJIT's heuristics: an inner loop
-- inside a trace that is being recorded, a loop that is left while it is recorded, a blacklisted function of
-- the test itself; and busted's lookup of globals, which calls itself
local HARMLESS = { "inner loop in root trace", "leaving loop in root trace", "down%-recursion",
                   "retry recording", "environment%.lua" }

local function serious(aborts)
  local list = {}
  for _, text in ipairs(aborts) do
    local harmless = false
    for _, pattern in ipairs(HARMLESS) do harmless = harmless or text:find(pattern) ~= nil end
    if not harmless then list[#list + 1] = text end
  end
  return list
end

local function check(name, body)
  it(name .. " is compiled without an abort", function()
    local stops, aborts = traced(body)
    assert.is_true(stops > 0, "no trace was finished")
    assert.are.same({}, serious(aborts))
  end)
end

local function tensors()
  return lac.randn { 16, grad = true }, lac.randn { 16, grad = true }
end

if FRESH then describe("dispatch", function()
  local a, b = tensors()

  check("add", function(n) for _ = 1, n do local _ = a + b end end)
  check("multiply by a number", function(n) for _ = 1, n do local _ = a * 2 end end)
  check("a chain of add, mul, tanh", function(n) for _ = 1, n do local _ = (a * b + a):tanh() end end)
  check("without gradients", function(n)
    local c = a:detach()
    for _ = 1, n do local _ = (c * b:detach()):exp() end
  end)

  local m = lac.randn { 4, 4, grad = true }
  check("matmul of a transposed view", function(n)
    local t = m:transpose(1, 2)
    for _ = 1, n do local _ = m:matmul(t) end
  end)
  check("view and transpose", function(n) for _ = 1, n do local _ = a:view(4, 4):transpose(1, 2) end end)

  it("notices an abort", function() -- the check can fail
    local seen = 0
    for _ = 1, 10 do -- LuaJIT's counters are hashed by address: now and then a loop is not tried at all
      local _, aborts = traced(function(n)
        local keep
        for i = 1, n do keep = function() return i end end
        return keep
      end)
      seen = seen + #serious(aborts)
    end
    assert.is_true(seen > 0)
  end)
end) end

if not FRESH then describe("dispatch", function()
  it("is compiled without an abort in a fresh process", function()
    -- Which loop is hot first is chance, because LuaJIT counts by hashed addresses: in 1 process of 30 a
    -- recording runs into a loop that is not compiled yet. What cannot be compiled aborts in each.
    local status, out, err
    for _ = 1, 3 do
      status, out, err = sys.run(("LACUNA_FRESH=1 luajit %s tests/dispatch_spec.lua"):format(
        sys.quote(arg[0])))
      if status == 0 then break end
    end
    assert.are.equal(0, status, out .. err)
    assert.matches("\n[67] passed, 0 failed, 0 skipped", out)
  end)

  it("costs little", function()
    local status, out, err = sys.run("luajit tests/support/dispatch_cost.lua")
    assert.are.equal(0, status, err)
    local text, count = {}, 0
    for name, median, fastest in out:gmatch("(%S+) (%S+) (%S+)") do
      text[#text + 1], count = ("%s %.2f us"):format(name, median), count + 1
      -- the fastest round is asserted, and generously: other work on the machine adds time
      assert.is_true(tonumber(fastest) < FASTEST_US, ("%s: %s us"):format(name, fastest))
    end
    assert.are.equal(3, count)
    print("\n  16 elements with tape record, median: " .. table.concat(text, ", "))
  end)
end) end
