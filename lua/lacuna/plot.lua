--- plot.lua: figures for papers and terminals, drawn by gnuplot.
--
-- A figure is described by one table: title, axes, series. The same table gives a PNG, an SVG or text for the
-- terminal, by the extension of `output` (none: the text is returned). Data goes to gnuplot's standard input
-- as inline blocks of numbers, so there are no data files to clean up and nothing in a label or a value can
-- become a gnuplot command: numbers are printed by us, strings are single-quoted with quotes doubled, and
-- markup ("enhanced" text, where _ and ^ mean something) is off.
--
-- A pipe cannot be trusted to report failure (LuaJIT's popen():close() has no exit status), so the shell
-- writes gnuplot's status to a side file and the figure itself is checked: it must exist, be new and start
-- like a PNG or an SVG. gnuplot's own complaint becomes the error message.
--
-- Rejected: drawing PNGs ourselves (fonts, anti-aliasing), and a Lua plotting library (none is packaged).

local sys = require "lacuna.sys"
local schema = require "lacuna.schema"

-- eight hues told apart by people with any colour vision, dark enough on white; our own order
local COLOURS = { "#1f6fb4", "#d9601a", "#2a9d63", "#b03a8c", "#8a6d1d", "#5b4bb5", "#c1272d", "#4c5563" }
-- viridis, sampled at nine points
local VIRIDIS = "0 '#440154', 1 '#472d7b', 2 '#3b528b', 3 '#2c728e', 4 '#21918c', 5 '#28ae80', 6 '#5ec962', "
  .. "7 '#addc30', 8 '#fde725'"
local KINDS = { png = "\137PNG", svg = "<?xml" }

local function quote(text)
  return "'" .. tostring(text):gsub("[%c\127]", " "):gsub("'", "''") .. "'"
end

local function number(value)
  if value ~= value then return "NaN" end
  if value == math.huge or value == -math.huge then return "NaN" end
  return ("%.12g"):format(value)
end

local function as_list(value, what)
  if type(value) == "table" and type(value.totable) == "function" then value = value:totable() end
  if type(value) ~= "table" then
    schema.fail("plot", "%s must be a list of numbers or a tensor, got a %s", what, type(value))
  end
  return value
end

local function check_numbers(list, what)
  for i = 1, #list do
    if type(list[i]) ~= "number" then
      schema.fail("plot", "%s[%d] must be a number, got a %s", what, i, type(list[i]))
    end
  end
  return list
end

local function terminal_line(spec, kind)
  local size = spec.size
  if kind == "png" then
    return ("set terminal pngcairo noenhanced background rgb 'white' font 'Sans,11' linewidth 1.2 size %d,%d")
      :format(size and size[1] or 960, size and size[2] or 600)
  elseif kind == "svg" then
    return ("set terminal svg noenhanced background rgb 'white' font 'Sans,13' linewidth 1.2 size %d,%d")
      :format(size and size[1] or 960, size and size[2] or 600)
  end
  return ("set terminal dumb noenhanced mono size %d,%d"):format(size and size[1] or 78, size and size[2]
    or 22)
end

local function preamble(spec, kind)
  local text = kind == "text"
  local lines = { terminal_line(spec, kind) }
  local function put(format, ...) lines[#lines + 1] = format:format(...) end
  if kind ~= "text" then put("set output %s", quote(spec.output)) end
  put("set encoding utf8")
  if spec.title then put("set title %s noenhanced%s", quote(spec.title), text and "" or " font ',14'") end
  if spec.xlabel then put("set xlabel %s noenhanced", quote(spec.xlabel)) end
  if spec.ylabel then put("set ylabel %s noenhanced", quote(spec.ylabel)) end
  if not text then
    put("set border 3 linecolor rgb '#4c5563'")
    put("set tics nomirror out scale 0.6")
    put("set grid linetype 1 linecolor rgb '#c9ced6' linewidth 0.5")
    put("set style fill solid 0.85 noborder")
  end
  if spec.logx then put("set logscale x") end
  if spec.logy then put("set logscale y") end
  if spec.xrange then put("set xrange [%s:%s]", number(spec.xrange[1]), number(spec.xrange[2])) end
  if spec.yrange then put("set yrange [%s:%s]", number(spec.yrange[1]), number(spec.yrange[2])) end
  return lines
end

local function run_gnuplot(script, spec, kind)
  if not sys.has_program("gnuplot") then
    schema.fail("plot", "gnuplot is not installed; install it with: apt-get install gnuplot-nox")
  end
  if kind ~= "text" then os.remove(spec.output) end
  local base = sys.temporary(".plot")
  local out, err, status = base .. ".out", base .. ".err", base .. ".status"
  local pipe = assert(io.popen(("gnuplot >%s 2>%s; echo $? >%s")
    :format(sys.quote(out), sys.quote(err), sys.quote(status)), "w"))
  pipe:write(script)
  pipe:close()
  local function take(path)
    local file = io.open(path, "rb")
    local text = file and file:read("*a") or ""
    if file then file:close() end
    os.remove(path)
    return text
  end
  local text, complaint, code = take(out), take(err), tonumber(take(status))
  local function fail(what)
    complaint = complaint:gsub("%s+", " "):sub(1, 300)
    schema.fail("plot", "%s%s", what, complaint ~= "" and "; gnuplot says: " .. complaint or "")
  end
  if code ~= 0 then fail(("gnuplot failed with status %s"):format(tostring(code))) end
  if kind == "text" then
    if not text:find("%S") then fail("gnuplot drew nothing") end
    return (text:gsub("^[\f%s]*\n", ""):gsub("[ \t]+\n", "\n"))
  end
  local file = io.open(spec.output, "rb")
  local head = file and file:read(5) or ""
  if file then file:close() end
  if head:sub(1, #KINDS[kind]) ~= KINDS[kind] then
    fail(("gnuplot wrote no %s to %s"):format(kind:upper(), spec.output))
  end
  return spec.output
end

local function output_kind(spec)
  if spec.output == nil then return "text" end
  local kind = spec.output:match("%.(%w+)$")
  kind = kind and kind:lower()
  if not KINDS[kind] then
    schema.fail("plot", "output %q must end in .png or .svg (leave it out for text)", spec.output)
  end
  return kind
end

local COMMON = {
  title = { type = "string" }, xlabel = { type = "string" }, ylabel = { type = "string" },
  output = { type = "string" },
  size = { type = "integers", min = 1, check = function(v) return #v ~= 2 and "must be {width, height}"
  or nil end },
}

local function fields(extra)
  local all = {}
  for name, rule in pairs(COMMON) do all[name] = rule end
  for name, rule in pairs(extra) do all[name] = rule end
  return all
end

local VALUES = { type = { "table", "tensor" } }
local STYLE = { one_of = { "lines", "points", "linespoints" } }
local RANGE = { type = "numbers", check = function(v) return #v ~= 2 and "must be {low, high}" or nil end }
local SERIES = { x = VALUES, y = { type = { "table", "tensor" }, required = true },
  label = { type = "string" },
  style = STYLE, labels = { type = "table" }, colour = { type = "string" } }
local XY = fields{ series = { type = "table" }, x = VALUES, y = VALUES, style = STYLE, xrange = RANGE,
  yrange = RANGE,
  logx = { type = "boolean" }, logy = { type = "boolean" },
  legend = { one_of = { "top right", "top left", "bottom right", "bottom left", "outside", "none" },
    default = "top right" } }
local HEAT = fields{ z = { type = { "table", "tensor" }, required = true }, xticks = { type = "table" },
  yticks = { type = "table" }, zlabel = { type = "string" }, zrange = RANGE }
local AREA = fields{ x = { type = { "table", "tensor" }, required = true },
  series = { type = "table", required = true }, marks = { type = "table" }, xrange = RANGE, yrange = RANGE }
AREA.output = { type = "string", required = true }
local AREA_SERIES = { y = { type = { "table", "tensor" }, required = true }, label = { type = "string" },
  colour = { type = "string", check = function(v)
    return not v:match("^#%x%x%x%x%x%x$") and "must look like #1f6fb4" or nil
  end } }
local MARK = { x = { type = "number", required = true }, label = { type = "string" } }
-- one inline block and one clause of the plot command
local function draw_series(one, index, default_style, text)
  local what = ("series[%d]"):format(index)
  local y = check_numbers(as_list(one.y, what .. ".y"), what .. ".y")
  local x = one.x and check_numbers(as_list(one.x, what .. ".x"), what .. ".x")
  if x and #x ~= #y then
    schema.fail("plot", "%s has %d x values and %d y values", what, #x, #y)
  end
  if #y == 0 then schema.fail("plot", "%s is empty", what) end
  local rows = { ("$d%d << LACUNA_END"):format(index) }
  for i = 1, #y do
    local row = number(x and x[i] or i) .. " " .. number(y[i])
    if one.labels then row = row .. ' "' .. tostring(one.labels[i] or ""):gsub('[%c"\\\127]', " ") .. '"' end
    rows[#rows + 1] = row
  end
  rows[#rows + 1] = "LACUNA_END"
  local style = one.style or default_style
  local colour = one.colour or COLOURS[(index - 1) % #COLOURS + 1]
  if not colour:match("^#%x%x%x%x%x%x$") then
    schema.fail("plot", "%s.colour must look like #1f6fb4, got %q", what, colour)
  end
  local look = text and (style == "lines" and "" or (" pointtype %d"):format(index))
    or style == "points"
      and (" pointtype %d pointsize 1.3 linecolor rgb '%s'"):format(5 + 2 * ((index - 1) % 4), colour)
    or style == "lines" and (" linewidth 2 linecolor rgb '%s'"):format(colour)
    or (" linewidth 2 pointtype %d pointsize 1 linecolor rgb '%s'"):format(5 + 2 * ((index - 1) % 4), colour)
  local legend = one.label and "title " .. quote(one.label) .. " noenhanced" or "notitle"
  local clause = ("$d%d using 1:2 with %s%s %s"):format(index, style, look, legend)
  if one.labels then
    clause = clause .. (", $d%d using 1:2:3 with labels noenhanced offset 0,0.8%s notitle")
      :format(index, text and "" or " font ',9' textcolor rgb '#4c5563'")
  end
  return table.concat(rows, "\n"), clause
end

local function legend_line(legend)
  if legend == "none" then return "unset key" end
  if legend == "outside" then return "set key outside right top noenhanced" end
  return ("set key %s noenhanced"):format(legend)
end

local function draw_xy(name, spec, default_style)
  spec = schema.options(name, spec, XY)
  local kind = output_kind(spec)
  local series = spec.series or { { x = spec.x, y = spec.y, style = spec.style } }
  if #series == 0 then schema.fail(name, "nothing to draw: series is empty") end
  local lines = preamble(spec, kind)
  lines[#lines + 1] = legend_line(spec.legend)
  if kind ~= "text" then -- room round points, and for the last number of the axis
    local side = default_style == "points" and "graph 0.03" or "0"
    lines[#lines + 1] = ("set offsets %s, %s, graph 0.05, graph 0.03"):format(side, side)
    if spec.legend ~= "outside" then lines[#lines + 1] = "set rmargin 6" end
  end
  local clauses = {}
  for i, one in ipairs(series) do
    one = schema.options(("%s: series[%d]"):format(name, i), one, SERIES)
    local block, clause = draw_series(one, i, spec.style or default_style, kind == "text")
    lines[#lines + 1], clauses[i] = block, clause
  end
  lines[#lines + 1] = "plot " .. table.concat(clauses, ", ")
  return run_gnuplot(table.concat(lines, "\n") .. "\nunset output\n", spec, kind)
end

-- gnuplot's dumb terminal has no colours, so a heat map in text is ours: one digit a cell
local function heat_text(z, spec)
  local low, high = math.huge, -math.huge
  for i = 1, #z do
    for j = 1, #z[i] do
      if math.abs(z[i][j]) < math.huge then low, high = math.min(low, z[i][j]), math.max(high, z[i][j]) end
    end
  end
  if spec.zrange then low, high = spec.zrange[1], spec.zrange[2] end
  local lines = {}
  if spec.title then lines[1] = spec.title end
  for i = 1, #z do
    local row = {}
    for j = 1, #z[i] do
      local v = z[i][j]
      local level = high > low and math.floor((v - low) / (high - low) * 9 + 0.5) or 0
      row[j] = v ~= v and "?" or tostring(math.max(0, math.min(9, level)))
    end
    lines[#lines + 1] = table.concat(row, " ") .. (spec.yticks and "  " .. tostring(spec.yticks[i] or "")
      or "")
  end
  lines[#lines + 1] = ("0 = %.4g, 9 = %.4g"):format(low, high)
  return table.concat(lines, "\n") .. "\n"
end

local plot = {}

--- Lines through points.
-- @tparam table spec title, xlabel, ylabel; x and y (lists or 1-D tensors), or series = { { label =, x =, y
--   =, style = "lines"|"points"|"linespoints", labels = text at each point, colour = "#rrggbb" }, ... };
--   logx, logy, xrange, yrange = {low, high}; legend = "top right"|...|"outside"|"none"; size = {width,
--   height} in pixels (characters for text); output = "figure.png" or ".svg"
-- @treturn string the path written, or the drawing as text when there is no output
function plot.lines(spec)
  return draw_xy("plot.lines", spec, "lines")
end

-- a dotted line across the plot at x, and what it marks
local function draw_mark(lines, mark, index)
  local at = number(mark.x)
  lines[#lines + 1] = ("set arrow from first %s, graph 0 to first %s, graph 1 nohead front dashtype 2 "
    .. "linecolor rgb '#4c5563'"):format(at, at)
  if mark.label then
    lines[#lines + 1] = ("set label %d %s at first %s, graph 0.97 noenhanced front offset 0.6,0 font ',10' "
      .. "textcolor rgb '#4c5563'"):format(index, quote(mark.label), at)
  end
end

--- Areas stacked on each other, the first series at the bottom.
-- @tparam table spec x = list of numbers that all series share; series = { { label =, y =, colour = }, ... },
--   none negative; marks = { { x =, label = }, ... }: dotted lines across; title, xlabel, ylabel, xrange,
--   yrange, size, and output = "figure.png" or ".svg" (there is no form for the terminal)
-- @treturn string the path written
function plot.area(spec)
  spec = schema.options("plot.area", spec, AREA)
  local kind = output_kind(spec)
  local x = check_numbers(as_list(spec.x, "x"), "x")
  if #spec.series == 0 then schema.fail("plot.area", "nothing to draw: series is empty") end
  local lines, tops, blocks, clauses = preamble(spec, kind), {}, {}, {}
  for i = 1, #x do tops[i] = 0 end
  for i, one in ipairs(spec.series) do
    one = schema.options(("plot.area: series[%d]"):format(i), one, AREA_SERIES)
    local y = check_numbers(as_list(one.y, "y"), ("series[%d].y"):format(i))
    if #y ~= #x then schema.fail("plot.area", "series[%d] has %d values, x has %d", i, #y, #x) end
    local colour, rows = one.colour or COLOURS[(i - 1) % #COLOURS + 1], {}
    for k = 1, #x do
      if y[k] < 0 or y[k] ~= y[k] then
        schema.fail("plot.area", "series[%d].y[%d] must not be negative, got %s", i, k, schema.show(y[k]))
      end
      rows[k] = number(x[k]) .. " " .. number(tops[k]) .. " " .. number(tops[k] + y[k])
      tops[k] = tops[k] + y[k]
    end
    blocks[i] = ("$d%d << LACUNA_END\n%s\nLACUNA_END"):format(i, table.concat(rows, "\n"))
    -- the topmost first, so that the legend reads as the picture does
    table.insert(clauses, 1, ("$d%d using 1:2:3 with filledcurves fillcolor rgb %s %s"):format(i,
      quote(colour), one.label and "title " .. quote(one.label) .. " noenhanced" or "notitle"))
  end
  for i, mark in ipairs(spec.marks or {}) do
    draw_mark(lines, schema.options(("plot.area: marks[%d]"):format(i), mark, MARK), i)
  end
  lines[#lines + 1] = "set key outside right top noenhanced reverse Left width 1"
  if not spec.yrange then lines[#lines + 1] = "set yrange [0:*]" end
  lines[#lines + 1] = table.concat(blocks, "\n")
  lines[#lines + 1] = "plot " .. table.concat(clauses, ", ")
  return run_gnuplot(table.concat(lines, "\n") .. "\nunset output\n", spec, kind)
end

--- Points. The same options as plot.lines.
-- @tparam table spec
-- @treturn string
function plot.scatter(spec)
  return draw_xy("plot.scatter", spec, "points")
end

--- A matrix as colours (viridis), row 1 at the top.
-- @tparam table spec z = list of rows or a 2-D tensor [rows, columns]; title, xlabel, ylabel, zlabel;
--   xticks, yticks = labels of columns and rows; zrange = {low, high}; size; output
-- @treturn string the path written, or the drawing as text (digits 0 to 9, low to high) when there is no
--   output
function plot.heatmap(spec)
  spec = schema.options("plot.heatmap", spec, HEAT)
  local kind = output_kind(spec)
  local z = as_list(spec.z, "z")
  local columns = type(z[1]) == "table" and #z[1] or 0
  if columns == 0 or type(z[1][1]) == "table" then
    schema.fail("plot.heatmap", "z must be a list of rows of numbers, or a 2-D tensor, got %s",
      schema.show(spec.z))
  end
  for i = 1, #z do
    if type(z[i]) ~= "table" or #z[i] ~= columns then
      schema.fail("plot.heatmap", "row %d has %d columns, row 1 has %d", i, type(z[i]) == "table" and #z[i]
        or 0,
        columns)
    end
    check_numbers(z[i], ("z[%d]"):format(i))
  end
  if kind == "text" then return heat_text(z, spec) end
  local lines = preamble(spec, kind)
  local function put(format, ...) lines[#lines + 1] = format:format(...) end
  put("unset key\nunset grid\nset border 0")
  put("set palette defined (%s)", VIRIDIS)
  put("set xrange [-0.5:%s]\nset yrange [%s:-0.5]", number(columns - 0.5), number(#z - 0.5))
  if spec.zlabel then put("set cblabel %s noenhanced", quote(spec.zlabel)) end
  if spec.zrange then put("set cbrange [%s:%s]", number(spec.zrange[1]), number(spec.zrange[2])) end
  for _, axis in ipairs{ { "x", spec.xticks }, { "y", spec.yticks } } do
    if axis[2] then
      local ticks = {}
      for i, label in ipairs(axis[2]) do ticks[i] = ("%s %d"):format(quote(label), i - 1) end
      put("set %stics (%s) noenhanced", axis[1], table.concat(ticks, ", "))
    end
  end
  put("$z << LACUNA_END")
  for i = 1, #z do
    local row = {}
    for j = 1, columns do row[j] = number(z[i][j]) end
    lines[#lines + 1] = table.concat(row, " ")
  end
  put("LACUNA_END\nplot $z matrix with image")
  return run_gnuplot(table.concat(lines, "\n") .. "\nunset output\n", spec, kind)
end

-- ---- attention ------------------------------------------------------------------------------------------

local COVERAGE = { output = { type = "string" }, title = { type = "string" },
                   size = { type = "integers", min = 1 } }

local function explains(v)
  if type(v) ~= "table" then return false end
  local ok, f = pcall(function() return v.explain end) -- a field that is missing is an error of most objects
  return ok and f ~= nil
end

--- The share of pairs that attention attends to, over their distance; several configurations in one plot.
-- @tparam table list attention objects (lac.attention, or modules with explain), by label or in order
-- @tparam integer n positions @tparam[opt] table spec title, size, output
-- @treturn string as plot.lines
function plot.coverage(list, n, spec)
  local o = schema.options("plot.coverage", spec, COVERAGE)
  local series = {}
  schema.check("plot.coverage", "n", n == nil and false or n, { type = "integer", min = 1 })
  if explains(list) then list = { list } end
  if type(list) ~= "table" or getmetatable(list) then
    schema.fail("plot.coverage", "takes an attention object or a list of them, got %s", schema.show(list))
  end
  for key, attn in pairs(list) do
    if not explains(attn) then
      schema.fail("plot.coverage", "%s must be an attention object, with explain, got %s",
        type(key) == "string" and key or ("item %s"):format(tostring(key)), schema.show(attn))
    end
    local x, y = {}, {}
    for _, g in ipairs(attn:explain(n, { as = "table" }).coverage) do
      x[#x + 1], y[#y + 1] = math.max(g.from, 0.5), 100 * g.share -- distance 0 beside 1 on a logarithmic axis
    end
    local label = type(key) == "string" and key or attn.variant or tostring(key)
    series[#series + 1] = { label = label, x = x, y = y, style = "linespoints" }
  end
  table.sort(series, function(a, b) return a.label < b.label end)
  return plot.lines{ title = o.title or ("pairs attended to at N = %d"):format(n), xlabel = "distance",
    ylabel = "share of pairs [%]", logx = true, yrange = { 0, 102 }, series = series, size = o.size,
    output = o.output }
end

return plot
