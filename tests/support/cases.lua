--- One case per operator: inputs, reference, bad inputs. tests/ops_spec.lua makes every test out of them.
--
-- A case is { name, inputs = { spec, ... }, ref = function(R, x, y, ...) -> array, call = function(lac, x,
-- y, ...) }. An input spec is a shape with fields: kind "normal" (default), "positive", "away" (from 0),
-- "fraction" (between 0 and 1), "above" (1), "bool", "index" (0-based below `high`). References are plain
-- Lua on plain arrays { shape =, data = } in doubles and share nothing with the engine. R rounds to the
-- dtype under test: with R = identity the reference is exact; with rounding after every step it is "the
-- naive program in that dtype".
--
-- The tolerance rule of the whole suite is here too (cases.compare): over a tensor, the largest error against
-- the exact reference may be twice the largest error of the naive program in the same dtype, plus two units
-- in the last place of the largest value. No other number is allowed to decide a test. Where a result has few
-- elements, "over a tensor" is over several draws of the inputs: a naive program's single sum can be right
-- by luck. An operator without a case fails the suite.
--
-- `bad` is a list of { function(lac, x, y, ...), pattern }: the call must raise a string that matches (more
-- of them are in cases_bad.lua). check replaces ref where a reference cannot be written without repeating the
-- engine (dropout). derivative = function(R, x) -> array is the naive program of the derivative of a function
-- of one element, for those whose narrow types the engine computes in doubles: there its own results do not
-- show what such a program is off by. rough = the coarsest dtype in which the gradient is checked, where
-- rounding makes ties that move it.

local special = require "support.special"

local cases = {}
local list = {}
cases.list = list

-- ---- rounding ----------------------------------------------------------------------------------

local FORMAT = { f64 = { 53, -1074 }, f32 = { 24, -149 }, f16 = { 11, -24, 65504 }, bf16 = { 8, -133 } }

--- x rounded to the nearest number of a floating-point dtype, ties to even.
function cases.round(dtype, x)
  local f = FORMAT[dtype]
  if not f or dtype == "f64" or x ~= x or x == 0 or math.abs(x) == math.huge then return x end
  local _, exponent = math.frexp(x)
  local unit = 2 ^ math.max(exponent - f[1], f[2])
  local y = special.half_even(x / unit) * unit
  if f[3] and math.abs(y) > f[3] then return y > 0 and math.huge or -math.huge end
  return y
end

--- One unit in the last place at 1.
function cases.epsilon(dtype) return 2 ^ (1 - FORMAT[dtype][1]) end

--- The tolerance rule. Gives nil, or a sentence about the worst element. shrink: a factor of the naive
-- program's errors, where it ran in a coarser dtype than `dtype` (1).
function cases.compare(dtype, got, exact, naive, shrink)
  local worst, at, naive_worst, largest = 0, nil, 0, 0
  if #got ~= #exact then return ("%d elements instead of %d"):format(#got, #exact) end
  for i = 1, #exact do
    local e, g, n = exact[i], got[i], naive[i]
    if type(g) == "boolean" then g = g and 1 or 0 end
    if e ~= e or math.abs(e) == math.huge then
      if not (g == e or (g ~= g and e ~= e)) then
        return ("element %d is %s instead of %s"):format(i, g, e)
      end
    else
      local error = math.abs(g - e)
      if error ~= error then return ("element %d is nan instead of %.17g"):format(i, e) end
      if error > worst then worst, at = error, i end
      local loss = math.abs(n - e) * (shrink or 1)
      if loss ~= loss then return ("the naive program's element %d is nan, not %.17g"):format(i, e) end
      naive_worst = math.max(naive_worst, loss)
      largest = math.max(largest, math.abs(e))
    end
  end
  if worst > 2 * naive_worst + 2 * cases.epsilon(dtype) * largest then
    return ("element %d is %.17g instead of %.17g; the error is %.3g, the naive program's %.3g")
      :format(at, got[at], exact[at], worst, naive_worst)
  end
end

-- ---- plain arrays ------------------------------------------------------------------------------

local function count(shape)
  local n = 1
  for i = 1, #shape do n = n * shape[i] end
  return n
end

--- An array of a shape from a function of the 1-based index list.
local function build(shape, f)
  local array, index = { shape = shape, data = {} }, {}
  for i = 1, #shape do index[i] = 1 end
  for k = 1, count(shape) do
    array.data[k] = f(index)
    for d = #shape, 1, -1 do
      index[d] = index[d] + 1
      if index[d] <= shape[d] then break end
      index[d] = 1
    end
  end
  return array
end

--- Element of x at an index list that may be longer (broadcasting, aligned at the end).
local function at(x, index)
  local offset, lead = 0, #index - #x.shape
  for d = 1, #x.shape do
    local i = x.shape[d] == 1 and 1 or index[d + lead]
    offset = offset * x.shape[d] + i - 1
  end
  return x.data[offset + 1]
end

local function broadcast(...)
  local shape = {}
  for _, x in ipairs { ... } do
    for d = 1, #x.shape do
      local from_end = #x.shape - d
      shape[from_end] = math.max(shape[from_end] or 1, x.shape[d])
    end
  end
  local n, result = 0, {}
  while shape[n] do n = n + 1 end
  for d = 1, n do result[d] = shape[n - d] end
  return result
end

local function with(index, d, value)
  local copy = {}
  for i = 1, #index do copy[i] = index[i] end
  copy[d] = value
  return copy
end

local function without(index, d)
  local copy = {}
  for i = 1, #index do
    if i ~= d then copy[#copy + 1] = index[i] end
  end
  return copy
end

local function insert(index, d, value)
  local copy = {}
  for i = 1, #index do copy[i] = index[i] end
  table.insert(copy, d, value)
  return copy
end

cases.build, cases.at, cases.count = build, at, count

-- pairs in the order of the keys: the list of cases is the same in every process, and so is what a test draws
-- for one after the other
local function ordered(t)
  local keys = {}
  for key in pairs(t) do keys[#keys + 1] = key end
  table.sort(keys, function(a, b)
    if type(a) ~= type(b) then return type(a) < type(b) end
    return a < b
  end)
  local i = 0
  return function()
    i = i + 1
    return keys[i], t[keys[i]]
  end
end

-- ---- shapes of cases ----------------------------------------------------------------------------

local function case(c)
  c.inputs = c.inputs or { { 3, 4 } }
  if c.grad == nil then c.grad = true end
  c.call = c.call or function(lac, ...) return lac[c.name](...) end
  list[#list + 1] = c
  return c
end


local function map1(name, f, spec)
  spec = spec or {}
  case { name = name, inputs = { { 3, 4, kind = spec.kind } }, grad = spec.grad, result = spec.result,
         ref = function(R, x) return build(x.shape, function(i) return R(f(at(x, i))) end) end,
         bad = { { function(lac) return lac[name]("no") end, name .. ": x must be a tensor, got 'no'" } } }
end

local function sign(x) return x > 0 and 1 or x < 0 and -1 or 0 end
local function sigmoid(x) return 1 / (1 + math.exp(-x)) end

map1("neg", function(x) return -x end)
map1("abs", math.abs, { kind = "away" })
map1("sign", sign, { kind = "away" })
map1("square", function(x) return x * x end)
map1("relu", function(x) return x > 0 and x or 0 end, { kind = "away" })
map1("floor", math.floor)
map1("ceil", math.ceil)
map1("round", special.half_even)
map1("exp", math.exp)
map1("expm1", special.expm1)
map1("log", math.log, { kind = "positive" })
map1("log1p", special.log1p, { kind = "positive" })
map1("sqrt", math.sqrt, { kind = "positive" })
map1("rsqrt", function(x) return 1 / math.sqrt(x) end, { kind = "positive" })
map1("recip", function(x) return 1 / x end, { kind = "away" })
map1("sin", math.sin)
map1("cos", math.cos)
map1("tanh", math.tanh)
map1("sigmoid", sigmoid)
map1("silu", function(x) return x * sigmoid(x) end)
map1("gelu", function(x) return x * special.phi(x) end)
map1("gelu_tanh", function(x)
  return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ^ 3)))
end)
map1("softplus", function(x) return math.max(x, 0) + special.log1p(math.exp(-math.abs(x))) end)
map1("erf", special.erf)
map1("isnan", function(x) return x ~= x and 1 or 0 end, { grad = false })
map1("isfinite", function(x) return (x == x and math.abs(x) < math.huge) and 1 or 0 end, { grad = false })
case { name = "logical_not", inputs = { { 3, 4, kind = "bool" } }, grad = false,
       ref = function(_, x) return build(x.shape, function(i) return 1 - at(x, i) end) end }

local function map2(name, f, spec)
  spec = spec or {}
  local kinds = spec.kinds or {}
  local function ref(R, x, y)
    return build(broadcast(x, y), function(i) return R(f(at(x, i), at(y, i))) end)
  end
  local bad = {
    { function(lac, x) return lac[name](x, "no") end,
      name .. ": the second operand must be a tensor or a number" },
    { function(lac, x) return lac[name](x, lac.zeros { 7, dtype = x:dtype() }) end, "7" },
  }
  case { name = name, inputs = { { 3, 4, kind = kinds[1] }, { 3, 4, kind = kinds[2] } }, ref = ref,
         grad = spec.grad, bad = bad }
  case { name = name, label = "broadcast", ref = ref, grad = spec.grad,
         inputs = { { 2, 1, 4, kind = kinds[1] }, { 3, 1, kind = kinds[2] } } }
  if not spec.bool then
    local k = 1.5
    case { name = name, label = "number", inputs = { { 3, 4, kind = kinds[1] } }, grad = spec.grad,
           call = function(lac, x) return lac[name](x, k) end,
           ref = function(R, x) return build(x.shape, function(i) return R(f(at(x, i), k)) end) end }
    case { name = name, label = "number first", inputs = { { 3, 4, kind = kinds[2] } }, grad = spec.grad,
           call = function(lac, x) return lac[name](k, x) end,
           ref = function(R, x) return build(x.shape, function(i) return R(f(k, at(x, i))) end) end }
  end
end

map2("add", function(x, y) return x + y end)
map2("sub", function(x, y) return x - y end)
map2("mul", function(x, y) return x * y end)
map2("div", function(x, y) return x / y end, { kinds = { nil, "away" } })
map2("pow", function(x, y) return x ^ y end, { kinds = { "positive", "normal" } })
map2("maximum", math.max)
map2("minimum", math.min)
-- both sides positive and apart: mod jumps at multiples
map2("mod", function(x, y) return x - math.floor(x / y) * y end,
     { kinds = { "positive", "positive" }, grad = true })
local function compare_case(name, f)
  map2(name, function(x, y) return f(x, y) and 1 or 0 end, { grad = false })
end
compare_case("eq", function(x, y) return x == y end)
compare_case("ne", function(x, y) return x ~= y end)
compare_case("lt", function(x, y) return x < y end)
compare_case("le", function(x, y) return x <= y end)
compare_case("gt", function(x, y) return x > y end)
compare_case("ge", function(x, y) return x >= y end)
local BOTH = { kinds = { "bool", "bool" }, grad = false, bool = true }
map2("logical_and", function(x, y) return x * y end, BOTH)
map2("logical_or", function(x, y) return math.max(x, y) end, BOTH)
map2("logical_xor", function(x, y) return (x + y) % 2 end, BOTH)

-- ---- views ---------------------------------------------------------------------------------------

local function same(_, x) return x end
local function reshaped(shape)
  return function(_, x) return { shape = shape, data = x.data } end
end

case { name = "clone", ref = same }
case { name = "contiguous", ref = same }
case { name = "detach", ref = same, grad = false }
case { name = "to", ref = same,
       call = function(lac, x) return lac.to(x, { dtype = x:dtype(), device = "cpu" }) end,
       bad = { { function(_, x) return x:to { dtype = "f31" } end,
                 "unknown dtype 'f31', did you mean 'f32'" },
               { function(_, x) return x:to { dtpe = "f32" } end,
                 "unknown option 'dtpe', did you mean 'dtype'" } } }
case { name = "to", label = "cast and back", dtypes = { "f64", "f32" }, rtol = 1e-5,
       call = function(_, x) return x:to { dtype = "f64" }:to { dtype = x:dtype() } end, ref = same }
-- a cast to a float is checked in its own dtype, where nothing is rounded; gradients through casts: grad_spec
for name, dtype in ordered { float = "f32", double = "f64", half = "f16", bfloat16 = "bf16" } do
  case { name = name, dtypes = { dtype }, strided = false, grad = false, ref = same,
         call = function(_, x) return x:to(dtype == "f32" and "f64" or "f32")[name](x) end,
         bad = { { function(_, x) return x[name](3) end, name .. ": must be called on a tensor" } } }
end
local function towards_zero(v) return v < 0 and math.ceil(v) or math.floor(v) end
local CASTS = { int = towards_zero, long = towards_zero, byte = towards_zero,
                bool = function(v) return v ~= 0 and 1 or 0 end }
for name, f in ordered(CASTS) do
  case { name = name, grad = false, inputs = { { 3, 4, kind = name == "byte" and "positive" or nil } },
         call = function(_, x) return (x * 3)[name](x * 3) end,
         ref = function(R, x) return build(x.shape, function(i) return f(R(at(x, i) * 3)) end) end }
end
case { name = "view", ref = reshaped { 2, 6 }, strided = false,
       call = function(_, x) return x:view(2, -1) end,
       bad = { { function(_, x) return x:view(5, -1) end, "the size at %-1 cannot be found" },
               { function(_, x) return x:view(7) end, "shape %[7%] has 7 elements" },
               { function(_, x) return x:view(1.5) end, "size 1 must be an integer, got 1.5" },
               { function(_, x) return x:t():view(12) end, "use reshape" } } }
case { name = "reshape", ref = reshaped { 2, 6 }, call = function(_, x) return x:reshape { 2, 6 } end }
case { name = "flatten", inputs = { { 2, 3, 4 } }, ref = reshaped { 2, 12 },
       call = function(_, x) return x:flatten(2) end }
case { name = "squeeze", inputs = { { 3, 1, 2, 1 } }, ref = reshaped { 3, 2 },
       call = function(_, x) return x:squeeze() end }
case { name = "unsqueeze", ref = reshaped { 3, 1, 4 }, call = function(_, x) return x:unsqueeze(2) end,
       bad = { { function(_, x) return x:unsqueeze(5) end, "dim 5 is out of range" } } }
local function transposed(_, x)
  return build({ x.shape[2], x.shape[1] }, function(i) return at(x, { i[2], i[1] }) end)
end
case { name = "transpose", ref = transposed, call = function(_, x) return x:transpose(1, -1) end,
       bad = { { function(_, x) return x:transpose(1, 3) end, "dim 3 is out of range" } } }
case { name = "t", ref = transposed,
       bad = { { function(lac) return lac.zeros { 2 }:t() end, "needs 2 dimensions" } } }
case { name = "permute", inputs = { { 2, 3, 4 } }, call = function(_, x) return x:permute(3, 1, 2) end,
       ref = function(_, x) return build({ 4, 2, 3 }, function(i) return at(x, { i[2], i[3], i[1] }) end) end,
       bad = { { function(_, x) return x:permute(1, 1, 2) end, "appears twice" },
               { function(_, x) return x:permute(1, 2) end, "needs 3 dimensions" } } }
case { name = "expand", inputs = { { 3, 1 } }, call = function(_, x) return x:expand(2, -1, 4) end,
       ref = function(_, x) return build({ 2, 3, 4 }, function(i) return at(x, { i[2], 1 }) end) end,
       bad = { { function(_, x) return x:expand(2, 4) end, "dimension 1 has 3, not 1" } } }
case { name = "expand_as", inputs = { { 3, 1 }, { 3, 4 } }, grad_inputs = { 1 },
       ref = function(_, x) return build({ 3, 4 }, function(i) return at(x, i) end) end }
case { name = "slice", inputs = { { 3, 5 } }, call = function(_, x) return x[{ { 2, 3 }, { -1, 1, -2 } }] end,
       ref = function(_, x)
         return build({ 2, 3 }, function(i) return at(x, { i[1] + 1, 7 - 2 * i[2] }) end)
       end,
       bad = { { function(_, x) return x[{ 4 }] end, "position 4 is out of range in dimension 1" },
               { function(_, x) return x[{ {}, {}, {} }] end, "3 slices for the 2 dimensions" } } }
case { name = "narrow", call = function(_, x) return x:narrow(2, 2, 2) end,
       ref = function(_, x) return build({ 3, 2 }, function(i) return at(x, { i[1], i[2] + 1 }) end) end,
       bad = { { function(_, x) return x:narrow(2, 4, 2) end, "start 4 and length 2 leave dimension 2" } } }
case { name = "select", call = function(_, x) return x:select(1, -1) end,
       ref = function(_, x) return build({ 4 }, function(i) return at(x, { 3, i[1] }) end) end }

-- ---- reductions ------------------------------------------------------------------------------------

-- f folds the list of values along dim d
local function fold(d, f)
  return function(R, x)
    return build(without(x.shape, d), function(i)
      local values = {}
      for k = 1, x.shape[d] do values[k] = at(x, insert(i, d, k)) end
      return f(R, values)
    end)
  end
end
local function total(R, v)
  local s = 0
  for k = 1, #v do s = R(s + v[k]) end
  return s
end
local function mean(R, v) return R(total(R, v) / #v) end

local function reduction(name, f, spec)
  spec = spec or {}
  case { name = name, inputs = { { 3, 4, kind = spec.kind } }, grad = spec.grad,
         call = function(lac, x) return lac[name](x, 2) end, ref = fold(2, f),
         bad = { { function(lac, x) return lac[name](x, 3) end, "dim 3 is out of range" },
                 { function(lac) return lac[name](nil) end, name .. ": x must be a tensor, got nil" } } }
  case { name = name, label = "all", inputs = { { 2, 3, kind = spec.kind } }, grad = spec.grad,
         call = function(lac, x) return lac[name](x) end,
         ref = function(R, x) return { shape = {}, data = { f(R, x.data) } } end }
end
local function largest(_, v) return math.max(unpack(v)) end
local function smallest(_, v) return math.min(unpack(v)) end
local function place(pick)
  return function(_, v)
    local best = pick(nil, v)
    for k = 1, #v do if v[k] == best then return k end end
  end
end
reduction("sum", total)
reduction("mean", mean)
reduction("max", largest)
reduction("min", smallest)
reduction("any", largest, { kind = "bool", grad = false })
reduction("all", smallest, { kind = "bool", grad = false })
reduction("argmax", place(largest), { grad = false })
reduction("argmin", place(smallest), { grad = false })
case { name = "sum", label = "several dims, kept", inputs = { { 2, 3, 4 } },
       call = function(_, x) return x:sum({ 1, 3 }, true) end,
       ref = function(R, x)
         return build({ 1, 3, 1 }, function(i)
           local s = 0
           for a = 1, 2 do for b = 1, 4 do s = R(s + at(x, { a, i[2], b })) end end
           return s
         end)
       end }

local function softmax_of(R, v)
  local top, e = math.max(unpack(v)), {}
  for k = 1, #v do e[k] = R(math.exp(R(v[k] - top))) end
  local s = total(R, e)
  for k = 1, #v do e[k] = R(e[k] / s) end
  return e, s, top
end
local function along(d, f) -- f gives a list for a list
  return function(R, x)
    return build(x.shape, function(i)
      local values = {}
      for k = 1, x.shape[d] do values[k] = at(x, with(i, d, k)) end
      return f(R, values)[i[d]]
    end)
  end
end
case { name = "softmax", call = function(_, x) return x:softmax(1) end, ref = along(1, softmax_of) }
case { name = "log_softmax", ref = along(2, function(R, v)
  local _, s, top = softmax_of(R, v)
  local out = {}
  for k = 1, #v do out[k] = R(R(v[k] - top) - R(math.log(s))) end
  return out
end) }
reduction("logsumexp", function(R, v)
  local _, s, top = softmax_of(R, v)
  return R(R(math.log(s)) + top)
end)
local function variance(R, v)
  local m, s = mean(R, v), 0
  for k = 1, #v do s = R(s + R(R(v[k] - m) ^ 2)) end
  return R(s / (#v - 1))
end
reduction("var", variance)
reduction("std", function(R, v) return R(math.sqrt(variance(R, v))) end)
case { name = "norm", inputs = { { 3, 4 } },
       call = function(_, x) return x:norm(2, 2) end,
       ref = fold(2, function(R, v)
         local s = 0
         for k = 1, #v do s = R(s + R(v[k] ^ 2)) end
         return R(math.sqrt(s))
       end),
       bad = { { function(_, x) return x:norm(-1) end, "p must be a positive number" } } }
case { name = "norm", label = "p = 3", inputs = { { 3, 4, kind = "positive" } },
       call = function(_, x) return x:norm(3) end,
       ref = function(R, x)
         local s = 0
         for k = 1, #x.data do s = R(s + R(R(math.abs(x.data[k])) ^ 3)) end
         return { shape = {}, data = { R(s ^ (1 / 3)) } }
       end }

-- ---- products, norms, losses --------------------------------------------------------------------------

local function dot(R, n, f)
  local s = 0
  for k = 1, n do s = R(s + R(f(k))) end
  return s
end
local function matrix_product(R, a, b) -- [..., M, K] [..., K, N] with broadcast batches
  local na, nb = #a.shape, #b.shape
  local K = a.shape[na]
  local batch_a, batch_b = { shape = {}, data = {} }, { shape = {}, data = {} }
  for d = 1, na - 2 do batch_a.shape[d] = a.shape[d] end
  for d = 1, nb - 2 do batch_b.shape[d] = b.shape[d] end
  local shape = broadcast(batch_a, batch_b)
  local lead = #shape
  shape[lead + 1], shape[lead + 2] = a.shape[na - 1], b.shape[nb]
  return build(shape, function(i)
    return dot(R, K, function(k) return at(a, with(i, lead + 2, k)) * at(b, with(i, lead + 1, k)) end)
  end)
end
case { name = "matmul", inputs = { { 3, 4 }, { 4, 2 } }, ref = matrix_product,
       bad = { { function(lac, x) return x:matmul(lac.zeros { 3, 2, dtype = x:dtype() }) end,
                 "matmul: .*4.*3" },
               { function(_, x) return x:matmul(3) end, "matmul: b must be a tensor, got 3" } } }
case { name = "matmul", label = "batched", inputs = { { 2, 1, 3, 4 }, { 3, 4, 2 } }, ref = matrix_product }
case { name = "matmul", label = "vectors", inputs = { { 4 }, { 4 } },
       ref = function(R, a, b)
         return { shape = {}, data = { dot(R, 4, function(k) return a.data[k] * b.data[k] end) } }
       end }
local function linear(R, x, w, b)
  local shape = {}
  for d = 1, #x.shape do shape[d] = x.shape[d] end
  local n, E = #shape, x.shape[#x.shape]
  shape[n] = w.shape[1]
  return build(shape, function(i)
    local s = dot(R, E, function(k) return at(x, with(i, n, k)) * at(w, { i[n], k }) end)
    return b and R(s + b.data[i[n]]) or s
  end)
end
case { name = "linear", inputs = { { 2, 3, 4 }, { 5, 4 }, { 5 } }, ref = linear,
       bad = { { function(lac, x) return lac.linear(x, lac.zeros { 5, 3, dtype = x:dtype() }) end,
                 "do not fit: x is" } } }
case { name = "linear", label = "no bias", inputs = { { 3, 4 }, { 5, 4 } }, ref = linear }
case { name = "layernorm", inputs = { { 3, 4 }, { 4 }, { 4 } },
       ref = function(R, x, gamma, beta)
         return build(x.shape, function(i)
           local v = {}
           for k = 1, 4 do v[k] = at(x, { i[1], k }) end
           local m, s = mean(R, v), 0
           for k = 1, 4 do s = R(s + R(R(v[k] - m) ^ 2)) end
           local rstd = R(1 / math.sqrt(R(s / 4) + 1e-5))
           return R(R(R(R(v[i[2]] - m) * rstd) * gamma.data[i[2]]) + beta.data[i[2]])
         end)
       end,
       bad = { { function(lac, x) return lac.layernorm(x, lac.zeros { 5, dtype = x:dtype() }) end, "5" },
               { function(lac, x) return lac.layernorm(x, nil, nil, -1) end,
                 "eps must not be negative" } } }

case { name = "group_norm", inputs = { { 2, 4, 3 }, { 4 }, { 4 } },
       call = function(lac, x, gamma, beta) return lac.group_norm(x, 2, gamma, beta) end,
       ref = function(R, x, gamma, beta)
         return build(x.shape, function(i)
           local first, v = math.floor((i[2] - 1) / 2) * 2, {}
           for c = first + 1, first + 2 do
             for k = 1, 3 do v[#v + 1] = at(x, { i[1], c, k }) end
           end
           local m, s = mean(R, v), 0
           for k = 1, 6 do s = R(s + R(R(v[k] - m) ^ 2)) end
           local rstd = R(1 / math.sqrt(R(s / 6) + 1e-5))
           return R(R(R(R(at(x, i) - m) * rstd) * gamma.data[i[2]]) + beta.data[i[2]])
         end)
       end,
       bad = { { function(lac, x) return lac.group_norm(x, 3) end, "3 groups do not divide the 4 channels" },
               { function(lac, x, g) return lac.group_norm(x, 2, g:narrow(1, 1, 3)) end,
                 "gamma must be %[4%], a value for each channel" },
               { function(lac, _, g) return lac.group_norm(g, 2) end, "x must be %[B, C, ...%]" } } }
case { name = "group_norm", label = "no gain, a group of all", inputs = { { 3, 4 } },
       call = function(lac, x) return lac.group_norm(x, 1) end,
       ref = function(R, x)
         return build(x.shape, function(i)
           local v = {}
           for k = 1, 4 do v[k] = at(x, { i[1], k }) end
           local m, s = mean(R, v), 0
           for k = 1, 4 do s = R(s + R(R(v[k] - m) ^ 2)) end
           return R(R(v[i[2]] - m) * R(1 / math.sqrt(R(s / 4) + 1e-5)))
         end)
       end }

local function row_loss(R, v, target)
  local _, s, top = softmax_of(R, v)
  return R(R(R(math.log(s)) + top) - v[target + 1])
end
local function mean_loss(R, logits, target, ignore)
  local V, sum, counted = logits.shape[#logits.shape], 0, 0
  for r = 1, #target.data do
    if target.data[r] ~= ignore then
      local v = {}
      for k = 1, V do v[k] = logits.data[(r - 1) * V + k] end
      sum, counted = R(sum + row_loss(R, v, target.data[r])), counted + 1
    end
  end
  return { shape = {}, data = { R(sum / counted) } }
end
local TARGET = { 2, 3, kind = "index", high = 4 }
case { name = "cross_entropy", inputs = { { 2, 3, 4 }, TARGET },
       call = function(lac, x, target) return lac.cross_entropy(x, target, { ignore_index = 1 }) end,
       ref = function(R, x, target) return mean_loss(R, x, target, 1) end,
       bad = { { function(lac, x) return lac.cross_entropy(x, lac.zeros { 2, 3 }) end,
                 "i64 or i32, got Tensor f32" },
               { function(lac, x) return lac.cross_entropy(x, lac.zeros { 2, dtype = "i64" }) end,
                 "without its last dimension" },
               { function(lac, x, t) return lac.cross_entropy(x, t + 9) end, "target" },
               { function(lac, x, t) return lac.cross_entropy(x, t, { reduction = "men" }) end,
                 "did you mean 'mean'" } } }
case { name = "cross_entropy", label = "none", inputs = { { 6, 4 }, { 6, kind = "index", high = 4 } },
       call = function(lac, x, target) return lac.cross_entropy(x, target, { reduction = "none" }) end,
       ref = function(R, x, target)
         return build({ 6 }, function(i)
           local v = {}
           for k = 1, 4 do v[k] = at(x, { i[1], k }) end
           return row_loss(R, v, target.data[i[1]])
         end)
       end }
case { name = "linear_cross_entropy",
       inputs = { { 2, 3, 4 }, { 5, 4 }, { 5 }, { 2, 3, kind = "index", high = 5 } },
       call = function(lac, x, w, b, t) return lac.linear_cross_entropy(x, w, b, t, { chunk = 4 }) end,
       ref = function(R, x, w, b, t) return mean_loss(R, linear(R, x, w, b), t, -100) end,
       bad = { { function(lac, x, w, _, t) return lac.linear_cross_entropy(x, w, 3, t) end,
                 "bias must be a tensor, got 3" } } }

-- ---- indexing -------------------------------------------------------------------------------------------

case { name = "index_select", inputs = { { 3, 4 }, { 2, 3, kind = "index", high = 4 } },
       call = function(lac, x, idx) return lac.index_select(x, 2, idx) end,
       ref = function(_, x, idx)
         return build({ 3, 2, 3 }, function(i) return at(x, { i[1], at(idx, { i[2], i[3] }) + 1 }) end)
       end,
       bad = { { function(_, x, idx) return x:index_select(2, idx + 2) end, "index_select" },
               { function(lac, x) return x:index_select(2, lac.zeros { 2 }) end, "index_select" } } }
case { name = "gather", inputs = { { 3, 4 }, { 3, 2, kind = "index", high = 4 } },
       call = function(_, x, idx) return x:gather(2, idx) end,
       ref = function(_, x, idx)
         return build({ 3, 2 }, function(i) return at(x, { i[1], at(idx, i) + 1 }) end)
       end }
case { name = "embedding", inputs = { { 5, 3 }, { 2, 4, kind = "index", high = 5 } },
       ref = function(_, w, idx)
         return build({ 2, 4, 3 }, function(i) return at(w, { at(idx, { i[1], i[2] }) + 1, i[3] }) end)
       end,
       bad = { { function(lac, w) return lac.embedding(w:view(-1), lac.zeros { 1, dtype = "i64" }) end,
                 "weight must be" } } }
case { name = "where", inputs = { { 3, 4, kind = "bool" }, { 3, 1 }, { 4 } },
       ref = function(_, c, x, y)
         return build({ 3, 4 }, function(i) return at(c, i) ~= 0 and at(x, i) or at(y, i) end)
       end,
       bad = { { function(lac, c) return lac.where(c, "a", 1) end, "x must be a tensor" } } }
case { name = "masked_fill", inputs = { { 3, 4 }, { 4, kind = "bool" } },
       call = function(_, x, m) return x:masked_fill(m, -2) end,
       ref = function(_, x, m)
         return build({ 3, 4 }, function(i) return at(m, i) ~= 0 and -2 or at(x, i) end)
       end }
case { name = "clamp", call = function(_, x) return x:clamp(-0.5, 0.75) end,
       ref = function(_, x)
         return build(x.shape, function(i) return math.min(math.max(at(x, i), -0.5), 0.75) end)
       end,
       bad = { { function(_, x) return x:clamp(2, 1) end, "lower bound 2 is above the upper bound 1" } } }
case { name = "tril", call = function(_, x) return x:tril(1) end,
       ref = function(_, x)
         return build(x.shape, function(i) return i[2] <= i[1] + 1 and at(x, i) or 0 end)
       end }
case { name = "triu",
       ref = function(_, x)
         return build(x.shape, function(i) return i[2] >= i[1] and at(x, i) or 0 end)
       end }
case { name = "one_hot", inputs = { { 2, 3, kind = "index", high = 4 } }, grad = false,
       call = function(_, idx) return idx:one_hot(4) end,
       ref = function(_, idx)
         return build({ 2, 3, 4 }, function(i)
           return at(idx, { i[1], i[2] }) == i[3] - 1 and 1 or 0
         end)
       end,
       bad = { { function(_, idx) return idx:one_hot(1) end, "is outside 0 to 0" } } }
case { name = "cat", inputs = { { 2, 3 }, { 2, 1 } },
       call = function(lac, x, y) return lac.cat({ x, y, x }, 2) end,
       ref = function(_, x, y)
         return build({ 2, 7 }, function(i)
           local j = i[2]
           return j <= 3 and at(x, { i[1], j }) or j == 4 and at(y, { i[1], 1 }) or at(x, { i[1], j - 4 })
         end)
       end,
       bad = { { function(lac, x) return lac.cat({ x, x:t() }, 1) end,
                 "tensors must agree except in dim 1" },
               { function(lac) return lac.cat {} end, "the list of tensors is empty" } } }
case { name = "stack", inputs = { { 2, 3 }, { 2, 3 } },
       call = function(lac, x, y) return lac.stack({ x, y }, 2) end,
       ref = function(_, x, y)
         return build({ 2, 2, 3 }, function(i) return at(i[2] == 1 and x or y, { i[1], i[3] }) end)
       end }
case { name = "split", inputs = { { 3, 5 } },
       call = function(lac, x)
         local p = x:split(2, 2)
         return lac.cat({ p[3], p[1], p[2] }, 2)
       end,
       ref = function(_, x)
         local order = { 5, 1, 2, 3, 4 }
         return build({ 3, 5 }, function(i) return at(x, { i[1], order[i[2]] }) end)
       end,
       bad = { { function(_, x) return x:split({ 2, 2 }, 2) end, "sum to 4, dimension 2 has 5" } } }
case { name = "chunk", inputs = { { 5, 2 } }, call = function(_, x) return x:chunk(2)[2] end,
       ref = function(_, x) return build({ 2, 2 }, function(i) return at(x, { i[1] + 3, i[2] }) end) end }

-- ---- random, positions, attention -------------------------------------------------------------------------

case { name = "dropout", inputs = { { 20, 10, kind = "away" } }, fixed_seed = true,
       call = function(lac, x) return lac.dropout(x, 0.25) end,
       check = function(x, out, dtype)
         local dropped = 0
         for i = 1, #x.data do
           local expected = cases.round(dtype, x.data[i] / 0.75)
           if out[i] == 0 then
             dropped = dropped + 1
           elseif math.abs(out[i] - expected) > cases.epsilon(dtype) * math.abs(expected) then
             return ("element %d is neither dropped nor scaled"):format(i)
           end
         end
         -- 200 draws of 0.25: six deviations are 37
         if math.abs(dropped - 50) > 37 then return dropped .. " of 200 dropped" end
       end,
       bad = { { function(lac, x) return lac.dropout(x, 1) end, "p must be in %[0, 1%), got 1" } } }

local function rope_case(label, o)
  case { name = "rope", label = label, inputs = { { 1, 3, 2, 4 } },
         call = function(lac, x) return lac.rope(x, o) end,
         ref = function(R, x)
           return build(x.shape, function(i)
             local D, d = 4, i[4] - 1
             local pair = o.interleaved and math.floor(d / 2) or d % (D / 2)
             local second = o.interleaved and d % 2 == 1 or not o.interleaved and d >= D / 2
             local other = second and d - D / 2 or d + D / 2
             if o.interleaved then other = second and d - 1 or d + 1 end
             local p = (o.start or 0) + i[2] - 1
             local angle = p * (o.base or 10000) ^ (-2 * pair / D)
             local scale = 1
             if o.scale_base then
               scale = ((2 * pair / D + 0.4) / 1.4) ^ ((o.sign or 1) * p / o.scale_base)
             end
             local c, s = R(math.cos(angle) * scale), R(math.sin(angle) * scale)
             local a, b = at(x, i), at(x, with(i, 4, other + 1))
             return R(R(a * c) + R(second and b * s or -b * s))
           end)
         end, bad = { { function(lac, x) return lac.rope(x, { sign = 2 }) end, "sign" },
                      { function(lac) return lac.rope(lac.zeros { 1, 2, 3, 3 }) end, "rope" } } }
end
rope_case("halves", { start = 5 })
rope_case("interleaved", { interleaved = true, base = 100 })
rope_case("xpos", { scale_base = 512, sign = -1, start = 2 })

-- two branches, all heads, exact merge: a key kept by both counts twice
case { name = "attend", inputs = { { 1, 6, 2, 3 }, { 1, 6, 1, 3 }, { 1, 6, 1, 3 } },
       call = function(lac, q, k, v)
         return (lac.attend(q, k, v, { segments = { 3, 6 }, dilations = { 1, 2 }, causal = true }))
       end,
       ref = function(R, q, k, v)
         return build({ 1, 6, 2, 3 }, function(i)
           local p, h, weights, values = i[2] - 1, i[3] - 1, {}, {}
           for j = 0, p do
             local times = 0
             if math.floor(p / 3) == math.floor(j / 3) then times = times + 1 end
             if p % 2 == h % 2 and j % 2 == h % 2 then times = times + 1 end
             if times > 0 then
               local function product(d) return q.data[(p * 2 + h) * 3 + d] * k.data[j * 3 + d] end
               local s = R(dot(R, 3, product) / math.sqrt(3))
               weights[#weights + 1] = R(math.exp(s)) * times
               values[#values + 1] = v.data[j * 3 + i[4]]
             end
           end
           local sum = total(R, weights)
           return R(dot(R, #weights, function(n) return weights[n] * values[n] end) / sum)
         end)
       end,
       bad = { { function(lac, q, k, v)
                   return lac.attend(q, k, v, { segments = { 1, 2, 3 }, dilations = { 1, 2 } })
                 end,
                 "segments and dilations must have the same length: 3 != 2" } } }

-- ---- the other files -------------------------------------------------------------------------------------

-- what they write their cases with; each returns a function of `cases`
cases.helpers = {
  case = case, map1 = map1, map2 = map2, reduction = reduction, broadcast = broadcast, with = with,
  without = without, insert = insert, fold = fold, along = along, dot = dot, total = total, same = same,
  softmax_of = softmax_of, row_loss = row_loss, linear = linear, mean = mean,
  ordered = ordered,
}
for _, part in ipairs { "index", "elem", "scan", "fused", "compare", "bad" } do
  require("support.cases_" .. part)(cases)
end

return cases
