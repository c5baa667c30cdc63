/* move.cu: copy and cast, where, fill and arange on CUDA.
 *
 * A copy that changes no dtype only moves bytes: dense runs 16 bytes at a time, long ones by the driver, planes that a
 * transposition turns round through 32 x 32 tiles in shared memory (so that both sides are read and written along
 * memory), everything else by a loop nest. Casts between the floating-point types have dense kernels of their own,
 * since mixed-precision training makes them hot; any other pair of dtypes goes through one kernel that switches on both
 * at run time. Rounding is that of the CPU: once, to nearest even; to integers towards zero, saturating, NaN gives 0.
 */
#include "launch.cuh"

/* ---- values of any dtype ---- */

struct wide { /* one of the two, by the dtype's kind */
    double d;
    int64_t i;
};

static __device__ __forceinline__ wide load_wide(int dtype, const char *p)
{
    switch (dtype) {
    case LAC_F64:
        return {*(const double *)p, 0};
    case LAC_F32:
        return {*(const float *)p, 0};
    case LAC_F16:
        return {__half2float(*(const f16 *)p), 0};
    case LAC_BF16:
        return {__bfloat162float(*(const bf16 *)p), 0};
    case LAC_I64:
        return {0, *(const int64_t *)p};
    case LAC_I32:
        return {0, *(const int32_t *)p};
    default:
        return {0, *(const uint8_t *)p};
    }
}

/* to float so that a second rounding to a half type gives the nearest: the low bit is set where anything was lost */
static __device__ __forceinline__ float round_odd(double x)
{
    float f = __double2float_rz(x);
    if ((double)f != x && x == x && !isinf(x)) f = __uint_as_float(__float_as_uint(f) | 1u);
    return f;
}

static __device__ __forceinline__ void store_wide(int dtype, char *p, wide v, bool integer)
{
    double d = integer ? (double)v.i : v.d;
    int64_t i = v.i;
    if (!integer && dtype >= LAC_I64) {
        double low = dtype == LAC_I32 ? -2147483648.0 : dtype >= LAC_U8 ? 0.0 : -0x1p63;
        double high = dtype == LAC_I32 ? 2147483647.0 : dtype == LAC_U8 ? 255.0 : 0x1p63;
        if (dtype == LAC_BOOL) i = d != 0;
        else if (d != d) i = 0;
        else if (d >= high && dtype == LAC_I64) i = INT64_MAX;
        else i = (int64_t)(d < low ? low : d > high ? high : d);
    }
    switch (dtype) {
    case LAC_F64:
        *(double *)p = d;
        break;
    case LAC_F32:
        *(float *)p = integer ? (float)v.i : (float)d;
        break;
    case LAC_F16:
        *(f16 *)p = __float2half_rn(round_odd(d));
        break;
    case LAC_BF16:
        *(bf16 *)p = __float2bfloat16_rn(round_odd(d));
        break;
    case LAC_I64:
        *(int64_t *)p = i;
        break;
    case LAC_I32:
        *(int32_t *)p = (int32_t)i;
        break;
    case LAC_U8:
        *(uint8_t *)p = (uint8_t)i;
        break;
    default:
        *(uint8_t *)p = i != 0;
        break;
    }
}

/* ---- kernels ---- */

/* N elements of each side at a time; x and out are aligned for that */
template <class X, class Y> __global__ void cast_dense(const X *x, Y *out, int64_t n)
{
    constexpr int N = 4;
    struct alignas(sizeof(X) * N) from {
        X at[N];
    };
    struct alignas(sizeof(Y) * N) to {
        Y at[N];
    };
    int64_t start = (int64_t)blockIdx.x * THREADS + threadIdx.x, step = (int64_t)gridDim.x * THREADS;
    previous_done();
    for (int64_t i = start; i < n / N; i += step) {
        from a = ((const from *)x)[i];
        to b;
#pragma unroll
        for (int j = 0; j < N; j++) b.at[j] = from_compute<Y>((compute_t<Y>)to_compute(a.at[j]));
        ((to *)out)[i] = b;
    }
    for (int64_t i = n / N * N + start; i < n; i += step) out[i] = from_compute<Y>((compute_t<Y>)to_compute(x[i]));
}

template <class T> __global__ void copy_dense(const T *x, T *out, int64_t n)
{
    previous_done();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        out[i] = x[i];
}

template <class T, class N> __global__ void copy_strided(N nest, char *out, const char *x, int64_t n)
{
    previous_done();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        std::conditional_t<std::is_same_v<N, nest32>, int32_t, int64_t> offset[2];
        nest.template offsets<2>(i, offset);
        *(T *)(out + offset[0]) = *(const T *)(x + offset[1]);
    }
}

template <class N> __global__ void cast_strided(N nest, int to, int from, char *out, const char *x, int64_t n)
{
    previous_done();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        std::conditional_t<std::is_same_v<N, nest32>, int32_t, int64_t> offset[2];
        nest.template offsets<2>(i, offset);
        store_wide(to, out + offset[0], load_wide(from, x + offset[1]), from >= LAC_I64);
    }
}

/* planes of a x b elements: x is contiguous along a, out along b */
struct planes {
    int64_t a, b, tiles_a, tiles_b;
    int64_t oa, xb; /* strides in elements: of out along a, of x along b */
    view_walk outer_out, outer_x;
};
template <class T> __global__ void transpose_tiles(planes p, const T *x, T *out, int64_t tiles)
{
    __shared__ T tile[32][33];
    int tx = threadIdx.x % 32, ty = threadIdx.x / 32;
    previous_done();
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
        int64_t b0 = t % p.tiles_b * 32, rest = t / p.tiles_b, a0 = rest % p.tiles_a * 32, plane = rest / p.tiles_a;
        const T *from = x + p.outer_x.offset(plane);
        T *to = out + p.outer_out.offset(plane);
        for (int r = ty; r < 32; r += THREADS / 32)
            if (b0 + r < p.b && a0 + tx < p.a) tile[r][tx] = from[(b0 + r) * p.xb + a0 + tx];
        __syncthreads();
        for (int r = ty; r < 32; r += THREADS / 32)
            if (a0 + r < p.a && b0 + tx < p.b) to[(a0 + r) * p.oa + b0 + tx] = tile[tx][r];
        __syncthreads();
    }
}

template <class T, class N>
__global__ void where_strided(N nest, char *out, const char *c, const char *x, const char *y, int64_t n)
{
    previous_done();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        std::conditional_t<std::is_same_v<N, nest32>, int32_t, int64_t> offset[4];
        nest.template offsets<4>(i, offset);
        *(T *)(out + offset[0]) = c[offset[1]] ? *(const T *)(x + offset[2]) : *(const T *)(y + offset[3]);
    }
}

template <class N> __global__ void fill_strided(N nest, int dtype, char *out, double value, int64_t n)
{
    bool integer = dtype >= LAC_I64;
    wide v = {value, integer ? (int64_t)value : 0};
    previous_done();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        std::conditional_t<std::is_same_v<N, nest32>, int32_t, int64_t> offset[1];
        nest.template offsets<1>(i, offset);
        store_wide(dtype, out + offset[0], v, integer);
    }
}

__global__ void arange_kernel(int dtype, char *out, int64_t stride, double start, double step, int64_t n)
{
    previous_done();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        wide v = {__dadd_rn(start, __dmul_rn((double)i, step)),
                  dtype >= LAC_I64 ? (int64_t)((uint64_t)(int64_t)start + (uint64_t)i * (uint64_t)(int64_t)step) : 0};
        store_wide(dtype, out + i * stride, v, dtype >= LAC_I64);
    }
}

/* ---- slots ---- */

static unsigned grid_of(int64_t n) { return blocks_filling(n, THREADS, 32); }

/* a kernel with a thread for each of n things, if these are not too many */
template <class K, class... A> static void run(K *kernel, int64_t n, const A &...given)
{
    launch(kernel, grid_of(n), THREADS, 0, given...);
}

/* calls f with the nest in the width that it needs */
template <class F> static void with_nest(const nest &n, F f)
{
    if (n.small) f(nest_32(n));
    else f(nest_64(n));
}

static bool transpose_fits(const nest &n, int64_t bytes, planes *p)
{
    int b = n.ndim - 1, a = 0;
    if (n.stride[0][b] != bytes || n.stride[1][b] == bytes || n.shape[b] < 8) return false;
    while (a < b && !(n.stride[1][a] == bytes && n.shape[a] >= 8)) a++;
    if (a == b) return false;
    *p = {};
    p->a = n.shape[a];
    p->b = n.shape[b];
    p->tiles_a = (p->a + 31) / 32;
    p->tiles_b = (p->b + 31) / 32;
    p->oa = n.stride[0][a] / bytes;
    p->xb = n.stride[1][b] / bytes;
    for (int d = 0; d < b; d++) {
        if (d == a) continue;
        int at = p->outer_out.ndim++;
        p->outer_x.ndim++;
        p->outer_out.shape[at] = p->outer_x.shape[at] = n.shape[d];
        p->outer_out.stride[at] = n.stride[0][d] / bytes;
        p->outer_x.stride[at] = n.stride[1][d] / bytes;
    }
    return true;
}

/* The driver's copy takes the host 5 us, a launch 3: it is left to what is worth its rate. */
enum { LONG_COPY = 1 << 20 };

static int copy_same(const nest &n, int dtype)
{
    int64_t bytes = dtype_bytes(dtype), total = n.total * bytes;
    bool dense = nest_run(n, 0, bytes) == RUN_DENSE && nest_run(n, 1, bytes) == RUN_DENSE;
    if (dense && total < LONG_COPY && ((uintptr_t)n.data[0] | (uintptr_t)n.data[1] | (uintptr_t)total) % 16 == 0) {
        run(copy_dense<uint4>, total / 16, (const uint4 *)n.data[1], (uint4 *)n.data[0], total / 16);
        return lac_cuda_launched("copy");
    }
    if (dense && total >= LONG_COPY) {
        CUDA_TRY("copy", lac_cuda_copy_bytes(n.data[0], n.data[1], (size_t)total));
        return lac_cuda_launched("copy");
    }
    return dispatch_bytes(dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        planes p;
        if (transpose_fits(n, bytes, &p)) {
            int64_t tiles = p.tiles_a * p.tiles_b;
            for (int d = 0; d < p.outer_x.ndim; d++) tiles *= p.outer_x.shape[d];
            launch(transpose_tiles<T>, blocks_filling(tiles, 1, 16), THREADS, 0, p, (const T *)n.data[1],
                   (T *)n.data[0], tiles);
        } else {
            with_nest(n, [&](auto m) { run(copy_strided<T, decltype(m)>, n.total, m, n.data[0], n.data[1], n.total); });
        }
        return lac_cuda_launched("copy");
    });
}

extern "C" int lac_cuda_copy(const lac_a_copy *a)
{
    const lac_view *views[] = {&a->out, &a->x};
    int to = a->out.dtype, from = a->x.dtype;
    nest n = nest_make(2, views);
    if (n.total == 0) return 0;
    if (to == from) return copy_same(n, to);
    bool dense = nest_run(n, 0, dtype_bytes(to)) == RUN_DENSE && nest_run(n, 1, dtype_bytes(from)) == RUN_DENSE;
    dense = dense && (uintptr_t)n.data[0] % 16 == 0 && (uintptr_t)n.data[1] % 16 == 0;
    if (dense && to <= LAC_BF16 && to != LAC_F64 && from <= LAC_BF16 && from != LAC_F64)
        return dispatch_float(to, [&](auto t) {
            return dispatch_float(from, [&](auto f) {
                typedef typename decltype(t)::type Y;
                typedef typename decltype(f)::type X;
                launch(cast_dense<X, Y>, blocks_filling(n.total, 4 * THREADS, 16), THREADS, 0, (const X *)n.data[1],
                       (Y *)n.data[0], n.total);
                return lac_cuda_launched("copy");
            });
        });
    with_nest(n, [&](auto m) { run(cast_strided<decltype(m)>, n.total, m, to, from, n.data[0], n.data[1], n.total); });
    return lac_cuda_launched("copy");
}

extern "C" int lac_cuda_where(const lac_a_where *a)
{
    const lac_view *views[] = {&a->out, &a->cond, &a->x, &a->y};
    nest n = nest_make(4, views);
    if (n.total == 0) return 0;
    return dispatch_bytes(a->out.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        with_nest(n, [&](auto m) {
            run(where_strided<T, decltype(m)>, n.total, m, n.data[0], n.data[1], n.data[2], n.data[3], n.total);
        });
        return lac_cuda_launched("where");
    });
}

extern "C" int lac_cuda_fill(const lac_a_fill *a)
{
    const lac_view *views[] = {&a->x};
    nest n = nest_make(1, views);
    if (n.total == 0) return 0;
    if (a->value == 0 && !signbit(a->value) && nest_run(n, 0, dtype_bytes(a->x.dtype)) == RUN_DENSE) {
        CUDA_TRY("fill", lac_cuda_fill_bytes(n.data[0], 0, (size_t)(n.total * dtype_bytes(a->x.dtype))));
        return lac_cuda_launched("fill");
    }
    with_nest(n, [&](auto m) { run(fill_strided<decltype(m)>, n.total, m, a->x.dtype, n.data[0], a->value, n.total); });
    return lac_cuda_launched("fill");
}

extern "C" int lac_cuda_arange(const lac_a_arange *a)
{
    const lac_view *v = &a->out;
    int64_t n = v->ndim ? v->shape[0] : 1, stride = v->ndim ? v->stride[0] * dtype_bytes(v->dtype) : 0;
    if (n == 0) return 0;
    run(arange_kernel, n, v->dtype, (char *)v->data, stride, a->start, a->step, n);
    return lac_cuda_launched("arange");
}
