/* op_elem.c: front ends of the elementwise operators, fill, copy and arange.
 *
 * Semantics. Both tensors of a binary function have one dtype: mixing dtypes is an error that names both, because a
 * silent promotion hides a copy and a change of precision. A scalar adapts to the tensor's dtype: a float tensor
 * takes any number; an integer tensor takes only an integer that fits. Comparisons and isnan give bool; and, or, xor,
 * not take bool only, the bitwise functions integers only. lac_copy is the one place that converts: float to integer
 * truncates towards zero and saturates (NaN gives 0), integer to narrower integer wraps, anything to bool is "not
 * zero", and f64 or i64 to a half type rounds once. In-place operators refuse a destination that overlaps itself or
 * partly overlaps its source; the same view on both sides is fine, since every element is read before it is written.
 */
#include "op_front.h"
#include <string.h>

enum { KIND_FLOAT, KIND_ANY, KIND_CMP, KIND_LOGIC, KIND_INT };
typedef struct {
    const char *name;
    int kind, constants; /* constants: of a function with parameters */
} map_info;
static const map_info names1[] = {
#define MAP1(name, domain, value, gradient) {#name, KIND_##domain, 0},
#define CMP1(name, value) {#name, KIND_CMP, 0},
#define LOGIC1(name, text, value) {text, KIND_LOGIC, 0},
#define INT1(name, value) {#name, KIND_INT, 0},
#include "maps.def"
};
static const map_info names2[] = {
#define MAP2(name, domain, value, dx, dy) {#name, KIND_##domain, 0},
#define CMP2(name, value) {#name, KIND_CMP, 0},
#define LOGIC2(name, text, value) {text, KIND_LOGIC, 0},
#define INT2(name, value) {#name, KIND_INT, 0},
#include "maps.def"
};
static const map_info names_p[] = {
#define MAPP(name, domain, count, value, gradient) {#name, KIND_##domain, count},
#include "maps.def"
};
static const map_info names3[] = {
#define MAP3(name, value, dx, dy, dz) {#name, KIND_FLOAT, 0},
#include "maps.def"
};
enum {
    COUNT1 = sizeof names1 / sizeof *names1,
    COUNT2 = sizeof names2 / sizeof *names2,
    COUNT_P = sizeof names_p / sizeof *names_p,
    COUNT3 = sizeof names3 / sizeof *names3
};

/* the functions of an arity (0: of one tensor and constants); NULL and no functions for another */
static const map_info *map_list(int arity, int *count)
{
    static const map_info *const lists[] = {names_p, names1, names2, names3};
    static const int counts[] = {COUNT_P, COUNT1, COUNT2, COUNT3};
    bool known = arity >= 0 && arity <= 3;
    *count = known ? counts[arity] : 0;
    return known ? lists[arity] : NULL;
}

int lac_map_id(int arity, const char *name)
{
    int count;
    const map_info *list = map_list(arity, &count);
    for (int i = 0; name && i < count; i++)
        if (strcmp(list[i].name, name) == 0) return i;
    return -1;
}

const char *lac_map_name(int arity, int id)
{
    int count;
    const map_info *list = map_list(arity, &count);
    return id >= 0 && id < count ? list[id].name : NULL;
}

static int check_domain(const map_info *f, const lac_tensor *x)
{
    if (f->kind == KIND_FLOAT) return lac_need_float(f->name, "x", x);
    if (f->kind == KIND_ANY && x->dtype == LAC_BOOL)
        LAC_FAIL(DTYPE, "%s: not defined for bool; cast x to a number first", f->name);
    if (f->kind == KIND_INT && (lac_dtype_is_float(x->dtype) || x->dtype == LAC_BOOL))
        LAC_FAIL(DTYPE, "%s: x must be i64, i32 or u8, got %s%s", f->name, lac_dtype_name(x->dtype),
                 x->dtype == LAC_BOOL ? "; for bool there are and, or, xor, not" : "");
    if (f->kind == KIND_LOGIC && x->dtype != LAC_BOOL)
        LAC_FAIL(DTYPE, "%s: x must be bool, got %s; compare it first", f->name, lac_dtype_name(x->dtype));
    return 0;
}

static int check_differentiable(const map_info *f, const lac_tensor *x)
{
    if (f->kind >= KIND_CMP) LAC_FAIL(ARGUMENT, "%s: has no gradient", f->name);
    return lac_need_float(f->name, "x", x);
}

static int out_dtype(const map_info *f, int dtype)
{
    return f->kind == KIND_CMP || f->kind == KIND_LOGIC ? LAC_BOOL : dtype;
}

int lac_map1(int fn, const lac_tensor *x, lac_tensor *out)
{
    lac_a_map1 a;
    LAC_OUT("map1", "out", out);
    if (fn < 0 || fn >= COUNT1) LAC_FAIL(ARGUMENT, "map1: function id %d is outside 0..%d", fn, COUNT1 - 1);
    const map_info *f = &names1[fn];
    LAC_TRY(lac_view_get(f->name, "x", x, &a.x));
    LAC_TRY(check_domain(f, x));
    a.fn = fn;
    LAC_TRY(lac_tensor_new(f->name, out_dtype(f, x->dtype), x->device, x->ndim, x->shape, out, &a.out));
    LAC_RUN_OUT(map1, x->device, &a, out);
    return 0;
}

int lac_map1_bwd(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, lac_tensor *out)
{
    lac_a_map1_bwd a;
    LAC_OUT("map1_bwd", "out", out);
    if (fn < 0 || fn >= COUNT1) LAC_FAIL(ARGUMENT, "map1_bwd: function id %d is outside 0..%d", fn, COUNT1 - 1);
    const map_info *f = &names1[fn];
    LAC_TRY(lac_view_get(f->name, "x", x, &a.x));
    LAC_TRY(lac_view_get(f->name, "y", y, &a.y));
    LAC_TRY(lac_view_get(f->name, "g", g, &a.g));
    LAC_TRY(check_differentiable(f, x));
    LAC_TRY(lac_same_dtype(f->name, "x", x, "y", y));
    LAC_TRY(lac_same_dtype(f->name, "x", x, "g", g));
    LAC_TRY(lac_same_shape(f->name, "x", x, "y", y));
    LAC_TRY(lac_same_shape(f->name, "x", x, "g", g));
    LAC_TRY(lac_same_device(f->name, "x", x, "y", y));
    LAC_TRY(lac_same_device(f->name, "x", x, "g", g));
    a.fn = fn;
    LAC_TRY(lac_tensor_new(f->name, x->dtype, x->device, x->ndim, x->shape, out, &a.out));
    LAC_RUN_OUT(map1_bwd, x->device, &a, out);
    return 0;
}

int lac_map2(int fn, const lac_tensor *x, const lac_tensor *y, lac_tensor *out)
{
    lac_a_map2 a;
    int ndim;
    int64_t shape[LAC_MAX_DIMS];
    LAC_OUT("map2", "out", out);
    if (fn < 0 || fn >= COUNT2) LAC_FAIL(ARGUMENT, "map2: function id %d is outside 0..%d", fn, COUNT2 - 1);
    const map_info *f = &names2[fn];
    LAC_TRY(lac_view_get(f->name, "x", x, &a.x));
    LAC_TRY(lac_view_get(f->name, "y", y, &a.y));
    LAC_TRY(lac_same_device(f->name, "x", x, "y", y));
    LAC_TRY(lac_same_dtype(f->name, "x", x, "y", y));
    LAC_TRY(check_domain(f, x));
    LAC_TRY(lac_broadcast(f->name, x, y, &ndim, shape));
    lac_view_expand(&a.x, ndim, shape);
    lac_view_expand(&a.y, ndim, shape);
    a.fn = fn;
    a.scalar = 0;
    a.swapped = false;
    LAC_TRY(lac_tensor_new(f->name, out_dtype(f, x->dtype), x->device, ndim, shape, out, &a.out));
    LAC_RUN_OUT(map2, x->device, &a, out);
    return 0;
}

int lac_map2_scalar(int fn, const lac_tensor *x, double y, int swapped, lac_tensor *out)
{
    lac_a_map2 a;
    LAC_OUT("map2", "out", out);
    if (fn < 0 || fn >= COUNT2) LAC_FAIL(ARGUMENT, "map2: function id %d is outside 0..%d", fn, COUNT2 - 1);
    const map_info *f = &names2[fn];
    LAC_TRY(lac_view_get(f->name, "x", x, &a.x));
    LAC_TRY(check_domain(f, x));
    LAC_TRY(lac_front_scalar(f->name, "the scalar", x, y));
    a.fn = fn;
    a.y.data = NULL;
    a.scalar = y;
    a.swapped = swapped != 0;
    LAC_TRY(lac_tensor_new(f->name, out_dtype(f, x->dtype), x->device, x->ndim, x->shape, out, &a.out));
    LAC_RUN_OUT(map2, x->device, &a, out);
    return 0;
}

/* the checks of both forms of the backward; fills a's inputs and the result's shape */
static int map2_bwd_check(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, lac_a_map2_bwd *a,
                          lac_tensor *both)
{
    if (fn < 0 || fn >= COUNT2) LAC_FAIL(ARGUMENT, "map2_bwd: function id %d is outside 0..%d", fn, COUNT2 - 1);
    const map_info *f = &names2[fn];
    LAC_TRY(lac_view_get(f->name, "x", x, &a->x));
    LAC_TRY(lac_view_get(f->name, "y", y, &a->y));
    LAC_TRY(lac_view_get(f->name, "g", g, &a->g));
    LAC_TRY(check_differentiable(f, x));
    LAC_TRY(lac_same_dtype(f->name, "x", x, "y", y));
    LAC_TRY(lac_same_dtype(f->name, "x", x, "g", g));
    LAC_TRY(lac_same_device(f->name, "x", x, "y", y));
    LAC_TRY(lac_same_device(f->name, "x", x, "g", g));
    LAC_TRY(lac_broadcast(f->name, x, y, &both->ndim, both->shape));
    LAC_TRY(lac_same_shape(f->name, "the result", both, "g", g));
    lac_view_expand(&a->x, both->ndim, both->shape);
    lac_view_expand(&a->y, both->ndim, both->shape);
    a->fn = fn;
    a->scalar = 0;
    a->swapped = false;
    return 0;
}

int lac_map2_bwd(int fn, int which, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, lac_tensor *out)
{
    lac_a_map2_bwd a = {.which = which};
    lac_tensor both = {.ndim = 0};
    LAC_OUT("map2_bwd", "out", out);
    if (which != 0 && which != 1) LAC_FAIL(ARGUMENT, "map2_bwd: argument %d, expected 0 or 1", which);
    LAC_TRY(map2_bwd_check(fn, x, y, g, &a, &both));
    LAC_TRY(lac_tensor_new(names2[fn].name, x->dtype, x->device, both.ndim, both.shape, out, &a.out));
    LAC_RUN_OUT(map2_bwd, x->device, &a, out);
    return 0;
}

int lac_map2_bwd_both(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, lac_tensor *dx,
                      lac_tensor *dy)
{
    lac_a_map2_bwd a = {.which = 2};
    lac_tensor both = {.ndim = 0};
    LAC_OUT("map2_bwd", "dx", dx);
    LAC_OUT("map2_bwd", "dy", dy);
    LAC_TRY(map2_bwd_check(fn, x, y, g, &a, &both));
    const char *name = names2[fn].name;
    LAC_TRY(lac_tensor_new(name, x->dtype, x->device, both.ndim, both.shape, dx, &a.out));
    LAC_TRY_OUT(lac_tensor_new(name, x->dtype, x->device, both.ndim, both.shape, dy, &a.out2), dx);
    LAC_RUN_OUT(map2_bwd, x->device, &a, dx, dy);
    return 0;
}

int lac_map2_scalar_bwd(int fn, const lac_tensor *x, double y, int swapped, const lac_tensor *g, lac_tensor *out)
{
    lac_a_map2_bwd a = {.fn = fn};
    LAC_OUT("map2_bwd", "out", out);
    if (fn < 0 || fn >= COUNT2) LAC_FAIL(ARGUMENT, "map2_bwd: function id %d is outside 0..%d", fn, COUNT2 - 1);
    const map_info *f = &names2[fn];
    LAC_TRY(lac_view_get(f->name, "x", x, &a.x));
    LAC_TRY(lac_view_get(f->name, "g", g, &a.g));
    LAC_TRY(check_differentiable(f, x));
    LAC_TRY(lac_same_dtype(f->name, "x", x, "g", g));
    LAC_TRY(lac_same_shape(f->name, "x", x, "g", g));
    LAC_TRY(lac_same_device(f->name, "x", x, "g", g));
    a.fn = fn;
    a.which = swapped != 0; /* the tensor's place in fn */
    a.y.data = NULL;
    a.scalar = y;
    a.swapped = swapped != 0;
    LAC_TRY(lac_tensor_new(f->name, x->dtype, x->device, x->ndim, x->shape, out, &a.out));
    LAC_RUN_OUT(map2_bwd, x->device, &a, out);
    return 0;
}

/* the shared part of mapp and its backward */
static int mapp_check(int fn, const lac_tensor *x, const double *constants, lac_a_mapp *a)
{
    if (fn < 0 || fn >= COUNT_P) LAC_FAIL(ARGUMENT, "mapp: function id %d is outside 0..%d", fn, COUNT_P - 1);
    const map_info *f = &names_p[fn];
    if (!constants) LAC_FAIL(ARGUMENT, "%s: no constants", f->name);
    LAC_TRY(lac_view_get(f->name, "x", x, &a->x));
    LAC_TRY(check_domain(f, x));
    for (int i = 0; i < f->constants; i++) {
        LAC_TRY(lac_front_scalar(f->name, "the constant", x, constants[i]));
        a->constants[i] = constants[i];
    }
    a->fn = fn;
    return 0;
}

int lac_mapp(int fn, const lac_tensor *x, const double *constants, lac_tensor *out)
{
    lac_a_mapp a = {.g.data = NULL};
    LAC_OUT("mapp", "out", out);
    LAC_TRY(mapp_check(fn, x, constants, &a));
    LAC_TRY(lac_tensor_new(names_p[fn].name, x->dtype, x->device, x->ndim, x->shape, out, &a.out));
    LAC_RUN_OUT(mapp, x->device, &a, out);
    return 0;
}

int lac_mapp_bwd(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, const double *constants,
                 lac_tensor *out)
{
    lac_a_mapp a = {.g.data = NULL};
    LAC_OUT("mapp_bwd", "out", out);
    LAC_TRY(mapp_check(fn, x, constants, &a));
    const map_info *f = &names_p[fn];
    LAC_TRY(check_differentiable(f, x));
    LAC_TRY(lac_view_get(f->name, "y", y, &a.y));
    LAC_TRY(lac_view_get(f->name, "g", g, &a.g));
    LAC_TRY(lac_same_dtype(f->name, "x", x, "y", y));
    LAC_TRY(lac_same_dtype(f->name, "x", x, "g", g));
    LAC_TRY(lac_same_shape(f->name, "x", x, "y", y));
    LAC_TRY(lac_same_shape(f->name, "x", x, "g", g));
    LAC_TRY(lac_same_device(f->name, "x", x, "y", y));
    LAC_TRY(lac_same_device(f->name, "x", x, "g", g));
    LAC_TRY(lac_tensor_new(f->name, x->dtype, x->device, x->ndim, x->shape, out, &a.out));
    LAC_RUN_OUT(mapp, x->device, &a, out);
    return 0;
}

/* the shared part of map3 and its backward: inputs broadcast, `both` gets the result's shape */
static int map3_check(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *z, lac_a_map3 *a,
                      lac_tensor *both)
{
    lac_tensor two = {.ndim = 0};
    if (fn < 0 || fn >= COUNT3) LAC_FAIL(ARGUMENT, "map3: function id %d is outside 0..%d", fn, COUNT3 - 1);
    const char *name = names3[fn].name;
    LAC_TRY(lac_view_get(name, "x", x, &a->x));
    LAC_TRY(lac_view_get(name, "y", y, &a->y));
    LAC_TRY(lac_view_get(name, "z", z, &a->z));
    LAC_TRY(lac_need_float(name, "x", x));
    LAC_TRY(lac_same_dtype(name, "x", x, "y", y));
    LAC_TRY(lac_same_dtype(name, "x", x, "z", z));
    LAC_TRY(lac_same_device(name, "x", x, "y", y));
    LAC_TRY(lac_same_device(name, "x", x, "z", z));
    LAC_TRY(lac_broadcast(name, x, y, &two.ndim, two.shape));
    LAC_TRY(lac_broadcast(name, &two, z, &both->ndim, both->shape));
    lac_view_expand(&a->x, both->ndim, both->shape);
    lac_view_expand(&a->y, both->ndim, both->shape);
    lac_view_expand(&a->z, both->ndim, both->shape);
    a->fn = fn;
    return 0;
}

int lac_map3(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *z, double constant, lac_tensor *out)
{
    lac_a_map3 a = {.constant = constant, .g.data = NULL};
    lac_tensor both = {.ndim = 0};
    LAC_OUT("map3", "out", out);
    LAC_TRY(map3_check(fn, x, y, z, &a, &both));
    LAC_TRY(lac_tensor_new(names3[fn].name, x->dtype, x->device, both.ndim, both.shape, out, &a.out));
    LAC_RUN_OUT(map3, x->device, &a, out);
    return 0;
}

int lac_map3_bwd(int fn, int which, const lac_tensor *x, const lac_tensor *y, const lac_tensor *z, double constant,
                 const lac_tensor *g, lac_tensor *out)
{
    lac_a_map3 a = {.constant = constant, .which = which};
    lac_tensor both = {.ndim = 0};
    LAC_OUT("map3_bwd", "out", out);
    if (which < 0 || which > 2) LAC_FAIL(ARGUMENT, "map3_bwd: argument %d, expected 0, 1 or 2", which);
    LAC_TRY(map3_check(fn, x, y, z, &a, &both));
    const char *name = names3[fn].name;
    LAC_TRY(lac_view_get(name, "g", g, &a.g));
    LAC_TRY(lac_same_dtype(name, "x", x, "g", g));
    LAC_TRY(lac_same_device(name, "x", x, "g", g));
    LAC_TRY(lac_same_shape(name, "the result", &both, "g", g));
    LAC_TRY(lac_tensor_new(name, x->dtype, x->device, both.ndim, both.shape, out, &a.out));
    LAC_RUN_OUT(map3, x->device, &a, out);
    return 0;
}

int lac_where(const lac_tensor *cond, const lac_tensor *x, const lac_tensor *y, lac_tensor *out)
{
    lac_a_where a;
    lac_tensor both = {.ndim = 0};
    int ndim;
    int64_t shape[LAC_MAX_DIMS];
    LAC_OUT("where", "out", out);
    LAC_TRY(lac_view_get("where", "cond", cond, &a.cond));
    LAC_TRY(lac_view_get("where", "x", x, &a.x));
    LAC_TRY(lac_view_get("where", "y", y, &a.y));
    if (cond->dtype != LAC_BOOL) LAC_FAIL(DTYPE, "where: cond must be bool, got %s", lac_dtype_name(cond->dtype));
    LAC_TRY(lac_same_dtype("where", "x", x, "y", y));
    LAC_TRY(lac_same_device("where", "cond", cond, "x", x));
    LAC_TRY(lac_same_device("where", "x", x, "y", y));
    LAC_TRY(lac_broadcast("where", x, y, &both.ndim, both.shape));
    LAC_TRY(lac_broadcast("where", cond, &both, &ndim, shape));
    lac_view_expand(&a.cond, ndim, shape);
    lac_view_expand(&a.x, ndim, shape);
    lac_view_expand(&a.y, ndim, shape);
    LAC_TRY(lac_tensor_new("where", x->dtype, x->device, ndim, shape, out, &a.out));
    LAC_RUN_OUT(where, x->device, &a, out);
    return 0;
}

int lac_axpy(double alpha, const lac_tensor *x, lac_tensor *dst)
{
    lac_a_axpy a = {.alpha = alpha};
    LAC_TRY(lac_view_get("axpy", "x", x, &a.x));
    LAC_TRY(lac_view_get("axpy", "dst", dst, &a.dst));
    LAC_TRY(lac_same_dtype("axpy", "x", x, "dst", dst));
    LAC_TRY(lac_same_device("axpy", "x", x, "dst", dst));
    if (dst->dtype == LAC_BOOL) LAC_FAIL(DTYPE, "axpy: not defined for bool");
    LAC_TRY(lac_front_scalar("axpy", "alpha", dst, alpha));
    LAC_TRY(lac_front_expand_to("axpy", "x", x, &a.x, "dst", dst));
    LAC_TRY(lac_front_writable("axpy", "dst", dst, &a.dst));
    LAC_TRY(lac_front_disjoint("axpy", "x", &a.x, "dst", &a.dst));
    LAC_RUN(axpy, dst->device, &a);
    return 0;
}

int lac_scale(double alpha, lac_tensor *dst)
{
    lac_a_axpy a = {.alpha = alpha};
    LAC_TRY(lac_view_get("scale", "dst", dst, &a.dst));
    if (dst->dtype == LAC_BOOL) LAC_FAIL(DTYPE, "scale: not defined for bool");
    LAC_TRY(lac_front_scalar("scale", "alpha", dst, alpha));
    LAC_TRY(lac_front_writable("scale", "dst", dst, &a.dst));
    LAC_RUN(axpy, dst->device, &a);
    return 0;
}

int lac_fill(lac_tensor *dst, double value)
{
    lac_a_fill a;
    LAC_TRY(lac_view_get("fill", "dst", dst, &a.x));
    LAC_TRY(lac_front_scalar("fill", "value", dst, value));
    LAC_TRY(lac_front_writable("fill", "dst", dst, &a.x));
    a.value = value;
    LAC_RUN(fill, dst->device, &a);
    return 0;
}

static int copy_on(int device, const lac_view *x, const lac_view *out)
{
    lac_a_copy a = {.x = *x, .out = *out};
    LAC_RUN(copy, device, &a);
    return 0;
}

/* x, not expanded, as one run of memory on its own device: x itself, or a new tensor */
static int dense_source(int device, int dtype, const lac_view *x, lac_tensor *made, lac_view *dense)
{
    *dense = *x;
    if (x->dtype == dtype && lac_view_contiguous(x)) return 0;
    LAC_TRY(lac_tensor_new("copy", dtype, device, x->ndim, x->shape, made, dense));
    return copy_on(device, x, dense);
}

/* Bytes cross between devices as they lie, so both ends are made dense first; a change of dtype happens on the side of
 * the source, where it may be the smaller one's bytes that cross. */
static int copy_across(const lac_tensor *src, lac_view x, const lac_tensor *dst, const lac_view *out)
{
    lac_tensor sent = {.storage = NULL}, received = {.storage = NULL};
    bool direct = lac_view_contiguous(out) && lac_view_numel(&x) == lac_view_numel(out),
         to_host = dst->device == LAC_CPU;
    const lac_runtime *runtime = lac_backend_for(to_host ? src->device : dst->device)->runtime;
    lac_view from, to = *out;
    int status = dense_source(src->device, dst->dtype, &x, &sent, &from);
    if (!status && !direct) status = lac_tensor_new("copy", dst->dtype, dst->device, x.ndim, x.shape, &received, &to);
    if (!status)
        status =
            runtime->transfer(to.data, from.data, (size_t)lac_view_numel(&from) * lac_dtype_size(dst->dtype), to_host);
    /* page-locked memory is not staged: the device reads it after this call, and the caller may write to it */
    if (!status && !to_host && !sent.storage && src->storage->pinned) status = runtime->synchronize();
    if (!status && !direct) {
        lac_view_expand(&to, out->ndim, out->shape);
        status = copy_on(dst->device, &to, out);
    }
    lac_tensor_drop(&sent);
    lac_tensor_drop(&received);
    return status;
}

int lac_copy(const lac_tensor *src, lac_tensor *dst)
{
    lac_view x, expanded, out;
    LAC_TRY(lac_view_get("copy", "src", src, &x));
    LAC_TRY(lac_view_get("copy", "dst", dst, &out));
    expanded = x;
    LAC_TRY(lac_front_expand_to("copy", "src", src, &expanded, "dst", dst));
    LAC_TRY(lac_front_writable("copy", "dst", dst, &out));
    if (src->device != dst->device) return copy_across(src, x, dst, &out);
    LAC_TRY(lac_front_disjoint("copy", "src", &expanded, "dst", &out));
    return copy_on(dst->device, &expanded, &out);
}

int lac_arange(lac_tensor *dst, double start, double step)
{
    lac_a_arange a;
    LAC_TRY(lac_view_get("arange", "dst", dst, &a.out));
    if (dst->ndim != 1) LAC_FAIL(SHAPE, "arange: dst must have one dimension, got %s", lac_describe(dst));
    if (dst->dtype == LAC_BOOL) LAC_FAIL(DTYPE, "arange: not defined for bool");
    if (!lac_dtype_is_float(dst->dtype)) {
        /* an i64 carries the steps of the narrower integers too; the last value must fit */
        LAC_TRY(lac_front_scalar("arange", "start", dst, start));
        lac_tensor wide = {.dtype = LAC_I64};
        LAC_TRY(lac_front_scalar("arange", "step", &wide, step));
        if (dst->shape[0] > 0)
            LAC_TRY(lac_front_scalar("arange", "the last value", dst, start + step * (double)(dst->shape[0] - 1)));
    }
    LAC_TRY(lac_front_writable("arange", "dst", dst, &a.out));
    a.start = start;
    a.step = step;
    LAC_RUN(arange, dst->device, &a);
    return 0;
}

/* ---- shared checks ---- */

int lac_front_scalar(const char *op, const char *name, const lac_tensor *t, double value)
{
    static const double low[] = {-0x1p63, -2147483648.0, 0, 0}, high[] = {0x1p63, 2147483647.0, 255, 1};
    if (lac_dtype_is_float(t->dtype)) return 0;
    int i = t->dtype - LAC_I64;
    bool fits = value >= low[i] && value <= high[i] && value < 0x1p63; /* false for NaN */
    if (fits && value == floor(value)) return 0;
    LAC_FAIL(ARGUMENT, "%s: %s %.17g is not a value of dtype %s; cast the tensor to a floating-point dtype first", op,
             name, value, lac_dtype_name(t->dtype));
}

int lac_front_writable(const char *op, const char *name, const lac_tensor *t, const lac_view *v)
{
    if (!lac_view_self_overlaps(v)) return 0;
    LAC_FAIL(ARGUMENT, "%s: %s %s is an expanded view: several of its elements share memory; make it contiguous first",
             op, name, lac_describe(t));
}

/* Is `delta` a difference of two index tuples? Strides sorted downwards, each above the reach of the smaller ones, so
 * at every level only the two nearest multiples can still be completed. */
static bool reachable(int64_t delta, int n, const int64_t *shape, const int64_t *stride)
{
    if (n == 0) return delta == 0;
    int64_t q = delta / stride[0];
    for (int64_t m = q - 1; m <= q + 1; m++)
        if (m > -shape[0] && m < shape[0] && reachable(delta - m * stride[0], n - 1, shape + 1, stride + 1))
            return true;
    return false;
}

int lac_front_disjoint(const char *op, const char *ns, const lac_view *src, const char *nd, const lac_view *dst)
{
    if (!lac_views_overlap(src, dst)) return 0;
    int64_t shape[LAC_MAX_DIMS], stride[LAC_MAX_DIMS];
    bool same = src->dtype == dst->dtype;
    int n = 0;
    for (int i = 0; i < dst->ndim && same; i++) {
        if (dst->shape[i] == 1) continue;
        same = src->stride[i] == dst->stride[i];
        int at = n++;
        int64_t s = dst->stride[i] < 0 ? -dst->stride[i] : dst->stride[i];
        for (; at > 0 && stride[at - 1] < s; at--) stride[at] = stride[at - 1], shape[at] = shape[at - 1];
        stride[at] = s;
        shape[at] = dst->shape[i];
    }
    if (same) {
        int64_t bytes = (int64_t)lac_dtype_size(dst->dtype), delta = (char *)src->data - (char *)dst->data;
        if (delta == 0) return 0;
        if (delta % bytes == 0 && !reachable(delta / bytes, n, shape, stride)) return 0;
    }
    LAC_FAIL(ARGUMENT, "%s: %s and %s overlap in memory; clone %s first", op, ns, nd, ns);
}

int lac_front_expand_to(const char *op, const char *ns, const lac_tensor *src, lac_view *sv, const char *nd,
                        const lac_tensor *dst)
{
    int added = dst->ndim - src->ndim;
    bool fits = added >= 0;
    for (int i = 0; fits && i < src->ndim; i++) fits = src->shape[i] == 1 || src->shape[i] == dst->shape[i + added];
    if (!fits)
        LAC_FAIL(SHAPE, "%s: %s %s does not broadcast to %s %s", op, ns, lac_shape_text(src->shape, src->ndim), nd,
                 lac_shape_text(dst->shape, dst->ndim));
    lac_view_expand(sv, dst->ndim, dst->shape);
    return 0;
}

int lac_front_count(const char *op, const char *name, const lac_tensor *t, int64_t *count)
{
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] == 0) return *count = 0, 0;
    for (int i = 0; i < t->ndim; i++)
        if (__builtin_mul_overflow(n, t->shape[i], &n))
            LAC_FAIL(SHAPE, "%s: %s %s has more elements than 64 bits can count", op, name, lac_describe(t));
    *count = n;
    return 0;
}

int lac_front_integer_index(const char *op, const char *name, const lac_tensor *t)
{
    if (t->dtype == LAC_I64 || t->dtype == LAC_I32) return 0;
    LAC_FAIL(DTYPE, "%s: %s must be i64 or i32, got %s", op, name, lac_dtype_name(t->dtype));
}
