--- hopper.lua: the forward of attention on Hopper beside PyTorch's cuDNN and FlashAttention-2.
--
-- 32768 kept rows in all, heads times head_dim 2048, bf16. The peers' inputs are gathered and contiguous; the
-- faster one counts. A turn is some idle time, one call that is not timed, and one that is: several forwards
-- in a row. The sides take turns in a new order each round, because the order alone moves results by several
-- percent; times are medians over the rounds. Then all rows once more, "sustained": a turn is a quarter of a
-- second of calls without a pause, of which the second half counts, at the clock that power allows by then
-- (Run:paces of bench.lua). The portable kernel is a side as well, and in rows of their own fp8 beside bf16.
-- Dilation is measured at equal rows, kept and written, and several branches in one launch against the sum of
-- their own times.
-- kernels/HOPPER.md has the record: floors, expectations, what was tried.

local lac = require "lacuna"
local device = require "lacuna.device"

local ROWS, WIDTH = 32768, 2048

local PORTABLE = 0.9 -- of FlashAttention-2

local function heads_of(head_dim) return math.floor(WIDTH / head_dim) end

-- a call: `times` forwards in a row and a wait
local function forwards(o, times)
  local x, shape = {}, { o.batch or 1, o.n, heads_of(o.head_dim), o.head_dim }
  for i = 1, 3 do x[i] = lac.randn(shape, { dtype = "bf16", device = "cuda" }) end
  local options = { segments = o.segments, dilations = o.dilations, offset = o.offset or "mod",
    causal = o.causal, kernel = o.kernel or "hopper", fp8 = o.fp8 }
  local function body()
    for _ = 1, times do lac.attend(x[1], x[2], x[3], options) end
    lac.synchronize()
  end
  return function() lac.no_grad(lac.scope, body) end
end

-- ours: two sides, the first of which counts
local function against_peers(b, n, head_dim, causal, ours, target)
  local what = ("D %d, %d rows%s"):format(head_dim, n, causal and ", causal" or "")
  local count, times, sides, dropped = b:size(ROWS / n, 1), n > 8192 and 1 or 5, {}, {}
  for i, side in ipairs(ours) do
    sides[i] = forwards({ n = count * n, segments = { n }, dilations = { 1 }, head_dim = head_dim,
      causal = causal, kernel = side.kernel, fp8 = side.fp8 }, times)
  end
  for _, backend in ipairs{ "cudnn", "flash" } do
    local side, problem = b:case("hopper", "forward", { segments = count, rows = n,
      heads = heads_of(head_dim), head_dim = head_dim, causal = causal, backend = backend, times = times })
    if not side then return b:value{ what = what, problem = problem } end
    dropped[#dropped + 1] = side
    sides[#sides + 1] = side
  end
  local work = 4 * n ^ 2 * heads_of(head_dim) * head_dim * count / (causal and 2 or 1) * times / 1e12
  for _, pace in ipairs(b:paces(sides)) do
    local t = pace.times
    local rates = ("%s%s: %s%.0f TFLOP/s, %s %.0f, cuDNN %.0f, FA2 %.0f"):format(what, pace.name,
      ours[1].name, work / t[1], ours[2].name, work / t[2], work / t[3], work / t[4])
    b:value{ what = rates, value = math.min(t[3], t[4]) / t[1], unit = "x", at_least = target }
    if ours[2].kernel == "portable" and target then
      b:value{ what = "  portable, of FA2", value = t[4] / t[2], unit = "x", at_least = PORTABLE }
    end
  end
  for _, side in ipairs(dropped) do side:drop() end
end

-- at 1024 rows, and from 2048 on
local TARGET = { [64] = { 1.1, 1.2 }, [128] = { 1.05, 1.12 }, [256] = {} }

local BF16 = { { name = "", kernel = "hopper" }, { name = "portable", kernel = "portable" } }
local FP8 = { { name = "fp8 ", kernel = "hopper", fp8 = true }, { name = "bf16", kernel = "hopper" } }

local function rows(b)
  for _, head_dim in ipairs{ 64, 128, 256 } do
    for _, causal in ipairs{ false, true } do
      for _, n in ipairs(b:size({ 1024, 2048, 4096, 8192, 32768 }, { 1024 })) do
        lac.scope(against_peers, b, n, head_dim, causal, BF16, TARGET[head_dim][n > 1024 and 2 or 1])
      end
    end
  end
  for _, head_dim in ipairs(b:size({ 32, 80, 96, 160, 192 }, { 32 })) do -- padded to 64, 128 and 256
    for _, causal in ipairs{ false, true } do
      lac.scope(against_peers, b, b:size(4096, 1024), head_dim, causal, BF16)
    end
  end
end

local function eight_bits(b)
  for _, head_dim in ipairs{ 64, 128 } do
    for _, causal in ipairs{ false, true } do
      for _, n in ipairs(b:size({ 1024, 4096, 32768 }, { 1024 })) do
        lac.scope(against_peers, b, n, head_dim, causal, FP8)
      end
    end
  end
end

local function branches(n, w, r, count)
  local o = { n = n, segments = {}, dilations = {} }
  for i = 1, count do o.segments[i], o.dilations[i] = w, r end
  return o
end

-- Rows of r branches that lie r apart, one branch an offset, against as many neighbouring rows of one: as
-- many rows, keys and results. And one branch at r in r times the tokens, of which all others become zeros.
local function dilated(b, head_dim, causal)
  local list, sides = b:size({ 2, 4, 8, 16 }, { 2 }), {}
  local n = b:size(16, 1) * 2048
  local function side(o)
    o.head_dim, o.causal = head_dim, causal
    sides[#sides + 1] = forwards(o, 3)
  end
  side(branches(n, 2048, 1, 1))
  for _, r in ipairs(list) do
    local o = branches(math.max(n, 2048 * r), 2048 * r, r, r)
    o.offset = "branch"
    side(o)
  end
  for _, r in ipairs(list) do side(branches(n * r, 2048 * r, r, 1)) end
  for _, pace in ipairs(b:paces(sides)) do
    local t = pace.times
    local what = ("D %d%s%s, "):format(head_dim, causal and " causal" or "", pace.name)
    for i, r in ipairs(list) do
      b:value{ what = what .. ("time at r = %d against r = 1, all rows kept"):format(r),
        value = t[i + 1] / t[1], unit = "x", at_most = 1.02 }
    end
    for i, r in ipairs(list) do
      b:value{ what = what .. ("time at r = %d against r = 1, with %.1f GB of zeros"):format(r,
        n * (r - 1) * WIDTH * 2 / 1e9), value = t[#list + i + 1] / t[1], unit = "x" }
    end
  end
end

-- All branches in one launch against the sum of what their tiles take: a branch alone, eight times, so that
-- the ends of launches are lost in it.
local function together(b, n, causal)
  local segments, dilations, many = { 2048, 4096, 8192, 16384, 32768 }, { 1, 2, 4, 6, 12 }, b:size(8, 1)
  local o = { n = b:size(n, 2048), head_dim = 64, causal = causal }
  local function side(s, r, batch)
    o.segments, o.dilations, o.batch = s, r, batch
    return forwards(o, 24 / batch)
  end
  local sides = { side(segments, dilations, 1) }
  for i = 1, #segments do sides[i + 1] = side({ segments[i] }, { dilations[i] }, many) end
  for _, pace in ipairs(b:paces(sides)) do
    local sum = 0
    for i = 2, #sides do sum = sum + pace.times[i] end
    b:value{ what = ("D 64%s, %d positions%s, five branches: sum of the branches' tiles / together"):format(
      causal and " causal" or "", o.n, pace.name), value = sum / pace.times[1], unit = "x", at_least = 0.93 }
  end
end

return {
  name = "hopper",
  about = "attention's forward on Hopper: cuDNN and FlashAttention-2, dilation, several branches",
  device = "cuda",
  once = true,
  run = function(b)
    if not pcall(device.supports, "cuda", "attend") then -- it throws where there is no device
      return b:value{ what = "attention's forward on Hopper", problem = "no CUDA device" }
    end
    rows(b)
    eight_bits(b)
    for _, head_dim in ipairs{ 64, 128 } do
      for _, causal in ipairs{ false, true } do lac.scope(dilated, b, head_dim, causal) end
    end
    for _, causal in ipairs{ false, true } do lac.scope(together, b, 32768, causal) end
  end,
}
