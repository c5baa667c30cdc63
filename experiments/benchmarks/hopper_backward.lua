--- hopper_backward.lua: the backward of attention on Hopper, and by the portable kernels, beside PyTorch's
-- cuDNN and FlashAttention-2.
--
-- 32768 kept rows in all, heads times head_dim 2048, bf16; all passes of the backward are counted, and the
-- faster one of the peers. The peers' inputs are gathered and contiguous. A turn is some idle time, one call
-- that is not timed, and one that is: several backwards in a row. The four sides take turns in a new order
-- each round, because the order alone moves results by several percent; times are medians over the rounds.
-- Beside it all rows "sustained", as in hopper.lua.
-- kernels/HOPPER_BACKWARD.md has the record: floors, expectations, what was tried.

local lac = require "lacuna"
local device = require "lacuna.device"

local ROWS, WIDTH = 32768, 2048

local function heads_of(head_dim) return math.floor(WIDTH / head_dim) end

-- backwards of one call
local function repeats(o) return o.rows > 8192 and 1 or 5 end

-- dilation: as many branches, one an offset, so that every row is kept by one of them
local function ours(o)
  local r = o.dilation or 1
  local n, heads = o.segments * o.rows, heads_of(o.head_dim)
  local segments, dilations = {}, {}
  for i = 1, r do segments[i], dilations[i] = o.rows * r, r end
  local options = { dtype = "bf16", device = "cuda", grad = true }
  local inputs = {}
  for i = 1, 3 do inputs[i] = lac.randn({ 1, n, heads, o.head_dim }, options) end
  local out = lac.attend(inputs[1], inputs[2], inputs[3], { segments = segments, dilations = dilations,
    offset = "branch", causal = o.causal, kernel = o.kernel, return_lse = false })
  local g = lac.randn(out:size(), { dtype = "bf16", device = "cuda" })
  local how = { grad_outputs = { g }, retain_graph = true }
  local function body()
    for _ = 1, repeats(o) do lac.grad(out, inputs, how) end
    lac.synchronize()
  end
  return function() lac.scope(body) end
end

local PORTABLE = 0.9 -- of FlashAttention-2

local function against_peers(b, o, what, target)
  local sides, dropped = {}, {}
  for i, kernel in ipairs{ "auto", "portable" } do
    o.kernel = kernel
    sides[i] = ours(o)
  end
  for _, backend in ipairs{ "cudnn", "flash" } do
    local side, problem = b:case("hopper_backward", "backward", { segments = o.segments, rows = o.rows,
      heads = heads_of(o.head_dim), head_dim = o.head_dim, causal = o.causal or false, backend = backend,
      times = repeats(o) })
    if not side then return b:value{ what = what, problem = problem } end
    dropped[#dropped + 1] = side
    sides[#sides + 1] = side
  end
  local width = heads_of(o.head_dim) * o.head_dim
  local flops = 10 * o.rows ^ 2 * width * o.segments / (o.causal and 2 or 1) * repeats(o)
  for _, pace in ipairs(b:paces(sides)) do
    local t, as = pace.times, what .. pace.name
    local function speed(side) return flops / t[side] / 1e12 end
    b:value{ what = ("%s: %.0f TFLOP/s, cuDNN %.0f, FA2 %.0f"):format(as, speed(1), speed(3), speed(4)),
      value = math.min(t[3], t[4]) / t[1], unit = "x", at_least = target }
    b:value{ what = ("%s: portable %.0f TFLOP/s, FA2 %.0f"):format(as, speed(2), speed(4)),
      value = t[4] / t[2], unit = "x", at_least = PORTABLE }
  end
  for _, side in ipairs(dropped) do side:drop() end
end

local TARGET = { [64] = { 1.2, 1.27 }, [128] = { 1.05, 1.05 } }

local function rows(b)
  local function row(head_dim, n, causal)
    lac.scope(function()
      against_peers(b, { rows = n, segments = b:size(ROWS / n, 1), head_dim = head_dim, causal = causal },
        ("D %d, %d rows%s"):format(head_dim, n, causal and ", causal" or ""),
        TARGET[head_dim] and TARGET[head_dim][causal and 2 or 1])
    end)
  end
  for _, causal in ipairs{ false, true } do
    for _, head_dim in ipairs{ 64, 128 } do
      for _, n in ipairs(b:size({ 1024, 2048, 8192, 32768 }, { 1024 })) do row(head_dim, n, causal) end
    end
    for _, head_dim in ipairs(b:size({ 16, 32, 80, 96 }, { 32 })) do -- padded to 64 and 128
      row(head_dim, b:size(4096, 1024), causal)
    end
  end
end

local function dilations(b)
  for _, head_dim in ipairs{ 64, 128 } do
    for _, causal in ipairs{ false, true } do
      local function side(r)
        return ours{ rows = 2048, segments = b:size(16, 2), head_dim = head_dim, causal = causal,
          dilation = r }
      end
      lac.scope(function()
        local list = b:size({ 1, 2, 4, 8, 16 }, { 1, 2 })
        local sides = {}
        for i, r in ipairs(list) do sides[i] = side(r) end
        for _, pace in ipairs(b:paces(sides)) do
          local t = pace.times
          for i = 2, #list do
            b:value{ what = ("D %d%s%s, time at r = %d against r = 1, all rows kept"):format(head_dim,
              causal and " causal" or "", pace.name, list[i]), value = t[i] / t[1], unit = "x",
              at_most = 1.02 }
          end
        end
      end)
    end
  end
end

return {
  name = "hopper_backward",
  device = "cuda",
  about = "attention's backward on Hopper, and portable: cuDNN and FlashAttention-2, dilation",
  once = true,
  run = function(b)
    if not pcall(device.supports, "cuda", "attend_bwd") then -- it throws where there is no device
      return b:value{ what = "attention's backward on Hopper", problem = "no CUDA device" }
    end
    rows(b)
    dilations(b)
  end,
}
