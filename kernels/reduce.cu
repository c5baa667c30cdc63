/* reduce.cu: sums, products, extrema and their positions, variances and log-sum-exps on CUDA.
 *
 * As on the CPU, kept and reduced axes are merged separately and the axis with the smallest stride decides: if it is
 * reduced, a warp or a block walks along memory for one output ("rows"); if it is kept, neighbouring threads hold
 * neighbouring outputs and walk memory row by row ("columns"). Few outputs of a long reduction are cut into parts,
 * whose results a second kernel combines in order. Cuts depend on shapes and on the device's size only, and there are
 * no atomics, so the same call gives the same bits on one kind of device.
 *
 * Sums run in double; eight neighbours of a half type, whose sum fits a float but for rounding far below the result's,
 * are added in float first, because conversions to double would be the bound. Variances are sums of differences from
 * the thread's first element, turned into (count, mean, squares) and combined by Chan, Golub and LeVeque's rule (1983).
 * Log-sum-exps keep their maximum apart. Extrema: NaN wins, the first of equals.
 *
 * What is accumulated is a type, one per compute type (float, double, int64_t); storage types are told apart when
 * values are loaded, and functions that share an accumulator when one is added or finished. A kernel for each function
 * and dtype would be four times as many. Sums of dense rows, columns and tensors, which models take most, are sum.cu's;
 * extrema, variances and log-sum-exps of dense rows reduce_rows.cu's.
 */
#include "reduce.cuh"
#include "sum.cuh"

/* ---- what is accumulated ---- */

/* loads of a thread before the first is used, FLIGHT of elements and VECTORS of 16 bytes; one where the arithmetic is
 * long. start(): the first element of a dense row, the same for all who work on it. */

template <class T> __device__ __forceinline__ T from_lane(T x, int lane)
{
    return __shfl_xor_sync(0xffffffffu, x, lane);
}

/* sums of x, of its absolute value, of its square, or of whether it is not zero; of f64 with the roundings apart, as on
 * the CPU (Knuth's two-sum) */
template <class C> struct sum_of {
    typedef C compute;
    enum { FLIGHT = 4, VECTORS = 4 };
    static constexpr bool EXACT = std::is_same_v<C, double>;
    typedef std::conditional_t<std::is_same_v<C, int64_t>, int64_t, double> S;
    S s, rest;
    __device__ static sum_of none() { return {0, 0}; }
    __device__ void plus(S x)
    {
        S t = s + x;
        if constexpr (EXACT) {
            S back = t - s;
            rest += (s - (t - back)) + (x - back);
        }
        s = t;
    }
    __device__ void add(const reduce_job &j, C x, int64_t)
    {
        if (j.fn <= LAC_MEAN) plus((S)x);
        else if (j.fn == LAC_NORM1) plus((S)F_abs(x));
        else if (j.fn == LAC_NORM2) plus((S)x * (S)x);
        else s += x != C(0);
    }
    __device__ void merge(const sum_of &o)
    {
        plus(o.s);
        if constexpr (EXACT) rest += o.rest;
    }
    __device__ sum_of lane(int l) const { return {from_lane(s, l), EXACT ? from_lane(rest, l) : S(0)}; }
    __device__ double value(const reduce_job &j) const
    {
        double sum = EXACT && isfinite((double)s) ? (double)(s + rest) : (double)s;
        return j.fn == LAC_MEAN ? sum / (double)j.count : j.fn == LAC_NORM2 ? sqrt(sum) : sum;
    }
    __device__ int64_t integer(const reduce_job &j) const
    {
        return j.fn == LAC_ANY ? s > 0 : j.fn == LAC_ALL ? s == (S)j.count : (int64_t)s;
    }
};

template <class C> struct product_of {
    typedef C compute;
    enum { FLIGHT = 1, VECTORS = 1 };
    typedef typename sum_of<C>::S S;
    S p;
    __device__ static product_of none() { return {1}; }
    __device__ void add(const reduce_job &, C x, int64_t) { p = F_mul(p, (S)x); }
    __device__ void merge(const product_of &o) { p = F_mul(p, o.p); }
    __device__ product_of lane(int l) const { return {from_lane(p, l)}; }
    __device__ double value(const reduce_job &) const { return (double)p; }
    __device__ int64_t integer(const reduce_job &) const { return (int64_t)p; }
};

/* x as what is largest is looked for among: its opposite where the smallest is asked for; and back */
template <class C> __device__ __forceinline__ C turned(const reduce_job &j, C x)
{
    if (j.fn == LAC_NORM_INF) return F_abs(x);
    if (j.fn != LAC_MIN && j.fn != LAC_ARGMIN) return x;
    if constexpr (std::is_same_v<C, int64_t>) return ~x; /* -x has no room for the smallest */
    else return -x;
}

template <class C> struct extreme_of {
    typedef C compute;
    enum { FLIGHT = 4, VECTORS = 4 };
    C v;
    __device__ static extreme_of none()
    {
        if constexpr (std::is_same_v<C, int64_t>) return {INT64_MIN};
        else return {-(C)INFINITY};
    }
    __device__ void add(const reduce_job &j, C x, int64_t) { merge({turned(j, x)}); }
    __device__ void merge(const extreme_of &o) { v = o.v > v || o.v != o.v ? o.v : v; }
    __device__ extreme_of lane(int l) const { return {from_lane(v, l)}; }
    __device__ double value(const reduce_job &j) const { return j.count ? (double)turned(j, v) : 0; }
    __device__ int64_t integer(const reduce_job &j) const { return (int64_t)turned(j, v); }
};

/* at: -1 before the first element */
template <class C> struct place_of {
    typedef C compute;
    enum { FLIGHT = 2, VECTORS = 2 };
    C v;
    int64_t at;
    __device__ static place_of none() { return {0, -1}; }
    __device__ static bool better(C x, int64_t i, C best, int64_t j)
    {
        if (j < 0) return true;
        if (x != x || best != best) return x != x && (best == best || i < j);
        return x == best ? i < j : x > best;
    }
    __device__ void add(const reduce_job &j, C x, int64_t i) { merge({turned(j, x), i}); }
    __device__ void merge(const place_of &o)
    {
        if (o.at >= 0 && better(o.v, o.at, v, at)) *this = o;
    }
    __device__ place_of lane(int l) const { return {from_lane(v, l), (int64_t)from_lane((long long)at, l)}; }
    __device__ double value(const reduce_job &) const { return 0; }
    __device__ int64_t integer(const reduce_job &) const { return at; }
};

/* sums of x - shift and of its square; the shift is the first element, of a dense row the row's */
template <class C> struct variance_of {
    typedef C compute;
    enum { FLIGHT = 1, VECTORS = 4 };
    double shift, s, squares, n;
    __device__ static variance_of none() { return {0, 0, 0, 0}; }
    __device__ void start(C x) { shift = (double)x; }
    __device__ void add(const reduce_job &, C x, int64_t)
    {
        if (n == 0) shift = (double)x;
        double d = (double)x - shift;
        s += d;
        squares += d * d;
        n += 1;
    }
    /* to the shift that is the mean: s is 0, squares those of the differences from the mean */
    __device__ variance_of centred() const
    {
        if (n == 0) return *this;
        return {shift + s / n, 0, squares - s * (s / n), n};
    }
    __device__ void merge(const variance_of &other)
    {
        if (other.n == 0) return;
        if (other.shift == shift) {
            s += other.s, squares += other.squares, n += other.n;
            return;
        }
        variance_of a = centred(), b = other.centred();
        double d = b.shift - a.shift, all = a.n + b.n;
        *this = a.n == 0
                    ? b
                    : variance_of{a.shift + d * (b.n / all), 0, a.squares + b.squares + d * d * (a.n * b.n / all), all};
    }
    __device__ variance_of lane(int l) const
    {
        return {from_lane(shift, l), from_lane(s, l), from_lane(squares, l), from_lane(n, l)};
    }
    __device__ double value(const reduce_job &j) const
    {
        double freedom = (double)j.count - j.correction;
        return centred().squares / (freedom > 0 ? freedom : 0);
    }
    __device__ int64_t integer(const reduce_job &) const { return 0; }
};

template <class C> struct lse_of {
    typedef C compute;
    enum { FLIGHT = 1, VECTORS = 4 };
    C m;
    double s; /* of exp(x - m) */
    __device__ static lse_of none() { return {-(C)INFINITY, 0}; }
    __device__ void add(const reduce_job &, C x, int64_t) { merge({x, 1}); }
    __device__ void merge(const lse_of &o)
    {
        if (o.m == m) s += o.s;
        else if (o.m > m) s = s * (double)F_exp(m - o.m) + o.s, m = o.m;
        else s += o.s * (double)F_exp(o.m - m);
    }
    __device__ lse_of lane(int l) const { return {from_lane(m, l), from_lane(s, l)}; }
    __device__ double value(const reduce_job &) const
    {
        return s != s ? s : isfinite(m) ? (double)m + log(s) : (double)m;
    }
    __device__ int64_t integer(const reduce_job &) const { return 0; }
};

/* the elements of one vector: 4 of f32, 8 of a half type */
template <class A>
__device__ __forceinline__ void add_vector(const reduce_job &j, A &a, const float (&v)[8], int n, int64_t at)
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < n) a.add(j, v[i], at + i);
}
__device__ __forceinline__ void add_vector(const reduce_job &j, sum_of<float> &a, const float (&v)[8], int n,
                                           int64_t at)
{
    if (n == 8 && j.fn <= LAC_MEAN) {
        a.s += (double)(((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])));
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < n) a.add(j, v[i], at + i);
}

/* max.NaN: NaN wins */
__device__ __forceinline__ float larger(float x, float y)
{
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
    return x;
}
__device__ __forceinline__ void add_vector(const reduce_job &j, extreme_of<float> &a, const float (&v)[8], int n,
                                           int64_t)
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < n) a.v = larger(a.v, turned(j, v[i]));
}
/* Of a half type, whose differences and squares fit a float but for rounding far below the result's, as for sums, in
 * rows that are not so long that a first element far from all others leaves little of it; they are divided by 32, so
 * that no difference and no sum of eight is infinite, and squares hardly ever. */
__device__ __forceinline__ void add_vector(const reduce_job &j, variance_of<float> &a, const float (&v)[8], int n,
                                           int64_t at)
{
    if (n == 8 && j.count <= 1 << 14) {
        float less = (float)a.shift * -0.03125f, s = 0, q = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float d = fmaf(v[i], 0.03125f, less);
            s += d;
            q = fmaf(d, d, q);
        }
        double squares = (double)q;
        if (isinf(q)) {
            squares = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                double d = (double)fmaf(v[i], 0.03125f, less);
                squares = fma(d, d, squares);
            }
        }
        a.s = fma((double)s, 32.0, a.s);
        a.squares = fma(squares, 1024.0, a.squares);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i >= n) break;
            double d = (double)v[i] - a.shift;
            a.s += d;
            a.squares += d * d;
        }
    }
    a.n += n;
}
/* One exponential an element, and one for what was added before. Of nothing but infinities the sum is theirs. */
__device__ __forceinline__ void add_vector(const reduce_job &, lse_of<float> &a, const float (&v)[8], int n, int64_t)
{
    float m = a.m, s = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < n) m = fmaxf(m, v[i]);
    const float to = isfinite(m) ? m : 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < n) s += n == 8 ? short_exp(v[i] - to) : F_exp(v[i] - to);
    a.s = (m > a.m ? a.s * (double)F_exp(a.m - m) : a.s) + (double)s;
    a.m = m;
}

/* of the threads of a warp */
template <class A> __device__ __forceinline__ void merge_warp(A &a)
{
#pragma unroll
    for (int o = 16; o; o >>= 1) a.merge(a.lane(o));
}
/* the largest number first, so that a thread has one exponential */
__device__ __forceinline__ void merge_warp(lse_of<float> &a)
{
    float m = warp_max(a.m);
    a.s = warp_sum(m > a.m ? a.s * (double)F_exp(a.m - m) : a.s);
    a.m = m;
}

template <class A> __device__ __forceinline__ void start_row(A &, const reduce_job &, const char *) {}
__device__ __forceinline__ void start_row(variance_of<float> &a, const reduce_job &j, const char *x)
{
    a.start(load_element<float>(j.dtype, x));
}

/* ---- places ---- */

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

template <class A> __device__ __forceinline__ void finish(const reduce_job &j, const A &a, int64_t at)
{
    if (j.out_dtype == LAC_F64) ((double *)j.out)[at] = a.value(j);
    else if (j.out_dtype == LAC_F32) ((float *)j.out)[at] = (float)a.value(j);
    else if (j.out_dtype == LAC_F16) ((f16 *)j.out)[at] = __double2half(a.value(j));
    else if (j.out_dtype == LAC_BF16) ((bf16 *)j.out)[at] = __double2bfloat16(a.value(j));
    else if (j.out_dtype == LAC_I64) ((int64_t *)j.out)[at] = a.integer(j);
    else if (j.out_dtype == LAC_I32) ((int32_t *)j.out)[at] = (int32_t)a.integer(j);
    else ((uint8_t *)j.out)[at] = (uint8_t)a.integer(j);
}

template <class A> __device__ __forceinline__ void deliver(const reduce_job &j, const A &a, int64_t number, int64_t at)
{
    if (j.parts > 1) ((A *)j.partials)[blockIdx.y * j.outputs + number] = a;
    else finish(j, a, at);
}

/* ---- kernels ---- */

/* `team` threads (32 or THREADS) per output; DENSE: the reduced range is one aligned run of a float type */
template <class A, bool DENSE> __global__ void __launch_bounds__(THREADS) rows_kernel(reduce_job j, int team)
{
    previous_done();
    typedef typename A::compute C;
    __shared__ alignas(16) char space[THREADS / 32 * sizeof(A)];
    int lane = threadIdx.x % team, teams = THREADS / team;
    for (int64_t number = (int64_t)blockIdx.x * teams + threadIdx.x / team; number < j.outputs;
         number += (int64_t)gridDim.x * teams) {
        int64_t x_at, out_at, begin = blockIdx.y * j.share, end = begin + j.share < j.count ? begin + j.share : j.count;
        kept_offsets(j, number, &x_at, &out_at);
        const char *x = j.x + x_at * j.bytes;
        A a = A::none();
        if constexpr (DENSE) {
            constexpr int FLIGHT = A::VECTORS;
            int per = 16 / j.bytes;
            if (begin < end) start_row(a, j, x);
            int64_t full = end / per; /* begin is a multiple of per */
            for (int64_t i = begin / per + lane; i < full; i += team * FLIGHT) {
                uint4 raw[FLIGHT];
#pragma unroll
                for (int u = 0; u < FLIGHT; u++)
                    if (i + u * team < full) raw[u] = ((const uint4 *)x)[i + u * team];
#pragma unroll
                for (int u = 0; u < FLIGHT; u++) {
                    float v[8];
                    if (i + u * team >= full) break;
                    unpack(j.dtype, raw[u], v);
                    add_vector(j, a, v, per, (i + u * team) * per);
                }
            }
            int64_t rest = full * per + lane;
            if (rest < end && rest >= begin) a.add(j, load_element<float>(j.dtype, x + rest * j.bytes), rest);
        } else {
#pragma unroll(A::FLIGHT)
            for (int64_t i = begin + lane; i < end; i += team)
                a.add(j, load_element<C>(j.dtype, x + (j.reduced == 1 ? i * j.rx[0] : reduced_offset(j, i)) * j.bytes),
                      i);
        }
        merge_warp(a);
        if (team > 32) {
            A *warps = (A *)space;
            if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = a;
            __syncthreads();
            for (int w = 1; w < THREADS / 32 && threadIdx.x == 0; w++) a.merge(warps[w]);
            __syncthreads();
        }
        if (lane == 0) deliver(j, a, number, out_at);
    }
}

/* V (4 or 1) neighbouring outputs per thread, 32 threads along the outputs, 8 along the reduced range */
template <class A, int V> __global__ void __launch_bounds__(THREADS) columns_kernel(reduce_job j)
{
    previous_done();
    typedef typename A::compute C;
    enum { DEEP = THREADS / 32 };
    __shared__ alignas(16) char space[DEEP * 32 * sizeof(A)];
    A(*grid)[32] = (A(*)[32])space;
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
        const char *x = j.x + x_at * j.bytes;
#pragma unroll(A::FLIGHT)
        for (int64_t i = begin + ty; i < end && inside; i += DEEP) {
            const char *at = x + (j.reduced == 1 ? i * j.rx[0] : reduced_offset(j, i)) * j.bytes;
            if constexpr (V > 1) {
                uint4 raw = {};
                float v[8];
                if (j.bytes == 4) raw = *(const uint4 *)at;
                else *(uint2 *)&raw = *(const uint2 *)at;
                unpack(j.dtype, raw, v);
#pragma unroll
                for (int k = 0; k < V; k++) a[k].add(j, v[k], i);
            } else {
                a[0].add(j, load_element<C>(j.dtype, at), i);
            }
        }
#pragma unroll
        for (int k = 0; k < V; k++) {
            grid[ty][tx] = a[k];
            __syncthreads();
            if (ty == 0 && inside) {
                for (int w = 1; w < DEEP; w++) a[k].merge(grid[w][tx]);
                deliver(j, a[k], number + k, out_at + k * j.ko[last]);
            }
            __syncthreads();
        }
    }
}

template <class A> __global__ void __launch_bounds__(THREADS) combine_kernel(reduce_job j)
{
    previous_done();
    __shared__ alignas(16) char space[THREADS / 32 * sizeof(A)];
    if (j.outputs == 1) { /* the sum of everything: a block for its parts */
        A a = A::none(), *warps = (A *)space;
        for (int64_t p = threadIdx.x; p < j.parts; p += THREADS) a.merge(((const A *)j.partials)[p]);
        for (int o = 16; o; o >>= 1) a.merge(a.lane(o));
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = a;
        __syncthreads();
        if (threadIdx.x) return;
        for (int w = 1; w < THREADS / 32; w++) a.merge(warps[w]);
        finish(j, a, 0);
        return;
    }
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

/* can four neighbouring outputs be read as one vector? */
static bool columns_aligned(const reduce_job *j)
{
    int last = j->kept - 1;
    bool fits = j->dtype >= LAC_F32 && j->dtype <= LAC_BF16 && j->kx[last] == 1 && j->ks[last] % 4 == 0 &&
                (uintptr_t)j->x % (uintptr_t)(4 * j->bytes) == 0;
    for (int d = 0; d < last; d++) fits = fits && j->kx[d] % 4 == 0;
    for (int d = 0; d < j->reduced; d++) fits = fits && j->rx[d] % 4 == 0;
    return fits;
}

template <class A> static int run(reduce_job j, bool position)
{
    constexpr bool FLOATS = std::is_same_v<typename A::compute, float>;
    bool columns = choose_order(&j, position), dense = false;
    /* a warp a row wherever that fills the device: no barrier, and loads in flight */
    bool wide = !columns && j.count >= (j.outputs < (int64_t)lac_cuda_processors * 64 ? 1024 : 8192);
    bool vector = FLOATS && columns && columns_aligned(&j);
    int64_t units = j.outputs, per_block = wide ? 1 : THREADS / 32, per = 16 / j.bytes;
    if (columns) {
        int64_t width = j.ks[j.kept - 1], group = vector ? 128 : 32;
        units = j.outputs / width * ((width + group - 1) / group);
        per_block = 1;
    } else {
        dense = FLOATS && j.reduced == 1 && j.rx[0] == 1 && (uintptr_t)j.x % 16 == 0;
        for (int d = 0; d < j.kept; d++) dense = dense && j.kx[d] % per == 0;
    }
    /* parts: at least 4,096 elements (or 64 rows) each, as many as fill the device */
    int64_t blocks = (units + per_block - 1) / per_block, least = columns ? 64 : 4096;
    int64_t parts = (int64_t)lac_cuda_processors * 8 / (blocks ? blocks : 1), most = j.outputs == 1 ? 2048 : 256;
    if (parts > j.count / least) parts = j.count / least;
    if (parts > most) parts = most;
    j.parts = parts < 1 ? 1 : parts;
    j.share = (j.count + j.parts - 1) / j.parts;
    j.share = (j.share + 7) / 8 * 8; /* parts of a dense run start at aligned places */
    lac_scratch partials("reduce", j.parts > 1 ? (size_t)(j.parts * j.outputs) * sizeof(A) : 1);
    if (!partials.data) return LAC_E_MEMORY;
    j.partials = partials.data;
    if (dense && !wide && j.parts == 1 && lac_cuda_row_reduction_fits(&j)) return lac_cuda_row_reduction(&j);
    dim3 grid(blocks_filling(units, per_block, 16), (unsigned)j.parts);
    int team = wide ? THREADS : 32;
    if (columns && !vector) {
        launch(columns_kernel<A, 1>, grid, THREADS, 0, j);
    } else if (!columns && !dense) {
        launch(rows_kernel<A, false>, grid, THREADS, 0, j, team);
    } else if constexpr (FLOATS) {
        if (columns) launch(columns_kernel<A, 4>, grid, THREADS, 0, j);
        else launch(rows_kernel<A, true>, grid, THREADS, 0, j, team);
    }
    LAC_TRY(lac_cuda_launched("reduce"));
    if (j.parts == 1) return 0;
    launch(combine_kernel<A>, blocks_filling(j.outputs, THREADS), THREADS, 0, j);
    return lac_cuda_launched("reduce");
}

template <class C> static int run_as(const reduce_job &j)
{
    switch (j.fn) {
    case LAC_MAX:
    case LAC_MIN:
    case LAC_NORM_INF:
        return run<extreme_of<C>>(j, false);
    case LAC_ARGMAX:
    case LAC_ARGMIN:
        return run<place_of<C>>(j, true);
    case LAC_PROD:
        return run<product_of<C>>(j, false);
    case LAC_VAR:
        if constexpr (!std::is_same_v<C, int64_t>) return run<variance_of<C>>(j, false);
        break;
    case LAC_LOGSUMEXP:
        if constexpr (!std::is_same_v<C, int64_t>) return run<lse_of<C>>(j, false);
        break;
    default:
        return run<sum_of<C>>(j, false);
    }
    LAC_FAIL(INTERNAL, "reduce: function %d of integers", j.fn);
}

/* is this one of sum.cu's? fills its job */
static bool plain_sum(const reduce_job *j, sum_job *s)
{
    if (j->reduced != 1 || j->kept > 1 || (j->kept && j->ko[0] != 1)) return false;
    s->along_rows = j->rx[0] == 1;
    if (!s->along_rows && !(j->kept && j->kx[0] == 1)) return false;
    s->x = j->x;
    s->out = j->out;
    s->dtype = j->dtype;
    s->out_dtype = j->out_dtype;
    s->out_bytes = (int)dtype_bytes(j->out_dtype);
    s->mean = j->fn == LAC_MEAN;
    s->outputs = j->outputs;
    s->count = j->count;
    s->step = (s->along_rows ? (j->kept ? j->kx[0] : 0) : j->rx[0]) * j->bytes;
    return lac_cuda_sum_fits(s);
}

extern "C" int lac_cuda_reduce(const lac_a_reduce *a)
{
    reduce_job j = {};
    j.fn = a->fn;
    j.dtype = a->x.dtype;
    j.bytes = (int)dtype_bytes(j.dtype);
    j.out_dtype = a->out.dtype;
    j.correction = a->correction;
    j.x = (const char *)a->x.data;
    j.out = a->out.data;
    j.outputs = j.count = 1;
    for (int d = 0; d < a->x.ndim; d++) (a->dims >> d & 1 ? j.count : j.outputs) *= a->x.shape[d];
    if (j.outputs == 0) return 0;
    split_axes(a, &j);
    sum_job sum = {};
    if ((j.fn == LAC_SUM || j.fn == LAC_MEAN) && plain_sum(&j, &sum)) return lac_cuda_sum(&sum);
    if (j.dtype == LAC_F64) return run_as<double>(j);
    return j.dtype <= LAC_BF16 ? run_as<float>(j) : run_as<int64_t>(j);
}
