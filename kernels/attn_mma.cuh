/* attn_mma.cuh: tiles in shared memory and products on tensor cores (mma.sync, sm_80 and later) for attention.
 *
 * A warp owns 16 or 32 rows. Its accumulators are 16 x 8 blocks of f32; what an operator type (f16, bf16, tf32) adds is
 * how operands are fetched: `a` 16 rows and one step of k from a row-major tile, `b` two blocks of 8 columns whose rows
 * lie in the tile (so the product is with the tile's transpose), `bt` the same from the tile as it is. The accumulators
 * of one product are the left operand of the next without moving between lanes (`left`): f16 and bf16 because the
 * layouts agree, tf32 because the order of k is free as long as both operands use the same one.
 *
 * Tiles of half types are swizzled by chunks of 16 bytes (ldmatrix meets every bank once); tf32 tiles have rows that
 * are 4 words longer than the data for the same reason.
 *
 * What happens once a tile or seldom is written as short code, because compilers spend their time on it: results leave
 * by way of shared memory in one loop (code for every accumulator was a third of a kernel), loads stand in one place of
 * the main loop, whose first turn does nothing else, and rows that are repeated pair by pair run loops that are not
 * unrolled. That halved the time of a build, and tiles leave memory in whole lines.
 *
 * How tiles begin and end is said once, for all kernels. What a step loads and which pairs it masks stands in each: as
 * functions these took other registers (28 bytes of spills in the pass over query rows with active blocks, D = 128, on
 * sm_80).
 *
 * Products of masked pairs are products with zero, and 0 times NaN is NaN: a tile whose result is not finite although
 * some pairs are masked is computed again by attn_slow.cuh. So is one whose sums of weights are not finite: a pair that
 * mask or bias hides has the weight NaN if its score is NaN or infinity, and where dropout drops it too only the sum
 * has that.
 */
#ifndef LAC_CUDA_ATTN_MMA_CUH
#define LAC_CUDA_ATTN_MMA_CUH
#include "attn_pairs.cuh"
#include "attn_slow.cuh"
#include "attn_sums.cuh"

/* ---- tiles ---- */

template <int DP> struct tile_half {
    enum { ROW = DP * 2, CHUNKS = DP / 8 };
    static __device__ __forceinline__ uint32_t at(int row, int chunk)
    {
        return (uint32_t)(row * ROW + ((chunk ^ (CHUNKS >= 8 ? row & 7 : row >> 1 & 3)) << 4));
    }
};
template <int DP> struct tile_tf32 {
    enum { ROW = DP * 4 + 16, CHUNKS = DP / 4 };
    static __device__ __forceinline__ uint32_t at(int row, int chunk) { return (uint32_t)(row * ROW + chunk * 16); }
};

/* start of the tiles: dynamic shared memory from the next multiple of ATTN_ALIGN on */
enum { ATTN_ALIGN = 512 };
__device__ __forceinline__ uint32_t attn_tiles(const void *memory)
{
    return (attn_shared(memory) + ATTN_ALIGN - 1) & ~(ATTN_ALIGN - 1);
}
/* floats that a warp uses for itself: `at` of them behind `bytes` bytes of the tiles */
__device__ __forceinline__ float *attn_floats(uint8_t *memory, int bytes, int at)
{
    return (float *)(memory + (attn_tiles(memory) - attn_shared(memory)) + bytes) + at;
}

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}
__device__ __forceinline__ void ldmatrix_t(uint32_t (&r)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}

/* ---- operand types ---- */

template <int DP, class Op> struct op_half { /* Op: its f16 or bf16 */
    typedef tile_half<DP> tile;
    enum { STEP = 16, BLOCKS = 2 }; /* k of one product; blocks of 8 columns that make one */
    /* chunk c + 2 k of a row lies at (chunk c) ^ (k << 5), because tiles start at multiples of a row: one address a
     * lane serves all steps, the rest are constants */
    static __device__ __forceinline__ void a(uint32_t (&r)[4], uint32_t t, int row, int k)
    {
        int lane = threadIdx.x % 32;
        ldmatrix(r, (t + row * tile::ROW + tile::at(lane & 15, lane >> 4)) ^ (k << 5));
    }
    static __device__ __forceinline__ void b(uint32_t (&r)[4], uint32_t t, int column, int k)
    {
        int lane = threadIdx.x % 32;
        ldmatrix(r, ((t + tile::at((lane & 7) + (lane >> 4 << 3), lane >> 3 & 1)) ^ (k << 5)) + column * tile::ROW);
    }
    static __device__ __forceinline__ void bt(uint32_t (&r)[4], uint32_t t, int column, int k)
    {
        int lane = threadIdx.x % 32;
        ldmatrix_t(r, ((t + tile::at(lane & 15, lane >> 4)) ^ (column << 1)) + 16 * k * tile::ROW);
    }
    static __device__ __forceinline__ void left(uint32_t (&r)[4], const float (&x)[4], const float (&y)[4])
    {
        r[0] = Op::pack(x[0], x[1]);
        r[1] = Op::pack(x[2], x[3]);
        r[2] = Op::pack(y[0], y[1]);
        r[3] = Op::pack(y[2], y[3]);
    }
};
template <int DP> struct op_bf16 : op_half<DP, op_bf16<DP>> {
    typedef bf16 T;
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        uint32_t r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
template <int DP> struct op_f16 : op_half<DP, op_f16<DP>> {
    typedef f16 T;
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        uint32_t r;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
template <int DP> struct op_tf32 {
    typedef float T;
    typedef tile_tf32<DP> tile;
    enum { STEP = 8, BLOCKS = 1 };
    static __device__ __forceinline__ uint32_t round(float x)
    {
        uint32_t r;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
        return r;
    }
    static __device__ __forceinline__ uint32_t fetch(uint32_t t, int row, int column)
    {
        float x;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(t + (uint32_t)(row * tile::ROW + column * 4)));
        return round(x);
    }
    static __device__ __forceinline__ void a(uint32_t (&r)[4], uint32_t t, int row, int k)
    {
        int g = row + threadIdx.x % 32 / 4, e = 8 * k + threadIdx.x % 4;
        r[0] = fetch(t, g, e);
        r[1] = fetch(t, g + 8, e);
        r[2] = fetch(t, g, e + 4);
        r[3] = fetch(t, g + 8, e + 4);
    }
    static __device__ __forceinline__ void b(uint32_t (&r)[4], uint32_t t, int column, int k)
    {
        int g = column + threadIdx.x % 32 / 4, e = 8 * k + threadIdx.x % 4;
        r[0] = fetch(t, g, e);
        r[1] = fetch(t, g, e + 4);
        r[2] = fetch(t, g + 8, e);
        r[3] = fetch(t, g + 8, e + 4);
    }
    static __device__ __forceinline__ void bt(uint32_t (&r)[4], uint32_t t, int column, int k)
    {
        int g = column + threadIdx.x % 32 / 4, e = 8 * k + threadIdx.x % 4 * 2;
        r[0] = fetch(t, e, g);
        r[1] = fetch(t, e + 1, g);
        r[2] = fetch(t, e, g + 8);
        r[3] = fetch(t, e + 1, g + 8);
    }
    static __device__ __forceinline__ void left(uint32_t (&r)[4], const float (&x)[4], const float (&)[4])
    {
        r[0] = round(x[0]);
        r[1] = round(x[2]);
        r[2] = round(x[1]);
        r[3] = round(x[3]);
    }
    static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

/* ---- products of a warp ---- */

template <int M, int N> __device__ __forceinline__ void clear(float (&c)[M][N][4])
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0;
}

/* c = X[row0 .. +16 M) Y[0 .. 8 N)^T over DP columns */
template <class Op, int DP, int M, int N>
__device__ __forceinline__ void scores(float (&c)[M][N][4], uint32_t x, int row0, uint32_t y)
{
    clear(c);
    x = attn_opaque(x);
    y = attn_opaque(y);
#pragma unroll
    for (int k = 0; k < DP / Op::STEP; k++) {
        uint32_t a[M][4], b[4];
#pragma unroll
        for (int m = 0; m < M; m++) Op::a(a[m], x, row0 + 16 * m, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            Op::b(b, y, 8 * n, k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                Op::mma(c[m][n], a[m], b[0], b[1]);
                Op::mma(c[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* c += P Y[0 .. 8 N)[all columns]; P as `scores` left it: one step of k, and all */
template <class Op, int M, int N, int E>
__device__ __forceinline__ void weighted_step(float (&c)[M][E][4], const float (&p)[M][N][4], uint32_t y, int k)
{
    uint32_t a[M][4], b[4];
#pragma unroll
    for (int m = 0; m < M; m++) Op::left(a[m], p[m][Op::BLOCKS * k], p[m][Op::BLOCKS * k + Op::BLOCKS - 1]);
#pragma unroll
    for (int e = 0; e < E; e += 2) {
        Op::bt(b, y, 8 * e, k);
#pragma unroll
        for (int m = 0; m < M; m++) {
            Op::mma(c[m][e], a[m], b[0], b[1]);
            Op::mma(c[m][e + 1], a[m], b[2], b[3]);
        }
    }
}
template <class Op, int M, int N, int E>
__device__ __forceinline__ void weighted(float (&c)[M][E][4], const float (&p)[M][N][4], uint32_t y)
{
    y = attn_opaque(y);
#pragma unroll
    for (int k = 0; k < N / Op::BLOCKS; k++) weighted_step<Op>(c, p, y, k);
}

/* The lane's row has these columns; attn_select asks for them in the accumulators' order. In shared memory, because the
 * scores take all registers meanwhile: one word for each 64 columns, `height` words apart. */
template <int M> __device__ __forceinline__ void attn_tell(uint64_t *rows, uint64_t mine)
{
    int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane < 16 * M) rows[threadIdx.x / 32 * 16 * M + lane] = mine;
    __syncwarp();
}
/* x becomes `other` where its column is not in the mask of its row */
template <int M, int N>
__device__ __forceinline__ void attn_select(float (&x)[M][N][4], const uint64_t *rows, int height, float other)
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int w = 0; w < (N + 7) / 8; w++) {
                const int row = threadIdx.x / 32 * 16 * M + 16 * m + 8 * i + threadIdx.x % 32 / 4;
                const uint64_t bits = rows[w * height + row] >> (threadIdx.x % 4 * 2);
#pragma unroll
                for (int n = 8 * w; n < N && n < 8 * w + 8; n++) {
                    if (!(bits >> (8 * n - 64 * w) & 1)) x[m][n][2 * i] = other;
                    if (!(bits >> (8 * n - 64 * w) & 2)) x[m][n][2 * i + 1] = other;
                }
            }
}

/* ---- options of single pairs ---- */

/* What mask and bias do to a step's pairs lies in shared memory, in a part that is the warp's own: rows of N * 8
 * floats, which are added to scores. Rows are 8 words longer, so that a warp reads two floats a lane without conflicts.
 */
__host__ __device__ constexpr int attn_extra_row(int columns) { return columns + 8; }
inline size_t attn_extra_bytes(const attn_args &, int, int) { return 0; }
inline size_t attn_extra_bytes(const attn_pair_args &a, int rows, int columns)
{
    return a.mask || a.bias ? (size_t)(rows * attn_extra_row(columns)) * sizeof(float) : 0;
}

template <class T> struct alignas(4 * sizeof(T)) attn_four {
    T x[4];
};
/* four neighbours from `from` on, or the first `count` of them; the rest is as it was */
template <class T>
__device__ __forceinline__ void attn_take_four(const char *from, int64_t step, int count, bool wide, float (&x)[4])
{
    const T *at = (const T *)from;
    if (wide && count >= 4) {
        const attn_four<T> v = *(const attn_four<T> *)at;
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = (float)to_compute(v.x[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < count) x[i] = (float)to_compute(at[i * step]);
    }
}
__device__ __forceinline__ uint32_t attn_take_mask(const uint8_t *from, int64_t step, int count, bool wide)
{
    if (wide && count >= 4) return *(const uint32_t *)from;
    uint32_t four = ~0u;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < count && !from[i * step]) four &= ~(0xffu << 8 * i);
    return four;
}

__device__ __forceinline__ uint64_t attn_within(const attn_args &, int, int) { return ~(uint64_t)0; }
__device__ __forceinline__ uint64_t attn_within(const attn_block_args &, int first, int end)
{
    return attn_below(end - first); /* steps may be short */
}

/* Brings them there for rows [row0, row_end) and columns [column0, column_end), zeros elsewhere; a hidden pair gets
 * what makes its score -inf. KEYS: rows are keys. Four keys a lane, neighbours in memory; a lane keeps its keys. */
template <bool KEYS, class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void attn_gather(const attn_args &, const attn_tile &, int, int, int, int, int, float *)
{
}
template <bool KEYS, class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void attn_gather(const attn_pair_args &a, const attn_tile &t, int h, int row0, int row_end,
                                            int column0, int column_end, float *extra)
{
    if (!attn_hides(a)) return;
    constexpr int PITCH = attn_extra_row(COLUMNS), QUERIES = KEYS ? COLUMNS : ROWS, FOURS = (KEYS ? ROWS : COLUMNS) / 4;
    constexpr int HOP = 32 / FOURS;
    const int k = threadIdx.x % 32 % FOURS * 4, first = threadIdx.x % 32 / FOURS;
    const int q0 = (KEYS ? column0 : row0) + first, k0 = (KEYS ? row0 : column0) + k;
    const int queries = (KEYS ? column_end : row_end) - q0, keys = (KEYS ? row_end : column_end) - k0;
    const int64_t n = t.base + (int64_t)q0 * t.r - a.shift, key = t.base + (int64_t)k0 * t.r;
    const int64_t mask_row = HOP * t.r * a.mask_stride[2], mask_step = t.r * a.mask_stride[3];
    const int wide = a.bias_wide ? 4 : (int)sizeof(T);
    const int64_t bias_row = HOP * t.r * a.bias_stride[2] * wide, bias_step = t.r * a.bias_stride[3];
    const uint8_t *mask = a.mask + attn_pair_at(a.mask_stride, t.b, h, n, key);
    const char *bias = a.bias + attn_pair_at(a.bias_stride, t.b, h, n, key) * wide;
    const bool mask_four = mask_step == 1 && ((uintptr_t)mask | (uintptr_t)mask_row) % 4 == 0;
    const bool bias_four = bias_step == 1 && ((uintptr_t)bias | (uintptr_t)bias_row) % (4 * wide) == 0;
    const float unit = (float)a.unit, hidden = unit > 0 ? -INFINITY : INFINITY;
    extra += KEYS ? k * PITCH + first : first * PITCH + k;
    __syncwarp();
#pragma unroll 4
    for (int q = 0; q < QUERIES; q += HOP) {
        const int count = q < queries ? keys : 0;
        float x[4] = {0, 0, 0, 0};
        if (a.bias) {
            if (a.bias_wide) attn_take_four<float>(bias, bias_step, count, bias_four, x);
            else attn_take_four<T>(bias, bias_step, count, bias_four, x);
        }
        const uint32_t shown = a.mask ? attn_take_mask(mask, mask_step, count, mask_four) : ~0u;
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = shown & 0xffu << 8 * e ? x[e] * unit : hidden;
        if (KEYS) {
#pragma unroll
            for (int e = 0; e < 4; e++) extra[e * PITCH + q] = x[e];
        } else *(float4 *)(extra + q * PITCH) = {x[0], x[1], x[2], x[3]};
        mask += mask_row;
        bias += bias_row;
    }
    __syncwarp();
}

/* Scores of a warp's rows from row0 on, columns from column0 on (KEYS: rows are keys), += what options add to pairs */
template <bool KEYS, int M, int N>
__device__ __forceinline__ void attn_add(const attn_args &, const attn_tile &, int, int, int, const float *,
                                         float (&)[M][N][4])
{
}
template <bool KEYS, int M, int N>
__device__ __forceinline__ void attn_add(const attn_pair_args &a, const attn_tile &t, int h, int row0, int column0,
                                         const float *extra, float (&s)[M][N][4])
{
    const int lane = threadIdx.x % 32;
    if (attn_hides(a))
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const int row = 16 * m + 8 * i + lane / 4;
                    const float2 x = *(const float2 *)(extra + row * attn_extra_row(8 * N) + 8 * n + lane % 4 * 2);
                    s[m][n][2 * i] += x.x;
                    s[m][n][2 * i + 1] += x.y;
                }
    if (a.slopes) {
        const float slope = (float)((double)((const float *)a.slopes)[h * a.slopes_stride] * a.unit * t.r);
        const float apart = (float)(row0 + lane / 4 - column0 - lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int x = 0; x < 4 * N; x++)
                s[m][x / 4][x % 4] -= slope * fabsf(apart + (float)(16 * m + x % 4 / 2 * 8 - x / 4 * 8 - x % 2));
    }
}
/* weights of hidden pairs are 0, also where a score is NaN */
template <int M, int N>
__device__ __forceinline__ void attn_clear_hidden(const attn_args &, const float *, float (&)[M][N][4])
{
}
template <int M, int N>
__device__ __forceinline__ void attn_clear_hidden(const attn_pair_args &a, const float *extra, float (&s)[M][N][4])
{
    const float hidden = a.unit > 0 ? -INFINITY : INFINITY;
    if (attn_hides(a))
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const int row = 16 * m + 8 * i + threadIdx.x % 32 / 4;
                    const float *x = extra + row * attn_extra_row(8 * N) + 8 * n + threadIdx.x % 4 * 2;
                    if (x[0] == hidden) s[m][n][2 * i] = 0;
                    if (x[1] == hidden) s[m][n][2 * i + 1] = 0;
                }
}
/* The gradient of the bias from d, which lies as scores do: it goes by way of `extra`, which still says what is hidden.
 */
template <int M, int N>
__device__ __forceinline__ void attn_add_dbias(const attn_args &, const attn_tile &, int, int, int, int, float *,
                                               const float (&)[M][N][4])
{
}
template <int M, int N>
__device__ __forceinline__ void attn_add_dbias(const attn_pair_args &a, const attn_tile &t, int row0, int row_end,
                                               int column0, int column_end, float *extra, const float (&d)[M][N][4])
{
    constexpr int PITCH = attn_extra_row(8 * N);
    const int lane = threadIdx.x % 32, rows = row_end - row0, columns = column_end - column0;
    const float hidden = a.unit > 0 ? -INFINITY : INFINITY;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 *at = (float2 *)(extra + (16 * m + 8 * i + lane / 4) * PITCH + 8 * n + lane % 4 * 2);
                *at = {at->x == hidden ? 0 : d[m][n][2 * i], at->y == hidden ? 0 : d[m][n][2 * i + 1]};
            }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 16 * M && i < rows; i++) {
        float *to = attn_dbias<float>(a, t, row0 + i, column0);
#pragma unroll
        for (int c = lane; c < 8 * N; c += 32)
            if (c < columns) attn_put_dbias(a, to + c * (t.r * a.dbias_stride[3]), extra[i * PITCH + c]);
    }
    __syncwarp();
}

template <int M, int N> __device__ __forceinline__ void negate(float (&x)[M][N][4])
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[m][n][i] = -x[m][n][i];
}

/* is everything finite? by one thread */
template <int M, int N> __device__ __forceinline__ bool finite(const float (&c)[M][N][4])
{
    float probe = 0;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) probe += c[m][n][i] * 0;
    return probe == 0;
}
template <int M> __device__ __forceinline__ bool finite(const float (&x)[M][2])
{
    float probe = 0;
#pragma unroll
    for (int m = 0; m < M; m++) probe += x[m][0] * 0 + x[m][1] * 0;
    return probe == 0;
}

__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
/* the largest of the lane's numbers in its first row (i = 0) or second */
template <int N> __device__ __forceinline__ float row_max(const float (&x)[N][4], int i)
{
    float most = fmaxf(x[0][2 * i], x[0][2 * i + 1]);
#pragma unroll
    for (int n = 1; n < N; n++) most = fmaxf(most, fmaxf(x[n][2 * i], x[n][2 * i + 1]));
    return most;
}

/* ---- loads of tiles that a block keeps ---- */

/* attn_load(); QUICK, or where active blocks are all that there is: without its loop if the tensor can be read so */
template <class Tile, class T, int ROWS, int DP, int THREADS_, bool QUICK = false, class A>
__device__ __forceinline__ void attn_load_once(uint32_t to, const A &a, const attn_tensor &x, const attn_tile &t, int h,
                                               int shift, int first, int limit, bool padding)
{
    if constexpr (QUICK || attn_blocks_alone<A>) {
        const int64_t step = (int64_t)t.r * x.stride[1]; /* as attn_quick() */
        if (x.vec && !padding && step < 1 << 23 && step > -(1 << 23)) {
            attn_stream<Tile, T, ROWS, DP, THREADS_, true> rows;
            rows.start(a, x, t, h, shift, first);
            rows.next(to, a, x, t, h, first, limit);
            return;
        }
    }
    attn_load<Tile, T, ROWS, DP, THREADS_>(to, a, x, t, h, shift, first, limit, padding);
}

/* ---- results ---- */

/* Sums leave the registers by way of shared memory, a part of it that is the warp's own, and reach memory in whole
 * lines, four columns a lane: one loop knows about sums so far, ends of rows and rounding, where code for every
 * register would be longer than the rest of a kernel. Rows of DP floats, whose chunks of 16 bytes are swizzled. */
template <int DP> __device__ __forceinline__ float *attn_sum_at(float *sums, int row, int column)
{
    return sums + row * DP + ((column >> 2 ^ (row & 3) << 1) << 2) + (column & 3);
}
template <int DP, int M, int E> __device__ __forceinline__ void attn_stash(float *sums, const float (&x)[M][E][4])
{
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < E; e++)
                *(float2 *)attn_sum_at<DP>(sums, 16 * m + 8 * i + lane / 4,
                                           8 * e + lane % 4 * 2) = {x[m][e][2 * i], x[m][e][2 * i + 1]};
    __syncwarp();
}
/* row `row` as a lane of attn_slow.cuh has it */
template <int DP>
__device__ __forceinline__ void attn_stash_slow(float *sums, int row, const float (&x)[ATTN_SLOW_PARTS])
{
#pragma unroll 1
    for (int e = 0; e < DP / 32; e++) *attn_sum_at<DP>(sums, row, threadIdx.x % 32 + 32 * e) = x[e];
    __syncwarp();
}

/* Writes `count` rows that are this branch's alone, some at a time: where tiles are short, waiting for each shows. */
template <class T, int DP>
__device__ __forceinline__ void attn_write_alone(const attn_args &a, T *out, int columns, float *sums,
                                                 const attn_row<float> *rows, int count)
{
    constexpr int EACH = 4, APART = 32 / (DP / 4);
    const int column = threadIdx.x % (DP / 4) * 4;
#pragma unroll 1
    for (int row = threadIdx.x % 32 / (DP / 4); row < count && column < columns; row += EACH * APART) {
        float4 x[EACH];
        float own[EACH];
        int64_t at[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = min(row + e * APART, count - 1);
            x[e] = *(const float4 *)attn_sum_at<DP>(sums, i, column);
            own[e] = rows[i].own, at[e] = rows[i].at;
        }
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (row + e * APART < count)
                *(attn_four<T> *)(out + at[e] * a.head_dim +
                                  column) = {from_compute<T>(x[e].x * own[e]), from_compute<T>(x[e].y * own[e]),
                                             from_compute<T>(x[e].z * own[e]), from_compute<T>(x[e].w * own[e])};
    }
    __syncwarp();
}

/* QUICK, or where active blocks are all that there is: rows of one branch leave some at a time.
 * Writes `count` rows, columns from `first` on: the sums so far are added (factor `before`; 0: there are none) to `own`
 * times the row, which becomes the sums so far (attn_sums.cuh) or, if this branch is the row's last, rounded in `out`.
 */
template <class T, int DP, bool QUICK = false, class A, class S>
__device__ __forceinline__ void attn_write(const A &a, void *out, S so_far, float *sums, const attn_row<float> *rows,
                                           int count, int first = 0)
{
    const bool whole = a.head_dim % 4 == 0 && (uintptr_t)out % 16 == 0 && so_far.aligned();
    if constexpr (QUICK || attn_blocks_alone<A>)
        if (whole && a.ranks == 1) {
            attn_write_alone<T, DP>(a, (T *)out + first, a.head_dim - first, sums, rows, count);
            return;
        }
#pragma unroll 1
    for (int c = threadIdx.x % 32; c < count * (DP / 4); c += 32) {
        const int row = c / (DP / 4), column = c % (DP / 4) * 4, left = a.head_dim - first - column;
        if (left <= 0) continue;
        const attn_row<float> f = rows[row];
        const int64_t at = f.at * a.head_dim + first + column;
        const float4 v = *(const float4 *)attn_sum_at<DP>(sums, row, column);
        float x[4] = {v.x * f.own, v.y * f.own, v.z * f.own, v.w * f.own};
        if (whole) {
            if (f.before != 0) {
                const float4 old = so_far.four(at);
                x[0] += f.before * old.x, x[1] += f.before * old.y, x[2] += f.before * old.z, x[3] += f.before * old.w;
            }
            if (f.last)
                *(attn_four<T> *)((T *)out + at) = {from_compute<T>(x[0]), from_compute<T>(x[1]), from_compute<T>(x[2]),
                                                    from_compute<T>(x[3])};
            else so_far.put_four(at, x);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i >= left) break;
            if (f.before != 0) x[i] += f.before * so_far.one(at + i);
            if (f.last) ((T *)out)[at + i] = from_compute<T>(x[i]);
            else so_far.put(at + i, x[i]);
        }
    }
    __syncwarp();
}

/* what becomes of a row of the backward's results */
template <bool KEYS>
__device__ __forceinline__ attn_row<float> attn_summed(const attn_args &a, const attn_tile &t, int row, float own)
{
    const int64_t position = t.base + (int64_t)row * t.r;
    const int others = attn_others<KEYS>(a, t, (unsigned)position);
    const int64_t at =
        KEYS ? ((int64_t)t.b * a.m + position) * a.kv_heads + t.h / a.group : attn_stat(a, t, t.h, row, false);
    return {own, others & 1 ? 1.f : 0.f, at, !(others & 2)};
}

/* Rows [row0, row_end) of a warp leave the forward: sums o of weighted values, over those of their softmax, or
 * (`spoilt`) as attn_slow.cuh has them. A lane finishes a row: maximum and sum reach it through shared memory, and what
 * becomes of the row goes back so. `lane` is the thread's in its warp, which callers have, here and below. */
template <class T, int DP, bool QUICK = false, int M, class A>
__device__ __forceinline__ void
attn_leave_forward(const A &a, const attn_tile &t, int lane, float *sums, attn_row<float> *rows, int row0, int row_end,
                   bool spoilt, const float (&o)[M][DP / 8][4], const float (&top)[M][2], const float (&sum)[M][2])
{
    if (spoilt) {
        for (int i = 0; row0 + i < row_end; i++) {
            float x[ATTN_SLOW_PARTS], soft[2];
            attn_slow_row<T>(a, t, row0 + i, x, soft);
            attn_stash_slow<DP>(sums, i, x);
            rows[i] = {soft[0], soft[1], 0, true};
        }
    } else {
        attn_stash<DP>(sums, o);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float total = quad_sum(sum[m][i]);
                if (lane % 4 == 0) rows[16 * m + 8 * i + lane / 4] = {top[m][i], total, 0, false};
            }
    }
    __syncwarp();
    if (lane < 16 * M && row0 + lane < row_end) {
        const bool slow = rows[lane].last; /* has dropped pairs already */
        attn_row<float> f = attn_finish<float>(a, t, row0 + lane, rows[lane].own, rows[lane].before);
        if (a.p > 0 && !slow) f.own *= (float)a.keep_scale;
        rows[lane] = f;
    }
    __syncwarp();
    attn_write<T, DP, QUICK>(a, a.out, attn_f32_sums{(float *)a.acc}, sums, rows, row_end - row0);
}

/* SPLIT warps, APART from each other, that share rows and have sums of their own; the first leads. */
template <int SPLIT = 1, int APART = 1, class Meet = attn_block_meets> struct attn_split {
    static __device__ __forceinline__ bool leads() { return threadIdx.x / 32 / APART % SPLIT == 0; }
    /* Adds up sums of SIZE floats, in those of the one that leads, unless only that one has any. True in that one. */
    template <int SIZE> static __device__ __forceinline__ bool join(float *sums, bool all)
    {
        if constexpr (SPLIT > 1) {
            Meet()();
            if (!leads()) return false;
            if (all)
#pragma unroll 1
                for (int at = threadIdx.x % 32 * 4; at < SIZE; at += 128) {
                    float4 x = *(const float4 *)(sums + at);
#pragma unroll
                    for (int p = 1; p < SPLIT; p++) {
                        const float4 y = *(const float4 *)(sums + p * APART * SIZE + at);
                        x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
                    }
                    *(float4 *)(sums + at) = x;
                }
            __syncwarp();
        }
        return true;
    }
    /* Adds up two numbers that four lanes have, by way of x[0] and x[height]. */
    static __device__ __forceinline__ void share(float *x, int height, float &first, float &second)
    {
        static_assert(SPLIT <= 2, "one other");
        if constexpr (SPLIT > 1) {
            Meet()();
            if (!leads() && threadIdx.x % 4 == 0) x[0] = first, x[height] = second;
            Meet()();
            first += x[0], second += x[height];
        }
    }
};

/* The same for a result of the backward, `own` times the sums x: dq, or (KEYS) dk (`which` 0) or dv (1). */
template <bool KEYS, class T, int DP, class Split = attn_split<>, int M, class A>
__device__ __forceinline__ void attn_leave_backward(const A &a, const attn_tile &t, int lane, int which, float own,
                                                    float *sums, attn_row<float> *rows, int row0, int row_end,
                                                    bool spoilt, const float (&x)[M][DP / 8][4])
{
    if (spoilt)
        for (int i = 0; row0 + i < row_end && Split::leads(); i++) {
            float slow[1 + KEYS][ATTN_SLOW_PARTS] = {};
            if constexpr (KEYS) attn_slow_add_key<T>(a, t, row0 + i, slow[0], slow[1]);
            else attn_slow_add_query<T>(a, t, row0 + i, slow[0]);
            attn_stash_slow<DP>(sums, i, slow[which]);
        }
    else attn_stash<DP>(sums, x);
    if (!Split::template join<16 * M * DP>(sums, !spoilt)) return;
    if (lane < 16 * M && row0 + lane < row_end) rows[lane] = attn_summed<KEYS>(a, t, row0 + lane, own);
    __syncwarp();
    attn_write<T, DP>(a, which ? a.out2 : a.out, attn_f32_sums{(float *)(which ? a.acc2 : a.acc)}, sums, rows,
                      row_end - row0);
}

/* The branch's own deltas of a warp's rows from what its threads have of P (`weight`) and P dP (`dot`). Warps that
 * share rows do so by way of `shared`, whose rows are followed by as many after `height`. T: of the tensors where they
 * are taken apart, so that a key with an infinite number, whose weight may be 0, has none; such rows are summed up by
 * attn_slow.cuh. */
template <class T = void, class Split = attn_split<>, class A, int M>
__device__ __forceinline__ void attn_put_deltas(const A &a, const attn_tile &t, int lane, int row0, int row_end,
                                                const float (&weight)[M][2], const float (&dot)[M][2],
                                                float *shared = NULL, int height = 0)
{
    constexpr bool parts = !std::is_void_v<T>;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = 16 * m + 8 * i + lane / 4;
            float sum = quad_sum(weight[m][i]), all = quad_sum(dot[m][i]);
            Split::share(shared + at, height, sum, all);
            const bool mine = row0 + at < row_end && lane % 4 == 0 && Split::leads();
            const bool spoilt = parts && !(sum * 0 + all * 0 == 0);
            if (mine && !spoilt) attn_put_delta<float>(a, t, row0 + at, sum == 0 ? 0 : all / sum);
            if constexpr (parts)
#pragma unroll 1
                for (uint32_t lost = __ballot_sync(~0u, mine && spoilt); lost; lost &= lost - 1)
                    attn_slow_delta<T>(a, t, row0 + 16 * m + 8 * i + (__ffs((int)lost) - 1) / 4);
        }
}

/* bytes of the tiles, in which the results of `rows` rows find room afterwards */
constexpr size_t attn_tile_bytes(size_t tiles, size_t rows, size_t columns)
{
    return (tiles > rows * columns * sizeof(float) ? tiles : rows * columns * sizeof(float)) + ATTN_ALIGN;
}

#endif
