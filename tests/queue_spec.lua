--- queue_spec.lua: the queue of a device, without one: the CPU pretends.
--
-- tests/support/fake_cuda.c is a plug-in whose operators are the CPU's. The specs of copies, events, pools
-- and graphs run with it in a child, so that what the engine and the Lua layer do with a queue is tested
-- everywhere; on a machine with a device the same files run against that.

local lib = require "lacuna.lib"
local sys = require "lacuna.sys"

local FLAGS = (os.getenv("LACUNA_STRESS_FLAGS") or ""):gsub(",", " ")

local function output(command)
  local pipe = io.popen(command)
  local text = pipe:read("*a"):gsub("%s+$", "")
  pipe:close()
  return text
end

-- the engine's objects beside the library under test
local function objects(build)
  local list = {}
  for _, name in ipairs(sys.list("c")) do
    local stem = name:match("^(.*)%.c$")
    if stem and stem ~= "main" and stem ~= "interrupt" then
      list[#list + 1] = ("%s/obj/%s.o"):format(build, stem)
    end
  end
  for _, name in ipairs(sys.list("c/cpu")) do
    local stem = name:match("^(.*)%.c$")
    for _, isa in ipairs { "baseline", "avx2", "avx512", "amx" } do
      local path = ("%s/obj/%s/%s.o"):format(build, isa, stem or "")
      if stem and sys.exists(path) then list[#list + 1] = path end
    end
  end
  return table.concat(list, " ")
end

describe("a device that the CPU pretends to be", function()
  local dir
  setup(function()
    dir = sys.temporary("-device")
    assert(sys.mkdir(dir))
    local build = output("realpath " .. sys.quote(lib.path)):match("^(.*)/lib/[^/]*$")
    os.execute(("ln -s %s/lib/liblacuna.so %s/"):format(sys.quote(build), sys.quote(dir)))
    local blas = "/usr/lib/" .. output("cc -print-multiarch") .. "/openblas-openmp"
    local status, out, err = sys.run(table.concat({
      "cc -shared -std=c11 -D_GNU_SOURCE -O1 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra -Werror -Ic",
      "tests/support/fake_cuda.c", objects(build), "-o", sys.quote(dir) .. "/liblacuna_cuda.so",
      "-Wl,-Bsymbolic", "-Wl,-rpath," .. blas, blas .. "/libopenblas.so -ldl -lpthread -lm", FLAGS,
      build:find("/coverage$") and "--coverage" or "",
    }, " "))
    assert.are.equal(0, status, out .. err)
  end)
  teardown(function() os.execute("rm -rf " .. sys.quote(dir)) end)

  for _, spec in ipairs { "runtime_cuda", "graph_cuda" } do
    it("passes " .. spec .. "_spec.lua", function()
      local status, out, err = sys.run(("LACUNA_LIBRARY=%s/liblacuna.so LACUNA_GPU=1 LACUNA_FAKE=1 "
        .. "luajit /usr/bin/busted --tags=gpu tests/%s_spec.lua"):format(sys.quote(dir), spec))
      assert.are.equal(0, status, out .. err)
      assert.matches("[1-9]%d* passed, 0 failed", out)
    end)
  end

  it("is named cuda or cuda:0 by the sessions of a run", function()
    local place = sys.quote(dir)
    local function run(script, name)
      return sys.run(([[head -c 60000 c/lacuna.h >%s/text && LACUNA_LIBRARY=%s/liblacuna.so \
        LUA_PATH="lua/?.lua;lua/?/init.lua;$LUA_PATH;;" luajit experiments/%s.lua --quick --threads 1 \
        --data %s/text --steps 2 --resume --out %s/%s --device %s]])
        :format(place, place, script, place, place, script, name))
    end
    for _, script in ipairs { "language_model", "sweep_segments" } do
      for _, name in ipairs { "cuda", "cuda:0", "cuda" } do
        local status, out, err = run(script, name)
        assert.are.equal(0, status, out .. err)
      end
      local status, _, err = run(script, "cpu")
      assert.are.equal(1, status)
      assert.matches("%-%-device is 'cuda:0' in .* and 'cpu' now", err)
    end
  end)

  it("is refused from other sources or on other machines, with what to do", function()
    local sources = "the engine and the plug%-in were built from different sources: run `make` again"
    local abi = "was built for ABI %d+ %(%d+ bytes%), the engine has %d+ %(%d+ bytes%): run `make` again"
    local refusals = { [0] = "it does not export lac_backend_v1", abi, abi, sources, sources, sources,
                       "there is no driver" }
    for stale = 0, #refusals do
      local folder = sys.temporary("-stale")
      assert(sys.mkdir(folder))
      local place = sys.quote(folder)
      local status, out, err = sys.run(([[ln -s "$(readlink -f %s/liblacuna.so)" %s/ &&
        cc -shared -std=c11 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Ic -DSTALE=%d \
          tests/support/stale_cuda.c -o %s/liblacuna_cuda.so]]):format(sys.quote(dir), place, stale, place))
      assert.are.equal(0, status, out .. err)
      local said = output(([[LACUNA_LIBRARY=%s/liblacuna.so LUA_PATH="lua/?.lua;lua/?/init.lua;;" luajit -e '
        local lac = require "lacuna"
        print(pcall(lac.zeros, { 2 }, { device = "cuda" }))
        print((lac.ones { 2 } + 1):sum():item(), lac.devices())' 2>&1]]):format(place))
      os.execute("rm -rf " .. place)
      local _, times = said:gsub(refusals[stale], "")
      assert.are.equal(2, times, said) -- by the call and in the list of devices
      assert.matches("^false.*\n4\t", said) -- the CPU works on
    end
  end)
end)
