--- Reductions where the cases of ops_spec do not reach: many short rows, which the CPU reduces side by side
-- or, longer ones of f32, by kernels without a set-up.
--
-- Whole numbers, so that every sum and product is exact and there is one right answer; a NaN in one row.

local lac = require "lacuna"
local lib = require "lacuna.lib"

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

  -- f32, block by block: the largest of a block are found beside the sum of the one before. Infinities, NaN
  -- and nothing but -inf in the first, a middle and the last block; rows and columns, one to three threads.
  it("finds log-sum-exp whatever lies in which block, on every instruction set", function()
    local threads, best = lac.threads(), lib.ffi.string(lib.C.lac_isa(nil))
    finally(function()
      lac.threads(threads)
      lib.C.lac_isa(best)
    end)
    lac.manual_seed(6)
    local INF, NAN = math.huge, 0 / 0
    for _, n in ipairs { 9, 16, 40, 1024, 1025, 2048, 2500 } do
      local x = lac.randn { 24, n }
      x[{ 2, {} }] = -INF
      for row, place in ipairs { 1, math.ceil(n / 2), n } do -- rows 3 to 14
        for k, v in ipairs { INF, NAN, -INF, 60 } do x[{ 3 * k + row - 1, place }] = v end
      end
      x[{ 15, {} }] = -INF
      x[{ 15, n }] = NAN
      x[{ 16, {} }] = -INF
      x[{ 16, 1 }] = -200
      x[{ 17, 1 }], x[{ 17, n }] = NAN, INF
      x[{ 18, {} }] = lac.arange(n):to { dtype = "f32" }
      local want = {}
      for r, row in ipairs(x:totable()) do
        local top, sum, nan = -INF, 0, false
        for _, v in ipairs(row) do
          top, nan = math.max(top, v == v and v or top), nan or v ~= v
        end
        for _, v in ipairs(row) do sum = sum + math.exp(v - top) end
        want[r] = nan and NAN or (top == INF or top == -INF) and top or top + math.log(sum)
      end
      for _, set in ipairs { "avx512", "avx2", "baseline" } do
        if lib.C.lac_isa(set) ~= nil then
          local down = x:transpose(1, 2):contiguous()
          local first
          for count = 1, 3 do
            lac.threads(count)
            local got = { x:logsumexp(2):totable(), down:logsumexp(1):totable() }
            first = first or got
            for way = 1, 2 do
              for r, v in ipairs(got[way]) do
                local near = v == want[r] or v ~= v and want[r] ~= want[r]
                  or math.abs(v - want[r]) <= 2 ^ -21 * (1 + math.abs(want[r]))
                assert.is_true(near,
                  ("%s, %d, row %d, way %d: %g, not %g"):format(set, n, r, way, v, want[r]))
                assert.is_true(v == first[way][r] or v ~= v, "threads")
              end
            end
          end
          local one = x[{ { 18, 18 } }]:logsumexp(2):item()
          assert.are.equal(first[1][18], one)
        end
      end
    end
  end)
end)
