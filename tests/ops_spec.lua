--- Every operator against its case: values in four dtypes, layouts, gradients, bad inputs, guard bytes.
--
-- The tests are generated from tests/support/cases.lua; this file knows no operator. For each case: the
-- result in f64, f32, f16 and bf16 obeys the tolerance rule against the plain Lua reference, over as many
-- draws of the inputs as give 48 values; transposed, stepped, reversed and expanded inputs give the same; f64
-- gradients pass gradcheck (which runs every backward twice), contiguous and strided; those in narrower
-- dtypes, of strided cotangents too, obey the same rule against the ones in doubles; bad inputs raise the
-- promised sentence, and every operator has some. The pool puts guard bytes round every block meanwhile and
-- none may be touched.

local lac = require "lacuna"
local lib = require "lacuna.lib"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops"
local cases = require "support.cases"

local inputs_of = require "support.inputs"
local is_float, array_for, dtype_of = inputs_of.is_float, inputs_of.array_for, inputs_of.dtype_of
local contiguous, strided = inputs_of.contiguous, inputs_of.strided

local function run(case, tensors)
  if case.fixed_seed then lac.manual_seed(7) end
  return case.call(lac, unpack(tensors))
end

-- What the operator and its reference make of inputs drawn anew: got, exact, and the naive program's result.
local function draw(case, dtype, layout)
  local arrays, tensors = {}, {}
  for i, spec in ipairs(case.inputs) do
    arrays[i] = array_for(spec, dtype)
    tensors[i] = layout(arrays[i], dtype_of(spec, dtype))
  end
  local out = run(case, tensors)
  local got = out:to { dtype = (out:dtype() == "f16" or out:dtype() == "bf16") and "f64" or out:dtype() }
  got = tensor.flat_list(got)
  if case.check then
    assert.is_nil(case.check(arrays[1], got, dtype))
    return got
  end
  local exact = case.ref(function(v) return v end, unpack(arrays))
  assert.are.same(exact.shape, { unpack(out:size()) })
  -- in f64 the reference is a naive program itself; its error is that of the f32 one, 29 bits smaller
  local rounded = dtype == "f64" and "f32" or dtype
  local naive = case.ref(function(v) return cases.round(rounded, v) end, unpack(arrays))
  return got, exact.data, naive.data
end

local NARROW = { "f32", "f16", "bf16" }
local ENOUGH, MOST_DRAWS = 48, 16 -- values by which an operator is judged

local function check_values(case, dtype, layout)
  inputs_of.seed(case.name .. (case.label or "") .. dtype)
  local all = { {}, {}, {} }
  for _ = 1, MOST_DRAWS do
    for k, list in ipairs{ draw(case, dtype, layout) } do
      for _, value in ipairs(list) do table.insert(all[k], value) end
    end
    if #all[1] >= ENOUGH then break end
  end
  if case.check then return end
  assert.is_nil(cases.compare(dtype, all[1], all[2], all[3], dtype == "f64" and 2 ^ -29 or 1))
end

local function wants_gradient(case, i)
  for _, one in ipairs(case.grad_inputs or { i }) do
    if one == i then return true end
  end
  return false
end

local function check_gradients(case, layout)
  local inputs = {}
  for i, spec in ipairs(case.inputs) do
    local t = layout(array_for(spec, "f64"), dtype_of(spec, "f64"))
    if is_float(spec) and wants_gradient(case, i) then t = t:detach():requires_grad_(true) end
    inputs[i] = t
  end
  local ok, report = lac.gradcheck(function(...) return run(case, { ... }) end, inputs,
                                   { name = case.name, rtol = case.rtol })
  assert.is_true(ok, tostring(report))
end

-- An array with every number of a floating-point dtype moved by half a unit in its last place, up or down.
local function rounded_once(array, dtype)
  local moved = { shape = array.shape, data = {} }
  for i, v in ipairs(array.data) do
    local _, exponent = math.frexp(v)
    moved.data[i] = v + (inputs_of.uniform() < 0.5 and -0.25 or 0.25) * cases.epsilon(dtype) * 2 ^ exponent
  end
  return moved
end

-- Gradients of a case towards a cotangent, a plain array, as lists of numbers; the result's dtype is its own.
local function gradients(case, arrays, dtype, cotangent, layout)
  local given, wanted, lists = {}, {}, {}
  for i, spec in ipairs(case.inputs) do
    given[i] = layout(arrays[i], dtype_of(spec, dtype))
    if is_float(spec) and wants_gradient(case, i) then
      given[i] = given[i]:detach():requires_grad_(true)
      wanted[#wanted + 1] = given[i]
    end
  end
  local out = run(case, given)
  out:backward(layout(cotangent(out), out:dtype(), out:device()))
  for i, x in ipairs(wanted) do
    lists[i] = tensor.flat_list((x.grad or x:detach() * 0):to { dtype = "f64" })
  end
  return lists
end

-- Gradients in dtypes that differences cannot check. Exact are those in doubles, which gradcheck has checked,
-- of the same numbers; the naive program is the one whose inputs and cotangent were rounded once more.
local function check_narrow_gradients(case, dtype, layout)
  inputs_of.seed(case.name .. (case.label or "") .. dtype .. "gradient")
  local all = {}
  for _ = 1, MOST_DRAWS do
    local arrays, moved, weights = {}, {}, nil
    for i, spec in ipairs(case.inputs) do
      arrays[i] = array_for(spec, dtype)
      moved[i] = is_float(spec) and rounded_once(arrays[i], dtype) or arrays[i]
    end
    local function cotangent(out)
      weights = weights or array_for({ unpack(out:size()) }, dtype)
      return weights
    end
    local got = gradients(case, arrays, dtype, cotangent, layout)
    local exact = gradients(case, arrays, "f64", cotangent, contiguous)
    local naive = gradients(case, moved, "f64", function() return rounded_once(weights, dtype) end,
                            contiguous)
    for k, list in ipairs(got) do
      all[k] = all[k] or { {}, {}, {} }
      for which, lists in ipairs { { list }, { exact[k] }, { naive[k] } } do
        for _, v in ipairs(lists[1]) do table.insert(all[k][which], v) end
      end
    end
    if #all[1][1] >= ENOUGH then break end
  end
  for k, lists in ipairs(all) do
    local message = cases.compare(dtype, lists[1], lists[2], lists[3])
    if message then error(("gradient %d: %s"):format(k, message), 0) end
  end
end

describe("operators", function()
  local errors_before
  setup(function()
    lib.C.lac_memory_guard(1)
    errors_before = lib.C.lac_memory_guard_errors() -- another spec breaks a block on purpose
  end)

  for _, case in ipairs(cases.list) do
    describe(case.name .. (case.label and " (" .. case.label .. ")" or ""), function()
      local floats = false
      for _, spec in ipairs(case.inputs) do floats = floats or is_float(spec) end

      it("has the reference's values in every dtype", function()
        for _, dtype in ipairs(floats and (case.dtypes or { "f64", "f32", "f16", "bf16" }) or { "f64" }) do
          local ok, message = pcall(check_values, case, dtype, contiguous)
          if not ok then
            error(dtype .. ": " .. tostring(type(message) == "table" and message.message or message), 0)
          end
        end
      end)

      if case.strided ~= false then
        it("takes strided inputs", function()
          check_values(case, "f64", strided)
          check_values(case, "f32", strided)
        end)
      end

      if case.grad then
        it("has the right gradient", function()
          check_gradients(case, contiguous)
          if case.strided ~= false then check_gradients(case, strided) end
        end)
      end

      if case.grad then
        it("has the right gradient in narrower dtypes", function()
          for _, dtype in ipairs(case.dtypes or case.rough and { case.rough } or NARROW) do
            if dtype ~= "f64" then
              for _, layout in ipairs { contiguous, case.strided ~= false and strided or nil } do
                local ok, message = pcall(check_narrow_gradients, case, dtype, layout)
                if not ok then error(dtype .. ": " .. tostring(message), 0) end
              end
            end
          end
        end)
      end

      if case.bad then
        it("refuses bad inputs", function()
          local tensors = {}
          for i, spec in ipairs(case.inputs) do
            tensors[i] = contiguous(array_for(spec, "f32"), dtype_of(spec, "f32"))
          end
          for _, bad in ipairs(case.bad) do
            local ok, message = pcall(function()
              bad[1](lac, unpack(tensors))
              lac.synchronize() -- a device finds a bad index only when it gets there
            end)
            assert.is_false(ok)
            assert.matches(bad[2], message)
            assert.matches("%[tests/[%w_/]+%.lua:%d+%]$", message) -- the user's line, not the library's
          end
        end)
      end
    end)
  end

  -- The case runs with its operator replaced by the form in place, on a view whose memory has gaps.
  it("give the same numbers in place", function()
    local covered, plain = {}, {}
    local function bits(t) return t:contiguous():string() end
    local function in_place(name)
      return function(x, ...)
        if not tensor.is(x) or x.requires_grad then return plain[name](x, ...) end
        covered[name] = true
        local around = lac.stack({ x, x }, x:dim() + 1)
        local y = around:select(x:dim() + 1, 2)
        local out = lac.no_grad(function(...) return y[name .. "_"](y, ...) end, ...)
        assert.are.equal(y, out)
        assert.are.equal(bits(x), bits(around:select(x:dim() + 1, 1))) -- the gaps are as they were
        return y
      end
    end
    local function run_in_place(case)
      local name, inputs = case.name, {}
      for i, spec in ipairs(case.inputs) do
        inputs[i] = strided(array_for(spec, "f32"), dtype_of(spec, "f32"))
      end
      local wanted = run(case, inputs)
      if not tensor.same_shape(wanted, inputs[1]) or wanted:dtype() ~= inputs[1]:dtype() then return end
      plain[name] = tensor.methods[name]
      tensor.methods[name] = in_place(name)
      local shim = setmetatable({ [name] = tensor.methods[name] }, { __index = lac })
      local ok, got = pcall(case.call, shim, unpack(inputs))
      tensor.methods[name] = plain[name]
      assert(ok, got)
      assert.are.equal(bits(wanted), bits(got), name)
    end
    for _, case in ipairs(cases.list) do
      if tensor.methods[case.name .. "_"] then run_in_place(case) end
    end
    local missing = {}
    for name in pairs(ops.table) do
      if tensor.methods[name .. "_"] and not covered[name] then missing[#missing + 1] = name end
    end
    assert.are.same({}, missing)
  end)

  it("all have a case", function()
    local covered = {}
    for _, case in ipairs(cases.list) do covered[case.name] = true end
    local missing = {}
    for name, record in pairs(ops.table) do
      if not covered[name] and not record.internal then missing[#missing + 1] = name end
    end
    assert.are.same({}, missing)
  end)

  it("all have an input that they refuse", function()
    local refusing, missing = {}, {}
    for _, case in ipairs(cases.list) do
      refusing[case.name] = refusing[case.name] or (case.bad and #case.bad > 0)
    end
    for name, record in pairs(ops.table) do
      if not refusing[name] and not record.internal then missing[#missing + 1] = name end
    end
    assert.are.same({}, missing)
  end)

  it("that are differentiable have their gradient checked", function()
    local checked = {}
    for _, case in ipairs(cases.list) do checked[case.name] = checked[case.name] or case.grad end
    local missing = {}
    for name, record in pairs(ops.table) do
      if record.backward and not record.internal and not checked[name] then missing[#missing + 1] = name end
    end
    assert.are.same({}, missing)
  end)

  it("wrote over no guard bytes", function()
    collectgarbage()
    collectgarbage()
    lac.trim()
    assert.are.equal(errors_before, lib.C.lac_memory_guard_errors())
    lib.C.lac_memory_guard(0)
  end)
end)
