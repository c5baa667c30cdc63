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
-- rounded, and multiplied again. Also the divisors [B, H].
function e4m3.rounded(x, B, N, H, D)
  local out, scales = {}, {}
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
      scales[b * H + h + 1] = scale
    end
  end
  return out, scales
end

--- q, k and v of a configuration, rounded.
function e4m3.inputs(c, q, k, v)
  local rounded = e4m3.rounded
  return rounded(q, c.B, c.N, c.H, c.D), rounded(k, c.B, c.M, c.Hk, c.D), rounded(v, c.B, c.M, c.Hk, c.D)
end

-- Sums of products on tensor cores keep 14 bits, and the rest is cut off (DeepSeek-V3 technical report, arXiv
-- 2412.19437, section 3.3.2), which is as far off as 13 bits that are rounded. Cutting here, where products
-- are added one by one and not 32 at a time, would drift much further.
local function round_sum(x)
  local m, e = math.frexp(x)
  return x - x == 0 and math.ldexp(math.floor(math.ldexp(m, 13) + 0.5), e - 13) or x
end

-- The same as units do it: 32 products at a time.
local function cut(x)
  local m, e = math.frexp(x)
  m = math.ldexp(m, 14)
  return x - x == 0 and math.ldexp(m < 0 and math.ceil(m) or math.floor(m), e - 14) or x
end

-- x cut off to multiples of 2^e
local function cut_at(x, e)
  x = math.ldexp(x, -e)
  return math.ldexp(x < 0 and math.ceil(x) or math.floor(x), e)
end

local FRACTION = 13 -- bits that a sum keeps below its leading one

--- Inner products of rounded q and k as Hopper's tensor cores make them, in units of their heads' divisors:
-- thirty-two products and the sum so far are cut off 13 bits below the exponent of the largest, added
-- exactly, and the sum is cut off 13 bits below its own leading one. A product's exponent is the sum of its
-- factors', which are at least -6; zeros have none. Found by measurement: on an H200 393,216 sums of one, two
-- and four instructions (wgmma.m64n8k32 of e4m3: normal numbers, any bits, subnormals, accumulators that are
-- not 0) were these to the bit. With 12 or 14 bits, results of f32 or exponents of products instead of
-- factors' 8 to 90% were others wherever anything is cut off.
function e4m3.hopper_inner(c, q, k)
  local _, q_scales = e4m3.rounded(q, c.B, c.N, c.H, c.D)
  local _, k_scales = e4m3.rounded(k, c.B, c.M, c.Hk, c.D)
  local function scale_of(scales, rows, heads, at)
    local row = at / c.D
    return scales[math.floor(row / (rows * heads)) * heads + row % heads + 1]
  end
  return function(n, x, xa, y, ya)
    local xs, ys, sum = scale_of(q_scales, c.N, c.H, xa), scale_of(k_scales, c.M, c.Hk, ya), 0
    for from = 1, n, 32 do
      local products, top = {}, -math.huge
      if sum ~= 0 then top = select(2, math.frexp(sum)) - 1 end
      for d = from, math.min(from + 31, n) do
        local a, b = x[xa + d], y[ya + d]
        if a - a ~= 0 or b - b ~= 0 then return 0 / 0 end
        a, b = e4m3.round(a / xs), e4m3.round(b / ys)
        products[#products + 1] = a * b
        if a * b ~= 0 then
          local _, ea = math.frexp(a)
          local _, eb = math.frexp(b)
          top = math.max(top, math.max(ea - 1, -6) + math.max(eb - 1, -6))
        end
      end
      if top > -math.huge then
        sum = cut_at(sum, top - FRACTION)
        for _, p in ipairs(products) do sum = sum + cut_at(p, top - FRACTION) end
      end
      if sum ~= 0 then sum = cut_at(sum, select(2, math.frexp(sum)) - 1 - FRACTION) end
    end
    return sum * xs * ys
  end
end

--- What naive programs on tensor cores make of rounded q, k and v, as `rounding` of the oracle: such sums,
-- and what weighs values is rounded too. Where a weight lies between two numbers of four bits depends
-- on what weights are relative to, so there are four programs: with few keys one may be right by luck. So may
-- sums that are rounded where there are few numbers: a fifth cuts them off.
e4m3.naive = {}
for i = 1, 4 do
  local unit = 256 * 2 ^ ((1 - i) / 4)
  local function weight(x) return e4m3.round(unit * x) / unit end
  e4m3.naive[i] = { result = f32, sum = round_sum, weight = weight }
end
e4m3.naive[5] = { result = f32, sum = round_sum, weight = e4m3.naive[1].weight, products = { 32, cut } }

--- The program whose scores are those of Hopper's tensor cores to the bit, and whose sums of weights are
-- f32's. None of the others is sure to lose what the units lose: two scores may both be right by luck.
function e4m3.hopper(c, q, k)
  return { result = f32, sum = f32, weight = e4m3.naive[1].weight, products = { 32, cut },
           inner = e4m3.hopper_inner(c, q, k) }
end

return e4m3
