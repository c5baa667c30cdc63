--- fp8 on Hopper: the bits of rounded q, k and v, results against the oracle and the CPU's definition.
--
-- The CPU rounds q, k and v and attends in f32; the device multiplies the same bits on tensor cores and
-- rounds what weighs values too. So scores differ by the 14 bits that sums of e4m3 keep, and results by a
-- sixteenth of every weight at most. Small configurations are judged by the oracle with both in it
-- (support/e4m3.lua), which knows scores to the bit, large ones by the CPU and that sixteenth. Where a
-- segment is one position, a row sees one key: out is that key's value, lse the score, and both tell of
-- single numbers.

local attn_device = require "support.attn_device"
local it = attn_device.it(it, pending)

local lac = require "lacuna"
local cases = require "support.cases"
local direct = require "support.attn_direct"
local e4m3 = require "support.e4m3"
local oracle = require "support.oracle"
local attn = require "support.attn_random"
local C = direct.C
local NAN = 0 / 0
-- what exponentials and sums in f32 leave of lse, by 1 + |lse|: 2^-20 was the most of 130,000 numbers
local LSE = 2 ^ -18
local random, pick, text = attn.random, attn.pick, attn.text
local forward = attn_device.forward

-- any valid configuration of what the kernel does; heads: of keys, at most
local function random_config(most, heads)
  local c = attn.random_config { most = most, segment = most, heads = heads or 2,
                                 D = pick { 64, 64, 128, 128, 8 * random(16) } }
  c.dropout, c.dedup, c.padding, c.scale, c.fp8 = 0, false, nil, pick { 0, 0.3, 0.05 }, true
  return c
end

local function constant(n, x)
  local list = {}
  for i = 1, n do list[i] = x end
  return list
end

local function rounded_numbers(seed, n, dtype, f)
  local list = direct.numbers(seed, n)
  for i = 1, n do list[i] = direct.round[dtype](f and f(i, list[i]) or list[i]) end
  return list
end

-- one position a segment
local function alone(B, N, H, D)
  return direct.fill { B = B, N = N, H = H, D = D, segments = { 1 }, dilations = { 1 }, fp8 = true }
end

-- v with its magnitudes: bounds what rounded weights can do
local function magnitudes(lists)
  local v = {}
  for i, x in ipairs(lists[3]) do v[i] = math.abs(x) end
  return { lists[1], lists[2], v }
end

describe("fp8 on Hopper #gpu", function()
  local unharmed = attn_device.guard(setup, teardown)

  it("rounds values to the CPU's bits, with a scale for each head", function()
    for _, D in ipairs { 64, 128, 8, 40, 80 } do
      for _, dtype in ipairs { "bf16", "f16" } do
        for _, layout in ipairs { false, "heads", "inner", "reversed" } do
          local c, n = alone(2, 33, 3, D), 2 * 33 * 3 * D
          local v = rounded_numbers(D, n, dtype, function(i, x)
            return x * 10 ^ (math.floor((i - 1) / D) % 3 - 1)
          end)
          local lists = { constant(n, 0), constant(n, 0), v }
          local got = forward(C.LAC_CUDA, dtype, c, lists, layout or nil)
          assert.equal(0, direct.max_diff(got.out, forward(0, dtype, c, lists).out))
        end
      end
    end
  end)

  it("rounds queries and keys to the CPU's bits", function()
    for _, D in ipairs { 64, 128 } do
      local c, n = alone(1, 40, D, D), 40 * D * D
      c.scale = 8
      local numbers, one = rounded_numbers(3, n, "bf16"), constant(n, 0)
      for i = 0, 40 * D - 1 do one[i * D + i % D + 1] = 1 end -- head h shows column h
      for _, lists in ipairs { { numbers, one, one }, { one, numbers, one } } do
        local want = forward(0, "f32", c, lists).lse
        local found = direct.max_diff(forward(C.LAC_CUDA, "bf16", c, lists).lse, want)
        -- weights are 2^8 times what they are in f32; the smallest unit of the bits is 2^-14 here
        assert.is_true(found <= 2 ^ -22 * (8 + direct.largest(want)), ("%g at D = %d"):format(found, D))
      end
    end
  end)

  it("equals the oracle on rounded inputs in 60 random configurations", function()
    local seed = attn.fresh()
    attn.seed(seed)
    for trial = 1, 60 do
      local c, dtype = random_config(trial % 6 == 0 and 150 or 50), pick { "bf16", "f16" }
      local lists = attn_device.inputs(c, seed + trial, dtype)
      local layout = pick { false, "heads", "inner", "reversed" } or nil
      local got = forward(C.LAC_CUDA, dtype, c, lists, layout)
      local q, k, v = e4m3.inputs(c, unpack(lists))
      local exact, naive = oracle.run(c, q, k, v)
      for _, rounding in ipairs(e4m3.naive) do
        local one = oracle.run(c, q, k, v, nil, nil, { rounding = rounding })
        naive = naive and attn.worse(exact, naive, one) or one
      end
      local hopper = oracle.run(c, q, k, v, nil, nil, { rounding = e4m3.hopper(c, lists[1], lists[2]) })
      local what = ("trial %d of seed %d: %s"):format(trial, seed, text(c))
      attn_device.judge(dtype, got, exact, attn.worse(exact, naive, hopper), what)
      for i, x in ipairs(hopper.lse) do -- scores are known to the bit, so lse is as f32 has it
        local good = x == got.lse[i] or math.abs(got.lse[i] - x) <= LSE * (1 + math.abs(x))
        if not good then
          error(("lse[%d] is %.9g, by tensor cores' scores %.9g, in %s"):format(i, got.lse[i], x, what), 0)
        end
      end
    end
  end)

  it("equals the CPU across many tiles in 200 random configurations", function()
    local seed = attn.fresh() + 1
    attn.seed(seed)
    for trial = 1, 200 do
      local c, dtype = random_config(trial % 8 == 0 and 1500 or 500, 1), pick { "bf16", "f16" }
      local lists = attn_device.inputs(c, seed + trial, dtype)
      local got = forward(C.LAC_CUDA, dtype, c, lists, pick { false, false, "heads" } or nil)
      local want, most = forward(0, "f32", c, lists), forward(0, "f32", c, magnitudes(lists)).out
      local what = ("trial %d of seed %d: %s %s"):format(trial, seed, dtype, text(c))
      for name, list in pairs(got) do
        local unit = 2 * cases.epsilon(dtype) * direct.largest(want[name])
        local lost = c.M * 2 ^ -18 * direct.largest(lists[3]) -- weights below 2^-18 of a row's largest
        for i, x in ipairs(want[name]) do
          -- a weight's rounding, and 14 bits of 48 sums of 32 products
          local allowed = name == "out" and (2 ^ -4 + 48 * 2 ^ -13) * most[i] + lost + unit
            or 2 ^ -8 * (1 + math.abs(x))
          local good = x == list[i] or math.abs(x - list[i]) <= allowed
          if not good then
            error(("%s[%d] is %g, not %g +- %g in %s"):format(name, i, list[i], x, allowed, what), 0)
          end
        end
      end
    end
  end)

  it("gives the same bits twice", function()
    attn.seed(12)
    for _ = 1, 12 do
      local c, dtype = random_config(1500, 1), pick { "bf16", "f16" }
      local lists = attn_device.inputs(c, 3, dtype)
      local first = forward(C.LAC_CUDA, dtype, c, lists)
      for _ = 1, 3 do attn_device.same(forward(C.LAC_CUDA, dtype, c, lists), first, text(c)) end
    end
  end)

  it("keeps NaN and infinity of masked keys and other rows away, in 60 random configurations", function()
    local seed = attn.fresh() + 2
    attn.seed(seed)
    local function allowed(y) return 2 ^ -4 * (2 + math.abs(y)) end
    for trial = 1, 60 do
      local c = random_config(trial % 6 == 0 and 300 or 90)
      attn_device.keeps_away(c, { attn.inputs(c, seed + trial, "bf16") }, allowed,
        ("trial %d of seed %d: %s"):format(trial, seed, text(c)), 0)
    end
  end)

  it("makes NaN of what sees NaN", function()
    local x = direct.numbers(1, 70 * 64)
    for which = 1, 3 do
      local lists = { {}, {}, {} }
      for i = 1, 3 do for e = 1, #x do lists[i][e] = direct.round.bf16(x[e]) end end
      lists[which][69 * 64 + 5] = NAN
      local c = { N = 70, D = 64, segments = { 70 }, dilations = { 1 }, causal = true, fp8 = true }
      c = direct.fill(c)
      local got, want = forward(C.LAC_CUDA, "bf16", c, lists), forward(0, "bf16", c, lists)
      for i, y in ipairs(want.out) do assert.equal(y ~= y, got.out[i] ~= got.out[i]) end
    end
  end)

  it("says why it cannot do a call", function()
    local function refused(pattern, change, dtype)
      local c = { N = 70, D = 64, segments = { 70 }, dilations = { 1 }, fp8 = true }
      for name, value in pairs(change) do c[name] = value end
      c = direct.fill(c)
      local ok, message = pcall(forward, C.LAC_CUDA, dtype or "bf16", c, { attn.inputs(c, 1, "bf16") })
      assert.is_false(ok)
      assert.matches("fp8 on cuda cannot do this call: " .. pattern, tostring(message))
    end
    refused("tensors are neither f16 nor bf16", {}, "f32")
    refused("head_dim is above 128", { D = 136 })
    refused("head_dim is above 256 or no multiple of 8", { D = 60 })
    refused("the scale is negative", { scale = -1 })
    refused("there is dropout", { dropout = 0.5 })
    refused("there are alibi slopes", { alibi = { 0.5 } })
    refused("there is a padding mask", { padding = constant(70, true) })
    refused("there is a mask", { mask = { shape = { 70, 70 }, data = constant(4900, true) } })
    refused("kernel 'portable' has none", { kernel = "portable" })
    refused("pairs that several branches keep", { segments = { 70, 70 }, dilations = { 1, 2 }, dedup = true })
  end)

  it("takes few rows, packed sequences and the module, as the CPU does", function()
    local function near(f)
      local got, want = f "cuda":to { device = "cpu" }:to "f32", f "cpu":to "f32"
      assert.is_true((got - want):abs():max():item() <= 2 ^ -4 * want:abs():max():item())
    end
    lac.manual_seed(5)
    local q, k = lac.randn { 1, 3, 2, 64 }:to "bf16", lac.randn { 1, 500, 2, 64 }:to "bf16"
    local o = { segments = { 500 }, dilations = { 1 }, fp8 = true, align = "end", return_lse = false }
    near(function(where) return lac.attend(q:to { device = where }, k:to { device = where },
      k:to { device = where }, o) end)
    local packed = { segments = { 64, 200 }, dilations = { 1, 2 }, fp8 = true, causal = true,
                     return_lse = false, cu_seqlens = { 0, 190, 200, 500 } }
    near(function(where)
      local x = k:to { device = where }
      return lac.attend(x, x, x, packed)
    end)
    local longnet = { variant = "longnet", segments = { 64, 256 }, dilations = { 1, 2 }, heads = 2,
                      fp8 = true }
    near(function(where)
      local x = k:to { device = where }
      return (lac.attention(longnet)(x, x, x))
    end)
  end)

  it("takes the memory that explain() states", function()
    local cases_of = { { kv = 2, offset = "mod" }, { kv = 4, offset = "mod" }, { kv = 2, offset = "branch" } }
    for _, c in ipairs(cases_of) do
      local module = lac.attention { variant = "custom", segments = { 700, 4096 }, dilations = { 1, 4 },
        heads = 4, kv_heads = c.kv, scheme = "all", offset = c.offset, fp8 = true }
      local t = module:explain(4096, { device = "cuda", dtype = "bf16", head_dim = 64, as = "table" })
      lac.scope(function()
        local q = lac.zeros({ 1, 4096, 4, 64 }, { dtype = "bf16", device = "cuda" })
        local k = lac.zeros({ 1, 4096, c.kv, 64 }, { dtype = "bf16", device = "cuda" })
        lac.reset_peak()
        local before = lac.memory "cuda".live
        module(q, k, k)
        local taken = lac.memory "cuda".peak - before
        local stated = t.fp8.scales + t.fp8.copies + t.accumulate_forward + 4096 * 4 * (64 * 2 + 4)
        assert.is_true(taken >= stated and taken <= 1.3 * stated + 2 ^ 21,
          ("%d bytes taken, %d stated"):format(taken, stated))
      end)
    end
  end)

  -- tensor cores cut products off below the 14th bit of their sum: what has one sign would lose a third
  it("loses nothing in long sums of values of one sign", function()
    lac.manual_seed(3)
    for _, D in ipairs { 64, 128 } do
      for _, size in ipairs { 0, 1 } do
        local q = (size * lac.randn { 1, 130, 1, D }):to "bf16"
        local k, v = lac.randn { 1, 16384, 1, D }:to "bf16", (lac.randn { 1, 16384, 1, D } + 1):to "bf16"
        local function out(where, dtype)
          local function there(x) return x:to(dtype):to { device = where } end
          local o = { segments = { 16384 }, dilations = { 1 }, fp8 = true, align = "end", return_lse = false }
          return lac.attend(there(q), there(k), there(v), o):to { device = "cpu" }:to "f64"
        end
        local lost = (out("cuda", "bf16") - out("cpu", "f32")):mean():item()
        assert.is_true(math.abs(lost) < 2 ^ -7, ("%g of 1 at D = %d"):format(lost, D))
      end
    end
  end)

  -- the numbers of kernels/HOPPER_OPTIONS.md, with some room for other draws
  it("has the error that is stated", function()
    lac.manual_seed(7)
    local function rms(x) return math.sqrt((x * x):mean():item()) end
    for _, D in ipairs { 64, 128 } do
      local x, there = {}, {}
      for i = 1, 3 do
        x[i] = lac.randn { 1, 2048, 2, D }:to "bf16"
        there[i] = x[i]:to { device = "cuda" }
      end
      local o = { segments = { 2048 }, dilations = { 1 }, return_lse = false }
      local exact = lac.attend(x[1]:to "f64", x[2]:to "f64", x[3]:to "f64", o)
      o.fp8 = true
      local out = lac.attend(there[1], there[2], there[3], o):to { device = "cpu" }:to "f64"
      local found = rms(out - exact) / rms(exact)
      assert.is_true(found > 0.035 and found < 0.07, ("%g at D = %d"):format(found, D))
    end
  end)

  it("wrote over no guard bytes", unharmed)
end)
