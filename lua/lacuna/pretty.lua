--- What a tensor looks like when printed.
--
-- `Tensor f32 [3 x 4] cpu` and, below it, aligned rows; large dimensions show their first and last three
-- positions with ... between, and only shown elements are ever read, so printing a gigabyte costs nothing.
-- One number format per tensor: integers when every shown value is one, four decimals when the magnitudes
-- allow it, else scientific. Higher ranks print one matrix per leading index, headed as it would be written
-- in Lua: (1,2,..). Rejected: nested brackets as in NumPy, which align badly past two dimensions, and a
-- common scale factor as in Torch7, which every reader has misread once.

local lib = require "lacuna.lib"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"

local C = lib.C
local pretty = {}

--- Dimensions longer than `threshold` show `edge` positions at each end.
pretty.options = { edge = 3, threshold = 8, columns = 12, blocks = 6 }

-- 0-based positions to show of n; -1 stands for the gap
local function shown(n, threshold)
  local list, edge = {}, pretty.options.edge
  if n <= threshold then
    for i = 0, n - 1 do list[#list + 1] = i end
  else
    for i = 0, edge - 1 do list[#list + 1] = i end
    list[#list + 1] = -1
    for i = n - edge, n - 1 do list[#list + 1] = i end
  end
  return list
end

-- Read the elements at the shown positions: an index tensor per axis would do, but a small strided copy is
-- simpler: each wanted element is a 1-element view. Only a few hundred are ever read.
local function reader(t)
  if t.c.device ~= C.LAC_CPU then t = tensor.to_host(t) end
  local half = t.c.dtype == C.LAC_F16 or t.c.dtype == C.LAC_BF16
  local p = not half and tensor.pointer(t)
  local stride = {}
  for i = 1, t.c.ndim do stride[i] = tonumber(t.c.stride[i - 1]) end
  return function(index)
    local at = 0
    for i = 1, #stride do at = at + index[i] * stride[i] end
    if half then
      local one = tensor.alias(t)
      one.c.ndim, one.c.offset = 0, t.c.offset + at
      return tensor.element(C.LAC_F32, tensor.pointer(tensor.cast(one, C.LAC_F32)), 0)
    end
    if t.c.dtype == C.LAC_I64 then return p[at] end
    return tensor.element(t.c.dtype, p, at)
  end
end

local function integer_text(v)
  return (tostring(v):gsub("U?LL$", ""))
end

-- Choose one format for all shown values.
local function formatter(values, dtype)
  if dtype == C.LAC_BOOL then return tostring end
  if not device.is_float(dtype) then
    return function(v) return type(v) == "cdata" and integer_text(v) or ("%d"):format(v) end
  end
  local whole, low, high = true, math.huge, 0
  for i = 1, #values do
    local v = values[i]
    if v == v and v ~= math.huge and v ~= -math.huge then
      local m = math.abs(v)
      if m ~= math.floor(m) then whole = false end
      if m > high then high = m end
      if m > 0 and m < low then low = m end
    end
  end
  local format
  if whole and high < 1e7 then
    format = "%.0f"
  elseif high >= 1e5 or (high > 0 and high < 1e-3) or (low < math.huge and high / low >= 1e8) then
    format = "%.4e"
  else
    format = "%.4f"
  end
  return function(v)
    if v ~= v then return "nan" end
    if v == math.huge then return "inf" end
    if v == -math.huge then return "-inf" end
    return format:format(v)
  end
end

-- All index tuples over the shown positions, as rows: {prefix = leading index or gap, cells = list}
local function layout(t)
  local dims = tensor.shape(t)
  local n = #dims
  local lists = {}
  for i = 1, n do
    lists[i] = shown(dims[i], i == n and pretty.options.columns or pretty.options.threshold)
  end
  return dims, lists
end

local function pad(text, width) return (" "):rep(width - #text) .. text end

-- Rows of one matrix (or vector) as strings without alignment: list of lists of text
local function matrix(read, prefix, lists, n, collect)
  local rows = {}
  local row_list = n >= 2 and lists[n - 1] or { 0 }
  for _, i in ipairs(row_list) do
    local row = {}
    for _, j in ipairs(lists[n]) do
      if i < 0 or j < 0 then
        row[#row + 1] = false
      else
        local index = {}
        for k = 1, #prefix do index[k] = prefix[k] end
        if n >= 2 then index[#index + 1] = i end
        index[#index + 1] = j
        local v = read(index)
        collect[#collect + 1] = v
        row[#row + 1] = { v }
      end
    end
    rows[#rows + 1] = row
  end
  return rows
end

local function blocks(read, lists, n, collect)
  local result = {}
  local function descend(prefix, d)
    if d > n - 2 then
      result[#result + 1] = { prefix = prefix, rows = matrix(read, prefix, lists, n, collect) }
      return
    end
    for _, i in ipairs(lists[d]) do
      if i < 0 then
        result[#result + 1] = { gap = true }
      else
        local longer = {}
        for k = 1, #prefix do longer[k] = prefix[k] end
        longer[#longer + 1] = i
        descend(longer, d + 1)
      end
    end
  end
  descend({}, 1)
  return result
end

local function heading(prefix)
  local parts = {}
  for i = 1, #prefix do parts[i] = prefix[i] + 1 end
  return "(" .. table.concat(parts, ",") .. ",:,:)"
end

--- The text of a tensor.
-- @tparam Tensor t
-- @treturn string
function pretty.text(t)
  local head = "Tensor " .. tensor.describe(t)
  if t.requires_grad then
    head = head .. (t.node and (" grad from " .. t.node.op.name) or " requires_grad")
  end
  local status = C.lac_tensor_check(t.c)
  if status == lib.status.released then return head .. " (released)" end
  if status ~= 0 then return head .. " (invalid)" end
  if tensor.numel(t) == 0 then return head .. " (empty)" end
  local read = reader(t)
  if t.c.ndim == 0 then
    local v = read({})
    return head .. "\n  " .. formatter({ v }, t.c.dtype)(v)
  end
  local dims, lists = layout(t)
  local n = #dims
  for i = 1, n - 2 do lists[i] = shown(dims[i], pretty.options.blocks) end
  local values = {}
  local parts = blocks(read, lists, n, values)
  local format, width = formatter(values, t.c.dtype), 3
  for _, v in ipairs(values) do width = math.max(width, #format(v)) end
  local lines = { head }
  for _, block in ipairs(parts) do
    if block.gap then
      lines[#lines + 1] = "  ..."
    else
      if n > 2 then lines[#lines + 1] = heading(block.prefix) end
      for _, row in ipairs(block.rows) do
        local cells = {}
        for j, cell in ipairs(row) do cells[j] = pad(cell and format(cell[1]) or "...", width) end
        lines[#lines + 1] = "  " .. table.concat(cells, "  ")
      end
    end
  end
  return table.concat(lines, "\n")
end

tensor.class.__tostring = pretty.text

return pretty
