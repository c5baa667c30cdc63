/* pos.c: rotary positions on the CPU.
 *
 * The cosines and sines of a position are the same for all heads and (unless positions are given for each) batch items,
 * so they are tabulated once per call, [N, D/2] or [B, N, D/2], and the rotation itself runs at the speed of memory.
 * XPOS's factor is folded into the table. Angles are formed in double: position times frequency in float would be off
 * by radians at a million tokens. The table of an f32 call is filled by the vector sine and cosine of simd.h; f64 calls
 * and huge angles take libm's. The transposed map, which is the gradient, is the rotation by the negative angle with
 * the same factor.
 */
#include "cpu.h"
#include "simd.h"

typedef struct {
    const lac_a_rope *a;
    int64_t n, half, table;         /* positions of x; pairs; rows of the table, N or B N */
    const int64_t *positions;       /* [table], or NULL */
    void *cosine, *sine;            /* [table, D/2] in the compute type */
    const double *frequency, *zeta; /* [D/2]: base^(-2i/D); log of XPOS's zeta, or NULL */
    int ctype;
    int64_t row_bytes;
    char *workspace; /* two rows per thread */
} rope_job;

static void table_task(void *context, int64_t begin, int64_t end, int thread)
{
    const rope_job *job = context;
    const lac_a_rope *a = job->a;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        double p = (double)(a->start + (job->positions ? job->positions[n] : n)), largest = fabs(p) * job->frequency[0];
        for (int64_t i = 0; i < job->half; i++) {
            double angle = p * job->frequency[i], s, c, factor = 1;
            if (job->ctype == C_F32 && largest < 0x1p19) {
                v_sincos_d(angle, &s, &c);
            } else {
                s = sin(angle);
                c = cos(angle);
            }
            if (job->zeta) factor = exp(a->sign * p / a->scale_base * job->zeta[i]);
            if (a->transpose) s = -s;
            if (job->ctype == C_F32) {
                ((float *)job->cosine)[n * job->half + i] = (float)(c * factor);
                ((float *)job->sine)[n * job->half + i] = (float)(s * factor);
            } else {
                ((double *)job->cosine)[n * job->half + i] = c * factor;
                ((double *)job->sine)[n * job->half + i] = s * factor;
            }
        }
    }
}

#define ROTATE(name, T)                                                                                                \
    static void name(const T *x, const T *c, const T *s, T *y, int64_t half, bool interleaved)                         \
    {                                                                                                                  \
        if (interleaved) _Pragma("omp simd") for (int64_t i = 0; i < half; i++)                                        \
            {                                                                                                          \
                T a = x[2 * i], b = x[2 * i + 1];                                                                      \
                y[2 * i] = a * c[i] - b * s[i];                                                                        \
                y[2 * i + 1] = a * s[i] + b * c[i];                                                                    \
            }                                                                                                          \
        else _Pragma("omp simd") for (int64_t i = 0; i < half; i++)                                                    \
            {                                                                                                          \
                T a = x[i], b = x[i + half];                                                                           \
                y[i] = a * c[i] - b * s[i];                                                                            \
                y[i + half] = a * s[i] + b * c[i];                                                                     \
            }                                                                                                          \
    }
ROTATE(rotate_f, float)
ROTATE(rotate_d, double)

/* a task is one (batch item, position): all heads */
static void rope_task(void *context, int64_t begin, int64_t end, int thread)
{
    const rope_job *job = context;
    const lac_view *x = &job->a->x, *out = &job->a->out;
    int64_t heads = x->shape[2], width = 2 * job->half, bytes = lac_bytes_of(x->dtype);
    char *space = job->workspace + 2 * job->row_bytes * thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t b = t / job->n, n = t % job->n, row = job->table > job->n ? t : n;
        for (int64_t h = 0; h < heads; h++) {
            const char *from = (const char *)x->data + (b * x->stride[0] + n * x->stride[1] + h * x->stride[2]) * bytes;
            char *to = (char *)out->data + (t * heads + h) * width * bytes;
            const void *v = LAC_CPU(load)(x->dtype, from, x->stride[3] * bytes, width, space);
            void *y = lac_is_native(x->dtype) ? to : space + job->row_bytes;
            if (job->ctype == C_F32)
                rotate_f(v, (float *)job->cosine + row * job->half, (float *)job->sine + row * job->half, y, job->half,
                         job->a->interleaved);
            else
                rotate_d(v, (double *)job->cosine + row * job->half, (double *)job->sine + row * job->half, y,
                         job->half, job->a->interleaved);
            if (y != to) LAC_CPU(store)(x->dtype, y, to, bytes, width);
        }
    }
}

int LAC_CPU(rope)(const lac_a_rope *a)
{
    const lac_view *x = &a->x;
    rope_job job = {.a = a, .n = x->shape[1], .half = x->shape[3] / 2, .ctype = lac_compute_type(x->dtype)};
    int64_t numel = lac_view_numel(&a->out), tasks = x->shape[0] * job.n, *positions = NULL;
    if (a->positions.data)
        LAC_TRY(LAC_CPU(indices)("rope", "position", &a->positions, INT64_C(1) << 52, NULL, &positions));
    if (numel == 0) return lac_workspace_put(positions), 0;
    job.positions = positions;
    job.table = positions ? lac_view_numel(&a->positions) : job.n;
    int64_t cells = job.table * job.half;
    size_t size = lac_compute_size(job.ctype);
    job.row_bytes = (2 * job.half * (int64_t)size + 63) / 64 * 64;
    size_t rows = (size_t)(2 * job.row_bytes * LAC_CPU(threads)(tasks, numel * 2));
    job.workspace = lac_workspace_get("rope", rows + 2 * (size_t)cells * size + 2 * (size_t)job.half * sizeof(double));
    if (!job.workspace) return lac_workspace_put(positions), LAC_E_MEMORY;
    double *frequency = (double *)(job.workspace + rows), *zeta = frequency + job.half;
    job.cosine = zeta + job.half;
    job.sine = (char *)job.cosine + (size_t)cells * size;
    job.frequency = frequency;
    job.zeta = a->scale_base > 0 ? zeta : NULL;
    for (int64_t i = 0; i < job.half; i++) {
        double part = (double)i / (double)job.half; /* 2i/D */
        frequency[i] = pow(a->base, -part);
        zeta[i] = log((part + 0.4) / 1.4);
    }
    int status = LAC_CPU(parallel)("rope", job.table, cells * 8, table_task, &job);
    if (!status) status = LAC_CPU(parallel)("rope", tasks, numel * 2, rope_task, &job);
    lac_workspace_put(job.workspace);
    lac_workspace_put(positions);
    return status;
}
