--- Cases of the scans: running sums, products, extremes and log-sum-exps.
--
-- Written like those of cases.lua, with its helpers; tests/ops_spec.lua makes the tests. The reference of an
-- element reduces the elements up to it from the beginning, so it is independent of any running value. Lines
-- along the last dimension and across rows take different ways through the engine, as do lines longer than
-- its tile; each has a case. What a case cannot say (integers, NaN, infinities, equal extremes, threads) is
-- in tests/scan_spec.lua.

return function(cases)
  local h = cases.helpers
  local case, with = h.case, h.with
  local build, at = cases.build, cases.at

  -- the reference of a scan along d: f(R, list of the elements so far) for every place
  local function scanned(d, f)
    return function(R, x)
      return build(x.shape, function(i)
        local v = {}
        for k = 1, i[d] do v[k] = at(x, with(i, d, k)) end
        return f(R, v)
      end)
    end
  end

  local function sum(R, v)
    local s = 0
    for k = 1, #v do s = R(s + v[k]) end
    return s
  end
  local function product(R, v)
    local p = 1
    for k = 1, #v do p = R(p * v[k]) end
    return p
  end
  local function log_sum(R, v)
    local top, s = math.max(unpack(v)), 0
    for k = 1, #v do s = R(s + R(math.exp(R(v[k] - top)))) end
    return R(R(math.log(s)) + top)
  end
  local function best(better)
    return function(v)
      local place = 1
      for k = 2, #v do if not better(v[place], v[k]) then place = k end end
      return place
    end
  end

  local function scan_cases(name, f, kind)
    case { name = name, inputs = { { 3, 5, kind = kind } }, ref = scanned(2, f),
           bad = { { function(lac) return lac[name]("no") end, name .. ": x must be a tensor, got 'no'" },
                   { function(_, x) return x[name](x, 3) end, name .. ": dim 3 is out of range" } } }
    case { name = name, label = "across rows", inputs = { { 2, 5, 9, kind = kind } },
           call = function(lac, x) return (lac[name](x, 2)) end, ref = scanned(2, f) }
    case { name = name, label = "first dim, few columns", inputs = { { 6, 3, kind = kind } },
           call = function(lac, x) return (lac[name](x, -2)) end, ref = scanned(1, f) }
  end
  scan_cases("cumsum", sum)
  scan_cases("cumprod", product, "away")
  scan_cases("logcumsumexp", log_sum)
  local function greater(a, b) return a > b end
  local function smaller(a, b) return a < b end
  for name, better in h.ordered { cummax = greater, cummin = smaller } do
    local place = best(better)
    scan_cases(name, function(_, v) return v[place(v)] end)
    case { name = name, label = "positions", inputs = { { 2, 6, 9 } }, grad = false,
           call = function(lac, x) return (select(2, lac[name](x, 2))) end,
           ref = scanned(2, function(_, v) return place(v) - 1 end) }
  end

  -- longer than a tile of the engine
  local function long(name, f, kind)
    case { name = name, label = "a long line", inputs = { { 2, 1500, kind = kind } }, grad = false, ref = f }
  end
  long("cumsum", function(R, x)
    local out, s = { shape = x.shape, data = {} }, 0
    for k = 1, #x.data do
      s = k % 1500 == 1 and x.data[k] or R(s + x.data[k])
      out.data[k] = s
    end
    return out
  end)
  long("cummax", function(_, x)
    local out, m = { shape = x.shape, data = {} }, 0
    for k = 1, #x.data do
      m = k % 1500 == 1 and x.data[k] or math.max(m, x.data[k])
      out.data[k] = m
    end
    return out
  end)
end
