/* plan.h: an attention plan as back ends see it, and the argument structs of attend and attend_bwd.
 *
 * A plan is a validated description plus everything that follows from it: strips, the phases in which branches may
 * run, and counts. It is immutable after lac_plan_get(), so that any number of threads can run it at once.
 *
 * Geometry. Queries have positions n + shift (shift = M - N if aligned to the end, else 0), keys have positions
 * 0 .. M - 1. Inside one segment of one branch the kept positions form a lattice base + i r; both queries and keys
 * are numbered by i, so causality is j <= i and a window of W positions is |i - j| <= W / r, whatever the dilation.
 * lac_span_get() is the only place that knows how a segment is cut; the CPU and CUDA back ends both call it.
 *
 * Phases. Branches whose strips share no (row, head) may run at the same time; others run one after the other, in
 * the order of the branches, because a merge reads what the earlier branches left. The backward has phases of its
 * own: with grouped heads two strips can also meet in the rows of dk and dv.
 *
 * Dropout of the pair (b, h, query row n, key row j) is draw `draw` + ((b H + h) N + n) M + j of the stream (seed,
 * offset) in the mapping of rng.h for 32-bit draws: exactly what lac_dropout does to a dense f32 [B, H, N, M] tensor.
 * It does not depend on the branch: a pair that several branches keep is dropped in all of them or in none.
 *
 * Options of single pairs (mask, bias, slopes) are tensors of the call, not of the plan. They are indexed by tensor
 * rows, whatever the lattice, and apply in every branch alike: a branch's pair is visible if the plan and the mask
 * say so, and its score is scale q.k + bias - slope |p - j|. Blocks are a mask too, of squares of tensor rows, but
 * tiles without an active block are not computed at all: a block of a strided lattice is what the lattice keeps of it.
 */
#ifndef LAC_PLAN_H
#define LAC_PLAN_H
#include "backend.h"

/* Tile sizes of the CPU back end; here because the plan reports how much working memory they take. */
enum {
    LAC_ATTN_QUERIES = 1056,        /* most query rows of one forward task */
    LAC_ATTN_BLOCKS_QUERIES = 4096, /* and where there are active blocks in parts */
    LAC_ATTN_QUERIES_LEAST = 240,
    LAC_ATTN_KEYS = 512,      /* keys of one forward tile, and columns of a score row, */
    LAC_ATTN_KEYS_WIDE = 256, /* if rows are longer than LAC_ATTN_WIDE: the packed tile has to fit the second cache */
    LAC_ATTN_WIDE = 64,
    LAC_ATTN_ROWS = 24,           /* query rows that a score tile holds: a multiple of every micro-kernel's height */
    LAC_ATTN_FEW = 8,             /* up to so many query rows of a segment meet their keys without packing, */
    LAC_ATTN_FEW_ALL = 128,       /* if this many at most share the keys, */
    LAC_ATTN_FEW_AHEAD = 16,      /* asking for so many rows ahead, */
    LAC_ATTN_FEW_KEYS = 32,       /* so many keys at a time */
    LAC_ATTN_KEY_RUN = 1024,      /* most keys of one backward task, */
    LAC_ATTN_BLOCKS_RUN = 2048,   /* and where there are blocks, of which few share the price of loading a row */
    LAC_ATTN_PARTS_RUN = 4096,    /* with blocks in parts, whose rows are dearer, */
    LAC_ATTN_KEY_RUN_LEAST = 384, /* and least of one chunk */
    LAC_ATTN_BQUERIES = 768,      /* most query rows that a backward task holds */
    LAC_ATTN_BKEYS = 128,         /* keys and query rows of one backward tile */
    LAC_ATTN_BROWS = 96,
    LAC_ATTN_BLOCKS_ROWS = 256, /* query rows of a row of blocks in parts that a backward task holds */
    LAC_ATTN_PARTS_LEAST = 32,  /* head dimension from which the matrix unit multiplies, */
    LAC_ATTN_PARTS_BLOCK = 128, /* and rows of an active block, in the thinnest lattice */
    LAC_ATTN_BLOCK = 16,        /* least rows of a block of a block mask */
    LAC_ATTN_GROUP = 64,        /* most query rows of a block that meet their keys together, */
    LAC_ATTN_GROUPS = 128,      /* and where there are blocks, tasks begin at multiples of so many rows */
    LAC_ATTN_THREAD_TASKS = 4,  /* tasks of a thread, if there is work enough */
    LAC_ATTN_TASKS = 16         /* backward chunks of a phase, if there is work enough; with branches' deltas half */
};

/* The heads of one branch that share a key/value head and an offset: what one backward task owns. */
typedef struct lac_unit {
    int32_t branch, kv_head, first, heads; /* plan->unit_heads[first .. first + heads) */
    int64_t offset;
} lac_unit;

struct lac_plan {
    atomic_int references;
    lac_attn_desc desc;
    lac_plan_info info;                /* all but rows and references, which lac_plan_describe() fills */
    int64_t shift;                     /* position of query row 0 */
    int64_t segment[LAC_MAX_BRANCHES]; /* clamped to the largest position + 1: one segment then */
    int32_t head0[LAC_MAX_BRANCHES], heads[LAC_MAX_BRANCHES];
    int32_t forward_phase[LAC_MAX_BRANCHES], backward_phase[LAC_MAX_BRANCHES];
    int32_t forward_phases, backward_phases;
    int32_t units;
    lac_strip *strips;
    lac_unit *unit; /* sorted by branch */
    int32_t *unit_heads;
};

/* keys of one forward tile */
static inline int64_t lac_attn_tile_keys(int64_t head_dim)
{
    return head_dim > LAC_ATTN_WIDE ? LAC_ATTN_KEYS_WIDE : LAC_ATTN_KEYS;
}

/* weight of one branch's output in the sum */
static inline double lac_plan_gscale(const lac_plan *p)
{
    return p->desc.merge == LAC_MERGE_MEAN ? 1.0 / p->desc.branches : 1.0;
}
/* does every head run several branches, so that rows have one softmax per branch beside the merged one? */
static inline bool lac_plan_many(const lac_plan *p)
{
    return p->desc.heads_scheme == LAC_HEADS_ALL && p->desc.branches > 1;
}
/* is the softmax over each branch alone (mean, sum) and has branch_lse to be kept for the backward? */
static inline bool lac_plan_branch_softmax(const lac_plan *p)
{
    return lac_plan_many(p) && (p->desc.merge == LAC_MERGE_MEAN || p->desc.merge == LAC_MERGE_SUM);
}
/* does the backward need one delta per branch, hence a pass over scores of its own? */
static inline bool lac_plan_branch_delta(const lac_plan *p)
{
    return lac_plan_branch_softmax(p) || (lac_plan_many(p) && p->desc.merge == LAC_MERGE_LSE_DETACH);
}

/* How many keys a chunk of the CPU's backward has in a phase (c/cpu/attn.c): enough chunks for many threads, but keys
 * enough to pay for packing. */
int64_t lac_plan_key_chunk(const lac_plan *p, int32_t phase);
/* Does a chunk hold all keys of any segment of the branch? Then the scores for its deltas need not be made twice. */
bool lac_plan_key_whole(const lac_plan *p, int32_t branch);

/* Kernels for Hopper (sm_90a) do a part of all plans: NULL, or what of plan and dtype they cannot do. The rest depends
 * on the call (attn_hopper_forward_fits). Above head_dim LAC_HOPPER_WIDE there is the forward alone, without options of
 * pairs, padding, dropout, blocks and fp8. Pays: no branch has so few rows a segment, or a block (0: there are none),
 * that tiles would be mostly empty. */
enum { LAC_HOPPER_BRANCHES = 16, LAC_HOPPER_ROWS = 64, LAC_HOPPER_WIDE = 128, LAC_HOPPER_WIDEST = 256 };
static inline const char *lac_plan_no_hopper(const lac_plan *p, int dtype)
{
    const lac_attn_desc *d = &p->desc;
    if (dtype != LAC_BF16 && dtype != LAC_F16) return "tensors are neither f16 nor bf16";
    if (d->head_dim > LAC_HOPPER_WIDEST || d->head_dim % 8) return "head_dim is above 256 or no multiple of 8";
    if (d->dedup) return "pairs that several branches keep are to be counted once";
    if (d->branches > LAC_HOPPER_BRANCHES) return "there are more than 16 branches";
    return NULL;
}
/* the same for what is not the plain forward */
static inline const char *lac_plan_no_hopper_beyond(const lac_plan *p, int dtype)
{
    const char *why = lac_plan_no_hopper(p, dtype);
    return !why && p->desc.head_dim > LAC_HOPPER_WIDE ? "head_dim is above 128" : why;
}
static inline bool lac_plan_hopper_pays(const lac_plan *p, int64_t block)
{
    for (int g = 0; g < p->desc.branches; g++) {
        int64_t w = p->segment[g] < p->desc.n ? p->segment[g] : p->desc.n;
        if (block > 0 && block < w) w = block;
        if ((w - 1) / p->desc.dilation[g] + 1 < LAC_HOPPER_ROWS) return false;
    }
    return true;
}

/* The backward in one pass has active blocks, of `block` rows, if its tiles of keys lie in one block each: NULL, or why
 * not with this plan. */
enum { LAC_HOPPER_BLOCK = 128 }; /* keys of such a tile */
static inline const char *lac_plan_no_hopper_blocks(const lac_plan *p, int64_t block)
{
    const lac_attn_desc *d = &p->desc;
    if (p->shift != 0) return "with a block_mask, and queries aligned to the end of the keys";
    for (int g = 0; g < d->branches; g++) {
        const int64_t r = d->dilation[g], w = p->segment[g];
        if (block % LAC_HOPPER_BLOCK || block / LAC_HOPPER_BLOCK % r)
            return "blocks are not multiples of 128 rows of a branch";
        if (w % block && (w < d->n || w < d->m)) return "segments are not made of whole blocks";
    }
    return NULL;
}

/* Does the backward of 16-bit tensors on a GPU take one pass, in which tiles of keys add to sums of dq in f32? Not
 * above head_dim 128, nor where blocks of 64 rows would be mostly empty. Its options may say no as well. */
static inline bool lac_plan_one_pass(const lac_plan *p)
{
    if (p->desc.head_dim > 128 || p->desc.heads / p->desc.kv_heads > 32) return false;
    for (int g = 0; g < p->desc.branches; g++) {
        int64_t w = p->segment[g] < p->desc.n ? p->segment[g] : p->desc.n;
        if ((w - 1) / p->desc.dilation[g] + 1 < LAC_HOPPER_ROWS / 2) return false;
    }
    return true;
}

/* In one pass dk and dv of branches that meet are summed in 24 bits (kernels/attn_sums.cuh): sixteen lie in their own
 * memory, eight in that of dq, which is written later. Bytes beside these: none, unless there are more rows of keys
 * than of queries; then the eight have memory of their own. */
static inline int64_t lac_plan_sum_bytes(const lac_plan *p)
{
    const int64_t queries = p->desc.batch * p->desc.n * p->desc.heads;
    const int64_t keys = p->desc.batch * p->desc.m * p->desc.kv_heads;
    return p->backward_phases == 1 || keys <= queries ? 0 : 2 * keys * p->desc.head_dim;
}

/* Parts in which the backward of 16-bit tensors runs on a device (op_parts.c): batch items and rows of one; all of them
 * if it is not cut. */
void lac_plan_parts(const lac_plan *p, int64_t *items, int64_t *rows);

/* offset of the lattice that head `head` keeps in branch `branch` */
static inline int64_t lac_plan_offset(const lac_attn_desc *d, int32_t branch, int32_t head)
{
    int64_t r = d->dilation[branch];
    if (d->offset_rule == LAC_OFFSET_BRANCH) return branch % r;
    if (d->offset_rule == LAC_OFFSET_MOD) return head % r;
    int64_t per = (d->heads - 1) / r + 1; /* ceil(H / r) */
    return head / per;
}

/* One segment of one lattice: row i has position base + i r; queries are q0 <= i < q1, keys 0 <= i < keys. */
typedef struct lac_span {
    int64_t base, q0, q1, keys;
} lac_span;

/* how many lattice points base, base + r, ... are below `end` */
static inline int64_t lac_lattice_count(int64_t base, int64_t r, int64_t end)
{
    return end > base ? (end - base - 1) / r + 1 : 0;
}

static inline lac_span lac_span_get(const lac_plan *p, int32_t branch, int64_t offset, int64_t segment)
{
    int64_t w = p->segment[branch], r = p->desc.dilation[branch], end = (segment + 1) * w;
    int64_t q_end = p->shift + p->desc.n, m = p->desc.m;
    lac_span s = {.base = segment * w + offset};
    s.q0 = lac_lattice_count(s.base, r, p->shift < end ? p->shift : end);
    s.q1 = lac_lattice_count(s.base, r, q_end < end ? q_end : end);
    s.keys = lac_lattice_count(s.base, r, m < end ? m : end);
    return s;
}

/* the segments that hold queries: [*first, *last) */
static inline void lac_plan_segments(const lac_plan *p, int32_t branch, int64_t *first, int64_t *last)
{
    int64_t w = p->segment[branch], start = p->shift > 0 ? p->shift : 0;
    *first = start / w;
    *last = (p->shift + p->desc.n - 1) / w + 1;
}

/* Row i attends to the keys lattice_low(i) <= j < lattice_high(i) of its span (before padding, dedup). Windows
 * are in lattice steps: lac_plan_window() gives keys that may follow and precede a row. */
typedef struct lac_band {
    int64_t after, before; /* j <= i + after, j >= i - before */
} lac_band;
static inline lac_band lac_plan_band(const lac_plan *p, int32_t branch)
{
    int64_t reach = p->desc.window < 0 ? INT64_MAX / 4 : p->desc.window / p->desc.dilation[branch];
    return (lac_band){.after = p->desc.causal ? 0 : reach, .before = reach};
}

/* Decoding: `plan` with its run-time sizes replaced (`batch` items, n queries from `position` on, keys up to position
 * m - 1), in memory of the caller, which must not outlive `plan`. Nothing is allocated and nothing depends on m but a
 * few clamped segments, so that a token costs the same at any position. Positions stay below plan->desc.m. */
void lac_plan_place(const lac_plan *plan, int64_t batch, int64_t n, int64_t m, int64_t position, lac_plan *placed);
/* the smallest position that a query at `position`, or at any later one, may attend to */
int64_t lac_plan_reach_from(const lac_plan *plan, int64_t position);

/* Views not given have data NULL. */
struct lac_a_attend {
    const lac_plan *plan;
    lac_view q, k, v; /* [B, N, H, D], [B, M, Hk, D]; one float dtype, any strides */
    lac_view padding; /* [B, M] bool, true = keep */
    lac_view lengths; /* [B] i64 or i32 */
    lac_view mask;    /* [B, H, N, M] bool, expanded; true = attend */
    lac_view bias;    /* [B, H, N, M], expanded, of q's dtype or f32 (f16, bf16): -inf hides the pair */
    lac_view slopes;  /* [H], f32 (f64 for f64) */
    lac_view blocks;  /* [B, H, blocks of queries, blocks of keys] bool, expanded: which pairs there are at all */
    int64_t block;    /* rows and keys of a block */
    double scale;     /* finite, not 0 */
    double dropout;   /* [0, 1) */
    uint64_t seed, offset;
    int32_t kernel;      /* LAC_KERNEL_* */
    bool fp8;            /* q, k and v rounded to e4m3: for the CPU by the front end (op_fp8.c), else by the back end */
    uint64_t draw;       /* added to a pair's number: sequences of one packed call have draws of their own */
    lac_view out;        /* [B, N, H, D] contiguous, of q's dtype */
    lac_view lse;        /* [B, N, H] contiguous, f32 (f64 for f64): of the merged softmax */
    lac_view branch_lse; /* [G, B, N, H], contiguous but for the first axis; only if lac_plan_branch_softmax() */
};

/* NULL, or the first option of single pairs that a call has, in words: these run instances of their own */
static inline const char *lac_attend_pairs(const struct lac_a_attend *a)
{
    if (a->mask.data) return "there is a mask";
    if (a->bias.data) return "there is a bias";
    if (a->slopes.data) return "there are alibi slopes";
    return a->blocks.data ? "there is a block_mask" : NULL;
}

struct lac_a_attend_bwd {
    lac_a_attend forward; /* out, lse and branch_lse as the forward left them, any strides */
    lac_view dout, dlse;  /* [B, N, H, D], [B, N, H]; any strides; dlse of lse's dtype */
    lac_view dq, dk, dv;  /* contiguous, shapes and dtype of q, k, v */
    lac_view dbias;       /* [B, H, N, M] f32 (f64 for f64), any strides, zeros on entry: one gradient a pair */
};

#endif
