/* op_scan.c: front ends of running sums, products, extremes and log-sum-exps along one axis.
 *
 * A scan keeps x's shape: element i of a line is the reduction of elements 0 .. i, or with `reverse` of i .. n - 1,
 * which is what the gradient of a running sum needs. Dtypes are those of the reductions: sums and products of integers
 * and bool are i64, extremes keep any dtype and come with the position of the element that they show (an index tensor,
 * i64 from 0: the latest of equals, and NaN wins, both as in PyTorch), log-sum-exps take floats.
 *
 * Two gradients are kernels of their own, because composing them would be wrong or unstable: that of a product must not
 * divide by x (which may be 0), that of a log-sum-exp must not take exp(x) by itself. A running sum's is a reverse
 * scan, an extreme's an addition at the positions (lac_gather_bwd). They are those of forward scans.
 */
#include "op_front.h"

static const char *const names[LAC_SCANS] = {"cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"};

const char *lac_scan_name(int fn) { return fn >= 0 && fn < LAC_SCANS ? names[fn] : NULL; }

int lac_scan(int fn, const lac_tensor *x, int dim, int reverse, lac_tensor *out, lac_tensor *index)
{
    lac_a_scan a = {.fn = fn, .reverse = reverse != 0};
    LAC_OUT("scan", "out", out);
    if (index) index->storage = NULL;
    const char *op = lac_scan_name(fn);
    if (!op) LAC_FAIL(ARGUMENT, "scan: function id %d is outside 0..%d", fn, LAC_SCANS - 1);
    bool extreme = fn == LAC_CUMMAX || fn == LAC_CUMMIN;
    if (extreme != (index != NULL))
        LAC_FAIL(ARGUMENT, "%s: %s", op, extreme ? "no tensor to fill for index" : "there is no index to fill");
    LAC_TRY(lac_view_get(op, "x", x, &a.x));
    if (fn == LAC_LOGCUMSUMEXP) LAC_TRY(lac_need_float(op, "x", x));
    LAC_TRY(lac_axis(op, x, dim, &a.dim));
    int dtype = extreme || lac_dtype_is_float(x->dtype) ? x->dtype : LAC_I64;
    LAC_TRY(lac_tensor_new(op, dtype, x->device, x->ndim, x->shape, out, &a.out));
    if (index) LAC_TRY_OUT(lac_tensor_new(op, LAC_I64, x->device, x->ndim, x->shape, index, &a.index), out);
    LAC_RUN_OUT(scan, x->device, &a, out, index);
    return 0;
}

int lac_scan_bwd(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, int dim, lac_tensor *dx)
{
    lac_a_scan_bwd a = {.fn = fn};
    LAC_OUT("scan_bwd", "dx", dx);
    if (fn != LAC_CUMPROD && fn != LAC_LOGCUMSUMEXP)
        LAC_FAIL(ARGUMENT, "scan_bwd: function id %d has no kernel of its own, only %d and %d", fn, LAC_CUMPROD,
                 LAC_LOGCUMSUMEXP);
    const char *op = fn == LAC_CUMPROD ? "cumprod_bwd" : "logcumsumexp_bwd";
    LAC_TRY(lac_view_get(op, "x", x, &a.x));
    LAC_TRY(lac_view_get(op, "y", y, &a.y));
    LAC_TRY(lac_view_get(op, "g", g, &a.g));
    LAC_TRY(lac_need_float(op, "x", x));
    const struct {
        const char *name;
        const lac_tensor *t;
    } others[] = {{"y", y}, {"g", g}};
    for (int i = 0; i < 2; i++) {
        LAC_TRY(lac_same_dtype(op, "x", x, others[i].name, others[i].t));
        LAC_TRY(lac_same_device(op, "x", x, others[i].name, others[i].t));
        LAC_TRY(lac_same_shape(op, "x", x, others[i].name, others[i].t));
    }
    LAC_TRY(lac_axis(op, x, dim, &a.dim));
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, dx, &a.dx));
    LAC_RUN_OUT(scan_bwd, x->device, &a, dx);
    return 0;
}
