--- blocks.lua: does attention in a tenth of the blocks cost a tenth of dense attention?
--
-- The pattern is a random tenth of the blocks, the diagonal among them: no two rows of blocks are alike, the
-- worst case for whoever packs keys. A row is our time over density x the time of dense attention, where
-- density is the share of the blocks that causality leaves, as everywhere; the target is 1.3, forward and
-- backward, for blocks of 128. Smaller blocks are shown beside it: each key that is packed serves so many
-- fewer queries.

local lac = require "lacuna"
local masks = require "lacuna.attention.masks"

local D, HEADS, DENSITY = 64, 2, 0.1

-- a call without and with blocks; grad: of the backward alone
local function sides(n, block, causal, grad)
  local q, k, v = lac.randn{ 1, n, HEADS, D, grad = grad }, lac.randn{ 1, n, HEADS, D, grad = grad },
    lac.randn{ 1, n, HEADS, D, grad = grad }
  local z = { n = n, heads = HEADS, block = block, causal = causal }
  local pattern = masks.random(DENSITY, 1)
  local dense = { segments = { n }, dilations = { 1 }, causal = causal, return_lse = false }
  local sparse = { segments = { n }, dilations = { 1 }, causal = causal, return_lse = false, block = block,
    block_mask = pattern:tensor(z):to{ device = q:device() } }
  local function side(options)
    if not grad then return function() return lac.attend(q, k, v, options) end end
    local out = lac.attend(q, k, v, options)
    local go = { grad_outputs = { lac.randn(out:size()) }, retain_graph = true }
    return function() return lac.grad(out, { q, k, v }, go) end
  end
  return side(sparse), side(dense), pattern:statistics(z).density
end

return {
  name = "blocks",
  about = "attention in a tenth of the blocks against dense attention, by density",
  device = "any",
  run = function(b)
    local n = b:size(lac.default_device():find "^cuda" and 16384 or 4096, 512)
    for _, block in ipairs(b:size({ 128, 64, 32, 16 }, { 128 })) do
      for _, causal in ipairs{ false, true } do
        for _, grad in ipairs{ false, true } do
          local ours, dense, density = sides(n, block, causal, grad)
          b:row{ what = ("%s, blocks of %d%s"):format(grad and "backward" or "forward", block,
            causal and ", causal" or ""), ours = ours, floor = dense, against = "dense", as = "time",
            work = density, other_work = 1, unit = "calls/s",
            at_most = block == 128 and 1.3 or nil }
        end
      end
    end
  end,
}
