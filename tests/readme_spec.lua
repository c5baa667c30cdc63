-- readme_spec.lua: the README is true.
--
-- Every ```lua block of the README is run as a script by the real command, in a scratch directory; every path
-- that the map of the house names must exist; every `make` target that it mentions must be a target. The two
-- commands themselves (make demo, make test) are not run from inside the test suite, which one of them is.

local posix = require "posix"
local read = require "support.read"
local COMMAND = os.getenv("LACUNA_COMMAND") or "build/bin/lacuna"

local function blocks(text, language)
  local found = {}
  for body in ("\n" .. text):gmatch("\n```" .. language .. "\n(.-)\n```") do found[#found + 1] = body end
  return found
end

describe("README", function()
  local readme = read("README.md")
  local root = posix.getcwd()

  for i, code in ipairs(blocks(readme, "lua")) do
    it("has a runnable Lua snippet " .. i, function()
      local dir = os.tmpname()
      os.remove(dir)
      assert(posix.mkdir(dir))
      local f = assert(io.open(dir .. "/snippet.lua", "w"))
      f:write(code, "\n")
      f:close()
      local run = "cd %s && LACUNA_LUA=%s/lua %s/%s snippet.lua 2>&1; echo status $?"
      local pipe = io.popen(run:format(dir, root, root, COMMAND))
      local output = pipe:read("*a")
      pipe:close()
      os.execute("rm -r " .. dir)
      assert.matches("status 0%s*$", output, nil, nil, output)
    end)
  end

  it("has at least the snippets that it promises", function()
    assert.is_true(#blocks(readme, "lua") >= 4)
  end)

  it("mentions only make targets that exist", function()
    local makefile = read("Makefile")
    local count = 0
    for target in readme:gmatch("make ([a-z][a-z-]*)") do
      assert.matches("\n" .. target:gsub("%-", "%%-") .. ":", makefile, nil, nil, "make " .. target)
      count = count + 1
    end
    assert.is_true(count >= 2)
  end)

  it("names only files that exist", function()
    local count = 0
    for path in readme:gmatch("[`(]([%w_]+/[%w_./]*)[`)]") do
      if not path:match("^build/") and not path:match("^runs/") then
        count = count + 1
        assert.is_truthy(posix.stat(path), path)
      end
    end
    assert.is_true(count >= 15, "only " .. count .. " paths")
  end)

  it("names the version of the engine", function()
    local version = read("c/lacuna.h"):match('LAC_VERSION "(.-)"')
    local pipe = io.popen(COMMAND .. " --version")
    assert.matches(version, pipe:read("*a"), 1, true)
    pipe:close()
  end)

  local function walk(name)
    local pipe = io.popen(COMMAND .. " notebooks/" .. name .. " 2>&1; echo status $?")
    local output = pipe:read("*a")
    pipe:close()
    assert.matches("status 0%s*$", output, nil, nil, output)
    return output
  end

  it("agrees with a walk through notebooks/first_steps.lua", function()
    local output = walk "first_steps.lua"
    assert.matches("module form differ by%s+0%s", output)
    assert.matches("did you mean", output)
  end)

  it("agrees with a walk through notebooks/patterns.lua", function()
    local output = walk "patterns.lua"
    assert.matches("\n####%.%.%.%.%.%.%.%.%.%.%.%.\n#%.###", output)
    assert.is_true(tonumber(output:match "over 4 ranks it differs by%s+(%S+)") < 1e-5)
    local losses = output:match "guessing is.*"
    local function loss(name) return tonumber(losses:match("\n" .. name .. "%s+(%d%S*)")) end
    assert.is_true(loss "scales" < 0.5 and loss "dense" < 0.5)
    assert.is_true(loss "window" > 1.5)
    local function mass(name) return tonumber(output:match("\n" .. name .. "[^\n]*coverage (%S+)\n")) end
    assert.is_true(mass "log_sparse" > mass "random")
  end)

  it("names every notebook", function()
    for _, file in ipairs(posix.dir("notebooks")) do
      if file:match "%.lua$" then assert.matches("notebooks/" .. file, readme, 1, true) end
    end
  end)
end)
