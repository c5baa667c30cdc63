/* scan.cu: running sums, products, extremes and log-sum-exps along an axis on CUDA, and two of their gradients.
 *
 * A warp has a line: 32 elements at a time are combined by shuffles, in a fixed tree, and then with what came before.
 * Everything runs in double or int64_t. The gradients are the recurrences of c/cpu/scan.c, S = g + c S', which combine
 * like any other operator: (c, g) after (c', g') is (c c', g + c g'); no quotient, so zeros are exact. A single line of
 * a million elements takes a warp some milliseconds; splitting lines over blocks was left out until something needs it.
 */
#include "lists.cuh"

template <class S> struct run_sum {
    S v;
    __device__ run_sum after(const run_sum &o) const { return {F_add(o.v, v)}; }
};
template <class S> struct run_product {
    S v;
    __device__ run_product after(const run_product &o) const { return {F_mul(o.v, v)}; }
};
/* the later of equals; NaN takes over and stays until the next NaN */
template <class S> struct run_extreme {
    S v;
    int64_t at;
    int least;
    __device__ run_extreme after(const run_extreme &o) const
    {
        bool take = v != v || (least ? v <= o.v : v >= o.v);
        return take ? *this : o;
    }
};
struct run_lse {
    double v, s; /* the largest, the sum of exp(x - v) */
    __device__ run_lse after(const run_lse &o) const
    {
        if (v == o.v) return {v, s + o.s};
        if (v > o.v) return {v, o.s * exp(o.v - v) + s};
        return {o.v, o.s + s * exp(v - o.v)};
    }
};
struct run_affine {
    double c, v;
    __device__ run_affine after(const run_affine &o) const { return {c * o.c, v + c * o.v}; }
};

template <class T> __device__ __forceinline__ T lane_value(T x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
template <class S> __device__ run_sum<S> from(const run_sum<S> &a, int l) { return {lane_value(a.v, l)}; }
template <class S> __device__ run_product<S> from(const run_product<S> &a, int l) { return {lane_value(a.v, l)}; }
template <class S> __device__ run_extreme<S> from(const run_extreme<S> &a, int l)
{
    return {lane_value(a.v, l), (int64_t)lane_value((long long)a.at, l), a.least};
}
static __device__ run_lse from(const run_lse &a, int l) { return {lane_value(a.v, l), lane_value(a.s, l)}; }
static __device__ run_affine from(const run_affine &a, int l) { return {lane_value(a.c, l), lane_value(a.v, l)}; }

struct scan_args {
    axis_lines x, y, g, out, index;
    int64_t lines, n;
    int fn, dtype, out_dtype, bytes, out_bytes;
    bool reverse, positions;
};

/* make(line, i): the state of element i of the scan; store(line, i, state) */
template <class A, class M, class P> __device__ __forceinline__ void scan_lines(const scan_args &a, M make, P store)
{
    int lane = threadIdx.x % 32;
    previous_done();
    int64_t warps = (int64_t)gridDim.x * (THREADS / 32);
    for (int64_t line = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; line < a.lines; line += warps) {
        A before = {};
        for (int64_t base = 0; base < a.n; base += 32) {
            int64_t i = base + lane;
            A s = make(line, i < a.n ? i : a.n - 1);
#pragma unroll
            for (int o = 1; o < 32; o *= 2) {
                A left = from(s, lane >= o ? lane - o : lane);
                if (lane >= o) s = s.after(left);
            }
            if (base) s = s.after(before);
            if (i < a.n) store(line, i, s);
            before = from(s, 31);
        }
    }
}

template <class S> __device__ __forceinline__ S scan_load(int dtype, const char *p)
{
    if constexpr (std::is_same_v<S, double>) return load_double(dtype, p);
    else return load_element<int64_t>(dtype, p);
}
static __device__ __forceinline__ void scan_store(int dtype, char *p, double v) { store_double(dtype, p, v); }
static __device__ __forceinline__ void scan_store(int dtype, char *p, int64_t v)
{
    store_element<int64_t>(dtype, p, v);
}

template <class A, class S>
__global__ void __launch_bounds__(THREADS) scan_kernel(scan_args a, const char *x, char *out, int64_t *index)
{
    auto place = [&](int64_t i) { return a.reverse ? a.n - 1 - i : i; };
    scan_lines<A>(
        a,
        [&](int64_t line, int64_t i) -> A {
            S v = scan_load<S>(a.dtype, x + a.x.at(line, place(i)) * a.bytes);
            if constexpr (std::is_same_v<A, run_extreme<S>>) return {v, i, a.fn == LAC_CUMMIN};
            else if constexpr (std::is_same_v<A, run_lse>) return {v, 1};
            else return {v};
        },
        [&](int64_t line, int64_t i, const A &s) {
            char *to = out + a.out.at(line, place(i)) * a.out_bytes;
            if constexpr (std::is_same_v<A, run_lse>)
                scan_store(a.out_dtype, to, s.s != s.s ? s.s : isfinite(s.v) ? s.v + log(s.s) : s.v);
            else scan_store(a.out_dtype, to, s.v);
            if constexpr (std::is_same_v<A, run_extreme<S>>) index[a.index.at(line, place(i))] = s.at;
        });
}

/* exp(x - y), with what is infinite in both: `same` */
static __device__ __forceinline__ double share(double x, double y, double same)
{
    return x == y && isinf(x) ? same : exp(x - y);
}

/* elements from the end of the line on */
__global__ void __launch_bounds__(THREADS)
    scan_bwd_kernel(scan_args a, const char *x, const char *y, const char *g, char *dx)
{
    auto x_at = [&](int64_t line, int64_t j) { return load_double(a.dtype, x + a.x.at(line, j) * a.bytes); };
    auto y_at = [&](int64_t line, int64_t j) { return load_double(a.dtype, y + a.y.at(line, j) * a.bytes); };
    bool product = a.fn == LAC_CUMPROD;
    scan_lines<run_affine>(
        a,
        [&](int64_t line, int64_t i) -> run_affine {
            int64_t j = a.n - 1 - i;
            double c = i == 0 ? 0 : product ? x_at(line, j + 1) : share(y_at(line, j), y_at(line, j + 1), 1);
            return {c, load_double(a.dtype, g + a.g.at(line, j) * a.bytes)};
        },
        [&](int64_t line, int64_t i, const run_affine &s) {
            int64_t j = a.n - 1 - i;
            double f = product ? (j ? y_at(line, j - 1) : 1) : share(x_at(line, j), y_at(line, j), 0);
            store_double(a.dtype, dx + a.out.at(line, j) * a.bytes, f * s.v);
        });
}

#define SCAN(...) launch(__VA_ARGS__, blocks_filling(s.lines, THREADS / 32, 16), THREADS, 0, s, x, out, index)

extern "C" int lac_cuda_scan(const lac_a_scan *a)
{
    scan_args s = {};
    s.x = lines_along(&a->x, a->dim);
    s.out = lines_along(&a->out, a->dim);
    s.n = s.x.n;
    s.fn = a->fn;
    s.dtype = a->x.dtype;
    s.out_dtype = a->out.dtype;
    s.bytes = (int)dtype_bytes(s.dtype);
    s.out_bytes = (int)dtype_bytes(s.out_dtype);
    s.reverse = a->reverse;
    if (numel(&a->x) == 0) return 0;
    if (a->index.data) s.index = lines_along(&a->index, a->dim);
    s.lines = numel(&a->x) / s.n;
    const char *x = (const char *)a->x.data;
    char *out = (char *)a->out.data;
    int64_t *index = (int64_t *)a->index.data;
    bool floats = s.dtype <= LAC_BF16;
    switch (a->fn) {
    case LAC_CUMSUM:
        if (floats) SCAN(scan_kernel<run_sum<double>, double>);
        else SCAN(scan_kernel<run_sum<int64_t>, int64_t>);
        break;
    case LAC_CUMPROD:
        if (floats) SCAN(scan_kernel<run_product<double>, double>);
        else SCAN(scan_kernel<run_product<int64_t>, int64_t>);
        break;
    case LAC_LOGCUMSUMEXP:
        SCAN(scan_kernel<run_lse, double>);
        break;
    default:
        if (floats) SCAN(scan_kernel<run_extreme<double>, double>);
        else SCAN(scan_kernel<run_extreme<int64_t>, int64_t>);
    }
    return lac_cuda_launched("scan");
}

extern "C" int lac_cuda_scan_bwd(const lac_a_scan_bwd *a)
{
    scan_args s = {};
    s.x = lines_along(&a->x, a->dim);
    s.y = lines_along(&a->y, a->dim);
    s.g = lines_along(&a->g, a->dim);
    s.out = lines_along(&a->dx, a->dim);
    s.n = s.x.n;
    s.fn = a->fn;
    s.dtype = a->x.dtype;
    s.bytes = (int)dtype_bytes(s.dtype);
    if (numel(&a->x) == 0) return 0;
    s.lines = numel(&a->x) / s.n;
    launch(scan_bwd_kernel, blocks_filling(s.lines, THREADS / 32, 16), THREADS, 0, s, (const char *)a->x.data,
           (const char *)a->y.data, (const char *)a->g.data, (char *)a->dx.data);
    return lac_cuda_launched("scan_bwd");
}
