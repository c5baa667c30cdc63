/* attn.c: dilated attention on the CPU: what runs when, on which memory.
 *
 * The plan says which branches may run together (a phase); a phase is a list of items (lattices), an item is cut
 * into tasks, and threads take tasks in their order as they become free, the heavy ones first. How the work is cut
 * depends on shapes alone, and where two tasks of a phase add to the same row of dq they do so in the order of their
 * numbers, so results do not depend on threads. Short segments share a task; long ones are cut into runs of query
 * rows in the forward and into runs of keys in the backward, the finer the fewer there are.
 *
 * f16 and bf16 compute in float. Where several phases meet in one row (forward), and always in the backward, sums
 * are kept in float workspace and rounded once at the end. Rows that no task may reach are zeroed beforehand by all
 * threads, past the caches: with a dilation of 16 that is more memory than everything else touches.
 *
 * Where the processor has a matrix unit (AMX) the file is compiled once more, as the attention of the table "amx":
 * f32, f16 and bf16 then make their products in parts (attn_parts.inc), which is the default there. f64, short rows and
 * small active blocks go on to the attention of AVX-512.
 *
 * Rejected: one thread per (batch, head), which leaves cores idle for long sequences; atomics; OpenMP's dynamic
 * schedule, which promises no order.
 */
#include "attn.h"
#include "simd.h"
#include "../rng.h"
#include <omp.h>
#ifdef __SSE2__
#include <cpuid.h>
#include <emmintrin.h>
#endif

/* This file is compiled once more, with AVX-512, for processors with a matrix unit. */
#ifdef ATTN_AMX
#include "attn_amx.inc"
#define ATTN_OPERATOR(name) lac_cpu_amx_##name
#define ATTN_GRAIN 96 /* tasks begin at multiples of so many query rows: of LAC_ATTN_ROWS and AMX_SIDE */
int lac_cpu_amx_attend(const lac_a_attend *a);
int lac_cpu_amx_attend_bwd(const lac_a_attend_bwd *w);
int lac_cpu_avx512_attend(const lac_a_attend *a);
int lac_cpu_avx512_attend_bwd(const lac_a_attend_bwd *w);
#else
#define ATTN_OPERATOR(name) LAC_CPU(name)
#define ATTN_GRAIN LAC_ATTN_ROWS
#endif

#if defined(__AVX512F__)
#define ATTN_VECTOR 64
#define ATTN_MR 12
#elif defined(__AVX__)
#define ATTN_VECTOR 32
#define ATTN_MR 6
#else
#define ATTN_VECTOR 16
#define ATTN_MR 4
#endif
#if ATTN_MR == 12
#define ATTN_EACH_MR(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#elif ATTN_MR == 6
#define ATTN_EACH_MR(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
#define ATTN_EACH_MR(X) X(1) X(2) X(3) X(4)
#endif

enum { ATTN_BLOCKS = 8 };

/* lac_philox of several blocks: word[w][i] holds word w of block[i] in its low half (the high half is garbage). The
 * rounds only ever multiply low halves, so AVX2 needs no masks. */
static void attn_philox(uint64_t seed, uint64_t offset, const uint64_t block[ATTN_BLOCKS],
                        uint64_t word[4][ATTN_BLOCKS])
{
#ifdef __AVX2__
    for (int half = 0; half < ATTN_BLOCKS; half += 4) {
        __m256i c0 = _mm256_loadu_si256((const __m256i *)(block + half)), c1 = _mm256_srli_epi64(c0, 32);
        __m256i c2 = _mm256_set1_epi64x((long long)offset), c3 = _mm256_srli_epi64(c2, 32);
        __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            __m256i p0 = _mm256_mul_epu32(m0, c0), p1 = _mm256_mul_epu32(m1, c2);
            c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
            c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
            c1 = p1;
            c3 = p0;
        }
        _mm256_storeu_si256((__m256i *)(word[0] + half), c0);
        _mm256_storeu_si256((__m256i *)(word[1] + half), c1);
        _mm256_storeu_si256((__m256i *)(word[2] + half), c2);
        _mm256_storeu_si256((__m256i *)(word[3] + half), c3);
    }
#else
    for (int i = 0; i < ATTN_BLOCKS; i++) {
        uint32_t bits[4];
        lac_philox(seed, offset, block[i], bits);
        for (int w = 0; w < 4; w++) word[w][i] = bits[w];
    }
#endif
}

#define ATTN_LOG2E 1.442695040888963407359924681L

/* the numbers of the lanes */
#define ATTN_LANES_2                                                                                                   \
    {                                                                                                                  \
        0, 1                                                                                                           \
    }
#define ATTN_LANES_4                                                                                                   \
    {                                                                                                                  \
        0, 1, 2, 3                                                                                                     \
    }
#define ATTN_LANES_8                                                                                                   \
    {                                                                                                                  \
        0, 1, 2, 3, 4, 5, 6, 7                                                                                         \
    }
#define ATTN_LANES_16                                                                                                  \
    {                                                                                                                  \
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15                                                           \
    }
/* lanes of two vectors taken in turn, for each number of lanes: first halves, second halves */
#define ATTN_LOW_2                                                                                                     \
    {                                                                                                                  \
        0, 2                                                                                                           \
    }
#define ATTN_HIGH_2                                                                                                    \
    {                                                                                                                  \
        1, 3                                                                                                           \
    }
#define ATTN_LOW_4                                                                                                     \
    {                                                                                                                  \
        0, 4, 1, 5                                                                                                     \
    }
#define ATTN_HIGH_4                                                                                                    \
    {                                                                                                                  \
        2, 6, 3, 7                                                                                                     \
    }
#define ATTN_LOW_8                                                                                                     \
    {                                                                                                                  \
        0, 8, 1, 9, 2, 10, 3, 11                                                                                       \
    }
#define ATTN_HIGH_8                                                                                                    \
    {                                                                                                                  \
        4, 12, 5, 13, 6, 14, 7, 15                                                                                     \
    }
#define ATTN_LOW_16                                                                                                    \
    {                                                                                                                  \
        0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23                                                         \
    }
#define ATTN_HIGH_16                                                                                                   \
    {                                                                                                                  \
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31                                                   \
    }

#define NAME(x) attn_f32_##x
#define real float
#if ATTN_VECTOR == 64
#define ATTN_LANES ATTN_LANES_16
#define ATTN_LOW ATTN_LOW_16
#define ATTN_HIGH ATTN_HIGH_16
#elif ATTN_VECTOR == 32
#define ATTN_LANES ATTN_LANES_8
#define ATTN_LOW ATTN_LOW_8
#define ATTN_HIGH ATTN_HIGH_8
#else
#define ATTN_LANES ATTN_LANES_4
#define ATTN_LOW ATTN_LOW_4
#define ATTN_HIGH ATTN_HIGH_4
#endif
#define IREAL int32_t
#ifdef ATTN_AMX
#define ATTN_PARTS 1
#define ATTN_PARTS_KEYS 128 /* probabilities of so many keys are taken apart at a time */
#define ATTN_GATHER 32      /* rows that are packed together */
#define ATTN_HEIGHT AMX_SIDE
#else
#define ATTN_PARTS 0
#define ATTN_PARTS_KEYS 0
#define ATTN_GATHER VL
#define ATTN_HEIGHT LAC_ATTN_ROWS
#endif
#define REAL_EXP2 exp2f
#define REAL_FMA fmaf
#define REAL_FABS fabsf
#define EXP2_MAGIC 12583039.0f /* 1.5 2^23 + 127 */
#define EXP2_SHIFT 23
#define EXP2_LOWEST -126
#define EXP2_FIRST 1.5594678169e-4f
#define EXP2_COEFFICIENTS(X)                                                                                           \
    X(1.3406643902e-3f) X(9.6176929730e-3f) X(5.5503105510e-2f) X(2.4022652783e-1f) X(6.9314721497e-1f) X(1.0f)
#if ATTN_VECTOR == 64
#define ATTN_MAX(a, b) _mm512_max_ps((__m512)(a), (__m512)(b))
#elif ATTN_VECTOR == 32
#define ATTN_MAX(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#elif defined(__SSE2__)
#define ATTN_MAX(a, b) _mm_max_ps((__m128)(a), (__m128)(b))
#endif
#include "attn_kernel.inc"
#undef NAME
#undef ATTN_LANES
#undef ATTN_LOW
#undef ATTN_HIGH
#undef real
#undef IREAL
#undef REAL_EXP2
#undef REAL_FMA
#undef REAL_FABS
#undef EXP2_MAGIC
#undef EXP2_SHIFT
#undef EXP2_LOWEST
#undef EXP2_FIRST
#undef EXP2_COEFFICIENTS
#undef ATTN_MAX
#undef ATTN_PARTS
#undef ATTN_PARTS_KEYS
#undef ATTN_GATHER
#undef ATTN_HEIGHT

#define NAME(x) attn_f64_##x
#define real double
#if ATTN_VECTOR == 64
#define ATTN_LANES ATTN_LANES_8
#define ATTN_LOW ATTN_LOW_8
#define ATTN_HIGH ATTN_HIGH_8
#elif ATTN_VECTOR == 32
#define ATTN_LANES ATTN_LANES_4
#define ATTN_LOW ATTN_LOW_4
#define ATTN_HIGH ATTN_HIGH_4
#else
#define ATTN_LANES ATTN_LANES_2
#define ATTN_LOW ATTN_LOW_2
#define ATTN_HIGH ATTN_HIGH_2
#endif
#define IREAL int64_t
#define ATTN_PARTS 0
#define ATTN_PARTS_KEYS 0
#define ATTN_GATHER VL
#define ATTN_HEIGHT LAC_ATTN_ROWS
#define REAL_EXP2 exp2
#define REAL_FMA fma
#define REAL_FABS fabs
#define EXP2_MAGIC 6755399441056767.0 /* 1.5 2^52 + 1023 */
#define EXP2_SHIFT 52
#define EXP2_LOWEST -1022
#define EXP2_FIRST 1.36691488853904124e-12
#define EXP2_COEFFICIENTS(X)                                                                                           \
    X(2.56784359934881958e-11)                                                                                         \
    X(4.44553827187081007e-10)                                                                                         \
    X(7.05491162080112088e-9)                                                                                          \
    X(1.01780860092396960e-7)                                                                                          \
    X(1.32154867901443053e-6)                                                                                          \
    X(1.52527338040598377e-5)                                                                                          \
    X(1.54035303933816061e-4)                                                                                          \
    X(1.33335581464284411e-3)                                                                                          \
    X(9.61812910762847688e-3)                                                                                          \
    X(5.55041086648215762e-2)                                                                                          \
    X(2.40226506959100694e-1)                                                                                          \
    X(6.93147180559945286e-1)                                                                                          \
    X(1.0)
#if ATTN_VECTOR == 64
#define ATTN_MAX(a, b) _mm512_max_pd((__m512d)(a), (__m512d)(b))
#elif ATTN_VECTOR == 32
#define ATTN_MAX(a, b) _mm256_max_pd((__m256d)(a), (__m256d)(b))
#elif defined(__SSE2__)
#define ATTN_MAX(a, b) _mm_max_pd((__m128d)(a), (__m128d)(b))
#endif
#include "attn_kernel.inc"

/* ---- tasks ---- */

static int64_t lattice_rows(const lac_plan *p, int32_t branch)
{
    return (p->segment[branch] - 1) / p->desc.dilation[branch] + 1;
}

/* the most query rows, or keys, that one segment of a branch can have out of `count` consecutive positions */
static int64_t span_most(const lac_plan *p, int32_t branch, int64_t count)
{
    int64_t most = (count - 1) / p->desc.dilation[branch] + 1, rows = lattice_rows(p, branch);
    return rows < most ? rows : most;
}

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

/* does a task own keys (and not query rows)? */
static bool owns_keys(const attn_job *job) { return job->bwd && !job->new_delta; }

#ifdef ATTN_AMX
/* Rows of memory for the rows of a task with active blocks: each row of blocks begins at a multiple of 32. */
static int64_t blocks_slots(int64_t rows)
{
    return round_up(rows, AMX_SIDE) + (rows / LAC_ATTN_PARTS_BLOCK + 2) * AMX_SIDE;
}
#endif

/* Causal: the first keys have the most rows. Chunks of the same work instead of the same size, where they are few: as
 * much for every thread, and the chunk whose turn at dq comes later is not the faster one of two. */
static void cut_evenly(const attn_job *job, attn_item *item, int64_t rows)
{
    const lac_attn_desc *d = &job->a->plan->desc;
    bool triangle = d->causal && d->n == d->m && !job->a->plan->shift && (d->window < 0 || d->window >= d->n);
    enum { GRAIN = 32 };
    item->uneven =
        triangle && !job->a->blocks.data && item->chunks > 1 && item->chunks <= ATTN_EDGES && rows <= LAC_ATTN_KEY_RUN;
    for (int64_t i = 0; item->uneven && i < item->chunks; i++) {
        double before = sqrt(1 - (double)i / (double)item->chunks); /* share of the rows that no earlier chunk ends */
        item->edge[i] = ((int64_t)((double)rows * (1 - before)) + GRAIN / 2) / GRAIN * GRAIN;
    }
}

/* Few chunks of query rows: even ones. Chunks of one size leave what is left over to the last, and of two chunks that
 * are multiples of 96 rows one of 1024 has 576. */
static void cut_rows(attn_item *item, int64_t rows, int64_t grain)
{
    enum { FEW = 64 };
    if (item->chunks == 1 || item->chunks > FEW || rows < 2 * grain) return;
    if (item->chunks > rows / grain) item->chunks = rows / grain; /* so that none is empty */
    item->rows = rows;
    item->grain = grain;
    item->chunk = grain;
    for (int64_t i = 0; i < item->chunks; i++) {
        int64_t size = attn_rows_at(item, i + 1) - attn_rows_at(item, i);
        if (size > item->chunk) item->chunk = round_up(size, grain);
    }
}

/* Cuts one item into chunks of about `target` query rows (backward: keys) and tasks of as many whole chunks as fit
 * into `most`, and appends it. */
static void add_item(attn_job *job, attn_item item, int64_t target, int64_t most)
{
    const lac_plan *p = job->a->plan;
    bool keys = owns_keys(job);
    int64_t first, last, grain = keys ? LAC_ATTN_BKEYS : job->a->blocks.data ? LAC_ATTN_GROUPS : ATTN_GRAIN;
    int64_t rows = span_most(p, item.branch, keys ? p->desc.m : p->desc.n);
    lac_plan_segments(p, item.branch, &first, &last);
    item.segment0 = first;
    item.segments = last - first;
    item.group = rows < target ? target / rows : 1;
    item.chunks = (rows - 1) / target + 1;
    while (keys && item.chunks & (item.chunks - 1)) item.chunks++; /* a power of two: as many for every thread */
    item.chunk = round_up((rows - 1) / item.chunks + 1, grain);    /* even pieces */
    if (!keys && !job->a->blocks.data) cut_rows(&item, rows, grain);
    if (!item.rows) item.chunks = (rows - 1) / item.chunk + 1;
    item.bunch = most < item.chunk ? 1 : most / item.chunk < item.chunks ? most / item.chunk : item.chunks;
    item.pieces = (item.chunks - 1) / item.bunch + 1;
    int64_t held = item.chunk * item.bunch < round_up(rows, grain) ? item.chunk * item.bunch : round_up(rows, grain);
    if (keys) cut_evenly(job, &item, rows);
    if (item.uneven) held = round_up(rows, grain);
    if (keys) {
        item.blocks = (span_most(p, item.branch, p->desc.n) - 1) / LAC_ATTN_BQUERIES + 1;
#ifdef ATTN_AMX
        if (job->a->blocks.data) item.blocks = span_most(p, item.branch, p->desc.n) / (LAC_ATTN_PARTS_BLOCK / 2) + 2;
#endif
        item.turn = job->turn_count;
        if (item.chunks > 1) job->turn_count += item.segments * p->desc.batch * item.heads * item.blocks;
        if (held > job->keys) job->keys = held;
    } else {
        if (item.few) held = rows * item.heads;
#ifdef ATTN_AMX
        else if (job->a->blocks.data && !job->bwd) held = blocks_slots(held);
#endif
        if (held > job->rows) job->rows = held;
    }
    job->items[job->item_count++] = item;
}

/* query rows (of all heads) or, in the backward, keys of a phase */
static int64_t phase_rows(const attn_job *job, const int32_t *phase, int32_t which)
{
    const lac_plan *p = job->a->plan;
    int64_t all = 0;
    for (int32_t u = 0; u < p->units; u++) {
        const lac_unit *unit = &p->unit[u];
        if (phase[unit->branch] != which) continue;
        int64_t rows = ((owns_keys(job) ? p->desc.m : p->desc.n) - 1) / p->desc.dilation[unit->branch] + 1;
        all += rows * (owns_keys(job) ? 1 : unit->heads);
    }
    return all * p->desc.batch;
}

/* the most query rows of one segment of a phase */
static int64_t longest_rows(const attn_job *job, const int32_t *phase, int32_t which)
{
    const lac_plan *p = job->a->plan;
    int64_t longest = 1;
    for (int g = 0; g < p->desc.branches; g++)
        if (phase[g] == which && span_most(p, g, p->desc.n) > longest) longest = span_most(p, g, p->desc.n);
    return longest;
}

/* At least `tasks` tasks, as many for every thread, out of lattices of `longest` rows that are cut alike: three heads
 * on two threads are cut into 4 pieces each and not into 3, where one thread would have 5 to do and the other 4. */
static int64_t even_tasks(int64_t all, int64_t longest, int64_t tasks, int threads)
{
    int64_t lattices = all > longest ? (all - 1) / longest + 1 : 1, each = (tasks - 1) / lattices + 1;
    while (lattices * each % threads && each < 2 * tasks) each++;
    return lattices < tasks ? lattices * each : tasks;
}

/* Pieces of a lattice of `longest` rows, out of `all`, that give every thread as many, but of few lattices no more than
 * that takes: each piece packs keys (backward: rows) of its own. 0: there are lattices enough. */
static int64_t few_pieces(int64_t all, int64_t longest, int threads)
{
    int64_t lattices = (all - 1) / longest + 1, pieces = 1;
    if (threads == 1 || lattices >= threads * LAC_ATTN_THREAD_TASKS) return 0;
    while (lattices * pieces % threads && lattices * pieces < threads * LAC_ATTN_THREAD_TASKS) pieces++;
    return pieces;
}

/* The least rows of a chunk that pay for packing, at least `least`, as many chunks for every thread if that can be. */
static int64_t least_rows(int64_t all, int64_t longest, int64_t least, int threads)
{
    int64_t lattices = all > longest ? (all - 1) / longest + 1 : 1, most = longest / least, each = most;
    if (most < 1) return least;
    while (each > 1 && lattices * each % threads) each--;
    if (lattices * each % threads) each = most;
    return (longest - 1) / each + 1;
}

/* How many query rows (backward: keys) a chunk should have, out of `all`: enough chunks for all threads, but rows
 * enough to pay for packing. A row's sums do not depend on how the rows are cut; dq's do depend on how the keys are
 * cut, so the backward may not look at the number of threads here: it does where it puts chunks together. */
static int64_t chunk_rows(const attn_job *job, int32_t which, int64_t all, int64_t longest)
{
    if (owns_keys(job)) return lac_plan_key_chunk(job->a->plan, which);
    int64_t least = LAC_ATTN_QUERIES_LEAST, most = job->new_delta ? LAC_ATTN_BQUERIES : LAC_ATTN_QUERIES;
#ifdef ATTN_AMX
    if (job->a->blocks.data && !job->bwd) most = LAC_ATTN_BLOCKS_QUERIES;
#endif
    int64_t tasks = job->threads > 1 ? job->threads * LAC_ATTN_THREAD_TASKS : 1;
    if (job->threads > 1) tasks = even_tasks(all, longest, tasks, job->threads);
    int64_t pieces = few_pieces(all, longest, job->threads), even = pieces ? (longest - 1) / pieces + 1 : 0;
    if (!job->a->plan->desc.causal && even > least && even <= most) return round_up(even, LAC_ATTN_ROWS);
    int64_t target = round_up(all / tasks, LAC_ATTN_ROWS);
    if (target < least && job->a->plan->desc.causal) target = least; /* chunks are not alike: the more the better */
    if (target < least) target = round_up(least_rows(all, longest, least, job->threads), LAC_ATTN_ROWS);
    return target > most ? most : target;
}

/* how many keys a backward task may own (0: one chunk) */
static int64_t task_keys(const attn_job *job, int64_t all, int64_t longest)
{
    int64_t share = job->threads > 1 ? all / (job->threads * LAC_ATTN_THREAD_TASKS) : all;
    int64_t pieces = few_pieces(all, longest, job->threads), even = pieces ? (longest - 1) / pieces + 1 : 0;
    if (even > share && longest <= LAC_ATTN_KEY_RUN) share = even;
    int64_t most = job->a->blocks.data ? LAC_ATTN_BLOCKS_RUN : LAC_ATTN_KEY_RUN;
#ifdef ATTN_AMX
    if (job->a->blocks.data) most = LAC_ATTN_PARTS_RUN;
#endif
    return !owns_keys(job) ? 0 : share < most ? share : most;
}

/* Numbers the tasks of the branch whose items are the last ones from `first` on. */
static void number_tasks(attn_job *job, int64_t first)
{
    const attn_item *it = &job->items[first];
    int64_t mates = job->item_count - first, groups = (it->segments - 1) / it->group + 1;
    for (int64_t i = first; i < job->item_count; i++) {
        job->items[i].first = job->tasks;
        job->items[i].mates = mates;
    }
    job->tasks += mates * groups * it->pieces * job->a->plan->desc.batch;
}

/* Few rows: takes units that follow the item's own into it, because the keys of one position lie side by side in
 * memory, which gives them two or three times as fast as one head's alone. As many as leave a task for each thread.
 * Returns how many units the item has. */
static int32_t join_units(const attn_job *job, attn_item *item, int32_t first, int64_t rows)
{
    const lac_plan *p = job->a->plan;
    const lac_unit *unit = &p->unit[first];
    int64_t most = p->desc.kv_heads * p->desc.batch / job->threads;
    int64_t room = lac_attn_tile_keys(p->desc.head_dim) / LAC_ATTN_FEW_KEYS;
    if (most > room) most = room;
    int32_t n = 1;
    for (; n < most && first + n < p->units && rows * unit->heads * (n + 1) <= LAC_ATTN_FEW_ALL; n++) {
        const lac_unit *next = &unit[n];
        if (next->branch != unit->branch || next->offset != unit->offset || next->heads != unit->heads ||
            next->kv_head != unit->kv_head + n || next->first != unit->first + n * unit->heads)
            break;
    }
    item->units = n;
    item->heads = n * unit->heads;
    return n;
}

/* Items of a phase, branches with long segments first. */
static void add_phase(attn_job *job, const int32_t *phase, int32_t which)
{
    const lac_plan *p = job->a->plan;
    uint32_t done = job->new_delta ? job->whole : 0;
    int64_t all = phase_rows(job, phase, which), longest = longest_rows(job, phase, which);
    int64_t target = chunk_rows(job, which, all, longest), most = task_keys(job, all, longest);
    job->item_count = job->tasks = job->turn_count = job->rows = job->keys = 0;
    for (;;) {
        int best = -1;
        for (int g = 0; g < p->desc.branches; g++)
            if (phase[g] == which && !(done >> g & 1) && (best < 0 || lattice_rows(p, g) > lattice_rows(p, best)))
                best = g;
        if (best < 0) break;
        done |= (uint32_t)1 << best;
        int64_t rows = span_most(p, best, p->desc.n), first = job->item_count;
        for (int32_t u = 0; u < p->units; u++) {
            const lac_unit *unit = &p->unit[u];
            if (unit->branch != best) continue;
            attn_item item = {.branch = best,
                              .kv_head = unit->kv_head,
                              .heads = unit->heads,
                              .units = 1,
                              .head = p->unit_heads + unit->first,
                              .offset = unit->offset};
            item.few = !job->bwd && rows <= LAC_ATTN_FEW && rows * unit->heads <= LAC_ATTN_FEW_ALL;
            if (item.few) u += join_units(job, &item, u, rows) - 1;
            if (item.few || owns_keys(job)) {
                add_item(job, item, target, most);
                continue;
            }
            item.heads = 1;
            for (int32_t h = 0; h < unit->heads; h++, item.head++) add_item(job, item, target, most);
        }
        number_tasks(job, first);
    }
    int64_t rows = LAC_ATTN_BQUERIES;
#ifdef ATTN_AMX
    if (job->a->blocks.data) rows = LAC_ATTN_BLOCKS_ROWS;
#endif
    if (job->bwd) job->rows = round_up(longest < rows ? longest : rows, LAC_ATTN_BROWS);
}

static attn_task decode(const attn_job *job, int64_t number)
{
    int64_t low = 0, high = job->item_count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (job->items[middle].first <= number) low = middle;
        else high = middle - 1;
    }
    /* The same piece of all segments and heads of a branch comes before the next piece. Causal: the last rows are the
     * heaviest, and so are the first keys; and a task that must wait for its turn finds that it came long ago. */
    const attn_item *last = &job->items[low];
    int64_t groups = (last->segments - 1) / last->group + 1, each = groups * job->a->plan->desc.batch;
    int64_t at = number - last->first, piece = at / (each * last->mates);
    at -= piece * each * last->mates;
    const attn_item *item = last - last->mates + 1 + at / each;
    attn_task t = {.item = item, .chunk = owns_keys(job) ? piece * item->bunch : item->chunks - 1 - piece};
    at %= each;
    t.segment0 = item->segment0 + at % groups * item->group;
    t.segment1 = t.segment0 + item->group;
    if (t.segment1 > item->segment0 + item->segments) t.segment1 = item->segment0 + item->segments;
    t.batch = at / groups;
    return t;
}

static void run_task(const attn_job *job, int64_t number, char *workspace, bool wide)
{
    attn_task t = decode(job, number), after;
    const attn_task *next = NULL;
    if (job->bwd) {
        (wide ? attn_f64_backward_task : attn_f32_backward_task)(job, &t, workspace, job->rows, job->keys);
        return;
    }
    if (number + job->threads < job->tasks) { /* most likely this thread's next one */
        after = decode(job, number + job->threads);
        next = &after;
    }
    (wide ? attn_f64_forward_task : attn_f32_forward_task)(job, &t, next, workspace, job->rows);
}

/* Runs the tasks on up to `threads` threads, which take them in order: a task may wait for those before it. */
static void run_tasks(attn_job *job, int threads, char *workspace, size_t bytes)
{
    bool wide = job->a->q.dtype == LAC_F64;
    int64_t next = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *mine = workspace + bytes * (size_t)omp_get_thread_num();
#ifdef ATTN_AMX
        amx_begin();
#endif
        while (!__atomic_load_n(job->stop, __ATOMIC_RELAXED)) {
            int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (i >= job->tasks) break;
            if (lac_interrupted()) __atomic_store_n(job->stop, 1, __ATOMIC_RELAXED);
            else run_task(job, i, mine, wide);
        }
#ifdef ATTN_AMX
        amx_end();
#endif
    }
}

/* ---- results in the compute type ---- */

enum { ATTN_PIECE = 1 << 18, ATTN_PAST_CACHES = 4 << 20 }; /* bytes */

typedef struct attn_filling {
    char *data;
    int64_t bytes;
    uint32_t word; /* repeated */
} attn_filling;

#ifdef __SSE2__
/* Does the processor have CLZERO? It clears a line of memory past the caches in half the time of stores. */
static bool clears_lines(void)
{
    static int known; /* 1 no, 2 yes; asked once, which is slow in a virtual machine */
    int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!answer) {
        unsigned a = 0, b = 0, c = 0, d = 0;
        answer = __get_cpuid(0x80000008, &a, &b, &c, &d) && (b & 1) ? 2 : 1;
        __atomic_store_n(&known, answer, __ATOMIC_RELAXED);
    }
    return answer == 2;
}
#endif

static void fill_pieces(void *context, int64_t begin, int64_t end, int thread)
{
    const attn_filling *f = context;
    int64_t from = begin * ATTN_PIECE, to = end * ATTN_PIECE < f->bytes ? end * ATTN_PIECE : f->bytes;
    (void)thread;
#ifdef __SSE2__
    if (f->bytes > ATTN_PAST_CACHES && !((uintptr_t)f->data & 15)) {
        __m128i x = _mm_set1_epi32((int)f->word);
        if (!f->word && !((uintptr_t)f->data & 63) && clears_lines())
            for (; from + 64 <= to; from += 64) __asm__ volatile("clzero" : : "a"(f->data + from) : "memory");
        for (; from + 64 <= to; from += 64)
            for (int i = 0; i < 64; i += 16) _mm_stream_si128((__m128i *)(f->data + from + i), x);
        _mm_sfence();
    }
#endif
    if (!f->word) memset(f->data + from, 0, (size_t)(to - from));
    else
        for (; from < to; from += 4) memcpy(f->data + from, &f->word, 4);
}

/* Fills memory with a word of 4 bytes, by all threads. */
static int fill(void *data, size_t bytes, uint32_t word)
{
    attn_filling f = {.data = data, .bytes = (int64_t)bytes, .word = word};
    return LAC_CPU(parallel)("attention", (f.bytes - 1) / ATTN_PIECE + 1, f.bytes / 4, fill_pieces, &f);
}

/* -inf for `n` numbers */
static int fill_lse(const lac_view *v, void *data, int64_t n)
{
    if (v->dtype != LAC_F64) return fill(data, (size_t)n * 4, 0xff800000u);
    for (int64_t i = 0; i < n; i++) ((double *)data)[i] = -INFINITY;
    return 0;
}

/* the same for the lse of every branch: each is contiguous */
static int fill_branch_lse(const lac_view *v)
{
    int64_t branches = v->data ? v->shape[0] : 0, n = branches ? lac_view_numel(v) / branches : 0;
    for (int64_t g = 0; g < branches; g++)
        LAC_TRY(fill_lse(v, (char *)v->data + g * v->stride[0] * lac_bytes_of(v->dtype), n));
    return 0;
}

static bool is_half(const lac_view *v) { return v->dtype == LAC_F16 || v->dtype == LAC_BF16; }

/* An accumulator for t, zeroed unless `covered`: t itself, or float workspace if t is f16 or bf16. */
static int accumulator(const lac_view *t, bool covered, void **acc)
{
    size_t n = (size_t)lac_view_numel(t);
    *acc = is_half(t) ? lac_workspace_get("attention", n * sizeof(float)) : t->data;
    if (!*acc) return LAC_E_MEMORY;
    return covered ? 0 : fill(*acc, n * (t->dtype == LAC_F64 ? 8 : 4), 0);
}

/* ---- phases ---- */

/* Does one task add up all of a row of dq, and only store it? */
static bool rows_alone(const attn_job *job)
{
#ifdef ATTN_AMX
    bool alone = job->store && job->a->blocks.data;
    for (int64_t i = 0; i < job->item_count; i++) alone &= job->items[i].pieces == 1;
    return alone;
#else
    (void)job;
    return false;
#endif
}

/* Runs one phase; working memory for each thread is taken here and given back. */
static int run_phase(attn_job *job, const int32_t *phase, int32_t which)
{
    const lac_plan *p = job->a->plan;
    bool wide = job->a->q.dtype == LAC_F64;
    double work = (double)p->info.pairs * (double)p->desc.batch * p->desc.head_dim;
    int stop = 0;
    job->threads = work < LAC_PARALLEL_WORK || omp_in_parallel() ? 1 : omp_get_max_threads();
    add_phase(job, phase, which);
    if (owns_keys(job) && !job->acc_dq && !rows_alone(job)) LAC_TRY(accumulator(&job->bwd->dq, true, &job->acc_dq));
    job->stop = &stop;
    size_t bytes = job->bwd ? (wide ? attn_f64_backward_bytes : attn_f32_backward_bytes)(job, job->rows, job->keys)
                            : (wide ? attn_f64_forward_bytes : attn_f32_forward_bytes)(job, job->rows);
    bytes = (bytes + 4095) / 4096 * 4096;
    int threads = job->threads < job->tasks ? job->threads : (int)job->tasks;
    size_t turns = ((size_t)job->turn_count * sizeof(int32_t) + 63) / 64 * 64;
    char *workspace = lac_workspace_get("attention", turns + bytes * (size_t)threads);
    if (workspace) {
        job->turns = (int32_t *)workspace;
        memset(workspace, 0, turns);
        run_tasks(job, threads, workspace + turns, bytes);
        lac_workspace_put(workspace);
    }
    job->stop = NULL; /* it ends with this call */
    if (!workspace) return LAC_E_MEMORY;
    if (stop) LAC_FAIL(INTERRUPTED, "attention: interrupted");
    return 0;
}

/* The deltas of a phase's branches (see attn_backward.inc), but for those whose tasks own whole segments. */
static int run_deltas(attn_job *job, int32_t which)
{
    const lac_plan *p = job->a->plan;
    const int32_t *phase = p->backward_phase;
    if (!lac_plan_branch_delta(p)) return 0;
    bool rest = false;
    job->whole = 0;
    for (int g = 0; g < p->desc.branches; g++) {
        if (phase[g] != which) continue;
        bool whole = !job->a->blocks.data && lac_plan_key_whole(p, g);
        job->whole |= (uint32_t)whole << g;
        rest |= !whole;
    }
    if (!rest) return 0;
    job->new_delta = job->delta;
    job->delta = NULL;
    int status = run_phase(job, p->backward_phase, which);
    job->delta = job->new_delta;
    job->new_delta = NULL;
    return status;
}

static void settle_piece(void *context, int64_t begin, int64_t end, int thread)
{
    const lac_view *t = ((const lac_view *const *)context)[0];
    const float *acc = ((const void *const *)context)[1];
    int64_t n = lac_view_numel(t), from = begin << 14, to = end << 14 < n ? end << 14 : n;
    (void)thread;
    LAC_CPU(store)(t->dtype, acc + from, (uint16_t *)t->data + from, 2, to - from);
}

/* Rounds an accumulator into its tensor (if the status so far is 0) and gives it back; returns the status. */
static int settle(const lac_view *t, void *acc, int status)
{
    if (!acc || acc == t->data) return status;
    const void *context[] = {t, acc};
    int64_t n = lac_view_numel(t);
    if (!status) status = LAC_CPU(parallel)("attention", (n - 1) / (1 << 14) + 1, n, settle_piece, context);
    lac_workspace_put(acc);
    return status;
}

static int items_get(attn_job *job)
{
    int64_t most = 0;
    for (int g = 0; g < job->a->plan->desc.branches; g++) most += job->a->plan->heads[g];
    job->items = lac_workspace_get("attention", (size_t)most * sizeof *job->items);
    return job->items ? 0 : LAC_E_MEMORY;
}

/* do branches of the first phase, without dilation, write every row, so that there is nothing to clear? */
static bool covered(const lac_plan *p, const int32_t *phase)
{
    bool all = p->shift >= 0;
    int32_t heads = 0;
    for (int g = 0; g < p->desc.branches; g++) {
        if (phase[g]) continue;
        all &= p->desc.dilation[g] == 1;
        heads += p->heads[g];
    }
    return all && heads == p->desc.heads;
}

/* ---- operators ---- */

int ATTN_OPERATOR(attend)(const lac_a_attend *a)
{
#ifdef ATTN_AMX
    if (!parts_used(a)) return lac_cpu_avx512_attend(a);
#endif
    const lac_plan *p = a->plan;
    bool apart = lac_plan_branch_softmax(p), softmax_goes_on = lac_plan_many(p) && !apart;
    bool all = covered(p, p->forward_phase);
    attn_job job = {.a = a};
    if (!all || apart) LAC_TRY(fill_lse(&a->lse, a->lse.data, lac_view_numel(&a->lse)));
    LAC_TRY(fill_branch_lse(&a->branch_lse));
    if (!is_half(&a->out) || p->forward_phases > 1) LAC_TRY(accumulator(&a->out, all, &job.acc_out));
    else if (!all) LAC_TRY(fill(a->out.data, (size_t)lac_view_numel(&a->out) * 2, 0));
    int status = items_get(&job);
    for (int32_t i = 0; !status && i < p->forward_phases; i++) {
        job.carry = softmax_goes_on && i > 0;
        job.add = apart && (i > 0 || !all);
        status = run_phase(&job, p->forward_phase, i);
    }
    lac_workspace_put(job.items);
    return settle(&a->out, job.acc_out, status);
}

int ATTN_OPERATOR(attend_bwd)(const lac_a_attend_bwd *w)
{
#ifdef ATTN_AMX
    if (!parts_used(&w->forward)) return lac_cpu_avx512_attend_bwd(w);
#endif
    const lac_plan *p = w->forward.plan;
    const lac_view *q = &w->forward.q;
    attn_job job = {.a = &w->forward, .bwd = w};
    bool all = covered(p, p->backward_phase) && p->shift == 0 && p->desc.n == p->desc.m;
    bool once = all && p->backward_phases == 1; /* half types need no sums in float */
    int status = items_get(&job);
    if (!status && lac_plan_branch_delta(p)) {
        job.delta = lac_workspace_get("attention", (size_t)(p->desc.batch * p->desc.n * p->desc.heads) *
                                                       (q->dtype == LAC_F64 ? sizeof(double) : sizeof(float)));
        if (!job.delta) status = LAC_E_MEMORY;
    }
    if (!status && !(once && is_half(&w->dq))) status = accumulator(&w->dq, all, &job.acc_dq);
    if (!status && !(once && is_half(&w->dk))) status = accumulator(&w->dk, all, &job.acc_dk);
    if (!status && !(once && is_half(&w->dv))) status = accumulator(&w->dv, all, &job.acc_dv);
    for (int32_t i = 0; !status && i < p->backward_phases; i++) {
        job.store = all && i == 0;
        status = run_deltas(&job, i);
        if (!status) status = run_phase(&job, p->backward_phase, i);
    }
    lac_workspace_put(job.delta);
    lac_workspace_put(job.items);
    status = settle(&w->dq, job.acc_dq, status);
    status = settle(&w->dk, job.acc_dk, status);
    return settle(&w->dv, job.acc_dv, status);
}
