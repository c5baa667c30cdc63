/* reduce.c: sums, products, extrema and their positions, truth, variance and log-sum-exp on the CPU.
 *
 * Kept and reduced axes are merged separately; then the axis with the smallest stride decides. If it is reduced,
 * every output is a reduction along memory ("rows"); if it is kept, up to 1024 neighbouring outputs are accumulated
 * together while memory is walked row by row in tiles of 64 rows ("columns"), which stay in cache for those reductions
 * that look twice. A few outputs of a long reduction are cut into parts of a size that depends on the shape only, and
 * the parts' results are combined in order: no thread count and no timing can show.
 *
 * Accuracy: f32, f16 and bf16 are summed in double, which is below the rounding of the result; f64 sums of 512 elements
 * (or of a tile) are added up with Neumaier's compensation. Pairwise summation in f32 was rejected: it needs a
 * recursion over strides and is worse than a conversion that costs nothing next to the memory. The variance is centred
 * block by block, the blocks combined by Chan, Golub and LeVeque's rule (1983); the log-sum-exp keeps its maximum
 * apart. Both read memory once. Extrema: NaN wins, the first of equals; positions count in row-major order, so axes are
 * not reordered for them.
 */
#include "cpu.h"
#include "simd.h"
#include <math.h>
#include <string.h>

enum {
    BLOCK = 512,
    COLUMNS = 1024,
    TILE_ROWS = 64,
    BUFFER_ROWS = 16,
    PART = 32768,
    MOST_PARTS = 64,
    LANES = 16,
    ASK = 64
};
enum { CLASS_SUM, CLASS_PRODUCT, CLASS_EXTREME, CLASS_TRUTH, CLASS_VARIANCE, CLASS_LSE };
enum { PLAIN, SQUARE, ABSOLUTE }; /* of each element before it is added or compared */

/* What is known of one output. sum: d + error, or i; product: d or i; extreme: d or i, and where; truth: i; variance:
 * mean d, sum of squared differences `error`, count i; log-sum-exp: maximum d, sum of exp(x - d) `error`.
 * at is -1 before the first element of an extremum or a log-sum-exp. */
typedef struct {
    double d, error;
    int64_t i, at;
} partial;

/* the same of neighbouring outputs */
typedef struct {
    double d[COLUMNS], error[COLUMNS];
    int64_t i[COLUMNS], at[COLUMNS];
} partials;

typedef struct {
    const lac_a_reduce *a;
    int ctype, class, transform;
    bool smallest, position, columns;
    int kept, reduced;                                            /* axes */
    int64_t ks[LAC_MAX_DIMS], kx[LAC_MAX_DIMS], ko[LAC_MAX_DIMS]; /* kept: size, x's and out's strides in bytes */
    int64_t rs[LAC_MAX_DIMS], rx[LAC_MAX_DIMS];
    int64_t outputs, count; /* number of outputs; of elements behind each */
    int64_t blocks, parts;  /* column blocks per outer row (1 for rows); parts of the reduced range */
    partial *partials;      /* [outputs][parts] when parts > 1 */
} reduce_job;

/* ---- blocks of a row ---- */

/* in lanes, because one chain of additions would wait for itself */
#define LANE_SUM(name, T, R, start, combine, expression)                                                               \
    static R name(const T *x, double c, int64_t n)                                                                     \
    {                                                                                                                  \
        R lane[LANES], s = start;                                                                                      \
        int64_t i = 0;                                                                                                 \
        (void)c;                                                                                                       \
        for (int k = 0; k < LANES; k++) lane[k] = start;                                                               \
        for (; i + LANES <= n; i += LANES) {                                                                           \
            v_ask(x + i);                                                                                              \
            _Pragma("omp simd") for (int k = 0; k < LANES; k++)                                                        \
            {                                                                                                          \
                R v = (R)x[i + k];                                                                                     \
                lane[k] = lane[k] combine(expression);                                                                 \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < n; i++) {                                                                                           \
            R v = (R)x[i];                                                                                             \
            s = s combine(expression);                                                                                 \
        }                                                                                                              \
        for (int k = 0; k < LANES; k++) s = s combine lane[k];                                                         \
        return s;                                                                                                      \
    }
LANE_SUM(sum_f, float, double, 0, +, v)
LANE_SUM(sum_d, double, double, 0, +, v)
LANE_SUM(sum_i, int64_t, uint64_t, 0, +, v)
LANE_SUM(squares_f, float, double, 0, +, (v - c) * (v - c))
LANE_SUM(squares_d, double, double, 0, +, (v - c) * (v - c))
LANE_SUM(absolute_f, float, double, 0, +, fabs(v))
LANE_SUM(absolute_d, double, double, 0, +, fabs(v))
LANE_SUM(product_f, float, double, 1, *, v)
LANE_SUM(product_d, double, double, 1, *, v)
LANE_SUM(product_i, int64_t, uint64_t, 1, *, v)

double LAC_CPU(sum)(int ctype, const void *x, int64_t n) { return ctype == C_F32 ? sum_f(x, 0, n) : sum_d(x, 0, n); }

/* Neumaier: sum and error together hold more than a double; infinities must not turn the error into NaN */
static inline void add_exact(double *sum, double *error, double x)
{
    double t = *sum + x;
    double lost = fabs(*sum) >= fabs(x) ? (*sum - t) + x : (x - t) + *sum;
    *error += isfinite(t) ? lost : 0;
    *sum = t;
}

static inline bool better_d(const reduce_job *job, double x, double best)
{
    if (best != best) return false;
    return x != x || (job->smallest ? x < best : x > best);
}

/* The extremum of a block, NaN if it has one: a comparison with NaN is false, so NaN is looked for apart, in the same
 * pass. */
#define EXTREME(name, T, I, better, start, value)                                                                      \
    static double name(const T *x, int64_t n)                                                                          \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T) };                                                                           \
        T lane[CHUNK], best = start;                                                                                   \
        I odd[CHUNK], nan = 0;                                                                                         \
        int64_t i = 0;                                                                                                 \
        for (int k = 0; k < CHUNK; k++) lane[k] = start, odd[k] = 0;                                                   \
        for (; i + CHUNK <= n; i += CHUNK) {                                                                           \
            v_ask(x + i);                                                                                              \
            _Pragma("omp simd") for (int k = 0; k < CHUNK; k++)                                                        \
            {                                                                                                          \
                T v = value(x[i + k]);                                                                                 \
                odd[k] |= v != v;                                                                                      \
                lane[k] = v better lane[k] ? v : lane[k];                                                              \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < n; i++) {                                                                                           \
            T v = value(x[i]);                                                                                         \
            nan |= v != v;                                                                                             \
            best = v better best ? v : best;                                                                           \
        }                                                                                                              \
        for (int k = 0; k < CHUNK; k++) {                                                                              \
            nan |= odd[k];                                                                                             \
            best = lane[k] better best ? lane[k] : best;                                                               \
        }                                                                                                              \
        return nan ? (double)NAN : (double)best;                                                                       \
    }
EXTREME(max_f, float, int32_t, >, -INFINITY, )
EXTREME(min_f, float, int32_t, <, INFINITY, )
EXTREME(max_d, double, int64_t, >, -(double)INFINITY, )
EXTREME(min_d, double, int64_t, <, (double)INFINITY, )
EXTREME(largest_f, float, int32_t, >, 0, fabsf)
EXTREME(largest_d, double, int64_t, >, 0, fabs)

/* where the first element is that equals m, or is NaN if m is */
#define POSITION(name, T)                                                                                              \
    static int64_t name(const T *x, double m, int64_t n)                                                               \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T) };                                                                           \
        T best = (T)m;                                                                                                 \
        bool nan = m != m;                                                                                             \
        int64_t i = 0;                                                                                                 \
        for (; i + CHUNK <= n; i += CHUNK) {                                                                           \
            int found = 0;                                                                                             \
            _Pragma("omp simd reduction(| : found)") for (int k = 0; k < CHUNK; k++) found |=                          \
                (x[i + k] == best) | (x[i + k] != x[i + k]);                                                           \
            if (found) break;                                                                                          \
        }                                                                                                              \
        while (i < n && !(nan ? x[i] != x[i] : x[i] == best)) i++;                                                     \
        return i;                                                                                                      \
    }
POSITION(position_f, float)
POSITION(position_d, double)

static void block_extreme_f(const reduce_job *job, partial *p, const void *x, int64_t n, int64_t first)
{
    bool single = job->ctype == C_F32;
    double m;
    if (job->transform == ABSOLUTE) m = single ? largest_f(x, n) : largest_d(x, n);
    else m = single ? (job->smallest ? min_f : max_f)(x, n) : (job->smallest ? min_d : max_d)(x, n);
    if (p->at >= 0 && !better_d(job, m, p->d)) return;
    p->d = m;
    p->at = first;
    if (job->position) p->at += single ? position_f(x, m, n) : position_d(x, m, n);
}

static void block_extreme_i(const reduce_job *job, partial *p, const int64_t *x, int64_t n, int64_t first)
{
    for (int64_t i = 0; i < n; i++)
        if (p->at < 0 || (job->smallest ? x[i] < p->i : x[i] > p->i)) {
            p->i = x[i];
            p->at = first + i;
        }
}

static int64_t count_true(int ctype, const void *x, int64_t n)
{
    int64_t c = 0;
    if (ctype == C_F32)
        for (int64_t i = 0; i < n; i++) c += ((const float *)x)[i] != 0;
    else if (ctype == C_F64)
        for (int64_t i = 0; i < n; i++) c += ((const double *)x)[i] != 0;
    else
        for (int64_t i = 0; i < n; i++) c += ((const int64_t *)x)[i] != 0;
    return c;
}

/* ---- combining what is known of two sets of elements ---- */

/* sums of exp(x - d) move to the larger maximum; an infinite or undefined maximum is the result already */
static void lse_combine(partial *into, double d, double sum)
{
    if (into->at < 0) {
        into->at = 0;
        into->d = d;
        into->error = sum;
        return;
    }
    double a = into->d, top = a != a || a > d ? a : d;
    into->error = isfinite(top) ? into->error * (a < top ? exp(a - top) : 1) + sum * (d < top ? exp(d - top) : 1) : 0;
    into->d = top;
}

static void variance_combine(partial *into, double mean, double squares, int64_t n)
{
    double all = (double)(into->i + n), step = mean - into->d;
    if (n == 0) return;
    into->error += squares + step * step * ((double)into->i * (double)n / all);
    into->d += step * ((double)n / all);
    into->i += n;
}

static void combine(const reduce_job *job, partial *into, const partial *p)
{
    switch (job->class) {
    case CLASS_EXTREME:
        if (p->at < 0) return;
        if (into->at < 0 ||
            (job->ctype == C_I64 ? (job->smallest ? p->i < into->i : p->i > into->i) : better_d(job, p->d, into->d)))
            *into = *p;
        return;
    case CLASS_LSE:
        if (p->at >= 0) lse_combine(into, p->d, p->error);
        return;
    case CLASS_VARIANCE:
        variance_combine(into, p->d, p->error, p->i);
        return;
    case CLASS_PRODUCT:
        into->i = (int64_t)((uint64_t)into->i * (uint64_t)p->i);
        into->d *= p->d;
        return;
    default:
        into->i = (int64_t)((uint64_t)into->i + (uint64_t)p->i);
        add_exact(&into->d, &into->error, p->d);
        into->error += p->error;
    }
}

static partial nothing(const reduce_job *job)
{
    return job->class == CLASS_PRODUCT ? (partial){.d = 1, .i = 1, .at = -1} : (partial){.at = -1};
}

static double lse_block(int ctype, const void *x, double top, int64_t n)
{
    double s = 0;
    if (ctype == C_F32) {
        const float *f = x, m = (float)top;
        float lane[LANES] = {0}, t = 0;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES)
            _Pragma("omp simd") for (int k = 0; k < LANES; k++) lane[k] += v_exp_termf(f[i + k] - m);
        for (; i < n; i++) t += v_exp_termf(f[i] - m);
        for (int k = 0; k < LANES; k++) t += lane[k];
        return (double)t;
    }
    const double *d = x;
    for (int64_t i = 0; i < n; i++) s += exp(d[i] - top);
    return s;
}

/* at most BLOCK elements of one output */
static void block_add(const reduce_job *job, partial *p, const void *x, int64_t n, int64_t first)
{
    bool single = job->ctype == C_F32;
    switch (job->class) {
    case CLASS_TRUTH:
        p->i += count_true(job->ctype, x, n);
        return;
    case CLASS_EXTREME:
        if (job->ctype == C_I64) block_extreme_i(job, p, x, n, first);
        else block_extreme_f(job, p, x, n, first);
        return;
    case CLASS_LSE: {
        double top = single ? max_f(x, n) : max_d(x, n);
        lse_combine(p, top, isfinite(top) ? lse_block(job->ctype, x, top, n) : 0);
        return;
    }
    case CLASS_VARIANCE: {
        double mean = LAC_CPU(sum)(job->ctype, x, n) / (double)n;
        variance_combine(p, mean, (single ? squares_f(x, mean, n) : squares_d(x, mean, n)), n);
        return;
    }
    case CLASS_PRODUCT:
        if (job->ctype == C_I64) p->i = (int64_t)((uint64_t)p->i * product_i(x, 0, n));
        else p->d *= single ? product_f(x, 0, n) : product_d(x, 0, n);
        return;
    default:
        if (job->ctype == C_I64) p->i = (int64_t)((uint64_t)p->i + sum_i(x, 0, n));
        else if (job->transform == SQUARE)
            add_exact(&p->d, &p->error, single ? squares_f(x, 0, n) : squares_d(x, 0, n));
        else if (job->transform == ABSOLUTE)
            add_exact(&p->d, &p->error, single ? absolute_f(x, 0, n) : absolute_d(x, 0, n));
        else add_exact(&p->d, &p->error, LAC_CPU(sum)(job->ctype, x, n));
    }
}

/* ---- walking the reduced range ---- */

typedef struct {
    int64_t index[LAC_MAX_DIMS];
    const char *at;
} reduced_cursor;

static void reduced_seek(const reduce_job *job, reduced_cursor *c, const char *base, int64_t position)
{
    c->at = base;
    for (int d = job->reduced - 1; d >= 0; d--) {
        int64_t size = job->rs[d] ? job->rs[d] : 1; /* an empty range has no position but 0 */
        c->index[d] = position % size;
        position /= size;
        c->at += c->index[d] * job->rx[d];
    }
}

/* steps over n elements of the last reduced axis, which must not pass its end */
static void reduced_step(const reduce_job *job, reduced_cursor *c, int64_t n)
{
    int d = job->reduced - 1;
    c->index[d] += n;
    c->at += n * job->rx[d];
    while (d > 0 && c->index[d] == job->rs[d]) {
        c->at -= job->rs[d] * job->rx[d];
        c->index[d--] = 0;
        c->index[d]++;
        c->at += job->rx[d];
    }
}

/* one output: elements [begin, end) of its reduced range */
static void reduce_row(const reduce_job *job, const char *base, int64_t begin, int64_t end, partial *p)
{
    double space[BLOCK];
    reduced_cursor c;
    int last = job->reduced - 1, dtype = job->a->x.dtype;
    if (begin >= end) return; /* also when an axis has no elements */
    reduced_seek(job, &c, base, begin);
    for (int64_t r = begin, n; r < end; r += n) {
        n = job->rs[last] - c.index[last];
        if (n > BLOCK) n = BLOCK;
        if (n > end - r) n = end - r;
        block_add(job, p, LAC_CPU(load)(dtype, c.at, job->rx[last], n, space), n, r);
        reduced_step(job, &c, n);
    }
}

/* ---- tiles of columns ---- */

/* Adds `expression` of v, column by column, into the doubles (or integers) sum[w]; four rows at a time, while the next
 * four are asked for: every row is a new page to the hardware. */
#define TILE_SUM(T, R, expression)                                                                                     \
    do {                                                                                                               \
        int64_t r_ = 0;                                                                                                \
        const intptr_t ahead_ = rows > 1 ? 4 * ((intptr_t)row[1] - (intptr_t)row[0]) : 0;                              \
        for (; r_ + 4 <= rows; r_ += 4) {                                                                              \
            const T *x0 = row[r_], *x1 = row[r_ + 1], *x2 = row[r_ + 2], *x3 = row[r_ + 3];                            \
            for (int64_t at_ = 0; at_ < w; at_ += ASK) {                                                               \
                int64_t end_ = w - at_ < ASK ? w : at_ + ASK;                                                          \
                for (int i_ = 0; i_ < 4; i_++)                                                                         \
                    v_prefetch((const char *)((const T *)row[r_ + i_] + at_) + ahead_, ASK * (int64_t)sizeof(T));      \
                _Pragma("omp simd") for (int64_t j = at_; j < end_; j++)                                               \
                {                                                                                                      \
                    R v = (R)x0[j], s_ = (expression);                                                                 \
                    v = (R)x1[j], s_ += (expression);                                                                  \
                    v = (R)x2[j], s_ += (expression);                                                                  \
                    v = (R)x3[j], s_ += (expression);                                                                  \
                    sum[j] += s_;                                                                                      \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (; r_ < rows; r_++) {                                                                                      \
            const T *x0 = row[r_];                                                                                     \
            _Pragma("omp simd") for (int64_t j = 0; j < w; j++)                                                        \
            {                                                                                                          \
                R v = (R)x0[j];                                                                                        \
                sum[j] += (expression);                                                                                \
            }                                                                                                          \
        }                                                                                                              \
    } while (0)

static void tile_sum(const reduce_job *job, partials *p, const void *const *row, int64_t rows, int64_t w)
{
    double sum[COLUMNS];
    memset(sum, 0, (size_t)w * sizeof *sum);
    if (job->ctype == C_F32) {
        if (job->transform == SQUARE) TILE_SUM(float, double, v *v);
        else if (job->transform == ABSOLUTE) TILE_SUM(float, double, fabs(v));
        else TILE_SUM(float, double, v);
    } else {
        if (job->transform == SQUARE) TILE_SUM(double, double, v *v);
        else if (job->transform == ABSOLUTE) TILE_SUM(double, double, fabs(v));
        else TILE_SUM(double, double, v);
    }
    for (int64_t j = 0; j < w; j++) add_exact(&p->d[j], &p->error[j], sum[j]);
}

static void tile_variance(const reduce_job *job, partials *p, const void *const *row, int64_t rows, int64_t w)
{
    double sum[COLUMNS], mean[COLUMNS];
    memset(sum, 0, (size_t)w * sizeof *sum);
    if (job->ctype == C_F32) TILE_SUM(float, double, v);
    else TILE_SUM(double, double, v);
    for (int64_t j = 0; j < w; j++) mean[j] = sum[j] / (double)rows, sum[j] = 0;
    if (job->ctype == C_F32) TILE_SUM(float, double, (v - mean[j]) * (v - mean[j]));
    else TILE_SUM(double, double, (v - mean[j]) * (v - mean[j]));
    for (int64_t j = 0; j < w; j++) {
        partial one = {.d = p->d[j], .error = p->error[j], .i = p->i[j]};
        variance_combine(&one, mean[j], sum[j], rows);
        p->d[j] = one.d, p->error[j] = one.error, p->i[j] = one.i;
    }
}

static void tile_integers(const reduce_job *job, partials *p, const void *const *row, int64_t rows, int64_t w)
{
    int64_t *sum = p->i;
    if (job->class == CLASS_SUM)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < w; j++)
                sum[j] = (int64_t)((uint64_t)sum[j] + (uint64_t)((const int64_t *)row[r])[j]);
    else if (job->class == CLASS_PRODUCT)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < w; j++)
                sum[j] = (int64_t)((uint64_t)sum[j] * (uint64_t)((const int64_t *)row[r])[j]);
    else if (job->ctype == C_I64) TILE_SUM(int64_t, int64_t, v != 0);
    else if (job->ctype == C_F64)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < w; j++) sum[j] += ((const double *)row[r])[j] != 0;
    else
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < w; j++) sum[j] += ((const float *)row[r])[j] != 0;
}

static void tile_product(const reduce_job *job, partials *p, const void *const *row, int64_t rows, int64_t w)
{
    for (int64_t r = 0; r < rows; r++) {
        if (job->ctype == C_F32)
            for (int64_t j = 0; j < w; j++) p->d[j] *= (double)((const float *)row[r])[j];
        else
            for (int64_t j = 0; j < w; j++) p->d[j] *= ((const double *)row[r])[j];
    }
}

/* functions of their own, because gcc does not vectorise these loops inside of others */
static __attribute__((noinline)) void columns_max(const float *restrict x, float *restrict m, int64_t w)
{
#pragma omp simd
    for (int64_t j = 0; j < w; j++) m[j] = x[j] > m[j] || x[j] != x[j] ? x[j] : m[j];
}
static __attribute__((noinline)) void columns_exp(const float *restrict x, const float *restrict m, float *restrict s,
                                                  const char *ahead, int64_t w)
{
    int64_t j = 0;
    for (; j + LANES <= w; j += LANES) {
        __builtin_prefetch(ahead + 4 * j, 0, 2); /* of the next tile */
#pragma omp simd
        for (int k = 0; k < LANES; k++) s[j + k] += v_exp_termf(x[j + k] - m[j + k]);
    }
    for (; j < w; j++) s[j] += v_exp_termf(x[j] - m[j]);
}
/* lse_combine of neighbouring columns, in float: their maxima are floats */
static __attribute__((noinline)) void columns_combine(const float *restrict m, const float *restrict s,
                                                      double *restrict d, double *restrict error, int64_t w)
{
#pragma omp simd
    for (int64_t j = 0; j < w; j++) {
        float a = (float)d[j], top = a > m[j] || a != a ? a : m[j], mine = m[j] == -INFINITY ? 0 : s[j];
        double both = error[j] * (double)v_exp_termf(a - top) + (double)mine * (double)v_exp_termf(m[j] - top);
        error[j] = top - top == 0 ? both : 0; /* an infinite or undefined maximum is the result already */
        d[j] = (double)top;
    }
}

static void tile_lse_f(partials *p, const void *const *row, int64_t rows, int64_t w)
{
    float m[COLUMNS], s[COLUMNS];
    const char *next = row[rows - 1];
    int64_t step = rows > 1 ? next - (const char *)row[rows - 2] : 0;
    for (int64_t j = 0; j < w; j++) m[j] = -INFINITY, s[j] = 0;
    for (int64_t r = 0; r < rows; r++) columns_max(row[r], m, w);
    for (int64_t r = 0; r < rows; r++) columns_exp(row[r], m, s, next + (r + 1) * step, w);
    for (int64_t j = 0; j < w; j++)
        if (p->at[j] < 0) p->d[j] = -(double)INFINITY, p->error[j] = 0, p->at[j] = 0;
    columns_combine(m, s, p->d, p->error, w);
}

static void tile_lse(const reduce_job *job, partials *p, const void *const *row, int64_t rows, int64_t w)
{
    double sum[COLUMNS], top[COLUMNS];
    if (job->ctype == C_F32) {
        tile_lse_f(p, row, rows, w);
        return;
    }
    for (int64_t j = 0; j < w; j++) sum[j] = 0, top[j] = -(double)INFINITY;
    for (int64_t r = 0; r < rows; r++) {
        const double *x = row[r];
        for (int64_t j = 0; j < w; j++) top[j] = x[j] > top[j] || x[j] != x[j] ? x[j] : top[j];
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < w; j++) sum[j] += exp(((const double *)row[r])[j] - top[j]);
    for (int64_t j = 0; j < w; j++) {
        partial one = {.d = p->d[j], .error = p->error[j], .at = p->at[j]};
        lse_combine(&one, top[j], isfinite(top[j]) ? sum[j] : 0);
        p->d[j] = one.d, p->error[j] = one.error, p->at[j] = one.at;
    }
}

/* the best of each column of a tile and, if wanted, its row; NaN wins, the first of equals */
#define TILE_EXTREME(name, T, I)                                                                                       \
    static void name(const reduce_job *job, const void *const *row, int64_t rows, int64_t w, T *best, I *at)           \
    {                                                                                                                  \
        memcpy(best, row[0], (size_t)w * sizeof(T));                                                                   \
        memset(at, 0, (size_t)w * sizeof(I));                                                                          \
        for (int64_t r = 1; r < rows; r++) {                                                                           \
            const T *x = row[r];                                                                                       \
            I here = (I)r;                                                                                             \
            if (job->smallest) _Pragma("omp simd") for (int64_t j = 0; j < w; j++)                                     \
                {                                                                                                      \
                    bool take = (x[j] < best[j]) | ((x[j] != x[j]) & (best[j] == best[j]));                            \
                    best[j] = take ? x[j] : best[j];                                                                   \
                    at[j] = take ? here : at[j];                                                                       \
                }                                                                                                      \
            else _Pragma("omp simd") for (int64_t j = 0; j < w; j++)                                                   \
                {                                                                                                      \
                    bool take = (x[j] > best[j]) | ((x[j] != x[j]) & (best[j] == best[j]));                            \
                    best[j] = take ? x[j] : best[j];                                                                   \
                    at[j] = take ? here : at[j];                                                                       \
                }                                                                                                      \
        }                                                                                                              \
    }
TILE_EXTREME(tile_extreme_f, float, int32_t)
TILE_EXTREME(tile_extreme_d, double, int64_t)
TILE_EXTREME(tile_extreme_i, int64_t, int64_t)

/* Four rows into the best of each column, without positions: NaN wins. `ahead`: bytes to the four rows after them. */
#define COLUMNS_BEST(name, than)                                                                                       \
    static __attribute__((noinline)) void name(const float *const *x, intptr_t ahead, float *restrict best, int64_t w) \
    {                                                                                                                  \
        for (int64_t at = 0; at < w; at += ASK) {                                                                      \
            int64_t end = w - at < ASK ? w : at + ASK;                                                                 \
            for (int i = 0; i < 4; i++) v_prefetch((const char *)(x[i] + at) + ahead, ASK * (int64_t)sizeof(float));   \
            const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];                                                \
            _Pragma("omp simd") for (int64_t j = at; j < end; j++)                                                     \
            {                                                                                                          \
                float b = best[j];                                                                                     \
                b = (x0[j] than b) | (x0[j] != x0[j]) ? x0[j] : b;                                                     \
                b = (x1[j] than b) | (x1[j] != x1[j]) ? x1[j] : b;                                                     \
                b = (x2[j] than b) | (x2[j] != x2[j]) ? x2[j] : b;                                                     \
                best[j] = (x3[j] than b) | (x3[j] != x3[j]) ? x3[j] : b;                                               \
            }                                                                                                          \
        }                                                                                                              \
    }
COLUMNS_BEST(columns_most, >)
COLUMNS_BEST(columns_least, <)

/* the best of earlier tiles and of this one; sign -1 looks for the smallest */
static __attribute__((noinline)) void columns_better(partials *p, const float *restrict best, double sign, int64_t w)
{
    double *restrict d = p->d;
    int64_t *restrict at = p->at;
#pragma omp simd
    for (int64_t j = 0; j < w; j++) {
        double v = (double)best[j], old = at[j] < 0 ? -sign * (double)INFINITY : d[j];
        d[j] = (sign * v > sign * old) | (v != v) ? v : old;
        at[j] = 0;
    }
}

static void tile_best_f(const reduce_job *job, const void *const *row, int64_t rows, int64_t w, float *best)
{
    const intptr_t ahead = rows > 1 ? 4 * ((intptr_t)row[1] - (intptr_t)row[0]) : 0;
    memcpy(best, row[0], (size_t)w * sizeof(float));
    for (int64_t r = 1; r < rows; r += 4) {
        const float *x[4]; /* the last row fills up the last four */
        for (int64_t i = 0; i < 4; i++) x[i] = row[r + i < rows ? r + i : rows - 1];
        (job->smallest ? columns_least : columns_most)(x, ahead, best, w);
    }
}

static void tile_extreme(const reduce_job *job, partials *p, const void *const *row, int64_t rows, int64_t w,
                         int64_t first)
{
    union {
        float f[COLUMNS];
        double d[COLUMNS];
        int64_t i[COLUMNS];
    } best;
    union {
        int32_t narrow[COLUMNS];
        int64_t wide[COLUMNS];
    } at;
    if (job->transform == ABSOLUTE) { /* the largest magnitude: no position */
        for (int64_t j = 0; j < w; j++) best.d[j] = 0, at.wide[j] = 0;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < w; j++) {
                double v = job->ctype == C_F32 ? (double)((const float *)row[r])[j] : ((const double *)row[r])[j];
                best.d[j] = fabs(v) > best.d[j] || v != v ? fabs(v) : best.d[j];
            }
    } else if (job->ctype == C_F32 && !job->position) {
        tile_best_f(job, row, rows, w, best.f);
        columns_better(p, best.f, job->smallest ? -1 : 1, w);
        return;
    } else if (job->ctype == C_F32) {
        tile_extreme_f(job, row, rows, w, best.f, at.narrow);
    } else if (job->ctype == C_F64) {
        tile_extreme_d(job, row, rows, w, best.d, at.wide);
    } else {
        tile_extreme_i(job, row, rows, w, best.i, at.wide);
    }
    bool narrow = job->ctype == C_F32 && job->transform != ABSOLUTE;
    for (int64_t j = 0; j < w; j++) {
        int64_t where = job->position ? first + (narrow ? at.narrow[j] : at.wide[j]) : 0;
        if (job->ctype == C_I64) {
            if (p->at[j] >= 0 && !(job->smallest ? best.i[j] < p->i[j] : best.i[j] > p->i[j])) continue;
            p->i[j] = best.i[j];
        } else {
            double v = narrow ? (double)best.f[j] : best.d[j];
            if (p->at[j] >= 0 && !better_d(job, v, p->d[j])) continue;
            p->d[j] = v;
        }
        p->at[j] = where;
    }
}

static void tile_add(const reduce_job *job, partials *p, const void *const *row, int64_t rows, int64_t w, int64_t first)
{
    if (job->class == CLASS_EXTREME) tile_extreme(job, p, row, rows, w, first);
    else if (job->class == CLASS_TRUTH || job->ctype == C_I64) tile_integers(job, p, row, rows, w);
    else if (job->class == CLASS_VARIANCE) tile_variance(job, p, row, rows, w);
    else if (job->class == CLASS_LSE) tile_lse(job, p, row, rows, w);
    else if (job->class == CLASS_PRODUCT) tile_product(job, p, row, rows, w);
    else tile_sum(job, p, row, rows, w);
}

/* w neighbouring outputs, x's elements `step` bytes apart: elements [begin, end) of their reduced ranges */
static void reduce_columns(const reduce_job *job, const char *base, int64_t step, int64_t w, int64_t begin, int64_t end,
                           partials *p)
{
    double space[BUFFER_ROWS][COLUMNS];
    const void *row[TILE_ROWS];
    reduced_cursor c;
    int dtype = job->a->x.dtype;
    int64_t most = lac_is_native(dtype) && step == lac_bytes_of(dtype) ? TILE_ROWS : BUFFER_ROWS;
    if (begin >= end) return;
    reduced_seek(job, &c, base, begin);
    for (int64_t r = begin, rows; r < end; r += rows) {
        rows = end - r < most ? end - r : most;
        for (int64_t k = 0; k < rows; k++, reduced_step(job, &c, 1))
            row[k] = LAC_CPU(load)(dtype, c.at, step, w, space[k % BUFFER_ROWS]);
        tile_add(job, p, row, rows, w, r);
    }
}

/* ---- results ---- */

static void finish(const reduce_job *job, const partial *p, char *out)
{
    int fn = job->a->fn, dtype = job->a->out.dtype;
    double d = p->d;
    int64_t i = p->i;
    if (job->class == CLASS_SUM) d += p->error;
    if (fn == LAC_MEAN) d /= (double)job->count;
    if (fn == LAC_NORM2) d = sqrt(d);
    if (fn == LAC_LOGSUMEXP) d = p->at < 0 ? -(double)INFINITY : isfinite(d) ? d + log(p->error) : d;
    if (fn == LAC_VAR) { /* of too few elements: 0 / 0 */
        double freedom = (double)job->count - job->a->correction;
        d = p->error / (freedom > 0 ? freedom : 0);
    }
    float f = dtype == LAC_F32 ? (float)d : v_round_odd(d);
    if (fn == LAC_ANY) i = p->i > 0;
    if (fn == LAC_ALL) i = p->i == job->count;
    if (job->position) i = p->at;
    int ctype = lac_compute_type(dtype);
    const void *v = ctype == C_F32 ? (void *)&f : ctype == C_F64 ? (void *)&d : (void *)&i;
    LAC_CPU(store)(dtype, v, out, lac_bytes_of(dtype), 1);
}

/* ---- tasks ---- */

/* the result of output number `number`, or its part's */
static void deliver(const reduce_job *job, const partial *p, int64_t number, int64_t part, char *out)
{
    if (job->parts > 1) job->partials[number * job->parts + part] = *p;
    else finish(job, p, out);
}

static void columns_task(const reduce_job *job, const char *x, char *out, int64_t first, int64_t number, int64_t part,
                         int64_t from, int64_t to)
{
    int inner = job->kept - 1;
    partials p;
    int64_t step = job->kx[inner], out_step = job->ko[inner];
    int64_t w = job->ks[inner] - first < COLUMNS ? job->ks[inner] - first : COLUMNS;
    partial none = nothing(job);
    for (int64_t j = 0; j < w; j++) p.d[j] = none.d, p.error[j] = 0, p.i[j] = none.i, p.at[j] = -1;
    reduce_columns(job, x + first * step, step, w, from, to, &p);
    for (int64_t j = 0; j < w; j++) {
        partial one = {p.d[j], p.error[j], p.i[j], p.at[j]};
        deliver(job, &one, number + j, part, out + (first + j) * out_step);
    }
}

static void reduce_task(void *context, int64_t begin, int64_t end, int thread)
{
    const reduce_job *job = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t part = t % job->parts, rest = t / job->parts, block = rest % job->blocks, outer = rest / job->blocks;
        const char *x = job->a->x.data;
        char *out = job->a->out.data;
        int inner = job->columns ? job->kept - 1 : job->kept; /* axes [0, inner) count outer rows */
        int64_t number = outer;
        for (int d = inner - 1; d >= 0; d--) {
            int64_t i = outer % job->ks[d];
            outer /= job->ks[d];
            x += i * job->kx[d];
            out += i * job->ko[d];
        }
        /* the share of this part, by shape only */
        int64_t share = job->count / job->parts, extra = job->count % job->parts;
        int64_t from = part * share + (part < extra ? part : extra), to = from + share + (part < extra);
        if (job->columns) {
            int64_t first = block * COLUMNS;
            columns_task(job, x, out, first, number * job->ks[inner] + first, part, from, to);
        } else {
            partial p = nothing(job);
            reduce_row(job, x, from, to, &p);
            deliver(job, &p, number, part, out);
        }
    }
}

static void combine_all(const reduce_job *job)
{
    for (int64_t n = 0; n < job->outputs; n++) {
        partial total = nothing(job);
        char *out = job->a->out.data;
        int64_t rest = n;
        for (int d = job->kept - 1; d >= 0; d--) {
            out += rest % job->ks[d] * job->ko[d];
            rest /= job->ks[d];
        }
        for (int64_t part = 0; part < job->parts; part++) combine(job, &total, &job->partials[n * job->parts + part]);
        finish(job, &total, out);
    }
}

/* ---- set-up ---- */

static int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

static void swap(int64_t *x, int64_t *y)
{
    int64_t z = *x;
    *x = *y;
    *y = z;
}

static void split_axes(reduce_job *job)
{
    const lac_view *x = &job->a->x, *out = &job->a->out;
    int64_t xb = lac_bytes_of(x->dtype), ob = lac_bytes_of(out->dtype);
    if (!lac_view_numel(x)) xb = 0; /* the strides of an empty view are never followed and may be anything, */
    if (!lac_view_numel(out)) ob = 0;
    for (int d = 0; d < x->ndim; d++) {
        int64_t n = x->shape[d], sx = x->stride[d] * xb, so = out->stride[d] * ob;
        if (n == 1) continue;
        if (job->a->dims >> d & 1) {
            int at = job->reduced;
            if (at > 0 && job->rx[at - 1] == sx * n) job->rs[at - 1] *= n, job->rx[at - 1] = sx;
            else job->rs[at] = n, job->rx[at] = sx, job->reduced++;
        } else {
            int at = job->kept;
            if (at > 0 && job->kx[at - 1] == sx * n && job->ko[at - 1] == so * n)
                job->ks[at - 1] *= n, job->kx[at - 1] = sx, job->ko[at - 1] = so;
            else job->ks[at] = n, job->kx[at] = sx, job->ko[at] = so, job->kept++;
        }
    }
    if (job->reduced == 0) job->rs[0] = 1, job->rx[0] = xb, job->reduced = 1;
}

/* brings the axes with the smallest strides to the end and decides between rows and columns */
static void choose_order(reduce_job *job)
{
    int k = job->kept - 1, r = job->reduced - 1;
    for (int d = 0; d < k; d++)
        if (magnitude(job->kx[d]) < magnitude(job->kx[k]))
            swap(&job->ks[d], &job->ks[k]), swap(&job->kx[d], &job->kx[k]), swap(&job->ko[d], &job->ko[k]);
    if (!job->position)
        for (int d = 0; d < r; d++)
            if (magnitude(job->rx[d]) < magnitude(job->rx[r]))
                swap(&job->rs[d], &job->rs[r]), swap(&job->rx[d], &job->rx[r]);
    job->columns = k >= 0 && job->ks[k] >= 4 && magnitude(job->kx[k]) < magnitude(job->rx[r]);
}

int LAC_CPU(reduce)(const lac_a_reduce *a)
{
    reduce_job job = {.a = a, .ctype = lac_compute_type(a->x.dtype), .outputs = 1, .count = 1, .blocks = 1, .parts = 1};
    static const int classes[LAC_REDUCTIONS] = {
        [LAC_SUM] = CLASS_SUM,        [LAC_MEAN] = CLASS_SUM,       [LAC_MAX] = CLASS_EXTREME,
        [LAC_MIN] = CLASS_EXTREME,    [LAC_ANY] = CLASS_TRUTH,      [LAC_ALL] = CLASS_TRUTH,
        [LAC_ARGMAX] = CLASS_EXTREME, [LAC_ARGMIN] = CLASS_EXTREME, [LAC_PROD] = CLASS_PRODUCT,
        [LAC_NONZERO] = CLASS_TRUTH,  [LAC_LOGSUMEXP] = CLASS_LSE,  [LAC_VAR] = CLASS_VARIANCE,
        [LAC_NORM1] = CLASS_SUM,      [LAC_NORM2] = CLASS_SUM,      [LAC_NORM_INF] = CLASS_EXTREME,
    };
    job.class = classes[a->fn];
    job.transform = a->fn == LAC_NORM2 ? SQUARE : a->fn == LAC_NORM1 || a->fn == LAC_NORM_INF ? ABSOLUTE : PLAIN;
    job.smallest = a->fn == LAC_MIN || a->fn == LAC_ARGMIN;
    job.position = a->fn == LAC_ARGMAX || a->fn == LAC_ARGMIN;
    split_axes(&job);
    choose_order(&job);
    for (int d = 0; d < job.kept; d++) job.outputs *= job.ks[d];
    for (int d = 0; d < job.reduced; d++) job.count *= job.rs[d];
    if (job.outputs == 0) return 0;
    int64_t rows = job.outputs;
    if (job.columns) {
        int64_t width = job.ks[job.kept - 1];
        job.blocks = (width + COLUMNS - 1) / COLUMNS;
        rows = job.outputs / width * job.blocks;
    }
    double work = (double)job.outputs * (double)(job.count + 1);
    double per_task = work / (double)rows;
    if (rows < MOST_PARTS && per_task > PART) {
        double wanted = per_task / PART, most = (double)MOST_PARTS / (double)rows;
        job.parts = (int64_t)(wanted < most ? wanted : most);
        if (job.parts > job.count) job.parts = job.count;
        if (job.parts < 1) job.parts = 1;
    }
    if (job.parts > 1) {
        job.partials = lac_workspace_get("reduce", sizeof(partial) * (size_t)(job.outputs * job.parts));
        if (!job.partials) return LAC_E_MEMORY;
    }
    int status =
        LAC_CPU(parallel)("reduce", rows * job.parts, work > 1e18 ? (int64_t)1e18 : (int64_t)work, reduce_task, &job);
    if (job.parts > 1) {
        if (!status) combine_all(&job);
        lac_workspace_put(job.partials);
    }
    return status;
}
