/* profile.c: the recorder of operators: what ran, for how long, how many FLOPs and bytes.
 *
 * Every run of a back end's slot goes through LAC_SLOT (backend.h), so every operator is recorded, also those that are
 * not written yet, and the time is that of the back end alone: checks, allocation and Lua lie between the events. While
 * nothing is recorded the price is one predictable branch; while something is, two readings of the clock and one
 * record. Rejected: sampling (misses short operators, knows no FLOPs), wrapping functions in Lua (hot operators call C
 * directly, and a wrapper would end their traces).
 *
 * Costs follow from the views alone, one line per slot below; the table is made from ops.def, so an operator without a
 * cost does not compile. Bytes are the least traffic possible: each distinct element read once (an expanded axis counts
 * once), each result written once, in place both; caches can make the real traffic smaller than the sum over operators,
 * bad locality larger. FLOPs are those of the formula, as papers count them: a multiply-add is two, a function
 * (exp, tanh, comparison, conversion) one; attention's are the plan's exact count of pairs. So FLOP/s of softmax or
 * layernorm only say something beside those of the same operator.
 *
 * A device that runs behind the host's back is waited for after every operator while something is recorded: an event's
 * time is then the operator's, its launch included, and what a queue would have hidden shows as host time. Rejected:
 * pairs of the device's own events, which keep the overlap but need a second clock and leave open who waited for whom.
 */
#include "op_front.h"
#include "plan.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    double flops;
    int64_t bytes;
    const char *function;
} cost;

/* ---- sizes of views ---- */

static int64_t all(const lac_view *v) { return v->data ? lac_view_numel(v) : 0; }

/* bytes of the distinct elements: an axis of stride 0 shows the same ones again */
static int64_t bytes_of(const lac_view *v)
{
    int64_t n = v->data ? (int64_t)lac_dtype_size(v->dtype) : 0;
    for (int i = 0; v->data && i < v->ndim; i++)
        if (v->stride[i] != 0 || v->shape[i] == 0) n *= v->shape[i];
    return n;
}

static int64_t bytes_list(const lac_view *const *list)
{
    int64_t n = 0;
    for (; *list; list++) n += bytes_of(*list);
    return n;
}
#define BYTES(...) bytes_list((const lac_view *const[]){__VA_ARGS__, NULL})

/* by the formulas in cpu/optim.c */
static double optim_flops(const lac_a_optim *a)
{
    double n = 0, each = a->rule == LAC_RULE_ADAMW ? 15 : a->rule == LAC_RULE_LION ? 12 : a->beta1 > 0 ? 9 : 5;
    for (int64_t i = 0; i < a->n; i++) n += (double)all(&a->items[i].param);
    return n * each;
}

/* parameter and moments are read and written; beside a master copy the parameter is only written */
static int64_t optim_bytes(const lac_a_optim *a)
{
    int64_t n = 0;
    for (int64_t i = 0; i < a->n; i++) {
        const lac_a_optim_item *e = a->items + i;
        n += 2 * BYTES(&e->m, &e->v, &e->master) + BYTES(&e->param, &e->grad);
        if (!e->master.data) n += bytes_of(&e->param);
    }
    return n;
}

static int64_t norm_sum(const lac_a_norm *a, int64_t (*size)(const lac_view *))
{
    int64_t n = 0;
    for (int64_t i = 0; i < a->n; i++) n += size(a->items + i);
    return n;
}

static double last(const lac_view *v) { return v->ndim > 0 ? (double)v->shape[v->ndim - 1] : 1; }
/* rows times classes of the losses */
static double logits_of(const lac_view *logits) { return (double)all(logits); }
static double cells_of(const lac_view *x, const lac_view *w) { return (double)x->shape[0] * (double)w->shape[0]; }

/* ---- one cost for each slot ---- */

#define COST(name, args, ...)                                                                                          \
    static cost cost_##name(const args *a) { return (cost){__VA_ARGS__}; }
/* clang-format off */
COST(fill, lac_a_fill, .bytes = BYTES(&a->x))
COST(copy, lac_a_copy, .bytes = BYTES(&a->x, &a->out))
COST(arange, lac_a_arange, .bytes = BYTES(&a->out))
COST(map1, lac_a_map1, .flops = all(&a->out), .bytes = BYTES(&a->x, &a->out), .function = lac_map_name(1, a->fn))
/* the derivative, times g; which of x and y the function reads is its own affair: one of them is counted */
COST(map1_bwd, lac_a_map1_bwd, .flops = 2.0 * all(&a->out), .bytes = BYTES(&a->x, &a->g, &a->out),
     .function = lac_map_name(1, a->fn))
COST(map2, lac_a_map2, .flops = all(&a->out), .bytes = BYTES(&a->x, &a->y, &a->out), .function = lac_map_name(2, a->fn))
COST(map2_bwd, lac_a_map2_bwd, .flops = 2.0 * (all(&a->out) + all(&a->out2)),
     .bytes = BYTES(&a->x, &a->y, &a->g, &a->out, &a->out2), .function = lac_map_name(2, a->fn))
COST(mapp, lac_a_mapp, .flops = (a->g.data ? 2.0 : 1.0) * all(&a->out), .bytes = BYTES(&a->x, &a->g, &a->out),
     .function = lac_map_name(0, a->fn))
COST(map3, lac_a_map3, .flops = (a->g.data ? 3.0 : 2.0) * all(&a->out), .bytes = BYTES(&a->x, &a->y, &a->z, &a->g, &a->out),
     .function = lac_map_name(3, a->fn))
COST(where, lac_a_where, .bytes = BYTES(&a->cond, &a->x, &a->y, &a->out))
COST(axpy, lac_a_axpy, .flops = (a->x.data ? 2.0 : 1.0) * all(&a->dst), .bytes = BYTES(&a->x, &a->dst, &a->dst))
COST(reduce, lac_a_reduce, .flops = all(&a->x), .bytes = BYTES(&a->x, &a->out), .function = lac_reduce_name(a->fn))
COST(softmax, lac_a_softmax, .flops = 5.0 * all(&a->out), .bytes = BYTES(&a->x, &a->out),
     .function = a->logarithm ? "log_softmax" : "softmax")
COST(softmax_bwd, lac_a_softmax_bwd, .flops = 4.0 * all(&a->out), .bytes = BYTES(&a->y, &a->g, &a->out),
     .function = a->logarithm ? "log_softmax" : "softmax")
/* a term of a log-sum-exp is an exponential and its sum, and every result a logarithm */
COST(scan, lac_a_scan, .flops = (a->fn == LAC_LOGCUMSUMEXP ? 4.0 : 1.0) * all(&a->out),
     .bytes = BYTES(&a->x, &a->out, &a->index), .function = lac_scan_name(a->fn))
COST(scan_bwd, lac_a_scan_bwd, .flops = (a->fn == LAC_LOGCUMSUMEXP ? 5.0 : 3.0) * all(&a->dx),
     .bytes = BYTES(&a->x, &a->y, &a->g, &a->dx), .function = lac_scan_name(a->fn))
COST(matmul, lac_a_matmul, .flops = 2.0 * all(&a->out) * last(&a->a) + (a->bias.data ? all(&a->out) : 0),
     .bytes = BYTES(&a->a, &a->b, &a->bias, &a->out))
COST(linear_act, lac_a_linear_act, .flops = 2.0 * all(&a->out) * (last(&a->x) + 1),
     .bytes = BYTES(&a->x, &a->w, &a->bias, &a->pre, &a->out))
COST(linear_act_bwd, lac_a_linear_act_bwd, .flops = 2.0 * all(&a->out) * (last(&a->g) + 1),
     .bytes = BYTES(&a->g, &a->w, &a->pre, &a->out, &a->sums, &a->act))
COST(weight_grad, lac_a_weight_grad, .flops = (2.0 * last(&a->x) + (a->sums.data ? 1 : 0)) * all(&a->g),
     .bytes = BYTES(&a->g, &a->x, &a->dw, &a->sums))
COST(layernorm, lac_a_layernorm, .flops = 8.0 * all(&a->out),
     .bytes = BYTES(&a->x, &a->gamma, &a->beta, &a->out, &a->mean, &a->rstd))
COST(layernorm_bwd, lac_a_layernorm_bwd, .flops = 13.0 * all(&a->x),
     .bytes = BYTES(&a->x, &a->gamma, &a->mean, &a->rstd, &a->g, &a->dx, &a->dgamma, &a->dbeta))
COST(residual_norm, lac_a_residual_norm, .flops = 10.0 * all(&a->out),
     .bytes = BYTES(&a->x, &a->h, &a->gamma, &a->beta, &a->sum, &a->out, &a->mean, &a->rstd))
COST(residual_norm_bwd, lac_a_residual_norm_bwd, .flops = 15.0 * all(&a->dx),
     .bytes = BYTES(&a->sum, &a->gamma, &a->mean, &a->rstd, &a->g, &a->g_sum, &a->dx, &a->dh, &a->dgamma, &a->dbeta))
COST(gelu_norm, lac_a_gelu_norm, .flops = 9.0 * all(&a->out),
     .bytes = BYTES(&a->x, &a->gamma, &a->beta, &a->act, &a->out, &a->mean, &a->rstd))
COST(gelu_norm_bwd, lac_a_gelu_norm_bwd, .flops = 15.0 * all(&a->dx),
     .bytes = BYTES(&a->x, &a->act, &a->gamma, &a->mean, &a->rstd, &a->g, &a->dx, &a->dgamma, &a->dbeta, &a->out,
                    &a->sums))
COST(rmsnorm, lac_a_rmsnorm, .flops = 5.0 * all(&a->out), .bytes = BYTES(&a->x, &a->gamma, &a->out, &a->rstd))
COST(rmsnorm_bwd, lac_a_rmsnorm_bwd, .flops = 10.0 * all(&a->x),
     .bytes = BYTES(&a->x, &a->gamma, &a->rstd, &a->g, &a->dx, &a->dgamma))
/* channels and positions that each result sees: w [O, C / groups, K] */
COST(conv1d, lac_a_conv1d, .flops = 2.0 * all(&a->out) * (double)(a->w.shape[1] * a->w.shape[2]),
     .bytes = BYTES(&a->x, &a->w, &a->bias, &a->out))
COST(conv1d_bwd, lac_a_conv1d_bwd,
     .flops = 2.0 * all(&a->g) * (double)(a->w.shape[1] * a->w.shape[2]) * ((a->dx.data != NULL) + (a->dw.data != NULL)),
     .bytes = BYTES(&a->x, &a->w, &a->g, &a->dx, &a->dw))
COST(cross_entropy, lac_a_cross_entropy, .flops = 4.0 * logits_of(&a->logits),
     .bytes = BYTES(&a->logits, &a->target, &a->out, &a->lse))
COST(cross_entropy_bwd, lac_a_cross_entropy_bwd, .flops = 3.0 * logits_of(&a->logits),
     .bytes = BYTES(&a->logits, &a->target, &a->lse, &a->g, &a->out))
COST(loss_mean, lac_a_loss_mean, .flops = 2.0 * all(&a->losses), .bytes = BYTES(&a->losses, &a->target, &a->out))
COST(linear_cross_entropy, lac_a_linear_ce, .flops = cells_of(&a->x, &a->w) * (2 * last(&a->x) + 4),
     .bytes = BYTES(&a->x, &a->w, &a->bias, &a->target, &a->out, &a->lse))
/* the logits (again), then dx and dw */
COST(linear_cross_entropy_bwd, lac_a_linear_ce_bwd,
     .flops = cells_of(&a->x, &a->w) * (6 * last(&a->x) + (a->out.data ? 8 : 4)),
     .bytes = BYTES(&a->x, &a->w, &a->bias, &a->target, &a->lse, &a->g, &a->dx, &a->dw, &a->dbias, &a->out))
/* what is read of the table is what is written */
COST(index_select, lac_a_index, .bytes = bytes_of(&a->index) + 2 * bytes_of(&a->out))
COST(index_select_bwd, lac_a_index_bwd, .flops = all(&a->g), .bytes = BYTES(&a->g, &a->index, &a->out))
COST(gather, lac_a_index, .bytes = bytes_of(&a->index) + 2 * bytes_of(&a->out))
COST(gather_bwd, lac_a_index_bwd, .flops = all(&a->g), .bytes = BYTES(&a->g, &a->index, &a->out))
/* reductions read and write what they reach; SET writes only that */
COST(scatter, lac_a_scatter, .flops = a->mode ? all(&a->index) : 0, .bytes = BYTES(&a->index, &a->src, &a->src))
COST(index_put, lac_a_index_put, .flops = a->mode ? 2.0 * all(&a->src) : 0,
     .bytes = bytes_of(&a->index) + (a->mode ? 3 : 2) * bytes_of(&a->src))
COST(pad, lac_a_pad, .bytes = BYTES(&a->x, &a->out))
COST(pad_bwd, lac_a_pad_bwd, .flops = all(&a->g), .bytes = BYTES(&a->g, &a->out))
COST(sort, lac_a_sort, .bytes = BYTES(&a->x, &a->values, &a->index))
COST(topk, lac_a_sort, .bytes = BYTES(&a->x, &a->values, &a->index))
COST(searchsorted, lac_a_searchsorted, .bytes = BYTES(&a->sorted, &a->values, &a->out))
COST(runs, lac_a_runs, .bytes = BYTES(&a->sorted, &a->order, &a->inverse))
COST(nonzero, lac_a_nonzero, .bytes = BYTES(&a->x, &a->out))
COST(rope, lac_a_rope, .flops = 3.0 * all(&a->out), .bytes = BYTES(&a->x, &a->positions, &a->out))
COST(random, lac_a_random, .bytes = BYTES(&a->out))
COST(multinomial, lac_a_multinomial, .flops = 2.0 * all(&a->weights), .bytes = BYTES(&a->weights, &a->out))
COST(dropout, lac_a_dropout, .flops = all(&a->out), .bytes = BYTES(&a->x, &a->out))
COST(optim_many, lac_a_optim, .flops = optim_flops(a), .bytes = optim_bytes(a), .function = a->name)
COST(norm_many, lac_a_norm, .flops = 2.0 * norm_sum(a, all), .bytes = norm_sum(a, bytes_of))
/* read twice: for its scale, and to be rounded */
COST(e4m3, lac_a_e4m3, .flops = 4.0 * all(&a->x), .bytes = bytes_of(&a->x) + BYTES(&a->x, &a->scale, &a->values))
COST(attend, lac_a_attend, .flops = a->plan->info.flops_forward,
     .bytes = BYTES(&a->q, &a->k, &a->v, &a->padding, &a->lengths, &a->mask, &a->bias, &a->out, &a->lse,
                    &a->branch_lse))
COST(attend_bwd, lac_a_attend_bwd, .flops = a->forward.plan->info.flops_backward,
     .bytes = BYTES(&a->forward.q, &a->forward.k, &a->forward.v, &a->forward.padding, &a->forward.lengths,
                    &a->forward.mask, &a->forward.bias, &a->dbias,
                    &a->forward.out, &a->forward.lse, &a->forward.branch_lse, &a->dout, &a->dlse, &a->dq, &a->dk,
                    &a->dv))
/* clang-format on */

#define LAC_OP(name, args, gradient)                                                                                   \
    static cost untyped_##name(const void *a) { return cost_##name((const args *)a); }
#include "ops.def"
#undef LAC_OP

static cost (*const costs[LAC_SLOTS])(const void *) = {
#define LAC_OP(name, args, gradient) untyped_##name,
#include "ops.def"
#undef LAC_OP
};
static const char *const slot_names[LAC_SLOTS] = {
#define LAC_OP(name, args, gradient) #name,
#include "ops.def"
#undef LAC_OP
};

const char *lac_op_name(int op) { return op >= 0 && op < LAC_SLOTS ? slot_names[op] : NULL; }

/* ---- records ---- */

enum { CHUNK = 1024 };
static int64_t lost;

int64_t lac_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void *lac_records_push(lac_records *list)
{
    int64_t chunk = list->count / CHUNK;
    if (list->count % CHUNK == 0) {
        char **more = realloc(list->chunks, sizeof *more * (size_t)(chunk + 1));
        if (more) list->chunks = more;
        char *fresh = more ? malloc(list->size * CHUNK) : NULL;
        if (!fresh) {
            __atomic_add_fetch(&lost, 1, __ATOMIC_RELAXED);
            return NULL;
        }
        more[chunk] = fresh;
    }
    return list->chunks[chunk] + list->size * (size_t)(list->count++ % CHUNK);
}

int64_t lac_records_read(const lac_records *list, int64_t first, int64_t n, void *out)
{
    if (first < 0 || n < 0 || !out) return 0;
    int64_t got = 0;
    for (; got < n && first + got < list->count; got++) {
        int64_t i = first + got;
        memcpy((char *)out + list->size * (size_t)got, list->chunks[i / CHUNK] + list->size * (size_t)(i % CHUNK),
               list->size);
    }
    return got;
}

void lac_records_clear(lac_records *list)
{
    for (int64_t i = 0; i * CHUNK < list->count; i++) free(list->chunks[i]);
    free(list->chunks);
    list->chunks = NULL;
    list->count = 0;
}

/* ---- the recorder ---- */

int lac_profile_on;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static lac_records events = {.size = sizeof(lac_profile_event)};

int lac_profile_add(int slot, const void *args, int device, int64_t start)
{
    const lac_runtime *runtime = lac_backend_for(device)->runtime;
    int status = runtime ? runtime->synchronize() : 0;
    int64_t end = lac_clock();
    cost c = costs[slot](args);
    pthread_mutex_lock(&lock);
    lac_profile_event *event = lac_records_push(&events);
    if (event)
        *event = (lac_profile_event){.start = start,
                                     .end = end,
                                     .flops = c.flops,
                                     .bytes = c.bytes,
                                     .op = slot_names[slot],
                                     .function = c.function,
                                     .device = device,
                                     .tag = lac_flags_global.tag};
    pthread_mutex_unlock(&lock);
    return status;
}

int lac_profile(int on)
{
    pthread_mutex_lock(&lock);
    if (on) lac_records_clear(&events);
    lac_profile_on = (lac_profile_on & ~1) | (on > 0);
    pthread_mutex_unlock(&lock);
    return 0;
}

int64_t lac_profile_events(int64_t first, int64_t n, lac_profile_event *out)
{
    pthread_mutex_lock(&lock);
    int64_t got = lac_records_read(&events, first, n, out);
    pthread_mutex_unlock(&lock);
    return got;
}

int64_t lac_profile_lost(void) { return __atomic_load_n(&lost, __ATOMIC_RELAXED); }
