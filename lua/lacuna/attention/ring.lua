--- Ring attention over virtual ranks: the sequence in shards, partial results merged by their log-sum-exp.
--
-- Every rank holds its own rows of q, k and v (shard.lua) and meets the shards of the others one after the
-- other, task by task (partial.lua). So a rank needs O(N / P) memory, and the result is one device's, to
-- rounding. Backward: with the FINAL out and lse of a row every task's gradients are exact on their own (P =
-- exp(S - lse), dS = P (dP - delta)), so dk and dv are sums over the ranks that met a shard, as if they
-- travelled with it. "mean", "sum" and "lse_detach" keep one accumulator for each branch and combine them at
-- the end; their backward differs by which lse and which out a task is given.
--
-- The ranks are virtual: one process, one after the other, each reading the rows of its own shard and of the
-- shard that visits. Schedules: "ring" visits in the order i, i - 1, i - 2, ...; "allgather" in the order of
-- the ranks (a real one gathers first); "auto" takes what sends less. Masks, biases, slopes and active blocks
-- are cut for each task (pairs.lua); packed sequences are so many sets of tasks. What shards cannot honour is
-- refused: dropout draws by the row of a whole sequence, dedup compares branches across shards, and a window
-- in a striped layout is asymmetric, as is ALiBi there unless causal.

local schema = require "lacuna.schema"
local create = require "lacuna.create"
local grad = require "lacuna.grad"
local ops = require "lacuna.ops"
local shard = require "lacuna.attention.shard"
local partial = require "lacuna.attention.partial"
local pairs_of = require "lacuna.attention.pairs"
local packed = require "lacuna.attention.packed"
local alibi = require "lacuna.attention.alibi"

local fn = ops.fn
local rows, heads, head_runs = partial.rows, partial.heads, partial.head_runs
local share, merge = partial.share, partial.merge
local fail = schema.fail
local OP = "attention"
local WHOLE = 2 ^ 40 -- a segment longer than any sequence

local ring = { SCHEDULES = { "ring", "allgather", "auto" } }

local core

-- ---- tasks as engine calls ----------------------------------------------------------------------------

-- zeros in front of the rows
local function padded(x, before)
  if before == 0 then return x end
  local shape = { unpack(x:size()) }
  shape[2] = before
  return fn.cat({ create.zeros(shape, { dtype = x:dtype(), device = x:device() }), x }, 2)
end

-- How a task becomes a call whose query row a stands at key a: {drop, before (queries), keys_before, causal,
-- window, apart}. Rows of zeros in front shift the queries; they get no gradient and give none, since all of
-- theirs is zero. apart: all keys lie on one side of all queries, so that nothing has to be aligned.
local function aligned(task, x)
  local q, k, causal, window = task.q, task.k, x.causal, x.window
  local reach = window and math.floor(window / q.step)
  local delta = math.floor((q.first - k.first) / q.step)
  local a = { drop = 0, before = 0, keys_before = 0, causal = causal, window = reach, delta = delta }
  a.apart = delta >= k.count - 1 or q.first + (q.count - 1) * q.step < k.first
  if not window and (a.apart or not causal and not x.alibi) then
    a.causal = false -- every query sees every key
  elseif delta >= 0 then
    a.before = delta
  elseif causal then
    a.drop = -delta
  else
    a.keys_before = -delta
  end
  a.apart = a.apart and not window
  return a
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
  local a = aligned(task, x)
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
    if pairs_of(x, task, q, a, run, call) then
      call.plan = dense(a, call.q:size(1), call.q:size(2), call.k:size(2), run[2], run[4], call.q:size(4))
      f(call)
    end
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

-- ---- forward and backward -----------------------------------------------------------------------------

local function forward_task(x, task)
  each_call(x, task, function(call)
    local out, lse = core.forward_raw(call.plan, call.q, call.k, call.v, call.run)
    if call.before > 0 then
      out = out:narrow(2, call.before + 1, out:size(2) - call.before)
      lse = lse:narrow(2, call.before + 1, lse:size(2) - call.before)
    end
    if call.lowered then lse = lse - call.lowered end
    local slot = x.separate and call.branch or 1
    merge(call.queries(x.out[slot]), call.queries(x.lse[slot]), out, lse)
  end)
end

local function forward(x)
  local sum = partial.begin(x.q, x.separate and #x.pattern.segments or 1)
  x.out, x.lse = sum.out, sum.lse
  each_task(x, function(task) forward_task(x, task) end)
  local out, lse = partial.combine(sum, x.pattern)
  for g = 1, #x.out do x.out[g] = x.out[g]:to(x.q:dtype()) end
  x.total = lse
  return out:to(x.q:dtype()), lse
end

local function add_rows(into, x) into:copy_(into + x:to(into:dtype())) end

local function backward(x, g, dlse)
  local q = x.q
  local sums = { dtype = q:dtype() == "f64" and "f64" or "f32" }
  local dq, dk, dv = create.zeros_like(q, sums), create.zeros_like(x.k, sums), create.zeros_like(x.v, sums)
  local dbias = x.bias_trains and create.zeros(x.bias:size(), { dtype = sums.dtype, device = q:device() })
  if x.pattern.merge == "mean" then g = g * (1 / #x.pattern.segments) end
  local branch_dlse = {}
  for b = 1, #x.lse do -- the merged lse moves a branch's by its share
    local own = x.separate and x.pattern.merge ~= "lse_detach"
    branch_dlse[b] = dlse and (own and dlse * share(x.lse[b], x.total) or dlse)
  end
  each_task(x, function(task)
    each_call(x, task, function(call)
      local slot = x.separate and call.branch or 1
      local function take(t) return t and padded(call.queries(t), call.before) end
      local lse = call.queries(x.pattern.merge == "lse_detach" and x.total or x.lse[slot])
      lse = padded(call.lowered and lse + call.lowered or lse, call.before)
      if call.run.bias then call.run.bias.requires_grad = x.bias_trains end
      local dq1, dk1, dv1, db1 = core.backward_raw(call.plan, call.q, call.k, call.v, call.run,
                                                   take(x.out[slot]), lse, nil, take(g),
                                                   take(branch_dlse[slot]))
      local function keys(t) return t:narrow(2, call.keys_before + 1, t:size(2) - call.keys_before) end
      add_rows(call.queries(dq), dq1:narrow(2, call.before + 1, dq1:size(2) - call.before))
      add_rows(call.keys(dk), keys(dk1))
      add_rows(call.keys(dv), keys(dv1))
      if dbias then call.add_bias(dbias, db1) end
    end)
  end)
  return dq:to(q:dtype()), dk:to(q:dtype()), dv:to(q:dtype()), dbias and dbias:to(x.bias:dtype()) or nil
end

local ring_op = grad.custom_op {
  name = "ring_attend",
  forward = function(ctx, q, k, v, bias, x)
    x.q, x.k, x.v, x.bias = q:detach(), k:detach(), v:detach(), bias and bias:detach()
    ctx.x = x
    local out, lse = forward(x)
    ctx:save(q, k, v, lse, unpack(x.out))
    for _, name in ipairs { "padding", "mask", "alibi", "bias", "block_mask" } do
      if x[name] then ctx:save(x[name]) end
    end
    return out, lse
  end,
  backward = function(ctx, g, dlse)
    return backward(ctx.x, g or create.zeros_like(ctx.x.q), dlse)
  end,
}

-- ---- the variant --------------------------------------------------------------------------------------

local HONOURED = { scale = true, training = true, return_lse = true, need_weights = true, key_padding = true,
                   key_lengths = true, kernel = true, mask = true, bias = true, alibi = true,
                   cu_seqlens = true, block = true, block_mask = true }

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

local function refuse_slopes(o, slopes, name)
  if slopes and o.layout == "striped" and o.ranks > 1 and not o.causal then
    fail(OP, "variant '%s' has no alibi with layout 'striped' unless causal; use 'contiguous' or 'zigzag'",
         name)
  end
end

--- What cuts a sequence: the options of a variant in shards, with the defaults of this one. `pattern` and
-- `block` are those of block_sparse, on top of what is cut.
-- @tparam string of the variant inside @tparam integer ranks @tparam string schedule
-- @tparam function pattern_rule says what is wrong with a pattern
function ring.options(of, ranks, schedule, pattern_rule)
  return {
    of = { type = "string", default = of },
    ranks = { type = "integer", min = 1, max = 4096, default = ranks },
    layout = { one_of = shard.LAYOUTS, default = "contiguous" },
    schedule = { one_of = ring.SCHEDULES, default = schedule },
    pattern = { check = pattern_rule }, block = { type = "integer", min = 16 },
  }
end

--- Complaints about a configuration; for variants.lua. @tparam table o options with the variant's own
function ring.check(o, name)
  refuse(o, { dropout = o.dropout, training = true }, name)
  if o.dedup then fail(OP, "variant '%s' has no dedup: branches would be compared across shards", name) end
  if o.window and o.layout == "striped" and o.ranks > 1 then
    fail(OP, "variant '%s' has no window with layout 'striped'; use 'contiguous' or 'zigzag'", name)
  end
  refuse_slopes(o, o.alibi, name)
end

-- tasks of all sequences, or of each of the packed ones
local function tasks_of(strips, made, o, list)
  if not list then return shard.tasks(strips, made.queries, made.keys, o) end
  local all = {}
  for i = 1, #made.queries do
    all[i] = {}
    for j = 1, #made.keys do all[i][j] = {} end
  end
  for s = 1, #list - 1 do
    local own = shard.within(made.queries, list[s], list[s + 1])
    for i, row in ipairs(shard.tasks(strips, own, own, o)) do
      for j, some in ipairs(row) do
        for _, task in ipairs(some) do table.insert(all[i][j], task) end
      end
    end
  end
  return all
end

--- The strips, pieces, tasks and traffic of an object at a length.
-- @tparam Attention module @tparam integer n @tparam integer m @tparam[opt] table list where packed sequences
--   begin, and n
-- @treturn table queries, keys (pieces per rank), tasks, traffic (rows x heads), schedule
function ring.plan(module, n, m, list)
  local o, p = module.options, module.pattern
  local info = core.info_of(core.plan_for(p, module.key, 1, n, m, o.heads, o.kv_heads, 1))
  local made = { queries = shard.pieces(n, o.ranks, o.layout), keys = shard.pieces(m, o.ranks, o.layout) }
  made.tasks = tasks_of(info.strips, made,
    { causal = p.causal, window = p.window, shift = p.align == "end" and m - n or 0 }, list)
  made.traffic = shard.traffic(made.tasks, o.heads / o.kv_heads)
  made.schedule = o.schedule
  if o.schedule == "auto" then
    made.schedule = made.traffic.allgather < made.traffic.ring and "allgather" or "ring"
  end
  return made
end

-- the plan of the last sizes stays with the module
local function planned(module, n, m, list)
  local key = n .. "," .. m .. ":" .. (list and table.concat(list, ",") or "")
  local last = rawget(module, "sharding")
  if not last or last.key ~= key then
    last = ring.plan(module, n, m, list)
    last.key = key
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
  refuse_slopes(o, run.alibi, module.variant)
  local blocks = core.blocks_of(run, p, q, k)
  if blocks and run.cu_seqlens then
    fail(OP, "block_mask cannot be combined with cu_seqlens: blocks are those of one sequence")
  end
  local block = run.block or 128
  pairs_of.check(run, q, k, blocks, block)
  local list = run.cu_seqlens and packed.list(run, q, k)
  local plan = planned(module, q:size(2), k:size(2), list)
  return ring_op(q, k, v, run.bias or false, {
    tasks = plan.tasks, schedule = plan.schedule, pattern = p, causal = p.causal, window = p.window,
    separate = partial.separate(p), group = o.heads / o.kv_heads, scale = run.scale, kernel = run.kernel,
    padding = padding_of(run, k), mask = run.mask, bias_trains = run.bias and run.bias.requires_grad or false,
    alibi = run.alibi and alibi.tensor(run.alibi, q), block_mask = blocks, block = block,
  })
end

--- @tparam table c the core of attention (plans and engine calls)
return function(c)
  core = c
  return ring
end
