/* elem.c: elementwise operators on the CPU.
 *
 * c/maps.def is included once per compute type and turns every line into a kernel over short contiguous arrays:
 * (n, inputs, output). One driver walks a loop nest in strips of 1024 elements, loads and converts what is not already
 * a contiguous array of the compute type into buffers that stay in the first-level cache, calls the kernel, and
 * stores. So there are about 150 kernels instead of 150 x dtypes x strides, a broadcast or a scalar is an input of
 * stride 0, and a strip of contiguous f32 data costs no copy at all.
 * Strips start at fixed places, so the vector and the remainder code see the same elements whatever the number of
 * threads. copy and where move bytes and know only the element size.
 * Rejected: one specialised loop per combination of strides (code size), computing f16 in f16 (accuracy).
 */
#include "cpu.h"
#include "simd.h"

enum { STRIP = 1024, STREAM_STRIP = 512 };
typedef void lac_kernel(int64_t n, const void *const *in, void *out);

/* ---- type-generic mathematics for maps.def ---- */

#define K(c) ((T)(c))
#define GENERIC2(x, f, d) _Generic((x), float : f, double : d)
#define GENERIC3(x, f, d, i) _Generic((x), float : f, double : d, int64_t : i)

LAC_INLINE int64_t i_neg(int64_t x) { return (int64_t)(0 - (uint64_t)x); }
LAC_INLINE int64_t i_add(int64_t x, int64_t y) { return (int64_t)((uint64_t)x + (uint64_t)y); }
LAC_INLINE int64_t i_sub(int64_t x, int64_t y) { return (int64_t)((uint64_t)x - (uint64_t)y); }
LAC_INLINE int64_t i_mul(int64_t x, int64_t y) { return (int64_t)((uint64_t)x * (uint64_t)y); }
LAC_INLINE int64_t i_abs(int64_t x) { return x < 0 ? i_neg(x) : x; }
LAC_INLINE int64_t i_sign(int64_t x) { return (x > 0) - (x < 0); }
LAC_INLINE int64_t i_same(int64_t x) { return x; }
LAC_INLINE int64_t i_max(int64_t x, int64_t y) { return x > y ? x : y; }
LAC_INLINE int64_t i_min(int64_t x, int64_t y) { return x < y ? x : y; }
LAC_INLINE int64_t i_div(int64_t x, int64_t y)
{
    if (y == 0) return 0;
    if (y == -1) return i_neg(x); /* the smallest integer / -1 traps on x86 */
    int64_t q = x / y;
    return q - ((x % y != 0) && ((x < 0) != (y < 0)));
}
LAC_INLINE int64_t i_mod(int64_t x, int64_t y)
{
    if (y == 0 || y == -1) return 0;
    int64_t r = x % y;
    return r != 0 && ((r < 0) != (y < 0)) ? r + y : r;
}
LAC_INLINE int64_t i_pow(int64_t x, int64_t y)
{
    if (y < 0) return x == 1 ? 1 : x == -1 ? (y & 1 ? -1 : 1) : 0;
    uint64_t r = 1, b = (uint64_t)x;
    for (; y; y >>= 1, b *= b)
        if (y & 1) r *= b;
    return (int64_t)r;
}

#define FLOATS(S, A, SFX, EXP, SIGMOID)                                                                                \
    LAC_INLINE S A##_neg(S x) { return -x; }                                                                           \
    LAC_INLINE S A##_add(S x, S y) { return x + y; }                                                                   \
    LAC_INLINE S A##_sub(S x, S y) { return x - y; }                                                                   \
    LAC_INLINE S A##_mul(S x, S y) { return x * y; }                                                                   \
    LAC_INLINE S A##_div(S x, S y) { return x / y; }                                                                   \
    LAC_INLINE S A##_sign(S x) { return x > 0 ? (S)1 : x < 0 ? (S)-1 : x; }                                            \
    LAC_INLINE S A##_max(S x, S y) { return x > y || x != x ? x : y; }                                                 \
    LAC_INLINE S A##_min(S x, S y) { return x < y || x != x ? x : y; }                                                 \
    LAC_INLINE S A##_mod(S x, S y)                                                                                     \
    {                                                                                                                  \
        S r = fmod##SFX(x, y);                                                                                         \
        return r != 0 && ((r < 0) != (y < 0)) ? r + y : r;                                                             \
    }                                                                                                                  \
    LAC_INLINE S A##_pow_dx(S x, S y) { return y == 0 ? (S)0 : y * pow##SFX(x, y - 1); }                               \
    LAC_INLINE S A##_pow_dy(S x, S y) { return x == 0 && y >= 0 ? (S)0 : pow##SFX(x, y) * log##SFX(x); }               \
    LAC_INLINE S A##_silu(S x) { return x * SIGMOID(x); }                                                              \
    LAC_INLINE S A##_silu_grad(S x)                                                                                    \
    {                                                                                                                  \
        S s = SIGMOID(x);                                                                                              \
        return s * (1 + x * (1 - s));                                                                                  \
    }

LAC_INLINE double d_sigmoid(double x) { return 1 / (1 + exp(-x)); }
LAC_INLINE double d_softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }
LAC_INLINE double d_cdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
LAC_INLINE double d_gelu(double x) { return x < -1e3 ? 0 : x * d_cdf(x); } /* 0 at -inf, which x cdf(x) is not */
LAC_INLINE double d_gelu_grad(double x)
{
    return d_cdf(x) + fmin(fmax(x, -1e3), 1e3) * (0.39894228040143267794 * exp(-0.5 * x * x));
}
FLOATS(float, f, f, v_expf, v_sigmoidf)
FLOATS(double, d, , exp, d_sigmoid)

/* gelu by tanh (Hendrycks and Gimpel 2016): 1 + tanh(u) = 2 sigmoid(2u), without cancellation */
#define GELU_TANH_ARGUMENT(x) (1.59576912160573071175 * ((x) + 0.044715 * (x) * (x) * (x)))
#define GELU_TANH_SLOPE(x) (1.59576912160573071175 * (1 + 3 * 0.044715 * (x) * (x)))
LAC_INLINE double d_gelu_tanh(double x) { return x * d_sigmoid(GELU_TANH_ARGUMENT(x)); }
LAC_INLINE double d_gelu_tanh_grad(double x)
{
    double s = d_sigmoid(GELU_TANH_ARGUMENT(x));
    return s + x * s * (1 - s) * GELU_TANH_SLOPE(x);
}
LAC_INLINE float f_gelu_tanh(float x) { return x * v_sigmoidf(1.595769122f * (x + 0.044715f * x * x * x)); }
LAC_INLINE float f_gelu_tanh_grad(float x)
{
    float a = 1.595769122f * (x + 0.044715f * x * x * x), slope = 1.595769122f + 0.21406530f * x * x;
    float e = v_exp_flushf(-fabsf(a)), w = 1 / (1 + e),
          s = a > 0 ? w : e * w; /* s (1 - s) = e w w, without cancellation */
    return s + x * (e * w * w) * slope;
}

#define F_neg(x) GENERIC3(x, f_neg, d_neg, i_neg)(x)
#define F_abs(x) GENERIC3(x, fabsf, fabs, i_abs)(x)
#define F_sign(x) GENERIC3(x, f_sign, d_sign, i_sign)(x)
#define F_floor(x) GENERIC3(x, floorf, floor, i_same)(x)
#define F_ceil(x) GENERIC3(x, ceilf, ceil, i_same)(x)
#define F_round(x) GENERIC3(x, rintf, rint, i_same)(x)
#define F_add(x, y) GENERIC3(x, f_add, d_add, i_add)(x, y)
#define F_sub(x, y) GENERIC3(x, f_sub, d_sub, i_sub)(x, y)
#define F_mul(x, y) GENERIC3(x, f_mul, d_mul, i_mul)(x, y)
#define F_div(x, y) GENERIC3(x, f_div, d_div, i_div)(x, y)
#define F_mod(x, y) GENERIC3(x, f_mod, d_mod, i_mod)(x, y)
#define F_pow(x, y) GENERIC3(x, powf, pow, i_pow)(x, y)
#define F_max(x, y) GENERIC3(x, f_max, d_max, i_max)(x, y)
#define F_min(x, y) GENERIC3(x, f_min, d_min, i_min)(x, y)
#define F_isnan(x) ((x) != (x))
#define F_isfinite(x) ((x) - (x) == 0)
#define F_exp(x) GENERIC2(x, v_expf, exp)(x)
#define F_expm1(x) GENERIC2(x, v_expm1f, expm1)(x)
#define F_log(x) GENERIC2(x, v_logf, log)(x)
#define F_log1p(x) GENERIC2(x, v_log1pf, log1p)(x)
#define F_sqrt(x) GENERIC2(x, sqrtf, sqrt)(x)
#define F_sin(x) GENERIC2(x, sinf, sin)(x)
#define F_cos(x) GENERIC2(x, cosf, cos)(x)
#define F_tanh(x) GENERIC2(x, v_tanhf, tanh)(x)
#define F_erf(x) GENERIC2(x, v_erff, erf)(x)
#define F_sigmoid(x) GENERIC2(x, v_sigmoidf, d_sigmoid)(x)
#define F_softplus(x) GENERIC2(x, v_softplusf, d_softplus)(x)
#define F_silu(x) GENERIC2(x, f_silu, d_silu)(x)
#define F_silu_grad(x) GENERIC2(x, f_silu_grad, d_silu_grad)(x)
#define F_gelu(x) GENERIC2(x, v_geluf, d_gelu)(x)
#define F_gelu_grad(x) GENERIC2(x, v_gelu_gradf, d_gelu_grad)(x)
#define F_gelu_tanh(x) GENERIC2(x, f_gelu_tanh, d_gelu_tanh)(x)
#define F_gelu_tanh_grad(x) GENERIC2(x, f_gelu_tanh_grad, d_gelu_tanh_grad)(x)
#define F_pow_dx(x, y) GENERIC2(x, f_pow_dx, d_pow_dx)(x, y)
#define F_pow_dy(x, y) GENERIC2(x, f_pow_dy, d_pow_dy)(x, y)

/* ---- kernels ---- */

#define KERNEL(name, R, declare, expression)                                                                           \
    static void name(int64_t n, const void *const *in, void *result)                                                   \
    {                                                                                                                  \
        const T *in0 = in[0], *in1 = in[1], *in2 = in[2];                                                              \
        R *out = result;                                                                                               \
        (void)in0, (void)in1, (void)in2;                                                                               \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
        {                                                                                                              \
            declare;                                                                                                   \
            out[i] = (R)(expression);                                                                                  \
        }                                                                                                              \
    }
#define X1 T x = in0[i]
#define X2 T x = in0[i], y = in1[i]
#define X3 T x = in0[i], y = in1[i], g = in2[i]
#define BACKWARD1(name, f) KERNEL(name, T, X3; (void)x; (void)y, g * (f))
#define IF_FLOAT_FLOAT(a) a
#define IF_FLOAT_ANY(a)

#define T float
#define MAP1(name, domain, value, gradient) KERNEL(m1_f32_##name, T, X1, value) BACKWARD1(b1_f32_##name, gradient)
#define MAP2(name, domain, value, dx, dy)                                                                              \
    KERNEL(m2_f32_##name, T, X2, value) BACKWARD1(bx_f32_##name, dx) BACKWARD1(by_f32_##name, dy)
#define CMP1(name, value) KERNEL(m1_f32_##name, uint8_t, X1, value)
#define CMP2(name, value) KERNEL(m2_f32_##name, uint8_t, X2, value)
#include "../maps.def"
KERNEL(axpy_f32, T, X3, x *y + g)
#undef T
#define T double
#define MAP1(name, domain, value, gradient) KERNEL(m1_f64_##name, T, X1, value) BACKWARD1(b1_f64_##name, gradient)
#define MAP2(name, domain, value, dx, dy)                                                                              \
    KERNEL(m2_f64_##name, T, X2, value) BACKWARD1(bx_f64_##name, dx) BACKWARD1(by_f64_##name, dy)
#define CMP1(name, value) KERNEL(m1_f64_##name, uint8_t, X1, value)
#define CMP2(name, value) KERNEL(m2_f64_##name, uint8_t, X2, value)
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
#include "../maps.def"
KERNEL(axpy_i64, T, X3, i_add(i_mul(x, y), g))
#undef T

typedef struct {
    lac_kernel *value[3];       /* by compute type; NULL: not defined there */
    lac_kernel *gradient[2][2]; /* [argument][compute type] */
    bool to_bool, light;        /* light: arithmetic only, no exponentials */
} lac_map;
#define LIGHT_FLOAT false
#define LIGHT_ANY true
#define I64_FLOAT(name) NULL
#define I64_ANY(name) name
static const lac_map maps1[] = {
#define MAP1(name, domain, value, gradient)                                                                            \
    {{m1_f32_##name, m1_f64_##name, I64_##domain(m1_i64_##name)},                                                      \
     {{b1_f32_##name, b1_f64_##name}, {NULL, NULL}},                                                                   \
     false,                                                                                                            \
     LIGHT_##domain},
#define CMP1(name, value) {{m1_f32_##name, m1_f64_##name, m1_i64_##name}, {{NULL, NULL}, {NULL, NULL}}, true, true},
#define LOGIC1(name, text, value) {{NULL, NULL, m1_i64_##name}, {{NULL, NULL}, {NULL, NULL}}, true, true},
#include "../maps.def"
};
static const lac_map maps2[] = {
#define MAP2(name, domain, value, dx, dy)                                                                              \
    {{m2_f32_##name, m2_f64_##name, I64_##domain(m2_i64_##name)},                                                      \
     {{bx_f32_##name, bx_f64_##name}, {by_f32_##name, by_f64_##name}},                                                 \
     false,                                                                                                            \
     LIGHT_##domain},
#define CMP2(name, value) {{m2_f32_##name, m2_f64_##name, m2_i64_##name}, {{NULL, NULL}, {NULL, NULL}}, true, true},
#define LOGIC2(name, text, value) {{NULL, NULL, m2_i64_##name}, {{NULL, NULL}, {NULL, NULL}}, true, true},
#include "../maps.def"
};

/* ---- the driver ---- */

typedef struct {
    lac_nest nest; /* view 0 is the output */
    lac_kernel *kernel;
    int32_t dtype[4];
    bool raw;              /* the kernel writes the output's dtype itself (bool) */
    bool stream;           /* a dense output larger than the caches: write past them */
    int64_t strip, strips; /* elements of a strip; strips per row */
} elem_job;

static void elem_task(void *context, int64_t begin, int64_t end, int thread)
{
    const elem_job *job = context;
    const lac_nest *nest = &job->nest;
    const int last = nest->ndim - 1, views = nest->views;
    const int64_t length = nest->shape[last];
    double buffer[4][STRIP], packed[STRIP];
    const void *repeated[4] = {NULL, NULL, NULL, NULL};
    int64_t filled[4] = {0, 0, 0, 0};
    const void *in[4] = {NULL, NULL, NULL, NULL};
    lac_cursor at;
    (void)thread;
    int64_t row = begin / job->strips, strip = begin % job->strips;
    LAC_CPU(cursor_set)(nest, &at, row);
    for (int64_t t = begin; t < end; t++) {
        int64_t start = strip * job->strip, n = length - start < job->strip ? length - start : job->strip;
        for (int v = 1; v < views; v++) {
            int64_t stride = nest->stride[v][last];
            const char *x = at.at[v] + start * stride;
            if (stride == 0 && length > 1) {
                /* a broadcast value: the buffer may still hold it */
                if (repeated[v] == x && filled[v] >= n) continue;
                repeated[v] = x;
                filled[v] = n;
            } else if (length == 1) {
                stride = lac_bytes_of(job->dtype[v]);
            }
            if (job->stream && stride == lac_bytes_of(job->dtype[v]))
                v_prefetch(x + 2 * job->strip * stride, n * stride); /* reads go on while the result is written */
            in[v - 1] = LAC_CPU(load)(job->dtype[v], x, stride, n, buffer[v]);
        }
        int64_t stride = length == 1 ? lac_bytes_of(job->dtype[0]) : nest->stride[0][last];
        char *out = at.at[0] + start * nest->stride[0][last];
        if (job->stream) {
            const void *result = buffer[0];
            job->kernel(n, in, buffer[0]);
            if (!job->raw && !lac_is_native(job->dtype[0])) {
                LAC_CPU(store)(job->dtype[0], buffer[0], packed, stride, n);
                result = packed;
            }
            v_stream(out, result, (size_t)(n * stride));
        } else if (job->raw || (lac_is_native(job->dtype[0]) && stride == lac_bytes_of(job->dtype[0]))) {
            job->kernel(n, in, out);
        } else {
            job->kernel(n, in, buffer[0]);
            LAC_CPU(store)(job->dtype[0], buffer[0], out, stride, n);
        }
        if (++strip == job->strips) {
            strip = 0;
            lac_cursor_next(nest, &at);
        }
    }
    if (job->stream) v_stream_end();
}

/* Write past the caches? Not into memory that the operator also reads: that is in the cache already. */
static bool elem_streams(const lac_nest *nest, int dtype)
{
    int64_t bytes = lac_bytes_of(dtype);
    if (nest->stride[0][nest->ndim - 1] != bytes) return false;
    for (int d = 0; d < nest->ndim; d++) bytes *= nest->shape[d];
    if (bytes < LAC_STREAM_BYTES) return false;
    for (int v = 1; v < nest->views; v++)
        if (nest->data[v] == nest->data[0]) return false;
    return true;
}

/* views[0] is the output; a compute-type kernel over all of it. light: cheaper than the memory it touches; the others
 * hide the cost of ordinary stores behind their arithmetic, and storing apart from it would be slower. */
static int elem_run(const char *op, lac_kernel *kernel, int count, const lac_view *const *views, bool raw, bool light)
{
    if (lac_view_numel(views[0]) == 0) return 0;
    if (!kernel) LAC_FAIL(DTYPE, "%s: not defined for %s", op, lac_dtype_name(views[count - 1]->dtype));
    elem_job job;
    LAC_CPU(nest_make)(&job.nest, count, views);
    job.kernel = kernel;
    job.raw = raw;
    job.stream = light && elem_streams(&job.nest, views[0]->dtype);
    for (int v = 0; v < count; v++) job.dtype[v] = views[v]->dtype;
    int64_t rows = 1;
    for (int d = 0; d < job.nest.ndim - 1; d++) rows *= job.nest.shape[d];
    int64_t length = job.nest.shape[job.nest.ndim - 1];
    job.strip = job.stream ? STREAM_STRIP : STRIP;
    job.strips = (length + job.strip - 1) / job.strip;
    return LAC_CPU(parallel)(op, rows * job.strips, rows * length, elem_task, &job);
}

/* a scalar as a view of stride 0 in the compute type of dtype */
typedef union {
    float f;
    double d;
    int64_t i;
} scalar;
static void scalar_view(double value, int dtype, const lac_view *like, scalar *space, lac_view *v)
{
    int ctype = lac_compute_type(dtype);
    v->data = space;
    v->ndim = like->ndim;
    for (int i = 0; i < like->ndim; i++) {
        v->shape[i] = like->shape[i];
        v->stride[i] = 0;
    }
    if (ctype == C_F32) space->f = (float)value, v->dtype = LAC_F32;
    else if (ctype == C_F64) space->d = value, v->dtype = LAC_F64;
    else space->i = (int64_t)value, v->dtype = LAC_I64;
}

int LAC_CPU(map1)(const lac_a_map1 *a)
{
    const lac_view *views[] = {&a->out, &a->x};
    const lac_map *map = &maps1[a->fn];
    return elem_run("map1", map->value[lac_compute_type(a->x.dtype)], 2, views, map->to_bool, map->light);
}

int LAC_CPU(map1_bwd)(const lac_a_map1_bwd *a)
{
    const lac_view *views[] = {&a->out, &a->x, &a->y, &a->g};
    const lac_map *map = &maps1[a->fn];
    return elem_run("map1_bwd", map->gradient[0][lac_compute_type(a->x.dtype)], 4, views, false, map->light);
}

int LAC_CPU(map2)(const lac_a_map2 *a)
{
    lac_view constant;
    scalar space;
    const lac_view *x = &a->x, *y = &a->y;
    if (!y->data) {
        scalar_view(a->scalar, x->dtype, &a->out, &space, &constant);
        y = &constant;
    }
    const lac_map *map = &maps2[a->fn];
    const lac_view *views[] = {&a->out, a->swapped ? y : x, a->swapped ? x : y};
    return elem_run("map2", map->value[lac_compute_type(x->dtype)], 3, views, map->to_bool, map->light);
}

int LAC_CPU(map2_bwd)(const lac_a_map2_bwd *a)
{
    lac_view constant;
    scalar space;
    const lac_view *x = &a->x, *y = &a->y;
    int which = a->which;
    if (!y->data) {
        scalar_view(a->scalar, x->dtype, &a->out, &space, &constant);
        y = &constant;
        which = a->swapped;
    }
    bool swapped = !a->y.data && a->swapped;
    const lac_view *views[] = {&a->out, swapped ? y : x, swapped ? x : y, &a->g};
    return elem_run("map2_bwd", maps2[a->fn].gradient[which][lac_compute_type(x->dtype)], 4, views, false,
                    maps2[a->fn].light);
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
    return a->x.data ? elem_run("axpy", add[ctype], 4, sum, false, true)
                     : elem_run("scale", mul[ctype], 3, product, false, true);
}

/* ---- moving bytes: copy, where, fill ---- */

#define MOVE(type)                                                                                                     \
    do {                                                                                                               \
        for (int64_t i = 0; i < n; i++) *(type *)(out + i * so) = *(const type *)(x + i * sx);                         \
    } while (0)

#define REPEAT(type)                                                                                                   \
    do {                                                                                                               \
        type value = *(const type *)x, *to = (type *)out;                                                              \
        for (int64_t i = 0; i < n; i++) to[i] = value;                                                                 \
    } while (0)

void LAC_CPU(move)(int bytes, char *out, int64_t so, const char *x, int64_t sx, int64_t n)
{
    if (so == bytes && sx == bytes) {
        memcpy(out, x, (size_t)(n * bytes));
        return;
    }
    if (so == bytes && sx == 0) {
        switch (bytes) {
        case 1:
            REPEAT(uint8_t);
            return;
        case 2:
            REPEAT(uint16_t);
            return;
        case 4:
            REPEAT(uint32_t);
            return;
        default:
            REPEAT(uint64_t);
            return;
        }
    }
    switch (bytes) {
    case 1:
        MOVE(uint8_t);
        break;
    case 2:
        MOVE(uint16_t);
        break;
    case 4:
        MOVE(uint32_t);
        break;
    default:
        MOVE(uint64_t);
        break;
    }
}

/* Values of one compute type in another. To integers: towards zero, saturating, NaN gives 0. f64 on its way to a half
 * type is rounded to odd, so that the second rounding is the only one that counts. */
static const void *convert_block(int from, int to, int dtype, const void *x, void *buffer, int64_t n)
{
    if (from == to) return x;
    const float *f = x;
    const double *d = x;
    const int64_t *l = x;
    float *of = buffer;
    double *od = buffer;
    int64_t *ol = buffer;
    bool half = dtype == LAC_F16 || dtype == LAC_BF16;
    if (to == C_F32 && half)
        for (int64_t i = 0; i < n; i++) of[i] = v_round_odd(from == C_F64 ? d[i] : (double)l[i]);
    else if (to == C_F32)
        for (int64_t i = 0; i < n; i++) of[i] = from == C_F64 ? (float)d[i] : (float)l[i];
    else if (to == C_F64)
        for (int64_t i = 0; i < n; i++) od[i] = from == C_F32 ? (double)f[i] : (double)l[i];
    else {
        double low = dtype == LAC_I32 ? -2147483648.0 : dtype == LAC_U8 || dtype == LAC_BOOL ? 0.0 : -0x1p63;
        double high = dtype == LAC_I32 ? 2147483647.0 : dtype == LAC_U8 ? 255.0 : 0x1p63;
        for (int64_t i = 0; i < n; i++) {
            double v = from == C_F32 ? (double)f[i] : d[i];
            if (dtype == LAC_BOOL) ol[i] = v != 0;
            else if (v != v) ol[i] = 0;
            else if (v >= 0x1p63) ol[i] = (int64_t)(high >= 0x1p63 ? INT64_MAX : (int64_t)high);
            else ol[i] = (int64_t)(v < low ? low : v > high ? high : v);
        }
    }
    return buffer;
}

static void copy_task(void *context, int64_t begin, int64_t end, int thread)
{
    const elem_job *job = context;
    const lac_nest *nest = &job->nest;
    const int last = nest->ndim - 1, to = job->dtype[0], from = job->dtype[1];
    const int64_t length = nest->shape[last];
    double first[STRIP], second[STRIP];
    lac_cursor at;
    (void)thread;
    int64_t strip = begin % job->strips;
    LAC_CPU(cursor_set)(nest, &at, begin / job->strips);
    for (int64_t t = begin; t < end; t++) {
        int64_t start = strip * job->strip, n = length - start < job->strip ? length - start : job->strip;
        int64_t so = nest->stride[0][last], sx = nest->stride[1][last];
        char *out = at.at[0] + start * so;
        const char *x = at.at[1] + start * sx;
        if (length == 1) so = lac_bytes_of(to), sx = lac_bytes_of(from);
        if (job->stream) {
            const void *v = x;
            if (to != from) v = LAC_CPU(load)(from, x, sx, n, first);
            else if (sx != so) LAC_CPU(move)((int)so, (char *)first, so, x, sx, n), v = first;
            if (to != from) {
                v = convert_block(lac_compute_type(from), lac_compute_type(to), to, v, second, n);
                if (!lac_is_native(to)) LAC_CPU(store)(to, v, first, so, n), v = first;
            }
            v_stream(out, v, (size_t)(n * so));
        } else if (to == from) {
            LAC_CPU(move)((int)lac_bytes_of(to), out, so, x, sx, n);
        } else {
            const void *v = LAC_CPU(load)(from, x, sx, n, first);
            v = convert_block(lac_compute_type(from), lac_compute_type(to), to, v, second, n);
            LAC_CPU(store)(to, v, out, so, n);
        }
        if (++strip == job->strips) {
            strip = 0;
            lac_cursor_next(nest, &at);
        }
    }
    if (job->stream) v_stream_end();
}

/* A transposing copy in square tiles: a strip would touch one cache line per element and drop it before its
 * neighbours are wanted. Axis `tile_axis` is contiguous in x, the last axis in out. */
enum { TILE = 32 };
typedef struct {
    lac_nest nest;
    int tile_axis, bytes;
    int64_t tiles_a, tiles_b;
} transpose_job;

#define TILE_MOVE(type)                                                                                                \
    do {                                                                                                               \
        for (int64_t i = 0; i < na; i++)                                                                               \
            for (int64_t j = 0; j < nb; j++) ((type *)(out + i * oa))[j] = *(const type *)(x + i * xa + j * xb);       \
    } while (0)

static void transpose_task(void *context, int64_t begin, int64_t end, int thread)
{
    const transpose_job *job = context;
    const lac_nest *nest = &job->nest;
    int a = job->tile_axis, b = nest->ndim - 1;
    int64_t oa = nest->stride[0][a], xa = nest->stride[1][a], xb = nest->stride[1][b];
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t tb = t % job->tiles_b * TILE, ta = t / job->tiles_b % job->tiles_a * TILE,
                rest = t / job->tiles_b / job->tiles_a;
        char *out = nest->data[0] + ta * oa + tb * job->bytes;
        const char *x = nest->data[1] + ta * xa + tb * xb;
        for (int d = b - 1; d >= 0; d--) {
            if (d == a) continue;
            out += rest % nest->shape[d] * nest->stride[0][d];
            x += rest % nest->shape[d] * nest->stride[1][d];
            rest /= nest->shape[d];
        }
        int64_t na = nest->shape[a] - ta < TILE ? nest->shape[a] - ta : TILE;
        int64_t nb = nest->shape[b] - tb < TILE ? nest->shape[b] - tb : TILE;
        switch (job->bytes) {
        case 1:
            TILE_MOVE(uint8_t);
            break;
        case 2:
            TILE_MOVE(uint16_t);
            break;
        case 4:
            TILE_MOVE(uint32_t);
            break;
        default:
            TILE_MOVE(uint64_t);
            break;
        }
    }
}

/* fills the job if a and b transpose a plane that is worth tiles */
static bool transpose_fits(const lac_view *out, const lac_view *x, transpose_job *job)
{
    const lac_view *views[] = {out, x};
    if (out->dtype != x->dtype) return false;
    LAC_CPU(nest_make)(&job->nest, 2, views);
    int b = job->nest.ndim - 1;
    job->bytes = (int)lac_bytes_of(out->dtype);
    if (job->nest.stride[0][b] != job->bytes || job->nest.stride[1][b] == job->bytes || job->nest.shape[b] < 8)
        return false;
    for (job->tile_axis = 0; job->tile_axis < b; job->tile_axis++)
        if (job->nest.stride[1][job->tile_axis] == job->bytes && job->nest.shape[job->tile_axis] >= 8) break;
    if (job->tile_axis == b) return false;
    job->tiles_a = (job->nest.shape[job->tile_axis] + TILE - 1) / TILE;
    job->tiles_b = (job->nest.shape[b] + TILE - 1) / TILE;
    return true;
}

static int move_run(const char *op, lac_task *task, int count, const lac_view *const *views)
{
    if (lac_view_numel(views[0]) == 0) return 0;
    elem_job job;
    LAC_CPU(nest_make)(&job.nest, count, views);
    for (int v = 0; v < count; v++) job.dtype[v] = views[v]->dtype;
    job.stream = elem_streams(&job.nest, views[0]->dtype);
    int64_t rows = 1, length = job.nest.shape[job.nest.ndim - 1];
    for (int d = 0; d < job.nest.ndim - 1; d++) rows *= job.nest.shape[d];
    job.strip = job.stream ? STREAM_STRIP : STRIP;
    job.strips = (length + job.strip - 1) / job.strip;
    return LAC_CPU(parallel)(op, rows * job.strips, rows * length, task, &job);
}

int LAC_CPU(copy)(const lac_a_copy *a)
{
    const lac_view *views[] = {&a->out, &a->x};
    transpose_job job;
    int64_t numel = lac_view_numel(&a->out), tiles;
    if (numel >= 4 * TILE * TILE && transpose_fits(&a->out, &a->x, &job)) {
        tiles = job.tiles_a * job.tiles_b;
        for (int d = 0; d < job.nest.ndim - 1; d++)
            if (d != job.tile_axis) tiles *= job.nest.shape[d];
        return LAC_CPU(parallel)("copy", tiles, numel, transpose_task, &job);
    }
    return move_run("copy", copy_task, 2, views);
}

int LAC_CPU(fill)(const lac_a_fill *a)
{
    /* the value, converted once, is a view of stride 0 */
    double value = a->value, converted;
    uint64_t space = 0;
    const void *v = convert_block(C_F64, lac_compute_type(a->x.dtype), a->x.dtype, &value, &converted, 1);
    LAC_CPU(store)(a->x.dtype, v, &space, lac_bytes_of(a->x.dtype), 1);
    lac_view x = a->x;
    x.data = &space;
    for (int i = 0; i < x.ndim; i++) x.stride[i] = 0;
    const lac_view *views[] = {&a->x, &x};
    return move_run("fill", copy_task, 2, views);
}

#define SELECT(type)                                                                                                   \
    do {                                                                                                               \
        for (int64_t i = 0; i < n; i++)                                                                                \
            *(type *)(out + i * s[0]) =                                                                                \
                *(const uint8_t *)(c + i * s[1]) ? *(const type *)(x + i * s[2]) : *(const type *)(y + i * s[3]);      \
    } while (0)

static void where_task(void *context, int64_t begin, int64_t end, int thread)
{
    const elem_job *job = context;
    const lac_nest *nest = &job->nest;
    const int last = nest->ndim - 1;
    const int64_t length = nest->shape[last];
    lac_cursor at;
    (void)thread;
    int64_t strip = begin % job->strips, s[4];
    for (int v = 0; v < 4; v++) s[v] = nest->stride[v][last];
    LAC_CPU(cursor_set)(nest, &at, begin / job->strips);
    for (int64_t t = begin; t < end; t++) {
        int64_t start = strip * job->strip, n = length - start < job->strip ? length - start : job->strip;
        char *out = at.at[0] + start * s[0];
        const char *c = at.at[1] + start * s[1], *x = at.at[2] + start * s[2], *y = at.at[3] + start * s[3];
        switch (lac_bytes_of(job->dtype[0])) {
        case 1:
            SELECT(uint8_t);
            break;
        case 2:
            SELECT(uint16_t);
            break;
        case 4:
            SELECT(uint32_t);
            break;
        default:
            SELECT(uint64_t);
            break;
        }
        if (++strip == job->strips) {
            strip = 0;
            lac_cursor_next(nest, &at);
        }
    }
}

int LAC_CPU(where)(const lac_a_where *a)
{
    const lac_view *views[] = {&a->out, &a->cond, &a->x, &a->y};
    return move_run("where", where_task, 4, views);
}

/* dst [n]: start + i step; integers exactly, floats in double and rounded once */
int LAC_CPU(arange)(const lac_a_arange *a)
{
    const lac_view *v = &a->out;
    int ctype = lac_compute_type(v->dtype);
    int64_t n = v->ndim ? v->shape[0] : 1, stride = v->ndim ? v->stride[0] * lac_bytes_of(v->dtype) : 0;
    double values[STRIP], converted[STRIP];
    for (int64_t at = 0; at < n; at += STRIP) {
        int64_t m = n - at < STRIP ? n - at : STRIP;
        const void *block = values;
        if (ctype == C_I64) {
            int64_t *integers = (int64_t *)values;
            for (int64_t i = 0; i < m; i++) integers[i] = i_add((int64_t)a->start, i_mul(at + i, (int64_t)a->step));
        } else {
            for (int64_t i = 0; i < m; i++) values[i] = a->start + (double)(at + i) * a->step;
            block = convert_block(C_F64, ctype, v->dtype, values, converted, m);
        }
        LAC_CPU(store)(v->dtype, block, (char *)v->data + at * stride, stride, m);
        if (lac_interrupted()) LAC_FAIL(INTERRUPTED, "arange: interrupted");
    }
    return 0;
}
