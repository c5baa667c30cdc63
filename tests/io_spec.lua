--- io_spec.lua: safetensors and JSON.
--
-- Round trips are compared bit by bit, through a reader written here in plain Lua (string.byte), not by
-- loading with the code that saved. Hostile files are made by hand, one lie each, and every lie must give its
-- own sentence and leave no file handle or temporary file behind. A loop of random mutations of a good file
-- looks for crashes: whatever a mutation does, load either succeeds or raises a string that names the file.

local lac = require "lacuna"
local json = require "lacuna.json"

local path = os.tmpname()

local function write(text)
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
end

local function read(name)
  local file = assert(io.open(name or path, "rb"))
  local text = file:read("*a")
  file:close()
  return text
end

local function u64(n)
  local bytes = {}
  for i = 1, 8 do
    bytes[i] = string.char(n % 256)
    n = math.floor(n / 256)
  end
  return table.concat(bytes)
end

local function safetensors(header, data) return u64(#header) .. header .. (data or "") end

-- header text and data of a file, by the definition of the format
local function parts(text)
  local n = 0
  for i = 8, 1, -1 do n = n * 256 + text:byte(i) end
  return text:sub(9, 8 + n), text:sub(9 + n)
end

local function rejects(text, pattern)
  write(text)
  local ok, message = pcall(lac.io.load, path)
  assert.is_false(ok)
  assert.is_string(message)
  assert.matches("^io%.load: ", message)
  assert.is_truthy(message:find(path, 1, true), message)
  assert.matches(pattern, message)
end

describe("io", function()
  teardown(function() os.remove(path) end)

  it("writes what the format says, byte by byte", function()
    lac.io.save(path, { a = lac.tensor({ { 1, 2 }, { 3, 4 } }, { dtype = "i32" }), b = lac.tensor({ true,
      false }) }, { note = "x" })
    local header, data = parts(read())
    assert.equal(0, (#header + 8) % 8)
    local h = json.decode(header)
    assert.same({ note = "x" }, h.__metadata__)
    assert.same({ dtype = "I32", shape = { 2, 2 }, data_offsets = { 0, 16 } }, h.a)
    assert.same({ dtype = "BOOL", shape = { 2 }, data_offsets = { 16, 18 } }, h.b)
    assert.equal("\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0\1\0", data)
  end)

  it("round-trips every dtype exactly, also from strided views and of empty and 0-dim tensors", function()
    local tensors = {}
    for _, dtype in ipairs{ "f64", "f32", "f16", "bf16" } do
      tensors[dtype] = lac.tensor({ 0, -0.0, 1.5, 1 / 0, -1 / 0, 0 / 0, 6.1e-5, -65504 }, { dtype = dtype })
    end
    tensors.i64 = lac.tensor({ -5, 0, 2 ^ 40 }, { dtype = "i64" })
    tensors.i32 = lac.tensor({ -5, 0, 2 ^ 30 }, { dtype = "i32" })
    tensors.u8 = lac.tensor({ 0, 1, 255 }, { dtype = "u8" })
    tensors.bool = lac.tensor({ true, false })
    tensors.view = lac.arange{ 6 }:view(2, 3):transpose(1, 2)
    tensors.empty = lac.zeros{ 0, 3 }
    tensors.scalar = lac.tensor(2.5)
    tensors["odd \"name\"\n\195\164"] = lac.zeros{ 1 }
    lac.io.save(path, tensors)
    local loaded, metadata = lac.io.load(path)
    assert.same({}, metadata)
    local count = 0
    for name, t in pairs(loaded) do
      count = count + 1
      assert.equal(tensors[name]:dtype(), t:dtype())
      assert.equal(tostring(tensors[name]:size()), tostring(t:size()))
      assert.equal(tensors[name]:contiguous():string(), t:string())
    end
    assert.equal(12, count)
    assert.same({ { 0, 3 }, { 1, 4 }, { 2, 5 } }, loaded.view:totable())
  end)

  it("carries a checksum when asked, and compares it on every reading", function()
    local n = 2 * 1024 * 1024 + 5 -- more than one piece
    local tensors = { big = lac.arange{ n }, small = lac.tensor({ 1, 2 }, { dtype = "i32" }),
      none = lac.zeros{ 0 } }
    lac.io.save(path, tensors, { note = "x" }, { checksum = true })
    local loaded, metadata, checked = lac.io.load(path)
    assert.is_true(checked)
    assert.same({ note = "x" }, metadata)
    assert.same({ true, { note = "x" } }, { lac.io.verify(path) })
    assert.same({ 1, 2 }, loaded.small:totable())
    local only, _, also = lac.io.load(path, { only = function(name) return name == "small" end })
    assert.is_true(also)
    assert.same({ "small" }, lac.schema.keys(only))
    assert.equal(3, #lac.io.inspect(path))
    local good = read()
    local damaged = good:sub(1, -20) .. "x" .. good:sub(-18)
    rejects(damaged, "it is damaged: its bytes have the checksum")
    assert.error_matches(function() lac.io.verify(path) end, "io.verify: .*it is damaged")
    assert.error_matches(function() lac.io.load(path, { only = function() return false end }) end, "damaged")
    assert.is_false((select(3, lac.io.load(path, { verify = false }))))
    lac.io.save(path, tensors)
    assert.is_false((lac.io.verify(path)))
    assert.is_false((select(3, lac.io.load(path))))
    -- the same header in another order is another program's
    rejects(safetensors('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"__metadata__":'
      .. '{"lacuna.crc32c":"00000000"}}'), "written again by another program")
    assert.error_matches(function() lac.io.save(path, {}, { ["lacuna.crc32c"] = "x" }) end, "is reserved")
    assert.error_matches(function() lac.io.save(path, {}, {}, { checksm = true }) end,
      "did you mean 'checksum'")
  end)

  it("is larger than one piece of the reader", function()
    local n = 3 * 1024 * 1024 + 17
    lac.io.save(path, { t = lac.arange{ n } })
    local t = lac.io.load(path).t
    assert.equal(n - 1, t[n]:item())
    assert.equal(2 * 1024 * 1024, t[2 * 1024 * 1024 + 1]:item())
  end)

  it("widens the integer types that the engine lacks, exactly", function()
    local header = [[{"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},]]
      .. [["b":{"dtype":"I16","shape":[1],"data_offsets":[2,4]},]]
      .. [["c":{"dtype":"U16","shape":[1],"data_offsets":[4,6]},]]
      .. [["d":{"dtype":"U32","shape":[1],"data_offsets":[6,10]},]]
      .. [["e":{"dtype":"U64","shape":[1],"data_offsets":[10,18]}}]]
    write(safetensors(header, "\255\127\0\128\255\255\255\255\255\255" .. "\1\0\0\0\0\0\0\64"))
    local t = lac.io.load(path)
    assert.same({ -1, 127 }, t.a:totable())
    assert.equal("i32", t.a:dtype())
    assert.same({ -32768 }, t.b:totable())
    assert.same({ 65535 }, t.c:totable())
    assert.same({ 4294967295 }, t.d:totable())
    assert.equal("i64", t.d:dtype())
    assert.equal(4611686018427387905LL, t.e:item())
    write(safetensors([[{"e":{"dtype":"U64","shape":[1],"data_offsets":[0,8]}}]], ("\255"):rep(8)))
    assert.error_matches(function() lac.io.load(path) end, "does not fit a signed 64%-bit")
  end)

  it("refuses every lie with its own sentence", function()
    local good = [[{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}]]
    local data = ("\0"):rep(8)
    local function entry(dtype, shape, offsets)
      return safetensors(([[{"a":{"dtype":%s,"shape":%s,"data_offsets":%s}}]]):format(dtype, shape, offsets),
        data)
    end
    rejects("", "too few")
    rejects("\1\2\3", "too few")
    rejects(u64(50) .. "{}", "claims a header of 50 bytes, but only 2 follow")
    rejects(u64(2 ^ 40) .. "{}", "claims a header of 1099511627776 bytes; more than")
    rejects(("\255"):rep(8) .. "{}", "claims a header of")
    rejects("PK\3\4\0\0\8\8\0\0", "it is a zip archive, as torch.save writes; safetensors.torch.save_file")
    rejects("\128\2}q\0X\6\0\0", "it is a pickle")
    rejects("\147NUMPY\1\0v\0", "it is an array of NumPy")
    rejects(u64(0), "does not begin with {")
    rejects(safetensors("[1]"), "does not begin with {")
    rejects(safetensors("{\"a\255\":1}"), "not UTF%-8 %(byte 3%)")
    rejects(safetensors("{\"a\":"), "not JSON")
    rejects(safetensors("{\"a\":1}"), "its entry is a number")
    rejects(safetensors(good:sub(1, -2) .. [[,"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}]], data),
      "key \"a\" twice")
    rejects(safetensors(good:sub(1, -2) .. [[,"\u0061":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}]],
      data), "\"a\" twice")
    rejects(safetensors([[{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}]], data),
      "\"dtype\" twice")
    rejects(entry('"F8_E4M3"', "[2]", "[0,8]"), "unsupported dtype \"F8_E4M3\"")
    rejects(entry("7", "[2]", "[0,8]"), "unsupported dtype 7")
    rejects(entry('"F32"', "2", "[0,8]"), "shape is missing or not a list")
    rejects(entry('"F32"', '{"x":2}', "[0,8]"), "shape is an object")
    rejects(entry('"F32"', "[-2]", "[0,8]"), "shape%[1%] must be a whole number >= 0, got %-2")
    rejects(entry('"F32"', "[2.5]", "[0,8]"), "got 2.5")
    rejects(entry('"F32"', "[1,1,1,1,1,1,2]", "[0,8]"), "7 dimensions; at most 6")
    rejects(entry('"F32"', "[9007199254740992,9007199254740992]", "[0,8]"), "too many elements")
    rejects(entry('"F32"', "[2]", "[0]"), "data_offsets must be two whole numbers")
    rejects(entry('"F32"', "[2]", "[-8,0]"), "data_offsets must be two whole numbers")
    rejects(entry('"F32"', "[2]", "[8,0]"), "end before they begin")
    rejects(entry('"F32"', "[4]", "[0,16]"), "reach past the data %(8 bytes%)")
    rejects(entry('"F32"', "[3]", "[0,8]"), "shape %[3%] need 12 bytes, data_offsets give 8")
    rejects(entry('"F32"', "[1]", "[4,8]"), "4 bytes before tensor \"a\" belong to no tensor")
    rejects(entry('"F32"', "[1]", "[0,4]"), "4 bytes of data after the last tensor")
    rejects(safetensors(good:sub(1, -2) .. [[,"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}]],
      data), "tensors \"a\" and \"b\" overlap")
    rejects(safetensors([[{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"extra":1}}]], data),
      "unknown field \"extra\"")
    rejects(safetensors([[{"__metadata__":{"k":1}}]]), "must map strings to strings")
    rejects(safetensors([[{"__metadata__":7}]]), "__metadata__ is not an object")
    rejects(entry('"BOOL"', "[8]", "[0,8]"):sub(1, -2) .. "\2", "element 7 is 2, a bool must be 0 or 1")
    rejects(safetensors(("["):rep(5000)), "does not begin with {")
    rejects(safetensors('{"a":' .. ("["):rep(5000)), "not JSON")
    rejects(safetensors('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', data), "not JSON")
    assert.error_matches(function() lac.io.load("/nonexistent/file") end,
      "cannot read /nonexistent/file: No such file")
    assert.error_matches(function() lac.io.load(3) end, "expected a path, got a number")
    assert.error_matches(function() lac.io.load("/tmp") end, "io%.load: .*/tmp")
  end)

  it("survives random mutations", function()
    lac.io.save(path, { a = lac.randn{ 3, 4 }, b = lac.arange{ 5, dtype = "i64" } }, { k = "v" })
    local good = read()
    local state, refused = 12345, 0
    local function random(n)
      state = (state * 16807) % 2147483647
      return state % n
    end
    for _ = 1, 400 do
      local text = good
      for _ = 1, 1 + random(3) do
        local at = 1 + random(math.min(#text, 250))
        local kind = random(3)
        if kind == 0 then text = text:sub(1, at - 1) .. string.char(random(256)) .. text:sub(at + 1)
        elseif kind == 1 then text = text:sub(1, at - 1) .. text:sub(at + 1)
        else text = text:sub(1, at) .. string.char(48 + random(10)) .. text:sub(at + 1) end
      end
      write(text)
      local ok, message = pcall(lac.io.load, path)
      if not ok then
        refused = refused + 1
        assert.is_string(message)
        assert.is_truthy(message:find(path, 1, true), message)
      end
    end
    assert.is_true(refused > 200)
  end)

  it("saves atomically: a failed save leaves the old file and no other", function()
    lac.io.save(path, { a = lac.ones{ 2 } })
    local before = read()
    assert.error_matches(function() lac.io.save(path, { a = lac.ones{ 2 }, b = 3 }) end,
      "\"b\" is a number, not a tensor")
    assert.error_matches(function() lac.io.save(path, lac.nn.Linear(2, 3)) end,
      "expected a table { name = tensor, ... }, got Linear: its state_dict%(%) is one")
    local dead = lac.ones{ 2 }
    dead:release()
    assert.has_error(function() lac.io.save(path, { a = dead }) end)
    assert.equal(before, read())
    assert.error_matches(function() lac.io.save("/nonexistent/x", { a = lac.ones{ 1 } }) end,
      "cannot write /nonexistent/x")
    local listing = io.popen("ls " .. path .. "*"):read("*a")
    assert.equal(path .. "\n", listing)
  end)

  it("refuses bad arguments to save", function()
    assert.error_matches(function() lac.io.save(path, lac.ones{ 2 }) end, "expected a table { name = tensor")
    assert.error_matches(function() lac.io.save(path, { lac.ones{ 2 } }) end,
      "names are strings, got the number 1")
    assert.error_matches(function() lac.io.save(path, { ["\255"] = lac.ones{ 2 } }) end, "not UTF%-8")
    assert.error_matches(function() lac.io.save(path, { __metadata__ = lac.ones{ 2 } }) end, "reserved")
    assert.error_matches(function() lac.io.save(path, {}, { a = 1 }) end, "must map strings to strings")
    assert.error_matches(function() lac.io.save(path, {}, "x") end, "metadata must be a table")
  end)

  it("inspects without reading data", function()
    lac.io.save(path, { a = lac.ones{ 2, 3 } }, { k = "v" })
    local list, metadata = lac.io.inspect(path)
    assert.same({ { name = "a", dtype = "F32", shape = { 2, 3 }, bytes = 24 } }, list)
    assert.equal("v", metadata.k)
  end)
end)

describe("json", function()
  it("writes numbers that read back equal", function()
    for _, x in ipairs{ 0.1, 1 / 3, 1e300, 5e-324, 2 ^ 53, -2.5, 123456789012345, 1e-7 } do
      assert.equal(x, tonumber(json.encode(x)))
    end
    assert.equal("0.1", json.encode(0.1))
    assert.equal("9007199254740993", json.encode(9007199254740993LL))
  end)

  it("orders keys, escapes strings, tells lists from objects", function()
    assert.equal('{"z":1,"a":2,"b":[]}', json.encode({ a = 2, b = json.array(), z = 1 }, { order = { "z" } }))
    assert.equal('"a\\"\\\\\\n\\u0001"', json.encode('a"\\\n\1'))
    assert.equal("[1,[2],{}]", json.encode{ 1, { 2 }, {} })
    assert.equal('{\n  "a": {\n    "b": [1, 2]\n  }\n}', json.encode({ a = { b = { 1, 2 } } },
      { indent = 2 }))
  end)

  it("follows the policy for NaN and infinity", function()
    assert.equal('{"a":null}', json.encode({ a = 0 / 0 }, { nan = "null" }))
    assert.equal('["NaN","Infinity","-Infinity"]', json.encode({ 0 / 0, 1 / 0, -1 / 0 }, { nan = "string" }))
    assert.error_matches(function() json.encode{ a = { 1 / 0 } } end, "value.a%[1%] is Infinity")
    assert.error_matches(function() json.encode(1, { nan = "zero" }) end, "option nan must be")
  end)

  it("names what it cannot write", function()
    assert.error_matches(function() json.encode{ a = print } end, "value.a is a function")
    assert.error_matches(function() json.encode{ [1] = 1, x = 2 } end, "gaps or with named fields")
    assert.error_matches(function() json.encode{ [true] = 1 } end, "the key true")
    local cycle = {}
    cycle.a = cycle
    assert.error_matches(function() json.encode(cycle) end, "nested more than 64")
  end)

  it("finds duplicate keys only in the same object", function()
    assert.equal("a", json.duplicate_key('{"a":1,"b":{"a":2},"a":3}'))
    assert.equal("k", json.duplicate_key('{"b":[{"k":1,"k":2}]}'))
    assert.is_nil(json.duplicate_key('{"a":{"a":1},"b":[{"a":1},{"a":2}],"c":"a","d":"\\"a"}'))
    assert.equal('"', json.duplicate_key('{"\\"":1,"\\u0022":2}'))
  end)

  it("finds invalid UTF-8", function()
    assert.is_nil(json.invalid_utf8("a\195\164\226\130\172\240\159\152\128"))
    for _, bad in ipairs{ "a\128", "a\195", "a\192\175", "a\224\128\175", "a\237\160\128",
      "a\244\144\128\128", "a\255" } do
      assert.equal(1, json.invalid_utf8(bad))
    end
  end)
end)
