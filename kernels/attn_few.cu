/* attn_few.cu: the forward for a few rows, as decoding has them.
 *
 * The tiles of attn_forward.cuh have 128 rows; with one row a thread block walks alone over a segment's keys, and the
 * longest segment is what a token waits for. Here the keys of a row are cut into parts, one thread block each, and a
 * second launch joins the parts of a branch and then the branches. A warp takes 32 keys at a time: all its lanes share
 * a key's dimensions, in neighbouring pairs, so that loads are whole sectors, and up to eight keys are on their way at
 * once.
 *
 * Only visible keys are loaded, so what is hidden may hold anything. Sums are f32 for half types and f64 for f32, whose
 * scores a backward makes again in another order: reading a row's keys once is what it costs, not arithmetic. Parts are
 * counted from the plan alone, so the same call gives the same bits. Options of single pairs, padding, lengths and
 * dropout stay with the other kernels. Rejected: parts joined by the last thread block to finish (a counter to be
 * cleared costs the launch that it saves).
 */
#include "attn_few.cuh"
#include "launch.cuh"

enum { FEW_ROWS = 4, FEW_WARPS = 4, FEW_TURN = 32 * FEW_WARPS, FEW_PARTS = 64 };

/* sums, scores and results of parts */
template <class T> using few_t = std::conditional_t<sizeof(T) == 2, float, double>;

static __device__ __forceinline__ float few_exp2(float x) { return exp2f(x); }
static __device__ __forceinline__ double few_exp2(double x) { return exp2(x); }

/* a part: base-2 maximum, sum, then head_dim numbers of the output */
static __device__ __forceinline__ int64_t few_place(const attn_args &a, int64_t row, int total, int part)
{
    return (row * total + part) * (a.head_dim + 2);
}

/* Visible keys [low, high) of a position in the lattice of branch g for head h; false: none. */
struct few_span {
    int64_t base;
    int low, high;
};
static __device__ bool few_keys(const attn_args &a, int g, int h, int64_t position, few_span *s)
{
    const attn_branch &br = a.branch[g];
    if (position < 0 || !attn_runs(a, g, h)) return false;
    const int64_t start = position / br.segment * br.segment, end = start + br.segment;
    const int at = (int)(position - start) - attn_offset(a, g, h), i = at / br.dilation;
    if (at < 0 || at % br.dilation) return false;
    s->base = start + attn_offset(a, g, h);
    const int live = attn_count(s->base, br.dilation, a.m < end ? a.m : end);
    const int reach = a.window < 0 ? 1 << 30 : a.window / br.dilation;
    const int64_t after = a.causal ? i + 1 : (int64_t)i + reach + 1;
    s->low = i > reach ? i - reach : 0;
    s->high = after < live ? (int)after : live;
    return s->low < s->high;
}

/* dedup: does an earlier branch let the position see the key? */
static __device__ bool few_taken(const attn_args &a, int g, int h, int64_t position, int64_t key)
{
    for (int e = 0; e < g; e++) {
        few_span s;
        if (!few_keys(a, e, h, position, &s) || key < s.base) continue;
        const int r = a.branch[e].dilation;
        const int64_t i = (key - s.base) / r;
        if ((key - s.base) % r == 0 && i >= s.low && i < s.high) return true;
    }
    return false;
}

/* dimensions 2 lane + 64 e and the next one of a row */
template <class T, int E>
static __device__ __forceinline__ void few_load(const T *p, int64_t stride, int D, T (&x)[2 * E])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < 2 * E; e++) {
        const int d = 2 * lane + 64 * (e / 2) + e % 2;
        x[e] = d < D ? p[d * stride] : from_compute<T>(compute_t<T>(0));
    }
}
struct alignas(4) few_pair {
    uint32_t bits;
};
/* the same for contiguous rows of a half type: a pair is a word */
template <class T, int E> static __device__ __forceinline__ void few_load_words(const T *p, int D, T (&x)[2 * E])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < E; e++) {
        const int d = 2 * lane + 64 * e;
        few_pair word = {0};
        if (d < D) word = *(const few_pair *)(p + d);
        memcpy(x + 2 * e, &word, sizeof word);
    }
}
template <class T, int E>
static __device__ __forceinline__ void few_row(const attn_tensor &t, const T *p, int D, T (&x)[2 * E])
{
    if (sizeof(T) == 2 && t.vec) few_load_words<T, E>(p, D, x);
    else few_load<T, E>(p, t.stride[3], D, x);
}

/* block: (part, head, row of the batch) */
template <class T, int E>
__global__ void __launch_bounds__(FEW_TURN) attn_few_kernel(const __grid_constant__ attn_args a, few_t<T> *parts)
{
    typedef few_t<T> C;
    /* keys on their way at once, as many as registers hold */
    constexpr int AHEAD = sizeof(T) == 2 ? 8 : sizeof(T) * E == 4 ? 2 : sizeof(T) * E <= 16 ? 4 : 1;
    __shared__ C tops[FEW_WARPS], sums[FEW_WARPS], outs[FEW_WARPS][64 * E];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = a.head_dim, h = blockIdx.y, hk = h / a.group;
    const int b = blockIdx.z / a.n, n = blockIdx.z % a.n;
    previous_done();
    int g = 0;
    while (blockIdx.x >= a.branch[g].begin + a.branch[g].blocks) g++;
    const int part = (int)(blockIdx.x - a.branch[g].begin), r = a.branch[g].dilation;
    const int64_t position = (int64_t)a.shift + n;
    few_span s = {0, 0, 0};
    if (!few_keys(a, g, h, position, &s)) s.low = s.high = 0;
    const int each = a.branch[g].segments * FEW_TURN, first = s.low + part * each; /* turns of a part, as keys */
    const int end = first + each < s.high ? first + each : s.high;
    const T *k = (const T *)a.k.data + b * a.k.stride[0] + hk * a.k.stride[2] + s.base * a.k.stride[1];
    const T *v = (const T *)a.v.data + b * a.v.stride[0] + hk * a.v.stride[2] + s.base * a.v.stride[1];
    const int64_t k_step = r * a.k.stride[1], v_step = r * a.v.stride[1];
    const C scale = (C)(a.scale * ATTN_LOG2E);
    C q[2 * E], o[2 * E] = {}, top = -INFINITY, sum = 0;
    T row[2 * E];
    few_row<T, E>(a.q, (const T *)a.q.data + b * a.q.stride[0] + n * a.q.stride[1] + h * a.q.stride[2], D, row);
#pragma unroll
    for (int e = 0; e < 2 * E; e++) q[e] = (C)to_compute(row[e]);
    for (int at = first + 32 * warp; at < end; at += FEW_TURN) {
        const int key = at + lane;
        const bool seen = key < end && !(a.dedup && few_taken(a, g, h, position, s.base + (int64_t)key * r));
        const unsigned all = __ballot_sync(~0u, seen);
        C mine = -INFINITY;
#pragma unroll 1
        for (int u = 0; u < 32; u += AHEAD) {
            T x[AHEAD][2 * E];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (all >> (u + i) & 1) few_row<T, E>(a.k, k + (at + u + i) * k_step, D, x[i]);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (!(all >> (u + i) & 1)) continue;
                C dot = 0;
#pragma unroll
                for (int e = 0; e < 2 * E; e++) dot += q[e] * (C)to_compute(x[i][e]);
                dot = warp_sum(dot) * scale;
                if (lane == u + i) mine = dot;
            }
        }
        C most = warp_max(mine);
        most = most > top ? most : top;
        const C shift = most == -INFINITY ? C(0) : most, shrink = few_exp2(top - shift);
        const C p = seen ? few_exp2(mine - shift) : C(0);
        top = most;
        sum = sum * shrink + warp_sum(p);
#pragma unroll
        for (int e = 0; e < 2 * E; e++) o[e] *= shrink;
#pragma unroll 1
        for (int u = 0; u < 32; u += AHEAD) {
            T x[AHEAD][2 * E];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (all >> (u + i) & 1) few_row<T, E>(a.v, v + (at + u + i) * v_step, D, x[i]);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const C weight = __shfl_sync(~0u, p, u + i);
                if (!(all >> (u + i) & 1)) continue;
#pragma unroll
                for (int e = 0; e < 2 * E; e++) o[e] += weight * (C)to_compute(x[i][e]);
            }
        }
    }
    if (lane == 0) tops[warp] = top, sums[warp] = sum;
#pragma unroll
    for (int e = 0; e < 2 * E; e++) outs[warp][2 * lane + 64 * (e / 2) + e % 2] = o[e];
    __syncthreads();
    C most = tops[0];
    for (int w = 1; w < FEW_WARPS; w++) most = tops[w] > most ? tops[w] : most;
    const C shift = most == -INFINITY ? C(0) : most;
    C *to = parts + few_place(a, ((int64_t)blockIdx.z * a.heads + h), gridDim.x, blockIdx.x);
    for (int d = threadIdx.x; d < D; d += FEW_TURN) {
        C x = 0;
        for (int w = 0; w < FEW_WARPS; w++) x += outs[w][d] * few_exp2(tops[w] - shift);
        to[2 + d] = x;
    }
    if (threadIdx.x) return;
    C all = 0;
    for (int w = 0; w < FEW_WARPS; w++) all += sums[w] * few_exp2(tops[w] - shift);
    to[0] = most, to[1] = all;
}

/* block: (head, row of the batch) */
template <class T>
__global__ void __launch_bounds__(FEW_TURN)
    attn_few_join(const __grid_constant__ attn_args a, const few_t<T> *parts, int total)
{
    typedef few_t<T> C;
    __shared__ C factor[LAC_MAX_BRANCHES * FEW_PARTS];
    __shared__ double lse[LAC_MAX_BRANCHES], sums[LAC_MAX_BRANCHES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t row = (int64_t)blockIdx.y * a.heads + blockIdx.x;
    previous_done();
    for (int g = warp; g < a.branches; g += FEW_WARPS) { /* a branch: one warp */
        const int begin = (int)a.branch[g].begin, end = begin + a.branch[g].blocks;
        C top = -INFINITY, sum = 0;
        for (int p = begin + lane; p < end; p += 32) {
            const C x = parts[few_place(a, row, total, p)];
            top = x > top ? x : top;
        }
        top = warp_max(top);
        const C shift = top == -INFINITY ? C(0) : top;
        for (int p = begin + lane; p < end; p += 32) {
            const C *part = parts + few_place(a, row, total, p);
            factor[p] = few_exp2(part[0] - shift);
            sum += part[1] * factor[p];
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            sums[g] = (double)sum;
            lse[g] = sum == 0 ? -(double)INFINITY : ((double)top + log2((double)sum)) * ATTN_LN2;
        }
    }
    __syncthreads();
    double all = -(double)INFINITY;
    for (int g = 0; g < a.branches; g++) all = attn_log_add(all, lse[g]);
    for (int d = threadIdx.x; d < a.head_dim; d += FEW_TURN) {
        C out = 0;
        for (int g = 0; g < a.branches; g++) {
            if (sums[g] == 0) continue;
            C x = 0;
            const int begin = (int)a.branch[g].begin, end = begin + a.branch[g].blocks;
#pragma unroll 8
            for (int p = begin; p < end; p++) x += factor[p] * parts[few_place(a, row, total, p) + 2 + d];
            out += x * (C)(a.gscale * (a.sum ? 1 : exp(lse[g] - all)) / sums[g]);
        }
        ((T *)a.out)[row * a.head_dim + d] = from_compute<T>((compute_t<T>)out);
    }
    if (threadIdx.x == 0) ((compute_t<T> *)a.lse)[row] = (compute_t<T>)all;
}

bool attn_few_fits(const lac_a_attend *f)
{
    const lac_attn_desc *d = &f->plan->desc;
    return d->n <= FEW_ROWS && f->kernel == LAC_KERNEL_AUTO && !lac_attend_pairs(f) && !f->padding.data &&
           !f->lengths.data && !f->branch_lse.data && f->dropout == 0 && d->batch * d->n <= 65535 && d->heads <= 65535;
}

/* Parts of every branch: of 128 keys, or of so many times 128 that there are at most FEW_PARTS. */
static int few_number(attn_args &a, const lac_plan *p)
{
    int total = 0;
    for (int g = 0; g < a.branches; g++) {
        attn_branch &b = a.branch[g];
        const int64_t most = p->segment[g] < a.m ? p->segment[g] : a.m, keys = (most - 1) / b.dilation + 1;
        b.segments = (int)((keys - 1) / (FEW_TURN * FEW_PARTS)) + 1; /* turns of a part */
        b.blocks = (int)((keys - 1) / ((int64_t)b.segments * FEW_TURN)) + 1;
        b.begin = total;
        total += b.blocks;
    }
    return total;
}

int attn_few_forward(attn_args &a, const lac_a_attend *f)
{
    const int total = few_number(a, f->plan);
    const int64_t rows = (int64_t)a.batch * a.n * a.heads;
    const size_t width = dtype_bytes(f->q.dtype) == 2 ? sizeof(float) : sizeof(double);
    lac_scratch space("attention", (size_t)(rows * total * (a.head_dim + 2)) * width);
    if (!space.data) return LAC_E_MEMORY;
    a.out = f->out.data, a.lse = f->lse.data;
    return dispatch_float(f->q.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        typedef few_t<T> C;
        const dim3 grid((unsigned)total, (unsigned)a.heads, (unsigned)(a.batch * a.n));
        C *parts = (C *)space.data;
        const auto kernel = a.head_dim <= 64    ? attn_few_kernel<T, 1>
                            : a.head_dim <= 128 ? attn_few_kernel<T, 2>
                                                : attn_few_kernel<T, 4>;
        launch(kernel, grid, FEW_TURN, 0, a, parts);
        LAC_TRY(lac_cuda_launched("attention"));
        launch(attn_few_join<T>, dim3((unsigned)a.heads, (unsigned)(a.batch * a.n)), FEW_TURN, 0, a, parts, total);
        return lac_cuda_launched("attention");
    });
}
