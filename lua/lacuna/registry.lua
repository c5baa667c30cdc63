--- Named things that scripts can add to: attention variants, and whatever else is chosen by name.
--
-- A registry maps a name to a value with a one-line description, refuses duplicates, and answers a wrong name
-- with the nearest right one and the whole list, so that a sweep over names fails with a sentence. It exists
-- once so that every "unknown variant" reads the same. A research script adds its own variant with
-- lac.attention.variants:add("mine", { doc = "...", build = function(options) ... end }) and it is then as
-- good as the built-in ones; :replace does so again, for a cell or a session in which it is being written.
-- Rejected: discovery by scanning a directory, which makes the set of names depend
-- on the working directory.

local schema = require "lacuna.schema"
local class = require "lacuna.class"

local Registry = class("Registry", nil, true)
schema.refuse_new_fields(Registry, function(_, name)
  return ("; r:add('%s', { ... }), or r:replace"):format(tostring(name))
end)

--- @tparam string op the name that starts error messages ("attention")
-- @tparam string what what an entry is called in messages ("variant")
-- @tparam[opt] table fields of an entry by name, rules of schema: what an entry may and must have
function Registry:init(op, what, fields)
  self.op, self.what, self.fields, self.entries = op, what, fields or false, {}
  schema.complete(self)
end

--- Add an entry. Raises if the name is taken or not a string.
function Registry:add(name, value)
  if self.entries[name] ~= nil then
    schema.fail(self.op, "%s '%s' is already registered; :replace puts another in its place", self.what, name)
  end
  return self:replace(name, value)
end

--- Add an entry, also under a name that is taken. What was made from the old entry keeps
-- it; a copy of that is made from the new one.
function Registry:replace(name, value)
  if type(name) ~= "string" or name == "" then
    schema.fail(self.op, "the name of a %s must be a nonempty string, got %s", self.what, schema.show(name))
  end
  if value == nil then schema.fail(self.op, "%s '%s' needs a value, got nil", self.what, name) end
  if self.fields then schema.options(("%s: %s '%s'"):format(self.op, self.what, name), value, self.fields) end
  self.entries[name] = value
  return value
end

--- Look a name up. Raises with the nearest name and the list of valid ones.
function Registry:get(name)
  local value = type(name) == "string" and self.entries[name]
  if not value then
    local names = self:names()
    schema.unknown(self.op, self.what, name, names)
  end
  return value
end

--- All names, sorted.
function Registry:names() return schema.keys(self.entries) end

function Registry:__tostring()
  return ("Registry of %ss: %s"):format(self.what, table.concat(self:names(), ", "))
end

return Registry
