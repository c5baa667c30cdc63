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
end)
