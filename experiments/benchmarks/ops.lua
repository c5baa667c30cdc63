--- ops.lua: sorting, indexing, convolutions and losses beside PyTorch's, and losses beside a copy.
--
-- The sizes are those of language models: vocabularies for top-k, tables and losses, a few hundred channels
-- for convolutions. Backwards are the gradient alone: the forward is recorded once and kept. Cross-entropy
-- must read the logits once (and its gradient read and write them), so it is also measured against a copy of
-- arrays beyond the caches: a share of 1 / 1.3 of its bandwidth is the target.
--
-- Short rows: what is done once for a row had cost 45 to 70 ns, most of it for a row of 4 or 64. Now maps
-- walk strips of many rows, with the row that is there again for all of them repeated once; sums of at most
-- 16 run side by side; truth values are bytes; padding moves runs; x^3 is a product. Before and after, 2^20
-- elements, one core of an EPYC (Zen 3), of PyTorch's time: [262144, 4] - [4] 17.3 and 0.19, [16384, 64] -
-- [64] 5.6 and 1.3, sums of [262144, 4] by rows 6.7 and 0.43, maxima 7.6 and 0.75, max_pool1d of 4 14.5 and
-- 1.5 to 2.5, logical_or 29 and 1.1, x^3 28 and 1.1, tile 10.5 and 1.0, kron with [2, 2] 13 and 3.7 to 7,
-- scatter_add of the last axis 7.0 and 1.9, bincount 4.3 and 2.5. Later: sums of f32 by rows of 64 27 ns a
-- row where they took 76 and PyTorch, which adds up in f32 where we have f64, takes 7.6; maxima 12, 49 and
-- 9.0.
--
-- What went element by element, nanoseconds an element before and after, one core of an EPYC (Zen 3): fmod 15
-- and 1.3, floor_divide 21 and 1.3, atan2 28 and 4.0, tan 18 and 2.1, erfinv 168 and 3.4, lgamma 103 and 6.8,
-- digamma 108 and 4.6, f32 to i32 2.4 and 0.8, to u8 7.9 and 0.7, arange 1.1 and 0.6, linspace 14 and 2.2,
-- roll of 2^20 by 5 2.8 and 0.5; gradients of gather 20 and 2.2 and of index_select 60 and 0.9 and index_add
-- 60 and 1.2, along a last axis of 256; cdist of [512, 64] and [512, 64] 109 and 13 a pair. index_add and
-- embedding's gradient of 262,144 rows of 64 that lie in any order: 89% of the time went into waiting for
-- rows, which are asked for eight ahead now: to 16, 1000 and 65,536 rows 4.6, 5.6, 7.4 and 6.1, 6.9, 9.4
-- before, 1.5, 1.5, 2.3 and 1.4, 1.6, 2.7 with it; PyTorch 3.7, 4.0, 4.4 and 4.2, 2.8, 9.9.

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

local function short_rows(b)
  local n = b:size(2 ^ 18, 64)
  local x, y, wide = lac.randn { n, 4 }, lac.randn { 4 }, lac.randn { n / 16, 64 }
  local gain, last = lac.randn { 64 }, lac.randn { n / 64, 256 }
  local at = lac.randint { n / 64, 256, low = 0, high = 256 }
  local mask, other = x:gt(0), x:lt(1)
  local a = { rows = n }
  row(b, ("subtract [4] from [%d, 4]"):format(n), "subtract", a, function() return x - y end, 1)
  row(b, ("multiply [%d, 64] by [64]"):format(n / 16), "multiply", a, function()
    return wide * gain
  end)
  row(b, ("sum of [%d, 4] by rows"):format(n), "sum_short", a, function() return x:sum(2) end, 1)
  row(b, ("max_pool1d of 4, [%d, 64]"):format(n / 16), "max_pool1d", a, function()
    return lac.max_pool1d(wide, 4)
  end)
  row(b, "logical_and", "logical_and", a, function() return mask:logical_and(other) end)
  row(b, ("scatter_add, last axis of [%d, 256]"):format(n / 64), "scatter_last", a, function()
    return last:scatter_add(2, at, last)
  end)
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
    short_rows(b)
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
