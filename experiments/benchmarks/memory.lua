--- memory.lua: attention in linear memory, at a million positions.
--
-- LongNet attention, forward and backward, at N = 1,048,576. Inputs (q, k, v and the output's gradient),
-- output and gradients must be there; everything else that is alive at the peak, counted by the pool, is
-- extra: the log-sum-exp of every row, workspaces of the kernels, temporaries of the tape. The target is
-- 10% of the former. A gathered copy of one branch alone would be 19% at dilation 1 and three branches.
-- The number does not depend on the machine, so there is no peer and no clock.

local lac = require "lacuna"
local bench = require "lacuna.bench"

return {
  name = "memory",
  about = "LongNet attention forward + backward: extra memory at the peak",
  once = true,
  run = function(b)
    local N = b:size(2 ^ 20, 2 ^ 12)
    local pattern = { variant = "longnet", segments = { N / 2 ^ 11, N / 2 ^ 8, N / 2 ^ 5 },
      dilations = { 1, 8, 64 }, heads = 4, causal = true }
    local attention = lac.attention(pattern)
    local function input() return lac.randn{ 1, N, 4, 32, grad = true } end
    local q, k, v, dout = input(), input(), input(), lac.randn{ 1, N, 4, 32 }
    local size = 4 * q:numel()
    local extra = bench.peak(function()
      lac.scope(function() attention(q, k, v):backward(dout) end)
    end) - 4 * size -- the output and three gradients
    b:value{ what = ("N %d, B 1, H 4, D 32: of inputs, output, gradients"):format(N), value = 100 * extra / (8
      * size), unit = "%", at_most = 10 }
    b:value{ what = "  in bytes, beyond the log-sum-exp", value = extra - 4 * N * 4, unit = "B" }
  end,
}
