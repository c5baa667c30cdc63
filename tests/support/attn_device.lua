--- What the specs of attention's kernels on CUDA do alike: guard bytes, forwards, references, equal bits.
--
-- Configurations, poison and the rule by which results are judged are attn_random's; a spec says which
-- configurations its kernels take, how many, and what else must hold.

local ffi = require "ffi"
local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local attn = require "support.attn_random"
local philox = require "support.philox"
local lac = require "lacuna"
local assert = require "luassert"
local C = direct.C

local device = {}

--- `it` where specs of a device run, else a test that counts as skipped.
function device.it(it, pending) return os.getenv "LACUNA_GPU" == "1" and it or pending end

--- Guard bytes round every block of the pool, within the describe whose setup and teardown these are. Gives
-- the body of its last test: none of them was written over.
function device.guard(setup, teardown)
  local errors
  setup(function()
    if os.getenv "LACUNA_GPU" == "1" then lac.zeros({ 1 }, { device = "cuda" }) end -- loads the plug-in
    C.lac_memory_guard(1)
    errors = C.lac_memory_guard_errors()
  end)
  teardown(function()
    direct.device = 0
    C.lac_memory_guard(0)
  end)
  return function()
    collectgarbage()
    collectgarbage()
    lac.trim()
    assert.are.equal(errors, C.lac_memory_guard_errors())
  end
end

--- q, k, v, poisoned as attn_random does it, and the pool with them; backward: also the gradient of the
-- output and, every other time, of lse.
function device.inputs(c, seed, dtype, backward)
  local lists = { attn.inputs(c, seed, dtype) }
  attn.poison(c, unpack(lists, 1, 4))
  attn.poison_pool(c)
  if not backward then return { unpack(lists, 1, 3) } end
  if attn.chance(0.5) then lists[5] = nil end
  return lists
end

-- f with c.kernel, which is for the device only
local function with_kernel(where, c, kernel, f, ...)
  local before = c.kernel
  c.kernel = where ~= 0 and (kernel or before) or nil
  local ok, found = pcall(f, ...)
  direct.device, c.kernel = 0, before
  if not ok then error(found, 0) end
  return found
end

--- A configuration without D: r branches, an offset each, that reach all rows, so that nothing is cleared
-- beforehand. In every third trial the last branch is missing, and where segments are no whole numbers of
-- dilations, lattices of neighbouring ones leave rows out too. In every fourth a branch comes before them, so
-- that their offsets begin with 1 and go round; in every seventh they have one more, with the first's rows.
function device.covering(trial)
  local r = trial % 7 == 0 and 3 or attn.pick { 2, 3, 16 }
  local w = 64 * r + attn.pick { 0, 0, 1 }
  local c = { N = 2 * w + attn.pick { 0, 5 }, Hk = attn.random(2), offset = "branch", segments = {},
    dilations = {} }
  c.H, c.M, c.causal, c.merge = c.Hk * attn.random(2), c.N, attn.chance(0.3), attn.pick { "lse", "mean" }
  local function branch(segment, dilation)
    c.segments[#c.segments + 1], c.dilations[#c.dilations + 1] = segment, dilation
  end
  if trial % 4 == 0 and r < 16 then branch(c.N, 3) end
  for _ = 1, trial % 3 == 0 and r - 1 or trial % 7 == 0 and r + 1 or r do
    branch(trial % 5 == 0 and 10 * w or w, r)
  end
  return c
end

--- out, lse and, where the merge makes them, branch_lse of a forward alone.
function device.forward(where, dtype, c, lists, layout, kernel)
  return with_kernel(where, c, kernel, function()
    direct.device = where
    local r = direct.forward(c, lists[1], lists[2], lists[3], { dtype = dtype, layout = layout })
    local found = { out = direct.read(r.out), lse = direct.read(r.lse) }
    if r.branch_lse.storage ~= nil then found.branch_lse = direct.read(r.branch_lse) end
    return found
  end)
end

--- out, lse, dq, dk, dv.
function device.both(where, dtype, c, lists, layout, kernel)
  return with_kernel(where, c, kernel, attn.run, where, dtype, c, lists, layout)
end

-- run(0, ...) by multiply-adds in f32, as a naive program has them: the matrix unit of some CPUs is more
-- exact, and no measure of what f32 allows.
local function by_multiply_adds(run, ...)
  local isa = ffi.string(C.lac_isa(nil)):match "^%w+"
  if isa == "amx" then assert(C.lac_isa "avx512" ~= nil) end
  local ok, found = pcall(run, 0, ...)
  assert(C.lac_isa(isa) ~= nil)
  if not ok then error(found, 0) end
  return found
end

--- Results of the oracle: exact, and as a naive program in the dtype has them (nil for f64). Gradients, and
-- the worse of that program and of the CPU's `run` (device.both), if the lists have a gradient of the output.
function device.references(c, dtype, lists, run)
  local options = { keep = philox.keep(c) }
  local q, k, v, dout, dlse = unpack(lists, 1, 5)
  local exact = oracle.run(c, q, k, v, dout, dlse, options)
  if dtype == "f64" then return exact end
  options.rounding = { result = direct.round[dtype], sum = direct.round.f32 }
  local naive = oracle.run(c, q, k, v, dout, dlse, options)
  if not dout then return exact, naive end
  return exact, attn.worse(exact, naive, by_multiply_adds(run or device.both, dtype, c, lists))
end

-- x cut off to the bits of f32
local function cut(x)
  local y = direct.round.f32(x)
  if math.abs(y) <= math.abs(x) then return y end -- NaN and infinity too
  local _, e = math.frexp(x)
  return math.ldexp((x < 0 and math.ceil or math.floor)(math.ldexp(x, 24 - e)), e - 24)
end

-- What a naive program on tensor cores has for the lists: they add sixteen products of half types at a time
-- and cut the sum off, where other units round it. f32's sums are rounded there too. lse: of lse alone.
local function by_tensor_cores(c, dtype, lists, lse)
  local f32, q, k, v, dout, dlse = direct.round.f32, unpack(lists, 1, lse and 3 or 5)
  local found = oracle.run(c, q, k, v, dout, dlse, {
    keep = not lse and philox.keep(c) or nil, lse = lse,
    rounding = { result = f32, sum = f32, products = dtype ~= "f32" and { 16, cut } or nil } })
  if lse then found = { lse = found.lse, branch_lse = found.branch_lse } end
  for name, list in pairs(found) do
    local round = direct.round[name:match "lse$" and "f32" or name == "dbias" and c.bias.dtype or dtype]
    for i = 1, #list do list[i] = round(list[i]) end
  end
  return found
end

--- Results of the CPU in f64 and in the dtype, for sizes where the oracle takes minutes; run: device.forward
-- or device.both.
--
-- Where the oracle's loops are short, the worse of two programs stands for the dtype: the CPU's, and a naive
-- one on tensor cores. Few rows are judged by few errors, and the largest of ten may be next to nothing by
-- luck; where scores are large, sums that are rounded are no measure of those that a unit cuts off. That is
-- seen in lse, which is f32, not in results of half types, and above a head dimension of 128, where a score
-- is cut off more than eight times: there the program has lse where loops are long, too. (Of 713 lists of lse
-- there the error came to 1.06 times what the CPU's program allows, to 0.54 times what both do; of 127 to a
-- head dimension of 128 to 0.52 times what the CPU's does.)
function device.cpu(run, c, dtype, lists)
  local exact = run(0, "f64", c, lists)
  if dtype == "f64" then return exact end
  local naive = by_multiply_adds(run, dtype, c, lists)
  local most = lists[4] and 2 ^ 21 or 2 ^ 24 -- with gradients: slower, and more numbers
  local long = c.B * c.H * c.N * c.M * c.D > most
  local cut_off = dtype ~= "f32" and c.D > 128
  if c.starts or (long and not cut_off) then return exact, naive end -- the oracle packs nothing
  local cores = by_tensor_cores(c, dtype, lists, long)
  for name, list in pairs(naive) do cores[name] = cores[name] or list end
  return exact, attn.worse(exact, naive, cores)
end

--- Every result obeys the rule; gradients together, where there are any.
function device.judge(dtype, got, exact, naive, what)
  if got.dq then
    got, exact, naive = attn.together(got), attn.together(exact), naive and attn.together(naive)
  end
  for name, data in pairs(got) do
    if exact[name] then attn.complain(dtype, name, data, exact[name], naive and naive[name], what) end
  end
end

--- The same bits in every result.
function device.same(got, first, what)
  for name, data in pairs(got) do
    assert.are.equal(0, direct.max_diff(data, first[name]), name .. " in " .. what)
  end
end

--- One value of an input that is not finite, in one key or row of batch item 0: rows that do not see it keep
-- their results. allowed(y): how far a result may be from y. before: what the value is at first, if not what
-- the input has (fp8's scales depend on all of an input).
function device.keeps_away(c, lists, allowed, what, before)
  local which, bad = attn.random(3), attn.pick { 0 / 0, math.huge, -math.huge }
  local position, hit = attn.random(which == 1 and c.N or c.M) - 1, lists[which]
  local width = #hit / c.B / (which == 1 and c.N or c.M)
  local function set(x)
    for e = 1, width do hit[position * width + e] = x end
  end
  if before then set(before) end
  local want = device.forward(C.LAC_CUDA, "bf16", c, lists).out
  set(bad)
  local got = device.forward(C.LAC_CUDA, "bf16", c, lists).out
  for b = 0, c.B - 1 do for h = 0, c.H - 1 do for n = 0, c.N - 1 do
    local touched = b == 0 and which == 1 and n == position
    for g = 1, b == 0 and which > 1 and #c.segments or 0 do
      touched = touched or oracle.attends(c, g, b, h, n, position)
    end
    for d = 1, touched and 0 or c.D do
      local at = ((b * c.N + n) * c.H + h) * c.D + d
      local x, y = got[at], want[at]
      assert.is_true(x == y or math.abs(x - y) <= allowed(y),
        ("out[%d,%d,%d] is %g, was %g before input %d at %d was %g: %s"):format(
          b, n, h, x, y, which, position, bad, what))
    end
  end end end
end

--- Two kernels' results, to the rounding of bf16 (lse: of f32).
function device.near(got, want, what)
  for name, data in pairs(got) do
    local most = (name:match "lse" and 1e-4 or 2 ^ -6) * (1 + direct.largest(want[name]))
    assert.is_true(direct.max_diff(data, want[name]) <= most, name .. " in " .. what)
  end
end

--- Later keys of a list [B, M, Hk, D] outweigh earlier ones more and more.
function device.rise(c, k, peak, dtype)
  for i, x in ipairs(k) do
    local key = math.floor((i - 1) / (c.Hk * c.D)) % c.M
    k[i] = direct.round[dtype](x * (1 + peak * key / c.M))
  end
end

return device
