--- learned_blocks.lua: do learned patterns find what a random pattern of the same density misses?
--
--   build/bin/lacuna experiments/learned_blocks.lua
--
-- Two tasks with one answer each, on N positions in blocks of 16. "fixed": every row of blocks has to give
-- the mean of the values of one other block, the same for all examples, and queries and keys are 0, so that
-- only the pattern can tell. nn.LearnedBlocks starts from scores of nothing; a random pattern of the same
-- density has trainable weights for its blocks, so it fails only where the block is not among them. "by
-- content": which block it is changes with every example and stands in the tokens, noisy, as a code of the
-- wanted block; nn.AdaptiveBlocks has to learn to compare codes, by seeing which choices lower the loss.
--
-- Losses are mean squared errors on fresh examples over that of answering 0.

local lac = require "lacuna"
local cli = require "lacuna.cli"
local nn = require "lacuna.nn"

local BLOCK = 16
local SPEC = {
  program = "learned_blocks",
  about = "Trains a learned and an adaptive pattern of blocks beside random ones of the same density.",
  { name = "blocks", type = "integer", min = 4, default = 8, help = "blocks of 16 positions" },
  { name = "keep", type = "integer", min = 1, default = 2, help = "blocks that a row keeps" },
  { name = "steps", type = "integer", min = 1, default = 300, help = "training steps of each" },
  { name = "seed", type = "integer", min = 0, default = 1, help = "of everything that is drawn" },
  cli.option("device"),
  { name = "quick", type = "boolean", help = "a run of seconds (other options still apply)" },
}
local QUICK = { blocks = 4, steps = 20 }

local function permutation(n)
  local p = lac.randperm(n):totable()
  for i = 1, n do p[i] = p[i] + 1 end
  return p
end

-- [B, N, 1, D] values, and [B, N, 1, D]: for block i the mean of the values of block to[b][i]
local function values_and_target(B, blocks, D, to)
  local v = lac.randn { B, blocks * BLOCK, 1, D }
  local means = v:view(B, blocks, BLOCK, D):mean(3) -- [B, blocks, D]
  local index = {}
  for b = 1, B do
    index[b] = {}
    for i = 1, blocks do index[b][i] = (b - 1) * blocks + to[b][i] - 1 end
  end
  local flat = lac.tensor(index, { dtype = "i64" }):view(B * blocks)
  local wanted = means:reshape(B * blocks, D):index_select(1, flat):view(B, blocks, 1, D)
  return v, wanted:expand(B, blocks, BLOCK, D):reshape(B, blocks * BLOCK, 1, D)
end

local function attend(q, k, v, options)
  options.segments, options.dilations, options.return_lse = { q:size(2) }, { 1 }, false
  return lac.attend(q, k, v, options)
end

-- trains `parameters` on loss(true), returns the mean of loss(false) on fresh examples
local function train(parameters, steps, lr, loss, each)
  local optimizer = #parameters > 0 and lac.optim.adamw(parameters, { lr = lr, weight_decay = 0 })
  for step = 1, optimizer and steps or 0 do
    lac.scope(function()
      if each then each(step / steps) end
      optimizer:zero_grad()
      loss(true):backward()
      optimizer:step()
    end)
  end
  local sum = 0
  lac.no_grad(function()
    for _ = 1, 8 do sum = sum + lac.scope(function() return loss(false):item() end) end
  end)
  return sum / 8
end

-- the same wanted blocks in every example; queries and keys are 0
local function fixed_task(o)
  local D, B, n = 8, 8, o.blocks * BLOCK
  local to, zero = permutation(o.blocks), lac.zeros { B, n, 1, D }
  local all = {}
  for b = 1, B do all[b] = to end
  local function error_of(options)
    local v, target = values_and_target(B, o.blocks, D, all)
    return (attend(zero, zero, v, options) - target):square():mean() * BLOCK -- means have variance 1 / BLOCK
  end
  local learned = nn.LearnedBlocks { n = n, block = BLOCK, keep = o.keep, soft = true }
  local found = train(learned:parameters(), o.steps, 0.05, function(training)
    return error_of(learned:train(training)())
  end, function(at) learned.temperature = 1 - 0.7 * at end)
  -- the same weights on a random choice
  local random = nn.LearnedBlocks { n = n, block = BLOCK, keep = o.blocks, soft = true, noise = false }
  local mask = lac.attention.masks.random(o.keep / o.blocks, o.seed):tensor { n = n, block = BLOCK }
  local missed = train(random:parameters(), o.steps, 0.05, function()
    local options = random()
    options.block_mask = mask
    return error_of(options)
  end)
  return found, missed
end

-- tokens say which block they want, and which they are
local function content_task(o)
  local D, B, n = 16, 8, o.blocks * BLOCK
  local codes = lac.randn { o.blocks, D }
  local function example()
    local to, q, k = {}, {}, {}
    for b = 1, B do
      local name, want = permutation(o.blocks), permutation(o.blocks)
      to[b], q[b], k[b] = want, {}, {}
      for i = 1, o.blocks do q[b][i], k[b][i] = name[want[i]] - 1, name[i] - 1 end
    end
    local function tokens(list)
      local at = lac.tensor(list, { dtype = "i64" }):view(B * o.blocks)
      local x = codes:index_select(1, at):view(B, o.blocks, 1, D):expand(B, o.blocks, BLOCK, D)
      return x:reshape(B, n, 1, D) + lac.randn { B, n, 1, D } * 0.5
    end
    local v, target = values_and_target(B, o.blocks, D, to)
    return tokens(q), tokens(k), v, target
  end
  local function error_of(pattern)
    local q, k, v, target = example()
    local options = pattern(q, k)
    options.scale = 1e-6 -- the tokens' own scores would tell as well
    return (attend(q, k, v, options) - target):square():mean() * BLOCK
  end
  local adaptive = nn.AdaptiveBlocks { head_dim = D, block = BLOCK, keep = o.keep, soft = true }
  local found = train(adaptive:parameters(), o.steps, 0.01, function(training)
    adaptive:train(training)
    return error_of(function(q, k) return adaptive(q, k) end)
  end, function(at) adaptive.temperature = 1 - 0.7 * at end)
  local mask = lac.attention.masks.random(o.keep / o.blocks, o.seed):tensor { n = n, block = BLOCK }
  local missed = train({}, 0, 0, function()
    return error_of(function() return { block_mask = mask, block = BLOCK } end)
  end)
  return found, missed
end

cli.main(SPEC, arg, function(o)
  if o.quick then cli.preset(o, QUICK) end
  if o.keep > o.blocks then
    lac.schema.fail("learned_blocks", "--keep %d is more than there are: --blocks %d", o.keep, o.blocks)
  end
  lac.default_device(o.device)
  lac.manual_seed(o.seed)
  print(("density %.3f, %d steps"):format(o.keep / o.blocks, o.steps))
  for _, task in ipairs { { "fixed", "learned", fixed_task }, { "by content", "adaptive", content_task } } do
    local found, missed = task[3](o)
    print(("%-11s %-9s %.4f    random %.4f"):format(task[1], task[2], found, missed))
  end
end)
