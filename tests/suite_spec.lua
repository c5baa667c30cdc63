--- The script that runs the suite (tests/support/suite.sh), on a tree with four small specs; coverage's hook.
--
-- What is pinned down is that a green run has run every file: beside another run in the same tree, after one
-- that was ended by a signal, and not if a process leaves before it has run what it claimed.

local sys = require "lacuna.sys"

describe("the suite's script", function()
  local tree = os.tmpname()
  os.remove(tree)
  local here = assert(sys.run "pwd") == 0 and select(2, sys.run "pwd"):match "^[^\n]+"

  local function write(path, text)
    local file = assert(io.open(tree .. "/" .. path, "w"))
    assert(file:write(text))
    assert(file:close())
  end

  local function suite(environment, more)
    return ("cd %s && ALONE=d JOBS=2 %s tests/support/suite.sh out %s"):format(tree, environment or "",
      more or "")
  end

  setup(function()
    local status, _, err = sys.run(("mkdir -p %s/tests && cd %s && ln -s %s/lua lua && ln -s %s/build build "
      .. "&& ln -s %s/tests/support tests/support && ln -s %s/.busted .busted"):format(tree, tree, here, here,
      here, here))
    assert.are.equal(0, status, err)
    for _, name in ipairs { "a", "b", "c", "d" } do
      write("tests/" .. name .. "_spec.lua", 'it("passes", function() end)\n')
    end
    write("tests/b_spec.lua", [[
      it("waits, or leaves, if it is asked to", function()
        if os.getenv "LEAVE" then print "\n3 passed, 0 failed, 0 skipped" io.flush() os.exit(0) end
        if os.getenv "WAIT" then os.execute "echo $PPID >waits; exec sleep 60" end
      end)]])
  end)
  teardown(function() sys.run("rm -rf " .. sys.quote(tree)) end)

  it("runs every file once, beside another run too", function()
    local status, out = sys.run(("(%s) >%s/other & (%s) && wait $! && cat %s/other"):format(suite(), tree,
      suite(), tree))
    assert.are.equal(0, status, out)
    local _, runs = out:gsub("\n4 passed, 0 failed, 0 skipped\n", "")
    assert.are.equal(2, runs, out)
    assert.matches("\n4 passed, 0 failed, 0 skipped\n$", out)
  end)

  it("refuses a number of processes that would run nothing", function()
    for _, jobs in ipairs { "0", "-1", "x", "1.5" } do
      local status, _, err = sys.run(suite("JOBS=" .. jobs))
      assert.are.equal(2, status)
      local wanted = ("JOBS must be a number of processes, 1 or more, got '%s'"):format(jobs)
      assert.is_truthy(err:find(wanted, 1, true), err)
    end
  end)

  it("fails if a process leaves before its file has ended, whatever it says", function()
    local status, out = sys.run(suite("LEAVE=1", "2>&1"))
    assert.are.equal(1, status, out)
    assert.matches("\n< b_spec.lua\n", out)
    assert.matches("\n%d passed, 1 failed, 0 skipped\n$", out)
  end)

  it("ends what it started when it is ended, and the next run is whole", function()
    local status, out, err = sys.run(([=[cd %s && rm -f waits
      (ALONE=d JOBS=2 WAIT=1 exec tests/support/suite.sh out) >ended 2>&1 & script=$!
      for i in $(seq 300); do [ -s waits ] && break; sleep 0.1; done
      kill -TERM $script; wait $script; echo "status $?"
      for i in $(seq 100); do # gone, or dead and not yet asked for by its new parent
        state=$(sed -n 's/^State:.\([A-Z]\).*/\1/p' /proc/$(cat waits)/status 2>/dev/null)
        [ "${state:-Z}" = Z ] && break; sleep 0.1
      done
      [ "${state:-Z}" = Z ]]=]):format(tree))
    assert.are.equal(0, status, err)
    assert.are.equal("status 143\n", out)
    status, out = sys.run(suite("", "2>&1"))
    assert.are.equal(0, status, out)
    assert.matches("\n4 passed, 0 failed, 0 skipped\n$", out)
  end)
end)

describe("coverage's line hook", function()
  it("has room for any number of texts, and ends the process that has too many files", function()
    local dir = sys.temporary "-hook"
    assert(sys.mkdir(dir))
    local status, _, err = sys.run("cc -shared -std=c11 -fPIC -Wall -Wextra -Werror "
      .. "$(pkg-config --cflags luajit) tests/support/coverage.c -o " .. sys.quote(dir .. "/hook.so"))
    assert.are.equal(0, status, err)
    local function chunks(names)
      return sys.run(([[LACUNA_COVERAGE=%s LUA_INIT=@tests/support/coverage.lua timeout 60 luajit -e '
        kept = {}
        for i = 1, 5000 do
          kept[i] = "return " .. i
          assert(assert(loadstring(kept[i], %s))() == i)
        end
        package.path = "lua/?.lua;lua/?/init.lua;" .. package.path
        require "lacuna.synonyms"']]):format(sys.quote(dir), names))
    end
    status, _, err = chunks "kept[i]"
    assert.are.equal(0, status, err)
    local _, lines = sys.run("cat " .. sys.quote(dir) .. "/*.lines")
    assert.matches("lua/lacuna/synonyms.lua:%d+\n", lines)
    status, _, err = chunks '"@" .. kept[i]'
    sys.run("rm -r " .. sys.quote(dir))
    assert.are_not.equal(0, status)
    assert.matches("more than 4096 names of files", err)
  end)
end)
