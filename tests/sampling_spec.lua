--- Sampling: what the filters leave and how often each token is drawn.
--
-- A draw is a function of the logits and one number in [0, 1), so nothing here needs luck: a fine grid of
-- numbers gives the exact share of every token, and that share is compared with probabilities from a plain
-- reference that sorts everything. The grid has `GRID` points, so a share can be off by two of them at most.

local lac = require "lacuna"
local nn = lac.nn

local GRID = 4000

-- probabilities by the definitions, with a sort: penalty, temperature, top_k, top_p, min_p
local function reference(logits, o, seen)
  local list = {}
  for i, x in ipairs(logits) do
    local penalty = o.repetition_penalty
    if penalty and seen and seen[i - 1] then x = x > 0 and x / penalty or x * penalty end
    list[i] = { token = i - 1, p = x / (o.temperature or 1) }
  end
  table.sort(list, function(a, b)
    if a.p ~= b.p then return a.p > b.p end
    return a.token < b.token
  end)
  local top = list[1].p
  local function normalise(n)
    local sum = 0
    for i = 1, n do sum = sum + list[i].p end
    for i = 1, #list do list[i].p = i <= n and list[i].p / sum or 0 end
  end
  for _, c in ipairs(list) do c.p = math.exp(c.p - top) end
  normalise(math.min(o.top_k or #list, #list))
  if o.top_p then
    local sum, n = 0, 0
    repeat
      n = n + 1
      sum = sum + list[n].p
    until sum >= o.top_p - 1e-12 or n == #list
    normalise(n)
  end
  if o.min_p then
    local n = 1
    while n < #list and list[n + 1].p >= o.min_p * list[1].p do n = n + 1 end
    normalise(n)
  end
  local result = {}
  for _, c in ipairs(list) do result[c.token + 1] = c.p end
  return result, list
end

local function shares(sampler, logits, seen)
  local result = {}
  for i = 1, #logits do result[i] = 0 end
  local row = lac.tensor(logits, { dtype = "f64" })
  for i = 0, GRID - 1 do
    local token = sampler:draw(row, (i + 0.5) / GRID, seen)
    result[token + 1] = result[token + 1] + 1 / GRID
  end
  return result
end

describe("a sampler", function()
  local logits = { 0.3, -1, 2.1, 2.1, -math.huge, 0.9, 1.7, -3, 0.31, 1.1 }
  local seen = { [2] = true, [7] = true, [6] = true }

  it("draws every token as often as its probability says", function()
    for _, o in ipairs{ {}, { temperature = 0.5 }, { temperature = 3 }, { top_k = 1 }, { top_k = 3 },
      { top_k = 100 },
      { top_p = 0.3 }, { top_p = 0.9 }, { top_p = 1 }, { min_p = 0.2 }, { min_p = 1 }, { min_p = 0 },
      { top_k = 4, top_p = 0.7 }, { top_k = 5, min_p = 0.3 }, { top_p = 0.95, min_p = 0.25,
        temperature = 1.5 },
      { top_k = 6, top_p = 0.9, min_p = 0.1, temperature = 0.7, repetition_penalty = 1.4 },
      { repetition_penalty = 1.2 }, { repetition_penalty = 0.5 } } do
      local sampler = nn.Sampler(#logits, o)
      local want, got = reference(logits, o, seen), shares(sampler, logits, seen)
      for i = 1, #logits do
        assert.is_true(math.abs(want[i] - got[i]) <= 2 / GRID,
          ("%s, token %d: %g instead of %g"):format(tostring(sampler), i - 1, got[i], want[i]))
        if want[i] == 0 then assert.equal(0, got[i]) end
      end
    end
  end)

  it("goes from the most likely token down, so that u = 0 is greedy and equal tokens rank by number",
    function()
    local row = lac.tensor(logits, { dtype = "f64" })
    for _, o in ipairs{ {}, { top_k = 5 }, { top_p = 0.5 }, { min_p = 0.1 }, { temperature = 0 } } do
      assert.equal(2, nn.Sampler(#logits, o):draw(row, 0))
    end
    local sampler, _, list = nn.Sampler(#logits), reference(logits, {})
    local u = 0
    for i = 1, 9 do
      assert.equal(list[i].token, sampler:draw(row, u + list[i].p / 2))
      u = u + list[i].p
    end
    -- also at the very end, where rounding decides, a token of probability 0 is never drawn
    assert.equal(7, sampler:draw(row, 1 - 2 ^ -53))
    assert.equal(7, nn.Sampler(#logits, { top_k = 10 }):draw(row, 1 - 2 ^ -53))
  end)

  it("agrees with the reference on many tokens", function()
    lac.manual_seed(8) -- how many tokens a filter leaves depends on the draw
    local n, many = 3000, {}
    local values = lac.randn({ n }, { dtype = "f64" })
    for i, x in ipairs(values:totable()) do many[i] = 4 * x end
    local row = lac.tensor(many, { dtype = "f64" })
    for _, o in ipairs{ {}, { top_k = 50 }, { top_p = 0.9 }, { min_p = 0.01 } } do
      local sampler, p, list = nn.Sampler(n, o), reference(many, o)
      local u, hits = 0, 0
      for i = 1, n do
        if list[i].p > 1e-9 then
          hits = hits + 1
          assert.equal(list[i].token, sampler:draw(row, u + list[i].p / 2))
        end
        u = u + list[i].p
      end
      assert.is_true(hits > 5 and p[1] ~= nil)
    end
  end)

  it("knows the log-probability of a token, whatever its options", function()
    local want = lac.tensor(logits, { dtype = "f64" }):log_softmax(1):totable()
    local sampler = nn.Sampler(#logits, { temperature = 0.1, top_k = 2 })
    for i = 1, #logits do
      local got = sampler:log_probability(lac.tensor(logits, { dtype = "f64" }), i - 1)
      if want[i] == -math.huge then assert.equal(want[i], got) else assert.near(want[i], got, 1e-14) end
    end
  end)

  it("refuses options that are written into it, where they would change nothing", function()
    local sampler = lac.nn.Sampler(4)
    assert.error_matches(function() sampler.temperature = 0 end,
      "Sampler: there is no field 'temperature' to set; ")
    local scaler = lac.optim.loss_scaler()
    assert.error_matches(function() scaler.growth = 4 end, "LossScaler: there is no field 'growth' to set; ")
    scaler.value = 8
    assert.equal(8, scaler.value)
  end)

  it("names what is wrong", function()
    local function try(pattern, values, o, u)
      assert.error_matches(function()
        nn.Sampler(#values, o):draw(lac.tensor(values, { dtype = "f64" }), u or 0.5)
      end, pattern)
    end
    try("the logit of token 1 is nan", { 1, 0 / 0 })
    try("no token is possible: all logits are %-inf", { -math.huge, -math.huge })
    try("the logit of token 1 is infinite", { 1, math.huge })
    try("u must be in %[0, 1%), got 1", { 1, 2 }, nil, 1)
    try("top_k must be positive, got 0", { 1 }, { top_k = 0 })
    try("top_p must be at most 1, got 1.5", { 1 }, { top_p = 1.5 })
    try("min_p must be at least 0", { 1 }, { min_p = -1 })
    try("repetition_penalty must be above 0, got 0", { 1 }, { repetition_penalty = 0 })
    try("temperature must be finite, got inf", { 1 }, { temperature = math.huge })
    assert.error_matches(function() nn.Sampler(3):draw(lac.ones{ 2 }, 0) end,
      "expected 3 logits, got Tensor f32 %[2%]")
    assert.error_matches(function() nn.Sampler(3):draw({ 1, 2, 3 }, 0) end, "logits must be a tensor")
    assert.error_matches(function() nn.Sampler(3):log_probability(lac.ones{ 3 }, 3) end,
      "token must be at most 2")
  end)
end)
