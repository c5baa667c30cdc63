--- benchmark.lua: every number that this project claims, measured against peers and floors in one run.
--
--   build/bin/lacuna experiments/benchmark.lua --peer /path/to/python
--   build/bin/lacuna experiments/benchmark.lua --only attention,elementwise --threads 1 --json bench.json
--   build/bin/lacuna experiments/benchmark.lua --device cuda --json cuda.json
--
-- The CPU's targets alone, a line each, in minutes instead of a quarter of an hour:
--
--   build/bin/lacuna experiments/benchmark.lua --peer ... --targets --seconds 0.4 --threads 1,2
--     --only attention,pipelines,memory,step,elementwise --fkodom FOLDER --torchscale FOLDER
--
-- Some rows, named by a part of their names (plain text, for names have brackets and hyphens):
--
--   build/bin/lacuna experiments/benchmark.lua --only elementwise --match "softmax [32768" --threads 1
--
-- On a host shared with others, whose work disturbs for longer than a turn: the fastest turns of both sides,
-- of as many as there is time for, in several rounds over all rows, because what disturbs may last minutes:
--
--   build/bin/lacuna experiments/benchmark.lua --only attention --targets --fastest --rounds 3
--
-- Sections are files in experiments/benchmarks/, each { name, about, run = function(b) }, where b is a run of
-- lua/lacuna/bench.lua: b:row measures ours against a peer (experiments/peers/<script>.py, a process of its
-- own, PyTorch on as many threads) or a floor, in turns; b:value states another number. A section runs once
-- per number of threads; `once = true` in its table runs it one time, with the largest number. Its `device`
-- is where it is measured, "cpu" unless it says "cuda" or "any"; peers are told the device of the run.
--
-- Only ratios are comparable between machines. A row whose peer is missing prints why and counts as not
-- measured; --quick runs everything in its smallest size, to see that it works, and judges no target. The
-- exit status is 0 whatever was measured, and with --strict 1 if a target was missed or not measured.

local lac = require "lacuna"
local bench = require "lacuna.bench"
local cli = require "lacuna.cli"
local sys = require "lacuna.sys"

local here = sys.dirname(arg[0])

local function section_names()
  local names = {}
  local pipe = assert(io.popen("ls " .. sys.quote(here .. "/benchmarks")))
  for line in pipe:lines() do names[#names + 1] = line:match("^([%w_]+)%.lua$") end
  pipe:close()
  return names
end

local NAMES = section_names()

local SPEC = {
  program = "benchmark",
  about = "Measures ours against PyTorch and against the machine's floors, as ratios in one run.\nSections: "
    .. table.concat(NAMES, ", ") .. ".",
  { name = "only", type = "string", help = "sections, separated by commas (default: all)" },
  { name = "device", type = "string", default = "cpu",
  help = "cpu or cuda: the sections that are measured there" },
  { name = "threads", type = "integers", min = 1, help = "numbers of threads (default: 1 and all cores)" },
  { name = "peer", type = "string", default = os.getenv("LACUNA_PEER") or "python3",
  help = "a Python that has PyTorch (or in the environment: LACUNA_PEER)" },
  { name = "fkodom", type = "string", help = "folder of dilated-attention-pytorch, for section pipelines" },
  { name = "torchscale", type = "string", help = "folder of torchscale, for section pipelines" },
  { name = "seconds", type = "number", above = 0,
  help = "for every row (default: 1.5 on the CPU and 0.1 on CUDA, or what the row needs)" },
  { name = "targets", type = "boolean", help = "only the rows that have a target" },
  { name = "match", type = "string", help = "only the rows whose names have this text in them" },
  { name = "fastest", type = "boolean",
  help = "compares the fastest turns instead of the median pair, for hosts that are shared: more --seconds" },
  { name = "rounds", type = "integer", min = 1, default = 1,
  help = "with --fastest: measures everything so many times, and a row has the turns of all of them" },
  { name = "json", type = "string", help = "write every row to this file" },
  { name = "strict", type = "boolean", help = "exit with status 1 if a target was missed or not measured" },
  { name = "quick", type = "boolean", help = "smallest sizes; judges no target" },
}

local function measured_on(section, device, quick)
  local where = section.device or "cpu"
  return quick or where == "any" or where == device
end

local function chosen(only)
  if not only then return NAMES end
  local list, known = {}, {}
  for _, name in ipairs(NAMES) do known[name] = true end
  for name in only:gmatch("[^,%s]+") do
    if not known[name] then lac.schema.unknown("benchmark", "section", name, NAMES) end
    list[#list + 1] = name
  end
  return list
end

local function load_section(name)
  local section = assert(loadfile(("%s/benchmarks/%s.lua"):format(here, name)))()
  if type(section) ~= "table" or section.name ~= name or type(section.run) ~= "function" then
    lac.schema.fail("benchmark", "benchmarks/%s.lua must return { name = '%s', about =, run = }", name, name)
  end
  return section
end

local function machine()
  local file = io.open("/proc/cpuinfo")
  local text = file and file:read("*a") or ""
  if file then file:close() end
  return text:match("model name%s*:%s*([^\n]+)") or "an unknown processor"
end

local function run_section(b, section, counts)
  b.print(("\n%s: %s"):format(section.name, section.about))
  b:header(section.name)
  for i, n in ipairs(counts) do
    if not section.once or i == #counts then
      b:set_threads(n)
      lac.manual_seed(1)
      local ok, reason = pcall(lac.scope, section.run, b)
      if not ok then
        if tostring(reason):match("interrupted!?$") then error(reason, 0) end
        b:value{ what = section.name .. " stopped", problem = "error: " .. tostring(reason) }
        b.failed = true
      end
    end
  end
end

local function main(o)
  if o.rounds > 1 and not o.fastest then lac.schema.fail("benchmark", "--rounds needs --fastest") end
  local device = lac.default_device(o.device):match("^%a+")
  local cores = lac.threads()
  local counts = o.threads or (cores > 1 and device == "cpu" and { 1, cores } or { cores })
  table.sort(counts)
  local b = bench.run{ quick = o.quick, peer = o.peer, peers = here .. "/peers", threads = counts[1],
    seconds = o.seconds, targets = o.targets, match = o.match, fastest = o.fastest, options = o,
    print = function(line)
      io.stdout:write(line, "\n")
      io.stdout:flush()
    end }
  local names = chosen(o.only)
  b.print(("%s, device %s, threads %s\n%s"):format(machine(), device, table.concat(counts, " and "),
    lac.devices()))
  local sections = {}
  for _, name in ipairs(names) do
    local section = load_section(name)
    if measured_on(section, device, o.quick) then
      sections[#sections + 1] = section
    elseif o.only then
      local where = section.device or "cpu"
      lac.schema.fail("benchmark", "section '%s' is measured on %s: --device %s", name, where, where)
    end
  end
  for round = 1, o.rounds do
    if o.rounds > 1 then b.print(("\n---- round %d of %d"):format(round, o.rounds)) end
    for _, section in ipairs(sections) do run_section(b, section, counts) end
  end
  local n = b:count()
  b.print(("\n%d rows: %d targets met, %d missed, %d not measured%s"):format(n.rows, n.met, n.missed,
    n.unmeasured, o.quick and " (a quick run judges nothing)" or ""))
  if o.match and n.rows == 0 then lac.schema.fail("benchmark", "no row has '%s' in its name", o.match) end
  if o.json then
    local ok, reason = sys.write_file(o.json, b:json{ machine = machine(), device = device,
      engine = lac.devices(), quick = o.quick or false })
    if not ok then lac.schema.fail("benchmark", "--json: %s", reason) end
  end
  b:close()
  if b.failed or (o.strict and n.missed + n.unmeasured > 0) then os.exit(1, true) end
end

cli.main(SPEC, arg, main)
