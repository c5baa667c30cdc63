--- Decoding with active blocks: rows that come a few at a time equal the rows of one causal pass.
--
-- The full pass is the reference (sparse_spec.lua checks it against masks written out). Every kind of pattern
-- that is known before the length is, alone and composed, over every kind of variant inside; rows arrive as a
-- prompt, one by one, and several at a time over borders of blocks. What is dropped is really dropped: space
-- that is not in use is overwritten with NaN, and does not grow with the text.

local lac = require "lacuna"
local masks = require "lacuna.attention.masks"
local nn = lac.nn

local H, D, BLOCK = 4, 4, 16

local function far(a, b) return lac.where(a:eq(b), 0, a - b):abs():max():item() end
local function randn(...) return lac.randn({ ... }, { dtype = "f64" }) end

local PATTERNS = {
  masks.local_window(32) + masks.global_tokens(16), masks.diagonal(), masks.full(),
  masks.dilated_sparse { 1, 3 }, masks.axial(3), masks.global_local(20, 64) - masks.dilated_sparse { 2 },
  masks.hierarchical { { stride = 16, window = 16 }, { stride = 48, window = 64 } },
  masks.hierarchical { { stride = 64, window = -1 } } + masks.diagonal(),
  masks.axial(2) * masks.local_window(96) + masks.diagonal(),
  masks.per_head { masks.local_window(32), masks.global_tokens(16) + masks.diagonal(), masks.full() },
}
local INSIDE = {
  { of = "dense" }, { of = "dense", window = 21 },
  { of = "longnet", segments = { 24, 100 }, dilations = { 1, 3 } },
  { of = "dilated", segments = { 24, 100 }, dilations = { 1, 3 } },
  { of = "custom", segments = { 24, 100, 500 }, dilations = { 1, 2, 5 }, merge = "mean" },
  { of = "custom", segments = { 24, 100 }, dilations = { 1, 2 }, merge = "lse_detach", offset = "block" },
  { variant = "ring", of = "longnet", segments = { 24, 100 }, dilations = { 1, 3 }, ranks = 3 },
}

local function make(pattern, more)
  local o = { variant = "block_sparse", heads = H, kv_heads = 2, block = BLOCK, causal = true,
    pattern = pattern }
  for name, value in pairs(more or {}) do o[name] = value end
  return lac.attention(o)
end

local function cache_of(attn, batch, more)
  local o = { decoder = attn:decoder(D), batch = batch, heads = attn.options.kv_heads, head_dim = D,
    dtype = "f64", rows = 5 }
  for name, value in pairs(more or {}) do o[name] = value end
  return nn.BlockCache(o)
end

-- what is not in use must not matter
local function poison(cache)
  for _, store in ipairs(cache.stores) do
    for _, name in ipairs { "k", "v" } do
      if store.used < store.capacity then
        store[name]:narrow(3, store.used + 1, store.capacity - store.used):fill_(0 / 0)
      end
    end
  end
end

local function decode(cache, q, k, v, at, n)
  local function part(t) return t:narrow(2, at + 1, n) end
  poison(cache)
  return cache:attend(part(q), part(k), part(v))
end

describe("decoding with active blocks", function()
  for number, pattern in ipairs(PATTERNS) do
    it("gives the rows of the full pass: " .. tostring(pattern), function()
      lac.manual_seed(number)
      for i, inside in ipairs(INSIDE) do
        local attn = make(pattern, inside)
        local n = 150
        local q, k, v = randn(2, n, H, D), randn(2, n, 2, D), randn(2, n, 2, D)
        local out, lse = attn(q, k, v)
        local cache, at = cache_of(attn, 2), 0
        local steps = (i + number) % 2 == 0 and { 40, 1, 1, 7, 30, 1, 20, 50 } or { 1, 1, 30, 5, 60, 53 }
        for _, count in ipairs(steps) do
          local a, b = decode(cache, q, k, v, at, count)
          assert.is_true(far(a, out:narrow(2, at + 1, count)) < 1e-12, ("inside %d at %d"):format(i, at))
          assert.is_true(far(b, lse:narrow(2, at + 1, count)) < 1e-12, ("inside %d at %d"):format(i, at))
          at = at + count
        end
        assert.equal(n, at)
      end
    end)
  end

  it("honours slopes and scale of the object", function()
    lac.manual_seed(3)
    for _, inside in ipairs { INSIDE[1], INSIDE[3] } do
      local o = { alibi = true, scale = 0.9 }
      for name, value in pairs(inside) do o[name] = value end
      local attn = make(PATTERNS[1], o)
      local q, k, v = randn(1, 90, H, D), randn(1, 90, 2, D), randn(1, 90, 2, D)
      local out, cache = attn(q, k, v), cache_of(attn, 1)
      for _, step in ipairs { { 0, 30 }, { 30, 1 }, { 31, 40 }, { 71, 19 } } do
        local part = decode(cache, q, k, v, step[1], step[2])
        assert.is_true(far(part, out:narrow(2, step[1] + 1, step[2])) < 1e-12)
      end
    end
  end)

  it("computes in half precision", function()
    lac.manual_seed(5)
    local attn = make(PATTERNS[1])
    local function half(...) return lac.randn({ ... }, { dtype = "bf16" }) end
    local q, k, v = half(1, 80, H, D), half(1, 80, 2, D), half(1, 80, 2, D)
    local out, cache = attn(q, k, v), cache_of(attn, 1, { dtype = "bf16" })
    for at = 0, 79, 8 do
      local part = decode(cache, q, k, v, at, 8)
      assert.equal("bf16", part:dtype())
      assert.is_true((part:float() - out:narrow(2, at + 1, 8):float()):abs():max():item() < 0.03)
    end
  end)

  it("takes items at positions of their own, each as if alone", function()
    lac.manual_seed(6)
    local attn = make(PATTERNS[1])
    local q, k, v = randn(3, 100, H, D), randn(3, 100, 2, D), randn(3, 100, 2, D)
    local out, cache, at = attn(q, k, v), cache_of(attn, 3), { 0, 0, 0 }
    for _, counts in ipairs { { 9, 40, 21 }, { 1, 1, 1 }, { 0, 5, 3 }, { 30, 2, 1 } } do
      local n = math.max(unpack(counts))
      local rows = {}
      for name, t in pairs { q = q, k = k, v = v } do
        local items = {}
        for b = 1, 3 do items[b] = t:narrow(1, b, 1):narrow(2, at[b] + 1, n) end
        rows[name] = lac.cat(items, 1)
      end
      local part = cache:attend(rows.q, rows.k, rows.v, counts)
      assert.same({ 3, n, H, D }, { unpack(part:size()) })
      for b = 1, 3 do
        if counts[b] > 0 then
          local own = part:narrow(1, b, 1):narrow(2, 1, counts[b])
          assert.is_true(far(own, out:narrow(1, b, 1):narrow(2, at[b] + 1, counts[b])) < 1e-12)
        end
        at[b] = at[b] + counts[b]
      end
      assert.same(at, cache.positions)
    end
    cache:select { 3, 1 }
    for b, item in ipairs { 3, 1 } do assert.equal(at[item], cache.positions[b]) end
    local function next_of(t)
      local function item(b) return t:narrow(1, b, 1):narrow(2, at[b] + 1, 2) end
      return lac.cat({ item(3), item(1) }, 1)
    end
    local part = cache:attend(next_of(q), next_of(k), next_of(v))
    assert.is_true(far(part, next_of(out)) < 1e-12)
  end)

  it("holds what can still be attended to, and no more than four times that", function()
    lac.manual_seed(7)
    local attn = make(masks.local_window(32) + masks.global_tokens(16))
    local cache, most = cache_of(attn, 1), 0
    for _ = 1, 700 do
      cache:attend(randn(1, 3, H, D), randn(1, 3, 2, D), randn(1, 3, 2, D))
      most = math.max(most, cache.stores[1].capacity)
    end
    assert.equal(2100, cache.positions[1])
    assert.is_true(most <= 4 * (16 + 32 + 3), most) -- a global block, this one and the one before
    assert.equal(2 * 2 * D * 8 * cache.stores[1].capacity, cache:bytes())
    local every = cache_of(make(masks.axial(2)), 1)
    every:attend(randn(1, 500, H, D), randn(1, 500, 2, D), randn(1, 500, 2, D))
    assert.equal(500, every.stores[1].used)
    local segments = make(masks.full(), { of = "longnet", segments = { 64 }, dilations = { 1 } })
    local short = cache_of(segments, 1)
    short:attend(randn(1, 500, H, D), randn(1, 500, 2, D), randn(1, 500, 2, D))
    assert.equal(500 % 64, short.stores[1].used)
  end)

  it("rewinds as far as it was told to keep, and says so beyond", function()
    lac.manual_seed(8)
    local attn = make(PATTERNS[1])
    local q, k, v = randn(2, 300, H, D), randn(2, 300, 2, D), randn(2, 300, 2, D)
    local out, cache = attn(q, k, v), cache_of(attn, 2, { keep = 20 })
    decode(cache, q, k, v, 0, 100)
    decode(cache, q, k, v, 100, 80)
    cache:rewind(161)
    local again = decode(cache, q, k, v, 161, 60)
    assert.is_true(far(again, out:narrow(2, 162, 60)) < 1e-12)
    cache:rewind { 205, 221 }
    assert.same({ 205, 221 }, cache.positions)
    local part = cache:attend(lac.cat({ q[{ { 1 }, { 206, 215 } }], q[{ { 2 }, { 222, 231 } }] }, 1),
      lac.cat({ k[{ { 1 }, { 206, 215 } }], k[{ { 2 }, { 222, 231 } }] }, 1),
      lac.cat({ v[{ { 1 }, { 206, 215 } }], v[{ { 2 }, { 222, 231 } }] }, 1))
    assert.is_true(far(part:narrow(1, 2, 1), out[{ { 2 }, { 222, 231 } }]) < 1e-12)
    assert.is_true(far(part:narrow(1, 1, 1), out[{ { 1 }, { 206, 215 } }]) < 1e-12)
    assert.error_matches(function() cache:rewind(3) end, "cannot rewind item 1 to position 3: rows were")
    assert.error_matches(function() cache:rewind(500) end, "rewind takes positions from 0 to the present one")
    cache:reset()
    assert.is_true(far((decode(cache, q, k, v, 0, 33)), out:narrow(2, 1, 33)) < 1e-12)
  end)

  it("lives as long as it was made for, whatever scopes it is used in", function()
    local attn = make(PATTERNS[1])
    local cache = cache_of(attn, 1)
    local q, k, v = randn(1, 120, H, D), randn(1, 120, 2, D), randn(1, 120, 2, D)
    local out = attn(q, k, v)
    for at = 0, 114, 6 do
      lac.scope(function()
        assert.is_true(far(decode(cache, q, k, v, at, 6), out:narrow(2, at + 1, 6)) < 1e-12)
      end)
    end
  end)

  it("serves a model: the same tokens with the cache and without", function()
    lac.manual_seed(2)
    local model = nn.LongNetLM { vocab = 17, layers = 2, width = 16, heads = 4, context = 96, variant =
      "block_sparse", attention = { pattern = "local_window(32) + global_tokens(16)", block = 16 } }
    local prompts = { { 1, 2, 3 }, { 4, 5, 6, 7, 8 } }
    local a = model:generate(prompts, 60, { temperature = 0 })
    local b = model:generate(prompts, 60, { temperature = 0, cache = false })
    assert.same(b, a)
    assert.matches("position", tostring(model:cache {}))
    assert.matches("^BlockCache%(1 x 4 heads x 4, f32, position 0", tostring(model:cache {}.layers[1]))
  end)

  it("names what is wrong", function()
    assert.error_matches(function() make(masks.random(0.5)):decoder(D) end,
      "random%(0.5, 0%) is drawn for a length, so rows cannot be decoded")
    assert.error_matches(function() make(masks.full() + masks.random(0.5)):decoder(D) end,
      "drawn for a length")
    assert.error_matches(function()
      make(masks.full(), { of = "longnet", segments = { 8 }, dilations = { 1 }, dedup = true }):decoder(D)
    end, "block_sparse cannot be decoded row by row with dedup")
    assert.error_matches(function() make(masks.full(), { kernel = "portable" }):decoder(D) end,
      "decoding has one kernel: kernel = 'portable' cannot be honoured")
    assert.error_matches(function() nn.BlockCache { decoder = 1, heads = 1, head_dim = 1 } end,
      "decoder must be a decoder of active blocks")
    local cache = cache_of(make(masks.full()), 2)
    assert.error_matches(function() cache:attend(randn(1, 1, H, D), randn(1, 1, 2, D), randn(1, 1, 2, D)) end,
      "k and v must be f64 %[2 x rows x 2 x 4%]")
    assert.error_matches(function()
      cache:attend(randn(2, 1, H, D), randn(2, 1, 2, D), randn(2, 1, 2, D), { 1 })
    end, "counts must be a list of 2 numbers")
  end)
end)
