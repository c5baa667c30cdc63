--- language_model.lua: a byte-level LongNet language model on real text, beside two baselines.
--
--   build/bin/lacuna experiments/language_model.lua            about five minutes on two cores
--   build/bin/lacuna experiments/language_model.lua --help
--
-- The last --eval-bytes bytes of the text are held out; everything before them trains. Held-out quality is
-- bits per byte over every held-out byte but the first, each byte predicted from at least context - stride
-- bytes before it (but for the first window). Beside it stand, on the very same bytes: an order-2 byte model
-- with Witten-Bell interpolation, counted on the same training part, and `xz -9` of the held-out bytes
-- alone. xz of the whole text is printed too, because alone xz has no training text to learn from; neither
-- is the same task as the model's, and the table says so.
--
-- Everything about a run is in its folder: config.json, log.jsonl, checkpoint.safetensors, loss.png,
-- loss.svg, sample.txt. The same seed on the same machine gives the same run, bit for bit.

local lac = require "lacuna"
local cli = require "lacuna.cli"
local runlog = require "lacuna.log"

local SPEC = {
  program = "language_model",
  about = "Trains a byte-level LongNet language model and compares it with an order-2 model and xz.",
  { name = "data", type = "string",
  help = "text file (default: the King James Bible of Debian's bible-kjv)" },
  { name = "segments", type = "integers", min = 1, default = { 64, 128, 256 }, help = "segment lengths" },
  { name = "dilations", type = "integers", min = 1, default = { 1, 2, 4 },
  help = "dilation of each segment length" },
  { name = "scheme", one_of = { "all", "split" }, default = "all",
  help = "every head in every branch, or heads divided" },
  { name = "merge", one_of = { "lse", "lse_detach", "mean", "sum" },
  help = "merge of branches (default: the scheme's)" },
  { name = "offset", one_of = { "mod", "block", "branch" }, help = "offset rule (default: the scheme's)" },
  { name = "layers", type = "integer", min = 1, default = 4, help = "blocks" },
  { name = "width", type = "integer", min = 1, default = 128, help = "model width" },
  { name = "heads", type = "integer", min = 1, default = 4, help = "attention heads" },
  { name = "ffn", type = "integer", min = 1, help = "width of the feed-forward part (default 4 x width)" },
  { name = "positions", one_of = { "xpos", "rope", "none" }, default = "xpos", help = "position encoding" },
  { name = "dropout", type = "number", min = 0, below = 1, default = 0,
  help = "dropout on the residual branches" },
  { name = "context", type = "integer", min = 2, default = 256, help = "bytes in a window" },
  { name = "batch", type = "integer", min = 1, default = 8, help = "windows in a step" },
  { name = "steps", type = "integer", min = 1, default = 1400, help = "training steps" },
  { name = "minutes", type = "number", above = 0, help = "stop training after this time, whatever the step" },
  { name = "lr", type = "number", above = 0, default = 4e-3, help = "largest learning rate" },
  { name = "warmup", type = "integer", min = 0, default = 50,
  help = "steps of linear warm-up, then a cosine to lr / 20" },
  { name = "weight_decay", type = "number", min = 0, default = 0.05,
  help = "AdamW's weight decay (matrices only)" },
  { name = "clip", type = "number", above = 0, default = 1, help = "largest gradient norm" },
  { name = "seed", type = "integer", min = 0, default = 1,
  help = "of initial values, data order and sampling" },
  { name = "eval_bytes", type = "integer", min = 16, default = 131072,
  help = "held-out bytes at the end of the text" },
  { name = "eval_every", type = "integer", min = 0, default = 200,
  help = "steps between evaluations on 16 KB (0: none)" },
  { name = "stride", type = "integer", min = 1,
  help = "bytes between held-out windows (default context / 2)" },
  { name = "sample", type = "integer", min = 0, default = 300, help = "bytes to sample at the end" },
  { name = "prompt", type = "string", default = "In the beginning ", help = "what the sample continues" },
  { name = "temperature", type = "number", min = 0, default = 0.8, help = "of the sample" },
  { name = "top_k", type = "integer", min = 1, default = 40, help = "candidates of the sample" },
  { name = "out", type = "string", help = "run folder (default runs/language_model-<time>)" },
  { name = "threads", type = "integer", min = 1, help = "CPU threads (default: all cores)" },
  { name = "quick", type = "boolean",
  help = "a run of seconds: tiny model, little text (other options still apply)" },
}

-- what --quick means, for options that were not given
local QUICK = { segments = { 16, 32 }, dilations = { 1, 2 }, layers = 2, width = 32, heads = 4, context = 32,
  batch = 8,
  steps = 30, warmup = 5, eval_bytes = 2048, eval_every = 15, sample = 40 }
local QUICK_TEXT = 200000
local PEEK = 16384 -- bytes of the evaluations during training

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
    positions = o.positions, dropout = o.dropout }
end

local function describe(o, model, text, train, held)
  local flops, parts = model:flops_per_token()
  local memory = model:memory_estimate(o.batch)
  local tokens = o.batch * o.context * o.steps
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
  printf("training    %d steps of %d x %d bytes: %s bytes, %.1f passes, %sFLOP", o.steps, o.batch, o.context,
    count_text(tokens), tokens / train.size, count_text(tokens * flops))
end

local function train_model(o, model, train, held, log)
  local optimizer = lac.optim.adamw(lac.optim.groups(model, { weight_decay = o.weight_decay }),
    { lr = o.lr, betas = { 0.9, 0.98 } })
  local schedule = lac.optim.schedule
  local warmup = math.min(o.warmup, o.steps - 1)
  local peek = held:slice(1, math.min(PEEK, held.size))
  local config = {}
  for _, option in ipairs(SPEC) do config[option.name] = o[option.name] end
  log:config(config)
  return lac.train.fit{
    model = model, optimizer = optimizer, steps = o.steps, minutes = o.minutes, clip = o.clip,
    schedule = schedule.warmup(warmup, schedule.cosine{ steps = o.steps - warmup, min = 0.05 }),
    batch = function(k) return train:batch(k, { batch = o.batch, context = o.context, seed = o.seed }) end,
    evaluate = function(m) return { bits_per_byte = lac.train.bits_per_byte(m, peek) } end,
    eval_every = o.eval_every,
    log = log, checkpoint = log:path("checkpoint.safetensors"), config = config,
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

local function main(o)
  if o.quick then
    for name, value in pairs(QUICK) do
      if not o.given[name] then o[name] = value end
    end
  end
  if o.threads then lac.threads(o.threads) end
  o.stride = o.stride or math.max(1, math.floor(o.context / 2))
  lac.manual_seed(o.seed)
  local text = load_text(o)
  local train, held = text:split{ held_out = o.eval_bytes }
  local model = build_model(o)
  describe(o, model, text, train, held)
  local log = runlog.open(o.out and { path = o.out } or { name = "language_model" })
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
    local sample = o.prompt .. model:generate(o.prompt, o.sample,
      { temperature = o.temperature, top_k = o.top_k, seed = o.seed })
    log:save("sample.txt", sample .. "\n")
    printf("\nsample (temperature %g, top %d):\n%s", o.temperature, o.top_k, (sample:gsub("[^%g%s]", "?")))
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
