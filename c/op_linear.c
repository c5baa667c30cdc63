/* op_linear.c: front ends of linear layers whose activation or bias goes with the product.
 *
 * Two matrices, nothing broadcasts: the callers bring rows into shape. An activation is allowed if its derivative needs
 * only what went into it; gelu and gelu_tanh are what feed-forward layers use, and what cuBLASLt has (the latter).
 */
#include "op_front.h"
#include <string.h>

static int matrix_get(const char *op, const char *name, const lac_tensor *t, lac_view *v)
{
    LAC_TRY(lac_view_get(op, name, t, v));
    LAC_TRY(lac_need_float(op, name, t));
    if (t->ndim == 2) return 0;
    LAC_FAIL(SHAPE, "%s: %s must have 2 dimensions, got %s", op, name, lac_shape_text(t->shape, t->ndim));
}

/* a matrix like `first` in dtype and device whose size along `axis` is `size`, which is what `what` says */
static int partner_get(const char *op, const char *first_name, const lac_tensor *first, const char *name,
                       const lac_tensor *t, int axis, int64_t size, lac_view *v)
{
    LAC_TRY(matrix_get(op, name, t, v));
    LAC_TRY(lac_same_dtype(op, first_name, first, name, t));
    LAC_TRY(lac_same_device(op, first_name, first, name, t));
    if (t->shape[axis] == size) return 0;
    LAC_FAIL(SHAPE, "%s: %s %s does not fit %s %s: size %d must be %lld", op, name, lac_shape_text(t->shape, t->ndim),
             first_name, lac_shape_text(first->shape, first->ndim), axis + 1, (long long)size);
}

static int activation_check(const char *op, int fn)
{
    const char *name = lac_map_name(1, fn);
    if (name && (strcmp(name, "gelu") == 0 || strcmp(name, "gelu_tanh") == 0)) return 0;
    LAC_FAIL(ARGUMENT, "%s: the activation must be gelu or gelu_tanh, got %s", op, name ? name : "no function's id");
}

int lac_front_bias(const char *op, const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias, lac_view *v)
{
    LAC_TRY(lac_view_get(op, "bias", bias, v));
    LAC_TRY(lac_same_dtype(op, "x", x, "bias", bias));
    LAC_TRY(lac_same_device(op, "x", x, "bias", bias));
    if (bias->ndim != 1 || bias->shape[0] != w->shape[0])
        LAC_FAIL(SHAPE, "%s: bias must be [%lld] for w %s, got %s", op, (long long)w->shape[0],
                 lac_shape_text(w->shape, w->ndim), lac_shape_text(bias->shape, bias->ndim));
    return 0;
}

int lac_linear_act(int fn, const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias, lac_tensor *pre,
                   lac_tensor *out)
{
    const char *op = "linear_act";
    lac_a_linear_act a = {.fn = fn};
    LAC_OUT(op, "out", out);
    if (pre) pre->storage = NULL;
    LAC_TRY(activation_check(op, fn));
    LAC_TRY(matrix_get(op, "x", x, &a.x));
    LAC_TRY(partner_get(op, "x", x, "w", w, 1, x->shape[1], &a.w));
    if (bias) LAC_TRY(lac_front_bias(op, x, w, bias, &a.bias));
    int64_t shape[] = {x->shape[0], w->shape[0]};
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, 2, shape, out, &a.out));
    if (pre) LAC_TRY_OUT(lac_tensor_new(op, x->dtype, x->device, 2, shape, pre, &a.pre), out);
    LAC_RUN_OUT(linear_act, x->device, &a, out, pre);
    return 0;
}

int lac_linear_act_bwd(int fn, const lac_tensor *g, const lac_tensor *w, const lac_tensor *pre, lac_tensor *out,
                       lac_tensor *sums, lac_tensor *act)
{
    const char *op = "linear_act_bwd";
    lac_a_linear_act_bwd a = {.fn = fn};
    LAC_OUT(op, "out", out);
    if (sums) sums->storage = NULL;
    if (act) act->storage = NULL;
    LAC_TRY(activation_check(op, fn));
    LAC_TRY(matrix_get(op, "g", g, &a.g));
    LAC_TRY(partner_get(op, "g", g, "w", w, 0, g->shape[1], &a.w));
    LAC_TRY(partner_get(op, "g", g, "pre", pre, 0, g->shape[0], &a.pre));
    LAC_TRY(partner_get(op, "w", w, "pre", pre, 1, w->shape[1], &a.pre));
    LAC_TRY(lac_tensor_new(op, g->dtype, g->device, 2, pre->shape, out, &a.out));
    if (sums) LAC_TRY_OUT(lac_tensor_new(op, g->dtype, g->device, 1, &pre->shape[1], sums, &a.sums), out);
    if (act) LAC_TRY_OUT(lac_tensor_new(op, g->dtype, g->device, 2, pre->shape, act, &a.act), out, sums);
    LAC_RUN_OUT(linear_act_bwd, g->device, &a, out, sums, act);
    return 0;
}

int lac_weight_grad(const lac_tensor *g, const lac_tensor *x, lac_tensor *dw, lac_tensor *sums)
{
    const char *op = "weight_grad";
    lac_a_weight_grad a = {0};
    LAC_OUT(op, "dw", dw);
    LAC_OUT(op, "sums", sums);
    LAC_TRY(matrix_get(op, "g", g, &a.g));
    LAC_TRY(partner_get(op, "g", g, "x", x, 0, g->shape[0], &a.x));
    int64_t shape[] = {g->shape[1], x->shape[1]};
    LAC_TRY(lac_tensor_new(op, g->dtype, g->device, 2, shape, dw, &a.dw));
    LAC_TRY_OUT(lac_tensor_new(op, g->dtype, g->device, 1, shape, sums, &a.sums), dw);
    LAC_RUN_OUT(weight_grad, g->device, &a, dw, sums);
    return 0;
}
