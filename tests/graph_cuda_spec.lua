--- graph_cuda_spec.lua: captured graphs give what eager runs give, to the bit, and refuse what they cannot.
--
-- Tagged #gpu, but for the errors of a machine without a device. Every comparison is between two runs from
-- one seed, one of which is captured: results, gradients, random bits, whole training runs.

local gpu = os.getenv "LACUNA_GPU" == "1" and it or pending

local lac = require "lacuna"
local lib = require "lacuna.lib"

local CUDA = { device = "cuda" }

local function refused(pattern, fn, ...)
  local g, args = lac.graph(fn), { ... }
  g(unpack(args))
  local before = { lac.rng_state() }
  local ok, message = pcall(g, unpack(args))
  assert.is_false(ok)
  assert.matches(pattern, message)
  assert.same(before, { lac.rng_state() })
  assert.are.equal(6, lac.full({ 2, 3 }, 1, CUDA):sum():item()) -- the device works on
end

describe("a graph", function()
  if os.getenv "LACUNA_GPU" ~= "1" then
    it("needs a device", function()
      local ok, message = pcall(lac.graph, function() end)
      assert.is_false(ok)
      assert.matches("graph: device 'cuda' is not available", message)
      assert.has_error(function() lac.graph(3) end)
      local model = lac.nn.Linear(2, 2)
      ok, message = pcall(lac.train.fit, { model = model, optimizer = lac.optim.sgd(model, { lr = 1 }),
        graph = true, loss = function() end, batch = function() end, steps = 1 })
      assert.is_false(ok)
      assert.matches("train.fit: graph: device 'cuda' is not available", message)
    end)
  end
end)

describe("a captured graph #gpu", function()
  gpu("gives the numbers of an eager run, call after call", function()
    local w = lac.randn({ 64, 64 }, CUDA)
    local function fn(x, y) return (x:matmul(w):gelu() + y):softmax(2), (x * y):sum() end
    local g = lac.graph(fn)
    for k = 1, 6 do
      local x, y = lac.randn({ 8, 64 }, CUDA), lac.randn({ 8, 64 }, CUDA)
      local a, b = fn(x, y)
      local c, d = g(x, y)
      assert.is_true(lac.equal(a, c) and lac.equal(b, d), "call " .. k)
      w:add_(0.01) -- it is read where it is
    end
    assert.matches("^Graph%(%d+ nodes, .*%)$", tostring(g))
    local nodes, bytes = g:size()
    assert.is_true(nodes >= 5 and bytes > 0)
  end)

  gpu("draws on from the random stream, and from a new seed", function()
    local x = lac.ones({ 100, 70 }, CUDA)
    local q = lac.randn({ 1, 64, 2, 16 }, CUDA)
    local function fn()
      local a = lac.dropout(x, 0.3) + lac.rand_like(x)
      local o = lac.attend(q, q, q, { segments = { 32 }, dilations = { 1 }, dropout = 0.4 })
      return lac.dropout(a, 0.5), o
    end
    local function run(f)
      local out = {}
      for k = 1, 7 do
        if k == 1 or k == 5 then lac.manual_seed(11 + k) end
        local a, b = f()
        out[2 * k - 1], out[2 * k] = a:to "cpu", b:to "cpu"
      end
      return out, { lac.rng_state() }
    end
    local eager, state = run(fn)
    local captured, same = run(lac.graph(fn))
    for i = 1, #eager do assert.is_true(lac.equal(eager[i], captured[i]), "draw " .. i) end
    assert.same(state, same)
    assert.is_false(lac.equal(captured[5], captured[7]))
  end)

  gpu("makes gradients, or adds to them, and keeps its memory to itself", function()
    local function run(make)
      lac.manual_seed(3)
      local w = lac.randn({ 32, 32 }, CUDA):requires_grad_(true)
      local v = lac.randn({ 32 }, CUDA):requires_grad_(true)
      v.grad = lac.zeros({ 32 }, CUDA)
      local step, list = make(function(x)
        local loss = ((x:matmul(w) + v):tanh() ^ 2):mean()
        loss:backward()
        return loss
      end), {}
      for k = 1, 6 do
        lac.scope(function()
          local loss = step(lac.randn({ 16, 32 }, CUDA))
          list[#list + 1] = loss:item()
          list[#list + 1] = w.grad:sum():item()
          list[#list + 1] = v.grad:sum():item()
          w.grad = nil
          for _ = 1, 20 do lac.full({ 16, 32 }, 1e9, CUDA) end -- what would like its memory
        end)
        if k % 2 == 0 then lac.trim() end
      end
      return list
    end
    assert.same(run(function(f) return f end), run(lac.graph))
  end)

  gpu("gives its memory back, and results end with the next call", function()
    lib.collect()
    local before = lac.memory("cuda").live
    local x = lac.randn({ 1000, 1000 }, CUDA)
    local with = lac.memory("cuda").live
    local g = lac.graph(function(a) return (a * 2 + 1):exp() end)
    g(x)
    local first = g(x)
    local second = g(x)
    assert.is_true(first:is_released())
    assert.is_false(second:is_released())
    assert.is_true(lac.memory("cuda").live >= with + 8e6)
    g:release()
    first, second = nil, nil -- luacheck: ignore 311
    lib.collect()
    assert.are.equal(with, lac.memory("cuda").live)
    x:release()
    assert.are.equal(before, lac.memory("cuda").live)
  end)

  gpu("refuses what it cannot repeat, with the reason, and leaves everything as it was", function()
    local x = lac.randn({ 4, 3 }, CUDA)
    refused("the host waits for a result here", function(a) return a:sum():item() end, x)
    refused("is on the cpu, and a graph holds only what runs on cuda", function(a)
      return a + lac.ones { 4, 3 }:mul(2):to "cuda"
    end, x)
    refused("copy: a graph would repeat the bytes that the cpu has now", function(a)
      return a + lac.tensor({ 1, 2, 3 }, CUDA)
    end, x)
    refused("the host waits for a result here", function(a) return (a:nonzero()) end, x)
    refused("result 1 is .*: a graph returns tensors", function(a) return { a } end, x)
    for _, watch in ipairs { lac.profile, lac.detect_anomaly } do
      local watched, why = pcall(watch, function()
        local g = lac.graph(function(a) return a + 1 end)
        g(x)
        g(x)
      end)
      assert.is_false(watched)
      assert.matches("the profiler and the watch for NaN wait for every operator: stop them first", why)
    end
    local p = lac.randn({ 4, 3 }, CUDA):requires_grad_(true)
    local optimizer = lac.optim.adamw({ p }, {})
    p.grad = lac.ones({ 4, 3 }, CUDA)
    refused("graph", function() optimizer:step() end)
    refused("graph", function()
      optimizer:step { clip = 1 }
    end)
    local calls = 0
    refused("oops", function(a)
      calls = calls + 1
      if calls > 1 then error "oops" end
      return a
    end, x)
    local g = lac.graph(function(a, n) return a * n end)
    g(x, 2)
    g(x, 2)
    assert.is_true(lac.equal(x * 2, g(x, 2)))
    for _, args in ipairs { { x, 3 }, { x:t(), 2 }, { x } } do
      local ok, message = pcall(g, unpack(args))
      assert.is_false(ok)
      assert.matches("^graph: ", message)
    end
    local ok, message = pcall(g, x:to "cpu", 2)
    assert.is_false(ok)
    assert.matches("argument 1 is .*: a graph works on cuda", message)
    assert.is_true(lac.equal(x * 2, g(x, 2)))
  end)

  gpu("trains as eager steps do, to the bit: schedule, clipping, dropout, accumulation, f16", function()
    local function losses(options, captured)
      lac.manual_seed(9)
      lac.default_device "cuda"
      local list = {}
      local ok, message = pcall(function()
        local model = lac.nn.LongNetLM { vocab = 64, layers = 2, width = 32, heads = 4, context = 32,
          segments = { 16, 32 }, dilations = { 1, 2 }, dropout = 0.1, dtype = options.dtype,
          checkpoint_activations = options.recompute }
        local data = lac.randint { 64, 33, high = 64 }
        lac.train.fit { model = model, steps = 12, graph = captured, progress = "none", clip = options.clip,
          optimizer = lac.optim.adamw(model, { lr = 1e-3, master = options.dtype ~= nil }),
          scaler = options.scaler and lac.optim.loss_scaler { interval = 4 } or nil,
          schedule = function(step) return step / 12 end, accumulate = options.accumulate,
          batch = function(k)
            local rows = data[{ { (k * 5) % 50 + 1, (k * 5) % 50 + 8 } }]
            return rows[{ {}, { 1, 32 } }]:contiguous(), rows[{ {}, { 2, 33 } }]:contiguous()
          end,
          evaluate = function(m, step) return { sum = m:parameters()[1]:to("f32"):sum():item() + step } end }
        for _, p in ipairs(model:parameters()) do list[#list + 1] = p:to { device = "cpu", dtype = "f32" } end
      end)
      lac.default_device "cpu"
      assert.is_true(ok, message)
      return list
    end
    for _, options in ipairs { { clip = 1 }, { accumulate = 3 }, { recompute = true },
      { dtype = "f16", scaler = true, clip = 1 }, { dtype = "bf16" } } do
      local eager, captured = losses(options, false), losses(options, true)
      for i = 1, #eager do assert.is_true(lac.equal(eager[i], captured[i]), "parameter " .. i) end
    end
  end)
end)
