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
  add(getmetatable(lac).__settings, "lac.")
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

describe("named arguments", function()
  local x = lac.arange{ 12 }:float():view(3, 4)
  local idx, some = lac.tensor({ { 0, 2, 1, 0 } }, { dtype = "i64" }), lac.tensor({ 2, 0 }, { dtype = "i64" })
  local v, mask = lac.tensor{ 1, 2, 3, 4 }, x:gt(4)
  local row, two, ones = lac.full({ 1, 4 }, 7), lac.full({ 2, 4 }, 7), lac.ones{ 3, 4 }

  -- first argument, then the others; every one is not what it is by default
  local CASES = {
    all = { x, 2, true }, any = { x, 2, true }, argmax = { x, 2, true }, argmin = { x, 2, true },
    argsort = { x, 1, true }, bucketize = { x, v, true }, cat = { { x, x }, 2 }, cdist = { x, x + 1, 1 },
    chunk = { x, 2, 2 }, cosine_similarity = { x, ones, 1, 500 }, count_nonzero = { x, 2, true },
    cummax = { x, 1 }, cummin = { x, 1 }, cumprod = { x, 1 }, cumsum = { x, 1 }, diag = { v, 1 },
    diagonal = { x, 1, 2, 1 }, diff = { x, 2, 1 }, dropout = { x, 0.25, true },
    flatten = { lac.ones{ 2, 3, 4, 5 }, 2, 3 }, gather = { x, 1, idx }, group_norm = { x, 2, v, v, 0.5 },
    histc = { x, 4, 1, 9 }, index_add = { x, 1, some, two, 3 }, index_add_ = { x, 1, some, two, 3 },
    index_copy = { x, 1, some, two }, index_copy_ = { x, 1, some, two }, index_fill = { x, 1, some, 9 },
    index_fill_ = { x, 1, some, 9 }, index_select = { x, 1, some }, kthvalue = { x, 2, 1, true },
    layernorm = { x, v, v, 0.5 }, log_softmax = { x, 1 }, logcumsumexp = { x, 1 },
    logsumexp = { x, 1, true }, masked_fill = { x, mask, 9 }, masked_fill_ = { x, mask, 9 },
    max = { x, 1, true }, mean = { x, 1, true }, median = { x, 1, true }, min = { x, 1, true },
    multinomial = { v, 3, true }, narrow = { x, 1, 2, 2 }, norm = { x, 1, 1, true },
    normal_ = { x, 3, 2 }, prod = { x, 1, true }, quantile = { x, { 0.5, 0.25 }, 1, true },
    repeat_interleave = { x, 2, 1 }, rmsnorm = { x, v, 0.5 }, roll = { x, 1, 2 },
    scatter = { x, 1, idx, row }, scatter_ = { x, 1, idx, row }, scatter_add = { x, 1, idx, row },
    scatter_add_ = { x, 1, idx, row }, scatter_reduce = { x, 1, idx, row, "mean", false },
    scatter_reduce_ = { x, 1, idx, row, "mean", false }, searchsorted = { v, v, true }, select = { x, 1, 2 },
    size = { x, 2 }, stride = { x, 1 }, softmax = { x, 1 }, sort = { x, 1, true }, split = { x, 3, 2 },
    squeeze = { row, 1 }, stack = { { x, x }, 2 }, std = { x, 1, true, 0 }, sum = { x, 1, true },
    take_along_dim = { x, idx, 1 }, tensordot = { x, ones:t():contiguous(), 1 }, topk = { x, 2, 1, false },
    transpose = { x, 1, 2 }, tril = { x, 1 }, triu = { x, 1 }, unfold = { x, 2, 2, 2 },
    uniform_ = { x, 3, 4 }, bernoulli_ = { x, 0.25 }, unsqueeze = { x, 1 }, var = { x, 1, true, 0 },
  }

  -- results as plain values; the first argument is a copy, random numbers the same
  local function results(f, first, ...)
    lac.manual_seed(7)
    local list = { f(lac.is_tensor(first) and first:clone() or first, ...) }
    if type(list[1]) == "table" and not lac.is_tensor(list[1]) and list[1][1] then list = list[1] end
    for i, value in ipairs(list) do
      if lac.is_tensor(value) then list[i] = { value:totable(), value:size() } end
    end
    return list
  end

  -- the function and the arguments after `at` places by name
  local function by_name(f, names, case, at)
    local named, given = {}, {}
    for i = 1, #case do
      if i <= at then given[i] = case[i] else named[names[i]] = case[i] end
    end
    given[at + 1] = named
    return results(f, unpack(given, 1, at + 1))
  end

  it("are those by place, all of them or the last ones", function()
    local listed = {}
    for _, op in ipairs(arguments.with_names()) do
      local case, names = CASES[op], arguments.named(op)
      local f = tensor.methods[op] or lac[op]
      assert.is_truthy(case, op .. " has no case here")
      assert.equal(#names, #case, op)
      local expected = results(f, unpack(case))
      for at = 1, #case - 1 do assert.same(expected, by_name(f, names, case, at), op) end
      local forms = { tensor.methods[op], rawget(lac, op) }
      for _, form in pairs(forms) do
        assert.same(expected, by_name(form, names, case, 1), op)
        assert.error_matches(function() form(case[1], { [names[2] .. "q"] = 1 }) end,
          op .. ": unknown argument '" .. names[2] .. "q', did you mean '")
      end
      listed[op] = true
    end
    for op in pairs(CASES) do assert.is_true(listed[op], op) end
  end)

  it("each say something: a table without one is another result, or an error", function()
    for op, case in pairs(CASES) do
      local f, names = tensor.methods[op] or lac[op], arguments.named(op)
      local expected = results(f, unpack(case))
      for i = 2, #case do
        local named = {}
        for k = 2, #case do if k ~= i then named[names[k]] = case[k] end end
        local ok, other = pcall(results, f, case[1], named)
        if ok and names[i] ~= "training" then
          assert.is_false(pcall(assert.same, expected, other), op .. " without " .. names[i])
        end
      end
    end
  end)

  it("are differentiated", function()
    local a, b = x:clone():requires_grad_(), x:clone():requires_grad_()
    a:softmax{ dim = 1 }:norm{ p = 1, dim = 2 }:cumsum{ dim = 1 }:var{ correction = 0 }:backward()
    b:softmax(1):norm(1, 2):cumsum(1):var(nil, nil, 0):backward()
    assert.same(b.grad:totable(), a.grad:totable())
  end)

  it("are refused where they are wrong, in the words of other libraries too", function()
    local function refused(pattern, f, ...)
      local ok, message = pcall(f, ...)
      assert.is_false(ok)
      assert.matches(pattern, message)
      assert.matches("arguments_spec", message)
    end
    refused("^sum: unknown argument 'axis', did you mean 'dim'%? valid: dim, keepdim", x.sum, x, { axis = 1 })
    refused("^topk: k is given twice, by its place and by its name", x.topk, x, 3, { k = 1 })
    refused("^sum: named arguments come last, in one table; got true after it", x.sum, x, { dim = 1 }, true)
    refused("^gather: unknown argument 'index', did you mean 'idx'%?", x.gather, x, { index = idx })
    refused("^softmax: unknown argument 'zzz'; valid: dim", x.softmax, x, { zzz = 1 })
    refused("^narrow: .*dim", x.narrow, x, { start = 1 })
    refused("^sum: x is given twice", x.sum, x, { x = 1 })
  end)

  it("are in the help, as they are written", function()
    assert.matches("^lac.topk%(x, k, dim, largest%)", lac.help "topk")
    assert.matches("By name: x:topk{ k = %.%.%., dim = %.%.%., largest = %.%.%. }$", lac.help "topk")
    assert.matches("By name: lac.cat%(list, { dim = %.%.%. }%)$", lac.help "cat")
    assert.matches("By name: x:normal_{ mean = %.%.%., std = %.%.%. }$", lac.help(x.normal_))
    assert.is_nil((lac.help "matmul"):find("By name", 1, true))
  end)

  it("are taken by every operator with arguments that are not tensors alone", function()
    -- tensors only, numbers that make a shape, or a table of options of its own
    local PLACES = " bmm dot equal outer kron matmul expand expand_as reshape view where embedding linear "
      .. "linear_act gelu_norm masked_select swap t copy_ fill_ add_ sub_ mul_ clamp "
    local ops = require "lacuna.ops"
    for name, f in pairs(ops.fn) do
      local count, names = arguments.of(f)
      local record = ops.table[name]
      local last = names[count]
      if count > 1 and count < math.huge and rawget(lac, name) and not (record and record.internal)
        and last ~= "more" and last ~= "options" and last ~= "o" and last ~= "r" and names[2] ~= "y"
        and not PLACES:find(" " .. name .. " ", 1, true) then
        assert.is_truthy(arguments.named(name), name .. "(" .. table.concat(names, ", ") .. ")")
      end
    end
  end)
end)

describe("an error of an operator", function()
  local x, y = lac.randn { 2, 3 }, lac.randn { 2, 3, 4, 8 }
  local long = lac.tensor({ 1, 2 }, { dtype = "i64" })
  -- wrong somewhere for most operators
  local GIVEN = { { "x" }, { x, "x" }, { x, true }, { x, -3 }, { x, y }, { y, x }, { x, x:double() },
                  { x, long }, { long, x }, { x, x, "x" }, { x, x, x, "x" }, { x, { nonsense = 1 } },
                  { x, x, { nonsense = 1 } }, { x, x, x, { nonsense = 1 } }, { x, 1, "x" },
                  { x, 1, long, "x" }, { x, 9 }, { y, 2, 7.5 } }
  -- messages of what is wrong with a table of options or a tensor, by whoever asks
  local OTHERS = { attention = true, tensor = true, index = true }

  it("begins with the operator that was called, also where that is made of others", function()
    local seen = 0
    for _, place in ipairs { lac, tensor.methods } do
      for name, f in pairs(place) do
        local record = require("lacuna.ops").table[name]
        if type(f) == "function" and (record and not record.internal or place ~= lac) and name ~= "attend"
          and name ~= "backward" then
          for _, given in ipairs(GIVEN) do
            local copy = {}
            for i, v in ipairs(given) do copy[i] = lac.is_tensor(v) and v:clone() or v end
            local ok, message = pcall(f, unpack(copy))
            local begins = not ok and message:match "^([%w_]+):"
            if begins and not OTHERS[begins] then
              assert.are.equal(name, begins, message)
              seen = seen + 1
            end
          end
        end
      end
    end
    assert.is_true(seen > 3000, seen)
  end)

  it("has no name of the engine's in it", function()
    local w, t = lac.randn { 16, 3, grad = true }, lac.tensor({ 1, 99 }, { dtype = "i64" })
    local model = lac.nn.LongNetLM { vocab = 32, layers = 1, width = 8, heads = 2, context = 16,
                                     segments = { 16 }, dilations = { 1 } }
    local ids = lac.randint { 1, 4, high = 32 }
    for message, f in pairs {
      ["^linear_cross_entropy: target number 2 is 99"] = function()
        lac.linear_cross_entropy(x, w, nil, t)
      end,
      ["^linear_cross_entropy: target number 1 is 40 .*LongNetLM"] = function()
        model:loss(ids, lac.full({ 1, 4 }, 40, { dtype = "i64" }))
      end,
      ["^rand_like: uniform: "] = function() lac.rand_like(t) end,
      ["^uniform_: uniform needs finite bounds"] = function() x:uniform_(2, 1) end,
      ["^clamp: "] = function() x:clamp("a") end,
      ["^std: dim must be an integer"] = function() x:std "a" end,
      ["^zeros_like: takes %(t, options%), got 5 as well"] = function() lac.zeros_like(x, {}, 5) end,
    } do
      assert.error_matches(f, message)
    end
  end)

  it("keeps the operator of an index on a device, which may be told at a later call", function()
    local lib = require "lacuna.lib"
    local idx, has_cuda = lac.tensor({ 7 }, { dtype = "i64" }), lib.has_cuda
    local function message_of(f, ...) return select(2, pcall(f, ...)) end
    lib.has_cuda = true
    local late = message_of(lac.take_along_dim, lac.randn { 3 }, idx, 1)
    local now = message_of(lac.rand_like, idx)
    lib.has_cuda = false
    local on_cpu = message_of(lac.take_along_dim, lac.randn { 3 }, idx, 1)
    lib.has_cuda = has_cuda
    assert.matches("^gather: index number 1 is 7", late)
    assert.matches("^rand_like: uniform: dst must be", now)
    assert.matches("^take_along_dim: index number 1 is 7", on_cpu)
  end)

  it("names the function that was given no table, where one looks into it first", function()
    for message, f in pairs {
      ["^attention: options must be a table, got Tensor"] = function() lac.attention(x) end,
      ["^attention: options must be a table with segments and dilations, got Tensor"] = function()
        lac.attend(y, y, y, x)
      end,
      ["^LongNetLM: options must be a table, got Tensor"] = function() lac.nn.LongNetLM(x) end,
      ["^LongNetEncoder: options must be a table, got Tensor"] = function() lac.nn.LongNetEncoder(x) end,
      ["^LongNetClassifier: options must be a table, got Tensor"] = function()
        lac.nn.LongNetClassifier(x)
      end,
      ["^MultiheadDilatedAttention: options must be a table, got 3"] = function()
        lac.nn.MultiheadDilatedAttention(3)
      end,
      ["^RingMultiheadDilatedAttention: options must be a table, got 'a'"] = function()
        lac.nn.RingMultiheadDilatedAttention "a"
      end,
      ["^ModelCache: takes a list of KVCache, one for each layer, got Tensor"] = function()
        lac.nn.ModelCache(x)
      end,
      ["^Sequential: item 2 must be a module, got 'a'"] = function()
        lac.nn.Sequential(lac.nn.ReLU(), "a")
      end,
      ["^nn.module: parent must be a class of modules, got 'a'"] = function() lac.nn.module("A", "a") end,
      ["^plot.coverage: takes an attention object or a list of them, got Tensor"] = function()
        lac.plot.coverage(x, 8)
      end,
      ["^plot.coverage: item 1 must be an attention object, with explain, got 3"] = function()
        lac.plot.coverage({ 3 }, 8)
      end,
      ["^bits_per_byte: model must be a language model, got 3"] = function()
        lac.train.bits_per_byte(3, 4)
      end,
      ["^bits_per_byte: model must be a language model; it has no 'loss'"] = function()
        lac.train.bits_per_byte(lac.nn.ReLU(), 4)
      end,
      ["^load_checkpoint: path must be a string, got nil"] = function() lac.train.load_checkpoint() end,
      ["^load_model: path must be a string, got 3"] = function() lac.train.load_model(3) end,
    } do
      assert.error_matches(f, message)
    end
  end)
end)
