--- Ring attention over virtual ranks: the sequence in shards, partial results merged by their log-sum-exp.
--
-- Every rank holds its own rows of q, k and v (shard.lua) and meets the shards of the others one after the
-- other. A task is one dense engine call on strided views of two shards; it gives (out, lse) of these keys
-- alone, and
--
--   lse' = log(exp(lse1) + exp(lse2)),   out' = exp(lse1 - lse') out1 + exp(lse2 - lse') out2
--
-- makes one softmax of two. So a rank needs O(N / P) memory, and the result is one device's, to rounding.
-- Backward: with the FINAL out and lse of a row every task's gradients are exact on their own (P = exp(S -
-- lse), dS = P (dP - delta)), so dk and dv are sums over the ranks that met a shard, as if they travelled
-- with it. "mean", "sum" and "lse_detach" keep one accumulator for each branch and combine them at the end;
-- their backward differs by which lse and which out a task is given.
--
-- The ranks are virtual: one process, one after the other, each reading the rows of its own shard and of the
-- shard that visits. Schedules: "ring" visits in the order i, i - 1, i - 2, ...; "allgather" in the order of
-- the ranks (a real one gathers first); "auto" takes the one that sends less. What a shard cannot honour is
-- refused: dropout draws by the row of a whole sequence, dedup compares branches across shards, and a window
-- in a striped layout is asymmetric.

local schema = require "lacuna.schema"
local create = require "lacuna.create"
local grad = require "lacuna.grad"
local ops = require "lacuna.ops"
local shard = require "lacuna.attention.shard"

local fn = ops.fn
local fail = schema.fail
local OP = "attention"
local WHOLE = 2 ^ 40 -- a segment longer than any sequence

local ring = { SCHEDULES = { "ring", "allgather", "auto" } }

local core

-- ---- tasks as engine calls ----------------------------------------------------------------------------

-- rows of a piece of x [B, N, ...], as a view
local function rows(x, piece, part)
  local step = piece.step * part.hop
  local first = piece.first + part.at * piece.step
  return x[{ {}, { first + 1, first + (part.count - 1) * step + 1, step } }]
end

local function heads(x, first, count) return x:narrow(3, first + 1, count) end

-- zeros in front of the rows
local function padded(x, before)
  if before == 0 then return x end
  local shape = { unpack(x:size()) }
  shape[2] = before
  return fn.cat({ create.zeros(shape, { dtype = x:dtype(), device = x:device() }), x }, 2)
end

-- How a task becomes a call whose query row a stands at key a: {drop, before (queries), keys_before, causal,
-- window}. Rows of zeros in front shift the queries; they get no gradient and give none, since all of theirs
-- is zero.
local function aligned(task, causal, window)
  local q, k = task.q, task.k
  local reach = window and math.floor(window / q.step)
  local delta = math.floor((q.first - k.first) / q.step)
  local a = { drop = 0, before = 0, keys_before = 0, causal = causal, window = reach }
  if not window and (not causal or delta >= k.count - 1) then
    a.causal = false -- every query sees every key
  elseif delta >= 0 then
    a.before = delta
  elseif causal then
    a.drop = -delta
  else
    a.keys_before = -delta
  end
  return a
end

-- runs of a strip's heads that share a key/value head, or all of them if none do
local function head_runs(strip, group)
  if group == 1 then return { { strip.head0, strip.heads, strip.head0, strip.heads } } end
  local runs, h, last = {}, strip.head0, strip.head0 + strip.heads
  while h < last do
    local kv = math.floor(h / group)
    local next_h = math.min((kv + 1) * group, last)
    runs[#runs + 1] = { h, next_h - h, kv, 1 }
    h = next_h
  end
  return runs
end

local function dense(a, B, N, M, H, Hk, D)
  local pattern = { segments = { WHOLE }, dilations = { 1 }, heads = "all", offset = "mod", merge = "lse",
                    causal = a.causal, dedup = false, align = "start", window = a.window }
  return core.plan_for(pattern, core.pattern_key(pattern), B, N, M, H, Hk, D)
end

-- key padding of the call: the user's, and false for keys that only shift
local function mask_of(x, task, a)
  if not x.padding and a.keys_before == 0 then return nil end
  local part
  if x.padding then
    part = rows(x.padding, task.k_piece, task.k)
  else
    part = create.ones({ x.q:size(1), task.k.count }, { dtype = "bool", device = x.q:device() })
  end
  return padded(part, a.keys_before)
end

-- f(view of rows, call) for every engine call of a task; call = {plan, q, k, v, run, ...}
local function each_call(x, task, f)
  local a = aligned(task, x.causal, x.window)
  local q = { at = task.q.at + a.drop * task.q.hop, hop = task.q.hop, count = task.q.count - a.drop }
  if q.count <= 0 then return end
  local mask = mask_of(x, task, a)
  for _, run in ipairs(head_runs(task.strip, x.group)) do
    local function queries(t) return heads(rows(t, task.q_piece, q), run[1], run[2]) end
    local function keys(t) return heads(rows(t, task.k_piece, task.k), run[3], run[4]) end
    local call = { queries = queries, keys = keys, before = a.before, keys_before = a.keys_before,
                   branch = task.strip.branch + 1,
                   q = padded(queries(x.q), a.before), k = padded(keys(x.k), a.keys_before),
                   v = padded(keys(x.v), a.keys_before),
                   run = { scale = x.scale, p = 0, seed = 0, at = 0, kernel = x.kernel, key_padding = mask } }
    call.plan = dense(a, call.q:size(1), call.q:size(2), call.k:size(2), run[2], run[4], call.q:size(4))
    f(call)
  end
end

-- all tasks of all ranks in the order of the schedule
local function each_task(x, f)
  local P = #x.tasks
  for i = 1, P do
    for t = 0, P - 1 do
      local j = x.schedule == "ring" and (i - 1 - t) % P + 1 or t + 1
      for _, task in ipairs(x.tasks[i][j]) do f(task) end
    end
  end
end

-- ---- merging ------------------------------------------------------------------------------------------

-- exp(lse - total), 0 where there is no key
local function share(lse, total)
  return fn.exp(lse - fn.where(fn.eq(total, -math.huge), 0, total))
end

local function log_sum(a, b)
  local top = fn.maximum(a, b)
  local base = fn.where(fn.eq(top, -math.huge), 0, top)
  return base + fn.log(fn.exp(a - base) + fn.exp(b - base))
end

-- takes (out, lse) of more keys into the accumulators' rows
local function merge(into_out, into_lse, out, lse)
  local total = log_sum(into_lse, lse)
  local kept = into_out * fn.unsqueeze(share(into_lse, total), 4)
  into_out:copy_(kept + out:to(into_out:dtype()) * fn.unsqueeze(share(lse, total), 4))
  into_lse:copy_(total)
end

local function forward_task(x, task)
  each_call(x, task, function(call)
    local out, lse = core.forward_raw(call.plan, call.q, call.k, call.v, call.run)
    if call.before > 0 then
      out = out:narrow(2, call.before + 1, out:size(2) - call.before)
      lse = lse:narrow(2, call.before + 1, lse:size(2) - call.before)
    end
    local slot = x.separate and call.branch or 1
    merge(call.queries(x.out[slot]), call.queries(x.lse[slot]), out, lse)
  end)
end

-- branches' results -> out, lse
local function combine(x)
  local lse, out = x.lse[1], x.out[1]
  for g = 2, #x.lse do lse = log_sum(lse, x.lse[g]) end
  if x.merge == "lse_detach" and x.separate then
    out = out * fn.unsqueeze(share(x.lse[1], lse), 4)
    for g = 2, #x.out do out = out + x.out[g] * fn.unsqueeze(share(x.lse[g], lse), 4) end
  else
    for g = 2, #x.out do out = out + x.out[g] end
    if x.gscale ~= 1 then out = out * x.gscale end
  end
  return out, lse
end

local function forward(x)
  local q = x.q
  local sums = q:dtype() == "f64" and "f64" or "f32"
  local place = { dtype = sums, device = q:device() }
  local B, N, H, D = unpack(q:size())
  x.out, x.lse = {}, {}
  for g = 1, x.separate and x.branches or 1 do
    x.out[g], x.lse[g] = create.zeros({ B, N, H, D }, place), create.full({ B, N, H }, -math.huge, place)
  end
  each_task(x, function(task) forward_task(x, task) end)
  local out, lse = combine(x)
  for g = 1, #x.out do x.out[g] = x.out[g]:to(q:dtype()) end
  x.total = lse
  return out:to(q:dtype()), lse
end

local function add_rows(into, x) into:copy_(into + x:to(into:dtype())) end

local function backward(x, g, dlse)
  local q = x.q
  local sums = { dtype = q:dtype() == "f64" and "f64" or "f32" }
  local dq, dk, dv = create.zeros_like(q, sums), create.zeros_like(x.k, sums), create.zeros_like(x.v, sums)
  if x.gscale ~= 1 then g = g * x.gscale end
  local branch_dlse = {}
  for b = 1, #x.lse do -- the merged lse moves a branch's by its share
    local own = x.separate and x.merge ~= "lse_detach"
    branch_dlse[b] = dlse and (own and dlse * share(x.lse[b], x.total) or dlse)
  end
  each_task(x, function(task)
    each_call(x, task, function(call)
      local slot = x.separate and call.branch or 1
      local lse = x.merge == "lse_detach" and x.total or x.lse[slot]
      local function take(t) return t and padded(call.queries(t), call.before) end
      local dq1, dk1, dv1 = core.backward_raw(call.plan, call.q, call.k, call.v, call.run, take(x.out[slot]),
                                              take(lse), nil, take(g), take(branch_dlse[slot]))
      local function keys(t) return t:narrow(2, call.keys_before + 1, t:size(2) - call.keys_before) end
      add_rows(call.queries(dq), dq1:narrow(2, call.before + 1, dq1:size(2) - call.before))
      add_rows(call.keys(dk), keys(dk1))
      add_rows(call.keys(dv), keys(dv1))
    end)
  end)
  return dq:to(q:dtype()), dk:to(q:dtype()), dv:to(q:dtype())
end

local ring_op = grad.custom_op {
  name = "ring_attend",
  forward = function(ctx, q, k, v, x)
    x.q, x.k, x.v = q:detach(), k:detach(), v:detach()
    ctx.x = x
    local out, lse = forward(x)
    ctx:save(q, k, v, lse, unpack(x.out))
    if x.padding then ctx:save(x.padding) end
    return out, lse
  end,
  backward = function(ctx, g, dlse)
    return backward(ctx.x, g or fn.zeros_like(ctx.x.q), dlse)
  end,
}

-- ---- the variant --------------------------------------------------------------------------------------

local HONOURED = { scale = true, training = true, return_lse = true, need_weights = true, key_padding = true,
                   key_lengths = true, kernel = true,
                   block = true } -- without a block_mask, its size says nothing

-- options that shards cannot honour, at configuration and at a call
local function refuse(o, run, name)
  if run.training and (run.dropout or 0) > 0 then
    fail(OP, "variant '%s' has no dropout on the weights: its draws belong to one device's rows", name)
  end
  for key, value in pairs(run) do
    if not HONOURED[key] and key ~= "dropout" and value then
      fail(OP, "variant '%s' does not honour option '%s' on shards; use the variant '%s'", name, key, o.of)
    end
  end
end

--- What cuts a sequence: the options of a variant in shards, with the defaults of this one.
-- @tparam string of the variant inside @tparam integer ranks @tparam string schedule
function ring.options(of, ranks, schedule)
  return {
    of = { type = "string", default = of },
    ranks = { type = "integer", min = 1, max = 4096, default = ranks },
    layout = { one_of = shard.LAYOUTS, default = "contiguous" },
    schedule = { one_of = ring.SCHEDULES, default = schedule },
  }
end

--- Complaints about a configuration; for variants.lua. @tparam table o options with the variant's own
function ring.check(o, name)
  refuse(o, { dropout = o.dropout, training = true }, name)
  if o.dedup then fail(OP, "variant '%s' has no dedup: branches would be compared across shards", name) end
  if o.window and o.layout == "striped" and o.ranks > 1 then
    fail(OP, "variant '%s' has no window with layout 'striped'; use 'contiguous' or 'zigzag'", name)
  end
end

--- The strips, pieces, tasks and traffic of an object at a length.
-- @tparam Attention module @tparam integer n @tparam integer m
-- @treturn table queries, keys (pieces per rank), tasks, traffic (rows x heads), schedule
function ring.plan(module, n, m)
  local o, p = module.options, module.pattern
  local info = core.info_of(core.plan_for(p, module.key, 1, n, m, o.heads, o.kv_heads, 1))
  local made = { queries = shard.pieces(n, o.ranks, o.layout), keys = shard.pieces(m, o.ranks, o.layout) }
  made.tasks = shard.tasks(info.strips, made.queries, made.keys,
                           { causal = p.causal, window = p.window, shift = p.align == "end" and m - n or 0 })
  made.traffic = shard.traffic(made.tasks, o.heads / o.kv_heads)
  made.schedule = o.schedule
  if o.schedule == "auto" then
    made.schedule = made.traffic.allgather < made.traffic.ring and "allgather" or "ring"
  end
  return made
end

-- the plan of the last sizes stays with the module
local function planned(module, n, m)
  local last = rawget(module, "sharding")
  if not last or last.n ~= n or last.m ~= m then
    last = ring.plan(module, n, m)
    last.n, last.m = n, m
    rawset(module, "sharding", last)
  end
  return last
end

local function padding_of(run, k)
  local padding = run.key_padding
  if run.key_lengths then
    local keys = create.arange { k:size(2), dtype = "i64", device = k:device() }
    local within = fn.lt(fn.unsqueeze(keys, 1), fn.unsqueeze(run.key_lengths:to("i64"), 2))
    padding = padding and fn.logical_and(padding, within) or within
  end
  return padding
end

--- out, lse of q, k, v by the module's shards (record.run of the variant).
function ring.run(module, q, k, v, run)
  local o, p = module.options, module.pattern
  refuse(o, run, module.variant)
  local plan = planned(module, q:size(2), k:size(2))
  local separate = p.heads == "all" and #p.segments > 1 and p.merge ~= "lse"
  return ring_op(q, k, v, {
    tasks = plan.tasks, schedule = plan.schedule, causal = p.causal, window = p.window, merge = p.merge,
    separate = separate, branches = #p.segments, gscale = p.merge == "mean" and 1 / #p.segments or 1,
    group = o.heads / o.kv_heads, scale = run.scale, kernel = run.kernel, padding = padding_of(run, k),
  })
end

--- @tparam table c the core of attention (plans and engine calls)
return function(c)
  core = c
  return ring
end
