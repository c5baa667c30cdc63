/* softmax.c: softmax and its logarithm over any axis on the CPU, forward and backward.
 *
 * Along the last axis a row is a task: it fits a cache, so the passes over it (maximum, exponentials and their sum,
 * scaling) cost one trip to memory. The passes run together, each over a row of its own: one is written while of the
 * next the exponentials are computed and of the one after that the maximum is found. One after the other they take 15
 * cycles a line of floats on a Zen 4 (writing past the caches alone 8.3, the exponential 8.4, the maximum 1.3),
 * together 11.6, where a copy takes 10 and the loop by itself 9.5. Milakov and Gimelshein's online form was rejected
 * there: its rescaling serialises the exponentials, and the row is in cache anyway. With AVX2 on a Zen 3 arithmetic
 * sets the pace: there a step of floats is row_step_f (rows.h), which begins one line of exponentials before it ends
 * another, keeps its sums in registers and is compiled once per case: 13.4 cycles a line and 72 a row, where a copy
 * takes 11 to 13. Rejected there: a row's rest between the steps, so that none waits for the sum and the division
 * before it (five rows in the first cache); the maximum of the next row by two lines at a time in the first half of a
 * block, which ends a loop more (94 cycles a row). Results of rows that are not whole cache lines go past the caches
 * by blocks (row_pass; rows of 1000 6.2 ns a line instead of 8.6). The backward has two passes: dx of a row is written
 * while the sum of the next one is found; with AVX2 on a Zen 3 that is 80 to 85% of a copy instead of 70 to 74, and of
 * the logarithm 89 instead of 25, of which most were loads that waited (COLUMN_LINES). Along another axis the rows'
 * elements are far apart, and a row by itself would use 4 bytes of each cache line: there a task takes a block of
 * neighbouring columns, with one maximum and one sum per column, and goes through memory twice (softmax_columns.inc):
 * 32 rows at a time for the statistics (the online form, whose rescaling is then rare), and again for the results,
 * where each exponential is computed anew, because that is cheaper than to write and read it. Only where no axis is
 * dense, rows are gathered one by one. Results larger than the caches are written past them. Sums are taken in the
 * compute type over at most 1024 elements or 32 rows and added up in double. So columns cannot come near one copy:
 * reading twice and writing once are 1.5 times its bytes, and 1.67, 1.5 and 1.33 times those of the backward, the
 * logarithm and its backward. On an AVX-512 Xeon with 2 MB of second cache these four took 1.70, 1.62, 1.73 and 1.39
 * for 16384 rows of 4096 bytes on one thread. Rejected: blocks of columns narrow enough to be kept in the second cache
 * between the two passes: pieces of 256 bytes come slowly (a mere copy in blocks of 64, 128, 256 bytes, asked for
 * ahead, took 3.3, 2.4, 2.2 times a copy in order). A row of -inf only has no softmax: it gives NaN, as 0/0 should;
 * callers that mean "no key" must say so.
 */
#include "cpu.h"
#include "rows.h"

/* WIDE: bytes of a row from which on rows go one by one */
enum { AHEAD = ROW_AHEAD, WIDE = 160 << 10 };

typedef struct {
    lac_nest nest;        /* the axes that are not normalised: out, x (, g) */
    int64_t n, row_bytes; /* length of a row; bytes of one buffer */
    int64_t stride[3];    /* bytes between a row's elements */
    int dtype, ctype, inputs;
    bool logarithm, stream; /* stream: a result larger than the caches */
    bool direct;            /* rows that are arrays of the compute type */
    /* columns: how many of them a task works on together, tasks per outer row, parts of the n elements, and whether
     * these are tasks of their own */
    int64_t width, blocks, parts;
    bool shared;
    char *tops; /* then what is known of each part */
    double *totals;
    char *workspace;
    int64_t space; /* bytes of it per thread */
} softmax_job;

/* ---- kernels, once per type ---- */

/* y[i] = f(i) by cache lines while `ahead` is fetched */
#define WRITE(T, n, y, ahead, stream, f)                                                                               \
    do {                                                                                                               \
        enum { CHUNK_ = V_LINE / sizeof(T) };                                                                          \
        int64_t i_ = 0;                                                                                                \
        for (; i_ + CHUNK_ <= (n); i_ += CHUNK_) {                                                                     \
            T line_[CHUNK_];                                                                                           \
            __builtin_prefetch((ahead) + i_);                                                                          \
            _Pragma("omp simd") for (int k_ = 0; k_ < CHUNK_; k_++) line_[k_] = f(i_ + k_);                            \
            v_put_line((y) + i_, line_, stream);                                                                       \
        }                                                                                                              \
        for (; i_ < (n); i_++) (y)[i_] = f(i_);                                                                        \
    } while (0)
#define AT(U, x, i) (*(const U *)((x) + (i)))
#define ROW_LOG(i) ((x[i] - m) - rest)
#define ROW_SCALE(i) (x[i] * scale)

#define SOFTMAX_STEP(T, S, V, SUM, LINE, INF)                                                                          \
    /* The exponentials of row x go to `work` and their sum is returned, while y, the row before, is written from      \
     * `from` and *top becomes the largest of the row after. Loads stand before stores, which rows some pages apart    \
     * would have to wait for. */                                                                                      \
    LAC_INLINE double softmax_step_##S(const T *x, T m, T *work, const T *from, T shift, T scale, T *y, const T *next, \
                                       T *top, int64_t n, bool logarithm, bool stream, bool staged)                    \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T), L = V_WIDTH / sizeof(T) };                                                  \
        V most[CHUNK / L];                                                                                             \
        T line[CHUNK], done[CHUNK], up[CHUNK], stage[ROW_SUM];                                                         \
        double total = 0;                                                                                              \
        for (int k = 0; k < CHUNK / L; k++) most[k] = (V){0} - INF;                                                    \
        for (int64_t i = 0; i < n;) {                                                                                  \
            int64_t start = i, end = n - i < ROW_SUM ? n : i + ROW_SUM;                                                \
            T *to = staged ? stage : y + start;                                                                        \
            V s[CHUNK / L] = {{0}};                                                                                    \
            for (; i + CHUNK <= end; i += CHUNK) {                                                                     \
                __builtin_prefetch((const char *)(next + i) + AHEAD, 0, 2);                                            \
                _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK / L; k++) * (V *)(up + k * L) = most[k];             \
                _Pragma("omp simd") for (int k = 0; k < CHUNK; k++)                                                    \
                {                                                                                                      \
                    T v = next[i + k], f = from[i + k];                                                                \
                    line[k] = x[i + k] - m;                                                                            \
                    done[k] = logarithm ? (f - shift) - scale : f * scale;                                             \
                    up[k] = v > up[k] ? v : up[k];                                                                     \
                }                                                                                                      \
                LINE(line);                                                                                            \
                _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK / L; k++)                                            \
                {                                                                                                      \
                    most[k] = *(V *)(up + k * L);                                                                      \
                    s[k] += *(const V *)(line + k * L);                                                                \
                }                                                                                                      \
                if (!logarithm) v_put_line(work + i, line, false);                                                     \
                v_put_line(to + i - start, done, stream);                                                              \
            }                                                                                                          \
            if (i < end) {                                                                                             \
                T part[CHUNK], own[CHUNK];                                                                             \
                row_take_part_##S(x + i, part, end - i, -INF);                                                         \
                row_take_part_##S(from + i, done, end - i, 0);                                                         \
                row_take_part_##S(next + i, own, end - i, -INF);                                                       \
                _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK / L; k++) * (V *)(up + k * L) = most[k];             \
                _Pragma("omp simd") for (int k = 0; k < CHUNK; k++)                                                    \
                {                                                                                                      \
                    T v = own[k], f = done[k];                                                                         \
                    part[k] -= m;                                                                                      \
                    done[k] = logarithm ? (f - shift) - scale : f * scale;                                             \
                    up[k] = v > up[k] ? v : up[k];                                                                     \
                }                                                                                                      \
                LINE(part);                                                                                            \
                _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK / L; k++)                                            \
                {                                                                                                      \
                    most[k] = *(V *)(up + k * L);                                                                      \
                    s[k] += *(const V *)(part + k * L);                                                                \
                }                                                                                                      \
                if (!logarithm) v_put_line(work + i, part, false); /* it is as long as whole lines */                  \
                row_put_part_##S(to + i - start, done, end - i);                                                       \
                i = end;                                                                                               \
            }                                                                                                          \
            if (staged) row_pass(y + start, stage, (end - start) * (int64_t)sizeof(T));                                \
            _Pragma("GCC unroll 4") for (int k = 1; k < CHUNK / L; k++) s[0] += s[k];                                  \
            total += (double)SUM(s[0]);                                                                                \
        }                                                                                                              \
        memcpy(up, most, sizeof up);                                                                                   \
        *top = row_top_##S(up);                                                                                        \
        return total;                                                                                                  \
    }

#define ROW_KERNELS(T, S, V, SUM, LINE, INF)                                                                           \
    /* y of a row whose maximum is m and whose exponentials' sum is known. x: the row, or without the logarithm its    \
     * exponentials */                                                                                                 \
    static void softmax_write_##S(const T *x, T m, double sum, T *y, int64_t n, bool logarithm, bool stream)           \
    {                                                                                                                  \
        T rest = (T)log(sum), scale = (T)(1.0 / sum);                                                                  \
        if (logarithm) WRITE(T, n, y, x, stream, ROW_LOG);                                                             \
        else WRITE(T, n, y, x, stream, ROW_SCALE);                                                                     \
    }                                                                                                                  \
    /* y may be x */                                                                                                   \
    static void softmax_row_##S(const T *x, T *y, int64_t n, bool logarithm)                                           \
    {                                                                                                                  \
        T m = row_max_##S(x, n);                                                                                       \
        double sum = row_exp_##S(x, m, logarithm ? NULL : y, n);                                                       \
        softmax_write_##S(logarithm ? x : y, m, sum, y, n, logarithm, false);                                          \
    }                                                                                                                  \
    /* The backward's two passes over two rows: dx of y and g, whose sum is s, is written, while the next row's sum is \
     * found. dx may be y. */                                                                                          \
    LAC_INLINE T backward_step_##S(const T *y, const T *g, T s, T *dx, const T *yn, const T *gn, int64_t n,            \
                                   bool logarithm, bool stream, bool write, bool sum, bool staged)                     \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T), L = V_WIDTH / sizeof(T) };                                                  \
        T stage[ROW_SUM];                                                                                              \
        const bool near = row_asks_near();                                                                             \
        double total = 0;                                                                                              \
        for (int64_t i = 0; i < n;) {                                                                                  \
            int64_t start = i, end = n - i < ROW_SUM ? n : i + ROW_SUM;                                                \
            T *to = staged ? stage : write ? dx + start : NULL;                                                        \
            V a[CHUNK / L] = {{0}};                                                                                    \
            T line[CHUNK];                                                                                             \
            for (; i + CHUNK <= end; i += CHUNK) {                                                                     \
                if (sum) {                                                                                             \
                    row_ask(yn + i, near);                                                                             \
                    row_ask(gn + i, near);                                                                             \
                }                                                                                                      \
                _Pragma("GCC unroll 4") for (int k = 0; sum && k < CHUNK / L; k++)                                     \
                {                                                                                                      \
                    if (logarithm) a[k] += AT(V, gn, i + k * L);                                                       \
                    else a[k] += AT(V, yn, i + k * L) * AT(V, gn, i + k * L);                                          \
                }                                                                                                      \
                if (!write) continue;                                                                                  \
                _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK; k += L) * (V *)(line + k) = AT(V, y, i + k);        \
                if (logarithm) LINE(line);                                                                             \
                _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK; k += L)                                             \
                {                                                                                                      \
                    V gk = AT(V, g, i + k), own = *(V *)(line + k);                                                    \
                    *(V *)(line + k) = logarithm ? gk - own * s : own * (gk - s);                                      \
                }                                                                                                      \
                v_put_line(to + i - start, line, stream);                                                              \
            }                                                                                                          \
            if (i < end) {                                                                                             \
                T other[CHUNK];                                                                                        \
                if (sum) {                                                                                             \
                    row_take_part_##S(gn + i, other, end - i, 0);                                                      \
                    if (!logarithm) row_take_part_##S(yn + i, line, end - i, 0);                                       \
                    _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK / L; k++)                                        \
                    {                                                                                                  \
                        if (logarithm) a[k] += AT(V, other, k * L);                                                    \
                        else a[k] += AT(V, line, k * L) * AT(V, other, k * L);                                         \
                    }                                                                                                  \
                }                                                                                                      \
                if (write) {                                                                                           \
                    row_take_part_##S(g + i, other, end - i, 0);                                                       \
                    row_take_part_##S(y + i, line, end - i, 0);                                                        \
                    if (logarithm) LINE(line);                                                                         \
                    _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK; k += L)                                         \
                    {                                                                                                  \
                        V gk = AT(V, other, k), own = AT(V, line, k);                                                  \
                        *(V *)(line + k) = logarithm ? gk - own * s : own * (gk - s);                                  \
                    }                                                                                                  \
                    row_put_part_##S(to + i - start, line, end - i);                                                   \
                }                                                                                                      \
                i = end;                                                                                               \
            }                                                                                                          \
            if (staged) row_pass(dx + start, stage, (end - start) * (int64_t)sizeof(T));                               \
            _Pragma("GCC unroll 4") for (int k = 1; k < CHUNK / L; k++) a[0] += a[k];                                  \
            total += (double)SUM(a[0]);                                                                                \
        }                                                                                                              \
        return (T)total;                                                                                               \
    }                                                                                                                  \
    static T softmax_bwd_step_##S(const T *y, const T *g, T s, T *dx, const T *yn, const T *gn, int64_t n,             \
                                  bool logarithm, bool stream, bool staged)                                            \
    {                                                                                                                  \
        if (logarithm && !dx) return backward_step_##S(y, g, s, dx, yn, gn, n, true, stream, false, true, false);      \
        if (logarithm && !gn) return backward_step_##S(y, g, s, dx, yn, gn, n, true, stream, true, false, staged);     \
        if (logarithm) return backward_step_##S(y, g, s, dx, yn, gn, n, true, stream, true, true, staged);             \
        if (!dx) return backward_step_##S(y, g, s, dx, yn, gn, n, false, stream, false, true, false);                  \
        if (!gn) return backward_step_##S(y, g, s, dx, yn, gn, n, false, stream, true, false, staged);                 \
        return backward_step_##S(y, g, s, dx, yn, gn, n, false, stream, true, true, staged);                           \
    }                                                                                                                  \
    static void softmax_bwd_row_##S(const T *y, const T *g, T *dx, int64_t n, bool logarithm, bool stream)             \
    {                                                                                                                  \
        T s = softmax_bwd_step_##S(NULL, NULL, 0, NULL, y, g, n, logarithm, false, false);                             \
        softmax_bwd_step_##S(y, g, s, dx, NULL, NULL, n, logarithm, stream, false);                                    \
    }
ROW_KERNELS(float, f, v_floats, row_sum_f, v_exp_term_line, INFINITY)
ROW_KERNELS(double, d, v_doubles, v_sum_d, exp_line_d, (double)INFINITY)
SOFTMAX_STEP(double, d, v_doubles, v_sum_d, exp_line_d, (double)INFINITY)
#if defined(__AVX2__) && !defined(__AVX512F__)
LAC_INLINE double softmax_step_f(const float *x, float m, float *work, const float *from, float shift, float scale,
                                 float *y, const float *next, float *top, int64_t n, bool logarithm, bool stream,
                                 bool staged)
{
    if (logarithm && stream)
        return row_step_f(x, m, NULL, from, shift, scale, y, next, top, n, false, true, true, true, false);
    if (logarithm) return row_step_f(x, m, NULL, from, shift, scale, y, next, top, n, false, true, true, false, staged);
    if (stream) return row_step_f(x, m, work, from, shift, scale, y, next, top, n, true, true, false, true, false);
    return row_step_f(x, m, work, from, shift, scale, y, next, top, n, true, true, false, false, staged);
}
#else
SOFTMAX_STEP(float, f, v_floats, row_sum_f, v_exp_term_line, INFINITY)
#endif

/* ---- rows ---- */

/* where the result of a row is computed: in place if it is an array of the compute type, else in the buffer */
static void *row_target(const softmax_job *job, char *out, void *buffer)
{
    return lac_is_native(job->dtype) && job->stride[0] == lac_bytes_of(job->dtype) ? out : buffer;
}

/* addresses of row t of each view; rows are asked for in order, the first one as such */
static void row_at(const softmax_job *job, lac_cursor *c, int64_t t, bool first, char **at)
{
    int last = job->nest.ndim - 1;
    int64_t length = job->nest.shape[last], i = t % length;
    if (first) LAC_CPU(cursor_set)(&job->nest, c, t / length);
    else if (i == 0) lac_cursor_next(&job->nest, c);
    for (int v = 0; v <= job->inputs; v++) at[v] = c->at[v] + i * job->nest.stride[v][last];
}

static bool row_streams(const softmax_job *job, const void *y)
{
    return job->stream && ((uintptr_t)y & (V_LINE - 1)) == 0;
}

/* Rows that need no conversion, three at a time: one is written, the next one's exponentials are computed, and of the
 * one after that the maximum is found. Arithmetic, reading and writing overlap, which in turn they do not. */
#define ROW_PIPELINE(T, S)                                                                                             \
    static void softmax_rows_##S(const softmax_job *job, int64_t begin, int64_t end, T *work)                          \
    {                                                                                                                  \
        const int64_t n = job->n, bytes = n * (int64_t)sizeof(T);                                                      \
        const bool logarithm = job->logarithm;                                                                         \
        lac_cursor c;                                                                                                  \
        char *at[3] = {0}; /* y and x */                                                                               \
        row_at(job, &c, begin, true, at);                                                                              \
        /* the row before, to be written to y; scalars, because an array that is moved up in wider pieces than were    \
         * stored waits for all stores, and those past the caches are slow */                                          \
        const T *before = (const T *)at[1], *x = before, *next = before;                                               \
        T *y = (T *)at[0], *y_x = y, *y_next = y;                                                                      \
        T m_before = row_max_##S(before, n), m = m_before, m_next = m_before;                                          \
        double sum = row_exp_##S(before, m_before, logarithm ? NULL : work, n);                                        \
        if (begin + 1 < end) {                                                                                         \
            row_at(job, &c, begin + 1, false, at);                                                                     \
            x = (const T *)at[1], y_x = (T *)at[0];                                                                    \
            m = row_max_##S(x, n);                                                                                     \
        }                                                                                                              \
        for (int64_t t = begin + 1; t < end; t++) {                                                                    \
            next = x;                                                                                                  \
            if (t + 1 < end) {                                                                                         \
                row_at(job, &c, t + 1, false, at);                                                                     \
                next = (const T *)at[1], y_next = (T *)at[0];                                                          \
            }                                                                                                          \
            if (logarithm)                                                                                             \
                sum = softmax_step_##S(x, m, NULL, before, m_before, (T)log(sum), y, next, &m_next, n, true,           \
                                       row_streams(job, y), row_staged(y, bytes, job->stream));                        \
            else                                                                                                       \
                sum = softmax_step_##S(x, m, work, work, 0, (T)(1.0 / sum), y, next, &m_next, n, false,                \
                                       row_streams(job, y), row_staged(y, bytes, job->stream));                        \
            before = x, x = next;                                                                                      \
            y = y_x, y_x = y_next;                                                                                     \
            m_before = m, m = m_next;                                                                                  \
        }                                                                                                              \
        softmax_write_##S(logarithm ? before : work, m_before, sum, y, n, logarithm, row_streams(job, y));             \
    }                                                                                                                  \
    /* Rows three of which with their terms are more than a second cache of 512 KB: the passes in turn, so that it     \
     * has but the row and its terms. Of rows of 50257 floats a Zen 3 took 8.8 ns a line so and 10.7 by three, but     \
     * of 32000 8.2 and 7.6; an AVX-512 Xeon with 2 MB 9.7 and 13.7. Rejected: the maximum of the next row after each  \
     * block that is written (9.2). */                                                                                 \
    static void softmax_wide_##S(const softmax_job *job, int64_t begin, int64_t end, T *work)                          \
    {                                                                                                                  \
        const int64_t n = job->n, bytes = n * (int64_t)sizeof(T);                                                      \
        const bool logarithm = job->logarithm;                                                                         \
        T stage[ROW_SUM];                                                                                              \
        lac_cursor c;                                                                                                  \
        char *at[3] = {0};                                                                                             \
        for (int64_t t = begin; t < end; t++) {                                                                        \
            row_at(job, &c, t, t == begin, at);                                                                        \
            const T *x = (const T *)at[1], *from = logarithm ? x : work;                                               \
            T *y = (T *)at[0];                                                                                         \
            const T m = row_max_##S(x, n);                                                                             \
            const double sum = row_exp_##S(x, m, logarithm ? NULL : work, n);                                          \
            if (!row_staged(y, bytes, job->stream)) {                                                                  \
                softmax_write_##S(from, m, sum, y, n, logarithm, row_streams(job, y));                                 \
                continue;                                                                                              \
            }                                                                                                          \
            for (int64_t i = 0; i < n; i += ROW_SUM) {                                                                 \
                int64_t count = n - i < ROW_SUM ? n - i : ROW_SUM;                                                     \
                softmax_write_##S(from + i, m, sum, stage, count, logarithm, false);                                   \
                row_pass(y + i, stage, count * (int64_t)sizeof(T));                                                    \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static void softmax_bwd_rows_##S(const softmax_job *job, int64_t begin, int64_t end)                               \
    {                                                                                                                  \
        const int64_t n = job->n, bytes = n * (int64_t)sizeof(T);                                                      \
        lac_cursor c;                                                                                                  \
        char *at[3] = {0}; /* dx, y and g */                                                                           \
        row_at(job, &c, begin, true, at);                                                                              \
        T *dx = (T *)at[0], *dx_next = dx;                                                                             \
        const T *y = (const T *)at[1], *g = (const T *)at[2], *y_next = y, *g_next = g;                                \
        T s = softmax_bwd_step_##S(NULL, NULL, 0, NULL, y, g, n, job->logarithm, false, false);                        \
        for (int64_t t = begin; t < end; t++) {                                                                        \
            if (t + 1 < end) {                                                                                         \
                row_at(job, &c, t + 1, false, at);                                                                     \
                dx_next = (T *)at[0], y_next = (const T *)at[1], g_next = (const T *)at[2];                            \
            }                                                                                                          \
            s = softmax_bwd_step_##S(y, g, s, dx, y_next, t + 1 < end ? g_next : NULL, n, job->logarithm,              \
                                     row_streams(job, dx), row_staged(dx, bytes, job->stream));                        \
            dx = dx_next, y = y_next, g = g_next;                                                                      \
        }                                                                                                              \
    }
ROW_PIPELINE(float, f)
ROW_PIPELINE(double, d)

static void softmax_task(void *context, int64_t begin, int64_t end, int thread)
{
    const softmax_job *job = context;
    char *space = job->workspace + job->space * thread;
    lac_cursor c;
    if (job->direct) space = row_beside((uintptr_t)job->nest.data[1], space);
    if (job->direct && job->inputs == 2 && job->ctype == C_F32) softmax_bwd_rows_f(job, begin, end);
    else if (job->direct && job->inputs == 2) softmax_bwd_rows_d(job, begin, end);
    else if (job->direct && job->row_bytes > WIDE && job->ctype == C_F32)
        softmax_wide_f(job, begin, end, (float *)space);
    else if (job->direct && job->row_bytes > WIDE) softmax_wide_d(job, begin, end, (double *)space);
    else if (job->direct && job->ctype == C_F32) softmax_rows_f(job, begin, end, (float *)space);
    else if (job->direct) softmax_rows_d(job, begin, end, (double *)space);
    for (int64_t t = begin; t < end && !job->direct; t++) {
        char *at[3] = {0};
        row_at(job, &c, t, t == begin, at);
        const void *x = LAC_CPU(load)(job->dtype, at[1], job->stride[1], job->n, space);
        void *y = row_target(job, at[0], space + 2 * job->row_bytes);
        if (job->inputs == 2) {
            const void *g = LAC_CPU(load)(job->dtype, at[2], job->stride[2], job->n, space + job->row_bytes);
            bool stream = y == at[0] && row_streams(job, y);
            if (job->ctype == C_F32) softmax_bwd_row_f(x, g, y, job->n, job->logarithm, stream);
            else softmax_bwd_row_d(x, g, y, job->n, job->logarithm, stream);
        } else {
            if (job->ctype == C_F32) softmax_row_f(x, y, job->n, job->logarithm);
            else softmax_row_d(x, y, job->n, job->logarithm);
        }
        if (y != at[0]) LAC_CPU(store)(job->dtype, y, at[0], job->stride[0], job->n);
    }
    if (job->stream) v_stream_end();
}

#include "softmax_columns.inc"

/* views[0] is the output; all have its shape */
static int softmax_run(const char *op, int inputs, const lac_view *const *views, int dim, bool logarithm)
{
    softmax_job job = {.dtype = views[0]->dtype, .inputs = inputs, .logarithm = logarithm};
    job.ctype = lac_compute_type(job.dtype);
    lac_view rest[3];
    const lac_view *list[3];
    int64_t numel = lac_view_numel(views[0]), size = (int64_t)lac_compute_size(job.ctype);
    if (numel == 0) return 0;
    for (int v = 0; v <= inputs; v++) {
        rest[v] = *views[v];
        list[v] = &rest[v];
        job.stride[v] = rest[v].stride[dim] * lac_bytes_of(job.dtype);
        rest[v].shape[dim] = 1;
    }
    job.n = views[0]->shape[dim];
    for (int v = 0; v <= inputs; v++)
        if (job.n == 1) job.stride[v] = lac_bytes_of(job.dtype);
    LAC_CPU(nest_make)(&job.nest, inputs + 1, list);
    bool columns = columns_fit(&job, numel / job.n);
    job.stream = lac_is_native(job.dtype) && numel * size >= LAC_STREAM_BYTES;
    job.direct = lac_is_native(job.dtype) && job.stride[0] == size && job.stride[1] == size &&
                 (inputs == 1 || job.stride[2] == size);
    job.row_bytes = (job.n * size + 63) / 64 * 64;
    int64_t rows = numel / job.n, work = numel * 4;
    int64_t tasks = columns ? rows / job.nest.shape[job.nest.ndim - 1] * job.blocks : rows;
    int64_t parts = columns && job.shared ? tasks * job.parts : 0, known = parts * job.width;
    job.space =
        columns ? (lac_is_native(job.dtype) ? 0 : 2 * SUM_ROWS * job.width * size) : 3 * job.row_bytes + ROW_PAGE;
    int64_t spaces = (job.space * LAC_CPU(threads)(parts ? parts : tasks, work) + 63) / 64 * 64;
    job.workspace = lac_workspace_get(op, (size_t)(spaces + known * (8 + size) + 64));
    if (!job.workspace) return LAC_E_MEMORY;
    job.totals = (double *)(void *)(job.workspace + spaces);
    job.tops = (char *)(job.totals + known);
    int status = parts ? parts_run(op, &job, tasks, work)
                       : LAC_CPU(parallel)(op, tasks, work, columns ? columns_task : softmax_task, &job);
    lac_workspace_put(job.workspace);
    return status;
}

int LAC_CPU(softmax)(const lac_a_softmax *a)
{
    const lac_view *views[] = {&a->out, &a->x};
    return softmax_run("softmax", 1, views, a->dim, a->logarithm);
}

int LAC_CPU(softmax_bwd)(const lac_a_softmax_bwd *a)
{
    const lac_view *views[] = {&a->out, &a->y, &a->g};
    return softmax_run("softmax_bwd", 2, views, a->dim, a->logarithm);
}
