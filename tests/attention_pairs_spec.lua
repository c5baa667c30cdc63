--- mask, bias and alibi of lac.attend and of modules: what Lua adds to the engine (support by autograd,
-- slopes, weights, messages). The arithmetic is tested in attend_pairs_spec.

local lac = require "lacuna"

local function qkv(B, N, M, H, D)
  local options = { dtype = "f64", grad = true }
  return lac.randn({ B, N, H, D }, options), lac.randn({ B, M, H, D }, options),
    lac.randn({ B, M, H, D }, options)
end
local DENSE = { segments = { 64 }, dilations = { 1 } }
local function dense(options)
  local o = { segments = DENSE.segments, dilations = DENSE.dilations }
  for key, value in pairs(options) do o[key] = value end
  return o
end

-- softmax of dense scores
local function naive(q, k, v, bias)
  local D = q:size(4)
  local s = lac.matmul(q:transpose(2, 3), k:transpose(2, 3):transpose(3, 4)) / math.sqrt(D) + bias
  return lac.matmul(lac.softmax(s, 4), v:transpose(2, 3)):transpose(2, 3)
end

local function close(a, b, tolerance)
  assert.is_true((a - b):abs():max():item() < (tolerance or 1e-12))
end

describe("mask, bias and alibi", function()
  setup(function() lac.manual_seed(11) end)

  it("give what softmax over dense scores gives, and its gradients", function()
    local q, k, v = qkv(2, 7, 9, 3, 4)
    local bias = lac.randn({ 3, 7, 9 }, { dtype = "f64", grad = true })
    local weight = lac.randn({ 2, 7, 3, 4 }, { dtype = "f64" })
    local inputs = { q, k, v, bias }
    local first = {}
    for turn = 1, 2 do
      for _, t in ipairs(inputs) do t.grad = nil end
      local out = turn == 1 and lac.attend(q, k, v, dense { bias = bias, return_lse = false })
        or naive(q, k, v, bias)
      local loss = (out * weight):sum()
      loss:backward()
      for i, t in ipairs(inputs) do
        if turn == 1 then first[i] = t.grad:clone() else close(first[i], t.grad) end
      end
    end
  end)

  it("make what they keep for the next call again if a scope has released it", function()
    local q, k, v = qkv(1, 40, 40, 2, 4)
    for _, options in ipairs { { alibi = true }, { alibi = { 0.3, 0.2 } },
      { block_mask = lac.attention.masks.local_window(16), block = 16 } } do
      local function run() return (lac.attend(q, k, v, dense(options))) end
      collectgarbage "stop" -- it might find what is released before the next call does
      finally(function() collectgarbage "restart" end)
      local sums = {}
      for i = 1, 3 do sums[i] = lac.scope(function() return run():sum():item() end) end
      assert.are.same({ sums[1], sums[1], sums[1] }, sums)
    end
  end)

  it("pass the gradient check with a bias, a mask, slopes and several branches", function()
    for _, merge in ipairs { "lse", "mean" } do
      local q, k, v = qkv(1, 6, 6, 2, 3)
      local bias = lac.randn({ 6, 6 }, { dtype = "f64", grad = true })
      local mask = lac.rand({ 2, 6, 6 }):ge(0.3)
      assert.is_true(lac.gradcheck(function(a, b, c, d)
        return lac.attend(a, b, c, { segments = { 4, 8 }, dilations = { 1, 2 }, merge = merge, mask = mask,
          bias = d, alibi = true, return_lse = false })
      end, { q, k, v, bias }))
    end
  end)

  it("leave out what the mask leaves out", function()
    local q, k, v = qkv(1, 5, 5, 2, 4)
    local lower = lac.ones({ 5, 5 }):tril():ge(0.5)
    close((lac.attend(q, k, v, dense { mask = lower })), (lac.attend(q, k, v, dense { causal = true })))
    local _, _, weights = lac.attend(q, k, v, dense { mask = lower, need_weights = true })
    assert.equal(0, weights[{ 1, 1, 1, 2 }]:item())
    assert.is_true(weights[{ 1, 1, 2, 1 }]:item() > 0)
  end)

  it("take slopes as true, a list or a tensor, which a bias of distances equals", function()
    for _, heads in ipairs { 4, 3 } do
      local slopes = lac.alibi_slopes(heads):totable()
      local q, k, v = qkv(2, 6, 8, heads, 4)
      local p = lac.arange(2, 8, { dtype = "f64" }):view(6, 1)
      local j = lac.arange(0, 8, { dtype = "f64" }):view(1, 8)
      local t = lac.tensor(slopes, { dtype = "f64" })
      local far = (p - j):abs() * t:view(heads, 1, 1)
      local want = lac.attend(q, k, v, dense { align = "end", bias = -far })
      for _, value in ipairs { true, slopes, t } do
        close((lac.attend(q, k, v, dense { align = "end", alibi = value })), want)
      end
      local module = lac.attention { variant = "dense", heads = heads, alibi = true }
      close((module(q, k, v)), (lac.attend(q, k, v, dense { alibi = true })))
    end
  end)

  it("run active blocks only, and packed sequences as if alone", function()
    local q, k, v = qkv(1, 40, 40, 2, 4)
    local on = lac.tensor { { true, false, true }, { false, true, false }, { true, true, true } }
    local mask = on:view(3, 1, 3, 1):expand(3, 16, 3, 16):reshape(48, 48):narrow(1, 1, 40):narrow(2, 1, 40)
    close((lac.attend(q, k, v, dense { block_mask = on, block = 16 })),
      (lac.attend(q, k, v, dense { mask = mask })))
    local starts = { 0, 7, 7, 30, 40 }
    local all = lac.attend(q, k, v, dense { cu_seqlens = starts, causal = true })
    local listed = lac.tensor(starts, { dtype = "i32" })
    close((lac.attend(q, k, v, dense { cu_seqlens = listed, causal = true })), all)
    for s = 1, 4 do
      local n = starts[s + 1] - starts[s]
      if n > 0 then
        local function part(t) return t:narrow(2, starts[s] + 1, n) end
        close((lac.attend(part(q), part(k), part(v), dense { causal = true })), part(all))
      end
    end
    assert.is_true(lac.gradcheck(function(a, b, c)
      return lac.attend(a, b, c, { segments = { 4, 9 }, dilations = { 1, 2 }, cu_seqlens = { 0, 4, 10, 16 },
        return_lse = false })
    end, { qkv(1, 16, 16, 2, 2) }))
  end)

  it("train a bias: attention learns to copy the previous position", function()
    local N, rate = 12, 0.3
    local bias = lac.zeros({ N, N }, { grad = true })
    local first, last
    for step = 1, 60 do
      local q, k, v = lac.zeros { 4, N, 1, 8 }, lac.zeros { 4, N, 1, 8 }, lac.randn { 4, N, 1, 8 }
      local out = lac.attend(q, k, v, dense { bias = bias, return_lse = false })
      local loss = (out:narrow(2, 2, N - 1) - v:narrow(2, 1, N - 1)):square():mean()
      first, last = first or loss:item(), loss:item()
      loss:backward()
      lac.no_grad(function() bias:sub_(bias.grad * (rate * N * 10)) end)
      bias.grad = nil
      if step == 60 then assert.is_true(bias[{ 5, 4 }]:item() > bias[{ 5, 7 }]:item() + 1) end
    end
    assert.is_true(last < 0.3 * first, ("%g -> %g"):format(first, last))
  end)

  it("are refused where they make no sense", function()
    local q, k, v = qkv(1, 4, 4, 2, 4)
    local function message(options)
      local ok, text = pcall(lac.attend, q, k, v, dense(options))
      assert.is_false(ok)
      return tostring(text)
    end
    assert.matches("mask has 3 queries, the plan has 4 %(mask is %[3, 4%]%)",
      message { mask = lac.ones({ 3, 4 }):ge(0) })
    assert.matches("bias must be f64 like q, got f32",
      message { bias = lac.zeros({ 4, 4 }, { dtype = "f32" }) })
    assert.matches("alibi must have a slope for each of the 2 heads, got f64 %[1%]",
      message { alibi = { 0.5 } })
    assert.matches("alibi has no gradient; make a bias of learned slopes",
      message { alibi = lac.ones({ 2 }, { dtype = "f64", grad = true }) })
    assert.matches("cu_seqlens must run from 0 to the 4 rows of q, got 0 to 3",
      message { cu_seqlens = { 0, 3 } })
    assert.matches("must be a list of integers", message { cu_seqlens = { 0, 1.5 } })
    assert.matches("must be i64 or i32", message { cu_seqlens = lac.zeros { 3 } })
    assert.matches("must be a list of finite numbers", message { alibi = { 1, math.huge } })
    assert.matches("changed", (function() -- in place, between forward and backward
      local bias = lac.zeros({ 4, 4 }, { dtype = "f64", grad = true })
      local loss = lac.attend(q, k, v, dense { bias = bias, return_lse = false }):sum()
      lac.no_grad(function() bias:add_(1) end)
      local ok, text = pcall(loss.backward, loss)
      return not ok and tostring(text) or "passed"
    end)())
  end)
end)
