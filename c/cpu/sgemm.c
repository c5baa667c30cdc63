/* sgemm.c: the product of a tall f32 matrix and a small one, as one thread computes a tile of it.
 *
 * OpenBLAS is built for large matrices: it packs both operands and clears C in a pass of its own. For the products of a
 * model's forward and of its input gradients (thousands of rows in place, inner size 128 to 512) that was a fifth of
 * their time. This kernel follows the same scheme (Goto and van de Geijn 2008): B is packed into panels of NR columns
 * that stay in the first-level cache, rows of A are taken MR at a time, and MR x NR sums live in registers. What it
 * leaves out is what costs: A is read in place and C is never cleared. In turns with OpenBLAS on one thread of a Zen
 * processor: 1.18 times as fast at 2048 x 128 x 128 with B transposed, 1.23 times with B in place.
 *
 * It is written in gcc's vector types, so one text serves AVX2 (6 x 16) and AVX-512 (12 x 32). Everything else is
 * BLAS's, because there it measured faster: few rows (0.66 times at 16), a transposed A as in weight gradients (0.87
 * times, its packing costs), and inner sizes that do not fit (0.85 times at 1024), as is the baseline build. The inner
 * size is cut into blocks of KC whose sums are added in order, whatever the number of threads.
 */
#include "cpu.h"
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, MR = 12 };
#else
enum { LANES = 8, MR = 6 };
#endif
enum { NR = 2 * LANES, KC = 256, NC = 512, MC = 16 * MR };

#if defined(__AVX2__)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* rows x NR sums of kc products into c; a(i, p) = a[i * rs + p], panel [kc][NR] */
#define MICRO(rows, a, rs, panel, kc, c, ldc, add)                                                                     \
    do {                                                                                                               \
        vec s[rows][2];                                                                                                \
        _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) s[i][0] = s[i][1] = (vec){0};                          \
        for (int64_t p = 0; p < kc; p++) {                                                                             \
            vec b0 = *(const vec *)(panel + p * NR), b1 = *(const vec *)(panel + p * NR + LANES);                      \
            _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++)                                                    \
            {                                                                                                          \
                float x = a[i * rs + p];                                                                               \
                s[i][0] += x * b0;                                                                                     \
                s[i][1] += x * b1;                                                                                     \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++)                                                        \
        {                                                                                                              \
            vec *to = (vec *)(c + i * ldc);                                                                            \
            vec *to1 = (vec *)(c + i * ldc + LANES);                                                                   \
            if (add) s[i][0] += *to, s[i][1] += *to1;                                                                  \
            *to = s[i][0];                                                                                             \
            *to1 = s[i][1];                                                                                            \
        }                                                                                                              \
    } while (0)

typedef struct {
    const float *a;
    int64_t rs; /* of a */
    const float *panel;
    int64_t kc;
    float *c;
    int64_t ldc;
    bool add;
} strip;

static void strip_rows(const strip *t)
{
    const float *a = t->a, *panel = t->panel;
    int64_t rs = t->rs, kc = t->kc, ldc = t->ldc;
    float *c = t->c;
    bool add = t->add;
    MICRO(MR, a, rs, panel, kc, c, ldc, add);
}

/* one row: what is left below the last full strip */
static void strip_one(const strip *t, int64_t row)
{
    const float *a = t->a + row * t->rs, *panel = t->panel;
    int64_t kc = t->kc;
    float *c = t->c + row * t->ldc;
    bool add = t->add;
    MICRO(1, a, 0, panel, kc, c, 0, add);
}

/* rows [0, m) of one panel of NR columns; `w` of them exist in C */
static void panel_rows(strip t, int64_t m, int64_t w)
{
    float buffer[MR * NR], *c = t.c;
    int64_t ldc = t.ldc;
    for (int64_t i = 0; i < m; i += MR, c += MR * ldc) {
        int64_t rows = m - i < MR ? m - i : MR;
        t.c = w == NR ? c : buffer;
        t.ldc = w == NR ? ldc : NR;
        if (w < NR && t.add)
            for (int64_t r = 0; r < rows; r++) memcpy(buffer + r * NR, c + r * ldc, (size_t)w * sizeof(float));
        if (rows == MR) strip_rows(&t);
        else
            for (int64_t r = 0; r < rows; r++) strip_one(&t, r);
        if (w < NR)
            for (int64_t r = 0; r < rows; r++) memcpy(c + r * ldc, buffer + r * NR, (size_t)w * sizeof(float));
        t.a += MR * t.rs;
    }
}

/* b(p, j) = b[p * rs + j * cs], kc x n, into panels [n / NR][kc][NR]; missing columns are zero */
static void pack_b(const float *b, int64_t rs, int64_t cs, int64_t kc, int64_t n, float *to)
{
    for (int64_t j = 0; j < n; j += NR, to += kc * NR) {
        int64_t w = n - j < NR ? n - j : NR;
        const float *from = b + j * cs;
        if (w < NR) memset(to, 0, (size_t)(kc * NR) * sizeof(float));
        if (cs == 1 && w == NR)
            for (int64_t p = 0; p < kc; p++) memcpy(to + p * NR, from + p * rs, NR * sizeof(float));
        else if (cs == 1)
            for (int64_t p = 0; p < kc; p++) memcpy(to + p * NR, from + p * rs, (size_t)w * sizeof(float));
        else
            for (int64_t i = 0; i < w; i++)
                for (int64_t p = 0; p < kc; p++) to[p * NR + i] = from[p * rs + i * cs];
    }
}

bool LAC_CPU(sgemm_takes)(int64_t m, int64_t n, int64_t k, bool rows)
{
    return rows && m >= 128 && n >= NR && k <= 2 * KC;
}

size_t LAC_CPU(sgemm_bytes)(void) { return (size_t)(KC * NC) * sizeof(float); }

void LAC_CPU(sgemm)(const lac_sgemm *g, float *space)
{
    float *panels = space;
    for (int64_t j = 0; j < g->n; j += NC) {
        int64_t n = g->n - j < NC ? g->n - j : NC;
        for (int64_t p = 0; p < g->k; p += KC) {
            int64_t kc = g->k - p < KC ? g->k - p : KC;
            bool add = g->accumulate || p > 0;
            pack_b(g->b + p * g->b_rs + j * g->b_cs, g->b_rs, g->b_cs, kc, n, panels);
            for (int64_t i = 0; i < g->m; i += MC) {
                int64_t m = g->m - i < MC ? g->m - i : MC;
                const float *a = g->a + i * g->a_rs + p;
                strip t = {.a = a, .rs = g->a_rs, .kc = kc, .ldc = g->ldc, .add = add};
                for (int64_t q = 0; q < n; q += NR) {
                    t.panel = panels + q * kc;
                    t.c = g->c + i * g->ldc + j + q;
                    panel_rows(t, m, n - q < NR ? n - q : NR);
                }
            }
        }
    }
}

#else

bool LAC_CPU(sgemm_takes)(int64_t m, int64_t n, int64_t k, bool rows)
{
    return (void)m, (void)n, (void)k, (void)rows, false;
}
size_t LAC_CPU(sgemm_bytes)(void) { return 0; }
void LAC_CPU(sgemm)(const lac_sgemm *g, float *space) { (void)g, (void)space; }

#endif
