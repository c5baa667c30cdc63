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

/* ROW_AHEAD, ROW_NEAR: bytes to what is fetched; ROW_LONG: of a row that is staged; ROW_SHORT: of
 * one of whole vectors */
enum { ROW_SUM = 1024, ROW_PAGE = 4096, ROW_AHEAD = 12288, ROW_NEAR = 1024, ROW_LONG = 1024, ROW_SHORT = 768 };

/* Where to put what is written while a row at x is read, in working memory with a page to spare: half a page beside it.
 * A processor takes a load for one of what it has just stored if their addresses differ by whole pages, and waits: with
 * working rows 64 to 192 bytes on from x, which chance decided, a Zen 4 took 12.6 to 16.3 cycles a line for softmax,
 * and 11.3 to 11.7 elsewhere. */
LAC_INLINE char *row_beside(uintptr_t x, char *space)
{
    return space + ((x + ROW_PAGE / 2 - (uintptr_t)space) & (ROW_PAGE - V_LINE));
}

/* For loops that read two arrays beside what they are at. A Zen 3 that is asked for both 12 KB ahead, into the second
 * cache, takes 7.2 to 7.4 ns for a line of layernorm's backward, even of what is in the first cache already 5.9; asked
 * for 1 KB ahead, into the first, 6.4 and 4.1, and not asked 7.5 and 4.0. */
LAC_INLINE bool row_asks_near(void) { return V_WIDTH == 32 && !v_asks(); }
LAC_INLINE void row_ask(const void *x, bool near)
{
    if (near) __builtin_prefetch((const char *)x + ROW_NEAR, 0, 3);
    else __builtin_prefetch((const char *)x + ROW_AHEAD, 0, 2);
}

/* Results past the caches go there by whole lines. A row that begins elsewhere puts a block of at most ROW_SUM of them
 * into the first cache and row_pass takes them on from there; the ends of a block share their lines with others and are
 * written as usual. Sums are taken in the same places of a row, so that no bit depends on its address. Shorter rows
 * lose by it: of 77 floats softmax's backward took 14.9 ns a line instead of 10.5, and of 250, whose vectors lie across
 * lines, softmax 9.3 instead of 7.9 (but of 200 7.1 instead of 10.5). ROW_SHORT was measured with AVX2 only. */
LAC_INLINE bool row_staged(const void *y, int64_t bytes, bool stream)
{
    return V_WIDTH >= 32 && stream && ((uintptr_t)y & (V_LINE - 1)) != 0 &&
           bytes >= (V_WIDTH == 32 && bytes % V_WIDTH == 0 ? ROW_SHORT : ROW_LONG);
}
LAC_INLINE void row_pass(void *y, const void *from, int64_t bytes)
{
    const int64_t to_line = (int64_t)(-(uintptr_t)y & (V_LINE - 1)), head = to_line < bytes ? to_line : bytes;
    const int64_t whole = (bytes - head) / V_LINE * V_LINE;
    char *to = y;
    const char *x = from;
    memcpy(to, x, (size_t)head);
    for (int64_t i = head; i < head + whole; i += V_LINE) v_put_line(to + i, x + i, true);
    memcpy(to + head + whole, x + head + whole, (size_t)(bytes - head - whole));
}

/* The end of a row, fewer elements than a line has: into a line, filled up with `rest`, and back. With AVX-512 by
 * masks; elsewhere in pieces that halve, because a masked store takes a Zen 3 12 cycles. One element at a time takes
 * more than the line before it: of rows of 77 on a Xeon, with sums taken so, more than all whole lines. */
#if defined(__AVX512F__)
LAC_INLINE __mmask16 row_mask(int64_t count) { return (__mmask16)((1u << count) - 1); }
LAC_INLINE void row_take_part_f(const float *x, float *line, int64_t count, float rest)
{
    _mm512_storeu_ps(line, _mm512_mask_loadu_ps(_mm512_set1_ps(rest), row_mask(count), x));
}
LAC_INLINE void row_take_part_d(const double *x, double *line, int64_t count, double rest)
{
    _mm512_storeu_pd(line, _mm512_mask_loadu_pd(_mm512_set1_pd(rest), (__mmask8)row_mask(count), x));
}
LAC_INLINE void row_put_part_f(float *y, const float *line, int64_t count)
{
    _mm512_mask_storeu_ps(y, row_mask(count), _mm512_loadu_ps(line));
}
LAC_INLINE void row_put_part_d(double *y, const double *line, int64_t count)
{
    _mm512_mask_storeu_pd(y, (__mmask8)row_mask(count), _mm512_loadu_pd(line));
}
#else
#define ROW_PART(T, S)                                                                                                 \
    LAC_INLINE void row_put_part_##S(T *y, const T *line, int64_t count)                                               \
    {                                                                                                                  \
        int64_t i = 0;                                                                                                 \
        _Pragma("GCC unroll 4") for (int64_t w = V_LINE / (int64_t)sizeof(T) / 2; w > 0; w /= 2)                       \
        {                                                                                                              \
            if (!(count & w)) continue;                                                                                \
            memcpy(y + i, line + i, (size_t)w * sizeof(T));                                                            \
            i += w;                                                                                                    \
        }                                                                                                              \
    }
ROW_PART(float, f)
ROW_PART(double, d)
#undef ROW_PART
LAC_INLINE void row_take_part_d(const double *x, double *line, int64_t count, double rest)
{
    for (int k = 0; k < V_LINE / 8; k++) line[k] = k < count ? x[k] : rest;
}
#ifdef __AVX2__
LAC_INLINE void row_take_part_f(const float *x, float *line, int64_t count, float rest)
{
    const __m256i n = _mm256_set1_epi32((int)count), at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
#pragma GCC unroll 2
    for (int k = 0; k < V_LINE / 4; k += 8) {
        const __m256i has = _mm256_cmpgt_epi32(n, _mm256_add_epi32(at, _mm256_set1_epi32(k)));
        const __m256 v = _mm256_maskload_ps(x + k, has);
        _mm256_storeu_ps(line + k, _mm256_blendv_ps(_mm256_set1_ps(rest), v, _mm256_castsi256_ps(has)));
    }
}
#else
LAC_INLINE void row_take_part_f(const float *x, float *line, int64_t count, float rest)
{
    for (int k = 0; k < V_LINE / 4; k++) line[k] = k < count ? x[k] : rest;
}
#endif
#endif

/* v_sum_f, and the largest of a line that holds no NaN, by halves in registers: gcc takes their elements one by one,
 * which counts in rows of a few lines. */
#ifdef __AVX__
LAC_INLINE float row_sum_f(v_floats v)
{
#ifdef __AVX512F__
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    __m256 h = (__m256)v;
#endif
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
LAC_INLINE float row_top_f(const float *line)
{
    __m256 h = _mm256_max_ps(_mm256_loadu_ps(line + 8), _mm256_loadu_ps(line));
    __m128 q = _mm_max_ps(_mm256_extractf128_ps(h, 1), _mm256_castps256_ps128(h));
    q = _mm_max_ps(_mm_movehl_ps(q, q), q);
    return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(q), q));
}
#else
LAC_INLINE float row_sum_f(v_floats v) { return v_sum_f(v); }
LAC_INLINE float row_top_f(const float *line)
{
    float top = line[0];
    for (int k = 1; k < V_LINE / 4; k++) top = line[k] > top ? line[k] : top;
    return top;
}
#endif
LAC_INLINE double row_top_d(const double *line)
{
    double top = line[0];
    for (int k = 1; k < V_LINE / 8; k++) top = line[k] > top ? line[k] : top;
    return top;
}

#define ROW_MAX(T, S, INF)                                                                                             \
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
    }

#define ROW_EXP(T, S, V, SUM, LINE, INF)                                                                               \
    /* the sum of exp(x - m); y, which may be NULL, gets the terms */                                                  \
    LAC_INLINE double row_exp_##S(const T *x, T m, T *y, int64_t n)                                                    \
    {                                                                                                                  \
        enum { CHUNK = V_LINE / sizeof(T), L = V_WIDTH / sizeof(T) };                                                  \
        double total = 0;                                                                                              \
        for (int64_t i = 0; i < n;) {                                                                                  \
            int64_t end = n - i < ROW_SUM ? n : i + ROW_SUM;                                                           \
            V s[CHUNK / L] = {{0}};                                                                                    \
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
                row_take_part_##S(x + i, line, end - i, -INF);                                                         \
                _Pragma("omp simd") for (int k = 0; k < CHUNK; k++) line[k] -= m;                                      \
                LINE(line);                                                                                            \
                _Pragma("GCC unroll 4") for (int k = 0; k < CHUNK / L; k++) s[k] += *(const V *)(line + k * L);        \
                if (y) row_put_part_##S(y + i, line, end - i);                                                         \
                i = end;                                                                                               \
            }                                                                                                          \
            _Pragma("GCC unroll 4") for (int k = 1; k < CHUNK / L; k++) s[0] += s[k];                                  \
            total += (double)SUM(s[0]);                                                                                \
        }                                                                                                              \
        return total;                                                                                                  \
    }
LAC_INLINE void exp_line_d(double *line)
{
    for (int k = 0; k < V_LINE / 8; k++) line[k] = exp(line[k]);
}
ROW_MAX(float, f, INFINITY)
ROW_MAX(double, d, (double)INFINITY)
ROW_EXP(double, d, v_doubles, v_sum_d, exp_line_d, (double)INFINITY)
#undef ROW_MAX

#if defined(__AVX2__) && !defined(__AVX512F__)
/* The term 2^24 e^(x - m) of a sum whose largest is 2^24, in two halves, so that a loop can begin one line before it
 * ends another: the whole is a chain of 45 cycles, and steps that wait fill the processor's schedulers. v8_power makes
 * 0 of the bound, -151 ln2, and nothing good of what is within ln2 of it: times 2^-24 that is less than half of the
 * smallest float, where without the factor two more steps would have to send it to 0. */
#define ROW_MAGIC (V8_MAGIC + 24.0f)
LAC_INLINE void row_term_begin(const float *x, __m256 m, __m256 *t, __m256 *r)
{
    __m256 d = v8_at_least(-104.6653f, _mm256_sub_ps(_mm256_loadu_ps(x), m));
    *t = _mm256_fmadd_ps(d, v8_set(1.44269504f), v8_set(ROW_MAGIC));
    *r = _mm256_fnmadd_ps(_mm256_sub_ps(*t, v8_set(ROW_MAGIC)), v8_set(0.693147182f), d); /* as v_minus_ln2_loose */
}
LAC_INLINE __m256 row_term_end(__m256 t, __m256 r)
{
    __m256 p;
    v8_expm1_poly(&r, &p, 1);
    const __m256 power = v8_power(t);
    return _mm256_fmadd_ps(power, p, power);
}
/* y = f scale, or its logarithm's form (f - shift) - scale */
LAC_INLINE __m256 row_result(const float *f, __m256 shift, __m256 scale, bool logarithm)
{
    __m256 v = _mm256_loadu_ps(f);
    return logarithm ? _mm256_sub_ps(_mm256_sub_ps(v, shift), scale) : _mm256_mul_ps(v, scale);
}
LAC_INLINE __m256 row_larger(const float *x, __m256 most)
{
    return _mm256_max_ps(_mm256_max_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)), most);
}
LAC_INLINE float row_largest(__m256 most)
{
    __m128 a = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}
/* The sum of exp(x - m); if `keep`, 2^24 times that, of as large terms, which go to `terms`. `three`: also what
 * softmax_step_f (softmax.c) does with two other rows. One vector for the maximum and one for the sum, because the loop
 * needs all registers: with a second pair, which was kept in memory, it took half as long again on a Zen 3. The
 * switches must be constants for the same reason: tests of them in the loop took a tenth of its time. */
LAC_INLINE double row_step_f(const float *x, float m, float *terms, const float *from, float shift, float scale,
                             float *y, const float *next, float *top, int64_t n, bool keep, bool three, bool logarithm,
                             bool stream, bool staged)
{
    enum { LINE = V_LINE / 4 };
    float stage[ROW_SUM];
    const __m256 vm = v8_set(m), vshift = v8_set(shift), vscale = v8_set(scale);
    __m256 most = v8_set(-INFINITY), t[2] = {vm, vm}, r[2] = {vm, vm};
    double total = 0;
    if (n >= LINE) row_term_begin(x, vm, t, r), row_term_begin(x + 8, vm, t + 1, r + 1);
    for (int64_t i = 0; i < n;) {
        int64_t start = i, end = n - i < ROW_SUM ? n : i + ROW_SUM;
        float *to = three && staged ? stage : y + start;
        __m256 s = _mm256_setzero_ps();
        for (; i + LINE <= end; i += LINE) {
            const float *after = x + (i + 2 * LINE <= n ? i + LINE : i);
            __builtin_prefetch((const char *)((three ? next : x) + i) + ROW_AHEAD, 0, 2);
            if (three) most = row_larger(next + i, most);
            __m256 low = row_term_end(t[0], r[0]), high = row_term_end(t[1], r[1]), f = vscale, g = vscale;
            if (three) {
                f = row_result(from + i, vshift, vscale, logarithm);
                g = row_result(from + i + 8, vshift, vscale, logarithm);
            }
            row_term_begin(after, vm, t, r);
            row_term_begin(after + 8, vm, t + 1, r + 1);
            s = _mm256_add_ps(s, _mm256_add_ps(low, high));
            if (keep) _mm256_storeu_ps(terms + i, low), _mm256_storeu_ps(terms + i + 8, high);
            if (three && stream) _mm256_stream_ps(to + i - start, f), _mm256_stream_ps(to + i - start + 8, g);
            else if (three) _mm256_storeu_ps(to + i - start, f), _mm256_storeu_ps(to + i - start + 8, g);
        }
        if (i < end) {
            float part[LINE], own[LINE];
            row_take_part_f(x + i, part, end - i, -INFINITY);
            row_term_begin(part, vm, t, r), row_term_begin(part + 8, vm, t + 1, r + 1);
            const __m256 low = row_term_end(t[0], r[0]), high = row_term_end(t[1], r[1]);
            s = _mm256_add_ps(s, _mm256_add_ps(low, high));
            if (three) {
                row_take_part_f(from + i, own, end - i, 0);
                _mm256_storeu_ps(part, row_result(own, vshift, vscale, logarithm));
                _mm256_storeu_ps(part + 8, row_result(own + 8, vshift, vscale, logarithm));
                row_put_part_f(to + i - start, part, end - i);
                row_take_part_f(next + i, own, end - i, -INFINITY);
                most = row_larger(own, most);
            }
            _mm256_storeu_ps(part, low), _mm256_storeu_ps(part + 8, high);
            if (keep) row_put_part_f(terms + i, part, end - i);
            i = end;
        }
        if (three && staged) row_pass(y + start, stage, (end - start) * 4);
        total += (double)row_sum_f((v_floats)s);
    }
    if (three) *top = row_largest(most);
    return keep ? total : total * 0x1p-24;
}
LAC_INLINE double row_exp_f(const float *x, float m, float *y, int64_t n)
{
    if (y) return row_step_f(x, m, y, NULL, 0, 0, NULL, NULL, NULL, n, true, false, false, false, false);
    return row_step_f(x, m, NULL, NULL, 0, 0, NULL, NULL, NULL, n, false, false, false, false, false);
}
#else
ROW_EXP(float, f, v_floats, row_sum_f, v_exp_term_line, INFINITY)
#endif
#undef ROW_EXP

#endif
