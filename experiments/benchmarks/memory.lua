--- memory.lua: attention in linear memory, at a million positions.
--
-- LongNet attention, forward and backward, at N = 1,048,576. Inputs (q, k, v and the output's gradient),
-- output and gradients must be there; everything else that is alive at the peak, counted by the pool, is
-- extra: the log-sum-exp of every row, workspaces of the kernels, temporaries of the tape. The target is
-- 10% of the former. A gathered copy of one branch alone would be 19% at dilation 1 and three branches.
-- The number does not depend on the machine, so there is no peer and no clock.

local lac = require "lacuna"
local bench = require "lacuna.bench"

-- Both patterns in use: three branches eight times as wide and as sparse, and LongNet's five, each twice.
local PATTERNS = {
  { name = "3 branches", segments = { 2 ^ -11, 2 ^ -8, 2 ^ -5 }, dilations = { 1, 8, 64 } },
  { name = "5 branches", segments = { 2 ^ -9, 2 ^ -8, 2 ^ -7, 2 ^ -6, 2 ^ -5 },
    dilations = { 1, 2, 4, 8, 16 } },
}

local function extra(N, pattern)
  local segments = {}
  for i, share in ipairs(pattern.segments) do segments[i] = math.max(N * share, pattern.dilations[i]) end
  local attention = lac.attention{ variant = "longnet", segments = segments, dilations = pattern.dilations,
    heads = 4, causal = true }
  local function input() return lac.randn{ 1, N, 4, 32, grad = true } end
  local q, k, v, dout = input(), input(), input(), lac.randn{ 1, N, 4, 32 }
  local size = 4 * q:numel()
  return bench.peak(function()
    lac.scope(function() attention(q, k, v):backward(dout) end)
  end) - 4 * size, size -- beyond the output and three gradients
end

return {
  name = "memory",
  about = "LongNet attention forward + backward: extra memory at the peak",
  once = true,
  run = function(b)
    local N = b:size(2 ^ 20, 2 ^ 12)
    for _, pattern in ipairs(PATTERNS) do
      local bytes, size = extra(N, pattern)
      b:value{ what = ("N %d, %s, B 1, H 4, D 32: of the tensors"):format(N, pattern.name),
        value = 100 * bytes / (8 * size), unit = "%", at_most = 10 }
      b:value{ what = "  in bytes, beyond the log-sum-exp", value = bytes - 4 * N * 4, unit = "B" }
    end
  end,
}
