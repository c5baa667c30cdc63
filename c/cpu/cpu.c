/* cpu.c: the CPU's table of operators, its threads, its loops over strided views, and its conversions.
 *
 * The table is filled from c/ops.def, so an operator without an implementation does not link. One loop nest
 * (lac_nest) serves every elementwise operator: axes of size 1 go, axes are sorted by the output's strides (a
 * transposed destination is then written in memory order), and neighbours merge where every view allows it, so that
 * a contiguous call of any rank is a single row. Sorting by an input's strides was rejected: writes that jump cost
 * more than reads that do.
 *
 * Threads: tasks are dealt in contiguous runs, one run per thread (static, no stealing), because elementwise work is
 * uniform and first-touch placement then agrees between calls. Between pieces of a run the interrupt flag is read.
 */
#include "cpu.h"
#include "simd.h"
#include <omp.h>

extern const lac_backend LAC_CPU(backend);
const lac_backend LAC_CPU(backend) = {
    .abi = LAC_ABI,
    .bytes = sizeof(lac_backend),
    .name = "cpu",
    .detail = LAC_CPU_TEXT(LAC_ISA),
#define LAC_OP(name, args, gradient) .name = LAC_CPU(name),
#include "../ops.def"
#undef LAC_OP
};

/* ---- threads ---- */

int LAC_CPU(threads)(int64_t tasks, int64_t work)
{
    if (work < LAC_PARALLEL_WORK || tasks < 2 || omp_in_parallel()) return 1;
    int most = omp_get_max_threads();
    return tasks < most ? (int)tasks : most;
}

/* one thread's run of tasks, in pieces */
static bool run_pieces(int64_t begin, int64_t end, int64_t piece, lac_task *task, void *context, int thread)
{
    for (int64_t at = begin; at < end; at += piece) {
        if (at > begin && lac_interrupted()) return false;
        task(context, at, end - at < piece ? end : at + piece, thread);
    }
    return true;
}

int LAC_CPU(parallel)(const char *op, int64_t tasks, int64_t work, lac_task *task, void *context)
{
    if (tasks <= 0) return 0;
    double per_task = (double)work / (double)tasks;
    int64_t piece = per_task >= 262144.0 ? 1 : (int64_t)(262144.0 / (per_task < 1.0 ? 1.0 : per_task));
    int threads = LAC_CPU(threads)(tasks, work);
    bool done = true;
    if (threads <= 1) {
        done = run_pieces(0, tasks, piece, task, context, 0);
    } else {
#pragma omp parallel num_threads(threads) reduction(&& : done)
        {
            int64_t count = omp_get_num_threads(), me = omp_get_thread_num();
            int64_t share = tasks / count, extra = tasks % count;
            int64_t begin = me * share + (me < extra ? me : extra), end = begin + share + (me < extra);
            done = run_pieces(begin, end, piece, task, context, (int)me);
        }
    }
    if (!done) LAC_FAIL(INTERRUPTED, "%s: interrupted", op);
    return 0;
}

/* ---- loop nests ---- */

void LAC_CPU(nest_make)(lac_nest *nest, int views, const lac_view *const *view)
{
    int order[LAC_MAX_DIMS], n = 0;
    const lac_view *out = view[0];
    for (int d = 0; d < out->ndim; d++) {
        if (out->shape[d] == 1) continue;
        int at = n++;
        int64_t stride = out->stride[d] < 0 ? -out->stride[d] : out->stride[d];
        for (; at > 0; at--) {
            int64_t before = out->stride[order[at - 1]];
            if ((before < 0 ? -before : before) >= stride) break;
            order[at] = order[at - 1];
        }
        order[at] = d;
    }
    int axes = 0;
    for (int i = 0; i < n; i++) {
        int d = order[i];
        int64_t stride[LAC_NEST_VIEWS];
        bool merge = axes > 0;
        for (int v = 0; v < views; v++) {
            stride[v] = view[v]->stride[d] * lac_bytes_of(view[v]->dtype);
            merge = merge && nest->stride[v][axes - 1] == stride[v] * out->shape[d];
        }
        if (merge) {
            nest->shape[axes - 1] *= out->shape[d];
        } else {
            nest->shape[axes++] = out->shape[d];
        }
        for (int v = 0; v < views; v++) nest->stride[v][axes - 1] = stride[v];
    }
    if (axes == 0) {
        axes = 1;
        nest->shape[0] = 1;
        for (int v = 0; v < views; v++) nest->stride[v][0] = 0;
    }
    nest->ndim = axes;
    nest->views = views;
    for (int v = 0; v < views; v++) nest->data[v] = view[v]->data;
}

uint32_t LAC_CPU(nest_lengthen)(lac_nest *nest, int outputs, int64_t most, int64_t *cycle)
{
    enum { VERY_SHORT = 16, MUCH_LONGER = 4 };
    int last = nest->ndim - 1, longest = last;
    int64_t length = nest->shape[last];
    uint32_t again = 0;
    bool fits = last > 0 && length <= most;
    for (int v = 0; v < nest->views && fits; v++) {
        bool goes_on = nest->stride[v][last - 1] == nest->stride[v][last] * length;
        if (!goes_on) again |= 1u << v;
        fits = goes_on || (v >= outputs && nest->stride[v][last - 1] == 0);
    }
    if (fits && again) {
        nest->shape[last - 1] *= length;
        for (int v = 0; v < nest->views; v++) nest->stride[v][last - 1] = nest->stride[v][last];
        nest->ndim--;
        *cycle = length;
        return again;
    }
    for (int d = 0; d < last; d++)
        if (nest->shape[d] > nest->shape[longest]) longest = d;
    if (length >= VERY_SHORT || nest->shape[longest] < MUCH_LONGER * length) return 0;
    for (int d = longest; d < last; d++) { /* the others keep their order */
        int64_t shape = nest->shape[d];
        nest->shape[d] = nest->shape[d + 1];
        nest->shape[d + 1] = shape;
        for (int v = 0; v < nest->views; v++) {
            int64_t stride = nest->stride[v][d];
            nest->stride[v][d] = nest->stride[v][d + 1];
            nest->stride[v][d + 1] = stride;
        }
    }
    return 0;
}

bool LAC_CPU(nest_streams)(const lac_nest *nest, int dtype)
{
    int64_t bytes = lac_bytes_of(dtype);
    if (nest->stride[0][nest->ndim - 1] != bytes) return false;
    for (int d = 0; d < nest->ndim; d++) bytes *= nest->shape[d];
    if (bytes < LAC_STREAM_BYTES) return false;
    for (int v = 1; v < nest->views; v++)
        if (nest->data[v] == nest->data[0]) return false;
    return true;
}

void LAC_CPU(cursor_set)(const lac_nest *nest, lac_cursor *c, int64_t row)
{
    for (int v = 0; v < nest->views; v++) c->at[v] = nest->data[v];
    for (int d = nest->ndim - 2; d >= 0; d--) {
        c->index[d] = row % nest->shape[d];
        row /= nest->shape[d];
        for (int v = 0; v < nest->views; v++) c->at[v] += nest->stride[v][d] * c->index[d];
    }
}

/* ---- conversions ---- */

/* a value repeated, or elements gathered */
#define LOAD_LOOP(from, to, convert)                                                                                   \
    do {                                                                                                               \
        to *out = buffer;                                                                                              \
        if (stride == 0) {                                                                                             \
            to value = convert(*(const from *)x);                                                                      \
            for (int64_t i = 0; i < n; i++) out[i] = value;                                                            \
        } else {                                                                                                       \
            const char *at = x;                                                                                        \
            for (int64_t i = 0; i < n; i++, at += stride) out[i] = convert(*(const from *)at);                         \
        }                                                                                                              \
    } while (0)
#define LOAD_DENSE(from, to)                                                                                           \
    do {                                                                                                               \
        const from *restrict in = x;                                                                                   \
        to *restrict out = buffer;                                                                                     \
        for (int64_t i = 0; i < n; i++) out[i] = in[i];                                                                \
    } while (0)

const void *LAC_CPU(load)(int dtype, const void *x, int64_t stride, int64_t n, void *buffer)
{
    if (stride == lac_bytes_of(dtype)) {
        switch (dtype) {
        case LAC_F16:
            v_load_f16(x, buffer, n);
            return buffer;
        case LAC_BF16:
            v_load_bf16(x, buffer, n);
            return buffer;
        case LAC_I32:
            LOAD_DENSE(int32_t, int64_t);
            return buffer;
        case LAC_U8:
        case LAC_BOOL:
            LOAD_DENSE(uint8_t, int64_t);
            return buffer;
        default:
            return x;
        }
    }
    switch (dtype) {
    case LAC_F64:
        LOAD_LOOP(double, double, );
        break;
    case LAC_F32:
        LOAD_LOOP(float, float, );
        break;
    case LAC_F16:
        LOAD_LOOP(uint16_t, float, v_from_f16);
        break;
    case LAC_BF16:
        LOAD_LOOP(uint16_t, float, v_from_bf16);
        break;
    case LAC_I64:
        LOAD_LOOP(int64_t, int64_t, );
        break;
    case LAC_I32:
        LOAD_LOOP(int32_t, int64_t, );
        break;
    default:
        LOAD_LOOP(uint8_t, int64_t, );
        break;
    }
    return buffer;
}

#define STORE_LOOP(from, to, convert)                                                                                  \
    do {                                                                                                               \
        const from *in = values;                                                                                       \
        char *at = x;                                                                                                  \
        for (int64_t i = 0; i < n; i++, at += stride) *(to *)at = (to)convert(in[i]);                                  \
    } while (0)
#define STORE_DENSE(from, to, convert)                                                                                 \
    do {                                                                                                               \
        const from *restrict in = values;                                                                              \
        to *restrict out = x;                                                                                          \
        for (int64_t i = 0; i < n; i++) out[i] = (to)convert(in[i]);                                                   \
    } while (0)
#define NONZERO(v) ((v) != 0)

void LAC_CPU(store)(int dtype, const void *values, void *x, int64_t stride, int64_t n)
{
    if (stride == lac_bytes_of(dtype)) {
        switch (dtype) {
        case LAC_F16:
            v_store_f16(values, x, n);
            return;
        case LAC_BF16:
            v_store_bf16(values, x, n);
            return;
        case LAC_I32:
            STORE_DENSE(int64_t, int32_t, );
            return;
        case LAC_U8:
            STORE_DENSE(int64_t, uint8_t, );
            return;
        case LAC_BOOL:
            STORE_DENSE(int64_t, uint8_t, NONZERO);
            return;
        default:
            if (values != x) memcpy(x, values, (size_t)(n * stride));
            return;
        }
    }
    switch (dtype) {
    case LAC_F64:
        STORE_LOOP(double, double, );
        break;
    case LAC_F32:
        STORE_LOOP(float, float, );
        break;
    case LAC_F16:
        STORE_LOOP(float, uint16_t, v_to_f16);
        break;
    case LAC_BF16:
        STORE_LOOP(float, uint16_t, v_to_bf16);
        break;
    case LAC_I64:
        STORE_LOOP(int64_t, int64_t, );
        break;
    case LAC_I32:
        STORE_LOOP(int64_t, int32_t, );
        break;
    case LAC_U8:
        STORE_LOOP(int64_t, uint8_t, );
        break;
    default:
        STORE_LOOP(int64_t, uint8_t, NONZERO);
        break;
    }
}

/* Walks the runs along the last axis that make up row-major positions [start, start + n). */
typedef struct {
    int64_t index[LAC_MAX_DIMS];
    int64_t run, stride; /* length of the current run, bytes between its elements */
    char *at;
} linear_walk;

static void linear_begin(const lac_view *v, int64_t start, linear_walk *w)
{
    int64_t bytes = lac_bytes_of(v->dtype);
    w->at = v->data;
    w->run = 1;
    w->stride = bytes;
    for (int d = v->ndim - 1; d >= 0; d--) {
        w->index[d] = start % v->shape[d];
        start /= v->shape[d];
        w->at += w->index[d] * v->stride[d] * bytes;
    }
    if (v->ndim) {
        w->run = v->shape[v->ndim - 1] - w->index[v->ndim - 1];
        w->stride = v->stride[v->ndim - 1] * bytes;
    }
}

/* `done` elements of the run are used up; goes on to the next run when it is empty */
static void linear_advance(const lac_view *v, linear_walk *w, int64_t done)
{
    int64_t bytes = lac_bytes_of(v->dtype);
    int d = v->ndim - 1;
    w->at += done * w->stride;
    w->run -= done;
    if (w->run > 0 || d < 0) return;
    w->index[d] += done;
    while (d >= 0 && w->index[d] == v->shape[d]) {
        w->at -= v->shape[d] * v->stride[d] * bytes;
        w->index[d] = 0;
        if (--d < 0) return;
        w->index[d]++;
        w->at += v->stride[d] * bytes;
    }
    w->run = v->shape[v->ndim - 1];
}

const void *LAC_CPU(load_linear)(const lac_view *v, int64_t start, int64_t n, void *buffer)
{
    linear_walk w;
    size_t size = lac_compute_size(lac_compute_type(v->dtype));
    if (lac_view_contiguous(v))
        return LAC_CPU(load)(v->dtype, (char *)v->data + start * lac_bytes_of(v->dtype), lac_bytes_of(v->dtype), n,
                             buffer);
    linear_begin(v, start, &w);
    for (int64_t at = 0, m; at < n; at += m) {
        m = w.run < n - at ? w.run : n - at;
        char *to = (char *)buffer + (size_t)at * size;
        const void *from = LAC_CPU(load)(v->dtype, w.at, w.stride, m, to);
        if (from != to) memcpy(to, from, (size_t)m * size);
        linear_advance(v, &w, m);
    }
    return buffer;
}

void LAC_CPU(store_linear)(const lac_view *v, int64_t start, int64_t n, const void *values)
{
    linear_walk w;
    size_t size = lac_compute_size(lac_compute_type(v->dtype));
    if (lac_view_contiguous(v)) {
        int64_t bytes = lac_bytes_of(v->dtype);
        LAC_CPU(store)(v->dtype, values, (char *)v->data + start * bytes, bytes, n);
        return;
    }
    linear_begin(v, start, &w);
    for (int64_t at = 0, m; at < n; at += m) {
        m = w.run < n - at ? w.run : n - at;
        LAC_CPU(store)(v->dtype, (const char *)values + (size_t)at * size, w.at, w.stride, m);
        linear_advance(v, &w, m);
    }
}
