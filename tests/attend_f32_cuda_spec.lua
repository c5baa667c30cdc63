--- Attention in f32 on CUDA, without TF32: as exact as a naive program in f32.
--
-- Products of f32 are taken apart and run on tensor cores (kernels/attn_parts.cuh), on Hopper by kernels of
-- its own unless a script asks for the portable ones. So the rule of cases.compare is asked here of what
-- other specs are too small for: many keys, all head dimensions, softmax from flat to one key a row. Exact is
-- attention in f64, which is multiply-adds and which attend_cuda holds against the oracle; naive is a program
-- of matmul and softmax in f32. Then values at the ends of f32, and views.

local attn_device = require "support.attn_device"
local it = attn_device.it(it, pending)

local attn = require "support.attn_random"
local cases = require "support.cases"
local infinite = require "support.attn_infinite"
local direct = require "support.attn_direct"
local philox = require "support.philox"
local lac = require "lacuna"

local DEVICE, KERNELS = "cuda", { "auto", "portable" }

-- `lse`: weights are exp(s - lse) with lse in f32, as a backward that keeps no weights has them
local function naive(q, k, v, hidden, lse)
  local s = lac.matmul(q:transpose(2, 3), k:transpose(2, 3):transpose(3, 4)) / math.sqrt(q:size(4)) + hidden
  local p = lse and lac.exp(s - s:logsumexp(4):unsqueeze(4)) or lac.softmax(s, 4)
  return lac.matmul(p, v:transpose(2, 3)):transpose(2, 3)
end
-- the same with keys, and columns of all three, in another order: other sums, the same results
local function reordered(hidden, lse)
  return function(q, k, v)
    local columns = lac.randperm(q:size(4), { device = DEVICE })
    local keys = lac.randperm(k:size(2), { device = DEVICE })
    local function cut(x) return x:index_select(4, columns) end
    local out = naive(cut(q), cut(k):index_select(2, keys), cut(v):index_select(2, keys),
      hidden:index_select(2, keys), lse)
    return out:index_select(4, columns:argsort())
  end
end

local function plain(t)
  return t:to{ device = "cpu", dtype = "f64" }:contiguous():view(t:numel()):totable()
end

-- The rule of cases.compare, by tensors: nil, or a sentence. The naive error is that of the worst of several
-- programs: luck of one is no measure.
local function problem(got, exact, programs, name)
  local function far(t) return (t[name]:to{ dtype = "f64" } - exact[name]):abs():max():item() end
  local error, allowed = far(got), 0
  for _, program in ipairs(programs) do allowed = math.max(allowed, far(program)) end
  local bound = 2 * allowed + 2 * cases.epsilon "f32" * exact[name]:abs():max():item()
  if error <= bound then return end -- nor is nan
  return ("the error is %.3g, the naive programs' %.3g"):format(error, allowed)
end

-- out, dq, dk, dv of f
local function results(f, x, dout, dtype)
  local at = {}
  for i = 1, 3 do at[i] = x[i]:to{ dtype = dtype }:requires_grad_(true) end
  local out = f(at[1], at[2], at[3])
  local d = lac.grad(out, at, { grad_outputs = { dout:to{ dtype = dtype } } })
  return { out = out:detach(), dq = d[1], dk = d[2], dv = d[3] }
end

local function drawn(n, heads, head_dim, peak)
  local x = {}
  for i = 1, 4 do x[i] = lac.randn({ 1, n, heads, head_dim }, { device = DEVICE }) end
  x[1] = x[1] * peak
  return x, table.remove(x)
end

local function attention(n, causal, kernel)
  return function(q, k, v)
    return lac.attend(q, k, v, { segments = { n }, dilations = { 1 }, causal = causal, return_lse = false,
                                 kernel = kernel })
  end
end

-- any valid configuration whose branches have 64 rows a segment: others are left to the portable kernels
local function wide_config(most)
  while true do
    local c = attn.random_config{ most = most, segment = most, heads = 2,
                                  D = attn.pick{ 64, 128, 4 * attn.random(32) } }
    local least = most
    for g, segment in ipairs(c.segments) do
      least = math.min(least, math.ceil(math.min(segment, c.N) / c.dilations[g]))
    end
    if least >= 64 then return c end
  end
end

describe("attention in f32 on CUDA #gpu", function()
  local unharmed = attn_device.guard(setup, teardown)

  it("equals the CPU in 60 random configurations of long branches", function()
    local seed = attn.fresh()
    attn.seed(seed)
    for trial = 1, 60 do
      local c = wide_config(trial % 4 == 0 and 900 or 400)
      local lists = attn_device.inputs(c, seed + trial, "f32", true)
      local got = attn.run(direct.C.LAC_CUDA, "f32", c, lists, attn.pick{ false, "heads" } or nil)
      local exact, rounded = attn_device.cpu(attn.run, c, "f32", lists)
      attn_device.judge("f32", got, exact, rounded,
        ("trial %d of seed %d: %s"):format(trial, seed, attn.text(c)))
    end
  end)

  it("is as exact as a naive program, from flat to peaked softmax", function()
    lac.manual_seed(29)
    for _, head_dim in ipairs{ 8, 16, 40, 64, 72, 96, 128 } do
      for _, n in ipairs{ 50, 512, 3000 } do
        for _, peak in ipairs{ 0.1, 1, 6, 40 } do
          lac.scope(function()
            local causal = n % 100 == 12 or n == 50
            local x, dout = drawn(n, n > 1000 and 1 or 4, head_dim, peak)
            local hidden = lac.zeros({ n, n }, { device = DEVICE })
            if causal then
              local at = lac.arange(0, n, { device = DEVICE, dtype = "f32" })
              hidden = lac.where(at:view(1, n):gt(at:view(n, 1)), -math.huge, 0)
            end
            local exact = results(attention(n, causal), x, dout, "f64")
            local others = {}
            for i = 1, 6 do others[i] = results(reordered(hidden, i % 2 == 0), x, dout, "f32") end
            for _, kernel in ipairs(KERNELS) do
              local got = results(attention(n, causal, kernel), x, dout, "f32")
              if peak > 6 then got = { out = got.out } end -- lse in f32 is the backward's limit there
              for name in pairs(got) do
                local why = problem(got, exact, others, name)
                assert(not why, ("%s, %s, D %d, %d rows, peak %g: %s"):format(
                  kernel, name, head_dim, n, peak, why))
              end
            end
          end)
        end
      end
    end
  end)

  it("gives dq and dk exactly zero where a row sees one key", function()
    lac.manual_seed(30)
    for _, head_dim in ipairs{ 16, 72, 128 } do
      for _, kernel in ipairs(KERNELS) do
        local x, dout = drawn(300, 2, head_dim, 1)
        local got = results(function(q, k, v)
          return lac.attend(q, k, v, { segments = { 300 }, dilations = { 1 }, causal = true, window = 0,
                                       return_lse = false, kernel = kernel })
        end, x, dout, "f32")
        assert.are.equal(0, got.dq:abs():max():item())
        assert.are.equal(0, got.dk:abs():max():item())
        assert.are.equal(0, (got.out - x[3]):abs():max():item())
      end
    end
  end)

  it("gives what f64 gives where a value is not finite, or near the largest", function()
    lac.manual_seed(31)
    for _, head_dim in ipairs{ 40, 64, 128 } do
      for _, case in ipairs{ { 1, 0 / 0 }, { 2, math.huge }, { 2, -math.huge }, { 2, 0 / 0 }, { 3, 0 / 0 },
                             { 3, math.huge }, { 3, -math.huge }, { 3, 3.4e38 }, { 3, -3.4e38 } } do
        for _, causal in ipairs{ true, false } do
          local which, bad = unpack(case)
          local x, wide = drawn(200, 1, head_dim, 1), {}
          x[which]:narrow(2, 120, 1):narrow(4, 3, 1):fill_(bad)
          for i = 1, 3 do wide[i] = x[i]:to{ dtype = "f64" } end
          local exact = plain(attention(200, causal)(wide[1], wide[2], wide[3]))
          for _, kernel in ipairs(KERNELS) do
            local got = plain(attention(200, causal, kernel)(x[1], x[2], x[3]))
            for i = 1, #got do
              local g, e = got[i], exact[i]
              local near = math.abs(g - e) < 1e-5 * math.max(1, math.abs(e))
              assert(g == e or (g ~= g and e ~= e) or near,
                ("%s, D %d with %g in input %d: element %d is %g, not %g"):format(
                  kernel, head_dim, bad, which, i, g, e))
            end
          end
        end
      end
    end
  end)

  -- Taken apart, such a key has no score, and its weight is not a number: in the sum of weights only, where
  -- dropout drops the pair.
  it("leaves a key out whose score is -inf, also where the pair is dropped", function()
    for trial = 1, 8 do
      local N, D = trial % 2 == 0 and 128 or 200, ({ 8, 64, 100, 128 })[math.ceil(trial / 2)]
      local c = direct.fill { N = N, H = 1, D = D, segments = { N }, dilations = { 1 }, causal = true,
                              dropout = 0.3, rng_offset = 5, seed = 0 }
      repeat c.seed = c.seed + 1 until not philox.keep(c)(0, 0, N - 1, N - 1) -- the one row that sees the key
      local lists = { attn.inputs(c, trial, "f32") }
      lists[5] = nil
      local score = (N - 1) * D + 3
      lists[1][score] = 1
      for _, kernel in ipairs(KERNELS) do
        c.kernel = kernel
        lists[2][score] = -1e6 -- the weight is 0 as well
        local want = attn_device.both(direct.C.LAC_CUDA, "f32", c, lists)
        lists[2][score] = -math.huge
        local got = attn_device.both(direct.C.LAC_CUDA, "f32", c, lists)
        for _, name in ipairs { "out", "lse", "dk", "dv" } do
          local found = direct.max_diff(got[name], want[name])
          assert(found <= 2e-6 * (1 + direct.largest(want[name])),
            ("%s by %s is off by %g: %s"):format(name, kernel, found, attn.text(c)))
        end
      end
    end
  end)

  -- also where branches have a softmax each, whose weights the backward sums up again
  it("gives such a key no part in gradients but 0 times infinity, as in f64", function()
    for _, D in ipairs { 8, 64, 128, 200 } do
      for _, N in ipairs { 24, 200 } do
        infinite.each(D, N, false, function(c)
          infinite.check(c, "f64", infinite.on(direct.C.LAC_CUDA), infinite.cpu)
          for _, kernel in ipairs(KERNELS) do
            c.kernel = kernel
            infinite.check(c, "f32", infinite.on(direct.C.LAC_CUDA), infinite.cpu)
          end
        end)
      end
    end
  end)

  it("is as exact for small numbers, to 2^-110", function()
    lac.manual_seed(32)
    local x = drawn(300, 2, 64, 1)
    x[3] = x[3] * 2 ^ -105
    local wide = {}
    for i = 1, 3 do wide[i] = x[i]:to{ dtype = "f64" } end
    local exact = attention(300)(wide[1], wide[2], wide[3])
    local rounded = naive(x[1], x[2], x[3], 0)
    for _, kernel in ipairs(KERNELS) do
      local got = attention(300, false, kernel)(x[1], x[2], x[3])
      assert.is_nil(problem({ out = got }, { out = exact }, { { out = rounded } }, "out"))
    end
  end)

  -- a row that begins off a multiple of 16 bytes, columns apart, keys and values of fewer heads
  it("takes views as they are, forward and backward, and gives the same bits twice", function()
    lac.manual_seed(33)
    for _, head_dim in ipairs{ 24, 64, 100, 128 } do
      for _, view in ipairs{ "whole", "shifted", "columns", "rows" } do
        local x = {}
        for i = 1, 4 do
          local heads, d, n = (i == 1 or i == 4) and 4 or 2, head_dim, 333
          if view == "shifted" then
            x[i] = lac.randn({ 1, n, heads, d + 1 }, { device = DEVICE }):narrow(4, 2, d)
          elseif view == "columns" then
            x[i] = lac.randn({ 1, n, d, heads }, { device = DEVICE }):transpose(3, 4)
          elseif view == "rows" then
            x[i] = lac.randn({ 1, heads, n, d }, { device = DEVICE }):transpose(2, 3)
          else x[i] = lac.randn({ 1, n, heads, d }, { device = DEVICE }) end
        end
        local dout = table.remove(x)
        local options = { segments = { 128, 333 }, dilations = { 1, 3 }, heads = "all", merge = "lse",
                          causal = true, return_lse = false }
        local function f(q, k, v) return lac.attend(q, k, v, options) end
        local got, again = results(f, x, dout, "f32"), results(f, x, dout, "f32")
        local exact = results(f, x, dout, "f64")
        options.kernel = "portable"
        local other = results(f, x, dout, "f32")
        for name in pairs(got) do
          assert.are.equal(0, (got[name] - again[name]):abs():max():item())
          local why = problem(got, exact, { other }, name)
          assert(not why, ("%s of %s, D %d: %s"):format(name, view, head_dim, why))
        end
      end
    end
  end)

  it("unharmed: no guard byte was written over", unharmed)
end)
