--- The interactive session: read an entry, run it, show what it returns.
--
-- Two halves. The session (repl.new) is plain logic without a terminal: lines go in, text comes out through
-- `write`, so that specs drive it like a user would. The terminal (repl.run) is libedit through the FFI for
-- editing, history and Tab; chosen over readline for its licence, over linenoise for being in every
-- distribution. Rejected: rewriting top-level locals into globals, which changes what pasted code means (a
-- hint says why the name is gone), and a pretty-printer that calls user code beyond __tostring.
--
-- Whether an entry is complete is asked of the parser: an error "near '<eof>'" means that more can help. Each
-- entry is tried as an expression first, so `x`, `f()` and `x = 1` all do what one expects.
--
-- Completion looks at tables with rawget and next only and follows __index where it is a table; where it is a
-- function, it takes the names in the metatable itself (which is how classes here are built) and the keys of
-- the metatable's field __names. So it can neither run user code nor raise, also not on strict tables, which
-- matters because it runs inside a C callback.
--
-- Under the command `lacuna` the module "lacuna.host" stops running code at Ctrl-C (guard) and tells a press
-- at the prompt from the end of input (editing). Under plain luajit there is none: Ctrl-C ends luajit.

local repl = {}

local HISTORY_ENTRIES = 1000
local SHOW = { depth = 3, items = 40, width = 78 }
local TRACE_FRAMES = 8
local KEYWORDS = {
  "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "goto", "if", "in", "local",
  "nil", "not", "or", "repeat", "return", "then", "true", "until", "while",
}
for _, word in ipairs(KEYWORDS) do KEYWORDS[word] = true end

local own_prefix = debug.getinfo(1, "S").source:gsub("repl%.lua$", "")

-- ---- text of values ------------------------------------------------------------------------------

-- the metatable itself, also where a __metatable field hides it
local function meta_field(value, name)
  local mt = debug.getmetatable(value)
  if type(mt) ~= "table" then return nil end
  return rawget(mt, name)
end

local function safe_tostring(value)
  local ok, text = pcall(tostring, value)
  if ok then return text end
  return ("<%s, its __tostring failed: %s>"):format(type(value), tostring(text))
end

local function is_identifier(key)
  return type(key) == "string" and key:match("^[%a_][%w_]*$") ~= nil and not KEYWORDS[key]
end

local KIND_ORDER = { number = 1, string = 2, boolean = 3 }

local function key_less(a, b)
  local ka, kb = KIND_ORDER[type(a)] or 4, KIND_ORDER[type(b)] or 4
  if ka ~= kb then return ka < kb end
  if ka <= 2 then return a < b end
  return safe_tostring(a) < safe_tostring(b)
end

-- keys that are not in the array part 1 .. n, sorted; and n
local function split_keys(t)
  local n = 0
  while rawget(t, n + 1) ~= nil do n = n + 1 end
  local keys = {}
  for key in next, t do
    if not (type(key) == "number" and key >= 1 and key <= n and key % 1 == 0) then keys[#keys + 1] = key end
  end
  table.sort(keys, key_less)
  return keys, n
end

local show_value

-- `{` and `}` round the parts: on one line where that fits behind `lead` characters, else one part per line
local function lay_out(parts, indent, lead, options)
  local line = "{ " .. table.concat(parts, ", ") .. " }"
  if #line + indent + lead <= options.width and not line:find("\n", 1, true) then return line end
  local pad = (" "):rep(indent + 2)
  return "{\n" .. pad .. table.concat(parts, ",\n" .. pad) .. "\n" .. (" "):rep(indent) .. "}"
end

local function show_table(t, options, depth, indent, open, lead)
  if open[t] then return "<cycle>" end
  if next(t) == nil then return "{}" end
  if depth >= options.depth then return "{...}" end
  open[t] = true
  local keys, n = split_keys(t)
  local parts, total = {}, n + #keys
  for i = 1, math.min(total, options.items) do
    local key, name = i, ""
    if i > n then
      key = keys[i - n]
      name = is_identifier(key) and key
        or "[" .. (type(key) == "table" and safe_tostring(key)
                   or show_value(key, options, depth + 1, indent + 2, open, 1)) .. "]"
      name = name .. " = "
    end
    parts[i] = name .. show_value(rawget(t, key), options, depth + 1, indent + 2, open, #name + 1)
  end
  if total > options.items then parts[#parts + 1] = ("... %d more"):format(total - options.items) end
  open[t] = nil
  return lay_out(parts, indent, lead, options)
end

function show_value(value, options, depth, indent, open, lead)
  if type(value) == "string" then
    return depth == 0 and value or ("%q"):format(value):gsub("\\\n", "\\n")
  end
  if type(value) ~= "table" or meta_field(value, "__tostring") ~= nil then
    local text = safe_tostring(value)
    local first, rest = text:match("^([^\n]*)\n(.*)$")
    return (depth > 0 and rest) and first .. " ..." or text
  end
  return show_table(value, options, depth, indent, open, lead)
end

--- Text of a value as the session prints it. Tables are shown with sorted keys, to a depth, number of entries
-- and line width; a table with __tostring (a tensor, a module) says itself what it is.
-- @param value anything
-- @tparam[opt] table options depth, items, width
-- @treturn string
function repl.show(value, options)
  return (show_value(value, setmetatable(options or {}, { __index = SHOW }), 0, 0, {}, 0))
end

-- ---- errors --------------------------------------------------------------------------------------

-- What Lua itself says where no metamethod is asked, with what to write instead: words for people who come
-- from a language where a tensor beside a number is compared, or formatted. Lua does not say which table it
-- was, so the hint begins with what it is about.
local HINTS = {
  { "attempt to index global 'lac' %(a nil value%)$", 'a script begins with local lac = require "lacuna"' },
  { "attempt to compare number with table$", "of a tensor: x:gt(y), x:ge(y), x:lt(y), x:le(y)" },
  { "attempt to compare table with number$", "of a tensor: x:gt(y), x:ge(y), x:lt(y), x:le(y)" },
  { "bad argument #%d+ to '[^']*' %(number expected, got table%)$",
    "of a tensor: x:item() is the number in it" },
}

local function hint_of(message)
  for _, hint in ipairs(HINTS) do
    if message:find(hint[1]) then return ("; %s"):format(hint[2]) end
  end
  return ""
end

local function error_text(message)
  if type(message) == "string" then return message .. hint_of(message) end
  if meta_field(message, "__tostring") ~= nil then return safe_tostring(message) end
  return ("(the error is a %s: %s)"):format(type(message), repl.show(message, { depth = 1 }))
end

local function frame_text(info)
  local what = "function <" .. info.short_src .. ":" .. info.linedefined .. ">"
  if info.what == "main" then
    what = "main chunk"
  elseif info.name then
    what = "function '" .. info.name .. "'"
  end
  return ("  %s:%d: in %s"):format(info.short_src, info.currentline, what)
end

--- Message handler: the error's text, and the user's part of the call stack. Frames of C functions and of
-- this library are left out; LACUNA_TRACE=1 in the environment shows them.
-- @param message the error object
-- @treturn string
function repl.traceback(message)
  local text = error_text(message)
  if os.getenv("LACUNA_TRACE") == "1" then return debug.traceback(text, 2) end
  local lines, level = { text }, 1
  while true do
    local info = debug.getinfo(level, "Slnf")
    if not info or info.func == repl.run_entry then break end -- below are the session and who started it
    local own = info.what == "C" or info.source:sub(1, #own_prefix) == own_prefix or info.source == "=lacuna"
    if not own and #lines > TRACE_FRAMES then
      lines[#lines + 1] = "  ..."
      break
    end
    if not own then lines[#lines + 1] = frame_text(info) end
    level = level + 1
  end
  return table.concat(lines, "\n")
end

-- ---- entries -------------------------------------------------------------------------------------

-- a quoted string cannot go on in the next line, but a bracketed one can
local function wants_more(message)
  return message:find("near '<eof>'$") ~= nil and not message:find("unfinished string", 1, true)
end

--- Compile an entry, as an expression if it is one. Call the chunk with a function that returns its
-- arguments: `return f()` alone is a tail call, and an error in f would have lost where it was called.
-- @tparam string code
-- @tparam string name of the chunk, as for loadstring
-- @treturn function the chunk; or nil, the message, and whether more lines may complete the entry
function repl.compile(code, name)
  local chunk, as_value = loadstring("return " .. code, name)
  if chunk then return loadstring("return (...)(" .. code .. "\n)", name) or chunk end
  local as_code
  chunk, as_code = loadstring(code, name)
  if chunk then return chunk end
  -- an expression that goes wrong late says more than the statement that never began
  local began = as_code:find("unexpected symbol near") or as_code:find("'=' expected near")
  local message = began and not as_value:find("'<eof>' expected", 1, true) and as_value or as_code
  return nil, message, wants_more(as_code) or wants_more(as_value)
end

-- ---- completion ----------------------------------------------------------------------------------

-- the tables in which the fields of a value are looked up, in order
local function places(value)
  local list, seen = {}, {}
  local function visit(t)
    if type(t) ~= "table" or seen[t] then return end
    seen[t] = true
    list[#list + 1] = t
    visit(rawget(t, "_settled")) -- fields that init has decided: schema.settle
    local mt = debug.getmetatable(t)
    if type(mt) ~= "table" then return end
    visit(type(rawget(mt, "__index")) == "function" and mt or rawget(mt, "__index"))
    visit(rawget(mt, "__names"))
  end
  if type(value) == "table" then visit(value) else visit(meta_field(value, "__index")) end
  return list
end

local function lookup(value, key)
  for _, t in ipairs(places(value)) do
    local found = rawget(t, key)
    if found ~= nil then return found end
  end
  return nil
end

local function collect(list, seen, base, part, key, value, methods)
  if not is_identifier(key) or key:sub(1, #part) ~= part or seen[key] then return end
  if key:sub(1, 1) == "_" and part:sub(1, 1) ~= "_" then return end
  if methods and type(value) ~= "function" then return end
  seen[key] = true
  list[#list + 1] = base .. key
end

--- Names that can continue a word such as `lac.te` or `t:si`. Looks at tables only, runs no code.
-- @tparam table env where globals live
-- @tparam string word
-- @treturn table sorted list of whole words
function repl.complete(env, word)
  local base, separator, part = word:match("^([%w_.]*)([.:])([%w_]*)$")
  local value = env
  if not base then
    base, separator, part = "", "", word:match("^[%w_]*$")
    if not part then return {} end
  end
  for name in base:gmatch("[^.]+") do
    value = lookup(value, name)
    if value == nil then return {} end
  end
  if separator ~= "" and base == "" then return {} end
  local list, seen, stem = {}, {}, base .. separator
  for _, t in ipairs(places(value)) do
    for key, field in next, t do collect(list, seen, stem, part, key, field, separator == ":") end
  end
  if separator == "" and part ~= "" then
    for _, keyword in ipairs(KEYWORDS) do
      if keyword:sub(1, #part) == part and not seen[keyword] then list[#list + 1] = keyword end
    end
  end
  table.sort(list)
  return list
end

-- ---- the session ---------------------------------------------------------------------------------

local HELP = [[
  1 + 1              an expression shows its values; `_` is the last one
  for i = 1, 3 do    an unfinished entry goes on in the next line (Ctrl-C drops it)
  x = lac.randn{2,3} a global stays; a `local` lives only inside its entry
  lac.at<Tab>        names of globals, fields and methods
  help(lac.attend)   what it does and takes; so help "softmax", help(x)
  Up, Ctrl-R         earlier entries, also those of other days
  Ctrl-C             stops what runs; at the prompt it clears the line
  Ctrl-D, os.exit()  leave]]

local function help_about(value)
  local lac = package.loaded["lacuna"]
  return lac and lac.help(value) or repl.show(value)
end

local Session = {}
Session.__index = Session

local function plain_guard(f, ...) return xpcall(f, repl.traceback, ...) end

--- A session without a terminal.
-- @tparam[opt] table options env (where entries run, default _G), write (called with text, default standard
-- output), guard (called as guard(f, ...): returns true and f's results, or false and the error's report)
-- @treturn table with feed(line), reset(), prompt()
function repl.new(options)
  options = options or {}
  local session = setmetatable({
    env = options.env or _G,
    write = options.write or function(text) io.write(text) end,
    guard = options.guard or plain_guard,
    entries = 0,
  }, Session)
  rawset(session.env, "help", setmetatable({}, {
    __call = function(_, ...)
      if select("#", ...) == 0 then return session.write(HELP .. "\n") end
      session.write(help_about((...)) .. "\n")
    end,
    __tostring = function() return HELP end,
  }))
  local function leave() return "Ctrl-D leaves" end
  local way_out = setmetatable({}, { __tostring = leave,
                                     __call = function() session.write(leave() .. "\n") end })
  rawset(session.env, "quit", way_out)
  rawset(session.env, "exit", way_out)
  return session
end

--- Drop an unfinished entry.
function Session:reset() self.unfinished = nil end

--- The prompt for the next line.
function Session:prompt() return self.unfinished and ">> " or "> " end

local function pass(...) return ... end

--- Run an entry and show what it returns. Inside the guard, because printing may call __tostring, which is
-- user code as well; tracebacks end at this function.
-- @tparam table self the session
-- @tparam function chunk from repl.compile
function repl.run_entry(self, chunk)
  local function show(...)
    local n = select("#", ...)
    if n > 0 and (...) ~= nil then rawset(self.env, "_", (...)) end
    for i = 1, n do
      local value = select(i, ...)
      if value ~= nil then self.write(repl.show(value) .. "\n") end
    end
  end
  show(chunk(pass))
end

--- Take one line of input (which may hold several, when an old entry is recalled).
-- @tparam string line
-- @treturn string "more" if the entry goes on, else "done" (run, or reported as wrong)
-- @treturn string the whole entry, when done
function Session:feed(line)
  local entry = self.unfinished and self.unfinished .. "\n" .. line or line
  self.unfinished = nil
  if entry:find("^%s*$") then return "done", entry end
  local name = ("=entry %d"):format(self.entries + 1)
  local chunk, message, more = repl.compile(entry:gsub("^%s*=", "return ", 1), name)
  if more then
    self.unfinished = entry
    return "more"
  end
  self.entries = self.entries + 1
  if not chunk then
    self.write(message .. "\n")
    return "done", entry
  end
  setfenv(chunk, self.env)
  local ok, report = self.guard(repl.run_entry, self, chunk)
  if not ok then self.write(tostring(report) .. "\n") end
  if not self.hinted and entry:find("^%s*local%s") then
    self.hinted = true
    self.write("(a local ends with its entry; without `local` the name stays)\n")
  end
  return "done", entry
end

-- ---- history -------------------------------------------------------------------------------------

--- Path of the history file: LACUNA_HISTORY, else in the XDG state directory.
-- @tparam[opt] function getenv default os.getenv
-- @treturn string|nil nil if the environment names no place at all
function repl.history_path(getenv)
  getenv = getenv or os.getenv
  local function set(name)
    local value = getenv(name)
    return value ~= "" and value or nil
  end
  if set("LACUNA_HISTORY") then return set("LACUNA_HISTORY") end
  local state = set("XDG_STATE_HOME") or (set("HOME") and set("HOME") .. "/.local/state")
  return state and state .. "/lacuna/history"
end

--- An entry as a line of the history file, in vis(3) encoding: one line, also if the entry has several.
-- @tparam string entry
-- @treturn string
function repl.history_line(entry)
  return (entry:gsub("[%z\1-\32\\\127-\255]", function(c) return ("\\%03o"):format(c:byte()) end)) .. "\n"
end

-- ---- the terminal --------------------------------------------------------------------------------

local DECLARATIONS = [[
  int isatty(int fd);
  int getsid(int pid);
  int getpid(void);
  char *setlocale(int category, const char *locale);
  int mkdir(const char *path, unsigned mode);
  void *malloc(size_t bytes);
  void free(void *p);
  char *readline(const char *prompt);
  int rl_initialize(void);
  void using_history(void);
  void stifle_history(int entries);
  int add_history(const char *line);
  int read_history(const char *path);
  int write_history(const char *path);
  int chmod(const char *path, unsigned mode);
  extern const char *rl_readline_name;
  extern const char *rl_completer_word_break_characters;
  extern int rl_completion_append_character;
  extern int rl_attempted_completion_over;
  extern char **(*rl_attempted_completion_function)(const char *, int, int);
]]
local CALLBACK = "char **(*)(const char *, int, int)"
local WORD_BREAKS = " \t\n\"'`><=;+-*/%^~#{}()[],!&|"
local LC_CTYPE = 0
local LIBEDIT = "libedit.so.2"
local EINTR = 4
local HISTORY_COOKIE = "_HiStOrY_V2_\n" -- first line of libedit's history files

-- A NULL-terminated array of malloc'ed strings for libedit to free: first what all have in common, then each.
local function match_array(ffi, words)
  if #words == 0 then return nil end
  local common = words[1]
  for i = 2, #words do
    while words[i]:sub(1, #common) ~= common do common = common:sub(1, -2) end
  end
  local function copy(text)
    local p = ffi.C.malloc(#text + 1)
    if p == nil then error("out of memory") end
    ffi.copy(p, text)
    return ffi.cast("char *", p)
  end
  local array = ffi.cast("char **", ffi.C.malloc(ffi.sizeof("char *") * (#words + 2)))
  if array == nil then error("out of memory") end
  array[0] = copy(common)
  for i, word in ipairs(words) do array[i] = copy(word) end
  array[#words + 1] = nil
  return array
end

-- Make the history file and its directories, private to the user. None of it need succeed: a session without
-- a place to write simply has no history on disk.
local function make_history(ffi, path)
  for at in path:gmatch("()/") do
    if at > 1 then ffi.C.mkdir(path:sub(1, at - 1), 448) end -- 0700
  end
  local file = io.open(path, "w")
  if not file then return end
  ffi.C.chmod(path, 384) -- 0600
  file:write(HISTORY_COOKIE)
  file:close()
end

local function count_lines(file)
  local lines = 0
  for _ in file:lines() do lines = lines + 1 end
  return lines
end

-- Read the history; returns the path if entries may be added to it. A file that is not one of libedit's is
-- left alone, and so is what cannot be read, such as a directory. One that has grown to twice what is kept
-- is written anew.
local function load_history(ffi, edit, path)
  local file = io.open(path)
  if not file then
    make_history(ffi, path)
    return path
  end
  local readable, lines = pcall(count_lines, file)
  file:close()
  if not readable or edit.read_history(path) ~= 0 then return nil end
  if lines > 2 * HISTORY_ENTRIES then edit.write_history(path) end
  return path
end

-- What the environment says about letters. In the locale "C", which is what a container has and what is left
-- where the one that is named is not installed, libedit drops every byte of a letter beyond ASCII.
local function set_locale(ffi)
  local name = ffi.C.setlocale(LC_CTYPE, "")
  name = name ~= nil and ffi.string(name) or "C"
  if name == "C" or name == "POSIX" then ffi.C.setlocale(LC_CTYPE, "C.UTF-8") end
end

local Editor = {}
Editor.__index = Editor

-- libedit, set up for one session
local function open_editor(env, host)
  local ffi = require "ffi"
  local ok, edit = pcall(ffi.load, LIBEDIT)
  if not ok then
    error(("the session needs the line editor %s (Debian: package libedit2): %s"):format(LIBEDIT, edit), 0)
  end
  local self = setmetatable({ ffi = ffi, edit = edit, host = host }, Editor)
  set_locale(ffi)
  edit.rl_readline_name = "lacuna"
  edit.rl_initialize()
  edit.rl_completer_word_break_characters = WORD_BREAKS
  edit.rl_completion_append_character = 0
  -- the one callback from C into Lua; nothing may be raised through libedit's frames
  self.callback = ffi.cast(CALLBACK, function(text)
    edit.rl_attempted_completion_over = 1
    local fine, array = pcall(function() return match_array(ffi, repl.complete(env, ffi.string(text))) end)
    return fine and array or nil
  end)
  edit.rl_attempted_completion_function = self.callback
  self.leads = ffi.C.getsid(0) == ffi.C.getpid()
  edit.using_history()
  edit.stifle_history(HISTORY_ENTRIES)
  local path = repl.history_path()
  self.history = path and load_history(ffi, edit, path)
  return self
end

-- A line, or nil at the end of input, or nil, true after Ctrl-C. A Ctrl-Z counts as one where no shell could
-- continue us (in a container the first process leads its own session, and the system does not stop it): the
-- read fails as at the end of input, with another errno. Elsewhere errno is not asked, because a window that
-- was resized before Ctrl-D leaves the same one. Not compiled: C calls back into Lua.
function Editor:read(prompt)
  io.flush()
  if self.host then self.host.editing(true) end
  self.ffi.errno(0)
  local p = self.edit.readline(prompt)
  local interrupted = self.leads and self.ffi.errno() == EINTR
  local presses = self.host and self.host.editing(false) or 0
  if p == nil then return nil, interrupted or presses > 0 end
  local line = self.ffi.string(p)
  self.ffi.C.free(p)
  return line
end
jit.off(Editor.read)

-- Remember an entry, in the file as well: a session that is killed loses nothing, and sessions side by side
-- keep each other's entries. The line is written here because libedit's append_history repeats earlier ones.
function Editor:remember(entry)
  if entry:find("^%s*$") or entry == self.last then return end
  self.last = entry
  self.edit.add_history(entry)
  local file = self.history and io.open(self.history, "a")
  if not file then return end
  file:write(repl.history_line(entry))
  file:close()
end

local function banner()
  local lac = require "lacuna"
  local devices = lac.devices()
  local cpu, cuda = devices:match("cpu: ([^\n]*)"), devices:match("cuda: ([^\n]*)")
  local text = "Lacuna %s, %s, %d threads, cpu: %s, cuda: %s\n(`help` shows a short page, Ctrl-D leaves)\n"
  return text:format(lac.version(), jit.version, lac.threads(), cpu, cuda)
end

--- What `lacuna profile` does: run a script, print where its time went, and end as the script did. The table
-- is there too when that was an error, Ctrl-C (a training loop has no other end) or os.exit. That one does
-- not unwind the script, here as elsewhere: no pcall on the way sees it, the recording ends where it is
-- called.
-- @tparam function script
-- @param ... its arguments
function repl.profile(script, ...)
  local host = package.loaded["lacuna.host"]
  local guard = host and host.guard or plain_guard
  local arguments, count, exit, early = { ... }, select("#", ...), os.exit, {}
  rawset(os, "exit", function(code, close)
    if code ~= nil and type(code) ~= "boolean" and not tonumber(code) then exit(code) end -- its own complaint
    local finished, why = pcall(early.finish)
    if not finished then
      io.stderr:write("lacuna: ", tostring(why), "\n")
      exit(1, close)
    end
    exit(code, close)
  end)
  local ok, report, interrupted
  require("lacuna").profile(function()
    ok, report, interrupted = guard(script, unpack(arguments, 1, count))
    rawset(os, "exit", exit)
  end, { trace = true }, early)
  if ok then return end
  io.stdout:flush()
  io.stderr:write("lacuna: ", report, "\n")
  exit(interrupted and 130 or 1, true)
end

local function converse(session, editor)
  while true do
    local line, cleared = editor:read(session:prompt())
    if line then
      local _, entry = session:feed(line)
      if entry then editor:remember(entry) end
    elseif cleared then
      session:reset()
      io.write("^C\n")
    else
      io.write("\n")
      return 0
    end
  end
end

--- The session on the terminal, with `lac` preset. Standard input that is no terminal is run as a script.
-- @treturn number exit status
function repl.run()
  local ffi = require "ffi"
  ffi.cdef(DECLARATIONS)
  local host = package.loaded["lacuna.host"]
  local guard = host and host.guard or plain_guard
  if ffi.C.isatty(0) == 0 then
    local chunk, message = loadfile()
    local ok, report, interrupted = false, message, false
    if chunk then ok, report, interrupted = guard(chunk) end
    if ok then return 0 end
    io.stderr:write("lacuna: ", report, "\n")
    return interrupted and 130 or 1
  end
  rawset(_G, "lac", require "lacuna")
  local session = repl.new { guard = guard }
  local ok, text = guard(banner)
  if not ok then error(text, 0) end
  io.write(text)
  return converse(session, open_editor(session.env, host))
end

return repl
