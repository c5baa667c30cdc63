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
         bad = { { function(_, x, i, s) return x:index_add(1, i, s) end, "index_put" },
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
end
