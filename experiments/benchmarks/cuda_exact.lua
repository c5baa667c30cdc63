--- cuda_exact.lua: attention in f32 on a GPU beside PyTorch's memory-efficient kernel.
--
-- 8,192 kept rows, heads times head_dim 1,024; f32 in three parts of bf16 (as exact as f32) and tf32, both
-- on the tensor cores (lac.use_tf32). The peer has one kernel for f32, which stands beside both of ours;
-- its speed is beyond multiply-adds, so its products are probably several of tf32 each, which we have not
-- looked up. Its inputs are gathered and contiguous. Sides take turns as in hopper.lua; times are medians
-- over the rounds, forward and backward apart.
--
-- On one H200 tf32 ran 1.35 to 3.25 times as fast as it, f32 by multiply-adds, which it once was, at 0.50 to
-- 0.83 of its speed: 15 to 28 TFLOP/s. In parts by warpgroups (kernels/attn_hopper_parts.cuh), TFLOP/s, ours
-- and the peer's in one run, forward from one and backward from a later one:
--
--                     1024 rows               8192 rows               causal, 1024 and 8192 rows
--     D = 64          79.4, 32.5 (2.45)       95.5, 34.1 (2.80)       61.4, 25.9 (2.37)   85.6, 29.6 (2.89)
--       backward      61.0, 32.7 (1.87)       73.1, 34.7 (2.11)       47.9, 26.5 (1.81)   67.6, 32.0 (2.11)
--     D = 128         82.3, 41.7 (1.97)       102.2, 44.0 (2.32)      60.9, 33.9 (1.80)   83.1, 39.9 (2.08)
--       backward      46.7, 34.3 (1.36)       54.0, 36.6 (1.47)       37.3, 25.4 (1.47)   53.7, 34.4 (1.56)
--
-- The portable kernels, which run on other devices and with options of pairs, reached line by line 54.8,
-- 58.7, 39.2, 48.4; 36.3, 38.6, 29.5, 36.1; 54.0, 57.2, 38.5, 48.0; 30.5, 33.5, 24.6, 33.8.

local lac = require "lacuna"
local bench = require "lacuna.bench"

local ROUNDS, IDLE, TIMES = 7, 0.02, 3
local ROWS, WIDTH, TARGET = 8192, 1024, 1.3

local function drawn(o, grad)
  local x, shape = {}, { 1, o.segments * o.rows, WIDTH / o.head_dim, o.head_dim }
  for i = 1, 3 do x[i] = lac.randn(shape, { device = "cuda", grad = grad }) end
  return x, { segments = { o.rows }, dilations = { 1 }, causal = o.causal, return_lse = false }
end

local OURS = {}

function OURS.forward(o)
  local x, options = drawn(o, false)
  return function() return lac.attend(x[1], x[2], x[3], options) end
end

function OURS.backward(o)
  local x, options = drawn(o, true)
  local out = lac.attend(x[1], x[2], x[3], options)
  local how = { grad_outputs = { lac.randn(out:size(), { device = "cuda" }) }, retain_graph = true }
  return function() return lac.grad(out, x, how) end
end

-- `TIMES` calls in a row and a wait, in tf32 or not
local function side(fn, tf32)
  local function body()
    for _ = 1, TIMES do fn() end
    lac.synchronize()
  end
  return function()
    lac.use_tf32(tf32)
    local seconds = bench.warm(function() lac.scope(body) end)
    lac.use_tf32(false)
    return seconds
  end
end

local function compare(b, kind, o)
  local what = ("%s, D %d, %d rows%s"):format(kind, o.head_dim, o.rows, o.causal and ", causal" or "")
  local peer, problem = b:case(kind == "forward" and "hopper" or "hopper_backward", kind, {
    segments = o.segments, rows = o.rows, heads = WIDTH / o.head_dim, head_dim = o.head_dim,
    causal = o.causal, backend = "efficient", times = TIMES, dtype = "float32" })
  if not peer then return b:value{ what = what, problem = problem } end
  local fn = OURS[kind](o)
  local t = bench.shuffled({ side(fn, false), side(fn, true), function() return peer:turn(1e-9) end },
    b:size(ROUNDS, 1), IDLE)
  peer:drop()
  local work = (kind == "forward" and 4 or 10) * o.rows ^ 2 * WIDTH * o.segments * TIMES / 1e12
  if o.causal then work = work / 2 end
  for i, name in ipairs{ "f32", "tf32" } do
    b:value{ what = ("%s, %s: %.1f TFLOP/s, PyTorch %.1f"):format(name, what, work / t[i], work / t[3]),
      value = t[3] / t[i], unit = "x", at_least = TARGET }
  end
end

return {
  name = "cuda_exact",
  device = "cuda",
  about = "attention in f32 and tf32 beside PyTorch's memory-efficient attention",
  once = true,
  run = function(b)
    if not pcall(lac.zeros, { 1 }, { device = "cuda" }) then
      return b:value{ what = "attention in f32 on CUDA", problem = "no CUDA device" }
    end
    for _, head_dim in ipairs{ 64, 128 } do
      for _, causal in ipairs{ false, true } do
        for _, rows in ipairs(b:size({ 1024, 8192 }, { 256 })) do
          for _, kind in ipairs{ "forward", "backward" } do
            lac.scope(compare, b, kind, { rows = rows, segments = b:size(ROWS / rows, 1),
              head_dim = head_dim, causal = causal })
          end
        end
      end
    end
  end,
}
