--- Options that are right one by one and of which one would do nothing beside the others: all are refused.
--
-- What each option does where it is read is the business of the specs of those who read it.

local lac = require "lacuna"
local nn = lac.nn

local function attention(more)
  local o = { embed_dim = 16, heads = 2, segments = { 8 }, dilations = { 1 } }
  for name, value in pairs(more) do o[name] = value end
  return nn.MultiheadDilatedAttention(o)
end

local function model(more)
  local o = { vocab = 32, layers = 1, width = 16, heads = 2, context = 16, segments = { 8 },
              dilations = { 1 } }
  for name, value in pairs(more) do o[name] = value end
  return nn.LongNetLM(o)
end

local REFUSED = {
  ["MultiheadDilatedAttention: rope_base = 500 is read with positions = 'rope' or 'xpos' only"] = function()
    attention { rope_base = 500 }
  end,
  ["MultiheadDilatedAttention: origin = %-3 is read with positions = 'rope' or 'xpos' only"] = function()
    attention { origin = -3, positions = "alibi" }
  end,
  ["MultiheadDilatedAttention: xpos_base = 64 is read with positions = 'xpos' only"] = function()
    attention { xpos_base = 64, positions = "rope" }
  end,
  ["rope_base = 500 is read with positions"] = function()
    model { positions = "none", attention = { rope_base = 500 } }
  end,
  ["MultiheadDilatedAttention: eps = 0.001 is read with layer_norm = true only"] = function()
    attention { eps = 1e-3, layer_norm = false }
  end,
  ["FeedForward: eps = 0.001 is the LayerNorm's, and layer_norm = false leaves it out"] = function()
    nn.FeedForward(8, 16, { eps = 1e-3, layer_norm = false })
  end,
  ["average_attn_weights = false is about weights that need_weights = true asks for"] = function()
    attention {}(lac.randn { 1, 8, 16 }, nil, nil, { average_attn_weights = false })
  end,
  ["rope: sign = %-1 is of XPOS' decay, and without scale_base there is none"] = function()
    lac.rope(lac.randn { 1, 4, 2, 8 }, { sign = -1 })
  end,
  ["attention: levels and pattern exclude each other, got the pattern full%(%)"] = function()
    lac.attention { variant = "hierarchical", heads = 2, block = 16, pattern = "full()",
                    levels = { { stride = 16, window = 16 } } }
  end,
  ["log.open: path is the whole folder: name does nothing beside it"] = function()
    require("lacuna.log").open { path = os.tmpname() .. ".d", name = "run" }
  end,
  ["log.open: path is the whole folder: dir does nothing beside it"] = function()
    require("lacuna.log").open { path = os.tmpname() .. ".d", dir = "runs" }
  end,
  ["log.open: append = false empties the log of a path; without one the folder is always new"] = function()
    require("lacuna.log").open { name = "run", append = false }
  end,
  ["adamw: weight_decay = 0.3 does nothing: every group has a weight_decay of its own"] = function()
    lac.optim.adamw(lac.optim.groups(model {}, { weight_decay = 0.1 }), { weight_decay = 0.3 })
  end,
  ["sgd: lr = 0.3 does nothing: every group has a lr of its own"] = function()
    lac.optim.sgd({ { lac.ones { 2, grad = true }, lr = 0.1 } }, { lr = 0.3 })
  end,
}

local function step() lac.ones({ 2, grad = true }):sum():backward() end

REFUSED["profile: top = 5 is about what print = false leaves out; p:report{ top = 5 } has it"] = function()
  lac.profile(step, { print = false, top = 5 })
end
REFUSED["profile:report: each = true is about the table by module, which there is not: lac.profile%(fn, {"] =
  function() lac.profile(step, { print = false }):report { each = true } end
REFUSED["profile:report: each = true is about the table by module, which by = 'op' leaves out"] = function()
  lac.profile(step, { print = false, trace = true }):report { each = true, by = "op" }
end

local function fit(more)
  local m = model {}
  local o = { model = m, optimizer = lac.optim.adamw(m), steps = 2, progress = "none",
              batch = function()
                return lac.zeros { 1, 8, dtype = "i64" }, lac.zeros { 1, 8, dtype = "i64" }
              end }
  for name, value in pairs(more) do o[name] = value end
  return lac.train.fit(o)
end

REFUSED["train.fit: first_step needs a run without resume: the checkpoint says where it is"] = function()
  fit { first_step = 2, resume = true, checkpoint = os.tmpname() }
end
REFUSED["train.fit: out needs a progress that is written: 'none' is not"] = function()
  fit { out = io.stderr }
end

describe("an option that nothing would read", function()
  for message, f in pairs(REFUSED) do
    it("is refused: " .. message:sub(1, 60), function() assert.error_matches(f, message) end)
  end

  it("is taken where something reads it", function()
    attention { rope_base = 500, origin = -3, positions = "rope" }
    attention { xpos_base = 64, positions = "xpos" }
    for _, positions in ipairs { "xpos", "rope", "alibi", "none" } do
      local m = model { positions = positions }
      local other = m.options:with { positions = "none" }
      assert.are.equal("none", nn.LongNetLM(other).options.positions)
    end
    -- one group has no weight decay of its own
    lac.optim.adamw({ { lac.ones { 2, grad = true } }, { lac.ones { 2, grad = true }, weight_decay = 0 } },
      { weight_decay = 0.3 })
    lac.optim.adamw(nn.LayerNorm(4), { weight_decay = 0.3 }) -- a module of which nothing decays
    local a = lac.attention { variant = "hierarchical", heads = 2, block = 16,
                              levels = { { stride = 16, window = 16 } } }
    local b = lac.attention(a.options:with { levels = { { stride = 16, window = 32 } } })
    assert.are.equal("hierarchical{ { stride = 16, window = 32 } }", b.options.pattern)
    assert.are.equal(a.options, lac.attention(a.options).options)
  end)
end)
