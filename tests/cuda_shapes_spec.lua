--- cuda_shapes_spec.lua: operators on CUDA at sizes where their kernels change.
--
-- The cases of tests/support/cases.lua are small; on a GPU long rows, many rows, aligned runs and several
-- chunks have kernels of their own. Each is run here in every float type and held against the CPU in f64
-- under the suite's rule: the largest error is at most twice that of the CPU's program in the same type, and
-- two units in the last place of the largest number. Forward, and gradients from a random one. Tagged #gpu.

local it = os.getenv "LACUNA_GPU" == "1" and it or pending

local lac = require "lacuna"
local cases = require "support.cases"

-- { result, gradients ... } of f(inputs) on a device in a type, as f64 on the CPU; arrays: f64 on the CPU
local function results(f, arrays, dtype, device)
  local inputs = {}
  for i, array in ipairs(arrays) do
    local floating = array:dtype() == "f64"
    inputs[i] = array:to{ dtype = floating and dtype or nil, device = device }
    if floating then inputs[i] = inputs[i]:detach():requires_grad_(true) end
  end
  local out = f(unpack(inputs))
  local list = { out }
  if out.requires_grad then
    lac.manual_seed(9)
    local seed = lac.randn(out:size(), { dtype = "f64", device = "cpu" })
    seed = seed:to{ dtype = out:dtype(), device = device }
    local leaves = {}
    for _, x in ipairs(inputs) do
      if x.requires_grad then leaves[#leaves + 1] = x end
    end
    for _, g in ipairs(lac.grad(out, leaves, { grad_outputs = { seed } })) do list[#list + 1] = g end
  end
  for i, x in ipairs(list) do list[i] = x:detach():to{ dtype = "f64", device = "cpu" } end
  return list
end

local function distance(a, b)
  local worst = (a - b):abs():max():item()
  assert.equal(worst, worst, "a result is NaN")
  return worst
end

local function compare(f, arrays, dtype)
  for i, array in ipairs(arrays) do -- rounded first, so that all three start from the same numbers
    if array:dtype() == "f64" then arrays[i] = array:to{ dtype = dtype }:to{ dtype = "f64" } end
  end
  local exact = results(f, arrays, "f64", "cpu")
  local naive, got = results(f, arrays, dtype, "cpu"), results(f, arrays, dtype, "cuda")
  assert.equal(#exact, #got)
  for i, e in ipairs(exact) do
    local allowed = 2 * distance(naive[i], e) + 2 * cases.epsilon(dtype) * e:abs():max():item()
    local worst = distance(got[i], e)
    assert.is_true(worst <= allowed, ("%s, %s: error %.3g, allowed %.3g"):format(dtype,
      i == 1 and "result" or "gradient " .. i - 1, worst, allowed))
  end
end

local function normal(...) return lac.randn({ ... }, { dtype = "f64", device = "cpu" }) end
local function classes(n, high) return lac.randint{ n, high = high, dtype = "i64", device = "cpu" } end

local LIST = {}
local function case(name, f, make) LIST[#LIST + 1] = { name = name, f = f, make = make } end

for _, width in ipairs{ 8, 248, 512, 768, 1000, 1024, 2048, 3072, 4096, 8192, 8200, 771 } do
  local rows = width > 1024 and 37 or 1301
  case("layernorm of " .. width, function(x, gain, bias) return lac.layernorm(x, gain, bias) end,
    function() return { normal(rows, width) + 3, normal(width), normal(width) } end)
  case("rmsnorm of " .. width, function(x, gain) return lac.rmsnorm(x, gain) end,
    function() return { normal(rows, width), normal(width) } end)
  case("softmax of " .. width, function(x) return lac.softmax(x, 2) end,
    function() return { normal(rows, width) * 4 } end)
  case("log_softmax of " .. width, function(x) return lac.log_softmax(x, 2) end,
    function() return { normal(rows, width) * 4 } end)
end
-- so many rows that a thread takes several, and that the backward asks twice for statistics, those of 32 rows
for _, sizes in ipairs{ { 3500, 768 }, { 900, 3072 }, { 110000, 8 } } do
  case(("layernorm of [%d, %d]"):format(sizes[1], sizes[2]), function(x, gain, bias)
    return lac.layernorm(x, gain, bias)
  end, function() return { normal(sizes[1], sizes[2]) + 1, normal(sizes[2]), normal(sizes[2]) } end)
  case(("rmsnorm of [%d, %d]"):format(sizes[1], sizes[2]), function(x, gain) return lac.rmsnorm(x, gain) end,
    function() return { normal(sizes[1], sizes[2]) + 1, normal(sizes[2]) } end)
end
for _, width in ipairs{ 768, 3072 } do
  case(("rmsnorm of rows of %d that lie apart"):format(width), function(x, gain)
    return lac.rmsnorm(x:narrow(2, 9, width), gain)
  end, function() return { normal(130, width + 16), normal(width) } end)
  case(("layernorm of rows of %d that lie apart"):format(width), function(x, gain, bias)
    return lac.layernorm(x:narrow(2, 9, width), gain, bias)
  end, function() return { normal(130, width + 16), normal(width), normal(width) } end)
end
case("rmsnorm without gain", function(x) return lac.rmsnorm(x) end,
  function() return { normal(700, 768) } end)
case("layernorm without gain", function(x) return lac.layernorm(x) end,
  function() return { normal(700, 768) } end)
for _, sizes in ipairs{ { 1024, 32 }, { 2051, 768 }, { 1100, 776 }, { 4099, 72 }, { 300, 3072 },
  { 33000, 64 } } do
  local text = (" of [%d, %d]"):format(sizes[1], sizes[2])
  local function make() return { normal(sizes[1], sizes[2]) } end
  case("sum over 1" .. text, function(x) return x:sum(1) end, make)
  case("sum over 2" .. text, function(x) return x:sum(2) end, make)
  case("mean over 1" .. text, function(x) return x:mean(1) end, make)
  case("sum of all" .. text, function(x) return x:sum() end, make)
  case("sum over 1, a slice," .. text, function(x) return x:narrow(2, 9, sizes[2] - 8):sum(1) end, make)
  case("sum over 2, a slice," .. text, function(x) return x:narrow(2, 9, sizes[2] - 8):sum(2) end, make)
end
for _, sizes in ipairs{ { 37, 24 }, { 5001, 64 }, { 1301, 248 }, { 2051, 768 }, { 1100, 771 }, { 300, 3072 },
  { 9000, 1032 }, { 12, 9000 } } do
  local text = (" of [%d, %d]"):format(sizes[1], sizes[2])
  local function make() return { normal(sizes[1], sizes[2]) * 3 + 1 } end
  local function outlier() -- in front, where variances take their shift from
    local x = normal(sizes[1], sizes[2])
    x:narrow(2, 1, 1):fill_(300)
    return { x }
  end
  for _, name in ipairs{ "max", "min", "var", "logsumexp" } do
    case(name .. " over 2" .. text, function(x) return x[name](x, 2) end, make)
    if sizes[1] < 2000 then case(name .. " of all" .. text, function(x) return x[name](x) end, make) end
  end
  case("norm inf over 2" .. text, function(x) return x:norm(math.huge, 2) end, make)
  case("max over 2, a slice," .. text, function(x) return x:narrow(2, 9, sizes[2] - 8):max(2) end, make)
  case("var over 2, an outlier in front," .. text, function(x) return x:var(2) end, outlier)
end
for _, name in ipairs{ "max", "min", "var", "logsumexp" } do -- rows of two axes with strides of their own
  case(name .. " over 4 of [5, 3, 301, 64], turned", function(x)
    local y = x:transpose(2, 3)
    return y[name](y, 4)
  end, function() return { normal(5, 3, 301, 64) * 3 } end)
end
for _, n in ipairs{ 2, 7, 4096, 16384, 100003 } do
  for _, name in ipairs{ "neg", "abs", "square", "relu", "tanh", "gelu_tanh", "exp", "sigmoid", "silu",
    "gelu" } do
    case(("%s of %d"):format(name, n), function(x) return lac[name](x) end,
      function() return { normal(n) * 3 } end)
  end
  case(("sqrt of %d"):format(n), function(x) return lac.sqrt(x) end,
    function() return { normal(n):abs() + 0.1 } end)
  for _, name in ipairs{ "add", "sub", "mul", "div" } do
    local function make() return { normal(n), normal(n):abs() + 0.5 } end
    case(("%s of %d"):format(name, n), function(x, y) return lac[name](x, y) end, make)
    case(("%s of %d and a number"):format(name, n), function(x) return lac[name](x, 1.75) end,
      function() return { normal(n) } end)
    case(("%s of a number and %d"):format(name, n), function(x, y) return lac[name](1.75, y) + 0 * x end,
      make)
  end
end
for _, sizes in ipairs{ { 50, 4096 }, { 9, 50304 }, { 300, 8 }, { 20, 1003 } } do
  local rows, n = sizes[1], sizes[2]
  local function make() return { normal(rows, n) * 3, classes(rows, n) } end
  local text = (" of [%d, %d]"):format(rows, n)
  case("cross_entropy" .. text, function(x, t) return lac.cross_entropy(x, t) end, make)
  case("cross_entropy" .. text .. " with ignored rows",
    function(x, t) return lac.cross_entropy(x, t, { ignore_index = t[1]:item(), reduction = "none" }) end,
    make)
  case("cross_entropy" .. text .. " with weights",
    function(x, t) return lac.cross_entropy(x, t, { weight = lac.linspace(0.5, 2, n, { dtype = x:dtype(),
      device = x:device() }) }) end, make)
end
case("linear_cross_entropy in chunks",
  function(x, w, t) return lac.linear_cross_entropy(x, w, nil, t, { chunk = 96 }) end,
  function() return { normal(400, 64), normal(1000, 64) * 0.3, classes(400, 1000) } end)
case("linear_cross_entropy in chunks, smoothed, of 1003 classes", -- the gradient in the logits' rows
  function(x, w, t) return lac.linear_cross_entropy(x, w, nil, t, { chunk = 96, label_smoothing = 0.1 }) end,
  function() return { normal(400, 64), normal(1003, 64) * 0.3, classes(400, 1003) } end)
case("linear_cross_entropy in chunks, with a bias, of 50304 classes",
  function(x, w, b, t) return lac.linear_cross_entropy(x, w, b, t, { chunk = 40 }) end,
  function() return { normal(100, 16), normal(50304, 16) * 0.3, normal(50304), classes(100, 50304) } end)
for _, kind in ipairs{ "plain", "with ignored rows", "with weights" } do -- more rows than multiprocessors
  case("linear_cross_entropy of 300 x 16512, " .. kind, function(x, w, t)
    return lac.linear_cross_entropy(x, w, nil, t, { chunk = 200,
      ignore_index = kind == "with ignored rows" and t[1]:item() or nil, weight = kind == "with weights"
        and lac.linspace(0.5, 2, 16512, { dtype = x:dtype(), device = x:device() }) or nil })
  end, function() return { normal(300, 16), normal(16512, 16), classes(300, 16512) } end)
end
case("three linear layers of one tensor",
  function(x, a, b, c)
    local y = x * 2
    return lac.linear(y, a) + lac.linear(y, b) + lac.linear(y, c)
  end,
  function() return { normal(300, 64), normal(72, 64) * 0.2, normal(72, 64) * 0.2, normal(72, 64) * 0.2 } end)
for _, o in ipairs{ { 300, 64, 128, 72 }, { 5, 7, 9, 3 }, -- with and without epilogues of cuBLASLt
  { 300, 16, 3072, 8 }, { 40, 16, 5120, 8 }, { 40, 16, 8192, 8 } } do -- rows that threads of a block share
  local n, width, hidden, out = unpack(o)
  local text = (" of %d x %d x %d"):format(n, width, hidden)
  local function make()
    return { normal(n, width), normal(hidden, width) * 0.2, normal(hidden), normal(out, hidden) * 0.2,
      normal(out) }
  end
  case("linear" .. text, function(x, w, b) return lac.linear(x, w, b) end,
    function() return { normal(n, width), normal(hidden, width) * 0.2, normal(hidden) } end)
  for _, name in ipairs{ "gelu", "gelu_tanh" } do
    case("linear_act" .. text .. " " .. name, function(x, w, b) return lac.linear_act(x, w, b, name) end,
      function() return { normal(n, width), normal(hidden, width) * 0.2, normal(hidden) } end)
    case("feed_forward" .. text .. " " .. name,
      function(x, u, b, d, c) return lac.feed_forward(x, u, b, d, c, { activation = name }) end, make)
  end
  case("feed_forward with a norm" .. text, function(x, u, b, d, c, gamma, beta)
    return lac.feed_forward(x, u, b, d, c, { norm = true, gamma = gamma, beta = beta })
  end, function()
    local list = make()
    list[6], list[7] = normal(hidden), normal(hidden)
    return list
  end)
end
for _, o in ipairs{ { 96, 4, 64 }, { 33, 3, 16 }, { 10, 2, 6 }, { 2000, 1, 128 }, { 50, 6, 256 },
  { 20, 2, 512 } } do
  local text = (" of [2, %d, %d, %d]"):format(unpack(o))
  local function make() return { normal(2, unpack(o)) } end
  case("rope" .. text, function(x) return lac.rope(x, { start = 1000 }) end, make)
  case("xpos" .. text, function(x) return lac.rope(x, { start = -500, scale_base = 512, sign = -1 }) end,
    make)
  case("interleaved rope" .. text, function(x) return lac.rope(x, { interleaved = true }) end, make)
end

describe("cuda at size #gpu", function()
  for _, c in ipairs(LIST) do
    it(c.name, function()
      for _, dtype in ipairs{ "f32", "bf16", "f16" } do
        lac.scope(function()
          lac.manual_seed(4)
          compare(c.f, c.make(), dtype)
        end)
      end
    end)
  end

  -- results and gradients of two programs are the same; from number `sums` on up to the order of their sums
  local function same_bits(apart, joined, dtype, sums, text)
    for i, t in ipairs(apart) do
      local same = lac.equal(t, joined[i])
      if i >= sums then
        local scale = t:to{ dtype = "f64" }:abs():max():item()
        local far = (t:to{ dtype = "f64" } - joined[i]:to{ dtype = "f64" }):abs():max():item()
        same = far <= 2 * cases.epsilon(dtype) * scale
      end
      assert.is_true(same, ("%s, %s, %d"):format(text, dtype, i))
    end
  end

  local function each_width(f)
    for _, width in ipairs{ 8, 248, 768, 1024, 3072, 8192, 8200, 771 } do
      for _, dtype in ipairs{ "f64", "f32", "bf16", "f16" } do
        lac.scope(function()
          lac.manual_seed(3)
          f(width, dtype, function(...)
            return lac.randn({ ... }, { dtype = dtype, device = "cuda", grad = true })
          end)
        end)
      end
    end
  end

  it("residual_norm gives the numbers, dropout and gradients of its three parts, to the bit", function()
    each_width(function(width, dtype, draw)
      local x, h, gain, bias = draw(301, width), draw(301, width), draw(width), draw(width)
      local a, b = draw(301, width):detach(), draw(301, width):detach()
      for _, p in ipairs{ 0, 0.3 } do
        local function run(joined)
          lac.manual_seed(5)
          local sum, out
          if joined then
            sum, out = lac.residual_norm(x, h, gain, bias, { p = p })
          else
            sum = x + lac.dropout(h, p)
            out = lac.layernorm(sum, gain, bias)
          end
          local dx, dh, dgain, dbias = unpack(lac.grad({ sum, out }, { x, h, gain, bias },
            { grad_outputs = { a, b } }))
          return { sum, out, dx, dh, dgain, dbias }
        end
        same_bits(run(false), run(true), dtype, 5, ("width %d, p %g"):format(width, p))
      end
    end)
  end)

  it("gelu_norm gives the numbers and gradients of its two parts, to the bit", function()
    each_width(function(width, dtype, draw)
      local rows = width == 768 and 3500 or width == 3072 and 900 or 301 -- a thread takes several of 768
      local x, gain, bias, g = draw(rows, width), draw(width), draw(width), draw(rows, width):detach()
      local function run(out)
        return { out, unpack(lac.grad(out, { x, gain, bias }, { grad_outputs = { g } })) }
      end
      same_bits(run(lac.layernorm(lac.gelu(x), gain, bias)), run(lac.gelu_norm(x, gain, bias)), dtype, 3,
        "width " .. width)
    end)
  end)

  -- a call's kernels begin while those ahead of it end, and its scratch is theirs
  it("norms' gradients have the same bits however closely calls follow each other", function()
    for _, name in ipairs{ "layernorm", "rmsnorm", "gelu_norm" } do
      for _, width in ipairs{ 768, 3072, 1024 } do
        lac.scope(function()
          local calls, alone, queued = {}, {}, {}
          for i, rows in ipairs{ 3500, 1, 1700, 200 } do
            local function draw(...)
              return lac.randn({ ... }, { dtype = "bf16", device = "cuda", grad = true })
            end
            local x, gain, bias, g = draw(rows, width), draw(width), draw(width), draw(rows, width):detach()
            local inputs = name == "rmsnorm" and { x, gain } or { x, gain, bias }
            local out = lac[name](unpack(inputs))
            local o = { grad_outputs = { g }, retain_graph = true }
            calls[i] = function() return lac.grad(out, inputs, o) end
          end
          for i, call in ipairs(calls) do
            alone[i] = call()
            lac.synchronize()
          end
          for turn = 1, 20 do
            local i = turn * 3 % #calls + 1
            queued[turn] = { i, calls[i]() }
          end
          for n, entry in ipairs(queued) do
            for k, t in ipairs(entry[2]) do
              local text = ("%s, width %d, call %d, %d"):format(name, width, n, k)
              assert.is_true(lac.equal(t, alone[entry[1]][k]), text)
            end
          end
        end)
      end
    end
  end)

  -- 1 / sqrt(eps) would multiply any rounding of their mean
  it("reduces rows with NaN, infinities and the largest numbers as the CPU does", function()
    local inf = math.huge
    local rows = { { 3, 0 / 0, 1 }, { inf, 2, inf }, { -inf, -inf, -inf }, { inf, -inf, 0 }, { 7, 7, 7 },
      { -inf, 5, 5 }, { -inf, 0 / 0, -inf }, { 3e38, 3e38, -inf }, { -3e38, -3e38, -inf },
      { 3e38, 2e38, -3e38 }, { 1e18, -1e18, 3e18 }, { 6e4, -6e4, 3e4 }, { 2e-38, -2e-38, 0 },
      { 0.1, 0.1, 0.1 }, { 98816, 98304, 0 }, { -98304, -98816, -2e4 }, { 2e4, -2e4, 19968 } }
    local function reduce(name, x)
      if name == "norm" then return x:norm(inf, 2) end
      return x[name](x, 2)
    end
    for _, dtype in ipairs{ "f32", "bf16", "f16" } do
      for _, width in ipairs{ 3, 24, 768, 1032 } do
        local list = {}
        for i, values in ipairs(rows) do
          list[i] = {}
          for k = 1, width do list[i][k] = values[k * 3 > width * 2 and 3 or k * 3 > width and 2 or 1] end
        end
        local x = lac.tensor(list, { dtype = dtype, device = "cpu" })
        for _, name in ipairs{ "max", "min", "logsumexp", "var", "norm" } do
          local cpu = reduce(name, x):to{ dtype = "f32" }:totable()
          local cuda = reduce(name, x:to{ device = "cuda" }):to{ dtype = "f32", device = "cpu" }:totable()
          for i, v in ipairs(cpu) do
            local same = v == cuda[i] or (v ~= v and cuda[i] ~= cuda[i]) -- or both are NaN
              or math.abs(v - cuda[i]) <= 4 * cases.epsilon(dtype) * math.abs(v)
            assert.is_true(same, ("%s of %s, row %d of %d: %g, CPU %g"):format(name, dtype, i, width,
              cuda[i], v))
          end
        end
      end
    end
  end)

  -- a sum begins, and asks for its first lines, before the kernel that writes them is done
  it("sums what the kernel ahead has just written, many in a row, to the bit", function()
    for _, dtype in ipairs{ "f32", "bf16" } do
      for _, sizes in ipairs{ { 2051, 768 }, { 33000, 64 }, { 9000, 3072 } } do
        lac.scope(function()
          local x, list = lac.randn(sizes, { dtype = dtype, device = "cuda" }), {}
          for i = 1, 12 do
            x = x * -1.25
            list[i] = { x, x:sum(1), x:sum(), x:sum(1), x:sum() }
          end
          lac.synchronize()
          for i, t in ipairs(list) do
            local columns, all = t[1]:sum(1), t[1]:sum()
            lac.synchronize()
            local same = lac.equal(t[2], columns) and lac.equal(t[4], columns) and lac.equal(t[3], all)
              and lac.equal(t[5], all)
            assert.is_true(same, ("%s [%d, %d], %d"):format(dtype, sizes[1], sizes[2], i))
          end
        end)
      end
    end
  end)

  it("reduces many long rows as f64 does", function()
    lac.scope(function()
      for _, width in ipairs{ 1536, 3072, 4104 } do
        for _, dtype in ipairs{ "f32", "bf16", "f16" } do
          local x = lac.randn({ 8500, width }, { dtype = dtype, device = "cuda" }) * 3 + 1
          x:narrow(1, 1, 99):narrow(2, 1, 1):fill_(300)
          local exact = x:to{ dtype = "f64" }
          for _, name in ipairs{ "max", "min", "logsumexp", "var" } do
            local wanted = exact[name](exact, 2)
            local far = ((x[name](x, 2):to{ dtype = "f64" } - wanted) / wanted):abs():max():item()
            local text = ("%s of %d, %s: %g"):format(name, width, dtype, far)
            assert.is_true(far <= 2 * cases.epsilon(dtype), text)
          end
        end
      end
    end)
  end)

  it("rows of equal numbers become the bias, to the bit", function()
    each_width(function(width, dtype, draw)
      local gain, bias = draw(width):detach(), draw(width):detach()
      local x = lac.full({ 5, width }, 100, { dtype = dtype, device = "cuda" }) -- gelu(100) = 100
      local wanted = bias:view(1, width):expand(5, width)
      local _, joined = lac.residual_norm(x, x, gain, bias)
      local list = { layernorm = lac.layernorm(x, gain, bias), gelu_norm = lac.gelu_norm(x, gain, bias),
        residual_norm = joined }
      for name, out in pairs(list) do
        assert.is_true(lac.equal(out, wanted), ("%s, width %d, %s"):format(name, width, dtype))
      end
    end)
  end)

  it("linear_cross_entropy takes its gradient on the way there, with any factor", function()
    local x, w = normal(300, 64):to{ device = "cuda" }, normal(1000, 64):to{ device = "cuda" }
    local t = classes(300, 1000):to{ device = "cuda" }
    x:requires_grad_(true)
    w:requires_grad_(true)
    local apart = lac.linear_cross_entropy(x, w, nil, t, { reduction = "none" }):mean()
    local joined = lac.linear_cross_entropy(x, w, nil, t)
    assert.is_true(lac.allclose(apart, joined, { rtol = 1e-12 }))
    for _, factor in ipairs{ 1, 1, 0.3 } do -- twice from one graph
      local o = { retain_graph = true }
      local a, b = lac.grad(apart * factor, { x, w }, o), lac.grad(joined * factor, { x, w }, o)
      for i = 1, 2 do assert.is_true(lac.allclose(a[i], b[i], { rtol = 1e-10, atol = 1e-14 })) end
    end
    local direct = lac.grad(joined, { x, w }, { retain_graph = true })
    local again = lac.grad(joined, { x, w })
    for i = 1, 2 do assert.is_true(lac.equal(direct[i], again[i])) end
  end)

  it("bf16, and f16 with a scaler, train as f32 does", function()
    local function last_loss(dtype)
      lac.manual_seed(2)
      local model = lac.nn.LongNetLM{ vocab = 64, layers = 2, width = 64, heads = 4, context = 128,
        segments = { 32, 128 }, dilations = { 1, 4 }, dtype = dtype, device = "cuda" }
      local optimizer = lac.optim.adamw(model, { lr = 3e-3, master = dtype ~= "f32" })
      local scaler = dtype == "f16" and lac.optim.loss_scaler() or nil
      local mean = 0
      for step = 1, 120 do
        lac.scope(function()
          local start = lac.randint({ 8, 1 }, { high = 64, device = "cuda", dtype = "i64" })
          local tokens = (start + lac.arange({ 129 }, { device = "cuda", dtype = "i64" }) * 5) % 64
          local x, y = tokens:narrow(2, 1, 128):contiguous(), tokens:narrow(2, 2, 128):contiguous()
          local loss = model:loss(x, y);
          (scaler and scaler:scale(loss) or loss):backward()
          optimizer:step{ clip = 1, scaler = scaler }
          optimizer:zero_grad()
          if step > 100 then mean = mean + loss:item() / 20 end
        end)
      end
      return mean
    end
    local exact = last_loss "f32"
    assert.is_true(exact < 2, tostring(exact)) -- from log 64 = 4.2
    for _, dtype in ipairs{ "bf16", "f16" } do
      local loss = last_loss(dtype)
      assert.is_true(math.abs(loss - exact) < 0.05, ("%s: %g, f32: %g"):format(dtype, loss, exact))
    end
  end)

  it("AdamW with and without masters, of sizes that fill vectors and of others", function()
    for _, dtype in ipairs{ "f32", "bf16", "f16" } do
      local function run(device)
        lac.manual_seed(6)
        local list = {}
        for i, n in ipairs{ 1, 7, 8192, 8193, 30001, 768 * 64 } do
          list[i] = lac.randn({ n }, { device = "cpu" }):to{ dtype = dtype, device = device }
          list[i]:requires_grad_(true)
        end
        local optimizer = lac.optim.adamw(list, { lr = 1e-2, master = dtype ~= "f32" })
        for _ = 1, 3 do
          for _, p in ipairs(list) do
            p.grad = lac.randn(p:size(), { device = "cpu" }):to{ dtype = dtype, device = device }
          end
          optimizer:step()
        end
        return list
      end
      local cpu, cuda = run "cpu", run "cuda"
      for i, p in ipairs(cpu) do
        local a, b = p:detach():to{ dtype = "f64" }, cuda[i]:detach():to{ dtype = "f64", device = "cpu" }
        assert.is_true(distance(a, b) <= 4 * cases.epsilon(dtype) * a:abs():max():item(), dtype .. " " .. i)
      end
    end
  end)
end)
