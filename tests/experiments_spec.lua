--- experiments_spec.lua: the scripts in experiments/ run, with --quick, as a user runs them.
--
-- Each runs in a child process, under luajit and (when it has been built) under the command lacuna, and what
-- it leaves is looked at: the table on standard output, every file of the run folder, a log that ends with
-- the result, a checkpoint that loads. The same seed must give the same result. Wrong options must give one
-- sentence and status 2,
-- --help the list. The default text must not be needed: a small text is made here.

local lac = require "lacuna"
local cli = require "lacuna.cli"
local json = require "lacuna.json"
local read = require "support.read"
local runlog = require "lacuna.log"
local sys = require "lacuna.sys"

local dir = sys.temporary("-experiments")
local text = dir .. "/text.txt"
local LUA = [[LUA_PATH="lua/?.lua;lua/?/init.lua;$LUA_PATH;;" luajit]]
local COMMAND = os.getenv("LACUNA_COMMAND") or "build/bin/lacuna"

local function run(host, script, options)
  return sys.run(("%s experiments/%s.lua %s"):format(host, script, options))
end

describe("experiments", function()
  setup(function()
    assert(sys.mkdir(dir))
    local lines, state = {}, 1
    local words = { "light", "dark", "earth", "water", "made", "called", "the", "and", "it", "was", "good",
      "day" }
    for i = 1, 1500 do
      local line = {}
      for j = 1, 8 do
        state = (state * 16807) % 2147483647
        line[j] = words[state % #words + 1]
      end
      lines[i] = table.concat(line, " ")
    end
    local file = assert(io.open(text, "wb"))
    file:write(table.concat(lines, "\n"), "\n")
    file:close()
  end)
  teardown(function() os.execute("rm -r " .. sys.quote(dir)) end)

  local function check_language_model(host, name)
    local out = dir .. "/" .. name
    local status, printed, err = run(host, "language_model",
      ("--quick --threads 1 --data %s --out %s"):format(sys.quote(text), sys.quote(out)))
    assert.equal(0, status, err)
    for _, pattern in ipairs{ "LongNet, held out +%d%.%d+ +bits per byte, 2047 bytes",
      "order%-2 model, held out +%d%.%d+",
      "xz %-9, held out alone +%d%.%d+", "xz %-9, whole text +%d%.%d+", "sample %(temperature 0.8, top 40%)",
      "model +2 layers, width 32", "FLOP a token" } do
      assert.matches(pattern, printed)
    end
    assert.matches("step 30/30", err)
    local config = json.decode(read(out .. "/config.json"))
    assert.equal(32, config.width)
    assert.same({ 16, 32 }, config.segments)
    local records = runlog.read(out .. "/log.jsonl")
    local result = records[#records]
    assert.equal("result", result.event)
    assert.is_true(result.bits_per_byte < 8)
    assert.equal("\137PNG", read(out .. "/loss.png"):sub(1, 4))
    assert.matches("<svg", read(out .. "/loss.svg"))
    assert.equal(#"In the beginning " + 40 + 1, #read(out .. "/sample.txt"))
    local model = lac.nn.LongNetLM{ layers = 2, width = 32, heads = 4, context = 32, segments = { 16, 32 },
      dilations = { 1, 2 } }
    assert.equal(30, lac.train.load_checkpoint(out .. "/checkpoint.safetensors", { model = model }).step)
    -- the number in the table is the model's in the file
    local held = select(2, lac.data.open(text):split{ held_out = 2048 })
    local bits = lac.train.bits_per_byte(model, held, { stride = 16 })
    assert.near(result.bits_per_byte, bits, 1e-12)
    return result.bits_per_byte
  end

  it("language_model --quick", function()
    local first = check_language_model(LUA, "lm1")
    assert.equal(first, check_language_model(sys.exists(COMMAND) and COMMAND or LUA, "lm2"))
  end)

  -- records without what depends on the clock
  local function timeless(path)
    local records = runlog.read(path)
    for _, r in ipairs(records) do
      r.time, r.seconds, r.train_seconds, r.tokens_per_second = nil, nil, nil, nil
    end
    return records
  end

  it("language_model goes on after SIGKILL as if nothing had happened", function()
    local options = ("--quick --steps 150 --dropout 0.2 --accumulate 2 --checkpoint-every 7 --threads 1 "
      .. "--sample 0 --data %s"):format(sys.quote(text))
    local whole, pieces = dir .. "/whole", dir .. "/pieces"
    local status, _, err = run(LUA, "language_model", ("%s --out %s"):format(options, sys.quote(whole)))
    assert.equal(0, status, err)
    math.randomseed(3)
    local kills, resumed = 0, 0
    repeat
      local seconds = math.random() * (0.4 + 0.1 * kills)
      status, _, err = run(("timeout -s KILL %.3f env " .. LUA):format(seconds),
        "language_model", ("%s --resume --out %s"):format(options, sys.quote(pieces)))
      if err:match("resumed after step") then resumed = resumed + 1 end
      if status ~= 0 then
        kills = kills + 1
        assert.equal(137, status, err)
      end
    until status == 0
    assert.is_true(kills >= 3 and resumed >= 1, ("%d kills, %d resumed"):format(kills, resumed))
    local a = lac.io.load(whole .. "/checkpoint.safetensors")
    local b = lac.io.load(pieces .. "/checkpoint.safetensors")
    local n = 0
    for name, t in pairs(a) do
      assert.is_true(t:string() == b[name]:string(), name)
      n, b[name] = n + 1, nil
    end
    assert.is_true(n > 30 and next(b) == nil)
    assert.same(timeless(whole .. "/log.jsonl"), timeless(pieces .. "/log.jsonl"))
    for _, name in ipairs(sys.list(pieces)) do assert.is_nil(name:match("%.tmp$"), name) end
  end)

  it("language_model evaluates and samples from a checkpoint, and refuses another run's options", function()
    local out = dir .. "/again"
    local options = ("--quick --steps 8 --threads 1 --sample 5 --out %s"):format(sys.quote(out))
    local given = options .. " --data " .. sys.quote(text)
    assert.equal(0, (run(LUA, "language_model", given)))
    local records = runlog.read(out .. "/log.jsonl")
    local bits = ("%.4f"):format(records[#records].bits_per_byte)
    for _, path in ipairs{ out, out .. "/checkpoint.safetensors" } do
      local status, printed = run(LUA, "language_model", "--evaluate " .. sys.quote(path))
      assert.equal(0, status)
      assert.is_truthy(printed:find("held out  " .. bits .. " bits per byte, 2047 bytes", 1, true), printed)
    end
    local status, printed = run(LUA, "language_model",
      ("--generate %s --prompt light --sample 12"):format(sys.quote(out)))
    assert.equal(0, status)
    assert.equal(#"light" + 12, #printed:match("top 40%):\n(.*)\n$"))
    local function refused(pattern, more)
      local bad, _, err = run(LUA, "language_model", more)
      assert.equal(1, bad)
      assert.matches(pattern, err)
    end
    refused("holds the checkpoint of a run: %-%-resume goes on with it", given)
    refused("%-%-width is 32 in .*checkpoint.safetensors and 64 now", given .. " --resume --width 64")
    refused("exclude each other", given .. " --resume --evaluate x")
    local full = ("--quick --steps 8 --threads 1 --out %s --data %s --resume"):format(sys.quote(out),
      sys.quote(text))
    status, printed = run(LUA, "language_model", full) -- what --quick means is the same when a run goes on
    assert.equal(0, status)
    assert.equal(#"In the beginning " + 40 + 1, #printed:match("top 40%):\n(.-\n)\n"))
    refused("%-%-segments does nothing beside %-%-generate, which reads %-%-device, %-%-prompt",
      "--segments 3 --generate " .. sys.quote(out))
    refused("%-%-seed does nothing beside %-%-evaluate", "--seed 3 --evaluate " .. sys.quote(out))
    refused("No such file", "--evaluate " .. sys.quote(dir .. "/none"))
    refused("%-%-eval%-bytes 4096: .* was trained on all but the last 2048 bytes",
      "--eval-bytes 4096 --evaluate " .. sys.quote(out))
    refused("%-%-sample 0 leaves %-%-generate nothing to do", "--sample 0 --generate " .. sys.quote(out))
    os.execute(("echo more >> %s"):format(sys.quote(text)))
    refused("is not the text that the run in", given .. " --resume")
    refused("is not the text any more that", "--evaluate " .. sys.quote(out))
  end)

  it("language_model refuses at the start what would do nothing, or fail at the end", function()
    local small = ("--data %s --layers 1 --width 16 --heads 2 --context 16 --segments 16 --dilations 1 "
      .. "--batch 2 --steps 2 --eval-bytes 2048 --eval-every 0 --checkpoint-every 0"):format(sys.quote(text))
    local function refused(pattern, more)
      local bad, _, err = run(LUA, "language_model", more)
      assert.is_true(bad == 1 or bad == 2)
      assert.matches(pattern, err)
    end
    refused("%-%-stride 17 is more than %-%-context 16: bytes would be left out", small .. " --stride 17")
    refused("%-%-warmup 2 leaves nothing of %-%-steps 2", small .. " --warmup 2")
    for _, option in ipairs { "--prompt x", "--temperature 1", "--top-k 3" } do
      refused(option:match "%S+":gsub("%-", "%%-") .. " does nothing beside %-%-sample 0",
        small .. " --sample 0 " .. option)
    end
    refused("%-%-steps is given twice", small .. " --steps 3")
    refused("%-%-out needs a value, and %-%-quick is an option %(%-%-out=%-%-quick would take it as a "
      .. "value%)", "--out --quick")
    local out = dir .. "/not-quick"
    local status, _, err = run(LUA, "language_model", small .. " --sample 0 --out " .. sys.quote(out))
    assert.equal(0, status, err)
    refused("%-%-quick: .* was trained on the whole text", "--quick --evaluate " .. sys.quote(out))
    status, _, err = run(LUA, "language_model", ("--evaluate %s --eval-bytes 1024"):format(sys.quote(out)))
    assert.equal(0, status, err)
  end)

  it("sweep_segments --quick", function()
    local out = dir .. "/sweep"
    local status, printed, err = run(sys.exists(COMMAND) and COMMAND or LUA, "sweep_segments",
      ("--quick --threads 1 --steps 4 --seeds 2 --data %s --out %s"):format(sys.quote(text), sys.quote(out)))
    assert.equal(0, status, err)
    local results = json.decode(read(out .. "/sweep.json"))
    local lines = {}
    for line in read(out .. "/sweep.csv"):gmatch "(.-)\r\n" do lines[#lines + 1] = line end
    assert.equal(1 + #results * #results[1].bits, #lines)
    assert.matches("^name,segments,dilations,scheme,seed,.*,lr,bits_per_byte,attention_flops,", lines[1])
    assert.equal(results[1].bits[1], tonumber(lines[2]:match "([^,]+),[^,]+,[^,]+$"))
    assert.matches("^dense,64,1,all,", lines[2])
    assert.is_truthy(table.concat(lines, "\n"):find('\n"dilated N, r 4",64,4,all,', 1, true))
    assert.equal(8, #results)
    for _, r in ipairs(results) do
      assert.is_truthy(printed:find(r.name, 1, true))
      assert.equal(2, #r.bits)
      assert.near((r.bits[1] + r.bits[2]) / 2, r.mean, 1e-12)
      assert.near(math.abs(r.bits[1] - r.bits[2]) / 2, r.half_range, 1e-12)
      assert.is_true(r.total_flops > r.attention_flops)
    end
    assert.equal("dense", results[1].name)
    assert.is_true(results[1].attention_flops > results[2].attention_flops)
    for _, name in ipairs{ "attention_flops.png", "total_flops.png" } do
      assert.equal("\137PNG", read(out .. "/" .. name):sub(1, 4))
    end
    assert.matches("2 seeds: differences", printed)
    local again = ("--quick --threads 1 --data %s --out %s"):format(sys.quote(text), sys.quote(out))
    local bad, _, why = run(LUA, "sweep_segments", again)
    assert.equal(1, bad)
    assert.matches("holds a sweep: %-%-resume goes on with it", why)
    bad, _, why = run(LUA, "sweep_segments", again .. " --resume --width 64")
    assert.equal(1, bad)
    assert.matches("%-%-width is 32 in .*/sweep and 64 now: a sweep that goes on keeps it", why)
    assert.same(results, json.decode(read(out .. "/sweep.json"))) -- as they were
    for _, more in ipairs{ "", " --resume" } do
      local whole = read(out .. "/log.jsonl")
      for _, folder in ipairs{ out, out .. "/01-seed1" } do
        bad, _, why = run(LUA, "language_model",
          ("--quick --threads 1 --data %s --out %s%s"):format(sys.quote(text), sys.quote(folder), more))
        assert.equal(1, bad)
        assert.matches("sweep[%w/-]* holds a run of sweep_segments\n$", why)
      end
      assert.equal(whole, read(out .. "/log.jsonl"))
    end
    local left = out .. "/02-seed2/checkpoint.safetensors" -- killed after the result, before its removal
    assert(sys.write_file(left, "old"))
    bad, _, why = run(LUA, "sweep_segments", again .. " --resume")
    assert.equal(0, bad, why)
    assert.is_false(sys.exists(left))
    assert.same(results, json.decode(read(out .. "/sweep.json")))
  end)

  it("sweep_segments goes on with sweeps only, and with those that say enough", function()
    local out = dir .. "/no-sweep"
    assert(sys.mkdir(out))
    for _, case in ipairs{ { '{"program": "language_model"}', "no%-sweep holds a run of language_model\n$" },
      { '{"steps": 4}', "no%-sweep is not a sweep that can be resumed: its config.json has no text_sum\n$",
        "no%-sweep holds a sweep: %-%-resume" }, { "", "no%-sweep/config.json: " } } do
      assert(sys.write_file(out .. "/config.json", case[1]))
      for i, more in ipairs{ " --resume", "" } do
        local bad, _, why = run(LUA, "sweep_segments",
          ("--quick --threads 1 --data %s --out %s%s"):format(sys.quote(text), sys.quote(out), more))
        assert.equal(1, bad)
        assert.matches(case[1 + i] or case[2], why)
      end
      assert.equal(case[1], read(out .. "/config.json"))
    end
  end)

  it("sweep_segments killed at random moments and resumed is the sweep that was not", function()
    local options = ("--quick --threads 1 --steps 24 --data %s"):format(sys.quote(text))
    local whole, pieces = dir .. "/whole-sweep", dir .. "/sweep-in-pieces"
    local seconds = sys.time()
    local status, printed, err = run(LUA, "sweep_segments", ("%s --out %s"):format(options, sys.quote(whole)))
    seconds = sys.time() - seconds
    assert.equal(0, status, err)
    math.randomseed(5)
    local kills, signals = 0, { "KILL", "INT", "TERM" }
    local after
    for _ = 1, 6 do
      repeat
        -- each signal once in what is, with the others, less than a run; the command, because Ctrl-C and
        -- SIGTERM make it write a checkpoint
        local most = kills < #signals and 0.2 or 0.1 * kills
        status, after, err = run(("timeout -s %s %.3f %s"):format(signals[kills % #signals + 1],
          seconds * (0.1 + math.random() * most), sys.exists(COMMAND) and COMMAND or "env " .. LUA),
          "sweep_segments", ("%s --resume --out %s"):format(options, sys.quote(pieces)))
        if status ~= 0 then kills = kills + 1 end
        assert.is_true(kills < 40, err)
      until status == 0
      if kills >= #signals then break end
      -- a neighbour of the run that was timed has left: as if the run were shorter
      assert(sys.run("rm -r " .. sys.quote(pieces)) == 0)
      kills, seconds = 0, seconds / 2
    end
    assert.is_true(kills >= #signals, ("%d kills"):format(kills))
    assert.equal(read(whole .. "/sweep.json"), read(pieces .. "/sweep.json"))
    assert.equal(printed:match("\n   pattern.*"), after:match("\n   pattern.*"))
    assert.same(timeless(whole .. "/log.jsonl"), timeless(pieces .. "/log.jsonl"))
    for _, name in ipairs{ "01-seed1", "08-seed1" } do
      assert.same(timeless(("%s/%s/log.jsonl"):format(whole, name)),
        timeless(("%s/%s/log.jsonl"):format(pieces, name)))
      assert.same(sys.list(whole .. "/" .. name), sys.list(pieces .. "/" .. name))
    end
  end)

  it("benchmark --quick, with and without a peer", function()
    local out = dir .. "/bench.json"
    local host = sys.exists(COMMAND) and COMMAND or LUA
    -- every section runs; this Python has no PyTorch, if it is there at all
    local status, printed, err = run(host, "benchmark",
      ("--quick --threads 1,2 --peer %s/no-python --json %s"):format(sys.quote(dir), sys.quote(out)))
    assert.equal(0, status, printed .. err)
    local all = json.decode(read(out))
    local seen, names = {}, {}
    for _, row in ipairs(all.rows) do
      seen[row.section] = true
      assert.is_nil((row.problem or ""):match("^error"), row.problem)
      if row.against == "PyTorch" and row.kind == "time" then
        assert.matches("peer not available: no program", row.problem)
      end
    end
    for name in io.popen("ls experiments/benchmarks"):read("*a"):gmatch("([%w_]+)%.lua") do
      names[#names + 1] = name
      assert.is_true(seen[name], "no row of section " .. name)
      assert.matches("\n" .. name .. ": ", printed)
    end
    assert.is_true(#names > 0)
    assert.matches(("%d rows: 0 targets met, 0 missed, %%d+ not measured"):format(#all.rows), printed)
    local bad, _, reason = run(host, "benchmark", "--only flors")
    assert.equal(1, bad)
    assert.matches("unknown section 'flors', did you mean 'floors'", reason)
    status, printed = run(host, "benchmark", ("--quick --targets --only attention,blocks --threads 1 "
      .. "--seconds 0.1 --json %s"):format(sys.quote(out)))
    assert.equal(0, status, printed)
    local targets = json.decode(read(out)).rows
    assert.is_true(#targets > 0)
    for _, row in ipairs(targets) do
      assert.is_truthy(row.at_least or row.at_most, row.what)
    end
    status, printed = run(host, "benchmark", ("--quick --only elementwise --match 'softmax [16, 16] over 1' "
      .. "--threads 1 --peer %s/no-python --json %s"):format(sys.quote(dir), sys.quote(out)))
    assert.equal(0, status, printed)
    local matched = {}
    for _, row in ipairs(json.decode(read(out)).rows) do
      assert.matches("softmax [16, 16] over 1", row.what, 1, true)
      matched[row.what] = true
    end
    assert.is_true(matched["softmax [16, 16] over 1, bwd"] and matched["log_softmax [16, 16] over 1"])
    bad, _, reason = run(host, "benchmark", "--quick --only floors --match nonesuch --threads 1")
    assert.equal(1, bad)
    assert.matches("no row has 'nonesuch' in its name", reason)
    status = run(host, "benchmark", "--quick --strict --only floors --threads 1 --peer " .. sys.quote(dir
      .. "/no-python"))
    assert.equal(1, status)
  end)

  it("answer --help and wrong options", function()
    for _, script in ipairs{ "language_model", "sweep_segments" } do
      local status, printed = run(LUA, script, "--help")
      assert.equal(0, status)
      assert.matches("usage: " .. script, printed)
      assert.matches("%-%-quick", printed)
      local bad, _, err = run(LUA, script, "--stpes 3")
      assert.equal(2, bad)
      assert.equal(script .. ": unknown option '--stpes', did you mean '--steps'? (see --help)\n", err)
    end
    local status, printed, err = run(LUA, "benchmark", "--help")
    assert.equal(0, status, err)
    assert.matches("usage: benchmark.*Sections: .*floors.*%-%-quick", printed)
    local _
    status, _, err = run(LUA, "benchmark", "--quikc")
    assert.equal(2, status)
    assert.equal("benchmark: unknown option '--quikc', did you mean '--quick'? (see --help)\n", err)
    status, _, err = run(LUA, "language_model", "--quick --data /nonexistent")
    assert.equal(1, status)
    assert.matches("cannot read /nonexistent", err)
    status, _, err = run(LUA, "language_model", ("--quick --segments 16 --data %s --out %s/x"):format(text,
      dir))
    assert.equal(1, status)
    assert.matches("segments and dilations must have the same length: 1 != 2", err)
  end)
end)

describe("cli", function()
  it("knows options that scripts share, with the script's own fields", function()
    assert.same({ name = "steps", type = "integer", min = 1, help = "training steps", default = 7 },
      cli.option("steps", { default = 7 }))
    assert.equal(16, cli.option("context", { min = 16 }).min)
    assert.equal(2, cli.option("context").min)
    assert.error_matches(function() cli.option("stesp") end, "unknown option 'stesp', did you mean 'steps'")
    local o = { given = { width = true }, width = 3, steps = 9 }
    cli.preset(o, { width = 4, steps = 2 })
    assert.same({ 3, 2 }, { o.width, o.steps })
  end)

  local SPEC = { program = "demo", about = "A demo.",
    { name = "steps", type = "integer", min = 1, default = 5, help = "how many" },
    { name = "list_of", type = "integers", min = 1, help = "several" },
    { name = "kind", one_of = { "red", "green" }, default = "red", help = "which" },
    { name = "fast", type = "boolean", help = "quickly" },
    { name = "name", type = "string", help = "a text" } }

  it("reads values in both forms, lists and flags", function()
    local o = cli.parse(SPEC, { "--steps=7", "--list-of", "1,2,3", "--fast", "--name", "--x", "--kind",
      "green" })
    assert.same({ 7, { 1, 2, 3 }, true, "--x", "green" }, { o.steps, o.list_of, o.fast, o.name, o.kind })
    assert.is_true(o.given.steps)
    local defaults = cli.parse(SPEC, {})
    assert.equal(5, defaults.steps)
    assert.is_nil(defaults.fast)
    assert.is_nil(defaults.given.steps)
    assert.is_true(cli.parse(SPEC, { "--help" }).help)
  end)

  it("names what is wrong", function()
    local function try(pattern, ...)
      local args = { ... }
      assert.error_matches(function() cli.parse(SPEC, args) end, pattern)
    end
    try("unknown option '%-%-setps', did you mean '%-%-steps'", "--setps", "3")
    try("unknown option '%-%-hlep', did you mean '%-%-help'", "--hlep")
    try("%-%-steps needs a value", "--steps")
    try("%-%-steps must be a number, got 'x'", "--steps", "x")
    try("%-%-steps must be positive, got 0", "--steps", "0")
    try("%-%-steps must be an integer, got 1.5", "--steps", "1.5")
    try("integers separated by commas, got '1,x'", "--list-of", "1,x")
    try("integers separated by commas, got '1,'", "--list-of", "1,")
    try("%-%-list%-of%[2%] must be positive, got 0", "--list-of", "1,0")
    try("'gren', did you mean 'green'", "--kind", "gren")
    try("%-%-fast takes no value, got 'yes'", "--fast=yes")
    try("unexpected argument 'steps'", "steps")
  end)
end)
