/* plan.c: from the description of a dilated attention to a validated, cached plan.
 *
 * A description is checked once, here; the kernels never see a wrong one. The checks that need a sentence for people
 * come first, then the arithmetic: strips (neighbouring heads with equal branch and offset), units (heads that share
 * keys, for the backward), phases (which branches may not run at the same time), and counts.
 *
 * Pairs are counted without enumerating them: all segments that hold a full set of queries and keys are equal, so
 * at most a handful is looked at, and inside one segment the pairs between two diagonals of the index lattice are
 * sums of clamped arithmetic series.
 *
 * Whether two strips share rows is decided exactly where both lattices run through the whole sequence (the
 * dilation divides the segment, or there is one segment): residues modulo the common divisor. Where a lattice
 * restarts in every segment the answer is "yes" (conservative): an exact answer costs an enumeration of N rows and
 * would only let two branches of unequal shape run at the same time. LAC_MAX_BRANCHES bounds all tables.
 *
 * Plans live in one LRU (lru.h) and are reference-counted: eviction never pulls a plan from under a running kernel.
 */
#include "plan.h"
#include "lru.h"
#include <stdio.h>
#include <string.h>

enum { LAC_HEADS_MAX = 65536, LAC_PLANS_CACHED = 128 };
#define LAC_POSITIONS_MAX ((int64_t)1 << 60)
#define LAC_NONNULL(p, name)                                                                                           \
    if (!(p)) LAC_FAIL(ARGUMENT, "plan: %s is a null pointer", name)

static void plan_retain(void *plan) { atomic_fetch_add(&((lac_plan *)plan)->references, 1); }
static void plan_drop(void *plan) { lac_plan_drop(plan); }
static lac_lru plans = LAC_LRU_INIT(LAC_PLANS_CACHED, plan_retain, plan_drop);

/* ---- validation ---- */

static int check_sizes(const lac_attn_desc *d)
{
    const struct {
        const char *name;
        int64_t value, most;
    } sizes[] = {{"batch", d->batch, LAC_POSITIONS_MAX},
                 {"the number of queries (N)", d->n, LAC_POSITIONS_MAX},
                 {"the number of keys (M)", d->m, LAC_POSITIONS_MAX},
                 {"heads", d->heads, LAC_HEADS_MAX},
                 {"kv_heads", d->kv_heads, LAC_HEADS_MAX},
                 {"head_dim", d->head_dim, LAC_HEADS_MAX},
                 {"the number of branches", d->branches, LAC_MAX_BRANCHES}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most)
            LAC_FAIL(ARGUMENT, "attention: %s must be from 1 to %lld, got %lld", sizes[i].name,
                     (long long)sizes[i].most, (long long)sizes[i].value);
    if (d->heads % d->kv_heads)
        LAC_FAIL(ARGUMENT, "attention: heads must be a multiple of kv_heads: %d %% %d = %d", d->heads, d->kv_heads,
                 d->heads % d->kv_heads);
    int64_t elements, longest = d->n > d->m ? d->n : d->m;
    if (__builtin_mul_overflow(d->batch, longest, &elements) || __builtin_mul_overflow(elements, d->heads, &elements) ||
        __builtin_mul_overflow(elements, (int64_t)d->head_dim * 8 * d->branches, &elements))
        LAC_FAIL(ARGUMENT, "attention: batch %lld x %lld positions x %d heads x %d does not fit in 64 bits",
                 (long long)d->batch, (long long)longest, d->heads, d->head_dim);
    return 0;
}

static int check_choices(const lac_attn_desc *d)
{
    const struct {
        const char *name;
        int32_t value, count;
    } choices[] = {{"heads_scheme", d->heads_scheme, 2},
                   {"offset_rule", d->offset_rule, 3},
                   {"merge", d->merge, 4},
                   {"causal", d->causal, 2},
                   {"dedup", d->dedup, 2},
                   {"align_end", d->align_end, 2}};
    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++)
        if (choices[i].value < 0 || choices[i].value >= choices[i].count)
            LAC_FAIL(ARGUMENT, "attention: %s must be from 0 to %d, got %d", choices[i].name, choices[i].count - 1,
                     choices[i].value);
    if (d->window < -1)
        LAC_FAIL(ARGUMENT, "attention: window must be -1 (none) or at least 0, got %lld", (long long)d->window);
    if (d->dedup && d->merge != LAC_MERGE_LSE)
        LAC_FAIL(ARGUMENT, "attention: dedup counts every key once in one softmax, so it needs merge 'lse', got '%s'",
                 d->merge == LAC_MERGE_MEAN  ? "mean"
                 : d->merge == LAC_MERGE_SUM ? "sum"
                                             : "lse_detach");
    if (d->heads_scheme == LAC_HEADS_SPLIT && d->heads < d->branches)
        LAC_FAIL(ARGUMENT,
                 "attention: %d heads cannot be split over %d branches (heads = 'split' needs heads >= branches)",
                 d->heads, d->branches);
    return 0;
}

static int check_branches(const lac_attn_desc *d)
{
    for (int g = 0; g < d->branches; g++) {
        if (d->segment[g] < 1)
            LAC_FAIL(ARGUMENT, "attention: segments[%d] must be positive, got %lld", g + 1, (long long)d->segment[g]);
        if (d->dilation[g] < 1)
            LAC_FAIL(ARGUMENT, "attention: dilations[%d] must be positive, got %lld", g + 1, (long long)d->dilation[g]);
    }
    return 0;
}

/* heads [*head0, *head0 + *heads) run branch g */
static void branch_heads(const lac_attn_desc *d, int g, int32_t *head0, int32_t *heads)
{
    int32_t each = d->heads / d->branches, more = d->heads % d->branches;
    bool split = d->heads_scheme == LAC_HEADS_SPLIT;
    *head0 = split ? g * each + (g < more ? g : more) : 0;
    *heads = split ? each + (g < more) : d->heads;
}

static int check_offsets(const lac_attn_desc *d)
{
    for (int32_t g = 0; g < d->branches; g++) {
        int32_t head0, heads;
        branch_heads(d, g, &head0, &heads);
        for (int32_t h = head0; h < head0 + heads; h++) {
            int64_t o = lac_plan_offset(d, g, h);
            if (o >= d->segment[g])
                LAC_FAIL(
                    ARGUMENT,
                    "attention: branch %d keeps nothing for head %d: its offset %lld is not below the segment %lld",
                    g + 1, h + 1, (long long)o, (long long)d->segment[g]);
        }
    }
    return 0;
}

/* ---- geometry ---- */

static int64_t gcd(int64_t a, int64_t b)
{
    while (b) {
        int64_t t = a % b;
        a = b;
        b = t;
    }
    return a;
}

/* Can branch a with offset oa and branch b with ob keep a common position? */
static bool lattices_meet(const lac_plan *p, int a, int64_t oa, int b, int64_t ob)
{
    int64_t largest = p->shift + p->desc.n > p->desc.m ? p->shift + p->desc.n : p->desc.m;
    int64_t ra = p->desc.dilation[a], rb = p->desc.dilation[b];
    bool through_a = p->segment[a] >= largest || p->segment[a] % ra == 0;
    bool through_b = p->segment[b] >= largest || p->segment[b] % rb == 0;
    bool same_cut = p->segment[a] == p->segment[b];
    if (!same_cut && !(through_a && through_b)) return true;
    return (oa - ob) % gcd(ra, rb) == 0;
}

static bool branch_runs(const lac_plan *p, int g, int32_t head)
{
    return head >= p->head0[g] && head < p->head0[g] + p->heads[g];
}

/* Do branches a and b write a common (row, head) of the output, or (backward) of dq, dk, dv? Heads that are `group`
 * wide share one key/value head; with group 1 only equal heads can meet. */
static bool branches_conflict(const lac_plan *p, int a, int b, int32_t group)
{
    for (int32_t ha = p->head0[a]; ha < p->head0[a] + p->heads[a]; ha++) {
        int32_t low = ha / group * group;
        for (int32_t hb = low; hb < low + group; hb++)
            if (branch_runs(p, b, hb) &&
                lattices_meet(p, a, lac_plan_offset(&p->desc, a, ha), b, lac_plan_offset(&p->desc, b, hb)))
                return true;
    }
    return false;
}

static void assign_phases(lac_plan *p, int32_t group, int32_t *phase, int32_t *phases)
{
    *phases = 0;
    for (int g = 0; g < p->desc.branches; g++) {
        phase[g] = 0;
        for (int e = 0; e < g; e++)
            if (phase[e] >= phase[g] && branches_conflict(p, e, g, group)) phase[g] = phase[e] + 1;
        if (phase[g] >= *phases) *phases = phase[g] + 1;
    }
}

/* ---- counts ---- */

/* sum over first <= i < last of clamp(i + c + 1, 0, keys): pairs with j <= i + c */
static __int128 below_diagonal(int64_t first, int64_t last, int64_t c, int64_t keys)
{
    __int128 rise = -(__int128)c, full = (__int128)keys - c - 1; /* from rise on above 0, from full on `keys` */
    __int128 a = first > rise ? first : rise, b = last < full ? last : full;
    __int128 sum = 0;
    if (b > a) sum += (b - a) * ((a + c + 1) + (b + c)) / 2;
    __int128 flat = first > full ? first : full;
    if (flat < rise) flat = rise;
    if (last > flat) sum += (last - flat) * keys;
    return sum;
}

static __int128 span_pairs(const lac_plan *p, int32_t g, int64_t offset, int64_t segment)
{
    lac_span s = lac_span_get(p, g, offset, segment);
    lac_band band = lac_plan_band(p, g);
    if (s.q1 <= s.q0 || !s.keys) return 0;
    return below_diagonal(s.q0, s.q1, band.after, s.keys) - below_diagonal(s.q0, s.q1, -band.before - 1, s.keys);
}

/* pairs of one head of branch g at this offset, one batch item */
static __int128 lattice_pairs(const lac_plan *p, int32_t g, int64_t offset)
{
    int64_t w = p->segment[g], first, last;
    int64_t start = p->shift > 0 ? p->shift : 0, q_end = p->shift + p->desc.n, m = p->desc.m;
    lac_plan_segments(p, g, &first, &last);
    if (last > (m - 1) / w + 1) last = (m - 1) / w + 1; /* no keys further on */
    int64_t full0 = (start + w - 1) / w, full1 = (q_end < m ? q_end : m) / w;
    __int128 sum = 0;
    if (full1 > full0) sum += (full1 - full0) * span_pairs(p, g, offset, full0);
    else full1 = full0 = first;
    for (int64_t s = first; s < full0; s++) sum += span_pairs(p, g, offset, s);
    for (int64_t s = full1; s < last; s++) sum += span_pairs(p, g, offset, s);
    return sum;
}

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t lac_plan_key_chunk(const lac_plan *p, int32_t phase)
{
    int64_t all = 0;
    for (int32_t u = 0; u < p->units; u++)
        if (p->backward_phase[p->unit[u].branch] == phase)
            all += (p->desc.m - 1) / p->desc.dilation[p->unit[u].branch] + 1;
    /* fewer where a branch has deltas of its own: parts of a segment make its scores twice */
    int64_t chunks = lac_plan_branch_delta(p) ? LAC_ATTN_TASKS / 2 : LAC_ATTN_TASKS;
    int64_t each = round_up(all * p->desc.batch / chunks, LAC_ATTN_BKEYS);
    return each < LAC_ATTN_KEY_RUN_LEAST ? LAC_ATTN_KEY_RUN_LEAST : each > LAC_ATTN_KEY_RUN ? LAC_ATTN_KEY_RUN : each;
}

bool lac_plan_key_whole(const lac_plan *p, int32_t branch)
{
    int64_t most = p->desc.m < p->segment[branch] ? p->desc.m : p->segment[branch];
    return most <= lac_plan_key_chunk(p, p->backward_phase[branch]) * p->desc.dilation[branch];
}

static int count_pairs(lac_plan *p)
{
    __int128 pairs = 0, twice = 0; /* the second: of which scores and dP are computed once more, for deltas */
    for (int i = 0; i < p->info.strips; i++) {
        int32_t g = p->strips[i].branch;
        __int128 mine = p->strips[i].heads * lattice_pairs(p, g, p->strips[i].offset);
        pairs += mine;
        if (lac_plan_branch_delta(p) && !lac_plan_key_whole(p, g)) twice += mine;
    }
    if (pairs > INT64_MAX)
        LAC_FAIL(ARGUMENT, "attention: more than 2^63 (query, key) pairs in %lld x %lld positions",
                 (long long)p->desc.n, (long long)p->desc.m);
    double all = (double)pairs * (double)p->desc.batch, d = p->desc.head_dim;
    p->info.pairs = (int64_t)pairs;
    p->info.flops_forward = 4 * d * all;
    p->info.flops_backward = 10 * d * all + 4 * d * (double)twice * (double)p->desc.batch;
    return 0;
}

/* positions in [start, end) that at least one branch keeps for this head, by marking a window of them at a time */
static int64_t rows_between(const lac_plan *p, int32_t head, int64_t start, int64_t end)
{
    enum { WINDOW = 1 << 15 };
    unsigned char kept[WINDOW];
    int64_t rows = 0;
    for (int64_t at = start; at < end; at += WINDOW) {
        int64_t stop = at + WINDOW < end ? at + WINDOW : end;
        memset(kept, 0, sizeof kept);
        for (int g = 0; g < p->desc.branches; g++) {
            if (!branch_runs(p, g, head)) continue;
            int64_t w = p->segment[g], r = p->desc.dilation[g], o = lac_plan_offset(&p->desc, g, head);
            for (int64_t s = at / w; s * w < stop; s++) {
                int64_t next = (s + 1) * w < stop ? (s + 1) * w : stop;
                int64_t i = lac_lattice_count(s * w + o, r, at);
                for (int64_t pos = s * w + o + i * r; pos < next; pos += r) kept[pos - at] = 1;
            }
        }
        for (int64_t i = 0; i < stop - at; i++) rows += kept[i];
    }
    return rows;
}

/* (row, head) pairs of one head that at least one branch keeps. The pattern repeats with the least common multiple of
 * the segments, so one period and what is left over at both ends is enough. */
static int64_t head_rows(const lac_plan *p, int32_t head)
{
    int64_t start = p->shift > 0 ? p->shift : 0, end = p->shift + p->desc.n, period = 1;
    for (int g = 0; g < p->desc.branches; g++) {
        if (!branch_runs(p, g, head)) continue;
        if (p->desc.dilation[g] == 1) return end - start;
        int64_t factor = p->segment[g] / gcd(period, p->segment[g]);
        if (__builtin_mul_overflow(period, factor, &period) || period > end - start)
            return rows_between(p, head, start, end);
    }
    int64_t periods = (end - start) / period, rest = start + periods * period;
    return periods * rows_between(p, head, start, start + period) + rows_between(p, head, rest, end);
}

/* Two heads keep the same rows if their offsets agree in every branch. */
static bool heads_alike(const lac_plan *p, int32_t a, int32_t b)
{
    for (int g = 0; g < p->desc.branches; g++) {
        if (branch_runs(p, g, a) != branch_runs(p, g, b)) return false;
        if (branch_runs(p, g, a) && lac_plan_offset(&p->desc, g, a) != lac_plan_offset(&p->desc, g, b)) return false;
    }
    return true;
}

static int64_t count_rows(const lac_plan *p)
{
    enum { REMEMBERED = 64 };
    int32_t seen[REMEMBERED];
    int64_t rows_of[REMEMBERED], total = 0;
    int known = 0;
    for (int32_t h = 0; h < p->desc.heads; h++) {
        int i = 0;
        while (i < known && !heads_alike(p, seen[i], h)) i++;
        int64_t rows = i < known ? rows_of[i] : head_rows(p, h);
        if (i == known && known < REMEMBERED) {
            seen[known] = h;
            rows_of[known++] = rows;
        }
        total += rows;
    }
    return total;
}

/* ---- working memory, as the CPU back end takes it for f16 and bf16 (f32 and f64 accumulate in the results) ---- */

/* rows of the longest lattice in `end` positions */
static int64_t longest_span(const lac_plan *p, int64_t end)
{
    int64_t longest = 0;
    for (int g = 0; g < p->desc.branches; g++) {
        int64_t w = p->segment[g] < end ? p->segment[g] : end, rows = (w - 1) / p->desc.dilation[g] + 1;
        if (rows > longest) longest = rows;
    }
    return longest;
}

/* Would the matrix unit multiply? With active blocks of `block` rows only where lattices keep enough of each. */
static bool takes_parts(const lac_plan *p, int32_t dtype, int64_t block)
{
    bool takes = dtype != LAC_F64 && p->desc.head_dim >= LAC_ATTN_PARTS_LEAST;
    for (int g = 0; block > 0 && g < p->desc.branches; g++)
        takes &= block >= LAC_ATTN_PARTS_BLOCK * p->desc.dilation[g];
    return takes;
}

const char *lac_plan_isa(const lac_plan *p, int32_t dtype, int64_t block)
{
    return p && lac_has_unit() && !takes_parts(p, dtype, block) ? "avx512" : lac_isa(NULL);
}

/* Do backward tasks of some branch keep all keys of a segment, to make its deltas? */
static bool holds_segments(const lac_plan *p)
{
    bool some = false;
    for (int g = 0; g < p->desc.branches; g++) some |= lac_plan_key_whole(p, g);
    return some && lac_plan_branch_delta(p);
}

static int64_t least_of(int64_t x, int64_t y) { return x < y ? x : y; }

/* What a thread needs at most, by the instruction set in use: the matrix unit (c/cpu/attn_amx.inc) packs matrices in
 * three parts of bf16, which take half as much again, and keeps rows in both orders. With active blocks it holds the
 * rows of all blocks of a task, each block from a multiple of its rows on, and tasks have more keys. */
int lac_plan_workspace(const lac_plan *p, int32_t dtype, int64_t block, int64_t *forward, int64_t *backward)
{
    LAC_NONNULL(p, "the plan");
    LAC_NONNULL(forward, "the bytes of the forward");
    LAC_NONNULL(backward, "the bytes of the backward");
    const bool parts = lac_has_unit() && takes_parts(p, dtype, block), sparse = block > 0;
    int64_t d = round_up(p->desc.head_dim, 32), tile = lac_attn_tile_keys(p->desc.head_dim);
    int64_t rows = longest_span(p, p->desc.n), keys = longest_span(p, p->desc.m);
    int64_t chunk = round_up(least_of(rows, LAC_ATTN_QUERIES), LAC_ATTN_BROWS);
    if (chunk < LAC_ATTN_FEW_ALL) chunk = LAC_ATTN_FEW_ALL;
    *forward = chunk * (2 * d + 2) + 2 * tile * d + (LAC_ATTN_ROWS + 2) * (LAC_ATTN_KEYS + 32) + 17 * d + 1280;
    if (parts) {
        int64_t most = least_of(rows, LAC_ATTN_BLOCKS_QUERIES);
        int64_t slots = round_up(most, 32) + 32 * (most / LAC_ATTN_PARTS_BLOCK + 2);
        *forward = sparse ? slots * (5 * d / 2 + 5) + 128 * d : chunk * (7 * d / 2 + 5);
        *forward += 3 * tile * d + 32 * (LAC_ATTN_KEYS + 224) + 36 * d;
    }
    int64_t held = sparse || !holds_segments(p) ? 1 : (least_of(keys, LAC_ATTN_KEY_RUN) - 1) / LAC_ATTN_BKEYS + 1;
    int64_t run = !sparse ? LAC_ATTN_KEY_RUN : parts ? LAC_ATTN_PARTS_RUN : LAC_ATTN_BLOCKS_RUN;
    keys = round_up(least_of(keys, run), LAC_ATTN_BKEYS);
    rows = round_up(least_of(rows, parts && sparse ? LAC_ATTN_BLOCKS_ROWS : LAC_ATTN_BQUERIES), LAC_ATTN_BROWS);
    int64_t tiles = (parts ? 9 : 6) * LAC_ATTN_BKEYS * d / 2 + 2 * LAC_ATTN_BROWS * (LAC_ATTN_BKEYS + 32) + 768;
    *backward = rows * (6 * d + 5) + 2 * keys * d + held * tiles + 33 * d + 1280; /* held: blocks of keys, and scores */
    if (parts) *backward += 6 * rows * d + 2 * (keys + 56) * d + 9 * LAC_ATTN_BROWS * LAC_ATTN_BKEYS / 2;
    const int64_t width = dtype == LAC_F64 ? sizeof(double) : sizeof(float);
    *forward *= width;
    *backward *= width;
    return 0;
}

/* Does the backward's one phase reach every row? Then dk and dv are stored as they are (c/cpu/attn.c). */
static bool stores(const lac_plan *p)
{
    bool all = p->backward_phases == 1 && p->shift == 0 && p->desc.n == p->desc.m;
    for (int g = 0; g < p->desc.branches; g++) all &= p->desc.dilation[g] == 1;
    return all;
}

/* Sums of what is stored as f16 or bf16. */
static void count_sums(lac_plan *p)
{
    int64_t out = p->desc.batch * p->desc.n * p->desc.heads * p->desc.head_dim;
    int64_t kv = p->desc.batch * p->desc.m * p->desc.kv_heads * p->desc.head_dim;
    p->info.bytes_accumulate_forward = p->forward_phases > 1 ? 4 * out : 0;
    p->info.bytes_accumulate_backward = 4 * (out + (stores(p) ? 0 : 2 * kv));
    if (lac_plan_branch_delta(p)) p->info.bytes_accumulate_backward += 4 * p->desc.batch * p->desc.n * p->desc.heads;
}

/* ---- strips and units ---- */

static bool strip_shared(const lac_plan *p, const lac_strip *s)
{
    for (int i = 0; i < p->info.strips; i++) {
        const lac_strip *t = &p->strips[i];
        bool apart = t->head0 >= s->head0 + s->heads || s->head0 >= t->head0 + t->heads;
        if (t != s && t->branch != s->branch && !apart && lattices_meet(p, s->branch, s->offset, t->branch, t->offset))
            return true;
    }
    return false;
}

static int make_strips(lac_plan *p)
{
    int64_t most = 0;
    for (int g = 0; g < p->desc.branches; g++) most += p->heads[g];
    if (!(p->strips = calloc((size_t)most + 1, sizeof *p->strips)))
        LAC_FAIL(MEMORY, "attention: no memory for %lld strips", (long long)most);
    for (int32_t g = 0; g < p->desc.branches; g++)
        for (int32_t h = p->head0[g]; h < p->head0[g] + p->heads[g]; h++) {
            int64_t o = lac_plan_offset(&p->desc, g, h);
            lac_strip *last = p->info.strips ? &p->strips[p->info.strips - 1] : NULL;
            if (last && last->branch == g && last->offset == o && last->head0 + last->heads == h) last->heads++;
            else
                p->strips[p->info.strips++] = (lac_strip){.segment = p->desc.segment[g],
                                                          .dilation = p->desc.dilation[g],
                                                          .offset = o,
                                                          .head0 = h,
                                                          .heads = 1,
                                                          .branch = g};
        }
    /* quadratic in strips: with very many, "shared" is a safe answer */
    for (int i = 0; i < p->info.strips; i++) {
        p->strips[i].shared = p->info.strips > 4096 ? lac_plan_many(p) : strip_shared(p, &p->strips[i]);
        p->info.overlapping |= p->strips[i].shared;
    }
    return 0;
}

static int make_units(lac_plan *p)
{
    int64_t most = 0;
    int32_t group = p->desc.heads / p->desc.kv_heads, at = 0;
    for (int g = 0; g < p->desc.branches; g++) most += p->heads[g];
    p->unit = calloc((size_t)most + 1, sizeof *p->unit);
    p->unit_heads = calloc((size_t)most + 1, sizeof *p->unit_heads);
    if (!p->unit || !p->unit_heads) LAC_FAIL(MEMORY, "attention: no memory for %lld units", (long long)most);
    for (int32_t g = 0; g < p->desc.branches; g++)
        for (int32_t h = p->head0[g]; h < p->head0[g] + p->heads[g]; h++) {
            int64_t o = lac_plan_offset(&p->desc, g, h);
            bool taken = false; /* by an earlier head of the same key/value head and offset */
            for (int32_t e = h / group * group; e < h && !taken; e++)
                taken = branch_runs(p, g, e) && lac_plan_offset(&p->desc, g, e) == o;
            if (taken) continue;
            lac_unit *u = &p->unit[p->units++];
            *u = (lac_unit){.branch = g, .kv_head = h / group, .first = at, .offset = o};
            for (int32_t e = h; e < (h / group + 1) * group; e++)
                if (branch_runs(p, g, e) && lac_plan_offset(&p->desc, g, e) == o) p->unit_heads[at++] = e;
            u->heads = at - u->first;
        }
    return 0;
}

/* ---- decoding ---- */

int64_t lac_plan_reach_from(const lac_plan *p, int64_t position)
{
    int64_t first = position;
    for (int g = 0; g < p->desc.branches; g++) {
        int64_t start = position / p->segment[g] * p->segment[g];
        if (start < first) first = start;
    }
    int64_t window = p->desc.window < 0 ? position : p->desc.window;
    return position - window > first ? position - window : first;
}

void lac_plan_place(const lac_plan *p, int64_t batch, int64_t n, int64_t m, int64_t position, lac_plan *placed)
{
    const size_t counter = offsetof(lac_plan, desc); /* other threads count references meanwhile: not copied */
    memcpy((char *)placed + counter, (const char *)p + counter, sizeof *p - counter);
    placed->desc.batch = batch;
    placed->desc.n = n;
    placed->desc.m = m;
    placed->shift = position;
    int64_t largest = position + n > m ? position + n : m;
    double pairs = 0; /* an upper bound: it decides how many threads are worth starting */
    for (int g = 0; g < p->desc.branches; g++) {
        int64_t w = placed->segment[g] = p->segment[g] < largest ? p->segment[g] : largest;
        int64_t keys = position % w + n < w ? position % w + n : w, r = p->desc.dilation[g];
        int64_t rows = n / r + 1, columns = keys / r + 1;
        pairs += p->heads[g] * (double)rows * (double)columns;
    }
    placed->info.pairs = pairs < 0x1p62 ? (int64_t)pairs : INT64_MAX;
    placed->info.flops_forward = 4.0 * p->desc.head_dim * pairs * (double)batch;
    if (lac_profile_on) (void)count_pairs(placed); /* who asks for numbers gets exact ones */
}

/* ---- working memory of the backward on a GPU ---- */

enum { PART_ROWS = 1 << 19 }; /* of a part, in all branches and heads, at least (op_parts.c) */

/* positions after which nothing is seen of what lies before; 0: there are none but the end */
static int64_t window_of(const lac_plan *p)
{
    int64_t w = 1;
    if (p->shift != 0 || p->desc.n != p->desc.m) return 0;
    for (int g = 0; g < p->desc.branches; g++)
        if (p->segment[g] > w) w = p->segment[g];
    for (int g = 0; g < p->desc.branches; g++)
        if (w % p->segment[g]) return 0;
    return w;
}

/* positions of one batch item with PART_ROWS rows */
static int64_t least_positions(const lac_plan *p)
{
    double rows = 0; /* of one position, on average */
    for (int g = 0; g < p->desc.branches; g++) rows += (double)p->heads[g] / (double)p->desc.dilation[g];
    return rows * 0x1p40 > PART_ROWS ? (int64_t)(PART_ROWS / rows) + 1 : (int64_t)1 << 40;
}

void lac_plan_parts(const lac_plan *p, int64_t *items, int64_t *rows)
{
    const lac_attn_desc *d = &p->desc;
    const int64_t window = window_of(p), least = least_positions(p);
    *rows = window > 0 ? ((least - 1) / window + 1) * window : d->n, *items = 1;
    if (*rows > d->n / 2) *rows = d->n, *items = d->n ? (least - 1) / d->n + 1 : d->batch;
    if (*rows == d->n && (d->n != d->m || *items > d->batch / 2)) *items = d->batch;
}

/* As kernels/attn.cu takes it: statistics of rows, f32 sums of gradients that branches share (in one pass only what
 * lac_plan_sum_bytes() says), and the work list of one pass (kernels/attn_hopper_backward.cu): sums of dq in blocks of
 * 64 rows, each with its statistics, 64 bytes a tile of 128 keys. Two passes, which devices with little shared memory
 * take up to head_dim 64, are not distinguished, nor are active blocks, which add 4 bytes a row. */
static int64_t device_bytes(const lac_plan *p)
{
    const lac_attn_desc *d = &p->desc;
    const int64_t rows = d->batch * d->n * d->heads;
    const bool one_pass = lac_plan_one_pass(p);
    const int64_t columns = d->head_dim % 8 ? round_up(d->head_dim, 8) : d->head_dim <= 64 ? 64 : 128;
    int64_t bytes = 16 * rows * (lac_plan_branch_delta(p) ? d->branches : 1);
    if (one_pass) bytes += lac_plan_sum_bytes(p);
    else if (p->backward_phases > 1) bytes += 8 * d->batch * d->m * d->kv_heads * d->head_dim;
    if (!one_pass && p->forward_phases > 1) bytes += 4 * rows * d->head_dim;
    for (int g = 0; one_pass && g < d->branches; g++) {
        const int64_t w = p->segment[g], r = d->dilation[g], items = d->batch * p->heads[g] * ((d->m - 1) / w + 1);
        const int64_t blocks = ((w < d->n ? w : d->n) - 1) / r / 64 + 1;
        const int64_t tiles = ((w < d->m ? w : d->m) - 1) / r / 128 + 1;
        bytes += items * (blocks * (256 * columns + 516) + tiles * 64);
    }
    return bytes;
}

static int64_t part_bytes(const lac_plan *p)
{
    lac_plan part;
    int64_t items, rows;
    lac_plan_parts(p, &items, &rows);
    if (items == p->desc.batch && rows == p->desc.n) return device_bytes(p);
    lac_plan_place(p, items, rows, rows, 0, &part);
    return device_bytes(&part);
}

/* ---- public ---- */

static int plan_build(lac_plan *p, const lac_attn_desc *d)
{
    p->desc = *d;
    p->shift = d->align_end ? d->m - d->n : 0;
    int64_t largest = p->shift + d->n > d->m ? p->shift + d->n : d->m;
    for (int g = 0; g < d->branches; g++) {
        p->segment[g] = d->segment[g] < largest ? d->segment[g] : largest;
        branch_heads(d, g, &p->head0[g], &p->heads[g]);
    }
    LAC_TRY(make_strips(p));
    LAC_TRY(make_units(p));
    assign_phases(p, 1, p->forward_phase, &p->forward_phases);
    assign_phases(p, d->heads / d->kv_heads, p->backward_phase, &p->backward_phases);
    LAC_TRY(count_pairs(p));
    count_sums(p);
    return 0;
}

static int plan_make(const lac_attn_desc *d, lac_plan **out)
{
    LAC_TRY(check_sizes(d));
    LAC_TRY(check_choices(d));
    LAC_TRY(check_branches(d));
    LAC_TRY(check_offsets(d));
    lac_plan *p = calloc(1, sizeof *p);
    if (!p) LAC_FAIL(MEMORY, "attention: no memory for a plan");
    atomic_init(&p->references, 1);
    int status = plan_build(p, d);
    if (status) lac_plan_drop(p);
    else *out = p;
    return status;
}

int lac_plan_get(const lac_attn_desc *desc, lac_plan **out)
{
    LAC_NONNULL(out, "the result");
    *out = NULL;
    LAC_NONNULL(desc, "the description");
    lac_attn_desc key; /* canonical: no padding bytes, nothing past the branches */
    memset(&key, 0, sizeof key);
    key.batch = desc->batch, key.n = desc->n, key.m = desc->m, key.window = desc->window;
    key.heads = desc->heads, key.kv_heads = desc->kv_heads, key.head_dim = desc->head_dim,
    key.branches = desc->branches;
    key.heads_scheme = desc->heads_scheme, key.offset_rule = desc->offset_rule, key.merge = desc->merge;
    key.causal = desc->causal, key.dedup = desc->dedup, key.align_end = desc->align_end;
    for (int g = 0; g < desc->branches && g < LAC_MAX_BRANCHES; g++) {
        key.segment[g] = desc->segment[g];
        key.dilation[g] = desc->dilation[g];
    }
    lac_plan *plan = lac_lru_find(&plans, &key, sizeof key);
    if (!plan) {
        LAC_TRY(plan_make(&key, &plan));
        plan = lac_lru_insert(&plans, &key, sizeof key, plan);
    }
    *out = plan;
    return 0;
}

void lac_plan_drop(lac_plan *plan)
{
    if (!plan || atomic_fetch_sub(&plan->references, 1) != 1) return;
    free(plan->strips);
    free(plan->unit);
    free(plan->unit_heads);
    free(plan);
}

int lac_plan_describe(const lac_plan *plan, lac_plan_info *out)
{
    LAC_NONNULL(plan, "the plan");
    LAC_NONNULL(out, "the result");
    *out = plan->info;
    /* now: the instruction set may be another one than when the plan was made */
    LAC_TRY(lac_plan_workspace(plan, LAC_F32, 0, &out->bytes_workspace_forward, &out->bytes_workspace_backward));
    out->rows = count_rows(plan);
    out->bytes_device_backward = part_bytes(plan);
    out->references = atomic_load(&plan->references);
    return 0;
}

int lac_plan_strip(const lac_plan *plan, int32_t index, lac_strip *out)
{
    LAC_NONNULL(plan, "the plan");
    LAC_NONNULL(out, "the result");
    if (index < 0 || index >= plan->info.strips)
        LAC_FAIL(INDEX, "plan: strip %d of %d (counted from 0)", index, plan->info.strips);
    *out = plan->strips[index];
    return 0;
}

const char *lac_plan_hopper(const lac_plan *plan, int32_t dtype, int32_t kernel, int64_t block, int backward)
{
    if (!plan) return "there is no plan";
    if (dtype == LAC_F32 && kernel == LAC_KERNEL_AUTO && !lac_settings_global.tf32) {
        if (plan->desc.head_dim > LAC_HOPPER_WIDE || plan->desc.head_dim % 4)
            return "head_dim is above 128 or no multiple of 4";
        if (block > 0) return "there is a block_mask";
        return lac_plan_hopper_pays(plan, 0) ? NULL : "a branch has fewer than 64 rows a segment";
    }
    const char *why = backward ? lac_plan_no_hopper_beyond(plan, dtype) : lac_plan_no_hopper(plan, dtype);
    if (!why && block > 0)
        why = plan->desc.head_dim > LAC_HOPPER_WIDE ? "head_dim is above 128, with a block_mask"
              : backward                            ? lac_plan_no_hopper_blocks(plan, block)
                                                    : NULL;
    if (why) return why;
    if (backward && plan->desc.heads / plan->desc.kv_heads > 32)
        return "more than 32 query heads share a key/value head"; /* attn_hopper_backward_fits() */
    if (kernel == LAC_KERNEL_HOPPER || (backward ? lac_plan_one_pass(plan) : lac_plan_hopper_pays(plan, block)))
        return NULL;
    if (backward) return "a branch has fewer than 32 rows a segment";
    return lac_plan_hopper_pays(plan, 0) ? "a branch has fewer than 64 rows a block"
                                         : "a branch has fewer than 64 rows a segment";
}

int lac_plan_reach(const lac_plan *plan, int64_t position, int64_t *first)
{
    LAC_NONNULL(plan, "the plan");
    LAC_NONNULL(first, "the result");
    if (position < 0 || position > plan->desc.m)
        LAC_FAIL(INDEX, "plan: position %lld is outside the plan's, which end at %lld", (long long)position,
                 (long long)plan->desc.m);
    *first = lac_plan_reach_from(plan, position);
    return 0;
}

int lac_plan_cache(lac_cache_stats *out)
{
    LAC_NONNULL(out, "the result");
    pthread_mutex_lock(&plans.lock);
    *out = (lac_cache_stats){plans.size, plans.capacity, plans.hits, plans.misses, plans.evictions};
    pthread_mutex_unlock(&plans.lock);
    return 0;
}

int lac_plan_cache_resize(int64_t capacity)
{
    if (capacity < 0)
        LAC_FAIL(ARGUMENT, "plan: the capacity of the cache must not be negative, got %lld", (long long)capacity);
    lac_lru_resize(&plans, capacity);
    return 0;
}
