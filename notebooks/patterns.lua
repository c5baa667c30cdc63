-- patterns.lua: who attends to whom, in cells: patterns of blocks, variants side by side, one of your own, shards.
--
-- To be read after first_steps.lua. Run it with `lacuna notebooks/patterns.lua`, or cell by cell in an editor that
-- knows `-- %%`, or with `lacuna -i` to go on in the session. A spec runs it.

-- %% A pattern of blocks is a value: printed, drawn, counted, combined by + (union), * (intersection), - (difference)
lac = require "lacuna"
lac.manual_seed(1)
masks = lac.attention.masks
sizes = { n = 256, block = 16, causal = true }
pattern = masks.local_window(64) + masks.global_tokens(16)
print(pattern:picture(sizes)) -- a row is a block of 16 queries, a column one of 16 keys
print(pattern:statistics(sizes))

-- %% A rule of one's own: block i sees the blocks 0, 1, 2, 4, 8, ... before it (log-sparse)
log_sparse = masks.rule("log_sparse", function(i, j)
  local back = i - j
  while back > 1 and back % 2 == 0 do back = back / 2 end
  return back == 0 or back == 1
end)
print(log_sparse:picture(sizes))

-- %% The same in numbers: how much of dense attention's mass do the blocks of a pattern hold? Here for keys that are
-- like their neighbours, as in text. (Random ones of the same density, for comparison.)
walk = lac.randn{ 1, 256, 1, 16 }:cumsum(2) / 4
dense = lac.attention{ variant = "dense", heads = 1, causal = true }
_, _, weights = dense(walk, walk, walk, { need_weights = true })
function held(p)
  return p:statistics{ n = 256, block = 16, causal = true, probability = weights[1] }
end
density = held(pattern).density
for _, p in ipairs{ pattern, log_sparse, masks.random(density, 1) } do print(p, held(p)) end

-- %% Variants side by side: which share of the pairs at a distance is attended to, and what it costs
segments, dilations = { 32, 128, 256 }, { 1, 4, 8 }
variants = {
  dense = dense,
  longnet = lac.attention{ variant = "longnet", segments = segments, dilations = dilations, heads = 4, causal = true },
  dilated = lac.attention{ variant = "dilated", segments = segments, dilations = dilations, heads = 4, causal = true },
  blocks = lac.attention{ variant = "block_sparse", pattern = pattern, block = 16, heads = 4, causal = true },
}
print(lac.plot.coverage(variants, 256))
for name, attn in pairs(variants) do
  local t = attn:explain(256, { as = "table" })
  print(("%-8s %6.2f%% of the pairs"):format(name, 100 * t.share))
end

-- %% A variant of one's own is data: three scales, each four times as long and twice as sparse as the last
lac.attention.variants:replace("scales", { -- :replace, so that the cell can be run again
  doc = "segments w, 4w, 16w with dilations 1, 2, 4 in every head",
  options = { first = { type = "integer", min = 1, default = 16 } },
  build = function(o)
    local w = o.first
    return { segments = { w, 4 * w, 16 * w }, dilations = { 1, 2, 4 }, heads = "all", merge = "lse" }
  end,
})
mine = lac.attention{ variant = "scales", heads = 4, causal = true }
print(mine:explain(256))

-- %% ... and everything takes it: gradients, blocks on top, shards, a model that learns
shards = lac.attention(mine.options:with{ variant = "ring", of = "scales", ranks = 4, layout = "zigzag" })
x = lac.randn{ 1, 250, 4, 8, grad = true }
print("over 4 ranks it differs by", (mine(x, x, x) - shards(x, x, x)):abs():max():item())
print(shards)

-- %% Can it learn? Copy 12 symbols: after the mark, say them again. What matters is reach: 12 positions back, in two
-- layers. A window of 4 reaches 8.
function copies(batch)
  local symbols = lac.randint{ batch, 12, low = 1, high = 9 }
  return lac.cat({ symbols, lac.zeros{ batch, 1, dtype = "i64" }, symbols }, 2)
end
function learn(attention)
  lac.manual_seed(2)
  local model = lac.nn.LongNetLM{ vocab = 9, layers = 2, width = 32, heads = 4, context = 32, attention = attention }
  local optimizer, loss = lac.optim.adamw(model, { lr = 1e-2 })
  for _ = 1, 120 do
    lac.scope(function()
      local all = copies(16)
      local guess = model(all:narrow(2, 1, 24)):narrow(2, 13, 12) -- logits of the second half
      local now = lac.cross_entropy(guess:reshape(192, 9), all:narrow(2, 14, 12):reshape(192))
      optimizer:zero_grad()
      now:backward()
      optimizer:step{ clip = 1 }
      loss = now:item()
    end)
  end
  return loss
end
losses = { scales = learn{ variant = "scales", first = 8 }, dense = learn{ variant = "dense" },
           window = learn{ variant = "dense", window = 4 } }
print("loss after 120 steps; guessing is", math.log(8))
for name, loss in pairs(losses) do print(name, loss) end
