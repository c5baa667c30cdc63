/* rows.h: what softmax and cross-entropy do with a row: its largest element, and the sum of its exponentials; and where
 * a row in working memory should be.
 *
 * The maximum has four chains that do not wait for each other, which a reduction that the compiler vectorises does not.
 * Sums are taken in the row's type over at most ROW_SUM elements and added up in double; while a line is computed, the
 * one n elements further on is asked for: that is the next row, or the next block of a long one.
 */
#ifndef LAC_CPU_ROWS_H
#define LAC_CPU_ROWS_H
#include "cpu.h"
#include "exps.h"

enum { ROW_SUM = 1024, ROW_PAGE = 4096 };

/* Where to put what is written while a row at x is read, in working memory with a page to spare: half a page beside it.
 * A processor takes a load for one of what it has just stored if their addresses differ by whole pages, and waits: with
 * working rows 64 to 192 bytes on from x, which chance decided, a Zen 4 took 12.6 to 16.3 cycles a line for softmax,
 * and 11.3 to 11.7 elsewhere. */
LAC_INLINE char *row_beside(uintptr_t x, char *space)
{
    return space + ((x + ROW_PAGE / 2 - (uintptr_t)space) & (ROW_PAGE - V_LINE));
}

#define ROW_FUNCTIONS(T, S, V, SUM, LINE, INF)                                                                         \
    LAC_INLINE T row_max_##S(const T *x, int64_t n)                                                                    \
    {                                                                                                                  \
        T a = -INF, b = -INF, c = -INF, d = -INF;                                                                      \
        int64_t q = n / 4;                                                                                             \
        _Pragma("omp simd reduction(max : a, b, c, d)") for (int64_t i = 0; i < q; i++)                                \
        {                                                                                                              \
            a = x[i] > a ? x[i] : a;                                                                                   \
            b = x[i + q] > b ? x[i + q] : b;                                                                           \
            c = x[i + 2 * q] > c ? x[i + 2 * q] : c;                                                                   \
            d = x[i + 3 * q] > d ? x[i + 3 * q] : d;                                                                   \
        }                                                                                                              \
        for (int64_t i = 4 * q; i < n; i++) a = x[i] > a ? x[i] : a;                                                   \
        a = b > a ? b : a;                                                                                             \
        c = d > c ? d : c;                                                                                             \
        return c > a ? c : a;                                                                                          \
    }                                                                                                                  \
    /* the sum of exp(x - m); y, which may be NULL, gets the terms */                                                  \
    LAC_INLINE double row_exp_##S(const T *x, T m, T *y, int64_t n)                                                    \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T), L = V_WIDTH / sizeof(T) };                                                  \
        double total = 0;                                                                                              \
        for (int64_t i = 0; i < n;) {                                                                                  \
            int64_t end = n - i < ROW_SUM ? n : i + ROW_SUM;                                                           \
            V s[CHUNK / L] = {{0}};                                                                                    \
            T rest = 0;                                                                                                \
            for (; i + CHUNK <= end; i += CHUNK) {                                                                     \
                T line[CHUNK];                                                                                         \
                __builtin_prefetch(x + n + i);                                                                         \
                _Pragma("omp simd") for (int k = 0; k < CHUNK; k++) line[k] = x[i + k] - m;                            \
                LINE(line);                                                                                            \
                if (y) v_put_line(y + i, line, false);                                                                 \
                _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK / L; k++) s[k] += *(const V *)(line + k * L);        \
            }                                                                                                          \
            if (i < end) {                                                                                             \
                T line[CHUNK];                                                                                         \
                for (int k = 0; k < CHUNK; k++) line[k] = i + k < end ? x[i + k] - m : -INF;                           \
                LINE(line);                                                                                            \
                for (; i < end; i++) {                                                                                 \
                    T e = line[i % CHUNK];                                                                             \
                    if (y) y[i] = e;                                                                                   \
                    rest += e;                                                                                         \
                }                                                                                                      \
            }                                                                                                          \
            _Pragma("GCC unroll 4") for (int k = 1; k < CHUNK / L; k++) s[0] += s[k];                                  \
            total += (double)(SUM(s[0]) + rest);                                                                       \
        }                                                                                                              \
        return total;                                                                                                  \
    }
LAC_INLINE void exp_line_d(double *line)
{
    for (int k = 0; k < V_LINE / 8; k++) line[k] = exp(line[k]);
}
ROW_FUNCTIONS(float, f, v_floats, v_sum_f, v_exp_term_line, INFINITY)
ROW_FUNCTIONS(double, d, v_doubles, v_sum_d, exp_line_d, (double)INFINITY)
#undef ROW_FUNCTIONS

#endif
