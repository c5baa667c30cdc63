--- The module form of attention: lac.attention{ variant = ..., ... }.
--
-- An object with a validated configuration (`options`), the pattern that its variant makes of it, and the
-- mode (training or not). Calling it runs the variant: for most, the pattern's plan in one engine call; a
-- variant whose record has `run` (ring) executes itself over the same core. Everything that can be wrong
-- about a configuration is found when the object is made. The core (options, plans, the operator) is in
-- init.lua and comes in as an argument, so that requires point one way.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local class = require "lacuna.class"
local tensor = require "lacuna.tensor"
local config = require "lacuna.config"
local device = require "lacuna.device"
local explain = require "lacuna.attention.explain"

local C = lib.C
local fail, show = schema.fail, schema.show
local expect = tensor.expect
local OP = "attention"
local REMEDY = "lac.attention(a.options:with{ %s })"

local core -- what init.lua has: variants (a Registry), specs, plans, apply
local module_rules, call_rules

local Attention = class("Attention", nil, true)
schema.refuse_new_fields(Attention, function(self, key)
  local option = self.options[key] ~= nil
  if not option and key ~= "options" and key ~= "pattern" then return "" end
  return ("; make another: lac.attention(a.options:with{ %s = ... })"):format(option and key or "option")
end, "variant record pattern reason options key")

-- neither the options nor the pattern that they were made into have been written to
local function expect_settled(self)
  config.expect_settled(self.options)
  config.expect_settled(self.pattern)
end

-- `heads` is a number here, the scheme belongs to the variant
local function make_rules()
  module_rules = core.merged_spec(core.pattern_spec, core.run_spec)
  call_rules = core.merged_spec(core.run_spec)
  module_rules.heads = { type = "integer", min = 1, required = true }
  module_rules.kv_heads = { type = "integer", min = 1 }
  module_rules.variant = { type = "any", required = true }
  module_rules.segments = { type = "integers", min = 1 }
  module_rules.dilations = { type = "integers", min = 1 }
  for name, rule in pairs(core.run_spec) do -- tensors belong to a call
    if rule.type == "tensor" or rule.of_a_call then module_rules[name] = nil end
  end
  module_rules.training = nil
end

-- options of a variant and of the variants that it builds on
local function own_rules(name, given)
  local variant = core.variants:get(name)
  local rules = {}
  for key, rule in pairs(variant.options or {}) do rules[key] = rule end
  local inner = rules.of and (given.of or rules.of.default)
  for key, rule in pairs(inner and own_rules(inner, {}) or {}) do rules[key] = rules[key] or rule end
  return rules, variant
end

local function check_heads(o)
  o.kv_heads = o.kv_heads or o.heads
  if o.heads % o.kv_heads ~= 0 then
    fail(OP, "heads must be a multiple of kv_heads: %d %% %d = %d", o.heads, o.kv_heads, o.heads % o.kv_heads)
  end
end

-- options of the user -> configuration, pattern, record, reasons for explain()
local function configure(options)
  schema.expect_options(OP, options)
  if options.variant == nil then
    fail(OP, "variant is required; valid: %s", table.concat(core.variants:names(), ", "))
  end
  local rules, variant = own_rules(options.variant, options)
  for name, rule in pairs(module_rules) do rules[name] = rules[name] or rule end
  core.refuse_unknown(options)
  local o = schema.options(OP, options, rules)
  check_heads(o)
  local pattern, reason = variant.build(o, fail)
  if type(pattern) ~= "table" then
    fail(OP, "build of variant '%s' must return a table of segments, dilations, heads, offset and merge, "
      .. "got %s", options.variant, show(pattern))
  end
  for _, name in ipairs { "causal", "dedup", "align", "window" } do
    if pattern[name] == nil then pattern[name] = o[name] end
  end
  return o, core.complete(schema.options(OP, pattern, core.pattern_spec)), variant, reason
end

--- Attention of a named variant, as an object with one configuration.
-- @tparam table options variant (below); heads H, kv_heads = H; segments and dilations, lists of one length,
--   unless the variant needs none; offset, merge and others where the variant leaves a choice, as in
--   lac.attend; what only the variant takes: `lacuna variants` lists it, and so does an error
-- @treturn Attention attn(q, k, v, options), q [B, N, H, D], k and v [B, M, kv_heads, D], gives out
--   [B, N, H, D] and lse [B, N, H] (options of a call: key_padding, key_lengths, dropout, training,
--   need_weights, return_lse and the others of lac.attend that shape no plan); attn:explain(N) says what it
--   costs; attn:train(), attn:eval(); attn.options:with{ causal = true } are options for another object
-- @usage
--     local attn = lac.attention{ variant = "longnet", heads = 4, segments = { 16, 64 },
--                                 dilations = { 1, 4 } }
--     local q, k, v = lac.randn{ 1, 64, 4, 16 }, lac.randn{ 1, 64, 4, 16 }, lac.randn{ 1, 64, 4, 16 }
--     local out, lse = attn(q, k, v)
--     print(out, lse, attn:explain(64))
function Attention:init(options)
  local o, pattern, variant, reason = configure(options)
  self.variant, self.record, self.pattern, self.reason = options.variant, variant, pattern, reason or false
  self.options = config.settle(OP, "options", config.wrap("attention", o), REMEDY)
  config.settle(OP, "pattern", pattern, REMEDY)
  self.key = core.pattern_key(pattern)
  self.training = true
  if variant.scorer then self.scorer = variant.scorer(o) end
  -- every mistake in the configuration is found now, not at the first call
  core.plan_for(pattern, self.key, 1, 1, 1, o.heads, o.kv_heads, 1)
  schema.complete(self)
end

--- Another object of the same configuration and mode, with a copy of the scorer if there is one.
function Attention:clone()
  local copy = Attention(self.options):train(self.training)
  if self.record.scorer then copy.scorer = self.scorer:clone() end
  return copy
end

--- Switch dropout on (default) or off; returns self.
function Attention:train(on)
  if on == nil then on = true end
  if type(on) ~= "boolean" then fail(OP, "train takes true or false, got %s", show(on)) end
  self.training = on
  return self
end

--- Switch dropout off; returns self.
function Attention:eval() return self:train(false) end

local function check_input_heads(o, q, k)
  expect(OP, "q", q)
  expect(OP, "k", k)
  if q.c.ndim == 4 and q.c.shape[2] ~= o.heads then
    fail(OP, "q has %d heads, the module has %d: q is %s", tonumber(q.c.shape[2]), o.heads, show(q))
  end
  if k.c.ndim == 4 and k.c.shape[2] ~= o.kv_heads then
    fail(OP, "k has %d heads, the module has kv_heads = %d: k is %s",
         tonumber(k.c.shape[2]), o.kv_heads, show(k))
  end
end

--- Run it. @tparam Tensor q [B, N, H, D] @tparam Tensor k [B, M, Hk, D] @tparam Tensor v like k
-- @tparam[opt] table options those of a call of lac.attend: key_padding, key_lengths, scale, dropout,
--   training, need_weights, return_lse
-- @treturn Tensor out [B, N, H, D] @treturn Tensor lse [B, N, H] unless return_lse = false, then weights if
--   asked for
function Attention:__call(q, k, v, options)
  local o = self.options
  expect_settled(self)
  if type(self.training) ~= "boolean" then
    fail(OP, "training must be true or false, it was set to %s", show(self.training))
  end
  local run = { training = self.training }
  for name in pairs(core.run_spec) do
    if run[name] == nil then run[name] = o[name] end
  end
  if options ~= nil then
    schema.expect_options(OP, options)
    core.refuse_unknown(options)
    local given = schema.options(OP, options, call_rules)
    core.check_block(given)
    for name in pairs(options) do run[name] = given[name] end
  end
  check_input_heads(o, q, k)
  local record = self.record
  return core.apply(self.pattern, self.key, q, k, v, run, (record.run or record.prepare) and self or nil)
end
lib.frame_name(Attention.__call, function(self)
  return "attention(" .. tostring(schema.own_field(self, "variant")) .. ")"
end)

--- Does it run in active blocks? Variants in shards do if they were given a pattern.
function Attention:in_blocks()
  local record = self.record
  return record.blocks ~= nil and (not record.sharding or self.options.pattern ~= nil)
end

--- What decodes row by row what this computes at once: see lac.attention.decoder; with active blocks see
-- decode_blocks.lua.
-- @tparam integer head_dim
function Attention:decoder(head_dim)
  expect_settled(self)
  local o, record = self.options, self.record
  if not self.pattern.causal then
    fail(OP, "only causal attention can be decoded row by row; make %s with causal = true", self.variant)
  end
  local blocks = self:in_blocks()
  if blocks and not record.decoder then
    fail(OP, "variant '%s' cannot be decoded row by row: which blocks it keeps depends on all of them",
         self.variant)
  end
  if o.kernel ~= "auto" then
    fail(OP, "decoding has one kernel: kernel = '%s' cannot be honoured", o.kernel)
  end
  if o.fp8 then fail(OP, "decoding has no fp8: make %s without it", self.variant) end
  if blocks then return record.decoder(self, head_dim) end
  local pattern = {}
  for name, value in pairs(self.pattern) do pattern[name] = value end
  pattern.scale, pattern.alibi = o.scale, o.alibi
  return core.decoder(pattern, { heads = o.heads, kv_heads = o.kv_heads, head_dim = head_dim })
end

local CPU = "tiles in %s, %s sums, %d threads"
-- the kernel of a GPU, as far as it does not depend on the call; refusal: why it is not the one for Hopper;
-- behind: why not in the backward
local function choice_of(kernel, refusal, in_blocks, behind)
  if kernel == "portable" then return "portable (chosen)" end
  local some = (in_blocks or behind) and " with padding, dropout or options of pairs," or ""
  if kernel == "hopper" then
    if refusal then return "hopper (chosen) fails: " .. refusal end
    return "hopper (chosen), an error" .. some .. " on other GPUs"
      .. (behind and " and backward: " .. behind or "")
  end
  if refusal and behind then return "portable: " .. refusal end
  local there = "hopper on a Hopper GPU" .. (in_blocks and ";" .. some or ", with a bias' gradient")
    .. " and on others portable"
  if refusal then return "forward portable (" .. refusal .. "); backward " .. there end
  if behind then
    return "forward hopper on a Hopper GPU; backward (" .. behind .. ")," .. some .. " and on others portable"
  end
  return there
end

-- what multiplies f32 on a GPU (kernels/attn.cu); with little shared memory multiply-adds
local WIDEST = 128 -- head dimension of f32 in parts (kernels/attn_parts_forward.cu), and of fp8
local function wide_of(dtype, head_dim)
  if dtype == C.LAC_F64 then return "multiply-adds of f64" end
  if device.use_tf32() then return "tensor cores, TF32" end
  if head_dim > WIDEST then return "multiply-adds of f32" end
  return "tensor cores, f32 in three parts of bf16 where shared memory holds their tiles", true
end

local FEW = 4 -- rows that kernels/attn_few.cu takes

-- which arithmetic runs for this dtype, and which kernel; a GPU may be asked about where there is none; isa:
-- the CPU's
local function kernel_of(z, dtype, kernel, refusal, n, fp8, isa, in_blocks, behind)
  local name = z.device
  if fp8 and dtype == C.LAC_F64 then return "fp8 fails: it takes f32, f16 or bf16" end
  if fp8 and (name or device.default_device()):find "^cuda" then
    if refusal then return "cuda: fp8 fails: " .. refusal end
    return "cuda: products of e4m3, f32 sums; hopper, an error on other GPUs and with "
      .. "padding, dropout or options of pairs"
  end
  if (name or device.default_device()):find "^cuda" then
    local half, choice = device.dtype_size[dtype] == 2, choice_of(kernel, refusal, in_blocks, behind)
    if n <= FEW and kernel == "auto" then
      return ("cuda: %s sums; %d rows: their keys in parts; with dropout, padding, key lengths or options of "
        .. "pairs and to be differentiated where branches have softmaxes of their own, portable"):format(
        half and "f32" or "f64", n)
    end
    if half then return "cuda: tensor cores, f32 sums; " .. choice end
    local wide, in_parts = wide_of(dtype, z.head_dim)
    if in_parts and kernel == "auto" then
      choice = refusal and choice or "by warpgroups on a Hopper GPU, without options of pairs and with rows "
        .. "aligned to 16 bytes, else portable"
    end
    return ("cuda: %s; %s"):format(wide, choice)
  end
  device.code(OP, name) -- refuses what is no device
  if kernel == "hopper" then return "cpu: kernel 'hopper' (chosen) fails: it is for cuda" end
  return "cpu: " .. (fp8 and "q, k and v rounded to e4m3, then " or "")
    .. CPU:format(isa, dtype == C.LAC_F64 and "f64" or "f32", device.threads())
end

-- ranks and bytes of K and V that travel, for a variant in shards
local function ring_of(self, n, m, row)
  if not self.record.sharding then return nil end
  local o, plan = self.options, self.record.sharding(self, n, m)
  local t = { ranks = o.ranks, layout = o.layout, schedule = plan.schedule, least = n, most = 0 }
  for _, pieces in ipairs(plan.queries) do
    local rows = 0
    for _, piece in ipairs(pieces) do rows = rows + piece.count end
    t.least, t.most = math.min(t.least, rows), math.max(t.most, rows)
  end
  t.bytes_ring, t.bytes_allgather = plan.traffic.ring * row, plan.traffic.allgather * row
  t.held_ring, t.held_allgather = plan.traffic.ring_held * row, plan.traffic.allgather_held * row
  return t
end

local function round_up(x, to) return math.ceil(x / to) * to end

-- bytes of the rounded copies on a GPU, as kernels/attn_hopper_fp8.cuh has them: rows of q and k; values of
-- each lattice
local function device_copies(t, p)
  local group, shift = t.heads / t.kv_heads, p.align == "end" and t.m - t.n or 0
  local rows = t.batch * (t.n * t.heads + t.m * t.kv_heads) * round_up(t.head_dim, 16)
  for _, s in ipairs(t.strips) do
    local items, w = s.heads, s.segment
    if s.dilation == 1 or p.offset == "branch" then -- one lattice for all heads
      items = math.floor((s.head0 + s.heads - 1) / group) - math.floor(s.head0 / group) + 1
    end
    local segments = math.floor((shift + t.n - 1) / w) + 1 - math.floor(math.max(shift, 0) / w)
    local keys = round_up(math.floor((math.min(w, t.m) - 1) / s.dilation) + 1, 16)
    rows = rows + t.batch * segments * items * t.head_dim * keys
  end
  return rows
end

-- bytes that fp8 takes while a call runs: scales for each head of each item, copies, on the CPU in f32
local function fp8_of(t, element, p, on_cuda)
  local scales = 4 * t.batch * (t.heads + 2 * t.kv_heads)
  if on_cuda then return { scales = 2 * scales, copies = device_copies(t, p), of = "e4m3" } end
  local out = t.batch * t.n * t.heads * t.head_dim
  local copies = (element < 4 and 2 or 1) * out + 2 * t.batch * t.m * t.kv_heads * t.head_dim
  return { scales = scales, copies = 4 * copies, of = "f32" }
end

-- why a plan, or a choice of kernel, has no fp8 on a GPU
local function fp8_refusal(plan, dtype, o, head_dim)
  if o.kernel == "portable" then return "kernel 'portable' has none" end
  return core.hopper_refusal(plan, dtype, "hopper") or head_dim > WIDEST and "head_dim is above 128"
    or o.alibi and "there are alibi slopes" or o.dropout > 0 and "there is dropout"
end

local EXPLAIN -- made at the first call: the core is not there yet

--- What the plan does at a length: strips, coverage by distance, pairs, FLOPs, bytes moved, memory, kernel
-- and, for variants in shards, traffic. lac.plot.coverage draws it.
-- @tparam integer n positions
-- @tparam[opt] table sizes batch (1), m (n), head_dim (64), dtype and device (the defaults); as = "text" |
--   "table"
-- @treturn string|table
function Attention:explain(n, sizes)
  expect_settled(self)
  schema.check(OP, "n", n == nil and false or n, core.sizes.n)
  EXPLAIN = EXPLAIN or { batch = core.sizes.batch, m = core.sizes.m, head_dim = core.sizes.head_dim,
    dtype = { type = "string" }, device = { type = "string" }, as = { one_of = { "text", "table" },
    default = "text" } }
  if type(sizes) == "table" and sizes.as == "plot" then
    fail(OP, "as is 'text' or 'table'; lac.plot.coverage(attn, n) draws the plot")
  end
  local z = schema.options(OP, sizes, EXPLAIN)
  local dtype = device.dtype(OP, z.dtype)
  if not device.is_float(dtype) then
    fail(OP, "dtype must be f64, f32, f16 or bf16, got '%s'", z.dtype)
  end
  local o, p, m = self.options, self.pattern, z.m or n
  local plan = core.plan_for(p, self.key, z.batch, n, m, o.heads, o.kv_heads, z.head_dim)
  local info = core.info_of(plan)
  local element = device.dtype_size[dtype]
  local branches = p.heads == "all" and (p.merge == "mean" or p.merge == "sum") and #p.segments or 1
  local in_blocks, blocks, cells = self:in_blocks(), nil, nil
  if in_blocks then
    blocks, cells = self.record.blocks(self, n, m, z.head_dim)
    if self.options.of == "dense" then -- else the strips' counts are an upper bound
      info.pairs = blocks.pairs
      info.flops_forward = z.batch * blocks.flops_forward
      info.flops_backward = z.batch * blocks.flops_backward
    end
  end
  local block = in_blocks and o.block
  info.workspace_forward, info.workspace_backward = core.workspace_of(plan, dtype, block)
  local t = explain.table(info, p, {
    batch = z.batch, n = n, m = m, heads = o.heads, kv_heads = o.kv_heads, head_dim = z.head_dim,
    element = element, lse = dtype == C.LAC_F64 and 8 or 4, softmaxes = branches > 1 and branches or 0,
    cells = cells, block = o.block,
  })
  t.blocks = blocks
  t.variant, t.causal, t.reason = self.variant, p.causal, self.reason or nil
  local refusal = core.hopper_refusal(plan, dtype, o.kernel, block)
  local behind = core.hopper_refusal(plan, dtype, o.kernel, block, true)
  if o.fp8 then refusal = fp8_refusal(plan, dtype, o, z.head_dim) or in_blocks and "there is a block_mask" end
  t.kernel = kernel_of(z, dtype, o.kernel, refusal or nil, n, o.fp8, core.isa_of(plan, dtype, block),
    in_blocks, behind)
  t.fp8 = o.fp8 and fp8_of(t, element, p, (z.device or device.default_device()):find "^cuda") or nil
  t.ring = ring_of(self, n, m, 2 * z.batch * z.head_dim * element)
  if z.as == "table" then return t end
  return explain.text(("%s at N = %d%s, batch %d, head_dim %d, %s"):format(
    tostring(self), n, m ~= n and (", M = %d"):format(m) or "", z.batch, z.head_dim,
    device.dtype_name[dtype]), t)
end

-- options that have a place of their own in the text, or are in the pattern
local SAID = { of = true, ranks = true, layout = true, scheme = true }

--- What a variant's own options add to its text: those that are not at their default, and the size of blocks.
-- @tparam table o the options @tparam table record the variant
-- @treturn string ", block 64, pattern local_window(512)", or ""
function Attention.own_text(o, record)
  local parts = {}
  for _, name in ipairs(schema.keys(record.options or {})) do
    local value, kept = o[name], SAID[name] or name ~= "block" and o[name] == record.options[name].default
    if value ~= nil and not kept and type(value) ~= "table" then
      parts[#parts + 1] = (", %s %s"):format(name, tostring(value))
    end
  end
  return table.concat(parts)
end

-- a whole sequence as one segment has no size to tell
local function branches_text(p)
  if #p.segments == 1 and p.segments[1] >= 2 ^ 40 then return "" end
  return (", segments {%s}, dilations {%s}"):format(table.concat(p.segments, ", "),
    table.concat(p.dilations, ", "))
end

function Attention:__tostring()
  local p, o = self.pattern, self.options
  local over = o.ranks and ("%s over %d ranks, %s, "):format(o.of, o.ranks, o.layout)
    or o.of and o.of ~= "dense" and o.of .. ", " or ""
  return ("attention %s(%s%d heads%s%s, %s, offset %s, merge %s%s%s%s)"):format(
    self.variant, over, o.heads,
    o.kv_heads ~= o.heads and (", %d for keys and values"):format(o.kv_heads) or "",
    branches_text(p), p.heads, p.offset, p.merge, p.causal and ", causal" or "",
    p.window and (", window %d"):format(p.window) or "", Attention.own_text(o, self.record))
end

--- @tparam table c the core; gets options_of
-- @treturn table the class
return function(c)
  core = c
  make_rules()
  schema.describe(Attention.init, module_rules)
  core.options_of = own_rules
  config.define("attention", function(options) return (configure(options)) end,
    { kv_heads = function(o) return o.heads end,
      pattern = function(o) return o.levels and tostring(core.masks.hierarchical(o.levels)) end })
  return Attention
end
