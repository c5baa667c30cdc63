--- language_model.lua: a byte-level LongNet language model on real text, beside two baselines.
--
--   build/bin/lacuna experiments/language_model.lua            about five minutes on two cores
--   build/bin/lacuna experiments/language_model.lua --out runs/a --resume     go on after a crash
--   build/bin/lacuna experiments/language_model.lua --evaluate runs/a         held-out bits
--   build/bin/lacuna experiments/language_model.lua --generate runs/a --prompt "And God said"
--   build/bin/lacuna experiments/language_model.lua --help
--
-- The last --eval-bytes bytes of the text are held out; everything before them trains. Held-out quality is
-- bits per byte over every held-out byte but the first, each byte predicted from at least context - stride
-- bytes before it (but for the first window). Beside it stand, on the very same bytes: an order-2 byte model
-- with Witten-Bell interpolation, counted on the same training part, and `xz -9` of the held-out bytes
-- alone. xz of the whole text is printed too, because alone xz has no training text to learn from; neither
-- is the same task as the model's, and the table says so.
--
-- Everything about a run is in its folder: config.json, log.jsonl, checkpoint.safetensors (and the one before
-- it), loss.png, loss.svg, sample.txt. The same seed on the same machine gives the same run, bit for bit,
-- also when it was killed and resumed: the same command line with --resume starts, goes on or only prints the
-- result, as far as the run is. --evaluate and --generate need nothing but the folder or a checkpoint.

local lac = require "lacuna"
local cli = require "lacuna.cli"
local json = require "lacuna.json"
local runlog = require "lacuna.log"
local schema = require "lacuna.schema"
local sys = require "lacuna.sys"

local option = cli.option

local SPEC = {
  program = "language_model",
  about = "Trains a byte-level LongNet language model and compares it with an order-2 model and xz.",
  option("data"),
  { name = "segments", type = "integers", min = 1, default = { 64, 128, 256 }, help = "segment lengths" },
  { name = "dilations", type = "integers", min = 1, default = { 1, 2, 4 },
  help = "dilation of each segment length" },
  { name = "scheme", one_of = { "all", "split" }, default = "all",
  help = "every head in every branch, or heads divided" },
  { name = "merge", one_of = { "lse", "lse_detach", "mean", "sum" },
  help = "merge of branches (default: the scheme's)" },
  { name = "offset", one_of = { "mod", "block", "branch" }, help = "offset rule (default: the scheme's)" },
  option("layers", { default = 4 }),
  option("width", { default = 128 }),
  option("heads", { default = 4 }),
  { name = "ffn", type = "integer", min = 1, help = "width of the feed-forward part (default 4 x width)" },
  { name = "positions", one_of = { "xpos", "rope", "none" }, default = "xpos", help = "position encoding" },
  { name = "dropout", type = "number", min = 0, below = 1, default = 0,
  help = "dropout on the residual branches" },
  option("context", { default = 256 }),
  option("batch"),
  option("steps", { default = 1400 }),
  { name = "minutes", type = "number", above = 0, help = "stop training after this time, whatever the step" },
  option("lr"),
  { name = "warmup", type = "integer", min = 0, default = 50,
  help = "steps of linear warm-up, then a cosine to lr / 20" },
  { name = "weight_decay", type = "number", min = 0, default = 0.05,
  help = "AdamW's weight decay (matrices only)" },
  { name = "clip", type = "number", above = 0, default = 1, help = "largest gradient norm" },
  { name = "precision", one_of = { "f32", "bf16", "f16" }, default = "f32",
  help = "of the model; updates are f32 (f16: with loss scaling)" },
  { name = "accumulate", type = "integer", min = 1, default = 1,
  help = "batches whose gradients make one step" },
  { name = "checkpoint_activations", type = "boolean",
  help = "less memory, a third more time: compute blocks again in the backward pass" },
  { name = "graph", type = "boolean", help = "on cuda: forward and backward as one captured graph" },
  { name = "nan_watch", type = "boolean", help = "stop at the first NaN or infinity and name its operator" },
  { name = "profile", type = "integer", min = 1,
  help = "profile so many steps, print the table, write trace.json beside the log" },
  option("seed", { help = "of initial values, data order and sampling" }),
  option("eval_bytes", { default = 131072 }),
  { name = "eval_every", type = "integer", min = 0, default = 200,
  help = "steps between evaluations on 16 KB (0: none)" },
  { name = "stride", type = "integer", min = 1,
  help = "bytes between held-out windows (default context / 2)" },
  { name = "sample", type = "integer", min = 0, default = 300, help = "bytes to sample at the end" },
  { name = "prompt", type = "string", default = "In the beginning ", help = "what the sample continues" },
  { name = "temperature", type = "number", min = 0, default = 0.8, help = "of the sample" },
  { name = "top_k", type = "integer", min = 1, default = 40, help = "candidates of the sample" },
  { name = "out", type = "string", help = "run folder (default runs/language_model-<time>)" },
  { name = "resume", type = "boolean", help = "go on with the run in --out (default: the latest in runs/)" },
  { name = "checkpoint_every", type = "integer", min = 0, default = 200,
  help = "steps between checkpoints (0: only at the end)" },
  { name = "keep", type = "integer", min = 1, default = 2, help = "checkpoints that stay" },
  { name = "evaluate", type = "string", help = "only evaluate this run folder or checkpoint" },
  { name = "generate", type = "string", help = "only sample from this run folder or checkpoint" },
  option("device"),
  option("threads"),
  option("quick", { help = "a run of seconds: tiny model, little text (other options still apply)" }),
}

-- what --quick means, for options that were not given
local QUICK = { segments = { 16, 32 }, dilations = { 1, 2 }, layers = 2, width = 32, heads = 4, context = 32,
  batch = 8,
  steps = 30, warmup = 5, eval_bytes = 2048, eval_every = 15, sample = 40, checkpoint_every = 10 }
local QUICK_TEXT = 200000
local PEEK = 16384 -- bytes of the evaluations during training
-- what may differ between the sessions of one run, because the numbers do not depend on it
local FREE = { checkpoint_activations = true, nan_watch = true, minutes = true, profile = true, graph = true,
  sample = true, prompt = true, temperature = true, top_k = true, out = true,
  threads = true, resume = true, checkpoint_every = true, keep = true, evaluate = true, generate = true }

-- what --evaluate and --generate read; the model is as it was trained
local READS = {
  evaluate = { "data", "device", "eval_bytes", "quick", "stride", "threads" },
  generate = { "device", "prompt", "sample", "seed", "temperature", "threads", "top_k" },
}

local function refuse(format, ...) error(format:format(...), 0) end

local function printf(...)
  io.stdout:write(string.format(...), "\n")
  io.stdout:flush()
end

local function count_text(n)
  for _, unit in ipairs{ { 1e12, "T" }, { 1e9, "G" }, { 1e6, "M" }, { 1e3, "k" } } do
    if n >= unit[1] then return ("%.2f %s"):format(n / unit[1], unit[2]) end
  end
  return ("%d"):format(n)
end

local function load_text(o)
  local text = o.data and lac.data.open(o.data) or lac.data.bible()
  if o.quick and text.size > QUICK_TEXT then text = text:slice(1, QUICK_TEXT) end
  return text
end

local function build_model(o)
  return lac.nn.LongNetLM{ vocab = 256, layers = o.layers, width = o.width, heads = o.heads, ffn = o.ffn,
    context = o.context,
    segments = o.segments, dilations = o.dilations, scheme = o.scheme, merge = o.merge, offset = o.offset,
    positions = o.positions, dropout = o.dropout, checkpoint_activations = o.checkpoint_activations,
    dtype = o.precision }
end

local function describe(o, model, text, train, held)
  local flops, parts = model:flops_per_token()
  local memory = model:memory_estimate(o.batch)
  local tokens = o.batch * o.accumulate * o.context * o.steps
  printf("text        %s: %d bytes, %d train, %d held out", text.path, text.size, train.size, held.size)
  printf("model       %d layers, width %d, %d heads, context %d: %d parameters", o.layers, o.width, o.heads,
    o.context,
    model:parameter_count())
  printf("attention   segments {%s}, dilations {%s}, heads %s, offset %s, merge %s",
    table.concat(o.segments, ", "), table.concat(o.dilations, ", "), model.layers[1].attention.pattern.heads,
    model.layers[1].attention.pattern.offset, model.layers[1].attention.pattern.merge)
  printf("cost        %sFLOP a token forward and backward (%.0f%% attention), about %.0f MB of memory",
    count_text(flops),
    100 * (parts.attention_forward + parts.attention_backward) / flops, memory / 1e6)
  printf("training    %d steps of %d x %d bytes: %s bytes, %.1f passes, %sFLOP", o.steps,
    o.batch * o.accumulate, o.context,
    count_text(tokens), tokens / train.size, count_text(tokens * flops))
end

local function config_of(o)
  local config = { program = SPEC.program }
  for _, entry in ipairs(SPEC) do
    local name = entry.name
    if not FREE[name] or name == "threads" then config[name] = o[name] end
  end
  return config
end

-- the options of the run that a checkpoint belongs to; those given now must agree, unless they are free
local function take_config(o, config, from)
  if o.device then o.device = lac.default_device(o.device) end -- cuda is cuda:0, as the run has it
  for _, entry in ipairs(SPEC) do
    local name = entry.name
    if not FREE[name] then
      if o.given[name] and json.encode(o[name]) ~= json.encode(config[name]) then
        refuse("--%s is %s in %s and %s now: a run that goes on keeps it",
          (name:gsub("_", "-")), schema.show(config[name]), from, schema.show(o[name]))
      end
      o[name] = config[name]
    end
  end
end

-- the run folder that --resume means: --out, else the newest of this program
local function resume_folder(o)
  if o.out then return o.out end
  local newest = runlog.newest{ name = "language_model" }
  if not newest then
    refuse("--resume: there is no run in runs/; name one with --out")
  end
  return newest
end

-- a folder that another program's run is in stays that run's, with --resume and without
local function check_program(o)
  local config, reason = runlog.config(o.out)
  if config and config.program and config.program ~= SPEC.program then
    refuse("%s holds a run of %s", o.out, config.program)
  elseif reason and not sys.exists(o.out .. "/checkpoint.safetensors") then
    refuse("%s holds a run of an unknown program: %s", o.out, reason)
  end
end

-- settle --resume: options from the checkpoint, if there is one; returns its configuration then
local function prepare_resume(o)
  o.out = resume_folder(o)
  local path = sys.exists(o.out) and lac.train.latest(o.out)
  if not path then return nil end
  local config = lac.train.load_checkpoint(path).config
  take_config(o, config, path)
  return config
end

local function settle_options(o)
  if o.out then check_program(o) end
  local config = o.resume and prepare_resume(o)
  if o.quick then
    local values = {}
    for name, value in pairs(QUICK) do
      if not config or FREE[name] then values[name] = value end -- the others are the run's
    end
    cli.preset(o, values)
  end
  if o.threads then lac.threads(o.threads) end
  o.stride = o.stride or math.max(1, math.floor(o.context / 2))
  if o.stride > o.context then -- not at the end of the training
    refuse("--stride %d is more than --context %d: bytes would be left out", o.stride, o.context)
  end
  if o.given.warmup and o.warmup >= o.steps then
    refuse("--warmup %d leaves nothing of --steps %d", o.warmup, o.steps)
  end
  for _, name in ipairs{ "prompt", "temperature", "top_k" } do
    if o.given[name] and o.sample == 0 then
      refuse("--%s does nothing beside --sample 0", (name:gsub("_", "-")))
    end
  end
  return config
end

-- the folder and its log; an older run in it is not written over
local function open_log(o, resumed)
  if not o.out then return runlog.open{ name = "language_model" } end
  if not o.resume and sys.exists(o.out .. "/checkpoint.safetensors") then
    refuse("%s holds the checkpoint of a run: --resume goes on with it", o.out)
  end
  return runlog.open{ path = o.out, append = resumed ~= nil }
end

local function train_model(o, model, train, held, log)
  local optimizer = lac.optim.adamw(lac.optim.groups(model, { weight_decay = o.weight_decay }),
    { lr = o.lr, betas = { 0.9, 0.98 }, master = o.precision ~= "f32" })
  local schedule = lac.optim.schedule
  local warmup = math.min(o.warmup, o.steps - 1)
  local peek = held:slice(1, math.min(PEEK, held.size))
  local config = config_of(o)
  log:config(config)
  config.text_sum = train:checksum() -- to notice that a resumed run has got another text
  return lac.train.fit{
    model = model, optimizer = optimizer, steps = o.steps, minutes = o.minutes, clip = o.clip,
    schedule = schedule.warmup(warmup, schedule.cosine{ steps = o.steps - warmup, min = 0.05 }),
    batch = function(k) return train:batch(k, { batch = o.batch, context = o.context, seed = o.seed }) end,
    evaluate = function(m) return { bits_per_byte = lac.train.bits_per_byte(m, peek) } end,
    eval_every = o.eval_every,
    scaler = o.precision == "f16" and lac.optim.loss_scaler() or nil,
    accumulate = o.accumulate, nan_watch = o.nan_watch, profile = o.profile, graph = o.graph,
    log = log, checkpoint = log:path("checkpoint.safetensors"), config = config,
    checkpoint_every = o.checkpoint_every, keep = o.keep, resume = o.resume,
  }
end

local function draw(log, result)
  local steps, bits, evals, eval_bits, low = {}, {}, {}, {}, result.bits_per_byte
  for _, r in ipairs(runlog.read(log:path("log.jsonl"))) do
    if r.event == "step" then
      steps[#steps + 1], bits[#bits + 1] = r.step, r.smooth / math.log(2)
      low = math.min(low, bits[#bits])
    elseif r.event == "eval" then
      evals[#evals + 1], eval_bits[#eval_bits + 1] = r.step, r.bits_per_byte
      low = math.min(low, r.bits_per_byte)
    end
  end
  local function level(label, value)
    return { label = label, x = { 0, steps[#steps] }, y = { value, value } }
  end
  local series = { { label = "LongNet, training (smoothed)", x = steps, y = bits } }
  if #evals > 0 then
    series[2] = { label = "LongNet, held out (first 16 KB)", x = evals, y = eval_bits, style = "linespoints" }
  end
  series[#series + 1] = level("order-2 model, held out", result.order2_bits_per_byte)
  series[#series + 1] = level("xz -9, held out alone", result.xz_held_out_bits_per_byte)
  local high = math.max(result.order2_bits_per_byte, result.xz_held_out_bits_per_byte, bits[#bits])
  local figure = { title = ("Byte-level LongNet: %.3f bits per byte held out"):format(result.bits_per_byte),
    xlabel = "step", ylabel = "bits per byte", series = series, yrange = { low * 0.95, high * 1.4 } }
  for _, name in ipairs{ "loss.png", "loss.svg" } do
    figure.output = log:path(name)
    lac.plot.lines(figure)
  end
  figure.output, figure.size = nil, { 78, 22 }
  io.stdout:write("\n", lac.plot.lines(figure))
end

local function table_of(rows)
  printf("")
  for _, row in ipairs(rows) do printf("  %-34s %8.4f   %s", row[1], row[2], row[3]) end
  printf("")
end

local function print_sample(o, sample)
  printf("\nsample (temperature %g, top %d):\n%s", o.temperature, o.top_k, (sample:gsub("[^%g%s]", "?")))
end

local function generate(o, model)
  return o.prompt .. model:generate(o.prompt, o.sample,
    { temperature = o.temperature, top_k = o.top_k, seed = o.seed })
end

-- held-out bytes of another number, or of a shorter text, would be bytes that the run was trained on
local function check_held_out(o, config, from)
  if o.data and o.data ~= config.data then return end
  if o.given.eval_bytes and config.eval_bytes and o.eval_bytes > config.eval_bytes then
    refuse("--eval-bytes %d: %s was trained on all but the last %d bytes", o.eval_bytes, from,
      config.eval_bytes)
  end
  if o.given.quick and not config.quick then
    refuse("--quick: %s was trained on the whole text, and the beginning of it holds no held-out bytes", from)
  end
end

-- --evaluate and --generate: a model from its checkpoint; options of the run that were not given come from
-- there
local function load_run(o, path)
  lac.default_device(o.device)
  local model, info = lac.train.load_model(path)
  check_held_out(o, info.config, info.path)
  for _, name in ipairs{ "data", "eval_bytes", "stride", "quick" } do
    if not o.given[name] and info.config[name] ~= nil then o[name] = info.config[name] end
  end
  if o.threads then lac.threads(o.threads) end
  printf("model       %s, step %d: %d parameters, context %d", info.path, info.step, model:parameter_count(),
    model.context)
  return model, info
end

local function check_given(o, mode)
  local reads = { [mode] = true }
  for _, name in ipairs(READS[mode]) do reads[name] = true end
  for _, entry in ipairs(SPEC) do
    if o.given[entry.name] and not reads[entry.name] then
      refuse("--%s does nothing beside --%s, which reads --%s", (entry.name:gsub("_", "-")), mode,
        (table.concat(READS[mode], ", --"):gsub("_", "-")))
    end
  end
end

local function evaluate_run(o)
  local model, info = load_run(o, o.evaluate)
  local text = load_text(o)
  local train, held = text:split{ held_out = o.eval_bytes }
  local config = info.config
  if o.data == config.data and o.eval_bytes == config.eval_bytes and config.text_sum
    and config.text_sum ~= train:checksum() then
    refuse("%s is not the text any more that %s was trained on; --data names another one to evaluate",
      text.path, info.path)
  end
  local bits, counted = lac.train.bits_per_byte(model, held, { stride = o.stride })
  printf("LongNet, held out  %.4f bits per byte, %d bytes, each from %d or more before it", bits, counted,
    model.context - (o.stride or model.context))
end

local function generate_run(o)
  print_sample(o, generate(o, load_run(o, o.generate)))
end

local function main(o)
  if (o.resume and 1 or 0) + (o.evaluate and 1 or 0) + (o.generate and 1 or 0) > 1 then
    refuse("--resume, --evaluate and --generate exclude each other")
  end
  for _, mode in ipairs{ "evaluate", "generate" } do
    if o[mode] then check_given(o, mode) end
  end
  if o.generate and o.sample == 0 then refuse("--sample 0 leaves --generate nothing to do") end
  if o.evaluate then return evaluate_run(o) end
  if o.generate then return generate_run(o) end
  local resumed = settle_options(o)
  o.device = lac.default_device(o.device)
  lac.manual_seed(o.seed)
  local text = load_text(o)
  local train, held = text:split{ held_out = o.eval_bytes }
  if resumed and resumed.text_sum ~= train:checksum() then
    refuse("%s is not the text that the run in %s was trained on", text.path, o.out)
  end
  local model = build_model(o)
  describe(o, model, text, train, held)
  local log = open_log(o, resumed)
  printf("run folder  %s\n", log.dir)

  local order2_bits = lac.data.order2(train):bits_per_byte(held)
  local fit = train_model(o, model, train, held, log)
  local bits, counted = lac.train.bits_per_byte(model, held, { stride = o.stride })
  local xz_alone, xz_whole = lac.data.xz_size(held) * 8 / held.size, lac.data.xz_size(text) * 8 / text.size
  local result = { event = "result", bits_per_byte = bits, bytes = counted,
    order2_bits_per_byte = order2_bits,
    xz_held_out_bits_per_byte = xz_alone, xz_whole_bits_per_byte = xz_whole, steps = fit.steps,
    train_seconds = fit.seconds, tokens_per_second = fit.tokens_per_second }
  log:write(result)

  if o.sample > 0 then
    local sample = generate(o, model)
    log:save("sample.txt", sample .. "\n")
    print_sample(o, sample)
  end
  draw(log, result)
  table_of{
    { "LongNet, held out", bits, ("bits per byte, %d bytes, each from %d or more before it"):format(counted,
      o.context - o.stride) },
    { "order-2 model, held out", order2_bits, "Witten-Bell, counted on the same training bytes" },
    { "xz -9, held out alone", xz_alone, "no training text: learns from these bytes only" },
    { "xz -9, whole text", xz_whole, "mean over training and held-out bytes" },
  }
  printf("%d steps in %.0f s, %.0f bytes a second; everything is in %s", fit.steps, fit.seconds,
    fit.tokens_per_second,
    log.dir)
  log:close()
end

cli.main(SPEC, arg, main)
