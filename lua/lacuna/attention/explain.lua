--- What attn:explain(n) says: what a plan does at a length, as a table and as text.
--
-- Strips first, then what they amount to: how much of the sequence they touch, how many (query, key) pairs
-- are computed and which part of dense attention that is, the arithmetic, the memory traffic and the working
-- memory. Bytes count every input once as read and every result once as written (q, k, v, out, lse; backward
-- also dout, dq, dk, dv), which no implementation can beat; FLOPs per byte is then the arithmetic intensity:
-- below a machine's ratio of arithmetic to bandwidth, attention waits for memory however good the kernel is.
--
-- Counts that a reader may want to check by hand are printed in full, with separators; FLOPs and bytes in
-- units. Positions in strips are 0-based as in the mathematics, branches and heads 1-based as everywhere in
-- Lua. The picture of distances is in coverage.lua, its plot in plot.lua (lac.plot.coverage).

local lib = require "lacuna.lib"
local coverage = require "lacuna.attention.coverage"

-- 3810304 -> "3,810,304"
local function grouped(n)
  local text = ("%.0f"):format(n)
  local head = #text % 3
  local parts = head > 0 and { text:sub(1, head) } or {}
  for i = head + 1, #text, 3 do parts[#parts + 1] = text:sub(i, i + 2) end
  return table.concat(parts, ",")
end

local UNITS = { { 1e18, "EFLOP" }, { 1e15, "PFLOP" }, { 1e12, "TFLOP" }, { 1e9, "GFLOP" }, { 1e6, "MFLOP" } }

local function flops_text(n)
  for _, unit in ipairs(UNITS) do
    if n >= unit[1] then return ("%.2f %s"):format(n / unit[1], unit[2]) end
  end
  return grouped(n) .. " FLOP"
end

-- sum of i limited to [0, m], for i up to x
local function staircase(x, m)
  if x <= 0 then return 0 end
  if x <= m then return x * (x + 1) / 2 end
  return m * (m + 1) / 2 + (x - m) * m
end

-- (query, key) pairs of one head of dense attention
local function dense_pairs(pattern, n, m)
  if not pattern.causal then return n * m end
  local shift = pattern.align == "end" and m - n or 0 -- row p sees p + 1 + shift keys
  return staircase(n + shift, m) - staircase(shift, m)
end

-- strips that differ only in their heads share a line
local function strip_lines(strips, longest)
  local lines, by_text = {}, {}
  for _, s in ipairs(strips) do
    local segment = math.min(s.segment, longest)
    local text = ("  %-7d %9d %9d %7d  "):format(s.branch + 1, segment, s.dilation, s.offset)
    local note = s.shared and "; rows shared with other strips" or ""
    local line = by_text[text .. note]
    if not line then
      line = { text = text, heads = {}, note = note }
      by_text[text .. note], lines[#lines + 1] = line, line
    end
    line.heads[#line.heads + 1] = s.heads == 1 and tostring(s.head0 + 1)
      or ("%d to %d"):format(s.head0 + 1, s.head0 + s.heads)
  end
  for i, line in ipairs(lines) do lines[i] = line.text .. table.concat(line.heads, ", ") .. line.note end
  return lines
end

local function traffic_line(label, flops, bytes)
  return ("  %-14s %s, at least %s moved: %.1f FLOP per byte")
    :format(label, flops_text(flops), lib.bytes_text(bytes), flops / bytes)
end

-- ---- as a table -----------------------------------------------------------------------------------------

local explain = {}

--- @tparam table info as attention.plan_info gives it, workspace in bytes of the dtype
-- @tparam table pattern causal, align, window
-- @tparam table z sizes: batch, n, m, heads, kv_heads, head_dim, element (bytes of one), lse (bytes of one),
--   softmaxes (that the backward keeps beside the merged one)
-- @treturn table info's fields and dense_pairs, share, covered, bytes_forward, bytes_backward, saved
--   (bytes that the backward keeps beside q, k, v), coverage
function explain.table(info, pattern, z)
  local t = {}
  for name, value in pairs(info) do t[name] = value end
  for name, value in pairs(z) do t[name] = value end
  local queries = z.batch * z.n * z.heads * z.head_dim * z.element        -- q, out, dout, dq
  local keys = z.batch * z.m * z.kv_heads * z.head_dim * z.element        -- k, v, dk, dv
  local lse = z.batch * z.n * z.heads * z.lse
  t.dense_pairs = z.heads * dense_pairs(pattern, z.n, z.m)
  t.share = t.dense_pairs > 0 and info.pairs / t.dense_pairs or 0
  t.covered = info.rows / (z.n * z.heads)
  t.bytes_forward, t.bytes_backward = 2 * queries + 2 * keys + lse, 4 * queries + 4 * keys + lse
  t.saved = queries + lse * (1 + z.softmaxes)
  t.coverage = coverage(info.strips, pattern, z)
  return t
end

-- ---- as text --------------------------------------------------------------------------------------------

local BAR = 24

local function coverage_lines(lines, groups, open)
  lines[#lines + 1] = "  distance       pairs that some branch "
    .. (open and "may attend to: contents choose the blocks" or "attends to")
  for _, g in ipairs(groups) do
    local range = g.from == g.to and tostring(g.from) or ("%d to %d"):format(g.from, g.to)
    local bar = ("#"):rep(math.ceil(g.share * BAR - 1e-9))
    lines[#lines + 1] = (("    %-17s %6.2f%% %s"):format(range, 100 * g.share, bar):gsub(" $", ""))
  end
end

local function ring_lines(lines, r, blocks)
  lines[#lines + 1] = ("  ranks          %d, %s, %d to %d rows each, schedule %s"):format(r.ranks,
    r.layout, r.least, r.most, r.schedule)
  lines[#lines + 1] = ("  traffic        ring %s, all-gather %s forward, K and V%s"):format(
    lib.bytes_text(r.bytes_ring), lib.bytes_text(r.bytes_allgather),
    blocks and ", as if all blocks were active" or "")
  lines[#lines + 1] = ("  visiting rows  ring %s, all-gather %s at most at a rank"):format(
    lib.bytes_text(r.held_ring), lib.bytes_text(r.held_allgather))
end

--- @tparam string title the first line @tparam table t of explain.table, with causal, kernel, reason, ring
-- @treturn string
function explain.text(title, t)
  local head = ("  %-7s %9s %9s %7s  %s"):format("branch", "segment", "dilation", "offset", "heads")
  local lines = { title }
  if t.reason then lines[2] = "  chosen         " .. t.reason end
  lines[#lines + 1] = head
  for _, line in ipairs(strip_lines(t.strips, math.max(t.n, t.m))) do lines[#lines + 1] = line end
  lines[#lines + 1] = ("  rows covered   %.1f%% of (position, head)"):format(100 * t.covered)
  lines[#lines + 1] = ("  pairs          %s per batch item, %.2f%% of dense%s"):format(
    grouped(t.pairs), 100 * t.share, t.causal and " causal" or "")
  coverage_lines(lines, t.coverage, t.blocks and not t.cells)
  lines[#lines + 1] = "  kernel         " .. t.kernel
  lines[#lines + 1] = traffic_line("forward", t.flops_forward, t.bytes_forward)
  lines[#lines + 1] = t.fp8 and "  backward       none with fp8"
    or traffic_line("backward", t.flops_backward, t.bytes_backward)
  lines[#lines + 1] = ("  workspace      forward %s, backward %s a CPU thread"):format(
    lib.bytes_text(t.workspace_forward), lib.bytes_text(t.workspace_backward))
  if not t.fp8 then
    lines[#lines + 1] = ("  kept           %s for the backward, beside q, k and v"):format(
      lib.bytes_text(t.saved))
  else
    lines[#lines + 1] = ("  fp8            scales %s, rounded copies in %s %s while it runs"):format(
      lib.bytes_text(t.fp8.scales), t.fp8.of, lib.bytes_text(t.fp8.copies))
  end
  if t.element == 2 then
    lines[#lines + 1] = ("  f32 sums       forward %s, backward %s"):format(
      lib.bytes_text(t.accumulate_forward), lib.bytes_text(t.accumulate_backward))
    lines[#lines + 1] = ("  on a GPU       backward %s for f32 sums and statistics of rows"):format(
      lib.bytes_text(t.device_backward))
  end
  if t.blocks then
    lines[#lines + 1] = ("  blocks         %s of %s a head active, density %.4f of those allowed"):format(
      grouped(t.blocks.active), grouped(t.blocks.cells), t.blocks.density)
  end
  if t.ring then ring_lines(lines, t.ring, t.blocks) end
  return table.concat(lines, "\n")
end

return explain
