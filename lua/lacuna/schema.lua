--- Validation of options, declaratively, and "did you mean".
--
-- Every options table of a public function is described once by a spec { option = rule } and checked before
-- any work is done: an unknown key is an error with the nearest valid one, a value of the wrong type or out
-- of range is an error that shows the value. Nothing is ignored and nothing is coerced except a number that
-- is an integer. A rule is
--
--   { type = "integer", min = 1, max = 10, default = 3 }      or "number"; above and below exclude the bound
--   { type = "boolean", default = false }   { type = "string" }   { type = "function" }   { type = "table" }
--   { one_of = { "mean", "sum" }, default = "mean" }          a string out of a list
--   { type = "integers", min = 1, required = true }           a nonempty list of integers, each in range
--   { type = "tensor" }  { type = "any" }  { check = function(value) return nil or "must be ..." end }
--
-- Several types are a list: { type = { "number", "tensor" } }. The C engine checks again what memory safety
-- needs; this layer exists for the sentence the user reads. Rejected: checks scattered through the functions
-- (they drift apart in wording) and a general JSON-schema interpreter (ten times the code, for rules that
-- nobody here needs).

local lib = require "lacuna.lib"

local schema = {}

-- Optimal string alignment distance: insertions, deletions, substitutions, swaps of neighbours.
local function distance(a, b)
  local m, n = #a, #b
  local before, last, row = {}, {}, {}
  for j = 0, n do last[j] = j end
  for i = 1, m do
    row[0] = i
    for j = 1, n do
      local same = a:byte(i) == b:byte(j)
      local d = math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (same and 0 or 1))
      if i > 1 and j > 1 and a:byte(i) == b:byte(j - 1) and a:byte(i - 1) == b:byte(j) then
        d = math.min(d, before[j - 2] + 1)
      end
      row[j] = d
    end
    before, last, row = last, row, before
  end
  return last[n]
end

--- The candidate that is nearest to `name` by edit distance; ties go to the alphabetically first. One that
-- differs in more than half of the name's letters is no help, and is not given.
-- @tparam string name
-- @tparam table candidates list of strings
-- @treturn string|nil nil when none is near
function schema.nearest(name, candidates)
  local best, best_distance
  local lower = name:lower():sub(1, 64)
  for i = 1, #candidates do
    local candidate = candidates[i]
    local d = distance(lower, candidate:lower())
    -- a prefix or a part of the name is nearer than its length says
    if candidate:lower():find(lower, 1, true) then d = math.min(d, 1.5) end
    if not best or d < best_distance or (d == best_distance and candidate < best) then
      best, best_distance = candidate, d
    end
  end
  if best and best_distance > #lower / 2 then return nil end
  return best
end
lib.nearest = schema.nearest

--- The end of a message about an unknown name: ", did you mean 'mean'?", or "" when none is near.
-- @tparam string name @tparam table candidates list of strings
-- @tparam[opt="'%s'"] string format how the nearest one is written
-- @tparam[opt] table words what to write instead of names that other libraries have (synonyms.lua), or, after
--   a semicolon, that there is no such thing
function schema.hint(name, candidates, format, words)
  local word = words and words[name]
  if word then return word:sub(1, 1) == ";" and word or (", did you mean %s?"):format(word) end
  local nearest = schema.nearest(tostring(name), candidates)
  return nearest and (", did you mean " .. (format or "'%s'") .. "?"):format(nearest) or ""
end

--- A short text for any value, for error messages: 0, nan, 'text', {1, 2, ...}, Tensor f32 [2 x 3] cpu.
function schema.show(value)
  local kind = type(value)
  if kind == "string" then
    return "'" .. (#value > 60 and value:sub(1, 57) .. "..." or value) .. "'"
  elseif kind == "table" then
    local mt = getmetatable(value)
    local describe = type(mt) == "table" and rawget(mt, "__describe")
    if describe then return describe(value) end
    local class = type(mt) == "table" and rawget(mt, "__name")
    if class then return "an object of class " .. class end
    local parts = {}
    for i = 1, math.min(#value, 8) do
      local v = rawget(value, i)
      parts[i] = type(v) == "table" and "{...}" or schema.show(v)
    end
    if #value > 8 then parts[9] = "..." end
    if #value == 0 and next(value) ~= nil then parts[1] = "..." end
    return "{" .. table.concat(parts, ", ") .. "}"
  elseif kind == "number" then
    if value ~= value then return "nan" end
    return ("%.14g"):format(value)
  elseif kind == "nil" or kind == "boolean" then
    return tostring(value)
  end
  return "a " .. kind
end
local show = schema.show
lib.show = show

--- Raise an error with the user's line: schema.fail("attention", "segments[%d] must be positive", 2).
function schema.fail(op, format, ...)
  local text = select("#", ...) > 0 and format:format(...) or format
  lib.fail("%s", op .. ": " .. text)
end
local fail = schema.fail

--- Is x a number without a fraction that fits a double exactly?
function schema.is_integer(x)
  return type(x) == "number" and x == math.floor(x) and x >= -2 ^ 53 and x <= 2 ^ 53
end
local is_integer = schema.is_integer

--- Fail for a name that is not in a list: `unknown merge 'meen', did you mean 'mean'? valid: lse, mean, sum`.
-- `words` as of schema.hint.
function schema.unknown(op, what, name, valid, words)
  local sorted = {}
  for i = 1, #valid do sorted[i] = valid[i] end
  table.sort(sorted)
  if type(name) ~= "string" then
    fail(op, "%s must be one of %s, got %s", what, table.concat(sorted, ", "), show(name))
  end
  local hint = schema.hint(name, sorted, nil, words)
  fail(op, "unknown %s %s%s valid: %s", what, show(name), hint == "" and ";" or hint,
       table.concat(sorted, ", "))
end

--- A copy of a list of names that is empty for a missing one: keys of a table, sorted.
function schema.keys(t)
  local names = {}
  for k in pairs(t) do
    if type(k) == "string" then names[#names + 1] = k end
  end
  table.sort(names)
  return names
end

local ARTICLE = { integer = "an integer", integers = "a list of integers", numbers = "a list of numbers",
                  tensor = "a tensor", number = "a number", boolean = "true or false", string = "a string",
                  table = "a table", ["function"] = "a function" }

local function is_tensor(v)
  if type(v) ~= "table" then return false end
  local mt = getmetatable(v)
  return type(mt) == "table" and rawget(mt, "__describe") ~= nil
end

local function is_list(v, test)
  if type(v) ~= "table" or is_tensor(v) or #v == 0 then return false end
  for i = 1, #v do
    if not test(v[i]) then return false end
  end
  return true
end

local function is_number(v) return type(v) == "number" end

local function matches(kind, v)
  if kind == "any" then return v ~= nil end
  if kind == "integer" then return is_integer(v) end
  if kind == "number" then return type(v) == "number" and v == v end
  if kind == "tensor" then return is_tensor(v) end
  if kind == "table" then return type(v) == "table" and not is_tensor(v) end
  if kind == "integers" or kind == "numbers" then
    return is_list(v, is_number) -- check_list looks at the elements
  end
  return type(v) == kind
end

local function check_range(op, name, rule, v)
  if rule.min and v < rule.min then
    if rule.min == 1 and is_integer(v) then fail(op, "%s must be positive, got %s", name, show(v)) end
    fail(op, "%s must be at least %s, got %s", name, show(rule.min), show(v))
  end
  if rule.max and v > rule.max then
    fail(op, "%s must be at most %s, got %s", name, show(rule.max), show(v))
  end
  if rule.above and v <= rule.above then
    fail(op, "%s must be above %s, got %s", name, show(rule.above), show(v))
  end
  if rule.below and v >= rule.below then
    fail(op, "%s must be below %s, got %s", name, show(rule.below), show(v))
  end
end

local function check_list(op, name, rule, v, kind)
  for i = 1, #v do
    if v[i] ~= v[i] or (kind == "integers" and not is_integer(v[i])) then
      fail(op, "%s[%d] must be %s, got %s", name, i, kind == "integers" and "an integer" or "a number",
           show(v[i]))
    end
    check_range(op, ("%s[%d]"):format(name, i), rule, v[i])
  end
  for k in pairs(v) do
    if not is_integer(k) or k < 1 or k > #v then
      fail(op, "%s must be a plain list, it has the key %s", name, show(k))
    end
  end
end

--- Check one value against one rule; raises on failure.
-- @tparam string op the name that starts the message
-- @tparam string name of the option or argument
-- @param v the value, not nil
-- @tparam table rule see the top of this file
function schema.check(op, name, v, rule)
  if rule.one_of then
    for i = 1, #rule.one_of do
      if rule.one_of[i] == v then return end
    end
    schema.unknown(op, name, v, rule.one_of)
  end
  local kinds = rule.type
  if kinds then
    if type(kinds) == "string" then kinds = { kinds } end
    local found
    for i = 1, #kinds do
      if matches(kinds[i], v) then
        found = kinds[i]
        break
      end
    end
    if not found then
      local texts = {}
      for i = 1, #kinds do texts[i] = ARTICLE[kinds[i]] or kinds[i] end
      if type(v) == "table" and not is_tensor(v) and #v == 0 and next(v) == nil
        and (kinds[1] == "integers" or kinds[1] == "numbers") then
        fail(op, "%s must not be empty", name)
      end
      fail(op, "%s must be %s, got %s", name, table.concat(texts, " or "), show(v))
    end
    if found == "integer" or found == "number" then check_range(op, name, rule, v) end
    if found == "integers" or found == "numbers" then check_list(op, name, rule, v, found) end
  end
  if rule.check then
    local complaint = rule.check(v)
    if complaint then fail(op, "%s %s, got %s", name, complaint, show(v)) end
  end
end

-- Lists of numbers are copied: the script may write into its own, and a default is everybody's.
local function own_list(value)
  if type(value) ~= "table" or getmetatable(value) ~= nil or type(value[1]) ~= "number" then return value end
  local list = {}
  for i = 1, #value do list[i] = value[i] end
  return list
end

--- Is there a table of options? For what looks into it before schema.options does.
function schema.expect_options(op, options)
  if type(options) ~= "table" or is_tensor(options) then
    fail(op, "options must be a table, got %s", show(options))
  end
end

--- Check an options table against a spec and fill in defaults.
-- @tparam string op the name that starts messages
-- @tparam table|nil options what the user passed; nil counts as empty
-- @tparam table spec { name = rule }
-- @treturn table a new table with every given option and default
function schema.options(op, options, spec)
  if options == nil then options = {} end
  schema.expect_options(op, options)
  -- in the order of the names, so that of two mistakes always the same one is reported
  local given, n = {}, 0
  for name, v in pairs(options) do
    if type(name) ~= "string" then
      fail(op, "options are given by name, got %s at [%s]; valid: %s", show(v), show(name),
           table.concat(schema.keys(spec), ", "))
    end
    n = n + 1
    given[n] = name
  end
  if n > 1 then table.sort(given) end
  local result = {}
  for i = 1, n do
    local name = given[i]
    local rule = spec[name]
    if not rule then schema.unknown(op, "option", name, schema.keys(spec)) end
    schema.check(op, name, options[name], rule)
    result[name] = own_list(options[name])
  end
  local missing
  for name, rule in pairs(spec) do
    if result[name] == nil then
      if rule.required and (not missing or name < missing) then missing = name end
      result[name] = own_list(rule.default)
    end
  end
  if missing then fail(op, "%s is required", missing) end
  return result
end

local described = setmetatable({}, { __mode = "k" }) -- function -> the rules of its options

--- Tell help which options a function takes (or a class: its init): it lists them with their defaults.
function schema.describe(f, spec) described[f] = spec end

local function literal(value)
  if type(value) == "string" then return '"' .. value .. '"' end
  return show(value)
end

-- causal = false, align = "start" | "end", window (an integer)
local function rule_text(name, rule)
  if rule.one_of then
    local list = {}
    for _, value in ipairs(rule.one_of) do
      table.insert(list, value == rule.default and 1 or #list + 1, literal(value))
    end
    return name .. (rule.default == nil and ": " or " = ") .. table.concat(list, " | ")
  end
  if rule.default ~= nil then return ("%s = %s"):format(name, literal(rule.default)) end
  local kinds = {}
  for i, kind in ipairs(type(rule.type) == "table" and rule.type or { rule.type }) do
    kinds[i] = ARTICLE[kind] or kind
  end
  return kinds[1] and kinds[1] ~= "any" and ("%s (%s)"):format(name, table.concat(kinds, " or ")) or name
end

--- The options that schema.describe was told, as two lists of texts or nil: the required ones, and the others
-- with their defaults (of several values the default is the first; without one the option is left out).
function schema.described(f)
  local spec = described[f]
  if not spec then return nil end
  local required, others = {}, {}
  for _, name in ipairs(schema.keys(spec)) do
    local list = spec[name].required and required or others
    list[#list + 1] = rule_text(name, spec[name])
  end
  return required, others
end

-- ---- fields of objects ------------------------------------------------------------------------------------

local complete = setmetatable({}, { __mode = "k" }) -- objects whose init has ended

--- Put fields that init has decided for good where a write to them is seen: Lua tells __newindex of fields
-- only that are not in the object. Reads go on as before (class.lua, nn/module.lua).
-- @tparam table object @tparam string names of the fields, with blanks between
function schema.settle(object, names)
  local settled = rawget(object, "_settled") or {}
  for name in names:gmatch "%S+" do
    local value = rawget(object, name)
    if value ~= nil then settled[name] = value end
    rawset(object, name, nil)
  end
  rawset(object, "_settled", settled)
end

--- A field that an object has itself, settled or not; nil without one.
function schema.own_field(object, name)
  local value, settled = rawget(object, name), rawget(object, "_settled")
  if value == nil and settled then return settled[name] end
  return value
end

--- The error of a write to a field that is settled.
-- @tparam string op @param key @tparam string advice the end of the message: what to do instead
function schema.refuse_settled(op, key, advice)
  fail(op, "'%s' was settled when it was made, and writing it would change nothing%s", tostring(key), advice)
end

--- Make it an error to write a field that the objects of a class do not have, attn.causal = true, or that
-- init has settled, attn.variant = "dense": neither would change anything. A method may be replaced.
-- @tparam table cls
-- @tparam function advice of the object and the key: the end of the message
-- @tparam[opt] string settled names of the fields that writing does not change, with blanks between
function schema.refuse_new_fields(cls, advice, settled)
  cls.__settles = settled
  function cls.__newindex(object, key, value)
    if complete[object] then
      local class, own = getmetatable(object), rawget(object, "_settled")
      local name = rawget(class, "__name")
      if own and own[key] ~= nil then schema.refuse_settled(name, key, advice(object, key)) end
      if class[key] == nil or type(value) ~= type(class[key]) then
        fail(name, "there is no field '%s' to set%s", tostring(key), advice(object, key))
      end
    end
    rawset(object, key, value)
  end
end

--- A __newindex for a module's table: a script may add functions and tables, while a number or a text is an
-- option that it means to set, and nothing would read it.
-- @tparam string name of the module
function schema.refuse_values(name)
  return function(t, key, value)
    if type(value) ~= "function" and type(value) ~= "table" then
      lib.fail("there is no %s.%s to set", name, tostring(key))
    end
    rawset(t, key, value)
  end
end

--- For the end of such an object's init.
function schema.complete(object)
  local names = getmetatable(object).__settles
  if names then schema.settle(object, names) end
  complete[object] = true
end

return schema
