--- Block sparsity as variants: a pattern of blocks (masks.lua) on top of any other variant.
--
-- The pattern is given as a value, masks.local_window(512) + masks.global_tokens(64), or as the text that
-- such a value prints, and kept as text: so a configuration prints, compares and goes to a checkpoint like
-- any other. Text is an expression of the pattern constructors and of nothing else; it cannot call, loop or
-- read anything. A pattern of one's own (masks.rule) has no such text: make a variant of it with build and
-- run as here.
--
-- "adaptive" has no pattern but a scorer that reads q and k (nn.AdaptiveBlocks) and says for every call which
-- blocks are active; that of "learned" has a score for each cell of a head (nn.LearnedBlocks). It is `scorer`
-- of the object; a module that contains the attention has the scorer as a child, which trains, copies and
-- saves it.

local schema = require "lacuna.schema"
local device = require "lacuna.device"
local masks = require "lacuna.attention.masks"

local fail = schema.fail
local OP = "attention"

local sparse = {}

-- what a text may name, and the environment in which it is evaluated
local CONSTRUCTORS = { "axial", "diagonal", "dilated_sparse", "full", "global_local", "global_tokens",
  "hierarchical", "local_window", "per_head", "random" }
local scope = {}
for _, name in ipairs(CONSTRUCTORS) do scope[name] = masks[name] end
setmetatable(scope, { __index = function(_, name) schema.unknown(OP, "pattern", name, CONSTRUCTORS) end })

-- a message without who says it and where: the line of the caller comes at the end
local function reason(message)
  return (tostring(message):gsub(" %[[^%]]*%]$", ""):gsub("^%a+:%d*:? ", ""))
end

--- The pattern of a text.
function sparse.parse(text)
  local plain = text:find "^[%w_%s%(%){},=%.%+%-%*]+$" and not text:find "function"
  local chunk, why
  if plain then chunk, why = loadstring("return " .. text, "=pattern") end
  local ok, pattern = false, why
  if chunk then
    setfenv(chunk, scope)
    ok, pattern = pcall(chunk)
  end
  if not ok or not masks.is(pattern) then
    fail(OP, "pattern must be an expression of block patterns, such as "
      .. "'local_window(512) + global_tokens(64)', got %s%s", schema.show(text),
      not ok and pattern and "; " .. reason(pattern) or "")
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
function sparse.settle(o)
  o.pattern = tostring(o.pattern)
  sparse.parse(o.pattern)
  return o
end

local function scored(own)
  local rules = {
    of = sparse.options.of, block = sparse.options.block,
    keep = { type = "integer", min = 1, default = 4 },
    temperature = { type = "number", above = 0, default = 1 },
    noise = { type = "boolean", default = false }, soft = { type = "boolean", default = false },
    dtype = { type = "string" }, device = { type = "string" },
  }
  for name, rule in pairs(own) do rules[name] = rule end
  return rules
end

sparse.adaptive_options = scored {
  head_dim = { type = "integer", min = 1, required = true },
  hidden = { type = "integer", min = 1, default = 32 }, rank = { type = "integer", min = 1, default = 16 },
}
sparse.learned_options = scored {
  length = { type = "integer", min = 1, required = true }, noise = { type = "boolean", default = true },
}

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

--- The most that "adaptive" keeps, whatever the contents; for explain.
function sparse.most(module, n, m, head_dim)
  local full, z = masks.full(), sparse.sizes(module, n, m)
  local s, keep = full:statistics(z), 0
  for _, row in ipairs(full:cells(z)[1]) do
    local open = 0
    for _, on in ipairs(row) do open = open + (on and 1 or 0) end
    keep = keep + math.min(module.scorer.keep, open)
  end
  local share = s.active > 0 and keep / s.active or 0
  s.active, s.density, s.pairs = keep, share * s.density, math.ceil(share * s.pairs)
  s.flops_forward, s.flops_backward = 4 * head_dim * s.pairs, 10 * head_dim * s.pairs
  return s
end

local function copy_of(run)
  local call = {}
  for name, value in pairs(run) do call[name] = value end
  return call
end

--- The options of a call with the active blocks of the pattern (record.prepare).
function sparse.prepare(module, q, k, run)
  local call, z = copy_of(run), sparse.sizes(module, q:size(2), k:size(2))
  z.device = device.name(q.c.device)
  call.block_mask, call.block = pattern_of(module):cached(z), module.options.block
  return call
end

--- The options of a call with the blocks that the scorer keeps, and with its bias where scores have to train.
function sparse.prepare_adaptive(module, q, k, run)
  local call, p = copy_of(run), module.pattern
  local chosen = module.scorer:choose(q, k, { causal = p.causal, align = p.align, training = run.training,
    key_padding = run.key_padding, key_lengths = run.key_lengths })
  call.block_mask, call.block = chosen.block_mask, module.options.block
  if chosen.bias then
    local sums = q:dtype() == "f64" and "f64" or "f32" -- a bias may be of either
    call.bias = run.bias and run.bias:to(sums) + chosen.bias:to(sums) or chosen.bias
  end
  return call
end

-- what a learned pattern has become, for a number of positions
local function learned(module, n, m)
  return module.scorer:pattern { n = n, m = m, causal = module.pattern.causal, align = module.pattern.align }
end

--- Statistics and cells of what "learned" keeps now; for explain.
function sparse.learned_statistics(module, n, m, head_dim)
  local pattern, z = learned(module, n, m), sparse.sizes(module, n, m)
  local cells = pattern:cells(z)
  z.head_dim = head_dim
  return pattern:statistics(z), cells
end

--- @tparam table decoders of decode_blocks.lua
-- @treturn table sparse, with what decodes a module row by row (record.decoder)
return function(decoders)
  function sparse.decoder(module, head_dim) return decoders.blocks(module, pattern_of(module), head_dim) end
  sparse.adaptive_decoder = decoders.adaptive
  function sparse.learned_decoder(module, head_dim)
    if module.scorer.soft then
      fail(OP, "variant 'learned' cannot be decoded row by row with soft = true: its weights are biases")
    end
    local n = module.options.length
    return decoders.blocks(module, learned(module, n, n), head_dim)
  end
  return sparse
end
