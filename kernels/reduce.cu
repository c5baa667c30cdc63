/* reduce.cu: sums, means, extrema and their positions on CUDA.
 *
 * As on the CPU, kept and reduced axes are merged separately and the axis with the smallest stride decides: if it is
 * reduced, a warp or a block walks along memory for one output ("rows"); if it is kept, neighbouring threads hold
 * neighbouring outputs and walk memory row by row ("columns"). Few outputs of a long reduction are cut into parts,
 * whose results a second kernel combines in order. Cuts depend on shapes and on the device's size only, and there are
 * no atomics, so the same call gives the same bits on one kind of device.
 *
 * Sums of f32, f16 and bf16 run in double: at four bytes an element memory is the bound by a factor of thirty on the
 * data-centre devices that have full-rate doubles, and the result equals the CPU's to the last rounding.
 * Extrema: NaN wins, the first of equals.
 */
#include "common.cuh"

/* ---- what is accumulated ---- */

template <class T> struct sum_of {
    typedef std::conditional_t<is_float_v<T>, double, int64_t> S;
    S s;
    __device__ static sum_of none() { return {0}; }
    __device__ void add(compute_t<T> x, int64_t) { s += (S)x; }
    __device__ void merge(const sum_of &o) { s += o.s; }
    __device__ sum_of from_lane(int lane) const { return {__shfl_xor_sync(0xffffffffu, s, lane)}; }
};

template <class T> struct truth_of {
    int64_t s;
    __device__ static truth_of none() { return {0}; }
    __device__ void add(compute_t<T> x, int64_t) { s += x != 0; }
    __device__ void merge(const truth_of &o) { s += o.s; }
    __device__ truth_of from_lane(int lane) const { return {__shfl_xor_sync(0xffffffffu, s, lane)}; }
};

/* at: -1 before the first element */
template <class T, bool SMALLEST> struct extreme_of {
    typedef compute_t<T> C;
    C v;
    int64_t at;
    __device__ static extreme_of none() { return {0, -1}; }
    __device__ static bool better(C x, int64_t i, C best, int64_t j)
    {
        if (j < 0) return true;
        if (x != x || best != best) return x != x && (best == best || i < j);
        if (x == best) return i < j;
        return SMALLEST ? x < best : x > best;
    }
    __device__ void add(C x, int64_t i)
    {
        if (better(x, i, v, at)) v = x, at = i;
    }
    __device__ void merge(const extreme_of &o)
    {
        if (o.at >= 0 && better(o.v, o.at, v, at)) *this = o;
    }
    __device__ extreme_of from_lane(int lane) const
    {
        return {__shfl_xor_sync(0xffffffffu, v, lane), (int64_t)__shfl_xor_sync(0xffffffffu, (long long)at, lane)};
    }
};

/* ---- the job ---- */

struct reduce_job {
    int fn, out_dtype, kept, reduced;
    int64_t ks[LAC_MAX_DIMS], kx[LAC_MAX_DIMS], ko[LAC_MAX_DIMS]; /* sizes; strides of x and out in elements */
    int64_t rs[LAC_MAX_DIMS], rx[LAC_MAX_DIMS];
    int64_t outputs, count, parts, share; /* share: elements of one part */
    const void *x;
    void *out, *partials; /* [parts][outputs] if parts > 1 */
};

/* elements from x to output `number`, and from out */
static __device__ __forceinline__ void kept_offsets(const reduce_job &j, int64_t number, int64_t *x, int64_t *out)
{
    int64_t ox = 0, oo = 0;
    for (int d = j.kept - 1; d >= 0; d--) {
        int64_t q = d ? number / j.ks[d] : 0, i = number - q * j.ks[d];
        number = q;
        ox += i * j.kx[d];
        oo += i * j.ko[d];
    }
    *x = ox;
    *out = oo;
}

static __device__ __forceinline__ int64_t reduced_offset(const reduce_job &j, int64_t at)
{
    int64_t o = 0;
    for (int d = j.reduced - 1; d >= 0; d--) {
        int64_t q = d ? at / j.rs[d] : 0;
        o += (at - q * j.rs[d]) * j.rx[d];
        at = q;
    }
    return o;
}

static __device__ __forceinline__ void store_float(int dtype, void *out, int64_t at, double v)
{
    if (dtype == LAC_F64) ((double *)out)[at] = v;
    else if (dtype == LAC_F32) ((float *)out)[at] = (float)v;
    else if (dtype == LAC_F16) ((f16 *)out)[at] = __double2half(v);
    else ((bf16 *)out)[at] = __double2bfloat16(v);
}

static __device__ __forceinline__ void store_integer(int dtype, void *out, int64_t at, int64_t v)
{
    if (dtype == LAC_I64) ((int64_t *)out)[at] = v;
    else if (dtype == LAC_I32) ((int32_t *)out)[at] = (int32_t)v;
    else ((uint8_t *)out)[at] = (uint8_t)v;
}

template <class T> __device__ void finish(const reduce_job &j, const sum_of<T> &a, int64_t at)
{
    if constexpr (is_float_v<T>) store_float(j.out_dtype, j.out, at, j.fn == LAC_MEAN ? a.s / (double)j.count : a.s);
    else store_integer(j.out_dtype, j.out, at, a.s);
}
template <class T> __device__ void finish(const reduce_job &j, const truth_of<T> &a, int64_t at)
{
    store_integer(j.out_dtype, j.out, at, j.fn == LAC_ANY ? a.s > 0 : a.s == j.count);
}
template <class T, bool S> __device__ void finish(const reduce_job &j, const extreme_of<T, S> &a, int64_t at)
{
    if (j.fn == LAC_ARGMAX || j.fn == LAC_ARGMIN) store_integer(j.out_dtype, j.out, at, a.at);
    else if constexpr (is_float_v<T>) store_float(j.out_dtype, j.out, at, (double)a.v);
    else store_integer(j.out_dtype, j.out, at, a.v);
}

/* ---- kernels ---- */

template <class A> __device__ __forceinline__ A warp_merge(A a)
{
#pragma unroll
    for (int o = 16; o; o >>= 1) a.merge(a.from_lane(o));
    return a;
}

/* ROW threads (32 or THREADS) per output; DENSE: the reduced range is one aligned run */
template <class T, class A, int ROW, bool DENSE> __global__ void __launch_bounds__(THREADS) rows_kernel(reduce_job j)
{
    constexpr int N = 16 / sizeof(T);
    __shared__ char space[THREADS / 32 * sizeof(A)];
    struct alignas(16) vector {
        T at[N];
    };
    int lane = threadIdx.x % ROW;
    for (int64_t number = (int64_t)blockIdx.x * (THREADS / ROW) + threadIdx.x / ROW; number < j.outputs;
         number += (int64_t)gridDim.x * (THREADS / ROW)) {
        int64_t x_at, out_at, begin = blockIdx.y * j.share, end = begin + j.share < j.count ? begin + j.share : j.count;
        kept_offsets(j, number, &x_at, &out_at);
        const T *x = (const T *)j.x + x_at;
        A a = A::none();
        if constexpr (DENSE) {
            int64_t i = begin + (int64_t)lane * N;
            for (; i + N <= end; i += ROW * N) {
                vector v = *(const vector *)(x + i);
#pragma unroll
                for (int k = 0; k < N; k++) a.add(to_compute(v.at[k]), i + k);
            }
            for (; i < end; i++) a.add(to_compute(x[i]), i); /* one thread has the rest */
        } else {
            for (int64_t i = begin + lane; i < end; i += ROW)
                a.add(to_compute(x[j.reduced == 1 ? i * j.rx[0] : reduced_offset(j, i)]), i);
        }
        a = warp_merge(a);
        if constexpr (ROW > 32) {
            A *warps = (A *)space;
            if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = a;
            __syncthreads();
            for (int w = 1; w < ROW / 32 && threadIdx.x == 0; w++) a.merge(warps[w]);
            __syncthreads();
        }
        if (lane) continue;
        if (j.parts > 1) ((A *)j.partials)[blockIdx.y * j.outputs + number] = a;
        else finish(j, a, out_at);
    }
}

/* V neighbouring outputs per thread, 32 threads along the outputs, 8 along the reduced range */
template <class T, class A, int V> __global__ void __launch_bounds__(THREADS) columns_kernel(reduce_job j)
{
    enum { DEEP = THREADS / 32 };
    __shared__ char space[DEEP * 32 * V * sizeof(A)];
    struct alignas(V * sizeof(T)) vector {
        T at[V];
    };
    A(*grid)[32 * V] = (A(*)[32 * V]) space;
    int tx = threadIdx.x % 32, ty = threadIdx.x / 32, last = j.kept - 1;
    int64_t width = j.ks[last], groups = (width + 32 * V - 1) / (32 * V), all = j.outputs / width * groups;
    for (int64_t g = blockIdx.x; g < all; g += gridDim.x) {
        int64_t column = g % groups * (32 * V) + tx * V, number = g / groups * width + column, x_at = 0, out_at = 0;
        int64_t begin = blockIdx.y * j.share, end = begin + j.share < j.count ? begin + j.share : j.count;
        bool inside = column < width;
        A a[V];
#pragma unroll
        for (int k = 0; k < V; k++) a[k] = A::none();
        if (inside) kept_offsets(j, number, &x_at, &out_at);
        const T *x = (const T *)j.x + x_at;
        for (int64_t i = begin + ty; i < end && inside; i += DEEP) {
            const T *at = x + (j.reduced == 1 ? i * j.rx[0] : reduced_offset(j, i));
            if constexpr (V > 1) {
                vector v = *(const vector *)at;
#pragma unroll
                for (int k = 0; k < V; k++) a[k].add(to_compute(v.at[k]), i);
            } else {
                a[0].add(to_compute(*at), i);
            }
        }
#pragma unroll
        for (int k = 0; k < V; k++) grid[ty][tx * V + k] = a[k];
        __syncthreads();
        if (ty == 0 && inside)
            for (int k = 0; k < V; k++) {
                for (int w = 1; w < DEEP; w++) a[k].merge(grid[w][tx * V + k]);
                if (j.parts > 1) ((A *)j.partials)[blockIdx.y * j.outputs + number + k] = a[k];
                else finish(j, a[k], out_at + k * j.ko[last]);
            }
        __syncthreads();
    }
}

template <class A> __global__ void combine_kernel(reduce_job j)
{
    for (int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x; n < j.outputs; n += (int64_t)gridDim.x * THREADS) {
        int64_t x_at, out_at;
        A a = A::none();
        kept_offsets(j, n, &x_at, &out_at);
        for (int64_t p = 0; p < j.parts; p++) a.merge(((const A *)j.partials)[p * j.outputs + n]);
        finish(j, a, out_at);
    }
}

/* ---- set-up ---- */

static int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

static void swap(int64_t *x, int64_t *y)
{
    int64_t z = *x;
    *x = *y;
    *y = z;
}

static void split_axes(const lac_a_reduce *a, reduce_job *j)
{
    for (int d = 0; d < a->x.ndim; d++) {
        int64_t n = a->x.shape[d], sx = a->x.stride[d], so = a->out.stride[d];
        if (n == 1) continue;
        if (a->dims >> d & 1) {
            int at = j->reduced;
            if (at > 0 && j->rx[at - 1] == sx * n) j->rs[at - 1] *= n, j->rx[at - 1] = sx;
            else j->rs[at] = n, j->rx[at] = sx, j->reduced++;
        } else {
            int at = j->kept;
            if (at > 0 && j->kx[at - 1] == sx * n && j->ko[at - 1] == so * n)
                j->ks[at - 1] *= n, j->kx[at - 1] = sx, j->ko[at - 1] = so;
            else j->ks[at] = n, j->kx[at] = sx, j->ko[at] = so, j->kept++;
        }
    }
    if (j->reduced == 0) j->rs[0] = 1, j->rx[0] = 1, j->reduced = 1;
}

/* the axes with the smallest strides last; positions must keep the order of the reduced ones. True: columns */
static bool choose_order(reduce_job *j, bool position)
{
    int k = j->kept - 1, r = j->reduced - 1;
    for (int d = 0; d < k; d++)
        if (magnitude(j->kx[d]) < magnitude(j->kx[k]))
            swap(&j->ks[d], &j->ks[k]), swap(&j->kx[d], &j->kx[k]), swap(&j->ko[d], &j->ko[k]);
    for (int d = 0; d < r && !position; d++)
        if (magnitude(j->rx[d]) < magnitude(j->rx[r])) swap(&j->rs[d], &j->rs[r]), swap(&j->rx[d], &j->rx[r]);
    return k >= 0 && j->ks[k] >= 4 && magnitude(j->kx[k]) < magnitude(j->rx[r]);
}

/* can V neighbouring outputs be read as one vector? */
static bool columns_aligned(const reduce_job *j, int v, int64_t bytes)
{
    int last = j->kept - 1;
    bool fits = j->kx[last] == 1 && j->ks[last] % v == 0 && (uintptr_t)j->x % (uintptr_t)(v * bytes) == 0;
    for (int d = 0; d < last; d++) fits = fits && j->kx[d] % v == 0;
    for (int d = 0; d < j->reduced; d++) fits = fits && j->rx[d] % v == 0;
    return fits;
}

template <class T, class A> static int run(reduce_job j, bool position)
{
    constexpr int N = 16 / sizeof(T), V = sizeof(T) < 8 ? 8 / sizeof(T) < 4 ? 8 / sizeof(T) : 4 : 1;
    bool columns = choose_order(&j, position), wide = !columns && j.count >= 1024;
    bool vector = columns ? columns_aligned(&j, V, sizeof(T)) : false, dense = false;
    int64_t units = j.outputs, per_block = wide ? 1 : THREADS / 32;
    if (columns) {
        int64_t width = j.ks[j.kept - 1], group = 32 * (vector ? V : 1);
        units = j.outputs / width * ((width + group - 1) / group);
        per_block = 1;
    } else {
        dense = j.reduced == 1 && j.rx[0] == 1 && (uintptr_t)j.x % 16 == 0;
        for (int d = 0; d < j.kept; d++) dense = dense && j.kx[d] % N == 0;
    }
    /* parts: at least 2,048 elements (or 64 rows) each, as many as fill the device, at most 256 */
    int64_t blocks = (units + per_block - 1) / per_block, least = columns ? 64 : 2048;
    int64_t parts = (int64_t)lac_cuda_processors * 4 / (blocks ? blocks : 1);
    if (parts > j.count / least) parts = j.count / least;
    if (parts > 256) parts = 256;
    j.parts = parts < 1 ? 1 : parts;
    j.share = (j.count + j.parts - 1) / j.parts;
    j.share = (j.share + N - 1) / N * N; /* parts of a dense run start at aligned places */
    lac_scratch partials("reduce", j.parts > 1 ? (size_t)(j.parts * j.outputs) * sizeof(A) : 1);
    if (!partials.data) return LAC_E_MEMORY;
    j.partials = partials.data;
    dim3 grid(blocks_filling(units, per_block, 16), (unsigned)j.parts);
#define LAUNCH(...) __VA_ARGS__<<<grid, THREADS, 0, lac_cuda_stream>>>(j)
    if (columns) {
        if (vector && V > 1) LAUNCH(columns_kernel<T, A, V>);
        else LAUNCH(columns_kernel<T, A, 1>);
    } else if (wide) {
        if (dense) LAUNCH(rows_kernel<T, A, THREADS, true>);
        else LAUNCH(rows_kernel<T, A, THREADS, false>);
    } else {
        if (dense) LAUNCH(rows_kernel<T, A, 32, true>);
        else LAUNCH(rows_kernel<T, A, 32, false>);
    }
#undef LAUNCH
    LAC_TRY(lac_cuda_launched("reduce"));
    if (j.parts == 1) return 0;
    combine_kernel<A><<<blocks_filling(j.outputs, THREADS), THREADS, 0, lac_cuda_stream>>>(j);
    return lac_cuda_launched("reduce");
}

extern "C" int lac_cuda_reduce(const lac_a_reduce *a)
{
    static const char *const later[] = {"prod", "count_nonzero", "logsumexp", "var", "norm", "norm", "norm"};
    if (a->fn >= LAC_PROD)
        LAC_FAIL(DEVICE, "%s: not supported on cuda; move the tensors to the cpu", later[a->fn - LAC_PROD]);
    reduce_job j = {};
    j.fn = a->fn;
    j.out_dtype = a->out.dtype;
    j.x = a->x.data;
    j.out = a->out.data;
    j.outputs = j.count = 1;
    for (int d = 0; d < a->x.ndim; d++) (a->dims >> d & 1 ? j.count : j.outputs) *= a->x.shape[d];
    if (j.outputs == 0) return 0;
    split_axes(a, &j);
    bool position = a->fn == LAC_ARGMAX || a->fn == LAC_ARGMIN;
    return dispatch_any(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        if (a->fn <= LAC_MEAN) return run<T, sum_of<T>>(j, false);
        if (a->fn == LAC_ANY || a->fn == LAC_ALL) return run<T, truth_of<T>>(j, false);
        if (a->fn == LAC_MIN || a->fn == LAC_ARGMIN) return run<T, extreme_of<T, true>>(j, position);
        return run<T, extreme_of<T, false>>(j, position);
    });
}
