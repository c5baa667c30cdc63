--- json.lua: exact, ordered JSON for logs, configurations and tensor file headers.
--
-- Encoding is our own: 60 lines buy what a log needs and lua-cjson does not give. Numbers survive a round
-- trip bit for bit (the shorter of %.15g and %.17g that reads back equal), keys come out in a defined order
-- (so that two runs can be compared with diff), and NaN and infinity follow a policy that the caller names,
-- because JSON has no spelling for them: "error" (the default), "null", or "string" ("NaN", "Infinity",
-- "-Infinity").
--
-- Decoding is lua-cjson (Debian package lua-cjson) in an instance of our own, so that settings made elsewhere
-- in the process do not change what we accept: no NaN or hexadecimal numbers. What cjson cannot tell, whether
-- an object holds a key twice, json.duplicate_key finds in one pass over the text; a tensor file that names a
-- tensor twice is a lie that must not pass.
--
-- Rejected: guessing whether an empty table is [] or {}. It is {} unless made by json.array.

local cjson = require "cjson"

local Array = { __name = "lacuna.json.array" }
local escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n",
  ["\r"] = "\\r",
  ["\t"] = "\\t" }
local decoder = cjson.new()
decoder.decode_invalid_numbers(false)
decoder.decode_max_depth(64)

local function quote(text)
  return '"' .. text:gsub('[%c"\\\127]', function(c) return escapes[c] or ("\\u%04x"):format(c:byte()) end)
    .. '"'
end

local function number(value, state, path)
  if value ~= value or value == math.huge or value == -math.huge then
    local name = value ~= value and "NaN" or value > 0 and "Infinity" or "-Infinity"
    if state.nan == "null" then return "null" end
    if state.nan == "string" then return '"' .. name .. '"' end
    error(("json.encode: %s is %s, which JSON cannot hold (option nan = \"null\" or \"string\" writes it)")
      :format(path, name), 0)
  end
  local short = ("%.15g"):format(value)
  if tonumber(short) == value then return short end
  return ("%.17g"):format(value)
end

-- keys named in the order list first, as listed; the others sorted
local function sorted_keys(value, state, path)
  local keys, listed = {}, {}
  for _, key in ipairs(state.order) do
    if value[key] ~= nil and not listed[key] then keys[#keys + 1], listed[key] = key, true end
  end
  local rest = {}
  for key in pairs(value) do
    if type(key) ~= "string" then
      error(("json.encode: %s mixes the key %s (a %s) with names: JSON objects have strings as keys")
        :format(path, tostring(key), type(key)), 0)
    end
    if not listed[key] then rest[#rest + 1] = key end
  end
  table.sort(rest)
  for _, key in ipairs(rest) do keys[#keys + 1] = key end
  return keys
end

local encode

local function encode_list(value, state, path, depth)
  local parts, count = {}, 0
  for _ in pairs(value) do count = count + 1 end
  if count ~= #value then
    error(("json.encode: %s is a list with gaps or with named fields (%d of %d entries)"):format(path,
      #value, count), 0)
  end
  for i = 1, #value do parts[i] = encode(value[i], state, ("%s[%d]"):format(path, i), depth + 1) end
  return "[" .. table.concat(parts, state.indent and ", " or ",") .. "]"
end

local function encode_object(value, state, path, depth)
  local parts = {}
  for i, key in ipairs(sorted_keys(value, state, path)) do
    local text = encode(value[key], state, path .. "." .. key, depth + 1)
    parts[i] = quote(key) .. (state.indent and ": " or ":") .. text
  end
  if #parts == 0 then return "{}" end
  if not state.indent then return "{" .. table.concat(parts, ",") .. "}" end
  local inner, outer = (" "):rep(state.indent * (depth + 1)), (" "):rep(state.indent * depth)
  return "{\n" .. inner .. table.concat(parts, ",\n" .. inner) .. "\n" .. outer .. "}"
end

function encode(value, state, path, depth)
  local kind = type(value)
  if kind == "string" then return quote(value) end
  if kind == "number" then return number(value, state, path) end
  if kind == "boolean" then return tostring(value) end
  if value == nil or value == cjson.null then return "null" end
  if kind == "cdata" then
    local digits = tostring(value):match("^(%-?%d+)U?LL$") -- 64-bit integers, exactly
    if digits then return digits end
  end
  if kind ~= "table" then
    error(("json.encode: %s is a %s, which JSON cannot hold"):format(path, kind), 0)
  end
  if depth > 64 then error(("json.encode: %s is nested more than 64 deep (a cycle?)"):format(path:sub(1,
    60)), 0) end
  if getmetatable(value) == Array or value[1] ~= nil then return encode_list(value, state, path, depth) end
  return encode_object(value, state, path, depth)
end

local json = { null = cjson.null }

--- Mark a table as a list, so that it is written as [] when it is empty.
-- @tparam ?table list
-- @treturn table the same table
function json.array(list)
  return setmetatable(list or {}, Array)
end

--- Write a value as JSON.
-- @param value nil, boolean, number, 64-bit integer cdata, string, list or table with string keys
-- @tparam ?table options indent = spaces per level (default: one line); order = list of keys that come first;
--   nan = "error" (default), "null" or "string"
-- @treturn string
-- @raise names the path of a value that JSON cannot hold
function json.encode(value, options)
  options = options or {}
  local nan = options.nan or "error"
  if nan ~= "error" and nan ~= "null" and nan ~= "string" then
    error(("json.encode: option nan must be 'error', 'null' or 'string', got %s"):format(tostring(nan)), 2)
  end
  local ok, text = pcall(encode, value, { indent = options.indent, order = options.order or {}, nan = nan },
    "value", 0)
  if not ok then error(text, 2) end
  return text
end

--- Read JSON text. `null` becomes json.null.
-- @tparam string text
-- @return the value, or nil and the reason (with the position)
function json.decode(text)
  if type(text) ~= "string" then
    error(("json.decode: expected a string, got a %s"):format(type(text)), 2)
  end
  local ok, value = pcall(decoder.decode, text)
  if ok then return value end
  return nil, tostring(value)
end

--- The first byte offset (0-based) at which a text is not valid UTF-8.
-- @tparam string text
-- @treturn ?number offset, nil if all of it is valid
function json.invalid_utf8(text)
  local i, n, byte = 1, #text, string.byte
  while i <= n do
    local c = byte(text, i)
    if c < 0x80 then
      i = i + 1
    else
      local extra = (c >= 0xC2 and c <= 0xDF) and 1 or (c >= 0xE0 and c <= 0xEF) and 2 or (c >= 0xF0
        and c <= 0xF4) and 3
      if not extra or i + extra > n then return i - 1 end
      for k = 1, extra do
        local d = byte(text, i + k)
        if d < 0x80 or d > 0xBF then return i - 1 end
      end
      local second = byte(text, i + 1) -- overlong forms, surrogates, beyond U+10FFFF
      if (c == 0xE0 and second < 0xA0) or (c == 0xED and second > 0x9F) or (c == 0xF0 and second < 0x90)
        or (c == 0xF4 and second > 0x8F) then
        return i - 1
      end
      i = i + extra + 1
    end
  end
end

--- A key that occurs twice in one object of a valid JSON text, compared after escapes are resolved.
-- @tparam string text valid JSON (call json.decode first)
-- @treturn ?string the key, nil if there is none
function json.duplicate_key(text)
  local stack, seen, i = {}, nil, 1
  while true do
    local start = text:find('[{}%[%]"]', i)
    if not start then return nil end
    local c = text:sub(start, start)
    i = start + 1
    if c == "{" or c == "[" then
      stack[#stack + 1] = seen or false
      seen = c == "{" and {} or nil
    elseif c == "}" or c == "]" then
      seen = table.remove(stack) or nil
    else
      local stop = start
      repeat -- the closing quote: one that an even number of backslashes precedes
        stop = text:find('"', stop + 1, true)
        if not stop then return nil end
      until #(text:sub(start + 1, stop - 1):match("\\*$")) % 2 == 0
      i = stop + 1
      if seen and text:find("^%s*:", i) then
        local key = decoder.decode("[" .. text:sub(start, stop) .. "]")[1]
        if seen[key] then return key end
        seen[key] = true
      end
    end
  end
end

return json
