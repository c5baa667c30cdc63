--- Classes in thirty lines, with errors instead of nil.
--
-- A class is a table that is its own __index; calling it makes an instance and runs `init`. Single
-- inheritance copies nothing: a child's lookups fall through to the parent, so a method added later is seen
-- by all. With `strict`, reading a field that neither the instance nor the class has raises an error with the
-- nearest valid name, which is what finds misspelt options and methods in scripts; classes whose instances
-- are open containers leave it off. Rejected: closures per object (memory, and each one defeats trace
-- sharing) and multiple inheritance (never needed).
--
-- Layer: above lib, below everything else; schema.lua supplies the nearest name and is required lazily,
-- because it sits above this file.

local lib = require "lacuna.lib"
local arguments = require "lacuna.arguments"

local function class_call(cls, ...)
  arguments.for_class(cls, ...)
  local object = setmetatable({}, cls)
  if object.init then object:init(...) end
  return object
end

local function unknown_field(object, key)
  local names = {}
  local cls = getmetatable(object)
  while cls do
    for name in pairs(cls) do
      if type(name) == "string" and name:sub(1, 1) ~= "_" then names[#names + 1] = name end
    end
    cls = rawget(cls, "__parent")
  end
  for _, fields in ipairs { object, rawget(object, "_settled") or {} } do
    for name in pairs(fields) do
      if type(name) == "string" and name ~= "_settled" then names[#names + 1] = name end
    end
  end
  local words = getmetatable(object).__words -- what other libraries call its fields: synonyms.lua
  local word = words and words[key]
  local nearest = not word and lib.nearest and lib.nearest(tostring(key), names)
  lib.fail("%s: there is no field '%s'%s", rawget(getmetatable(object), "__name"), tostring(key),
           word and (", did you mean %s?"):format(word)
           or nearest and (", did you mean '%s'?"):format(nearest) or "")
end

--- Make a class.
-- @tparam string name shown by tostring and in errors
-- @tparam[opt] table parent another class
-- @tparam[opt] boolean strict raise on reading an unknown field
-- @treturn table the class: call it to make an instance; define `init`, methods and metamethods in it
return function(name, parent, strict)
  if type(name) ~= "string" then lib.fail("class: name must be a string, got a %s", type(name)) end
  if parent ~= nil and not (type(parent) == "table" and rawget(parent, "__name")) then
    lib.fail("class: the parent of %s must be a class, got a %s", name, type(parent))
  end
  local cls = { __name = name, __parent = parent }
  if strict then
    cls.__index = function(object, key)
      local value = cls[key]
      if value ~= nil then return value end
      local settled = rawget(object, "_settled") -- schema.settle
      if settled and settled[key] ~= nil then return settled[key] end
      unknown_field(object, key)
    end
  else
    cls.__index = cls
  end
  cls.__newindex = parent and parent.__newindex
  cls.__tostring = parent and parent.__tostring or function() return name end
  local function describe() return "class " .. name end
  return setmetatable(cls, { __index = parent, __call = class_call, __tostring = describe })
end
