--- scaler_spec.lua: loss scaling and training in f16 and bf16.
--
-- Scaling by powers of two must not change one bit of an update that does not overflow; a step that does must
-- change nothing but the scale. What f16 loses without scaling and keeps with it is shown on a gradient below
-- its smallest number. A run whose first steps overflow, interrupted and resumed, must equal the
-- uninterrupted one. Half precision must train as f32 does within what its rounding explains: losses are
-- compared.

local lac = require "lacuna"
local sys = require "lacuna.sys"
local runlog = require "lacuna.log"

local text = lac.data.string(("It is a lacuna: a gap that is meant. "):rep(60))
local function batch(k) return text:batch(k, { batch = 4, context = 16, seed = 2 }) end

local function make(dtype, options)
  lac.manual_seed(1)
  local model = lac.nn.LongNetLM{ layers = 1, width = 16, heads = 2, context = 16, segments = { 8, 16 },
    dilations = { 1, 2 }, dtype = dtype }
  return model, lac.optim.adamw(model, { lr = 0.01, master = (options or {}).master ~= false })
end

local function bits(model)
  local all = {}
  for _, p in ipairs(model:parameter_list()) do
    local values = p.tensor:detach():flatten():to{ dtype = "f64" }:totable()
    all[#all + 1] = p.name .. " " .. table.concat(values, " ")
  end
  return table.concat(all, "\n")
end

describe("the loss scaler", function()
  local threads
  setup(function()
    threads = lac.threads()
    lac.threads(1)
  end)
  teardown(function() lac.threads(threads) end)

  it("changes no bit of an update, with and without clipping", function()
    for _, how in ipairs{ {}, { clip = 0.5 }, { clip_value = 1e-3 } } do
      local results, norms = {}, {}
      for i = 1, 2 do
        local model, optimizer = make("f32")
        local scaler = i == 2 and lac.optim.loss_scaler{ init = 2 ^ 12 } or nil
        for k = 1, 3 do
          local loss = model:loss(batch(k))
          if scaler then loss = scaler:scale(loss) end
          loss:backward()
          local norm, left_out = optimizer:step{ clip = how.clip, clip_value = how.clip_value,
            scaler = scaler }
          assert.is_nil(left_out)
          norms[i] = norm
          optimizer:zero_grad()
        end
        results[i] = bits(model)
      end
      assert.equal(results[1], results[2])
      if how.clip then assert.is_true(math.abs(norms[1] - norms[2]) <= 1e-12 * norms[1]) end
      assert.is_number(norms[2]) -- with a scaler there is always one
    end
  end)

  it("leaves a step out whose gradients overflow, and shrinks", function()
    local w = lac.tensor({ 1, 2 }, { dtype = "f16", grad = true })
    local optimizer = lac.optim.sgd({ w }, { lr = 1 })
    local scaler = lac.optim.loss_scaler{ init = 2 ^ 16, interval = 2 }
    local function step(factor)
      optimizer:zero_grad()
      scaler:scale((w * factor):to{ dtype = "f32" }:sum()):backward()
      return optimizer:step{ scaler = scaler }
    end
    local norm, left_out = step(4)
    assert.equal(math.huge, norm)
    assert.is_true(left_out)
    assert.same({ 1, 2 }, w:detach():totable())
    assert.equal(0, optimizer.steps)
    assert.same({ value = 2 ^ 15, good = 0, skipped = 1 }, scaler:state_dict())
    norm, left_out = step(0.5)
    assert.is_nil(left_out)
    assert.is_true(math.abs(norm - math.sqrt(0.5)) < 1e-12)
    assert.same({ 0.5, 1.5 }, w:detach():totable())
    assert.equal(2 ^ 15, scaler.value)
    step(0.5)
    assert.equal(2 ^ 16, scaler.value) -- two good steps
    assert.equal(2, optimizer.steps)
  end)

  it("keeps gradients that f16 alone loses", function()
    local function gradient(scaler)
      local w = lac.tensor({ 1 }, { dtype = "f16", grad = true })
      local optimizer = lac.optim.sgd({ w }, { lr = 2 ^ 26, master = true })
      local loss = w:to{ dtype = "f32" }:sum() * 2 ^ -26 -- a quarter of the smallest f16
      if scaler then loss = scaler:scale(loss) end
      loss:backward()
      optimizer:step{ scaler = scaler }
      return 1 - w:detach():totable()[1]
    end
    assert.equal(0, gradient(nil))
    assert.equal(1, gradient(lac.optim.loss_scaler()))
  end)

  it("stops when it cannot shrink any more", function()
    local scaler = lac.optim.loss_scaler{ init = 2, min = 1 }
    scaler:update(true)
    assert.equal(1, scaler.value)
    assert.error_matches(function() scaler:update(true) end, "not finite at the smallest scale, 1")
    local most = lac.optim.loss_scaler{ init = 2, max = 4, interval = 1 }
    for _ = 1, 3 do most:update(false) end
    assert.equal(4, most.value)
    assert.matches("LossScaler%(4, 0 steps left out%)", tostring(most))
  end)

  it("is checked", function()
    assert.error_matches(function() lac.optim.loss_scaler{ backof = 0.5 } end, "did you mean 'backoff'")
    assert.error_matches(function() lac.optim.loss_scaler{ init = 1, min = 2 } end, "init must lie between")
    assert.error_matches(function() lac.optim.loss_scaler():scale(lac.ones({ 1 }, { dtype = "f16" })) end,
      "reduce it in f32")
    assert.error_matches(function() lac.optim.loss_scaler():scale(1) end, "loss")
    local w = lac.ones({ 1 }, { grad = true })
    w:sum():backward()
    assert.error_matches(function() lac.optim.sgd({ w }, { lr = 1 }):step{ scaler = { value = 1 } } end,
      "scaler must be a loss scaler")
    assert.error_matches(function() lac.optim.loss_scaler():load_state_dict{ value = 1 } end, "good")
  end)
end)

describe("training in half precision", function()
  local dir, threads
  setup(function()
    threads = lac.threads()
    lac.threads(1)
  end)
  teardown(function() lac.threads(threads) end)
  before_each(function() dir = sys.temporary("-mixed") end)
  after_each(function() os.execute("rm -rf " .. sys.quote(dir)) end)

  local function fit(dtype, options)
    local model, optimizer = make(dtype)
    local o = { model = model, optimizer = optimizer, steps = 30, batch = batch, clip = 1, progress = "none" }
    for key, value in pairs(options or {}) do o[key] = value end
    return lac.train.fit(o), model, o
  end

  it("follows f32 within its rounding", function()
    local exact = fit("f32").loss
    assert.is_true(math.abs(fit("bf16").loss - exact) < 2 ^ -7 * exact)
    local half = fit("f16", { scaler = lac.optim.loss_scaler() })
    assert.is_true(math.abs(half.loss - exact) < 2 ^ -10 * 4 * exact)
  end)

  it("resumes bit by bit over steps that are left out, and logs the scale", function()
    local function session(folder, resume, break_at)
      local log = runlog.open{ path = folder, append = resume }
      local result = { pcall(fit, "f16", { steps = 12, log = log, log_every = 1, resume = resume,
        checkpoint = log:path("c.safetensors"), checkpoint_every = 4,
        scaler = lac.optim.loss_scaler{ init = 2 ^ 24, interval = 4 },
        batch = function(k)
          if k == break_at then error("interrupted!", 0) end
          return batch(k)
        end }) }
      if result[1] then log:close() end
      return unpack(result)
    end
    local ok, _, whole, o = session(dir .. "-a")
    assert.is_true(ok)
    assert.is_true(o.scaler.skipped > 0 and o.scaler.value < 2 ^ 24)
    assert.equal(12 - o.scaler.skipped, o.optimizer.steps)
    for _, at in ipairs{ 2, 7 } do
      local folder = dir .. "-b" .. at
      local _, reason = session(folder, nil, at)
      assert.equal("interrupted", reason)
      local resumed, _, model, p = session(folder, true)
      assert.is_true(resumed)
      assert.equal(bits(whole), bits(model))
      assert.same(o.scaler:state_dict(), p.scaler:state_dict())
      os.execute("rm -rf " .. sys.quote(folder))
    end
    local last, skipped
    for _, record in ipairs(runlog.read(dir .. "-a/log.jsonl")) do
      if record.event == "step" then
        if record.left_out ~= (skipped or 0) then assert.is_nil(record.norm) end
        last, skipped = record, record.left_out
      end
    end
    assert.equal(o.scaler.value, last.scale)
    assert.equal(o.scaler.skipped, last.left_out)
    assert.error_matches(function()
      fit("f16", { steps = 14, checkpoint = dir .. "-a/c.safetensors", resume = true })
    end, "was written with a loss scaler and this run has none")
    os.execute("rm -rf " .. sys.quote(dir .. "-a"))
  end)
end)
