/* pos.cu: rotary positions on CUDA.
 *
 * Cosines and sines depend on position and frequency only, and angles are in double: a position times a frequency in
 * float would be off by radians at a million tokens. Dense halves of f32, f16 and bf16 (what models have) are one
 * kernel: a block makes the turns of a few positions, with XPOS's factor folded in, and rotates all their heads by
 * them, 16 bytes of each half at a time, the first of which are on their way while the turns are made. The frequencies
 * come from the host, which remembers them. Other layouts, wider
 * heads and f64 tabulate the turns in scratch memory first. The transposed map, which is the gradient, is the rotation
 * by the negative angle with the same factor. Rejected: a table that is kept between calls (it would be state that a
 * graph, the pool's limits and positions all invalidate, and reading it is no faster than making it).
 */
#include "lists.cuh"
#include "rows.cuh"
#include <cmath>

struct rope_args {
    int64_t batch, n, heads, half, start;
    int64_t stride[4];
    double base, scale_base;
    int sign;
    bool interleaved, transpose;
    bool given, each; /* positions are given; for each batch item */
    index_reader where;
    int64_t rows; /* of the table */
    bool small;   /* positions fit 31 bits: divisions by multiplication */
    divider by_runs, by_heads, by_half;
};

template <class C> struct alignas(2 * sizeof(C)) pair {
    C c, s;
};

enum {
    ROPE_SHARED = 256, /* frequencies that a block keeps */
    ROPE_HALF = 128,   /* that a launch is given */
    ROPE_TURNS = 512,  /* that a block makes of them */
    ROPE_FLIGHT = 3    /* vectors of each half that a thread has on the way */
};
struct rope_rates {
    double frequency[ROPE_HALF], rate[ROPE_HALF]; /* rate: of XPOS's exponent */
};

/* cosine and sine of a, times exp(e). In float the argument is reduced in double, where a position times a frequency is
 * exact enough, and the rest is in float: double's own sincos and exp cost as much as the rotation. */
static __device__ __forceinline__ pair<double> rope_turn(double a, double e, double)
{
    double s, c;
    sincos(a, &s, &c);
    return {c * exp(e), s * exp(e)};
}
static __device__ __forceinline__ pair<float> rope_turn(double a, double e, float)
{
    double turns = a * 0.15915494309189533577, power = e * 1.44269504088896340736, whole = rint(power);
    float s, c;
    sincospif(2 * (float)(turns - rint(turns)), &s, &c);
    if (e == 0) return {c, s};
    float factor = ldexpf(exp2f((float)(power - whole)), (int)fmax(fmin(whole, 1000.0), -1000.0));
    return {c * factor, s * factor};
}

template <class C>
__global__ void __launch_bounds__(THREADS) rope_table(rope_args a, pair<C> *table, lac_cuda_reporter bad)
{
    __shared__ double frequency[ROPE_SHARED], rate[ROPE_SHARED];
    auto frequency_of = [&](int64_t i) { return pow(a.base, -(double)i / (double)a.half); };
    auto rate_of = [&](int64_t i) { /* of XPOS's exponent */
                                    return a.scale_base > 0
                                               ? a.sign / a.scale_base * log(((double)i / (double)a.half + 0.4) / 1.4)
                                               : 0;
    };
    for (int64_t i = threadIdx.x; i < a.half && i < ROPE_SHARED; i += THREADS)
        frequency[i] = frequency_of(i), rate[i] = rate_of(i);
    __syncthreads();
    EACH(t, a.rows * a.half)
    {
        int64_t row = t / a.half, i = t - row * a.half, n = a.given ? a.where.at(row) : row;
        if (n < 0 || n >= bad.size) {
            bad.report(row, n);
            n = 0;
        }
        double p = (double)(a.start + n);
        bool near = i < ROPE_SHARED;
        pair<C> turn = rope_turn(p * (near ? frequency[i] : frequency_of(i)), p * (near ? rate[i] : rate_of(i)), C());
        table[t] = {turn.c, a.transpose ? -turn.s : turn.s};
    }
}

/* a pair of one head by the table */
template <class T>
__global__ void __launch_bounds__(THREADS)
    rope_kernel(rope_args a, const T *x, const pair<compute_t<T>> *table, T *out, int64_t total)
{
    previous_done();
    typedef compute_t<T> C;
    for (int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x; t < total; t += (int64_t)gridDim.x * THREADS) {
        int64_t row, i, h, bn;
        if (a.small) {
            uint32_t r = a.by_runs.divide((uint32_t)t), q = a.by_heads.divide(r);
            row = r, i = (uint32_t)t - r * a.by_runs.d, bn = q, h = r - q * a.by_heads.d;
        } else {
            row = t / a.half, i = t - row * a.half, bn = row / a.heads, h = row - bn * a.heads;
        }
        int64_t b = a.batch > 1 ? bn / a.n : 0, n = bn - b * a.n;
        const T *from = x + b * a.stride[0] + n * a.stride[1] + h * a.stride[2];
        pair<C> turn = table[(a.each ? bn : n) * a.half + i];
        T *to = out + row * 2 * a.half;
        int64_t first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : i + a.half;
        C u = to_compute(from[first * a.stride[3]]), v = to_compute(from[second * a.stride[3]]);
        to[first] = from_compute<T>(u * turn.c - v * turn.s);
        to[second] = from_compute<T>(u * turn.s + v * turn.c);
    }
}

/* dense halves: a block makes the turns of `places` positions and rotates all their heads. What a thread rotates first
 * is on its way while it makes turns, and ROPE_FLIGHT runs at a time after that. */
template <class T, int P>
__global__ void __launch_bounds__(THREADS, 4) rope_runs(rope_args a, const __grid_constant__ rope_rates rates,
                                                        const T *x, T *out, int places, lac_cuda_reporter bad)
{
    typedef row_access<T, P> run;
    __shared__ alignas(16) pair<float> turns[ROPE_TURNS];
    __shared__ double frequency[ROPE_HALF], rate[ROPE_HALF]; /* parameters are read an address at a time */
    int half = (int)a.half, heads = (int)a.heads, runs = half / P;
    int64_t first = (int64_t)blockIdx.x * places, left = a.batch * a.n - first;
    if (left < places) places = (int)left;
    int total = places * heads * runs;
    run u[ROPE_FLIGHT], v[ROPE_FLIGHT];
    /* number t: i, the pair that it begins with; at, its position's number in the block; row, its head's */
    auto split = [&](int t, int *i, int *at) {
        int row = (int)a.by_runs.divide((uint32_t)t);
        *at = (int)a.by_heads.divide((uint32_t)row);
        *i = (t - row * runs) * P;
        return row;
    };
    auto load = [&](int t0) {
#pragma unroll
        for (int f = 0; f < ROPE_FLIGHT; f++) {
            int t = t0 + f * THREADS, i, at;
            if (t >= total) break;
            int row = split(t, &i, &at), h = row - at * heads;
            int64_t bn = first + at, b = a.batch > 1 ? bn / a.n : 0, n = bn - b * a.n;
            const T *from = x + b * a.stride[0] + n * a.stride[1] + h * a.stride[2] + i;
            u[f] = *(const run *)from;
            v[f] = *(const run *)(from + half);
        }
    };
    for (int i = threadIdx.x; i < half; i += THREADS) frequency[i] = rates.frequency[i], rate[i] = rates.rate[i];
    previous_done();
    load(threadIdx.x);
    __syncthreads();
    for (int t = threadIdx.x; t < places * half; t += THREADS) {
        int at = (int)a.by_half.divide((uint32_t)t), i = t - at * half;
        int64_t bn = first + at, n = a.batch > 1 ? bn % a.n : bn, row = a.each ? bn : n;
        int64_t place = a.given ? a.where.at(row) : row;
        if (place < 0 || place >= bad.size) {
            bad.report(row, place);
            place = 0;
        }
        double p = (double)(a.start + place);
        pair<float> turn = rope_turn(p * frequency[i], p * rate[i], 0.0f);
        turns[t] = {turn.c, a.transpose ? -turn.s : turn.s};
    }
    __syncthreads();
    for (int t0 = threadIdx.x; t0 < total; t0 += ROPE_FLIGHT * THREADS) {
        if (t0 >= ROPE_FLIGHT * THREADS) load(t0);
#pragma unroll
        for (int f = 0; f < ROPE_FLIGHT; f++) {
            int t = t0 + f * THREADS, i, at;
            if (t >= total) break;
            int row = split(t, &i, &at);
            const pair<float> *turn = turns + at * half + i;
            float p[P], q[P];
            row_unpack<T, P>(u[f], p);
            row_unpack<T, P>(v[f], q);
#pragma unroll
            for (int k = 0; k < P; k++) {
                pair<float> r = turn[k];
                float left = p[k] * r.c - q[k] * r.s;
                q[k] = p[k] * r.s + q[k] * r.c;
                p[k] = left;
            }
            T *to = out + (first * heads + row) * 2 * half + i;
            row_store(to, row_pack<T, P>(p));
            row_store(to + half, row_pack<T, P>(q));
        }
    }
}

/* the rates of the last call, which are mostly those of this one */
static const rope_rates *rates_of(const rope_args *a)
{
    static rope_rates r;
    static double base, scale_base;
    static int64_t half;
    static int sign;
    if (a->base == base && a->scale_base == scale_base && a->half == half && a->sign == sign) return &r;
    base = a->base, scale_base = a->scale_base, half = a->half, sign = a->sign;
    for (int64_t i = 0; i < half; i++) {
        double part = (double)i / (double)half;
        r.frequency[i] = pow(base, -part);
        r.rate[i] = scale_base > 0 ? sign / scale_base * log((part + 0.4) / 1.4) : 0;
    }
    return &r;
}

/* are pairs half a head apart, in runs of P that can be moved at once? */
static bool rope_is_dense(const rope_args *r, const void *x, int P)
{
    bool dense = P > 1 && !r->interleaved && r->half <= ROPE_HALF && r->half % P == 0 && (uintptr_t)x % 16 == 0;
    dense = dense && r->stride[3] == 1 && r->heads < 1 << 16;
    for (int d = 0; d < 3; d++) dense = dense && r->stride[d] % P == 0;
    return dense;
}

extern "C" int lac_cuda_rope(const lac_a_rope *a)
{
    const lac_view *x = &a->x;
    rope_args r = {x->shape[0], x->shape[1],   x->shape[2], x->shape[3] / 2, a->start,    {},
                   a->base,     a->scale_base, a->sign,     a->interleaved,  a->transpose};
    for (int d = 0; d < 4; d++) r.stride[d] = x->stride[d];
    r.given = a->positions.data != NULL;
    r.each = r.given && a->positions.ndim == 2;
    r.rows = r.each ? r.batch * r.n : r.n;
    if (r.given) r.where = reader_of(&a->positions);
    lac_cuda_reporter bad = lac_cuda_reporter_for("rope: position", INT64_C(1) << 52);
    if (r.batch * r.n * r.heads * r.half == 0) return 0;
    return dispatch_float(x->dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        typedef compute_t<T> C;
        constexpr int P = sizeof(T) == 8 ? 1 : 16 / (int)sizeof(T);
        int64_t places = r.batch * r.n;
        if constexpr (P > 1)
            if (rope_is_dense(&r, x->data, P)) {
                int each = ROPE_TURNS / (int)r.half;
                r.by_half = divider((uint32_t)r.half), r.by_heads = divider((uint32_t)r.heads);
                r.by_runs = divider((uint32_t)(r.half / P));
                launch(rope_runs<T, P>, blocks_for(places, each), THREADS, 0, r, *rates_of(&r), (const T *)x->data,
                       (T *)a->out.data, each, bad);
                return lac_cuda_launched("rope");
            }
        lac_scratch table("rope", (size_t)(r.rows * r.half) * sizeof(pair<C>));
        if (!table.data) return (int)LAC_E_MEMORY;
        launch(rope_table<C>, blocks_filling(r.rows * r.half, THREADS, 8), THREADS, 0, r, (pair<C> *)table.data, bad);
        LAC_TRY(lac_cuda_launched("rope"));
        int64_t work = places * r.heads * r.half;
        r.small = work < INT32_MAX;
        if (r.small) r.by_runs = divider((uint32_t)r.half), r.by_heads = divider((uint32_t)r.heads);
        launch(rope_kernel<T>, blocks_for(work, THREADS), THREADS, 0, r, (const T *)x->data,
               (const pair<C> *)table.data, (T *)a->out.data, work);
        return lac_cuda_launched("rope");
    });
}
