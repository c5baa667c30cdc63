/* norm.c: layer normalisation and root-mean-square normalisation on the CPU, forward and backward.
 *
 * A row is a task: it fits a cache, so the passes over it cost one trip to memory. Rows that are not contiguous in the
 * compute type are gathered into a buffer of the thread, worked on in place, and scattered. The two differ in the mean
 * alone, which rmsnorm (Zhang and Sennrich 2019) does not subtract: one set of kernels with a switch serves both.
 *
 * Forward: the mean first, then the variance of the centred values; the sum-of-squares shortcut loses everything when
 * the mean is large. The mean is subtracted in two parts, so that f32 keeps the low bits of values far from 0.
 * Where rows are dense and short layernorm's three passes go together, each over a row of its own, so that arithmetic,
 * reading and writing overlap; of wider rows, and without AVX-512's registers, two of them, and the squares of a row in
 * the cache by themselves (with AVX2 on a Zen 3 80 to 83% of a copy instead of 64 to 72 in turn, of rows of 4096 70
 * instead of 60; all three together were slower than in turn there, but of narrow rows faster). rmsnorm's two passes go
 * together likewise: of rows of 64, 1024 and 4096 floats 79, 87 and 82% of a copy instead of 54, 83 and 61. What comes
 * some rows on is fetched; results larger than the caches are written past them. Backward: dx of a row is written
 * while the two means of the next one are found. dgamma and dbeta are sums over rows, 32 rows in the compute type and
 * then in double, in blocks of a number that depends on the shape only, combined in order; a step has two rows at hand
 * and adds both, so that they are loaded and stored every other step (a line of both costs 5 cycles of a Zen 4, all
 * else 6.5). Sums along a row are taken in the compute type over 1024 elements (each vector lane adds 64 at most) and
 * added up in double.
 */
#include "cpu.h"
#include "rows.h"
#include <math.h>
#include <string.h>

/* AHEAD: bytes to what is fetched; NARROW: bytes of a row from which on it may be staged; FIRST_CACHE: what three rows,
 * gamma and beta may take of 32 KiB; WIDEST: a row of those that go by two, which may be in the second cache */
enum { FIRST_CACHE = 28 << 10, WIDEST = 64 << 10 };
enum { SUM_BLOCK = 1024, GAMMA_BLOCKS = 64, GAMMA_ROWS = 16, FLUSH_ROWS = 32, AHEAD = ROW_AHEAD, NARROW = ROW_SHORT };

/* Half a cache line: what the backward loads and stores at a time. A Zen 4 stores a whole one as halves, and loses by
 * it where a loop adds to arrays in the cache: 5.9 ns for a line of layernorm's backward, 5.4 so. */
enum { HALF_LINE = V_LINE / 2 };
typedef float half_floats __attribute__((vector_size(HALF_LINE), aligned(4), may_alias));
typedef double half_doubles __attribute__((vector_size(HALF_LINE), aligned(8), may_alias));

/* v_put_line for half a line */
LAC_INLINE void put_half(void *out, const void *r, bool stream)
{
#if defined(__AVX__)
    __m256i half = _mm256_loadu_si256(r);
    if (stream) _mm256_stream_si256(out, half);
    else _mm256_storeu_si256(out, half);
#else
    (void)stream;
    memcpy(out, r, HALF_LINE);
#endif
}

/* ---- row kernels, once per type ---- */

/* The sum of f over n elements into the double `total`, by blocks, in four vectors that do not wait for each other's
 * additions; f(U, i) is its value at i, U being a vector or T itself. AT reads one or the other. */
#define AT(U, x, i) (*(const U *)((x) + (i)))
#define BLOCK_SUM(T, V, SUM, total, f)                                                                                 \
    for (int64_t i_ = 0; i_ < n;) {                                                                                    \
        enum { L_ = V_WIDTH / sizeof(T) };                                                                             \
        int64_t end_ = n - i_ < SUM_BLOCK ? n : i_ + SUM_BLOCK;                                                        \
        V s_[4] = {{0}, {0}, {0}, {0}};                                                                                \
        T rest_ = 0;                                                                                                   \
        for (; i_ + 4 * L_ <= end_; i_ += 4 * L_) {                                                                    \
            s_[0] += f(V, i_);                                                                                         \
            s_[1] += f(V, i_ + L_);                                                                                    \
            s_[2] += f(V, i_ + 2 * L_);                                                                                \
            s_[3] += f(V, i_ + 3 * L_);                                                                                \
        }                                                                                                              \
        for (; i_ < end_; i_++) rest_ += f(T, i_);                                                                     \
        total += (double)(SUM((s_[0] + s_[1]) + (s_[2] + s_[3])) + rest_);                                             \
    }
/* y[i - from] = f(i) for from <= i < end, by cache lines; `ahead` is fetched meanwhile */
#define ROW_WRITE(T, y, from, end, ahead, stream, f)                                                                   \
    do {                                                                                                               \
        enum { CHUNK_ = V_LINE / sizeof(T) };                                                                          \
        int64_t i_ = from;                                                                                             \
        for (; i_ + CHUNK_ <= (end); i_ += CHUNK_) {                                                                   \
            T line_[CHUNK_];                                                                                           \
            __builtin_prefetch((ahead) + i_, 0, 2);                                                                    \
            _Pragma("omp simd") for (int k_ = 0; k_ < CHUNK_; k_++) line_[k_] = f(i_ + k_);                            \
            v_put_line((y) + (i_ - (from)), line_, stream);                                                            \
        }                                                                                                              \
        for (; i_ < (end); i_++) (y)[i_ - (from)] = f(i_);                                                             \
    } while (0)

#define ROW_KERNELS(T, S, V, H, SUM)                                                                                   \
    LAC_INLINE double row_differences_##S(const T *x, T first, int64_t n)                                              \
    {                                                                                                                  \
        double total = 0;                                                                                              \
        BLOCK_SUM(T, V, SUM, total, DIFFERENCE)                                                                        \
        return total;                                                                                                  \
    }                                                                                                                  \
    LAC_INLINE double row_squares_##S(const T *x, T high, T low, int64_t n)                                            \
    {                                                                                                                  \
        double total = 0;                                                                                              \
        BLOCK_SUM(T, V, SUM, total, SQUARE)                                                                            \
        return total;                                                                                                  \
    }                                                                                                                  \
    /* a row of the forward, and what is known of it: what is taken off first, the mean in two parts, 1 / deviation */ \
    typedef struct {                                                                                                   \
        const T *x;                                                                                                    \
        T first, high, low, r;                                                                                         \
    } forward_row_##S;                                                                                                 \
    /* the mean is x[0] plus that of the differences, which keep the low bits of values far from 0 */                  \
    LAC_INLINE void forward_mean_##S(forward_row_##S *row, double differences, int64_t n)                              \
    {                                                                                                                  \
        double m = (double)row->first + differences / (double)n;                                                       \
        row->high = (T)m;                                                                                              \
        row->low = (T)(m - (double)row->high);                                                                         \
    }                                                                                                                  \
    LAC_INLINE void forward_deviation_##S(forward_row_##S *row, double squares, double eps, int64_t n)                 \
    {                                                                                                                  \
        row->r = (T)(1.0 / sqrt(squares / (double)n + eps));                                                           \
    }                                                                                                                  \
    /* without `mean`: rmsnorm */                                                                                      \
    static void norm_row_##S(const T *x, const T *gamma, const T *beta, double eps, T *y, T *mean, T *rstd,            \
                             bool stream, bool staged, int64_t n)                                                      \
    {                                                                                                                  \
        forward_row_##S row = {.first = mean && isfinite(x[0]) ? x[0] : 0};                                            \
        if (mean) {                                                                                                    \
            forward_mean_##S(&row, row_differences_##S(x, row.first, n), n);                                           \
            *mean = row.high;                                                                                          \
        }                                                                                                              \
        const T high = row.high, low = row.low;                                                                        \
        forward_deviation_##S(&row, row_squares_##S(x, high, low, n), eps, n);                                         \
        const T r = *rstd = row.r;                                                                                     \
        T stage[SUM_BLOCK];                                                                                            \
        for (int64_t start = 0; staged && start < n; start += SUM_BLOCK) {                                             \
            int64_t end = n - start < SUM_BLOCK ? n : start + SUM_BLOCK;                                               \
            ROW_WRITE(T, stage, start, end, x + AHEAD / sizeof(T), false, NORMAL);                                     \
            row_pass(y + start, stage, (end - start) * (int64_t)sizeof(T));                                            \
        }                                                                                                              \
        if (!staged) ROW_WRITE(T, y, 0, n, x + AHEAD / sizeof(T), stream, NORMAL);                                     \
    }                                                                                                                  \
    /* The passes of layernorm together, each over a row of its own: `now` is written to y, the squares of `middle`,   \
     * if there is one, and the mean of `next` are found. The sums are those of norm_row. */                           \
    LAC_INLINE void forward_step_##S(const forward_row_##S *now, forward_row_##S *middle, forward_row_##S *next,       \
                                     const T *gamma, const T *beta, double eps, T *y, bool stream, bool staged,        \
                                     int64_t n)                                                                        \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T), L = V_WIDTH / sizeof(T) };                                                  \
        const T *x = now->x, *xm = middle ? middle->x : NULL, *xn = next->x;                                           \
        const T high = now->high, low = now->low, r = now->r, first_n = next->first;                                   \
        const T high_m = middle ? middle->high : 0, low_m = middle ? middle->low : 0;                                  \
        T stage[SUM_BLOCK];                                                                                            \
        double squares = 0, differences = 0;                                                                           \
        for (int64_t i = 0; i < n;) {                                                                                  \
            int64_t start = i, end = n - i < SUM_BLOCK ? n : i + SUM_BLOCK;                                            \
            T *to = staged ? stage : y + start;                                                                        \
            V s[4] = {{0}, {0}, {0}, {0}}, d[4] = {{0}, {0}, {0}, {0}};                                                \
            T rest_s = 0, rest_d = 0, line[4 * L];                                                                     \
            for (; i + 4 * L <= end; i += 4 * L) {                                                                     \
                _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++)                                                    \
                {                                                                                                      \
                    const int64_t j = i + k * L;                                                                       \
                    if (middle) {                                                                                      \
                        V c = (AT(V, xm, j) - high_m) - low_m;                                                         \
                        s[k] += c * c;                                                                                 \
                    }                                                                                                  \
                    d[k] += AT(V, xn, j) - first_n;                                                                    \
                    *(V *)(line + k * L) = ((AT(V, x, j) - high) - low) * r * AT(V, gamma, j) + AT(V, beta, j);        \
                }                                                                                                      \
                _Pragma("GCC unroll 4") for (int k = 0; k < 4 * L; k += CHUNK)                                         \
                {                                                                                                      \
                    __builtin_prefetch((const char *)(xn + i + k) + AHEAD, 0, 2);                                      \
                    v_put_line(to + i - start + k, line + k, stream);                                                  \
                }                                                                                                      \
            }                                                                                                          \
            for (; i < end; i++) {                                                                                     \
                T c = middle ? (xm[i] - high_m) - low_m : 0;                                                           \
                rest_s += c * c;                                                                                       \
                rest_d += xn[i] - first_n;                                                                             \
                to[i - start] = NORMAL(i);                                                                             \
            }                                                                                                          \
            if (staged) row_pass(y + start, stage, (end - start) * (int64_t)sizeof(T));                                \
            squares += (double)(SUM((s[0] + s[1]) + (s[2] + s[3])) + rest_s);                                          \
            differences += (double)(SUM((d[0] + d[1]) + (d[2] + d[3])) + rest_d);                                      \
        }                                                                                                              \
        if (middle) forward_deviation_##S(middle, squares, eps, n);                                                    \
        forward_mean_##S(next, differences, n);                                                                        \
    }                                                                                                                  \
    /* The same of rmsnorm: y, of row x, is written, while the squares of the next row are added up. */                \
    LAC_INLINE double rms_step_##S(const T *x, T r, const T *gamma, T *y, const T *next, bool stream, bool staged,     \
                                   int64_t n)                                                                          \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T), L = V_WIDTH / sizeof(T) };                                                  \
        T stage[SUM_BLOCK];                                                                                            \
        double total = 0;                                                                                              \
        for (int64_t i = 0; i < n;) {                                                                                  \
            int64_t start = i, end = n - i < SUM_BLOCK ? n : i + SUM_BLOCK;                                            \
            T *to = staged ? stage : y + start;                                                                        \
            V s[4] = {{0}, {0}, {0}, {0}};                                                                             \
            T rest = 0, line[4 * L];                                                                                   \
            for (; i + 4 * L <= end; i += 4 * L) {                                                                     \
                _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++)                                                    \
                {                                                                                                      \
                    const int64_t j = i + k * L;                                                                       \
                    s[k] += AT(V, next, j) * AT(V, next, j);                                                           \
                    *(V *)(line + k * L) = AT(V, x, j) * r * AT(V, gamma, j) + (T)0;                                   \
                }                                                                                                      \
                _Pragma("GCC unroll 4") for (int k = 0; k < 4 * L; k += CHUNK)                                         \
                {                                                                                                      \
                    __builtin_prefetch((const char *)(next + i + k) + AHEAD, 0, 2);                                    \
                    v_put_line(to + i - start + k, line + k, stream);                                                  \
                }                                                                                                      \
            }                                                                                                          \
            for (; i < end; i++) {                                                                                     \
                rest += next[i] * next[i];                                                                             \
                to[i - start] = x[i] * r * gamma[i] + (T)0; /* as NORMAL, which makes 0 of -0 */                       \
            }                                                                                                          \
            if (staged) row_pass(y + start, stage, (end - start) * (int64_t)sizeof(T));                                \
            total += (double)(SUM((s[0] + s[1]) + (s[2] + s[3])) + rest);                                              \
        }                                                                                                              \
        return total;                                                                                                  \
    }                                                                                                                  \
    /* a row of the backward, and what is known of it: the means of g gamma and of that times the normalised x */      \
    typedef struct {                                                                                                   \
        const T *x, *g;                                                                                                \
        T *dx, mean, rstd, a, b;                                                                                       \
        bool stream, staged;                                                                                           \
    } backward_row_##S;                                                                                                \
    /* A line of both rows; `line` gets dx. */                                                                         \
    LAC_INLINE void backward_line_##S(const backward_row_##S *now, const backward_row_##S *next, const T *x,           \
                                      const T *g, const T *xn, const T *gn, const T *gamma, T *dgamma, T *dbeta, H *s, \
                                      H *t, T *line, bool write, bool sum, bool add, bool centred)                     \
    {                                                                                                                  \
        enum { L = HALF_LINE / sizeof(T) };                                                                            \
        _Pragma("GCC unroll 2") for (int k = 0; k < 2; k++)                                                            \
        {                                                                                                              \
            const H weight = AT(H, gamma, k * L);                                                                      \
            H more_gamma = {0}, more_beta = {0};                                                                       \
            if (sum) {                                                                                                 \
                H gk = AT(H, gn, k * L), scaled = gk * weight, c = AT(H, xn, k * L) - next->mean;                      \
                s[k] += scaled;                                                                                        \
                t[k] += scaled * c;                                                                                    \
                if (add) more_gamma = gk * (c * next->rstd), more_beta = gk;                                           \
            }                                                                                                          \
            if (write) {                                                                                               \
                H gk = AT(H, g, k * L), h = (AT(H, x, k * L) - now->mean) * now->rstd;                                 \
                *(H *)(line + k * L) = now->rstd * (gk * weight - now->a - h * now->b);                                \
                more_gamma += gk * h;                                                                                  \
                more_beta += gk;                                                                                       \
            }                                                                                                          \
            if (add) *(H *)(dgamma + k * L) += more_gamma;                                                             \
            if (add && centred) *(H *)(dbeta + k * L) += more_beta;                                                    \
        }                                                                                                              \
    }                                                                                                                  \
    /* One pass over two rows, so that arithmetic, reading and writing overlap: `now`, whose means are known, is       \
     * written, and of `next` the means are found. add: what is at hand of both goes to dgamma and dbeta, so that      \
     * these are loaded and stored once for two rows. dx may be x; not centred: rmsnorm, without mean and dbeta.       \
     * narrow: rows that are never staged and ask 12 KB ahead on every processor (64 floats on a Zen 3: 11.5 ns a line \
     * instead of 12.0). The end of a row is a line filled up with zeros: a loop over its elements, compiled once for  \
     * each case, had its products rounded before they were added in some and not in others. */                        \
    LAC_INLINE void backward_step_##S(const backward_row_##S *now_, backward_row_##S *next_, const T *gamma,           \
                                      T *dgamma, T *dbeta, int64_t n, bool write, bool sum, bool add, bool centred,    \
                                      bool narrow)                                                                     \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T), L = HALF_LINE / sizeof(T) };                                                \
        const backward_row_##S now = *now_, next = *next_; /* stores to dgamma might change them for all gcc knows */  \
        const T *x = now.x, *g = now.g, *xn = next.x, *gn = next.g;                                                    \
        T *dx = now.dx;                                                                                                \
        const bool stream = now.stream, staged = write && !narrow && now.staged, near = !narrow && row_asks_near();    \
        T stage[SUM_BLOCK];                                                                                            \
        double a = 0, b = 0;                                                                                           \
        for (int64_t i = 0; i < n;) {                                                                                  \
            int64_t start = i, end = n - i < SUM_BLOCK ? n : i + SUM_BLOCK;                                            \
            T *to = staged ? stage : write ? dx + start : NULL;                                                        \
            H s[2] = {{0}}, t[2] = {{0}};                                                                              \
            for (; i + CHUNK <= end; i += CHUNK) {                                                                     \
                T line[CHUNK];                                                                                         \
                if (sum) row_ask(xn + i, near), row_ask(gn + i, near);                                                 \
                backward_line_##S(&now, &next, x + i, g + i, xn + i, gn + i, gamma + i, dgamma + i, dbeta + i, s, t,   \
                                  line, write, sum, add, centred);                                                     \
                _Pragma("GCC unroll 2") for (int k = 0; write && k < 2; k++)                                           \
                    put_half(to + i - start + k * L, line + k * L, stream);                                            \
            }                                                                                                          \
            if (i < end) {                                                                                             \
                T part[7][CHUNK], line[CHUNK];                                                                         \
                const int64_t count = end - i;                                                                         \
                row_take_part_##S(gamma + i, part[0], count, 0);                                                       \
                if (write) row_take_part_##S(x + i, part[1], count, 0), row_take_part_##S(g + i, part[2], count, 0);   \
                if (sum) row_take_part_##S(xn + i, part[3], count, 0), row_take_part_##S(gn + i, part[4], count, 0);   \
                if (add) row_take_part_##S(dgamma + i, part[5], count, 0);                                             \
                if (add && centred) row_take_part_##S(dbeta + i, part[6], count, 0);                                   \
                backward_line_##S(&now, &next, part[1], part[2], part[3], part[4], part[0], part[5], part[6], s, t,    \
                                  line, write, sum, add, centred);                                                     \
                if (write) row_put_part_##S(to + i - start, line, count);                                              \
                if (add) row_put_part_##S(dgamma + i, part[5], count);                                                 \
                if (add && centred) row_put_part_##S(dbeta + i, part[6], count);                                       \
                i = end;                                                                                               \
            }                                                                                                          \
            if (staged) row_pass(dx + start, stage, (end - start) * (int64_t)sizeof(T));                               \
            V all_s[V_LINE / V_WIDTH], all_t[V_LINE / V_WIDTH];                                                        \
            memcpy(all_s, s, sizeof s);                                                                                \
            memcpy(all_t, t, sizeof t);                                                                                \
            _Pragma("GCC unroll 4") for (int k = 1; k < V_LINE / V_WIDTH; k++)                                         \
            {                                                                                                          \
                all_s[0] += all_s[k];                                                                                  \
                all_t[0] += all_t[k];                                                                                  \
            }                                                                                                          \
            a += (double)SUM(all_s[0]);                                                                                \
            b += (double)SUM(all_t[0]);                                                                                \
        }                                                                                                              \
        if (sum) next_->a = centred ? (T)(a / (double)n) : 0, next_->b = (T)(b * (double)next.rstd / (double)n);       \
    }                                                                                                                  \
    /* adds the sums of a few rows to those of all, and starts again */                                                \
    static void norm_flush_##S(T *few, double *all, int64_t n)                                                         \
    {                                                                                                                  \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) all[i] += (double)few[i];                                  \
        memset(few, 0, (size_t)n * sizeof(T));                                                                         \
    }
#define DIFFERENCE(U, i) (AT(U, x, i) - first)
#define CENTRED(U, i) ((AT(U, x, i) - high) - low)
#define SQUARE(U, i) (CENTRED(U, i) * CENTRED(U, i))
#define NORMAL(i) (((x[i] - high) - low) * r * gamma[i] + beta[i])
ROW_KERNELS(float, f, v_floats, half_floats, row_sum_f)
ROW_KERNELS(double, d, v_doubles, half_doubles, v_sum_d)

/* ---- both norms ---- */

/* the arguments of layernorm and rmsnorm in one form; without_mean: rmsnorm, which has no beta and no mean */
typedef struct {
    lac_view x, out, vector_gamma, vector_beta, mean, rstd, g, dgamma, dbeta; /* out: dx in the backward */
    double eps;
    bool without_mean;
    const void *gamma, *beta; /* in the compute type; ones and zeros where there is none */
    void *own[2];             /* their workspace */
    int64_t rows, n, row_bytes, blocks;
    int dtype, ctype;
    bool dense, stream;             /* x (and g) are arrays of the compute type; a result larger than the caches */
    char *workspace;                /* ROWS_OF_THREAD rows per thread */
    double *sums_gamma, *sums_beta; /* [blocks][n], or NULL */
} norm_job;

enum { ROW_X, ROW_G = 2, ROW_OUT = 4, ROW_GAMMA, ROW_BETA, ROWS_OF_THREAD }; /* x and g: two rows each */

/* row t of x or g in the compute type */
static inline const void *row_of(const norm_job *job, const lac_view *v, int64_t t, void *space)
{
    int64_t size = (int64_t)lac_compute_size(job->ctype);
    return job->dense ? (const char *)v->data + t * job->n * size : LAC_CPU(load_linear)(v, t * job->n, job->n, space);
}

/* layernorm of rows that are arrays of the compute type; at the end steps see the last row again, for nothing. A row's
 * state stays where it is and pointers move: a struct that is copied in wider pieces than were stored waits for all
 * stores before it, and those past the caches are slow (12.3 cycles of a Zen 4 a line of 1024 floats, 10.5 so; the
 * passes in turn 12.6). Rejected: a row's rest between steps, to wait less for sums (five rows leave the cache: 16). */
#define FORWARD_PIPELINE(T, S)                                                                                         \
    LAC_INLINE void forward_take_##S(const norm_job *job, forward_row_##S *row, int64_t t, int64_t end)                \
    {                                                                                                                  \
        row->x = (const T *)job->x.data + (t < end ? t : end - 1) * job->n;                                            \
        row->first = isfinite(row->x[0]) ? row->x[0] : 0;                                                              \
    }                                                                                                                  \
    static void norm_rows_##S(const norm_job *job, int64_t begin, int64_t end)                                         \
    {                                                                                                                  \
        const int64_t n = job->n;                                                                                      \
        forward_row_##S rows[3] = {{0}}, *now = rows, *middle = rows + 1, *next = rows + 2;                            \
        for (int k = 0; k < 2; k++) {                                                                                  \
            forward_take_##S(job, rows + k, begin + k, end);                                                           \
            forward_mean_##S(rows + k, row_differences_##S(rows[k].x, rows[k].first, n), n);                           \
        }                                                                                                              \
        forward_deviation_##S(now, row_squares_##S(now->x, now->high, now->low, n), job->eps, n);                      \
        for (int64_t t = begin; t < end; t++) {                                                                        \
            T *y = (T *)job->out.data + t * n;                                                                         \
            forward_take_##S(job, next, t + 2, end);                                                                   \
            ((T *)job->mean.data)[t] = now->high;                                                                      \
            ((T *)job->rstd.data)[t] = now->r;                                                                         \
            forward_step_##S(now, middle, next, job->gamma, job->beta, job->eps, y,                                    \
                             job->stream && ((uintptr_t)y & (V_LINE - 1)) == 0,                                        \
                             row_staged(y, n * (int64_t)sizeof(T), job->stream), n);                                   \
            forward_row_##S *done = now;                                                                               \
            now = middle;                                                                                              \
            middle = next;                                                                                             \
            next = done;                                                                                               \
        }                                                                                                              \
    }                                                                                                                  \
    /* the same, but for the squares of a row, which are found by themselves */                                        \
    static void norm_pairs_##S(const norm_job *job, int64_t begin, int64_t end)                                        \
    {                                                                                                                  \
        const int64_t n = job->n;                                                                                      \
        forward_row_##S rows[2] = {{0}}, *now = rows, *next = rows + 1;                                                \
        forward_take_##S(job, now, begin, end);                                                                        \
        forward_mean_##S(now, row_differences_##S(now->x, now->first, n), n);                                          \
        for (int64_t t = begin; t < end; t++) {                                                                        \
            T *y = (T *)job->out.data + t * n;                                                                         \
            forward_deviation_##S(now, row_squares_##S(now->x, now->high, now->low, n), job->eps, n);                  \
            forward_take_##S(job, next, t + 1, end);                                                                   \
            ((T *)job->mean.data)[t] = now->high;                                                                      \
            ((T *)job->rstd.data)[t] = now->r;                                                                         \
            forward_step_##S(now, NULL, next, job->gamma, job->beta, job->eps, y,                                      \
                             job->stream && ((uintptr_t)y & (V_LINE - 1)) == 0,                                        \
                             row_staged(y, n * (int64_t)sizeof(T), job->stream), n);                                   \
            forward_row_##S *done = now;                                                                               \
            now = next;                                                                                                \
            next = done;                                                                                               \
        }                                                                                                              \
    }
/* rmsnorm of such rows, by two */
#define RMS_PIPELINE(T, S)                                                                                             \
    static void rms_rows_##S(const norm_job *job, int64_t begin, int64_t end)                                          \
    {                                                                                                                  \
        const int64_t n = job->n;                                                                                      \
        const T *x = (const T *)job->x.data + begin * n;                                                               \
        const bool narrow = job->row_bytes < NARROW;                                                                   \
        double squares = row_squares_##S(x, 0, 0, n);                                                                  \
        for (int64_t t = begin; t < end; t++) {                                                                        \
            T *y = (T *)job->out.data + t * n, r = (T)(1.0 / sqrt(squares / (double)n + job->eps));                    \
            const T *next = t + 1 < end ? x + n : x;                                                                   \
            ((T *)job->rstd.data)[t] = r;                                                                              \
            const bool stream = job->stream && ((uintptr_t)y & (V_LINE - 1)) == 0;                                     \
            if (narrow) squares = rms_step_##S(x, r, job->gamma, y, next, stream, false, n);                           \
            else                                                                                                       \
                squares = rms_step_##S(x, r, job->gamma, y, next, stream,                                              \
                                       row_staged(y, n * (int64_t)sizeof(T), job->stream), n);                         \
            x = next;                                                                                                  \
        }                                                                                                              \
    }
RMS_PIPELINE(float, f)
RMS_PIPELINE(double, d)
FORWARD_PIPELINE(float, f)
FORWARD_PIPELINE(double, d)

static void norm_task(void *context, int64_t begin, int64_t end, int thread)
{
    const norm_job *job = context;
    char *space = job->workspace + ROWS_OF_THREAD * job->row_bytes * thread;
    int64_t n = job->n, size = (int64_t)lac_compute_size(job->ctype);
    /* of one row or two most of the steps would be for nothing; all three with AVX-512, whose registers hold the sums
     * of both rows, and where rows are narrow: there a row's sums and roots take longer than its elements (on a Zen 3
     * rows of 77, 128 and 176 floats took 14.8, 8.1 and 8.3 ns a line by two, 11.5, 6.8 and 6.7 by three) */
    const bool together = job->dense && job->row_bytes <= WIDEST && end - begin > 2;
    const bool three = V_WIDTH == 64 ? 5 * job->row_bytes <= FIRST_CACHE : V_WIDTH == 32 && job->row_bytes < NARROW;
    if (together && job->without_mean && job->ctype == C_F32) rms_rows_f(job, begin, end);
    else if (together && job->without_mean) rms_rows_d(job, begin, end);
    else if (together && three && job->ctype == C_F32) norm_rows_f(job, begin, end);
    else if (together && three) norm_rows_d(job, begin, end);
    else if (together && job->ctype == C_F32) norm_pairs_f(job, begin, end);
    else if (together) norm_pairs_d(job, begin, end);
    for (int64_t t = begin; t < end && !together; t++) {
        const void *x = row_of(job, &job->x, t, space);
        char *out = (char *)job->out.data + t * n * lac_bytes_of(job->dtype); /* contiguous: made by the front end */
        void *y = lac_is_native(job->dtype) ? out : space + ROW_OUT * job->row_bytes;
        void *mean = job->without_mean ? NULL : (char *)job->mean.data + t * size;
        void *rstd = (char *)job->rstd.data + t * size;
        bool stream = job->stream && ((uintptr_t)y & (V_LINE - 1)) == 0;
        bool staged = row_staged(y, n * size, job->stream);
        if (job->ctype == C_F32) norm_row_f(x, job->gamma, job->beta, job->eps, y, mean, rstd, stream, staged, n);
        else norm_row_d(x, job->gamma, job->beta, job->eps, y, mean, rstd, stream, staged, n);
        if (y != out) LAC_CPU(store)(job->dtype, y, out, lac_bytes_of(job->dtype), n);
    }
    if (job->stream) v_stream_end();
}

/* a vector [n] in the compute type, all `missing` if there is none; *own is workspace to give back */
static int load_vector(const char *op, const norm_job *job, const lac_view *v, double missing, const void **out,
                       void **own)
{
    *own = lac_workspace_get(op, (size_t)job->n * 8 + 8);
    if (!*own) return LAC_E_MEMORY;
    if (v->data) *out = LAC_CPU(load)(v->dtype, v->data, v->stride[0] * lac_bytes_of(v->dtype), job->n, *own);
    else if (job->ctype == C_F32) {
        float value = (float)missing;
        *out = LAC_CPU(load)(LAC_F32, &value, 0, job->n, *own);
    } else {
        *out = LAC_CPU(load)(LAC_F64, &missing, 0, job->n, *own);
    }
    return 0;
}

static int norm_start(const char *op, norm_job *job, const lac_view *x)
{
    job->x = *x;
    job->n = x->shape[x->ndim - 1];
    job->rows = job->n ? lac_view_numel(x) / job->n : 0;
    job->dtype = x->dtype;
    job->ctype = lac_compute_type(job->dtype);
    job->row_bytes = (job->n * (int64_t)lac_compute_size(job->ctype) + 63) / 64 * 64;
    job->dense = lac_is_native(job->dtype) && lac_view_contiguous(x) && (!job->g.data || lac_view_contiguous(&job->g));
    job->stream = lac_is_native(job->dtype) && lac_view_numel(x) * lac_bytes_of(job->dtype) >= LAC_STREAM_BYTES;
    LAC_TRY(load_vector(op, job, &job->vector_gamma, 1, &job->gamma, &job->own[0]));
    return load_vector(op, job, &job->vector_beta, 0, &job->beta, &job->own[1]);
}

static int norm_end(norm_job *job, int status)
{
    lac_workspace_put(job->workspace);
    lac_workspace_put(job->own[0]);
    lac_workspace_put(job->own[1]);
    return status;
}

static int norm_run(const char *op, norm_job *job, const lac_view *x)
{
    int64_t work = lac_view_numel(x) * 4;
    int status = norm_start(op, job, x);
    if (!status) {
        job->workspace =
            lac_workspace_get(op, (size_t)(ROWS_OF_THREAD * job->row_bytes * LAC_CPU(threads)(job->rows, work)));
        if (!job->workspace) status = LAC_E_MEMORY;
    }
    if (!status) status = LAC_CPU(parallel)(op, job->rows, work, norm_task, job);
    return norm_end(job, status);
}

/* rows [from, to), whose sums go to block t of all */
#define ROWS_BACKWARD(T, S)                                                                                            \
    static backward_row_##S backward_row_at_##S(const norm_job *job, int64_t r, char *space)                           \
    {                                                                                                                  \
        const int64_t n = job->n, bytes = lac_bytes_of(job->dtype);                                                    \
        space += r % 2 * job->row_bytes;                                                                               \
        backward_row_##S row = {.x = row_of(job, &job->x, r, space),                                                   \
                                .g = row_of(job, &job->g, r, space + ROW_G * job->row_bytes),                          \
                                .dx = lac_is_native(job->dtype) ? (T *)((char *)job->out.data + r * n * bytes) : NULL, \
                                .rstd = ((const T *)job->rstd.data)[r * job->rstd.stride[0]]};                         \
        if (!job->without_mean) row.mean = ((const T *)job->mean.data)[r * job->mean.stride[0]];                       \
        row.stream = job->stream && ((uintptr_t)row.dx & (V_LINE - 1)) == 0;                                           \
        row.staged = row_staged(row.dx, n * (int64_t)sizeof(T), job->stream);                                          \
        return row;                                                                                                    \
    }                                                                                                                  \
    LAC_INLINE void backward_rows_##S(const norm_job *job, int64_t t, int64_t from, int64_t to, char *space,           \
                                      bool centred, bool narrow)                                                       \
    {                                                                                                                  \
        const int64_t n = job->n, bytes = lac_bytes_of(job->dtype);                                                    \
        T *dgamma = (T *)(space + ROW_GAMMA * job->row_bytes), *own = (T *)(space + ROW_OUT * job->row_bytes);         \
        T *dbeta = (T *)(space + ROW_BETA * job->row_bytes);                                                           \
        backward_row_##S rows[2] = {{0}}, *now = rows, *next = rows + 1;                                               \
        *next = backward_row_at_##S(job, from, space);                                                                 \
        backward_step_##S(next, next, job->gamma, dgamma, dbeta, n, false, true, false, centred, narrow);              \
        for (int64_t r = from; r < to; r++) {                                                                          \
            const bool more = r + 1 < to, add = (r - from) % 2 == 0;                                                   \
            backward_row_##S *done = now;                                                                              \
            now = next;                                                                                                \
            next = done;                                                                                               \
            if (!lac_is_native(job->dtype)) now->dx = own;                                                             \
            if (more) *next = backward_row_at_##S(job, r + 1, space);                                                  \
            if (more && add)                                                                                           \
                backward_step_##S(now, next, job->gamma, dgamma, dbeta, n, true, true, true, centred, narrow);         \
            else if (more)                                                                                             \
                backward_step_##S(now, next, job->gamma, dgamma, dbeta, n, true, true, false, centred, narrow);        \
            else backward_step_##S(now, next, job->gamma, dgamma, dbeta, n, true, false, add, centred, narrow);        \
            if (now->dx == own) LAC_CPU(store)(job->dtype, own, (char *)job->out.data + r * n * bytes, bytes, n);      \
            if ((r - from) % FLUSH_ROWS == FLUSH_ROWS - 1 || r == to - 1) {                                            \
                if (job->sums_gamma) norm_flush_##S(dgamma, job->sums_gamma + t * n, n);                               \
                if (job->sums_beta) norm_flush_##S(dbeta, job->sums_beta + t * n, n);                                  \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    /* apart, so that each has the registers for itself */                                                             \
    static __attribute__((noinline)) void backward_rms_##S(const norm_job *job, int64_t t, int64_t from, int64_t to,   \
                                                           char *space)                                                \
    {                                                                                                                  \
        backward_rows_##S(job, t, from, to, space, false, false);                                                      \
    }                                                                                                                  \
    static __attribute__((noinline)) void backward_rms_narrow_##S(const norm_job *job, int64_t t, int64_t from,        \
                                                                  int64_t to, char *space)                             \
    {                                                                                                                  \
        backward_rows_##S(job, t, from, to, space, false, true);                                                       \
    }                                                                                                                  \
    static __attribute__((noinline)) void backward_narrow_##S(const norm_job *job, int64_t t, int64_t from,            \
                                                              int64_t to, char *space)                                 \
    {                                                                                                                  \
        backward_rows_##S(job, t, from, to, space, true, true);                                                        \
    }                                                                                                                  \
    static void norm_bwd_rows_##S(const norm_job *job, int64_t t, int64_t from, int64_t to, char *space)               \
    {                                                                                                                  \
        const bool narrow = job->row_bytes < NARROW;                                                                   \
        if (job->without_mean && narrow) backward_rms_narrow_##S(job, t, from, to, space);                             \
        else if (job->without_mean) backward_rms_##S(job, t, from, to, space);                                         \
        else if (narrow) backward_narrow_##S(job, t, from, to, space);                                                 \
        else backward_rows_##S(job, t, from, to, space, true, false);                                                  \
    }
ROWS_BACKWARD(float, f)
ROWS_BACKWARD(double, d)

static void norm_bwd_task(void *context, int64_t begin, int64_t end, int thread)
{
    const norm_job *job = context;
    char *space = job->workspace + ROWS_OF_THREAD * job->row_bytes * thread;
    int64_t n = job->n;
    memset(space + ROW_GAMMA * job->row_bytes, 0, (size_t)(2 * job->row_bytes));
    for (int64_t t = begin; t < end; t++) {
        if (job->sums_gamma) memset(job->sums_gamma + t * n, 0, (size_t)n * sizeof(double));
        if (job->sums_beta) memset(job->sums_beta + t * n, 0, (size_t)n * sizeof(double));
        int64_t share = job->rows / job->blocks, extra = job->rows % job->blocks;
        int64_t from = t * share + (t < extra ? t : extra), to = from + share + (t < extra);
        if (from == to) continue;
        if (job->ctype == C_F32) norm_bwd_rows_f(job, t, from, to, space);
        else norm_bwd_rows_d(job, t, from, to, space);
    }
    if (job->stream) v_stream_end();
}

/* sums the blocks in order into block 0 and stores it as out [n] */
static void combine_blocks(const norm_job *job, double *sums, const lac_view *out)
{
    if (!sums) return;
    int64_t n = job->n, bytes = lac_bytes_of(out->dtype);
    float space[SUM_BLOCK];
    for (int64_t b = 1; b < job->blocks; b++)
        for (int64_t i = 0; i < n; i++) sums[i] += sums[b * n + i];
    for (int64_t at = 0; at < n; at += SUM_BLOCK) {
        int64_t w = n - at < SUM_BLOCK ? n - at : SUM_BLOCK;
        const void *v = sums + at;
        if (job->ctype == C_F32) {
            for (int64_t i = 0; i < w; i++)
                space[i] = job->dtype == LAC_F32 ? (float)sums[at + i] : v_round_odd(sums[at + i]);
            v = space;
        }
        LAC_CPU(store)(out->dtype, v, (char *)out->data + at * bytes, bytes, w);
    }
}

static int norm_bwd_run(const char *op, norm_job *job, const lac_view *x)
{
    int64_t work = lac_view_numel(x) * 6;
    if (x->shape[x->ndim - 1] == 0) return 0;
    int status = norm_start(op, job, x);
    /* at least one block, so that no rows give sums of zero */
    job->blocks = (job->rows + GAMMA_ROWS - 1) / GAMMA_ROWS;
    if (job->blocks > GAMMA_BLOCKS) job->blocks = GAMMA_BLOCKS;
    if (job->blocks < 1) job->blocks = 1;
    int64_t sums = job->blocks * job->n;
    if (!status) {
        size_t rows = (size_t)(ROWS_OF_THREAD * job->row_bytes * LAC_CPU(threads)(job->blocks, work));
        job->workspace = lac_workspace_get(op, rows + 2 * (size_t)sums * sizeof(double));
        if (!job->workspace) status = LAC_E_MEMORY;
        if (!status && job->dgamma.data) job->sums_gamma = (double *)(job->workspace + rows);
        if (!status && job->dbeta.data) job->sums_beta = (double *)(job->workspace + rows) + sums;
    }
    if (!status) status = LAC_CPU(parallel)(op, job->blocks, work, norm_bwd_task, job);
    if (!status) {
        combine_blocks(job, job->sums_gamma, &job->dgamma);
        combine_blocks(job, job->sums_beta, &job->dbeta);
    }
    return norm_end(job, status);
}

/* ---- operators ---- */

int LAC_CPU(layernorm)(const lac_a_layernorm *a)
{
    norm_job job = {.out = a->out,
                    .vector_gamma = a->gamma,
                    .vector_beta = a->beta,
                    .mean = a->mean,
                    .rstd = a->rstd,
                    .eps = a->eps};
    return norm_run("layernorm", &job, &a->x);
}

int LAC_CPU(layernorm_bwd)(const lac_a_layernorm_bwd *a)
{
    norm_job job = {.out = a->dx,
                    .vector_gamma = a->gamma,
                    .mean = a->mean,
                    .rstd = a->rstd,
                    .g = a->g,
                    .dgamma = a->dgamma,
                    .dbeta = a->dbeta};
    return norm_bwd_run("layernorm_bwd", &job, &a->x);
}

enum {
#define MAP2(name, domain, value, d_x, d_y) M2_##name,
#include "../maps.def"
};
enum {
#define MAP1(name, domain, value, gradient) M1_##name,
#include "../maps.def"
};

/* The parts in turn. One pass instead would save a read of the sum from memory, and measured on a step all residual
 * sums together are 0.8% of it (lua/lacuna/nn/longnet.lua); so here the operator only saves the host's work. */
int LAC_CPU(residual_norm)(const lac_a_residual_norm *a)
{
    lac_a_dropout drop = {.x = a->h, .out = a->sum, .p = a->p, .seed = a->seed, .offset = a->offset};
    lac_a_map2 add = {.fn = M2_add, .x = a->x, .y = a->p > 0 ? a->sum : a->h, .out = a->sum};
    lac_a_layernorm norm = {.x = a->sum,
                            .gamma = a->gamma,
                            .beta = a->beta,
                            .out = a->out,
                            .mean = a->mean,
                            .rstd = a->rstd,
                            .eps = a->eps};
    if (a->p > 0) LAC_TRY(LAC_CPU(dropout)(&drop));
    LAC_TRY(LAC_CPU(map2)(&add));
    return LAC_CPU(layernorm)(&norm);
}

int LAC_CPU(residual_norm_bwd)(const lac_a_residual_norm_bwd *a)
{
    lac_a_layernorm_bwd norm = {.x = a->sum,
                                .gamma = a->gamma,
                                .mean = a->mean,
                                .rstd = a->rstd,
                                .g = a->g,
                                .dx = a->dx,
                                .dgamma = a->dgamma,
                                .dbeta = a->dbeta};
    lac_a_axpy add = {.dst = a->dx, .x = a->g_sum, .alpha = 1};
    lac_a_dropout drop = {.x = a->dx, .out = a->dh, .p = a->p, .seed = a->seed, .offset = a->offset};
    LAC_TRY(LAC_CPU(layernorm_bwd)(&norm));
    if (a->g_sum.data) LAC_TRY(LAC_CPU(axpy)(&add));
    return a->dh.data ? LAC_CPU(dropout)(&drop) : 0;
}

/* In turn, too. gelu is computed twice only if the caller kept nothing of it: here that costs more than memory. */
int LAC_CPU(gelu_norm)(const lac_a_gelu_norm *a)
{
    lac_a_map1 gelu = {.fn = M1_gelu, .x = a->x, .out = a->act.data ? a->act : a->out};
    lac_a_layernorm norm = {.x = gelu.out,
                            .gamma = a->gamma,
                            .beta = a->beta,
                            .out = a->out,
                            .mean = a->mean,
                            .rstd = a->rstd,
                            .eps = a->eps};
    LAC_TRY(LAC_CPU(map1)(&gelu));
    return LAC_CPU(layernorm)(&norm);
}

/* a's out, whose mean and rstd the caller has */
static int norm_again(const lac_a_gelu_norm_bwd *a, const lac_view *act)
{
    int64_t rows = a->mean.shape[0], bytes = rows * (a->x.dtype == LAC_F64 ? 8 : 4);
    char *space = lac_workspace_get("gelu_norm_bwd", (size_t)(2 * bytes));
    lac_a_layernorm norm = {
        .x = *act, .gamma = a->gamma, .beta = a->beta, .out = a->out, .mean = a->mean, .rstd = a->rstd, .eps = a->eps};
    if (!space) return LAC_E_MEMORY;
    norm.mean.data = space, norm.rstd.data = space + bytes;
    norm.mean.stride[0] = norm.rstd.stride[0] = 1;
    int status = LAC_CPU(layernorm)(&norm);
    lac_workspace_put(space);
    return status;
}

int LAC_CPU(gelu_norm_bwd)(const lac_a_gelu_norm_bwd *a)
{
    lac_a_map1 gelu = {.fn = M1_gelu, .x = a->x, .out = a->dx};
    lac_a_layernorm_bwd norm = {.x = a->act.data ? a->act : a->dx,
                                .gamma = a->gamma,
                                .mean = a->mean,
                                .rstd = a->rstd,
                                .g = a->g,
                                .dx = a->dx,
                                .dgamma = a->dgamma,
                                .dbeta = a->dbeta};
    lac_a_map1_bwd back = {.fn = M1_gelu, .x = a->x, .y = a->x, .g = a->dx, .out = a->dx};
    if (!a->act.data) LAC_TRY(LAC_CPU(map1)(&gelu));
    if (a->out.data) LAC_TRY(norm_again(a, &norm.x));
    LAC_TRY(LAC_CPU(layernorm_bwd)(&norm));
    LAC_TRY(LAC_CPU(map1_bwd)(&back));
    return LAC_CPU(column_sums)(&a->dx, &a->sums);
}

int LAC_CPU(rmsnorm)(const lac_a_rmsnorm *a)
{
    norm_job job = {.out = a->out, .vector_gamma = a->gamma, .rstd = a->rstd, .eps = a->eps, .without_mean = true};
    return norm_run("rmsnorm", &job, &a->x);
}

int LAC_CPU(rmsnorm_bwd)(const lac_a_rmsnorm_bwd *a)
{
    norm_job job = {
        .out = a->dx, .vector_gamma = a->gamma, .rstd = a->rstd, .g = a->g, .dgamma = a->dgamma, .without_mean = true};
    return norm_bwd_run("rmsnorm_bwd", &job, &a->x);
}
