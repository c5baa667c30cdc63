/* attn.c: dilated attention on the CPU: what runs when, on which memory.
 *
 * The plan says which branches may run together (a phase); a phase is a list of items (lattices), an item is cut
 * into tasks, and OpenMP hands tasks to threads as they become free, the heavy ones first. How the work is cut
 * depends on shapes alone and no two tasks of a phase write the same row, so results do not depend on threads.
 * Short segments share a task; long ones are cut into chunks of query rows in the forward. The backward keeps a
 * segment whole, because the segment's keys are the rows of dk and dv that the task owns.
 *
 * f16 and bf16 compute in float. Where several phases meet in one row (forward), and always in the backward, sums
 * are kept in float workspace and rounded once at the end.
 *
 * Rejected: one thread per (batch, head), which leaves cores idle for long sequences, and atomics.
 */
#include "attn.h"
#include "simd.h"
#include "../rng.h"
#include <omp.h>

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
#define ATTN_LOW ATTN_LOW_16
#define ATTN_HIGH ATTN_HIGH_16
#elif ATTN_VECTOR == 32
#define ATTN_LOW ATTN_LOW_8
#define ATTN_HIGH ATTN_HIGH_8
#else
#define ATTN_LOW ATTN_LOW_4
#define ATTN_HIGH ATTN_HIGH_4
#endif
#define IREAL int32_t
#define REAL_EXP2 exp2f
#define EXP2_MAGIC 12583039.0f /* 1.5 2^23 + 127 */
#define EXP2_SHIFT 23
#define EXP2_LOWEST -126
#define EXP2_POLYNOMIAL(f)                                                                                             \
    ((((((1.5594678169e-4f * (f) + 1.3406643902e-3f) * (f) + 9.6176929730e-3f) * (f) + 5.5503105510e-2f) * (f) +       \
       2.4022652783e-1f) *                                                                                             \
          (f) +                                                                                                        \
      6.9314721497e-1f) *                                                                                              \
         (f) +                                                                                                         \
     1.0f)
#include "attn_kernel.inc"
#undef NAME
#undef ATTN_LOW
#undef ATTN_HIGH
#undef real
#undef IREAL
#undef REAL_EXP2
#undef EXP2_MAGIC
#undef EXP2_SHIFT
#undef EXP2_LOWEST
#undef EXP2_POLYNOMIAL

#define NAME(x) attn_f64_##x
#define real double
#if ATTN_VECTOR == 64
#define ATTN_LOW ATTN_LOW_8
#define ATTN_HIGH ATTN_HIGH_8
#elif ATTN_VECTOR == 32
#define ATTN_LOW ATTN_LOW_4
#define ATTN_HIGH ATTN_HIGH_4
#else
#define ATTN_LOW ATTN_LOW_2
#define ATTN_HIGH ATTN_HIGH_2
#endif
#define IREAL int64_t
#define REAL_EXP2 exp2
#define EXP2_MAGIC 6755399441056767.0 /* 1.5 2^52 + 1023 */
#define EXP2_SHIFT 52
#define EXP2_LOWEST -1022
#define EXP2_POLYNOMIAL(f)                                                                                             \
    (((((((((((((1.36691488853904124e-12 * (f) + 2.56784359934881958e-11) * (f) + 4.44553827187081007e-10) * (f) +     \
               7.05491162080112088e-9) *                                                                               \
                  (f) +                                                                                                \
              1.01780860092396960e-7) *                                                                                \
                 (f) +                                                                                                 \
             1.32154867901443053e-6) *                                                                                 \
                (f) +                                                                                                  \
            1.52527338040598377e-5) *                                                                                  \
               (f) +                                                                                                   \
           1.54035303933816061e-4) *                                                                                   \
              (f) +                                                                                                    \
          1.33335581464284411e-3) *                                                                                    \
             (f) +                                                                                                     \
         9.61812910762847688e-3) *                                                                                     \
            (f) +                                                                                                      \
        5.55041086648215762e-2) *                                                                                      \
           (f) +                                                                                                       \
       2.40226506959100694e-1) *                                                                                       \
          (f) +                                                                                                        \
      6.93147180559945286e-1) *                                                                                        \
         (f) +                                                                                                         \
     1.0)
#include "attn_kernel.inc"

/* ---- tasks ---- */

static int64_t lattice_rows(const lac_plan *p, int32_t branch)
{
    return (p->segment[branch] - 1) / p->desc.dilation[branch] + 1;
}

/* the longest segment of the branches of a phase (phase -1: of all) */
static int64_t longest_rows(const lac_plan *p, const int32_t *phase, int32_t which)
{
    int64_t longest = 0;
    for (int g = 0; g < p->desc.branches; g++) {
        int64_t rows = lattice_rows(p, g);
        if ((which < 0 || phase[g] == which) && rows > longest) longest = rows;
    }
    return longest;
}

/* Cuts one item into tasks and appends it. */
static void add_item(attn_job *job, attn_item item)
{
    const lac_plan *p = job->a->plan;
    int64_t first, last, rows = lattice_rows(p, item.branch);
    lac_plan_segments(p, item.branch, &first, &last);
    item.segment0 = first;
    item.segments = last - first;
    item.group = rows < LAC_ATTN_GROUP ? (LAC_ATTN_GROUP + rows - 1) / rows : 1;
    item.chunks = job->bwd ? 1 : (rows - 1) / job->chunk + 1;
    item.first = job->tasks;
    job->tasks += (item.segments - 1) / item.group + 1;
    job->tasks += (job->tasks - item.first) * (item.chunks * p->desc.batch - 1);
    job->items[job->item_count++] = item;
}

/* Items of a phase, branches with long segments first. */
static void add_phase(attn_job *job, const int32_t *phase, int32_t which)
{
    const lac_plan *p = job->a->plan;
    uint32_t done = 0;
    job->item_count = job->tasks = 0;
    for (;;) {
        int best = -1;
        for (int g = 0; g < p->desc.branches; g++)
            if (phase[g] == which && !(done >> g & 1) && (best < 0 || lattice_rows(p, g) > lattice_rows(p, best)))
                best = g;
        if (best < 0) return;
        done |= (uint32_t)1 << best;
        for (int32_t u = 0; u < p->units; u++) {
            const lac_unit *unit = &p->unit[u];
            if (unit->branch != best) continue;
            attn_item item = {.branch = best,
                              .kv_head = unit->kv_head,
                              .heads = unit->heads,
                              .head = p->unit_heads + unit->first,
                              .offset = unit->offset};
            if (job->bwd) add_item(job, item);
            for (int32_t h = 0; !job->bwd && h < unit->heads; h++, item.head++) add_item(job, item);
        }
    }
}

static attn_task decode(const attn_job *job, int64_t number)
{
    int64_t low = 0, high = job->item_count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (job->items[middle].first <= number) low = middle;
        else high = middle - 1;
    }
    const attn_item *item = &job->items[low];
    int64_t at = number - item->first, groups = (item->segments - 1) / item->group + 1;
    attn_task t = {.item = item, .chunk = item->chunks - 1 - at % item->chunks}; /* causal: the last is the heaviest */
    at /= item->chunks;
    t.segment0 = item->segment0 + at % groups * item->group;
    t.segment1 = t.segment0 + item->group;
    if (t.segment1 > item->segment0 + item->segments) t.segment1 = item->segment0 + item->segments;
    t.batch = at / groups;
    return t;
}

static void run_task(const attn_job *job, int64_t number, char *workspace, int64_t rows, bool wide)
{
    attn_task t = decode(job, number);
    if (job->bwd) (wide ? attn_f64_backward_task : attn_f32_backward_task)(job, &t, workspace, rows);
    else (wide ? attn_f64_forward_task : attn_f32_forward_task)(job, &t, workspace, rows);
}

/* Runs one phase; working memory for each thread is taken here and given back. */
static int run_phase(attn_job *job, const int32_t *phase, int32_t which, double pairs)
{
    const lac_plan *p = job->a->plan;
    bool wide = job->a->q.dtype == LAC_F64;
    int64_t rows = longest_rows(p, phase, which), stop = 0;
    if (!job->bwd && rows > job->chunk) rows = job->chunk;
    add_phase(job, phase, which);
    rows = (rows + LAC_ATTN_BROWS - 1) / LAC_ATTN_BROWS * LAC_ATTN_BROWS;
    size_t bytes = job->bwd ? (wide ? attn_f64_backward_bytes : attn_f32_backward_bytes)(p, rows)
                            : (wide ? attn_f64_forward_bytes : attn_f32_forward_bytes)(p, rows);
    bytes = (bytes + 4095) / 4096 * 4096;
    int threads = pairs * p->desc.head_dim < LAC_PARALLEL_WORK || omp_in_parallel() ? 1 : omp_get_max_threads();
    if (threads > job->tasks) threads = (int)job->tasks;
    char *workspace = lac_workspace_get("attention", bytes * (size_t)threads);
    if (!workspace) return LAC_E_MEMORY;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < job->tasks; i++)
        if (!stop) {
            if (lac_interrupted()) __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
            else run_task(job, i, workspace + bytes * (size_t)omp_get_thread_num(), rows, wide);
        }
    lac_workspace_put(workspace);
    if (stop) LAC_FAIL(INTERRUPTED, "attention: interrupted");
    return 0;
}

/* ---- results in the compute type ---- */

static void fill_lse(const lac_view *v)
{
    int64_t n = v->data ? lac_view_numel(v) : 0;
    if (v->dtype == LAC_F64)
        for (int64_t i = 0; i < n; i++) ((double *)v->data)[i] = -INFINITY;
    else
        for (int64_t i = 0; i < n; i++) ((float *)v->data)[i] = -INFINITY;
}

static bool is_half(const lac_view *v) { return v->dtype == LAC_F16 || v->dtype == LAC_BF16; }

/* An accumulator for t, zeroed unless `covered`: t itself, or float workspace if t is f16 or bf16. */
static int accumulator(const lac_view *t, bool covered, void **acc)
{
    size_t n = (size_t)lac_view_numel(t);
    *acc = is_half(t) ? lac_workspace_get("attention", n * sizeof(float)) : t->data;
    if (!*acc) return LAC_E_MEMORY;
    if (!covered) memset(*acc, 0, n * (t->dtype == LAC_F64 ? 8 : 4));
    return 0;
}

/* Rounds an accumulator into its tensor and gives it back. */
static void settle(const lac_view *t, void *acc, bool keep)
{
    if (!acc || acc == t->data) return;
    int64_t n = lac_view_numel(t), piece = 1 << 14;
    if (keep)
#pragma omp parallel for
        for (int64_t i = 0; i < n; i += piece)
            LAC_CPU(store)(t->dtype, (float *)acc + i, (uint16_t *)t->data + i, 2, n - i < piece ? n - i : piece);
    lac_workspace_put(acc);
}

static int items_get(attn_job *job)
{
    int64_t most = 0;
    for (int g = 0; g < job->a->plan->desc.branches; g++) most += job->a->plan->heads[g];
    job->items = lac_workspace_get("attention", (size_t)most * sizeof *job->items);
    return job->items ? 0 : LAC_E_MEMORY;
}

/* ---- operators ---- */

int LAC_CPU(attend)(const lac_a_attend *a)
{
    const lac_plan *p = a->plan;
    bool softmax_goes_on = lac_plan_many(p) && !lac_plan_branch_softmax(p);
    attn_job job = {.a = a, .chunk = LAC_ATTN_QUERIES};
    fill_lse(&a->lse);
    fill_lse(&a->branch_lse);
    job.add = lac_plan_branch_softmax(p);
    /* one phase without dilation stores every row: nothing to clear */
    bool covered = p->forward_phases == 1 && p->shift >= 0;
    for (int g = 0; g < p->desc.branches; g++) covered &= p->desc.dilation[g] == 1;
    if (!is_half(&a->out) || p->forward_phases > 1) LAC_TRY(accumulator(&a->out, covered, &job.acc_out));
    else if (!covered) memset(a->out.data, 0, (size_t)lac_view_numel(&a->out) * 2);
    int status = items_get(&job);
    for (int32_t i = 0; !status && i < p->forward_phases; i++) {
        job.carry = softmax_goes_on && i > 0;
        status = run_phase(&job, p->forward_phase, i, (double)p->info.pairs * (double)p->desc.batch);
    }
    lac_workspace_put(job.items);
    settle(&a->out, job.acc_out, !status);
    return status;
}

int LAC_CPU(attend_bwd)(const lac_a_attend_bwd *w)
{
    const lac_plan *p = w->forward.plan;
    attn_job job = {.a = &w->forward, .bwd = w};
    int status = items_get(&job);
    if (!status) status = accumulator(&w->dq, false, &job.acc_dq);
    if (!status) status = accumulator(&w->dk, false, &job.acc_dk);
    if (!status) status = accumulator(&w->dv, false, &job.acc_dv);
    for (int32_t i = 0; !status && i < p->backward_phases; i++)
        status = run_phase(&job, p->backward_phase, i, (double)p->info.pairs * (double)p->desc.batch);
    lac_workspace_put(job.items);
    settle(&w->dq, job.acc_dq, !status);
    settle(&w->dk, job.acc_dk, !status);
    settle(&w->dv, job.acc_dv, !status);
    return status;
}
