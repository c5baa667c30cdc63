--- step.lua: a training step of the demo's model beside the same step in PyTorch.
--
-- The default model of experiments/language_model.lua, forward, backward, clipping and AdamW, on one fixed
-- batch. Both sides start from the same weights (written to a file that the peer reads), and the section
-- first shows that it is the same computation: loss and gradient norm of the first step, and the loss after
-- it, agree. PyTorch runs the model with the two forms of attention that it has for this on a CPU, see
-- peers/demo_model.py; the target holds against each, so against the faster one. Its batch stays in memory
-- and the tokens are made once, on both sides.

local lac = require "lacuna"
local sys = require "lacuna.sys"

local FULL = { layers = 4, width = 128, heads = 4, context = 256, segments = { 64, 128, 256 },
  dilations = { 1, 2, 4 } }
local QUICK = { layers = 1, width = 16, heads = 4, context = 32, segments = { 8, 16, 32 },
  dilations = { 1, 2, 4 } }
local TOLERANCE = 1e-4 -- relative: f32 sums in another order, through a whole step

local function make(o, batch)
  local model = lac.nn.LongNetLM(o)
  local groups = lac.optim.groups(model, { weight_decay = 0.05 })
  local optimizer = lac.optim.adamw(groups, { lr = 4e-3, betas = { 0.9, 0.98 } })
  local tokens = lac.randint{ batch, o.context + 1, high = 256 }
  local x = tokens[{ {}, { 1, o.context } }]:contiguous()
  local y = tokens[{ {}, { 2, o.context + 1 } }]:contiguous()
  local function step()
    local loss = model:loss(x, y)
    local value = loss:item()
    loss:backward()
    local norm = optimizer:step{ clip = 1 }
    optimizer:zero_grad{ release = true }
    return value, norm
  end
  return { step = step, model = model, decay = groups[1].names, x = x, y = y }
end

local function agree(b, name, ours, theirs)
  local difference = 0
  for key, value in pairs(ours) do
    difference = math.max(difference, math.abs(value - theirs[key]) / math.abs(value))
  end
  b:value{ what = ("  difference of loss and norm from %s"):format(name), value = difference,
    at_most = TOLERANCE }
end

return {
  name = "step",
  about = "a training step of the demo's model (4 layers, width 128, context 256, batch 8)",
  run = function(b)
    local o, batch = b:size(FULL, QUICK), b:size(8, 2)
    local m = make(o, batch)
    local weights, data = sys.temporary("-weights.safetensors"), sys.temporary("-batch.safetensors")
    lac.io.save(weights, m.model:state_dict())
    lac.io.save(data, { tokens = m.x, targets = m.y })
    local loss, norm = m.step()
    local ours = { loss = loss, norm = norm, second_loss = (m.step()) }
    for _, attention in ipairs{ "union", "branches" } do
      b:row{ what = "step, PyTorch's attention by " .. attention, ours = m.step, at_least = 1.2,
        seconds = 6, turns = 5, work = batch * o.context, unit = "tokens/s",
        peer = { script = "demo_model", case = "step", arguments = { weights = weights, batch = data,
          options = o, decay = m.decay, attention = attention } },
        tell = function(theirs) agree(b, attention, ours, theirs) end }
    end
    os.remove(weights)
    os.remove(data)
  end,
}
