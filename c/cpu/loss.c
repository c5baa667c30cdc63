/* loss.c: cross-entropy on the CPU, from logits and fused with the output projection.
 *
 * A row's loss is lse - logit[target]; its gradient (softmax - one-hot) g needs only the saved lse, so the softmax is
 * never stored. The fused form computes logits = x w^T + bias a chunk of rows at a time in f32 (f64 for f64), so
 * that for a vocabulary of 50,000 the working memory is a few tens of megabytes instead of the R x V logits and
 * their gradient; the backward recomputes each chunk (one more product), turns it into its gradient in place and
 * multiplies it into dx, dw and dbias. Chunks are taken in order, so the sums have one order.
 * dw of half-precision weights is summed in f32 workspace of w's size and rounded once: adding chunks in bf16 would
 * lose them. Targets are checked before anything is written.
 *
 * With class weights w and smoothing e the row's target is q_c = w_c ((1 - e) t_c + e / V), Q its sum: the loss is
 * Q lse - sum q_c x_c and the gradient (Q softmax_c - q_c) g. For a class as the target that is e / V times one dot
 * product of w and x (or a sum of x) and a correction at one place; t as a tensor is read along with the logits.
 * lse is taken off in two floats, so that no value has to pass through double.
 *
 * lse goes through a row once, in blocks that stay in the first cache between their maximum and their exponentials.
 * The fixed steps of a block are dear: with 512 elements instead of 4096 it takes about 1.4 times as long (AVX-512).
 */
#include "cpu.h"
#include "rows.h"

enum {
    SUM_BLOCK = 512,
    LSE_BLOCK = 4096,
    STREAM_BLOCK = 1024,
    STREAM_BYTES = 1 << 24,
    CHUNK_ELEMENTS = 1 << 22,
    BIAS_COLUMNS = 256
};

#define ROW_KERNELS(T, S, EXP, INF)                                                                                    \
    static double row_lse_##S(const T *x, int64_t n)                                                                   \
    {                                                                                                                  \
        T m = -INF;                                                                                                    \
        double total = 0;                                                                                              \
        for (int64_t at = 0; at < n; at += LSE_BLOCK) {                                                                \
            int64_t count = n - at < LSE_BLOCK ? n - at : LSE_BLOCK;                                                   \
            T top = row_max_##S(x + at, count);                                                                        \
            if (top > m) {                                                                                             \
                total *= exp((double)m - (double)top);                                                                 \
                m = top;                                                                                               \
            }                                                                                                          \
            /* nothing but -inf so far, or NaN, which must come through */                                             \
            total += row_exp_##S(x + at, m == -INF ? 0 : m, NULL, count);                                              \
        }                                                                                                              \
        return (double)m + log(total);                                                                                 \
    }                                                                                                                  \
    /* y = (q exp(x - lse) - r w) g, w NULL: 1; y may be x */                                                          \
    static void row_gradient_##S(const T *x, const T *w, double lse, double q, double r, double g, T *y, int64_t n)    \
    {                                                                                                                  \
        T high = (T)lse, low = (T)(lse - (double)high), a = (T)(q * g), b = (T)(r * g);                                \
        if (!w) _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = EXP((x[i] - high) - low) * a - b;           \
        else _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = EXP((x[i] - high) - low) * a - b * w[i];       \
    }                                                                                                                  \
    /* y = (q exp(x - lse) - w t) g; y may be x or t */                                                                \
    static void row_soft_gradient_##S(const T *x, const T *t, double lse, double q, double g, T *y, int64_t n)         \
    {                                                                                                                  \
        T high = (T)lse, low = (T)(lse - (double)high), a = (T)(q * g), b = (T)g;                                      \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = EXP((x[i] - high) - low) * a - t[i] * b;            \
    }                                                                                                                  \
    /* sum of x, or of x w */                                                                                          \
    static double row_dot_##S(const T *x, const T *w, int64_t n)                                                       \
    {                                                                                                                  \
        double total = 0;                                                                                              \
        for (int64_t at = 0; at < n; at += SUM_BLOCK) {                                                                \
            int64_t end = n - at < SUM_BLOCK ? n : at + SUM_BLOCK;                                                     \
            T s = 0;                                                                                                   \
            if (!w) _Pragma("omp simd reduction(+ : s)") for (int64_t i = at; i < end; i++) s += x[i];                 \
            else _Pragma("omp simd reduction(+ : s)") for (int64_t i = at; i < end; i++) s += x[i] * w[i];             \
            total += (double)s;                                                                                        \
        }                                                                                                              \
        return total;                                                                                                  \
    }                                                                                                                  \
    /* t = w (t (1 - e) + e / n) */                                                                                    \
    static void row_target_##S(const T *t, const T *w, double e, T *y, int64_t n)                                      \
    {                                                                                                                  \
        T keep = (T)(1 - e), share = (T)(e / (double)n);                                                               \
        for (int64_t i = 0; i < n; i++) y[i] = (t[i] * keep + share) * (w ? w[i] : 1);                                 \
    }
ROW_KERNELS(float, f, v_exp_termf, INFINITY)
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
    int64_t first, rows, n;
    const lac_loss *loss;
    const int64_t *target; /* [R], checked; or NULL: */
    const lac_view *soft;  /* [R, V] */
    const void *weight;    /* [V] in the compute type, or NULL */
    double weight_sum;
    const lac_view *out, *lse, *g;
    const lac_view *gradient; /* where dlogits goes; NULL: in place */
    int ctype;
    int64_t row_bytes;
    char *workspace; /* per thread: a row of logits, and one of targets */
} loss_job;

static const void *logits_row(const loss_job *job, int64_t r, void *space)
{
    if (job->chunk) return (char *)job->chunk + (size_t)(r * job->n) * lac_compute_size(job->ctype);
    const lac_view *v = job->logits;
    int64_t bytes = lac_bytes_of(v->dtype);
    return LAC_CPU(load)(v->dtype, (char *)v->data + r * v->stride[0] * bytes, v->stride[1] * bytes, job->n, space);
}

static double value_at(const loss_job *job, const void *row, int64_t i)
{
    return job->ctype == C_F32 ? (double)((const float *)row)[i] : ((const double *)row)[i];
}

static double dot_row(const loss_job *job, const void *x, const void *w)
{
    return job->ctype == C_F32 ? row_dot_f(x, w, job->n) : row_dot_d(x, w, job->n);
}

/* what stands in the loss for row's target: q at the class, and r w_c everywhere (r = smoothing / V) */
static double class_weight(const loss_job *job, int64_t t, double *r)
{
    *r = job->loss->smoothing / (double)job->n;
    return (1 - job->loss->smoothing) * (job->weight ? value_at(job, job->weight, t) : 1);
}

/* row r of the probabilities with weights and smoothing, in `space` unless nothing has to be done */
static const void *soft_row(const loss_job *job, int64_t r, void *space)
{
    const lac_view *v = job->soft;
    int64_t bytes = lac_bytes_of(v->dtype);
    const char *at = (const char *)v->data + r * v->stride[0] * bytes;
    const void *t = LAC_CPU(load)(v->dtype, at, v->stride[1] * bytes, job->n, space);
    if (!job->weight && job->loss->smoothing == 0) return t;
    if (job->ctype == C_F32) row_target_f(t, job->weight, job->loss->smoothing, space, job->n);
    else row_target_d(t, job->weight, job->loss->smoothing, space, job->n);
    return space;
}

static void loss_task(void *context, int64_t begin, int64_t end, int thread)
{
    const loss_job *job = context;
    char *space = job->workspace + 2 * job->row_bytes * thread;
    for (int64_t r = begin; r < end; r++) {
        const void *x = logits_row(job, r, space);
        double lse = job->ctype == C_F32 ? row_lse_f(x, job->n) : row_lse_d(x, job->n), loss, share;
        int64_t row = job->first + r;
        stat_set(job->lse, row, lse);
        if (job->soft) {
            const void *t = soft_row(job, r, space + job->row_bytes);
            loss = dot_row(job, t, NULL) * lse - dot_row(job, x, t);
        } else if (job->target[row] == job->loss->ignore) {
            loss = 0;
        } else {
            int64_t t = job->target[row];
            double q = class_weight(job, t, &share);
            loss = q * (lse - value_at(job, x, t));
            if (share > 0) loss += share * (job->weight_sum * lse - dot_row(job, x, job->weight));
        }
        stat_set(job->out, row, loss);
    }
}

/* what the gradient of one row is made of */
typedef struct {
    double lse, g, all, share, at_target;
    int64_t target; /* -1: probabilities; -2: ignored */
    const void *soft, *weight;
} row_rule;

static row_rule rule_of(const loss_job *job, int64_t r, const void *x, char *space)
{
    int64_t row = job->first + r;
    row_rule rule = {.lse = stat_get(job->lse, row), .g = stat_get(job->g, row), .target = -1};
    if (job->soft) {
        rule.soft = soft_row(job, r, space);
        rule.all = dot_row(job, rule.soft, NULL);
        return rule;
    }
    rule.target = job->target[row];
    if (rule.target == job->loss->ignore) {
        rule.target = -2;
        return rule;
    }
    double q = class_weight(job, rule.target, &rule.share);
    double own = rule.share * (job->weight ? value_at(job, job->weight, rule.target) : 1);
    rule.all = q + rule.share * job->weight_sum;
    rule.at_target = (rule.all * exp(value_at(job, x, rule.target) - rule.lse) - q - own) * rule.g;
    rule.weight = rule.share > 0 ? job->weight : NULL;
    return rule;
}

static const char *part_of(const void *row, int64_t bytes) { return row ? (const char *)row + bytes : NULL; }

/* classes [at, at + m) of the row's gradient; y may be that part of x */
static void gradient_part(const loss_job *job, const row_rule *rule, const void *x, int64_t at, int64_t m, void *y)
{
    int64_t size = (int64_t)lac_compute_size(job->ctype);
    const void *from = part_of(x, at * size), *t = part_of(rule->soft, at * size),
               *w = part_of(rule->weight, at * size);
    bool single = job->ctype == C_F32;
    if (rule->target == -2) memset(y, 0, (size_t)(m * size));
    else if (rule->target == -1 && single) row_soft_gradient_f(from, t, rule->lse, rule->all, rule->g, y, m);
    else if (rule->target == -1) row_soft_gradient_d(from, t, rule->lse, rule->all, rule->g, y, m);
    else if (single) row_gradient_f(from, w, rule->lse, rule->all, rule->share, rule->g, y, m);
    else row_gradient_d(from, w, rule->lse, rule->all, rule->share, rule->g, y, m);
    if (rule->target < at || rule->target >= at + m) return;
    if (single) ((float *)y)[rule->target - at] = (float)rule->at_target;
    else ((double *)y)[rule->target - at] = rule->at_target;
}

static void gradient_task(void *context, int64_t begin, int64_t end, int thread)
{
    const loss_job *job = context;
    int64_t n = job->n, bytes = job->gradient ? lac_bytes_of(job->gradient->dtype) : 0;
    char *space = job->workspace + 2 * job->row_bytes * thread;
    double block[STREAM_BLOCK];
    /* a result beyond the caches is written past them: reading its lines first would cost a third of the traffic */
    bool stream = job->gradient && lac_is_native(job->gradient->dtype) && job->rows * n * bytes > STREAM_BYTES;
    for (int64_t r = begin; r < end; r++) {
        const void *x = logits_row(job, r, space);
        row_rule rule = rule_of(job, r, x, space + job->row_bytes);
        char *out = job->gradient ? (char *)job->gradient->data + r * n * bytes : NULL;
        if (stream) {
            for (int64_t at = 0; at < n; at += STREAM_BLOCK) {
                int64_t m = n - at < STREAM_BLOCK ? n - at : STREAM_BLOCK;
                v_prefetch((const char *)x + (at + m) * bytes, m * bytes);
                gradient_part(job, &rule, x, at, m, block);
                v_stream(out + at * bytes, block, (size_t)(m * bytes));
            }
            continue;
        }
        /* in place, or to the output if that is an array of the compute type, or through the buffer */
        void *y = !out ? (void *)(uintptr_t)x : lac_is_native(job->gradient->dtype) ? out : space;
        gradient_part(job, &rule, x, 0, n, y);
        if (out && y != out) LAC_CPU(store)(job->gradient->dtype, y, out, bytes, n);
    }
    if (stream) v_stream_end();
}

static int run_rows(const char *op, loss_job *job, lac_task *task)
{
    int64_t work = job->rows * (job->n + 1) * 4;
    job->row_bytes = (job->n * (int64_t)lac_compute_size(job->ctype) + 63) / 64 * 64;
    job->workspace = lac_workspace_get(op, (size_t)(2 * job->row_bytes * LAC_CPU(threads)(job->rows, work)));
    if (!job->workspace) return LAC_E_MEMORY;
    int status = LAC_CPU(parallel)(op, job->rows, work, task, job);
    lac_workspace_put(job->workspace);
    return status;
}

/* the parts of a job that come from the loss's own arguments: weights in the compute type, classes checked */
static int loss_begin(const char *op, loss_job *job, const lac_loss *loss, const lac_view *target, int64_t classes,
                      int64_t **list, void **weight)
{
    *list = NULL;
    *weight = NULL;
    job->loss = loss;
    job->n = classes;
    if (lac_dtype_is_float(target->dtype)) job->soft = target;
    else LAC_TRY(LAC_CPU(indices)(op, "target", target, classes, &loss->ignore, list));
    job->target = *list;
    job->weight_sum = (double)classes;
    if (!loss->weight.data) return 0;
    *weight = lac_workspace_get(op, (size_t)classes * 8);
    if (!*weight) return lac_workspace_put(*list), *list = NULL, LAC_E_MEMORY;
    const void *v = LAC_CPU(load_linear)(&loss->weight, 0, classes, *weight);
    if (v != *weight) memcpy(*weight, v, (size_t)classes * lac_compute_size(job->ctype));
    job->weight = *weight;
    job->weight_sum = dot_row(job, *weight, NULL);
    return 0;
}

int LAC_CPU(cross_entropy)(const lac_a_cross_entropy *a)
{
    const char *op = "cross_entropy";
    int64_t *target;
    void *weight;
    loss_job job = {.logits = &a->logits,
                    .rows = a->logits.shape[0],
                    .out = &a->out,
                    .lse = &a->lse,
                    .ctype = lac_compute_type(a->logits.dtype)};
    int status = loss_begin(op, &job, &a->loss, &a->target, a->logits.shape[1], &target, &weight);
    if (!status) status = run_rows(op, &job, loss_task);
    lac_workspace_put(weight);
    lac_workspace_put(target);
    return status;
}

static double scalar_at(const lac_view *v, int64_t i)
{
    return v->dtype == LAC_F64 ? ((const double *)v->data)[i * v->stride[0]]
                               : (double)((const float *)v->data)[i * v->stride[0]];
}
static void scalar_put(const lac_view *v, double x)
{
    if (v->dtype == LAC_F64) *(double *)v->data = x;
    else *(float *)v->data = (float)x;
}

int LAC_CPU(loss_mean)(const lac_a_loss_mean *a)
{
    const char *op = "loss_mean";
    int64_t *target, rows = a->losses.shape[0];
    int64_t classes = a->loss.weight.data ? a->loss.weight.shape[0] : INT64_MAX; /* then nobody knows */
    void *weight;
    double sum = 0, total = 0;
    loss_job job = {.ctype = lac_compute_type(a->losses.dtype)};
    LAC_TRY(loss_begin(op, &job, &a->loss, &a->target, classes, &target, &weight));
    for (int64_t r = 0; r < rows; r++) {
        sum += scalar_at(&a->losses, r);
        if (target[r] != a->loss.ignore) total += weight ? value_at(&job, weight, target[r]) : 1;
    }
    scalar_put(&a->out, sum / total);
    scalar_put(&a->total, total);
    lac_workspace_put(weight);
    lac_workspace_put(target);
    return 0;
}

int LAC_CPU(cross_entropy_bwd)(const lac_a_cross_entropy_bwd *a)
{
    const char *op = "cross_entropy_bwd";
    int64_t *target;
    void *weight;
    loss_job job = {.logits = &a->logits,
                    .rows = a->logits.shape[0],
                    .lse = &a->lse,
                    .g = &a->g,
                    .gradient = &a->out,
                    .ctype = lac_compute_type(a->logits.dtype)};
    int status = loss_begin(op, &job, &a->loss, &a->target, a->logits.shape[1], &target, &weight);
    if (!status) status = run_rows(op, &job, gradient_task);
    lac_workspace_put(weight);
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
    void *weight;
    if (rows == 0) return 0;
    loss_job job = {.out = &a->out, .lse = &a->lse, .ctype = lac_compute_type(a->x.dtype)};
    int status = loss_begin(op, &job, &a->loss, &a->target, classes, &target, &weight);
    if (!status) {
        job.chunk = lac_workspace_get(op, (size_t)(chunk * classes) * lac_compute_size(job.ctype));
        if (!job.chunk) status = LAC_E_MEMORY;
    }
    for (int64_t at = 0; at < rows && !status; at += chunk) {
        job.first = at;
        job.rows = rows - at < chunk ? rows - at : chunk;
        status = chunk_logits(op, &a->x, &a->w, &a->bias, at, job.rows, job.chunk);
        if (!status) status = run_rows(op, &job, loss_task);
        if (!status && lac_interrupted()) status = lac_fail(LAC_E_INTERRUPTED, "%s: interrupted", op);
    }
    lac_workspace_put(job.chunk);
    lac_workspace_put(weight);
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
    void *weight;
    loss_job job;
} ce_space;

static int backward_chunk(const lac_a_linear_ce_bwd *a, ce_space *s, int64_t at, int64_t m)
{
    const char *op = "linear_cross_entropy_bwd";
    int64_t classes = a->w.shape[0], width = a->x.shape[1], xb = lac_bytes_of(a->x.dtype);
    int ctype = lac_compute_type(a->x.dtype), plain = ctype == C_F64 ? LAC_F64 : LAC_F32;
    LAC_TRY(chunk_logits(op, &a->x, &a->w, &a->bias, at, m, s->logits));
    s->job.first = at;
    s->job.rows = m;
    if (a->out.data) LAC_TRY(run_rows(op, &s->job, loss_task));
    LAC_TRY(run_rows(op, &s->job, gradient_task));
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
    ce_space s = {.job = {.out = &a->out, .lse = &a->lse, .g = &a->g, .ctype = lac_compute_type(a->x.dtype)}};
    int status = loss_begin(op, &s.job, &a->loss, &a->target, classes, &s.target, &s.weight);
    if (status) return status;
    s.job.chunk = s.logits = lac_workspace_get(op, (size_t)(chunk * classes) * 8 + 8);
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
    lac_workspace_put(s.weight);
    lac_workspace_put(s.target);
    return status;
}
