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
  if not code then schema.unknown(op, "dtype", name, DTYPE_NAMES) end
  return code
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
  if C.lac_backend_load(lib.path:match("^(.*/)") .. "liblacuna_cuda.so") == 0 then return nil end
  return ffi.string(C.lac_last_error())
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
  if n ~= nil then schema.check("threads", "n", n, { type = "integer", min = 1, max = 4096 }) end
  return tonumber(C.lac_threads(n or 0))
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
-- unless asked for: exact f32 is eight times slower there and a thousand times more precise.
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

--- Memory statistics of a device.
-- @tparam[opt] string name "cpu" (the default)
-- @treturn table {live, cached, peak, limit, live_blocks, allocations, reused, storages, soft}; bytes and
--   counts
function device.memory(name)
  return lib.memory_stats(device.code("memory", name or "cpu"))
end

local LIMIT = { soft = { type = "integer", min = 0, default = 0 } }

--- Limits of the pool in bytes; 0 removes one. Over the hard limit an operator fails, after garbage was
-- collected and the pool trimmed. Over the soft limit the same is done first, but what is still needed then
-- may pass it: garbage never takes the pool over it.
-- @tparam integer bytes hard limit on live bytes
-- @tparam[opt] table options soft = 0: soft limit, not above the hard one
function device.memory_limit(bytes, options)
  schema.check("memory_limit", "bytes", bytes, { type = "integer", min = 0 })
  local soft = schema.options("memory_limit", options, LIMIT).soft
  if bytes > 0 and soft > bytes then
    fail("memory_limit", "the soft limit must not be above the hard one: %.0f > %.0f bytes", soft, bytes)
  end
  lib.check(C.lac_memory_limit(C.LAC_CPU, bytes))
  lib.soft_limit(soft)
end

--- Start the peak statistic afresh from what is live now.
function device.reset_peak() lib.check(C.lac_memory_reset_peak()) end

--- Collect dead tensors and give cached memory back to the system.
function device.trim()
  collectgarbage()
  collectgarbage()
  lib.check(C.lac_memory_trim())
end

return device
