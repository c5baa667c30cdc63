--- What a model does in a row, as one operator: residual sum and norm, gelu and norm, feed-forward layers.
--
-- Each gives the numbers of its parts. On CUDA they are one pass over memory, or ride on a product
-- (kernels/residual.cu, gelu_norm.cu, linear.cu); there the activations between the two products of a
-- feed-forward layer are not kept but made again in the backward, which costs 2% of a training step and saves
-- a third of its memory. The CPU runs the parts in turn and keeps what they read: a second gelu would cost
-- more there. Rejected: one operator for a whole block (norms and attention have options of their own).

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops.base"

local C = lib.C
local call = lib.call
local fail, show = schema.fail, schema.show
local adopt, expect = tensor.adopt, tensor.expect
local internal = ops.internal
local record, wants, new, define = internal.record, internal.wants, internal.new, internal.define
local rows, set_leading, weight_grad = internal.rows, internal.set_leading, internal.weight_grad
local raw_matmul, map_id = internal.raw_matmul, internal.map_id

local function release(t) C.lac_tensor_release(t.c) end

-- ---- residual sum, dropout, norm ----------------------------------------------------------------

local RESIDUAL = { p = { type = "number", min = 0, below = 1, default = 0 },
                   training = { type = "boolean", default = true },
                   eps = { type = "number", above = 0, default = 1e-5 } }

local residual_op = { name = "residual_norm", saves = "co", alias = true, spends = true, method = false }
--- A residual connection and the norm that follows: sum = x + dropout(h), out = layernorm(sum, gamma, beta).
-- The same numbers and the same dropout as from the three operators; on CUDA one pass instead of three.
-- @tparam Tensor x [..., E] @tparam Tensor h of x's shape @tparam[opt] Tensor gamma [E]
-- @tparam[opt] Tensor beta [E] @tparam[opt] table options p = 0 (of the dropout), training = true (false: no
-- dropout), eps = 1e-5
-- @treturn Tensor sum @treturn Tensor out
function residual_op.forward(x, h, gamma, beta, options)
  local op = "residual_norm"
  expect(op, "x", x)
  expect(op, "h", h)
  if gamma ~= nil then expect(op, "gamma", gamma) end
  if beta ~= nil then expect(op, "beta", beta) end
  local o = schema.options(op, options, RESIDUAL)
  local p, seed, offset = o.training and o.p or 0, 0, 0
  if p > 0 then seed, offset = create.draw() end
  local s, c, mean, rstd = new(), new(), new(), new()
  call(C.lac_residual_norm, x.c, h.c, gamma and gamma.c or nil, beta and beta.c or nil, o.eps, p, seed,
       offset, s, c, mean, rstd)
  local sum, out = adopt(s), adopt(c)
  mean, rstd = adopt(mean), adopt(rstd)
  if wants(x, h, gamma, beta) then
    local node = record(residual_op, sum, x, h, gamma, beta)
    node.mean, node.rstd, node.p, node.seed, node.offset = mean, rstd, p, seed, offset
    node.outputs = { sum, out }
    out.requires_grad, out.node, out.slot = true, node, 2
  end
  return sum, out
end
function residual_op.backward(node, g, more)
  local gamma, beta, g_out = node.c, node.d, more and more[2]
  if not g_out then -- only the sum was used
    local dh = g
    if node.p > 0 then
      local c = new()
      call(C.lac_dropout, g.c, node.p, node.seed, node.offset, c)
      dh = adopt(c)
    end
    return g, dh
  end
  local dx, dh = new(), node.p > 0 and new() or nil
  local dgamma = gamma and gamma.requires_grad and new() or nil
  local dbeta = beta and beta.requires_grad and new() or nil
  call(C.lac_residual_norm_bwd, node.o.c, gamma and gamma.c or nil, node.mean.c, node.rstd.c, g_out.c,
       g and g.c or nil, node.p, node.seed, node.offset, dx, dh, dgamma, dbeta)
  dx = adopt(dx)
  return dx, dh and adopt(dh) or dx, dgamma and adopt(dgamma), dbeta and adopt(dbeta)
end
define(residual_op)

-- ---- gelu, norm ---------------------------------------------------------------------------------

local function check_eps(op, eps)
  if type(eps) == "number" and eps > 0 then return end
  fail(op, "eps must be positive, got %s", show(eps))
end

-- layernorm(gelu(x)), what the norm reads (on the CPU; else nil), mean, rstd
local function gelu_norm(x, gamma, beta, eps)
  local c, mean, rstd = new(), new(), new()
  local act = x.c.device == C.LAC_CPU and new() or nil
  call(C.lac_gelu_norm, x.c, gamma and gamma.c or nil, beta and beta.c or nil, eps, act, c, mean, rstd)
  return adopt(c), act and adopt(act), adopt(mean), adopt(rstd)
end

-- gradients of x, gamma and beta; `again`: and what gelu_norm gave; `summed`: and dx's sums over rows
local function gelu_norm_grad(x, act, gamma, beta, mean, rstd, g, eps, again, summed)
  local dx, out, sums = new(), again and new() or nil, summed and new() or nil
  local dgamma = gamma and gamma.requires_grad and new() or nil
  local dbeta = beta and beta.requires_grad and new() or nil
  call(C.lac_gelu_norm_bwd, x.c, act and act.c or nil, gamma and gamma.c or nil, beta and beta.c or nil,
    mean.c, rstd.c, g.c, eps, dx, dgamma, dbeta, out, sums)
  return adopt(dx), dgamma and adopt(dgamma), dbeta and adopt(dbeta), out and adopt(out), sums and adopt(sums)
end

local function check_norm(op, gamma, beta, eps)
  if gamma ~= nil then expect(op, "gamma", gamma) end
  if beta ~= nil then expect(op, "beta", beta) end
  check_eps(op, eps)
end

local gelu_norm_op = { name = "gelu_norm", saves = "ab" }
--- layernorm(gelu(x), gamma, beta, eps).
-- @tparam Tensor x [..., E] @tparam[opt] Tensor gamma [E] @tparam[opt] Tensor beta [E]
-- @tparam[opt] number eps 1e-5
function gelu_norm_op.forward(x, gamma, beta, eps)
  expect("gelu_norm", "x", x)
  eps = eps == nil and 1e-5 or eps
  check_norm("gelu_norm", gamma, beta, eps)
  local out, act, mean, rstd = gelu_norm(x, gamma, beta, eps)
  if wants(x, gamma, beta) then
    local node = record(gelu_norm_op, out, x, gamma, beta)
    node.act, node.mean, node.rstd, node.eps = act, mean, rstd, eps
  end
  return out
end
function gelu_norm_op.backward(node, g, _, retain)
  local dx, dgamma, dbeta = gelu_norm_grad(node.a, node.act, node.b, node.c, node.mean, node.rstd, g,
    node.eps)
  if node.act and not retain then release(node.act) end
  return dx, dgamma, dbeta
end
define(gelu_norm_op)

-- ---- linear layer and activation ----------------------------------------------------------------

local ACTIVATIONS = { "gelu", "gelu_tanh" }

local function check_linear(op, x, w, b, names)
  expect(op, names[1], x)
  expect(op, names[2], w)
  if b ~= nil then expect(op, names[3], b) end
  if w.c.ndim ~= 2 or x.c.ndim < 1 or x.c.shape[x.c.ndim - 1] ~= w.c.shape[1] then
    fail(op, "%s [..., E] and %s [V, E] do not fit: they are %s and %s", names[1], names[2], show(x), show(w))
  end
  if b ~= nil and (b.c.ndim ~= 1 or b.c.shape[0] ~= w.c.shape[0]) then
    fail(op, "%s must be [V] for %s [V, E]: they are %s and %s", names[3], names[2], show(b), show(w))
  end
end

-- fn(x w^T + b) of rows x, and what goes into fn if `keep`
local function linear_act(id, x, w, b, keep)
  local pre, c = keep and new() or nil, new()
  call(C.lac_linear_act, id, x.c, w.c, b and b.c or nil, pre, c)
  return adopt(c), pre and adopt(pre)
end

local linear_act_op = { name = "linear_act", saves = "ab" }
--- gelu(x w^T + b), by the error function or by tanh; the latter is part of the product on CUDA.
-- @tparam Tensor x [..., E] @tparam Tensor w [V, E] @tparam[opt] Tensor b [V]
-- @tparam string activation "gelu" or "gelu_tanh"
function linear_act_op.forward(x, w, b, activation)
  local op = "linear_act"
  check_linear(op, x, w, b, { "x", "w", "b" })
  schema.check(op, "activation", activation, { one_of = ACTIVATIONS })
  local id, keep = map_id["1" .. activation], wants(x, w, b)
  local out, pre = linear_act(id, rows(op, x), w, b, keep)
  set_leading(out, x)
  if keep then
    local node = record(linear_act_op, out, x, w, b)
    node.id, node.pre = id, pre
  end
  return out
end
function linear_act_op.backward(node, g, _, retain)
  local x, w, b, pre, c = node.a, node.b, node.c, node.pre, new()
  local gx, gw, gb
  call(C.lac_map1_bwd, node.id, pre.c, pre.c, rows("linear_act", g).c, c)
  local dpre = adopt(c)
  if w.requires_grad or (b and b.requires_grad) then
    gw, gb = weight_grad(dpre, rows("linear_act", x), w.requires_grad, b and b.requires_grad)
  end
  if x.requires_grad then
    gx = raw_matmul(dpre, w)
    set_leading(gx, x)
  end
  release(dpre)
  if not retain then release(pre) end
  return gx, gw, gb
end
define(linear_act_op)

-- ---- feed-forward -------------------------------------------------------------------------------

local FEED = { activation = { one_of = ACTIVATIONS, default = "gelu" },
               norm = { type = "boolean", default = false }, gamma = { type = "tensor" },
               beta = { type = "tensor" }, eps = { type = "number", above = 0, default = 1e-5 } }

local feed_op = { name = "feed_forward", method = false }

local function check_feed(op, x, up, up_bias, down, down_bias, o)
  check_linear(op, x, up, up_bias, { "x", "up", "up_bias" })
  expect(op, "down", down)
  if down_bias ~= nil then expect(op, "down_bias", down_bias) end
  if down.c.ndim ~= 2 or down.c.shape[1] ~= up.c.shape[0] then
    fail(op, "up [H, E] and down [V, H] do not fit: they are %s and %s", show(up), show(down))
  end
  if not o.norm and (o.gamma or o.beta) then fail(op, "gamma and beta belong to a norm: say norm = true") end
  if o.norm and o.activation ~= "gelu" then
    fail(op, "norm = true goes with activation 'gelu', got '%s': call linear_act, layernorm and linear",
      o.activation)
  end
end

-- the node, with inputs in a list: x, up, down, and what there is of up_bias, down_bias, gamma, beta
local function record_feed(out, kept, ...)
  local node, list, at = record(feed_op, out), {}, {}
  local names = { "x", "up", "down", "up_bias", "down_bias", "gamma", "beta" }
  for i, name in ipairs(names) do
    local t = select(i, ...)
    node[name] = t
    if t then
      list[#list + 1] = t
      at[name] = #list
    end
  end
  node.list, node.at, node.saved, node.saved_versions = list, at, {}, {}
  for _, t in ipairs(list) do
    if t ~= node.up_bias and t ~= node.down_bias and t ~= node.beta then
      node.saved[#node.saved + 1], node.saved_versions[#node.saved + 1] = t, t.root.version
    end
  end
  for name, value in pairs(kept) do node[name] = value end
end

--- down(h) of h = gelu(up(x)), or of its layer norm: down h^T + down_bias, up x^T + up_bias.
-- @tparam Tensor x [..., E] @tparam Tensor up [H, E] @tparam[opt] Tensor up_bias [H]
-- @tparam Tensor down [V, H] @tparam[opt] Tensor down_bias [V]
-- @tparam[opt] table options activation = "gelu" or "gelu_tanh"; norm = false (true: of the hidden layer,
-- with gamma [H], beta [H], eps = 1e-5)
function feed_op.forward(x, up, up_bias, down, down_bias, options)
  local op = "feed_forward"
  local o = schema.options(op, options, FEED)
  check_feed(op, x, up, up_bias, down, down_bias, o)
  local wanted = wants(x, up, up_bias, down) or wants(down_bias, o.gamma, o.beta)
  local kept = { id = map_id["1" .. o.activation], norm = o.norm, gamma = o.gamma, beta = o.beta,
    eps = o.eps }
  local hidden
  if o.norm then
    kept.pre = raw_matmul(rows(op, x), tensor.raw_transpose(up, 0, 1), up_bias)
    hidden, kept.act, kept.mean, kept.rstd = gelu_norm(kept.pre, kept.gamma, kept.beta, kept.eps)
  else
    hidden, kept.pre = linear_act(kept.id, rows(op, x), up, up_bias, wanted)
  end
  local out = raw_matmul(hidden, tensor.raw_transpose(down, 0, 1), down_bias)
  set_leading(out, x)
  if wanted and x.c.device == C.LAC_CPU then kept.hidden = hidden else release(hidden) end
  if wanted then
    record_feed(out, kept, x, up, down, up_bias, down_bias, o.gamma, o.beta)
  elseif kept.pre then
    release(kept.pre)
    if kept.act then release(kept.act) end
  end
  return out
end

-- gradients of down and down_bias; hidden: what the second product read, if that is needed and was not kept
local function down_grad(node, g, grads, retain, hidden)
  hidden = node.hidden or hidden
  local down, bias = node.down, node.down_bias
  if down.requires_grad or (bias and bias.requires_grad) then
    grads[node.at.down], grads.down_bias = weight_grad(g, hidden, down.requires_grad,
      bias and bias.requires_grad)
  end
  if hidden and not (node.hidden and retain) then release(hidden) end
end

-- the gradient of what goes into the activation, and of up_bias; with a norm also of gamma and beta. And what
-- the second product read, if it is needed and was not kept
local function pre_grad(node, g, grads)
  local summed = node.up_bias and node.up_bias.requires_grad
  local again = not node.hidden and node.down.requires_grad
  if node.norm then
    local dh = raw_matmul(g, node.down)
    local dpre, dgamma, dbeta, hidden, sums = gelu_norm_grad(node.pre, node.act, node.gamma, node.beta,
      node.mean, node.rstd, dh, node.eps, again, summed)
    grads.gamma, grads.beta, grads.up_bias = dgamma, dbeta, sums
    release(dh)
    return dpre, hidden
  end
  local c, sums, act = new(), summed and new() or nil, again and new() or nil
  call(C.lac_linear_act_bwd, node.id, g.c, node.down.c, node.pre.c, c, sums, act)
  grads.up_bias = sums and adopt(sums)
  return adopt(c), act and adopt(act)
end

function feed_op.backward(node, g, _, retain)
  local x, up, grads = node.x, node.up, {}
  local g2 = rows("feed_forward", g)
  local dpre, hidden
  if node.norm or not node.hidden then dpre, hidden = pre_grad(node, g2, grads) end
  down_grad(node, g2, grads, retain, hidden)
  dpre = dpre or pre_grad(node, g2, grads)
  if not retain then
    release(node.pre)
    if node.act then release(node.act) end
  end
  if up.requires_grad then
    grads[node.at.up] = raw_matmul(tensor.raw_transpose(dpre, 0, 1), rows("feed_forward", x))
  end
  if x.requires_grad then
    grads[1] = raw_matmul(dpre, up)
    set_leading(grads[1], x)
  end
  release(dpre)
  for _, name in ipairs{ "up_bias", "down_bias", "gamma", "beta" } do
    if node.at[name] then grads[node.at[name]] = grads[name] end
  end
  return grads
end
define(feed_op)
