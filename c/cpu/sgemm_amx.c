/* sgemm_amx.c: matrix products of f32, bf16 and f16 on the matrix unit of Intel's processors (AMX).
 *
 * What attn_amx.inc says of the unit, of numbers in three parts of bf16 and of packed tiles holds here: six products of
 * parts for f32, four for f16 (two parts), one for bf16. The floor is the unit's 512 multiply-adds of bf16 a cycle, so
 * 85 of f32 where AVX-512 makes 32, and 512 of bf16, which OpenBLAS gets only after widening them: 2.7 and 16 times.
 * What keeps a product from it is packing, about a cycle for each number: of m x n sums of k products each side is
 * packed once for every area of C, so at 512 columns it costs a fifth of the products in f32 and as much as all of them
 * in bf16.
 *
 * Each thread makes areas of C of its own. For blocks of KC of the inner size it packs NC columns of B into 768 KiB,
 * which stay in the second cache, and then 32 rows of A at a time, which stay in the first, and multiplies 32 x 32
 * numbers of C by tiles. Every number of C is the sum of the blocks' sums in order, wherever its area begins: areas
 * suit the number of threads and no bit depends on them. One packed B for all threads was rejected: with a barrier for
 * each block eight threads were no faster than two.
 *
 * The unit knows neither infinities in parts nor numbers below 2^-126. Packing looks at what it packs, and 32 x 32
 * numbers of C whose rows or columns hold what is not finite (or numbers below 2^-102 beside others above 2^20) get
 * their products by multiply-adds. So results are as exact as in f32, or to k 2^-105 where that is more.
 *
 * In turns with OpenBLAS on a shared Xeon (Sapphire Rapids or later), one thread, while the unit was free: f32 1.4 to
 * 1.9 times as fast from 128 x 128 x 128 to 1024 x 1024 x 1024 and at 2048 x 128 x 128 (202 to 255 GFLOP/s; packing and
 * C take what is missing to 2.7), bf16 2.4 to 4.3 times; eight threads 1.3 to 2.5 and 2.8 to 4 times. While neighbours
 * had the unit, f32 0.8 to 1.1 times. OpenBLAS keeps what is smaller than SIDE_LEAST, DEPTH_LEAST or, of f32,
 * WORK_LEAST: there is too little to divide packing by (64 x 64 x 128: 0.8 to 0.95 times in f32, 1.7 in bf16). Tried
 * without gain: KC of 128 or 512, packing between the products of the strip before, asking for lines ahead.
 */
#include "cpu.h"

#ifdef LAC_MATRIX_UNIT
#include "attn_amx.inc"

enum {
    KC = 256,
    NC = 512,
    SIDE = AMX_SIDE,
    GROUP = 16,
    SIDE_LEAST = 64,
    DEPTH_LEAST = 128,
    WORK_LEAST = 1 << 20,
    WAITING = 1024
};
enum { GROUP_BYTES = KC / 32 * AMX_PARTS, STRIP_BYTES = 2 * GROUP_BYTES, PANEL_BYTES = NC / GROUP * GROUP_BYTES };

/* ---- packing ---- */

/* what was packed: the largest magnitude, and the smallest one less 1 (as bits, so that zero is none) */
typedef struct {
    uint32_t most, least;
} seen;

typedef struct {
    __m512i most, least;
} look;

static inline __attribute__((always_inline)) __m512 looked(__m512 x, look *l)
{
    __m512i size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    l->most = _mm512_max_epu32(l->most, size);
    l->least = _mm512_min_epu32(l->least, _mm512_sub_epi32(size, _mm512_set1_epi32(1)));
    return x;
}

/* `count` lines of A or columns of B, 16 at most, of depth numbers: x(i, p) = x[i * lines + p * steps], in elements */
typedef struct {
    const char *x;
    int dtype;
    int64_t lines, steps;
    int64_t count, depth;
} group;

/* up to 16 neighbours at x, zeros behind them */
static inline __attribute__((always_inline)) __m512 take(const int dtype, const char *x, int64_t count)
{
    if (dtype == LAC_F32) return amx_some((const float *)x, count);
    if (count <= 0) return _mm512_setzero_ps();
    __mmask16 there = (__mmask16)(count >= 16 ? 0xffff : (1u << count) - 1);
    __m256i half = _mm256_maskz_loadu_epi16(there, x);
    if (dtype == LAC_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* numbers that lie behind each other in a line: tiles with a line for each */
static inline __attribute__((always_inline)) void pack_lines(const int dtype, const int parts, const group *g, char *to,
                                                             look *l)
{
    const int64_t bytes = dtype == LAC_F32 ? 4 : 2;
    for (int64_t p = 0; p < g->depth; p += 32, to += AMX_PARTS)
        for (int64_t i = 0; i < GROUP; i++) {
            const char *x = g->x + (i * g->lines + p) * bytes;
            int64_t left = i < g->count ? g->depth - p : 0;
            __m512 low = looked(take(dtype, x, left), l), high = looked(take(dtype, x + 16 * bytes, left - 16), l);
            amx_join(parts, amx_split(low), amx_split(high), to + i * 64);
        }
}

/* lines that lie beside each other: tiles with a line for each two steps that are 16 apart */
static inline __attribute__((always_inline)) void pack_steps(const int dtype, const int parts, const group *g, char *to,
                                                             look *l)
{
    const int64_t step = g->steps * (dtype == LAC_F32 ? 4 : 2);
    for (int64_t p = 0; p < g->depth; p += 32, to += AMX_PARTS)
        for (int64_t i = 0; i < 16; i++) {
            const char *x = g->x + (p + i) * step;
            __m512 low = looked(take(dtype, x, p + i < g->depth ? g->count : 0), l);
            __m512 high = looked(take(dtype, x + 16 * step, p + i + 16 < g->depth ? g->count : 0), l);
            amx_join(parts, amx_split(low), amx_split(high), to + i * 64);
        }
}

static inline __attribute__((always_inline)) void pack_as(const int dtype, const int parts, const group *g, bool lines,
                                                          char *to, look *l)
{
    if (lines) pack_lines(dtype, parts, g, to, l);
    else pack_steps(dtype, parts, g, to, l);
}

/* Packs g with a line of a tile for each of its lines (A) or for each pair of its steps (B), in `parts` parts; space:
 * GROUP * KC floats. */
static seen pack(group g, int parts, bool lines, char *to, float *space)
{
    look l = {_mm512_setzero_si512(), _mm512_set1_epi32(-1)};
    int64_t bytes = lac_bytes_of(g.dtype);
    bool direct = g.steps == 1;
    if (!direct && g.lines != 1) { /* neither lies side by side */
        for (int64_t i = 0; i < g.count; i++) {
            float *line = space + i * KC;
            const char *x = g.x + i * g.lines * bytes;
            const void *from = LAC_CPU(load)(g.dtype, x, g.steps * bytes, g.depth, line);
            if (from != line) memcpy(line, from, (size_t)g.depth * sizeof(float));
        }
        g = (group){(const char *)space, LAC_F32, KC, 1, g.count, g.depth};
        direct = true;
    }
    switch (g.dtype == LAC_F32 ? parts : 3 + parts + (g.dtype == LAC_F16 ? 3 : 0)) {
    case 1:
        pack_as(LAC_F32, 1, &g, direct, to, &l);
        break;
    case 2:
        pack_as(LAC_F32, 2, &g, direct, to, &l);
        break;
    case 3:
        pack_as(LAC_F32, 3, &g, direct, to, &l);
        break;
    case 4:
        pack_as(LAC_BF16, 1, &g, direct, to, &l);
        break;
    case 6:
        pack_as(LAC_BF16, 3, &g, direct, to, &l);
        break;
    case 8:
        pack_as(LAC_F16, 2, &g, direct, to, &l);
        break;
    default:
        pack_as(LAC_F16, 3, &g, direct, to, &l);
    }
    if (direct != lines)
        for (int64_t b = 0; b < (g.depth + 31) / 32; b++) amx_transpose(to + b * AMX_PARTS, parts);
    return (seen){_mm512_reduce_max_epu32(l.most), _mm512_reduce_min_epu32(l.least)};
}

/* Are products of these exact enough by parts? */
static bool unit_can(int parts, seen a, seen b)
{
    const uint32_t infinite = 0x7f800000, large = (127u + 20) << 23, small = (127u - (parts == 3 ? 102 : 126)) << 23;
    if (a.most >= infinite || b.most >= infinite) return false;
    return !(a.least < small - 1 && b.most > large) && !(b.least < small - 1 && a.most > large);
}

static seen both(seen a, seen b)
{
    return (seen){a.most > b.most ? a.most : b.most, a.least < b.least ? a.least : b.least};
}

/* ---- areas ---- */

typedef struct {
    const lac_gemm *g;
    int parts;
    int64_t area_m, area_n, areas_m, areas_n;
    size_t each; /* bytes of one thread's workspace */
    char *workspace;
    int *stop;
} unit_job;

/* one thread's */
typedef struct {
    char *strip, *panel;
    float *sums, *edge, *space; /* of what is not f32; 32 x 32 numbers; for packing and multiply-adds */
    seen columns[NC / SIDE];
} mine;

enum { SPACE_FLOATS = 2 * SIDE * KC };

static group rows_of(const lac_gemm *g, const char *a, int64_t i, int64_t count, int64_t p, int64_t depth)
{
    return (group){
        a + (i * g->a_rs + p * g->a_cs) * lac_bytes_of(g->a_dtype), g->a_dtype, g->a_rs, g->a_cs, count, depth};
}
static group columns_of(const lac_gemm *g, const char *b, int64_t j, int64_t count, int64_t p, int64_t depth)
{
    return (group){
        b + (j * g->b_cs + p * g->b_rs) * lac_bytes_of(g->b_dtype), g->b_dtype, g->b_cs, g->b_rs, count, depth};
}

/* two groups: 32 lines */
static seen pack_side(group g, int parts, bool lines, char *to, float *space)
{
    group second = g;
    int64_t count = g.count;
    g.count = count < GROUP ? count : GROUP;
    second.x += GROUP * g.lines * lac_bytes_of(g.dtype);
    second.count = count - g.count;
    int64_t bytes = (g.depth + 31) / 32 * AMX_PARTS;
    seen s = pack(g, parts, lines, to, space);
    if (second.count > 0) return both(s, pack(second, parts, lines, to + bytes, space));
    for (int64_t b = 0; b < bytes; b += AMX_PARTS) memset(to + bytes + b, 0, (size_t)parts * AMX_TILE);
    return s;
}

/* c [rows, columns] = or += products, by multiply-adds: what is not finite becomes what IEEE 754 says */
static void plain_block(group a, group b, float *c, int64_t ldc, bool add, float *space)
{
    float *left = space, *right = space + SIDE * KC;
    int64_t ab = lac_bytes_of(a.dtype), bb = lac_bytes_of(b.dtype), depth = a.depth;
    memset(right, 0, SIDE * KC * sizeof(float));
    for (int64_t i = 0; i < a.count; i++) {
        const void *from = LAC_CPU(load)(a.dtype, a.x + i * a.lines * ab, a.steps * ab, depth, left + i * KC);
        if (from != left + i * KC) memcpy(left + i * KC, from, (size_t)depth * sizeof(float));
    }
    for (int64_t p = 0; p < depth; p++) {
        float *to = right + p * SIDE;
        const void *from = LAC_CPU(load)(b.dtype, b.x + p * b.steps * bb, b.lines * bb, b.count, to);
        if (from != to) memcpy(to, from, (size_t)b.count * sizeof(float));
    }
    for (int64_t i = 0; i < a.count; i++) {
        float sums[SIDE] = {0};
        for (int64_t p = 0; p < depth; p++)
            for (int j = 0; j < SIDE; j++) sums[j] += left[i * KC + p] * right[p * SIDE + j];
        for (int64_t j = 0; j < b.count; j++) c[i * ldc + j] = add ? c[i * ldc + j] + sums[j] : sums[j];
    }
}

static void unit_block(int parts, int64_t blocks, const char *a, const char *b, float *c, int64_t ldc, bool add)
{
    const int64_t step = blocks * AMX_PARTS;
    if (parts == 3 && add) amx_product(3, 3, blocks, a, step, b, step, c, ldc, true);
    else if (parts == 3) amx_product(3, 3, blocks, a, step, b, step, c, ldc, false);
    else if (parts == 2 && add) amx_product(2, 2, blocks, a, step, b, step, c, ldc, true);
    else if (parts == 2) amx_product(2, 2, blocks, a, step, b, step, c, ldc, false);
    else if (add) amx_product(1, 1, blocks, a, step, b, step, c, ldc, true);
    else amx_product(1, 1, blocks, a, step, b, step, c, ldc, false);
}

/* c [rows, columns] of 32 x 32 at most; whole tiles go through w->edge where C has fewer */
static void block(const unit_job *job, const mine *w, group a, seen rows, group b, seen columns, const char *panel,
                  float *c, int64_t ldc, bool whole, bool add)
{
    if (!unit_can(job->parts, rows, columns)) {
        plain_block(a, b, c, ldc, add, w->space);
        return;
    }
    int64_t blocks = (a.depth + 31) / 32;
    if (whole || (a.count == SIDE && b.count == SIDE)) {
        unit_block(job->parts, blocks, w->strip, panel, c, ldc, add);
        return;
    }
    unit_block(job->parts, blocks, w->strip, panel, w->edge, SIDE, false);
    for (int64_t i = 0; i < a.count; i++)
        for (int64_t j = 0; j < b.count; j++) {
            float x = w->edge[i * SIDE + j];
            c[i * ldc + j] = add ? c[i * ldc + j] + x : x;
        }
}

static void load_rows(const lac_gemm *g, const char *c, int64_t m, int64_t n, float *sums, int64_t ld)
{
    int64_t bytes = lac_bytes_of(g->c_dtype);
    for (int64_t i = 0; i < m; i++) {
        const void *from = LAC_CPU(load)(g->c_dtype, c + i * g->ldc * bytes, bytes, n, sums + i * ld);
        if (from != sums + i * ld) memcpy(sums + i * ld, from, (size_t)n * sizeof(float));
    }
}

/* Rows of C that have all their products: the bias, and the way into C's type. */
static void finish_rows(const lac_gemm *g, char *c, int64_t j, int64_t m, int64_t n, float *sums, int64_t ld)
{
    int64_t bytes = lac_bytes_of(g->c_dtype);
    if (g->bias) {
        float space[NC];
        int64_t step = g->bias->stride[0] * lac_bytes_of(g->bias->dtype);
        const float *bias = LAC_CPU(load)(g->bias->dtype, (const char *)g->bias->data + j * step, step, n, space);
        for (int64_t i = 0; i < m; i++)
            for (int64_t e = 0; e < n; e++) sums[i * ld + e] += bias[e];
    }
    if ((char *)sums == c) return;
    for (int64_t i = 0; i < m; i++) LAC_CPU(store)(g->c_dtype, sums + i * ld, c + i * g->ldc * bytes, bytes, n);
}

/* rows [i0, i0 + m), columns [j0, j0 + n) of one batch item, n <= NC */
static void area_columns(const unit_job *job, mine *w, const char *a, const char *b, char *c, int64_t i0, int64_t j0,
                         int64_t m, int64_t n)
{
    const lac_gemm *g = job->g;
    int64_t cb = lac_bytes_of(g->c_dtype), ld = w->sums ? NC : g->ldc;
    bool keeps = g->k > KC; /* sums of all rows wait for the next block */
    for (int64_t p = 0; p < g->k; p += KC) {
        int64_t depth = g->k - p < KC ? g->k - p : KC, side = (depth + 31) / 32 * 2 * AMX_PARTS;
        bool add = p > 0 || g->accumulate;
        for (int64_t q = 0; q < n; q += SIDE)
            w->columns[q / SIDE] = pack_side(columns_of(g, b, j0 + q, n - q < SIDE ? n - q : SIDE, p, depth),
                                             job->parts, false, w->panel + q / SIDE * side, w->space);
        for (int64_t i = 0; i < m; i += SIDE) {
            int64_t rows = m - i < SIDE ? m - i : SIDE;
            char *out = c + ((i0 + i) * g->ldc + j0) * cb;
            float *sums = w->sums ? w->sums + (keeps ? i * NC : 0) : (float *)out;
            if (lac_interrupted()) __atomic_store_n(job->stop, 1, __ATOMIC_RELAXED);
            if (__atomic_load_n(job->stop, __ATOMIC_RELAXED)) return;
            group strip = rows_of(g, a, i0 + i, rows, p, depth);
            seen there = pack_side(strip, job->parts, true, w->strip, w->space);
            if (w->sums && g->accumulate && p == 0) load_rows(g, out, rows, n, sums, ld);
            for (int64_t q = 0; q < n; q += SIDE)
                block(job, w, strip, there, columns_of(g, b, j0 + q, n - q < SIDE ? n - q : SIDE, p, depth),
                      w->columns[q / SIDE], w->panel + q / SIDE * side, sums + q, ld, w->sums, add);
            if (p + depth == g->k) finish_rows(g, out, j0, rows, n, sums, ld);
        }
    }
}

/* rows of an area that go together: where sums have to wait for the next block elsewhere than in C, 2 MiB of them */
static int64_t rows_together(const unit_job *job)
{
    bool wait = job->g->c_dtype != LAC_F32 && job->g->k > KC;
    return wait && job->area_m > WAITING ? WAITING : job->area_m;
}

static size_t sums_bytes(const unit_job *job)
{
    if (job->g->c_dtype == LAC_F32) return 0;
    int64_t rows = job->g->k > KC ? (rows_together(job) + SIDE - 1) / SIDE * SIDE : SIDE;
    return (size_t)(rows * NC) * sizeof(float);
}

static void unit_task(void *context, int64_t begin, int64_t end, int thread)
{
    const unit_job *job = context;
    const lac_gemm *g = job->g;
    char *at = job->workspace + (size_t)thread * job->each;
    at += 64 - (uintptr_t)at % 64; /* vectors are stored whole */
    mine w = {.strip = at, .panel = at + STRIP_BYTES};
    w.edge = (float *)(w.panel + PANEL_BYTES);
    w.space = w.edge + SIDE * SIDE;
    w.sums = sums_bytes(job) ? w.space + SPACE_FLOATS : NULL;
    amx_begin();
    for (int64_t t = begin; t < end; t++) {
        int64_t areas = job->areas_m * job->areas_n, item = t / areas, area = t % areas, a, b;
        lac_gemm_item(g, item, &a, &b);
        int64_t i0 = area / job->areas_n * job->area_m, j0 = area % job->areas_n * job->area_n;
        int64_t m = g->m - i0 < job->area_m ? g->m - i0 : job->area_m,
                n = g->n - j0 < job->area_n ? g->n - j0 : job->area_n;
        const int64_t rows = rows_together(job);
        for (int64_t i = 0; i < m; i += rows)
            for (int64_t j = 0; j < n; j += NC)
                area_columns(job, &w, (const char *)g->a + a * lac_bytes_of(g->a_dtype),
                             (const char *)g->b + b * lac_bytes_of(g->b_dtype),
                             (char *)g->c + item * g->m * g->ldc * lac_bytes_of(g->c_dtype), i0 + i, j0 + j,
                             m - i < rows ? m - i : rows, n - j < NC ? n - j : NC);
    }
    amx_end();
}

static int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
static int64_t cut(int64_t size, int64_t ways) { return ceil_div(ceil_div(size, ways), SIDE) * SIDE; }

/* The grid of areas that is done first by `threads` threads: most work of one thread, in multiply-adds of the unit for
 * products and 400 for each number that is packed. */
static void choose_areas(unit_job *job, int64_t items, int threads)
{
    const lac_gemm *g = job->g;
    const double products = job->parts == 3 ? 6 : job->parts == 2 ? 4 : 1, packing = 400;
    double best = 0;
    for (int64_t ways_m = 1; ways_m <= threads; ways_m++)
        for (int64_t ways_n = 1; ways_n * ways_m <= 2 * threads; ways_n++) {
            int64_t m = cut(g->m, ways_m), n = cut(g->n, ways_n);
            int64_t areas_m = ceil_div(g->m, m), areas_n = ceil_div(g->n, n);
            double each = (double)ceil_div(items * areas_m * areas_n, threads);
            double cost =
                each * ((double)m * (double)n * products + ((double)m * (double)ceil_div(n, NC) + (double)n) * packing);
            if (best > 0 && cost >= best) continue;
            best = cost;
            job->area_m = m;
            job->area_n = n;
            job->areas_m = areas_m;
            job->areas_n = areas_n;
        }
}

static int parts_of(const lac_gemm *g)
{
    if (g->a_dtype != g->b_dtype || g->a_dtype == LAC_F32) return 3;
    return g->a_dtype == LAC_F16 ? 2 : 1;
}

bool LAC_CPU(gemm_unit_takes)(const lac_gemm *g)
{
    if (lac_compute_type(g->a_dtype) != C_F32 || g->m < SIDE_LEAST || g->n < SIDE_LEAST || g->k < DEPTH_LEAST)
        return false;
    return parts_of(g) < 3 || (double)g->m * (double)g->n * (double)g->k >= WORK_LEAST;
}

int LAC_CPU(gemm_unit)(const char *op, const lac_gemm *g)
{
    int64_t items = 1;
    for (int d = 0; d < g->batch_axes; d++) items *= g->batch_shape[d];
    int stop = 0;
    unit_job job = {.g = g, .parts = parts_of(g), .stop = &stop};
    double cost = (double)items * (double)g->m * (double)g->n * (double)g->k / 8;
    int64_t work = cost > 1e18 ? (int64_t)1e18 : (int64_t)cost;
    int64_t most = items * ceil_div(g->m, SIDE) * ceil_div(g->n, SIDE);
    choose_areas(&job, items, LAC_CPU(threads)(most, work));
    int64_t tasks = items * job.areas_m * job.areas_n;
    job.each = STRIP_BYTES + PANEL_BYTES + (SIDE * SIDE + SPACE_FLOATS) * sizeof(float) + sums_bytes(&job) + 64;
    job.workspace = lac_workspace_get(op, job.each * (size_t)LAC_CPU(threads)(tasks, work));
    if (!job.workspace) return LAC_E_MEMORY;
    int status = LAC_CPU(parallel)(op, tasks, work, unit_task, &job);
    lac_workspace_put(job.workspace);
    if (!status && stop) LAC_FAIL(INTERRUPTED, "%s: interrupted", op);
    return status;
}

#else
typedef int nothing; /* for the other instruction sets; C asks for something in a file */
#endif
