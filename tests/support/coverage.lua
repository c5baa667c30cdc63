--- coverage.lua: which lines of lua/ ran. Loaded by the busted helper when LACUNA_COVERAGE names a directory.
--
-- A line hook (coverage.c, compiled to hook.so in that directory) notes every line that runs; at the end of
-- the process the list goes to a file of its own there, so that processes need not know of each other.
-- tests/support/coverage_report.lua adds the files up and compares them with the lines that have bytecode.
-- What the specs start with luajit is counted as well, through LUA_INIT, which luajit reads.
--
-- The hook is not called in compiled code, so the JIT is off: specs that assert that something is compiled
-- carry the tag #jit and are left out of this run (they run in every other one). Programs that replace the
-- hook (the session's Ctrl-C does) lose what runs meanwhile.
--
-- Rejected: luacov, which looks the file up by name for each line and needs its own configuration for what is
-- one directory, and a hook in Lua, which asks for a table each time: it counted the same lines of grad_spec,
-- in 44 seconds instead of 1.8.

local directory = os.getenv "LACUNA_COVERAGE"
jit.off()
jit.flush()

local hook = directory .. "/hook.so"
local start = assert(package.loadlib(hook, "coverage_start"))
local write_lines = assert(package.loadlib(hook, "coverage_write"))
start()

local written
local function write()
  if written then return end
  written = true
  local name = os.tmpname()
  os.remove(name)
  local path = directory .. "/" .. name:match "[^/]*$" .. ".lines"
  if not write_lines(path) then io.stderr:write("coverage: cannot write ", path, "\n") end
end

local exit = os.exit
function os.exit(...) -- luacheck: ignore
  write()
  exit(...)
end
AT_END = newproxy(true) -- luacheck: ignore
getmetatable(AT_END).__gc = write -- luacheck: ignore
