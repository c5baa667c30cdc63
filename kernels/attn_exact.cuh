/* attn_exact.cuh: products of tiles by plain multiply-adds, for attention in f64, and in f32 without TF32 where
 * attn_parts.cuh does not run (head dimensions above 128, little shared memory).
 *
 * 128 threads as 16 x 8: a thread has R rows (16 apart) and some columns (8 apart). Both products read 16 bytes at a
 * time from shared memory; rows are 16 bytes longer than the data, so that the four rows or eight columns that a warp
 * reads at once lie in different banks. With 8 x 8 scores a thread, 16 reads feed 256 multiply-adds: arithmetic is the
 * limit. The second product's left operand goes through shared memory, because its rows and columns belong to other
 * threads.
 *
 * Rejected: one kernel for all head dimensions (accumulators must be indexed by constants).
 */
#ifndef LAC_CUDA_ATTN_EXACT_CUH
#define LAC_CUDA_ATTN_EXACT_CUH
#include "attn_pairs.cuh"
#include "attn_slow.cuh"

enum { EXACT_THREADS = 128 };

template <class C_, int DP_, int R_, int S_> struct exact {
    typedef C_ C;
    enum {
        DP = DP_,
        R = R_,
        S = S_,
        V = 16 / (int)sizeof(C),
        ROW = DP + V,
        P_ROW = 8 * S + V,
        BM = 16 * R,
        BN = 8 * S,
        E = DP / 8
    };
    struct alignas(16) vector {
        C x[V];
    };
    static __device__ __forceinline__ uint32_t at(int row, int chunk)
    {
        return (uint32_t)((row * ROW + chunk * V) * (int)sizeof(C));
    }
    static __device__ __forceinline__ int row() { return threadIdx.x / 8; }
    static __device__ __forceinline__ int column() { return threadIdx.x % 8; }

    /* c[i][j] = x[row + 16 i] . y[column + 8 j] */
    static __device__ __forceinline__ void scores(C (&c)[R][S], const C *x, const C *y)
    {
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < S; j++) c[i][j] = 0;
#pragma unroll 2
        for (int d = 0; d < DP; d += V) {
            vector a[R];
#pragma unroll
            for (int i = 0; i < R; i++) a[i] = *(const vector *)(x + (row() + 16 * i) * ROW + d);
#pragma unroll
            for (int j = 0; j < S; j++) {
                const vector b = *(const vector *)(y + (column() + 8 * j) * ROW + d);
#pragma unroll
                for (int i = 0; i < R; i++)
#pragma unroll
                    for (int v = 0; v < V; v++) c[i][j] = fma(a[i].x[v], b.x[v], c[i][j]);
            }
        }
    }
    static __device__ __forceinline__ void put(C *p, const C (&c)[R][S])
    {
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < S; j++) p[(row() + 16 * i) * P_ROW + column() + 8 * j] = c[i][j];
    }
    /* column of the result that c[i][e] holds */
    static __device__ __forceinline__ int place(int e) { return (column() + e / V * 8) * V + e % V; }
    /* c += p y: all BN rows of y */
    static __device__ __forceinline__ void weighted(C (&c)[R][E], const C *p, const C *y)
    {
#pragma unroll 1
        for (int j = 0; j < BN; j += V) {
            vector a[R];
#pragma unroll
            for (int i = 0; i < R; i++) a[i] = *(const vector *)(p + (row() + 16 * i) * P_ROW + j);
#pragma unroll
            for (int v = 0; v < V; v++)
#pragma unroll
                for (int e = 0; e < E; e += V) {
                    const vector b = *(const vector *)(y + (j + v) * ROW + place(e));
#pragma unroll
                    for (int i = 0; i < R; i++)
#pragma unroll
                        for (int u = 0; u < V; u++) c[i][e + u] = fma(a[i].x[v], b.x[u], c[i][e + u]);
                }
        }
    }
    /* is bit column + 8 j of the row's mask set? */
    static __device__ __forceinline__ bool bit(const uint64_t *rows, int i, int j)
    {
        return rows[row() + 16 * i] >> (column() + 8 * j) & 1;
    }
    /* `seen` of BM rows from row0 on, less what options of single pairs hide; by the warps in turn */
    static __device__ __forceinline__ void hide(const attn_pair_args &a, const attn_tile &t, uint64_t *seen, int first,
                                                int end)
    {
        if (!attn_hides(a) && end >= first + BN) return;
        __syncthreads();
        for (int i = threadIdx.x / 32; i < BM; i += EXACT_THREADS / 32) {
            const uint64_t shown = attn_row_shown<C, false>(a, t, t.h, t.first + i, first, end);
            if (threadIdx.x % 32 == 0) seen[i] &= shown;
        }
    }
    /* What options add to pairs within the ends, into p; KEYS: rows are keys. Keys are neighbours in memory. */
    template <bool KEYS>
    static __device__ __forceinline__ void gather(const attn_pair_args &a, const attn_tile &t, int h, int row_end,
                                                  int column0, int column_end, C *p)
    {
        if (!a.bias && !a.slopes) return;
#pragma unroll 2
        for (int at = threadIdx.x; at < BM * BN; at += EXACT_THREADS) {
            const int i = KEYS ? at % BM : at / BN, j = KEYS ? at / BM : at % BN, x = t.first + i, y = column0 + j;
            const bool in = x < row_end && y < column_end;
            p[i * P_ROW + j] = !in ? C(0) : KEYS ? attn_added<C>(a, t, h, y, x) : attn_added<C>(a, t, h, x, y);
        }
    }
    /* scores += what lies in p, where the thread puts its own numbers afterwards */
    static __device__ __forceinline__ void add(const attn_pair_args &a, const C *p, C (&c)[R][S])
    {
        if (!a.bias && !a.slopes) return;
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < S; j++) c[i][j] += p[(row() + 16 * i) * P_ROW + column() + 8 * j];
    }
    /* the gradient of the bias from p */
    static __device__ __forceinline__ void add_dbias(const attn_pair_args &a, const attn_tile &t, int column0,
                                                     int column_end, const C *p)
    {
#pragma unroll 1
        for (int at = threadIdx.x; at < BM * BN; at += EXACT_THREADS) {
            const int i = at / BN, j = at % BN, x = t.first + i, y = column0 + j;
            if (x < t.end && y < column_end) attn_put_dbias(a, attn_dbias<C>(a, t, x, y), p[i * P_ROW + j]);
        }
    }
    static __device__ __forceinline__ C row_sum(C x)
    {
#pragma unroll
        for (int o = 1; o < 8; o *= 2) x += __shfl_xor_sync(~0u, x, o);
        return x;
    }
    static __device__ __forceinline__ C row_max(C x)
    {
#pragma unroll
        for (int o = 1; o < 8; o *= 2) {
            C y = __shfl_xor_sync(~0u, x, o);
            x = y > x ? y : x;
        }
        return x;
    }
    static __device__ __forceinline__ void clear(C (&c)[R][E])
    {
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int e = 0; e < E; e++) c[i][e] = 0;
    }
    static __device__ __forceinline__ bool finite(const C (&c)[R][E])
    {
        C probe = 0;
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int e = 0; e < E; e++) probe += c[i][e] * 0;
        return probe == 0;
    }
    /* one element of a result: see attn_put2 */
    static __device__ __forceinline__ void store(const attn_args &a, void *out, void *acc, int64_t row, int column, C x,
                                                 C before, bool last)
    {
        if (column >= a.head_dim) return;
        int64_t at = row * a.head_dim + column;
        if (before != 0) x += before * __ldcg((const C *)acc + at);
        ((C *)(last ? out : acc))[at] = x;
    }
};

#endif
