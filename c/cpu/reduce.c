/* reduce.c: sums, means, extrema and their positions on the CPU.
 *
 * Kept and reduced axes are merged separately; then the axis with the smallest stride decides. If it is reduced,
 * every output is a sum along memory ("rows"); if it is kept, 256 neighbouring outputs are accumulated together while
 * memory is walked row by row ("columns"). A few outputs of a long reduction are cut into parts of a size that depends
 * on the shape only, and the parts' results are combined in order: no thread count and no timing can show.
 *
 * Accuracy: f32, f16 and bf16 are summed in double, which is below the rounding of the result; f64 sums of 512 elements
 * (or 64 rows) are added up with Neumaier's compensation. Pairwise summation in f32 was rejected: it needs a
 * recursion over strides and is worse than a conversion that costs nothing next to the memory.
 * Extrema: NaN wins, the first of equals; positions count in row-major order, so axes are not reordered for them.
 */
#include "cpu.h"
#include <math.h>
#include <string.h>

enum { BLOCK = 512, COLUMNS = 256, SUBSUM = 64, PART = 32768, MOST_PARTS = 64 };
enum { CLASS_SUM, CLASS_EXTREME, CLASS_TRUTH };

/* what is known of one output: the value in double (floats) or integer, and where (extrema) */
typedef struct {
    double d, error;
    int64_t i, at; /* at: -1 before the first element */
} partial;

typedef struct {
    const lac_a_reduce *a;
    int ctype, class;
    bool smallest, position, columns;
    int kept, reduced;                                            /* axes */
    int64_t ks[LAC_MAX_DIMS], kx[LAC_MAX_DIMS], ko[LAC_MAX_DIMS]; /* kept: size, x's and out's strides in bytes */
    int64_t rs[LAC_MAX_DIMS], rx[LAC_MAX_DIMS];
    int64_t outputs, count; /* number of outputs; of elements behind each */
    int64_t blocks, parts;  /* column blocks per outer row (1 for rows); parts of the reduced range */
    partial *partials;      /* [outputs][parts] when parts > 1 */
} reduce_job;

/* ---- sums of blocks ---- */

double LAC_CPU(sum)(int ctype, const void *x, int64_t n)
{
    double s = 0;
    if (ctype == C_F32) {
        const float *f = x;
#pragma omp simd reduction(+ : s)
        for (int64_t i = 0; i < n; i++) s += (double)f[i];
    } else {
        const double *d = x;
#pragma omp simd reduction(+ : s)
        for (int64_t i = 0; i < n; i++) s += d[i];
    }
    return s;
}

/* Neumaier: sum and error together hold more than a double; infinities must not turn the error into NaN */
static inline void add_exact(double *sum, double *error, double x)
{
    double t = *sum + x;
    double lost = fabs(*sum) >= fabs(x) ? (*sum - t) + x : (x - t) + *sum;
    *error += isfinite(t) ? lost : 0;
    *sum = t;
}

static inline bool better_d(const reduce_job *job, double x, double best)
{
    if (best != best) return false;
    return x != x || (job->smallest ? x < best : x > best);
}

/* the extremum of a block, NaN if it has one; a comparison with NaN is false, so NaN is looked for apart */
#define EXTREME(name, type, reduction, compare, start)                                                                 \
    static double name(const type *x, int64_t n)                                                                       \
    {                                                                                                                  \
        type best = start;                                                                                             \
        int nan = 0;                                                                                                   \
        _Pragma("omp simd reduction(| : nan)") for (int64_t i = 0; i < n; i++) nan |= x[i] != x[i];                    \
        _Pragma(reduction) for (int64_t i = 0; i < n; i++) best = x[i] compare best ? x[i] : best;                     \
        return nan ? (double)NAN : (double)best;                                                                       \
    }
EXTREME(max_f, float, "omp simd reduction(max : best)", >, -INFINITY)
EXTREME(min_f, float, "omp simd reduction(min : best)", <, INFINITY)
EXTREME(max_d, double, "omp simd reduction(max : best)", >, -(double)INFINITY)
EXTREME(min_d, double, "omp simd reduction(min : best)", <, (double)INFINITY)

static void block_extreme_f(const reduce_job *job, partial *p, const void *x, int64_t n, int64_t first)
{
    bool single = job->ctype == C_F32;
    double m = single ? (job->smallest ? min_f : max_f)(x, n) : (job->smallest ? min_d : max_d)(x, n);
    if (p->at >= 0 && !better_d(job, m, p->d)) return;
    int64_t i = 0;
    for (; job->position && i < n; i++) {
        double v = single ? (double)((const float *)x)[i] : ((const double *)x)[i];
        if (m != m ? v != v : v == m) break;
    }
    p->d = m;
    p->at = first + i;
}

static void block_extreme_i(const reduce_job *job, partial *p, const int64_t *x, int64_t n, int64_t first)
{
    for (int64_t i = 0; i < n; i++)
        if (p->at < 0 || (job->smallest ? x[i] < p->i : x[i] > p->i)) {
            p->i = x[i];
            p->at = first + i;
        }
}

static int64_t count_true(int ctype, const void *x, int64_t n)
{
    int64_t c = 0;
    if (ctype == C_F32)
        for (int64_t i = 0; i < n; i++) c += ((const float *)x)[i] != 0;
    else if (ctype == C_F64)
        for (int64_t i = 0; i < n; i++) c += ((const double *)x)[i] != 0;
    else
        for (int64_t i = 0; i < n; i++) c += ((const int64_t *)x)[i] != 0;
    return c;
}

static void block_add(const reduce_job *job, partial *p, const void *x, int64_t n, int64_t first)
{
    if (job->class == CLASS_TRUTH) {
        p->i += count_true(job->ctype, x, n);
    } else if (job->class == CLASS_EXTREME) {
        if (job->ctype == C_I64) block_extreme_i(job, p, x, n, first);
        else block_extreme_f(job, p, x, n, first);
    } else if (job->ctype == C_I64) {
        const int64_t *v = x;
        uint64_t s = (uint64_t)p->i;
        for (int64_t i = 0; i < n; i++) s += (uint64_t)v[i];
        p->i = (int64_t)s;
    } else {
        add_exact(&p->d, &p->error, LAC_CPU(sum)(job->ctype, x, n));
    }
}

/* ---- walking the reduced range ---- */

typedef struct {
    int64_t index[LAC_MAX_DIMS];
    const char *at;
} reduced_cursor;

static void reduced_seek(const reduce_job *job, reduced_cursor *c, const char *base, int64_t position)
{
    c->at = base;
    for (int d = job->reduced - 1; d >= 0; d--) {
        int64_t size = job->rs[d] ? job->rs[d] : 1; /* an empty range has no position but 0 */
        c->index[d] = position % size;
        position /= size;
        c->at += c->index[d] * job->rx[d];
    }
}

/* steps over n elements of the last reduced axis, which must not pass its end */
static void reduced_step(const reduce_job *job, reduced_cursor *c, int64_t n)
{
    int d = job->reduced - 1;
    c->index[d] += n;
    c->at += n * job->rx[d];
    while (d > 0 && c->index[d] == job->rs[d]) {
        c->at -= job->rs[d] * job->rx[d];
        c->index[d--] = 0;
        c->index[d]++;
        c->at += job->rx[d];
    }
}

/* one output: elements [begin, end) of its reduced range */
static void reduce_row(const reduce_job *job, const char *base, int64_t begin, int64_t end, partial *p)
{
    double space[BLOCK];
    reduced_cursor c;
    int last = job->reduced - 1, dtype = job->a->x.dtype;
    if (begin >= end) return; /* also when an axis has no elements */
    reduced_seek(job, &c, base, begin);
    for (int64_t r = begin, n; r < end; r += n) {
        n = job->rs[last] - c.index[last];
        if (n > BLOCK) n = BLOCK;
        if (n > end - r) n = end - r;
        block_add(job, p, LAC_CPU(load)(dtype, c.at, job->rx[last], n, space), n, r);
        reduced_step(job, &c, n);
    }
}

/* sums of w columns: 64 rows at a time in plain doubles, then with compensation */
static void add_columns(const reduce_job *job, partial *p, const double *sums, const uint64_t *isums, int64_t w)
{
    for (int64_t j = 0; j < w; j++) {
        if (job->class == CLASS_SUM && job->ctype != C_I64) add_exact(&p[j].d, &p[j].error, sums[j]);
        else p[j].i = (int64_t)((uint64_t)p[j].i + isums[j]);
    }
}

static void column_extremes(const reduce_job *job, partial *p, const void *x, int64_t w, int64_t r)
{
    for (int64_t j = 0; j < w; j++) {
        if (job->ctype == C_I64) {
            int64_t v = ((const int64_t *)x)[j];
            if (p[j].at >= 0 && !(job->smallest ? v < p[j].i : v > p[j].i)) continue;
            p[j].i = v;
        } else {
            double v = job->ctype == C_F32 ? (double)((const float *)x)[j] : ((const double *)x)[j];
            if (p[j].at >= 0 && !better_d(job, v, p[j].d)) continue;
            p[j].d = v;
        }
        p[j].at = r;
    }
}

/* w neighbouring outputs, x's elements `step` bytes apart */
static void reduce_columns(const reduce_job *job, const char *base, int64_t step, int64_t w, int64_t begin, int64_t end,
                           partial *p)
{
    double space[COLUMNS], sums[COLUMNS];
    uint64_t isums[COLUMNS];
    reduced_cursor c;
    int dtype = job->a->x.dtype;
    if (begin >= end) return;
    reduced_seek(job, &c, base, begin);
    for (int64_t r = begin; r < end;) {
        int64_t stop = end - r < SUBSUM ? end : r + SUBSUM;
        for (int64_t j = 0; j < w; j++) sums[j] = 0, isums[j] = 0;
        for (; r < stop; r++, reduced_step(job, &c, 1)) {
            const void *x = LAC_CPU(load)(dtype, c.at, step, w, space);
            if (job->class == CLASS_EXTREME) column_extremes(job, p, x, w, r);
            else if (job->class == CLASS_TRUTH)
                for (int64_t j = 0; j < w; j++)
                    isums[j] +=
                        (uint64_t)count_true(job->ctype, (const char *)x + (size_t)j * lac_compute_size(job->ctype), 1);
            else if (job->ctype == C_F32)
                for (int64_t j = 0; j < w; j++) sums[j] += (double)((const float *)x)[j];
            else if (job->ctype == C_F64)
                for (int64_t j = 0; j < w; j++) sums[j] += ((const double *)x)[j];
            else
                for (int64_t j = 0; j < w; j++) isums[j] += (uint64_t)((const int64_t *)x)[j];
        }
        if (job->class != CLASS_EXTREME) add_columns(job, p, sums, isums, w);
    }
}

/* ---- results ---- */

static void combine(const reduce_job *job, partial *into, const partial *p)
{
    if (job->class == CLASS_EXTREME) {
        if (p->at < 0) return;
        bool better = into->at < 0 || (job->ctype == C_I64 ? (job->smallest ? p->i < into->i : p->i > into->i)
                                                           : better_d(job, p->d, into->d));
        if (better) *into = *p;
        return;
    }
    into->i = (int64_t)((uint64_t)into->i + (uint64_t)p->i);
    add_exact(&into->d, &into->error, p->d);
    into->error += p->error;
}

static void finish(const reduce_job *job, const partial *p, char *out)
{
    int fn = job->a->fn, dtype = job->a->out.dtype;
    double d = job->class == CLASS_SUM ? p->d + p->error : p->d;
    if (fn == LAC_MEAN) d /= (double)job->count;
    float f = (float)d;
    int64_t i = p->i;
    if (fn == LAC_ANY) i = p->i > 0;
    if (fn == LAC_ALL) i = p->i == job->count;
    if (job->position) i = p->at;
    int ctype = lac_compute_type(dtype);
    const void *v = ctype == C_F32 ? (void *)&f : ctype == C_F64 ? (void *)&d : (void *)&i;
    LAC_CPU(store)(dtype, v, out, lac_bytes_of(dtype), 1);
}

/* ---- tasks ---- */

static void reduce_task(void *context, int64_t begin, int64_t end, int thread)
{
    const reduce_job *job = context;
    partial p[COLUMNS];
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t part = t % job->parts, rest = t / job->parts, block = rest % job->blocks, outer = rest / job->blocks;
        const char *x = job->a->x.data;
        char *out = job->a->out.data;
        int inner = job->columns ? job->kept - 1 : job->kept; /* axes [0, inner) count outer rows */
        int64_t width = 1, number = outer, step = 0, out_step = 0;
        for (int d = inner - 1; d >= 0; d--) {
            int64_t i = outer % job->ks[d];
            outer /= job->ks[d];
            x += i * job->kx[d];
            out += i * job->ko[d];
        }
        if (job->columns) {
            int64_t first = block * COLUMNS;
            step = job->kx[inner];
            out_step = job->ko[inner];
            width = job->ks[inner] - first < COLUMNS ? job->ks[inner] - first : COLUMNS;
            number = number * job->ks[inner] + first;
            x += first * step;
            out += first * out_step;
        }
        for (int64_t j = 0; j < width; j++) p[j] = (partial){.at = -1};
        /* the share of this part, by shape only */
        int64_t share = job->count / job->parts, extra = job->count % job->parts;
        int64_t from = part * share + (part < extra ? part : extra), to = from + share + (part < extra);
        if (job->columns) reduce_columns(job, x, step, width, from, to, p);
        else reduce_row(job, x, from, to, p);
        for (int64_t j = 0; j < width; j++) {
            if (job->parts > 1) job->partials[(number + j) * job->parts + part] = p[j];
            else finish(job, &p[j], out + j * out_step);
        }
    }
}

static void combine_all(const reduce_job *job)
{
    for (int64_t n = 0; n < job->outputs; n++) {
        partial total = {.at = -1};
        char *out = job->a->out.data;
        int64_t rest = n;
        for (int d = job->kept - 1; d >= 0; d--) {
            out += rest % job->ks[d] * job->ko[d];
            rest /= job->ks[d];
        }
        for (int64_t part = 0; part < job->parts; part++) combine(job, &total, &job->partials[n * job->parts + part]);
        finish(job, &total, out);
    }
}

/* ---- set-up ---- */

static int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

static void swap(int64_t *x, int64_t *y)
{
    int64_t z = *x;
    *x = *y;
    *y = z;
}

static void split_axes(reduce_job *job)
{
    const lac_view *x = &job->a->x, *out = &job->a->out;
    int64_t xb = lac_bytes_of(x->dtype), ob = lac_bytes_of(out->dtype);
    if (!lac_view_numel(x)) xb = 0; /* the strides of an empty view are never followed and may be anything */
    for (int d = 0; d < x->ndim; d++) {
        int64_t n = x->shape[d], sx = x->stride[d] * xb, so = out->stride[d] * ob;
        if (n == 1) continue;
        if (job->a->dims >> d & 1) {
            int at = job->reduced;
            if (at > 0 && job->rx[at - 1] == sx * n) job->rs[at - 1] *= n, job->rx[at - 1] = sx;
            else job->rs[at] = n, job->rx[at] = sx, job->reduced++;
        } else {
            int at = job->kept;
            if (at > 0 && job->kx[at - 1] == sx * n && job->ko[at - 1] == so * n)
                job->ks[at - 1] *= n, job->kx[at - 1] = sx, job->ko[at - 1] = so;
            else job->ks[at] = n, job->kx[at] = sx, job->ko[at] = so, job->kept++;
        }
    }
    if (job->reduced == 0) job->rs[0] = 1, job->rx[0] = xb, job->reduced = 1;
}

/* brings the axes with the smallest strides to the end and decides between rows and columns */
static void choose_order(reduce_job *job)
{
    int k = job->kept - 1, r = job->reduced - 1;
    for (int d = 0; d < k; d++)
        if (magnitude(job->kx[d]) < magnitude(job->kx[k]))
            swap(&job->ks[d], &job->ks[k]), swap(&job->kx[d], &job->kx[k]), swap(&job->ko[d], &job->ko[k]);
    if (!job->position)
        for (int d = 0; d < r; d++)
            if (magnitude(job->rx[d]) < magnitude(job->rx[r]))
                swap(&job->rs[d], &job->rs[r]), swap(&job->rx[d], &job->rx[r]);
    job->columns = k >= 0 && job->ks[k] >= 4 && magnitude(job->kx[k]) < magnitude(job->rx[r]);
}

int LAC_CPU(reduce)(const lac_a_reduce *a)
{
    reduce_job job = {.a = a, .ctype = lac_compute_type(a->x.dtype), .outputs = 1, .count = 1, .blocks = 1, .parts = 1};
    job.class = a->fn <= LAC_MEAN ? CLASS_SUM : a->fn == LAC_ANY || a->fn == LAC_ALL ? CLASS_TRUTH : CLASS_EXTREME;
    job.smallest = a->fn == LAC_MIN || a->fn == LAC_ARGMIN;
    job.position = a->fn == LAC_ARGMAX || a->fn == LAC_ARGMIN;
    split_axes(&job);
    choose_order(&job);
    for (int d = 0; d < job.kept; d++) job.outputs *= job.ks[d];
    for (int d = 0; d < job.reduced; d++) job.count *= job.rs[d];
    if (job.outputs == 0) return 0;
    int64_t rows = job.outputs;
    if (job.columns) {
        int64_t width = job.ks[job.kept - 1];
        job.blocks = (width + COLUMNS - 1) / COLUMNS;
        rows = job.outputs / width * job.blocks;
    }
    double work = (double)job.outputs * (double)(job.count + 1);
    double per_task = work / (double)rows;
    if (rows < MOST_PARTS && per_task > PART) {
        double wanted = per_task / PART, most = (double)(MOST_PARTS / rows);
        job.parts = (int64_t)(wanted < most ? wanted : most);
        if (job.parts > job.count) job.parts = job.count;
        if (job.parts < 1) job.parts = 1;
    }
    if (job.parts > 1) {
        job.partials = lac_workspace_get("reduce", sizeof(partial) * (size_t)(job.outputs * job.parts));
        if (!job.partials) return LAC_E_MEMORY;
    }
    int status =
        LAC_CPU(parallel)("reduce", rows * job.parts, work > 1e18 ? (int64_t)1e18 : (int64_t)work, reduce_task, &job);
    if (job.parts > 1) {
        if (!status) combine_all(&job);
        lac_workspace_put(job.partials);
    }
    return status;
}
