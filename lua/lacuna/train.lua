--- train.lua: the training loop.
--
-- A loop is forty lines that everybody writes again and gets slightly wrong; this one has the parts that are
-- easy to forget. Every step runs in a scope, so memory is flat from the second step on. A loss or a gradient
-- norm that is not finite stops the run with an error that says when and with which learning rate; it never
-- trains on. Ctrl-C (under the command `lacuna` also SIGTERM and SIGHUP) saves the checkpoint, closes the log
-- and raises "interrupted". Whatever happens, the log's last record says how the run ended.
--
-- The loop owns no policy: data is a function of the step (data.lua), the schedule a function of the step
-- (optim.lua), evaluation a function that returns numbers. So a run can be killed at any moment and gone on
-- with: `boundary` is a snapshot of all numbers that are not in tensors (step, random stream, averages, the
-- log's length), taken after every step and after every update, and a checkpoint is always of such a
-- boundary.
-- A resumed run does from there what the uninterrupted one did, bit for bit: the log is cut back to the
-- boundary's length, so that it holds every step once. There is one hook, after_step, for what a script wants
-- to see. Rejected: hooks for everything (write another loop: the pieces are public), and a Trainer class.
--
-- Checkpoints are in train/checkpoint.lua, the bar in train/progress.lua.

local schema = require "lacuna.schema"
local device = require "lacuna.device"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local grad = require "lacuna.grad"
local watch = require "lacuna.watch"
local graph = require "lacuna.graph"
local sys = require "lacuna.sys"
local profile = require "lacuna.profile"
local scaler = require "lacuna.optim.scaler"
local checkpoint = require "lacuna.train.checkpoint"
local progress = require "lacuna.train.progress"

local fail, show, say = schema.fail, schema.show, progress.say
local SMOOTH = 0.95
local SPECIAL = { NaN = 0 / 0, Infinity = math.huge, ["-Infinity"] = -math.huge } -- as checkpoints write them

local train = { save_checkpoint = checkpoint.save, load_checkpoint = checkpoint.load,
                load_model = checkpoint.load_model, latest = checkpoint.latest }

-- ---- boundaries -------------------------------------------------------------------------------------------

-- All that must be known, beside tensors, to go on after `step` updates. `after`: the update is done, but
-- what follows it (log, evaluation, checkpoint) is not.
local function snapshot(o, s, step, after)
  local seed, offset = create.rng_state()
  return { step = step, after = after, rng = { seed = seed, offset = offset }, loss = s.loss, norm = s.norm,
    sum = s.sum, weight = s.weight, tokens = s.tokens_before + s.tokens, evaluations = #s.evaluations,
    seconds = s.seconds_before + sys.time() - s.started, evaluating = s.evaluating,
    scaler = o.scaler and o.scaler:state_dict(), log = o.log and o.log:position() }
end

local function write_checkpoint(o, s)
  local b = s.boundary
  if not o.checkpoint or s.saved == b then return end
  local fit = {}
  for key, value in pairs(b) do fit[key] = value end
  fit.evaluations = { unpack(s.evaluations, 1, b.evaluations) }
  fit.rng, fit.step = nil, nil
  if o.state then
    fit.state = o.state.save()
    schema.check("train.fit", "state.save()", fit.state, { type = "table" })
  end
  if o.log and o.log.file then o.log:sync() end
  checkpoint.save(o.checkpoint, { model = o.model, optimizer = o.optimizer, step = b.step, config = o.config,
    rng = b.rng, fit = fit, keep = o.keep, fresh = s.fresh })
  s.fresh, s.saved, s.saved_time = false, b, sys.time()
end

local function number(value) return SPECIAL[value] or value end

-- take over everything that a checkpoint knows
local function resume_from(o, s, path)
  local info = checkpoint.load(path, { model = o.model, optimizer = o.optimizer, rng = true })
  local fit = info.fit
  if not fit then
    fail("train.fit", "%s was not written by train.fit: load it with load_checkpoint and give first_step",
      path)
  end
  s.first, s.step, s.fresh, s.resumed = info.step + 1, info.step, false, path
  s.loss, s.norm = number(fit.loss), number(fit.norm)
  s.sum, s.weight, s.tokens_before, s.seconds_before = fit.sum, fit.weight, fit.tokens, fit.seconds
  s.evaluating, s.again = fit.evaluating, fit.after
  s.smooth = s.weight > 0 and s.sum / s.weight or 0
  for i, record in ipairs(fit.evaluations) do
    for key, value in pairs(record) do record[key] = number(value) end
    s.evaluations[i] = record
  end
  if o.log and fit.log then o.log:rewind(fit.log) end
  if (o.scaler ~= nil) ~= (fit.scaler ~= nil) then
    fail("train.fit", "%s was written %s a loss scaler and this run has %s", path,
      fit.scaler and "with" or "without", o.scaler and "one" or "none")
  end
  if o.scaler then o.scaler:load_state_dict(fit.scaler) end
  if o.state then
    if not fit.state then fail("train.fit", "%s holds no state for the option `state`", path) end
    o.state.load(fit.state)
  end
  say(s, ("resumed after step %d from %s"):format(info.step, path))
end

local function resume(o, s)
  if type(o.resume) == "string" then return resume_from(o, s, o.resume) end
  if not o.checkpoint then fail("train.fit", "resume = true needs checkpoint = path: where to look") end
  local path, _, damaged = checkpoint.latest(o.checkpoint)
  for _, d in ipairs(damaged) do
    say(s, ("a newer checkpoint is damaged and is set aside as %s.damaged: %s"):format(d.path, d.reason))
  end
  checkpoint.set_aside(damaged)
  if path then return resume_from(o, s, path) end
  say(s, ("there is no checkpoint at %s yet: starting at step %d"):format(o.checkpoint, s.first))
end

-- ---- one step ---------------------------------------------------------------------------------------------

local function count_tokens(batch)
  return tensor.is(batch[1]) and batch[1]:numel() or 0
end

-- the loss as a number, which must be finite
local function checked_value(s, loss)
  local value = loss:item()
  if value ~= value or value == math.huge or value == -math.huge then
    fail("train", "the loss is %s at step %d (learning rate %g; last finite loss %s). Try a lower "
      .. "learning rate, a longer warm-up or clipping; nan_watch = true finds the operator", show(value),
      s.step, s.lr, s.loss and ("%.4f at step %d"):format(s.loss, s.step - 1) or "none")
  end
  return value
end

local function loss_of(o, ...)
  local loss = o.loss(o.model, ...)
  if not tensor.is(loss) or loss:numel() ~= 1 then
    fail("train", "loss must return a tensor with one element, got %s", show(loss))
  end
  return loss
end

local function backward(o, loss)
  if o.accumulate > 1 then loss = loss * (1 / o.accumulate) end
  if o.scaler then loss = o.scaler:scale(loss) end
  loss:backward()
end

-- forward and backward of one micro-batch; its loss as a number
local function accumulate(o, s, number_of_batch)
  return scope.run(function()
    local batch = { o.batch(number_of_batch) }
    s.tokens = s.tokens + count_tokens(batch)
    local loss = loss_of(o, unpack(batch))
    local value = checked_value(s, loss)
    backward(o, loss)
    return value
  end)
end

-- The micro-batches of a step as one captured graph, each of `width` tensors. The scale of the loss is a
-- number in it: another one needs another graph.
local function graph_of(o, s, width)
  if s.graph and (not o.scaler or s.graph_scale == o.scaler.value) then return s.graph end
  if s.graph then s.graph:release() end
  s.graph_scale = o.scaler and o.scaler.value
  s.graph = graph.new(function(...)
    local all, losses = { ... }, {}
    for i = 1, o.accumulate do
      losses[i] = scope.run(function()
        local loss = loss_of(o, unpack(all, (i - 1) * width + 1, i * width))
        local value = loss:detach():clone()
        backward(o, loss)
        return value
      end)
    end
    return unpack(losses)
  end)
  return s.graph
end

-- forward and backward of all micro-batches by one launch; the sum of their losses
local function launch(o, s)
  return scope.run(function()
    local all, width, total = {}, 0, 0
    for i = 1, o.accumulate do
      local batch = { o.batch((s.step - 1) * o.accumulate + i) }
      s.tokens, width = s.tokens + count_tokens(batch), #batch
      for _, t in ipairs(batch) do all[#all + 1] = t end
    end
    local losses = { graph_of(o, s, width)(unpack(all)) }
    for _, loss in ipairs(losses) do total = total + checked_value(s, loss) end
    return total
  end)
end

local function one_step(o, s)
  local total = o.graph and launch(o, s) or 0
  for i = 1, o.graph and 0 or o.accumulate do
    total = total + accumulate(o, s, (s.step - 1) * o.accumulate + i)
  end
  -- everything that the new boundary holds is made before the update, which draws no random numbers
  local loss, sum = total / o.accumulate, s.sum
  s.sum, s.weight = SMOOTH * sum + (1 - SMOOTH) * loss, SMOOTH * s.weight + (1 - SMOOTH)
  s.loss, s.smooth = loss, s.sum / s.weight
  s.next = snapshot(o, s, s.step, true)
  local left_out
  s.norm, left_out = scope.run(function()
    return o.optimizer:step{ factor = s.factor, clip = o.clip, clip_value = o.clip_value, scaler = o.scaler }
  end)
  if left_out then s.norm, s.left_out = nil, s.left_out + 1 end
  s.next.norm, s.next.scaler = s.norm, o.scaler and o.scaler:state_dict()
  s.boundary = s.next
  o.optimizer:zero_grad{ release = true }
end

local function evaluate(o, s)
  local started = sys.time()
  o.model:eval()
  local ok, result = pcall(scope.run, function() return grad.no_grad(o.evaluate, o.model, s.step) end)
  o.model:train()
  if not ok then error(result, 0) end
  if type(result) ~= "table" then fail("train", "evaluate must return a table of numbers, got %s",
    show(result)) end
  local record, parts = { event = "eval", step = s.step }, {}
  for _, key in ipairs(schema.keys(result)) do
    schema.check("train", "evaluate: " .. key, result[key], { type = "number" })
    record[key], parts[#parts + 1] = result[key], ("%s %.4f"):format(key, result[key])
  end
  s.evaluations[#s.evaluations + 1] = record
  if o.log then o.log:write(record) end
  say(s, ("step %d/%d  evaluation: %s"):format(s.step, s.last, table.concat(parts, ", ")))
  local spent = sys.time() - started
  s.started = s.started + spent -- evaluation does not count against tokens per second
  s.evaluating = s.evaluating + spent
end

local function checkpoint_due(o, s)
  if o.checkpoint_every > 0 and s.step % o.checkpoint_every == 0 then return true end
  return o.checkpoint_minutes and sys.time() - s.saved_time >= 60 * o.checkpoint_minutes
end

-- what follows an update; returns whether the time is over
local function after_update(o, s)
  local step = s.step
  progress.report(s)
  if o.after_step then
    scope.run(function() -- what the script makes there and does not keep goes with the step
      o.after_step(step, s.loss, { smooth = s.smooth, lr = s.lr, norm = s.norm,
        left_out = o.scaler and o.scaler.skipped, tokens = s.tokens_before + s.tokens })
    end)
  end
  if o.log and (step % o.log_every == 0 or step == s.last or step == o.first_step) then
    o.log:write{ event = "step", step = step, loss = s.loss, smooth = s.smooth, lr = s.lr, norm = s.norm,
      scale = o.scaler and o.scaler.value, left_out = o.scaler and o.scaler.skipped,
      tokens_per_second = s.tokens / (sys.time() - s.started) }
  end
  local over = s.deadline and sys.time() >= s.deadline
  if o.evaluate and (over or step == s.last or (o.eval_every > 0
    and step % o.eval_every == 0)) then evaluate(o, s) end
  s.boundary = snapshot(o, s, step, false)
  if checkpoint_due(o, s) then write_checkpoint(o, s) end
  if over then say(s, ("stopped by the time limit after step %d"):format(step)) end
  return over
end

local function enter_step(o, s, step)
  s.step = step
  s.factor = o.schedule(step)
  schema.check("train.fit", ("schedule(%d)"):format(step), s.factor, { type = "number", min = 0 })
  s.lr = s.factor * o.optimizer.lr
end

-- returns whether the time is over
local function run_steps(o, s, first, last)
  for step = first, last do
    enter_step(o, s, step)
    one_step(o, s)
    if after_update(o, s) then return true end
  end
  return false
end

local SETTLE = 3 -- steps before a profile: the first fill the pool and compile Lua

local function run_profiled(o, s, first, last)
  if first > last then return false end
  local p, over = profile(function() return run_steps(o, s, first, last) end, { trace = true, print = false })
  s.profile = p
  say(s, ("steps %d to %d\n%s"):format(first, last, p:report()))
  if o.log then say(s, "trace in " .. p:trace(o.log:path("trace.json"))) end
  return over
end

local function loop(o, s)
  if s.again then -- the checkpoint was written between an update and what follows it
    enter_step(o, s, s.first - 1)
    if after_update(o, s) then return end
  end
  local first = s.first
  if o.profile > 0 then
    local settled = math.max(first, math.min(first + SETTLE, s.last))
    if run_steps(o, s, first, settled - 1) then return end
    first = math.min(settled + o.profile, s.last + 1)
    if run_profiled(o, s, settled, first - 1) then return end
  end
  run_steps(o, s, first, s.last)
end

-- ---- fit --------------------------------------------------------------------------------------------------

local function is_interrupt(message) return type(message) == "string"
  and message:match("interrupted!?$") ~= nil end

-- the run stops here: bring boundary and gradients in order, write the checkpoint of an interrupted run
local function stop(o, s, reason)
  local interrupted = is_interrupt(reason)
  if interrupted then
    -- between the update and the next line the interrupt has no room for doubt: the optimizer counts
    if s.next and s.boundary ~= s.next and s.next.step == s.boundary.step + 1
      and o.optimizer.steps - s.steps_before + s.left_out == s.next.step - (s.first - 1) then
      s.boundary = s.next
      s.next.scaler = o.scaler and o.scaler:state_dict()
    end
    o.optimizer:zero_grad()
    write_checkpoint(o, s)
  end
  if o.log then
    o.log:write{ event = interrupted and "interrupted" or "failed", step = s.step, reason = tostring(reason) }
    o.log:close()
  end
  error(interrupted and "interrupted" or reason, 0)
end

-- A check of an option that is an object: it has what the loop uses. Reading a field that is not there is an
-- error of some objects and nil of others.
local function has(what, names)
  return function(v)
    for name in names:gmatch("%S+") do
      local ok, value = pcall(function() return v[name] end)
      if not ok or value == nil then return ("must be %s; it has no '%s'"):format(what, name) end
    end
  end
end

local FIT = {
  model = { type = "table", required = true, check = has("a module", "train eval") },
  optimizer = { type = "table", required = true, check = has("an optimizer", "step zero_grad lr steps") },
  batch = { type = "function", required = true },
  loss = { type = "function" },
  steps = { type = "integer", min = 1, required = true },
  first_step = { type = "integer", min = 1, default = 1 },
  minutes = { type = "number", above = 0 },
  schedule = { type = "function" },
  accumulate = { type = "integer", min = 1, default = 1 },
  clip = { type = "number", above = 0 },
  clip_value = { type = "number", above = 0 },
  scaler = { type = "table", check = scaler.complain },
  after_step = { type = "function" },
  nan_watch = { type = "boolean", default = false },
  profile = { type = "integer", min = 0, default = 0 },
  graph = { type = "boolean", default = false },
  evaluate = { type = "function" },
  eval_every = { type = "integer", min = 0, default = 0 },
  log = { type = "table", check = has("a log (lacuna.log's open)", "write position path") },
  log_every = { type = "integer", min = 1, default = 10 },
  checkpoint = { type = "string" },
  checkpoint_every = { type = "integer", min = 0, default = 0 },
  checkpoint_minutes = { type = "number", above = 0 },
  keep = { type = "integer", min = 1, default = 1 },
  resume = { type = { "boolean", "string" } },
  state = { type = "table" },
  config = { type = "table" },
  progress = { one_of = { "auto", "bar", "lines", "none" }, default = "auto" },
  out = { type = "userdata" },
}

local function saves(o) return o.checkpoint ~= nil end
local NEEDS = {
  first_step = { function(o) return not o.resume end,
    "a run without resume: the checkpoint says where it is" },
  out = { function(o) return o.progress ~= "none" end, "a progress that is written: 'none' is not" },
  checkpoint_every = { saves, "checkpoint = path" }, checkpoint_minutes = { saves, "checkpoint = path" },
  keep = { saves, "checkpoint = path" }, config = { saves, "checkpoint = path, which holds it" },
  state = { function(o) return saves(o) or o.resume ~= nil end, "checkpoint = path, which holds it" },
  eval_every = { function(o) return o.evaluate ~= nil end, "evaluate = function(model, step)" },
}

local function check(o)
  if o.nan_watch and o.profile > 0 then
    fail("train.fit", "nan_watch and profile exclude each other: what the watch costs would be measured")
  end
  if o.graph and (o.nan_watch or o.profile > 0) then
    fail("train.fit", "graph excludes %s, which waits for every operator: a graph is launched as a whole",
      o.nan_watch and "nan_watch" or "profile")
  end
  if o.graph then device.code("train.fit: graph", "cuda") end
  if not o.loss and has("", "loss")(o.model) then
    fail("train.fit", "loss is required, because the model has no method 'loss'")
  end
  local why = (o.checkpoint or o.resume) and has("a module", "state_dict load_state_dict")(o.model)
  if why then fail("train.fit", "model %s, which checkpoints need", why) end
  if o.first_step > o.steps then
    fail("train.fit", "first_step %d is after the last step %d: nothing is left to train", o.first_step,
      o.steps)
  end
  if o.clip and o.clip_value then
    fail("train.fit", "clip (by norm) and clip_value exclude each other, got %g and %g", o.clip, o.clip_value)
  end
  if o.state then
    schema.options("train.fit: state", o.state, { save = { type = "function", required = true },
      load = { type = "function", required = true } })
  end
  for _, name in ipairs(schema.keys(NEEDS)) do -- an option that nothing reads is a mistake
    local needs = NEEDS[name]
    if o[name] ~= nil and o[name] ~= FIT[name].default and not needs[1](o) then
      fail("train.fit", "%s needs %s", name, needs[2])
    end
  end
end

local function new_state(o)
  local out, now = o.out or io.stderr, sys.time()
  local s = { first = o.first_step, last = o.steps, step = o.first_step - 1, started = now,
    tokens = 0, tokens_before = 0, left_out = 0, seconds_before = 0, evaluating = 0,
    log_every = o.log_every, weight = 0, sum = 0, smooth = 0, lr = 0, evaluations = {}, out = out,
    last_shown = 0, saved_time = now,
    fresh = o.first_step == 1, style = progress.style(o.progress, out) }
  if o.minutes then s.deadline = now + 60 * o.minutes end
  return s
end

-- a checkpoint that cannot be written should not be found out after an hour
local function prepare_checkpoint(o, s)
  o.checkpoint = checkpoint.file_of(o.checkpoint)
  local ok, reason = sys.can_write_in(sys.dirname(o.checkpoint))
  if not ok then fail("train.fit", "checkpoint %s: %s", o.checkpoint, reason) end
  for _, path in ipairs(checkpoint.clean(o.checkpoint)) do
    say(s, ("removed %s, left by a run that was killed"):format(path))
  end
end

--- Train.
-- @tparam table options
--
--   model; optimizer; batch = function(k) -> tensors of step k; loss = function(model, tensors...) -> tensor
--   (default model:loss(...)); steps = number of the last step; first_step = 1; minutes = stop after this
--   time; schedule = function(step) -> factor of the learning rate;
--
--   accumulate = k: a step adds the gradients of k batches, each loss divided by k; step s takes batches
--   (s - 1) k + 1 to s k. For losses that are means over equally many targets that is the gradient of the k
--   times larger batch, but for rounding; dropout draws other bits than the larger batch would;
--
--   clip = largest gradient norm, or clip_value = largest absolute value of a gradient's elements; scaler =
--   lac.optim.loss_scaler() for f16: the loss is scaled, a step whose gradients overflow is left out (its
--   number counts, its batch is not seen again), checkpoints hold the scale;
--
--   after_step = function(step, loss, info), called after every update with the step's mean loss and info = {
--   smooth, lr, norm (nil if the scaler left the step out), left_out (steps so far that it did), tokens (so
--   far) }, all numbers. It runs in a scope, before the step is logged; an error of it ends the run;
--
--   nan_watch = true: the first operator that makes a NaN or an infinity stops the run and is named (slow);
--   profile = N: N steps after the third are profiled by operator, module and line, the table is printed and
--   the trace goes to trace.json in the log's folder;
--
--   graph = true: from the second step on forward and backward are one launch of a captured CUDA graph
--   (lac.graph says what can be captured), with the same numbers; data and model on cuda, batches of one
--   shape;
--
--   evaluate = function(model, step) -> table of numbers, run in evaluation mode without gradients at the end
--   and every eval_every steps (0: only at the end); log = a Log, log_every = 10 steps;
--
--   checkpoint = path, written at the end, on Ctrl-C (SIGTERM, SIGHUP), every checkpoint_every steps (0: not)
--   and every checkpoint_minutes, with config; keep = 1: how many stay; resume = true: go on from the newest
--   checkpoint at that path that verifies, from the start if there is none; resume = path: from that one;
--   state = { save = function() -> table, load = function(table) } of data that is not a function of k;
--
--   progress = "auto" (a bar on a terminal, else lines) | "bar" | "lines" | "none", out = io.stderr
-- @treturn table { steps, loss, smooth, tokens, seconds, tokens_per_second, evaluations }, of all sessions of
--   a resumed run together; profile = the Profile, if one was asked for
-- @raise the loss or the gradient norm is not finite; "interrupted" after Ctrl-C
-- @usage
--     local model = lac.nn.LongNetLM{ layers = 1, width = 32, heads = 4, context = 32, segments = { 8, 32 },
--                                     dilations = { 1, 4 } }
--     local text = lac.data.string(("In the beginning was the word. "):rep(40))
--     local run = lac.train.fit{
--       model = model, optimizer = lac.optim.adamw(model, { lr = 3e-3 }), steps = 20,
--       batch = function(k) return text:batch(k, { batch = 4, context = 32 }) end, -- tokens, targets [B, N]
--       schedule = lac.optim.schedule.cosine{ steps = 20 }, clip = 1, progress = "none" }
--     print(run.loss, run.tokens_per_second)
function train.fit(options)
  local o = schema.options("train.fit", options, FIT)
  check(o)
  o.loss = o.loss or function(model, ...) return model:loss(...) end
  o.schedule = o.schedule or function() return 1 end
  local s = new_state(o)
  if o.checkpoint then prepare_checkpoint(o, s) end
  if o.resume then resume(o, s) end
  s.steps_before, s.started, s.saved_time = o.optimizer.steps, sys.time(), sys.time()
  s.boundary = snapshot(o, s, s.first - 1, s.again)
  if s.resumed == o.checkpoint and s.first > s.last and not s.again then s.saved = s.boundary end
  o.model:train()
  local ok, reason
  if o.nan_watch then
    ok, reason = pcall(watch.detect_anomaly, loop, o, s)
  else
    ok, reason = pcall(loop, o, s)
  end
  progress.clear(s)
  if not ok then stop(o, s, reason) end
  write_checkpoint(o, s)
  if o.checkpoint then checkpoint.clean(o.checkpoint) end
  local tokens, seconds = s.tokens_before + s.tokens, s.seconds_before + sys.time() - s.started
  local summary = { steps = s.step, loss = s.loss, smooth = s.smooth, tokens = tokens, seconds = seconds,
    evaluation_seconds = s.evaluating, tokens_per_second = tokens / seconds, evaluations = s.evaluations,
    profile = s.profile }
  if o.log then
    o.log:write{ event = "done", step = s.step, loss = s.loss, smooth = s.smooth, tokens = tokens,
      seconds = seconds, tokens_per_second = tokens / seconds }
  end
  return summary
end

schema.describe(train.fit, FIT)

-- ---- evaluation -------------------------------------------------------------------------------------------

--- Mean bits for each byte of a text but its first, under a byte-level language model. The model is put into
-- evaluation mode and back. With stride < context every byte (after the first window) is predicted from at
-- least context - stride bytes before it.
-- @tparam Module model has loss(tokens, targets, { reduction = "sum" }) and the field context
-- @tparam Bytes bytes
-- @tparam[opt] table options context (the model's), stride (context), batch = 16
-- @treturn number bits per byte
-- @treturn number bytes counted
function train.bits_per_byte(model, bytes, options)
  local why = type(model) ~= "table" and "must be a language model"
    or has("a language model", "loss context")(model)
  if why then fail("bits_per_byte", "model %s, got %s", why, show(model)) end
  local o = schema.options("bits_per_byte", options, {
    context = { type = "integer", min = 1, default = model.context }, stride = { type = "integer", min = 1 },
    batch = { type = "integer", min = 1, default = 16 } })
  local training, total, bytes_counted = model.training, 0, 0
  local is_module = rawget(model, "_params") ~= nil
  model:eval()
  local ok, reason = pcall(grad.no_grad, function()
    for tokens, targets, count in bytes:windows{ batch = o.batch, context = o.context, stride = o.stride,
      device = is_module and model:parameters()[1]:device() or nil } do
      total = total + scope.run(function()
        return model:loss(tokens, targets, { reduction = "sum" }):item()
      end)
      bytes_counted = bytes_counted + count
      tokens:release()
      targets:release()
    end
  end)
  model:train(training)
  if not ok then error(reason, 0) end
  return total / math.log(2) / bytes_counted, bytes_counted
end

return train
