--- Options: every kind of mistake gets a sentence with the value in it, and nothing passes unnoticed.
--
-- One spec with a rule of every type is attacked with wrong types, bounds, NaN, unknown and positional
-- keys; the patterns pin the wording down, because the wording is the interface here. The nearest-name
-- search is tested on the slips people make (a swap, a missing letter, a plural). The second half looks at
-- the same promises from outside: unknown names of the namespace, of tensors, classes and registries, and
-- the place at the end of an error message, which must be the user's line and the path in the model, not a
-- line of the library.

local lac = require "lacuna"
local schema = require "lacuna.schema"
local sys = require "lacuna.sys"

local SPEC = {
  n = { type = "integer", min = 1, max = 10, default = 3 }, rate = { type = "number", min = 0, below = 1 },
  gain = { type = "number", above = 0 }, on = { type = "boolean", default = false },
  label = { type = "string" },
  merge = { one_of = { "mean", "sum", "lse" }, default = "mean" }, sizes = { type = "integers", min = 1 },
  weights = { type = "numbers" }, x = { type = { "number", "tensor" } }, f = { type = "function" },
  even = { type = "integer", check = function(v) if v % 2 == 1 then return "must be even" end end },
}

local function refused(options, pattern)
  local ok, message = pcall(schema.options, "op", options, SPEC)
  assert.is_false(ok)
  assert.matches(pattern, message)
end

describe("schema", function()
  it("fills in defaults and copies", function()
    local given = { n = 5 }
    local o = schema.options("op", given, SPEC)
    assert.are.same({ n = 5, on = false, merge = "mean" }, o)
    assert.are_not.equal(given, o)
    assert.are.same({ n = 3, on = false, merge = "mean" }, schema.options("op", nil, SPEC))
  end)

  it("takes what is valid", function()
    local f = function() end
    local o = schema.options("op", { sizes = { 1, 2 }, weights = { 0.5 }, x = lac.zeros { 2 }, f = f,
                                     rate = 0, even = 2 }, SPEC)
    assert.are.equal(f, o.f)
    assert.are.same({ 1, 2 }, o.sizes)
  end)

  it("refuses unknown keys with the nearest one", function()
    refused({ mrege = "sum" }, "op: unknown option 'mrege', did you mean 'merge'%? valid: even, f, gain,")
    refused({ 7 }, "options are given by name, got 7 at %[1%]")
    refused(3, "options must be a table, got 3")
    refused(lac.zeros { 2 }, "options must be a table, got Tensor f32 %[2%] cpu")
  end)

  it("refuses wrong types and ranges with the value", function()
    refused({ n = "3" }, "n must be an integer, got '3'")
    refused({ n = 2.5 }, "n must be an integer, got 2.5")
    refused({ n = 0 / 0 }, "n must be an integer, got nan")
    refused({ n = math.huge }, "n must be an integer, got inf")
    refused({ n = 0 }, "n must be positive, got 0")
    refused({ n = 11 }, "n must be at most 10, got 11")
    refused({ rate = 1 }, "rate must be below 1, got 1")
    refused({ rate = -0.5 }, "rate must be at least 0, got %-0.5")
    refused({ rate = 0 / 0 }, "rate must be a number, got nan")
    refused({ gain = 0 }, "gain must be above 0, got 0")
    refused({ on = 1 }, "on must be true or false, got 1")
    refused({ label = false }, "label must be a string, got false")
    refused({ merge = "man" }, "unknown merge 'man', did you mean 'mean'")
    refused({ merge = 4 }, "merge must be one of lse, mean, sum, got 4")
    refused({ sizes = {} }, "sizes must not be empty")
    refused({ sizes = { 1, 0 } }, "sizes%[2%] must be positive, got 0")
    refused({ sizes = { 1, 1.5 } }, "sizes%[2%] must be an integer, got 1.5")
    refused({ sizes = { 1, "2" } }, "sizes must be a list of integers, got {1, '2'}")
    refused({ sizes = { 1, b = 2 } }, "must be a plain list, it has the key 'b'")
    refused({ sizes = 4 }, "sizes must be a list of integers, got 4")
    refused({ weights = { 0 / 0 } }, "weights%[1%] must be a number, got nan")
    refused({ x = "t" }, "x must be a number or a tensor, got 't'")
    refused({ even = 3 }, "even must be even, got 3")
  end)

  it("requires what is required", function()
    local ok, message = pcall(schema.options, "op", {}, { a = { type = "number", required = true } })
    assert.is_false(ok)
    assert.matches("op: a is required", message)
  end)

  it("finds the nearest name by edit distance", function()
    assert.are.equal("dilations", schema.nearest("dilation", { "segments", "dilations", "offset" }))
    assert.are.equal("causal", schema.nearest("casual", { "causal", "scale", "cat" }))
    assert.are.equal("zeros", schema.nearest("zeroes", { "zeros", "eros", "ones" }))
    assert.is_nil(schema.nearest("zzz", { "b", "a" }))
    assert.are.equal("norm", schema.nearest("born", { "norm", "a" })) -- half of the letters
    assert.is_nil(schema.nearest("multinomial", { "custom_op", "cat" }))
    assert.are.equal("", schema.hint("zzz", { "b" }))
    assert.are.equal(", did you mean lac.mean?", schema.hint("maen", { "mean" }, "lac.%s"))
    assert.is_nil(schema.nearest("x", {}))
  end)

  it("shows any value in a line", function()
    assert.are.equal("{1, 'a', {...}}", schema.show { 1, "a", {} })
    assert.are.equal("nil", schema.show(nil))
    assert.are.equal("a function", schema.show(print))
    assert.are.equal("Tensor f64 [2 x 1] cpu", schema.show(lac.zeros { 2, 1, dtype = "f64" }))
    assert.is_true(#schema.show(("x"):rep(500)) < 80)
  end)

  it("puts the user's line and model path at the end", function()
    local lib = require "lacuna.lib"
    local function call(self) local x = lac.zeros { self.n, "a" } return x end
    lib.frame_name(call, function(self) return "layers[" .. self.n .. "]" end)
    local ok, message = pcall(call, { n = 3 })
    assert.is_false(ok)
    assert.matches("%[layers%[3%], tests/schema_spec.lua:%d+%]$", message)
  end)
end)

describe("the namespace", function()
  it("refuses unknown names with the nearest one", function()
    assert.error_matches(function() return lac.zeroes end, "there is no lac.zeroes, did you mean lac.zeros%?")
    assert.error_matches(function() return lac.zeros { 2 }.szie end,
                         "no field or method 'szie', did you mean 'size'")
    assert.error_matches(function() lac.zeros { 2 }.gard = 1 end, "did you mean 'grad'")
    assert.error_matches(function() return lac.attention.atend end, "did you mean 'attend'")
    assert.error_matches(function() return lac.optim.AdamW end,
                         "there is no lac.optim.AdamW, did you mean lac.optim.adamw%?")
    assert.error_matches(function() return lac.optim.schedule.cosin end, "mean lac.optim.schedule.cosine%?")
    assert.error_matches(function() return lac.plot.bar end,
                         "^there is no lac.plot.bar; there are area, coverage, heatmap, lines, scatter %[")
    assert.error_matches(function() return lac.io.lod end, "did you mean lac.io.load%?")
  end)

  it("knows what PyTorch calls things", function()
    local x = lac.zeros { 2 }
    for text, f in pairs {
      ["no field or method 'shape', did you mean x:size%(%)%?"] = function() return x.shape end,
      ["no field or method 'unbind', did you mean x:split"] = function() x:unbind() end,
      ["no lac.scaled_dot_product_attention, did you mean lac.attend%(q"] = function()
        return lac.scaled_dot_product_attention
      end,
      ["no lac.amax, did you mean x:max"] = function() return lac.amax end,
      ["no lac.float32, did you mean the name of a dtype, 'f32'"] = function() return lac.float32 end,
      ["nn: there is no 'MultiheadAttention', did you mean nn.MultiheadDilatedAttention{"] = function()
        return lac.nn.MultiheadAttention
      end,
      ["nn: there is no 'Hardswish', did you mean lac.hardswish%(x%)%?"] = function()
        return lac.nn.Hardswish
      end,
      ["nn: there is no 'LSTM'; there are no recurrent layers"] = function() return lac.nn.LSTM end,
      ["zeros: unknown dtype 'bfloat16', did you mean bf16%? valid:"] = function()
        lac.zeros { 2, dtype = "bfloat16" }
      end,
      ["to: unknown dtype 'float16', did you mean f16"] = function() x:to "float16" end,
    } do
      assert.error_matches(f, text)
    end
    assert.error_matches(function() x:arcsin() end, "no field or method 'arcsin', did you mean x:asin%(%)%?")
    assert.error_matches(function() x:greater_(1) end, "'greater_', did you mean x:copy_%(x:gt%(y%)%)%?")
    assert.error_matches(function() x:softmax_(1) end, "mean x:copy_%(x:softmax%(%.%.%.%)%)%?")
    assert.error_matches(function() x:svd() end, "'svd'; of linear algebra there are products only %[")
    assert.error_matches(function() return lac.nextafter end, "lac.nextafter; it is not among the")
    assert.error_matches(function() return lac.help "clip" end, "no 'clip', did you mean x:clamp%(low, high")
    for kind, t in pairs { tensor = lac.zeros { 1 }, lac = lac, nn = lac.nn } do
      for name in pairs(require("lacuna.synonyms")[kind]) do -- none that exists
        assert.is_false(pcall(function() return t[name] end), name)
      end
    end
  end)

  it("says what runs as it stands, with the values of what PyTorch has", function()
    local x = lac.tensor { { 0.25, 0, 1, 3 }, { 2, 0.5, 1, 1.5 }, { 4, 1, 0.5, 2 }, { 1, 2, 3, 4 } }
    local around = {
      lac = lac, math = math, unpack = unpack, x = x, y = x:t() / 4, v = lac.tensor { 1, 2, 3, 4 },
      q = lac.ones { 1, 4, 2, 4 }, k = lac.ones { 1, 4, 2, 4 }, idx = lac.tensor({ 0, 5 }, { dtype = "i64" }),
      boundaries = lac.tensor { 0, 1, 2 }, list = { x, x }, sizes = { 1, 3 }, values = { 1, 2 }, value = 2,
      n = 4, m = 4, i = 1, j = 2, dim = 2, low = 0, high = 1, bins = 3, tau = 1, groups = 2, channels = 4,
      size = 2, step = 1, weight = 0.5, before = 1, after = 2, threshold = 0.5, amounts = { 1, 1 },
      nn = lac.nn,
    }
    local function besides(t) return setmetatable(t, { __index = around }) end
    local vectors = besides { x = around.v, y = around.v }
    local special = { ger = vectors, inner = vectors,
                      scaled_dot_product_attention = besides { v = around.q } }
    -- settings, files and devices are not tried, nor what stands for a list or a function
    local function is_tried(text)
      for _, part in ipairs { "...", "lac.io.", "cuda", ":pin(", ":data(", "lac.default_", "lac.manual_seed",
                              "lac.threads", "lac.use_tf32", "fn", "nn.Multihead" } do
        if text:find(part, 1, true) then return false end
      end
      return true
    end
    local ran, values = 0, {}
    for _, kind in ipairs { "tensor", "lac", "nn" } do
      for name, text in pairs(require("lacuna.synonyms")[kind]) do
        local f = is_tried(text) and loadstring("return " .. text)
        if f then
          around.x = x:clone() -- some write into it
          local ok, value = pcall(setfenv(f, special[name] or around))
          assert.is_true(ok, name .. ": " .. tostring(value))
          ran, values[name] = ran + 1, value
        end
      end
    end
    assert.is_true(ran > 80, ran)
    assert.are.same({ 1, 0.5, 1, 1 }, values.heaviside[1]:totable())
    assert.are.same({ { false, false, true, true }, { true, false, true, false } },
                    values.isin[{ { 1, 2 } }]:totable())
    assert.are.equal(7.5, values.trapezoid:item())
    assert.are.same({ 0.25, 0, 0.5, 1.5 }, values.msort[1]:totable())
    assert.is_true(math.abs(values.logaddexp2[4][4]:item() - math.log(2 ^ 4 + 2) / math.log(2)) < 1e-6)
  end)

  it("says what to write for a form in place that does not exist, if one result fits", function()
    local x = lac.tensor { { 0.25, 0.5 }, { 0.75, 1 } }
    local function hint(t, name)
      return select(2, pcall(function() return t[name .. "_"] end)):match "did you mean x:copy_(%b())%?"
    end
    for name in pairs(require("lacuna.synonyms").in_place) do
      local text, fits = hint(x, name), false
      assert.is_string(text, name)
      for _, arguments in ipairs { "", "y", "1", "0.5", "0, 1", "y, 0.5", "y, y", "y:gt(1), 0" } do
        local f = assert(loadstring("return {" .. text:sub(2, -2):gsub("%.%.%.", arguments) .. "}"))
        local ok, results = pcall(setfenv(f, { lac = lac, math = math, x = x, y = x, v = x[1], dim = 1,
          low = 0, high = 1 }))
        if ok then
          assert.are.equal(1, #results, name)
          assert.are.same({ 2, 2 }, { results[1]:size(1), results[1]:size(2) }, name)
          x:clone():copy_(results[1])
          fits = true
        end
      end
      assert.is_true(fits, name)
    end
    for _, name in ipairs { "split", "chunk", "max", "sort", "sum", "t", "numel", "unbind", "mm", "take" } do
      assert.is_nil(hint(x, name), name)
    end
  end)

  it("sets the number of threads that was asked for, or says that it cannot", function()
    local before = lac.threads()
    assert.are.equal(3, lac.threads(3))
    assert.error_matches(function() lac.threads(4096) end, "threads: n must be at most %d+, for which")
    assert.are.equal(3, lac.threads())
    lac.threads(before)
    assert.are.equal(before, lac.threads())
    assert.error_matches(function() lac.threads(0) end, "n must be positive, got 0")
  end)

  it("begins with a number of threads that can be set again", function()
    local most
    for _, asked in ipairs { 1, 5000, 128, 200 } do
      local status, out, err = sys.run(([[OMP_NUM_THREADS=%d LUA_PATH='lua/?.lua;lua/?/init.lua;;' luajit -e '
        local lac = require "lacuna"
        local n = lac.threads()
        assert(lac.threads(1) == 1 and lac.threads(n) == n and lac.threads() == n)
        assert(lac.ones{ 300, 300 }:matmul(lac.ones{ 300, 300 }):sum():item() == 300 ^ 3)
        assert(not pcall(lac.threads, n + 4096) and lac.threads() == n)
        print(n)']]):format(asked))
      assert.are.equal(0, status, err)
      local n = tonumber(out)
      if asked == 5000 then most = n end -- OpenBLAS's limit
      assert.are.equal(math.min(asked, most or asked), n)
    end
  end)

  it("checks the engine's ABI against this tree", function()
    assert.are.equal(2, require("lacuna.lib").C.LAC_ABI)
    assert.matches("^%d+%.%d+%.%d+$", lac.version())
    assert.matches("cpu", lac.devices())
  end)

  it("has classes with inheritance and strict fields", function()
    local Base = lac.class("Base")
    function Base:init(x) self.x = x end
    function Base:double() return 2 * self.x end
    local Child = lac.class("Child", Base, true)
    local c = Child(4)
    assert.are.equal(8, c:double())
    assert.error_matches(function() return c.doubel end,
                         "Child: there is no field 'doubel', did you mean 'double'")
    assert.is_nil(Base(1).missing)
  end)

  it("has registries", function()
    local r = lac.registry("op", "thing")
    r:add("alpha", 1)
    assert.are.equal(1, r:get("alpha"))
    assert.error_matches(function() r:get("alpah") end,
                         "op: unknown thing 'alpah', did you mean 'alpha'%? valid: alpha")
    assert.error_matches(function() r:add("alpha", 2) end, "already registered")
    assert.error_matches(function() r:get(nil) end, "thing must be one of alpha, got nil")
  end)
end)
