--- Devices, dtypes, threads, and the pool's controls.
--
-- Names in Lua, numbers in the engine: this file holds the two translations (dtype "f32" <-> code 1, device
-- "cuda:0" <-> 256) and the process-wide switches: default dtype and device, number of threads, memory limit
-- and statistics. One process has one engine, so these are functions, not methods of a context object; a
-- context would have to be passed through every call of every script only to be the same one each time.
--
-- Dtypes and devices are strings rather than constants, because strings print, compare and go to files as
-- they are.

local lib = require "lacuna.lib"
local schema = require "lacuna.schema"
local synonyms = require "lacuna.synonyms"

local C, ffi = lib.C, lib.ffi
local fail = schema.fail
local device = {}

--- dtype code by name, and name by code.
device.dtype_code = { f64 = C.LAC_F64, f32 = C.LAC_F32, f16 = C.LAC_F16, bf16 = C.LAC_BF16, i64 = C.LAC_I64,
                      i32 = C.LAC_I32, u8 = C.LAC_U8, bool = C.LAC_BOOL }
device.dtype_name = {}
for name, code in pairs(device.dtype_code) do device.dtype_name[code] = name end

--- Bytes of one element by dtype code.
device.dtype_size = { [C.LAC_F64] = 8, [C.LAC_F32] = 4, [C.LAC_F16] = 2, [C.LAC_BF16] = 2, [C.LAC_I64] = 8,
                      [C.LAC_I32] = 4, [C.LAC_U8] = 1, [C.LAC_BOOL] = 1 }

local DTYPE_NAMES = { "f64", "f32", "f16", "bf16", "i64", "i32", "u8", "bool" }
local default_dtype = C.LAC_F32

--- Code of a dtype name; nil means the default dtype. Raises with the nearest name.
function device.dtype(op, name)
  if name == nil then return default_dtype end
  local code = type(name) == "string" and device.dtype_code[name]
  if not code then schema.unknown(op, "dtype", name, DTYPE_NAMES, synonyms.dtype) end
  return code
end

--- Options of `to` for a name alone: that of a dtype (also one that other libraries have, for the error) or a
-- device.
function device.target(name)
  return (device.dtype_code[name] or synonyms.dtype[name]) and { dtype = name } or { device = name }
end

--- Is a dtype code one of the floating-point types?
function device.is_float(code) return code <= C.LAC_BF16 end

--- The dtype of tensors made without `dtype`: read it, or set it.
-- @tparam[opt] string name one of f64, f32, f16, bf16
-- @treturn string the dtype in force
function device.default_dtype(name)
  if name ~= nil then
    local code = device.dtype("default_dtype", name)
    if not device.is_float(code) then
      fail("default_dtype", "the default dtype must be f64, f32, f16 or bf16, got '%s'", name)
    end
    default_dtype = code
  end
  return device.dtype_name[default_dtype]
end

-- The CUDA plug-in sits next to the engine and is loaded when a script first names a CUDA device. Gives nil,
-- or the reason why there is none.
local function cuda_missing()
  if lib.has_cuda then return nil end
  if C.lac_backend_load(lib.path:match("^(.*/)") .. "liblacuna_cuda.so") ~= 0 then
    return ffi.string(C.lac_last_error())
  end
  lib.has_cuda = true
  lib.pace(C.LAC_CUDA)
  lib.pace(C.LAC_PINNED)
end

local default_code -- nil until somebody asks: a wrong LACUNA_DEVICE is an error of the first tensor

--- Code of a device name: "cpu", "cuda" (the first), "cuda:1"; nil: the default device. Raises if it is not
-- there.
function device.code(op, name)
  if name == "cpu" then return C.LAC_CPU end
  if name == nil then
    if not default_code then
      local wanted = os.getenv "LACUNA_DEVICE"
      default_code = (wanted == nil or wanted == "") and C.LAC_CPU or device.code("LACUNA_DEVICE", wanted)
    end
    return default_code
  end
  if type(name) == "string" then
    local index = name == "cuda" and 0 or tonumber(name:match("^cuda:(%d+)$"))
    if index and index < 64 then
      local reason = cuda_missing()
      if reason then fail(op, "device '%s' is not available: %s", name, reason) end
      return C.LAC_CUDA + index
    end
  end
  schema.unknown(op, "device", name, { "cpu", "cuda", "cuda:0" })
end

--- Name of a device code.
function device.name(code)
  code = tonumber(code)
  return code < C.LAC_CUDA and "cpu" or "cuda:" .. (code - C.LAC_CUDA)
end

--- The device of tensors made without `device`: read it, or set it. At the start of a process it is what the
-- environment variable LACUNA_DEVICE names, else the CPU. Tensors that are made from others are where those
-- are.
-- @tparam[opt] string name "cpu", "cuda" (the first), "cuda:1"
-- @treturn string the device in force
-- @raise there is no such device (with the reason)
function device.default_device(name)
  if name ~= nil then default_code = device.code("default_device", name) end
  return device.name(device.code("default_device", nil))
end

--- What this process computes on: compiler, BLAS, instruction set, threads, and why there is or is no GPU.
-- @treturn string several lines
function device.devices()
  cuda_missing() -- so that the text says what became of the plug-in
  local text = ffi.string(C.lac_build_info())
  return (text:gsub("\n+$", "")) .. "\nthreads: " .. device.threads()
end

--- Number of threads of the CPU back end: read it, or set it.
-- @tparam[opt] integer n 1 or more
-- @treturn number threads in use
function device.threads(n)
  if n == nil then return tonumber(C.lac_threads(0)) end
  schema.check("threads", "n", n, { type = "integer", min = 1, max = 4096 })
  local before = C.lac_threads(0)
  local now = C.lac_threads(n)
  if now ~= n then
    C.lac_threads(before)
    schema.fail("threads", "n must be at most %d, for which OpenBLAS was built, got %d", now, n)
  end
  return now
end

--- Version of the engine, as "0.1.0".
function device.version() return ffi.string(C.lac_version()) end

--- Wait until everything queued on a device is done, and report what failed there meanwhile, by the
-- operator's name. CPU operators finish before they return, so on the CPU this only answers a pending Ctrl-C
-- or memory pressure.
-- @tparam[opt] string name the device; every device in use unless given
function device.synchronize(name)
  if name ~= nil then
    lib.check(C.lac_synchronize(device.code("synchronize", name)))
  elseif C.lac_backend_has(C.LAC_CUDA, "copy") == 1 then
    lib.check(C.lac_synchronize(C.LAC_CUDA))
  else
    lib.check(0)
  end
end

--- May products of f32 matrices on CUDA round their inputs to TF32 (11 bits) for the tensor cores? Off
-- unless asked for: exact f32 is eight times slower there and a thousand times more precise. Attention
-- takes f32 to the tensor cores in any case, without this in parts that are as exact as f32.
-- @tparam[opt] boolean on
-- @treturn boolean the choice in force
function device.use_tf32(on)
  if on ~= nil then schema.check("use_tf32", "on", on, { type = "boolean" }) end
  return C.lac_tf32(on == nil and -1 or on and 1 or 0) == 1
end

--- Which operators a device has, by the engine's names.
-- @tparam string name the device
-- @tparam string slot operator, such as "matmul"
-- @treturn boolean
function device.supports(name, slot)
  local has = C.lac_backend_has(device.code("supports", name), slot)
  if has < 0 then fail("supports", "there is no operator '%s' in the engine", tostring(slot)) end
  return has == 1
end

--- Code of a pool's name: a device's, or "pinned": page-locked host memory, which the CUDA device copies from
-- and to by itself.
function device.pool(op, name)
  if name ~= "pinned" then return device.code(op, name) end
  device.code(op, "cuda") -- it is the plug-in that has it
  return C.LAC_PINNED
end

--- Memory statistics of a device.
-- @tparam[opt] string name "cpu" (the default), "cuda", or "pinned" for page-locked host memory
-- @treturn table {live, cached, peak, limit, live_blocks, allocations, reused, storages, soft}; bytes and
--   counts; print it for a sentence
function device.memory(name)
  return lib.memory_stats(device.pool("memory", name or "cpu"))
end

local LIMIT = { soft = { type = "integer", min = 0, default = 0 },
                device = { type = "string", default = "cpu" } }

local function check_limits(op, hard, soft)
  if hard > 0 and soft > hard then
    fail(op, "the soft limit must not be above the hard one: %.0f > %.0f bytes", soft, hard)
  end
end

--- The options of a pool as one table, complete: limit (hard), soft, device. For lac.config.pool.
function device.pool_options(options)
  local o = schema.options("pool", options, { limit = { type = "integer", min = 0, default = 0 },
                                              soft = LIMIT.soft, device = LIMIT.device })
  check_limits("pool", o.limit, o.soft)
  return o
end

--- Limits of a pool in bytes; 0 removes one. Over the hard limit an operator fails, after garbage was
-- collected and the pool trimmed. Over the soft limit the same is done first, but what is still needed then
-- may pass it: garbage never takes the pool over it.
-- @tparam integer|table bytes hard limit on live bytes, or a lac.config.pool with all of it
-- @tparam[opt] table options soft = 0: soft limit, not above the hard one; device = "cpu": whose pool, as for
--   lac.memory
function device.memory_limit(bytes, options)
  if type(bytes) == "table" then
    options = { soft = bytes.soft, device = bytes.device }
    bytes = bytes.limit
  end
  schema.check("memory_limit", "bytes", bytes, { type = "integer", min = 0 })
  local o = schema.options("memory_limit", options, LIMIT)
  check_limits("memory_limit", bytes, o.soft)
  local pool = device.pool("memory_limit", o.device)
  lib.check(C.lac_memory_limit(pool, bytes))
  lib.soft_limit(o.soft, pool)
end

--- Start the peak statistic afresh from what is live now.
function device.reset_peak()
  lib.bury()
  lib.check(C.lac_memory_reset_peak())
end

--- Collect dead tensors and give cached memory back to the system.
function device.trim()
  lib.collect()
  lib.check(C.lac_memory_trim())
end

--- Give the pools' cached blocks back to the system and the device, without collecting garbage first
-- (lac.trim does). Memory of the device goes back when nothing is queued there: this waits.
-- @tparam[opt] string name only that pool: "cpu", "cuda" or "pinned"
function device.empty_cache(name)
  lib.bury()
  if name == nil then return lib.check(C.lac_memory_trim()) end
  lib.check(C.lac_memory_empty(device.pool("empty_cache", name)))
end

-- ---- events -------------------------------------------------------------------------------------

local Event = {}
Event.__index = Event
local event_slot = ffi.new("lac_event *[1]")
local done_slot, ms_slot = ffi.new("int[1]"), ffi.new("double[1]")

--- A place in the queue of a device, recorded now. On the CPU, where operators finish before they return, it
-- is always done.
-- @tparam[opt] string name the device; the default device unless given
-- @treturn Event record() moves it here; done() asks, wait() waits; from:elapsed(to) gives milliseconds
function device.event(name)
  lib.check(C.lac_event_new(device.code("event", name), event_slot))
  local e = setmetatable({ c = ffi.gc(event_slot[0], C.lac_event_drop) }, Event)
  return e:record()
end

function Event:record()
  lib.check(C.lac_event_record(self.c))
  return self
end

function Event:done()
  lib.check(C.lac_event_done(self.c, done_slot))
  return done_slot[0] ~= 0
end

function Event:wait()
  lib.check(C.lac_event_wait(self.c))
  return self
end

function Event:elapsed(to)
  if getmetatable(to) ~= Event then fail("event", "elapsed needs a second event, got %s", schema.show(to)) end
  lib.check(C.lac_event_elapsed(self.c, to.c, ms_slot))
  return ms_slot[0]
end

function Event:__tostring() return self:done() and "Event(done)" or "Event(queued)" end

return device
