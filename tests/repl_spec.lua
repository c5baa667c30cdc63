-- repl_spec.lua: the logic of the interactive session, without a terminal.
--
-- A session is fed lines and its output is collected, in an environment of its own, so that what a spec
-- defines is gone with it. Printing, completion and tracebacks are functions and tested as such. The promises
-- that matter most are negative ones (completion runs no code, printing ends on cyclic tables, no error
-- leaves the session), so each has a value built to break it. Editing, history on disk and Ctrl-C need a
-- terminal and a process: command_spec.lua.

local repl = require "lacuna.repl"

local function new_session(extra)
  local env = setmetatable({}, { __index = _G })
  local out = {}
  local options = { env = env, write = function(text) out[#out + 1] = text end }
  for key, value in pairs(extra or {}) do options[key] = value end
  local session = repl.new(options)
  -- feed lines, return what was written
  return function(...)
    for i = 1, select("#", ...) do session:feed((select(i, ...))) end
    local text = table.concat(out)
    for i = #out, 1, -1 do out[i] = nil end
    return text
  end, session, env
end

describe("repl: an entry", function()
  it("shows the values of an expression, not those that are nil", function()
    local feed = new_session()
    assert.equal("2\n", feed "1 + 1")
    assert.equal("1\nx\n", feed "1, nil, 'x'")
    assert.equal("", feed "nil")
    assert.equal("false\n", feed "false")
    assert.equal("", feed "(function() end)()")
    assert.equal("3\n", feed "= 3")
    assert.equal("4\n", feed "4 -- with a comment")
    assert.equal("5\n", feed "return 5;")
  end)

  it("may be a statement, and keeps globals", function()
    local feed = new_session()
    assert.equal("", feed "x = 20")
    assert.equal("41\n", feed "x * 2 + 1")
    assert.equal("", feed "-- nothing")
    assert.equal("", feed "   ")
  end)

  it("leaves its first value in _, unless that is nil", function()
    local feed = new_session()
    assert.equal("7\n8\n", feed "7, 8")
    assert.equal("14\n", feed "_ * 2")
    feed "nil"
    assert.equal("14\n", feed "_")
    feed "false"
    assert.equal("false\n", feed "_")
  end)

  it("goes on over lines until it is complete", function()
    local feed, session = new_session()
    assert.equal("> ", session:prompt())
    assert.equal("more", (session:feed "for i = 1, 2 do"))
    assert.equal(">> ", session:prompt())
    assert.equal("more", (session:feed "  out = i * 10"))
    local state, entry = session:feed "end"
    assert.equal("done", state)
    assert.equal("for i = 1, 2 do\n  out = i * 10\nend", entry)
    assert.equal("> ", session:prompt())
    assert.equal("20\n", feed "out")
    assert.equal("6\n", feed("1 +", "2 +", "3"))
    assert.equal("a\nb\n", feed("[[a", "b]]"))
    assert.equal("", feed("--[[ a comment", "of two lines ]]"))
    assert.equal("3\n", feed("(function()", "return 3", "end)()"))
  end)

  it("is dropped by reset", function()
    local feed, session = new_session()
    session:feed "if true then"
    session:reset()
    assert.equal("> ", session:prompt())
    assert.equal("1\n", feed "1")
  end)

  it("that is wrong is reported at once, not continued", function()
    local feed, session = new_session()
    local wrong = {
      ["x = = 1"] = "unexpected symbol near '='",
      ["foo bar"] = "'=' expected near 'bar'",
      ["1 + )"] = "unexpected symbol near ')'",
      ["'abc"] = "unfinished string",
      ["end"] = "'<eof>' expected near 'end'",
      ["x = }"] = "unexpected symbol near '}'",
    }
    for line, message in pairs(wrong) do
      local text = feed(line)
      assert.truthy(text:find(message, 1, true), line .. " gave " .. text)
      assert.equal("> ", session:prompt())
    end
  end)

  it("says once that locals are local", function()
    local feed = new_session()
    assert.truthy(feed("local a = 1"):find("a local ends with its entry", 1, true))
    assert.equal("", feed "local b = 2")
    assert.equal("", new_session()("localised = 1"))
  end)
end)

describe("repl: an error", function()
  it("shows message and the user's frames, and the session goes on", function()
    local feed = new_session()
    feed "function inner() error('deep') end"
    feed "function outer() inner() return 1 end"
    assert.equal(table.concat({
      "entry 1:1: deep",
      "  entry 1:1: in function 'inner'",
      "  entry 2:1: in function 'outer'",
      "  entry 3:1: in main chunk",
      "",
    }, "\n"), feed "outer()")
    assert.equal("2\n", feed "1 + 1")
  end)

  it("names the entry also when the error is in a call at its end", function()
    assert.equal("entry 1:1: direct\n  entry 1:1: in main chunk\n", (new_session()) "error('direct')")
  end)

  it("may be any object", function()
    local feed = new_session()
    assert.truthy(feed("error({ code = 3 })"):find("(the error is a table: { code = 3 })", 1, true))
    feed "object = setmetatable({}, { __tostring = function() return 'spoken' end })"
    assert.truthy(feed("error(object)"):find("^spoken\n  entry"))
    assert.truthy(feed("error(nil)"):find("(the error is a nil: nil)", 1, true))
  end)

  it("may come from a value's own __tostring", function()
    local feed = new_session()
    local text = feed "setmetatable({}, { __tostring = function() error('mute') end })"
    assert.truthy(text:find("^<table, its __tostring failed: .*mute>\n$"), text)
    assert.equal("1\n", feed "1")
  end)

  it("deep in a recursion shows a few frames", function()
    local feed = new_session()
    feed "function down(n) if n == 0 then error('bottom') end return 1 + down(n - 1) end"
    local text = feed "down(100)"
    local _, lines = text:gsub("\n", "")
    assert.equal(10, lines, text)
    assert.truthy(text:find("\n  ...\n$"), text)
  end)

  it("goes through the guard that was given", function()
    local called = {}
    local feed = new_session { guard = function(f, ...)
      called[#called + 1] = f ~= nil and select("#", ...)
      return false, "stopped by the guard"
    end }
    assert.equal("stopped by the guard\n", feed "1 + 1")
    assert.equal(1, #called)
  end)
end)

describe("repl.show", function()
  local show = repl.show

  it("sorts keys, numbers first, and quotes what is no name", function()
    assert.equal("{}", show {})
    assert.equal("{ 1, 2, 3 }", show { 1, 2, 3 })
    assert.equal('{ 1, [3] = "c", [5.5] = 0, a = "x\\ny", b = true }',
                 show { 1, nil, "c", b = true, a = "x\ny", [5.5] = 0 })
    assert.equal('{ ["end"] = 1, ["no name"] = 2, [true] = 3 }',
                 show { [true] = 3, ["no name"] = 2, ["end"] = 1 })
  end)

  it("breaks what is too wide", function()
    local long = ("x"):rep(40)
    assert.equal(('{\n  a = "%s",\n  b = {\n    "%s",\n    "%s",\n    1\n  }\n}'):format(long, long, long),
                 show({ a = long, b = { long, long, 1 } }))
    for line in show({ list = { 1, 2, 3 }, b = { c = { d = 1 } } }, { width = 20 }):gmatch("[^\n]+") do
      assert.is_true(#line <= 20, line)
    end
  end)

  it("ends: depth, number of entries, cycles", function()
    assert.equal("{ { { {...} } } }", show { { { { { 1 } } } } })
    assert.equal("{ { { { {} } } } }", show { { { { {} } } } }:gsub("{%.%.%.}", "{ {} }"))
    local many = {}
    for i = 1, 100 do many[i] = i end
    assert.truthy(show(many):find("40,\n  ... 60 more\n}", 1, true))
    local cycle = { name = "me" }
    cycle.self = cycle
    assert.equal('{ name = "me", self = <cycle> }', show(cycle))
    local shared = { 1 }
    assert.equal("{ { 1 }, { 1 } }", show { shared, shared })
  end)

  it("lets objects speak, in one line inside of tables", function()
    local object = setmetatable({}, { __tostring = function() return "first\nsecond" end })
    assert.equal("first\nsecond", show(object))
    assert.equal("{ first ... }", show { object })
    local hidden = setmetatable({ 1 }, { __metatable = "locked" })
    assert.equal("{ 1 }", show(hidden))
  end)

  it("does not index, so strict tables can be shown", function()
    local strict = setmetatable({ a = 1 }, { __index = function() error "strict" end })
    assert.equal("{ a = 1 }", show(strict))
  end)

  it("shows strings as they are, numbers and cdata as Lua does", function()
    assert.equal("a\nb", show "a\nb")
    assert.equal("5LL", show(5LL))
    assert.equal("nil", show(nil))
  end)
end)

describe("repl.complete", function()
  local function complete(env, word) return table.concat(repl.complete(env, word), " ") end

  it("finds globals, fields and keywords", function()
    local env = { print = print, pairs = pairs, private = 1, lib = { zeros = print, zip = 1, ones = 2 } }
    assert.equal("pairs print private", complete(env, "p"))
    assert.equal("lib.zeros lib.zip", complete(env, "lib.z"))
    assert.equal("lib.ones lib.zeros lib.zip", complete(env, "lib."))
    assert.equal("function", complete(env, "func"))
    assert.equal("", complete(env, "lib.none"))
    assert.equal("", complete(env, "none.at.all"))
    assert.equal("", complete(env, ".x"))
    assert.equal("", complete(env, "a-b"))
    assert.equal("string.rep", complete(_G, "string.rep"))
  end)

  it("finds methods through __index, also of parents; after : only functions", function()
    local Base = { save = print, label = "b" }
    local Class = setmetatable({ sum = print, size = print, shape = 1 }, { __index = Base })
    Class.__index = Class
    local env = { t = setmetatable({ stored = 1 }, Class), text = "abc" }
    assert.equal("t.save t.shape t.size t.stored t.sum", complete(env, "t.s"))
    assert.equal("t:save t:size t:sum", complete(env, "t:s"))
    assert.equal("text:rep text:reverse", complete(env, "text:re"))
  end)

  it("finds methods where __index is a function, and calls nothing", function()
    local function never() error "user code was run" end
    local class = { sum = print, size = print, __index = never, __tostring = never, __call = never }
    local env = setmetatable({ t = setmetatable({ data = 1 }, class) }, { __index = never })
    assert.equal("t.size t.sum", complete(env, "t.s"))
    assert.equal("", complete(env, "t.missing.more"))
    assert.equal("", complete(env, "missing.more"))
    assert.equal("t.data t.size t.sum", complete(env, "t."))
  end)

  it("takes the names that a metatable lists", function()
    local function never() error "user code was run" end
    local env = { t = setmetatable({}, { __index = never, __names = { zeros = print, zip = true } }) }
    assert.equal("t.zeros t.zip", complete(env, "t.z"))
    assert.equal("t:zeros", complete(env, "t:z"))
  end)

  it("completes the library's strict namespace", function()
    local env = { lac = require "lacuna" }
    assert.equal("lac.zeros lac.zeros_like", complete(env, "lac.zeros"))
    assert.equal("", complete(env, "lac.no_such_thing.x"))
  end)

  it("hides private names until asked, ends on cyclic metatables", function()
    local env = { t = { _hidden = 1, shown = 2, ["not a name"] = 3, [1] = 4 } }
    assert.equal("t.shown", complete(env, "t."))
    assert.equal("t._hidden", complete(env, "t._"))
    local a, b = {}, {}
    setmetatable(a, { __index = b })
    setmetatable(b, { __index = a })
    a.x1, b.x2 = 1, 2
    assert.equal("a.x1 a.x2", complete({ a = a }, "a.x"))
  end)
end)

describe("repl: help and history", function()
  it("help is a page, help(x) is about x", function()
    local feed = new_session()
    assert.truthy(feed("help"):find("Ctrl%-D"))
    assert.truthy(feed("help()"):find("Ctrl%-D"))
    assert.equal("{ 1, 2 }\n", feed "help({ 1, 2 })")
    for _, word in ipairs { "quit", "quit()", "exit", "exit()" } do
      assert.equal("Ctrl-D leaves\n", feed(word))
    end
  end)

  it("help reads the comments of the source", function()
    local lac = require "lacuna"
    for name, text in pairs {
      memory_limit = "^lac%.memory_limit%(bytes, options%)\n  Limits of a pool in bytes; 0 removes one.*\n"
        .. "  bytes %(integer|table%): hard limit .*\n  options %(table, optional%): soft = 0",
      roll = "^lac%.roll%(x, shifts, dims%)\n  Elements moved along dimensions",
      sum = "^lac%.sum%(x, dim, keepdim%)\n  sum%(x, dim, keepdim%): the sum over dim",
      argmin = "where the smallest element is",
      gather = "^lac%.gather%(x, dim, idx%)\n  gather",
      exp = "^lac%.exp%(x%)\n  Elementwise",
      ["nn.Linear"] = "^lac%.nn%.Linear%(inputs, outputs, options%)\n  y = x W%^T %+ b%.\n  inputs %(int",
      ["attention.masks.local_window"] = "^lac%.attention%.masks%.local_window%(window%)\n  Key blocks",
      ["attention"] = "\n  longnet +every head in every branch",
      narrow = "positions of dimension dim",
    } do
      assert.matches(text, lac.help(name))
    end
    assert.equal(lac.help "attend", lac.help(lac.attend))
    assert.matches("\n  heatmap%(spec%) +A matrix as colours %(viridis%), row 1 at the", lac.help(lac.plot))
    assert.matches("\n  Linear%(inputs, outputs, options%) +y = x W%^T %+ b\n", lac.help "nn")
    assert.matches("\n  local_window%(window%) +Key blocks within", lac.help(lac.attention.masks))
    assert.matches("^lac%.optim%.schedule%.cosine%(options%)\n  From 1 at", lac.help "optim.schedule.cosine")
    assert.matches("\n  linear%(options%) +From 1 at step 0 to `min`", lac.help "optim.schedule")
    local object = lac.help(lac.nn.Linear(2, 3))
    assert.matches("^Linear%(2 %-> 3%)\n", object)
    assert.matches("\n  :forward%(x%)", object)
    assert.matches("\n  :named_parameters%(%) +Iterate: for name, tensor in", object)
    assert.matches("^lac.attention.masks.random%(density, seed%)\n", lac.help "masks.random")
    assert.matches("^x:scatter_add_%(dim, idx, src%)\n", lac.help "scatter_add_")
    assert.is_nil(lac.help(lac.ones { 2 }))
    assert.error_matches(function() lac.help "sofmax" end, "there is no 'sofmax', did you mean 'softmax'?")
    assert.matches("\n  dim %(integer, default %-1%)\n  descending %(boolean, default false%)",
      lac.help "argsort")
    assert.matches("^lac%.nn%.LeakyReLU%(slope%)\n  lac%.leaky_relu as a module; slope",
      lac.help "nn.LeakyReLU")
    assert.matches("\n  lac%.cross_entropy as a module.* label_smoothing,", lac.help "nn.CrossEntropyLoss")
    assert.matches("variant = 'improved', fused = true", lac.help "nn.ImprovedMultiheadDilatedAttention")
    assert.matches("^lacuna%.log%.open%(options%)\n  Start a run's folder", lac.help "log.open")
    assert.equal(lac.help "log.open", lac.help(require("lacuna.log").open))
    assert.matches("^lac%.config\n  attention%(options%) +Options, checked", lac.help "config")
    assert.matches("cosine_restarts%(options%) +Cosine decay with warm restarts %(.*, eq 5%)",
      lac.help(lac.optim.schedule))
    --- One of a script.
    -- @tparam number x of any size
    local function mine(x, ...) return x, ... end
    assert.equal("function(x, ...)\n  One of a script.\n  x (number): of any size", lac.help(mine))
    assert.matches("no comment at tests/repl_spec", lac.help(function() end))
  end)

  it("help gives an example of the main entries, and all examples run", function()
    local lac, found = require "lacuna", {}
    local function try(name)
      local text = lac.help(name)
      local code = text:match "\n  For example:\n\n(.*)$"
      if not code then return end
      code = code:gsub("\n  %u.*$", "") -- what is listed behind it
      local chunk = assert(loadstring("local lac, print = ...\n" .. code, "=" .. name))
      local printed = 0
      lac.scope(function() chunk(lac, function(...)
        for i = 1, select("#", ...) do assert.is_not_nil((select(i, ...)), name) end
        printed = printed + 1
      end) end)
      assert.is_true(printed > 0, name)
      found[name] = true
    end
    for _, module in ipairs { "", "nn.", "optim.", "train." } do
      local t = module == "" and lac or lac[module:sub(1, -2)]
      for name, value in pairs(t) do
        if type(value) == "function" or type(value) == "table" and rawget(value, "__index") then
          try(module .. name)
        end
      end
    end
    for _, name in ipairs { "attend", "attention", "nn.MultiheadDilatedAttention", "nn.LongNetLM",
                            "nn.LongNetEncoder", "nn.LongNetClassifier", "nn.LongNetEncoderDecoder",
                            "train.fit", "optim.adamw", "optim.adam", "optim.sgd", "optim.lion",
                            "optim.loss_scaler" } do
      if not found[name] then try(name) end
      assert.is_true(found[name], name)
    end
  end)

  it("help lists options with their defaults, from the rules that check them", function()
    local lac = require "lacuna"
    local function lists(name, ...)
      local text = lac.help(name)
      for _, part in ipairs { ... } do assert.is_truthy(text:find(part, 1, true), name .. ": " .. part) end
    end
    lists("attend", "\n  Required: dilations (a list of integers), segments (a list of integers)\n",
      "\n  Defaults: alibi", 'align = "start" | "end",', "causal = false,", 'heads = "all" | "split",',
      'merge: "mean" | "sum" | "lse" | "lse_detach",', "window (an integer)\n")
    lists("attention", "Required: heads (an integer), variant\n", "Variants:\n  adaptive ")
    lists("nn.LongNetLM", "Required: context (an integer)\n", "layers = 12,",
      'positions = "xpos" | "rope" | "alibi" | "none",', "vocab = 256,")
    lists("nn.MultiheadDilatedAttention", "Required: embed_dim (an integer), heads (an integer)\n",
      "layer_norm = true,")
    lists("train.fit", "Required: batch (a function), model (a table), optimizer (a table), steps (an integ",
      "accumulate = 1,", 'progress = "auto" | "bar" | "lines" | "none",')
    lists("optim.adamw", "Defaults: betas = {0.9, 0.999}, eps = 1e-08, lr = 0.001, master = false,")
    lists("optim.sgd", "Required: lr (a number)\n", "momentum = 0,")
    for line in lac.help("attend"):gmatch "[^\n]+" do assert.is_true(#line <= 112, line) end
  end)

  it("help says what every elementwise function computes", function()
    local lac, formulas, count = require "lacuna", require "lacuna.formulas", 0
    for name, record in pairs(require("lacuna.ops").table) do
      if record.map or record.id or formulas.text[name] then
        local text = formulas.text[name]
        assert.is_string(text, name)
        local shown = lac.help(name)
        if name ~= "clamp" then -- which has a comment of its own
          assert.truthy(shown:find("\n  Elementwise: " .. text .. ".\n", 1, true), shown)
        end
        count = count + 1
      end
    end
    local known = 0
    for name in pairs(formulas.text) do
      assert.is_function(lac[name], name)
      known = known + 1
    end
    assert.equal(known, count)
    assert.matches("^lac%.leaky_relu%(x, slope = 0%.01%)\n", lac.help "leaky_relu")
  end)

  it("help knows every function of lac", function()
    local lac = require "lacuna"
    for _, place in ipairs { lac, getmetatable(lac).__settings } do
      for name, value in pairs(place) do
        if type(value) == "function" and name ~= "class" then
          assert.not_matches("no comment", lac.help(value), nil, name)
        end
      end
    end
    for _, module in ipairs { "nn", "optim", "optim.schedule", "attention", "attention.masks", "io", "log",
                              "data", "train", "plot", "bench", "config" } do
      for name, value in pairs(require("lacuna." .. module)) do
        local class = type(value) == "table" and rawget(value, "__name") and rawget(value, "__index")
        if (type(value) == "function" or class) and not name:find "^_" then
          local text = lac.help(value)
          assert.not_matches("no comment", text, nil, module .. "." .. name)
          assert.matches("\n  ", text, nil, module .. "." .. name)
        end
      end
    end
  end)

  it("help names every option that a function takes", function()
    local lac = require "lacuna"
    local x, i, m = lac.randn { 4, 4 }, lac.zeros { 4, dtype = "i64" }, lac.nn.Linear(2, 2)
    local q, plan = lac.randn { 1, 8, 2, 4 }, { context = 8, segments = { 8 }, dilations = { 1 } }
    local function nothing() end
    local function with(options)
      options.nonsense = 1
      return options
    end
    for _, case in ipairs {
      { "zeros", with { 2 } }, { "ones", with { 2 } }, { "empty", with { 2 } }, { "eye", with { 2 } },
      { "full", with { 2, value = 3 } }, { "rand", with { 2 } }, { "randn", with { 2 } },
      { "randint", with { 2, high = 3 } }, { "bernoulli", with { 2, p = 0.5 } }, { "arange", with { 3 } },
      { "linspace", with { 0, 1, steps = 3 } }, { "randperm", 3, with {} }, { "tensor", { 1 }, with {} },
      { "from_string", "a", with {} }, { "alibi_bias", 2, 4, 4, with {} }, { "causal_mask", 3, 3, with {} },
      { "addmm", x, x, x, with {} }, { "avg_pool1d", x, 2, with {} }, { "max_pool1d", x, 2, with {} },
      { "bincount", i, with {} }, { "one_hot", i, 3, with {} }, { "pad", x, { 1, 1 }, with {} },
      { "rope", q, with {} }, { "isclose", x, x, with {} }, { "residual_norm", x, x, nil, nil, with {} },
      { "cross_entropy", x, i, with {} }, { "nll_loss", x, i, with {} }, { "kl_div", x, x, with {} },
      { "mse_loss", x, x, with {} }, { "l1_loss", x, x, with {} }, { "huber_loss", x, x, with {} },
      { "binary_cross_entropy_with_logits", x, x, with {} }, { "grad", x, x, with {} },
      { "linear_cross_entropy", x, x, nil, i, with {} }, { "to", x, with {} },
      { "attend", q, q, q, with { segments = { 4 }, dilations = { 1 } } }, { "profile", nothing, with {} },
      { "nn.Linear", 2, 2, with {} }, { "nn.Embedding", 2, 2, with {} }, { "nn.Conv1d", 2, 2, 3, with {} },
      { "nn.FeedForward", 2, 2, with {} }, { "nn.SwiGLU", 2, 2, with {} },
      { "nn.Block", with { width = 32 } },
      { "nn.MultiheadDilatedAttention", with { embed_dim = 32, heads = 4 } }, { "nn.LongNetLM", with(plan) },
      { "nn.LongNetEncoder", with(plan) }, { "nn.Sampler", 5, with {} }, { "nn.KVCache", with {} },
      { "nn.LearnedBlocks", with {} }, { "nn.AdaptiveBlocks", with {} }, { "nn.CrossEntropyLoss", with {} },
      { "optim.adamw", m, with {} }, { "optim.sgd", m, with {} }, { "optim.lion", m, with {} },
      { "optim.loss_scaler", with {} }, { "optim.schedule.cosine_restarts", with {} },
      { "plot.lines", with {} }, { "plot.heatmap", with {} }, { "plot.area", with {} },
      { "train.fit", with {} }, { "train.save_checkpoint", "a", with {} }, { "log.open", with {} },
      { "bench.time", nothing, with {} }, { "bench.run", with {} },
    } do
      local name = case[1]
      local ok, message = pcall(require("lacuna.help").named(name), unpack(case, 2, table.maxn(case)))
      local valid = tostring(message):match "valid: ([^%[]+)"
      assert.truthy(not ok and valid, name .. ": " .. tostring(message))
      local text = lac.help(name)
      for option in valid:gmatch "[%w_]+" do
        assert.truthy(text:find("%f[%w_]" .. option .. "%f[^%w_]"), name .. ": " .. option)
      end
    end
  end)

  it("the history is where the environment says", function()
    local function path(environment) return repl.history_path(function(name) return environment[name] end) end
    assert.equal("/h", path { LACUNA_HISTORY = "/h", XDG_STATE_HOME = "/s", HOME = "/home" })
    assert.equal("/s/lacuna/history", path { XDG_STATE_HOME = "/s", HOME = "/home" })
    assert.equal("/home/.local/state/lacuna/history", path { XDG_STATE_HOME = "", HOME = "/home" })
    assert.is_nil(path {})
  end)

  it("a history line holds any entry in one line", function()
    assert.equal("a\\012b\\040\\134n\\303\\251\\000!~\n", repl.history_line("a\nb \\n\195\169\0!~"))
  end)
end)
