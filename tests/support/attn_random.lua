--- Random configurations of attention, and how results on CUDA are judged: what the specs of kernels share.
--
-- A configuration uses every option at once (ragged ends, offsets, windows, padding, lengths, grouped heads,
-- dedup, dropout, negative scales, layouts) and comes from a seed, which a failure prints; LACUNA_SEED
-- repeats one. Rows of the inputs that no branch keeps are NaN, and so is the memory that results and sums
-- are made in, so whatever reads or leaves a row that it should not shows up.

local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local choices = require "support.random"
local cases = require "support.cases"
local lac = require "lacuna"
local NAN = 0 / 0

local generator = choices.generator()
local random, pick, chance = generator.random, generator.pick, generator.chance
local fresh = choices.fresh

local text = choices.text

-- any valid configuration
local function random_config(options)
  while true do
    local c = { B = random(2), N = random(options.most), D = options.D or random(40), segments = {},
                dilations = {} }
    c.M = chance(0.6) and c.N or random(options.most)
    c.Hk = random(options.heads or 3)
    c.H = c.Hk * pick { 1, 1, 2, 3 }
    for g = 1, random(4) do
      c.segments[g] = chance(0.1) and 1000000007 or random(options.segment or 24)
      c.dilations[g] = chance(0.4) and 1 or random(6)
    end
    c.heads, c.offset = pick { "all", "split" }, pick { "mod", "block", "branch" }
    c.merge = pick { "mean", "sum", "lse", "lse_detach" }
    c.causal, c.align = chance(0.5), chance(0.5) and "end" or nil
    if chance(0.3) then c.window = random(options.segment or 12) - 1 end
    if chance(0.3) then
      c.padding = {}
      for i = 1, c.B * c.M do c.padding[i] = chance(0.7) end
    end
    if chance(0.3) then
      c.lengths, c.lengths_dtype = {}, pick { "i32", "i64" }
      for i = 1, c.B do c.lengths[i] = random(c.M + 1) - 1 end
    end
    c.dedup = c.merge == "lse" and chance(0.4)
    c.scale = pick { 0, 0.3, -0.7 }
    if chance(0.25) then c.dropout, c.seed, c.rng_offset = 0.3, random(1000), 5 end
    c = direct.fill(c)
    local valid = c.heads == "all" or c.H >= #c.segments
    for g = 1, #c.segments do
      for h = 0, c.H - 1 do
        if oracle.runs(c, g, h) and oracle.offset_of(c, g, h) >= c.segments[g] then valid = false end
      end
    end
    if valid then return c end
  end
end

-- q, k, v, dout, dlse rounded to the dtype; NaN where no branch keeps the row
local function inputs(c, seed, dtype)
  local nq, nk = c.B * c.N * c.H * c.D, c.B * c.M * c.Hk * c.D
  local lists = { direct.numbers(seed, nq), direct.numbers(seed + 1, nk), direct.numbers(seed + 2, nk),
                  direct.numbers(seed + 3, nq), direct.numbers(seed + 4, c.B * c.N * c.H) }
  for _, list in ipairs(lists) do
    for i = 1, #list do list[i] = direct.round[dtype](list[i]) end
  end
  return unpack(lists)
end

local function poison(c, q, k, v, dout)
  local group = c.H / c.Hk
  local function kept(h, n, shift)
    for g = 1, #c.segments do
      local p = n + shift
      local at = p >= 0 and (p % c.segments[g]) % c.dilations[g]
      if at == oracle.offset_of(c, g, h) and oracle.runs(c, g, h) then return true end
    end
    return false
  end
  local shift = c.align == "end" and c.M - c.N or 0
  for b = 0, c.B - 1 do
    for h = 0, c.H - 1 do
      for n = 0, c.N - 1 do
        local at = ((b * c.N + n) * c.H + h) * c.D
        for d = 1, kept(h, n, shift) and 0 or c.D do q[at + d], dout[at + d] = NAN, NAN end
      end
    end
    for hk = 0, c.Hk - 1 do
      for j = 0, c.M - 1 do
        local any = false
        for h = hk * group, hk * group + group - 1 do any = any or kept(h, j, 0) end
        local at = ((b * c.M + j) * c.Hk + hk) * c.D
        for d = 1, any and 0 or c.D do k[at + d], v[at + d] = NAN, NAN end
      end
    end
  end
end

-- the pool's free blocks, which results are made in, hold NaN
local function poison_pool(c)
  local held = {}
  local rows = c.B * c.N * c.H
  for _, n in ipairs { rows * c.D, c.B * c.M * c.Hk * c.D, rows, #c.segments * rows, 4096, 65536 } do
    for _, dtype in ipairs { "f64", "f32", "bf16", "f64", "f32", "bf16" } do
      held[#held + 1] = lac.full({ n }, NAN, { dtype = dtype, device = "cuda" })
    end
  end
  for _, t in ipairs(held) do t:release() end
end

-- out, lse, dq, dk, dv on a device
local function run(device, dtype, c, lists, layout)
  direct.device = device
  local q, k, v, dout, dlse = unpack(lists, 1, 5)
  local r = direct.forward(c, q, k, v, { dtype = dtype, layout = layout })
  local dq, dk, dv = direct.backward(r, dout, dlse, { layout = layout })
  local found = { out = direct.read(r.out), lse = direct.read(r.lse), dq = direct.read(dq),
                  dk = direct.read(dk), dv = direct.read(dv) }
  direct.device = 0
  return found
end

-- The gradients obey the rule together: where a row has one key, dq is what is left of numbers that cancel,
-- and the naive program may be exact there by luck.
local function together(r)
  local all = {}
  for _, name in ipairs { "dq", "dk", "dv", "dbias" } do
    for _, x in ipairs(r[name] or {}) do all[#all + 1] = x end
  end
  return { out = r.out, lse = r.lse, gradients = all }
end

-- element by element the worse of two naive programs, of what both have: luck of one is no measure
local function worse(exact, x, y)
  local r = {}
  for name, list in pairs(exact) do
    r[name] = {}
    for i, e in ipairs(x[name] and y[name] and list or {}) do
      local a, b = x[name][i], y[name][i]
      r[name][i] = math.abs(b - e) > math.abs(a - e) and b or a
    end
  end
  return r
end

local function complain(dtype, name, got, exact, naive, what)
  if dtype == "f64" then
    local found = direct.max_diff(got, exact)
    if found > 1e-12 * (1 + direct.largest(exact)) then
      error(("%s differs by %g in %s"):format(name, found, what), 0)
    end
    return
  end
  local message = cases.compare(name:match "lse$" and "f32" or dtype, got, exact, naive)
  if message then error(("%s %s: %s in %s"):format(dtype, name, message, what), 0) end
end

return {
  seed = generator.seed,
  random = random, pick = pick, chance = chance, fresh = fresh, text = text,
  random_config = random_config, inputs = inputs, poison = poison, poison_pool = poison_pool, run = run,
  together = together, worse = worse, complain = complain,
}
