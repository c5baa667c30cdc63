--- Random configurations of attention with options of single pairs, for the specs of the CPU and of CUDA.
--
-- What a plan can be (segments, dilations, heads, offsets, merges, causal, window, dedup, alignment), padding
-- and dropout come together with a mask, a bias (with a few -inf) and slopes, each in any of its shapes: for
-- all, per head, per batch item, and in any memory layout. The generator has its own state, so that a seed
-- names a list of configurations.

local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local choices = require "support.random"

local pairs_of = {}

local generator = choices.generator()
local random, pick, chance = generator.random, generator.pick, generator.chance
pairs_of.seed, pairs_of.random, pairs_of.pick, pairs_of.chance = generator.seed, random, pick, chance

-- the shape of an option over [rows, columns], with one of its forms of axes in front
local function shape_of(c, rows, columns)
  local form = random(6)
  if form == 1 then return { rows, columns } end
  if form == 2 then return { pick { 1, c.H }, rows, columns } end
  return { form < 5 and c.B or 1, form % 2 == 0 and c.H or 1, rows, columns }
end

local function filled(shape, value)
  local n, data = 1, {}
  for _, s in ipairs(shape) do n = n * s end
  for i = 1, n do data[i] = value(i) end
  return { shape = shape, data = data, layout = pick { "inner", "reversed", false } or nil }
end

--- A mask that keeps a share of the pairs.
function pairs_of.mask(c, share)
  return filled(shape_of(c, c.N, c.M), function() return chance(share) end)
end

--- Active blocks, a share of them, of at least 16 rows or of one of `sizes`.
function pairs_of.blocks(c, share, sizes)
  c.block = pick(sizes or { 16, 16, 17, 32 })
  local shape = shape_of(c, math.ceil(c.N / c.block), math.ceil(c.M / c.block))
  c.blocks = filled(shape, function() return chance(share) end)
end

--- A bias of numbers in [-2, 2) and, with `holes`, a few -inf.
function pairs_of.bias(c, seed, holes)
  local numbers = direct.numbers(seed, 4 * c.B * c.H * c.N * c.M)
  return filled(shape_of(c, c.N, c.M), function(i)
    return holes and chance(0.1) and -math.huge or numbers[i]
  end)
end

--- Any valid configuration.
-- @tparam table options most (rows), D, segment (longest), plain (no padding, dropout or dedup), blocks
-- (true: beside the rest; "alone": nothing else of single pairs)
function pairs_of.config(options)
  while true do
    local most, longest = options.most or 30, options.segment or 24
    local c = { B = random(2), N = random(most), D = options.D or random(20), segments = {}, dilations = {} }
    c.M = chance(0.6) and c.N or random(most)
    c.Hk = random(2)
    c.H = c.Hk * pick { 1, 1, 2, 3 }
    for g = 1, random(3) do
      c.segments[g] = chance(0.2) and 1000000007 or random(longest)
      c.dilations[g] = chance(0.4) and 1 or random(4)
    end
    c.heads, c.offset = pick { "all", "split" }, pick { "mod", "block", "branch" }
    c.merge = pick { "mean", "sum", "lse", "lse_detach" }
    c.causal, c.align = chance(0.4), chance(0.5) and "end" or nil
    if chance(0.3) then c.window = random(longest) - 1 end
    c.scale = pick { 0, 0.3, -0.7 }
    if not options.plain then
      if chance(0.2) then
        c.padding = {}
        for i = 1, c.B * c.M do c.padding[i] = chance(0.8) end
      end
      c.dedup = c.merge == "lse" and chance(0.4)
      if chance(0.25) then c.dropout, c.seed, c.rng_offset = 0.3, random(1000), 5 end
    end
    c = direct.fill(c)
    local more = options.blocks ~= "alone"
    if more and chance(0.6) then c.mask = pairs_of.mask(c, pick { 0.5, 0.8, 0.1 }) end
    if more and chance(0.6) then c.bias = pairs_of.bias(c, random(1000), chance(0.3)) end
    if more and chance(0.4) then
      c.alibi = {}
      for h = 1, c.H do c.alibi[h] = direct.round.f32(0.7 * 2 ^ -h) end
    end
    if options.blocks then pairs_of.blocks(c, pick { 0.2, 0.5, 0.8 }) end
    local valid = (c.heads == "all" or c.H >= #c.segments) and (c.mask or c.bias or c.alibi or c.blocks)
    for g = 1, #c.segments do
      for h = 0, c.H - 1 do
        if oracle.runs(c, g, h) and oracle.offset_of(c, g, h) >= c.segments[g] then valid = false end
      end
    end
    if valid then return c end
  end
end

--- A configuration in words.
pairs_of.text = choices.text

--- q, k, v, dout, dlse as flat arrays, rounded to a dtype.
function pairs_of.inputs(c, seed, dtype)
  local nq, nk = c.B * c.N * c.H * c.D, c.B * c.M * c.Hk * c.D
  local lists = { direct.numbers(seed, nq), direct.numbers(seed + 1, nk), direct.numbers(seed + 2, nk),
                  direct.numbers(seed + 3, nq), direct.numbers(seed + 4, c.B * c.N * c.H) }
  local round = direct.round[dtype or "f64"]
  for _, list in ipairs(lists) do
    for i = 1, #list do list[i] = round(list[i]) end
  end
  for i = 1, c.bias and #c.bias.data or 0 do c.bias.data[i] = round(c.bias.data[i]) end
  return unpack(lists)
end

--- Everything a run makes, as flat arrays.
function pairs_of.run(c, lists, options)
  local r = direct.forward(c, lists[1], lists[2], lists[3], options)
  local dq, dk, dv, dbias = direct.backward(r, lists[4], lists[5], options)
  return { out = direct.read(r.out), lse = direct.read(r.lse), dq = direct.read(dq), dk = direct.read(dk),
           dv = direct.read(dv), dbias = dbias and direct.read(dbias) }
end

return pairs_of
