--- Philox4x32-10 in uint64 arithmetic, independent of the engine: which pairs dropout keeps.
--
-- Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011). A pair has a word, whose
-- upper 24 bits are a number in [0, 1); what is below the rate in f32 is dropped.

local direct = require "support.attn_direct"
local bit = require "bit"
local u64 = direct.ffi.typeof "uint64_t"

local philox = {}

local function xor(a, b, d) return bit.bxor(bit.tobit(a), bit.tobit(b), bit.tobit(d)) % 2 ^ 32 end
local function high(p) return tonumber(p / 4294967296ULL) end
local function low(p) return tonumber(p % 4294967296ULL) end

--- Word `index` (from 0) of the stream that seed and offset name, an integer below 2^32.
function philox.word(seed, offset, index)
  local block = math.floor(index / 4)
  local x, k = { block % 2 ^ 32, math.floor(block / 2 ^ 32), offset, 0 }, { seed, 0 }
  for _ = 1, 10 do
    local p0, p1 = u64(0xD2511F53) * u64(x[1]), u64(0xCD9E8D57) * u64(x[3])
    x = { xor(high(p1), x[2], k[1]), low(p1), xor(high(p0), x[4], k[2]), low(p0) }
    k = { (k[1] + 0x9E3779B9) % 2 ^ 32, (k[2] + 0xBB67AE85) % 2 ^ 32 }
  end
  return x[index % 4 + 1]
end

--- Does dropout keep a pair? A function of batch item, head, row and key for the oracle; nil without dropout.
-- draws: how many words the sequences before have used.
function philox.keep(c, draws)
  if c.dropout == 0 then return nil end
  return function(b, h, n, j)
    local word = philox.word(c.seed, c.rng_offset or 0, (draws or 0) + ((b * c.H + h) * c.N + n) * c.M + j)
    return math.floor(word / 256) * 2 ^ -24 >= direct.round.f32(c.dropout)
  end
end

return philox
