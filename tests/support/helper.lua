--- busted helper: makes the FFI itself again, sets paths, loads the library once.
--
-- busted replaces ffi.cdef, ffi.typeof and ffi.metatype by versions that remember results by their first
-- argument and drop the others, so that a file can be loaded again after insulation. That breaks
-- parameterised types (ffi.typeof("double[?]", n), "$" types). The library handles being loaded twice by
-- itself, so the originals are put back: each replacement holds its original as the upvalue "original".
--
-- The library is required here once, before any spec, so that its modules are part of the base environment of
-- all spec files.

local ffi = require "ffi"

for _, name in ipairs { "typeof", "metatype", "cdef" } do
  local f = ffi[name]
  for i = 1, 16 do
    local upvalue, value = debug.getupvalue(f, i)
    if not upvalue then break end
    if upvalue == "original" then
      ffi[name] = value
      break
    end
  end
end

package.path = "lua/?.lua;lua/?/init.lua;tests/?.lua;" .. package.path

require "lacuna"

-- `make tsan` preloads a runtime that sh cannot bear: what the specs start is not instrumented
if os.getenv "LACUNA_CHILDREN" == "plain" then
  local setenv = require("posix.stdlib").setenv
  setenv("LD_PRELOAD", nil)
  setenv("LACUNA_LIBRARY", nil)
end

return true
