--- pipelines.lua: dilated attention against two public implementations, from q, k, v to the merged output.
--
-- fkodom's dilated-attention-pytorch (heads divided over branches) and Microsoft's torchscale (every head in
-- every branch, merge weights constant in the gradient) are run from folders that the command line names; see
-- peers/pipelines.py for how they run on a CPU. Ours computes the same pattern. torchscale's result is the
-- same function, so output and gradients are compared; fkodom's divides each branch by the sum of its outputs
-- over the sequence, which ours does not do: only cost is compared there.
--
-- Extra memory is what a call needs at its peak beyond inputs, output and gradients: ours by the pool's
-- count, theirs by the growth of the resident set.
--
-- What bounds ours on one thread (EPYC, Zen 4, AVX-512, by `perf`, torchscale forward + backward): the
-- seven products are 82% of the time, at 111 to 113 GFLOP/s of the 117 that one multiply-add of 16 floats a
-- cycle gives. The rest is exponentials and what makes P and dS (6%), packing keys (3%), rows of q, of its
-- gradient and of results (5%), deltas and the merge. At 2.03 (1.99 to 2.07 in four turns; 1.92, 1.89 to
-- 1.94, before branches of eight segments were held whole), nothing could pass 2.5.
-- On a shared Xeon with the matrix unit, one run, one thread and two, while sgemm had 0.6 of what a core
-- has in a quiet hour: fkodom forward 1.60 and 1.97, with the backward 2.07 and 2.44; torchscale 2.29 and
-- 2.82, with the backward 1.70 and 1.98; extra memory 3.5 to 8.7%.

local lac = require "lacuna"
local bench = require "lacuna.bench"
local sys = require "lacuna.sys"

local PROJECTS = {
  { name = "fkodom", pattern = { heads = "split", offset = "branch", merge = "mean" } },
  { name = "torchscale", pattern = { heads = "all", offset = "block", merge = "lse_detach" }, same = true },
}

local function tensors(N, H, D)
  local t = {}
  for _, name in ipairs{ "q", "k", "v", "grad" } do t[name] = lac.randn{ 1, N, H, D } end
  return t
end

local function ours(t, pattern, backward)
  local q, k, v = t.q:detach(), t.k:detach(), t.v:detach()
  if backward then
    for _, x in ipairs{ q, k, v } do x:requires_grad_() end
  end
  local out = lac.attend(q, k, v, pattern)
  if not backward then return out end
  -- not out:backward(): the gradients of views of tensors from outside live on until the collector finds them
  return out, unpack(lac.grad(out, { q, k, v }, { grad_outputs = { t.grad } }))
end

local function compare_results(b, theirs, t, pattern, backward)
  local worst = lac.scope(function()
    local out, dq, dk, dv = ours(t, pattern, backward)
    local o = out:detach():to{ dtype = "f64" }
    local norm = math.sqrt((o * o):sum():item())
    local scale = norm * math.sqrt(o:numel()) -- of a dot product with a standard normal tensor
    local difference = math.max(math.abs(norm - theirs.norm) / norm,
      math.abs((o * t.grad:to{ dtype = "f64" }):sum():item() - theirs.dot) / scale)
    if backward then
      local sum = 0
      for _, g in ipairs{ dq, dk, dv } do
        local x = g:to{ dtype = "f64" }
        sum = sum + (x * x):sum():item()
      end
      difference = math.max(difference, math.abs(math.sqrt(sum) - theirs.gradient) / theirs.gradient)
    end
    return difference
  end)
  b:value{ what = "  difference of output and gradients", value = worst, at_most = 1e-4 }
end

local function memory_row(b, side, problem, project, t, pattern)
  local what = ("%s, extra memory of forward + backward"):format(project.name)
  if not side then return b:value{ what = what, problem = problem, unit = "%", at_most = 10 } end
  local size = 4 * t.q:numel()
  local peak = bench.peak(function() lac.scope(function() ours(t, pattern, true) end) end) - 4 * size
  local other, reason = side:peak()
  if not other then return b:value{ what = what, problem = reason, unit = "%", at_most = 10 } end
  other = other - 4 * size
  if other <= 0 then
    return b:value{ what = what, problem = "too small to see in the resident set", unit = "%", at_most = 10 }
  end
  b:value{ what = what, value = 100 * peak / other, unit = "%", at_most = 10, other = 100,
    against = ("= %.0f MB, ours %.1f MB"):format(other / 1e6, peak / 1e6) }
end

local function run_project(b, project, t, data, segments, dilations)
  local folder = b.options[project.name]
  local pattern = { segments = segments, dilations = dilations, causal = true, return_lse = false }
  for key, value in pairs(project.pattern) do pattern[key] = value end
  local function arguments(backward)
    return { project = project.name, folder = folder, data = data, segments = segments,
      dilations = dilations, causal = true, backward = backward }
  end
  local missing = not folder and ("peer not available: --%s names its folder"):format(project.name)
  for _, backward in ipairs{ false, true } do
    local what = ("%s, %s"):format(project.name, backward and "forward + backward" or "forward")
    if missing then
      b:value{ what = what, problem = missing, at_least = 2 }
    else
      b:row{ what = what, ours = function() ours(t, pattern, backward) end, at_least = 2, against =
        project.name, peer = { script = "pipelines", case = "attention", arguments = arguments(backward) },
        tell = project.same and function(info) compare_results(b, info, t, pattern, backward) end or nil }
    end
  end
  local side, problem
  if missing then problem = missing else side, problem = b:case("pipelines", "attention", arguments(true)) end
  memory_row(b, side, problem, project, t, pattern)
  if side then side:drop() end
end

return {
  name = "pipelines",
  about = "dilated attention against whole pipelines: B 1, N 8192, H 6, D 64, segments 1k 2k 4k, causal",
  run = function(b)
    local N = b:size(8192, 128)
    local t = tensors(N, b:size(6, 3), b:size(64, 8))
    local segments, dilations = { N / 8, N / 4, N / 2 }, { 1, 2, 4 }
    local data = sys.temporary("-attention.safetensors")
    lac.io.save(data, t)
    for _, project in ipairs(PROJECTS) do run_project(b, project, t, data, segments, dilations) end
    os.remove(data)
  end,
}
