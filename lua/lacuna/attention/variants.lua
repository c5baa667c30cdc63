--- The named attention variants, as data.
--
-- A variant turns the options of lac.attention{variant = name, ...} into a pattern for the engine's plan:
-- which heads run which branch, the offset rule and the merge rule. All of them run on the same kernels; what
-- distinguishes the published schemes is exactly what is written here. A variant states what it fixes: giving
-- another value for a fixed setting is an error, because "longnet with merge mean" would not be LongNet;
-- lac.attend takes every combination.
--
-- A record has doc (one line), build(options, fail) -> pattern and, where there was a choice, a sentence that
-- says why; it may have `options`, a schema for options of its own, run(module, q, k, v, run) -> out, lse if
-- one engine call is not what it does, prepare(module, q, k, run) -> run if the call has options that depend
-- on q and k (blocks), and sharding(module, n, m) if rows are cut over ranks (for explain). A
-- variant with an option `of` wraps another one, whose options it takes too. `bare` says that it needs no
-- segments, `example` has options without which it cannot be made: both for the table of `lacuna variants`,
-- which tries every option. A record whose blocks are chosen by content has scorer(options) -> module, which
-- the layer above supplies (nn/masks.lua): attention itself knows no modules.

local schema = require "lacuna.schema"
local device = require "lacuna.device"
local config = require "lacuna.config"

-- the setting that a variant fixes: absent or equal
local function fixed(name, o, settings)
  for key, value in pairs(settings) do
    if o[key] ~= nil and o[key] ~= value then
      schema.fail("attention", "variant '%s' has %s = '%s', got %s; lac.attend takes every combination",
                  name, key, value, schema.show(o[key]))
    end
  end
end

local function branches(name, o)
  for _, key in ipairs { "segments", "dilations" } do
    if o[key] == nil then schema.fail("attention", "%s is required by variant '%s'", key, name) end
  end
  return o.segments, o.dilations
end

-- heads are divided over the branches
local function split(name)
  return function(o)
    fixed(name, o, { offset = "branch", merge = "mean" })
    local segments, dilations = branches(name, o)
    return { segments = segments, dilations = dilations, heads = "split", offset = "branch", merge = "mean" }
  end
end

-- the record of the variant that another one wraps
local function inside(registry, name, o, fail)
  local inner = registry:get(o.of)
  if inner.run or inner.prepare then
    fail("attention", "variant '%s' cannot wrap '%s', which wraps another one itself%s", name, o.of,
      o.ranks == nil and inner.sharding and ("; make '%s' with this pattern"):format(o.of)
      or o.ranks and inner.blocks and not inner.sharding and ("; give '%s' its pattern"):format(name) or "")
  end
  return inner
end

-- ---- the sequence in shards ------------------------------------------------------------------------------

-- a pattern of blocks, if there is one, and the size of its blocks
local function settle_blocks(o, name, sparse)
  if o.pattern then
    o.block = o.block or sparse.options.block.default
    sparse.settle(o)
  elseif o.block then
    schema.fail(name, "block = %d is the size of a pattern's blocks, and there is no pattern", o.block)
  end
  return o
end

local function sharded(registry, ring, sparse, name, doc, of, ranks, schedule)
  local options = ring.options(of, ranks, schedule, sparse.options.pattern.check)
  config.define(name, function(given)
    return settle_blocks(schema.options(name, given, options), name, sparse)
  end)
  local record = { doc = doc, options = options, run = ring.run, sharding = ring.plan, mask = true,
                   bias = true, alibi = true, cu_seqlens = true, block_mask = true,
                   blocks = sparse.statistics, decoder = sparse.decoder }
  function record.build(o, fail)
    local inner = inside(registry, name, o, fail)
    ring.check(o, name)
    settle_blocks(o, "attention", sparse)
    return inner.build(o, fail)
  end
  function record.prepare(module, q, k, run)
    if not module.options.pattern then return run end
    if run.block_mask then
      schema.fail("attention", "variant '%s' has the pattern %s: no block_mask of a call", name,
        module.options.pattern)
    end
    return sparse.prepare(module, q, k, run)
  end
  registry:add(name, record)
end

-- ---- the choice by length --------------------------------------------------------------------------------

-- Positions from which leaving pairs out takes less time, forward and backward, than attending to all of
-- them. Measured with branches that keep 44% of the causal pairs: on the CPU (4 heads, f32) 0.70 of dense's
-- time at 512 and 1.18 at 256, on an H200 (12 heads, bf16) 0.7 at 8192 and 1.06 at 4096. Below, a density
-- saves nothing.
local PAYS_FROM = { cpu = 512, cuda = 8192 }

-- segments w, 2w, 4w, ... to the length, dilations 1, 2, 4, ...: each branch has half the pairs of the one
-- before
local function geometric(first, length)
  local segments, dilations, w, r = {}, {}, first, 1
  repeat
    segments[#segments + 1], dilations[#dilations + 1] = w, r
    w, r = 2 * w, 2 * r
  until segments[#segments] >= length or #segments == 8
  return segments, dilations
end

-- Share of the causal pairs that geometric(first, length) keeps: a branch of segments w and dilation r has
-- 1 / r of w's rows, each with 1 / r of its keys.
local function share(first, length)
  local _, dilations = geometric(first, length)
  return 2 * first / length * (1 - 2 ^ -#dilations)
end

-- the largest first segment, a power of two from 16 on, that keeps at most the density
local function first_for(density, length)
  local first = 2 ^ math.floor(math.log(length) / math.log(2))
  while first > 16 and share(first, length) > density do first = first / 2 end
  return math.min(first, length)
end

-- why dense attention is right for a length, or nil
local function dense_for(o, kind)
  if o.length < PAYS_FROM[kind] then
    return ("%d positions are fewer than the %d from which %s saves time by leaving pairs out"):format(
      o.length, PAYS_FROM[kind], kind)
  end
  return o.density == 1 and "a density of 1 leaves nothing out" or nil
end

local function choose(o)
  local kind = device.name(device.code("attention", o.device)):match("^%a+")
  local segments, dilations, why = o.segments, o.dilations, "segments and dilations were given"
  if not segments then
    local dense, first = dense_for(o, kind), PAYS_FROM[kind] / 4
    if dense then
      return { segments = { 2 ^ 40 }, dilations = { 1 }, heads = "all", offset = "mod", merge = "lse" },
        "dense: " .. dense
    end
    why = ("%d positions are at least the %d from which %s saves time by leaving pairs out"):format(
      o.length, PAYS_FROM[kind], kind)
    if o.density then
      first = first_for(o.density, o.length)
      why = ("a first segment of %d keeps %.3f of the pairs, the density is %g"):format(first,
        share(first, o.length), o.density)
    end
    segments, dilations = geometric(first, o.length)
  end
  return { segments = segments, dilations = dilations, heads = "all", offset = "mod", merge = "lse" },
    "longnet: " .. why
end

-- ---- active blocks only ----------------------------------------------------------------------------------

-- a wrapped variant under a block pattern; settle(o) checks and completes what the blocks are chosen by
local function blocked(registry, name, record, settle)
  record.bare, record.mask, record.bias, record.alibi = true, true, true, true
  function record.build(o, fail)
    local inner = inside(registry, name, o, fail)
    if settle then settle(o) end
    return inner.build(o, fail)
  end
  registry:add(name, record)
end

return function(registry, ring, sparse, masks)
  registry:add("dense", {
    doc = "every position attends to every other (one branch over the whole sequence)", bare = true,
    build = function(o)
      for _, key in ipairs { "segments", "dilations", "offset", "merge" } do
        if o[key] ~= nil then
          local within = o.of == "dense" -- a variant that wraps this one, perhaps by its default
          schema.fail("attention", "variant 'dense'%s takes no %s, got %s%s",
            within and " (of = 'dense')" or "", key, schema.show(o[key]),
            within and "; of = 'longnet' does" or "")
        end
      end
      if o.dedup then
        schema.fail("attention", "variant 'dense' has one branch: there is nothing for dedup to count twice")
      end
      -- a segment longer than any sequence is one segment
      return { segments = { 2 ^ 40 }, dilations = { 1 }, heads = "all", offset = "mod", merge = "lse" }
    end,
  })

  registry:add("dilated", {
    doc = "heads split over the branches, offset by branch, outputs averaged (DilatedAttention)",
    build = split("dilated"),
  })

  registry:add("improved", {
    doc = "the mathematics of 'dilated' (ImprovedDilatedAttention); one fused kernel family runs both",
    build = split("improved"),
  })

  registry:add("longnet", {
    doc = "every head in every branch, offset by head, one softmax over all branches (LongNet, eq. 9-15)",
    build = function(o)
      if o.merge ~= "lse_detach" then fixed("longnet", o, { merge = "lse" }) end
      local segments, dilations = branches("longnet", o)
      return { segments = segments, dilations = dilations, heads = "all", offset = o.offset or "mod",
               merge = o.merge or "lse" }
    end,
  })

  registry:add("custom", {
    doc = "any combination of scheme, offset and merge (lac.attend in module form)",
    options = { scheme = { one_of = { "split", "all" }, default = "all" } },
    build = function(o)
      local segments, dilations = branches("custom", o)
      return { segments = segments, dilations = dilations, heads = o.scheme, offset = o.offset,
               merge = o.merge }
    end,
  })

  registry:add("auto", {
    doc = "dense or LongNet, by device, longest sequence and density; explain() says why",
    example = { length = 12 },
    options = { length = { type = "integer", min = 1, required = true }, device = { type = "string" },
                density = { type = "number", above = 0, max = 1 } },
    build = function(o)
      fixed("auto", o, { offset = "mod", merge = "lse" })
      if o.segments and o.density then
        schema.fail("attention", "variant 'auto' takes segments or a density, got both")
      end
      if (o.segments == nil) ~= (o.dilations == nil) then
        schema.fail("attention", "variant 'auto' needs segments and dilations together, or neither")
      end
      return choose(o)
    end,
  })

  sharded(registry, ring, sparse, "ring",
          "another variant (of), its sequence in shards over a ring of virtual ranks", "longnet", 2, "ring")
  sharded(registry, ring, sparse, "distributed",
          "'improved' in shards, the schedule chosen by what it sends", "improved", 1, "auto")

  blocked(registry, "block_sparse", {
    doc = "another variant (of) in active blocks only: pattern = masks.local_window(512) + ..., or its text",
    options = sparse.options, example = { pattern = "random(0.5)", block = 16 },
    prepare = sparse.prepare, blocks = sparse.statistics, decoder = sparse.decoder,
  }, sparse.settle)
  config.define("sparse", function(given)
    return sparse.settle(schema.options("sparse", given, sparse.options))
  end)

  blocked(registry, "hierarchical", {
    doc = "block_sparse over levels of {stride =, window =}: rows at the stride see the window (-1: all)",
    options = { of = sparse.options.of, block = sparse.options.block, pattern = { type = "string" },
                levels = { type = "table" } },
    example = { levels = { { stride = 16, window = 16 } }, block = 16 },
    prepare = sparse.prepare, blocks = sparse.statistics, decoder = sparse.decoder,
  }, function(o)
    if not o.levels and not o.pattern then
      schema.fail("attention", "levels is required by variant 'hierarchical'")
    end
    if o.levels then
      local pattern = masks.hierarchical(o.levels)
      if o.pattern and o.pattern ~= tostring(pattern) then
        schema.fail("attention", "levels and pattern exclude each other, got the pattern %s", o.pattern)
      end
      o.pattern = pattern
    end
    sparse.settle(o)
  end)

  local adaptive = {
    doc = "another variant (of) in the blocks that a trained scorer keeps for their contents, `keep` a row",
    options = sparse.adaptive_options, example = { keep = 1, block = 16, head_dim = 2, dtype = "f64" },
    prepare = sparse.prepare_adaptive, blocks = sparse.most, decoder = sparse.adaptive_decoder,
  }
  local learned = {
    doc = "another variant (of) in the blocks with the best of trained scores, `keep` a row, up to `length`",
    options = sparse.learned_options, example = { keep = 1, block = 16, length = 16, dtype = "f64" },
    prepare = sparse.prepare_adaptive, blocks = sparse.learned_statistics, decoder = sparse.learned_decoder,
  }
  for name, record in pairs { adaptive = adaptive, learned = learned } do
    blocked(registry, name, record, function()
      if not record.scorer then
        schema.fail("attention", "variant '%s' has its scorer from lacuna.nn: require that first", name)
      end
    end)
  end
end
