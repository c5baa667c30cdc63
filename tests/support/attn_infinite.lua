--- A key that rows see, with one infinite number, whose scores are -inf: what gradients are then.
--
-- Its weight is exactly 0, and everything else follows from the formulas as arithmetic has them for 0: dS is
-- 0, so the key's dk and dv get nothing, and no other key's change. dq gets 0 times the key, and 0 times
-- infinity is NaN: in that column, in rows that see the key, dropped or not, and nowhere else. PyTorch's
-- gradients in f64 are the same. A large finite number in the key has the weight 0 as well, so all other
-- results are those that f64 has with it.

local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local P = require "support.attn_pairs"

local infinite = {}

local COLUMN, KEY, FINITE = 3, 10, 1e6
local TOLERANCE = { f64 = 1e-12, f32 = 2e-6, f16 = 2 ^ -9, bf16 = 2 ^ -6 }

--- Configurations for f(c): every merge with and without dropout, one and two branches, scales of both signs;
-- the options of single pairs as well if `pairs` is true.
function infinite.each(D, N, pairs, f)
  local trial = 0
  for _, merge in ipairs { "lse", "lse_detach", "mean", "sum" } do
    for _, dropout in ipairs { 0, 0.3 } do
      for _, causal in ipairs { true, false } do
        trial = trial + 1
        local c = direct.fill { N = N, H = 2, Hk = trial % 3 == 0 and 2 or 1, D = D, segments = { N, N },
          dilations = { 1, trial % 2 + 1 }, merge = merge, causal = causal, dropout = dropout, seed = 3,
          rng_offset = 5, offset = "branch", scale = ({ 1, 0.3, -1, 0.6 })[trial % 4 + 1] / math.sqrt(D) }
        if trial % 2 == 1 then c.offset = "mod" end
        if pairs then
          local option = trial % 3
          if option == 0 then c.alibi = { 0.5, 0.25 } end
          local rows = { shape = { N, N }, data = {} }
          for i = 1, N * N do
            rows.data[i] = option == 1 and i % 5 ~= 0 or option ~= 1 and direct.round.bf16(i % 7 / 8)
          end
          if option == 1 then c.mask = rows elseif option == 2 then c.bias = rows end
          if trial % 5 == 0 then
            local blocks = math.ceil(N / 16)
            c.block, c.blocks = 16, { shape = { blocks, blocks }, data = {} }
            for i = 1, blocks * blocks do c.blocks.data[i] = i % blocks == 1 or i % 3 > 0 end
          end
        end
        f(c)
      end
    end
  end
end

--- What a device makes of a call, with the kernel that c names: run or exact of infinite.check.
function infinite.on(device)
  return function(c, dtype, lists)
    local kernel = c.kernel
    direct.device, c.kernel = device, device ~= 0 and kernel or nil
    local ok, found = pcall(P.run, c, lists, { dtype = dtype })
    direct.device, c.kernel = 0, kernel
    if not ok then error(found .. " in " .. P.text(c), 0) end
    return found
  end
end

--- The CPU in f64 as the exact one; attend_spec holds it against the oracle.
function infinite.cpu(c, lists) return infinite.on(0)(c, "f64", lists) end

--- run(c, dtype, lists) obeys the rule; exact(c, lists) is the same in f64, of finite numbers alone. own:
-- false where the key's own dk, dv and dbias may be NaN, which kernels/HOPPER_OPTIONS.md states.
function infinite.check(c, dtype, run, exact, own)
  local lists = { P.inputs(c, 1, dtype) }
  lists[5] = nil -- lse has a gradient of its own where branches share one softmax: 0 times it is 0 too
  local infinity = c.scale < 0 and math.huge or -math.huge
  for row = 0, c.N * c.H - 1 do -- above 0, so that the sign of the score is that of the key's number
    local at = row * c.D + COLUMN
    lists[1][at] = direct.round[dtype](1 + math.abs(lists[1][at]))
  end
  local function set(x)
    for hk = 0, c.Hk - 1 do lists[2][(KEY * c.Hk + hk) * c.D + COLUMN] = x end
  end
  set(infinity < 0 and -FINITE or FINITE)
  local want = exact(c, lists)
  set(infinity)
  local got = run(c, dtype, lists)
  for _, name in ipairs { "out", "lse", "dq", "dk", "dv", "dbias" } do
    local most = TOLERANCE[name == "lse" and dtype ~= "f64" and "f32" or dtype]
      * (1 + direct.largest(want[name] or { 0 }))
    for i, x in ipairs(want[name] or {}) do
      local row, column = math.floor((i - 1) / c.D), (i - 1) % c.D + 1
      local n, h, lost = math.floor(row / c.H), row % c.H, false
      local key = -1
      if name == "dbias" then key = (i - 1) % c.M
      elseif name:match "^d[kv]" then key = math.floor(row / c.Hk) end
      for g = 1, name == "dq" and column == COLUMN and #c.segments or 0 do
        lost = lost or oracle.attends(c, g, 0, h, n, KEY)
      end
      local y = got[name][i]
      local good = lost and y ~= y or not lost and math.abs(y - x) <= most
        or own == false and key == KEY and y ~= y
      if not good then
        error(("%s[%d] is %g, not %g, in %s: %s"):format(name, i, y, lost and 0 / 0 or x, dtype, P.text(c)),
          0)
      end
    end
  end
end

return infinite
