--- The option cu_seqlens: where packed sequences begin, S + 1 rising numbers from 0 to the number of rows.
--
-- A list or an integer tensor. The engine reads it on the host, because it decides what is run; a tensor on a
-- device is copied, which waits for the device: who packs batches knows their lengths and gives a list.

local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local lib = require "lacuna.lib"

local ffi = lib.ffi
local INTEGER = { i64 = true, i32 = true }
local packed = {}

--- How the option is checked; it belongs to a call, like tensors.
packed.option = { of_a_call = true, check = function(value)
  if tensor.is(value) then
    if value.c.ndim ~= 1 or not INTEGER[value:dtype()] or value.c.shape[0] < 2 then
      return "must be i64 or i32 [sequences + 1]"
    end
    return nil
  end
  if type(value) ~= "table" or #value < 2 then
    return "must be a list of at least two numbers, or a tensor"
  end
  for _, x in ipairs(value) do
    if not schema.is_integer(x) then return "must be a list of integers" end
  end
end }

--- @treturn cdata int64_t[S + 1] @treturn integer S
function packed.starts(value)
  local list = tensor.is(value) and value:totable() or value
  return ffi.new("int64_t[?]", #list, list), #list - 1
end

return packed
