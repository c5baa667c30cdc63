/* status.h: how a call fails.
 *
 * One X-macro lists the statuses; one function formats the message into thread-local memory; two macros use it.
 * A failing call writes one sentence that names the operator, both sides of a mismatch and, where there is one,
 * the remedy. Nothing longjmps, aborts or exits: the caller is a REPL that must survive.
 */
#ifndef LAC_STATUS_H
#define LAC_STATUS_H

#define LAC_STATUSES(X)                                                                                                \
    X(OK, "ok")                                                                                                        \
    X(ARGUMENT, "argument")       /* a value outside its range, a null pointer */                                      \
    X(SHAPE, "shape")             /* ranks or sizes that do not fit */                                                 \
    X(DTYPE, "dtype")             /* dtypes that differ or are not supported by the operator */                        \
    X(DEVICE, "device")           /* devices that differ, a device or plug-in that is not there */                     \
    X(INDEX, "index")             /* an index outside its axis */                                                      \
    X(MEMORY, "memory")           /* the pool could not serve the request */                                           \
    X(RELEASED, "released")       /* a tensor used after release */                                                    \
    X(INTERRUPTED, "interrupted") /* the user asked to stop */                                                         \
    X(SYSTEM, "system")           /* a system call failed: errno's text is in the message */                           \
    X(INTERNAL, "internal")       /* a broken invariant: a defect of the engine */

typedef enum lac_status {
#define X(id, name) LAC_E_##id,
    LAC_STATUSES(X)
#undef X
        LAC_STATUS_COUNT
} lac_status;
#define LAC_SUCCESS LAC_E_OK

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int lac_fail(int status, const char *format, ...); /* records the message, returns status */

/* return from this function with a status and a message */
#define LAC_FAIL(code, ...)                                                                                            \
    do {                                                                                                               \
        lac_fail(LAC_E_##code, __VA_ARGS__);                                                                           \
        return LAC_E_##code; /* the constant, so that the compiler knows that this path failed */                      \
    } while (0)
/* pass a failure on */
#define LAC_TRY(expression)                                                                                            \
    do {                                                                                                               \
        int lac_try_status_ = (expression);                                                                            \
        if (lac_try_status_) return lac_try_status_;                                                                   \
    } while (0)

#endif
