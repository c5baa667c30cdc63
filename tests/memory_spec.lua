-- memory_spec.lua: the pool, its statistics, its limits, and what happens to memory that nobody holds.
--
-- The engine's leak check is the pool's own count, so the count is tested first: every byte that a tensor
-- takes must come back, through the collector, a scope, release(), or an error in the middle of an operator.
-- Out of memory must be an error after which everything still works.

local lac = require "lacuna"
local lib = require "lacuna.lib"
local C = lib.C

local function settle()
  collectgarbage()
  collectgarbage()
  return lac.memory()
end

describe("pool", function()
  after_each(function()
    C.lac_memory_limit(0)
    C.lac_memory_guard(0)
  end)

  it("counts live bytes up and down", function()
    local before = settle()
    local t = lac.zeros{ 1000, 1000 } -- luacheck: ignore 231
    local during = lac.memory()
    assert.is_true(during.live - before.live >= 4e6)
    assert.is_true(during.live - before.live <= 4e6 * 1.25 + 128)
    assert.are.equal(before.live_blocks + 1, during.live_blocks)
    t = nil -- luacheck: ignore 311
    local after = settle()
    assert.are.equal(before.live, after.live)
    assert.are.equal(before.live_blocks, after.live_blocks)
    assert.are.equal(before.storages, after.storages)
  end)

  it("serves a dropped block again without asking the system", function()
    local t = lac.zeros{ 12345 }
    t:release()
    local before = lac.memory()
    local u = lac.zeros{ 12345 }
    local after = lac.memory()
    assert.are.equal(before.reused + 1, after.reused)
    assert.is_true(after.cached < before.cached)
    u:release()
  end)

  it("wastes at most a quarter, for every size", function()
    local base = settle().live
    for _, bytes in ipairs{ 1, 63, 64, 65, 80, 81, 100, 127, 128, 129, 1000, 1025, 4097, 65537, 1000001 } do
      local t = lac.zeros{ bytes, dtype = "u8" }
      local taken = lac.memory().live - base
      assert.is_true(taken >= bytes and taken <= math.max(64, bytes * 1.25 + 16), bytes .. " took " .. taken)
      t:release()
    end
  end)

  it("gives cached blocks back on trim", function()
    lac.zeros{ 100000 }:release()
    assert.is_true(lac.memory().cached > 0)
    lac.trim()
    assert.are.equal(0, lac.memory().cached)
  end)

  it("keeps the peak until it is reset", function()
    lac.reset_peak()
    local low = lac.memory().peak
    lac.zeros{ 500000 }:release()
    assert.is_true(lac.memory().peak >= low + 2e6)
    lac.reset_peak()
    assert.are.equal(lac.memory().live, lac.memory().peak)
  end)

  it("refuses beyond the limit with a report, and everything goes on", function()
    local keep = lac.ones{ 1000 }
    lac.memory_limit(settle().live + 2 ^ 20)
    local ok, message = pcall(lac.zeros, { 1000, 1000 })
    assert.is_false(ok)
    assert.matches("out of memory: 4000000 bytes asked for, over the limit", message)
    assert.matches("pool: live .* cached .* peak .* limit", message)
    assert.are.equal(1000, keep:sum():item())
    assert.are.equal(2000, (keep + keep):sum():item())
    lac.memory_limit(0)
    assert.are.equal(1000000, lac.ones{ 1000, 1000 }:sum():item())
  end)

  it("collects dead tensors before it fails", function()
    lac.memory_limit(settle().live + 10 * 2 ^ 20)
    for i = 1, 200 do
      local t = lac.full{ 250, 1000, value = i } -- 1 MB each; none is held
      assert.are.equal(2, t:dim())
      t = lac.zeros{ 250, 1000 }
      assert.are.equal(2, t:dim())
    end
  end)

  it("survives running out of memory inside an operator, in either direction", function()
    local a = lac.randn{ 400, 400, grad = true }
    local room = settle().live
    for _, extra in ipairs{ 1e5, 7e5, 1.4e6, 2.1e6, 3e6 } do
      lac.memory_limit(room + extra)
      pcall(function() a:matmul(a):softmax(2):gelu():sum():backward() end)
    end
    lac.memory_limit(0)
    a.grad = nil
    assert.are.equal(room, settle().live)
    a:matmul(a):sum():backward()
    assert.are.equal(160000, a.grad:numel())
  end)

  it("refuses what the machine does not have", function()
    for _, sizes in ipairs{ { 2 ^ 40 }, { 2 ^ 20, 2 ^ 20, 2 ^ 10 }, { 2 ^ 31, 2 ^ 31, 2 ^ 31 } } do
      local ok, message = pcall(lac.empty, sizes)
      assert.is_false(ok)
      assert.matches("out of memory", (message:gsub("has more [%a ]+", "out of memory")))
    end
    assert.are.equal(3, lac.ones{ 3 }:sum():item())
  end)

  it("keeps memory flat over many dead tensors that the collector cannot feel", function()
    settle()
    lac.reset_peak()
    local base = lac.memory().live
    for _ = 1, 400 do lac.empty{ 2 ^ 20 } end -- 1.6 GB in all
    assert.is_true(lac.memory().peak - base < 400 * 2 ^ 20)
  end)

  it("notices writes outside a block in guard mode", function()
    C.lac_memory_guard(1)
    local before = C.lac_memory_guard_errors()
    local good = lac.zeros{ 10 }
    good:fill_(3)
    good:release()
    assert.are.equal(before, C.lac_memory_guard_errors())
    local bad = lac.zeros{ 10, dtype = "u8" }
    local p = bad:data()
    p[10] = 1 -- one past the end: the guard's first byte
    bad:release()
    assert.are.equal(before + 1, C.lac_memory_guard_errors())
  end)
end)

describe("release", function()
  local function refused(f, ...)
    local ok, message = pcall(f, ...)
    assert.is_false(ok)
    assert.matches("release", message)
  end

  it("makes every later use an error, also through views", function()
    local t = lac.ones{ 4, 4 }
    local v, w = t[1], t:transpose(1, 2)
    t:release()
    for _, x in ipairs{ t, v, w } do
      refused(function() return x + 1 end)
      refused(function() return x:sum() end)
      refused(function() return x:totable() end)
      refused(function() return x:clone() end)
      assert.matches("released", tostring(x))
    end
    t:release() -- again: nothing to do, no error
  end)

  it("is no trouble for the collector", function()
    local before = settle()
    for _ = 1, 1000 do lac.ones{ 16 }:release() end
    local after = settle()
    assert.are.equal(before.storages, after.storages)
    assert.are.equal(before.live, after.live)
  end)
end)

describe("reading", function()
  it("takes any NaN bits for NaN, whatever LuaJIT keeps in their payload", function()
    local ffi = require "ffi"
    for _, dtype in ipairs{ "f64", "f32", "f16", "bf16" } do
      for _, byte in ipairs{ 0xff, 0x7f } do
        local t = lac.zeros{ 3, dtype = dtype }
        ffi.fill(ffi.cast("uint8_t *", t:data()), #t:string(), byte)
        t[2] = 5
        local list = t:totable()
        assert.are.equal(5, list[2])
        for i = 1, 3, 2 do
          assert.are.equal("number", type(list[i]))
          -- bytes 7f 7f.. are a NaN in f16 only
          assert.are.equal(byte == 0xff or dtype == "f16", list[i] ~= list[i])
          local item = t[i]:item()
          assert.are.equal(list[i] ~= list[i], item ~= item)
        end
        assert.are.equal("string", type(tostring(t)))
      end
    end
  end)
end)
