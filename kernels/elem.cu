/* elem.cu: elementwise functions of c/maps.def on CUDA.
 *
 * One kernel per dtype and family holds all functions behind a switch on the function's number. The branch is the same
 * for every thread; in the dense kernels it lies outside of the loop, so each function has a loop of its own. A kernel
 * per function and dtype would be a thousand kernels and many minutes of compilation.
 *
 * Dense operands (and repeated scalars) of f32, f16 and bf16 are moved 16 bytes at a time, with several independent
 * vectors in flight per thread; the floor is the bytes. Everything else (strides, broadcasts, f64, integers) walks a
 * merged loop nest, one element a thread, two at a time.
 */
#include "maps.cuh"

/* ---- loops ---- */

enum { INPUTS = 4 };
/* vectors, or elements of a strided nest, that a thread loads before it uses the first */
template <class T> inline constexpr int flat_flight = sizeof(T) >= 4 ? 4 : 2;
template <class N> inline constexpr int strided_flight = std::is_same_v<N, nest32> ? 2 : 1;
template <class T> inline constexpr bool has_dense = is_float_v<T> && sizeof(T) <= 4;

template <class T, int N> struct alignas(sizeof(T) * N) pack {
    T at[N];
};

/* one of the inputs, `slot`, may be a number; p, q, r of MAPP and MAP3 are constants */
struct flat_args {
    const void *in[INPUTS];
    void *out;
    int64_t n;
    bool scalar[INPUTS]; /* in[i] is one element */
    double number, constant[3];
    int slot;
};
template <class N> struct strided_args {
    N nest;
    char *data[INPUTS + 1]; /* out, inputs */
    int64_t n;
    double number, constant[3];
    int slot;
};

/* out[i] = f(in[0][i], ...) over dense arrays; I inputs, R the result's storage type */
template <class T, class R, int I, class F> __device__ __forceinline__ void flat_loop(const flat_args &a, F f)
{
    typedef compute_t<T> C;
    constexpr int N = 16 / sizeof(T), FLIGHT = flat_flight<T>;
    C fixed[INPUTS] = {};
#pragma unroll
    for (int k = 0; k < I; k++)
        if (a.scalar[k]) fixed[k] = a.slot == k ? (C)a.number : to_compute(*(const T *)a.in[k]);
    int64_t vectors = a.n / N, start = (int64_t)blockIdx.x * (THREADS * FLIGHT) + threadIdx.x;
    for (int64_t base = start; base < vectors; base += (int64_t)gridDim.x * (THREADS * FLIGHT)) {
        pack<T, N> x[I][FLIGHT];
#pragma unroll
        for (int k = 0; k < I; k++)
#pragma unroll
            for (int u = 0; u < FLIGHT; u++) {
                int64_t at = base + u * THREADS;
                if (!a.scalar[k] && at < vectors) x[k][u] = ((const pack<T, N> *)a.in[k])[at];
            }
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            int64_t at = base + u * THREADS;
            if (at >= vectors) break;
            pack<R, N> y;
#pragma unroll
            for (int i = 0; i < N; i++) {
                C v[INPUTS] = {};
#pragma unroll
                for (int k = 0; k < I; k++) v[k] = a.scalar[k] ? fixed[k] : to_compute(x[k][u].at[i]);
                y.at[i] = from_compute<R>(f(v[0], v[1], v[2], v[3]));
            }
            ((pack<R, N> *)a.out)[at] = y;
        }
    }
    int64_t rest = vectors * N + threadIdx.x; /* fewer than N elements */
    if (blockIdx.x == 0 && rest < a.n) {
        C v[INPUTS] = {};
#pragma unroll
        for (int k = 0; k < I; k++) v[k] = a.scalar[k] ? fixed[k] : to_compute(((const T *)a.in[k])[rest]);
        ((R *)a.out)[rest] = from_compute<R>(f(v[0], v[1], v[2], v[3]));
    }
}

/* The loop is outside of the switch here: index arithmetic costs more than a uniform branch, and is compiled once. */
template <class T, int I, class N, class F> __device__ __forceinline__ void strided_loop(const strided_args<N> &a, F f)
{
    typedef compute_t<T> C;
    constexpr int FLIGHT = strided_flight<N>;
    typedef std::conditional_t<std::is_same_v<N, nest32>, int32_t, int64_t> offset_t;
    typedef std::conditional_t<std::is_same_v<N, nest32>, uint32_t, int64_t> index_t;
    for (int64_t base = (int64_t)blockIdx.x * (THREADS * FLIGHT) + threadIdx.x; base < a.n;
         base += (int64_t)gridDim.x * (THREADS * FLIGHT)) {
        offset_t offset[FLIGHT][I + 1];
        C v[FLIGHT][INPUTS] = {};
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            if (base + u * THREADS >= a.n) break;
            a.nest.template offsets<I + 1>((index_t)(base + u * THREADS), offset[u]);
#pragma unroll
            for (int k = 0; k < I; k++)
                v[u][k] = a.slot == k ? (C)a.number : to_compute(*(const T *)(a.data[k + 1] + offset[u][k + 1]));
        }
#pragma unroll
        for (int u = 0; u < FLIGHT; u++)
            if (base + u * THREADS < a.n) f(a.data[0] + offset[u][0], v[u][0], v[u][1], v[u][2], v[u][3]);
    }
}

/* ---- the functions ---- */

#define K(c) ((C)(c))
enum {
#define MAP1(name, domain, value, gradient) M1_##name,
#define CMP1(name, value) M1_##name,
#define LOGIC1(name, text, value) M1_##name,
#define INT1(name, value) M1_##name,
#include "maps.def"
};
enum {
#define MAP2(name, domain, value, d_x, d_y) M2_##name,
#define CMP2(name, value) M2_##name,
#define LOGIC2(name, text, value) M2_##name,
#define INT2(name, value) M2_##name,
#include "maps.def"
};
enum {
#define MAPP(name, domain, count, value, gradient) MP_##name,
#include "maps.def"
};
enum {
#define MAP3(name, value, d_x, d_y, d_z) M3_##name,
#include "maps.def"
};
#define DOMAIN_FLOAT is_float_v<T>
#define DOMAIN_BOOL std::is_same_v<T, bool8>
#define DOMAIN_ANY (!DOMAIN_BOOL)
#define DOMAIN_INT (!DOMAIN_BOOL && !is_float_v<T>)
/* one case: if the domain has T, R results of an expression in x, y, z and w */
#define CASE(id, domain, R, expression)                                                                                \
    case id:                                                                                                           \
        if constexpr (DOMAIN_##domain)                                                                                 \
            visit(type_tag<R>(), [p, q, r](C x, C y, C z, C w) -> compute_t<R> {                                       \
                (void)x, (void)y, (void)z, (void)w;                                                                    \
                return expression;                                                                                     \
            });                                                                                                        \
        break;
#define SELECT(name)                                                                                                   \
    template <class T, class V>                                                                                        \
    __device__ __forceinline__ void select_##name(int fn, const double(&constant)[3], V visit)                         \
    {                                                                                                                  \
        typedef compute_t<T> C;                                                                                        \
        C p = (C)constant[0], q = (C)constant[1], r = (C)constant[2];                                                  \
        (void)p, (void)q, (void)r;                                                                                     \
        switch (fn) {
#define SELECT_END                                                                                                     \
    }                                                                                                                  \
    }

/* Each family is one switch, written once. select_*(fn, constants, visit) calls visit(tag of the result's storage type,
 * function of four compute values). The dense kernel makes a loop of each function, the strided one a store. */
// clang-format off
SELECT(map1)
#define MAP1(name, domain, value, gradient) CASE(M1_##name, domain, T, value)
#define CMP1(name, value) case M1_##name: visit(type_tag<bool8>(), [](C x, C, C, C) -> int64_t { return value; }); break;
#define LOGIC1(name, text, value) CASE(M1_##name, BOOL, bool8, value)
#define INT1(name, value) CASE(M1_##name, INT, T, value)
#include "maps.def"
SELECT_END

/* inputs x, y (the result), z: its gradient */
SELECT(map1_bwd)
#define MAP1(name, domain, value, gradient) CASE(M1_##name, FLOAT, T, z * (gradient))
#include "maps.def"
SELECT_END

SELECT(map2)
#define MAP2(name, domain, value, d_x, d_y) CASE(M2_##name, domain, T, value)
#define CMP2(name, value) case M2_##name: visit(type_tag<bool8>(), [](C x, C y, C, C) -> int64_t { return value; }); break;
#define LOGIC2(name, text, value) CASE(M2_##name, BOOL, bool8, value)
#define INT2(name, value) CASE(M2_##name, INT, T, value)
#include "maps.def"
SELECT_END

SELECT(map2_bwd_x)
#define MAP2(name, domain, value, d_x, d_y) CASE(M2_##name, FLOAT, T, z * (d_x))
#include "maps.def"
SELECT_END

SELECT(map2_bwd_y)
#define MAP2(name, domain, value, d_x, d_y) CASE(M2_##name, FLOAT, T, z * (d_y))
#include "maps.def"
SELECT_END

SELECT(mapp)
#define MAPP(name, domain, count, value, gradient) CASE(MP_##name, domain, T, value)
#include "maps.def"
SELECT_END

SELECT(mapp_bwd)
#define MAPP(name, domain, count, value, gradient) CASE(MP_##name, FLOAT, T, z * (gradient))
#include "maps.def"
SELECT_END

SELECT(map3)
#define MAP3(name, value, d_x, d_y, d_z) CASE(M3_##name, FLOAT, T, value)
#include "maps.def"
SELECT_END

/* three numbers a function: towards x, y, z; w is the gradient */
SELECT(map3_bwd)
#define MAP3(name, value, d_x, d_y, d_z) \
    CASE(3 * M3_##name, FLOAT, T, w * (d_x)) CASE(3 * M3_##name + 1, FLOAT, T, w * (d_y)) \
    CASE(3 * M3_##name + 2, FLOAT, T, w * (d_z))
#include "maps.def"
SELECT_END

/* 1: dst = alpha x + dst (inputs x, alpha, dst); 0: alpha dst */
SELECT(axpy)
CASE(1, ANY, T, F_add(F_mul(y, x), z))
CASE(0, ANY, T, F_mul(y, z))
SELECT_END
// clang-format on

#define KERNELS(name, inputs)                                                                                          \
    template <class T> __global__ void __launch_bounds__(THREADS) name##_kernel(int fn, flat_args a)                   \
    {                                                                                                                  \
        if constexpr (has_dense<T>)                                                                                    \
            select_##name<T>(fn, a.constant,                                                                           \
                             [&](auto r, auto f) { flat_loop<T, typename decltype(r)::type, inputs>(a, f); });         \
    }                                                                                                                  \
    template <class T, class N> __global__ void __launch_bounds__(THREADS) name##_kernel(int fn, strided_args<N> a)    \
    {                                                                                                                  \
        strided_loop<T, inputs>(a, [&](char *out, auto x, auto y, auto z, auto w) {                                    \
            select_##name<T>(fn, a.constant, [&](auto r, auto f) {                                                     \
                typedef typename decltype(r)::type R;                                                                  \
                *(R *)out = from_compute<R>(f(x, y, z, w));                                                            \
            });                                                                                                        \
        });                                                                                                            \
    }
KERNELS(map1, 1)
KERNELS(map1_bwd, 3)
KERNELS(map2, 2)
KERNELS(map2_bwd_x, 3)
KERNELS(map2_bwd_y, 3)
KERNELS(mapp, 1)
KERNELS(mapp_bwd, 3)
KERNELS(map3, 3)
KERNELS(map3_bwd, 4)
KERNELS(axpy, 3)

/* ---- launching ---- */

struct operands {
    const lac_view *view[INPUTS + 1]; /* the result, inputs */
    int inputs, slot;                 /* slot: the input that is a number, or -1 */
    double number, constant[3];
};

/* calls launch_one(args, blocks) with the arguments of the layout that the views have */
template <class T, class L> static int launch(const char *op, const operands &o, L launch_one)
{
    constexpr int64_t size = sizeof(T), per_vector = 16 / size;
    int64_t out_bytes = dtype_bytes(o.view[0]->dtype);
    nest n = nest_make(o.inputs + 1, o.view);
    if (n.total == 0) return 0;
    flat_args f = {{}, n.data[0], n.total, {}, o.number, {o.constant[0], o.constant[1], o.constant[2]}, o.slot};
    bool dense = has_dense<T> && nest_run(n, 0, out_bytes) != RUN_STRIDED;
    dense = dense && (uintptr_t)n.data[0] % (uintptr_t)(out_bytes * per_vector) == 0;
    for (int k = 0; k < o.inputs; k++) {
        int kind = k == o.slot ? RUN_SCALAR : nest_run(n, k + 1, size);
        f.in[k] = n.data[k + 1];
        f.scalar[k] = kind == RUN_SCALAR;
        dense = dense && kind != RUN_STRIDED && (f.scalar[k] || (uintptr_t)n.data[k + 1] % 16 == 0);
    }
    auto strided = [&](auto m) {
        strided_args<decltype(m)> s = {m, {}, n.total, o.number, {o.constant[0], o.constant[1], o.constant[2]}, o.slot};
        for (int v = 0; v <= o.inputs; v++) s.data[v] = n.data[v];
        launch_one(s, blocks_filling(n.total, THREADS * strided_flight<decltype(m)>, 32));
    };
    if (dense) launch_one(f, blocks_filling(n.total / per_vector + 1, THREADS * flat_flight<T>, 16));
    else if (n.small) strided(nest_32(n));
    else strided(nest_64(n));
    return lac_cuda_launched(op);
}

#define LAUNCH(dispatch, dtype, op, kernel, fn, operands)                                                              \
    dispatch(dtype, [&](auto tag) {                                                                                    \
        typedef typename decltype(tag)::type T;                                                                        \
        return launch<T>(op, operands, [&](auto args, unsigned blocks) {                                               \
            kernel<T><<<blocks, THREADS, 0, lac_cuda_stream>>>(fn, args);                                              \
        });                                                                                                            \
    })

extern "C" int lac_cuda_map1(const lac_a_map1 *a)
{
    operands o = {{&a->out, &a->x}, 1, -1};
    return LAUNCH(dispatch_any, a->x.dtype, "map1", map1_kernel, a->fn, o);
}

extern "C" int lac_cuda_map1_bwd(const lac_a_map1_bwd *a)
{
    operands o = {{&a->out, &a->x, &a->y, &a->g}, 3, -1};
    return LAUNCH(dispatch_float, a->x.dtype, "map1_bwd", map1_bwd_kernel, a->fn, o);
}

/* the view that stands in for a number is x's; it is never read */
extern "C" int lac_cuda_map2(const lac_a_map2 *a)
{
    bool number = !a->y.data;
    const lac_view *x = &a->x, *y = number ? &a->x : &a->y;
    operands o = {{&a->out, a->swapped ? y : x, a->swapped ? x : y}, 2, number ? (a->swapped ? 0 : 1) : -1, a->scalar};
    return LAUNCH(dispatch_any, a->x.dtype, "map2", map2_kernel, a->fn, o);
}

extern "C" int lac_cuda_map2_bwd(const lac_a_map2_bwd *a)
{
    bool number = !a->y.data, swapped = number && a->swapped;
    int which = number ? a->swapped : a->which;
    const lac_view *x = &a->x, *y = number ? &a->x : &a->y;
    operands o = {{&a->out, swapped ? y : x, swapped ? x : y, &a->g}, 3, number ? (swapped ? 0 : 1) : -1, a->scalar};
    if (which != 1) LAC_TRY(LAUNCH(dispatch_float, a->x.dtype, "map2_bwd", map2_bwd_x_kernel, a->fn, o));
    if (which == 0) return 0;
    if (which == 2) o.view[0] = &a->out2;
    return LAUNCH(dispatch_float, a->x.dtype, "map2_bwd", map2_bwd_y_kernel, a->fn, o);
}

extern "C" int lac_cuda_mapp(const lac_a_mapp *a)
{
    const double *c = a->constants;
    if (!a->g.data) {
        operands o = {{&a->out, &a->x}, 1, -1, 0, {c[0], c[1], c[2]}};
        return LAUNCH(dispatch_any, a->x.dtype, "mapp", mapp_kernel, a->fn, o);
    }
    operands o = {{&a->out, &a->x, &a->y, &a->g}, 3, -1, 0, {c[0], c[1], c[2]}};
    return LAUNCH(dispatch_float, a->x.dtype, "mapp_bwd", mapp_bwd_kernel, a->fn, o);
}

extern "C" int lac_cuda_map3(const lac_a_map3 *a)
{
    operands o = {{&a->out, &a->x, &a->y, &a->z, &a->g}, a->g.data ? 4 : 3, -1, 0, {a->constant, 0, 0}};
    if (!a->g.data) return LAUNCH(dispatch_float, a->x.dtype, "map3", map3_kernel, a->fn, o);
    return LAUNCH(dispatch_float, a->x.dtype, "map3_bwd", map3_bwd_kernel, 3 * a->fn + a->which, o);
}

extern "C" int lac_cuda_axpy(const lac_a_axpy *a)
{
    const lac_view *x = a->x.data ? &a->x : &a->dst;
    operands o = {{&a->dst, x, x, &a->dst}, 3, 1, a->alpha};
    return LAUNCH(dispatch_any, a->dst.dtype, "axpy", axpy_kernel, a->x.data != NULL, o);
}
