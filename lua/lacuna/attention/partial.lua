--- Attention in parts: results of several sets of keys, merged by their log-sum-exps.
--
-- A TASK (shard.lua) is the meeting of some rows of queries with some rows of keys in one segment of one
-- strip: a dense attention on strided views of both. It gives (out, lse) of these keys alone, and
--
--   lse' = log(exp(lse1) + exp(lse2)),   out' = exp(lse1 - lse') out1 + exp(lse2 - lse') out2
--
-- makes one softmax of two. What has to be one softmax for each branch ("mean", "sum", "lse_detach" with all
-- heads in every branch) keeps one accumulator a branch, which are combined at the end. The ring over shards
-- and decoding with active blocks both consist of this.

local create = require "lacuna.create"
local ops = require "lacuna.ops"

local fn = ops.fn
local partial = {}

--- Rows of a piece, as an entry of an index. @tparam table part at, count, hop in rows of the piece
function partial.range(piece, part)
  local step = piece.stride or piece.step
  local hop, first = step * part.hop, (piece.at or piece.first) + part.at * step
  return { first + 1, first + (part.count - 1) * hop + 1, hop }
end

--- Rows of a piece of x [B, N, ...], as a view.
function partial.rows(x, piece, part) return x[{ {}, partial.range(piece, part) }] end

--- Heads of x [B, N, H, ...], as a view.
function partial.heads(x, first, count) return x:narrow(3, first + 1, count) end

--- Runs of a strip's heads that share a key/value head, or all of them if none do.
-- @treturn table list of { head, heads, key/value head, key/value heads }, from 0
function partial.head_runs(strip, group)
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

--- exp(lse - total), 0 where there is no key.
function partial.share(lse, total)
  return fn.exp(lse - fn.where(fn.eq(total, -math.huge), 0, total))
end

local share = partial.share

--- Does a pattern need an accumulator for each branch?
function partial.separate(p) return p.heads == "all" and #p.segments > 1 and p.merge ~= "lse" end

--- Accumulators without any key: { out = list, lse = list }, of q's shape, in f32 or f64.
function partial.begin(q, branches)
  local B, N, H, D = unpack(q:size())
  local place = { dtype = q:dtype() == "f64" and "f64" or "f32", device = q:device() }
  local sum = { out = {}, lse = {} }
  for g = 1, branches do
    sum.out[g], sum.lse[g] = create.zeros({ B, N, H, D }, place), create.full({ B, N, H }, -math.huge, place)
  end
  return sum
end

--- Takes (out, lse) of more keys into views of the accumulators' rows.
function partial.merge(into_out, into_lse, out, lse)
  local total = fn.logaddexp(into_lse, lse)
  local kept = into_out * fn.unsqueeze(share(into_lse, total), 4)
  into_out:copy_(kept + out:to(into_out:dtype()) * fn.unsqueeze(share(lse, total), 4))
  into_lse:copy_(total)
end

--- The branches' results -> out, lse. @tparam table sum accumulators @tparam table p the pattern
function partial.combine(sum, p)
  local lse, out = sum.lse[1], sum.out[1]
  for g = 2, #sum.lse do lse = fn.logaddexp(lse, sum.lse[g]) end
  if p.merge == "lse_detach" and #sum.out > 1 then
    out = out * fn.unsqueeze(share(sum.lse[1], lse), 4)
    for g = 2, #sum.out do out = out + sum.out[g] * fn.unsqueeze(share(sum.lse[g], lse), 4) end
  else
    for g = 2, #sum.out do out = out + sum.out[g] end
    if p.merge == "mean" and #p.segments > 1 then out = out * (1 / #p.segments) end
  end
  return out, lse
end

return partial
