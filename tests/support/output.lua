-- output.lua: busted's plain terminal output plus a closing line that people and CI can read.
--
-- busted ends with "N successes / N failures / N errors / N pending"; a script that wants to know what
-- happened has to parse four words in a sentence. This handler adds one plain line, `N passed, N failed,
-- N skipped`, after everything else, and the slowest spec files, so that a suite that grows slow says where.
--
-- It is also the suite's leak check: after every file the pool must hold what it held before, to the block
-- and to the storage header. What a file's own locals hold is let go first, by dropping the functions of
-- its tests, which busted keeps to the end. A file that leaves more behind fails, with what it left; run it
-- alone with LACUNA_MEMORY=trace to see the lines.
--
-- SUITE_CLAIMS names a directory in which processes share the files out among them (suite.sh): each takes the
-- next file that no other has, so that all end within the time of one file, and no list of times is needed.
-- SUITE_RAN names a file that gets the name of each that this process has run to its end.

local plain = require "busted.outputHandlers.plainTerminal"
local EEXIST = require("posix.errno").EEXIST
local mkdir = require("posix.sys.stat").mkdir
local gettimeofday = require("posix.sys.time").gettimeofday
local CLAIMS = os.getenv "SUITE_CLAIMS"
if CLAIMS == "" then CLAIMS = nil end -- this process has what it is given
local RAN = os.getenv "SUITE_RAN"
for _, name in ipairs{ "SUITE_CLAIMS", "SUITE_RAN" } do -- specs that specs start are theirs
  require("posix.stdlib").setenv(name, nil)
end
local SHOWN = 5

local function now()
  local t = gettimeofday()
  return t.tv_sec + t.tv_usec * 1e-6
end

-- drop the closures of a file's tests: they are done, and what their upvalues hold must be free to go
local function let_go(busted, element)
  for _, child in ipairs(busted.children(element)) do
    let_go(busted, child)
    for key, value in pairs(child) do
      if type(value) == "function" or (type(value) == "table" and key ~= "attributes" and key ~= "trace") then
        child[key] = nil
      end
    end
  end
end

local function settled()
  local lib = require "lacuna.lib"
  jit.flush() -- compiled code keeps what was constant in it
  lib.collect()
  lib.collect()
  return lib.memory_stats()
end

-- the complaint about a file that left something in the pool, or nil
local function leak_text(before, after)
  local memory = require "lacuna.memory"
  local text = {}
  for _, field in ipairs{ "live", "live_blocks", "storages" } do
    if after[field] > before[field] then
      text[#text + 1] = ("%s %d -> %d"):format(field, before[field], after[field])
    end
  end
  if #text == 0 then return nil end
  return ("the file leaks: %s after garbage was collected\n%s"):format(table.concat(text, ", "),
    tostring(memory.survivors(before.allocations)))
end

-- is the file this process's to run? A directory can be made once.
local function claimed(name)
  if not CLAIMS then return true end
  local made, why, code = mkdir(CLAIMS .. "/" .. name:match "[^/]*$")
  if not made and code ~= EEXIST then error("cannot claim " .. name .. ": " .. why, 0) end
  return made ~= nil
end

local function note(name)
  if not RAN then return end
  local list = assert(io.open(RAN, "a"))
  assert(list:write(name:match "[^/]*$", "\n"))
  assert(list:close())
end

return function(options)
  local handler = plain(options)
  local busted = require "busted"
  local started, files, pool = {}, {}, {}

  busted.subscribe({ "file", "start" }, function(element)
    if claimed(element.name) then
      pool[element.name] = settled()
      started[element.name] = now()
    else
      local run = element.run -- a table that can be called; busted asks it for traces too
      element.run = setmetatable({ getTrace = run.getTrace }, { __call = function() end })
    end
    return nil, true
  end)
  busted.subscribe({ "file", "end" }, function(element)
    if not started[element.name] then return nil, true end
    files[#files + 1] = { name = element.name, seconds = now() - started[element.name] }
    note(element.name)
    let_go(busted, element)
    local complaint = leak_text(pool[element.name], settled())
    if complaint then error(complaint, 0) end -- busted counts it as an error of the file
    return nil, true
  end)
  busted.subscribe({ "suite", "end" }, function()
    table.sort(files, function(a, b) return a.seconds > b.seconds end)
    io.write("\nslowest files (seconds):")
    for i = 1, math.min(SHOWN, #files) do
      io.write((" %s %.1f"):format(files[i].name:match("[^/]*$"), files[i].seconds))
    end
    local failed = handler.failuresCount + handler.errorsCount
    io.write(("\n%d passed, %d failed, %d skipped\n"):format(handler.successesCount, failed,
      handler.pendingsCount))
    io.flush()
    return nil, true
  end, { priority = 100000 })
  return handler
end
