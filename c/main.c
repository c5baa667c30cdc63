/* main.c: the command `lacuna`, a LuaJIT that knows where the library is and can be interrupted.
 *
 * It adds three things to a plain luajit: package.path begins with the Lua tree that belongs to this
 * executable (found from /proc/self/exe, so that a build directory, an installed prefix and a symbolic link
 * into either all work without a wrapper script or an environment variable); Ctrl-C stops compiled loops
 * (interrupt.c); errors are reported with a short traceback that shows the user's frames. Everything else is
 * LuaJIT as it comes: the JIT is on, no global is added, and a script that begins with
 * `local lac = require "lacuna"` runs the same under luajit.
 *
 * What can be Lua is Lua: the session and the traceback are lua/lacuna/repl.lua. What it needs from here it
 * gets as the module "lacuna.host": guard(f, ...), editing(on) and handled(). The traceback is loaded only
 * when an error has happened, so a script that works pays nothing for it.
 *
 * Exit status: 0 success, 1 an error in Lua or output that could not be written (a full disk), 2 wrong usage
 * (also a script that cannot be read), 130 ended by Ctrl-C; what a script gives to os.exit otherwise, but that
 * output which could not be written makes 1 of a 0. After SIGTERM and SIGHUP, which interrupt as Ctrl-C does, the
 * process dies by that signal, whatever the script says. A shell script instead of this program was rejected: it
 * could neither own the signal handler nor be the parent that a debugger or a profiler expects.
 */
#include "interrupt.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <lauxlib.h>
#include <limits.h>
#include <luajit.h>
#include <lualib.h>

enum { EXIT_ERROR = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };

typedef struct lac_command {
    int argc;
    char **argv;
    int script; /* index of the script, argc if there is none */
    int chunks; /* number of -e */
    int interactive, version, devices, variants, help, profile;
    int status;
} lac_command;

static const char usage[] =
    "usage: lacuna [options] [script.lua [arguments]]\n"
    "\n"
    "  lacuna                      a session; reads a script if standard input is not a terminal\n"
    "  lacuna script.lua a b       run a script; `arg` and `...` hold its arguments\n"
    "  lacuna -i script.lua a b    run a script, then start a session with what it left\n"
    "  lacuna -e 'code'            run code; may be repeated, and followed by a script\n"
    "  lacuna profile script.lua   run a script to its end or Ctrl-C, print where time went\n"
    "  lacuna devices              list devices and what runs on them\n"
    "  lacuna variants             try every option with every variant of attention\n"
    "  lacuna --version, -v        versions of Lacuna and LuaJIT\n"
    "  lacuna --help, -h           this text\n"
    "\n"
    "A script named - is standard input; -- ends the options.\n"
    "Ctrl-C stops Lua code and engine operators; if code does not react, the third one ends the process.\n"
    "SIGTERM and SIGHUP do that too, so that training saves its checkpoint, and then end the process.\n"
    "\n"
    "  LACUNA_LUA      use the Lua tree in this directory instead of the one beside the executable\n"
    "  LACUNA_TRACE=1  show the library's own frames in tracebacks\n"
    "  LACUNA_MEMORY   trace: reports of memory name script lines; exit: and report what is alive at the end\n"
    "  LACUNA_DEVICE   cpu or cuda: where what names no device is made\n"
    "  LACUNA_CPU      baseline, avx2, avx512f, avx512 or amx instead of the best that it has\n"
    "  LACUNA_CUDA_LAUNCHER=0  call the driver in the script's own thread, not in one beside it\n"
    "  LACUNA_CUDA_SYNC=1  wait for every operator on cuda, so that an error names the one that failed\n"
    "  LACUNA_HISTORY  file of the session's history (default ~/.local/state/lacuna/history)\n";

/* ---- the command line --------------------------------------------------------------------------------- */

static size_t edit_distance(const char *a, const char *b)
{
    size_t row[64], n = strlen(b);
    if (n >= sizeof row / sizeof *row) return SIZE_MAX;
    for (size_t j = 0; j <= n; j++) row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 0; j < n; j++) {
            size_t best = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            if (row[j] + 1 < best) best = row[j] + 1;
            if (diagonal + 1 < best) best = diagonal + 1;
            row[j + 1] = best;
        }
    }
    return row[n];
}

/* The nearest of the words that this program knows, or NULL if none is near. */
static const char *nearest(const char *word)
{
    static const char *const known[] = {"--help", "--version", "devices", "variants", "profile", "-e", "-i", NULL};
    const char *best = NULL;
    size_t least = strlen(word) <= 3 ? 2 : 4; /* distances below this are near */
    for (int i = 0; known[i]; i++) {
        size_t distance = (known[i][0] == '-') == (word[0] == '-') ? edit_distance(word, known[i]) : SIZE_MAX;
        if (distance < least) {
            least = distance;
            best = known[i];
        }
    }
    return best;
}

/* `word` is what was not understood, NULL if the message says all. */
static int usage_error(const char *message, const char *word)
{
    const char *near = word ? nearest(word) : NULL;
    fprintf(stderr, "lacuna: %s", message);
    if (word) fprintf(stderr, " '%s'", word);
    if (near) fprintf(stderr, "; did you mean '%s'?", near);
    fprintf(stderr, "\nTry 'lacuna --help'.\n");
    return EXIT_USAGE;
}

static int parse(lac_command *c)
{
    int i = 1;
    for (; i < c->argc && c->argv[i][0] == '-' && c->argv[i][1]; i++) {
        const char *word = c->argv[i];
        if (strcmp(word, "--") == 0) {
            i++;
            break;
        } else if (strcmp(word, "-i") == 0) {
            c->interactive = 1;
        } else if (strcmp(word, "--version") == 0 || strcmp(word, "-v") == 0) {
            c->version = 1;
        } else if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
            c->help = 1;
        } else if (strcmp(word, "-e") != 0) {
            return usage_error("unknown option", word);
        } else if (++i == c->argc) {
            return usage_error("option -e needs code to run", NULL);
        } else {
            c->chunks++;
        }
    }
    c->profile = i < c->argc && strcmp(c->argv[i], "profile") == 0;
    if (c->profile && ++i == c->argc) return usage_error("'profile' needs a script to run", NULL);
    c->devices = i < c->argc && !c->profile && strcmp(c->argv[i], "devices") == 0;
    c->variants = i < c->argc && !c->profile && strcmp(c->argv[i], "variants") == 0;
    if (c->devices && i + 1 < c->argc) return usage_error("'devices' takes no argument, got", c->argv[i + 1]);
    if (c->variants && i + 1 < c->argc) return usage_error("'variants' takes no argument, got", c->argv[i + 1]);
    c->script = i;
    return 0;
}

/* ---- the state ---------------------------------------------------------------------------------------- */

/* The Lua tree: $LACUNA_LUA, or lua/ above build/bin, or share/lacuna/lua beside an installed bin. */
static const char *find_tree(lua_State *L)
{
    static const char *const places[] = {"/../share/lacuna/lua", "/../../lua"};
    char exe[PATH_MAX], real[PATH_MAX];
    const char *named = getenv("LACUNA_LUA");
    if (named && *named) {
        if (access(lua_pushfstring(L, "%s/lacuna/repl.lua", named), R_OK) != 0)
            luaL_error(L, "LACUNA_LUA is '%s', which does not hold lacuna/repl.lua", named);
        return named;
    }
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    if (n < 0) luaL_error(L, "cannot find the Lua library: /proc/self/exe is not readable; set LACUNA_LUA");
    exe[n] = '\0';
    *strrchr(exe, '/') = '\0';
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        const char *dir = lua_pushfstring(L, "%s%s", exe, places[i]);
        if (access(lua_pushfstring(L, "%s/lacuna/repl.lua", dir), R_OK) == 0 && realpath(dir, real))
            return lua_pushfstring(L, "%s", real);
    }
    luaL_error(L, "no Lua library in %s%s nor in %s%s; set LACUNA_LUA", exe, places[0], exe, places[1]);
    return NULL;
}

static void set_path(lua_State *L)
{
    int top = lua_gettop(L);
    const char *dir = find_tree(L);
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "path");
    lua_pushfstring(L, "%s/?.lua;%s/?/init.lua;%s", dir, dir, lua_tostring(L, -1));
    lua_setfield(L, -3, "path");
    lua_settop(L, top);
}

/* Message handler of every protected call: the text of the error, the user's part of the traceback. Upvalue 1
 * is `require`. The interrupt must be settled first: until then each line of Lua would raise it again. */
static int on_error(lua_State *L)
{
    lac_interrupt_caught();
    lua_settop(L, 1);
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_pushliteral(L, "lacuna.repl");
    if (lua_pcall(L, 1, 1, 0) == 0) {
        lua_getfield(L, -1, "traceback");
        lua_pushvalue(L, 1);
        if (lua_pcall(L, 1, 1, 0) == 0) return 1;
    }
    const char *text = lua_tostring(L, 1); /* no stack or memory left for Lua, or a broken tree */
    luaL_traceback(L, L, text ? text : "(error object without text)", 1);
    return 1;
}

static void push_handler(lua_State *L)
{
    lua_getglobal(L, "require");
    lua_pushcclosure(L, on_error, 1);
}

/* guard(f, ...): true and what f returns; or false, the report of the error and whether it was Ctrl-C. */
static int host_guard(lua_State *L)
{
    luaL_checkany(L, 1);
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    int mode = lac_interrupt_begin();
    int status = lua_pcall(L, lua_gettop(L) - 2, LUA_MULTRET, 1);
    int interrupted = lac_interrupt_end(L, mode);
    lua_pushboolean(L, status == 0);
    lua_replace(L, 1);
    if (status == 0) return lua_gettop(L);
    lua_pushboolean(L, interrupted);
    return 3;
}

static int host_editing(lua_State *L)
{
    lua_pushinteger(L, lac_interrupt_editing(lua_toboolean(L, 1)));
    return 1;
}

static int host_handled(lua_State *L)
{
    lac_interrupt_handled(L);
    return 0;
}

static void open_host(lua_State *L)
{
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "loaded");
    lua_newtable(L);
    push_handler(L);
    lua_pushcclosure(L, host_guard, 1);
    lua_setfield(L, -2, "guard");
    lua_pushcfunction(L, host_editing);
    lua_setfield(L, -2, "editing");
    lua_pushcfunction(L, host_handled);
    lua_setfield(L, -2, "handled");
    lua_setfield(L, -2, "lacuna.host");
    lua_pop(L, 2);
}

/* The table `arg` as luajit makes it: the script at 0, then its arguments, what comes before it negative. */
static void set_arg(lua_State *L, const lac_command *c)
{
    lua_createtable(L, c->argc - c->script, c->script);
    for (int i = 0; i < c->argc; i++) {
        lua_pushstring(L, c->argv[i]);
        lua_rawseti(L, -2, i - c->script);
    }
    lua_setglobal(L, "arg");
}

/* ---- running ------------------------------------------------------------------------------------------ */

/* Report the error on top of the stack. */
static int report(lua_State *L, int interrupted)
{
    const char *text = lua_tostring(L, -1);
    fflush(stdout);
    fprintf(stderr, "lacuna: %s\n", text ? text : "(error object without text)");
    lua_pop(L, 1);
    return interrupted ? EXIT_INTERRUPTED : EXIT_ERROR;
}

/* Call the function below n arguments as user code. */
static int call(lua_State *L, int n)
{
    int base = lua_gettop(L) - n;
    push_handler(L);
    lua_insert(L, base);
    int mode = lac_interrupt_begin();
    int status = lua_pcall(L, n, 0, base);
    int interrupted = lac_interrupt_end(L, mode);
    lua_remove(L, base);
    return status == 0 ? 0 : report(L, interrupted);
}

static int run_chunk(lua_State *L, const char *code)
{
    if (luaL_loadbuffer(L, code, strlen(code), "=(command line)") != 0) return report(L, 0);
    return call(L, 0);
}

static const char profile_script[] = "require 'lacuna.repl'.profile(...)\n";

static int run_script(lua_State *L, const lac_command *c, const char *name)
{
    int n = c->script < c->argc ? c->argc - c->script - 1 : 0;
    int status = luaL_loadfile(L, name);
    if (status == LUA_ERRFILE) {
        const char *near = name ? nearest(name) : NULL;
        lua_pushfstring(L, near ? "%s; did you mean 'lacuna %s'?" : "%s", lua_tostring(L, -1), near);
        return usage_error(lua_tostring(L, -1), NULL);
    }
    if (status != 0) return report(L, 0);
    luaL_checkstack(L, n, "too many arguments");
    if (c->profile) { /* the script becomes the first argument of what runs it */
        if (luaL_loadbuffer(L, profile_script, strlen(profile_script), "=lacuna") != 0) return report(L, 0);
        lua_insert(L, -2);
        n++;
    }
    for (int i = c->script + 1; i < c->argc; i++) lua_pushstring(L, c->argv[i]);
    return call(L, n);
}

/* What must not be split over several calls of Lua's API is written in Lua. */
static int run_own(lua_State *L, const char *code)
{
    if (luaL_loadbuffer(L, code, strlen(code), "=lacuna") != 0) return report(L, 0);
    return call(L, 0);
}

static int run_session(lua_State *L)
{
    push_handler(L);
    lua_getglobal(L, "require");
    lua_pushliteral(L, "lacuna.repl");
    if (lua_pcall(L, 1, 1, -3) != 0) return report(L, 0);
    lua_getfield(L, -1, "run");
    if (lua_pcall(L, 0, 1, -3) != 0) return report(L, 0);
    return (int)lua_tointeger(L, -1);
}

static int run(lua_State *L, const lac_command *c)
{
    int status = 0;
    if (c->version)
        return run_own(L, "print(('lacuna %s (%s, %s %s)'):format(require 'lacuna'.version(),"
                          "jit.version, jit.arch, jit.os))");
    if (c->devices) return run_own(L, "print((require 'lacuna'.devices()))");
    if (c->variants) return run_own(L, "print(require 'lacuna'.attention.matrix())");
    for (int i = 1; i < c->script && status == 0; i++)
        if (strcmp(c->argv[i], "-e") == 0) status = run_chunk(L, c->argv[++i]);
    if (status != 0) return status;
    if (c->script < c->argc) {
        const char *name = c->argv[c->script];
        status = run_script(L, c, strcmp(name, "-") == 0 ? NULL : name);
    } else if (c->chunks == 0 && !c->interactive && !isatty(STDIN_FILENO)) {
        return run_script(L, c, NULL);
    }
    int session = c->interactive || (c->script == c->argc && c->chunks == 0);
    if (!session || status == EXIT_USAGE) return status;
    return run_session(L); /* also after an error: -i is how one looks at what is left */
}

static int protected_main(lua_State *L)
{
    lac_command *c = lua_touserdata(L, 1);
    lua_settop(L, 0);
    lua_gc(L, LUA_GCSTOP, 0);
    luaL_openlibs(L);
    lua_gc(L, LUA_GCRESTART, -1);
    set_path(L);
    lac_interrupt_open(L);
    open_host(L);
    set_arg(L, c);
    c->status = run(L, c);
    if (getenv("LACUNA_MEMORY")) run_own(L, "local m = package.loaded['lacuna.memory'] if m then m.at_exit() end");
    return 0;
}

/* However the process exits (main, os.exit): results that did not reach their file are an error, although no
 * print has seen one. The buffer is written only here if the output is short. A status that tells of an error
 * or of Ctrl-C already is kept; a 0 cannot be replaced but by _exit, before which the other files that are
 * open get their data, as exit would have given them. */
static void check_output(int status, void *unused)
{
    (void)unused;
    int failed = ferror(stdout);
    errno = 0;
    if (fflush(stdout) == 0 && !failed) {
        lac_interrupt_exit();
        return;
    }
    fprintf(stderr, "lacuna: cannot write all of standard output%s%s\n", errno ? ": " : "",
            errno ? strerror(errno) : "");
    lac_interrupt_exit();
    if (status != 0) return;
    fflush(NULL);
    _exit(EXIT_ERROR);
}

int main(int argc, char **argv)
{
    on_exit(check_output, NULL);
    lac_command c = {.argc = argc, .argv = argv};
    int status = parse(&c);
    if (status != 0) return status;
    if (c.help) {
        fputs(usage, stdout);
        return 0;
    }
    lua_State *L = luaL_newstate();
    if (!L) {
        fprintf(stderr, "lacuna: not enough memory for a Lua state\n");
        return EXIT_ERROR;
    }
    if (lua_cpcall(L, protected_main, &c) != 0) c.status = report(L, 0);
    lua_close(L);
    return c.status;
}
