--- Attention against golden values that were computed elsewhere.
--
-- The file holds 14 configurations with inputs (f32) and outputs, log-sum-exps and gradients in f64, made by
-- an independent dense implementation and, where those are right, agreeing with two public libraries to
-- 1e-15 (its metadata names them). f64 must agree to 1e-12. f32 must be no worse than twice the error of a
-- naive f32 implementation (support/oracle.lua with rounding), which is the tolerance rule of the whole
-- suite.

local lac = require "lacuna"
local direct = require "support.attn_direct"
local oracle = require "support.oracle"
local json = require "cjson"

local golden, metadata = direct.safetensors("tests/golden/attention_golden.safetensors")

local function config_of(name)
  local m = json.decode(metadata[name])
  local s = m.shape
  return direct.fill { B = s[1], N = s[2], H = s[3], D = s[4], Hk = m.kv_heads, segments = m.segments,
                       dilations = m.dilations, heads = m.heads, offset = m.offset, merge = m.merge,
                       causal = m.causal, lengths = m.padded }
end

local function largest(a)
  local most = 0
  for i = 1, #a do
    if math.abs(a[i]) > most and math.abs(a[i]) < math.huge then most = math.abs(a[i]) end
  end
  return most
end

local names = {}
for name in pairs(metadata) do names[#names + 1] = name end
table.sort(names)

describe("golden attention", function()
  setup(function() direct.device = lac.zeros{ 1 }.c.device end) -- the default one
  teardown(function() direct.device = 0 end)

  it("has 14 cases", function() assert.equal(14, #names) end)

  for _, name in ipairs(names) do
    local function value(tensor) return golden[name .. "/" .. tensor].data end

    local function run(dtype)
      local r = direct.forward(config_of(name), value "q", value "k", value "v", { dtype = dtype })
      local dq, dk, dv = direct.backward(r, value "dout")
      return { out = direct.read(r.out), lse = direct.read(r.lse), dq = direct.read(dq), dk = direct.read(dk),
               dv = direct.read(dv) }
    end

    it(name .. " in f64, and the oracle", function()
      local got = run("f64")
      local own = oracle.run(config_of(name), value "q", value "k", value "v", value "dout")
      for tensor, data in pairs(got) do
        assert.is_true(direct.max_diff(data, value(tensor)) < 1e-12, tensor)
        assert.is_true(direct.max_diff(own[tensor], value(tensor)) < 1e-12, "oracle's " .. tensor)
      end
    end)

    it(name .. " in f32", function()
      local got, f32 = run("f32"), direct.round.f32
      local naive = oracle.run(config_of(name), value "q", value "k", value "v", value "dout", nil,
                               { rounding = { result = f32, sum = f32 } })
      for tensor, data in pairs(got) do
        local allowed = 2 * direct.max_diff(naive[tensor], value(tensor)) + 2 ^ -24 * largest(value(tensor))
        local found = direct.max_diff(data, value(tensor))
        assert.is_true(found <= allowed, ("%s: %g > %g"):format(tensor, found, allowed))
      end
    end)
  end
end)
