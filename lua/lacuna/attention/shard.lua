--- Who holds which rows, and which shards meet: the geometry of sequence parallelism, without a tensor.
--
-- A layout gives every rank pieces: arithmetic progressions {first, count, step} of rows (0-based).
-- "contiguous" is one run a rank, "zigzag" two mirrored chunks (rank i has chunks i and 2P - 1 - i of 2P, so
-- that causal work is equal), "striped" every P-th row. Sizes differ by at most one row where P does not
-- divide N; a rank may be empty.
--
-- A strip {segment w, dilation r, offset o} keeps in one segment the positions S + o + r t. Met with a piece
-- of step s that is again a progression, of step lcm(r, s). So what two ranks have to do with each other for
-- one segment of one strip is a TASK: queries at q0 + L a, keys at k0 + L b, a dense attention in which
-- causality is b <= a + delta with one delta. `tasks` lists them all; `ring.lua` runs them; `traffic` says
-- which rows travel. The list is the plan's sharding: it depends on sizes and the configuration alone, so
-- every rank can make it for itself.
--
-- Rejected: index lists per rank (memory of the sequence, and a gather per call), and one engine plan per
-- pair of shards (its segments would have to begin in the middle).
--
-- A piece's rows are rows of the tensor with the numbers of their positions, unless it says otherwise: `at`
-- is the tensor's row of the piece's first (packed sequences count positions from their own start).

local schema = require "lacuna.schema"

local floor, ceil, max, min = math.floor, math.ceil, math.max, math.min

local shard = { LAYOUTS = { "contiguous", "zigzag", "striped" } }

local function run_of(n, parts, i) -- part i (from 0) of n rows cut into almost equal runs
  local first = floor(i * n / parts)
  return { first = first, count = floor((i + 1) * n / parts) - first, step = 1 }
end

--- Pieces of every rank.
-- @tparam integer n rows @tparam integer ranks @tparam string layout
-- @treturn table list of lists of {first, count, step}; empty pieces are left out
function shard.pieces(n, ranks, layout)
  local list = {}
  for i = 0, ranks - 1 do
    local pieces
    if layout == "zigzag" then
      pieces = { run_of(n, 2 * ranks, i), run_of(n, 2 * ranks, 2 * ranks - 1 - i) }
    elseif layout == "striped" then
      pieces = { { first = i, count = ceil((n - i) / ranks), step = ranks } }
    elseif layout == "contiguous" then
      pieces = { run_of(n, ranks, i) }
    else
      schema.unknown("attention", "layout", layout, shard.LAYOUTS)
    end
    list[i + 1] = {}
    for _, piece in ipairs(pieces) do
      if piece.count > 0 then table.insert(list[i + 1], piece) end
    end
  end
  return list
end

--- The rows [from, to) of every rank, with positions counted from `from`: one of several packed sequences.
function shard.within(pieces, from, to)
  local list = {}
  for i, own in ipairs(pieces) do
    list[i] = {}
    for _, piece in ipairs(own) do
      local u = max(0, ceil((from - piece.first) / piece.step))
      local at = piece.first + u * piece.step
      local count = min(piece.count - u, ceil((to - at) / piece.step))
      if count > 0 then
        table.insert(list[i], { first = at - from, count = count, step = piece.step, at = at })
      end
    end
  end
  return list
end

local function gcd(a, b)
  while b ~= 0 do a, b = b, a % b end
  return a
end

-- Kept rows of a piece in segment `s` of a strip: {at, count, hop (rows of the piece), first, step
-- (positions)}. `shift` is the position of row 0.
local function kept(piece, strip, s, shift)
  local w, r = strip.segment, strip.dilation
  local base, start = s * w + strip.offset, piece.first + shift
  local last = min((s + 1) * w, start + piece.count * piece.step) -- exclusive
  local p = max(base, start)
  p = base + ceil((p - base) / r) * r
  for _ = 1, piece.step do -- the first kept position that is also in the piece
    if p >= last or (p - start) % piece.step == 0 then break end
    p = p + r
  end
  if p >= last or (p - start) % piece.step ~= 0 then return nil end
  local step = r * piece.step / gcd(r, piece.step)
  return { at = (p - start) / piece.step, count = floor((last - 1 - p) / step) + 1, hop = step / piece.step,
           first = p, step = step }
end

-- segments that a piece touches, [first, last]
local function segments(piece, w, shift)
  local first, last = piece.first + shift, piece.first + shift + (piece.count - 1) * piece.step
  return max(floor(first / w), 0), floor(last / w)
end

-- do any of these queries and keys see each other?
local function meet(q, k, causal, window)
  local q_last, k_last = q.first + (q.count - 1) * q.step, k.first + (k.count - 1) * k.step
  if causal and k.first > q_last then return false end
  if window and (q.first - k_last > window or k.first - q_last > window) then return false end
  return true
end

-- tasks of one pair of pieces
local function pair_tasks(list, strip, qp, kp, o)
  local first, last = segments(qp, strip.segment, o.shift)
  local k_first, k_last = segments(kp, strip.segment, 0)
  for s = max(first, k_first), min(last, k_last) do
    local q = kept(qp, strip, s, o.shift)
    local k = q and kept(kp, strip, s, 0)
    if k and meet(q, k, o.causal, o.window) then
      list[#list + 1] = { strip = strip, segment = s, q = q, k = k, q_piece = qp, k_piece = kp }
    end
  end
end

--- Everything that rank i computes with the keys of rank j.
-- @tparam table strips of a plan @tparam table queries pieces per rank @tparam table keys pieces per rank
-- @tparam table o causal, window, shift (position of query row 0)
-- @treturn table [i][j] list of {strip, segment, q, k, q_piece, k_piece}; q and k as rows of their piece (at,
--   count, hop) and as positions (first, step)
function shard.tasks(strips, queries, keys, o)
  local all = {}
  for i = 1, #queries do
    all[i] = {}
    for j = 1, #keys do
      local list = {}
      for _, strip in ipairs(strips) do
        for _, qp in ipairs(queries[i]) do
          for _, kp in ipairs(keys[j]) do pair_tasks(list, strip, qp, kp, o) end
        end
      end
      all[i][j] = list
    end
  end
  return all
end

-- rows x key heads that rank j's shard must give to rank i: each (branch, lattice, segment, piece, head) once
local function rows_needed(list, group)
  local seen, rows = {}, 0
  for _, task in ipairs(list) do
    local s = task.strip
    for h = floor(s.head0 / group), floor((s.head0 + s.heads - 1) / group) do
      local piece = task.k_piece
      local key = ("%d/%d/%d/%d/%d"):format(s.branch, task.k.first, task.segment, piece.at or piece.first, h)
      if not seen[key] then
        seen[key] = true
        rows = rows + task.k.count
      end
    end
  end
  return rows
end

--- What the two schedules send: only kept rows travel, and only to ranks that use them. A ring passes a shard
-- from neighbour to neighbour as far as it is needed, an all-gather sends it to each of them at once and
-- holds everything that was gathered.
-- @tparam table tasks of shard.tasks @tparam[opt=1] integer group query heads that share a key head
-- @treturn table ring, allgather: rows x heads sent; ring_held, allgather_held: most that a rank holds of
--   others
function shard.traffic(tasks, group)
  group = group or 1
  local P, t = #tasks, { ring = 0, allgather = 0, ring_held = 0, allgather_held = 0 }
  for j = 1, P do
    local farthest, most = 0, 0
    for hop = 1, P - 1 do
      local rows = rows_needed(tasks[(j + hop - 1) % P + 1][j], group)
      if rows > 0 then farthest, most = hop, max(most, rows) end
      t.allgather = t.allgather + rows
    end
    t.ring, t.ring_held = t.ring + farthest * most, max(t.ring_held, most)
  end
  for i = 1, P do
    local held = 0
    for j = 1, P do held = held + (j ~= i and rows_needed(tasks[i][j], group) or 0) end
    t.allgather_held = max(t.allgather_held, held)
  end
  return t
end

return shard
