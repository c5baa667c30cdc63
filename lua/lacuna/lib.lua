--- The binding to the engine: loading, checking, errors, memory pressure.
--
-- This is the only file that requires "ffi" for the engine; everything else reaches C through `lib.C`,
-- `lib.ffi` and the check functions here. The declarations are not written down twice: the library carries
-- the text of its own header (lac_cdef) and hands it over, so a binary and its declarations cannot drift.
-- What can still drift is a Lua tree next to an old binary: the ABI number and the size of every plain struct
-- are compared at load.
--
-- Errors are plain Lua strings: the engine's sentence, then ` [model path, file.lua:line]`. The line is found
-- by walking the call stack to the first frame outside this library, and the model path by recognising the
-- frames of registered functions (lib.frame_name) on the way. The rejected alternative, pushing and popping
-- names around every module call, costs time on the hot path and goes stale when an error passes through.
--
-- The garbage collector cannot see engine memory: a dead tensor weighs 200 bytes in Lua however many
-- megabytes it holds. So the pool raises flags.pressure when live bytes pass a soft limit; lib.attend then
-- runs a full collection and sets the next limit at twice what survived, as the collector itself paces its
-- heap. When the pool refuses an allocation, lib.recover collects and trims, and the caller tries exactly
-- once more; a refusal by the soft limit is lifted for that one retry.
--
-- Owners of storage have no finalizers: to set and to run one took longer than the rest of a small operator.
-- They are listed, weakly, beside their storages. One struct that is garbage from the start has a finalizer,
-- which raises flags.attention: a collection is over, and lib.attend drops the storages of owners that are
-- gone. Rejected: doing that in the finalizer, where nothing is compiled and an allocation may be under way.
--
-- Because every caller looks at flags.attention after every call, a tracer needs no hook of its own: while
-- one is set, the flag stays up and lib.attend calls it after each engine call. lib.place tells it from
-- where.

local ffi = require "ffi"

local lib = { ffi = ffi }

local EXPECTED_ABI = 2
local MIN_PACE = 64 * 2 ^ 20
local STRUCTS = { "lac_tensor", "lac_memory_stats", "lac_flags", "lac_optim_item", "lac_attn_desc",
                  "lac_strip", "lac_plan_info", "lac_attn_args", "lac_cache_stats", "lac_block_info",
                  "lac_profile_event", "lac_watch_info" }

local function file_exists(path)
  local f = io.open(path, "rb")
  if f then f:close() end
  return f ~= nil
end

-- the directory that holds lacuna/: "lua" for ./lua/lacuna/lib.lua
local source = debug.getinfo(1, "S").source
local library_dir = source:match("^@(.*)[/\\]lacuna[/\\]lib%.lua$") or "."
local own_prefix = "@" .. library_dir .. "/lacuna/"

local function find_library()
  local named = os.getenv("LACUNA_LIBRARY")
  if named and named ~= "" then
    if not file_exists(named) then
      error("lacuna: LACUNA_LIBRARY names a file that does not exist: " .. named, 0)
    end
    return named:find("/", 1, true) and named or "./" .. named
  end
  local tried = { library_dir .. "/../build/lib/liblacuna.so", library_dir .. "/../../../lib/liblacuna.so" }
  for _, path in ipairs(tried) do
    if file_exists(path) then return path end
  end
  error("lacuna: the engine liblacuna.so is not there; build it with `make` or set LACUNA_LIBRARY; tried:\n  "
    .. table.concat(tried, "\n  "), 0)
end

local function setenv(name, value)
  pcall(ffi.cdef, "int setenv(const char *name, const char *value, int overwrite);")
  ffi.C.setenv(name, value, 0)
end

-- OpenMP's threads wait for the next loop by spinning, by default for milliseconds. Beside one other busy
-- process that makes two threads slower than one; not spinning at all costs about a tenth on an idle machine.
-- A short spin keeps nearly all of both. Read once by libgomp when it loads; a setting of the user stands.
local function calm_threads()
  if os.getenv("OMP_WAIT_POLICY") or os.getenv("GOMP_SPINCOUNT") then return end
  setenv("GOMP_SPINCOUNT", "1000")
end

--- The kernels that OpenBLAS must be told to take, or nil where it knows the processor itself.
-- Those of a processor it does not know are its oldest, SSE3's, an eighth of the speed. The version in Debian
-- 12 (0.3.21) knows Intel's up to model 0xa7; later ones run those of Skylake-X or Haswell.
-- @tparam string cpuinfo as /proc/cpuinfo has it
-- @treturn ?string a value of OPENBLAS_CORETYPE
function lib.blas_kernels(cpuinfo)
  local family, model = cpuinfo:match "cpu family%s*:%s*(%d+)", tonumber(cpuinfo:match "model%s*:%s*(%d+)")
  local flags = " " .. (cpuinfo:match "flags%s*:([^\n]*)" or "") .. " "
  local function has(...)
    for _, flag in ipairs{ ... } do
      if not flags:find(" " .. flag .. " ", 1, true) then return false end
    end
    return true
  end
  if not cpuinfo:find("GenuineIntel", 1, true) or family ~= "6" or (model or 0) <= 0xa7 then return nil end
  if has("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl") then return "SKYLAKEX" end
  return has("avx2", "fma") and "HASWELL" or nil
end

-- read once by OpenBLAS when it loads; a setting of the user stands
local function choose_blas_kernels()
  local f = not os.getenv("OPENBLAS_CORETYPE") and io.open("/proc/cpuinfo")
  if not f then return end
  local kernels = lib.blas_kernels(f:read(8192) or "") -- the first processor's lines are enough
  f:close()
  if kernels then setenv("OPENBLAS_CORETYPE", kernels) end
end

local function load_library()
  local path = find_library()
  calm_threads()
  choose_blas_kernels()
  local ok, C = pcall(ffi.load, path)
  if not ok then error("lacuna: cannot load " .. path .. ": " .. tostring(C), 0) end
  -- busted and `package.loaded[...] = nil` load this file again in one process: declarations exist then, and
  -- tensors that the file before has made keep their memory to the end of the process
  if not pcall(ffi.typeof, "struct lac_tensor") then
    if not pcall(function() return ffi.C.lac_cdef end) then pcall(ffi.cdef, "const char *lac_cdef(void);") end
    local found, text = pcall(function() return ffi.string(C.lac_cdef()) end)
    if not found then error("lacuna: " .. path .. " is not this engine: " .. tostring(text), 0) end
    ffi.cdef(text)
  end
  if C.LAC_ABI ~= EXPECTED_ABI then
    error(("lacuna: %s has ABI %d, this Lua tree needs %d: rebuild the engine with `make clean all`")
      :format(path, C.LAC_ABI, EXPECTED_ABI), 0)
  end
  local forced, chosen = os.getenv("LACUNA_CPU"), ffi.string(C.lac_isa(nil)):match("^%w+")
  if forced and forced ~= chosen then
    error(("LACUNA_CPU=%s is not available on this processor or in this build (valid: baseline, avx2, "
      .. "avx512f, avx512, amx; unset, it would be %s)"):format(forced, chosen), 0)
  end
  for _, name in ipairs(STRUCTS) do
    local here, there = ffi.sizeof(name), C.lac_sizeof(name)
    if here ~= there then
      error(("lacuna: struct %s has %d bytes here and %d in %s: rebuild the engine with `make clean all`")
        :format(name, here, there, path), 0)
    end
  end
  return C, path
end

local C
C, lib.path = load_library()
lib.C = C
lib.dir = library_dir
lib.flags = C.lac_flags_get()

--- Status codes by name: lib.status.memory, lib.status.shape, ...
lib.status = {}
for code = 0, 63 do
  local name = C.lac_status_name(code)
  if name == nil then break end
  name = ffi.string(name)
  if lib.status[name] then break end -- past the end the engine repeats a catch-all name
  lib.status[name] = code
end

-- ---- where an error happened --------------------------------------------------------------------

local frame_names = setmetatable({}, { __mode = "k" })
local frame_origins = setmetatable({}, { __mode = "k" })

--- Register a function whose frames name a part of a model in error messages.
-- When an error is raised while `f` is active, `describe(first argument of f)` becomes one step of the path,
-- outermost first. `f` must not leave by a tail call while its work runs (a tail call has no frame). Costs
-- nothing until an error happens.
-- @tparam function f called as f(self, ...)
-- @tparam function describe takes self, returns a string such as "layers[3]" or nil to stay out of the path
function lib.frame_name(f, describe) frame_names[f] = describe end

--- Register a function whose frames work on behalf of an earlier call: the walk of backward runs the rule
-- of a tape node, which belongs to the place where the node was recorded.
-- @tparam function f its first argument is given as the third result of lib.place
function lib.frame_origin(f) frame_origins[f] = true end

-- operators that a script calls, by the function inside (arguments.lua)
local operators, operator_names = setmetatable({}, { __mode = "k" }), {}

--- Register a function as the operator of this name: errors of what it is made of are told in its name.
-- @tparam function f @tparam string name as a script writes it
function lib.operator(f, name) operators[f], operator_names[name] = name, true end

-- functions of the engine that are parts of several operators
local PARTS = {}
for name in ("random axpy scale fill index_put map1 map2 map3 mapp scan reduce"):gmatch "%S+" do
  PARTS[name], operator_names[name] = true, true
end
operator_names.copy = true

-- what does not change about a function: its file, and whether it is the library's own
local known = setmetatable({}, { __mode = "k" })

local function describe_function(level, f)
  local info = debug.getinfo(level + 1, "S")
  local own = info.what == "C" or info.source:sub(1, #own_prefix) == own_prefix
  local k = { own = own, c = info.what == "C", file = info.short_src }
  known[f] = k
  return k
end

--- Who called: walks the stack up from a level.
-- @tparam number level 1 is the function that calls this one
-- @treturn ?string path of the model, "LongNet.layers[3].attn"
-- @treturn ?string the first line outside this library, "train.lua:41"
-- @return the first argument of the innermost frame registered with lib.frame_origin
-- @treturn ?string the operator that this line has called
function lib.place(level)
  local path, line, origin, operator, before
  level = level + 1
  while true do
    local info = debug.getinfo(level, "f")
    if not info then break end
    local f = info.func
    local k = known[f] or describe_function(level, f)
    local describe = frame_names[f]
    if describe then
      local _, self = debug.getlocal(level, 1)
      local ok, step = pcall(describe, self)
      -- anything may have been called as if it were a module
      if ok and type(step) == "string" then path = path and step .. "." .. path or step end
    end
    if frame_origins[f] and not origin then
      local _
      _, origin = debug.getlocal(level, 1)
    end
    if not line and not k.own then
      local current = debug.getinfo(level, "l").currentline
      if current > 0 then line, operator = k.file .. ":" .. current, operators[before] end
    end
    if not k.c then before = f end -- pcall(lac.softmax, x) calls it too
    level = level + 1
  end
  return path, line, origin, operator
end

local function bracketed(path, line)
  local where = path and line and path .. ", " .. line or path or line
  return where and " [" .. where .. "]" or ""
end

--- Text for the end of an error message: " [LongNet.layers[3].attn, train.lua:41]", "" if nothing is known.
-- @treturn string
function lib.where()
  local path, line = lib.place(2)
  return bracketed(path, line)
end

-- The message with the place at its end. If it begins with the name of an operator, then of the one that the
-- script has called, which may be made of others; gradients are functions of the engine with names of their
-- own. late: the engine may tell here what an operator did that was called before.
local function placed(message, late)
  local path, line, _, called = lib.place(2)
  local name, rest = message:match "^([%l%d_]+)(: .*)$"
  local plain = name and name:gsub("_bwd$", "")
  if plain and operator_names[plain] then
    -- only kernels know whether an index is outside, and they say so late
    local now = not late or PARTS[plain] and not rest:find("(counted from 0)", 1, true)
    message = (now and called or plain) .. rest
  end
  return message .. bracketed(path, line)
end

--- Raise a Lua error with the place of the user's call appended.
-- @tparam string format a string.format pattern, already complete when there are no more arguments
function lib.fail(format, ...)
  local message = select("#", ...) > 0 and format:format(...) or format
  error(placed(message), 0)
end

-- ---- owners -------------------------------------------------------------------------------------

local flags = lib.flags
local owners, owned, room = setmetatable({}, { __mode = "v" }), 0, 2 ^ 10
local storages = ffi.new("lac_storage *[?]", room + 1)
local herald, grave = ffi.typeof("lac_flags"), ffi.new("lac_tensor")
local collected = false -- since the last look at the owners

local function announce()
  collected, flags.attention = true, 1
end

--- Drop the storages of dead owners, if there was a collection since the last time: whoever looks at a pool's
-- state calls this before. An interrupt may end it anywhere: in this order nothing is dropped twice, one
-- storage may be lost, and what is left is found after the next collection. A finalizer of the script may
-- make tensors meanwhile.
local function bury()
  if not collected then return end
  ffi.gc(herald(), announce)
  collected = false
  local n, i = 0, 0
  while i < owned do
    i = i + 1
    local owner = owners[i]
    if not owner then
      grave.storage = storages[i]
      storages[i] = nil
      C.lac_tensor_drop(grave)
    else
      n = n + 1
      if n < i then
        local storage = storages[i]
        owners[n], storages[i] = owner, nil
        storages[n] = storage
        owners[i] = nil
      end
    end
  end
  owned = n
end
lib.bury = bury

--- Drop c's storage when c is garbage.
-- @tparam cdata c lac_tensor with one reference
function lib.own(c)
  local n = owned + 1
  if n > room then
    local larger = ffi.new("lac_storage *[?]", 2 * room + 1)
    ffi.copy(larger, storages, ffi.sizeof("lac_storage *") * (room + 1))
    storages = larger -- before its room: an interrupt may come between
    room = 2 * room
  end
  storages[n], owners[n] = c.storage, c
  owned = n
end

-- ---- memory -------------------------------------------------------------------------------------

local stats = ffi.new("lac_memory_stats")

--- Bytes for people: "1.5 MiB".
function lib.bytes_text(n)
  local units = { "B", "KiB", "MiB", "GiB", "TiB" }
  local i = 1
  while n >= 1024 and i < #units do n, i = n / 1024, i + 1 end
  return (i == 1 and "%d %s" or "%.1f %s"):format(n, units[i])
end

local Stats = {}
Stats.__index = Stats

function Stats:__tostring()
  local text = lib.bytes_text
  return ("memory: %s live in %d blocks, peak %s, cached %s, limit %s, soft limit %s"):format(text(self.live),
    self.live_blocks, text(self.peak), text(self.cached), self.limit > 0 and text(self.limit) or "none",
    self.soft > 0 and text(self.soft) or "none")
end

--- Statistics of the pool as a Lua table of numbers (bytes, and counts), which prints as a sentence.
function lib.memory_stats(device)
  bury()
  C.lac_memory(device or C.LAC_CPU, stats)
  return setmetatable({ live = tonumber(stats.live), cached = tonumber(stats.cached),
    peak = tonumber(stats.peak), limit = tonumber(stats.limit), live_blocks = tonumber(stats.live_blocks),
    allocations = tonumber(stats.allocations), reused = tonumber(stats.reused),
    storages = tonumber(stats.storages), soft = tonumber(stats.soft) }, Stats)
end

--- What holds most of the pool, as text for the error of a full one; init.lua sets it.
lib.memory_detail = nil

-- of the pool that the message is about
local function pool_report(message)
  local pool = message:find("out of memory on cuda", 1, true) and C.LAC_CUDA
    or message:find("out of memory (page-locked)", 1, true) and C.LAC_PINNED or C.LAC_CPU
  local m = lib.memory_stats(pool)
  return ("; pool: live %s in %d blocks, cached %s, peak %s, limit %s (after collecting and trimming)")
    :format(lib.bytes_text(m.live), m.live_blocks, lib.bytes_text(m.cached), lib.bytes_text(m.peak),
            m.limit > 0 and lib.bytes_text(m.limit) or "none")
    .. (lib.memory_detail and lib.memory_detail(pool) or "")
end

--- Collect garbage to the end.
function lib.collect()
  collectgarbage()
  bury()
  collectgarbage() -- the second cycle frees what finalizers of the first (of plans, graphs, files) let go
  bury()
end
local collect = lib.collect

-- ---- checking calls -----------------------------------------------------------------------------

local MEMORY, INTERRUPTED = lib.status.memory, lib.status.interrupted
local DTYPE, DEVICE = lib.status.dtype, lib.status.device
local tracer, excused = nil, false
local soft, softs = 0, {} -- softs: by device; soft: their sum

--- Call f() after every engine call that succeeded, until lib.trace(nil).
function lib.trace(f)
  tracer = f
  flags.attention = 1
end

--- Soft limit of a device's pool in bytes, 0 for none: a request over it first collects garbage and trims the
-- pool.
function lib.soft_limit(bytes, device)
  lib.check(C.lac_memory_soft_limit(device, bytes))
  soft = soft + bytes - (softs[device] or 0)
  softs[device] = bytes
end

--- After a failed call: can trying again help? Only for status "memory", after a collection and a trim.
-- @tparam number status
-- @treturn boolean
function lib.recover(status)
  if status ~= MEMORY then return false end
  collect()
  C.lac_memory_trim()
  if soft > 0 then
    C.lac_memory_excuse(1) -- what is left is needed: it may pass the soft limit; lib.attend sets it anew
    excused, flags.attention = true, 1
  end
  return true
end

--- Raise the engine's message for a nonzero status.
-- @tparam[opt] string op what the script called, if that has another name than the engine's function
-- @tparam[opt] string own that other name: only its messages are renamed, for a device may report here what
-- another operator did before
function lib.raise(status, op, own)
  if status == INTERRUPTED then
    C.lac_interrupt(0)
    error("interrupted", 0)
  end
  if lib.watcher then lib.watcher() end -- the sentence is its own if it was the watch that refused
  local message = ffi.string(C.lac_last_error())
  if own and message:sub(1, #own + 2) == own .. ": " then message = op .. message:sub(#own + 1) end
  if message == "" then message = "lacuna: status " .. ffi.string(C.lac_status_name(status)) end
  if status == MEMORY then message = message .. pool_report(message) end
  if status == DTYPE and not message:find(";", 1, true) then -- where the engine names no remedy of its own
    message = message .. "; x:float(), x:double(), x:long() and so on cast"
  elseif status == DEVICE and message:find(" is on %S+ but %S+ is on %S+$") then
    message = message .. '; x:to("cuda") and x:to("cpu") move'
  end
  error(placed(message, lib.has_cuda), 0) -- a device works behind the script
end

local function stop_if_asked()
  if flags.interrupted ~= 0 then
    C.lac_interrupt(0)
    error("interrupted", 0)
  end
end

--- Let a pool raise flags.pressure when twice what is live in it now is.
function lib.pace(device)
  C.lac_memory(device, stats)
  local pace = 2 * tonumber(stats.live)
  C.lac_memory_pace(device, pace > MIN_PACE and pace or MIN_PACE)
end

--- Answer the engine's flags, when flags.attention is set: trace, collect under memory pressure. A Ctrl-C
-- that came after the engine's own last look is left to the next call, which fails: what this one made has
-- no owner yet and would leak.
function lib.attend()
  -- first: what is raised while we look is then seen at the next call
  flags.attention = (tracer or collected) and 1 or 0
  if excused then
    excused = false
    C.lac_memory_excuse(0)
  end
  bury()
  if tracer then tracer() end
  if flags.interrupted ~= 0 then flags.attention = 1 end
  if flags.pressure ~= 0 then
    flags.pressure = 0
    collect()
    lib.pace(C.LAC_CPU)
    if lib.has_cuda then
      lib.pace(C.LAC_CUDA)
      lib.pace(C.LAC_PINNED)
    end
  end
  local watcher = lib.watcher -- watch.lua, while it is on
  if watcher then watcher() end
end

local recover, raise, attend = lib.recover, lib.raise, lib.attend

--- Check a status that cannot be retried.
function lib.check(status)
  if status ~= 0 then raise(status) end
  if flags.attention ~= 0 then
    attend()
    stop_if_asked()
  end
end

--- Call an engine function, retry once after freeing memory, raise on failure. Operators on the hot path
-- write the same four lines out instead, because a vararg call can end a trace.
function lib.call(f, ...)
  local status = f(...)
  if status ~= 0 then
    if recover(status) then status = f(...) end
    if status ~= 0 then raise(status) end
  end
  if flags.attention ~= 0 then attend() end
end

--- The same for an operator that has another name than the engine's function, `own`: a message starts with
-- the operator's.
function lib.call_as(op, own, f, ...)
  local status = f(...)
  if status ~= 0 then
    if recover(status) then status = f(...) end
    if status ~= 0 then raise(status, op, own) end
  end
  if flags.attention ~= 0 then attend() end
end

announce()
lib.pace(C.LAC_CPU)
lib.has_cuda = false -- device.lua, once the plug-in is loaded

-- inside the `lacuna` command Ctrl-C also asks long operators to stop; a plain luajit has no such function
pcall(ffi.cdef, "void lac_host_engine(void (*interrupt)(int on));")
local hosted, register = pcall(function() return ffi.C.lac_host_engine end)
if hosted then register(C.lac_interrupt) end

return lib
