--- nn/conv.lua: the convolution as a module.
--
-- Conv1d holds w [O, C / groups, K] and a bias, and applies lac.conv1d. It starts as Linear does, normal
-- with std = gain sqrt(2 / (fan in + fan out)), where the fans count the kernel's positions: the same rule,
-- so that a kernel of one position is a Linear. Rejected: torch's uniform default (see layers.lua).

local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require("lacuna.ops").fn
local base = require "lacuna.nn.module"

local fail, show = schema.fail, schema.show

local Conv1d = base.define("Conv1d", nil, "inputs outputs kernel has_bias")

local POSITIVE = { type = "integer", min = 1 }
local CONV = {
  stride = { type = "integer", min = 1, default = 1 }, dilation = { type = "integer", min = 1, default = 1 },
  groups = { type = "integer", min = 1, default = 1 },
  padding = { type = { "integer", "integers", "string" }, default = 0 },
  bias = { type = "boolean", default = true }, gain = { type = "number", min = 0, default = 1 },
  dtype = { type = "string" }, device = { type = "string" },
}

--- A convolution over the last dimension of [B, inputs, N].
-- @tparam integer inputs channels
-- @tparam integer outputs channels
-- @tparam integer kernel positions
-- @tparam[opt] table options stride, dilation, groups, padding (as lac.conv1d), bias = true, gain = 1, dtype,
--   device
function Conv1d:init(inputs, outputs, kernel, options)
  schema.check("Conv1d", "inputs", inputs, POSITIVE)
  schema.check("Conv1d", "outputs", outputs, POSITIVE)
  schema.check("Conv1d", "kernel", kernel, POSITIVE)
  local o = schema.options("Conv1d", options, CONV)
  if inputs % o.groups ~= 0 or outputs % o.groups ~= 0 then
    fail("Conv1d", "groups %d must divide inputs %d and outputs %d", o.groups, inputs, outputs)
  end
  self.inputs, self.outputs, self.kernel = inputs, outputs, kernel
  self.options = { stride = o.stride, dilation = o.dilation, groups = o.groups, padding = o.padding }
  local std = o.gain * math.sqrt(2 / ((inputs + outputs) / o.groups * kernel))
  self:param("weight", create.randn({ outputs, inputs / o.groups, kernel },
    { std = std, dtype = o.dtype, device = o.device }), "weight")
  self.has_bias = o.bias
  if o.bias then
    self:param("bias", create.zeros({ outputs }, { dtype = o.dtype, device = o.device }), "bias")
  end
end

--- @tparam Tensor x [B, inputs, N]
-- @treturn Tensor [B, outputs, L]
function Conv1d:forward(x)
  tensor.expect("conv1d", "the input", x)
  if x:dim() ~= 3 or x:size(2) ~= self.inputs then
    fail("conv1d", "the input must be [B, %d, N], got %s", self.inputs, show(x))
  end
  return ops.conv1d(x, self.weight, self.has_bias and self.bias or nil, self.options)
end

function Conv1d:extra()
  local text, o = ("%d -> %d, kernel %d"):format(self.inputs, self.outputs, self.kernel), self.options
  for _, name in ipairs { "stride", "dilation", "groups" } do
    if o[name] ~= 1 then text = ("%s, %s %d"):format(text, name, o[name]) end
  end
  if o.padding ~= 0 then
    local p = o.padding
    text = text .. ", padding " .. (type(p) == "table" and ("{%d, %d}"):format(p[1], p[2]) or tostring(p))
  end
  return text .. (self.has_bias and "" or ", no bias")
end

return { Conv1d = Conv1d }
