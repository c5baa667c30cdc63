--- data_spec.lua: windows, order, splits and the baselines.
--
-- The order of batches is checked by its properties (a permutation per pass, a pure function of seed and
-- number, all windows inside, different seeds differ), the order-2 model against probabilities worked out
-- with Lua tables and by summing to one, xz against a fact about repeated text.

local lac = require "lacuna"
local data = lac.data

local function text_of(n)
  local t, state = {}, 7
  for i = 1, n do
    state = (state * 16807) % 2147483647
    t[i] = string.char(97 + state % 7)
  end
  return table.concat(t)
end

describe("data", function()
  it("maps a file, slices and splits it without a copy", function()
    local path = os.tmpname()
    local file = io.open(path, "wb")
    file:write("hello world")
    file:close()
    local bytes = lac.scope(function() return data.open(path) end) -- must outlive the scope
    os.remove(path)
    assert.equal(11, bytes.size)
    assert.equal("hello world", bytes:text())
    local train, held = bytes:split{ held_out = 5 }
    assert.equal("hello ", train:text())
    assert.equal("world", held:text())
    assert.equal("wor", held:slice(1, 3):text())
    local half = select(2, bytes:split{ held_out = 0.5 })
    assert.equal(5, half.size)
  end)

  it("names what is wrong", function()
    assert.error_matches(function() data.open("/nonexistent") end, "data%.open: cannot read /nonexistent")
    assert.error_matches(function() data.open(os.tmpname()) end, "is empty")
    local bytes = data.string("0123456789")
    assert.error_matches(function() bytes:slice(0, 3) end, "slice %[0, 3%] is outside the 10 bytes")
    assert.error_matches(function() bytes:slice(1, 11) end, "outside")
    assert.error_matches(function() bytes:split{ held_out = 9 } end, "do not leave two parts")
    assert.error_matches(function() bytes:split{ heldout = 2 } end, "did you mean 'held_out'")
    assert.error_matches(function() bytes:batch(1, { batch = 1, context = 10 }) end,
      "context 10 needs 11 bytes")
    assert.error_matches(function() bytes:batch(0, { batch = 1, context = 3 }) end, "numbered from 1")
    assert.error_matches(function() bytes:batch(1, { batch = 0, context = 3 }) end, "batch must be positive")
    assert.error_matches(function() bytes:tensors({ 6 }, 4) end, "starts%[1%] must be at most 5, got 6")
    assert.error_matches(function() bytes:tensors({ 0 / 0 }, 4) end,
      "starts%[1%] must be an integer, got nan")
    assert.error_matches(function() bytes:tensors({ 0 }, 0) end, "context must be positive")
    assert.error_matches(function() data.order2(bytes):probability(1, 2, 256) end, "s must be at most 255")
    assert.error_matches(function() data.order2("text") end, "expected bytes")
    assert.error_matches(function() data.xz_size(bytes, 3) end, "expected bytes .*got 3")
    assert.error_matches(function() bytes:windows{ batch = 1, context = 3, stride = 4 } end,
      "stride 4 exceeds context 3")
  end)

  it("gives tokens and the bytes after them", function()
    local bytes = data.string("abcdefghijkl")
    local tokens, targets = bytes:batch(1, { batch = 2, context = 4, seed = 3 })
    assert.equal("i32", tokens:dtype())
    assert.same({ 2, 4 }, { tokens:size(1), tokens:size(2) })
    local x, y = tokens:totable(), targets:totable()
    for b = 1, 2 do
      for t = 1, 4 do
        assert.equal(x[b][1] + t - 1, x[b][t])
        assert.equal(x[b][t] + 1, y[b][t])
      end
    end
  end)

  it("permutes: every value once, for sizes round powers of two", function()
    for _, n in ipairs{ 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000 } do
      for seed = 0, 2 do
        local seen = {}
        for i = 0, n - 1 do
          local j = data._permute(i, n, seed, 1)
          assert.is_true(j >= 0 and j < n and j % 1 == 0)
          assert.is_nil(seen[j])
          seen[j] = true
        end
      end
    end
  end)

  it("orders batches by seed and number alone, and uses every window once a pass", function()
    local bytes = data.string(text_of(1003))
    local options = { batch = 3, context = 10, seed = 5 }
    local again = bytes:window_starts(7, options)
    local seen, last = {}, 1003 - 10 - 1
    local windows = math.floor(last / 10) -- 99 windows: 33 batches of 3 are one pass
    assert.equal(99, windows)
    local phase
    for k = 1, 33 do
      for _, p in ipairs(bytes:window_starts(k, options)) do
        assert.is_true(p >= 0 and p <= last)
        phase = phase or p % 10
        assert.equal(phase, p % 10)
        assert.is_nil(seen[p])
        seen[p] = true
      end
    end
    assert.same(again, bytes:window_starts(7, options))
    assert.not_same(again, bytes:window_starts(7, { batch = 3, context = 10, seed = 6 }))
    assert.not_same(bytes:window_starts(1, options), bytes:window_starts(34,
      options)) -- the next pass differs
    assert.not_same(bytes:window_starts(1, { batch = 3, context = 10, seed = 2 ^ 40 }),
      bytes:window_starts(1, { batch = 3, context = 10, seed = 0 }))
  end)

  it("fits windows into texts of every small size", function()
    for size = 5, 40 do
      local bytes = data.string(text_of(size))
      for k = 1, 20 do
        for _, p in ipairs(bytes:window_starts(k, { batch = 2, context = 4, seed = k })) do
          assert.is_true(p >= 0 and p + 5 <= size)
        end
      end
    end
  end)

  it("evaluates every byte but the first exactly once, whatever the stride", function()
    local text = text_of(103)
    local bytes = data.string(text)
    for _, o in ipairs{ { 10 }, { 10, 5 }, { 10, 3 }, { 7, 7 }, { 102 }, { 200 }, { 1 }, { 102, 1 } } do
      local seen, total = {}, 0
      for tokens, targets, count in bytes:windows{ batch = 4, context = o[1], stride = o[2] } do
        local x, y = tokens:totable(), targets:totable()
        total = total + count
        for b = 1, #x do
          -- find the place by the whole window, as text
          local window = {}
          for t = 1, #x[b] do window[t] = string.char(x[b][t]) end
          window = table.concat(window)
          local scored = 0
          for t = 1, #y[b] do
            if y[b][t] >= 0 then scored = scored + 1 end
          end
          assert.is_truthy(text:find(window, 1, true))
          seen[#seen + 1] = scored
        end
      end
      assert.equal(102, total)
      local sum = 0
      for _, n in ipairs(seen) do sum = sum + n end
      assert.equal(102, sum)
    end
  end)

  it("ignores exactly the targets that an earlier window counted", function()
    local bytes = data.string("abcdefgh")
    local rows = {}
    for _, targets in bytes:windows{ batch = 1, context = 4,
      stride = 2 } do rows[#rows + 1] = targets:totable()[1] end
    assert.same({ { 98, 99, 100, 101 }, { -100, -100, 102, 103 }, { -100, -100, -100, 104 } }, rows)
  end)

  it("order-2 probabilities are those of Witten-Bell interpolation", function()
    local text = "abracadabra"
    local model = data.order2(data.string(text))
    local a, b, r, c = ("a"):byte(), ("b"):byte(), ("r"):byte(), ("c"):byte()
    local p0 = function(n) return (n + 1) / (11 + 256) end
    -- after "b": r twice; after "ab": r twice
    local p1 = (2 + 1 * p0(2)) / (2 + 1)
    assert.near((2 + 1 * p1) / (2 + 1), model:probability(a, b, r), 1e-15)
    -- after "a": b twice, c, d once: 4 occurrences, 3 kinds; context "ra" was followed by c once
    local pa = (1 + 3 * p0(1)) / (4 + 3)
    assert.near((1 + 1 * pa) / (1 + 1), model:probability(r, a, c), 1e-15)
    -- an unseen context of two falls back on one, an unseen one on none
    assert.near((2 + 1 * p0(2)) / 3, model:probability(0, b, r), 1e-15)
    assert.near(p0(0), model:probability(0, 1, 2), 1e-15)
    for _, context in ipairs{ { a, b }, { r, a }, { 0, b }, { 0, 1 } } do
      local total = 0
      for s = 0, 255 do total = total + model:probability(context[1], context[2], s) end
      assert.near(1, total, 1e-12)
    end
  end)

  it("order-2 bits are the mean of -log2 over every byte but the first", function()
    local model = data.order2(data.string("abracadabra"))
    local held, total = "abz", 0
    total = total - math.log(model:probability(nil, 97, 98)) - math.log(model:probability(97, 98, 122))
    local bits, count = model:bits_per_byte(data.string(held))
    assert.near(total / math.log(2) / 2, bits, 1e-12)
    assert.equal(2, count)
  end)

  it("asks xz", function()
    local once = data.string(text_of(5000))
    local alone = data.xz_size(once)
    assert.is_true(alone > 1500 and alone < 3000) -- log2(7)/8 of 5000 is 1755
    assert.is_true(data.xz_size(once, once) < alone + 200)
  end)
end)
