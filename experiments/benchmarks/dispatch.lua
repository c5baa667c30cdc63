--- dispatch.lua: what an operator costs before it computes anything.
--
-- Small tensors, with the record for the gradient, 100 calls a turn's sample on both sides (a loop in Lua, a
-- loop in Python). Research code is full of small operators; what they cost is the host's share of a step.
-- The collector of each side runs inside the time: ours as scripts have it, in a scope, Python's reference
-- counts. A comparison, but for one operator on a GPU, which is to cost less than 3 us: a launch of nothing
-- took 2.2 of the 3.07 that it took on an H200's host.

local lac = require "lacuna"

local CALLS = 100
local LAUNCHED = 3 -- microseconds of an operator on a GPU

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
    local add = row("add", function() for _ = 1, CALLS do local _ = x + y end end)
    if b.device == "cuda" and add.ours then
      b:value{ what = "  add, one call", value = 1e6 * add.ours / CALLS, unit = "us", at_most = LAUNCHED }
    end
    row("multiply by a number", function() for _ = 1, CALLS do local _ = x * 2 end end)
    row("tanh", function() for _ = 1, CALLS do local _ = x:tanh() end end)
    row("matmul 4 x 4", function() for _ = 1, CALLS do local _ = m:matmul(m) end end)
    row("view", function() for _ = 1, CALLS do local _ = x:view(4, 4) end end)
    row("(a * b + a):tanh():sum(), backward", function()
      for _ = 1, CALLS do (x * y + x):tanh():sum():backward() end
    end)
  end,
}
