/* scatter.c: writing elements to indexed places along an axis, on the CPU.
 *
 * Lines along the axis are independent, and a line belongs to one thread, which takes the sources in their order. So
 * sums do not depend on threads, and "the last one wins" means what it says, which atomics could not promise. Up to
 * COLUMNS neighbouring lines go together, so that an axis that is not the last is still read by whole cache lines.
 * gather's gradient is such a sum into zeros. Combining modes keep their lines in double (or int64_t) until all sources
 * are in and round once: adding a thousand bf16 numbers one by one into bf16 would stop at 256. Rejected: sorting
 * indices first, as index_put does for slices; here a source is one element, and the sort would cost more than the sum.
 */
#include "cpu.h"
#include "simd.h"

enum {
    COLUMNS = 16,
    FEW_COLUMNS = 4,
    CELLS = 1 << 15, /* sums that fit the second cache */
    BLOCK = 256
};

typedef struct {
    const lac_a_scatter *a;
    const int64_t *index;     /* row-major, checked */
    int64_t inner, blocks, w; /* elements after `dim`; blocks of w lines per row of the last axis */
    int64_t bytes;
    char *workspace; /* per thread: sums [size][w], then counts */
    int ctype;
    bool zeros; /* places hold 0 before, whatever is in dst */
} scatter_job;

/* the lines of one task */
typedef struct {
    char *dst;
    const char *src;
    const int64_t *index;
    int64_t w, dst_last, src_last; /* lines, and bytes between them */
} lines;

static lines lines_of(const scatter_job *job, int64_t t)
{
    const lac_a_scatter *a = job->a;
    int last = a->index.ndim - 1;
    int64_t bytes = lac_bytes_of(a->dst.dtype), at = 0, step = 1, block = 0, length = a->index.shape[last];
    int64_t dst = 0, src = 0;
    if (a->dim != last) {
        block = t % job->blocks * job->w;
        t /= job->blocks;
    }
    for (int d = last; d >= 0; step *= a->index.shape[d], d--) {
        int64_t i = d == a->dim ? 0 : d == last ? block : t % a->index.shape[d];
        if (d != a->dim && d != last) t /= a->index.shape[d];
        at += i * step;
        dst += i * a->dst.stride[d];
        src += i * a->src.stride[d];
    }
    bool one = a->dim == last;
    return (lines){.dst = (char *)a->dst.data + dst * bytes,
                   .src = (const char *)a->src.data + src * bytes,
                   .index = job->index + at,
                   .w = one                       ? 1
                        : length - block < job->w ? length - block
                                                  : job->w,
                   .dst_last = one ? bytes : a->dst.stride[last] * bytes,
                   .src_last = one ? bytes : a->src.stride[last] * bytes};
}

static void set_lines(const scatter_job *job, const lines *l)
{
    const lac_a_scatter *a = job->a;
    int64_t bytes = lac_bytes_of(a->dst.dtype), n = a->index.shape[a->dim];
    int64_t dst_step = a->dst.stride[a->dim] * bytes, src_step = a->src.stride[a->dim] * bytes;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < l->w; j++) {
            lac_put(bytes, l->dst + l->index[i * job->inner + j] * dst_step + j * l->dst_last,
                    l->src + i * src_step + j * l->src_last);
        }
}

/* `combine` of a sum and a value, for every source of every line; first: what a place starts from without self */
#define COMBINE_D(name, expression)                                                                                    \
    static void name(double *sums, const double *v, const int64_t *index, int64_t w)                                   \
    {                                                                                                                  \
        for (int64_t j = 0; j < w; j++) {                                                                              \
            double *cell = sums + index[j] * w + j, a = *cell, b = v[j];                                               \
            *cell = expression;                                                                                        \
        }                                                                                                              \
    }
#define COMBINE_I(name, expression)                                                                                    \
    static void name(int64_t *sums, const int64_t *v, const int64_t *index, int64_t w)                                 \
    {                                                                                                                  \
        for (int64_t j = 0; j < w; j++) {                                                                              \
            int64_t *cell = sums + index[j] * w + j, a = *cell, b = v[j];                                              \
            *cell = expression;                                                                                        \
        }                                                                                                              \
    }
COMBINE_D(add_d, a + b)
COMBINE_D(max_d, a != a || a > b ? a : b) /* NaN wins */
COMBINE_D(min_d, a != a || a < b ? a : b)
COMBINE_I(add_i, (int64_t)((uint64_t)a + (uint64_t)b))
COMBINE_I(max_i, a > b ? a : b)
COMBINE_I(min_i, a < b ? a : b)

static void combine(int mode, int ctype, double *sums, const double *v, const int64_t *index, int64_t w)
{
    int64_t *isums = (int64_t *)(void *)sums;
    const int64_t *iv = (const int64_t *)(const void *)v;
    if (ctype == C_I64 && mode == LAC_SCATTER_MAX) max_i(isums, iv, index, w);
    else if (ctype == C_I64 && mode == LAC_SCATTER_MIN) min_i(isums, iv, index, w);
    else if (ctype == C_I64) add_i(isums, iv, index, w);
    else if (mode == LAC_SCATTER_MAX) max_d(sums, v, index, w);
    else if (mode == LAC_SCATTER_MIN) min_d(sums, v, index, w);
    else add_d(sums, v, index, w);
}

/* n values of a compute type to double, or int64_t as they are */
static void widen(int ctype, const void *x, int64_t n, void *out)
{
    double *d = out;
    if (ctype == C_F32)
        for (int64_t i = 0; i < n; i++) d[i] = (double)((const float *)x)[i];
    else if (x != out) memcpy(out, x, (size_t)n * 8);
}

/* n sums, at most BLOCK, rounded once, into dst */
static void narrow(int dtype, int ctype, const double *sums, int64_t n, char *dst, int64_t stride)
{
    float f[BLOCK];
    if (ctype != C_F32) {
        LAC_CPU(store)(dtype, sums, dst, stride, n);
        return;
    }
    for (int64_t i = 0; i < n; i++) f[i] = dtype == LAC_F32 ? (float)sums[i] : v_round_odd(sums[i]);
    LAC_CPU(store)(dtype, f, dst, stride, n);
}

/* one line, whose sources are added to what is there */
#define ADD_LINE(T)                                                                                                    \
    for (int64_t i = 0; i < m; i++) sums[index[i * inner]] += (double)((const T *)v)[i]
static void add_line(const scatter_job *job, const lines *l, double *sums)
{
    const lac_a_scatter *a = job->a;
    int dtype = a->dst.dtype;
    int64_t step = a->src.stride[a->dim] * lac_bytes_of(dtype), n = a->index.shape[a->dim];
    const int64_t inner = job->inner;
    int64_t *isums = (int64_t *)(void *)sums;
    double space[BLOCK];
    for (int64_t at = 0, m; at < n; at += m) {
        m = n - at < BLOCK ? n - at : BLOCK;
        const void *v = LAC_CPU(load)(dtype, l->src + at * step, step, m, space);
        const int64_t *index = l->index + at * inner;
        if (job->ctype == C_F32) ADD_LINE(float);
        else if (job->ctype == C_F64) ADD_LINE(double);
        else
            for (int64_t i = 0; i < m; i++) add_i(isums, (const int64_t *)v + i, index + i * inner, 1);
    }
}

static void combine_lines(const scatter_job *job, const lines *l, double *sums, int32_t *counts)
{
    const lac_a_scatter *a = job->a;
    int dtype = a->dst.dtype, ctype = job->ctype, mode = a->mode;
    int64_t bytes = lac_bytes_of(dtype), n = a->index.shape[a->dim], size = a->dst.shape[a->dim], w = l->w;
    int64_t dst_step = a->dst.stride[a->dim] * bytes, src_step = a->src.stride[a->dim] * bytes;
    double space[BLOCK], values[COLUMNS];
    bool counted = mode == LAC_SCATTER_MEAN || !a->self;
    int64_t run = w == 1 ? BLOCK : 1, step = w == 1 ? dst_step : l->dst_last; /* one line by many places at once */
    if (job->zeros) memset(sums, 0, (size_t)(size * w) * 8);
    for (int64_t r = 0; r < size && !job->zeros; r += run) {
        int64_t m = w > 1 ? w : size - r < run ? size - r : run;
        widen(ctype, LAC_CPU(load)(dtype, l->dst + r * dst_step, step, m, space), m, sums + r * w);
    }
    if (counted) memset(counts, 0, (size_t)(size * w) * sizeof *counts);
    bool adds = mode == LAC_SCATTER_ADD && a->self, plain = dtype == LAC_F32 && l->src_last == 4 && adds;
    if (adds && w == 1) add_line(job, l, sums);
    if (adds && w == 1) n = 0;
    for (int64_t i = 0; plain && i < n; i++) {
        const int64_t *index = l->index + i * job->inner;
        const float *v = (const float *)(const void *)(l->src + i * src_step);
        for (int64_t j = 0; j < w; j++) sums[index[j] * w + j] += (double)v[j];
    }
    for (int64_t i = 0; !plain && i < n; i++) {
        const int64_t *index = l->index + i * job->inner;
        widen(ctype, LAC_CPU(load)(dtype, l->src + i * src_step, l->src_last, w, space), w, values);
        for (int64_t j = 0; j < w && counted; j++) {
            int64_t cell = index[j] * w + j;
            if (counts[cell]++ > 0 || a->self) continue;
            /* the first source of a place: start from what leaves it as it is */
            if (mode == LAC_SCATTER_MAX || mode == LAC_SCATTER_MIN) sums[cell] = values[j];
            else sums[cell] = 0; /* also the bits of the integer 0 */
        }
        combine(mode, ctype, sums, values, index, w);
    }
    if (mode == LAC_SCATTER_MEAN)
        for (int64_t c = 0; c < size * w; c++)
            if (counts[c] > 0) sums[c] /= (double)counts[c] + (a->self ? 1 : 0);
    for (int64_t r = 0; r < size; r += run)
        narrow(dtype, ctype, sums + r * w, w > 1 ? w : size - r < run ? size - r : run, l->dst + r * dst_step, step);
}

static void scatter_task(void *context, int64_t begin, int64_t end, int thread)
{
    const scatter_job *job = context;
    char *space = job->workspace ? job->workspace + job->bytes * thread : NULL;
    for (int64_t t = begin; t < end; t++) {
        lines l = lines_of(job, t);
        if (!space) { /* mode "set" */
            set_lines(job, &l);
            continue;
        }
        double *sums = (double *)(void *)space;
        combine_lines(job, &l, sums, (int32_t *)(void *)(sums + job->a->dst.shape[job->a->dim] * job->w));
    }
}

static int scatter_run(const char *op, const lac_a_scatter *a, bool zeros)
{
    const int64_t *index;
    int64_t *own, size = a->dst.shape[a->dim], total = lac_view_numel(&a->index), lines_total = 1;
    int last = a->index.ndim - 1;
    LAC_TRY(LAC_CPU(index_list)(op, "index", &a->index, size, NULL, false, &index, &own)); /* dst is apart from it */
    scatter_job job = {.a = a, .index = index, .inner = 1, .blocks = 1, .w = 1, .zeros = zeros};
    if (total == 0) return lac_workspace_put(own), 0;
    job.ctype = lac_compute_type(a->dst.dtype);
    for (int d = a->dim + 1; d <= last; d++) job.inner *= a->index.shape[d];
    if (a->dim != last) {
        job.w = size > 0 && CELLS / size < COLUMNS ? CELLS / size : COLUMNS;
        if (job.w < FEW_COLUMNS) job.w = FEW_COLUMNS;
        if (job.w > a->index.shape[last]) job.w = a->index.shape[last];
        job.blocks = (a->index.shape[last] + job.w - 1) / job.w;
        lines_total = job.blocks;
    }
    for (int d = 0; d < last; d++)
        if (d != a->dim) lines_total *= a->index.shape[d];
    int64_t work = 2 * total + (a->mode == LAC_SCATTER_SET ? 0 : lac_view_numel(&a->dst));
    int status = 0;
    if (a->mode != LAC_SCATTER_SET) {
        job.bytes = (size * job.w * 12 + 63) / 64 * 64;
        job.workspace = lac_workspace_get(op, (size_t)(job.bytes * LAC_CPU(threads)(lines_total, work)));
        if (!job.workspace) status = LAC_E_MEMORY;
    }
    if (!status) status = LAC_CPU(parallel)(op, lines_total, work, scatter_task, &job);
    lac_workspace_put(job.workspace);
    lac_workspace_put(own);
    return status;
}

int LAC_CPU(scatter)(const lac_a_scatter *a) { return scatter_run("scatter", a, false); }

int LAC_CPU(gather_bwd)(const lac_a_index_bwd *a)
{
    const lac_a_scatter sum = {
        .dst = a->out, .index = a->index, .src = a->g, .dim = a->dim, .mode = LAC_SCATTER_ADD, .self = true};
    if (lac_view_numel(&a->out) > 0 && lac_view_numel(&a->g) == 0) { /* no sources */
        memset(a->out.data, 0, (size_t)(lac_view_numel(&a->out) * lac_bytes_of(a->out.dtype)));
        return 0;
    }
    return scatter_run("gather_bwd", &sum, true);
}
