--- The option alibi: scores lose slope |p - j|, one slope a head (Press, Smith and Lewis 2022).
--
-- Given as a tensor [H], as a list of H numbers, or as true for the usual slopes (lac.alibi_slopes).
-- Distances are those of positions, whatever the dilation, and count both ways where attention is not causal.
--
-- Tensors made of lists are found again until the collector takes them: copying H numbers to a device costs
-- more than the attention of one token. Slopes have no gradient; who wants to learn them makes a bias of
-- them.

local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local device = require "lacuna.device"
local ops = require "lacuna.ops"
local lib = require "lacuna.lib"

local C = lib.C
local fail = schema.fail

local alibi = {}

--- How the option is checked.
alibi.option = { check = function(value)
  if type(value) == "boolean" or tensor.is(value) then return nil end
  if type(value) ~= "table" then return "must be true, a list of slopes, or a tensor of them" end
  for _, x in ipairs(value) do
    if type(x) ~= "number" or x ~= x or math.abs(x) == math.huge then
      return "must be a list of finite numbers"
    end
  end
end }

local made = setmetatable({}, { __mode = "v" })

--- The slopes as a tensor for queries q.
function alibi.tensor(value, q)
  if tensor.is(value) then
    if value.requires_grad then
      fail("attention", "alibi has no gradient; make a bias of learned slopes")
    end
    return value
  end
  local heads = tonumber(q.c.shape[2])
  local dtype = q.c.dtype == C.LAC_F64 and "f64" or "f32"
  local key = (value == true and heads or table.concat(value, ",")) .. dtype .. q.c.device
  local found = made[key]
  if found and not found:is_released() then return found end -- a scope may have done it
  local options = { dtype = dtype, device = device.name(q.c.device) }
  found = value == true and ops.fn.alibi_slopes(heads, options) or create.tensor(value, options)
  made[key] = found
  return found
end

return alibi
