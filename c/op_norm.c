/* op_norm.c: front ends of softmax, layer normalisation and root-mean-square normalisation.
 *
 * Softmax runs over any one axis, as the softmax or its logarithm; the backward needs only the result, so the input can
 * go. Layer normalisation (Ba, Kiros and Hinton 2016) runs over the last axis with optional gamma and beta; it saves
 * mean and rstd, [rows] in f32 (f64 for f64), because recomputing them costs two passes and they are small.
 * eps must be positive: with 0 a constant row divides by zero, and a script that wants NaN there can write it out.
 * dgamma and dbeta are asked for by passing a place for them; dgamma without gamma is refused, as there is nothing it
 * would be the gradient of (dbeta does not need beta's value, so it is always possible).
 */
#include "op_front.h"

int lac_softmax(const lac_tensor *x, int dim, int logarithm, lac_tensor *out)
{
    const char *op = logarithm ? "log_softmax" : "softmax";
    lac_a_softmax a = {.logarithm = logarithm != 0};
    LAC_OUT(op, "out", out);
    LAC_TRY(lac_view_get(op, "x", x, &a.x));
    LAC_TRY(lac_need_float(op, "x", x));
    LAC_TRY(lac_axis(op, x, dim, &a.dim));
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, out, &a.out));
    LAC_RUN_OUT(softmax, x->device, &a, out);
    return 0;
}

int lac_softmax_bwd(const lac_tensor *y, const lac_tensor *g, int dim, int logarithm, lac_tensor *out)
{
    const char *op = logarithm ? "log_softmax_bwd" : "softmax_bwd";
    lac_a_softmax_bwd a = {.logarithm = logarithm != 0};
    LAC_OUT(op, "out", out);
    LAC_TRY(lac_view_get(op, "y", y, &a.y));
    LAC_TRY(lac_view_get(op, "g", g, &a.g));
    LAC_TRY(lac_need_float(op, "y", y));
    LAC_TRY(lac_same_dtype(op, "y", y, "g", g));
    LAC_TRY(lac_same_device(op, "y", y, "g", g));
    LAC_TRY(lac_same_shape(op, "y", y, "g", g));
    LAC_TRY(lac_axis(op, y, dim, &a.dim));
    LAC_TRY(lac_tensor_new(op, y->dtype, y->device, y->ndim, y->shape, out, &a.out));
    LAC_RUN_OUT(softmax_bwd, y->device, &a, out);
    return 0;
}

/* an optional vector [E] of x's dtype */
static int vector_get(const char *op, const char *name, const lac_tensor *t, const lac_tensor *x, lac_view *v)
{
    v->data = NULL;
    if (!t) return 0;
    LAC_TRY(lac_view_get(op, name, t, v));
    LAC_TRY(lac_same_dtype(op, "x", x, name, t));
    LAC_TRY(lac_same_device(op, "x", x, name, t));
    if (t->ndim == 1 && t->shape[0] == x->shape[x->ndim - 1]) return 0;
    LAC_FAIL(SHAPE, "%s: %s must be [%lld], the last size of x %s, got %s", op, name, (long long)x->shape[x->ndim - 1],
             lac_shape_text(x->shape, x->ndim), lac_shape_text(t->shape, t->ndim));
}

/* x [..., E], a float of at least one dimension; *rows is the product of the others */
static int rows_get(const char *op, const lac_tensor *x, lac_view *v, int64_t *rows)
{
    int64_t total;
    LAC_TRY(lac_view_get(op, "x", x, v));
    LAC_TRY(lac_need_float(op, "x", x));
    if (x->ndim < 1 || x->shape[x->ndim - 1] < 1)
        LAC_FAIL(SHAPE, "%s: x must have a last dimension of at least one element, got %s", op,
                 lac_shape_text(x->shape, x->ndim));
    LAC_TRY(lac_front_count(op, "x", x, &total));
    lac_tensor outer = *x;
    outer.ndim--;
    return lac_front_count(op, "x", &outer, rows);
}

int lac_layernorm(const lac_tensor *x, const lac_tensor *gamma, const lac_tensor *beta, double eps, lac_tensor *out,
                  lac_tensor *mean, lac_tensor *rstd)
{
    lac_a_layernorm a = {.eps = eps};
    int64_t rows;
    LAC_OUT("layernorm", "out", out);
    LAC_OUT("layernorm", "mean", mean);
    LAC_OUT("layernorm", "rstd", rstd);
    LAC_TRY(rows_get("layernorm", x, &a.x, &rows));
    LAC_TRY(vector_get("layernorm", "gamma", gamma, x, &a.gamma));
    LAC_TRY(vector_get("layernorm", "beta", beta, x, &a.beta));
    if (!(eps > 0 && isfinite(eps))) LAC_FAIL(ARGUMENT, "layernorm: eps must be positive and finite, got %g", eps);
    int stat = lac_front_stat_dtype(x->dtype);
    LAC_TRY(lac_tensor_new("layernorm", x->dtype, x->device, x->ndim, x->shape, out, &a.out));
    LAC_TRY_OUT(lac_tensor_new("layernorm", stat, x->device, 1, &rows, mean, &a.mean), out);
    LAC_TRY_OUT(lac_tensor_new("layernorm", stat, x->device, 1, &rows, rstd, &a.rstd), out, mean);
    LAC_RUN_OUT(layernorm, x->device, &a, out, mean, rstd);
    return 0;
}

/* saved statistics [rows] */
static int stat_get(const char *op, const char *name, const lac_tensor *t, const lac_tensor *x, int64_t rows,
                    lac_view *v)
{
    LAC_TRY(lac_view_get(op, name, t, v));
    LAC_TRY(lac_same_device(op, "x", x, name, t));
    int stat = lac_front_stat_dtype(x->dtype);
    if (t->dtype == stat && t->ndim == 1 && t->shape[0] == rows) return 0;
    LAC_FAIL(SHAPE, "%s: %s must be %s [%lld] for x %s, got %s", op, name, lac_dtype_name(stat), (long long)rows,
             lac_describe(x), lac_describe(t));
}

int lac_layernorm_bwd(const lac_tensor *x, const lac_tensor *gamma, const lac_tensor *mean, const lac_tensor *rstd,
                      const lac_tensor *g, lac_tensor *dx, lac_tensor *dgamma, lac_tensor *dbeta)
{
    const char *op = "layernorm_bwd";
    lac_a_layernorm_bwd a;
    int64_t rows;
    LAC_OUT(op, "dx", dx);
    if (dgamma) dgamma->storage = NULL;
    if (dbeta) dbeta->storage = NULL;
    LAC_TRY(rows_get(op, x, &a.x, &rows));
    LAC_TRY(vector_get(op, "gamma", gamma, x, &a.gamma));
    LAC_TRY(stat_get(op, "mean", mean, x, rows, &a.mean));
    LAC_TRY(stat_get(op, "rstd", rstd, x, rows, &a.rstd));
    LAC_TRY(lac_view_get(op, "g", g, &a.g));
    LAC_TRY(lac_same_dtype(op, "x", x, "g", g));
    LAC_TRY(lac_same_device(op, "x", x, "g", g));
    LAC_TRY(lac_same_shape(op, "x", x, "g", g));
    if (dgamma && !gamma) LAC_FAIL(ARGUMENT, "layernorm_bwd: dgamma was asked for, but there is no gamma");
    const int64_t *width = &x->shape[x->ndim - 1];
    a.dgamma.data = a.dbeta.data = NULL;
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, dx, &a.dx));
    if (dgamma) LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, 1, width, dgamma, &a.dgamma), dx);
    if (dbeta) LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, 1, width, dbeta, &a.dbeta), dx, dgamma);
    LAC_RUN_OUT(layernorm_bwd, x->device, &a, dx, dgamma, dbeta);
    return 0;
}

/* t has x's shape, dtype and device */
static int like_get(const char *op, const char *x_name, const lac_tensor *x, const char *name, const lac_tensor *t,
                    lac_view *v)
{
    LAC_TRY(lac_view_get(op, name, t, v));
    LAC_TRY(lac_same_dtype(op, x_name, x, name, t));
    LAC_TRY(lac_same_device(op, x_name, x, name, t));
    return lac_same_shape(op, x_name, x, name, t);
}

static int probability_check(const char *op, double p)
{
    if (!(p >= 0 && p < 1)) LAC_FAIL(ARGUMENT, "%s: the probability must be in [0, 1), got %g", op, p);
    return 0;
}

int lac_residual_norm(const lac_tensor *x, const lac_tensor *h, const lac_tensor *gamma, const lac_tensor *beta,
                      double eps, double p, uint64_t seed, uint64_t offset, lac_tensor *sum, lac_tensor *out,
                      lac_tensor *mean, lac_tensor *rstd)
{
    const char *op = "residual_norm";
    lac_a_residual_norm a = {.eps = eps, .p = p, .seed = seed, .offset = offset};
    int64_t rows;
    LAC_OUT(op, "sum", sum);
    LAC_OUT(op, "out", out);
    LAC_OUT(op, "mean", mean);
    LAC_OUT(op, "rstd", rstd);
    LAC_TRY(rows_get(op, x, &a.x, &rows));
    LAC_TRY(like_get(op, "x", x, "h", h, &a.h));
    LAC_TRY(vector_get(op, "gamma", gamma, x, &a.gamma));
    LAC_TRY(vector_get(op, "beta", beta, x, &a.beta));
    LAC_TRY(probability_check(op, p));
    if (!(eps > 0 && isfinite(eps))) LAC_FAIL(ARGUMENT, "%s: eps must be positive and finite, got %g", op, eps);
    int stat = lac_front_stat_dtype(x->dtype);
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, sum, &a.sum));
    LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, out, &a.out), sum);
    LAC_TRY_OUT(lac_tensor_new(op, stat, x->device, 1, &rows, mean, &a.mean), sum, out);
    LAC_TRY_OUT(lac_tensor_new(op, stat, x->device, 1, &rows, rstd, &a.rstd), sum, out, mean);
    LAC_RUN_OUT(residual_norm, x->device, &a, sum, out, mean, rstd);
    return 0;
}

int lac_residual_norm_bwd(const lac_tensor *sum, const lac_tensor *gamma, const lac_tensor *mean,
                          const lac_tensor *rstd, const lac_tensor *g, const lac_tensor *g_sum, double p, uint64_t seed,
                          uint64_t offset, lac_tensor *dx, lac_tensor *dh, lac_tensor *dgamma, lac_tensor *dbeta)
{
    const char *op = "residual_norm_bwd";
    lac_a_residual_norm_bwd a = {.p = p, .seed = seed, .offset = offset};
    int64_t rows;
    LAC_OUT(op, "dx", dx);
    if (dh) dh->storage = NULL;
    if (dgamma) dgamma->storage = NULL;
    if (dbeta) dbeta->storage = NULL;
    LAC_TRY(rows_get(op, sum, &a.sum, &rows));
    LAC_TRY(vector_get(op, "gamma", gamma, sum, &a.gamma));
    LAC_TRY(stat_get(op, "mean", mean, sum, rows, &a.mean));
    LAC_TRY(stat_get(op, "rstd", rstd, sum, rows, &a.rstd));
    LAC_TRY(like_get(op, "sum", sum, "g", g, &a.g));
    if (g_sum) LAC_TRY(like_get(op, "sum", sum, "g_sum", g_sum, &a.g_sum));
    LAC_TRY(probability_check(op, p));
    if ((p > 0) != (dh != NULL))
        LAC_FAIL(ARGUMENT, "%s: dh is a tensor of its own if and only if there is dropout, p is %g", op, p);
    if (dgamma && !gamma) LAC_FAIL(ARGUMENT, "%s: dgamma was asked for, but there is no gamma", op);
    const int64_t *width = &sum->shape[sum->ndim - 1];
    LAC_TRY(lac_tensor_new(op, sum->dtype, sum->device, sum->ndim, sum->shape, dx, &a.dx));
    if (dh) LAC_TRY_OUT(lac_tensor_new(op, sum->dtype, sum->device, sum->ndim, sum->shape, dh, &a.dh), dx);
    if (dgamma) LAC_TRY_OUT(lac_tensor_new(op, sum->dtype, sum->device, 1, width, dgamma, &a.dgamma), dx, dh);
    if (dbeta) LAC_TRY_OUT(lac_tensor_new(op, sum->dtype, sum->device, 1, width, dbeta, &a.dbeta), dx, dh, dgamma);
    LAC_RUN_OUT(residual_norm_bwd, sum->device, &a, dx, dh, dgamma, dbeta);
    return 0;
}

int lac_gelu_norm(const lac_tensor *x, const lac_tensor *gamma, const lac_tensor *beta, double eps, lac_tensor *act,
                  lac_tensor *out, lac_tensor *mean, lac_tensor *rstd)
{
    const char *op = "gelu_norm";
    lac_a_gelu_norm a = {.eps = eps};
    int64_t rows;
    LAC_OUT(op, "out", out);
    LAC_OUT(op, "mean", mean);
    LAC_OUT(op, "rstd", rstd);
    if (act) act->storage = NULL;
    LAC_TRY(rows_get(op, x, &a.x, &rows));
    LAC_TRY(vector_get(op, "gamma", gamma, x, &a.gamma));
    LAC_TRY(vector_get(op, "beta", beta, x, &a.beta));
    if (!(eps > 0 && isfinite(eps))) LAC_FAIL(ARGUMENT, "%s: eps must be positive and finite, got %g", op, eps);
    int stat = lac_front_stat_dtype(x->dtype);
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, out, &a.out));
    LAC_TRY_OUT(lac_tensor_new(op, stat, x->device, 1, &rows, mean, &a.mean), out);
    LAC_TRY_OUT(lac_tensor_new(op, stat, x->device, 1, &rows, rstd, &a.rstd), out, mean);
    if (act) LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, act, &a.act), out, mean, rstd);
    LAC_RUN_OUT(gelu_norm, x->device, &a, out, mean, rstd, act);
    return 0;
}

int lac_gelu_norm_bwd(const lac_tensor *x, const lac_tensor *act, const lac_tensor *gamma, const lac_tensor *beta,
                      const lac_tensor *mean, const lac_tensor *rstd, const lac_tensor *g, double eps, lac_tensor *dx,
                      lac_tensor *dgamma, lac_tensor *dbeta, lac_tensor *out, lac_tensor *sums)
{
    const char *op = "gelu_norm_bwd";
    lac_a_gelu_norm_bwd a = {.eps = eps};
    int64_t rows;
    LAC_OUT(op, "dx", dx);
    if (dgamma) dgamma->storage = NULL;
    if (dbeta) dbeta->storage = NULL;
    if (out) out->storage = NULL;
    if (sums) sums->storage = NULL;
    LAC_TRY(rows_get(op, x, &a.x, &rows));
    if (act) LAC_TRY(like_get(op, "x", x, "act", act, &a.act));
    LAC_TRY(vector_get(op, "gamma", gamma, x, &a.gamma));
    LAC_TRY(vector_get(op, "beta", beta, x, &a.beta));
    LAC_TRY(stat_get(op, "mean", mean, x, rows, &a.mean));
    LAC_TRY(stat_get(op, "rstd", rstd, x, rows, &a.rstd));
    LAC_TRY(like_get(op, "x", x, "g", g, &a.g));
    if (dgamma && !gamma) LAC_FAIL(ARGUMENT, "%s: dgamma was asked for, but there is no gamma", op);
    if (!(eps > 0 && isfinite(eps))) LAC_FAIL(ARGUMENT, "%s: eps must be positive and finite, got %g", op, eps);
    const int64_t *width = &x->shape[x->ndim - 1];
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, dx, &a.dx));
    if (dgamma) LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, 1, width, dgamma, &a.dgamma), dx);
    if (dbeta) LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, 1, width, dbeta, &a.dbeta), dx, dgamma);
    if (out) LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, out, &a.out), dx, dgamma, dbeta);
    if (sums) LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, 1, width, sums, &a.sums), dx, dgamma, dbeta, out);
    LAC_RUN_OUT(gelu_norm_bwd, x->device, &a, dx, dgamma, dbeta, out, sums);
    return 0;
}

int lac_rmsnorm(const lac_tensor *x, const lac_tensor *gamma, double eps, lac_tensor *out, lac_tensor *rstd)
{
    lac_a_rmsnorm a = {.eps = eps};
    int64_t rows;
    LAC_OUT("rmsnorm", "out", out);
    LAC_OUT("rmsnorm", "rstd", rstd);
    LAC_TRY(rows_get("rmsnorm", x, &a.x, &rows));
    LAC_TRY(vector_get("rmsnorm", "gamma", gamma, x, &a.gamma));
    if (!(eps > 0 && isfinite(eps))) LAC_FAIL(ARGUMENT, "rmsnorm: eps must be positive and finite, got %g", eps);
    LAC_TRY(lac_tensor_new("rmsnorm", x->dtype, x->device, x->ndim, x->shape, out, &a.out));
    LAC_TRY_OUT(lac_tensor_new("rmsnorm", lac_front_stat_dtype(x->dtype), x->device, 1, &rows, rstd, &a.rstd), out);
    LAC_RUN_OUT(rmsnorm, x->device, &a, out, rstd);
    return 0;
}

int lac_rmsnorm_bwd(const lac_tensor *x, const lac_tensor *gamma, const lac_tensor *rstd, const lac_tensor *g,
                    lac_tensor *dx, lac_tensor *dgamma)
{
    const char *op = "rmsnorm_bwd";
    lac_a_rmsnorm_bwd a;
    int64_t rows;
    LAC_OUT(op, "dx", dx);
    if (dgamma) dgamma->storage = NULL;
    LAC_TRY(rows_get(op, x, &a.x, &rows));
    LAC_TRY(vector_get(op, "gamma", gamma, x, &a.gamma));
    LAC_TRY(stat_get(op, "rstd", rstd, x, rows, &a.rstd));
    LAC_TRY(lac_view_get(op, "g", g, &a.g));
    LAC_TRY(lac_same_dtype(op, "x", x, "g", g));
    LAC_TRY(lac_same_device(op, "x", x, "g", g));
    LAC_TRY(lac_same_shape(op, "x", x, "g", g));
    if (dgamma && !gamma) LAC_FAIL(ARGUMENT, "rmsnorm_bwd: dgamma was asked for, but there is no gamma");
    a.dgamma.data = NULL;
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, x->ndim, x->shape, dx, &a.dx));
    if (dgamma) LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, 1, &x->shape[x->ndim - 1], dgamma, &a.dgamma), dx);
    LAC_RUN_OUT(rmsnorm_bwd, x->device, &a, dx, dgamma);
    return 0;
}
