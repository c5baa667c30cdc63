/* norm.c: layer normalisation and root-mean-square normalisation on the CPU, forward and backward.
 *
 * A row is a task: it fits a cache, so the passes over it cost one trip to memory. Rows that are not contiguous in the
 * compute type are gathered into a buffer of the thread, worked on in place, and scattered. The two differ in the mean
 * alone, which rmsnorm (Zhang and Sennrich 2019) does not subtract: one set of kernels with a switch serves both.
 *
 * Forward: the mean first, then the variance of the centred values; the sum-of-squares shortcut loses everything when
 * the mean is large. The mean is subtracted in two parts, so that f32 keeps the low bits of values far from 0.
 * While a row is written the next one is fetched; results larger than the caches are written past them.
 * Backward: dx row by row; dgamma and dbeta are sums over rows, eight rows in the compute type and then in double, in
 * blocks of a number that depends on the shape only, combined in order. Sums along a row are taken in the compute type
 * over 1024 elements (each vector lane adds 64 at most) and added up in double.
 */
#include "cpu.h"
#include "simd.h"
#include <math.h>
#include <string.h>

enum { SUM_BLOCK = 1024, GAMMA_BLOCKS = 64, GAMMA_ROWS = 16, FLUSH_ROWS = 8 };

/* ---- row kernels, once per type ---- */

/* The sum of f over n elements into the double `total`, by blocks, in four vectors that do not wait for each other's
 * additions; f(U, i) is its value at i, U being a vector or T itself. AT reads one or the other. */
#define AT(U, x, i) (*(const U *)((x) + (i)))
#define BLOCK_SUM(T, V, SUM, total, f)                                                                                 \
    for (int64_t i_ = 0; i_ < n;) {                                                                                    \
        enum { L_ = V_WIDTH / sizeof(T) };                                                                             \
        int64_t end_ = n - i_ < SUM_BLOCK ? n : i_ + SUM_BLOCK;                                                        \
        V s_[4] = {{0}, {0}, {0}, {0}};                                                                                \
        T rest_ = 0;                                                                                                   \
        for (; i_ + 4 * L_ <= end_; i_ += 4 * L_) {                                                                    \
            s_[0] += f(V, i_);                                                                                         \
            s_[1] += f(V, i_ + L_);                                                                                    \
            s_[2] += f(V, i_ + 2 * L_);                                                                                \
            s_[3] += f(V, i_ + 3 * L_);                                                                                \
        }                                                                                                              \
        for (; i_ < end_; i_++) rest_ += f(T, i_);                                                                     \
        total += (double)(SUM((s_[0] + s_[1]) + (s_[2] + s_[3])) + rest_);                                             \
    }
/* y[i] = f(i) by cache lines; `ahead` is fetched meanwhile */
#define ROW_WRITE(T, y, ahead, stream, f)                                                                              \
    do {                                                                                                               \
        enum { CHUNK_ = V_LINE / sizeof(T) };                                                                          \
        int64_t i_ = 0;                                                                                                \
        for (; i_ + CHUNK_ <= n; i_ += CHUNK_) {                                                                       \
            T line_[CHUNK_];                                                                                           \
            __builtin_prefetch((ahead) + i_, 0, 2);                                                                    \
            _Pragma("omp simd") for (int k_ = 0; k_ < CHUNK_; k_++) line_[k_] = f(i_ + k_);                            \
            v_put_line((y) + i_, line_, stream);                                                                       \
        }                                                                                                              \
        for (; i_ < n; i_++) (y)[i_] = f(i_);                                                                          \
    } while (0)

#define ROW_KERNELS(T, S, V, SUM)                                                                                      \
    /* without `mean`: rmsnorm. The mean is x[0] plus that of the differences, which keep the low bits of values far   \
     * from 0. */                                                                                                      \
    static void norm_row_##S(const T *x, const T *gamma, const T *beta, double eps, T *y, T *mean, T *rstd,            \
                             bool stream, int64_t n)                                                                   \
    {                                                                                                                  \
        T first = mean && isfinite(x[0]) ? x[0] : 0;                                                                   \
        double m = 0, squares = 0;                                                                                     \
        if (mean) {                                                                                                    \
            BLOCK_SUM(T, V, SUM, m, DIFFERENCE)                                                                        \
            m = (double)first + m / (double)n;                                                                         \
        }                                                                                                              \
        T high = (T)m, low = (T)(m - (double)high);                                                                    \
        BLOCK_SUM(T, V, SUM, squares, SQUARE)                                                                          \
        T r = (T)(1.0 / sqrt(squares / (double)n + eps));                                                              \
        if (mean) *mean = high;                                                                                        \
        *rstd = r;                                                                                                     \
        ROW_WRITE(T, y, x + n, stream, NORMAL);                                                                        \
    }                                                                                                                  \
    /* adds to dgamma and dbeta and writes dx, which may be x; dbeta NULL: rmsnorm, which has no mean either */        \
    static void norm_bwd_row_##S(const T *x, const T *gamma, T mean, T rstd, const T *g, T *dx, T *dgamma, T *dbeta,   \
                                 bool stream, int64_t n)                                                               \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T), L = V_WIDTH / sizeof(T) };                                                  \
        double a = 0, b = 0; /* sums of g gamma, and of that times the normalised x */                                 \
        for (int64_t i = 0; i < n;) {                                                                                  \
            int64_t end = n - i < SUM_BLOCK ? n : i + SUM_BLOCK;                                                       \
            V s[4] = {{0}, {0}, {0}, {0}}, t[4] = {{0}, {0}, {0}, {0}};                                                \
            T rest_s = 0, rest_t = 0;                                                                                  \
            for (; i + 4 * L <= end; i += 4 * L) {                                                                     \
                _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++)                                                    \
                {                                                                                                      \
                    V scaled = SCALED(V, i + k * L);                                                                   \
                    s[k] += scaled;                                                                                    \
                    t[k] += scaled * NORMALISED(V, i + k * L);                                                         \
                }                                                                                                      \
            }                                                                                                          \
            for (; i < end; i++) {                                                                                     \
                rest_s += SCALED(T, i);                                                                                \
                rest_t += SCALED(T, i) * NORMALISED(T, i);                                                             \
            }                                                                                                          \
            a += (double)(SUM((s[0] + s[1]) + (s[2] + s[3])) + rest_s);                                                \
            b += (double)(SUM((t[0] + t[1]) + (t[2] + t[3])) + rest_t);                                                \
        }                                                                                                              \
        T ma = dbeta ? (T)(a / (double)n) : 0, mb = (T)(b / (double)n);                                                \
        int64_t i = 0;                                                                                                 \
        for (; i + CHUNK <= n; i += CHUNK) {                                                                           \
            T line[CHUNK];                                                                                             \
            __builtin_prefetch(x + n + i, 0, 2); /* into the second cache: the first is full of this row */            \
            __builtin_prefetch(g + n + i, 0, 2);                                                                       \
            _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK; k += L)                                                 \
            {                                                                                                          \
                V gk = AT(V, g, i + k), h = NORMALISED(V, i + k);                                                      \
                *(V *)(line + k) = rstd * (SCALED(V, i + k) - ma - h * mb);                                            \
                *(V *)(dgamma + i + k) += gk * h;                                                                      \
                if (dbeta) *(V *)(dbeta + i + k) += gk;                                                                \
            }                                                                                                          \
            v_put_line(dx + i, line, stream);                                                                          \
        }                                                                                                              \
        for (; i < n; i++) {                                                                                           \
            T h = NORMALISED(T, i), gi = g[i];                                                                         \
            dx[i] = rstd * (SCALED(T, i) - ma - h * mb);                                                               \
            dgamma[i] += gi * h;                                                                                       \
            if (dbeta) dbeta[i] += gi;                                                                                 \
        }                                                                                                              \
    }                                                                                                                  \
    /* adds the sums of a few rows to those of all, and starts again */                                                \
    static void norm_flush_##S(T *few, double *all, int64_t n)                                                         \
    {                                                                                                                  \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) all[i] += (double)few[i];                                  \
        memset(few, 0, (size_t)n * sizeof(T));                                                                         \
    }
#define DIFFERENCE(U, i) (AT(U, x, i) - first)
#define CENTRED(U, i) ((AT(U, x, i) - high) - low)
#define SQUARE(U, i) (CENTRED(U, i) * CENTRED(U, i))
#define SCALED(U, i) (AT(U, g, i) * AT(U, gamma, i))
#define NORMALISED(U, i) ((AT(U, x, i) - mean) * rstd)
#define NORMAL(i) (((x[i] - high) - low) * r * gamma[i] + beta[i])
ROW_KERNELS(float, f, v_floats, v_sum_f)
ROW_KERNELS(double, d, v_doubles, v_sum_d)

/* ---- both norms ---- */

/* the arguments of layernorm and rmsnorm in one form; without_mean: rmsnorm, which has no beta and no mean */
typedef struct {
    lac_view x, out, vector_gamma, vector_beta, mean, rstd, g, dgamma, dbeta; /* out: dx in the backward */
    double eps;
    bool without_mean;
    const void *gamma, *beta; /* in the compute type; ones and zeros where there is none */
    void *own[2];             /* their workspace */
    int64_t rows, n, row_bytes, blocks;
    int dtype, ctype;
    bool dense, stream;             /* x (and g) are arrays of the compute type; a result larger than the caches */
    char *workspace;                /* ROWS_OF_THREAD rows per thread */
    double *sums_gamma, *sums_beta; /* [blocks][n], or NULL */
} norm_job;

enum { ROW_X, ROW_G, ROW_OUT, ROW_GAMMA, ROW_BETA, ROWS_OF_THREAD };

/* row t of x or g in the compute type */
static inline const void *row_of(const norm_job *job, const lac_view *v, int64_t t, void *space)
{
    int64_t size = (int64_t)lac_compute_size(job->ctype);
    return job->dense ? (const char *)v->data + t * job->n * size : LAC_CPU(load_linear)(v, t * job->n, job->n, space);
}

static void norm_task(void *context, int64_t begin, int64_t end, int thread)
{
    const norm_job *job = context;
    char *space = job->workspace + ROWS_OF_THREAD * job->row_bytes * thread;
    int64_t n = job->n, size = (int64_t)lac_compute_size(job->ctype);
    for (int64_t t = begin; t < end; t++) {
        const void *x = row_of(job, &job->x, t, space);
        char *out = (char *)job->out.data + t * n * lac_bytes_of(job->dtype); /* contiguous: made by the front end */
        void *y = lac_is_native(job->dtype) ? out : space + ROW_OUT * job->row_bytes;
        void *mean = job->without_mean ? NULL : (char *)job->mean.data + t * size;
        void *rstd = (char *)job->rstd.data + t * size;
        bool stream = job->stream && ((uintptr_t)y & (V_LINE - 1)) == 0;
        if (job->ctype == C_F32) norm_row_f(x, job->gamma, job->beta, job->eps, y, mean, rstd, stream, n);
        else norm_row_d(x, job->gamma, job->beta, job->eps, y, mean, rstd, stream, n);
        if (y != out) LAC_CPU(store)(job->dtype, y, out, lac_bytes_of(job->dtype), n);
    }
    if (job->stream) v_stream_end();
}

/* a vector [n] in the compute type, all `missing` if there is none; *own is workspace to give back */
static int load_vector(const char *op, const norm_job *job, const lac_view *v, double missing, const void **out,
                       void **own)
{
    *own = lac_workspace_get(op, (size_t)job->n * 8 + 8);
    if (!*own) return LAC_E_MEMORY;
    if (v->data) *out = LAC_CPU(load)(v->dtype, v->data, v->stride[0] * lac_bytes_of(v->dtype), job->n, *own);
    else if (job->ctype == C_F32) {
        float value = (float)missing;
        *out = LAC_CPU(load)(LAC_F32, &value, 0, job->n, *own);
    } else {
        *out = LAC_CPU(load)(LAC_F64, &missing, 0, job->n, *own);
    }
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
    job->dense = lac_is_native(job->dtype) && lac_view_contiguous(x) && (!job->g.data || lac_view_contiguous(&job->g));
    job->stream = lac_is_native(job->dtype) && lac_view_numel(x) * lac_bytes_of(job->dtype) >= LAC_STREAM_BYTES;
    LAC_TRY(load_vector(op, job, &job->vector_gamma, 1, &job->gamma, &job->own[0]));
    return load_vector(op, job, &job->vector_beta, 0, &job->beta, &job->own[1]);
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
            const void *x = row_of(job, &job->x, r, space);
            const void *g = row_of(job, &job->g, r, space + ROW_G * job->row_bytes);
            char *out = (char *)job->out.data + r * n * lac_bytes_of(job->dtype);
            void *dx = lac_is_native(job->dtype) ? out : space + ROW_OUT * job->row_bytes;
            bool stream = job->stream && ((uintptr_t)dx & (V_LINE - 1)) == 0;
            const char *rstd = (const char *)job->rstd.data + r * job->rstd.stride[0] * size;
            const char *mean = job->without_mean ? NULL : (const char *)job->mean.data + r * job->mean.stride[0] * size;
            if (job->ctype == C_F32)
                norm_bwd_row_f(x, job->gamma, mean ? *(const float *)mean : 0, *(const float *)rstd, g, dx,
                               (float *)dgamma, mean ? (float *)dbeta : NULL, stream, n);
            else
                norm_bwd_row_d(x, job->gamma, mean ? *(const double *)mean : 0, *(const double *)rstd, g, dx,
                               (double *)dgamma, mean ? (double *)dbeta : NULL, stream, n);
            if (dx != out) LAC_CPU(store)(job->dtype, dx, out, lac_bytes_of(job->dtype), n);
            if ((r - from) % FLUSH_ROWS == FLUSH_ROWS - 1 || r == to - 1) {
                norm_flush(job, dgamma, job->sums_gamma, t);
                norm_flush(job, dbeta, job->sums_beta, t);
            }
        }
    }
    if (job->stream) v_stream_end();
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

enum {
#define MAP2(name, domain, value, d_x, d_y) M2_##name,
#include "../maps.def"
};
enum {
#define MAP1(name, domain, value, gradient) M1_##name,
#include "../maps.def"
};

/* The parts in turn. One pass instead would save a read of the sum from memory, and measured on a step all residual
 * sums together are 0.8% of it (lua/lacuna/nn/longnet.lua); so here the operator only saves the host's work. */
int LAC_CPU(residual_norm)(const lac_a_residual_norm *a)
{
    lac_a_dropout drop = {.x = a->h, .out = a->sum, .p = a->p, .seed = a->seed, .offset = a->offset};
    lac_a_map2 add = {.fn = M2_add, .x = a->x, .y = a->p > 0 ? a->sum : a->h, .out = a->sum};
    lac_a_layernorm norm = {.x = a->sum,
                            .gamma = a->gamma,
                            .beta = a->beta,
                            .out = a->out,
                            .mean = a->mean,
                            .rstd = a->rstd,
                            .eps = a->eps};
    if (a->p > 0) LAC_TRY(LAC_CPU(dropout)(&drop));
    LAC_TRY(LAC_CPU(map2)(&add));
    return LAC_CPU(layernorm)(&norm);
}

int LAC_CPU(residual_norm_bwd)(const lac_a_residual_norm_bwd *a)
{
    lac_a_layernorm_bwd norm = {.x = a->sum,
                                .gamma = a->gamma,
                                .mean = a->mean,
                                .rstd = a->rstd,
                                .g = a->g,
                                .dx = a->dx,
                                .dgamma = a->dgamma,
                                .dbeta = a->dbeta};
    lac_a_axpy add = {.dst = a->dx, .x = a->g_sum, .alpha = 1};
    lac_a_dropout drop = {.x = a->dx, .out = a->dh, .p = a->p, .seed = a->seed, .offset = a->offset};
    LAC_TRY(LAC_CPU(layernorm_bwd)(&norm));
    if (a->g_sum.data) LAC_TRY(LAC_CPU(axpy)(&add));
    return a->dh.data ? LAC_CPU(dropout)(&drop) : 0;
}

/* In turn, too. gelu is computed twice only if the caller kept nothing of it: here that costs more than memory. */
int LAC_CPU(gelu_norm)(const lac_a_gelu_norm *a)
{
    lac_a_map1 gelu = {.fn = M1_gelu, .x = a->x, .out = a->act.data ? a->act : a->out};
    lac_a_layernorm norm = {.x = gelu.out,
                            .gamma = a->gamma,
                            .beta = a->beta,
                            .out = a->out,
                            .mean = a->mean,
                            .rstd = a->rstd,
                            .eps = a->eps};
    LAC_TRY(LAC_CPU(map1)(&gelu));
    return LAC_CPU(layernorm)(&norm);
}

/* a's out, whose mean and rstd the caller has */
static int norm_again(const lac_a_gelu_norm_bwd *a, const lac_view *act)
{
    int64_t rows = a->mean.shape[0], bytes = rows * (a->x.dtype == LAC_F64 ? 8 : 4);
    char *space = lac_workspace_get("gelu_norm_bwd", (size_t)(2 * bytes));
    lac_a_layernorm norm = {
        .x = *act, .gamma = a->gamma, .beta = a->beta, .out = a->out, .mean = a->mean, .rstd = a->rstd, .eps = a->eps};
    if (!space) return LAC_E_MEMORY;
    norm.mean.data = space, norm.rstd.data = space + bytes;
    norm.mean.stride[0] = norm.rstd.stride[0] = 1;
    int status = LAC_CPU(layernorm)(&norm);
    lac_workspace_put(space);
    return status;
}

int LAC_CPU(gelu_norm_bwd)(const lac_a_gelu_norm_bwd *a)
{
    lac_a_map1 gelu = {.fn = M1_gelu, .x = a->x, .out = a->dx};
    lac_a_layernorm_bwd norm = {.x = a->act.data ? a->act : a->dx,
                                .gamma = a->gamma,
                                .mean = a->mean,
                                .rstd = a->rstd,
                                .g = a->g,
                                .dx = a->dx,
                                .dgamma = a->dgamma,
                                .dbeta = a->dbeta};
    lac_a_map1_bwd back = {.fn = M1_gelu, .x = a->x, .y = a->x, .g = a->dx, .out = a->dx};
    if (!a->act.data) LAC_TRY(LAC_CPU(map1)(&gelu));
    if (a->out.data) LAC_TRY(norm_again(a, &norm.x));
    LAC_TRY(LAC_CPU(layernorm_bwd)(&norm));
    LAC_TRY(LAC_CPU(map1_bwd)(&back));
    return LAC_CPU(column_sums)(&a->dx, &a->sums);
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
