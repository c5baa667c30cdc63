--- Patterns of active blocks: the rules against their definitions, algebra, statistics, pictures, attention
-- through a pattern, and learned patterns whose scores really train.

local lac = require "lacuna"
local masks = lac.attention.masks
local nn = require "lacuna.nn"

-- the cells of head 1 as text, one row a line
local function cells(p, options)
  local all = p:cells(options)
  local lines = {}
  for i, row in ipairs(all[options.head or 1]) do
    lines[i] = ""
    for _, on in ipairs(row) do lines[i] = lines[i] .. (on and "x" or ".") end
  end
  return table.concat(lines, " ")
end
local FIVE = { n = 80, block = 16 }

describe("patterns of blocks", function()
  it("follow their rules", function()
    assert.equal("xx... xxx.. .xxx. ..xxx ...xx", cells(masks.local_window(32), FIVE))
    assert.equal("x.... .x... ..x.. ...x. ....x", cells(masks.local_window(31), FIVE))
    assert.equal("x.x.. .x.x. x.x.x .x.x. ..x.x", cells(masks.dilated_sparse { 2 }, FIVE))
    assert.equal("xxxxx x.... x.... x.... x....", cells(masks.global_tokens(16), FIVE))
    assert.equal("xxxxx xxxxx xx... xx... xx...", cells(masks.global_tokens(17), FIVE))
    assert.equal("xxxxx xxx.. xxxx. x.xxx x..xx", cells(masks.global_local(16, 32), FIVE))
    assert.equal("xx.x. xxx.x .xxx. x.xxx .x.xx", cells(masks.axial(3), FIVE))
    assert.equal("xxxxx .x... xxxxx ...x. xxxxx",
      cells(masks.hierarchical { { stride = 16, window = 0 }, { stride = 32, window = -1 } }, FIVE))
    assert.equal("xxxxx xxxxx xxxxx xxxxx xxxxx", cells(masks.full(), FIVE))
    assert.equal(".xx.. ..xx. ...xx ....x .....",
      cells(masks.rule("next two", function(i, j) return j > i and j <= i + 2 end), FIVE))
  end)

  it("compose by +, * and -, and print", function()
    local window, global = masks.local_window(32), masks.global_tokens(16)
    assert.equal(cells(masks.global_local(16, 32), FIVE), cells(window + global, FIVE))
    assert.equal("xx... x.... ..... ..... .....", cells(window * global, FIVE))
    assert.equal("..... .xx.. .xxx. ..xxx ...xx", cells(window - global, FIVE))
    assert.equal("(local_window(32) + global_tokens(16)) * full() - diagonal()",
      tostring((window + global) * masks.full() - masks.diagonal()))
    local heads = masks.per_head { masks.diagonal(), masks.full() }
    local four = { n = 80, block = 16, heads = 4, head = 4 }
    assert.equal(4, heads:tensor { n = 80, block = 16, heads = 4 }:size(1))
    four.head = nil
    local all = heads:cells(four)
    assert.is_true(all[2][1][5] and not all[3][1][5] and all[4][1][5])
    assert.has_error(function() return window + 1 end)
  end)

  it("leave nothing above the diagonal with causal, and align queries to the end", function()
    assert.equal("x.... xx... xxx.. xxxx. xxxxx", cells(masks.full(), { n = 80, block = 16, causal = true }))
    assert.equal("...x. ....x",
      cells(masks.diagonal(), { n = 32, m = 80, block = 16, align = "end", causal = true }))
    assert.equal("xxxx. xxxxx",
      cells(masks.full(), { n = 32, m = 80, block = 16, align = "end", causal = true }))
  end)

  it("draw the asked share at random, the diagonal among it, the same for the same seed", function()
    local sizes = { n = 1600, block = 16, heads = 3 }
    local p = masks.random(0.1, 7)
    local s = p:statistics(sizes)
    assert.is_true(math.abs(s.density - 0.1) < 1e-9)
    local a, b = p:cells(sizes), masks.random(0.1, 7):cells(sizes)
    assert.same(a, b)
    assert.is_false(pcall(assert.same, a[1], a[2]))
    assert.is_false(pcall(assert.same, a, masks.random(0.1, 8):cells(sizes)))
    for i = 1, 100 do assert.is_true(a[2][i][i]) end
    local causal = masks.random(0.2, 1):statistics { n = 1600, block = 16, heads = 2, causal = true }
    assert.equal(5050, causal.allowed)
    assert.is_true(math.abs(causal.density - 0.2) < 1e-9)
  end)

  it("count pairs as attention does, and the mass that they cover", function()
    local n, block = 70, 16
    for _, causal in ipairs { false, true } do
      local p = masks.local_window(64) + masks.random(0.2, 3)
      local s = p:statistics { n = n, block = block, heads = 2, causal = causal, head_dim = 8 }
      local on, pairs_found = p:tensor { n = n, block = block, heads = 2, causal = causal }:totable(), 0
      for h = 1, 2 do for i = 0, n - 1 do for j = 0, causal and i or n - 1 do
        if on[h][math.floor(i / block) + 1][math.floor(j / block) + 1] then pairs_found = pairs_found + 1 end
      end end end
      assert.equal(pairs_found, s.pairs)
      assert.equal(4 * 8 * pairs_found, s.flops_forward)
    end
    local even = lac.full({ 1, n, n }, 1 / n)
    local s = masks.local_window(32):statistics { n = n, block = block, probability = even }
    assert.is_true(math.abs(s.coverage - s.pairs / n / n) < 1e-6)
    assert.equal(1, masks.full():statistics { n = n, block = block, probability = even }.coverage)
  end)

  it("are pictures, in the terminal and as files", function()
    local window = masks.local_window(32) + masks.global_tokens(16)
    assert.are.equal("local_window(32) + global_tokens(16)\n#####\n###..\n####.\n#.###\n#..##",
      tostring(window:picture{ n = 80, block = 16 }))
    assert.matches("\n#5\n5#$", tostring(masks.per_head{ masks.full(), masks.diagonal() }
      :picture{ n = 32, block = 16, heads = 2 }))
    assert.matches("^density 0.76: 19 of 25 blocks a head, 4864 pairs, forward 1.25 MFLOP, 0 rows",
      tostring(window:statistics{ n = 80, block = 16 }))
    assert.error_matches(function() window:picture(80) end, "options of a picture must be a table, got 80")
    assert.error_matches(function() window:statistics(80) end, "of statistics must be a table, got 80")
    assert.error_matches(function() return masks.locl_window end, "did you mean '?local_window'?")
    local text = lac.plot.heatmap(masks.local_window(32):picture(FIVE))
    assert.matches("local_window%(32%)", text)
    for _, kind in ipairs { "png", "svg" } do
      local path = os.tmpname() .. "." .. kind
      local picture = masks.global_local(16, 32):picture { n = 80, block = 16, output = path }
      assert.equal(path, lac.plot.heatmap(picture))
      assert.is_true(os.remove(path))
    end
  end)

  it("are taken by attention, which then equals attention with the mask spelled out", function()
    local q, k, v = lac.randn { 2, 75, 2, 4 }, lac.randn { 2, 75, 2, 4 }, lac.randn { 2, 75, 2, 4 }
    local p = masks.local_window(32) + masks.random(0.3, 1) - masks.global_tokens(1)
    for _, causal in ipairs { false, true } do
      local options = { segments = { 40, 75 }, dilations = { 1, 2 }, causal = causal, return_lse = false }
      options.block_mask, options.block = p, 16
      local sparse = lac.attend(q, k, v, options)
      local on = p:tensor { n = 75, block = 16, heads = 2 }
      options.block_mask = nil
      assert.error_matches(function() lac.attend(q, k, v, options) end, "there is no block_mask")
      options.block = nil
      options.mask = on:view(2, 5, 1, 5, 1):expand(2, 5, 16, 5, 16):reshape(2, 80, 80)
      options.mask = options.mask:narrow(2, 1, 75):narrow(3, 1, 75)
      assert.is_true((sparse - lac.attend(q, k, v, options)):abs():max():item() < 1e-5)
    end
    local module = lac.attention { variant = "dense", heads = 2 }
    local v1 = lac.ones { 2, 75, 2, 4 } -- one softmax a row: V = 1 gives 1
    local out = module(q, k, v1, { block_mask = masks.axial(2), block = 16 })
    assert.is_true((out - 1):abs():max():item() < 1e-6)
    assert.error_matches(function() module(q, k, v1, { block = 16 }) end, "there is no block_mask")
  end)

  it("refuse what makes no sense", function()
    local function message(f, ...)
      local ok, text = pcall(f, ...)
      assert.is_false(ok)
      return tostring(text)
    end
    assert.matches("density must be in %(0, 1%], got 1.5", message(masks.random, 1.5))
    assert.matches("window must be an integer of at least 1, got 0", message(masks.local_window, 0))
    assert.matches("dilations must be a list", message(masks.dilated_sparse, 3))
    assert.matches("block must be at least 16, got 8", message(masks.full().tensor, masks.full(),
      { n = 64, block = 8 }))
    assert.matches("there is no masks.local_windw, did you mean 'local_window'", message(function()
      return masks.local_windw
    end))
    assert.matches("probability must be %[1, 64, 64%]", message(masks.full().statistics, masks.full(),
      { n = 64, block = 16, probability = lac.zeros { 2, 2 } }))
  end)
end)

describe("learned patterns", function()
  setup(function() lac.manual_seed(5) end)

  it("keep so many blocks a row, respect causality, and pass gradients to kept scores", function()
    local blocks = nn.LearnedBlocks { n = 70, heads = 2, block = 16, keep = 2, causal = true }
    local x = lac.randn { 1, 70, 2, 4 }
    local o = blocks()
    local on = o.block_mask:to("f32")
    assert.same({ 1, 2, 2, 2, 2 }, on:sum(3)[1]:totable())
    assert.equal(0, o.bias:abs():max():item()) -- straight-through: the value is what it would be without
    o.segments, o.dilations, o.causal, o.return_lse = { 70 }, { 1 }, true, false
    lac.attend(x, x, x, o):square():sum():backward()
    local g = blocks.scores.grad:totable()
    local kept = o.block_mask:totable()
    for h = 1, 2 do
      for i = 2, 5 do
        for j = 1, 5 do -- a row's gradients add up to nothing, so what is not kept has none
          assert.is_true(math.abs(g[h][i][j]) > 1e-2 == kept[h][i][j], i .. " " .. j)
        end
      end
    end
    assert.equal(0, g[1][2][5])
    blocks:eval()
    assert.is_nil(blocks().bias)
    assert.is_true((blocks().block_mask:to("f32") - blocks().block_mask:to("f32")):abs():max():item() == 0)
  end)

  it("never let batch items influence each other, and train their scorer", function()
    local blocks = nn.AdaptiveBlocks { head_dim = 4, block = 16, keep = 2, noise = false, soft = true }
    local q, k = lac.randn { 3, 70, 2, 4 }, lac.randn { 3, 70, 2, 4 }
    local all, one = blocks(q, k), blocks(q:narrow(1, 2, 1), k:narrow(1, 2, 1))
    assert.same({ 3, 2, 5, 5 }, { unpack(all.block_mask:size()) })
    assert.is_true((all.bias:narrow(1, 2, 1) - one.bias):abs():max():item() < 1e-6)
    assert.is_true(lac.eq(all.block_mask:narrow(1, 2, 1), one.block_mask):to("f32"):min():item() == 1)
    all.segments, all.dilations, all.return_lse = { 70 }, { 1 }, false
    lac.attend(q, k, k, all):square():sum():backward()
    for _, p in ipairs(blocks:parameters()) do assert.is_true(p.grad ~= nil) end
    assert.is_true(blocks.query_in.weight.grad:abs():max():item() > 0)
    assert.is_true(blocks.key_out.weight.grad:abs():max():item() > 0)
  end)
end)

describe("the variant 'learned'", function()
  local H, D, BLOCK = 4, 4, 16
  local function randn(...) return lac.randn({ ... }, { dtype = "f64" }) end
  local function far(a, b) return (a - b):abs():max():item() end
  local function make(more)
    local o = { variant = "learned", heads = H, kv_heads = 2, block = BLOCK, keep = 2, length = 120,
                causal = true, dtype = "f64" }
    for name, value in pairs(more or {}) do o[name] = value end
    lac.manual_seed(8)
    local attn = lac.attention(o)
    attn.scorer.scores:detach():normal_(0, 1)
    return attn
  end

  it("is the variant inside in the blocks of the best scores", function()
    for _, o in ipairs { {}, { causal = false }, { causal = true, align = "end", m = 106 },
                         { of = "longnet", segments = { 24, 120 }, dilations = { 1, 3 } } } do
      local attn = make(o.m and { align = "end" } or o):eval()
      local n, m = 90, o.m or 90
      local q, k, v = randn(2, n, H, D), randn(2, m, 2, D), randn(2, m, 2, D)
      local scores, from = attn.scorer.scores:totable(), (m - n) / BLOCK
      local on = {}
      for h = 1, H do
        on[h] = {}
        for i = 1, 6 do
          local order, columns = {}, o.causal == false and math.ceil(m / BLOCK) or i + from
          for j = 1, columns do order[j] = j end
          table.sort(order, function(a, b) return scores[h][i + from][a] > scores[h][i + from][b] end)
          on[h][i] = {}
          for j = 1, math.ceil(m / BLOCK) do on[h][i][j] = false end
          for j = 1, math.min(2, columns) do on[h][i][order[j]] = true end
        end
      end
      local same = lac.attention { variant = "custom", of = nil, heads = H, kv_heads = 2,
        segments = o.segments or { 999 }, dilations = o.dilations or { 1 }, causal = o.causal ~= false,
        align = o.m and "end" or nil }
      local mask = lac.tensor(on, { dtype = "bool" })
      assert.is_true(far((attn(q, k, v)), (same(q, k, v, { block_mask = mask, block = BLOCK }))) < 1e-14)
      assert.are.same(on, attn.scorer:pattern { n = n, m = m, causal = o.causal ~= false,
        align = o.m and "end" or "start" }:tensor { n = n, m = m, heads = H, block = BLOCK }:totable())
    end
  end)

  it("trains, copies and saves its scores, and knows what it keeps", function()
    local options = { embed_dim = 16, heads = H, variant = "learned", keep = 1, block = BLOCK, length = 64 }
    local m = nn.MultiheadDilatedAttention(options)
    assert.are.same({ 4, 4, 4 }, { unpack(m:state_dict()["scorer.scores"]:size()) })
    local x, before = lac.randn { 1, 64, 16 }, m.scorer.scores:detach():clone()
    local optimizer = lac.optim.adamw(m, { lr = 1e-2 })
    m(x):square():sum():backward()
    assert.is_true(m.scorer.scores.grad:abs():max():item() > 0)
    optimizer:step()
    assert.is_false(before:equal(m.scorer.scores:detach()))
    local copy = m:clone()
    copy.scorer.scores:detach():fill_(0)
    assert.is_false(m.scorer.scores:detach():equal(copy.scorer.scores:detach()))
    assert.is_true(copy:load_state_dict(m:state_dict()):eval()(x):equal(m:eval()(x)))
    assert.matches("blocks +4 of 16 a head active, density 0.25", m.attention:explain(64))
  end)

  it("is decoded as it is computed, holding what a later row will have", function()
    for _, more in ipairs { {}, { of = "longnet", segments = { 24, 120 }, dilations = { 1, 3 } } } do
      local attn = make(more):eval()
      local q, k, v = randn(2, 120, H, D), randn(2, 120, 2, D), randn(2, 120, 2, D)
      local out, at = attn(q, k, v), 0
      local cache = nn.BlockCache { decoder = attn:decoder(D), batch = 2, heads = 2, head_dim = D,
                                    dtype = "f64" }
      for _, n in ipairs { 30, 1, 1, 20, 40, 5, 23 } do
        local function part(t) return t:narrow(2, at + 1, n) end
        assert.is_true(far((cache:attend(part(q), part(k), part(v))), part(out)) < 1e-12)
        at = at + n
      end
      local function nine(t) return t:narrow(2, 1, 9) end
      assert.error_matches(function() cache:attend(nine(q), nine(k), nine(v)) end,
        "learned has 8 x 8 blocks, not row 9")
    end
  end)

  it("names what is wrong", function()
    local q, k = randn(1, 121, H, D), randn(1, 121, 2, D)
    assert.error_matches(function() make()(q, k, k) end,
      "has scores for 120 x 120 positions, got 121 queries and 121 keys")
    q, k = randn(1, 20, H, D), randn(1, 30, 2, D)
    assert.error_matches(function() make { align = "end" }(q, k, k) end, "whole blocks of 16, got 30 and 20")
    assert.error_matches(function() make { length = false } end, "length must be an integer")
    assert.error_matches(function() make { soft = true }:decoder(D) end, "with soft = true")
  end)
end)
