/* op_packed.c: sequences that lie one after the other in one batch item.
 *
 * A packed call is the calls that its sequences would be, run on slices of its tensors: the plan is placed at each
 * length (lac_plan_place()), so nothing about segments, offsets or masks is written twice and no back end knows that
 * there is more than one sequence. Neighbours of equal length run as one batch: their rows lie at equal distances. What
 * differs from separate calls are only the numbers of dropout's draws, which go on from one sequence to the next.
 *
 * Rejected: borders of sequences inside the kernels, which every segment, block and tile would have to look at; padding
 * to the longest sequence.
 */
#include "op_attn.h"

int lac_packed_check(const lac_plan *p, const lac_attn_args *args)
{
    const lac_attn_desc *d = &p->desc;
    const int64_t *starts = args->starts, count = args->sequences;
    if (count < 0 || !starts)
        LAC_FAIL(ARGUMENT, "attention: cu_seqlens needs at least two numbers, got %lld sequences", (long long)count);
    if (d->batch != 1)
        LAC_FAIL(SHAPE, "attention: packed sequences lie in one batch item, q has %lld", (long long)d->batch);
    if (d->n != d->m)
        LAC_FAIL(SHAPE, "attention: packed sequences need as many keys as queries, got %lld != %lld", (long long)d->m,
                 (long long)d->n);
    if (args->key_lengths || args->block_mask)
        LAC_FAIL(ARGUMENT, "attention: cu_seqlens does not go with %s",
                 args->key_lengths ? "key_lengths (shorten the sequences)"
                                   : "block_mask (a block may straddle sequences)");
    for (int64_t s = 0; s < count; s++)
        if (starts[s] < 0 || starts[s] > starts[s + 1])
            LAC_FAIL(ARGUMENT, "attention: cu_seqlens must not fall: [%lld] is %lld, [%lld] is %lld", (long long)s + 1,
                     (long long)starts[s], (long long)s + 2, (long long)starts[s + 1]);
    if (starts[0] != 0 || starts[count] != d->n)
        LAC_FAIL(ARGUMENT, "attention: cu_seqlens must run from 0 to the %lld rows of q, got %lld to %lld",
                 (long long)d->n, (long long)starts[0], (long long)starts[count]);
    return 0;
}

/* `items` sequences of `rows` rows from row `at` on, which lie one after the other along `axis`: axis - 1, of size 1
 * before, counts them */
static void cut(lac_view *v, int axis, int64_t at, int64_t rows, int64_t items)
{
    if (!v->data) return;
    v->data = (char *)v->data + at * v->stride[axis] * (int64_t)lac_dtype_size(v->dtype);
    v->shape[axis - 1] = items;
    v->stride[axis - 1] = rows * v->stride[axis];
    v->shape[axis] = rows;
}

/* the same of a [1, H, N, N] view: squares along its diagonal */
static void cut_square(lac_view *v, int64_t at, int64_t rows, int64_t items)
{
    if (!v->data) return;
    int64_t step = v->stride[2] + v->stride[3];
    v->data = (char *)v->data + at * step * (int64_t)lac_dtype_size(v->dtype);
    v->shape[0] = items;
    v->stride[0] = rows * step;
    v->shape[2] = v->shape[3] = rows;
}

/* `items` sequences of `rows` rows; `placed` becomes their plan */
static lac_a_attend part(const lac_a_attend *all, int64_t at, int64_t rows, int64_t items, lac_plan *placed)
{
    lac_a_attend a = *all;
    lac_view *const views[] = {&a.q, &a.k, &a.v, &a.padding, &a.out, &a.lse};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) cut(views[i], 1, at, rows, items);
    cut(&a.branch_lse, 2, at, rows, items);
    cut_square(&a.mask, at, rows, items);
    cut_square(&a.bias, at, rows, items);
    lac_plan_place(all->plan, items, rows, rows, 0, placed);
    a.plan = placed;
    return a;
}

/* how many of the sequences from s on are as long as s */
static int64_t alike(const lac_attn_args *args, int64_t s)
{
    const int64_t *at = args->starts;
    int64_t n = 1;
    while (s + n < args->sequences && at[s + n + 1] - at[s + n] == at[s + 1] - at[s]) n++;
    return n;
}

/* draws that the sequences use */
static uint64_t draws(const lac_a_attend *a, int64_t rows, int64_t items)
{
    return (uint64_t)items * (uint64_t)a->plan->desc.heads * (uint64_t)rows * (uint64_t)rows;
}

int lac_packed_attend(const lac_a_attend *all, const lac_attn_args *args)
{
    int device = args->q->device;
    uint64_t draw = 0;
    if (!args->sequences) return lac_fp8_attend(all, device);
    for (int64_t s = 0, items; s < args->sequences; s += items) {
        int64_t rows = args->starts[s + 1] - args->starts[s];
        items = alike(args, s);
        if (!rows) continue;
        lac_plan placed;
        lac_a_attend a = part(all, args->starts[s], rows, items, &placed);
        a.draw = draw;
        draw += draws(all, rows, items);
        LAC_TRY(lac_fp8_attend(&a, device));
    }
    return 0;
}

int lac_packed_attend_bwd(const lac_a_attend_bwd *all, const lac_attn_args *args)
{
    int device = args->q->device;
    uint64_t draw = 0;
    if (!args->sequences) return lac_parts_attend_bwd(all, device);
    for (int64_t s = 0, items; s < args->sequences; s += items) {
        int64_t at = args->starts[s], rows = args->starts[s + 1] - at;
        items = alike(args, s);
        if (!rows) continue;
        lac_plan placed;
        lac_a_attend_bwd a = *all;
        a.forward = part(&all->forward, at, rows, items, &placed);
        a.forward.draw = draw;
        draw += draws(&all->forward, rows, items);
        lac_view *const views[] = {&a.dout, &a.dlse, &a.dq, &a.dk, &a.dv};
        for (size_t i = 0; i < sizeof views / sizeof *views; i++) cut(views[i], 1, at, rows, items);
        cut_square(&a.dbias, at, rows, items);
        LAC_RUN(attend_bwd, device, &a);
    }
    return 0;
}
