--- Decoding: rows that come a few at a time equal the rows of one causal pass.
--
-- The reference is the full pass: of the engine (lac.attend over the whole sequence), whose mathematics
-- attend_spec checks against the oracle, and of the whole model. Random configurations run over every
-- scheme, offset and merge, dedup, window, grouped heads, segments that do not divide anything, and lengths
-- past several borders of segments; the rows arrive as a prompt, one by one, and several at a time. In f64
-- the two must agree to 1e-12; in lower precisions by the tolerance rule, with the naive program's error
-- taken from the oracle in that dtype. What is dropped is really dropped: the cache of a long text is
-- overwritten with NaN where it is not in use, and its size does not grow.

local lac = require "lacuna"
local cases = require "support.cases"
local direct = require "support.attn_direct"
local choices = require "support.random"
local oracle = require "support.oracle"
local nn = lac.nn

local generator = choices.generator()
generator.seed(7)
local random, pick, chance = generator.random, generator.pick, generator.chance

local function valid(c)
  if c.heads == "split" and c.H < #c.segments then return false end
  for g = 1, #c.segments do
    for h = 0, c.H - 1 do
      if oracle.runs(c, g, h) and oracle.offset_of(c, g, h) >= c.segments[g] then return false end
    end
  end
  return true
end

-- a causal configuration; Hk, H, D and the pattern
local function random_config(heads, offset, merge)
  while true do
    local c = { heads = heads, offset = offset, merge = merge, causal = true, Hk = random(3), D = random(12),
      segments = {}, dilations = {} }
    c.H = c.Hk * pick{ 1, 2, 3 }
    for g = 1, random(4) do
      c.segments[g] = chance(0.15) and 1000000007 or random(30)
      c.dilations[g] = chance(0.4) and 1 or random(6)
    end
    if chance(0.3) then c.window = random(20) - 1 end
    c.dedup = merge == "lse" and chance(0.4)
    if valid(c) then return c end
  end
end

local function pattern_of(c)
  return { segments = c.segments, dilations = c.dilations, heads = c.heads, offset = c.offset,
    merge = c.merge,
    causal = true, window = c.window, dedup = c.dedup }
end

local function cache_of(c, batch, dtype, options)
  local o = { decoder = lac.attention.decoder(pattern_of(c), { heads = c.H, kv_heads = c.Hk,
    head_dim = c.D }),
    batch = batch, heads = c.Hk, head_dim = c.D, dtype = dtype, rows = random(8) }
  for name, value in pairs(options or {}) do o[name] = value end
  return nn.KVCache(o)
end

local function text(c)
  return ("%s %s %s segments {%s} dilations {%s} H %d Hk %d D %d window %s dedup %s"):format(c.heads,
    c.offset,
    c.merge, table.concat(c.segments, ","), table.concat(c.dilations, ","), c.H, c.Hk, c.D,
      tostring(c.window),
    tostring(c.dedup))
end

-- a prompt, then single rows and runs of rows, n in all
local function steps(n)
  local list = { random(math.floor(n / 2)) }
  local left = n - list[1]
  while left > 0 do
    local k = math.min(left, chance(0.7) and 1 or random(9))
    list[#list + 1], left = k, left - k
  end
  return list
end

local function largest(t) return t:abs():max():item() end

-- overwrites the rows of a cache that are not in use
local function poison(cache)
  for b = 1, cache.batch do
    local used = cache.positions[b] - cache.starts[b]
    for _, t in ipairs{ cache.k, cache.v } do
      if used < cache.capacity then
        t:narrow(1, b, 1):narrow(3, used + 1, cache.capacity - used):fill_(0 / 0)
      end
    end
  end
end

describe("a decoder", function()
  it("has one plan for all positions", function()
    local pattern = { segments = { 4, 16 }, dilations = { 1, 2 }, causal = true }
    local d = lac.attention.decoder(pattern, { heads = 2, head_dim = 4 })
    local q, k = lac.randn{ 1, 1, 2, 4 }, lac.randn{ 1, 200, 2, 4 }
    d:attend(q, k, k, 199)
    local before = lac.attention.cache()
    for n = 1, 200 do d:attend(q, k:narrow(2, 1, n), k:narrow(2, 1, n), n - 1) end
    lac.attention.decoder(pattern, { heads = 2, head_dim = 4 })
    local after = lac.attention.cache()
    assert.equal(before.misses, after.misses)
    assert.equal(before.size, after.size)
  end)

  it("tells the profiler the pairs that it computes", function()
    local lib = require "lacuna.lib"
    local pattern = { segments = { 8, 24 }, dilations = { 1, 3 }, causal = true }
    local sizes = { heads = 4, kv_heads = 2, head_dim = 5 }
    local d, events = lac.attention.decoder(pattern, sizes), lib.ffi.new("lac_profile_event[16]")
    local function pairs_of(n)
      return n > 0 and lac.attention.plan_info(pattern, { n = n, heads = 4, kv_heads = 2 }).pairs or 0
    end
    for position = 0, 80, 7 do
      local n, start = 3, d:reach(position)
      local q, k = lac.randn{ 2, n, 4, 5 }, lac.randn{ 2, position + n - start, 2, 5 }
      lib.C.lac_profile(1)
      d:attend(q, k, k, position, start)
      lib.C.lac_profile(0)
      local flops, bytes = 0, 0
      for i = 0, tonumber(lib.C.lac_profile_events(0, 16, events)) - 1 do
        if lib.ffi.string(events[i].op) == "attend" then
          flops, bytes = flops + events[i].flops, bytes + tonumber(events[i].bytes)
        end
      end
      assert.equal(4 * 5 * 2 * (pairs_of(position + n) - pairs_of(position)), flops)
      assert.equal(4 * (2 * q:numel() + 2 * k:numel() + 2 * n * 4), bytes)
    end
  end)

  it("knows how far back a query reaches", function()
    local function reach(pattern, position)
      pattern.causal = true
      return lac.attention.decoder(pattern, { heads = 4, head_dim = 1 }):reach(position)
    end
    assert.equal(96, reach({ segments = { 8, 32 }, dilations = { 1, 4 } }, 100))
    assert.equal(100, reach({ segments = { 10, 25, 50 }, dilations = { 1, 1, 1 } }, 100))
    assert.equal(75, reach({ segments = { 10, 25 }, dilations = { 1, 1 } }, 99))
    assert.equal(0, reach({ segments = { 1000 }, dilations = { 3 } }, 999))
    assert.equal(992, reach({ segments = { 1000 }, dilations = { 3 }, window = 7 }, 999))
    assert.equal(1000, reach({ segments = { 1000 }, dilations = { 3 }, window = 7 }, 1000))
    -- against the definition: every key that some query from `position` on attends to
    for _ = 1, 60 do
      local c = random_config(pick{ "all", "split" }, pick{ "mod", "block", "branch" }, "sum")
      c.B, c.N, c.M, c.dedup = 1, 70, 70, false
      local d = lac.attention.decoder(pattern_of(c), { heads = c.H, kv_heads = c.Hk, head_dim = c.D })
      local position, first = random(60), nil
      for n = position, 69 do
        for j = 0, n do
          for g = 1, #c.segments do
            for h = 0, c.H - 1 do
              if (not first or j < first) and oracle.attends(c, g, 0, h, n, j) then first = j end
            end
          end
        end
      end
      assert.is_true(d:reach(position) <= (first or 70), text(c))
    end
  end)

  it("attends without causality too: all keys there are", function()
    local pattern = { segments = { 12, 7 }, dilations = { 2, 1 }, causal = false, merge = "lse" }
    local q, k, v = lac.randn{ 2, 30, 2, 5, dtype = "f64" }, lac.randn{ 2, 30, 2, 5, dtype = "f64" },
      lac.randn{ 2, 30, 2, 5, dtype = "f64" }
    local full, lse = lac.attend(q, k, v, pattern)
    local d = lac.attention.decoder(pattern, { heads = 2, head_dim = 5 })
    for n = 0, 28, 4 do
      local out, part = d:attend(q:narrow(2, n + 1, 2), k, v, n)
      assert.is_true(largest(out - full:narrow(2, n + 1, 2)) < 1e-12)
      assert.is_true(lac.allclose(part, lse:narrow(2, n + 1, 2), { rtol = 1e-12 }))
    end
  end)

  it("names what is wrong", function()
    local d = lac.attention.decoder({ segments = { 8 }, dilations = { 1 }, causal = true },
      { heads = 2, kv_heads = 1, head_dim = 4 })
    local q, k = lac.randn{ 1, 1, 2, 4 }, lac.randn{ 1, 3, 1, 4 }
    local function try(pattern, ...)
      local args = { ... }
      assert.error_matches(function() d:attend(unpack(args, 1, 5)) end, pattern)
    end
    try("the query at position 10 reaches back to position 8, the keys start at 9", q, k, k, 10, 9)
    try("q must be %[1 items, 1 or more rows, 2 heads, 4%], got .*%[1, 1, 1, 4%]", k:narrow(2, 1, 1), k, k, 0)
    try("k must be %[1 items, 1 or more rows, 1 heads, 4%]", q, q, q, 0)
    try("k has 3 rows, v has 2", q, k, k:narrow(2, 1, 2), 0)
    try("q is f32 but k is f64", q, k:to("f64"), k, 0)
    try("position must be a position from 0 to 2%^31 %- 1, or a list of 1 of them, got %-1", q, k, k, -1)
    try("key_start must be a position", q, k, k, 0, {})
    try("got 1 queries from 2147483647 on and 3 keys from 2147483646 on", q, k, k, 2 ^ 31 - 1, 2 ^ 31 - 2)
    try("k must be a tensor", q, nil, k, 0)
    assert.error_matches(function() d:reach(-1) end, "position must be from 0")
    assert.error_matches(function()
      lac.attention.decoder({ segments = { 8 } }, { heads = 1, head_dim = 1 })
    end, "dilations is required")
    assert.error_matches(function()
      lac.attention.decoder({ segments = { 8 }, dilations = { 1 } }, { heads = 1 })
    end, "head_dim is required")
  end)
end)

describe("a KVCache", function()
  it("gives the rows of the full pass, in f64 to 1e-12, for every scheme, offset and merge", function()
    for _, heads in ipairs{ "all", "split" } do
      for _, offset in ipairs{ "mod", "block", "branch" } do
        for _, merge in ipairs{ "mean", "sum", "lse", "lse_detach" } do
          for _ = 1, 6 do
            local c, B, N = random_config(heads, offset, merge), random(2), 40 + random(40)
            local q = lac.randn{ B, N, c.H, c.D, dtype = "f64" }
            local k, v = lac.randn{ B, N, c.Hk, c.D, dtype = "f64" }, lac.randn{ B, N, c.Hk, c.D,
              dtype = "f64" }
            local full, lse = lac.attend(q, k, v, pattern_of(c))
            local cache, at = cache_of(c, B, "f64"), 0
            for _, n in ipairs(steps(N)) do
              poison(cache)
              local function rows(t) return t:narrow(2, at + 1, n) end
              local out, part = cache:attend(rows(q), rows(k), rows(v))
              local error = largest(out - rows(full))
              assert.is_true(error < 1e-12, ("%s: %g at %d + %d"):format(text(c), error, at, n))
              assert.is_true(lac.allclose(part, rows(lse), { rtol = 1e-12, atol = 1e-12 }), text(c))
              at = at + n
            end
            assert.equal(N, cache.positions[1])
          end
        end
      end
    end
  end)

  it("keeps to the tolerance rule in f32, f16 and bf16", function()
    for _, dtype in ipairs{ "f32", "f16", "bf16" } do
      for i = 1, 8 do
        local c = random_config(pick{ "all", "split" }, pick{ "mod", "block", "branch" },
          pick{ "mean", "sum", "lse", "lse_detach" })
        c.B, c.N, c.M = 2, 34, 34
        c = direct.fill(c)
        local nq, nk = c.B * c.N * c.H * c.D, c.B * c.N * c.Hk * c.D
        local function rounded(seed, n)
          local list = direct.numbers(seed, n)
          for j = 1, n do list[j] = cases.round(dtype, list[j]) end
          return list
        end
        local q, k, v = rounded(3 * i, nq), rounded(3 * i + 1, nk), rounded(3 * i + 2, nk)
        local function round(x) return cases.round(dtype, x) end
        local function wide(x) return cases.round("f32", x) end
        local exact = oracle.run(c, q, k, v).out
        local naive = oracle.run(c, q, k, v, nil, nil, { rounding = { result = round, sum = wide } }).out
        local function tensor(list, heads)
          return lac.tensor(list, { dtype = dtype }):view(c.B, c.N, heads, c.D)
        end
        local tq, tk, tv = tensor(q, c.H), tensor(k, c.Hk), tensor(v, c.Hk)
        local cache, at, parts = cache_of(c, c.B, dtype), 0, {}
        for _, n in ipairs(steps(c.N)) do
          poison(cache)
          parts[#parts + 1] = cache:attend(tq:narrow(2, at + 1, n), tk:narrow(2, at + 1, n),
            tv:narrow(2, at + 1, n))
          at = at + n
        end
        local got = lac.cat(parts, 2):to("f64"):view(-1):totable()
        local complaint = cases.compare(dtype, got, exact, naive)
        assert.is_nil(complaint, complaint and text(c) .. ": " .. complaint)
      end
    end
  end)

  it("takes items at positions of their own, each as if alone", function()
    for _ = 1, 30 do
      local c = random_config(pick{ "all", "split" }, pick{ "mod", "block" }, pick{ "mean", "lse" })
      local B, N = 3, 60
      local q = lac.randn{ B, N, c.H, c.D, dtype = "f64" }
      local k, v = lac.randn{ B, N, c.Hk, c.D, dtype = "f64" }, lac.randn{ B, N, c.Hk, c.D, dtype = "f64" }
      local full = lac.attend(q, k, v, pattern_of(c))
      local cache, at = cache_of(c, B, "f64"), { 0, 0, 0 }
      for step = 1, 12 do
        -- row i of the new ones is the item's next; what an item does not have is padding
        local n = step == 1 and 20 or random(3)
        local counts = { n, random(n + 1) - 1, random(n + 1) - 1 }
        local function rows(t)
          local parts = {}
          for b = 1, B do
            parts[b] = t:narrow(1, b, 1):narrow(2, at[b] + 1, n)
            if counts[b] < n then
              parts[b] = parts[b]:clone()
              parts[b]:narrow(2, counts[b] + 1, n - counts[b]):fill_(1e3)
            end
          end
          return lac.cat(parts, 1)
        end
        poison(cache)
        local out = cache:attend(rows(q), rows(k), rows(v), counts)
        for b = 1, B do
          local from, count = at[b] + 1, counts[b]
          if count > 0 then
            local got, want = out:narrow(1, b, 1):narrow(2, 1, count), full:narrow(1, b, 1):narrow(2, from,
              count)
            assert.is_true(largest(got - want) < 1e-12, text(c))
          end
          at[b] = at[b] + count
        end
        assert.same(at, cache.positions)
      end
    end
  end)

  it("holds what can still be attended to, and no more than four times that", function()
    local c = { heads = "all", offset = "mod", merge = "lse", H = 2, Hk = 2, D = 2, segments = { 24, 64,
      100 },
      dilations = { 1, 2, 4 } }
    local cache = cache_of(c, 1, "f32")
    local q = lac.randn{ 1, 1, 2, 2 }
    local long = lac.randn{ 1, 5000, 2, 2 }
    cache:attend(long, long, long)
    for _ = 1, 3000 do cache:attend(q, q, q) end
    assert.is_true(cache.capacity <= 4 * 100, tostring(cache))
    assert.equal(2 * cache.capacity * 2 * 2 * 4, cache:bytes())
    local windowed = cache_of({ heads = "all", offset = "mod", merge = "lse", H = 2, Hk = 2, D = 2,
      segments = { 2 ^ 40 }, dilations = { 1 }, window = 50 }, 1, "f32")
    for _ = 1, 2000 do windowed:attend(q, q, q) end
    assert.is_true(windowed.capacity <= 4 * 51, tostring(windowed))
  end)

  it("rewinds as far as it was told to keep, and says so beyond", function()
    local c = { heads = "all", offset = "mod", merge = "lse", causal = true, H = 2, Hk = 2, D = 3,
      segments = { 8, 16 }, dilations = { 1, 2 } }
    local q, k, v = lac.randn{ 1, 200, 2, 3, dtype = "f64" }, lac.randn{ 1, 200, 2, 3, dtype = "f64" },
      lac.randn{ 1, 200, 2, 3, dtype = "f64" }
    local full = lac.attend(q, k, v, pattern_of(c))
    local cache, at = cache_of(c, 1, "f64", { keep = 5 }), 0
    while at < 150 do
      -- a draft of n rows with other keys is rejected, except for its first rows
      local n = random(5)
      local good = random(n + 1) - 1
      local draft = k:narrow(2, at + 1, n):clone()
      if good < n then draft:narrow(2, good + 1, n - good):fill_(3) end
      poison(cache)
      cache:attend(q:narrow(2, at + 1, n), draft, v:narrow(2, at + 1, n))
      at = at + good
      cache:rewind(at)
      local out = cache:attend(q:narrow(2, at + 1, 1), k:narrow(2, at + 1, 1), v:narrow(2, at + 1, 1))
      at = at + 1
      assert.is_true(largest(out - full:narrow(2, at, 1)) < 1e-12)
    end
    local plain = cache_of(c, 1, "f64")
    plain:attend(q:narrow(2, 1, 16), k:narrow(2, 1, 16), v:narrow(2, 1, 16))
    assert.error_matches(function() plain:rewind(15) end,
      "cannot rewind item 1 to position 15: it reaches back to 0, and only rows from 16 on are kept; "
      .. "make the cache with keep = 1 or more")
    assert.error_matches(function() plain:rewind(17) end,
      "from 0 to the present one %(16 for item 1%), got 17")
  end)

  it("lives as long as it was made for, whatever scopes it is used in", function()
    local c = { heads = "all", offset = "mod", merge = "lse", H = 1, Hk = 1, D = 2, segments = { 512 },
      dilations = { 1 } }
    collectgarbage()
    collectgarbage()
    local live = lac.memory(lac.default_device()).live
    lac.scope(function()
      local cache = cache_of(c, 2, "f32", { rows = 1 })
      for _ = 1, 70 do
        lac.scope(function()
          local q = lac.randn{ 2, 1, 1, 2 }
          cache:attend(q, q, q)
        end)
      end
      lac.scope(function() cache:select{ 2 } end)
      assert.equal(1, cache.batch)
      local q = lac.randn{ 1, 1, 1, 2 }
      cache:attend(q, q, q)
      assert.same({ 71 }, cache.positions)
    end)
    assert.equal(live, lac.memory(lac.default_device()).live)
  end)

  it("names what is wrong", function()
    local c = { heads = "all", offset = "mod", merge = "lse", H = 2, Hk = 1, D = 4, segments = { 8 },
      dilations = { 1 } }
    local cache = cache_of(c, 2, "f32")
    local q, k = lac.randn{ 2, 3, 2, 4 }, lac.randn{ 2, 3, 1, 4 }
    assert.error_matches(function() cache:attend(q, k:to("f64"), k) end,
      "k and v must be f32 %[2 x rows x 1 x 4%]")
    assert.error_matches(function() cache:attend(q, q, q) end, "k and v must be")
    assert.error_matches(function() cache:attend(q:narrow(2, 1, 2), k, k) end, "with the rows of k")
    assert.error_matches(function() cache:attend(q, k, k, { 1 }) end, "counts must be a list of 2 numbers")
    assert.error_matches(function() cache:attend(q, k, k, { 1, 4 }) end,
      "counts%[2%] must be from 0 to the 3 new rows, got 4")
    assert.error_matches(function() cache:select{ 3 } end, "items%[1%] must be at most 2")
    assert.error_matches(function() return cache.position end, "did you mean 'positions'")
    local open = nn.MultiheadDilatedAttention{ embed_dim = 8, heads = 2, segments = { 4 }, dilations = { 1 } }
    assert.error_matches(function() open:cache() end, "only causal attention can be decoded row by row")
  end)
end)

describe("a product of few rows", function()
  it("gives a row the bits that it gets alone, on any number of threads #cpu", function()
    local threads = lac.threads()
    for _, dtype in ipairs{ "f64", "f32", "f16", "bf16" } do
      for _, sizes in ipairs{ { 1, 1 }, { 3, 5 }, { 64, 130 }, { 129, 64 }, { 700, 1000 } } do
        local w, bias = lac.randn({ sizes[2], sizes[1] }, { dtype = dtype }), lac.randn({ sizes[2] },
          { dtype = dtype })
        local x = lac.randn({ 8, sizes[1] }, { dtype = dtype })
        lac.threads(1)
        local all = lac.linear(x, w, bias)
        lac.threads(3)
        assert.is_true(lac.equal(all, lac.linear(x, w, bias)))
        for m = 1, 8 do
          assert.is_true(lac.equal(all:narrow(1, m, 1), lac.linear(x:narrow(1, m, 1), w, bias)))
          assert.is_true(lac.equal(all:narrow(1, 1, m), lac.linear(x:narrow(1, 1, m), w, bias)))
        end
        -- strided rows of x are read like dense ones
        assert.is_true(lac.equal(all, lac.linear(x:transpose(1, 2):contiguous():transpose(1, 2), w, bias)))
        -- against the product in f64
        local exact = lac.matmul(x:to("f64"), w:to("f64"):transpose(1, 2)) + bias:to("f64")
        local scale = lac.matmul(x:to("f64"):abs(), w:to("f64"):abs():transpose(1, 2)) + bias:to("f64"):abs()
        -- K + 1 additions in the type of computation, then one rounding to dtype
        local unit = (sizes[1] + 1) * cases.epsilon(dtype == "f64" and "f64" or "f32") + cases.epsilon(dtype)
        assert.is_true(((all:to("f64") - exact):abs() - scale * unit):max():item() <= 0, dtype)
      end
    end
    lac.threads(threads)
  end)
end)

-- ---- models -----------------------------------------------------------------------------------------------

local function tiny(change)
  local o = { vocab = 13, layers = 2, width = 8, heads = 2, context = 48, segments = { 5, 16, 48 },
    dilations = { 1, 2, 3 }, ffn = 12, dtype = "f64" }
  for name, value in pairs(change or {}) do o[name] = value end
  return nn.LongNetLM(o)
end

local function tokens(B, N, vocab)
  return lac.randint{ B, N, high = vocab, dtype = "i32" }
end

describe("LongNetLM", function()
  it("decodes to the logits of forward", function()
    for _, change in ipairs{ {}, { positions = "rope", fused = true, kv_heads = 1 }, { positions = "none",
      tied = false },
      { scheme = "split", heads = 4, segments = { 7, 20 }, dilations = { 1, 3 } }, { merge = "mean" },
      { dedup = true, window = 9 }, { merge = "sum", offset = "block" } } do
      local model = tiny(change)
      local x = tokens(2, 48, 13)
      local full = model(x)
      local cache, at = model:cache{ batch = 2 }, 0
      for _, n in ipairs(steps(48)) do
        local got = model:decode(x:narrow(2, at + 1, n), cache)
        assert.is_true(largest(got - full:narrow(2, at + 1, n)) < 1e-12)
        at = at + n
      end
      assert.same({ 48, 48 }, cache:positions())
      local last = model:decode(x, cache:reset(), { logits = "last" })
      assert.is_true(largest(last - full:narrow(2, 48, 1)) < 1e-12)
      assert.is_true(largest(model(x, { logits = "last", counts = { 48, 7 } }):narrow(1, 2, 1)
        - full:narrow(1, 2, 1):narrow(2, 7, 1)) < 1e-12)
    end
  end)

  it("says what decode cannot do", function()
    local model = tiny{ dropout = 0.1 }
    local cache = model:cache()
    local x = tokens(1, 3, 13)
    assert.error_matches(function() model:decode(x, cache) end,
      "training mode with dropout 0.1; call eval%(%) first")
    model:eval()
    assert.error_matches(function() model:decode(x, {}) end, "expected a cache made by model:cache{}")
    assert.error_matches(function() model:decode(tokens(2, 3, 13), cache) end,
      "tokens have 2 batch items, the cache has 1")
    assert.error_matches(function() model:decode(x, cache, { counts = { 4 } }) end,
      "counts%[1%] must be at most 3")
    model:decode(tokens(1, 46, 13), cache)
    assert.error_matches(function() model:decode(x, cache) end,
      "3 tokens after the 46 of item 1 exceed the context of 48")
    assert.is_false(model:decode(tokens(1, 2, 13), cache).requires_grad)
    assert.matches("ModelCache%(2 layers, batch 1, position 48", tostring(cache))
  end)
end)

describe("generate", function()
  local function repeated(list, n)
    local result = {}
    for i = 1, n do result[i] = list[(i - 1) % #list + 1] end
    return result
  end

  it("gives the same tokens with the cache and without, also past the end of the context", function()
    for _, change in ipairs{ {}, { scheme = "split", heads = 4, segments = { 7, 20 }, dilations = { 1, 3 } },
      { positions = "rope", window = 10 } } do
      local model = tiny(change)
      for _, o in ipairs{ { temperature = 0 }, { seed = 3 }, { seed = 4, top_k = 5, stride = 1 },
        { seed = 5, top_p = 0.8, stride = 48 }, { seed = 6, min_p = 0.1, repetition_penalty = 1.3,
          stride = 7 } } do
        for _, length in ipairs{ 1, 20, 47, 48, 49, 120 } do
          local prompt = repeated({ 1, 5, 7, 2, 12 }, length)
          o.cache, o.logprobs = true, true
          local with, info = model:generate(prompt, 60, o)
          o.cache = false
          local without, plain = model:generate(prompt, 60, o)
          assert.same(without, with)
          for i = 1, 60 do assert.near(plain.logprobs[i], info.logprobs[i], 1e-10) end
        end
      end
    end
  end)

  it("continues every prompt of a batch as it would alone", function()
    local model = tiny()
    local prompts = { { 1, 2, 3 }, repeated({ 4, 9 }, 40), { 7 }, repeated({ 3, 8, 11 }, 90) }
    for _, o in ipairs{ { temperature = 0 }, { seed = 11, top_p = 0.9 }, { seed = 2, stop = { 5, { 3, 1 } } },
      { seed = { 5, 5, 9, 1 }, temperature = 1.5 } } do
      local all, infos = model:generate(prompts, 50, o)
      for b, prompt in ipairs(prompts) do
        local alone = {}
        for name, value in pairs(o) do alone[name] = value end
        alone.seed = type(o.seed) == "table" and o.seed[b] or (o.seed or 0) + b - 1
        local one, info = model:generate(prompt, 50, alone)
        assert.same(one, all[b])
        assert.equal(info.stop, infos[b].stop)
      end
    end
    local bytes = nn.LongNetLM{ layers = 1, width = 8, heads = 2, context = 16, segments = { 8 },
      dilations = { 1 } }
    local texts = bytes:generate({ "ab", "abcde" }, 7)
    assert.equal(7, #texts[1])
    assert.equal(texts[2], (bytes:generate("abcde", 7, { seed = 1 })))
  end)

  it("takes tokens as tensors", function()
    local model, list = tiny(), { { 1, 2, 3 }, { 4, 5, 6 } }
    local both = lac.tensor(list, { dtype = "i64" })
    assert.are.same(model:generate(list, 5, { seed = 1 }), (model:generate(both, 5, { seed = 1 })))
    assert.are.same(model:generate(list[2], 5), (model:generate(both[2]:int(), 5)))
  end)

  it("stops at a token or a text, calls back, and tells why it ended", function()
    local model = tiny()
    local free = model:generate({ 1, 2 }, 40, { seed = 1 })
    local stop = { free[9], free[10] }
    local first
    for i = 2, 40 do
      if free[i - 1] == stop[1] and free[i] == stop[2] then first = first or i end
    end
    local some, info = model:generate({ 1, 2 }, 40, { seed = 1, stop = { stop } })
    assert.equal(first, #some)
    assert.equal("stop", info.stop)
    assert.equal(("generated %d tokens, ended by stop"):format(first), tostring(info))
    assert.same(some, info.tokens)
    local seen = {}
    local cut, cut_info = model:generate({ { 1, 2 }, { 1, 2 } }, 40, { seed = { 1, 1 }, logprobs = true,
      on_token = function(token, item, logprob)
        assert.is_true(logprob < 0)
        seen[item] = seen[item] or {}
        table.insert(seen[item], token)
        return item == 2 or #seen[item] < 4
      end })
    assert.same({ unpack(free, 1, 4) }, cut[1])
    assert.same(free, cut[2])
    assert.same(seen, cut)
    assert.equal("on_token", cut_info[1].stop)
    assert.equal("length", cut_info[2].stop)
  end)

  it("returns the model's own log-probabilities", function()
    local model = tiny()
    local out, info = model:generate({ 3, 1 }, 20, { seed = 2, temperature = 0.5, top_k = 4,
      logprobs = true })
    local all = { 3, 1 }
    for _, t in ipairs(out) do all[#all + 1] = t end
    local logp = model(lac.tensor({ all }, { dtype = "i32" })):log_softmax(-1):totable()[1]
    for i = 1, 20 do assert.near(logp[i + 1][out[i] + 1], info.logprobs[i], 1e-12) end
  end)

  it("leaves nothing behind and restores the mode, also after an error", function()
    local model = tiny()
    model:generate({ 1 }, 3)
    collectgarbage() collectgarbage()
    local before = lac.memory(lac.default_device()).live
    model:generate({ { 1 }, { 2, 3 } }, 30, { stop = 4 })
    assert.error_matches(function()
      model:generate({ 1 }, 30, { on_token = function() error("enough", 0) end })
    end, "enough")
    collectgarbage() collectgarbage()
    assert.equal(before, lac.memory(lac.default_device()).live)
    assert.is_true(model.training)
  end)

  it("names what is wrong", function()
    local model = tiny()
    local function try(pattern, prompt, o)
      assert.error_matches(function() model:generate(prompt, 2, o) end, pattern)
    end
    try("prompt%[2%] must not be empty", { { 1 }, {} })
    try("prompt%[2%]%[1%] must be a token from 0 to 12, got 13", { { 1 }, { 13 } })
    try("stop%[1%] must not be empty", { 1 }, { stop = { "" } })
    try("stop must be a token, a string or a list of them, got {}", { 1 }, { stop = {} })
    try("stop%[1%]%[1%] must be a token from 0 to 12, got 99", { 1 }, { stop = 99 })
    try("seed must be one number or one for each of the 1 prompts, got {1, 2}", { 1 }, { seed = { 1, 2 } })
    try("stride 49 must not exceed the context of 48", { 1 }, { stride = 49 })
    try("top_p must be above 0, got 0", { 1 }, { top_p = 0 })
    try("did you mean 'temperature'", { 1 }, { temprature = 1 })
    try("the prompt must be a string or a list of tokens, or a list of prompts, got a function", print)
    assert.error_matches(function()
      nn.LongNetLM{ vocab = 300, layers = 1, width = 8, heads = 2, context = 6, segments = { 6 },
        dilations = { 1 } }:generate("a", 1)
    end, "a model of vocabulary 300 does not speak bytes")
  end)
end)
