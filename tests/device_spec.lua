--- Every spec that takes a device runs on CUDA as well: the same tests, with LACUNA_DEVICE=cuda.
--
-- What names no device lies on the GPU then, so the oracles, gradient checks, invariances and refusals that
-- were written once are asked of both devices. A test of the CPU itself (its instruction sets, its pool,
-- addresses of elements) has #cpu in its name and is left out there. Every spec of the suite is in one of the
-- lists below, or the first test fails. Rejected: a loop over devices inside of each spec: whatever is made
-- outside of a test, and every helper, would have to be told the device.

local sys = require "lacuna.sys"

local on_device = os.getenv "LACUNA_GPU" == "1" and it or pending

local BOTH = {
  "adaptive", "attention", "attention_pairs", "checkpoint", "config", "conv", "data", "decode",
  "decode_blocks", "elem", "encoder", "explain", "golden", "grad", "io", "learned_blocks", "masks",
  "multihead", "nn", "ops", "optim", "options", "order", "profile", "public", "recompute", "ring", "sampling",
  "scaler", "scan", "scatter", "scope", "settled", "sparse", "special", "tensor", "torch_mha", "train",
  "variants", "watch",
}

local ELSEWHERE = {
  ["the device's own, tagged #gpu"] = {
    "attend_cuda", "attend_f32_cuda", "attend_pairs_cuda", "cuda", "cuda_large", "cuda_shapes",
    "cuda_train", "device", "graph_cuda", "hopper_backward", "hopper_blocks", "hopper_forward", "hopper_fp8",
    "hopper_pairs", "runtime_cuda", "variants_cuda",
  },
  ["the CPU's kernels, pool or threads; those of the device have specs above"] = {
    "attend", "attend_pairs", "attend_parts", "engine", "engine_errors", "engine_maps", "engine_rows", "fp8",
    "fuzz", "memory", "reduce", "rows", "sgemm", "sgemm_unit", "threads", "timeline",
  },
  ["no tensors, or those of a child process"] = {
    "arguments", "bench", "build", "command", "dispatch", "experiments", "layers", "log", "plan", "plot",
    "queue", "readme", "reference", "repl", "schema", "suite",
  },
}

describe("on both devices", function()
  it("is every spec, or elsewhere for a reason", function()
    local listed, found = {}, {}
    for _, name in ipairs(BOTH) do listed[name] = true end
    for _, names in pairs(ELSEWHERE) do
      for _, name in ipairs(names) do
        assert.is_nil(listed[name], name)
        listed[name] = true
      end
    end
    for _, file in ipairs(sys.list "tests") do
      local name = file:match "^(.*)_spec%.lua$"
      if name then found[name] = true end
    end
    assert.same(found, listed)
  end)

  for _, name in ipairs(BOTH) do
    on_device("are the tests of " .. name .. " #gpu", function()
      local status, out, err = sys.run(("LACUNA_DEVICE=cuda luajit /usr/bin/busted --exclude-tags=gpu,cpu "
        .. "tests/%s_spec.lua"):format(name))
      assert.are.equal(0, status, out .. err)
      assert.matches("[1-9]%d* passed, 0 failed", out)
    end)
  end
end)
