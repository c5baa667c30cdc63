/* attn_hopper_fp8.cu: the forward on Hopper of q, k and v that are rounded to e4m3: rounding, the instances of the
 * kernel, and what is done again.
 *
 * Three passes come before the attention, because a scale is known when all of a head's rows have been seen: maxima;
 * queries and keys, row by row; values, gathered and turned for each branch (attn_hopper_fp8.cuh says why). Every
 * number is rounded to the bits that c/cpu/e4m3.c makes of it: divided by its head's scale, to nearest even, at most
 * 448; infinity and NaN are NaN.
 *
 * Floor: q, k and v are read twice and written once, at half the bytes: for 32768 rows of 2048 columns 1.0 GB or 0.24
 * ms. kernels/HOPPER.md has what was expected and measured.
 */
#include "attn_hopper_launch.cuh"
#include "attn_slow.cuh"
#include <cfloat>

enum { FP8_ROWS = 256, FP8_KEYS = 128 }; /* rows of a thread block that looks or rounds; keys of one that turns */

/* q, k or v; where its maxima, scales and rounded rows are, of each item and head */
struct fp8_tensor {
    attn_tensor x;
    int n, heads;
    uint32_t *most; /* bits of a float that is not negative: they are in its order */
    float *scale;
    uint8_t *rows; /* NULL: v */
};
struct fp8_round_args {
    fp8_tensor of[3];
    int batch, width, wide;
};
struct fp8_values_args {
    attn_args a;
    uint8_t *to;
    const float *scale;
    int64_t begin[LAC_HOPPER_BRANCHES + 1]; /* thread blocks of the branches */
    int64_t at[LAC_HOPPER_BRANCHES];
    int keys[LAC_HOPPER_BRANCHES];
    hopper_eight eight;
};

/* ---- one number ---- */

HOPPER_FN bool fp8_finite(float x) { return fabsf(x) <= FLT_MAX; }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* A head of zeros has scale 1; no scale is subnormal, whose inverse may be infinite. */
HOPPER_FN float fp8_scale(uint32_t bits)
{
    const float most = __uint_as_float(bits);
    return most == 0 ? 1 : fmaxf(__fdiv_rn(most, 448.f), FLT_MIN);
}
HOPPER_FN float fp8_part(float x, float scale) { return fp8_finite(x) ? __fdiv_rn(x, scale) : NAN; }
/* what the eight bits of x stand for */
HOPPER_FN float fp8_rounded(float x, float scale)
{
    uint32_t two;
    asm("{\n.reg .b16 eight;\n"
        "cvt.rn.satfinite.e4m3x2.f32 eight, %1, %1;\n"
        "cvt.rn.f16x2.e4m3x2 %0, eight;\n}"
        : "=r"(two)
        : "f"(fp8_part(x, scale)));
    return __half2float(__ushort_as_half((uint16_t)two)) * scale;
}
#endif
/* eight neighbours of a row, from column 8 c on */
template <class T> HOPPER_FN void fp8_eight(const attn_tensor &x, const T *row, int c, float (&v)[8])
{
    struct alignas(16) chunk {
        T at[8];
    } u;
    if (x.vec) u = ((const chunk *)row)[c];
    else
#pragma unroll
        for (int i = 0; i < 8; i++) u.at[i] = row[(8 * c + i) * x.stride[3]];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_compute(u.at[i]);
}
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class T> HOPPER_FN uint2 fp8_bits(const attn_tensor &x, const T *row, int c, float scale)
{
    float v[8];
    fp8_eight(x, row, c, v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = fp8_part(v[i], scale);
    return {hopper_pack_eight(v[0], v[1], v[2], v[3]), hopper_pack_eight(v[4], v[5], v[6], v[7])};
}
#endif

/* ---- maxima, queries, keys ---- */

/* A thread has one chunk of eight columns; every so many rows of FP8_ROWS. f(row number, chunk). */
template <class F> HOPPER_FN void fp8_each(int n, int width, F &&f)
{
    const int chunks = width / 8, apart = THREADS / chunks, c = (int)threadIdx.x % chunks;
    const int first = (int)blockIdx.x * FP8_ROWS, end = min(n, first + FP8_ROWS);
    if ((int)threadIdx.x >= apart * chunks) return;
    for (int i = first + (int)threadIdx.x / chunks; i < end; i += apart) f(i, c);
}

template <class T>
__global__ void __launch_bounds__(THREADS) attn_fp8_most_kernel(const __grid_constant__ fp8_round_args p)
{
    const fp8_tensor &t = p.of[blockIdx.z / (unsigned)p.batch];
    const int b = (int)blockIdx.z % p.batch, h = (int)blockIdx.y;
    if (h >= t.heads || (int)blockIdx.x * FP8_ROWS >= t.n) return;
    const T *x = (const T *)t.x.data + b * t.x.stride[0] + h * t.x.stride[2];
    float most = 0;
    fp8_each(t.n, p.width, [&](int i, int c) {
        float v[8];
        fp8_eight(t.x, x + i * t.x.stride[1], c, v);
#pragma unroll
        for (int e = 0; e < 8; e++) most = fp8_finite(v[e]) ? fmaxf(most, fabsf(v[e])) : most;
    });
#pragma unroll
    for (int o = 16; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    if (threadIdx.x % 32 == 0 && most > 0) atomicMax(t.most + b * t.heads + h, __float_as_uint(most));
}

template <class T>
__global__ void __launch_bounds__(THREADS) attn_fp8_round_kernel(const __grid_constant__ fp8_round_args p)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const fp8_tensor &t = p.of[blockIdx.z / (unsigned)p.batch];
    const int b = (int)blockIdx.z % p.batch, h = (int)blockIdx.y;
    if (h >= t.heads || (int)blockIdx.x * FP8_ROWS >= t.n) return;
    const float scale = fp8_scale(t.most[b * t.heads + h]);
    if (blockIdx.x == 0 && threadIdx.x == 0) t.scale[b * t.heads + h] = scale;
    if (!t.rows) return;
    const T *x = (const T *)t.x.data + b * t.x.stride[0] + h * t.x.stride[2];
    uint8_t *to = t.rows + ((int64_t)b * t.n * t.heads + h) * p.wide;
    fp8_each(t.n, p.width, [&](int i, int c) {
        *(uint2 *)(to + (int64_t)i * t.heads * p.wide + 8 * c) = fp8_bits(t.x, x + i * t.x.stride[1], c, scale);
    });
#endif
}

/* ---- values ---- */

/* FP8_KEYS keys of one item: rows of numbers become rows of keys, by way of shared memory. */
template <class T>
__global__ void __launch_bounds__(THREADS) attn_fp8_values_kernel(const __grid_constant__ fp8_values_args p)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint32_t words[];
    const attn_args &a = p.a;
    int g = 0;
    while ((int64_t)blockIdx.x >= p.begin[g + 1]) g++;
    const attn_branch &br = a.branch[g];
    const int width = a.head_dim, chunks = width / 8, pitch = width + 4, keys = p.keys[g];
    const int pieces = (keys - 1) / FP8_KEYS + 1, id = (int)((int64_t)blockIdx.x - p.begin[g]);
    const int item = id / pieces, first = (id - item * pieces) * FP8_KEYS, s = item % br.segments;
    const int unit = item / br.segments % p.eight.units[g], b = item / br.segments / p.eight.units[g];
    const int h = max((p.eight.first[g] + unit) * p.eight.share[g], br.head0), kv = h / a.group;
    attn_tile t;
    attn_span(a, g, b, h, br.segment0 + s, t);
    const float scale = p.scale[b * a.kv_heads + kv];
    const T *x = (const T *)a.v.data + b * a.v.stride[0] + kv * a.v.stride[2];
    for (int e = (int)threadIdx.x; e < FP8_KEYS * chunks; e += THREADS) {
        const int i = e / chunks, c = e - i * chunks;
        uint2 bits = {0, 0};
        if (first + i < t.live)
            bits = fp8_bits(a.v, x + (t.base + (int64_t)(first + i) * t.r) * a.v.stride[1], c, scale);
        uint32_t *to = words + (i * pitch + 8 * c) / 4;
        to[0] = bits.x, to[1] = bits.y;
    }
    __syncthreads();
    uint8_t *to = p.to + p.at[g] + (int64_t)item * width * keys + first;
    for (int e = (int)threadIdx.x; e < FP8_KEYS / 32 * width; e += THREADS) {
        const int part = e / width, d = e - part * width;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = 32 * part + 16 * half;
            if (first + at >= keys) break;
            const uint8_t *from = (const uint8_t *)words + at * pitch + d;
            uint32_t four[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                four[i] = (uint32_t)from[2 * i * pitch] | (uint32_t)from[(2 * i + 1) * pitch] << 8 |
                          (uint32_t)from[(2 * i + 8) * pitch] << 16 | (uint32_t)from[(2 * i + 9) * pitch] << 24;
            *(uint4 *)(to + (int64_t)d * keys + at) = {four[0], four[1], four[2], four[3]};
        }
    }
#endif
}

/* ---- values that are not finite ---- */

/* attn_slow_forward of rounded numbers */
template <class T>
HOPPER_FN void fp8_slow_forward(const attn_args &a, const hopper_eight &eight, const attn_tile &t, int i)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const int lane = threadIdx.x % 32, hk = t.h / a.group;
    const float q_scale = eight.q[t.b * a.heads + t.h], k_scale = eight.k[t.b * a.kv_heads + hk],
                v_scale = eight.v[t.b * a.kv_heads + hk], scale = (float)(a.scale * ATTN_LOG2E);
    const T *q = attn_at<T>(a.q, t.b, t.base + (int64_t)i * t.r - a.shift, t.h);
    float o[ATTN_SLOW_PARTS / 2] = {}, top = -INFINITY, sum = 0; /* at most 128 columns */
    const int begin = max(0, i - t.before), end = min(t.live, i + t.after + 1);
#pragma unroll 1
    for (int j = begin; j < end; j++) {
        const T *k = attn_at<T>(a.k, t.b, t.base + (int64_t)j * t.r, hk);
        const T *v = attn_at<T>(a.v, t.b, t.base + (int64_t)j * t.r, hk);
        float s = 0;
#pragma unroll 1
        for (int d = lane; d < a.head_dim; d += 32)
            s += fp8_rounded(to_compute(q[d * a.q.stride[3]]), q_scale) *
                 fp8_rounded(to_compute(k[d * a.k.stride[3]]), k_scale);
        s = warp_sum(s) * scale;
        const float most = s > top ? s : top, shift = most == -INFINITY ? 0 : most, shrink = exp2f(top - shift);
        const float weight = exp2f(s - shift);
        top = most, sum = sum * shrink + weight;
#pragma unroll 1
        for (int e = 0, d = lane; d < a.head_dim; e++, d += 32)
            o[e] = o[e] * shrink + weight * fp8_rounded(to_compute(v[d * a.v.stride[3]]), v_scale);
    }
    attn_row<float> f = {};
    if (lane == 0) f = attn_finish<float>(a, t, i, top, sum);
    f.own = __shfl_sync(~0u, f.own, 0), f.before = __shfl_sync(~0u, f.before, 0), f.at = __shfl_sync(~0u, f.at, 0);
    f.last = __shfl_sync(~0u, (int)f.last, 0);
#pragma unroll 1
    for (int e = 0, d = lane; d < a.head_dim; e++, d += 32) {
        float *acc = (float *)a.acc + f.at * a.head_dim + d, x = o[e] * f.own;
        if (f.before != 0) x += f.before * __ldcg(acc);
        if (f.last) ((T *)a.out)[f.at * a.head_dim + d] = from_compute<T>(x);
        else *acc = x;
    }
#endif
}
template <class T>
__global__ void __launch_bounds__(THREADS)
    attn_fp8_redo_kernel(const __grid_constant__ attn_args a, const __grid_constant__ hopper_eight eight,
                         const int *spoilt, int call)
{
    if (*spoilt != call) return;
    hopper_redo<T>(a, [&](const attn_tile &t, int i) { fp8_slow_forward<T>(a, eight, t, i); });
}

/* ---- the host's side ---- */

static lac_view bytes_of(char *data, int64_t b, int64_t n, int64_t h, int64_t d, int64_t wide)
{
    lac_view x = {};
    x.data = data, x.dtype = LAC_U8, x.ndim = 4;
    x.shape[0] = b, x.shape[1] = n, x.shape[2] = h, x.shape[3] = d;
    x.stride[0] = n * h * wide, x.stride[1] = h * wide, x.stride[2] = wide, x.stride[3] = 1;
    return x;
}

const char *attn_hopper_fp8_fits(const lac_a_attend *f)
{
    const lac_plan *p = f->plan;
    const char *why = lac_plan_no_hopper_beyond(p, f->q.dtype);
    if (!why) why = lac_attend_pairs(f);
    if (why) return why;
    if (f->padding.data) return "there is a padding mask";
    if (f->dropout > 0) return "there is dropout";
    if (f->scale < 0) return "the scale is negative";
    static int compiled = -1; /* unknown; asking takes microseconds */
    if (compiled < 0)
        compiled = hopper_compiled((const void *)attn_hopper_forward_kernel<e4m3, 64, false, HOPPER_PLAIN, false>);
    if (!compiled) return "the device is not a Hopper, or the plug-in was not compiled for sm_90a";
    hopper_eight_space space;
    hopper_eight_place(p, &space);
    const lac_attn_desc *d = &p->desc;
    const lac_view q = bytes_of(NULL, d->batch, d->n, d->heads, d->head_dim, space.wide),
                   k = bytes_of(NULL, d->batch, d->m, d->kv_heads, d->head_dim, space.wide);
    if (!hopper_readable(&q, &why) || !hopper_readable(&k, &why)) return why;
    if (d->batch * 3 > 65535 || d->heads > 65535) return "there are more than 21845 batch items, or 65535 heads";
    for (int g = 0; g < d->branches; g++) {
        int64_t first, last;
        lac_plan_segments(p, g, &first, &last);
        if (d->batch * (last - first) * space.v[g].items * d->head_dim > INT32_MAX / 4)
            return "the items of its values have more than 2^29 rows";
    }
    return NULL;
}

template <class T>
static int round_all(const attn_args &a, const hopper_eight_space &space, char *at, hopper_eight *eight)
{
    fp8_round_args r = {};
    const int count[] = {a.heads, a.kv_heads, a.kv_heads}, n[] = {a.n, a.m, a.m};
    const attn_tensor x[] = {a.q, a.k, a.v};
    char *rows[] = {at + space.q, at + space.k, NULL};
    const int all = a.batch * (a.heads + 2 * a.kv_heads);
    uint32_t *most = (uint32_t *)at;
    float *scale = (float *)at + all;
    CUDA_TRY("attention", lac_cuda_fill_bytes(most, 0, (size_t)all * 4));
    r.batch = a.batch, r.width = a.head_dim, r.wide = (int)space.wide;
    for (int i = 0; i < 3; i++) {
        r.of[i] = {x[i], n[i], count[i], most, scale, (uint8_t *)rows[i]};
        most += a.batch * count[i], scale += a.batch * count[i];
    }
    eight->q = r.of[0].scale, eight->k = r.of[1].scale, eight->v = r.of[2].scale;
    const dim3 grid((unsigned)((max(a.n, a.m) - 1) / FP8_ROWS + 1), (unsigned)a.heads, (unsigned)(3 * a.batch));
    launch_after(attn_fp8_most_kernel<T>, grid, THREADS, 0, r);
    LAC_TRY(lac_cuda_launched("attention"));
    launch_after(attn_fp8_round_kernel<T>, grid, THREADS, 0, r);
    return lac_cuda_launched("attention");
}

template <class T>
static int turn_values(const attn_args &a, const hopper_eight_space &space, char *at, const hopper_eight &eight)
{
    fp8_values_args v = {};
    v.a = a, v.to = (uint8_t *)at, v.scale = eight.v, v.eight = eight;
    for (int g = 0; g < a.branches; g++) {
        const int64_t pieces = (space.v[g].keys - 1) / FP8_KEYS + 1;
        v.at[g] = space.v[g].at, v.keys[g] = (int)space.v[g].keys;
        v.begin[g + 1] = v.begin[g] + pieces * a.batch * a.branch[g].segments * space.v[g].items;
    }
    const int64_t blocks = v.begin[a.branches];
    if (blocks > INT32_MAX)
        LAC_FAIL(ARGUMENT, "attention: %lld pieces of values are too many for one launch on cuda", (long long)blocks);
    if (blocks == 0) return 0;
    launch_after(attn_fp8_values_kernel<T>, (unsigned)blocks, THREADS, (size_t)(FP8_KEYS * (a.head_dim + 4)), v);
    return lac_cuda_launched("attention");
}

template <class T> static int run(hopper_forward_args &p, const hopper_eight_space &space, char *at)
{
    LAC_TRY(round_all<T>(p.a, space, at, &p.eight));
    LAC_TRY(turn_values<T>(p.a, space, at, p.eight));
    const int status = launch_shape<e4m3, false, false>(p);
    if (status || !p.masks) return status;
    const int64_t rows = (int64_t)p.a.batch * p.a.n * p.a.heads;
    launch_after(attn_fp8_redo_kernel<T>, blocks_filling(rows, THREADS / 32, 2), THREADS, 0, (const attn_args &)p.a,
                 p.eight, p.spoilt, p.call);
    return lac_cuda_launched("attention");
}

int attn_hopper_fp8(attn_pair_args &a, const lac_a_attend *f, bool gaps, char *at)
{
    const lac_attn_desc *d = &f->plan->desc;
    hopper_eight_space space;
    hopper_eight_place(f->plan, &space);
    lac_a_attend eight = *f;
    eight.q = bytes_of(at + space.q, d->batch, d->n, d->heads, d->head_dim, space.wide);
    eight.k = eight.v = bytes_of(at + space.k, d->batch, d->m, d->kv_heads, d->head_dim, space.wide);
    hopper_forward_args p;
    LAC_TRY(attn_hopper_prepare(p, a, &eight, gaps, NULL));
    if (p.tiles == 0 && !gaps) return 0;
    p.eight.half = f->q.dtype == LAC_F16;
    for (int g = 0; g < a.branches; g++) {
        const int64_t rows = (int64_t)a.batch * a.branch[g].segments * space.v[g].items * d->head_dim;
        p.eight.share[g] = (int)space.v[g].share, p.eight.first[g] = (int)space.v[g].first;
        p.eight.units[g] = (int)space.v[g].items;
        if (rows == 0) continue;
        const lac_view v = bytes_of(at + space.v[g].at, 1, rows, 1, space.v[g].keys, space.v[g].keys);
        LAC_TRY(hopper_map(&p.map[g].v, &v, 1, a.head_dim <= 64 ? 64 : 128));
    }
    return f->q.dtype == LAC_F16 ? run<f16>(p, space, at) : run<bf16>(p, space, at);
}
