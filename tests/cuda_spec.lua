--- The CUDA back end against the CPU: every operator of the case list, in every dtype and layout, forward and
-- backward.
--
-- All specs here are tagged #gpu: `make test-gpu` runs them on a machine with a device, `make test` counts
-- them as skipped. The CPU is the reference, because ops_spec holds it against independent references and
-- finite differences. For each case the device's result and gradients (towards one fixed cotangent) obey the
-- tolerance rule: the exact values are the CPU's in f64, the naive ones the CPU's in the dtype under test.
-- The inputs are those of the case's name, the dtype and the draw, whatever ran before.
-- Cases whose operators do not exist on CUDA must say so by name, and the list of them is here, so that a
-- missing operator is never mistaken for a passing one.

local it = os.getenv "LACUNA_GPU" == "1" and it or pending

local lac = require "lacuna"
local lib = require "lacuna.lib"
local tensor = require "lacuna.tensor"
local cases = require "support.cases"
local inputs_of = require "support.inputs"

-- what is still missing on CUDA, by the engine's name of the operator
local MISSING = {}
for name in (""):gmatch("%S+") do MISSING[name] = true end -- nothing: names go between the quotes

local function values(t)
  local dtype = t:dtype()
  if dtype == "f16" or dtype == "bf16" then t = t:to { dtype = "f64" } end
  return tensor.flat_list(t)
end

-- cases that ask for the CPU, or make a tensor of numbers alone
local MIXED = { ["prod (zeros)"] = true } -- the case itself makes a CPU tensor
local ON_HOST = { to = true, causal_mask = true, alibi_slopes = true, alibi_bias = true }

local function cotangent_of(out)
  lac.manual_seed(8)
  return lac.randn_like(out:detach():to { device = "cpu", dtype = "f64" })
end

-- results and gradients of a case, as lists of numbers { out, gradient of input 1, ... }, and the result
local function results(case, arrays, dtype, layout, device)
  local given, wanted, checked = {}, {}, {}
  for _, i in ipairs(case.grad_inputs or {}) do checked[i] = true end
  for i, spec in ipairs(case.inputs) do
    given[i] = layout(arrays[i], inputs_of.dtype_of(spec, dtype), device)
    if case.grad and inputs_of.is_float(spec) and (not case.grad_inputs or checked[i]) then
      given[i] = given[i]:detach():requires_grad_(true)
      wanted[#wanted + 1] = given[i]
    end
  end
  lac.manual_seed(7)
  local out = case.call(lac, unpack(given))
  local lists = { values(out:detach()) }
  if out.requires_grad and #wanted > 0 then
    out:backward(cotangent_of(out):to { dtype = out:dtype(), device = out:device() })
    for i = 1, #wanted do lists[i + 1] = wanted[i].grad and values(wanted[i].grad) or {} end
  end
  return lists, out
end

-- The CPU's f64 is a naive f64 program itself. What such a program may be off by is what programs in
-- narrower types are off by, in units of their last places: the largest of f32, bf16 and, where the case has
-- them, its reference (as in ops_spec) and its derivative in f32. One of them alone may be exact by chance,
-- and one that the CPU computes in doubles is off by its last rounding only, which no f64 program can match.
local function naive_f64(case, arrays, exact, out)
  local naive = {}
  for k, list in ipairs(exact) do
    naive[k] = {}
    for i, e in ipairs(list) do naive[k][i] = e end
  end
  local function widen(k, list, bits)
    for i, e in ipairs(exact[k]) do
      local n, known = list[i], naive[k][i]
      if type(e) == "boolean" then e, n = e and 1 or 0, n and 1 or 0 end
      if type(known) == "boolean" then known = known and 1 or 0 end
      local off = (n - e) * 2 ^ -bits
      naive[k][i] = off - off == 0 and math.abs(off) > math.abs(known - e) and e + off or known
    end
  end
  local narrower = { f32 = 29, bf16 = not case.dtypes and 45 or nil }
  for _, name in ipairs(case.dtypes or {}) do
    if name == "bf16" then narrower.bf16 = 45 end
  end
  for name, bits in pairs(narrower) do
    local lists = results(case, arrays, name, inputs_of.contiguous, "cpu")
    for k, list in ipairs(lists) do widen(k, list, bits) end
  end
  if case.ref then
    widen(1, case.ref(function(v) return cases.round("f32", v) end, unpack(arrays)).data, 29)
  end
  if case.derivative then
    local function R(v) return cases.round("f32", v) end
    local slopes, cotangent = case.derivative(R, arrays[1]).data, values(cotangent_of(out))
    for i, slope in ipairs(slopes) do slopes[i] = R(slope * R(cotangent[i])) end
    widen(2, slopes, 29)
  end
  return naive
end

local DEVICE = "cuda"
local ENOUGH, MOST_DRAWS = 48, 16 -- values by which an operator is judged, as in ops_spec

-- one draw of the inputs, appended to lists of numbers: all[1] the device's, all[2] exact, all[3] naive
local function draw(case, dtype, layout, all)
  local arrays = {}
  for i, spec in ipairs(case.inputs) do arrays[i] = inputs_of.array_for(spec, dtype) end
  local got, there = results(case, arrays, dtype, layout, DEVICE)
  if not ON_HOST[case.name] then assert.are.equal(DEVICE, (there:device():gsub(":0$", ""))) end
  local exact, out = results(case, arrays, "f64", inputs_of.contiguous, "cpu")
  local naive = dtype == "f64" and naive_f64(case, arrays, exact, out)
    or results(case, arrays, dtype, inputs_of.contiguous, "cpu")
  assert.are.equal(#exact, #got)
  for which, lists in ipairs { got, exact, naive } do
    for k, list in ipairs(lists) do
      local numbers = all[which][k] or {}
      for _, v in ipairs(list) do numbers[#numbers + 1] = type(v) == "boolean" and (v and 1 or 0) or v end
      all[which][k] = numbers
    end
  end
end

local function compare(case, dtype, layout)
  inputs_of.seed(case.name .. (case.label or "") .. dtype)
  local all = { {}, {}, {} }
  for _ = 1, MOST_DRAWS do
    draw(case, dtype, layout, all)
    if #all[1][1] >= ENOUGH then break end
  end
  for k, list in ipairs(all[1]) do
    local message = cases.compare(dtype, list, all[2][k], all[3][k])
    if message then
      error(("%s, %s: %s"):format(dtype, k == 1 and "result" or "gradient " .. k - 1, message), 0)
    end
  end
end

local function missing_name(message)
  return tostring(message):match("([%w_]+): not supported on cuda")
end

-- runs f; a CUDA operator that is known to be missing is not a failure
local function unless_missing(f)
  local ok, message = pcall(f)
  if ok then return end
  if type(message) == "table" then message = message.message or tostring(message) end
  local name = missing_name(message)
  if name and MISSING[name] then return end
  error(message, 0)
end

describe("cuda #gpu", function()
  local errors_before
  setup(function()
    lib.C.lac_memory_guard(1)
    errors_before = lib.C.lac_memory_guard_errors()
  end)
  teardown(function() lib.C.lac_memory_guard(0) end)

  describe("operators", function()
    for _, case in ipairs(cases.list) do
      local floats = false
      for _, spec in ipairs(case.inputs) do floats = floats or inputs_of.is_float(spec) end
      local name = case.name .. (case.label and " (" .. case.label .. ")" or "");
      (MIXED[name] and pending or it)(name, function()
        unless_missing(function()
          for _, dtype in ipairs(floats and (case.dtypes or { "f64", "f32", "f16", "bf16" }) or { "f64" }) do
            compare(case, dtype, inputs_of.contiguous)
          end
          if case.strided ~= false then
            compare(case, "f64", inputs_of.strided)
            compare(case, "f32", inputs_of.strided)
          end
        end)
      end)
    end

    it("have an honest list of what is missing", function()
      for name in pairs(MISSING) do
        assert.are.equal(0, lib.C.lac_backend_has(lib.C.LAC_CUDA, name), name .. " exists now: strike it off")
      end
    end)
  end)

  describe("memory", function()
    it("crosses between host and device in every dtype and layout", function()
      for _, dtype in ipairs { "f64", "f32", "f16", "bf16", "i64", "i32", "u8", "bool" } do
        local host = lac.randint { 3, 5, 4, high = 2 }:to { dtype = dtype }
        local there = host:to { device = "cuda" }
        assert.is_true(lac.equal(host, there:to { device = "cpu" }))
        local turned = there:transpose(1, 3)[{ { -1, 1, -2 }, {}, { 1, 2 } }]
        assert.is_true(lac.equal(host:transpose(1, 3)[{ { -1, 1, -2 }, {}, { 1, 2 } }]:contiguous(),
                                 turned:to { device = "cpu" }))
        assert.is_true(lac.equal(host:to { dtype = "f32" }, there:to { device = "cpu", dtype = "f32" }))
      end
    end)

    it("is counted, cached, limited and given back", function()
      collectgarbage()
      collectgarbage()
      local before = lac.memory("cuda").live
      local t = lac.zeros { 1000, 1000, device = "cuda" }
      assert.is_true(lac.memory("cuda").live >= before + 4e6)
      t:release()
      assert.are.equal(before, lac.memory("cuda").live)
      assert.has_error(function() return t + 1 end)
      assert.is_true(lac.memory("cuda").cached >= 4e6)
      lac.trim()
      assert.are.equal(0, lac.memory("cuda").cached)
      local ok, message = pcall(lac.empty, { 2 ^ 40, device = "cuda" })
      assert.is_false(ok)
      assert.matches("out of memory on cuda", message)
      assert.are.equal(before, lac.memory("cuda").live)
    end)
  end)

  it("reports an index outside its axis with the operator's name", function()
    local x = lac.randn { 4, 3, device = "cuda" }
    local bad = lac.tensor({ 0, 7, 1 }, { dtype = "i64", device = "cuda" })
    local ok, message = pcall(function()
      x:index_select(1, bad)
      lac.synchronize()
    end)
    assert.is_false(ok)
    assert.matches("index_select: index number 2 is 7 %(counted from 0%), outside 0..3", message)
    lac.synchronize() -- the note is cleared
    assert.are.equal(12, (x * 0 + 1):sum():item())
  end)

  it("does so whatever reads the index, and the device goes on", function()
    local x = lac.randn { 4, 3, device = "cuda", grad = true }
    local function index(t) return lac.tensor(t, { dtype = "i64", device = "cuda" }) end
    local rows, two = lac.ones { 2, 3, device = "cuda" }, index { { 0, 1, 2 }, { 3, -1, 0 } }
    local operators = {
      { "gather: index number 5 is %-1", "0..3", function() return x:gather(1, two) end },
      { "scatter: index number 5 is %-1", "0..3", function() return x:scatter(1, two, rows) end },
      { "scatter: index number 5 is %-1", "0..3", function() return x:scatter_add(1, two, rows) end },
      { "index_add: index number 2 is 9", "0..3",
        function() return x:index_add(1, index { 0, 9 }, rows) end },
      { "index_copy: index number 1 is 4", "0..3",
        function() return x:index_copy(1, index { 4, 1 }, rows) end },
      { "index_select: index number 3 is 5", "0..3",
        function() return lac.nn.Embedding(4, 3, { device = "cuda" })(index { { 1, 2 }, { 5, 0 } }) end },
      { "cross_entropy: target number 3 is 3", "0..2",
        function() return lac.cross_entropy(x, index { 0, 1, 3, 2 }) end },
    }
    for _, operator in ipairs(operators) do
      local ok, message = pcall(function()
        operator[3]()
        lac.synchronize()
      end)
      assert.is_false(ok, operator[1])
      assert.matches(operator[1] .. " %(counted from 0%), outside " .. operator[2], message)
      lac.synchronize()
      assert.are.equal(12, (x:detach() * 0 + 1):sum():item())
    end
  end)

  it("reports it also when guards, which are on here, are set and looked at meanwhile", function()
    local x = lac.randn { 4, 3, device = "cuda" }
    local bad = lac.tensor({ 0, 7, 1 }, { dtype = "i64", device = "cuda" })
    local ok, message = pcall(function()
      local y = x:index_select(1, bad)
      for _ = 1, 10 do
        lac.scope(function() lac.empty(y:size(), { device = "cuda" }) end)
      end
      lac.synchronize()
    end)
    assert.is_false(ok)
    assert.matches("index_select: index number 2 is 7", message)
  end)

  it("refuses tensors of two devices in one operator", function()
    local ok, message = pcall(function() return lac.zeros { 2, device = "cuda" } + lac.zeros { 2 } end)
    assert.is_false(ok)
    assert.matches("x is on cuda:0 but y is on cpu; x:to%(\"cuda\"%) and x:to%(\"cpu\"%) move %[", message)
  end)

  it("draws the CPU's random bits", function()
    local function both(make, options)
      lac.manual_seed(3)
      local a = make(options)
      lac.manual_seed(3)
      options.device = "cuda"
      assert.is_true(lac.equal(a, make(options):to { device = "cpu" }))
    end
    both(lac.rand, { 3, 1001 })
    both(lac.rand, { 3, 1001, dtype = "bf16" })
    both(lac.bernoulli, { 3, 1001, p = 0.3 })
    both(lac.randint, { 3, 1001, low = -5, high = 1000 })
    lac.manual_seed(4)
    local x = lac.ones { 77, 13 }
    local a = lac.dropout(x, 0.4)
    lac.manual_seed(4)
    assert.is_true(lac.equal(a, lac.dropout(x:to { device = "cuda" }, 0.4):to { device = "cpu" }))
  end)

  it("multiplies f32 exactly, or with 11 bits where use_tf32 allows it", function()
    local a, b = lac.randn { 256, 512, device = "cuda" }, lac.randn { 512, 128, device = "cuda" }
    local exact = a:to { dtype = "f64" }:matmul(b:to { dtype = "f64" })
    local function off() return (a:matmul(b):to { dtype = "f64" } - exact):abs():max():item() end
    assert.is_true(off() < 5e-4)
    lac.use_tf32(true)
    local rounded = off()
    lac.use_tf32(false)
    assert.is_true(rounded > 2e-3 and rounded < 0.2, rounded)
    assert.is_true(off() < 5e-4)
  end)

  it("gives the same bits twice for large reductions, products and scattered sums", function()
    local x = lac.randn { 777, 1031, device = "cuda" }
    local idx = lac.randint { 2000, high = 50, device = "cuda" }
    local w = lac.randn { 50, 65, device = "cuda", grad = true }
    local function once()
      w.grad = nil
      w:index_select(1, idx):square():sum():backward()
      return { x:sum(), x:sum(1), x:sum(2), x:max(1), x:matmul(x:t()), w.grad:clone() }
    end
    local first, second = once(), once()
    for i = 1, #first do assert.is_true(lac.equal(first[i], second[i]), tostring(i)) end
  end)

  -- Sums of runs wait for some numbers at a time: runs around that count, and long ones.
  it("adds up what shares a destination, however many they are, in their order", function()
    local places = {}
    for place, count in ipairs { 1, 2, 15, 16, 17, 31, 32, 33, 300, 0, 5000 } do
      for _ = 1, count do places[#places + 1] = place - 1 end
    end
    lac.manual_seed(41)
    local n = #places
    local order = lac.rand { n }:argsort()
    local idx = lac.tensor(places, { dtype = "i64" }):index_select(1, order)
    local function there(f, x)
      return f(x:to { device = "cuda" }, idx:to { device = "cuda" }):to { device = "cpu" }
    end
    local function zeros(x) return x:narrow(1, 1, 11) * 0 end
    local function wide(i) return i:unsqueeze(2):expand(n, 3) end
    local function gradient(x, f)
      local w = zeros(x):requires_grad_(true)
      return lac.grad({ f(w) }, { w }, { grad_outputs = { x } })[1]
    end
    local sums = {
      index_add = function(x, i) return zeros(x):index_add(1, i, x) end,
      scatter_add = function(x, i) return zeros(x):scatter_add(1, wide(i), x) end,
      index_select = function(x, i) return gradient(x, function(w) return w:index_select(1, i) end) end,
      gather = function(x, i) return gradient(x, function(w) return w:gather(1, wide(i)) end) end,
    }
    local x = lac.randn({ n, 3 }, { dtype = "f64" })
    for name, f in pairs(sums) do
      for dtype, most in pairs { f64 = 1e-13, f32 = 2 ^ -24, bf16 = 2 ^ -8, f16 = 2 ^ -11 } do
        local rounded = x:to { dtype = dtype }
        local exact = f(rounded:double(), idx)
        local off = ((there(f, rounded):double() - exact):abs() - exact:abs() * most):max():item()
        assert.is_true(off <= 1e-12, name .. " in " .. dtype)
      end
    end
    local whole = lac.randint({ n, 3 }, { low = -2 ^ 40, high = 2 ^ 40, dtype = "i64" })
    for _, name in ipairs { "index_add", "scatter_add" } do
      assert.is_true(lac.equal(sums[name](whole, idx), there(sums[name], whole)), name)
    end
  end)

  it("trains a small network as the CPU does", function()
    local function losses(device)
      lac.manual_seed(5)
      local x, y = lac.randn { 64, 8 }, lac.randn { 64, 4 }
      local w1, w2 = lac.randn { 8, 32 } * 0.3, lac.randn { 32, 4 } * 0.2
      local put = { device = device }
      x, y, w1, w2 = x:to(put), y:to(put), w1:to(put), w2:to(put)
      w1:requires_grad_(true)
      w2:requires_grad_(true)
      local optimizer = lac.optim.adamw({ w1, w2 }, { lr = 1e-2 })
      local list = {}
      for step = 1, 50 do
        local d = x:matmul(w1):gelu():matmul(w2) - y
        local loss = (d * d):mean()
        loss:backward()
        optimizer:step { clip = 1 }
        optimizer:zero_grad()
        list[step] = loss:item()
      end
      return list
    end
    local cpu, cuda = losses "cpu", losses "cuda"
    for i = 1, #cpu do assert.is_true(math.abs(cpu[i] - cuda[i]) <= 1e-5 * math.abs(cpu[i])) end
    assert.is_true(cuda[50] < 0.8 * cuda[1])
  end)

  it("wrote over no guard bytes", function()
    collectgarbage()
    collectgarbage()
    lac.trim()
    assert.are.equal(errors_before, lib.C.lac_memory_guard_errors())
  end)
end)
