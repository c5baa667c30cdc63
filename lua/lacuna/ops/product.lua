--- Products beyond matmul: einsum, tensordot, and the named ones of linear algebra.
--
-- Everything is a composition of views, sums and matmul, so gradients need no rule. A pair of operands is
-- contracted by sorting its labels into four groups: in both and wanted later (batch), in both and not wanted
-- (summed), only left, only right; then it is one batched matrix product, whose operands are permuted views
-- that are copied only where a group of several labels does not lie together in memory. Pairs without a
-- summed label are an elementwise product.
--
-- With more than two operands the cheapest pair goes first (fewest multiplications; of equal ones the
-- smallest result): the greedy order of opt_einsum, good for the chains and stars that models write.
-- Rejected: exhaustive search (no gain for few operands, seconds for ten) and strided kernels per equation.

local schema = require "lacuna.schema"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local fail, show, is_integer = schema.fail, schema.show, schema.is_integer
local is, expect, axis, numel = tensor.is, tensor.expect, tensor.axis, tensor.numel
local fn = ops.fn
local define = ops.internal.define

-- ---- contraction of labelled tensors ------------------------------------------------------------------
-- A labelled tensor is { t =, labels = { label of each dimension } }; labels are any values, each once.

local function position(labels, label)
  for i = 1, #labels do
    if labels[i] == label then return i end
  end
end

local function product_of(sizes, labels)
  local n = 1
  for i = 1, #labels do n = n * sizes[labels[i]] end
  return n
end

-- sum over the labels that nobody wants
local function sum_unwanted(x, wanted)
  local dims, labels = {}, {}
  for i = 1, #x.labels do
    if wanted[x.labels[i]] then labels[#labels + 1] = x.labels[i] else dims[#dims + 1] = i end
  end
  if #dims == 0 then return x end
  return { t = fn.sum(x.t, dims), labels = labels }
end

-- t's dimensions in the order of the groups; each group becomes one dimension if `merge` says so
local function arranged(x, sizes, groups, merge)
  local order, shape = {}, {}
  for g = 1, #groups do
    for _, label in ipairs(groups[g]) do
      order[#order + 1] = position(x.labels, label)
      if not merge[g] then shape[#shape + 1] = sizes[label] end
    end
    if merge[g] then shape[#shape + 1] = product_of(sizes, groups[g]) end
  end
  return fn.reshape(#order > 0 and fn.permute(x.t, order) or x.t, shape)
end

-- x with dimensions of size 1 for the labels that it has not
local function aligned(x, sizes, labels)
  local order, shape = {}, {}
  for i, label in ipairs(labels) do
    local at = position(x.labels, label)
    if at then order[#order + 1] = at end
    shape[i] = at and sizes[label] or 1
  end
  return fn.reshape(#order > 0 and fn.permute(x.t, order) or x.t, shape)
end

local function joined(...)
  local list = {}
  for _, part in ipairs { ... } do
    for _, label in ipairs(part) do list[#list + 1] = label end
  end
  return list
end

local function check_rank(op, labels)
  if #labels > tensor.max_dims then
    fail(op, "the product of two operands would have %d dimensions, at most %d are supported", #labels,
         tensor.max_dims)
  end
end

local function contract(op, a, b, sizes, wanted)
  a, b = sum_unwanted(a, setmetatable({}, { __index = function(_, l)
    return wanted[l] or position(b.labels, l)
  end })), sum_unwanted(b, setmetatable({}, { __index = function(_, l)
    return wanted[l] or position(a.labels, l)
  end }))
  local batch, summed, left, right = {}, {}, {}, {}
  for _, label in ipairs(a.labels) do
    local shared = position(b.labels, label)
    local group = not shared and left or wanted[label] and batch or summed
    group[#group + 1] = label
  end
  for _, label in ipairs(b.labels) do
    if not position(a.labels, label) then right[#right + 1] = label end
  end
  local labels = joined(batch, left, right)
  if #summed == 0 or not device.is_float(a.t.c.dtype) then
    local all = joined(labels, summed)
    check_rank(op, all)
    local dims = {}
    for i = #labels + 1, #all do dims[#dims + 1] = i end
    local out = fn.mul(aligned(a, sizes, all), aligned(b, sizes, all))
    return { t = #dims > 0 and fn.sum(out, dims) or out, labels = labels }
  end
  check_rank(op, labels)
  local many = #batch > tensor.max_dims - 2
  local out = fn.matmul(arranged(a, sizes, { batch, left, summed }, { many, true, true }),
                        arranged(b, sizes, { batch, summed, right }, { many, true, true }))
  local shape = {}
  for i, label in ipairs(labels) do shape[i] = sizes[label] end
  return { t = fn.reshape(out, shape), labels = labels }
end

-- the pair to contract next: fewest multiplications, then the smallest result
local function next_pair(operands, sizes, wanted_by)
  local best, bi, bj
  for i = 1, #operands - 1 do
    for j = i + 1, #operands do
      local union, kept, wanted = 1, 1, wanted_by(i, j)
      for _, list in ipairs { operands[i].labels, operands[j].labels } do
        for _, label in ipairs(list) do
          if list == operands[i].labels or not position(operands[i].labels, label) then
            union = union * sizes[label]
            if wanted[label] then kept = kept * sizes[label] end
          end
        end
      end
      if not best or union < best[1] or (union == best[1] and kept < best[2]) then
        best, bi, bj = { union, kept }, i, j
      end
    end
  end
  return bi, bj
end

local function contract_all(op, operands, sizes, output)
  local function wanted_by(i, j)
    local wanted = {}
    for _, label in ipairs(output) do wanted[label] = true end
    for k = 1, #operands do
      if k ~= i and k ~= j then
        for _, label in ipairs(operands[k].labels) do wanted[label] = true end
      end
    end
    return wanted
  end
  while #operands > 1 do
    local i, j = next_pair(operands, sizes, wanted_by)
    local result = contract(op, operands[i], operands[j], sizes, wanted_by(i, j))
    table.remove(operands, j)
    operands[i] = result
  end
  local x, order = sum_unwanted(operands[1], wanted_by(1, 1)), {}
  for i, label in ipairs(output) do order[i] = position(x.labels, label) end
  return #order > 0 and fn.permute(x.t, order) or x.t
end

-- ---- einsum -------------------------------------------------------------------------------------------

local ELLIPSIS = "..."

-- "ab...c" -> { "a", "b", ELLIPSIS, "c" }
local function parse_term(term, equation)
  local list, at, seen = {}, 1, false
  while at <= #term do
    if term:sub(at, at + 2) == ELLIPSIS then
      if seen then fail("einsum", "'%s' in '%s' has more than one ellipsis", term, equation) end
      list[#list + 1], at, seen = ELLIPSIS, at + 3, true
    else
      local letter = term:sub(at, at)
      if not letter:match("%a") then
        fail("einsum", "'%s' in '%s' is no label: labels are letters, and '...'", letter, equation)
      end
      list[#list + 1], at = letter, at + 1
    end
  end
  return list
end

local function parse(equation, count)
  local text = equation:gsub("%s", "")
  local inputs, output = text, nil
  local arrow = text:find("->", 1, true)
  if arrow then
    inputs, output = text:sub(1, arrow - 1), text:sub(arrow + 2)
    if output:find("->", 1, true) then fail("einsum", "'%s' has more than one arrow", equation) end
  end
  local terms = {}
  for term in (inputs .. ","):gmatch("(.-),") do terms[#terms + 1] = parse_term(term, equation) end
  if #terms ~= count then
    fail("einsum", "'%s' has %d terms for %d tensors", equation, #terms, count)
  end
  return terms, output and parse_term(output, equation)
end

-- a term's labels for the dimensions of t: the ellipsis becomes labels -1, -2, ... counted from its end
local function spread(term, t, i, equation)
  local letters, labels = 0, {}
  for _, l in ipairs(term) do letters = letters + (l == ELLIPSIS and 0 or 1) end
  local rest = t.c.ndim - letters
  if rest < 0 or (rest > 0 and not position(term, ELLIPSIS)) then
    fail("einsum", "term %d of '%s' names %d dimensions, but tensor %d is %s", i, equation, letters, i,
      show(t))
  end
  for _, l in ipairs(term) do
    if l == ELLIPSIS then
      for k = rest, 1, -1 do labels[#labels + 1] = -k end
    else
      labels[#labels + 1] = l
    end
  end
  return labels
end

-- repeated labels of one operand: their diagonal
local function unrepeated(t, labels, equation)
  local i = 1
  while i <= #labels do
    local j
    for k = i + 1, #labels do j = j or labels[k] == labels[i] and k or nil end
    if not j then
      i = i + 1
    else
      if t:size(i) ~= t:size(j) then
        fail("einsum", "label '%s' of '%s' has the sizes %d and %d in %s", labels[i], equation, t:size(i),
             t:size(j), show(t))
      end
      t = fn.diagonal(t, 0, i, j) -- its dimension is the last
      local label = labels[i]
      table.remove(labels, j)
      table.remove(labels, i)
      labels[#labels + 1] = label
    end
  end
  return t
end

-- sizes of all labels; ellipsis dimensions of size 1 that broadcast are dropped from their operand
local function gather_sizes(operands, equation)
  local sizes = {}
  for i, x in ipairs(operands) do
    for d, label in ipairs(x.labels) do
      local n, known = x.t:size(d), sizes[label]
      if not known or (type(label) == "number" and known == 1) then
        sizes[label] = n
      elseif n ~= known and not (type(label) == "number" and n == 1) then
        fail("einsum",
          type(label) == "number" and "the ellipsis of '%s' does not broadcast: %s%d != %d in tensor %d"
          or "label in '%s' has two sizes: '%s' is %d before and %d in tensor %d", equation,
          type(label) == "number" and "" or label, known, n, i)
      end
    end
  end
  for _, x in ipairs(operands) do
    for d = #x.labels, 1, -1 do
      if type(x.labels[d]) == "number" and x.t:size(d) == 1 and sizes[x.labels[d]] ~= 1 then
        x.t = fn.squeeze(x.t, d)
        table.remove(x.labels, d)
      end
    end
  end
  return sizes
end

-- labels of the result: as written, or the ellipsis and then, in order, every letter that occurs once
local function output_labels(terms, output, sizes, equation)
  local labels, seen, count = {}, {}, {}
  local depth = 0
  while sizes[-(depth + 1)] do depth = depth + 1 end
  if not output then
    output = { ELLIPSIS }
    for _, term in ipairs(terms) do
      for _, l in ipairs(term) do count[l] = (count[l] or 0) + 1 end
    end
    local once = {}
    for l, n in pairs(count) do
      if n == 1 and l ~= ELLIPSIS then once[#once + 1] = l end
    end
    table.sort(once)
    for _, l in ipairs(once) do output[#output + 1] = l end
  end
  for _, l in ipairs(output) do
    if l == ELLIPSIS then
      for k = depth, 1, -1 do labels[#labels + 1] = -k end
    else
      if seen[l] then fail("einsum", "label '%s' appears twice in the output of '%s'", l, equation) end
      if not sizes[l] then fail("einsum", "label '%s' of the output of '%s' is in no term", l, equation) end
      labels[#labels + 1], seen[l] = l, true
    end
  end
  return labels
end

--- Einstein's summation: lac.einsum("bnhd,bmhd->bhnm", q, k).
-- Labels are letters; a label that is not in the output is summed, a label repeated within a term takes the
-- diagonal, "..." stands for the dimensions that are not named and broadcasts. Without "->" the output is the
-- ellipsis and the labels that occur once, in alphabetical order. Any number of tensors; the cheapest pair is
-- multiplied first.
-- @tparam string equation @tparam Tensor ... or one list of tensors
define { name = "einsum", composite = true, method = false, forward = function(equation, ...)
  if type(equation) ~= "string" then fail("einsum", "the equation must be a string, got %s",
    show(equation)) end
  local list, count = { ... }, select("#", ...)
  if count == 1 and type(list[1]) == "table" and not is(list[1]) then list, count = list[1], #list[1] end
  if count == 0 then fail("einsum", "'%s' has no tensors to work on", equation) end
  local terms, output = parse(equation, count)
  local operands = {}
  for i = 1, count do
    expect("einsum", ("tensor %d"):format(i), list[i])
    local labels = spread(terms[i], list[i], i, equation)
    operands[i] = { t = unrepeated(list[i], labels, equation), labels = labels }
  end
  local sizes = gather_sizes(operands, equation)
  return contract_all("einsum", operands, sizes, output_labels(terms, output, sizes, equation))
end }

--- The sum of products over pairs of dimensions: the last n of a with the first n of b, or lists of both.
-- @tparam Tensor a @tparam Tensor b @tparam[opt=2] integer|table dims n, or {{dims of a}, {dims of b}}
define { name = "tensordot", composite = true, forward = function(a, b, dims)
  local op = "tensordot"
  expect(op, "a", a)
  expect(op, "b", b)
  dims = dims == nil and 2 or dims
  local da, db = {}, {}
  if is_integer(dims) then
    if dims < 0 or dims > a.c.ndim or dims > b.c.ndim then
      fail(op, "cannot sum over %d dimensions of %s and %s", dims, show(a), show(b))
    end
    for i = 1, dims do da[i], db[i] = a.c.ndim - dims + i, i end
  else
    if type(dims) ~= "table" or is(dims) or type(dims[1]) ~= "table" or type(dims[2]) ~= "table"
      or is(dims[1]) or is(dims[2]) or #dims[1] ~= #dims[2] then
      fail(op, "dims must be a number or two lists of one length, got %s", show(dims))
    end
    da, db = dims[1], dims[2]
  end
  local la, lb, sizes = {}, {}, {}
  for i = 1, a.c.ndim do la[i] = "a" .. i end
  for i = 1, b.c.ndim do lb[i] = "b" .. i end
  for i = 1, #da do
    local p, q = axis(op, a, da[i]) + 1, axis(op, b, db[i]) + 1
    if a:size(p) ~= b:size(q) then
      fail(op, "dimension %d of %s and %d of %s differ: %d != %d", p, show(a), q, show(b), a:size(p),
        b:size(q))
    end
    if la[p]:sub(1, 1) == "s" or lb[q]:sub(1, 1) == "s" then fail(op, "a dimension appears twice in %s",
      show(dims)) end
    la[p], lb[q] = "s" .. i, "s" .. i
  end
  local output = {}
  for i = 1, #la do sizes[la[i]] = a:size(i) end
  for i = 1, #lb do sizes[lb[i]] = b:size(i) end
  for _, l in ipairs(joined(la, lb)) do
    if l:sub(1, 1) ~= "s" then output[#output + 1] = l end
  end
  return (contract_all(op, { { t = a, labels = la }, { t = b, labels = lb } }, sizes, output))
end }

-- ---- named products -------------------------------------------------------------------------------------

local function vectors(op, a, b, need)
  expect(op, "a", a)
  expect(op, "b", b)
  if a.c.ndim ~= 1 or b.c.ndim ~= 1 or (need and numel(a) ~= numel(b)) then
    fail(op, "needs two vectors%s, got %s and %s", need and " of one length" or "", show(a), show(b))
  end
end

--- The product of two vectors, one number.
define { name = "dot", composite = true, forward = function(a, b)
  vectors("dot", a, b, true)
  if not device.is_float(a.c.dtype) then return (fn.sum(fn.mul(a, b))) end
  return (fn.matmul(a, b))
end }

--- out[i, j] = a[i] b[j].
define { name = "outer", composite = true, forward = function(a, b)
  vectors("outer", a, b, false)
  return (fn.mul(fn.unsqueeze(a, 2), b))
end }

local function batched(op, a, b, rank)
  expect(op, "a", a)
  expect(op, "b", b)
  if a.c.ndim ~= rank or b.c.ndim ~= rank or (rank == 3 and a.c.shape[0] ~= b.c.shape[0]) then
    fail(op, rank == 3 and "needs a [B, M, K] and b [B, K, N], got %s and %s" or
      "needs a [M, K] and b [K, N], got %s and %s", show(a), show(b))
  end
  return (fn.matmul(a, b))
end

--- Matrix products of a batch: [B, M, K] x [B, K, N] -> [B, M, N].
define { name = "bmm", composite = true, forward = function(a, b) return (batched("bmm", a, b, 3)) end }

local ADD = { alpha = { type = "number", default = 1 }, beta = { type = "number", default = 1 } }
local function added(op, rank)
  define { name = op, composite = true, forward = function(c, a, b, options)
    expect(op, "c", c)
    local o = schema.options(op, options, ADD)
    local product = batched(op, a, b, rank)
    if o.alpha ~= 1 then product = product * o.alpha end
    if o.beta == 0 then return product end
    return (fn.add(product, o.beta == 1 and c or c * o.beta))
  end }
end
--- beta c + alpha a b for matrices; c broadcasts.
added("addmm", 2)
--- beta c + alpha a b for batches of matrices; c broadcasts.
added("baddbmm", 3)
