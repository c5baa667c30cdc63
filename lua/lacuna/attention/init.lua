--- Dilated attention: the functional form lac.attend and the module form lac.attention{...}.
--
-- A configuration (segments, dilations, which heads run which branch, offset rule, merge rule, causal,
-- window) becomes one engine plan; running it is one C call forward and one backward, whatever the number of
-- branches. This file validates options, keeps plan handles, and records the tape node. The mathematics is
-- the plan's; nothing is decided here but defaults.
--
-- Plans are found by a string key made of the configuration and the sizes, about two microseconds; the engine
-- has its own cache behind it, so a lost handle costs a lookup there, not a rebuild. Keying by the identity
-- of the options table was rejected: scripts change tables. A handle's finalizer is a C function.
--
-- Defaults follow the two published schemes: heads = "all" (LongNet: offset "mod", merge "lse") and heads =
-- "split" (offset "branch", merge "mean"). Options that attention knows but this engine cannot honour yet
-- (rope, xpos) are refused by name: an ignored option is a silent wrong answer.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local Registry = require "lacuna.registry"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local ops = require "lacuna.ops"
local weights = require "lacuna.attention.weights"
local masks = require "lacuna.attention.masks"
local alibi = require "lacuna.attention.alibi"
local packed = require "lacuna.attention.packed"

local ffi, C = lib.ffi, lib.C
local fail, show = schema.fail, schema.show
local adopt, ctensor, expect = tensor.adopt, tensor.ctype, tensor.expect

local OP = "attention"
local SCHEME = { split = C.LAC_HEADS_SPLIT, all = C.LAC_HEADS_ALL }
local OFFSET = { branch = C.LAC_OFFSET_BRANCH, mod = C.LAC_OFFSET_MOD, block = C.LAC_OFFSET_BLOCK }
local MERGE = { mean = C.LAC_MERGE_MEAN, sum = C.LAC_MERGE_SUM, lse = C.LAC_MERGE_LSE,
                lse_detach = C.LAC_MERGE_LSE_DETACH }
local KERNEL = { auto = C.LAC_KERNEL_AUTO, portable = C.LAC_KERNEL_PORTABLE, hopper = C.LAC_KERNEL_HOPPER }
local BLOCK = 128 -- rows of a block of block_mask unless a call says otherwise
local MAX_BRANCHES = tonumber(C.LAC_MAX_BRANCHES)

local attention = { masks = masks }

-- ---- options ---------------------------------------------------------------------------------------

--- Options that shape a plan.
local PATTERN = {
  segments = { type = "integers", min = 1, required = true },
  dilations = { type = "integers", min = 1, required = true },
  heads = { one_of = { "split", "all" }, default = "all" },
  offset = { one_of = { "branch", "mod", "block" } },
  merge = { one_of = { "mean", "sum", "lse", "lse_detach" } },
  causal = { type = "boolean", default = false },
  dedup = { type = "boolean", default = false },
  align = { one_of = { "start", "end" }, default = "start" },
  window = { type = "integer", min = 0 },
}

--- Options of one call.
local RUN = {
  scale = { type = "number", check = function(v)
    if v == 0 or math.abs(v) == math.huge then return "must be finite and not 0" end
  end },
  dropout = { type = "number", check = function(v)
    if not (v >= 0 and v < 1) then return "must be in [0, 1)" end
  end, default = 0 },
  training = { type = "boolean", default = true },
  key_padding = { type = "tensor" }, key_lengths = { type = "tensor" },
  kernel = { one_of = { "auto", "portable", "hopper" }, default = "auto" },
  fp8 = { type = "boolean", default = false },
  mask = { type = "tensor" }, bias = { type = "tensor" }, alibi = alibi.option,
  block_mask = { of_a_call = true, check = function(v)
    if not tensor.is(v) and not masks.is(v) then
      return "must be a bool tensor or a pattern of lac.attention.masks"
    end
  end }, block = { type = "integer", min = 16, of_a_call = true },
  cu_seqlens = packed.option,
  return_lse = { type = "boolean", default = true }, need_weights = { type = "boolean", default = false },
}

-- what attention does not do itself: refused by name, with what does
local ELSEWHERE = {
  rope = "call lac.rope on q and k first, or take nn.MultiheadDilatedAttention{ positions = 'rope' }",
  xpos = "call lac.rope with scale_base on q and k first, or take nn.MultiheadDilatedAttention{ positions = "
    .. "'xpos' }",
}

local function refuse_unknown(options)
  for name, instead in pairs(ELSEWHERE) do
    if options[name] ~= nil then fail(OP, "q and k are not rotated here (option '%s'): %s", name, instead) end
  end
end

local function merged_spec(...)
  local spec = {}
  for i = 1, select("#", ...) do
    for name, rule in pairs((select(i, ...))) do spec[name] = rule end
  end
  return spec
end

local FUNCTIONAL, PATTERN_ONLY = merged_spec(PATTERN, RUN), merged_spec(PATTERN)

-- cross-checks and the defaults that depend on the scheme; fills `o` in place
local function complete(o)
  if #o.segments ~= #o.dilations then
    fail(OP, "segments and dilations must have the same length: %d != %d", #o.segments, #o.dilations)
  end
  if #o.segments > MAX_BRANCHES then
    fail(OP, "at most %d branches are supported, got %d segments", MAX_BRANCHES, #o.segments)
  end
  o.offset = o.offset or (o.heads == "split" and "branch" or "mod")
  o.merge = o.merge or (o.heads == "split" and "mean" or "lse")
  if o.dedup and o.merge ~= "lse" then
    fail(OP, "dedup counts every key once in one softmax, so it needs merge = 'lse', got '%s'", o.merge)
  end
  return o
end

local function pattern_key(o)
  return table.concat(o.segments, ",") .. "/" .. table.concat(o.dilations, ",")
    .. "/" .. o.heads .. "/" .. o.offset .. "/" .. o.merge
    .. (o.causal and "c" or "-") .. (o.dedup and "d" or "-") .. o.align .. (o.window or "-")
end

-- ---- plans -----------------------------------------------------------------------------------------

local CACHE_MOST = 256
local plans, plan_count = {}, 0
local plan_out = ffi.new("lac_plan *[1]")

local function describe(o, B, N, M, H, Hk, D)
  local desc = ffi.new("lac_attn_desc")
  desc.batch, desc.n, desc.m = B, N, M
  desc.heads, desc.kv_heads, desc.head_dim, desc.branches = H, Hk, D, #o.segments
  for i = 1, #o.segments do
    desc.segment[i - 1], desc.dilation[i - 1] = o.segments[i], o.dilations[i]
  end
  desc.heads_scheme, desc.offset_rule, desc.merge = SCHEME[o.heads], OFFSET[o.offset], MERGE[o.merge]
  desc.causal, desc.dedup = o.causal and 1 or 0, o.dedup and 1 or 0
  desc.align_end = o.align == "end" and 1 or 0
  desc.window = o.window or -1
  return desc
end

-- the plan of a completed configuration for these sizes
local function plan_for(o, key, B, N, M, H, Hk, D)
  local full = key .. "|" .. B .. "," .. N .. "," .. M .. "," .. H .. "," .. Hk .. "," .. D
  local plan = plans[full]
  if plan then return plan end
  lib.call(C.lac_plan_get, describe(o, B, N, M, H, Hk, D), plan_out)
  plan = ffi.gc(plan_out[0], C.lac_plan_drop)
  if plan_count >= CACHE_MOST then
    plans, plan_count = {}, 0 -- the engine's cache still has the recent ones
  end
  plans[full] = plan
  plan_count = plan_count + 1
  return plan
end

-- ---- the operator ----------------------------------------------------------------------------------

local function fill_args(q, k, v, o)
  local args = ffi.new("lac_attn_args")
  args.q, args.k, args.v = q.c, k.c, v.c
  if o.key_padding then args.key_padding = o.key_padding.c end
  if o.key_lengths then args.key_lengths = o.key_lengths.c end
  if o.mask then args.mask = o.mask.c end
  if o.bias then args.bias = o.bias.c end
  if o.alibi then args.alibi = o.alibi.c end
  if o.block_mask then args.block_mask, args.block = o.block_mask.c, o.block end
  if o.starts then args.starts, args.sequences = o.starts, o.sequences end
  args.scale, args.dropout, args.seed, args.offset = o.scale or 0, o.p, o.seed, o.at
  args.kernel = KERNEL[o.kernel or "auto"]
  args.fp8 = o.fp8 and 1 or 0
  return args
end

local attend_op = { name = "attend", saves = "abcdo", method = false }

-- forward on the engine: out, lse, and lse of each branch where the backward needs it
local function forward_raw(plan, q, k, v, run)
  local out_c, lse_c, branch_c = ctensor(), ctensor(), ctensor()
  lib.call(C.lac_attend, plan, fill_args(q, k, v, run), out_c, lse_c, branch_c)
  return adopt(out_c), adopt(lse_c), branch_c.storage ~= nil and adopt(branch_c) or nil
end

local function backward_raw(plan, q, k, v, run, out, lse, branch, g, dlse)
  local dq, dk, dv = ctensor(), ctensor(), ctensor()
  local dbias = run.bias and run.bias.requires_grad and ctensor() or nil
  lib.call(C.lac_attend_bwd, plan, fill_args(q, k, v, run), out.c, lse.c, branch and branch.c or nil, g.c,
           dlse and dlse.c or nil, dq, dk, dv, dbias)
  return adopt(dq), adopt(dk), adopt(dv), dbias and adopt(dbias)
end

-- tensors of a call that have no gradient and that the backward reads again
local CONSTANT = { "key_padding", "key_lengths", "mask", "alibi", "block_mask" }

-- run: what run_options makes; the bias is the operator's fourth input
local function attend(plan, q, k, v, run)
  if run.fp8 and ops.wants(q, k, v, run.bias) then
    fail(OP, "fp8 is for forward passes: its gradients would be those of another function; call it inside "
      .. "lac.no_grad, or leave fp8 out where gradients are wanted")
  end
  local out, lse, branch = forward_raw(plan, q, k, v, run)
  if ops.wants(q, k, v, run.bias) then
    local node = ops.record(attend_op, out, q, k, v, run.bias)
    lse.requires_grad, lse.node, lse.slot = true, node, 2
    node.outputs, node.plan, node.run, node.branch = { out, lse }, plan, run, branch
    node.saved, node.saved_versions = { lse }, { 0 }
    for _, name in ipairs(CONSTANT) do
      local extra = run[name]
      if extra then
        node.saved[#node.saved + 1] = extra
        node.saved_versions[#node.saved_versions + 1] = extra.root.version
      end
    end
  end
  return out, lse
end

function attend_op.backward(node, g, more)
  local out, lse = node.outputs[1], node.outputs[2]
  local dlse = more and more[2]
  g = g or ops.raw_zeros_like(out)
  return backward_raw(node.plan, node.a, node.b, node.c, node.run, out, lse, node.branch, g, dlse)
end

local DIMENSIONS = { "batch items", "positions", "heads", "head dimensions" }

local function check_same(name, t, i, other_name, other)
  if t.c.shape[i] ~= other.c.shape[i] then
    fail(OP, "%s has %d %s, %s has %d: %s is %s, %s is %s",
         name, tonumber(t.c.shape[i]), DIMENSIONS[i + 1], other_name, tonumber(other.c.shape[i]),
         name, show(t), other_name, show(other))
  end
end

local function check_inputs(q, k, v)
  expect(OP, "q", q)
  expect(OP, "k", k)
  expect(OP, "v", v)
  local list = { { "q", q }, { "k", k }, { "v", v } }
  for i = 1, 3 do
    local t = list[i][2]
    if t.c.ndim ~= 4 then
      fail(OP, "%s must be [batch, positions, heads, head_dim], got %s", list[i][1], show(t))
    end
    if t.c.dtype ~= q.c.dtype then
      fail(OP, "q is %s and %s is %s: one dtype is needed", show(q), list[i][1], show(t))
    end
    if t.c.device ~= q.c.device then
      fail(OP, "q is %s and %s is %s: one device is needed", show(q), list[i][1], show(t))
    end
  end
  check_same("k", k, 0, "q", q)
  check_same("k", k, 3, "q", q)
  for i = 0, 3 do check_same("v", v, i, "k", k) end
end

-- o: the pattern of the plan
local function blocks_of(run, o, q, k)
  local mask = run.block_mask
  if not masks.is(mask) then return mask end
  return mask:cached { n = q:size(2), m = k:size(2), heads = q:size(3), block = run.block or BLOCK,
                       causal = o.causal, align = o.align, device = q:device() }
end

local function run_options(o, q, blocks)
  local p = o.training and o.dropout or 0
  local seed, at = 0, 0
  if p > 0 then seed, at = create.draw() end
  local starts, sequences
  if o.cu_seqlens then starts, sequences = packed.starts(o.cu_seqlens) end
  return { scale = o.scale, p = p, seed = seed, at = at, kernel = o.kernel, fp8 = o.fp8,
           key_padding = o.key_padding, key_lengths = o.key_lengths, mask = o.mask, bias = o.bias,
           alibi = o.alibi and alibi.tensor(o.alibi, q), block_mask = blocks, block = o.block or BLOCK,
           starts = starts, sequences = sequences }
end

-- options given with one call
local function check_block(o)
  if o.block and not o.block_mask then
    fail(OP, "block = %d is the size of block_mask's blocks, and there is no block_mask", o.block)
  end
end

-- module: an object whose variant executes itself or prepares a call, else nil
local function apply(o, key, q, k, v, run, module)
  check_inputs(q, k, v)
  local attend_with
  if module then
    for _, name in ipairs { "mask", "bias", "alibi", "block_mask", "cu_seqlens" } do
      if run[name] and not module.record[name] then
        fail(OP, "variant '%s' cannot honour %s; lac.attend can", module.variant, name)
      end
    end
    if module.record.prepare then run = module.record.prepare(module, q, k, run) end
  end
  if module and module.record.run then
    attend_with = function(value) return module.record.run(module, q, k, value, run) end
  else
    local qs, ks, made = q.c.shape, k.c.shape, run_options(run, q, blocks_of(run, o, q, k))
    local plan = plan_for(o, key, tonumber(qs[0]), tonumber(qs[1]), tonumber(ks[1]),
                          tonumber(qs[2]), tonumber(ks[2]), tonumber(qs[3]))
    attend_with = function(value) return attend(plan, q, k, value, made) end
  end
  local out, lse = attend_with(v)
  local all = run.need_weights and weights(attend_with, q, v) or nil
  if run.return_lse then return out, lse, all end
  return out, all
end

--- Dilated attention of q, k, v.
-- @tparam Tensor q [B, N, H, D] @tparam Tensor k [B, M, Hk, D], H a multiple of Hk @tparam Tensor v like k
-- @tparam table options segments, dilations (lists of one length); heads "all" or "split"; offset "branch",
--   "mod" or "block"; merge "mean", "sum", "lse" or "lse_detach"; causal, dedup (false); align "start" or
--   "end": the first, or the last, query and key share a position; window w: only |p - j| <= w, so w
--   positions to either side (masks.local_window counts both); scale (1/sqrt(D)); dropout (0), training
--   (true); key_padding [B, M] bool, true = keep; key_lengths [B]; mask bool, true = attend, and bias, added
--   to the scaled scores (-inf: do not attend; its gradient takes B H N M numbers on the way), both [N, M],
--   [H or 1, N, M] or [B or 1, H or 1, N, M];
--   alibi: H slopes (list or tensor) or true for the usual ones, score - slope |p - j|; block_mask
--   bool [ceil(N / block), ceil(M / block)] with axes in front like mask: active blocks of pairs, others cost
--   nothing, or a pattern of attention.masks; block (128, at least 16); cu_seqlens, S + 1 numbers from 0 to N
--   (list or tensor): packed sequences, each as if called alone; return_lse (true);
--   need_weights (false); kernel on a GPU: "auto", "portable" or "hopper", an error where
--   that one cannot do the call; fp8 (false): q, k and v (f32, f16, bf16) are rounded to e4m3, each head of
--   each item with a scale of its own, the largest finite magnitude of all its rows / 448. Without gradients;
--   on cuda f16 and bf16 on Hopper, head dimensions in multiples of 8 to 128, without mask, bias, alibi,
--   block_mask, key_padding, dropout and dedup; no faster on the CPU. Root mean square error of out against
--   f64, 2048 normal rows, D 64 and 128: 4.2 to 4.8% of out, 14 times that of bf16; one number in 1000 ten
--   times as large: 8 to 10%. On cuda weights are rounded too, by at most 1/16: 3.6 to 5.6%; lse within 0.001
-- @treturn Tensor out [B, N, H, D]; rows without a key are 0
-- @treturn Tensor lse [B, N, H] f32 (f64 for f64), natural logarithm; -inf for rows without a key; absent
--   with return_lse = false
-- @treturn Tensor weights [B, H, N, M] with need_weights = true, last: what multiplies v, for small N and M
-- Source: LongNet, arXiv 2307.02486, eq. 6 to 15.
-- @usage
--     local q, k, v = lac.randn{ 1, 64, 4, 16 }, lac.randn{ 1, 64, 4, 16 }, lac.randn{ 1, 64, 4, 16 }
--     local out, lse = lac.attend(q, k, v, { segments = { 16, 64 }, dilations = { 1, 4 }, causal = true })
--     print(out, lse)
function attention.attend(q, k, v, options)
  if type(options) ~= "table" or tensor.is(options) then
    fail(OP, "options must be a table with segments and dilations, got %s", show(options))
  end
  refuse_unknown(options)
  local o = complete(schema.options(OP, options, FUNCTIONAL))
  check_block(o)
  return apply(o, pattern_key(o), q, k, v, o)
end
attend_op.forward = attention.attend
schema.describe(attention.attend, FUNCTIONAL)
ops.define(attend_op)

-- ---- what a plan is --------------------------------------------------------------------------------

local SIZES = {
  batch = { type = "integer", min = 1, default = 1 },
  n = { type = "integer", min = 1, required = true },
  m = { type = "integer", min = 1 },
  heads = { type = "integer", min = 1, required = true },
  kv_heads = { type = "integer", min = 1 },
  head_dim = { type = "integer", min = 1, default = 64 },
}

-- nil if this choice of kernel runs the one for Hopper there (forward, or also backward), else why not
local function hopper_refusal(plan, dtype, kernel, block, backward)
  local why = C.lac_plan_hopper(plan, dtype, KERNEL[kernel], block or 0, backward and 1 or 0)
  return why ~= nil and ffi.string(why) or nil
end

-- instruction set of the CPU that computes this
local function isa_of(plan, dtype, block) return ffi.string(C.lac_plan_isa(plan, dtype, block or 0)) end

-- bytes that a CPU thread works on, forward and backward
local function workspace_of(plan, dtype, block)
  local bytes = ffi.new "int64_t[2]"
  lib.check(C.lac_plan_workspace(plan, dtype, block or 0, bytes, bytes + 1))
  return tonumber(bytes[0]), tonumber(bytes[1])
end

local function info_of(plan)
  local raw = ffi.new("lac_plan_info")
  lib.check(C.lac_plan_describe(plan, raw))
  local info = {
    pairs = tonumber(raw.pairs), rows = tonumber(raw.rows), overlapping = raw.overlapping ~= 0,
    flops_forward = tonumber(raw.flops_forward), flops_backward = tonumber(raw.flops_backward),
    workspace_forward = tonumber(raw.bytes_workspace_forward),
    workspace_backward = tonumber(raw.bytes_workspace_backward),
    accumulate_forward = tonumber(raw.bytes_accumulate_forward),
    accumulate_backward = tonumber(raw.bytes_accumulate_backward),
    device_backward = tonumber(raw.bytes_device_backward),
    strips = {},
  }
  local s = ffi.new("lac_strip")
  for i = 1, raw.strips do
    lib.check(C.lac_plan_strip(plan, i - 1, s))
    info.strips[i] = {
      segment = tonumber(s.segment), dilation = tonumber(s.dilation), offset = tonumber(s.offset),
      head0 = s.head0, heads = s.heads, branch = s.branch, shared = s.shared ~= 0,
    }
  end
  return info
end

-- the plan options of a table that may also have options of a call, which shape no plan
local function plan_options(pattern)
  if type(pattern) ~= "table" or tensor.is(pattern) then
    fail(OP, "the pattern must be a table, got %s", show(pattern))
  end
  refuse_unknown(pattern)
  local spec = {}
  for name, rule in pairs(PATTERN_ONLY) do spec[name] = rule end
  for name, rule in pairs(RUN) do spec[name] = rule end
  return complete(schema.options(OP, pattern, spec))
end

local function sized_plan(o, sizes)
  local z = schema.options(OP, sizes, SIZES)
  return plan_for(o, pattern_key(o), z.batch, z.n, z.m or z.n, z.heads, z.kv_heads or z.heads, z.head_dim), z
end

--- Counts of a configuration at given sizes, without any tensor.
-- @tparam table pattern options of lac.attend that shape a plan
-- @tparam table sizes n, heads; batch (1), m (n), kv_heads (heads), head_dim (64)
-- @treturn table pairs, rows (per batch item), flops_forward, flops_backward; in bytes workspace_forward,
--   workspace_backward (a CPU thread, f32), accumulate_forward, accumulate_backward (f32 sums of f16 and bf16
--   results), device_backward (working memory of the backward on a GPU, f16 and bf16); overlapping, and
--   strips: a list of {segment, dilation, offset, head0, heads, branch, shared}, 0-based as in the
--   mathematics
function attention.plan_info(pattern, sizes)
  return info_of((sized_plan(plan_options(pattern), sizes)))
end

attention.decoder = require "lacuna.attention.decode" (function(pattern, positions, heads, kv_heads, head_dim)
  local o = plan_options(pattern)
  o.align = "end" -- one query behind all other positions
  return plan_for(o, pattern_key(o), 1, 1, positions, heads, kv_heads, head_dim)
end)

--- Statistics of the engine's plan cache: size, capacity, hits, misses, evictions.
function attention.cache()
  local raw = ffi.new("lac_cache_stats")
  lib.check(C.lac_plan_cache(raw))
  return { size = tonumber(raw.size), capacity = tonumber(raw.capacity), hits = tonumber(raw.hits),
           misses = tonumber(raw.misses), evictions = tonumber(raw.evictions) }
end

-- ---- the module form -------------------------------------------------------------------------------

local CALLED, SAID = { type = "function" }, { type = "boolean" }

--- Registry of variants. Scripts may add their own: see attention/variants.lua for what a record has.
attention.variants = Registry("attention", "variant", {
  doc = { type = "string" }, build = { type = "function", required = true }, options = { type = "table" },
  example = { type = "table" }, bare = SAID, mask = SAID, bias = SAID, alibi = SAID, cu_seqlens = SAID,
  block_mask = SAID,
  run = CALLED, prepare = CALLED, sharding = CALLED, scorer = CALLED, blocks = CALLED,
  decoder = { type = { "table", "function" } },
})

local core = {
  masks = masks,
  variants = attention.variants, pattern_spec = PATTERN, run_spec = RUN, merged_spec = merged_spec,
  sizes = SIZES, complete = complete, pattern_key = pattern_key, plan_for = plan_for,
  refuse_unknown = refuse_unknown, check_block = check_block, apply = apply, info_of = info_of,
  hopper_refusal = hopper_refusal, isa_of = isa_of, workspace_of = workspace_of, blocks_of = blocks_of,
  decoder = attention.decoder, forward_raw = forward_raw, backward_raw = backward_raw,
}
local Attention = require "lacuna.attention.module"(core)
attention._init = Attention.init -- for help
require "lacuna.attention.variants"(attention.variants, require "lacuna.attention.ring"(core),
                                    require "lacuna.attention.sparse"(
                                      require "lacuna.attention.decode_blocks"(core)), masks)

attention.matrix = require "lacuna.attention.matrix"(attention, { PATTERN, RUN })

--- The options that a variant has of its own (with those of what it wraps): { name = rule }.
-- @tparam string variant @tparam table given options of the user (`of` chooses what is wrapped)
function attention.options_of(variant, given) return (core.options_of(variant, given)) end

return setmetatable(attention, {
  __call = function(_, options) return Attention(options) end,
  __newindex = schema.refuse_values "lac.attention",
  __index = function(_, name)
    fail("attention", "there is no lac.attention.%s%s", tostring(name),
         schema.hint(name, schema.keys(attention)))
  end,
  __tostring = function()
    return "lac.attention{variant = ...}: " .. table.concat(attention.variants:names(), ", ")
  end,
})
