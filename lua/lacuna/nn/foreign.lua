--- nn/foreign.lua: parameters under the names of other libraries: torchscale, DarcStar, torch.
--
-- A dialect is a list of name patterns and, where the layouts differ, what is done to the numbers. Loading
-- goes through load_state_dict, so that a file that does not fit is refused as a whole with every name that
-- is missing, unexpected or of another shape. Writing is the same list read backwards. Blocks are numbered
-- from 0 there and from 1 here.
--
-- torchscale rotates neighbouring dimensions (2i, 2i + 1), we rotate i and i + D/2: the rows of q and k are
-- reordered within each head, which changes no product. DarcStar's module with layer_norm also normalises q
-- and k before attention, which is not MAGNETO's architecture and has no place here: such a file is refused.
--
-- torchscale's models multiply embeddings by sqrt(width) only if made with no_scale_embedding = False; ours
-- always do. Rejected: guessing the dialect from the names (a wrong guess loads something).

local schema = require "lacuna.schema"
local tensor = require "lacuna.tensor"
local create = require "lacuna.create"
local operators = require "lacuna.ops"
local grad = require "lacuna.grad"
local base = require "lacuna.nn.module"

local ops = operators.fn
local fail = schema.fail
local OP = "foreign"

-- Parts of names, {theirs, ours}, in the order in which they are tried: the first that is in a name replaces
-- it there. What stands before it stays. Used in both directions, so no part may hold another earlier one.
local TORCHSCALE = {
  { "self_attn.inner_attn_ln.", "attention.norm." }, { "self_attn_layer_norm.", "norm1." },
  { "encoder_attn_layer_norm.", "norm_cross." }, { "final_layer_norm.", "norm2." },
  { "ffn.ffn_layernorm.", "ffn.norm." }, { "ffn.fc1.", "ffn.up." }, { "ffn.fc2.", "ffn.down." },
  { "embed_tokens.", "embedding." }, { "output_projection.", "head." }, { "inner_attn_ln.", "norm." },
  { "layer_norm.", "norm." },
}
for _, part in ipairs{ "q", "k", "v", "out" } do
  for _, of in ipairs{ { "self_attn.", "attention." }, { "encoder_attn.", "cross." }, { "", "" } } do
    table.insert(TORCHSCALE, { of[1] .. part .. "_proj.", of[2] .. part .. "." })
  end
end
local DIALECTS = {
  torchscale = { parts = TORCHSCALE, interleaved = true, models = true, ignored = "xpos%.scale$" },
  darcstar = { parts = { { "qkv_proj.", "qkv." }, { "q_proj.", "q." }, { "k_proj.", "k." },
    { "v_proj.", "v." }, { "out_proj.", "out." } } },
  torch = { parts = { { "in_proj_", "qkv." }, { "out_proj.", "out." }, { "q_proj_", "q." },
    { "k_proj_", "k." }, { "v_proj_", "v." } } },
}

local function dialect_of(name)
  local dialect = DIALECTS[name]
  if not dialect then schema.unknown(OP, "dialect", name, schema.keys(DIALECTS)) end
  return dialect
end

-- a part counts where a name or one of its dotted components begins
local function replaced(name, from, to)
  local at = ("." .. name):find("." .. from, 1, true)
  return at and name:sub(1, at - 1) .. to .. name:sub(at + #from)
end

local function ours(dialect, name)
  name = name:gsub("layers%.(%d+)%.", function(i) return ("layers.%d."):format(i + 1) end)
  name = name:gsub("^decoder%.", "")
  for _, part in ipairs(dialect.parts) do
    local changed = replaced(name, part[1], part[2])
    if changed then return changed end
  end
  return name
end

-- the attention modules of a model that rotate, by path ("" for the model itself)
local function rotating(model)
  local list = {}
  for _, m in ipairs(model:modules()) do
    local o = schema.own_field(m.module, "options")
    if schema.own_field(m.module, "head_dim") and (o.positions == "rope" or o.positions == "xpos") then
      list[m.path == "" and "" or m.path .. "."] = m.module
    end
  end
  return list
end

-- row order that turns pairs (2i, 2i + 1) into (i, i + D/2), or back
local function order(heads, D, back)
  local list = {}
  for h = 0, heads - 1 do
    for d = 0, D - 1 do
      local from = d < D / 2 and 2 * d or 2 * d - D + 1
      if back then from = d % 2 * D / 2 + math.floor(d / 2) end
      list[#list + 1] = h * D + from
    end
  end
  return create.tensor(list, { dtype = "i64" })
end

local function reorder(state, model, back)
  for path, m in pairs(rotating(model)) do
    if m.options.fused then fail(OP, "rotating projections of torchscale are separate; use fused = false") end
    for _, part in ipairs{ { "q", m.heads }, { "k", m.kv_heads } } do
      for _, name in ipairs{ "weight", "bias" } do
        local key = path .. part[1] .. "." .. name
        if state[key] then
          state[key] = ops.index_select(state[key], 1, order(part[2], m.head_dim, back):to{
            device = state[key]:device() })
        end
      end
    end
  end
end

-- a fused projection of the file for separate ones here, or the other way round
local function fuse(state, model)
  if schema.own_field(model, "head_dim") == nil then return end
  local E, Ek, fused = model.embed_dim, model.kv_heads * model.head_dim, model.options.fused
  for _, name in ipairs{ "weight", "bias" } do
    local all = state["qkv." .. name]
    if all and not fused and all:size(1) == E + 2 * Ek then
      state["q." .. name], state["k." .. name] = all:narrow(1, 1, E), all:narrow(1, E + 1, Ek)
      state["v." .. name], state["qkv." .. name] = all:narrow(1, E + Ek + 1, Ek), nil
    elseif fused and state["q." .. name] and state["k." .. name] and state["v." .. name] then
      state["qkv." .. name] = ops.cat({ state["q." .. name], state["k." .. name], state["v." .. name] }, 1)
      state["q." .. name], state["k." .. name], state["v." .. name] = nil, nil, nil
    end
  end
end

-- torchscale writes a shared output layer twice
local function drop_tied(mine, model)
  local head, embedding = mine["head.weight"], mine["embedding.weight"]
  if not model.options.tied or not head then return end
  if not embedding or not head:equal(embedding) then
    fail(OP, "the file's output layer is not its embedding; make the model with tied = false")
  end
  mine["head.weight"] = nil
end

--- Load parameters that another library has written; lac.io.load gives the table.
-- @tparam Module model LongNetLM, LongNetEncoder, LongNetEncoderDecoder or an attention module
-- @tparam table state { name = tensor }
-- @tparam string dialect "torchscale", "darcstar" (attention modules) or "torch" (nn.MultiheadAttention)
-- @treturn Module model
-- @raise what load_state_dict says about names and shapes that do not fit
local function load_foreign(model, state, dialect)
  local d = dialect_of(dialect)
  schema.check(OP, "state", state, { type = "table" })
  local mine = {}
  for name, t in pairs(state) do
    if tensor.is(t) and not (d.ignored and name:find(d.ignored)) then
      local key = ours(d, name)
      if mine[key] then fail(OP, "'%s' of the file is '%s' here, and so is another one", name, key) end
      mine[key] = t
    end
  end
  drop_tied(mine, model)
  grad.no_grad(function()
    if d.interleaved then reorder(mine, model, false) end
    fuse(mine, model)
  end)
  return model:load_state_dict(mine)
end

-- alone: the model is one attention module, whose norm is not a model's last one
local function theirs(dialect, name, alone)
  name = name:gsub("layers%.(%d+)%.", function(i) return ("layers.%d."):format(i - 1) end)
  for _, part in ipairs(dialect.parts) do
    local changed = replaced(name, part[2], part[1])
    if changed and part[1] ~= (alone and "layer_norm." or "inner_attn_ln.") then return changed end
  end
  return name
end

local function check_writable(model, d, dialect)
  local alone = schema.own_field(model, "head_dim") ~= nil
  if not alone and not d.models then
    fail(OP, "dialect '%s' names the parameters of an attention module, got a %s", dialect,
      base.class_name(model))
  end
  if alone and not d.models and model.options.layer_norm then
    fail(OP, "dialect '%s' has no LayerNorm on the merged heads; use layer_norm = false", dialect)
  end
  if dialect == "torch" and not model.options.fused then
    fail(OP, "dialect 'torch' has one projection for q, k and v; use fused = true")
  end
end

--- A model's parameters under another library's names, for lac.io.save.
-- @tparam Module model @tparam string dialect as in load_foreign
-- @treturn table { name = tensor }
local function foreign_state(model, dialect)
  local d = dialect_of(dialect)
  check_writable(model, d, dialect)
  local state, out = model:state_dict(), {}
  if d.interleaved then grad.no_grad(reorder, state, model, true) end
  if model.options.tied then state["head.weight"] = state["embedding.weight"] end
  local both, alone = rawget(model, "encoder") ~= nil, schema.own_field(model, "head_dim") ~= nil
  for name, t in pairs(state) do
    local prefix = both and name:sub(1, 8) ~= "encoder." and "decoder." or ""
    out[prefix .. theirs(d, name, alone)] = t
  end
  return out
end

return { load_foreign = load_foreign, foreign_state = foreign_state }
