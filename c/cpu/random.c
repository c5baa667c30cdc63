/* random.c: random numbers and dropout on the CPU.
 *
 * A task is 64 Philox blocks, that is 256 words: the ten rounds run over arrays of counters, which vectorises (the
 * 32 x 32 -> 64 bit products are one instruction per two lanes), where a loop over blocks would not. Words are then
 * put in element order and turned into values as rng.h says, in double and rounded once, so that no instruction set
 * and no fused multiply-add can change a result that the CUDA back end must reproduce.
 * Destinations and inputs may be strided: positions are row-major whatever the strides.
 */
#include "cpu.h"
#include "../rng.h"
#include "simd.h"

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
