--- Scopes: what is released, what survives, and that nobody outside is hurt.
--
-- Release is observed in the pool's own statistics (live_blocks), right after the scope and without a
-- garbage collection, so a scope that only left its tensors to the collector would fail. Survival is
-- observed by reading values. The cases are the rules of scope.lua one by one: results deep in tables,
-- owners behind views, gradients of outer leaves, the graph of a returned loss, lac.keep with and without a
-- holder, errors. The last one runs training-like steps and wants the level of the pool not to rise, which
-- is what scopes are for.

local lac = require "lacuna"

-- Blocks in use, after which the collector stands still, so that what is counted is the scopes' work alone: a
-- tensor that it finds dead leaves its scope's weak list at once, but its bytes only at the next call.
local function settle()
  collectgarbage()
  collectgarbage()
  collectgarbage("stop") -- a full collection has set it going again
  return lac.memory(lac.default_device()).live_blocks
end

local function refused(pattern, f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  assert.matches(pattern, message)
end

describe("lac.scope", function()
  before_each(function() collectgarbage("stop") end)
  after_each(function() collectgarbage("restart") end)

  it("releases everything that is not returned", function()
    local before = settle()
    local inner
    local kept = lac.scope(function()
      inner = lac.ones { 100 }
      for _ = 1, 10 do local _ = inner * 2 end
      return inner + 1
    end)
    -- at once, without a collection
    assert.are.equal(before + 1, lac.memory(lac.default_device()).live_blocks)
    assert.is_true(inner:is_released())
    assert.are.equal(200, kept:sum():item())
    refused("after release", function() return inner + 1 end)
  end)

  it("passes arguments and results through", function()
    local a, b, c = lac.scope(function(x, y) return y, nil, x end, 1, 2)
    assert.are.equal(2, a)
    assert.is_nil(b)
    assert.are.equal(1, c)
    refused("expected a function, got nil", lac.scope)
  end)

  it("keeps what is reachable from returned tables", function()
    local result = lac.scope(function()
      local t = { deep = { { lac.ones { 2 } } } }
      t.self = t
      t.view = lac.full { 4, value = 3 }:view(2, 2)[1]
      return t
    end)
    assert.are.same({ 1, 1 }, result.deep[1][1]:totable())
    assert.are.same({ 3, 3 }, result.view:totable()) -- the owner behind the view lives
  end)

  it("never frees outer storage through an inner view", function()
    local outer = lac.ones { 4 }
    lac.scope(function()
      local v = outer:view(2, 2)
      local _ = v:t():contiguous()
      v[1] = 5
    end)
    assert.are.same({ 5, 5, 1, 1 }, outer:totable())
  end)

  it("keeps gradients of outer leaves", function()
    local w = lac.ones { 3, grad = true }
    lac.scope(function() (w * w):sum():backward() end)
    assert.are.same({ 2, 2, 2 }, w.grad:totable())
    lac.scope(function() -- accumulates into a gradient that lives outside
      (w * 3):sum():backward()
    end)
    assert.are.same({ 5, 5, 5 }, w.grad:totable())
    lac.scope(function()
      w.grad = nil
      lac.scope(function() (w * 2):sum():backward() end)
    end)
    assert.are.same({ 2, 2, 2 }, w.grad:totable())
  end)

  it("ends the gradient of a view with the view, whatever it looks into", function()
    local x, kept = lac.ones { 2, 2 }, nil
    lac.scope(function() -- one that was made here
      local leaf = x:detach():requires_grad_(true)
      lac.scope(function() (leaf * 2):sum():backward() end)
      assert.are.same({ { 2, 2 }, { 2, 2 } }, leaf.grad:totable())
      kept = leaf.grad
    end)
    assert.is_true(kept:is_released())
    local outer = x:view(4):requires_grad_(true)
    lac.scope(function() (outer * 3):sum():backward() end)
    assert.are.same({ 3, 3, 3, 3 }, outer.grad:totable())
    -- returned, or held by a name: it goes on in the scope around
    local held
    lac.scope(function()
      local returned = lac.scope(function()
        held = x:view(4):requires_grad_(true)
        local leaf = x:view(4):requires_grad_(true)
        leaf:sum():backward()
        return leaf
      end)
      lac.scope(function() (returned * held):sum():backward() end)
      assert.are.same({ 2, 2, 2, 2 }, returned.grad:totable())
      assert.are.same({ 1, 1, 1, 1 }, held.grad:totable())
    end)
    lac.scope(function()
      held.grad = nil
      held:sum():backward()
    end)
    assert.are.same({ 1, 1, 1, 1 }, held.grad:totable())
    -- a loop over views leaves nothing to the collector
    collectgarbage()
    collectgarbage()
    collectgarbage "stop"
    local before = lac.memory().live
    for _ = 1, 10 do
      lac.scope(function() (x[1]:requires_grad_(true) * 2):sum():backward() end)
    end
    local after = lac.memory().live
    collectgarbage "restart"
    assert.are.equal(before, after)
  end)

  it("keeps the graph of a returned loss", function()
    local w = lac.ones { 3, grad = true }
    local loss = lac.scope(function()
      local h = (w * 2):exp()
      return (h * h):sum()
    end)
    loss:backward() -- 4 e^4
    assert.is_true(math.abs(w.grad[1]:item() - 4 * math.exp(4)) < 1e-3)
  end)

  it("keeps what lac.keep marks, one scope outwards", function()
    local a, b
    lac.scope(function()
      lac.scope(function()
        a, b = lac.ones { 2 }, lac.keep { lac.full { 2, value = 7 } }
      end)
      assert.is_true(a:is_released())
      assert.are.same({ 7, 7 }, b[1]:totable())
    end)
    assert.is_true(b[1]:is_released())
    refused("expected a tensor or a table of tensors, got 3", lac.keep, 3)
    local x = lac.ones { 1 }
    assert.are.equal(x, lac.keep(x)) -- outside of any scope: nothing to do
  end)

  it("keeps a state as long as its holder", function()
    local parameter = lac.ones { 2 }
    local moment
    lac.scope(function()
      lac.scope(function() moment = lac.keep(lac.zeros { 2 }, parameter) end)
    end)
    assert.are.same({ 0, 0 }, moment:totable())
  end)

  it("releases on errors too, and passes them on", function()
    local before = settle()
    local inner
    refused("^tests/scope_spec.lua:%d+: my message$", lac.scope, function()
      inner = lac.ones { 10 }
      error("my message")
    end)
    assert.are.equal(before, lac.memory(lac.default_device()).live_blocks)
    assert.is_true(inner:is_released())
    assert.matches("stack traceback", require("lacuna.lib").last_traceback)
    local thrown = {}
    local ok, got = pcall(lac.scope, function() error(thrown) end)
    assert.is_false(ok)
    assert.are.equal(thrown, got)
    local t = lac.scope(function() return lac.ones { 1 } end) -- the stack of scopes is intact
    assert.are.equal(1, t:item())
  end)

  it("leaves dead tensors to the collector meanwhile", function()
    lac.scope(function()
      local before = settle()
      for _ = 1, 100 do local _ = lac.ones { 10 } end
      assert.is_true(settle() <= before + 1)
    end)
  end)

  it("holds the pool level over training-like steps", function()
    local w = lac.randn { 32, 32, grad = true }
    local level
    for i = 1, 20 do
      lac.scope(function()
        local loss = (lac.randn { 8, 32 }:matmul(w)):tanh():square():mean()
        loss:backward()
        lac.no_grad(function() w:add_(w.grad, -0.1) end)
        w.grad:zero_()
      end)
      if i == 3 then level = lac.memory(lac.default_device()).live end
    end
    assert.is_true(lac.memory(lac.default_device()).live <= level)
  end)
end)
