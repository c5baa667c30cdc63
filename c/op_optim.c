/* op_optim.c: front ends of the optimisers and of the global norm.
 *
 * One call per step for the whole model: a thousand calls through the FFI would cost more than the arithmetic of small
 * parameters. Everything is checked before anything is written, so a bad item at the end of the list does not leave a
 * half-updated model. Moments are f32 whatever the parameter's half type (their range does not fit f16 and
 * their increments vanish in bf16), f64 for f64. AdamW's betas must be in (0, 1): with 0 the moments would be no
 * moments, and the bias correction of 1 divides by zero. lr may be 0 or negative (ascent), but not NaN or infinite.
 */
#include "op_front.h"
#include <stdio.h>

static int finite_get(const char *op, const char *name, double value)
{
    if (isfinite(value)) return 0;
    LAC_FAIL(ARGUMENT, "%s: %s must be finite, got %g", op, name, value);
}

/* one tensor of an item: shape of the parameter, contiguous */
static int part_get(const char *op, int64_t number, const char *part, const lac_tensor *t, const lac_tensor *param,
                    int dtype, lac_view *v)
{
    char name[48];
    snprintf(name, sizeof name, "%s of item %lld", part, (long long)number + 1);
    LAC_TRY(lac_view_get(op, name, t, v));
    if (t->dtype != dtype)
        LAC_FAIL(DTYPE, "%s: %s must be %s for a %s parameter, got %s", op, name, lac_dtype_name(dtype),
                 lac_dtype_name(param->dtype), lac_dtype_name(t->dtype));
    LAC_TRY(lac_same_shape(op, "the parameter", param, name, t));
    LAC_TRY(lac_same_device(op, "the parameter", param, name, t));
    if (!lac_view_contiguous(v)) LAC_FAIL(ARGUMENT, "%s: %s %s must be contiguous", op, name, lac_describe(t));
    return 0;
}

/* which of its moments a rule has */
typedef struct {
    bool m, v;
} moments;

static int item_get(const char *op, int64_t number, const lac_optim_item *item, moments has, lac_a_optim_item *a)
{
    char name[48];
    snprintf(name, sizeof name, "param of item %lld", (long long)number + 1);
    *a = (lac_a_optim_item){.lr = item->lr, .weight_decay = item->weight_decay};
    LAC_TRY(lac_view_get(op, name, item->param, &a->param));
    LAC_TRY(lac_need_float(op, name, item->param));
    int dtype = item->param->dtype, stat = lac_front_stat_dtype(dtype);
    LAC_TRY(part_get(op, number, "param", item->param, item->param, dtype, &a->param));
    LAC_TRY(part_get(op, number, "grad", item->grad, item->param, dtype, &a->grad));
    if (has.m) LAC_TRY(part_get(op, number, "m", item->m, item->param, stat, &a->m));
    if (has.v) LAC_TRY(part_get(op, number, "v", item->v, item->param, stat, &a->v));
    if (item->master) {
        if (dtype != LAC_F16 && dtype != LAC_BF16)
            LAC_FAIL(DTYPE, "%s: item %lld has a master copy, which is for f16 and bf16, but the parameter is %s", op,
                     (long long)number + 1, lac_dtype_name(dtype));
        LAC_TRY(part_get(op, number, "master", item->master, item->param, LAC_F32, &a->master));
    }
    const lac_view *all[] = {&a->param, &a->grad, &a->m, &a->v, &a->master};
    static const char *const names[] = {"param", "grad", "m", "v", "master"};
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < i; j++)
            if (all[i]->data && all[j]->data && lac_views_overlap(all[i], all[j]))
                LAC_FAIL(ARGUMENT, "%s: %s and %s of item %lld overlap in memory", op, names[j], names[i],
                         (long long)number + 1);
    LAC_TRY(finite_get(op, "lr", item->lr));
    return finite_get(op, "weight_decay", item->weight_decay);
}

/* An update that was made counts, whatever has been asked for meanwhile: the host stops at its next call, when its own
 * number of steps is right again. */
static int run_optim(int device, const lac_a_optim *a)
{
    int status;
    LAC_SLOT(status, optim_many, device, a);
    return status == LAC_E_INTERRUPTED ? 0 : status;
}

/* fills the back end's items; all on one device */
static int items_get(const char *op, const lac_optim_item *items, int64_t n, moments has, lac_a_optim_item *list)
{
    for (int64_t i = 0; i < n; i++) {
        LAC_TRY(item_get(op, i, &items[i], has, &list[i]));
        LAC_TRY(lac_same_device(op, "the first parameter", items[0].param, "another one", items[i].param));
    }
    return 0;
}

/* what every rule shares: checks the list, then runs */
static int update(const lac_optim_item *items, int64_t n, moments has, lac_a_optim *a)
{
    const char *op = a->name;
    if (n < 0 || n > INT32_MAX) LAC_FAIL(ARGUMENT, "%s: a list of %lld items", op, (long long)n);
    if (n == 0) return 0;
    if (!items) LAC_FAIL(ARGUMENT, "%s: the list of items is missing", op);
    LAC_TRY(finite_get(op, "grad_scale", a->grad_scale));
    if (!(a->grad_limit >= 0 && isfinite(a->grad_limit)))
        LAC_FAIL(ARGUMENT, "%s: grad_limit must be finite and not negative, got %g", op, a->grad_limit);
    lac_a_optim_item *list = lac_workspace_get(op, (size_t)n * sizeof *list);
    if (!list) return LAC_E_MEMORY;
    a->items = list;
    a->n = n;
    int status = items_get(op, items, n, has, list);
    if (!status) status = run_optim(items[0].param->device, a);
    lac_workspace_put(list);
    return status;
}

int lac_adamw_many(const lac_optim_item *items, int64_t n, double beta1, double beta2, double eps, int coupled,
                   int64_t step, double grad_scale, double grad_limit)
{
    const char *op = coupled ? "adam" : "adamw";
    if (!(beta1 > 0 && beta1 < 1) || !(beta2 > 0 && beta2 < 1))
        LAC_FAIL(ARGUMENT, "%s: beta1 and beta2 must be in (0, 1), got %g and %g", op, beta1, beta2);
    if (!(eps >= 0 && isfinite(eps))) LAC_FAIL(ARGUMENT, "%s: eps must be finite and not negative, got %g", op, eps);
    if (step < 1) LAC_FAIL(ARGUMENT, "%s: steps count from 1, got %lld", op, (long long)step);
    lac_a_optim a = {.rule = LAC_RULE_ADAMW, .name = op, .beta1 = beta1, .beta2 = beta2, .eps = eps, .step = step};
    a.coupled = coupled != 0;
    a.grad_scale = grad_scale;
    a.grad_limit = grad_limit;
    return update(items, n, (moments){true, true}, &a);
}

int lac_sgd_many(const lac_optim_item *items, int64_t n, double momentum, double dampening, int nesterov, int coupled,
                 int64_t step, double grad_scale, double grad_limit)
{
    if (!(momentum >= 0 && momentum < 1)) LAC_FAIL(ARGUMENT, "sgd: momentum must be in [0, 1), got %g", momentum);
    if (!(dampening >= 0 && dampening <= 1)) LAC_FAIL(ARGUMENT, "sgd: dampening must be in [0, 1], got %g", dampening);
    if (nesterov && (momentum == 0 || dampening != 0))
        LAC_FAIL(ARGUMENT, "sgd: nesterov needs momentum and no dampening, got momentum %g and dampening %g", momentum,
                 dampening);
    if (step < 1) LAC_FAIL(ARGUMENT, "sgd: steps count from 1, got %lld", (long long)step);
    lac_a_optim a = {.rule = LAC_RULE_SGD, .name = "sgd", .beta1 = momentum, .dampening = dampening, .step = step};
    a.nesterov = nesterov != 0;
    a.coupled = coupled != 0;
    a.grad_scale = grad_scale;
    a.grad_limit = grad_limit;
    return update(items, n, (moments){momentum > 0, false}, &a);
}

int lac_lion_many(const lac_optim_item *items, int64_t n, double beta1, double beta2, double grad_scale,
                  double grad_limit)
{
    if (!(beta1 >= 0 && beta1 < 1) || !(beta2 >= 0 && beta2 < 1))
        LAC_FAIL(ARGUMENT, "lion: beta1 and beta2 must be in [0, 1), got %g and %g", beta1, beta2);
    lac_a_optim a = {.rule = LAC_RULE_LION, .name = "lion", .beta1 = beta1, .beta2 = beta2};
    a.grad_scale = grad_scale;
    a.grad_limit = grad_limit;
    return update(items, n, (moments){true, false}, &a);
}

static int views_get(const lac_tensor *const *list, int64_t n, lac_view *views)
{
    char name[48];
    int64_t count;
    for (int64_t i = 0; i < n; i++) {
        snprintf(name, sizeof name, "tensor %lld", (long long)i + 1);
        LAC_TRY(lac_view_get("norm", name, list[i], &views[i]));
        LAC_TRY(lac_need_float("norm", name, list[i]));
        LAC_TRY(lac_front_count("norm", name, list[i], &count));
        LAC_TRY(lac_same_device("norm", "tensor 1", list[0], name, list[i]));
    }
    return 0;
}

static int run_norm(int device, const lac_a_norm *a)
{
    LAC_RUN(norm_many, device, a);
    return 0;
}

int lac_norm_many(const lac_tensor *const *list, int64_t n, double *norm)
{
    if (!norm) LAC_FAIL(ARGUMENT, "norm: nowhere to put the result");
    *norm = 0;
    if (n < 0 || n > INT32_MAX) LAC_FAIL(ARGUMENT, "norm: a list of %lld tensors", (long long)n);
    if (n == 0) return 0;
    if (!list) LAC_FAIL(ARGUMENT, "norm: the list of tensors is missing");
    lac_view *views = lac_workspace_get("norm", (size_t)n * sizeof *views);
    if (!views) return LAC_E_MEMORY;
    int status = views_get(list, n, views);
    lac_a_norm a = {.items = views, .n = n, .norm = norm};
    if (!status) status = run_norm(list[0]->device, &a);
    lac_workspace_put(views);
    return status;
}
