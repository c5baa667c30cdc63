/* interrupt.h: Ctrl-C for a program that embeds LuaJIT, also in the middle of machine code made by its JIT.
 *
 * The caller brackets every stretch of user code:
 *
 *     int mode = lac_interrupt_begin();
 *     status = lua_pcall(L, n, r, handler);        the handler calls lac_interrupt_caught() first of all
 *     interrupted = lac_interrupt_end(L, mode);
 *
 * Between begin and end SIGINT raises the error "interrupted" in whatever Lua code is running. A pcall of
 * the user's may catch it to clean up, but unless it calls lac_interrupt_handled() the error is raised again
 * after two ticks (40 ms) and from then on at every instruction, until it has reached the caller's pcall.
 * Outside of begin and end SIGINT is remembered and otherwise ignored; while a line is being edited
 * (lac_interrupt_editing) it makes the blocking read of the editor fail with EINTR.
 *
 * SIGTERM and SIGHUP do the same, but are not forgotten: what runs next is interrupted too, no further line is
 * edited, and lac_interrupt_exit(), which the program calls as it exits, dies by the signal.
 *
 * One Lua state per process, used by one thread. Other threads may receive the signal: they forward it.
 */
#ifndef LAC_INTERRUPT_H
#define LAC_INTERRUPT_H
#include <lua.h>

/* Install the signal handler and watch the JIT of this state. Call it from protected code, libraries open.
 * Closing the state removes the handler. */
void lac_interrupt_open(lua_State *L);

int lac_interrupt_begin(void);                 /* returns what lac_interrupt_end needs */
int lac_interrupt_end(lua_State *L, int mode); /* returns 1 if an interrupt has ended the code since begin */
void lac_interrupt_caught(void);               /* the error has reached the outermost handler */
void lac_interrupt_handled(lua_State *L);      /* the running code has dealt with the interrupt and goes on */
int lac_interrupt_editing(int on);             /* a line editor starts, ends; returns the presses seen */
void lac_interrupt_exit(void);                 /* dies by SIGTERM or SIGHUP if one has come; files are written */

/* Exported by the executable for the FFI: gives it the engine's async-signal-safe switch, lac_interrupt(int).
 * That is called with 1 to make a running operator return early, and with 0 once Lua has raised the error. */
__attribute__((visibility("default"))) void lac_host_engine(void (*interrupt)(int on));

#endif
