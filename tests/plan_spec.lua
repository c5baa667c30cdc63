--- Plans: strips, counts, overlap, errors, and the cache under many threads.
--
-- Counts are compared with the dense mask of support/oracle.lua over random configurations, because the
-- engine counts pairs in closed form. Strips are checked against the published offset schemes written out by
-- hand.

local direct = require "support.attn_direct"
local choices = require "support.random"
local oracle = require "support.oracle"
local ffi, C = direct.ffi, direct.C

local function strips(plan)
  local list, s = {}, ffi.new("lac_strip")
  for i = 0, direct.info(plan).strips - 1 do
    direct.check(C.lac_plan_strip(plan, i, s))
    list[#list + 1] = { segment = tonumber(s.segment), dilation = tonumber(s.dilation),
                        offset = tonumber(s.offset), head0 = s.head0, heads = s.heads,
                        branch = s.branch, shared = s.shared }
  end
  return list
end

local function short(plan) -- "branch:head0+heads@offset"
  local list = {}
  for i, s in ipairs(strips(plan)) do
    list[i] = ("%d:%d+%d@%d"):format(s.branch, s.head0, s.heads, s.offset)
  end
  return table.concat(list, " ")
end

local function message_of(case)
  local ok, message = pcall(direct.plan, direct.fill(case))
  assert.is_false(ok)
  return message
end

local generator = choices.generator()
generator.seed(5)
local random = generator.random

describe("an attention plan", function()
  it("has the strips of the published schemes", function()
    local c = { N = 64, H = 5, segments = { 16, 32, 64 }, dilations = { 1, 2, 4 } }
    c.heads = "split"
    assert.equal("0:0+2@0 1:2+2@1 2:4+1@2", short(direct.plan(direct.fill(c))))
    c.heads, c.H, c.offset = "all", 6, "mod"
    assert.equal("0:0+6@0 1:0+1@0 1:1+1@1 1:2+1@0 1:3+1@1 1:4+1@0 1:5+1@1 "
      .. "2:0+1@0 2:1+1@1 2:2+1@2 2:3+1@3 2:4+1@0 2:5+1@1", short(direct.plan(direct.fill(c))))
    c.offset = "block"
    assert.equal("0:0+6@0 1:0+3@0 1:3+3@1 2:0+2@0 2:2+2@1 2:4+2@2", short(direct.plan(direct.fill(c))))
    c.offset = "branch"
    assert.equal("0:0+6@0 1:0+6@1 2:0+6@2", short(direct.plan(direct.fill(c))))
  end)

  it("knows which strips share rows", function()
    local function shared(case)
      local list = {}
      for i, s in ipairs(strips(direct.plan(direct.fill(case)))) do list[i] = s.shared end
      return table.concat(list, "")
    end
    assert.equal("11", shared { N = 64, H = 1, segments = { 16, 64 }, dilations = { 1, 4 } })
    assert.equal("00", shared { N = 64, H = 2, segments = { 16, 64 }, dilations = { 1, 4 }, heads = "split" })
    -- even and odd rows of the same head
    assert.equal("00", shared { N = 64, H = 1, segments = { 16, 64 }, dilations = { 2, 2 },
      offset = "branch" })
    assert.equal("11", shared { N = 64, H = 1, segments = { 16, 64 }, dilations = { 3, 2 },
      offset = "branch" })
    local apart = direct.plan(direct.fill { N = 9, H = 3, segments = { 9 }, dilations = { 2 } })
    assert.equal(0, direct.info(apart).overlapping)
  end)

  it("counts pairs, rows and FLOPs exactly, in 300 random configurations", function()
    local tried = 0
    while tried < 300 do
      local c = direct.fill {
        N = random(40), M = random(40), H = random(4), D = 3, segments = { random(30), random(30) },
        dilations = { random(5), random(5) }, causal = random(2) == 1,
        align = random(2) == 1 and "end" or nil,
        window = random(2) == 1 and random(20) - 1 or nil, heads = random(2) == 1 and "all" or "split",
        offset = ({ "mod", "block", "branch" })[random(3)],
      }
      local ok, plan = pcall(direct.plan, c)
      if ok then
        tried = tried + 1
        local pairs_, rows = 0, 0
        for h = 0, c.H - 1 do for n = 0, c.N - 1 do
          local kept = false
          for g = 1, 2 do
            kept = kept or oracle.keeps(c, g, h, n)
            for j = 0, c.M - 1 do
              if oracle.attends(c, g, 0, h, n, j) then pairs_ = pairs_ + 1 end
            end
          end
          if kept then rows = rows + 1 end
        end end
        local info = direct.info(plan)
        assert.equal(pairs_, tonumber(info.pairs))
        assert.equal(rows, tonumber(info.rows))
        assert.equal(4 * 3 * pairs_, info.flops_forward)
      end
    end
  end)

  it("counts long sequences at once", function()
    local c = direct.fill { B = 3, N = 2 ^ 30, H = 4, D = 64, segments = { 2 ^ 11, 2 ^ 30 },
                            dilations = { 1, 2 ^ 15 }, causal = true }
    local info = direct.info(direct.plan(c))
    local tri = function(n) return n * (n + 1) / 2 end
    assert.equal(4 * (2 ^ 19 * tri(2 ^ 11) + tri(2 ^ 15)), tonumber(info.pairs))
    assert.equal(4 * 64 * 3 * tonumber(info.pairs), info.flops_forward)
    assert.equal(10 * 64 * 3 * tonumber(info.pairs), info.flops_backward)
    c.merge = "mean" -- one more pass over scores, for each branch's delta
    assert.equal(14 * 64 * 3 * tonumber(info.pairs), direct.info(direct.plan(c)).flops_backward)
    c.segments, c.dilations = { 2 ^ 11, 2 ^ 10 }, { 4, 1 } -- but not where a task has all keys of a segment
    info = direct.info(direct.plan(c))
    assert.equal(10 * 64 * 3 * tonumber(info.pairs), info.flops_backward)
    for heads, each in pairs { [8] = 10, [7] = 14 } do -- eight segments in a branch are not cut
      c = direct.fill { B = 1, N = 2048, H = heads, Hk = heads, D = 64, segments = { 1024, 2048 },
                        dilations = { 1, 2 }, merge = "lse_detach" }
      info = direct.info(direct.plan(c))
      local long = heads * 1024 * 1024
      assert.equal(64 * (10 * 2 * long + each * long), info.flops_backward)
    end
  end)

  it("names what is wrong with a description", function()
    local base = { N = 8, H = 2, D = 4, segments = { 4, 8 }, dilations = { 1, 2 } }
    local function with(change)
      local c = {}
      for key, value in pairs(base) do c[key] = value end
      for key, value in pairs(change) do c[key] = value end
      return message_of(c)
    end
    assert.equal("attention: segments[2] must be positive, got 0", with { segments = { 4, 0 } })
    assert.equal("attention: dilations[1] must be positive, got -3", with { dilations = { -3, 2 } })
    assert.equal("attention: 2 heads cannot be split over 3 branches "
      .. "(heads = 'split' needs heads >= branches)",
      with { heads = "split", segments = { 4, 8, 8 }, dilations = { 1, 2, 2 } })
    assert.equal("attention: heads must be a multiple of kv_heads: 5 % 2 = 1", with { H = 5, Hk = 2 })
    assert.equal("attention: branch 2 keeps nothing for head 2: its offset 1 is not below the segment 1",
      with { segments = { 4, 1 } })
    assert.equal("attention: window must be -1 (none) or at least 0, got -2", with { window = -2 })
    assert.equal("attention: dedup counts every key once in one softmax, so it needs merge 'lse', got 'mean'",
      with { dedup = true, merge = "mean" })
    assert.equal("attention: batch must be from 1 to 1152921504606846976, got 0", with { B = 0 })
    assert.equal("attention: head_dim must be from 1 to 65536, got 0", with { D = 0 })
    assert.matches("^attention: batch .* does not fit in 64 bits$", with { B = 2 ^ 50, N = 2 ^ 50 })
    assert.matches("^attention: more than 2^63", with { N = 2 ^ 40, segments = { 2 ^ 40, 4 } })
    local d = direct.desc(direct.fill(base))
    d.branches = 33
    local ok, message = pcall(direct.plan_of, d)
    assert.is_false(ok)
    assert.equal("attention: the number of branches must be from 1 to 32, got 33", message)
    d.branches, d.merge = 2, 9
    ok, message = pcall(direct.plan_of, d)
    assert.is_false(ok)
    assert.equal("attention: merge must be from 0 to 3, got 9", message)
  end)

  it("refuses null pointers and strips that do not exist", function()
    local plan, s, p = direct.plan(direct.fill { segments = { 1 }, dilations = { 1 } }),
      ffi.new("lac_strip"), ffi.new("lac_plan*[1]")
    assert.is_true(C.lac_plan_get(nil, p) ~= 0 and p[0] == nil)
    assert.is_true(C.lac_plan_get(ffi.new("lac_attn_desc"), nil) ~= 0)
    assert.is_true(C.lac_plan_describe(nil, ffi.new("lac_plan_info")) ~= 0)
    assert.is_true(C.lac_plan_describe(plan, nil) ~= 0)
    assert.is_true(C.lac_plan_strip(nil, 0, s) ~= 0)
    assert.is_true(C.lac_plan_cache(nil) ~= 0)
    assert.is_true(C.lac_plan_cache_resize(-1) ~= 0)
    C.lac_plan_drop(nil)
    for _, index in ipairs { -1, 1 } do
      assert.is_true(C.lac_plan_strip(plan, index, s) ~= 0)
      assert.equal(("plan: strip %d of 1 (counted from 0)"):format(index), ffi.string(C.lac_last_error()))
    end
  end)
end)

describe("the plan cache", function()
  local before, stats = ffi.new("lac_cache_stats"), ffi.new("lac_cache_stats")
  local function desc(n) return direct.desc(direct.fill { N = n, segments = { 4 }, dilations = { 1 } }) end

  before_each(function()
    C.lac_plan_cache(before)
    C.lac_plan_cache_resize(0)
    C.lac_plan_cache_resize(3)
  end)
  after_each(function() C.lac_plan_cache_resize(before.capacity) end)

  it("finds equal descriptions, whatever stands past the branches", function()
    local a, d = direct.plan_of(desc(101)), desc(101)
    d.segment[5], d.dilation[31] = 77, -1
    C.lac_plan_cache(stats)
    local hits = stats.hits
    assert.equal(a, direct.plan_of(d))
    C.lac_plan_cache(stats)
    assert.equal(hits + 1, stats.hits)
    assert.is_true(a ~= direct.plan_of(desc(102)))
  end)

  it("evicts what was not used for longest, and evicted plans stay alive", function()
    local first, second = direct.plan_of(desc(201)), direct.plan_of(desc(202))
    direct.plan_of(desc(203))
    direct.plan_of(desc(201)) -- 202 is the oldest now
    direct.plan_of(desc(204))
    assert.equal(first, direct.plan_of(desc(201)))
    assert.is_true(second ~= direct.plan_of(desc(202)))
    assert.equal(1, tonumber(direct.info(second).references))
    assert.equal(202 * 4 - 2 * 2, tonumber(direct.info(second).pairs)) -- 50 segments of 4 and one of 2
    C.lac_plan_cache(stats)
    assert.equal(3, tonumber(stats.size))
  end)

  it("keeps nothing with capacity 0", function()
    C.lac_plan_cache_resize(0)
    local plan = direct.plan_of(desc(301))
    assert.equal(1, tonumber(direct.info(plan).references))
    C.lac_plan_cache(stats)
    assert.equal(0, tonumber(stats.size))
  end)
end)

-- Forward and backward; what they do is asked on a device.
describe("kernels for Hopper", function()
  it("are refused with the reason", function()
    local few, whole = "a branch has fewer than 64 rows a segment", "segments are not made of whole blocks"
    local aligned = "with a block_mask, and queries aligned to the end of the keys"
    local twice, many = "pairs that several branches keep are to be counted once", {}
    for g = 1, 17 do many[g] = 64 end
    local odd, half = "head_dim is above 256 or no multiple of 8", "tensors are neither f16 nor bf16"
    local rows, more = "blocks are not multiples of 128 rows of a branch", "there are more than 16 branches"
    local wide, blocked = "head_dim is above 128", "head_dim is above 128, with a block_mask"
    for _, case in ipairs {
      { {} }, { { dilations = { 2 } } }, { { dilations = { 3 } }, few, nil },
      { { dilations = { 5 } }, few, "a branch has fewer than 32 rows a segment" },
      { { dilations = { 5 }, kernel = 2 } },
      { { segments = { 128, 256 }, dilations = { 1, 1 }, dedup = true }, twice, twice },
      { { segments = many, dilations = many }, more, more },
      { { D = 136 }, nil, wide }, { { D = 132 }, odd, odd }, { { D = 264 }, odd, odd },
      { { H = 33, Hk = 1 }, nil, "more than 32 query heads share a key/value head" }, { { H = 32, Hk = 1 } },
      { { block = 128 } }, { { block = 256, dilations = { 2 }, segments = { 512 } } },
      { { block = 128, dilations = { 2 } }, nil, rows }, { { block = 192, segments = { 192 } }, nil, rows },
      { { block = 63 }, "a branch has fewer than 64 rows a block", rows },
      { { block = 256 }, nil, whole }, { { block = 256, segments = { 1000 } } },
      { { block = 128, M = 1128, align = "end" }, nil, aligned },
      { { block = 128, D = 136 }, blocked, wide },
      { { dtype = 1 } }, { { dtype = 1, dilations = { 3 } }, few, few },
      { { dtype = 1, kernel = 2 }, half, half },
      { { dtype = 1, block = 128 }, "there is a block_mask", "there is a block_mask" },
      { { dtype = 0 }, half, half },
    } do
      local c, want = { N = 1000, D = 64, H = 2, segments = { 128 }, dilations = { 1 } }, { case[2], case[3] }
      for name, value in pairs(case[1]) do c[name] = value end
      local plan = direct.plan(direct.fill(c))
      for backward = 0, 1 do
        local why = C.lac_plan_hopper(plan, c.dtype or 3, c.kernel or 0, c.block or 0, backward)
        assert.are.equal(want[backward + 1], why ~= nil and ffi.string(why) or nil,
          choices.text(c) .. (backward == 1 and " backward" or " forward"))
      end
    end
  end)
end)
