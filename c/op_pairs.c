/* op_pairs.c: the options of attention that speak of single pairs: mask, bias, slopes, and blocks of pairs.
 *
 * A matrix over (query, key) comes as [N, M], with heads in front, or with batch items and heads in front, each of
 * which may be 1. All become one view of four axes whose expanded axes have stride 0, so that back ends know one form
 * only. The gradient of a bias is one number a pair: back ends store it densely, which needs no order among tasks, and
 * it is summed to the bias' own shape here. Rejected: sums of an expanded bias inside the back ends, where tasks of
 * several heads would have to take turns at every tile.
 */
#include "op_attn.h"
#include "op_front.h"

/* v = t expanded to [B, H, rows, columns] */
static int get_matrix(const char *name, const char *rows_are, const char *columns_are, const lac_plan *p,
                      const lac_attn_args *args, const lac_tensor *t, int64_t rows, int64_t columns, lac_view *v)
{
    const int64_t full[] = {p->desc.batch, p->desc.heads, rows, columns};
    const char *const of[] = {"batch items", "heads", rows_are, columns_are};
    LAC_TRY(lac_view_get("attention", name, t, v));
    if (t->ndim < 2 || t->ndim > 4)
        LAC_FAIL(SHAPE, "attention: %s must be [N, M], [H, N, M] or [B, H, N, M], got %s", name, lac_describe(t));
    for (int i = 0, d = 4 - t->ndim; i < t->ndim; i++, d++)
        if (t->shape[i] != full[d] && (d > 1 || t->shape[i] != 1))
            LAC_FAIL(SHAPE, "attention: %s has %lld %s, the plan has %lld%s (%s is %s)", name, (long long)t->shape[i],
                     of[d], (long long)full[d], d > 1 ? "" : ", 1 is for all", name, lac_shape_text(t->shape, t->ndim));
    lac_view_expand(v, 4, full);
    return lac_same_device("attention", name, t, "q", args->q);
}

static int get_blocks(const lac_plan *p, const lac_attn_args *args, lac_a_attend *a)
{
    int64_t size = a->block = args->block;
    if (size < LAC_ATTN_BLOCK)
        LAC_FAIL(ARGUMENT, "attention: block must be at least %d, got %lld", LAC_ATTN_BLOCK, (long long)size);
    int64_t rows = (p->desc.n - 1) / size + 1, columns = (p->desc.m - 1) / size + 1;
    LAC_TRY(get_matrix("block_mask", "blocks of queries", "blocks of keys", p, args, args->block_mask, rows, columns,
                       &a->blocks));
    if (a->blocks.dtype != LAC_BOOL)
        LAC_FAIL(DTYPE, "attention: block_mask must be bool (true = active), got %s", lac_dtype_name(a->blocks.dtype));
    return 0;
}

int lac_attn_pairs(const lac_plan *p, const lac_attn_args *args, lac_a_attend *a)
{
    const lac_attn_desc *d = &p->desc;
    if (args->mask) {
        LAC_TRY(get_matrix("mask", "queries", "keys", p, args, args->mask, d->n, d->m, &a->mask));
        if (a->mask.dtype != LAC_BOOL)
            LAC_FAIL(DTYPE, "attention: mask must be bool (true = attend), got %s; a float mask is a bias",
                     lac_dtype_name(a->mask.dtype));
    }
    if (args->bias) {
        LAC_TRY(get_matrix("bias", "queries", "keys", p, args, args->bias, d->n, d->m, &a->bias));
        int own = args->q->dtype, stat = lac_front_stat_dtype(own);
        if (a->bias.dtype != own && a->bias.dtype != stat)
            LAC_FAIL(DTYPE, "attention: bias must be %s%s like q, got %s", lac_dtype_name(own),
                     own == stat ? "" : " or f32", lac_dtype_name(a->bias.dtype));
    }
    if (args->block_mask) LAC_TRY(get_blocks(p, args, a));
    if (!args->alibi) return 0;
    LAC_TRY(lac_view_get("attention", "alibi", args->alibi, &a->slopes));
    int dtype = lac_front_stat_dtype(args->q->dtype);
    if (args->alibi->ndim != 1 || args->alibi->shape[0] != d->heads)
        LAC_FAIL(SHAPE, "attention: alibi must have a slope for each of the %d heads, got %s", d->heads,
                 lac_describe(args->alibi));
    if (args->alibi->dtype != dtype)
        LAC_FAIL(DTYPE, "attention: alibi must be %s for q of %s, got %s", lac_dtype_name(dtype),
                 lac_dtype_name(args->q->dtype), lac_dtype_name(args->alibi->dtype));
    return lac_same_device("attention", "alibi", args->alibi, "q", args->q);
}

int lac_attn_bias_begin(lac_a_attend_bwd *a, const lac_attn_args *args, lac_tensor *pairs)
{
    if (!args->bias) LAC_FAIL(ARGUMENT, "attention: a gradient of bias is asked for, but there is no bias");
    const lac_attn_desc *d = &a->forward.plan->desc;
    const int64_t shape[] = {d->batch, d->heads, d->n, d->m};
    int dtype = lac_front_stat_dtype(args->q->dtype);
    LAC_TRY(lac_tensor_new("attention", dtype, args->q->device, 4, shape, pairs, &a->dbias));
    return lac_fill(pairs, 0);
}

int lac_attn_bias_end(const lac_attn_args *args, const lac_tensor *pairs, lac_tensor *dbias)
{
    lac_tensor sum = {0};
    LAC_TRY(lac_sum_to(pairs, args->bias, &sum));
    if (sum.dtype == args->bias->dtype) {
        *dbias = sum;
        return 0;
    }
    int status = lac_tensor_new("attention", args->bias->dtype, args->q->device, sum.ndim, sum.shape, dbias, NULL);
    if (!status) status = lac_copy(&sum, dbias);
    if (status) lac_tensor_drop(dbias);
    lac_tensor_drop(&sum);
    return status;
}
