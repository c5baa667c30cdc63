/* attn_parts.cuh: products of f32 tiles on tensor cores in three parts of bf16, for attention in f32 without TF32.
 *
 * A number of f32 is the sum of three of bf16: the nearest one, the nearest one to the rest, and what is left then,
 * exactly (24 bits in 8 + 8 + 8, signs aside). Of the nine products of parts the six largest are taken; the other three
 * are below 2^-26 of the product together. Tensor cores multiply bf16 exactly, but cut off what they add up, towards
 * zero. So the large product of a pair of numbers and the five small ones do not share an accumulator before the small
 * ones are summed, and sums of a tile begin at zero and join the sums of f32 by ordinary additions: nothing is cut off
 * more often than a product of 16 numbers is added to a tile's sum.
 *
 * Error against f64 beside that of a program of matmul and softmax in f32 (H200; D 64 and 128, 512 and 3,000 keys,
 * softmax from flat to one key a row; root mean squares): out 0.27 to 0.67, dq, dk 0.5 to 1.3, dv 0.55 to 1.9; the
 * last where one key a row has the weight, from the rounding of lse, as with multiply-adds. D 8: to 1.6.
 *
 * Tiles come by cp.async as they are; the thread that copied four numbers takes them apart and puts them into three
 * tiles of bf16, of which fragments are fetched as usual. Weights and dS are taken apart in registers. A fragment
 * serves more products than in bf16 (two matrices of three parts feed six), and nothing but operands passes through
 * shared memory.
 *
 * Where one key has all the weight, dP - delta must cancel to the last bit: dP is summed in one order wherever it is
 * made (FLIP: the sides are exchanged), and so is delta (stats_parts in attn.cu). Products of warpgroups, which run on
 * Hopper (attn_hopper_parts.cuh), sum 16 numbers to the same bits as mma.sync: the spec asks for exact zeros of both.
 *
 * Numbers below 2^-110 lose bits, because parts below 2^-133 are zero. Infinities, NaN and numbers that round to an
 * infinite bf16 (from 3.39e38 on) do not survive being taken apart: they become NaN, the result is not finite, and
 * attn_slow.cuh does the tile again.
 *
 * Rejected: TF32 in two parts (22 bits, in simulation 1.4 times the naive program's error in gradients where this has
 * 0.85 to 1.15; as many products, fragments that cannot be transposed on their way from shared memory and take a third
 * more of it), parts cut off instead of rounded (the products left out then have one sign and eight times the size).
 */
#ifndef LAC_CUDA_ATTN_PARTS_CUH
#define LAC_CUDA_ATTN_PARTS_CUH
#include "attn_mma.cuh"
#include <type_traits>

/* f32 exactly, with or without options of single pairs, where the tiles fit into shared memory */
bool attn_parts_fits(int head_dim);
int attn_forward_parts(attn_pair_args &a, const lac_plan *plan);
int attn_keys_parts(attn_pair_args &a, const lac_plan *plan);
int attn_queries_parts(attn_pair_args &a, const lac_plan *plan);

enum { PARTS = 3, PARTS_PRODUCTS = 6 };

/* parts of the left and of the right operand of product `i`, small ones first; FLIP: the sides are exchanged */
template <bool FLIP> __device__ constexpr int parts_left(int i) { return (FLIP ? 0x010102 : 0x001120) >> 4 * i & 7; }
template <bool FLIP> __device__ constexpr int parts_right(int i) { return parts_left<!FLIP>(i); }

/* ---- tiles ---- */

/* A tile as it came: a thread's chunks are those that it copies. */
template <int DP> struct parts_raw {
    enum { ROW = DP * 4, CHUNKS = DP / 4 };
    static __device__ __forceinline__ uint32_t at(int row, int chunk)
    {
        return (uint32_t)((row * CHUNKS + chunk) * 16);
    }
};
/* the same in parts: tiles of bf16, one behind the other */
template <int DP> struct parts_tile {
    typedef op_bf16<DP> op;
    enum { ROW = op::tile::ROW, ROWS_OF_PARTS = PARTS * ROW }; /* bytes of a row of one part, of all */
};

/* takes apart x and y; parts of x in the lower halves */
__device__ __forceinline__ void parts_of(uint32_t (&part)[PARTS], float x, float y)
{
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        part[p] = op_bf16<64>::pack(x, y);
        x -= __uint_as_float(part[p] << 16);
        y -= __uint_as_float(part[p] & 0xffff0000u);
    }
}

/* attn_stream for such tiles, anywhere in the lattice and in any head; where the lattice begins lies in shared memory
 * (`start` is followed by a barrier). The thread's number is hidden from the compiler, which would
 * keep what follows from it in registers that the products need. */
template <int DP, int ROWS, int THREADS_> struct parts_stream {
    typedef parts_raw<DP> Raw;
    static __device__ __forceinline__ void start(const char *&origin, const attn_tensor &x, const attn_tile &t,
                                                 int shift)
    {
        if (threadIdx.x == 0)
            origin = (const char *)((const float *)x.data + t.b * x.stride[0] + (t.base - shift) * x.stride[1]);
    }
    static __device__ __forceinline__ void next(uint32_t to, const char *origin, const attn_args &a,
                                                const attn_tensor &x, const attn_tile &t, int h, int first, int limit)
    {
        const int thread = (int)attn_opaque(threadIdx.x), row = thread / Raw::CHUNKS, chunk = thread % Raw::CHUNKS;
        constexpr int EACH = THREADS_ / Raw::CHUNKS;
        static_assert(ROWS % EACH == 0, "a thread always has the same chunk");
        const int step = t.r * (int)x.stride[1] * 4, left = chunk * 4 < a.head_dim ? limit - first - row : 0;
        const char *from = origin + h * (x.stride[2] * 4) + (int64_t)(first + row) * step + chunk * 16;
#pragma unroll
        for (int i = 0; i < ROWS / EACH; i++) {
            attn_copy16(to + Raw::at(i * EACH + row, chunk), from, i * EACH < left);
            from += EACH * step;
        }
    }
};

/* The same rows of two tensors to `raw`, one behind the other; `quick`: as above, from streams that have been started.
 */
template <int DP, int ROWS, int THREADS_>
__device__ __forceinline__ void parts_load_two(bool quick, uint32_t raw, const char *const (&origin)[2],
                                               const attn_args &a, const attn_tensor &x, const attn_tensor &y,
                                               const attn_tile &t, int h, int shift, int first, int limit, bool padding)
{
    typedef parts_raw<DP> Raw;
    typedef parts_stream<DP, ROWS, THREADS_> stream;
    if (quick) {
        stream::next(raw, origin[0], a, x, t, h, first, limit);
        stream::next(raw + ROWS * Raw::ROW, origin[1], a, y, t, h, first, limit);
    } else {
        attn_load<Raw, float, ROWS, DP, THREADS_>(raw, a, x, t, h, shift, first, limit, padding);
        attn_load<Raw, float, ROWS, DP, THREADS_>(raw + ROWS * Raw::ROW, a, y, t, h, shift, first, limit, padding);
    }
}

/* The thread's chunks of ROWS rows at `from` go, in parts, to rows from `row0` on of the `height` rows at `to`. */
template <int DP, int ROWS, int THREADS_>
__device__ __forceinline__ void parts_put(uint32_t to, int height, int row0, uint32_t from)
{
    typedef typename parts_tile<DP>::op::tile Tile;
    constexpr int CHUNKS = parts_raw<DP>::CHUNKS;
    static_assert(ROWS * CHUNKS % THREADS_ == 0, "all threads have as many");
#pragma unroll 2
    for (int i = 0; i < ROWS * CHUNKS / THREADS_; i++) {
        const int at = threadIdx.x + i * THREADS_, row = row0 + at / CHUNKS, chunk = at % CHUNKS;
        float x, y, z, w;
        asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
                     : "r"(from + at * 16)
                     : "memory");
        uint32_t low[PARTS], high[PARTS];
        parts_of(low, x, y);
        parts_of(high, z, w);
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(to + p * height * Tile::ROW +
                                                                 Tile::at(row, chunk / 2) + chunk % 2 * 8),
                         "r"(low[p]), "r"(high[p])
                         : "memory");
    }
}
/* ROWS lattice rows, in parts, by way of `raw`, which holds RAW rows; followed by a barrier */
template <int DP, int ROWS, int RAW, int THREADS_>
__device__ __forceinline__ void parts_load(uint32_t to, uint32_t raw, const attn_args &a, const attn_tensor &x,
                                           const attn_tile &t, int h, int shift, int first, int limit, bool padding)
{
    constexpr int STEP = ROWS < RAW ? ROWS : RAW;
    static_assert(ROWS % STEP == 0, "whole steps");
#pragma unroll 1
    for (int i = 0; i < ROWS; i += STEP) {
        attn_load<parts_raw<DP>, float, STEP, DP, THREADS_>(raw, a, x, t, h, shift, first + i, limit, padding);
        attn_commit();
        attn_arrived();
        parts_put<DP, STEP, THREADS_>(to, ROWS, i, raw);
    }
}

/* ---- products of a warp ---- */

/* c = a b + what `plus` names, c or nothing; a constant zero costs no registers that are cleared */
template <bool PLUS>
__device__ __forceinline__ void parts_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    if constexpr (PLUS) op_bf16<64>::mma(c, a, b0, b1);
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                     "{%10,%10,%10,%10};"
                     : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
/* Products FROM to TO of the parts of 16 M rows and 8 G columns, added to c; G is even. FIRST: c has nothing yet. */
template <bool FLIP, int FROM, int TO, bool FIRST, int M, int G>
__device__ __forceinline__ void parts_products(float (&c)[M][G][4], const uint32_t (&a)[PARTS][M][4],
                                               const uint32_t (&b)[PARTS][G / 2][4])
{
#pragma unroll
    for (int i = FROM; i < TO; i++) {
        const int x = parts_left<FLIP>(i), y = parts_right<FLIP>(i);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < G; n++) {
                if (FIRST && i == FROM)
                    parts_mma<false>(c[m][n], a[x][m], b[y][n / 2][n % 2 * 2], b[y][n / 2][n % 2 * 2 + 1]);
                else parts_mma<true>(c[m][n], a[x][m], b[y][n / 2][n % 2 * 2], b[y][n / 2][n % 2 * 2 + 1]);
            }
    }
}
/* the small ones into `low`, the large one into `high` */
template <bool FLIP, bool FIRST, int M, int G>
__device__ __forceinline__ void parts_apart(float (&high)[M][G][4], float (&low)[M][G][4],
                                            const uint32_t (&a)[PARTS][M][4], const uint32_t (&b)[PARTS][G / 2][4])
{
    parts_products<FLIP, 0, PARTS_PRODUCTS - 1, FIRST>(low, a, b);
    parts_products<FLIP, PARTS_PRODUCTS - 1, PARTS_PRODUCTS, FIRST>(high, a, b);
}

/* c = X[x0 .. +16 M) Y[y0 .. +8 N)^T over DP columns; X has XH rows, Y has YH */
template <int DP, int XH, int YH, bool FLIP, int M, int N>
__device__ __forceinline__ void parts_scores(float (&c)[M][N][4], uint32_t x, int x0, uint32_t y, int y0)
{
    typedef typename parts_tile<DP>::op Op;
    constexpr int G = M == 1 && N % 4 == 0 ? 4 : 2; /* chains of sums that run side by side */
    constexpr int ROW = Op::tile::ROW, TURNS = DP > 64 ? 1 : DP / 16;
    float low[N / G][M][G][4], high[N / G][M][G][4];
    x = attn_opaque(x);
    y = attn_opaque(y + y0 * ROW);
    auto step = [&](int k, auto first) {
        uint32_t a[PARTS][M][4];
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
            for (int m = 0; m < M; m++) Op::a(a[p][m], x + p * XH * ROW, x0 + 16 * m, k);
#pragma unroll
        for (int g = 0; g < N / G; g++) {
            uint32_t b[PARTS][G / 2][4];
#pragma unroll
            for (int p = 0; p < PARTS; p++)
#pragma unroll
                for (int n = 0; n < G / 2; n++) Op::b(b[p][n], y + p * YH * ROW, 8 * G * g + 16 * n, k);
            parts_apart<FLIP, decltype(first)::value>(high[g], low[g], a, b);
        }
    };
    step(0, std::true_type());
#pragma unroll TURNS
    for (int k = 1; k < DP / 16; k++) step(k, std::false_type());
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = high[n / G][m][n % G][i] + low[n / G][m][n % G][i];
}

/* c = c times the row's factor + P Y[y0 .. +8 N)[all columns]; P as `parts_scores` left it. The sum of the large
 * products goes on from that of the small ones. */
template <int DP, int YH, int M, int N, int E>
__device__ __forceinline__ void parts_weighted(float (&c)[M][E][4], const float (&factor)[M][2],
                                               const float (&p)[M][N][4], uint32_t y, int y0)
{
    typedef typename parts_tile<DP>::op Op;
    constexpr int G = M == 1 && DP <= 64 ? 4 : 2, K = N / 2, ROW = Op::tile::ROW;
    uint32_t a[K][PARTS][M][4];
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t part[PARTS];
                parts_of(part, p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
                for (int x = 0; x < PARTS; x++) a[k][x][m][i] = part[x];
            }
    y = attn_opaque(y + y0 * ROW);
#pragma unroll
    for (int e = 0; e < E; e += G) {
        float sum[M][G][4];
        uint32_t b[K][PARTS][G / 2][4];
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int x = 0; x < PARTS; x++)
#pragma unroll
                for (int n = 0; n < G / 2; n++) Op::bt(b[k][x][n], y + x * YH * ROW, 8 * e + 16 * n, k);
            if (k == 0) parts_products<false, 0, PARTS_PRODUCTS - 1, true>(sum, a[k], b[k]);
            else parts_products<false, 0, PARTS_PRODUCTS - 1, false>(sum, a[k], b[k]);
        }
#pragma unroll
        for (int k = 0; k < K; k++) parts_products<false, PARTS_PRODUCTS - 1, PARTS_PRODUCTS, false>(sum, a[k], b[k]);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < G; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) c[m][e + n][i] = fmaf(c[m][e + n][i], factor[m][i / 2], sum[m][n][i]);
    }
}
template <int DP, int YH, int M, int N, int E>
__device__ __forceinline__ void parts_weighted(float (&c)[M][E][4], const float (&p)[M][N][4], uint32_t y, int y0)
{
    float one[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) one[m][0] = one[m][1] = 1;
    parts_weighted<DP, YH>(c, one, p, y, y0);
}

/* ---- softmax ---- */

/* A step of the online softmax: base-2 scores become weights, under the maximum `top` so far, which `sum` and what else
 * has been summed shrink to. */
template <int M, int N>
__device__ __forceinline__ void parts_soften(float (&s)[M][N][4], float (&top)[M][2], float (&sum)[M][2],
                                             float (&shrink)[M][2])
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float part = 0;
            const float most = fmaxf(quad_max(row_max(s[m], i)), top[m][i]);
            const float shift = most == -INFINITY ? 0 : most;
            shrink[m][i] = attn_ex2(top[m][i] - shift);
            top[m][i] = most;
#pragma unroll
            for (int n = 0; n < N; n++) {
                s[m][n][2 * i] = attn_ex2(s[m][n][2 * i] - shift);
                s[m][n][2 * i + 1] = attn_ex2(s[m][n][2 * i + 1] - shift);
                part += s[m][n][2 * i] + s[m][n][2 * i + 1];
            }
            sum[m][i] = fmaf(sum[m][i], shrink[m][i], part);
        }
}

/* ---- memory ---- */

/* bytes of `rows` rows in parts, and of all tiles: `own` rows, `other` rows of a step and the same as they come */
template <int DP> __host__ __device__ constexpr int parts_bytes(int rows)
{
    return rows * parts_tile<DP>::ROWS_OF_PARTS;
}
template <int DP> __host__ __device__ constexpr int parts_memory(int own, int other)
{
    return parts_bytes<DP>(own + other) + other * parts_raw<DP>::ROW;
}

#endif
