/* softmax.c: softmax and its logarithm over any axis on the CPU, forward and backward.
 *
 * Along the last axis a row is a task: it fits a cache, so the passes over it (maximum, exponentials and their sum,
 * scaling) cost one trip to memory. Milakov and Gimelshein's online form was rejected: its rescaling serialises the
 * exponentials, and the row is in cache anyway. Along another axis the rows' elements are far apart, and a row by
 * itself would use 4 bytes of each cache line: there a task takes a block of neighbouring columns and makes the same
 * passes row of memory by row of memory, with one maximum and one sum per column. Only where no axis is dense, rows are
 * gathered one by one. Sums are taken in the compute type over at most 256 elements or 32 rows and added up in double.
 * A row of -inf only has no softmax: it gives NaN, as 0/0 should; callers that mean "no key" must say so.
 */
#include "cpu.h"
#include "simd.h"

enum { SUM_BLOCK = 256, SUM_ROWS = 32, MOST_COLUMNS = 1024, LEAST_COLUMNS = 256, TILE_BYTES = 256 << 10 };

/* ---- kernels, once per type ---- */

#define ROW_KERNELS(T, S, EXP, INF)                                                                                    \
    static T row_max_##S(const T *x, int64_t n)                                                                        \
    {                                                                                                                  \
        T m = -INF;                                                                                                    \
        _Pragma("omp simd reduction(max : m)") for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : m;                \
        return m;                                                                                                      \
    }                                                                                                                  \
    /* the sum of exp(x - m); y, which may be NULL, gets the terms */                                                  \
    static double row_exp_##S(const T *x, T m, T *y, int64_t n)                                                        \
    {                                                                                                                  \
        double total = 0;                                                                                              \
        for (int64_t at = 0; at < n; at += SUM_BLOCK) {                                                                \
            int64_t end = n - at < SUM_BLOCK ? n : at + SUM_BLOCK;                                                     \
            T s = 0;                                                                                                   \
            if (y) _Pragma("omp simd reduction(+ : s)") for (int64_t i = at; i < end; i++)                             \
                {                                                                                                      \
                    T e = EXP(x[i] - m);                                                                               \
                    y[i] = e;                                                                                          \
                    s += e;                                                                                            \
                }                                                                                                      \
            else _Pragma("omp simd reduction(+ : s)") for (int64_t i = at; i < end; i++) s += EXP(x[i] - m);           \
            total += (double)s;                                                                                        \
        }                                                                                                              \
        return total;                                                                                                  \
    }                                                                                                                  \
    /* y may be x */                                                                                                   \
    static void softmax_row_##S(const T *x, T *y, int64_t n, bool logarithm)                                           \
    {                                                                                                                  \
        T m = row_max_##S(x, n);                                                                                       \
        if (logarithm) {                                                                                               \
            T rest = (T)log(row_exp_##S(x, m, NULL, n));                                                               \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = (x[i] - m) - rest;                              \
            return;                                                                                                    \
        }                                                                                                              \
        T scale = (T)(1.0 / row_exp_##S(x, m, y, n));                                                                  \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] *= scale;                                             \
    }                                                                                                                  \
    static double row_dot_##S(const T *x, const T *y, int64_t n)                                                       \
    {                                                                                                                  \
        double total = 0;                                                                                              \
        for (int64_t at = 0; at < n; at += SUM_BLOCK) {                                                                \
            int64_t end = n - at < SUM_BLOCK ? n : at + SUM_BLOCK;                                                     \
            T s = 0;                                                                                                   \
            _Pragma("omp simd reduction(+ : s)") for (int64_t i = at; i < end; i++) s += x[i] * y[i];                  \
            total += (double)s;                                                                                        \
        }                                                                                                              \
        return total;                                                                                                  \
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
    /* w columns of n rows, sx and sy bytes apart; y may be x */                                                       \
    static void softmax_columns_##S(const char *x, int64_t sx, char *y, int64_t sy, int64_t n, int64_t w,              \
                                    bool logarithm)                                                                    \
    {                                                                                                                  \
        T m[MOST_COLUMNS], s[MOST_COLUMNS];                                                                            \
        double total[MOST_COLUMNS];                                                                                    \
        for (int64_t j = 0; j < w; j++) m[j] = -INF, total[j] = 0;                                                     \
        for (int64_t r = 0; r < n; r++) {                                                                              \
            const T *in = (const T *)(x + r * sx);                                                                     \
            _Pragma("omp simd") for (int64_t j = 0; j < w; j++) m[j] = in[j] > m[j] ? in[j] : m[j];                    \
        }                                                                                                              \
        for (int64_t at = 0; at < n; at += SUM_ROWS) {                                                                 \
            int64_t end = n - at < SUM_ROWS ? n : at + SUM_ROWS;                                                       \
            for (int64_t j = 0; j < w; j++) s[j] = 0;                                                                  \
            for (int64_t r = at; r < end; r++) {                                                                       \
                const T *in = (const T *)(x + r * sx);                                                                 \
                T *out = (T *)(y + r * sy);                                                                            \
                if (logarithm) _Pragma("omp simd") for (int64_t j = 0; j < w; j++) s[j] += EXP(in[j] - m[j]);          \
                else _Pragma("omp simd") for (int64_t j = 0; j < w; j++)                                               \
                    {                                                                                                  \
                        T e = EXP(in[j] - m[j]);                                                                       \
                        out[j] = e;                                                                                    \
                        s[j] += e;                                                                                     \
                    }                                                                                                  \
            }                                                                                                          \
            for (int64_t j = 0; j < w; j++) total[j] += (double)s[j];                                                  \
        }                                                                                                              \
        for (int64_t j = 0; j < w; j++) s[j] = logarithm ? (T)log(total[j]) : (T)(1.0 / total[j]);                     \
        for (int64_t r = 0; r < n; r++) {                                                                              \
            const T *in = (const T *)(x + r * sx);                                                                     \
            T *out = (T *)(y + r * sy);                                                                                \
            if (logarithm) _Pragma("omp simd") for (int64_t j = 0; j < w; j++) out[j] = (in[j] - m[j]) - s[j];         \
            else _Pragma("omp simd") for (int64_t j = 0; j < w; j++) out[j] *= s[j];                                   \
        }                                                                                                              \
    }                                                                                                                  \
    /* dx may be y */                                                                                                  \
    static void softmax_bwd_columns_##S(const char *y, int64_t sy, const char *g, int64_t sg, char *dx, int64_t sd,    \
                                        int64_t n, int64_t w, bool logarithm)                                          \
    {                                                                                                                  \
        T s[MOST_COLUMNS];                                                                                             \
        double total[MOST_COLUMNS];                                                                                    \
        for (int64_t j = 0; j < w; j++) total[j] = 0;                                                                  \
        for (int64_t at = 0; at < n; at += SUM_ROWS) {                                                                 \
            int64_t end = n - at < SUM_ROWS ? n : at + SUM_ROWS;                                                       \
            for (int64_t j = 0; j < w; j++) s[j] = 0;                                                                  \
            for (int64_t r = at; r < end; r++) {                                                                       \
                const T *iy = (const T *)(y + r * sy), *ig = (const T *)(g + r * sg);                                  \
                if (logarithm) _Pragma("omp simd") for (int64_t j = 0; j < w; j++) s[j] += ig[j];                      \
                else _Pragma("omp simd") for (int64_t j = 0; j < w; j++) s[j] += iy[j] * ig[j];                        \
            }                                                                                                          \
            for (int64_t j = 0; j < w; j++) total[j] += (double)s[j];                                                  \
        }                                                                                                              \
        for (int64_t j = 0; j < w; j++) s[j] = (T)total[j];                                                            \
        for (int64_t r = 0; r < n; r++) {                                                                              \
            const T *iy = (const T *)(y + r * sy), *ig = (const T *)(g + r * sg);                                      \
            T *out = (T *)(dx + r * sd);                                                                               \
            if (logarithm) _Pragma("omp simd") for (int64_t j = 0; j < w; j++) out[j] = ig[j] - EXP(iy[j]) * s[j];     \
            else _Pragma("omp simd") for (int64_t j = 0; j < w; j++) out[j] = iy[j] * (ig[j] - s[j]);                  \
        }                                                                                                              \
    }
ROW_KERNELS(float, f, v_exp_flushf, INFINITY)
ROW_KERNELS(double, d, exp, (double)INFINITY)

/* ---- rows ---- */

typedef struct {
    lac_nest nest;        /* the axes that are not normalised: out, x (, g) */
    int64_t n, row_bytes; /* length of a row; bytes of one buffer */
    int64_t stride[3];    /* bytes between a row's elements */
    int dtype, ctype, inputs;
    bool logarithm;
    int64_t width, blocks; /* columns: how many of them a task works on together, tasks per outer row */
    char *workspace;
    int64_t space; /* bytes of it per thread */
} softmax_job;

/* where the result of a row is computed: in place if it is an array of the compute type, else in the buffer */
static void *row_target(const softmax_job *job, char *out, void *buffer)
{
    return lac_is_native(job->dtype) && job->stride[0] == lac_bytes_of(job->dtype) ? out : buffer;
}

static void softmax_task(void *context, int64_t begin, int64_t end, int thread)
{
    const softmax_job *job = context;
    char *space = job->workspace + job->space * thread;
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
            if (job->ctype == C_F32) softmax_row_f(x, y, job->n, job->logarithm);
            else softmax_row_d(x, y, job->n, job->logarithm);
        }
        if (y != out) LAC_CPU(store)(job->dtype, y, out, job->stride[0], job->n);
    }
}

/* ---- columns ---- */

/* n rows of w elements as a dense tile of the compute type */
static void tile_load(const softmax_job *job, const char *x, int64_t stride, int64_t w, char *tile)
{
    int64_t bytes = lac_bytes_of(job->dtype), line = w * (int64_t)lac_compute_size(job->ctype);
    for (int64_t r = 0; r < job->n; r++) LAC_CPU(load)(job->dtype, x + r * stride, bytes, w, tile + r * line);
}

static void columns_task(void *context, int64_t begin, int64_t end, int thread)
{
    const softmax_job *job = context;
    const lac_nest *nest = &job->nest;
    const int64_t length = nest->shape[nest->ndim - 1], bytes = lac_bytes_of(job->dtype), n = job->n;
    char *tile = job->workspace + job->space * thread;
    lac_cursor c;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = t % job->blocks * job->width, w = length - first < job->width ? length - first : job->width;
        if (t == begin) LAC_CPU(cursor_set)(nest, &c, t / job->blocks);
        else if (first == 0) lac_cursor_next(nest, &c);
        char *out = c.at[0] + first * bytes, *y = out;
        const char *x = c.at[1] + first * bytes, *g = job->inputs == 2 ? c.at[2] + first * bytes : NULL;
        int64_t so = job->stride[0], sx = job->stride[1], sg = job->stride[2];
        if (!lac_is_native(job->dtype)) { /* y is worked out where x was */
            int64_t line = w * (int64_t)lac_compute_size(job->ctype);
            tile_load(job, x, sx, w, tile);
            if (g) tile_load(job, g, sg, w, tile + n * line);
            x = y = tile;
            g = g ? tile + n * line : NULL;
            so = sx = sg = line;
        }
        if (g && job->ctype == C_F32) softmax_bwd_columns_f(x, sx, g, sg, y, so, n, w, job->logarithm);
        else if (g) softmax_bwd_columns_d(x, sx, g, sg, y, so, n, w, job->logarithm);
        else if (job->ctype == C_F32) softmax_columns_f(x, sx, y, so, n, w, job->logarithm);
        else softmax_columns_d(x, sx, y, so, n, w, job->logarithm);
        for (int64_t r = 0; y != out && r < n; r++)
            LAC_CPU(store)(job->dtype, y + r * so, out + r * job->stride[0], bytes, w);
    }
}

/* Are the elements of all rows neighbours along one axis, and the rows themselves not dense? Then the job is set up
 * for blocks of columns. */
static bool columns_fit(softmax_job *job, int64_t rows)
{
    int last = job->nest.ndim - 1;
    int64_t length = job->nest.shape[last], bytes = lac_bytes_of(job->dtype);
    if (length < 8 || job->n < 2) return false;
    for (int v = 0; v <= job->inputs; v++)
        if (job->nest.stride[v][last] != bytes || job->stride[v] == bytes) return false;
    int64_t width = TILE_BYTES / (job->n * (int64_t)lac_compute_size(job->ctype)) / 16 * 16;
    width = width < LEAST_COLUMNS ? LEAST_COLUMNS : width > MOST_COLUMNS ? MOST_COLUMNS : width;
    /* every thread gets some: no result depends on the width */
    int64_t share = length / LAC_CPU(threads)(length, job->n * length);
    if (rows == length && share < width) width = share < 16 ? 16 : (share + 15) / 16 * 16;
    job->width = width < length ? width : length;
    job->blocks = (length + job->width - 1) / job->width;
    return true;
}

/* views[0] is the output; all have its shape */
static int softmax_run(const char *op, int inputs, const lac_view *const *views, int dim, bool logarithm)
{
    softmax_job job = {.dtype = views[0]->dtype, .inputs = inputs, .logarithm = logarithm};
    job.ctype = lac_compute_type(job.dtype);
    lac_view rest[3];
    const lac_view *list[3];
    int64_t numel = lac_view_numel(views[0]), size = (int64_t)lac_compute_size(job.ctype);
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
    bool columns = columns_fit(&job, numel / job.n);
    job.row_bytes = (job.n * size + 63) / 64 * 64;
    int64_t rows = numel / job.n, work = numel * 4;
    int64_t tasks = columns ? rows / job.nest.shape[job.nest.ndim - 1] * job.blocks : rows;
    job.space = columns ? (lac_is_native(job.dtype) ? 0 : inputs * job.n * job.width * size) : 3 * job.row_bytes;
    job.workspace = lac_workspace_get(op, (size_t)(job.space * LAC_CPU(threads)(tasks, work) + 64));
    if (!job.workspace) return LAC_E_MEMORY;
    int status = LAC_CPU(parallel)(op, tasks, work, columns ? columns_task : softmax_task, &job);
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
