/* op_decode.c: attention of a few new queries to the keys that a cache has kept.
 *
 * A decoding asks the same question once per token with one key more each time. A plan per length would be made and
 * thrown away at every token, so lac_attend_at() takes one plan and places it: a copy on the stack with the sizes and
 * the position of this call (lac_plan_place()), which the back end cannot tell from any other plan. No kernel knows
 * that keys have been dropped either: the address of key row 0 is moved to where position 0 would be, and rows before
 * the first kept one are never read, because the front end has checked that no query reaches them.
 *
 * Batch items that stand at the same position run in one call; items at positions of their own (prompts of unequal
 * length) run one after the other. Each is then exactly the computation that it would be alone. Rejected: padding on
 * the left, which moves the segments' borders and so computes something else, and copying kept rows together.
 */
#include "op_attn.h"
#include "op_front.h"

static int check_args(const lac_plan *p, const lac_attn_args *args, const int64_t *position, const int64_t *key_start)
{
    const char *op = "attention";
    if (!p) LAC_FAIL(ARGUMENT, "%s: the plan is a null pointer", op);
    if (!args) LAC_FAIL(ARGUMENT, "%s: the arguments are a null pointer", op);
    if (!position || !key_start)
        LAC_FAIL(ARGUMENT, "%s: %s is a null pointer", op, position ? "key_start" : "position");
    if (args->key_padding || args->key_lengths || args->dropout != 0 || args->mask || args->bias || args->block_mask ||
        args->sequences || args->kernel || args->fp8)
        LAC_FAIL(
            ARGUMENT,
            "%s: decoding takes no key padding, key lengths, mask, bias, block_mask, packed sequences, dropout, fp8 "
            "or choice of kernel",
            op);
    if (!isfinite(args->scale)) LAC_FAIL(ARGUMENT, "%s: scale must be finite, got %g", op, args->scale);
    return 0;
}

/* t is a live view [batch, rows >= 1, heads, head_dim] of q's dtype and device */
static int get_view(const char *name, const lac_tensor *t, int32_t heads, const lac_plan *p, const lac_tensor *q,
                    lac_view *v)
{
    LAC_TRY(lac_view_get("attention", name, t, v));
    if (t->ndim != 4 || t->shape[0] != q->shape[0] || t->shape[1] < 1 || t->shape[2] != heads ||
        t->shape[3] != p->desc.head_dim)
        LAC_FAIL(SHAPE, "attention: %s must be [%lld items, 1 or more rows, %d heads, %d], got %s", name,
                 (long long)q->shape[0], heads, p->desc.head_dim, lac_describe(t));
    LAC_TRY(lac_same_dtype("attention", "q", q, name, t));
    return lac_same_device("attention", "q", q, name, t);
}

static int check_place(const lac_plan *p, int64_t n, int64_t rows, int64_t position, int64_t key_start)
{
    int64_t most = p->desc.m;
    if (position < 0 || key_start < 0 || n > most || rows > most || position > most - n || key_start > most - rows)
        LAC_FAIL(
            INDEX,
            "attention: positions must be from 0 to %lld, got %lld queries from %lld on and %lld keys from %lld on",
            (long long)most - 1, (long long)n, (long long)position, (long long)rows, (long long)key_start);
    int64_t reach = lac_plan_reach_from(p, position);
    if (key_start > reach)
        LAC_FAIL(INDEX, "attention: the query at position %lld reaches back to position %lld, the keys start at %lld",
                 (long long)position, (long long)reach, (long long)key_start);
    return 0;
}

/* `items` batch items of a view from item b on; its address is where position 0 would be if row 0 is at `start` */
static lac_view part(const lac_view *v, int64_t b, int64_t items, int64_t start)
{
    lac_view w = *v;
    int64_t elements = b * v->stride[0] - start * v->stride[1];
    w.data = (void *)((uintptr_t)v->data + (uintptr_t)(elements * (int64_t)lac_dtype_size(v->dtype)));
    w.shape[0] = items;
    return w;
}

/* all = whole batch; runs items [b, b + items), which stand at one place */
static int run_items(const lac_a_attend *all, int device, int64_t b, int64_t items, int64_t position, int64_t key_start)
{
    lac_plan placed;
    lac_a_attend a = *all;
    a.k = part(&all->k, b, items, key_start);
    a.v = part(&all->v, b, items, key_start);
    a.q = part(&all->q, b, items, 0);
    a.out = part(&all->out, b, items, 0);
    a.lse = part(&all->lse, b, items, 0);
    lac_plan_place(all->plan, items, a.q.shape[1], key_start + a.k.shape[1], position, &placed);
    a.plan = &placed;
    LAC_RUN(attend, device, &a);
    return 0;
}

static int attend_at(lac_a_attend *a, int device, const int64_t *position, const int64_t *key_start)
{
    int64_t batch = a->q.shape[0];
    for (int64_t b = 0, next; b < batch; b = next) {
        for (next = b + 1; next < batch && position[next] == position[b] && key_start[next] == key_start[b];) next++;
        LAC_TRY(run_items(a, device, b, next - b, position[b], key_start[b]));
    }
    return 0;
}

int lac_attend_at(const lac_plan *plan, const lac_attn_args *args, const int64_t *position, const int64_t *key_start,
                  lac_tensor *out, lac_tensor *lse)
{
    lac_a_attend a = {.plan = plan};
    LAC_OUT("attention", "out", out);
    LAC_OUT("attention", "lse", lse);
    LAC_TRY(check_args(plan, args, position, key_start));
    LAC_TRY(lac_view_get("attention", "q", args->q, &a.q));
    LAC_TRY(lac_need_float("attention", "q", args->q));
    if (args->q->ndim != 4 || args->q->shape[0] < 1)
        LAC_FAIL(SHAPE, "attention: q must be [1 or more items, rows, heads, head_dim], got %s", lac_describe(args->q));
    LAC_TRY(get_view("q", args->q, plan->desc.heads, plan, args->q, &a.q));
    LAC_TRY(get_view("k", args->k, plan->desc.kv_heads, plan, args->q, &a.k));
    LAC_TRY(get_view("v", args->v, plan->desc.kv_heads, plan, args->q, &a.v));
    if (args->k->shape[1] != args->v->shape[1])
        LAC_FAIL(SHAPE, "attention: k has %lld rows, v has %lld", (long long)args->k->shape[1],
                 (long long)args->v->shape[1]);
    LAC_TRY(lac_attn_pairs(plan, args, &a));
    for (int64_t b = 0; b < a.q.shape[0]; b++)
        LAC_TRY(check_place(plan, a.q.shape[1], a.k.shape[1], position[b], key_start[b]));
    a.scale = args->scale != 0 ? args->scale : 1 / sqrt((double)plan->desc.head_dim);
    int device = args->q->device;
    LAC_TRY(lac_tensor_new("attention", a.q.dtype, device, 4, a.q.shape, out, &a.out));
    LAC_TRY_OUT(lac_tensor_new("attention", lac_front_stat_dtype(a.q.dtype), device, 3, a.q.shape, lse, &a.lse), out);
    LAC_TRY_OUT(attend_at(&a, device, position, key_start), out, lse);
    return 0;
}
