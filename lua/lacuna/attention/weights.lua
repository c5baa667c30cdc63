--- Attention weights for small cases (need_weights): the matrix that multiplies V.
--
-- Attention is linear in V, so its weights are its output for V = identity, D columns at a time. That is
-- exact for every variant, merge, mask and dropout draw, with gradients, because it is the computation
-- itself; nothing about branches or masks is repeated here. It costs M / D further calls and B H N M numbers,
-- which is why long sequences are refused. Rejected: softmax of scores in Lua, a second definition of every
-- variant.

local schema = require "lacuna.schema"
local create = require "lacuna.create"
local ops = require "lacuna.ops"

local fn = ops.fn
local MOST = 2 ^ 27 -- weights; 512 MiB of f32

--- @tparam function run takes a value tensor like v, returns the output for it
-- @tparam Tensor q [B, N, H, D] @tparam Tensor v [B, M, Hk, D]
-- @treturn Tensor [B, H, N, M]
return function(run, q, v)
  local B, N, H, M, Hk, D = q:size(1), q:size(2), q:size(3), v:size(2), v:size(3), v:size(4)
  if B * H * N * M > MOST then
    schema.fail("attention", "need_weights would make %d x %d x %d x %d numbers: it is for small cases",
                B, H, N, M)
  end
  local identity = create.eye(M, { dtype = v:dtype(), device = v:device() })
  local parts = {}
  for first = 1, M, D do
    local width = math.min(D, M - first + 1)
    local columns = identity:narrow(2, first, width)
    if width < D then columns = fn.cat({ columns, create.zeros({ M, D - width }, { dtype = v:dtype(),
      device = v:device() }) }, 2) end
    parts[#parts + 1] = run(columns:reshape(1, M, 1, D):expand(B, M, Hk, D)):narrow(4, 1, width)
  end
  return fn.cat(parts, 4):transpose(2, 3)
end
