--- nn/module.lua: what every part of a model is.
--
-- A module is a Lua table with named parameters, buffers and children, in the order in which `init` made
-- them; that order is the order of parameters(), of state dicts and of the printed tree, so nothing depends
-- on hash order. There is no backward: the tape differentiates `forward`. A new kind of module is a dozen
-- lines of a script:
--
--   local Gate = nn.module("Gate")
--   function Gate:init(width)
--     self.project = nn.Linear(width, width)            -- a child: assigning it is enough
--     self:param("bias", lac.zeros{width}, "bias")      -- a parameter
--   end
--   function Gate:forward(x) return x * (self.project(x) + self.bias):sigmoid() end
--
-- Strict where mistakes hide: reading or (after init) writing a field that does not exist is an error with
-- the nearest name, and so is writing one that init has settled, such as model.context; assigning a bare
-- tensor is an error that says param or buffer, because a tensor that the optimizer never sees is the
-- commonest silent bug of such libraries; a state dict must fit exactly, and every misfit is listed at once.
-- Errors raised inside a forward carry the path to the module (lib.frame_name reads it off the call stack).
-- Rejected: hooks around forward (a script can wrap a method), copying on assignment, hash-ordered children.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local synonyms = require "lacuna.synonyms"
local arguments = require "lacuna.arguments"
local class = require "lacuna.class"
local config = require "lacuna.config"
local device = require "lacuna.device"
local tensor = require "lacuna.tensor"
local grad = require "lacuna.grad"

local C = lib.C
local fail, show = schema.fail, schema.show

local Module = class("Module")
Module.__about = { "", "The parent of every module; nn.module(name) makes a class of one's own." }
local KINDS = { weight = true, bias = true, norm = true, embedding = true }
local SHOWN = 8 -- problems listed in one error

--- Is v a module (not a class of modules)?
local function is_module(v) return type(v) == "table" and rawget(v, "_params") ~= nil and rawget(v,
  "_children") ~= nil end

local function class_name(m) return rawget(getmetatable(m), "__name") end

local function has(list, name)
  for i = 1, #list do
    if list[i] == name then return true end
  end
  return false
end

-- ---- fields -----------------------------------------------------------------------------------------------

local function field_names(object)
  local names, cls = {}, getmetatable(object)
  while cls do
    for _, name in ipairs(schema.keys(cls)) do
      if name:sub(1, 1) ~= "_" then names[#names + 1] = name end
    end
    cls = rawget(cls, "__parent")
  end
  for _, fields in ipairs{ object, rawget(object, "_settled") } do
    for _, name in ipairs(schema.keys(fields)) do
      if name:sub(1, 1) ~= "_" then names[#names + 1] = name end
    end
  end
  return names
end

-- how a script calls the class: those of nn say what they settle
local function maker(object)
  return (rawget(getmetatable(object), "__settles") and "nn." or "") .. class_name(object)
end

-- for a field that only another module can have otherwise; nil: it is no option
local function remedy(object, key)
  local options = schema.own_field(object, "options")
  if not config.is(options) then return nil end
  if key == "options" then key = "option" elseif options[key] == nil then return nil end
  return ("; make another: %s(m.options:with{ %s = ... })"):format(maker(object), key)
end

--- The options of a module as a configuration, which it was made of for good: config.expect_settled.
local function settled_options(self, kind, options)
  return config.settle(class_name(self), "options", config.wrap(kind, options),
    maker(self) .. "(m.options:with{ %s })")
end

local function no_field(object, key, verb)
  fail(class_name(object), "there is no field '%s'%s%s", tostring(key), verb,
    verb ~= "" and remedy(object, key) or schema.hint(key, field_names(object), nil, synonyms.module))
end

local function check_new_name(self, name)
  if type(name) ~= "string" or not name:match("^[%a_][%w_]*$") then
    fail(class_name(self), "a parameter, buffer or child needs a name of letters, digits and _, got %s",
      show(name))
  end
  if schema.own_field(self, name) ~= nil or Module[name] ~= nil then
    fail(class_name(self), "the name '%s' is taken", name)
  end
end

local function new_field(self, key, value)
  local settled = rawget(self, "_settled")
  if settled and settled[key] ~= nil then
    schema.refuse_settled(class_name(self), key, remedy(self, key)
      or ("; make another %s"):format(class_name(self)))
  end
  if is_module(value) then return self:child(key, value) end
  if tensor.is(value) then
    fail(class_name(self), "assign tensors with self:param(\"%s\", t, kind) if they are trained, "
      .. "self:buffer(\"%s\", t) if they are only saved", tostring(key), tostring(key))
  end
  if rawget(self, "_sealed") then no_field(self, key, " to set") end
  if type(value) == "table" and not getmetatable(value) then
    for _, one in next, value do -- parameters() and state_dict() do not look into tables
      if is_module(one) then
        fail(class_name(self), "'%s' is a table of modules, which would not be trained or saved; use "
          .. "nn.ModuleList{ ... }, or self:child(name, module) for each", tostring(key))
      elseif tensor.is(one) and one.requires_grad then
        fail(class_name(self), "'%s' is a table of tensors that require gradients, which would not be "
          .. "trained or saved; use self:param(name, t, kind) for each", tostring(key))
      end
    end
  end
  rawset(self, key, value)
end

local function step(self) return rawget(self, "_label") or class_name(self) end

-- forward's results pass through a call, so that this frame is on the stack while forward runs (see
-- lib.frame_name)
local function pass(...) return ... end

-- A field that is there is written without a word from Lua: what was written to these is found out here.
local function expect_sound(self)
  local children = self._children
  for i = 1, #children do
    local child = rawget(self, children[i])
    if not is_module(child) then
      fail(class_name(self), "child '%s' must stay a module, it was set to %s%s", children[i], show(child),
        remedy(self, children[i]) or "")
    end
  end
  local training = rawget(self, "training")
  if training ~= true and training ~= false then
    fail(class_name(self), "training must be true or false, it was set to %s", show(training))
  end
end

local function call(self, ...)
  expect_sound(self)
  return pass(self:forward(...))
end

lib.frame_name(call, step)

--- Make a module class. Define `init` (runs once; fields made there are the only ones) and `forward` in it.
-- @tparam string name shown in printed trees and errors
-- @tparam[opt] table parent another module class
-- @tparam[opt] string settled names of the fields that writing after init would not change, with blanks
--   between: such a write is an error
-- @treturn table the class: call it to make a module
local function define(name, parent, settled)
  schema.check("nn.module", "name", name, { type = "string" })
  if settled ~= nil then schema.check("nn.module", "settled", settled, { type = "string" }) end
  local is_class = type(parent) == "table" and rawget(parent, "__name") and parent.parameters ~= nil
  if parent ~= nil and not is_class then
    fail("nn.module", "parent must be a class of modules, got %s", show(parent))
  end
  local cls = class(name, parent or Module)
  cls.__settles = settled
  cls.__index = function(object, key)
    local value = cls[key]
    if value ~= nil then return value end
    local own = rawget(object, "_settled")
    if own and own[key] ~= nil then return own[key] end
    if type(key) == "string" and key:sub(1, 1) == "_" then return nil end
    no_field(object, key, "")
  end
  cls.__newindex = new_field
  cls.__call = call
  cls.__tostring = Module.__tostring
  local meta = getmetatable(cls)
  meta.__call = function(_, ...)
    arguments.for_class(cls, ...)
    local object = setmetatable({ _params = {}, _buffers = {}, _children = {}, _kinds = {},
      training = true }, cls)
    local init = cls.init
    if init then init(object, ...) end
    local names = cls.__settles
    if names then schema.settle(object, names) end
    rawset(object, "_sealed", true)
    return object
  end
  return cls
end

--- Name every frame of a method in error paths, as the frames of a module call are (for entry points such as
-- `loss`).
local function entry_point(f) lib.frame_name(f, step) end

-- Where a parameter is a field, left in the tensor: an optimizer asks whether it still is. The module is held
-- weakly, as a tensor must not keep its model alive, and behind a function, where no scope looks for tensors.
local WEAK = { __mode = "v" }
local function put_home(t, module, name)
  local home = rawget(t, "parameter")
  if home then
    local m, n = home()
    if m == module and n == name then return end
  end
  local held = setmetatable({ module }, WEAK)
  t.parameter = function() return held[1], name end
end

-- ---- building ---------------------------------------------------------------------------------------------

--- Declare a parameter: it is trained, saved and moved.
-- @tparam string name
-- @tparam Tensor t a leaf; requires_grad is switched on
-- @tparam[opt] string kind "weight" (default), "bias", "norm" or "embedding": what weight decay goes by
-- @treturn Tensor t
function Module:param(name, t, kind)
  check_new_name(self, name)
  tensor.expect(class_name(self), name, t)
  kind = kind or "weight"
  if not KINDS[kind] then schema.unknown(class_name(self), "kind of parameter", kind, schema.keys(KINDS)) end
  if t.node then
    fail(class_name(self), "parameter '%s' must be a leaf, but %s was computed from others: detach() it",
      name, show(t))
  end
  t:requires_grad_(true)
  C.lac_tensor_role(t.c, C.LAC_ROLE_PARAMETER)
  self._params[#self._params + 1] = name
  self._kinds[name] = kind
  rawset(self, name, t)
  put_home(t, self, name)
  return t
end

--- Declare a buffer: saved and moved, not trained.
function Module:buffer(name, t)
  check_new_name(self, name)
  tensor.expect(class_name(self), name, t)
  self._buffers[#self._buffers + 1] = name
  rawset(self, name, t)
  return t
end

--- Declare a child; the same as assigning a module to a field.
function Module:child(name, module)
  check_new_name(self, name)
  if not is_module(module) then fail(class_name(self), "child '%s' must be a module, got %s", name,
    show(module)) end
  self._children[#self._children + 1] = name
  rawset(self, name, module)
  if not rawget(module, "_label") then module:relabel(name) end
  return module
end

--- What error paths call this module; a list passes it on to its items as name[1], name[2], ...
function Module:relabel(name) rawset(self, "_label", name) end

--- Children as a list of { name, module }. Containers with numbered children override this.
function Module:children()
  if not is_module(self) then
    fail(class_name(self), "was made by lac.class, so nothing knows its parameters; nn.module('%s') makes "
      .. "the class of a module", class_name(self))
  end
  local list = {}
  for i, name in ipairs(self._children) do
    local child = rawget(self, name)
    if not is_module(child) then
      fail(class_name(self), "child '%s' must stay a module, it was set to %s", name, show(child))
    end
    list[i] = { name, child }
  end
  return list
end

function Module:forward(...) -- luacheck: ignore 212
  fail(class_name(self), "has no forward method")
end

-- ---- walking ----------------------------------------------------------------------------------------------

local function walk(module, prefix, visit)
  local children = module:children()
  visit(module, prefix)
  for _, pair in ipairs(children) do walk(pair[2], prefix .. pair[1] .. ".", visit) end
end

--- Every module of the tree with its dotted path ("" for the root), parents first.
-- @treturn table list of { path =, module = }
function Module:modules()
  local list = {}
  walk(self, "", function(m, prefix) list[#list + 1] = { path = prefix:sub(1, -2), module = m } end)
  return list
end

--- Every parameter once, in order; a tensor shared by two modules appears under its first name.
-- @treturn table list of { name = "layers.1.attention.q.weight", tensor =, kind =, module = }
function Module:parameter_list()
  local list, seen = {}, {}
  walk(self, "", function(m, prefix)
    for _, name in ipairs(m._params) do
      local t = rawget(m, name)
      tensor.expect(class_name(m), name, t)
      if not seen[t] then
        seen[t] = true
        put_home(t, m, name)
        list[#list + 1] = { name = prefix .. name, tensor = t, kind = m._kinds[name], module = m }
      end
    end
  end)
  return list
end

--- Parameters as a plain list of tensors.
function Module:parameters()
  local list = {}
  for i, p in ipairs(self:parameter_list()) do list[i] = p.tensor end
  return list
end

--- Iterate: for name, tensor in model:named_parameters() do ... end
function Module:named_parameters()
  local list, i = self:parameter_list(), 0
  return function()
    i = i + 1
    if list[i] then return list[i].name, list[i].tensor end
  end
end

--- Number of trained values; shared tensors count once.
function Module:parameter_count()
  local n = 0
  for _, p in ipairs(self:parameter_list()) do n = n + p.tensor:numel() end
  return n
end

--- Call fn(module, path) on every module, parents first.
-- @treturn Module self
function Module:apply(fn)
  schema.check(class_name(self), "apply: fn", fn, { type = "function" })
  for _, m in ipairs(self:modules()) do fn(m.module, m.path) end
  return self
end

--- Training mode: dropout is on. @tparam[opt] boolean on default true
-- @treturn Module self
function Module:train(on)
  if on == nil then on = true end
  schema.check(class_name(self), "train: on", on, { type = "boolean" })
  return self:apply(function(m) rawset(m, "training", on) end)
end

--- Evaluation mode: dropout is off.
function Module:eval() return self:train(false) end

--- Forget all gradients.
function Module:zero_grad()
  for _, p in ipairs(self:parameter_list()) do p.tensor.grad = nil end
  return self
end

--- Another dtype or device for every parameter and (floating-point) buffer. The tensors are replaced, sharing
-- is kept, gradients are dropped: make the optimizer afterwards.
-- @tparam table|string options dtype, device, or just the name of one
-- @treturn Module self
function Module:to(options)
  if type(options) == "string" then options = device.target(options) end
  local o = schema.options(class_name(self) .. ".to", options, { dtype = { type = "string" },
    device = { type = "string" } })
  if o.dtype and not device.is_float(device.dtype(class_name(self) .. ".to", o.dtype)) then
    fail(class_name(self) .. ".to", "parameters are floating-point numbers, got dtype '%s'", o.dtype)
  end
  local moved = {}
  local function move(t, trained)
    if not moved[t] then
      local target = { device = o.device, dtype = device.is_float(t.c.dtype) and o.dtype or nil }
      local new = t:detach():to(target)
      if new.root == t.root then new = new:clone() end
      if trained then new:requires_grad_(t.requires_grad) end
      moved[t] = new
    end
    return moved[t]
  end
  grad.no_grad(function()
    for _, m in ipairs(self:modules()) do
      for _, name in ipairs(m.module._params) do rawset(m.module, name, move(rawget(m.module, name),
        true)) end
      for _, name in ipairs(m.module._buffers) do rawset(m.module, name, move(rawget(m.module, name),
        false)) end
    end
  end)
  return self
end

-- a copy of anything that a module can hold; `seen` keeps sharing as it is
local function copy_of(value, seen)
  if type(value) ~= "table" then return value end
  if seen[value] then return seen[value] end
  if tensor.is(value) then
    seen[value] = value:detach():clone():requires_grad_(value.requires_grad)
    return seen[value]
  end
  local mt = getmetatable(value)
  if mt and not is_module(value) then
    seen[value] = type(value.clone) == "function" and value:clone() or value -- a value that does not change
    return seen[value]
  end
  local copy = setmetatable({}, mt)
  seen[value] = copy
  for key, field in next, value do rawset(copy, key, copy_of(field, seen)) end
  return copy
end

--- A deep copy: tensors of its own with the same values (no gradients), the same mode, sharing kept.
-- @treturn Module
function Module:clone()
  local copy = grad.no_grad(copy_of, self, {})
  for _, m in ipairs(copy:modules()) do
    for name, kind in pairs(m.module._kinds) do
      if kind then C.lac_tensor_role(rawget(m.module, name).c, C.LAC_ROLE_PARAMETER) end
    end
  end
  return copy
end

-- ---- state ------------------------------------------------------------------------------------------------

--- All parameters and buffers by dotted name: the tensors themselves, detached views of them. A shared tensor
-- appears once, under its first name.
-- @treturn table { name = tensor }
function Module:state_dict()
  local state, seen = {}, {}
  walk(self, "", function(m, prefix)
    for _, list in ipairs{ m._params, m._buffers } do
      for _, name in ipairs(list) do
        local t = rawget(m, name)
        tensor.expect(class_name(m), name, t)
        if not seen[t] then
          seen[t] = true
          state[prefix .. name] = t:detach()
        end
      end
    end
  end)
  return state
end

local function first_of(list)
  local shown = {}
  for i = 1, math.min(#list, SHOWN) do shown[i] = list[i] end
  if #list > SHOWN then shown[SHOWN + 1] = ("and %d more"):format(#list - SHOWN) end
  return table.concat(shown, ", ")
end

-- what is wrong with a state dict, as sentences
local function misfits(own, state)
  local missing, unexpected, shapes, problems = {}, {}, {}, {}
  local own_names, given_names = schema.keys(own), schema.keys(state)
  for _, name in ipairs(own_names) do
    local given = state[name]
    if given == nil then
      missing[#missing + 1] = name
    elseif not tensor.is(given) then
      shapes[#shapes + 1] = ("%s (not a tensor but %s)"):format(name, show(given))
    elseif not tensor.same_shape(own[name], given) then
      shapes[#shapes + 1] = ("%s (here %s, given %s)")
        :format(name, tostring(own[name]:size()), tostring(given:size()))
    end
  end
  for key in pairs(state) do
    if type(key) ~= "string" then unexpected[#unexpected + 1] = show(key) end
  end
  for _, name in ipairs(given_names) do
    if own[name] == nil then
      local near = schema.nearest(name, #missing > 0 and missing or own_names)
      unexpected[#unexpected + 1] = near and ("%s (did you mean '%s'?)"):format(name, near) or name
    end
  end
  if #missing > 0 then problems[#problems + 1] = ("%d missing: %s"):format(#missing, first_of(missing)) end
  if #unexpected > 0 then problems[#problems + 1] = ("%d unexpected: %s"):format(#unexpected,
    first_of(unexpected)) end
  if #shapes > 0 then problems[#problems + 1] = ("%d of another shape: %s"):format(#shapes,
    first_of(shapes)) end
  return problems, #missing, #unexpected, #shapes
end

--- Copy values into the parameters and buffers; values of another dtype are converted. Checked as a whole
-- first: on an error nothing has changed. All that lac.io.load returns may follow `self`.
-- @tparam table state { name = tensor }, as state_dict or lac.io.load gives it
-- @tparam[opt] table options strict = true; false allows missing and unexpected names (not other shapes)
-- @treturn Module self
-- @raise one sentence that lists missing and unexpected names (with the nearest) and shapes that differ
function Module:load_state_dict(state, options, more)
  local io = package.loaded["lacuna.io"]
  if io and io._is_metadata(options) then options, more = nil, nil end
  if more ~= nil then
    arguments.refuse(class_name(self) .. ".load_state_dict", { "self", "state", "options" }, 2, more)
  end
  local o = schema.options("load_state_dict", options, { strict = { type = "boolean", default = true } })
  schema.check("load_state_dict", "state", state, { type = "table" })
  local own = self:state_dict()
  local problems, _, _, shapes = misfits(own, state)
  if #problems > 0 and (o.strict or shapes > 0) then
    fail("load_state_dict", "the state does not fit %s: %s", class_name(self), table.concat(problems, "; "))
  end
  for name, t in pairs(own) do
    if state[name] then
      lib.call(C.lac_copy, tensor.is(state[name]) and state[name].c, t.c)
      tensor.touch(t)
    end
  end
  return self
end

-- ---- attention of a model ---------------------------------------------------------------------------------

--- What every attention of the model does at n positions; equal ones are explained once.
-- @tparam integer n @tparam[opt] table sizes as in the explain of lac.attention: batch, m, as = "text" |
--   "table"
-- @treturn string|table as a table a list of { paths =, explained = the table of lac.attention }
function Module:explain(n, sizes)
  local list, by_text = {}, {}
  for _, m in ipairs(self:modules()) do
    if m.module.explain ~= Module.explain then
      local text = tostring(m.module)
      if not by_text[text] then
        by_text[text] = { paths = {}, explained = m.module:explain(n, sizes) }
        list[#list + 1] = by_text[text]
      end
      table.insert(by_text[text].paths, m.path)
    end
  end
  if #list == 0 then fail(class_name(self), "there is no attention in it to explain") end
  if sizes and sizes.as == "table" then return list end
  local texts = {}
  for i, one in ipairs(list) do
    local more = #one.paths > 1 and (" and %d more like it"):format(#one.paths - 1) or ""
    texts[i] = ("%s%s:\n%s"):format(one.paths[1], more, one.explained)
  end
  return table.concat(texts, "\n")
end

-- ---- printing ---------------------------------------------------------------------------------------------

--- What stands between the parentheses of the printed name, e.g. "10 -> 5".
function Module.extra() return "" end

-- equal neighbours of a container are folded into one line: (1-6): 6 x Block
local function tree(module, indent)
  local head = class_name(module)
  local extra, children = module:extra(), module:children()
  if #children == 0 then return ("%s(%s)"):format(head, extra) end
  local lines, i = { head .. "(" .. extra }, 1
  while i <= #children do
    local text = tree(children[i][2], indent .. "  ")
    local j = i
    while type(children[i][1]) == "number" and children[j + 1] and tree(children[j + 1][2], indent
      .. "  ") == text do
      j = j + 1
    end
    local label = j > i and ("(%d-%d): %d x "):format(i, j, j - i + 1)
      or ("(%s): "):format(tostring(children[i][1]))
    lines[#lines + 1] = indent .. "  " .. label .. text
    i = j + 1
  end
  return table.concat(lines, "\n") .. "\n" .. indent .. ")"
end

function Module:__tostring() return tree(self, "") end

return { Module = Module, define = define, is_module = is_module, entry_point = entry_point,
  class_name = class_name, settled_options = settled_options,
  expect_sound = expect_sound, has = has }
