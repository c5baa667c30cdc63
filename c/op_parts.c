/* op_parts.c: the backward of attention on a device, a part of a long sequence or of a large batch at a time.
 *
 * Beside tensors, the backward of 16-bit inputs needs f32 sums and statistics, about as much as its results take. But
 * nothing attends across the end of a window, the longest segment, if that is a multiple of all others. So batch items
 * and runs of windows are calls of their own: slices of the same tensors, with the plan placed at their length
 * (lac_plan_place()), one after the other. They use the same scratch memory, which then does not grow with the
 * sequence, and give the same bits. A part has at least 2^19 rows in all branches and heads, which keep a device busy;
 * smaller parts would need less memory, and lose more of their time at their ends (lac_plan_parts()).
 *
 * Not cut: calls on a CPU, whose tasks hold little; of f32 and f64, which need no sums beside their results; with
 * options whose tensors or numbers count from the beginning of the call (masks, bias, blocks, lengths, dropout).
 * Rejected: parts of heads (offsets of lattices count the heads of the whole); cutting the forward too (its sums are
 * gone before the gradients come, which take more).
 */
#include "op_attn.h"

static bool whole(const lac_a_attend_bwd *a, int device)
{
    const lac_a_attend *f = &a->forward;
    return device == LAC_CPU || lac_dtype_size(f->q.dtype) != 2 || f->lengths.data || f->mask.data || f->bias.data ||
           f->blocks.data || f->dropout > 0;
}

static void cut(lac_view *v, int batch_axis, int64_t item, int64_t items, int64_t at, int64_t rows)
{
    if (!v->data) return;
    int64_t elements = item * v->stride[batch_axis] + at * v->stride[batch_axis + 1];
    v->data = (char *)v->data + elements * (int64_t)lac_dtype_size(v->dtype);
    v->shape[batch_axis] = items;
    v->shape[batch_axis + 1] = rows;
}

static int run_part(const lac_a_attend_bwd *all, int device, int64_t item, int64_t items, int64_t at, int64_t rows)
{
    lac_plan placed;
    lac_a_attend_bwd a = *all;
    lac_a_attend *f = &a.forward;
    lac_view *const views[] = {&f->q,   &f->k,   &f->v, &f->padding, &f->out, &f->lse,
                               &a.dout, &a.dlse, &a.dq, &a.dk,       &a.dv};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) cut(views[i], 0, item, items, at, rows);
    cut(&f->branch_lse, 1, item, items, at, rows);
    lac_plan_place(f->plan, items, rows, rows, 0, &placed);
    f->plan = &placed;
    LAC_RUN(attend_bwd, device, &a);
    return 0;
}

int lac_parts_attend_bwd(const lac_a_attend_bwd *a, int device)
{
    const lac_attn_desc *d = &a->forward.plan->desc;
    int64_t items, rows;
    lac_plan_parts(a->forward.plan, &items, &rows);
    if (whole(a, device) || (items == d->batch && rows == d->n)) {
        LAC_RUN(attend_bwd, device, a);
        return 0;
    }
    for (int64_t item = 0; item < d->batch; item += items)
        for (int64_t at = 0; at < d->n; at += rows)
            LAC_TRY(run_part(a, device, item, items < d->batch - item ? items : d->batch - item, at,
                             rows < d->n - at ? rows : d->n - at));
    return 0;
}
