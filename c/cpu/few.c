/* few.c: products of a few rows with a wide matrix on the CPU: what decoding token by token is made of.
 *
 * C = A B with at most FEW_ROWS rows in A reads every element of B for a handful of multiply-adds, so it runs at the
 * speed of memory or not at all. BLAS packs B into panels first, which reads and writes it twice over: three times the
 * traffic. Here B is read once, in place: its columns must be contiguous (the rows of a Linear's weight [outputs,
 * inputs]), and four of them are multiplied with each row of A by plain dot products, four chains at a time. Half
 * precision is widened four columns at a time into a buffer that stays in the first-level cache.
 *
 * Every element of C is one dot product in an order that depends on K alone: not on the number of rows, on threads or
 * on the other operands' strides. A row of a small batch therefore gets the bits that it would get alone.
 * matmul.c decides by shape; a B whose rows are contiguous stays with BLAS. Rejected: cblas_sgemv (as fast for
 * one row in f32, but it reads B again for every further row and knows no half precision).
 */
#include "cpu.h"
#include <string.h>

enum { FEW_ROWS = 8, FEW_COLUMNS = 64, CHAINS = 4 };

typedef struct {
    const lac_gemm *g;
    int ctype;
    const char *a;   /* [m] rows of k, dense, in the compute type */
    int64_t lda;     /* elements */
    char *workspace; /* CHAINS columns of B for each thread, if they must be widened */
    size_t each;
} few_job;

#define DOT4(name, T)                                                                                                  \
    static void name(const T *a, const T *const *b, int64_t k, T *sum, int64_t columns)                                \
    {                                                                                                                  \
        const T *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];                                                        \
        T s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                                              \
        _Pragma("omp simd reduction(+ : s0, s1, s2, s3)") for (int64_t i = 0; i < k; i++)                              \
        {                                                                                                              \
            s0 += a[i] * b0[i];                                                                                        \
            s1 += a[i] * b1[i];                                                                                        \
            s2 += a[i] * b2[i];                                                                                        \
            s3 += a[i] * b3[i];                                                                                        \
        }                                                                                                              \
        const T all[CHAINS] = {s0, s1, s2, s3};                                                                        \
        memcpy(sum, all, (size_t)columns * sizeof(T));                                                                 \
    }
DOT4(dot4_f, float)
DOT4(dot4_d, double)

/* w columns of C from column j on, for all rows: sums [m][FEW_COLUMNS] in the compute type */
static void columns_sum(const few_job *job, int64_t j, int64_t w, char *sums, char *space)
{
    const lac_gemm *g = job->g;
    int64_t bytes = lac_bytes_of(g->b_dtype), size = (int64_t)lac_compute_size(job->ctype);
    for (int64_t at = 0; at < w; at += CHAINS) {
        const void *b[CHAINS];
        for (int64_t c = 0; c < CHAINS; c++) {
            int64_t column = j + (at + c < w ? at + c : w - 1);
            b[c] = LAC_CPU(load)(g->b_dtype, (const char *)g->b + column * g->b_cs * bytes, bytes, g->k,
                                 space + c * g->k * size);
        }
        int64_t columns = w - at < CHAINS ? w - at : CHAINS;
        for (int64_t i = 0; i < g->m; i++) {
            const char *a = job->a + i * job->lda * size;
            char *sum = sums + (i * FEW_COLUMNS + at) * size;
            if (job->ctype == C_F32) dot4_f((const float *)a, (const float *const *)b, g->k, (float *)sum, columns);
            else dot4_d((const double *)a, (const double *const *)b, g->k, (double *)sum, columns);
        }
    }
}

static void add_to(int ctype, void *sum, const void *x, int64_t n)
{
    if (ctype == C_F32)
        for (int64_t i = 0; i < n; i++) ((float *)sum)[i] += ((const float *)x)[i];
    else
        for (int64_t i = 0; i < n; i++) ((double *)sum)[i] += ((const double *)x)[i];
}

/* a task is FEW_COLUMNS columns */
static void few_task(void *context, int64_t begin, int64_t end, int thread)
{
    const few_job *job = context;
    const lac_gemm *g = job->g;
    double sums[FEW_ROWS * FEW_COLUMNS], space[FEW_COLUMNS], bias_space[FEW_COLUMNS];
    int64_t size = (int64_t)lac_compute_size(job->ctype), bytes = lac_bytes_of(g->c_dtype);
    for (int64_t t = begin; t < end; t++) {
        int64_t j = t * FEW_COLUMNS, w = g->n - j < FEW_COLUMNS ? g->n - j : FEW_COLUMNS;
        columns_sum(job, j, w, (char *)sums, job->workspace + job->each * (size_t)thread);
        const void *bias = NULL;
        if (g->bias) {
            int64_t step = g->bias->stride[0] * lac_bytes_of(g->bias->dtype);
            bias = LAC_CPU(load)(g->bias->dtype, (const char *)g->bias->data + j * step, step, w, bias_space);
        }
        for (int64_t i = 0; i < g->m; i++) {
            char *sum = (char *)sums + i * FEW_COLUMNS * size, *to = (char *)g->c + (i * g->ldc + j) * bytes;
            if (g->accumulate) add_to(job->ctype, sum, LAC_CPU(load)(g->c_dtype, to, bytes, w, space), w);
            if (bias) add_to(job->ctype, sum, bias, w);
            LAC_CPU(store)(g->c_dtype, sum, to, bytes, w);
        }
    }
}

bool LAC_CPU(few_fits)(const lac_gemm *g)
{
    for (int d = 0; d < g->batch_axes; d++)
        if (g->batch_shape[d] != 1) return false;
    return g->m <= FEW_ROWS && g->k > 0 && (g->b_rs == 1 || g->k == 1);
}

int LAC_CPU(few)(const char *op, const lac_gemm *g)
{
    few_job job = {.g = g, .ctype = lac_compute_type(g->a_dtype)};
    int64_t size = (int64_t)lac_compute_size(job.ctype), a_bytes = lac_bytes_of(g->a_dtype);
    int64_t tasks = (g->n + FEW_COLUMNS - 1) / FEW_COLUMNS;
    double cost = (double)g->m * (double)g->n * (double)(g->k + 1) / 8;
    int64_t work = cost > 1e18 ? (int64_t)1e18 : (int64_t)cost;
    bool plain_a = g->a_cs == 1 && lac_is_native(g->a_dtype);
    size_t row = (size_t)(g->k * size + 63) / 64 * 64;
    job.each = lac_is_native(g->b_dtype) ? 0 : CHAINS * row;
    size_t bytes = (plain_a ? 0 : (size_t)g->m * row) + job.each * (size_t)LAC_CPU(threads)(tasks, work);
    char *space = bytes ? lac_workspace_get(op, bytes) : NULL;
    if (bytes && !space) return LAC_E_MEMORY;
    job.a = g->a;
    job.lda = g->a_rs;
    job.workspace = space;
    if (!plain_a && space) {
        job.a = space;
        job.lda = (int64_t)row / size;
        job.workspace = space + (size_t)g->m * row;
        for (int64_t i = 0; i < g->m; i++) {
            void *to = space + (size_t)i * row;
            const void *from =
                LAC_CPU(load)(g->a_dtype, (const char *)g->a + i * g->a_rs * a_bytes, g->a_cs * a_bytes, g->k, to);
            if (from != to) memcpy(to, from, (size_t)(g->k * size));
        }
    }
    int status = LAC_CPU(parallel)(op, tasks, work, few_task, &job);
    if (space) lac_workspace_put(space);
    return status;
}
