/* pos.cu: rotary positions on CUDA.
 *
 * Cosines and sines depend on position and frequency only: one kernel tabulates them, [N, D/2] pairs, with XPOS's
 * factor folded in (angles in double: a position times a frequency in float would be off by radians at a million
 * tokens); a second one rotates at the speed of memory, 16 bytes of each half of a head at a time. The transposed map,
 * which is the gradient, is the rotation by the negative angle with the same factor.
 */
#include "lists.cuh"

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
    divider by_runs, by_heads;
};

template <class C> struct alignas(2 * sizeof(C)) pair {
    C c, s;
};

enum { ROPE_SHARED = 256 }; /* frequencies that a block keeps */

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
    double turns = rint(a * 0.15915494309189533577), power = e * 1.44269504088896340736, whole = rint(power);
    float s, c, rest = (float)fma(turns, -2.4492935982947064e-16, fma(turns, -6.283185307179586477, a));
    sincosf(rest, &s, &c);
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

/* P neighbouring pairs of a head; of a dense x P is what 16 bytes hold */
template <class T, int P>
__global__ void __launch_bounds__(THREADS)
    rope_kernel(rope_args a, const T *x, const pair<compute_t<T>> *table, T *out, int64_t total)
{
    typedef compute_t<T> C;
    struct alignas(P * sizeof(T)) run {
        T at[P];
    };
    for (int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x; t < total; t += (int64_t)gridDim.x * THREADS) {
        int64_t row, i, h, bn;
        if (a.small) {
            uint32_t r = a.by_runs.divide((uint32_t)t), q = a.by_heads.divide(r);
            row = r, i = (int64_t)((uint32_t)t - r * a.by_runs.d) * P, bn = q, h = r - q * a.by_heads.d;
        } else {
            int64_t runs = a.half / P;
            row = t / runs, i = (t - row * runs) * P, bn = row / a.heads, h = row - bn * a.heads;
        }
        int64_t b = a.batch > 1 ? bn / a.n : 0, n = bn - b * a.n;
        const T *from = x + b * a.stride[0] + n * a.stride[1] + h * a.stride[2];
        const pair<C> *turn = table + (a.each ? bn : n) * a.half + i;
        T *to = out + row * 2 * a.half;
        if constexpr (P > 1) { /* halves: pairs are half a head apart */
            run u = *(const run *)(from + i), v = *(const run *)(from + i + a.half);
#pragma unroll
            for (int k = 0; k < P; k++) {
                pair<C> r = turn[k];
                C s = to_compute(u.at[k]), c = to_compute(v.at[k]);
                u.at[k] = from_compute<T>(s * r.c - c * r.s);
                v.at[k] = from_compute<T>(s * r.s + c * r.c);
            }
            *(run *)(to + i) = u;
            *(run *)(to + i + a.half) = v;
        } else {
            int64_t first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : i + a.half;
            C u = to_compute(from[first * a.stride[3]]), v = to_compute(from[second * a.stride[3]]);
            to[first] = from_compute<T>(u * turn->c - v * turn->s);
            to[second] = from_compute<T>(u * turn->s + v * turn->c);
        }
    }
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
        lac_scratch table("rope", (size_t)(r.rows * r.half) * sizeof(pair<C>));
        if (!table.data) return (int)LAC_E_MEMORY;
        rope_table<C><<<blocks_filling(r.rows * r.half, THREADS, 8), THREADS, 0, lac_cuda_stream>>>(
            r, (pair<C> *)table.data, bad);
        LAC_TRY(lac_cuda_launched("rope"));
        constexpr int P = sizeof(T) == 8 ? 1 : 16 / (int)sizeof(T);
        bool runs = P > 1 && !r.interleaved && r.stride[3] == 1 && r.half % P == 0 && (uintptr_t)x->data % 16 == 0;
        for (int d = 0; d < 3; d++) runs = runs && r.stride[d] % P == 0;
        int64_t each = runs ? r.half / P : r.half, work = r.batch * r.n * r.heads * each;
        r.small = work < INT32_MAX;
        if (r.small) r.by_runs = divider((uint32_t)each), r.by_heads = divider((uint32_t)r.heads);
        auto kernel = runs ? rope_kernel<T, P> : rope_kernel<T, 1>;
        kernel<<<blocks_for(work, THREADS), THREADS, 0, lac_cuda_stream>>>(
            r, (const T *)x->data, (const pair<C> *)table.data, (T *)a->out.data, work);
        return lac_cuda_launched("rope");
    });
}
