--- cli.lua: command-line options of experiments, declared once.
--
-- A script lists its options with type, default and help; this file turns `--segments 128,256 --quick` into a
-- checked table, prints --help from the same list, and answers a misspelt option or value with the nearest
-- valid one. Rules are those of schema.lua, so a command line and a Lua call are refused in the same words.
--
-- Both `--name value` and `--name=value` work; lists are separated by commas; names may be written with - or
-- _. There are no short options, no abbreviations (an abbreviation changes meaning when an option is added)
-- and no positional arguments. Rejected: lua-argparse, which is one more package for a first run and knows
-- nothing of our rules.

local schema = require "lacuna.schema"

local KINDS = { integer = "N", number = "X", string = "TEXT", integers = "N,N,...", boolean = "" }

local cli = {}

local function option_names(spec)
  local names = { "help" }
  for _, o in ipairs(spec) do names[#names + 1] = o.name end
  return names
end

local function find(spec, name)
  for _, o in ipairs(spec) do
    if o.name == name then return o end
  end
end

local function default_text(value)
  if type(value) == "table" then return table.concat(value, ",") end
  return tostring(value)
end

-- what scripts that train a model on a text have in common; their defaults are their own
local COMMON = {
  data = { type = "string", help = "text file (default: the King James Bible of Debian's bible-kjv)" },
  layers = { type = "integer", min = 1, help = "blocks" },
  width = { type = "integer", min = 1, help = "model width" },
  heads = { type = "integer", min = 1, help = "attention heads" },
  context = { type = "integer", min = 2, help = "bytes in a window" },
  batch = { type = "integer", min = 1, default = 8, help = "windows in a step" },
  steps = { type = "integer", min = 1, help = "training steps" },
  lr = { type = "number", above = 0, default = 4e-3, help = "largest learning rate" },
  seed = { type = "integer", min = 0, default = 1 },
  eval_bytes = { type = "integer", min = 16, help = "held-out bytes at the end of the text" },
  device = { type = "string", help = "cpu or cuda (default: LACUNA_DEVICE, else the CPU)" },
  threads = { type = "integer", min = 1, help = "CPU threads (default: all cores)" },
  quick = { type = "boolean", help = "a run of seconds (other options still apply)" },
}

--- An option that several scripts have, for the list of one: data, layers, width, heads, context, batch,
-- steps, lr, seed, eval_bytes, device, threads, quick.
-- @tparam string name
-- @tparam[opt] table changes fields of the rule that this script has otherwise, such as its default
-- @treturn table for the spec of cli.parse
function cli.option(name, changes)
  if not COMMON[name] then schema.unknown("cli.option", "option", name, schema.keys(COMMON)) end
  local option = { name = name }
  for _, from in ipairs{ COMMON[name], changes or {} } do
    for key, value in pairs(from) do option[key] = value end
  end
  return option
end

--- Set options that were not given on the command line: what --quick means.
-- @tparam table options from cli.parse @tparam table values by name
function cli.preset(options, values)
  for name, value in pairs(values) do
    if not options.given[name] then options[name] = value end
  end
end

--- The text of --help.
-- @tparam table spec program =, about =, and a list of options { name =, type =, one_of =, default =, help =,
--   ... }
-- @treturn string
function cli.help(spec)
  local lines = { ("usage: %s [options]"):format(spec.program), "", spec.about, "" }
  for _, o in ipairs(spec) do
    local kind = o.one_of and table.concat(o.one_of, "|") or KINDS[o.type]
    local left = ("  --%s %s"):format(o.name:gsub("_", "-"), kind)
    local shown = o.default ~= nil and o.type ~= "boolean"
      and (" (default %s)"):format(default_text(o.default)) or ""
    if #left > 26 then
      lines[#lines + 1] = left
      left = ""
    end
    lines[#lines + 1] = ("%-28s%s%s"):format(left, o.help, shown)
  end
  lines[#lines + 1] = ("%-28s%s"):format("  --help", "this text")
  return table.concat(lines, "\n") .. "\n"
end

local function convert(spec, o, text)
  local shown = "--" .. o.name:gsub("_", "-")
  local value = text
  if o.type == "integer" or o.type == "number" then
    value = tonumber(text)
    if not value then schema.fail(spec.program, "%s must be a number, got '%s'", shown, text) end
  elseif o.type == "integers" then
    value = {}
    for part in (text .. ","):gmatch("([^,]*),") do
      local number = tonumber(part)
      if not number then
        schema.fail(spec.program, "%s must be integers separated by commas, got '%s'", shown, text)
      end
      value[#value + 1] = number
    end
  end
  schema.check(spec.program, shown, value, o)
  return value
end

--- Read arguments.
-- @tparam table spec see cli.help
-- @tparam table args list of strings
-- @treturn table every option by name, defaults filled in; field `given` tells which were given; `help` =
--   true for --help
-- @raise one sentence about the argument that is wrong
function cli.parse(spec, args)
  local given, i = {}, 1
  local options = { given = given }
  while i <= #args do
    local name, text = args[i]:match("^%-%-([%w_%-]+)=(.*)$")
    name = name or args[i]:match("^%-%-([%w_%-]+)$")
    if not name then schema.fail(spec.program,
      "unexpected argument '%s' (options begin with --; see --help)", args[i]) end
    name = name:gsub("-", "_")
    local o = find(spec, name)
    if name == "help" then
      options.help = true
    elseif not o then
      schema.fail(spec.program, "unknown option '%s'%s (see --help)", args[i]:match("^[^=]+"),
        (schema.hint(name, option_names(spec), "'--%s'"):gsub("_", "-")))
    elseif given[name] then
      schema.fail(spec.program, "--%s is given twice", (name:gsub("_", "-")))
    elseif o.type == "boolean" then
      if text then schema.fail(spec.program, "--%s takes no value, got '%s'", (name:gsub("_", "-")), text) end
      options[name] = true
    else
      if not text then
        i = i + 1
        text = args[i]
        local other = text and text:match("^%-%-([%w_%-]+)")
        if not text or other and find(spec, (other:gsub("-", "_"))) then
          local shown = name:gsub("_", "-")
          schema.fail(spec.program, "--%s needs a value%s", shown, text
            and (", and %s is an option (--%s=%s would take it as a value)"):format(text, shown, text) or "")
        end
      end
      options[name] = convert(spec, o, text)
    end
    given[name] = true
    i = i + 1
  end
  for _, o in ipairs(spec) do
    if options[o.name] == nil then options[o.name] = o.default end
  end
  return options
end

--- Run a script's main function: --help prints the text, a wrong argument prints one sentence and exits with
-- status 2, an error of `main` prints its message and exits with 1, Ctrl-C with 130.
-- @tparam table spec see cli.help
-- @tparam table args the global `arg`
-- @tparam function main takes the options
function cli.main(spec, args, main)
  local ok, options = pcall(cli.parse, spec, args)
  if not ok then
    io.stderr:write((tostring(options):gsub(" %[[^%]]*%]$", "")), "\n")
    os.exit(2, true)
  end
  if options.help then
    io.stdout:write(cli.help(spec))
    return
  end
  local good, reason = xpcall(main, function(message)
    if type(message) == "string" and message:match("interrupted!?$") then return "interrupted" end
    return os.getenv("LACUNA_TRACE") == "1" and debug.traceback(message, 2) or message
  end, options)
  if not good then
    io.stderr:write(spec.program, ": ", tostring(reason), "\n")
    os.exit(reason == "interrupted" and 130 or 1, true)
  end
end

return cli
