/* op_matmul.c: front end of the matrix product.
 *
 * Shapes: a [..., M, K], b [..., K, N], bias [N]; batch axes broadcast as in NumPy. One-dimensional arguments are
 * refused: whether a vector is a row or a column is the caller's knowledge, and `view` says it in one word. Floats
 * only: an exact integer product needs no BLAS and no model needs it. K = 0 is a sum of nothing: zeros, or the bias.
 * An output that is given as the bias, too, is added to, so that several products make one sum without a pass over
 * memory for each. The back end gets batch axes already expanded, with stride 0 where one matrix serves several items.
 */
#include "op_front.h"
#include <string.h>

/* the batch part of a matrix tensor, as a tensor, for lac_broadcast */
static lac_tensor batch_of(const lac_tensor *t)
{
    lac_tensor b = *t;
    b.ndim = t->ndim - 2;
    return b;
}

/* expands the batch axes of v to `shape`, keeping its last two axes */
static void expand_batch(lac_view *v, int ndim, const int64_t *shape)
{
    int64_t full[LAC_MAX_DIMS];
    memcpy(full, shape, sizeof(int64_t) * (size_t)ndim);
    int64_t rows = v->shape[v->ndim - 2], cols = v->shape[v->ndim - 1];
    int64_t rs = v->stride[v->ndim - 2], cs = v->stride[v->ndim - 1];
    full[ndim] = rows;
    full[ndim + 1] = cols;
    lac_view_expand(v, ndim + 2, full);
    v->stride[ndim] = rs;
    v->stride[ndim + 1] = cs;
}

/* the operands, expanded, and the shape of their product */
static int operands_get(const lac_tensor *a, const lac_tensor *b, lac_a_matmul *args, int *ndim, int64_t *shape)
{
    LAC_TRY(lac_view_get("matmul", "a", a, &args->a));
    LAC_TRY(lac_view_get("matmul", "b", b, &args->b));
    LAC_TRY(lac_need_float("matmul", "a", a));
    LAC_TRY(lac_same_dtype("matmul", "a", a, "b", b));
    LAC_TRY(lac_same_device("matmul", "a", a, "b", b));
    if (a->ndim < 2 || b->ndim < 2)
        LAC_FAIL(SHAPE, "matmul: a %s and b %s must both have at least 2 dimensions; use view to say row or column",
                 lac_shape_text(a->shape, a->ndim), lac_shape_text(b->shape, b->ndim));
    int64_t m = a->shape[a->ndim - 2], k = a->shape[a->ndim - 1], n = b->shape[b->ndim - 1];
    if (b->shape[b->ndim - 2] != k)
        LAC_FAIL(SHAPE, "matmul: a is %s and b is %s: the inner sizes differ, %lld != %lld",
                 lac_shape_text(a->shape, a->ndim), lac_shape_text(b->shape, b->ndim), (long long)k,
                 (long long)b->shape[b->ndim - 2]);
    lac_tensor ba = batch_of(a), bb = batch_of(b);
    LAC_TRY(lac_broadcast("matmul (batch dimensions)", &ba, &bb, ndim, shape));
    expand_batch(&args->a, *ndim, shape);
    expand_batch(&args->b, *ndim, shape);
    shape[(*ndim)++] = m;
    shape[(*ndim)++] = n;
    return 0;
}

/* out += a b, rounded once */
static int product_add(const lac_tensor *a, const lac_tensor *b, const lac_tensor *out)
{
    lac_a_matmul args;
    int ndim;
    int64_t shape[LAC_MAX_DIMS];
    LAC_TRY(operands_get(a, b, &args, &ndim, shape));
    LAC_TRY(lac_view_get("matmul", "out", out, &args.out));
    LAC_TRY(lac_same_dtype("matmul", "a", a, "out", out));
    LAC_TRY(lac_same_device("matmul", "a", a, "out", out));
    bool same = out->ndim == ndim && lac_view_contiguous(&args.out);
    for (int d = 0; same && d < ndim; d++) same = out->shape[d] == shape[d];
    if (!same)
        LAC_FAIL(SHAPE, "matmul: out must be contiguous and %s to be added to, got %s", lac_shape_text(shape, ndim),
                 lac_shape_text(out->shape, out->ndim));
    args.bias = args.out;
    int status;
    LAC_SLOT(status, matmul, a->device, &args);
    return status;
}

int lac_matmul(const lac_tensor *a, const lac_tensor *b, const lac_tensor *bias, lac_tensor *out)
{
    lac_a_matmul args = {0};
    int ndim;
    int64_t shape[LAC_MAX_DIMS];
    if (out && bias == out) return product_add(a, b, out);
    LAC_OUT("matmul", "out", out);
    LAC_TRY(operands_get(a, b, &args, &ndim, shape));
    if (bias) {
        int64_t n = shape[ndim - 1];
        LAC_TRY(lac_view_get("matmul", "bias", bias, &args.bias));
        LAC_TRY(lac_same_dtype("matmul", "a", a, "bias", bias));
        LAC_TRY(lac_same_device("matmul", "a", a, "bias", bias));
        if (bias->ndim != 1 || bias->shape[0] != n)
            LAC_FAIL(SHAPE, "matmul: bias must be [%lld] for b %s, got %s", (long long)n,
                     lac_shape_text(b->shape, b->ndim), lac_shape_text(bias->shape, bias->ndim));
    }
    LAC_TRY(lac_tensor_new("matmul", a->dtype, a->device, ndim, shape, out, &args.out));
    LAC_RUN_OUT(matmul, a->device, &args, out);
    return 0;
}
