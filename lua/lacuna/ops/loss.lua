--- Losses.
--
-- cross_entropy and linear_cross_entropy are kernels that save only the log-sum-exp of each row, with class
-- weights, label smoothing and ignored targets inside; cross_entropy also takes probabilities as targets.
-- The fused form makes its logits chunk by chunk, so that those of a long sequence never exist as a whole.
-- Where gradients will be wanted and the losses are summed or averaged, a chunk's gradient is taken at once,
-- while its logits are there: one product in four less than making them again in the backward, which is left
-- with a factor. So a loss that is only read belongs under lac.no_grad. Not in f16, where that factor (a loss
-- scale) keeps gradients from vanishing. Elementwise losses are one pass over memory (c/maps.def:
-- squared_difference, huber, bce_logits) and a reduction; the rest is composed.
--
-- Every loss takes reduction = "mean", "sum" or "none". Shapes must agree exactly: a silent broadcast of [B]
-- against [B, 1] is a loss over B x B pairs, and a well-known way to lose a week. Class targets are data and
-- 0-based; see lacuna/init.lua for the rule.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local C = lib.C
local call = lib.call
local fail, show = schema.fail, schema.show
local is, adopt, expect = tensor.is, tensor.adopt, tensor.expect
local shape, numel, contiguous = tensor.shape, tensor.numel, tensor.contiguous
local same_shape, fn = tensor.same_shape, ops.fn
local internal = ops.internal
local record, wants, new, define = internal.record, internal.wants, internal.new, internal.define
local raw_scalar, raw_map2, raw_reduce = internal.raw_scalar, internal.raw_map2, internal.raw_reduce
local remember, map_id, scalar_like = internal.remember, internal.map_id, internal.scalar_like

local REDUCTION = { one_of = { "mean", "sum", "none" }, default = "mean" }

-- ---- cross-entropy --------------------------------------------------------------------------------------

local function keep(node, target, weight, o, lse)
  remember(node, target)
  if weight then
    node.saved[2], node.saved_versions[2] = weight, weight.root.version
  end
  node.target, node.weight, node.ignore, node.smoothing, node.lse = target, weight, o.ignore_index,
    o.label_smoothing, lse
end

-- weight (t (1 - e) + e / V), of probabilities t
local rows_ce = { name = "cross_entropy_rows", public = "cross_entropy", saves = "a", method = false,
                  internal = true }
function rows_ce.forward(logits, target, weight, o)
  local c, lse = new(), new()
  call(C.lac_cross_entropy, logits.c, target.c, weight and weight.c or nil, o.ignore_index,
    o.label_smoothing, c,
       lse)
  local out = adopt(c)
  lse = adopt(lse)
  if wants(logits, target) then keep(record(rows_ce, out, logits, target), target, weight, o, lse) end
  return out
end

-- towards probabilities: (1 - e) weight (lse - x) g
local function target_gradient(node, g)
  local x = node.a
  local column = fn.unsqueeze(node.lse, 2)
  local surprise = raw_map2(map_id.sub, column, tensor.cast(x, node.lse.c.dtype))
  local out = raw_map2(map_id.mul, surprise, fn.unsqueeze(g, 2))
  if node.weight then out = raw_map2(map_id.mul, out, tensor.cast(node.weight, out.c.dtype)) end
  if node.smoothing ~= 0 then out = raw_scalar(map_id.mul, out, 1 - node.smoothing) end
  return tensor.cast(out, x.c.dtype)
end

function rows_ce.backward(node, g)
  local dx
  g = contiguous(g)
  if node.a.requires_grad then
    local c = new()
    call(C.lac_cross_entropy_bwd, node.a.c, node.target.c, node.weight and node.weight.c or nil, node.ignore,
         node.smoothing, node.lse.c, g.c, c)
    dx = adopt(c)
  end
  return dx, node.b.requires_grad and target_gradient(node, g) or nil
end
define(rows_ce)

-- the sum of what the targets that count weigh, as a 0-dim tensor of dtype
local function total_weight(target, weight, o, dtype)
  local counts = raw_scalar(map_id.ne, target, o.ignore_index)
  if not weight then return tensor.cast(raw_reduce(C.LAC_SUM, counts, 0, false), dtype) end
  local safe = fn.where(counts, tensor.alias(target), 0)
  local each = tensor.cast(fn.index_select(tensor.alias(weight), 1, safe), dtype)
  return raw_reduce(C.LAC_SUM, fn.where(counts, each, 0), 0, false)
end

-- losses [R] over what their targets weigh
local mean_ce = { name = "cross_entropy_mean", public = "cross_entropy", method = false, internal = true }
function mean_ce.forward(losses, target, weight, o)
  local c, total = new(), new()
  call(C.lac_loss_mean, losses.c, target.c, weight and weight.c or nil, o.ignore_index, c, total)
  local out = adopt(c)
  total = adopt(total)
  if wants(losses) then
    local node = record(mean_ce, out, losses)
    node.total, node.rows = total, numel(losses)
  end
  return out
end
function mean_ce.backward(node, g)
  return fn.expand(fn.reshape(raw_map2(map_id.div, g, node.total), 1), node.rows)
end
define(mean_ce)

local function reduce_classes(losses, sizes, target, weight, o)
  if o.reduction == "none" then return fn.reshape(losses, sizes) end
  if o.reduction == "mean" and not device.is_float(target.c.dtype) then
    return mean_ce.forward(losses, target, weight, o)
  end
  local total = fn.sum(losses)
  return o.reduction == "sum" and total or total / numel(losses)
end

local LOSS = { ignore_index = { type = "integer" }, reduction = REDUCTION, weight = { type = "tensor" },
               label_smoothing = { type = "number", min = 0, max = 1, default = 0 } }

local function check_classes(op, name, x, target)
  local t = target.c
  if t.dtype ~= C.LAC_I64 and t.dtype ~= C.LAC_I32 then
    fail(op, "target must hold 0-based classes as i64 or i32, got %s", show(target))
  end
  local fits = x.c.ndim >= 1 and t.ndim == x.c.ndim - 1
  for i = 0, t.ndim - 1 do fits = fits and t.shape[i] == x.c.shape[i] end
  if not fits then
    fail(op, "target must have the shape of %s without its last dimension: target is %s, %s is %s", name,
         show(target), name, show(x))
  end
end

-- options with the class weights checked; -100 is the class that counts nothing unless another is named
local function loss_options(op, options, spec, classes)
  local o = schema.options(op, options, spec)
  if o.weight and o.weight.requires_grad then
    fail(op, "weight is a constant of the loss: %s requires a gradient, detach() it", show(o.weight))
  end
  if o.weight and (o.weight.c.ndim ~= 1 or o.weight.c.shape[0] ~= classes) then
    fail(op, "weight must be [%d], one for every class, got %s", classes, show(o.weight))
  end
  return o
end

-- [..., V] as [R, V]
local function as_rows(x)
  if x.c.ndim == 2 then return x end
  local classes, rows = x:size(-1), 1
  for i = 0, x.c.ndim - 2 do rows = rows * tonumber(x.c.shape[i]) end
  return fn.reshape(x, rows, classes)
end

--- -sum over classes of target times log softmax(logits).
-- @tparam Tensor logits [..., V]
-- @tparam Tensor target [...] 0-based classes (i64, i32), or [..., V] probabilities of the logits' dtype
-- @tparam[opt] table options ignore_index (-100: such targets count nothing), weight [V] (per class),
-- label_smoothing e (0: the target becomes (1 - e) target + e / V), reduction "mean" (over what the counted
-- targets weigh; over rows for probabilities), "sum" or "none"
define { name = "cross_entropy", composite = true, forward = function(logits, target, options)
  local op = "cross_entropy"
  expect(op, "logits", logits)
  expect(op, "target", target)
  local o = loss_options(op, options, LOSS, logits.c.ndim > 0 and logits:size(-1) or 0)
  local soft = device.is_float(target.c.dtype) and same_shape(target, logits) and logits.c.ndim > 0
  if not soft then check_classes(op, "logits", logits, target) end
  if soft and o.ignore_index then fail(op, "ignore_index is for class targets, not for probabilities") end
  o.ignore_index = o.ignore_index or -100
  local sizes = shape(logits)
  sizes[#sizes] = nil
  local flat = soft and as_rows(target) or target.c.ndim == 1 and target or fn.reshape(target, numel(target))
  return reduce_classes(rows_ce.forward(as_rows(logits), flat, o.weight, o), sizes, flat, o.weight, o)
end }

local rows_lce = { name = "linear_cross_entropy_rows", public = "linear_cross_entropy", saves = "abc",
                   method = false, internal = true }
function rows_lce.forward(x, w, bias, target, weight, o)
  local c, lse = new(), new()
  call(C.lac_linear_cross_entropy, x.c, w.c, bias and bias.c or nil, target.c, weight and weight.c or nil,
       o.ignore_index, o.label_smoothing, o.chunk, c, lse)
  local out = adopt(c)
  lse = adopt(lse)
  if wants(x, w, bias) then
    local node = record(rows_lce, out, x, w, bias)
    keep(node, target, weight, o, lse)
    node.chunk = o.chunk
  end
  return out
end
function rows_lce.backward(node, g)
  local bias = node.c
  local dx, dw, db = new(), new(), bias and new() or nil
  call(C.lac_linear_cross_entropy_bwd, node.a.c, node.b.c, bias and bias.c or nil, node.target.c,
       node.weight and node.weight.c or nil, node.ignore, node.smoothing, node.chunk, node.lse.c,
       contiguous(g).c, dx, dw, db)
  return adopt(dx), adopt(dw), db and adopt(db)
end
define(rows_lce)

local joined_lce = { name = "linear_cross_entropy_joined", public = "linear_cross_entropy", method = false,
                     internal = true }
-- the summed or averaged loss, and with it the gradients for a gradient of 1
function joined_lce.forward(x, w, bias, target, o)
  local stat = x.c.dtype == C.LAC_F64 and x.c.dtype or C.LAC_F32
  local rows = tonumber(x.c.shape[0])
  local share, total = tensor.cast(scalar_like(1, x), stat), nil
  if o.reduction == "mean" then
    total = total_weight(target, o.weight, o, stat)
    share = raw_map2(map_id.div, share, total)
  end
  local g = contiguous(fn.expand(fn.reshape(share, 1), rows))
  local c, dx, dw, db = new(), new(), new(), bias and new() or nil
  call(C.lac_linear_cross_entropy_both, x.c, w.c, bias and bias.c or nil, target.c,
    o.weight and o.weight.c or nil, o.ignore_index, o.label_smoothing, o.chunk, g.c, c, dx, dw, db)
  local out = raw_reduce(C.LAC_SUM, adopt(c), 0, false)
  if total then out = raw_map2(map_id.div, out, total) end
  local node = record(joined_lce, out, x, w, bias)
  node.made = { adopt(dx), adopt(dw), db and adopt(db) }
  return out
end
-- in the factor's own precision: a rounded factor would be an error of all gradients alike
local function times(t, g)
  return tensor.cast(raw_map2(map_id.mul, tensor.cast(t, g.c.dtype), g), t.c.dtype)
end
function joined_lce.backward(node, g, _, retain)
  local made, grads = node.made, {}
  for i = 1, 3 do
    local t = made[i]
    if t and not rawget(g, "unit") then t = times(t, g)
    elseif t and retain then t = tensor.cast(t, t.c.dtype) end
    grads[i] = t
  end
  if not retain then node.made = nil end
  return grads[1], grads[2], grads[3]
end
define(joined_lce)

local LINEAR_LOSS = { ignore_index = LOSS.ignore_index, reduction = REDUCTION, weight = LOSS.weight,
                      label_smoothing = LOSS.label_smoothing, chunk = { type = "integer", min = 0,
                        default = 0 } }

--- cross_entropy(linear(x, w, bias), target) without ever holding the logits: `chunk` rows at a time.
-- @tparam Tensor x [..., E] @tparam Tensor w [V, E] @tparam[opt] Tensor bias [V]
-- @tparam Tensor target [...] 0-based classes
-- @tparam[opt] table options ignore_index, weight, label_smoothing, reduction as for cross_entropy; chunk (0:
-- the engine chooses)
define { name = "linear_cross_entropy", composite = true, forward = function(x, w, bias, target, options)
  local op = "linear_cross_entropy"
  expect(op, "x", x)
  expect(op, "w", w)
  if bias ~= nil then expect(op, "bias", bias) end
  expect(op, "target", target)
  local o = loss_options(op, options, LINEAR_LOSS, w.c.ndim > 0 and w:size(1) or 0)
  o.ignore_index = o.ignore_index or -100
  check_classes(op, "x", x, target)
  local flat = target.c.ndim == 1 and target or fn.reshape(target, numel(target))
  local rows = as_rows(x)
  if o.reduction ~= "none" and x.c.dtype ~= C.LAC_F16 and wants(x, w, bias) then
    return joined_lce.forward(rows, w, bias, flat, o)
  end
  local losses = rows_lce.forward(rows, w, bias, flat, o.weight, o)
  return reduce_classes(losses, shape(target), flat, o.weight, o)
end }

local NLL = { ignore_index = LOSS.ignore_index, reduction = REDUCTION, weight = LOSS.weight }

--- -log_probabilities at the target class: cross_entropy after log_softmax.
-- @tparam Tensor x [..., V] @tparam Tensor target [...] 0-based classes
-- @tparam[opt] table options ignore_index (-100), weight [V], reduction
define { name = "nll_loss", composite = true, forward = function(x, target, options)
  expect("nll_loss", "x", x)
  expect("nll_loss", "target", target)
  local o = loss_options("nll_loss", options, NLL, x.c.ndim > 0 and x:size(-1) or 0)
  o.ignore_index = o.ignore_index or -100
  check_classes("nll_loss", "x", x, target)
  local flat, rows = fn.reshape(tensor.alias(target), numel(target)), as_rows(x)
  local counts = raw_scalar(map_id.ne, flat, o.ignore_index)
  local safe = fn.where(counts, flat, 0)
  local losses = fn.neg(fn.squeeze(fn.gather(rows, 2, fn.unsqueeze(safe, 2)), 2))
  if o.weight then losses = losses * fn.index_select(o.weight, 1, safe) end
  losses = fn.where(counts, losses, 0)
  if o.reduction ~= "mean" then return reduce_classes(losses, shape(target), flat, o.weight, o) end
  local total = fn.sum(losses) -- in the dtype of x, which may be half
  return total / total_weight(flat, o.weight, o, total.c.dtype)
end }

-- ---- elementwise losses -----------------------------------------------------------------------------------

local function check_pair(op, x, target)
  expect(op, "x", x)
  expect(op, "target", target)
  if not same_shape(x, target) then
    fail(op, "x and target must have one shape: x is %s, target is %s", show(x), show(target))
  end
end

local function reduced(losses, how)
  if how == "mean" then return (fn.mean(losses)) end
  if how == "sum" then return (fn.sum(losses)) end
  return losses
end

local PLAIN = { reduction = REDUCTION }

--- (x - target)^2, by default the mean.
-- @tparam Tensor x @tparam Tensor target @tparam[opt] table options reduction = "mean", "sum" or "none"
define { name = "mse_loss", composite = true, forward = function(x, target, options)
  check_pair("mse_loss", x, target)
  local o = schema.options("mse_loss", options, PLAIN)
  return reduced(fn.squared_difference(x, target), o.reduction)
end }

--- |x - target|, by default the mean.
-- @tparam Tensor x @tparam Tensor target @tparam[opt] table options reduction = "mean", "sum" or "none"
define { name = "l1_loss", composite = true, forward = function(x, target, options)
  check_pair("l1_loss", x, target)
  local o = schema.options("l1_loss", options, PLAIN)
  return reduced(fn.abs(x - target), o.reduction)
end }

--- d^2 / 2 for |d| <= delta, else delta (|d| - delta / 2), of d = x - target (Huber 1964).
-- @tparam Tensor x @tparam Tensor target @tparam[opt] table options delta (1), reduction
define { name = "huber_loss", composite = true, forward = function(x, target, options)
  check_pair("huber_loss", x, target)
  local o = schema.options("huber_loss", options, { delta = { type = "number", above = 0, default = 1 },
                                                    reduction = REDUCTION })
  return reduced(fn.huber(x - target, o.delta), o.reduction)
end }

--- Huber's loss divided by beta: d^2 / (2 beta) for |d| <= beta, else |d| - beta / 2.
-- @tparam Tensor x @tparam Tensor target @tparam[opt] table options beta (1), reduction
define { name = "smooth_l1_loss", composite = true, forward = function(x, target, options)
  check_pair("smooth_l1_loss", x, target)
  local o = schema.options("smooth_l1_loss", options, { beta = { type = "number", above = 0, default = 1 },
                                                        reduction = REDUCTION })
  local losses = reduced(fn.huber(x - target, o.beta), o.reduction)
  return o.beta == 1 and losses or losses / o.beta
end }

--- target (log target - x): the Kullback-Leibler divergence of x, which holds LOG-probabilities, from target.
-- @tparam Tensor x @tparam Tensor target probabilities, or their logarithms with log_target
-- @tparam[opt] table options log_target (false), reduction "mean" (over elements), "batchmean" (the sum over
-- the size of dimension 1: the divergence by its definition), "sum" or "none"
define { name = "kl_div", composite = true, forward = function(x, target, options)
  check_pair("kl_div", x, target)
  local o = schema.options("kl_div", options, {
    log_target = { type = "boolean", default = false },
    reduction = { one_of = { "mean", "batchmean", "sum", "none" }, default = "mean" },
  })
  local losses
  if o.log_target then
    losses = fn.exp(target) * (target - x)
  else
    local some = fn.gt(target, 0) -- 0 log 0 is 0
    losses = fn.where(some, target * (fn.log(fn.where(some, target, 1)) - x), 0)
  end
  if o.reduction ~= "batchmean" then return reduced(losses, o.reduction) end
  if x.c.ndim == 0 then fail("kl_div", "reduction 'batchmean' needs a dimension") end
  return fn.sum(losses) / x:size(1)
end }

--- Binary cross-entropy of sigmoid(x) against targets in [0, 1], without overflow.
-- @tparam Tensor x logits @tparam Tensor target @tparam[opt] table options pos_weight (factor of the positive
-- part: a number, or a tensor that broadcasts to x), weight (of every element, likewise), reduction
define { name = "binary_cross_entropy_with_logits", composite = true, forward = function(x, target, options)
  local op = "binary_cross_entropy_with_logits"
  check_pair(op, x, target)
  local o = schema.options(op, options, { pos_weight = { type = { "number", "tensor" } },
                                          weight = { type = { "number", "tensor" } }, reduction = REDUCTION })
  local losses
  if o.pos_weight == nil then
    losses = fn.bce_logits(x, target)
  else -- (1 - t) x + (1 + (p - 1) t) softplus(-x)
    losses = (1 - target) * x + (1 + target * (o.pos_weight - 1)) * fn.softplus(-x)
  end
  if o.weight ~= nil then losses = losses * o.weight end
  if not same_shape(losses, x) then fail(op, "a weight does not broadcast to x %s", show(x)) end
  return reduced(losses, o.reduction)
end }

--- a b / (|a| |b|) along dim, norms at least eps.
-- @tparam Tensor a @tparam Tensor b @tparam[opt=-1] integer dim @tparam[opt=1e-8] number eps
define { name = "cosine_similarity", composite = true, forward = function(a, b, dim, eps)
  expect("cosine_similarity", "a", a)
  expect("cosine_similarity", "b", b)
  dim, eps = dim == nil and -1 or dim, eps == nil and 1e-8 or eps
  schema.check("cosine_similarity", "eps", eps, { type = "number", above = 0 })
  if is(dim) then fail("cosine_similarity", "dim must be an integer, got %s", show(dim)) end
  local norms = fn.maximum(fn.norm(a, 2, dim), eps) * fn.maximum(fn.norm(b, 2, dim), eps)
  return fn.sum(a * b, dim) / norms
end }
