--- optim_spec.lua: AdamW, groups, clipping and schedules.
--
-- AdamW is compared with the algorithm written out in Lua doubles over several steps; the f64 engine must
-- agree to rounding, f32 within twice the error of the same algorithm done in f32 by hand is not needed
-- because the state is compared in f64. A continued optimizer must equal an uninterrupted one bit by bit.
-- Schedules are arithmetic.

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
  end)

  it("composes a warm-up with what follows, without a jump", function()
    local f = S.warmup(4, S.linear{ steps = 6 })
    for step = 1, 4 do assert.near(step / 4, f(step), 1e-15) end
    assert.near(5 / 6, f(5), 1e-15)
    assert.near(0, f(10), 1e-15)
    assert.equal(1, S.warmup(0)(1))
  end)

  it("names what is wrong", function()
    assert.error_matches(function() S.cosine{ step = 3 } end, "did you mean 'steps'")
    assert.error_matches(function() S.cosine{} end, "steps is required")
    assert.error_matches(function() S.polynomial{ steps = 3, power = 0 } end, "power must be above 0")
    assert.error_matches(function() S.warmup(-1) end, "warmup must be at least 0")
    assert.error_matches(function() S.warmup(1, 3) end, "inner must be a function")
  end)
end)
