--- Every option with every variant: does it act, or is it refused? Found out by trying.
--
-- A cell makes the variant twice, without and with the option, runs both on the same small tensors, forward
-- and backward, and compares out, lse and gradients. "acts": something differs. "refused": an error says so.
-- "ignored" would be a defect: the suite fails on it, and `lacuna variants` prints this very table. So it
-- cannot claim what is not so, and a variant that a script registers is judged like the others.
--
-- A probe is {option, make = options of the object, call = options of the call, sizes, base = options that
-- both sides have}; `forward`: only a forward pass without gradients, in bf16; with `module` it tries nn's
-- multi-head module, whose options these are then, with the same numbers in the parameters of either side.
-- `unprobed` names the options of plans and calls without a probe, so that the suite notices a new one.
-- Rejected: a table written by hand.

local schema = require "lacuna.schema"
local create = require "lacuna.create"
local grad = require "lacuna.grad"

local H, N, D = 4, 12, 2

local function values(shape, seed, dtype) -- numbers that do not disturb the global stream
  local n, x, list = 1, seed, {}
  for i = 1, #shape do n = n * shape[i] end
  for i = 1, n do
    x = (x * 16807) % 2147483647
    list[i] = x / 2147483647 * 2 - 1
  end
  return create.tensor(list, { dtype = dtype or "f64", shape = shape })
end

local function flags(shape, step) -- every step-th is false
  local n, list = 1, {}
  for i = 1, #shape do n = n * shape[i] end
  for i = 1, n do list[i] = i % step ~= 0 end
  return create.tensor(list, { dtype = "bool", shape = shape })
end

-- option -> probe; functions make tensors when they are needed
local PROBES = {
  { "segments", make = { segments = { 6, 12 } } },
  { "dilations", make = { dilations = { 1, 3 } } },
  { "scheme", make = { scheme = "split" } },
  { "offset", make = { offset = "block" } },
  { "merge = lse_detach", make = { merge = "lse_detach" } },
  { "merge = sum", make = { merge = "sum" } },
  { "causal", make = { causal = true } },
  { "window", make = { window = 2 } },
  { "scale", make = { scale = 2 } },
  { "dedup", make = { dedup = true } },
  { "dropout", make = { dropout = 0.5 } },
  { "kv_heads (grouped queries)", make = { kv_heads = 2 }, sizes = { kv_heads = 2 } },
  { "N != M", sizes = { m = 9 } },
  { "align", base = { causal = true }, make = { align = "end" }, sizes = { n = 7 }, both = true },
  { "key_padding", call = { key_padding = function() return flags({ 1, N }, 5) end } },
  { "key_lengths", call = { key_lengths = function() return create.tensor({ 7 }, { dtype = "i64" }) end } },
  { "kernel = hopper", make = { kernel = "hopper" } }, -- never for f64, so it must be refused
  { "fp8", make = { fp8 = true }, forward = true }, -- no gradients, no f64, on cuda only 16 bits
  { "mask", call = { mask = function() return flags({ N, N }, 3) end } },
  { "bias", call = { bias = function() return values({ N, N }, 9) end } },
  { "alibi", call = { alibi = function() return true end } },
  { "block_mask", call = { block_mask = function() return flags({ 1, 1, 1 }, 1) end } },
  { "cu_seqlens (packed)", call = { cu_seqlens = function()
    return create.tensor({ 0, 5, N }, { dtype = "i64" })
  end } },
  { "return_lse", make = { return_lse = false } },
  { "need_weights", call = { need_weights = function() return true end } },
  { "positions = rope", module = { positions = "rope" } },
  { "positions = xpos", module = { positions = "xpos", xpos_base = 8 } },
  { "positions = alibi", module = { positions = "alibi" } },
  { "is_causal", module = {}, call = { is_causal = function() return true end } },
  { "key_padding_mask", module = {}, call = { key_padding_mask = function() return flags({ 1, N }, 5) end } },
  { "attn_mask", module = {}, call = { attn_mask = function() return flags({ N, N }, 3) end } },
  { "add_bias_kv", module = { add_bias_kv = true } },
  { "add_zero_attn", module = { add_zero_attn = true } },
}

-- named otherwise above, or part of another option
local IMPLIED = { heads = "scheme", block = "block_mask", training = "dropout" }

local function merged(...)
  local all = {}
  for i = 1, select("#", ...) do
    for key, value in pairs((select(i, ...)) or {}) do all[key] = value end
  end
  return all
end

-- what a forward pass without gradients gives in bf16, as a list of tensors
local function forward_signature(attention, options)
  local function input(seed) return values({ 1, N, H, 4 * D }, seed, "bf16") end
  return grad.no_grad(function() return { attention(options)(input(11), input(12), input(13)) } end)
end

-- everything that an option could change, as a list of tensors
local function signature(attention, options, sizes, call)
  local attn = attention(options)
  local made = {}
  for name, make in pairs(call or {}) do made[name] = make() end
  local n, kv = sizes.n or N, sizes.kv_heads or H
  local q = values({ 1, n, H, D }, 11):requires_grad_(true)
  local k = values({ 1, sizes.m or N, kv, D }, 12):requires_grad_(true)
  local v = values({ 1, sizes.m or N, kv, D }, 13):requires_grad_(true)
  local results = { attn(q, k, v, made) }
  local list = grad.grad({ results[1] }, { q, k, v }, { grad_outputs = { values({ 1, n, H, D }, 14) } })
  for _, t in ipairs(results) do list[#list + 1] = t end
  return list
end

-- the same of the multi-head module; `like`: a module whose parameters it takes over
local function module_signature(attention, options, call, like)
  local m = attention.multihead(merged(options, { embed_dim = H * D, dtype = "f64" })):eval()
  local mine, given = m:state_dict(), {}
  for name, t in pairs(like and like:state_dict() or {}) do mine[name] = t end
  m:load_state_dict(mine)
  for name, make in pairs(call or {}) do given[name] = make() end
  local x = values({ 1, N, H * D }, 15):requires_grad_(true)
  local out = m(x, x, x, given)
  return { out, grad.grad({ out }, { x }, { grad_outputs = { values({ 1, N, H * D }, 16) } })[1] }, m
end

local function differ(a, b)
  if #a ~= #b then return true end
  for i = 1, #a do
    local same = tostring(a[i]:size()) == tostring(b[i]:size()) and a[i]:detach():equal(b[i]:detach())
    if not same then return true end
  end
  return false
end

-- the error without where it happened and without lists of names
local function reason(message)
  return (tostring(message):gsub("^attention: ", ""):gsub(" %[[^%[%]]*%]$", ""):gsub(";? valid: .*$", ""))
end

-- signatures without and with the option; ok is false where the latter is refused
local function both_sides(attention, base, probe)
  create.manual_seed(1)
  if probe.module then
    local without, like = module_signature(attention, base)
    return without, pcall(module_signature, attention, merged(base, probe.module), probe.call, like)
  end
  if probe.forward then
    base = merged(base, base.dtype and { dtype = "bf16", head_dim = base.head_dim and 4 * D }) -- a scorer's
    return forward_signature(attention, base), pcall(forward_signature, attention, merged(base, probe.make))
  end
  local plain = merged(base, probe.base)
  local without = signature(attention, plain, probe.both and probe.sizes or {}, nil)
  create.manual_seed(1)
  return without, pcall(signature, attention, merged(plain, probe.make), probe.sizes or {}, probe.call)
end

local function cell(attention, base, probe)
  local seed, offset = create.rng_state() -- dropout may draw, a scorer begins at random: nobody should notice
  local without, ok, with = both_sides(attention, base, probe)
  create.set_rng_state(seed, offset)
  if not ok then return { outcome = "refused", reason = reason(with) } end
  return { outcome = differ(without, with) and "acts" or "ignored" }
end

-- ---- as text ------------------------------------------------------------------------------------------

local MARK = { acts = "+", refused = "-", ignored = "IGNORED" }

local function text(matrix)
  local lines, widths, reasons, seen = {}, {}, {}, {}
  local head = ("%-28s"):format("option")
  for i, variant in ipairs(matrix.variants) do
    widths[i] = math.max(#variant, 7) + 1
    head = head .. ("%" .. widths[i] .. "s"):format(variant)
  end
  lines[1] = head
  for _, option in ipairs(matrix.options) do
    local line = ("%-28s"):format(option)
    for i, variant in ipairs(matrix.variants) do
      local c = matrix.cells[option][variant]
      line = line .. ("%" .. widths[i] .. "s"):format(MARK[c.outcome])
      if c.reason and not seen[c.reason] then
        seen[c.reason] = true
        reasons[#reasons + 1] = ("  %s, %s: %s"):format(variant, option, c.reason)
      end
    end
    lines[#lines + 1] = line
  end
  lines[#lines + 1] = "\n+ tried, and acts    - refused, with these words:"
  return table.concat(lines, "\n") .. "\n" .. table.concat(reasons, "\n")
end

local Matrix = { __tostring = text }

-- options with which a variant can be made at all
local function base_of(record, name)
  local o = { variant = name, heads = H, segments = { 4, 12 }, dilations = { 1, 2 } }
  if record.bare then o.segments, o.dilations = nil, nil end
  for key, value in pairs(record.example or {}) do o[key] = value end
  return o
end

-- options of the specs that no probe tries
local function unprobed(specs)
  local tried, list = {}, {}
  for _, probe in ipairs(PROBES) do
    for _, options in ipairs { probe.make or {}, probe.call or {}, probe.base or {} } do
      for name in pairs(options) do tried[name] = true end
    end
  end
  for _, spec in ipairs(specs) do
    for name in pairs(spec) do
      if not tried[name] and not IMPLIED[name] then list[#list + 1] = name end
    end
  end
  table.sort(list)
  return list
end

--- @tparam table attention lac.attention; its `multihead` is the layer above's module
-- @tparam table specs the schemas of plans and of calls
-- @treturn function matrix(names): every option with the named variants (default all)
return function(attention, specs)
  --- Try every option with every variant.
  -- @tparam[opt] table names of variants; default all that are registered
  -- @treturn table variants, options, unprobed (lists of names), cells[option][variant] = {outcome = "acts",
  --   "refused" or "ignored", reason}; tostring() is the table that `lacuna variants` prints
  return function(names)
    if names ~= nil then schema.check("matrix", "names", names, { type = "table" }) end
    local matrix = { variants = names or attention.variants:names(), options = {}, cells = {},
      unprobed = unprobed(specs) }
    for i, probe in ipairs(PROBES) do
      local option = probe[1]
      matrix.options[i], matrix.cells[option] = option, {}
      for _, name in ipairs(matrix.variants) do
        matrix.cells[option][name] = cell(attention, base_of(attention.variants:get(name), name), probe)
      end
    end
    return setmetatable(matrix, Matrix)
  end
end
