/* attn_hopper_forward.cu: the forward of attention on Hopper: which calls it serves, its launch, and what is done
 * again.
 *
 * One persistent launch serves all branches: a thread block for each multiprocessor, of one warpgroup whose threads
 * feed the others (attn_hopper_forward.cuh) and two or three with 64 query rows each (attn_hopper_rows.cuh). Tiles are
 * claimed from a counter, those of earlier phases first. Branches that meet in a row are merged in attn.cuh's order,
 * but a merged softmax is carried from branch to branch: a tile starts from the sums of earlier ones.
 *
 * Floor: 4 D products a pair at 4096 a clock and multiprocessor, and an exponential a pair at 16 a clock: for D = 64
 * both take the same time, for D = 128 products decide. kernels/HOPPER.md has the record of what was measured.
 */
#include "attn_hopper_launch.cuh"
#include "attn_slow.cuh"

static __device__ int hopper_claims[2], hopper_spoilt; /* spoilt: the number of the last call that was */

/* ---- values that are not finite ---- */

/* A masked pair is a product with zero, and zero times NaN is NaN: rows that are not finite are computed again from the
 * pairs that they see (attn_slow.cuh). */
template <class T, class A>
__global__ void __launch_bounds__(THREADS) attn_hopper_redo_kernel(const __grid_constant__ A a, int call)
{
    previous_done();
    if (hopper_spoilt != call) return;
    hopper_redo<T>(a, [&](const attn_tile &t, int i) { attn_slow_forward<T>(a, t, i); });
}

/* ---- the host's side ---- */

const char *attn_hopper_forward_fits(const lac_a_attend *f)
{
    const lac_view *read[] = {&f->q, &f->k, &f->v};
    const char *why = lac_plan_no_hopper(f->plan, f->q.dtype);
    if (!why) why = hopper_no_pairs(f);
    if (why) return why;
    if (f->scale < 0) return "the scale is negative";
    for (int i = 0; i < 3; i++)
        if (!hopper_readable(read[i], &why)) return why;
    static int compiled = -1; /* unknown; asking takes microseconds */
    if (compiled < 0)
        compiled = hopper_compiled((const void *)attn_hopper_forward_kernel<bf16, 64, false, HOPPER_PLAIN, false>);
    if (!compiled) return "the device is not a Hopper, or the plug-in was not compiled for sm_90a";
    return NULL;
}

/* Branches that differ in their offsets alone take turns: rows of one offset lie in few channels of the memory. A turn
 * is all tiles of an item, which share its keys: tile by tile, half as many would read them at a time, and half of them
 * would come from memory twice. Not so where causal, because heavy tiles of many items come first. */
static int turns_of(const attn_args &a)
{
    for (int g = 0; g < a.branches; g++) {
        const attn_branch &x = a.branch[g], &y = a.branch[0];
        if (a.ranks > 1 || x.segment != y.segment || x.dilation != y.dilation || x.tiles != y.tiles) return 1;
    }
    return a.branches;
}

/* Of branch g: segments, items and heads whose tiles are interleaved, so that heavy tiles come first. */
static int interleaved(const attn_args &a, int g, int64_t rows, int64_t items, int turns)
{
    enum { BYTES = 16 << 20 };
    const int64_t n = a.causal && a.branch[g].rank == a.ranks - 1 ? BYTES / (rows * a.head_dim * 4 * turns) : 1;
    return (int)(n < 1 ? 1 : n > items ? items : n);
}

static bool small_blocks(const attn_pair_args &a)
{
    if (!a.block || a.head_dim > 64) return false;
    for (int g = 0; g < a.branches; g++)
        if (attn_pieces(a.branch[g], a.block, 64) > 1) return false;
    return true;
}

static hopper_divisor divisor(int d)
{
    uint32_t bits = 0;
    while ((int64_t)1 << bits < d) bits++;
    return {(uint32_t)((((uint64_t)1 << (31 + bits)) + (uint64_t)d - 1) / (uint64_t)d), bits};
}

static hopper_lattices lattices_of(const attn_args &a)
{
    hopper_lattices x = {};
    x.heads = divisor(a.heads), x.n = divisor(a.n);
    for (int g = 0; g < a.branches; g++) {
        const attn_branch &b = a.branch[g];
        const int r = b.dilation, mod = a.offset_rule == LAC_OFFSET_MOD, block = a.offset_rule == LAC_OFFSET_BLOCK;
        x.branch[g] = {divisor(b.segment),       divisor(r), divisor(mod ? r : (a.heads - 1) / r + 1),
                       mod || block ? 0 : g % r, mod,        mod ? -r : block};
    }
    return x;
}

template <class T, class A> static int redo(const A &a, int call)
{
    const int64_t rows = (int64_t)a.batch * a.n * a.heads;
    launch(attn_hopper_redo_kernel<T, A>, blocks_filling(rows, THREADS / 32, 2), THREADS, 0, a, call);
    return lac_cuda_launched("attention");
}

template <class T> static int launch(const hopper_forward_args &p, int options)
{
    const int status = p.a.head_dim > LAC_HOPPER_WIDE ? attn_hopper_forward_wide<T>(p)
                       : p.a.block                    ? attn_hopper_forward_blocks<T>(p)
                       : options & HOPPER_ADDED       ? attn_hopper_forward_added<T>(p)
                       : options & HOPPER_PADDED      ? attn_hopper_forward_padded<T>(p)
                       : options                      ? attn_hopper_forward_pairs<T>(p)
                                                      : launch_shape<T, HOPPER_PLAIN, false>(p);
    LAC_TRY(status);
    if (!p.masks) return 0;
    return options || p.a.block ? redo<T>(p.a, p.call) : redo<T>((const attn_args &)p.a, p.call);
}

int attn_hopper_prepare(hopper_forward_args &p, attn_pair_args &a, const lac_a_attend *f, bool gaps,
                        const hopper_kept *padding)
{
    static int calls;
    const lac_plan *plan = f->plan;
    int64_t tiles;
    p = {};
    const bool added = hopper_options(a) & HOPPER_ADDED, high = a.head_dim <= 64 && !a.block && !f->fp8 && !added;
    p.small = small_blocks(a);
    LAC_TRY(attn_number(a, plan, false, p.small ? 64 : high ? 192 : 128, &tiles, a.block));
    p.tiles = (int)tiles;
    p.turns = turns_of(a);
    p.each = a.causal || a.block ? 1 : a.branch[0].blocks;
    p.masks = a.causal || a.window >= 0 || a.block || a.padding || added;
    p.call = ++calls;
    for (int g = 0; g < a.branches; g++) {
        const attn_branch &b = a.branch[g];
        const int64_t rows = (min((int64_t)b.segment, plan->desc.m) - 1) / b.dilation + 1;
        const int64_t items = (int64_t)a.batch * b.segments * b.heads;
        p.items[g] = (int)items;
        p.together[g] = interleaved(a, g, rows, items, p.turns);
        while (a.branch[p.same[g]].dilation != b.dilation) p.same[g]++;
        if (p.same[g] < g) continue;
        LAC_TRY(hopper_map(&p.map[g].q, &f->q, b.dilation, 64));
        const int keys = a.head_dim > LAC_HOPPER_WIDE ? HOPPER_KEYS_WIDE : a.block ? HOPPER_KEYS / 2 : HOPPER_KEYS;
        LAC_TRY(hopper_map(&p.map[g].k, &f->k, b.dilation, keys));
        LAC_TRY(hopper_map(&p.map[g].v, &f->v, b.dilation, keys));
        LAC_TRY(hopper_map(&p.map[g].out, &f->out, b.dilation, 64));
    }
    p.q_step = hopper_batch_step(&f->q), p.k_step = hopper_batch_step(&f->k), p.v_step = hopper_batch_step(&f->v);
    p.out_step = hopper_batch_step(&f->out);
    p.a = a;
    p.gaps = gaps;
    if (gaps || a.ranks > 1) p.lattices = lattices_of(a);
    static void *claims, *spoilt;
    if (!claims) CUDA_TRY("attention", cudaGetSymbolAddress(&claims, hopper_claims));
    if (!spoilt) CUDA_TRY("attention", cudaGetSymbolAddress(&spoilt, hopper_spoilt));
    p.claims = (decltype(p.claims))claims, p.spoilt = (decltype(p.spoilt))spoilt;
    p.dropout = hopper_dropout_of(a);
    p.padding = padding;
    return 0;
}

int attn_hopper_forward(attn_pair_args &a, const lac_a_attend *f, bool gaps, const hopper_kept *padding)
{
    hopper_forward_args p;
    LAC_TRY(attn_hopper_prepare(p, a, f, gaps, padding));
    if (p.tiles == 0 && !gaps) return 0;
    const int options = hopper_options(a);
    return f->q.dtype == LAC_F16 ? launch<f16>(p, options) : launch<bf16>(p, options);
}
