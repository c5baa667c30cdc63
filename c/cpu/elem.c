/* elem.c: elementwise operators on the CPU.
 *
 * c/maps.def is included once per compute type and turns every line into a kernel over a strip of a row. A kernel goes
 * tile by tile: 64 elements of each input are used in place if they are a contiguous array of the compute type, else
 * converted or gathered into a buffer that never leaves the first-level cache; the results are stored in place, or
 * converted, or written past the caches. A strip of which every array is used in place is one tile. Dense f16 and bf16
 * are converted on their way between memory and registers, a chunk at a time, in loops of their own. Loading,
 * arithmetic and storing of one tile are close enough for the processor to overlap them. So there are about 400 kernels
 * instead of 400 x dtypes x strides, a broadcast or a scalar is one tile that is used again, and contiguous f32 data
 * costs no copy at all. Gradients towards both arguments of a binary function come from one kernel with two outputs:
 * five arrays move instead of eight. What models call on whole activations is computed by lines where tables in
 * registers do it in fewer steps (exps.h, activations.h); of f16 and bf16, the commonest have lines and kernels of
 * their own (halves.h).
 * Strips and tiles start at fixed places, so the vector and the remainder code see the same elements whatever the
 * number of threads. What a kernel reads is read off the text of its expression, so that a line of maps.def needs no
 * more than the mathematics.
 * Rejected: one specialised loop per combination of strides and dtypes (code size), computing f16 in f16 (accuracy),
 * whole strips of 1024 elements converted, computed and stored in turn (the phases did not overlap: up to 1.5 times
 * the time).
 */
#include "activations.h"
#include "halves.h"
#include "halves_tables.h"
#include "maps.h"
#include <string.h>

/* elements of a tile, of a strip, of one whose outputs are larger than the caches; bytes */
enum { TILE = 512, STRIP = 4096, LONG_STRIP = 16384, AHEAD = 2048 };

/* Where results stream, kernels ask for what they are going to read: with AVX-512 twice, early into the second cache
 * and late into the first. A Xeon needs both (experiments/benchmarks/elementwise.lua has the numbers). */
#ifdef __AVX512F__
enum { EARLY = 512 };
LAC_INLINE void ask_ahead(const char *x, int64_t early)
{
    __builtin_prefetch(x + 8 * early, 0, 2);
    __builtin_prefetch(x + early, 0, 3);
}
#else
enum { EARLY = AHEAD };
LAC_INLINE void ask_ahead(const char *x, int64_t early) { __builtin_prefetch(x + early, 0, 2); }
#endif

/* an input of one strip */
typedef struct {
    const char *x;
    int64_t stride; /* bytes between elements; 0 with direct: one tile serves all */
    int dtype;
    int half;      /* dense f16 (1) or bf16 (2): converted chunk by chunk in registers */
    bool direct;   /* an array of the compute type */
    bool repeated; /* one tile, for all elements */
    bool ahead;    /* dense, to be converted and beyond the caches: fetch early */
    int64_t early; /* how many bytes ahead kernels ask for it where results stream */
} elem_in;
typedef struct {
    char *x;
    int64_t stride;
    int dtype;
    int half;    /* as of an input */
    bool direct; /* an array of what the kernel makes */
    bool stream; /* write past the caches; x is then at the start of a cache line */
    bool raw;    /* the kernel makes the output's dtype itself (bool) */
} elem_out;
typedef void lac_kernel(int64_t n, const elem_in *in, const elem_out *to, const void *constants);

/* ---- tiles ---- */

/* elements [at, at + m) of an input in the compute type, in `space` if they have to be converted or gathered, or are
 * fewer than a chunk, the unit of the kernels' loops; *half: as they are, and what they are */
LAC_INLINE const void *tile_in(const elem_in *in, int64_t at, int64_t m, void *space, int64_t chunk, int *half)
{
    const char *x = in->x + at * in->stride;
    *half = m >= chunk ? in->half : 0;
    if (*half) return x;
    if (in->direct && (m >= chunk || in->stride == 0)) return x;
    if (in->ahead) v_prefetch(x + AHEAD, m * in->stride);
    if (m < chunk) memset(space, 0, V_LINE);
    if (!in->direct) return LAC_CPU(load)(in->dtype, x, in->stride, m, space);
    return memcpy(space, x, (size_t)(m * in->stride));
}

static __attribute__((noinline)) void tile_out(const elem_out *to, int64_t at, int64_t m, const void *result)
{
    double packed[TILE / 2]; /* four bytes at most: what has eight is native */
    char *x = to->x + at * to->stride;
    if (to->stream && !to->raw && !to->direct) {
        LAC_CPU(store)(to->dtype, result, packed, to->stride, m);
        result = packed;
    }
    if (to->stream) v_stream(x, result, (size_t)(m * to->stride));
    else if (to->raw) LAC_CPU(move)(1, x, to->stride, result, 1, m);
    else LAC_CPU(store)(to->dtype, result, x, to->stride, m);
}

/* ---- kernels ---- */

/* A strip is cut into tiles, a tile into chunks of one cache line of the compute type; what is left at the end of a row
 * is a tile of less than a chunk, computed as a whole one. So there is one loop, of fixed length, for the compiler to
 * turn into straight vector code. */
#define CHUNK (V_LINE / (int64_t)sizeof(T))
#define TILES(most) for (int64_t at_ = 0, m_; m_ = tile_size(n - at_, CHUNK, most), m_ > 0; at_ += m_)
#define MOST(inputs, outputs) const int64_t most_ = tile_of(n, CHUNK, in, inputs, to, outputs)
#define CHUNKS for (int64_t i = 0; i < m_; i += CHUNK)
#define LANES _Pragma("omp simd") for (int k = 0; k < CHUNK; k++)
/* Loops are compiled once for each way in which all arrays of a tile are stored: in the compute type (0), as f16 (1) or
 * as bf16 (2). Where the ways differ (MIXED), every chunk asks; those jumps cost more than the arithmetic of a relu. */
enum { MIXED = 3 };
#define HALVES (V_HALVES && sizeof(T) == sizeof(float))
#define HALF(own) (!HALVES ? 0 : kind_ == MIXED ? (own) : kind_)
#define IN(k)                                                                                                          \
    int half##k;                                                                                                       \
    const char *from##k = tile_in(&in[k], at_, m_, space_[k], CHUNK, &half##k);                                        \
    const int64_t early##k = in[k].early;                                                                              \
    (void)early##k
#define SIZE(k) (HALF(half##k) ? 2 : (int64_t)sizeof(T))
/* chunk i of an input as an array in##k, which never is in memory */
#define TAKE(k)                                                                                                        \
    T in##k[CHUNK];                                                                                                    \
    if (sizeof(T) == sizeof(float)) v_take(HALF(half##k), from##k + i * SIZE(k), (float *)in##k);                      \
    else v_take_line(from##k + i * SIZE(k), in##k)
#define TAKE1 TAKE(0)
#define TAKE2                                                                                                          \
    TAKE1;                                                                                                             \
    TAKE(1)
#define TAKE3                                                                                                          \
    TAKE2;                                                                                                             \
    TAKE(2)
#define TAKE4                                                                                                          \
    TAKE3;                                                                                                             \
    TAKE(3)
#define IN1 IN(0)
#define IN2                                                                                                            \
    IN1;                                                                                                               \
    IN(1)
#define IN3                                                                                                            \
    IN2;                                                                                                               \
    IN(2)
#define IN4                                                                                                            \
    IN3;                                                                                                               \
    IN(3)
#define AHEAD1 ask_ahead(from0 + i * SIZE(0), early0)
#define AHEAD2                                                                                                         \
    AHEAD1;                                                                                                            \
    ask_ahead(from1 + i * SIZE(1), early1)
#define AHEAD3                                                                                                         \
    AHEAD2;                                                                                                            \
    ask_ahead(from2 + i * SIZE(2), early2)
#define AHEAD4                                                                                                         \
    AHEAD3;                                                                                                            \
    ask_ahead(from3 + i * SIZE(3), early3)
#define OUT(k)                                                                                                         \
    T result##k[TILE];                                                                                                 \
    const int into##k = HALVES && m_ >= CHUNK ? to[k].half : 0;                                                        \
    const bool whole##k = to[k].direct && m_ >= CHUNK, past##k = (whole##k || into##k) && to[k].stream;                \
    T *out##k = whole##k ? (T *)to[k].x + at_ : result##k
#define PUT_LINE(k, line)                                                                                              \
    if (HALF(into##k)) v_put_half(HALF(into##k), to[k].x + (at_ + i) * 2, (const float *)(line), past##k);             \
    else v_put_line(out##k + i, line, past##k)
#define PUT(k)                                                                                                         \
    if (!whole##k && !into##k) tile_out(&to[k], at_, m_, result##k)
/* the way of all `count` inputs and of `own`, or MIXED */
#define SAME1(own) (half0 == (own) ? (own) : MIXED)
#define SAME2(own) (half1 == (own) ? SAME1(own) : MIXED)
#define SAME3(own) (half2 == (own) ? SAME2(own) : MIXED)
#define SAME4(own) (half3 == (own) ? SAME3(own) : MIXED)
/* LOOP(kind, ...) for the kind at hand; an analyser reads the general one, which has all the others' text */
#ifdef __clang_analyzer__
#define KINDS(kind, LOOP, ...) LOOP(MIXED, __VA_ARGS__)
#else
#define KINDS(kind, LOOP, ...)                                                                                         \
    if (!HALVES || (kind) == 0) LOOP(0, __VA_ARGS__)                                                                   \
    else if ((kind) == 1) LOOP(1, __VA_ARGS__)                                                                         \
    else if ((kind) == 2) LOOP(2, __VA_ARGS__)                                                                         \
    else LOOP(MIXED, __VA_ARGS__)
#endif

/* the most elements of a tile: all that fill chunks where every array is used in place */
static inline int64_t tile_of(int64_t n, int64_t chunk, const elem_in *in, int inputs, const elem_out *to, int outputs)
{
    bool in_place = n > TILE;
    for (int k = 0; k < inputs; k++) in_place = in_place && !in[k].repeated && (in[k].direct || in[k].half);
    for (int k = 0; k < outputs; k++) in_place = in_place && (to[k].direct || to[k].half);
    return in_place ? n - n % chunk : TILE;
}
static inline int64_t tile_size(int64_t left, int64_t chunk, int64_t tile)
{
    return left >= tile ? tile : left >= chunk ? left - left % chunk : left;
}

/* `...`: the declaration of x, y, ..., which has commas */
#define LOOP_IN(kind, count, expression, ...)                                                                          \
    {                                                                                                                  \
        const int kind_ = kind;                                                                                        \
        CHUNKS                                                                                                         \
        {                                                                                                              \
            T line[CHUNK];                                                                                             \
            if (past0) {                                                                                               \
                AHEAD##count;                                                                                          \
            }                                                                                                          \
            TAKE##count;                                                                                               \
            LANES                                                                                                      \
            {                                                                                                          \
                __VA_ARGS__;                                                                                           \
                line[k] = (expression);                                                                                \
            }                                                                                                          \
            PUT_LINE(0, line);                                                                                         \
        }                                                                                                              \
    }
#define KERNEL_IN(name, count, before, expression, ...)                                                                \
    static void name(int64_t n, const elem_in *in, const elem_out *to, const void *constants_)                         \
    {                                                                                                                  \
        T space_[count][TILE];                                                                                         \
        before;                                                                                                        \
        MOST(count, 1);                                                                                                \
        TILES(most_)                                                                                                   \
        {                                                                                                              \
            IN##count;                                                                                                 \
            OUT(0);                                                                                                    \
            KINDS(SAME##count(into0), LOOP_IN, count, expression, __VA_ARGS__)                                         \
            PUT(0);                                                                                                    \
        }                                                                                                              \
    }
/* `near` for all elements, and then `whole` for those that are far, if there are any in a chunk */
#define LOOP_FAR(kind, count, near, is_far, whole, ...)                                                                \
    {                                                                                                                  \
        const int kind_ = kind;                                                                                        \
        CHUNKS                                                                                                         \
        {                                                                                                              \
            T line[CHUNK];                                                                                             \
            int far = 0;                                                                                               \
            if (past0) {                                                                                               \
                AHEAD##count;                                                                                          \
            }                                                                                                          \
            TAKE##count;                                                                                               \
            _Pragma("omp simd reduction(| : far)") for (int k = 0; k < CHUNK; k++)                                     \
            {                                                                                                          \
                __VA_ARGS__;                                                                                           \
                line[k] = (near);                                                                                      \
                far |= (is_far);                                                                                       \
            }                                                                                                          \
            if (far) LANES                                                                                             \
                {                                                                                                      \
                    __VA_ARGS__;                                                                                       \
                    T near_ = line[k];                                                                                 \
                    line[k] = (is_far) ? (whole) : near_;                                                              \
                }                                                                                                      \
            PUT_LINE(0, line);                                                                                         \
        }                                                                                                              \
    }
#define KERNEL_FAR(name, count, declare, near, is_far, whole)                                                          \
    static void name(int64_t n, const elem_in *in, const elem_out *to, const void *constants_)                         \
    {                                                                                                                  \
        T space_[count][TILE];                                                                                         \
        (void)constants_;                                                                                              \
        MOST(count, 1);                                                                                                \
        TILES(most_)                                                                                                   \
        {                                                                                                              \
            IN##count;                                                                                                 \
            OUT(0);                                                                                                    \
            KINDS(SAME##count(into0), LOOP_FAR, count, near, is_far, whole, declare)                                   \
            PUT(0);                                                                                                    \
        }                                                                                                              \
    }
#define KERNEL(name, count, declare, expression) KERNEL_IN(name, count, (void)constants_, expression, declare)
/* constants p, q, r before the loop */
#define KERNEL_P(name, count, declare, expression) KERNEL_IN(name, count, PQR, expression, declare)
#define PQR                                                                                                            \
    const T *c_ = constants_;                                                                                          \
    const T p = c_[0];                                                                                                 \
    const T q = c_[1];                                                                                                 \
    const T r = c_[2];                                                                                                 \
    (void)p;                                                                                                           \
    (void)q;                                                                                                           \
    (void)r
/* truth values; both gradients of a function of two arguments */
#define LOOP_BOOL(kind, count, expression, ...)                                                                        \
    {                                                                                                                  \
        const int kind_ = kind;                                                                                        \
        CHUNKS                                                                                                         \
        {                                                                                                              \
            TAKE##count;                                                                                               \
            LANES                                                                                                      \
            {                                                                                                          \
                __VA_ARGS__;                                                                                           \
                out[i + k] = (expression);                                                                             \
            }                                                                                                          \
        }                                                                                                              \
    }
#define KERNEL_BOOL(name, count, declare, expression)                                                                  \
    static void name(int64_t n, const elem_in *in, const elem_out *to, const void *constants_)                         \
    {                                                                                                                  \
        T space_[count][TILE];                                                                                         \
        (void)constants_;                                                                                              \
        TILES(TILE)                                                                                                    \
        {                                                                                                              \
            IN##count;                                                                                                 \
            uint8_t truth[TILE], *out = to->direct && !to->stream && m_ >= CHUNK ? (uint8_t *)to->x + at_ : truth;     \
            if (!HALVES || SAME##count(0) == 0) LOOP_BOOL(0, count, expression, declare)                               \
            else LOOP_BOOL(MIXED, count, expression, declare)                                                          \
            if (out == truth) tile_out(to, at_, m_, truth);                                                            \
        }                                                                                                              \
    }
#define LOOP_BOTH(kind, first, second)                                                                                 \
    {                                                                                                                  \
        const int kind_ = kind;                                                                                        \
        CHUNKS                                                                                                         \
        {                                                                                                              \
            T line0[CHUNK], line1[CHUNK];                                                                              \
            if (past0) {                                                                                               \
                AHEAD3;                                                                                                \
            }                                                                                                          \
            TAKE3;                                                                                                     \
            LANES                                                                                                      \
            {                                                                                                          \
                X3;                                                                                                    \
                (void)x, (void)y;                                                                                      \
                line0[k] = g * (first);                                                                                \
                line1[k] = g * (second);                                                                               \
            }                                                                                                          \
            PUT_LINE(0, line0);                                                                                        \
            PUT_LINE(1, line1);                                                                                        \
        }                                                                                                              \
    }
#define KERNEL_BOTH(name, first, second)                                                                               \
    static void name(int64_t n, const elem_in *in, const elem_out *to, const void *constants_)                         \
    {                                                                                                                  \
        T space_[3][TILE];                                                                                             \
        (void)constants_;                                                                                              \
        MOST(3, 2);                                                                                                    \
        TILES(most_)                                                                                                   \
        {                                                                                                              \
            IN3;                                                                                                       \
            OUT(0);                                                                                                    \
            OUT(1);                                                                                                    \
            KINDS(into0 == into1 ? SAME3(into0) : MIXED, LOOP_BOTH, first, second)                                     \
            PUT(0);                                                                                                    \
            PUT(1);                                                                                                    \
        }                                                                                                              \
    }
/* with e = LINES(argument), which computes `lines` whole lines from chunk i on */
#define ABREAST(lines) _Pragma("GCC unroll 4") for (int j = 0; j < (lines); j++)
#define LOOP_ABREAST(lines, count, LINES, argument, expression, ...)                                                   \
    for (; first_ + ((lines)-1) * CHUNK < m_; first_ += (lines)*CHUNK) {                                               \
        T line[lines][CHUNK];                                                                                          \
        ABREAST(lines)                                                                                                 \
        {                                                                                                              \
            const int64_t i = first_ + j * CHUNK;                                                                      \
            if (past0) {                                                                                               \
                AHEAD##count;                                                                                          \
            }                                                                                                          \
            TAKE##count;                                                                                               \
            LANES                                                                                                      \
            {                                                                                                          \
                __VA_ARGS__;                                                                                           \
                line[j][k] = (argument);                                                                               \
            }                                                                                                          \
        }                                                                                                              \
        LINES(line, lines);                                                                                            \
        ABREAST(lines)                                                                                                 \
        {                                                                                                              \
            const int64_t i = first_ + j * CHUNK;                                                                      \
            TAKE##count;                                                                                               \
            LANES                                                                                                      \
            {                                                                                                          \
                __VA_ARGS__;                                                                                           \
                T e = line[j][k];                                                                                      \
                line[j][k] = (expression);                                                                             \
            }                                                                                                          \
            PUT_LINE(0, line[j]);                                                                                      \
        }                                                                                                              \
    }
#define LOOP_LINES(kind, lines, ...)                                                                                   \
    {                                                                                                                  \
        const int kind_ = kind;                                                                                        \
        int64_t first_ = 0;                                                                                            \
        if (lines > 1 && kind_ != MIXED) LOOP_ABREAST(lines, __VA_ARGS__)                                              \
        LOOP_ABREAST(1, __VA_ARGS__)                                                                                   \
    }
#define KERNEL_LINES(name, lines, count, declare, LINES, argument, expression)                                         \
    static void name(int64_t n, const elem_in *in, const elem_out *to, const void *constants_)                         \
    {                                                                                                                  \
        T space_[count][TILE];                                                                                         \
        (void)constants_;                                                                                              \
        MOST(count, 1);                                                                                                \
        TILES(most_)                                                                                                   \
        {                                                                                                              \
            IN##count;                                                                                                 \
            OUT(0);                                                                                                    \
            KINDS(SAME##count(into0), LOOP_LINES, lines, count, LINES, argument, expression, declare)                  \
            PUT(0);                                                                                                    \
        }                                                                                                              \
    }
#define X1 T x = in0[k]
#define X2 T x = in0[k], y = in1[k]
#define X3 T x = in0[k], y = in1[k], g = in2[k]
#define XYZ T x = in0[k], y = in1[k], z = in2[k]
#define XYZG T x = in0[k], y = in1[k], z = in2[k], g = in3[k]
#define BACKWARD1(name, f) KERNEL(name, 3, X3; (void)x; (void)y, g * (f))
#define BACKWARD3(name, f) KERNEL_P(name, 4, XYZG; (void)x; (void)y; (void)z, g * (f))

#define T float
KERNEL(axpy_f32, 3, X3, x *y + g)
KERNEL(cube_f32, 1, X1, x *x *x)
KERNEL(cube_bwd_f32, 2, X2, K(3) * x * x * y)
KERNEL_LINES(line_f32_exp, 1, 1, X1; (void)x, v_exp_lines, x, e)
KERNEL_LINES(line_f32_silu, 4, 1, X1, v_logistic_lines, x, x / e)
#ifdef __clang_analyzer__
#include "elem_analysed.inc"
#endif
#define NEGATIVE(x) v_float(v_bits(x) | 0x80000000u) /* -|x| */
KERNEL_LINES(line_f32_tanh, V_ABREAST_TANH, 1, X1; (void)x, v_tanh_lines, x, e)
KERNEL_LINES(line_f32_sigmoid, V_ABREAST_SIGMOID, 1, X1; (void)x, v_logistic_lines, x, 1 / e)
KERNEL_LINES(line_b1_f32_silu, 4, 3, X3; (void)y; (void)g, v_logistic_lines, NEGATIVE(x), g *f_silu_slope_of(x, 1 / e))
KERNEL_LINES(line_f32_gelu, V_ABREAST_GELU, 1, X1; (void)x, v_gelu_lines, x, e)
KERNEL_LINES(line_b1_f32_gelu, 4, 3, X3; (void)x; (void)y; (void)g, v_gelu_grad_lines, x, g *e)
KERNEL_LINES(line_f32_gelu_tanh, 4, 1, X1, v_logistic_lines, F_GELU_TANH_ARGUMENT(x), x / e)
KERNEL_LINES(line_b1_f32_gelu_tanh, 4, 3, X3; (void)y;
             (void)g, v_logistic_lines, NEGATIVE(F_GELU_TANH_ARGUMENT(x)), g *f_gelu_tanh_slope_of(x, 1 / e))
KERNEL_LINES(line2_f32_swiglu, 4, 2, X2; (void)y, v_logistic_lines, x, x / e * y)
KERNEL_LINES(line2_f32_geglu, V_ABREAST_GELU, 2, X2; (void)x; (void)y, v_gelu_lines, x, e *y)
KERNEL_LINES(line_f32_softplus, 1, 1, X1, v_exp_down_lines, NEGATIVE(x), f_relu(x) + v_log1p_unit(e))
#ifdef V_LOG_LINES
KERNEL_LINES(line_f32_log, 1, 1, X1; (void)x, v_log_lines, x, e)
#endif
KERNEL(near_f32_sin, 1, X1, f_sin_near(x))
KERNEL(near_f32_cos, 1, X1, f_cos_near(x))
BACKWARD1(near_b1_f32_sin, f_cos_near(x))
BACKWARD1(near_b1_f32_cos, -f_sin_near(x))
KERNEL_FAR(far_f32_tan, 1, X1, f_tan_near(x), fabsf(x) > F_NEAR, tanf(x))
KERNEL_FAR(far_f32_erfinv, 1, X1, f_erfinv_near(x), fabsf(x) >= SPECIAL_ERFINV_NEAR_F, f_erfinv(x))
KERNEL_FAR(far_b1_f32_erfinv, 3, X3;
           (void)y, g *f_erfinv_grad_near(x), fabsf(x) >= SPECIAL_ERFINV_NEAR_F, g *f_erfinv_grad(x))
KERNEL_FAR(far_f32_lgamma, 1, X1, f_lgamma_near(x), x < K(0), f_lgamma_low(x))
KERNEL_FAR(far_b1_f32_lgamma, 3, X3; (void)y, g *f_digamma_near(x), x < K(0), g *f_digamma_low(x))
KERNEL_FAR(far_f32_digamma, 1, X1, f_digamma_near(x), x < K(0), f_digamma_low(x))
KERNEL_FAR(far_b1_f32_digamma, 3, X3; (void)y, g *f_trigamma_near(x), x < K(0), g *f_trigamma_low(x))
KERNEL_FAR(far_f32_mod, 2, X2, f_mod_near(x, y), f_long_quotient(x, y), f_mod(x, y))
KERNEL_FAR(far_f32_fmod, 2, X2, f_fmod_near(x, y), f_long_quotient(x, y), fmodf(x, y))
#define MAP1(name, domain, value, gradient) KERNEL(m1_f32_##name, 1, X1, value) BACKWARD1(b1_f32_##name, gradient)
#define MAP2(name, domain, value, dx, dy)                                                                              \
    KERNEL(m2_f32_##name, 2, X2, value)                                                                                \
    BACKWARD1(bx_f32_##name, dx) BACKWARD1(by_f32_##name, dy) KERNEL_BOTH(bb_f32_##name, dx, dy)
#define CMP1(name, value) KERNEL_BOOL(m1_f32_##name, 1, X1, value)
#define CMP2(name, value) KERNEL_BOOL(m2_f32_##name, 2, X2, value)
#define MAPP(name, domain, count, value, gradient)                                                                     \
    KERNEL_P(mp_f32_##name, 1, X1, value) KERNEL_P(bp_f32_##name, 3, X3; (void)x; (void)y, g * (gradient))
#define MAP3(name, value, dx, dy, dz)                                                                                  \
    KERNEL_P(m3_f32_##name, 3, XYZ, value)                                                                             \
    BACKWARD3(b3x_f32_##name, dx) BACKWARD3(b3y_f32_##name, dy) BACKWARD3(b3z_f32_##name, dz)
#include "../maps.def"
#undef T
#define T double
KERNEL_FAR(far_f64_tan, 1, X1, d_tan_near(x), fabs(x) > (double)F_NEAR, tan(x))
KERNEL_FAR(far_f64_erfinv, 1, X1, special_erfinv_near_d(x), fabs(x) >= SPECIAL_ERFINV_NEAR_D, special_erfinv_d(x))
KERNEL_FAR(far_b1_f64_erfinv, 3, X3; (void)y, g *d_erfinv_grad_of(special_erfinv_near_d(x)),
                                     fabs(x) >= SPECIAL_ERFINV_NEAR_D, g *d_erfinv_grad(x))
KERNEL_FAR(far_f64_lgamma, 1, X1, special_lgamma_positive(x), x < K(0x1p-1000), special_lgamma_low(x))
KERNEL_FAR(far_b1_f64_lgamma, 3, X3; (void)y, g *special_digamma_positive(x), x < K(0), g *special_digamma_low(x))
KERNEL_FAR(far_f64_digamma, 1, X1, special_digamma_positive(x), x < K(0), special_digamma_low(x))
KERNEL_FAR(far_b1_f64_digamma, 3, X3; (void)y, g *special_trigamma_positive(x), x < K(0), g *special_trigamma_low(x))
#ifdef __FP_FAST_FMA
KERNEL_FAR(far_f64_mod, 2, X2, d_mod_near(x, y), d_long_quotient(x, y), d_mod(x, y))
KERNEL_FAR(far_f64_fmod, 2, X2, d_fmod_near(x, y), d_long_quotient(x, y), fmod(x, y))
KERNEL_FAR(far_f64_floor_divide, 2, X2, d_floor_divide_near(x, y), d_long_quotient(x, y), d_floor_divide(x, y))
#endif
#define MAP1(name, domain, value, gradient) KERNEL(m1_f64_##name, 1, X1, value) BACKWARD1(b1_f64_##name, gradient)
#define MAP2(name, domain, value, dx, dy)                                                                              \
    KERNEL(m2_f64_##name, 2, X2, value)                                                                                \
    BACKWARD1(bx_f64_##name, dx) BACKWARD1(by_f64_##name, dy) KERNEL_BOTH(bb_f64_##name, dx, dy)
#define CMP1(name, value) KERNEL_BOOL(m1_f64_##name, 1, X1, value)
#define CMP2(name, value) KERNEL_BOOL(m2_f64_##name, 2, X2, value)
#define MAPP(name, domain, count, value, gradient)                                                                     \
    KERNEL_P(mp_f64_##name, 1, X1, value) KERNEL_P(bp_f64_##name, 3, X3; (void)x; (void)y, g * (gradient))
#define MAP3(name, value, dx, dy, dz)                                                                                  \
    KERNEL_P(m3_f64_##name, 3, XYZ, value)                                                                             \
    BACKWARD3(b3x_f64_##name, dx) BACKWARD3(b3y_f64_##name, dy) BACKWARD3(b3z_f64_##name, dz)
#include "../maps.def"
KERNEL(axpy_f64, 3, X3, x *y + g)
KERNEL(cube_f64, 1, X1, x *x *x)
KERNEL(cube_bwd_f64, 2, X2, K(3) * x * x * y)
#undef T
#define T int64_t
#define INT_FLOAT(kernel)
#define INT_ANY(kernel) kernel
#define MAP1(name, domain, value, gradient) INT_##domain(KERNEL(m1_i64_##name, 1, X1, value))
#define MAP2(name, domain, value, dx, dy) INT_##domain(KERNEL(m2_i64_##name, 2, X2, value))
#define CMP1(name, value) KERNEL_BOOL(m1_i64_##name, 1, X1, value)
#define CMP2(name, value) KERNEL_BOOL(m2_i64_##name, 2, X2, value)
#define LOGIC1(name, text, value) KERNEL_BOOL(m1_i64_##name, 1, X1, value)
#define LOGIC2(name, text, value) KERNEL_BOOL(m2_i64_##name, 2, X2, value)
#define INT1(name, value) KERNEL(m1_i64_##name, 1, X1, value)
#define INT2(name, value) KERNEL(m2_i64_##name, 2, X2, value)
#define MAPP(name, domain, count, value, gradient) INT_##domain(KERNEL_P(mp_i64_##name, 1, X1, value))
#include "../maps.def"
KERNEL(axpy_i64, 3, X3, i_add(i_mul(x, y), g))
#undef T

/* ---- activations of half types ---- */

#include "elem_halves.inc"

#include "elem_bytes.inc"

typedef struct {
    lac_kernel *value[3];       /* by compute type; NULL: not defined there */
    lac_kernel *gradient[3][2]; /* [argument][compute type] */
    lac_kernel *both[2];        /* both gradients of a function of two arguments */
    lac_kernel *truth;          /* of truth values */
    const char *text, *slope[3];
    bool to_bool;
} lac_map;
enum { /* positions in maps2 */
#define MAP2(name, domain, value, dx, dy) M2_##name,
#include "../maps.def"
};
enum { /* positions in maps1 */
#define MAP1(name, domain, value, gradient) M1_##name,
#include "../maps.def"
};
#define I64_FLOAT(name) NULL
#define I64_ANY(name) name
/* Kernels of f32 that compute by lines take the place of those that maps.def made, which are then not compiled. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init"
static const lac_map maps1[] = {
#define MAP1(name, domain, value_, gradient_)                                                                          \
    {.value = {m1_f32_##name, m1_f64_##name, I64_##domain(m1_i64_##name)},                                             \
     .gradient = {{b1_f32_##name, b1_f64_##name}},                                                                     \
     .text = #value_,                                                                                                  \
     .slope = {#gradient_}},
#define CMP1(name, value_) {.value = {m1_f32_##name, m1_f64_##name, m1_i64_##name}, .text = #value_, .to_bool = true},
#define LOGIC1(name, text_, value_)                                                                                    \
    {.value = {NULL, NULL, m1_i64_##name}, .truth = m1_bool_##name, .text = #value_, .to_bool = true},
#define INT1(name, value_) {.value = {NULL, NULL, m1_i64_##name}, .text = #value_},
#include "../maps.def"
    [M1_exp].value[C_F32] = line_f32_exp,
    [M1_tanh].value[C_F32] = line_f32_tanh,
    [M1_sigmoid].value[C_F32] = line_f32_sigmoid,
    [M1_silu].value[C_F32] = line_f32_silu,
    [M1_silu].gradient[0][C_F32] = line_b1_f32_silu,
    [M1_gelu].value[C_F32] = line_f32_gelu,
    [M1_gelu].gradient[0][C_F32] = line_b1_f32_gelu,
    [M1_tan].value = {far_f32_tan, far_f64_tan},
    [M1_erfinv].value = {far_f32_erfinv, far_f64_erfinv},
    [M1_erfinv].gradient[0] = {far_b1_f32_erfinv, far_b1_f64_erfinv},
    [M1_lgamma].value = {far_f32_lgamma, far_f64_lgamma},
    [M1_lgamma].gradient[0] = {far_b1_f32_lgamma, far_b1_f64_lgamma},
    [M1_digamma].value = {far_f32_digamma, far_f64_digamma},
    [M1_digamma].gradient[0] = {far_b1_f32_digamma, far_b1_f64_digamma},
    [M1_softplus].value[C_F32] = line_f32_softplus,
#ifdef V_LOG_LINES
    [M1_log].value[C_F32] = line_f32_log,
#endif
    [M1_gelu_tanh].value[C_F32] = line_f32_gelu_tanh,
    [M1_gelu_tanh].gradient[0][C_F32] = line_b1_f32_gelu_tanh,
};
static const lac_map maps2[] = {
#define MAP2(name, domain, value_, dx, dy)                                                                             \
    {.value = {m2_f32_##name, m2_f64_##name, I64_##domain(m2_i64_##name)},                                             \
     .gradient = {{bx_f32_##name, bx_f64_##name}, {by_f32_##name, by_f64_##name}},                                     \
     .both = {bb_f32_##name, bb_f64_##name},                                                                           \
     .text = #value_,                                                                                                  \
     .slope = {#dx, #dy}},
#define CMP2(name, value_)                                                                                             \
    {.value = {m2_f32_##name, m2_f64_##name, m2_i64_##name}, .truth = m2_bool_##name, .text = #value_, .to_bool = true},
#define LOGIC2(name, text_, value_)                                                                                    \
    {.value = {NULL, NULL, m2_i64_##name}, .truth = m2_bool_##name, .text = #value_, .to_bool = true},
#define INT2(name, value_) {.value = {NULL, NULL, m2_i64_##name}, .text = #value_},
#include "../maps.def"
    [M2_mod].value[C_F32] = far_f32_mod,
    [M2_fmod].value[C_F32] = far_f32_fmod,
#ifdef __FP_FAST_FMA
    [M2_mod].value[C_F64] = far_f64_mod,
    [M2_fmod].value[C_F64] = far_f64_fmod,
    [M2_floor_divide].value[C_F64] = far_f64_floor_divide,
#endif
    [M2_swiglu].value[C_F32] = line2_f32_swiglu,
    [M2_geglu].value[C_F32] = line2_f32_geglu,
};
#pragma GCC diagnostic pop
static const lac_map maps_p[] = {
#define MAPP(name, domain, count, value_, gradient_)                                                                   \
    {.value = {mp_f32_##name, mp_f64_##name, I64_##domain(mp_i64_##name)},                                             \
     .gradient = {{bp_f32_##name, bp_f64_##name}},                                                                     \
     .text = #value_,                                                                                                  \
     .slope = {#gradient_}},
#include "../maps.def"
};
static const lac_map maps3[] = {
#define MAP3(name, value_, dx, dy, dz)                                                                                 \
    {.value = {m3_f32_##name, m3_f64_##name, NULL},                                                                    \
     .gradient = {{b3x_f32_##name, b3x_f64_##name},                                                                    \
                  {b3y_f32_##name, b3y_f64_##name},                                                                    \
                  {b3z_f32_##name, b3z_f64_##name}},                                                                   \
     .text = #value_,                                                                                                  \
     .slope = {#dx, #dy, #dz}},
#include "../maps.def"
};

/* the kernels of half types: [gradient][f16 or bf16] */
static lac_kernel *const of_halves[][2][2] = {
#ifdef V_HALF_LINES
    [M1_relu] = {{f16_h_relu, bf16_h_relu}},
    [M1_exp] = {{f16_h_exp, bf16_h_exp}},
    [M1_tanh] = {{f16_h_tanh, bf16_h_tanh}},
    [M1_sigmoid] = {{f16_h_sigmoid, bf16_h_sigmoid}},
#ifdef H_SILU_BWD
    [M1_silu] = {{f16_h_silu, bf16_h_silu}, {f16_h_silu_bwd, bf16_h_silu_bwd}},
#else
    [M1_silu] = {{f16_h_silu, bf16_h_silu}},
#endif
    [M1_gelu] = {{f16_h_gelu, bf16_h_gelu}, {f16_h_gelu_bwd, bf16_h_gelu_bwd}},
#else
    {{NULL}},
#endif
};

/* the table of a function for all n values of a call, or NULL */
static const void *half_table(int fn, bool gradient, const lac_view *x)
{
#ifdef H_TABLES
    static const int8_t after[] = {[M1_exp] = H_EXP + 1,
                                   [M1_sigmoid] = H_SIGMOID + 1,
                                   [M1_silu] = H_SILU + 1,
                                   [M1_tanh] = H_TANH + 1,
                                   [M1_gelu] = H_GELU + 1};
    const int half = x->dtype == LAC_F16 ? 1 : x->dtype == LAC_BF16 ? 2 : 0;
    if (!half || fn >= (int)sizeof after || !after[fn] || (gradient && fn != M1_gelu)) return NULL;
    return h_table(gradient ? H_GELU_BWD : after[fn] - 1, half, lac_view_numel(x));
#else
    (void)fn, (void)gradient, (void)x;
    return NULL;
#endif
}

/* ---- reading expressions ---- */

static bool part_of_name(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

/* does the expression mention the variable? */
static bool mentions(const char *text, char variable)
{
    for (const char *at = text; *at; at++)
        if (*at == variable && (at == text || !part_of_name(at[-1])) && !part_of_name(at[1])) return true;
    return false;
}

/* ---- the driver ---- */

#include "elem_run.inc"

/* a scalar as a view of stride 0 in the compute type of dtype */
typedef union {
    float f;
    double d;
    int64_t i;
} scalar;
static void scalar_set(double value, int ctype, void *space)
{
    if (ctype == C_F32) *(float *)space = (float)value;
    else if (ctype == C_F64) *(double *)space = value;
    else *(int64_t *)space = (int64_t)value;
}
static void scalar_view(double value, int dtype, const lac_view *like, scalar *space, lac_view *v)
{
    static const int32_t dtypes[] = {LAC_F32, LAC_F64, LAC_I64};
    int ctype = lac_compute_type(dtype);
    v->data = space;
    v->ndim = like->ndim;
    for (int i = 0; i < like->ndim; i++) {
        v->shape[i] = like->shape[i];
        v->stride[i] = 0;
    }
    scalar_set(value, ctype, space);
    v->dtype = dtypes[ctype];
}

/* ---- operators ---- */

static lac_kernel *near_of(int fn, int dtype, bool gradient)
{
    if (lac_compute_type(dtype) != C_F32 || (fn != M1_sin && fn != M1_cos)) return NULL;
    if (gradient) return fn == M1_sin ? near_b1_f32_sin : near_b1_f32_cos;
    return fn == M1_sin ? near_f32_sin : near_f32_cos;
}

static lac_kernel *kernel_of(int fn, int dtype, bool gradient)
{
    int half = half_of(dtype), ctype = lac_compute_type(dtype);
    if (half && fn < (int)(sizeof of_halves / sizeof *of_halves) && of_halves[fn][gradient][half - 1])
        return of_halves[fn][gradient][half - 1];
    if (dtype == LAC_BOOL && maps1[fn].truth) return maps1[fn].truth;
    return gradient ? maps1[fn].gradient[0][ctype] : maps1[fn].value[ctype];
}

int LAC_CPU(map1)(const lac_a_map1 *a)
{
    const lac_view *views[] = {&a->out, &a->x};
    const lac_map *map = &maps1[a->fn];
    elem_job job = {.kernel = kernel_of(a->fn, a->x.dtype, false),
                    .near = near_of(a->fn, a->x.dtype, false),
                    .constants = half_table(a->fn, false, &a->x),
                    .outputs = 1,
                    .raw = map->to_bool};
    return elem_run("map1", &job, 2, views, map->text, "x");
}

#ifdef H_BYTES
/* for processors that look bytes up (AVX512-VBMI); backend.c declares it too */
int LAC_CPU(map1_bytes)(const lac_a_map1 *a);
int LAC_CPU(map1_bytes)(const lac_a_map1 *a)
{
    if (a->fn != M1_tanh || a->x.dtype != LAC_BF16) return LAC_CPU(map1)(a);
    const lac_view *views[] = {&a->out, &a->x};
    elem_job job = {.kernel = bf16_h_tanh_bytes, .outputs = 1};
    return elem_run("map1", &job, 2, views, maps1[M1_tanh].text, "x");
}
#endif

int LAC_CPU(map1_bwd)(const lac_a_map1_bwd *a)
{
    const lac_view *views[] = {&a->out, &a->x, &a->y, &a->g};
    const lac_map *map = &maps1[a->fn];
    elem_job job = {.kernel = kernel_of(a->fn, a->x.dtype, true),
                    .near = near_of(a->fn, a->x.dtype, true),
                    .constants = half_table(a->fn, true, &a->x),
                    .outputs = 1};
    return elem_run("map1_bwd", &job, 4, views, map->slope[0], "xyg");
}

static bool is_float(int dtype) { return lac_compute_type(dtype) != C_I64; }

/* x^3 is a product, in a fortieth of the time */
static bool is_cube(int fn, double exponent, const lac_view *y, bool swapped, int dtype)
{
    return fn == M2_pow && !y->data && !swapped && exponent == 3 && is_float(dtype);
}

int LAC_CPU(map2)(const lac_a_map2 *a)
{
    lac_view constant;
    scalar space;
    const lac_view *x = &a->x, *y = &a->y;
    if (!y->data && !a->swapped && a->fn == M2_pow && a->scalar == 2) { /* x^2 is a product */
        const lac_a_map1 square = {.fn = M1_square, .x = a->x, .out = a->out};
        return LAC_CPU(map1)(&square);
    }
    if (is_cube(a->fn, a->scalar, y, a->swapped, x->dtype)) {
        const lac_view *views[] = {&a->out, x};
        elem_job job = {.kernel = lac_compute_type(x->dtype) == C_F32 ? cube_f32 : cube_f64, .outputs = 1};
        return elem_run("map2", &job, 2, views, NULL, NULL);
    }
    bool reciprocal = !y->data && a->fn == M2_pow && !a->swapped && a->scalar == -1 && is_float(x->dtype);
    if (!y->data) {
        scalar_view(reciprocal ? 1 : a->scalar, x->dtype, &a->out, &space, &constant);
        y = &constant;
    }
    const lac_map *map = &maps2[reciprocal ? M2_div : a->fn];
    const bool swapped = a->swapped || reciprocal; /* x^-1 is 1 / x */
    const lac_view *views[] = {&a->out, swapped ? y : x, swapped ? x : y};
    bool truth = x->dtype == LAC_BOOL && y->dtype == LAC_BOOL && map->truth;
    elem_job job = {
        .kernel = truth ? map->truth : map->value[lac_compute_type(x->dtype)], .outputs = 1, .raw = map->to_bool};
    return elem_run("map2", &job, 3, views, map->text, "xy");
}

int LAC_CPU(map2_bwd)(const lac_a_map2_bwd *a)
{
    lac_view constant;
    scalar space;
    const lac_view *x = &a->x, *y = &a->y;
    int which = a->which, ctype = lac_compute_type(x->dtype);
    const lac_map *map = &maps2[a->fn];
    if (which == 2) {
        const lac_view *views[] = {&a->out, &a->out2, x, y, &a->g};
        elem_job job = {.kernel = map->both[ctype], .outputs = 2};
        return elem_run("map2_bwd", &job, 5, views, NULL, NULL); /* one or the other reads x and y */
    }
    if (!y->data) {
        if (a->fn == M2_pow && !a->swapped && a->scalar == 2) {
            const lac_a_map1_bwd square = {.fn = M1_square, .x = a->x, .y = a->x, .g = a->g, .out = a->out};
            return LAC_CPU(map1_bwd)(&square);
        }
        if (is_cube(a->fn, a->scalar, y, a->swapped, x->dtype)) {
            const lac_view *views[] = {&a->out, x, &a->g};
            elem_job job = {.kernel = ctype == C_F32 ? cube_bwd_f32 : cube_bwd_f64, .outputs = 1};
            return elem_run("map2_bwd", &job, 3, views, NULL, NULL);
        }
        scalar_view(a->scalar, x->dtype, &a->out, &space, &constant);
        y = &constant;
        which = a->swapped;
    }
    bool swapped = !a->y.data && a->swapped;
    const lac_view *views[] = {&a->out, swapped ? y : x, swapped ? x : y, &a->g};
    elem_job job = {.kernel = map->gradient[which][ctype], .outputs = 1};
    return elem_run("map2_bwd", &job, 4, views, map->slope[which], "xyg");
}

/* the constants in the compute type */
static const void *constants_set(const double *values, int ctype, scalar *space)
{
    char *at = (char *)space;
    for (int i = 0; i < 3; i++, at += lac_compute_size(ctype)) scalar_set(values[i], ctype, at);
    return space;
}

int LAC_CPU(mapp)(const lac_a_mapp *a)
{
    scalar space[3];
    const lac_map *map = &maps_p[a->fn];
    int ctype = lac_compute_type(a->x.dtype);
    elem_job job = {.outputs = 1, .constants = constants_set(a->constants, ctype, space)};
    if (!a->g.data) {
        const lac_view *views[] = {&a->out, &a->x};
        job.kernel = map->value[ctype];
        return elem_run("mapp", &job, 2, views, map->text, "x");
    }
    const lac_view *views[] = {&a->out, &a->x, &a->y, &a->g};
    job.kernel = map->gradient[0][ctype];
    return elem_run("mapp_bwd", &job, 4, views, map->slope[0], "xyg");
}

int LAC_CPU(map3)(const lac_a_map3 *a)
{
    scalar space[3];
    const lac_map *map = &maps3[a->fn];
    const double constants[3] = {a->constant, 0, 0};
    int ctype = lac_compute_type(a->x.dtype);
    elem_job job = {.outputs = 1, .constants = constants_set(constants, ctype, space)};
    const lac_view *views[] = {&a->out, &a->x, &a->y, &a->z, &a->g};
    if (!a->g.data) {
        job.kernel = map->value[ctype];
        return elem_run("map3", &job, 4, views, map->text, "xyz");
    }
    job.kernel = map->gradient[a->which][ctype];
    return elem_run("map3_bwd", &job, 5, views, map->slope[a->which], "xyzg");
}

/* dst = alpha x + dst, or alpha dst */
int LAC_CPU(axpy)(const lac_a_axpy *a)
{
    static lac_kernel *const add[] = {axpy_f32, axpy_f64, axpy_i64}, *const mul[] = {m2_f32_mul, m2_f64_mul,
                                                                                     m2_i64_mul};
    lac_view alpha;
    scalar space;
    int ctype = lac_compute_type(a->dst.dtype);
    scalar_view(a->alpha, a->dst.dtype, &a->dst, &space, &alpha);
    const lac_view *sum[] = {&a->dst, &a->x, &alpha, &a->dst}, *product[] = {&a->dst, &a->dst, &alpha};
    elem_job job = {.kernel = a->x.data ? add[ctype] : mul[ctype], .outputs = 1};
    return a->x.data ? elem_run("axpy", &job, 4, sum, NULL, NULL) : elem_run("scale", &job, 3, product, NULL, NULL);
}
