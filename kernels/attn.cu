/* attn.cu: attention on CUDA, the host's side: from a plan to the arguments of the kernels, and the statistics of rows.
 *
 * The forward is one launch. The backward begins with lse and delta of every row in base 2 (this file); merges that
 * need a delta per branch add a pass over the queries (Hopper: attn_hopper_deltas.cu). Then f16 and bf16 take dq, dk
 * and dv from one pass over the keys (attn_hopper_backward.cu), whose tiles Hopper's kernels compute or, where
 * attn_hopper_backward_fits() says no, the portable ones (attn_joint.cuh). What these do not do takes two: dq
 * (attn_queries.cuh), dk and dv (attn_keys.cuh). Rows that no branch keeps are cleared beforehand, unless a branch
 * without dilation reaches every row.
 *
 * Memory beside tensors: f32 sums of f16 and bf16 results where branches meet in a row (one copy of the result, none
 * otherwise), four numbers a row and head in the backward (per branch if deltas are), a few counters. The backward in
 * one pass has no sums of dk and dv beside the results (attn_sums.cuh), but f32 sums of dq for every branch, about four
 * times dq for LongNet's five (lac_plan_info says how much); they are a block of the pool by themselves, because it
 * rounds blocks up by as much as a quarter. fp8 rounds q, k and v beside them (attn_hopper_fp8.cuh) and runs on Hopper
 * or not at all. f64 is computed by multiply-adds (attn_exact_*.cuh), everything else on tensor cores, f32 in parts
 * that make it exact (attn_parts_*.cuh, on Hopper attn_hopper_parts_*.cu; where these do not run by multiply-adds)
 * unless lac.use_tf32 says otherwise. Calls with options of single pairs run instances of their own (attn_pairs_*.cu),
 * up to four rows without such options kernels that cut the keys instead (attn_few.cu). Branches run in the reverse
 * order of the plan's phases: the last to run is then usually the one without dilation, which reaches every row, so
 * that each row is rounded once and most sums stay in the cache.
 */
#include "attn_few.cuh"
#include "attn_hopper_backward.cuh"
#include "attn_hopper_fp8.cuh"
#include "attn_hopper_pairs.cuh"
#include "attn_hopper_parts.cuh"
#include "launch.cuh"
#include <cmath>

/* ---- arguments ---- */

static attn_tensor tensor_of(const lac_view *v)
{
    attn_tensor t = {(char *)v->data, {v->stride[0], v->stride[1], v->stride[2], v->stride[3]}, 1};
    int64_t bytes = dtype_bytes(v->dtype);
    t.vec = (uintptr_t)v->data % 16 == 0 && (v->stride[3] == 1 || v->shape[3] == 1) && v->shape[3] * bytes % 16 == 0;
    for (int d = 0; d < 3; d++) t.vec = t.vec && (v->shape[d] == 1 || v->stride[d] * bytes % 16 == 0);
    return t;
}

static void copy_strides(int64_t (&to)[4], const lac_view *v)
{
    for (int d = 0; d < 4; d++) to[d] = v->stride[d];
}

static bool paired(const lac_a_attend *f) { return lac_attend_pairs(f) != NULL; }

static void pairs_of(attn_pair_args &a, const lac_a_attend *f)
{
    const lac_attn_desc *d = &f->plan->desc;
    a.mask = (const uint8_t *)f->mask.data, a.bias = (const char *)f->bias.data;
    a.slopes = f->slopes.data, a.slopes_stride = f->slopes.stride[0];
    a.blocks = (const uint8_t *)f->blocks.data;
    a.bias_wide = f->bias.dtype != f->q.dtype;
    copy_strides(a.mask_stride, &f->mask);
    copy_strides(a.bias_stride, &f->bias);
    copy_strides(a.blocks_stride, &f->blocks);
    a.unit = 1 / f->scale;
    if (!a.blocks) return;
    int64_t most = d->n > d->m ? d->n : d->m;
    a.block = (int)(f->block < most ? f->block : most);
}

static int least(int64_t x, int64_t most) { return (int)(x < most ? x : most); }

static int args_of(attn_pair_args &a, const lac_a_attend *f)
{
    const lac_plan *p = f->plan;
    const lac_attn_desc *d = &p->desc;
    const int64_t limit = INT32_MAX;
    if (d->head_dim > 256)
        LAC_FAIL(ARGUMENT, "attention: head_dim %d is not supported on cuda, the largest is 256", d->head_dim);
    if (d->n > limit / 2 || d->m > limit / 2 || d->batch * d->heads > limit / 2)
        LAC_FAIL(ARGUMENT, "attention: %lld queries, %lld keys, batch %lld x %d heads: cuda counts each below 2^30",
                 (long long)d->n, (long long)d->m, (long long)d->batch, d->heads);
    a = {};
    a.branches = d->branches;
    a.batch = (int)d->batch, a.n = (int)d->n, a.m = (int)d->m, a.shift = (int)p->shift;
    a.heads = d->heads, a.kv_heads = d->kv_heads, a.group = d->heads / d->kv_heads, a.head_dim = d->head_dim;
    a.offset_rule = d->offset_rule, a.causal = d->causal, a.dedup = d->dedup;
    a.window = d->window < 0 ? -1 : least(d->window, limit / 2);
    a.sum = lac_plan_branch_softmax(p);
    a.q = tensor_of(&f->q), a.k = tensor_of(&f->k), a.v = tensor_of(&f->v);
    a.padding = (const uint8_t *)f->padding.data;
    a.padding_stride[0] = f->padding.stride[0], a.padding_stride[1] = f->padding.stride[1];
    a.lengths = f->lengths.data, a.lengths_stride = f->lengths.stride[0], a.lengths_wide = f->lengths.dtype == LAC_I64;
    a.p = (float)f->dropout;
    a.scale = f->scale, a.gscale = lac_plan_gscale(p), a.keep_scale = 1 / (1 - f->dropout);
    a.log2_scale = (float)(a.scale * ATTN_LOG2E), a.log2_magnitude = fabsf(a.log2_scale);
    a.seed = f->seed, a.offset = f->offset, a.draw = f->draw;
    for (int g = 0; g < d->branches; g++) {
        a.branch[g].segment = (int)p->segment[g];
        a.branch[g].dilation =
            least(d->dilation[g], limit); /* above the segment it only tells one offset from another */
        a.branch[g].head0 = p->head0[g], a.branch[g].heads = p->heads[g];
    }
    pairs_of(a, f);
    return 0;
}

static size_t counters(const attn_args &a)
{
    return (1 + (size_t)a.branches * (size_t)a.batch * (size_t)a.heads) * sizeof(int);
}

int attn_number(attn_args &a, const lac_plan *p, bool keys, int height, int64_t *tiles, int block)
{
    const int32_t *phase = keys ? p->backward_phase : p->forward_phase;
    int phases = keys ? p->backward_phases : p->forward_phases;
    *tiles = 0;
    a.ranks = a.deltas ? 1 : phases;
    for (int g = 0; g < a.branches; g++) {
        attn_branch &b = a.branch[g];
        int64_t first = 0, last = (p->desc.m - 1) / p->segment[g] + 1, most = keys ? p->desc.m : p->desc.n;
        if (!keys) lac_plan_segments(p, g, &first, &last);
        if (p->segment[g] < most) most = p->segment[g];
        b.rank = a.deltas ? 0 : phases - 1 - phase[g];
        b.segment0 = (int)first;
        b.segments = last > first ? (int)(last - first) : 0;
        b.blocks = (int)(((most - 1) / b.dilation) / height) + 1;
        if (block) { /* a segment may begin and end within blocks */
            int64_t cells = (most - 1) / block + 2, all = ((keys ? p->desc.m : p->desc.n) - 1) / block + 1;
            b.blocks = (int)(cells < all ? cells : all) * attn_pieces(b, block, height);
        }
        b.tiles = (int64_t)b.blocks * b.segments * b.heads * a.batch;
    }
    uint32_t done = 0;
    for (int n = 0; n < a.branches; n++) { /* by rank, long rows first */
        int best = -1;
        for (int g = 0; g < a.branches; g++) {
            if (done >> g & 1) continue;
            const attn_branch &x = a.branch[g], *y = best < 0 ? NULL : &a.branch[best];
            if (!y || x.rank < y->rank || (x.rank == y->rank && x.blocks > y->blocks)) best = g;
        }
        done |= (uint32_t)1 << best;
        a.branch[best].begin = *tiles;
        *tiles += a.branch[best].tiles;
    }
    if (*tiles > INT32_MAX)
        LAC_FAIL(ARGUMENT, "attention: %lld tiles are too many for one launch on cuda", (long long)*tiles);
    if (a.ranks > 1) CUDA_TRY("attention", lac_cuda_fill_bytes(a.counter, 0, counters(a)));
    return 0;
}

/* Do branches reach every position of the head, as far as that is easily seen? One of a single segment, or whose
 * segment is a whole number of dilations, keeps the same rows of every dilation: those of all such branches are marked
 * in a common multiple of their dilations, if that is small. */
static bool head_covered(const lac_plan *p, int head)
{
    enum { MOST = 1024 };
    bool kept[MOST];
    const lac_attn_desc *d = &p->desc;
    const int64_t end = max(p->shift + d->n, d->m);
    int64_t period = 1, rows = 0;
    for (int pass = 0; pass < 2; pass++) {
        memset(kept, 0, (size_t)period * sizeof *kept);
        for (int g = 0; g < d->branches; g++) {
            if (head < p->head0[g] || head >= p->head0[g] + p->heads[g]) continue;
            const int64_t r = d->dilation[g], w = p->segment[g], o = lac_plan_offset(d, g, head);
            int64_t all = period;
            if (r == 1) return true;
            if ((w % r != 0 && w < end) || o >= r || r > MOST) continue;
            while (all % r != 0) all += period;
            if (all > MOST) continue;
            if (pass == 0) period = all;
            else
                for (int64_t i = o; i < period; i += r) kept[i] = true;
        }
    }
    for (int64_t i = 0; i < period; i++) rows += kept[i];
    return rows == period;
}
static bool covered(const lac_plan *p)
{
    const bool alike = p->desc.heads_scheme == LAC_HEADS_ALL && p->desc.offset_rule == LAC_OFFSET_BRANCH;
    for (int h = 0; h < (alike ? 1 : p->desc.heads); h++)
        if (!head_covered(p, h)) return false;
    return true;
}

/* ---- filling ---- */

template <class C> __global__ void __launch_bounds__(THREADS) attn_fill_kernel(C *x, int64_t n, C value)
{
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        x[i] = value;
}

static int fill_lse(const lac_view *v)
{
    if (!v->data) return 0;
    int64_t n = lac_view_numel(v);
    unsigned blocks = blocks_filling(n, 4 * THREADS);
    if (v->dtype == LAC_F64)
        launch_after(attn_fill_kernel<double>, blocks, THREADS, 0, (double *)v->data, n, -(double)INFINITY);
    else launch_after(attn_fill_kernel<float>, blocks, THREADS, 0, (float *)v->data, n, -INFINITY);
    return lac_cuda_launched("attention");
}

static int clear(const lac_view *v)
{
    return lac_cuda_check("attention",
                          lac_cuda_fill_bytes(v->data, 0, (size_t)(lac_view_numel(v) * dtype_bytes(v->dtype))));
}

/* ---- which kernels ---- */

static bool exact(int dtype) { return dtype == LAC_F64 || (dtype == LAC_F32 && !lac_cuda_engine->settings->tf32); }
/* exactly, but by tensor cores? */
static bool parts(int dtype, int head_dim) { return exact(dtype) && dtype == LAC_F32 && attn_parts_fits(head_dim); }

/* on Hopper by warpgroups? without options of pairs, where rows are aligned and tiles not mostly empty */
static bool group_parts(const attn_args &a, const lac_a_attend *f)
{
    return f->kernel != LAC_KERNEL_PORTABLE && !paired(f) && lac_plan_hopper_pays(f->plan, 0) && a.q.vec && a.k.vec &&
           a.v.vec && (!a.g.data || a.g.vec) && attn_hopper_parts_runs();
}

/* ---- statistics of rows for the backward ---- */

struct stats_args {
    attn_tensor out, g, lse, branch_lse, dlse; /* strides of lse: B, N, H; of branch_lse: G, B, N, H */
    int64_t rows;                              /* B N H */
    int n, heads, head_dim, branches;
    bool per_branch, branch_softmax, parts;
    bool flat, gaps; /* do rows lie one after the other? may there be rows that no branch reaches? */
    void *lse2, *lse2_low, *delta, *delta_low;
    float *squares; /* NULL, or where sums of squares of dout's rows go: f16 and bf16 */
    double *lse_all;
};

/* base-2 lse in two parts; +inf where there is no key, so that P is 0 */
__device__ __forceinline__ void base2(float lse, float *high, float *low)
{
    double x = (double)lse * ATTN_LOG2E;
    *high = lse == -INFINITY ? INFINITY : (float)x;
    *low = isfinite(lse) ? (float)(x - (double)*high) : 0.f;
}
__device__ __forceinline__ void base2(double lse, double *high, double *low)
{
    *high = lse == -INFINITY ? (double)INFINITY : lse * ATTN_LOG2E;
    *low = isfinite(lse) ? fma(lse, ATTN_LOG2E, -*high) + lse * 2.0355273740931033e-17 : 0.0;
}

__device__ __forceinline__ void stats_place(const stats_args &a, int64_t row, int *b, int *n, int *h)
{
    if (row >> 32 == 0) { /* 64-bit divisions take most of the kernel's instructions */
        const uint32_t x = (uint32_t)row, token = x / (uint32_t)a.heads;
        *h = (int)(x - token * (uint32_t)a.heads), *b = (int)(token / (uint32_t)a.n);
        *n = (int)(token - (uint32_t)*b * (uint32_t)a.n);
    } else *h = (int)(row % a.heads), *n = (int)(row / a.heads % a.n), *b = (int)(row / a.heads / a.n);
}
/* dout times out of EACH rows, of which eight lanes take 16 bytes at a time: all are asked for before one is used.
 * `wanted`: of which rows, a bit each; SQUARES: dout times itself too */
template <class T, int EACH, bool SQUARES>
__device__ __forceinline__ void stats_products(const stats_args &a, const int64_t (&x)[EACH], const int64_t (&y)[EACH],
                                               unsigned wanted, float (&sum)[EACH], float (&squares)[EACH])
{
    constexpr int PER = 16 / (int)sizeof(T);
    struct alignas(16) chunk {
        T at[PER];
    };
    for (int c = threadIdx.x % 8; c * PER < a.head_dim; c += 8) {
        chunk u[EACH], v[EACH];
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if (wanted >> k & 1)
                u[k] = ((const chunk *)((const T *)a.out.data + x[k]))[c],
                v[k] = ((const chunk *)((const T *)a.g.data + y[k]))[c];
#pragma unroll
        for (int k = 0; k < EACH; k++)
#pragma unroll
            for (int i = 0; i < PER; i++)
                if (wanted >> k & 1) {
                    const float x = to_compute(v[k].at[i]);
                    sum[k] = fmaf(to_compute(u[k].at[i]), x, sum[k]);
                    if (SQUARES) squares[k] = fmaf(x, x, squares[k]);
                }
    }
}

/* dout times out of the warp's four rows, summed as attn_parts.cuh's kernels sum dP; x, y: of the lane's row, lane / 8
 */
__device__ __forceinline__ float stats_parts(const stats_args &a, int64_t x, int64_t y)
{
    const int lane = threadIdx.x % 32, from = lane / 4 % 4 * 8;
    const float *out = (const float *)a.out.data + __shfl_sync(~0u, x, from);
    const float *g = (const float *)a.g.data + __shfl_sync(~0u, y, from);
    float high[1][2][4] = {}, low[1][2][4] = {}; /* rows repeat: 16 x 16 pairs for four on the diagonal */
#pragma unroll 1
    for (int k = 0; k < a.head_dim; k += 16) {
        uint32_t left[PARTS][1][4], right[PARTS][1][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float u[2], v[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int d = k + 8 * half + lane % 4 * 2 + i;
                u[i] = d < a.head_dim ? g[d * a.g.stride[3]] : 0;
                v[i] = d < a.head_dim ? out[d * a.out.stride[3]] : 0;
            }
            uint32_t l[PARTS], r[PARTS];
            parts_of(l, u[0], u[1]);
            parts_of(r, v[0], v[1]);
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                left[p][0][2 * half] = left[p][0][2 * half + 1] = l[p];
                right[p][0][half] = right[p][0][2 + half] = r[p];
            }
        }
        parts_apart<false, false>(high, low, left, right);
    }
    const int row = lane / 8, at = row * 4 + row / 2;
    const float even = __shfl_sync(~0u, high[0][0][0] + low[0][0][0], at);
    const float odd = __shfl_sync(~0u, high[0][0][1] + low[0][0][1], at);
    return row % 2 ? odd : even;
}

/* Eight lanes a row, four rows one after the other in f16 and bf16. In f32 and f64 dout and out are multiplied in the
 * order of the kernels' products, which is that of one lane where they are multiply-adds: where one key has all the
 * weight, out is its value and dP - delta cancels to the last bit, as it should. */
template <class T, bool SQUARES>
__global__ void __launch_bounds__(THREADS) attn_stats_kernel(const __grid_constant__ stats_args a)
{
    typedef compute_t<T> C;
    constexpr int EACH = sizeof(T) == 2 ? 4 : 1; /* rows of eight lanes; those of a warp are neighbours */
    const int lane = threadIdx.x % 8;
    const int64_t first = ((int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * (4 * EACH) + threadIdx.x % 32 / 8;
    const int64_t row = first + 4 * lane; /* one of the eight lanes' rows a lane */
    const bool mine = lane < EACH && row < a.rows;
    int64_t x[EACH], y[EACH];
    C sums[EACH] = {}, squares[EACH] = {}, lse = 0;
    int b, n, h;
    previous_done();
    if (mine) {
        int64_t at = row;
        if (!a.flat) {
            stats_place(a, row, &b, &n, &h);
            at = b * a.lse.stride[0] + n * a.lse.stride[1] + h * a.lse.stride[2];
        }
        lse = ((const C *)a.lse.data)[at];
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) { /* the last row again: all lanes take part in the sum */
        const int64_t at = first + 4 * k < a.rows ? first + 4 * k : a.rows - 1;
        x[k] = y[k] = at * a.head_dim;
        if (a.flat) continue;
        stats_place(a, at, &b, &n, &h);
        x[k] = b * a.out.stride[0] + n * a.out.stride[1] + h * a.out.stride[2];
        y[k] = b * a.g.stride[0] + n * a.g.stride[1] + h * a.g.stride[2];
    }
    unsigned wanted = ~0u;
    if (EACH > 1 && a.gaps) { /* their deltas are not needed */
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if (__shfl_sync(~0u, lse, threadIdx.x % 32 / 8 * 8 + k) == -INFINITY) wanted &= ~(1u << k);
    }
    if (SQUARES || !a.per_branch) {
        if constexpr (EACH > 1) {
            if (a.out.vec && a.g.vec) stats_products<T, EACH, SQUARES>(a, x, y, wanted, sums, squares);
            else
                for (int d = lane; d < a.head_dim; d += 8)
#pragma unroll
                    for (int k = 0; k < EACH; k++) {
                        const float u = to_compute(((const T *)a.g.data)[y[k] + d * a.g.stride[3]]);
                        sums[k] += to_compute(((const T *)a.out.data)[x[k] + d * a.out.stride[3]]) * u;
                        if (SQUARES) squares[k] += u * u;
                    }
#pragma unroll
            for (int k = 0; k < EACH; k++)
#pragma unroll
                for (int o = 1; o < 8; o *= 2) {
                    sums[k] += __shfl_xor_sync(~0u, sums[k], o);
                    if (SQUARES) squares[k] += __shfl_xor_sync(~0u, squares[k], o);
                }
        } else if (sizeof(T) == 4 && a.parts) {
            sums[0] = stats_parts(a, x[0], y[0]);
        } else if (lane == 0) {
            for (int d = 0; d < a.head_dim; d++)
                sums[0] = fma(to_compute(((const T *)a.g.data)[y[0] + d * a.g.stride[3]]),
                              to_compute(((const T *)a.out.data)[x[0] + d * a.out.stride[3]]), sums[0]);
        }
    }
    if (!mine) return;
    C sum = sums[0];
#pragma unroll
    for (int k = 1; k < EACH; k++) {
        sum = lane == k ? sums[k] : sum;
        if (SQUARES) squares[0] = lane == k ? squares[k] : squares[0];
    }
    if constexpr (SQUARES) a.squares[row] = squares[0];
    C high, low;
    base2(lse, &high, &low);
    if (!a.flat || a.branch_softmax || a.dlse.data) stats_place(a, row, &b, &n, &h);
    if (a.lse_all) a.lse_all[row] = (double)high + (double)low;
    for (int g = 0; g < (a.per_branch ? a.branches : 1); g++) {
        if (a.branch_softmax) {
            const int64_t *s = a.branch_lse.stride;
            base2(((const C *)a.branch_lse.data)[g * s[0] + b * s[1] + n * s[2] + h * s[3]], &high, &low);
        }
        ((C *)a.lse2)[g * a.rows + row] = high;
        if (a.lse2_low) ((C *)a.lse2_low)[g * a.rows + row] = low;
        if (a.per_branch) {
            ((C *)a.delta)[g * a.rows + row] = 0;
            continue;
        }
        C gl = a.dlse.data
                   ? ((const C *)a.dlse.data)[b * a.dlse.stride[0] + n * a.dlse.stride[1] + h * a.dlse.stride[2]]
                   : C(0);
        ((C *)a.delta)[row] = sum - gl;
        if (a.delta_low) {
            C high = sum - gl, part = high - sum; /* what the difference rounded off (Knuth 1969) */
            ((C *)a.delta_low)[row] = (sum - (high - part)) + (-gl - part);
        }
    }
}

/* do the rows of a [B, N, H, width] lie one after the other? */
static bool one_by_one(const attn_args &a, const attn_tensor &x, int64_t width)
{
    const int64_t token = a.heads * width;
    return (a.heads == 1 || x.stride[2] == width) && x.stride[1] == token &&
           (a.batch == 1 || x.stride[0] == a.n * token);
}

static int make_stats(attn_args &a, const lac_a_attend_bwd *w, bool gaps, float *squares)
{
    stats_args s = {};
    s.out = tensor_of(&w->forward.out), s.g = a.g, s.lse = tensor_of(&w->forward.lse), s.dlse = a.dlse;
    s.branch_lse = tensor_of(&w->forward.branch_lse);
    s.rows = (int64_t)a.batch * a.n * a.heads;
    s.n = a.n, s.heads = a.heads, s.head_dim = a.head_dim, s.branches = a.branches;
    s.per_branch = a.per_branch, s.branch_softmax = a.sum, s.parts = parts(w->forward.q.dtype, a.head_dim);
    s.flat = one_by_one(a, s.out, a.head_dim) && one_by_one(a, s.g, a.head_dim) && one_by_one(a, s.lse, 1);
    s.gaps = gaps, s.squares = squares;
    if (a.per_branch) s.out = s.g; /* not needed, but read beside squares */
    s.lse2 = a.lse2, s.lse2_low = a.lse2_low, s.delta = a.delta, s.delta_low = a.delta_low,
    s.lse_all = (double *)a.lse_all;
    return dispatch_float(w->forward.q.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        const unsigned blocks = blocks_for(s.rows, THREADS / 8 * (sizeof(T) == 2 ? 4 : 1));
        auto kernel = attn_stats_kernel<T, false>;
        if constexpr (sizeof(T) == 2)
            if (squares) kernel = attn_stats_kernel<T, true>;
        launch(kernel, blocks, THREADS, 0, s);
        return lac_cuda_launched("attention");
    });
}

/* ---- operators ---- */

/* f32 sums between branches for a half tensor; the tensor itself otherwise */
static size_t acc_bytes(const lac_view *v, int phases)
{
    return phases > 1 && dtype_bytes(v->dtype) == 2 ? (size_t)lac_view_numel(v) * sizeof(float) : 0;
}

/* Which kernel runs: the script's choice, else Hopper's where it can do the call (`why` NULL) and pays. */
static int choose(const lac_a_attend *f, const char *why, bool pays, bool *hopper)
{
    *hopper = false;
    if (f->kernel == LAC_KERNEL_PORTABLE || (f->kernel == LAC_KERNEL_AUTO && !pays)) return 0;
    if (why && f->kernel == LAC_KERNEL_HOPPER)
        LAC_FAIL(ARGUMENT, "attention: kernel 'hopper' cannot do this call: %s; leave the choice to kernel 'auto'",
                 why);
    *hopper = !why;
    return 0;
}

/* NULL, or options of a call that the forward on Hopper does not have together, or not with wide heads */
static const char *no_hopper_options(const attn_pair_args &a)
{
    if (a.block && hopper_options(a)) return "there is a block_mask, with other options of pairs, padding or dropout";
    if (a.head_dim <= LAC_HOPPER_WIDE) return NULL;
    if (a.block) return "head_dim is above 128, with a block_mask";
    if (a.mask) return "head_dim is above 128, with a mask";
    if (a.bias) return "head_dim is above 128, with a bias";
    if (a.slopes) return "head_dim is above 128, with alibi slopes";
    if (a.padding) return "head_dim is above 128, with padding";
    return a.p > 0 ? "head_dim is above 128, with dropout" : NULL;
}

/* without what no_hopper_options() looks at */
static lac_a_attend without_blocks(const lac_a_attend *f)
{
    lac_a_attend plain = *f;
    plain.blocks.data = NULL;
    return plain;
}

/* results, their sums between branches and counters, in memory from `at` on; lse of branches is -inf where they do not
 * reach */
static int results_of(attn_args &a, const lac_a_attend *f, char *at, size_t sums)
{
    a.out = f->out.data;
    a.acc = sums ? at : f->out.data;
    a.counter = (int *)(at + sums);
    a.lse = f->lse.data, a.branch_lse = f->branch_lse.data;
    a.branch_stride = f->branch_lse.stride[0];
    for (int g = 0; f->branch_lse.data && g < a.branches; g++) {
        lac_view one = f->branch_lse; /* contiguous by itself */
        one.data = (char *)one.data + g * one.stride[0] * dtype_bytes(one.dtype);
        one.shape[0] = 1;
        LAC_TRY(fill_lse(&one));
    }
    return 0;
}

/* q, k and v rounded to e4m3: by the kernel for Hopper or not at all */
static int attend_eight(attn_pair_args &a, const lac_a_attend *f)
{
    const lac_plan *p = f->plan;
    const char *why = f->kernel == LAC_KERNEL_PORTABLE ? "kernel 'portable' has none" : attn_hopper_fp8_fits(f);
    if (why)
        LAC_FAIL(ARGUMENT,
                 "attention: fp8 on cuda cannot do this call: %s; leave fp8 out, or move q, k and v to the cpu", why);
    hopper_eight_space eight;
    hopper_eight_place(p, &eight);
    const size_t sums = acc_bytes(&f->out, p->forward_phases), bytes = (size_t)eight.bytes;
    lac_scratch space("attention", bytes + sums + counters(a));
    if (!space.data) return LAC_E_MEMORY;
    LAC_TRY(results_of(a, f, (char *)space.data + bytes, sums));
    return attn_hopper_fp8(a, f, !covered(p) || p->shift < 0, (char *)space.data);
}

extern "C" int lac_cuda_attend(const lac_a_attend *f)
{
    attn_pair_args a;
    bool hopper;
    const lac_plan *p = f->plan;
    LAC_TRY(args_of(a, f));
    if (f->fp8) return attend_eight(a, f);
    if (attn_few_fits(f)) return attn_few_forward(a, f);
    const lac_a_attend plain = without_blocks(f);
    const char *why = attn_hopper_forward_fits(&plain);
    if (!why) why = no_hopper_options(a);
    LAC_TRY(choose(f, why, lac_plan_hopper_pays(p, a.block), &hopper));
    const bool gaps = !covered(p) || p->shift < 0;
    if (gaps && !hopper) {
        LAC_TRY(clear(&f->out));
        LAC_TRY(fill_lse(&f->lse));
    }
    size_t sums = acc_bytes(&f->out, p->forward_phases);
    const size_t ends = sums + counters(a);
    lac_scratch space("attention", ends + (hopper ? attn_hopper_ends_bytes(a) : 0));
    if (!space.data) return LAC_E_MEMORY;
    LAC_TRY(results_of(a, f, (char *)space.data, sums));
    if (hopper) {
        const hopper_kept *padding;
        LAC_TRY(attn_hopper_ends(a, (int *)((char *)space.data + ends), &padding));
        return attn_hopper_forward(a, f, gaps, padding);
    }
    if (parts(f->q.dtype, a.head_dim))
        return group_parts(a, f) ? attn_hopper_parts_forward(a, p) : attn_forward_parts(a, p);
    if (exact(f->q.dtype)) return attn_forward_exact(a, p, f->q.dtype);
    return paired(f) ? attn_pairs_forward_tensor(a, p, f->q.dtype) : attn_forward_tensor(a, p, f->q.dtype);
}

/* the passes over keys and over query rows */
static int keys_pass(attn_pair_args &a, const lac_a_attend *f)
{
    int dtype = f->q.dtype;
    if (parts(dtype, a.head_dim))
        return group_parts(a, f) ? attn_hopper_parts_keys(a, f->plan) : attn_keys_parts(a, f->plan);
    if (exact(dtype)) return attn_keys_exact(a, f->plan, dtype);
    return paired(f) ? attn_pairs_keys_tensor(a, f->plan, dtype) : attn_keys_tensor(a, f->plan, dtype);
}
static int queries_pass(attn_pair_args &a, const lac_a_attend *f)
{
    int dtype = f->q.dtype;
    if (parts(dtype, a.head_dim))
        return group_parts(a, f) ? attn_hopper_parts_queries(a, f->plan) : attn_queries_parts(a, f->plan);
    if (exact(dtype)) return attn_queries_exact(a, f->plan, dtype);
    return paired(f) ? attn_pairs_queries_tensor(a, f->plan, dtype) : attn_queries_tensor(a, f->plan, dtype);
}

/* list, sums: of one pass, or NULL; padding: attn_hopper_ends(); gaps: may there be rows that no branch reaches? */
static int run_backward(attn_pair_args &a, const lac_a_attend_bwd *w, char *dq_acc, char *dk_acc, char *dv_acc,
                        void *list, void *sums, bool joint, const hopper_kept *padding, bool gaps)
{
    const lac_a_attend *f = &w->forward;
    LAC_TRY(make_stats(a, w, gaps || f->plan->shift < 0, list && a.block ? (float *)w->dq.data : NULL));
    if (a.per_branch && (!list || joint || hopper_options(a) || a.block)) {
        a.deltas = 1;
        LAC_TRY(queries_pass(a, f));
        a.deltas = 0;
    }
    if (list)
        return attn_hopper_backward(a, w, joint, list, sums, dk_acc, dv_acc, padding, gaps && attn_hopper_zeros(a));
    a.out = w->dk.data, a.acc = dk_acc, a.out2 = w->dv.data, a.acc2 = dv_acc;
    LAC_TRY(keys_pass(a, f));
    a.out = w->dq.data, a.acc = dq_acc;
    return queries_pass(a, f);
}

extern "C" int lac_cuda_attend_bwd(const lac_a_attend_bwd *w)
{
    attn_pair_args a;
    const lac_a_attend *f = &w->forward;
    const lac_plan *p = f->plan;
    LAC_TRY(args_of(a, f));
    a.g = tensor_of(&w->dout);
    a.dlse = tensor_of(&w->dlse);
    a.dbias = w->dbias.data;
    copy_strides(a.dbias_stride, &w->dbias);
    a.per_branch = lac_plan_branch_delta(p);
    bool hopper;
    LAC_TRY(choose(f, attn_hopper_backward_fits(w), lac_plan_one_pass(p), &hopper));
    const bool joint = !hopper && attn_joint_fits(w), once = hopper || joint; /* once: one pass */
    const bool gaps = !covered(p);
    if (!once && (gaps || p->shift < 0)) LAC_TRY(clear(&w->dq));
    if (gaps && !(once && attn_hopper_zeros(a))) {
        LAC_TRY(clear(&w->dk));
        LAC_TRY(clear(&w->dv));
    }
    size_t c = f->q.dtype == LAC_F64 ? 8 : 4, rows = (size_t)a.batch * (size_t)a.n * (size_t)a.heads;
    size_t stats = rows * (size_t)(a.per_branch ? a.branches : 1) * c;
    size_t all = a.sum && w->dlse.data ? (rows + 1) / 2 * 2 * sizeof(double) : 0, list = 0, sums = 0;
    size_t qs = once ? 0 : acc_bytes(&w->dq, p->forward_phases);
    size_t ks = once ? (size_t)lac_plan_sum_bytes(p) / 2 : acc_bytes(&w->dk, p->backward_phases);
    if (once) list = (attn_hopper_backward_bytes(p, joint, a.block, &sums) + 127) / 128 * 128;
    stats = (stats + 15) / 16 * 16;
    ks = (ks + 15) / 16 * 16; /* in one pass there may be an odd number of bytes, and floats lie behind them */
    lac_scratch dq_sums("attention", sums), space("attention", list + all + qs + 2 * ks + 4 * stats + counters(a) +
                                                                   (hopper ? attn_hopper_ends_bytes(a) : 0));
    if (!dq_sums.data || !space.data) return LAC_E_MEMORY;
    char *at = (char *)space.data + list;
    if (all) a.lse_all = (double *)at;
    at += all;
    char *dq_acc = qs ? at : (char *)w->dq.data, *dk_acc = (char *)w->dk.data, *dv_acc = (char *)w->dv.data;
    if (ks) dk_acc = at + qs, dv_acc = dk_acc + ks;
    else if (once) dk_acc = (char *)w->dq.data, dv_acc = dk_acc + lac_view_numel(&w->dk); /* attn_sums.cuh */
    at += qs + 2 * ks;
    a.lse2 = at, a.lse2_low = at + stats, a.delta = at + 2 * stats;
    if (!a.per_branch) a.delta_low = at + 3 * stats;
    a.counter = (int *)(at + 4 * stats);
    const hopper_kept *padding = NULL;
    if (hopper) LAC_TRY(attn_hopper_ends(a, (int *)(at + 4 * stats + counters(a)), &padding));
    return run_backward(a, w, dq_acc, dk_acc, dv_acc, once ? space.data : NULL, dq_sums.data, joint, padding, gaps);
}
