/* draw.cu: multinomial on CUDA: the draws of c/cpu/random.c, from the same Philox counters.
 *
 * With replacement a block makes the running sum of its row (in double, in a fixed order) and every sample looks up its
 * draw. Without, every element has a key, -log(1 - u) / weight, and the smallest keys of each row are taken in order:
 * keys are positive, so their bits sort as they do. Weights that cannot be drawn from are an error that names the row;
 * so the host waits for the rows' check, as a sampler waits for its tokens anyway.
 */
#include "lists.cuh"
#include "rng.h"

struct draw_args {
    view_walk weights;
    int dtype, bytes;
    int64_t rows, n, samples;
    bool replacement;
    uint64_t seed, offset;
    __device__ double unit(int64_t i) const
    {
        uint32_t words[4];
        lac_philox(seed, offset, (uint64_t)i / 2, words);
        return lac_rng_unit53(i % 2 ? lac_rng_pair(words[2], words[3]) : lac_rng_pair(words[0], words[1]));
    }
};

/* A block per row: sums[i] = w[0] + ... + w[i], last[row]: the last weight above 0; checks them. */
__global__ void __launch_bounds__(THREADS)
    draw_sums(draw_args a, const char *w, double *sums, int64_t *last, unsigned long long *bad)
{
    __shared__ double warp_sums[THREADS / 32];
    __shared__ long long space[THREADS / 32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    previous_done();
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        double before = 0;
        long long at = -1, positive = 0, wrong = 0;
        for (int64_t base = 0; base < a.n; base += THREADS) {
            int64_t i = base + threadIdx.x;
            double v = i < a.n ? load_double(a.dtype, w + a.weights.offset(row * a.n + i) * a.bytes) : 0, s = v;
            wrong += !(v >= 0);
            positive += v > 0;
            at = v > 0 ? i : at;
            for (int o = 1; o < 32; o *= 2) {
                double left = __shfl_up_sync(0xffffffffu, s, o);
                if (lane >= o) s += left;
            }
            if (lane == 31) warp_sums[warp] = s;
            __syncthreads();
            double shift = before, all = before;
            for (int k = 0; k < THREADS / 32; k++) {
                if (k < warp) shift += warp_sums[k];
                all += warp_sums[k];
            }
            if (i < a.n) sums[row * a.n + i] = shift + s;
            before = all;
            __syncthreads();
        }
        at = block_max(at, space);
        positive = block_sum(positive, space);
        wrong = block_sum(wrong, space);
        bool fine = !wrong && before > 0 && isfinite(before) && (a.replacement || positive >= a.samples);
        if (threadIdx.x == 0) {
            last[row] = at;
            if (!fine) atomicMin(bad, (unsigned long long)row);
        }
    }
}

/* the first running sum above the draw; the last weight above 0 if rounding leaves none */
__global__ void __launch_bounds__(THREADS)
    draw_lookup(draw_args a, const double *sums, const int64_t *last, int64_t *out)
{
    EACH(t, a.rows * a.samples)
    {
        int64_t row = t / a.samples, low = 0, count = last[row];
        const double *s = sums + row * a.n;
        double target = a.unit(t) * s[a.n - 1];
        while (count > 0) {
            int64_t half = count / 2;
            bool up = s[low + half] <= target;
            low = up ? low + half + 1 : low;
            count = up ? count - half - 1 : half;
        }
        out[t] = low;
    }
}

__global__ void __launch_bounds__(THREADS) draw_keys(draw_args a, const char *w, uint64_t *keys, int64_t *values)
{
    EACH(t, a.rows * a.n)
    {
        double v = load_double(a.dtype, w + a.weights.offset(t) * a.bytes);
        keys[t] = v > 0 ? (uint64_t)__double_as_longlong(-log1p(-a.unit(t)) / v) & ~(1ull << 63) : ~0ull;
        values[t] = t;
    }
}

__global__ void __launch_bounds__(THREADS)
    draw_rows(int64_t n, int64_t total, const int64_t *sorted, uint64_t *keys, int64_t *values)
{
    EACH(t, total)
    {
        keys[t] = (uint64_t)(sorted[t] / n);
        values[t] = sorted[t];
    }
}

__global__ void __launch_bounds__(THREADS) draw_store(draw_args a, const int64_t *sorted, int64_t *out)
{
    EACH(t, a.rows * a.samples)
    {
        int64_t row = t / a.samples;
        out[t] = sorted[row * a.n + t % a.samples] - row * a.n;
    }
}

static int draw_race(const draw_args &a, const char *w, int64_t *out)
{
    const char *op = "multinomial";
    pair_list list(op, a.rows * a.n);
    if (!list.space.data) return LAC_E_MEMORY;
    each(draw_keys, list.n, a, w, list.keys, list.values);
    LAC_TRY(lac_cuda_launched(op));
    LAC_TRY(lac_cuda_sort_pairs(op, &list, 64));
    if (a.rows > 1) {
        each(draw_rows, list.n, a.n, list.n, list.sorted, list.keys, list.values);
        LAC_TRY(lac_cuda_launched(op));
        LAC_TRY(lac_cuda_sort_pairs(op, &list, bits_of((uint64_t)a.rows - 1)));
    }
    each(draw_store, a.rows * a.samples, a, list.sorted, out);
    return lac_cuda_launched(op);
}

extern "C" int lac_cuda_multinomial(const lac_a_multinomial *a)
{
    const char *op = "multinomial";
    const lac_view *w = &a->weights;
    draw_args d = {walk_axes(w, 0, w->ndim), w->dtype, (int)dtype_bytes(w->dtype)};
    d.n = w->shape[w->ndim - 1];
    d.rows = w->ndim == 1 ? 1 : w->shape[0];
    d.samples = a->out.shape[a->out.ndim - 1];
    d.replacement = a->replacement;
    d.seed = a->seed;
    d.offset = a->offset;
    if (d.rows == 0 || d.samples == 0) return 0;
    lac_scratch space(op, (size_t)(d.rows * d.n + d.rows + 1) * 8);
    if (!space.data) return LAC_E_MEMORY;
    double *sums = (double *)space.data;
    int64_t *last = (int64_t *)(sums + d.rows * d.n), *bad = last + d.rows, first;
    CUDA_TRY(op, lac_cuda_fill_bytes(bad, 0xff, 8));
    launch(draw_sums, blocks_filling(d.rows, 1, 16), THREADS, 0, d, (const char *)w->data, sums, last,
           (unsigned long long *)bad);
    LAC_TRY(lac_cuda_launched(op));
    LAC_TRY(lac_cuda_read(op, &first, bad, 8));
    if (first >= 0)
        LAC_FAIL(ARGUMENT, "%s: the weights of row %lld must be finite and not negative, with %lld above 0", op,
                 (long long)first + 1, (long long)(a->replacement ? 1 : d.samples));
    if (!a->replacement) return draw_race(d, (const char *)w->data, (int64_t *)a->out.data);
    each(draw_lookup, d.rows * d.samples, d, sums, last, (int64_t *)a->out.data);
    return lac_cuda_launched(op);
}
