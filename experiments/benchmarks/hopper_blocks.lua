--- hopper_blocks.lua: what an active block costs on Hopper, beside a block of dense attention.
--
-- A random tenth of the blocks, the diagonal among them, 32768 rows, heads times head_dim 2048, bf16. A row
-- is the rate of active blocks as a share of the dense kernel's rate; density is the share of the blocks that
-- causality leaves. Blocks of 256 and 64 and the portable kernel are shown beside blocks of 128, for which
-- the share is to be 0.85. The backward has blocks of 128 rows and more. Sides take turns, after idling and
-- sustained (Run:paces of bench.lua); medians.

local lac = require "lacuna"
local masks = require "lacuna.attention.masks"

local PACE = { rounds = 5, idle = 0.02, long_rounds = 3, long = 0.1 }
local WIDTH, DENSITY = 2048, 0.1

-- sides: one forward and a wait; one backward and a wait
local function forward(x, options)
  local function body()
    lac.attend(x[1], x[2], x[3], options)
    lac.synchronize()
  end
  return function() lac.no_grad(lac.scope, body) end
end
local function backward(x, options)
  local out = lac.attend(x[1], x[2], x[3], options)
  local how = { grad_outputs = { x[4] }, retain_graph = true }
  local function body()
    lac.grad(out, { x[1], x[2], x[3] }, how)
    lac.synchronize()
  end
  return function() lac.scope(body) end
end

local function row(b, n, head_dim, block, causal, back)
  local x, heads, pattern = {}, math.floor(WIDTH / head_dim), masks.random(DENSITY, 1)
  for i = 1, 4 do
    x[i] = lac.randn({ 1, n, heads, head_dim }, { dtype = "bf16", device = "cuda", grad = back and i < 4 })
  end
  local z = { n = n, heads = heads, block = block, causal = causal }
  local mask = pattern:tensor(z):to{ device = "cuda" }
  local function side(kernel, active)
    return (back and backward or forward)(x, { segments = { n }, dilations = { 1 }, causal = causal,
      return_lse = false, kernel = kernel, block = active and block or nil,
      block_mask = active and mask or nil })
  end
  local what = ("%s, D %d, blocks of %d%s"):format(back and "backward" or "forward", head_dim, block,
    causal and ", causal" or "")
  local density = pattern:statistics(z).density
  for _, pace in ipairs(b:paces({ side("hopper", true), side("portable", true), side("hopper") }, PACE)) do
    local t = pace.times
    b:value{ what = ("%s%s: %.3f ms, dense %.3f, portable %.2fx"):format(what, pace.name, t[1] * 1e3,
      t[3] * 1e3, t[2] / t[1]), value = density * t[3] / t[1], unit = "x",
      at_least = block == 128 and 0.85 or nil }
  end
end

return {
  name = "hopper_blocks",
  about = "attention in a tenth of the blocks on Hopper, as a share of the dense rate",
  device = "cuda",
  once = true,
  run = function(b)
    if not pcall(lac.zeros, { 1 }, { device = "cuda" }) then
      return b:value{ what = "active blocks on Hopper", problem = "no CUDA device" }
    end
    for _, head_dim in ipairs{ 64, 128 } do
      for _, block in ipairs(b:size({ 128, 256, 64 }, { 128 })) do
        for _, causal in ipairs{ false, true } do
          for _, back in ipairs(block >= 128 and { false, true } or { false }) do
            lac.scope(row, b, b:size(32768, 1024), head_dim, block, causal, back)
          end
        end
      end
    end
  end,
}
