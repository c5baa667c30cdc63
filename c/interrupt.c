/* interrupt.c: how Ctrl-C stops Lua code, compiled or not.
 *
 * The usual way, lua_sethook from the signal handler, stops only the interpreter: compiled traces never look
 * at hooks, so `while true do n = n + 1 end` runs for ever. LuaJIT can compile hook checks into every trace,
 * but not in a distribution's build, and every loop would pay. Instead the handler edits the machine code.
 *
 * A trace leaves for the interpreter where a guard fails: a conditional jump to a small exit stub, from where
 * the interpreter's state is rebuilt from that guard's snapshot. Taking the exit of a guard that holds is
 * legal: the interpreter repeats what the trace was about to do. So the handler makes each of these jumps
 * unconditional, the trace leaves at the next guard that it meets, and there the hook fires. What to write
 * is worked out when the trace is made (event "stop" of jit.attach), so the handler only copies pairs of
 * bytes. The edited traces are flushed before Lua goes on: some exits are meant for a guard that fails (an
 * FFI call that returns a bool has the other one in its snapshot), which the hook hides but nothing else
 * would. They are compiled again when they are hot again. What runs with hooks off at that moment (a __gc in
 * Lua, another debug hook) is not stopped, and could see such a value: the one inexact case.
 *
 * A loop that may pass no guard at all (`while true do end`) gets a breakpoint on its back jump; the SIGTRAP
 * handler continues at exit 0, the state at the entry of the trace, which needs no register. A short jump
 * cannot reach the stub, and the bytes before it may be where a running C call returns to.
 *
 * All of it runs on the thread that runs Lua, so blocking these signals is the only lock. A timer repeats the work
 * until the error has been raised: the signal may fall between the making of a trace and its event, or into
 * an update of LuaJIT's hook mask. Pages stay writable and executable until they are flushed, because the
 * signal may have interrupted the code generator, which is writing there. SIGINT is installed without
 * SA_RESTART: a blocked read or sleep must return. SIGTERM and SIGHUP (a batch system's warning, a terminal
 * that has gone) do the same and are remembered: the code may clean up and save, then the process dies by the
 * signal, however it exits. Where they were ignored from the start (nohup) they stay so.
 *
 * On other processors than x86-64 only the hook and the
 * engine's switch exist: a loop that stays in compiled code ends by the third Ctrl-C, with the process.
 */
#include "interrupt.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <lauxlib.h>
#include <luajit.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

enum { TICK_MS = 20, GRACE_TICKS = 2 }; /* the work is repeated so often; a user's pcall may clean up */
enum { HOLD_MOST = 1000000 };           /* instructions that may be asked to finish first; one step has far fewer */
enum { KILL_PRESSES = 3, KILL_AFTER_MS = 250, FORGET_AFTER_MS = 5000 };
enum { HOOK_MASK = LUA_MASKCALL | LUA_MASKRET | LUA_MASKCOUNT };
typedef enum { IDLE, EDITING, RUNNING } lac_mode;
static const int caught[] = {SIGINT, SIGTERM, SIGHUP};
enum { CAUGHT = sizeof caught / sizeof *caught };

static struct {
    lua_State *L;
    pthread_t thread;
    timer_t timer;
    void (*engine)(int);
    lua_Hook user_hook; /* the script's debug hook, set aside while ours is armed */
    int user_mask, user_count;
    lac_mode mode;
    int pending;     /* an interrupt was asked for and has not yet reached the outermost handler */
    int raised;      /* the error was raised at least once for it */
    int sticky;      /* it is raised at every instruction now */
    int interrupted; /* it has reached the outermost handler */
    int held;        /* instructions that it has waited, because Lua asked for it */
    int ticks;       /* since raised */
    int gc_stopped;  /* by on_hook, until its frame is gone */
    int installed[CAUGHT];
    int ending; /* SIGTERM or SIGHUP, once it has come */
    int presses;
    int64_t first_press, last_press; /* ms */
} S;

static sigset_t caught_set(void);
static sigset_t lock(void);
static void unlock(sigset_t old);
static void hook_arm(void);
static void hook_disarm(void);
static void gc_restart(lua_State *L);
static void timer_run(int on);
static void settle(void);
static void traces_patch(void);
static void traces_forget(void);
static void traces_flush(lua_State *L);
static void watch_jit(lua_State *L);

/* ---- the signal handler ------------------------------------------------------------------------------- */

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void deliver(void)
{
    if (S.engine) S.engine(1);
    hook_arm();
    traces_patch();
}

/* Die by the signal as if it had never been caught: at once, or when its handler returns. */
static void die(int sig)
{
    signal(sig, SIG_DFL);
    raise(sig);
}

static void on_press(int sig)
{
    int64_t now = now_ms();
    if (sig != SIGINT) {
        S.ending = sig;
        if (S.mode == EDITING) { /* the editor has put the terminal back */
            die(sig);
            return;
        }
    }
    if (S.presses == 0 || now - S.last_press > FORGET_AFTER_MS) {
        S.presses = 0;
        S.first_press = now;
    }
    S.last_press = now;
    S.presses++;
    if (S.mode == RUNNING) {
        if (S.presses >= KILL_PRESSES && now - S.first_press >= KILL_AFTER_MS) {
            die(sig); /* stuck in C: the user means it */
            return;
        }
        S.pending = 1;
        deliver();
    }
    if (S.mode != IDLE) timer_run(1);
}

static void on_tick(void)
{
    if (S.mode != RUNNING || !S.pending) return; /* editing: that a signal came is what matters */
    if (S.raised && ++S.ticks < GRACE_TICKS) return;
    S.sticky = S.raised;
    deliver();
}

static void on_signal(int sig, siginfo_t *info, void *context)
{
    int saved = errno;
    (void)context;
    if (!pthread_equal(pthread_self(), S.thread)) pthread_kill(S.thread, sig);
    else if (info->si_code == SI_TIMER) on_tick();
    else on_press(sig);
    errno = saved;
}

/* Does Lua ask to finish first? Between an update of the weights and its count, an error would leave them apart. */
static int asked_to_wait(lua_State *L)
{
    lua_getfield(L, LUA_REGISTRYINDEX, "lacuna.finish_first");
    int asked = lua_toboolean(L, -1);
    lua_pop(L, 1);
    return asked;
}

/* Raise the error. The first time the hook is taken down, so that code which catches it can clean up. */
static void on_hook(lua_State *L, lua_Debug *ar)
{
    (void)ar;
    if (!S.sticky && S.held < HOLD_MOST && asked_to_wait(L)) {
        S.held++;
        return;
    }
    sigset_t old = lock();
    int pending = S.pending;
    if (pending && !S.raised) {
        S.raised = 1;
        S.ticks = 0;
    }
    if (!S.sticky) {
        hook_disarm();
        if (S.engine) S.engine(0);
    }
    unlock(old);
    if (!pending) return;
    /* The interpreter may stand in the copy of an instruction that a trace holds (one that begins at a
     * return), and tracebacks look there: flushed traces must not be collected before the error has left. */
    if (lua_gc(L, LUA_GCISRUNNING, 0)) {
        lua_gc(L, LUA_GCSTOP, 0);
        S.gc_stopped = 1;
    }
    traces_flush(L);
    lua_pushliteral(L, "interrupted");
    lua_error(L);
}

/* ---- public ------------------------------------------------------------------------------------------- */

static int on_close(lua_State *L)
{
    (void)L;
    for (int i = 0; i < CAUGHT; i++)
        if (S.installed[i]) signal(caught[i], SIG_DFL);
    timer_delete(S.timer);
    traces_forget();
    S.L = NULL;
    return 0;
}

void lac_interrupt_open(lua_State *L)
{
    struct sigevent event;
    struct sigaction action;
    S.L = L;
    S.thread = pthread_self();
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_notify_thread_id = gettid();
    event.sigev_signo = SIGINT;
    if (timer_create(CLOCK_MONOTONIC, &event, &S.timer) != 0)
        luaL_error(L, "cannot make a timer for interrupts: %s", strerror(errno));
    watch_jit(L);
    lua_newuserdata(L, 1); /* lives as long as the state */
    lua_newtable(L);
    lua_pushcfunction(L, on_close);
    lua_setfield(L, -2, "__gc");
    lua_setmetatable(L, -2);
    luaL_ref(L, LUA_REGISTRYINDEX);
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO;
    action.sa_mask = caught_set();
    for (int i = 0; i < CAUGHT; i++) {
        struct sigaction before;
        sigaction(caught[i], NULL, &before);
        S.installed[i] = caught[i] == SIGINT || before.sa_handler != SIG_IGN;
        if (S.installed[i]) sigaction(caught[i], &action, NULL);
    }
}

int lac_interrupt_begin(void)
{
    sigset_t old = lock();
    int mode = (int)S.mode;
    S.mode = RUNNING;
    S.presses = 0;
    S.interrupted = 0;
    if (S.ending && mode != RUNNING) { /* it came between two stretches */
        S.pending = 1;
        deliver();
        timer_run(1);
    }
    unlock(old);
    return mode;
}

int lac_interrupt_end(lua_State *L, int mode)
{
    sigset_t old = lock();
    int interrupted = S.interrupted;
    S.interrupted = 0;
    if (S.pending) settle(); /* the code has ended by itself meanwhile */
    S.mode = (lac_mode)mode;
    unlock(old);
    traces_flush(L);
    gc_restart(L);
    return interrupted;
}

void lac_interrupt_caught(void)
{
    sigset_t old = lock();
    if (S.pending) {
        settle();
        S.interrupted = 1;
    }
    unlock(old);
}

void lac_interrupt_handled(lua_State *L)
{
    sigset_t old = lock();
    settle();
    unlock(old);
    traces_flush(L);
    gc_restart(L);
}

int lac_interrupt_editing(int on)
{
    if (on) lac_interrupt_exit(); /* there is no next line */
    sigset_t old = lock();
    int presses = S.presses;
    S.presses = 0;
    S.mode = on ? EDITING : IDLE;
    if (!on) timer_run(0);
    unlock(old);
    return presses;
}

void lac_interrupt_exit(void)
{
    if (!S.ending) return;
    fflush(NULL);
    die(S.ending);
}

void lac_host_engine(void (*interrupt)(int on))
{
    sigset_t old = lock();
    S.engine = interrupt;
    unlock(old);
}

/* ---- the lock, the hook, the timer -------------------------------------------------------------------- */

static sigset_t caught_set(void)
{
    sigset_t set;
    sigemptyset(&set);
    for (int i = 0; i < CAUGHT; i++) sigaddset(&set, caught[i]);
    return set;
}

static sigset_t lock(void)
{
    sigset_t set = caught_set(), old;
    pthread_sigmask(SIG_BLOCK, &set, &old);
    return old;
}

static void unlock(sigset_t old) { pthread_sigmask(SIG_SETMASK, &old, NULL); }

static void hook_arm(void)
{
    if (lua_gethook(S.L) != on_hook) {
        S.user_hook = lua_gethook(S.L);
        S.user_mask = lua_gethookmask(S.L);
        S.user_count = lua_gethookcount(S.L);
    }
    lua_sethook(S.L, on_hook, HOOK_MASK, 1);
}

static void hook_disarm(void)
{
    if (lua_gethook(S.L) == on_hook) lua_sethook(S.L, S.user_hook, S.user_mask, S.user_count);
}

static void gc_restart(lua_State *L)
{
    if (S.gc_stopped) lua_gc(L, LUA_GCRESTART, 0);
    S.gc_stopped = 0;
}

static void timer_run(int on)
{
    struct itimerspec spec;
    memset(&spec, 0, sizeof spec);
    spec.it_value.tv_nsec = spec.it_interval.tv_nsec = on ? TICK_MS * 1000000L : 0;
    timer_settime(S.timer, 0, &spec, NULL);
}

/* The interrupt is over. */
static void settle(void)
{
    timer_run(0);
    hook_disarm();
    if (S.engine) S.engine(0);
    S.pending = S.raised = S.sticky = S.held = S.ticks = S.presses = 0;
}

/* ---- the machine code: events of the JIT --------------------------------------------------------------- */

#if defined(__x86_64__)

enum { MAX_STUBS = 1024 }; /* LuaJIT has at most 512 exits per trace */

typedef struct lac_edit {
    uint32_t at;
    uint8_t code[2];
} lac_edit;

typedef struct lac_trace {
    uint8_t *code; /* NULL: no such trace */
    size_t size;
    uint8_t *trap; /* the back jump that gets a breakpoint, or NULL */
    lac_edit *edit;
    size_t edits;
} lac_trace;

static struct {
    lac_trace *trace; /* by trace number */
    size_t traces;
    uint8_t *stub[MAX_STUBS]; /* exit stubs by exit number; 0 .. stubs-1 are known */
    size_t stubs;
    int side;    /* the trace being recorded starts at an exit of another one */
    int patched; /* the handler has edited code since the last flush */
    int nothing; /* reference to a function that does nothing and is never compiled */
    int trap_installed;
    struct sigaction old_trap;
} T;

static const char user_callback = 0; /* registry key: the script's own callback for trace events */

static int32_t rel32(const uint8_t *p)
{
    int32_t rel;
    memcpy(&rel, p, 4);
    return rel;
}

static int is_long_branch(const uint8_t *p) { return p[0] == 0x0F && (p[1] & 0xF0) == 0x80; }

static int is_stub(const uint8_t *target, size_t exits)
{
    for (size_t i = 0; i < exits; i++)
        if (T.stub[i] == target) return 1;
    return 0;
}

static void edit_put(lac_trace *t, size_t at, uint8_t a, uint8_t b)
{
    lac_edit *edit = &t->edit[t->edits++];
    edit->at = (uint32_t)at;
    edit->code[0] = a;
    edit->code[1] = b;
}

/* Make every guard leave: 0F 8x rel32 becomes 90 E9 rel32, with the same target. Returns 1 if some guard at
 * or behind `loop` is met in every turn; one that a jump may skip does not count (a step of the garbage
 * collector is such a block). Instructions are not decoded: what only looks like a jump counts as one, which
 * errs towards a breakpoint, always legal. */
static int edit_guards(lac_trace *t, size_t loop, size_t exits)
{
    const uint8_t *code = t->code;
    size_t skip = 0; /* no jump seen so far goes further than this */
    int certain = 0;
    for (size_t p = 0; p + 2 <= t->size; p++) {
        size_t target = 0;
        if (is_long_branch(code + p) && p + 6 <= t->size) {
            if (is_stub(code + p + 6 + rel32(code + p + 2), exits)) {
                edit_put(t, p, 0x90, 0xE9);
                certain |= p >= loop && skip <= p;
                p += 5;
                continue;
            }
            if (rel32(code + p + 2) > 0) target = p + 6 + (size_t)rel32(code + p + 2);
        } else if (((code[p] & 0xF0) == 0x70 || code[p] == 0xEB) && (int8_t)code[p + 1] > 0) {
            target = p + 2 + code[p + 1];
        }
        if (p >= loop && target > skip && target <= t->size) skip = target;
    }
    return certain;
}

/* The end of a loop is a plain jump back, or an inverted guard: a conditional jump back (two where a
 * comparison of floats has to look at the parity flag), then a jump to the exit. The first gets a breakpoint
 * if `trap`, the second becomes no jump: 66 90 is a two-byte nop, EB 04 skips the rest of a long jump. */
static void edit_loop_end(lac_trace *t, size_t loop, size_t exits, int trap)
{
    uint8_t *code = t->code, *head = code + loop;
    size_t q = t->size;
    if (q >= 5 && code[q - 5] == 0xE9 && is_stub(code + q + rel32(code + q - 4), exits)) {
        q -= 5;
        for (int i = 0; i < 2; i++) {
            if (q >= 2 && (code[q - 2] & 0xF0) == 0x70 && code + q + (int8_t)code[q - 1] == head) {
                q -= 2;
                edit_put(t, q, 0x66, 0x90);
            } else if (q >= 6 && is_long_branch(code + q - 6) && code + q + rel32(code + q - 4) == head) {
                q -= 6;
                edit_put(t, q, 0xEB, 0x04);
            }
        }
    } else if (trap && q >= 5 && code[q - 5] == 0xE9 && code + q + rel32(code + q - 4) == head) {
        t->trap = code + q - 5;
    } else if (trap && q >= 2 && code[q - 2] == 0xEB && code + q + (int8_t)code[q - 1] == head) {
        t->trap = code + q - 2;
    }
}

/* Work out the edits of a new trace. `loop` is the offset of its loop part; a trace that links to itself has
 * none but loops all the same. Exit 0 of a side trace does need registers, but its loops have guards: only
 * the entry of a root trace is a place that a loop without any condition can come back to. */
static void trace_study(lua_State *L, lac_trace *t, size_t loop, int loops, size_t exits)
{
    size_t room = 2;
    for (size_t p = 0; p + 6 <= t->size; p++) room += (size_t)is_long_branch(t->code + p);
    t->edit = malloc(room * sizeof *t->edit);
    if (!t->edit) {
        luaL_error(L, "no memory to make a compiled trace interruptible");
        return; /* never reached */
    }
    int certain = edit_guards(t, loop, exits);
    if (loops) edit_loop_end(t, loop, exits, !certain && !T.side);
}

static void traces_put(lua_State *L, size_t number, const lac_trace *t)
{
    sigset_t old = lock();
    if (number >= T.traces) {
        size_t n = 2 * number < 256 ? 256 : 2 * number;
        lac_trace *grown = realloc(T.trace, n * sizeof *grown);
        if (!grown) {
            unlock(old);
            free(t->edit);
            luaL_error(L, "no memory to make a compiled trace interruptible");
            return; /* never reached */
        }
        memset(grown + T.traces, 0, (n - T.traces) * sizeof *grown);
        T.trace = grown;
        T.traces = n;
    }
    free(T.trace[number].edit);
    T.trace[number] = *t;
    unlock(old);
}

/* Call upvalue i with a number. */
static void ask(lua_State *L, int i, lua_Number n, int results)
{
    lua_pushvalue(L, lua_upvalueindex(i));
    lua_pushnumber(L, n);
    lua_call(L, 1, results);
}

static void trace_made(lua_State *L, int number)
{
    lac_trace t = {0};
    ask(L, 1, number, 3);                                              /* tracemc */
    ask(L, 2, number, 1);                                              /* traceinfo */
    if (lua_type(L, -4) != LUA_TSTRING || !lua_istable(L, -1)) return; /* it is gone already */
    t.code = (uint8_t *)(uintptr_t)lua_tonumber(L, -3);
    t.size = lua_objlen(L, -4);
    size_t loop = (size_t)lua_tonumber(L, -2);
    lua_getfield(L, -1, "link");
    int loops = loop > 0 || lua_tointeger(L, -1) == number;
    lua_getfield(L, -2, "nexit");
    size_t exits = (size_t)lua_tointeger(L, -1);
    if (exits > MAX_STUBS) luaL_error(L, "a trace with %d exits", (int)exits);
    for (; T.stubs < exits; T.stubs++) {
        ask(L, 3, (lua_Number)T.stubs, 1); /* traceexitstub */
        T.stub[T.stubs] = (uint8_t *)(uintptr_t)lua_tonumber(L, -1);
        lua_pop(L, 1);
    }
    trace_study(L, &t, loop, loops, exits);
    traces_put(L, (size_t)number, &t);
}

/* The callback for trace events: ("stop", number), ("start", number, function, pc, parent, exit), ("flush"),
 * and others. An exit of -1 marks a trace stitched to its parent: that one starts like a root trace. */
static int on_trace(lua_State *L)
{
    int n = lua_gettop(L);
    const char *what = lua_tostring(L, 1);
    if (strcmp(what, "start") == 0) T.side = lua_isnumber(L, 5) && lua_tointeger(L, 6) >= 0;
    else if (strcmp(what, "stop") == 0) trace_made(L, (int)lua_tointeger(L, 2));
    else if (strcmp(what, "flush") == 0) traces_forget();
    lua_settop(L, n);
    lua_pushlightuserdata(L, (void *)&user_callback);
    lua_rawget(L, LUA_REGISTRYINDEX);
    if (lua_isnil(L, -1)) return 0;
    lua_insert(L, 1);
    lua_call(L, n, 0);
    return 0;
}

/* jit.attach for scripts. LuaJIT keeps one callback per event, so a script's (jit.v, jit.dump) for "trace" is
 * called by ours instead of replacing it. Upvalue 1 is the original. */
static int attach(lua_State *L)
{
    const char *event = luaL_optstring(L, 2, NULL);
    luaL_checktype(L, 1, LUA_TFUNCTION);
    lua_settop(L, event ? 2 : 1);
    lua_pushlightuserdata(L, (void *)&user_callback);
    if (event && strcmp(event, "trace") == 0) {
        lua_pushvalue(L, 1);
        lua_rawset(L, LUA_REGISTRYINDEX);
        return 0;
    }
    lua_pushvalue(L, -1);
    lua_rawget(L, LUA_REGISTRYINDEX);
    if (!event && lua_rawequal(L, 1, -1)) { /* detach */
        lua_pushnil(L);
        lua_replace(L, -2);
        lua_rawset(L, LUA_REGISTRYINDEX);
    } else {
        lua_pop(L, 2);
    }
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    lua_call(L, event ? 2 : 1, 0);
    return 0;
}

static void watch_jit(lua_State *L)
{
    static const char *const names[] = {"tracemc", "traceinfo", "traceexitstub"};
    lua_getglobal(L, "require");
    lua_pushliteral(L, "jit.util");
    lua_call(L, 1, 1);
    for (int i = 0; i < 3; i++) lua_getfield(L, -1 - i, names[i]);
    lua_pushcclosure(L, on_trace, 3);
    lua_getglobal(L, "jit");
    lua_getfield(L, -1, "attach"); /* jit.util, on_trace, jit, attach */
    lua_pushvalue(L, -1);
    lua_pushvalue(L, -4);
    lua_pushliteral(L, "trace");
    lua_call(L, 2, 0);
    lua_pushcclosure(L, attach, 1);
    lua_setfield(L, -2, "attach");
    lua_pop(L, 3);
    luaL_loadstring(L, "return");
    luaJIT_setmode(L, -1, LUAJIT_MODE_FUNC | LUAJIT_MODE_OFF);
    T.nothing = luaL_ref(L, LUA_REGISTRYINDEX);
}

/* ---- the machine code: patch it (in the signal handler), throw it away --------------------------------- */

static void on_trap(int sig, siginfo_t *info, void *context)
{
    greg_t *ip = &((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
    const uint8_t *trap = (const uint8_t *)*ip - 1;
    (void)info;
    for (size_t i = 0; i < T.traces; i++) {
        if (T.trace[i].trap && T.trace[i].trap == trap) {
            *ip = (greg_t)(uintptr_t)T.stub[0];
            return;
        }
    }
    sigaction(SIGTRAP, &T.old_trap, NULL); /* not ours */
    raise(sig);
}

static void trap_set(uint8_t *at)
{
    if (!T.trap_installed) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_trap;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGTRAP, &action, &T.old_trap);
        T.trap_installed = 1;
    }
    *at = 0xCC;
}

static void traces_patch(void)
{
    static uintptr_t page;
    uintptr_t low = 0, high = 0; /* pages opened by the last mprotect */
    if (!page) page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < T.traces; i++) {
        lac_trace *t = &T.trace[i];
        uintptr_t from = (uintptr_t)t->code & ~(page - 1);
        uintptr_t to = ((uintptr_t)t->code + t->size + page - 1) & ~(page - 1);
        if (!t->code) continue;
        if (from < low || to > high) {
            if (mprotect((void *)from, to - from, PROT_READ | PROT_WRITE | PROT_EXEC) != 0)
                continue; /* being flushed at this very moment */
            low = from;
            high = to;
        }
        for (size_t k = 0; k < t->edits; k++) memcpy(t->code + t->edit[k].at, t->edit[k].code, 2);
        if (t->trap) trap_set(t->trap);
        T.patched = 1;
    }
}

static void traces_forget(void)
{
    sigset_t old = lock();
    for (size_t i = 0; i < T.traces; i++) free(T.trace[i].edit);
    if (T.traces) memset(T.trace, 0, T.traces * sizeof *T.trace);
    T.stubs = 0; /* they live in the memory that is flushed */
    T.patched = 0;
    if (T.trap_installed) sigaction(SIGTRAP, &T.old_trap, NULL);
    T.trap_installed = 0;
    unlock(old);
}

/* Drop all compiled code if it has been edited. Never called below a running trace: no trace calls into Lua.
 * LuaJIT must not be recording a trace then: its recorder puts the original of a patched bytecode back for
 * one instruction, and would afterwards restore the jump to a trace that the flush has freed. Setting the
 * hook makes it give up, and running any function lets it notice. */
static void traces_flush(lua_State *L)
{
    if (!T.patched) return;
    sigset_t old = lock();
    lua_sethook(L, lua_gethook(L), lua_gethookmask(L), lua_gethookcount(L));
    lua_rawgeti(L, LUA_REGISTRYINDEX, T.nothing);
    if (lua_pcall(L, 0, 0, 0) == 0) {
        traces_forget();
        luaJIT_setmode(L, 0, LUAJIT_MODE_ENGINE | LUAJIT_MODE_FLUSH);
    } else {
        lua_pop(L, 1); /* no stack left: lac_interrupt_end tries again */
    }
    unlock(old);
}

#else /* no machine code that we can edit */

static void watch_jit(lua_State *L) { (void)L; }
static void traces_patch(void) {}
static void traces_forget(void) {}
static void traces_flush(lua_State *L) { (void)L; }

#endif
