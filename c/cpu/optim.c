/* optim.c: AdamW and the global norm over lists of tensors, on the CPU.
 *
 * One call covers a whole model: parameters are cut into chunks of 16384 elements, all chunks of all parameters form
 * one list of tasks, so hundreds of small biases cost no more threads or barriers than one large matrix. The update is
 * memory-bound (four streams read, three written) and vectorises as it stands.
 * The norm adds squares in double per chunk; the chunks' sums are added in order, so it does not depend on threads.
 */
#include "cpu.h"
#include "simd.h"

enum { CHUNK = 16384, BLOCK = 512 };

typedef struct {
    const lac_a_adamw *a;
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

/* p, g and the moments of n elements; p is updated in place */
#define ADAMW(name, T, SQRT)                                                                                           \
    static void name(const list_job *job, const lac_a_adamw_item *item, T *p, const T *g, T *m, T *v, int64_t n)       \
    {                                                                                                                  \
        T b1 = (T)job->a->beta1, b2 = (T)job->a->beta2, c1 = (T)(1 - job->a->beta1), c2 = (T)(1 - job->a->beta2);      \
        T keep = (T)(1 - item->lr * item->weight_decay), step = (T)(item->lr * job->step_scale);                       \
        T root = (T)job->root_scale, eps = (T)job->a->eps, scale = (T)job->a->grad_scale;                              \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
        {                                                                                                              \
            T d = g[i] * scale;                                                                                        \
            T mi = b1 * m[i] + c1 * d, vi = b2 * v[i] + c2 * (d * d);                                                  \
            m[i] = mi;                                                                                                 \
            v[i] = vi;                                                                                                 \
            p[i] = p[i] * keep - step * mi / (SQRT(vi) * root + eps);                                                  \
        }                                                                                                              \
    }
ADAMW(adamw_f, float, sqrtf)
ADAMW(adamw_d, double, sqrt)

static void adamw_task(void *context, int64_t begin, int64_t end, int thread)
{
    const list_job *job = context;
    float params[BLOCK], grads[BLOCK];
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t number = item_of(job, t);
        const lac_a_adamw_item *item = &job->a->items[number];
        int dtype = item->param.dtype;
        int64_t size = lac_view_numel(&item->param), start = (t - job->first[number]) * CHUNK;
        int64_t stop = size - start < CHUNK ? size : start + CHUNK, bytes = lac_bytes_of(dtype);
        if (dtype == LAC_F64) {
            adamw_d(job, item, (double *)item->param.data + start, (const double *)item->grad.data + start,
                    (double *)item->m.data + start, (double *)item->v.data + start, stop - start);
            continue;
        }
        for (int64_t at = start; at < stop; at += BLOCK) {
            int64_t n = stop - at < BLOCK ? stop - at : BLOCK;
            char *p = (char *)item->param.data + at * bytes;
            const float *g = LAC_CPU(load)(dtype, (const char *)item->grad.data + at * bytes, bytes, n, grads);
            float *values = (float *)(uintptr_t)LAC_CPU(load)(dtype, p, bytes, n, params);
            adamw_f(job, item, values, g, (float *)item->m.data + at, (float *)item->v.data + at, n);
            LAC_CPU(store)(dtype, values, p, bytes, n);
        }
    }
}

/* counts chunks into first[] and returns it (workspace), with the number of elements */
static int64_t *count_chunks(const char *op, int64_t n, const char *views, size_t step, int64_t *total)
{
    int64_t *first = lac_workspace_get(op, (size_t)(n + 1) * 8);
    if (!first) return NULL;
    first[0] = 0;
    *total = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t size = lac_view_numel((const lac_view *)(const void *)(views + (size_t)i * step));
        first[i + 1] = first[i] + (size + CHUNK - 1) / CHUNK;
        *total += size;
    }
    return first;
}

int LAC_CPU(adamw_many)(const lac_a_adamw *a)
{
    int64_t total;
    int64_t *first = count_chunks("adamw", a->n, (const char *)&a->items[0].param, sizeof *a->items, &total);
    if (!first) return LAC_E_MEMORY;
    list_job job = {.a = a, .first = first, .n = a->n};
    job.step_scale = 1 / -expm1((double)a->step * log(a->beta1));
    job.root_scale = 1 / sqrt(-expm1((double)a->step * log(a->beta2)));
    int status = LAC_CPU(parallel)("adamw", first[a->n], total * 2, adamw_task, &job);
    lac_workspace_put(first);
    return status;
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
