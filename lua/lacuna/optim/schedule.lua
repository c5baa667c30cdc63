--- Learning-rate schedules: functions step -> factor.
--
-- A schedule is a function of the step's number and of nothing else, so schedules compose by calling each
-- other (warmup(500, cosine{...}); restarts of anything), a resumed run needs no state of its schedule, and a
-- test of one is arithmetic. The factor multiplies the learning rate of every group of an optimizer
-- (optimizer:step{ factor = f(step) }; train.fit does that).
--
-- Steps count from 1 in training; a schedule may be asked for step 0, where every decay starts at 1. A decay
-- that has ended stays at its last value. Rejected: scheduler objects that are stepped beside the optimizer
-- and can get out of step with it; schedules that set absolute rates, which would hide the rates of groups.

local schema = require "lacuna.schema"

local schedule = {}

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
-- @tparam table options steps; min = 0
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
    if step <= warmup and warmup > 0 then return step / warmup * inner(0) end
    return inner(step - warmup)
  end
end

--- sqrt(timescale / max(step, timescale)): 1 until step `timescale`, then falling as 1/sqrt(step) without an
-- end (Vaswani et al. 2017, section 5.3, has timescale = its warm-up; combine with schedule.warmup).
-- @tparam table options timescale
function schedule.inverse_sqrt(options)
  local o = schema.options("schedule.inverse_sqrt", options,
    { timescale = { type = "integer", min = 1, required = true } })
  return function(step)
    check_step(step)
    return math.sqrt(o.timescale / math.max(step, o.timescale))
  end
end

--- gamma ^ floor(step / every): a cut by gamma after every `every` steps.
-- @tparam table options every; gamma = 0.1
function schedule.step(options)
  local o = schema.options("schedule.step", options, { every = { type = "integer", min = 1, required = true },
    gamma = { type = "number", above = 0, default = 0.1 } })
  return function(step)
    check_step(step)
    return o.gamma ^ math.max(0, math.floor(step / o.every))
  end
end

--- gamma ^ (number of milestones reached): a cut by gamma at each milestone.
-- @tparam table options milestones = increasing steps; gamma = 0.1
function schedule.multistep(options)
  local o = schema.options("schedule.multistep", options, {
    milestones = { type = "integers", min = 1, required = true },
    gamma = { type = "number", above = 0, default = 0.1 } })
  local list = o.milestones
  for i = 2, #list do
    if list[i] <= list[i - 1] then
      schema.fail("schedule.multistep", "milestones must increase, but milestones[%d] = %d follows %d", i,
        list[i], list[i - 1])
    end
  end
  return function(step)
    check_step(step)
    local reached = 0
    while reached < #list and step >= list[reached + 1] do reached = reached + 1 end
    return o.gamma ^ reached
  end
end

--- Cosine decay with warm restarts (Loshchilov and Hutter 2017, eq. 5): from 1 to `min` in
-- `steps` steps, then again from 1, each cycle `growth` times as long as the one before.
-- @tparam table options steps = length of the first cycle; growth = 1 (a whole number); min = 0
function schedule.cosine_restarts(options)
  local o = tail("schedule.cosine_restarts", options,
    { growth = { type = "integer", min = 1, default = 1 } })
  return function(step)
    check_step(step)
    local at, length = math.max(0, step), o.steps
    if o.growth == 1 then
      at = at % length
    else
      while at >= length do at, length = at - length, length * o.growth end
    end
    return o.min + (1 - o.min) * 0.5 * (1 + math.cos(math.pi * at / length))
  end
end

return schedule
