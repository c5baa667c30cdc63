--- Attention of inputs that are rounded to e4m3 (fp8 = true): rounding and scales number by number,
-- everything else against the oracle in f64 with inputs that support/e4m3.lua rounds.
--
-- Where a segment is one position, a row sees one key, its weight is 1 and out is that key's value, rounded:
-- so rounding is seen through the attention itself, to the last bit. With the oracle, an f32 attention of the
-- rounded numbers may differ by what such an attention does. The error that the option brings is stated in
-- lac.attend's documentation and checked here against f64 of the numbers as they were.

local lac = require "lacuna"
local direct = require "support.attn_direct"
local e4m3 = require "support.e4m3"
local oracle = require "support.oracle"
local philox = require "support.philox"
local P = require "support.attn_pairs"
local ffi, C = direct.ffi, direct.C

local f32, rounded, rounded_inputs = direct.round.f32, e4m3.rounded, e4m3.inputs

local function refused(pattern, f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  assert.matches(pattern, message)
end

describe("attention of inputs rounded to e4m3", function()
  local isa, threads

  setup(function() isa, threads = ffi.string(C.lac_isa(nil)):match "^%w+", C.lac_threads(0) end)
  teardown(function()
    C.lac_isa(isa)
    C.lac_threads(threads)
  end)

  -- what v becomes
  local function through(values, B, N, H, D, options)
    local c = direct.fill { B = B, N = N, H = H, D = D, segments = { 1 }, dilations = { 1 }, fp8 = true }
    local zeros = {}
    for i = 1, #values do zeros[i] = 0 end
    return direct.read(direct.forward(c, zeros, zeros, values, options).out)
  end

  local function same(got, want)
    for i = 1, #want do
      if got[i] ~= want[i] and (got[i] == got[i] or want[i] == want[i]) then
        error(("number %d is %.9g, not %.9g"):format(i, got[i], want[i]), 0)
      end
    end
  end

  it("keeps the numbers of e4m3 and rounds between them to nearest even", function()
    local numbers = { 448 } -- so that the scale is 1
    for i = 0, 7 do numbers[#numbers + 1] = i * 2 ^ -9 end
    for e = -6, 8 do
      for m = 8, e == 8 and 14 or 15 do numbers[#numbers + 1] = math.ldexp(m, e - 3) end
    end
    assert.equal(128, #numbers)
    local list, want = {}, {}
    for i, x in ipairs(numbers) do
      for _, sign in ipairs { 1, -1 } do list[#list + 1], want[#want + 1] = sign * x, sign * x end
      local above = numbers[i + 1]
      if i > 1 and above then
        local middle, even = (x + above) / 2, (i - 2) % 2 == 0 and x or above
        local near = { { middle, even }, { middle * (1 - 2 ^ -20), x }, { middle * (1 + 2 ^ -20), above } }
        for _, pair in ipairs(near) do
          list[#list + 1], want[#want + 1] = pair[1], pair[2]
        end
      end
    end
    for _, name in ipairs { "baseline", "avx2", "avx512" } do
      if C.lac_isa(name) ~= nil then same(through(list, 1, 1, 1, #list, { dtype = "f32" }), want) end
    end
    C.lac_isa(isa)
  end)

  it("has a scale for each head of each item, whatever the magnitudes, dtype and layout", function()
    local B, N, H, D = 2, 300, 3, 7
    for _, dtype in ipairs { "f32", "f16", "bf16" } do
      for _, layout in ipairs { false, "heads", "inner", "reversed" } do
        local x = direct.numbers(5, B * N * H * D)
        for i = 1, #x do
          local head = math.floor((i - 1) / D) % H + (i > #x / 2 and H or 0) -- of item 2 too
          x[i] = direct.round[dtype](x[i] * 10 ^ (dtype == "f16" and head - 2 or 6 * head - 15))
        end
        local want = rounded(x, B, N, H, D)
        for i = 1, #want do want[i] = direct.round[dtype](want[i]) end
        same(through(x, B, N, H, D, { dtype = dtype, layout = layout or nil }), want)
      end
    end
  end)

  it("takes zeros, subnormal numbers, NaN and infinity", function()
    local function one(list, want) same(through(list, 1, #list, 1, 1, { dtype = "f32" }), want) end
    one({ 0, 0 }, { 0, 0 })
    local tiny = math.ldexp(1, -149)
    one({ tiny, 3 * tiny }, rounded({ tiny, 3 * tiny }, 1, 2, 1, 1))
    local list = { 1, 0 / 0, -2, math.huge, -math.huge, 3 }
    one(list, rounded(list, 1, 6, 1, 1))
    one({ 0 / 0, math.huge }, { 0 / 0, 0 / 0 })
  end)

  it("equals the oracle on rounded inputs, with every option, in 120 random configurations", function()
    P.seed(88)
    for trial = 1, 120 do
      local c = P.config { most = 24 }
      c.fp8 = true
      if P.chance(0.3) then c.mask, c.bias, c.alibi = nil, nil, nil end
      local dtype = P.pick { "f32", "f16", "bf16" }
      local q, k, v = P.inputs(c, trial, dtype)
      local x, y, z = rounded_inputs(c, q, k, v)
      local options = { keep = philox.keep(c) }
      local want = oracle.run(c, x, y, z, nil, nil, options)
      options.rounding = { result = f32, sum = f32 }
      local naive = oracle.run(c, x, y, z, nil, nil, options)
      local layout = P.pick { false, "heads", "inner", "reversed" } or nil
      local r = direct.forward(c, q, k, v, { dtype = dtype, layout = layout })
      for name, got in pairs { out = direct.read(r.out), lse = direct.read(r.lse) } do
        local unit, most = 0, direct.largest(want[name])
        if name == "out" and dtype ~= "f32" then unit = dtype == "f16" and 2 ^ -11 or 2 ^ -8 end
        local found = direct.max_diff(got, want[name])
        local allowed = 2 * direct.max_diff(naive[name], want[name]) + (2 ^ -22 + unit) * most
        assert.is_true(found <= allowed, ("%s: %g > %g in %s %s %s"):format(name, found, allowed, dtype,
          tostring(layout), P.text(c)))
      end
    end
  end)

  it("runs packed sequences as calls of their own, scales too", function()
    local q = lac.randn { 1, 50, 2, 16 } * lac.arange({ 50 }):to("f32"):view(1, 50, 1, 1)
    local o = { segments = { 8, 20 }, dilations = { 1, 2 }, fp8 = true, causal = true, return_lse = false }
    local apart = {}
    for i, at in ipairs { { 1, 20 }, { 21, 20 }, { 41, 10 } } do
      local x = q:narrow(2, at[1], at[2])
      apart[i] = lac.attend(x, x, x, o)
    end
    o.cu_seqlens = { 0, 20, 40, 50 }
    assert.is_true(lac.attend(q, q, q, o):equal(lac.cat(apart, 2)))
  end)

  it("gives the same bits for any number of threads", function()
    local c = direct.fill { B = 2, N = 900, H = 3, D = 24, segments = { 64, 300 }, dilations = { 1, 3 } }
    c.fp8 = true
    local nq = c.B * c.N * c.H * c.D
    local q, k, v = direct.numbers(1, nq), direct.numbers(2, nq), direct.numbers(3, nq)
    local first
    for n = 1, 4 do
      C.lac_threads(n)
      local got = direct.read(direct.forward(c, q, k, v, { dtype = "bf16" }).out)
      first = first or got
      same(got, first)
    end
  end)

  -- the numbers of lac.attend's documentation, with some room for other draws
  it("has the error that is stated", function()
    lac.manual_seed(7)
    local function rms(x) return math.sqrt((x * x):mean():item()) end
    local cases = { { share = 0, least = 0.035, most = 0.055 }, { share = 0.001, least = 0.06, most = 0.13 } }
    for _, case in ipairs(cases) do
      for _, D in ipairs { 64, 128 } do
        local x = {}
        for i = 1, 3 do
          local large = lac.bernoulli { 1, 1024, 2, D, p = case.share }:to "f32"
          x[i] = lac.randn { 1, 1024, 2, D } + 10 * lac.randn { 1, 1024, 2, D } * large
        end
        local o = { segments = { 1024 }, dilations = { 1 }, return_lse = false }
        local exact = lac.attend(x[1]:to "f64", x[2]:to "f64", x[3]:to "f64", o)
        o.fp8 = true
        local error_of = rms(lac.attend(x[1], x[2], x[3], o):to "f64" - exact) / rms(exact)
        assert.is_true(error_of > case.least and error_of < case.most, ("%g at D = %d"):format(error_of, D))
      end
    end
  end)

  it("is an option of modules, which say so, and the same there as in a call", function()
    local plain = { variant = "longnet", segments = { 4, 16 }, dilations = { 1, 2 }, heads = 2 }
    local attn, q = lac.attention(plain), lac.randn { 1, 16, 2, 8 }
    plain.fp8 = true
    local eight = lac.attention(plain)
    local out = eight(q, q, q)
    assert.is_true(out:equal((attn(q, q, q, { fp8 = true }))))
    assert.is_false(out:equal((attn(q, q, q))))
    local text = eight:explain(16, { head_dim = 8, batch = 2 })
    local t = eight:explain(16, { dtype = "bf16", batch = 2, head_dim = 8, as = "table" })
    assert.matches("kernel +cpu: q, k and v rounded to e4m3, then tiles", text)
    assert.matches("backward +none with fp8", text)
    assert.matches("fp8 +scales 48 B, rounded copies in f32 6.0 KiB", text)
    assert.are.same({ scales = 48, copies = 8192, of = "f32" }, t.fp8)
    local there = eight:explain(16, { device = "cuda", dtype = "bf16", as = "table", head_dim = 8 })
    assert.matches("^cuda: products of e4m3, f32 sums; hopper", there.kernel)
    -- rows of q and k in 16 bytes; values: 2 heads, 4 segments of 4 keys in 16; one of 8 keys in 16
    assert.are.same({ scales = 48, copies = 2 * 16 * 2 * 16 + 2 * 8 * 16 * (4 + 1), of = "e4m3" }, there.fp8)
    for dtype, why in pairs { f32 = "neither f16 nor bf16", bf16 = "head_dim is above 128" } do
      assert.matches("^cuda: fp8 fails: .*" .. why,
        eight:explain(16, { device = "cuda", dtype = dtype, as = "table", head_dim = 136 }).kernel)
    end
    assert.matches("^fp8 fails: it takes f32", eight:explain(16, { dtype = "f64", as = "table" }).kernel)
    assert.is_nil(attn:explain(16, { as = "table" }).fp8)

    local options = { embed_dim = 16, heads = 2, segments = { 4, 16 }, dilations = { 1, 2 } }
    local module, x = lac.nn.MultiheadDilatedAttention(options):eval(), lac.randn { 1, 16, 16 }
    options.fp8 = true
    local rounding = lac.nn.MultiheadDilatedAttention(options):eval()
    rounding:load_state_dict(module:state_dict())
    local function result(of) return lac.no_grad(function() return (of(x, x, x)) end) end
    local a, b = result(module), result(rounding)
    local difference = (a - b):abs():max():item()
    assert.is_true(difference > 1e-4 and difference < 0.5, tostring(difference))
    refused("fp8 is for forward passes", rounding, x, x, x)
  end)

  it("is refused by name where it cannot be", function()
    local x = lac.randn { 1, 8, 2, 4 }
    local o = { segments = { 8 }, dilations = { 1 }, fp8 = true }
    local wide = x:to "f64"
    refused("fp8 takes f32, f16 or bf16, q is f64 %[1, 8, 2, 4%]", lac.attend, wide, wide, wide, o)
    o.fp8 = "yes"
    refused("fp8 must be true or false", lac.attend, x, x, x, o)
    o.fp8 = true
    local trains = lac.randn { 1, 8, 2, 4, grad = true }
    for _, list in ipairs { { trains, x, x }, { x, trains, x }, { x, x, trains } } do
      refused("fp8 is for forward passes: .*lac.no_grad", lac.attend, list[1], list[2], list[3], o)
    end
    assert.is_true(lac.no_grad(lac.attend, trains, x, x, o):equal((lac.attend(trains:detach(), x, x, o))))
    local ring = { variant = "ring", segments = { 8 }, dilations = { 1 }, heads = 2, ranks = 2, fp8 = true }
    refused("does not honour option 'fp8' on shards", function() return lac.attention(ring)(x, x, x) end)
    local causal = lac.attention { variant = "longnet", segments = { 8 }, dilations = { 1 }, heads = 2,
                                   causal = true, fp8 = true }
    refused("decoding has no fp8", causal.decoder, causal, 4)

    local c = direct.fill { N = 3, H = 1, D = 2, segments = { 3 }, dilations = { 1 }, fp8 = true }
    local list = { 1, 2, 3, 4, 5, 6 }
    local r = direct.forward(c, list, list, list, { dtype = "f32" })
    refused("fp8 has no backward", direct.backward, r, list)
    local at, from = ffi.new("int64_t[1]", 2), ffi.new("int64_t[1]", 0)
    refused("decoding takes no .*fp8", function()
      direct.check(C.lac_attend_at(r.plan, r.args, at, from, direct.blank(), direct.blank()))
    end)
  end)
end)
