--- cuda_large_spec.lua: tensors of more than 2^31 elements on CUDA.
--
-- Rows of a large tensor, before and behind its element number 2^31, must come out as those rows do by
-- themselves. Kernels may be others for few rows, so results agree to a unit in the last place; an index
-- that lost its upper bits would bring other rows, or NaN, which free memory is full of. Needs some 60 GB of
-- device memory, and says so where there is less. Tagged #gpu.

local it = os.getenv "LACUNA_GPU" == "1" and it or pending

local lac = require "lacuna"

local ROWS, WIDTH, FEW = 2 ^ 21 + 40, 1024, 64 -- 2^31 elements are 2^21 rows
local BF16 = { dtype = "bf16", device = "cuda" }

local function rows(x, from, to) return x[{ { from, to } }]:contiguous() end

-- first rows, and rows from before 2^31 elements to the end
local function ends(x)
  local n = x:size()[1]
  return lac.cat({ rows(x, 1, FEW), rows(x, n - FEW + 1, n) }, 1)
end

-- what free memory of the pool holds
local function poison()
  local a, b = lac.full({ ROWS, WIDTH }, 0 / 0, BF16), lac.full({ ROWS, WIDTH }, 0 / 0, BF16)
  a:release()
  b:release()
end

local function near(got, want, what)
  assert.are.same(want:size(), got:size(), what)
  got, want = got:to { dtype = "f32" }, want:to { dtype = "f32" }
  local off, most = (got - want):abs():max():item(), want:abs():max():item()
  assert.is_true(off <= 2 ^ -7 * most, ("%s: %g off, the largest is %g"):format(what, off, most))
end

describe("tensors of more than 2^31 elements on cuda #gpu", function()
  local x
  -- f of all rows, and of few
  local function holds(what, f, ...)
    local more, few = { ... }, {}
    for i, t in ipairs(more) do few[i] = ends(t) end
    poison()
    lac.scope(function() near(ends(f(x, unpack(more))), f(ends(x), unpack(few)), what) end)
  end

  setup(function()
    if os.getenv "LACUNA_GPU" ~= "1" then return end
    lac.manual_seed(1)
    x = lac.randn({ ROWS, WIDTH }, BF16)
    assert(ROWS * WIDTH > 2 ^ 31)
  end)
  teardown(function()
    if x then x:release() end
    lac.trim()
  end)

  it("are drawn, mapped, cast and copied", function()
    local tail = ends(x):to { dtype = "f32" }
    assert.near(0, tail:mean():item(), 0.02)
    assert.near(1, (tail * tail):mean():item(), 0.02)
    holds("exp", function(t) return t:exp() end)
    holds("gelu", function(t) return t:gelu() end)
    holds("a sum", function(t) return t + t end)
    local row = lac.randn({ WIDTH }, BF16)
    holds("a product with rows", function(t) return t * row end)
    holds("a choice", function(t) return lac.where(t:gt(0), t, 0.5) end)
    holds("a cast", function(t) return t:to { dtype = "f32" } end)
    holds("part of the columns", function(t) return t[{ {}, { 2, WIDTH - 6 } }]:contiguous() end)
    holds("the transpose", function(t) return t:t():contiguous():t() end)
    holds("a map of the transpose", function(t) return t:t():exp():t() end)
    local y = x:clone()
    y[{ { ROWS - 1, ROWS } }]:fill_(3)
    assert.are.equal(3, y[{ ROWS, WIDTH }]:item())
    near(rows(y, ROWS - 9, ROWS - 2), rows(x, ROWS - 9, ROWS - 2), "rows before those that were filled")
    y:release()
  end)

  it("are added up, scanned and normalized", function()
    local gain, bias = lac.randn({ WIDTH }, BF16), lac.randn({ WIDTH }, BF16)
    holds("sums of rows", function(t) return t:sum(2) end)
    holds("largest places", function(t) return t:argmax(2) end)
    holds("softmax", function(t) return lac.softmax(t, 2) end)
    holds("layernorm", function(t) return lac.layernorm(t, gain, bias) end)
    holds("rmsnorm", function(t) return lac.rmsnorm(t, gain) end)
    holds("gelu_norm", function(t) return lac.gelu_norm(t, gain, bias) end)
    holds("running sums", function(t) return t:cumsum(2) end)
    local ones = lac.full({ ROWS, WIDTH }, 1, BF16)
    near(ones:sum(1), lac.full({ WIDTH }, ROWS, BF16), "sums over rows")
    assert.near(1, ones:mean():item(), 2 ^ -8)
    ones:release()
  end)

  it("have gradients", function()
    local gain, bias = lac.randn({ WIDTH }, BF16), lac.randn({ WIDTH }, BF16)
    for name, f in pairs { layernorm = function(t) return lac.layernorm(t, gain, bias) end,
                           softmax = function(t) return lac.softmax(t, 2) end,
                           gelu = function(t) return t:gelu() end } do
      holds("the gradient of " .. name, function(t, g)
        local leaf = t:detach():requires_grad_()
        return lac.grad(f(leaf), { leaf }, { grad_outputs = { g } })[1]
      end, x)
    end
  end)

  it("are looked up, scattered and multiplied", function()
    local backwards = lac.arange({ ROWS }, { device = "cuda", dtype = "i64" }) * -1 + (ROWS - 1)
    poison()
    local y = x:index_select(1, backwards)
    near(rows(y, 1, FEW), rows(x, ROWS - FEW + 1, ROWS):flip(1), "rows from the end")
    near(rows(y, ROWS - FEW + 1, ROWS), rows(x, 1, FEW):flip(1), "rows from the beginning")
    y:release()
    local w, a = lac.randn({ WIDTH, 16 }, BF16), lac.randn({ ROWS, 16 }, BF16)
    holds("a product of all", function(t) return t:matmul(w) end)
    holds("a large product", function(_, t) return t:matmul(w:t()) end, a)
    local target = lac.randint({ ROWS }, { high = WIDTH, device = "cuda", dtype = "i64" })
    holds("cross-entropy", function(t, to)
      return lac.cross_entropy(t, to, { reduction = "none" })
    end, target)
  end)

  it("are updated by AdamW", function()
    local function stepped(p, g)
      p = p:clone():requires_grad_()
      p.grad = g
      lac.optim.adamw({ p }, { lr = 0.1 }):step()
      return p:detach()
    end
    holds("a step", function(t, g) return stepped(t, g) end, x)
  end)

  it("are attended to, forward and backward, by both kernels", function()
    local heads, n, segment = 16, ROWS, 64
    local q, g = x:view(1, n, heads, 64), lac.randn({ 1, n, heads, 64 }, BF16)
    for _, kernel in ipairs { "auto", "portable" } do
      local function run(queries, dout)
        local inputs = {}
        for i = 1, 3 do inputs[i] = queries:detach():requires_grad_() end
        local out = lac.attend(inputs[1], inputs[2], inputs[3], { segments = { segment }, dilations = { 1 },
          causal = true, kernel = kernel, return_lse = false })
        return { out:detach(), unpack(lac.grad(out, inputs, { grad_outputs = { dout } })) }
      end
      lac.scope(function()
        local last = math.floor((n - 1) / segment) * segment + 1 - segment -- the last two segments
        local function tail(t) return t[{ {}, { last, n } }]:contiguous() end
        poison()
        local want, got = run(tail(q), tail(g)), run(q, g)
        for i, t in ipairs(got) do near(tail(t), want[i], kernel .. ", result " .. i) end
      end)
    end
  end)
end)
