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
