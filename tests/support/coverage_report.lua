--- coverage_report.lua: the table of line coverage. Run: luajit coverage_report.lua BUILD LINES MINIMUM
--
-- BUILD holds a library compiled with gcc --coverage and the counts that the specs left; LINES the directory
-- of the Lua line lists (coverage.lua). C: gcov says for each object which lines have code and which ran. A
-- kernel is compiled once per instruction set, and a line counts as run if any of the builds ran it; builds
-- that this processor cannot run are left out, because the lines that exist only there cannot run here. Lua:
-- the lines with bytecode, of every function, against the lines that ran. Prints each file, the totals, and
-- the longest stretches that never ran; ends with status 1 if a total is below MINIMUM percent.

local cjson = require "cjson"
local jutil = require "jit.util"

local BUILD, LINES, MINIMUM = arg[1], arg[2], tonumber(arg[3])
local STRETCHES = 25

-- files[name][line] = true if it ran, false if not
local files = {}
local function note(name, line, ran)
  files[name] = files[name] or {}
  files[name][line] = files[name][line] or ran
end

local function listing(command)
  local list, pipe = {}, io.popen(command)
  for line in pipe:lines() do list[#list + 1] = line end
  pipe:close()
  return list
end

-- ---- C -------------------------------------------------------------------------------------------------

local ran_isas = {}
local function count_c()
  -- every build leaves counts, also one that this processor cannot run: those are all zero
  local builds, ran = {}, {}
  for _, object in ipairs(listing("find " .. BUILD .. " -name '*.gcno'")) do
    local isa = object:match "obj/(%w+)/" or "front end"
    builds[isa] = builds[isa] or {}
    local pipe = io.popen("gcov --json-format --stdout " .. object .. " 2>/dev/null")
    local text = pipe:read "*a"
    pipe:close()
    for json in text:gmatch "[^\n]+" do
      for _, file in ipairs(cjson.decode(json).files) do
        local name = file.file:match "^(c/.*)$"
        name = name and name:gsub("[^/]+/%.%./", "")
        for _, line in ipairs(name and file.lines or {}) do
          table.insert(builds[isa], { name, line.line_number, line.count > 0 })
          ran[isa] = ran[isa] or line.count > 0
        end
      end
    end
  end
  for isa, lines in pairs(builds) do
    if ran[isa] then
      if isa ~= "front end" then ran_isas[#ran_isas + 1] = isa end
      for _, line in ipairs(lines) do note(line[1], line[2], line[3]) end
    end
  end
  table.sort(ran_isas)
end

-- ---- Lua -----------------------------------------------------------------------------------------------

-- lines that a prototype has bytecode for, without the closing `end` of a function
local function lines_of(proto, name)
  local info = jutil.funcinfo(proto)
  for pc = 1, info.bytecodes - 1 do
    local line = jutil.funcinfo(proto, pc).currentline
    if line and line > 0 and line ~= info.lastlinedefined then note(name, line, false) end
  end
  for i = -1, -info.gcconsts, -1 do
    local constant = jutil.funck(proto, i)
    if type(constant) == "proto" then lines_of(constant, name) end
  end
end

local function count_lua()
  for _, path in ipairs(listing "find lua/lacuna -name '*.lua'") do lines_of(assert(loadfile(path)), path) end
  for _, path in ipairs(listing("find " .. LINES .. " -name '*.lines'")) do
    for line in io.lines(path) do
      local name, number = line:match "^(.*):(%d+)$"
      local lines = files[name]
      if lines and lines[tonumber(number)] ~= nil then lines[tonumber(number)] = true end
    end
  end
end

-- ---- the table -----------------------------------------------------------------------------------------

count_c()
count_lua()

local names, total, stretches = {}, { c = { 0, 0 }, lua = { 0, 0 } }, {}
for name in pairs(files) do names[#names + 1] = name end
table.sort(names)
for _, name in ipairs(names) do
  local numbers, ran = {}, 0
  for line, did in pairs(files[name]) do
    numbers[#numbers + 1] = line
    if did then ran = ran + 1 end
  end
  table.sort(numbers)
  local sum = total[name:match "^%a+"]
  sum[1], sum[2] = sum[1] + ran, sum[2] + #numbers
  print(("%6.1f%%  %5d of %5d  %s"):format(100 * ran / #numbers, ran, #numbers, name))
  local first, count = nil, 0
  for i = 1, #numbers + 1 do
    local line = numbers[i]
    if line and not files[name][line] then
      first, count = first or line, count + 1
    elseif first then
      stretches[#stretches + 1] = { name = name, first = first, last = numbers[i - 1], count = count }
      first, count = nil, 0
    end
  end
end

table.sort(stretches, function(a, b)
  if a.count ~= b.count then return a.count > b.count end
  return a.name .. a.first < b.name .. b.first
end)
print "\nlongest stretches that never ran"
for i = 1, math.min(STRETCHES, #stretches) do
  local s = stretches[i]
  print(("  %4d lines  %s:%d-%d"):format(s.count, s.name, s.first, s.last))
end

print(("\ninstruction sets counted: %s"):format(table.concat(ran_isas, " ")))
local low = false
for _, language in ipairs { "c", "lua" } do
  local sum = total[language]
  local percent = sum[2] > 0 and 100 * sum[1] / sum[2] or 0
  low = low or percent < MINIMUM
  print(("%-4s %.2f%% of %d lines"):format(language, percent, sum[2]))
end
if low then
  print(("below %g%%"):format(MINIMUM))
  os.exit(1)
end
