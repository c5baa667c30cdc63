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

--- The same as a list of numbers, for who runs the sequences without the engine's front end, and checked as
-- that would.
-- @tparam table run cu_seqlens, key_lengths @tparam Tensor q @tparam Tensor k
function packed.list(run, q, k)
  local value, n = run.cu_seqlens, q:size(2)
  local list = tensor.is(value) and value:totable() or value
  local function fail(...) schema.fail("attention", ...) end
  if q:size(1) ~= 1 then fail("packed sequences lie in one batch item, q has %d", q:size(1)) end
  if n ~= k:size(2) then
    fail("packed sequences need as many keys as queries, got %d != %d", k:size(2), n)
  end
  if run.key_lengths then fail("cu_seqlens does not go with key_lengths (shorten the sequences)") end
  if list[1] ~= 0 or list[#list] ~= n then
    fail("cu_seqlens must run from 0 to the %d rows of q, got %d to %d", n, list[1], list[#list])
  end
  for s = 1, #list - 1 do
    if list[s] > list[s + 1] then
      fail("cu_seqlens must not fall: [%d] is %d, [%d] is %d", s, list[s], s + 1, list[s + 1])
    end
  end
  return list
end

return packed
