--- decoding.lua: does a token cost the same whatever its position?
--
-- A cache holds what later tokens can still attend to: of LongNet's segments at most the rows of the
-- longest one, of which a token reads sum w / r. So a token at position 1,048,575 should cost what one at
-- 32,767 does, which is the last of all segments and attends to the most. On CUDA the model is LongNet-125M
-- in bf16, and position 1,024, with an eleventh of the keys, is compared too: there a token is some two
-- hundred launches, whose time hides the keys. On the CPU, with a small model, keys are what a token costs,
-- and the first row says so without a target. Prompts are really computed, in pieces of the longest segment;
-- the token that is timed is taken back by rewind. The space of a cache doubles when it is full, so twice as
-- much is as much. The floor of a token is to read all weights once. Positions are RoPE's: a million of them
-- are beyond what XPOS can scale by.
--
-- Measured on an H200: 566 tokens a second at 1,024, 553 at 32,767 (1.04 of the time; 1.00 in most turns)
-- and 562 at 1,048,575 (1.00). The pace is the host's, 185 operators in 1.75 ms, also when it need not wait.
-- Before the keys of a few rows were shared out among thread blocks (kernels/attn_few.cu) it was 563 and 477:
-- the attention of a layer took 110 us at 32,767, in one launch whose thread blocks walked over their keys
-- alone.

local lac = require "lacuna"

local LARGE = { size = "125M", vocab = 50304, context = 1048576, dtype = "bf16",
  positions = "rope", at = { 1024, 32767, 1048575 } }
local SMALL = { vocab = 256, layers = 2, width = 256, heads = 4, context = 65536,
  segments = { 256, 512, 1024, 2048, 4096 }, dilations = { 1, 2, 4, 6, 12 },
  positions = "rope", at = { 128, 4095, 65535 } }
local QUICK = { vocab = 64, layers = 1, width = 32, heads = 4, context = 256, segments = { 16, 64 },
  dilations = { 1, 2 }, at = { 16, 63, 255 } }

-- a cache that has taken `count` tokens
local function filled(model, count, piece)
  local state = model:cache{ keep = 1 }
  for first = 1, count, piece do
    lac.scope(function()
      local tokens = lac.randint{ 1, math.min(piece, count - first + 1), high = model.vocab, dtype = "i32" }
      model:decode(tokens, state, { logits = "last" })
    end)
  end
  return state
end

local function run(b)
  local cuda = lac.default_device():find "^cuda" ~= nil
  local o = {}
  for name, value in pairs(b:size(cuda and LARGE or SMALL, QUICK)) do o[name] = value end
  local positions = o.at
  o.at = nil
  local model = lac.nn.LongNetLM(o):eval()
  local longest = o.segments and o.segments[#o.segments] or 32768
  local token, sides, bytes = lac.zeros{ 1, 1, dtype = "i32" }, {}, {}
  for i, p in ipairs(positions) do
    local state = filled(model, p, longest)
    bytes[i] = state:bytes()
    sides[i] = function()
      model:decode(token, state, { logits = "last" })
      state:rewind(p)
    end
  end
  local text = "token at %d against %d"
  b:row{ what = text:format(positions[2], positions[1]), ours = sides[2], floor = sides[1],
    against = ("position %d"):format(positions[1]), as = "time", at_most = cuda and 1.1 or nil, work = 1,
    unit = "tokens/s" }
  b:row{ what = text:format(positions[3], positions[2]), ours = sides[3], floor = sides[2],
    against = ("position %d"):format(positions[2]), as = "time", at_most = 1.1, work = 1, unit = "tokens/s" }
  b:row{ what = ("token at %d against reading the weights"):format(positions[3]), ours = sides[3],
    floor = "copy", work = model:parameter_count() * (o.dtype and 2 or 4) }
  b:value{ what = ("cache at %d"):format(positions[3]), value = bytes[3], unit = "B", other = bytes[2],
    against = ("position %d"):format(positions[2]), at_most = 2.01 * bytes[2] }
end

return { name = "decoding", about = "a token's time at positions far apart, and its cache", device = "any",
  run = run }
