--- cuda_train_spec.lua: the same script trains on the GPU.
--
-- experiments/language_model.lua runs unchanged on both devices from one seed, in f32. Sums are taken in
-- another order there, so the curves part by rounding and no more: every smoothed loss of a thousand steps
-- must agree to 1e-3. A second run on the device must give the first one's log, bit for bit. Tagged #gpu:
-- `make test-gpu` runs it, `make test` counts it as skipped.

local it = os.getenv "LACUNA_GPU" == "1" and it or pending

local runlog = require "lacuna.log"
local sys = require "lacuna.sys"

local function train(folder, device, options)
  local status, _, err = sys.run(([[LUA_PATH="lua/?.lua;lua/?/init.lua;$LUA_PATH;;" luajit ]]
    .. "experiments/language_model.lua --quick --data README.md --device %s --out %s %s"):format(device,
    sys.quote(folder), options))
  assert.equal(0, status, err)
  local losses = {}
  for _, record in ipairs(runlog.read(folder .. "/log.jsonl")) do
    if record.event == "step" then losses[#losses + 1] = record.smooth end
  end
  return losses
end

describe("training on CUDA #gpu", function()
  local dir
  before_each(function()
    dir = sys.temporary("-cuda-train")
    assert(sys.mkdir(dir))
  end)
  after_each(function() os.execute("rm -rf " .. sys.quote(dir)) end)

  it("follows the CPU for a thousand steps, and itself to the bit", function()
    local options = "--steps 1000 --sample 16 --warmup 100 --lr 1e-3"
    local cpu = train(dir .. "/cpu", "cpu", options)
    local cuda = train(dir .. "/a", "cuda", options)
    local again = train(dir .. "/b", "cuda", options)
    assert.is_true(#cpu >= 100 and #cpu == #cuda)
    local worst = 0
    for i, loss in ipairs(cpu) do worst = math.max(worst, math.abs(loss - cuda[i])) end
    assert.is_true(worst <= 1e-3, "curves differ by " .. worst)
    assert.same(cuda, again)
  end)

  it("works in bf16 and f16, with dropout and activation checkpointing", function()
    for _, precision in ipairs{ "bf16", "f16" } do
      local options = "--steps 60 --sample 0 --dropout 0.1 --checkpoint-activations --precision " .. precision
      local cpu = train(dir .. "/cpu-" .. precision, "cpu", options)
      local cuda = train(dir .. "/cuda-" .. precision, "cuda", options)
      assert.is_true(math.abs(cpu[#cpu] - cuda[#cuda]) < 0.05, ("%g, %g"):format(cpu[#cpu], cuda[#cuda]))
    end
  end)
end)
