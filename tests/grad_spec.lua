--- The tape: accumulation, topology, hooks, freeing, in-place detection, switches, custom operators.
--
-- The rules of single operators are checked in ops_spec against differences; here the graph is the subject,
-- with operators so simple that the expected gradients are worked out by hand and compared exactly.
--
-- Each protection is tested by doing what it protects from: backward twice, changing a saved tensor through
-- a view, replacing a gradient by one of the wrong shape, raising from inside a rule and running again
-- afterwards. gradcheck is tested by rules that are wrong, unsteady or missing: a checker that cannot fail
-- would make every other gradient test worthless.

local lac = require "lacuna"

local function refused(pattern, f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  assert.matches(pattern, message)
end

local function leaf(values, dtype) return lac.tensor(values, { dtype = dtype or "f64", grad = true }) end

describe("backward", function()
  it("accumulates over paths and over calls", function()
    local x = leaf { 1, 2, 3 }
    local y = x * x + x -- x appears three times
    y:sum():backward()
    assert.are.same({ 3, 5, 7 }, x.grad:totable());
    (x * 2):sum():backward()
    assert.are.same({ 5, 7, 9 }, x.grad:totable())
    lac.zero_grad { x }
    assert.is_nil(x.grad)
  end)

  it("handles diamonds, shared results and unused branches", function()
    local x = leaf { 2 }
    local a = x * 3
    local b, c = a + 1, a * a
    local _ = a * 100 -- never used
    local d = b * c
    d:sum():backward() -- (3x + 1) 9x^2: 81x^2 + 18x
    assert.are.same({ 81 * 4 + 36 }, x.grad:totable())
  end)

  it("adds up the gradients of layers that read one tensor", function()
    lac.manual_seed(1)
    for _, dtype in ipairs{ "f64", "f32", "bf16" } do
      local x, g = lac.randn{ 2, 5, 7, dtype = dtype, grad = true }, lac.randn{ 2, 5, 4, dtype = dtype }
      local total = lac.zeros{ 2, 5, 7, dtype = "f64" }
      local y, outs, seeds = x * 1, {}, {}
      for i = 1, 3 do
        local w = lac.randn{ 4, 7, dtype = dtype, grad = i ~= 2 }
        outs[i], seeds[i] = lac.linear(y, w), g
        total:add_(g:double():matmul(w:detach():double()))
      end
      y:retain_grad()
      local rest = y:tanh() -- a gradient that is there before the products or comes after them
      outs[4], seeds[4] = rest, lac.ones{ 2, 5, 7, dtype = dtype }
      total:add_(1 - rest:detach():double() ^ 2)
      local dx = lac.grad(outs, x, { grad_outputs = seeds, retain_graph = true })
      local bound = ({ f64 = 1e-12, f32 = 1e-5, bf16 = 0.03 })[dtype] * total:abs():max():item()
      assert.is_true((dx:double() - total):abs():max():item() <= bound)
      assert.is_true(lac.equal(dx, lac.grad(outs, x, { grad_outputs = seeds })))
      assert.is_true(lac.equal(g, seeds[1]))
    end
  end)

  it("adds them up as well where what they read is an operator's second result", function()
    for _, dtype in ipairs{ "f64", "f32", "bf16" } do
      local function run(joined)
        lac.manual_seed(4)
        local function draw(...) return lac.randn({ ... }, { dtype = dtype, grad = true }) end
        local x, h, gain, bias = draw(2, 5, 8), draw(2, 5, 8), draw(8), draw(8)
        local sum, list = x + h, { x, h, gain, bias }
        local out = lac.layernorm(sum, gain, bias)
        if joined then sum, out = lac.residual_norm(x, h, gain, bias) end
        out:retain_grad()
        local total = sum:sum()
        for i = 1, 3 do
          list[i + 4] = draw(4, 8)
          total = total + (lac.linear(out, list[i + 4]) * (i + 0.3)):sum()
        end
        total:backward({ retain_graph = true })
        total:backward()
        for i, t in ipairs(list) do list[i] = t.grad end
        list[#list + 1] = out.grad
        return list
      end
      local apart, joined = run(false), run(true)
      for i = 1, 8 do assert.is_true(lac.equal(apart[i], joined[i]), ("%s, %d"):format(dtype, i)) end
    end
  end)

  it("does not share a gradient between leaves", function()
    local a, b = leaf { 1, 2 }, leaf { 3, 4 }
    local s = a + b
    s:backward(lac.tensor({ 1, 1 }, { dtype = "f64" }))
    a.grad:mul_(10)
    assert.are.same({ 1, 1 }, b.grad:totable())
    local seed = lac.ones { 2, dtype = "f64" }
    local c = leaf { 1, 2 }
    c:backward(seed)
    c.grad:zero_()
    assert.are.same({ 1, 1 }, seed:totable())
  end)

  it("reaches leaves through views, and gives contiguous gradients", function()
    local x = lac.arange { 6, dtype = "f64", grad = true }
    local y = x:view(2, 3):t()[{ { 1, 2 } }]
    y:sum():backward()
    assert.are.same({ 1, 1, 0, 1, 1, 0 }, x.grad:totable())
    assert.is_true(x.grad:is_contiguous())
  end)

  it("needs no stack: a chain of 100,000 operators", function()
    local x = leaf { 1 }
    local y = x
    for _ = 1, 100000 do y = y + 0.5 end
    y:sum():backward()
    assert.are.equal(1, x.grad:item())
  end)

  it("gives gradients back to the pool as it goes", function()
    local x = lac.ones { 100, 1000, grad = true } -- 0.4 MB
    local y = x
    for _ = 1, 20 do y = y:tanh() * 1.5 end
    y = y:sum()
    collectgarbage()
    collectgarbage()
    collectgarbage("stop")
    local before = lac.memory().live
    y:backward()
    local growth = lac.memory().live - before
    collectgarbage("restart")
    assert.is_true(growth < 1e6, ("%.1f MB of gradients are left"):format(growth / 1e6)) -- one is x.grad
    assert.are.same({ 100, 1000 }, { unpack(x.grad:size()) })
  end)

  it("computes in every float dtype", function()
    for _, dtype in ipairs { "f32", "f16", "bf16" } do
      local x = leaf({ 1, 2 }, dtype);
      (x * x):sum():backward()
      assert.are.equal(dtype, x.grad:dtype())
      assert.are.same({ 2, 4 }, x.grad:totable())
    end
    local x = leaf({ 1, 2 }, "f32")
    x:to { dtype = "f64" }:square():sum():backward() -- through a cast
    assert.are.equal("f32", x.grad:dtype())
    assert.are.same({ 2, 4 }, x.grad:totable())
    for name, dtype in pairs { float = "f32", double = "f64", half = "f16", bfloat16 = "bf16" } do
      for _, from in ipairs { "f64", "f32", "f16", "bf16" } do
        x = leaf({ 1, -2.5 }, from)
        local cast = x[name](x)
        assert.are.equal(dtype, cast:dtype())
        assert.are.equal(dtype == from, cast == x)
        cast:square():sum():backward()
        assert.are.equal(from, x.grad:dtype())
        assert.are.same({ 2, -5 }, x.grad:totable())
      end
    end
    assert.is_false(x:long().requires_grad)
  end)

  it("frees the graph, and says so", function()
    local x = leaf { 1 }
    local y = (x * x):sum()
    y:backward()
    refused("was freed by an earlier backward; pass {retain_graph = true}", y.backward, y)
    local z = (x * x):sum()
    z:backward { retain_graph = true }
    z:backward()
    assert.are.equal(6, x.grad:item())
  end)

  it("gives each of two vectors the other, whatever their strides, by dot", function()
    local forms = {
      function(n) return lac.randn { n, dtype = "f64" } end,
      function(n) return lac.randn { 2 * n, dtype = "f64" }[{ { 2, 2 * n, 2 } }] end,
      function(n) return lac.randn { n, dtype = "f64" }[{ { n, 1, -1 } }] end,
      function(n) return lac.randn { n, 3, dtype = "f64" }:select(2, 2) end,
      function(n) return lac.randn { 1, dtype = "f64" }:expand(n) end,
    }
    for _, n in ipairs { 1, 2, 300 } do
      for i, first in ipairs(forms) do
        for j, second in ipairs(forms) do
          for asks = 1, 3 do
            local a, b = first(n):requires_grad_(asks ~= 2), second(n):requires_grad_(asks ~= 1)
            local x, y, sum = a:totable(), b:totable(), 0
            for k = 1, n do sum = sum + x[k] * y[k] end
            local d = a:dot(b)
            assert.is_true(math.abs(d:item() - sum) < 1e-11 and d:dim() == 0)
            d:backward()
            assert.same(asks ~= 2 and y or nil, asks ~= 2 and a.grad:totable() or a.grad, i .. j)
            assert.same(asks ~= 1 and x or nil, asks ~= 1 and b.grad:totable() or b.grad, i .. j)
          end
        end
      end
    end
    local x = lac.randn { 5, dtype = "f64", grad = true }
    x:dot(x):backward()
    assert.is_true(lac.equal(x.grad, x:detach() * 2))
  end)

  it("gives a zero vector's norm the gradient zero", function()
    for _, p in ipairs { 1, 2, 3 } do
      local x = leaf { 0, 0 }
      x:norm(p):backward()
      assert.are.same({ 0, 0 }, x.grad:totable())
    end
    local x = leaf { { 0, 0 }, { 0, -2 } }
    x:norm(2, 2):sum():backward()
    assert.are.same({ { 0, 0 }, { 0, -1 } }, x.grad:totable())
  end)

  it("refuses what makes no sense", function()
    local x = leaf { 1, 2 }
    refused("has more than one element", (x * 2).backward, x * 2)
    refused("does not require a gradient", lac.ones({ 1 }).backward, lac.ones { 1 })
    refused("the gradient must be like the tensor", x.backward, x, lac.ones { 3, dtype = "f64" })
    refused("the gradient must be like the tensor", x.backward, x, lac.ones { 2 })
    refused("the gradient must be a tensor, got 3", x.backward, x, 3)
    refused("unknown option 'retain', did you mean 'retain_graph'", x.backward, x, { retain = true })
    refused("a gradient has its tensor's shape", function() x.grad = lac.ones { 3, dtype = "f64" } end)
  end)

  it("leaves no trace of a failure behind", function()
    local x = leaf { 1 }
    local boom = lac.custom_op { name = "boom", forward = function(_, a) return a * 2 end,
                                 backward = function() error("boom", 0) end }
    local y = x * 3
    local bad, good = boom(y), y * 2
    refused("boom", function() (bad + good):sum():backward { retain_graph = true } end)
    good:sum():backward()
    assert.are.equal(6, x.grad:item())
    assert.is_true(lac.is_grad_enabled())
  end)
end)

describe("in-place changes", function()
  it("of saved tensors are detected, through views too", function()
    local x, w = leaf { 1, 2 }, lac.tensor({ 3, 4 }, { dtype = "f64" })
    local y = x * w
    w:view(2, 1)[1] = 0
    refused("mul needs its second input as it was", y.backward, y, lac.ones { 2, dtype = "f64" })
    local z = x:exp()
    lac.no_grad(function() z:detach():zero_() end)
    refused("exp needs its result as it was", z.backward, z, lac.ones { 2, dtype = "f64" })
  end)

  it("of targets are detected", function()
    local logits, target = leaf { { 1, 2, 3 } }, lac.tensor({ 0 }, { dtype = "i64" })
    local loss = lac.cross_entropy(logits, target)
    target:fill_(2)
    refused("cross_entropy needs a tensor it saved", loss.backward, loss)
    local w, x = leaf { { 1, 2, 3 }, { 4, 5, 6 } }, leaf { { 1, 2, 3 } }
    target:fill_(0)
    loss = lac.linear_cross_entropy(x, w, nil, target, { reduction = "none" })
    target:fill_(1)
    refused("linear_cross_entropy needs a tensor it saved", loss.backward, loss, lac.ones{ 1, dtype = "f64" })
  end)

  it("of tensors that no rule reads are allowed", function()
    local x, w = leaf { 1, 2 }, lac.tensor({ 3, 4 }, { dtype = "f64" })
    local y = x + w
    w:zero_()
    y:sum():backward()
    assert.are.same({ 1, 1 }, x.grad:totable())
  end)

  it("of recorded tensors are refused", function()
    local x = leaf { 1, 2 }
    refused("add_: .*requires a gradient, so it cannot be changed in place", x.add_, x, 1)
    refused("cannot be changed in place", function() x[1] = 3 end)
    local plain = lac.zeros { 2, dtype = "f64" }
    refused("would lose the gradient", plain.copy_, plain, x)
    refused("would lose the gradient", function() plain[1] = x[1] end)
    lac.no_grad(function() x:add_(1) end)
    assert.are.same({ 2, 3 }, x:totable())
  end)
end)

describe("switches", function()
  it("no_grad records nothing and survives errors", function()
    local x = leaf { 1 }
    local y = lac.no_grad(function() return x * 2 end)
    assert.is_false(y.requires_grad)
    local a, b = lac.no_grad(function(...) return ... end, 1, nil)
    assert.are.equal(1, a)
    assert.is_nil(b)
    refused("oops", lac.no_grad, function() error("oops") end)
    assert.is_true(lac.is_grad_enabled())
    lac.no_grad(function()
      assert.is_true(lac.enable_grad(function() return x * 2 end).requires_grad)
      assert.is_false(lac.is_grad_enabled())
    end)
    refused("expected a function, got 3", lac.no_grad, 3)
  end)

  it("detach, requires_grad_ and is_leaf", function()
    local x = leaf { 1 }
    local y = x * 2
    assert.is_true(x:is_leaf())
    assert.is_false(y:is_leaf())
    assert.is_false(y:detach().requires_grad)
    refused("use detach", y.requires_grad_, y, false)
    refused("only floating%-point tensors", function() lac.zeros({ 1, dtype = "i64" }):requires_grad_() end)
    assert.is_false((x:detach() * 2).requires_grad)
  end)
end)

describe("hooks and retained gradients", function()
  it("see complete gradients and may replace them", function()
    local x = leaf { 1, 2 }
    local seen = {}
    local y = x * 2
    local remove = y:register_hook(function(g) seen[#seen + 1] = g:totable() return g * 10 end)
    local total = (y + y):sum()
    total:backward { retain_graph = true }
    assert.are.same({ { 2, 2 } }, seen)
    assert.are.same({ 40, 40 }, x.grad:totable())
    remove()
    x.grad = nil
    total:backward()
    assert.are.same({ 4, 4 }, x.grad:totable())
    assert.are.equal(1, #seen)
  end)

  it("work on leaves, once per backward", function()
    local x, calls = leaf { 1 }, 0
    x:register_hook(function(g) calls = calls + 1 return g:neg() end);
    (x * 2 + x * 3):sum():backward()
    assert.are.equal(1, calls)
    assert.are.equal(-5, x.grad:item())
    x:register_hook(function() return lac.ones { 7 } end)
    refused("a hook gave the gradient", function() (x * 2):sum():backward() end)
  end)

  it("retain_grad keeps the gradient of a result", function()
    local x = leaf { 3 }
    local y = (x * x):retain_grad();
    (y * 2):sum():backward()
    assert.are.equal(2, y.grad:item())
    assert.are.equal(12, x.grad:item())
  end)
end)

describe("lac.grad", function()
  it("gives gradients without touching .grad", function()
    local x, w, unused = leaf { 1, 2 }, leaf { 3, 4 }, leaf { 0 }
    local mid = x * w
    local gx, gm = unpack(lac.grad((mid * mid):sum(), { x, mid }))
    assert.are.same({ 2 * 3 * 3, 2 * 8 * 4 }, gx:totable())
    assert.are.same({ 6, 16 }, gm:totable())
    assert.is_nil(x.grad)
    assert.is_nil(w.grad)
    local y = x:sum()
    refused("do not depend on inputs%[1%]", lac.grad, y, unused)
    assert.is_false(lac.grad(x:sum(), unused, { allow_unused = true }))
    local ones = lac.ones { 2, dtype = "f64" }
    local g = lac.grad({ x * 2, x * 3 }, x, { grad_outputs = { ones, ones } })
    assert.are.same({ 5, 5 }, g:totable())
    refused("grad_outputs has 1 tensors for 2 outputs", lac.grad, { x, x }, x, { grad_outputs = ones })
  end)
end)

describe("operators in Lua", function()
  local cube = lac.custom_op {
    name = "cube",
    forward = function(ctx, x)
      ctx:save(x)
      return x * x * x
    end,
    backward = function(ctx, g) return g * ctx.saved[1]:square() * 3 end,
  }

  it("have gradients that pass the check", function()
    local inputs = { lac.randn { 3, dtype = "f64", grad = true } }
    local ok, report = lac.gradcheck(function(x) return cube(x) end, inputs)
    assert.is_true(ok, tostring(report))
  end)

  it("may have several outputs and arguments that are not tensors", function()
    local both = lac.custom_op {
      name = "both",
      forward = function(ctx, k, a, b)
        ctx.k = k
        return a * k, b + a
      end,
      backward = function(ctx, ga, gb) return nil, ga * ctx.k + gb, gb end,
    }
    local a, b = lac.randn { 3, dtype = "f64", grad = true }, lac.randn { 3, dtype = "f64", grad = true }
    local ok, report = lac.gradcheck(function(x, y) return both(3, x, y) end, { a, b })
    assert.is_true(ok, tostring(report))
    local _, second = both(3, a, b) -- only the second output is used
    second:sum():backward()
    assert.are.same({ 1, 1, 1 }, a.grad:totable())
  end)

  it("may hand an input back, or one tensor twice", function()
    local second = lac.custom_op { name = "second", forward = function(_, _, b) return b end,
                                   backward = function(_, g) return nil, g * 5 end }
    local a, b = leaf { 1 }, lac.ones { 1, dtype = "f64" }
    local out = second(a, b)
    assert.is_true(out.requires_grad)
    assert.is_false(b.requires_grad) -- the caller's constant stays a constant
    local twice = lac.custom_op { name = "twice", forward = function(_, x)
      local y = x * 1
      return y, y
    end, backward = function(_, g, h) return g * 2 + h * 3 end }
    local u, v = twice(a);
    (u * 10 + v):sum():backward()
    assert.are.same({ 23 }, a.grad:totable())
  end)

  it("notice changed saved tensors and wrong gradients", function()
    local w = lac.ones { 2, dtype = "f64" }
    local scale = lac.custom_op { name = "scale", forward = function(ctx, x) ctx:save(w) return x * w end,
                                  backward = function(ctx, g) return g * ctx.saved[1] end }
    local x = leaf { 1, 2 }
    local y = scale(x):sum()
    w:zero_()
    refused("scale needs a tensor it saved", y.backward, y)
    local wrong = lac.custom_op { name = "wrong", forward = function(_, a) return a * 1 end,
                                  backward = function() return lac.ones { 9, dtype = "f64" } end }
    local z = wrong(x):sum()
    refused("the rule of wrong gave the gradient Tensor f64 %[9%]", z.backward, z)
    refused("forward is required", lac.custom_op, { name = "x", backward = function() end })
    local three = lac.custom_op { name = "n", forward = function() return 3 end, backward = function() end }
    refused("result 1 of forward must be a tensor", three, x)
  end)

  it("refuse a forward that changes an argument with a gradient in place", function()
    local double = lac.custom_op { name = "double", forward = function(_, a, b)
      if b then b:add_(1) end
      return a:mul_(2)
    end, backward = function(_, g) return g * 2 end }
    local y = leaf { 1, 2 } * 3
    refused("double: forward changed its argument 1, Tensor f64 %[2%] .*, in place", double, y)
    refused("double: forward changed its argument 1", double, (leaf { 1, 2 } * 3):view(2, 1))
    assert.are.equal(4, double(lac.tensor { 2 }):item())
    assert.are.equal(4, lac.no_grad(double, leaf { 2 }):item())
    local count = lac.custom_op { name = "count", forward = function(_, a, b)
      b:add_(1)
      return a * 2
    end, backward = function(_, g) return g * 2 end }
    local x, calls = leaf { 1 }, lac.zeros { 1 }
    count(x, calls):backward()
    assert.are.same({ 2, 1 }, { x.grad:item(), calls:item() })
  end)
end)

describe("gradcheck", function()
  it("finds a wrong rule", function()
    local wrong = lac.custom_op { name = "wrong", forward = function(_, x) return x * x end,
                                  backward = function(_, g) return g * 2 end }
    local inputs = { lac.tensor({ 3 }, { dtype = "f64", grad = true }) }
    local ok, report = lac.gradcheck(function(x) return wrong(x) end, inputs)
    assert.is_false(ok)
    assert.matches("FAILED in input 1, element 1: backward", tostring(report))
  end)

  it("finds a gradient that is not deterministic or missing", function()
    local n = 0
    local unsteady = lac.custom_op { name = "unsteady", forward = function(_, x) return x * 2 end,
                                     backward = function(_, g) n = n + 1 return g * (2 + n * 1e-13) end }
    local x = lac.tensor({ 3 }, { dtype = "f64", grad = true })
    local ok, report = lac.gradcheck(function(a) return unsteady(a) end, { x })
    assert.is_false(ok)
    assert.matches("two backwards differ", tostring(report))
    ok, report = lac.gradcheck(function(a) return a:detach() * 2 end, { x })
    assert.is_false(ok)
    assert.matches("no result requires a gradient", tostring(report))
  end)

  it("checks dropout with one mask, and restores the random state", function()
    lac.manual_seed(3)
    local x = lac.randn { 20, dtype = "f64", grad = true }
    local seed, offset = lac.rng_state()
    local ok, report = lac.gradcheck(function(a) return lac.dropout(a, 0.5) end, { x })
    assert.is_true(ok, tostring(report))
    assert.are.same({ seed, offset }, { lac.rng_state() })
    assert.is_nil(x.grad)
  end)

  it("refuses inputs that it cannot check", function()
    local function same(x) return x end
    refused("must be f64, input 1 is", lac.gradcheck, same, { lac.zeros { 1, grad = true } })
    refused("no input requires a gradient", lac.gradcheck, same, { lac.zeros { 1, dtype = "f64" } })
    refused("expected a function", lac.gradcheck, 3, {})
  end)
end)
