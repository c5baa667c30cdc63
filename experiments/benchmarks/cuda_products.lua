--- cuda_products.lua: the matrix products of LongNet-125M on a GPU, beside PyTorch's.
--
-- 32,768 positions times every weight of the model (four projections, fused q, k and v, both feed-forward
-- matrices, the tied output), forward and towards input and weight, in bf16 and in f32 with TF32. Both sides
-- call cuBLAS; what is compared is the choice of algorithm and what happens around it. Then the feed-forward
-- layer as a whole, with and without its norm, where biases and gelu_tanh are part of the products here, and
-- their gradients and the hidden layer once more are one pass; the work counted is the products' alone.

local lac = require "lacuna"

local SHAPES = { { 768, 768 }, { 768, 2304 }, { 768, 3072 }, { 3072, 768 }, { 768, 50304 } }

local function product(kind, x, w, g)
  if kind == "forward" then return function() return x:matmul(w:transpose(1, 2)) end end
  if kind == "towards_input" then return function() return g:matmul(w) end end
  return function() return g:transpose(1, 2):matmul(x) end
end

local function feed_forward(b, activation, norm, gradient)
  local rows, width, hidden = b:size(32768, 16), b:size(768, 8), b:size(3072, 16)
  local sizes = { { rows, width }, { hidden, width }, { hidden }, { width, hidden }, { width } }
  if norm then sizes[6], sizes[7] = { hidden }, { hidden } end
  local list = {}
  for i, s in ipairs(sizes) do list[i] = lac.randn(s, { dtype = "bf16", grad = gradient }) end
  local g = { grad_outputs = { lac.randn(sizes[1], { dtype = "bf16" }) } }
  local o = { activation = activation, norm = norm, gamma = list[6], beta = list[7] }
  local function run() return lac.feed_forward(list[1], list[2], list[3], list[4], list[5], o) end
  local what = "feed-forward, " .. activation .. (norm and ", norm" or "") .. (gradient and ", both" or "")
  b:row{ what = what,
    ours = gradient and function() return lac.grad(run(), list, g) end or run,
    work = (gradient and 12 or 4) * rows * width * hidden, unit = "FLOP/s", at_least = 1,
    peer = { script = "large", case = "feed_forward", arguments = { rows = rows, width = width,
      hidden = hidden, activation = activation, norm = norm, gradient = gradient } } }
end

return {
  name = "cuda_products",
  about = "matrix products of LongNet-125M's shapes beside PyTorch's",
  device = "cuda",
  once = true,
  run = function(b)
    local before = lac.use_tf32()
    lac.use_tf32(true)
    local m = b:size(32768, 16)
    for _, dtype in ipairs{ "bf16", "f32" } do
      for _, shape in ipairs(b:size(SHAPES, { { 16, 24 } })) do
        local k, n = shape[1], shape[2]
        for _, kind in ipairs{ "forward", "towards_input", "towards_weight" } do
          lac.scope(function()
            local x, w = lac.randn{ m, k, dtype = dtype }, lac.randn{ n, k, dtype = dtype }
            local g = lac.randn{ m, n, dtype = dtype }
            b:row{ what = ("%d x %d x %d, %s, %s"):format(m, k, n, kind, dtype == "f32" and "tf32" or dtype),
              ours = product(kind, x, w, g), work = 2 * m * n * k, unit = "FLOP/s", at_least = 0.97,
              peer = { script = "large", case = "product",
                arguments = { m = m, n = n, k = k, kind = kind, dtype = dtype } } }
          end)
        end
      end
    end
    for _, norm in ipairs{ false, true } do
      for _, gradient in ipairs{ false, true } do
        lac.scope(feed_forward, b, norm and "gelu" or "gelu_tanh", norm, gradient)
      end
    end
    lac.use_tf32(before)
  end,
}
