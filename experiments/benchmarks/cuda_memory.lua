--- cuda_memory.lua: operators that memory bounds on a GPU, beside a copy and beside PyTorch.
--
-- Maps, reductions, norms, softmax, rotations, cross-entropy and AdamW at the sizes of LongNet-125M: 32,768
-- positions of width 768 and of hidden width 3,072, in f32 and bf16. Each row states the least bytes that the
-- operator must move as a share of the bandwidth of a copy of 1 GiB, and its speed against PyTorch's,
-- measured in the same turns. One call runs the operator on as many copies of its operands as exceed the
-- second-level cache several times, and what it makes lives until the call ends: neither side reads or
-- overwrites what is still in the cache. "both" is forward and backward; its bytes are those of the two.

local lac = require "lacuna"
local bench = require "lacuna.bench"

local SHARE, BEYOND = 0.85, 2 ^ 29 -- bytes that one call moves at least

local function draw(sizes, dtype, grad) return lac.randn(sizes, { dtype = dtype, grad = grad }) end

local function norm_of(f)
  return function(sizes, dtype, grad)
    local gain, bias = draw({ sizes[2] }, dtype, grad), draw({ sizes[2] }, dtype, grad)
    return function(x) return f(x, gain, bias) end, gain, bias
  end
end
local function plain(f) return function() return f end end

local FUNCTIONS = {
  gelu = plain(lac.gelu), silu = plain(lac.silu), exp = plain(lac.exp),
  softmax = plain(function(x) return lac.softmax(x, 2) end),
  ["sum over 1"] = plain(function(x) return x:sum(1) end),
  ["sum over 2"] = plain(function(x) return x:sum(2) end),
  ["sum of all"] = plain(function(x) return x:sum() end),
  ["max over 2"] = plain(function(x) return x:max(2) end),
  ["variance over 2"] = plain(function(x) return x:var(2) end),
  ["logsumexp over 2"] = plain(function(x) return x:logsumexp(2) end),
  layernorm = norm_of(lac.layernorm), gelu_norm = norm_of(lac.gelu_norm),
  rmsnorm = function(sizes, dtype, grad)
    local gain = draw({ sizes[2] }, dtype, grad)
    return function(x) return lac.rmsnorm(x, gain) end, gain
  end,
}

local REDUCTIONS = { "sum over 1", "sum over 2", "sum of all", "max over 2", "variance over 2",
                     "logsumexp over 2" }

local KINDS = {}

function KINDS.forward(name, sizes, dtype)
  local f, x = FUNCTIONS[name](sizes, dtype, false), draw(sizes, dtype)
  return function() return f(x) end
end

function KINDS.backward(name, sizes, dtype)
  local f, gain, bias = FUNCTIONS[name](sizes, dtype, true)
  local x = draw(sizes, dtype, true)
  local out = f(x)
  local inputs, o = { x, gain, bias }, { grad_outputs = { draw(out:size(), dtype) }, retain_graph = true }
  return function() return lac.grad(out, inputs, o) end
end

function KINDS.both(name, sizes, dtype)
  local f, gain, bias = FUNCTIONS[name](sizes, dtype, true)
  local x, o = draw(sizes, dtype, true), { grad_outputs = { draw(sizes, dtype) } }
  local inputs = { x, gain, bias }
  return function() return lac.grad(f(x), inputs, o) end
end

function KINDS.binary(name, sizes, dtype)
  local f, x, y = lac[name], draw(sizes, dtype), draw(sizes, dtype)
  return function() return f(x, y) end
end

-- `copies` calls of what `make` prepares, as one
local function cycle(copies, make)
  local calls = {}
  for i = 1, copies do calls[i] = make() end
  return function()
    for i = 1, copies do calls[i]() end
  end
end

local function copies_for(b, bytes) return b:size(math.max(1, math.ceil(BEYOND / bytes)), 1) end

local function measured(b, what, bytes, copies, make, case, arguments)
  arguments.copies = copies
  lac.scope(function()
    b:row{ what = what, ours = cycle(copies, make), work = copies * bytes, unit = "B/s", floor = "copy",
      share = SHARE, peer = { script = "large", case = case, arguments = arguments }, at_least = 1 }
  end)
end

local function operator(b, kind, name, sizes, dtype, tensors)
  local bytes = tensors * sizes[1] * sizes[2] * (dtype == "f32" and 4 or 2)
  local what = ("%s%s [%d, %d] %s"):format(name, kind == "forward" and "" or kind == "binary" and ""
    or ", " .. kind, sizes[1], sizes[2], dtype)
  measured(b, what, bytes, copies_for(b, bytes), function() return KINDS[kind](name, sizes, dtype) end, kind,
    { name = name, sizes = sizes, dtype = dtype })
end

local function operators(b, sizes, dtype)
  local function row(...) operator(b, ...) end
  row("binary", "add", sizes, dtype, 3)
  row("binary", "mul", sizes, dtype, 3)
  for _, name in ipairs{ "exp", "silu", "gelu" } do row("forward", name, sizes, dtype, 2) end
  row("backward", "gelu", sizes, dtype, 3)
  row("both", "gelu", sizes, dtype, 5)
  for _, name in ipairs(REDUCTIONS) do row("forward", name, sizes, dtype, 1) end
  for _, name in ipairs{ "softmax", "layernorm", "gelu_norm", "rmsnorm" } do
    row("forward", name, sizes, dtype, 2)
    row("backward", name, sizes, dtype, 3)
    row("both", name, sizes, dtype, 5)
  end
end

local function rotation(b, dtype)
  local n = b:size(32768, 16)
  local bytes = 2 * n * 12 * 64 * (dtype == "f32" and 4 or 2)
  local copies = copies_for(b, bytes)
  lac.scope(function()
    b:row{ what = ("rope [1, %d, 12, 64] %s"):format(n, dtype), work = copies * bytes, unit = "B/s",
      ours = cycle(copies, function()
        local x = draw({ 1, n, 12, 64 }, dtype)
        return function() return lac.rope(x) end
      end), floor = "copy", as = "share", at_least = SHARE }
  end)
end

local function losses(b, dtype)
  local rows, classes = b:size(4096, 16), b:size(50304, 64)
  local bytes = rows * classes * (dtype == "f32" and 4 or 2)
  for _, gradient in ipairs{ false, true } do
    local what = ("cross_entropy%s [%d, %d] %s"):format(gradient and ", both" or "", rows, classes, dtype)
    local traffic = bytes * (gradient and 3 or 1)
    measured(b, what, traffic, copies_for(b, traffic), function()
      local x, target = draw({ rows, classes }, dtype, gradient), lac.randint{ rows, low = 0, high = classes }
      if not gradient then return function() return lac.cross_entropy(x, target) end end
      return function() return lac.grad(lac.cross_entropy(x, target), { x }) end
    end, "cross_entropy", { rows = rows, classes = classes, dtype = dtype, gradient = gradient })
  end
end

-- the fused form beside the product and the loss apart: time, and memory beyond x, w and their gradients
local function projected(b)
  local rows, width, classes = b:size(32768, 16), b:size(768, 8), b:size(50304, 64)
  local x, w = draw({ rows, width }, "bf16", true), draw({ classes, width }, "bf16", true)
  local target = lac.randint{ rows, low = 0, high = classes }
  local function run() return lac.grad(lac.linear_cross_entropy(x, w, nil, target), { x, w }) end
  local what = ("linear_cross_entropy, both [%d, %d] x %d bf16"):format(rows, width, classes)
  b:row{ what = what, ours = run, work = 6 * rows * width * classes, unit = "FLOP/s", at_least = 1,
    peer = { script = "large", case = "projected_loss", arguments = { rows = rows, width = width,
      classes = classes } } }
  local extra = bench.peak(function() lac.scope(run) end) - 2 * (x:numel() + w:numel())
  b:value{ what = "  its memory, of one copy of all logits", value = 100 * extra / (2 * rows * classes),
    unit = "%", at_most = 50 }
end

-- the parameters of LongNet-125M; PyTorch has no f32 masters, so both dtypes stand beside its f32
local function parameter_sizes(b)
  local width, list = b:size(768, 8), {}
  local function add(...) list[#list + 1] = { ... } end
  add(b:size(50304, 32), width)
  for _ = 1, b:size(12, 1) do
    for _ = 1, 4 do
      add(width, width)
      add(width)
    end
    add(4 * width, width)
    add(4 * width)
    add(width, 4 * width)
    for _ = 1, 7 do add(width) end
    add(4 * width)
    add(4 * width)
  end
  return list
end

local function optimizer(b, dtype)
  local sizes, total, list = parameter_sizes(b), 0, {}
  lac.scope(function()
    for i, s in ipairs(sizes) do
      list[i] = draw(s, dtype, true)
      list[i].grad = draw(s, dtype)
      total = total + list[i]:numel()
    end
    local o = lac.optim.adamw(list, { lr = 1e-4, weight_decay = 0.01, master = dtype ~= "f32" })
    b:row{ what = ("AdamW, %d parameters in %d tensors, %s"):format(total, #list, dtype),
      ours = function() o:step() end, work = 28 * total, unit = "B/s", floor = "copy", share = SHARE,
      peer = { script = "large", case = "adamw", arguments = { sizes = sizes } }, at_least = 1 }
  end)
end

return {
  name = "cuda_memory",
  about = "operators that memory bounds, in turns with a copy and with PyTorch",
  device = "cuda",
  once = true,
  run = function(b)
    local copy, bytes = b:floor("copy")
    b:row{ what = ("copy of %.3g MiB"):format(bytes / 2 ^ 21), ours = copy, work = bytes, unit = "B/s",
      at_least = 0.97, peer = { script = "large", case = "copy", arguments = { elements = bytes / 8 } } }
    for _, dtype in ipairs{ "bf16", "f32" } do
      for _, width in ipairs(b:size({ 768, 3072 }, { 16 })) do
        operators(b, { b:size(32768, 16), width }, dtype)
      end
      rotation(b, dtype)
      losses(b, dtype)
      optimizer(b, dtype)
    end
    lac.scope(projected, b)
  end,
}
