-- command_spec.lua: the command `lacuna` as a user meets it: options, exit codes, error reports, Ctrl-C,
-- terminal.
--
-- Everything runs the real binary, build/bin/lacuna, in a child process: on pipes where output and exit
-- status are the point, on a pseudo-terminal (forkpty) where the session is. Nothing waits for a fixed time
-- where it can wait for a text: a child says "go" when it is about to loop, and is read until it says what is
-- expected.
--
-- Interrupts are tested in bulk: one child per kind of loop runs it many times under host.guard, which is
-- what the session uses, and the parent sends SIGINT after a random time from nothing to a few milliseconds.
-- That range covers the interpreter, the recorder, the assembler and the compiled loop. Afterwards the child
-- has to compute a known sum and to compile it, so a loop that stops by breaking the JIT fails as well.
--
-- Times are judged by their median: a loaded machine delays single wake-ups by tens of milliseconds, and a
-- spec that fails then teaches people to ignore it. A loop that does not stop at all fails after five
-- seconds.

local ffi = require "ffi"
local poll = require "posix.poll"
local signal = require "posix.signal"
local stdlib = require "posix.stdlib"
local termio = require "posix.termio"
local time = require "posix.time"
local unistd = require "posix.unistd"
local wait = require "posix.sys.wait"

local LACUNA = os.getenv("LACUNA_COMMAND") or "build/bin/lacuna" -- make asan, make coverage: their own
local SLOWNESS = tonumber(os.getenv("LACUNA_SLOWNESS") or 1) -- of an instrumented build
local TIMEOUT_MS = 5000 * SLOWNESS
local INTERRUPTS = 12
local MEDIAN_S = 0.1 * SLOWNESS

ffi.cdef "int forkpty(int *master, char *name, void *termios, void *winsize);"

local function now()
  local t = time.clock_gettime(time.CLOCK_MONOTONIC)
  return t.tv_sec + t.tv_nsec * 1e-9
end

local function pause(seconds)
  time.nanosleep({ tv_sec = 0, tv_nsec = math.floor(seconds * 1e9) })
end

-- ---- child processes -----------------------------------------------------------------------------

local children = {}
local Child = {}
Child.__index = Child

local function become(arguments, environment)
  signal.signal(signal.SIGHUP, signal.SIG_DFL) -- also where the suite was started by nohup
  for name, value in pairs(environment or {}) do stdlib.setenv(name, value) end
  unistd.exec(LACUNA, arguments)
  unistd._exit(127)
end

-- a child on pipes: standard input is `fd_in`, output and errors come mixed
local function start(arguments, environment)
  local in_read, in_write = unistd.pipe()
  local out_read, out_write = unistd.pipe()
  local pid = assert(unistd.fork())
  if pid == 0 then
    unistd.dup2(in_read, 0)
    unistd.dup2(out_write, 1)
    unistd.dup2(out_write, 2)
    for _, fd in ipairs { in_read, in_write, out_read, out_write } do unistd.close(fd) end
    become(arguments, environment)
  end
  unistd.close(in_read)
  unistd.close(out_write)
  local child = setmetatable({ pid = pid, fd = out_read, fd_in = in_write, text = "" }, Child)
  children[pid] = child
  return child
end

-- a child on a terminal of its own
local function start_terminal(arguments, environment)
  local master = ffi.new("int[1]")
  local pid = ffi.C.forkpty(master, nil, nil, nil)
  -- never go on with -1: to kill() it means every process there is
  assert(pid >= 0, "no pseudo-terminal: is /dev/pts mounted?")
  if pid == 0 then become(arguments, environment) end
  local child = setmetatable({ pid = pid, fd = master[0], fd_in = master[0], text = "" }, Child)
  children[pid] = child
  return child
end

-- more output: false at its end; raises when nothing comes for too long
function Child:more(waiting_for)
  if poll.rpoll(self.fd, TIMEOUT_MS) == 0 then
    error(("no %s within %d ms; so far: %s"):format(waiting_for, TIMEOUT_MS, self.text), 0)
  end
  local data = unistd.read(self.fd, 65536)
  if not data or data == "" then return false end -- nil: a terminal whose child has ended
  self.text = self.text .. data
  return true
end

-- read until a plain text comes; returns what came before it
function Child:expect(text)
  while true do
    local first, last = self.text:find(text, 1, true)
    if first then
      local before = self.text:sub(1, first - 1)
      self.text = self.text:sub(last + 1)
      return before
    end
    if not self:more(("'%s'"):format(text)) then
      error(("'%s' never came; the end of the output is: %s"):format(text, self.text), 0)
    end
  end
end

-- Read until the prompt, then wait until the editor has the terminal: libedit prints first, and a Ctrl-D that
-- arrives before it has switched the mode is the terminal's, and lost.
function Child:prompt(text)
  local before = self:expect(text .. "> ")
  local start_time = now()
  while bit.band(termio.tcgetattr(self.fd).lflag, termio.ICANON) ~= 0 do
    assert(now() - start_time < TIMEOUT_MS / 1000, "the editor never took the terminal")
    pause(0.001)
  end
  return before
end

function Child:send(text) unistd.write(self.fd_in, text) end
function Child:interrupt() signal.kill(self.pid, signal.SIGINT) end

-- wait for its end: the rest of the output, the exit status, "exited" or "killed"
function Child:finish()
  while self:more("end of output") do end
  local _, how, status = wait.wait(self.pid)
  children[self.pid] = nil
  unistd.close(self.fd)
  if self.fd_in ~= self.fd then unistd.close(self.fd_in) end
  return self.text, status, how
end

-- run to the end with some input: output, exit status
local function run(arguments, input, environment)
  local child = start(arguments, environment)
  if input then child:send(input) end
  unistd.close(child.fd_in)
  child.fd_in = child.fd
  return child:finish()
end

local function temporary(content, suffix)
  local path = os.tmpname()
  os.remove(path)
  path = path .. (suffix or ".lua")
  local file = assert(io.open(path, "w"))
  file:write(content)
  file:close()
  finally(function() os.remove(path) end)
  return path
end

local function read_file(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read("*a")
  file:close()
  return text
end

after_each(function()
  for pid in pairs(children) do -- a spec has failed half way
    signal.kill(pid, signal.SIGKILL)
    wait.wait(pid)
  end
  children = {}
end)

-- ---- running scripts -----------------------------------------------------------------------------

describe("lacuna, the command", function()
  it("runs a script with arg and ... as luajit does", function()
    local script = temporary "print(arg[0] == (...), arg[1], arg[2], #arg, select('#', ...), arg[-1])"
    local text, status = run { script, script, "b c" }
    assert.equal("true\t" .. script .. "\tb c\t2\t2\t" .. LACUNA .. "\n", text)
    assert.equal(0, status)
  end)

  it("refuses an instruction set that is not there instead of choosing another", function()
    local text, status = run({ "-e", "require 'lacuna'" }, nil, { LACUNA_CPU = "avx9" })
    assert.matches("LACUNA_CPU=avx9 is not available", text)
    assert.equal(1, status)
    text = run({ "devices" }, nil, { LACUNA_CPU = "baseline" })
    assert.matches("cpu: baseline", text)
  end)

  it("runs code given with -e, several times and before a script", function()
    assert.equal("1\n2\n", (run { "-e", "x = 1 print(x)", "-e", "print(x + 1)" }))
    local script = temporary "print('script', x, ...)"
    assert.equal("script\t5\ta\n", (run { "-e", "x = 5", script, "a" }))
  end)

  it("reads a script from standard input", function()
    assert.equal("12\n", (run({}, "print(3 * 4)\n")))
    assert.equal("a\tb\n", (run({ "-", "a", "b" }, "print(...)")))
  end)

  it("finds the library next to itself, from any directory and through a link", function()
    local link = os.tmpname()
    os.remove(link)
    assert(unistd.link(unistd.getcwd() .. "/" .. LACUNA, link, true))
    finally(function() os.remove(link) end)
    local pipe = io.popen("cd / && " .. link
      .. [[ -e 'print(package.searchpath("lacuna.repl", package.path))']])
    local found = pipe:read("*l")
    pipe:close()
    assert.equal(unistd.getcwd() .. "/lua/lacuna/repl.lua", found)
  end)

  it("obeys LACUNA_LUA, and refuses a directory without the library", function()
    local text, status = run({ "-e", "print(package.path:match('^[^;]*'))" }, nil, { LACUNA_LUA = "./lua" })
    assert.equal("./lua/?.lua\n", text)
    assert.equal(0, status)
    text, status = run({ "-e", "print(1)" }, nil, { LACUNA_LUA = "/nowhere" })
    assert.equal("lacuna: LACUNA_LUA is '/nowhere', which does not hold lacuna/repl.lua\n", text)
    assert.equal(1, status)
  end)

  it("leaves the JIT on and adds no global", function()
    assert.equal("true\tnil\tnil\n", (run { "-e", "print(jit.status() == true, rawget(_G, 'lac'), help)" }))
  end)

  it("exits as os.exit says", function()
    assert.equal(7, (select(2, run { "-e", "os.exit(7)" })))
    assert.equal(0, (select(2, run { "-e", "os.exit(true, true)" })))
  end)

  it("prints versions and devices", function()
    local text, status = run { "--version" }
    assert.equal(text, (run { "-v" }))
    assert.truthy(text:find("^lacuna %d+%.%d+%.%d+ %(LuaJIT 2%.1[^,]*, %w+ %w+%)\n$"), text)
    assert.equal(0, status)
    text, status = run { "devices" }
    assert.truthy(text:find("cpu: ", 1, true), text)
    assert.equal(0, status)
  end)

  it("tells OpenBLAS which kernels an Intel processor runs that it does not know", function()
    local kernels, avx512 = require("lacuna.lib").blas_kernels, "avx512f avx512dq avx512cd avx512bw avx512vl"
    local function processor(model, flags, vendor, family)
      return ("vendor_id\t: %s\ncpu family\t: %d\nmodel\t\t: %d\nmodel name\t: Intel(R) Xeon(R)\n"
        .. "flags\t\t: fpu %s ht\nbugs\t\t: none\n")
        :format(vendor or "GenuineIntel", family or 6, model, flags)
    end
    assert.equal("SKYLAKEX", kernels(processor(0xcf, "fma avx2 " .. avx512)))
    assert.equal("HASWELL", kernels(processor(0xb7, "fma avx2 avx512f")))
    assert.is_nil(kernels(processor(0xcf, "fma"))) -- neither
    assert.is_nil(kernels(processor(0x8f, "fma avx2 " .. avx512))) -- Sapphire Rapids is known
    assert.is_nil(kernels(processor(0xcf, "fma avx2 " .. avx512, "AuthenticAMD", 25)))
    assert.is_nil(kernels(processor(0xcf, "fma avx2 " .. avx512, nil, 15)))
    assert.is_nil(kernels "")
    assert.is_nil(kernels "vendor_id : GenuineIntel\ncpu family : 6\n")
    local blas = run({ "devices" }, nil, { OPENBLAS_CORETYPE = "HASWELL" }):match "blas: ([^\n]*)"
    assert.matches("Haswell", blas) -- the user's choice stands
    assert.not_matches("Prescott", run({ "devices" }):match "blas: ([^\n]*)")
  end)

  it("says in one clause that there is no CUDA plug-in", function()
    local engine = os.getenv "LACUNA_LIBRARY" or "build/lib/liblacuna.so"
    local alone = temporary(read_file(engine), ".so")
    local text = run({ "-e", "print(select(2, pcall(require('lacuna').zeros, { 1, device = 'cuda' })))", "-e",
                       "print(require('lacuna').devices())" }, nil, { LACUNA_LIBRARY = alone })
    assert.matches("zeros: device 'cuda' is not available: cuda: there is no liblacuna_cuda.so beside the "
      .. "engine %(make builds it where nvcc is%) %[", text)
    assert.matches("\ncuda: there is no liblacuna_cuda.so beside the engine %(", text)
  end)

  it("says which variable of the environment is misspelt", function()
    local text, status = run({ "-e", "require 'lacuna'" }, nil,
                             { LACUNA_MEMROY = "trace", LACUNA_TRACE = "yes", LACUNA_MINE = "1" })
    assert.equal("lacuna: LACUNA_TRACE is 1 or 0, 'yes' is ignored\n"
      .. "lacuna: nothing reads LACUNA_MEMROY, did you mean LACUNA_MEMORY?\n", text)
    assert.equal(0, status)
    local complaints = require("lacuna.environment").complaints
    assert.same({}, complaints "LACUNA_CPU=avx2\0LACUNA_GPU=1\0MEMROY=1\0LACUNA_TRACE=1\0")
    assert.equal(2, #complaints "LACUNA_DEVCIE=cuda\0LACUNA_CUDASYNC=1\0")
    local source = io.popen "grep -rhoE 'getenv[ (\"]+LACUNA_[A-Z_]+' lua c kernels tests experiments"
    for name in source:read("*a"):gmatch "LACUNA_([A-Z_]+)" do
      assert.same({}, complaints("LACUNA_" .. name .. "=1\0"), name) -- whatever is read is known
    end
    source:close()
  end)

  it("prints its usage, on standard output", function()
    local text, status = run { "--help" }
    assert.equal(text, (run { "-h" }))
    for _, option in ipairs { "-i", "-e", "devices", "variants", "--version", "LACUNA_TRACE",
                              "LACUNA_DEVICE" } do
      assert.truthy(text:find(option, 1, true), option)
    end
    assert.equal(0, status)
  end)

  it("answers wrong usage with exit status 2 and the nearest word", function()
    local cases = {
      { { "--verison" }, "unknown option '--verison'; did you mean '--version'?" },
      { { "--hlep" }, "unknown option '--hlep'; did you mean '--help'?" },
      { { "--quite-unlike" }, "unknown option '--quite-unlike'\n" },
      { { "-e" }, "option -e needs code to run\n" },
      { { "devcies" }, "cannot open devcies: No such file or directory; did you mean 'lacuna devices'?" },
      { { "/nowhere/x.lua" }, "cannot open /nowhere/x.lua: No such file or directory\n" },
      { { "/tmp" }, "cannot read /tmp: Is a directory\n" },
      { { "devices", "cuda" }, "'devices' takes no argument, got 'cuda'" },
      { { "variants", "ring" }, "'variants' takes no argument, got 'ring'" },
    }
    for _, case in ipairs(cases) do
      local text, status = run(case[1])
      assert.truthy(text:find("lacuna: " .. case[2], 1, true), text)
      assert.equal(2, status)
    end
  end)
end)

describe("lacuna, an error in a script", function()
  it("is reported with the user's frames only, exit status 1", function()
    local script = temporary [[
local lac = require "lacuna"
local function inner() return lac.zeros { 2, 3 } + lac.zeros { 4 } end
local function outer() local x = inner() return x end
outer()
]]
    local text, status = run { script }
    local lines = {}
    for line in text:gmatch("[^\n]+") do lines[#lines + 1] = line end
    assert.truthy(lines[1]:find("^lacuna: add: shapes %[2, 3%] and %[4%]"), text)
    assert.same({
      "  " .. script .. ":2: in function 'inner'",
      "  " .. script .. ":3: in function 'outer'",
      "  " .. script .. ":4: in main chunk",
    }, { lines[2], lines[3], lines[4] })
    assert.equal(4, #lines)
    assert.equal(1, status)
    local full = run({ script }, nil, { LACUNA_TRACE = "1" })
    assert.truthy(full:find("[C]: in function 'error'", 1, true), full)
    assert.truthy(full:find("lua/lacuna/", 1, true), full)
  end)

  it("may be any object", function()
    assert.truthy(run({ "-e", "error({ code = 3 })" }):find("the error is a table: { code = 3 }", 1, true))
    local code = "error(setmetatable({}, { __tostring = function() return 'an object' end }))"
    assert.truthy(run({ "-e", code }):find("lacuna: an object\n", 1, true))
    assert.equal(1, (select(2, run { "-e", "error()" })))
  end)

  it("is reported also when the stack is exhausted", function()
    local text, status = run { "-e", "local function f() return 1 + f() end f()" }
    assert.truthy(text:find("stack overflow", 1, true), text)
    assert.equal(1, status)
  end)

  it("says what to write where Lua's own message cannot", function()
    local function last(code)
      local text, status = run { "-e", code }
      assert.equal(1, status)
      return text:match("^[^\n]*")
    end
    local with = "local lac = require 'lacuna' local x = lac.ones { 2 } "
    assert.equal("lacuna: (command line):1: attempt to index global 'lac' (a nil value); "
      .. 'a script begins with local lac = require "lacuna"', last("print(lac.ones { 2 })"))
    for _, code in ipairs { "return x > 0", "return x <= 0" } do
      assert.matches("to compare %a+ with %a+; of a tensor: x:gt%(y%), x:ge%(y%), x:lt%(y%), x:le%(y%)$",
        last(with .. code))
    end
    assert.matches("number expected, got table%); of a tensor: x:item%(%) is the number in it$",
      last(with .. "print(('%.3f'):format(x:sum()))"))
    assert.matches("attempt to index global 'lacc' %(a nil value%)$", last("print(lacc.ones { 2 })"))
  end)

  it("comes after the profile of what was done before it", function()
    local work = "local lac = require 'lacuna' lac.ones { 2 }:sum() "
    for _, case in ipairs { { "error('late')", 1, "lacuna: .-:1: late\n  .-:1: in main chunk\n$" },
                            { "os.exit(7, true)", 7, "\n$" }, { "os.exit()", 0, "\n$" }, { "", 0, "\n$" },
                            { "pcall(os.exit, 0) error 'late'", 0, "\n$" }, -- nothing on the way sees it
                            { "coroutine.wrap(function() os.exit(5) end)()", 5, "\n$" },
                            { "os.exit(false)", 1, "\n$" }, { "pcall(os.exit, {}) os.exit(6)", 6, "\n$" },
                            { "require 'lacuna.cli'.main({ program = 'p' }, {}, function() os.exit(3) end)",
                              3, "\n$" } } do
      local text, status = run { "profile", (temporary(work .. case[1])) }
      assert.matches("^profile: .*\nsum +fwd +1 ", text)
      assert.matches(case[3], text)
      if case[3] == "\n$" then assert.is_nil(text:find("\n%a+: ")) end
      assert.equal(case[2], status)
    end
    local endless = work .. "io.stdout:setvbuf 'no' print 'go' while true do end"
    local child = start { "profile", (temporary(endless)) }
    child:expect("go\n")
    child:interrupt()
    local text, status = child:finish()
    assert.matches("^profile: .*\nsum +fwd +1 .*lacuna: interrupted\n  .-:1: in main chunk\n$", text)
    assert.equal(130, status)
  end)

  it("is one also when the output could not be written, unless it was one already", function()
    local file = io.open("/dev/full", "w")
    if not file then return end
    file:close()
    local function on_full_disk(code)
      local pipe = io.popen(("%s -e %s 2>&1 >/dev/full; printf %%d $?"):format(LACUNA, "\"" .. code .. "\""))
      local text = pipe:read("*a")
      pipe:close()
      return text:match("^lacuna: cannot write all of standard output: No space left on device\n(.*)") or text
    end
    for _, code in ipairs { "print 'short'", "print(('long'):rep(1e5))", "print 'short' os.exit(0, true)" } do
      assert.equal(0, (select(2, run { "-e", code })))
      assert.equal("1", on_full_disk(code))
    end
    local path = temporary ""
    local code = ("f = io.open('%s', 'w') f:write 'data' print 'short' os.exit(%%s)"):format(path)
    for given, want in pairs { ["0"] = "1", ["true"] = "1", ["7"] = "7", ["7, true"] = "7",
                               ["130"] = "130" } do
      assert.equal(want, on_full_disk(code:format(given)))
      local other = assert(io.open(path))
      assert.equal("data", other:read("*a")) -- what waited for the exit in another file's buffer
      other:close()
    end
  end)

  it("is reported for code that does not compile", function()
    local text, status = run { "-e", "x = = 1" }
    assert.truthy(text:find("^lacuna: %(command line%):1: unexpected symbol near '='\n$"), text)
    assert.equal(1, status)
    assert.equal(1, (select(2, run { (temporary "for") })))
  end)
end)

-- ---- Ctrl-C --------------------------------------------------------------------------------------

-- runs `body` under guard, over and over; says "go" before and "stopped" after; then computes and compiles
local HARNESS = [[
io.stdout:setvbuf("no")
local host = require "lacuna.host"
local n, body = tonumber(arg[1]), assert(loadstring(arg[2]))
G = 0
for _ = 1, n do
  local ok, report, interrupted = host.guard(function() io.write("go\n") body() end)
  local word = tostring(report):match("interrupted%f[^%w]")
  io.write("stopped ", tostring(not ok and interrupted), " ", tostring(word), "\n")
end
local compiled, sum = 0, nil
jit.attach(function(what) if what == "stop" then compiled = compiled + 1 end end, "trace")
for _ = 1, 50 do -- LuaJIT may have put a penalty on a loop that happens to share a counter
  sum = loadstring("local s = 0 for i = 1, 1000 do s = s + i % 7 end return s")()
  if compiled > 0 then break end
end
io.write("sum ", sum, compiled > 0 and " compiled" or " interpreted", debug.gethook() and " hooked" or "",
  "\n")
]]

local LOOPS = {
  ["nothing"] = "while true do end",
  ["a counter"] = "local i = 0 while true do i = i + 1 end",
  ["a for loop without end"] = "for i = 1, 1e15 do end",
  ["nested loops"] = "while true do for i = 1, 50 do for j = 1, 5 do G = i + j end end end",
  ["an endless loop in a loop"] = "for i = 1, 10 do while true do end end",
  ["table stores"] = "local t, i = {}, 0 while true do i = i + 1 t[i % 1000 + 1] = i end",
  ["strings"] = "while true do local s = ('abc'):rep(3) .. G G = #s:upper():sub(2, 4) end",
  ["gsub"] = "while true do G = #(('hello world'):gsub('o', '0')) end",
  ["allocation"] = "while true do G = { { 1 }, 2 } end",
  ["garbage with finalizers"] = [[while true do
    getmetatable(newproxy(true)).__gc = function() local s = 0 for i = 1, 100 do s = s + i end end end]],
  ["an FFI call"] = "local ffi = require 'ffi' ffi.cdef 'int usleep(unsigned);' local C = ffi.C "
    .. "while true do C.usleep(200) end",
  ["a long FFI call"] = "local ffi = require 'ffi' ffi.cdef 'int usleep(unsigned);' ffi.C.usleep(900000) "
    .. "while true do end",
  ["FFI stores"] = "local p = require 'ffi'.new('double[100]') "
    .. "while true do for i = 0, 99 do p[i] = i end end",
  ["64-bit integers"] = "local x = 0LL while true do x = x + 1LL end",
  ["float comparisons"] = "local x = 0.5 repeat x = x * 1.0 until x > 1",
  ["closures"] = "while true do local function f(x) return x + 1 end G = f(G) end",
  ["upvalues"] = "local n = 0 local function inc() n = n + 1 end while true do inc() end",
  ["pcall of a loop"] = "local function f() for _ = 1, 100 do G = G + 1 end end while true do pcall(f) end",
  ["pcall of an endless loop"] = "while true do pcall(function() while true do end end) end",
  ["xpcall with a handler in Lua"] = [[while true do
    xpcall(function() while true do G = G + 1 end end, function(e) for _ = 1,
      10 do G = G + 1 end return e end)
    end]],
  ["errors caught"] = "while true do pcall(error, 'x') end",
  ["coroutines"] = "local co = coroutine.wrap(function() while true do coroutine.yield(1) end end) "
    .. "while true do G = G + co() end",
  ["a loop in a coroutine"] = "while true do coroutine.resume(coroutine.create(function() "
    .. "while true do G = G + 1 end end)) end",
  ["recursion"] = "local function fib(n) return n < 2 and n or fib(n - 1) + fib(n - 2) end "
    .. "while true do G = fib(18) end",
  ["tail calls"] = "local function f(n) return f(n + 1) end return f(1)",
  ["pairs"] = "local t = {} for i = 1, 50 do t['k' .. i] = i end "
    .. "while true do local s = 0 for _, v in pairs(t) do s = s + v end G = s end",
  ["metamethods"] = "local V = {} V.__index = V "
    .. "V.__add = function(a, b) return setmetatable({ x = a.x + b.x }, V) end "
    .. "local a = setmetatable({ x = 1 }, V) local b = a while true do b = b + a end",
  ["many root and side traces"] = [[
    local fs, i = {}, 0
    for k = 1, 8 do
      fs[k] = loadstring("local a, b = ... local s = 0 for i = 1, a % 17 + 3 do if i % 3 == 0 then s = s + b "
        .. "elseif i % 5 == 1 then s = s - 1 else s = s + math.floor(b / 3) end end return s + " .. k)
    end
    while true do i = i + 1 G = fs[i % 8 + 1](i, i % 29) if G % 7 == 3 then G = G + 1 elseif G % 11 == 2 then
      G = G * 2 end end]],
  ["code that is compiled all the time"] = "while true do G = loadstring('local s = 0 for i = 1, 200 do "
    .. "s = s + i % 7 if i % 5 == 0 then s = s + 1 end end return s')() end",
  ["flushes by the script"] = "while true do for i = 1, 300 do G = G + i % 3 end jit.flush() end",
  ["code that is never compiled"] = "jit.off(true, true) while true do G = G + 1 end",
  ["the optimiser off"] = "jit.opt.start('-loop') while true do end",
}

describe("Ctrl-C stops", function()
  local script
  setup(function()
    script = os.tmpname()
    local file = assert(io.open(script, "w"))
    file:write(HARNESS)
    file:close()
    math.randomseed(1)
  end)
  teardown(function() os.remove(script) end)

  local names = {}
  for name in pairs(LOOPS) do names[#names + 1] = name end
  table.sort(names)
  for _, name in ipairs(names) do
    it(name .. ", every time, and the JIT goes on", function()
      local child = start { script, tostring(INTERRUPTS), LOOPS[name] }
      local delays = {}
      for i = 1, INTERRUPTS do
        child:expect("go\n")
        pause(math.random() * (i % 3 == 0 and 0.008 or 0.001))
        local sent = now()
        child:interrupt()
        child:expect("stopped true interrupted\n")
        delays[i] = now() - sent
      end
      local text, status = child:finish()
      assert.equal("sum 3003 compiled\n", text)
      assert.equal(0, status)
      table.sort(delays)
      assert.is_true(delays[math.ceil(#delays / 2)] < MEDIAN_S, "median " .. delays[math.ceil(#delays / 2)])
    end)
  end
end)

describe("Ctrl-C in a script", function()
  -- at its first instruction after an update, interpreted and compiled: the weights have made the step
  it("waits until an update of the weights is counted", function()
    for _, last in ipairs { 1, 200 } do
      local text, status = run { (temporary(([[
        local lac, ffi, last = require "lacuna", require "ffi", %d
        ffi.cdef "int raise(int);"
        local model = lac.nn.Linear(4, 4)
        local opt = lac.optim.adamw(model, { lr = 0.1 })
        local update, updates, counted = opt.update, 0, {}
        opt.update = function(self, ...)
          update(self, ...)
          updates = updates + 1
          if updates == last then ffi.C.raise(2) end
        end
        local x, after = lac.randn { 2, 4 }, 0
        local ok, reason = pcall(function()
          for k = 1, last + 5 do
            opt:zero_grad()
            model(x):sum():backward()
            opt:step()
            after = k
          end
        end)
        for i, e in ipairs(opt.entries) do counted[i] = e.steps end
        print(ok, reason, updates, opt.steps, table.concat(counted, "\t"), after)
        os.exit(0)]]):format(last))) }
      local made = table.concat({ last, last, last, last, last - 1 }, "\t")
      assert.equal(("false\tinterrupted\t%s\n"):format(made), text)
      assert.equal(0, status)
    end
  end)

  it("does not wait for an update that has failed", function()
    local script = temporary [[
      local lac, ffi = require "lacuna", require "ffi"
      ffi.cdef "int raise(int);"
      local opt = lac.optim.sgd(lac.nn.Linear(4, 4), { lr = 0.1 })
      for _, e in ipairs(opt.entries) do e.param.grad = lac.zeros(e.param:size()) end
      opt.update = function() error("no memory", 0) end
      print(pcall(opt.step, opt))
      print(pcall(function()
        ffi.C.raise(2)
        for _ = 1, 1e5 do end
      end))
      print(opt.steps)
      os.exit(0)]]
    local text, status = run { script }
    assert.equal("false\tno memory\nfalse\tinterrupted\n0\n", text)
    assert.equal(0, status)
  end)

  it("ends it with status 130 and says where it was", function()
    local script = temporary [[
io.stdout:setvbuf("no")
local function spin() while true do end end
print "go"
spin()
]]
    local child = start { script }
    child:expect("go\n")
    pause(0.005)
    child:interrupt()
    local text, status, how = child:finish()
    local where = ("  %s:2: in function 'spin'\n  %s:4: in main chunk\n"):format(script, script)
    assert.equal("lacuna: interrupted\n" .. where, text)
    assert.equal("exited", how)
    assert.equal(130, status)
  end)

  it("lets a pcall clean up before it goes on", function()
    local child = start { "-e", [[
      io.stdout:setvbuf("no")
      local ok, message = pcall(function() print "go" while true do end end)
      local s = 0
      for i = 1, 1e4 do s = s + i end
      print("cleaned", ok, message, s)
      error(message, 0)]] }
    child:expect("go\n")
    child:interrupt()
    child:expect("cleaned\tfalse\tinterrupted\t50005000\n")
    assert.equal(130, (select(2, child:finish())))
  end)

  it("is over when the script says that it has handled it", function()
    local child = start { "-e", [[
      io.stdout:setvbuf("no")
      pcall(function() print "go" while true do end end)
      require("lacuna.host").handled()
      local t = os.clock()
      while os.clock() - t < 0.1 do end
      print "done"]] }
    child:expect("go\n")
    child:interrupt()
    local text, status = child:finish()
    assert.equal("done\n", text)
    assert.equal(0, status)
  end)

  it("wakes a blocked read", function()
    local child = start { "-e", "io.write('go\\n') io.flush() print(io.read())" }
    child:expect("go\n")
    pause(0.02)
    child:interrupt()
    assert.equal(130, (select(2, child:finish())))
  end)

  it("kills at the third press what does not react", function()
    local child = start { "-e",
      "io.write('go\\n') io.flush() print(('a'):rep(60):find(('a-'):rep(40) .. 'b'))" }
    child:expect("go\n")
    pause(0.01)
    for _ = 1, 3 do
      child:interrupt()
      pause(0.15)
    end
    local _, status, how = child:finish()
    assert.equal("killed", how)
    assert.equal(signal.SIGINT, status)
  end)

  it("SIGTERM and SIGHUP interrupt, then the process dies by them, whatever the script says", function()
    for _, name in ipairs { "SIGTERM", "SIGHUP" } do
      for last, code in pairs { ["done\n"] = "print 'done' os.exit(3, true)", ["half"] = "io.write 'half'",
          ["handled\n"] = "require('lacuna.host').handled() local t = os.clock()\n" ..
            "while os.clock() - t < 0.1 do end print 'handled'" } do
        local child = start { "-e", [[
          io.stdout:setvbuf("full")
          local ok, message = pcall(function() print "go" io.flush() while true do end end)
          print("cleaned", ok, message)
          ]] .. code }
        child:expect("go\n")
        signal.kill(child.pid, signal[name])
        local text, status, how = child:finish()
        assert.equal("cleaned\tfalse\tinterrupted\n" .. last, text)
        assert.equal("killed", how)
        assert.equal(signal[name], status)
      end
    end
  end)

  it("SIGTERM ends a session at its prompt and in the middle of code", function()
    for _, code in ipairs { false, "print 'go' io.flush() while true do end\n" } do
      local child = start_terminal({}, { LACUNA_HISTORY = "/dev/null", TERM = "dumb" })
      child:prompt("")
      if code then
        child:send(code)
        child:expect("go\r\n")
      end
      signal.kill(child.pid, signal.SIGTERM)
      local _, status, how = child:finish()
      assert.equal("killed", how)
      assert.equal(signal.SIGTERM, status)
    end
  end)

  it("leaves a SIGHUP alone that is ignored from the start", function()
    local script = temporary "os.execute('kill -HUP $PPID') print 'lives'"
    local pipe = assert(io.popen(("trap '' HUP; %s %s"):format(LACUNA, script)))
    finally(function() pipe:close() end)
    assert.equal("lives\n", pipe:read "*a")
  end)

  it("puts a debug hook of the script back, and keeps its trace callback", function()
    local child = start { "-e", [[
      io.stdout:setvbuf("no")
      local host, events = require "lacuna.host", {}
      local function callback(what) events[what] = (events[what] or 0) + 1 end
      jit.attach(callback, "trace")
      local function count() end
      debug.sethook(count, "", 1000000)
      local ok, message = host.guard(function() print "go" while true do end end)
      local f, mask, n = debug.gethook()
      print(ok, message:match("^%w+"), f == count, mask, n)
      debug.sethook()
      for i = 1, 1000 do G = i end
      jit.flush()
      print(events.start > 0, events.stop > 0, events.flush > 1)
      jit.attach(callback)
      events = {}
      for i = 1, 1000 do G = i end
      print(next(events))]] }
    child:expect("go\n")
    pause(0.005)
    child:interrupt()
    local text = child:finish()
    assert.equal("false\tinterrupted\ttrue\t\t1000000\ntrue\ttrue\ttrue\nnil\n", text)
  end)

  it("stops an operator of the engine, and takes the request back for what follows", function()
    local child = start { "-e", [[
      io.stdout:setvbuf("no")
      local ffi, lac, lib = require "ffi", require "lacuna", require "lacuna.lib"
      ffi.cdef "void lac_host_engine(void (*interrupt)(int));"
      ffi.C.lac_host_engine(lib.C.lac_interrupt)
      local q = lac.ones { 1, 65536, 4, 64 } -- attention over this takes half a minute
      local ok, report = require("lacuna.host").guard(function()
        print "go"
        lac.attend(q, q, q, { segments = { 65536 }, dilations = { 1 } })
      end)
      print(ok, report:match("interrupted"), lac.ones { 3 }:sum():item())]] }
    child:expect("go\n")
    pause(0.1)
    child:interrupt()
    local text, status = child:finish()
    assert.equal("false\tinterrupted\t3\n", text)
    assert.equal(0, status)
  end)
end)

-- ---- the terminal --------------------------------------------------------------------------------

describe("lacuna, the session on a terminal", function()
  local history

  local function session(arguments)
    local child = start_terminal(arguments or {}, { LACUNA_HISTORY = history, TERM = "dumb" })
    child:prompt("leaves)\r\n")
    return child
  end

  before_each(function()
    history = os.tmpname()
    os.remove(history)
  end)
  after_each(function() os.remove(history) end)

  local function leave(child)
    child:send("\4")
    local _, status = child:finish()
    assert.equal(0, status)
  end

  it("has lac, shows values, goes on over lines and leaves at Ctrl-D", function()
    local child = session()
    child:send("lac.ones{2}:sum():item() + 40\n")
    child:prompt("\r\n42\r\n")
    child:send("for i = 1, 2 do\n")
    child:prompt(">")
    child:send("print('line', i) end\n")
    child:prompt("\r\nline\t1\r\nline\t2\r\n")
    leave(child)
  end)

  it("completes with Tab, also on strict tables", function()
    local child = session()
    child:send("string.rev\t('abc')\n")
    child:prompt("\r\ncba\r\n")
    child:send("t = setmetatable({ alpha = 17 }, { __index = function() error 'strict' end })\n")
    child:prompt("")
    child:send("t.al\t\n")
    child:prompt("\r\n17\r\n")
    child:send("t.nothing.more\t\n")
    child:expect("strict")
    child:prompt("")
    leave(child)
  end)

  it("clears the line at Ctrl-C, drops an unfinished entry, and lives on after a loop", function()
    local child = session()
    child:send("this is not Lua")
    child:expect("this is not Lua")
    child:send("\3")
    child:expect("^C")
    child:prompt("")
    child:send("if true then\n")
    child:prompt(">")
    child:send("\3")
    child:prompt("\n")
    child:send("'still ' .. 'here'\n")
    child:prompt("\r\nstill here\r\n")
    child:send("print 'go' while true do end\n")
    child:expect("\r\ngo\r\n")
    pause(0.005)
    child:send("\3")
    child:prompt("interrupted\r\n  entry 2:1: in main chunk\r\n")
    child:send("6 * 7\n")
    child:prompt("\r\n42\r\n")
    leave(child)
  end)

  it("remembers entries over sessions, one of several lines as one", function()
    local child = session()
    child:send("function f()\n")
    child:prompt(">")
    child:send("return 'f was called' end\n")
    child:prompt("")
    child:send("1 + 1\n")
    child:prompt("\r\n2\r\n")
    leave(child)
    local lines = select(2, read_file(history):gsub("\n", ""))
    assert.equal(3, lines) -- the format's own first line, and two entries
    child = session()
    child:send("\16\16\n") -- twice Ctrl-P
    child:prompt("\r\n")
    child:send("f()\n")
    child:prompt("\r\nf was called\r\n")
    leave(child)
  end)

  it("works where no history can be written", function()
    for _, path in ipairs { "/proc/nowhere/history", "/proc" } do -- no place, and a directory
      history = path
      local child = session()
      child:send("1 + 1\n")
      child:prompt("\r\n2\r\n")
      leave(child)
    end
    history = os.tmpname()
  end)

  it("takes letters beyond ASCII where the environment names no locale", function()
    for _, locale in ipairs { "C", "POSIX", "xx_YY.UTF-8" } do
      local child = start_terminal({}, { LACUNA_HISTORY = history, TERM = "dumb", LC_ALL = locale })
      child:prompt("leaves)\r\n")
      child:send("#'\195\188n\195\175'\n")
      child:prompt("\r\n5\r\n")
      leave(child)
    end
  end)

  it("outlives Ctrl-Z where no shell could continue it", function()
    local child = session()
    child:send("kept = 17\n")
    child:prompt("")
    child:send("half\26")
    child:prompt("^C\r\n")
    child:send("kept\n")
    child:prompt("\r\n17\r\n")
    leave(child)
  end)

  it("follows a script with -i, also one that failed", function()
    local child = session { "-i", (temporary "value = 12 error('late')") }
    child:send("value\n")
    child:prompt("\r\n12\r\n")
    leave(child)
  end)
end)
