--- fuzz.lua: random public calls with random arguments. Run: luajit tests/support/fuzz.lua SEED COUNT
--
-- A call is a function of the library (all of lac.*, every tensor method, operators and indexing, attention,
-- nn, optim, io, data), a receiver where it needs one, and up to five arguments. Arguments come from a pool:
-- tensors of every dtype, rank and kind of stride, empty, 0-dim and released ones, numbers with NaN,
-- infinities and huge values, strings, tables, functions, cdata, nil. Option tables are made of the option
-- names and the words that the library's sources mention, so a new option is attacked as soon as it exists.
-- Results go back into the pool, which makes sequences of calls.
--
-- Whatever happens must be a result or an error that is a sentence: not LuaJIT's "attempt to index a nil
-- value", which names no operator and no argument. Guard bytes lie round every block. At the end the engine
-- must give the same bits as at the beginning, and the pool must be as full as at the beginning. A crash
-- shows in the exit status, which is why this is a program and not a part of the spec. Everything follows
-- from the seed: a failure prints the call and the command that repeats it.
--
-- Rejected: random Lua programs (nearly all of them fail on their first line) and an outside fuzzer with
-- coverage (a dependency, and it knows nothing of tensors).

package.path = "lua/?.lua;lua/?/init.lua;tests/?.lua;" .. package.path

local ffi = require "ffi"
local lac = require "lacuna"
local lib = require "lacuna.lib"
local sys = require "lacuna.sys"
local tensor = require "lacuna.tensor"

local SEED, COUNT = tonumber(arg[1]) or 1, tonumber(arg[2]) or 10000
local DIR = sys.temporary("-fuzz")
sys.mkdir(DIR)

-- ---- what is left out, and why -------------------------------------------------------------------

-- A table of lac that is neither here nor CALLED stops the run: a new module must choose.
local EXCLUDED = {
  threads = "4096 threads would slow the machine down for everybody",
  nan_watch = "left on it would turn most later calls into its own errors; detect_anomaly is called",
  memory_limit = "the limit protects the machine from the sizes that are tried here",
  schema = "checks options against the library's own tables; scripts do not call it",
  repl = "waits for a keyboard", notebook = "waits for a keyboard",
  plot = "starts gnuplot and writes pictures where a path says",
  log = "writes a run folder where a path says",
  train = "runs training loops and writes checkpoints where a path says",
  data = "data.open and data.bible read files of the system; data.string and data.order2 are called below",
  bench = "measures for seconds, and starts other programs",
  registry = "an internal table of names",
}
local CALLED = { io = true, optim = true, nn = true, attention = true, config = true }
for name in pairs(getmetatable(lac).__names) do
  local _ = pcall(function() return lac[name] end) -- loads it; some are not in every installation
end
for name, value in pairs(lac) do
  local callable = type(value) ~= "table" or (getmetatable(value) or {}).__call
  if not callable and not EXCLUDED[name] and not CALLED[name] then
    error(("fuzz: lac.%s is a module that is neither called nor excluded"):format(name), 0)
  end
end

-- ---- random choices ------------------------------------------------------------------------------

-- 16807 x mod 2^31 - 1 (Park and Miller 1988): every product is exact in a double
local state = SEED * 7919 % 2147483646 + 1
local function random(n) -- 1 .. n
  state = state * 16807 % 2147483647
  return math.floor(state / 2147483647 * n) + 1
end
local function one_of(list) return list[random(#list)] end
local function chance(percent) return random(100) <= percent end

-- option names and words ("mean", "split") out of the sources
local NAMES, WORDS = {}, {}
do
  local seen = {}
  local function add(list, word)
    if not seen[word] then
      seen[word] = true
      list[#list + 1] = word
    end
  end
  local find = io.popen("find lua/lacuna -name '*.lua' | sort")
  for path in find:lines() do
    local file = assert(io.open(path, "rb"))
    local text = file:read("*a")
    file:close()
    for name in text:gmatch("([%l_]+) = { type = ") do add(NAMES, name) end
    for name, words in text:gmatch("([%l_]+) = { one_of = {([^}]*)}") do
      add(NAMES, name)
      for word in words:gmatch('"([^"]+)"') do add(WORDS, word) end
    end
  end
  find:close()
end
for _, word in ipairs { "f32", "f64", "f16", "bf16", "i64", "i32", "u8", "bool", "cpu", "cuda:0", "x", "" } do
  WORDS[#WORDS + 1] = word
end

local NUMBERS = { 0, 1, 2, 3, 4, 5, 6, -1, -2, -3, 0.5, 0.1, -2.5, 1e-300, 1e300, 0 / 0, math.huge,
                  -math.huge, 2 ^ 31, 2 ^ 53, -2 ^ 53, 2 ^ 62 }

local function small() return random(5) - 1 end

local function small_list()
  local list = {}
  for i = 1, random(4) do list[i] = chance(95) and small() or one_of(NUMBERS) end
  return list
end

-- functions that scripts might pass; none of them fails by itself with an error of Lua
local FUNCTIONS = {
  function(...) return ... end,
  function() end,
  function() error("the user's own message", 0) end,
  function() return lac.ones { 2 } end,
  function(x) return tensor.is(x) and x:clone() or x end,
}

-- ---- the pool --------------------------------------------------------------------------------------

local pool, pool_size = {}, 0
local KEEP, MOST_ELEMENTS = 60, 4096

local function keep(t)
  if pool_size < KEEP then
    pool_size = pool_size + 1
    pool[pool_size] = t
  else
    pool[random(KEEP)] = t
  end
end

local FLOATS = { "f32", "f64", "f16", "bf16" }
local DTYPES = { "f32", "f64", "f16", "bf16", "i64", "i32", "u8", "bool" }

local function fresh_tensor()
  local sizes = { dtype = chance(60) and one_of(FLOATS) or one_of(DTYPES) }
  for i = 1, random(5) - 1 do sizes[i] = chance(90) and random(4) or small() end
  if chance(30) then
    sizes.dtype, sizes.grad = one_of(FLOATS), true
    return lac.randn(sizes)
  end
  local t = lac.empty(sizes)
  return t:fill_(sizes.dtype == "bool" and small() % 2 or small())
end

local function good_tensor()
  local t = fresh_tensor()
  local kind = random(8)
  if kind == 1 and t:dim() >= 2 then return t:transpose(1, -1) end
  if kind == 2 and t:dim() >= 1 and t:size(1) > 0 then return t[{ { -1, 1, -1 } }] end
  if kind == 3 and t:dim() >= 1 then return t:unsqueeze(1):expand(3, -1, t:dim() > 1 and -1 or nil,
                                                                  t:dim() > 2 and -1 or nil,
                                                                  t:dim() > 3 and -1 or nil) end
  if kind == 4 and t:dim() >= 1 and t:size(-1) > 1 then return t:narrow(-1, 2, 1) end
  return t
end

local function any_tensor()
  if pool_size > 0 and chance(80) then return pool[random(pool_size)] end
  local t = good_tensor()
  if chance(4) then t.root:release() end
  keep(t)
  return t
end

-- ---- arguments -------------------------------------------------------------------------------------

local argument

local function option_table()
  local t = {}
  if chance(50) then
    for i, v in ipairs(small_list()) do t[i] = v end
  end
  for _ = 1, random(4) - 1 do t[one_of(NAMES)] = argument() end
  return t
end

local circle = {}
circle[1], circle.self = circle, circle
local TABLES = {
  function() return {} end, small_list, option_table, option_table,
  function() return { any_tensor(), any_tensor() } end,
  function() return { name = any_tensor() } end,
  function() return { argument(), argument() } end,
  function() return circle end,
}
local CDATA = { ffi.new("int[3]"), ffi.new("double[2]", 1), 5LL, ffi.new("void *"), ffi.new("lac_flags") }

function argument()
  local kind = random(100)
  if kind <= 40 then return any_tensor() end
  if kind <= 55 then return small() end
  if kind <= 62 then return one_of(NUMBERS) end
  if kind <= 70 then return one_of(WORDS) end
  if kind <= 86 then return one_of(TABLES)() end
  if kind <= 89 then return one_of(FUNCTIONS) end
  if kind <= 92 then return chance(50) end
  if kind <= 94 then return one_of(CDATA) end
  return nil
end

local function same_shape_as(t) -- so that binary operators often get through
  if chance(40) then return t end
  return argument()
end

-- ---- calls -----------------------------------------------------------------------------------------

local label, shown -- the present call, for the report
local calls = 0

local function text_of(v)
  return tensor.is(v) and tensor.class.__describe(v) or require("lacuna.schema").show(v)
end

local function attempt(name, f, ...)
  local parts = {}
  for i = 1, select("#", ...) do parts[i] = (select(i, ...)) end
  label, shown, calls = name, parts, calls + 1
  shown.n = select("#", ...)
  return pcall(f, ...)
end

local INTERNAL = { "attempt to ", "bad argument", "cannot convert", "NYI", "stack overflow", "table overflow",
                   "not enough memory", "invalid value", "invalid option", "invalid order function",
                   "C stack", "number has no", "expected near", "missing declaration" }

local failures, reported = 0, {}
local function complain(message)
  failures = failures + 1
  local key = label .. message:gsub("%d+", ""):sub(1, 90)
  if reported[key] then return end
  reported[key] = true
  local arguments = {}
  for i = 1, shown.n do
    local ok, text = pcall(text_of, shown[i])
    arguments[i] = ok and text or "?"
  end
  io.stderr:write(("%s(%s): %s\n"):format(label, table.concat(arguments, ", "), message))
end

local function judge(ok, result, ...)
  if ok then
    local results = { result, ... }
    for i = 1, 3 do
      local v = results[i]
      if tensor.is(v) and tensor.numel(v) <= MOST_ELEMENTS then keep(v) end
    end
    return result
  end
  if type(result) ~= "string" then return complain("the error is a " .. type(result)) end
  for _, pattern in ipairs(INTERNAL) do
    if result:find(pattern, 1, true) then return complain(result) end
  end
end

local function call(name, f, ...) return judge(attempt(name, f, ...)) end

local functions, methods = {}, {}
do
  local names = {}
  for name, value in pairs(lac) do
    local kind = type(value)
    local callable = kind == "function" or (kind == "table" and (getmetatable(value) or {}).__call)
    if callable and (name == "log" or not EXCLUDED[name]) then names[#names + 1] = name end
  end
  for name in pairs(getmetatable(lac).__settings) do
    if not EXCLUDED[name] then names[#names + 1] = name end
  end
  table.sort(names)
  for i, name in ipairs(names) do functions[i] = { "lac." .. name, lac[name] } end
  names = {}
  for name in pairs(tensor.methods) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do methods[i] = { "t:" .. name, tensor.methods[name] } end
end

-- What an argument should be, so that most calls get past the checks of their arguments; one in eight is
-- replaced by anything. Functions that are not listed get anything, or tensors like the first.
local SIGNATURE = {}
for names, kinds in pairs {
  ["narrow"] = "dim int int", ["select"] = "dim int", ["view reshape expand"] = "sizes",
  ["permute"] = "dims", ["transpose"] = "dim dim",
  ["unsqueeze squeeze argmax argmin softmax log_softmax"] = "dim",
  ["sum mean max min any all logsumexp var std size stride"] = "dim flag", ["norm"] = "int dim flag",
  ["flatten"] = "dim dim", ["split chunk"] = "int dim", ["tril triu"] = "int", ["to"] = "word",
  ["dropout"] = "fraction flag", ["clamp clamp_ hardtanh hardtanh_"] = "number number",
  ["leaky_relu elu celu softshrink hardshrink"] = "number", ["threshold nan_to_num"] = "number number",
  ["lerp addcmul addcdiv"] = "like like number", ["bernoulli_"] = "fraction",
  ["normal_ uniform_"] = "number number", ["index_select gather"] = "dim index", ["embedding"] = "index",
  ["cross_entropy"] = "index", ["linear_cross_entropy"] = "weight row index", ["one_hot"] = "int",
  ["where"] = "like like", ["masked_fill"] = "mask number", ["register_hook"] = "f",
  ["layernorm gelu_norm"] = "width width fraction", ["residual_norm"] = "like width width",
  ["rope"] = "rope", ["copy_"] = "like", ["add_"] = "like number",
  ["zeros ones empty rand randn"] = "factory", ["full"] = "factory number", ["randint"] = "factory",
  ["bernoulli"] = "factory", ["arange linspace eye"] = "sizes", ["randperm"] = "int",
  ["zeros_like ones_like empty_like rand_like randn_like"] = "options", ["full_like"] = "number",
  ["tensor"] = "data", ["cat stack"] = "tensors dim", ["scope no_grad enable_grad"] = "f tensor",
  ["sort argsort median unique"] = "dim flag", ["topk kthvalue"] = "int dim flag",
    ["quantile"] = "fraction dim",
  ["searchsorted bucketize"] = "like flag", ["masked_select"] = "mask", ["masked_fill_"] = "mask number",
  ["scatter scatter_add scatter_ scatter_add_"] = "dim index like", ["take_along_dim"] = "index dim",
  ["index_add index_copy index_add_ index_copy_"] = "dim index like", ["histc"] = "int number number",
  ["index_fill index_fill_"] = "dim index number", ["tile"] = "int int", ["roll"] = "int dim",
  ["flip"] = "dim dim", ["repeat_interleave"] = "int dim", ["diagonal"] = "int dim dim", ["diag"] = "int",
  ["unfold"] = "dim int int", ["avg_pool1d max_pool1d"] = "int", ["pad"] = "sizes", ["meshgrid"] = "tensors",
  ["tensordot"] = "like int", ["dot outer bmm"] = "like", ["einsum"] = "equation tensors",
  ["conv1d"] = "like", ["multinomial"] = "int flag", ["causal_mask"] = "int int", ["alibi_slopes"] = "int",
  ["alibi_bias"] = "int int int", ["mse_loss l1_loss huber_loss smooth_l1_loss kl_div"] = "like",
  ["binary_cross_entropy_with_logits cosine_similarity"] = "like", ["nll_loss"] = "index",
  ["custom_op"] = "custom", ["grad"] = "like", ["manual_seed"] = "int", ["linear"] = "weight row",
} do
  for name in names:gmatch("%S+") do
    local list = {}
    for kind in kinds:gmatch("%S+") do list[#list + 1] = kind end
    SIGNATURE[name] = list
  end
end
-- A function that is not listed, say an operator that was added yesterday, tells by its parameters' names
-- what it takes.
local PARAMETER = {
  dim = "dim", dim1 = "dim", dim2 = "dim", first = "dim", last = "dim", i = "dim", j = "dim", dims = "dims",
  shifts = "dims", amounts = "dims", idx = "index", index = "index", target = "index", mask = "mask",
  cond = "mask",
  keepdim = "flag", descending = "flag", largest = "flag", sorted = "flag", right = "flag", training = "flag",
  include_self = "flag",
  n = "int", k = "int", size = "int", step = "int", length = "int", start = "int",
  offset = "int", times = "int", bins = "int", classes = "int", p = "fraction", eps = "fraction",
  low = "number", high = "number", value = "number", alpha = "number", correction = "int",
  x = "like", y = "like",
  a = "like", b = "like", c = "like", src = "like", like = "like", values = "like", boundaries = "row",
  weight = "weight", w = "weight", bias = "row", gamma = "width", beta = "width", f = "f", fn = "f",
  reduce = "reduction", equation = "equation", options = "options", tensors = "tensors", list = "tensors",
}
local function signature_of(name, f, from)
  if SIGNATURE[name] == nil then
    local kinds = {}
    for i = from, 6 do
      local parameter = type(f) == "function" and debug.getlocal(f, i)
      if not parameter then break end
      kinds[#kinds + 1] = PARAMETER[parameter] or "anything"
    end
    SIGNATURE[name] = #kinds > 0 and kinds or false
  end
  return SIGNATURE[name]
end

-- lac.name(...) of these takes no tensor first
local NO_TENSOR = {}
for name in ([[zeros ones empty rand randn full randint bernoulli arange linspace eye randperm tensor cat
  stack scope no_grad enable_grad custom_op manual_seed
  meshgrid einsum causal_mask alibi_slopes alibi_bias]]):gmatch("%S+") do NO_TENSOR[name] = true end

local function dtype_options(t)
  if chance(60) then t.dtype = one_of(DTYPES) end
  if chance(20) then t.grad = true end
  return t
end

local MAKE = {
  anything = function() return argument() end,
  reduction = function() return one_of { "sum", "mean", "prod", "max", "min", "none", "add", "set" } end,
  dim = function(self) return tensor.is(self) and self:dim() > 0 and random(self:dim()) or small() end,
  int = small, flag = function() return chance(50) end, word = function() return one_of(DTYPES) end,
  sizes = function(self)
    if tensor.is(self) and chance(70) then return chance(50) and self:size() or { -1 } end
    return small_list()
  end,
  dims = function(self)
    local list = {}
    for i = 1, tensor.is(self) and self:dim() or 2 do table.insert(list, random(i), i) end
    return list
  end,
  fraction = function() return random(100) / 100 - 0.01 end, number = function() return random(9) - 4 end,
  tensor = any_tensor, f = function() return one_of(FUNCTIONS) end,
  like = function(self) return tensor.is(self) and self:detach():clone() or any_tensor() end,
  index = function(self)
    local sizes = { low = 0, high = 3 }
    if tensor.is(self) and chance(60) then
      for i = 1, self:dim() - 1 do sizes[i] = self:size(i) end
    else
      sizes[1] = small()
    end
    return lac.randint(sizes)
  end,
  mask = function(self) return tensor.is(self) and self:detach():gt(0) or any_tensor() end,
  width = function(self) return lac.ones { self:size(-1), dtype = self:dtype(), grad = true } end,
  weight = function(self) return lac.ones { 3, self:size(-1), dtype = self:dtype(), grad = true } end,
  row = function(self) return lac.ones { 3, dtype = self:dtype(), grad = chance(50) } end,
  rope = function()
    return { start = small(), interleaved = chance(50), scale_base = chance(50) and 512 or 0 }
  end,
  factory = function()
    local t = dtype_options(small_list())
    for _, name in ipairs { "low", "high", "p", "value", "mean", "std" } do
      if chance(15) then t[name] = random(4) - 1 end
    end
    return t
  end,
  options = function() return dtype_options {} end,
  data = function() return chance(50) and small_list() or { small_list(), small_list() } end,
  tensors = function()
    local t = any_tensor()
    return { t, chance(80) and t or any_tensor() }
  end,
  equation = function()
    local text = ""
    for _ = 1, random(6) do text = text .. one_of { "a", "b", "c", "d", ",", "->", "..." } end
    return chance(30) and one_of { "ab,ab->ab", "abc,abd->acd", "...,...->...", "a,a",
      "abcd,abcd->abd" } or text
  end,
  custom = function()
    return { name = "mine", forward = one_of(FUNCTIONS), backward = one_of(FUNCTIONS) }
  end,
}

local function likely_arguments(name, self)
  local kinds = SIGNATURE[name]
  local list = {}
  for i = 1, #kinds do
    if chance(12) then
      list[i] = argument()
    else -- a released tensor cannot be compared with
      local ok, value = pcall(MAKE[kinds[i]], self)
      list[i] = ok and value or nil
    end
  end
  return unpack(list, 1, #kinds)
end

local function some_arguments(first)
  local n = random(5)
  local second = n >= 1 and (first and same_shape_as(first) or argument()) or nil
  return second, n >= 2 and argument() or nil, n >= 3 and argument() or nil, n >= 4 and argument() or nil
end

local OPERATORS = {
  ["a + b"] = function(a, b) return a + b end, ["a - b"] = function(a, b) return a - b end,
  ["a * b"] = function(a, b) return a * b end, ["a / b"] = function(a, b) return a / b end,
  ["a ^ b"] = function(a, b) return a ^ b end, ["a % b"] = function(a, b) return a % b end,
  ["b + a"] = function(a, b) return b + a end, ["b - a"] = function(a, b) return b - a end,
  ["-a"] = function(a) return -a end, ["a == b"] = function(a, b) return a == b end,
  ["a .. b"] = function(a, b) return a .. tostring(b) end, ["tostring(a)"] = tostring,
  ["a[b]"] = function(a, b) return a[b] end, ["a[{b, c}]"] = function(a, b, c) return a[{ b, c }] end,
  ["a[{{b, c}}]"] = function(a, b, c) return a[{ { b, c } }] end,
  ["a[b] = c"] = function(a, b, c) a[b] = c end, ["a.grad = b"] = function(a, b) a.grad = b end,
}
local operator_names = {}
for name in pairs(OPERATORS) do operator_names[#operator_names + 1] = name end
table.sort(operator_names)

local function call_operator()
  local name, b = one_of(operator_names), argument()
  if type(b) == "cdata" then b = 3 end -- LuaJIT itself answers for int64 + table
  call(name, OPERATORS[name], any_tensor(), b, argument())
end

-- ---- attention --------------------------------------------------------------------------------------

local function pattern_options()
  local o = {}
  local branches = random(3)
  o.segments, o.dilations = {}, {}
  for i = 1, branches do o.segments[i], o.dilations[i] = random(9) * i, random(3) end
  local maybe = {
    causal = { true, false }, dedup = { true, false }, merge = { "mean", "sum", "lse", "lse_detach" },
    offset = { "mod", "branch", "block" }, align = { "start", "end" }, window = { 0, 1, 3 },
    dropout = { 0, 0.3 }, scale = { 0.5, -1 }, return_lse = { true, false },
    fp8 = { true, false },
  }
  for _, name in ipairs { "causal", "dedup", "merge", "offset", "align", "window", "dropout", "scale",
                          "return_lse", "fp8" } do
    if chance(25) then o[name] = one_of(maybe[name]) end
  end
  if chance(30) then o[one_of(NAMES)] = argument() end
  return o
end

local function heads_tensor(dtype, b, n, h, d)
  if chance(10) then return argument() end
  local t = lac.randn { b, n, h, d, dtype = dtype, grad = chance(50) }
  if chance(20) then return t:transpose(2, 3):contiguous():transpose(2, 3) end
  return t
end

-- kinds of configurations, which are values: made, compared, changed, printed
local CONFIGS = {}
for name, value in pairs(lac.config) do
  if type(value) == "function" and name ~= "define" and name ~= "wrap" and name ~= "is"
    and name ~= "settle" and name ~= "expect_settled" then
    CONFIGS[#CONFIGS + 1] = name
  end
end
table.sort(CONFIGS)

local function call_config(pattern)
  local kind = one_of(CONFIGS)
  local made = call("config." .. kind, lac.config[kind], chance(60) and pattern or option_table())
  call("config.is", lac.config.is, made or argument(), chance(50) and kind or argument())
  if made then
    call("config:with", made.with, made, option_table())
    call("tostring(config)", tostring, made)
    local _ = made == call("config." .. kind, lac.config[kind], pattern)
  end
end

local function call_attention()
  local dtype, b, n, h, d = one_of(FLOATS), random(2), random(12), random(3), random(6)
  local m, kv = chance(70) and n or random(12), chance(70) and h or 1
  local q = heads_tensor(dtype, b, n, h, d)
  local k, v = heads_tensor(dtype, b, m, kv, d), heads_tensor(dtype, b, m, kv, d)
  local o = pattern_options()
  local kind = random(4)
  if kind == 1 then
    if chance(50) then o.heads = chance(50) and "all" or "split" end
    if chance(20) then o.key_lengths = lac.randint { b, low = 0, high = m + 1 } end
    if chance(20) then o.key_padding = lac.bernoulli { b, m, p = 0.5 } end
    local out = call("lac.attend", lac.attend, q, k, v, o)
    if tensor.is(out) and out.requires_grad then
      local total = call("t:sum", out.sum, out)
      if total then call("t:backward", total.backward, total) end
    end
  elseif kind == 2 then
    call("plan_info", lac.attention.plan_info, o, chance(80) and { n = n, m = m, heads = h, kv_heads = kv }
      or argument())
  else
    o.heads, o.variant = h, one_of { "dense", "dilated", "improved", "longnet" }
    o.kv_heads = kv
    if chance(15) then call_config(o) end
    if o.variant == "dense" then o.segments, o.dilations, o.merge, o.offset = nil, nil, nil, nil end
    local attn = call("lac.attention", lac.attention, chance(90) and o or argument())
    if attn then
      call("attn", attn, q, k, v, chance(20) and option_table() or nil)
      local length = argument()
      -- rows are counted position by position: 2^31 of them take seconds
      if type(length) == "number" and length > 1e6 then length = 1e6 end
      call("attn:explain", attn.explain, attn, length, chance(30) and option_table() or nil)
      call("tostring(attn)", tostring, attn)
    end
  end
end

-- ---- layers, optimizers, files, text -----------------------------------------------------------------

local modules = {}
for name, value in pairs(lac.nn) do
  if (type(value) == "function" or value.init) and not EXCLUDED[name] then modules[#modules + 1] = name end
end
table.sort(modules)
-- methods of every class are tried; these more often
local MODULE_METHODS = { "forward", "forward", "forward", "parameters", "named_parameters", "train", "eval",
                         "parameter_count", "state_dict", "load_state_dict", "zero_grad", "to", "apply",
                         "loss", "generate" }

-- arguments that make a module, before one option is spoilt; all sizes are tiny
local function attention_options()
  return { embed_dim = 4, heads = 2, segments = { 4 }, dilations = { 1 }, causal = chance(50) }
end
local GOOD = {
  Linear = function() return random(4), random(4), {} end,
  Embedding = function() return 5, random(4), {} end,
  LayerNorm = function() return random(4), {} end, Dropout = function() return 0.5 end,
  FeedForward = function() return 4, 8, {} end, MultiheadDilatedAttention = attention_options,
  Block = function()
    local a = attention_options()
    a.embed_dim = nil
    return { width = 4, ffn = 8, attention = a }
  end,
  LongNetLM = function()
    return { layers = 1, width = 4, heads = 2, context = 8, segments = { 4, 8 }, dilations = { 1, 2 },
             vocab = 8 }
  end,
  Sequential = function() return lac.nn.Linear(3, 4), lac.nn.ReLU(), lac.nn.Linear(4, 2) end,
  ModuleList = function() return { lac.nn.Linear(3, 4), lac.nn.ReLU() } end,
}
local function good_module(name)
  local a, b, c
  if GOOD[name] then a, b, c = GOOD[name]() end
  if chance(40) then
    for _, v in ipairs { a or false, b or false, c or false } do
      if type(v) == "table" and not v.parameters then v[one_of(NAMES)] = argument() end
    end
  end
  return a, b, c
end

-- something that a module may take: float [B, N, 4] or tokens [B, N]
local function module_input()
  if chance(20) then return argument() end
  if chance(50) then return lac.randint { random(2), random(8), high = 5 } end
  return lac.randn { random(2), random(8), chance(70) and 4 or random(4) }
end

local methods_by_class = setmetatable({}, { __mode = "k" })
local function methods_of(object)
  local class = getmetatable(object)
  if not methods_by_class[class] then
    local list, at = { "forward" }, class
    while type(at) == "table" do
      for name, value in pairs(at) do
        local public = type(name) == "string" and not name:match "^_" and name ~= "init"
        if public and type(value) == "function" then
          list[#list + 1] = name
        end
      end
      at = rawget(at, "__parent")
    end
    table.sort(list)
    methods_by_class[class] = list
  end
  return methods_by_class[class]
end

local function call_nn()
  local name = one_of(modules)
  local made
  if chance(70) then
    made = call("nn." .. name, lac.nn[name], good_module(name))
  else
    made = call("nn." .. name, lac.nn[name], some_arguments())
  end
  if type(made) ~= "table" or not lac.nn.is_module(made) then return end
  call("tostring(module)", tostring, made)
  for _ = 1, 3 do
    local method = chance(70) and one_of(MODULE_METHODS) or one_of(methods_of(made))
    local function run(self, ...) return self[method](self, ...) end
    if method == "generate" then -- generate(prompt, n) runs the model n times
      call(name .. ":generate", run, made, chance(50) and "ab" or argument(), random(4))
    elseif method == "forward" or method == "loss" then
      local x = module_input()
      local y = call(name .. ":" .. method, run, made, x, chance(60) and x or argument(), argument())
      if tensor.is(y) and y.requires_grad then call("backward", function() y:sum():backward() end) end
    else
      call(name .. ":" .. method, run, made, some_arguments())
    end
  end
end

local optimizers = {}
for name, value in pairs(lac.optim) do
  if type(value) == "function" and name ~= "groups" and name ~= "loss_scaler" then
    optimizers[#optimizers + 1] = name
  end
end
table.sort(optimizers)
local schedules = {}
for name, value in pairs(lac.optim.schedule) do
  if type(value) == "function" then schedules[#schedules + 1] = name end
end
table.sort(schedules)

local function call_optim()
  if chance(40) then
    local name = one_of(schedules)
    local s = call("schedule." .. name, lac.optim.schedule[name], some_arguments())
    if type(s) == "function" then call("schedule", s, chance(80) and one_of(NUMBERS) or argument()) end
    return
  end
  if chance(20) then call("optim.groups", lac.optim.groups, argument(), some_arguments()) end
  if chance(20) then
    local scaler = call("optim.loss_scaler", lac.optim.loss_scaler,
      chance(50) and { init = 4 } or some_arguments())
    if type(scaler) == "table" then
      for _, name in ipairs { "scale", "update", "state_dict", "load_state_dict" } do
        if chance(50) then call("LossScaler:" .. name, scaler[name], scaler, some_arguments()) end
      end
    end
  end
  local p = chance(80) and lac.randn { 3, dtype = one_of { "f32", "f64" }, grad = true } or argument()
  local kind = one_of(optimizers)
  local made = call("optim." .. kind, lac.optim[kind], chance(90) and { p } or argument(),
                    chance(50) and { lr = 0.1 } or argument())
  if type(made) ~= "table" or not made.step then return end
  if tensor.is(p) and p.requires_grad and chance(70) then
    call("a.grad = b", OPERATORS["a.grad = b"], p, lac.ones_like(p:detach()))
  end
  for _, name in ipairs { "step", "zero_grad", "state_dict", "load_state_dict", "grad_norm", "config" } do
    if chance(50) then call(kind .. ":" .. name, made[name], made, some_arguments()) end
  end
  call("tostring(optimizer)", tostring, made)
end

local file_names = { DIR .. "/a.safetensors", DIR .. "/b.safetensors", DIR .. "/missing/c.safetensors", DIR }

local function damage(bytes) -- a few random bytes, or a random length
  local list = {}
  for i = 1, #bytes do list[i] = bytes:sub(i, i) end
  for _ = 1, random(4) do
    if #list > 0 then list[random(#list)] = string.char(random(256) - 1) end
  end
  return table.concat(list, "", 1, chance(30) and random(#list + 1) - 1 or #list)
end

local io_functions = {}
for name, value in pairs(lac.io) do
  if type(value) == "function" then io_functions[#io_functions + 1] = name end
end
table.sort(io_functions)

local function call_io()
  local path, kind = one_of(file_names), random(5)
  if kind == 5 then
    local name = one_of(io_functions)
    call("io." .. name, lac.io[name], path, chance(50) and { a = any_tensor() } or argument(), argument())
    return
  end
  if kind == 1 then
    call("io.save", lac.io.save, path, chance(70) and { a = any_tensor(), b = any_tensor() } or argument(),
         chance(70) and { note = "x" } or argument())
  elseif kind == 2 then
    local file = io.open(file_names[1], "rb")
    local bytes = file and file:read("*a") or ""
    if file then file:close() end
    if #bytes < 9 or chance(20) then
      local list = {}
      for i = 1, random(60) do list[i] = string.char(random(256) - 1) end
      bytes = string.char(random(40) - 1) .. ("\0"):rep(7) .. table.concat(list)
    elseif #bytes < 20000 then
      bytes = damage(bytes)
    end
    file = assert(io.open(file_names[2], "wb"))
    file:write(bytes)
    file:close()
    call("io.load", lac.io.load, file_names[2])
    call("io.inspect", lac.io.inspect, file_names[2])
  else
    local where = chance(80) and path or argument()
    call(kind == 3 and "io.load" or "io.inspect", kind == 3 and lac.io.load or lac.io.inspect, where)
  end
end

local function call_data()
  local words = {}
  for i = 1, random(40) do words[i] = one_of(WORDS) end
  local bytes = call("data.string", lac.data.string, chance(80) and table.concat(words, " ") or argument())
  if type(bytes) ~= "table" then return end
  local method = one_of { "split", "batch", "windows", "window_starts", "slice", "text", "tensors" }
  call("bytes:" .. method, bytes[method], bytes, some_arguments())
  if chance(3) then -- counts 2^24 cells
    local model = call("data.order2", lac.data.order2, chance(80) and bytes or argument())
    if type(model) == "table" then
      call("order2:bits_per_byte", model.bits_per_byte, model, chance(70) and bytes or argument())
      call("order2:probability", model.probability, model, argument(), argument(), argument())
    end
  end
end

-- ---- the run --------------------------------------------------------------------------------------

local function step()
  local kind = random(100)
  if kind <= 40 then
    local m = one_of(methods)
    local self = chance(97) and any_tensor() or argument()
    local name = m[1]:sub(3)
    if signature_of(name, m[2], 2) and chance(75) then
      call(m[1], m[2], self, likely_arguments(name, self))
    else
      call(m[1], m[2], self, some_arguments(self))
    end
  elseif kind <= 70 then
    local f = one_of(functions)
    local a, name = argument(), f[1]:sub(5)
    if signature_of(name, f[2], NO_TENSOR[name] and 1 or 2) and chance(75) then
      if NO_TENSOR[name] then
        call(f[1], f[2], likely_arguments(name))
      else
        a = any_tensor()
        call(f[1], f[2], a, likely_arguments(name, a))
      end
    else
      call(f[1], f[2], a, some_arguments(a))
    end
  elseif kind <= 82 then
    call_operator()
  elseif kind <= 90 then
    call_attention()
  elseif kind <= 94 then
    call_nn()
  elseif kind <= 96 then
    call_optim()
  elseif kind <= 98 then
    call_io()
  else
    call_data()
  end
end

-- bytes of known computations: what the engine gives before and after must be the same
local function probe()
  lac.default_dtype "f32"
  lac.manual_seed(99)
  local a, b = lac.randn { 17, 23, grad = true }, lac.randn { 23, 9 }
  local loss = a:matmul(b):tanh():softmax(-1):square():sum()
  loss:backward()
  local q = lac.randn { 1, 20, 2, 8 }
  local out, lse = lac.attend(q, q, q, { segments = { 8, 20 }, dilations = { 1, 2 }, causal = true })
  return a.grad:string() .. out:string() .. lse:string() .. tostring(loss:item())
end

local function settle()
  jit.flush() -- compiled code keeps what was constant in it
  for _ = 1, 3 do collectgarbage() end
  return lac.memory().live
end

lib.C.lac_memory_guard(1)
local expected = probe()
local before = settle()
lac.memory_limit(before + 2 ^ 26)
local clock = os.clock()
while calls < COUNT do
  for _ = 1, 1000 do step() end
  lac.nan_watch(false) -- switches that a call may have left on
  lac.memory_tracking(false)
  pool, pool_size = {}, 0
end
local seconds = os.clock() - clock
lac.memory_limit(0)
pool, pool_size, shown, circle = {}, 0, nil, nil
os.execute("rm -rf '" .. DIR .. "'")

local function verdict(ok, text)
  if not ok then
    failures = failures + 1
    io.stderr:write(text, "\n")
  end
end
verdict(probe() == expected, "the engine gives other results than before")
local after = settle()
verdict(after <= before, ("%d bytes are live, %d were at the beginning"):format(after, before))
lac.trim()
verdict(lib.C.lac_memory_guard_errors() == 0, "guard bytes were overwritten")
verdict(lac.is_grad_enabled(), "the tape was left switched off")
verdict(not lac.nan_watch(false), "the NaN watch was left on")
if failures > 0 then
  io.stderr:write(("repeat with: luajit tests/support/fuzz.lua %d %d\n"):format(SEED, COUNT))
  os.exit(1)
end
print(("%d calls in %.1f s"):format(calls, seconds))
os.exit(0)
