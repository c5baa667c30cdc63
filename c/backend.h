/* backend.h: the contract between front ends (op_*.c) and back ends (cpu/, the CUDA plug-in).
 *
 * A front end checks everything, makes outputs and fills one plain argument struct per operator; a back end gets
 * valid arguments and only computes. c/ops.def lists the operators; it expands to the typed slots of the table
 * below, to names and to the support matrix that `lacuna devices` prints. The first three fields of the table are
 * its ABI: a plug-in built against another version is refused with what to rebuild. Mathematics that is one line
 * per function (maps) lives in c/maps.def, which all back ends compile.
 * An empty slot means "not supported on this device": lac_backend_need() turns it into an error, never into a
 * silent fallback.
 */
#ifndef LAC_BACKEND_H
#define LAC_BACKEND_H
#include "core.h"

/* one operator, one line */
/* clang-format off */
typedef struct { lac_view x; double value; } lac_a_fill;
typedef struct { lac_view x, out; } lac_a_copy; /* one device; x expanded to out's shape; dtypes may differ */
typedef struct { lac_view out; double start, step; } lac_a_arange;
typedef struct { int fn; lac_view x, out; } lac_a_map1;
typedef struct { int fn; lac_view x, y, g, out; } lac_a_map1_bwd;
/* y.data NULL: the scalar takes its place; swapped: fn(y, x). Inputs are expanded to out's shape. */
typedef struct { int fn; lac_view x, y, out; double scalar; bool swapped; } lac_a_map2;
/* which 2: both gradients, the second into out2 */
typedef struct { int fn, which; lac_view x, y, g, out, out2; double scalar; bool swapped; } lac_a_map2_bwd;
/* g.data NULL: the value; else the gradient (y: the value) */
typedef struct { int fn; lac_view x, y, g, out; double constants[3]; } lac_a_mapp;
typedef struct { int fn, which; lac_view x, y, z, g, out; double constant; } lac_a_map3; /* g.data NULL: the value */
typedef struct { lac_view cond, x, y, out; } lac_a_where;
typedef struct { double alpha; lac_view x, dst; } lac_a_axpy; /* x.data NULL: dst *= alpha */
typedef struct { int fn; lac_view x, out; uint32_t dims; double correction; } lac_a_reduce; /* out has size 1 on reduced axes */
typedef struct { lac_view x, out; int dim; bool logarithm; } lac_a_softmax;
typedef struct { lac_view y, g, out; int dim; bool logarithm; } lac_a_softmax_bwd;
typedef struct { int fn, dim; bool reverse; lac_view x, out, index; } lac_a_scan; /* index.data NULL: not an extreme */
typedef struct { int fn, dim; lac_view x, y, g, dx; } lac_a_scan_bwd;
typedef struct { lac_view a, b, bias, out; } lac_a_matmul; /* batch axes expanded; bias.data may be NULL */
/* pre = x w^T + bias, out = fn(pre); bias.data NULL: none, pre.data NULL: not kept */
typedef struct { int fn; lac_view x, w, bias, pre, out; } lac_a_linear_act;
typedef struct { int fn; lac_view g, w, pre, out, sums, act; } lac_a_linear_act_bwd; /* sums.data, act.data NULL: not wanted */
typedef struct { lac_view g, x, dw, sums; } lac_a_weight_grad;
typedef struct { lac_view x, gamma, beta, out, mean, rstd; double eps; } lac_a_layernorm;
typedef struct { lac_view x, gamma, mean, rstd, g, dx, dgamma, dbeta; } lac_a_layernorm_bwd;
typedef struct { lac_view x, h, gamma, beta, sum, out, mean, rstd; double eps, p; uint64_t seed, offset; } lac_a_residual_norm;
typedef struct { /* g_sum.data NULL: 0; dh.data NULL: dx (p is 0) */
    lac_view sum, gamma, mean, rstd, g, g_sum, dx, dh, dgamma, dbeta;
    double p;
    uint64_t seed, offset;
} lac_a_residual_norm_bwd;
typedef struct { lac_view x, gamma, beta, act, out, mean, rstd; double eps; } lac_a_gelu_norm; /* act.data NULL: not kept */
typedef struct { /* act, dgamma, dbeta, out (layernorm(gelu(x)) again) and sums (of dx over rows): data may be NULL */
    lac_view x, act, gamma, beta, mean, rstd, g, dx, dgamma, dbeta, out, sums;
    double eps;
} lac_a_gelu_norm_bwd;
typedef struct { lac_view x, gamma, out, rstd; double eps; } lac_a_rmsnorm;
typedef struct { lac_view x, gamma, rstd, g, dx, dgamma; } lac_a_rmsnorm_bwd;
typedef struct { lac_view x, w, bias, out; int64_t stride, dilation, before; } lac_a_conv1d; /* bias.data may be NULL */
typedef struct { lac_view x, w, g, dx, dw; int64_t stride, dilation, before; } lac_a_conv1d_bwd; /* dx, dw data NULL: not wanted */
/* weight [V].data NULL: all 1; target [R] classes, or [R, V] probabilities of logits' dtype */
typedef struct { int64_t ignore; double smoothing; lac_view weight; } lac_loss;
typedef struct { lac_view logits, target, out, lse; lac_loss loss; } lac_a_cross_entropy;
typedef struct { lac_view logits, target, lse, g, out; lac_loss loss; } lac_a_cross_entropy_bwd;
typedef struct { lac_view losses, target, out, total; lac_loss loss; } lac_a_loss_mean;
typedef struct { lac_view x, w, bias, target, out, lse; lac_loss loss; int64_t chunk; } lac_a_linear_ce;
typedef struct { /* out.data not NULL: the losses and lse are written too, chunk by chunk, before lse is read */
    lac_view x, w, bias, target, lse, g, dx, dw, dbias, out;
    lac_loss loss;
    int64_t chunk;
} lac_a_linear_ce_bwd;
typedef struct { lac_view x, index, out; int dim; } lac_a_index; /* index_select, gather */
typedef struct { lac_view g, index, out; int dim; } lac_a_index_bwd;
typedef struct { lac_view dst, index, src; int dim, mode; bool self; } lac_a_scatter; /* in place; src has index's shape */
typedef struct { lac_view dst, index, src; int dim, mode; double alpha; } lac_a_index_put; /* in place; mode SET or ADD */
typedef struct { lac_view x, out; int64_t before[LAC_MAX_DIMS]; int mode; double value; } lac_a_pad;
typedef struct { lac_view g, out; int64_t before[LAC_MAX_DIMS]; int mode; } lac_a_pad_bwd;
typedef struct { lac_view x, values, index; int dim; bool descending; } lac_a_sort; /* k = size of index along dim */
typedef struct { lac_view sorted, values, out; bool right; } lac_a_searchsorted; /* leading axes equal, or sorted 1-D */
typedef struct { lac_view sorted, order, inverse, starts; int64_t *count; } lac_a_runs;
typedef struct { lac_view x, out; int64_t *count; } lac_a_nonzero; /* out.data NULL: only count */
/* positions [N] or [B, N]; data NULL: 0, 1, ...; start is added to either */
typedef struct { lac_view x, positions, out; int64_t start; double base, scale_base; bool interleaved, transpose; int sign; } lac_a_rope;
typedef struct { lac_view out; int kind; double a, b; uint64_t seed, offset; } lac_a_random;
typedef struct { lac_view x, out; double p; uint64_t seed, offset; } lac_a_dropout;
typedef struct { lac_view weights, out; bool replacement; uint64_t seed, offset; } lac_a_multinomial; /* [R, N], i64 [R, S] */
enum { LAC_RULE_ADAMW = 0, LAC_RULE_SGD = 1, LAC_RULE_LION = 2 };
typedef struct { lac_view param, grad, m, v, master; double lr, weight_decay; } lac_a_optim_item; /* absent parts: data NULL */
/* coupled: decay is added to the gradient; beta1 is SGD's momentum, which also has dampening and nesterov */
typedef struct { int rule; const char *name; const lac_a_optim_item *items; int64_t n, step; double beta1, beta2, eps, dampening, grad_scale, grad_limit; bool nesterov, coupled; } lac_a_optim;
typedef struct { const lac_view *items; int64_t n; double *norm; } lac_a_norm;
/* x [B, N, H, D], f32, f16 or bf16; values: the same, f32, contiguous, each number rounded to e4m3 after division by its
 * head's scale, and multiplied by it; scale [B, H] f32 contiguous: largest finite magnitude / 448 */
typedef struct { lac_view x, scale, values; } lac_a_e4m3;
/* clang-format on */
/* lse and delta layouts and the meaning of every field: plan.h */
typedef struct lac_a_attend lac_a_attend;
typedef struct lac_a_attend_bwd lac_a_attend_bwd;

/* Memory of a device that is not the host; NULL in the CPU's table. Operators are queued in one order per device, so
 * memory may be reused as soon as the call that used it has returned; only transfer to the host and synchronize wait.
 */
typedef struct lac_runtime {
    int (*allocate)(size_t bytes, void **out);                               /* fails with status "memory" */
    int (*release)(void *p);                                                 /* waits for what may still use it */
    int (*transfer)(void *to, const void *from, size_t bytes, bool to_host); /* between host and device */
    int (*synchronize)(void); /* waits; reports what failed meanwhile, with the operator's name */
    int (*memory)(size_t *available, size_t *total);
} lac_runtime;

/* choices of the script that back ends read */
typedef struct lac_settings {
    int32_t tf32; /* may f32 products on CUDA be rounded to 11 bits before they are multiplied? */
} lac_settings;
extern lac_settings lac_settings_global; /* abi.c */

/* What the engine offers a plug-in, which links none of its code. */
typedef struct lac_engine {
    int32_t abi, bytes;
    int (*fail)(int status, const char *message); /* records the message, returns status */
    /* device memory for one operator, from the pool; NULL (message set) if there is none */
    void *(*scratch_get)(const char *op, size_t bytes, void **block);
    void (*scratch_put)(void *block);
    const lac_flags *flags;
    const lac_settings *settings;
} lac_engine;

typedef struct lac_backend {
    int32_t abi, bytes;
    const char *name;
    const char *detail; /* ISA or device, for people */
    const lac_runtime *runtime;
#define LAC_OP(name, args, gradient) int (*name)(const args *a);
#include "ops.def"
#undef LAC_OP
} lac_backend;

/* a plug-in's one symbol: its table, or NULL and the reason why this machine cannot use it */
typedef const lac_backend *lac_backend_entry(const lac_engine *engine, const char **reason); /* "lac_backend_v1" */

/* the table that serves `device`; a missing back end or an empty slot is an error of status "device" that names both */
const lac_backend *lac_backend_for(int device);
bool lac_has_unit(void); /* is the CPU's table that of a matrix unit (AMX)? */
int lac_backend_missing(const char *op, int device);

/* Slots by number, and the recorder (profile.c): every run of a slot goes through LAC_SLOT, which costs one predictable
 * branch while nothing is recorded. Stopping is asked for after the run as well as inside long ones: a front end that
 * fails drops its outputs, whereas a host that stops after a call which succeeded would lose them. */
enum {
#define LAC_OP(name, args, gradient) LAC_SLOT_##name,
#include "ops.def"
#undef LAC_OP
    LAC_SLOTS
};
extern int lac_profile_on; /* 1: record, 2: watch for NaN (watch.c) */
int lac_profile_add(int slot, const void *args, int device, int64_t start);
int lac_watch_check(const char *name, int slot, const void *args, size_t bytes);

#define LAC_SLOT(status, slot, device, args)                                                                           \
    do {                                                                                                               \
        const lac_backend *slot_b_ = lac_backend_for(device);                                                          \
        if (!slot_b_ || !slot_b_->slot) (status) = lac_backend_missing(#slot, device);                                 \
        else if (__builtin_expect(!lac_profile_on, 1)) (status) = slot_b_->slot(args);                                 \
        else {                                                                                                         \
            int64_t slot_start_ = lac_clock();                                                                         \
            (status) = slot_b_->slot(args);                                                                            \
            if (lac_profile_on & 1) {                                                                                  \
                int slot_end_ = lac_profile_add(LAC_SLOT_##slot, args, device, slot_start_);                           \
                if (!(status)) (status) = slot_end_;                                                                   \
            }                                                                                                          \
            if (lac_profile_on & 2 && !(status))                                                                       \
                (status) = lac_watch_check(#slot, LAC_SLOT_##slot, args, sizeof *(args));                              \
        }                                                                                                              \
        if (__builtin_expect(lac_interrupted(), 0) && !(status))                                                       \
            (status) = lac_fail(LAC_E_INTERRUPTED, "%s: interrupted", #slot);                                          \
    } while (0)
#define LAC_RUN(slot, device, args)                                                                                    \
    do {                                                                                                               \
        int lac_run_status_;                                                                                           \
        LAC_SLOT(lac_run_status_, slot, device, args);                                                                 \
        if (lac_run_status_) return lac_run_status_;                                                                   \
    } while (0)

#endif
