/* gelu_norm.cu: gelu and the layer norm that follows, in one pass over memory on CUDA.
 *
 * LongNet's feed-forward part normalises its widest tensor after the activation. Apart, the two operators move it four
 * times on the way there and six times back; here it is read and written once, and once more for the gradient. gelu is
 * computed again in the backward, from what went into it, so that its result need not be kept: that is a quarter of a
 * block's activations. Values are rounded where the operators would round them, so results and gradients are theirs bit
 * for bit, but for dgamma and dbeta, whose sums have another order (tests/cuda_shapes_spec.lua). Rows that rows.cuh
 * keeps in registers have the kernel; f64, strides and longer rows run the operators in turn.
 *
 * Instructions bound these kernels, not bytes: at a copy's rate a multiprocessor of an H200 has time for some 30 a bf16
 * on the way there and 45 on the way back, and they took 32 and 48, of which gelu 16 and 20. So bf16 looks gelu up in
 * shared memory, which by count is the bound then: eight bytes from random places take a multiprocessor six cycles for
 * an element of each of a warp's lanes. In the backward half of the elements are looked up and half computed, two rows
 * at a time; all looked up took 4% to 10% longer, one row at a time 10% (rows of 3072).
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

/* gelu and its derivative of every bf16 from 2^-28 to 16 and of their opposites, in shared memory: four instructions
 * and a read where the functions take twenty. Others are computed. An entry has `BYTES`: the first float is gelu,
 * rounded, the second its derivative. Entries of negative numbers begin at byte 2^15. */
enum { GELU_FIRST = (127 - 28) << 7, GELU_ENTRIES = 1 << 12 };
template <int BYTES> inline constexpr int gelu_table = (1 << 15) + GELU_ENTRIES *BYTES;
template <int BYTES> static __device__ __forceinline__ void fill_gelu_table(void *table)
{
    for (unsigned i = threadIdx.x; i < 2 * GELU_ENTRIES; i += blockDim.x) {
        unsigned number = i % GELU_ENTRIES, sign = i / GELU_ENTRIES << 15;
        float x = __uint_as_float((number + GELU_FIRST + sign) << 16), slope;
        float y = __bfloat162float(__float2bfloat16_rn(short_gelu_both(x, &slope)));
        char *to = (char *)table + sign + number * BYTES;
        if constexpr (BYTES == 8) *(float2 *)to = make_float2(y, slope);
        else *(float *)to = y;
    }
}
/* of x(0), x(8), ..., KEEP elements, the first SPLIT of 8; y is rounded */
template <int BYTES, int SPLIT, int KEEP, class X>
static __device__ __forceinline__ void look_gelu_up(const void *table, X x, float (&y)[KEEP], float (&slope)[KEEP])
{
#pragma unroll
    for (int k = 0; k < KEEP; k += 8) {
        uint4 raw = x(k).word;
        const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
        uint32_t at[4], outside = 0;
        auto compute = [&](int i) {
            float e = __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
            y[k + i] = __bfloat162float(__float2bfloat16_rn(short_gelu_both(e, slope + k + i)));
        };
#pragma unroll
        for (int i = 0; i < SPLIT / 2; i++) at[i] = (word[i] & 0x7fff7fffu) - GELU_FIRST * 0x10001u, outside |= at[i];
        if (outside & 0xf000f000u) {
#pragma unroll
            for (int i = 0; i < SPLIT; i++) compute(i);
        } else {
#pragma unroll
            for (int i = 0; i < SPLIT / 2; i++) {
                uint32_t o = at[i] * BYTES | (word[i] & 0x80008000u); /* places of both in the table */
                const char *low = (const char *)table + (o & 0xffff), *high = (const char *)table + (o >> 16);
                if constexpr (BYTES == 8) {
                    float2 a = *(const float2 *)low, b = *(const float2 *)high;
                    y[k + 2 * i] = a.x, slope[k + 2 * i] = a.y, y[k + 2 * i + 1] = b.x, slope[k + 2 * i + 1] = b.y;
                } else {
                    y[k + 2 * i] = *(const float *)low, y[k + 2 * i + 1] = *(const float *)high;
                }
            }
        }
#pragma unroll
        for (int i = SPLIT; i < 8; i++) compute(i);
    }
}

/* bf16 reads gelu from a table, so that one block with as many rows as fit fills a multiprocessor */
template <class T> inline constexpr bool looks_up = std::is_same_v<T, bf16>;
template <class T, int KEEP> inline constexpr int gelu_registers = norm_registers<T, KEEP> + (sizeof(T) == 4 ? 14 : 0);
template <class T, int ROW, int KEEP> constexpr int gelu_threads_of()
{
    int blocks = row_blocks<ROW>(gelu_registers<T, KEEP>), most = 1024 / row_threads<ROW>;
    return row_threads<ROW> * (!looks_up<T> ? 1 : blocks < most ? blocks : most);
}
template <class T, int ROW, int KEEP> inline constexpr int gelu_threads = gelu_threads_of<T, ROW, KEEP>();

template <class T, int ROW, int N, int KEEP>
__global__ void __launch_bounds__(gelu_threads<T, ROW, KEEP>,
                                  looks_up<T> ? 1 : row_blocks<ROW>(gelu_registers<T, KEEP>))
    gelu_norm_rows(gelu_norm_args a, const T *x, const T *gamma, const T *beta, T *act, T *out, float *mean,
                   float *rstd)
{
    constexpr bool TABLE = looks_up<T>;
    constexpr int ROWS = gelu_threads<T, ROW, KEEP> / ROW;
    extern __shared__ float4 norm_space[];
    __shared__ float space[TABLE ? gelu_threads<T, ROW, KEEP> / 32 : ROW_LONG / 32];
    if constexpr (TABLE) {
        fill_gelu_table<4>(norm_space);
        __syncthreads();
    }
    previous_done();
    for (int64_t r = (int64_t)blockIdx.x * ROWS + threadIdx.x / ROW; r < a.rows; r += (int64_t)gridDim.x * ROWS) {
        row<T, ROW, N, KEEP> v(x + r * a.n, a.n, 1);
        float e[KEEP];
        if constexpr (TABLE) {
            float none[KEEP];
            look_gelu_up<4, 8>(
                norm_space, [&](int k) { return v.kept[k / N]; }, e, none);
            if (act)
                v.places([&](int64_t first, int k) {
                    float y[N];
#pragma unroll
                    for (int i = 0; i < N; i++) y[i] = e[k + i];
                    *(row_access<T, N> *)(act + r * a.n + first) = row_pack<T, N>(y);
                });
        } else {
            v.places([&](int64_t first, int k) {
                float y[N];
                row_unpack<T, N>(v.kept[k / N], y);
#pragma unroll
                for (int i = 0; i < N; i++) y[i] = gelu_of<T>(y[i]);
                row_access<T, N> result = row_pack<T, N>(y);
                if (act) *(row_access<T, N> *)(act + r * a.n + first) = result;
                row_unpack<T, N>(result, y);
#pragma unroll
                for (int i = 0; i < N; i++) e[k + i] = y[i];
            });
        }
        normalise_row<TABLE>(v, e, a.eps, gamma, beta, out + r * a.n, mean + r, rstd + r,
                             space + (TABLE ? threadIdx.x / ROW * (ROW / 32) : 0));
    }
}

/* dx of the norm is rounded, then goes through gelu's derivative. AGAIN: it is summed over rows as it is stored, and
 * the norm's result is stored once more, for the product that read it */
template <class T, bool AGAIN> struct gelu_norm_back {
    enum { STREAMS = 2, COLUMNS = AGAIN ? 3 : 2, TABLE = looks_up<T> ? gelu_table<8> : 0 };
    const T *x, *g;
    T *dx;
    int64_t n;
    const T *beta;
    T *out; /* or NULL */
    template <int N> __device__ __forceinline__ void again(const T *at, const float (&y)[N]) const
    {
        if (out) row_store(out + (at - dx), row_pack<T, N>(y));
    }
    __device__ __forceinline__ void fill(void *table) const { fill_gelu_table<8>(table); }
    __device__ __forceinline__ int64_t step(int) const { return n; }
    __device__ __forceinline__ const T *row(int stream, int64_t r) const { return (stream ? g : x) + r * n; }
    template <int N, int KEEP, int ROWS> struct state {
        float slope[ROWS][KEEP];
        /* x becomes gelu of itself */
        template <class X> __device__ __forceinline__ void before(X x, float (&e)[KEEP], int u, const void *table)
        {
            if constexpr (TABLE > 0) {
                look_gelu_up<8, 4>(table, x, e, slope[u]);
                return;
            }
            unpack_kept<T, N>(x, e);
#pragma unroll
            for (int k = 0; k < KEEP; k += N) {
                float v[N];
#pragma unroll
                for (int i = 0; i < N; i++) v[i] = gelu_of<T>(e[k + i], &slope[u][k + i]);
                row_unpack<T, N>(row_pack<T, N>(v), v);
#pragma unroll
                for (int i = 0; i < N; i++) e[k + i] = v[i];
            }
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
        int status = 0;
        if constexpr (sizeof(T) < 8)
            with_rows<T>(j.n, true, [&](auto rt, auto nt, auto kt) {
                constexpr int ROW = decltype(rt)::value, N = decltype(nt)::value, KEEP = decltype(kt)::value;
                if constexpr (KEEP > 0) {
                    constexpr int threads = gelu_threads<T, ROW, KEEP>, shared = looks_up<T> ? gelu_table<4> : 0;
                    auto kernel = gelu_norm_rows<T, ROW, N, KEEP>;
                    static cudaError_t allowed =
                        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
                    status = lac_cuda_check("gelu_norm", allowed);
                    launch(kernel, blocks_filling(j.rows, threads / ROW, looks_up<T> ? 1 : 64), threads, shared, j,
                           (const T *)a->x.data, (const T *)a->gamma.data, (const T *)a->beta.data, (T *)a->act.data,
                           (T *)a->out.data, (float *)a->mean.data, (float *)a->rstd.data);
                }
            });
        LAC_TRY(status);
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
