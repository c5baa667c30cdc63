--- cuda_products.lua: the matrix products of LongNet-125M on a GPU, beside PyTorch's.
--
-- 32,768 positions times every weight of the model (four projections, fused q, k and v, both feed-forward
-- matrices, the tied output), forward and towards input and weight, in bf16 and in f32 with TF32. Both sides
-- call cuBLAS; what is compared is the choice of algorithm and what happens around it.

local lac = require "lacuna"

local SHAPES = { { 768, 768 }, { 768, 2304 }, { 768, 3072 }, { 3072, 768 }, { 768, 50304 } }

local function product(kind, x, w, g)
  if kind == "forward" then return function() return x:matmul(w:transpose(1, 2)) end end
  if kind == "towards_input" then return function() return g:matmul(w) end end
  return function() return g:transpose(1, 2):matmul(x) end
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
    lac.use_tf32(before)
  end,
}
