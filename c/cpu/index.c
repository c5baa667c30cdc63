/* index.c: index_select (the embedding) and its gradient, gather, and index_put on the CPU.
 *
 * Forward copies bytes, whatever the dtype. All indices are checked before anything is written, so an error leaves no
 * half-filled result and names the first bad one.
 * The embedding's gradient adds rows that share an index. Atomics would make the sum depend on timing; here a
 * counting sort lists, for every destination row, its sources in their original order, and each destination is summed
 * by one thread, in double, and rounded once. So it is deterministic, independent of threads, and in half precision far
 * better than adding into bf16. index_put sorts in the same way and visits only the rows that are named, so a few rows
 * of a large table cost a few rows. Where a row is one element, visiting it costs 20 times what adding it does: then a
 * line along the axis is summed as a whole, its sources in their order, which is the same sum.
 */
#include "cpu.h"
#include "simd.h"

enum {
    BLOCK = 256,
    ROWS_AHEAD = 8,  /* a row that is summed is asked for so many rows before: they lie anywhere */
    MOST_ASKED = 512 /* bytes of it */
};

/* Is every index in [0, size)? Compared as unsigned numbers, so that one comparison does. */
static bool all_inside(const int64_t *list, int64_t n, int64_t size)
{
    uint64_t outside = 0;
#pragma omp simd reduction(| : outside)
    for (int64_t i = 0; i < n; i++) outside |= (uint64_t)list[i] >= (uint64_t)size;
    return !outside;
}

int LAC_CPU(index_list)(const char *op, const char *what, const lac_view *index, int64_t size, const int64_t *ignore,
                        bool copy, const int64_t **out, int64_t **own)
{
    int64_t n = lac_view_numel(index);
    bool there = !copy && index->dtype == LAC_I64 && lac_view_contiguous(index);
    const int64_t *list = index->data;
    *own = NULL;
    if (!there) {
        *own = lac_workspace_get(op, (size_t)n * 8 + 8);
        if (!*own) return LAC_E_MEMORY;
        list = *own;
    }
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t m = n - at < BLOCK ? n - at : BLOCK, i = at;
        if (!there) {
            const void *from = LAC_CPU(load_linear)(index, at, m, *own + at);
            if (from != list + at) memcpy(*own + at, from, (size_t)m * 8);
        }
        if (all_inside(list + at, m, size)) continue;
        while (i < at + m && ((list[i] >= 0 && list[i] < size) || (ignore && list[i] == *ignore))) i++;
        if (i == at + m) continue;
        int64_t value = list[i];
        lac_workspace_put(*own);
        *own = NULL;
        LAC_FAIL(INDEX, "%s: %s number %lld is %lld (counted from 0), outside 0..%lld", op, what, (long long)(i + 1),
                 (long long)value, (long long)(size - 1));
    }
    *out = list;
    return 0;
}

int LAC_CPU(indices)(const char *op, const char *what, const lac_view *index, int64_t size, const int64_t *ignore,
                     int64_t **out)
{
    const int64_t *list;
    return LAC_CPU(index_list)(op, what, index, size, ignore, true, &list, out);
}

/* axes [first, last) of v as a view of their own */
static lac_view axes_of(const lac_view *v, int first, int last)
{
    lac_view w = {.data = v->data, .dtype = v->dtype, .ndim = last - first};
    for (int d = first; d < last; d++) {
        w.shape[d - first] = v->shape[d];
        w.stride[d - first] = v->stride[d];
    }
    return w;
}

/* elements from v's start to row-major position i of its axes */
static int64_t offset_of(const lac_view *v, int64_t i)
{
    int64_t at = 0;
    for (int d = v->ndim - 1; d >= 0; d--) {
        at += i % v->shape[d] * v->stride[d];
        i /= v->shape[d];
    }
    return at;
}

/* ---- index_select ---- */

typedef struct {
    lac_view x_outer, x_inner; /* axes before and after `dim` */
    lac_nest inner;            /* out, x: the axes after `dim` */
    const int64_t *index;
    int64_t n, inner_count, inner_rows, x_stride, size;
    char *x, *out;
    int bytes;
    /* backward */
    const int64_t *start, *order;
    lac_view g_outer, g_index, g_inner;
    int dtype;
    double *sums; /* [threads][size] of lines */
} select_job;

/* elements along the last axis */
#define PICK(T)                                                                                                        \
    for (int64_t k = 0; k < m; k++) ((T *)(void *)out)[k] = *(const T *)(const void *)(x + index[k] * step)
static void select_elements(const select_job *job, int64_t begin, int64_t end)
{
    for (int64_t t = begin, m; t < end; t += m) {
        int64_t outer = t / job->n, i = t % job->n, step = job->x_stride * job->bytes;
        const char *x = job->x + offset_of(&job->x_outer, outer) * job->bytes;
        const int64_t *index = job->index + i;
        char *out = job->out + t * job->bytes;
        m = job->n - i < end - t ? job->n - i : end - t;
        switch (job->bytes) {
        case 8:
            PICK(int64_t);
            break;
        case 4:
            PICK(int32_t);
            break;
        case 2:
            PICK(int16_t);
            break;
        default:
            PICK(char);
        }
    }
}

static void select_task(void *context, int64_t begin, int64_t end, int thread)
{
    const select_job *job = context;
    const lac_nest *nest = &job->inner;
    int last = nest->ndim - 1;
    (void)thread;
    if (job->inner_count == 1) {
        select_elements(job, begin, end);
        return;
    }
    for (int64_t t = begin; t < end; t++) {
        int64_t outer = t / job->n, i = t % job->n;
        const char *x = job->x + (offset_of(&job->x_outer, outer) + job->index[i] * job->x_stride) * job->bytes;
        char *out = job->out + t * job->inner_count * job->bytes;
        int64_t out_delta = out - nest->data[0], x_delta = x - nest->data[1], so = nest->stride[0][last],
                sx = nest->stride[1][last];
        if (nest->shape[last] == 1) so = sx = job->bytes;
        lac_cursor c;
        LAC_CPU(cursor_set)(nest, &c, 0);
        for (int64_t r = 0; r < job->inner_rows; r++, lac_cursor_next(nest, &c))
            LAC_CPU(move)(job->bytes, c.at[0] + out_delta, so, c.at[1] + x_delta, sx, nest->shape[last]);
    }
}

int LAC_CPU(index_select)(const lac_a_index *a)
{
    const int64_t *index;
    int64_t *own;
    LAC_TRY(LAC_CPU(index_list)("index_select", "index", &a->index, a->x.shape[a->dim], NULL, false, &index, &own));
    if (lac_view_numel(&a->out) == 0) return lac_workspace_put(own), 0; /* but a bad index is still an error */
    select_job job = {.x_outer = axes_of(&a->x, 0, a->dim),
                      .x_inner = axes_of(&a->x, a->dim + 1, a->x.ndim),
                      .index = index,
                      .n = lac_view_numel(&a->index),
                      .x_stride = a->x.stride[a->dim],
                      .x = a->x.data,
                      .out = a->out.data,
                      .bytes = (int)lac_bytes_of(a->x.dtype)};
    lac_view out_inner = job.x_inner;
    int64_t span = 1;
    for (int d = out_inner.ndim - 1; d >= 0; d--) {
        out_inner.stride[d] = span;
        span *= out_inner.shape[d];
    }
    out_inner.data = a->out.data;
    const lac_view *views[] = {&out_inner, &job.x_inner};
    LAC_CPU(nest_make)(&job.inner, 2, views);
    job.inner_count = span;
    job.inner_rows = span / job.inner.shape[job.inner.ndim - 1];
    int64_t tasks = lac_view_numel(&job.x_outer) * job.n;
    int status = LAC_CPU(parallel)("index_select", tasks, tasks * span, select_task, &job);
    lac_workspace_put(own);
    return status;
}

/* sums[j] += alpha x[j] in double, of f32 (and halves), f64 or (alpha a whole number, sums int64_t) integers. A
 * function of its own: where `sums` may be what else is read, gcc goes from element to element. */
static void add_row(int ctype, double *restrict sums, const void *restrict x, int64_t n, double alpha)
{
    if (ctype == C_F32) {
        const float *v = x;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) sums[j] += alpha * (double)v[j];
    } else if (ctype == C_F64) {
        const double *v = x;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) sums[j] += alpha * v[j];
    } else {
        const uint64_t *v = x, by = (uint64_t)(int64_t)alpha;
        uint64_t *whole = (uint64_t *)(void *)sums;
        for (int64_t j = 0; j < n; j++) whole[j] += by * v[j];
    }
}

/* Asks for the first bytes of a row. */
static inline void ask_row(const char *row, int64_t bytes)
{
    for (int64_t at = 0; at < bytes && at < MOST_ASKED; at += 64) __builtin_prefetch(row + at);
}

static void select_bwd_task(void *context, int64_t begin, int64_t end, int thread)
{
    const select_job *job = context;
    int64_t bytes = job->bytes;
    const int ctype = lac_compute_type(job->dtype);
    double sums[BLOCK], space[BLOCK];
    float rounded[BLOCK];
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t outer = t / job->size, row = t % job->size;
        char *out = job->out + t * job->inner_count * bytes, *rows = job->x + offset_of(&job->g_outer, outer) * bytes;
        for (int64_t at = 0; at < job->inner_count; at += BLOCK) {
            int64_t m = job->inner_count - at < BLOCK ? job->inner_count - at : BLOCK;
            for (int64_t j = 0; j < m; j++) sums[j] = 0;
            for (int64_t e = job->start[row]; e < job->start[row + 1]; e++) {
                lac_view g = job->g_inner;
                g.data = rows + offset_of(&job->g_index, job->order[e]) * bytes;
                if (e + ROWS_AHEAD < job->start[job->size])
                    ask_row(rows + (offset_of(&job->g_index, job->order[e + ROWS_AHEAD]) + at) * bytes, m * bytes);
                add_row(ctype, sums, LAC_CPU(load_linear)(&g, at, m, space), m, 1);
            }
            const void *v = sums;
            if (job->dtype != LAC_F64) {
                for (int64_t j = 0; j < m; j++)
                    rounded[j] = job->dtype == LAC_F32 ? (float)sums[j] : v_round_odd(sums[j]);
                v = rounded;
            }
            LAC_CPU(store)(job->dtype, v, out + at * bytes, bytes, m);
        }
    }
}

/* ---- sums of lines ---- */

/* sums[index[i]] += alpha v[i] in the compute type of dtype, f32 in double */
static void add_line(int dtype, double *sums, const int64_t *index, const void *v, int64_t m, double alpha)
{
    const int ctype = lac_compute_type(dtype);
    int64_t *isums = (int64_t *)(void *)sums, ialpha = ctype == C_I64 ? (int64_t)alpha : 0;
    if (ctype == C_F32)
        for (int64_t i = 0; i < m; i++) sums[index[i]] += alpha * (double)((const float *)v)[i];
    else if (ctype == C_F64)
        for (int64_t i = 0; i < m; i++) sums[index[i]] += alpha * ((const double *)v)[i];
    else
        for (int64_t i = 0; i < m; i++)
            isums[index[i]] =
                (int64_t)((uint64_t)isums[index[i]] + (uint64_t)ialpha * (uint64_t)((const int64_t *)v)[i]);
}

static void line_from(int dtype, const char *x, int64_t stride, int64_t n, double *sums)
{
    double space[BLOCK];
    for (int64_t at = 0, m; at < n; at += m) {
        m = n - at < BLOCK ? n - at : BLOCK;
        const void *v = LAC_CPU(load)(dtype, x + at * stride, stride, m, space);
        if (lac_compute_type(dtype) == C_F32)
            for (int64_t i = 0; i < m; i++) sums[at + i] = (double)((const float *)v)[i];
        else memcpy(sums + at, v, (size_t)m * 8);
    }
}

/* rounded once */
static void line_into(int dtype, const double *sums, int64_t n, char *x, int64_t stride)
{
    float f[BLOCK];
    for (int64_t at = 0, m; at < n; at += m) {
        m = n - at < BLOCK ? n - at : BLOCK;
        const bool single = lac_compute_type(dtype) == C_F32;
        for (int64_t i = 0; i < m && single; i++)
            f[i] = dtype == LAC_F32 ? (float)sums[at + i] : v_round_odd(sums[at + i]);
        LAC_CPU(store)(dtype, single ? (const void *)f : sums + at, x + at * stride, stride, m);
    }
}

static void select_bwd_lines(void *context, int64_t begin, int64_t end, int thread)
{
    const select_job *job = context;
    double *sums = job->sums + job->size * thread, space[BLOCK];
    for (int64_t t = begin; t < end; t++) {
        lac_view g = job->g_index;
        g.data = job->x + offset_of(&job->g_outer, t) * job->bytes;
        memset(sums, 0, (size_t)job->size * sizeof *sums);
        for (int64_t at = 0, m; at < job->n; at += m) {
            m = job->n - at < BLOCK ? job->n - at : BLOCK;
            add_line(job->dtype, sums, job->index + at, LAC_CPU(load_linear)(&g, at, m, space), m, 1);
        }
        line_into(job->dtype, sums, job->size, job->out + t * job->size * job->bytes, job->bytes);
    }
}

/* start[r] .. start[r + 1]: where in order[] the positions with index r are, ascending */
static int64_t *sort_positions(const char *op, const int64_t *index, int64_t n, int64_t size)
{
    int64_t *start = lac_workspace_get(op, (size_t)(n + size + 2) * 8);
    if (!start) return NULL;
    int64_t *order = start + size + 1;
    memset(start, 0, (size_t)(size + 1) * 8);
    for (int64_t i = 0; i < n; i++) start[index[i] + 1]++;
    for (int64_t r = 0; r < size; r++) start[r + 1] += start[r];
    /* start[r] moves to the end of its run while the run is filled, then everything is shifted back */
    for (int64_t i = 0; i < n; i++) order[start[index[i]]++] = i;
    memmove(start + 1, start, (size_t)size * 8);
    start[0] = 0;
    return start;
}

int LAC_CPU(index_select_bwd)(const lac_a_index_bwd *a)
{
    const char *op = "index_select_bwd";
    const int64_t *index;
    int64_t *own, *start = NULL, size = a->out.shape[a->dim], n = lac_view_numel(&a->index);
    int axes = a->index.ndim, status = LAC_E_MEMORY;
    LAC_TRY(LAC_CPU(index_list)(op, "index", &a->index, size, NULL, false, &index, &own));
    if (lac_view_numel(&a->out) == 0) return lac_workspace_put(own), 0;
    select_job job = {.index = index,
                      .n = n,
                      .size = size,
                      .dtype = a->g.dtype,
                      .g_outer = axes_of(&a->g, 0, a->dim),
                      .g_index = axes_of(&a->g, a->dim, a->dim + axes),
                      .g_inner = axes_of(&a->g, a->dim + axes, a->g.ndim),
                      .x = a->g.data,
                      .out = a->out.data,
                      .bytes = (int)lac_bytes_of(a->g.dtype)};
    job.inner_count = lac_view_numel(&job.g_inner);
    int64_t outer = lac_view_numel(&job.g_outer), work = outer * (size + n) * job.inner_count;
    if (job.inner_count == 1) {
        job.sums = lac_workspace_get(op, (size_t)(size * LAC_CPU(threads)(outer, work)) * 8);
        if (job.sums) status = LAC_CPU(parallel)(op, outer, work, select_bwd_lines, &job);
    } else if ((start = sort_positions(op, index, n, size))) {
        job.start = start;
        job.order = start + size + 1;
        status = LAC_CPU(parallel)(op, outer * size, work, select_bwd_task, &job);
    }
    lac_workspace_put(job.sums);
    lac_workspace_put(start);
    lac_workspace_put(own);
    return status;
}

/* ---- gather ---- */

typedef struct {
    const lac_view *x, *out;
    const int64_t *index; /* in the row-major order of out */
    int64_t length, bytes;
    int dim;
} gather_job;

#define PICK_LINE(T)                                                                                                   \
    if (along == 0 && step == 1)                                                                                       \
        for (int64_t j = 0; j < job->length; j++) ((T *)(void *)to)[j] = ((const T *)(const void *)from)[index[j]];    \
    else                                                                                                               \
        for (int64_t j = 0; j < job->length; j++)                                                                      \
        ((T *)(void *)to)[j] = ((const T *)(const void *)from)[j * along + index[j] * step]
static void gather_task(void *context, int64_t begin, int64_t end, int thread)
{
    const gather_job *job = context;
    const lac_view *x = job->x;
    int last = job->out->ndim - 1;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t base = 0, rest = t;
        for (int d = last - 1; d >= 0; d--) {
            int64_t i = rest % job->out->shape[d];
            rest /= job->out->shape[d];
            if (d != job->dim) base += i * x->stride[d];
        }
        int64_t along = job->dim == last ? 0 : x->stride[last], step = x->stride[job->dim];
        const int64_t *index = job->index + t * job->length;
        const char *from = (const char *)x->data + base * job->bytes;
        char *to = (char *)job->out->data + t * job->length * job->bytes;
        switch (job->bytes) {
        case 8:
            PICK_LINE(int64_t);
            break;
        case 4:
            PICK_LINE(int32_t);
            break;
        case 2:
            PICK_LINE(int16_t);
            break;
        default:
            PICK_LINE(char);
        }
    }
}

int LAC_CPU(gather)(const lac_a_index *a)
{
    const int64_t *index;
    int64_t *own;
    LAC_TRY(LAC_CPU(index_list)("gather", "index", &a->index, a->x.shape[a->dim], NULL, false, &index, &own));
    int64_t numel = lac_view_numel(&a->out);
    gather_job job = {.x = &a->x,
                      .out = &a->out,
                      .index = index,
                      .dim = a->dim,
                      .bytes = lac_bytes_of(a->x.dtype),
                      .length = a->out.shape[a->out.ndim - 1]};
    int status = numel ? LAC_CPU(parallel)("gather", numel / job.length, numel * 2, gather_task, &job) : 0;
    lac_workspace_put(own);
    return status;
}

/* ---- index_put ---- */

typedef struct {
    const lac_a_index_put *a;
    lac_view outer_dst, outer_src, inner_dst, inner_src;
    lac_nest inner;                         /* dst, src: the axes after `dim` */
    const int64_t *start, *order, *reached; /* reached: the rows of dst that are named, ascending */
    int64_t rows, inner_count;
    const int64_t *index;
    double *sums; /* [threads][size] of lines */
} put_job;

static void put_slice(const put_job *job, char *dst, const char *src)
{
    const lac_nest *nest = &job->inner;
    int last = nest->ndim - 1, bytes = (int)lac_bytes_of(job->a->dst.dtype);
    int64_t dst_delta = dst - nest->data[0], src_delta = src - nest->data[1];
    lac_cursor c;
    LAC_CPU(cursor_set)(nest, &c, 0);
    for (int64_t r = job->inner_count / nest->shape[last]; r > 0; r--, lac_cursor_next(nest, &c)) LAC_CPU(move)
    (bytes, c.at[0] + dst_delta, nest->stride[0][last], c.at[1] + src_delta, nest->stride[1][last], nest->shape[last]);
}

/* a block of dst += alpha (sources [e, end) of row order), in double or int64_t, rounded once */
static void put_sum(const put_job *job, char *dst, const char *src, int64_t e, int64_t end)
{
    const lac_a_index_put *a = job->a;
    int dtype = a->dst.dtype, ctype = lac_compute_type(dtype);
    int64_t bytes = lac_bytes_of(dtype), step = a->src.stride[a->dim] * bytes;
    double sums[BLOCK], space[BLOCK];
    float rounded[BLOCK];
    lac_view to = job->inner_dst, from = job->inner_src;
    to.data = dst;
    for (int64_t at = 0, m; at < job->inner_count; at += m) {
        m = job->inner_count - at < BLOCK ? job->inner_count - at : BLOCK;
        const void *v = LAC_CPU(load_linear)(&to, at, m, space);
        if (ctype == C_F32)
            for (int64_t j = 0; j < m; j++) sums[j] = (double)((const float *)v)[j];
        else memcpy(sums, v, (size_t)m * 8);
        for (int64_t k = e; k < end; k++) {
            from.data = (char *)(uintptr_t)src + job->order[k] * step;
            if (k + ROWS_AHEAD < a->index.shape[0])
                ask_row(src + job->order[k + ROWS_AHEAD] * step + at * bytes, m * bytes);
            add_row(ctype, sums, LAC_CPU(load_linear)(&from, at, m, space), m, a->alpha);
        }
        if (ctype == C_F32)
            for (int64_t j = 0; j < m; j++) rounded[j] = dtype == LAC_F32 ? (float)sums[j] : v_round_odd(sums[j]);
        LAC_CPU(store_linear)(&to, at, m, ctype == C_F32 ? (const void *)rounded : sums);
    }
}

static void put_task(void *context, int64_t begin, int64_t end, int thread)
{
    const put_job *job = context;
    const lac_a_index_put *a = job->a;
    int64_t bytes = lac_bytes_of(a->dst.dtype);
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t outer = t / job->rows, row = job->reached[t % job->rows];
        char *dst = (char *)a->dst.data + (offset_of(&job->outer_dst, outer) + row * a->dst.stride[a->dim]) * bytes;
        const char *src = (const char *)a->src.data + offset_of(&job->outer_src, outer) * bytes;
        int64_t last = job->order[job->start[row + 1] - 1];
        if (a->mode == LAC_SCATTER_SET) put_slice(job, dst, src + last * a->src.stride[a->dim] * bytes);
        else put_sum(job, dst, src, job->start[row], job->start[row + 1]);
    }
}

/* rows of one element: whole lines of dst */
static void put_lines(void *context, int64_t begin, int64_t end, int thread)
{
    const put_job *job = context;
    const lac_a_index_put *a = job->a;
    const int dtype = a->dst.dtype;
    const int64_t bytes = lac_bytes_of(dtype), size = a->dst.shape[a->dim], n = a->index.shape[0];
    const int64_t to = a->dst.stride[a->dim] * bytes, from = a->src.stride[a->dim] * bytes;
    double *sums = job->sums + size * thread, space[BLOCK];
    for (int64_t t = begin; t < end; t++) {
        char *dst = (char *)a->dst.data + offset_of(&job->outer_dst, t) * bytes;
        const char *src = (const char *)a->src.data + offset_of(&job->outer_src, t) * bytes;
        line_from(dtype, dst, to, size, sums);
        for (int64_t at = 0, m; at < n; at += m) {
            m = n - at < BLOCK ? n - at : BLOCK;
            add_line(dtype, sums, job->index + at, LAC_CPU(load)(dtype, src + at * from, from, m, space), m, a->alpha);
        }
        line_into(dtype, sums, size, dst, to);
    }
}

static int put_sorted(const char *op, put_job *job, const int64_t *index, int64_t n, int64_t size)
{
    const lac_a_index_put *a = job->a;
    int64_t *start = sort_positions(op, index, n, size), *reached;
    reached = start ? lac_workspace_get(op, (size_t)(n < size ? n : size) * 8) : NULL;
    int status = reached ? 0 : LAC_E_MEMORY;
    if (!status) {
        for (int64_t r = 0; r < size; r++)
            if (start[r + 1] > start[r]) reached[job->rows++] = r;
        job->start = start;
        job->order = start + size + 1;
        job->reached = reached;
        const lac_view *views[] = {&job->inner_dst, &job->inner_src};
        LAC_CPU(nest_make)(&job->inner, 2, views);
        int64_t tasks = lac_view_numel(&job->outer_dst) * job->rows;
        status = LAC_CPU(parallel)(op, tasks, lac_view_numel(&a->src) * 2, put_task, job);
    }
    lac_workspace_put(reached);
    lac_workspace_put(start);
    return status;
}

int LAC_CPU(index_put)(const lac_a_index_put *a)
{
    const char *op = "index_put";
    const int64_t *index;
    int64_t *own, size = a->dst.shape[a->dim], n = a->index.shape[0];
    int status = LAC_E_MEMORY;
    LAC_TRY(LAC_CPU(index_list)(op, "index", &a->index, size, NULL, false, &index, &own));
    if (lac_view_numel(&a->src) == 0) return lac_workspace_put(own), 0;
    put_job job = {.a = a,
                   .index = index,
                   .outer_dst = axes_of(&a->dst, 0, a->dim),
                   .outer_src = axes_of(&a->src, 0, a->dim),
                   .inner_dst = axes_of(&a->dst, a->dim + 1, a->dst.ndim),
                   .inner_src = axes_of(&a->src, a->dim + 1, a->src.ndim)};
    job.inner_count = lac_view_numel(&job.inner_dst);
    /* a few elements of a long line are visited */
    if (a->mode == LAC_SCATTER_ADD && job.inner_count == 1 && n >= size / 16) {
        int64_t outer = lac_view_numel(&job.outer_dst), work = outer * (2 * size + n);
        job.sums = lac_workspace_get(op, (size_t)(size * LAC_CPU(threads)(outer, work)) * 8);
        if (job.sums) status = LAC_CPU(parallel)(op, outer, work, put_lines, &job);
        lac_workspace_put(job.sums);
    } else {
        status = put_sorted(op, &job, index, n, size);
    }
    lac_workspace_put(own);
    return status;
}
