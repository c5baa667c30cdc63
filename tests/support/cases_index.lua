--- Cases of the operators on order, indices, shapes, products by index notation, convolutions and losses.
--
-- Written like those of cases.lua, with its helpers; tests/ops_spec.lua makes the tests. References are plain
-- Lua over plain arrays: sorting is an insertion of (value, position) pairs, scattering a loop in the order
-- of the indices, a convolution its definition with explicit bounds. Where an operator returns several
-- tensors, each has a case of its own, named by its label. Random normals are distinct in f64 and f32; in f16
-- and bf16 they are not always, which tests that equal elements keep their order.

return function(cases)
  local h = cases.helpers
  local case, with = h.case, h.with
  local build, at = cases.build, cases.at

  -- values and 0-based positions of a list in order; NaN does not occur here (tests/order_spec.lua)
  local function sorted_list(v, descending)
    local order = {}
    for i = 1, #v do
      local j = #order + 1
      while j > 1 do
        local before = v[order[j - 1] + 1]
        if descending and before >= v[i] or not descending and before <= v[i] then break end
        j = j - 1
      end
      table.insert(order, j, i - 1)
    end
    local values = {}
    for i = 1, #order do values[i] = v[order[i] + 1] end
    return values, order
  end

  -- a reference that makes a list of a line along d and takes its first k elements
  local function lines(d, k, f)
    return function(_, x)
      local shape = with(x.shape, d, k or x.shape[d])
      return build(shape, function(i)
        local v = {}
        for j = 1, x.shape[d] do v[j] = at(x, with(i, d, j)) end
        return f(v)[i[d]]
      end)
    end
  end
  local function values_of(descending) return function(v) return (sorted_list(v, descending)) end end
  local function places_of(descending) return function(v) return select(2, sorted_list(v, descending)) end end

  -- ---- order ---------------------------------------------------------------------------------------

  case { name = "sort", inputs = { { 3, 5, 2 } }, call = function(_, x) return (x:sort(2)) end,
         ref = lines(2, nil, values_of(false)),
         bad = { { function(_, x) return x:sort(4) end, "dim 4 is out of range" },
                 { function(_, x) return x:sort(1, 1) end, "descending must be true or false, got 1" } } }
  case { name = "sort", label = "descending", inputs = { { 4, 40 } },
         call = function(_, x) return (x:sort(-1, true)) end, ref = lines(2, nil, values_of(true)) }
  case { name = "sort", label = "positions", inputs = { { 40, 3 } }, grad = false,
         call = function(_, x) return (select(2, x:sort(1, true))) end, ref = lines(1, nil, places_of(true)) }
  case { name = "argsort", inputs = { { 3, 40 } }, grad = false, ref = lines(2, nil, places_of(false)),
         bad = { { function(lac) return lac.argsort(3) end, "argsort: x must be a tensor, got 3" } } }
  case { name = "topk", inputs = { { 3, 9, 2 } }, call = function(_, x) return (x:topk(4, 2)) end,
         ref = lines(2, 4, values_of(true)),
         bad = { { function(_, x) return x:topk(10, 2) end,
                   "k = 10, but dimension 2 of x %[3, 9, 2%] has 9" },
                 { function(_, x) return x:topk(-1) end, "k must be at least 0, got %-1" },
                 { function(_, x) return x:topk() end, "k must be an integer" } } }
  case { name = "topk", label = "few of many", inputs = { { 2, 70 } },
         call = function(_, x) return (x:topk(3)) end, ref = lines(2, 3, values_of(true)) }
  case { name = "topk", label = "smallest, positions", inputs = { { 2, 70 } }, grad = false,
         call = function(_, x) return (select(2, x:topk(20, -1, false))) end,
         ref = lines(2, 20, places_of(false)) }
  case { name = "kthvalue", inputs = { { 3, 7 } }, call = function(_, x) return (x:kthvalue(3)) end,
         ref = h.fold(2, function(_, v) return sorted_list(v)[3] end),
         bad = { { function(_, x) return x:kthvalue(8) end, "k = 8, but dimension 2" } } }
  case { name = "median", inputs = { { 3, 6 } }, call = function(_, x) return (x:median(2)) end,
         ref = h.fold(2, function(_, v) return sorted_list(v)[3] end),
         bad = { { function(_, x) return x:median(nil, true) end, "keepdim needs a dim" } } }
  case { name = "median", label = "all", inputs = { { 3, 5 } }, call = function(_, x) return (x:median()) end,
         ref = function(_, x) return { shape = {}, data = { sorted_list(x.data)[8] } } end }
  local function quantile(R, v, q)
    local s, p = sorted_list(v), q * (#v - 1)
    local low = math.floor(p)
    local w = p - low
    if w == 0 then return s[low + 1] end
    return R(R(s[low + 1] * (1 - w)) + R(s[low + 2] * w))
  end
  case { name = "quantile", inputs = { { 3, 6 } }, call = function(_, x) return x:quantile(0.3, 2) end,
         ref = h.fold(2, function(R, v) return quantile(R, v, 0.3) end),
         bad = { { function(_, x) return x:quantile(1.5) end, "q%[1%] must be at most 1, got 1.5" },
                 { function(_, x) return x:gt(0):quantile(0.5) end, "x must hold floats" } } }
  case { name = "quantile", label = "several", inputs = { { 2, 6 } },
         call = function(_, x) return x:quantile({ 0, 0.5, 1 }) end,
         ref = function(R, x)
           return { shape = { 3 }, data = { quantile(R, x.data, 0), quantile(R, x.data, 0.5),
                                            quantile(R, x.data, 1) } }
         end }

  local function place_of(s, v, right)
    local n = 0
    for i = 1, #s do if s[i] < v or right and s[i] == v then n = n + 1 end end
    return n
  end
  for _, right in ipairs { false, true } do
    case { name = "searchsorted", label = right and "right" or nil, grad = false,
           inputs = { { 2, 9 }, { 2, 5 } },
           call = function(lac, s, v)
             s = s:sort()
             return lac.searchsorted(s, lac.cat({ v, s:narrow(2, 3, 2) }, 2), right)
           end,
           ref = function(_, s, v)
             return build({ 2, 7 }, function(i)
               local line = {}
               for j = 1, 9 do line[j] = at(s, { i[1], j }) end
               line = sorted_list(line)
               return place_of(line, i[2] <= 5 and at(v, i) or line[i[2] - 3], right)
             end)
           end,
           bad = { { function(lac, s, v) return lac.searchsorted(s:narrow(1, 1, 1), v) end,
                     "agree with values in all dimensions but the last" } } }
  end
  case { name = "bucketize", inputs = { { 3, 4 }, { 6 } }, grad = false,
         call = function(_, x, b) return x:bucketize((b:sort())) end,
         ref = function(_, x, b)
           local s = sorted_list(b.data)
           return build(x.shape, function(i) return place_of(s, at(x, i)) end)
         end,
         bad = { { function(_, x) return x:bucketize(x) end, "boundaries must be %[n%]" } } }

  local INDEX = { 4, 5, kind = "index", high = 7 }
  local function distinct(x)
    local s, values, counts = sorted_list(x.data), {}, {}
    for i = 1, #s do
      if i == 1 or s[i] ~= s[i - 1] then values[#values + 1], counts[#counts + 1] = s[i], 0 end
      counts[#counts] = counts[#counts] + 1
    end
    return values, counts
  end
  case { name = "unique", inputs = { INDEX }, grad = false, call = function(_, x) return (x:unique()) end,
         ref = function(_, x)
           local values = distinct(x)
           return { shape = { #values }, data = values }
         end,
         bad = { { function(lac) return lac.unique {} end, "x must be a tensor" } } }
  case { name = "unique", label = "inverse", inputs = { INDEX }, grad = false,
         call = function(_, x) return (select(2, x:unique())) end,
         ref = function(_, x)
           local values = distinct(x)
           return build(x.shape, function(i) return place_of(values, at(x, i)) end)
         end }
  case { name = "unique", label = "counts", inputs = { INDEX }, grad = false,
         call = function(_, x) return (select(3, x:unique())) end,
         ref = function(_, x)
           local _, counts = distinct(x)
           return { shape = { #counts }, data = counts }
         end }
  case { name = "nonzero", inputs = { { 3, 2, 4, kind = "bool" } }, grad = false,
         ref = function(_, x)
           local rows = {}
           build(x.shape, function(i)
             if at(x, i) ~= 0 then
               for d = 1, 3 do rows[#rows + 1] = i[d] - 1 end
             end
           end)
           return { shape = { #rows / 3, 3 }, data = rows }
         end }
  case { name = "masked_select", inputs = { { 3, 4 }, { 4, kind = "bool" } },
         ref = function(_, x, m)
           local list = {}
           build(x.shape, function(i) if m.data[i[2]] ~= 0 then list[#list + 1] = at(x, i) end end)
           return { shape = { #list }, data = list }
         end,
         bad = { { function(_, x) return x:masked_select(x) end, "mask must be bool" },
                 { function(lac, x) return x:masked_select(lac.zeros { 5, dtype = "bool" }) end,
                   "do not broadcast: 4 != 5 in dimension 2" } } }

  -- ---- writing to indexed places ----------------------------------------------------------------------

  -- x with f(old, source, first) at each place, sources in row-major order of idx
  local function scattered(d, f, finish)
    return function(R, x, idx, src)
      local out, count = { shape = x.shape, data = {} }, {}
      for k = 1, #x.data do out.data[k], count[k] = x.data[k], 0 end
      local function offset(i)
        local o = 0
        for e = 1, #x.shape do o = o * x.shape[e] + i[e] - 1 end
        return o + 1
      end
      build(idx.shape, function(i)
        local o = offset(with(i, d, at(idx, i) + 1))
        out.data[o], count[o] = f(R, out.data[o], at(src, i), count[o]), count[o] + 1
      end)
      for k = 1, #x.data do if finish then out.data[k] = finish(R, out.data[k], count[k]) end end
      return out
    end
  end
  local PLACES = { 3, 5, 2, kind = "index", high = 4 }
  local SPECS = { { 3, 4, 2 }, PLACES, { 3, 5, 2 } }
  case { name = "scatter", inputs = SPECS, call = function(_, x, i, s) return x:scatter(2, i, s) end,
         ref = scattered(2, function(_, _, s) return s end),
         bad = { { function(_, x, i, s) return x:scatter(1, i, s) end,
                   "dst %[3, 4, 2%] and index %[3, 5, 2%] must have the same sizes except in dimension 1" },
                 { function(_, x, i, s) return x:scatter(2, i + 1, s) end, "outside 0..3" },
                 { function(_, x, i) return x:scatter(2, i, "x") end, "src must be a tensor or a number" },
                 { function(_, x, i, s) return x:scatter(2, i, s:narrow(2, 1, 4)) end,
                   "does not broadcast to" } } }
  case { name = "scatter", label = "number, last dim", inputs = { { 3, 4 }, { 3, 2, kind = "index",
    high = 4 } },
         call = function(_, x, i) return x:scatter(-1, i, 1.5) end,
         ref = function(R, x, i)
           return scattered(2, function() return 1.5 end)(R, x, i, { shape = {}, data = { 1.5 } })
         end }
  local function plus(R, old, s) return R(old + s) end
  case { name = "scatter_add", inputs = SPECS, call = function(_, x, i, s) return x:scatter_add(2, i, s) end,
         ref = scattered(2, plus) }
  case { name = "scatter_add", label = "expanded source", inputs = { { 6 }, { 9, kind = "index", high = 6 },
    { 1 } },
         call = function(_, x, i, s) return x:scatter_add(1, i, s) end, ref = scattered(1, plus) }
  for _, self in ipairs { true, false } do
    local label = self and "" or " without self"
    local function fold_in(f)
      return function(R, old, s, n) return (self or n > 0) and f(R, old, s) or s end
    end
    local function reduce_case(mode, f, finish)
      case { name = "scatter_reduce", label = mode .. label, inputs = SPECS,
             call = function(_, x, i, s) return x:scatter_reduce(2, i, s, mode, self) end,
             ref = scattered(2, fold_in(f), finish),
             bad = { { function(_, x, i, s) return x:scatter_reduce(2, i, s, "amix") end,
               "did you mean 'amax'" } } }
    end
    reduce_case("sum", plus)
    reduce_case("mean", plus, function(R, v, n) return n == 0 and v or R(v / (n + (self and 1 or 0))) end)
    reduce_case("amax", function(_, a, b) return math.max(a, b) end)
    reduce_case("amin", function(_, a, b) return math.min(a, b) end)
  end

  -- whole slices: idx [n] along d
  local function sliced(d, f)
    return function(R, x, idx, src)
      local full = build(with(x.shape, d, #idx.data), function(i) return idx.data[i[d]] end)
      return scattered(d, f)(R, x, full, src)
    end
  end
  local ROWS = { { 2, 4, 3 }, { 6, kind = "index", high = 4 }, { 2, 6, 3 } }
  case { name = "index_add", inputs = ROWS, call = function(_, x, i, s) return x:index_add(2, i, s, -2) end,
         ref = sliced(2, function(R, old, s) return R(old + R(-2 * s)) end),
         bad = { { function(_, x, i, s) return x:index_add(1, i, s) end, "index_add" },
                 { function(_, x, i, s) return x:index_add(2, i:view(2, 3), s) end,
                   "must have one dimension" },
                 { function(_, x, i, s) return x:index_add(2, i, s, "a") end, "alpha must be a number" } } }
  case { name = "index_copy", inputs = ROWS, call = function(_, x, i, s) return x:index_copy(2, i, s) end,
         ref = sliced(2, function(_, _, s) return s end) }
  case { name = "index_copy", label = "first dim", inputs = { { 4, 3 }, { 3, kind = "index", high = 4 }, { 3,
    3 } },
         call = function(_, x, i, s) return x:index_copy(1, i, s) end, ref = sliced(1, function(_, _,
           s) return s end) }
  case { name = "index_fill", inputs = { { 4, 3 }, { 2, kind = "index", high = 3 } },
         call = function(_, x, i) return x:index_fill(2, i, 0.5) end,
         ref = function(R, x, i)
           return sliced(2, function() return 0.5 end)(R, x, i, { shape = {}, data = { 0.5 } })
         end,
         bad = { { function(_, x, i) return x:index_fill(2, i, x) end, "value must be a number" } } }
  case { name = "take_along_dim", inputs = { { 3, 4, 2 }, { 1, 5, 2, kind = "index", high = 4 } },
         call = function(_, x, i) return x:take_along_dim(i, 2) end,
         ref = function(_, x, idx)
           return build({ 3, 5, 2 }, function(i) return at(x, with(i, 2, at(idx, i) + 1)) end)
         end,
         bad = { { function(_, x, i) return x:take_along_dim(i, 1) end,
           "do not broadcast: 4 != 5 in dimension 2" } } }
  case { name = "bincount", inputs = { { 3, 4, kind = "index", high = 5 }, { 3, 4 } },
         call = function(_, i, w) return i:bincount { weights = w, minlength = 7 } end,
         ref = function(R, idx, w)
           local out = {}
           for k = 1, 7 do out[k] = 0 end
           for k = 1, #idx.data do out[idx.data[k] + 1] = R(out[idx.data[k] + 1] + w.data[k]) end
           return { shape = { 7 }, data = out }
         end,
         bad = { { function(_, i) return (i - 1 - i:max()):bincount() end, "outside 0" },
                 { function(_, i) return i:bincount { weight = 1 } end, "did you mean 'weights'" } } }
  case { name = "bincount", label = "counts", inputs = { { 20, kind = "index", high = 5 } }, grad = false,
         call = function(_, i) return i:bincount { minlength = 5 } end,
         ref = function(_, idx)
           return build({ 5 }, function(i)
             local n = 0
             for k = 1, 20 do if idx.data[k] == i[1] - 1 then n = n + 1 end end
             return n
           end)
         end }
  case { name = "histc", inputs = { { 5, 8 } }, grad = false,
         call = function(_, x) return x:histc(4, -1, 1) end,
         ref = function(_, x)
           return build({ 4 }, function(i)
             local n = 0
             for k = 1, #x.data do
               local v = x.data[k]
               if v >= -1.5 + i[1] / 2 and (v < -1 + i[1] / 2 or i[1] == 4 and v == 1) then n = n + 1 end
             end
             return n
           end)
         end,
         bad = { { function(_, x) return x:histc(4, 2, 1) end, "needs finite low <= high" },
                 { function(_, x) return x:histc(0) end, "bins must be positive, got 0" } } }

  -- ---- shapes -----------------------------------------------------------------------------------------

  -- out[i] = x at the place that `from` gives for each dimension (1-based), or `value` where it gives nil
  local function moved(shape, from, value)
    return function(_, x)
      return build(type(shape) == "function" and shape(x) or shape, function(i)
        local j = {}
        for d = 1, #x.shape do
          j[d] = from(d, i[#i - #x.shape + d], x.shape[d])
          if not j[d] then return value end
        end
        return at(x, j)
      end)
    end
  end
  local function within(p, n) return p >= 1 and p <= n end
  local OUTSIDE = {
    constant = function() end,
    reflect = function(p, n) return p < 1 and 2 - p or 2 * n - p end,
    replicate = function(p, n) return p < 1 and 1 or n end,
    circular = function(p, n) return (p - 1) % n + 1 end,
  }
  for mode, outside in h.ordered(OUTSIDE) do
    local before = { 0, 2, 1 }
    case { name = "pad", label = mode, inputs = { { 2, 4, 3 } },
           call = function(_, x)
             return x:pad({ 1, 2, 2, 3 }, { mode = mode, value = mode == "constant" and 0.5 or nil })
           end,
           ref = moved({ 2, 9, 6 }, function(d, i, n)
             local p = i - before[d]
             return within(p, n) and p or outside(p, n)
           end, 0.5),
           bad = { { function(_, x) return x:pad({ 1, 4 }, { mode = "reflect" }) end,
                     "reflection adds at most 2 elements in dimension 3" },
                   { function(_, x) return x:pad { 1 } end, "come in pairs" },
                   { function(_, x) return x:pad { -2, -2 } end, "crop more than the 3 elements" },
                   { function(_, x) return x:pad({ 1, 1 }, { mode = "mirror" }) end,
                     "unknown mode 'mirror'" },
                   { function(_, x) return x:pad({ 1, 1 }, { mode = "circular", value = 1 }) end,
                     "value is for mode 'constant'" } } }
  end
  case { name = "pad", label = "cropping rows", inputs = { { 5, 3 } },
         call = function(_, x) return x:pad { 0, 0, -2, 1 } end,
         ref = moved({ 4, 3 }, function(d, i, n)
           local p = d == 1 and i + 2 or i
           return within(p, n) and p or nil
         end, 0) }
  case { name = "pad", label = "circular, several times round", inputs = { { 3, 2 } },
         call = function(_, x) return x:pad({ 5, 4, -1, 0 }, { mode = "circular" }) end,
         ref = moved({ 2, 11 }, function(d, i, n) return d == 1 and i + 1 or (i - 6) % n + 1 end) }
  case { name = "tile", inputs = { { 2, 3 } }, call = function(_, x) return x:tile(2, 1, 3) end,
         ref = moved({ 2, 2, 9 }, function(_, i, n) return (i - 1) % n + 1 end),
         bad = { { function(_, x) return x:tile(-1) end, "must not be negative" } } }
  case { name = "roll", inputs = { { 4, 3 } }, call = function(_, x) return x:roll({ -1, 5 }, { 1, 2 }) end,
         ref = moved({ 4, 3 }, function(d, i, n) return (i - 1 - (d == 1 and -1 or 5)) % n + 1 end),
         bad = { { function(_, x) return x:roll({ 1, 2 }, 1) end, "same length: 2 != 1" } } }
  case { name = "roll", label = "flattened", inputs = { { 2, 3 } }, call = function(_,
    x) return x:roll(1) end,
         ref = function(_, x)
           local d = x.data
           return { shape = x.shape, data = { d[6], d[1], d[2], d[3], d[4], d[5] } }
         end }
  case { name = "flip", inputs = { { 2, 3, 4 } }, call = function(_, x) return x:flip(1, -1) end,
         ref = moved({ 2, 3, 4 }, function(d, i, n) return d == 2 and i or n + 1 - i end),
         bad = { { function(_, x) return x:flip(1, -3) end, "appears twice" },
                 { function(_, x) return x:flip() end, "takes the dims" } } }
  case { name = "repeat_interleave", inputs = { { 2, 3 } },
         call = function(_, x) return x:repeat_interleave(2, 2) end,
         ref = moved({ 2, 6 }, function(d, i) return d == 1 and i or math.ceil(i / 2) end),
         bad = { { function(_, x) return x:repeat_interleave(-1) end, "times must be at least 0" } } }
  case { name = "repeat_interleave", label = "each its own", inputs = { { 3, 2 } },
         call = function(lac, x)
           return x:repeat_interleave(lac.tensor({ 2, 0, 1 }, { dtype = "i64" }), 1)
         end,
         ref = moved({ 3, 2 }, function(d, i) return d == 2 and i or i == 3 and 3 or 1 end) }
  case { name = "diagonal", inputs = { { 3, 2, 4 } }, call = function(_, x) return x:diagonal(1, 1, 3) end,
         ref = function(_, x) return build({ 2, 3 }, function(i) return at(x, { i[2], i[1],
           i[2] + 1 }) end) end,
         bad = { { function(_, x) return x:diagonal(0, 2, 2) end, "two different dims" } } }
  case { name = "diagonal", label = "below", inputs = { { 4, 3 } }, call = function(_,
    x) return x:diagonal(-2) end,
         ref = function(_, x) return build({ 2 }, function(i) return at(x, { i[1] + 2, i[1] }) end) end }
  case { name = "diag", inputs = { { 3 } }, call = function(_, x) return x:diag(-1) end,
         ref = function(_, x)
           return build({ 4, 4 }, function(i) return i[1] == i[2] + 1 and x.data[i[2]] or 0 end)
         end,
         bad = { { function(lac) return lac.zeros { 1, 1, 1 }:diag() end, "must have 1 or 2 dimensions" } } }
  case { name = "diag", label = "of a matrix", inputs = { { 3, 4 } }, call = function(_,
    x) return x:diag(1) end,
         ref = function(_, x) return build({ 3 }, function(i) return at(x, { i[1], i[1] + 1 }) end) end }
  case { name = "trace", inputs = { { 3, 4 } },
         ref = function(R, x)
           return { shape = {}, data = { h.dot(R, 3, function(k) return at(x, { k, k }) end) } }
         end,
         bad = { { function(lac) return lac.zeros { 1 }:trace() end, "x must be a matrix" } } }
  case { name = "unfold", inputs = { { 2, 7, 2 } }, call = function(_, x) return x:unfold(2, 3, 2) end,
         ref = function(_, x)
           return build({ 2, 3, 2, 3 }, function(i) return at(x, { i[1], 2 * i[2] - 2 + i[4], i[3] }) end)
         end,
         bad = { { function(_, x) return x:unfold(1, 3) end, "windows of 3 do not fit" } } }
  case { name = "meshgrid", inputs = { { 2 }, { 3 } },
         call = function(lac, x, y)
           local a, b = lac.meshgrid { x, y }
           local c = lac.meshgrid({ x, y }, { indexing = "xy" })
           return a * 10 + b + c:t()
         end,
         ref = function(R, x, y)
           return build({ 2, 3 }, function(i)
             return R(R(R(x.data[i[1]] * 10) + y.data[i[2]]) + x.data[i[1]])
           end)
         end,
         bad = { { function(lac, x) return lac.meshgrid { x, lac.zeros { 2, 2 } } end,
           "must be a vector" } } }
  local function pooled(stride, padding, outside, f)
    return function(R, x)
      local n = math.floor((x.shape[2] + 2 * padding - 3) / stride) + 1
      return build({ x.shape[1], n }, function(i)
        local v = {}
        for k = 1, 3 do
          local p = (i[2] - 1) * stride + k - padding
          v[k] = within(p, x.shape[2]) and at(x, { i[1], p }) or outside
        end
        return f(R, v)
      end)
    end
  end
  case { name = "avg_pool1d", inputs = { { 2, 8 } },
         call = function(_, x) return x:avg_pool1d(3, { stride = 2, padding = 1 }) end,
         ref = pooled(2, 1, 0, function(R, v) return R(h.total(R, v) / 3) end),
         bad = { { function(_, x) return x:avg_pool1d(9) end, "windows of 9 do not fit" },
                 { function(_, x) return x:avg_pool1d(3, { padding = 2 }) end, "at most half" } } }
  case { name = "max_pool1d", inputs = { { 2, 8 } },
         call = function(_, x) return x:max_pool1d(3, { stride = 1, padding = 1 }) end,
         ref = pooled(1, 1, -math.huge, function(_, v) return math.max(unpack(v)) end) }

  -- ---- products ---------------------------------------------------------------------------------------

  -- einsum by its definition: a sum over all labels; `terms` and `output` are strings of letters
  local function sum_of_products(terms, output, sizes)
    local labels = {}
    for label in pairs(sizes) do labels[#labels + 1] = label end
    table.sort(labels)
    local summed = {}
    for _, l in ipairs(labels) do if not output:find(l, 1, true) then summed[#summed + 1] = l end end
    return function(R, ...)
      local operands, shape, value = { ... }, {}, {}
      for l in output:gmatch(".") do shape[#shape + 1] = sizes[l] end
      local function element(k)
        local i = {}
        for l in terms[k]:gmatch(".") do i[#i + 1] = value[l] end
        return at(operands[k], i)
      end
      local function sum(depth)
        if depth > #summed then
          local p = element(1)
          for k = 2, #operands do p = R(p * element(k)) end
          return p
        end
        local s = 0
        for v = 1, sizes[summed[depth]] do
          value[summed[depth]] = v
          s = R(s + sum(depth + 1))
        end
        return s
      end
      return build(shape, function(i)
        local d = 0
        for l in output:gmatch(".") do
          d = d + 1
          value[l] = i[d]
        end
        return sum(1)
      end)
    end
  end
  local function einsum_case(label, equation, terms, output, sizes, bad)
    local inputs = {}
    for k, term in ipairs(terms) do
      inputs[k] = {}
      for l in term:gmatch(".") do table.insert(inputs[k], sizes[l]) end
    end
    case { name = "einsum", label = label, inputs = inputs, bad = bad,
           call = function(lac, ...) return lac.einsum(equation, ...) end,
           ref = sum_of_products(terms, output, sizes) }
  end
  einsum_case("matrix product", "ij,jk", { "ij", "jk" }, "ik", { i = 3, j = 4, k = 2 }, {
    { function(lac, x, y) return lac.einsum("ij,jk,kl", x, y) end, "has 3 terms for 2 tensors" },
    { function(lac, x, y) return lac.einsum("ij,ik", x, y) end, "'i' is 3 before and 4 in tensor 2" },
    { function(lac, x) return lac.einsum("ijk", x) end, "names 3 dimensions, but tensor 1" },
    { function(lac, x) return lac.einsum("ij->ik", x) end, "label 'k' of the output" },
    { function(lac, x) return lac.einsum("ij->ii", x) end, "appears twice in the output" },
    { function(lac, x) return lac.einsum("i1", x) end, "'1' in 'i1' is no label" },
    { function(lac, x) return lac.einsum("ii", x) end, "label 'i' of 'ii' has the sizes 3 and 4" },
    { function(lac) return lac.einsum("i") end, "no tensors" },
    { function(lac, x) return lac.einsum(x, x) end, "the equation must be a string" },
  })
  einsum_case("attention scores", "bnhd, bmhd -> bhnm", { "bnhd", "bmhd" }, "bhnm",
              { b = 2, n = 3, m = 2, h = 2, d = 3 })
  einsum_case("transpose", "ab->ba", { "ab" }, "ba", { a = 2, b = 3 })
  einsum_case("sum of all", "ab->", { "ab" }, "", { a = 2, b = 3 })
  einsum_case("diagonal", "aba->ba", { "aba" }, "ba", { a = 3, b = 2 })
  einsum_case("trace, implicit", "aab", { "aab" }, "b", { a = 3, b = 2 })
  einsum_case("elementwise and outer", "ab,ac->abc", { "ab", "ac" }, "abc", { a = 2, b = 3, c = 2 })
  einsum_case("label of one operand summed", "ab,c->a", { "ab", "c" }, "a", { a = 2, b = 3, c = 4 })
  einsum_case("four operands", "ab,bc,cd,ae->de", { "ab", "bc", "cd", "ae" }, "de",
              { a = 2, b = 3, c = 2, d = 3, e = 2 })
  einsum_case("merged groups", "abcd,dcef->fbae", { "abcd", "dcef" }, "fbae",
              { a = 2, b = 2, c = 2, d = 3, e = 2, f = 2 })
  case { name = "einsum", label = "ellipsis", inputs = { { 2, 1, 3, 4 }, { 3, 4, 2 } },
         call = function(lac, x, y) return lac.einsum("...ij,...jk->...ki", x, y) end,
         ref = function(R, x, y)
           return build({ 2, 3, 2, 3 }, function(i)
             return h.dot(R, 4, function(k)
               return at(x, { i[1], 1, i[4], k }) * at(y, { i[2], k, i[3] })
             end)
           end)
         end,
         bad = { { function(lac, x, y) return lac.einsum("...ij,...jk", x, y:narrow(1, 1, 2):tile(2, 1, 1, 1)
                     :narrow(2, 1, 2):tile(2, 1, 1, 1):narrow(1, 1, 3)) end,
                       "does not broadcast: 2 != 3" } } }
  case { name = "tensordot", inputs = { { 2, 3, 4 }, { 3, 4, 2 } },
         ref = sum_of_products({ "aij", "ijb" }, "ab", { a = 2, i = 3, j = 4, b = 2 }),
         bad = { { function(_, x, y) return x:tensordot(y, 1) end, "differ: 4 != 3" },
                 { function(_, x, y) return x:tensordot(y, { { 1, 2 }, { 1 } }) end,
                   "two lists of one length" } } }
  case { name = "tensordot", label = "lists", inputs = { { 2, 3, 4 }, { 4, 5, 2 } },
         call = function(_, x, y) return x:tensordot(y, { { 1, -1 }, { 3, 1 } }) end,
         ref = sum_of_products({ "ibj", "jci" }, "bc", { i = 2, b = 3, j = 4, c = 5 }) }
  case { name = "dot", inputs = { { 5 }, { 5 } }, ref = sum_of_products({ "i", "i" }, "", { i = 5 }),
         bad = { { function(lac, x) return x:dot(lac.zeros { 4 }) end, "two vectors of one length" } } }
  case { name = "outer", inputs = { { 3 }, { 2 } }, ref = sum_of_products({ "i", "j" }, "ij", { i = 3,
    j = 2 }),
         bad = { { function(lac, x) return x:outer(lac.zeros { 4, 1 }) end, "needs two vectors" } } }
  case { name = "bmm", inputs = { { 2, 3, 4 }, { 2, 4, 2 } },
         ref = sum_of_products({ "bij", "bjk" }, "bik", { b = 2, i = 3, j = 4, k = 2 }),
         bad = { { function(lac, x) return x:bmm(lac.zeros { 4, 2 }) end, "needs a %[B, M, K%]" } } }
  local function with_addend(product, beta, alpha)
    return function(R, c, a, b)
      local p = product(R, a, b)
      return build(p.shape, function(i) return R(R(alpha * at(p, i)) + R(beta * at(c, i))) end)
    end
  end
  case { name = "addmm", inputs = { { 2 }, { 3, 4 }, { 4, 2 } },
         call = function(lac, c, a, b) return lac.addmm(c, a, b, { beta = 0.5, alpha = 2 }) end,
         ref = with_addend(sum_of_products({ "ij", "jk" }, "ik", { i = 3, j = 4, k = 2 }), 0.5, 2),
         bad = { { function(lac, c, a) return lac.addmm(c, a, 3) end, "addmm: b must be a tensor" } } }
  case { name = "baddbmm", inputs = { { 2, 3, 2 }, { 2, 3, 4 }, { 2, 4, 2 } },
         ref = with_addend(sum_of_products({ "bij", "bjk" }, "bik", { b = 2, i = 3, j = 4, k = 2 }), 1, 1),
         bad = { { function(lac, c, a, b) return lac.baddbmm(c, a, b, { alhpa = 1 }) end,
                   "did you mean 'alpha'" } } }

  -- ---- convolution --------------------------------------------------------------------------------------

  local function convolved(o)
    return function(R, x, w, bias)
      local groups = x.shape[2] / w.shape[2]
      local rows, K, N = w.shape[1] / groups, w.shape[3], x.shape[3]
      local L = math.floor((N + o.before + o.after - o.dilation * (K - 1) - 1) / o.stride) + 1
      return build({ x.shape[1], w.shape[1], L }, function(i)
        local group, s = math.floor((i[2] - 1) / rows), 0
        for c = 1, w.shape[2] do
          for k = 1, K do
            local n = (i[3] - 1) * o.stride + (k - 1) * o.dilation - o.before + 1
            if n >= 1 and n <= N then
              s = R(s + R(at(x, { i[1], group * w.shape[2] + c, n }) * at(w, { i[2], c, k })))
            end
          end
        end
        return bias and R(s + bias.data[i[2]]) or s
      end)
    end
  end
  local function conv_case(label, x, w, options, o, bias)
    o.stride, o.dilation = options.stride or 1, options.dilation or 1
    case { name = "conv1d", label = label, inputs = { x, w, bias and { w[1] } or nil },
           call = function(lac, a, b, c) return lac.conv1d(a, b, c, options) end, ref = convolved(o),
           bad = { { function(lac, a, b) return lac.conv1d(a, b, nil, { padding = "sane" }) end,
                     "'valid', 'same' or 'causal', got 'sane'" },
                   { function(lac, a, b) return lac.conv1d(a, b, nil, { groups = 9 }) end, "groups 9" },
                   { function(lac, a, b) return lac.conv1d(a, b, nil, { groups = options.groups,
                     dilation = 99, padding = w[3] == 1 and { 0, -1 } or 0 }) end,
                     w[3] == 1 and "must not be negative" or "does not fit into" } } }
  end
  conv_case("plain", { 2, 3, 7 }, { 4, 3, 3 }, {}, { before = 0, after = 0 }, true)
  conv_case("same, even kernel", { 2, 3, 6 }, { 4, 3, 4 }, { padding = "same" }, { before = 1, after = 2 })
  conv_case("causal, dilated", { 1, 3, 9 }, { 3, 3, 3 }, { padding = "causal", dilation = 2 },
            { before = 4, after = 0 }, true)
  conv_case("strided, groups", { 2, 6, 9 }, { 6, 3, 4 }, { stride = 3, padding = { 2, 1 }, groups = 2 },
            { before = 2, after = 1 }, true)
  conv_case("strided past the kernel", { 1, 4, 11 }, { 4, 4, 2 }, { stride = 3, padding = 1 },
            { before = 1, after = 1 })
  conv_case("depthwise", { 2, 4, 8 }, { 4, 1, 3 }, { padding = 1, groups = 4 }, { before = 1, after = 1 },
    true)
  conv_case("depthwise, multiplied, strided", { 2, 2, 9 }, { 4, 1, 3 }, { stride = 2, groups = 2,
    dilation = 2,
            padding = 3 }, { before = 3, after = 3 })
  conv_case("one position", { 2, 5, 6 }, { 3, 5, 1 }, {}, { before = 0, after = 0 }, true)

  -- ---- losses -------------------------------------------------------------------------------------------

  local function log_softmax(R, v)
    local _, s, top = h.softmax_of(R, v)
    local out = {}
    for k = 1, #v do out[k] = R(v[k] - R(R(math.log(s)) + top)) end
    return out
  end
  local function row(x, r)
    local v, n = {}, x.shape[#x.shape]
    for k = 1, n do v[k] = x.data[(r - 1) * n + k] end
    return v
  end
  -- sum over classes of weight ((1 - e) t + e / V) (-log p), t a list
  local function smoothed(R, logits, t, weight, e)
    local logp, s = log_softmax(R, logits), 0
    for c = 1, #logits do
      local q = R((weight and weight.data[c] or 1) * R(R((1 - e) * t[c]) + e / #logits))
      s = R(s - R(q * logp[c]))
    end
    return s
  end
  local function one_hot(class, n)
    local t = {}
    for c = 1, n do t[c] = c == class + 1 and 1 or 0 end
    return t
  end
  local function class_loss(R, logits, target, weight, e, ignore, how)
    local V, total, mass, losses = logits.shape[#logits.shape], 0, 0, {}
    for r = 1, #target.data do
      losses[r] = 0
      if target.data[r] ~= ignore then
        losses[r] = smoothed(R, row(logits, r), one_hot(target.data[r], V), weight, e)
        mass = R(mass + (weight and weight.data[target.data[r] + 1] or 1))
      end
      total = R(total + losses[r])
    end
    if how == "none" then return { shape = target.shape, data = losses } end
    return { shape = {}, data = { how == "sum" and total or R(total / mass) } }
  end
  local CLASSES = { 2, 3, kind = "index", high = 4 }
  case { name = "cross_entropy", label = "smoothed, weighted", inputs = { { 2, 3, 4 }, CLASSES, { 4,
    kind = "positive" } },
         grad_inputs = { 1 },
         call = function(lac, x, t, w)
           return lac.cross_entropy(x, t, { label_smoothing = 0.2, weight = w, ignore_index = 2 })
         end,
         ref = function(R, x, t, w) return class_loss(R, x, t, w, 0.2, 2, "mean") end,
         bad = { { function(lac, x, t) return lac.cross_entropy(x, t, { label_smoothing = 1.5 }) end,
                   "label_smoothing must be at most 1, got 1.5" },
                 { function(lac, x, t) return lac.cross_entropy(x, t, { weight = x }) end,
                   "weight must be %[4%]" } } }
  for _, how in ipairs { "sum", "none" } do
    case { name = "cross_entropy", label = "smoothed, " .. how, inputs = { { 6, 5 }, { 6, kind = "index",
      high = 5 } },
           call = function(lac, x, t) return lac.cross_entropy(x, t, { label_smoothing = 0.1,
             reduction = how }) end,
           ref = function(R, x, t) return class_loss(R, x, t, nil, 0.1, -100, how) end }
  end
  case { name = "cross_entropy", label = "probabilities", inputs = { { 3, 4 }, { 3, 4, kind = "positive" },
    { 4, kind = "positive" } },
         grad_inputs = { 1, 2 },
         call = function(lac, x, t, w) return lac.cross_entropy(x, t, { label_smoothing = 0.25,
           weight = w }) end,
         ref = function(R, x, t, w)
           local s = 0
           for r = 1, 3 do s = R(s + smoothed(R, row(x, r), row(t, r), w, 0.25)) end
           return { shape = {}, data = { R(s / 3) } }
         end,
         bad = { { function(lac, x, t) return lac.cross_entropy(x, t, { ignore_index = 1 }) end,
                   "ignore_index is for class targets" } } }
  case { name = "cross_entropy", label = "probabilities, plain", inputs = { { 2, 3, 4 }, { 2, 3, 4,
    kind = "positive" } },
         call = function(lac, x, t) return lac.cross_entropy(x, t, { reduction = "none" }) end,
         ref = function(R, x, t)
           return build({ 2, 3 }, function(i)
             local r = (i[1] - 1) * 3 + i[2]
             return smoothed(R, row(x, r), row(t, r), nil, 0)
           end)
         end }
  case { name = "linear_cross_entropy", label = "smoothed, weighted",
         inputs = { { 5, 3 }, { 4, 3 }, { 4 }, { 5, kind = "index", high = 4 }, { 4, kind = "positive" } },
         grad_inputs = { 1, 2, 3 },
         call = function(lac, x, w, b, t, weight)
           return lac.linear_cross_entropy(x, w, b, t, { label_smoothing = 0.2, weight = weight, chunk = 2 })
         end,
         ref = function(R, x, w, b, t, weight)
           return class_loss(R, h.linear(R, x, w, b), t, weight, 0.2, -100, "mean")
         end }
  case { name = "nll_loss", inputs = { { 2, 3, 4 }, CLASSES, { 4, kind = "positive" } }, grad_inputs = { 1 },
         call = function(lac, x, t, w) return lac.nll_loss(x, t, { weight = w, ignore_index = 1 }) end,
         ref = function(R, x, t, w)
           local s, mass = 0, 0
           for r = 1, 6 do
             local c = t.data[r] + 1
             if c ~= 2 then s, mass = R(s - R(w.data[c] * x.data[(r - 1) * 4 + c])), R(mass + w.data[c]) end
           end
           return { shape = {}, data = { R(s / mass) } }
         end,
         bad = { { function(lac, x) return lac.nll_loss(x, x) end, "i64 or i32" } } }

  -- elementwise losses: f(R, x, t) for each pair
  local function pair_loss(name, label, f, options, kinds, how)
    case { name = name, label = label, inputs = { { 3, 4, kind = kinds and kinds[1] }, { 3, 4,
      kind = kinds and kinds[2] } },
           call = function(lac, x, t) return lac[name](x, t, options) end,
           ref = function(R, x, t)
             if options and options.reduction == "none" then
               return build(x.shape, function(i) return f(R, at(x, i), at(t, i)) end)
             end
             local s = 0
             for k = 1, 12 do s = R(s + f(R, x.data[k], t.data[k])) end
             return { shape = {}, data = { R(s / (how or 12)) } }
           end,
           bad = { { function(lac, x) return lac[name](x, lac.zeros { 3, 1, dtype = x:dtype() }) end,
                     "x and target must have one shape" },
                   { function(lac, x, t) return lac[name](x, t, { reduction = "avg" }) end,
                     "unknown reduction 'avg'" } } }
  end
  pair_loss("mse_loss", nil, function(R, x, t) return R(R(x - t) ^ 2) end)
  pair_loss("l1_loss", "none", function(R, x, t) return math.abs(R(x - t)) end, { reduction = "none" })
  local function huber(R, d, delta)
    local a = math.abs(d)
    return a <= delta and R(R(d * d) / 2) or R(delta * R(a - delta / 2))
  end
  pair_loss("huber_loss", nil, function(R, x, t) return huber(R, R(x - t), 0.75) end, { delta = 0.75 })
  pair_loss("smooth_l1_loss", nil, function(R, x, t) return R(huber(R, R(x - t), 0.5) / 0.5) end,
    { beta = 0.5 })
  pair_loss("kl_div", nil, function(R, x, t) return R(t * R(R(math.log(t)) - x)) end, nil, { nil,
    "positive" })
  pair_loss("kl_div", "batchmean, logarithms", function(R, x, t) return R(R(math.exp(t)) * R(t - x)) end,
            { log_target = true, reduction = "batchmean" }, nil, 3)
  local function softplus(x) return math.max(x, 0) + math.log(1 + math.exp(-math.abs(x))) end
  local function bce(R, x, t, p) return R(R(R(1 - t) * x) + R(R(1 + R((p - 1) * t)) * R(softplus(-x)))) end
  pair_loss("binary_cross_entropy_with_logits", nil, function(R, x, t) return bce(R, x, t, 1) end)
  pair_loss("binary_cross_entropy_with_logits", "positive weight",
            function(R, x, t) return R(bce(R, x, t, 3) * 0.5) end, { pos_weight = 3, weight = 0.5 })
  h.map2("squared_difference", function(x, y) return (x - y) ^ 2 end)
  h.map2("huber", function(x, y) return huber(function(v) return v end, x, y) end, { kinds = { "away",
    "positive" } })
  h.map2("bce_logits", function(x, y) return (1 - y) * x + softplus(-x) end)
  case { name = "cosine_similarity", inputs = { { 3, 4 }, { 3, 4 } },
         ref = function(R, a, b)
           return build({ 3 }, function(i)
             local ab, aa, bb = 0, 0, 0
             for k = 1, 4 do
               local x, y = at(a, { i[1], k }), at(b, { i[1], k })
               ab, aa, bb = R(ab + R(x * y)), R(aa + R(x * x)), R(bb + R(y * y))
             end
             return R(ab / R(R(math.sqrt(aa)) * R(math.sqrt(bb))))
           end)
         end,
         bad = { { function(_, a, b) return a:cosine_similarity(b, 1, 0) end, "eps must be above 0" } } }

  -- ---- positions, masks, draws --------------------------------------------------------------------------

  local function rotated(position, scale_base, sign)
    return function(R, x, p)
      return build(x.shape, function(i)
        local half, d = x.shape[4] / 2, i[4] - 1
        local pair, second = d % half, d >= half
        local at_position = position(p, i)
        local angle, scale = at_position * 10000 ^ (-pair / half), 1
        if scale_base then scale = ((pair / half + 0.4) / 1.4) ^ (sign * at_position / scale_base) end
        local c, s = R(math.cos(angle) * scale), R(math.sin(angle) * scale)
        local b = at(x, with(i, 4, (second and d - half or d + half) + 1))
        return R(R(at(x, i) * c) + R(second and b * s or -b * s))
      end)
    end
  end
  case { name = "rope", label = "positions", inputs = { { 2, 3, 2, 4 }, { 3, kind = "index", high = 40 } },
         call = function(_, x, p) return x:rope { positions = p, start = 2 } end,
         ref = rotated(function(p, i) return p.data[i[2]] + 2 end),
         bad = { { function(_, x, p) return x:rope { positions = p - 100 } end, "position number 1 is" },
                 { function(_, x, p) return x:rope { positions = p:narrow(1, 1, 2) } end,
                   "positions must be %[3%] or %[2, 3%]" } } }
  case { name = "rope", label = "positions of each row, xpos", inputs = { { 2, 3, 2, 4 }, { 2, 3,
    kind = "index", high = 40 } },
         call = function(_, x, p) return x:rope { positions = p, scale_base = 64, sign = -1 } end,
         ref = rotated(function(p, i) return at(p, { i[1], i[2] }) end, 64, -1) }
  case { name = "causal_mask", inputs = { { 1 } }, grad = false,
    call = function(lac) return lac.causal_mask(2, 4) end,
         ref = function() return { shape = { 2, 4 }, data = { 1, 1, 1, 0, 1, 1, 1, 1 } } end,
         bad = { { function(lac) return lac.causal_mask(0) end, "n must be positive, got 0" },
                 { function(lac) return lac.causal_mask(2, 2, { ofset = 1 }) end,
                   "did you mean 'offset'" } } }
  local function slopes(R, heads)
    local power, list = 2 ^ math.floor(math.log(heads) / math.log(2) + 1e-9), {}
    for i = 1, power do list[i] = R(2 ^ (-8 * i / power)) end
    for k = 1, heads - power do list[power + k] = R(2 ^ (-4 * (2 * k - 1) / power)) end
    return list
  end
  for _, heads in ipairs { 8, 6 } do
    case { name = "alibi_slopes", label = heads .. " heads", inputs = { { 1 } }, grad = false,
           call = function(lac, x) return lac.alibi_slopes(heads, { dtype = x:dtype() }) end,
           ref = function(R) return { shape = { heads }, data = slopes(R, heads) } end,
           bad = { { function(lac) return lac.alibi_slopes(0) end, "heads must be positive, got 0" } } }
  end
  for _, causal in ipairs { false, true } do
    case { name = "alibi_bias", label = causal and "causal" or nil, inputs = { { 1 } }, grad = false,
           dtypes = { "f32", "f16", "bf16" }, strided = false,
           call = function(lac, x) return lac.alibi_bias(3, 2, 5, { causal = causal, dtype = x:dtype() }) end,
           ref = function(R)
             local list = slopes(R, 3)
             return build({ 3, 2, 5 }, function(i)
               local far = i[2] + 3 - i[3]
               return causal and far < 0 and -math.huge or R(-list[i[1]] * math.abs(far))
             end)
           end,
           bad = { { function(lac) return lac.alibi_bias(3, 2, -1) end, "m must be positive" } } }
  end
  -- frequencies: six deviations round the expected count; the draw itself has no reference but its rule
  case { name = "multinomial", inputs = { { 4, 5, kind = "positive" } }, grad = false, fixed_seed = true,
         call = function(_, w) return w:multinomial(2000, true) end,
         check = function(w, out)
           for r = 1, 4 do
             local sum, count = 0, { 0, 0, 0, 0, 0 }
             for k = 1, 5 do sum = sum + at(w, { r, k }) end
             for s = 1, 2000 do
               local k = out[(r - 1) * 2000 + s] + 1
               count[k] = count[k] + 1
             end
             for k = 1, 5 do
               local p = at(w, { r, k }) / sum
               if math.abs(count[k] - 2000 * p) > 6 * math.sqrt(2000 * p * (1 - p)) then
                 return ("row %d drew %d %d times instead of about %g"):format(r, k, count[k], 2000 * p)
               end
             end
           end
         end,
         bad = { { function(_, w) return w:multinomial(6) end,
           "cannot draw 6 samples of 5 elements without" },
                 { function(_, w) return (w - 9):multinomial(1) end, "the weights of row 1 must be finite" },
                 { function(_, w) return w:gt(0):multinomial(1) end, "weights must be a floating%-point" } } }
  case { name = "multinomial", label = "without replacement", inputs = { { 600, 4, kind = "positive" } },
    grad = false,
         fixed_seed = true, call = function(lac, w)
           return lac.expand(w[{ { 1, 1 } }], 600, 4):multinomial(4)
         end,
         check = function(w, out)
           local sum, first = 0, { 0, 0, 0, 0 }
           for k = 1, 4 do sum = sum + w.data[k] end
           for r = 1, 600 do
             local seen = {}
             for s = 1, 4 do seen[out[(r - 1) * 4 + s]] = true end
             for k = 0, 3 do if not seen[k] then return ("row %d misses %d"):format(r, k) end end
             first[out[(r - 1) * 4 + 1] + 1] = first[out[(r - 1) * 4 + 1] + 1] + 1
           end
           for k = 1, 4 do
             local p = w.data[k] / sum
             if math.abs(first[k] - 600 * p) > 6 * math.sqrt(600 * p * (1 - p)) then
               return ("%d came first %d times instead of about %g"):format(k, first[k], 600 * p)
             end
           end
         end }
end
