--- optim_spec.lua: optimizers, groups, clipping and schedules.
--
-- Every kind is compared with its published algorithm written out in Lua doubles over several steps; the f64
-- engine must agree to rounding. That f32 is within twice the error of the same algorithm done in f32 by hand
-- need not be checked, because the state is compared in f64. A continued optimizer must equal an
-- uninterrupted one bit by bit. Schedules are arithmetic.

local lac = require "lacuna"
local optim = lac.optim
local S = optim.schedule

-- one parameter of AdamW, in doubles
local function reference(x, grads, o)
  local m, v, out = {}, {}, {}
  for i = 1, #x do out[i], m[i], v[i] = x[i], 0, 0 end
  for t, g in ipairs(grads) do
    local scale = o.scale and o.scale[t] or 1
    for i = 1, #x do
      local gi = g[i] * scale
      m[i] = o.b1 * m[i] + (1 - o.b1) * gi
      v[i] = o.b2 * v[i] + (1 - o.b2) * gi * gi
      local mh, vh = m[i] / (1 - o.b1 ^ t), v[i] / (1 - o.b2 ^ t)
      out[i] = out[i] - o.lr * (o.factor and o.factor[t]
        or 1) * (mh / (math.sqrt(vh) + o.eps) + o.wd * out[i])
    end
  end
  return out
end

local function leaf(values, dtype) return lac.tensor(values, { dtype = dtype or "f64", grad = true }) end

local function give(p, values) p.grad = lac.tensor(values, { dtype = p:dtype() }) end

local function near_list(expected, got, tolerance)
  assert.equal(#expected, #got)
  for i = 1, #expected do assert.near(expected[i], got[i], tolerance) end
end

describe("optim.adamw", function()
  local grads = { { 0.5, -2, 0 }, { 1, 1, 1e-9 }, { -0.25, 3, 0 } }

  it("says what other libraries' names of its fields are here", function()
    local w = lac.randn{ 2, grad = true }
    w:sum():backward()
    local o = lac.optim.adamw{ w }
    for name, text in pairs(require("lacuna.synonyms").optimizer) do
      local ok, message = pcall(function() return o[name] end)
      assert.is_false(ok, name)
      assert.is_truthy(message:find(("AdamW: there is no field '%s', did you mean %s?"):format(name, text), 1,
        true), message)
      for part in text:gmatch("o:[%w_]+") do assert.is_function(o[part:sub(3)], part) end
    end
    assert.error_matches(function() return o.stpe end, "there is no field 'stpe', did you mean 'step'%?")
  end)

  it("says what a group is", function()
    local p = lac.randn{ 2, grad = true }
    assert.error_matches(function() return lac.optim.adamw{ { params = { p }, lr = 1 } } end,
      "got {{...}}: a group is a list itself, { tensor, tensor, lr = 1e%-3 } %[")
    assert.error_matches(function() return lac.optim.adamw{ 3 } end, "or a list of groups, got {3} %[")
  end)

  it("is algorithm 2 of Loshchilov and Hutter", function()
    local p = leaf{ 1, -2, 3 }
    local opt = optim.adamw({ p }, { lr = 0.01, betas = { 0.8, 0.95 }, eps = 1e-6, weight_decay = 0.1 })
    for _, g in ipairs(grads) do
      give(p, g)
      assert.is_nil(opt:step())
      opt:zero_grad()
      assert.is_nil(p.grad)
    end
    near_list(reference({ 1, -2, 3 }, grads, { lr = 0.01, b1 = 0.8, b2 = 0.95, eps = 1e-6, wd = 0.1 }),
      p:totable(), 1e-14)
  end)

  it("clips by the global norm of all parameters and applies the schedule's factor", function()
    local p, q = leaf{ 1, 2 }, leaf{ 3 }
    local opt = optim.adamw({ p, q }, { lr = 0.1, weight_decay = 0 })
    local scale, factor = {}, {}
    for t = 1, 3 do
      give(p, { t, 2 * t })
      give(q, { 2 * t })
      local norm = opt:step{ clip = 4, factor = 1 / t }
      assert.near(3 * t, norm, 1e-12)
      scale[t], factor[t] = math.min(1, 4 / (3 * t)), 1 / t
    end
    local o = { lr = 0.1, b1 = 0.9, b2 = 0.999, eps = 1e-8, wd = 0, scale = scale, factor = factor }
    near_list(reference({ 1, 2 }, { { 1, 2 }, { 2, 4 }, { 3, 6 } }, o), p:totable(), 1e-13)
    near_list(reference({ 3 }, { { 2 }, { 4 }, { 6 } }, o), q:totable(), 1e-13)
  end)

  it("takes groups with their own learning rate and decay", function()
    local p, q = leaf{ 1 }, leaf{ 1 }
    local opt = optim.adamw({ { p, lr = 0.5, weight_decay = 0.2 }, { q, weight_decay = 0 } }, { lr = 0.1 })
    give(p, { 1 })
    give(q, { 1 })
    opt:step()
    assert.near(1 - 0.5 * (1 / (1 + 1e-8) + 0.2), p:item(), 1e-14)
    assert.near(1 - 0.1 / (1 + 1e-8), q:item(), 1e-14)
  end)

  it("goes by lr and weight_decay as they are at a step, but for groups with their own", function()
    local p, q = leaf { 1 }, leaf { 1 }
    local opt = optim.sgd({ { p }, { q, lr = 0.25, weight_decay = 0 } }, { lr = 1 })
    opt.lr, opt.weight_decay = 0.5, 0.1
    give(p, { 1 })
    give(q, { 1 })
    opt:step()
    assert.are.equal(1 - 0.5 * 1.1, p:item())
    assert.are.equal(0.75, q:item())
    local m = lac.nn.Linear(1, 1, { dtype = "f64" })
    lac.no_grad(function()
      m.weight:fill_(1)
      m.bias:fill_(1)
    end)
    opt = optim.adamw(m, { lr = 1, weight_decay = 0 })
    opt.lr, opt.weight_decay = 0.5, 0.5
    m.weight.grad, m.bias.grad = lac.zeros { 1, 1, dtype = "f64" }, lac.zeros { 1, dtype = "f64" }
    opt:step()
    assert.are.same({ 0.75, 1 }, { m.weight:item(), m.bias:item() })
    opt.lr = -1
    assert.error_matches(function() opt:step() end, "adamw: lr must be at least 0, got %-1")
    opt.lr = "1e-3"
    assert.error_matches(function() opt:step() end, "adamw: lr must be a number, got '1e%-3'")
    assert.error_matches(function() opt.learning_rate = 1 end,
      "AdamW: there is no field 'learning_rate' to set, did you mean o.lr%?; there are betas, eps, lr,")
    assert.error_matches(function() opt.beta = { 0, 0 } end, "no field 'beta' to set, did you mean 'betas'")
    local update, count = opt.update, 0
    opt.update = function(...)
      count = count + 1
      return update(...)
    end
    opt.lr = 0
    opt:step()
    assert.are.equal(1, count)
  end)

  it("keeps f32 moments for half precision and updates them", function()
    local p = leaf({ 1, 2 }, "bf16")
    local opt = optim.adamw({ p }, { lr = 0.5, weight_decay = 0 })
    give(p, { 1, -1 })
    opt:step()
    assert.same({ 0.5, 2.5 }, p:totable())
    assert.equal("f32", (opt:state_dict())["m.1.1"]:dtype())
  end)

  it("continues from a saved state bit by bit", function()
    local function run(steps, p, opt, first)
      for t = first, steps do
        give(p, { math.sin(t), math.cos(t) })
        opt:step()
      end
    end
    local p = leaf({ 1, 2 }, "f32")
    local opt = optim.adamw{ p }
    run(4, p, opt, 1)
    local state, steps = opt:state_dict()
    local copy = {}
    for name, t in pairs(state) do copy[name] = t:clone() end
    local q = leaf(p:totable(), "f32")
    local other = optim.adamw{ q }
    other:load_state_dict(copy, steps)
    run(9, p, opt, 5)
    run(9, q, other, 5)
    assert.equal(p:string(), q:string())
  end)

  it("makes its moments outlive the scope that it was made in", function()
    local p = leaf{ 1 }
    local opt = lac.scope(function() return optim.adamw{ p } end)
    give(p, { 1 })
    opt:step()
    assert.equal(1, opt.steps)
  end)

  it("groups a module's parameters by kind", function()
    local model = lac.nn.Sequential(lac.nn.Embedding(5, 4), lac.nn.Linear(4, 3), lac.nn.LayerNorm(3))
    local groups = optim.groups(model, { weight_decay = 0.3 })
    assert.same({ "2.weight" }, groups[1].names)
    assert.equal(0.3, groups[1].weight_decay)
    assert.same({ "1.weight", "2.bias", "3.weight", "3.bias" }, groups[2].names)
    assert.equal(0, groups[2].weight_decay)
    assert.same({ "1.weight", "2.weight" }, optim.groups(model, { decay_embeddings = true })[1].names)
  end)

  it("names what is wrong and changes nothing then", function()
    local p, q = leaf{ 1, 2 }, leaf{ 3 }
    local opt = optim.adamw({ { p, q, names = { "first", "second" } } })
    assert.error_matches(function() opt:step() end, "parameter 'first' has no gradient")
    give(p, { 1, 1 })
    give(q, { 0 / 0 })
    assert.error_matches(function() opt:step{ clip = 1 } end,
      "norm is nan before step 1; .*belongs to 'second'")
    assert.same({ 1, 2 }, p:totable())
    assert.equal(0, opt.steps)
    assert.error_matches(function() opt:step{ clip = 0 } end, "clip must be above 0")
    assert.error_matches(function() opt:step{ clp = 1 } end, "did you mean 'clip'")
    assert.error_matches(function() optim.adamw({ p }, { betas = { 0.9 } }) end,
      "betas must be {beta1, beta2}")
    assert.error_matches(function() optim.adamw({ p }, { betas = { 0.9, 1 } }) end,
      "betas%[2%] must be below 1")
    assert.error_matches(function() optim.adamw({ p, p }) end, "'1%.2' is listed twice, before as '1%.1'")
    assert.error_matches(function() optim.adamw({ lac.ones{ 2 } }) end, "does not require a gradient")
    assert.error_matches(function() optim.sgd({ p * 2 }, { lr = 1 }) end,
      "sgd: parameter '1%.1' is the result of an operator.*takes leaves")
    local frozen = lac.nn.Linear(2, 3)
    frozen.bias:requires_grad_(false)
    assert.error_matches(function() optim.adamw(frozen) end, "'bias' does not .*; if it is frozen, give")
    local before = frozen.bias:clone()
    local optimizer = optim.adamw { frozen.weight }
    frozen(lac.ones { 1, 2 }):sum():backward()
    optimizer:step()
    assert.is_true(lac.equal(before, frozen.bias))
    assert.error_matches(function() optim.adamw({}) end, "expected a module, a list of tensors")
    assert.error_matches(function() optim.adamw(p) end, "expected a module, a list of tensors")
    assert.error_matches(function() optim.adamw({ { p, weight_deacy = 1 } }) end,
      "did you mean 'weight_decay'")
    local state = opt:state_dict()
    state["m.frist"], state["m.first"] = state["m.first"], nil
    assert.error_matches(function() opt:load_state_dict(state, 1) end,
      "unexpected 'm.frist', did you mean 'm.first'")
    state["m.frist"] = nil
    assert.error_matches(function() opt:load_state_dict(state, 1) end, "'m.first' is missing")
    state["m.first"] = lac.ones{ 3 }
    assert.error_matches(function() opt:load_state_dict(state, 1) end, "'m.first' is Tensor f64 %[2%]")
  end)

  it("notices a parameter that was replaced in its module", function()
    for _, way in ipairs { "assigned", "moved" } do
      local layer, x = lac.nn.Linear(2, 2), lac.ones{ 1, 2 }
      local optimizer = optim.adamw(layer:parameters(), { skip_missing = true })
      local function step()
        layer(x):sum():backward()
        optimizer:step()
      end
      step()
      local old = layer.weight
      if way == "assigned" then layer.weight = lac.randn{ 2, 2, grad = true } else layer:to "f64" end
      x = x:to{ dtype = layer.weight:dtype() }
      assert.error_matches(step, "adamw: parameter '.*' is not the 'weight' of its Linear any more: .*anew")
      assert.error_matches(function() optimizer:grad_norm() end, "is not the 'weight' of its Linear any more")
      optimizer = optim.adamw(layer:parameters())
      step()
      if way == "assigned" then
        layer.weight = old
        assert.error_matches(step, "'weight' of its Linear")
      end
    end
    -- shared by two modules, one of which is gone from the model: still a parameter of the other
    local a, b = lac.nn.Linear(2, 2), lac.nn.Linear(2, 2)
    b.weight = a.weight
    local optimizer = optim.sgd(lac.nn.Sequential(a, b), { lr = 1 })
    b(a(lac.ones{ 1, 2 })):sum():backward()
    optimizer:step()
  end)

  it("skips parameters without gradients only when asked", function()
    local p, q = leaf{ 1 }, leaf{ 1 }
    local opt = optim.adamw({ p, q }, { skip_missing = true, lr = 0.1, weight_decay = 0 })
    give(q, { 1 })
    opt:step()
    assert.equal(1, p:item())
    assert.near(0.9, q:item(), 1e-8)
    q.grad = nil
    assert.error_matches(function() opt:step() end, "no parameter has a gradient")
  end)

  it("counts the steps of each parameter by itself", function()
    local list = { { 0.5, -2 }, { 1, 1 }, { -0.25, 3 }, { 2, 0.5 } }
    local function steps_of(kind, o, plan) -- plan[t][i]: does parameter i have a gradient at step t?
      o.skip_missing = true
      local all, done = {}, {}
      for i = 1, #plan[1] do all[i], done[i] = leaf{ 1, -2 }, 0 end
      local opt = optim[kind](all, o)
      for _, given in ipairs(plan) do
        for i, p in ipairs(all) do
          if given[i] then
            done[i] = done[i] + 1
            give(p, list[done[i]])
          else
            p.grad = nil
          end
        end
        opt:step()
      end
      return all, opt
    end
    for kind, o in pairs{ adamw = { lr = 0.1 }, adam = {}, lion = {},
                          sgd = { lr = 0.1, momentum = 0.9, dampening = 0.5 } } do
      local whole = steps_of(kind, o, { { true }, { true }, { true } })
      local plan = { { true, false }, { false, true }, { true, true }, { true, true }, { false, true } }
      plan[5][1] = false
      local all, opt = steps_of(kind, o, plan)
      assert.equal(whole[1]:string(), all[1]:string(), kind)
      plan[6] = { true, false }
      -- a saved state knows the counts, and one without them (an older file) goes by the optimizer's
      local state, steps = opt:state_dict()
      assert.same({ 3, 4, 5 }, { state["steps.1.1"]:item(), state["steps.1.2"]:item(), steps })
      local copies = {}
      for i, p in ipairs(all) do copies[i] = leaf(p:totable()) end
      local other = optim[kind](copies, o)
      other:load_state_dict(state, steps)
      for i, p in ipairs(all) do
        give(p, list[4])
        give(copies[i], list[4])
      end
      opt:step()
      other:step()
      for i, p in ipairs(all) do assert.equal(p:string(), copies[i]:string(), kind) end
      state["steps.1.1"] = nil
      other:load_state_dict(state, steps)
      assert.is_nil((other:state_dict())["steps.1.1"])
      state["steps.1.1"] = lac.tensor({ 6 }, { dtype = "i64" })
      assert.error_matches(function() other:load_state_dict(state, steps) end, "steps.1.1 must be at most 5")
      state["steps.1.1"] = lac.zeros{ 2 }
      assert.error_matches(function() other:load_state_dict(state, steps) end, "must be a number of steps")
      state["steps.1.1"], state["steps.2.1"] = nil, lac.zeros{ 1 }
      assert.error_matches(function() other:load_state_dict(state, steps) end, "unexpected 'steps.2.1'")
    end
  end)

  it("counts an update that Ctrl-C has met", function()
    local lib = require "lacuna.lib"
    local p = leaf{ 1 }
    local opt = optim.sgd({ p }, { lr = 1 })
    give(p, { 0.5 })
    lib.C.lac_interrupt(1)
    opt:step()
    assert.equal(1, opt.steps)
    assert.error_matches(function() return p:detach() + 1 end, "interrupted")
    assert.equal(0.5, p:item())
  end)
end)

-- one parameter under any kind, in doubles: rules(i, g, t, x) gives the change of element i
local function follow(x, grads, rule)
  local out, state = {}, {}
  for i = 1, #x do out[i], state[i] = x[i], { m = 0, v = 0 } end
  for t, g in ipairs(grads) do
    for i = 1, #x do out[i] = rule(out[i], g[i], state[i], t) end
  end
  return out
end

local function sign(x) return x > 0 and 1 or x < 0 and -1 or 0 end

local function sgd_rule(o)
  return function(x, g, s, t)
    g = g + (o.weight_decay or 0) * x
    local mu = o.momentum or 0
    if mu > 0 then
      s.m = t == 1 and g or mu * s.m + (1 - (o.dampening or 0)) * g
      g = o.nesterov and g + mu * s.m or s.m
    end
    return x - o.lr * g
  end
end

describe("optim kinds", function()
  local start = { 1, -2, 3, 0.5 }
  local grads = { { 0.5, -2, 0, 1 }, { 1, 1, 1e-9, -3 }, { -0.25, 3, 0, 2 }, { 4, -1, 1, 0 } }

  local function run(kind, options, how, dtype, list)
    local p = leaf(start, dtype)
    local opt = optim[kind]({ p }, options)
    for _, g in ipairs(list or grads) do
      give(p, g)
      opt:step(how)
    end
    return p:totable(), opt, p
  end

  it("sgd refuses a dampening of no momentum", function()
    local p = lac.ones{ 2, grad = true }
    assert.error_matches(function() lac.optim.sgd({ p }, { lr = 1, dampening = 0.5 }) end,
      "sgd: dampening 0.5 is of the momentum, and there is none")
  end)

  it("sgd, with momentum, dampening, nesterov and weight decay", function()
    for _, o in ipairs{ { lr = 0.1 }, { lr = 0.1, weight_decay = 0.3 }, { lr = 0.1, momentum = 0.9 },
      { lr = 0.05, momentum = 0.8, dampening = 0.3, weight_decay = 0.1 },
      { lr = 0.05, momentum = 0.8, nesterov = true, weight_decay = 0.1 } } do
      near_list(follow(start, grads, sgd_rule(o)), (run("sgd", o)), 1e-14)
    end
  end)

  it("adam, with weight decay in the gradient", function()
    local o = { lr = 0.01, betas = { 0.8, 0.95 }, eps = 1e-6, weight_decay = 0.2 }
    near_list(follow(start, grads, function(x, g, s, t)
      g = g + 0.2 * x
      s.m, s.v = 0.8 * s.m + 0.2 * g, 0.95 * s.v + 0.05 * g * g
      return x - 0.01 * (s.m / (1 - 0.8 ^ t)) / (math.sqrt(s.v / (1 - 0.95 ^ t)) + 1e-6)
    end), (run("adam", o)), 1e-14)
  end)

  it("lion", function()
    local o = { lr = 0.01, betas = { 0.9, 0.98 }, weight_decay = 0.3 }
    near_list(follow(start, grads, function(x, g, s)
      local c = 0.9 * s.m + 0.1 * g
      s.m = 0.98 * s.m + 0.02 * g
      return x - 0.01 * (sign(c) + 0.3 * x)
    end), (run("lion", o)), 1e-14)
  end)

  it("clips by value, before weight decay", function()
    local clamped = {}
    for t, g in ipairs(grads) do
      clamped[t] = {}
      for i, v in ipairs(g) do clamped[t][i] = math.max(-0.75, math.min(0.75, v)) end
    end
    for kind, o in pairs{ sgd = { lr = 0.1, momentum = 0.5, weight_decay = 0.1 }, lion = {}, adamw = {},
      adam = {} } do
      assert.same((run(kind, o, nil, "f64", clamped)), (run(kind, o, { clip_value = 0.75 })))
    end
    local p = leaf{ 1 }
    local opt = optim.sgd({ p }, { lr = 1 })
    give(p, { 1 })
    assert.error_matches(function() opt:step{ clip = 1, clip_value = 2 } end,
      "exclude each other, got 1 and 2")
    assert.error_matches(function() opt:step{ clip_value = 0 } end, "clip_value must be above 0")
  end)

  it("let NaN through to the parameter, whatever is clipped", function()
    for kind, o in pairs{ sgd = { lr = 0.1, momentum = 0.5 }, lion = {}, adamw = {}, adam = {} } do
      local got = run(kind, o, { clip_value = 0.5 }, "f32", { { 1, 0 / 0, 1, 1 } })
      assert.is_true(got[2] ~= got[2], kind)
      assert.is_true(got[1] == got[1], kind)
    end
  end)

  it("keep f32 master copies of half parameters, so that small updates add up", function()
    for _, dtype in ipairs{ "f16", "bf16" } do
      for kind, o in pairs{ sgd = { lr = 1e-4 }, lion = { lr = 1e-4, weight_decay = 0 },
        adamw = { lr = 1e-4, weight_decay = 0 } } do
        local list = {}
        for t = 1, 100 do list[t] = { 1, 1, 1, 1 } end
        assert.equal(1, (run(kind, o, nil, dtype, list))[1]) -- 1e-4 is below half a unit in the last place
        o.master = true
        local got, opt, p = run(kind, o, nil, dtype, list)
        local exact = lac.tensor({ 1 - 100 * 1e-4 }, { dtype = dtype }):item()
        assert.equal(exact, got[1], kind)
        local state = opt:state_dict()
        assert.equal("f32", state["master.1.1"]:dtype())
        -- a parameter that was changed by somebody else is what the next step starts from
        lac.no_grad(function() p:fill_(4) end)
        give(p, { 1, 1, 1, 1 })
        opt:step()
        assert.near(4 - 1e-4, state["master.1.1"]:totable()[1], 1e-6)
      end
    end
    assert.is_nil((optim.adamw({ leaf({ 1 }, "f32") }, { master = true }):state_dict())["master.1.1"])
  end)

  it("continue from a saved state bit by bit, master copies too", function()
    for kind, o in pairs{ sgd = { lr = 0.1, momentum = 0.9, dampening = 0.1 }, lion = { lr = 0.01 },
      adamw = {}, adam = {} } do
      o.master = true
      local _, opt, p = run(kind, o, nil, "bf16")
      local q = leaf(start, "bf16")
      local other = optim[kind]({ q }, o)
      lac.no_grad(function() q:copy_(p) end)
      other:load_state_dict(opt:state_dict())
      for _, g in ipairs(grads) do
        give(p, g)
        give(q, g)
        opt:step()
        other:step()
      end
      assert.equal(p:string(), q:string())
      assert.equal(opt:state_dict()["master.1.1"]:string(), other:state_dict()["master.1.1"]:string())
    end
  end)

  it("do not depend on the number of threads", function()
    local threads, got = lac.threads(), {}
    for _, n in ipairs{ 1, 2 } do
      lac.threads(n)
      for kind, o in pairs{ sgd = { lr = 0.1, momentum = 0.9 }, lion = {}, adamw = {} } do
        lac.manual_seed(3)
        local p = lac.randn{ 100003, grad = true }
        p.grad = lac.randn{ 100003 }
        local opt = optim[kind]({ p }, o)
        opt:step{ clip = 1 }
        opt:step()
        if n == 1 then got[kind] = p:string() else assert.is_true(got[kind] == p:string(), kind) end
      end
    end
    lac.threads(threads)
  end)

  it("print themselves and name what is wrong", function()
    local p = leaf{ 1 }
    assert.equal("SGD(1 parameters, lr 0.5, momentum 0.9, nesterov, 0 steps)",
      tostring(optim.sgd({ p }, { lr = 0.5, momentum = 0.9, nesterov = true })))
    assert.equal("Lion(1 parameters, lr 0.0001, betas {0.9, 0.99}, 0 steps)", tostring(optim.lion{ p }))
    assert.matches("^Adam%(1 parameters", tostring(optim.adam{ p }))
    assert.error_matches(function() optim.sgd{ p } end, "lr is required")
    assert.error_matches(function() optim.sgd({ p }, { lr = 1, nesterov = true }) end,
      "nesterov needs momentum")
    assert.error_matches(function() optim.sgd({ p }, { lr = 1, momentum = 1 }) end,
      "momentum must be below 1")
    assert.error_matches(function() optim.lion({ p }, { beta = 1 }) end, "did you mean 'betas'")
    assert.error_matches(function() optim.lion{ p }:step() end, "lion: parameter '1.1' has no gradient")
    assert.same({ kind = "lion", lr = 1e-4, weight_decay = 0.01, master = false, betas = { 0.9, 0.99 } },
      optim.lion{ p }:config())
  end)
end)

describe("optim.schedule", function()
  it("computes what the formulas say", function()
    assert.equal(1, S.constant()(7))
    assert.near(1, S.cosine{ steps = 10 }(0), 1e-15)
    assert.near(0.5, S.cosine{ steps = 10 }(5), 1e-15)
    assert.near(0.1, S.cosine{ steps = 10, min = 0.1 }(10), 1e-15)
    assert.near(0.1, S.cosine{ steps = 10, min = 0.1 }(99), 1e-15)
    assert.near(0.625, S.linear{ steps = 8, min = 0.25 }(4), 1e-15)
    assert.near(0.25 ^ 2, S.polynomial{ steps = 8, power = 2 }(6), 1e-15)
    assert.same({ 1, 1, 0.5, 0.25 }, { S.inverse_sqrt{ timescale = 4 }(0), S.inverse_sqrt{ timescale = 4 }(4),
      S.inverse_sqrt{ timescale = 4 }(16), S.inverse_sqrt{ timescale = 4 }(64) })
    assert.same({ 1, 1, 0.5, 0.5, 0.25 }, { S.step{ every = 3, gamma = 0.5 }(0),
      S.step{ every = 3, gamma = 0.5 }(2), S.step{ every = 3, gamma = 0.5 }(3),
      S.step{ every = 3, gamma = 0.5 }(5), S.step{ every = 3, gamma = 0.5 }(6) })
    local f = S.multistep{ milestones = { 3, 7 }, gamma = 0.5 }
    assert.same({ 1, 1, 0.5, 0.5, 0.25, 0.25 }, { f(0), f(2), f(3), f(6), f(7), f(99) })
    f = S.cosine_restarts{ steps = 4, min = 0.2 }
    for step, want in pairs{ [0] = 1, [2] = 0.6, [4] = 1, [6] = 0.6, [8] = 1 } do
      assert.near(want, f(step), 1e-15)
    end
    f = S.cosine_restarts{ steps = 2, growth = 3 } -- cycles begin at 0, 2, 8, 26
    for step, want in pairs{ [0] = 1, [1] = 0.5, [2] = 1, [5] = 0.5, [8] = 1, [17] = 0.5, [26] = 1 } do
      assert.near(want, f(step), 1e-15)
    end
  end)

  it("composes a warm-up with what follows, without a jump", function()
    local f = S.warmup(4, S.linear{ steps = 6 })
    for step = 1, 4 do assert.near(step / 4, f(step), 1e-15) end
    assert.near(5 / 6, f(5), 1e-15)
    assert.near(0, f(10), 1e-15)
    assert.equal(1, S.warmup(0)(1))
    assert.equal(1, S.warmup(0)(0))
  end)

  it("names what is wrong", function()
    assert.error_matches(function() S.cosine{ step = 3 } end, "did you mean 'steps'")
    assert.error_matches(function() S.cosine{} end, "steps is required")
    assert.error_matches(function() S.polynomial{ steps = 3, power = 0 } end, "power must be above 0")
    assert.error_matches(function() S.warmup(-1) end, "warmup must be at least 0")
    assert.error_matches(function() S.warmup(1, 3) end, "inner must be a function")
    assert.error_matches(function() S.inverse_sqrt{} end, "timescale is required")
    assert.error_matches(function() S.step{ every = 0 } end, "every must be positive")
    assert.error_matches(function() S.multistep{ milestones = { 3, 3 } } end,
      "milestones%[2%] = 3 follows 3")
    assert.error_matches(function() S.cosine_restarts{ steps = 2, growth = 0.5 } end, "growth must be")
  end)
end)
