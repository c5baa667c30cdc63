--- nn/extra_keys.lua: keys that every query has beside those of the sequence: add_bias_kv and add_zero_attn.
--
-- torch appends them as further rows of k and v. Here rows have positions, segments, causality and shards,
-- and these have none: so each joins the row's softmax afterwards, by the log-sum-exp that attention returns.
-- With s the score of such a key and lse' = log(exp(lse) + exp(s)),
--
--   out' = exp(lse - lse') out + exp(s - lse') v
--
-- is one softmax over all of them, for every variant, in decoding as in the full pass, and the gradients are
-- the tape's. For that a row must have one softmax: merges that have one a branch are refused when the module
-- is made. Extra keys are not rotated, and neither masks nor slopes concern them.

local partial = require "lacuna.attention.partial"
local create = require "lacuna.create"
local operators = require "lacuna.ops"
local schema = require "lacuna.schema"

local ops = operators.fn
local extra = {}

--- Complaints about a configuration. @tparam string op @tparam table o options @tparam table p the pattern
function extra.check(op, o, p)
  if (o.add_bias_kv or o.add_zero_attn) and partial.separate(p) then
    schema.fail(op, "%s joins a row's softmax, and merge '%s' has one for each of %d branches; use 'lse'",
      o.add_bias_kv and "add_bias_kv" or "add_zero_attn", p.merge, #p.segments)
  end
end

-- a parameter [1, 1, Hk D] for H heads
local function by_head(t, heads, D)
  local own = t:view(1, 1, t:size(3) / D, D)
  return own:size(3) < heads and own:repeat_interleave(heads / own:size(3), 3) or own
end

--- @tparam table m the module: options, bias_k and bias_v, pattern, head_dim, training
-- @tparam Tensor q [B, N, H, D] @tparam Tensor out [B, N, H, D] @tparam Tensor lse [B, N, H]
-- @tparam[opt] Tensor weights [B, H, N, M]
-- @treturn Tensor out @treturn ?Tensor weights [B, H, N, M + 1 or 2]
function extra.join(m, q, out, lse, weights)
  local o, H, D = m.options, q:size(3), q:size(4)
  local scores, values, dtype = {}, {}, lse:dtype()
  if o.add_bias_kv then
    local k = by_head(m.bias_k, H, D)
    scores[1] = (q:to(dtype) * k:to(dtype)):sum(4) * (o.scale or 1 / math.sqrt(D))
    values[1] = by_head(m.bias_v, H, D):to(dtype)
  end
  if o.add_zero_attn then scores[#scores + 1] = create.zeros_like(lse) end
  local total = lse
  for _, s in ipairs(scores) do total = ops.logaddexp(total, s) end
  local rest = partial.share(lse, total)
  local sum = out:to(dtype) * rest:unsqueeze(4)
  local columns = { weights and weights * rest:transpose(2, 3):unsqueeze(4):to(weights:dtype()) }
  local scale = m.pattern.merge == "mean" and 1 / #m.pattern.segments or 1
  for i, s in ipairs(scores) do
    local w = partial.share(s, total) * scale
    if o.dropout > 0 and m.training then w = ops.dropout(w, o.dropout) end
    if values[i] then sum = sum + w:unsqueeze(4) * values[i] end
    if weights then columns[i + 1] = w:transpose(2, 3):unsqueeze(4):to(weights:dtype()) end
  end
  return sum:to(out:dtype()), weights and ops.cat(columns, 4) or nil
end

return extra
