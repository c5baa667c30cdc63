--- runtime_cuda_spec.lua: the queue of the device: copies beside operators, events, memory, late errors.
--
-- Tagged #gpu: `make test-gpu` runs them. A copy is held against the values that it must bring, while
-- something slow is queued before it and everything that could spoil it is done right after it: the ends are
-- overwritten, released and their memory taken again. Faults of the device end its use by a process, so they
-- happen in children.

local gpu = os.getenv "LACUNA_GPU" == "1"
local it = gpu and it or pending

local lac = require "lacuna"
local lib = require "lacuna.lib"
local sys = require "lacuna.sys"

local CUDA = { device = "cuda" }
local fake = os.getenv "LACUNA_FAKE" == "1" -- the CPU pretends (queue_spec.lua): it has no faults to report
local SIDE = fake and 32 or 4096 -- of matrices that keep a device busy

-- some milliseconds of work on the device
local function busy(x)
  for _ = 1, 20 do x = x:matmul(x) * 1e-3 end
  return x
end

-- runs Lua code in a child; what it wrote to standard output and error
local function child(code, environment)
  local path = sys.temporary(".lua")
  local f = assert(io.open(path, "w"))
  f:write(code)
  f:close()
  local _, out, err = sys.run(([[%s LUA_PATH="lua/?.lua;lua/?/init.lua;$LUA_PATH;;" luajit %s]])
    :format(environment or "", sys.quote(path)))
  os.remove(path)
  return out .. err
end

-- a tensor whose bytes are where there are none
local BAD = [[
local lac = require "lacuna"
local ffi = require("lacuna.lib").ffi
local x, bad = lac.randn{ 1000, device = "cuda" }, lac.randn{ 1000, device = "cuda" }
ffi.cast("void **", ffi.cast("char *", bad.c.storage) + 8)[0] = ffi.cast("void *", 0x1000)
]]

describe("the queue of the device #gpu", function()
  local slow
  setup(function()
    if gpu then slow = lac.randn { SIDE, SIDE, device = "cuda" } * 0.02 end
  end)

  describe("asynchronous copies", function()
    it("bring what they should, whatever happens to both ends meanwhile", function()
      local host = lac.randint { 100000, high = 1000 }:pin()
      assert.is_true(host:is_pinned())
      local expected = host:clone()
      for _ = 1, 20 do
        busy(slow)
        local there = host:to { device = "cuda", async = true }
        local plus = there + 1
        host:fill_(7) -- waits for the copy
        there:release()
        lac.full({ 100000 }, 3, { dtype = "i64", device = "cuda" }):release()
        assert.is_true(lac.equal(expected + 1, plus:to "cpu"))
        host:copy_(expected)
      end
    end)

    it("come back to pinned memory, after all that was queued and before all that follows", function()
      for round = 1, 20 do
        local x = busy(slow) * 0 + round
        local back = x:to { device = "cpu", async = true }
        x:fill_(-1) -- ordered after the copy
        x:release()
        lac.full({ SIDE, SIDE }, -2, CUDA):release()
        assert.is_true(back:is_pinned())
        assert.are.equal(round, back:min():item())
        assert.are.equal(round, back:max():item())
      end
    end)

    it("do not make the script wait, nor reuse a pinned block too early", function()
      local host = lac.randn { 2 ^ 22 }:pin()
      local sum = host:sum():item()
      lac.synchronize()
      busy(slow)
      local e = lac.event("cuda")
      local there = host:to { device = "cuda", async = true }
      host:release()
      assert.is_false(e:done()) -- the work before is still queued
      local other = lac.full({ 2 ^ 22 }, 5):pin()
      assert.is_true(math.abs(there:sum():item() - sum) <= 1e-3 * math.abs(sum) + 1)
      assert.are.equal(5, other:min():item())
      assert.is_true(e:done())
    end)

    it("leave what takes their memory alone, when an end is released while they are under way", function()
      for round = 1, 20 do
        local host, x = lac.full({ 2 ^ 18 }, round):pin(), lac.full({ 2 ^ 18 }, -round, CUDA)
        busy(slow)
        local there, back = host:to { device = "cuda", async = true }, x:to { device = "cpu", async = true }
        there:release()
        x:release()
        local y, z = lac.full({ 2 ^ 18 }, 0.5, CUDA), lac.full({ 2 ^ 18 }, 0.25, CUDA) -- in their places
        host:fill_(9) -- waits
        assert.are.equal(-round, back:min():item())
        assert.are.equal(-round, back:max():item())
        for value, t in pairs { [0.5] = y, [0.25] = z } do
          assert.are.equal(value, t:min():item())
          assert.are.equal(value, t:max():item())
        end
      end
    end)

    it("copy whole pinned tensors safely in the plain way, too", function()
      local host = lac.ones { 2 ^ 20 }:pin()
      local there = host:to(CUDA)
      host:fill_(2)
      assert.are.equal(1, there:max():item())
    end)

    it("say what they need", function()
      local ok, message = pcall(lac.to, lac.zeros { 3 }, { device = "cuda", async = true })
      assert.is_false(ok)
      assert.matches("to: async = true needs page%-locked memory on the cpu: .*:pin%(%) first", message)
      ok, message = pcall(lac.to, lac.zeros({ 3 }, CUDA), { device = "cpu", dtype = "f16", async = true })
      assert.is_false(ok)
      assert.matches("copies bytes as they are", message)
      ok, message = pcall(lac.to, lac.zeros({ 4, 3 }, CUDA):t(), { device = "cpu", async = true })
      assert.is_false(ok)
      assert.matches("needs a contiguous tensor", message)
      assert.has_error(function() lac.zeros({ 3 }, CUDA):pin() end)
    end)

    it("are counted in a pool of their own", function()
      lib.collect()
      local before = lac.memory("pinned").live
      local t = lac.zeros { 1000, 1000 }:pin()
      assert.is_true(lac.memory("pinned").live >= before + 4e6)
      t:release()
      assert.are.equal(before, lac.memory("pinned").live)
      lac.empty_cache("pinned")
      assert.are.equal(0, lac.memory("pinned").cached)
    end)
  end)

  it("has events that are timed", function()
    lac.synchronize()
    local from = lac.event("cuda")
    busy(slow)
    local to = lac.event("cuda")
    assert.is_false(to:done())
    assert.are.equal("Event(queued)", tostring(to))
    assert.is_true(from:elapsed(to) > (fake and 0 or 0.1))
    assert.is_true(to:done())
  end)

  describe("memory", function()
    it("is collected, trimmed and asked for again before it is refused, with the pool's report", function()
      lib.collect()
      lac.trim()
      local room = lac.memory("cuda").live + 64 * 2 ^ 20
      lac.memory_limit(room, CUDA)
      for _ = 1, 40 do lac.empty({ 2 ^ 22 }, CUDA) end -- 16 MiB each: garbage
      local ok, message = pcall(lac.empty, { 2 ^ 26 }, CUDA)
      lac.memory_limit(0, CUDA)
      assert.is_false(ok)
      assert.matches("out of memory on cuda: 268435456 bytes asked for, over the limit", message)
      assert.matches("; pool: live .*after collecting and trimming", message)
      assert.are.equal(3, (lac.zeros({ 3 }, CUDA) + 1):sum():item())
      assert.matches("^memory: .* live in %d+ blocks", tostring(lac.memory_report { device = "cuda" }))
    end)

    it("is kept flat over dead tensors that the collector cannot feel", function()
      lib.collect()
      lib.pace(lib.C.LAC_CUDA)
      local base = lac.memory("cuda").live
      lac.reset_peak()
      for _ = 1, 500 do lac.empty({ 2 ^ 21 }, CUDA) end -- 8 MiB each
      assert.is_true(lac.memory("cuda").peak - base < 2 * base + 512 * 2 ^ 20)
    end)

    it("goes back while operators are queued without harm", function()
      local x = lac.randn({ SIDE, SIDE }, CUDA)
      local expected = (x * 2):sum():item()
      for _ = 1, 5 do
        busy(slow)
        local y = x * 2
        lac.empty_cache("cuda")
        assert.are.equal(expected, y:sum():item())
      end
    end)
  end)

  describe("calls", function()
    local MOST = 9
    -- a long row of calls on a device, by a dice of its own; all numbers are whole and small, so every device
    -- gives the same bits. Returns what they left, and what was read between
    local function row(device, calls, seed)
      local dice, seen, there = seed, {}, device == "cuda"
      local function roll(n)
        dice = dice * 16807 % 2147483647
        return dice % n + 1
      end
      local t, turn = {}, lac.eye(24, { dtype = "f64" }):flip(1):to(device)
      local numbers = {} -- from -9 to 9
      for i = 1, 24 * 24 do numbers[i] = roll(2 * MOST + 1) - MOST - 1 end
      local noise = lac.tensor(numbers, { dtype = "f64" }):view(24, 24):to(device)
      for i = 1, 4 do t[i] = noise:roll(i, 1) end
      local double = there and lac.graph(function(x) return x * 2 - 1 end) or function(x) return x * 2 - 1 end
      local kinds = {
        function(x, y) return x + y end,
        function(x, y) return x - y * 2 end,
        function(x, y) return lac.maximum(x, y) - 1 end,
        function(x) return x:t() + 1 end,
        function(x) return x:sum(1, true) - x end,
        function(x) x:fill_(roll(5)) return x - noise end,
        function(x) return x:matmul(turn) end, -- the library's
        function(x, y) return turn:matmul(x) + y end,
        function(x, y) y:copy_(x) return y:t() + noise end,
        function(x) return (x:sort(2)) end, -- launched by others' code
        function(x) return x:cumsum(1):clamp(-MOST, MOST) end,
        function(x) return x:to("cpu"):to(device) + 1 end, -- waits
        function(x) seen[#seen + 1] = x:sum():item() return x end,
        function(x) -- beside the operators
          if not there then return x + 0 end
          local host = x:to { device = "cpu", async = true }
          return host:to { device = "cuda", async = true }
        end,
        function(x)
          if there then lac.event("cuda"):wait() end
          return x
        end,
        function(x) if there then lac.event("cuda"):done() end return x end,
        function(x) if there then lac.empty_cache("cuda") end return x end,
        function(x) return double(x) end, -- a graph, from the second time on
        function(x) -- longer arguments: a nest of strided views
          return x:view(2, 12, 2, 12):permute(3, 2, 1, 4):clone():view(24, 24)
        end,
        function(x, y) return lac.cat({ x[{ { 1, 12 } }], y[{ { 13, 24 } }] }, 1) end,
      }
      for i = 1, calls do
        local at, kind = roll(4), roll(4 * #kinds)
        -- most are operators, in a row
        kind = kinds[kind <= #kinds and kind or kind % 11 + 1]
        local x = kind(t[at], t[roll(4)])
        t[at] = lac.where(x:abs():gt(MOST), noise:roll(i % 24, 2), x)
        if i % 500 == 0 then lib.collect() end
      end
      for i = 1, 4 do t[i] = t[i]:to "cpu" end
      return t, seen
    end

    it("come in the order of the script, whatever kinds there are", function()
      for seed = 1, 3 do
        local t, seen = row("cuda", 3000, seed)
        local expected, read = row("cpu", 3000, seed)
        assert.are.same(read, seen)
        for i = 1, 4 do assert.is_true(lac.equal(expected[i], t[i]), ("%d of %d"):format(i, seed)) end
      end
    end)

    it("are made by the script itself without a launcher", function()
      local code = [[
        local lac = require "lacuna"
        local x, y = lac.ones{ 1000, device = "cuda" }, lac.zeros{ 1000, device = "cuda" }
        for i = 1, 2000 do y = y + x end
        print(y:min():item(), y:max():item())
        for _, thread in ipairs(require("lacuna.sys").list "/proc/self/task") do
          for line in io.lines("/proc/self/task/" .. thread .. "/comm") do
            if line == "lacuna-launcher" then print "by a thread" end
          end
        end
      ]]
      assert.are.equal("2000\t2000\n", child(code, "LACUNA_CUDA_LAUNCHER=0"))
      local said = child(code)
      if not fake and lib.C.lac_threads(0) >= 3 then assert.are.equal("2000\t2000\nby a thread\n", said) end
    end)

    it("that are queued do not keep a process from ending", function()
      local said = child([[
        local lac = require "lacuna"
        local x = lac.ones({ 2 ^ 22 }, { device = "cuda" })
        for i = 1, 3000 do x = x + 1 end
        print "ends"
        os.exit(0)
      ]])
      assert.are.equal("ends\n", said)
    end)

    it("are refused in the child of a fork, which ends by itself", function()
      local said = child([[
        local lac = require "lacuna"
        local ffi = require("lacuna.lib").ffi
        ffi.cdef "int fork(void); int waitpid(int, int *, int);"
        local x = lac.ones({ 1000 }, { device = "cuda" })
        for i = 1, 1000 do x = x + 1 end
        local child = ffi.C.fork()
        if child == 0 then
          pcall(function() for i = 1, 100 do x = x + 1 end lac.synchronize() end)
          os.exit(3)
        end
        local status = ffi.new "int[1]"
        ffi.C.waitpid(child, status, 0)
        print(status[0], x:sum():item())
      ]])
      assert.are.equal("768\t1001000\n", said)
    end)
  end)

  describe("a fault of the device", function()
    local real = fake and pending or it
    real("names the operators that may have done it, and stays", function()
      local said = child(BAD .. [[
        local y = x:tanh()
        local z = bad:exp() + 1
        for _ = 1, 2 do
          local ok, message = pcall(lac.synchronize)
          print(ok, message)
        end
        print(pcall(function() return x * 2 end))
      ]])
      assert.matches("synchronize: [^\n]*one of the operators queued since the last wait: [^\n]*map1, map2",
        said)
      assert.matches("LACUNA_CUDA_SYNC=1", said)
      local _, times = said:gsub("cannot be used any more by this process", "")
      assert.are.equal(3, times, said)
    end)

    real("is the operator's own with LACUNA_CUDA_SYNC=1, at the line of its call", function()
      local said = child(BAD .. [[
        local y = x:tanh()
        print(pcall(function()
          local z = bad:exp()
          return z
        end))
      ]], "LACUNA_CUDA_SYNC=1")
      assert.matches("false\tmap1: [^\n]* in operator map1%. [^\n]*%.lua:7%]", said)
    end)
  end)
end)
