/* op_front.h: what the front ends (op_*.c) share.
 *
 * A front end turns untrusted lac_tensor arguments into views, checks shapes, dtypes and devices, makes the outputs
 * and runs one slot of the device's table. If anything fails after an output exists, the output is dropped again:
 * a failed call leaves out->storage NULL and no storage behind. The two macros below are that bracket. Checks that
 * several operators need (scalars of integer tensors, destinations written in place, shapes that broadcast in one
 * direction) are here once, so that their messages agree. Nothing here touches data.
 */
#ifndef LAC_OP_FRONT_H
#define LAC_OP_FRONT_H
#include "backend.h"
#include <math.h>

/* an output that the call will make: refuse NULL, mark as not made */
#define LAC_OUT(op, name, t)                                                                                           \
    do {                                                                                                               \
        if (!(t)) LAC_FAIL(ARGUMENT, "%s: no tensor to fill for %s", op, name);                                        \
        (t)->storage = NULL;                                                                                           \
    } while (0)

/* run a slot; on failure drop the outputs named after `args` */
#define LAC_RUN_OUT(slot, device, args, ...)                                                                           \
    do {                                                                                                               \
        int run_status_;                                                                                               \
        LAC_SLOT(run_status_, slot, device, args);                                                                     \
        if (run_status_) {                                                                                             \
            lac_tensor *const run_outs_[] = {__VA_ARGS__};                                                             \
            for (size_t run_i_ = 0; run_i_ < sizeof run_outs_ / sizeof *run_outs_; run_i_++)                           \
                lac_tensor_drop(run_outs_[run_i_]);                                                                    \
            return run_status_;                                                                                        \
        }                                                                                                              \
    } while (0)

/* LAC_TRY that drops an output on failure */
#define LAC_TRY_OUT(expression, ...)                                                                                   \
    do {                                                                                                               \
        int try_status_ = (expression);                                                                                \
        if (try_status_) {                                                                                             \
            lac_tensor *const try_outs_[] = {__VA_ARGS__};                                                             \
            for (size_t try_i_ = 0; try_i_ < sizeof try_outs_ / sizeof *try_outs_; try_i_++)                           \
                lac_tensor_drop(try_outs_[try_i_]);                                                                    \
            return try_status_;                                                                                        \
        }                                                                                                              \
    } while (0)

/* may `value` stand for an element of t? floats take anything; integers need an integer that fits; bool 0 or 1 */
int lac_front_scalar(const char *op, const char *name, const lac_tensor *t, double value);
/* a destination written in place: no two of its elements may share memory */
int lac_front_writable(const char *op, const char *name, const lac_tensor *t, const lac_view *v);
/* src must be the same view as dst or share no memory with it */
int lac_front_disjoint(const char *op, const char *ns, const lac_view *src, const char *nd, const lac_view *dst);
/* can src be expanded to exactly dst's shape? expands sv */
int lac_front_expand_to(const char *op, const char *ns, const lac_tensor *src, lac_view *sv, const char *nd,
                        const lac_tensor *dst);
/* number of elements; fails on overflow (views of stride 0 can claim any shape) */
int lac_front_count(const char *op, const char *name, const lac_tensor *t, int64_t *count);
/* the bias [O] of weights w [O, ...], for x; fills v */
int lac_front_bias(const char *op, const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias, lac_view *v);
int lac_front_integer_index(const char *op, const char *name, const lac_tensor *t);
/* "sum", "mean", ...: what LAC_SUM, LAC_MEAN, ... are called; NULL past the end (op_reduce.c) */
const char *lac_reduce_name(int fn);
const char *lac_scan_name(int fn); /* the same for LAC_CUMSUM, ... (op_scan.c) */
/* f64 for f64, else f32: the dtype of statistics and losses */
static inline int lac_front_stat_dtype(int dtype) { return dtype == LAC_F64 ? LAC_F64 : LAC_F32; }

#endif
