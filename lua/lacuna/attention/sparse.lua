--- Block sparsity as variants: a pattern of blocks (masks.lua) on top of any other variant.
--
-- The pattern is given as a value, masks.local_window(512) + masks.global_tokens(64), or as the text that
-- such a value prints, and kept as text: so a configuration prints, compares and goes to a checkpoint like
-- any other. Text is an expression of the pattern constructors and of nothing else; it cannot call, loop or
-- read anything. A pattern of one's own (masks.rule) has no such text: make a variant of it with build and
-- run as here.

local schema = require "lacuna.schema"
local device = require "lacuna.device"
local masks = require "lacuna.attention.masks"

local fail = schema.fail
local OP = "attention"

local sparse = {}

--- The pattern of a text.
function sparse.parse(text)
  local plain = text:find "^[%w_%s%(%){},=%.%+%-%*]+$" and not text:find "function"
  local chunk = plain and loadstring("return " .. text)
  local ok, pattern = false, nil
  if chunk then
    setfenv(chunk, setmetatable({}, { __index = function(_, name) return rawget(masks, name) end }))
    ok, pattern = pcall(chunk)
  end
  if not ok or not masks.is(pattern) then
    fail(OP, "pattern must be an expression of block patterns, such as "
      .. "'local_window(512) + global_tokens(64)', got %s", schema.show(text))
  end
  return pattern
end

sparse.options = {
  of = { type = "string", default = "dense" },
  block = { type = "integer", min = 16, default = 128 },
  pattern = { required = true, check = function(p)
    if type(p) ~= "string" and not masks.is(p) then return "must be a block pattern or its text" end
  end },
}

--- What a record's build does with the pattern: checks it and leaves its text in the options.
function sparse.settle(o, pattern)
  o.pattern = tostring(pattern)
  sparse.parse(o.pattern)
end

-- the pattern of a module, made once
local function pattern_of(module)
  local p = rawget(module, "blocks")
  if not p then
    p = sparse.parse(module.options.pattern)
    rawset(module, "blocks", p)
  end
  return p
end

--- Sizes for a pattern. @tparam integer n @tparam integer m
function sparse.sizes(module, n, m)
  return { n = n, m = m, heads = module.options.heads, block = module.options.block,
    causal = module.pattern.causal, align = module.pattern.align }
end

--- Statistics, and cells [heads or 1][i][j], of a module's pattern; for explain.
function sparse.statistics(module, n, m, head_dim)
  local z = sparse.sizes(module, n, m)
  local cells = pattern_of(module):cells(z)
  z.head_dim = head_dim
  return pattern_of(module):statistics(z), cells
end

--- @tparam table core of attention
-- @treturn table sparse, with run
return function(core)
  --- out, lse of the active blocks (record.run of the variant).
  function sparse.run(module, q, k, v, run)
    local call = {}
    for name, value in pairs(run) do call[name] = value end
    local z = sparse.sizes(module, q:size(2), k:size(2))
    z.device = device.name(q.c.device)
    call.block_mask, call.block = pattern_of(module):cached(z), module.options.block
    call.return_lse, call.need_weights = true, false
    return core.apply(module.pattern, module.key, q, k, v, call)
  end
  return sparse
end
