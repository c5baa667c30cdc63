--- Functions that Lua's mathematics lacks, in f64 to a few units in the last place (erfc's tail: z^2), for
--- references.
--
-- Written for exactness, not for speed: series whose terms have one sign, and a continued fraction where a
-- series would cancel.

local special = {}

-- erfc of z >= 1/2 by its continued fraction, which then has 17 digits after 20 + 200 / z^2 terms
local function tail(z)
  if z > 30 then return 0 end
  local f = z
  for n = 20 + math.ceil(200 / (z * z)), 1, -1 do f = z + n / 2 / f end
  return math.exp(-z * z) / (math.sqrt(math.pi) * f)
end

function special.erf(x)
  local a = math.abs(x)
  if a >= 0.5 then return (x > 0 and 1 or -1) * (1 - tail(a)) end
  local term, sum = x, x
  for n = 1, 20 do
    term = term * 2 * x * x / (2 * n + 1)
    sum = sum + term
  end
  return 2 / math.sqrt(math.pi) * math.exp(-x * x) * sum
end

function special.erfc(x) return x >= 0.5 and tail(x) or 1 - special.erf(x) end

--- The normal distribution function.
function special.phi(x) return 0.5 * special.erfc(-x / math.sqrt(2)) end

function special.expm1(x)
  if math.abs(x) > 0.5 then return math.exp(x) - 1 end
  local term, sum = x, x
  for n = 2, 20 do
    term = term * x / n
    sum = sum + term
  end
  return sum
end

function special.log1p(x)
  local u = 1 + x
  if u == 1 or u == math.huge then return x end
  return math.log(u) * (x / (u - 1))
end

--- The nearest integer, of two the even one.
function special.half_even(x)
  local whole = math.floor(x)
  local rest = x - whole
  return (rest > 0.5 or (rest == 0.5 and whole % 2 == 1)) and whole + 1 or whole
end

return special
