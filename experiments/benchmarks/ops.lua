--- ops.lua: sorting, indexing, convolutions and losses beside PyTorch's, and losses beside a copy.
--
-- The sizes are those of language models: vocabularies for top-k, tables and losses, a few hundred channels
-- for convolutions. Backwards are the gradient alone: the forward is recorded once and kept. Cross-entropy
-- must read the logits once (and its gradient read and write them), so it is also measured against a copy of
-- arrays beyond the caches: a share of 1 / 1.3 of its bandwidth is the target.

local lac = require "lacuna"

local function backward(inputs, out)
  local g = lac.randn(out:size())
  return function() lac.grad(out, inputs, { grad_outputs = { g }, retain_graph = true }) end
end

local function row(b, what, case, arguments, ours, target)
  b:row { what = what, ours = ours, peer = { script = "ops", case = case, arguments = arguments },
          at_least = target }
end

local function sorting(b)
  local n = b:size(4096, 64)
  local x = lac.randn { 256, n }
  row(b, ("sort [256, %d]"):format(n), "sort", { rows = 256, n = n }, function() return x:sort() end, 1)
  local long = lac.randn { b:size(2 ^ 20, 2 ^ 10) }
  row(b, "sort [2^20]", "sort", { rows = 1, n = long:size(1) }, function() return long:sort() end, 1)
  local v = b:size(50304, 500)
  local logits = lac.randn { 64, v }
  for _, k in ipairs { 8, 200 } do
    row(b, ("topk %d of [64, %d]"):format(k, v), "topk", { rows = 64, n = v, k = k },
        function() return logits:topk(k) end, 1)
  end
end

local function indexing(b)
  local rows, n, width = b:size(4096, 64), b:size(16384, 64), 64
  local base = lac.zeros { rows, width }
  local idx, source = lac.randint { n, width, low = 0, high = rows }, lac.randn { n, width }
  row(b, ("scatter_add [%d, %d] into [%d, %d]"):format(n, width, rows, width), "scatter_add",
      { rows = rows, n = n, width = width }, function() return base:scatter_add(1, idx, source) end, 1)
  rows, n, width = b:size(50304, 500), b:size(8192, 64), 256
  local weight = lac.randn { rows, width, grad = true }
  local out = lac.embedding(weight, lac.randint { n, low = 0, high = rows })
  row(b, ("embedding backward, %d rows of [%d, %d]"):format(n, rows, width), "embedding_backward",
      { rows = rows, width = width, tokens = n }, backward({ weight }, out), 1)
end

local function convolution(b, batch, channels, n, kernel, groups)
  local a = { batch = batch, channels = channels, n = n, kernel = kernel, groups = groups }
  local x, w = lac.randn { batch, channels, n, grad = true }, lac.randn { channels, channels / groups, kernel,
                                                                       grad = true }
  local o = { padding = math.floor(kernel / 2), groups = groups }
  local what = ("conv1d [%d, %d, %d], %d taps, %d groups"):format(batch, channels, n, kernel, groups)
  row(b, what, "conv1d", a, function() return lac.conv1d(x:detach(), w:detach(), nil, o) end, 1)
  row(b, what .. ", bwd", "conv1d_backward", a, backward({ x, w }, lac.conv1d(x, w, nil, o)), 1)
end

local function losses(b)
  local rows, classes = b:size(512, 16), b:size(50304, 64)
  local x, target = lac.randn { rows, classes, grad = true }, lac.randint { rows, low = 0, high = classes }
  local what, bytes = ("cross_entropy [%d, %d]"):format(rows, classes), 4 * rows * classes
  local function forward() return lac.cross_entropy(x:detach(), target) end
  local loss = lac.cross_entropy(x, target)
  local function gradient() lac.grad(loss, { x }, { retain_graph = true }) end
  local a = { rows = rows, classes = classes }
  row(b, what, "cross_entropy", a, forward, 1)
  row(b, what .. ", bwd", "cross_entropy_backward", a, gradient, 1)
  b:row { what = what, ours = forward, work = bytes, unit = "B/s", floor = "copy", as = "share",
          at_least = 1 / 1.3 }
  b:row { what = what .. ", bwd", ours = gradient, work = 2 * bytes, unit = "B/s", floor = "copy",
    as = "share",
          at_least = 1 / 1.3 }
end

return {
  name = "ops",
  about = "sorting, indexing, convolutions and losses",
  run = function(b)
    sorting(b)
    indexing(b)
    convolution(b, 8, b:size(256, 8), b:size(2048, 32), 3, 1)
    convolution(b, 8, b:size(512, 8), b:size(2048, 32), 5, b:size(512, 8))
    losses(b)
    local n = b:size(256, 16)
    local q, k = lac.randn { 4, n, 8, 64 }, lac.randn { 4, n, 8, 64 }
    row(b, ("einsum bnhd,bmhd->bhnm, n %d"):format(n), "einsum", { batch = 4, n = n, heads = 8, width = 64 },
        function() return lac.einsum("bnhd,bmhd->bhnm", q, k) end)
  end,
}
