--- elementwise.lua: maps, softmax, norms, reductions and optimizers beside a copy and beside PyTorch.
--
-- Arrays are far beyond the caches, so memory sets the pace: each row states the least bytes that the
-- operator must move (inputs read, results written once) as a share of the bandwidth of a copy on the same
-- threads; a share of 1 / 1.3 is the target. Functions whose arithmetic on one thread costs more than their
-- memory (exact gelu, conversions of bf16) miss it there and say so by their number. Backwards are the
-- gradient alone. The peer runs the same operator on as many threads.
--
-- One core of an EPYC (Zen 4, AVX-512; cycles of 0.28 ns) copies 16 floats in 8, past the caches, so 1.3
-- of it leaves 10 cycles for a vector, of which each takes one multiply-add: relu (8.5) and reciprocals
-- (8.5) are within, and an exponential, which has 8 such steps and 6 others, is not (15). Cycles for 16
-- floats there: exp2 12, exp 15, sigmoid 16, silu, expm1 17, tanh 19, log 24, gelu, erf 29, log2 38,
-- dropout 48, atan 54, sin, cos 64, pow 125. What is computed in double (from log10 on in c/cpu/maps.h)
-- has half the lanes and longer polynomials; exp2 and log2 took 44 and 54 that way. Reading alone gets 28
-- GB/s of the copy's 48, so sums over rows (2.4 ms for 64 MiB) are at the memory's pace. Tried: sin and
-- cos in float after a reduction in double: 64 -> 52, and 0.9 ulp; lanes of sums and maxima combined in
-- pairs: no difference, logsumexp slower by a quarter. Neither was kept.

local lac = require "lacuna"

local SHARE = 1 / 1.3

local function row(b, what, case, arguments, bytes, ours)
  b:row { what = what, ours = ours, work = bytes, unit = "B/s", floor = "copy", as = "share",
          at_least = SHARE }
  b:row { what = what, ours = ours, peer = { script = "elementwise", case = case, arguments = arguments } }
end

local function backward(inputs, out)
  local g = lac.randn(out:size()):to { dtype = out:dtype() }
  return function() lac.grad(out, inputs, { grad_outputs = { g }, retain_graph = true }) end
end

local function maps(b, n, dtype)
  local size = dtype == "f32" and 4 or 2
  local x, y = lac.randn { n, dtype = dtype }, lac.randn { n, dtype = dtype }
  for _, name in ipairs { "relu", "exp", "tanh", "sigmoid", "silu", "gelu" } do
    row(b, ("%s, %s"):format(name, dtype), "unary", { name = name, n = n, dtype = dtype }, 2 * size * n,
        function() return lac[name](x) end)
  end
  row(b, "add, " .. dtype, "add", { n = n, dtype = dtype }, 3 * size * n, function() return x + y end)
  local leaf = x:detach():requires_grad_(true)
  row(b, "gelu bwd, " .. dtype, "unary_backward", { name = "gelu", n = n, dtype = dtype }, 3 * size * n,
      backward({ leaf }, lac.gelu(leaf)))
end

local function rows_of(b, rows, width)
  local x = lac.randn { rows, width }
  local bytes, a = 4 * rows * width, { rows = rows, width = width }
  local leaf, gamma, beta = x:detach():requires_grad_(true), lac.ones { width }, lac.zeros { width }
  for dim = 1, 2 do
    local along = (" [%d, %d] over %d"):format(rows, width, dim)
    local d = { rows = rows, width = width, dim = dim - 1 }
    for _, name in ipairs { "softmax", "log_softmax" } do
      row(b, name .. along, name, d, 2 * bytes, function() return lac[name](x, dim) end)
      row(b, name .. along .. ", bwd", name .. "_backward", d, 3 * bytes,
          backward({ leaf }, lac[name](leaf, dim)))
    end
    for _, name in ipairs { "sum", "max", "var", "logsumexp" } do
      row(b, name .. along, name, d, bytes, function() return lac[name](x, dim) end)
    end
  end
  row(b, ("layernorm [%d, %d]"):format(rows, width), "layernorm", a, 2 * bytes,
      function() return lac.layernorm(x, gamma, beta) end)
  row(b, ("layernorm [%d, %d], bwd"):format(rows, width), "layernorm_backward", a, 3 * bytes,
      backward({ leaf }, lac.layernorm(leaf, gamma, beta)))
  row(b, ("rmsnorm [%d, %d]"):format(rows, width), "rmsnorm", a, 2 * bytes,
      function() return lac.rmsnorm(x, gamma) end)
  row(b, ("rmsnorm [%d, %d], bwd"):format(rows, width), "rmsnorm_backward", a, 3 * bytes,
      backward({ leaf }, lac.rmsnorm(leaf, gamma)))
end

-- reads and writes parameter and moments in place: each line is in the cache when it is written
local function optimizers(b, n)
  for _, case in ipairs { { "adamw", 28 * n }, { "lion", 20 * n } } do
    local name, bytes = case[1], case[2]
    local p = lac.randn { n, grad = true }
    p.grad = lac.randn { n }
    local o = lac.optim[name]({ p }, { lr = 1e-4, weight_decay = 0.01 })
    local ours, what = function() o:step() end, name .. ", f32"
    if name == "adamw" then
      row(b, what, name, { n = n }, bytes, ours)
    else -- PyTorch has no Lion
      b:row { what = what, ours = ours, work = bytes, unit = "B/s", floor = "copy", as = "share",
              at_least = SHARE }
    end
  end
end

return {
  name = "elementwise",
  about = "maps, softmax, norms, reductions and optimizers of arrays beyond the caches",
  run = function(b)
    for _, dtype in ipairs { "f32", "bf16", "f16" } do maps(b, b:size(2 ^ 24, 2 ^ 10), dtype) end
    rows_of(b, b:size(16384, 16), b:size(1024, 16))
    optimizers(b, b:size(2 ^ 24, 2 ^ 10))
  end,
}
