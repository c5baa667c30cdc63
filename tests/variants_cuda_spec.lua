--- Every variant on CUDA beside the CPU: values, log-sum-exps, gradients, weights, decoding.
--
-- The CPU's numbers have their own oracle; here both devices get the same tensors in f32 and f64. Tagged
-- #gpu: `make test-gpu` runs it, `make test` counts it as skipped.

local it = os.getenv "LACUNA_GPU" == "1" and it or pending

local lac = require "lacuna"
local nn = lac.nn

local VARIANTS = {
  dense = {}, custom = { scheme = "split" }, dilated = {}, improved = {}, longnet = {},
  auto = { length = 64, segments = { 8, 64 }, dilations = { 1, 2 } },
  ring = { ranks = 3 }, distributed = { ranks = 2, layout = "zigzag" },
  block_sparse = { block = 16, pattern = "local_window(32) + global_tokens(16)" },
  hierarchical = { block = 16, levels = { { stride = 16, window = 16 }, { stride = 32, window = -1 } } },
  adaptive = { block = 16, keep = 2 }, learned = { block = 16, keep = 2, length = 80, noise = false },
}

local function far(a, b) return (a:to { device = "cpu" } - b:to { device = "cpu" }):abs():max():item() end

local function make(variant, more)
  assert(VARIANTS[variant], "no case of " .. variant)
  local o = { embed_dim = 64, heads = 4, kv_heads = 2, variant = variant, causal = true, positions = "rope",
              device = "cpu" }
  if not lac.attention.variants:get(variant).bare then o.segments, o.dilations = { 8, 64 }, { 1, 2 } end
  for _, from in ipairs { VARIANTS[variant], more or {} } do
    for name, value in pairs(from) do o[name] = value end
  end
  return nn.MultiheadDilatedAttention(o)
end

describe("every variant on CUDA #gpu", function()
  for _, variant in ipairs(lac.attention.variants:names()) do
    if not variant:find "^test_" then -- other specs register variants of their own
      for dtype, tolerance in pairs { f32 = 2e-5, f64 = 1e-12 } do
        it(("computes what the CPU computes: %s, %s"):format(variant, dtype), function()
          lac.manual_seed(3)
          local host = make(variant, { dtype = dtype })
          local there = host:clone():to { device = "cuda" }
          local x = lac.randn({ 2, 51, 64 }, { dtype = dtype, device = "cpu" })
          local lengths = lac.tensor({ 40, 51 }, { dtype = "i64", device = "cpu" })
          local results = {}
          for i, m in ipairs { host, there } do
            local device = i == 1 and "cpu" or "cuda"
            local at = x:to { device = device }:detach():requires_grad_(true)
            local out, weights = m(at, at, at, { key_lengths = lengths:to { device = device },
              need_weights = true })
            out:pow(2):sum():backward()
            results[i] = { out, weights, at.grad, m.out.weight.grad, m.q.weight.grad }
          end
          for i = 1, 5 do
            local scale = math.max(1, results[1][i]:abs():max():item())
            assert.is_true(far(results[1][i], results[2][i]) < tolerance * scale, "result " .. i)
          end
          local cache, full, at = there:cache { batch = 2 }, there(x:to { device = "cuda" }), 1
          for _, n in ipairs { 20, 1, 1, 29 } do
            local part = there:decode(x:narrow(2, at, n):contiguous():to { device = "cuda" }, cache)
            assert.is_true(far(part, full:narrow(2, at, n)) < tolerance * 10)
            at = at + n
          end
        end)
      end
    end
  end
end)
