--- The convolution where the cases of ops_spec do not reach: sizes, threads, modules; and the loss modules.
--
-- Several chunks and channel blocks against a sum of shifted products made of other operators; identities
-- that need no reference (a kernel of one position is a matrix product, "causal" sees no future, a delta
-- copies); the same bits for any number of threads.

local lac = require "lacuna"
local nn = lac.nn

-- sum over k of w[.., k] applied to shifted slices, by matmul
local function by_slices(x, w, dilation)
  local K, L = w:size(3), x:size(3) - dilation * (w:size(3) - 1)
  local out
  for k = 1, K do
    local part = lac.matmul(w:select(3, k), x:narrow(3, 1 + (k - 1) * dilation, L))
    out = out and out + part or part
  end
  return out
end

local function close(a, b)
  return (a - b):abs():max():item() <= 1e-4 * math.max(1, b:abs():max():item())
end

describe("conv1d", function()
  it("agrees with products of slices over several chunks and channel blocks, forward and backward", function()
    lac.manual_seed(1)
    for _, dilation in ipairs { 1, 5 } do
      local x, w = lac.randn { 2, 150, 1300, grad = true }, lac.randn { 70, 150, 3, std = 0.1, grad = true }
      local y = lac.conv1d(x, w, nil, { dilation = dilation })
      local weights = lac.randn(y:size())
      local a = lac.grad(y * 1, { x, w }, { grad_outputs = { weights } })
      local z = by_slices(x, w, dilation)
      local b = lac.grad(z, { x, w }, { grad_outputs = { weights } })
      assert.is_true(close(y:detach(), z:detach()))
      assert.is_true(close(a[1], b[1]))
      assert.is_true(close(a[2], b[2]))
    end
  end)

  it("does not depend on the number of threads", function()
    lac.manual_seed(2)
    local threads, results = lac.threads(), {}
    local x, w = lac.randn { 3, 40, 2000, grad = true }, lac.randn { 20, 20, 5, grad = true }
    local dx, dw = lac.randn { 3, 24, 3000, grad = true }, lac.randn { 24, 1, 4, grad = true }
    for _, n in ipairs { 1, 3 } do
      lac.threads(n)
      local y = lac.conv1d(x, w, nil, { stride = 2, groups = 2, padding = 2 })
      local d = lac.conv1d(dx, dw, nil, { groups = 24, padding = "causal" })
      local g = lac.grad(y:square():sum() + d:square():sum(), { x, w, dx, dw })
      results[#results + 1] = y:string() .. d:string() .. g[1]:string() .. g[2]:string() .. g[3]:string()
        .. g[4]:string()
    end
    lac.threads(threads)
    assert.are.equal(results[1], results[2])
  end)

  it("sees no future when causal, and copies with a delta", function()
    local x = lac.randn { 1, 2, 50, grad = true }
    local w = lac.randn { 2, 2, 4 }
    local y = lac.conv1d(x, w, nil, { padding = "causal", dilation = 3 })
    assert.are.same({ 1, 2, 50 }, { unpack(y:size()) })
    y:select(3, 20):sum():backward()
    assert.are.equal(0, x.grad:narrow(3, 21, 30):abs():max():item())
    local delta = lac.tensor { { { 0, 1, 0 } }, { { 0, 1, 0 } } }
    assert.is_true(lac.equal(x:detach(), lac.conv1d(x:detach(), delta, nil, { padding = "same",
      groups = 2 })))
  end)

  it("is a module that says what it is", function()
    lac.manual_seed(3)
    local conv = nn.Conv1d(4, 6, 3, { padding = "causal", dilation = 2, groups = 2 })
    assert.are.equal("Conv1d(4 -> 6, kernel 3, dilation 2, groups 2, padding causal)",
      (tostring(conv):gsub("\n.*", "")))
    local x = lac.randn { 2, 4, 9 }
    assert.is_true(lac.equal(conv(x), lac.conv1d(x, conv.weight, conv.bias, { padding = "causal",
      dilation = 2,
                                                                              groups = 2 })))
    assert.has_error(function() conv(lac.randn { 2, 5, 9 }) end)
    assert.has_error(function() nn.Conv1d(4, 6, 3, { groups = 3 }) end)
    local linear = nn.Conv1d(4, 6, 1, { bias = false })
    local product = lac.einsum("bcn,oc->bon", x, linear.weight:squeeze(3))
    assert.is_true(close(linear(x):detach(), product:detach()))
  end)
end)

describe("loss modules", function()
  it("pass their options to their functions", function()
    lac.manual_seed(4)
    local x, y, t = lac.randn { 5, 4 }, lac.rand { 5, 4 }, lac.randint { 5, low = 0, high = 4 }
    local pairs_of = {
      { nn.CrossEntropyLoss { label_smoothing = 0.1 }, t, lac.cross_entropy(x, t,
        { label_smoothing = 0.1 }) },
      { nn.NLLLoss { reduction = "sum" }, t, lac.nll_loss(x, t, { reduction = "sum" }) },
      { nn.MSELoss(), y, lac.mse_loss(x, y) }, { nn.L1Loss(), y, lac.l1_loss(x, y) },
      { nn.HuberLoss { delta = 2 }, y, lac.huber_loss(x, y, { delta = 2 }) },
      { nn.SmoothL1Loss { beta = 2 }, y, lac.smooth_l1_loss(x, y, { beta = 2 }) },
      { nn.KLDivLoss { reduction = "batchmean" }, y, lac.kl_div(x, y, { reduction = "batchmean" }) },
      { nn.BCEWithLogitsLoss { pos_weight = 2 }, y,
        lac.binary_cross_entropy_with_logits(x, y, { pos_weight = 2 }) },
    }
    for _, p in ipairs(pairs_of) do assert.are.equal(p[3]:item(), p[1](x, p[2]):item()) end
    assert.are.equal("CrossEntropyLoss(label_smoothing 0.1)", tostring(pairs_of[1][1]))
    assert.has_error(function() nn.MSELoss { reductoin = "sum" } end)
  end)

  it("count what a target weighs, and nothing that is ignored", function()
    local x, t = lac.zeros { 4, 2 }, lac.tensor({ 0, 1, -100, 1 }, { dtype = "i64" })
    assert.is_true(math.abs(lac.cross_entropy(x, t):item() - math.log(2)) < 1e-6)
    assert.is_true(math.abs(lac.nll_loss(x:log_softmax(), t):item() - math.log(2)) < 1e-6)
    local w = lac.tensor { 3, 0 }
    assert.is_true(math.abs(lac.cross_entropy(x, t, { weight = w }):item() - math.log(2)) < 1e-6)
    assert.has_error(function() lac.cross_entropy(x, t, { weight = lac.ones { 2, grad = true } }) end)
  end)
end)
