--- train_spec.lua: the loop, its failures, checkpoints and evaluation.
--
-- A stopped and resumed run must equal an uninterrupted one bit by bit. A loss that turns NaN and an
-- interrupt raised in the middle must end the run with the right error, a closed log that says so, and (for
-- the interrupt) a checkpoint of the completed step. Memory must be flat over steps. Held-out bits are
-- compared with a model whose probabilities are known.

local lac = require "lacuna"
local sys = require "lacuna.sys"
local runlog = require "lacuna.log"

local text = lac.data.string(("It is a lacuna: a gap that is meant. "):rep(60))

local function make(seed, dropout)
  lac.manual_seed(seed or 1)
  local model = lac.nn.LongNetLM{ layers = 1, width = 16, heads = 2, context = 16, segments = { 8, 16 },
    dilations = { 1, 2 },
    dropout = dropout or 0 }
  return model, lac.optim.adamw(model, { lr = 0.01 })
end

local function batch(k) return text:batch(k, { batch = 4, context = 16, seed = 2 }) end

local function capture()
  local path = os.tmpname()
  local file = io.open(path, "w")
  return file, function()
    file:close()
    local f = io.open(path)
    local s = f:read("*a")
    f:close()
    os.remove(path)
    return s
  end
end

describe("train.fit", function()
  local dir, threads
  setup(function() -- tensors too small to share out
    threads = lac.threads()
    lac.threads(1)
  end)
  teardown(function() lac.threads(threads) end)
  before_each(function() dir = sys.temporary("-train") end)
  after_each(function() os.execute("rm -r " .. sys.quote(dir) .. " 2>/dev/null") end)

  it("profiles some steps, which changes none of the numbers", function()
    local function run(steps, more)
      lac.manual_seed(3)
      local model, optimizer = make()
      local log = runlog.open{ path = dir .. tostring(more) }
      local out, text_of = capture()
      local fit = lac.train.fit{ model = model, optimizer = optimizer, steps = steps, batch = batch,
        log = log, progress = "lines", out = out, profile = more }
      log:close()
      return fit, text_of(), log
    end
    local plain = run(9)
    local fit, printed, log = run(9, 4)
    assert.equal(plain.loss, fit.loss)
    assert.is_nil(plain.profile)
    assert.matches("steps 4 to 7\nprofile: ", printed)
    assert.matches("LongNetLM", printed)
    local adam = 0
    for _, e in ipairs(fit.profile.events) do adam = adam + (e.op == "adamw" and 1 or 0) end
    assert.equal(4, adam)
    local trace = assert(io.open(log:path("trace.json")))
    assert.is_table(require("lacuna.json").decode(trace:read("*a")).traceEvents)
    trace:close()
    fit, printed = run(2, 5)
    assert.equal(2, fit.steps)
    assert.matches("steps 2 to 2\n", printed)
    assert.error_matches(function()
      local model, optimizer = make()
      lac.train.fit{ model = model, optimizer = optimizer, steps = 2, batch = batch, profile = 1,
        nan_watch = true }
    end, "nan_watch and profile exclude each other")
    for _, name in ipairs{ "nil", "4", "5" } do os.execute("rm -r " .. sys.quote(dir .. name)) end
  end)

  it("trains, logs, evaluates, reports lines and writes a checkpoint", function()
    local model, optimizer = make()
    local log = runlog.open{ path = dir }
    local out, text_of = capture()
    local modes = {}
    local fit = lac.train.fit{ model = model, optimizer = optimizer, steps = 20, batch = batch, clip = 1,
      log = log, log_every = 5,
      schedule = lac.optim.schedule.warmup(5), eval_every = 10, out = out, progress = "lines",
      evaluate = function(m, step)
        modes[#modes + 1] = { m.training, lac.is_grad_enabled(), step }
        return { bits = lac.train.bits_per_byte(m, text:slice(1, 100)) }
      end,
      checkpoint = log:path("c.safetensors"), config = { width = 16 } }
    log:close()
    local printed = text_of()
    assert.same({ { false, false, 10 }, { false, false, 20 } }, modes)
    assert.is_true(model.training)
    assert.equal(20, fit.steps)
    assert.equal(20 * 4 * 16, fit.tokens)
    assert.is_true(fit.smooth < math.log(256))
    assert.matches("step 20/20  loss %d", printed)
    assert.matches("step 10/20  evaluation: bits %d", printed)
    local events = {}
    for _, r in ipairs(runlog.read(dir .. "/log.jsonl")) do events[r.event] = (events[r.event] or 0) + 1 end
    assert.same({ step = 5, eval = 2, done = 1 }, events)
    local info = lac.train.load_checkpoint(dir .. "/c.safetensors", {})
    assert.equal(20, info.step)
    assert.equal(16, info.config.width)
  end)

  it("calls after_step once after every update, also of a run that is resumed", function()
    local path, seen, steps = dir .. "/c.safetensors", {}, {}
    assert(sys.mkdir(dir))
    local function fit(last, fails)
      local model, optimizer = make()
      lac.train.fit{ model = model, optimizer = optimizer, steps = last, batch = batch, checkpoint = path,
        resume = true, progress = "none", clip = 1, schedule = function(step) return 1 / step end,
        after_step = function(step, loss, info)
          if step == fails then error("interrupted", 0) end
          steps[#steps + 1], seen[step] = step, info
          info.loss, info.done = loss, optimizer.steps
        end }
    end
    assert.error_matches(function() fit(6, 4) end, "^interrupted$")
    fit(6)
    assert.same({ 1, 2, 3, 4, 5, 6 }, steps)
    local model, optimizer = make()
    local fitted = lac.train.fit{ model = model, optimizer = optimizer, steps = 6, batch = batch, clip = 1,
      progress = "none", schedule = function(step) return 1 / step end }
    assert.equal(fitted.loss, seen[6].loss)
    assert.equal(fitted.smooth, seen[6].smooth)
    for step, info in ipairs(seen) do
      assert.same({ (1 / step) * 0.01, step * 64, step }, { info.lr, info.tokens, info.done })
      assert.is_true(info.norm > 0)
    end
    local at
    assert.error_matches(function()
      lac.train.fit{ model = model, optimizer = optimizer, steps = 3, batch = batch, progress = "none",
        after_step = function(step) at = step error("enough", 0) end }
    end, "^enough$")
    assert.equal(1, at)
    assert.error_matches(function()
      lac.train.fit{ model = model, optimizer = optimizer, steps = 3, batch = batch, after_step = 3 }
    end, "after_step must be a function, got 3")
  end)

  it("draws a bar that it clears", function()
    local model, optimizer = make()
    local out, text_of = capture()
    lac.train.fit{ model = model, optimizer = optimizer, steps = 3, batch = batch, out = out,
      progress = "bar" }
    local printed = text_of()
    assert.matches("\r%[=+ *%] step 3/3", printed)
    assert.matches("\27%[K$", printed)
  end)

  it("resumes bit by bit, with dropout", function()
    local function fit(model, optimizer, first, last)
      lac.train.fit{ model = model, optimizer = optimizer, first_step = first, steps = last, batch = batch,
        progress = "none",
        schedule = lac.optim.schedule.cosine{ steps = 8 }, checkpoint = dir .. "/c.safetensors", clip = 1 }
    end
    assert(sys.mkdir(dir))
    local whole, opt = make(3, 0.2)
    fit(whole, opt, 1, 8)
    local half, half_opt = make(3, 0.2)
    fit(half, half_opt, 1, 4)
    local rest, rest_opt = make(77, 0.2)
    local info = lac.train.load_checkpoint(dir .. "/c.safetensors", { model = rest, optimizer = rest_opt,
      rng = true })
    assert.equal(4, info.step)
    fit(rest, rest_opt, info.step + 1, 8)
    for name, t in pairs(whole:state_dict()) do assert.equal(t:string(), rest:state_dict()[name]:string(),
      name) end
  end)

  -- a run of 12 steps with everything that has a state; `break_at` raises an interrupt in the named place
  local function session(folder, seed, resume, break_at)
    local model, optimizer = make(seed, 0.2)
    local log = runlog.open{ path = folder, append = resume }
    local function stop_here(where, k)
      if break_at and break_at[1] == where and break_at[2] == k then error("interrupted!", 0) end
    end
    local kept = { 0 }
    local o = { model = model, optimizer = optimizer, steps = 12, batch = function(k)
        kept[1] = kept[1] + k
        stop_here("batch", k)
        return batch(k)
      end, loss = function(m, ...)
        local loss = m:loss(...)
        stop_here("loss", kept[1])
        return loss
      end, progress = "none", clip = 1, accumulate = 2, schedule = lac.optim.schedule.cosine{ steps = 12 },
      log = log, log_every = 3, eval_every = 4, evaluate = function(_, step)
        stop_here("evaluate", step)
        return { noise = lac.rand{ 1 }:item(), step = step }
      end, checkpoint = log:path("c.safetensors"), checkpoint_every = 5, keep = 2, resume = resume,
      state = { save = function() return kept end, load = function(t) kept = t end } }
    local ok, result = pcall(lac.train.fit, o)
    if ok then log:close() end
    return ok, result, model, optimizer, kept[1]
  end

  local function records_of(folder)
    local records = runlog.read(folder .. "/log.jsonl")
    for _, r in ipairs(records) do r.time, r.seconds, r.tokens_per_second = nil, nil, nil end
    return records
  end

  it("resumes by itself bit by bit, wherever it was interrupted", function()
    local ok, fit, whole, opt, kept = session(dir .. "/whole", 3)
    assert.is_true(ok, fit)
    assert.equal(24 * 25 / 2, kept)
    for i, place in ipairs{ { "batch", 1 }, { "batch", 2 }, { "batch", 13 }, { "loss", 14 * 15 / 2 },
      { "evaluate", 4 }, { "evaluate", 8 }, { "evaluate", 12 } } do
      local folder = dir .. "/" .. i
      local first, reason = session(folder, 3, false, place)
      assert.is_false(first)
      assert.equal("interrupted", reason)
      local done, again, model, optimizer = session(folder, 77, true)
      assert.is_true(done, again)
      for name, t in pairs(whole:state_dict()) do
        assert.is_true(t:string() == model:state_dict()[name]:string(), place[1] .. place[2] .. name)
      end
      for name, t in pairs((opt:state_dict())) do
        assert.is_true(t:string() == (optimizer:state_dict())[name]:string(), name)
      end
      assert.same(records_of(dir .. "/whole"), records_of(folder))
      assert.same({ fit.steps, fit.loss, fit.smooth, fit.tokens, fit.evaluations },
        { again.steps, again.loss, again.smooth, again.tokens, again.evaluations })
    end
  end)

  it("has nothing to do when it resumes a finished run, and says the same", function()
    local _, fit, model = session(dir, 3)
    local before = records_of(dir)
    local ok, again, other = session(dir, 8, true)
    assert.is_true(ok, again)
    assert.same(fit.evaluations, again.evaluations)
    assert.same({ fit.steps, fit.loss, fit.tokens }, { again.steps, again.loss, again.tokens })
    assert.same(before, records_of(dir))
    assert.equal(model.norm.weight:string(), other.norm.weight:string())
  end)

  it("resumes from an older checkpoint when the newest is damaged, and sets that aside", function()
    local _, _, whole = session(dir, 3)
    local path = dir .. "/c.safetensors"
    local file = io.open(path, "r+b")
    file:seek("end", -3)
    file:write("???")
    file:close()
    local model, optimizer = make(9, 0.2)
    local out, text_of = capture()
    lac.train.fit{ model = model, optimizer = optimizer, steps = 12, batch = batch, out = out, clip = 1,
      progress = "lines", accumulate = 2, schedule = lac.optim.schedule.cosine{ steps = 12 },
      checkpoint = path, resume = true, eval_every = 4,
      evaluate = function() return { noise = lac.rand{ 1 }:item() } end }
    local printed = text_of()
    assert.matches("a newer checkpoint is damaged and is set aside as .*: it is damaged: its bytes", printed)
    assert.matches("resumed after step 10 from .*c%-00000010.safetensors", printed)
    assert.is_true(sys.exists(path .. ".damaged"))
    assert.equal(whole.norm.weight:string(), model.norm.weight:string())
    assert.equal(12, lac.train.load_checkpoint(path).step)
  end)

  it("removes what a killed run left, and starts over when there is no checkpoint", function()
    assert(sys.mkdir(dir))
    local stray = dir .. "/c.safetensors.4194304-1.tmp"
    io.open(stray, "w"):close()
    local model, optimizer = make()
    local out, text_of = capture()
    lac.train.fit{ model = model, optimizer = optimizer, steps = 1, batch = batch, out = out,
      progress = "lines", checkpoint = dir .. "/c.safetensors", resume = true }
    local printed = text_of()
    assert.is_false(sys.exists(stray))
    assert.matches("removed .*tmp, left by a run that was killed", printed)
    assert.matches("there is no checkpoint at .* yet: starting at step 1", printed)
  end)

  it("accumulates: k small batches make the step of one large batch", function()
    local function grads(accumulate, size, dtype)
      lac.manual_seed(4)
      local model = lac.nn.LongNetLM{ layers = 1, width = 16, heads = 2, context = 16, segments = { 8, 16 },
        dilations = { 1, 2 }, dtype = dtype }
      local optimizer = lac.optim.sgd(model, { lr = 1 })
      local fit = lac.train.fit{ model = model, optimizer = optimizer, steps = 2, progress = "none",
        accumulate = accumulate, batch = function(k)
          return text:batch(k, { batch = size, context = 16, seed = 2 })
        end }
      return model, fit
    end
    local large, a = grads(1, 8, "f64")
    for _, k in ipairs{ 2, 4, 8 } do
      local small, b = grads(k, 8 / k, "f64")
      assert.near(a.loss, b.loss, 1e-13)
      assert.equal(a.tokens, b.tokens)
      for name, t in pairs(large:state_dict()) do
        assert.is_true((t - small:state_dict()[name]):abs():max():item() < 1e-13, name)
      end
    end
  end)

  it("clips by value", function()
    local function run(options)
      local model = make(6)
      local o = { model = model, optimizer = lac.optim.sgd(model, { lr = 1 }), steps = 1, batch = batch,
        progress = "none" }
      for name, value in pairs(options) do o[name] = value end
      local before = model.norm.weight:clone()
      lac.train.fit(o)
      return (model.norm.weight - before):abs():max():item()
    end
    assert.is_true(run{} > 1e-3)
    assert.near(1e-4, run{ clip_value = 1e-4 }, 1e-7)
  end)

  it("stops on a loss that is not finite, and says so in the log", function()
    local model, optimizer = make()
    local log = runlog.open{ path = dir }
    local calls = 0
    local ok, message = pcall(lac.train.fit, { model = model, optimizer = optimizer, steps = 9,
      batch = batch, log = log,
      progress = "none", loss = function(m, ...)
        calls = calls + 1
        local loss = m:loss(...)
        return calls == 3 and loss * (0 / 0) or loss
      end })
    assert.is_false(ok)
    assert.matches("the loss is nan at step 3 %(learning rate 0.01; last finite loss %d[%d.]* at step 2%)",
      message)
    local records = runlog.read(dir .. "/log.jsonl")
    assert.equal("failed", records[#records].event)
    assert.equal(3, calls)
    assert.error_matches(function() log:write{ event = "x" } end, "closed")
  end)

  it("saves and closes when interrupted", function()
    local model, optimizer = make()
    local log = runlog.open{ path = dir }
    local ok, message = pcall(lac.train.fit, { model = model, optimizer = optimizer, steps = 9, log = log,
      progress = "none",
      checkpoint = log:path("c.safetensors"), batch = function(k)
        if k == 4 then error("interrupted!", 0) end
        return batch(k)
      end })
    assert.is_false(ok)
    assert.equal("interrupted", message)
    local records = runlog.read(dir .. "/log.jsonl")
    assert.equal("interrupted", records[#records].event)
    assert.equal(3, lac.train.load_checkpoint(dir .. "/c.safetensors", { model = model,
      optimizer = optimizer }).step)
  end)

  it("keeps memory flat", function()
    local model, optimizer = make()
    local live = {}
    collectgarbage() -- tensors of other specs
    collectgarbage()
    -- A tensor that the collector has found dead leaves its scope's weak list at once, its bytes only
    -- at the engine's next call. So the collector stands still: what is flat now is flat by the scopes alone.
    collectgarbage("stop")
    lac.train.fit{ model = model, optimizer = optimizer, steps = 30, progress = "none", batch = function(k)
      live[k] = lac.memory("cpu").live
      return batch(k)
    end }
    collectgarbage("restart")
    assert.equal(live[3], live[30])
  end)

  it("stops by time", function()
    local model, optimizer = make()
    local fit = lac.train.fit{ model = model, optimizer = optimizer, steps = 1e6, minutes = 0.002,
      batch = batch,
      progress = "none" }
    assert.is_true(fit.steps >= 1 and fit.steps < 1e6)
    assert.is_true(fit.seconds < 5)
  end)

  it("asks of a model what it uses, and more where there are checkpoints", function()
    local model, optimizer = make()
    local plain = { count = { train = 0, eval = 0 } } -- no module, and no metatable
    for _, name in ipairs { "train", "eval" } do
      plain[name] = function() plain.count[name] = plain.count[name] + 1 return model[name](model) end
    end
    function plain.loss(_, ...) return model:loss(...) end
    local function fit(steps, more)
      local o = { model = plain, optimizer = optimizer, steps = steps, batch = batch, progress = "none",
        evaluate = function() return { one = 1 } end }
      for name, value in pairs(more or {}) do o[name] = value end
      return lac.train.fit(o)
    end
    assert.equal(2, fit(2).steps)
    assert.same({ train = 2, eval = 1 }, plain.count)
    local path = dir .. "/plain.safetensors"
    assert(sys.mkdir(dir))
    for _, more in ipairs { { checkpoint = path }, { resume = path } } do
      assert.error_matches(function() fit(2, more) end,
        "model must be a module; it has no 'state_dict', which checkpoints need")
    end
    function plain.state_dict() return model:state_dict() end
    assert.error_matches(function() fit(2, { checkpoint = path }) end, "it has no 'load_state_dict'")
    function plain.load_state_dict(_, state) model:load_state_dict(state) end
    fit(2, { checkpoint = path })
    local weight = model:parameter_list()[1].tensor:totable()
    model:parameter_list()[1].tensor:detach():fill_(0)
    assert.equal(2, lac.train.load_checkpoint(path, { model = plain }).step)
    assert.same(weight, model:parameter_list()[1].tensor:totable())
    assert.equal(3, fit(3, { checkpoint = path, resume = true }).steps)
  end)

  it("names what is wrong", function()
    local model, optimizer = make()
    local function try(pattern, change)
      local o = { model = model, optimizer = optimizer, steps = 2, batch = batch, progress = "none" }
      for name, value in pairs(change) do o[name] = value end
      assert.error_matches(function() lac.train.fit(o) end, pattern)
    end
    try("did you mean 'optimizer'", { optimiser = optimizer })
    try("steps must be positive, got 0", { steps = 0 })
    try("first_step 3 is after the last step 2", { first_step = 3 })
    try("loss must return a tensor with one element, got 3", { loss = function() return 3 end })
    try("clip %(by norm%) and clip_value exclude each other, got 1 and 2", { clip = 1, clip_value = 2 })
    try("checkpoint_every needs checkpoint = path", { checkpoint_every = 3 })
    try("resume = true needs checkpoint = path", { resume = true })
    try("accumulate must be positive, got 0", { accumulate = 0 })
    local state = { save = function() return {} end, load = function() end }
    for name, value in pairs{ checkpoint_every = 5, checkpoint_minutes = 1, keep = 3, config = {},
      state = state } do try(name .. " needs checkpoint = path", { [name] = value }) end
    try("eval_every needs evaluate = function", { eval_every = 2 })
    try("state: load is required", { state = { save = function() end } })
    assert(sys.mkdir(dir))
    lac.train.save_checkpoint(dir .. "/c.safetensors", { model = model, optimizer = optimizer })
    try("was not written by train.fit", { resume = dir .. "/c.safetensors" })
    try("scaler must be a loss scaler", { scaler = {} })
    try("scaler must be a loss scaler", { scaler = { value = 2, state_dict = function() end } })
    try("optimizer must be an optimizer; it has no 'step', got an object of class LongNetLM",
      { optimizer = model })
    try("model must be a module; it has no 'train', got an object of class AdamW", { model = optimizer })
    try("log must be a log .*it has no 'write'", { log = {} })
    try("schedule%(1%) must be a number, got nil", { schedule = function() end })
    try("schedule%(1%) must be at least 0, got %-1", { schedule = function() return -1 end })
    try("loss is required, because the model has no method 'loss'", { model = lac.nn.Linear(2, 2) })
    try("evaluate must return a table", { evaluate = function() end })
    try("evaluate: a must be a number", { evaluate = function() return { a = "x" } end })
    assert.error_matches(function() lac.train.fit{ model = model, optimizer = optimizer, steps = 1 } end,
      "batch is required")
  end)

  it("refuses files that are not its checkpoints", function()
    local model, optimizer = make()
    local path = os.tmpname()
    lac.io.save(path, { a = lac.ones{ 1 } })
    assert.error_matches(function() lac.train.load_checkpoint(path) end,
      "is not a lacuna%-checkpoint%-2 file")
    lac.train.save_checkpoint(path, { model = model })
    assert.error_matches(function() lac.train.load_checkpoint(path, { optimizer = optimizer }) end,
      "holds no optimizer state")
    local other = lac.nn.LongNetLM{ layers = 2, width = 16, heads = 2, context = 16, segments = { 8 },
      dilations = { 1 } }
    assert.error_matches(function() lac.train.load_checkpoint(path, { model = other }) end,
      "missing: layers%.2%.")
    os.remove(path)
  end)
end)

describe("train.bits_per_byte", function()
  it("is 8 for a uniform model, whatever the windows", function()
    local model = make()
    model.norm.weight:detach():fill_(0) -- all logits are 0 then
    model.norm.bias:detach():fill_(0)
    for _, stride in ipairs{ 16, 8, 5 } do
      local bits, counted = lac.train.bits_per_byte(model, text:slice(1, 101), { stride = stride })
      assert.near(8, bits, 1e-5)
      assert.equal(100, counted)
    end
    assert.is_true(model.training)
  end)

  it("agrees with -log2 of the model's own probabilities", function()
    local model = make(4)
    local bytes = text:slice(1, 17)
    local tokens = lac.tensor({ { bytes:text():byte(1, 16) } }, { dtype = "i32" })
    local logits, total = model(tokens):totable()[1], 0
    for t = 1, 16 do
      local sum = 0
      for c = 1, 256 do sum = sum + math.exp(logits[t][c]) end
      total = total + math.log(sum) - logits[t][bytes:text():byte(t + 1) + 1]
    end
    assert.near(total / math.log(2) / 16, (lac.train.bits_per_byte(model, bytes)), 1e-5)
  end)
end)
