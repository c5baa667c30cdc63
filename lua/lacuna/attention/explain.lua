--- The text of attn:explain(n): what a plan does at a length, for people.
--
-- Strips first, then what they amount to: how much of the sequence they touch, how many (query, key) pairs
-- are computed and which part of dense attention that is, the arithmetic, the memory traffic and the working
-- memory. Bytes count every input once as read and every result once as written (q, k, v, out, lse; backward
-- also dout, dq, dk, dv), which no implementation can beat; FLOPs per byte is then the arithmetic intensity:
-- below a machine's ratio of arithmetic to bandwidth, attention waits for memory however good the kernel is.
--
-- Counts that a reader may want to check by hand are printed in full, with separators; FLOPs and bytes in
-- units. Positions in strips are 0-based as in the mathematics, branches and heads 1-based as everywhere in
-- Lua. Rejected: a table of numbers as the result (attention.plan_info is that).

local lib = require "lacuna.lib"

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

--- @tparam string title the first line
-- @tparam table info as attention.plan_info gives it
-- @tparam table pattern causal, align
-- @tparam table z sizes: batch, n, m, heads, kv_heads, head_dim, element (bytes of one), lse (bytes of one)
-- @treturn string
return function(title, info, pattern, z)
  local head = ("  %-7s %9s %9s %7s  %s"):format("branch", "segment", "dilation", "offset", "heads")
  local lines = { title, head }
  for _, line in ipairs(strip_lines(info.strips, math.max(z.n, z.m))) do lines[#lines + 1] = line end
  local queries = z.batch * z.n * z.heads * z.head_dim * z.element        -- q, out, dout, dq
  local keys = z.batch * z.m * z.kv_heads * z.head_dim * z.element        -- k, v, dk, dv
  local lse = z.batch * z.n * z.heads * z.lse
  local dense = z.heads * dense_pairs(pattern, z.n, z.m)
  local share = dense > 0 and 100 * info.pairs / dense or 0
  local covered = 100 * info.rows / (z.n * z.heads)
  lines[#lines + 1] = ("  rows covered   %.1f%% of (position, head)"):format(covered)
  lines[#lines + 1] = ("  pairs          %s per batch item, %.2f%% of dense%s"):format(
    grouped(info.pairs), share, pattern.causal and " causal" or "")
  lines[#lines + 1] = traffic_line("forward", info.flops_forward, 2 * queries + 2 * keys + lse)
  lines[#lines + 1] = traffic_line("backward", info.flops_backward, 4 * queries + 4 * keys + lse)
  local width = z.element == 8 and 2 or 1 -- tiles are f32, in f64 twice as wide
  lines[#lines + 1] = ("  workspace      forward %s, backward %s a CPU thread"):format(
    lib.bytes_text(width * info.workspace_forward), lib.bytes_text(width * info.workspace_backward))
  if z.element == 2 then
    lines[#lines + 1] = ("  f32 sums       forward %s, backward %s"):format(
      lib.bytes_text(info.accumulate_forward), lib.bytes_text(info.accumulate_backward))
  end
  return table.concat(lines, "\n")
end
