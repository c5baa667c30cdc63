-- output.lua: busted's plain terminal output plus a closing line that people and CI can read.
--
-- busted ends with "N successes / N failures / N errors / N pending"; a script that wants to know what
-- happened has to parse four words in a sentence. This handler adds one plain line, `N passed, N failed,
-- N skipped`, after everything else, and the slowest spec files, so that a suite that grows slow says where.

local plain = require "busted.outputHandlers.plainTerminal"
local gettimeofday = require("posix.sys.time").gettimeofday
local SHOWN = 5

local function now()
  local t = gettimeofday()
  return t.tv_sec + t.tv_usec * 1e-6
end

return function(options)
  local handler = plain(options)
  local busted = require "busted"
  local started, files = {}, {}

  busted.subscribe({ "file", "start" }, function(element)
    started[element.name] = now()
    return nil, true
  end)
  busted.subscribe({ "file", "end" }, function(element)
    files[#files + 1] = { name = element.name, seconds = now() - (started[element.name] or now()) }
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
