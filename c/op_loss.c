/* op_loss.c: front ends of the cross-entropy losses.
 *
 * The loss per row comes back unreduced: mean, sum and weights are one more line of script. Losses, lse and the
 * gradient g that the backward takes are f32 for f32, f16 and bf16 logits, and f64 for f64: a loss in bf16 would have
 * two digits. A row whose target equals `ignore` has loss 0 and gradient 0, and `ignore` may be any integer; other
 * targets must be classes, which the back end checks (only it can read the tensor) before it writes anything. The fused
 * form takes the projection's weights as they are, w [V, E], and never makes the logits. Class weights and label
 * smoothing are inside, because outside they would need the log-probabilities as a tensor; so are targets that are
 * probabilities.
 */
#include "op_front.h"

/* target [R], i64 or i32 */
static int target_get(const char *op, const lac_tensor *t, const lac_tensor *x, const char *nx, int64_t rows,
                      lac_view *v)
{
    LAC_TRY(lac_view_get(op, "target", t, v));
    LAC_TRY(lac_front_integer_index(op, "target", t));
    LAC_TRY(lac_same_device(op, nx, x, "target", t));
    if (t->ndim == 1 && t->shape[0] == rows) return 0;
    LAC_FAIL(SHAPE, "%s: target must be [%lld], one class for every row of %s %s, got %s", op, (long long)rows, nx,
             lac_shape_text(x->shape, x->ndim), lac_shape_text(t->shape, t->ndim));
}

/* target [R, V], probabilities of the logits' dtype, or [R] classes */
static int any_target_get(const char *op, const lac_tensor *t, const lac_tensor *logits, lac_view *v)
{
    if (!t) LAC_FAIL(ARGUMENT, "%s: target is missing", op);
    if (!lac_dtype_is_float(t->dtype)) return target_get(op, t, logits, "logits", logits->shape[0], v);
    LAC_TRY(lac_view_get(op, "target", t, v));
    LAC_TRY(lac_same_dtype(op, "logits", logits, "target", t));
    LAC_TRY(lac_same_device(op, "logits", logits, "target", t));
    return lac_same_shape(op, "logits", logits, "target", t);
}

/* weight [V] or NULL, and smoothing; x has the dtype */
static int loss_get(const char *op, const lac_tensor *weight, double smoothing, const lac_tensor *x, int64_t classes,
                    lac_loss *loss)
{
    if (!(smoothing >= 0 && smoothing <= 1))
        LAC_FAIL(ARGUMENT, "%s: label smoothing must be in [0, 1], got %g", op, smoothing);
    loss->smoothing = smoothing;
    loss->weight.data = NULL;
    if (!weight) return 0;
    LAC_TRY(lac_view_get(op, "weight", weight, &loss->weight));
    LAC_TRY(lac_same_dtype(op, "x", x, "weight", weight));
    LAC_TRY(lac_same_device(op, "x", x, "weight", weight));
    if (weight->ndim == 1 && weight->shape[0] == classes) return 0;
    LAC_FAIL(SHAPE, "%s: weight must be [%lld], one for every class, got %s", op, (long long)classes,
             lac_shape_text(weight->shape, weight->ndim));
}

/* lse or g: [R] in the dtype of losses */
static int stat_get(const char *op, const char *name, const lac_tensor *t, const lac_tensor *x, int64_t rows,
                    lac_view *v)
{
    LAC_TRY(lac_view_get(op, name, t, v));
    LAC_TRY(lac_same_device(op, "x", x, name, t));
    int stat = lac_front_stat_dtype(x->dtype);
    if (t->dtype != stat)
        LAC_FAIL(DTYPE, "%s: %s must be %s for %s input, got %s", op, name, lac_dtype_name(stat),
                 lac_dtype_name(x->dtype), lac_dtype_name(t->dtype));
    if (t->ndim == 1 && t->shape[0] == rows) return 0;
    LAC_FAIL(SHAPE, "%s: %s must be [%lld], got %s", op, name, (long long)rows, lac_shape_text(t->shape, t->ndim));
}

/* logits [R, V] with at least one class */
static int logits_get(const char *op, const lac_tensor *t, lac_view *v)
{
    LAC_TRY(lac_view_get(op, "logits", t, v));
    LAC_TRY(lac_need_float(op, "logits", t));
    if (t->ndim != 2 || t->shape[1] < 1)
        LAC_FAIL(SHAPE, "%s: logits must be [rows, classes] with at least one class, got %s", op,
                 lac_shape_text(t->shape, t->ndim));
    return 0;
}

int lac_cross_entropy(const lac_tensor *logits, const lac_tensor *target, const lac_tensor *weight, int64_t ignore,
                      double smoothing, lac_tensor *out, lac_tensor *lse)
{
    const char *op = "cross_entropy";
    lac_a_cross_entropy a = {.loss.ignore = ignore};
    LAC_OUT(op, "out", out);
    LAC_OUT(op, "lse", lse);
    LAC_TRY(logits_get(op, logits, &a.logits));
    LAC_TRY(any_target_get(op, target, logits, &a.target));
    LAC_TRY(loss_get(op, weight, smoothing, logits, logits->shape[1], &a.loss));
    int stat = lac_front_stat_dtype(logits->dtype);
    LAC_TRY(lac_tensor_new(op, stat, logits->device, 1, logits->shape, out, &a.out));
    LAC_TRY_OUT(lac_tensor_new(op, stat, logits->device, 1, logits->shape, lse, &a.lse), out);
    LAC_RUN_OUT(cross_entropy, logits->device, &a, out, lse);
    return 0;
}

int lac_cross_entropy_bwd(const lac_tensor *logits, const lac_tensor *target, const lac_tensor *weight, int64_t ignore,
                          double smoothing, const lac_tensor *lse, const lac_tensor *g, lac_tensor *dlogits)
{
    const char *op = "cross_entropy_bwd";
    lac_a_cross_entropy_bwd a = {.loss.ignore = ignore};
    LAC_OUT(op, "dlogits", dlogits);
    LAC_TRY(logits_get(op, logits, &a.logits));
    LAC_TRY(any_target_get(op, target, logits, &a.target));
    LAC_TRY(loss_get(op, weight, smoothing, logits, logits->shape[1], &a.loss));
    LAC_TRY(stat_get(op, "lse", lse, logits, logits->shape[0], &a.lse));
    LAC_TRY(stat_get(op, "g", g, logits, logits->shape[0], &a.g));
    LAC_TRY(lac_tensor_new(op, logits->dtype, logits->device, 2, logits->shape, dlogits, &a.out));
    LAC_RUN_OUT(cross_entropy_bwd, logits->device, &a, dlogits);
    return 0;
}

int lac_loss_mean(const lac_tensor *losses, const lac_tensor *target, const lac_tensor *weight, int64_t ignore,
                  lac_tensor *out, lac_tensor *total)
{
    const char *op = "loss_mean";
    lac_a_loss_mean a = {.loss.ignore = ignore};
    LAC_OUT(op, "out", out);
    LAC_OUT(op, "total", total);
    LAC_TRY(lac_view_get(op, "losses", losses, &a.losses));
    if (losses->ndim != 1 || (losses->dtype != LAC_F32 && losses->dtype != LAC_F64))
        LAC_FAIL(SHAPE, "%s: losses must be [rows] in f32 or f64, got %s of %s", op,
                 lac_shape_text(losses->shape, losses->ndim), lac_dtype_name(losses->dtype));
    LAC_TRY(target_get(op, target, losses, "losses", losses->shape[0], &a.target));
    if (weight) {
        LAC_TRY(lac_view_get(op, "weight", weight, &a.loss.weight));
        LAC_TRY(lac_need_float(op, "weight", weight));
        LAC_TRY(lac_same_device(op, "losses", losses, "weight", weight));
        if (weight->ndim != 1 || lac_front_stat_dtype(weight->dtype) != losses->dtype)
            LAC_FAIL(SHAPE, "%s: weight must be [classes] of the logits' dtype, got %s of %s for losses in %s", op,
                     lac_shape_text(weight->shape, weight->ndim), lac_dtype_name(weight->dtype),
                     lac_dtype_name(losses->dtype));
    }
    LAC_TRY(lac_tensor_new(op, losses->dtype, losses->device, 0, NULL, out, &a.out));
    LAC_TRY_OUT(lac_tensor_new(op, losses->dtype, losses->device, 0, NULL, total, &a.total), out);
    LAC_RUN_OUT(loss_mean, losses->device, &a, out, total);
    return 0;
}

/* the arguments that both directions of the fused loss have */
static int linear_get(const char *op, const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias,
                      const lac_tensor *target, int64_t chunk, lac_view *vx, lac_view *vw, lac_view *vb, lac_view *vt)
{
    LAC_TRY(lac_view_get(op, "x", x, vx));
    LAC_TRY(lac_view_get(op, "w", w, vw));
    LAC_TRY(lac_need_float(op, "x", x));
    LAC_TRY(lac_same_dtype(op, "x", x, "w", w));
    LAC_TRY(lac_same_device(op, "x", x, "w", w));
    if (x->ndim != 2 || w->ndim != 2 || x->shape[1] != w->shape[1] || w->shape[0] < 1)
        LAC_FAIL(SHAPE, "%s: x must be [rows, width] and w [classes, width] with at least one class, got x %s and w %s",
                 op, lac_shape_text(x->shape, x->ndim), lac_shape_text(w->shape, w->ndim));
    if (chunk < 0) LAC_FAIL(ARGUMENT, "%s: chunk must be at least 1, or 0 to choose, got %lld", op, (long long)chunk);
    vb->data = NULL;
    if (bias) {
        LAC_TRY(lac_view_get(op, "bias", bias, vb));
        LAC_TRY(lac_same_dtype(op, "x", x, "bias", bias));
        LAC_TRY(lac_same_device(op, "x", x, "bias", bias));
        if (bias->ndim != 1 || bias->shape[0] != w->shape[0])
            LAC_FAIL(SHAPE, "%s: bias must be [%lld] for w %s, got %s", op, (long long)w->shape[0],
                     lac_shape_text(w->shape, w->ndim), lac_shape_text(bias->shape, bias->ndim));
    }
    return target_get(op, target, x, "x", x->shape[0], vt);
}

int lac_linear_cross_entropy(const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias, const lac_tensor *target,
                             const lac_tensor *weight, int64_t ignore, double smoothing, int64_t chunk, lac_tensor *out,
                             lac_tensor *lse)
{
    const char *op = "linear_cross_entropy";
    lac_a_linear_ce a = {.loss.ignore = ignore, .chunk = chunk};
    LAC_OUT(op, "out", out);
    LAC_OUT(op, "lse", lse);
    LAC_TRY(linear_get(op, x, w, bias, target, chunk, &a.x, &a.w, &a.bias, &a.target));
    LAC_TRY(loss_get(op, weight, smoothing, x, w->shape[0], &a.loss));
    int stat = lac_front_stat_dtype(x->dtype);
    LAC_TRY(lac_tensor_new(op, stat, x->device, 1, x->shape, out, &a.out));
    LAC_TRY_OUT(lac_tensor_new(op, stat, x->device, 1, x->shape, lse, &a.lse), out);
    LAC_RUN_OUT(linear_cross_entropy, x->device, &a, out, lse);
    return 0;
}

/* the tensors that both forms make: gradients, their size that of x, w and bias */
static int gradients_run(const char *op, lac_a_linear_ce_bwd *a, const lac_tensor *x, const lac_tensor *w,
                         lac_tensor *dx, lac_tensor *dw, lac_tensor *dbias)
{
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, 2, x->shape, dx, &a->dx));
    LAC_TRY_OUT(lac_tensor_new(op, w->dtype, w->device, 2, w->shape, dw, &a->dw), dx);
    if (dbias) LAC_TRY_OUT(lac_tensor_new(op, w->dtype, w->device, 1, w->shape, dbias, &a->dbias), dx, dw);
    LAC_RUN_OUT(linear_cross_entropy_bwd, x->device, a, dx, dw, dbias);
    return 0;
}

static int gradients_get(const char *op, lac_a_linear_ce_bwd *a, const lac_tensor *x, const lac_tensor *w,
                         const lac_tensor *bias, const lac_tensor *target, const lac_tensor *weight, double smoothing,
                         const lac_tensor *g, lac_tensor *dx, lac_tensor *dw, lac_tensor *dbias)
{
    LAC_OUT(op, "dx", dx);
    LAC_OUT(op, "dw", dw);
    if (dbias) dbias->storage = NULL;
    LAC_TRY(linear_get(op, x, w, bias, target, a->chunk, &a->x, &a->w, &a->bias, &a->target));
    LAC_TRY(loss_get(op, weight, smoothing, x, w->shape[0], &a->loss));
    if (!bias != !dbias)
        LAC_FAIL(ARGUMENT, "%s: %s", op,
                 bias ? "there is a bias but no place for dbias" : "dbias was asked for, but there is no bias");
    return stat_get(op, "g", g, x, x->shape[0], &a->g);
}

int lac_linear_cross_entropy_bwd(const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias,
                                 const lac_tensor *target, const lac_tensor *weight, int64_t ignore, double smoothing,
                                 int64_t chunk, const lac_tensor *lse, const lac_tensor *g, lac_tensor *dx,
                                 lac_tensor *dw, lac_tensor *dbias)
{
    const char *op = "linear_cross_entropy_bwd";
    lac_a_linear_ce_bwd a = {.loss.ignore = ignore, .chunk = chunk};
    LAC_TRY(gradients_get(op, &a, x, w, bias, target, weight, smoothing, g, dx, dw, dbias));
    LAC_TRY(stat_get(op, "lse", lse, x, x->shape[0], &a.lse));
    return gradients_run(op, &a, x, w, dx, dw, dbias);
}

int lac_linear_cross_entropy_both(const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias,
                                  const lac_tensor *target, const lac_tensor *weight, int64_t ignore, double smoothing,
                                  int64_t chunk, const lac_tensor *g, lac_tensor *out, lac_tensor *dx, lac_tensor *dw,
                                  lac_tensor *dbias)
{
    const char *op = "linear_cross_entropy";
    lac_a_linear_ce_bwd a = {.loss.ignore = ignore, .chunk = chunk};
    lac_tensor lse;
    LAC_OUT(op, "out", out);
    LAC_TRY(gradients_get(op, &a, x, w, bias, target, weight, smoothing, g, dx, dw, dbias));
    int stat = lac_front_stat_dtype(x->dtype);
    LAC_TRY(lac_tensor_new(op, stat, x->device, 1, x->shape, out, &a.out));
    LAC_TRY_OUT(lac_tensor_new(op, stat, x->device, 1, x->shape, &lse, &a.lse), out);
    LAC_TRY_OUT(gradients_run(op, &a, x, w, dx, dw, dbias), out, &lse);
    lac_tensor_drop(&lse);
    return 0;
}
