/* elem.cuh: how elementwise functions run on CUDA: loops that know nothing of the functions, and the functions as
 * switches that know nothing of loops or dtypes.
 *
 * A kernel belongs to a family (functions of one tensor, of two, gradients, ...) and to a compute type: float for f32,
 * f16 and bf16, double, int64_t for the integers and bool. The storage type is looked at when values are loaded and
 * stored, the function's number in between, both by branches that go the same way for every thread. So a function is
 * compiled once per compute type and family. A kernel per function and dtype would be thousands of kernels.
 *
 * The few functions that models spend their time in do have kernels of their own for f32, f16 and bf16, where nothing
 * is decided at run time: at 4 TB/s a multiprocessor has some 30 instructions for an element of a half type, and
 * branches, IEEE division and the handling of denormals are more than that. On an H200 gelu of bf16
 * [32768, 3072] went from 57% of a copy's bandwidth to 94%.
 *
 * Dense operands (and repeated scalars) of f32, f16 and bf16 move 16 bytes at a time, all loads of a thread's turn
 * before the first is used; the floor is the bytes. Everything else (strides, broadcasts, f64, integers) walks a merged
 * loop nest, two elements a turn.
 */
#ifndef LAC_CUDA_ELEM_CUH
#define LAC_CUDA_ELEM_CUH
#include "launch.cuh"
#include "maps.cuh"
#include "short.cuh"
#include <utility>

enum { INPUTS = 4, GROUP = 8 /* elements that a thread computes at once */ };
/* vectors of each input that a thread loads before it uses the first, and blocks that a multiprocessor must hold: more
 * of either hides more latency, and both cost registers */
template <int I> inline constexpr int dense_vectors = I > 2 ? 2 : 4;
template <int I> inline constexpr int dense_blocks = I > 2 ? 3 : 4;
/* Of the kernels of one function: small blocks are enough to hide latency there. On an H200 exp of bf16 [32768, 768]
 * and [32768, 3072] took 25.4 and 96.5 us with one vector, 26.0 and 99.5 with two, 26.3 and 100 with four, f32 49.0 and
 * 190, 50.4 and 196, 50.9 and 198; blocks of 128 threads the same, of 512 0.5% to 1% more, of 64 a quarter. Hints to
 * the caches changed nothing or cost up to 7%. */
enum { QUICK_VECTORS = 1 };

/* All inputs have one dtype. The input `slot` (-1: none) is the number; p, q, r of MAPP and MAP3 are constants. */
struct dense_args {
    char *in[INPUTS], *out;
    int64_t n;
    double number, constant[3];
    int fn, dtype, out_dtype, slot;
    bool scalar[INPUTS]; /* in[i] is one element */
};
/* Strided loops get a nest as well. */
struct map_args : dense_args {
    bool small;
    union {
        nest32 nest_small;
        nest64 nest_large;
    };
};
typedef void dense_kernel(dense_args);
typedef void map_kernel(map_args);

/* ---- one element of any dtype ---- */

template <class C> __device__ __forceinline__ C load_element(int dtype, const char *p)
{
    if constexpr (std::is_same_v<C, double>) {
        return *(const double *)p;
    } else if constexpr (std::is_same_v<C, float>) {
        if (dtype == LAC_F32) return *(const float *)p;
        return dtype == LAC_F16 ? __half2float(*(const f16 *)p) : __bfloat162float(*(const bf16 *)p);
    } else {
        if (dtype == LAC_I64) return *(const int64_t *)p;
        return dtype == LAC_I32 ? *(const int32_t *)p : *(const uint8_t *)p;
    }
}

template <class C> __device__ __forceinline__ void store_element(int dtype, char *p, C v)
{
    if (dtype == LAC_BOOL) {
        *(uint8_t *)p = v != 0;
        return;
    }
    if constexpr (std::is_same_v<C, double>) {
        *(double *)p = v;
    } else if constexpr (std::is_same_v<C, float>) {
        if (dtype == LAC_F32) *(float *)p = v;
        else if (dtype == LAC_F16) *(f16 *)p = __float2half_rn(v);
        else *(bf16 *)p = __float2bfloat16_rn(v);
    } else {
        if (dtype == LAC_I64) *(int64_t *)p = v;
        else if (dtype == LAC_I32) *(int32_t *)p = (int32_t)v;
        else *(uint8_t *)p = (uint8_t)v;
    }
}

/* ---- vectors of 16 bytes: four elements of f32, eight of a half type ---- */

/* two elements of a half type */
static __device__ __forceinline__ float2 unpack_pair(int dtype, uint32_t word)
{
    if (dtype == LAC_F16) return __half22float2(*(const __half2 *)&word);
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
static __device__ __forceinline__ uint32_t pack_pair(int dtype, float x, float y)
{
    uint32_t word;
    if (dtype == LAC_F16) *(__half2 *)&word = __floats2half2_rn(x, y);
    else *(__nv_bfloat162 *)&word = __floats2bfloat162_rn(x, y);
    return word;
}

/* the elements of a vector; of f32 the first four are filled */
static __device__ __forceinline__ void unpack(int dtype, const uint4 &raw, float (&v)[8])
{
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
    if (dtype == LAC_F32) {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = __uint_as_float(word[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = unpack_pair(dtype, word[i]);
            v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
        }
    }
}

/* ---- loops ---- */

/* eight results: one vector of a half type at `first`, or of f32 two of four, the second at `second` */
static __device__ __forceinline__ void store_group(int dtype, bool wide, char *out, int64_t first, int64_t second,
                                                   const float (&y)[GROUP])
{
    if (dtype == LAC_BOOL) {
        uint32_t word[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            word[i] =
                (y[4 * i] != 0) | (y[4 * i + 1] != 0) << 8 | (y[4 * i + 2] != 0) << 16 | (y[4 * i + 3] != 0) << 24;
        *(uint32_t *)(out + first) = word[0];
        *(uint32_t *)(out + (wide ? second : first + 4)) = word[1];
    } else if (wide) {
        *(float4 *)(out + first * 4) = make_float4(y[0], y[1], y[2], y[3]);
        *(float4 *)(out + second * 4) = make_float4(y[4], y[5], y[6], y[7]);
    } else {
        *(uint4 *)(out + first * 2) = make_uint4(pack_pair(dtype, y[0], y[1]), pack_pair(dtype, y[2], y[3]),
                                                 pack_pair(dtype, y[4], y[5]), pack_pair(dtype, y[6], y[7]));
    }
}

/* Loads a turn's vectors, then computes eight elements at a time: a vector of a half type, two of f32. select(visit)
 * calls visit(f) with the function; I inputs. */
template <int I, int VECTORS, class S> __device__ __forceinline__ void dense_loop(const dense_args &a, S select)
{
    bool wide = a.dtype == LAC_F32;
    int per = wide ? 4 : 8, step = wide ? 2 : 1;
    int64_t full = a.n / per, vectors = (a.n + per - 1) / per, turn = (int64_t)THREADS * VECTORS;
    float fixed[I];
#pragma unroll
    for (int k = 0; k < I; k++)
        fixed[k] = a.slot == k ? (float)a.number : a.scalar[k] ? load_element<float>(a.dtype, a.in[k]) : 0;
    for (int64_t base = blockIdx.x * turn + threadIdx.x; base < vectors; base += gridDim.x * turn) {
        uint4 raw[VECTORS][I];
#pragma unroll
        for (int u = 0; u < VECTORS; u++)
#pragma unroll
            for (int k = 0; k < I; k++)
                if (!a.scalar[k] && base + u * THREADS < full) raw[u][k] = ((const uint4 *)a.in[k])[base + u * THREADS];
#pragma unroll 1
        for (int u = 0; u < VECTORS; u += step) { /* not unrolled: the functions are the bulk of the code */
            int64_t at = base + u * THREADS, first = at * per, second = first + (wide ? 4 * THREADS : 4);
            bool whole = (wide ? at + THREADS : at) < full;
            float v[INPUTS][GROUP] = {}, y[GROUP];
            if (first >= a.n) break;
#pragma unroll
            for (int k = 0; k < I; k++) {
                uint4 w = raw[0][k], next = raw[1][k];
#pragma unroll
                for (int s = 1; s < VECTORS; s++)
                    if (u == s) w = raw[s][k], next = raw[s + 1 < VECTORS ? s + 1 : s][k];
                if (a.scalar[k]) {
#pragma unroll
                    for (int i = 0; i < GROUP; i++) v[k][i] = fixed[k];
                } else if (!whole) { /* the end: element by element */
#pragma unroll
                    for (int i = 0; i < GROUP; i++) {
                        int64_t e = i < 4 ? first + i : second + i - 4;
                        if (e < a.n) v[k][i] = load_element<float>(a.dtype, a.in[k] + e * (wide ? 4 : 2));
                    }
                } else {
                    unpack(a.dtype, w, v[k]);
                    if (wide) {
                        v[k][4] = __uint_as_float(next.x), v[k][5] = __uint_as_float(next.y);
                        v[k][6] = __uint_as_float(next.z), v[k][7] = __uint_as_float(next.w);
                    }
                }
            }
            select([&](auto f) {
#pragma unroll
                for (int i = 0; i < GROUP; i++) y[i] = (float)f(v[0][i], v[1][i], v[2][i], v[3][i]);
            });
            if (whole) {
                store_group(a.out_dtype, wide, a.out, first, second, y);
            } else {
                int bytes = a.out_dtype == LAC_BOOL ? 1 : wide ? 4 : 2;
#pragma unroll
                for (int i = 0; i < GROUP; i++) {
                    int64_t e = i < 4 ? first + i : second + i - 4;
                    if (e < a.n) store_element(a.out_dtype, a.out + e * bytes, y[i]);
                }
            }
        }
    }
}

/* One function of one type: as dense_loop, but a block has one turn, and nothing in it depends on what is asked for but
 * whether an input is a repeated scalar. */
template <int DTYPE, int I, class S> __device__ __forceinline__ void quick_loop(const dense_args &a, S select)
{
    constexpr int PER = DTYPE == LAC_F32 ? 4 : 8, BYTES = 16 / PER, VECTORS = QUICK_VECTORS;
    int64_t begin = (int64_t)blockIdx.x * (THREADS * VECTORS), first = begin + threadIdx.x;
    float fixed[I], v[INPUTS][PER] = {}, y[GROUP] = {};
#pragma unroll
    for (int k = 0; k < I; k++)
        fixed[k] = a.slot == k ? (float)a.number : I > 1 && a.scalar[k] ? load_element<float>(DTYPE, a.in[k]) : 0;
    auto compute = [&](const uint4 *raw) {
#pragma unroll
        for (int k = 0; k < I; k++) {
            float w[8];
            unpack(DTYPE, raw[k], w);
#pragma unroll
            for (int i = 0; i < PER; i++) v[k][i] = I > 1 && a.scalar[k] ? fixed[k] : w[i];
        }
        select([&](auto f) {
#pragma unroll
            for (int i = 0; i < PER; i++) y[i] = (float)f(v[0][i], v[1][i], v[2][i], v[3][i]);
        });
    };
    uint4 raw[VECTORS][I];
    if (begin + THREADS * VECTORS <= a.n / PER) {
#pragma unroll
        for (int u = 0; u < VECTORS; u++)
#pragma unroll
            for (int k = 0; k < I; k++)
                if (I == 1 || !a.scalar[k]) raw[u][k] = ((const uint4 *)a.in[k])[first + u * THREADS];
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
            compute(raw[u]);
            if (DTYPE == LAC_F32) ((float4 *)a.out)[first + u * THREADS] = make_float4(y[0], y[1], y[2], y[3]);
            else
                ((uint4 *)a.out)[first + u * THREADS] =
                    make_uint4(pack_pair(DTYPE, y[0], y[1]), pack_pair(DTYPE, y[2], y[3]), pack_pair(DTYPE, y[4], y[5]),
                               pack_pair(DTYPE, y[6], y[7]));
        }
        return;
    }
    for (int64_t e = begin * PER + threadIdx.x; e < a.n; e += THREADS) { /* the last block: element by element */
        float w[INPUTS] = {};
#pragma unroll
        for (int k = 0; k < I; k++)
            w[k] = I > 1 && a.scalar[k] ? fixed[k] : load_element<float>(DTYPE, a.in[k] + e * BYTES);
        select([&](auto f) { y[0] = (float)f(w[0], w[1], w[2], w[3]); });
        store_element<float>(DTYPE, a.out + e * BYTES, y[0]);
    }
}

template <class C, int I, class S> __device__ __forceinline__ void strided_loop(const map_args &a, S select)
{
    for (int64_t base = (int64_t)blockIdx.x * (2 * THREADS) + threadIdx.x; base < a.n;
         base += (int64_t)gridDim.x * (2 * THREADS)) {
        int64_t offset[2][I + 1] = {};
        C v[2][INPUTS] = {};
#pragma unroll
        for (int u = 0; u < 2; u++) {
            int64_t at = base + u * THREADS < a.n ? base + u * THREADS : base;
            if (a.small) {
                int32_t near[I + 1];
                a.nest_small.template offsets<I + 1>((uint32_t)at, near);
#pragma unroll
                for (int k = 0; k <= I; k++) offset[u][k] = near[k];
            } else {
                a.nest_large.template offsets<I + 1>(at, offset[u]);
            }
        }
#pragma unroll
        for (int u = 0; u < 2; u++)
#pragma unroll
            for (int k = 0; k < I; k++)
                v[u][k] = a.slot == k ? (C)a.number : load_element<C>(a.dtype, a.in[k] + offset[u][k + 1]);
#pragma unroll 1
        for (int u = 0; u < 2 && base + u * THREADS < a.n; u++) {
            C w[INPUTS], y;
#pragma unroll
            for (int k = 0; k < INPUTS; k++) w[k] = u ? v[1][k] : v[0][k];
            select([&](auto f) { y = (C)f(w[0], w[1], w[2], w[3]); });
            store_element<C>(a.out_dtype, a.out + (u ? offset[1][0] : offset[0][0]), y);
        }
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
    M1_exp_short, /* of a half type, see below */
    M1_sigmoid_short,
    M1_silu_short,
    M1_gelu_short
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

/* the function that stands in for fn of a half type */
static inline int short_of(int fn)
{
    return fn == M1_exp       ? M1_exp_short
           : fn == M1_sigmoid ? M1_sigmoid_short
           : fn == M1_silu    ? M1_silu_short
           : fn == M1_gelu    ? M1_gelu_short
                              : fn;
}

#define DOMAIN_FLOAT (!std::is_same_v<C, int64_t>)
#define DOMAIN_BOOL std::is_same_v<C, int64_t>
#define DOMAIN_ANY true
#define DOMAIN_INT std::is_same_v<C, int64_t>
/* functions that have kernels of their own, and whether those are for half types, for f32 or for both */
enum { QUICK_BOTH, QUICK_WIDE, QUICK_HALF };
struct quick_entry {
    int fn, types;
};
static constexpr quick_entry quick_map1_list[] = {
    {M1_neg, QUICK_BOTH},        {M1_abs, QUICK_BOTH},           {M1_square, QUICK_BOTH},    {M1_relu, QUICK_BOTH},
    {M1_sqrt, QUICK_BOTH},       {M1_tanh, QUICK_BOTH},          {M1_gelu_tanh, QUICK_BOTH}, {M1_exp, QUICK_WIDE},
    {M1_sigmoid, QUICK_WIDE},    {M1_silu, QUICK_WIDE},          {M1_gelu, QUICK_WIDE},      {M1_exp_short, QUICK_HALF},
    {M1_silu_short, QUICK_HALF}, {M1_sigmoid_short, QUICK_HALF}, {M1_gelu_short, QUICK_HALF}};
static constexpr quick_entry quick_map2_list[] = {
    {M2_add, QUICK_BOTH}, {M2_sub, QUICK_BOTH}, {M2_mul, QUICK_BOTH}, {M2_div, QUICK_BOTH}, {M2_swiglu, QUICK_BOTH}};

/* One case: a function of x, y, z and w, if the domain has C. A kernel of its own has but its own (ONLY; -1: all), for
 * the compiler's time. */
#define CASE(id, domain, expression)                                                                                   \
    case id:                                                                                                           \
        if constexpr (DOMAIN_##domain && (ONLY < 0 || ONLY == (id)))                                                   \
            visit([p, q, r](C x, C y, C z, C w) -> C {                                                                 \
                (void)x, (void)y, (void)z, (void)w;                                                                    \
                return (C)(expression);                                                                                \
            });                                                                                                        \
        break;
#define SELECT(name)                                                                                                   \
    template <class C, int ONLY = -1, class V>                                                                         \
    __device__ __forceinline__ void select_##name(int fn, const dense_args &a, V visit)                                \
    {                                                                                                                  \
        C p = (C)a.constant[0], q = (C)a.constant[1], r = (C)a.constant[2];                                            \
        (void)p, (void)q, (void)r;                                                                                     \
        switch (fn) {
#define SELECT_END                                                                                                     \
    }                                                                                                                  \
    }

/* the kernels of a family: name_dense for the float types, name_strided for any compute type */
#define KERNELS(name, inputs)                                                                                          \
    __global__ void __launch_bounds__(THREADS, dense_blocks<inputs>) name##_dense(dense_args a)                        \
    {                                                                                                                  \
        previous_done();                                                                                               \
        dense_loop<inputs, dense_vectors<inputs>>(a, [&](auto visit) { select_##name<float>(a.fn, a, visit); });       \
    }                                                                                                                  \
    template <class C> __global__ void __launch_bounds__(THREADS) name##_strided(map_args a)                           \
    {                                                                                                                  \
        previous_done();                                                                                               \
        strided_loop<C, inputs>(a, [&](auto visit) { select_##name<C>(a.fn, a, visit); });                             \
    }

/* the kernels of one function and type; name_quick(fn, dtype) gives the one of a list's function, or NULL */
#define QUICK_KERNELS(name, inputs, list)                                                                              \
    template <int FN, int DTYPE> __global__ void __launch_bounds__(THREADS) name##_one(dense_args a)                   \
    {                                                                                                                  \
        previous_done();                                                                                               \
        quick_loop<DTYPE, inputs>(a, [&](auto visit) { select_##name<float, FN>(FN, a, visit); });                     \
    }                                                                                                                  \
    template <int AT> static dense_kernel *name##_entry(int dtype)                                                     \
    {                                                                                                                  \
        if constexpr (list[AT].types != QUICK_HALF)                                                                    \
            if (dtype == LAC_F32) return name##_one<list[AT].fn, LAC_F32>;                                             \
        if constexpr (list[AT].types != QUICK_WIDE) {                                                                  \
            if (dtype == LAC_F16) return name##_one<list[AT].fn, LAC_F16>;                                             \
            if (dtype == LAC_BF16) return name##_one<list[AT].fn, LAC_BF16>;                                           \
        }                                                                                                              \
        return NULL;                                                                                                   \
    }                                                                                                                  \
    template <int... AT> static dense_kernel *name##_find(int fn, int dtype, std::integer_sequence<int, AT...>)        \
    {                                                                                                                  \
        dense_kernel *found = NULL;                                                                                    \
        ((list[AT].fn == fn ? (void)(found = name##_entry<AT>(dtype)) : (void)0), ...);                                \
        return found;                                                                                                  \
    }                                                                                                                  \
    static dense_kernel *name##_quick(int fn, int dtype)                                                               \
    {                                                                                                                  \
        return name##_find(fn, dtype, std::make_integer_sequence<int, sizeof list / sizeof list[0]>());                \
    }

/* ---- launching ---- */

struct operands {
    const lac_view *view[INPUTS + 1]; /* the result, inputs */
    int inputs, slot;                 /* slot: the input that is a number, or -1 */
    double number, constant[3];
};

/* kernels: of this one function (or NULL), dense, of float, double and int64_t (NULL where a family has floats only) */
int elem_launch(const char *op, const operands &o, int fn, dense_kernel *quick, dense_kernel *dense, map_kernel *floats,
                map_kernel *doubles, map_kernel *integers);
#define LAUNCH_ANY(op, name, fn, quick, o)                                                                             \
    elem_launch(op, o, fn, quick, name##_dense, name##_strided<float>, name##_strided<double>, name##_strided<int64_t>)
#define LAUNCH_FLOAT(op, name, fn, quick, o)                                                                           \
    elem_launch(op, o, fn, quick, name##_dense, name##_strided<float>, name##_strided<double>, NULL)

#endif
