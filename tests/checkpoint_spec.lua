--- checkpoint_spec.lua: checkpoints that survive: atomic, checked, kept, resumed.
--
-- The central claim is tested by force: a process that does nothing but write checkpoints is killed with
-- SIGKILL at random moments, and each time the newest checkpoint must verify and hold what one of its steps
-- wrote, whole. The writer is a fork of this process, so that forty kills take seconds (the environment
-- variable LACUNA_KILLS asks for more). Every byte of a small checkpoint is then damaged in turn, and the
-- file cut at every length: none may load. The rest is housekeeping: which files stay, which are removed,
-- what is said when a disk is full.

local ffi = require "ffi"
local lac = require "lacuna"
local sys = require "lacuna.sys"
local checkpoint = require "lacuna.train.checkpoint"

local KILLS = tonumber(os.getenv("LACUNA_KILLS")) or 40

pcall(ffi.cdef, [[
int lac_test_fork(void) __asm__("fork");
int lac_test_kill(int pid, int signal) __asm__("kill");
int lac_test_waitpid(int pid, int *status, int options) __asm__("waitpid");
int lac_test_usleep(unsigned int us) __asm__("usleep");
void lac_test_exit(int status) __asm__("_exit");
int lac_test_getuid(void) __asm__("getuid");
]])

local read = require "support.read"

local function write(path, text)
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
end

local function model_of(size) return lac.nn.Linear(size, size) end

describe("checkpoints", function()
  local dir, path, threads
  setup(function()
    threads = lac.threads()
    lac.threads(1)
  end)
  teardown(function() lac.threads(threads) end)
  before_each(function()
    dir = sys.temporary("-checkpoint")
    assert(sys.mkdir(dir))
    path = dir .. "/c.safetensors"
  end)
  after_each(function() os.execute("rm -rf " .. sys.quote(dir)) end)

  -- the fork: writes checkpoints whose every weight is the step, until it is killed
  local function write_for_ever(model, optimizer, first)
    local step = first
    while true do
      for _, p in ipairs(model:parameters()) do p:detach():fill_(step) end
      checkpoint.save(path, { model = model, optimizer = optimizer, step = step, keep = 3 })
      step = step + 1
    end
  end

  -- on the CPU: a context of CUDA does not survive a fork
  it(("are loadable after each of %d kills in the middle of writing #cpu"):format(KILLS), function()
    local model = model_of(256)
    local optimizer = lac.optim.adamw(model)
    local start = sys.time()
    checkpoint.save(path, { model = model, optimizer = optimizer, step = 0 })
    local longest = math.max(25000, 5e6 * (sys.time() - start)) -- microseconds
    math.randomseed(7)
    local loaded, step, strays = 0, 0, 0
    for _ = 1, KILLS do
      collectgarbage("stop") -- no finalizer runs in both processes
      local pid = ffi.C.lac_test_fork()
      if pid == 0 then
        pcall(write_for_ever, model, optimizer, step + 1)
        ffi.C.lac_test_exit(1) -- only an error leads here, and then the parent finds no progress
      end
      collectgarbage("restart")
      ffi.C.lac_test_usleep(math.random(500, longest))
      ffi.C.lac_test_kill(pid, 9)
      local status = ffi.new("int[1]")
      ffi.C.lac_test_waitpid(pid, status, 0)
      assert.equal(9, status[0]) -- killed, not failed
      local found, newest, damaged = checkpoint.latest(path)
      assert.equal(path, found)
      assert.same({}, damaged)
      assert.is_true(newest >= step)
      checkpoint.load(found, { model = model, optimizer = optimizer })
      if newest > 0 then
        for _, p in ipairs(model:parameters()) do
          assert.equal(newest, p:min():item())
          assert.equal(newest, p:max():item())
        end
      end
      loaded, step = loaded + 1, newest
      strays = strays + #checkpoint.clean(path)
    end
    assert.equal(KILLS, loaded)
    assert.is_true(strays > KILLS / 10, "too few kills met an open file: " .. strays)
    for _, name in ipairs(sys.list(dir)) do assert.matches("^c[%-%d]*%.safetensors$", name) end
  end)

  it("count a writer that has ended as gone, also before its parent asks for it", function()
    assert.is_true(sys.process_exists(sys.pid()))
    local pid = ffi.C.lac_test_fork()
    if pid == 0 then ffi.C.lac_test_exit(0) end
    for _ = 1, 1000 do
      if not sys.process_exists(pid) then break end
      ffi.C.lac_test_usleep(1000)
    end
    assert.is_false(sys.process_exists(pid)) -- a zombie until here
    assert.equal(pid, ffi.C.lac_test_waitpid(pid, ffi.new("int[1]"), 0))
    assert.is_false(sys.process_exists(pid))
  end)

  it("do not load with any byte changed or any part missing", function()
    local model = model_of(2)
    checkpoint.save(path, { model = model, optimizer = lac.optim.sgd(model, { lr = 1 }), step = 3 })
    local good = read(path)
    local function refused(text, what)
      write(path, text)
      local ok, message = pcall(checkpoint.load, path)
      assert.is_false(ok, what)
      assert.is_truthy(message:find(path, 1, true), message)
      assert.is_false((pcall(checkpoint.latest, path)))
    end
    for i = 1, #good do
      local byte = good:byte(i)
      for _, other in ipairs{ bit.bxor(byte, 1), bit.bxor(byte, 128), bit.bxor(byte, 32) } do
        refused(good:sub(1, i - 1) .. string.char(other) .. good:sub(i + 1), "byte " .. i)
      end
    end
    for n = 0, #good - 1 do refused(good:sub(1, n), "cut to " .. n) end
    refused(good .. "\0", "longer")
    write(path, good)
    assert.equal(3, checkpoint.load(path, { model = model }).step)
  end)

  it("stay ordinary safetensors files", function()
    local model = model_of(3)
    checkpoint.save(path, { model = model, step = 3 })
    local tensors, metadata, checked = lac.io.load(path, { verify = false })
    assert.equal(model.weight:string(), tensors["model.weight"]:string())
    assert.is_false(checked)
    assert.equal("3", metadata.step)
    assert.is_nil(metadata["lacuna.crc32c"])
    assert.matches('^{"__metadata__":{"lacuna.crc32c":"%x%x%x%x%x%x%x%x",', read(path):sub(9))
  end)

  it("keep the last few, the newest under the path itself", function()
    local model = model_of(2)
    for _, step in ipairs{ 10, 20, 30, 40 } do
      checkpoint.save(path, { model = model, step = step, keep = 3, fresh = step == 10 })
    end
    assert.same({ "c-00000020.safetensors", "c-00000030.safetensors", "c.safetensors" }, sys.list(dir))
    assert.equal(20, checkpoint.load(dir .. "/c-00000020.safetensors").step)
    local found, step = checkpoint.latest(path)
    assert.same({ path, 40 }, { found, step })
    checkpoint.save(path, { model = model, step = 25, keep = 3 }) -- another way on, from step 20
    assert.same({ "c-00000020.safetensors", "c.safetensors" }, sys.list(dir))
    checkpoint.save(path, { model = model, step = 30 }) -- without keep nothing else is touched
    assert.same({ "c-00000020.safetensors", "c.safetensors" }, sys.list(dir))
    checkpoint.save(path, { model = model, step = 5, keep = 3, fresh = true })
    assert.same({ "c.safetensors" }, sys.list(dir))
  end)

  it("fall back to an older one, and say why", function()
    local model = model_of(2)
    for _, step in ipairs{ 10, 20, 30 } do checkpoint.save(path, { model = model, step = step, keep = 3 }) end
    local text = read(path)
    write(path, text:sub(1, -2) .. "x")
    local second = dir .. "/c-00000020.safetensors"
    write(second, read(second):sub(1, 100))
    local found, step, damaged = checkpoint.latest(path)
    assert.same({ dir .. "/c-00000010.safetensors", 10 }, { found, step })
    assert.same({ path, second }, { damaged[1].path, damaged[2].path })
    assert.matches("it is damaged: its bytes have the checksum %x+, it claims %x+", damaged[1].reason)
    assert.matches("claims a header of", damaged[2].reason)
    checkpoint.set_aside(damaged)
    assert.same({ "c-00000010.safetensors", "c-00000020.safetensors.damaged", "c.safetensors.damaged" },
      sys.list(dir))
    write(found, "")
    assert.error_matches(function() checkpoint.latest(path) end, "no checkpoint verifies: .*too few")
    os.remove(found)
    assert.same({ nil, nil, {} }, { checkpoint.latest(path) })
  end)

  it("remove the temporary files of processes that are gone, and no others", function()
    checkpoint.save(path, { model = model_of(2) })
    local dead = 4194304 -- beyond the largest process number that Linux gives
    write(("%s.%d-1.tmp"):format(path, dead), "x")
    write(("%s.%d-1.tmp"):format(path, sys.pid()), "x")
    write(path .. ".notes.tmp", "x")
    write(("%s/other.%d-1.tmp"):format(dir, dead), "x")
    assert.same({ ("%s.%d-1.tmp"):format(path, dead) }, checkpoint.clean(path))
    assert.equal(4, #sys.list(dir))
    local late = ("%s.%d-1.tmp"):format(path, dead) -- its process still counted as alive at the start
    write(late, "x")
    checkpoint.save(path, { model = model_of(2) })
    assert.is_false(sys.exists(late))
  end)

  it("leave the previous one intact when the disk is full", function()
    checkpoint.save(path, { model = model_of(4), step = 1 })
    local before = read(path)
    -- a limit on the size of files is met by the same failing write as a full disk
    local script = dir .. "/full.lua"
    write(script, ([[
      local lac = require "lacuna"
      local ok, message = pcall(lac.train.save_checkpoint, %q, { model = lac.nn.Linear(300, 300), step = 2,
        keep = 2 })
      assert(not ok)
      io.write(message)]]):format(path))
    local status, out, err = sys.run(("trap '' XFSZ; ulimit -f 100; LUA_PATH='lua/?.lua;lua/?/init.lua;;' "
      .. "luajit %s"):format(sys.quote(script)))
    assert.equal(0, status, err)
    assert.matches("^io%.save: cannot write .*c%.safetensors: File too large", out)
    assert.equal(before, read(path))
    for _, name in ipairs(sys.list(dir)) do assert.is_nil(name:match("%.tmp$"), name) end
    assert.equal(1, checkpoint.load(path).step)
  end)

  it("name the directory that is missing or cannot be written", function()
    local model = model_of(2)
    assert.error_matches(function() checkpoint.save(dir .. "/none/c.safetensors", { model = model }) end,
      "cannot write .*none/c.safetensors.*No such file or directory")
    assert.error_matches(function() checkpoint.save("/proc/self/c.safetensors", { model = model }) end,
      "cannot write /proc/self")
    local function fit(to)
      lac.train.fit{ model = model, optimizer = lac.optim.sgd(model, { lr = 1 }), steps = 1,
        batch = function() return lac.ones{ 1, 2 } end, loss = function(m, x) return m(x):sum() end,
        checkpoint = to, progress = "none" }
    end
    -- before the first step, not after the last
    assert.error_matches(function() fit(dir .. "/none/c.safetensors") end,
      "c.safetensors: .*none.*: No such file or directory")
    write(dir .. "/file", "")
    assert.error_matches(function() fit(dir .. "/file/c.safetensors") end, "file\" is not a directory")
    assert.error_matches(function() fit("/proc/self/c.safetensors") end, "cannot write")
    if ffi.C.lac_test_getuid() ~= 0 then -- nothing is read-only for root
      os.execute("chmod 555 " .. sys.quote(dir))
      assert.error_matches(function() fit(path) end, "cannot write in the directory .*: Permission denied")
    end
  end)

  it("make their model again", function()
    lac.manual_seed(5)
    local model = lac.nn.LongNetLM{ layers = 1, width = 16, heads = 2, context = 16, segments = { 8, 16 },
      dilations = { 1, 2 }, dropout = 0.5 }
    checkpoint.save(path, { model = model, optimizer = lac.optim.lion(model), step = 4,
      config = { note = "x" } })
    lac.manual_seed(9)
    local again, info = lac.train.load_model(path)
    local seed, offset = lac.rng_state()
    assert.same({ 9, 0 }, { seed, offset })
    assert.same({ 4, "x", "LongNetLM" }, { info.step, info.config.note, info.model.class })
    assert.is_false(again.training)
    local state = again:state_dict()
    for name, t in pairs(model:state_dict()) do assert.equal(t:string(), state[name]:string()) end
    os.rename(path, dir .. "/checkpoint.safetensors")
    assert.equal(4, select(2, lac.train.load_model(dir)).step)

    checkpoint.save(path, { model = lac.nn.Linear(2, 3), config = { n = 3 } })
    assert.error_matches(function() lac.train.load_model(path) end, "does not say how to make its model")
    local linear = lac.train.load_model(path, { build = function(c) return lac.nn.Linear(2, c.n) end })
    assert.equal(3, linear.weight:size(1))
    assert.error_matches(function() lac.train.load_model(path, { build = function() return 3 end }) end,
      "build must return a module, got 3")
    assert.error_matches(function() lac.train.load_model(dir .. "/none") end, "No such file")
    os.remove(dir .. "/checkpoint.safetensors")
    assert.error_matches(function() lac.train.load_model(dir) end, "there is no checkpoint in")
  end)

  it("make models of any attention again, with patterns of blocks and what was learned", function()
    local masks = lac.attention.masks
    local x = lac.randint { 1, 40, high = 256 }
    for _, attention in ipairs {
      { variant = "block_sparse", pattern = masks.local_window(32) + masks.global_tokens(16), block = 16 },
      { variant = "ring", of = "dilated", ranks = 3, segments = { 8, 64 }, dilations = { 1, 2 },
        pattern = masks.axial(2), block = 16 },
      { variant = "hierarchical", levels = { { stride = 16, window = 32 } }, block = 16 },
      { variant = "adaptive", keep = 2, block = 16 }, { variant = "auto", length = 64 },
      { variant = "learned", keep = 1, block = 16, length = 64 },
    } do
      local model = lac.nn.LongNetLM { layers = 1, width = 16, heads = 2, context = 64,
                                       attention = attention }
      checkpoint.save(path, { model = model, step = 1 })
      local again = lac.train.load_model(path)
      assert.is_true(again(x):equal(model:eval()(x)), attention.variant)
      assert.are.equal(tostring(model), tostring(again))
      attention.embed_dim, attention.heads = 16, 2
      checkpoint.save(path, { model = lac.nn.MultiheadDilatedAttention(attention), step = 1 })
      assert.is_true(lac.train.load_model(path).options == lac.config.multihead(attention))
      os.remove(path)
    end
  end)

  it("say when they fit neither format nor optimizer", function()
    local model = model_of(2)
    lac.io.save(path, { a = lac.ones{ 1 } })
    assert.error_matches(function() checkpoint.load(path) end, "is not a lacuna%-checkpoint%-2 file")
    lac.io.save(path, { a = lac.ones{ 1 } }, { format = checkpoint.format })
    assert.error_matches(function() checkpoint.load(path) end, "carries no checksum")
    checkpoint.save(path, { model = model, optimizer = lac.optim.lion(model) })
    assert.error_matches(function() checkpoint.load(path, { optimizer = lac.optim.adamw(model) }) end,
      "holds the state of 'lion', but the optimizer is 'adamw'")
    checkpoint.save(path, { model = model, optimizer = lac.optim.adamw(model, { betas = { 0.9, 0.98 } }) })
    local function load(kind, o)
      checkpoint.load(path, { optimizer = lac.optim[kind](model, o) })
    end
    load("adamw", { betas = { 0.9, 0.98 }, lr = 0.5, weight_decay = 0.5 })
    assert.error_matches(function() load("adamw", { eps = 1e-6 }) end, "is not the one whose state .* holds: "
      .. "betas was {0.9, 0.98} and is {0.9, 0.999}, eps was 1e%-08 and is 1e%-06 %[")
    checkpoint.save(path, { model = model, optimizer = lac.optim.sgd(model, { lr = 1, momentum = 0.9 }) })
    assert.error_matches(function() load("sgd", { lr = 1, momentum = 0.8, nesterov = true }) end,
      "holds: momentum was 0.9 and is 0.8, nesterov was false and is true %[")
  end)
end)

describe("crc32c", function()
  local lib = require "lacuna.lib"
  local function crc(text) return lib.C.lac_crc32c(0, text, #text) end

  it("gives the published sums, with the instruction and with tables, in pieces", function()
    local isa = ffi.string(lib.C.lac_isa(nil)):match("^%w+")
    for _, name in ipairs{ isa, "baseline" } do
      lib.C.lac_isa(name)
      -- RFC 3720, B.4
      assert.equal(0x8a9136aa, crc(("\0"):rep(32)))
      assert.equal(0x62a8ab43, crc(("\255"):rep(32)))
      local up, down = {}, {}
      for i = 0, 31 do up[i + 1], down[i + 1] = string.char(i), string.char(31 - i) end
      assert.equal(0x46dd794e, crc(table.concat(up)))
      assert.equal(0x113fdb5c, crc(table.concat(down)))
      assert.equal(0xe3069283, crc("123456789"))
      local text = table.concat(up):rep(9)
      for cut = 0, 40 do
        assert.equal(crc(text), lib.C.lac_crc32c(crc(text:sub(1, cut)), text:sub(cut + 1), #text - cut))
      end
      assert.equal(7, lib.C.lac_crc32c(7, nil, 5))
    end
    lib.C.lac_isa(isa)
  end)
end)
