--- What a value is for, read off the comments of the source: the session's help(lac.randn), help "softmax".
--
-- A function knows the file and line where it was written, and in this library the comment above that line is
-- its reference (the one that `make docs` prints). So help reads that file when it is asked, and a script's
-- own functions have help like ours if they carry a comment. The arguments come from the function itself. A
-- class is explained by the comment of its `init`, one of many that a function makes by its field `__about`
-- ({ arguments, a sentence }). Operators of one form (sum, mean, max) are made by one
-- function, each call of which has a comment: those are found by the name in the call. Elementwise ones are
-- made in a loop out of c/maps.def, and that is what is said of them.
--
-- Rejected: texts registered at load (memory and start-up time for everybody, for what few read), and a
-- generated file of texts (it is one more thing that can be old).

local arguments = require "lacuna.arguments"
local formulas = require "lacuna.formulas"
local schema = require "lacuna.schema"
local synonyms = require "lacuna.synonyms"
local tensor = require "lacuna.tensor"

local help = {}

-- code between a comment and the line of its function: a record's first lines, never a blank, an `end` or
-- another function
local REACH = 4
local LINE = 80 -- letters of a sentence in a list
local EXAMPLE = "  For example:\n" -- what begins the last part of a comment; the options come before
local WIDTH = 110 -- letters of a line

-- ---- names ----------------------------------------------------------------------------------------

-- what a loaded table calls the value; raw, so that nothing is loaded or run
local function name_in(t, value, prefix)
  local found
  for name, field in next, t do
    if field == value and type(name) == "string" and (not found or name < found) then found = name end
  end
  return found and prefix .. found
end

-- lac.log is the logarithm
local function prefix(upper) return upper == "log" and "lacuna.log." or "lac." .. upper .. "." end

local UPPER = { "nn", "optim", "io", "data", "train", "log", "plot", "bench", "attention", "attention.masks",
                "optim.schedule", "config" }

local function name_of(value)
  local lac = package.loaded["lacuna"]
  local name = lac and (name_in(lac, value, "lac.") or name_in(getmetatable(lac).__settings, value, "lac."))
    or name_in(tensor.methods, value, "x:")
  for i = 1, name and 0 or #UPPER do
    local t = package.loaded["lacuna." .. UPPER[i]]
    name = name or type(t) == "table" and name_in(t, value, prefix(UPPER[i]))
  end
  return name
end

-- several operators that one line of a loop has made
local function is_shared(info)
  local n = 0
  for _, f in next, tensor.methods do
    if type(f) == "function" then
      local other = debug.getinfo(arguments.inner(f), "S")
      if other.source == info.source and other.linedefined == info.linedefined then n = n + 1 end
    end
  end
  return n > 2
end

-- ---- comments -------------------------------------------------------------------------------------

local function lines_of(path)
  local file = io.open(path, "rb")
  if not file then return nil end
  local list = {}
  for line in file:lines() do list[#list + 1] = line end
  file:close()
  return list
end

-- the comment that belongs to line `at`, without its dashes, or nil
local function comment_above(lines, at)
  local last = at - 1
  while last > 0 and last >= at - REACH and not lines[last]:match "^%s*%-%-" do
    local line = lines[last]
    if line:match "^%s*$" or line:match "^%s*end" or line:match "function" then return nil end
    last = last - 1
  end
  local block, i = {}, last
  while i > 0 and lines[i]:match "^%s*%-%-" do
    table.insert(block, 1, (lines[i]:gsub("^%s*%-%-+ ?", "")))
    if lines[i]:match "^%s*%-%-%-" then return block end
    i = i - 1
  end
  return i < last and not (block[1] or ""):match "^%-" and block or nil
end

-- the comment of the call that made an operator of this name: define_reduction("sum", or name = "roll"
local function comment_of_name(lines, name)
  for at, line in ipairs(lines) do
    if line:match '^[%w_.]+%s*%(?%s*"([%w_]+)"' == name or line:match 'name = "([%w_]+)"' == name then
      local block = comment_above(lines, at)
      if block then return block end
    end
  end
end

local function colon(text) return text ~= "" and ": " .. text or "" end

-- `@tparam[opt] table options text` -> `options (table, optional): text`, opt=3 -> `default 3`
local TAGS = {
  tparam = function(rest, optional)
    local kind, name, text = rest:match "^(%S+)%s+(%S+)%s*(.*)$"
    return kind and ("%s (%s%s)%s"):format(name, kind, optional, colon(text)) or rest
  end,
  param = function(rest) return (rest:gsub("^(%S+)%s+", "%1: ")) end,
  treturn = function(rest) return "returns " .. rest:gsub("^(%S+)%s+", "%1: ") end,
  ["return"] = function(rest) return "returns " .. rest end,
  raise = function(rest) return "raises " .. rest end,
}

local function tag_text(line)
  if line == "@usage" then return "For example:\n" end
  local tag, flag, rest = line:match "^@(%a+)(%[?[^%]%s]*%]?)%s+(.*)$"
  if not tag or not TAGS[tag] then return line end
  local default = flag:match "^%[opt=(.*)%]$"
  return TAGS[tag](rest, default and ", default " .. default or flag:find "opt" and ", optional" or "")
end

local function tidy(block)
  local out = {}
  for _, line in ipairs(block) do
    for part in (line:gsub("%s+(@t?param)", "\n%1"):gsub("%s+(@t?return)", "\n%1") .. "\n"):gmatch "(.-)\n" do
      if part ~= "" or #out > 0 then out[#out + 1] = "  " .. tag_text(part) end
    end
  end
  return out
end

-- ---- functions and classes ------------------------------------------------------------------------

local function signature(f, from)
  local count, all = arguments.of(f)
  local names = {}
  for i = from, #all do
    if all[i] ~= "more" then names[#names + 1] = all[i] end -- what is one argument too many, to be refused
  end
  if count == math.huge then names[#names + 1] = "..." end
  return "(" .. table.concat(names, ", ") .. ")"
end

-- how an operator is called with its arguments by name
local function by_name(op)
  local names = arguments.named(op)
  local list = ("{ %s = ... }"):format(table.concat({ unpack(names, 2) }, " = ..., "))
  return tensor.methods[op] and ("x:%s%s"):format(op, list) or ("lac.%s(%s, %s)"):format(op, names[1], list)
end

-- a list in lines of at most WIDTH letters
local function add_list(out, head, list)
  local line = head
  for i, item in ipairs(list) do
    local text = " " .. item .. (i < #list and "," or "")
    if #line + #text > WIDTH and line ~= head then
      out[#out + 1] = line
      line = "   "
    end
    line = line .. text
  end
  if #list > 0 then out[#out + 1] = line end
end

-- the options of a function or a class, from the rules that check them
local function add_options(out, f)
  local required, others = schema.described(f)
  if not required then return end
  add_list(out, "  Required:", required)
  add_list(out, "  Defaults:", others)
end

-- heading and comment of a function; from: its first argument that is shown
local function about_function(f, name, from)
  f = arguments.inner(f)
  local info = debug.getinfo(f, "S")
  if info.what == "C" then return name and name .. ": a function of C" end
  local out = { (name or "function") .. signature(f, from) }
  local path = info.source:match "^@(.*)$"
  local lines = path and lines_of(path) or {}
  local block = not is_shared(info) and comment_above(lines, info.linedefined)
    or name and comment_of_name(lines, name:match "[%w_]+$")
  local plain = not block and name and name:match "([%w_]+)_$"
  if plain then block = comment_of_name(lines, plain) or { "As " .. plain .. ", in place." } end
  local map = not block and path and path:match "ops/map%.lua$" and name and name:match "[%w_]+$"
  if formulas.text[map] then
    if formulas.arguments[map] then out[1] = name .. formulas.arguments[map] end
    block = { "Elementwise: " .. formulas.text[map] .. ".", "Any strides, broadcasting." }
  end
  local example = false
  for _, line in ipairs(block and tidy(block) or {}) do
    if line == EXAMPLE then
      add_options(out, f)
      example = true
    end
    out[#out + 1] = line
  end
  if not example then add_options(out, f) end
  local op = name and name:match "^lac%.([%w_]+)$" or name and name:match "^x:([%w_]+)$"
  if op and arguments.named(op) then out[#out + 1] = "  By name: " .. by_name(op) end
  if not block then out[#out + 1] = ("  no comment at %s:%d"):format(info.short_src, info.linedefined) end
  return table.concat(out, "\n")
end

local function about_class(cls, name)
  name = name or name_of(cls) or rawget(cls, "__name")
  local init, about = cls.init, rawget(cls, "__about")
  if about then return ("%s%s\n  %s"):format(name, about[1], about[2]) end
  return type(init) == "function" and about_function(init, name, 2) or name
end

-- an object with a registry of things that are chosen by name
local function about_variants(value)
  local out = { about_function(value._init, "lac.attention", 2), "  Variants:" }
  for _, name in ipairs(value.variants:names()) do
    out[#out + 1] = ("  %-14s%s"):format(name, value.variants:get(name).doc or "")
  end
  return table.concat(out, "\n")
end

local function is_class(value)
  return type(value) == "table" and rawget(value, "__name") and rawget(value, "__index")
end

-- the part of an explanation that fits on a line: its first sentence
local function first_sentence(text)
  local rest = text:match "^[^\n]*\n(.*)$"
  if not rest or rest:match "^%s*no comment" then return "" end
  rest = rest:gsub("%s+", " "):gsub("^ ", ""):gsub(" et al%.", " et al"):gsub(" eq%. ", " eq ")
  for _, tag in ipairs { "^[%w_]+ %([%a|]+%)", "^[%w_]+ %([%a|]+, [^)]*%)", "^returns " } do
    if rest:match(tag) then return "" end -- arguments, and no word about the whole
  end
  local sentence = (rest:match "^(.-)%.%s" or rest):gsub("%.$", "")
  return #sentence <= LINE and sentence or sentence:sub(1, LINE):match "^(.*) " .. " ..."
end

-- an object: a line for each method of its class, the nearest definition of each
local function about_object(value, cls)
  local lines, names = {}, {}
  local c = cls
  while c do
    for key, f in next, c do
      if type(f) == "function" and not lines[key] and key ~= "init" and not key:find "^_" then
        local text = about_function(f, key, 2)
        lines[key] = ("  :%-36s %s"):format(text:match "^[^\n]*", first_sentence(text)):gsub(" *$", "")
        names[#names + 1] = key
      end
    end
    c = rawget(c, "__parent")
  end
  table.sort(names)
  for i, key in ipairs(names) do names[i] = lines[key] end
  return tostring(value):match "^[^\n]*" .. "\n" .. table.concat(names, "\n")
end

-- a module of the library: a line for each function and class
local function about_module(value, name)
  local out = { (prefix(name):gsub("%.$", "")) }
  for _, key in ipairs(schema.keys(value)) do
    local field = rawget(value, key)
    local text = type(field) == "function" and about_function(field, key, 1)
      or is_class(field) and about_class(field, key)
    if text and key:sub(1, 1) ~= "_" then
      out[#out + 1] = ("  %-36s %s"):format(text:match "^[^\n]*", first_sentence(text)):gsub(" *$", "")
    end
  end
  return table.concat(out, "\n")
end

--- What a function, a class, a module (lac.plot), an object (its methods), lac.attention or an operator by
-- its name is for, out of the comments of its source.
-- @param value one of these, or a text: "softmax", "nn.Linear", "view", "plot"
-- @treturn string|nil nil if there is nothing to say beyond what the value prints
function help.about(value)
  if type(value) == "string" then
    local found = help.named(value)
    if found == nil then
      local names = schema.keys(require "lacuna")
      for name in next, tensor.methods do names[#names + 1] = name end
      local words = synonyms.lac[value] and synonyms.lac or synonyms.tensor
      schema.fail("help", "there is no '%s'%s", value, schema.hint(value, names, nil, words))
    end
    return help.about(found) or tostring(found)
  end
  if type(value) == "function" then
    local name = name_of(value)
    return about_function(value, name, name and name:match "^x:" and 2 or 1)
  end
  if type(value) ~= "table" then return nil end
  if value == package.loaded["lacuna.attention"] then return about_variants(value) end
  if is_class(value) then return about_class(value) end
  for _, name in ipairs(UPPER) do
    if value == package.loaded["lacuna." .. name] then return about_module(value, name) end
  end
  local cls = getmetatable(value)
  if is_class(cls) and not tensor.is(value) then return about_object(value, cls) end
  return nil
end

--- The value that a text names: "softmax" and "lac.softmax", "nn.Linear", "masks.full", "view" (a method),
-- "log.open" (of the module lacuna.log).
-- @tparam string text
-- @return the value, or nil
function help.named(text)
  local lac = require "lacuna"
  local of_log = text:match "^lacuna%.log%.(.+)$" or text:match "^log%.(.+)$"
  if of_log then return rawget(require "lacuna.log", of_log) end
  local value = text:match "^masks" and lac.attention or lac
  for part in text:gsub("^lac%.", ""):gmatch "[^.:]+" do
    local ok, field = pcall(function() return value[part] end)
    value = ok and field or nil
    if value == nil then return tensor.methods[text:match "^x?:?([%w_]+)$" or ""] end
  end
  return value
end

return help
