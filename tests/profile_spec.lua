--- The profiler: its records are complete and do not overlap, its counts are those of the formulas, its trace
-- is one that a viewer can nest.
--
-- Times are not compared with anything but each other: operators, the gaps between them and the tracer's
-- share must add up to the wall clock, which is measured apart. FLOPs are compared with formulas written
-- here: a product's 2 M N K, and for attention the pairs of each segment counted by a loop over positions.
-- The trace file is read back as JSON and checked span by span.

local lac = require "lacuna"
local lib = require "lacuna.lib"
local sys = require "lacuna.sys"
local COMMAND = os.getenv("LACUNA_COMMAND") or "build/bin/lacuna"
local json = require "lacuna.json"

local function profile(fn, options)
  options = options or {}
  options.print = false
  return lac.profile(fn, options)
end

local function here() return debug.getinfo(2, "l").currentline end

local function row(p, by, name, pass)
  for _, r in ipairs(p:rows(by)) do
    if r.name == name and (not pass or r.pass == pass) then return r end
  end
  error("no row " .. name)
end

local function step_of_a_model()
  local model = lac.nn.LongNetLM{ vocab = 32, layers = 2, width = 16, heads = 2, context = 16,
                                  segments = { 8, 16 }, dilations = { 1, 2 } }
  local optimizer = lac.optim.adamw(model:parameters(), { lr = 1e-3 })
  local x = lac.randint({ 2, 16 }, { high = 32 })
  return function()
    lac.scope(function()
      model:loss(x, x):backward()
      optimizer:step{ clip = 1 }
      optimizer:zero_grad{ release = true }
    end)
  end
end

describe("lac.profile", function()
  local step
  setup(function() step = step_of_a_model() end)
  teardown(function() step = nil end)

  it("adds up: operators, the gaps between them and tracing are the wall clock", function()
    for _, trace in ipairs{ false, true } do
      local before = sys.time()
      local p = profile(step, { trace = trace, runs = 3 })
      local outer = sys.time() - before
      assert.is_true(p.wall > 0 and p.wall <= outer)
      assert.is_true(math.abs(p.engine + p.host + p.tracing - p.wall) < 1e-6)
      assert.is_true(math.abs(p.forward + p.backward - p.engine) < 1e-9)
      assert.is_true(p.host > 0 and (p.tracing > 0) == trace)
      local at, engine = 0, 0
      for _, e in ipairs(p.events) do
        assert.is_true(e.from >= at and e.to >= e.from) -- nothing overlaps
        at, engine = e.to, engine + (e.to - e.from)
      end
      assert.is_true(at <= p.wall)
      assert.is_true(math.abs(engine - p.engine) < 1e-9)
      for _, by in ipairs(trace and { "op", "line" } or { "op" }) do
        local sum, calls = 0, 0
        for _, r in ipairs(p:rows(by)) do sum, calls = sum + r.time, calls + r.calls end
        assert.are.equal(#p.events, calls)
        assert.is_true(math.abs(sum - p.engine) < 1e-9)
      end
    end
  end)

  it("counts the FLOPs and bytes of a matrix product", function()
    local a, b, bias = lac.randn{ 3, 5, 7 }, lac.randn{ 7, 11 }, lac.randn{ 11 }
    local p = profile(function() a:matmul(b) end)
    local r = row(p, "op", "matmul")
    assert.are.equal(2 * 3 * 5 * 7 * 11, r.flops)
    assert.are.equal(4 * (3 * 5 * 7 + 7 * 11 + 3 * 5 * 11), r.bytes) -- b once, though three items share it
    p = profile(function() lac.nn.Linear(7, 11) end)
    assert.are.equal(0, p.flops)
    local linear = lac.nn.Linear(7, 11)
    p = profile(function() linear(a) end)
    assert.are.equal(2 * 15 * 7 * 11 + 15 * 11, p.flops)
    assert.are.equal(11, bias:numel())
  end)

  -- pairs by the definition: position p is kept when (p mod w) mod r = o, and sees the kept keys of its
  -- segment
  local function pairs_of(n, w, r, o, causal)
    local count = 0
    for i = 0, n - 1 do
      for j = 0, n - 1 do
        local same = math.floor(i / w) == math.floor(j / w)
        local kept = (i % w) % r == o and (j % w) % r == o
        if same and kept and (not causal or j <= i) then count = count + 1 end
      end
    end
    return count
  end

  it("counts the FLOPs of attention by its pairs, in both directions", function()
    local B, N, H, D = 2, 48, 4, 8
    local q, k, v = lac.randn{ B, N, H, D, grad = true }, lac.randn{ B, N, H, D }, lac.randn{ B, N, H, D }
    local options = { segments = { 16, 48 }, dilations = { 1, 3 }, causal = true } -- LongNet's rules
    local p = profile(function() lac.attend(q, k, v, options):sum():backward() end)
    local pairs_all = 0
    for head = 0, H - 1 do
      pairs_all = pairs_all + pairs_of(N, 16, 1, 0, true) + pairs_of(N, 48, 3, head % 3, true)
    end
    assert.are.equal(4 * D * B * pairs_all, row(p, "op", "attend", "fwd").flops)
    assert.are.equal(10 * D * B * pairs_all, row(p, "op", "attend_bwd", "bwd").flops)
  end)

  it("counts maps, reductions and optimizers by their elements", function()
    local x = lac.randn{ 6, 10, grad = true }
    local wide = lac.randn{ 6, 1 }:expand(6, 10)
    local p = profile(function() return (x:tanh() + wide):sum() end)
    assert.are.equal(60, row(p, "op", "tanh").flops)
    assert.are.equal(4 * (60 + 6 + 60), row(p, "op", "add").bytes) -- the expanded axis is read once
    assert.are.equal(60, row(p, "op", "sum").flops)
    local optimizer = lac.optim.adamw({ x }, { lr = 0.1 })
    x:square():sum():backward()
    p = profile(function() optimizer:step() end)
    assert.are.equal(4 * 60 * 7, p.bytes) -- parameter and moments twice, the gradient once
  end)

  it("knows which operators ran for a backward pass, also of the same name", function()
    local a = lac.randn{ 8, 8, grad = true }
    local p = profile(function() a:matmul(a):sum():backward() end)
    assert.are.equal(1, row(p, "op", "matmul", "fwd").calls)
    assert.are.equal(2, row(p, "op", "matmul", "bwd").calls)
    assert.are.equal(0, lib.flags.tag)
    pcall(function() -- a rule that fails leaves no mark behind
      local bad = lac.custom_op{ name = "bad", forward = function(_, x) return x * 1 end,
                                 backward = function() error("no") end }
      bad(a):sum():backward()
    end)
    assert.are.equal(0, lib.flags.tag)
  end)

  it("names modules and lines, and counts backward for the forward's place", function()
    local p = profile(step, { trace = true })
    local total, self = 0, 0
    for _, r in ipairs(p:rows("module")) do
      if r.depth == 1 then total = total + r.time end
      self = self + r.self
      assert.is_true(r.self <= r.time + 1e-12)
    end
    assert.is_true(math.abs(total - p.engine) < 1e-9)
    assert.is_true(math.abs(self - p.engine) < 1e-9)
    local attention = row(p, "module", "LongNetLM.layers[*].attention")
    assert.is_true(attention.forward > 0 and attention.backward > 0)
    assert.is_true(row(p, "module", "LongNetLM.layers[*]").time >= attention.time)
    local each = 0
    for _, r in ipairs(p:rows("module", true)) do
      if r.name:match("^LongNetLM%.layers%[%d%]%.attention$") then each = each + r.time end
    end
    assert.is_true(math.abs(each - attention.time) < 1e-9)

    local a, first, second = lac.randn{ 32, 32, grad = true }, nil, nil
    p = profile(function()
      local b = a:matmul(a) first = here()
      b:exp():sum():backward() second = here()
    end, { trace = true })
    local file = "tests/profile_spec.lua:"
    assert.are.equal(4, row(p, "line", file .. first).calls) -- forward, two for gradients, their sum
    assert.is_true(row(p, "line", file .. first).backward > 0)
    assert.is_true(row(p, "line", file .. second).forward > 0)
  end)

  it("writes a trace that nests", function()
    local path = sys.temporary(".json")
    finally(function() os.remove(path) end)
    local p = profile(step, { trace = true, runs = 2 })
    assert.are.equal(path, p:trace(path))
    local file = assert(io.open(path, "rb"))
    local data = assert(json.decode(file:read("*a")))
    file:close()
    local stack, operators, kinds = {}, 0, {}
    local last = 0
    for _, e in ipairs(data.traceEvents) do
      assert.are.equal("X", e.ph)
      assert.is_true(type(e.name) == "string" and #e.name > 0)
      assert.is_true(type(e.ts) == "number" and type(e.dur) == "number" and e.ts >= 0 and e.dur >= 0)
      assert.is_true(e.pid == 1 and e.tid == 1)
      assert.is_true(e.ts >= last) -- in the order of time
      last = e.ts
      local stop = e.ts + e.dur
      while #stack > 0 and stack[#stack] <= e.ts and stack[#stack] < stop do stack[#stack] = nil end
      assert.is_true(#stack == 0 or stop <= stack[#stack] + 1e-4, e.name .. " leaves what it began in")
      stack[#stack + 1] = stop
      kinds[e.cat] = true
      if e.cat == "operator" then operators = operators + 1 end
    end
    assert.are.equal(#p.events, operators)
    assert.are.same({ profile = true, pass = true, module = true, operator = true }, kinds)
    assert.error_matches(function() p:trace("/nonexistent/x.json") end, "cannot write")
  end)

  it("prints tables of at most 100 columns, largest first", function()
    local p = profile(step, { trace = true })
    for _, options in ipairs{ {}, { by = "op", top = 3 }, { by = "module", each = true }, { by = "line" } } do
      for line in p:report(options):gmatch("[^\n]+") do assert.is_true(#line <= 100, line) end
    end
    local text = p:report{ by = "op", top = 3 }
    assert.matches("operators .*host .*tracing .*operator +pass +calls +time +share", text)
    assert.matches("%d+ more, ", text)
    local rows = p:rows("op")
    for i = 2, #rows do assert.is_true(rows[i - 1].time >= rows[i].time) end
    assert.matches("^Profile%(", tostring(p))
  end)

  it("gives what the function returns, and passes errors on", function()
    local p, a, b, c = profile(function() return 1, nil, 3 end)
    assert.are.same({ 1, nil, 3 }, { a, b, c })
    assert.are.equal(0, #p.events)
    assert.is_string(p:report())
    assert.error_matches(function()
      profile(function() error("mine", 0) end, { trace = true })
    end, "^mine$")
    assert.are.equal(1, #profile(function() lac.zeros{ 1 } end).events) -- and the recorder is as it was
    assert.error_matches(function() profile(function() profile(step) end) end, "profiles do not nest")
    assert.error_matches(function() lac.profile(3) end, "profile: fn must be a function, got 3")
    assert.error_matches(function() lac.profile(step, { traces = true }) end, "did you mean 'trace'")
    assert.error_matches(function() profile(step):rows("module") end, "trace = true")
    assert.error_matches(function() profile(step):rows("opp") end, "did you mean 'op'")
  end)

  it("records nothing unless it runs", function()
    step()
    assert.are.equal(0, tonumber(lib.C.lac_profile_events(0, 1, lib.ffi.new("lac_profile_event[1]"))))
    assert.are.equal(0, tonumber(lib.C.lac_profile_lost()))
  end)

  it("has a name for every operator of c/ops.def, in its order", function()
    local names, i = {}, 0
    for line in io.lines("c/ops.def") do names[#names + 1] = line:match("^LAC_OP%(([%w_]+),") end
    assert.is_true(#names > 20)
    while lib.C.lac_op_name(i) ~= nil do
      assert.are.equal(names[i + 1], lib.ffi.string(lib.C.lac_op_name(i)))
      i = i + 1
    end
    assert.are.equal(#names, i)
  end)

  it("runs a whole script from the command", function()
    local script = sys.temporary(".lua")
    finally(function() os.remove(script) end)
    local file = assert(io.open(script, "wb"))
    file:write("local lac = require 'lacuna'\n",
      "print(select('#', ...), lac.ones{ 3 }:tanh():sum():item() > 2, ...)")
    file:close()
    local status, out, err = sys.run(COMMAND .. " profile " .. sys.quote(script) .. " a b")
    assert.are.equal(0, status, err)
    assert.matches("^2\ttrue\ta\tb\n", out)
    assert.matches("profile: .*operator +pass.*tanh +fwd +1 .*line +calls.*%.lua:2 +3 ", out)
    status, out, err = sys.run(COMMAND .. " profile")
    assert.are.equal(2, status, out)
    assert.matches("'profile' needs a script to run", err)
    file = assert(io.open(script, "wb"))
    file:write("error('mine')")
    file:close()
    status, out, err = sys.run(COMMAND .. " profile " .. sys.quote(script))
    assert.are.equal(1, status, out)
    assert.matches("mine", err)
  end)

  it("costs less than a microsecond for an operator #cpu", function()
    local status, out, err = sys.run("luajit tests/support/profile_cost.lua")
    assert.are.equal(0, status, err)
    local off, on = out:match("off (%S+) on (%S+)")
    assert.is_true(tonumber(on) - tonumber(off) < 1, out)
    print("\n  an operator of 16 elements, microseconds: " .. out:gsub("\n", ""))
  end)
end)
