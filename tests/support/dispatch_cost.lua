--- dispatch_cost.lua: microseconds of a small operator with its tape record.
--
-- A program and not a part of the spec, because the cost of garbage depends on everything that is alive: in a
-- process that has just run other specs each collection walks their tables too, and the same operator takes
-- twice as long. Here is what a script pays: three operators on 16 elements, collector running, medians of 15
-- rounds of 5000 calls. Prints one line per operator: name, median, fastest round.

package.path = "lua/?.lua;lua/?/init.lua;" .. package.path
local lac = require "lacuna"

local CALLS, ROUNDS = 5000, 15
local a, b = lac.randn { 16, grad = true }, lac.randn { 16, grad = true }

local function measure(name, body)
  local times = {}
  for round = 1, ROUNDS do
    local start = os.clock()
    body(CALLS)
    times[round] = (os.clock() - start) / CALLS * 1e6
  end
  table.sort(times)
  print(("%s %.3f %.3f"):format(name, times[(ROUNDS + 1) / 2], times[1]))
end

measure("add", function(n) for _ = 1, n do local _ = a + b end end)
measure("mul_by_number", function(n) for _ = 1, n do local _ = a * 2 end end)
measure("tanh", function(n) for _ = 1, n do local _ = a:tanh() end end)
