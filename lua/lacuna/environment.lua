--- A misspelt variable of the environment is said, once, on standard error.
--
-- A wrong value of LACUNA_DEVICE, LACUNA_CPU or LACUNA_MEMORY is an error where it is read. A wrong name is
-- read nowhere, so it is looked for when the library is loaded: a variable LACUNA_x that nothing reads and
-- whose x is near to the name of one that something does. Rejected: an error, because a script may have
-- variables of its own that begin so, and a list that a program could add to (an import would come too late).

local schema = require "lacuna.schema"

local environment = {}

-- what a user sets, and what the benchmarks and the suite read
local SETTINGS = { "CPU", "CUDA_LAUNCHER", "CUDA_SYNC", "DEVICE", "HISTORY", "LIBRARY", "LUA", "MEMORY",
  "PEER", "TRACE" }
local OTHERS = { "CHILDREN", "COMMAND", "COVERAGE", "FAKE", "FRESH", "FUZZ", "FUZZ_SEED", "GPU", "KILLS",
  "SEED", "SLOWNESS", "STRESS_FLAGS" }

local known = {}
for _, list in ipairs { SETTINGS, OTHERS } do
  for _, name in ipairs(list) do known[name] = true end
end

--- Complaints about an environment.
-- @tparam string text NAME=value, each ended by a zero byte, as /proc/self/environ has them
-- @treturn table list of sentences
function environment.complaints(text)
  local list = {}
  for name, value in text:gmatch "LACUNA_([%w_]+)=(%Z*)" do
    local hint = not known[name] and schema.hint(name, SETTINGS, "LACUNA_%s") or ""
    if hint ~= "" then
      list[#list + 1] = ("nothing reads LACUNA_%s%s"):format(name, hint)
    elseif name == "TRACE" and not value:match "^[01]?$" then
      list[#list + 1] = ("LACUNA_TRACE is 1 or 0, '%s' is ignored"):format(value)
    end
  end
  table.sort(list)
  return list
end

--- Say what is wrong with the environment of this process; on systems without /proc nothing is.
function environment.check()
  local file = io.open("/proc/self/environ", "rb")
  if not file then return end
  local text = file:read "*a"
  file:close()
  for _, complaint in ipairs(environment.complaints(text)) do io.stderr:write("lacuna: ", complaint, "\n") end
end

return environment
