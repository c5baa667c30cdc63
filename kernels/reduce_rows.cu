/* reduce_rows.cu: the largest, the smallest, variances and log-sum-exps of dense rows of f32, f16 and bf16 on CUDA, at
 * the speed of memory. Everything else is reduce.cu's.
 *
 * A team of 8, 16 or 32 lanes has a row and loads what it has of a chunk before it uses the first vector. 50 MB are
 * read in 11 us, in which a scheduler has 62 rows of 768 bf16 to work on, so that what an element costs decides, and
 * what ends a row. Half types are compared in pairs; differences, squares and exponentials are in float, in double
 * where they would overflow; a row has one shift, so that lanes merge by plain sums; all rows of a warp end at once. By
 * count log-sum-exp takes 190 instructions a row and 25 exponentials, some 6 us each if they were alone.
 *
 * The shift of a variance is the mean of an element or pair of every lane, rounded to the row's type: equal elements
 * differ from it by nothing, and one element that is far from all others costs few of a float's bits.
 *
 * On an H200, bf16 [32768, 768], largest, log-sum-exp, variance, medians of one run, us: 12.7, 13.7, 13.0 (12.8, 13.8,
 * 13.1 without the hint that nothing is read again, which gains 3 to 4% in turns with other kernels). Rejected, without
 * it: 32 lanes with chunks of 3 vectors 12.9, 13.6, 13.2; the next kernel let in early and each row asked for before
 * the wait 15.0, 14.8, 14.8 (with 8 lanes a row 15.8, 15.1, 16.0); blocks that stay and load the next row into
 * registers 13.3, 14.3, 13.8 (f32: log-sum-exp, variance 26.7, 25.5 for 25.4, 24.2), with the next kernel let
 * in 14.1, 14.4, 14.1; the same with rings in shared memory, filled by cp.async, 14.4 to 18.4. Rows of 64 and 128 bf16
 * take half as long with 8 lanes as with 16: log-sum-exp 143 for 304 and 71 for 156 us of 268 MB.
 */
#include "reduce.cuh"

struct row_job : reduce_job {
    int vectors;         /* of a row */
    uint32_t keep, flip; /* an element as what is largest is looked for among, and back: bits to keep, then to turn */
    double inverse;      /* of variances: 1 / count */
    double scale;        /* and 1 / (count - correction), for half types times 32 squared */
};

template <int DTYPE> inline constexpr bool in_pairs = DTYPE != LAC_F32; /* a word has two elements */
template <int DTYPE> inline constexpr int per_vector = in_pairs<DTYPE> ? 8 : 4;

template <int LANES, class T> static __device__ __forceinline__ T team_sum(T x)
{
#pragma unroll
    for (int o = LANES / 2; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

/* the larger of two elements, or of each half of two words; NaN wins if asked to, else what is not NaN */
template <int DTYPE, bool NAN_WINS> static __device__ __forceinline__ uint32_t larger(uint32_t x, uint32_t y)
{
    if constexpr (DTYPE == LAC_F32) {
        if (NAN_WINS) asm("max.NaN.f32 %0, %0, %1;" : "+r"(x) : "r"(y));
        else asm("max.f32 %0, %0, %1;" : "+r"(x) : "r"(y));
    } else if constexpr (DTYPE == LAC_F16) {
        if (NAN_WINS) asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
        else asm("max.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    } else {
        if (NAN_WINS) asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
        else asm("max.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    }
    return x;
}
/* of N vectors, in four strands */
template <int DTYPE, bool NAN_WINS, int N, class F>
static __device__ __forceinline__ uint32_t largest_word(const uint4 (&raw)[N], F as)
{
    uint4 m = {as(raw[0].x), as(raw[0].y), as(raw[0].z), as(raw[0].w)};
#pragma unroll
    for (int k = 1; k < N; k++) {
        m.x = larger<DTYPE, NAN_WINS>(m.x, as(raw[k].x)), m.y = larger<DTYPE, NAN_WINS>(m.y, as(raw[k].y));
        m.z = larger<DTYPE, NAN_WINS>(m.z, as(raw[k].z)), m.w = larger<DTYPE, NAN_WINS>(m.w, as(raw[k].w));
    }
    return larger<DTYPE, NAN_WINS>(larger<DTYPE, NAN_WINS>(m.x, m.y), larger<DTYPE, NAN_WINS>(m.z, m.w));
}

/* ---- what is accumulated ----
 *
 * start(): the first chunk of a row, of which every lane has a vector; pad(): the word of a vector past the row's end,
 * where the last vector stands once more; add(): a chunk; merge(): of a team's lanes, in all of them. */

template <int DTYPE> struct largest_of {
    uint32_t v;
    template <int LANES, int N> __device__ void start(const row_job &j, const uint4 (&raw)[N])
    {
        v = (raw[0].x & j.keep) ^ j.flip;
    }
    __device__ uint32_t pad(uint32_t last) const { return last; }
    template <int N> __device__ void add(const row_job &j, const uint4 (&raw)[N])
    {
        v = larger<DTYPE, true>(v, largest_word<DTYPE, true>(raw, [&](uint32_t w) { return (w & j.keep) ^ j.flip; }));
    }
    template <int LANES> __device__ void merge(const row_job &, const uint4 *)
    {
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) v = larger<DTYPE, true>(v, __shfl_xor_sync(0xffffffffu, v, o));
        if (in_pairs<DTYPE>) v = larger<DTYPE, true>(v, v >> 16);
    }
    __device__ float value(const row_job &j) const
    {
        return in_pairs<DTYPE> ? unpack_pair(DTYPE, v ^ j.flip).x : __uint_as_float(v ^ j.flip);
    }
};

/* A lane has its own maximum until the row ends. Of nothing but infinities the sum is theirs. */
template <int DTYPE> struct lse_of {
    typedef std::conditional_t<in_pairs<DTYPE>, float, double> S;
    float m;
    S s; /* of exp(x - m) */
    template <int LANES, int N> __device__ void start(const row_job &, const uint4 (&)[N]) { m = -INFINITY, s = 0; }
    __device__ uint32_t pad(uint32_t) const
    {
        return DTYPE == LAC_F32 ? 0xff800000u : DTYPE == LAC_F16 ? 0xfc00fc00u : 0xff80ff80u; /* -infinity */
    }
    __device__ static float exponential(float x) { return in_pairs<DTYPE> ? short_exp(x) : F_exp(x); }
    __device__ void raise(float top)
    {
        s = top > m ? s * (S)exponential(m - top) : s;
        m = top;
    }
    template <int N> __device__ void add(const row_job &, const uint4 (&raw)[N])
    {
        uint32_t word = largest_word<DTYPE, false>(raw, [](uint32_t w) { return w; });
        float top = __uint_as_float(word), sum = 0;
        if (in_pairs<DTYPE>) {
            float2 pair = unpack_pair(DTYPE, word);
            top = fmaxf(pair.x, pair.y);
        }
        raise(fmaxf(m, top));
        /* Half types have one fused multiplication: up to 1e5 the rounding of m log2(e) is nothing beside m. Beyond,
         * what is not m is less by 512 or more, and nothing by any base. */
        const float to = isfinite(m) ? m : 0, base = fabsf(to) > 1e5f ? 1 : LOG2_E, less = -to * base;
#pragma unroll
        for (int k = 0; k < N; k++) {
            float v[8];
            unpack(DTYPE, raw[k], v);
#pragma unroll
            for (int i = 0; i < per_vector<DTYPE>; i++)
                v[i] = in_pairs<DTYPE> ? short_exp2(fmaf(v[i], base, less)) : F_exp(v[i] - to);
            sum += (v[0] + v[1]) + (v[2] + v[3]);
            if (in_pairs<DTYPE>) sum += (v[4] + v[5]) + (v[6] + v[7]);
        }
        s += (S)sum;
    }
    template <int LANES> __device__ void merge(const row_job &, const uint4 *)
    {
        float top = m;
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
        raise(top);
        s = team_sum<LANES>(s);
    }
    __device__ float value(const row_job &) const
    {
        if (s != s || !isfinite(m)) return s != s ? (float)s : m;
        return in_pairs<DTYPE> ? m + logf((float)s) : (float)((double)m + log((double)s));
    }
};

/* Sums of x - shift and of its square. Half types are divided by 32, so that no difference is infinite, and squares
 * hardly ever: such a row is summed again in double. */
template <int DTYPE> struct variance_of {
    typedef std::conditional_t<in_pairs<DTYPE>, float, double> S;
    static constexpr float PART = in_pairs<DTYPE> ? 0.03125f : 1;
    float shift;
    uint32_t shift_word;
    S s, squares;
    double sum, sum_of_squares;
    template <int LANES, int N> __device__ void start(const row_job &, const uint4 (&raw)[N])
    {
        float2 pair = in_pairs<DTYPE> ? unpack_pair(DTYPE, raw[0].x) : make_float2(__uint_as_float(raw[0].x), 0);
        float mean = team_sum<LANES>((pair.x * PART + pair.y * PART) * (1.0f / (in_pairs<DTYPE> ? 2 * LANES : LANES)));
        shift_word = in_pairs<DTYPE> ? pack_pair(DTYPE, mean / PART, mean / PART) : __float_as_uint(mean);
        shift = in_pairs<DTYPE> ? unpack_pair(DTYPE, shift_word).x * PART : mean;
        s = squares = 0;
    }
    __device__ uint32_t pad(uint32_t) const { return shift_word; }
    template <int N> __device__ void add(const row_job &, const uint4 (&raw)[N])
    {
        S t[2] = {}, q[2] = {};
#pragma unroll
        for (int k = 0; k < N; k++) {
            float v[8];
            unpack(DTYPE, raw[k], v);
#pragma unroll
            for (int i = 0; i < per_vector<DTYPE>; i++) {
                S d = in_pairs<DTYPE> ? fmaf(v[i], PART, -shift) : (S)v[i] - (S)shift;
                t[i % 2] += d;
                q[i % 2] = fma(d, d, q[i % 2]);
            }
        }
        s += t[0] + t[1], squares += q[0] + q[1];
    }
    template <int LANES> __device__ void merge(const row_job &j, const uint4 *x)
    {
        sum = s = team_sum<LANES>(s), sum_of_squares = squares = team_sum<LANES>(squares);
        if constexpr (in_pairs<DTYPE>) {
            const bool again = !(squares < INFINITY);
            if (!__any_sync(0xffffffffu, again)) return;
            double t = 0, q = 0;
#pragma unroll 1
            for (int i = threadIdx.x % LANES; i < j.vectors; i += LANES) {
                float v[8];
                unpack(DTYPE, x[i], v);
                for (float e : v) {
                    double d = (double)fmaf(e, PART, -shift);
                    t += d;
                    q = fma(d, d, q);
                }
            }
            t = team_sum<LANES>(t), q = team_sum<LANES>(q);
            if (again) sum = t, sum_of_squares = q;
        }
    }
    __device__ float value(const row_job &j) const
    {
        return (float)((sum_of_squares - sum * (sum * j.inverse)) * j.scale);
    }
};

/* ---- rows ---- */

enum { ROWS_THREADS = 128 };

/* chunks of V vectors a lane; what is left in chunks of 2, padded */
template <class A, int DTYPE, int LANES, int V> __global__ void __launch_bounds__(ROWS_THREADS) reduce_rows(row_job j)
{
    const int lane = threadIdx.x % LANES;
    int64_t number = ((int64_t)blockIdx.x * ROWS_THREADS + threadIdx.x) / LANES, x_at, out_at;
    const bool inside = number < j.outputs, any = number - threadIdx.x % 32 / LANES < j.outputs; /* of the warp */
    if (!inside) number = j.outputs - 1;
    x_at = number * j.kx[0], out_at = number * j.ko[0];
    if (j.kept > 1) kept_offsets(j, number, &x_at, &out_at);
    const uint4 *x = (const uint4 *)(j.x + x_at * j.bytes);
    previous_done();
    if (!any) return;
    A a;
    auto chunk = [&](int first, auto count, bool padded) {
        constexpr int N = decltype(count)::value;
        uint4 raw[N];
#pragma unroll
        for (int k = 0; k < N; k++) {
            int i = first + k * LANES + lane;
            raw[k] = __ldcs(x + (padded && i >= j.vectors ? j.vectors - 1 : i));
        }
        if (first == 0) a.template start<LANES>(j, raw);
#pragma unroll
        for (int k = 0; k < N && padded; k++)
            if (first + k * LANES + lane >= j.vectors)
                raw[k] = make_uint4(a.pad(raw[k].x), a.pad(raw[k].y), a.pad(raw[k].z), a.pad(raw[k].w));
        a.add(j, raw);
    };
    int first = 0;
    for (; first + LANES * V <= j.vectors; first += LANES * V) chunk(first, std::integral_constant<int, V>(), false);
    for (; first < j.vectors; first += LANES * 2) chunk(first, std::integral_constant<int, 2>(), true);
    a.template merge<LANES>(j, x);
    if (lane == 0 && inside) store_element<float>(DTYPE, (char *)j.out + out_at * j.bytes, a.value(j));
}

template <template <int> class A, int DTYPE> static int run(const row_job &j)
{
    if (j.vectors <= 16)
        launch(reduce_rows<A<DTYPE>, DTYPE, 8, 2>, blocks_for(j.outputs, ROWS_THREADS / 8), ROWS_THREADS, 0, j);
    else if (j.vectors <= 96)
        launch(reduce_rows<A<DTYPE>, DTYPE, 16, 6>, blocks_for(j.outputs, ROWS_THREADS / 16), ROWS_THREADS, 0, j);
    else launch(reduce_rows<A<DTYPE>, DTYPE, 32, 6>, blocks_for(j.outputs, ROWS_THREADS / 32), ROWS_THREADS, 0, j);
    return lac_cuda_launched("reduce");
}
template <template <int> class A> static int run_as(const row_job &j)
{
    if (j.dtype == LAC_F32) return run<A, LAC_F32>(j);
    return j.dtype == LAC_F16 ? run<A, LAC_F16>(j) : run<A, LAC_BF16>(j);
}

bool lac_cuda_row_reduction_fits(const reduce_job *j)
{
    bool known =
        j->fn == LAC_MAX || j->fn == LAC_MIN || j->fn == LAC_NORM_INF || j->fn == LAC_VAR || j->fn == LAC_LOGSUMEXP;
    return known && j->dtype >= LAC_F32 && j->dtype <= LAC_BF16 && j->out_dtype == j->dtype && j->count > 0 &&
           j->count < INT32_MAX && j->count % (16 / j->bytes) == 0;
}

int lac_cuda_row_reduction(const reduce_job *given)
{
    row_job j = {};
    (reduce_job &)j = *given;
    double freedom = (double)j.count - j.correction;
    const uint32_t sign = j.dtype == LAC_F32 ? 0x80000000u : 0x80008000u;
    j.vectors = (int)(j.count * j.bytes / 16);
    j.keep = j.fn == LAC_NORM_INF ? ~sign : ~0u;
    j.flip = j.fn == LAC_MIN ? sign : 0;
    j.inverse = 1 / (double)j.count;
    j.scale = (j.dtype == LAC_F32 ? 1.0 : 1024.0) / (freedom > 0 ? freedom : 0);
    if (j.fn == LAC_VAR) return run_as<variance_of>(j);
    return j.fn == LAC_LOGSUMEXP ? run_as<lse_of>(j) : run_as<largest_of>(j);
}
