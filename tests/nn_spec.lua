--- nn_spec.lua: modules, their state, and LongNet.
--
-- Values are compared with formulas in plain Lua doubles (Linear, feed-forward, a whole attention module on a
-- small case); gradients of the whole language model with central differences in f64 on parameters of every
-- kind. Beyond values: order and names of parameters, the printed tree, strict fields, error paths, state
-- dicts that do not fit, initial deviations, determinism, overfitting, and costs counted by hand.

local lac = require "lacuna"
local lib = require "lacuna.lib"
local tensor = require "lacuna.tensor"
local cases = require "support.cases"
local internal = require("lacuna.ops").internal
local nn = lac.nn

local function leaf_values(t) return t:detach():to{ dtype = "f64" }:totable() end

-- y = x W^T + b in doubles; x is a list of rows
local function linear(x, m)
  local w, b, out = leaf_values(m.weight), m.has_bias and leaf_values(m.bias), {}
  for n = 1, #x do
    out[n] = {}
    for o = 1, #w do
      local sum = b and b[o] or 0
      for i = 1, #x[n] do sum = sum + x[n][i] * w[o][i] end
      out[n][o] = sum
    end
  end
  return out
end

local function layernorm(x, m)
  local w, b, out = leaf_values(m.weight), leaf_values(m.bias), {}
  for n = 1, #x do
    local mean, var = 0, 0
    for _, v in ipairs(x[n]) do mean = mean + v / #x[n] end
    for _, v in ipairs(x[n]) do var = var + (v - mean) ^ 2 / #x[n] end
    out[n] = {}
    for i, v in ipairs(x[n]) do out[n][i] = (v - mean) / math.sqrt(var + m.eps) * w[i] + b[i] end
  end
  return out
end

local function near_rows(expected, got, tolerance)
  assert.equal(#expected, #got)
  for n = 1, #expected do
    assert.equal(#expected[n], #got[n])
    for i = 1, #expected[n] do assert.near(expected[n][i], got[n][i], tolerance) end
  end
end

local function tiny(options)
  local o = { vocab = 11, layers = 2, width = 8, heads = 2, ffn = 12, context = 12, segments = { 4, 12 },
    dilations = { 1, 2 },
    dtype = "f64" }
  for name, value in pairs(options or {}) do o[name] = value end
  lac.manual_seed(3)
  return nn.LongNetLM(o)
end

local function tokens(B, N, V)
  local x, y = {}, {}
  for b = 1, B do
    x[b], y[b] = {}, {}
    for n = 1, N do x[b][n], y[b][n] = (b * 7 + n * n) % V, (b * 5 + n * 3) % V end
  end
  return lac.tensor(x, { dtype = "i32" }), lac.tensor(y, { dtype = "i32" })
end

describe("nn modules", function()
  it("says what other libraries' names of a module's fields are here", function()
    local m = lac.nn.Sequential(lac.nn.Linear(2, 3), lac.nn.GELU())
    local tried = 0
    for name, text in pairs(require("lacuna.synonyms").module) do
      local ok, message = pcall(function() return m[name] end)
      assert.is_false(ok, name) -- none that exists
      assert.is_truthy(message:find("there is no field '" .. name .. "'", 1, true), message)
      assert.is_truthy(message:find(text, 1, true), message)
      local f = not text:find("cuda", 1, true) and text:find("^m:") and assert(loadstring("return " .. text))
      if f then
        assert.is_not_nil(setfenv(f, { m = m, dtype = "f64", device = "cpu" })(), name)
        tried = tried + 1
      end
    end
    assert.is_true(tried > 10)
    assert.error_matches(function() return m.wieght end, "there is no field 'wieght' %[")
  end)

  it("print as a tree", function()
    assert.equal("Linear(10 -> 5)", tostring(nn.Linear(10, 5)))
    local net = nn.Sequential(nn.Linear(4, 4, { bias = false }), nn.GELU(), nn.GELU(), nn.Dropout(0.5))
    assert.equal("Sequential(4\n  (1): Linear(4 -> 4, no bias)\n  (2-3): 2 x GELU()\n  (4): Dropout(0.5)\n)",
      tostring(net))
  end)

  it("go to a dtype or a device by its name, and say what is no module", function()
    local layer = nn.Linear(2, 2)
    assert.equal("f16", layer:to("f16").weight:dtype())
    assert.equal("f16", layer:to("cpu").weight:dtype())
    assert.error_matches(function() layer:to "float16" end, "unknown dtype 'float16', did you mean f16?")
    assert.error_matches(function() layer:to "i64" end, "parameters are floating%-point numbers, got dtype")
    local Mine = lac.class("Mine", nn.Module)
    function Mine:init() self.layer = nn.Linear(2, 2) end
    for _, use in ipairs { "parameters", "state_dict", "eval" } do
      assert.error_matches(function()
        local m = Mine()
        m[use](m)
      end, "Mine: was made by lac.class, .* nn.module%('Mine'%)")
    end
  end)

  it("say what has taken the place of a part", function()
    local Pair = nn.module("Pair")
    function Pair:init()
      self.layer = nn.Linear(2, 2)
      self:buffer("mean", lac.zeros { 2 })
    end
    local m = Pair()
    m.mean = 3
    assert.error_matches(function() m:state_dict() end, "Pair: mean must be a tensor, got 3")
    m.layer = nil
    for _, use in ipairs { "parameters", "state_dict", "zero_grad", "clone" } do
      assert.error_matches(function() m[use](m) end, "child 'layer' must stay a module, it was set to nil")
    end
    assert.error_matches(function() return tostring(m) end, "child 'layer' must stay a module")
  end)

  it("has activations as modules, which refuse what they would ignore", function()
    local x = lac.randn{ 3, 4, dtype = "f64" }
    for name, case in pairs {
      GELU = { "gelu" }, GELUTanh = { "gelu_tanh" }, Softplus = { "softplus" }, Mish = { "mish" },
      LeakyReLU = { "leaky_relu", 0.3 }, ELU = { "elu", 0.7 }, Softmax = { "softmax", 1 },
      LogSoftmax = { "log_softmax", 1 },
    } do
      assert.is_true(nn[name](case[2])(x):equal(x[case[1]](x, case[2])), name)
      assert.is_true(nn[name]()(x):equal(x[case[1]](x)), name)
      assert.equal(name .. (case[2] and "(" .. case[2] .. ")" or "()"), tostring(nn[name](case[2])))
      assert.error_matches(function() nn[name]({ inplace = true }) end, name .. ": ")
    end
    assert.is_true(nn.Identity()(x) == x)
    assert.error_matches(function() nn.GELU "tanh" end, "takes no options, got 'tanh'; .* is GELUTanh")
    assert.error_matches(function() nn.ELU(1, 2) end, "takes no more than its alpha, got 2")
    assert.error_matches(function() nn.MSELoss { reduction = "summ" } end, "unknown reduction 'summ'")
    assert.equal("KLDivLoss(reduction batchmean)", tostring(nn.KLDivLoss { reduction = "batchmean" }))
    assert.error_matches(function() x:pad { left = 1 } end, "pad: amounts must be a list .* the key 'left'")
    assert.error_matches(function() x:tile { dims = 1 } end, "tile: the numbers are a list, got the key")
  end)

  it("has a residual norm with the numbers, dropout and gradients of its three parts", function()
    for _, p in ipairs{ 0, 0.3 } do
      for _, dtype in ipairs{ "f64", "f32", "bf16" } do
        local function run(joined)
          lac.manual_seed(3)
          local function draw(...) return lac.randn({ ... }, { dtype = dtype, grad = true }) end
          local x, h, gain, bias = draw(5, 3, 8), draw(5, 3, 8), draw(8), draw(8)
          local a, b = draw(5, 3, 8):detach(), draw(5, 3, 8):detach()
          local sum, out
          if joined then
            sum, out = lac.residual_norm(x, h, gain, bias, { p = p })
          else
            sum = x + lac.dropout(h, p)
            out = lac.layernorm(sum, gain, bias)
          end
          local list = lac.grad({ sum, out }, { x, h, gain, bias }, { grad_outputs = { a, b } })
          list[5], list[6] = sum:detach(), out:detach()
          return list
        end
        local apart, joined = run(false), run(true)
        for i = 1, #apart do
          assert.is_true(lac.equal(apart[i], joined[i]), ("p %g, %s, %d"):format(p, dtype, i))
        end
      end
    end
    local x = lac.randn{ 4, 6, grad = true }
    local sum, out = lac.residual_norm(x, x * 2, nil, nil, { p = 0.5, training = false, eps = 1e-3 })
    assert.is_true(lac.equal(sum, x * 3))
    assert.is_true(lac.equal(out, lac.layernorm(sum, nil, nil, 1e-3)))
    sum:sum():backward() -- the norm was not used
    assert.is_true(lac.equal(x.grad, lac.full({ 4, 6 }, 3)))
  end)

  it("gives gelu_norm's result again with its gradient, and that gradient's sums over rows", function()
    local C, call, adopt, new = lib.C, lib.call, tensor.adopt, tensor.ctype
    for _, size in ipairs{ { 3, 5, 8 }, { 24 }, { 7, 512 }, { 40, 3072 }, { 3, 6152 }, { 0, 8 } } do
      for _, dtype in ipairs{ "f64", "f32", "bf16" } do
        local width = size[#size]
        local x, g = lac.randn(size, { dtype = dtype }), lac.randn(size, { dtype = dtype })
        local gain, bias = lac.randn{ width, dtype = dtype }, lac.randn{ width, dtype = dtype }
        local function run(kept)
          local out, mean, rstd, act = new(), new(), new(), kept and new() or nil
          call(C.lac_gelu_norm, x.c, gain.c, bias.c, 1e-5, act, out, mean, rstd)
          out, mean, rstd, act = adopt(out), adopt(mean), adopt(rstd), act and adopt(act)
          act = act and act.c
          local dx, dgain, dbias, again, sums, plain = new(), new(), new(), new(), new(), new()
          call(C.lac_gelu_norm_bwd, x.c, act, gain.c, bias.c, mean.c, rstd.c, g.c, 1e-5, dx, dgain, dbias,
            again, sums)
          call(C.lac_gelu_norm_bwd, x.c, act, gain.c, nil, mean.c, rstd.c, g.c, 1e-5, plain, nil, nil, nil,
            nil)
          dx, dgain, dbias = adopt(dx), adopt(dgain), adopt(dbias)
          assert.is_true(dgain:size(1) == width and dbias:size(1) == width)
          local total = dx:double()
          while total:dim() > 1 do total = total:sum(1) end
          return out, adopt(again), total, adopt(sums), dx, adopt(plain)
        end
        local eps, rest = cases.epsilon(dtype), dtype == "f64" and 1e-13 or 1e-5
        for _, kept in ipairs{ false, true } do
          local out, again, total, sums, dx, plain = run(kept)
          local text = ("%s, %s"):format(dtype, table.concat(size, " x "))
          assert.is_true(lac.allclose(again, out, { rtol = 2 * eps, atol = 8 * eps }), text)
          assert.is_true(lac.allclose(sums:double(), total, { rtol = 2 * eps, atol = rest }), text)
          assert.is_true(lac.allclose(dx, plain, { rtol = 2 * eps, atol = 2 * eps }), text)
        end
      end
    end
  end)

  it("gives an activation's result again with its gradient, and that gradient's sums over rows", function()
    local C, call, adopt, new = lib.C, lib.call, tensor.adopt, tensor.ctype
    for _, o in ipairs{ { 3, 5, 8 }, { 40, 16, 72 }, { 300, 24, 3072 }, { 5, 7, 9 }, { 0, 4, 8 } } do
      for _, dtype in ipairs{ "f64", "f32", "f16", "bf16" } do
        for _, name in ipairs{ "gelu", "gelu_tanh" } do
          local rows, width, hidden = unpack(o)
          local g, w = lac.randn{ rows, width, dtype = dtype }, lac.randn{ width, hidden, dtype = dtype }
          local pre = (lac.randn{ rows, hidden, dtype = dtype } * 2):requires_grad_(true)
          local id, all, sums, act, alone = internal.map_id["1" .. name], new(), new(), new(), new()
          call(C.lac_linear_act_bwd, id, g.c, w.c, pre.c, all, sums, act)
          call(C.lac_linear_act_bwd, id, g.c, w.c, pre.c, alone, nil, nil)
          all, sums, act, alone = adopt(all), adopt(sums), adopt(act), adopt(alone)
          local eps, rest = cases.epsilon(dtype), dtype == "f64" and 1e-12 or 1e-3
          local text = ("%s, %s, %s"):format(name, dtype, table.concat(o, " x "))
          local made = lac[name](pre)
          local grad = lac.grad(made, pre, { grad_outputs = { g:matmul(w) } })
          assert.is_true(lac.equal(all, alone), text)
          assert.is_true(lac.allclose(act, made:detach(), { rtol = 2 * eps, atol = 2 * eps }), text)
          assert.is_true(lac.allclose(all, grad, { rtol = 4 * eps, atol = 4 * eps }), text)
          local total = all:double():sum(1)
          assert.is_true(lac.allclose(sums:double(), total, { rtol = 2 * eps, atol = rest }), text)
        end
      end
    end
  end)

  it("has slopes of 0 and 1 where the square of what is activated is infinite", function()
    local C, new = lib.C, tensor.ctype
    for _, dtype in ipairs{ "f64", "f32", "bf16" } do
      for _, name in ipairs{ "gelu", "gelu_tanh" } do
        local pre = lac.tensor({ { 1e14, 1e30, 1e20, 10, -10, -1e14, -1e20, -1e30 } }, { dtype = dtype })
        local g, w, all = lac.ones{ 1, 1, dtype = dtype }, lac.ones{ 1, 8, dtype = dtype }, new()
        lib.call(C.lac_linear_act_bwd, internal.map_id["1" .. name], g.c, w.c, pre.c, all, nil, nil)
        local slopes = lac.tensor { { 1, 1, 1, 1, 0, 0, 0, 0 } }
        assert.is_true(lac.allclose(tensor.adopt(all):float(), slopes, { atol = 1e-6 }), name .. dtype)
      end
    end
  end)

  it("calls what a script put in the place of a part", function()
    local x = lac.randn{ 2, 8, 4, dtype = "f64" }
    local ffn = nn.FeedForward(4, 6, { dtype = "f64" })
    local before = ffn(x)
    ffn.norm = nn.RMSNorm(6, { dtype = "f64" })
    assert.is_true(lac.allclose(ffn(x), ffn.down(ffn.norm(ffn.up(x):gelu())), { rtol = 1e-12 }))
    assert.is_false(lac.allclose(ffn(x), before, { rtol = 1e-3 }))
    for _, name in ipairs{ "gelu", "gelu_tanh" } do
      for _, norm in ipairs{ true, false } do
        ffn = nn.FeedForward(4, 6, { dtype = "f64", activation = name, layer_norm = norm, dropout = 0.5 })
        ffn:eval()
        local hidden = ffn.up(x)[name](ffn.up(x))
        local out = ffn.down(norm and ffn.norm(hidden) or hidden)
        assert.is_true(lac.allclose(ffn(x), out, { rtol = 1e-12 }))
        assert.is_false(lac.allclose(ffn:train()(x), out, { rtol = 1e-3 }))
      end
    end
    local model = nn.LongNetLM{ vocab = 7, layers = 1, width = 8, heads = 2, context = 8, segments = { 8 },
      dilations = { 1 }, dtype = "f64" }
    local block, h = model.layers[1], lac.randn{ 1, 8, 8, dtype = "f64" }
    block.norm2 = nn.RMSNorm(8, { dtype = "f64" })
    local y = h + block.attention(block.norm1(h))
    assert.is_true(lac.allclose(block(h), y + block.ffn(block.norm2(y)), { rtol = 1e-12 }))
  end)

  it("joins each block's last sum with the norm that follows, whatever a script put there", function()
    local words = lac.randint{ 2, 8, high = 7 }
    local changes = { function() end, function(m) m.layers[2].norm1 = nn.RMSNorm(8, { dtype = "f64" }) end,
      function(m) m.norm = nn.RMSNorm(8, { dtype = "f64" }) end,
      function(m) rawset(m.layers[2], "forward", function(_, x) return x * 2 end) end,
      function(m) rawset(m.layers[3], "forward", function(_, x) return x * 2 end) end }
    for i, change in ipairs(changes) do
      local model = nn.LongNetLM{ vocab = 7, layers = 3, width = 8, heads = 2, context = 8, segments = { 8 },
        dilations = { 1 }, dtype = "f64" }
      change(model)
      local x = model.embedding(words) * math.sqrt(8)
      for b = 1, 3 do x = model.layers[b](x) end
      local apart, joined = model.norm(x), model:hidden(words)
      assert.is_true(lac.equal(apart, joined), "change " .. i)
      local g = lac.randn(apart:size(), { dtype = "f64" })
      local weight = model.embedding.weight
      assert.is_true(lac.allclose(lac.grad(apart, weight, { grad_outputs = { g } }),
        lac.grad(joined, weight, { grad_outputs = { g } }), { rtol = 1e-10, atol = 1e-12 }), "change " .. i)
    end
  end)

  it("compute their formulas", function()
    local m = nn.Linear(3, 2, { dtype = "f64" })
    local x = { { 1, 2, 3 }, { -1, 0.5, 0 } }
    m.bias:detach():copy_(lac.tensor({ 0.25, -1 }, { dtype = "f64" }))
    near_rows(linear(x, m), m(lac.tensor(x, { dtype = "f64" })):totable(), 1e-14)
    local norm = nn.LayerNorm(3, { dtype = "f64" })
    near_rows(layernorm(x, norm), norm(lac.tensor(x, { dtype = "f64" })):totable(), 1e-12)
    local plain = lac.tensor(x, { dtype = "f64" })
    local rms = nn.RMSNorm(3, { dtype = "f64", eps = 1e-3 })
    rms.weight:detach():copy_(lac.tensor({ 2, 1, 0.5 }, { dtype = "f64" }))
    local expected = plain / ((plain * plain):mean(2, true) + 1e-3):sqrt() * rms.weight
    near_rows(expected:totable(), rms(plain):totable(), 1e-12)
    local groups = nn.GroupNorm(2, 4, { dtype = "f64" })
    local image = lac.randn { 2, 4, 3, dtype = "f64" }
    near_rows({ image:group_norm(2):flatten():totable() }, { groups(image):flatten():totable() }, 1e-12)
    assert.matches("GroupNorm%(2 groups of 4, eps 1e%-05%)", tostring(groups))
    assert.error_matches(function() nn.GroupNorm(3, 4) end, "3 groups do not divide 4 channels")
    assert.error_matches(function() groups(image:narrow(2, 1, 3)) end, "must be %[B, 4, ...%]")
    for name, activate in pairs { SwiGLU = "silu", GeGLU = "gelu" } do
      local glu = nn[name](3, 4, { dtype = "f64", bias = true })
      expected = glu.down(glu.gate(plain)[activate](glu.gate(plain)) * glu.up(plain))
      near_rows(expected:totable(), glu(plain):totable(), 1e-12)
    end
    local e = nn.Embedding(4, 2, { dtype = "f64" })
    local table_rows = leaf_values(e.weight)
    assert.same({ { table_rows[4], table_rows[1] } }, e(lac.tensor({ { 3, 0 } },
      { dtype = "i64" })):totable())
    local ffn = nn.FeedForward(3, 5, { dtype = "f64" })
    local hidden = linear(x, ffn.up)
    for _, row in ipairs(hidden) do -- gelu itself has its own spec; here the composition is checked
      local y = lac.tensor(row, { dtype = "f64" }):gelu():totable()
      for i = 1, #row do row[i] = y[i] end
    end
    near_rows(linear(layernorm(hidden, ffn.norm), ffn.down), ffn(lac.tensor(x, { dtype = "f64" })):totable(),
      1e-12)
  end)

  it("switch dropout with train and eval", function()
    lac.manual_seed(1)
    local m = nn.Sequential(nn.Dropout(0.5))
    local x = lac.ones{ 1000 }
    local y = m(x):totable()
    local zeros = 0
    for i = 1, 1000 do
      assert.is_true(y[i] == 0 or y[i] == 2)
      if y[i] == 0 then zeros = zeros + 1 end
    end
    assert.is_true(zeros > 400 and zeros < 600)
    assert.same(x:totable(), m:eval()(x):totable())
    assert.is_false(m[1].training)
    assert.is_true(m:train()[1].training)
  end)

  it("keep parameters in order, shared ones once", function()
    local Pair = nn.module("Pair")
    function Pair:init()
      self.zeta = nn.Linear(2, 2)
      self:param("scale", lac.ones{ 2 }, "norm")
      self.alpha = nn.Linear(2, 2, { bias = false })
      self:buffer("seen", lac.zeros{ 1 })
      self.alpha.weight = self.zeta.weight
    end
    local m = Pair()
    local names = {}
    for name in m:named_parameters() do names[#names + 1] = name end
    assert.same({ "scale", "zeta.weight", "zeta.bias" }, names)
    assert.equal(8, m:parameter_count())
    local state = m:state_dict()
    assert.is_nil(state["alpha.weight"])
    assert.is_truthy(state.seen)
    assert.error_matches(function() m(1) end, "Pair: has no forward method")
    m:to{ dtype = "f64" }
    assert.equal(m.alpha.weight, m.zeta.weight)
    assert.equal("f64", m.seen:dtype())
    assert.is_true(m.zeta.weight.requires_grad)
    assert.is_false(m.seen.requires_grad)
    local visited = {}
    m:apply(function(_, path) visited[#visited + 1] = path end)
    assert.same({ "", "zeta", "alpha" }, visited)
  end)

  it("is strict about fields", function()
    local m = nn.Linear(2, 2)
    assert.error_matches(function() return m.wieght end,
      "Linear: there is no field 'wieght', did you mean 'weight'")
    assert.error_matches(function() m.dropuot = 3 end, "Linear: there is no field 'dropuot' to set")
    assert.error_matches(function() return nn.Linaer end, "nn: there is no 'Linaer', did you mean 'Linear'")
    local Bad = nn.module("Bad")
    function Bad:init() self.scale = lac.ones{ 2 } end
    assert.error_matches(function() Bad() end, 'self:param%("scale", t, kind%)')
    local Twice = nn.module("Twice")
    function Twice:init()
      self:param("a", lac.ones{ 2 })
      self:param("a", lac.ones{ 2 })
    end
    assert.error_matches(function() Twice() end, "the name 'a' is taken")
    local Derived = nn.module("Derived")
    function Derived:init(t) self:param("a", t * 2) end
    assert.error_matches(function() Derived(lac.ones{ 2, grad = true }) end, "leaf")
    local Kind = nn.module("Kind")
    function Kind:init() self:param("a", lac.ones{ 2 }, "wieght") end
    assert.error_matches(function() Kind() end, "did you mean 'weight'")
    assert.error_matches(function() nn.Linear(0, 2) end, "inputs must be positive, got 0")
    assert.error_matches(function() nn.Linear(2, 2, { bais = true }) end, "did you mean 'bias'")
    assert.error_matches(function() nn.Linear(2, 4, { parts = { 1, 2 } }) end,
      "parts add up to 3, not to the 4 outputs")
    assert.error_matches(function() nn.Sequential(nn.GELU(), 3) end, "item 2 must be a module, got 3")
    assert.error_matches(function() nn.Sequential{ nn.GELU() } end, "one by one: nn.Sequential%(a, b%)")
    assert.error_matches(function() nn.Dropout(1) end, "p must be below 1")
  end)

  it("says where in the model an error happened", function()
    local model = tiny()
    local x = tokens(1, 12, 11)
    model.layers[2].attention.out.weight = lac.ones{ 8, 9, dtype = "f64" }
    local ok, message = pcall(function() return model(x) end)
    assert.is_false(ok)
    assert.matches("%[LongNetLM%.layers%[2%]%.attention%.out, .*nn_spec%.lua:%d+%]", message)
    assert.matches("9", message)
    local ok2, message2 = pcall(function() return model:loss(x, x) end)
    assert.is_false(ok2)
    assert.matches("%[LongNetLM%.layers%[2%]%.attention", message2)
  end)

  it("loads state dicts that fit and lists everything about those that do not", function()
    local a, b = tiny(), tiny{ dtype = "f32" }
    for _, p in ipairs(b:parameters()) do p:detach():fill_(0) end
    a:load_state_dict(a:state_dict())
    b:load_state_dict(a:state_dict())
    for name, t in a:named_parameters() do
      local other = b:state_dict()[name]:to{ dtype = "f64" }
      assert.is_true((t:detach() - other):abs():max():item() < 1e-6)
    end
    local state = a:state_dict()
    state["layers.1.ffn.upp.weight"], state["layers.1.ffn.up.weight"] = state["layers.1.ffn.up.weight"], nil
    state["norm.bias"] = lac.ones{ 3 }
    local before = a.norm.weight:string()
    local ok, message = pcall(a.load_state_dict, a, state)
    assert.is_false(ok)
    assert.matches("1 missing: layers%.1%.ffn%.up%.weight", message)
    assert.is_truthy(message:find(
      "1 unexpected: layers.1.ffn.upp.weight (did you mean 'layers.1.ffn.up.weight'?)", 1, true), message)
    assert.matches("1 of another shape: norm%.bias %(here %[8%], given %[3%]%)", message)
    assert.equal(before, a.norm.weight:string())
    assert.error_matches(function() a:load_state_dict({ ["norm.bias"] = lac.ones{ 3 } },
      { strict = false }) end, "another shape")
    a:load_state_dict({ ["norm.bias"] = lac.full({ 8 }, 7) }, { strict = false })
    assert.same({ 7, 7, 7, 7, 7, 7, 7, 7 }, leaf_values(a.norm.bias))
  end)

  it("loads what lac.io.load returns, metadata and all, and no other third argument", function()
    local a, b, path = nn.Linear(2, 3), nn.Linear(2, 3), os.tmpname()
    for _, options in ipairs { {}, { checksum = true } } do
      a.bias:detach():uniform_()
      lac.io.save(path, a:state_dict(), { strict = "no", made = "here" }, options)
      b:load_state_dict(lac.io.load(path))
      assert.is_true(lac.equal(a.bias, b.bias) and lac.equal(a.weight, b.weight))
    end
    os.remove(path)
    assert.error_matches(function() b:load_state_dict(a:state_dict(), { made = "here" }) end,
      "unknown option 'made'")
    assert.error_matches(function() b:load_state_dict(a:state_dict(), {}, false) end,
      "Linear.load_state_dict: takes %(state, options%), got false as well")
  end)

  it("refuses tables of modules and of trained tensors, which it would not see", function()
    local Net = nn.module "Net"
    function Net:init(value) self.list = value end
    for _, value in ipairs { { nn.Linear(2, 2) }, { a = nn.Linear(2, 2) } } do
      assert.error_matches(function() Net(value) end, "Net: 'list' is a table of modules, .* nn.ModuleList")
    end
    assert.error_matches(function() Net { 1, lac.ones { 2, grad = true } } end,
      "'list' is a table of tensors that")
    assert.equal(1, Net({ lac.ones { 2 } }).list[1]:dim())
    assert.equal(2, #Net(nn.ModuleList { nn.Linear(2, 2) }):parameters())
  end)

  it("initialise with the deviations they state", function()
    lac.manual_seed(5)
    local function deviation(t)
      local sum, n = 0, t:numel()
      for _, row in ipairs(leaf_values(t)) do
        for _, v in ipairs(row) do sum = sum + v * v end
      end
      return math.sqrt(sum / n)
    end
    -- the deviation of n samples is itself off by about 1/sqrt(2n): 4 of these for 128 x 96 is 2.6 %
    local m = nn.Linear(128, 96, { gain = 1.5 })
    local expected = 1.5 * math.sqrt(2 / 224)
    assert.near(expected, deviation(m.weight), expected * 4 / math.sqrt(2 * 128 * 96))
    local attention = nn.MultiheadDilatedAttention{ embed_dim = 96, heads = 4, kv_heads = 2,
      segments = { 8 }, dilations = { 1 },
      fused = true, gamma = 2 }
    local w = attention.qkv.weight:detach()
    for i, part in ipairs{ { 1, 96, 1 }, { 97, 48, 1 }, { 145, 48, 2 } } do
      local std = part[3] * math.sqrt(2 / (96 + part[2]))
      local found = deviation(w:narrow(1, part[1], part[2]):contiguous())
      assert.near(std, found, std * 4 / math.sqrt(2 * 96 * part[2]), "part " .. i)
    end
    assert.near(math.sqrt(math.log(24)), nn.magneto_gain(12), 1e-15)
  end)
end)

describe("nn.MultiheadDilatedAttention", function()
  local E, H, N = 4, 2, 5

  local function rows_of(x) return x:totable()[1] end

  -- dense causal attention, in doubles
  local function reference(x, m)
    local q, k, v = linear(x, m.q), linear(x, m.k), linear(x, m.v)
    local D, merged = E / H, {}
    for n = 1, N do
      merged[n] = {}
      for h = 0, H - 1 do
        local p, total, best = {}, 0, -math.huge
        for j = 1, n do
          local s = 0
          for d = 1, D do s = s + q[n][h * D + d] * k[j][h * D + d] end
          p[j] = s / math.sqrt(D)
          best = math.max(best, p[j])
        end
        for j = 1, n do
          p[j] = math.exp(p[j] - best)
          total = total + p[j]
        end
        for d = 1, D do
          local sum = 0
          for j = 1, n do sum = sum + p[j] / total * v[j][h * D + d] end
          merged[n][h * D + d] = sum
        end
      end
    end
    return linear(layernorm(merged, m.norm), m.out)
  end

  it("is projections, attention, LayerNorm, projection", function()
    lac.manual_seed(2)
    local m = nn.MultiheadDilatedAttention{ embed_dim = E, heads = H, segments = { N }, dilations = { 1 },
      causal = true, dtype = "f64" }
    local x = lac.randn{ 1, N, E, dtype = "f64" }
    near_rows(reference(rows_of(x), m), rows_of(m(x)), 1e-12)
  end)

  it("gives the same fused or separate, for equal weights", function()
    local o = { embed_dim = 8, heads = 4, kv_heads = 2, segments = { 3, 6 }, dilations = { 1, 2 },
      causal = true,
      positions = "rope", dtype = "f64" }
    local separate = nn.MultiheadDilatedAttention(o)
    o.fused = true
    local fused = nn.MultiheadDilatedAttention(o)
    local state = separate:state_dict()
    for _, name in ipairs{ "weight", "bias" } do
      state["qkv." .. name] = lac.cat({ state["q." .. name], state["k." .. name], state["v." .. name] }, 1)
      state["q." .. name], state["k." .. name], state["v." .. name] = nil, nil, nil
    end
    fused:load_state_dict(state)
    local x = lac.randn{ 2, 7, 8, dtype = "f64" }
    assert.is_true((separate(x) - fused(x)):abs():max():item() < 1e-13)
    assert.error_matches(function() fused(x, lac.randn{ 2, 7, 8, dtype = "f64" }) end,
      "fused projection needs query, key and value")
  end)

  it("attends to another sequence, honours padding, ignores the origin of relative positions", function()
    local o = { embed_dim = 8, heads = 2, segments = { 9 }, dilations = { 1 }, positions = "xpos",
      dtype = "f64" }
    lac.manual_seed(4)
    local m = nn.MultiheadDilatedAttention(o)
    o.origin = -5
    local shifted = nn.MultiheadDilatedAttention(o)
    shifted:load_state_dict(m:state_dict())
    local x, y = lac.randn{ 2, 4, 8, dtype = "f64" }, lac.randn{ 2, 6, 8, dtype = "f64" }
    local out = m(x, y)
    assert.same({ 2, 4, 8 }, { out:size(1), out:size(2), out:size(3) })
    assert.is_true((out - shifted(x, y)):abs():max():item() < 1e-12)
    local short = m(x, y:narrow(2, 1, 4):contiguous())
    local padded = m(x, y, nil, { key_lengths = lac.tensor({ 4, 4 }, { dtype = "i64" }) })
    assert.is_true((short - padded):abs():max():item() < 1e-13)
  end)

  it("names what is wrong", function()
    local function try(pattern, change)
      local o = { embed_dim = 8, heads = 2, segments = { 4 }, dilations = { 1 } }
      for name, value in pairs(change) do o[name] = value end
      assert.error_matches(function() nn.MultiheadDilatedAttention(o) end, pattern)
    end
    try("embed_dim 8 is not divisible by heads 3", { heads = 3 })
    try("heads 2 is not divisible by kv_heads 4", { kv_heads = 4 })
    try("segments and dilations must have the same length: 1 != 2", { dilations = { 1, 2 } })
    try("segments%[1%] must be positive, got 0", { segments = { 0 } })
    try("the head dimension must be even, got 1", { heads = 8, positions = "rope" })
    try("unknown scheme 'spilt', did you mean 'split'", { scheme = "spilt" })
    try("did you mean 'causal'", { casual = true })
    try("dropout must be below 1", { dropout = 1 })
    -- what only the plan can know is refused at once too, not at the first batch
    try("branch 1 keeps nothing for head 2: its offset 1 is not below the segment 1", { segments = { 1 },
      dilations = { 2 } })
    try("2 heads cannot be split over 3 branches", { segments = { 2, 4, 8 }, dilations = { 1, 1, 1 },
      scheme = "split" })
    try("dedup counts every key once", { merge = "mean", dedup = true })
    local m = nn.MultiheadDilatedAttention{ embed_dim = 8, heads = 2, segments = { 4 }, dilations = { 1 } }
    assert.error_matches(function() m(lac.ones{ 2, 3 }) end,
      "query must be %[batch x positions x 8%], got Tensor f32 %[1 x 2 x 3%]")
    assert.error_matches(function() m(3) end, "query must be a tensor")
    assert.error_matches(function() m(lac.ones{ 1, 3, 8 }, nil, nil, { mask = 1 }) end,
      "unknown option 'mask'")
  end)
end)

describe("nn.LongNetLM", function()
  -- these tensors are too small to share out, and a busy machine makes a second thread slower than none
  local threads
  setup(function()
    threads = lac.threads()
    lac.threads(1)
  end)
  teardown(function() lac.threads(threads) end)

  it("prints, counts parameters, FLOPs and memory", function()
    local model = tiny()
    local names = {}
    for _, p in ipairs(model.layers[1]:parameter_list()) do names[#names + 1] = p.name end
    assert.equal("norm1.weight norm1.bias attention.q.weight attention.q.bias attention.k.weight "
      .. "attention.k.bias attention.v.weight attention.v.bias attention.norm.weight attention.norm.bias "
      .. "attention.out.weight attention.out.bias norm2.weight norm2.bias "
      .. "ffn.up.weight ffn.up.bias ffn.norm.weight ffn.norm.bias "
      .. "ffn.down.weight ffn.down.bias", table.concat(names, " "))
    assert.matches("^LongNetLM%(vocabulary 11, width 8, context 12, tied output, %d+ parameters",
      tostring(model))
    assert.matches("%(1%-2%): 2 x Block", tostring(model))
    -- embedding; per block: 2 LN, q k v out, inner LN, up, LN, down; final LN
    local block = 2 * 16 + 4 * (64 + 8) + 16 + (96 + 12) + 24 + (96 + 8)
    assert.equal(88 + 2 * block + 16, model:parameter_count())
    assert.equal(88 + 2 * block + 16 + 88, tiny{ tied = false }:parameter_count())
    local total, parts = model:flops_per_token()
    assert.equal(2 * (2 * (4 * 64 + 2 * 96) + 88), parts.linear_forward)
    -- pairs of one head, by brute force over the definition of a branch
    local count = 0
    for h = 0, 1 do
      for _, branch in ipairs{ { 4, 1 }, { 12, 2 } } do
        local w, r = branch[1], branch[2]
        for p = 0, 11 do
          for j = 0, p do
            local o = h % r
            if (p % w) % r == o and (j % w) % r == o
              and math.floor(p / w) == math.floor(j / w) then count = count + 1 end
          end
        end
      end
    end
    assert.near(2 * 4 * 4 * count / 12, parts.attention_forward, parts.attention_forward * 1e-12)
    assert.near(total, parts.forward + parts.backward, 1e-9)
    local bytes, memory = model:memory_estimate(3)
    assert.equal(8 * model:parameter_count(), memory.parameters)
    assert.equal(16 * model:parameter_count(), memory.optimizer)
    assert.is_true(bytes > memory.parameters + memory.optimizer)
  end)

  it("counts the activations that are kept for the backward, and the peak of a step", function()
    local model = nn.LongNetLM{ layers = 2, width = 32, heads = 2, context = 128, segments = { 32, 128 },
      dilations = { 1, 2 } }
    local x, y = tokens(8, 128, 256)
    local function live()
      collectgarbage()
      collectgarbage()
      return lac.memory(lac.default_device()).live
    end
    lac.scope(function()
      local before = live()
      local loss = model:loss(x, y)
      local kept, estimate = live() - before, select(2, model:memory_estimate(8)).activations
      assert.is_truthy(loss.node)
      assert.is_true(kept > 0.9 * estimate and kept < 1.1 * estimate, kept .. " against " .. estimate)
    end)
    -- a model in which the working memory of single operators, some megabytes, does not count
    model = nn.LongNetLM{ layers = 4, width = 64, heads = 2, context = 128, segments = { 32, 128 },
      dilations = { 1, 2 } }
    x, y = tokens(16, 128, 256)
    local optimizer = lac.optim.adamw(model)
    local before
    for _ = 1, 2 do -- parameters and moments are there before
      before = live()
      lac.reset_peak()
      lac.scope(function()
        model:loss(x, y):backward()
        optimizer:step()
        optimizer:zero_grad{ release = true }
      end)
    end
    local peak, _, parts = lac.memory(lac.default_device()).peak - before, model:memory_estimate(16)
    local estimate = parts.gradients + parts.activations + parts.temporaries
    assert.is_true(peak > 0.8 * estimate and peak < 1.1 * estimate, peak .. " against " .. estimate)
  end)

  it("gives back what only its rules read, and keeps what the caller has", function()
    local model = nn.LongNetLM{ layers = 2, width = 16, heads = 2, context = 16, segments = { 8, 16 },
      dilations = { 1, 2 }, dropout = 0.1 }
    local x, y = tokens(2, 16, 256)
    local seen = {}
    local function watch(m, name) -- a user who looks at what a module makes
      local forward = m.forward
      rawset(m, "forward", function(...)
        local out = forward(...)
        seen[name] = out
        return out
      end)
    end
    watch(model.layers[1], "block")
    watch(model.layers[1].ffn.up, "up")
    local hidden = model:hidden(x)
    local out = model.layers[1](hidden)
    local logits = model(x)
    local loss = model:loss(x, y)
    assert.is_false(seen.up:is_released())
    loss:backward({ retain_graph = true })
    assert.is_false(seen.up:is_released())
    loss:backward()
    assert.is_true(seen.up:is_released())
    assert.is_true(seen.block:is_released())
    assert.error_matches(function() return seen.up + 1 end, "x is used after release")
    for _, t in ipairs{ hidden, out, logits, loss } do assert.is_false(t:is_released()) end
    (out:sum() + logits:sum() + hidden:sum()):backward() -- graphs of their own, which the first did not free
    for _, t in ipairs{ hidden, out, logits } do assert.is_false(t:is_released()) end

    -- a value that is asked to keep its gradient stays, and so does one that a submodule hands through
    model = nn.LongNetLM{ layers = 1, width = 16, heads = 2, context = 16, segments = { 16 },
      dilations = { 1 } }
    watch(model.layers[1].attention, "attention")
    local up = model.layers[1].ffn.up.forward
    rawset(model.layers[1].ffn.up, "forward", function(...)
      local made = up(...)
      if made.requires_grad then seen.kept = made:retain_grad() end
      return made
    end)
    rawset(model.layers[1].norm1, "forward", function(_, v) return v end)
    local block = model.layers[1]
    local input = lac.randn{ 1, 16, 16, grad = true } * 1
    block(input):sum():backward()
    assert.is_false(input:is_released())
    assert.is_true(seen.attention:is_released())
    assert.is_false(seen.kept:is_released())
    lac.no_grad(function()
      seen.attention = nil
      local before = lac.randn{ 1, 16, 16 }
      local after = block(before)
      assert.is_false(before:is_released())
      assert.is_true(seen.attention:is_released())
      assert.equal(16, after:size(2))
    end)
  end)

  it("has a loss that is the cross-entropy of its logits", function()
    for _, tied in ipairs{ true, false } do
      local model = tiny{ tied = tied }
      local x, y = tokens(2, 10, 11)
      local logits, target = model(x):totable(), y:totable()
      target[1][3], target[2][10] = -100, -100
      local sum, n = 0, 0
      for b = 1, 2 do
        for t = 1, 10 do
          if target[b][t] >= 0 then
            local total = 0
            for c = 1, 11 do total = total + math.exp(logits[b][t][c]) end
            sum, n = sum + math.log(total) - logits[b][t][target[b][t] + 1], n + 1
          end
        end
      end
      local ty = lac.tensor(target, { dtype = "i32" })
      assert.near(sum / n, model:loss(x, ty):item(), 1e-12)
      assert.near(sum, model:loss(x, ty, { reduction = "sum", chunk = 3 }):item(), 1e-11)
      local o = { label_smoothing = 0.2, weight = lac.rand{ model.vocab, dtype = "f64" }, ignore_index = 2 }
      assert.near(lac.cross_entropy(model(x), y, o):item(), model:loss(x, y, o):item(), 1e-12)
    end
  end)

  it("has a chunk's logits at a time, forward and backward", function()
    local rows, vocab = 4096, 8192
    local x, w = lac.randn({ rows, 16 }, { grad = true }), lac.randn({ vocab, 16 }, { grad = true })
    local target = lac.randint({ rows }, { high = vocab })
    local function grown(options)
      return lac.scope(function()
        lac.reset_peak()
        local before = lac.memory(lac.default_device()).live
        local loss = lac.linear_cross_entropy(x, w, nil, target, options)
        lac.grad(options.reduction and loss:sum() or loss, { x, w })
        return lac.memory(lac.default_device()).peak - before
      end)
    end
    for _, reduction in ipairs{ "mean", "none" } do
      local o = { chunk = 128, reduction = reduction ~= "mean" and reduction or nil }
      assert.is_true(grown(o) < 4 * rows * vocab / 4, reduction)
      o.chunk = rows
      assert.is_true(grown(o) >= 4 * rows * vocab, reduction) -- the measure sees them
    end
  end)

  it("is causal", function()
    local model = tiny{ scheme = "split", merge = "sum" }
    local x = tokens(1, 12, 11):totable()
    local before = model(lac.tensor(x, { dtype = "i32" })):totable()[1]
    x[1][7] = (x[1][7] + 1) % 11
    local after = model(lac.tensor(x, { dtype = "i32" })):totable()[1]
    for n = 1, 6 do assert.same(before[n], after[n]) end
    assert.not_same(before[7], after[7])
  end)

  it("has the gradients of its loss, for parameters of every kind", function()
    for _, options in ipairs{ { positions = "xpos" }, { positions = "rope", tied = false, fused = true,
      kv_heads = 1 },
      { positions = "none", scheme = "split" } } do
      local model = tiny(options)
      local x, y = tokens(2, 11, 11)
      model:loss(x, y):backward()
      for name, p in model:named_parameters() do
        local grad, n = p.grad:view(-1), p:numel()
        for _, i in ipairs{ 1, 1 + math.floor(n * 0.37), n } do
          local number = p:detach():view(-1):narrow(1, i, 1)
          local keep, h = number:item(), 1e-5
          local function loss_at(v)
            number:fill_(v)
            return lac.no_grad(function() return model:loss(x, y):item() end)
          end
          local slope = (loss_at(keep + h) - loss_at(keep - h)) / (2 * h)
          number:fill_(keep)
          -- the difference has an error of h^2 times the third derivative, and of rounding over h
          assert.near(slope, grad[i]:item(), 1e-8 + 1e-6 * math.abs(slope), name .. "[" .. i .. "]")
        end
      end
    end
  end)

  it("is deterministic: five steps, with dropout, bit by bit, on one thread or three", function()
    local function run()
      lac.manual_seed(9)
      local model = nn.LongNetLM{ vocab = 11, layers = 2, width = 16, heads = 2, context = 12,
        segments = { 4, 12 },
        dilations = { 1, 2 }, dropout = 0.1, attention_dropout = 0.1 }
      local opt = lac.optim.adamw(model, { lr = 0.01 })
      local losses = {}
      for i = 1, 5 do
        local x, y = tokens(2, 12, 11)
        local loss = model:loss(x, y)
        loss:backward()
        opt:step{ clip = 1 }
        opt:zero_grad()
        losses[i] = loss:item()
      end
      return losses, model.embedding.weight:detach():string()
    end
    local a, wa = run()
    lac.threads(3)
    local b, wb = run()
    lac.threads(1)
    assert.same(a, b)
    assert.equal(wa, wb)
    assert.not_equal(a[1], a[2])
  end)

  it("learns a repeating pattern and continues it", function()
    lac.manual_seed(1)
    local model = nn.LongNetLM{ layers = 2, width = 32, heads = 2, context = 32, segments = { 8, 32 },
      dilations = { 1, 2 } }
    local text = lac.data.string(("the gap is the point. "):rep(40))
    local opt = lac.optim.adamw(model, { lr = 0.01 })
    local loss
    for k = 1, 80 do
      lac.scope(function()
        local l = model:loss(text:batch(k, { batch = 4, context = 32 }))
        l:backward()
        opt:step{ clip = 1 }
        opt:zero_grad()
        loss = l:item()
      end)
    end
    assert.is_true(loss < 0.3, "loss " .. loss)
    assert.equal("the point. the gap is ", model:generate("the gap is ", 22, { temperature = 0 }))
  end)

  it("generates by its seed, within the context, from bytes or tokens", function()
    local model = nn.LongNetLM{ layers = 1, width = 8, heads = 2, context = 6, segments = { 6 },
      dilations = { 1 } }
    local a = model:generate("abc", 12, { seed = 4 })
    assert.equal(12, #a)
    assert.equal(a, model:generate("abc", 12, { seed = 4 }))
    assert.not_equal(a, model:generate("abc", 12, { seed = 5 }))
    assert.equal(model:generate("abc", 5, { temperature = 0 }), model:generate("abc", 5, { top_k = 1 }))
    local list = model:generate({ 97, 98, 99 }, 12, { seed = 4 })
    assert.equal(a, string.char(unpack(list)))
    assert.is_true(model.training)
    assert.error_matches(function() model:generate("", 3) end, "must not be empty")
    assert.error_matches(function() model:generate({ 1, 256 }, 3) end,
      "prompt%[2%] must be a token from 0 to 255, got 256")
    local broken = nn.LongNetLM{ layers = 1, width = 8, heads = 2, context = 6, segments = { 6 },
      dilations = { 1 } }
    broken.norm.bias:detach():fill_(0 / 0)
    assert.error_matches(function() broken:generate("a", 1) end, "the logit of token 0 is nan")
    assert.error_matches(function() model:generate("a", -1) end, "n must be at least 0")
    assert.error_matches(function() model:generate("a", 1, { topk = 3 }) end, "did you mean 'top_k'")
  end)

  it("names what is wrong", function()
    local model = tiny()
    local x, y = tokens(1, 13, 11)
    assert.error_matches(function() model(x) end, "13 positions exceed the context of 12 %[LongNetLM")
    assert.error_matches(function() model(lac.ones{ 12 }) end, "tokens must be %[batch x positions%]")
    assert.error_matches(function() model(lac.tensor({ { 11 } }, { dtype = "i32" })) end, "11")
    assert.error_matches(function() model:loss(x:narrow(2, 1, 5), y) end, "the same shape")
    assert.error_matches(function() nn.LongNetLM{ segments = { 4 }, dilations = { 1 } } end,
      "context is required")
    assert.error_matches(function() tiny{ causal = false } end, "unknown option 'causal'")
    assert.error_matches(function() tiny{ positions = "learned" } end, "positions")
  end)
end)
