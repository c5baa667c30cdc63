--- One argument too many is an error, for every public function and method.
--
-- The walk below finds functions by itself, so one that is added tomorrow is held to it. Those that take any
-- number of arguments (`...`) are listed here with a call each that they must refuse; a new one fails.

local lac = require "lacuna"
local arguments = require "lacuna.arguments"
local tensor = require "lacuna.tensor"

-- functions of any number of arguments, and what they say about one too many; true: they hand all of it on
local ANY = {
  arange = { { 1, 2, 3, 4 }, "got 4 numbers" }, eye = { { 2, 3, 4 }, "got 3 numbers" },
  linspace = { { 0, 1, 5, 6 }, "got 4 numbers" }, einsum = { { "i,i", lac.ones{ 2 } }, "2 terms for 1" },
  bernoulli = { { 2, "f32" }, "size 2 must be" }, empty = { { 2, "f32" }, "size 2 must be" },
  ones = { { { 2 }, "f32" }, "table of options" }, rand = { { { 2 }, {}, 3 }, "one table of sizes" },
  randint = { { 2, "f32" }, "size 2 must be" }, randn = { { 2, {}, 3 }, "size 2 must be" },
  zeros = { { { 2 }, "f32" }, "table of options" },
  flip = { { lac.ones{ 2 }, 1, 2 }, "dim 2 is out of range" },
  permute = { { lac.ones{ 2 }, 1, 2 }, "permut" }, tile = { { lac.ones{ 2 }, 2, "3" }, "'3'" },
  xz_size = { { 3 }, "got 3" },
  checkpoint = true, detect_anomaly = true, enable_grad = true,
  leak_check = true, peak = true, no_grad = true, scope = true,
}

local MODULES = { "attention", "attention.masks", "io", "data", "log", "train", "bench", "plot", "optim",
                  "optim.schedule", "nn", "profile", "gradcheck", "config", "attend", "graph", "help",
                  "memory_report", "memory_tracking", "memory_profile", "leak_check" }

-- what a script can call by a name: { full name = function }
local function public()
  local list = {}
  local function add(t, prefix)
    for name, f in next, t do
      if type(f) == "function" and type(name) == "string" and name:sub(1, 1) ~= "_" then
        list[prefix .. name] = f
      end
    end
  end
  for _, path in ipairs(MODULES) do
    local value = lac
    for part in path:gmatch "%w[%w_]*" do value = value[part] end
    if type(value) == "table" then add(value, "lac." .. path .. ".") end
  end
  add(lac, "lac.")
  add(tensor.methods, "x:")
  return list
end

describe("an argument too many", function()
  it("is refused by every function, with what it takes", function()
    local seen, guarded = {}, 0
    for path, f in pairs(public()) do
      local count, names = arguments.of(f)
      local name = path:match "[%w_]+$"
      if count == math.huge then
        local case = ANY[name]
        assert.is_truthy(case, path .. " takes any number of arguments and is not listed")
        seen[name] = true
        if case ~= true then
          local ok, message = pcall(f, unpack(case[1]))
          assert.is_false(ok, path)
          assert.is_truthy(message:find(case[2]), message)
        end
      elseif names[count] ~= "more" then
        local given = {}
        given[count + 1] = 77
        local ok, message = pcall(f, unpack(given, 1, count + 1))
        assert.is_false(ok, path)
        assert.is_truthy(message:find("takes .*, got 77 as well"), path .. ": " .. message)
        guarded = guarded + 1
      end
    end
    assert.is_true(guarded > 350)
    for name in pairs(ANY) do assert.is_true(seen[name], name) end
  end)

  it("is refused by elementwise operators, which check it themselves", function()
    local x = lac.rand{ 2, 2 }
    local tried = 0
    for _, f in pairs(tensor.methods) do
      local count, names = arguments.of(f)
      if names[count] == "more" and count <= 3 then
        assert.error_matches(function() f(x, count == 3 and x or 77, 77) end, "takes .*, got 77 as well")
        tried = tried + 1
      end
    end
    assert.is_true(tried > 60)
    assert.error_matches(function() return x:lerp(x, 0.5, 77) end, "takes %(x, y, w%), got 77")
    assert.error_matches(function() return x:leaky_relu(0.1, 77) end, "takes one constant, got 77")
    assert.error_matches(function() return x:hardtanh(0, 1, 77) end, "takes two constants, got 77")
    assert.error_matches(function() return x:hardtanh({ min = 0 }, 7) end, "one table of options, got 7")
  end)

  it("of an operator in place is refused", function()
    local x, idx = lac.rand{ 2, 2 }, lac.zeros{ 2, 2, dtype = "i64" }
    assert.error_matches(function() x:scatter_(1, idx, x:clone(), "sum") end,
      "scatter_: takes %(t, dim, idx, src%), got 'sum' as well")
    assert.error_matches(function() x:exp_(77) end, "got 77 as well")
    assert.error_matches(function() x:clamp_(0, 1, 77) end, "got 77 as well")
    assert.error_matches(function() x:scatter_reduce_(1, idx, x:clone(), "sum", true, 77) end, "got 77")
  end)

  it("is refused by constructors, methods and calls of modules", function()
    local layer = lac.nn.Linear(2, 2)
    local x = lac.rand{ 1, 2 }
    local optimizer, dense = lac.optim.sgd(layer, { lr = 1 }), lac.attention{ variant = "dense", heads = 2 }
    assert.error_matches(function() lac.nn.Linear(2, 2, {}, true) end,
      "Linear: takes %(inputs, outputs, options%), got true as well")
    assert.error_matches(function() layer(x, x) end,
      "Linear: takes %(x%), got Tensor f32 %[1 x 2%] cpu as well")
    assert.error_matches(function() layer:eval(true) end, "eval: takes nothing, got true as well")
    assert.error_matches(function() optimizer:step({}, 77) end, "step: takes %(options%), got 77 as well")
    assert.error_matches(function() dense(x, x, x, {}, 77) end, "got 77 as well")

    local Gate = lac.nn.module "Gate"
    function Gate:init(width) self.layer = lac.nn.Linear(width, width) end
    function Gate:forward(y) return self.layer(y) end
    function Gate:mine() return self end -- takes and ignores what it likes: it is the script's
    local gate = Gate(2)
    assert.error_matches(function() Gate(2, 77) end, "Gate: takes %(width%), got 77 as well")
    assert.error_matches(function() gate(x, 77) end, "Gate: takes %(y%), got 77 as well %[Gate, ")
    assert.are.equal(gate, gate:mine(77))
    assert.are.same({ 1, 2 }, { unpack(gate(x, nil):size()) })
  end)

  it("leaves help, places and values as they are", function()
    assert.matches("^lac.softmax%(x, dim%)\n.*without overflow", lac.help "softmax")
    local f = function(a, b) return a, b end
    local g = arguments.exact("pair", f)
    assert.are.same({ 1, 2 }, { g(1, 2) })
    assert.are.same({ 1 }, { g(1) })
    assert.are.equal(g, arguments.exact("pair", f))
    assert.are.equal(g, arguments.exact("pair", g))
    assert.are.equal(f, arguments.inner(g))
    assert.error_matches(function() g(1, 2, 3) end, "^pair: takes %(a, b%), got 3 as well %[.*arguments_spec")
  end)
end)
