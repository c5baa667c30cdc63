--- nn/losses.lua: losses as modules, for scripts that choose one by name.
--
-- Each keeps the options of its function and passes them on: nn.CrossEntropyLoss{label_smoothing = 0.1}(x, t)
-- is lac.cross_entropy(x, t, {label_smoothing = 0.1}). Option names and the reduction are checked when the
-- module is made, other values by the function, at the first call, against the tensors they belong to.
-- Rejected: state (running class weights and the like): a loss with parameters is a module of its own.

local schema = require "lacuna.schema"
local ops = require("lacuna.ops").fn
local base = require "lacuna.nn.module"

local ANY = { type = "any" }
local REDUCTIONS = { "mean", "sum", "none" }

local function loss(name, f_name, names)
  local Loss, spec, f = base.define(name), {}, ops[f_name]
  for option in names:gmatch("%S+") do spec[option] = ANY end
  spec.reduction = { one_of = name == "KLDivLoss" and { "batchmean", unpack(REDUCTIONS) } or REDUCTIONS }
  Loss.__about = { "(options)", ("lac.%s as a module, loss(x, target); options %s."):format(
    f_name, table.concat(schema.keys(spec), ", ")) }
  function Loss:init(options) self.options = schema.options(name, options, spec) end
  function Loss:forward(x, target) return f(x, target, self.options) end
  function Loss:extra()
    local parts = {}
    for _, option in ipairs(schema.keys(self.options)) do
      local v = self.options[option]
      parts[#parts + 1] = option .. " " .. (type(v) == "string" and v or schema.show(v))
    end
    return table.concat(parts, ", ")
  end
  return Loss
end

return {
  CrossEntropyLoss = loss("CrossEntropyLoss", "cross_entropy",
    "ignore_index weight label_smoothing reduction"),
  NLLLoss = loss("NLLLoss", "nll_loss", "ignore_index weight reduction"),
  MSELoss = loss("MSELoss", "mse_loss", "reduction"),
  L1Loss = loss("L1Loss", "l1_loss", "reduction"),
  HuberLoss = loss("HuberLoss", "huber_loss", "delta reduction"),
  SmoothL1Loss = loss("SmoothL1Loss", "smooth_l1_loss", "beta reduction"),
  KLDivLoss = loss("KLDivLoss", "kl_div", "log_target reduction"),
  BCEWithLogitsLoss = loss("BCEWithLogitsLoss", "binary_cross_entropy_with_logits",
                           "pos_weight weight reduction"),
}
