--- Tensors: construction, shapes, views, slices, assignment, host access, printing, release, memory pressure.
--
-- Values are compared exactly: everything here moves numbers about and does not compute. What is computed
-- (operators, gradients) is in ops_spec and grad_spec.
--
-- The last part passes garbage to every public function and method: nil, wrong types, NaN and huge sizes,
-- tensors of other dtypes, empty, 0-dim and released ones. It is generated from the library's own tables,
-- so a new function is attacked as soon as it exists. Whatever happens must be a result or a sentence of
-- the library; "attempt to index a nil value" from inside the library fails, because it names neither the
-- operator nor the argument, and a crash ends the run. The sequence is a fixed generator's: a failure
-- repeats. Rejected: a list of bad calls by hand, which has holes where nobody thought of a mistake.

local lac = require "lacuna"
local lib = require "lacuna.lib"
local sys = require "lacuna.sys"
local ffi = lib.ffi

local function refused(pattern, f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  assert.are.equal("string", type(message))
  assert.matches(pattern, message)
end

describe("construction", function()
  it("says how to cast where dtypes differ and the engine names no remedy", function()
    local cast = "; x:float%(%), x:double%(%), x:long%(%) and so on cast %["
    assert.error_matches(function() return lac.ones{ 2 } + lac.ones{ 2, dtype = "i64" } end,
      "^add: x is f32 but y is i64" .. cast)
    assert.error_matches(function() return lac.arange{ 3, dtype = "i64" }:mean() end, "got i64" .. cast)
    assert.error_matches(function() return lac.ones{ 2 }:masked_fill(lac.ones{ 2 }, 3) end,
      "; compare it first %[")
  end)

  it("takes nested tables, numbers, booleans, cdata and tensors", function()
    assert.are.same({ { 1, 2 }, { 3, 4 } }, lac.tensor({ { 1, 2 }, { 3, 4 } }):totable())
    assert.are.equal(2.5, lac.tensor(2.5):item())
    assert.are.same({}, { unpack(lac.tensor(1):size()) })
    local b = lac.tensor { true, false }
    assert.are.equal("bool", b:dtype())
    assert.are.same({ true, false }, b:totable())
    assert.are.same({ 1, 2, 3 }, lac.tensor(ffi.new("double[3]", { 1, 2, 3 })):totable())
    local f = ffi.new("float[?]", 2)
    f[0], f[1] = 0.5, 1.5
    assert.are.same({ 0.5, 1.5 }, lac.tensor(f):totable())
    assert.are.equal("f32", lac.tensor(f):dtype())
    local t = lac.tensor { 1, 2 }
    local copy = lac.tensor(t)
    copy[1] = 9
    assert.are.same({ 1, 2 }, t:totable())
    assert.are.same({ 0 }, { unpack(lac.tensor({}):size()) })
    assert.are.same({ 3, 0 }, { unpack(lac.tensor({ {}, {}, {} }):size()) })
  end)

  it("keeps every value of every dtype", function()
    for _, dtype in ipairs { "f64", "f32", "f16", "bf16", "i64", "i32", "u8", "bool" } do
      local values = dtype == "bool" and { true, false, true } or { 0, 1, 2 }
      local t = lac.tensor(values, { dtype = dtype })
      assert.are.equal(dtype, t:dtype())
      assert.are.same(values, t:totable())
    end
    assert.are.equal(9007199254740993LL, lac.tensor({ 9007199254740993LL }, { dtype = "i64" }):item())
    assert.are.equal(math.huge, lac.tensor(math.huge):item())
    local nan = lac.tensor(0 / 0):item()
    assert.is_true(nan ~= nan)
  end)

  it("refuses ragged tables, strange elements and wrong options", function()
    refused("ragged: expected 2 elements at %[2%], got 1", lac.tensor, { { 1, 2 }, { 3 } })
    refused("element %[1%]%[2%] must be a number or a boolean, got 'a'", lac.tensor, { { 1, "a" } })
    refused("ragged: expected a list of 2 at %[2%], got 3", lac.tensor, { { 1, 2 }, 3 })
    refused("at most 6 dimensions", lac.tensor, { { { { { { { 1 } } } } } } })
    refused("element 1 does not fit dtype 'u8': 256", lac.tensor, { 256 }, { dtype = "u8" })
    refused("element 2 does not fit dtype 'i32': 1.5", lac.tensor, { 1, 1.5 }, { dtype = "i32" })
    refused("unknown option 'dytpe', did you mean 'dtype'", lac.zeros, { 2, dytpe = "f32" })
    refused("unknown device 'cud', did you mean 'cuda'", lac.zeros, { 2, device = "cud" })
    refused("only floating%-point tensors can require a gradient",
            lac.zeros, { 2, dtype = "i64", grad = true })
    refused("expected a table of numbers", lac.tensor, nil)
    refused("expected a table of numbers", lac.tensor, "abc")
    refused("plain list", lac.tensor, { 1, 2, x = 3 })
    refused("cannot make a tensor of", lac.tensor, ffi.new("lac_flags"))
    refused("size 1 must not be negative", lac.zeros, { -1 })
    refused("size 2 must be an integer, got nan", lac.zeros, { 1, 0 / 0 })
    refused("at most 6 dimensions", lac.zeros, { 1, 1, 1, 1, 1, 1, 1 })
    refused("size 1 must be an integer, got inf", lac.zeros, { math.huge })
  end)

  it("refuses sizes that do not fit into memory, and survives", function()
    for _, sizes in ipairs { { 2 ^ 50 }, { 2 ^ 31, 2 ^ 31, 2 ^ 31 }, { 2 ^ 53, 2 ^ 53 } } do
      local ok, message = pcall(lac.empty, sizes)
      assert.is_false(ok)
      assert.are.equal("string", type(message))
    end
    assert.are.same({ 0, 0 }, lac.zeros { 2 }:totable())
  end)

  it("has the usual factories", function()
    assert.are.same({ { 0, 0 } }, lac.zeros { 1, 2 }:totable())
    assert.are.same({ 1, 1 }, lac.ones(2):totable())
    assert.are.same({ 1, 1 }, lac.ones(2, { dtype = "i32" }):totable())
    assert.are.same({ 7, 7 }, lac.full { 2, value = 7 }:totable())
    assert.are.same({ 7, 7 }, lac.full({ 2 }, 7, { dtype = "u8" }):totable())
    assert.are.same({ true }, lac.full({ 1 }, true):totable())
    assert.are.same({ 0, 1, 2 }, lac.arange { 3 }:totable())
    assert.are.same({ 5, 3, 1 }, lac.arange { 5, 0, -2 }:totable())
    assert.are.equal("f32", lac.arange { 3 }:dtype())
    assert.are.equal("i64", lac.arange { 3, dtype = "i64" }:dtype())
    assert.are.same({ 0, 0.25, 0.5, 0.75, 1 }, lac.linspace { 0, 1, steps = 5 }:totable())
    assert.are.same({ { 1, 0, 0 }, { 0, 1, 0 } }, lac.eye { 2, 3 }:totable())
    assert.are.same({ 2, 3 }, { unpack(lac.empty { 2, 3 }:size()) })
    local like = lac.zeros_like(lac.ones { 2, dtype = "f64" }, { dtype = "i32" })
    assert.are.same({ 0, 0 }, like:totable())
    assert.are.equal("i32", like:dtype())
    assert.are.same({ 3, 3 }, lac.full_like(lac.zeros { 2 }, 3):totable())
    local n = lac.full { 1, value = 0 / 0 }:item()
    assert.is_true(n ~= n)
    refused("step must not be 0", lac.arange, { 0, 1, 0 })
    refused("sizes must be a plain list, it has the key %[10%]", lac.zeros, { 2, [10] = 3 })
    refused("has the key 'dtype'; options are a second table: lac.tensor%({ ... }, { ... }%)", lac.tensor,
      { 1, 2, dtype = "i64" })
    refused("has the key 'b' %[", lac.tensor, { 1, 2, b = 3 })
    refused("size 1 must be an integer, got Tensor f32 %[2%] .-; lac.zeros_like takes a tensor", lac.zeros,
      lac.ones{ 2 })
    refused("; lac.rand_like%(p%):lt%(p%) draws with the probabilities of a tensor", lac.bernoulli,
      lac.ones{ 2 })
    refused("value is required", lac.full, { 2 })
    refused("high is required", lac.randint, { 2 })
    refused("low must be below high", lac.rand, { 2, low = 1, high = 1 })
  end)

  it("draws reproducible random numbers", function()
    lac.manual_seed(5)
    local a, b = lac.randn { 100 }, lac.rand { 100 }
    local seed, offset = lac.rng_state()
    local c = lac.randint { 100, low = -3, high = 4 }
    lac.manual_seed(5)
    assert.is_true(a:equal(lac.randn { 100 }))
    assert.is_true(b:equal(lac.rand { 100 }))
    lac.set_rng_state(seed, offset)
    assert.is_true(c:equal(lac.randint { 100, low = -3, high = 4 }))
    assert.is_false(a:equal(lac.randn { 100 }))
    assert.is_true(b:min():item() >= 0 and b:max():item() < 1)
    assert.is_true(c:min():item() == -3 and c:max():item() == 3)
    local p = lac.randperm(20):totable()
    table.sort(p)
    for i = 1, 20 do assert.are.equal(i - 1, p[i]) end
    refused("seed must be an integer", lac.manual_seed, 1.5)
  end)

  it("have a default device, which LACUNA_DEVICE names #cpu", function()
    assert.are.equal("cpu", lac.default_device())
    assert.are.equal("cpu", lac.default_device("cpu"))
    refused("unknown device 'gpu', did you mean 'cpu'", lac.default_device, "gpu")
    local function child(name)
      local path = [[LUA_PATH="lua/?.lua;lua/?/init.lua;$LUA_PATH;;"]]
      return sys.run(("%s LACUNA_DEVICE=%s luajit -e %s"):format(path, name,
        sys.quote "print(require('lacuna').ones{ 1 }:device())"))
    end
    local status, out, err = child("cpu")
    assert.are.same({ 0, "cpu\n" }, { status, out }, err)
    status, out, err = child("gpu")
    assert.are.same({ 1, "" }, { status, out })
    assert.matches("LACUNA_DEVICE: unknown device 'gpu'", err)
  end)

  it("has a default dtype", function()
    assert.are.equal("f32", lac.default_dtype())
    lac.default_dtype("f64")
    local dtype = lac.zeros { 1 }:dtype()
    lac.default_dtype("f32")
    assert.are.equal("f64", dtype)
    refused("must be f64, f32, f16 or bf16, got 'i64'", lac.default_dtype, "i64")
  end)
end)

describe("shapes and views", function()
  local t = lac.arange { 24 }:view(2, 3, 4)

  it("answers size, stride, dim, numel", function()
    assert.are.equal("[2 x 3 x 4]", tostring(t:size()))
    assert.are.equal(4, t:size(-1))
    assert.are.equal(3, t:size(2))
    assert.is_true(t:size() == lac.zeros { 2, 3, 4 }:size())
    assert.are.same({ 12, 4, 1 }, { unpack(t:stride()) })
    assert.are.equal(3, t:dim())
    assert.are.equal(24, t:numel())
    refused("dim 4 is out of range for Tensor f32 %[2 x 3 x 4%] %S+: 1 to 3, or %-3 to %-1", t.size, t, 4)
    refused("must be called on a tensor", t.size, 4)
  end)

  it("shares memory between views", function()
    local a = lac.zeros { 2, 3 }
    local b = a:view(6)
    b[2] = 5
    a:t()[{ 3, 2 }] = 7
    assert.are.same({ { 0, 5, 0 }, { 0, 0, 7 } }, a:totable())
    assert.is_false(a:t():is_contiguous())
    assert.is_true(a:t():contiguous():is_contiguous())
  end)

  it("views strided tensors where strides allow it", function()
    local s = t[{ {}, { 1, 2 }, {} }]                -- [2, 2, 4], rows of a segment are adjacent
    assert.are.same(s:reshape(2, 8):totable(), s:view(2, 8):totable())
    assert.are.same(s:contiguous():view(2, 2, 2, 2):totable(), s:view(2, 2, 2, 2):totable())
    refused("use reshape", s.view, s, 16)
    assert.are.same(s:contiguous():view(16):totable(), s:reshape(16):totable())
    assert.are.same({ 1, 16, 1 }, { unpack(s:reshape(1, -1, 1):size()) })
    local e = lac.tensor { 1, 2 }:view(2, 1):expand(2, 3)
    assert.are.same({ 1, 1, 1, 2, 2, 2 }, e:reshape(-1):totable())
  end)

  it("keeps the owner of a view alive", function()
    local v
    do
      local owner = lac.full { 1000, value = 3 }
      v = owner:view(10, 100)[5]
    end
    for _ = 1, 3 do collectgarbage() end
    local _ = lac.zeros { 1000 }
    assert.are.equal(300, v:sum():item())
  end)

  it("handles empty and 0-dim tensors", function()
    local e = lac.zeros { 0, 3 }
    assert.are.equal(0, e:numel())
    assert.are.same({}, e:totable())
    assert.are.equal("[3 x 0]", tostring(e:t():size()))
    assert.are.equal(0, e:sum():item())
    assert.are.equal("[0 x 3]", tostring((e + 1):size()))
    assert.are.equal("", e:string())
    local z = lac.tensor(4)
    assert.are.equal(0, z:dim())
    assert.are.equal("[1]", tostring(z:view(1):size()))
    assert.are.equal(8, (z + z):item())
    refused("needs a tensor with one element", e.item, e)
  end)

  it("splits an empty dimension into one part, which joins to it again", function()
    for _, parts in ipairs { lac.zeros { 0, 3 }:split(2), lac.zeros { 3, 0 }:chunk(2, 2) } do
      assert.are.equal(1, #parts)
    end
    assert.are.equal("[0 x 3]", tostring(lac.cat(lac.zeros { 0, 3 }:split(2)):size()))
  end)

  it("takes parts of empty tensors that begin beyond their storage", function()
    local _, second = unpack(lac.zeros { 0, 6 }:split(3, 2))
    assert.are.equal("[0 x 3]", tostring(second:exp():size()))
    assert.are.equal(0, (second * second):sum():item())
    assert.are.equal("[0 x 3]", tostring(lac.zeros { 0, 3, 2 }:select(3, 2):contiguous():size()))
    assert.are.equal("[4 x 0]", tostring(lac.zeros { 0, 4 }:t():flip(1):tanh():size()))
    assert.are.equal("[0 x 3]", tostring(lac.zeros { 0, 4, 4 }:diagonal(1, 2, 3):clone():size()))
    local x = lac.zeros { 0, 6, grad = true }
    x:narrow(2, 4, 3):square():sum():backward()
    assert.are.equal("[0 x 6]", tostring(x.grad:size()))
  end)
end)

describe("slices", function()
  local t = lac.arange { 12 }:view(3, 4)

  it("select positions and ranges, 1-based, negative from the end", function()
    assert.are.same({ 0, 1, 2, 3 }, t[1]:totable())
    assert.are.same({ 8, 9, 10, 11 }, t[-1]:totable())
    assert.are.equal(6, t[{ 2, 3 }]:item())
    assert.are.same({ { 4, 5, 6, 7 }, { 8, 9, 10, 11 } }, t[{ { 2, 3 } }]:totable())
    assert.are.same({ 1, 5, 9 }, t[{ {}, 2 }]:totable())
    assert.are.same({ { 1 }, { 5 }, { 9 } }, t[{ {}, { 2 } }]:totable())
    assert.are.same({ { 3, 1 }, { 11, 9 } }, t[{ { 1, 3, 2 }, { -1, 1, -2 } }]:totable())
    assert.are.equal("[0 x 4]", tostring(t[{ { 2, 1 } }]:size()))
    assert.are.equal("[3 x 0]", tostring(t[{ {}, { 1, 0 } }]:size()))
  end)

  it("take bool masks and 0-based index tensors", function()
    assert.are.same({ 8, 9, 10, 11 }, t[t:gt(7)]:totable())
    assert.are.same({ { 8, 9, 10, 11 } }, t[lac.tensor { false, false, true }]:totable())
    assert.are.equal("[0]", tostring(t[t:gt(99)]:size()))
    local rows = lac.tensor({ 2, 0 }, { dtype = "i64" })
    assert.are.same({ { 8, 9, 10, 11 }, { 0, 1, 2, 3 } }, t[rows]:totable())
    refused("the mask Tensor bool %[2%] %S+ does not have the leading sizes",
            function() return t[lac.tensor { true, false }] end)
  end)

  it("refuse what is out of range", function()
    refused("position 4 is out of range in dimension 1 of Tensor f32 %[3 x 4%] %S+: 1 to 3",
            function() return t[4] end)
    refused("position 0 is out of range", function() return t[0] end)
    refused("a position must be an integer, got 1.5", function() return t[1.5] end)
    refused("a position must be an integer, got nan", function() return t[0 / 0] end)
    refused("position 5 is out of range in dimension 2", function() return t[{ {}, { 1, 5 } }] end)
    refused("the step must be an integer other than 0", function() return t[{ { 1, 2, 0 } }] end)
    refused("slice 1 of 2 is nil", function() return t[{ nil, 1 }] end)
    refused("entry 1 must be a position", function() return t[{ "a" }] end)
    refused("indexed by a position", function() return t[true] end)
    refused("no dimensions to index", function() return lac.tensor(1)[1] end)
  end)

  it("assign numbers, tensors, tables and by mask", function()
    local a = lac.zeros { 3, 3 }
    a[1] = 5
    a[{ {}, 3 }] = lac.tensor { 1, 2, 3 }
    a[{ 3, { 1, 2 } }] = { 8, 9 }
    assert.are.same({ { 5, 5, 1 }, { 0, 0, 2 }, { 8, 9, 3 } }, a:totable())
    a[a:gt(4)] = -1
    assert.are.same({ { -1, -1, 1 }, { 0, 0, 2 }, { -1, -1, 3 } }, a:totable())
    a[{ { 1, 2 } }] = a[{ { 2, 3 } }] -- overlapping source
    assert.are.same({ { 0, 0, 2 }, { -1, -1, 3 }, { -1, -1, 3 } }, a:totable())
    refused("cannot assign nil", function() a[1] = nil end)
    refused(".", function() a[1] = lac.zeros { 4 } end)
    refused(".", function() a[1] = "x" end)
  end)
end)

describe("host access", function()
  it("converts to numbers, tables, bytes and back #cpu", function()
    local t = lac.tensor({ 1, 2, 3, 4 }, { dtype = "i32" })
    assert.are.equal(16, #t:string())
    assert.is_true(lac.from_string(t:string(), { dtype = "i32", shape = { 2, 2 } }):equal(t:view(2, 2)))
    assert.are.same({ 97, 98 }, lac.from_string("ab"):totable())
    assert.are.equal(3, tonumber(t:data()[2]))
    local bytes = t[{ { -1, 1, -1 } }]:string()
    assert.are.same({ 4, 3, 2, 1 }, lac.from_string(bytes, { dtype = "i32" }):totable())
    refused("3 bytes are not a whole number of f32", lac.from_string, "abc", { dtype = "f32" })
    assert.are.equal(true, lac.tensor(true):item())
  end)

  it("casts between all dtypes", function()
    local names = { "f64", "f32", "f16", "bf16", "i64", "i32", "u8", "bool" }
    for _, from in ipairs(names) do
      for _, to in ipairs(names) do
        local t = lac.tensor({ 0, 1, 1 }, { dtype = from }):to { dtype = to }
        assert.are.equal(to, t:dtype())
        assert.are.same({ 0, 1, 1 }, t:to { dtype = "f64" }:totable())
      end
    end
  end)

  it("compares whole tensors, integers beyond 2^53 among them", function()
    local a = lac.tensor({ 2 ^ 53, 5 }, { dtype = "i64" })
    local b = lac.tensor({ 9007199254740993LL, 5 }, { dtype = "i64" })
    assert.is_true(b:allclose(b) and b:equal(b) and a:allclose(b))
    assert.is_false(a:equal(b) or a:allclose(b, { rtol = 0, atol = 0 }))
    assert.is_true(lac.tensor({ math.huge }):allclose(lac.tensor { math.huge }))
    assert.is_false(lac.tensor({ 0 / 0 }):allclose(lac.tensor { 0 / 0 }))
    assert.is_false(lac.tensor({ 1 }):allclose(lac.tensor { math.huge }))
  end)

  it("chains", function()
    local a, b = lac.tensor { 1, 5, 2 }, lac.tensor { 2, 2, 2 }
    assert.are.equal(3, (a - b):abs():max():item())
    assert.are.equal(2, a:argmax():item()) -- 1-based
    assert.are.same({ 0, 0, 1 }, (5 % a):totable())
    assert.are.same({ -1, -5, -2 }, (-a):totable())
    assert.are.same({ 1, 25, 4 }, (a ^ 2):totable())
    assert.are.same({ false, true, false }, a:gt(b):totable())
    assert.is_false(a == b)
    assert.is_true(a == a) -- identity
    refused("use a:lt%(b%)", function() return a < b end)
    refused("use a:le%(b%)", function() return a <= b end)
  end)

  it("changes in place", function()
    local a = lac.tensor { 1, 2, 3 }
    assert.are.equal(a, a:add_(1))
    a:mul_(2):sub_(lac.tensor { 1, 1, 1 }):add_(lac.ones { 3 }, 0.5)
    assert.are.same({ 3.5, 5.5, 7.5 }, a:totable())
    a:clamp_(4, 6):copy_(a * 2)
    assert.are.same({ 8, 11, 12 }, a:totable())
    assert.are.same({ 0, 0, 0 }, a:zero_():totable())
    local i = lac.tensor({ 1, 2 }, { dtype = "i64" })
    assert.are.same({ 3, 4 }, i:add_(2):totable())
    refused("does not broadcast to dst %[3%]", a.add_, a, 2 * lac.zeros { 2, 3 })
    refused("does not fit into", i.copy_, i, lac.tensor { 1.5, 2.5 })
    local e = lac.zeros { 1 }:expand(3)
    refused("fill_: .* is an expanded view", e.fill_, e, 1)
    local x = lac.tensor { 1, 2, 3 }
    assert.are.same({ 2, 4, 6 }, x:add_(x):totable())
  end)
end)

describe("printing", function()
  local function text(t) return (tostring(t):gsub("cuda:0", "cpu", 1)) end -- wherever it lies

  it("shows header and aligned rows", function()
    assert.are.equal("Tensor f32 [2 x 3] cpu\n    1   -2    3\n    4    5  100",
                     text(lac.tensor { { 1, -2, 3 }, { 4, 5, 100 } }))
    assert.are.equal("Tensor f64 [2] cpu\n   0.5000  -1.2500",
                     text(lac.tensor({ 0.5, -1.25 }, { dtype = "f64" })))
    assert.are.equal("Tensor i64 [] cpu\n  42", text(lac.tensor(42, { dtype = "i64" })))
    assert.are.equal("Tensor bool [2] cpu\n   true  false", text(lac.tensor { true, false }))
    assert.are.equal("Tensor f32 [0 x 3] cpu (empty)", text(lac.zeros { 0, 3 }))
  end)

  it("shows nan, inf and extreme magnitudes", function()
    assert.are.equal("Tensor f32 [3] cpu\n   nan   inf  -inf",
                     text(lac.tensor { 0 / 0, math.huge, -math.huge }))
    assert.matches("1.0000e%+20", text(lac.tensor { 1e20, 1 }))
    assert.matches("1.0000e%-05", text(lac.tensor { 1e-5 }))
    assert.matches("1.5000", text(lac.tensor({ 1.5 }, { dtype = "bf16" })))
    assert.matches("9007199254740993", text(lac.tensor({ 9007199254740993LL }, { dtype = "i64" })))
  end)

  it("elides what is long and heads each matrix", function()
    local big = text(lac.zeros { 1000, 1000 })
    assert.is_true(#big < 1000)
    assert.matches("%.%.%.", big)
    assert.matches("%(2,1,:,:%)", text(lac.zeros { 2, 2, 2, 2 }))
    assert.is_true(#text(lac.zeros { 100, 100, 10, 10 }) < 40000)
    assert.matches("requires_grad", text(lac.zeros { 1, grad = true }))
    assert.matches("grad from mul", text(lac.zeros { 1, grad = true } * 2))
    assert.matches("%[2 x 3%]", "size " .. lac.zeros { 2, 3 }:size())
  end)

  it("survives released tensors", function()
    local t = lac.zeros { 2 }
    t:release()
    assert.are.equal("Tensor f32 [2] cpu (released)", text(t))
  end)
end)

describe("memory", function()
  it("is counted, limited, trimmed #cpu", function()
    collectgarbage()
    collectgarbage()
    local before = lac.memory().live
    local t = lac.zeros { 1000, 1000 }
    assert.is_true(lac.memory("cpu").live >= before + 4e6)
    t:release()
    assert.is_true(t:is_released())
    assert.is_true(lac.memory().live <= before)
    t:release() -- twice is fine
    refused("after release", function() return t + 1 end)
    refused("after release", function() return t:view(1000000):sum() end)
    refused("is a view; release the tensor that owns", function() lac.zeros { 4 }:view(2, 2):release() end)
    lac.trim()
    assert.are.equal(0, lac.memory().cached)
    refused("device 'cuda' ", lac.memory, "cuda") -- not available, or without a pool of its own
    refused("did you mean 'cuda'", lac.memory, "cda")
  end)

  it("collects and retries before it gives up, then reports the pool #cpu", function()
    collectgarbage()
    collectgarbage()
    local base = lac.memory().live
    lac.memory_limit(base + 9e6)
    local ok, message = pcall(function()
      for _ = 1, 20 do local _ = lac.zeros { 1000, 1000 } end -- 4 MB each, dead at once: collected on the way
      return lac.zeros { 10000, 1000 }
    end)
    lac.memory_limit(0)
    assert.is_false(ok)
    assert.matches("pool: live .* cached .* peak .* limit", message)
  end)

  local function storages()
    collectgarbage()
    return lac.memory("cpu").storages
  end

  it("gives back the storages of dead tensors, and no others #cpu", function()
    local before = storages()
    local kept = {}
    for i = 1, 5000 do
      local t = lac.full({ 3 }, i, { device = "cpu" })
      if i % 3 == 0 or i > 4990 then kept[#kept + 1] = { i, t } end
      if i % 1700 == 0 then collectgarbage() end
    end
    assert.are.equal(before + #kept, storages())
    for _, pair in ipairs(kept) do assert.are.equal(3 * pair[1], pair[2]:sum():item()) end
    local view = kept[1][2]:view(3, 1)
    kept = { kept[2] } -- luacheck: ignore
    assert.are.equal(before + 2, storages()) -- one behind its view
    assert.are.equal(9, view:sum():item())
    view, kept = nil, nil -- luacheck: ignore
    assert.are.equal(before, storages())
  end)

  it("gives no storage back twice when an interrupt comes meanwhile #cpu", function()
    local status, out, err = sys.run "luajit tests/support/interrupted.lua"
    assert.are.equal(0, status, out .. err)
  end)

  it("does not pile up dead tensors", function()
    collectgarbage()
    collectgarbage()
    lib.pace(lib.C.LAC_CPU) -- not what was left by a file that had much
    local worst, base = 0, lac.memory().live
    collectgarbage("stop") -- only the pool's pressure may collect
    for _ = 1, 100 do
      local _ = lac.empty { 1024, 1024 }
      worst = math.max(worst, lac.memory().live - base)
    end
    collectgarbage("restart")
    assert.is_true(worst < 200 * 2 ^ 20, ("%d MiB of dead tensors"):format(worst / 2 ^ 20))
  end)

  it("stops when asked to", function()
    lib.C.lac_interrupt(1)
    refused("^interrupted", function() return lac.zeros { 2 } + 1 end)
    assert.are.equal(2, (lac.ones { 1 } + 1):item()) -- the request was answered
  end)

  it("sets threads", function()
    local n = lac.threads()
    assert.are.equal(1, lac.threads(1))
    lac.threads(n)
    refused("n must be positive", lac.threads, 0)
    lac.synchronize()
  end)
end)

-- Every public function and method, with garbage in every place. Whatever happens must be a result or an
-- error string of the library, never a Lua error from inside it ("attempt to ...") and never a crash.
describe("messages", function()
  it("begin with what the script called, whatever the engine's function is named", function()
    local t, three, windows = lac.zeros { 2, 2 }, lac.ones { 3 }, lac.arange { 6 }:unfold(1, 3, 1)
    local i64 = lac.tensor({ 5 }, { dtype = "i64" })
    refused("^add_: x %[3%] does not broadcast", t.add_, t, three)
    refused("^copy_: src %[3%] does not broadcast", t.copy_, t, three)
    refused("^index assignment: src %[3%] does not broadcast", function() t[1] = three end)
    refused("^index assignment: src %[3%] does not broadcast", function() t[1] = { 1, 2, 3 } end)
    refused("^fill_: .* share memory", windows.fill_, windows, 0)
    refused("^mul_: .* share memory", windows.mul_, windows, 2)
    refused("^add_: .* share memory", windows.add_, windows, lac.ones { 4, 3 })
    refused("^relu_: .* share memory", windows.relu_, windows)
    refused("^masked_fill_: .* share memory", windows.masked_fill_, windows, windows:gt(1), 0)
    refused("^scatter_: dst %[2, 2%] and index", t.scatter_, t, 1, i64:view(1, 1), 1)
    refused("^logical_not: x must be bool", lac.logical_not, t)
    refused("^logical_and: x must be bool", lac.logical_and, t, t)
    refused("^maximum: shapes", lac.maximum, t, three)
    refused("^group_norm: a group must have at least one element", lac.group_norm, lac.zeros { 2, 4, 0 }, 2)
    refused("^histc: .* holds NaN, so low and high must be given", lac.histc, lac.tensor { 0 / 0, 1 }, 3)
  end)

  -- on a GPU they are found later, when the value is read
  it("of indices beyond the end begin with what the script called #cpu", function()
    local t, i64 = lac.zeros { 2, 2 }, lac.tensor({ 5 }, { dtype = "i64" })
    refused("^index_add: index number 1 is 5", t.index_add, t, 1, i64, lac.ones { 1, 2 })
    refused("^index_add_: index number 1 is 5", t.index_add_, t, 1, i64, lac.ones { 1, 2 })
    refused("^index_copy_: index number 1 is 5", t.index_copy_, t, 1, i64, lac.ones { 1, 2 })
    refused("^index assignment: index number 1 is 5", function() t[i64] = 1 end)
    refused("^embedding: index number 1 is 5", lac.embedding, t, i64)
    refused("^index_select: index number 1 is 5", lac.index_select, t, 1, i64)
  end)
end)

describe("garbage arguments", function()
  local released = lac.zeros { 2, 2 }
  released:release()
  local garbage = {
    false, true, "x", "f32", 0, 1, -1, 2.5, 0 / 0, math.huge, -math.huge, 2 ^ 53, 1e300,
    {}, { 1 }, { "a" }, { x = 1 }, { { {} } }, function() end, ffi.new("int[3]"), 5LL,
    lac.zeros { 2, 3 }, lac.zeros { 0 }, lac.tensor(1), lac.zeros { 2, dtype = "i64" },
    lac.zeros { 2, 2, dtype = "bool" }, lac.zeros { 2, 2, dtype = "f16" }, released,
    lac.zeros { 2, 2, grad = true }, lac.ones { 2, 2, dtype = "f64" },
    lac.full { 2, 2, value = 7, dtype = "i64" },
  }
  local SKIP = { manual_seed = true, set_rng_state = true, threads = true, memory_limit = true,
                 default_dtype = true, scope = true, keep = true, class = true, registry = true,
                 release = true, trim = true, nan_watch = true, memory_tracking = true }

  local state = 1
  local function pick()
    state = state * 16807 % 2147483647
    local i = math.floor(state / 65536) % (#garbage + 1)
    return garbage[i] -- nil for 0
  end

  local function attack(name, f, first)
    for round = 1, 60 do
      local a, b, c, d = pick(), pick(), pick(), pick()
      if first then a = first[round % #first + 1] end
      local ok, message = pcall(function()
        f(a, b, c, d)
        lac.synchronize() -- a device finds a bad index only when it gets there
      end)
      if not ok then
        assert.are.equal("string", type(message), name)
        local inside = message:find("attempt to") or message:find("bad argument")
          or message:find("cannot convert") or message:find("NYI") or message:find("internal")
        assert.is_falsy(inside, name .. ": " .. message)
      end
    end
  end

  it("never crash functions", function()
    local names = require("lacuna.schema").keys(lac)
    for name in pairs(getmetatable(lac).__settings) do names[#names + 1] = name end
    for _, name in ipairs(names) do
      local f = lac[name]
      if type(f) == "function" and not SKIP[name] then attack(name, f) end
    end
    attack("attend", lac.attend)
    attack("attention", function(o) return lac.attention(o) end)
    attack("gradcheck", lac.gradcheck)
  end)

  it("never crash methods", function()
    local tensors = { lac.ones { 2, 3 }, lac.tensor(1), lac.ones { 2, dtype = "i64" }, lac.zeros { 0, 2 },
                      released, lac.ones { 2, 2, grad = true }, lac.ones { 2, 2, 2, 2, dtype = "bf16" },
                      3, "x", false }
    for name, f in pairs(require("lacuna.tensor").methods) do
      if not SKIP[name] then attack(name, f, tensors) end
    end
    assert.are.equal("string", type(tostring(tensors[1])))
  end)

  it("never crash operators and indexing", function()
    local t = lac.ones { 2, 3 }
    attack("+", function(a, b)
      if type(b) ~= "cdata" then return a + b end
    end, { t })
    attack("*", function(a, b) -- LuaJIT itself answers for int64 * table
      if type(b) ~= "cdata" then return b * a end
    end, { t })
    attack("[]", function(a, b) return a[b] end, { t })
    attack("[{}]", function(a, b, c) return a[{ b, c }] end, { t })
    attack("[] =", function(a, b, c) a[b] = c end, { lac.ones { 2, 3 } })
  end)
end)
