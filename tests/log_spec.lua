--- log_spec.lua: run folders and JSON-lines logs.
--
-- Folders are made under a temporary directory; two runs of one second must not share a folder; a log must be
-- readable while it is open; NaN must survive; errors must name the file and the line.

local runlog = require "lacuna.log" -- lac.log is the logarithm
local sys = require "lacuna.sys"
local json = require "lacuna.json"

local read = require "support.read"

describe("log", function()
  local dir
  before_each(function() dir = sys.temporary("-logs") end)
  after_each(function() os.execute("rm -r " .. sys.quote(dir) .. " 2>/dev/null") end)

  it("makes a folder of its own for every run", function()
    local a, b = runlog.open{ dir = dir, name = "demo" }, runlog.open{ dir = dir, name = "demo" }
    assert.not_equal(a.dir, b.dir)
    assert.matches("/demo%-%d%d%d%d%d%d%d%d%-%d%d%d%d%d%d$", a.dir)
    a:close()
    b:close()
  end)

  it("writes lines that can be read at once, numbers exactly", function()
    local log = runlog.open{ path = dir .. "/deep/run" }
    log:write{ event = "step", step = 1, loss = 0.1, bad = 0 / 0, worse = -math.huge }
    log:write{ event = "note", text = "a\n\"b\"" }
    local records = runlog.read(log:path("log.jsonl"))
    assert.equal(2, #records)
    assert.equal(0.1, records[1].loss)
    assert.is_true(records[1].bad ~= records[1].bad)
    assert.equal(-math.huge, records[1].worse)
    assert.is_number(records[1].time)
    assert.equal("a\n\"b\"", records[2].text)
    log:close()
    log:close()
    assert.error_matches(function() log:write{ event = "x" } end, "is closed")
  end)

  -- what a second process says that opens the log in `path`
  local function elsewhere(path)
    local program = ("local ok, e = pcall(require('lacuna.log').open, { path = %q, append = false }) "
      .. "print(ok and 'opened' or e)"):format(path)
    local status, out, err = sys.run(([[LUA_PATH="lua/?.lua;lua/?/init.lua;$LUA_PATH;;" luajit -e %s]])
      :format(sys.quote(program)))
    assert.equal(0, status, err)
    return out
  end

  it("finds the newest run of a name", function()
    assert.is_nil(runlog.newest{ dir = dir, name = "a.b" })
    for name in ("a.b-20260101-000000 a.b-20260101-000000-2 a.b-20260101-000000-10 aXb-20270101-000000 "
      .. "a.b-c-20280101-000000 a.b-notes"):gmatch("%S+") do assert(sys.mkdir(dir .. "/" .. name)) end
    assert.equal(dir .. "/a.b-20260101-000000-10", runlog.newest{ dir = dir, name = "a.b" })
    local log = runlog.open{ dir = dir, name = "a.b" }
    assert.equal(log.dir, runlog.newest{ dir = dir, name = "a.b" })
    log:close()
  end)

  it("belongs to one process while it is open", function()
    local path = dir .. "/claimed"
    local log = runlog.open{ path = path }
    log:write{ event = "mine" }
    assert.matches("another process is writing .*/claimed/log%.jsonl: let it end", elsewhere(path))
    assert.equal(1, #runlog.read(log:path("log.jsonl"))) -- and was not emptied
    local again = runlog.open{ path = path } -- a notebook's next cell; the claim goes over
    log:close()
    assert.matches("another process is writing", elsewhere(path))
    os.execute("sleep 1 &") -- a program that outlives the log inherits no claim
    again:close()
    assert.matches("^opened", elsewhere(path))
    assert.equal(0, #runlog.read(again:path("log.jsonl")))
    runlog.open{ path = path }
    collectgarbage()
    collectgarbage()
    assert.matches("^opened", elsewhere(path)) -- a log that was dropped is none
  end)

  it("says that the disk is full", function()
    local log = runlog.open{ path = dir }
    local device = io.open("/dev/full", "wb")
    if not device then return end
    device:close()
    local function fill(name) -- what is written beside it goes to the full device
      os.execute(("ln -s /dev/full %s"):format(sys.quote(log:path(name .. ".tmp"))))
    end
    log:save("x", "old")
    fill("x")
    assert.error_matches(function() log:save("x", "short") end, "log: cannot write .*/x: No space left")
    fill("x")
    assert.error_matches(function() log:save("x", ("long"):rep(5000)) end, "cannot write .*/x: No space left")
    assert.equal("old", read(log:path("x"))) -- as it was
    assert.error_matches(function() log:save("no/x", "") end, "log: cannot write .*/no/x: No such file")
    log:config{ a = 1 }
    fill("config.json")
    assert.error_matches(function() log:config{ a = 2 } end, "cannot write .*config.json: No space left")
    assert.same({ a = 1 }, runlog.config(dir))
    assert.same({ "config.json", "log.jsonl", "x" }, sys.list(dir))
    local lac = require "lacuna"
    local work = function() lac.ones{ 2 }:sum() end
    assert.error_matches(function()
      lac.profile(work, { print = false, trace = true }):trace("/dev/full")
    end, "profile: cannot write /dev/full: No space left")
    assert.error_matches(function() lac.memory_profile(work):json("/dev/full") end,
      "memory_profile: cannot write /dev/full: No space left")
    log:close()
  end)

  it("dumps the configuration", function()
    local log = runlog.open{ path = dir }
    log:config{ width = 3, segments = { 1, 2 }, name = "x" }
    local text = read(dir .. "/config.json")
    assert.same({ width = 3, segments = { 1, 2 }, name = "x" }, json.decode(text))
    assert.is_true(text:find("name") < text:find("segments"))
    assert.same({ width = 3, segments = { 1, 2 }, name = "x" }, runlog.config(dir))
    local file = io.open(dir .. "/config.json")
    log:config{ width = 4 } -- a file of its own: who reads the old one reads on in the old one
    assert.equal(text, file:read("*a"))
    file:close()
    assert.same({ width = 4 }, runlog.config(dir))
    log:save("config.json", "")
    local none, reason = runlog.config(dir)
    assert.is_nil(none)
    assert.matches("/config.json: ", reason)
    assert.same({ n = 2 }, { n = select("#", runlog.config(dir)), runlog.config(dir .. "/none") })
    log:close()
  end)

  it("names what is wrong", function()
    local log = runlog.open{ path = dir }
    assert.error_matches(function() log:write{ step = 1 } end, "field `event`")
    assert.error_matches(function() log:write{ event = "x", f = print } end, "value.f is a function")
    assert.error_matches(function() runlog.open{ dir = dir, name = "../x" } end, "may hold letters")
    assert.error_matches(function() runlog.open{ dri = dir } end, "did you mean 'dir'")
    assert.error_matches(function() runlog.open{ path = "/proc/nope" } end, "cannot make the directory")
    log:save("bad.jsonl", "{\"a\":1}\n{oops\n")
    assert.error_matches(function() runlog.read(log:path("bad.jsonl")) end, "bad%.jsonl, line 2: ")
    assert.error_matches(function() runlog.read("/nonexistent") end, "cannot read /nonexistent")
    log:close()
  end)
end)

describe("csv", function()
  local csv = require "lacuna.csv"

  -- RFC 4180 read by its grammar, a character at a time
  local function parse(text)
    local rows, row, at = {}, {}, 1
    while at <= #text do
      local value
      if text:sub(at, at) == '"' then
        value, at = "", at + 1
        while true do
          local stop = assert(text:find('"', at, true))
          value, at = value .. text:sub(at, stop - 1), stop + 1
          if text:sub(at, at) ~= '"' then break end
          value, at = value .. '"', at + 1
        end
      else
        local stop = text:find("[,\r]", at)
        value, at = text:sub(at, stop - 1), stop
      end
      row[#row + 1] = value
      if text:sub(at, at) == "," then
        at = at + 1
      else
        assert.equal("\r\n", text:sub(at, at + 1))
        rows[#rows + 1], row, at = row, {}, at + 2
      end
    end
    return rows
  end

  it("brings text, numbers and lists back", function()
    local odd = { 'a "quoted" name', "comma, here", "two\r\nlines", "", " spaces ", "plain" }
    local columns, rows = { "text", "number", "list", "a,b", "missing", "flag" }, {}
    for i, text in ipairs(odd) do
      rows[i] = { text = text, number = i / 3, list = { i, 2 * i }, ["a,b"] = "x", flag = i > 1 }
    end
    local back = parse(csv.encode(rows, columns))
    assert.same(columns, back[1])
    for i, text in ipairs(odd) do
      local row = back[i + 1]
      assert.same({ text, i .. " " .. 2 * i, "x", "", tostring(i > 1) },
        { row[1], row[3], row[4], row[5], row[6] })
      assert.equal(i / 3, tonumber(row[2]))
    end
    assert.equal("n\r\n0.1\r\nnan\r\n-inf\r\n100\r\n",
      csv.encode({ { n = 0.1 }, { n = 0 / 0 }, { n = -math.huge }, { n = 100 } }, { "n" }))
  end)

  it("names what it cannot write", function()
    assert.error_matches(function() csv.encode({ { losss = 1 } }, { "loss" }) end,
      "csv: unknown column 'losss', did you mean 'loss'")
    assert.error_matches(function() csv.encode({ { x = print } }, { "x" }) end,
      "csv: rows%[1%].x must be a number, a string, a boolean or a list, got a function")
    assert.error_matches(function() csv.encode({ { x = { {} } } }, { "x" }) end, "rows%[1%].x%[1%] must be")
    assert.error_matches(function() csv.encode({}, {}) end, "columns must name at least one")
  end)
end)
