/* e4m3.c: numbers rounded to eight bits (e4m3: a sign, four bits of exponent, three of mantissa), with a scale a head.
 *
 * Two passes, because a scale is known when all of a head's rows have been seen: the largest magnitude, then x / scale
 * rounded and multiplied again. A maximum does not depend on the order, so threads and their number change no bit; it
 * is that of finite numbers, because one infinity in a row that nothing sees would otherwise spoil a whole head.
 * Infinity and NaN become NaN, which the eight bits have; numbers that are above 448 after rounding are 448.
 *
 * Rounding to nearest even is arithmetic on floats: above 2^-6 the bits of the mantissa below the third are added half
 * of their unit and cut off, below it (subnormal) units of 2^-9 are those of a sum with 1.5 * 2^14. Rejected: the eight
 * bits themselves and a table, one load an element more for what the attention takes as f32 anyway.
 */
#include "cpu.h"
#include <float.h>
#include <math.h>

enum { PIECE = 256 }; /* rows of a task */
#define E4M3_MOST 448.0f

typedef struct {
    const lac_a_e4m3 *a;
    int64_t n, heads, width, pieces;
    float *most;     /* of each task */
    char *workspace; /* a row per thread */
} e4m3_job;

static float most_of(const float *x, int64_t n)
{
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) {
        float magnitude = fabsf(x[i]);
        magnitude = magnitude <= FLT_MAX ? magnitude : 0;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

static void round_row(const float *x, float *y, float scale, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float part = fabsf(x[i]) / scale, small = (part + 0x1.8p14f) - 0x1.8p14f, large;
        uint32_t bits;
        part = part < E4M3_MOST ? part : E4M3_MOST;
        memcpy(&bits, &part, 4);
        bits = (bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000u;
        memcpy(&large, &bits, 4);
        y[i] = fabsf(x[i]) <= FLT_MAX ? copysignf((part < 0x1p-6f ? small : large) * scale, x[i]) : NAN;
    }
}

/* rows of task t: a piece of one head */
typedef struct {
    int64_t b, h, first, end;
} e4m3_rows;
static e4m3_rows rows_of(const e4m3_job *job, int64_t t)
{
    const int64_t piece = t % job->pieces, item = t / job->pieces, first = piece * PIECE;
    const int64_t end = first + PIECE < job->n ? first + PIECE : job->n;
    return (e4m3_rows){item / job->heads, item % job->heads, first, end};
}

static const float *row_of(const e4m3_job *job, const e4m3_rows *r, int64_t n, int thread)
{
    const lac_view *x = &job->a->x;
    const int64_t bytes = lac_bytes_of(x->dtype);
    const int64_t at = r->b * x->stride[0] + n * x->stride[1] + r->h * x->stride[2];
    return LAC_CPU(load)(x->dtype, (const char *)x->data + at * bytes, x->stride[3] * bytes, job->width,
                         (float *)job->workspace + job->width * thread);
}

static void most_task(void *context, int64_t begin, int64_t end, int thread)
{
    const e4m3_job *job = context;
    for (int64_t t = begin; t < end; t++) {
        const e4m3_rows r = rows_of(job, t);
        float most = 0;
        for (int64_t n = r.first; n < r.end; n++) {
            const float row = most_of(row_of(job, &r, n, thread), job->width);
            most = row > most ? row : most;
        }
        job->most[t] = most;
    }
}

static void round_task(void *context, int64_t begin, int64_t end, int thread)
{
    const e4m3_job *job = context;
    for (int64_t t = begin; t < end; t++) {
        const e4m3_rows r = rows_of(job, t);
        const float scale = ((const float *)job->a->scale.data)[r.b * job->heads + r.h];
        for (int64_t n = r.first; n < r.end; n++) {
            float *to = (float *)job->a->values.data + ((r.b * job->n + n) * job->heads + r.h) * job->width;
            round_row(row_of(job, &r, n, thread), to, scale, job->width);
        }
    }
}

/* A head of zeros has scale 1; no scale is subnormal, whose inverse may be infinite. */
static void scales(const e4m3_job *job, int64_t items)
{
    for (int64_t i = 0; i < items; i++) {
        float most = 0;
        for (int64_t t = i * job->pieces; t < (i + 1) * job->pieces; t++)
            most = job->most[t] > most ? job->most[t] : most;
        const float scale = most / E4M3_MOST;
        ((float *)job->a->scale.data)[i] = most == 0 ? 1 : scale < FLT_MIN ? FLT_MIN : scale;
    }
}

int LAC_CPU(e4m3)(const lac_a_e4m3 *a)
{
    const lac_view *x = &a->x;
    e4m3_job job = {.a = a, .n = x->shape[1], .heads = x->shape[2], .width = x->shape[3]};
    const int64_t items = x->shape[0] * job.heads, work = 2 * lac_view_numel(x);
    job.pieces = (job.n + PIECE - 1) / PIECE;
    const int64_t tasks = items * job.pieces, rows = job.width * LAC_CPU(threads)(tasks, work);
    job.workspace = lac_workspace_get("e4m3", (size_t)(rows + tasks) * sizeof(float));
    if (!job.workspace) return LAC_E_MEMORY;
    job.most = (float *)job.workspace + rows;
    int status = LAC_CPU(parallel)("e4m3", tasks, work, most_task, &job);
    if (!status) scales(&job, items);
    if (!status) status = LAC_CPU(parallel)("e4m3", tasks, work, round_task, &job);
    lac_workspace_put(job.workspace);
    return status;
}
