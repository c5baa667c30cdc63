--- Patterns of active blocks as values: masks.local_window(512) + masks.global_tokens(64).
--
-- A pattern is a rule over cells (query block i, key block j, head h), all from 0, and knows no sizes: made
-- for a length, a block size and a number of heads it becomes the bool tensor that lac.attend takes as
-- block_mask. `+` is the union of two patterns, `*` their intersection, `-` the difference; results are
-- patterns again.
-- lac.attend and modules take a pattern itself, which they make for the sizes of q and k, once per sizes.
--
-- With causal, cells above the diagonal are inactive; in cells on it the attention itself is triangular.
-- Where there are fewer queries than keys, align = "end" puts the last query at the last key. `density` is
-- the share of blocks kept, of those that causality leaves; everywhere the same word for the same thing.
--
-- For decoding a pattern also says which key blocks some row of blocks from i on will still have (`later`, a
-- rule like the other; of an intersection or a difference it says rather too much), and whether it is known
-- before the length is (`open`): a random choice is drawn for a length.
--
-- A rule is a closure made once per head: rule(size) -> function(i, j), with `size` the sizes in blocks. So a
-- composition costs one call a cell and pattern, a matrix of a million cells some ten milliseconds. Rejected:
-- patterns as tensors, which have to be made again for every length and cannot be printed.

local schema = require "lacuna.schema"
local create = require "lacuna.create"
local class = require "lacuna.class"
local tensor = require "lacuna.tensor"

local fail, show = schema.fail, schema.show
local floor, ceil, min, max, abs = math.floor, math.ceil, math.min, math.max, math.abs
local OP = "masks"

local masks = {}

-- ---- patterns ----------------------------------------------------------------------------------------

--- text: how it is written; rule(size, h) -> function(i, j) -> active; by_head: do heads differ? later: like
-- rule, for causal rows of blocks from i on (nil: every block may be needed); open: is the rule the same for
-- every length?
local Pattern = class("Pattern", nil, true)
schema.refuse_new_fields(Pattern, function() return "; make another pattern" end,
  "text by_head rule rank later open made")

local function always() return function() return true end end

function Pattern:init(text, by_head, rule, o)
  o = o or {}
  self.text, self.by_head, self.rule, self.rank = text, by_head, rule, o.rank or 2
  self.later, self.open = o.later or always, o.open ~= false
  self.made = setmetatable({}, { __mode = "v" })
  schema.complete(self)
end

function Pattern:__tostring() return self.text end

--- Is x a pattern of blocks?
local function is_pattern(x) return type(x) == "table" and getmetatable(x) == Pattern end
masks.is = is_pattern

local function operand(x, sign)
  if not is_pattern(x) then fail(OP, "'%s' needs a pattern on both sides, got %s", sign, show(x)) end
  return x
end

local function text_of(x, rank) return x.rank < rank and "(" .. x.text .. ")" or x.text end

-- later: of the two, what to say of a block
local function combine(sign, rank, both, later)
  return function(a, b)
    operand(a, sign)
    operand(b, sign)
    local text = ("%s %s %s"):format(text_of(a, rank), sign, text_of(b, sign == "-" and rank + 1 or rank))
    return Pattern(text, a.by_head or b.by_head, function(size, h)
      local x, y = a.rule(size, h), b.rule(size, h)
      return function(i, j) return both(x(i, j), y(i, j)) end
    end, { rank = rank, open = a.open and b.open, later = function(size, h)
      local x, y = a.later(size, h), b.later(size, h)
      return function(i, j) return later(x(i, j), y(i, j)) end
    end })
  end
end

local function either(x, y) return x or y end
local function both(x, y) return x and y end

Pattern.__add = combine("+", 0, either, either)
Pattern.__sub = combine("-", 0, function(x, y) return x and not y end, function(x) return x end)
Pattern.__mul = combine("*", 1, both, both)

-- ---- sizes ---------------------------------------------------------------------------------------------

local SIZES = {
  n = { type = "integer", min = 1, required = true }, m = { type = "integer", min = 1 },
  heads = { type = "integer", min = 1, default = 1 },
  block = { type = "integer", min = 16, default = 128 },
  causal = { type = "boolean", default = false },
  align = { one_of = { "start", "end" }, default = "start" },
}

-- adds rows and columns in blocks, the shift of queries, and what causality leaves
local function sized(options)
  local z = schema.options(OP, options, SIZES)
  z.m = z.m or z.n
  z.rows, z.columns = ceil(z.n / z.block), ceil(z.m / z.block)
  z.shift = z.align == "end" and z.m - z.n or 0
  --- key block at the position of query block i's first row
  function z.diagonal(i) return max(0, floor((i * z.block + z.shift) / z.block)) end
  --- key blocks that query block i may have: 0 .. last - 1
  function z.last(i)
    if not z.causal then return z.columns end
    local position = min((i + 1) * z.block, z.n) - 1 + z.shift
    return max(0, min(z.columns, floor(position / z.block) + 1))
  end
  return z
end

--- Is a cell active? As nested lists of booleans [heads or 1][rows][columns].
function Pattern:cells(options)
  local z, all = sized(options), {}
  for h = 1, self.by_head and z.heads or 1 do
    local rule, rows = self.rule(z, h - 1), {}
    for i = 0, z.rows - 1 do
      local row, last = {}, z.last(i)
      for j = 0, z.columns - 1 do row[j + 1] = j < last and rule(i, j) and true or false end
      rows[i + 1] = row
    end
    all[h] = rows
  end
  return all, z
end

--- The pattern of causal attention whose end is not known, for decoding: row by row, in blocks from 0.
-- @tparam table options heads, block
-- @treturn table active(h, i, j), later(h, i, j): will a row from i on have block j? heads: how many differ
function Pattern:endless(options)
  if not self.open then
    fail(OP, "%s is drawn for a length, so rows cannot be decoded before that is known", self.text)
  end
  local z = sized { n = 1, heads = options.heads, block = options.block, causal = true }
  local active, later, n = {}, {}, self.by_head and z.heads or 1
  for h = 1, n do active[h], later[h] = self.rule(z, h - 1), self.later(z, h - 1) end
  return { heads = n, active = function(h, i, j) return j <= i and active[h](i, j) end,
           later = function(h, i, j) return later[h](i, j) end }
end

--- The tensor for lac.attend's block_mask.
-- @tparam table options n; m (n), heads (1), block (128), causal (false), align ("start"), device
-- @treturn Tensor bool [heads or 1, blocks of queries, blocks of keys]
function Pattern:tensor(options)
  local device = options.device
  local plain = {}
  for name, value in pairs(options) do if name ~= "device" then plain[name] = value end end
  return create.tensor(self:cells(plain), { dtype = "bool", device = device })
end

--- The same, made once per sizes as long as somebody holds it.
function Pattern:cached(options)
  local z = { options.n, options.m, options.heads, options.block, tostring(options.causal), options.align,
    options.device }
  local key = table.concat(z, ",")
  local found = self.made[key]
  if found and not found:is_released() then return found end -- a scope may have done it
  found = self:tensor(options)
  self.made[key] = found
  return found
end

-- ---- the rules -------------------------------------------------------------------------------------

local function count(name, value, least)
  if not schema.is_integer(value) or value < (least or 0) then
    fail(OP, "%s must be an integer of at least %d, got %s", name, least or 0, show(value))
  end
  return value
end

local function share(name, value)
  if type(value) ~= "number" or not (value > 0 and value <= 1) then
    fail(OP, "%s must be in (0, 1], got %s", name, show(value))
  end
  return value
end

--- Every cell.
function masks.full() return Pattern("full()", false, function() return function() return true end end) end

--- A query block and the key block at its position.
function masks.diagonal()
  return Pattern("diagonal()", false, function(z) return function(i, j) return j == z.diagonal(i) end end,
    { later = function() return function(i, j) return j >= i end end })
end

--- Key blocks within half a window: |i - j| <= (window / block) div 2.
-- @tparam integer window positions
function masks.local_window(window)
  count("window", window, 1)
  return Pattern(("local_window(%d)"):format(window), false, function(z)
    local reach = floor(floor(window / z.block) / 2)
    return function(i, j) return abs(z.diagonal(i) - j) <= reach end
  end, { later = function(z)
    local reach = floor(floor(window / z.block) / 2)
    return function(i, j) return j >= i - reach end
  end })
end

--- j = i and j = i +- r for every dilation r, in blocks.
function masks.dilated_sparse(dilations)
  if type(dilations) ~= "table" or #dilations == 0 then
    fail(OP, "dilations must be a list of integers, got %s", show(dilations))
  end
  local steps, most = { [0] = true }, 0
  for _, r in ipairs(dilations) do
    steps[count("dilation", r, 1)] = true
    most = max(most, r)
  end
  return Pattern(("dilated_sparse{%s}"):format(table.concat(dilations, ", ")), false, function(z)
    return function(i, j) return steps[abs(z.diagonal(i) - j)] or false end
  end, { later = function() return function(i, j) return j >= i - most end end })
end

--- The first tokens see everything and are seen by everything: ceil(tokens / block) columns and rows.
function masks.global_tokens(tokens)
  count("tokens", tokens, 0)
  return Pattern(("global_tokens(%d)"):format(tokens), false, function(z)
    local most = ceil(tokens / z.block)
    return function(i, j) return j < most or z.diagonal(i) < most end
  end, { later = function(z)
    local most = ceil(tokens / z.block)
    return function(i, j) return j < most or i < most end
  end })
end

--- Global tokens plus a local window.
function masks.global_local(tokens, window)
  return masks.global_tokens(tokens) + masks.local_window(window)
end

--- Strided: j = i, i +- 1, and every j with j mod stride = i mod stride, in blocks.
function masks.axial(stride)
  count("stride", stride, 1)
  return Pattern(("axial(%d)"):format(stride), false, function(z)
    return function(i, j)
      local d = z.diagonal(i)
      return abs(d - j) <= 1 or (d - j) % stride == 0
    end
  end)
end

-- a small generator of its own: a pattern must not disturb the global random stream
local function generator(seed)
  local x = (seed * 7919 + 104729) % 2147483646 + 1
  for _ = 1, 8 do x = (x * 16807) % 2147483647 end
  return function(n) -- 0 .. n - 1
    x = (x * 16807) % 2147483647
    return floor(x / 2147483647 * n)
  end
end

-- the cells of a random choice: the diagonal, then as many others as `wanted` leaves, each with equal chance
local function draw(z, density, next_of)
  local on, rest, allowed, kept = {}, {}, 0, 0
  for i = 0, z.rows - 1 do
    for j = 0, z.last(i) - 1 do
      allowed = allowed + 1
      local at = i * z.columns + j
      if j == z.diagonal(i) then
        on[at], kept = true, kept + 1
      else
        rest[#rest + 1] = at
      end
    end
  end
  local wanted = min(#rest, max(0, floor(density * allowed + 0.5) - kept))
  for e = 1, wanted do
    local pick = e + next_of(#rest - e + 1)
    rest[e], rest[pick] = rest[pick], rest[e]
    on[rest[e]] = true
  end
  return on
end

--- A share of the cells, another choice for each head; the diagonal is always kept.
-- @tparam number density @tparam[opt=0] integer seed
function masks.random(density, seed)
  share("density", density)
  seed = count("seed", seed or 0)
  return Pattern(("random(%.14g, %d)"):format(density, seed), true, function(z, h)
    local on = draw(z, density, generator(seed * 65537 + h))
    return function(i, j) return on[i * z.columns + j] or false end
  end, { open = false })
end

--- Levels of {stride =, window =} in positions: rows with i mod (stride / block) = 0 attend within the window
-- (-1: to everything).
function masks.hierarchical(levels)
  if type(levels) ~= "table" or #levels == 0 then
    fail(OP, "levels must be a list of { stride =, window = }, got %s", show(levels))
  end
  local texts = {}
  for l, level in ipairs(levels) do
    if type(level) ~= "table" then fail(OP, "levels[%d] must be a table, got %s", l, show(level)) end
    count(("levels[%d].stride"):format(l), level.stride, 1)
    count(("levels[%d].window"):format(l), level.window, -1)
    texts[l] = ("{ stride = %d, window = %d }"):format(level.stride, level.window)
  end
  local function in_blocks(z)
    local parts = {}
    for l, level in ipairs(levels) do
      parts[l] = { every = max(1, floor(level.stride / z.block)),
        reach = level.window < 0 and math.huge or floor(level.window / z.block) }
    end
    return parts
  end
  local function rule(z)
    local parts = in_blocks(z)
    return function(i, j)
      for l = 1, #parts do
        local part = parts[l]
        local d = z.diagonal(i)
        if d % part.every == 0 and abs(d - j) <= part.reach then return true end
      end
      return false
    end
  end
  local function later(z)
    local parts = in_blocks(z)
    return function(i, j)
      for l = 1, #parts do
        local part = parts[l]
        if ceil(i / part.every) * part.every - j <= part.reach then return true end -- the next such row
      end
      return false
    end
  end
  return Pattern(("hierarchical{ %s }"):format(table.concat(texts, ", ")), false, rule, { later = later })
end

--- A pattern for each head: heads are dealt out in turn.
function masks.per_head(list)
  if type(list) ~= "table" or #list == 0 then fail(OP, "per_head takes a list of patterns") end
  local texts, open = {}, true
  for h, p in ipairs(list) do
    texts[h] = operand(p, "per_head").text
    open = open and p.open
  end
  local function of(name) return function(z, h) return list[h % #list + 1][name](z, h) end end
  return Pattern(("per_head{ %s }"):format(table.concat(texts, ", ")), true, of "rule",
    { later = of "later", open = open })
end

--- Cells that are known: as Pattern:cells gives them, made for causal attention to be decoded. There are no
-- others: a row or a key beyond them is an error.
-- @tparam string text how it is written @tparam table all [heads or 1][rows][columns] booleans
function masks.known(text, all)
  schema.check(OP, "text", text == nil and false or text, { type = "string" })
  schema.check(OP, "cells", all == nil and false or all, { type = "table" })
  local function list(h) return all[#all == 1 and 1 or h + 1] end
  local function rule(_, h)
    return function(i, j)
      local row = list(h)[i + 1]
      if not row or row[j + 1] == nil then
        fail(OP, "%s has %d x %d blocks, not row %d, column %d", text, #all[1], #all[1][1], i + 1, j + 1)
      end
      return row[j + 1]
    end
  end
  local function later(_, h)
    return function(i, j)
      local rows = list(h)
      for r = i + 1, #rows do
        if rows[r][j + 1] then return true end
      end
      return false
    end
  end
  return Pattern(text, #all > 1, rule, { later = later })
end

--- A rule of one's own: f(i, j, h, size) in blocks from 0.
function masks.rule(name, f)
  if type(name) ~= "string" or type(f) ~= "function" then fail(OP, "rule takes a name and a function") end
  return Pattern(name, true, function(z, h) return function(i, j) return f(i, j, h, z) end end,
    { open = false }) -- it may look at the sizes
end

-- ---- statistics ------------------------------------------------------------------------------------

local Statistics = {}
function Statistics:__tostring()
  local text = "density %.4g: %g of %d blocks a head, %d pairs, forward %.3g MFLOP, %g rows of blocks empty%s"
  return text:format(self.density, self.active, self.allowed, self.pairs, self.flops_forward / 1e6,
    self.empty_rows, self.coverage and (", coverage %.4g"):format(self.coverage) or "")
end

--- What a pattern amounts to at given sizes. It prints as a sentence.
-- @tparam table options those of tensor(); head_dim (64); probability: a tensor [heads, n, m] of dense
--   attention's weights, for coverage
-- @treturn table active, cells, allowed (of one head, mean), density (active / allowed), pairs (of tokens,
--   all heads), flops_forward, flops_backward, empty_rows, and coverage: the share of the dense attention's
--   mass that falls into active blocks
function Pattern:statistics(options)
  schema.check(OP, "the options of statistics", options, { type = "table" })
  local plain = {}
  for name, value in pairs(options) do
    if name ~= "head_dim" and name ~= "probability" then plain[name] = value end
  end
  local all, z = self:cells(plain)
  local active, allowed, tokens, empty = 0, 0, 0, 0
  for h = 1, #all do
    for i = 0, z.rows - 1 do
      local any = false
      if h == 1 then allowed = allowed + z.last(i) end
      for j = 0, z.columns - 1 do
        if all[h][i + 1][j + 1] then
          active, any = active + 1, true
          tokens = tokens + masks.pairs_in(z, i, j)
        end
      end
      if not any then empty = empty + 1 end
    end
  end
  local each = z.heads / #all
  local s = { active = active / #all, cells = z.rows * z.columns, allowed = allowed,
    empty_rows = empty / #all, density = allowed > 0 and active / #all / allowed or 0, pairs = tokens * each }
  local d = options.head_dim or 64
  s.flops_forward, s.flops_backward = 4 * d * s.pairs, 10 * d * s.pairs
  if options.probability then s.coverage = masks.coverage_of(all, z, options.probability) end
  return setmetatable(s, Statistics)
end

--- Token pairs of a cell: ends are ragged and the diagonal is triangular.
function masks.pairs_in(z, i, j)
  local r0, r1 = i * z.block, min((i + 1) * z.block, z.n)
  local c0, c1 = j * z.block, min((j + 1) * z.block, z.m)
  if not z.causal or r0 + z.shift >= c1 - 1 then return (r1 - r0) * (c1 - c0) end
  local sum = 0
  for r = r0, r1 - 1 do sum = sum + max(0, min(c1, r + z.shift + 1) - c0) end
  return sum
end

--- The share of attention's probability that lies in active blocks.
-- @tparam table all @tparam table z what Pattern:cells gives
-- @tparam Tensor probability [heads, N, M], of dense attention
-- @treturn number
function masks.coverage_of(all, z, probability)
  if not tensor.is(probability) or probability:dim() ~= 3 or probability:size(1) ~= z.heads
    or probability:size(2) ~= z.n or probability:size(3) ~= z.m then
    fail(OP, "probability must be [%d, %d, %d], got %s", z.heads, z.n, z.m, show(probability))
  end
  local inside, total = 0, 0
  local p = probability:totable()
  for h = 1, z.heads do
    local cells = all[#all == 1 and 1 or h]
    for n = 1, z.n do
      local row, weights = cells[floor((n - 1) / z.block) + 1], p[h][n]
      for j = 1, z.m do
        total = total + weights[j]
        if row[floor((j - 1) / z.block) + 1] then inside = inside + weights[j] end
      end
    end
  end
  return total > 0 and inside / total or 0
end

-- a letter a block: `#` active, `.` not, 1 to 9 the tenths of the heads for which it is
local Picture = {}
function Picture:__tostring()
  local lines = { self.title }
  for i, row in ipairs(self.z) do
    local letters = {}
    for j, part in ipairs(row) do
      letters[j] = part == 0 and "." or part == 1 and "#" or tostring(max(1, min(9, floor(10 * part))))
    end
    lines[i + 1] = table.concat(letters)
  end
  return table.concat(lines, "\n")
end

--- A picture: 1 where a block is active, 0 where not; the mean over heads. It prints as letters (rows are
-- query blocks), and lac.plot.heatmap(picture) draws it.
-- @tparam table options those of tensor(); output: a .png or .svg path, for heatmap; title; head
-- @treturn table what lac.plot.heatmap takes
function Pattern:picture(options)
  schema.check(OP, "the options of a picture", options, { type = "table" })
  local plain = {}
  for name, value in pairs(options) do
    if name ~= "output" and name ~= "title" and name ~= "head" then plain[name] = value end
  end
  local all, z = self:cells(plain)
  local picked = options.head and { all[#all == 1 and 1 or options.head] } or all
  if #picked == 0 then fail(OP, "there is no head %s", show(options.head)) end
  local rows = {}
  for i = 1, z.rows do
    rows[i] = {}
    for j = 1, z.columns do
      local sum = 0
      for h = 1, #picked do sum = sum + (picked[h][i][j] and 1 or 0) end
      rows[i][j] = sum / #picked
    end
  end
  return setmetatable({ z = rows, title = options.title or self.text, xlabel = "key block",
    ylabel = "query block", zlabel = "active", zrange = { 0, 1 }, output = options.output }, Picture)
end

return setmetatable(masks, { __index = function(_, name)
  fail(OP, "there is no masks.%s%s", tostring(name), schema.hint(name, schema.keys(masks)))
end })
