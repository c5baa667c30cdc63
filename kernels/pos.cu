/* pos.cu: rotary positions on CUDA.
 *
 * Cosines and sines depend on position and frequency only: one kernel tabulates them in double (a position times a
 * frequency in float would be off by radians at a million tokens), [N, D/2] pairs, with XPOS's factor folded in; a
 * second one rotates at the speed of memory. The transposed map, which is the gradient, is the rotation by the negative
 * angle with the same factor.
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
};

template <class C> struct alignas(2 * sizeof(C)) pair {
    C c, s;
};

template <class C>
__global__ void __launch_bounds__(THREADS) rope_table(rope_args a, pair<C> *table, lac_cuda_reporter bad)
{
    EACH(t, a.rows * a.half)
    {
        int64_t row = t / a.half, i = t - row * a.half, n = a.given ? a.where.at(row) : row;
        if (n < 0 || n >= bad.size) {
            bad.report(row, n);
            n = 0;
        }
        double part = (double)i / (double)a.half, p = (double)(a.start + n), s, c, factor = 1;
        sincos(p * pow(a.base, -part), &s, &c);
        if (a.scale_base > 0) factor = exp(a.sign * p / a.scale_base * log((part + 0.4) / 1.4));
        table[t] = {(C)(c * factor), (C)((a.transpose ? -s : s) * factor)};
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    rope_kernel(rope_args a, const T *x, const pair<compute_t<T>> *table, T *out, int64_t total)
{
    typedef compute_t<T> C;
    for (int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x; t < total; t += (int64_t)gridDim.x * THREADS) {
        int64_t row = t / a.half, i = t - row * a.half, h = row % a.heads, bn = row / a.heads, n = bn % a.n,
                b = bn / a.n;
        int64_t first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : i + a.half;
        const T *from = x + b * a.stride[0] + n * a.stride[1] + h * a.stride[2];
        T *to = out + row * 2 * a.half;
        pair<C> r = table[(a.each ? bn : n) * a.half + i];
        C u = to_compute(from[first * a.stride[3]]), v = to_compute(from[second * a.stride[3]]);
        to[first] = from_compute<T>(u * r.c - v * r.s);
        to[second] = from_compute<T>(u * r.s + v * r.c);
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
    int64_t total = r.batch * r.n * r.heads * r.half;
    if (total == 0) return 0;
    return dispatch_float(x->dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        typedef compute_t<T> C;
        lac_scratch table("rope", (size_t)(r.rows * r.half) * sizeof(pair<C>));
        if (!table.data) return (int)LAC_E_MEMORY;
        rope_table<C><<<blocks_filling(r.rows * r.half, THREADS, 16), THREADS, 0, lac_cuda_stream>>>(
            r, (pair<C> *)table.data, bad);
        LAC_TRY(lac_cuda_launched("rope"));
        rope_kernel<T><<<blocks_filling(total, THREADS, 32), THREADS, 0, lac_cuda_stream>>>(
            r, (const T *)x->data, (const pair<C> *)table.data, (T *)a->out.data, total);
        return lac_cuda_launched("rope");
    });
}
