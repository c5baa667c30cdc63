--- The memory of a step: the recorded timeline against the pool's own statistics, and against plain counting.
--
-- The pool keeps a peak of its own, so the peak of a timeline has a witness; the holders at the peak must add
-- up to it; and all changes of a step that leaves nothing behind must add up to zero. Categories are checked
-- on a model whose parameters are counted apart. Pictures are checked for being what their names say.

local lac = require "lacuna"
local lib = require "lacuna.lib"
local sys = require "lacuna.sys"
local json = require "lacuna.json"

local function here() return debug.getinfo(2, "l").currentline end

local read = require "support.read"

local function sum(list, field)
  local total = 0
  for _, one in ipairs(list) do total = total + one[field] end
  return total
end

describe("lac.memory_profile", function()
  local model, optimizer, x
  setup(function()
    model = lac.nn.LongNetLM{ vocab = 32, layers = 2, width = 16, heads = 2, context = 16,
                              segments = { 8, 16 }, dilations = { 1, 2 } }
    optimizer = lac.optim.adamw(model:parameters(), { lr = 1e-3 })
    x = lac.randint({ 2, 16 }, { high = 32 })
  end)
  teardown(function() model, optimizer, x = nil, nil, nil end)

  local function step()
    lac.scope(function()
      model:loss(x, x):backward()
      optimizer:step{ clip = 1 }
      optimizer:zero_grad{ release = true }
    end)
  end

  it("sees every block, in order, with its line and what made it", function()
    local line
    local p, kept = lac.memory_profile(function()
      local a = lac.ones{ 1000 } line = here() -- 4096 bytes in its size class
      local b = a * 2
      a:release()
      b:release()
      return lac.zeros{ 10 }
    end)
    local changes = {}
    for i, e in ipairs(p.events) do changes[i] = e.change end
    assert.are.same({ 4096, 4096, -4096, -4096, 64 }, changes)
    assert.are.equal("tests/timeline_spec.lua:" .. line, p.events[1].line)
    assert.are.equal(p.events[1].serial, p.events[3].serial)
    assert.are.equal("mul", p.events[2].op)
    assert.are.equal("f32 [1000]", p.events[1].what)
    assert.are.equal(p.start_bytes + 8192, p.peak.bytes)
    assert.are.equal(10, kept:numel())
    local last = 0
    for _, e in ipairs(p.events) do
      assert.is_true(e.at >= last and e.at <= p.wall)
      last = e.at
    end
  end)

  it("has the pool's peak, and holders that add up to it", function()
    step()
    lib.collect()
    lac.reset_peak()
    local p = lac.memory_profile(function()
      step()
      lib.collect() -- gives back what a collection within the step has found
    end)
    assert.are.equal(lac.memory().peak, p.peak.bytes)
    assert.are.equal(p.peak.bytes, sum(p.peak.blocks, "bytes"))
    assert.are.equal(p.peak.bytes, sum(p:holders(), "bytes"))
    assert.are.equal(0, sum(p.events, "change")) -- a step leaves nothing behind
    assert.are.equal(lac.memory().live, p.start_bytes)
  end)

  it("tells parameters, gradients, optimizer, activations, temporaries and workspaces apart", function()
    step()
    local p = lac.memory_profile(step)
    local parameters, count = 0, 0
    for _, t in ipairs(model:parameters()) do
      local info = lib.ffi.new("lac_block_info")
      lib.check(lib.C.lac_tensor_block(t.c, info))
      parameters, count = parameters + tonumber(info.bytes), count + 1
    end
    local by, blocks = {}, {}
    for _, b in ipairs(p.peak.blocks) do by[b.category] = (by[b.category] or 0) + b.bytes end
    for _, e in ipairs(p.events) do
      if e.change > 0 then blocks[e.category] = (blocks[e.category] or 0) + 1 end
    end
    assert.is_true(by.parameters >= parameters) -- other specs' models may be alive
    assert.is_true(by.optimizer >= 2 * parameters)
    assert.is_true(by.activations > 0)
    assert.are.equal(count, blocks.gradients)
    assert.is_true(blocks.temporaries > 0 and blocks.workspace > 0)
    for _, e in ipairs(p.events) do
      if e.category == "activations" and e.change > 0 then assert.is_false(e.backward) end
      if e.category == "gradients" and e.change > 0 then -- the fused loss has them while the logits are there
        assert.is_true(e.backward or e.op == "linear_cross_entropy")
      end
    end
  end)

  it("draws itself as PNG and SVG, by category and by line, and as text", function()
    local threads = lac.threads() -- each thread's workspace is in the picture
    lac.threads(1)
    local p = lac.memory_profile(step)
    lac.threads(threads)
    local png, svg, out = sys.temporary(".png"), sys.temporary(".svg"), sys.temporary(".json")
    finally(function()
      for _, path in ipairs{ png, svg, out } do os.remove(path) end
    end)
    assert.are.equal(png, p:plot{ output = png })
    assert.are.equal("\137PNG", read(png):sub(1, 4))
    p:plot{ output = svg, by = "line", top = 3, title = "a title" }
    local text = read(svg)
    assert.matches("a title", text)
    assert.matches("LongNetLM", text)
    assert.matches("all others", text)
    for _, options in ipairs{ {}, { by = "line" }, { width = 40, height = 5 } } do
      local chart = p:chart(options)
      for line in chart:gmatch("[^\n]+") do assert.is_true(#line <= 100, line) end
    end
    local rows = {}
    for line in p:chart{ width = 40, height = 5 }:gmatch("[^\n]+") do rows[#rows + 1] = line end
    assert.matches("^ *[%d%.]+ [KM]iB | *%l", rows[1]) -- the top row is reached
    assert.matches("AAAA", rows[4])
    assert.matches("^ +0 +[%d%.]+ ms$", rows[7])
    for line in tostring(p):gmatch("[^\n]+") do assert.is_true(#line <= 100, line) end
    assert.matches("at the peak:", tostring(p))

    assert.are.equal(out, p:json(out))
    local data = assert(json.decode(read(out)))
    assert.are.equal(#p.events, #data.events)
    assert.are.equal(p.peak.bytes, data.peak.bytes)
    assert.are.equal(p.start_bytes, data.start_bytes)
  end)

  it("passes errors on and records nothing afterwards", function()
    assert.error_matches(function() lac.memory_profile(function() error("mine", 0) end) end, "^mine$")
    lac.zeros{ 10 }:release()
    local info = lib.ffi.new("lac_block_info[1]")
    assert.are.equal(0, tonumber(lib.C.lac_memory_events(0, 1, info)))
    assert.are.equal(0, #lac.memory_profile(function() end).events)
    assert.is_string(tostring(lac.memory_profile(function() end)))
    assert.error_matches(function() lac.memory_profile() end, "fn must be a function, got nil")
    assert.error_matches(function() lac.memory_profile(step, { trak = false }) end, "did you mean 'track'")
    local p = lac.memory_profile(step, { track = false })
    assert.are.equal("(not tracked)", p.events[1].line)
    assert.error_matches(function() p:plot{ by = "line" } end, "output")
    assert.error_matches(function() p:plot{ output = "x.jpg" } end, "must end in")
    assert.error_matches(function() p:json("/nonexistent/x.json") end, "cannot write")
  end)
end)

describe("plot.area", function()
  it("stacks series, and names what is wrong", function()
    local svg = sys.temporary(".svg")
    finally(function() os.remove(svg) end)
    lac.plot.area{ x = { 0, 1, 2 }, series = { { label = "low", y = { 1, 1, 1 } }, { y = { 0, 2, 1 } } },
                   marks = { { x = 1, label = "it's here" }, { x = 2 } }, output = svg }
    local text = read(svg)
    assert.matches("low", text)
    assert.matches("s here", text)
    local area = lac.plot.area
    assert.error_matches(function() area{ x = { 1 }, series = {}, output = svg } end, "series is empty")
    assert.error_matches(function() area{ x = { 1 }, series = { { y = { 1, 2 } } }, output = svg } end,
      "series%[1%] has 2 values, x has 1")
    assert.error_matches(function() area{ x = { 1 }, series = { { y = { -1 } } }, output = svg } end,
      "must not be negative, got %-1")
    assert.error_matches(function() area{ x = { 1 }, series = { { y = { 1 } } } } end, "output is required")
  end)
end)
