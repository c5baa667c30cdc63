/* op_reduce.c: front ends of the reductions.
 *
 * `dims` is a bit mask of axes, 0 for all of them: one pass over memory whatever the axes, and nothing to sort or to
 * check for repetition. Results: sum and mean of floats keep the dtype (accumulated in double), sums of integers and
 * bool are i64, mean wants floats, max and min keep any dtype, any and all give bool, argmax and argmin give i64
 * positions along one axis or in the flattened tensor; a product is as a sum, a count of nonzero elements i64. A sum of
 * nothing is 0, its product 1, its mean NaN, any false, all true, its log-sum-exp -inf; an
 * extremum of nothing does not exist and is an error. lac_sum_to undoes broadcasting: it sums the axes that `like` does
 * not have or has with size 1.
 */
#include "op_front.h"

static const char *const names[LAC_REDUCTIONS] = {"sum",       "mean",   "max",    "min",  "any",
                                                  "all",       "argmax", "argmin", "prod", "count_nonzero",
                                                  "logsumexp", "var",    "norm",   "norm", "norm"};

const char *lac_reduce_name(int fn) { return fn >= 0 && fn < LAC_REDUCTIONS ? names[fn] : NULL; }

static int result_dtype(int fn, int dtype)
{
    if (fn == LAC_ANY || fn == LAC_ALL) return LAC_BOOL;
    if (fn == LAC_ARGMAX || fn == LAC_ARGMIN || fn == LAC_NONZERO) return LAC_I64;
    return (fn == LAC_SUM || fn == LAC_PROD) && !lac_dtype_is_float(dtype) ? LAC_I64 : dtype;
}

/* out's view with the reduced axes put back as size 1 */
static void restore_axes(lac_view *out, const lac_tensor *x, uint32_t dims)
{
    int64_t span = 1;
    out->ndim = x->ndim;
    for (int d = x->ndim - 1; d >= 0; d--) {
        out->shape[d] = dims >> d & 1 ? 1 : x->shape[d];
        out->stride[d] = span;
        span *= out->shape[d];
    }
}

static int reduce(int fn, const lac_tensor *x, uint32_t dims, int keepdim, double correction, lac_tensor *out)
{
    lac_a_reduce a = {.fn = fn, .correction = correction};
    int64_t shape[LAC_MAX_DIMS], count, total;
    int ndim = 0, axes = 0;
    LAC_OUT("reduce", "out", out);
    if (fn < 0 || fn >= LAC_REDUCTIONS)
        LAC_FAIL(ARGUMENT, "reduce: function id %d is outside 0..%d", fn, LAC_REDUCTIONS - 1);
    const char *op = names[fn];
    LAC_TRY(lac_view_get(op, "x", x, &a.x));
    LAC_TRY(lac_front_count(op, "x", x, &total));
    if (fn == LAC_MEAN || fn >= LAC_LOGSUMEXP) LAC_TRY(lac_need_float(op, "x", x));
    if (x->ndim < 32 && dims >> x->ndim)
        LAC_FAIL(ARGUMENT, "%s: the axes 0x%x reach past the %d dimensions of %s", op, dims, x->ndim, lac_describe(x));
    a.dims = dims ? dims : (1u << x->ndim) - 1;
    count = 1;
    for (int d = 0; d < x->ndim; d++) {
        if (a.dims >> d & 1) {
            axes++;
            count *= x->shape[d]; /* cannot overflow unless total did, or total is 0 */
            if (keepdim) shape[ndim++] = 1;
            if (x->shape[d] == 0) count = 0;
        } else {
            shape[ndim++] = x->shape[d];
        }
    }
    if ((fn == LAC_ARGMAX || fn == LAC_ARGMIN) && axes != 1 && axes != x->ndim)
        LAC_FAIL(ARGUMENT, "%s: takes one dimension or all of them, got %d of %d", op, axes, x->ndim);
    LAC_TRY(lac_tensor_new(op, result_dtype(fn, x->dtype), x->device, ndim, shape, out, &a.out));
    bool extreme = fn == LAC_MAX || fn == LAC_MIN || fn == LAC_ARGMAX || fn == LAC_ARGMIN;
    if (extreme && total == 0 && lac_numel(out) > 0) {
        lac_tensor_drop(out);
        LAC_FAIL(SHAPE, "%s: x %s has no elements along the reduced dimensions, so there is no %s", op,
                 lac_shape_text(x->shape, x->ndim), op);
    }
    restore_axes(&a.out, x, a.dims);
    LAC_RUN_OUT(reduce, x->device, &a, out);
    return 0;
}

int lac_reduce(int fn, const lac_tensor *x, uint32_t dims, int keepdim, lac_tensor *out)
{
    return reduce(fn, x, dims, keepdim, 1, out);
}

int lac_var(const lac_tensor *x, uint32_t dims, int keepdim, double correction, lac_tensor *out)
{
    LAC_OUT("var", "out", out);
    if (!isfinite(correction)) LAC_FAIL(ARGUMENT, "var: correction must be finite, got %g", correction);
    return reduce(LAC_VAR, x, dims, keepdim, correction, out);
}

int lac_sum_to(const lac_tensor *x, const lac_tensor *like, lac_tensor *out)
{
    lac_a_reduce a = {.fn = LAC_SUM};
    lac_view v;
    int64_t total;
    LAC_OUT("sum_to", "out", out);
    LAC_TRY(lac_view_get("sum_to", "x", x, &a.x));
    LAC_TRY(lac_view_get("sum_to", "like", like, &v));
    LAC_TRY(lac_front_count("sum_to", "x", x, &total));
    LAC_TRY(lac_need_float("sum_to", "x", x));
    LAC_TRY(lac_front_expand_to("sum_to", "like", like, &v, "x", x));
    int added = x->ndim - like->ndim;
    for (int d = 0; d < x->ndim; d++)
        if (d < added || (like->shape[d - added] == 1 && x->shape[d] != 1)) a.dims |= 1u << d;
    LAC_TRY(lac_tensor_new("sum_to", x->dtype, x->device, like->ndim, like->shape, out, &a.out));
    if (a.dims == 0) {
        lac_a_copy copy = {.x = a.x, .out = a.out};
        LAC_RUN_OUT(copy, x->device, &copy, out);
        return 0;
    }
    restore_axes(&a.out, x, a.dims);
    LAC_RUN_OUT(reduce, x->device, &a, out);
    return 0;
}
