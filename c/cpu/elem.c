/* elem.c: elementwise operators on the CPU.
 *
 * c/maps.def is included once per compute type and turns every line into kernels over short contiguous arrays:
 * (n, inputs, outputs). One driver walks a loop nest in strips of 1024 elements, loads and converts what is not already
 * a contiguous array of the compute type into buffers that stay in the first-level cache, calls the kernel, and
 * stores. So there are about 400 kernels instead of 400 x dtypes x strides, a broadcast or a scalar is an input of
 * stride 0, and a strip of contiguous f32 data costs no copy at all. Gradients towards both arguments of a binary
 * function come from one kernel with two outputs: five arrays move instead of eight.
 * Strips start at fixed places, so the vector and the remainder code see the same elements whatever the number of
 * threads. What a kernel reads, and whether it is arithmetic only, is read off the text of its expression, so that a
 * line of maps.def needs no more than the mathematics. Large results of cheap kernels are written past the caches.
 * Rejected: one specialised loop per combination of strides (code size), computing f16 in f16 (accuracy), conversions
 * of half types inside the kernels (gcc narrows lanes so slowly that separate passes in cache are faster).
 */
#include "maps.h"
#include <string.h>

enum { STRIP = 1024, STREAM_STRIP = 512, MOST_INPUTS = 4 };
/* in[MOST_INPUTS]: the constants of a function with parameters */
typedef void lac_kernel(int64_t n, const void *const *in, void *const *out);

/* ---- kernels ---- */

#define KERNEL(name, R, declare, expression)                                                                           \
    static void name(int64_t n, const void *const *in, void *const *result)                                            \
    {                                                                                                                  \
        const T *in0 = in[0], *in1 = in[1], *in2 = in[2], *in3 = in[3];                                                \
        R *out = result[0];                                                                                            \
        (void)in0, (void)in1, (void)in2, (void)in3;                                                                    \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
        {                                                                                                              \
            declare;                                                                                                   \
            out[i] = (R)(expression);                                                                                  \
        }                                                                                                              \
    }
/* both gradients of a function of two arguments */
#define KERNEL_BOTH(name, first, second)                                                                               \
    static void name(int64_t n, const void *const *in, void *const *result)                                            \
    {                                                                                                                  \
        const T *in0 = in[0], *in1 = in[1], *in2 = in[2];                                                              \
        T *out0 = result[0], *out1 = result[1];                                                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
        {                                                                                                              \
            X3;                                                                                                        \
            (void)x, (void)y;                                                                                          \
            out0[i] = g * (first);                                                                                     \
            out1[i] = g * (second);                                                                                    \
        }                                                                                                              \
    }
/* constants p, q, r before the loop */
#define KERNEL_P(name, declare, expression)                                                                            \
    static void name(int64_t n, const void *const *in, void *const *result)                                            \
    {                                                                                                                  \
        const T *in0 = in[0], *in1 = in[1], *in2 = in[2], *in3 = in[3], *constants = in[MOST_INPUTS];                  \
        const T p = constants[0], q = constants[1], r = constants[2];                                                  \
        T *out = result[0];                                                                                            \
        (void)in0, (void)in1, (void)in2, (void)in3, (void)p, (void)q, (void)r;                                         \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
        {                                                                                                              \
            declare;                                                                                                   \
            out[i] = (expression);                                                                                     \
        }                                                                                                              \
    }
#define X1 T x = in0[i]
#define X2 T x = in0[i], y = in1[i]
#define X3 T x = in0[i], y = in1[i], g = in2[i]
#define XYZ T x = in0[i], y = in1[i], z = in2[i]
#define XYZG T x = in0[i], y = in1[i], z = in2[i], g = in3[i]
#define BACKWARD1(name, f) KERNEL(name, T, X3; (void)x; (void)y, g * (f))
#define BACKWARD3(name, f) KERNEL_P(name, XYZG; (void)x; (void)y; (void)z, g * (f))

#define T float
#define MAP1(name, domain, value, gradient) KERNEL(m1_f32_##name, T, X1, value) BACKWARD1(b1_f32_##name, gradient)
#define MAP2(name, domain, value, dx, dy)                                                                              \
    KERNEL(m2_f32_##name, T, X2, value)                                                                                \
    BACKWARD1(bx_f32_##name, dx) BACKWARD1(by_f32_##name, dy) KERNEL_BOTH(bb_f32_##name, dx, dy)
#define CMP1(name, value) KERNEL(m1_f32_##name, uint8_t, X1, value)
#define CMP2(name, value) KERNEL(m2_f32_##name, uint8_t, X2, value)
#define MAPP(name, domain, count, value, gradient)                                                                     \
    KERNEL_P(mp_f32_##name, X1, value) KERNEL_P(bp_f32_##name, X3; (void)x; (void)y, g * (gradient))
#define MAP3(name, value, dx, dy, dz)                                                                                  \
    KERNEL_P(m3_f32_##name, XYZ, value)                                                                                \
    BACKWARD3(b3x_f32_##name, dx) BACKWARD3(b3y_f32_##name, dy) BACKWARD3(b3z_f32_##name, dz)
#include "../maps.def"
KERNEL(axpy_f32, T, X3, x *y + g)
#undef T
#define T double
#define MAP1(name, domain, value, gradient) KERNEL(m1_f64_##name, T, X1, value) BACKWARD1(b1_f64_##name, gradient)
#define MAP2(name, domain, value, dx, dy)                                                                              \
    KERNEL(m2_f64_##name, T, X2, value)                                                                                \
    BACKWARD1(bx_f64_##name, dx) BACKWARD1(by_f64_##name, dy) KERNEL_BOTH(bb_f64_##name, dx, dy)
#define CMP1(name, value) KERNEL(m1_f64_##name, uint8_t, X1, value)
#define CMP2(name, value) KERNEL(m2_f64_##name, uint8_t, X2, value)
#define MAPP(name, domain, count, value, gradient)                                                                     \
    KERNEL_P(mp_f64_##name, X1, value) KERNEL_P(bp_f64_##name, X3; (void)x; (void)y, g * (gradient))
#define MAP3(name, value, dx, dy, dz)                                                                                  \
    KERNEL_P(m3_f64_##name, XYZ, value)                                                                                \
    BACKWARD3(b3x_f64_##name, dx) BACKWARD3(b3y_f64_##name, dy) BACKWARD3(b3z_f64_##name, dz)
#include "../maps.def"
KERNEL(axpy_f64, T, X3, x *y + g)
#undef T
#define T int64_t
#define INT_FLOAT(kernel)
#define INT_ANY(kernel) kernel
#define MAP1(name, domain, value, gradient) INT_##domain(KERNEL(m1_i64_##name, T, X1, value))
#define MAP2(name, domain, value, dx, dy) INT_##domain(KERNEL(m2_i64_##name, T, X2, value))
#define CMP1(name, value) KERNEL(m1_i64_##name, uint8_t, X1, value)
#define CMP2(name, value) KERNEL(m2_i64_##name, uint8_t, X2, value)
#define LOGIC1(name, text, value) KERNEL(m1_i64_##name, uint8_t, X1, value)
#define LOGIC2(name, text, value) KERNEL(m2_i64_##name, uint8_t, X2, value)
#define INT1(name, value) KERNEL(m1_i64_##name, T, X1, value)
#define INT2(name, value) KERNEL(m2_i64_##name, T, X2, value)
#define MAPP(name, domain, count, value, gradient) INT_##domain(KERNEL_P(mp_i64_##name, X1, value))
#include "../maps.def"
KERNEL(axpy_i64, T, X3, i_add(i_mul(x, y), g))
#undef T

typedef struct {
    lac_kernel *value[3];       /* by compute type; NULL: not defined there */
    lac_kernel *gradient[3][2]; /* [argument][compute type] */
    lac_kernel *both[2];        /* both gradients of a function of two arguments */
    const char *text, *slope[3];
    bool to_bool;
} lac_map;
#define I64_FLOAT(name) NULL
#define I64_ANY(name) name
static const lac_map maps1[] = {
#define MAP1(name, domain, value_, gradient_)                                                                          \
    {.value = {m1_f32_##name, m1_f64_##name, I64_##domain(m1_i64_##name)},                                             \
     .gradient = {{b1_f32_##name, b1_f64_##name}},                                                                     \
     .text = #value_,                                                                                                  \
     .slope = {#gradient_}},
#define CMP1(name, value_) {.value = {m1_f32_##name, m1_f64_##name, m1_i64_##name}, .text = #value_, .to_bool = true},
#define LOGIC1(name, text_, value_) {.value = {NULL, NULL, m1_i64_##name}, .text = #value_, .to_bool = true},
#define INT1(name, value_) {.value = {NULL, NULL, m1_i64_##name}, .text = #value_},
#include "../maps.def"
};
static const lac_map maps2[] = {
#define MAP2(name, domain, value_, dx, dy)                                                                             \
    {.value = {m2_f32_##name, m2_f64_##name, I64_##domain(m2_i64_##name)},                                             \
     .gradient = {{bx_f32_##name, bx_f64_##name}, {by_f32_##name, by_f64_##name}},                                     \
     .both = {bb_f32_##name, bb_f64_##name},                                                                           \
     .text = #value_,                                                                                                  \
     .slope = {#dx, #dy}},
#define CMP2(name, value_) {.value = {m2_f32_##name, m2_f64_##name, m2_i64_##name}, .text = #value_, .to_bool = true},
#define LOGIC2(name, text_, value_) {.value = {NULL, NULL, m2_i64_##name}, .text = #value_, .to_bool = true},
#define INT2(name, value_) {.value = {NULL, NULL, m2_i64_##name}, .text = #value_},
#include "../maps.def"
};
static const lac_map maps_p[] = {
#define MAPP(name, domain, count, value_, gradient_)                                                                   \
    {.value = {mp_f32_##name, mp_f64_##name, I64_##domain(mp_i64_##name)},                                             \
     .gradient = {{bp_f32_##name, bp_f64_##name}},                                                                     \
     .text = #value_,                                                                                                  \
     .slope = {#gradient_}},
#include "../maps.def"
};
static const lac_map maps3[] = {
#define MAP3(name, value_, dx, dy, dz)                                                                                 \
    {.value = {m3_f32_##name, m3_f64_##name, NULL},                                                                    \
     .gradient = {{b3x_f32_##name, b3x_f64_##name},                                                                    \
                  {b3y_f32_##name, b3y_f64_##name},                                                                    \
                  {b3z_f32_##name, b3z_f64_##name}},                                                                   \
     .text = #value_,                                                                                                  \
     .slope = {#dx, #dy, #dz}},
#include "../maps.def"
};
enum { /* positions in maps2 */
#define MAP2(name, domain, value, dx, dy) M2_##name,
#include "../maps.def"
};
enum { /* positions in maps1 */
#define MAP1(name, domain, value, gradient) M1_##name,
#include "../maps.def"
};

/* ---- reading expressions ---- */

static bool part_of_name(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

/* does the expression mention the variable? */
static bool mentions(const char *text, char variable)
{
    for (const char *at = text; *at; at++)
        if (*at == variable && (at == text || !part_of_name(at[-1])) && !part_of_name(at[1])) return true;
    return false;
}

/* Arithmetic only? Then the kernel is cheaper than the memory it touches. The others hide the cost of ordinary stores
 * behind their arithmetic, and storing apart from it would be slower. */
static bool light(const char *text)
{
    static const char *const cheap[] = {"neg(",   "abs(",      "sign(",  "mul(",  "add(",      "sub(",   "div(",
                                        "max(",   "min(",      "floor(", "ceil(", "round(",    "trunc(", "sqrt(",
                                        "isnan(", "isfinite(", "share(", "lerp(", "copysign(", "shift_"};
    for (const char *at = strstr(text, "F_"); at; at = strstr(at + 2, "F_")) {
        bool known = false;
        for (size_t i = 0; i < sizeof cheap / sizeof *cheap && !known; i++)
            known = strncmp(at + 2, cheap[i], strlen(cheap[i])) == 0;
        if (!known) return false;
    }
    return true;
}

/* ---- the driver ---- */

typedef struct {
    lac_nest nest; /* the first `outputs` views are the outputs */
    lac_kernel *kernel;
    const void *constants;
    int32_t dtype[LAC_NEST_VIEWS];
    int outputs;
    uint32_t unread;       /* bit v: the kernel does not read view v */
    bool raw;              /* the kernel writes the output's dtype itself (bool) */
    bool stream;           /* large dense outputs: write past the caches */
    int64_t strip, strips; /* elements of a strip; strips per row */
} elem_job;

/* where a thread's strip of each view is, when it is not in place */
typedef struct {
    double buffer[LAC_NEST_VIEWS][STRIP], packed[STRIP];
    const void *repeated[LAC_NEST_VIEWS]; /* the broadcast value that a buffer holds, and how often */
    int64_t filled[LAC_NEST_VIEWS];
} elem_space;

static void elem_load(const elem_job *job, elem_space *space, const lac_cursor *at, int64_t start, int64_t n,
                      const void **in)
{
    const lac_nest *nest = &job->nest;
    int last = nest->ndim - 1;
    int64_t length = nest->shape[last];
    for (int v = job->outputs; v < nest->views; v++) {
        if (job->unread >> v & 1) {
            in[v - job->outputs] = space->buffer[v]; /* an address, no values */
            continue;
        }
        int64_t stride = nest->stride[v][last];
        const char *x = at->at[v] + start * stride;
        if (stride == 0 && length > 1) {
            if (space->repeated[v] == x && space->filled[v] >= n) continue;
            space->repeated[v] = x;
            space->filled[v] = n;
        } else if (length == 1) {
            stride = lac_bytes_of(job->dtype[v]);
        }
        if (job->stream && stride == lac_bytes_of(job->dtype[v]))
            v_prefetch(x + 2 * job->strip * stride, n * stride); /* reads go on while the result is written */
        in[v - job->outputs] = LAC_CPU(load)(job->dtype[v], x, stride, n, space->buffer[v]);
    }
}

static void elem_store(const elem_job *job, elem_space *space, int v, char *out, int64_t n)
{
    int last = job->nest.ndim - 1, dtype = job->dtype[v];
    int64_t stride = job->nest.shape[last] == 1 ? lac_bytes_of(dtype) : job->nest.stride[v][last];
    const void *result = space->buffer[v];
    if (!job->stream) {
        LAC_CPU(store)(dtype, result, out, stride, n);
        return;
    }
    if (!job->raw && !lac_is_native(dtype)) {
        LAC_CPU(store)(dtype, result, space->packed, stride, n);
        result = space->packed;
    }
    v_stream(out, result, (size_t)(n * stride));
}

static void elem_task(void *context, int64_t begin, int64_t end, int thread)
{
    const elem_job *job = context;
    const lac_nest *nest = &job->nest;
    const int last = nest->ndim - 1;
    const int64_t length = nest->shape[last];
    elem_space space;
    memset(space.repeated, 0, sizeof space.repeated);
    memset(space.filled, 0, sizeof space.filled);
    const void *in[MOST_INPUTS + 1] = {NULL, NULL, NULL, NULL, job->constants};
    lac_cursor at;
    (void)thread;
    int64_t row = begin / job->strips, strip = begin % job->strips;
    LAC_CPU(cursor_set)(nest, &at, row);
    for (int64_t t = begin; t < end; t++) {
        int64_t start = strip * job->strip, n = length - start < job->strip ? length - start : job->strip;
        void *out[2], *direct[2];
        elem_load(job, &space, &at, start, n, in);
        for (int v = 0; v < job->outputs; v++) {
            int64_t bytes = lac_bytes_of(job->dtype[v]), stride = nest->stride[v][last];
            direct[v] = at.at[v] + start * stride;
            bool dense = stride == bytes || length == 1;
            out[v] =
                !job->stream && (job->raw || (lac_is_native(job->dtype[v]) && dense)) ? direct[v] : space.buffer[v];
        }
        job->kernel(n, in, out);
        for (int v = 0; v < job->outputs; v++)
            if (out[v] != direct[v]) elem_store(job, &space, v, direct[v], n);
        if (++strip == job->strips) {
            strip = 0;
            lac_cursor_next(nest, &at);
        }
    }
    if (job->stream) v_stream_end();
}

/* Runs a kernel over all of the views; the first `outputs` are written. text: the expression, which says what is read
 * (NULL: everything, and it is cheap); letters[i] is the name of input i in it. */
static int elem_run(const char *op, elem_job *job, int count, const lac_view *const *views, const char *text,
                    const char *letters)
{
    if (lac_view_numel(views[0]) == 0) return 0;
    if (!job->kernel) LAC_FAIL(DTYPE, "%s: not defined for %s", op, lac_dtype_name(views[count - 1]->dtype));
    LAC_CPU(nest_make)(&job->nest, count, views);
    for (int v = 0; v < count; v++) job->dtype[v] = views[v]->dtype;
    for (int v = job->outputs; v < count && text; v++)
        if (letters[v - job->outputs] != 'g' && !mentions(text, letters[v - job->outputs])) job->unread |= 1u << v;
    job->stream = LAC_CPU(nest_streams)(&job->nest, views[0]->dtype) && (!text || light(text));
    for (int v = 1; v < job->outputs; v++)
        job->stream = job->stream && job->nest.stride[v][job->nest.ndim - 1] == lac_bytes_of(job->dtype[v]);
    int64_t rows = 1;
    for (int d = 0; d < job->nest.ndim - 1; d++) rows *= job->nest.shape[d];
    int64_t length = job->nest.shape[job->nest.ndim - 1];
    job->strip = job->stream ? STREAM_STRIP : STRIP;
    job->strips = (length + job->strip - 1) / job->strip;
    return LAC_CPU(parallel)(op, rows * job->strips, rows * length, elem_task, job);
}

/* a scalar as a view of stride 0 in the compute type of dtype */
typedef union {
    float f;
    double d;
    int64_t i;
} scalar;
static void scalar_set(double value, int ctype, void *space)
{
    if (ctype == C_F32) *(float *)space = (float)value;
    else if (ctype == C_F64) *(double *)space = value;
    else *(int64_t *)space = (int64_t)value;
}
static void scalar_view(double value, int dtype, const lac_view *like, scalar *space, lac_view *v)
{
    static const int32_t dtypes[] = {LAC_F32, LAC_F64, LAC_I64};
    int ctype = lac_compute_type(dtype);
    v->data = space;
    v->ndim = like->ndim;
    for (int i = 0; i < like->ndim; i++) {
        v->shape[i] = like->shape[i];
        v->stride[i] = 0;
    }
    scalar_set(value, ctype, space);
    v->dtype = dtypes[ctype];
}

/* ---- operators ---- */

int LAC_CPU(map1)(const lac_a_map1 *a)
{
    const lac_view *views[] = {&a->out, &a->x};
    const lac_map *map = &maps1[a->fn];
    elem_job job = {.kernel = map->value[lac_compute_type(a->x.dtype)], .outputs = 1, .raw = map->to_bool};
    return elem_run("map1", &job, 2, views, map->text, "x");
}

int LAC_CPU(map1_bwd)(const lac_a_map1_bwd *a)
{
    const lac_view *views[] = {&a->out, &a->x, &a->y, &a->g};
    const lac_map *map = &maps1[a->fn];
    elem_job job = {.kernel = map->gradient[0][lac_compute_type(a->x.dtype)], .outputs = 1};
    return elem_run("map1_bwd", &job, 4, views, map->slope[0], "xyg");
}

int LAC_CPU(map2)(const lac_a_map2 *a)
{
    lac_view constant;
    scalar space;
    const lac_view *x = &a->x, *y = &a->y;
    if (!y->data && !a->swapped && a->fn == M2_pow && a->scalar == 2) { /* x^2 is a product */
        const lac_a_map1 square = {.fn = M1_square, .x = a->x, .out = a->out};
        return LAC_CPU(map1)(&square);
    }
    if (!y->data) {
        scalar_view(a->scalar, x->dtype, &a->out, &space, &constant);
        y = &constant;
    }
    const lac_map *map = &maps2[a->fn];
    const lac_view *views[] = {&a->out, a->swapped ? y : x, a->swapped ? x : y};
    elem_job job = {.kernel = map->value[lac_compute_type(x->dtype)], .outputs = 1, .raw = map->to_bool};
    return elem_run("map2", &job, 3, views, map->text, "xy");
}

int LAC_CPU(map2_bwd)(const lac_a_map2_bwd *a)
{
    lac_view constant;
    scalar space;
    const lac_view *x = &a->x, *y = &a->y;
    int which = a->which, ctype = lac_compute_type(x->dtype);
    const lac_map *map = &maps2[a->fn];
    if (which == 2) {
        const lac_view *views[] = {&a->out, &a->out2, x, y, &a->g};
        elem_job job = {.kernel = map->both[ctype], .outputs = 2};
        /* both gradients read x or y somewhere, and the one with an exponential decides about the stores */
        return elem_run("map2_bwd", &job, 5, views, light(map->slope[0]) ? map->slope[1] : map->slope[0], "ggg");
    }
    if (!y->data) {
        if (a->fn == M2_pow && !a->swapped && a->scalar == 2) {
            const lac_a_map1_bwd square = {.fn = M1_square, .x = a->x, .y = a->x, .g = a->g, .out = a->out};
            return LAC_CPU(map1_bwd)(&square);
        }
        scalar_view(a->scalar, x->dtype, &a->out, &space, &constant);
        y = &constant;
        which = a->swapped;
    }
    bool swapped = !a->y.data && a->swapped;
    const lac_view *views[] = {&a->out, swapped ? y : x, swapped ? x : y, &a->g};
    elem_job job = {.kernel = map->gradient[which][ctype], .outputs = 1};
    return elem_run("map2_bwd", &job, 4, views, map->slope[which], "xyg");
}

/* the constants in the compute type */
static const void *constants_set(const double *values, int ctype, scalar *space)
{
    char *at = (char *)space;
    for (int i = 0; i < 3; i++, at += lac_compute_size(ctype)) scalar_set(values[i], ctype, at);
    return space;
}

int LAC_CPU(mapp)(const lac_a_mapp *a)
{
    scalar space[3];
    const lac_map *map = &maps_p[a->fn];
    int ctype = lac_compute_type(a->x.dtype);
    elem_job job = {.outputs = 1, .constants = constants_set(a->constants, ctype, space)};
    if (!a->g.data) {
        const lac_view *views[] = {&a->out, &a->x};
        job.kernel = map->value[ctype];
        return elem_run("mapp", &job, 2, views, map->text, "x");
    }
    const lac_view *views[] = {&a->out, &a->x, &a->y, &a->g};
    job.kernel = map->gradient[0][ctype];
    return elem_run("mapp_bwd", &job, 4, views, map->slope[0], "xyg");
}

int LAC_CPU(map3)(const lac_a_map3 *a)
{
    scalar space[3];
    const lac_map *map = &maps3[a->fn];
    const double constants[3] = {a->constant, 0, 0};
    int ctype = lac_compute_type(a->x.dtype);
    elem_job job = {.outputs = 1, .constants = constants_set(constants, ctype, space)};
    const lac_view *views[] = {&a->out, &a->x, &a->y, &a->z, &a->g};
    if (!a->g.data) {
        job.kernel = map->value[ctype];
        return elem_run("map3", &job, 4, views, map->text, "xyz");
    }
    job.kernel = map->gradient[a->which][ctype];
    return elem_run("map3_bwd", &job, 5, views, map->slope[a->which], "xyzg");
}

/* dst = alpha x + dst, or alpha dst */
int LAC_CPU(axpy)(const lac_a_axpy *a)
{
    static lac_kernel *const add[] = {axpy_f32, axpy_f64, axpy_i64}, *const mul[] = {m2_f32_mul, m2_f64_mul,
                                                                                     m2_i64_mul};
    lac_view alpha;
    scalar space;
    int ctype = lac_compute_type(a->dst.dtype);
    scalar_view(a->alpha, a->dst.dtype, &a->dst, &space, &alpha);
    const lac_view *sum[] = {&a->dst, &a->x, &alpha, &a->dst}, *product[] = {&a->dst, &a->dst, &alpha};
    elem_job job = {.kernel = a->x.data ? add[ctype] : mul[ctype], .outputs = 1};
    return a->x.data ? elem_run("axpy", &job, 4, sum, NULL, NULL) : elem_run("scale", &job, 3, product, NULL, NULL);
}
