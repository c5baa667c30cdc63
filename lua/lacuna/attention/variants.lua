--- The named attention variants, as data.
--
-- A variant turns the options of lac.attention{variant = name, ...} into a pattern for the engine's plan:
-- which heads run which branch, the offset rule and the merge rule. All of them run on the same kernels; what
-- distinguishes the published schemes is exactly what is written here. A variant states what it fixes: giving
-- another value for a fixed setting is an error, because "longnet with merge mean" would not be LongNet;
-- lac.attend takes every combination.
--
-- A record has doc (one line), build(options, fail) -> pattern, and may have `options`, a schema for options
-- of its own.

local schema = require "lacuna.schema"

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

return function(registry)
  registry:add("dense", {
    doc = "every position attends to every other (one branch over the whole sequence)",
    build = function(o)
      for _, key in ipairs { "segments", "dilations", "offset", "merge" } do
        if o[key] ~= nil then
          schema.fail("attention", "variant 'dense' takes no %s, got %s", key, schema.show(o[key]))
        end
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
end
