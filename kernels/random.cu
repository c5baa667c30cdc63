/* random.cu: random numbers and dropout on CUDA, from the same Philox counters as the CPU (c/rng.h).
 *
 * A thread makes one Philox block, that is the four (or two) neighbouring elements that share it, in row-major order
 * whatever the strides. Uniforms, events and integers are the CPU's bit for bit: they are computed in double and
 * rounded once. Normals differ from the CPU's in the last bits of the logarithm and the cosine.
 */
#include "launch.cuh"
#include "rng.h"

struct random_args {
    view_walk out;
    int kind;
    double a, b, top;
    uint64_t seed, offset;
    int64_t n;
};

/* double -> float so that rounding on to a half type rounds once */
static __device__ __forceinline__ float narrow(double x, bool half)
{
    if (!half) return (float)x;
    float f = __double2float_rz(x);
    return (double)f != x && !isinf(x) ? __uint_as_float(__float_as_uint(f) | 1u) : f;
}

template <class T> __device__ __forceinline__ T random_as(double x)
{
    if constexpr (std::is_same_v<T, double>) return x;
    else if constexpr (is_float_v<T>) return from_compute<T>(narrow(x, sizeof(T) == 2));
    else return from_compute<T>((int64_t)x);
}

template <class T> __global__ void __launch_bounds__(THREADS) random_kernel(random_args a, T *out)
{
    bool wide = std::is_same_v<T, double> || a.kind == LAC_INTEGER;
    int per_block = wide ? 2 : 4;
    int64_t blocks = (a.n + per_block - 1) / per_block;
    previous_done();
    for (int64_t block = (int64_t)blockIdx.x * THREADS + threadIdx.x; block < blocks;
         block += (int64_t)gridDim.x * THREADS) {
        uint32_t word[4];
        double u[4];
        lac_philox(a.seed, a.offset, (uint64_t)block, word);
        if (wide)
            for (int i = 0; i < 2; i++) u[i] = lac_rng_unit53(lac_rng_pair(word[2 * i], word[2 * i + 1]));
        else
            for (int i = 0; i < 4; i++) u[i] = (double)lac_rng_unit24(word[i]);
        if (a.kind == LAC_NORMAL)
            for (int i = 0; i < per_block; i += 2) {
                double first, second;
                lac_rng_normal2(u[i], u[i + 1], &first, &second);
                u[i] = a.a + a.b * first;
                u[i + 1] = a.a + a.b * second;
            }
        for (int i = 0; i < per_block && block * per_block + i < a.n; i++) {
            T *to = out + a.out.offset(block * per_block + i);
            if (a.kind == LAC_INTEGER) {
                int64_t v = lac_rng_integer(lac_rng_pair(word[2 * i], word[2 * i + 1]), (int64_t)a.a, (int64_t)a.b);
                if constexpr (is_float_v<T>) *to = random_as<T>((double)v);
                else *to = from_compute<T>(v);
            } else {
                double v = u[i];
                if (a.kind == LAC_UNIFORM) v = lac_rng_between(v, a.a, a.b, a.top);
                if (a.kind == LAC_BERNOULLI) v = lac_rng_event(v, a.a);
                *to = random_as<T>(v);
            }
        }
    }
}

extern "C" int lac_cuda_random(const lac_a_random *a)
{
    static const struct {
        int bits, least;
    } format[] = {{53, -1074}, {24, -149}, {11, -24}, {8, -133}};
    random_args r = {walk_axes(&a->out, 0, a->out.ndim), a->kind, a->a, a->b, 0, a->seed, a->offset, 1};
    for (int d = 0; d < a->out.ndim; d++) r.n *= a->out.shape[d];
    if (r.n == 0) return 0;
    if (a->kind == LAC_UNIFORM)
        r.top = lac_rng_below(format[a->out.dtype].bits, format[a->out.dtype].least, a->a, a->b);
    return dispatch_any(a->out.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        launch(random_kernel<T>, blocks_filling(r.n, 4 * THREADS, 16), THREADS, 0, r, (T *)a->out.data);
        return lac_cuda_launched("random");
    });
}

struct dropout_args {
    view_walk x, out;
    bool dense;
    float p;
    double scale;
    uint64_t seed, offset;
    int64_t n;
};

template <class T> __global__ void __launch_bounds__(THREADS) dropout_kernel(dropout_args a, const T *x, T *out)
{
    typedef compute_t<T> C;
    struct alignas(4 * sizeof(T)) four {
        T at[4];
    };
    int64_t blocks = (a.n + 3) / 4;
    C scale = (C)a.scale;
    previous_done();
    for (int64_t block = (int64_t)blockIdx.x * THREADS + threadIdx.x; block < blocks;
         block += (int64_t)gridDim.x * THREADS) {
        uint32_t word[4];
        lac_philox(a.seed, a.offset, (uint64_t)block, word);
        if (a.dense && block * 4 + 4 <= a.n) {
            four v = ((const four *)x)[block];
#pragma unroll
            for (int i = 0; i < 4; i++)
                v.at[i] = from_compute<T>(lac_rng_keep(word[i], a.p) ? to_compute(v.at[i]) * scale : C(0));
            ((four *)out)[block] = v;
        } else {
            for (int i = 0; i < 4 && block * 4 + i < a.n; i++) {
                C v = to_compute(x[a.x.offset(block * 4 + i)]);
                out[a.out.offset(block * 4 + i)] = from_compute<T>(lac_rng_keep(word[i], a.p) ? v * scale : C(0));
            }
        }
    }
}

extern "C" int lac_cuda_dropout(const lac_a_dropout *a)
{
    dropout_args d = {walk_axes(&a->x, 0, a->x.ndim),
                      walk_axes(&a->out, 0, a->out.ndim),
                      false,
                      (float)a->p,
                      1.0 / (1.0 - a->p),
                      a->seed,
                      a->offset,
                      1};
    for (int i = 0; i < a->out.ndim; i++) d.n *= a->out.shape[i];
    if (d.n == 0) return 0;
    uintptr_t align = (uintptr_t)(4 * dtype_bytes(a->x.dtype));
    d.dense = view_contiguous(&a->x) && view_contiguous(&a->out) && (uintptr_t)a->x.data % align == 0 &&
              (uintptr_t)a->out.data % align == 0;
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        launch(dropout_kernel<T>, blocks_filling(d.n, 4 * THREADS, 16), THREADS, 0, d, (const T *)a->x.data,
               (T *)a->out.data);
        return lac_cuda_launched("dropout");
    });
}
