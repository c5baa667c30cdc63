--- sweep_segments.lua: quality against cost of segment and dilation configurations.
--
--   build/bin/lacuna experiments/sweep_segments.lua --seeds 2
--
-- One model, one text, one number of steps; only the attention pattern differs: dense, a local window of one
-- segment length, LongNet mixtures of growing reach, the same with heads split, and dilation alone. Every
-- configuration starts from the same initial values and sees the same batches in the same order (both depend
-- on the seed only), so differences are the pattern's. With several seeds the table gives mean and half the
-- range; differences within that range are noise.
--
-- Cost is counted, not timed: attention FLOPs per token from the plan's pairs, and total FLOPs per token with
-- the products, which at small contexts dominate (that is why both are shown: a pattern that saves 80% of the
-- attention may save 5% of a step). The results are in sweep.json and, a row for every run with its options,
-- in sweep.csv; the log of every run is in its folder, figures beside them. Equal steps are not equal
-- compute; the plot against total FLOPs is there for that question.
--
-- A sweep that was stopped or killed goes on with --resume: runs that have their result are not run again,
-- the one that was under way goes on from its checkpoint, and the numbers are those of an undisturbed sweep.

local lac = require "lacuna"
local cli = require "lacuna.cli"
local runlog = require "lacuna.log"
local json = require "lacuna.json"
local csv = require "lacuna.csv"
local sys = require "lacuna.sys"

local option = cli.option

local SPEC = {
  program = "sweep_segments",
  about = "Trains one model with different segments and dilations; shows quality against FLOPs.",
  option("data"),
  option("context", { min = 16, default = 512 }),
  option("layers", { default = 2 }),
  option("width", { default = 96 }),
  option("heads", { min = 2, default = 4 }),
  option("batch"),
  option("steps", { default = 200, help = "training steps of every run" }),
  option("lr"),
  option("seed", { help = "the first seed" }),
  { name = "seeds", type = "integer", min = 1, default = 1, help = "runs of every configuration" },
  option("eval_bytes", { default = 32768 }),
  { name = "out", type = "string", help = "run folder (default runs/sweep_segments-<time>)" },
  { name = "resume", type = "boolean",
    help = "go on with the sweep in --out (default: the latest in runs/)" },
  option("device"),
  option("threads"),
  option("quick", { help = "a sweep of seconds (other options still apply)" }),
}
local QUICK = { context = 64, layers = 1, width = 32, batch = 4, steps = 8, eval_bytes = 1024 }
local QUICK_TEXT = 100000
-- what may differ between the sessions of one sweep
local FREE = { out = true, resume = true, threads = true }
local CHECKPOINT_MINUTES = 2

--- The patterns, as fractions of the context N.
local function configurations(N)
  local half, quarter, eighth = math.floor(N / 2), math.floor(N / 4), math.floor(N / 8)
  return {
    { name = "dense", segments = { N }, dilations = { 1 } },
    { name = "local N/4", segments = { quarter }, dilations = { 1 } },
    { name = "local N/8", segments = { eighth }, dilations = { 1 } },
    { name = "dilated N, r 4", segments = { N }, dilations = { 4 } },
    { name = "longnet 2 branches", segments = { quarter, N }, dilations = { 1, 4 } },
    { name = "longnet 3 branches", segments = { quarter, half, N }, dilations = { 1, 2, 4 } },
    { name = "longnet 4 branches", segments = { eighth, quarter, half, N }, dilations = { 1, 2, 4, 8 } },
    { name = "split 2 branches", segments = { quarter, N }, dilations = { 1, 4 }, scheme = "split" },
  }
end

local function printf(...)
  io.stdout:write(string.format(...), "\n")
  io.stdout:flush()
end

local function refuse(format, ...) error(format:format(...), 0) end

-- the result that a run of an earlier session has written, if it came so far
local function result_of(dir)
  if not sys.exists(dir .. "/log.jsonl") then return nil end
  local whole, records = pcall(runlog.read, dir .. "/log.jsonl")
  local last = whole and records[#records] -- a full disk may have cut the last line: that run goes on
  return last and last.event == "result" and last or nil
end

-- the record of a run's result
local function train_one(o, c, seed, train, held, dir)
  local before = o.resume and result_of(dir)
  local checkpoint = dir .. "/checkpoint.safetensors"
  if before then
    os.remove(checkpoint) -- a session that was killed may have left it between its result and its end
    return before
  end
  lac.manual_seed(seed)
  local model = lac.nn.LongNetLM{ layers = o.layers, width = o.width, heads = o.heads, context = o.context,
    segments = c.segments, dilations = c.dilations, scheme = c.scheme }
  local schedule, warmup = lac.optim.schedule, math.floor(o.steps / 10)
  local under_way = o.resume and sys.exists(dir) and lac.train.latest(dir) ~= nil
  local log = runlog.open{ path = dir, append = under_way or false }
  log:config{ program = SPEC.program, name = c.name, segments = c.segments, dilations = c.dilations,
    scheme = c.scheme or "all", seed = seed,
    steps = o.steps, context = o.context, width = o.width, layers = o.layers, heads = o.heads,
    batch = o.batch, lr = o.lr }
  lac.train.fit{ model = model, optimizer = lac.optim.adamw(model, { lr = o.lr, betas = { 0.9, 0.98 } }),
    steps = o.steps,
    clip = 1, schedule = schedule.warmup(warmup, schedule.cosine{ steps = math.max(1, o.steps - warmup),
    min = 0.05 }),
    batch = function(k) return train:batch(k, { batch = o.batch, context = o.context, seed = seed }) end,
    log = log, progress = "none", checkpoint = checkpoint, checkpoint_minutes = CHECKPOINT_MINUTES,
    resume = o.resume }
  local total, parts = model:flops_per_token()
  local result = { event = "result",
    bits_per_byte = lac.train.bits_per_byte(model, held, { stride = math.floor(o.context / 2) }),
    attention_flops = parts.attention_forward + parts.attention_backward, total_flops = total }
  log:write(result)
  log:close()
  os.remove(checkpoint) -- with the result the run is over; a sweep would leave many of them
  return result
end

local function run_all(o, train, held, dir)
  local results = {}
  for i, c in ipairs(configurations(o.context)) do
    local r = { name = c.name, segments = c.segments, dilations = c.dilations, scheme = c.scheme or "all",
      bits = json.array() }
    local started = os.time()
    for s = 1, o.seeds do
      local seed = o.seed + s - 1
      local one = train_one(o, c, seed, train, held, ("%s/%02d-seed%d"):format(dir, i, seed))
      r.bits[s], r.attention_flops, r.total_flops = one.bits_per_byte, one.attention_flops, one.total_flops
    end
    local low, high, sum = math.huge, -math.huge, 0
    for _, b in ipairs(r.bits) do low, high, sum = math.min(low, b), math.max(high, b), sum + b end
    r.mean, r.half_range = sum / #r.bits, (high - low) / 2
    results[i] = r
    printf("%d/%d  %-20s %.4f bits per byte%s  (%d s)", i, #configurations(o.context), r.name, r.mean,
      o.seeds > 1 and (" +- %.4f"):format(r.half_range) or "", os.time() - started)
  end
  return results
end

-- one row for every run: what it was made with, what came out
local COLUMNS = { "name", "segments", "dilations", "scheme", "seed", "layers", "width", "heads", "context",
                  "batch", "steps", "lr", "bits_per_byte", "attention_flops", "total_flops" }

local function rows_of(o, results)
  local rows = {}
  for _, r in ipairs(results) do
    for s, bits in ipairs(r.bits) do
      local row = { name = r.name, segments = r.segments, dilations = r.dilations, scheme = r.scheme,
        seed = o.seed + s - 1, bits_per_byte = bits, attention_flops = r.attention_flops,
        total_flops = r.total_flops }
      for _, name in ipairs(COLUMNS) do
        if row[name] == nil then row[name] = o[name] end
      end
      rows[#rows + 1] = row
    end
  end
  return rows
end

local function show_table(o, results)
  printf("\n   %-20s %-22s %-12s %-6s %10s %10s %9s%s", "pattern", "segments", "dilations", "heads",
    "attention", "total",
    "held out", o.seeds > 1 and "   +- half range" or "")
  printf("   %-20s %-22s %-12s %-6s %10s %10s %9s", "", "", "", "", "FLOP/token", "FLOP/token", "bits/byte")
  for i, r in ipairs(results) do
    printf("%d  %-20s %-22s %-12s %-6s %9.1fk %9.1fk %9.4f%s", i, r.name, table.concat(r.segments, ","),
      table.concat(r.dilations, ","), r.scheme, r.attention_flops / 1e3, r.total_flops / 1e3, r.mean,
      o.seeds > 1 and ("   %.4f"):format(r.half_range) or "")
  end
  if o.seeds == 1 then
    printf("\nOne seed: how much of a difference is noise is not known. --seeds 2 or more tells.")
  else
    printf("\n%d seeds: differences of the order of the half range are noise.", o.seeds)
  end
end

local function draw(results, dir)
  for _, cost in ipairs{ { "attention_flops", "attention FLOP per token" }, { "total_flops",
    "total FLOP per token" } } do
    local series = {}
    for i, r in ipairs(results) do
      series[i] = { x = { r[cost[1]] }, y = { r.mean }, label = ("%d %s"):format(i, r.name) }
    end
    local figure = { title = "Quality against cost of attention patterns", xlabel = cost[2],
      ylabel = "held-out bits per byte", series = series, logx = true, legend = "outside" }
    for _, extension in ipairs{ ".png", ".svg" } do
      figure.output = ("%s/%s%s"):format(dir, cost[1], extension)
      lac.plot.scatter(figure)
    end
    if cost[1] == "attention_flops" then
      figure.output, figure.size = nil, { 100, 24 }
      io.stdout:write("\n", lac.plot.scatter(figure))
    end
  end
end

-- the configuration of the run in a folder, which must be a sweep's
local function config_in(dir)
  local config, reason = runlog.config(dir)
  if reason then refuse("%s", reason) end
  if config and config.program and config.program ~= SPEC.program then
    refuse("%s holds a run of %s", dir, config.program)
  end
  return config
end

-- settle --resume: options come from the sweep that is there, if there is one, and those given must agree
local function take_config(o)
  o.out = o.out or runlog.newest{ name = "sweep_segments" }
  if not o.out then refuse("--resume: there is no sweep in runs/; name one with --out") end
  local config = config_in(o.out)
  if not config then return nil end
  if not config.text_sum then
    refuse("%s is not a sweep that can be resumed: its config.json has no text_sum", o.out)
  end
  if o.device then o.device = lac.default_device(o.device) end -- cuda is cuda:0, as the sweep has it
  for _, entry in ipairs(SPEC) do
    local name = entry.name
    if not FREE[name] then
      if o.given[name] and o[name] ~= config[name] then
        refuse("--%s is %s in %s and %s now: a sweep that goes on keeps it", (name:gsub("_", "-")),
          lac.schema.show(config[name]), o.out, lac.schema.show(o[name]))
      end
      o[name] = config[name]
    end
  end
  return config
end

local function open_log(o, resumed, text_sum)
  if o.out and not o.resume and config_in(o.out) then
    refuse("%s holds a sweep: --resume goes on with it", o.out)
  end
  local log = runlog.open(o.out and { path = o.out, append = false } or { name = "sweep_segments" })
  if resumed then return log end
  -- text_sum: to notice that a resumed sweep has got another text
  local config = { program = SPEC.program, text_sum = text_sum }
  for _, entry in ipairs(SPEC) do
    if not FREE[entry.name] then config[entry.name] = o[entry.name] end
  end
  log:config(config)
  return log
end

local function main(o)
  local resumed = o.resume and take_config(o)
  if o.quick and not resumed then cli.preset(o, QUICK) end
  if o.threads then lac.threads(o.threads) end
  o.device = lac.default_device(o.device)
  local text = o.data and lac.data.open(o.data) or lac.data.bible()
  if o.quick and text.size > QUICK_TEXT then text = text:slice(1, QUICK_TEXT) end
  local train, held = text:split{ held_out = o.eval_bytes }
  if resumed and resumed.text_sum ~= train:checksum() then
    refuse("%s is not the text that the sweep in %s was trained on", text.path, o.out)
  end
  local log = open_log(o, resumed, train:checksum())
  printf("%d layers, width %d, context %d; %d steps of %d x %d bytes for each of %d patterns, %d seed(s); %s",
    o.layers, o.width, o.context, o.steps, o.batch, o.context, #configurations(o.context), o.seeds, log.dir)
  local results = run_all(o, train, held, log.dir)
  for _, r in ipairs(results) do
    log:write{ event = "result", name = r.name, mean = r.mean, half_range = r.half_range, bits = r.bits,
      attention_flops = r.attention_flops, total_flops = r.total_flops }
  end
  log:save("sweep.json", json.encode(results, { indent = 2, order = { "name" } }) .. "\n")
  log:save("sweep.csv", csv.encode(rows_of(o, results), COLUMNS))
  show_table(o, results)
  draw(results, log.dir)
  log:close()
end

cli.main(SPEC, arg, main)
