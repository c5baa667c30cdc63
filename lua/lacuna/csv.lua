--- csv.lua: tables of results as text that spreadsheets, R and pandas read (RFC 4180).
--
-- Columns are named by the caller, because Lua's tables have no order and a file whose columns move between
-- two sweeps cannot be put beside another; a row with a field that no column shows is an error, not a loss.
-- Numbers are written with as many digits as bring the same number back. Only writing: the JSON beside it is
-- what the library reads.

local schema = require "lacuna.schema"

local csv = {}

local function number(v)
  if v ~= v then return "nan" end
  if v == math.huge then return "inf" elseif v == -math.huge then return "-inf" end
  for digits = 14, 17 do
    local text = ("%." .. digits .. "g"):format(v)
    if digits == 17 or tonumber(text) == v then return text end
  end
end

local function field(v, place)
  local text
  if v == nil then return "" end
  if type(v) == "number" then return number(v) end
  if type(v) == "string" or type(v) == "boolean" then
    text = tostring(v)
  elseif type(v) == "table" and getmetatable(v) == nil and #v > 0 then
    local parts = {}
    for i = 1, #v do
      if type(v[i]) ~= "number" and type(v[i]) ~= "string" then
        schema.fail("csv", "%s[%d] must be a number or a string, got %s", place, i, schema.show(v[i]))
      end
      parts[i] = type(v[i]) == "number" and number(v[i]) or v[i]
    end
    text = table.concat(parts, " ")
  else
    schema.fail("csv", "%s must be a number, a string, a boolean or a list, got %s", place, schema.show(v))
  end
  if text:find('[",\r\n]') or text:find "^%s" or text:find "%s$" then
    return '"' .. text:gsub('"', '""') .. '"'
  end
  return text
end

--- Rows as CSV: a line of names, then one for each row, each ended by CR LF.
-- @tparam table rows list of { column = value }; a list in a field is written with spaces between its parts
-- @tparam table columns names in their order; a row may lack some (an empty field), and has no others
-- @treturn string
function csv.encode(rows, columns)
  schema.check("csv", "rows", rows, { type = "table" })
  schema.check("csv", "columns", columns, { type = "table" })
  local lines, known = {}, {}
  for i, name in ipairs(columns) do
    schema.check("csv", ("columns[%d]"):format(i), name, { type = "string" })
    known[name] = true
  end
  if #columns == 0 then schema.fail("csv", "columns must name at least one") end
  local parts = {}
  for i, name in ipairs(columns) do parts[i] = field(name, "column") end
  lines[1] = table.concat(parts, ",")
  for r, row in ipairs(rows) do
    for key in pairs(row) do
      if not known[key] then schema.unknown("csv", "column", tostring(key), columns) end
    end
    for i, name in ipairs(columns) do parts[i] = field(row[name], ("rows[%d].%s"):format(r, name)) end
    lines[r + 1] = table.concat(parts, ",")
  end
  return table.concat(lines, "\r\n") .. "\r\n"
end

return csv
