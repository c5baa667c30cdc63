/* attn_hopper_keys.cu: instances of the backward's tiles on Hopper (attn_hopper_keys.cuh), and their launch.
 */
#include "attn_hopper_keys.cuh"

static int make_branch(hopper_keys_branch &b, const attn_args &a, const hopper_args &h, const lac_a_attend_bwd *w,
                       int g)
{
    const lac_view *view[] = {&w->forward.q, &w->forward.k, &w->forward.v, &w->dout, &w->dk, &w->dv};
    CUtensorMap *map[] = {&b.q, &b.k, &b.v, &b.g, &b.dk, &b.dv};
    const int r = a.branch[g].dilation;
    for (int i = 0; i < 6; i++) LAC_TRY(hopper_map(map[i], view[i], r, HOPPER_ROWS));
    b.blocks = h.branch[g].blocks, b.dilation = r;
    b.before = a.window < 0 ? 1 << 30 : a.window / r;
    b.after = a.causal ? 0 : b.before;
    b.rank = a.branch[g].rank, b.meets = a.ranks > 1;
    b.awaits = h.branch[g].awaits, b.needs = h.branch[g].needs * attn_hopper_groups(a.head_dim, h.steps);
    return 0;
}

/* with options of pairs the masks are looked at in any case: half as many instances */
template <class T, int D> static int launch(const hopper_keys_args &p, bool masks)
{
    switch (hopper_options(p.a)) {
    case HOPPER_PAIRS:
        return launch_keys<T, D, true, HOPPER_PAIRS>(p);
    case HOPPER_PADDED:
        return launch_keys<T, D, true, HOPPER_PADDED>(p);
    case HOPPER_PADDED | HOPPER_PAIRS:
        return launch_keys<T, D, true, HOPPER_PADDED | HOPPER_PAIRS>(p);
    case HOPPER_ALL:
        return launch_keys<T, D, true, HOPPER_ALL>(p);
    }
    return masks ? launch_keys<T, D, true, HOPPER_PLAIN>(p) : launch_keys<T, D, false, HOPPER_PLAIN>(p);
}

int attn_hopper_keys(const attn_pair_args &a, const hopper_args &h, const lac_a_attend_bwd *w,
                     const hopper_kept *padding)
{
    hopper_keys_args p = {};
    const lac_view *view[] = {&w->forward.q, &w->forward.k, &w->forward.v, &w->dout, &w->dk, &w->dv};
    const bool masks = a.causal || a.window >= 0;
    for (int g = 0; g < a.branches; g++) LAC_TRY(make_branch(p.branch[g], a, h, w, g));
    for (int i = 0; i < 6; i++) p.batch_step[i] = hopper_batch_step(view[i]);
    p.a = a;
    p.tile = h.tile, p.tiles = h.tiles, p.late_first = h.late_first;
    p.stats = h.stats, p.dq = h.dq, p.turn = h.turn, p.counter = h.counter, p.ready = h.ready, p.spoilt = h.spoilt;
    p.heads_each = a.group;
    p.masks = masks || a.lengths || a.mask || a.bias || a.block;
    p.padding = padding;
    p.log2_scale = a.log2_scale, p.masked = a.scale > 0 ? -INFINITY : INFINITY;
    p.weight = (float)(a.gscale * a.keep_scale), p.scale = (float)a.scale;
    p.dropout = hopper_dropout_of(a);
    const bool half = w->forward.q.dtype == LAC_F16;
    p.steps = h.steps, p.scales = h.scales;
    for (int g = 0; g < a.branches; g++) p.place[g] = h.place[g];
    if (a.block) return attn_hopper_block_keys(p, half, masks);
    if (a.head_dim <= 64) return half ? launch<f16, 64>(p, masks) : launch<bf16, 64>(p, masks);
    return half ? launch<f16, 128>(p, masks) : launch<bf16, 128>(p, masks);
}

bool attn_hopper_keys_exist(void)
{
    return hopper_compiled((const void *)attn_hopper_keys_kernel<bf16, 64, true, HOPPER_PLAIN>);
}
