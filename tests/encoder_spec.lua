--- encoder_spec.lua: LongNet's encoder, classifier, encoder-decoder, and the paper's sizes.
--
-- What padding must not change is compared with the same rows computed alone, decoding with the whole pass,
-- gradients with central differences, gains with the formulas of MAGNETO by the deviation of what was drawn.

local lac = require "lacuna"
local nn = lac.nn

local function options(more)
  local o = { context = 12, width = 8, heads = 2, layers = 2, ffn = 12, segments = { 4, 12 },
              dilations = { 1, 2 }, dtype = "f64" }
  for name, value in pairs(more or {}) do o[name] = value end
  lac.manual_seed(5)
  return o
end

local function ids(rows, dtype) return lac.tensor(rows, { dtype = dtype or "i32" }) end
local function distance(a, b) return (a - b):abs():max():item() end

local SOURCE = { { 1, 2, 3, 4, 5, 6, 7 }, { 3, 2, 1, 0, 0, 0, 0 } }
local LENGTHS = { 7, 3 }

-- slopes of `loss` by central differences on three numbers of every parameter
local function check_gradients(model, loss)
  loss():backward()
  for name, p in model:named_parameters() do
    local got, n = p.grad:view(-1), p:numel()
    for _, i in ipairs{ 1, 1 + math.floor(n * 0.37), n } do
      local number = p:detach():view(-1):narrow(1, i, 1)
      local keep, h = number:item(), 1e-5
      local function at(v)
        number:fill_(v)
        return lac.no_grad(function() return loss():item() end)
      end
      local slope = (at(keep + h) - at(keep - h)) / (2 * h)
      number:fill_(keep)
      assert.near(slope, got[i]:item(), 1e-8 + 1e-6 * math.abs(slope), name .. "[" .. i .. "]")
    end
  end
end

describe("nn.LongNetEncoder", function()
  it("is not causal, and does not see padding", function()
    local model = nn.LongNetEncoder(options{ vocab = 11 })
    local x, lengths = ids(SOURCE), ids(LENGTHS, "i64")
    local full = model(x, { key_lengths = lengths })
    assert.same({ 2, 7, 8 }, full:size())
    local alone = model(x:narrow(1, 2, 1):narrow(2, 1, 3))
    assert.is_true(distance(full:narrow(1, 2, 1):narrow(2, 1, 3), alone) < 1e-14)
    local keep = lac.tensor({ { true, true, true, true, true, true, true },
                              { true, true, true, false, false, false, false } })
    assert.equal(0, distance(full, model(x, { key_padding = keep })))
    local other = ids{ { 1, 2, 3, 4, 5, 6, 8 } }
    local first = model(x:narrow(1, 1, 1)):narrow(2, 1, 1)
    assert.is_true(distance(model(other):narrow(2, 1, 1), first) > 1e-6)
  end)

  it("takes rows instead of tokens, keeps one input a block if asked, with the same gradients", function()
    local x = lac.randn{ 2, 9, 8, dtype = "f64" }
    local function run(sparing)
      local model = nn.LongNetEncoder(options{ checkpoint_activations = sparing, dropout = 0.1,
                                               positions = "rope" })
      local input = x:detach():requires_grad_(true)
      lac.manual_seed(6)
      model(input):pow(2):mean():backward()
      return input.grad, model.layers[1].ffn.up.weight.grad
    end
    local dx, dw = run(false)
    local sx, sw = run(true)
    assert.equal(0, distance(dx, sx))
    assert.equal(0, distance(dw, sw))
    assert.is_true(dw:abs():max():item() > 0)
  end)

  it("names what is wrong", function()
    local model = nn.LongNetEncoder(options{ vocab = 11 })
    assert.error_matches(function() model(lac.ones{ 2, 3, 8 }) end, "tokens must be %[batch x positions%]")
    assert.error_matches(function() model(ids{ { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 } }) end,
      "13 positions exceed the context of 12")
    assert.error_matches(function() model(ids(SOURCE), { padding = 1 }) end, "unknown option 'padding'")
    local rows = nn.LongNetEncoder(options())
    assert.error_matches(function() rows(ids(SOURCE)) end, "must be %[batch x positions x 8%]")
    assert.error_matches(function() nn.LongNetEncoder{ segments = { 4 }, dilations = { 1 } } end,
      "context is required")
    assert.error_matches(function() nn.LongNetEncoder(options{ causal = true }) end,
      "unknown option 'causal'")
    local rows2 = lac.ones{ 1, 2, 8, dtype = "f64" }
    assert.error_matches(function() model.layers[1](rows2, nil, rows2) end, "has no cross%-attention")
  end)
end)

describe("nn.LongNetClassifier", function()
  it("averages the rows that count", function()
    local model = nn.LongNetClassifier(options{ vocab = 11, classes = 3 })
    local x, lengths = ids(SOURCE), ids(LENGTHS, "i64")
    local both = model(x, { key_lengths = lengths })
    assert.same({ 2, 3 }, both:size())
    assert.is_true(distance(both:narrow(1, 2, 1), model(x:narrow(1, 2, 1):narrow(2, 1, 3))) < 1e-14)
    local keep = lac.arange{ 7 }:view(1, 7):lt(lengths:to{ dtype = "f32" }:view(2, 1))
    assert.equal(0, distance(both, model(x, { key_padding = keep })))
    local first = nn.LongNetClassifier(options{ vocab = 11, classes = 3, pool = "first" })
    local h = first.encoder(x, { key_lengths = lengths })
    local expected = first.head(h:narrow(2, 1, 1):reshape(2, 8))
    assert.equal(0, distance(first(x, { key_lengths = lengths }), expected))
  end)

  it("has the gradients of its loss, and learns which symbol is more frequent", function()
    local small = nn.LongNetClassifier(options{ vocab = 11, classes = 3 })
    check_gradients(small, function()
      return small:loss(ids(SOURCE), ids{ 2, 0 }, { key_lengths = ids(LENGTHS) })
    end)
    local model = nn.LongNetClassifier(options{ vocab = 2, classes = 2, dtype = "f32", layers = 1 })
    local optimizer = lac.optim.adamw(model, { lr = 0.01 })
    local right
    for _ = 1, 60 do
      lac.scope(function()
        local x = lac.rand{ 32, 11 }:gt(0.5)
        local target = x:to{ dtype = "f32" }:mean(2):gt(0.5):to{ dtype = "i64" }
        local loss = model:loss(x:to{ dtype = "i32" }, target)
        loss:backward()
        optimizer:step()
        optimizer:zero_grad()
        local guess = model(x:to{ dtype = "i32" })
        local class = guess:select(2, 2):gt(guess:select(2, 1)):to{ dtype = "i64" }
        right = class:eq(target):to{ dtype = "f32" }:mean():item()
      end)
    end
    assert.is_true(right > 0.9, "right " .. right)
  end)

  it("names what is wrong", function()
    assert.error_matches(function() nn.LongNetClassifier(options{ vocab = 11 }) end, "classes is required")
    assert.error_matches(function()
      nn.LongNetClassifier(options{ vocab = 11, classes = 2, pool = "max" })
    end, "unknown pool 'max'")
  end)
end)

describe("nn.LongNetEncoderDecoder", function()
  local function tiny(more)
    local o = options{ vocab = 9, source_vocab = 11 }
    for name, value in pairs(more or {}) do o[name] = value end
    return nn.LongNetEncoderDecoder(o)
  end
  local tokens = ids{ { 0, 1, 2, 3 }, { 0, 4, 5, 6 } }
  local padded = { key_lengths = ids(LENGTHS, "i64") }

  it("has the gains of the paper, and no LayerNorm inside the cross-attention", function()
    local model = tiny{ width = 64, heads = 4, layers = 3, encoder_layers = 5, ffn = 128 }
    local function deviation(linear) return linear.weight:detach():pow(2):mean():sqrt():item() end
    local xavier = math.sqrt(2 / 128)
    local encoder, decoder = math.sqrt(math.log(9) * math.log(10) / 3), math.sqrt(math.log(9))
    for _, case in ipairs{ { model.encoder.layers[1].attention.out, encoder },
                           { model.layers[1].attention.v, decoder },
                           { model.layers[2].cross.out, decoder }, { model.layers[2].cross.k, 1 } } do
      assert.near(case[2] * xavier, deviation(case[1]), 0.05 * case[2] * xavier)
    end
    local names = {}
    for _, p in ipairs(model.layers[1]:parameter_list()) do names[#names + 1] = p.name end
    local text = table.concat(names, " ")
    assert.matches("norm_cross%.weight norm_cross%.bias cross%.q%.weight", text)
    assert.is_nil(text:find("cross.norm", 1, true))
    assert.matches("attention%.norm%.weight", text)
  end)

  it("is causal in the tokens, sees the whole source, and no padding of it", function()
    local model = tiny()
    local x = ids(SOURCE)
    local before = model(x, tokens, padded)
    local changed = model(x, ids{ { 0, 1, 2, 8 }, { 0, 4, 5, 6 } }, padded)
    assert.equal(0, distance(before:narrow(2, 1, 3), changed:narrow(2, 1, 3)))
    assert.is_true(distance(before, changed) > 1e-6)
    local alone = model(x:narrow(1, 2, 1):narrow(2, 1, 3), tokens:narrow(1, 2, 1))
    assert.is_true(distance(before:narrow(1, 2, 1), alone) < 1e-14)
    local other = model(ids{ { 1, 2, 3, 4, 5, 6, 8 }, SOURCE[2] }, tokens, padded)
    local function first(t) return t:narrow(1, 1, 1):narrow(2, 1, 1) end
    assert.is_true(distance(first(before), first(other)) > 1e-6)
  end)

  it("has the gradients of its loss", function()
    for _, more in ipairs{ {}, { tied = false, positions = "none", cross_segments = { 4 },
                                 cross_dilations = { 2 } } } do
      local model = tiny(more)
      check_gradients(model, function() return model:loss(ids(SOURCE), tokens, tokens, padded) end)
    end
  end)

  it("decodes what the whole pass computes, and generates for a batch as for each alone", function()
    local model = tiny{ dropout = 0.1 }
    local x = ids(SOURCE)
    model:eval()
    local whole = model(x, tokens, padded)
    model:train()
    local given = model:given(x, padded)
    assert.is_true(model.training)
    assert.equal(0, distance(whole, given(tokens)))
    local state = given:cache{ batch = 2 }
    for i = 1, 4 do
      assert.is_true(distance(given:decode(tokens:narrow(2, i, 1), state), whole:narrow(2, i, 1)) < 1e-14)
    end
    local how = { temperature = 0, stop = 7 }
    local both = given:generate({ { 0 }, { 0, 1 } }, 6, how)
    local first = model:given(x:narrow(1, 1, 1)):generate({ 0 }, 6, how)
    local second = model:given(x:narrow(1, 2, 1):narrow(2, 1, 3)):generate({ 0, 1 }, 6, how)
    assert.same({ first, second }, both)
  end)

  it("learns to turn a sequence around", function()
    local model = tiny{ vocab = 6, source_vocab = 6, width = 32, heads = 2, ffn = 64, dtype = "f32",
                        context = 8, segments = { 8 }, dilations = { 1 } }
    local optimizer = lac.optim.adamw(model, { lr = 5e-3 })
    local function batch(n)
      local source, target, input = {}, {}, {}
      for b = 1, n do
        source[b], target[b], input[b] = {}, {}, { 0 }
        for i = 1, 4 do source[b][i] = 1 + math.floor(5 * lac.rand{ 1 }:item()) end
        for i = 1, 4 do target[b][i] = source[b][5 - i] end
        for i = 1, 3 do input[b][i + 1] = target[b][i] end
      end
      return source, input, target
    end
    for step = 1, 400 do
      lac.scope(function()
        local source, input, target = batch(16)
        model:loss(ids(source), ids(input), ids(target)):backward()
        optimizer:step{ clip = 1, factor = 1 - step / 401 } -- or the last steps throw it about
        optimizer:zero_grad()
      end)
    end
    local source, _, target = batch(8)
    local prompts = {}
    for b = 1, 8 do prompts[b] = { 0 } end
    local got, right = model:given(ids(source)):generate(prompts, 4, { temperature = 0 }), 0
    for b = 1, 8 do
      for i = 1, 4 do right = right + (got[b][i] == target[b][i] and 1 or 0) end
    end
    -- chance is 6; sums in another order, which another processor makes, are like another seed
    assert.is_true(right >= 30, right .. " of 32")
  end)

  it("names what is wrong", function()
    local model = tiny()
    local x = ids(SOURCE)
    assert.error_matches(function() model(x, ids{ { 0, 1 } }) end, "source has 2 batch items, tokens have 1")
    assert.error_matches(function() model:loss(x, tokens, ids{ { 0 } }) end, "the same shape")
    assert.error_matches(function() model:given(x):generate({ 0 }, 2) end, "1 prompts for 2 sources")
    assert.error_matches(function() tiny{ cross_segments = { 4 } } end, "come together")
    assert.error_matches(function() model:given(x)(tokens, { last = true }) end, "unknown option 'last'")
    assert.error_matches(function() tiny{ cross_segments = { 4 }, cross_dilations = { 1 } }:given(x) end,
      "each reads the whole memory")
    assert.error_matches(function() model.layers[1](lac.ones{ 1, 2, 8, dtype = "f64" }) end, "needs a memory")
  end)
end)

describe("models of a variant", function()
  it("say where its own options go", function()
    local o = { vocab = 8, layers = 1, width = 8, heads = 2, context = 16, variant = "auto", length = 16 }
    for _, name in ipairs { "LongNetLM", "LongNetEncoder", "LongNetEncoderDecoder" } do
      assert.error_matches(function() nn[name](o) end, name .. ": 'length' is an option of variant 'auto', "
        .. "not of the model: attention = { variant = 'auto', length = 16 }")
    end
    o.attention, o.variant, o.length = { variant = "auto", length = 16 }, nil, nil
    assert.are.equal("auto", nn.LongNetLM(o).layers[1].attention.options.variant)
  end)
end)

describe("the sizes of the paper", function()
  it("have the parameters of their names", function()
    for name, millions in pairs{ ["125M"] = 125, ["350M"] = 350, ["760M"] = 760, ["2.7B"] = 2650 } do
      local function count(layers)
        local n
        lac.scope(function()
          n = nn.LongNetLM{ size = name, context = 32768, vocab = 16, layers = layers,
                            dtype = "bf16" }:parameter_count()
        end)
        return n
      end
      local full = nn.LongNetLM._parts.sized("test", { size = name })
      assert.equal(50304, full.vocab)
      local one = count(1)
      local total = one + (full.layers - 1) * (count(2) - one) + (full.vocab - 16) * full.width
      assert.near(1, total / (millions * 1e6), 0.02, name .. " has " .. total)
    end
  end)

  it("give way to what a script says", function()
    local model = nn.LongNetLM{ size = "125M", context = 64, segments = { 16, 64 }, dilations = { 1, 4 },
                                layers = 1, vocab = 20 }
    local o = model.options
    assert.same({ 768, 12, 1, 20 }, { o.width, o.heads, o.layers, model.vocab })
    assert.same({ 16, 64 }, o.segments)
    assert.error_matches(function() nn.LongNetLM{ size = "1B", context = 8 } end, "unknown size '1B'")
  end)
end)
