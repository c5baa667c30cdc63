--- Cases of the operators that join others (lua/lacuna/ops/fused.lua); see support/cases.lua.

local special = require "support.special"

return function(cases)
  local help = cases.helpers
  local case, build, at = help.case, cases.build, cases.at
  local with, mean, linear = help.with, help.mean, help.linear

  -- f(element, R) of every element, and the layer norm of rows
  local function each(R, f, x)
    local out = { shape = x.shape, data = {} }
    for i = 1, #x.data do out.data[i] = R(f(x.data[i], R)) end
    return out
  end
  local function norm_of(R, x, gamma, beta)
    local n = #x.shape
    local width = x.shape[n]
    return build(x.shape, function(i)
      local v, s = {}, 0
      for k = 1, width do v[k] = at(x, with(i, n, k)) end
      local m = mean(R, v)
      for k = 1, width do s = R(s + R(R(v[k] - m) ^ 2)) end
      local rstd = R(1 / math.sqrt(R(s / width) + 1e-5))
      return R(R(R(R(v[i[n]] - m) * rstd) * gamma.data[i[n]]) + beta.data[i[n]])
    end)
  end
  local function residual(lac, x, h, gamma, beta) -- both results in one number, so that both gradients count
    local sum, out = lac.residual_norm(x, h, gamma, beta)
    return sum * out
  end
  case { name = "residual_norm", inputs = { { 3, 4 }, { 3, 4 }, { 4 }, { 4 } }, call = residual,
         ref = function(R, x, h, gamma, beta)
           local sum = { shape = x.shape, data = {} }
           for i = 1, #x.data do sum.data[i] = R(x.data[i] + h.data[i]) end
           local out = norm_of(R, sum, gamma, beta)
           for i = 1, #x.data do out.data[i] = R(sum.data[i] * out.data[i]) end
           return out
         end,
         bad = { { function(lac, x, h) return lac.residual_norm(x, h:narrow(1, 1, 2)) end,
                   "residual_norm: x is .* but h is" },
                 { function(lac, x, h, g) return lac.residual_norm(x, h, g:narrow(1, 1, 3)) end,
                   "gamma must be %[4%]" },
                 { function(lac, x, h) return lac.residual_norm(x, h, nil, nil, { p = 1 }) end, "p.*1" } } }

  local function gelu(x, R) return x * R(special.phi(x)) end
  local function gelu_tanh(x)
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ^ 3)))
  end

  case { name = "gelu_norm", inputs = { { 3, 16 }, { 16 }, { 16 } }, -- rows of 4 may hardly vary
         ref = function(R, x, gamma, beta) return norm_of(R, each(R, gelu, x), gamma, beta) end,
         bad = { { function(lac, x) return lac.gelu_norm(x, lac.zeros { 5, dtype = x:dtype() }) end, "5" },
                 { function(lac, x) return lac.gelu_norm(x, nil, nil, 0) end, "positive, got 0" } } }
  for name, f in help.ordered { gelu = gelu, gelu_tanh = gelu_tanh } do
    case { name = "linear_act", label = name, inputs = { { 2, 3, 4 }, { 8, 4 }, { 8 } },
           call = function(lac, x, w, b) return lac.linear_act(x, w, b, name) end,
           ref = function(R, x, w, b) return each(R, f, linear(R, x, w, b)) end,
           bad = { { function(lac, x, w) return lac.linear_act(x, w, nil, "relu") end, "gelu" },
                   { function(lac, x, w) return lac.linear_act(x, w:narrow(2, 1, 3), nil, "gelu") end,
                     "do not fit" } } }
    case { name = "feed_forward", label = name, inputs = { { 2, 3, 4 }, { 8, 4 }, { 8 }, { 5, 8 }, { 5 } },
           call = function(lac, x, w, b, v, c)
             return lac.feed_forward(x, w, b, v, c, { activation = name })
           end,
           ref = function(R, x, w, b, v, c) return linear(R, each(R, f, linear(R, x, w, b)), v, c) end,
           bad = { { function(lac, x, w, b, v) return lac.feed_forward(x, w, b, v:narrow(2, 1, 3)) end,
                     "do not fit" },
                   { function(lac, x, w, b, v, c) return lac.feed_forward(x, w, b, v, c, { gamma = b }) end,
                     "norm = true" } } }
  end
  case { name = "feed_forward", label = "norm",
         inputs = { { 2, 3, 4 }, { 8, 4 }, { 8 }, { 5, 8 }, { 5 }, { 8 }, { 8 } },
         call = function(lac, x, w, b, v, c, gamma, beta)
           return lac.feed_forward(x, w, b, v, c, { norm = true, gamma = gamma, beta = beta })
         end,
         ref = function(R, x, w, b, v, c, gamma, beta)
           return linear(R, norm_of(R, each(R, gelu, linear(R, x, w, b)), gamma, beta), v, c)
         end,
         bad = { { function(lac, x, w, b, v)
                     return lac.feed_forward(x, w, b, v, nil, { norm = true, activation = "gelu_tanh" })
                   end, "goes with activation 'gelu'" } } }
  case { name = "feed_forward", label = "no bias", inputs = { { 3, 4 }, { 8, 4 }, { 5, 8 } },
         call = function(lac, x, w, v) return lac.feed_forward(x, w, nil, v, nil) end,
         ref = function(R, x, w, v) return linear(R, each(R, gelu, linear(R, x, w)), v) end }
end
