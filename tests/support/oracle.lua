--- Reference mathematics of dilated attention: a dense boolean mask per branch, naive loops, doubles.
--
-- This is the definition written down as slowly and as directly as possible, and it shares nothing with the
-- engine: no strips, no lattice indices, no online softmax, no log-sum-exp carry. A pair (query position p,
-- key j) belongs to a branch if both are kept, (x mod w) mod r = offset, and floor(x / w) agrees. The exact
-- merge is not computed from branches at all: every key has a multiplicity (in how many branches it belongs
-- to the row) and one softmax runs over the keys weighted by it. Gradients are the textbook softmax backward
-- per branch, or for that one softmax; the engine's P = exp(S - lse), dS = P (dP - delta) with a global
-- delta does not appear.
--
-- `rounding` makes the same loops a naive implementation in a lower precision: {result = f, sum = g} rounds
-- every tensor that an operator would write (scores, probabilities, outputs, ...) and every partial sum. Its
-- backward then has only what a backward that saves out and lse has: probabilities exp(s - lse) and the
-- inner product of dout and out, each rounded. (One that keeps the whole probability matrix is a little
-- better in peaked rows.) A third function, weight, rounds the softmax' exponentials where they weigh values
-- but not in their sum. `products` {count, f}: inner products are made as matrix units make them, `count`
-- products at a time exactly, their sum and the one so far by f. `inner` makes those of queries and keys:
-- inner(n, x, xa, y, ya) of x[xa + 1 .. xa + n] and y[ya + 1 .. ya + n].
--
-- Arrays are flat, row-major, from 1. Configurations as in attn_direct (filled).

local oracle = {}

local exact = { result = function(x) return x end, sum = function(x) return x end }

-- the function that rounds an inner product of n terms after its i-th
local function adder(ro)
  if not ro.products then return ro.sum end
  local count, f = unpack(ro.products)
  return function(x, i, n) return (i % count == 0 or i == n) and f(x) or x end
end

-- the inner product of x[xa + 1 .. xa + n] and y[ya + 1 .. ya + n]
local function inner_product(ro, n, x, xa, y, ya)
  if ro.inner then return ro.inner(n, x, xa, y, ya) end
  local sum, count, f = 0, 1, ro.sum
  if ro.products then count, f = ro.products[1], ro.products[2] end
  for from = 1, n, count do
    for d = from, math.min(from + count - 1, n) do sum = sum + x[xa + d] * y[ya + d] end
    sum = f(sum)
  end
  return sum
end

-- ---- which pairs ---------------------------------------------------------------------------------

-- offset of head h (from 0) in branch g (from 1)
local function offset_of(c, g, h)
  local r = c.dilations[g]
  if c.offset == "branch" then return (g - 1) % r end
  if c.offset == "mod" then return h % r end
  return math.floor(h / math.ceil(c.H / r))
end
oracle.offset_of = offset_of

-- does head h run branch g?
local function runs(c, g, h)
  if c.heads == "all" then return true end
  local G, first = #c.segments, 0
  for i = 1, g - 1 do first = first + math.floor(c.H / G) + (i <= c.H % G and 1 or 0) end
  return h >= first and h < first + math.floor(c.H / G) + (g <= c.H % G and 1 or 0)
end
oracle.runs = runs

local function position(c, n) return c.align == "end" and n + c.M - c.N or n end

--- Element (b, h, row, column) of { shape =, data = }: [rows, columns] with up to two axes in front, which
-- may be 1 (for all).
function oracle.at(x, b, h, row, column)
  local s, at = x.shape, 0
  local index = { b, h, row, column }
  for i = 1, #s do
    local here = index[4 - #s + i]
    at = at * s[i] + (s[i] == 1 and 0 or here)
  end
  return x.data[at + 1], at + 1
end

-- do the options of single pairs let row n attend to key j?
local function lets(c, b, h, n, j)
  if c.mask and not oracle.at(c.mask, b, h, n, j) then return false end
  if c.bias and oracle.at(c.bias, b, h, n, j) == -math.huge then return false end
  if c.blocks then
    return (oracle.at(c.blocks, b, h, math.floor(n / c.block), math.floor(j / c.block)))
  end
  return true
end

--- Does row n (from 0) attend to key j (from 0) in branch g, for head h of batch item b?
function oracle.attends(c, g, b, h, n, j)
  local p = position(c, n)
  local w, r, o = c.segments[g], c.dilations[g], offset_of(c, g, h)
  if not runs(c, g, h) then return false end
  if (p % w) % r ~= o or (j % w) % r ~= o then return false end
  if math.floor(p / w) ~= math.floor(j / w) then return false end
  if c.causal and j > p then return false end
  if c.window and c.window >= 0 and math.abs(p - j) > c.window then return false end
  if c.padding and not c.padding[b * c.M + j + 1] then return false end
  if c.lengths and j >= c.lengths[b + 1] then return false end
  return lets(c, b, h, n, j)
end

--- Is row n kept by branch g for head h, whatever keys there are?
function oracle.keeps(c, g, h, n)
  local p = position(c, n)
  return p >= 0 and runs(c, g, h) and (p % c.segments[g]) % c.dilations[g] == offset_of(c, g, h)
end

-- weights of one softmax over keys with multiplicity count[j] > 0: p[j] sums to 1; returns p, lse, and the p
-- that a backward sees
local function softmax(c, s, count, ro)
  local top = -math.huge
  for j = 1, c.M do if count[j] > 0 and (s[j] > top or s[j] ~= s[j]) then top = s[j] end end
  local p, sum = {}, 0
  for j = 1, c.M do
    p[j] = count[j] > 0 and ro.result(count[j] * math.exp(s[j] - top)) or 0
    sum = ro.sum(sum + p[j])
  end
  if sum == 0 then return p, -math.huge, p end
  for j = 1, c.M do
    local x = ro.weight and count[j] > 0 and count[j] * ro.weight(p[j] / count[j]) or p[j]
    p[j] = ro.result(x / sum)
  end
  local lse = ro.sum(top + math.log(sum))
  if ro == exact then return p, lse, p end
  local again = {} -- what a backward gets back from s and the saved lse
  for j = 1, c.M do again[j] = count[j] > 0 and ro.result(count[j] * math.exp(ro.sum(s[j] - lse))) or 0 end
  return p, lse, again
end

-- the keys of row n, as multiplicities: of each branch that runs, and of all of them
local function counts_of(c, b, h, n)
  local counts, total = {}, {}
  for j = 1, c.M do total[j] = 0 end
  for g = 1, #c.segments do
    local count = {}
    for j = 1, c.M do
      count[j] = oracle.attends(c, g, b, h, n, j - 1) and 1 or 0
      total[j] = total[j] + count[j]
      if c.dedup and total[j] > 1 then total[j] = 1 end
    end
    if runs(c, g, h) then counts[#counts + 1] = count end
  end
  return counts, total
end

-- the softmaxes that make one output row: list of { p =, lse =, weight =, exact = } and the merged lse.
-- out = sum weight * p V; detached weights are constants in the backward.
local function parts_of(c, s, counts, total, ro)
  local parts, union = {}, false
  for _, count in ipairs(counts) do
    local p, lse, again = softmax(c, s, count, ro)
    parts[#parts + 1] = { p = p, lse = lse, again = again }
  end
  local merged, lse, again = softmax(c, s, total, ro)
  if c.merge == "lse" then union = true end
  for _, part in ipairs(parts) do
    if c.merge == "mean" then part.weight = 1 / #c.segments
    elseif c.merge == "sum" then part.weight = 1
    else part.weight = lse == -math.huge and 0 or ro.result(math.exp(part.lse - lse)) end
  end
  if union then parts = { { p = merged, lse = lse, again = again, weight = 1 } } end
  return parts, lse, merged
end

--- Every row of results that a change of inputs does not reach, when one position of batch item 0 changed in
-- all heads: of q and dout, or (key) of k and v. visit(name, b, rows, row, heads, h, width) is called for
-- each, with the sizes that say where it lies. Gradients of a key change if a changed row sees it.
function oracle.unreached(c, key, changed, visit)
  for b = 0, c.B - 1 do for h = 0, c.H - 1 do
    local touched, reached = {}, {} -- rows; keys, by this head
    local function sees(n, j)
      for g = 1, #c.segments do if oracle.attends(c, g, b, h, n, j) then return true end end
      return false
    end
    for n = 0, c.N - 1 do
      if key then touched[n] = b == 0 and sees(n, changed)
      else touched[n] = b == 0 and n == changed end
      for j = 0, c.M - 1 do if touched[n] and sees(n, j) then reached[j] = true end end
      if not touched[n] then
        visit("out", b, c.N, n, c.H, h, c.D)
        visit("lse", b, c.N, n, c.H, h, 1)
        visit("dq", b, c.N, n, c.H, h, c.D)
      end
    end
    for j = 0, c.H == c.Hk and c.M - 1 or -1 do
      if not reached[j] then
        visit("dk", b, c.M, j, c.Hk, h, c.D)
        visit("dv", b, c.M, j, c.Hk, h, c.D)
      end
    end
  end end
end

--- Expected output row for q = 0 and V = identity: the weight of every key.
function oracle.pattern_row(c, b, h, n)
  local zero, row = {}, {}
  for j = 1, c.M do zero[j], row[j] = 0, 0 end
  local counts, total = counts_of(c, b, h, n)
  local parts, lse = parts_of(c, zero, counts, total, exact)
  for _, part in ipairs(parts) do
    for j = 1, c.M do row[j] = row[j] + part.weight * part.p[j] end
  end
  return row, lse
end

-- ---- forward and backward ------------------------------------------------------------------------

--- Everything at once. dout nil: forward only. keep(b, h, n, j) says whether dropout keeps a pair; lse: true
-- if only lse and branch_lse are asked for, so that the rest stays 0, and scores that nobody sees.
-- @treturn table out, lse, dq, dk, dv (flat arrays); dbias of a bias; branch_lse [G, B, N, H] of mean and sum
function oracle.run(c, q, k, v, dout, dlse, opts)
  opts = opts or {}
  local ro, keep = opts.rounding or exact, opts.keep
  local add = adder(ro)
  local B, N, M, H, Hk, D = c.B, c.N, c.M, c.H, c.Hk, c.D
  local scale = (c.scale and c.scale ~= 0) and c.scale or 1 / math.sqrt(D)
  local res = { out = {}, lse = {}, dq = {}, dk = {}, dv = {}, dbias = c.bias and {},
                branch_lse = c.heads == "all" and (c.merge == "mean" or c.merge == "sum") and {} or nil }
  for i = 1, c.bias and #c.bias.data or 0 do res.dbias[i] = 0 end
  for i = 1, B * N * H * D do res.out[i], res.dq[i] = 0, 0 end
  for i = 1, B * M * Hk * D do res.dk[i], res.dv[i] = 0, 0 end
  local inverse = 1 / (1 - (c.dropout or 0))
  for b = 0, B - 1 do for h = 0, H - 1 do
    local hk = math.floor(h / (H / Hk))
    for n = 0, N - 1 do
      local qa = ((b * N + n) * H + h) * D
      local s, z, counts, total = {}, {}, counts_of(c, b, h, n)
      for j = 0, M - 1 do
        local length = opts.lse and total[j + 1] == 0 and 0 or D
        local dot = inner_product(ro, length, q, qa, k, ((b * M + j) * Hk + hk) * D)
        s[j + 1] = ro.result(ro.result(dot) * scale)
        if c.bias then s[j + 1] = ro.result(s[j + 1] + oracle.at(c.bias, b, h, n, j)) end
        if c.alibi then s[j + 1] = ro.result(s[j + 1] - c.alibi[h + 1] * math.abs(position(c, n) - j)) end
        z[j + 1] = not keep and 1 or keep(b, h, n, j) and inverse or 0
      end
      local parts, lse, merged = parts_of(c, s, counts, total, ro)
      res.lse[(b * N + n) * H + h + 1] = lse
      for g, part in ipairs(parts) do
        if res.branch_lse then res.branch_lse[(((g - 1) * B + b) * N + n) * H + h + 1] = part.lse end
        part.out = {}
        for d = 1, opts.lse and 0 or D do
          local sum = 0
          for j = 0, M - 1 do
            if part.p[j + 1] ~= 0 then
              sum = add(sum + part.p[j + 1] * z[j + 1] * v[((b * M + j) * Hk + hk) * D + d], j + 1, M)
            end
          end
          part.out[d] = ro.result(sum)
          res.out[qa + d] = ro.sum(res.out[qa + d] + part.weight * part.out[d])
        end
      end
      for d = 1, D do res.out[qa + d] = ro.result(res.out[qa + d]) end
      local ds = {}
      for j = 1, M do ds[j] = 0 end
      for _, part in ipairs(dout and parts or {}) do
        local dp, inner = {}, 0
        for j = 0, M - 1 do
          local ka, dot = ((b * M + j) * Hk + hk) * D, 0
          if part.again[j + 1] ~= 0 then
            for d = 1, D do
              local g = ro.result(part.weight * dout[qa + d])
              res.dv[ka + d] = ro.sum(res.dv[ka + d] + part.again[j + 1] * z[j + 1] * g)
              dot = add(dot + g * v[ka + d], d, D)
            end
          end
          dp[j + 1] = ro.result(dot * z[j + 1])
          inner = ro.sum(inner + part.p[j + 1] * dp[j + 1])
        end
        if ro ~= exact then
          inner = 0
          for d = 1, D do inner = ro.sum(inner + ro.result(part.weight * dout[qa + d]) * part.out[d]) end
        end
        for j = 1, M do -- a row that no branch keeps may hold NaN: what has no weight has no part in it
          if part.again[j] ~= 0 then ds[j] = ds[j] + ro.result(part.again[j] * (dp[j] - inner)) end
        end
      end
      if dlse and lse ~= -math.huge then
        local gl = dlse[(b * N + n) * H + h + 1]
        for j = 1, M do ds[j] = ds[j] + gl * merged[j] end
      end
      for j = 0, dout and M - 1 or -1 do
        local ka = ((b * M + j) * Hk + hk) * D
        if ds[j + 1] ~= 0 then
          if c.bias then
            local _, at = oracle.at(c.bias, b, h, n, j)
            res.dbias[at] = ro.sum(res.dbias[at] + ds[j + 1])
          end
          for d = 1, D do
            res.dq[qa + d] = ro.sum(res.dq[qa + d] + scale * ds[j + 1] * k[ka + d])
            res.dk[ka + d] = ro.sum(res.dk[ka + d] + scale * ds[j + 1] * q[qa + d])
          end
        end
      end
    end
  end end
  for _, name in ipairs { "dq", "dk", "dv", c.bias and "dbias" } do
    for i = 1, #res[name] do res[name][i] = ro.result(res[name][i]) end
  end
  return res
end

return oracle
