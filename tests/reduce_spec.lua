--- Reductions where the cases of ops_spec do not reach: many short rows, which the CPU reduces side by side.
--
-- Whole numbers, so that every sum and product is exact and there is one right answer; a NaN in one row.

local lac = require "lacuna"

describe("reductions", function()
  it("reduces short rows side by side to what long loops have", function()
    lac.manual_seed(4)
    for _, dtype in ipairs { "f32", "f64", "bf16", "i64" } do
      for _, k in ipairs { 1, 2, 3, 7, 16, 17 } do
        local x = lac.randint { 1100, 2 * k, low = -3, high = 4 }:to(dtype)[{ {}, { 1, 2 * k, 2 } }]
        if dtype ~= "i64" then x[{ 5, k }] = 0 / 0 end
        local rows = x:totable()
        for _, t in ipairs { x, x:contiguous() } do
          local sum, product = t:sum(2):totable(), t:prod(2):totable()
          local max, argmax = t:max(2):totable(), t:argmax(2):totable()
          for n, row in ipairs(rows) do
            local s, p, m, at = 0, 1, row[1], 1
            for i, v in ipairs(row) do
              s, p = s + v, p * v
              if m == m and (v > m or v ~= v) then m, at = v, i end
            end
            local function same(got, wanted, what)
              assert.is_true(got == wanted or got ~= got and wanted ~= wanted,
                ("%s of %d %s, row %d: %g, not %g"):format(what, k, dtype, n, got, wanted))
            end
            same(sum[n], s, "sum")
            if math.abs(p) < 256 then same(product[n], p, "product") end
            same(max[n], m, "maximum")
            same(argmax[n], at, "position")
          end
        end
      end
    end
  end)
end)
