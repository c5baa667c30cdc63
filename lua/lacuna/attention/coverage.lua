--- Which share of (query, key) pairs at each distance is attended to: what a sparse pattern sees.
--
-- A pair counts once however many branches keep it, so the share is that of the union, averaged over heads;
-- distances are grouped by powers of two (0, 1, 2 to 3, 4 to 7, ...). Keys before the query are counted;
-- without causality those after it are the mirror image. For a query the keys of its strips are walked by the
-- definition and marked: every distance is exact, and of a long sequence only some queries are looked at,
-- evenly spread and so many that the whole costs some million steps. Heads with the same strips are counted
-- once, with their number.
--
-- Rejected: a sum over branches, which counts shared pairs twice and exceeds 100%; sampled distances, which
-- miss a dilation of 128 or hit nothing else.

local QUERIES, LEAST = 1021, 13 -- most and least queries that are looked at
local STEPS = 2e6

local floor, max, min, ceil = math.floor, math.max, math.min, math.ceil

-- lists of strips that at least one head has, with how many heads have them
local function kinds_of(strips, heads, cells)
  local kinds, by_name = {}, {}
  for h = 0, heads - 1 do
    local mine, name = {}, {}
    for i, s in ipairs(strips) do
      if h >= s.head0 and h < s.head0 + s.heads then
        mine[#mine + 1], name[#name + 1] = s, i
      end
    end
    name = table.concat(name, " ") .. (cells and #cells > 1 and "/" .. h or "") -- blocks may differ by head
    local kind = by_name[name]
    if not kind then
      kind = { strips = mine, heads = 0, cells = cells and (cells[h + 1] or cells[1]) }
      by_name[name], kinds[#kinds + 1] = kind, kind
    end
    kind.heads = kind.heads + 1
  end
  return kinds
end

-- group of a distance: 1 for 0, 2 for 1, 3 for 2 and 3, 4 for 4 to 7, ...
local function group_of(d) return d == 0 and 1 or select(2, math.frexp(d)) + 1 end

-- counts the keys k <= p, k < m, p - k <= reach that the strips keep for p, each once
-- row: the active blocks of the query, or nil; block: rows of one
local function mark(kind, p, m, reach, seen, stamp, hits, row, block)
  for i = 1, #kind.strips do
    local s = kind.strips[i]
    local base = floor(p / s.segment) * s.segment + s.offset
    if p >= base and (p - base) % s.dilation == 0 then
      local first = base + max(0, ceil((p - reach - base) / s.dilation)) * s.dilation
      for k = first, min(p, m - 1), s.dilation do
        if seen[k] ~= stamp and (not row or row[floor(k / block) + 1]) then
          seen[k] = stamp
          local g = group_of(p - k)
          hits[g] = (hits[g] or 0) + kind.heads
        end
      end
    end
  end
end

-- adds how many keys there are in every group of distances from p
local function count_all(p, m, heads, all)
  local least = max(0, p - (m - 1)) -- distance of the nearest key
  for g = 1, group_of(p) do
    local from, to = g == 1 and 0 or 2 ^ (g - 2), g == 1 and 0 or 2 ^ (g - 1) - 1
    all[g] = (all[g] or 0) + heads * max(0, min(to, p) - max(from, least) + 1)
  end
end

-- how many queries the budget allows
local function samples(kinds, n)
  local keys = 0
  for _, kind in ipairs(kinds) do
    for _, s in ipairs(kind.strips) do keys = keys + min(s.segment, n) / s.dilation ^ 2 end
  end
  return max(min(n, LEAST), min(n, QUERIES, floor(STEPS / max(keys, 1))))
end

--- @tparam table strips of a plan @tparam table pattern window, align
-- @tparam table z n, m, heads; cells [heads or 1][i][j] and block if only active blocks count
-- @treturn table list of {from, to, share}: distances from .. to, share of their pairs in [0, 1]
return function(strips, pattern, z)
  local shift = pattern.align == "end" and z.m - z.n or 0
  local kinds, seen, stamp, hits, all = kinds_of(strips, z.heads, z.cells), {}, 0, {}, {}
  local count = samples(kinds, z.n)
  for i = 0, count - 1 do
    local p = shift + floor((i + 0.5) * z.n / count)
    for _, kind in ipairs(p >= 0 and kinds or {}) do
      stamp = stamp + 1
      local row = kind.cells and kind.cells[floor((p - shift) / z.block) + 1]
      mark(kind, p, z.m, pattern.window or p, seen, stamp, hits, row, z.block)
      count_all(p, z.m, kind.heads, all)
    end
  end
  local groups = {}
  for g = 1, #all do
    local from, to = g == 1 and 0 or 2 ^ (g - 2), g == 1 and 0 or 2 ^ (g - 1) - 1
    if all[g] > 0 then
      groups[#groups + 1] = { from = from, to = min(to, shift + z.n - 1), share = (hits[g] or 0) / all[g] }
    end
  end
  return groups
end
