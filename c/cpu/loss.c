/* loss.c: cross-entropy on the CPU, from logits and fused with the output projection.
 *
 * A row's loss is lse - logit[target]; its gradient (softmax - one-hot) g needs only the saved lse, so the softmax is
 * never stored. The fused form computes logits = x w^T + bias a chunk of rows at a time in f32 (f64 for f64), so
 * that for a vocabulary of 50,000 the working memory is a few tens of megabytes instead of the R x V logits and
 * their gradient; the backward recomputes each chunk (one more product), turns it into its gradient in place and
 * multiplies it into dx, dw and dbias. Chunks are taken in order, so the sums have one order.
 * dw of half-precision weights is summed in f32 workspace of w's size and rounded once: adding chunks in bf16 would
 * lose them. Targets are checked before anything is written.
 */
#include "cpu.h"
#include "simd.h"

enum { SUM_BLOCK = 256, CHUNK_ELEMENTS = 1 << 22, BIAS_COLUMNS = 256 };

#define ROW_KERNELS(T, S, EXP, INF)                                                                                    \
    static double row_lse_##S(const T *x, int64_t n)                                                                   \
    {                                                                                                                  \
        T m = -INF;                                                                                                    \
        double total = 0;                                                                                              \
        _Pragma("omp simd reduction(max : m)") for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : m;                \
        for (int64_t at = 0; at < n; at += SUM_BLOCK) {                                                                \
            int64_t end = n - at < SUM_BLOCK ? n : at + SUM_BLOCK;                                                     \
            T s = 0;                                                                                                   \
            _Pragma("omp simd reduction(+ : s)") for (int64_t i = at; i < end; i++) s += EXP(x[i] - m);                \
            total += (double)s;                                                                                        \
        }                                                                                                              \
        return (double)m + log(total);                                                                                 \
    }                                                                                                                  \
    /* y = (exp(x - lse) - [i = target]) g; y may be x */                                                              \
    static void row_gradient_##S(const T *x, double lse, int64_t target, T g, T *y, int64_t n)                         \
    {                                                                                                                  \
        T at_target = (T)(exp((double)x[target] - lse) - 1.0) * g;                                                     \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = EXP((T)((double)x[i] - lse)) * g;                   \
        y[target] = at_target;                                                                                         \
    }
ROW_KERNELS(float, f, v_expf, INFINITY)
ROW_KERNELS(double, d, exp, (double)INFINITY)

/* element i of a statistics vector (f32 or f64) */
static double stat_get(const lac_view *v, int64_t i)
{
    return v->dtype == LAC_F64 ? ((const double *)v->data)[i * v->stride[0]]
                               : (double)((const float *)v->data)[i * v->stride[0]];
}
static void stat_set(const lac_view *v, int64_t i, double value)
{
    if (v->dtype == LAC_F64) ((double *)v->data)[i * v->stride[0]] = value;
    else ((float *)v->data)[i * v->stride[0]] = (float)value;
}

/* ---- one set of rows of logits ---- */

typedef struct {
    const lac_view *logits; /* rows of the tensor, or NULL: */
    void *chunk;            /* dense rows in the compute type */
    int64_t first, rows, n, ignore;
    const int64_t *target; /* [R], checked */
    const lac_view *out, *lse, *g;
    const lac_view *gradient; /* where dlogits goes; NULL: in place */
    int ctype;
    int64_t row_bytes;
    char *workspace;
} loss_job;

static const void *logits_row(const loss_job *job, int64_t r, void *space)
{
    if (job->chunk) return (char *)job->chunk + (size_t)(r * job->n) * lac_compute_size(job->ctype);
    const lac_view *v = job->logits;
    int64_t bytes = lac_bytes_of(v->dtype);
    return LAC_CPU(load)(v->dtype, (char *)v->data + r * v->stride[0] * bytes, v->stride[1] * bytes, job->n, space);
}

static void loss_task(void *context, int64_t begin, int64_t end, int thread)
{
    const loss_job *job = context;
    char *space = job->workspace + job->row_bytes * thread;
    for (int64_t r = begin; r < end; r++) {
        const void *x = logits_row(job, r, space);
        double lse = job->ctype == C_F32 ? row_lse_f(x, job->n) : row_lse_d(x, job->n);
        int64_t row = job->first + r, t = job->target[row];
        stat_set(job->lse, row, lse);
        if (t == job->ignore) stat_set(job->out, row, 0);
        else
            stat_set(job->out, row,
                     lse - (job->ctype == C_F32 ? (double)((const float *)x)[t] : ((const double *)x)[t]));
    }
}

static void gradient_task(void *context, int64_t begin, int64_t end, int thread)
{
    const loss_job *job = context;
    char *space = job->workspace + job->row_bytes * thread;
    for (int64_t r = begin; r < end; r++) {
        const void *x = logits_row(job, r, space);
        int64_t row = job->first + r, t = job->target[row];
        /* in place, or to the output if that is an array of the compute type, or through the buffer */
        char *out =
            job->gradient ? (char *)job->gradient->data + r * job->n * lac_bytes_of(job->gradient->dtype) : NULL;
        void *y = !out ? (void *)(uintptr_t)x : lac_is_native(job->gradient->dtype) ? out : space;
        if (t == job->ignore) {
            memset(y, 0, (size_t)job->n * lac_compute_size(job->ctype));
        } else {
            double lse = stat_get(job->lse, row), g = stat_get(job->g, row);
            if (job->ctype == C_F32) row_gradient_f(x, lse, t, (float)g, y, job->n);
            else row_gradient_d(x, lse, t, g, y, job->n);
        }
        if (out && y != out) LAC_CPU(store)(job->gradient->dtype, y, out, lac_bytes_of(job->gradient->dtype), job->n);
    }
}

static int run_rows(const char *op, loss_job *job, lac_task *task)
{
    int64_t work = job->rows * (job->n + 1) * 4;
    job->row_bytes = (job->n * (int64_t)lac_compute_size(job->ctype) + 63) / 64 * 64;
    job->workspace = NULL;
    if (!job->chunk) {
        job->workspace = lac_workspace_get(op, (size_t)(job->row_bytes * LAC_CPU(threads)(job->rows, work)));
        if (!job->workspace) return LAC_E_MEMORY;
    }
    int status = LAC_CPU(parallel)(op, job->rows, work, task, job);
    lac_workspace_put(job->workspace);
    return status;
}

int LAC_CPU(cross_entropy)(const lac_a_cross_entropy *a)
{
    int64_t *target;
    LAC_TRY(LAC_CPU(indices)("cross_entropy", "target", &a->target, a->logits.shape[1], &a->ignore, &target));
    loss_job job = {.logits = &a->logits,
                    .rows = a->logits.shape[0],
                    .n = a->logits.shape[1],
                    .ignore = a->ignore,
                    .target = target,
                    .out = &a->out,
                    .lse = &a->lse,
                    .ctype = lac_compute_type(a->logits.dtype)};
    int status = run_rows("cross_entropy", &job, loss_task);
    lac_workspace_put(target);
    return status;
}

int LAC_CPU(cross_entropy_bwd)(const lac_a_cross_entropy_bwd *a)
{
    int64_t *target;
    LAC_TRY(LAC_CPU(indices)("cross_entropy_bwd", "target", &a->target, a->logits.shape[1], &a->ignore, &target));
    loss_job job = {.logits = &a->logits,
                    .rows = a->logits.shape[0],
                    .n = a->logits.shape[1],
                    .ignore = a->ignore,
                    .target = target,
                    .lse = &a->lse,
                    .g = &a->g,
                    .gradient = &a->out,
                    .ctype = lac_compute_type(a->logits.dtype)};
    int status = run_rows("cross_entropy_bwd", &job, gradient_task);
    lac_workspace_put(target);
    return status;
}

/* ---- fused with the projection ---- */

/* rows of a chunk: about 16 MB of f32 logits, a multiple of 16 rows; depends on V only */
static int64_t chunk_rows(int64_t asked, int64_t rows, int64_t classes)
{
    int64_t c = asked > 0 ? asked : CHUNK_ELEMENTS / (classes > 0 ? classes : 1) / 16 * 16;
    if (c < 16 && asked <= 0) c = 16;
    return c < rows ? c : rows;
}

/* logits of rows [first, first + rows) into chunk */
static int chunk_logits(const char *op, const lac_view *x, const lac_view *w, const lac_view *bias, int64_t first,
                        int64_t rows, void *chunk)
{
    lac_gemm g = {.m = rows,
                  .n = w->shape[0],
                  .k = x->shape[1],
                  .a = (const char *)x->data + first * x->stride[0] * lac_bytes_of(x->dtype),
                  .a_dtype = x->dtype,
                  .a_rs = x->stride[0],
                  .a_cs = x->stride[1],
                  .b = w->data,
                  .b_dtype = w->dtype,
                  .b_rs = w->stride[1],
                  .b_cs = w->stride[0],
                  .c = chunk,
                  .c_dtype = x->dtype == LAC_F64 ? LAC_F64 : LAC_F32,
                  .ldc = w->shape[0],
                  .bias = bias->data ? bias : NULL};
    return LAC_CPU(gemm)(op, &g);
}

int LAC_CPU(linear_cross_entropy)(const lac_a_linear_ce *a)
{
    const char *op = "linear_cross_entropy";
    int64_t rows = a->x.shape[0], classes = a->w.shape[0], chunk = chunk_rows(a->chunk, rows, classes), *target;
    if (rows == 0) return 0;
    LAC_TRY(LAC_CPU(indices)(op, "target", &a->target, classes, &a->ignore, &target));
    int ctype = lac_compute_type(a->x.dtype), status = 0;
    void *logits = lac_workspace_get(op, (size_t)(chunk * classes) * lac_compute_size(ctype));
    if (!logits) status = LAC_E_MEMORY;
    for (int64_t at = 0; at < rows && !status; at += chunk) {
        int64_t m = rows - at < chunk ? rows - at : chunk;
        loss_job job = {.chunk = logits,
                        .first = at,
                        .rows = m,
                        .n = classes,
                        .ignore = a->ignore,
                        .target = target,
                        .out = &a->out,
                        .lse = &a->lse,
                        .ctype = ctype};
        status = chunk_logits(op, &a->x, &a->w, &a->bias, at, m, logits);
        if (!status) status = run_rows(op, &job, loss_task);
        if (!status && lac_interrupted()) status = lac_fail(LAC_E_INTERRUPTED, "%s: interrupted", op);
    }
    lac_workspace_put(logits);
    lac_workspace_put(target);
    return status;
}

/* sums[j] += column sums of d [rows, n], rows in order */
typedef struct {
    const void *d;
    double *sums;
    int64_t rows, n;
    int ctype;
} bias_job;

static void bias_task(void *context, int64_t begin, int64_t end, int thread)
{
    const bias_job *job = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = t * BIAS_COLUMNS, stop = job->n - first < BIAS_COLUMNS ? job->n : first + BIAS_COLUMNS;
        for (int64_t r = 0; r < job->rows; r++) {
            const float *f = (const float *)job->d + r * job->n;
            const double *d = (const double *)job->d + r * job->n;
            if (job->ctype == C_F32)
                for (int64_t j = first; j < stop; j++) job->sums[j] += (double)f[j];
            else
                for (int64_t j = first; j < stop; j++) job->sums[j] += d[j];
        }
    }
}

typedef struct {
    void *logits, *dw; /* dw: f32 sums of half-precision weights, or NULL */
    double *dbias;
    int64_t *target;
} ce_space;

static int backward_chunk(const lac_a_linear_ce_bwd *a, const ce_space *s, int64_t at, int64_t m)
{
    const char *op = "linear_cross_entropy_bwd";
    int64_t classes = a->w.shape[0], width = a->x.shape[1], xb = lac_bytes_of(a->x.dtype);
    int ctype = lac_compute_type(a->x.dtype), plain = ctype == C_F64 ? LAC_F64 : LAC_F32;
    LAC_TRY(chunk_logits(op, &a->x, &a->w, &a->bias, at, m, s->logits));
    loss_job job = {.chunk = s->logits,
                    .first = at,
                    .rows = m,
                    .n = classes,
                    .ignore = a->ignore,
                    .target = s->target,
                    .lse = &a->lse,
                    .g = &a->g,
                    .ctype = ctype};
    LAC_TRY(run_rows(op, &job, gradient_task));
    lac_gemm dx = {.m = m,
                   .n = width,
                   .k = classes,
                   .a = s->logits,
                   .a_dtype = plain,
                   .a_rs = classes,
                   .a_cs = 1,
                   .b = a->w.data,
                   .b_dtype = a->w.dtype,
                   .b_rs = a->w.stride[0],
                   .b_cs = a->w.stride[1],
                   .c = (char *)a->dx.data + at * width * xb,
                   .c_dtype = a->dx.dtype,
                   .ldc = width};
    LAC_TRY(LAC_CPU(gemm)(op, &dx));
    lac_gemm dw = {.m = classes,
                   .n = width,
                   .k = m,
                   .a = s->logits,
                   .a_dtype = plain,
                   .a_rs = 1,
                   .a_cs = classes,
                   .b = (const char *)a->x.data + at * a->x.stride[0] * xb,
                   .b_dtype = a->x.dtype,
                   .b_rs = a->x.stride[0],
                   .b_cs = a->x.stride[1],
                   .c = s->dw ? s->dw : a->dw.data,
                   .c_dtype = plain,
                   .ldc = width,
                   .accumulate = at > 0};
    LAC_TRY(LAC_CPU(gemm)(op, &dw));
    if (!s->dbias) return 0;
    bias_job sums = {.d = s->logits, .sums = s->dbias, .rows = m, .n = classes, .ctype = ctype};
    return LAC_CPU(parallel)(op, (classes + BIAS_COLUMNS - 1) / BIAS_COLUMNS, m * classes, bias_task, &sums);
}

/* values in the plain type (f32 or f64) or double sums, rounded into a contiguous output */
static void store_sums(const double *sums, const lac_view *out)
{
    int64_t n = out->shape[0], bytes = lac_bytes_of(out->dtype);
    for (int64_t i = 0; i < n; i++) {
        float f = out->dtype == LAC_F32 ? (float)sums[i] : v_round_odd(sums[i]);
        LAC_CPU(store)
        (out->dtype, out->dtype == LAC_F64 ? (const void *)&sums[i] : &f, (char *)out->data + i * bytes, bytes, 1);
    }
}

int LAC_CPU(linear_cross_entropy_bwd)(const lac_a_linear_ce_bwd *a)
{
    const char *op = "linear_cross_entropy_bwd";
    int64_t rows = a->x.shape[0], classes = a->w.shape[0], width = a->x.shape[1];
    int64_t chunk = chunk_rows(a->chunk, rows, classes), cells = classes * width;
    bool half = a->dw.dtype != LAC_F64 && a->dw.dtype != LAC_F32;
    ce_space s = {.dw = NULL};
    int status = LAC_CPU(indices)(op, "target", &a->target, classes, &a->ignore, &s.target);
    if (status) return status;
    s.logits = lac_workspace_get(op, (size_t)(chunk * classes) * 8 + 8);
    if (half) s.dw = lac_workspace_get(op, (size_t)cells * 4 + 8);
    if (a->dbias.data) s.dbias = lac_workspace_get(op, (size_t)classes * 8 + 8);
    if (!s.logits || (half && !s.dw) || (a->dbias.data && !s.dbias)) status = LAC_E_MEMORY;
    if (!status && s.dbias) memset(s.dbias, 0, (size_t)classes * 8);
    if (!status && rows == 0)
        memset(s.dw ? s.dw : a->dw.data, 0, (size_t)cells * (s.dw ? 4 : (size_t)lac_bytes_of(a->dw.dtype)));
    for (int64_t at = 0; at < rows && !status; at += chunk) {
        status = backward_chunk(a, &s, at, rows - at < chunk ? rows - at : chunk);
        if (!status && lac_interrupted()) status = lac_fail(LAC_E_INTERRUPTED, "%s: interrupted", op);
    }
    if (!status && s.dw) LAC_CPU(store)(a->dw.dtype, s.dw, a->dw.data, lac_bytes_of(a->dw.dtype), cells);
    if (!status && s.dbias) store_sums(s.dbias, &a->dbias);
    lac_workspace_put(s.dbias);
    lac_workspace_put(s.dw);
    lac_workspace_put(s.logits);
    lac_workspace_put(s.target);
    return status;
}
