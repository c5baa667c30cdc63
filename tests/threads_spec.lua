--- Many threads: the engine under programs that call it from several at once.
--
-- LuaJIT has one thread, so no spec can do this in Lua. C programs are compiled against the library that
-- this process uses, and run: tests/support/plan_stress.c works on the plan cache alone, engine_stress.c on
-- pool, operators and attention, comparing every bit with a run on one thread, and launcher_stress.c on the
-- ring by which the CUDA plug-in launches (kernels/launcher.h). Under `make tsan` the same programs are
-- instrumented (LACUNA_STRESS_FLAGS, words separated by commas), and the spec asserts as well that a race
-- made on purpose is reported: a gate that cannot fail says nothing.
--
-- Compiled here and not by the Makefile: the programs belong to the suite, and cc is there wherever the
-- engine was built.

local lib = require "lacuna.lib"
local sys = require "lacuna.sys"

local FLAGS = (os.getenv("LACUNA_STRESS_FLAGS") or ""):gsub(",", " ")

describe("the engine under several threads", function()
  local directory

  setup(function()
    directory = sys.temporary "-threads"
    assert(sys.mkdir(directory))
  end)
  teardown(function() os.execute("rm -r " .. sys.quote(directory)) end)

  local function compile(name)
    local program = sys.quote(directory .. "/" .. name)
    local library = sys.quote(lib.path:match("^(.*)/[^/]*$"))
    local status, out, err = sys.run(table.concat({
      "cc -O1 -g -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -Ic tests/support/" .. name .. ".c",
      "-o", program, "-L" .. library, "-Wl,-rpath," .. library,
      "-Wl,--allow-shlib-undefined -llacuna -lpthread", FLAGS,
    }, " "))
    assert.are.equal(0, status, out .. err)
    return program
  end

  it("keeps the plan cache whole", function()
    local status, out, err = sys.run("OMP_NUM_THREADS=1 " .. compile "plan_stress")
    assert.are.equal("0 failures, 32000 finds, capacity kept 1\n", out, err)
    assert.are.equal(0, status, err)
  end)

  it("launches every call once, whole and in order", function()
    local status, out, err = sys.run(compile "launcher_stress")
    assert.are.equal("0 failures, some calls failed 1, some were made by their callers 1, not most 1\n"
      .. "a child 0, a stop 1 with calls dropped 1\n", out, err)
    assert.are.equal(0, status, err)
  end)

  it("gives the same bits and loses no byte", function()
    local program = compile "engine_stress"
    local status, out, err = sys.run(program)
    assert.matches("^0 failures in 2400 jobs, 0 bytes alive", out, nil, nil, err)
    assert.are.equal(0, status, err)
    if FLAGS:find "thread" then
      local raced, _, report = sys.run(program .. " race")
      assert.matches("SUMMARY: ThreadSanitizer: data race .*engine_stress.c:%d+ in race", report)
      assert.are_not.equal(0, raced)
    end
  end)
end)
