--- The Lua forms of dilated attention: results, gradients through the tape, options, modules, errors, plans.
--
-- The kernels are tested below the Lua library (attend_spec, golden_spec); here the library is the subject,
-- so each configuration runs through lac.attend or lac.attention and is compared with the naive oracle, in
-- f64, with gradients arriving through out and through lse. Sizes are small and odd on purpose: ragged
-- segments, grouped heads, cross-attention.
--
-- The errors are a table of options and sentences. They are pinned down word by word because a
-- configuration error is what a user of a sweep meets most often, and because an option that is ignored
-- silently is a wrong answer that nobody sees.

local lac = require "lacuna"
local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local tensor = require "lacuna.tensor"

local function refused(pattern, f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  assert.are.equal("string", type(message))
  assert.matches(pattern, message)
end

local function plain(text) return (text:gsub("[%[%]%(%)%%%.%+%-%*%?%^%$]", "%%%0")) end

-- q, k, v as f64 leaves for a filled configuration
local function leaves(c)
  local function make(seed, ...)
    local values = direct.numbers(seed, select(1, ...) * select(2, ...) * select(3, ...) * select(4, ...))
    return lac.tensor(values, { dtype = "f64", shape = { ... }, grad = true }), values
  end
  local q, qv = make(1, c.B, c.N, c.H, c.D)
  local k, kv = make(2, c.B, c.M, c.Hk, c.D)
  local v, vv = make(3, c.B, c.M, c.Hk, c.D)
  return q, k, v, qv, kv, vv
end

local CONFIGS = {
  longnet = { B = 2, N = 13, H = 4, D = 3, segments = { 4, 8, 16 }, dilations = { 1, 2, 4 }, causal = true },
  split = { B = 1, N = 12, H = 5, D = 4, segments = { 3, 6 }, dilations = { 1, 2 }, heads = "split" },
  ["detached weights, block offset"] = { B = 1, N = 9, H = 4, D = 2, segments = { 3, 9 },
                                         dilations = { 1, 3 }, merge = "lse_detach", offset = "block" },
  ["sum over shared rows"] = { B = 1, N = 10, H = 2, D = 3, segments = { 4, 10 }, dilations = { 1, 2 },
                               merge = "sum", offset = "mod" },
  ["dedup, window, grouped heads"] = { B = 1, N = 11, H = 4, Hk = 2, D = 3, segments = { 5, 11 },
                                       dilations = { 1, 2 }, dedup = true, window = 4, causal = true },
  ["cross, aligned to the end"] = { B = 1, N = 4, M = 10, H = 2, D = 3, segments = { 5 }, dilations = { 1 },
                                    causal = true, align = "end" },
}

local function options_of(c)
  return { segments = c.segments, dilations = c.dilations, heads = c.heads, offset = c.offset,
           merge = c.merge, causal = c.causal, dedup = c.dedup, window = c.window, align = c.align,
           scale = c.scale }
end

describe("lac.attend", function()
  for name, config in pairs(CONFIGS) do
    it("equals the oracle, with gradients through out and lse: " .. name, function()
      local c = direct.fill(config)
      local q, k, v, qv, kv, vv = leaves(c)
      local out, lse = lac.attend(q, k, v, options_of(c))
      assert.are.same({ c.B, c.N, c.H, c.D }, { unpack(out:size()) })
      assert.are.same({ c.B, c.N, c.H }, { unpack(lse:size()) })
      local dout = direct.numbers(4, out:numel())
      local dlse = direct.numbers(5, lse:numel())
      local lse_list = tensor.flat_list(lse)
      for i = 1, #dlse do
        if lse_list[i] == -math.huge then dlse[i] = 0 end
      end
      local expected = oracle.run(c, qv, kv, vv, dout, dlse)
      assert.is_true(direct.max_diff(tensor.flat_list(out), expected.out) < 1e-12)
      assert.is_true(direct.max_diff(lse_list, expected.lse) < 1e-12)
      local g = lac.grad({ out, lse }, { q, k, v },
                         { grad_outputs = { lac.tensor(dout, { dtype = "f64", shape = out:size() }),
                                            lac.tensor(dlse, { dtype = "f64", shape = lse:size() }) } })
      assert.is_true(direct.max_diff(tensor.flat_list(g[1]), expected.dq) < 1e-11, "dq")
      assert.is_true(direct.max_diff(tensor.flat_list(g[2]), expected.dk) < 1e-11, "dk")
      assert.is_true(direct.max_diff(tensor.flat_list(g[3]), expected.dv) < 1e-11, "dv")
    end)
  end

  it("passes gradcheck through out alone, lse alone, and strided views", function()
    local q, k, v = leaves(direct.fill { N = 6, H = 2, D = 3 })
    local o = { segments = { 3, 6 }, dilations = { 1, 2 } }
    for _, f in ipairs {
      function(a, b, c) return (lac.attend(a, b, c, o)) end,
      function(a, b) local _, lse = lac.attend(a, b, v:detach(), o) return lse end,
      function(a, b, c)
        return (lac.attend(a:transpose(2, 3):contiguous():transpose(2, 3), b, c[{ {}, { -1, 1, -1 } }], o))
      end,
    } do
      local ok, report = lac.gradcheck(f, { q, k, v })
      assert.is_true(ok, tostring(report))
    end
  end)

  it("honours key_padding and key_lengths", function()
    local q, k, v = leaves(direct.fill { B = 2, N = 6, H = 1, D = 2 })
    local o = { segments = { 6 }, dilations = { 1 } }
    local mask = lac.tensor { { true, true, true, false, false, false },
                              { true, true, true, true, true, true } }
    o.key_padding = mask
    local a = lac.attend(q, k, v, o)
    o.key_padding, o.key_lengths = nil, lac.tensor({ 3, 6 }, { dtype = "i64" })
    local b = lac.attend(q, k, v, o)
    assert.is_true(a:allclose(b, { atol = 1e-14 }))
    o.key_lengths = nil
    assert.is_false(a:allclose(lac.attend(q, k, v, o), { atol = 1e-6 }))
    refused("key_padding", lac.attend, q, k, v,
            { segments = { 6 }, dilations = { 1 }, key_padding = mask:t() })
    refused("key_padding must be bool", lac.attend, q, k, v,
            { segments = { 6 }, dilations = { 1 }, key_padding = lac.ones { 2, 6 } })
    refused("key_lengths must be i64 or i32", lac.attend, q, k, v,
            { segments = { 6 }, dilations = { 1 }, key_lengths = lac.ones { 2 } })
  end)

  it("drops weights only in training, from the global stream", function()
    local q, k, v = leaves(direct.fill { N = 16, H = 2, D = 4 })
    local o = { segments = { 16 }, dilations = { 1 }, dropout = 0.5, return_lse = false }
    lac.manual_seed(1)
    local a = lac.attend(q, k, v, o)
    local b = lac.attend(q, k, v, o)
    lac.manual_seed(1)
    assert.is_true(a:equal(lac.attend(q, k, v, o)))
    assert.is_false(a:equal(b))
    o.training = false
    local _, offset = lac.rng_state()
    local clean = lac.attend(q, k, v, o)
    assert.are.equal(offset, select(2, lac.rng_state())) -- nothing was drawn
    assert.is_true(clean:equal((lac.attend(q, k, v, { segments = { 16 }, dilations = { 1 } }))))
    o.training = true
    local ok, report = lac.gradcheck(function(x, y, z) return (lac.attend(x, y, z, o)) end, { q, k, v })
    assert.is_true(ok, tostring(report))
  end)

  it("returns what was asked for", function()
    local q, k, v = leaves(direct.fill { N = 4, H = 1, D = 2 })
    local _, lse = lac.attend(q, k, v, { segments = { 4 }, dilations = { 1 }, return_lse = false })
    assert.is_nil(lse)
    local half = lac.attend(q:to "bf16", k:to "bf16", v:to "bf16", { segments = { 4 }, dilations = { 1 } })
    assert.are.equal("bf16", half:dtype())
  end)

  it("passes NaN and Inf on", function()
    local q, k, v = leaves(direct.fill { N = 4, H = 1, D = 2 })
    lac.no_grad(function() v[{ 1, 1 }] = 0 / 0 end)
    local out = lac.attend(q, k, v, { segments = { 4 }, dilations = { 1 } })
    assert.is_true(out:isnan():any():item())
  end)

  it("reuses plans", function()
    local q, k, v = leaves(direct.fill { N = 7, H = 1, D = 2 })
    local function run() return lac.attend(q, k, v, { segments = { 7 }, dilations = { 1 }, window = 5 }) end
    run()
    local before = lac.attention.cache()
    for _ = 1, 5 do run() end
    local after = lac.attention.cache()
    assert.are.equal(before.misses, after.misses)
    assert.are.equal(before.hits, after.hits) -- not even the engine's cache was asked
  end)

  it("gives the weights that multiply v, through branches, merges, padding and dropout", function()
    local c = direct.fill { B = 2, N = 7, M = 9, H = 4, Hk = 2, D = 3, align = "end" }
    local q, k, v = leaves(c)
    for _, o in ipairs {
      { segments = { 3, 9 }, dilations = { 1, 2 }, causal = true },
      { segments = { 3, 9 }, dilations = { 1, 2 }, merge = "mean" },
      { segments = { 4, 9 }, dilations = { 1, 1 }, merge = "lse_detach", window = 2 },
      { segments = { 9 }, dilations = { 1 }, dropout = 0.5 },
      { segments = { 9 }, dilations = { 1 }, key_lengths = lac.tensor({ 4, 9 }, { dtype = "i64" }) },
    } do
      o.align, o.need_weights = "end", true
      local out, lse, weights = lac.attend(q, k, v, o)
      assert.are.same({ 2, 4, 7, 9 }, { unpack(weights:size()) })
      assert.are.equal(3, lse:dim())
      local each = v:transpose(2, 3):repeat_interleave(2, 2) -- [B, H, M, D]
      local expected = lac.matmul(weights, each):transpose(2, 3)
      assert.is_true((out - expected):abs():max():item() < 1e-14)
      o.return_lse = false
      assert.are.same({ 2, 4, 7, 9 }, { unpack(select(2, lac.attend(q, k, v, o)):size()) })
    end
    local ok, report = lac.gradcheck(function(a, b)
      local o = { segments = { 3, 9 }, dilations = { 1, 2 }, need_weights = true }
      return select(3, lac.attend(a, b, v, o))
    end, { q, k })
    assert.is_true(ok, tostring(report))
    local long = lac.zeros { 1, 20000, 1, 1 }
    refused("need_weights would make 1 x 1 x 20000 x 20000 numbers", lac.attend, long, long, long,
            { segments = { 4 }, dilations = { 1 }, need_weights = true })
  end)

  it("detects changed inputs", function()
    local q, k, v = leaves(direct.fill { N = 4, H = 1, D = 2 })
    local out = lac.attend(q, k, v, { segments = { 4 }, dilations = { 1 } })
    lac.no_grad(function() k:zero_() end)
    refused("attend needs its second input as it was", out.backward, out, lac.ones_like(out))
  end)
end)

describe("errors of lac.attend", function()
  local q, k, v = leaves(direct.fill { N = 4, H = 2, D = 2 })
  local function bad(text, options)
    it(text, function() refused(plain("attention: " .. text), lac.attend, q, k, v, options) end)
  end
  local one = { 1 }
  bad("segments is required", { dilations = one })
  bad("segments must not be empty", { segments = {}, dilations = one })
  bad("dilations must not be empty", { segments = one, dilations = {} })
  bad("segments and dilations must have the same length: 3 != 2",
      { segments = { 1, 2, 3 }, dilations = { 1, 2 } })
  bad("segments[2] must be positive, got 0", { segments = { 1, 0 }, dilations = { 1, 1 } })
  bad("dilations[1] must be positive, got -2", { segments = { 1 }, dilations = { -2 } })
  bad("segments[1] must be an integer, got 2.5", { segments = { 2.5 }, dilations = one })
  bad("segments[1] must be an integer, got nan", { segments = { 0 / 0 }, dilations = one })
  bad("segments must be a list of integers, got {'a'}", { segments = { "a" }, dilations = one })
  bad("segments must be a list of integers, got 4", { segments = 4, dilations = one })
  bad("unknown heads 'al', did you mean 'all'? valid: all, split",
      { segments = one, dilations = one, heads = "al" })
  bad("unknown merge 'mena', did you mean 'mean'?", { segments = one, dilations = one, merge = "mena" })
  bad("unknown offset 'modulo', did you mean 'mod'?", { segments = one, dilations = one, offset = "modulo" })
  bad("unknown option 'segment', did you mean 'segments'?", { segment = one, dilations = one })
  bad("dropout must be in [0, 1), got 1", { segments = one, dilations = one, dropout = 1 })
  bad("dropout must be in [0, 1), got -0.1", { segments = one, dilations = one, dropout = -0.1 })
  bad("scale must be finite and not 0, got 0", { segments = one, dilations = one, scale = 0 })
  bad("window must be at least 0, got -1", { segments = one, dilations = one, window = -1 })
  bad("dedup counts every key once in one softmax, so it needs merge = 'lse', got 'sum'",
      { segments = one, dilations = one, merge = "sum", dedup = true })
  bad("2 heads cannot be split over 3 branches",
      { segments = { 1, 1, 1 }, dilations = { 1, 1, 1 }, heads = "split" })
  bad("branch 1 keeps nothing for head 2: its offset 1 is not below the segment 1",
      { segments = { 1 }, dilations = { 2 } })
  bad("q and k are not rotated here (option 'rope'): call lac.rope",
      { segments = one, dilations = one, rope = true })
  bad("alibi must have a slope for each of the 2 heads, got f64 [1]",
      { segments = one, dilations = one, alibi = { 1 } })
  bad("causal must be true or false, got 1", { segments = one, dilations = one, causal = 1 })

  it("names tensors, dimensions and both sizes", function()
    local o = { segments = { 4 }, dilations = { 1 } }
    refused("q must be a tensor, got nil", lac.attend, nil, k, v, o)
    refused("options must be a table", lac.attend, q, k, v)
    refused("v must be %[batch, positions, heads, head_dim%], got Tensor f64 %[8 x 2%]",
            lac.attend, q, k, v:view(8, 2), o)
    refused("k has 3 head dimensions, q has 2", lac.attend, q, lac.zeros { 1, 4, 2, 3, dtype = "f64" }, v, o)
    refused("k has 2 batch items, q has 1", lac.attend, q, lac.zeros { 2, 4, 2, 2, dtype = "f64" }, v, o)
    refused("v has 5 positions, k has 4", lac.attend, q, k, lac.zeros { 1, 5, 2, 2, dtype = "f64" }, o)
    refused("one dtype is needed", lac.attend, q, k, v:to "f32", o)
    local many = lac.zeros { 1, 4, 4, 2, dtype = "f64" }
    refused("heads must be a multiple of kv_heads: 2 %% 4", lac.attend, q, many, many, o)
    refused(".", lac.attend, lac.zeros { 1, 0, 2, 2 }, lac.zeros { 1, 0, 2, 2 }, lac.zeros { 1, 0, 2, 2 }, o)
  end)
end)

describe("lac.attention", function()
  it("has variants that equal the functional form", function()
    local q, k, v = leaves(direct.fill { N = 12, H = 4, D = 3 })
    local s, d = { 4, 12 }, { 1, 3 }
    local function same(module, options)
      local a, la = module(q, k, v)
      local b, lb = lac.attend(q, k, v, options)
      assert.is_true(a:equal(b))
      assert.is_true(la:equal(lb))
    end
    same(lac.attention { variant = "longnet", segments = s, dilations = d, heads = 4, causal = true },
         { segments = s, dilations = d, causal = true, heads = "all", offset = "mod", merge = "lse" })
    same(lac.attention { variant = "dilated", segments = s, dilations = d, heads = 4 },
         { segments = s, dilations = d, heads = "split", offset = "branch", merge = "mean" })
    same(lac.attention { variant = "improved", segments = s, dilations = d, heads = 4 },
         { segments = s, dilations = d, heads = "split", offset = "branch", merge = "mean" })
    same(lac.attention { variant = "dense", heads = 4, causal = true },
         { segments = { 12 }, dilations = { 1 }, causal = true })
  end)

  it("obeys train and eval", function()
    local q, k, v = leaves(direct.fill { N = 8, H = 1, D = 2 })
    local attn = lac.attention { variant = "dense", heads = 1, dropout = 0.5, return_lse = false }
    local clean = attn:eval()(q, k, v)
    assert.is_true(clean:equal(attn(q, k, v)))
    assert.is_false(clean:equal(attn:train()(q, k, v)))
    assert.is_true(clean:equal(attn(q, k, v, { dropout = 0 })))
  end)

  it("explains and prints itself", function()
    local attn = lac.attention { variant = "longnet", segments = { 4, 8 }, dilations = { 1, 2 }, heads = 2,
                                 causal = true }
    assert.are.equal("attention longnet(2 heads, segments {4, 8}, dilations {1, 2}, all, offset mod, "
      .. "merge lse, causal)", tostring(attn))
    local blocks = lac.attention { variant = "block_sparse", pattern = "full()", block = 16, heads = 2,
                                   of = "longnet", segments = { 4 }, dilations = { 1 } }
    assert.are.equal("attention block_sparse(longnet, 2 heads, segments {4}, dilations {1}, all, offset mod, "
      .. "merge lse, block 16, pattern full())", tostring(blocks))
    local text = attn:explain(8)
    -- pairs per head: branch 1: 2 (1+2+3+4) = 20, branch 2: 1+2+3+4 = 10; dense causal: 36 per head.
    -- q, k, v, out: 8 x 2 x 64 x 4 bytes each; lse: 8 x 2 x 4; 4 D FLOPs a pair
    for _, text_of in ipairs { "branch +segment +dilation", "\n  1 +4 +1 +0  1 to 2", "\n  2 +8 +2 +0  1;",
                               "\n  2 +8 +2 +1  2;", "rows covered +100.0%%",
                               "pairs +60 per batch item, 83.33%% of dense causal",
                               "forward +15,360 FLOP, at least 16.1 KiB moved: 0.9 FLOP per byte",
                               "backward .* at least 32.1 KiB moved", "workspace" } do
      assert.matches(text_of, text)
    end
    assert.matches("forward +15,360 FLOP, at least 8.1 KiB moved", attn:explain(8, { dtype = "bf16" }))
    local cross = lac.attention { variant = "dense", heads = 1, causal = true, align = "end" }
    assert.matches("9 per batch item, 100.00%% of dense causal", cross:explain(2, { m = 5 })) -- 4 + 5
    refused("n must be positive, got 0", attn.explain, attn, 0)
    refused("dtype must be f64, f32, f16 or bf16, got 'i64'", attn.explain, attn, 8, { dtype = "i64" })
  end)

  it("lets the kernel be chosen, and says which one would run", function()
    local function kernel(options, n, sizes)
      options.variant, options.heads = "dense", 2
      sizes.device, sizes.as = sizes.device or "cuda", "table"
      return lac.attention(options):explain(n, sizes).kernel
    end
    local function half(head_dim) return { dtype = "bf16", head_dim = head_dim } end
    local call = "; hopper on a Hopper GPU, with a bias' gradient and on others portable$"
    assert.matches(call, kernel({}, 64, half()))
    assert.matches(call, kernel({ alibi = true, dropout = 0.1 }, 64, half()))
    assert.matches("^cuda: f32 sums; 4 rows: their keys in parts; ", kernel({}, 4, half()))
    assert.matches("; portable: a branch has fewer than 64 rows a segment$", kernel({}, 31, half()))
    assert.matches("; forward portable %(a branch has fewer than 64 rows a segment%); backward hopper on a "
      .. "Hopper GPU, with a bias' gradient and on others portable$", kernel({}, 32, half()))
    assert.matches("; portable: tensors are neither f16 nor bf16$", kernel({}, 64, { dtype = "f64" }))
    assert.matches("; hopper %(chosen%) fails: tensors are neither f16 nor bf16$",
      kernel({ kernel = "hopper" }, 64, { dtype = "f32" }))
    local parts = "^cuda: tensor cores, f32 in three parts of bf16 where shared memory holds their tiles; "
    assert.matches(parts .. "by warpgroups on a Hopper GPU, .* else portable$",
      kernel({}, 64, { dtype = "f32", head_dim = 128 }))
    assert.matches(parts .. "portable %(chosen%)$", kernel({ kernel = "portable" }, 64, { dtype = "f32" }))
    local wide = { dtype = "f32", head_dim = 136 }
    assert.matches("^cuda: multiply%-adds of f32; portable", kernel({}, 64, wide))
    assert.matches("^cuda: multiply%-adds of f64; portable", kernel({}, 64, { dtype = "f64", head_dim = 64 }))
    lac.use_tf32(true)
    local tf32 = kernel({}, 64, wide)
    lac.use_tf32(false)
    assert.matches("^cuda: tensor cores, TF32; portable", tf32)
    assert.matches("; portable: head_dim is above 256 or no multiple of 8$", kernel({}, 64, half(36)))
    assert.matches("; portable: head_dim is above 256 or no multiple of 8$", kernel({}, 64, half(264)))
    assert.matches("; portable %(chosen%)$", kernel({ kernel = "portable" }, 64, half()))
    assert.matches("; hopper %(chosen%), an error on other GPUs$", kernel({ kernel = "hopper" }, 31, half()))
    local shared = lac.attention{ variant = "dense", heads = 33, kv_heads = 1 }
    assert.matches("; forward hopper on a Hopper GPU; backward %(more than 32 query heads share a key/value "
      .. "head%)", shared:explain(64, { dtype = "bf16", device = "cuda", as = "table" }).kernel)
    shared = lac.attention{ variant = "dense", heads = 33, kv_heads = 1, fp8 = true }
    assert.matches("; hopper, an error on other GPUs",
      shared:explain(64, { dtype = "bf16", device = "cuda", as = "table" }).kernel)
    assert.matches("; hopper %(chosen%) fails: head_dim is", kernel({ kernel = "hopper" }, 64, half(36)))
    local function sparse(block, choice, head_dim)
      local o = { variant = "block_sparse", pattern = "full()", block = block, heads = 2, kernel = choice }
      return lac.attention(o):explain(256, { dtype = "bf16", device = "cuda", as = "table",
        head_dim = head_dim }).kernel
    end
    local rest = " with padding, dropout or options of pairs, and on others portable$"
    assert.matches("; hopper on a Hopper GPU;" .. rest, sparse(128))
    assert.matches("; forward hopper on a Hopper GPU; backward %(blocks are not multiples of 128 rows of a "
      .. "branch%)," .. rest, sparse(64))
    for _, head_dim in ipairs{ 136, 256 } do
      assert.matches("; forward hopper on a Hopper GPU; backward %(head_dim is above 128%)," .. rest,
        kernel({}, 64, half(head_dim)))
    end
    assert.matches("; hopper %(chosen%), an error with padding, dropout or options of pairs, on other GPUs "
      .. "and backward: head_dim is above 128$", kernel({ kernel = "hopper" }, 64, half(256)))
    assert.matches("; portable: head_dim is above 128, with a block_mask$", sparse(64, nil, 136))
    assert.matches("^cuda: fp8 fails: head_dim is above 128$", kernel({ fp8 = true }, 64, half(136)))
    assert.matches("; portable: a branch has fewer than 64 rows a block$", sparse(63))
    assert.matches("; hopper %(chosen%), an error with padding, dropout or options of pairs, on other GPUs$",
      sparse(256, "hopper"))
    assert.matches("other GPUs and backward: blocks are not multiples of 128 rows", sparse(16, "hopper"))
    assert.matches("^cpu: kernel 'hopper' %(chosen%) fails",
      kernel({ kernel = "hopper" }, 64, { device = "cpu" }))
    local x = lac.randn{ 1, 4, 1, 2, device = "cpu" }
    local o = { segments = { 4 }, dilations = { 1 }, kernel = "hopper" }
    refused("kernel 'hopper' is for cuda", lac.attend, x, x, x, o)
    o.kernel = "fast"
    refused("unknown kernel .fast.; valid: auto, hopper, portable", lac.attend, x, x, x, o)
    o.kernel = "portable"
    assert.are.same({ 1, 4, 1, 2 }, lac.attend(x, x, x, o):size())
  end)

  it("counts what a pattern costs", function()
    local info = lac.attention.plan_info({ segments = { 4 }, dilations = { 2 }, heads = "all" },
                                         { n = 8, heads = 2 })
    assert.are.equal(2 * 2 * 4, info.pairs) -- 2 heads, 2 segments, 2 kept rows squared
    assert.are.equal(8, info.rows)
    assert.are.equal(2, #info.strips)
    refused("n is required", lac.attention.plan_info, { segments = { 4 }, dilations = { 2 } }, { heads = 1 })
  end)

  it("checks its configuration when it is made", function()
    refused("variant is required; valid: adaptive, auto, block_sparse, custom, dense, dilated, distributed, "
      .. "hierarchical, improved, learned, longnet, ring",
            lac.attention, { heads = 1 })
    refused("unknown variant 'longnt', did you mean 'longnet'%? valid: adaptive, auto, block_sparse, ",
            lac.attention, { variant = "longnt", heads = 1 })
    refused("segments is required by variant 'longnet'", lac.attention, { variant = "longnet", heads = 1 })
    refused("heads is required", lac.attention, { variant = "dense" })
    refused("variant 'dense' takes no segments, got {4}",
            lac.attention, { variant = "dense", heads = 1, segments = { 4 } })
    refused("variant 'dense' %(of = 'dense'%) takes no segments, got {4}; of = 'longnet' does", lac.attention,
            { variant = "block_sparse", pattern = "full()", heads = 1, segments = { 4 }, dilations = { 1 } })
    refused("variant 'longnet' has merge = 'lse', got 'mean'", lac.attention,
            { variant = "longnet", heads = 1, segments = { 4 }, dilations = { 1 }, merge = "mean" })
    refused("1 heads cannot be split over 2 branches", lac.attention,
            { variant = "dilated", heads = 1, segments = { 4, 8 }, dilations = { 1, 2 } })
    refused("heads must be a multiple of kv_heads: 3 %% 2 = 1",
            lac.attention, { variant = "dense", heads = 3, kv_heads = 2 })
    refused("unknown option 'drop', did you mean 'dropout'",
            lac.attention, { variant = "dense", heads = 1, drop = 1 })
    refused("unknown option 'bias'",
            lac.attention, { variant = "dense", heads = 1, bias = true })
  end)

  it("refuses options that are written into it, where they would change nothing", function()
    local attn = lac.attention { variant = "dense", heads = 1 }
    refused("there is no field 'causal' to set; make another: .*:with{ causal = ",
      function() attn.causal = true end)
    refused("there is no field 'casual' to set", function() attn.casual = true end)
    attn.training = false
    assert.is_false(attn.training)
    assert.is_true(lac.attention(attn.options:with { causal = true }).options.causal)
  end)

  it("checks the heads of its inputs, and names itself in errors", function()
    local attn = lac.attention { variant = "dense", heads = 4 }
    local x = lac.zeros { 1, 4, 2, 2 }
    refused("q has 2 heads, the module has 4: .*%[attention%(dense%), tests/attention_spec.lua:%d+%]$",
            attn, x, x, x)
  end)

  it("says what a record of a variant cannot have", function()
    local variants = lac.attention.variants
    local function build() return {} end
    refused("variant 'test_x': unknown option 'bild', did you mean 'build'", variants.add, variants, "test_x",
      { bild = build })
    refused("variant 'test_x': build is required", variants.add, variants, "test_x", { doc = "none" })
    refused("variant 'test_x': mask must be true or false, got 1", variants.replace, variants, "test_x",
      { build = build, mask = 1 })
    refused("options must be a table, got a function", variants.add, variants, "test_x", build)
    assert.error_matches(function() variants:get "test_x" end, "unknown variant 'test_x'")
  end)

  it("takes new variants from scripts", function()
    local record = {
      doc = "a window",
      options = { reach = { type = "integer", min = 1, required = true } },
      build = function(o) return { segments = { 2 ^ 40 }, dilations = { 1 }, window = o.reach } end,
    }
    local variants = lac.attention.variants
    variants:add("test_local", record)
    local attn = lac.attention { variant = "test_local", heads = 1, reach = 2 }
    assert.matches("window 2, reach 2%)$", tostring(attn))
    variants:replace("test_local", { build = function() return 3 end })
    refused("build of variant 'test_local' must return a table of segments, .* got 3", lac.attention,
            { variant = "test_local", heads = 1 })
    assert.matches("window 2", tostring(attn)) -- it keeps what it was made from
    variants:replace("test_local", record)
    refused("reach is required", lac.attention, { variant = "test_local", heads = 1 })
    refused("already registered; :replace puts another in its place",
      function() lac.attention.variants:add("dense", {}) end)
  end)
end)
