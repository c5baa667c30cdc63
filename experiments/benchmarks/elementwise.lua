--- elementwise.lua: maps, softmax, norms, reductions and optimizers beside a copy and beside PyTorch.
--
-- Arrays are far beyond the caches, so memory sets the pace: each row states the least bytes that the
-- operator must move (inputs read, results written once) as a share of the bandwidth of a copy on the same
-- threads; a share of 1 / 1.3 is the target. Backwards are the gradient alone. The peer runs the same
-- operator on as many threads. What misses on one thread, and by what (one core of an EPYC, Zen 4, AVX-512;
-- cycles of 0.27 ns; it copies 16 floats in 9.4 cycles, past the caches):
--
-- Arithmetic. Cycles for 16 floats that are in the cache: relu 5, exp 8, exp2, sigmoid, silu 10, tanh, gelu
-- 11, gelu by tanh 14, expm1 15, softplus 22, log 23, erf 27, log2 38, dropout 48, atan 54, sin, cos 64, pow
-- 125; a multiply-add takes one, a division 6, of which it leaves 4 to others. 77% of a copy are 12. Share
-- of a copy of 128 MiB, by processor time, in turns with it: relu 89, exp 101, sigmoid 90, silu 91, tanh 85,
-- gelu and its gradient 82, softmax 84, its logarithm 80, layernorm 91, rmsnorm 96; backwards of these four
-- 79, 91, 74, 82. gelu of numbers beyond 3.9 takes 30 cycles: of normal numbers, 1 group of 64 in 150 has
-- one; times 3, all have, and gelu 31%. f16 adds 4 to each and bf16 7, for half the bytes. relu, exp, tanh,
-- sigmoid, silu, gelu and its gradient of half types have lines of their own (c/cpu/halves.h), 32 values in
-- 11 to 25 cycles. Share of a copy: bf16 relu 87, exp 81, tanh 82, sigmoid 56, silu 51, gelu 49, its
-- gradient 61; f16 relu 88, exp 50, tanh 40, sigmoid 39, silu 37, gelu 40, its gradient 51. 77% allow 12
-- cycles; f16's conversions alone take 7. What is computed in double (from log10 on in c/cpu/maps.h) has
-- half the lanes and longer polynomials. Compared by the clock on the wall, what takes longer than a time
-- slice is interrupted in every sample if a core has other work, and a copy in none: rows then read half of
-- what they are.
-- AVX2. One core of an EPYC, Zen 3, copies 16 floats in 4.4 ns; a line in the cache takes, and its share
-- was with other work on the machine (before: what gcc made of the functions line by line): exp 4.0 ns, 82%
-- (59), sigmoid 4.7, 59 (56), tanh 5.4, 55 (27), gelu 9.4, with 8.9 36 (22), its gradient 40 (28); bf16 exp
-- 6.2, 57 (17), sigmoid 8.6, 40 (20), tanh 7.8, 45 (11), gelu 9.4, 36 (9), its gradient 31 (13), f16 about
-- as much. Memory adds 1.5 to 2 ns to what is computed, so 77% leave 4: 12 cycles. Rows: softmax 68 (50),
-- its logarithm 58 (50), layernorm 80 (66), rmsnorm 80; backwards of these four 80 to 85 (70 to 74), 89
-- (25), 72, 72.
-- A Xeon (Sapphire Rapids; AVX-512) copies 16 floats in 6.4 ns. What is fetched for a kernel must be
-- asked for 2 KB ahead there, not 1: bf16 exp 80 instead of 70, sigmoid 83 (71), silu 75 (66), tanh 82
-- (70), gelu 86 (74); f16 86 (74), 75 (69), 72 (66), 87 (75), 88 (76). With a Newton step instead of a
-- division f16's sigmoid and silu would be 80 and 77 there; on a Zen 4 it takes three cycles more. Zen 3:
-- relu 110 with 2 KB, 103 with 1, 90 with 4; the others the same. On the Xeon softmax's backwards have 96
-- and 95 instead of 81 and 89.
-- Reading alone. 6.3 to 7 cycles a line whatever is asked for ahead, where 77% of a copy allow 6.8: the
-- maximum over rows is there. A sum converts to double, 5 cycles for 16 floats, a variance 9, a log-sum-exp
-- takes 10; over columns sums are loaded and stored as well.
-- Passes. What reads memory twice (softmax over columns) counts it once here. Backwards of norms take 11
-- cycles for a line each of x, g and dx, 5 of them for dgamma and dbeta in the cache; rows wider than 1024
-- leave the first cache, and from memory all overlap to 19.
--
-- Tried, not kept: sin and cos in float after a reduction in double (64 -> 52, and 0.9 ulp); tanh by 16
-- polynomials in intervals that grow (12.5 -> 10.9 by its addition theorem); norms' backwards by two or four
-- rows at once, to load and store dgamma less often (rows a power of two apart push each other out of the
-- cache: 0.8x of four; the two rows at hand are added at once instead); asking for rows ahead in sums and
-- maxima (0.7x on Zen 4; an Intel processor needs it), and into the first cache anywhere (softmax 1.4x the
-- time; into the second, 8 to 16 KB ahead, is right; relu gains 0.7 cycles from 2 KB ahead into the first,
-- silu and gelu lose 0.3); two rows at once of columns' sums (10 cycles a line, not 7); rows of a softmax
-- over columns fetched three ahead (4% at most).

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
    local n = b:beyond_caches()
    for _, dtype in ipairs { "f32", "bf16", "f16" } do
      maps(b, b:size(dtype == "f32" and n or 2 * n, 2 ^ 10), dtype)
    end
    rows_of(b, b:size(n / 1024, 16), b:size(1024, 16))
    optimizers(b, b:size(n / 2, 2 ^ 10))
  end,
}
