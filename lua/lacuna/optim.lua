--- optim.lua: AdamW, Adam, SGD and Lion over lists of tensors, parameter groups, clipping.
--
-- One step is two calls of the engine however many parameters there are: the global norm of the gradients
-- (when clipping is on) and one update of the whole list, with the clipping factor folded in, so that
-- gradients are not written a second time. The array of item structs is built once and reused. What all
-- optimizers share is one base class: groups, clipping, state, errors; a kind adds its options, the names of
-- its moments and one call. Schedules are in optim/schedule.lua.
--
-- Groups are lists with their own learning rate and weight decay. optim.groups(model) makes the usual two:
-- decay for matrices, none for biases, normalisation gains and (unless asked) embeddings. It goes by the kind
-- that a module gives its parameters, not by their number of dimensions, which would decay a [heads, dim]
-- gain.
--
-- f16 and bf16 parameters lose small updates: an increment below half a unit in the last place rounds to
-- nothing. `master = true` keeps an f32 copy of each, which is what is updated. Strict where frameworks are
-- silent: a parameter without a gradient is an error that names it (`skip_missing = true` allows it), and so
-- is a norm that is not finite: an update by NaN loses the whole run. Rejected: a Python-like optimiser loop
-- over parameters (a call per tensor), state hidden in parameters.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local synonyms = require "lacuna.synonyms"
local class = require "lacuna.class"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"

local ffi, C = lib.ffi, lib.C
local fail = schema.fail

local Scaler = require "lacuna.optim.scaler"

local optim = { schedule = require "lacuna.optim.schedule" }

-- ---- groups -----------------------------------------------------------------------------------------------

-- decay: the weight decay of those that have one; nil: what the optimizer's field says
local function by_kind(model, decay, decay_embeddings)
  local decayed, plain = { names = {}, weight_decay = decay }, { names = {}, weight_decay = 0 }
  for _, p in ipairs(model:parameter_list()) do
    local into = (p.kind == "weight" or (p.kind == "embedding" and decay_embeddings)) and decayed or plain
    into[#into + 1] = p.tensor
    into.names[#into] = p.name
  end
  local groups = {}
  if #decayed > 0 then groups[1] = decayed end
  if #plain > 0 then groups[#groups + 1] = plain end
  return groups
end

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
  return by_kind(model, o.weight_decay, o.decay_embeddings)
end

-- ---- what all optimizers share ----------------------------------------------------------------------------

local Optimizer = class("Optimizer", nil, true)
Optimizer.__words = synonyms.optimizer

local GROUP = { lr = { type = "number", min = 0 }, weight_decay = { type = "number", min = 0 },
  names = { type = "table" } }

-- options of every kind; a kind adds its own
local function with_common(defaults, extra)
  local spec = {
    lr = { type = "number", min = 0, default = defaults.lr },
    weight_decay = { type = "number", min = 0, default = defaults.weight_decay },
    skip_missing = { type = "boolean", default = false },
    master = { type = "boolean", default = false },
  }
  for name, rule in pairs(extra) do spec[name] = rule end
  return spec
end

-- state beside a parameter, in the parameter's scope; a copy of it or zeros
local function beside(p, filled)
  local t = tensor.empty_like(p, p.c.dtype == C.LAC_F64 and C.LAC_F64 or C.LAC_F32)
  lib.check(filled and C.lac_copy(p.c, t.c) or C.lac_fill(t.c, 0))
  scope.follow(t, p)
  return t
end

local function is_module(params)
  return type(params) == "table" and type(rawget(params, "_params")) == "table"
end

-- a model, a list of tensors, or a list of groups -> list of groups
local function as_groups(op, params)
  if type(params) == "table" and not tensor.is(params) then
    if is_module(params) then return by_kind(params, nil, false) end
    if tensor.is(params[1]) then return { params } end
    if type(params[1]) == "table" and tensor.is(params[1][1]) then return params end
  end
  local group = type(params) == "table" and params[1] or nil
  fail(op, "expected a module, a list of tensors or a list of groups, got %s%s", schema.show(params),
    type(group) == "table" and rawget(group, "params")
    and ": a group is a list itself, { tensor, tensor, lr = 1e-3 }" or "")
end

local function new_entry(self, p, name, seen)
  local op = self.op
  tensor.expect(op, name, p)
  if seen[p] then fail(op, "parameter '%s' is listed twice, before as '%s'", name, seen[p]) end
  if not p.requires_grad then
    fail(op, "parameter '%s' does not require a gradient; if it is frozen, give a list of the others", name)
  end
  if p.node then
    fail(op, "parameter '%s' is the result of an operator, %s, so backward() gives it no gradient; "
      .. "an optimizer takes leaves (x:detach():requires_grad_())", name, schema.show(p))
  end
  if not tensor.is_contiguous(p) then
    fail(op, "parameter '%s' is not contiguous: %s", name, schema.show(p))
  end
  seen[p] = name
  local e = { name = name, param = p, steps = 0 }
  for _, part in ipairs(self.parts) do e[part] = beside(p, false) end
  if self.master and (p.c.dtype == C.LAC_F16 or p.c.dtype == C.LAC_BF16) then
    e.master, e.version = beside(p, true), p.root.version
  end
  return e
end

-- o: options that the kind has checked; given: the script's; op: what starts messages; parts: the moments
function Optimizer:setup(op, parts, params, o, given)
  self.op, self.parts = op, parts
  self.lr, self.weight_decay, self.skip_missing, self.master = o.lr, o.weight_decay, o.skip_missing, o.master
  self.steps, self.entries = 0, {}
  local seen = {}
  for g, group in ipairs(as_groups(op, params)) do
    local named = {}
    for key, value in pairs(group) do
      if type(key) == "string" then named[key] = value end
    end
    named = schema.options(("%s: group %d"):format(op, g), named, GROUP)
    for i, p in ipairs(group) do
      local e = new_entry(self, p, named.names and named.names[i] or ("%d.%d"):format(g, i), seen)
      e.lr, e.weight_decay = named.lr, named.weight_decay -- nil: as the optimizer has it at a step
      self.entries[#self.entries + 1] = e
    end
  end
  local n = #self.entries
  if n == 0 then fail(op, "there are no parameters") end
  for name in pairs(given or {}) do -- what every group has itself, the optimizer's own is not read
    local read = not GROUP[name] or is_module(params)
    for i = 1, n do read = read or self.entries[i][name] == nil end
    if not read then
      fail(op, "%s = %s does nothing: every group has a %s of its own", name, schema.show(given[name]), name)
    end
  end
  self.items = ffi.new("lac_optim_item[?]", n)
  self.grads = ffi.new("const lac_tensor *[?]", n)
  self.norm_out = ffi.new("double[1]")
  schema.complete(self)
end

Optimizer._check = false -- of a kind: whether the fields that were set go together

function Optimizer:__tostring()
  return ("%s(%d parameters, lr %g%s, %d steps)"):format(rawget(getmetatable(self), "__name"), #self.entries,
    self.lr, self:extra(), self.steps)
end

-- an update of a tensor that its module has not any more would train nothing
local function expect_in_place(self, e)
  local home = rawget(e.param, "parameter")
  if not home then return end
  local module, field = home()
  if module and rawget(module, field) ~= e.param then
    fail(self.op, "parameter '%s' is not the '%s' of its %s any more: another tensor was put there after the "
      .. "optimizer was made. Make the optimizer anew, or leave the parameter and copy the values into it: "
      .. "lac.no_grad(function() m.%s:copy_(values) end)", e.name, field,
      rawget(getmetatable(module), "__name"), field)
  end
end

-- gradients into self.grads; returns how many, and two lists: the entries that have one, and the (contiguous)
-- gradients themselves, which must live as long as self.grads is used
local function collect(self)
  local taken, alive = {}, {}
  for _, e in ipairs(self.entries) do
    local grad = e.param.grad
    expect_in_place(self, e)
    if grad == nil then
      if not self.skip_missing then
        fail(self.op, "parameter '%s' has no gradient: it took no part in the loss, or backward() was not "
          .. "called (skip_missing = true allows it)", e.name)
      end
    else
      local n = #taken
      taken[n + 1], alive[n + 1] = e, tensor.contiguous(grad)
      self.grads[n] = alive[n + 1].c
    end
  end
  return #taken, taken, alive
end

local function fill_item(self, item, e, grad, factor)
  local p = e.param
  item.param, item.grad, item.m, item.v = p.c, grad.c, e.m and e.m.c, e.v and e.v.c
  item.lr, item.weight_decay = (e.lr or self.lr) * factor, e.weight_decay or self.weight_decay
  item.master = e.master and e.master.c
  if e.master and e.version ~= p.root.version then -- somebody else has changed the parameter: follow it
    lib.call(C.lac_copy, p.c, e.master.c)
  end
end

-- entries and gradients into self.items, those that have made equally many steps together; returns where such
-- a run of items begins and how many steps it has made, and a last one past the end
local function fill_items(self, taken, alive, factor)
  local counts, seen, runs, n = {}, {}, {}, 0
  for i = 1, #taken do
    local steps = taken[i].steps
    if not seen[steps] then counts[#counts + 1], seen[steps] = steps, true end
  end
  table.sort(counts)
  for k, steps in ipairs(counts) do
    runs[k] = { first = n, steps = steps }
    for i = 1, #taken do
      if taken[i].steps == steps then
        fill_item(self, self.items[n], taken[i], alive[i], factor)
        n = n + 1
      end
    end
  end
  runs[#runs + 1] = { first = n }
  return runs
end

local function complain_not_finite(self, norm)
  for _, e in ipairs(self.entries) do
    if e.param.grad then
      self.grads[0] = tensor.contiguous(e.param.grad).c
      lib.call(C.lac_norm_many, self.grads, 1, self.norm_out)
      local own = self.norm_out[0]
      if own ~= own or own == math.huge then
        fail(self.op, "the gradient norm is %s before step %d; the first that is not finite belongs to '%s'",
          schema.show(norm), self.steps + 1, e.name)
      end
    end
  end
  fail(self.op, "the gradient norm is %s before step %d", schema.show(norm), self.steps + 1)
end

--- Global 2-norm of all gradients.
-- @treturn number
function Optimizer:grad_norm()
  local n, _, alive = collect(self)
  lib.call(C.lac_norm_many, self.grads, n, self.norm_out)
  alive[1] = nil -- the list must live until here
  return self.norm_out[0]
end

local registry = debug.getregistry()

-- The command's Ctrl-C (c/interrupt.c) waits while registry["lacuna.finish_first"] is set, or the weights
-- would have made a step that nothing counts; the engine does not stop in an update. One run, unless
-- parameters were skipped.
local function update_and_count(self, runs, taken, scale, limit)
  for k = 1, #runs - 1 do
    local run, count = runs[k], runs[k + 1].first - runs[k].first
    self:update(self.items + run.first, count, run.steps + 1, scale, limit)
  end
  self.steps = self.steps + 1
  for _, e in ipairs(taken) do
    e.steps = e.steps + 1
    tensor.touch(e.param)
    if e.master then e.version = e.param.root.version end
  end
end

local COMMON = with_common({}, {})
COMMON.master = nil -- settled

-- fields that a script may set between steps
local function check_fields(self)
  for name, rule in pairs(COMMON) do schema.check(self.op, name, self[name], rule) end
  for name, rule in pairs(self.rules) do schema.check(self.op, name, self[name], rule) end
  if self._check then self:_check() end
end

local STEP = { factor = { type = "number", min = 0, default = 1 }, clip = { type = "number", above = 0 },
               clip_value = { type = "number", above = 0 },
               scaler = { type = "table", check = Scaler.complain } }

--- One update of every parameter from its gradient.
-- @tparam[opt] table options factor = 1 (of the learning rate, from a schedule); clip = largest global norm
--   (gradients are scaled down to it), or clip_value = largest absolute value of an element (gradients are
--   clamped to it); default: no clipping; scaler = the LossScaler that scaled the loss: gradients are
--   divided by its scale first, and if they are not finite the step is left out
-- @treturn ?number the global norm before clipping, when clip or scaler is given
-- @treturn ?boolean true if the scaler left the step out: no parameter has changed
-- @raise a parameter has no gradient; the norm is not finite and there is no scaler (nothing is changed then)
function Optimizer:step(options)
  local op = self.op
  local o = schema.options(op .. ".step", options, STEP)
  if o.clip and o.clip_value then
    fail(op .. ".step", "clip (by norm) and clip_value exclude each other, got %g and %g", o.clip,
      o.clip_value)
  end
  check_fields(self)
  local n, taken, alive = collect(self)
  if n == 0 then fail(op, "no parameter has a gradient: call backward() before step()") end
  local norm, scale = nil, 1
  if o.clip or o.scaler then
    lib.call(C.lac_norm_many, self.grads, n, self.norm_out)
    norm = self.norm_out[0]
    local finite = norm == norm and norm ~= math.huge
    if o.scaler then
      scale = 1 / o.scaler.value
      o.scaler:update(not finite)
      if not finite then return norm, true end
      norm = norm * scale
    end
    if not finite then complain_not_finite(self, norm) end
    if o.clip and norm > o.clip then scale = scale * (o.clip / norm) end
  end
  local runs = fill_items(self, taken, alive, o.factor)
  registry["lacuna.finish_first"] = true
  local done, reason = pcall(update_and_count, self, runs, taken, scale, o.clip_value or 0)
  registry["lacuna.finish_first"] = false
  if not done then error(reason, 0) end
  alive[1] = nil
  return norm
end

--- Forget all gradients.
-- @tparam[opt] table options release = false: give their memory back at once instead of when the collector
--   comes; a gradient that the script has kept elsewhere is then released too
function Optimizer:zero_grad(options)
  local o = schema.options(self.op .. ".zero_grad", options,
    { release = { type = "boolean", default = false } })
  for _, e in ipairs(self.entries) do
    local grad = e.param.grad
    if grad then
      if o.release and grad.root == grad then lib.check(C.lac_tensor_release(grad.c)) end
      e.param.grad = nil
    end
  end
end

local function state_tensors(self)
  local state = {}
  for _, e in ipairs(self.entries) do
    for _, part in ipairs(self.parts) do state[part .. "." .. e.name] = e[part] end
    if e.master then state["master." .. e.name] = e.master end
  end
  return state
end

--- Everything that a continued run needs, as tensors and one number.
-- @treturn table { ["m.<name>"] = tensor, ["v.<name>"] = tensor, ["master.<name>"] = tensor, ... }: what the
--   kind has (the tensors themselves, not copies), and ["steps.<name>"] = i64 [] of a parameter that was
--   skipped (skip_missing) and so has made fewer steps than the optimizer
-- @treturn number steps done
function Optimizer:state_dict()
  local state = state_tensors(self)
  for _, e in ipairs(self.entries) do
    if e.steps ~= self.steps then
      local t = tensor.empty(C.LAC_I64, C.LAC_CPU, {}, 0)
      lib.call(C.lac_fill, t.c, e.steps)
      state["steps." .. e.name] = t
    end
  end
  return state, self.steps
end

-- steps of each entry by its name, from what state holds of them
local function counts_of(self, op, state, steps)
  local counts = {}
  for _, e in ipairs(self.entries) do
    local t = state["steps." .. e.name]
    if t ~= nil then
      if not tensor.is(t) or tensor.numel(t) ~= 1 then
        fail(op, "'steps.%s' must be a number of steps, got %s", e.name, schema.show(t))
      end
      counts[e.name] = tonumber(t:item())
      schema.check(op, "steps." .. e.name, counts[e.name], { type = "integer", min = 0, max = steps })
    end
  end
  return counts
end

--- Restore what state_dict gave. All names and shapes are checked before anything is changed. Load a model's
-- parameters first: an f32 master copy follows its parameter when something else changes that.
-- @tparam table state
-- @tparam integer steps
function Optimizer:load_state_dict(state, steps)
  local op = self.op .. ".load_state_dict"
  schema.check(op, "steps", steps, { type = "integer", min = 0 })
  schema.check(op, "state", state, { type = "table" })
  local own, counts = state_tensors(self), counts_of(self, op, state, steps)
  for name in pairs(state) do
    if not own[name] and not counts[tostring(name):match("^steps%.(.*)$")] then
      fail(op, "unexpected '%s'%s", tostring(name), schema.hint(name, schema.keys(own)))
    end
  end
  for _, name in ipairs(schema.keys(own)) do
    local t, given = own[name], state[name]
    if not tensor.is(given) then fail(op, "'%s' is missing", name) end
    if not tensor.same_shape(t, given) then
      fail(op, "'%s' is %s here and %s in the state", name, schema.show(t), schema.show(given))
    end
  end
  for name, t in pairs(own) do lib.call(C.lac_copy, state[name].c, t.c) end
  for _, e in ipairs(self.entries) do
    if e.master then e.version = e.param.root.version end
    e.steps = counts[e.name] or steps
  end
  self.steps = steps
end

--- What the run's numbers depend on beside the state: kind and options, for checkpoints.
-- @treturn table JSON-like
function Optimizer:config()
  local config = { kind = self.op, lr = self.lr, weight_decay = self.weight_decay, master = self.master }
  for name in pairs(self.rules) do config[name] = self[name] end
  return config
end

-- ---- kinds ------------------------------------------------------------------------------------------------

local function define(name)
  local cls = class(name, Optimizer, true)
  schema.refuse_new_fields(cls, function(self, key)
    if key == "master" then
      return ("; make another: lac.optim.%s(parameters, { master = %s, ... })"):format(self.op,
        tostring(not self.master))
    end
    local names = schema.keys(self.rules)
    names[#names + 1], names[#names + 2], names[#names + 3] = "lr", "weight_decay", "skip_missing"
    return ("%s; there are %s"):format(schema.hint(tostring(key), names, nil, synonyms.optimizer),
      table.concat(names, ", "))
  end, "op parts rules coupled master")
  cls.__tostring = Optimizer.__tostring
  return cls
end

local function betas(a, b)
  return { type = "numbers", min = 0, below = 1, default = { a, b },
           check = function(v) return #v ~= 2 and "must be {beta1, beta2}" or nil end }
end

local AdamW = define("AdamW")
local ADAM_OPTIONS = { betas = betas(0.9, 0.999), eps = { type = "number", above = 0, default = 1e-8 } }
local ADAMW = with_common({ lr = 1e-3, weight_decay = 0.01 }, ADAM_OPTIONS)
local ADAM = with_common({ lr = 1e-3, weight_decay = 0 }, ADAM_OPTIONS)

function AdamW:init(params, options, coupled)
  local o = schema.options(coupled and "adam" or "adamw", options, coupled and ADAM or ADAMW)
  self.rules, self.betas, self.eps, self.coupled = ADAM_OPTIONS, o.betas, o.eps, coupled and 1 or 0
  self:setup(coupled and "adam" or "adamw", { "m", "v" }, params, o, options)
end

function AdamW:extra()
  return (", betas {%g, %g}, eps %g"):format(self.betas[1], self.betas[2], self.eps)
end

function AdamW:update(items, n, step, scale, limit)
  lib.call(C.lac_adamw_many, items, n, self.betas[1], self.betas[2], self.eps, self.coupled, step, scale,
    limit)
end

local Adam = define("Adam")
Adam.extra, Adam.update = AdamW.extra, AdamW.update
function Adam:init(params, options) AdamW.init(self, params, options, true) end

local SGD = define("SGD")
local SGD_OPTIONS = { momentum = { type = "number", min = 0, below = 1, default = 0 },
  dampening = { type = "number", min = 0, max = 1, default = 0 },
  nesterov = { type = "boolean", default = false } }
local SGD_ALL = with_common({ weight_decay = 0 }, SGD_OPTIONS)
SGD_ALL.lr = { type = "number", min = 0, required = true }

-- o: options, or the optimizer itself
local function check_momentum(o)
  if o.nesterov and (o.momentum == 0 or o.dampening ~= 0) then
    fail("sgd", "nesterov needs momentum and no dampening, got momentum %g and dampening %g", o.momentum,
      o.dampening)
  end
  if o.dampening ~= 0 and o.momentum == 0 then
    fail("sgd", "dampening %g is of the momentum, and there is none", o.dampening)
  end
end

function SGD:_check()
  check_momentum(self)
  if self.momentum > 0 and #self.parts == 0 then
    fail("sgd", "momentum was set to %g, but the optimizer was made with 0 and keeps none; make another: "
      .. "lac.optim.sgd(parameters, { lr = %g, momentum = %g })", self.momentum, self.lr, self.momentum)
  end
end

function SGD:init(params, options)
  local o = schema.options("sgd", options, SGD_ALL)
  check_momentum(o)
  self.rules = SGD_OPTIONS
  self.momentum, self.dampening, self.nesterov = o.momentum, o.dampening, o.nesterov
  self:setup("sgd", o.momentum > 0 and { "m" } or {}, params, o, options)
end

function SGD:extra()
  return (", momentum %g%s"):format(self.momentum, self.nesterov and ", nesterov" or "")
end

function SGD:update(items, n, step, scale, limit)
  lib.call(C.lac_sgd_many, items, n, self.momentum, self.dampening, self.nesterov and 1 or 0, 1, step,
    scale, limit)
end

local Lion = define("Lion")
local LION_OPTIONS = { betas = betas(0.9, 0.99) }
local LION = with_common({ lr = 1e-4, weight_decay = 0.01 }, LION_OPTIONS)

function Lion:init(params, options)
  local o = schema.options("lion", options, LION)
  self.rules, self.betas = LION_OPTIONS, o.betas
  self:setup("lion", { "m" }, params, o, options)
end

function Lion:extra() return (", betas {%g, %g}"):format(self.betas[1], self.betas[2]) end

function Lion:update(items, n, _, scale, limit)
  lib.call(C.lac_lion_many, items, n, self.betas[1], self.betas[2], scale, limit)
end

--- Dynamic loss scaling for f16 (optim/scaler.lua says how and why).
-- @tparam[opt] table options init = 65536; growth = 2, after interval = 2000 good steps; backoff = 0.5, after
--   a step whose gradients are not finite; min = 1 / 1024, max = 2 ^ 24
-- @treturn LossScaler
-- @usage
--     local layer = lac.nn.Linear(4, 2, { dtype = "f16" })
--     local optimizer, scaler = lac.optim.adamw(layer, { master = true }), lac.optim.loss_scaler()
--     local loss = layer(lac.randn{ 8, 4, dtype = "f16" }):float():square():mean()
--     scaler:scale(loss):backward()
--     local norm, left_out = optimizer:step{ scaler = scaler, clip = 1 }
--     print(norm, left_out and "left out" or "done", scaler)
function optim.loss_scaler(options) return Scaler(options) end

--- AdamW (Loshchilov and Hutter 2019, algorithm 2: decoupled weight decay). The fields lr, weight_decay,
-- betas and eps may be set between steps; groups that name their own lr or weight_decay keep it, as do a
-- module's biases, norms and embeddings, which do not decay.
-- @tparam Module|table params a module (then grouped by optim.groups), a list of tensors, or a list of
--   groups: each a list of tensors with optional fields lr, weight_decay, names
-- @tparam[opt] table options lr = 1e-3, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0.01; skip_missing =
--   false (a parameter without a gradient is left alone; the bias correction goes by its own steps); master =
--   false (f32 copies of f16 and bf16 parameters are what is updated)
-- @treturn AdamW
-- @usage
--     local layer = lac.nn.Linear(4, 2)
--     local optimizer = lac.optim.adamw(layer, { lr = 1e-2, weight_decay = 0.1 })
--     layer(lac.randn{ 8, 4 }):square():mean():backward()
--     print(optimizer:step{ clip = 1 }) -- the norm of the gradients
--     optimizer:zero_grad()
--     optimizer.lr = 1e-3 -- of the steps that follow
function optim.adamw(params, options) return AdamW(params, options) end

--- Adam (Kingma and Ba 2015, algorithm 1); weight decay is added to the gradient (L2).
-- @tparam Module|table params @tparam[opt] table options as for adamw, but weight_decay = 0
-- @usage
--     local x = lac.ones{ 3, grad = true }
--     local optimizer = lac.optim.adam({ x }, { lr = 0.1 })
--     x:square():sum():backward()
--     optimizer:step()
--     print(x)
function optim.adam(params, options) return Adam(params, options) end

--- Stochastic gradient descent: m = momentum m + (1 - dampening) g, parameter -= lr m; with nesterov
-- (Sutskever et al. 2013) parameter -= lr (g + momentum m). The first step of a parameter sets m = g. Weight
-- decay is added to g (L2).
-- @tparam Module|table params as for adamw
-- @tparam table options lr; momentum = 0, dampening = 0, nesterov = false, weight_decay = 0; skip_missing,
--   master as for adamw
-- @usage
--     local x = lac.ones{ 3, grad = true }
--     local optimizer = lac.optim.sgd({ x }, { lr = 0.1, momentum = 0.9 })
--     x:square():sum():backward()
--     optimizer:step()
--     print(x)
function optim.sgd(params, options) return SGD(params, options) end

--- Lion (Chen et al. 2023, algorithm 2): parameter -= lr (sign(beta1 m + (1 - beta1) g) + weight_decay
-- parameter), then m = beta2 m + (1 - beta2) g. Learning rates are 3 to 10 times smaller than AdamW's, weight
-- decays as much larger.
-- @tparam Module|table params as for adamw
-- @tparam[opt] table options lr = 1e-4, betas = {0.9, 0.99}, weight_decay = 0.01; skip_missing, master as for
--   adamw
-- @usage
--     local x = lac.ones{ 3, grad = true }
--     local optimizer = lac.optim.lion({ x }, { lr = 0.01 })
--     x:square():sum():backward()
--     optimizer:step()
--     print(x)
function optim.lion(params, options) return Lion(params, options) end

for kind, rules in pairs{ adamw = ADAMW, adam = ADAM, sgd = SGD_ALL, lion = LION } do
  schema.describe(optim[kind], rules)
end

return optim
