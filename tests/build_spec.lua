--- The Makefile around the compiler: installing, removing what was installed, a CUDA toolkit that is too old.
--
-- What was built is lent to a build directory of the spec's own and taken as made (make -o), so nothing is
-- compiled here. The directories have a space in their names: a recipe that forgets it installs elsewhere.

local read = require "support.read"
local sys = require "lacuna.sys"

local COMMAND = os.getenv "LACUNA_COMMAND" or "build/bin/lacuna"
local LIBRARY = os.getenv "LACUNA_LIBRARY" or "build/lib/liblacuna.so"

describe("the Makefile", function()
  local dir = sys.temporary("-build")
  local build, target = dir .. "/build", dir .. "/a root"
  local here = select(2, sys.run "pwd"):match "^[^\n]+"

  -- a make of its own, that knows nothing of one which has started the suite
  local function make(arguments)
    return sys.run(("env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL make -s BUILD=%s -o %s/lib/liblacuna.so "
      .. "-o %s/bin/lacuna %s"):format(build, build, build, arguments))
  end

  local function absolute(path) return path:sub(1, 1) == "/" and path or here .. "/" .. path end

  local function listed(path)
    return select(2, sys.run(("cd %s && find . ! -type d | sort"):format(sys.quote(path))))
  end

  setup(function()
    assert(sys.run(("mkdir -p %s/bin %s/lib %s && ln -s %s %s/bin/lacuna && ln -s %s %s/lib/liblacuna.so")
      :format(build, build, sys.quote(target), absolute(COMMAND), build, absolute(LIBRARY), build)) == 0)
  end)
  teardown(function() sys.run("rm -rf " .. sys.quote(dir)) end)

  it("installs under a PREFIX with a space, in place of an older version, and removes what it has put there",
    function()
      local where = ("NVCC= DESTDIR=%s PREFIX=%s"):format(sys.quote(target), sys.quote "/my programs")
      local prefix = target .. "/my programs"
      assert(sys.run(("mkdir -p %s && cd %s && touch lua/gone.lua mine"):format(
        sys.quote(prefix .. "/share/lacuna/lua"), sys.quote(prefix .. "/share/lacuna"))) == 0)

      local status, out, err = make("install " .. where)
      assert.are.equal(0, status, out .. err)
      local _, entries = sys.run("ls " .. sys.quote(target))
      assert.are.equal("my programs\n", entries)
      assert.are.equal(read "lua/lacuna/init.lua", read(prefix .. "/share/lacuna/lua/lacuna/init.lua"))
      assert.is_false(sys.exists(prefix .. "/share/lacuna/lua/gone.lua"))

      -- from elsewhere, by the path alone
      local code = "print(require('lacuna').ones{ 3 }:sum():item())"
      local alone = "cd / && env -u LACUNA_LIBRARY -u LACUNA_LUA -u LUA_PATH -u LUA_INIT %s -e %s"
      status, out, err = sys.run(alone:format(sys.quote(prefix .. "/bin/lacuna"), sys.quote(code)))
      assert.are.equal(0, status, err)
      assert.are.equal("3\n", out)

      status, out, err = make("uninstall " .. where)
      assert.are.equal(0, status, out .. err)
      assert.are.equal("./my programs/share/lacuna/mine\n", listed(target))
    end)

  it("says in one line that nvcc is too old, before it compiles anything", function()
    local nvcc = dir .. "/nvcc"
    for release, complaint in pairs {
      ["release 11.8, V11.8.89"] = "is of CUDA 11.8; the kernels need 12.9 or later",
      ["release 12.8, V12.8.93"] = "is of CUDA 12.8; the kernels need 12.9 or later",
      ["nothing"] = "--version' names no release of CUDA",
      ["release 12.9, V12.9.86"] = false,
      ["release 12.10, V12.10.1"] = false,
      ["release 13.0, V13.0.88"] = false,
    } do
      local file = assert(io.open(nvcc, "w"))
      assert(file:write("#!/bin/sh\n[ \"$*\" = --version ] && echo 'Cuda compilation tools, ", release,
        "' || { echo compiled; exit 1; }\n"))
      assert(file:close())
      assert(sys.run("chmod +x " .. nvcc) == 0)
      local object = build .. "/obj/cuda/norm.o"
      sys.run(("rm -rf %s/obj"):format(build))
      local status, out, err = make(("NVCC=%s CUDA_ARCH=90a %s %s"):format(nvcc, object,
        complaint and build .. "/lib/liblacuna_cuda.so" or ""))
      assert.are.equal(2, status)
      if complaint then
        assert.are.equal(1, select(2, out:gsub("\n", "")), out)
        assert.is_truthy(out:find(complaint, 1, true), out)
      else
        assert.matches("compiled\n$", out, nil, nil, err)
      end
    end
  end)
end)
