/* op_sort.c: front ends of sort, topk, searchsorted, runs (what `unique` is made of) and nonzero.
 *
 * One order serves all of them: numbers ascending, -0 equal to 0, every NaN after +inf and equal to every other NaN;
 * equal elements stay in the order in which they came. That order is total, so results are unique: no back end, no
 * number of threads and no algorithm can give another permutation, and topk is by definition a prefix of sort.
 * Positions come out as i64 counted from 0, because they are index tensors: gather and index_select take them as they
 * are. The outputs whose size depends on data (runs, nonzero) are made between two calls of the back end, or cut after
 * one: the caller never sees unused rows.
 */
#include "op_front.h"

int lac_sort(const lac_tensor *x, int dim, int descending, lac_tensor *values, lac_tensor *index)
{
    lac_a_sort a = {.descending = descending != 0};
    LAC_OUT("sort", "values", values);
    LAC_OUT("sort", "index", index);
    LAC_TRY(lac_view_get("sort", "x", x, &a.x));
    LAC_TRY(lac_axis("sort", x, dim, &a.dim));
    LAC_TRY(lac_tensor_new("sort", x->dtype, x->device, x->ndim, x->shape, values, &a.values));
    LAC_TRY_OUT(lac_tensor_new("sort", LAC_I64, x->device, x->ndim, x->shape, index, &a.index), values);
    LAC_RUN_OUT(sort, x->device, &a, values, index);
    return 0;
}

int lac_topk(const lac_tensor *x, int dim, int64_t k, int largest, lac_tensor *values, lac_tensor *index)
{
    lac_a_sort a = {.descending = largest != 0};
    int64_t shape[LAC_MAX_DIMS];
    LAC_OUT("topk", "values", values);
    LAC_OUT("topk", "index", index);
    LAC_TRY(lac_view_get("topk", "x", x, &a.x));
    LAC_TRY(lac_axis("topk", x, dim, &a.dim));
    if (k < 0 || k > x->shape[a.dim])
        LAC_FAIL(ARGUMENT, "topk: k = %lld, but dimension %d of x %s has %lld elements", (long long)k, a.dim + 1,
                 lac_shape_text(x->shape, x->ndim), (long long)x->shape[a.dim]);
    for (int d = 0; d < x->ndim; d++) shape[d] = d == a.dim ? k : x->shape[d];
    LAC_TRY(lac_tensor_new("topk", x->dtype, x->device, x->ndim, shape, values, &a.values));
    LAC_TRY_OUT(lac_tensor_new("topk", LAC_I64, x->device, x->ndim, shape, index, &a.index), values);
    LAC_RUN_OUT(topk, x->device, &a, values, index);
    return 0;
}

int lac_searchsorted(const lac_tensor *sorted, const lac_tensor *values, int right, lac_tensor *out)
{
    const char *op = "searchsorted";
    lac_a_searchsorted a = {.right = right != 0};
    LAC_OUT(op, "out", out);
    LAC_TRY(lac_view_get(op, "sorted", sorted, &a.sorted));
    LAC_TRY(lac_view_get(op, "values", values, &a.values));
    LAC_TRY(lac_same_device(op, "sorted", sorted, "values", values));
    LAC_TRY(lac_same_dtype(op, "sorted", sorted, "values", values));
    bool fits = sorted->ndim >= 1 && (sorted->ndim == 1 || sorted->ndim == values->ndim);
    for (int d = 0; fits && d < sorted->ndim - 1; d++) fits = sorted->shape[d] == values->shape[d];
    if (!fits)
        LAC_FAIL(SHAPE,
                 "%s: sorted must be [n], or agree with values in all dimensions but the last: sorted %s, values %s",
                 op, lac_shape_text(sorted->shape, sorted->ndim), lac_shape_text(values->shape, values->ndim));
    int64_t n = sorted->shape[sorted->ndim - 1];
    if (n > INT64_C(1) << 48) LAC_FAIL(SHAPE, "%s: %lld sorted elements are more than 2^48", op, (long long)n);
    LAC_TRY(lac_tensor_new(op, LAC_I64, values->device, values->ndim, values->shape, out, &a.out));
    LAC_RUN_OUT(searchsorted, values->device, &a, out);
    return 0;
}

int lac_runs(const lac_tensor *sorted, const lac_tensor *order, lac_tensor *inverse, lac_tensor *starts)
{
    int64_t count = 0;
    lac_a_runs a = {.count = &count};
    LAC_OUT("runs", "inverse", inverse);
    LAC_OUT("runs", "starts", starts);
    LAC_TRY(lac_view_get("runs", "sorted", sorted, &a.sorted));
    LAC_TRY(lac_view_get("runs", "order", order, &a.order));
    LAC_TRY(lac_front_integer_index("runs", "order", order));
    LAC_TRY(lac_same_device("runs", "sorted", sorted, "order", order));
    LAC_TRY(lac_same_shape("runs", "sorted", sorted, "order", order));
    if (sorted->ndim != 1)
        LAC_FAIL(SHAPE, "runs: sorted must have one dimension, got %s", lac_shape_text(sorted->shape, sorted->ndim));
    LAC_TRY(lac_tensor_new("runs", LAC_I64, sorted->device, 1, sorted->shape, inverse, &a.inverse));
    LAC_TRY_OUT(lac_tensor_new("runs", LAC_I64, sorted->device, 1, sorted->shape, starts, &a.starts), inverse);
    LAC_RUN_OUT(runs, sorted->device, &a, inverse, starts);
    starts->shape[0] = count;
    return 0;
}

int lac_nonzero(const lac_tensor *x, lac_tensor *out)
{
    int64_t count = 0, total;
    lac_a_nonzero a = {.count = &count};
    LAC_OUT("nonzero", "out", out);
    LAC_TRY(lac_view_get("nonzero", "x", x, &a.x));
    LAC_TRY(lac_front_count("nonzero", "x", x, &total));
    a.out.data = NULL;
    LAC_RUN(nonzero, x->device, &a);
    int64_t shape[2] = {count, x->ndim};
    LAC_TRY(lac_tensor_new("nonzero", LAC_I64, x->device, 2, shape, out, &a.out));
    LAC_RUN_OUT(nonzero, x->device, &a, out);
    return 0;
}
