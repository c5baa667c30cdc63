/* matmul.c: matrix products on the CPU, over OpenBLAS, and over sgemm.c for tall f32 ones. With a matrix unit all but
 * small ones of f32 and half types are sgemm_amx.c's, of which the following is not true.
 *
 * The product is cut into tiles by shape alone, and every tile is one single-threaded BLAS call; threads share the
 * tiles. Letting OpenBLAS spread one product over its own threads was rejected: where it cuts, and so which kernel
 * handles an edge, depends on the number of threads, and results would too. The cost of cutting is that panels are
 * packed once per tile, a few percent at 256 x 512. BLAS reads a matrix in place when one of its strides is 1 and the
 * other spans it (so transposed and sliced views cost nothing). Anything else (half precision, steps, broadcast or
 * negative strides) is packed into thread-local panels, 512 columns of the inner dimension at a time; half-precision
 * sums stay in f32 until the tile is done. OpenBLAS (OpenMP build) runs single-threaded inside a parallel region;
 * outside of one the region's thread count is set to 1 round the call and restored. A few rows go to few.c.
 */
#include "cpu.h"
#include <cblas.h>
#include <omp.h>
#include <string.h>

enum { TILE_M = 256, TILE_N = 512, PANEL = 512, FEW_TILES = 4, SMALL_TILE = 1 << 22 };

typedef struct {
    const lac_gemm *g;
    int ctype;
    bool pack_a, pack_b, buffer_c, own; /* own: tiles may go to sgemm.c */
    int64_t tile_m, tile_n, tiles_m, tiles_n, panel;
    size_t a_bytes, b_bytes, c_bytes, own_bytes; /* of one thread's workspace */
    char *workspace;
} gemm_job;

/* can BLAS read rows x cols with these strides? */
static bool blas_reads(int dtype, int64_t rows, int64_t cols, int64_t rs, int64_t cs)
{
    if (dtype > LAC_F32) return false;
    if (rs > INT32_MAX || cs > INT32_MAX) return false;
    return (cs == 1 && rs >= cols) || (rs == 1 && cs >= rows) || (cols == 1 && rs > 0) || (rows == 1 && cs > 0);
}

typedef struct {
    const void *data;
    CBLAS_TRANSPOSE trans;
    blasint ld;
} operand;

/* rows x cols at x (element strides) as BLAS sees it, through `panel` if it must be packed */
static operand operand_of(const void *x, int dtype, int64_t rows, int64_t cols, int64_t rs, int64_t cs, void *panel)
{
    operand o = {.data = x};
    int64_t bytes = lac_bytes_of(dtype), size = (int64_t)lac_compute_size(lac_compute_type(dtype));
    if (!panel) {
        /* a single column or row may have any stride; the other one is then free to be 1 */
        bool plain = cs == 1 ? rs >= cols || rows == 1 : cols == 1 && !(rs == 1 && cs >= rows);
        o.trans = plain ? CblasNoTrans : CblasTrans;
        int64_t ld = plain ? rs : cs, least = plain ? cols : rows;
        o.ld = (blasint)(ld > least ? ld : least);
        return o;
    }
    /* pack along the axis that is closer to contiguous */
    bool by_row = (cs < 0 ? -cs : cs) <= (rs < 0 ? -rs : rs);
    int64_t lines = by_row ? rows : cols, length = by_row ? cols : rows;
    int64_t line_stride = (by_row ? rs : cs) * bytes, step = (by_row ? cs : rs) * bytes;
    for (int64_t i = 0; i < lines; i++) {
        char *to = (char *)panel + i * length * size;
        const void *from = LAC_CPU(load)(dtype, (const char *)x + i * line_stride, step, length, to);
        if (from != to) memcpy(to, from, (size_t)(length * size));
    }
    o.data = panel;
    o.trans = by_row ? CblasNoTrans : CblasTrans;
    o.ld = (blasint)length;
    return o;
}

static void add_bias(const lac_view *bias, int ctype, int64_t first, void *c, int64_t m, int64_t n, int64_t ldc)
{
    double space[TILE_N];
    int64_t stride = bias->stride[0] * lac_bytes_of(bias->dtype);
    for (int64_t at = 0; at < n; at += TILE_N) {
        int64_t w = n - at < TILE_N ? n - at : TILE_N;
        const void *b = LAC_CPU(load)(bias->dtype, (const char *)bias->data + (first + at) * stride, stride, w, space);
        for (int64_t i = 0; i < m; i++) {
            if (ctype == C_F32) {
                float *row = (float *)c + i * ldc + at;
                for (int64_t j = 0; j < w; j++) row[j] += ((const float *)b)[j];
            } else {
                double *row = (double *)c + i * ldc + at;
                for (int64_t j = 0; j < w; j++) row[j] += ((const double *)b)[j];
            }
        }
    }
}

/* what a tile adds to, as floats */
static void load_tile(const lac_gemm *g, const char *c, int64_t m, int64_t n, float *sum)
{
    int64_t bytes = lac_bytes_of(g->c_dtype);
    for (int64_t i = 0; i < m; i++) {
        float *to = sum + i * n;
        const void *from = LAC_CPU(load)(g->c_dtype, c + i * g->ldc * bytes, bytes, n, to);
        if (from != to) memcpy(to, from, (size_t)n * sizeof(float));
    }
}

/* one tile: rows [i0, i0 + m), columns [j0, j0 + n) of one batch item */
static void gemm_tile(const gemm_job *job, const char *a, const char *b, char *c, int64_t i0, int64_t j0, int64_t m,
                      int64_t n, char *space)
{
    const lac_gemm *g = job->g;
    int64_t ab = lac_bytes_of(g->a_dtype), bb = lac_bytes_of(g->b_dtype), cb = lac_bytes_of(g->c_dtype);
    char *out = c + (i0 * g->ldc + j0) * cb;
    void *panel_a = job->pack_a ? space : NULL, *panel_b = job->pack_b ? space + job->a_bytes : NULL;
    void *sum = job->buffer_c ? space + job->a_bytes + job->b_bytes : out;
    int64_t ldc = job->buffer_c ? n : g->ldc;
    if (job->buffer_c && g->accumulate) load_tile(g, out, m, n, sum);
    for (int64_t k0 = 0; k0 < g->k; k0 += job->panel) {
        int64_t k = g->k - k0 < job->panel ? g->k - k0 : job->panel;
        operand x = operand_of(a + (i0 * g->a_rs + k0 * g->a_cs) * ab, g->a_dtype, m, k, g->a_rs, g->a_cs, panel_a);
        operand y = operand_of(b + (k0 * g->b_rs + j0 * g->b_cs) * bb, g->b_dtype, k, n, g->b_rs, g->b_cs, panel_b);
        double beta = k0 > 0 || g->accumulate ? 1 : 0;
        if (job->own && LAC_CPU(sgemm_takes)(m, n, g->k, x.trans == CblasNoTrans)) {
            bool flip = y.trans == CblasTrans;
            lac_sgemm own = {m, n, k, x.data, y.data, x.ld, flip ? 1 : y.ld, flip ? y.ld : 1, sum, ldc, beta != 0};
            LAC_CPU(sgemm)(&own, (float *)(space + job->a_bytes + job->b_bytes + job->c_bytes));
        } else if (job->ctype == C_F32)
            cblas_sgemm(CblasRowMajor, x.trans, y.trans, (blasint)m, (blasint)n, (blasint)k, 1.0f, x.data, x.ld, y.data,
                        y.ld, (float)beta, sum, (blasint)ldc);
        else
            cblas_dgemm(CblasRowMajor, x.trans, y.trans, (blasint)m, (blasint)n, (blasint)k, 1.0, x.data, x.ld, y.data,
                        y.ld, beta, sum, (blasint)ldc);
    }
    if (g->k == 0 && !g->accumulate)
        for (int64_t i = 0; i < m; i++)
            memset((char *)sum + (size_t)(i * ldc) * lac_compute_size(job->ctype), 0,
                   (size_t)n * lac_compute_size(job->ctype));
    if (g->bias) add_bias(g->bias, job->ctype, j0, sum, m, n, ldc);
    if (job->buffer_c)
        for (int64_t i = 0; i < m; i++) LAC_CPU(store)(g->c_dtype, (float *)sum + i * n, out + i * g->ldc * cb, cb, n);
}

static void gemm_task(void *context, int64_t begin, int64_t end, int thread)
{
    const gemm_job *job = context;
    const lac_gemm *g = job->g;
    char *space = job->workspace + (size_t)thread * (job->a_bytes + job->b_bytes + job->c_bytes + job->own_bytes);
    int threads = omp_get_max_threads();
    bool alone = !omp_in_parallel() && threads > 1;
    if (alone) omp_set_num_threads(1);
    for (int64_t t = begin; t < end; t++) {
        int64_t tiles = job->tiles_m * job->tiles_n, item = t / tiles, tile = t % tiles, a, b;
        lac_gemm_item(g, item, &a, &b);
        int64_t i0 = tile / job->tiles_n * job->tile_m, j0 = tile % job->tiles_n * job->tile_n;
        int64_t m = g->m - i0 < job->tile_m ? g->m - i0 : job->tile_m,
                n = g->n - j0 < job->tile_n ? g->n - j0 : job->tile_n;
        gemm_tile(job, (const char *)g->a + a * lac_bytes_of(g->a_dtype),
                  (const char *)g->b + b * lac_bytes_of(g->b_dtype),
                  (char *)g->c + item * g->m * g->ldc * lac_bytes_of(g->c_dtype), i0, j0, m, n, space);
    }
    if (alone) omp_set_num_threads(threads);
}

/* Tiles by shape: TILE_M x TILE_N, narrower outputs get taller tiles; few large tiles are halved for more threads. */
static void choose_tiles(gemm_job *job, int64_t items)
{
    const lac_gemm *g = job->g;
    int64_t tn = g->n < TILE_N ? g->n : TILE_N, tm = TILE_M * TILE_N / (tn > 32 ? tn : 32);
    if (tm > g->m) {
        tm = g->m;
        if (tm < TILE_M / 2) { /* few rows: wide tiles */
            tn = TILE_M * TILE_N / (tm > 32 ? tm : 32);
            if (tn > g->n) tn = g->n;
        }
    }
    for (;;) {
        job->tiles_m = (g->m + tm - 1) / tm;
        job->tiles_n = (g->n + tn - 1) / tn;
        if (job->tiles_m * job->tiles_n * items >= FEW_TILES || (double)tm * (double)tn * (double)g->k < SMALL_TILE)
            break;
        if (tm >= tn && tm > 64) tm = (tm / 2 + 15) / 16 * 16;
        else if (tn > 64) tn = (tn / 2 + 15) / 16 * 16;
        else break;
    }
    job->tile_m = tm;
    job->tile_n = tn;
}

int LAC_CPU(gemm)(const char *op, const lac_gemm *g)
{
    gemm_job job = {.g = g, .ctype = lac_compute_type(g->a_dtype)};
    int64_t items = 1;
    for (int d = 0; d < g->batch_axes; d++) items *= g->batch_shape[d];
    if (g->m == 0 || g->n == 0 || items == 0) return 0;
    if (LAC_CPU(few_fits)(g)) return LAC_CPU(few)(op, g);
#ifdef LAC_MATRIX_UNIT
    if (lac_has_unit() && LAC_CPU(gemm_unit_takes)(g)) return LAC_CPU(gemm_unit)(op, g);
#endif
    choose_tiles(&job, items);
    job.pack_a = !blas_reads(g->a_dtype, g->m, g->k, g->a_rs, g->a_cs);
    job.pack_b = !blas_reads(g->b_dtype, g->k, g->n, g->b_rs, g->b_cs);
    job.buffer_c = g->c_dtype > LAC_F32 || g->ldc > INT32_MAX;
    job.panel = job.pack_a || job.pack_b ? PANEL : INT32_MAX / 2;
    int64_t k = g->k < job.panel ? g->k : job.panel;
    size_t size = lac_compute_size(job.ctype);
    job.a_bytes = job.pack_a ? (size_t)(job.tile_m * k) * size : 0;
    job.b_bytes = job.pack_b ? (size_t)(job.tile_n * k) * size : 0;
    job.c_bytes = job.buffer_c ? (size_t)(job.tile_m * job.tile_n) * size : 0;
    int64_t tasks = items * job.tiles_m * job.tiles_n;
    double cost = (double)items * (double)g->m * (double)g->n * (double)(g->k + 1) / 8;
    int64_t work = cost > 1e18 ? (int64_t)1e18 : (int64_t)cost;
    job.own = job.ctype == C_F32 && LAC_CPU(sgemm_takes)(job.tile_m, job.tile_n, g->k, true);
    job.own_bytes = job.own ? LAC_CPU(sgemm_bytes)() : 0;
    size_t each = job.a_bytes + job.b_bytes + job.c_bytes + job.own_bytes;
    if (each) {
        job.workspace = lac_workspace_get(op, each * (size_t)LAC_CPU(threads)(tasks, work));
        if (!job.workspace) return LAC_E_MEMORY;
    }
    int status = LAC_CPU(parallel)(op, tasks, work, gemm_task, &job);
    if (job.workspace) lac_workspace_put(job.workspace);
    return status;
}

/* a [..., M, K], b [..., K, N], out [..., M, N] contiguous; batch axes of all three agree (stride 0 where broadcast) */
int LAC_CPU(matmul)(const lac_a_matmul *a)
{
    int axes = a->out.ndim - 2;
    bool add = a->bias.data == a->out.data;
    lac_gemm g = {.m = a->out.shape[axes],
                  .n = a->out.shape[axes + 1],
                  .k = a->a.shape[axes + 1],
                  .a = a->a.data,
                  .b = a->b.data,
                  .c = a->out.data,
                  .a_dtype = a->a.dtype,
                  .b_dtype = a->b.dtype,
                  .c_dtype = a->out.dtype,
                  .a_rs = a->a.stride[axes],
                  .a_cs = a->a.stride[axes + 1],
                  .b_rs = a->b.stride[axes],
                  .b_cs = a->b.stride[axes + 1],
                  .ldc = a->out.shape[axes + 1],
                  .bias = a->bias.data && !add ? &a->bias : NULL,
                  .accumulate = add,
                  .batch_axes = axes};
    for (int d = 0; d < axes; d++) {
        g.batch_shape[d] = a->out.shape[d];
        g.a_batch[d] = a->a.stride[d];
        g.b_batch[d] = a->b.stride[d];
    }
    /* one matrix b for all batch items: the items' rows are rows of one tall matrix, where a's strides allow it */
    while (g.batch_axes > 0) {
        int d = g.batch_axes - 1;
        bool one = g.batch_shape[d] == 1;
        if (!one && (g.b_batch[d] != 0 || (g.m > 1 && g.a_batch[d] != g.m * g.a_rs))) break;
        if (!one && g.m == 1) g.a_rs = g.a_batch[d];
        g.m *= g.batch_shape[d];
        g.batch_axes--;
    }
    return LAC_CPU(gemm)("matmul", &g);
}
