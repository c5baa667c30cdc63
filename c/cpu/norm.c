/* norm.c: softmax and layer normalisation on the CPU.
 *
 * A row is a task: it fits a cache, so the passes over it cost one trip to memory. Rows that are not contiguous in the
 * compute type are gathered into a buffer of the thread, worked on in place, and scattered.
 *
 * softmax: maximum, exponentials and their sum, scaling (Milakov and Gimelshein's online form was rejected: its
 * rescaling serialises the exponentials, and the row is in cache anyway). Sums are kept in double per 256 elements.
 * A row of -inf only has no softmax: it gives NaN, as 0/0 should; callers that mean "no key" must say so.
 * layernorm: mean first, then the variance of the centred values; the sum-of-squares shortcut loses everything when
 * the mean is large. Backward: dx row by row; dgamma and dbeta are sums over rows in blocks of a number that depends
 * on the shape only, in double, combined in order.
 */
#include "cpu.h"
#include "simd.h"

enum { SUM_BLOCK = 256, GAMMA_BLOCKS = 64, GAMMA_ROWS = 16 };

/* ---- row kernels, once per type ---- */

#define ROW_KERNELS(T, S, EXP, INF)                                                                                    \
    static T row_max_##S(const T *x, int64_t n)                                                                        \
    {                                                                                                                  \
        T m = -INF;                                                                                                    \
        _Pragma("omp simd reduction(max : m)") for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : m;                \
        return m;                                                                                                      \
    }                                                                                                                  \
    /* y = exp(x - m), y may be x; returns the sum */                                                                  \
    static double row_exp_##S(const T *x, T m, T *y, int64_t n)                                                        \
    {                                                                                                                  \
        double total = 0;                                                                                              \
        for (int64_t at = 0; at < n; at += SUM_BLOCK) {                                                                \
            int64_t end = n - at < SUM_BLOCK ? n : at + SUM_BLOCK;                                                     \
            T s = 0;                                                                                                   \
            _Pragma("omp simd reduction(+ : s)") for (int64_t i = at; i < end; i++)                                    \
            {                                                                                                          \
                T e = EXP(x[i] - m);                                                                                   \
                y[i] = e;                                                                                              \
                s += e;                                                                                                \
            }                                                                                                          \
            total += (double)s;                                                                                        \
        }                                                                                                              \
        return total;                                                                                                  \
    }                                                                                                                  \
    static void softmax_row_##S(const T *x, T *y, T *scratch, int64_t n, bool logarithm)                               \
    {                                                                                                                  \
        T m = row_max_##S(x, n);                                                                                       \
        if (logarithm) {                                                                                               \
            double lse = (double)m + log(row_exp_##S(x, m, scratch, n));                                               \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = (T)((double)x[i] - lse);                        \
            return;                                                                                                    \
        }                                                                                                              \
        T scale = (T)(1.0 / row_exp_##S(x, m, y, n));                                                                  \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] *= scale;                                             \
    }                                                                                                                  \
    static double row_dot_##S(const T *x, const T *y, int64_t n)                                                       \
    {                                                                                                                  \
        double s = 0;                                                                                                  \
        _Pragma("omp simd reduction(+ : s)") for (int64_t i = 0; i < n; i++) s += (double)x[i] * (double)y[i];         \
        return s;                                                                                                      \
    }                                                                                                                  \
    static void softmax_bwd_row_##S(const T *y, const T *g, T *dx, int64_t n, bool logarithm)                          \
    {                                                                                                                  \
        if (logarithm) {                                                                                               \
            T s = (T)LAC_CPU(sum)(sizeof(T) == 4 ? C_F32 : C_F64, g, n);                                               \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) dx[i] = g[i] - EXP(y[i]) * s;                          \
        } else {                                                                                                       \
            T s = (T)row_dot_##S(y, g, n);                                                                             \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) dx[i] = y[i] * (g[i] - s);                             \
        }                                                                                                              \
    }                                                                                                                  \
    static void layernorm_row_##S(const T *x, const T *gamma, const T *beta, double eps, T *y, T *mean, T *rstd,       \
                                  int64_t n)                                                                           \
    {                                                                                                                  \
        double m = LAC_CPU(sum)(sizeof(T) == 4 ? C_F32 : C_F64, x, n) / (double)n, s = 0;                              \
        _Pragma("omp simd reduction(+ : s)") for (int64_t i = 0; i < n; i++)                                           \
        {                                                                                                              \
            double d = (double)x[i] - m;                                                                               \
            s += d * d;                                                                                                \
        }                                                                                                              \
        double r = 1.0 / sqrt(s / (double)n + eps);                                                                    \
        *mean = (T)m;                                                                                                  \
        *rstd = (T)r;                                                                                                  \
        T scale = (T)r;                                                                                                \
        if (gamma && beta)                                                                                             \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] =                                                 \
                (T)((double)x[i] - m) * scale * gamma[i] + beta[i];                                                    \
        else if (gamma)                                                                                                \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = (T)((double)x[i] - m) * scale * gamma[i];       \
        else                                                                                                           \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] =                                                 \
                (T)((double)x[i] - m) * scale + (beta ? beta[i] : 0);                                                  \
    }                                                                                                                  \
    /* adds to dgamma and dbeta (may be NULL) and writes dx, which may be x */                                         \
    static void layernorm_bwd_row_##S(const T *x, const T *gamma, T mean, T rstd, const T *g, T *dx, double *dgamma,   \
                                      double *dbeta, int64_t n)                                                        \
    {                                                                                                                  \
        double a = 0, b = 0;                                                                                           \
        _Pragma("omp simd reduction(+ : a, b)") for (int64_t i = 0; i < n; i++)                                        \
        {                                                                                                              \
            T w = gamma ? g[i] * gamma[i] : g[i], h = (x[i] - mean) * rstd;                                            \
            a += (double)w;                                                                                            \
            b += (double)w * (double)h;                                                                                \
        }                                                                                                              \
        if (dgamma)                                                                                                    \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) dgamma[i] += (double)(g[i] * ((x[i] - mean) * rstd));  \
        if (dbeta) _Pragma("omp simd") for (int64_t i = 0; i < n; i++) dbeta[i] += (double)g[i];                       \
        T ma = (T)(a / (double)n), mb = (T)(b / (double)n);                                                            \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
        {                                                                                                              \
            T w = gamma ? g[i] * gamma[i] : g[i], h = (x[i] - mean) * rstd;                                            \
            dx[i] = rstd * (w - ma - h * mb);                                                                          \
        }                                                                                                              \
    }
ROW_KERNELS(float, f, v_exp_flushf, INFINITY)
ROW_KERNELS(double, d, exp, (double)INFINITY)

/* ---- softmax ---- */

typedef struct {
    lac_nest nest;        /* the axes that are not normalised: out, x (, g) */
    int64_t n, row_bytes; /* length of a row; bytes of one buffer */
    int64_t stride[3];    /* bytes between a row's elements */
    int dtype, ctype, inputs;
    bool logarithm;
    char *workspace;
} softmax_job;

/* where the result of a row is computed: in place if it is an array of the compute type, else in the buffer */
static void *row_target(const softmax_job *job, char *out, void *buffer)
{
    return lac_is_native(job->dtype) && job->stride[0] == lac_bytes_of(job->dtype) ? out : buffer;
}

static void softmax_task(void *context, int64_t begin, int64_t end, int thread)
{
    const softmax_job *job = context;
    char *space = job->workspace + job->row_bytes * 3 * thread;
    int64_t rows_inner = job->nest.shape[job->nest.ndim - 1];
    lac_cursor c;
    for (int64_t t = begin; t < end; t++) {
        int64_t i = t % rows_inner;
        if (t == begin) LAC_CPU(cursor_set)(&job->nest, &c, t / rows_inner);
        else if (i == 0) lac_cursor_next(&job->nest, &c);
        const int64_t(*stride)[LAC_MAX_DIMS] = job->nest.stride;
        int last = job->nest.ndim - 1;
        char *out = c.at[0] + i * stride[0][last];
        const void *x = LAC_CPU(load)(job->dtype, c.at[1] + i * stride[1][last], job->stride[1], job->n, space);
        void *y = row_target(job, out, space + 2 * job->row_bytes);
        if (job->inputs == 2) {
            const void *g = LAC_CPU(load)(job->dtype, c.at[2] + i * stride[2][last], job->stride[2], job->n,
                                          space + job->row_bytes);
            if (job->ctype == C_F32) softmax_bwd_row_f(x, g, y, job->n, job->logarithm);
            else softmax_bwd_row_d(x, g, y, job->n, job->logarithm);
        } else {
            void *scratch = space + job->row_bytes;
            if (job->ctype == C_F32) softmax_row_f(x, y, scratch, job->n, job->logarithm);
            else softmax_row_d(x, y, scratch, job->n, job->logarithm);
        }
        if (y != out) LAC_CPU(store)(job->dtype, y, out, job->stride[0], job->n);
    }
}

/* views[0] is the output; all have its shape */
static int softmax_run(const char *op, int inputs, const lac_view *const *views, int dim, bool logarithm)
{
    softmax_job job = {.dtype = views[0]->dtype, .inputs = inputs, .logarithm = logarithm};
    job.ctype = lac_compute_type(job.dtype);
    lac_view rest[3];
    const lac_view *list[3];
    int64_t numel = lac_view_numel(views[0]);
    if (numel == 0) return 0;
    for (int v = 0; v <= inputs; v++) {
        rest[v] = *views[v];
        list[v] = &rest[v];
        job.stride[v] = rest[v].stride[dim] * lac_bytes_of(job.dtype);
        rest[v].shape[dim] = 1;
    }
    job.n = views[0]->shape[dim];
    for (int v = 0; v <= inputs; v++)
        if (job.n == 1) job.stride[v] = lac_bytes_of(job.dtype);
    LAC_CPU(nest_make)(&job.nest, inputs + 1, list);
    job.row_bytes = (job.n * (int64_t)lac_compute_size(job.ctype) + 63) / 64 * 64;
    int64_t rows = numel / job.n, work = numel * 4;
    job.workspace = lac_workspace_get(op, (size_t)(3 * job.row_bytes * LAC_CPU(threads)(rows, work)));
    if (!job.workspace) return LAC_E_MEMORY;
    int status = LAC_CPU(parallel)(op, rows, work, softmax_task, &job);
    lac_workspace_put(job.workspace);
    return status;
}

int LAC_CPU(softmax)(const lac_a_softmax *a)
{
    const lac_view *views[] = {&a->out, &a->x};
    return softmax_run("softmax", 1, views, a->dim, a->logarithm);
}

int LAC_CPU(softmax_bwd)(const lac_a_softmax_bwd *a)
{
    const lac_view *views[] = {&a->out, &a->y, &a->g};
    return softmax_run("softmax_bwd", 2, views, a->dim, a->logarithm);
}

/* ---- layernorm ---- */

typedef struct {
    const lac_a_layernorm *f;
    const lac_a_layernorm_bwd *b;
    const void *gamma, *beta; /* in the compute type, or NULL */
    int64_t rows, n, row_bytes, blocks;
    int dtype, ctype;
    char *workspace;        /* three rows per thread */
    double *dgamma, *dbeta; /* [blocks][n], or NULL */
} layernorm_job;

static void layernorm_task(void *context, int64_t begin, int64_t end, int thread)
{
    const layernorm_job *job = context;
    const lac_a_layernorm *a = job->f;
    char *space = job->workspace + 3 * job->row_bytes * thread;
    int64_t n = job->n, size = (int64_t)lac_compute_size(job->ctype);
    for (int64_t t = begin; t < end; t++) {
        const void *x = LAC_CPU(load_linear)(&a->x, t * n, n, space);
        char *out = (char *)a->out.data + t * n * lac_bytes_of(job->dtype); /* contiguous: made by the front end */
        void *y = lac_is_native(job->dtype) ? out : space + job->row_bytes;
        char *mean = (char *)a->mean.data + t * size, *rstd = (char *)a->rstd.data + t * size;
        if (job->ctype == C_F32) layernorm_row_f(x, job->gamma, job->beta, a->eps, y, (float *)mean, (float *)rstd, n);
        else layernorm_row_d(x, job->gamma, job->beta, a->eps, y, (double *)mean, (double *)rstd, n);
        if (y != out) LAC_CPU(store)(job->dtype, y, out, lac_bytes_of(job->dtype), n);
    }
}

/* a vector [n] in the compute type; *own is workspace to give back */
static int load_vector(const char *op, const lac_view *v, int64_t n, const void **out, void **own)
{
    *out = NULL;
    *own = NULL;
    if (!v->data) return 0;
    *own = lac_workspace_get(op, (size_t)n * 8 + 8);
    if (!*own) return LAC_E_MEMORY;
    *out = LAC_CPU(load)(v->dtype, v->data, v->stride[0] * lac_bytes_of(v->dtype), n, *own);
    return 0;
}

static void layernorm_sizes(layernorm_job *job, const lac_view *x)
{
    job->dtype = x->dtype;
    job->ctype = lac_compute_type(x->dtype);
    job->n = x->shape[x->ndim - 1];
    job->rows = job->n ? lac_view_numel(x) / job->n : 0;
    job->row_bytes = (job->n * (int64_t)lac_compute_size(job->ctype) + 63) / 64 * 64;
}

int LAC_CPU(layernorm)(const lac_a_layernorm *a)
{
    layernorm_job job = {.f = a};
    void *own_gamma = NULL, *own_beta = NULL;
    layernorm_sizes(&job, &a->x);
    if (job.rows == 0) return 0;
    int64_t work = job.rows * job.n * 3;
    int status = load_vector("layernorm", &a->gamma, job.n, &job.gamma, &own_gamma);
    if (!status) status = load_vector("layernorm", &a->beta, job.n, &job.beta, &own_beta);
    if (!status) {
        job.workspace = lac_workspace_get("layernorm", (size_t)(3 * job.row_bytes * LAC_CPU(threads)(job.rows, work)));
        if (!job.workspace) status = LAC_E_MEMORY;
    }
    if (!status) status = LAC_CPU(parallel)("layernorm", job.rows, work, layernorm_task, &job);
    lac_workspace_put(job.workspace);
    lac_workspace_put(own_gamma);
    lac_workspace_put(own_beta);
    return status;
}

static void layernorm_bwd_task(void *context, int64_t begin, int64_t end, int thread)
{
    const layernorm_job *job = context;
    const lac_a_layernorm_bwd *a = job->b;
    char *space = job->workspace + 3 * job->row_bytes * thread;
    int64_t n = job->n, size = (int64_t)lac_compute_size(job->ctype);
    for (int64_t t = begin; t < end; t++) {
        double *dgamma = job->dgamma ? job->dgamma + t * n : NULL, *dbeta = job->dbeta ? job->dbeta + t * n : NULL;
        if (dgamma) memset(dgamma, 0, (size_t)n * sizeof(double));
        if (dbeta) memset(dbeta, 0, (size_t)n * sizeof(double));
        int64_t share = job->rows / job->blocks, extra = job->rows % job->blocks;
        int64_t from = t * share + (t < extra ? t : extra), to = from + share + (t < extra);
        for (int64_t r = from; r < to; r++) {
            const void *x = LAC_CPU(load_linear)(&a->x, r * n, n, space);
            const void *g = LAC_CPU(load_linear)(&a->g, r * n, n, space + job->row_bytes);
            char *out = (char *)a->dx.data + r * n * lac_bytes_of(job->dtype);
            void *dx = lac_is_native(job->dtype) ? out : space + 2 * job->row_bytes;
            const char *mean = (const char *)a->mean.data + r * a->mean.stride[0] * size;
            const char *rstd = (const char *)a->rstd.data + r * a->rstd.stride[0] * size;
            if (job->ctype == C_F32)
                layernorm_bwd_row_f(x, job->gamma, *(const float *)mean, *(const float *)rstd, g, dx, dgamma, dbeta, n);
            else
                layernorm_bwd_row_d(x, job->gamma, *(const double *)mean, *(const double *)rstd, g, dx, dgamma, dbeta,
                                    n);
            if (dx != out) LAC_CPU(store)(job->dtype, dx, out, lac_bytes_of(job->dtype), n);
        }
    }
}

/* sums the blocks in order into block 0 and stores it as out [n] */
static void combine_blocks(const layernorm_job *job, double *sums, const lac_view *out)
{
    if (!sums) return;
    int64_t n = job->n, bytes = lac_bytes_of(out->dtype);
    float space[SUM_BLOCK];
    for (int64_t b = 1; b < job->blocks; b++)
        for (int64_t i = 0; i < n; i++) sums[i] += sums[b * n + i];
    for (int64_t at = 0; at < n; at += SUM_BLOCK) {
        int64_t w = n - at < SUM_BLOCK ? n - at : SUM_BLOCK;
        const void *v = sums + at;
        if (job->ctype == C_F32) {
            for (int64_t i = 0; i < w; i++)
                space[i] = job->dtype == LAC_F32 ? (float)sums[at + i] : v_round_odd(sums[at + i]);
            v = space;
        }
        LAC_CPU(store)(out->dtype, v, (char *)out->data + at * bytes, bytes, w);
    }
}

int LAC_CPU(layernorm_bwd)(const lac_a_layernorm_bwd *a)
{
    layernorm_job job = {.b = a};
    void *own = NULL;
    layernorm_sizes(&job, &a->x);
    if (job.n == 0) return 0;
    /* at least one block, so that no rows give sums of zero */
    job.blocks = (job.rows + GAMMA_ROWS - 1) / GAMMA_ROWS;
    if (job.blocks > GAMMA_BLOCKS) job.blocks = GAMMA_BLOCKS;
    if (job.blocks < 1) job.blocks = 1;
    int64_t work = job.rows * job.n * 6, sums = job.blocks * job.n;
    int status = load_vector("layernorm_bwd", &a->gamma, job.n, &job.gamma, &own);
    if (!status) {
        int threads = LAC_CPU(threads)(job.blocks, work);
        size_t rows = (size_t)(3 * job.row_bytes * threads);
        job.workspace = lac_workspace_get("layernorm_bwd", rows + 2 * (size_t)sums * sizeof(double));
        if (!job.workspace) status = LAC_E_MEMORY;
        if (!status && a->dgamma.data) job.dgamma = (double *)(job.workspace + rows);
        if (!status && a->dbeta.data) job.dbeta = (double *)(job.workspace + rows) + sums;
    }
    if (!status) status = LAC_CPU(parallel)("layernorm_bwd", job.blocks, work, layernorm_bwd_task, &job);
    if (!status) {
        combine_blocks(&job, job.dgamma, &a->dgamma);
        combine_blocks(&job, job.dbeta, &a->dbeta);
    }
    lac_workspace_put(job.workspace);
    lac_workspace_put(own);
    return status;
}
