/* reduce.c: sums, products, extrema and their positions, truth, variance and log-sum-exp on the CPU.
 *
 * Kept and reduced axes are merged separately; then the axis with the smallest stride decides. If it is reduced,
 * every output is a reduction along memory ("rows"); if it is kept, up to 1024 neighbouring outputs are accumulated
 * together while memory is walked row by row in tiles of 64 rows ("columns"), which stay in cache for those reductions
 * that look twice. A few outputs of a long reduction are cut into parts of a size that depends on the shape only, and
 * the parts' results are combined in order: no thread count and no timing can show.
 *
 * Accuracy: f32, f16 and bf16 are summed in double, which is below the rounding of the result; f64 sums of 1024
 * elements (or of a tile) are added up with Neumaier's compensation. Pairwise summation in f32 was rejected: it needs a
 * recursion over strides and is worse than a conversion that costs nothing next to the memory. The variance is centred
 * block by block (f64 by its mean, floats in double by an element), the blocks combined by Chan, Golub and LeVeque's
 * rule (1983); the log-sum-exp keeps its maximum apart (reduce_lse.inc). Both read memory once. Extrema: NaN wins, the
 * first of equals; positions count in row-major order, so axes are not reordered for them.
 *
 * Rows of floats of one block each have a loop of their own (rows_task) with lanes in registers: a sum of 64 takes a
 * Zen 3 27 ns instead of 76, a maximum 12 instead of 49 (of 1024: 181 and 97, which were 202 and 160).
 */
#include "cpu.h"
#include "rows.h"
#include <math.h>
#include <string.h>

enum { BLOCK = 512, COLUMNS = 1024, TILE_ROWS = 64, BUFFER_ROWS = 16, PART = 32768, MOST_PARTS = 64, LANES = 32 };
enum { SHORT = 16, MANY = 64 }; /* elements behind each of many outputs */
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
    /* when parts > 1: [outputs][parts], or [blocks of columns][parts] */
    partial *partials;
    partials *columns_parts;
    double (*row)(const float *, int64_t); /* of rows_task; else NULL */
    bool lse;                              /* lse_rows does it */
} reduce_job;

/* ---- blocks of a row ---- */

/* in lanes, because one chain of additions would wait for itself; the lanes are added up by halves */
#define LANE_SUM(name, T, R, start, combine, expression)                                                               \
    static R name(const T *x, double c, int64_t n)                                                                     \
    {                                                                                                                  \
        R lane[LANES], s = start;                                                                                      \
        int64_t i = 0;                                                                                                 \
        (void)c;                                                                                                       \
        for (int k = 0; k < LANES; k++) lane[k] = start;                                                               \
        for (; i + LANES <= n; i += LANES) {                                                                           \
            for (int k = 0; k < LANES; k += V_LINE / (int)sizeof(T)) v_ask(x + i + k);                                 \
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
        _Pragma("GCC unroll 8") for (int w = LANES / 2; w > 0; w /= 2) for (int k = 0; k < w; k++) lane[k] =           \
            lane[k] combine lane[k + w];                                                                               \
        return s combine lane[0];                                                                                      \
    }
LANE_SUM(sum_d, double, double, 0, +, v)
LANE_SUM(sum_i, int64_t, uint64_t, 0, +, v)
LANE_SUM(squares_d, double, double, 0, +, (v - c) * (v - c))
LANE_SUM(absolute_d, double, double, 0, +, fabs(v))
LANE_SUM(product_f, float, double, 1, *, v)
LANE_SUM(product_d, double, double, 1, *, v)
LANE_SUM(product_i, int64_t, uint64_t, 1, *, v)

/* The same sums of floats, in the same order, with the lanes in registers: of short rows most of the time went into
 * lanes that gcc kept in memory, one by one. */
typedef float few_floats __attribute__((vector_size(V_WIDTH / 2), aligned(4), may_alias));
typedef int64_t v_wholes __attribute__((vector_size(V_WIDTH)));
static inline v_doubles lanes_size(v_doubles v) { return (v_doubles)((v_wholes)v & INT64_MAX); }
#define ROW_SUM_OF(name, of_lanes, of_one)                                                                             \
    static double name(const float *x, int64_t n)                                                                      \
    {                                                                                                                  \
        enum { L = V_WIDTH / sizeof(double), N = LANES / L };                                                          \
        v_doubles lane[N];                                                                                             \
        double s = 0;                                                                                                  \
        int64_t i = 0;                                                                                                 \
        _Pragma("GCC unroll 16") for (int k = 0; k < N; k++) lane[k] = (v_doubles){0};                                 \
        for (; i + LANES <= n; i += LANES) {                                                                           \
            for (int k = 0; k < LANES; k += V_LINE / (int)sizeof(float)) v_ask(x + i + k);                             \
            _Pragma("GCC unroll 16") for (int k = 0; k < N; k++)                                                       \
            {                                                                                                          \
                v_doubles v = __builtin_convertvector(*(const few_floats *)(x + i + k * L), v_doubles);                \
                lane[k] += of_lanes;                                                                                   \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < n; i++) {                                                                                           \
            double v = (double)x[i];                                                                                   \
            s += of_one;                                                                                               \
        }                                                                                                              \
        if (n < LANES) return s;                                                                                       \
        _Pragma("GCC unroll 4") for (int w = N / 2; w > 0; w /= 2) _Pragma("GCC unroll 8") for (int k = 0; k < w; k++) \
            lane[k] += lane[k + w];                                                                                    \
        return s + v_sum_d(lane[0]);                                                                                   \
    }
ROW_SUM_OF(sum_f, v, v)
ROW_SUM_OF(squares_f, v *v, v *v)
ROW_SUM_OF(absolute_f, lanes_size(v), fabs(v))
#undef ROW_SUM_OF

/* Sums of x - c and of its square. With c among the elements (mean - c)^2 is at most n times the variance, so the
 * difference of the squares' mean and the mean's square loses log2(n) of a double's bits: a float's are safe. */
static void moments(const float *x, double c, double *sum, double *squares, int64_t n)
{
    double s[LANES / 2] = {0}, q[LANES / 2] = {0};
    int64_t i = 0;
    for (; i + LANES / 2 <= n; i += LANES / 2) {
        v_ask(x + i);
#pragma omp simd
        for (int k = 0; k < LANES / 2; k++) {
            double v = (double)x[i + k] - c;
            s[k] += v;
            q[k] += v * v;
        }
    }
    *sum = *squares = 0;
    for (; i < n; i++) {
        double v = (double)x[i] - c;
        *sum += v;
        *squares += v * v;
    }
    for (int w = LANES / 4; w > 0; w /= 2)
        for (int k = 0; k < w; k++) s[k] += s[k + w], q[k] += q[k + w];
    *sum += s[0];
    *squares += q[0];
}

double LAC_CPU(sum)(int ctype, const void *x, int64_t n) { return ctype == C_F32 ? sum_f(x, n) : sum_d(x, 0, n); }

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
        enum { LINE = V_LINE / sizeof(T), CHUNK = 4 * LINE };                                                          \
        T lane[CHUNK], best = start;                                                                                   \
        I odd[LINE], nan = 0;                                                                                          \
        int64_t i = 0;                                                                                                 \
        for (int k = 0; k < CHUNK; k++) lane[k] = start;                                                               \
        for (int k = 0; k < LINE; k++) odd[k] = 0;                                                                     \
        for (; i + CHUNK <= n; i += CHUNK) {                                                                           \
            _Pragma("GCC unroll 4") for (int u = 0; u < CHUNK; u += LINE)                                              \
            {                                                                                                          \
                v_ask(x + i + u);                                                                                      \
                _Pragma("omp simd") for (int k = 0; k < LINE; k++)                                                     \
                {                                                                                                      \
                    T v = value(x[i + u + k]);                                                                         \
                    odd[k] |= v != v;                                                                                  \
                    lane[u + k] = v better lane[u + k] ? v : lane[u + k];                                              \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < n; i++) {                                                                                           \
            T v = value(x[i]);                                                                                         \
            nan |= v != v;                                                                                             \
            best = v better best ? v : best;                                                                           \
        }                                                                                                              \
        _Pragma("GCC unroll 8") for (int w = CHUNK / 2; w > 0; w /= 2) for (int k = 0; k < w; k++) lane[k] =           \
            lane[k + w] better lane[k] ? lane[k + w] : lane[k];                                                        \
        _Pragma("GCC unroll 8") for (int w = LINE / 2; w > 0; w /= 2) for (int k = 0; k < w; k++) odd[k] |=            \
            odd[k + w];                                                                                                \
        best = lane[0] better best ? lane[0] : best;                                                                   \
        return nan | odd[0] ? (double)NAN : (double)best;                                                              \
    }
#ifdef __AVX2__
/* The same of floats by vectors, whose last one may overlap the one before: which of several is looked at first does
 * not matter. The second operand is the result where one is NaN. */
#ifdef __AVX512F__
typedef __m512 v_extreme;
#define V_OF(name) _mm512_##name
#define V_SIZE(v) _mm512_abs_ps(v)
#define V_NAN(odd, v) odd |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q)
typedef __mmask16 v_odd;
static inline bool odd_any(v_odd odd) { return odd != 0; }
static inline float extreme_max(v_extreme v) { return _mm512_reduce_max_ps(v); }
static inline float extreme_min(v_extreme v) { return _mm512_reduce_min_ps(v); }
#else
typedef __m256 v_extreme;
#define V_OF(name) _mm256_##name
#define V_SIZE(v) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)
#define V_NAN(odd, v) odd = _mm256_or_ps(odd, _mm256_cmp_ps(v, v, _CMP_UNORD_Q))
typedef __m256 v_odd;
static inline bool odd_any(v_odd odd) { return _mm256_movemask_ps(odd) != 0; }
#define EXTREME_LANES(name)                                                                                            \
    static inline float extreme_##name(v_extreme v)                                                                    \
    {                                                                                                                  \
        __m128 x = _mm_##name##_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));                            \
        x = _mm_##name##_ps(x, _mm_movehl_ps(x, x));                                                                   \
        return _mm_cvtss_f32(_mm_##name##_ss(x, _mm_movehdup_ps(x)));                                                  \
    }
EXTREME_LANES(max)
EXTREME_LANES(min)
#undef EXTREME_LANES
#endif
#define ROW_EXTREME(name, side, start, better, value, v_value)                                                         \
    static double name(const float *x, int64_t n)                                                                      \
    {                                                                                                                  \
        enum { L = sizeof(v_extreme) / sizeof(float), N = 4 };                                                         \
        v_extreme lane[N];                                                                                             \
        v_odd odd[N] = {0};                                                                                            \
        float best = start;                                                                                            \
        int64_t i = 0;                                                                                                 \
        bool nan = false;                                                                                              \
        if (n < L) {                                                                                                   \
            for (; i < n; i++) {                                                                                       \
                float v = value(x[i]);                                                                                 \
                nan |= v != v;                                                                                         \
                best = v better best ? v : best;                                                                       \
            }                                                                                                          \
            return nan ? (double)NAN : (double)best;                                                                   \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int k = 0; k < N; k++) lane[k] = V_OF(set1_ps)(start);                            \
        for (; i + N * L <= n; i += N * L) {                                                                           \
            _Pragma("GCC unroll 4") for (int k = 0; k < N; k++)                                                        \
            {                                                                                                          \
                if (k * L % 16 == 0) v_ask(x + i + k * L);                                                             \
                v_extreme v = v_value(V_OF(loadu_ps)(x + i + k * L));                                                  \
                V_NAN(odd[k], v);                                                                                      \
                lane[k] = V_OF(side##_ps)(v, lane[k]);                                                                 \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < n; i += L) {                                                                                        \
            v_extreme v = v_value(V_OF(loadu_ps)(x + (i + L < n ? i : n - L)));                                        \
            V_NAN(odd[0], v);                                                                                          \
            lane[0] = V_OF(side##_ps)(v, lane[0]);                                                                     \
        }                                                                                                              \
        lane[0] = V_OF(side##_ps)(V_OF(side##_ps)(lane[0], lane[1]), V_OF(side##_ps)(lane[2], lane[3]));               \
        _Pragma("GCC unroll 4") for (int k = 0; k < N; k++) nan |= odd_any(odd[k]);                                    \
        return nan ? (double)NAN : (double)extreme_##side(lane[0]);                                                    \
    }
#define V_SAME(v) v
ROW_EXTREME(max_f, max, -INFINITY, >, , V_SAME)
ROW_EXTREME(min_f, min, INFINITY, <, , V_SAME)
ROW_EXTREME(largest_f, max, 0, >, fabsf, V_SIZE)
#undef ROW_EXTREME
#undef V_SAME
#undef V_SIZE
#undef V_NAN
#undef V_OF
#else
EXTREME(max_f, float, int32_t, >, -INFINITY, )
EXTREME(min_f, float, int32_t, <, INFINITY, )
EXTREME(largest_f, float, int32_t, >, 0, fabsf)
#endif
EXTREME(max_d, double, int64_t, >, -(double)INFINITY, )
EXTREME(min_d, double, int64_t, <, (double)INFINITY, )
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
    if (ctype == C_F32) return row_exp_f(x, (float)top, NULL, n);
    const double *d = x;
    double s = 0;
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
        double mean, squares;
        if (single) {
            double c = (double)*(const float *)x;
            moments(x, c, &mean, &squares, n);
            squares -= mean * (mean / (double)n);
            squares = squares < 0 ? 0 : squares;
            mean = c + mean / (double)n;
        } else {
            mean = sum_d(x, 0, n) / (double)n;
            squares = squares_d(x, mean, n);
        }
        variance_combine(p, mean, squares, n);
        return;
    }
    case CLASS_PRODUCT:
        if (job->ctype == C_I64) p->i = (int64_t)((uint64_t)p->i * product_i(x, 0, n));
        else p->d *= single ? product_f(x, 0, n) : product_d(x, 0, n);
        return;
    default:
        if (job->ctype == C_I64) p->i = (int64_t)((uint64_t)p->i + sum_i(x, 0, n));
        else if (job->transform == SQUARE) add_exact(&p->d, &p->error, single ? squares_f(x, n) : squares_d(x, 0, n));
        else if (job->transform == ABSOLUTE)
            add_exact(&p->d, &p->error, single ? absolute_f(x, n) : absolute_d(x, 0, n));
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
    bool direct = dtype == LAC_F32 && job->rx[last] == 4;
    /* of floats in place, whose sums are doubles, longer pieces; exponentials are summed in float */
    int64_t most = !direct ? BLOCK : job->class == CLASS_LSE ? 2 * BLOCK : 8 * BLOCK;
    if (begin >= end) return; /* also when an axis has no elements */
    if (job->reduced == 1 && begin == 0 && end <= most) {
        block_add(job, p, LAC_CPU(load)(dtype, base, job->rx[0], end, space), end, 0);
        return;
    }
    reduced_seek(job, &c, base, begin);
    for (int64_t r = begin, n; r < end; r += n) {
        n = job->rs[last] - c.index[last];
        if (n > most) n = most;
        if (n > end - r) n = end - r;
        block_add(job, p, LAC_CPU(load)(dtype, c.at, job->rx[last], n, space), n, r);
        reduced_step(job, &c, n);
    }
}

#include "reduce_tiles.inc"

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

/* floats that are sums, products or extrema, as most are */
static bool is_plain_float(const reduce_job *job)
{
    bool plain = job->class == CLASS_SUM || job->class == CLASS_PRODUCT || job->class == CLASS_EXTREME;
    return job->a->out.dtype == LAC_F32 && plain && !job->position;
}

static inline float plain_float(int fn, double d, double error, double count)
{
    d += error;
    return (float)(fn == LAC_MEAN ? d / count : fn == LAC_NORM2 ? sqrt(d) : d);
}

static void finish(const reduce_job *job, const partial *p, char *out)
{
    int fn = job->a->fn, dtype = job->a->out.dtype;
    double d = p->d;
    int64_t i = p->i;
    if (is_plain_float(job)) {
        *(float *)(void *)out = plain_float(fn, d, job->class == CLASS_SUM ? p->error : 0, (double)job->count);
        return;
    }
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

/* addresses of the outer row (or output) `outer`: the first `axes` kept axes count them */
static void place(const reduce_job *job, int axes, int64_t outer, const char **x, char **out)
{
    *x = job->a->x.data;
    *out = job->a->out.data;
    for (int d = axes - 1; d >= 0; d--) {
        int64_t i = outer % job->ks[d];
        outer /= job->ks[d];
        *x += i * job->kx[d];
        *out += i * job->ko[d];
    }
}

static inline int64_t columns_of(const reduce_job *job, int64_t block)
{
    int64_t left = job->ks[job->kept - 1] - block * COLUMNS;
    return left < COLUMNS ? left : COLUMNS;
}

static void finish_columns(const reduce_job *job, const partials *p, int64_t block, char *out)
{
    int64_t step = job->ko[job->kept - 1], w = columns_of(job, block);
    if (is_plain_float(job) && step == (int64_t)sizeof(float)) {
        static const double none[COLUMNS];
        const double count = (double)job->count, *error = job->class == CLASS_SUM ? p->error : none;
        float *f = (float *)(void *)(out + block * COLUMNS * step);
        const int fn = job->a->fn;
        if (fn == LAC_MEAN)
            for (int64_t j = 0; j < w; j++) f[j] = plain_float(LAC_MEAN, p->d[j], error[j], count);
        else if (fn == LAC_NORM2)
            for (int64_t j = 0; j < w; j++) f[j] = plain_float(LAC_NORM2, p->d[j], error[j], count);
        else
            for (int64_t j = 0; j < w; j++) f[j] = plain_float(LAC_SUM, p->d[j], error[j], count);
        return;
    }
    for (int64_t j = 0; j < w; j++) {
        partial one = {p->d[j], p->error[j], p->i[j], p->at[j]};
        finish(job, &one, out + (block * COLUMNS + j) * step);
    }
}

#include "reduce_lse.inc"

static void columns_task(const reduce_job *job, int64_t row, int64_t part, int64_t from, int64_t to)
{
    partials own, *p = job->parts > 1 ? &job->columns_parts[row * job->parts + part] : &own;
    int64_t block = row % job->blocks, w = columns_of(job, block), step = job->kx[job->kept - 1];
    partial none = nothing(job);
    const char *x;
    char *out;
    if (w < 1) return; /* never, which an analyser cannot know */
    place(job, job->kept - 1, row / job->blocks, &x, &out);
    for (int64_t j = 0; j < w; j++) p->d[j] = none.d, p->error[j] = 0, p->i[j] = none.i, p->at[j] = -1;
    if (job->class == CLASS_LSE && job->a->x.dtype == LAC_F32 && step == 4 && job->reduced == 1 && from < to)
        lse_columns(job, x + block * COLUMNS * step, w, from, to, p);
    else reduce_columns(job, x + block * COLUMNS * step, step, w, from, to, p);
    if (job->parts == 1) finish_columns(job, p, block, out);
}

/* Rows of floats that lie side by side in memory and are one block each: what can be said once for all rows, which for
 * rows of 64 is most of the time, is said in reduce(). */
static void rows_task(const reduce_job *job, int64_t begin, int64_t end)
{
    const char *x = NULL;
    char *out = NULL;
    const int64_t n = job->count, last = job->kept ? job->ks[job->kept - 1] : 1;
    for (int64_t t = begin; t < end; t++) {
        if (t == begin || t % last == 0) place(job, job->kept, t, &x, &out);
        *(float *)(void *)out = plain_float(job->a->fn, job->row((const float *)(const void *)x, n), 0, (double)n);
        if (!job->kept) continue;
        x += job->kx[job->kept - 1];
        out += job->ko[job->kept - 1];
    }
}

static void reduce_task(void *context, int64_t begin, int64_t end, int thread)
{
    const reduce_job *job = context;
    const char *x = NULL;
    char *out = NULL;
    (void)thread;
    if (job->row) {
        rows_task(job, begin, end);
        return;
    }
    if (job->lse) {
        lse_rows(job, begin, end);
        return;
    }
    for (int64_t t = begin; t < end; t++) {
        int64_t part = 0, row = t, from = 0, to = job->count;
        if (job->parts > 1) { /* the share of this part, by shape only */
            int64_t share = job->count / job->parts, extra = job->count % job->parts;
            part = t % job->parts, row = t / job->parts;
            from = part * share + (part < extra ? part : extra), to = from + share + (part < extra);
        }
        if (job->columns) {
            columns_task(job, row, part, from, to);
            continue;
        }
        partial p = nothing(job);
        int64_t last = job->kept ? job->ks[job->kept - 1] : 1;
        if (t == begin || job->parts > 1 || row % last == 0) {
            place(job, job->kept, row, &x, &out);
        } else {
            x += job->kx[job->kept - 1];
            out += job->ko[job->kept - 1];
        }
        reduce_row(job, x, from, to, &p);
        if (job->parts > 1) job->partials[t] = p;
        else finish(job, &p, out);
    }
}

/* `combine` of neighbouring columns */
static void combine_columns(const reduce_job *job, partials *into, const partials *p, int64_t w)
{
    if (job->class == CLASS_SUM && job->ctype != C_I64) {
        columns_exact(into->d, into->error, p->d, w);
        for (int64_t j = 0; j < w; j++) into->error[j] += p->error[j];
        return;
    }
    for (int64_t j = 0; j < w; j++) {
        partial total = {into->d[j], into->error[j], into->i[j], into->at[j]};
        partial one = {p->d[j], p->error[j], p->i[j], p->at[j]};
        combine(job, &total, &one);
        into->d[j] = total.d, into->error[j] = total.error, into->i[j] = total.i, into->at[j] = total.at;
    }
}

/* the parts of each of `rows` results (or blocks of columns) in order */
static void combine_all(const reduce_job *job, int64_t rows)
{
    const char *x;
    char *out;
    for (int64_t row = 0; row < rows; row++) {
        if (job->columns) {
            partials *total = &job->columns_parts[row * job->parts];
            int64_t block = row % job->blocks, w = columns_of(job, block);
            place(job, job->kept - 1, row / job->blocks, &x, &out);
            for (int64_t part = 1; part < job->parts; part++) combine_columns(job, total, total + part, w);
            finish_columns(job, total, block, out);
        } else {
            partial total = nothing(job);
            place(job, job->kept, row, &x, &out);
            for (int64_t part = 0; part < job->parts; part++)
                combine(job, &total, &job->partials[row * job->parts + part]);
            finish(job, &total, out);
        }
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
    /* of few elements sums cost less than what is done once for a row; side by side they are added in the same order */
    bool plain = job->class == CLASS_SUM || job->class == CLASS_PRODUCT || job->class == CLASS_EXTREME;
    int64_t count = 1;
    for (int d = 0; d <= r; d++) count *= job->rs[d];
    if (plain && count <= SHORT && k >= 0 && job->ks[k] >= MANY) job->columns = true;
}

/* one axis of floats side by side behind each output, not cut into parts */
static bool floats_in_rows(const reduce_job *job)
{
    const bool rows = !job->columns && job->parts == 1 && job->reduced == 1 && job->rx[0] == (int64_t)sizeof(float);
    return rows && job->a->x.dtype == LAC_F32 && job->count > 0;
}
/* the kernel of rows_task, if that can be used */
static double (*row_kernel(const reduce_job *job))(const float *, int64_t)
{
    if (!floats_in_rows(job) || !is_plain_float(job) || job->count > 8 * BLOCK) return NULL;
    if (job->class == CLASS_SUM)
        return job->transform == SQUARE ? squares_f : job->transform == ABSOLUTE ? absolute_f : sum_f;
    if (job->class == CLASS_EXTREME) return job->transform == ABSOLUTE ? largest_f : job->smallest ? min_f : max_f;
    return NULL;
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
    void *space = NULL;
    if (job.parts > 1) {
        size_t size = job.columns ? sizeof(partials) : sizeof(partial);
        space = lac_workspace_get("reduce", size * (size_t)(rows * job.parts));
        if (!space) return LAC_E_MEMORY;
        if (job.columns) job.columns_parts = space;
        else job.partials = space;
    }
    job.row = row_kernel(&job);
    job.lse = job.class == CLASS_LSE && floats_in_rows(&job);
    int status =
        LAC_CPU(parallel)("reduce", rows * job.parts, work > 1e18 ? (int64_t)1e18 : (int64_t)work, reduce_task, &job);
    if (space && !status) combine_all(&job, rows);
    lac_workspace_put(space);
    return status;
}
