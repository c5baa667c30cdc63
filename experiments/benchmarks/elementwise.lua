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
-- gradient 61; f16 relu 88, exp 50, tanh 40, sigmoid 39, silu 37 (before these two had polynomials in
-- intervals), gelu 40, its gradient 51. 77% allow 12
-- cycles; f16's conversions alone take 7. What is computed in double (from log10 on in c/cpu/maps.h) has
-- half the lanes and longer polynomials. Compared by the clock on the wall, what takes longer than a time
-- slice is interrupted in every sample if a core has other work, and a copy in none: rows then read half of
-- what they are.
-- AVX2. One core of an EPYC, Zen 3, at 3.2 GHz, copies 16 floats in 4.4 to 4.6 ns; 77% of that allow 5.7 to
-- 5.9. From memory to memory, by processor time, in turns with the loops of before (in brackets), a line
-- takes, with its share of a copy of 4.6: sigmoid 5.2 ns, 88% (5.8, 79), silu 5.9, 78, tanh 5.9, 77 (6.7,
-- 68), gelu 9.8, 47 (10.5, 43), its gradient, three arrays, 12.1, 56, geglu 11.0 (11.6), log 6.9, 66 (10.5,
-- 43). Two threads: log 4.0 (5.3), sigmoid 3.2 (3.4), gelu 5.1 (5.3) beside a copy's 3.1. Memory is
-- overlapped with arithmetic: it adds 0.1 to 0.7 ns to what takes longer than a copy. What bounds them is
-- two pipes of four: multiplications, blends and vpermilps start there, two in a cycle; a division takes
-- three to four such starts. 16 floats of the sigmoid need 14 cycles, of tanh 15, of gelu 26, of its
-- gradient 27; 5.7 ns are 18. Tried for gelu's tail without a division: powers of polynomials (10 to 17 ulp,
-- by rounding alone), Mills' ratio as a polynomial (degree 10 is off by 2e-6), 2^-(u^2 + g(u)), 5.5 ulp and
-- 0.75 of the time in a bare loop for normal numbers, but 1.6 times it for numbers twice as large.
-- Prefetches of 1 to 8 KB into either cache or past them, in two steps, loads ahead, late stores, blocks of
-- 4 KB: within 0.25 ns, or slower.
-- Halves with AVX2. 32 values take 19 to 55 cycles by vectors. Of arrays of 2^19 values on every second
-- vector of words is looked up in a table of all 65,536 values (c/cpu/halves_tables.h), which is work for
-- other units. Nanoseconds for 32 values from memory, before and after, bf16: exp 6.6, 6.5 to 7.2; tanh 8.0,
-- 6.2; sigmoid 9.2, 7.0; silu 10.3, 7.2; gelu 10.1, 7.0; its gradient, whose slopes are all looked up, 15.4,
-- 10; f16: exp 7.8, 7.0 to 8.1; tanh 9.2, 7.1; sigmoid 10.3, 8.1; silu 11.2, 8.0; gelu 10.8, 8.0; its
-- gradient 17.3, 14.5. A copy of as many bytes took 3.8 to 4.2 then: shares are 55 to 63 and 48 to 56%
-- (f16's gradient 40), from 39 to 61 and 36 to 54. On two threads, by the clock on the wall, in two runs:
-- bf16 66 to 92% (53 to 88), f16 57 to 84 (46 to 84). What is far (gelu below -4, exp beyond 87) costs less:
-- normal numbers times 3, gelu of bf16 71 ns before, 13 after, its gradient 90 and 16; any bits, exp 52 and
-- 19, gelu 80 and 20; tanh of f16, which has nothing far, 9.4 and 12, because 128 KB leave the first cache.
-- What limits: FP steps have their pipes chosen as they are issued, and start 2.6 in a cycle, not 4; loads
-- from a table 1.7, not 3 (banks). Tried: slopes of f16 by |x|, half the memory (5 to 10% less time, six
-- steps more); exp by vectors alone with blocks asked for far values first (6.6 ns).
-- Rows with AVX2, one thread, the fastest of turns; in brackets before, and the share of the library's copy
-- (3.7 to 4.1 ns for 16 floats; a sum of two arrays into a third has 87 to 93%, which is what two sources
-- allow). Rows of 1024: softmax 5.2 to 5.4 ns (5.5 to 5.8), 70 to 76%, its logarithm 5.3 (6.2), 74,
-- layernorm's backward 6.9 (8.2), 79, rmsnorm's 6.3 (8.4), 87; of 4096: 5.3 (5.8), 79; 5.3 (6.2), 77; 7.5
-- (8.6), 84; 7.0 (8.2), 90. Rows that do not begin on a cache line, of 1000: softmax 6.2 (8.6), 66, log 6.5
-- (8.8), 63, their backwards 7.5 (9.6), 82 and 7.1 (9.9), 86, layernorm 6.3 (8.0), 65, rmsnorm 5.0 (6.8),
-- 83, backwards 9.6 (11.7), 64 and 7.9 (11.1), 78; of 200: softmax 7.1 (10.5), its backward 7.2 (11.2),
-- layernorm 7.6 (11.1), rmsnorm 4.7 (7.6), backwards 9.5 (13.9) and 9.3 (13.2); of 50257: softmax 8.9
-- (12.1), 39, its logarithm 8.7, its backward 9.4 (11.8), 71, layernorm 8.2 (10.1), 54, rmsnorm 7.6 (9.5),
-- 59. Narrow rows, by what a row costs: of 64 softmax 9.0 (10.5), layernorm 10.9 (11.7), rmsnorm 4.7 (5.3),
-- backwards 9.9 (11.2) and 8.8 (10.5). There gcc adds the elements of a row's sums one by one; by halves in
-- registers layernorm's backward takes 10.4 instead of 12.0, and 9.9 in a loop that never stages and asks
-- 12 KB ahead. Layernorm by three rows: of 77 11.5 (14.8), of 128 6.8 (8.1), of 176 6.7 (8.3), of 64 the
-- same. What bounds softmax: 16 steps for 8 floats, 10 of which start in two pipes, 10 cycles a line; it
-- takes 13.4, and 72 a row (4.5 ns in the cache for rows of 1024). Three rows of 50257 and the terms are 800
-- KB, and the second cache has 512: rows of more than 160 KB go one by one, 8.8 instead of 10.7, but of
-- 32000 8.2 instead of 7.6.
-- What is asked for costs: a plain copy takes 3.2 ns a line, 3.7 to 3.9 with anything asked for ahead, a
-- plain sum of two arrays 4.9, 5.2 to 6.4 so, with either cache, any distance, the first lines of pages
-- alone or blocks of 4 KB of one array and then the other; offsets between the arrays (0 to 1 MB) change
-- nothing, and all are in huge pages. 12 KB ahead, two arrays cost the norms' backwards 2 ns a line even of
-- what is in the first cache; 1 KB ahead, into the first, is best there, but not for softmax, whose
-- arithmetic is slow enough: 6.5 for 5.6. Beside PyTorch (its results into arrays that are there, huge
-- pages), one thread, rows of 64 to 50257: before, softmax's backward was slower than it for rows of 77,
-- 250, 1000 and 50257; now for rows of 250 (10.0 and 8.5), which are not staged: of 768 to 1020 bytes that
-- are not a multiple of 32 softmax loses a fifth by that, its backward gains a quarter. The rest takes
-- PyTorch 1.2 to 14 times ours.
-- A Xeon (Sapphire Rapids; AVX-512, 2.8 GHz) copies 16 floats in 5.6 to 6.4 ns; 77% allow 7.3 to 8.3, and
-- arithmetic takes 4.5 to 7 of them in the cache. All that is read is asked for there twice, 4 KB ahead
-- into the second cache and 512 bytes ahead into the first. Share of a copy for 32 halves or 16 floats,
-- one thread, arrays of 512 MB, libraries in turns, 2 KB ahead into the second cache alone and now: f16
-- exp 82, 89, tanh 84, 87, gelu 82, 88, its gradient 85, 91; bf16 exp 80, 90, tanh 83, 95, sigmoid 83, 88,
-- silu 82, 88, gelu 83, 87; f32 exp 89, 108, tanh 85, 101, sigmoid 89, 105, silu 88, 102, gelu 86, 104,
-- its gradient 91, 101. Sigmoid and silu of f16 have a polynomial of degree four in intervals of 1/2
-- instead of an exponential and a division, of which one of 16 floats starts in 10 cycles: 66, 84 and 66,
-- 79 to 82. Silu's gradient of halves is computed in lines of words too: f16 65, 92, bf16 56, 92. Two
-- threads: f16 sigmoid 69, 87, silu 61, 81, f32 86 to 89 before and 100 to 107 now. This section there,
-- arrays of 1 GB: one thread f32 98 to 110, bf16 90 to 110, f16 82 to 117; two threads f16 80 to 111, bf16
-- 91 to 111, but sigmoid 69 in one run (turns 65 to 100). In a bare loop, f16's exp, ns a line by what is
-- asked for: nothing 10.6, 2 KB into the second cache 7.7, 4 KB 7.0, 8 KB 7.2, 1 or 2 KB into the first
-- 7.7, 6.8, 2 KB and 256 bytes 7.5, 4 KB and 512 bytes 6.7; results by blocks of 4 KB 9.9, stored through
-- the caches 9.0 to 10. A Zen 4 has not been asked. Zen 3, 2 KB into the second cache: relu 110 with 2 KB,
-- 103 with 1, 90 with 4; the others the same. Inputs of a gradient that it does not read (f32: x of
-- sigmoid, y of silu) stand for others, so that a strip is one tile: 3 to 5% there. On the Xeon softmax's
-- backwards have 96 and 95 instead of 81 and 89, rmsnorm 109 instead of 103, of rows of 4096 105 (81), of
-- 64 56 (51).
-- Narrow rows there, with AVX-512 (and before ends of rows by masks and sums by halves): of 64 softmax 11.5
-- (13.0), layernorm 8.9 (22.6), rmsnorm 6.1 (15.2), backwards 16.6 (23.4) and 14.3 (15.5); of 77 softmax
-- 30.6 (41.7), its logarithm 31.8 (43.9), backwards 17.7 (24.2) and 19.1 (24.1), layernorm 13.6 (22.7). Of
-- 77 PyTorch's softmax and its logarithm are still faster: 24.7 and 23.9 beside 29.2 and 30.5 (AVX2 takes
-- 15.0 and 15.9 there: with AVX-512 the missing end of a row had subnormal terms, since mended in exps.h and
-- not measured there again); of the backwards and the other widths
-- from 64 to 50257 none by more than 2%. Rows of 50257 one by one: softmax 9.7 (13.7), its logarithm 9.4
-- (12.9); of 50256, which are whole cache lines, 9.0 either way.
-- Rows of 1000 there, with AVX-512 (and before): softmax 8.8 ns (14.0), 69% of a copy, its logarithm 9.1
-- (11.1), backwards 11.7 (13.9) and 11.1 (14.2), layernorm 8.0 (10.2), rmsnorm 7.1 (10.5), backwards 11.8
-- (15.6) and 11.2 (15.8); of 50257: layernorm 11.0 (16.8), softmax 15.1 (15.0), its backward 13.0 (16.8);
-- of 1024 and 4096 75 to 107%, as before; held to AVX2, softmax of 1024 101 (95), of 1000 82 (56).
-- Reading alone. 6.3 to 7 cycles a line whatever is asked for ahead, where 77% of a copy allow 6.8: the
-- maximum over rows is there. A sum converts to double, 5 cycles for 16 floats, a variance 9, a log-sum-exp
-- takes 10; over columns sums are loaded and stored as well.
-- Passes. Columns of 32768 rows and more do not stay in a core's caches between the sums of a softmax and its
-- results, in pieces wide enough to come in order, so that inputs have to be read twice, and are counted so:
-- three passes in the forwards, five in softmax's backward, four in that of its logarithm. Two threads share
-- rows since each read half of every page when they shared columns; share of a copy on a Zen 3, [65536,
-- 1024], libraries in turns: softmax 70 (44), its backward 79 (48), the logarithm 65 (51), its backward 75
-- (46), where turns differ by 15%; one thread within these. Log-sum-exp finds the next maximum beside the
-- sum at hand: no difference there (columns 33 to 39, rows 48 to 57), nor do columns of sums, maxima and
-- variances by four rows at a time make one (56, 61, 48, by one row 60, 58, 53). Backwards of norms take 11
-- cycles for a line each of x, g and dx, 5 of them for dgamma and dbeta in the cache; rows wider than 1024
-- leave the first cache, and from memory all overlap to 19.
--
-- Tried, not kept: sin and cos in float after a reduction in double (64 -> 52, and 0.9 ulp); tanh by 16
-- polynomials in intervals that grow (12.5 -> 10.9 by its addition theorem); norms' backwards by two or four
-- rows at once, to load and store dgamma less often (rows a power of two apart push each other out of the
-- cache: 0.8x of four; the two rows at hand are added at once instead); asking for rows ahead in sums and
-- maxima (0.7x on Zen 4; an Intel processor needs it), and into the first cache anywhere (softmax 1.4x the
-- time; into the second, 8 to 16 KB ahead, is right; relu gains 0.7 cycles from 2 KB ahead into the first,
-- silu and gelu lose 0.3; all this on Zen 4, but maps with AVX-512 do ask so now, for the Xeon above); two
-- rows at once of columns' sums (10 cycles a line, not 7); rows of a softmax over columns fetched three
-- ahead (4% at most).

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
    for again, name in ipairs { "log_softmax", "softmax" } do -- over columns g, or y and g, twice (and x)
      local columns = dim == 1
      row(b, name .. along, name, d, (columns and 3 or 2) * bytes, function() return lac[name](x, dim) end)
      row(b, name .. along .. ", bwd", name .. "_backward", d, (columns and 3 + again or 3) * bytes,
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
