--- hopper_pairs.lua: what padding, masks and biases cost on Hopper, beside none and the portable kernels.
--
-- 32768 rows in all, heads times head_dim 2048, bf16, forward alone and with the backward. Padding lies
-- behind items that end between a half and all of their rows, in front of them, or anywhere, a quarter of the
-- keys; masks keep three quarters of the pairs. A row is how many times as long the portable kernels take;
-- its text has milliseconds and the time beside a call without the option. Sides take turns in a new order
-- each round (hopper.lua says why); medians. kernels/HOPPER_OPTIONS.md has the record.

local lac = require "lacuna"
local bench = require "lacuna.bench"

local ROUNDS, IDLE = 7, 0.02
local ROWS, WIDTH = 32768, 2048

local function padding(batch, rows, shown)
  local at = lac.arange(0, rows, { dtype = "f32", device = "cuda" }):view(1, rows)
  local ends = lac.arange(1, batch + 1, { dtype = "f32", device = "cuda" }):view(batch, 1)
  return { key_padding = shown(at, ends * (rows / 2 / batch) + rows / 2) }
end

-- what is asked of a call: name and options, made when they are needed
local CASES = {
  { "padding behind", function(z) return padding(z.batch, z.rows, function(at, n) return at:lt(n) end) end },
  { "padding in front",
    function(z) return padding(z.batch, z.rows, function(at, n) return at:ge(z.rows - n) end) end },
  { "padding anywhere",
    function(z) return { key_padding = lac.rand({ z.batch, z.rows }, { device = "cuda" }):gt(0.25) } end },
  { "mask", function(z) return { mask = lac.rand({ z.rows, z.rows }, { device = "cuda" }):gt(0.25) } end },
  { "bias", function(z) return { bias = z.draw(z.rows, z.rows) } end },
  { "bias for each head", function(z) return { bias = z.draw(1, z.heads, z.rows, z.rows) } end },
  { "bias in f32",
    function(z) return { bias = lac.randn({ z.rows, z.rows }, { device = "cuda" }) } end },
}

-- a side: one call, forward or both directions, and a wait
local function side(z, options, backward)
  local function forward() return (lac.attend(z.q, z.k, z.v, options)) end
  local function body()
    if backward then lac.grad({ forward() }, { z.q, z.k, z.v }, { grad_outputs = { z.g } })
    else lac.no_grad(forward) end
    lac.synchronize()
  end
  return function() return bench.warm(function() lac.scope(body) end) end
end

local function row(b, z, name, make)
  local function options(kernel, more)
    local o = { segments = { z.rows }, dilations = { 1 }, causal = z.causal, kernel = kernel,
      return_lse = false }
    for key, value in pairs(more or {}) do o[key] = value end
    return o
  end
  local more = make(z)
  for _, backward in ipairs{ false, true } do
    local sides = { side(z, options("hopper", more), backward), side(z, options("portable", more), backward),
      side(z, options "hopper", backward) }
    local t = bench.shuffled(sides, b:size(ROUNDS, 1), IDLE)
    b:value{ what = ("D %d, %d rows%s, %s%s: %.3f ms, %.2fx of none"):format(z.head_dim, z.rows,
      z.causal and ", causal" or "", name, backward and ", with backward" or "", t[1] * 1e3, t[1] / t[3]),
      value = t[2] / t[1], unit = "x", at_least = 1 }
  end
end

local function rows(b, head_dim, n, causal)
  local z = { head_dim = head_dim, rows = n, causal = causal, batch = b:size(ROWS / n, 1) }
  z.heads = WIDTH / head_dim
  function z.draw(...) return lac.randn({ ... }, { dtype = "bf16", device = "cuda" }) end
  for _, name in ipairs{ "q", "k", "v", "g" } do
    z[name] = z.draw(z.batch, n, z.heads, head_dim)
    if name ~= "g" then z[name]:requires_grad_(true) end
  end
  for _, case in ipairs(CASES) do lac.scope(row, b, z, case[1], case[2]) end
end

return {
  name = "hopper_pairs",
  about = "padding, masks and biases on Hopper beside none and the portable kernels",
  device = "cuda",
  once = true,
  run = function(b)
    if not pcall(lac.zeros, { 1 }, { device = "cuda" }) then
      return b:value{ what = "options of pairs on Hopper", problem = "no CUDA device" }
    end
    for _, head_dim in ipairs{ 64, 128 } do
      for _, n in ipairs(b:size({ 2048, 8192 }, { 256 })) do
        for _, causal in ipairs{ false, true } do lac.scope(rows, b, head_dim, n, causal) end
      end
    end
  end,
}
