--- What is written to an object takes effect or is refused: never neither.
--
-- Each class has a way to make an object and a way to use it whose result tells objects apart. Every field
-- that the object has is written with another value: the write, or the next use, must raise, or the use must
-- give something else. The same for every field of its `options`, where writes are not told and so must come
-- out at the next use. A field that is missing here was made since: it needs no entry.

local lac = require "lacuna"
local nn = lac.nn
local complete = require("lacuna.repl").complete

-- a text that two tensors share only if they are the same
local function text_of(...)
  local parts = {}
  for i = 1, select("#", ...) do
    local v = select(i, ...)
    parts[i] = lac.is_tensor(v) and table.concat(v:flatten():float():totable(), " ") or tostring(v)
  end
  return table.concat(parts, ";")
end

local function drawn(f)
  lac.manual_seed(7)
  return f()
end

local function rows() return drawn(function() return lac.randn { 2, 4, 8 } end) end
local function tokens() return drawn(function() return lac.randint { 2, 16, high = 32 } end) end
local function heads() return drawn(function() return lac.randn { 1, 64, 2, 8 } end) end
local function called(...)
  local given = { ... }
  return function(m) return drawn(function() return text_of(m(unpack(given))) end) end
end

local SMALL = { vocab = 32, layers = 2, width = 8, heads = 2, context = 16, segments = { 4, 16 },
                dilations = { 1, 4 } }
local function small(class, more)
  return function()
    local o = {}
    for _, from in ipairs { SMALL, more or {} } do
      for name, value in pairs(from) do o[name] = value end
    end
    return class(o)
  end
end

local DIR = os.tmpname()
os.remove(DIR)

local function attention(options)
  return function()
    options.heads = 2
    return lac.attention(options)
  end
end

-- Name, how to make one, how to use it. own: fields that are the object's own business; none: options that
-- are no fields.
local CASES = {
  { "Linear", function() return nn.Linear(8, 8) end, called(rows()), none = "gain parts dtype" },
  { "Embedding", function() return nn.Embedding(32, 8) end, called(tokens()), none = "std" },
  { "LayerNorm", function() return nn.LayerNorm(8) end, called(rows()) },
  { "RMSNorm", function() return nn.RMSNorm(8) end, called(rows()) },
  { "GroupNorm", function() return nn.GroupNorm(2, 4) end, called(rows()) },
  { "SwiGLU", function() return nn.SwiGLU(8, 16) end, called(rows()), none = "bias" },
  { "Dropout", function() return nn.Dropout(0.3) end, called(rows()) },
  { "LeakyReLU", function() return nn.LeakyReLU(0.3) end, called(rows()), none = "slope" },
  { "Conv1d", function() return nn.Conv1d(4, 4, 3) end, called(rows()), none = "stride dilation padding" },
  { "MSELoss", function() return nn.MSELoss { reduction = "sum" } end, called(rows(), rows() + 1),
    none = "reduction" },
  { "FeedForward", function() return nn.FeedForward(8, 16) end, called(rows()), none = "gamma eps" },
  { "Block", function()
    return nn.Block { width = 8, ffn = 16, attention = { heads = 2, segments = { 4 }, dilations = { 1 } } }
  end, called(rows()), none = "width gamma" },
  { "MultiheadDilatedAttention", function()
    return nn.MultiheadDilatedAttention { embed_dim = 8, heads = 2, segments = { 2, 4 },
                                          dilations = { 1, 2 } }
  end, called(rows()), own = "causal_form", none = "causal segments dropout positions scale" },
  { "LongNetLM", small(nn.LongNetLM), called(tokens()), none = "width heads segments causal" },
  { "LongNetEncoder", small(nn.LongNetEncoder), called(tokens()), none = "width heads" },
  { "LongNetClassifier", small(nn.LongNetClassifier, { classes = 3 }), called(tokens()), none = "width" },
  { "LongNetEncoderDecoder", small(nn.LongNetEncoderDecoder), called(tokens(), tokens()), none = "width" },
  { "LearnedBlocks", function() return nn.LearnedBlocks { n = 64, keep = 2, block = 16, soft = true } end,
    function(m)
      return drawn(function()
        local o = m()
        return text_of(o.block_mask, o.bias, o.block)
      end)
    end, none = "heads" },
  { "AdaptiveBlocks", function()
    return nn.AdaptiveBlocks { head_dim = 8, keep = 2, block = 16, soft = true }
  end, function(m)
    return drawn(function()
      local o = m(heads(), heads() * 2)
      return text_of(o.block_mask, o.bias, o.block)
    end)
  end, none = "hidden" },
  { "attention", attention { variant = "longnet", segments = { 4, 16 }, dilations = { 1, 4 } },
    called(heads(), heads(), heads()), none = "causal segments merge window dropout kernel align" },
  { "attention in blocks", attention { variant = "block_sparse", pattern = "local_window(16)", block = 16 },
    called(heads(), heads(), heads()), none = "block of" },
  { "attention in shards", attention { variant = "ring", segments = { 4, 16 }, dilations = { 1, 4 } },
    called(heads(), heads(), heads()), none = "ranks layout schedule" },
  { "attention with a scorer", attention { variant = "adaptive", keep = 1, block = 16, head_dim = 8 },
    called(heads(), heads(), heads()), none = "keep temperature" },
  { "a pattern of blocks", function() return lac.attention.masks.local_window(32) end, function(m)
    return text_of(m:tensor { n = 128, block = 16 })
  end, none = "window" },
  { "a decoder", function()
    return lac.attention.decoder({ segments = { 4 }, dilations = { 1 }, causal = true },
      { heads = 2, kv_heads = 2, head_dim = 8 })
  end, function(d)
    local row = heads():narrow(2, 1, 1)
    return text_of(d:attend(row, heads(), heads(), 63), d:reach(63))
  end, own = "found args", none = "segments" },
  { "a cache", function() return small(nn.LongNetLM)():cache { batch = 2 } end,
    function(c) return text_of(c, unpack(c:positions())) end, own = "batch", none = "keep" },
  { "a layer's cache", function() return small(nn.LongNetLM)():cache({ batch = 2 }).layers[1] end,
    function(c) return text_of(c, c:bytes()) end, none = "rows",
    own = "batch device dtype k v keep first from to place positions starts" },
  { "a decoder for a source", function() return small(nn.LongNetEncoderDecoder)():given(tokens()) end,
    called(tokens()), none = "size" },
  { "Sampler", function() return nn.Sampler(8, { temperature = 0.7, top_k = 4 }) end, function(s)
    local list = {}
    for i = 1, 20 do list[i] = s:draw(lac.arange { 8 }, i / 21) end
    return text_of(unpack(list))
  end, own = "row", none = "temperature top_k" },
  { "LossScaler", function() return lac.optim.loss_scaler { interval = 2 } end, function(s)
    for _, overflow in ipairs { true, false, false, true } do s:update(overflow) end
    return text_of(s.value, s.good, s.skipped)
  end, own = "good", none = "init growth" },
  { "Bytes", function() return lac.data.string "a text of bytes" end,
    function(b) return text_of(b, b:text()) end, none = "context" },
  { "Order2", function() return lac.data.order2(lac.data.string "a text of bytes") end,
    function(o) return text_of(o:probability(32, 111, 102)) end, none = "context" },
  { "Log", function() return require("lacuna.log").open { path = DIR } end,
    function(l) return text_of(l, l:path "x") end, own = "bytes file started", none = "name append" },
  { "Registry", function() return lac.registry("things", "thing") end, function(r)
    r:add("one", 1)
    return text_of(r, select(2, pcall(r.get, r, "two")))
  end, none = "two" },
}

-- steps of two parameters, one of them without a gradient
local function stepped(optimizer)
  local list = {}
  for i, e in ipairs(optimizer.entries) do list[i] = e.param end
  local fine, why = pcall(function()
    for _, g in ipairs { 0.5, -0.01 } do
      list[1].grad = lac.full_like(list[1], g)
      optimizer:step()
    end
  end)
  return text_of(fine, fine or why:match "^[^%[]*", list[1])
end

for kind, o in pairs {
  adamw = { lr = 0.1 }, adam = { lr = 0.1 }, lion = { lr = 0.1 }, sgd = { lr = 0.1 },
} do
  CASES[#CASES + 1] = { kind, function()
    o.skip_missing = true
    return lac.optim[kind]({ lac.ones { 2, grad = true }, lac.ones { 2, grad = true } }, o)
  end, stepped, own = "grads items norm_out steps", none = "momentun betta options" }
end

local function set_of(names)
  local set = {}
  for name in (names or ""):gmatch "%S+" do set[name] = true end
  return set
end

-- another value of the same type
local function other(v)
  if type(v) == "boolean" then return not v end
  if type(v) == "number" then return v * 0.5 + 0.125 end
  if type(v) == "string" then return v .. "x" end
  if type(v) == "table" and #v > 0 and not getmetatable(v) then
    local list = { unpack(v) }
    list[1] = other(v[1])
    return list
  end
  return 7
end

local function names_of(object, own)
  local names = {}
  for _, fields in ipairs { object, rawget(object, "_settled") or {} } do
    for name in next, fields do
      if type(name) == "string" and name:sub(1, 1) ~= "_" and not own[name] then names[#names + 1] = name end
    end
  end
  table.sort(names)
  return names
end

-- does writing do something? `write` changes the object
local function minds(make, use, write)
  local before, object = use(drawn(make)), drawn(make)
  if not pcall(write, object) then return true end
  local fine, after = pcall(use, object)
  return not fine or after ~= before
end

describe("writing to an object", function()
  for _, case in ipairs(CASES) do
    local name, make, use = unpack(case)
    it("changes something or is refused: " .. name, function()
      local object = drawn(make)
      assert.are.equal(use(object), use(drawn(make)), "the same object twice")
      for _, field in ipairs(names_of(object, set_of("training " .. (case.own or "")))) do
        assert.is_true(minds(make, use, function(o) o[field] = other(o[field]) end), field)
      end
      local options = lac.schema.own_field(object, "options")
      for _, field in ipairs(options and lac.schema.keys(options) or {}) do
        assert.is_true(minds(make, use, function(o) o.options[field] = other(o.options[field]) end),
          "options." .. field)
      end
    end)

    it("is refused where there is no such field: " .. name, function()
      local object = drawn(make)
      for field in pairs(set_of((case.none or "") .. " nonsense")) do
        assert.error_matches(function() object[field] = 1 end, "there is no field '" .. field .. "' to set")
      end
    end)
  end

  it("is tried for every class of nn, or for one that is made as it is", function()
    local ALIKE = { -- of one function of the source, or with no fields
      MSELoss = "CrossEntropyLoss NLLLoss L1Loss HuberLoss SmoothL1Loss KLDivLoss BCEWithLogitsLoss",
      LeakyReLU = "GELU ReLU SiLU Tanh Sigmoid Mish GELUTanh ELU Softplus Softmax LogSoftmax Identity",
      SwiGLU = "GeGLU", ["a cache"] = "ModelCache", ["a layer's cache"] = "KVCache BlockCache",
      MultiheadDilatedAttention = "ImprovedMultiheadDilatedAttention RingMultiheadDilatedAttention "
        .. "DistributedImprovedMultiheadDilatedAttention",
    }
    local tried = set_of "Module ModuleList Sequential" -- hold nothing but modules
    for _, case in ipairs(CASES) do
      tried[case[1]] = true
      for name in pairs(set_of(ALIKE[case[1]])) do tried[name] = true end
    end
    for name, value in pairs(nn) do
      if type(value) == "table" and rawget(value, "__name") then assert.is_true(tried[name], name) end
    end
  end)

  it("is refused with what to do instead", function()
    local model = small(nn.LongNetLM)()
    local function refused(pattern, f) assert.error_matches(f, pattern) end
    refused("LongNetLM: 'context' was settled when it was made, and writing it would change nothing; make "
      .. "another: nn.LongNetLM%(m.options:with{ context = %.%.%. }%) %[tests/settled_spec",
      function() model.context = 8 end)
    refused("there is no field 'width' to set; make another: nn.LongNetLM%(m.options:with{ width = ",
      function() model.width = 8 end)
    refused("Linear: 'outputs' was settled when it was made, .*; make another Linear",
      function() nn.Linear(2, 3).outputs = 4 end)
    model.options.dropout = 0.5
    refused("LongNetLM: options.dropout was set to 0.5 after it was made, which would change nothing; make "
      .. "another: nn.LongNetLM%(m.options:with{ dropout = 0.5 }%) %[LongNetLM, tests/settled_spec",
      function() model(tokens()) end)
    refused("LongNetLM: options.dropout", function() model:memory_estimate(1) end)
    refused("LongNetLM: options.dropout", function()
      lac.train.save_checkpoint(os.tmpname(), { model = model })
    end)
    assert.are.equal(0.5, nn.LongNetLM(model.options).options.dropout) -- the changed options are good for one

    local attn = attention { variant = "longnet", segments = { 4, 16 }, dilations = { 1, 4 } }()
    refused("Attention: 'variant' was settled .* make another: lac.attention%(a.options:with{ variant = ",
      function() attn.variant = "dense" end)
    refused("there is no pattern.window to set; make another: lac.attention%(a.options:with{ window = ",
      function() attn.pattern.window = 3 end)
    attn.options.segments[2] = 8
    refused("attention: options.segments was set to {4, 8} after it was made, which would change nothing; "
      .. "make another: lac.attention%(a.options:with{ segments = {4, 8} }%)",
      function() attn(heads(), heads(), heads()) end)
    refused("options.segments", function() attn:explain(64) end)
  end)

  it("to an optimizer is as good as the option, and as strict", function()
    local function made(kind, o)
      local p = lac.ones { 2, grad = true }
      p.grad = lac.ones { 2 }
      return lac.optim[kind]({ p }, o)
    end
    for message, f in pairs {
      ["AdamW: 'master' was settled .* another: lac.optim.adamw%(parameters, { master = true, %.%.%. }%)"] =
        function() made("adamw").master = true end,
      ["there is no field 'options', did you mean o:config%(%) to read"] = function()
        made("adamw").options.lr = 3
      end,
      ["adamw: betas must be {beta1, beta2}, got {0.9}"] = function()
        local o = made "adamw"
        o.betas = { 0.9 }
        o:step()
      end,
      ["lion: betas%[1%] must be below 1, got 2"] = function()
        local o = made "lion"
        o.betas[1] = 2
        o:step()
      end,
      ["adam: eps must be above 0, got %-1"] = function()
        local o = made "adam"
        o.eps = -1
        o:step()
      end,
      ["adamw: skip_missing must be true or false, got 'no'"] = function()
        local o = made "adamw"
        o.skip_missing = "no"
        o:step()
      end,
      ["sgd: momentum was set to 0.9, but the optimizer was made with 0 and keeps none; make another: "] =
        function()
          local o = made("sgd", { lr = 0.1 })
          o.momentum = 0.9
          o:step()
        end,
      ["sgd: dampening 0.5 is of the momentum, and there is none"] = function()
        local o = made("sgd", { lr = 0.1 })
        o.dampening = 0.5
        o:step()
      end,
      ["LossScaler: there is no field 'init' to set"] = function() lac.optim.loss_scaler().init = 3 end,
    } do
      assert.error_matches(f, message)
    end
  end)

  it("to a scorer reaches all that it decides: calls, decoding and explain()", function()
    local m = drawn(function()
      return nn.MultiheadDilatedAttention { variant = "adaptive", embed_dim = 16, heads = 2, keep = 1,
                                            block = 16, causal = true }
    end):eval()
    local x = drawn(function() return lac.randn { 1, 128, 16 } end)
    local few, kept = m(x), m:explain(128)
    m.scorer.keep = 3
    local all, cache = m(x), m:cache()
    assert.is_true((all - few):abs():max():item() > 1e-3)
    assert.are_not.equal(kept, m:explain(128))
    for i = 1, 128 do
      local row = m:decode(x:narrow(2, i, 1), cache)
      assert.is_true((row - all:narrow(2, i, 1)):abs():max():item() < 1e-5, i)
    end
    for message, f in pairs {
      ["AdaptiveBlocks: temperature must be above 0, got 0"] = function() m.scorer.temperature = 0 end,
      ["AdaptiveBlocks: keep must be positive, got 0"] = function() m.scorer.keep = 0 end,
      ["AdaptiveBlocks: soft must be true or false, got 'no'"] = function() m.scorer.soft = "no" end,
    } do
      f()
      assert.error_matches(function() m(x) end, message)
      m.scorer.temperature, m.scorer.keep, m.scorer.soft = 1, 3, false
    end
    m.scorer.soft = true
    assert.error_matches(function() m:cache() end, "cannot be decoded row by row with soft weights")
  end)

  it("to lac or a module of it is refused: these are functions, and nothing reads new fields", function()
    for message, f in pairs {
      ["there is no lac.default_dtype to set, it is a function: lac.default_dtype%('f64'%) %[tests/"] =
        function() lac.default_dtype = "f64" end,
      ["there is no lac.threads to set, it is a function: lac.threads%(4%)"] = function() lac.threads = 4 end,
      ["there is no lac.memory_tracking to set, it is a function"] = function()
        lac.memory_tracking = true
      end,
      ["there is no lac.default_dtpye to set, did you mean lac.default_dtype%(...%)"] = function()
        lac.default_dtpye = "f64"
      end,
      ["there is no lac.seed to set, did you mean lac.manual_seed%(n%)"] = function() lac.seed = 3 end,
      ["there is no lac.deterministic to set"] = function() lac.deterministic = true end,
      ["there is no lac.optim.lr to set"] = function() lac.optim.lr = 3 end,
      ["there is no lac.nn.dropout to set"] = function() lac.nn.dropout = 0.1 end,
      ["there is no lac.attention.causal to set"] = function() lac.attention.causal = true end,
      ["there is no lac.train.steps to set"] = function() lac.train.steps = 3 end,
    } do
      assert.error_matches(f, message)
    end
    lac.mine = function() return 5 end
    assert.are.equal(5, lac.mine())
    rawset(lac, "mine", nil)
    assert.are.equal(lac.threads, lac.threads)
    assert.matches("^lac.threads%(n%)\n  Number of threads", lac.help(lac.threads))
    assert.are.same({ "lac.default_device", "lac.default_dtype" }, complete({ lac = lac }, "lac.defa"))
  end)

  it("does not reach other objects: lists are copied", function()
    local p = lac.ones { 2, grad = true }
    local given = { 0.5, 0.6 }
    local a, b = lac.optim.adamw({ p }, { betas = given }), lac.optim.adamw { p }
    given[1], b.betas[1] = 0, 0.25
    assert.are.same({ 0.5, 0.6 }, a.betas)
    assert.are.same({ 0.9, 0.999 }, lac.optim.adamw({ p }).betas)
    local segments = { 4, 16 }
    local attn = attention { variant = "longnet", segments = segments, dilations = { 1, 4 } }()
    local before = called(heads(), heads(), heads())(attn)
    segments[2] = 8
    assert.are.equal(before, called(heads(), heads(), heads())(attn))
  end)

  it("where a module was is told at the next use, and what to do for an option of that name", function()
    local model, ids = small(nn.LongNetLM)(), tokens()
    for message, f in pairs {
      ["LongNetLM: child 'dropout' must stay a module, it was set to 0.1; make another: "
        .. "nn.LongNetLM%(m.options:with{ dropout = %.%.%. }%) %[LongNetLM, tests/settled_spec"] = function()
        model.dropout = 0.1
        model:loss(ids, ids)
      end,
      ["Block: child 'dropout' must stay a module, it was set to 0.5 %[LongNetLM.layers%[2%]"] = function()
        local m = small(nn.LongNetLM)()
        m.layers[2].dropout = 0.5
        m(ids)
      end,
      ["Dropout: training must be true or false, it was set to 'no'"] = function()
        local d = nn.Dropout(0.5)
        d.training = "no"
        d(rows())
      end,
      ["attention: training must be true or false, it was set to 'no'"] = function()
        local attn = attention { variant = "dense" }()
        attn.training = "no"
        attn(heads(), heads(), heads())
      end,
    } do
      assert.error_matches(f, message)
    end
  end)

  it("goes on where it is meant to take effect", function()
    local norm, drop, linear = nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 8)
    norm.eps, drop.p, drop.training = 1e-3, 0.1, false
    linear.weight = lac.zeros { 8, 8, grad = true }
    assert.are.same({ 1e-3, 0.1, 0 }, { norm.eps, drop.p, linear(rows()):abs():max():item() })
    local Mine = nn.module "Mine"
    function Mine:init(n) self.n, self.context = n, n end
    local mine = Mine(3)
    mine.n = 4 -- a script's own fields are its own business
    assert.are.equal(4, mine.n)
    local Longer = nn.module("Longer", nn.LongNetLM)
    function Longer:init(o)
      nn.LongNetLM.init(self, o)
      self.extra_rows = 3
    end
    local longer = small(Longer)()
    longer.extra_rows = 4
    assert.are.equal(16, longer.context)
    assert.error_matches(function() longer.context = 8 end,
      "Longer: 'context' was settled .* make another: Longer%(m.options:with")
  end)

  it("leaves copies, checkpoints and lists of fields as they were", function()
    local model = small(nn.LongNetLM)()
    local copy = model:clone()
    assert.are.equal(model.context, copy.context)
    assert.are.equal(called(tokens())(model), called(tokens())(copy))
    assert.error_matches(function() copy.context = 8 end, "settled")
    assert.error_matches(function() return model.contxt end, "did you mean 'context'")
    local path = os.tmpname()
    lac.train.save_checkpoint(path, { model = model })
    assert.are.equal(tostring(model), tostring((lac.train.load_model(path))))
    os.remove(path)
    local found = complete({ m = model }, "m.cont")
    assert.are.same({ "m.context" }, found)
  end)
end)
