/* optim.c: optimisers and the global norm over lists of tensors, on the CPU.
 *
 * One call covers a whole model: parameters are cut into chunks of 16384 elements, all chunks of all parameters form
 * one list of tasks, so hundreds of small biases cost no more threads or barriers than one large matrix. An update is
 * memory-bound (AdamW reads four streams and writes three) and vectorises as it stands. Each rule is written once for
 * float and double; half parameters go through a block on the stack, or through their f32 master copy.
 *
 * An update is not interruptible: stopped in the middle it would leave a model of which a part is one step ahead, and
 * no checkpoint could be made of that. It takes milliseconds.
 * The norm adds squares in double per chunk; the chunks' sums are added in order, so it does not depend on threads.
 */
#include "cpu.h"
#include "simd.h"
#include <omp.h>

enum { CHUNK = 16384, BLOCK = 512 };

typedef struct {
    const lac_a_optim *a;
    const lac_view *list;
    const int64_t *first; /* [n + 1]: number of the first chunk of every item */
    int64_t n;
    double *sums;                  /* norm: one per chunk */
    double step_scale, root_scale; /* 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t) */
} list_job;

/* the item that chunk t belongs to: the last with first[item] <= t */
static int64_t item_of(const list_job *job, int64_t t)
{
    int64_t low = 0, high = job->n;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (job->first[middle] <= t) low = middle;
        else high = middle;
    }
    return low;
}

/* The rules: n elements of a parameter p with gradient g and moments m, v; p, m and v are updated in place. The
 * gradient of the rule is clamp(g grad_scale, +-grad_limit) + coupled p; NaN stays NaN in every step of every rule. */
#define RULE(name, T)                                                                                                  \
    static void name(const list_job *job, const lac_a_optim_item *item, T *restrict p, const T *restrict g,            \
                     T *restrict m, T *restrict v, int64_t n)
#define GRADIENT(T)                                                                                                    \
    const lac_a_optim *a = job->a;                                                                                     \
    T scale = (T)a->grad_scale, most = a->grad_limit > 0 ? (T)a->grad_limit : (T)INFINITY, lr = (T)item->lr;           \
    T coupled = a->coupled ? (T)item->weight_decay : 0, keep = a->coupled ? 1 : (T)(1 - item->lr * item->weight_decay)
#define READ(T)                                                                                                        \
    T d = g[i] * scale;                                                                                                \
    d = d > most ? most : d;                                                                                           \
    d = d < -most ? -most : d;                                                                                         \
    d += coupled * p[i]

/* Adam (Kingma and Ba 2015, algorithm 1), AdamW (Loshchilov and Hutter 2019, algorithm 2) */
#define ADAMW(name, T, SQRT)                                                                                           \
    RULE(name, T)                                                                                                      \
    {                                                                                                                  \
        GRADIENT(T);                                                                                                   \
        T b1 = (T)a->beta1, b2 = (T)a->beta2, c1 = (T)(1 - a->beta1), c2 = (T)(1 - a->beta2);                          \
        T step = (T)(item->lr * job->step_scale), root = (T)job->root_scale, eps = (T)a->eps;                          \
        (void)lr;                                                                                                      \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
        {                                                                                                              \
            READ(T);                                                                                                   \
            T mi = b1 * m[i] + c1 * d, vi = b2 * v[i] + c2 * (d * d);                                                  \
            m[i] = mi;                                                                                                 \
            v[i] = vi;                                                                                                 \
            p[i] = p[i] * keep - step * mi / (SQRT(vi) * root + eps);                                                  \
        }                                                                                                              \
    }
ADAMW(adamw_f, float, sqrtf)
ADAMW(adamw_d, double, sqrt)

/* SGD with momentum as Sutskever et al. 2013 count it after PyTorch: the learning rate multiplies the velocity. The
 * first step takes the gradient as the velocity, undamped. m is NULL without momentum. */
#define SGD(name, T)                                                                                                   \
    RULE(name, T)                                                                                                      \
    {                                                                                                                  \
        GRADIENT(T);                                                                                                   \
        T mu = (T)a->beta1, take = a->step == 1 ? 1 : (T)(1 - a->dampening);                                           \
        T ahead = a->nesterov ? mu : 1, now = a->nesterov ? 1 : 0;                                                     \
        (void)v;                                                                                                       \
        if (!m) {                                                                                                      \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                        \
            {                                                                                                          \
                READ(T);                                                                                               \
                p[i] = p[i] * keep - lr * d;                                                                           \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
        {                                                                                                              \
            READ(T);                                                                                                   \
            T mi = mu * m[i] + take * d;                                                                               \
            m[i] = mi;                                                                                                 \
            p[i] = p[i] * keep - lr * (ahead * mi + now * d);                                                          \
        }                                                                                                              \
    }
SGD(sgd_f, float)
SGD(sgd_d, double)

/* Lion (Chen et al. 2023, algorithm 2): the sign of an interpolated momentum. The sign of 0 is 0, of NaN NaN. */
#define LION(name, T)                                                                                                  \
    RULE(name, T)                                                                                                      \
    {                                                                                                                  \
        GRADIENT(T);                                                                                                   \
        T b1 = (T)a->beta1, b2 = (T)a->beta2, c1 = (T)(1 - a->beta1), c2 = (T)(1 - a->beta2);                          \
        (void)v;                                                                                                       \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
        {                                                                                                              \
            READ(T);                                                                                                   \
            T c = b1 * m[i] + c1 * d;                                                                                  \
            T s = c > 0 ? 1 : c;                                                                                       \
            s = c < 0 ? -1 : s;                                                                                        \
            m[i] = b2 * m[i] + c2 * d;                                                                                 \
            p[i] = p[i] * keep - lr * s;                                                                               \
        }                                                                                                              \
    }
LION(lion_f, float)
LION(lion_d, double)

typedef void rule_f(const list_job *, const lac_a_optim_item *, float *restrict, const float *restrict, float *restrict,
                    float *restrict, int64_t);
typedef void rule_d(const list_job *, const lac_a_optim_item *, double *restrict, const double *restrict,
                    double *restrict, double *restrict, int64_t);
static rule_f *const RULES_F[] = {[LAC_RULE_ADAMW] = adamw_f, [LAC_RULE_SGD] = sgd_f, [LAC_RULE_LION] = lion_f};
static rule_d *const RULES_D[] = {[LAC_RULE_ADAMW] = adamw_d, [LAC_RULE_SGD] = sgd_d, [LAC_RULE_LION] = lion_d};

/* elements [start, stop) of a parameter in f32 or a half type */
static void update_float(const list_job *job, const lac_a_optim_item *item, int64_t start, int64_t stop)
{
    float params[BLOCK], grads[BLOCK];
    int dtype = item->param.dtype;
    int64_t bytes = lac_bytes_of(dtype), most = dtype == LAC_F32 ? CHUNK : BLOCK;
    float *m = item->m.data, *v = item->v.data, *master = item->master.data;
    for (int64_t at = start; at < stop; at += most) {
        int64_t n = stop - at < most ? stop - at : most;
        char *p = (char *)item->param.data + at * bytes;
        const float *g = LAC_CPU(load)(dtype, (const char *)item->grad.data + at * bytes, bytes, n, grads);
        float *values = master ? master + at : (float *)(uintptr_t)LAC_CPU(load)(dtype, p, bytes, n, params);
        RULES_F[job->a->rule](job, item, values, g, m ? m + at : NULL, v ? v + at : NULL, n);
        if (dtype != LAC_F32) LAC_CPU(store)(dtype, values, p, bytes, n);
    }
}

static void update_chunk(const list_job *job, int64_t t)
{
    int64_t number = item_of(job, t);
    const lac_a_optim_item *item = &job->a->items[number];
    int64_t size = lac_view_numel(&item->param), start = (t - job->first[number]) * CHUNK;
    int64_t stop = size - start < CHUNK ? size : start + CHUNK;
    if (item->param.dtype == LAC_F64) {
        double *m = item->m.data, *v = item->v.data;
        RULES_D[job->a->rule](job, item, (double *)item->param.data + start, (const double *)item->grad.data + start,
                              m ? m + start : NULL, v ? v + start : NULL, stop - start);
    } else {
        update_float(job, item, start, stop);
    }
}

/* counts chunks into first[] and returns it (workspace), with the number of elements */
static int64_t *count_chunks(const char *op, int64_t n, const char *views, size_t step, int64_t *total)
{
    *total = 0; /* also where there is no memory: gcc 13 would warn of the callers' */
    int64_t *first = lac_workspace_get(op, (size_t)(n + 1) * 8);
    if (!first) return NULL;
    first[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t size = lac_view_numel((const lac_view *)(const void *)(views + (size_t)i * step));
        first[i + 1] = first[i] + (size + CHUNK - 1) / CHUNK;
        *total += size;
    }
    return first;
}

int LAC_CPU(optim_many)(const lac_a_optim *a)
{
    int64_t total;
    int64_t *first = count_chunks(a->name, a->n, (const char *)&a->items[0].param, sizeof *a->items, &total);
    if (!first) return LAC_E_MEMORY;
    list_job job = {.a = a, .first = first, .n = a->n};
    if (a->rule == LAC_RULE_ADAMW) {
        job.step_scale = 1 / -expm1((double)a->step * log(a->beta1));
        job.root_scale = 1 / sqrt(-expm1((double)a->step * log(a->beta2)));
    }
    int64_t chunks = first[a->n];
    int threads = LAC_CPU(threads)(chunks, total * 2);
    /* chunks in runs, one a thread, as parallel() would cut them; not parallel(), which stops for an interrupt */
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < chunks; t++) update_chunk(&job, t);
    lac_workspace_put(first);
    return 0;
}

static void norm_task(void *context, int64_t begin, int64_t end, int thread)
{
    const list_job *job = context;
    double space[BLOCK];
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t number = item_of(job, t);
        const lac_view *v = &job->list[number];
        int64_t size = lac_view_numel(v), start = (t - job->first[number]) * CHUNK;
        int64_t stop = size - start < CHUNK ? size : start + CHUNK;
        double total = 0;
        for (int64_t at = start; at < stop; at += BLOCK) {
            int64_t n = stop - at < BLOCK ? stop - at : BLOCK;
            const void *x = LAC_CPU(load_linear)(v, at, n, space);
            double s = 0;
            if (v->dtype == LAC_F64) {
                const double *d = x;
#pragma omp simd reduction(+ : s)
                for (int64_t i = 0; i < n; i++) s += d[i] * d[i];
            } else {
                const float *f = x;
#pragma omp simd reduction(+ : s)
                for (int64_t i = 0; i < n; i++) s += (double)f[i] * (double)f[i];
            }
            total += s;
        }
        job->sums[t] = total;
    }
}

int LAC_CPU(norm_many)(const lac_a_norm *a)
{
    int64_t total;
    int64_t *first = count_chunks("norm", a->n, (const char *)a->items, sizeof *a->items, &total);
    if (!first) return LAC_E_MEMORY;
    list_job job = {.list = a->items, .first = first, .n = a->n};
    int64_t chunks = first[a->n];
    job.sums = lac_workspace_get("norm", (size_t)chunks * 8 + 8);
    int status = job.sums ? LAC_CPU(parallel)("norm", chunks, total, norm_task, &job) : LAC_E_MEMORY;
    if (!status) {
        double sum = 0;
        for (int64_t t = 0; t < chunks; t++) sum += job.sums[t];
        *a->norm = sqrt(sum);
    }
    lac_workspace_put(job.sums);
    lac_workspace_put(first);
    return status;
}
