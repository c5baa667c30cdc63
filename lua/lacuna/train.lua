--- train.lua: the training loop, and checkpoints.
--
-- A loop is forty lines that everybody writes again and gets slightly wrong; this one has the parts that are
-- easy to forget. Every step runs in a scope, so memory is flat from the second step on. A loss or a gradient
-- norm that is not finite stops the run with an error that says when and with which learning rate; it never
-- trains on. Ctrl-C saves the checkpoint, closes the log and raises "interrupted". Progress is a bar on a
-- terminal and plain lines elsewhere, so that logs of batch jobs are readable. Whatever happens, the log's
-- last record says how the run ended.
--
-- The loop owns no policy: data is a function of the step (data.lua), the schedule a function of the step
-- (optim.lua), evaluation a function that returns numbers. Batch k depends on k only, and the checkpoint
-- carries step, optimizer moments, configuration and the random stream, so a resumed run does the same steps
-- as an uninterrupted one. Rejected: callbacks and hooks for everything (write another loop: the pieces are
-- public), and a Trainer class.

local schema = require "lacuna.schema"
local scope = require "lacuna.scope"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local grad = require "lacuna.grad"
local json = require "lacuna.json"
local sys = require "lacuna.sys"
local store = require "lacuna.io"

local fail, show = schema.fail, schema.show
local FORMAT = "lacuna-checkpoint-1"
local BAR = 14 -- the whole line stays under 80 columns
local SMOOTH = 0.95

local train = {}

local function clock_text(seconds)
  seconds = math.max(0, math.floor(seconds + 0.5))
  if seconds >= 3600 then return ("%d:%02d:%02d"):format(seconds / 3600, seconds / 60 % 60, seconds % 60) end
  return ("%d:%02d"):format(seconds / 60, seconds % 60)
end

local function rate_text(rate)
  if rate >= 1e6 then return ("%.2fM"):format(rate / 1e6) end
  if rate >= 1e4 then return ("%.1fk"):format(rate / 1e3) end
  return ("%.0f"):format(rate)
end

-- ---- progress ---------------------------------------------------------------------------------------------

local function progress_line(s)
  local elapsed = sys.time() - s.started
  local done = s.step - s.first + 1
  local left = (s.last - s.step) * elapsed / done
  if s.deadline then left = math.min(left, s.deadline - sys.time()) end
  return ("step %d/%d  loss %.4f  lr %.1e  %s tok/s  left %s"):format(s.step, s.last, s.smooth, s.lr,
    rate_text(s.tokens / elapsed), clock_text(left))
end

local function show_bar(s)
  local filled = math.floor(BAR * s.step / s.last + 0.5)
  s.out:write("\r[", ("="):rep(filled), (" "):rep(BAR - filled), "] ", progress_line(s), "\27[K")
  s.out:flush()
  s.bar_shown = true
end

local function clear_bar(s)
  if s.bar_shown then s.out:write("\r\27[K") end
  s.bar_shown = false
end

local function say(s, text)
  if s.style == "none" then return end
  clear_bar(s)
  s.out:write(text, "\n")
  s.out:flush()
end

local function report(s)
  local now = sys.time()
  if s.style == "bar" then
    if now - s.last_shown < 0.1 and s.step < s.last then return end
    show_bar(s)
  elseif s.style == "lines" then
    if s.step % s.log_every ~= 0 and s.step < s.last then return end
    if now - s.last_shown < 1 and s.step < s.last and s.step > s.first then return end
    say(s, progress_line(s))
  end
  s.last_shown = now
end

-- ---- one step ---------------------------------------------------------------------------------------------

local function count_tokens(batch)
  return tensor.is(batch[1]) and batch[1]:numel() or 0
end

local function one_step(o, s)
  scope.run(function()
    local batch = { o.batch(s.step) }
    s.tokens = s.tokens + count_tokens(batch)
    local loss = o.loss(o.model, unpack(batch))
    if not tensor.is(loss) or loss:numel() ~= 1 then
      fail("train", "loss must return a tensor with one element, got %s", show(loss))
    end
    local value = loss:item()
    if value ~= value or value == math.huge or value == -math.huge then
      fail("train", "the loss is %s at step %d (learning rate %g; last finite loss %s). Try a lower "
        .. "learning rate, a longer warm-up or clipping", show(value), s.step, s.lr, s.loss
          and ("%.4f at step %d"):format(s.loss,
          s.step - 1) or "none")
    end
    loss:backward()
    s.norm = o.optimizer:step{ factor = s.factor, clip = o.clip }
    o.optimizer:zero_grad{ release = true }
    s.loss = value
  end)
  s.weight = SMOOTH * s.weight + (1 - SMOOTH)
  s.sum = SMOOTH * s.sum + (1 - SMOOTH) * s.loss
  s.smooth = s.sum / s.weight
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

local function checkpoint(o, s)
  if o.checkpoint then
    -- steps as the optimizer counts them: an interrupt may come before or after its update
    train.save_checkpoint(o.checkpoint, { model = o.model, optimizer = o.optimizer,
      step = s.first - 1 + o.optimizer.steps - s.steps_before, config = o.config })
  end
end

local function loop(o, s)
  for step = s.first, s.last do
    s.step = step
    s.factor = o.schedule(step)
    s.lr = s.factor * o.optimizer.lr
    one_step(o, s)
    report(s)
    if o.log and (step % o.log_every == 0 or step == s.last or step == s.first) then
      o.log:write{ event = "step", step = step, loss = s.loss, smooth = s.smooth, lr = s.lr, norm = s.norm,
        tokens_per_second = s.tokens / (sys.time() - s.started) }
    end
    local over = s.deadline and sys.time() >= s.deadline
    if o.evaluate and (over or step == s.last or (o.eval_every > 0
      and step % o.eval_every == 0)) then evaluate(o, s) end
    if over then
      say(s, ("stopped by the time limit after step %d"):format(step))
      break
    end
  end
end

local function is_interrupt(message) return type(message) == "string"
  and message:match("interrupted!?$") ~= nil end

local FIT = {
  model = { type = "table", required = true },
  optimizer = { type = "table", required = true },
  batch = { type = "function", required = true },
  loss = { type = "function" },
  steps = { type = "integer", min = 1, required = true },
  first_step = { type = "integer", min = 1, default = 1 },
  minutes = { type = "number", above = 0 },
  schedule = { type = "function" },
  clip = { type = "number", above = 0 },
  evaluate = { type = "function" },
  eval_every = { type = "integer", min = 0, default = 0 },
  log = { type = "table" },
  log_every = { type = "integer", min = 1, default = 10 },
  checkpoint = { type = "string" },
  config = { type = "table" },
  progress = { one_of = { "auto", "bar", "lines", "none" }, default = "auto" },
  out = { type = "userdata" },
}

--- Train.
-- @tparam table options model; optimizer; batch = function(k) -> tensors of step k; loss = function(model,
--   tensors...) -> tensor (default model:loss(...)); steps = number of the last step; first_step = 1 (a
--   resumed run starts later); minutes = stop after this time; schedule = function(step) -> factor of the
--   learning rate; clip = largest gradient norm; evaluate = function(model, step) -> table of numbers, run in
--   evaluation mode without gradients at the end and every eval_every steps (0: only at the end); log = a
--   Log, log_every = 10 steps; checkpoint = path, written at the end and on Ctrl-C, with config; progress =
--   "auto" (a bar on a terminal, else lines) | "bar" | "lines" | "none", out = io.stderr
-- @treturn table { steps, loss, smooth, tokens, seconds, tokens_per_second, evaluations }
-- @raise the loss or the gradient norm is not finite; "interrupted" after Ctrl-C
function train.fit(options)
  local o = schema.options("train.fit", options, FIT)
  if o.first_step > o.steps then
    fail("train.fit", "first_step %d is after the last step %d: nothing is left to train", o.first_step,
      o.steps)
  end
  o.loss = o.loss or function(model, ...) return model:loss(...) end
  o.schedule = o.schedule or function() return 1 end
  local out = o.out or io.stderr
  local now = sys.time()
  local s = { first = o.first_step, last = o.steps, step = o.first_step - 1, started = now, deadline = nil,
    tokens = 0,
    log_every = o.log_every, weight = 0, sum = 0, smooth = 0, lr = 0, evaluations = {}, evaluating = 0,
    out = out,
    steps_before = o.optimizer.steps, last_shown = 0, style = o.progress == "auto" and (sys.isatty(out)
    and "bar" or "lines") or o.progress }
  if o.minutes then s.deadline = now + 60 * o.minutes end
  o.model:train()
  local ok, reason = pcall(loop, o, s)
  clear_bar(s)
  if not ok then
    local interrupted = is_interrupt(reason)
    if interrupted then
      o.optimizer:zero_grad()
      checkpoint(o, s)
    end
    if o.log then
      o.log:write{ event = interrupted and "interrupted" or "failed", step = s.step,
        reason = tostring(reason) }
      o.log:close()
    end
    error(interrupted and "interrupted" or reason, 0)
  end
  checkpoint(o, s)
  local seconds = sys.time() - s.started
  local summary = { steps = s.step, loss = s.loss, smooth = s.smooth, tokens = s.tokens, seconds = seconds,
    evaluation_seconds = s.evaluating, tokens_per_second = s.tokens / seconds, evaluations = s.evaluations }
  if o.log then
    o.log:write{ event = "done", step = s.step, loss = s.loss, smooth = s.smooth, tokens = s.tokens,
      seconds = seconds,
      tokens_per_second = s.tokens / seconds }
  end
  return summary
end

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
  local o = schema.options("bits_per_byte", options, {
    context = { type = "integer", min = 1, default = model.context }, stride = { type = "integer", min = 1 },
    batch = { type = "integer", min = 1, default = 16 } })
  local training, total, bytes_counted = model.training, 0, 0
  model:eval()
  local ok, reason = pcall(grad.no_grad, function()
    for tokens, targets, count in bytes:windows{ batch = o.batch, context = o.context, stride = o.stride } do
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

-- ---- checkpoints ------------------------------------------------------------------------------------------

local CHECKPOINT = {
  model = { type = "table", required = true },
  optimizer = { type = "table" },
  step = { type = "integer", min = 0, default = 0 },
  config = { type = "table" },
}

--- Write model, optimizer, step, configuration and the state of the random stream to one safetensors file.
-- @tparam string path
-- @tparam table options model; optimizer; step = 0; config = any table that JSON can hold
-- @treturn string path
function train.save_checkpoint(path, options)
  local o = schema.options("save_checkpoint", options, CHECKPOINT)
  local tensors = {}
  for name, t in pairs(o.model:state_dict()) do tensors["model." .. name] = t end
  local seed, offset = create.rng_state()
  local metadata = { format = FORMAT, step = ("%d"):format(o.step), config = json.encode(o.config or {}),
    rng = json.encode{ seed = seed, offset = offset } }
  if o.optimizer then
    local state, steps = o.optimizer:state_dict()
    for name, t in pairs(state) do tensors["optimizer." .. name] = t end
    metadata.optimizer_steps = ("%d"):format(steps)
  end
  return store.save(path, tensors, metadata)
end

--- Restore what save_checkpoint wrote.
-- @tparam string path
-- @tparam[opt] table options model, optimizer: what to restore into; rng = true restores the random stream
--   too
-- @treturn table { step, config }
-- @raise not a checkpoint of this kind; names or shapes that do not fit
function train.load_checkpoint(path, options)
  local o = schema.options("load_checkpoint", options, { model = { type = "table" },
    optimizer = { type = "table" },
    rng = { type = "boolean", default = false } })
  local tensors, metadata = store.load(path)
  if metadata.format ~= FORMAT then
    fail("load_checkpoint", "%s is not a %s file: its metadata `format` is %s", path, FORMAT,
      show(metadata.format))
  end
  local model, state = {}, {}
  for name, t in pairs(tensors) do
    local part, rest = name:match("^(%a+)%.(.+)$")
    if part == "model" then
      model[rest] = t
    elseif part == "optimizer" then
      state[rest] = t
    else
      fail("load_checkpoint", "%s holds a tensor %q that belongs to neither model nor optimizer", path, name)
    end
  end
  local function decode(key)
    local value, reason = json.decode(metadata[key] or "")
    if type(value) ~= "table" then fail("load_checkpoint", "%s: metadata `%s` is not JSON: %s", path, key,
      tostring(reason)) end
    return value
  end
  local config, rng = decode("config"), decode("rng")
  if o.model then o.model:load_state_dict(model) end
  if o.optimizer then
    local steps = tonumber(metadata.optimizer_steps)
    if not steps then fail("load_checkpoint", "%s holds no optimizer state", path) end
    o.optimizer:load_state_dict(state, steps)
  end
  if o.rng then create.set_rng_state(rng.seed, rng.offset) end
  return { step = tonumber(metadata.step), config = config }
end

return train
