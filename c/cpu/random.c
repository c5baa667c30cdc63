/* random.c: random numbers, dropout and draws by weight on the CPU.
 *
 * A task is 64 Philox blocks, that is 256 words: the ten rounds run over arrays of counters, which vectorises (the
 * 32 x 32 -> 64 bit products are one instruction per two lanes), where a loop over blocks would not. Words are then
 * put in element order and turned into values as rng.h says, in double and rounded once, so that no instruction set
 * and no fused multiply-add can change a result that the CUDA back end must reproduce.
 * A draw by weight depends on its row and place only: with replacement a search in the running sum (double, in order),
 * without it an exponential race, whose winners in order are distributed as draws one after the other.
 * Destinations and inputs may be strided: positions are row-major whatever the strides.
 */
#include "cpu.h"
#include "../rng.h"
#include "simd.h"
#include <stdatomic.h>
#include <stdlib.h>

enum { BLOCKS = 64, WORDS = 4 * BLOCKS };

typedef struct {
    const lac_a_random *a;
    const lac_view *x, *out; /* dropout: x */
    int64_t count, per_task;
    uint64_t seed, offset;
    double top, p, scale;
} random_job;

/* words[4 i + j] is word j of block first + i */
static void philox_blocks(uint64_t seed, uint64_t offset, uint64_t first, uint32_t words[WORDS])
{
    uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS], k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        uint64_t block = first + i;
        c0[i] = (uint32_t)block;
        c1[i] = (uint32_t)(block >> 32);
        c2[i] = (uint32_t)offset;
        c3[i] = (uint32_t)(offset >> 32);
    }
    for (int round = 0; round < 10; round++) {
#pragma omp simd
        for (int i = 0; i < BLOCKS; i++) {
            uint64_t p0 = (uint64_t)0xD2511F53u * c0[i], p1 = (uint64_t)0xCD9E8D57u * c2[i];
            uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c0[i] = n0;
            c1[i] = (uint32_t)p1;
            c2[i] = n2;
            c3[i] = (uint32_t)p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < BLOCKS; i++) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
    }
}

/* units in [0, 1): 256 from words, or 128 from pairs of words */
static void units(const uint32_t words[WORDS], bool wide, double *u)
{
    if (wide)
        for (int i = 0; i < WORDS / 2; i++) u[i] = lac_rng_unit53(lac_rng_pair(words[2 * i], words[2 * i + 1]));
    else
        for (int i = 0; i < WORDS; i++) u[i] = (double)(int32_t)(words[i] >> 8) * 0x1p-24;
}

/* Box-Muller on pairs of units, in place: what lac_rng_normal2 computes, to 1e-15 */
static void normals(double *u, int n, double mean, double deviation)
{
#pragma omp simd
    for (int i = 0; i < n; i += 2) {
        double r = sqrt(-2.0 * v_log_d(1.0 - u[i])), s, c;
        v_sincos_d(6.28318530717958647692 * u[i + 1], &s, &c);
        u[i] = mean + deviation * (r * c);
        u[i + 1] = mean + deviation * (r * s);
    }
}

static void random_task(void *context, int64_t begin, int64_t end, int thread)
{
    const random_job *job = context;
    const lac_a_random *a = job->a;
    int dtype = a->out.dtype;
    bool wide = job->per_task == WORDS / 2;
    uint32_t words[WORDS];
    double u[WORDS];
    union {
        float f[WORDS];
        int64_t i[WORDS];
    } values;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t start = t * job->per_task, left = job->count - start;
        int n = (int)(left < job->per_task ? left : job->per_task), all = (int)job->per_task;
        philox_blocks(job->seed, job->offset, (uint64_t)t * BLOCKS, words);
        if (a->kind == LAC_INTEGER) {
            for (int i = 0; i < n; i++)
                values.i[i] =
                    lac_rng_integer(lac_rng_pair(words[2 * i], words[2 * i + 1]), (int64_t)a->a, (int64_t)a->b);
        } else {
            units(words, wide, u);
            if (a->kind == LAC_NORMAL) normals(u, all, a->a, a->b);
            else if (a->kind == LAC_UNIFORM)
                for (int i = 0; i < all; i++) u[i] = lac_rng_between(u[i], a->a, a->b, job->top);
            else
                for (int i = 0; i < all; i++) u[i] = lac_rng_event(u[i], a->a);
        }
        /* to the compute type of the destination */
        const void *from = u;
        int ctype = lac_compute_type(dtype);
        if (a->kind == LAC_INTEGER && ctype != C_I64) {
            for (int i = 0; i < n; i++) u[i] = (double)values.i[i];
        } else if (ctype == C_I64 && a->kind != LAC_INTEGER) {
            for (int i = 0; i < n; i++) values.i[i] = (int64_t)u[i];
        }
        if (ctype == C_F32) {
            bool half = dtype != LAC_F32;
            for (int i = 0; i < n; i++) values.f[i] = half ? v_round_odd(u[i]) : (float)u[i];
            from = values.f;
        } else if (ctype == C_I64) {
            from = values.i;
        }
        LAC_CPU(store_linear)(job->out, start, n, from);
    }
}

int LAC_CPU(random)(const lac_a_random *a)
{
    static const struct {
        int bits, least;
    } format[] = {{53, -1074}, {24, -149}, {11, -24}, {8, -133}};
    bool wide = a->out.dtype == LAC_F64 || a->kind == LAC_INTEGER;
    random_job job = {.a = a, .out = &a->out, .seed = a->seed, .offset = a->offset};
    job.count = lac_view_numel(&a->out);
    job.per_task = wide ? WORDS / 2 : WORDS;
    if (a->kind == LAC_UNIFORM)
        job.top = lac_rng_below(format[a->out.dtype].bits, format[a->out.dtype].least, a->a, a->b);
    int64_t tasks = (job.count + job.per_task - 1) / job.per_task;
    return LAC_CPU(parallel)("random", tasks, job.count, random_task, &job);
}

static void dropout_task(void *context, int64_t begin, int64_t end, int thread)
{
    const random_job *job = context;
    uint32_t words[WORDS];
    double space[WORDS], result[WORDS];
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t start = t * WORDS, left = job->count - start;
        int n = (int)(left < WORDS ? left : WORDS);
        philox_blocks(job->seed, job->offset, (uint64_t)t * BLOCKS, words);
        const void *x = LAC_CPU(load_linear)(job->x, start, n, space);
        if (job->x->dtype == LAC_F64) {
            const double *in = x;
            for (int i = 0; i < n; i++) result[i] = lac_rng_keep(words[i], (float)job->p) ? in[i] * job->scale : 0.0;
        } else {
            const float *in = x;
            float *out = (float *)result, p = (float)job->p, scale = (float)job->scale;
            for (int i = 0; i < n; i++) {
                float kept = in[i] * scale, unit = (float)(int32_t)(words[i] >> 8) * 0x1p-24f;
                out[i] = unit >= p ? kept : 0.0f;
            }
        }
        LAC_CPU(store_linear)(job->out, start, n, result);
    }
}

int LAC_CPU(dropout)(const lac_a_dropout *a)
{
    random_job job = {.x = &a->x, .out = &a->out, .seed = a->seed, .offset = a->offset, .p = a->p};
    job.scale = 1.0 / (1.0 - a->p);
    job.count = lac_view_numel(&a->out);
    return LAC_CPU(parallel)("dropout", (job.count + WORDS - 1) / WORDS, job.count, dropout_task, &job);
}

/* ---- draws by weight ---- */

enum { RACE_FEW = 64 };
typedef struct {
    double key;
    int64_t at;
} racer;

typedef struct {
    const lac_a_multinomial *a;
    int64_t rows, n, samples, bytes;
    char *workspace;         /* per thread: racers or running sums, and a row */
    atomic_int_fast64_t bad; /* the first row whose weights cannot be drawn from, or rows */
} draw_job;

static double draw_unit(const draw_job *job, int64_t i)
{
    uint32_t words[4];
    lac_philox(job->a->seed, job->a->offset, (uint64_t)i / 2, words);
    return lac_rng_unit53(i % 2 ? lac_rng_pair(words[2], words[3]) : lac_rng_pair(words[0], words[1]));
}

static int compare_racers(const void *x, const void *y)
{
    const racer *a = x, *b = y;
    if (a->key != b->key) return a->key < b->key ? -1 : 1;
    return a->at < b->at ? -1 : a->at > b->at;
}

/* the weights of a row in double; false if there is nothing to draw from */
static bool draw_weights(const draw_job *job, int64_t row, double *w)
{
    const lac_view *v = &job->a->weights;
    double sum = 0;
    int64_t positive = 0;
    const void *x = LAC_CPU(load_linear)(v, row * job->n, job->n, w);
    if (v->dtype == LAC_F64) {
        if (x != w) memcpy(w, x, (size_t)job->n * 8);
    } else {
        for (int64_t i = job->n - 1; i >= 0; i--) w[i] = (double)((const float *)x)[i];
    }
    for (int64_t i = 0; i < job->n; i++) {
        if (!(w[i] >= 0)) return false;
        sum += w[i];
        positive += w[i] > 0;
    }
    return sum > 0 && isfinite(sum) && (job->a->replacement || positive >= job->samples);
}

static void draw_again(const draw_job *job, int64_t row, const double *w, double *sums, int64_t *out)
{
    double total = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < job->n; i++) {
        total += w[i];
        sums[i] = total;
        if (w[i] > 0) last = i;
    }
    for (int64_t s = 0; s < job->samples; s++) {
        double target = draw_unit(job, row * job->samples + s) * total;
        int64_t low = 0, count = last; /* the first sum above the target; `last` if rounding leaves none */
        while (count > 0) {
            int64_t half = count / 2;
            bool up = sums[low + half] <= target;
            low = up ? low + half + 1 : low;
            count = up ? count - half - 1 : half;
        }
        out[s] = low;
    }
}

static void draw_once(const draw_job *job, int64_t row, const double *w, racer *list, int64_t *out)
{
    int64_t have = 0, few = job->samples <= RACE_FEW ? job->samples : 0;
    for (int64_t i = 0; i < job->n; i++) {
        if (w[i] == 0) continue;
        racer r = {-log1p(-draw_unit(job, row * job->n + i)) / w[i], i};
        if (!few) {
            list[have++] = r;
        } else if (have < few || r.key < list[have - 1].key) {
            int64_t j = have < few ? have++ : few - 1;
            for (; j > 0 && r.key < list[j - 1].key; j--) list[j] = list[j - 1];
            list[j] = r;
        }
    }
    if (!few) qsort(list, (size_t)have, sizeof *list, compare_racers);
    for (int64_t s = 0; s < job->samples; s++) out[s] = list[s].at;
}

static void draw_task(void *context, int64_t begin, int64_t end, int thread)
{
    draw_job *job = context;
    double *w = (double *)(void *)(job->workspace + job->bytes * thread);
    for (int64_t row = begin; row < end; row++) {
        int64_t *out = (int64_t *)job->a->out.data + row * job->samples;
        if (!draw_weights(job, row, w)) {
            int_fast64_t first = atomic_load(&job->bad);
            while (row < first && !atomic_compare_exchange_weak(&job->bad, &first, row)) {
            }
        } else if (job->a->replacement) {
            draw_again(job, row, w, w + job->n, out);
        } else {
            draw_once(job, row, w, (racer *)(void *)(w + job->n), out);
        }
    }
}

int LAC_CPU(multinomial)(const lac_a_multinomial *a)
{
    const char *op = "multinomial";
    draw_job job = {.a = a, .n = a->weights.shape[a->weights.ndim - 1], .samples = a->out.shape[a->out.ndim - 1]};
    job.rows = a->weights.ndim == 1 ? 1 : a->weights.shape[0];
    atomic_init(&job.bad, job.rows);
    if (job.rows == 0 || job.samples == 0) return 0;
    job.bytes = (job.n * 24 + 127) / 64 * 64;
    double cost = (double)job.rows * ((double)job.n * (a->replacement ? 2 : 32) + (double)job.samples * 32);
    int64_t work = cost > 1e18 ? (int64_t)1e18 : (int64_t)cost;
    job.workspace = lac_workspace_get(op, (size_t)(job.bytes * LAC_CPU(threads)(job.rows, work)));
    if (!job.workspace) return LAC_E_MEMORY;
    int status = LAC_CPU(parallel)(op, job.rows, work, draw_task, &job);
    lac_workspace_put(job.workspace);
    int64_t bad = atomic_load(&job.bad);
    if (status || bad == job.rows) return status;
    LAC_FAIL(ARGUMENT, "%s: the weights of row %lld must be finite and not negative, with %lld above 0", op,
             (long long)bad + 1, (long long)(a->replacement ? 1 : job.samples));
}
