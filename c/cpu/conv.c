/* conv.c: the one-dimensional convolution and its gradients on the CPU.
 *
 * One routine serves the result and dx. Both are sums over taps: out[m][j] = sum of A[m][c, t] src[c][j step + off_t]
 * with zeros outside of src. For the result, taps are the kernel's and step is the stride. For dx, positions are taken
 * by their remainder modulo the stride: within one remainder only some taps meet g, at step 1, so that a strided
 * convolution's gradient multiplies no zeros and nobody adds into a place that another thread also writes.
 * Columns are cut into chunks; the taps' shifted rows of a chunk (im2col) fit the cache and go through one matrix
 * product, so that the unfolded input never exists as a whole. Where there is little to multiply (depthwise), rows are
 * added directly and read in place. dw is the product of g's rows with the same unfolded chunks, summed over batch and
 * chunks in order; tasks are blocks of input channels, so no chunk is unfolded twice and threads share no sum.
 * Rejected: FFT (kernels here have up to a few dozen taps) and Winograd (bf16 would lose half of its digits).
 */
#include "cpu.h"
#include "simd.h"

enum { COLUMN_ELEMENTS = 1 << 17, LEAST_COLUMNS = 128, MOST_COLUMNS = 1024, DIRECT_TAPS = 32, DIRECT_ROWS = 2 };

/* out = A x taps of src, for one batch item, group and remainder */
typedef struct {
    int64_t rows, channels, taps, columns;
    const void *a;           /* [rows][channels * taps] in the compute type */
    const int64_t *off;      /* [taps] */
    const char *src;         /* of the item's first channel */
    int64_t src_c, src_n, n; /* bytes between channels and positions; positions */
    int64_t step;
    char *out;
    int64_t out_m, out_j; /* bytes */
    const char *bias;     /* of the first row, or NULL */
    int64_t bias_m;
} taps;

typedef struct {
    const lac_view *x, *w, *g, *dw;
    const lac_a_conv1d *forward;
    const lac_a_conv1d_bwd *backward;
    int dtype, ctype;
    int64_t size;                                                                 /* bytes of the compute type */
    int64_t batch, groups, in, outs, kernel, n, length, stride, dilation, before; /* in, outs: channels per group */
    int64_t remainders, chunks, width;                                            /* of the columns */
    const char *packed;                                                           /* A's, [groups][remainders] */
    const int64_t *tap, *first; /* tap: k, first[r] .. first[r + 1] are the taps of remainder r */
    const int64_t *off;
    int64_t block, blocks; /* dw: channels of a task */
    int64_t bytes;
    char *workspace;
    int status; /* of a product that failed; tasks of one thread or another may set it, all to an error */
} conv_job;

/* count values src[c][(j0 + j) step + off] in the compute type: an address inside src, or `space` filled */
static const void *tap_row(const conv_job *job, const taps *s, int64_t c, int64_t off, int64_t j0, int64_t count,
                           void *space)
{
    int64_t low = 0, high = count, at = j0 * s->step + off;
    if (at < 0) low = (-at + s->step - 1) / s->step;
    if (at + (count - 1) * s->step >= s->n) high = at >= s->n ? 0 : (s->n - 1 - at) / s->step + 1;
    if (low > count) low = count;
    if (high < low) high = low;
    const char *from = s->src + c * s->src_c + (at + low * s->step) * s->src_n;
    char *to = (char *)space + low * job->size;
    if (low > 0) memset(space, 0, (size_t)(low * job->size));
    if (high < count) memset((char *)space + high * job->size, 0, (size_t)((count - high) * job->size));
    if (high == low) return space;
    const void *v = LAC_CPU(load)(job->dtype, from, s->src_n * s->step, high - low, to);
    if (v == to) return space;
    if (low == 0 && high == count) return v;
    memcpy(to, v, (size_t)((high - low) * job->size));
    return space;
}

#define DIRECT(T, S)                                                                                                   \
    static void axpy_##S(T a, const T *x, T *y, int64_t n)                                                             \
    {                                                                                                                  \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] += a * x[i];                                          \
    }                                                                                                                  \
    static double dot_##S(const T *x, const T *y, int64_t n)                                                           \
    {                                                                                                                  \
        T sum = 0;                                                                                                     \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];                     \
        return (double)sum;                                                                                            \
    }                                                                                                                  \
    static void fill_##S(T value, T *y, int64_t n)                                                                     \
    {                                                                                                                  \
        for (int64_t i = 0; i < n; i++) y[i] = value;                                                                  \
    }
DIRECT(float, f)
DIRECT(double, d)

static double bias_of(const conv_job *job, const taps *s, int64_t m)
{
    double space = 0;
    if (!s->bias) return 0;
    const void *v = LAC_CPU(load)(job->dtype, s->bias + m * s->bias_m, 0, 1, &space);
    return job->ctype == C_F32 ? (double)*(const float *)v : *(const double *)v;
}

/* few rows and taps: sums of shifted rows, read in place where they can be */
static void direct_chunk(const conv_job *job, const taps *s, int64_t j0, int64_t count, char *space)
{
    char *sum = space, *row = space + MOST_COLUMNS * 8;
    for (int64_t m = 0; m < s->rows; m++) {
        char *to = s->out + m * s->out_m + j0 * s->out_j;
        bool in_place = lac_is_native(job->dtype) && s->out_j == job->size;
        char *y = in_place ? to : sum;
        double b = bias_of(job, s, m);
        if (job->ctype == C_F32) fill_f((float)b, (float *)(void *)y, count);
        else fill_d(b, (double *)(void *)y, count);
        for (int64_t c = 0; c < s->channels; c++)
            for (int64_t t = 0; t < s->taps; t++) {
                const void *v = tap_row(job, s, c, s->off[t], j0, count, row);
                int64_t at = (m * s->channels + c) * s->taps + t;
                if (job->ctype == C_F32) axpy_f(((const float *)s->a)[at], v, (float *)(void *)y, count);
                else axpy_d(((const double *)s->a)[at], v, (double *)(void *)y, count);
            }
        if (!in_place) LAC_CPU(store)(job->dtype, y, to, s->out_j, count);
    }
}

static int product_chunk(const conv_job *job, const taps *s, int64_t j0, int64_t count, char *space)
{
    int64_t depth = s->channels * s->taps;
    char *columns = space, *buffer = space + depth * job->width * job->size;
    /* a kernel of one position: src is its own unfolding */
    bool as_is = s->taps == 1 && s->step == 1 && lac_is_native(job->dtype) && s->src_n == job->size && s->src_c > 0 &&
                 j0 + s->off[0] >= 0 && j0 + s->off[0] + count <= s->n;
    for (int64_t c = 0; c < s->channels && !as_is; c++)
        for (int64_t t = 0; t < s->taps; t++) {
            char *to = columns + (c * s->taps + t) * count * job->size;
            const void *v = tap_row(job, s, c, s->off[t], j0, count, to);
            if (v != to) memcpy(to, v, (size_t)(count * job->size));
        }
    int plain = job->ctype == C_F64 ? LAC_F64 : LAC_F32;
    bool in_place = lac_is_native(job->dtype) && s->out_j == job->size;
    lac_gemm g = {.m = s->rows, .n = count, .k = depth, .a = s->a, .a_dtype = plain, .a_rs = depth, .a_cs = 1};
    g.b = as_is ? s->src + (j0 + s->off[0]) * s->src_n : columns;
    g.b_dtype = g.c_dtype = plain;
    g.b_rs = as_is ? s->src_c / job->size : count;
    g.b_cs = 1;
    g.c = in_place ? s->out + j0 * s->out_j : buffer;
    g.ldc = in_place ? s->out_m / job->size : count;
    LAC_TRY(LAC_CPU(gemm)("conv1d", &g));
    for (int64_t m = 0; m < s->rows; m++) {
        char *row = (char *)g.c + m * g.ldc * job->size;
        double b = bias_of(job, s, m);
        if (s->bias && job->ctype == C_F32)
            for (int64_t j = 0; j < count; j++) ((float *)(void *)row)[j] += (float)b;
        else if (s->bias)
            for (int64_t j = 0; j < count; j++) ((double *)(void *)row)[j] += b;
        if (!in_place) LAC_CPU(store)(job->dtype, row, s->out + m * s->out_m + j0 * s->out_j, s->out_j, count);
    }
    return 0;
}

/* the sums of one batch item, group and remainder */
static taps taps_of(const conv_job *job, int64_t b, int64_t group, int64_t r)
{
    const lac_view *src = job->forward ? &job->forward->x : job->g;
    const lac_view *out = job->forward ? &job->forward->out : &job->backward->dx;
    int64_t bytes = lac_bytes_of(job->dtype), rows = job->forward ? job->outs : job->in;
    int64_t channels = job->forward ? job->in : job->outs, first = job->first[r], count = job->first[r + 1] - first;
    int64_t before = job->in * job->outs * (group * job->kernel + first); /* elements of the A's in front */
    taps s = {.rows = rows,
              .channels = channels,
              .taps = count,
              .columns = job->forward ? job->length : (job->n - r + job->stride - 1) / job->stride,
              .a = job->packed + before * job->size,
              .off = job->off + first,
              .src = (const char *)src->data + (b * src->stride[0] + group * channels * src->stride[1]) * bytes,
              .src_c = src->stride[1] * bytes,
              .src_n = src->stride[2] * bytes,
              .n = src->shape[2],
              .step = job->forward ? job->stride : 1,
              .out_m = out->stride[1] * bytes,
              .out_j = (job->forward ? 1 : job->stride) * out->stride[2] * bytes};
    s.out =
        (char *)out->data + (b * out->stride[0] + group * rows * out->stride[1]) * bytes + r * out->stride[2] * bytes;
    if (job->forward && job->forward->bias.data) {
        s.bias_m = job->forward->bias.stride[0] * bytes;
        s.bias = (const char *)job->forward->bias.data + group * rows * s.bias_m;
    }
    return s;
}

static bool is_direct(int64_t rows, int64_t depth) { return rows <= DIRECT_ROWS && depth <= DIRECT_TAPS; }

static void taps_task(void *context, int64_t begin, int64_t end, int thread)
{
    conv_job *job = context;
    char *space = job->workspace + job->bytes * thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t chunk = t % job->chunks, rest = t / job->chunks, r = rest % job->remainders;
        rest /= job->remainders;
        taps s = taps_of(job, rest / job->groups, rest % job->groups, r);
        int64_t j0 = chunk * job->width, count = s.columns - j0 < job->width ? s.columns - j0 : job->width;
        if (count <= 0) continue;
        if (is_direct(s.rows, s.channels * s.taps)) direct_chunk(job, &s, j0, count, space);
        else if (product_chunk(job, &s, j0, count, space)) job->status = LAC_E_INTERRUPTED;
    }
}

/* the taps of every remainder, and the matrices A in the compute type */
static int prepare(const char *op, conv_job *job, int64_t **tables, char **packed)
{
    const lac_view *w = job->w;
    int64_t bytes = lac_bytes_of(job->dtype), at = 0, cells = job->groups * job->outs * job->in * job->kernel;
    *packed = NULL;
    *tables = lac_workspace_get(op, (size_t)(2 * job->kernel + job->remainders + 1) * 8);
    if (*tables) *packed = lac_workspace_get(op, (size_t)(cells * job->size) + 64);
    if (!*packed) return LAC_E_MEMORY;
    int64_t *tap = *tables, *off = tap + job->kernel, *first = off + job->kernel;
    for (int64_t r = 0; r < job->remainders; r++) {
        first[r] = at;
        for (int64_t k = 0; k < job->kernel; k++) {
            int64_t p = job->forward ? k * job->dilation - job->before : r + job->before - k * job->dilation;
            if (!job->forward && p % job->stride != 0) continue;
            tap[at] = k;
            off[at++] = job->forward ? p : p / job->stride;
        }
    }
    first[job->remainders] = at;
    char *to = *packed;
    int64_t rows = job->forward ? job->outs : job->in, channels = job->forward ? job->in : job->outs;
    for (int64_t group = 0; group < job->groups; group++)
        for (int64_t r = 0; r < job->remainders; r++)
            for (int64_t m = 0; m < rows; m++)
                for (int64_t c = 0; c < channels; c++)
                    for (int64_t t = first[r]; t < first[r + 1]; t++, to += job->size) {
                        int64_t o = group * job->outs + (job->forward ? m : c), i = job->forward ? c : m;
                        const char *from = (const char *)w->data +
                                           (o * w->stride[0] + i * w->stride[1] + tap[t] * w->stride[2]) * bytes;
                        const void *v = LAC_CPU(load)(job->dtype, from, 0, 1, to);
                        if (v != to) memcpy(to, v, (size_t)job->size);
                    }
    job->tap = tap;
    job->off = off;
    job->first = first;
    job->packed = *packed;
    return 0;
}

static int64_t clamp_columns(int64_t depth, int64_t columns)
{
    int64_t width = COLUMN_ELEMENTS / (depth > 0 ? depth : 1) / 16 * 16;
    width = width < LEAST_COLUMNS ? LEAST_COLUMNS : width > MOST_COLUMNS ? MOST_COLUMNS : width;
    return width < columns ? width : columns > 0 ? columns : 1;
}

static int run_taps(const char *op, conv_job *job)
{
    int64_t *tables;
    char *packed;
    job->remainders = job->forward ? 1 : job->stride < job->n ? job->stride : job->n;
    int status = prepare(op, job, &tables, &packed);
    if (!status) {
        int64_t rows = job->forward ? job->outs : job->in, channels = job->forward ? job->in : job->outs, most = 1;
        int64_t columns = job->forward ? job->length : (job->n + job->stride - 1) / job->stride;
        for (int64_t r = 0; r < job->remainders; r++)
            if (job->first[r + 1] - job->first[r] > most) most = job->first[r + 1] - job->first[r];
        job->width = clamp_columns(channels * most, columns);
        job->chunks = (columns + job->width - 1) / job->width;
        int64_t tasks = job->batch * job->groups * job->remainders * job->chunks;
        double cost = (double)job->batch * (double)job->groups * (double)job->length * (double)job->kernel *
                      (double)(rows * channels) / 8;
        int64_t work = cost > 1e18 ? (int64_t)1e18 : (int64_t)cost;
        job->bytes = ((channels * most + rows) * job->width * job->size + 2 * MOST_COLUMNS * 8 + 127) / 64 * 64;
        job->workspace = lac_workspace_get(op, (size_t)(job->bytes * LAC_CPU(threads)(tasks, work)));
        status = job->workspace ? LAC_CPU(parallel)(op, tasks, work, taps_task, job) : LAC_E_MEMORY;
        if (!status && job->status) status = lac_fail(job->status, "%s: interrupted", op);
        lac_workspace_put(job->workspace);
    }
    lac_workspace_put(packed);
    lac_workspace_put(tables);
    return status;
}

static conv_job job_of(const lac_view *x, const lac_view *w, int64_t length, int64_t stride, int64_t dilation,
                       int64_t before)
{
    conv_job job = {.x = x, .w = w, .dtype = x->dtype, .ctype = lac_compute_type(x->dtype), .length = length};
    job.size = (int64_t)lac_compute_size(job.ctype);
    job.batch = x->shape[0];
    job.in = w->shape[1];
    job.groups = x->shape[1] / job.in;
    job.outs = w->shape[0] / job.groups;
    job.kernel = w->shape[2];
    job.n = x->shape[2];
    job.stride = stride;
    job.dilation = dilation;
    job.before = before;
    return job;
}

int LAC_CPU(conv1d)(const lac_a_conv1d *a)
{
    if (lac_view_numel(&a->out) == 0) return 0;
    conv_job job = job_of(&a->x, &a->w, a->out.shape[2], a->stride, a->dilation, a->before);
    job.forward = a;
    return run_taps("conv1d", &job);
}

/* ---- gradient of the weights ---- */

/* the unfolded rows of channels [c0, c0 + channels) of x, as in the forward */
static taps weight_taps(const conv_job *job, int64_t b, int64_t group, int64_t c0, int64_t channels)
{
    int64_t bytes = lac_bytes_of(job->dtype);
    const lac_view *x = job->x;
    return (taps){.channels = channels,
                  .taps = job->kernel,
                  .src = (const char *)x->data + (b * x->stride[0] + (group * job->in + c0) * x->stride[1]) * bytes,
                  .src_c = x->stride[1] * bytes,
                  .src_n = x->stride[2] * bytes,
                  .n = job->n,
                  .step = job->stride};
}

static const char *gradient_rows(const conv_job *job, int64_t b, int64_t group, int64_t j0)
{
    const lac_view *g = job->g;
    return (const char *)g->data +
           (b * g->stride[0] + group * job->outs * g->stride[1] + j0 * g->stride[2]) * lac_bytes_of(job->dtype);
}

/* sums [outs][channels * kernel]: dot products of rows, added in double, left in the compute type */
static void weight_dots(const conv_job *job, int64_t group, int64_t c0, int64_t channels, char *space)
{
    double *sums = (double *)(void *)space;
    int64_t depth = channels * job->kernel, bytes = lac_bytes_of(job->dtype);
    char *row = space + job->outs * depth * 8, *other = row + job->width * job->size;
    memset(sums, 0, (size_t)(job->outs * depth) * 8);
    for (int64_t b = 0; b < job->batch; b++) {
        taps s = weight_taps(job, b, group, c0, channels);
        for (int64_t j0 = 0; j0 < job->length; j0 += job->width) {
            int64_t count = job->length - j0 < job->width ? job->length - j0 : job->width;
            for (int64_t m = 0; m < job->outs; m++) {
                const char *from = gradient_rows(job, b, group, j0) + m * job->g->stride[1] * bytes;
                const void *g = LAC_CPU(load)(job->dtype, from, job->g->stride[2] * bytes, count, row);
                for (int64_t d = 0; d < depth; d++) {
                    int64_t off = d % job->kernel * job->dilation - job->before;
                    const void *v = tap_row(job, &s, d / job->kernel, off, j0, count, other);
                    sums[m * depth + d] += job->ctype == C_F32 ? dot_f(g, v, count) : dot_d(g, v, count);
                }
            }
        }
    }
    if (job->ctype != C_F32) return;
    float narrow[DIRECT_ROWS * DIRECT_TAPS];
    for (int64_t i = 0; i < job->outs * depth; i++)
        narrow[i] = job->dtype == LAC_F32 ? (float)sums[i] : v_round_odd(sums[i]);
    memcpy(space, narrow, (size_t)(job->outs * depth) * 4);
}

/* the same through matrix products: sums are in the compute type */
static int weight_products(const conv_job *job, int64_t group, int64_t c0, int64_t channels, char *space)
{
    int64_t depth = channels * job->kernel;
    char *columns = space + job->outs * depth * 8;
    int plain = job->ctype == C_F64 ? LAC_F64 : LAC_F32;
    bool any = false;
    for (int64_t b = 0; b < job->batch; b++) {
        taps s = weight_taps(job, b, group, c0, channels);
        for (int64_t j0 = 0; j0 < job->length; j0 += job->width, any = true) {
            int64_t count = job->length - j0 < job->width ? job->length - j0 : job->width;
            for (int64_t d = 0; d < depth; d++) {
                char *to = columns + d * count * job->size;
                int64_t off = d % job->kernel * job->dilation - job->before;
                const void *v = tap_row(job, &s, d / job->kernel, off, j0, count, to);
                if (v != to) memcpy(to, v, (size_t)(count * job->size));
            }
            lac_gemm p = {.m = job->outs, .n = depth, .k = count, .accumulate = any};
            p.a = gradient_rows(job, b, group, j0);
            p.a_dtype = job->dtype;
            p.a_rs = job->g->stride[1];
            p.a_cs = job->g->stride[2];
            p.b = columns;
            p.b_dtype = p.c_dtype = plain;
            p.b_rs = 1;
            p.b_cs = count;
            p.c = space;
            p.ldc = depth;
            LAC_TRY(LAC_CPU(gemm)("conv1d_bwd", &p));
        }
    }
    return 0;
}

/* a block of input channels of one group */
static void weights_task(void *context, int64_t begin, int64_t end, int thread)
{
    conv_job *job = context;
    char *space = job->workspace + job->bytes * thread;
    int64_t bytes = lac_bytes_of(job->dtype), row = job->in * job->kernel;
    for (int64_t t = begin; t < end; t++) {
        int64_t group = t / job->blocks, c0 = t % job->blocks * job->block;
        int64_t channels = job->in - c0 < job->block ? job->in - c0 : job->block, depth = channels * job->kernel;
        if (is_direct(job->outs, depth)) weight_dots(job, group, c0, channels, space);
        else if (weight_products(job, group, c0, channels, space)) job->status = LAC_E_INTERRUPTED;
        for (int64_t m = 0; m < job->outs; m++) LAC_CPU(store)
        (job->dtype, space + m * depth * job->size,
         (char *)job->dw->data + ((group * job->outs + m) * row + c0 * job->kernel) * bytes, bytes, depth);
    }
}

static int run_weights(const char *op, conv_job *job)
{
    int64_t parts = (8 + job->groups - 1) / job->groups; /* at least 8 tasks, where there are channels for them */
    job->block = LEAST_COLUMNS / job->kernel > 0 ? LEAST_COLUMNS / job->kernel : 1;
    if (job->block > (job->in + parts - 1) / parts) job->block = (job->in + parts - 1) / parts;
    job->blocks = (job->in + job->block - 1) / job->block;
    int64_t depth = job->block * job->kernel, tasks = job->groups * job->blocks;
    job->width = clamp_columns(depth, job->length);
    double cost = (double)job->batch * (double)job->length * (double)job->groups * (double)job->kernel *
                  (double)(job->outs * job->in) / 8;
    int64_t work = cost > 1e18 ? (int64_t)1e18 : (int64_t)cost;
    job->bytes = (job->outs * depth * 8 + (depth + 2) * job->width * job->size + 127) / 64 * 64;
    job->workspace = lac_workspace_get(op, (size_t)(job->bytes * LAC_CPU(threads)(tasks, work)));
    if (!job->workspace) return LAC_E_MEMORY;
    int status = LAC_CPU(parallel)(op, tasks, work, weights_task, job);
    if (!status && job->status) status = lac_fail(job->status, "%s: interrupted", op);
    lac_workspace_put(job->workspace);
    return status;
}

int LAC_CPU(conv1d_bwd)(const lac_a_conv1d_bwd *a)
{
    conv_job job = job_of(&a->x, &a->w, a->g.shape[2], a->stride, a->dilation, a->before);
    bool empty = job.batch == 0 || job.outs == 0;
    job.backward = a;
    job.g = &a->g;
    job.dw = &a->dw;
    if (a->dw.data && empty) memset(a->dw.data, 0, (size_t)(lac_view_numel(&a->dw) * lac_bytes_of(a->dw.dtype)));
    if (a->dx.data && empty) memset(a->dx.data, 0, (size_t)(lac_view_numel(&a->dx) * lac_bytes_of(a->dx.dtype)));
    if (empty) return 0;
    if (a->dx.data && job.n > 0) LAC_TRY(run_taps("conv1d_bwd", &job));
    return a->dw.data ? run_weights("conv1d_bwd", &job) : 0;
}
