--- lac.gradcheck: gradients against central differences, in doubles.
--
-- The check contracts every output with a random cotangent, so one backward gives a gradient per input, and
-- compares each element with (f(x + h) - f(x - h)) / 2h. h is the cube root of the double epsilon, scaled by
-- |x|, where the errors of truncation and rounding are equal; what is left is about 1e-10 of the sizes
-- involved, so the default tolerances are far above noise and far below a wrong rule. The random stream is
-- put back before every evaluation, so dropout is checked with one fixed mask. The backward runs twice and
-- must give the same bits: an operator whose result depends on threads fails here.
--
-- Only f64 inputs are taken: in f32 the differences drown, and a loose tolerance would check nothing. They
-- may lie on any device: single elements are changed by filling a view of one.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local grad = require "lacuna.grad"

local C = lib.C
local fail, show = schema.fail, schema.show
local OP = "gradcheck"

local OPTIONS = {
  rtol = { type = "number", above = 0, default = 1e-5 },
  atol = { type = "number", min = 0, default = 1e-7 },
  step = { type = "number", above = 0, default = 6e-6 },
  seed = { type = "integer", min = 0, default = 1 },
  name = { type = "string", default = "function" },
}

local Report = {}
Report.__index = Report

function Report:__tostring()
  if self.ok then
    return ("gradcheck of %s: ok, %d elements, worst error %.3g of the tolerance")
      :format(self.name, self.checked, self.worst)
  end
  if self.message then return ("gradcheck of %s: FAILED: %s"):format(self.name, self.message) end
  return ("gradcheck of %s: FAILED in input %d, element %d: backward %.10g, differences %.10g")
    :format(self.name, self.input, self.element, self.analytic, self.numeric)
end

local function evaluate(f, inputs, n)
  local outputs = { f(unpack(inputs, 1, n)) }
  local list = {}
  for i = 1, #outputs do
    if tensor.is(outputs[i]) and outputs[i].c.dtype <= C.LAC_BF16 then list[#list + 1] = outputs[i] end
  end
  if #list == 0 then
    fail(OP, "the function must return a floating-point tensor, got %s", show(outputs[1]))
  end
  return list
end

-- sum over outputs of <cotangent, output>, as a number
local function contract(outputs, cotangents)
  local total, size = 0, 0
  for i = 1, #outputs do
    local x, g = tensor.flat_list(outputs[i]), cotangents[i]
    for k = 1, #x do
      local term = g[k] ~= 0 and x[k] * g[k] or 0
      total, size = total + term, size + math.abs(term)
    end
  end
  return total, size
end

local function gradients(f, inputs, n, wanted, cotangent_tensors, seed, offset)
  create.set_rng_state(seed, offset)
  local outputs = evaluate(f, inputs, n)
  local roots, seeds = {}, {}
  for i = 1, #outputs do
    if outputs[i].requires_grad then
      roots[#roots + 1] = outputs[i]
      seeds[#seeds + 1] = cotangent_tensors[i]
    end
  end
  if #roots == 0 then return nil end
  return grad.grad(roots, wanted, { grad_outputs = seeds, allow_unused = true })
end

-- element offsets of a view in row-major order
local function offsets(t)
  local list = { 0 }
  for i = 0, t.c.ndim - 1 do
    local longer = {}
    for _, base in ipairs(list) do
      for k = 0, tonumber(t.c.shape[i]) - 1 do longer[#longer + 1] = base + k * tonumber(t.c.stride[i]) end
    end
    list = longer
  end
  return list
end

-- a function that writes the element at an offset of x
local function writer(x)
  if x.c.device == C.LAC_CPU then
    local p = tensor.pointer(x)
    return function(at, value) p[at] = value end
  end
  local cell = tensor.ctype(x.c)
  cell.ndim = 0
  return function(at, value)
    cell.offset = x.c.offset + at
    lib.check(C.lac_fill(cell, value))
  end
end

local function compare(report, index, x, analytic, measure, o)
  local list, values, put = offsets(x), tensor.flat_list(x), writer(x)
  local a = analytic and tensor.flat_list(analytic) or {}
  for e, at in ipairs(list) do
    local value = values[e]
    local h = o.step * math.max(1, math.abs(value))
    put(at, value + h)
    local up, size = measure()
    put(at, value - h)
    local down = measure()
    put(at, value)
    local numeric = (up - down) / ((value + h) - (value - h))
    local got = a[e] or 0
    -- rounding of the sums themselves, beside the given tolerances
    local allowed = o.atol + o.rtol * math.max(math.abs(numeric), math.abs(got)) + 1e-15 * size / h
    local ratio = math.abs(numeric - got) / allowed
    report.checked = report.checked + 1
    if ratio ~= ratio or ratio > report.worst then
      report.worst = ratio
      report.input, report.element, report.analytic, report.numeric = index, e, got, numeric
      if ratio ~= ratio or ratio > 1 then
        report.ok = false
        if ratio ~= ratio then return end
      end
    end
  end
end

local function check(f, inputs, o, report)
  local n, wanted, position = #inputs, {}, {}
  for i = 1, n do
    local x = inputs[i]
    if tensor.is(x) and x.requires_grad then
      if x.c.dtype ~= C.LAC_F64 then
        fail(OP, "inputs that require a gradient must be f64, input %d is %s", i, show(x))
      end
      wanted[#wanted + 1], position[#wanted + 1] = x, i
    end
  end
  if #wanted == 0 then
    fail(OP, "no input requires a gradient; make one with grad = true and dtype = 'f64'")
  end
  local seed, offset = o.seed, 0
  create.set_rng_state(seed, offset)
  local probe = evaluate(f, inputs, n)
  create.set_rng_state(o.seed, 2 ^ 32)
  local cotangents, lists = {}, {}
  for i = 1, #probe do
    local c = create.randn_like(probe[i])
    cotangents[i], lists[i] = c, tensor.flat_list(c)
  end
  local first = gradients(f, inputs, n, wanted, cotangents, seed, offset)
  if not first then
    report.ok, report.message = false, "no result requires a gradient, although an input does"
    return
  end
  local second = gradients(f, inputs, n, wanted, cotangents, seed, offset)
  for i = 1, #wanted do
    if first[i] and first[i]:string() ~= second[i]:string() then
      report.ok = false
      report.message = ("two backwards differ for input %d: not deterministic"):format(position[i])
      return
    end
  end
  local function measure()
    create.set_rng_state(seed, offset)
    return contract(evaluate(f, inputs, n), lists)
  end
  grad.no_grad(function()
    for i = 1, #wanted do
      compare(report, position[i], wanted[i], first[i], measure, o)
      if report.message then return end
    end
  end)
end

--- Check the gradients of f at the given inputs.
-- @tparam function f takes the inputs, returns one or more tensors (others are ignored)
-- @tparam table inputs list; f64 tensors with grad = true are checked, everything else is passed on
-- @tparam[opt] table options rtol 1e-5, atol 1e-7, step 6e-6, seed 1, name
-- @treturn boolean ok
-- @treturn table report {ok, checked, worst, input, element, analytic, numeric, message}; tostring
--   gives a sentence
local function gradcheck(f, inputs, options)
  if type(f) ~= "function" and not (type(f) == "table" and getmetatable(f) and getmetatable(f).__call) then
    fail(OP, "expected a function, got %s", show(f))
  end
  if tensor.is(inputs) then inputs = { inputs } end
  if type(inputs) ~= "table" then fail(OP, "inputs must be a list of tensors, got %s", show(inputs)) end
  local o = schema.options(OP, options, OPTIONS)
  local report = setmetatable({ ok = true, checked = 0, worst = 0, name = o.name }, Report)
  local seed, offset = create.rng_state()
  local ok, message = pcall(check, f, inputs, o, report)
  create.set_rng_state(seed, offset)
  if not ok then error(message, 0) end
  return report.ok, report
end

return gradcheck
