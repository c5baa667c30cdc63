--- Reductions where the cases of ops_spec do not reach: many short rows, which the CPU reduces side by side
-- or, longer ones of f32, by kernels without a set-up.
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

  -- f32 rows that are dense have kernels of their own: vectors, of extrema the last one overlapping. Each
  -- place of a row holds the largest or the smallest once; rows with NaN and infinities; rows behind a step.
  it("reduces rows of every length to what f64 has, whatever lies where", function()
    lac.manual_seed(5)
    for _, k in ipairs { 17, 18, 23, 31, 32, 33, 47, 63, 64, 65, 77, 95, 127, 128, 129, 200 } do
      local x = lac.randn { k + 3, k + 5 }
      for i = 1, k do x[{ i, i }] = i % 2 == 0 and 9 or -9 end
      x[{ k + 1, 1 + k % 7 }] = 0 / 0
      x[{ k + 2, k }] = math.huge
      x[{ k + 3, 1 }] = -math.huge
      for _, t in ipairs { x[{ {}, { 1, k } }], x[{ {}, { 1, k } }]:contiguous() } do
        local wide = t:to { dtype = "f64" }
        for _, name in ipairs { "max", "min" } do
          local got, want = t[name](t, 2):totable(), wide[name](wide, 2):totable()
          for n = 1, k + 3 do
            local same = got[n] == want[n] or got[n] ~= got[n] and want[n] ~= want[n]
            assert.is_true(same, name .. k .. " " .. n)
          end
        end
        for _, name in ipairs { "sum", "mean" } do
          local got, want = t[name](t, 2):totable(), wide[name](wide, 2):totable()
          for n = 1, k do
            assert.is_true(math.abs(got[n] - want[n]) <= 2 ^ -23 * math.abs(want[n]), name .. k .. " " .. n)
          end
          assert.is_true(got[k + 1] ~= got[k + 1])
          assert.is_true(got[k + 2] == math.huge and got[k + 3] == -math.huge)
        end
        for _, p in ipairs { 1, 2, math.huge } do
          local got, want = t:norm(p, 2):totable(), wide:norm(p, 2):totable()
          for n = 1, k do
            assert.is_true(math.abs(got[n] - want[n]) <= 2 ^ -23 * want[n], p .. " " .. k .. " " .. n)
          end
          assert.is_true(got[k + 1] ~= got[k + 1])
          assert.is_true(got[k + 2] == math.huge and got[k + 3] == math.huge)
        end
      end
    end
  end)
end)
