/* residual.cu: a residual connection, its dropout and the layer norm that follows, in one pass over memory on CUDA.
 *
 * sum = x + dropout(h) and out = layernorm(sum) read two tensors and write two; the three operators apart read four and
 * write three. The backward reads the sum and both gradients and writes that of x (and, with dropout, of h): three
 * reads and a write or two instead of five and three. Values are rounded where the operators would round them, so
 * results and gradients are theirs bit for bit (tests/cuda_shapes_spec.lua). Rows that rows.cuh keeps in registers have
 * the kernel; f64, strides and longer rows run the operators in turn.
 */
#include "norm_bwd.cuh"
#include "rng.h"

struct residual_args {
    int64_t rows, n;
    float eps, p, scale;
    uint64_t seed, offset;
};

/* what dropout makes of N neighbours, the first of which has number `at`; rounded to T */
template <class T, int N> static __device__ __forceinline__ void drop(const residual_args &a, int64_t at, float (&v)[N])
{
#pragma unroll
    for (int b = 0; b < N; b += 4) {
        uint32_t word[4];
        lac_philox(a.seed, a.offset, (uint64_t)(at + b) / 4, word);
#pragma unroll
        for (int i = 0; i < 4; i++) v[b + i] = lac_rng_keep(word[i], a.p) ? v[b + i] * a.scale : 0;
    }
    row_unpack<T, N>(row_pack<T, N>(v), v);
}

template <class T, int ROW, int N, int KEEP>
__global__ void __launch_bounds__(row_threads<ROW>, row_blocks<ROW>(2 * forward_registers<T, KEEP> - ROW_REGISTERS))
    residual_rows(residual_args a, const T *x, const T *h, const T *gamma, const T *beta, T *sum, T *out, float *mean,
                  float *rstd)
{
    previous_done();
    __shared__ float space[ROW_LONG / 32];
    NEXT_ROWS(ROW, a.rows)
    {
        row<T, ROW, N, KEEP> v(x + r * a.n, a.n, 1), w(h + r * a.n, a.n, 1);
#pragma unroll
        for (int k = 0; k < KEEP / N; k++) {
            int first = (k * ROW + v.lane) * N;
            if (first >= (int)a.n) break;
            float e[N], d[N];
            row_unpack<T, N>(v.kept[k], e);
            row_unpack<T, N>(w.kept[k], d);
            if (a.p > 0) drop<T, N>(a, r * a.n + first, d);
#pragma unroll
            for (int i = 0; i < N; i++) e[i] += d[i];
            v.kept[k] = row_pack<T, N>(e);
            *(row_access<T, N> *)(sum + r * a.n + first) = v.kept[k];
        }
        normalise_row(v, a.eps, gamma, beta, out + r * a.n, mean + r, rstd + r, space);
    }
}

/* dx of the norm is rounded, then the sum's own gradient is added; with dropout that of h follows from it */
template <class T> struct residual_back {
    enum { STREAMS = 3, COLUMNS = 2, TABLE = 0, OWN = false };
    residual_args a;
    const T *sum, *g, *g_sum;
    T *dx, *dh;
    __device__ __forceinline__ int64_t step(int stream) const { return stream < 2 || g_sum ? a.n : 0; }
    __device__ __forceinline__ const T *row(int stream, int64_t r) const
    {
        return (stream == 0 ? sum : stream == 1 ? g : g_sum) + r * step(stream);
    }
    template <int N, int KEEP, int ROWS> struct state {
        template <class X> __device__ __forceinline__ void before(X x, float (&e)[KEEP], int, const void *)
        {
            unpack_kept<T, N>(x, e);
        }
        __device__ __forceinline__ void after(const residual_back &p, T *dx, int, int, float (&e)[N],
                                              const row_access<T, N> *g_sum) const
        {
            row_access<T, N> result = row_pack<T, N>(e);
            if (p.g_sum) {
                float d[N];
                row_unpack<T, N>(result, e);
                row_unpack<T, N>(*g_sum, d);
#pragma unroll
                for (int i = 0; i < N; i++) e[i] += d[i];
                result = row_pack<T, N>(e);
            }
            row_store(dx, result);
            if (!p.dh) return;
            row_unpack<T, N>(result, e);
            drop<T, N>(p.a, dx - p.dx, e);
            row_store(p.dh + (dx - p.dx), row_pack<T, N>(e));
        }
    };
};

/* ---- launching ---- */

static residual_args args_of(const lac_view *v, double eps, double p, uint64_t seed, uint64_t offset)
{
    int64_t n = v->shape[v->ndim - 1];
    return {n ? numel(v) / n : 0, n, (float)eps, (float)p, (float)(1.0 / (1.0 - p)), seed, offset};
}

/* the operators in turn; as c/cpu/norm.c */
static int in_turn(const lac_a_residual_norm *a)
{
    lac_a_dropout drop = {a->h, a->sum, a->p, a->seed, a->offset};
    lac_a_copy copy = {a->h, a->sum};
    lac_a_axpy add = {1, a->x, a->sum};
    lac_a_layernorm norm = {a->sum, a->gamma, a->beta, a->out, a->mean, a->rstd, a->eps};
    LAC_TRY(a->p > 0 ? lac_cuda_dropout(&drop) : lac_cuda_copy(&copy));
    LAC_TRY(lac_cuda_axpy(&add));
    return lac_cuda_layernorm(&norm);
}

static int in_turn(const lac_a_residual_norm_bwd *a)
{
    lac_a_layernorm_bwd norm = {a->sum, a->gamma, a->mean, a->rstd, a->g, a->dx, a->dgamma, a->dbeta};
    lac_a_axpy add = {1, a->g_sum, a->dx};
    lac_a_dropout drop = {a->dx, a->dh, a->p, a->seed, a->offset};
    LAC_TRY(lac_cuda_layernorm_bwd(&norm));
    if (a->g_sum.data) LAC_TRY(lac_cuda_axpy(&add));
    return a->dh.data ? lac_cuda_dropout(&drop) : 0;
}

extern "C" int lac_cuda_residual_norm(const lac_a_residual_norm *a)
{
    const lac_view *list[] = {&a->x, &a->h, &a->sum, &a->out};
    residual_args j = args_of(&a->x, a->eps, a->p, a->seed, a->offset);
    if (j.rows * j.n == 0) return 0;
    if (!rows_kept(list, 4, &a->gamma, &a->beta)) return in_turn(a);
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        if constexpr (sizeof(T) < 8)
            with_rows<T>(j.n, true, [&](auto rt, auto nt, auto kt) {
                constexpr int ROW = decltype(rt)::value, N = decltype(nt)::value, KEEP = decltype(kt)::value;
                if constexpr (KEEP > 0)
                    launch(residual_rows<T, ROW, N, KEEP>, blocks_filling(j.rows, row_threads<ROW> / ROW, 64),
                           row_threads<ROW>, 0, j, (const T *)a->x.data, (const T *)a->h.data, (const T *)a->gamma.data,
                           (const T *)a->beta.data, (T *)a->sum.data, (T *)a->out.data, (float *)a->mean.data,
                           (float *)a->rstd.data);
            });
        return lac_cuda_launched("residual_norm");
    });
}

extern "C" int lac_cuda_residual_norm_bwd(const lac_a_residual_norm_bwd *a)
{
    const char *op = "residual_norm_bwd";
    const lac_view *list[] = {&a->sum, &a->g, &a->g_sum, &a->dx, &a->dh};
    residual_args j = args_of(&a->sum, 0, a->p, a->seed, a->offset);
    if (j.rows * j.n == 0 || !rows_kept(list, 5, &a->gamma, NULL)) return in_turn(a);
    return dispatch_float(a->sum.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        if constexpr (sizeof(T) < 8) {
            norm_grad<T> norm = {
                j.rows, j.n, (const T *)a->gamma.data, (const float *)a->mean.data, (const float *)a->rstd.data, NULL};
            residual_back<T> back = {j,
                                     (const T *)a->sum.data,
                                     (const T *)a->g.data,
                                     (const T *)a->g_sum.data,
                                     (T *)a->dx.data,
                                     (T *)a->dh.data};
            return norm_bwd_run<T>(op, norm, back, &a->dgamma, &a->dbeta);
        } else {
            return (int)LAC_E_INTERNAL; /* f64 runs in turn */
        }
    });
}
