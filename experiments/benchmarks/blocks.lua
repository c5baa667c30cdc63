--- blocks.lua: does attention in a tenth of the blocks cost a tenth of dense attention?
--
-- The pattern is a random tenth of the blocks, the diagonal among them: no two rows of blocks are alike, the
-- worst case for whoever packs keys. A row is our time over density x the time of dense attention, where
-- density is the share of the blocks that causality leaves, as everywhere; the target is 1.3, forward and
-- backward, for blocks of 128. Smaller blocks are shown beside it: each key that is packed serves so many
-- fewer queries.
--
-- On the CPU by multiply-adds (LACUNA_CPU=avx512), one thread of an EPYC (Zen 4), the fastest by processor
-- time of 16 calls of ours and 4 of dense, two runs, forward and backward: blocks of 128 D 64 1.11 to 1.12
-- and 1.10 to 1.11, D 128 1.12 to 1.17 and 1.17; causal, once, 0.91 and 0.96, 1.07 and 1.05. In the same runs
-- tasks of the backward with 1024 keys: D 64 1.14, D 128 1.18 to 1.20; 4096 keys are as good as 2048. Three
-- quarters of the time of blocks are products, which take what density x those of dense do; the rest is what
-- rows of queries, gradients and values cost to fetch. To ask for rows of queries and for values while
-- products run brought less than what runs differ by. On a busy machine a pair varies by a tenth and more.
--
-- With the matrix unit (one core of a shared Xeon, f32, the fastest of 24 calls of ours and 6 of dense in
-- turns, three rounds; a round in which dense ran at half its speed left out) against dense attention on the
-- unit, the form before in the same rounds in brackets, blocks of 128. Forward: D 64 1.10 to 1.22 (1.28 to
-- 1.33), causal 1.19 to 1.21 (1.36); D 128 1.18 to 1.23 (1.24 to 1.36), causal 1.21 to 1.24 (1.35 to 1.49);
-- two earlier rounds, 1.24 to 1.29, 1.27 to 1.30, 1.24 to 1.27, 1.26 to 1.27. Backward: D 64 1.25, causal
-- 1.14 to 1.21; D 128 1.10 to 1.22, causal 1.28 to 1.32, before 1.19 to 1.30. Three later rounds: D 64 1.15
-- to 1.38, causal 1.21, D 128 1.29 to 1.35, causal 1.18 to 1.26. bf16, rounds at full speed, before bf16 was
-- packed by moving words in brackets: forward D 64 1.11 to 1.19 (1.25), causal 1.33 (1.33 to 1.38), D 128
-- 1.29 (1.41), causal 1.28 to 1.30 (1.43); with steps at fixed places (see below) 1.09 to 1.23, 1.19 to
-- 1.21, 1.17 to 1.27, 1.19 to 1.28. Backward D 64 1.23 to 1.42 (1.50 to 1.55), causal 1.44 (1.54 to 1.65), D
-- 128 1.43 to 1.52 (1.53), causal 1.60 to 1.67 (1.72): missed; rows, keys and sums take half of its time (D
-- 128, causal), most of it packing. Where the forward's time goes and what was tried says
-- c/cpu/attn_parts_blocks.inc. Memory of rows of blocks that is used again took 4% off the forward, 9% where
-- D 128 is causal; 4096 rows a task instead of 2048 2 to 9%; maxima of 16 rows at once 1 to 2%, and 0 to 5%
-- off dense. Of the backward (f32) no gain: dk and dv of a tile added to the results a pair, so that no task
-- holds them; tiles of 64 keys; tiles of 128 rows; the next keys asked for between P and dS, the next rows,
-- or dk and dv, while others are packed. Steps of the unit at fixed places between the rows of the softmax,
-- in dense attention too: no gain in one round, both up to 15% faster in two, ratios about the same: left
-- out. Time of multiply-adds over the unit's, with the form before: D 64 1.09 and 1.09, D 128 1.20 and 1.23,
-- bf16 D 64 1.25 and 1.39; blocks of 64 0.86 to 0.97, of 32 0.73 to 0.86: so blocks of fewer than 128 rows
-- stay with multiply-adds. Neighbours slow the unit alone, then all of these are worse. In a third job,
-- medians of four rounds, slow ones among them, before and after bf16's packing: backward f32 D 64 1.16 and
-- 1.25, causal 1.24 and 1.24, D 128 1.25 and 1.29, causal 1.18 and 1.22; with lines asked for ahead of
-- writing them, as it is now, the fastest calls took 0 to 6% less. This benchmark, f32, two runs at the end:
-- forward 1.00 to 1.20, backward D 64 1.31 and 1.38, causal 1.23 and 1.24, D 128 1.20 and 1.30, causal 1.16
-- and 1.23: the backward is at the edge. With LACUNA_CPU=avx512 see above.
--
-- On CUDA both sides are the portable kernels' in bf16. An H200, one run, seven rounds in turns, blocks of
-- 128, forward and backward, then causal, before in brackets: D 64 1.19 and 1.12, 1.26 and 1.20 (1.23 and
-- 1.14, 1.31 and 1.25); D 128 1.15 and 1.21, 1.26 and 1.25 (1.18 and 1.24, 1.31 and 1.31). With all blocks
-- active it is 0.98 to 1.11; the rest is what a tile costs before its first step and behind its last, which
-- was shortened (a model of the multiprocessors with 14 us of that for a tile gives what was before), and the
-- last tiles of a launch. Causal launches begin with the heavier halves of all tiles since: in turns with the
-- order before, after 20 ms of idling, D 64 1.34 and 1.19 (1.35 and 1.21), D 128 1.25 and 1.21 (1.30 and
-- 1.24). Not measured since: blocks of 64, D 64 1.33 and 1.19, 1.42 and 1.33; D 128 1.46 and
-- 1.36, 1.66 and 1.48; with 16384 rows of 16 heads and half of the blocks a tile 1.3 to 1.7. Before runs of
-- blocks were listed some hundred steps ahead: blocks of 128 1.45 to 1.8, of 64 1.7 to 3.2.
-- When dense attention's backward came to take one pass, two passes of active blocks were at 1.47 and causal
-- 1.52 (D 64, blocks of 128; of 64 1.51 and 1.59). Blocks of 128 and more take one pass too since, another
-- run, four rounds, backward: D 64 1.16, causal 1.28; D 128 1.18, causal 1.29.
-- All of it in one later run, this benchmark, forward and backward, then causal: blocks of 128 D 64 1.20 and
-- 1.15, 1.21 and 1.23, D 128 1.14 and 1.15, 1.18 and 1.24; of 64 1.20 and 1.50, 1.25 and 1.56, 1.38 and 1.46,
-- 1.46 and 1.50; of 32 1.56 and 1.86, 1.61 and 1.96, 1.81 and 1.77, 1.87 and 1.82.
-- Blocks of 16 and of 32 have tiles of as many rows (kernels/attn_pairs_forward.cu has the floor, 3.2 and
-- 1.6 for the forward, D 64), which were of 64 before. One run, the faster of two rounds, forward and
-- backward, then causal, before in brackets: blocks of 16 D 64 2.64 and 3.12, 2.67 and 3.14 (18.6 and 16.1,
-- 18.5 and not run), D 128 3.04 and 2.61, 3.12 and 2.63 (10.8 and 13.4); blocks of 32 D 64 1.57 and 1.85,
-- 1.63 and not run (4.84 and 3.91, 4.84), D 128 1.78 and 1.75, 1.86 and 1.81 (2.71 and 3.92). Sizes between
-- pay for the next tile: blocks of 48 2.43 and 2.80, 2.49 and 2.53; of 24, D 128, 3.61 and 3.46. f32, 16384
-- rows, width 1024, one round: blocks of 16 2.8 and 2.2, 3.6 and 3.0 (D 128); of 32 1.7 and 1.4, 2.1 and 1.9;
-- of 64, whose tiles are dense attention's, 2.0 and 1.1, 1.6 and 1.1.

local lac = require "lacuna"
local masks = require "lacuna.attention.masks"

local DENSITY = 0.1
local CPU = { n = 4096, heads = 2, head_dims = { 64, 128 } }
local CUDA = { n = 32768, width = 2048, head_dims = { 64, 128 }, dtype = "bf16", kernel = "portable" }
local QUICK = { n = 512, heads = 2, head_dims = { 64 } }

-- a call without and with blocks; o: sizes; grad: of the backward alone
local function sides(o, head_dim, block, causal, grad)
  local n, heads = o.n, o.heads or o.width / head_dim
  local function random() return lac.randn{ 1, n, heads, head_dim, grad = grad, dtype = o.dtype } end
  local q, k, v = random(), random(), random()
  local z = { n = n, heads = heads, block = block, causal = causal }
  local pattern = masks.random(DENSITY, 1)
  local function options(more)
    more.segments, more.dilations, more.causal = { n }, { 1 }, causal
    more.return_lse, more.kernel = false, o.kernel
    return more
  end
  local blocks = pattern:tensor(z):to{ device = q:device() }
  local dense, sparse = options{}, options{ block = block, block_mask = blocks }
  local function side(call)
    if not grad then return function() return lac.attend(q, k, v, call) end end
    local out = lac.attend(q, k, v, call)
    local go = { grad_outputs = { lac.randn{ 1, n, heads, head_dim, dtype = o.dtype } }, retain_graph = true }
    return function() return lac.grad(out, { q, k, v }, go) end
  end
  return side(sparse), side(dense), pattern:statistics(z).density
end

return {
  name = "blocks",
  about = "attention in a tenth of the blocks against dense attention, by density",
  device = "any",
  run = function(b)
    local o = b:size(lac.default_device():find "^cuda" and CUDA or CPU, QUICK)
    local function row(head_dim, block, causal, grad)
      local ours, dense, density = sides(o, head_dim, block, causal, grad)
      b:row{ what = ("%s, D %d, blocks of %d%s"):format(grad and "backward" or "forward", head_dim, block,
        causal and ", causal" or ""), ours = ours, floor = dense, against = "dense", as = "time",
        work = density, other_work = 1, unit = "calls/s",
        at_most = block == 128 and 1.3 or nil }
    end
    for _, block in ipairs(b:size({ 128, 64, 32, 16 }, { 128 })) do -- those with a target first
      for _, head_dim in ipairs(o.head_dims) do
        for _, causal in ipairs{ false, true } do
          row(head_dim, block, causal, false)
          row(head_dim, block, causal, true)
        end
      end
    end
  end,
}
