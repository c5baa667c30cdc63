/* gelu_norm.cu: gelu and the layer norm that follows, in one pass over memory on CUDA.
 *
 * LongNet's feed-forward part normalises its widest tensor after the activation. Apart, the two operators move it four
 * times on the way there and six times back; here it is read and written once, and once more for the gradient. gelu is
 * computed again in the backward, from what went into it, so that its result need not be kept: that is a quarter of a
 * block's activations. Values are rounded where the operators would round them, so results and gradients are theirs bit
 * for bit, but for dgamma and dbeta, whose sums have another order (tests/cuda_shapes_spec.lua). Rows that rows.cuh
 * keeps in registers have the kernel; f64, strides and longer rows run the operators in turn.
 *
 * Instructions bound these kernels as much as bytes: at a copy's rate a multiprocessor of an H200 has time for some
 * 30 a bf16 on the way there and 45 on the way back, and they took 32 and 48, of which gelu 16 and 20. So bf16 looks
 * gelu up in shared memory, whose pipe is then the busiest: 32 reads of four bytes from random places take it 3.5
 * cycles, of eight bytes six. So a quarter of the elements is computed, and half in the backward. Forward, rows come
 * ahead of their turn; two rows ahead were slower than one (32.7 to 30.1 us for rows of 768), runs of rows slower
 * than every so-manieth row. Models' usual widths have kernels of their own (norm_whole.cuh, 4% to 8% faster, and
 * norm_bwd_whole.cuh).
 *
 * The backward of those widths is not bound by memory alone: bytes take 35.8 us of 32768 x 768 at a copy's rate, the
 * 815 instructions of a row and warp 25 of a scheduler's time at 1.98 GHz, shared memory some 15, and three warps a
 * scheduler do not put them all beside each other. What helped is registers for elements of gelu that are computed at
 * the same time: gamma in shared memory and g read only behind gelu, with a quarter looked up. On an H200, in turns,
 * 43.1 to 42.3 us for rows of 768, which had three quarters looked up, and 172 to 157 for 3,072, which had one, both
 * with gamma in registers (after 30 ms of idling; without pauses 43.2 to 42.3 and 180 to 163). As now, but with nothing
 * looked up 43.7 and 166, three quarters 42.9 and 167, half (and the shares added up as before) 42.6 and 160. Rejected:
 * three rows ahead (43.3 to 45.9 and 162 to 176), 24 warps with eight elements a thread (44.5 and 179), gamma unpacked
 * in registers (42.6 and 174). Filling the table takes no time that shows, adding the shares up 2 us.
 */
#include "norm_bwd_whole.cuh"
#include "norm_whole.cuh"
#include "sum.cuh"

template <class T> static __device__ __forceinline__ float gelu_of(float x)
{
    if constexpr (sizeof(T) == 2) return short_gelu(x);
    else return F_gelu(x);
}
/* and its derivative */
template <class T> static __device__ __forceinline__ float gelu_of(float x, float *slope)
{
    if constexpr (sizeof(T) == 2) return short_gelu_both(x, slope);
    else return F_gelu_both(x, slope);
}
struct gelu_norm_args {
    int64_t rows, n;
    float eps;
};

/* bf16 looks gelu up */
template <class T> inline constexpr bool looks_up = std::is_same_v<T, bf16>;

/* gelu and its derivative of every bf16 from 2^-28 to 16 and of their opposites, in shared memory: four instructions
 * and a read where the functions take twenty. Others are computed. An entry has `BYTES`: the first float is gelu,
 * rounded, the second its derivative. Entries of negative numbers begin at byte 2^15; both of a pair have one tail. */
enum { GELU_FIRST = (127 - 28) << 7, GELU_ENTRIES = 1 << 12 };
template <int BYTES> inline constexpr int gelu_table = (1 << 15) + GELU_ENTRIES *BYTES;
template <int BYTES> static __device__ __forceinline__ void fill_gelu_table(void *table)
{
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < GELU_ENTRIES; i += blockDim.x) {
        float x = __uint_as_float((i + GELU_FIRST) << 16), slope[2], y[2];
        y[0] = short_gelu_both(x, slope), y[1] = short_gelu_both(-x, slope + 1);
        __nv_bfloat162 rounded = __floats2bfloat162_rn(y[0], y[1]);
        y[0] = __low2float(rounded), y[1] = __high2float(rounded);
#pragma unroll
        for (int sign = 0; sign < 2; sign++) {
            char *to = (char *)table + (sign << 15) + i * BYTES;
            if constexpr (BYTES == 8) *(float2 *)to = make_float2(y[sign], slope[sign]);
            else *(float *)to = y[sign];
        }
    }
}
/* of the bf16 in `word`, two each, the first SPLIT of eight; y is rounded. One test for all. */
template <int BYTES, int SPLIT, int KEEP>
static __device__ __forceinline__ void look_gelu_up(const void *table, const uint32_t (&word)[KEEP / 2],
                                                    float (&y)[KEEP], float (&slope)[KEEP])
{
    /* both of a word, rounded by one instruction */
    auto compute = [&](int i) {
        float low = short_gelu_both(__uint_as_float(word[i] << 16), slope + 2 * i);
        float high = short_gelu_both(__uint_as_float(word[i] & 0xffff0000u), slope + 2 * i + 1);
        __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        uint32_t rounded = *(const uint32_t *)&pair;
        y[2 * i] = __uint_as_float(rounded << 16), y[2 * i + 1] = __uint_as_float(rounded & 0xffff0000u);
    };
    auto entry = [&](int i) { return (word[i] & 0x7fff7fffu) - GELU_FIRST * 0x10001u; };
    uint32_t outside = 0;
#pragma unroll
    for (int i = 0; i < KEEP / 2; i++)
        if (i % 4 < SPLIT / 2) outside |= entry(i);
    if (outside & 0xf000f000u) {
#pragma unroll
        for (int i = 0; i < KEEP / 2; i++)
            if (i % 4 < SPLIT / 2) compute(i);
    } else {
#pragma unroll
        for (int i = 0; i < KEEP / 2; i++) {
            if (i % 4 >= SPLIT / 2) continue;
            uint32_t o = entry(i) * BYTES | (word[i] & 0x80008000u); /* places of both in the table */
            const char *low = (const char *)table + (o & 0xffff), *high = (const char *)table + (o >> 16);
            if constexpr (BYTES == 8) {
                float2 a = *(const float2 *)low, b = *(const float2 *)high;
                y[2 * i] = a.x, slope[2 * i] = a.y, y[2 * i + 1] = b.x, slope[2 * i + 1] = b.y;
            } else {
                y[2 * i] = *(const float *)low, y[2 * i + 1] = *(const float *)high;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < KEEP / 2; i++)
        if (i % 4 >= SPLIT / 2) compute(i);
}
/* x(0), x(8), ... as words */
template <int KEEP, class X> static __device__ __forceinline__ void words_of(X x, uint32_t (&word)[KEEP / 2])
{
#pragma unroll
    for (int k = 0; k < KEEP; k += 8) {
        uint4 raw = x(k).word;
        word[k / 2] = raw.x, word[k / 2 + 1] = raw.y, word[k / 2 + 2] = raw.z, word[k / 2 + 3] = raw.w;
    }
}

/* f32, whose bytes leave time: many small blocks */
template <class T, int KEEP> inline constexpr int gelu_registers = norm_registers<T, KEEP> + 14;
template <class T, int ROW, int N, int KEEP>
__global__ void __launch_bounds__(row_threads<ROW>, row_blocks<ROW>(gelu_registers<T, KEEP>))
    gelu_norm_rows(gelu_norm_args a, const T *x, const T *gamma, const T *beta, T *act, T *out, float *mean,
                   float *rstd)
{
    __shared__ float space[ROW_LONG / 32];
    previous_done();
    NEXT_ROWS(ROW, a.rows)
    {
        row<T, ROW, N, KEEP> v(x + r * a.n, a.n, 1);
        float e[KEEP];
        v.places([&](int64_t first, int k) {
            float y[N];
            row_unpack<T, N>(v.kept[k / N], y);
#pragma unroll
            for (int i = 0; i < N; i++) e[k + i] = y[i] = F_gelu(y[i]);
            if (act) *(row_access<T, N> *)(act + r * a.n + first) = row_pack<T, N>(y);
        });
        normalise_row(v, e, a.eps, gamma, beta, out + r * a.n, mean + r, rstd + r, space);
    }
}

/* Half types: one block fills a multiprocessor. A thread asks for what it needs of its next row (cp.async) as soon as
 * it has read this one: where all rows of a block first waited for memory and then were worked on, neither hid the
 * other. gamma and beta stay in registers, because shared memory's pipe, which reads of the first-level cache take too,
 * is the busiest. */
template <int ROW, int KEEP> constexpr int gelu_threads_of()
{
    int most = 65536 / (2 * KEEP + 46), unit = ROW < 128 ? 128 : ROW;
    return (most < 1024 ? most : 1024) / unit * unit;
}
template <int ROW, int KEEP> inline constexpr int gelu_threads = gelu_threads_of<ROW, KEEP>();
template <class T, int ROW, int KEEP>
inline constexpr int gelu_shared = (looks_up<T> ? gelu_table<4> : 0) + gelu_threads<ROW, KEEP> *KEEP *(int)sizeof(T);

/* WHOLE: rows have ROW * KEEP elements, so that nothing is asked */
template <class T, int ROW, int KEEP, bool WHOLE>
__global__ void __launch_bounds__(gelu_threads<ROW, KEEP>, 1)
    gelu_norm_ahead(gelu_norm_args a, const T *x, const T *gamma, const T *beta, T *act, T *out, float *mean,
                    float *rstd)
{
    constexpr int N = 8, THREADS = gelu_threads<ROW, KEEP>, TEAMS = THREADS / ROW;
    constexpr int TABLE = looks_up<T> ? gelu_table<4> : 0;
    typedef row_access<T, N> vector;
    extern __shared__ float4 norm_space[];
    __shared__ float space[2][TEAMS][ROW / 32];
    int team = threadIdx.x / ROW, lane = threadIdx.x % ROW, n = (int)a.n;
    float count = (float)n, part = 1.0f / count;
    vector *mine = (vector *)norm_space + TABLE / 16 + threadIdx.x;
    auto kept = [&](int k) -> vector & { return mine[k / N * THREADS]; };
    auto place = [&](int k) { return (k / N * ROW + lane) * N; };
    auto inside = [&](int k) { return WHOLE || place(k) < n; };
    uint32_t mine_at = (uint32_t)__cvta_generic_to_shared(mine);
    auto fetch = [&](int64_t r) {
        const T *from = x + r * n + lane * N;
#pragma unroll
        for (int k = 0; k < KEEP; k += N)
            if (r < a.rows && inside(k)) fetch16(mine_at + k / N * THREADS * 16, from + k * ROW, true);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int k = 0; k < KEEP; k += N) /* what is looked up for nothing is 1, which the table has */
        if (!inside(k)) kept(k).word = make_uint4(0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80);
    previous_done();
    int64_t hop = (int64_t)gridDim.x * TEAMS, r = (int64_t)blockIdx.x * TEAMS + team;
    fetch(r);
    vector gain[KEEP / N], bias[KEEP / N];
#pragma unroll
    for (int k = 0; k < KEEP; k += N) {
        float one[N], zero[N] = {};
#pragma unroll
        for (int i = 0; i < N; i++) one[i] = 1;
        gain[k / N] = row_pack<T, N>(one), bias[k / N] = row_pack<T, N>(zero);
        if (gamma && inside(k)) gain[k / N] = *(const vector *)(gamma + place(k));
        if (beta && inside(k)) bias[k / N] = *(const vector *)(beta + place(k));
    }
    if constexpr (TABLE > 0) {
        fill_gelu_table<4>(norm_space);
        __syncthreads();
    }
    for (; r < a.rows; r += hop) {
        float e[KEEP], total[1] = {}, square[1] = {};
        fetched(1);
        if constexpr (TABLE > 0) {
            uint32_t word[KEEP / 2];
            float none[KEEP];
            words_of<KEEP>(kept, word);
            look_gelu_up<4, 6>(norm_space, word, e, none);
        } else {
            unpack_kept<T, N>(kept, e);
#pragma unroll
            for (int k = 0; k < KEEP; k++) e[k] = to_compute(from_compute<T>(short_gelu(e[k])));
        }
        fetch(r + hop);
#pragma unroll
        for (int k = 0; k < KEEP; k += N) {
            float y[N];
            if (!inside(k)) break;
#pragma unroll
            for (int i = 0; i < N; i++) total[0] += y[i] = e[k + i];
            if (act) *(vector *)(act + r * n + place(k)) = row_pack<T, N>(y);
        }
        team_sums(total, space[0][team], ROW, team);
        float m = quotient(total[0], count, part);
#pragma unroll
        for (int k = 0; k < KEEP; k += N) {
            if (!inside(k)) break;
#pragma unroll
            for (int i = 0; i < N; i++) e[k + i] -= m, square[0] += e[k + i] * e[k + i];
        }
        team_sums(square, space[1][team], ROW, team);
        float s = inverse_deviation<T>(square[0], count, a.eps);
#pragma unroll
        for (int k = 0; k < KEEP; k += N) {
            float p[N], q[N];
            if (!inside(k)) break;
            row_unpack<T, N>(gain[k / N], p), row_unpack<T, N>(bias[k / N], q);
#pragma unroll
            for (int i = 0; i < N; i++) q[i] = fmaf(e[k + i] * s, p[i], q[i]);
            *(vector *)(out + r * n + place(k)) = row_pack<T, N>(q);
        }
        if (lane == 0) mean[r] = m, rstd[r] = s;
    }
}

/* what norm_whole.cuh normalises: gelu of x */
template <class T> struct gelu_of_rows {
    enum { TABLE = looks_up<T> ? gelu_table<4> : 0 };
    static __device__ __forceinline__ void fill(void *table) { fill_gelu_table<4>(table); }
    template <int KEEP, class X>
    static __device__ __forceinline__ void elements(X x, float (&e)[KEEP], const void *table)
    {
        if constexpr (TABLE > 0) {
            uint32_t word[KEEP / 2];
            float none[KEEP];
            words_of<KEEP>(x, word);
            look_gelu_up<4, 6>(table, word, e, none);
        } else {
            unpack_kept<T, 8>(x, e);
#pragma unroll
            for (int k = 0; k < KEEP; k++) e[k] = to_compute(from_compute<T>(short_gelu(e[k])));
        }
    }
};

/* dx of the norm is rounded, then goes through gelu's derivative. AGAIN: it is summed over rows as it is stored, and
 * the norm's result is stored once more, for the product that read it */
template <class T, bool AGAIN> struct gelu_norm_back {
    enum { STREAMS = 2, COLUMNS = AGAIN ? 3 : 2, TABLE = looks_up<T> ? gelu_table<8> : 0, OWN = looks_up<T> };
    const T *x, *g;
    T *dx;
    int64_t n;
    const T *beta;
    T *out; /* or NULL */
    template <int N> __device__ __forceinline__ void again(const T *at, const float (&y)[N]) const
    {
        if (out) row_store(out + (at - dx), row_pack<T, N>(y));
    }
    __device__ __forceinline__ void fill(void *table) const { fill_gelu_table<8>(table); }
    __device__ __forceinline__ int64_t step(int) const { return n; }
    __device__ __forceinline__ const T *row(int stream, int64_t r) const { return (stream ? g : x) + r * n; }
    template <int N, int KEEP, int ROWS> struct state {
        float slope[ROWS][KEEP];
        /* x becomes gelu of itself */
        template <class X> __device__ __forceinline__ void before(X x, float (&e)[KEEP], int u, const void *table)
        {
            if constexpr (TABLE > 0) {
                uint32_t word[KEEP / 2];
                words_of<KEEP>(x, word);
                look_gelu_up<8, 4>(table, word, e, slope[u]);
                return;
            }
            unpack_kept<T, N>(x, e);
#pragma unroll
            for (int k = 0; k < KEEP; k += N) {
                float v[N];
#pragma unroll
                for (int i = 0; i < N; i++) v[i] = gelu_of<T>(e[k + i], &slope[u][k + i]);
                row_unpack<T, N>(row_pack<T, N>(v), v);
#pragma unroll
                for (int i = 0; i < N; i++) e[k + i] = v[i];
            }
        }
        __device__ __forceinline__ void after(const gelu_norm_back &, T *dx, int u, int k, float (&e)[N],
                                              const row_access<T, N> *) const
        {
            row_unpack<T, N>(row_pack<T, N>(e), e);
#pragma unroll
            for (int i = 0; i < N; i++) e[i] *= slope[u][k + i];
            row_access<T, N> result = row_pack<T, N>(e);
            row_store(dx, result);
            if constexpr (AGAIN) row_unpack<T, N>(result, e);
        }
    };
};

/* the same for norm_bwd_whole.cuh, of bf16 */
struct gelu_back_of_rows {
    enum { TABLE = gelu_table<8>, LEAN = true, CAPPED = true };
    static __device__ __forceinline__ void fill(void *table) { fill_gelu_table<8>(table); }
    template <int KEEP> struct state {
        float slope[KEEP];
        template <class X> __device__ __forceinline__ void before(X x, float (&e)[KEEP], const void *table)
        {
            uint32_t word[KEEP / 2];
            words_of<KEEP>(x, word);
            look_gelu_up<8, 2>(table, word, e, slope);
        }
        __device__ __forceinline__ void after(float (&e)[8], int k) const
        {
            row_unpack<bf16, 8>(row_pack<bf16, 8>(e), e);
#pragma unroll
            for (int i = 0; i < 8; i++) e[i] *= slope[k + i];
        }
    };
};

/* ---- launching ---- */

static gelu_norm_args args_of(const lac_view *v, double eps)
{
    int64_t n = v->shape[v->ndim - 1];
    return {n ? numel(v) / n : 0, n, (float)eps};
}

/* as c/cpu/norm.c */
static int in_turn(const lac_a_gelu_norm *a)
{
    lac_a_map1 gelu = {M1_gelu, a->x, a->act.data ? a->act : a->out};
    lac_a_layernorm norm = {gelu.out, a->gamma, a->beta, a->out, a->mean, a->rstd, a->eps};
    LAC_TRY(lac_cuda_map1(&gelu));
    return lac_cuda_layernorm(&norm);
}

/* what may be wanted beside the gradients */
static int beside(const lac_a_gelu_norm_bwd *a)
{
    if (a->out.data) {
        int64_t bytes = numel(&a->mean) * dtype_bytes(a->mean.dtype);
        lac_scratch space("gelu_norm_bwd", (size_t)(2 * bytes + 1));
        lac_a_gelu_norm norm = {a->x, a->gamma, a->beta, {}, a->out, a->mean, a->rstd, a->eps};
        if (!space.data) return LAC_E_MEMORY;
        norm.mean.data = space.data, norm.rstd.data = (char *)space.data + bytes;
        norm.mean.stride[0] = norm.rstd.stride[0] = 1;
        LAC_TRY(lac_cuda_gelu_norm(&norm));
    }
    return lac_cuda_column_sums(&a->dx, &a->sums);
}

static int in_turn(const lac_a_gelu_norm_bwd *a)
{
    lac_a_map1 gelu = {M1_gelu, a->x, a->dx};
    lac_a_layernorm_bwd norm = {a->act, a->gamma, a->mean, a->rstd, a->g, a->dx, a->dgamma, a->dbeta};
    lac_a_map1_bwd back = {M1_gelu, a->x, a->x, a->dx, a->dx};
    size_t bytes = (size_t)numel(&a->x) * (size_t)dtype_bytes(a->x.dtype);
    lac_scratch space("gelu_norm_bwd", a->act.data ? 1 : bytes);
    if (!space.data) return LAC_E_MEMORY;
    if (!a->act.data) { /* the norm's backward reads a row several times: not the place it writes */
        gelu.out.data = space.data;
        norm.x = gelu.out;
        LAC_TRY(lac_cuda_map1(&gelu));
    }
    LAC_TRY(lac_cuda_layernorm_bwd(&norm));
    LAC_TRY(lac_cuda_map1_bwd(&back));
    return beside(a);
}

extern "C" int lac_cuda_gelu_norm(const lac_a_gelu_norm *a)
{
    const lac_view *list[] = {&a->x, &a->act, &a->out};
    gelu_norm_args j = args_of(&a->x, a->eps);
    if (j.rows * j.n == 0) return 0;
    if (!rows_kept(list, 3, &a->gamma, &a->beta)) return in_turn(a);
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        int status = 0;
        if constexpr (std::is_same_v<T, bf16>) {
            whole_rows<T> w = {j.rows,
                               j.n,
                               j.eps,
                               (const T *)a->x.data,
                               (const T *)a->gamma.data,
                               (const T *)a->beta.data,
                               (T *)a->out.data,
                               (float *)a->mean.data,
                               (float *)a->rstd.data};
            if (!a->act.data && whole_fits<32>(w, j.n)) return norm_whole<32, gelu_of_rows<T>>("gelu_norm", w);
            if (!a->act.data && whole_fits<128>(w, j.n)) return norm_whole<128, gelu_of_rows<T>>("gelu_norm", w);
        }
        auto run = [&](auto kernel, int rows, int threads, int shared, int waves) {
            launch(kernel, blocks_filling(j.rows, rows, waves), threads, shared, j, (const T *)a->x.data,
                   (const T *)a->gamma.data, (const T *)a->beta.data, (T *)a->act.data, (T *)a->out.data,
                   (float *)a->mean.data, (float *)a->rstd.data);
        };
        if constexpr (sizeof(T) < 8)
            with_rows<T>(j.n, true, [&](auto rt, auto nt, auto kt) {
                constexpr int ROW = decltype(rt)::value, N = decltype(nt)::value, KEEP = decltype(kt)::value;
                auto ahead = [&](auto whole) {
                    constexpr int threads = gelu_threads<ROW, KEEP>, shared = gelu_shared<T, ROW, KEEP>;
                    auto kernel = gelu_norm_ahead<T, ROW, KEEP, decltype(whole)::value>;
                    static cudaError_t allowed =
                        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
                    status = lac_cuda_check("gelu_norm", allowed);
                    run(kernel, threads / ROW, threads, shared, 1);
                };
                if constexpr (KEEP > 0 && sizeof(T) == 2) {
                    if (j.n == ROW * KEEP) ahead(std::true_type());
                    else ahead(std::false_type());
                } else if constexpr (KEEP > 0) {
                    run(gelu_norm_rows<T, ROW, N, KEEP>, row_threads<ROW> / ROW, row_threads<ROW>, 0, 64);
                }
            });
        LAC_TRY(status);
        return lac_cuda_launched("gelu_norm");
    });
}

extern "C" int lac_cuda_gelu_norm_bwd(const lac_a_gelu_norm_bwd *a)
{
    const char *op = "gelu_norm_bwd";
    const lac_view *list[] = {&a->x, &a->g, &a->dx, &a->out};
    gelu_norm_args j = args_of(&a->x, 0);
    bool again = (a->out.data || a->sums.data) && j.n <= 16 * BACK_WIDE;
    if (a->act.data || j.rows * j.n == 0 || !rows_kept(list, 4, &a->gamma, &a->beta)) return in_turn(a);
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        if constexpr (sizeof(T) < 8) {
            norm_grad<T> norm = {
                j.rows, j.n, (const T *)a->gamma.data, (const float *)a->mean.data, (const float *)a->rstd.data, NULL};
            const T *x = (const T *)a->x.data, *g = (const T *)a->g.data, *beta = (const T *)a->beta.data;
            T *dx = (T *)a->dx.data, *out = (T *)a->out.data;
            if (again) {
                gelu_norm_back<T, true> back = {x, g, dx, j.n, beta, out};
                return norm_bwd_run<T>(op, norm, back, &a->dgamma, &a->dbeta, &a->sums);
            }
            if constexpr (looks_up<T>)
                if (back_whole_fits<T>(j.rows, j.n)) {
                    whole_grad<T> w = {j.rows, j.n, j.n, x, g, norm.gamma, norm.mean, norm.rstd, dx, NULL};
                    if (j.n == 768) LAC_TRY((norm_bwd_whole<32, gelu_back_of_rows>(op, w, &a->dgamma, &a->dbeta)));
                    else LAC_TRY((norm_bwd_whole<128, gelu_back_of_rows>(op, w, &a->dgamma, &a->dbeta)));
                    return beside(a);
                }
            gelu_norm_back<T, false> back = {x, g, dx, j.n, NULL, NULL};
            LAC_TRY(norm_bwd_run<T>(op, norm, back, &a->dgamma, &a->dbeta));
            return beside(a);
        } else {
            return (int)LAC_E_INTERNAL; /* f64 runs in turn */
        }
    });
}
