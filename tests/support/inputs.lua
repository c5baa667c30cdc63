--- Inputs of operator cases: plain arrays from a case's input specs, and tensors of them in two layouts.
--
-- The generator is a plain one, so that inputs do not depend on the engine under test. `strided` makes the
-- same values in an awkward memory layout, on any device, because an operator that only works on contiguous
-- tensors is wrong for half of what scripts pass. Used by ops_spec (against references) and cuda_spec
-- (against the CPU).

local lac = require "lacuna"
local cases = require "support.cases"

-- plain generator, so that inputs do not depend on the engine
local state = 12345

-- the same inputs for the same text, whatever was drawn before
local function seed(text)
  state = 12345
  for i = 1, #text do state = (state * 31 + text:byte(i)) % 2147483646 + 1 end
end

local function uniform()
  state = state * 16807 % 2147483647
  return state / 2147483648
end
local function normal()
  return math.sqrt(-2 * math.log(1 - uniform())) * math.cos(2 * math.pi * uniform())
end

local MAKE = {
  normal = normal,
  positive = function() return 0.25 + 2 * uniform() end,
  fraction = function() return 0.1 + 0.8 * uniform() end,
  above = function() return 1.25 + 2 * uniform() end, -- above 1
  away = function() return (uniform() < 0.5 and -1 or 1) * (0.25 + 2 * uniform()) end,
}

local function is_float(spec) return spec.kind ~= "bool" and spec.kind ~= "index" end

-- the plain array of an input spec, rounded to dtype
local function array_for(spec, dtype)
  local shape, data = {}, {}
  for i = 1, #spec do shape[i] = spec[i] end
  for k = 1, cases.count(shape) do
    if spec.kind == "bool" then
      data[k] = uniform() < 0.5 and 1 or 0
    elseif spec.kind == "index" then
      data[k] = math.floor(uniform() * spec.high)
    else
      data[k] = cases.round(dtype, MAKE[spec.kind or "normal"]())
    end
  end
  return { shape = shape, data = data }
end

local function dtype_of(spec, dtype)
  return spec.kind == "bool" and "bool" or spec.kind == "index" and "i64" or dtype
end

local function contiguous(array, dtype, device)
  return lac.tensor(array.data, { dtype = dtype, shape = array.shape, device = device })
end

-- the same values in another memory layout: dimensions stored in reverse, every second element, the last
-- dimension backwards
local function strided(array, dtype, device)
  local n = #array.shape
  if cases.count(array.shape) == 0 then return contiguous(array, dtype, device) end
  local shape, order = {}, {}
  for d = 1, n do shape[d], order[d] = array.shape[n + 1 - d], n + 1 - d end
  local function stored(index)
    local back = {}
    for d = 1, n do back[d] = index[n + 1 - d] end
    return cases.at(array, back)
  end
  local reversed = cases.build(shape, stored)
  local t = contiguous(reversed, dtype, device)
  if n == 0 then return t end
  local wide = lac.zeros { shape[1], 2, cases.count(shape) / shape[1], dtype = dtype, device = device }
  wide[{ {}, 2 }] = t:view(shape[1], -1)
  local sizes = { shape[1] }
  for d = 2, n do sizes[d] = shape[d] end
  local view = wide[{ { -1, 1, -1 }, 2 }] -- negative stride, and gaps between rows
  if n == 1 then return view:squeeze(2)[{ { -1, 1, -1 } }] end
  local rows = view:view(sizes)[{ { -1, 1, -1 } }]
  return rows:permute(order)
end

return { seed = seed, uniform = uniform, is_float = is_float, array_for = array_for, dtype_of = dtype_of,
         contiguous = contiguous, strided = strided }
