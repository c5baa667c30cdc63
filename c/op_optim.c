/* op_optim.c: front ends of AdamW and the global norm.
 *
 * One call per step for the whole model: a thousand calls through the FFI would cost more than the arithmetic of small
 * parameters. Everything is checked before anything is written, so a bad item at the end of the list does not leave a
 * half-updated model. Moments are f32 whatever the parameter's half type (their range does not fit f16 and
 * their increments vanish in bf16), f64 for f64. beta must be in (0, 1): with 0 the moments would be no moments, and
 * the bias correction of 1 divides by zero. lr may be 0 or negative (ascent), but not NaN or infinite.
 */
#include "op_front.h"
#include <stdio.h>

static int finite_get(const char *name, double value)
{
    if (isfinite(value)) return 0;
    LAC_FAIL(ARGUMENT, "adamw: %s must be finite, got %g", name, value);
}

/* one tensor of an item: shape of the parameter, contiguous */
static int part_get(int64_t number, const char *part, const lac_tensor *t, const lac_tensor *param, int dtype,
                    lac_view *v)
{
    char name[48];
    snprintf(name, sizeof name, "%s of item %lld", part, (long long)(number + 1));
    LAC_TRY(lac_view_get("adamw", name, t, v));
    if (t->dtype != dtype)
        LAC_FAIL(DTYPE, "adamw: %s must be %s for a %s parameter, got %s", name, lac_dtype_name(dtype),
                 lac_dtype_name(param->dtype), lac_dtype_name(t->dtype));
    LAC_TRY(lac_same_shape("adamw", "the parameter", param, name, t));
    LAC_TRY(lac_same_device("adamw", "the parameter", param, name, t));
    if (!lac_view_contiguous(v)) LAC_FAIL(ARGUMENT, "adamw: %s %s must be contiguous", name, lac_describe(t));
    return 0;
}

static int item_get(int64_t number, const lac_adamw_item *item, lac_a_adamw_item *a)
{
    char name[48];
    snprintf(name, sizeof name, "param of item %lld", (long long)(number + 1));
    LAC_TRY(lac_view_get("adamw", name, item->param, &a->param));
    LAC_TRY(lac_need_float("adamw", name, item->param));
    int stat = lac_front_stat_dtype(item->param->dtype);
    LAC_TRY(part_get(number, "param", item->param, item->param, item->param->dtype, &a->param));
    LAC_TRY(part_get(number, "grad", item->grad, item->param, item->param->dtype, &a->grad));
    LAC_TRY(part_get(number, "m", item->m, item->param, stat, &a->m));
    LAC_TRY(part_get(number, "v", item->v, item->param, stat, &a->v));
    const lac_view *all[] = {&a->param, &a->grad, &a->m, &a->v};
    static const char *const names[] = {"param", "grad", "m", "v"};
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < i; j++)
            if (lac_views_overlap(all[i], all[j]))
                LAC_FAIL(ARGUMENT, "adamw: %s and %s of item %lld overlap in memory", names[j], names[i],
                         (long long)(number + 1));
    LAC_TRY(finite_get("lr", item->lr));
    LAC_TRY(finite_get("weight_decay", item->weight_decay));
    a->lr = item->lr;
    a->weight_decay = item->weight_decay;
    return 0;
}

static int run_adamw(int device, const lac_a_adamw *a)
{
    LAC_RUN(adamw_many, device, a);
    return 0;
}

/* fills the back end's items; all on one device */
static int items_get(const lac_adamw_item *items, int64_t n, lac_a_adamw_item *list)
{
    for (int64_t i = 0; i < n; i++) {
        LAC_TRY(item_get(i, &items[i], &list[i]));
        LAC_TRY(lac_same_device("adamw", "the first parameter", items[0].param, "another one", items[i].param));
    }
    return 0;
}

int lac_adamw_many(const lac_adamw_item *items, int64_t n, double beta1, double beta2, double eps, int64_t step,
                   double grad_scale)
{
    if (n < 0 || n > INT32_MAX) LAC_FAIL(ARGUMENT, "adamw: a list of %lld items", (long long)n);
    if (n == 0) return 0;
    if (!items) LAC_FAIL(ARGUMENT, "adamw: the list of items is missing");
    if (!(beta1 > 0 && beta1 < 1) || !(beta2 > 0 && beta2 < 1))
        LAC_FAIL(ARGUMENT, "adamw: beta1 and beta2 must be in (0, 1), got %g and %g", beta1, beta2);
    if (!(eps >= 0 && isfinite(eps))) LAC_FAIL(ARGUMENT, "adamw: eps must be finite and not negative, got %g", eps);
    if (step < 1) LAC_FAIL(ARGUMENT, "adamw: steps count from 1, got %lld", (long long)step);
    LAC_TRY(finite_get("grad_scale", grad_scale));
    lac_a_adamw_item *list = lac_workspace_get("adamw", (size_t)n * sizeof *list);
    if (!list) return LAC_E_MEMORY;
    lac_a_adamw a = {
        .items = list, .n = n, .beta1 = beta1, .beta2 = beta2, .eps = eps, .step = step, .grad_scale = grad_scale};
    int status = items_get(items, n, list);
    if (!status) status = run_adamw(items[0].param->device, &a);
    lac_workspace_put(list);
    return status;
}

static int views_get(const lac_tensor *const *list, int64_t n, lac_view *views)
{
    char name[48];
    int64_t count;
    for (int64_t i = 0; i < n; i++) {
        snprintf(name, sizeof name, "tensor %lld", (long long)(i + 1));
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
