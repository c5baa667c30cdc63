/* gelu_norm.cu: gelu and the layer norm that follows, in one pass over memory on CUDA.
 *
 * LongNet's feed-forward part normalises its widest tensor after the activation. Apart, the two operators move it four
 * times on the way there and six times back; here it is read and written once, and once more for the gradient. gelu is
 * computed again in the backward, from what went into it, so that its result need not be kept: that is a quarter of a
 * block's activations. Values are rounded where the operators would round them, so results and gradients are theirs bit
 * for bit, but for dgamma and dbeta, whose sums have another order (tests/cuda_shapes_spec.lua). Rows that rows.cuh
 * keeps in registers have the kernel; f64, strides and longer rows run the operators in turn.
 */
#include "norm_bwd.cuh"
#include "sum.cuh"

template <class T> static __device__ __forceinline__ float gelu_of(float x)
{
    if constexpr (sizeof(T) == 2) return short_gelu(x);
    else return F_gelu(x);
}
/* and its derivative */
template <class T> static __device__ __forceinline__ float gelu_of(float x, float *slope)
{
    if constexpr (sizeof(T) == 2) return short_gelu_both(x, slope);
    else return F_gelu_both(x, slope);
}
struct gelu_norm_args {
    int64_t rows, n;
    float eps;
};

template <class T, int ROW, int N, int KEEP>
__global__ void __launch_bounds__(row_threads<ROW>, row_blocks<ROW>(forward_registers<T, KEEP>))
    gelu_norm_rows(gelu_norm_args a, const T *x, const T *gamma, const T *beta, T *act, T *out, float *mean,
                   float *rstd)
{
    previous_done();
    __shared__ float space[ROW_LONG / 32];
    NEXT_ROWS(ROW, a.rows)
    {
        row<T, ROW, N, KEEP> v(x + r * a.n, a.n, 1);
#pragma unroll
        for (int k = 0; k < KEEP / N; k++) {
            int first = (k * ROW + v.lane) * N;
            float e[N];
            if (first >= (int)a.n) break;
            row_unpack<T, N>(v.kept[k], e);
#pragma unroll
            for (int i = 0; i < N; i++) e[i] = gelu_of<T>(e[i]);
            v.kept[k] = row_pack<T, N>(e);
            if (act) *(row_access<T, N> *)(act + r * a.n + first) = v.kept[k];
        }
        normalise_row(v, a.eps, gamma, beta, out + r * a.n, mean + r, rstd + r, space);
    }
}

/* dx of the norm is rounded, then goes through gelu's derivative. AGAIN: it is summed over rows as it is stored, and
 * the norm's result is stored once more, for the product that read it */
template <class T, bool AGAIN> struct gelu_norm_back {
    enum { STREAMS = 2, COLUMNS = AGAIN ? 3 : 2 };
    const T *x, *g;
    T *dx;
    int64_t n;
    const T *beta;
    T *out; /* or NULL */
    template <int N> __device__ __forceinline__ void again(const T *at, const float (&y)[N]) const
    {
        if (out) row_store(out + (at - dx), row_pack<T, N>(y));
    }
    __device__ __forceinline__ int64_t step(int) const { return n; }
    __device__ __forceinline__ const T *row(int stream, int64_t r) const { return (stream ? g : x) + r * n; }
    template <int N, int KEEP, int ROWS> struct state {
        float slope[ROWS][KEEP];
        /* x becomes gelu of itself */
        __device__ __forceinline__ void before(float (&e)[N], int u, int k)
        {
#pragma unroll
            for (int i = 0; i < N; i++) e[i] = gelu_of<T>(e[i], &slope[u][k + i]);
            row_unpack<T, N>(row_pack<T, N>(e), e);
        }
        __device__ __forceinline__ void after(const gelu_norm_back &, T *dx, int u, int k, float (&e)[N],
                                              const row_access<T, N> *) const
        {
            row_unpack<T, N>(row_pack<T, N>(e), e);
#pragma unroll
            for (int i = 0; i < N; i++) e[i] *= slope[u][k + i];
            row_access<T, N> result = row_pack<T, N>(e);
            row_store(dx, result);
            if constexpr (AGAIN) row_unpack<T, N>(result, e);
        }
    };
};

/* ---- launching ---- */

static gelu_norm_args args_of(const lac_view *v, double eps)
{
    int64_t n = v->shape[v->ndim - 1];
    return {n ? numel(v) / n : 0, n, (float)eps};
}

/* as c/cpu/norm.c */
static int in_turn(const lac_a_gelu_norm *a)
{
    lac_a_map1 gelu = {M1_gelu, a->x, a->act.data ? a->act : a->out};
    lac_a_layernorm norm = {gelu.out, a->gamma, a->beta, a->out, a->mean, a->rstd, a->eps};
    LAC_TRY(lac_cuda_map1(&gelu));
    return lac_cuda_layernorm(&norm);
}

/* what may be wanted beside the gradients */
static int beside(const lac_a_gelu_norm_bwd *a)
{
    if (a->out.data) {
        int64_t bytes = numel(&a->mean) * dtype_bytes(a->mean.dtype);
        lac_scratch space("gelu_norm_bwd", (size_t)(2 * bytes + 1));
        lac_a_gelu_norm norm = {a->x, a->gamma, a->beta, {}, a->out, a->mean, a->rstd, a->eps};
        if (!space.data) return LAC_E_MEMORY;
        norm.mean.data = space.data, norm.rstd.data = (char *)space.data + bytes;
        norm.mean.stride[0] = norm.rstd.stride[0] = 1;
        LAC_TRY(lac_cuda_gelu_norm(&norm));
    }
    return lac_cuda_column_sums(&a->dx, &a->sums);
}

static int in_turn(const lac_a_gelu_norm_bwd *a)
{
    lac_a_map1 gelu = {M1_gelu, a->x, a->dx};
    lac_a_layernorm_bwd norm = {a->act, a->gamma, a->mean, a->rstd, a->g, a->dx, a->dgamma, a->dbeta};
    lac_a_map1_bwd back = {M1_gelu, a->x, a->x, a->dx, a->dx};
    size_t bytes = (size_t)numel(&a->x) * (size_t)dtype_bytes(a->x.dtype);
    lac_scratch space("gelu_norm_bwd", a->act.data ? 1 : bytes);
    if (!space.data) return LAC_E_MEMORY;
    if (!a->act.data) { /* the norm's backward reads a row several times: not the place it writes */
        gelu.out.data = space.data;
        norm.x = gelu.out;
        LAC_TRY(lac_cuda_map1(&gelu));
    }
    LAC_TRY(lac_cuda_layernorm_bwd(&norm));
    LAC_TRY(lac_cuda_map1_bwd(&back));
    return beside(a);
}

extern "C" int lac_cuda_gelu_norm(const lac_a_gelu_norm *a)
{
    const lac_view *list[] = {&a->x, &a->act, &a->out};
    gelu_norm_args j = args_of(&a->x, a->eps);
    if (j.rows * j.n == 0) return 0;
    if (!rows_kept(list, 3, &a->gamma, &a->beta)) return in_turn(a);
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        if constexpr (sizeof(T) < 8)
            with_rows<T>(j.n, true, [&](auto rt, auto nt, auto kt) {
                constexpr int ROW = decltype(rt)::value, N = decltype(nt)::value, KEEP = decltype(kt)::value;
                if constexpr (KEEP > 0)
                    launch(gelu_norm_rows<T, ROW, N, KEEP>, blocks_filling(j.rows, row_threads<ROW> / ROW, 64),
                           row_threads<ROW>, 0, j, (const T *)a->x.data, (const T *)a->gamma.data,
                           (const T *)a->beta.data, (T *)a->act.data, (T *)a->out.data, (float *)a->mean.data,
                           (float *)a->rstd.data);
            });
        return lac_cuda_launched("gelu_norm");
    });
}

extern "C" int lac_cuda_gelu_norm_bwd(const lac_a_gelu_norm_bwd *a)
{
    const char *op = "gelu_norm_bwd";
    const lac_view *list[] = {&a->x, &a->g, &a->dx, &a->out};
    gelu_norm_args j = args_of(&a->x, 0);
    bool again = (a->out.data || a->sums.data) && j.n <= 16 * BACK_WIDE;
    if (a->act.data || j.rows * j.n == 0 || !rows_kept(list, 4, &a->gamma, &a->beta)) return in_turn(a);
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        if constexpr (sizeof(T) < 8) {
            norm_grad<T> norm = {
                j.rows, j.n, (const T *)a->gamma.data, (const float *)a->mean.data, (const float *)a->rstd.data, NULL};
            const T *x = (const T *)a->x.data, *g = (const T *)a->g.data, *beta = (const T *)a->beta.data;
            T *dx = (T *)a->dx.data, *out = (T *)a->out.data;
            if (again) {
                gelu_norm_back<T, true> back = {x, g, dx, j.n, beta, out};
                return norm_bwd_run<T>(op, norm, back, &a->dgamma, &a->dbeta, &a->sums);
            }
            gelu_norm_back<T, false> back = {x, g, dx, j.n, NULL, NULL};
            LAC_TRY(norm_bwd_run<T>(op, norm, back, &a->dgamma, &a->dbeta));
            return beside(a);
        } else {
            return (int)LAC_E_INTERNAL; /* f64 runs in turn */
        }
    });
}
