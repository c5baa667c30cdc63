--- optim.lua: AdamW over lists of tensors, parameter groups, clipping, schedules.
--
-- One step is two calls of the engine however many parameters there are: the global norm of the gradients
-- (when clipping is on) and one AdamW update of the whole list, with the clipping factor folded in, so that
-- gradients are not written a second time. The array of item structs is built once and reused.
--
-- Groups are lists with their own learning rate and weight decay. optim.groups(model) makes the usual two:
-- decay for matrices, none for biases, normalisation gains and (unless asked) embeddings. It goes by the kind
-- that a module gives its parameters, not by their number of dimensions, which would decay a [heads, dim]
-- gain.
--
-- A schedule is a function step -> factor of the learning rate, so schedules compose by calling each other
-- and a test of one is arithmetic. Strict where frameworks are silent: a parameter without a gradient is an
-- error that names it (`skip_missing = true` allows it), and so is a norm that is not finite: an update by
-- NaN loses the whole run. Rejected: a Python-like optimiser loop over parameters (a call per tensor), state
-- hidden in parameters.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local class = require "lacuna.class"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"

local ffi, C = lib.ffi, lib.C
local fail = schema.fail

local optim = { schedule = {} }

-- ---- schedules --------------------------------------------------------------------------------------------

local schedule = optim.schedule

local function tail(op, options, extra)
  local spec = { steps = { type = "integer", min = 1, required = true },
                 min = { type = "number", min = 0, max = 1, default = 0 } }
  for name, rule in pairs(extra or {}) do spec[name] = rule end
  return schema.options(op, options, spec)
end

local function check_step(step)
  if type(step) ~= "number" then
    schema.fail("schedule", "step must be a number, got %s", schema.show(step))
  end
end

local function progress(step, steps)
  check_step(step)
  return math.max(0, math.min(1, step / steps))
end

--- Always `factor` (default 1).
-- @treturn function step -> factor
function schedule.constant(factor)
  if factor == nil then factor = 1 end
  schema.check("schedule.constant", "factor", factor, { type = "number", min = 0 })
  return function() return factor end
end

--- From 1 at step 0 to `min` at step `steps` along half a cosine, then `min`.
-- @tparam table options steps; min = 0
function schedule.cosine(options)
  local o = tail("schedule.cosine", options)
  return function(step) return o.min + (1 - o.min) * 0.5 * (1 + math.cos(math.pi * progress(step,
    o.steps))) end
end

--- From 1 at step 0 to `min` at step `steps` along a line, then `min`.
function schedule.linear(options)
  local o = tail("schedule.linear", options)
  return function(step) return 1 - (1 - o.min) * progress(step, o.steps) end
end

--- min + (1 - min) (1 - step/steps)^power, then `min`.
-- @tparam table options steps; min = 0; power = 1
function schedule.polynomial(options)
  local o = tail("schedule.polynomial", options, { power = { type = "number", above = 0, default = 1 } })
  return function(step) return o.min + (1 - o.min) * (1 - progress(step, o.steps)) ^ o.power end
end

--- A line from 1/warmup at step 1 to 1 at step `warmup`; after that `inner`, which starts counting there.
-- @tparam integer warmup steps, 0 or more
-- @tparam[opt] function inner a schedule (default constant)
function schedule.warmup(warmup, inner)
  schema.check("schedule.warmup", "warmup", warmup, { type = "integer", min = 0 })
  inner = inner or schedule.constant()
  schema.check("schedule.warmup", "inner", inner, { type = "function" })
  return function(step)
    check_step(step)
    if step <= warmup then return step / warmup * inner(0) end
    return inner(step - warmup)
  end
end

-- ---- groups -----------------------------------------------------------------------------------------------

--- Two parameter groups of a module: with weight decay, and without (biases, normalisation, embeddings).
-- @tparam Module model
-- @tparam[opt] table options weight_decay = 0.01; decay_embeddings = false
-- @treturn table groups for optim.adamw
function optim.groups(model, options)
  local o = schema.options("optim.groups", options, {
    weight_decay = { type = "number", min = 0, default = 0.01 },
    decay_embeddings = { type = "boolean", default = false },
  })
  if type(model) ~= "table" or rawget(model, "_params") == nil then -- what every module has (nn/module.lua)
    schema.fail("optim.groups", "model must be a module, got %s", schema.show(model))
  end
  local decay = { names = {}, weight_decay = o.weight_decay }
  local plain = { names = {}, weight_decay = 0 }
  for _, p in ipairs(model:parameter_list()) do
    local into = (p.kind == "weight" or (p.kind == "embedding" and o.decay_embeddings)) and decay or plain
    into[#into + 1] = p.tensor
    into.names[#into] = p.name
  end
  local groups = {}
  if #decay > 0 then groups[1] = decay end
  if #plain > 0 then groups[#groups + 1] = plain end
  return groups
end

-- ---- AdamW ------------------------------------------------------------------------------------------------

local AdamW = class("AdamW", nil, true)

local GROUP = { lr = { type = "number", min = 0 }, weight_decay = { type = "number", min = 0 },
  names = { type = "table" } }
local OPTIONS = {
  lr = { type = "number", min = 0, default = 1e-3 },
  betas = { type = "numbers", min = 0, below = 1, default = { 0.9, 0.999 },
            check = function(v) return #v ~= 2 and "must be {beta1, beta2}" or nil end },
  eps = { type = "number", above = 0, default = 1e-8 },
  weight_decay = { type = "number", min = 0, default = 0.01 },
  skip_missing = { type = "boolean", default = false },
}

local function zeros_like(p)
  local m = tensor.empty_like(p, p.c.dtype == C.LAC_F64 and C.LAC_F64 or C.LAC_F32)
  lib.check(C.lac_fill(m.c, 0))
  scope.follow(m, p)
  return m
end

-- a model, a list of tensors, or a list of groups -> list of groups
local function as_groups(params, weight_decay)
  if type(params) == "table" and not tensor.is(params) then
    if type(rawget(params, "_params")) == "table" then return optim.groups(params,
      { weight_decay = weight_decay }) end
    if tensor.is(params[1]) then return { params } end
    if type(params[1]) == "table" and tensor.is(params[1][1]) then return params end
  end
  fail("adamw", "expected a module, a list of tensors or a list of groups, got %s", schema.show(params))
end

function AdamW:init(params, options)
  local o = schema.options("adamw", options, OPTIONS)
  self.lr, self.betas, self.eps, self.skip_missing = o.lr, o.betas, o.eps, o.skip_missing
  self.steps, self.entries = 0, {}
  local seen = {}
  for g, group in ipairs(as_groups(params, o.weight_decay)) do
    local named = {}
    for key, value in pairs(group) do
      if type(key) == "string" then named[key] = value end
    end
    named = schema.options(("adamw: group %d"):format(g), named, GROUP)
    for i, p in ipairs(group) do
      local name = named.names and named.names[i] or ("%d.%d"):format(g, i)
      tensor.expect("adamw", name, p)
      if seen[p] then fail("adamw", "parameter '%s' is listed twice, before as '%s'", name, seen[p]) end
      if not p.requires_grad then fail("adamw", "parameter '%s' does not require a gradient", name) end
      if not tensor.is_contiguous(p) then
        fail("adamw", "parameter '%s' is not contiguous: %s", name, schema.show(p))
      end
      seen[p] = name
      self.entries[#self.entries + 1] = { name = name, param = p, m = zeros_like(p), v = zeros_like(p),
        lr = named.lr or o.lr, weight_decay = named.weight_decay or o.weight_decay }
    end
  end
  local n = #self.entries
  if n == 0 then fail("adamw", "there are no parameters") end
  self.items = ffi.new("lac_adamw_item[?]", n)
  self.grads = ffi.new("const lac_tensor *[?]", n)
  self.norm_out = ffi.new("double[1]")
end

function AdamW:__tostring()
  return ("AdamW(%d parameters, lr %g, betas {%g, %g}, eps %g, %d steps)")
    :format(#self.entries, self.lr, self.betas[1], self.betas[2], self.eps, self.steps)
end

-- entries with gradients into self.items and self.grads; returns how many, and a list that keeps copies alive
local function collect(self, factor)
  local n, alive = 0, {}
  for _, e in ipairs(self.entries) do
    local grad = e.param.grad
    if grad == nil then
      if not self.skip_missing then
        fail("adamw", "parameter '%s' has no gradient: it took no part in the loss, or backward() was not "
          .. "called (skip_missing = true allows it)", e.name)
      end
    else
      grad = tensor.contiguous(grad)
      alive[#alive + 1] = grad
      local item = self.items[n]
      item.param, item.grad, item.m, item.v = e.param.c, grad.c, e.m.c, e.v.c
      item.lr, item.weight_decay = e.lr * factor, e.weight_decay
      self.grads[n] = grad.c
      e.at = n
      n = n + 1
    end
  end
  return n, alive
end

local function complain_not_finite(self, norm)
  for _, e in ipairs(self.entries) do
    if e.param.grad then
      self.grads[0] = tensor.contiguous(e.param.grad).c
      lib.call(C.lac_norm_many, self.grads, 1, self.norm_out)
      local own = self.norm_out[0]
      if own ~= own or own == math.huge then
        fail("adamw", "the gradient norm is %s before step %d; the first that is not finite belongs to '%s'",
          schema.show(norm), self.steps + 1, e.name)
      end
    end
  end
  fail("adamw", "the gradient norm is %s before step %d", schema.show(norm), self.steps + 1)
end

--- Global 2-norm of all gradients.
-- @treturn number
function AdamW:grad_norm()
  local n, alive = collect(self, 1)
  lib.call(C.lac_norm_many, self.grads, n, self.norm_out)
  return self.norm_out[0], #alive
end

--- One update of every parameter from its gradient.
-- @tparam[opt] table options factor = 1 (of the learning rate, from a schedule); clip = largest global norm
--   (gradients are scaled down to it; default: no clipping)
-- @treturn ?number the global norm before clipping, when clip is given
-- @raise a parameter has no gradient; the norm is not finite (nothing is changed then)
function AdamW:step(options)
  local o = schema.options("adamw.step", options, {
    factor = { type = "number", min = 0, default = 1 }, clip = { type = "number", above = 0 } })
  local n, alive = collect(self, o.factor)
  if n == 0 then fail("adamw", "no parameter has a gradient: call backward() before step()") end
  local norm, scale = nil, 1
  if o.clip then
    lib.call(C.lac_norm_many, self.grads, n, self.norm_out)
    norm = self.norm_out[0]
    if norm ~= norm or norm == math.huge then complain_not_finite(self, norm) end
    if norm > o.clip then scale = o.clip / norm end
  end
  self.steps = self.steps + 1
  lib.call(C.lac_adamw_many, self.items, n, self.betas[1], self.betas[2], self.eps, self.steps, scale)
  for _, e in ipairs(self.entries) do tensor.touch(e.param) end
  alive[1] = nil -- the list must live until here
  return norm
end

--- Forget all gradients.
-- @tparam[opt] table options release = false: give their memory back at once instead of when the collector
--   comes; a gradient that the script has kept elsewhere is then released too
function AdamW:zero_grad(options)
  local o = schema.options("adamw.zero_grad", options, { release = { type = "boolean", default = false } })
  for _, e in ipairs(self.entries) do
    local grad = e.param.grad
    if grad then
      if o.release and grad.root == grad then lib.check(C.lac_tensor_release(grad.c)) end
      e.param.grad = nil
    end
  end
end

--- Everything that a continued run needs, as tensors and one number.
-- @treturn table { ["m.<name>"] = tensor, ["v.<name>"] = tensor, ... } (the tensors themselves, not copies)
-- @treturn number steps done
function AdamW:state_dict()
  local state = {}
  for _, e in ipairs(self.entries) do
    state["m." .. e.name], state["v." .. e.name] = e.m, e.v
  end
  return state, self.steps
end

--- Restore what state_dict gave. All names and shapes are checked before anything is changed.
-- @tparam table state
-- @tparam integer steps
function AdamW:load_state_dict(state, steps)
  schema.check("adamw.load_state_dict", "steps", steps, { type = "integer", min = 0 })
  schema.check("adamw.load_state_dict", "state", state, { type = "table" })
  local own = self:state_dict()
  for name in pairs(state) do
    if not own[name] then
      fail("adamw.load_state_dict", "unexpected '%s', did you mean '%s'?", tostring(name),
        schema.nearest(tostring(name), schema.keys(own)))
    end
  end
  for name, t in pairs(own) do
    local given = state[name]
    if not tensor.is(given) then fail("adamw.load_state_dict", "'%s' is missing", name) end
    if not tensor.same_shape(t, given) then
      fail("adamw.load_state_dict", "'%s' is %s here and %s in the state", name, schema.show(t),
        schema.show(given))
    end
  end
  for name, t in pairs(own) do lib.call(C.lac_copy, state[name].c, t.c) end
  self.steps = steps
end

--- AdamW (Loshchilov and Hutter 2019, algorithm 2: decoupled weight decay).
-- @tparam Module|table params a module (then grouped by optim.groups), a list of tensors, or a list of
--   groups: each a list of tensors with optional fields lr, weight_decay, names
-- @tparam[opt] table options lr = 1e-3, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0.01, skip_missing =
--   false
-- @treturn AdamW
function optim.adamw(params, options) return AdamW(params, options) end

return optim
