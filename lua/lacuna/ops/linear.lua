--- Matrix products and normalisation.
--
-- matmul reads transposed views in place, so the gradients of a product are two products of views and copy
-- nothing. linear adds the bias inside the product, and its gradient is added up beside the weight's. Where
-- several layers read one tensor (q, k and v do), each product is added to the gradient that is there.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local C, flags = lib.C, lib.flags
local recover, raise, attend, call = lib.recover, lib.raise, lib.attend, lib.call
local fail, show = schema.fail, schema.show
local is, adopt, expect, tape = tensor.is, tensor.adopt, tensor.expect, tensor.tape
local methods, numel = tensor.methods, tensor.numel
local ctensor, D, fn = tensor.ctype, tensor.sizes_buffer, ops.fn
local internal = ops.internal
local record2, record, wants, new = internal.record2, internal.record, internal.wants, internal.new
local sum_to, raw_matmul, pending = internal.sum_to, internal.raw_matmul, internal.pending
local raw_reduce, define = internal.raw_reduce, internal.define

-- ---- matrix products ----------------------------------------------------------------------------

local matmul_op = { name = "matmul", saves = "ab", method = false }
local function matmul2(a, b)
  local c = ctensor()
  local status = C.lac_matmul(a.c, b.c, nil, c)
  if status ~= 0 then
    if recover(status) then status = C.lac_matmul(a.c, b.c, nil, c) end
    if status ~= 0 then raise(status) end
  end
  if flags.attention ~= 0 then attend() end
  local out = adopt(c)
  if tape.enabled and (a.requires_grad or b.requires_grad) then record2(matmul_op, out, a, b) end
  return out
end

local function last_transposed(t) return tensor.raw_transpose(t, t.c.ndim - 2, t.c.ndim - 1) end

function matmul_op.backward(node, g)
  local a, b = node.a, node.b
  return a.requires_grad and sum_to(raw_matmul(g, last_transposed(b)), a) or nil,
    b.requires_grad and sum_to(raw_matmul(last_transposed(a), g), b) or nil
end

--- Matrix product [..., M, K] x [..., K, N] -> [..., M, N]; batch dimensions broadcast; a vector is a row on
-- the left and a column on the right, and its dimension goes from the result.
function matmul_op.forward(a, b)
  if not (is(a) and is(b)) then
    expect("matmul", "a", a)
    expect("matmul", "b", b)
  end
  local va, vb = a.c.ndim == 1, b.c.ndim == 1
  if not va and not vb then return matmul2(a, b) end
  if va then a = fn.unsqueeze(a, 1) end
  if vb then b = fn.unsqueeze(b, 2) end
  local out = matmul2(a, b)
  if vb then out = fn.squeeze(out, -1) end
  if va then out = fn.squeeze(out, vb and -1 or -2) end
  return out
end
define(matmul_op)
methods.matmul = matmul_op.forward

-- [..., E] as [R, E]
local function rows(op, t)
  D[1], D[2] = -1, tonumber(t.c.shape[t.c.ndim - 1])
  if numel(t) == 0 then
    D[1] = 1
    for i = 0, t.c.ndim - 2 do D[1] = D[1] * tonumber(t.c.shape[i]) end
  end
  return tensor.raw_view(op, t, 2, true)
end

-- give the fresh [R, V] tensor `out` the leading sizes of x
local function set_leading(out, x)
  local c, last = out.c, out.c.shape[1]
  c.ndim = x.c.ndim
  for i = 0, x.c.ndim - 2 do c.shape[i] = x.c.shape[i] end
  c.shape[c.ndim - 1] = last
  tensor.set_contiguous_strides(c)
end

-- gradients of weight and bias from g [R, V] and x [R, E]
local function weight_grad(g, x, of_weight, of_bias)
  if not of_bias then return raw_matmul(tensor.raw_transpose(g, 0, 1), x) end
  if not of_weight then return nil, raw_reduce(C.LAC_SUM, g, 1, false) end
  local dw, sums = new(), new()
  call(C.lac_weight_grad, g.c, x.c, dw, sums)
  return adopt(dw), adopt(sums)
end

local linear_op = { name = "linear", saves = "ab" }
--- x w^T + b: x [..., E], w [V, E], b [V] or nil -> [..., V].
function linear_op.forward(x, w, b)
  expect("linear", "x", x)
  expect("linear", "w", w)
  if b ~= nil then expect("linear", "b", b) end
  if w.c.ndim ~= 2 or x.c.ndim < 1 or x.c.shape[x.c.ndim - 1] ~= w.c.shape[1] then
    fail("linear", "x [..., E] and w [V, E] do not fit: x is %s, w is %s", show(x), show(w))
  end
  if b ~= nil and (b.c.ndim ~= 1 or b.c.shape[0] ~= w.c.shape[0]) then
    fail("linear", "b must be [V] for w [V, E]: b is %s, w is %s", show(b), show(w))
  end
  local out = raw_matmul(rows("linear", x), tensor.raw_transpose(w, 0, 1), b)
  set_leading(out, x)
  if wants(x, w, b) then record(linear_op, out, x, w, b) end
  return out
end
function linear_op.backward(node, g)
  local x, w, b = node.a, node.b, node.c
  local g2 = rows("linear", g)
  local gx, gw, gb
  local sum = x.requires_grad and pending(x)
  if sum then
    local into = rows("linear", sum).c
    call(C.lac_matmul, g2.c, w.c, into, into)
  elseif x.requires_grad then
    gx = raw_matmul(g2, w)
    set_leading(gx, x)
  end
  if w.requires_grad or (b and b.requires_grad) then
    gw, gb = weight_grad(g2, rows("linear", x), w.requires_grad, b and b.requires_grad)
  end
  return gx, gw, gb
end
define(linear_op)
internal.rows, internal.set_leading, internal.weight_grad = rows, set_leading, weight_grad

-- ---- normalisation ------------------------------------------------------------------------------

local layernorm_op = { name = "layernorm", saves = "ab" }
--- Normalise the last dimension: gamma (x - mean) / sqrt(var + eps) + beta.
-- @tparam Tensor x [..., E] @tparam[opt] Tensor gamma [E] @tparam[opt] Tensor beta [E]
-- @tparam[opt] number eps 1e-5
function layernorm_op.forward(x, gamma, beta, eps)
  expect("layernorm", "x", x)
  if gamma ~= nil then expect("layernorm", "gamma", gamma) end
  if beta ~= nil then expect("layernorm", "beta", beta) end
  eps = eps == nil and 1e-5 or eps
  if type(eps) ~= "number" or eps ~= eps or eps < 0 then
    fail("layernorm", "eps must not be negative, got %s", show(eps))
  end
  local c, mean, rstd = new(), new(), new()
  call(C.lac_layernorm, x.c, gamma and gamma.c or nil, beta and beta.c or nil, eps, c, mean, rstd)
  local out = adopt(c)
  mean, rstd = adopt(mean), adopt(rstd)
  if wants(x, gamma, beta) then
    local node = record(layernorm_op, out, x, gamma, beta)
    node.mean, node.rstd = mean, rstd
  end
  return out
end
function layernorm_op.backward(node, g)
  local gamma, beta = node.b, node.c
  local dx = new()
  local dgamma = gamma and gamma.requires_grad and new() or nil
  local dbeta = beta and beta.requires_grad and new() or nil
  call(C.lac_layernorm_bwd, node.a.c, gamma and gamma.c or nil, node.mean.c, node.rstd.c, g.c, dx, dgamma,
       dbeta)
  return adopt(dx), dgamma and adopt(dgamma), dbeta and adopt(dbeta)
end
define(layernorm_op)

--- Normalise each of `groups` runs of channels of x [B, C, ...] over its channels and all that follows, then
-- gamma and beta by channel (Wu and He 2018).
-- @tparam Tensor x [B, C, ...] @tparam integer groups must divide C
-- @tparam[opt] Tensor gamma [C] @tparam[opt] Tensor beta [C] @tparam[opt] number eps 1e-5
define { name = "group_norm", composite = true, forward = function(x, groups, gamma, beta, eps)
  local op = "group_norm"
  expect(op, "x", x)
  if x.c.ndim < 2 then fail(op, "x must be [B, C, ...], got %s", show(x)) end
  schema.check(op, "groups", groups == nil and false or groups, { type = "integer", min = 1 })
  local sizes = tensor.shape(x)
  local channels, each = sizes[2], 1
  if channels % groups ~= 0 then
    fail(op, "%d groups do not divide the %d channels of %s", groups, channels, show(x))
  end
  for d = 2, #sizes do each = each * sizes[d] end
  if each == 0 then fail(op, "a group must have at least one element, got %s", show(x)) end
  local by_channel = { channels }
  for d = 3, #sizes do by_channel[d - 1] = 1 end
  local function vector(name, t)
    if t == nil then return nil end
    expect(op, name, t)
    if t.c.ndim ~= 1 or t.c.shape[0] ~= channels then
      fail(op, "%s must be [%d], a value for each channel of %s, got %s", name, channels, show(x), show(t))
    end
    return fn.reshape(t, by_channel)
  end
  gamma, beta = vector("gamma", gamma), vector("beta", beta)
  local grouped = fn.reshape(x, sizes[1], groups, each / groups)
  local out = fn.reshape(layernorm_op.forward(grouped, nil, nil, eps), sizes)
  if gamma and beta then return fn.addcmul(beta, out, gamma) end
  if gamma then return fn.mul(out, gamma) end
  return beta and fn.add(out, beta) or out
end }

local rmsnorm_op = { name = "rmsnorm", saves = "ab" }
--- Divide the last dimension by its root mean square: gamma x / sqrt(mean(x^2) + eps) (Zhang and Sennrich
-- 2019).
-- @tparam Tensor x [..., E] @tparam[opt] Tensor gamma [E] @tparam[opt] number eps 1e-6
function rmsnorm_op.forward(x, gamma, eps)
  expect("rmsnorm", "x", x)
  if gamma ~= nil then expect("rmsnorm", "gamma", gamma) end
  eps = eps == nil and 1e-6 or eps
  if type(eps) ~= "number" or eps ~= eps or eps <= 0 then
    fail("rmsnorm", "eps must be positive, got %s", show(eps))
  end
  local c, rstd = new(), new()
  call(C.lac_rmsnorm, x.c, gamma and gamma.c or nil, eps, c, rstd)
  local out = adopt(c)
  rstd = adopt(rstd)
  if wants(x, gamma) then record(rmsnorm_op, out, x, gamma).rstd = rstd end
  return out
end
function rmsnorm_op.backward(node, g)
  local gamma = node.b
  local dx, dgamma = new(), gamma and gamma.requires_grad and new() or nil
  call(C.lac_rmsnorm_bwd, node.a.c, gamma and gamma.c or nil, node.rstd.c, g.c, dx, dgamma)
  return adopt(dx), dgamma and adopt(dgamma)
end
define(rmsnorm_op)
