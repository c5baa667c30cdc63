--- nn/layers.lua: the small parts that models are made of.
--
-- Linear, Embedding, LayerNorm, RMSNorm, GroupNorm, SwiGLU, Dropout, activations, Sequential and ModuleList.
-- Each is what its formula says and prints as one line. A Linear keeps its weight as [outputs, inputs], the
-- layout that the fused linear-cross-entropy and everybody's checkpoints use; the product reads the
-- transposed view in place.
--
-- Initial values come from the global random stream (lac.manual_seed), in the order in which modules are
-- made. A Linear starts Xavier-normal, std = gain sqrt(2 / (in + out)), bias 0: MAGNETO's rules are then a
-- matter of the gain. `parts` initialises a fused projection slice by slice, because Xavier's rule on a fused
-- [3E, E] matrix gives a deviation that is too small by sqrt(2). Rejected: torch's uniform default (an
-- accident of history, tied to no rule).

local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require("lacuna.ops").fn
local base = require "lacuna.nn.module"

local fail, show = schema.fail, schema.show

local POSITIVE = { type = "integer", min = 1 }

local function check_width(op, x, width, what)
  tensor.expect(op, "the input", x)
  if x:dim() < 1 or x:size(-1) ~= width then
    fail(op, "the input %s must have %s %d in its last dimension", show(x), what, width)
  end
end

-- ---- Linear -----------------------------------------------------------------------------------------------

local Linear = base.define("Linear", nil, "inputs outputs has_bias")

local LINEAR = {
  bias = { type = "boolean", default = true },
  gain = { type = { "number", "table" }, default = 1 },
  parts = { type = "integers", min = 1 },
  dtype = { type = "string" }, device = { type = "string" },
}

-- Xavier-normal rows: for each part (a slice of the outputs) its own fan-out and gain
local function xavier(inputs, parts, gains, o)
  local rows = {}
  for i, outputs in ipairs(parts) do
    local std = gains[i] * math.sqrt(2 / (inputs + outputs))
    rows[i] = create.randn({ outputs, inputs }, { std = std, dtype = o.dtype, device = o.device })
  end
  return #rows == 1 and rows[1] or ops.cat(rows, 1)
end

--- y = x W^T + b.
-- @tparam integer inputs
-- @tparam integer outputs
-- @tparam[opt] table options bias = true; gain = 1 (of Xavier's deviation; a list with `parts`); parts = {n1,
--   n2, ...} slices of the outputs that are initialised one by one; dtype, device
function Linear:init(inputs, outputs, options)
  schema.check("Linear", "inputs", inputs, POSITIVE)
  schema.check("Linear", "outputs", outputs, POSITIVE)
  local o = schema.options("Linear", options, LINEAR)
  local parts = o.parts or { outputs }
  local gains, total = o.gain, 0
  if type(gains) == "number" then
    gains = {}
    for i = 1, #parts do gains[i] = o.gain end
  end
  if #gains ~= #parts then fail("Linear", "gain and parts must have the same length: %d != %d", #gains,
    #parts) end
  for i, gain in ipairs(gains) do schema.check("Linear", ("gain[%d]"):format(i), gain, { type = "number",
    min = 0 }) end
  for _, n in ipairs(parts) do total = total + n end
  if total ~= outputs then fail("Linear", "parts add up to %d, not to the %d outputs", total, outputs) end
  self.inputs, self.outputs = inputs, outputs
  self:param("weight", xavier(inputs, parts, gains, o), "weight")
  self.has_bias = o.bias
  if o.bias then self:param("bias", create.zeros({ outputs }, { dtype = o.dtype, device = o.device }),
    "bias") end
end

--- @tparam Tensor x [..., inputs]
-- @treturn Tensor [..., outputs]
function Linear:forward(x)
  check_width("linear", x, self.inputs, "size")
  return ops.linear(x, self.weight, self.has_bias and self.bias or nil)
end

function Linear:extra()
  return ("%d -> %d%s"):format(self.inputs, self.outputs, self.has_bias and "" or ", no bias")
end

-- ---- Embedding --------------------------------------------------------------------------------------------

local Embedding = base.define("Embedding", nil, "count width")

--- Rows of a table by index (0-based).
-- @tparam integer count rows
-- @tparam integer width
-- @tparam[opt] table options std = 1 / sqrt(width); dtype, device
function Embedding:init(count, width, options)
  schema.check("Embedding", "count", count, POSITIVE)
  schema.check("Embedding", "width", width, POSITIVE)
  local o = schema.options("Embedding", options, { std = { type = "number", min = 0 },
    dtype = { type = "string" }, device = { type = "string" } })
  self.count, self.width = count, width
  self:param("weight", create.randn({ count, width },
    { std = o.std or 1 / math.sqrt(width), dtype = o.dtype, device = o.device }), "embedding")
end

--- @tparam Tensor index i32 or i64, any shape
-- @treturn Tensor [shape of index ..., width]
function Embedding:forward(index)
  tensor.expect("embedding", "the index", index)
  return ops.embedding(self.weight, index)
end

function Embedding:extra() return ("%d x %d"):format(self.count, self.width) end

-- ---- LayerNorm --------------------------------------------------------------------------------------------

local LayerNorm = base.define("LayerNorm", nil, "width")

--- (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.
-- @tparam integer width
-- @tparam[opt] table options eps = 1e-5; dtype, device
function LayerNorm:init(width, options)
  schema.check("LayerNorm", "width", width, POSITIVE)
  local o = schema.options("LayerNorm", options, { eps = { type = "number", above = 0, default = 1e-5 },
    dtype = { type = "string" }, device = { type = "string" } })
  self.width, self.eps = width, o.eps
  self:param("weight", create.ones({ width }, { dtype = o.dtype, device = o.device }), "norm")
  self:param("bias", create.zeros({ width }, { dtype = o.dtype, device = o.device }), "norm")
end

--- @tparam Tensor x [..., width]
function LayerNorm:forward(x)
  check_width("layernorm", x, self.width, "size")
  return ops.layernorm(x, self.weight, self.bias, self.eps)
end

function LayerNorm:extra() return ("%d, eps %g"):format(self.width, self.eps) end

-- ---- RMSNorm ----------------------------------------------------------------------------------------------

local RMSNorm = base.define("RMSNorm", nil, "width")

--- x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).
-- @tparam integer width
-- @tparam[opt] table options eps = 1e-6; dtype, device
function RMSNorm:init(width, options)
  schema.check("RMSNorm", "width", width, POSITIVE)
  local o = schema.options("RMSNorm", options, { eps = { type = "number", above = 0, default = 1e-6 },
    dtype = { type = "string" }, device = { type = "string" } })
  self.width, self.eps = width, o.eps
  self:param("weight", create.ones({ width }, { dtype = o.dtype, device = o.device }), "norm")
end

--- @tparam Tensor x [..., width]
function RMSNorm:forward(x)
  check_width("rmsnorm", x, self.width, "size")
  return ops.rmsnorm(x, self.weight, self.eps)
end

function RMSNorm:extra() return ("%d, eps %g"):format(self.width, self.eps) end

-- ---- GroupNorm --------------------------------------------------------------------------------------------

local GroupNorm = base.define("GroupNorm", nil, "groups channels")

--- Groups of channels normalised together, over everything that follows them, then weight and bias by channel
-- (Wu and He 2018).
-- @tparam integer groups
-- @tparam integer channels a multiple of groups
-- @tparam[opt] table options eps = 1e-5; dtype, device
function GroupNorm:init(groups, channels, options)
  schema.check("GroupNorm", "groups", groups, POSITIVE)
  schema.check("GroupNorm", "channels", channels, POSITIVE)
  if channels % groups ~= 0 then
    fail("GroupNorm", "%d groups do not divide %d channels", groups, channels)
  end
  local o = schema.options("GroupNorm", options, { eps = { type = "number", above = 0, default = 1e-5 },
    dtype = { type = "string" }, device = { type = "string" } })
  self.groups, self.channels, self.eps = groups, channels, o.eps
  self:param("weight", create.ones({ channels }, { dtype = o.dtype, device = o.device }), "norm")
  self:param("bias", create.zeros({ channels }, { dtype = o.dtype, device = o.device }), "norm")
end

--- @tparam Tensor x [B, channels, ...]
function GroupNorm:forward(x)
  tensor.expect("group_norm", "the input", x)
  if x:dim() < 2 or x:size(2) ~= self.channels then
    fail("group_norm", "the input %s must be [B, %d, ...]", show(x), self.channels)
  end
  return ops.group_norm(x, self.groups, self.weight, self.bias, self.eps)
end

function GroupNorm:extra() return ("%d groups of %d, eps %g"):format(self.groups, self.channels, self.eps) end

-- ---- gated feed-forward -----------------------------------------------------------------------------------

-- down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202); two projections in, so that a
-- checkpoint keeps the usual names and the product is one pass
local function gated(name, op)
  local Gated = base.define(name, nil, "width hidden")

  --- down(activation(gate(x)) up(x)), three Linear; the activation is silu for SwiGLU, gelu for GeGLU
  -- (Shazeer 2020, arXiv 2002.05202).
  -- @tparam integer width of input and output
  -- @tparam integer hidden
  -- @tparam[opt] table options bias = false; dtype, device
  function Gated:init(width, hidden, options)
    schema.check(name, "width", width, POSITIVE)
    schema.check(name, "hidden", hidden, POSITIVE)
    local o = schema.options(name, options, { bias = { type = "boolean", default = false },
      dtype = { type = "string" }, device = { type = "string" } })
    self.width, self.hidden = width, hidden
    self.gate, self.up = Linear(width, hidden, o), Linear(width, hidden, o)
    self.down = Linear(hidden, width, o)
  end

  --- @tparam Tensor x [..., width]
  -- @treturn Tensor [..., width]
  function Gated:forward(x)
    check_width(op, x, self.width, "size")
    return self.down(ops[op](self.gate(x), self.up(x)))
  end

  function Gated:extra() return ("%d -> %d -> %d"):format(self.width, self.hidden, self.width) end
  return Gated
end

-- ---- Dropout, activations ---------------------------------------------------------------------------------

local Dropout = base.define("Dropout")

--- In training, zero each element with probability p and divide the others by 1 - p; in evaluation, nothing.
-- @tparam number p in [0, 1)
function Dropout:init(p)
  schema.check("Dropout", "p", p, { type = "number", min = 0, below = 1 })
  self.p = p
end

function Dropout:forward(x)
  tensor.expect("dropout", "the input", x)
  if not self.training or self.p == 0 then return x end
  return ops.dropout(x, self.p)
end

function Dropout:extra() return ("%g"):format(self.p) end

-- A method of tensors as a module. `rule` (with a name) is that of the one argument which it may take
-- besides: nn.LeakyReLU(0.2), nn.Softmax(2). Anything else is refused, for it would be ignored.
local function activation(name, method, rule)
  local Activation = base.define(name, nil, "value")
  Activation.__about = { rule and "(" .. rule.name .. ")" or "()", ("lac.%s as a module%s."):format(method,
    rule and "; " .. rule.name .. (" (%s, optional) as there"):format(rule.type) or "") }
  function Activation:init(value, ...)
    if value ~= nil and not rule or select("#", ...) > 0 then
      fail(name, "takes %s, got %s%s", rule and "no more than its " .. rule.name or "no options",
        show(rule and (...) or value), name == "GELU" and "; the approximation by tanh is GELUTanh" or "")
    end
    if value ~= nil then schema.check(name, rule.name, value, rule) end
    self.value = value ~= nil and { value } or {}
  end
  function Activation:forward(x)
    tensor.expect(method, "the input", x)
    return x[method](x, self.value[1])
  end
  function Activation:extra() return self.value[1] and ("%g"):format(self.value[1]) or "" end
  return Activation
end

local function number(name) return { name = name, type = "number" } end
local DIM = { name = "dim", type = "integer" }

local Identity = base.define("Identity")
Identity.__about = { "()", "Its input, unchanged: in the place of a module that is left out." }

--- Its input.
function Identity.forward(_, x) return x end

-- ---- containers -------------------------------------------------------------------------------------------

local ModuleList = base.define("ModuleList")

--- A list of modules that is indexed and measured like a Lua list: list[1], #list, list:append(m).
-- @tparam[opt] table modules
function ModuleList:init(modules)
  if modules ~= nil then schema.check("ModuleList", "modules", modules, { type = "table" }) end
  for i, m in ipairs(modules or {}) do
    if not base.is_module(m) then fail("ModuleList", "item %d must be a module, got %s", i, show(m)) end
    rawset(self, i, m)
  end
end

--- Add a module at the end. @treturn ModuleList self
function ModuleList:append(m)
  if not base.is_module(m) then fail("ModuleList", "append takes a module, got %s", show(m)) end
  rawset(self, #self + 1, m)
  if rawget(self, "_label") then self:relabel(self._label) end
  return self
end

function ModuleList:children()
  local list = {}
  for i = 1, #self do list[i] = { i, rawget(self, i) } end
  return list
end

function ModuleList:relabel(name)
  rawset(self, "_label", name)
  for i = 1, #self do rawget(self, i):relabel(("%s[%d]"):format(name, i)) end
end

function ModuleList:extra() return ("%d"):format(#self) end

local Sequential = base.define("Sequential", ModuleList)

--- Modules applied one after the other: nn.Sequential(a, b, c).
function Sequential:init(...)
  local first = ...
  if type(first) == "table" and not base.is_module(first) and base.is_module(first[1]) then
    fail("Sequential", "takes modules one by one: nn.Sequential(a, b), not a list of them")
  end
  for i = 1, select("#", ...) do
    local m = select(i, ...)
    if not base.is_module(m) then fail("Sequential", "item %d must be a module, got %s", i, show(m)) end
  end
  ModuleList.init(self, { ... })
  if #self == 0 then fail("Sequential", "takes one or more modules") end
  for i = 1, #self do rawget(self, i):relabel(("[%d]"):format(i)) end
end

function Sequential:relabel(name) rawset(self, "_label", name) end

function Sequential:forward(x)
  for i = 1, #self do x = rawget(self, i)(x) end
  return x
end

return {
  Linear = Linear, Embedding = Embedding, LayerNorm = LayerNorm, Dropout = Dropout,
  GELU = activation("GELU", "gelu"), ReLU = activation("ReLU", "relu"), SiLU = activation("SiLU", "silu"),
  Tanh = activation("Tanh", "tanh"), Sigmoid = activation("Sigmoid", "sigmoid"),
  Mish = activation("Mish", "mish"), GELUTanh = activation("GELUTanh", "gelu_tanh"),
  LeakyReLU = activation("LeakyReLU", "leaky_relu", number "slope"),
  ELU = activation("ELU", "elu", number "alpha"),
  Softplus = activation("Softplus", "softplus"), Softmax = activation("Softmax", "softmax", DIM),
  LogSoftmax = activation("LogSoftmax", "log_softmax", DIM), Identity = Identity,
  RMSNorm = RMSNorm, GroupNorm = GroupNorm,
  SwiGLU = gated("SwiGLU", "swiglu"), GeGLU = gated("GeGLU", "geglu"),
  ModuleList = ModuleList, Sequential = Sequential,
}
