/* plan_fp8.h: the memory that fp8 takes on a GPU while a call runs; for the plug-in and for what plans say of
 * themselves.
 */
#ifndef LAC_PLAN_FP8_H
#define LAC_PLAN_FP8_H
#include "plan.h"

/* Eight bits on a GPU (kernels/attn_hopper_fp8.cuh): memory beside tensors while a call runs. q and k are rounded row
 * by row, `wide` bytes each; values lie as items of [head_dim, keys], `items` for each batch item, segment and branch:
 * `share` neighbouring heads have one, from number `first` on. Offsets are bytes. */
typedef struct lac_fp8_space {
    int64_t wide, q, k, bytes;
    struct {
        int64_t at, keys, first, items, share;
    } v[LAC_MAX_BRANCHES];
} lac_fp8_space;
static inline int64_t lac_round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static inline void lac_plan_fp8_space(const lac_plan *p, lac_fp8_space *x)
{
    const lac_attn_desc *d = &p->desc;
    x->wide = lac_round_up(d->head_dim, 16);
    x->q = lac_round_up(2 * d->batch * (d->heads + 2 * d->kv_heads) * 4, 256); /* maxima and scales */
    x->k = x->q + lac_round_up(d->batch * d->n * d->heads * x->wide, 256);
    x->bytes = x->k + lac_round_up(d->batch * d->m * d->kv_heads * x->wide, 256);
    for (int g = 0; g < d->branches; g++) {
        int64_t first = 0, last = 0, most = p->segment[g] < d->m ? p->segment[g] : d->m;
        lac_plan_segments(p, g, &first, &last);
        const bool one = d->dilation[g] == 1 || d->offset_rule == LAC_OFFSET_BRANCH; /* lattice for all heads */
        x->v[g].at = x->bytes;
        x->v[g].keys = lac_round_up((most - 1) / d->dilation[g] + 1, 16);
        x->v[g].share = one ? d->heads / d->kv_heads : 1;
        x->v[g].first = p->head0[g] / x->v[g].share;
        x->v[g].items = p->heads[g] ? (p->head0[g] + p->heads[g] - 1) / x->v[g].share - x->v[g].first + 1 : 0;
        x->bytes += lac_round_up(
            d->batch * (last > first ? last - first : 0) * x->v[g].items * d->head_dim * x->v[g].keys, 256);
    }
}

#endif
