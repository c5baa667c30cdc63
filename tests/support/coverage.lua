--- coverage.lua: which lines of lua/ ran. Loaded by the busted helper when LACUNA_COVERAGE names a directory.
--
-- A line hook notes every line that runs; at the end of the process the list goes to a file of its own in
-- that directory, so that processes need not know of each other. tests/support/coverage_report.lua adds the
-- files up and compares them with the lines that have bytecode. What the specs start with luajit is counted
-- as well, through LUA_INIT, which luajit reads.
--
-- The hook is not called in compiled code, so the JIT is off: specs that assert that something is compiled
-- carry the tag #jit and are left out of this run (they run in every other one). Programs that replace the
-- hook (the session's Ctrl-C does) lose what runs meanwhile.
--
-- Rejected: luacov, which does the same at four times the cost per line (it looks the file up by name each
-- time) and needs its own configuration for what is one directory.

local directory = os.getenv "LACUNA_COVERAGE"
jit.off()
jit.flush()

local getinfo = debug.getinfo
local seen, sources = {}, setmetatable({}, { __mode = "k" })
local NONE = {}

local function lines_of(f) -- the table of the file that a function is from
  local source = getinfo(f, "S").source
  local file = source:match "^@(.*)$"
  file = file and file:match "lua/lacuna/.*$"
  if not file then return NONE end
  seen[file] = seen[file] or {}
  return seen[file]
end

debug.sethook(function(_, line)
  local f = getinfo(2, "f").func
  local lines = sources[f]
  if not lines then
    lines = lines_of(f)
    sources[f] = lines
  end
  lines[line] = true
end, "l")

local written
local function write()
  if written then return end
  written = true
  debug.sethook()
  local name = os.tmpname()
  os.remove(name)
  local out = io.open(directory .. "/" .. name:match "[^/]*$" .. ".lines", "w")
  if not out then return end
  for file, lines in pairs(seen) do
    for line in pairs(lines) do out:write(file, ":", line, "\n") end
  end
  out:close()
end

local exit = os.exit
function os.exit(...) -- luacheck: ignore
  write()
  exit(...)
end
AT_END = newproxy(true) -- luacheck: ignore
getmetatable(AT_END).__gc = write -- luacheck: ignore
