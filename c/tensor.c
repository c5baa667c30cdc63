/* tensor.c: the strided view, its checks, and the text of shapes in messages.
 *
 * A lac_tensor is made by the host (views are copies of the struct with other strides), so nothing in it can be
 * trusted. lac_view_get() is the single gate: it accepts a tensor only if its storage is alive and every element
 * that shape and stride can reach lies inside the storage. It runs once per argument and call, so it has no
 * branches that a well-formed tensor does not need, and formats text only on failure.
 */
#include "device.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    uint8_t bytes;
} dtypes[LAC_DTYPES] = {{"f64", 8}, {"f32", 4}, {"f16", 2}, {"bf16", 2},
                        {"i64", 8}, {"i32", 4}, {"u8", 1},  {"bool", 1}};

size_t lac_dtype_size(int dtype) { return dtype >= 0 && dtype < LAC_DTYPES ? dtypes[dtype].bytes : 0; }

const char *lac_dtype_name(int dtype) { return dtype >= 0 && dtype < LAC_DTYPES ? dtypes[dtype].name : "unknown"; }

int64_t lac_numel(const lac_tensor *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

/* ---- text ---- */

static char *rotating_buffer(void)
{
    static _Thread_local char buffers[8][192];
    static _Thread_local int next;
    return buffers[next++ & 7];
}

const char *lac_shape_text(const int64_t *shape, int ndim)
{
    char *b = rotating_buffer();
    int at = snprintf(b, 192, "[");
    for (int i = 0; i < ndim && i < LAC_MAX_DIMS; i++)
        at += snprintf(b + at, (size_t)(192 - at), "%s%lld", i ? ", " : "", (long long)shape[i]);
    snprintf(b + at, (size_t)(192 - at), "]");
    return b;
}

const char *lac_describe(const lac_tensor *t)
{
    if (!t) return "none";
    char *b = rotating_buffer();
    snprintf(b, 192, "%s %s", lac_dtype_name(t->dtype), lac_shape_text(t->shape, t->ndim));
    return b;
}

static const char *device_text(int device)
{
    if (device == LAC_CPU) return "cpu";
    char *b = rotating_buffer();
    snprintf(b, 192, "cuda:%d", device - LAC_CUDA);
    return b;
}

/* ---- the gate ---- */

/* Are all elements inside [0, bytes) of the storage? Overflow counts as outside. Not for a tensor without elements:
 * its offset leads to nothing, and the second of two halves of an empty tensor has one. */
static bool inside_storage(const lac_tensor *t)
{
    int64_t low = t->offset, high = t->offset, span, elements = (int64_t)(t->storage->bytes / dtypes[t->dtype].bytes);
    for (int i = 0; i < t->ndim; i++) {
        if (__builtin_mul_overflow(t->shape[i] - 1, t->stride[i], &span)) return false;
        int64_t *end = span < 0 ? &low : &high;
        if (__builtin_add_overflow(*end, span, end)) return false;
    }
    return low >= 0 && high < elements;
}

int lac_view_get(const char *op, const char *name, const lac_tensor *t, lac_view *v)
{
    if (!t) LAC_FAIL(ARGUMENT, "%s: %s is missing", op, name);
    if (!t->storage) LAC_FAIL(RELEASED, "%s: %s has no storage (never made, or dropped)", op, name);
    if (!t->storage->data) LAC_FAIL(RELEASED, "%s: %s is used after release", op, name);
    if ((uint32_t)t->dtype >= LAC_DTYPES) LAC_FAIL(DTYPE, "%s: %s has an unknown dtype %d", op, name, t->dtype);
    if ((uint32_t)t->ndim > LAC_MAX_DIMS)
        LAC_FAIL(SHAPE, "%s: %s has %d dimensions, at most %d are supported", op, name, t->ndim, LAC_MAX_DIMS);
    if (t->device != t->storage->device)
        LAC_FAIL(DEVICE, "%s: %s says %s but its storage is on %s", op, name, device_text(t->device),
                 device_text(t->storage->device));
    bool empty = false;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] < 0)
            LAC_FAIL(SHAPE, "%s: %s has a negative size: %s", op, name, lac_shape_text(t->shape, t->ndim));
        empty |= t->shape[i] == 0;
    }
    if (__builtin_expect(t->storage->copying != 0, 0)) LAC_TRY(lac_copy_settle(t->storage));
    if (!empty && !inside_storage(t))
        LAC_FAIL(SHAPE, "%s: %s %s reaches outside its storage of %zu bytes", op, name, lac_describe(t),
                 t->storage->bytes);
    v->data = (char *)t->storage->data + (empty ? 0 : (size_t)t->offset * dtypes[t->dtype].bytes);
    v->dtype = t->dtype;
    v->ndim = t->ndim;
    for (int i = 0; i < t->ndim; i++) {
        v->shape[i] = t->shape[i];
        /* one that nobody follows may be anything, and back ends multiply it */
        bool wild = t->stride[i] > INT32_MAX || t->stride[i] < INT32_MIN;
        v->stride[i] = wild && (empty || t->shape[i] == 1) ? 0 : t->stride[i];
    }
    if (__builtin_expect(lac_watch_on, 0)) lac_watch_view(op, name, t, v, false);
    return 0;
}

int lac_tensor_check(const lac_tensor *t)
{
    lac_view v;
    return lac_view_get("tensor", "argument", t, &v);
}

int lac_tensor_data(const lac_tensor *t, void **data)
{
    lac_view v;
    if (!data) LAC_FAIL(ARGUMENT, "data: nowhere to put the address");
    LAC_TRY(lac_view_get("data", "tensor", t, &v));
    if (t->device != LAC_CPU)
        LAC_FAIL(DEVICE, "data: the tensor is on %s; move it to the cpu first", device_text(t->device));
    *data = v.data;
    return 0;
}

/* ---- making ---- */

int lac_tensor_new(const char *op, int dtype, int device, int ndim, const int64_t *shape, lac_tensor *t, lac_view *v)
{
    if (!t) LAC_FAIL(ARGUMENT, "%s: no tensor to fill", op);
    t->storage = NULL;
    if ((uint32_t)dtype >= LAC_DTYPES) LAC_FAIL(DTYPE, "%s: unknown dtype %d", op, dtype);
    if ((uint32_t)ndim > LAC_MAX_DIMS)
        LAC_FAIL(SHAPE, "%s: %d dimensions asked for, at most %d are supported", op, ndim, LAC_MAX_DIMS);
    int64_t sizes[LAC_MAX_DIMS], strides[LAC_MAX_DIMS], bytes = (int64_t)dtypes[dtype].bytes, span = 1;
    bool empty = false;
    for (int i = ndim - 1; i >= 0; i--) {
        sizes[i] = shape[i];
        strides[i] = span;
        if (sizes[i] < 0) LAC_FAIL(SHAPE, "%s: sizes must not be negative, got %s", op, lac_shape_text(shape, ndim));
        empty |= sizes[i] == 0;
        if (__builtin_mul_overflow(span, sizes[i] ? sizes[i] : 1, &span))
            LAC_FAIL(SHAPE, "%s: %s has more elements than 64 bits can count", op, lac_shape_text(shape, ndim));
    }
    if (__builtin_mul_overflow(bytes, empty ? 0 : span, &bytes))
        LAC_FAIL(SHAPE, "%s: %s %s has more bytes than 64 bits can count", op, lac_dtype_name(dtype),
                 lac_shape_text(shape, ndim));
    lac_storage *storage;
    LAC_TRY(lac_storage_new(op, device, dtype, ndim, shape, (size_t)bytes, &storage));
    t->offset = 0;
    t->dtype = dtype;
    t->device = device == LAC_PINNED ? LAC_CPU : device;
    t->ndim = ndim;
    t->reserved = 0;
    for (int i = 0; i < ndim; i++) {
        t->shape[i] = sizes[i];
        t->stride[i] = strides[i];
    }
    t->storage = storage;
    if (v) LAC_TRY(lac_view_get(op, "out", t, v));
    if (v && __builtin_expect(lac_watch_on, 0)) lac_watch_view(op, "out", t, v, true);
    return 0;
}

int lac_empty(lac_tensor *t)
{
    if (!t) LAC_FAIL(ARGUMENT, "empty: no tensor to fill");
    return lac_tensor_new("empty", t->dtype, t->device, t->ndim, t->shape, t, NULL);
}

void lac_tensor_drop(lac_tensor *t)
{
    if (!t) return;
    lac_storage_drop(t->storage);
    t->storage = NULL;
}

/* ---- relations between views ---- */

bool lac_view_contiguous(const lac_view *v)
{
    int64_t expected = 1;
    for (int i = v->ndim - 1; i >= 0; i--) {
        if (v->shape[i] == 0) return true;
        if (v->shape[i] != 1 && v->stride[i] != expected) return false;
        expected *= v->shape[i];
    }
    return true;
}

int lac_broadcast(const char *op, const lac_tensor *a, const lac_tensor *b, int *ndim, int64_t *shape)
{
    int n = a->ndim > b->ndim ? a->ndim : b->ndim;
    for (int i = 0; i < n; i++) {
        int ia = i - (n - a->ndim), ib = i - (n - b->ndim);
        int64_t sa = ia < 0 ? 1 : a->shape[ia], sb = ib < 0 ? 1 : b->shape[ib];
        if (sa != sb && sa != 1 && sb != 1)
            LAC_FAIL(SHAPE, "%s: shapes %s and %s do not broadcast: %lld != %lld in dimension %d", op,
                     lac_shape_text(a->shape, a->ndim), lac_shape_text(b->shape, b->ndim), (long long)sa, (long long)sb,
                     i + 1);
        shape[i] = sa == 1 ? sb : sa;
    }
    *ndim = n;
    return 0;
}

void lac_view_expand(lac_view *v, int ndim, const int64_t *shape)
{
    int added = ndim - v->ndim;
    for (int i = ndim - 1; i >= 0; i--) {
        bool present = i >= added;
        v->stride[i] = present && (v->shape[i - added] == shape[i]) && shape[i] != 1 ? v->stride[i - added] : 0;
        v->shape[i] = shape[i];
    }
    v->ndim = ndim;
}

int lac_same_dtype(const char *op, const char *na, const lac_tensor *a, const char *nb, const lac_tensor *b)
{
    if (a->dtype == b->dtype) return 0;
    LAC_FAIL(DTYPE, "%s: %s is %s but %s is %s", op, na, lac_dtype_name(a->dtype), nb, lac_dtype_name(b->dtype));
}

int lac_same_device(const char *op, const char *na, const lac_tensor *a, const char *nb, const lac_tensor *b)
{
    if (a->device == b->device) return 0;
    LAC_FAIL(DEVICE, "%s: %s is on %s but %s is on %s", op, na, device_text(a->device), nb, device_text(b->device));
}

int lac_same_shape(const char *op, const char *na, const lac_tensor *a, const char *nb, const lac_tensor *b)
{
    bool same = a->ndim == b->ndim;
    for (int i = 0; same && i < a->ndim; i++) same = a->shape[i] == b->shape[i];
    if (same) return 0;
    LAC_FAIL(SHAPE, "%s: %s is %s but %s is %s", op, na, lac_shape_text(a->shape, a->ndim), nb,
             lac_shape_text(b->shape, b->ndim));
}

int lac_need_float(const char *op, const char *name, const lac_tensor *t)
{
    if (lac_dtype_is_float(t->dtype)) return 0;
    LAC_FAIL(DTYPE, "%s: %s must be a floating-point tensor (f64, f32, f16, bf16), got %s", op, name,
             lac_dtype_name(t->dtype));
}

int lac_axis(const char *op, const lac_tensor *t, int dim, int *axis)
{
    int a = dim < 0 ? dim + t->ndim : dim;
    if (a < 0 || a >= t->ndim)
        LAC_FAIL(ARGUMENT, "%s: dimension %lld of a tensor with %d dimensions", op, dim < 0 ? dim : (long long)dim + 1,
                 t->ndim);
    *axis = a;
    return 0;
}

/* lowest and one past the highest byte that v can touch */
static void view_range(const lac_view *v, uintptr_t *low, uintptr_t *high)
{
    int64_t bytes = (int64_t)lac_dtype_size(v->dtype), down = 0, up = 0;
    for (int i = 0; i < v->ndim; i++) {
        int64_t span = (v->shape[i] - 1) * v->stride[i];
        if (span < 0) down += span;
        else up += span;
    }
    *low = (uintptr_t)((char *)v->data + down * bytes);
    *high = (uintptr_t)((char *)v->data + (up + 1) * bytes);
}

bool lac_views_overlap(const lac_view *a, const lac_view *b)
{
    if (lac_view_numel(a) == 0 || lac_view_numel(b) == 0) return false;
    uintptr_t la, ha, lb, hb;
    view_range(a, &la, &ha);
    view_range(b, &lb, &hb);
    return la < hb && lb < ha;
}

/* Sorted by stride, every axis must step past everything that the smaller axes reach. That is sufficient, and exact
 * for every view that slicing, transposing and expanding can make. */
bool lac_view_self_overlaps(const lac_view *v)
{
    int order[LAC_MAX_DIMS], n = 0;
    for (int i = 0; i < v->ndim; i++) {
        if (v->shape[i] == 0) return false;
        if (v->shape[i] > 1) order[n++] = i;
    }
    for (int i = 1; i < n; i++)
        for (int j = i; j > 0 && llabs(v->stride[order[j]]) < llabs(v->stride[order[j - 1]]); j--) {
            int swap = order[j];
            order[j] = order[j - 1];
            order[j - 1] = swap;
        }
    int64_t reach = 0;
    for (int i = 0; i < n; i++) {
        int64_t stride = llabs(v->stride[order[i]]);
        if (stride <= reach) return true;
        reach += stride * (v->shape[order[i]] - 1);
    }
    return false;
}
