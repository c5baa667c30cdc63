--- sys.lua: the few things that Lua's own library cannot ask of the operating system.
--
-- Terminals, directories, monotonic time, durable writes, temporary names and running a program whose exit
-- status matters. They sit in one file so that the modules above (io, log, data, train, plot) contain no
-- system calls, and so that there is one place to look at when a platform differs.
--
-- Why the FFI and not lua-posix: these are a dozen calls, and every further Debian package is a further way
-- for a first run to fail. Declarations carry an asm label under a lac_sys_ name, because a second ffi.cdef
-- of the same C name with other types would silently change this file's view of it. Listing a directory alone
-- is left to LuaFileSystem (Debian package lua-filesystem), because the layout of struct dirent is the
-- platform's own affair.
--
-- Rejected: shelling out to mkdir and sync. It costs a fork each, and the reason of a failure is lost.
-- Programs are run through sh only where a program is the point (gnuplot, xz, bible), and then every word of
-- the command line that came from outside goes through sys.quote.

local ffi = require "ffi"
local lfs = require "lfs"

ffi.cdef [[
typedef struct { long sec, nsec; } lac_sys_time;
int lac_sys_isatty(int fd) __asm__("isatty");
int lac_sys_mkdir(const char *path, unsigned int mode) __asm__("mkdir");
int lac_sys_clock(int id, lac_sys_time *t) __asm__("clock_gettime");
int lac_sys_open(const char *path, int flags) __asm__("open");
int lac_sys_close(int fd) __asm__("close");
int lac_sys_fsync(int fd) __asm__("fsync");
int lac_sys_fileno(void *file) __asm__("fileno");
int lac_sys_getpid(void) __asm__("getpid");
int lac_sys_access(const char *path, int mode) __asm__("access");
int lac_sys_kill(int pid, int signal) __asm__("kill");
int lac_sys_link(const char *from, const char *to) __asm__("link");
int lac_sys_truncate(const char *path, long bytes) __asm__("truncate");
int lac_sys_flock(int fd, int operation) __asm__("flock");
char *lac_sys_strerror(int code) __asm__("strerror");
size_t lac_sys_fread(void *to, size_t size, size_t n, void *file) __asm__("fread");
size_t lac_sys_fwrite(const void *from, size_t size, size_t n, void *file) __asm__("fwrite");
]]

local C = ffi.C
local EPERM, EEXIST, CLOCK_MONOTONIC, O_RDONLY, O_DIRECTORY, W_OK, X_OK = 1, 17, 1, 0, 0x10000, 2, 1
local EWOULDBLOCK, LOCK_EX, LOCK_NB, LOCK_UN = 11, 2, 4, 8
local clock = ffi.new("lac_sys_time")
local names = 0

local function errno()
  return ffi.string(C.lac_sys_strerror(ffi.errno()))
end

local sys = {}

--- Seconds of the monotonic clock (never steps backwards; only differences mean anything).
-- @treturn number seconds
function sys.time()
  C.lac_sys_clock(CLOCK_MONOTONIC, clock)
  return tonumber(clock.sec) + tonumber(clock.nsec) * 1e-9
end

--- Is this open file a terminal?
-- @param file a Lua file (io.stdout, io.stderr, ...)
-- @treturn boolean
function sys.isatty(file)
  return C.lac_sys_isatty(C.lac_sys_fileno(file)) == 1
end

--- Does the path exist?
-- @tparam string path
-- @treturn boolean
function sys.exists(path)
  return C.lac_sys_access(path, 0) == 0
end

--- Size of a file in bytes.
-- @tparam string path
-- @treturn ?number bytes, or nil and the reason
function sys.file_size(path)
  local file, reason = io.open(path, "rb")
  if not file then return nil, reason end
  local size, why = file:seek("end")
  file:close()
  return size, why
end

--- Make a directory and its missing parents.
-- @tparam string path
-- @treturn boolean true, or nil and a sentence
function sys.mkdir(path)
  local made = path:sub(1, 1) == "/" and "/" or ""
  for part in path:gmatch("[^/]+") do
    made = made .. part
    if C.lac_sys_mkdir(made, 493) ~= 0 and ffi.errno() ~= EEXIST then -- 0755
      return nil, ("cannot make the directory %q: %s"):format(made, errno())
    end
    made = made .. "/"
  end
  return true
end

--- Make one directory; its parents exist. Tells "made now" from "was there already".
-- @tparam string path
-- @treturn boolean true if this call made it; false if it existed; nil and a sentence on failure
function sys.mkdir_new(path)
  if C.lac_sys_mkdir(path, 493) == 0 then return true end
  if ffi.errno() == EEXIST then return false end
  return nil, ("cannot make the directory %q: %s"):format(path, errno())
end

--- The directory part of a path ("." if it has none).
-- @tparam string path
-- @treturn string
function sys.dirname(path)
  local dir = path:match("^(.*)/[^/]*$")
  if dir == "" then return "/" end
  return dir or "."
end

--- Can files be made in this directory?
-- @tparam string path
-- @treturn boolean true, or nil and a sentence
function sys.can_write_in(path)
  local mode, reason = lfs.attributes(path, "mode")
  if mode ~= "directory" then return nil, reason or ("%q is not a directory"):format(path) end
  if C.lac_sys_access(path, W_OK + X_OK) == 0 then return true end
  return nil, ("cannot write in the directory %q: %s"):format(path, errno())
end

--- Names in a directory, sorted, without . and ..
-- @tparam string path
-- @treturn ?table list of names, or nil and the reason
function sys.list(path)
  local ok, iterate, state = pcall(lfs.dir, path)
  if not ok then return nil, tostring(iterate) end
  local list = {}
  for name in iterate, state do
    if name ~= "." and name ~= ".." then list[#list + 1] = name end
  end
  table.sort(list)
  return list
end

--- Is the path a directory?
function sys.is_directory(path) return lfs.attributes(path, "mode") == "directory" end

--- A second name for a file (a hard link).
-- @treturn boolean true, or nil and the reason
function sys.link(from, to)
  if C.lac_sys_link(from, to) == 0 then return true end
  return nil, errno()
end

--- Cut a file to a number of bytes.
-- @treturn boolean true, or nil and the reason
function sys.truncate(path, bytes)
  if C.lac_sys_truncate(path, bytes) == 0 then return true end
  return nil, errno()
end

--- Claim an open file for this process, until it is closed or the process ends, however it ends. Claims are
-- between programs that ask for them; nobody is kept from reading or writing.
-- @param file a Lua file
-- @treturn ?boolean true: it is claimed; false: somebody else has it, or another open file of this process;
--   nil: this file system knows no claims
function sys.claim(file)
  if C.lac_sys_flock(C.lac_sys_fileno(file), LOCK_EX + LOCK_NB) == 0 then return true end
  if ffi.errno() == EWOULDBLOCK then return false end
  return nil
end

--- Give up the claim on an open file.
function sys.disclaim(file) C.lac_sys_flock(C.lac_sys_fileno(file), LOCK_UN) end

--- Is there a process of this number (on this machine) that can still do something? One that has ended, but
-- for which its parent has not yet asked, counts as gone.
-- @tparam number pid
function sys.process_exists(pid)
  if C.lac_sys_kill(pid, 0) ~= 0 then return ffi.errno() == EPERM end
  local file = io.open(("/proc/%d/stat"):format(pid), "rb")
  if not file then return true end -- no /proc here, or gone a moment ago: the next look will tell
  local state = (file:read("*a") or ""):match("%) (%a)")
  file:close()
  return state ~= "Z" and state ~= "X"
end

--- This process's number.
function sys.pid() return C.lac_sys_getpid() end

--- Write a whole file. That a disk is full shows when the buffer leaves the process, with a small text in
-- the last call: each of them is asked.
-- @tparam string path
-- @tparam string text
-- @treturn boolean true, or nil and a sentence
function sys.write_file(path, text)
  local file, reason = io.open(path, "wb")
  if not file then return nil, "cannot write " .. reason end
  local written, why = file:write(text)
  local closed, late = file:close()
  if written and closed then return true end
  return nil, ("cannot write %s: %s"):format(path, why or late)
end

--- Push a file's bytes to the disk: the C library's buffer, then the kernel's.
-- @param file a Lua file open for writing
-- @treturn boolean true, or nil and a sentence
function sys.sync(file)
  local ok, reason = file:flush()
  if not ok then return nil, tostring(reason) end
  if C.lac_sys_fsync(C.lac_sys_fileno(file)) ~= 0 then return nil, errno() end
  return true
end

--- Push a directory's entries to the disk, so that a rename in it survives a power cut.
-- Best effort: some file systems refuse it, and the file itself has been synced before.
-- @tparam string path
function sys.sync_directory(path)
  local fd = C.lac_sys_open(path, O_RDONLY + O_DIRECTORY)
  if fd < 0 then return end
  C.lac_sys_fsync(fd)
  C.lac_sys_close(fd)
end

--- Read bytes into memory.
-- @param file a Lua file
-- @param pointer host memory of at least `bytes` bytes
-- @tparam number bytes
-- @treturn number bytes read (fewer at the end of the file)
function sys.read_into(file, pointer, bytes)
  return tonumber(C.lac_sys_fread(pointer, 1, bytes, file))
end

--- Write bytes from memory.
-- @param file a Lua file
-- @param pointer host memory
-- @tparam number bytes
-- @treturn boolean true, or nil and a sentence
function sys.write_from(file, pointer, bytes)
  if tonumber(C.lac_sys_fwrite(pointer, 1, bytes, file)) ~= bytes then return nil, errno() end
  return true
end

--- A name for a temporary file next to `path` (same file system, so that rename is atomic).
-- @tparam string path
-- @treturn string
function sys.temporary_beside(path)
  names = names + 1
  return ("%s.%d-%d.tmp"):format(path, C.lac_sys_getpid(), names)
end

--- A name for a temporary file in $TMPDIR or /tmp.
-- @tparam string suffix
-- @treturn string
function sys.temporary(suffix)
  local dir = os.getenv("TMPDIR")
  if not dir or dir == "" then dir = "/tmp" end
  names = names + 1
  return ("%s/lacuna-%d-%d-%d%s"):format(dir, C.lac_sys_getpid(), os.time(), names, suffix or "")
end

--- Quote one word for sh.
-- @tparam string word
-- @treturn string
function sys.quote(word)
  return "'" .. word:gsub("'", "'\\''") .. "'"
end

--- Run a command line of sh and collect what it says.
-- @tparam string command (quote foreign words with sys.quote)
-- @treturn number exit status
-- @treturn string standard output
-- @treturn string standard error
-- @raise there is no place for temporary files, or no shell
function sys.run(command)
  local err_path = sys.temporary(".err")
  local made, why = io.open(err_path, "w") -- else the shell fails and the program seems to be missing
  if not made then error(("cannot make a temporary file (TMPDIR names the place): %s"):format(why), 0) end
  made:close()
  -- popen():close() gives no exit status in LuaJIT, so the shell prints it after the output
  local pipe, reason = io.popen(("{ %s\n} 2>%s; printf '\\n%%d' $?"):format(command, sys.quote(err_path)),
    "r")
  if not pipe then error(("cannot start a shell: %s"):format(reason), 2) end
  local text = pipe:read("*a")
  pipe:close()
  local out, status = text:match("^(.*)\n(%d+)$")
  local err = ""
  local file = io.open(err_path, "rb")
  if file then
    err = file:read("*a")
    file:close()
    os.remove(err_path)
  end
  if not out then return 255, text, err end
  return tonumber(status), out, err
end

--- Is there a program of this name on the PATH?
-- @tparam string name
-- @treturn boolean
function sys.has_program(name)
  return (sys.run("command -v " .. sys.quote(name)) == 0)
end

return sys
