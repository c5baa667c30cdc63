--- read.lua: what a file holds, byte for byte, for specs; an error with the reason if it cannot be read.
-- @tparam string path
-- @treturn string
return function(path)
  local file = assert(io.open(path, "rb"))
  local text = assert(file:read("*a"))
  file:close()
  return text
end
