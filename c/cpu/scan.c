/* scan.c: running sums, products, extremes and log-sum-exps along an axis on the CPU, and two of their gradients.
 *
 * A line is scanned from one end to the other by one thread, so the order of its additions is that of its elements and
 * nothing depends on the number of threads; what runs in parallel are lines. Lines whose elements lie together are
 * taken one at a time; otherwise up to 1024 neighbouring lines go side by side, row of memory by row of memory, with
 * one accumulator each, which vectorises and goes through memory in order (128 lines at a time, pieces of 512 bytes,
 * took several times as long). Both are one loop over tiles of n rows and w lines; for w = 1 it is compiled again.
 * Arrays of the compute type are read and written in place; results larger than the caches are written past them.
 * Accumulators are double (int64_t for integers), so the f32 sum of a million terms is exact to its last bit or two. A
 * log-sum-exp is kept as a largest element and the sum of exponentials relative to it, the online form, which never
 * overflows. The sum of one line would wait four cycles for each addition: four lines are summed at once.
 *
 * Gradients walk the line backwards, with factors that are read and never divided by:
 *   cumprod       S_i = g_i + x_(i+1) S_(i+1), dx_i = y_(i-1) S_i (Horner's rule): exact also where x has zeros;
 *   logcumsumexp  T_i = g_i + exp(y_i - y_(i+1)) T_(i+1), dx_i = exp(x_i - y_i) T_i: no exponent is above 0.
 * Rejected: a parallel prefix over pieces of one line (two passes, and sums that depend on the size of the pieces), the
 * quotient form of the product's gradient with cases for one zero and for two.
 */
#include "cpu.h"
#include "simd.h"

enum { TILE = 1024, WIDEST = TILE, LEAST = 8, MOST_VIEWS = 4, LINES = 4, PIECE = TILE / LINES };

/* one line's accumulators, for up to WIDEST lines */
typedef struct {
    double a[WIDEST], b[WIDEST];
    uint64_t sum[WIDEST];
    int64_t most[WIDEST], at[WIDEST];
} state;

/* n rows of w lines from row `first` of the scan on: tile[0] is made, tile[1] read; what others are depends on the rule
 */
typedef void tile_rule(state *s, void *const *tile, int64_t first, int64_t n, int64_t w);

/* the loop over a tile, and again for a single line */
#define RULE(name, ...)                                                                                                \
    LAC_INLINE void name##_any(state *s, void *const *tile, int64_t first, int64_t n, int64_t w)                       \
    {                                                                                                                  \
        (void)first;                                                                                                   \
        __VA_ARGS__                                                                                                    \
    }                                                                                                                  \
    static void name(state *s, void *const *tile, int64_t first, int64_t n, int64_t w)                                 \
    {                                                                                                                  \
        if (w == 1) name##_any(s, tile, first, n, 1);                                                                  \
        else name##_any(s, tile, first, n, w);                                                                         \
    }

#define ACCUMULATE(name, T, A, field, operator)                                                                        \
    RULE(name, {                                                                                                       \
        T *y = tile[0];                                                                                                \
        const T *x = tile[1];                                                                                          \
        A *acc = s->field;                                                                                             \
        for (int64_t r = 0; r < n; r++) _Pragma("omp simd") for (int64_t j = 0; j < w; j++)                            \
            {                                                                                                          \
                acc[j] = acc[j] operator(A) x[r * w + j];                                                              \
                y[r * w + j] = (T)acc[j];                                                                              \
            }                                                                                                          \
    })
ACCUMULATE(sum_f, float, double, a, +)
ACCUMULATE(sum_d, double, double, a, +)
ACCUMULATE(sum_i, int64_t, uint64_t, sum, +) /* wraps */
ACCUMULATE(prod_f, float, double, a, *)
ACCUMULATE(prod_d, double, double, a, *)
ACCUMULATE(prod_i, int64_t, uint64_t, sum, *)

/* LINES lines of n elements, each from one end to the other, as sum_f and sum_d have it */
#define SUM_LINES(name, T)                                                                                             \
    static void name(const void *const *from, void *const *to, int64_t n, bool stream)                                 \
    {                                                                                                                  \
        const T *a = from[0], *b = from[1], *c = from[2], *d = from[3];                                                \
        double sa = 0, sb = 0, sc = 0, sd = 0;                                                                         \
        for (int64_t at = 0; at < n; at += PIECE) {                                                                    \
            T piece[LINES][PIECE];                                                                                     \
            int64_t m = n - at < PIECE ? n - at : PIECE;                                                               \
            for (int64_t i = 0; i < m; i++) {                                                                          \
                piece[0][i] = (T)(sa += (double)a[at + i]);                                                            \
                piece[1][i] = (T)(sb += (double)b[at + i]);                                                            \
                piece[2][i] = (T)(sc += (double)c[at + i]);                                                            \
                piece[3][i] = (T)(sd += (double)d[at + i]);                                                            \
            }                                                                                                          \
            for (int k = 0; k < LINES; k++) {                                                                          \
                if (stream) v_stream((T *)to[k] + at, piece[k], (size_t)m * sizeof(T));                                \
                else memcpy((T *)to[k] + at, piece[k], (size_t)m * sizeof(T));                                         \
            }                                                                                                          \
        }                                                                                                              \
    }
SUM_LINES(sum_lines_f, float)
SUM_LINES(sum_lines_d, double)

/* tile[2]: positions; NaN, which no comparison holds for, always takes over and is only left for another */
#define EXTREME(name, T, A, field, operator)                                                                           \
    RULE(name, {                                                                                                       \
        T *y = tile[0];                                                                                                \
        const T *x = tile[1];                                                                                          \
        int64_t *position = tile[2];                                                                                   \
        A *acc = s->field;                                                                                             \
        for (int64_t r = 0; r < n; r++)                                                                                \
            for (int64_t j = 0; j < w; j++) {                                                                          \
                A v = x[r * w + j];                                                                                    \
                bool take = v operator acc[j] || v != v;                                                               \
                acc[j] = take ? v : acc[j];                                                                            \
                s->at[j] = take ? first + r : s->at[j];                                                                \
                y[r * w + j] = (T)acc[j];                                                                              \
                position[r * w + j] = s->at[j];                                                                        \
            }                                                                                                          \
    })
EXTREME(max_f, float, double, a, >=)
EXTREME(max_d, double, double, a, >=)
EXTREME(max_i, int64_t, int64_t, most, >=)
EXTREME(min_f, float, double, a, <=)
EXTREME(min_d, double, double, a, <=)
EXTREME(min_i, int64_t, int64_t, most, <=)

/* one term more: a the largest so far, b the sum of exp(x - a). Of nothing but -inf the sum stays 0. */
LAC_INLINE double more_exp(double *a, double *b, double v)
{
    if (v <= *a) {
        if (v > -(double)INFINITY) *b += v == *a ? 1 : exp(v - *a);
    } else { /* also NaN, which then stays in the sum */
        *b = *b * exp(*a - v) + 1;
        *a = v;
    }
    return *a + log(*b);
}
#define LOGSUMEXP(name, T)                                                                                             \
    RULE(name, {                                                                                                       \
        T *y = tile[0];                                                                                                \
        const T *x = tile[1];                                                                                          \
        for (int64_t r = 0; r < n; r++)                                                                                \
            for (int64_t j = 0; j < w; j++) y[r * w + j] = (T)more_exp(&s->a[j], &s->b[j], (double)x[r * w + j]);      \
    })
LOGSUMEXP(logsumexp_f, float)
LOGSUMEXP(logsumexp_d, double)

/* gradients: tile[1] x, tile[2] y (for a product one element further on: y_(i-1)), tile[3] g; a: S or T of the row
 * before (behind it in the line), b: its x or y */
#define PROD_BWD(name, T)                                                                                              \
    RULE(name, {                                                                                                       \
        T *dx = tile[0];                                                                                               \
        const T *x = tile[1], *y = tile[2], *g = tile[3];                                                              \
        for (int64_t r = 0; r < n; r++)                                                                                \
            for (int64_t j = 0; j < w; j++) {                                                                          \
                s->a[j] = (double)g[r * w + j] + s->b[j] * s->a[j];                                                    \
                s->b[j] = (double)x[r * w + j];                                                                        \
                dx[r * w + j] = (T)((double)y[r * w + j] * s->a[j]);                                                   \
            }                                                                                                          \
    })
PROD_BWD(prod_bwd_f, float)
PROD_BWD(prod_bwd_d, double)

/* exp(x - y), with what is infinite in both: `same` */
LAC_INLINE double share(double x, double y, double same) { return x == y && isinf(x) ? same : exp(x - y); }
#define LOGSUMEXP_BWD(name, T)                                                                                         \
    RULE(name, {                                                                                                       \
        T *dx = tile[0];                                                                                               \
        const T *x = tile[1], *y = tile[2], *g = tile[3];                                                              \
        for (int64_t r = 0; r < n; r++)                                                                                \
            for (int64_t j = 0; j < w; j++) {                                                                          \
                double yi = (double)y[r * w + j];                                                                      \
                s->a[j] = (double)g[r * w + j] + (first + r ? share(yi, s->b[j], 1) * s->a[j] : 0);                    \
                s->b[j] = yi;                                                                                          \
                dx[r * w + j] = (T)(share((double)x[r * w + j], yi, 0) * s->a[j]);                                     \
            }                                                                                                          \
    })
LOGSUMEXP_BWD(logsumexp_bwd_f, float)
LOGSUMEXP_BWD(logsumexp_bwd_d, double)

static tile_rule *const FORWARD[LAC_SCANS][3] = {
    [LAC_CUMSUM] = {sum_f, sum_d, sum_i},
    [LAC_CUMPROD] = {prod_f, prod_d, prod_i},
    [LAC_CUMMAX] = {max_f, max_d, max_i},
    [LAC_CUMMIN] = {min_f, min_d, min_i},
    [LAC_LOGCUMSUMEXP] = {logsumexp_f, logsumexp_d},
};

/* ---- lines and tiles ---- */

typedef struct {
    const lac_view *views[MOST_VIEWS];
    bool made[MOST_VIEWS]; /* the others are read */
    int count, fn;
    bool stream; /* the results are larger than the caches */
    bool reverse, backward,
        shifted; /* shifted: view 2 is read one element earlier in the line, and 1 before its first */
    tile_rule *rule;
    int ctype;                  /* of all views but positions */
    int64_t n, width, blocks;   /* elements of a line; lines of a block, blocks of a nest row */
    int64_t stride[MOST_VIEWS]; /* bytes along the line, in the direction of the scan */
    lac_nest nest;
} scan_job;

static void state_reset(const scan_job *job, state *s)
{
    bool least = job->fn == LAC_CUMMIN, log_sum = job->fn == LAC_LOGCUMSUMEXP, prod = job->fn == LAC_CUMPROD;
    double a = job->backward                      ? 0
               : least                            ? (double)INFINITY
               : log_sum || job->fn == LAC_CUMMAX ? -(double)INFINITY
                                                  : prod;
    for (int64_t j = 0; j < job->width; j++) {
        s->a[j] = a;
        s->b[j] = 0;
        s->sum[j] = prod;
        s->most[j] = least ? INT64_MAX : INT64_MIN;
        s->at[j] = 0;
    }
}

/* the compute type of view v: positions are integers beside any values */
static int ctype_of(const scan_job *job, int v) { return lac_compute_type(job->views[v]->dtype); }

/* is a tile of view v an array of its compute type where it lies? */
static bool tile_is_array(const scan_job *job, int v, int64_t n, int64_t w)
{
    int64_t size = (int64_t)lac_compute_size(ctype_of(job, v));
    return (n == 1 || job->stride[v] == w * size) && lac_is_native(job->views[v]->dtype);
}

/* rows [first, first + n) of the scan, w lines, into a dense tile; `line` is row 0 of the scan */
static void tile_load(const scan_job *job, int v, const char *line, int64_t first, int64_t n, int64_t w, char *tile)
{
    const lac_view *x = job->views[v];
    int64_t bytes = lac_bytes_of(x->dtype), size = (int64_t)lac_compute_size(ctype_of(job, v));
    if (w == 1) {
        const void *got = LAC_CPU(load)(x->dtype, line + first * job->stride[v], job->stride[v], n, tile);
        if (got != tile) memcpy(tile, got, (size_t)(n * size));
        return;
    }
    for (int64_t r = 0; r < n; r++) {
        char *row = tile + r * w * size;
        const void *got = LAC_CPU(load)(x->dtype, line + (first + r) * job->stride[v], bytes, w, row);
        if (got != row) memcpy(row, got, (size_t)(w * size));
    }
}

static void tile_store(const scan_job *job, int v, char *line, int64_t first, int64_t n, int64_t w, const char *tile)
{
    const lac_view *x = job->views[v];
    int64_t bytes = lac_bytes_of(x->dtype), size = (int64_t)lac_compute_size(ctype_of(job, v));
    if (job->stream && tile_is_array(job, v, n, w)) {
        v_stream(line + first * job->stride[v], tile, (size_t)(n * w * size));
        return;
    }
    if (w == 1) {
        LAC_CPU(store)(x->dtype, tile, line + first * job->stride[v], job->stride[v], n);
        return;
    }
    for (int64_t r = 0; r < n; r++)
        LAC_CPU(store)(x->dtype, tile + r * w * size, line + (first + r) * job->stride[v], bytes, w);
}

/* view 2 of a product's gradient: the results one element before each row's, and 1 before the first */
static void tile_shifted(const scan_job *job, const char *line, int64_t first, int64_t n, int64_t w, char *tile)
{
    int64_t got = first + n < job->n ? n : n - 1, size = (int64_t)lac_compute_size(job->ctype);
    if (got > 0) tile_load(job, 2, line + job->stride[2], first, got, w, tile);
    for (int64_t j = 0; got < n && j < w; j++) {
        if (size == 4) ((float *)(void *)tile)[got * w + j] = 1;
        else ((double *)(void *)tile)[got * w + j] = 1;
    }
}

static void ask_ahead(const char *x, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += V_LINE) v_ask(x + i);
}

/* can LINES lines be summed at once? */
static bool lines_fit(const scan_job *job)
{
    bool dense = job->width == 1 && tile_is_array(job, 0, 2, 1) && tile_is_array(job, 1, 2, 1);
    return dense && (job->rule == sum_f || job->rule == sum_d);
}

static void sum_lines(const scan_job *job, const lac_cursor *c, int64_t line)
{
    const int64_t *out = job->nest.stride[0], *in = job->nest.stride[1];
    const void *from[LINES];
    void *to[LINES];
    for (int k = 0; k < LINES; k++) {
        to[k] = c->at[0] + (line + k) * out[job->nest.ndim - 1];
        from[k] = c->at[1] + (line + k) * in[job->nest.ndim - 1];
    }
    (job->rule == sum_f ? sum_lines_f : sum_lines_d)(from, to, job->n, job->stream);
}

static void scan_task(void *context, int64_t begin, int64_t end, int thread)
{
    const scan_job *job = context;
    const lac_nest *nest = &job->nest;
    const int last = nest->ndim - 1;
    const int64_t length = nest->shape[last];
    double space[MOST_VIEWS][TILE];
    void *tile[MOST_VIEWS];
    state s;
    lac_cursor c;
    (void)thread;
    const bool lines = lines_fit(job);
    for (int64_t t = begin; t < end; t++) {
        int64_t from = t % job->blocks * job->width, w = length - from < job->width ? length - from : job->width;
        int64_t most = TILE / w;
        if (t == begin) LAC_CPU(cursor_set)(nest, &c, t / job->blocks);
        else if (from == 0) lac_cursor_next(nest, &c);
        if (lines && end - t >= LINES && length - from >= LINES) {
            sum_lines(job, &c, from);
            t += LINES - 1;
            continue;
        }
        state_reset(job, &s);
        for (int64_t first = 0; first < job->n; first += most) {
            int64_t n = job->n - first < most ? job->n - first : most;
            for (int v = 0; v < job->count; v++) {
                char *line = c.at[v] + from * nest->stride[v][last];
                bool in_place = tile_is_array(job, v, n, w) && !(job->made[v] ? job->stream : v == 2 && job->shifted);
                tile[v] = in_place ? line + first * job->stride[v] : (char *)space[v];
                if (in_place && job->stream) ask_ahead(tile[v], n * w * (int64_t)lac_compute_size(ctype_of(job, v)));
                if (v == 2 && job->shifted) tile_shifted(job, line, first, n, w, tile[v]);
                else if (!job->made[v] && tile[v] == space[v]) tile_load(job, v, line, first, n, w, tile[v]);
            }
            job->rule(&s, tile, first, n, w);
            for (int v = 0; v < job->count; v++)
                if (job->made[v] && tile[v] == space[v])
                    tile_store(job, v, c.at[v] + from * nest->stride[v][last], first, n, w, tile[v]);
        }
    }
    if (job->stream) v_stream_end();
}

/* Do neighbouring lines lie side by side in every view, while the elements of a line do not? */
static bool side_by_side(const scan_job *job)
{
    int last = job->nest.ndim - 1;
    if (job->nest.shape[last] < LEAST || job->n < 2) return false;
    for (int v = 0; v < job->count; v++) {
        int64_t bytes = lac_bytes_of(job->views[v]->dtype);
        if (job->nest.stride[v][last] != bytes || llabs(job->stride[v]) == bytes) return false;
    }
    return true;
}

static int scan_run(const char *op, scan_job *job, int dim)
{
    lac_view rest[MOST_VIEWS];
    const lac_view *list[MOST_VIEWS];
    int64_t numel = lac_view_numel(job->views[0]);
    if (numel == 0) return 0;
    job->n = job->views[0]->shape[dim];
    job->ctype = ctype_of(job, 0);
    job->stream = numel * lac_bytes_of(job->views[0]->dtype) >= LAC_STREAM_BYTES;
    for (int v = 0; v < job->count; v++) {
        int64_t step = job->views[v]->stride[dim] * lac_bytes_of(job->views[v]->dtype);
        rest[v] = *job->views[v];
        rest[v].shape[dim] = 1;
        if (job->reverse) rest[v].data = (char *)rest[v].data + (job->n - 1) * step;
        job->stride[v] = job->reverse ? -step : step;
        list[v] = &rest[v];
    }
    LAC_CPU(nest_make)(&job->nest, job->count, list);
    int64_t length = job->nest.shape[job->nest.ndim - 1], rows = numel / job->n / length;
    job->width = 1;
    if (side_by_side(job)) { /* narrower blocks where there would not be one for each thread: no result depends on it */
        int64_t share = length / LAC_CPU(threads)(length, numel * 4) / LEAST * LEAST;
        job->width = length < WIDEST ? length : WIDEST;
        if (rows == 1 && share >= LEAST && share < job->width) job->width = share;
    }
    job->blocks = (length + job->width - 1) / job->width;
    return LAC_CPU(parallel)(op, rows * job->blocks, numel * 4, scan_task, job);
}

int LAC_CPU(scan)(const lac_a_scan *a)
{
    scan_job job = {.views = {&a->out, &a->x, &a->index}, .made = {true, false, true}, .reverse = a->reverse};
    job.fn = a->fn;
    job.count = a->index.data ? 3 : 2;
    job.rule = FORWARD[a->fn][lac_compute_type(a->x.dtype)];
    return scan_run("scan", &job, a->dim);
}

int LAC_CPU(scan_bwd)(const lac_a_scan_bwd *a)
{
    scan_job job = {.views = {&a->dx, &a->x, &a->y, &a->g}, .made = {true}, .count = 4, .fn = a->fn};
    bool wide = a->x.dtype == LAC_F64;
    job.reverse = job.backward = true;
    job.shifted = a->fn == LAC_CUMPROD;
    job.rule = job.shifted ? (wide ? prod_bwd_d : prod_bwd_f) : (wide ? logsumexp_bwd_d : logsumexp_bwd_f);
    return scan_run("scan_bwd", &job, a->dim);
}
