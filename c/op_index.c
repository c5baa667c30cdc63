/* op_index.c: front ends of index_select, gather, scatter and index_put.
 *
 * index_select replaces one axis by the axes of the index tensor (an embedding is dim 0 of the table); gather picks
 * one element per index along an axis, all other coordinates kept (torch.gather's rule, but the other sizes must be
 * equal: a smaller index would silently drop data). Indices are i64 or i32, counted from 0, and negative ones are not
 * wrapped: a -1 that marks padding must not read the last row. Whether they lie inside the axis is checked by the back
 * end, which can read them, before it writes. scatter and index_put are their inverses and write in place: a functional
 * form is a copy and one call, and an optimiser or a table of embeddings wants no copy.
 */
#include "op_front.h"

/* x, the axis and its index */
static int indexed_get(const char *op, const lac_tensor *x, int dim, const lac_tensor *idx, lac_a_index *a)
{
    LAC_TRY(lac_view_get(op, "x", x, &a->x));
    LAC_TRY(lac_view_get(op, "index", idx, &a->index));
    LAC_TRY(lac_front_integer_index(op, "index", idx));
    LAC_TRY(lac_same_device(op, "x", x, "index", idx));
    LAC_TRY(lac_axis(op, x, dim, &a->dim));
    return 0;
}

int lac_index_select(const lac_tensor *x, int dim, const lac_tensor *idx, lac_tensor *out)
{
    const char *op = "index_select";
    lac_a_index a;
    int64_t shape[2 * LAC_MAX_DIMS];
    int n = 0;
    LAC_OUT(op, "out", out);
    LAC_TRY(indexed_get(op, x, dim, idx, &a));
    for (int d = 0; d < a.dim; d++) shape[n++] = x->shape[d];
    for (int d = 0; d < idx->ndim; d++) shape[n++] = idx->shape[d];
    for (int d = a.dim + 1; d < x->ndim; d++) shape[n++] = x->shape[d];
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, n, shape, out, &a.out));
    LAC_RUN_OUT(index_select, x->device, &a, out);
    return 0;
}

/* what both gradients need: g a float, idx integers, size of the axis */
static int gradient_get(const char *op, const lac_tensor *g, const lac_tensor *idx, int64_t size, lac_a_index_bwd *a)
{
    LAC_TRY(lac_view_get(op, "g", g, &a->g));
    LAC_TRY(lac_view_get(op, "index", idx, &a->index));
    LAC_TRY(lac_need_float(op, "g", g));
    LAC_TRY(lac_front_integer_index(op, "index", idx));
    LAC_TRY(lac_same_device(op, "g", g, "index", idx));
    if (size < 0) LAC_FAIL(ARGUMENT, "%s: the axis size must not be negative, got %lld", op, (long long)size);
    return 0;
}

int lac_index_select_bwd(const lac_tensor *g, int dim, const lac_tensor *idx, int64_t size, lac_tensor *out)
{
    const char *op = "index_select_bwd";
    lac_a_index_bwd a;
    int64_t shape[LAC_MAX_DIMS + 1];
    int n = 0;
    LAC_OUT(op, "out", out);
    LAC_TRY(gradient_get(op, g, idx, size, &a));
    int rank = g->ndim - idx->ndim + 1; /* of the indexed tensor */
    a.dim = dim < 0 ? dim + rank : dim;
    bool fits = rank >= 1 && a.dim >= 0 && a.dim < rank;
    for (int d = 0; fits && d < idx->ndim; d++) fits = g->shape[a.dim + d] == idx->shape[d];
    if (!fits)
        LAC_FAIL(SHAPE, "%s: g %s does not have the axes of index %s at dimension %d", op,
                 lac_shape_text(g->shape, g->ndim), lac_shape_text(idx->shape, idx->ndim),
                 dim < 0 || dim == INT32_MAX ? dim : dim + 1);
    for (int d = 0; d < a.dim; d++) shape[n++] = g->shape[d];
    shape[n++] = size;
    for (int d = a.dim + idx->ndim; d < g->ndim; d++) shape[n++] = g->shape[d];
    LAC_TRY(lac_tensor_new(op, g->dtype, g->device, n, shape, out, &a.out));
    LAC_RUN_OUT(index_select_bwd, g->device, &a, out);
    return 0;
}

/* the same sizes everywhere but along the axis */
static int same_but(const char *op, const char *name, const lac_tensor *t, const lac_tensor *idx, int axis)
{
    bool same = t->ndim == idx->ndim;
    for (int d = 0; same && d < t->ndim; d++) same = d == axis || t->shape[d] == idx->shape[d];
    if (same) return 0;
    LAC_FAIL(SHAPE, "%s: %s %s and index %s must have the same sizes except in dimension %d", op, name,
             lac_shape_text(t->shape, t->ndim), lac_shape_text(idx->shape, idx->ndim), axis + 1);
}

int lac_gather(const lac_tensor *x, int dim, const lac_tensor *idx, lac_tensor *out)
{
    const char *op = "gather";
    lac_a_index a;
    LAC_OUT(op, "out", out);
    LAC_TRY(indexed_get(op, x, dim, idx, &a));
    LAC_TRY(same_but(op, "x", x, idx, a.dim));
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, idx->ndim, idx->shape, out, &a.out));
    LAC_RUN_OUT(gather, x->device, &a, out);
    return 0;
}

int lac_gather_bwd(const lac_tensor *g, int dim, const lac_tensor *idx, int64_t size, lac_tensor *out)
{
    const char *op = "gather_bwd";
    lac_a_index_bwd a;
    int64_t shape[LAC_MAX_DIMS];
    LAC_OUT(op, "out", out);
    LAC_TRY(gradient_get(op, g, idx, size, &a));
    LAC_TRY(lac_axis(op, g, dim, &a.dim));
    LAC_TRY(lac_same_shape(op, "g", g, "index", idx));
    for (int d = 0; d < g->ndim; d++) shape[d] = d == a.dim ? size : g->shape[d];
    LAC_TRY(lac_tensor_new(op, g->dtype, g->device, g->ndim, shape, out, &a.out));
    LAC_RUN_OUT(gather_bwd, g->device, &a, out);
    return 0;
}

/* a source that is expanded to a shape, of dst's dtype and device, apart from dst in memory */
static int source_get(const char *op, const lac_tensor *src, const lac_tensor *dst, const lac_view *dv, int ndim,
                      const int64_t *shape, lac_view *v)
{
    lac_tensor target = *dst;
    target.ndim = ndim;
    for (int d = 0; d < ndim; d++) target.shape[d] = shape[d];
    LAC_TRY(lac_view_get(op, "src", src, v));
    LAC_TRY(lac_same_dtype(op, "dst", dst, "src", src));
    LAC_TRY(lac_same_device(op, "dst", dst, "src", src));
    LAC_TRY(lac_front_expand_to(op, "src", src, v, "the indexed part", &target));
    if (!lac_views_overlap(v, dv)) return 0;
    LAC_FAIL(ARGUMENT, "%s: src shares memory with the tensor that is written; clone it first", op);
}

static int destination_get(const char *op, lac_tensor *dst, const lac_tensor *idx, int dim, lac_view *dv, lac_view *iv,
                           int *axis)
{
    LAC_TRY(lac_view_get(op, "dst", dst, dv));
    LAC_TRY(lac_view_get(op, "index", idx, iv));
    LAC_TRY(lac_front_integer_index(op, "index", idx));
    LAC_TRY(lac_same_device(op, "dst", dst, "index", idx));
    LAC_TRY(lac_front_writable(op, "dst", dst, dv));
    LAC_TRY(lac_axis(op, dst, dim, axis));
    if (!lac_views_overlap(iv, dv)) return 0;
    LAC_FAIL(ARGUMENT, "%s: the index shares memory with the tensor that is written; clone it first", op);
}

int lac_scatter(lac_tensor *dst, int dim, const lac_tensor *idx, const lac_tensor *src, int mode, int include_self)
{
    const char *op = "scatter";
    lac_a_scatter a = {.mode = mode, .self = include_self != 0};
    int64_t count;
    if (mode < 0 || mode >= LAC_SCATTERS)
        LAC_FAIL(ARGUMENT, "%s: unknown mode %d (0 set, 1 add, 2 mean, 3 max, 4 min)", op, mode);
    LAC_TRY(destination_get(op, dst, idx, dim, &a.dst, &a.index, &a.dim));
    LAC_TRY(same_but(op, "dst", dst, idx, a.dim));
    LAC_TRY(lac_front_count(op, "index", idx, &count));
    LAC_TRY(source_get(op, src, dst, &a.dst, idx->ndim, idx->shape, &a.src));
    if (mode == LAC_SCATTER_MEAN) LAC_TRY(lac_need_float(op, "dst", dst));
    if (mode != LAC_SCATTER_SET && dst->dtype == LAC_BOOL)
        LAC_FAIL(DTYPE, "%s: bool can only be set, not combined; cast it to a number first", op);
    LAC_RUN(scatter, dst->device, &a);
    return 0;
}

int lac_index_put(lac_tensor *dst, int dim, const lac_tensor *idx, const lac_tensor *src, int add, double alpha)
{
    const char *op = "index_put";
    lac_a_index_put a = {.mode = add ? LAC_SCATTER_ADD : LAC_SCATTER_SET, .alpha = alpha};
    int64_t shape[LAC_MAX_DIMS];
    LAC_TRY(destination_get(op, dst, idx, dim, &a.dst, &a.index, &a.dim));
    if (idx->ndim != 1)
        LAC_FAIL(SHAPE, "%s: the index must have one dimension, got %s", op, lac_shape_text(idx->shape, idx->ndim));
    for (int d = 0; d < dst->ndim; d++) shape[d] = d == a.dim ? idx->shape[0] : dst->shape[d];
    LAC_TRY(source_get(op, src, dst, &a.dst, dst->ndim, shape, &a.src));
    if (add && dst->dtype == LAC_BOOL) LAC_FAIL(DTYPE, "%s: bool cannot be added to; cast it to a number first", op);
    if (add) LAC_TRY(lac_front_scalar(op, "alpha", dst, alpha));
    LAC_RUN(index_put, dst->device, &a);
    return 0;
}
