--- Attention of new queries to keys that a cache has kept: what decoding calls once per token and layer.
--
-- A decoder is a configuration without sizes. It holds one engine plan for all positions, so that a call
-- costs what the rows in reach cost and nothing for the length of the past. Positions belong to the call: one
-- number for the whole batch, or one per item where items stand at different places. `reach` is the same
-- geometry asked the other way round, for caches: what lies before it can be forgotten. Nothing about
-- segments is computed here; the plan is the only place that knows how they are cut.
--
-- It is a low-level interface (nn.KVCache is the one for models): no gradients, no dropout, no padding.
-- Rejected: lac.attend with a changing number of keys, which makes a plan per token and reads keys by their
-- distance from the first one, so that none could ever be dropped.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local class = require "lacuna.class"
local tensor = require "lacuna.tensor"
local alibi = require "lacuna.attention.alibi"

local ffi, C = lib.ffi, lib.C
local fail = schema.fail
local adopt, ctensor, expect = tensor.adopt, tensor.ctype, tensor.expect

local OP = "decoder"
local POSITIONS = 2 ^ 31 -- positions are below this

local Decoder = class("Decoder", nil, true)
schema.refuse_new_fields(Decoder, function() return "; make another: lac.attention.decoder(...)" end,
  "scale slopes")

--- @tparam cdata plan made for one query at the end of POSITIONS keys
-- @tparam[opt] number scale @tparam[opt] boolean|table|Tensor slopes as the option alibi has them
function Decoder:init(plan, scale, slopes)
  self.plan, self.scale, self.slopes = plan, scale or 0, slopes or false
  self.found, self.args = ffi.new("int64_t[1]"), ffi.new("lac_attn_args")
  schema.complete(self)
end

local function is_position(p) return schema.is_integer(p) and p >= 0 and p < POSITIONS end

local function places(name, value, batch)
  local list = ffi.new("int64_t[?]", batch)
  for b = 1, batch do
    local p = value
    if type(value) == "table" then p = value[b] end
    if not is_position(p) then
      fail(OP, "%s must be a position from 0 to 2^31 - 1, or a list of %d of them, got %s", name, batch,
        schema.show(value))
    end
    list[b - 1] = p
  end
  return list
end

--- attend without checks in Lua, on the engine's structs, for a cache that knows its tensors.
-- @tparam cdata q lac_tensor @tparam cdata k @tparam cdata v
-- @tparam cdata position int64_t[B] @tparam cdata key_start int64_t[B]
-- @tparam[opt] Tensor slopes [H] of this call instead of the decoder's
-- @treturn Tensor out @treturn Tensor lse
function Decoder:attend_raw(q, k, v, position, key_start, slopes)
  local args, out, lse = self.args, ctensor(), ctensor()
  args.q, args.k, args.v, args.scale = q, k, v, self.scale
  slopes = slopes or self.slopes and alibi.tensor(self.slopes, { c = q })
  args.alibi = slopes and slopes.c or nil
  lib.call(C.lac_attend_at, self.plan, args, position, key_start, out, lse)
  return adopt(out), adopt(lse)
end

--- Attend.
-- @tparam Tensor q [B, n, H, D] queries at positions position .. position + n - 1
-- @tparam Tensor k [B, R, Hk, D] row j (from 0) is the key at position key_start + j
-- @tparam Tensor v like k
-- @tparam integer|table position of the first query: one number, or a list of B
-- @tparam[opt=0] integer|table key_start likewise; no query may reach back beyond it (see reach)
-- @treturn Tensor out [B, n, H, D] @treturn Tensor lse [B, n, H]
function Decoder:attend(q, k, v, position, key_start)
  expect(OP, "q", q)
  expect(OP, "k", k)
  expect(OP, "v", v)
  if q.c.ndim ~= 4 then fail(OP, "q must be [batch, rows, heads, head_dim], got %s", schema.show(q)) end
  local batch = tonumber(q.c.shape[0])
  return self:attend_raw(q.c, k.c, v.c, places("position", position, batch),
    places("key_start", key_start or 0, batch))
end

--- The smallest position that a query at `position`, or at any later one, may attend to.
-- @tparam integer position from 0
function Decoder:reach(position)
  if not is_position(position) then
    fail(OP, "position must be from 0 to 2^31 - 1, got %s", schema.show(position))
  end
  lib.check(C.lac_plan_reach(self.plan, position, self.found))
  return tonumber(self.found[0])
end

--- @tparam function plan_of takes a pattern, the number of keys, heads, kv_heads, head_dim; returns a plan
-- @treturn function the public attention.decoder(pattern, sizes)
return function(plan_of)
  local SIZES = { heads = { type = "integer", min = 1, required = true },
    kv_heads = { type = "integer", min = 1 }, head_dim = { type = "integer", min = 1, required = true } }
  --- A decoder for a configuration.
  -- @tparam table pattern options of lac.attend that shape a plan, scale and alibi
  -- @tparam table sizes heads, head_dim; kv_heads (heads)
  return function(pattern, sizes)
    local z = schema.options(OP, sizes, SIZES)
    return Decoder(plan_of(pattern, POSITIONS, z.heads, z.kv_heads or z.heads, z.head_dim), pattern.scale,
                   pattern.alibi)
  end
end
