--- config.lua: configurations as values: validated, with defaults filled in, printable, comparable, saved as
-- JSON.
--
-- lac.config.attention{ ... }, multihead, language_model, encoder, encoder_decoder, ring, sparse, distributed
-- and pool check a table by the rules of whoever reads it (the owner registers its rules here, so that there
-- is one set of them) and return a table of the same fields that prints itself in a fixed order, equals
-- another with the same content, and makes a changed copy with `with`, which is checked again. Everything
-- that takes options takes such an object too; modules keep theirs in `options`, which is what a checkpoint
-- stores. Being a plain table underneath is the point: schema, json and pairs need no special case.
--
-- Rejected: a class per kind with getters (the schema says already what there is), and freezing (a Lua table
-- that refuses writes is not seen by pairs; `with` copies, nothing here writes; a new field is refused). An
-- object that was made of a configuration finds out at its next use that somebody has written to it.

local schema = require "lacuna.schema"

local Config = { __name = "Config" }
local kinds = {} -- kind -> function(options) -> validated table
local derived = {} -- kind -> { field = function(options) -> its default } where that depends on other fields
local config = {}

local function same(a, b)
  if type(a) ~= "table" or type(b) ~= "table" then return a == b end
  if rawequal(a, b) then return true end
  for key, value in pairs(a) do
    if not same(value, b[key]) then return false end
  end
  for key in pairs(b) do
    if a[key] == nil then return false end
  end
  return true
end

local function text_of(value)
  local mt = getmetatable(value)
  if type(value) ~= "table" or (mt and mt ~= Config) then return schema.show(value) end
  local parts = {}
  for i = 1, #value do parts[i] = text_of(value[i]) end
  for _, key in ipairs(schema.keys(value)) do parts[#parts + 1] = key .. " = " .. text_of(value[key]) end
  return "{" .. table.concat(parts, ", ") .. "}"
end

local kind_of = setmetatable({}, { __mode = "k" }) -- beside the object: a field would be an unknown option

--- Fields by name; `kind` and `with` are methods.
Config.__index = {
  --- Which configuration this is: "attention", "ring", ...
  kind = function(self) return kind_of[self] end,
  --- A changed copy, checked like a new one. A field that is what other fields make it by default (kv_heads =
  -- heads) follows them. @tparam table changes fields; false removes one that is set and optional
  with = function(self, changes)
    schema.check("config", "changes", changes, { type = "table" })
    local copy = {}
    for key, value in pairs(self) do copy[key] = value end
    -- kv_heads = heads, left out, is to follow heads
    for key, default in pairs(derived[kind_of[self]]) do
      if self[key] == default(self) then copy[key] = nil end
    end
    for key, value in pairs(changes) do
      local removed = value == false and self[key] ~= nil and type(self[key]) ~= "boolean"
      if removed then copy[key] = nil else copy[key] = value end
    end
    return config[kind_of[self]](copy)
  end,
}
function Config.__eq(a, b) return kind_of[a] == kind_of[b] and same(a, b) end
function Config.__newindex(self, key)
  schema.fail("config", "%s has no field '%s' to set; make another: c:with{ %s = ... }", kind_of[self],
    tostring(key), tostring(key))
end
function Config.__tostring(self) return kind_of[self] .. text_of(self) end

--- Make validated options a configuration; for the owner of a kind.
-- @tparam string kind @tparam table options checked, with defaults
function config.wrap(kind, options)
  local object = setmetatable({}, Config)
  for key, value in pairs(options) do rawset(object, key, value) end
  kind_of[object] = kind
  return object
end

--- Register a kind: config[kind](options) then validates and wraps.
-- @tparam string kind @tparam function validate takes a table, returns the complete one or raises
-- @tparam[opt] table follows { field = function(options) -> its default } where that depends on other fields
function config.define(kind, validate, follows)
  kinds[kind], derived[kind] = validate, follows or {}
  --- Options, checked and completed, as a value: it prints itself, equals another of the same content, and
  -- :with{ option = value } makes a changed copy. Whatever takes these options takes it: lac.attention
  -- (attention, and what ring, distributed and sparse ones have of their own), MultiheadDilatedAttention
  -- (multihead), LongNetLM (language_model), LongNetEncoder (encoder), LongNetEncoderDecoder
  -- (encoder_decoder), memory_limit (pool).
  config[kind] = function(options) return config.wrap(kind, validate(options)) end
end

-- ---- tables that belong to an object ----------------------------------------------------------------------

-- table -> op, what, remedy of messages, and lists of what it held: holders (itself and the lists in it),
-- keys, values, the field of each
local settled = setmetatable({}, { __mode = "k" })

local function note(record, holder, key, field)
  local value, n = rawget(holder, key), #record.keys + 1
  if value == nil then value = false end -- behind the end of a list
  record.holders[n], record.keys[n], record.values[n], record.fields[n] = holder, key, value, field
  if type(value) == "table" and getmetatable(value) == nil then
    for inner in pairs(value) do note(record, value, inner, field) end
    if #value > 0 then note(record, value, #value + 1, field) end
  end
end

local Settled = {}
function Settled.__newindex(t, key)
  local r = settled[t]
  schema.fail(r.op, "there is no %s.%s to set; make another: %s", r.what, tostring(key),
    r.remedy:format(tostring(key) .. " = ..."))
end

--- Remember what a table holds with which an object was made. Somebody may write into it, as a plain table is
-- not told of fields that it has; config.expect_settled says so at the object's next use, where the write
-- would change nothing.
-- @tparam string op what starts messages @tparam string what the table is called
-- @tparam table t plain, or a configuration
-- @tparam string remedy what makes the object anew, "%s" for the change
-- @treturn table t
function config.settle(op, what, t, remedy)
  schema.check("config.settle", "t", t == nil and false or t, { type = "table" })
  local record = { op = op, what = what, remedy = remedy, holders = {}, keys = {}, values = {}, fields = {} }
  for _, name in ipairs(schema.keys(t)) do note(record, t, name, name) end
  settled[t] = record
  return getmetatable(t) and t or setmetatable(t, Settled)
end

--- Raise an error if a table of config.settle is not what it was. Compiled: every call of an attention asks.
-- @tparam table t others are not looked at
function config.expect_settled(t)
  local record = settled[t]
  if not record then return end
  local holders, keys, values = record.holders, record.keys, record.values
  for i = 1, #holders do
    if not rawequal(rawget(holders[i], keys[i]) or false, values[i]) then
      local name = record.fields[i]
      local value = text_of(rawget(t, name))
      schema.fail(record.op, "%s.%s was set to %s after it was made, which would change nothing; make "
        .. "another: %s", record.what, name, value, record.remedy:format(name .. " = " .. value))
    end
  end
end

--- Is this a configuration (of this kind)?
function config.is(value, kind)
  return type(value) == "table" and getmetatable(value) == Config and (kind == nil or kind_of[value] == kind)
end

return setmetatable(config, { __index = function(_, name)
  schema.fail("config", "there is no lac.config.%s%s", tostring(name), schema.hint(name, schema.keys(kinds)))
end })
