--- reference.lua: makes the reference, the HTML of every documented function. Run: luajit reference.lua
-- DIRECTORY
--
-- LDoc reads `--- text` before a function. Half of this library's functions have none that LDoc could find:
-- an operator is a record (`define { name = "roll", forward = function(x, shifts, dims) ...`), and the
-- elementwise ones do not exist in Lua at all but come from c/maps.def. So this program writes, for every
-- file, what LDoc can read: each comment with the name and the arguments that belong to it as `@function`
-- and `@param` lines, tags at the beginning of their lines, and for an elementwise function its formula and
-- derivative out of maps.def. Then it runs LDoc on that, with the README and the C header as pages. What
-- LDoc complains of fails, and so does a function of lac.*, a method of tensors or a public one of an upper
-- module that has no comment.
--
-- Rejected: `@function` lines in the sources (the same name and arguments once more, which drift) and a
-- documentation generator of our own (LDoc's links, index and layout are good).

package.path = "lua/?.lua;lua/?/init.lua;tests/?.lua;" .. package.path

local DIRECTORY = arg[1]
local SOURCE = DIRECTORY .. "/source"

local TOPICS = { -- title, pattern of modules; the first that matches
  { "Tensors", "^lacuna$", "tensor$", "create$", "pretty$", "device$", "scope$", "memory$" },
  { "Operators", "%.ops" }, { "Gradients", "grad" }, { "Attention", "%.attention" },
  { "Modules", "%.nn" },
  { "Training", "optim", "train", "data$", "io$", "log$", "checkpoint" },
  { "Tools", "" },
}

local function read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read "*a"
  file:close()
  return text
end
local function write(path, text)
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
end
local function run(command) return os.execute(command) == 0 end

-- ---- comments of a file ------------------------------------------------------------------------------

-- lines of a block with every tag at the beginning of a line
local function tidy(block)
  local out = {}
  for _, line in ipairs(block) do
    line = line:gsub("^%-%-+%s?", "")
    for _, tag in ipairs { "@tparam", "@param", "@treturn", "@return", "@raise" } do
      line = line:gsub("(%S)%s+(" .. tag .. ")", "%1\n%2")
    end
    for part in (line .. "\n"):gmatch "(.-)\n" do out[#out + 1] = part end
  end
  return out
end

-- what the line of code after a comment defines: name, arguments (or nil), kind
local function subject(code, text, records)
  local name, arguments = code:match "^function%s+([%w_%.:]+)%s*(%b())"
  if name then
    local record = name:match "^([%w_]+)%.forward$"
    if record and records[record] then name = records[record] end
    return name, arguments, "function"
  end
  if code:match "^local function" then return end
  name, arguments = code:match 'name = "([%w_]+)".-forward = function(%b())'
  if name then return name, arguments, "function" end
  name = code:match 'name = "([%w_]+)"' or code:match '^[%w_]+%s*%(?%s*"([%w_]+)"'
  if name then return name, text:match("%f[%w_]" .. name .. "(%b())") or "(x)", "function" end
  name, arguments = code:match "^([%w_%.]+)%s*=%s*function%s*(%b())"
  if name then return name, arguments, "function" end
  name = code:match "^([%w_]+%.[%w_]+)%s*="
  if name then return name, nil, "field" end
end

local documented, seen_in = {}, {}

local function item(out, block, name, arguments, kind)
  documented[name:match "[%w_]+$"] = true
  documented[name] = true
  if seen_in[name] then return end
  seen_in[name] = true
  local lines, text = tidy(block), table.concat(block, "\n")
  out[#out + 1] = "--- " .. (lines[1] ~= "" and lines[1] or name)
  for i = 2, #lines do out[#out + 1] = "-- " .. lines[i] end
  for argument in (arguments or ""):gmatch "[%w_%.]+" do
    local plain = argument:gsub("%.%.%.", "...")
    if not text:find("@t?param%f[%W][^\n]-%f[%w_%.]" .. plain:gsub("%.", "%%.") .. "%f[^%w_%.]") then
      out[#out + 1] = "-- @param " .. plain
    end
  end
  out[#out + 1] = "-- @" .. kind .. " " .. name
  out[#out + 1] = ""
end

local function translate(path, module)
  local lines, records = {}, {}
  for line in io.lines(path) do
    lines[#lines + 1] = line
    local variable, name = line:match '^local ([%w_]+) = { name = "([%w_]+)"'
    if variable then records[variable] = name end
  end
  local out, i, first = {}, 1, true
  seen_in = {}
  while i <= #lines do
    if lines[i]:match "^%-%-%-" or (i == 1 and lines[i]:match "^%-%-") then
      local block = {}
      while lines[i] and lines[i]:match "^%-%-" do
        block[#block + 1] = lines[i]
        i = i + 1
      end
      if first then
        for k, line in ipairs(tidy(block)) do out[#out + 1] = (k == 1 and "--- " or "-- ") .. line end
        out[#out + 1] = "-- @module " .. module
        out[#out + 1] = ""
        first = false
      else
        local name, arguments, kind = subject((lines[i] or "") .. " " .. (lines[i + 1] or ""),
                                              table.concat(block, "\n"), records)
        if name then item(out, block, name, arguments, kind) end
      end
    else
      i = i + 1
    end
  end
  return out
end

-- ---- elementwise functions -----------------------------------------------------------------------------

local ARGUMENTS = { MAP1 = "(x)", CMP1 = "(x)", LOGIC1 = "(x)", INT1 = "(x)", MAPP = "(x, ...)",
                    MAP2 = "(x, y)",
                    CMP2 = "(x, y)", LOGIC2 = "(x, y)", INT2 = "(x, y)", MAP3 = "(x, y, z)" }
local RENAME = { max = "maximum", min = "minimum", ["and"] = "logical_and", ["or"] = "logical_or",
                 xor = "logical_xor", ["not"] = "logical_not" }

local function fields(text) -- at commas outside parentheses
  local list, depth, from = {}, 0, 1
  for at = 1, #text do
    local c = text:sub(at, at)
    if c == "(" then depth = depth + 1 elseif c == ")" then depth = depth - 1 end
    if (c == "," and depth == 0) or at == #text then
      list[#list + 1] = text:sub(from, c == "," and depth == 0 and at - 1 or at):match "^%s*(.-)%s*$"
      from = at + 1
    end
  end
  return list
end

local function elementwise(out)
  local ops = require "lacuna.ops"
  for kind, rest in read "c/maps.def":gmatch "\n([%u%d]+)(%b())" do
    local f = fields(rest:sub(2, -2))
    local name = RENAME[f[1]] or f[1]
    if ARGUMENTS[kind] and ops.fn[name] then
      local formula = table.concat(f, ", ", kind:match "^MAP[12P]" and 3 or 2):gsub("[FK]_?(%w*)%(", "%1(")
      item(out, { "Elementwise, any strides, broadcasting: " .. name .. ARGUMENTS[kind] .. ".",
                  "In c/maps.def (value, then derivatives by each argument): `" .. formula .. "`." },
           name, ARGUMENTS[kind], "function")
    end
  end
end

-- name_(x, ...) of every operator that has a form in place
local function in_place(out)
  local names = {}
  for name in pairs(require("lacuna.tensor").methods) do
    local plain = name:match "^(%l[%w_]-)_$"
    if plain and not documented[name] then names[#names + 1] = plain end
  end
  table.sort(names)
  for _, name in ipairs(names) do
    if documented[name] then
      item(out, { ("x:%s_(...): x becomes %s(x, ...), in place; returns x."):format(name, name) },
           name .. "_", "(x, ...)", "function")
    end
  end
end

local function likes(out) -- made in a loop in create.lua
  for _, name in ipairs { "zeros", "ones", "empty", "full", "rand", "randn" } do
    item(out, { ("%s of the shape, dtype and device of t, unless the options say otherwise."):format(name) },
         "create." .. name .. "_like", name == "full" and "(t, value, options)" or "(t, options)", "function")
  end
end

-- ---- what must have a comment --------------------------------------------------------------------------

-- what a module gives as a whole is documented under that module: lac.scope is scope.run, class is a function
local ALIAS = { scope = "run", is_tensor = true, class = true, gradcheck = true,
                profile = true, memory_report = "report", memory_tracking = "tracking",
                memory_profile = "run", save_checkpoint = "save", load_checkpoint = "load" }

local function undocumented()
  local lac, tensor, missing = require "lacuna", require "lacuna.tensor", {}
  local function look(prefix, t)
    if type(t) ~= "table" then return end -- lac.log is an operator
    for name, value in pairs(t) do
      if type(value) == "function" and type(name) == "string" and not name:match "^_" and not documented[name]
          and not (ALIAS[name] and (ALIAS[name] == true or documented[ALIAS[name]])) then
        missing[#missing + 1] = prefix .. name
      end
    end
  end
  for _, name in ipairs { "attend", "gradcheck", "attention", "nn", "optim", "io", "data", "train", "log" } do
    local _ = lac[name]
  end
  look("lac.", lac)
  look("tensor:", tensor.methods)
  for _, name in ipairs { "optim", "io", "data", "train", "log" } do
    look("lac." .. name .. ".", lac[name])
  end
  table.sort(missing)
  return missing
end

-- ---- links ---------------------------------------------------------------------------------------------

-- links and images within the reference whose page or anchor is not there, as "page: link"
local function dead_links()
  local pages, anchors, dead = {}, {}, {}
  local list = io.popen(("find '%s' -name '*.html'"):format(DIRECTORY))
  for path in list:lines() do
    local text, here = read(path), {}
    pages[path], anchors[path] = text, here
    for name in text:gmatch '%f[%w]name%s*=%s*"([^"]+)"' do here[name] = true end
    for name in text:gmatch '%f[%w]id%s*=%s*"([^"]+)"' do here[name] = true end
  end
  list:close()
  for path, text in pairs(pages) do
    local folder = path:match "^(.*)/"
    local function look(link)
      if link:find "^%a+:" then return end -- another place
      local file, anchor = link:match "^([^#]*)#?(.*)$"
      local target = file == "" and path or folder .. "/" .. file
      repeat
        local before = target
        target = target:gsub("/[^/]+/%.%./", "/", 1)
      until target == before
      local page = anchors[target]
      if page and anchor ~= "" and not page[anchor] or not page and not io.open(target) then
        dead[#dead + 1] = path:sub(#DIRECTORY + 2) .. ": " .. link
      end
    end
    for link in text:gmatch 'href="([^"]+)"' do look(link) end
    for link in text:gmatch '<img src="([^"]+)"' do look(link) end
  end
  table.sort(dead)
  return dead
end

-- ---- the run -------------------------------------------------------------------------------------------

assert(run("rm -rf '" .. DIRECTORY .. "' && mkdir -p '" .. SOURCE .. "'"))
local find, groups = io.popen "find lua/lacuna -name '*.lua' | sort", {}
for path in find:lines() do
  local module = path:match "^lua/(.*)%.lua$":gsub("/init$", ""):gsub("/", ".")
  local out = translate(path, module)
  if module == "lacuna.ops.map" then elementwise(out) end
  if module == "lacuna.create" then likes(out) end
  local topic = 1
  while true do
    local match = false
    for k = 2, #TOPICS[topic] do match = match or module:match(TOPICS[topic][k]) ~= nil end
    if match then break end
    topic = topic + 1
  end
  local text = table.concat(out, "\n")
  if text:find "\n%-%- @function" or text:find "\n%-%- @field" then -- else there is nothing to refer to
    local file = ("%d-%s.lua"):format(topic, module)
    write(SOURCE .. "/" .. file, text .. "\n")
    groups[#groups + 1] = file
  end
end
find:close()
local forms = { "--- Operators in place.", "-- @module lacuna.ops.in_place", "" }
in_place(forms) -- after all files: it asks which operators are documented
write(SOURCE .. "/2-lacuna.ops.in_place.lua", table.concat(forms, "\n") .. "\n")
groups[#groups + 1] = "2-lacuna.ops.in_place.lua"
table.sort(groups)

-- the mark is what discount.lua knows a page by; what is not Lua is not to be coloured as if it were
write(SOURCE .. "/README.md", (read "README.md":gsub("\n```sh\n", "\n```\n")) .. "\n<!-- page -->\n")
local header = read "c/lacuna.h":gsub("\n", "\n    ")
write(SOURCE .. "/lacuna.h.md", "# The C interface\n\n    @plain\n    " .. header .. "\n\n<!-- page -->\n")
local list = {}
for i, file in ipairs(groups) do list[i] = ("%q"):format(file) end
write(SOURCE .. "/config.ld", ([[
project, title, description = "Lacuna", "Lacuna: reference", "Dilated attention, scriptable"
format, dir, no_space_before_args, sort = "discount", %q, true, false
file = { %s }
topics = { %q, %q }
dont_escape_underscore = true
]]):format("..", table.concat(list, ", "), "README.md", "lacuna.h.md"))

local log = DIRECTORY .. "/ldoc.log"
local ldoc = "LUA_PATH=\"$PWD/tests/support/?.lua;$LUA_PATH;;\" luajit \"$(command -v ldoc)\" "
  .. "--fatalwarnings -c '%s/config.ld' . >'%s' 2>&1"
local ok = run(ldoc:format(SOURCE, log))
local said = read(log)
if not ok or said:find "warning" or said:find "falling back" then
  io.stderr:write(said, "docs: LDoc is not content\n")
  os.exit(1)
end
-- the README's images, beside the page that names them
local images = DIRECTORY .. "/topics/experiments/images"
assert(run(("mkdir -p '%s' && cp experiments/images/*.png '%s'"):format(images, images)))
local dead = dead_links()
if #dead > 0 then
  io.stderr:write("docs: links that lead nowhere: ", table.concat(dead, ", "), "\n")
  os.exit(1)
end
local missing = undocumented()
if #missing > 0 then
  io.stderr:write("docs: no comment (`--- text`) for: ", table.concat(missing, ", "), "\n")
  os.exit(1)
end
local count = 0
for _ in pairs(documented) do count = count + 1 end
print(("%s/index.html: %d modules, no warning, nothing public without a comment"):format(DIRECTORY, #groups))
os.exit(0)
