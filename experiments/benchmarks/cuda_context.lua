--- cuda_context.lua: the longest sequence on which LongNet-125M trains on one GPU.
--
-- The model of cuda_step with activation checkpointing: blocks keep their input only. One step (forward,
-- backward, AdamW with f32 masters) of one sequence in bf16, for growing lengths until the pool has no room;
-- peak memory by the pool's count, parameters and moments included. Positions are RoPE: XPOS multiplies by
-- powers of the position that leave the range of f32 past some 70,000 tokens.

local lac = require "lacuna"
local sys = require "lacuna.sys"

local TARGET = 2 ^ 21

-- one training step on n tokens: loss, seconds, bytes at the peak
local function step(b, n)
  local model = lac.nn.LongNetLM(b:size({ size = "125M", context = n, dtype = "bf16", positions = "rope",
    checkpoint_activations = true }, { vocab = 64, layers = 2, width = 48, heads = 6, context = n,
    segments = { 16, 64 }, dilations = { 1, 3 }, positions = "rope", checkpoint_activations = true }))
  local optimizer = lac.optim.adamw(lac.optim.groups(model, { weight_decay = 0.01 }),
    { lr = 6e-4, betas = { 0.9, 0.98 }, master = b:size(true, false) })
  local tokens = lac.randint{ 1, n + 1, high = model.vocab }
  local x = tokens[{ {}, { 1, n } }]:contiguous()
  local y = tokens[{ {}, { 2, n + 1 } }]:contiguous()
  collectgarbage()
  collectgarbage()
  lac.synchronize()
  lac.reset_peak()
  local start = sys.time()
  local loss = model:loss(x, y)
  loss:backward()
  optimizer:step()
  optimizer:zero_grad{ release = true }
  local value = loss:item()
  return value, sys.time() - start, lac.memory(lac.default_device()).peak
end

return {
  name = "cuda_context",
  about = "the longest training step of LongNet-125M on one GPU, activation checkpointing, bf16",
  device = "cuda",
  once = true,
  run = function(b)
    local longest = 0
    for _, n in ipairs(b:size({ 2 ^ 20, TARGET, 1.25 * TARGET, 1.5 * TARGET }, { 64, 128 })) do
      local ok, loss, seconds, peak = pcall(lac.scope, step, b, n)
      local what = ("step of %d tokens"):format(n)
      if ok and (loss ~= loss or loss > 100) then ok, loss = false, ("the loss is %g"):format(loss) end
      if not ok then
        b:value{ what = what, problem = tostring(loss):match("[^\n]*") }
        break
      end
      longest = n
      b:value{ what = ("%s: %.1f s, loss %.3f, peak"):format(what, seconds, loss), value = peak / 2 ^ 30,
        unit = "GiB" }
      lac.trim()
    end
    b:value{ what = "longest", value = longest / 2 ^ 20, unit = "Mi tokens", at_least = TARGET / 2 ^ 20 }
  end,
}
