--- cuda_pipelines.lua: dilated attention on a GPU against whole pipelines, from q, k, v to the merged output.
--
-- LongNet's pattern: 12 heads of 64, segments 2,048 to 32,768 at dilations 1 to 16, bf16. `torchscale` runs
-- every head in every branch and merges by log-sum-exp; `fkodom` divides the heads. The peers are their
-- pipelines in PyTorch round the faster of cuDNN's and FlashAttention-2's kernel (peers/cuda_pipelines.py).
-- Sides take turns in a new order each round, after some idle time and then without a pause ("sustained", see
-- Run:paces of bench.lua); times are medians over the rounds.
--
-- torchscale's merge weights are constants in its gradient. The exact gradient is judged; the row "detached"
-- is torchscale's own, and is compared with the peer's in value. fkodom's division by the sum of outputs is
-- left out of ours: there only cost is compared. Extra memory is what a forward and backward needs at its
-- peak beyond inputs, output, log-sum-exps and gradients, in percent of these, by the pool's count.

local lac = require "lacuna"
local bench = require "lacuna.bench"
local sys = require "lacuna.sys"

local PACE = { rounds = 11, idle = 0.02 }
local HEADS, HEAD_DIM = 12, 64

local PROJECTS = {
  { name = "torchscale", scheme = "all", pattern = { heads = "all", offset = "block", merge = "lse" },
    sizes = { 32768, 131072, 1048576 },
    forward = { [false] = { 5, 5, 5 }, [true] = { 6, 6, 6 } }, both = { 3.3, 3.3, 3.3 } },
  { name = "fkodom", scheme = "split", pattern = { heads = "split", offset = "branch", merge = "mean" },
    sizes = { 32768, 1048576 }, forward = { [false] = { 4, 1.8 }, [true] = {} }, both = { 5, 3.5 } },
}

local function tensors(n, options)
  local t = {}
  local sizes = { 1, n, HEADS, HEAD_DIM }
  for _, name in ipairs{ "q", "k", "v", "grad" } do t[name] = lac.randn(sizes, options) end
  return t
end

local function pattern_of(b, project, causal, detached)
  local p = { causal = causal, return_lse = false, segments = b:size({ 2048, 4096, 8192, 16384, 32768 },
    { 32, 64 }), dilations = b:size({ 1, 2, 4, 8, 16 }, { 1, 4 }) }
  for key, value in pairs(project.pattern) do p[key] = value end
  if detached then p.merge = "lse_detach" end
  return p
end

local function ours(t, pattern, backward)
  local inputs = { t.q:detach(), t.k:detach(), t.v:detach() }
  for _, x in ipairs(inputs) do x:requires_grad_(backward) end
  local out = lac.attend(inputs[1], inputs[2], inputs[3], pattern)
  if not backward then return out end
  return out, unpack(lac.grad(out, inputs, { grad_outputs = { t.grad } }))
end

-- several calls in a row, so that launches overlap, and a wait
local function repeated(fn, times)
  return function()
    for _ = 1, times do lac.scope(function() fn() end) end
    lac.synchronize()
  end
end

local function wide(x) return x:detach():to{ dtype = "f64" } end

-- largest relative difference from what the peer tells of its own results
local function difference(theirs, t, pattern, backward)
  return lac.scope(function()
    local out, dq, dk, dv = ours(t, pattern, backward)
    local o = wide(out)
    local norm = math.sqrt((o * o):sum():item())
    local worst = math.max(math.abs(norm - theirs.norm) / norm,
      math.abs((o * wide(t.grad)):sum():item() - theirs.dot) / (norm * math.sqrt(o:numel())))
    local sum = 0
    for _, g in ipairs{ dq, dk, dv } do
      local x = wide(g)
      sum = sum + (x * x):sum():item()
    end
    return backward and math.max(worst, math.abs(math.sqrt(sum) - theirs.gradient) / theirs.gradient) or worst
  end)
end

local function repeats(n) return n <= 32768 and 8 or n <= 131072 and 3 or 1 end

-- the peer's faster case, or nil and why there is none; what it tells of its results
local function fastest(b, arguments)
  local best, told, least
  for _, backend in ipairs{ "cudnn", "flash" } do
    arguments.backend = backend
    local side, info = b:case("cuda_pipelines", "attention", arguments)
    if not side then return nil, info end
    local time = side:turn(1e-9)
    if not least or time < least then
      if best then best:drop() end
      best, told, least = side, info, time
    else
      side:drop()
    end
  end
  return best, told
end

local function measured(b, o, t, data)
  local pattern = pattern_of(b, o.project, o.causal, o.detached)
  local what = ("%s, %d%s, %s%s"):format(o.project.name, o.n, o.causal and " causal" or "",
    o.backward and "forward + backward" or "forward", o.detached and ", detached" or "")
  local side, told = fastest(b, { scheme = o.project.scheme, data = data, sizes = { o.n, HEADS, HEAD_DIM },
    segments = pattern.segments, dilations = pattern.dilations, causal = o.causal, backward = o.backward,
    times = repeats(o.n) })
  if not side then return b:value{ what = what, problem = told, at_least = o.target } end
  local ms = 1e3 / repeats(o.n)
  local call = repeated(function() return ours(t, pattern, o.backward) end, repeats(o.n))
  for _, pace in ipairs(b:paces({ call, side }, PACE)) do
    local mine, theirs = unpack(pace.times)
    b:value{ what = ("%s%s: %.3g ms, theirs %.3g"):format(what, pace.name, mine * ms, theirs * ms),
      value = theirs / mine, unit = "x", at_least = o.target }
  end
  if data and o.project.scheme == "all" and o.detached == o.backward then
    b:value{ what = "  difference of results", value = difference(told, t, pattern, o.backward),
      at_most = 1e-2 }
  end
  if o.backward and not o.detached then
    local theirs = side:peak()
    local results = t.q:numel() * 2 * 4 + o.n * HEADS * 4
    local function extra(peak) return 100 * (peak - results) / results end
    local peak = bench.peak(function() lac.scope(function() ours(t, pattern, true) end) end)
    b:value{ what = "  extra memory", value = extra(peak), unit = "%", at_most = 2,
      other = theirs and extra(theirs) or nil, against = "of the peer's" }
  end
  side:drop()
end

local function sized(b, project, i, n, options, file)
  lac.scope(function()
    local t, data = tensors(n, options), nil
    if i == 1 then
      data = file
      lac.io.save(data, t)
    end
    for _, causal in ipairs{ false, true } do
      local function row(backward, detached, target)
        measured(b, { project = project, n = n, causal = causal, backward = backward, detached = detached,
          target = target }, t, data)
      end
      row(false, false, project.forward[causal][i])
      row(true, false, project.both[i])
      if project.scheme == "all" then row(true, true) end
    end
  end)
end

return {
  name = "cuda_pipelines",
  device = "cuda",
  about = "dilated attention against whole pipelines in PyTorch: H 12, D 64, bf16, segments 2k to 32k",
  once = true,
  run = function(b)
    local file = sys.temporary("-attention.safetensors")
    for _, project in ipairs(PROJECTS) do
      for i, n in ipairs(b:size(project.sizes, { 128 })) do
        sized(b, project, i, n, { dtype = "bf16" }, file)
      end
    end
    os.remove(file)
  end,
}
