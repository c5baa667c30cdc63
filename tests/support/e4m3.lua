--- Numbers rounded to e4m3 as the option fp8 has them, by arithmetic that knows nothing of bits.

local direct = require "support.attn_direct"

local f32, MOST, LEAST = direct.round.f32, 448, math.ldexp(1, -126)
local e4m3 = {}

--- The nearest number with four bits of mantissa and exponents from -6 on, ties to even, at most 448.
function e4m3.round(x)
  local size = math.min(math.abs(x), MOST)
  local _, e = math.frexp(size)
  local unit = math.ldexp(1, math.max(e - 4, -9))
  local low = math.floor(size / unit)
  local rest = size / unit - low
  if rest > 0.5 or (rest == 0.5 and low % 2 == 1) then low = low + 1 end
  return (x < 0 and -1 or 1) * math.min(low * unit, MOST)
end

--- A flat [B, N, H, D] array: every head of every item is divided by its largest finite magnitude / 448,
-- rounded, and multiplied again.
function e4m3.rounded(x, B, N, H, D)
  local out = {}
  for b = 0, B - 1 do
    for h = 0, H - 1 do
      local function each(f)
        for n = 0, N - 1 do
          for d = 1, D do f(((b * N + n) * H + h) * D + d) end
        end
      end
      local most = 0
      each(function(i)
        local size = math.abs(x[i])
        if size < math.huge and size > most then most = size end
      end)
      local scale = most == 0 and 1 or math.max(f32(most / MOST), LEAST)
      each(function(i)
        local finite = x[i] - x[i] == 0
        out[i] = finite and f32(e4m3.round(f32(x[i] / scale)) * scale) or 0 / 0
      end)
    end
  end
  return out
end

--- q, k and v of a configuration, rounded.
function e4m3.inputs(c, q, k, v)
  local rounded = e4m3.rounded
  return rounded(q, c.B, c.N, c.H, c.D), rounded(k, c.B, c.M, c.Hk, c.D), rounded(v, c.B, c.M, c.Hk, c.D)
end

-- Sums of products on tensor cores keep 14 bits, and the rest is cut off (DeepSeek-V3 technical report, arXiv
-- 2412.19437, section 3.3.2), which is as far off as 13 bits that are rounded. Cutting here, where products
-- are added one by one and not 32 at a time, would drift much further.
local function sum(x)
  local m, e = math.frexp(x)
  return x - x == 0 and math.ldexp(math.floor(math.ldexp(m, 13) + 0.5), e - 13) or x
end

-- The same as units do it: 32 products at a time.
local function cut(x)
  local m, e = math.frexp(x)
  m = math.ldexp(m, 14)
  return x - x == 0 and math.ldexp(m < 0 and math.ceil(m) or math.floor(m), e - 14) or x
end

--- What naive programs on tensor cores make of rounded q, k and v, as `rounding` of the oracle: such sums,
-- and what weighs values is rounded too. Where a weight lies between two numbers of four bits depends
-- on what weights are relative to, so there are four programs: with few keys one may be right by luck. So may
-- sums that are rounded where there are few numbers: a fifth cuts them off.
e4m3.naive = {}
for i = 1, 4 do
  local unit = 256 * 2 ^ ((1 - i) / 4)
  e4m3.naive[i] = { result = f32, sum = sum, weight = function(x) return e4m3.round(unit * x) / unit end }
end
e4m3.naive[5] = { result = f32, sum = sum, weight = e4m3.naive[1].weight, products = { 32, cut } }

return e4m3
