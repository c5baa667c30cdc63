--- Options of single pairs and active blocks (mask, bias, ALiBi, block_mask), cut for a task of two shards.
--
-- A matrix over (query, key) is cut to the task's rows and columns, which is a view. Slopes need distances of
-- positions. Where rows are aligned, row a of the queries at key a, a task's own distances are those of the
-- positions divided by its step. Where all keys lie on one side of all queries (most of a ring's tasks),
-- |p - j| is a difference: with c the key nearest to the queries, it is |p - c| + |c - j|. The second part is
-- a bias of a row of keys, expanded over the queries at no cost; the first lowers all scores of a row, which
-- its softmax does not notice: it is taken off the log-sum-exp afterwards, and put on again for the backward.
-- So nothing has to be aligned there, and numbers stay small where they matter.
--
-- Active blocks stay blocks where a task's rows and keys begin with one (shards of whole blocks): its cost is
-- then that of its active blocks. Rows at a step s make blocks of a size of 1 / s. Else the blocks become a
-- mask of pairs, exact and as dear as one; a task without any active block is left out in either case.

local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops"
local partial = require "lacuna.attention.partial"

local fn, range = ops.fn, partial.range
local fail, show = schema.fail, schema.show
local OP = "attention"
local LEAST = 16 -- rows of a block that the engine takes

local pairs_of = {}

-- what a task sees of t [.., N, M]; run: its heads
local function part_of(t, task, q, run)
  local last, index = t:dim(), {}
  if last >= 3 and t:size(last - 2) > 1 then t = t:narrow(last - 2, run[1] + 1, run[2]) end
  for d = 1, last - 2 do index[d] = {} end
  index[last - 1], index[last] = range(task.q_piece, q), range(task.k_piece, task.k)
  return t[index]
end

-- zeros in front along an axis
local function padded(t, axis, before)
  if before == 0 then return t end
  local shape = { unpack(t:size()) }
  shape[axis] = before
  return fn.cat({ create.zeros(shape, { dtype = t:dtype(), device = t:device() }), t }, axis)
end

local function matrix(t, task, q, a, run)
  local part = part_of(t, task, q, run)
  return padded(padded(part, part:dim() - 1, a.before), part:dim(), a.keys_before)
end

-- t [..., H or 1, a, b] with the heads of a run
local function of_heads(t, run)
  local last = t:dim()
  return last >= 3 and t:size(last - 2) > 1 and t:narrow(last - 2, run[1] + 1, run[2]) or t
end

-- rows or keys of a task in blocks: { first block, blocks }, and whether the rows begin with the block
local function in_blocks(r, size)
  local first, last = r[1] - 1, r[2] - 1
  local from = math.floor(first / size)
  return { from, math.floor(last / size) - from + 1 }, first % size < r[3]
end

-- for each row of r the block that it is in, counted from `from`
local function block_of(r, count, size, from, device)
  return (create.arange { count, dtype = "i64", device = device } * r[3] + (r[1] - 1)) / size - from
end

-- Puts the active blocks into call.run, as blocks or as a mask; false if there is none.
local function cut_blocks(x, task, q, a, run, call)
  local all, size = of_heads(x.block_mask, run), x.block
  local last, device = all:dim(), all:device()
  local qr, kr = range(task.q_piece, q), range(task.k_piece, task.k)
  local qb, starts = in_blocks(qr, size)
  local kb, k_starts = in_blocks(kr, size)
  local part = all:narrow(last - 1, qb[1] + 1, qb[2]):narrow(last, kb[1] + 1, kb[2])
  if not part:any():item() then return false end
  local own = size / qr[3]
  if qr[3] == kr[3] and starts and k_starts and own >= LEAST and size % qr[3] == 0 and a.before % own == 0
    and a.keys_before % own == 0 then
    call.run.block = own
    call.run.block_mask = padded(padded(part, last - 1, a.before / own), last, a.keys_before / own)
  else
    local mask = part:index_select(last - 1, block_of(qr, q.count, size, qb[1], device))
      :index_select(last, block_of(kr, task.k.count, size, kb[1], device))
    mask = padded(padded(mask, last - 1, a.before), last, a.keys_before)
    call.run.mask = call.run.mask and fn.logical_and(call.run.mask, mask) or mask
  end
  return true
end

local function ramp(n, dtype, device)
  return create.arange { n, dtype = dtype, device = device }
end

-- slopes as a bias of the keys [h, n, m], and what that leaves out, [n, h]
local function slopes_apart(slopes, task, q)
  local k, step, dtype, device = task.k, task.q.step, slopes:dtype(), slopes:device()
  local first = task.q.first + (q.at - task.q.at) / task.q.hop * step -- position of the first query
  local before = k.first <= first
  local nearest = before and k.first + (k.count - 1) * step or k.first
  local behind = ramp(k.count, dtype, device) * step -- distances of keys to the nearest one
  if before then behind = (k.count - 1) * step - behind end
  local h = slopes:size(1)
  local bias = (slopes:view(h, 1, 1) * -behind:view(1, 1, k.count)):expand(h, q.count, k.count)
  local distance = fn.abs(ramp(q.count, dtype, device) * step + (first - nearest))
  return bias, distance:view(q.count, 1) * slopes:view(1, h)
end

-- the sum of g over what was expanded from `like`
local function sum_to(g, like)
  while g:dim() > like:dim() do g = g:sum(1) end
  for d = 1, g:dim() do
    if like:size(d) == 1 and g:size(d) > 1 then g = g:sum(d):unsqueeze(d) end
  end
  return g
end

--- Puts mask, bias, alibi and active blocks into call.run, and into the call: lowered [n, h], by how much its
-- log-sum-exps are too high; add_bias(into, g), which adds the gradient of the call's bias to that of the
-- whole.
-- @tparam table x mask, bias, alibi, block_mask (and block) of all rows
-- @tparam table task @tparam table q the task's queries
-- @tparam table a how they are aligned @tparam table run heads @tparam table call
-- @treturn boolean false if no block of the task is active: there is nothing to call
local function cut(x, task, q, a, run, call)
  if x.mask then call.run.mask = matrix(x.mask, task, q, a, run) end
  if x.block_mask and not cut_blocks(x, task, q, a, run, call) then return false end
  local bias = x.bias and matrix(x.bias, task, q, a, run)
  if x.alibi then
    local slopes = x.alibi:narrow(1, run[1] + 1, run[2])
    if a.apart then
      local own, lowered = slopes_apart(slopes, task, q)
      bias, call.lowered = bias and bias:to(own:dtype()) + own or own, lowered
    else
      call.run.alibi = slopes * task.q.step
      local rest = task.q.first - task.k.first - a.delta * task.q.step
      if rest > 0 then call.lowered = slopes * rest end
    end
  end
  call.run.bias = bias
  function call.add_bias(into, g)
    local part = part_of(into, task, q, run)
    local last = g:dim()
    g = g:narrow(last - 1, a.before + 1, g:size(last - 1) - a.before)
    g = g:narrow(last, a.keys_before + 1, g:size(last) - a.keys_before)
    part:copy_(part + sum_to(g:to(part:dtype()), part))
  end
  return true
end

-- complaints about active blocks
local function check_blocks(t, block, full)
  if t:dtype() ~= "bool" then fail(OP, "block_mask must be bool, got %s", show(t)) end
  local shift = 4 - t:dim()
  if shift < 0 or shift > 2 then fail(OP, "block_mask must have 2 to 4 dimensions, got %s", show(t)) end
  for d = 1, t:dim() do
    local whole = full[d + shift]
    local want = d + shift > 2 and math.ceil(whole / block) or whole
    if t:size(d) ~= want and (d + shift > 2 or t:size(d) ~= 1) then
      fail(OP, "block_mask is %s, %d queries and %d keys are %d x %d blocks of %d", show(t), full[3], full[4],
        math.ceil(full[3] / block), math.ceil(full[4] / block), block)
    end
  end
end

--- Complaints about the shapes of mask, bias and block_mask, in the engine's words.
-- @tparam table run options of a call @tparam Tensor q @tparam Tensor k
-- @tparam ?Tensor blocks @tparam integer block their size
function pairs_of.check(run, q, k, blocks, block)
  local full = { q:size(1), q:size(3), q:size(2), k:size(2) }
  local of = { "batch items", "heads", "queries", "keys" }
  for _, name in ipairs { "mask", "bias" } do
    local t = run[name]
    if t then
      tensor.expect(OP, name, t)
      local shift = 4 - t:dim()
      if shift < 0 or shift > 2 then
        fail(OP, "%s must be [N, M], [H, N, M] or [B, H, N, M], got %s", name, show(t))
      end
      for d = 1, t:dim() do
        if t:size(d) ~= full[d + shift] and (d + shift > 2 or t:size(d) ~= 1) then
          fail(OP, "%s has %d %s, the call has %d (%s)", name, t:size(d), of[d + shift], full[d + shift],
               show(t))
        end
      end
    end
  end
  if blocks then check_blocks(blocks, block, full) end
  if run.mask and run.mask:dtype() ~= "bool" then
    fail(OP, "mask must be bool (true = attend), got %s; a float mask is a bias", run.mask:dtype())
  end
end

return setmetatable(pairs_of, { __call = function(_, ...) return cut(...) end })
