--- profile_cost.lua: what an operator costs while the profiler records it, beside what it costs otherwise.
--
-- A program of its own for the reason of dispatch_cost.lua. Rounds with and without the recorder alternate,
-- so that both see the same machine; the fastest round of each is printed, in microseconds for one operator
-- on 16 elements.

package.path = "lua/?.lua;lua/?/init.lua;" .. package.path
local lac = require "lacuna"
local C = require("lacuna.lib").C

local CALLS, ROUNDS = 5000, 21
local a, b = lac.randn { 16 }, lac.randn { 16 }

local function round()
  local start = os.clock()
  for _ = 1, CALLS do local _ = a + b end
  return (os.clock() - start) / CALLS * 1e6
end

local best = { math.huge, math.huge }
for _ = 1, ROUNDS do
  for on = 0, 1 do
    collectgarbage()
    C.lac_profile(on)
    best[on + 1] = math.min(best[on + 1], round())
    C.lac_profile(-1)
  end
end
print(("off %.3f on %.3f"):format(best[1], best[2]))
