--- Cases of what analyses ask of two tensors: differences, closeness, distances, products of all pairs.
--
-- Written like those of cases.lua, with its helpers; tests/ops_spec.lua makes the tests. References are the
-- definitions, element by element. What broadcasts does so here; NaN and infinities of isclose are asked in
-- tests/order_spec.lua.

return function(cases)
  local h = cases.helpers
  local case, with = h.case, h.with
  local build, at = cases.build, cases.at

  for _, dim in ipairs { 1, -1 } do
    case { name = "diff", label = "dim " .. dim, inputs = { { 4, 3 } },
           call = function(_, x) return x:diff(1, dim) end,
           ref = function(R, x)
             return build(dim == 1 and { 3, 3 } or { 4, 2 }, function(i)
               local d = dim == 1 and 1 or 2
               return R(at(x, with(i, d, i[d] + 1)) - at(x, i))
             end)
           end,
           bad = { { function(_, x) return x:diff(-1) end, "n must be at least 0, got %-1" },
                   { function(_, x) return x:diff(9) end, "is too short for n = 9" },
                   { function(_, x) return x:diff(1, 3) end, "dim 3 is out of range" } } }
  end
  case { name = "diff", label = "twice", inputs = { { 2, 5 } },
         call = function(lac, x) return lac.diff(x, 2) end,
         ref = function(R, x)
           local function step(i, k) return R(at(x, { i[1], k + 1 }) - at(x, { i[1], k })) end
           return build({ 2, 3 }, function(i) return R(step(i, i[2] + 1) - step(i, i[2])) end)
         end }
  case { name = "isclose", inputs = { { 3, 4 }, { 4 } }, grad = false,
         call = function(_, x, y) return x:isclose(y, { atol = 0.5, rtol = 0.25 }) end,
         ref = function(_, x, y)
           return build({ 3, 4 }, function(i)
             return math.abs(at(x, i) - at(y, i)) <= 0.5 + 0.25 * math.abs(at(y, i)) and 1 or 0
           end)
         end,
         bad = { { function(_, x, y) return x:isclose(y, { tol = 1 }) end, "unknown option 'tol'" },
                 { function(_, x) return x:isclose(1) end, "b must be a tensor, got 1" },
                 { function(_, x, y) return x:isclose(y:int()) end, "dtypes differ: a is .*, b is i32" } } }
  for label, norm in h.ordered { [2] = function(R, list)
    local sum = 0
    for _, v in ipairs(list) do sum = R(sum + R(v * v)) end
    return R(math.sqrt(sum))
  end, [1] = function(R, list)
    local sum = 0
    for _, v in ipairs(list) do sum = R(sum + math.abs(v)) end
    return sum
  end, [math.huge] = function(_, list)
    local largest = 0
    for _, v in ipairs(list) do largest = math.max(largest, math.abs(v)) end
    return largest
  end } do
    case { name = "cdist", label = "p = " .. label, inputs = { { 2, 3, 4 }, { 5, 4 } },
           rough = label == math.huge and "f32" or nil, -- differences of halves tie once they are rounded
           call = function(_, x, y) return x:cdist(y, label) end,
           ref = function(R, x, y)
             return build({ 2, 3, 5 }, function(i)
               local list = {}
               for k = 1, 4 do list[k] = R(at(x, { i[1], i[2], k }) - at(y, { i[3], k })) end
               return norm(R, list)
             end)
           end,
           bad = { { function(_, x, y) return x:cdist(y:t()) end,
                     "needs x %[%.%.%., N, D%] and y %[%.%.%., M, D%], got" },
                   { function(_, x, y) return x:cdist(y, 0) end, "p must be a positive number, got 0" } } }
  end
  case { name = "kron", inputs = { { 2, 3 }, { 4 } }, call = function(lac, a, b) return lac.kron(a, b) end,
         ref = function(R, a, b)
           return build({ 2, 12 }, function(i)
             return R(at(a, { i[1], math.ceil(i[2] / 4) }) * b.data[(i[2] - 1) % 4 + 1])
           end)
         end,
         bad = { { function(_, a) return a:kron(2) end, "b must be a tensor, got 2" },
                 { function(lac, a) return a:kron(lac.ones { 1, 1, 1, 1, dtype = a:dtype() }) end,
                   "at most 3 dimensions" } } }
end
