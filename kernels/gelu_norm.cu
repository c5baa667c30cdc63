/* gelu_norm.cu: gelu and the layer norm that follows, in one pass over memory on CUDA.
 *
 * LongNet's feed-forward part normalises its widest tensor after the activation. Apart, the two operators move it four
 * times on the way there and six times back; here it is read and written once, and once more for the gradient. gelu is
 * computed again in the backward, from what went into it, so that its result need not be kept: that is a quarter of a
 * block's activations. Values are rounded where the operators would round them, so results and gradients are theirs bit
 * for bit, but for dgamma and dbeta, whose sums have another order (tests/cuda_shapes_spec.lua). Rows that rows.cuh
 * keeps in registers have the kernel; f64, strides and longer rows run the operators in turn.
 */
#include "norm.cuh"

template <class T> static __device__ __forceinline__ float gelu_of(float x)
{
    if constexpr (sizeof(T) == 2) return short_gelu(x);
    else return F_gelu(x);
}
template <class T> static __device__ __forceinline__ float gelu_grad_of(float x)
{
    if constexpr (sizeof(T) == 2) return short_gelu_grad(x);
    else return F_gelu_grad(x);
}
template <class T, int N> static __device__ __forceinline__ row_access<T, N> gelu_group(row_access<T, N> x)
{
    float e[N];
    row_unpack<T, N>(x, e);
#pragma unroll
    for (int i = 0; i < N; i++) e[i] = gelu_of<T>(e[i]);
    return row_pack<T, N>(e);
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
    __shared__ float space[ROW_LONG / 32];
    NEXT_ROWS(ROW, a.rows)
    {
        row<T, ROW, N, KEEP> v(x + r * a.n, a.n, 1);
#pragma unroll
        for (int k = 0; k < KEEP / N; k++) {
            int first = (k * ROW + v.lane) * N;
            if (first >= (int)a.n) break;
            v.kept[k] = gelu_group<T, N>(v.kept[k]);
            if (act) *(row_access<T, N> *)(act + r * a.n + first) = v.kept[k];
        }
        normalise_row(v, a.eps, gamma, beta, out + r * a.n, mean + r, rstd + r, space);
    }
}

/* beside what a layer norm needs: gelu of the row */
template <class T, int ROW, int KEEP>
inline constexpr int gelu_norm_blocks = row_blocks<ROW>(backward_registers<T, KEEP> + KEEP * (int)sizeof(T) / 4);

template <class T, int ROW, int N, int KEEP>
__global__ void __launch_bounds__(row_threads<ROW>, gelu_norm_blocks<T, ROW, KEEP>)
    gelu_norm_bwd_rows(gelu_norm_args a, const T *x, const T *gamma, const float *mean, const float *rstd, const T *g,
                       T *dx, float *share)
{
    typedef row<T, ROW, N, KEEP> values;
    __shared__ float space[ROW == 32 ? KEEP * ROW : 2 * ROW_LONG / 32];
    float dgamma[KEEP] = {}, dbeta[KEEP] = {}, share_of_mean = 1.0f / (float)a.n;
    values fixed(gamma, gamma ? a.n : 0, 1);
    auto product = [&](const float(&d)[N], int k, float(&p)[N]) {
        for (int i = 0; i < N; i++) p[i] = 1;
        if (gamma) fixed.group(0, k, p);
        for (int i = 0; i < N; i++) p[i] *= d[i]; /* g gamma */
    };
    /* of a half type the next row is on its way while this one is worked on: there are too few warps to hide it */
    constexpr bool AHEAD = sizeof(T) == 2;
    auto at = [&](int64_t r, const T *from) {
        return values(r < a.rows ? from + r * a.n : from, r < a.rows ? a.n : 0, 1);
    };
    int64_t start = (int64_t)blockIdx.x * (row_threads<ROW> / ROW) + threadIdx.x / ROW;
    int64_t step = (int64_t)gridDim.x * (row_threads<ROW> / ROW);
    values next_x = at(AHEAD ? start : a.rows, x), next_g = at(AHEAD ? start : a.rows, g);
    for (int64_t r = start; r < a.rows; r += step) {
        values v = AHEAD ? next_x : at(r, x), w = AHEAD ? next_g : at(r, g), act = v;
        if (AHEAD) next_x = at(r + step, x), next_g = at(r + step, g);
        float m = mean[r], s = rstd[r], total = 0, dot = 0;
#pragma unroll
        for (int k = 0; k < KEEP; k += N) act.kept[k / N] = gelu_group<T, N>(v.kept[k / N]);
        act.groups([&](float(&e)[N], int64_t first, int k) {
            float d[N], p[N];
            w.group(first, k, d);
            product(d, k, p);
#pragma unroll
            for (int i = 0; i < N; i++) {
                float z = (e[i] - m) * s;
                total += p[i];
                dot += p[i] * z;
                dgamma[k + i] += d[i] * z;
                dbeta[k + i] += d[i];
            }
        });
        row_sums<ROW>(&total, &dot, space);
        total *= share_of_mean;
        dot /= (float)a.n;
        act.store_groups(dx + r * a.n, [&](float(&e)[N], int64_t first, int k) {
            float d[N], p[N];
            w.group(first, k, d);
            product(d, k, p);
#pragma unroll
            for (int i = 0; i < N; i++) e[i] = s * (p[i] - total - (e[i] - m) * s * dot);
            row_unpack<T, N>(row_pack<T, N>(e), e);
            v.group(first, k, d);
#pragma unroll
            for (int i = 0; i < N; i++) e[i] *= gelu_grad_of<T>(d[i]);
        });
    }
    if (!share) return;
    __syncthreads();
    store_share<ROW, N, KEEP>(dgamma, share + (int64_t)blockIdx.x * 2 * a.n, a.n, space);
    store_share<ROW, N, KEEP>(dbeta, share + (int64_t)blockIdx.x * 2 * a.n + a.n, a.n, space);
}

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
    return lac_cuda_map1_bwd(&back);
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
                    gelu_norm_rows<T, ROW, N, KEEP>
                        <<<blocks_filling(j.rows, row_threads<ROW> / ROW, 64), row_threads<ROW>, 0, lac_cuda_stream>>>(
                            j, (const T *)a->x.data, (const T *)a->gamma.data, (const T *)a->beta.data,
                            (T *)a->act.data, (T *)a->out.data, (float *)a->mean.data, (float *)a->rstd.data);
            });
        return lac_cuda_launched("gelu_norm");
    });
}

extern "C" int lac_cuda_gelu_norm_bwd(const lac_a_gelu_norm_bwd *a)
{
    const char *op = "gelu_norm_bwd";
    const lac_view *list[] = {&a->x, &a->g, &a->dx};
    gelu_norm_args j = args_of(&a->x, 0);
    if (a->act.data || j.rows * j.n == 0 || !rows_kept(list, 3, &a->gamma, NULL)) return in_turn(a);
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        bool shares = a->dgamma.data || a->dbeta.data;
        int status = 0;
        if constexpr (sizeof(T) < 8)
            with_rows<T>(j.n, true, [&](auto rt, auto nt, auto kt) {
                constexpr int ROW = decltype(rt)::value, N = decltype(nt)::value, KEEP = decltype(kt)::value;
                if constexpr (KEEP > 0)
                    status = norm_shared<T>(
                        op, j.rows, j.n, row_threads<ROW> / ROW, gelu_norm_blocks<T, ROW, KEEP>, shares, &a->dgamma,
                        &a->dbeta, [&](unsigned blocks, float *share) {
                            gelu_norm_bwd_rows<T, ROW, N, KEEP><<<blocks, row_threads<ROW>, 0, lac_cuda_stream>>>(
                                j, (const T *)a->x.data, (const T *)a->gamma.data, (const float *)a->mean.data,
                                (const float *)a->rstd.data, (const T *)a->g.data, (T *)a->dx.data, share);
                        });
            });
        return status;
    });
}
