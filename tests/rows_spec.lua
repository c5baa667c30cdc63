--- rows_spec.lua: a row has the same bits whatever lies beside it.
--
-- Kernels of norms and softmax handle two or three rows at once, the first and the last by other code than
-- those between, and rows that are not dense through buffers. Forward and backward of a row by itself, within
-- many rows, and with a step between elements or rows are the same to the bit, on every instruction set, in
-- every dtype, at widths around vectors, lines and blocks, and with any number of threads.

local lac = require "lacuna"
local lib = require "lacuna.lib"

local ROWS = 37
local WIDTHS = { 1, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 77, 100, 127, 129, 200, 250, 257, 1000, 1024,
  1025, 1500, 4097 }
local FUNCTIONS = {
  rmsnorm = function(x, gamma) return lac.rmsnorm(x, gamma) end,
  layernorm = function(x, gamma, beta) return lac.layernorm(x, gamma, beta) end,
  softmax = function(x) return lac.softmax(x, 2) end,
  log_softmax = function(x) return lac.log_softmax(x, 2) end,
}

local function same(a, b, what, ...)
  local d = (a:to{ dtype = "f64" } - b:to{ dtype = "f64" }):abs():max():item()
  if d ~= 0 then error(what:format(...) .. (": differs by %g"):format(d), 2) end
end

local function check(name, dtype, width)
  local f = FUNCTIONS[name]
  local wide = lac.randn({ ROWS, width + 3 }, { dtype = dtype })
  local steps = wide[{ {}, { 2, width + 1 } }]
  local x = steps:contiguous()
  local columns = x:transpose(1, 2):contiguous():transpose(1, 2)
  local gamma, beta = lac.randn({ width }, { dtype = dtype }), lac.randn({ width }, { dtype = dtype })
  local up = lac.randn({ ROWS, width }, { dtype = dtype })
  local function both(t, g)
    local leaf = t:detach():requires_grad_(true)
    local out = f(leaf, gamma, beta)
    return out:detach(), (lac.grad(out, { leaf }, { grad_outputs = { g } }))[1]
  end
  lac.threads(1)
  local y, dx = both(x, up)
  for layout, t in pairs{ steps = steps, columns = columns } do
    local a, b = both(t, up)
    same(a, y, "%s of %d with " .. layout, name, width)
    same(b, dx, "gradient of %s of %d with " .. layout, name, width)
  end
  for _, r in ipairs{ 1, 2, 3, 6, ROWS } do
    local a, b = both(x[{ { r, r } }]:contiguous(), up[{ { r, r } }]:contiguous())
    same(a, y[{ { r, r } }], "row %d of %s of %d alone", r, name, width)
    same(b, dx[{ { r, r } }], "gradient of row %d of %s of %d alone", r, name, width)
  end
  for _, n in ipairs{ 2, 3 } do
    lac.threads(n)
    local a, b = both(x, up)
    same(a, y, "%s of %d with %d threads", name, width, n)
    same(b, dx, "gradient of %s of %d with %d threads", name, width, n)
  end
end

-- Down the first axis, long enough for parts that threads share (a megabyte), with a column that has nothing
-- but -inf in its first part, one of -inf, one with NaN, and one that grows, so that parts are scaled.
local function check_columns(name, dtype, n, width)
  local x = lac.randn { n, width, dtype = dtype }
  x[{ { 1, math.min(n, 1100) }, { 1, 1 } }] = -math.huge
  x[{ {}, { 2, 2 } }] = -math.huge
  x[{ { n, n }, { 3, 3 } }] = 0 / 0
  x[{ {}, { 4, 4 } }] = lac.arange(n):mul(0.02):to { dtype = dtype }:reshape { n, 1 }
  local up = lac.randn { n, width, dtype = dtype }
  local function both(t, g)
    local leaf = t:detach():requires_grad_(true)
    local out = lac[name](leaf, 1)
    return out:detach(), (lac.grad(out, { leaf }, { grad_outputs = { g } }))[1]
  end
  local function equal(a, b, what)
    local unlike = a:ne(b):logical_and(a:eq(a):logical_or(b:eq(b))) -- NaN equals NaN
    assert(not unlike:any():item(), ("%s of [%d, %d], %s: %s"):format(name, n, width, dtype, what))
  end
  lac.threads(1)
  local y, dx = both(x, up)
  for _, threads in ipairs { 2, 3 } do
    lac.threads(threads)
    local a, b = both(x, up)
    equal(a, y, threads .. " threads")
    equal(b, dx, threads .. " threads, gradient")
  end
  for _, first in ipairs { 1, width - 8 } do -- few columns are one task
    local some = { {}, { first, first + 8 } }
    local a, b = both(x[some]:contiguous(), up[some]:contiguous())
    equal(a, y[some], "columns alone")
    equal(b, dx[some], "columns alone, gradient")
  end
  -- what they are, by double precision in the order of the rows
  local near = dtype == "f64" and 2 ^ -44 or dtype == "f32" and 2 ^ -18 or dtype == "f16" and 2 ^ -9 or 2 ^ -6
  for _, j in ipairs { 1, 2, 3, 4, 5, width } do
    local function list(t) return t[{ {}, { j, j } }]:to { dtype = "f64" }:reshape { n }:totable() end
    local column, slope, got, got_dx = list(x), list(up), list(y), list(dx)
    local top, sum, dot, total = -math.huge, 0, 0, 0
    for i = 1, n do top = column[i] > top and column[i] or top end
    for i = 1, n do sum = sum + math.exp(column[i] - top) end
    for i = 1, n do total, dot = total + slope[i], dot + slope[i] * got[i] end
    for i = 1, n do
      local z, p = column[i] - top - math.log(sum), math.exp(column[i] - top) / sum
      local want = name == "softmax" and p or z
      local back = name == "softmax" and got[i] * (slope[i] - dot) or slope[i] - math.exp(got[i]) * total
      local size = math.abs(back) + (name == "softmax" and got[i] * (1 + math.abs(dot))
        or 1 + math.exp(got[i]) * math.sqrt(n))
      if want == want and want > -math.huge then
        local slack = near * (name == "softmax" and want or 1 + math.abs(want)) + 2 ^ -24
        assert(math.abs(got[i] - want) <= slack,
               ("%s [%d, %d] = %g, not %g"):format(name, i, j, got[i], want))
        assert(math.abs(got_dx[i] - back) <= near * size + 2 ^ -24,
               ("gradient of %s [%d, %d] = %g, not %g"):format(name, i, j, got_dx[i], back))
      else
        assert(got[i] == want or (want ~= want and got[i] ~= got[i]), ("%s [%d, %d]"):format(name, i, j))
      end
    end
  end
end

describe("rows", function()
  local threads, best = lac.threads(), lib.ffi.string(lib.C.lac_isa(nil))
  before_each(function() lac.manual_seed(2) end)
  after_each(function()
    lac.threads(threads)
    lib.C.lac_isa(best)
  end)

  for name in pairs(FUNCTIONS) do
    it("of " .. name .. " have the same bits alone, among others and in every layout #cpu", function()
      for _, set in ipairs{ "avx512", "avx2", "baseline" } do
        if lib.C.lac_isa(set) ~= nil then
          for _, dtype in ipairs{ "f32", "f64", "bf16", "f16" } do
            for _, width in ipairs(WIDTHS) do lac.scope(check, name, dtype, width) end
          end
        end
      end
    end)
  end
  for _, name in ipairs { "softmax", "log_softmax" } do
    it("down the first axis have the same bits and are right: " .. name .. " #cpu", function()
      for _, set in ipairs { "avx512", "avx2", "baseline" } do
        if lib.C.lac_isa(set) ~= nil then
          for _, case in ipairs { { "f32", 2100, 160 }, { "f32", 1024, 300 }, { "f32", 1100, 1500 },
            { "f64", 2080, 72 }, { "bf16", 3001, 200 }, { "f16", 1025, 530 } } do
            lac.scope(check_columns, name, unpack(case))
          end
        end
      end
    end)
  end
end)
