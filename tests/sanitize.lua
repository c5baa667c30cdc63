--- sanitize.lua: small cases of every attention kernel of the device, for compute-sanitizer.
--
--   compute-sanitizer --tool memcheck --error-exitcode 3 build/bin/lacuna tests/sanitize.lua
--   compute-sanitizer --tool racecheck --error-exitcode 3 build/bin/lacuna tests/sanitize.lua portable pairs
--   compute-sanitizer --tool synccheck --error-exitcode 3 build/bin/lacuna tests/sanitize.lua
--
-- `make sanitize-gpu` runs all three. Each case is a forward and a backward with rows, keys and head
-- dimensions that fill no tile, so that every edge is met; what comes out must be finite. Values are the
-- specs' matter: under these tools a kernel runs up to a thousand times slower, and the specs with their
-- oracle for hours. Arguments name the families to run, all of them by default; a line says what each case
-- took. LuaJIT compiles nothing here: under the tool a process that runs compiled code is aborted after a
-- while.

local lac = require "lacuna"
local sys = require "lacuna.sys"

jit.off()
lac.default_device "cuda"

local FAMILIES = { "portable", "pairs", "hopper", "parts" }

local function draw(sizes, dtype) return lac.randn(sizes, { dtype = dtype, grad = true }) end

local function finite(name, list)
  for i, x in ipairs(list) do
    local largest = x:to{ dtype = "f32" }:abs():max():item()
    assert(largest < math.huge, ("%s: result %d is not finite"):format(name, i))
  end
end

-- forward and backward of lac.attend with `o`, of which n rows, m keys, h and kv heads, d, dtype, batch are
-- sizes; `forward`: that alone
local function attend(name, o)
  local options = { segments = { 64, 300 }, dilations = { 1, 3 }, merge = "lse", heads = "all" }
  local sizes = { n = 150, m = 150, h = 4, kv = 4, d = 64, dtype = "bf16", batch = 1, forward = false }
  for key, value in pairs(o) do
    if sizes[key] ~= nil then sizes[key] = value else options[key] = value end
  end
  local s, start = sizes, sys.time()
  lac.scope(function()
    local q = draw({ s.batch, s.n, s.h, s.d }, s.dtype)
    local k, v = draw({ s.batch, s.m, s.kv, s.d }, s.dtype), draw({ s.batch, s.m, s.kv, s.d }, s.dtype)
    local inputs = { q, k, v, options.bias }
    if s.forward then return finite(name, { lac.no_grad(lac.attend, q, k, v, options) }) end
    local out, lse = lac.attend(q, k, v, options)
    local seeds = { draw(out:size(), s.dtype), draw(lse:size(), lse:dtype()) }
    finite(name, { out, unpack(lac.grad({ out, lse }, inputs, { grad_outputs = seeds })) })
  end)
  print(("  %-60s %.1f s"):format(name, sys.time() - start))
  io.stdout:flush()
end

local run = {}

function run.portable()
  for _, dtype in ipairs{ "bf16", "f16", "f32", "tf32", "f64" } do
    lac.use_tf32(dtype == "tf32")
    for i, d in ipairs{ 16, 40, 64, 128, 256 } do
      attend(("portable %s, head_dim %d"):format(dtype, d), { kernel = "portable", d = d, causal = i % 2 == 0,
        dtype = dtype == "tf32" and "f32" or dtype, kv = i % 2 == 0 and 2 or 4 })
    end
    lac.use_tf32(false)
  end
  local function both(name, o)
    for _, dtype in ipairs{ "bf16", "f32" } do
      o.kernel, o.dtype = "portable", dtype
      attend(("portable %s, %s"):format(dtype, name), o)
    end
  end
  local lengths = lac.tensor({ 150, 70 }, { dtype = "i64" })
  both("window and lengths", { window = 20, batch = 2, key_lengths = lengths })
  both("dropout", { dropout = 0.3 })
  both("heads divided, mean", { heads = "split", merge = "mean", causal = true })
  both("duplicates once", { dedup = true })
  both("constants of the merge", { merge = "lse_detach" })
  both("few rows of many keys", { n = 3, m = 290, align = "end", causal = true })
  both("few rows, keys shared out", { n = 4, m = 5000, segments = { 1000, 6000 }, align = "end" })
end

function run.pairs()
  for _, dtype in ipairs{ "bf16", "f32", "tf32" } do
    lac.use_tf32(dtype == "tf32")
    for i, d in ipairs{ 40, 64, 128 } do
      local function case(name, o)
        o.kernel, o.dtype, o.d, o.causal = "portable", dtype == "tf32" and "f32" or dtype, d, i == 2
        attend(("pairs %s, head_dim %d, %s"):format(dtype, d, name), o)
      end
      local rows = { 150, 150 }
      case("mask", { mask = lac.rand(rows):gt(0.3) })
      case("bias", { bias = draw({ 4, 150, 150 }, "f32") })
      case("slopes", { alibi = true })
      case("blocks", { block_mask = lac.rand{ 3, 3 }:gt(0.4), block = 64, segments = { 300 },
        dilations = { 1 } })
      case("blocks of 128", { block_mask = lac.rand{ 2, 2 }:gt(0.4), block = 128, segments = { 300 },
        dilations = { 1 } })
      for _, block in ipairs{ 16, 24 } do -- tiles of 16 and of 32 rows
        local cells = math.ceil(150 / block)
        case(("blocks of %d"):format(block), { block_mask = lac.rand{ cells, cells }:gt(0.4), block = block,
          segments = { 300 }, dilations = { 1 } })
      end
      case("packed", { cu_seqlens = { 0, 60, 61, 150 } })
    end
    lac.use_tf32(false)
  end
end

function run.hopper()
  for _, dtype in ipairs{ "bf16", "f16" } do
    for _, d in ipairs{ 64, 128 } do
      for _, causal in ipairs{ false, true } do
        local function case(name, o)
          o.dtype, o.d, o.causal, o.kernel = dtype, d, causal, "hopper"
          o.n, o.m = o.n or 300, o.m or o.n or 300
          attend(("hopper %s, head_dim %d%s, %s"):format(dtype, d, causal and ", causal" or "", name), o)
        end
        case("one branch", { segments = { 300 }, dilations = { 1 } })
        case("three branches", { segments = { 100, 200, 400 }, dilations = { 1, 2, 3 }, kv = 2 })
        case("heads divided", { segments = { 100, 400 }, dilations = { 1, 2 }, heads = "split" })
        case("dropout and slopes", { segments = { 100, 400 }, dilations = { 1, 2 }, dropout = 0.3,
          alibi = true })
        case("padding", { segments = { 100, 400 }, dilations = { 1, 2 },
          key_padding = lac.rand{ 1, 300 }:gt(0.3) })
        case("mask", { segments = { 100, 400 }, dilations = { 1, 2 }, mask = lac.rand{ 300, 300 }:gt(0.3) })
        case("bias", { segments = { 300 }, dilations = { 1 }, bias = draw({ 4, 300, 300 }, dtype),
          forward = true })
        case("packed", { segments = { 300 }, dilations = { 1 }, cu_seqlens = { 0, 100, 300 } })
        case("fp8", { segments = { 100, 200, 400 }, dilations = { 1, 2, 3 }, kv = 2, fp8 = true, window = 150,
          forward = true })
        case("fp8, one branch", { segments = { 300 }, dilations = { 1 }, fp8 = true, forward = true })
        -- all blocks: a last tile in which one warpgroup has no keys, with more steps than stages
        case("all blocks of 128", { segments = { 300 }, dilations = { 1 }, block = 128,
          block_mask = lac.ones{ 3, 3 }:gt(0) })
        for _, block in ipairs{ 16, 64, 128 } do -- the backward takes blocks of 128
          local cells = math.ceil(300 / block)
          local active = lac.rand{ 4, cells, cells }:gt(0.4):logical_or(lac.eye(cells):gt(0))
          case(("blocks of %d"):format(block), { segments = { 300 }, dilations = { 1 },
            forward = block < 128, block = block, block_mask = active })
        end
      end
    end
    for _, d in ipairs{ 32, 80, 136, 256 } do -- forward only: the backward has tiles of 64 and 128, above
      for _, causal in ipairs{ false, true } do
        attend(("hopper %s, head_dim %d%s"):format(dtype, d, causal and ", causal" or ""), { dtype = dtype,
          d = d, kernel = "hopper", causal = causal, n = 300, m = 300, forward = true })
        attend(("hopper %s, head_dim %d%s, three branches"):format(dtype, d, causal and ", causal" or ""),
          { dtype = dtype, d = d, kernel = "hopper", causal = causal, n = 300, m = 300, forward = true,
            segments = { 100, 200, 400 }, dilations = { 1, 2, 3 }, kv = 2 })
      end
    end
  end
end

-- f32 as Hopper multiplies it
function run.parts()
  for _, d in ipairs{ 40, 64, 128 } do
    for _, causal in ipairs{ false, true } do
      local function case(name, o)
        o.dtype, o.d, o.causal, o.n, o.m = "f32", d, causal, 300, 300
        o.segments, o.dilations = o.segments or { 100, 200, 400 }, o.dilations or { 1, 2, 3 }
        attend(("parts, head_dim %d%s, %s"):format(d, causal and ", causal" or "", name), o)
      end
      case("one branch", { segments = { 300 }, dilations = { 1 } })
      case("three branches", { kv = 2, batch = 2 })
      case("heads divided, mean", { heads = "split", merge = "mean" })
      case("constants of the merge", { merge = "lse_detach" })
      case("window and dropout", { window = 80, dropout = 0.3 })
      case("padding", { key_padding = lac.rand{ 1, 300 }:gt(0.3) })
    end
  end
end

local names = #arg > 0 and arg or FAMILIES
for _, name in ipairs(names) do
  if not run[name] then
    error(("sanitize: no family '%s'; there are: %s"):format(name, table.concat(FAMILIES, ", ")), 0)
  end
  run[name]()
end
lac.synchronize()
print "done"
