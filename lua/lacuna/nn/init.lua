--- nn: modules. Small parts in layers.lua, multi-head dilated attention in attention.lua, the LongNet
-- language model in longnet.lua, encoders in encoder.lua, patterns that are learned in masks.lua, decoding in
-- cache.lua, block_cache.lua, sampling.lua and generate.lua, and what they all are in module.lua.
-- nn.module(name) makes a new kind of module in a script.
--
-- One table of names, no logic: a reader who looks for nn.X finds here which file has it. Reading a name that
-- is not there is an error with the nearest one, since `nn.LayrNorm` would otherwise fail later as a call of
-- nil.

local schema = require "lacuna.schema"
local synonyms = require "lacuna.synonyms"
local base = require "lacuna.nn.module"

local nn = { module = base.define, Module = base.Module, is_module = base.is_module }

for _, file in ipairs{ "layers", "conv", "losses", "cache", "block_cache", "sampling", "attention", "longnet",
  "encoder", "masks", "foreign" } do
  for name, value in pairs(require("lacuna.nn." .. file)) do
    if name ~= "PATTERN" and name ~= "SAMPLING" then nn[name] = value end
  end
end

return setmetatable(nn, { __index = function(_, name)
  schema.fail("nn", "there is no '%s'%s", tostring(name),
    schema.hint(name, schema.keys(nn), nil, synonyms.nn))
end, __newindex = schema.refuse_values "lac.nn" })
