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
 * Products of masked pairs are products with zero, and 0 times NaN is NaN: a tile whose result is not finite although
 * some pairs are masked is computed again by attn_slow.cuh.
 */
#ifndef LAC_CUDA_ATTN_MMA_CUH
#define LAC_CUDA_ATTN_MMA_CUH
#include "attn_pairs.cuh"

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

/* Hides from the compiler where x comes from: addresses computed from it are not kept in registers across the loop. */
__device__ __forceinline__ uint32_t attn_opaque(uint32_t x)
{
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ int64_t attn_opaque(int64_t x)
{
    asm volatile("" : "+l"(x));
    return x;
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

template <int DP> struct op_half {
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
};
template <int DP> struct op_bf16 : op_half<DP> {
    typedef bf16 T;
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        uint32_t r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    static __device__ __forceinline__ void left(uint32_t (&r)[4], const float (&x)[4], const float (&y)[4])
    {
        r[0] = pack(x[0], x[1]);
        r[1] = pack(x[2], x[3]);
        r[2] = pack(y[0], y[1]);
        r[3] = pack(y[2], y[3]);
    }
    static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
template <int DP> struct op_f16 : op_half<DP> {
    typedef f16 T;
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        uint32_t r;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    static __device__ __forceinline__ void left(uint32_t (&r)[4], const float (&x)[4], const float (&y)[4])
    {
        r[0] = pack(x[0], x[1]);
        r[1] = pack(x[2], x[3]);
        r[2] = pack(y[0], y[1]);
        r[3] = pack(y[2], y[3]);
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

/* c += P Y[0 .. 8 N)[all columns]; P as `scores` left it */
template <class Op, int M, int N, int E>
__device__ __forceinline__ void weighted(float (&c)[M][E][4], const float (&p)[M][N][4], uint32_t y)
{
    y = attn_opaque(y);
#pragma unroll
    for (int k = 0; k < N / Op::BLOCKS; k++) {
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

/* Scores of a warp's rows from row0 on, columns from column0 on (KEYS: rows are keys), += what options add to pairs;
 * rows and columns outside [.., row_end), [.., column_end) are left alone. */
template <bool KEYS, class T, int M, int N>
__device__ __forceinline__ void attn_add(const attn_args &, const attn_tile &, int, int, int, int, int,
                                         float (&)[M][N][4])
{
}
template <bool KEYS, class T, int M, int N>
__device__ __forceinline__ void attn_add(const attn_pair_args &a, const attn_tile &t, int h, int row0, int row_end,
                                         int column0, int column_end, float (&s)[M][N][4])
{
    const int lane = threadIdx.x % 32, column = column0 + lane % 4 * 2;
    const float unit = (float)a.unit;
    const int64_t step = attn_opaque(t.r * a.bias_stride[KEYS ? 2 : 3]); /* its multiples are not kept, either */
    if (a.bias)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = row0 + 16 * m + 8 * i + lane / 4;
                if (row >= row_end) continue;
                const int64_t n = t.base + (int64_t)(KEYS ? column : row) * t.r - a.shift;
                const int64_t key = t.base + (int64_t)(KEYS ? row : column) * t.r;
                const int64_t at = attn_pair_at(a.bias_stride, t.b, h, n, key);
#pragma unroll
                for (int x = 0; x < 2 * N; x++) {
                    const int c = x / 2 * 8 + x % 2;
                    if (column + c < column_end) s[m][x / 2][2 * i + x % 2] += unit * attn_bias<T>(a, at + c * step);
                }
            }
    if (a.slopes) {
        const float slope = (float)((double)((const float *)a.slopes)[h * a.slopes_stride] * a.unit * t.r);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int x = 0; x < 4 * N; x++) {
                const int i = x % 4 / 2, row = row0 + 16 * m + 8 * i + lane / 4;
                s[m][x / 4][x % 4] -= slope * fabsf((float)(row - column - (x / 4 * 8 + x % 2)));
            }
    }
}
/* the gradient of the bias: d as `attn_add` takes scores */
template <int M, int N>
__device__ __forceinline__ void attn_add_dbias(const attn_args &, const attn_tile &, int, int, int, int,
                                               const float (&)[M][N][4])
{
}
template <int M, int N>
__device__ __forceinline__ void attn_add_dbias(const attn_pair_args &a, const attn_tile &t, int row0, int row_end,
                                               int column0, int column_end, const float (&d)[M][N][4])
{
    const int lane = threadIdx.x % 32, column = column0 + lane % 4 * 2;
    const int64_t step = attn_opaque(t.r * a.dbias_stride[3]);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = row0 + 16 * m + 8 * i + lane / 4;
            if (row >= row_end) continue;
            float *to = attn_dbias<float>(a, t, row, column);
#pragma unroll
            for (int x = 0; x < 2 * N; x++) {
                const int c = x / 2 * 8 + x % 2;
                if (column + c < column_end) attn_put_dbias(a, to + c * step, d[m][x / 2][2 * i + x % 2]);
            }
        }
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

/* ---- results ---- */

/* Two neighbouring columns of a row: the sums so far are added (factor `before`; 0: there are none) and the row is
 * stored, in `acc` (f32) or, if this branch is the row's last, rounded in `out`. */
template <class T>
__device__ __forceinline__ void attn_put2(const attn_args &a, void *out, void *acc, int64_t row, int column, float x,
                                          float y, float before, bool last)
{
    if (column >= a.head_dim) return;
    int64_t at = row * a.head_dim + column;
    bool two = column + 1 < a.head_dim;
    const float *old = (const float *)acc + at;
    if (before != 0) {
        x += before * __ldcg(old);
        if (two) y += before * __ldcg(old + 1);
    }
    if (!last) {
        ((float *)acc)[at] = x;
        if (two) ((float *)acc)[at + 1] = y;
        return;
    }
    T *to = (T *)out + at;
    if (two && a.head_dim % 2 == 0) {
        struct alignas(2 * sizeof(T)) pair {
            T x, y;
        };
        *(pair *)to = {from_compute<T>(x), from_compute<T>(y)};
    } else {
        to[0] = from_compute<T>(x);
        if (two) to[1] = from_compute<T>(y);
    }
}

#endif
