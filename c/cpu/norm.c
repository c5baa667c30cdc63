/* norm.c: layer normalisation and root-mean-square normalisation on the CPU, forward and backward.
 *
 * A row is a task: it fits a cache, so the passes over it cost one trip to memory. Rows that are not contiguous in the
 * compute type are gathered into a buffer of the thread, worked on in place, and scattered. The two differ in the mean
 * alone, which rmsnorm (Zhang and Sennrich 2019) does not subtract: one set of kernels with a switch serves both.
 *
 * Forward: the mean first, then the variance of the centred values; the sum-of-squares shortcut loses everything when
 * the mean is large. The mean is subtracted in two parts, so that f32 keeps the low bits of values far from 0.
 * Backward: dx row by row; dgamma and dbeta are sums over rows, eight rows in the compute type and then in double, in
 * blocks of a number that depends on the shape only, combined in order. Sums along a row are taken in the compute type
 * over 256 elements (each vector lane adds a few) and added up in double.
 */
#include "cpu.h"
#include "simd.h"
#include <math.h>
#include <string.h>

enum { SUM_BLOCK = 256, GAMMA_BLOCKS = 64, GAMMA_ROWS = 16, FLUSH_ROWS = 8 };

/* ---- row kernels, once per type ---- */

/* the sum of `expression` over n elements into the double `total`, by blocks */
#define BLOCK_SUM(T, total, expression)                                                                                \
    for (int64_t at_ = 0; at_ < n; at_ += SUM_BLOCK) {                                                                 \
        int64_t end_ = n - at_ < SUM_BLOCK ? n : at_ + SUM_BLOCK;                                                      \
        T s_ = 0;                                                                                                      \
        _Pragma("omp simd reduction(+ : s_)") for (int64_t i = at_; i < end_; i++) s_ += (expression);                 \
        total += (double)s_;                                                                                           \
    }

#define ROW_KERNELS(T, S)                                                                                              \
    static void norm_row_##S(const T *x, const T *gamma, const T *beta, double eps, T *y, T *mean, T *rstd, int64_t n) \
    {                                                                                                                  \
        double m = mean ? LAC_CPU(sum)(sizeof(T) == 4 ? C_F32 : C_F64, x, n) / (double)n : 0, squares = 0;             \
        T high = (T)m, low = (T)(m - (double)high);                                                                    \
        BLOCK_SUM(T, squares, ((x[i] - high) - low) * ((x[i] - high) - low))                                           \
        T r = (T)(1.0 / sqrt(squares / (double)n + eps));                                                              \
        if (mean) *mean = high;                                                                                        \
        *rstd = r;                                                                                                     \
        if (gamma && beta)                                                                                             \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = ((x[i] - high) - low) * r * gamma[i] + beta[i]; \
        else if (gamma)                                                                                                \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = ((x[i] - high) - low) * r * gamma[i];           \
        else                                                                                                           \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] =                                                 \
                ((x[i] - high) - low) * r + (beta ? beta[i] : 0);                                                      \
    }                                                                                                                  \
    /* adds to dgamma and dbeta (may be NULL) and writes dx, which may be x; without_mean: rmsnorm */                  \
    static void norm_bwd_row_##S(const T *x, const T *gamma, T mean, T rstd, const T *g, T *dx, T *dgamma, T *dbeta,   \
                                 bool without_mean, int64_t n)                                                         \
    {                                                                                                                  \
        double a = 0, b = 0;                                                                                           \
        if (gamma) {                                                                                                   \
            if (!without_mean) BLOCK_SUM(T, a, g[i] * gamma[i])                                                        \
            BLOCK_SUM(T, b, g[i] * gamma[i] * ((x[i] - mean) * rstd))                                                  \
        } else {                                                                                                       \
            if (!without_mean) BLOCK_SUM(T, a, g[i])                                                                   \
            BLOCK_SUM(T, b, g[i] * ((x[i] - mean) * rstd))                                                             \
        }                                                                                                              \
        if (dgamma) _Pragma("omp simd") for (int64_t i = 0; i < n; i++) dgamma[i] += g[i] * ((x[i] - mean) * rstd);    \
        if (dbeta) _Pragma("omp simd") for (int64_t i = 0; i < n; i++) dbeta[i] += g[i];                               \
        T ma = (T)(a / (double)n), mb = (T)(b / (double)n);                                                            \
        if (gamma)                                                                                                     \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) dx[i] =                                                \
                rstd * (g[i] * gamma[i] - ma - (x[i] - mean) * rstd * mb);                                             \
        else                                                                                                           \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) dx[i] =                                                \
                rstd * (g[i] - ma - (x[i] - mean) * rstd * mb);                                                        \
    }                                                                                                                  \
    /* adds the sums of a few rows to those of all, and starts again */                                                \
    static void norm_flush_##S(T *few, double *all, int64_t n)                                                         \
    {                                                                                                                  \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) all[i] += (double)few[i];                                  \
        memset(few, 0, (size_t)n * sizeof(T));                                                                         \
    }
ROW_KERNELS(float, f)
ROW_KERNELS(double, d)

/* ---- both norms ---- */

/* the arguments of layernorm and rmsnorm in one form; without_mean: rmsnorm, which has no beta and no mean */
typedef struct {
    lac_view x, out, vector_gamma, vector_beta, mean, rstd, g, dgamma, dbeta; /* out: dx in the backward */
    double eps;
    bool without_mean;
    const void *gamma, *beta; /* in the compute type, or NULL */
    void *own[2];             /* their workspace */
    int64_t rows, n, row_bytes, blocks;
    int dtype, ctype;
    char *workspace;                /* ROWS_OF_THREAD rows per thread */
    double *sums_gamma, *sums_beta; /* [blocks][n], or NULL */
} norm_job;

enum { ROW_X, ROW_G, ROW_OUT, ROW_GAMMA, ROW_BETA, ROWS_OF_THREAD };

static void norm_task(void *context, int64_t begin, int64_t end, int thread)
{
    const norm_job *job = context;
    char *space = job->workspace + ROWS_OF_THREAD * job->row_bytes * thread;
    int64_t n = job->n, size = (int64_t)lac_compute_size(job->ctype);
    for (int64_t t = begin; t < end; t++) {
        const void *x = LAC_CPU(load_linear)(&job->x, t * n, n, space);
        char *out = (char *)job->out.data + t * n * lac_bytes_of(job->dtype); /* contiguous: made by the front end */
        void *y = lac_is_native(job->dtype) ? out : space + ROW_OUT * job->row_bytes;
        void *mean = job->without_mean ? NULL : (char *)job->mean.data + t * size;
        void *rstd = (char *)job->rstd.data + t * size;
        if (job->ctype == C_F32) norm_row_f(x, job->gamma, job->beta, job->eps, y, mean, rstd, n);
        else norm_row_d(x, job->gamma, job->beta, job->eps, y, mean, rstd, n);
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

static int norm_start(const char *op, norm_job *job, const lac_view *x)
{
    job->x = *x;
    job->n = x->shape[x->ndim - 1];
    job->rows = job->n ? lac_view_numel(x) / job->n : 0;
    job->dtype = x->dtype;
    job->ctype = lac_compute_type(job->dtype);
    job->row_bytes = (job->n * (int64_t)lac_compute_size(job->ctype) + 63) / 64 * 64;
    LAC_TRY(load_vector(op, &job->vector_gamma, job->n, &job->gamma, &job->own[0]));
    return load_vector(op, &job->vector_beta, job->n, &job->beta, &job->own[1]);
}

static int norm_end(norm_job *job, int status)
{
    lac_workspace_put(job->workspace);
    lac_workspace_put(job->own[0]);
    lac_workspace_put(job->own[1]);
    return status;
}

static int norm_run(const char *op, norm_job *job, const lac_view *x)
{
    int64_t work = lac_view_numel(x) * 4;
    int status = norm_start(op, job, x);
    if (!status) {
        job->workspace =
            lac_workspace_get(op, (size_t)(ROWS_OF_THREAD * job->row_bytes * LAC_CPU(threads)(job->rows, work)));
        if (!job->workspace) status = LAC_E_MEMORY;
    }
    if (!status) status = LAC_CPU(parallel)(op, job->rows, work, norm_task, job);
    return norm_end(job, status);
}

/* the sums of a few rows into block t of all, if they are wanted */
static void norm_flush(const norm_job *job, char *few, double *all, int64_t t)
{
    if (!all) return;
    if (job->ctype == C_F32) norm_flush_f((float *)few, all + t * job->n, job->n);
    else norm_flush_d((double *)few, all + t * job->n, job->n);
}

static void norm_bwd_task(void *context, int64_t begin, int64_t end, int thread)
{
    const norm_job *job = context;
    char *space = job->workspace + ROWS_OF_THREAD * job->row_bytes * thread;
    char *dgamma = space + ROW_GAMMA * job->row_bytes, *dbeta = space + ROW_BETA * job->row_bytes;
    int64_t n = job->n, size = (int64_t)lac_compute_size(job->ctype);
    memset(dgamma, 0, (size_t)(2 * job->row_bytes));
    for (int64_t t = begin; t < end; t++) {
        if (job->sums_gamma) memset(job->sums_gamma + t * n, 0, (size_t)n * sizeof(double));
        if (job->sums_beta) memset(job->sums_beta + t * n, 0, (size_t)n * sizeof(double));
        int64_t share = job->rows / job->blocks, extra = job->rows % job->blocks;
        int64_t from = t * share + (t < extra ? t : extra), to = from + share + (t < extra);
        for (int64_t r = from; r < to; r++) {
            const void *x = LAC_CPU(load_linear)(&job->x, r * n, n, space);
            const void *g = LAC_CPU(load_linear)(&job->g, r * n, n, space + ROW_G * job->row_bytes);
            char *out = (char *)job->out.data + r * n * lac_bytes_of(job->dtype);
            void *dx = lac_is_native(job->dtype) ? out : space + ROW_OUT * job->row_bytes;
            void *few_gamma = job->sums_gamma ? dgamma : NULL, *few_beta = job->sums_beta ? dbeta : NULL;
            const char *rstd = (const char *)job->rstd.data + r * job->rstd.stride[0] * size;
            const char *mean = job->without_mean ? NULL : (const char *)job->mean.data + r * job->mean.stride[0] * size;
            if (job->ctype == C_F32)
                norm_bwd_row_f(x, job->gamma, mean ? *(const float *)mean : 0, *(const float *)rstd, g, dx, few_gamma,
                               few_beta, !mean, n);
            else
                norm_bwd_row_d(x, job->gamma, mean ? *(const double *)mean : 0, *(const double *)rstd, g, dx, few_gamma,
                               few_beta, !mean, n);
            if (dx != out) LAC_CPU(store)(job->dtype, dx, out, lac_bytes_of(job->dtype), n);
            if ((r - from) % FLUSH_ROWS == FLUSH_ROWS - 1 || r == to - 1) {
                norm_flush(job, dgamma, job->sums_gamma, t);
                norm_flush(job, dbeta, job->sums_beta, t);
            }
        }
    }
}

/* sums the blocks in order into block 0 and stores it as out [n] */
static void combine_blocks(const norm_job *job, double *sums, const lac_view *out)
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

static int norm_bwd_run(const char *op, norm_job *job, const lac_view *x)
{
    int64_t work = lac_view_numel(x) * 6;
    if (x->shape[x->ndim - 1] == 0) return 0;
    int status = norm_start(op, job, x);
    /* at least one block, so that no rows give sums of zero */
    job->blocks = (job->rows + GAMMA_ROWS - 1) / GAMMA_ROWS;
    if (job->blocks > GAMMA_BLOCKS) job->blocks = GAMMA_BLOCKS;
    if (job->blocks < 1) job->blocks = 1;
    int64_t sums = job->blocks * job->n;
    if (!status) {
        size_t rows = (size_t)(ROWS_OF_THREAD * job->row_bytes * LAC_CPU(threads)(job->blocks, work));
        job->workspace = lac_workspace_get(op, rows + 2 * (size_t)sums * sizeof(double));
        if (!job->workspace) status = LAC_E_MEMORY;
        if (!status && job->dgamma.data) job->sums_gamma = (double *)(job->workspace + rows);
        if (!status && job->dbeta.data) job->sums_beta = (double *)(job->workspace + rows) + sums;
    }
    if (!status) status = LAC_CPU(parallel)(op, job->blocks, work, norm_bwd_task, job);
    if (!status) {
        combine_blocks(job, job->sums_gamma, &job->dgamma);
        combine_blocks(job, job->sums_beta, &job->dbeta);
    }
    return norm_end(job, status);
}

/* ---- operators ---- */

int LAC_CPU(layernorm)(const lac_a_layernorm *a)
{
    norm_job job = {.out = a->out,
                    .vector_gamma = a->gamma,
                    .vector_beta = a->beta,
                    .mean = a->mean,
                    .rstd = a->rstd,
                    .eps = a->eps};
    return norm_run("layernorm", &job, &a->x);
}

int LAC_CPU(layernorm_bwd)(const lac_a_layernorm_bwd *a)
{
    norm_job job = {.out = a->dx,
                    .vector_gamma = a->gamma,
                    .mean = a->mean,
                    .rstd = a->rstd,
                    .g = a->g,
                    .dgamma = a->dgamma,
                    .dbeta = a->dbeta};
    return norm_bwd_run("layernorm_bwd", &job, &a->x);
}

int LAC_CPU(rmsnorm)(const lac_a_rmsnorm *a)
{
    norm_job job = {.out = a->out, .vector_gamma = a->gamma, .rstd = a->rstd, .eps = a->eps, .without_mean = true};
    return norm_run("rmsnorm", &job, &a->x);
}

int LAC_CPU(rmsnorm_bwd)(const lac_a_rmsnorm_bwd *a)
{
    norm_job job = {
        .out = a->dx, .vector_gamma = a->gamma, .rstd = a->rstd, .g = a->g, .dgamma = a->dgamma, .without_mean = true};
    return norm_bwd_run("rmsnorm_bwd", &job, &a->x);
}
