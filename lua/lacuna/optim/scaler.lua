--- Loss scaling: training in f16 without losing small gradients.
--
-- f16 has no numbers between 0 and 6e-8, and many gradients live there. Multiplying the loss by a large S
-- moves all of them up by S; the optimizer divides by S in f32, before it clips and updates, so nothing but
-- rounding changes. The largest S that does not overflow is best, and it changes during a run: S starts high,
-- a step whose gradients hold an infinity or NaN is left out and S shrinks, and after `interval` good steps
-- it grows again (Micikevicius et al., "Mixed Precision Training", 2018, section 3.2). S is a power of two in
-- every default, so scaling itself never rounds. bf16 has the range of f32 and needs none of this.
--
-- The policy of mixed precision here: the model's tensors are f16 or bf16 (`dtype` of the model), every
-- kernel computes in f32 and keeps its statistics in f32 (log-sum-exp, means, losses), and the optimizer
-- updates f32 master copies (`master = true`). So there is no list of operators that are safe or not, no cast
-- in the middle of a model, and the scaler is the only state that training gains. Rejected: casting around
-- each operator (as much memory as f32, and a table of exceptions that the user has to know), and a static
-- scale (it is either too small or ends the run).

local schema = require "lacuna.schema"
local class = require "lacuna.class"
local config = require "lacuna.config"
local tensor = require "lacuna.tensor"

local fail = schema.fail
local Scaler = class("LossScaler", nil, true)
schema.refuse_new_fields(Scaler, function() return "; options are given to lac.optim.loss_scaler" end,
  "options")

local OPTIONS = {
  init = { type = "number", above = 0, default = 65536 },
  growth = { type = "number", above = 1, default = 2 },
  backoff = { type = "number", above = 0, below = 1, default = 0.5 },
  interval = { type = "integer", min = 1, default = 2000 },
  min = { type = "number", above = 0, default = 1 / 1024 },
  max = { type = "number", above = 0, default = 2 ^ 24 },
}

function Scaler:init(options)
  local o = schema.options("loss_scaler", options, OPTIONS)
  if o.min > o.max or o.init < o.min or o.init > o.max then
    fail("loss_scaler", "init must lie between min and max, got init %g, min %g, max %g", o.init, o.min,
      o.max)
  end
  self.options = config.settle("LossScaler", "options", o, "lac.optim.loss_scaler{ %s, ... }")
  self.value, self.good, self.skipped = o.init, 0, 0
  schema.complete(self)
end

function Scaler:__tostring()
  return ("LossScaler(%g, %d steps left out)"):format(self.value, self.skipped)
end

--- The loss times the scale: what backward() is called on.
-- @tparam Tensor loss with one element, f32 or f64 (losses are, whatever the model's dtype)
-- @treturn Tensor
-- @raise an f16 or bf16 loss, which the scale would overflow
function Scaler:scale(loss)
  tensor.expect("LossScaler:scale", "loss", loss)
  local dtype = loss:dtype()
  if dtype ~= "f32" and dtype ~= "f64" then
    fail("LossScaler:scale", "the loss must be f32 or f64, got %s: reduce it in f32", schema.show(loss))
  end
  return loss * self.value
end

--- Take note of a step. (optimizer:step{ scaler = ... } does this.)
-- @tparam boolean overflow whether its gradients were not finite, so that it is left out
-- @raise the scale is at its minimum and the gradients are still not finite
function Scaler:update(overflow)
  local o = self.options
  config.expect_settled(o)
  if not overflow then
    self.good = self.good + 1
    if self.good >= o.interval then self.value, self.good = math.min(self.value * o.growth, o.max), 0 end
    return
  end
  if self.value <= o.min then
    fail("LossScaler", "the gradients are not finite at the smallest scale, %g: it is not the scale that "
      .. "overflows (nan_watch finds the operator)", self.value)
  end
  self.value, self.good, self.skipped = math.max(self.value * o.backoff, o.min), 0, self.skipped + 1
end

--- What a resumed run needs.
-- @treturn table { value, good, skipped }, numbers
function Scaler:state_dict() return { value = self.value, good = self.good, skipped = self.skipped } end

--- Restore what state_dict gave.
-- @tparam table state
function Scaler:load_state_dict(state)
  local s = schema.options("LossScaler:load_state_dict", state, {
    value = { type = "number", above = 0, required = true },
    good = { type = "integer", min = 0, required = true },
    skipped = { type = "integer", min = 0, required = true } })
  self.value, self.good, self.skipped = s.value, s.good, s.skipped
end

-- a check of an option (schema.lua)
function Scaler.complain(v)
  return getmetatable(v) ~= Scaler and "must be a loss scaler (lac.optim.loss_scaler)" or nil
end

return Scaler
