/* abi.c: the parts of the public interface that are about the library itself.
 *
 * The text of lacuna.h's ffi region is embedded by the assembler (the Makefile cuts it out of the header into
 * ffi.h), so what LuaJIT declares is what this binary was built from; struct sizes are answered by name, so the
 * host can compare its own idea of each struct at load. Failure text is thread-local. The flags live in one
 * struct so that a host polls a single word after each call; lac_interrupt() may be called from a signal handler
 * and therefore only stores.
 */
#include "backend.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* clang-format off */
__asm__(".section .rodata\n"
        ".global lac_cdef_text_\n"
        ".hidden lac_cdef_text_\n"
        "lac_cdef_text_:\n"
        ".incbin \"" LAC_FFI_FILE "\"\n"
        ".byte 0\n"
        ".text\n");
/* clang-format on */
extern const char lac_cdef_text_[] __attribute__((visibility("hidden")));

lac_flags lac_flags_global;
lac_settings lac_settings_global;
static _Thread_local char message[1024];

const char *lac_cdef(void) { return lac_cdef_text_; }

const char *lac_version(void) { return LAC_VERSION; }

const char *lac_last_error(void) { return message; }

int lac_fail(int status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

const char *lac_status_name(int status)
{
    static const char *const names[] = {
#define X(id, name) name,
        LAC_STATUSES(X)
#undef X
    };
    return status >= 0 && status < LAC_STATUS_COUNT ? names[status] : "unknown";
}

int lac_sizeof(const char *type)
{
    static const struct {
        const char *name;
        int size;
    } sizes[] = {
#define S(type) {#type, (int)sizeof(type)}
        S(lac_tensor),      S(lac_memory_stats), S(lac_flags),         S(lac_optim_item),
        S(lac_attn_desc),   S(lac_strip),        S(lac_plan_info),     S(lac_attn_args),
        S(lac_cache_stats), S(lac_block_info),   S(lac_profile_event), S(lac_watch_info),
#undef S
    };
    for (size_t i = 0; type && i < sizeof sizes / sizeof *sizes; i++)
        if (strcmp(type, sizes[i].name) == 0) return sizes[i].size;
    return -1;
}

int lac_tf32(int on)
{
    if (on >= 0) lac_settings_global.tf32 = on != 0;
    return lac_settings_global.tf32;
}

lac_flags *lac_flags_get(void) { return &lac_flags_global; }

void lac_interrupt(int on)
{
    lac_flags_global.interrupted = on != 0;
    if (on) lac_flags_global.attention = 1; /* the host clears `attention` once it has looked at every flag */
}
