--- watch_spec.lua: the NaN watch names the operator that is to blame, and only that one.
--
-- Each case makes a NaN or an infinity in a known place, forward or backward, and the message must name the
-- operator, the position, the shapes, the module path and the line of the forward call. What is no mistake
-- must pass: masks of -inf, attention rows without keys, whole training steps. Nothing may stay switched on.

local lac = require "lacuna"

local HERE = "tests/watch_spec%.lua:%d+"

local function blame(fn, ...)
  local ok, message = pcall(lac.detect_anomaly, fn)
  assert.is_false(ok, "nothing was found")
  for _, pattern in ipairs{ ... } do assert.matches(pattern, message) end
  assert.is_false(lac.nan_watch(false))
  return message
end

describe("the NaN watch", function()
  it("names the operator of a forward pass, the place and what its inputs held", function()
    for _, dtype in ipairs{ "f32", "f64", "f16", "bf16" } do
      blame(function() return lac.tensor({ { 1, 2 }, { 0, 3 } }, { dtype = dtype }):log():exp():sum() end,
        "^nan_watch: log made %-inf at %[2, 1%] of " .. dtype .. " %[2 x 2%] %(0 nan, 1 inf%); inputs: x "
          .. dtype .. " %[2 x 2%] %(finite%) %[" .. HERE .. "%]$")
    end
    blame(function() return lac.tensor({ 1, -1 }):sqrt() end, "sqrt made nan at %[2%] of f32 %[2%]")
    blame(function() return lac.full{ 3, value = 3e38 } * 2 end,
      "mul made inf at %[1%] of f32 %[3%] %(0 nan, 3 inf")
    blame(function() return lac.full{ 2, 3, value = 300 }:to{ dtype = "f16" } * 300 end, "mul made inf")
    blame(function() return lac.full{ 2, value = 1e300, dtype = "f64" }:to{ dtype = "f32" } end,
      "copy made inf at %[1%] of f32 %[2%].*inputs: src f64 %[2%] %(finite%)")
  end)

  it("says when an input was to blame", function()
    blame(function() return lac.tensor({ 1, 0 / 0 }) + 1 end,
      "add made nan at %[2%].*x f32 %[2%] %(1 nan, 0 inf%)")
    blame(function()
      local x = lac.tensor({ 1, 1 / 0 })
      return x - x
    end, "sub made nan at %[2%]", "x f32 %[2%] %(0 nan, 1 inf%)", "y f32 %[2%] %(0 nan, 1 inf%)")
  end)

  it("names the module and the line of the forward call, also for the backward pass", function()
    local Root = lac.nn.module("Root")
    function Root:init() self.inner = lac.nn.Linear(2, 2) end
    function Root:forward(x) return self.inner(x * 0):abs():sqrt() end
    local net = lac.nn.Sequential(lac.nn.Linear(3, 2), Root())
    net[2].inner.bias:detach():fill_(0)
    local line = debug.getinfo(1, "l").currentline + 2
    local message = blame(function()
      local out = net(lac.ones{ 4, 3 })
      local loss = out:sum()
      loss:backward()
    end, "the backward of sqrt: sqrt made inf at %[1, 1%] of f32 %[4 x 2%]", "g f32 %[4 x 2%] %(finite%)",
      "; forward called at %[Sequential%S+, tests/watch_spec%.lua:%d+%] %[" .. HERE .. "%]$")
    -- the script's line inside the module's forward is nearer than the line of the call
    assert.is_truthy(message:find("forward called at", 1, true))
    assert.is_truthy(message:find(("watch_spec.lua:%d]"):format(line + 2), 1, true), message)
    blame(function() return net(lac.full{ 1, 3, value = 1e38 } * 10) end, "mul made inf")
    net[1].weight:detach():fill_(1e38)
    blame(function() return net(lac.full{ 1, 3, value = 1e38 }) end, "made inf",
      "%[Sequential%.?%S*, " .. HERE)
  end)

  it("finds what gradients add up to", function()
    local x = lac.full{ 2, value = 1e-30, grad = true }
    local big = lac.full{ 2, value = 3e38 }
    blame(function() ((x * big):sum() + (x * big):sum()):backward() end,
      "axpy made inf at %[1%] of f32 %[2%]")
  end)

  it("looks into custom operators and recomputed ones", function()
    local op = lac.custom_op{ name = "risky", forward = function(ctx, x)
      ctx:save(x)
      return x * 1
    end, backward = function(ctx, g) return g / (ctx.saved[1] * 0) end }
    local x = lac.ones{ 2, grad = true }
    blame(function() op(x):sum():backward() end, "the backward of risky: div made inf")
    blame(function() lac.checkpoint(function(y) return y:sqrt() end, x * 0):sum():backward() end,
      "the backward of sqrt: sqrt made inf")
  end)

  it("finds what a batch of decoding makes item by item", function()
    local decoder = lac.attention.decoder({ segments = { 8 }, dilations = { 1 }, causal = true },
      { heads = 2, head_dim = 4 })
    for bad = 1, 3 do
      local q, k, v = lac.ones{ 3, 1, 2, 4 }, lac.ones{ 3, 4, 2, 4 }, lac.ones{ 3, 4, 2, 4 }
      q[{ bad, 1, 2 }] = 1e30
      k[{ bad, 1, 2 }] = 1e30
      -- the score is beyond f32; a few rows on CUDA are summed in f64, where only their lse is too large
      local made = lac.default_device() == "cpu" and "nan at %[%d, 1, 2, 1%] of f32 %[3 x 1 x 2 x 4%]"
        or "inf at %[%d, 1, 2%] of f32 %[3 x 1 x 2%]"
      blame(function() decoder:attend(q, k, v, { 3, 2, 1 }) end,
        "attention made " .. made:gsub("%%d", tostring(bad)), "q f32 %[3 x 1 x 2 x 4%] %(finite%)")
    end
    lac.detect_anomaly(function()
      for _ = 1, 3 do -- where the results lie, NaN lay before
        local spoilt = lac.empty{ 3, 1, 2, 4 }
        spoilt[{ 3, 1, 2, 4 }] = 0 / 0
        spoilt:release()
        local q, k, v = lac.randn{ 3, 1, 2, 4 }, lac.randn{ 3, 4, 2, 4 }, lac.randn{ 3, 4, 2, 4 }
        decoder:attend(q, k, v, { 3, 2, 1 })
      end
    end)
  end)

  it("lets pass what is no mistake", function()
    lac.detect_anomaly(function()
      local mask = lac.full{ 2, 2, value = -1 / 0 }
      local x = lac.randn{ 2, 2 } + mask
      assert.equal(-1 / 0, x:max():item())
      lac.randn{ 2, 2 }:masked_fill(lac.tensor({ { true, false }, { false, true } }), -1 / 0):softmax(2)
      -- rows without keys: their log-sum-exp is -inf
      local q = lac.randn{ 1, 4, 1, 4, grad = true }
      local out, lse = lac.attend(q, lac.randn{ 1, 4, 1, 4 }, lac.randn{ 1, 4, 1, 4 }, { segments = { 4 },
        dilations = { 1 }, key_padding = lac.zeros{ 1, 4, dtype = "bool" } })
      assert.equal(-1 / 0, lse:max():item())
      out:sum():backward()
      local model = lac.nn.LongNetLM{ layers = 2, width = 16, heads = 2, context = 16, segments = { 8, 16 },
        dilations = { 1, 2 }, dropout = 0.1, checkpoint_activations = true }
      local opt = lac.optim.adamw(model)
      local t = lac.randint{ 2, 16, low = 0, high = 256 }
      for _ = 1, 2 do
        model:loss(t, t):backward()
        opt:step{ clip = 1 }
        opt:zero_grad()
      end
    end)
  end)

  it("leaves nothing of the results that it stopped", function()
    local function settled() -- garbage may go in several rounds
      local live
      repeat
        live = lac.memory("cpu").live
        for _ = 1, 3 do collectgarbage() end
      until live == lac.memory("cpu").live
      return live
    end
    local function stopped()
      blame(function() return lac.zeros{ 1000 }:log() end, "log made %-inf")
      blame(function()
        return lac.attend(lac.full{ 1, 8, 1, 8, value = 1e38 }, lac.full{ 1, 8, 1, 8, value = 1e38 },
          lac.ones{ 1, 8, 1, 8 }, { segments = { 8 }, dilations = { 1 } })
      end, "attention made")
    end
    stopped() -- what earlier specs left where nobody looks, in a slot of a stack, is gone after that
    local live = settled()
    for _ = 1, 3 do stopped() end
    assert.is_true(settled() <= live)
  end)

  it("switches itself off, gives results through and can stay on", function()
    assert.same({ 1, "x" }, { lac.detect_anomaly(function() return 1, "x" end) })
    assert.is_false(lac.nan_watch(true))
    assert.is_false((pcall(function() return lac.zeros{ 1 }:log() end)))
    assert.is_false((pcall(function() return lac.zeros{ 1 }:log() end))) -- the next one is found too
    assert.is_true(lac.nan_watch(false))
    assert.equal(-1 / 0, lac.zeros{ 1 }:log():item())
    assert.error_matches(function() lac.nan_watch(1) end, "expected true or false, got 1")
    assert.error_matches(function() lac.detect_anomaly(1) end, "expected a function, got 1")
    assert.error_matches(function() lac.detect_anomaly(function() error("mine", 0) end) end, "mine")
    assert.is_false(lac.nan_watch(false))
  end)

  it("is an option of train.fit", function()
    local model = lac.nn.Linear(2, 1)
    local ok, message = pcall(lac.train.fit, { model = model, optimizer = lac.optim.sgd(model, { lr = 1 }),
      steps = 3, batch = function(k) return lac.full{ 1, 2, value = k - 2 } end, progress = "none",
      nan_watch = true, loss = function(m, x) return m(x):sum() + x:sqrt():sum() end })
    assert.is_false(ok)
    assert.matches("sqrt made nan at %[1, 1%] of f32 %[1 x 2%]", message)
    assert.is_false(lac.nan_watch(false))
  end)
end)
