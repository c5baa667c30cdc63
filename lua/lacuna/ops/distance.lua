--- Distances of all pairs of rows.
--
-- The differences x_i - y_j are N M D numbers, and forming them costs what moving them costs. On the CPU
-- Euclidean distances of f32 and half types are made from |x|^2 + |y|^2 - 2 x y in f64 instead, which is one
-- matrix product: its error is some 2^-52 of |x|^2 + |y|^2, nothing beside f32 as long as the distance is not
-- small against the rows. Pairs that are nearer than 2^-10 of them, equal ones among them, are taken one by
-- one and their differences formed: so is whatever is not finite. Rejected: products in f32, which lose half
-- of the digits, and products in f64 for f64, which lose what f64 is chosen for. On a GPU the pairs cannot be
-- looked at without waiting for it: there, and for other norms, the differences are formed.

local device = require "lacuna.device"
local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local C = lib.C
local fail, show = schema.fail, schema.show
local expect = tensor.expect
local fn, internal = ops.fn, ops.internal
local wants, record2, sum_to, define = internal.wants, internal.record2, internal.sum_to, internal.define
local full_like, zeros_like = internal.full_like, internal.zeros_like

local DIFFERENCES = 2 ^ 18 -- that are formed at once: they stay in the caches
local PAIRS = 2 ^ 15 -- products of f64 at once
local NEAR = 2 ^ -20 -- of |x|^2 + |y|^2: below, a squared distance is made of differences
local LEAST = 8 -- elements of a row from which on products are faster

-- ---- by products ------------------------------------------------------------------------------------------

-- x [..., N, D] as f64 [B, N, D] with the batch sizes `batch`
local function wide_rows(x, batch)
  local sizes, total = {}, 1
  for i, size in ipairs(batch) do sizes[i], total = size, total * size end
  sizes[#sizes + 1], sizes[#sizes + 2] = x:size(-2), x:size(-1)
  return fn.reshape(x:detach():to { dtype = "f64" }:expand(sizes), total, x:size(-2), x:size(-1))
end

local function column(x, d) return fn.narrow(x, 3, d, 1) end

-- what both passes need of x and y
local function prepare(x, y)
  local batch, rank = {}, math.max(x.c.ndim, y.c.ndim) - 2
  for i = 1, rank do
    local p, q = i - rank + x.c.ndim - 2, i - rank + y.c.ndim - 2
    local a, b = p > 0 and x:size(p) or 1, q > 0 and y:size(q) or 1
    if a ~= b and a ~= 1 and b ~= 1 then
      fail("cdist", "batch sizes do not broadcast: %s and %s", show(x), show(y))
    end
    batch[i] = a == 1 and b or a
  end
  local p = { batch = batch, x = wide_rows(x, batch), y = wide_rows(y, batch) }
  p.B, p.N, p.M, p.D = p.x:size(1), p.x:size(2), p.y:size(2), p.x:size(3)
  p.x2, p.y2 = fn.sum(fn.square(p.x), 3, true), fn.sum(fn.square(p.y), 3, true)
  return p
end

-- visit(part) for parts of the pairs, as many as fit the caches: some batches, or some rows of one; part has
-- x [b, n, D], y [b, M, D], the bounds below which pairs are near, and where rows begin among all (from 0)
local function for_parts(p, visit)
  local batches = math.max(1, math.min(p.B, math.floor(PAIRS / (p.N * p.M))))
  local rows = math.max(1, math.min(p.N, math.floor(PAIRS / p.M)))
  for b = 1, p.B, batches do
    local count = math.min(batches, p.B - b + 1)
    local function of(t) return fn.narrow(t, 1, b, count) end
    for r = 1, p.N, rows do
      local n = math.min(rows, p.N - r + 1)
      local function rows_of(t) return fn.narrow(of(t), 2, r, n) end
      scope.run(function()
        visit { of = of, rows_of = rows_of, n = n, x = rows_of(p.x), y = of(p.y), count = count,
                bound = rows_of(p.x2) * NEAR + fn.transpose(of(p.y2), 2, 3) * NEAR,
                first_x = (b - 1) * p.N + r - 1, first_y = (b - 1) * p.M }
      end)
    end
  end
end

-- visit(difference [k, D], x's row, y's row, the pair's place), of the part, for pairs that are not far
local function for_near(part, p, far, visit)
  if fn.all(far):item() then return end
  local at, most = fn.nonzero(fn.logical_not(far)), math.max(1, math.floor(DIFFERENCES / p.D))
  local x, y = fn.reshape(part.x, -1, p.D), fn.reshape(part.y, -1, p.D)
  for first = 1, at:size(1), most do
    local some = fn.narrow(at, 1, first, math.min(most, at:size(1) - first + 1))
    local b, i, j = some:select(2, 1), some:select(2, 2), some:select(2, 3)
    local xi, yj = b * part.n + i, b * p.M + j
    visit(fn.index_select(x, 1, xi) - fn.index_select(y, 1, yj), xi, yj, xi * p.M + j)
  end
end

local function distances(x, y)
  local p = prepare(x, y)
  local sizes = { unpack(p.batch) }
  sizes[#sizes + 1], sizes[#sizes + 2] = p.N, p.M
  local out = tensor.empty(x.c.dtype, x.c.device, sizes, #sizes)
  local flat = fn.reshape(out, p.B, p.N, p.M)
  -- (-2 x, |x|^2, 1) (y, 1, |y|^2)
  local left = fn.cat({ p.x * -2, p.x2, full_like(p.x2, 1) }, 3)
  local right = fn.transpose(fn.cat({ p.y, full_like(p.y2, 1), p.y2 }, 3), 2, 3)
  for_parts(p, function(part)
    local square = fn.matmul(part.rows_of(left), part.of(right))
    local far, d = fn.gt(square, part.bound), fn.sqrt(square)
    for_near(part, p, far, function(difference, _, _, place)
      d:view(-1):scatter_(1, place, fn.sqrt(fn.sum(fn.square(difference), 2)))
    end)
    lib.call(C.lac_copy, d.c, part.rows_of(flat).c)
  end)
  return out
end

-- with w = g / d: x_i sum_j w_ij - (w y)_i, and the same of y; near pairs by their differences
local function gradients(node, g)
  local x, y = node.a, node.b
  local p = prepare(x, y)
  local function flat(t) return fn.reshape(t:detach(), p.B, p.N, p.M) end
  local function with_ones(t, one) return fn.cat({ t, full_like(one, 1) }, 3) end
  local d, x1, y1 = flat(node.o), with_ones(p.x, p.x2), with_ones(p.y, p.y2)
  g = flat(g)
  local gx, sums = zeros_like(p.x), zeros_like(y1)
  local nearby = zeros_like(p.y)
  local gx_rows, near_rows = gx:view(-1, p.D), nearby:view(-1, p.D)
  for_parts(p, function(part)
    local far_d = part.rows_of(d):to { dtype = "f64" }
    local w = fn.where(fn.eq(far_d, 0), 0, part.rows_of(g):to { dtype = "f64" } / far_d)
    local far = fn.gt(fn.square(far_d), part.bound)
    local w_far = fn.where(far, w, 0)
    local row = fn.matmul(w_far, part.of(y1))
    part.rows_of(gx):copy_(part.x * column(row, p.D + 1) - fn.narrow(row, 3, 1, p.D))
    part.of(sums):add_(fn.matmul(fn.transpose(w_far, 2, 3), part.rows_of(x1)))
    for_near(part, p, far, function(difference, xi, yj, place)
      local term = difference * fn.unsqueeze(fn.gather(fn.reshape(w, -1), 1, place), 2)
      gx_rows:index_add_(1, xi + part.first_x, term)
      near_rows:index_add_(1, yj + part.first_y, term, -1)
    end)
  end)
  local function of(t, wide, sizes)
    sizes[#sizes + 1], sizes[#sizes + 2] = t:size(-2), t:size(-1)
    return tensor.cast(sum_to(fn.reshape(wide, sizes), t), t.c.dtype)
  end
  local gy = p.y * column(sums, p.D + 1) - fn.narrow(sums, 3, 1, p.D) + nearby
  return x.requires_grad and of(x, gx, { unpack(p.batch) }) or nil,
    y.requires_grad and of(y, gy, { unpack(p.batch) }) or nil
end

-- no operator of its own: the rule of those distances that cdist makes of products
local products = { name = "cdist", save_a = true, save_b = true, save_c = false, save_d = false,
                   save_o = true }
function products.backward(node, g)
  return scope.run(function() return gradients(node, g) end)
end

-- ---- the operator -------------------------------------------------------------------------------------

--- Distances of all pairs of rows: x [..., N, D], y [..., M, D] -> [..., N, M], the p-norm (2 unless given,
-- math.huge the largest difference) of x_i - y_j. Exact near zero, where its gradient is 0. Euclidean ones of
-- f32 and half types are made of products on the CPU, within a unit in the last place, in N M memory. Else
-- the differences are formed: with a gradient all N M D of them are kept on the way, without one a part of
-- the rows at a time.
-- @tparam Tensor x @tparam Tensor y @tparam[opt] number p above 0
define { name = "cdist", composite = true, forward = function(x, y, p)
  expect("cdist", "x", x)
  expect("cdist", "y", y)
  if x.c.ndim < 2 or y.c.ndim < 2 or x:size(-1) ~= y:size(-1) then
    fail("cdist", "needs x [..., N, D] and y [..., M, D], got %s and %s", show(x), show(y))
  end
  local dtype = x.c.dtype
  if (p == nil or p == 2) and x.c.device == C.LAC_CPU and y.c.device == C.LAC_CPU and dtype == y.c.dtype
    and device.is_float(dtype) and dtype ~= C.LAC_F64 and x:size(-1) >= LEAST
    and x:numel() > 0 and y:numel() > 0 then
    local out = scope.run(function() return distances(x, y) end)
    if wants(x, y) then record2(products, out, x, y) end
    return out
  end
  x, y = fn.unsqueeze(x, -2), fn.unsqueeze(y, -3)
  local rows = x:size(-3)
  local others = math.max(1, y:numel() * x:numel() / math.max(1, rows * x:size(-1))) -- at most, of one row
  local at_once = math.max(1, math.floor(DIFFERENCES / others))
  -- a gradient keeps all differences anyway
  if rows <= at_once or x.requires_grad or y.requires_grad then return (fn.norm(x - y, p, -1)) end
  local parts = {}
  for first = 1, rows, at_once do
    local part = fn.narrow(x, -3, first, math.min(at_once, rows - first + 1))
    parts[#parts + 1] = scope.run(function() return fn.norm(part - y, p, -1) end)
  end
  return (fn.cat(parts, -2))
end }
