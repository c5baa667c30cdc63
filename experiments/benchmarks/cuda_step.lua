--- cuda_step.lua: a training step of LongNet-125M on a GPU beside the same model in PyTorch.
--
-- 12 layers of width 768, 12 heads, hidden width 3,072, vocabulary 50,304, one causal sequence of 32,768
-- tokens, segments 2,048 to 32,768 at dilations 1, 2, 4, 6, 12, in bf16; forward, backward and AdamW. Both
-- sides start from the same weights, and the first loss must agree. `all` runs every head in every branch,
-- `split` divides the heads. PyTorch runs as written with cuDNN's attention and with its flash kernel, and
-- compiled with the faster of the two; ours may be slower than none, and is asked for 1.6 (all) and 1.4 times
-- the speed of the compiled one, after idling and without a pause (Run:paces of bench.lua). Its AdamW updates
-- bf16 weights with bf16 moments, ours f32 masters with f32 moments (see peers/longnet.py). Memory is the
-- peak of a step, parameters and moments included, by the counts of the two pools. Forward and backward
-- captured in a graph have to leave the device idle for less than 2% of the time: gaps.c asks CUPTI for it.

local ffi = require "ffi"
local lac = require "lacuna"
local sys = require "lacuna.sys"

local FULL = { vocab = 50304, layers = 12, width = 768, heads = 12, ffn = 3072, context = 32768,
  segments = { 2048, 4096, 8192, 16384, 32768 }, dilations = { 1, 2, 4, 6, 12 } }
local QUICK = { vocab = 64, layers = 1, width = 48, heads = 6, ffn = 96, context = 64, segments = { 16, 64 },
  dilations = { 1, 3 } }
local DECAY = 0.01
local COMPILED = { all = 1.6, split = 1.4 } -- times the speed of PyTorch, compiled
local MEMORY, LOSS = 0.7, 5e-3 -- of PyTorch's peak; relative, of a loss in bf16
local GAPS = 2 -- percent of a captured step
local PACE = { rounds = 5, idle = 0.05, long = 1 }
local GAPS_SOURCE = debug.getinfo(1, "S").source:match("^@(.*)cuda_step%.lua$") .. "gaps.c"
local CUPTI = { "libcupti.so", "libcupti.so.13", "libcupti.so.12",
  "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so", "/usr/local/cuda/lib64/libcupti.so" }

ffi.cdef[[
const char *gaps_start(const char *path);
void gaps_reset(void);
int64_t gaps_read(double *span, double *busy);
void gaps_stop(void);
]]

local function make(b, scheme)
  local o = { scheme = scheme, dtype = "bf16" }
  for name, value in pairs(b:size(FULL, QUICK)) do o[name] = value end
  local model = lac.nn.LongNetLM(o)
  local optimizer = lac.optim.adamw(lac.optim.groups(model, { weight_decay = DECAY }),
    { lr = 6e-4, betas = { 0.9, 0.98 }, master = true })
  local tokens = lac.randint{ 1, o.context + 1, high = o.vocab }
  local x = tokens[{ {}, { 1, o.context } }]:contiguous()
  local y = tokens[{ {}, { 2, o.context + 1 } }]:contiguous()
  local function step()
    local loss = model:loss(x, y)
    loss:backward()
    optimizer:step()
    optimizer:zero_grad{ release = true }
    return loss:item()
  end
  return { options = o, model = model, step = step, x = x, y = y, optimizer = optimizer }
end

local function peak_of(step)
  lac.reset_peak()
  lac.scope(function() step() end)
  return lac.memory(lac.default_device()).peak
end

local function compare(b, m, name, arguments, weights, data, first, peak)
  local o = m.options
  arguments.weights, arguments.batch, arguments.decay = weights, data, DECAY
  arguments.options = { layers = o.layers, width = o.width, heads = o.heads, context = o.context,
    segments = o.segments, dilations = o.dilations, scheme = o.scheme }
  local what, least = ("step, %s, %s"):format(o.scheme, name), arguments.compiled and COMPILED[o.scheme] or 1
  local side, told = b:case("longnet", "step", arguments)
  if not side then
    b:value{ what = what, problem = told, at_least = least }
    return math.huge
  end
  local last -- the peer's time, sustained
  for _, pace in ipairs(b:paces({ function() lac.scope(m.step) end, side }, PACE)) do
    local mine, theirs = unpack(pace.times)
    b:value{ what = ("%s%s: %.0f tokens/s, theirs %.0f"):format(what, pace.name, o.context / mine,
      o.context / theirs), value = theirs / mine, unit = "x", at_least = least }
    last = theirs
  end
  side:drop()
  b:value{ what = "  relative difference of the first loss", value = math.abs(told.loss - first) / first,
    at_most = LOSS }
  if told.peak then
    b:value{ what = "  peak memory, of PyTorch's", value = peak / told.peak, at_most = MEMORY, other = 1,
      against = ("= %.1f GiB, ours %.1f GiB"):format(told.peak / 2 ^ 30, peak / 2 ^ 30) }
  end
  return last
end

-- gaps.c, tracing; or nil and why not
local function tracer()
  local library = sys.temporary("-gaps.so")
  local status, _, err = sys.run(("cc -O2 -shared -fPIC -o %s %s -ldl"):format(sys.quote(library),
    sys.quote(GAPS_SOURCE)))
  if status ~= 0 then return nil, "gaps.c cannot be compiled: " .. err end
  local gaps, reason = ffi.load(library), nil
  os.remove(library)
  for _, path in ipairs(CUPTI) do
    local answer = gaps.gaps_start(path)
    if answer == nil then return gaps end
    reason = reason or "no CUPTI: " .. ffi.string(answer)
  end
  return nil, reason
end

-- percent of a captured forward and backward in which no kernel runs: the median of five
local function idle_share(m)
  local gaps, reason = tracer()
  if not gaps then return nil, reason end
  local span, busy, shares = ffi.new("double[1]"), ffi.new("double[1]"), {}
  local captured = lac.graph(function()
    local loss = m.model:loss(m.x, m.y)
    loss:backward()
    return loss:detach():clone()
  end)
  for i = 1, 7 do -- the first runs as it is, the second is captured
    lac.synchronize()
    gaps.gaps_reset()
    captured()
    lac.synchronize()
    if gaps.gaps_read(span, busy) <= 0 then reason = "CUPTI saw no kernels, or too many" end
    shares[i] = 100 * (1 - busy[0] / span[0])
    m.optimizer:zero_grad{ release = true }
  end
  gaps.gaps_stop()
  captured:release()
  if reason then return nil, reason end
  shares = { unpack(shares, 3) }
  table.sort(shares)
  return shares[3]
end

local function report_gaps(b, m)
  local share, reason
  if b.quick then
    reason = "only on cuda, of the whole model"
  else
    share, reason = lac.scope(idle_share, m)
  end
  b:value{ what = ("captured step, %s: no kernel runs"):format(m.options.scheme), value = share,
    problem = reason, unit = "%", at_most = GAPS }
end

return {
  name = "cuda_step",
  about = "a training step of LongNet-125M, 32,768 tokens, bf16",
  device = "cuda",
  once = true,
  run = function(b)
    local weights, data = sys.temporary("-weights.safetensors"), sys.temporary("-batch.safetensors")
    for _, scheme in ipairs{ "all", "split" } do
      lac.scope(function()
        local m = make(b, scheme)
        lac.io.save(weights, m.model:state_dict())
        lac.io.save(data, { tokens = m.x, targets = m.y })
        local first = lac.scope(m.step)
        lac.scope(function() m.step() end)
        local peak = peak_of(m.step)
        local function beside(kernel, compiled)
          return compare(b, m, ("PyTorch %s, %s"):format(compiled and "compiled" or "eager", kernel),
            { kernel = kernel, compiled = compiled }, weights, data, first, peak)
        end
        local flash = beside("flash", false)
        if b.quick then return report_gaps(b, m) end -- a CPU has no cuDNN; compiling takes long
        beside(beside("cudnn", false) < flash and "cudnn" or "flash", true)
        report_gaps(b, m)
      end)
    end
    os.remove(weights)
    os.remove(data)
  end,
}
