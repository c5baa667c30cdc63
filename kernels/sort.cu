/* sort.cu: sort, topk, searchsorted, runs (what `unique` is made of) and nonzero on CUDA, and the sort of pairs.
 *
 * Elements become unsigned keys whose order is that of op_sort.c (-0 is 0, NaN the largest and one; complemented to
 * descend). All lines are sorted at once: a 32-bit key stands below the number of its line in one 64-bit word, 64-bit
 * keys are sorted first and then, stably, by line. Values are read from the input again through the positions, so
 * their bits are the input's. topk is the head of the sort: simple, and linear in n like a selection. Runs and nonzero
 * mark elements, number the marks by a running sum, and the host waits for their count, which is a shape.
 */
#include "lists.cuh"
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

struct sort_call {
    void *work;
    size_t bytes;
    uint64_t *keys, *sorted_keys;
    int64_t *values, *sorted, n;
    int bits;
};
static int run_sort(const void *data, cudaStream_t to)
{
    sort_call c = *(const sort_call *)data;
    return cub::DeviceRadixSort::SortPairs(c.work, c.bytes, c.keys, c.sorted_keys, c.values, c.sorted, c.n, 0, c.bits,
                                           to);
}

int lac_cuda_sort_pairs(const char *op, pair_list *p, int bits)
{
    size_t bytes = 0;
    if (!p->space.data) return LAC_E_MEMORY;
    CUDA_TRY(op, cub::DeviceRadixSort::SortPairs(NULL, bytes, p->keys, p->sorted_keys, p->values, p->sorted, p->n, 0,
                                                 bits)); /* only tells how many */
    lac_scratch work(op, bytes + 1);
    if (!work.data) return LAC_E_MEMORY;
    const sort_call c = {work.data, bytes, p->keys, p->sorted_keys, p->values, p->sorted, p->n, bits};
    CUDA_TRY(op, (cudaError_t)lac_cuda_later(run_sort, &c, sizeof c));
    return lac_cuda_launched(op);
}

int lac_cuda_running_sum(const char *op, const int64_t *in, int64_t *out, int64_t n)
{
    size_t bytes = 0;
    CUDA_TRY(op, cub::DeviceScan::InclusiveSum(NULL, bytes, in, out, n, lac_cuda_stream()));
    lac_scratch work(op, bytes + 1);
    if (!work.data) return LAC_E_MEMORY;
    CUDA_TRY(op, cub::DeviceScan::InclusiveSum(work.data, bytes, in, out, n, lac_cuda_stream()));
    return lac_cuda_launched(op);
}

/* ---- keys ---- */

static __device__ __forceinline__ uint64_t key_of(int dtype, const char *p)
{
    if (dtype == LAC_F64) {
        double d = *(const double *)p;
        uint64_t b = (uint64_t)__double_as_longlong(d);
        if (d != d) return ~0ull;
        return d == 0 ? 1ull << 63 : b ^ ((uint64_t)((int64_t)b >> 63) | 1ull << 63);
    }
    if (dtype == LAC_I64) return *(const uint64_t *)p ^ 1ull << 63;
    if (dtype <= LAC_BF16) {
        float f = load_element<float>(dtype, p);
        uint32_t b = __float_as_uint(f);
        if (f != f) return 0xffffffffu;
        return f == 0 ? 1u << 31 : b ^ ((uint32_t)((int32_t)b >> 31) | 1u << 31);
    }
    return (uint32_t)load_element<int64_t>(dtype, p) ^ 1u << 31;
}
static bool is_wide(int dtype) { return dtype == LAC_F64 || dtype == LAC_I64; }

/* ---- sort ---- */

struct sort_args {
    axis_lines x, values, index;
    int64_t lines, k, total;
    int dtype, bytes;
    uint64_t flip;
    bool wide;
};

__global__ void __launch_bounds__(THREADS) sort_keys(sort_args a, const char *x, uint64_t *keys, int64_t *values)
{
    EACH(t, a.total)
    {
        int64_t line = t / a.x.n, i = t - line * a.x.n;
        uint64_t key = key_of(a.dtype, x + a.x.at(line, i) * a.bytes) ^ a.flip;
        keys[t] = a.wide ? key : (uint64_t)line << 32 | key;
        values[t] = t;
    }
}

/* the pairs in the order of their keys, to be sorted by line */
__global__ void __launch_bounds__(THREADS)
    sort_lines(int64_t n, int64_t total, const int64_t *sorted, uint64_t *keys, int64_t *values)
{
    EACH(t, total)
    {
        keys[t] = (uint64_t)(sorted[t] / n);
        values[t] = sorted[t];
    }
}

__global__ void __launch_bounds__(THREADS)
    sort_store(sort_args a, const char *x, const int64_t *sorted, char *values, int64_t *index)
{
    EACH(t, a.lines * a.k)
    {
        int64_t line = t / a.k, rank = t - line * a.k, i = sorted[line * a.x.n + rank] - line * a.x.n;
        const char *from = x + a.x.at(line, i) * a.bytes;
        char *to = values + a.values.at(line, rank) * a.bytes;
        index[a.index.at(line, rank)] = i;
        if (a.bytes == 8) *(uint64_t *)to = *(const uint64_t *)from;
        else if (a.bytes == 4) *(uint32_t *)to = *(const uint32_t *)from;
        else if (a.bytes == 2) *(uint16_t *)to = *(const uint16_t *)from;
        else *to = *from;
    }
}

static int sort_run(const char *op, const lac_a_sort *a)
{
    sort_args s = {lines_along(&a->x, a->dim), lines_along(&a->values, a->dim), lines_along(&a->index, a->dim), 1};
    s.dtype = a->x.dtype;
    s.bytes = (int)dtype_bytes(s.dtype);
    s.wide = is_wide(s.dtype);
    s.flip = !a->descending ? 0 : s.wide ? ~0ull : 0xffffffffull;
    s.total = numel(&a->x);
    s.k = s.index.n;
    if (s.total == 0 || s.k == 0) return 0;
    s.lines = s.total / s.x.n;
    if (s.lines > INT64_C(1) << 32) LAC_FAIL(SHAPE, "%s: more than 2^32 lines on cuda", op);
    int line_bits = s.lines > 1 ? bits_of((uint64_t)s.lines - 1) : 0;
    pair_list list(op, s.total);
    if (!list.space.data) return LAC_E_MEMORY;
    const char *x = (const char *)a->x.data;
    each(sort_keys, s.total, s, x, list.keys, list.values);
    LAC_TRY(lac_cuda_launched(op));
    LAC_TRY(lac_cuda_sort_pairs(op, &list, s.wide ? 64 : 32 + line_bits));
    if (s.wide && line_bits) {
        each(sort_lines, s.total, s.x.n, s.total, list.sorted, list.keys, list.values);
        LAC_TRY(lac_cuda_launched(op));
        LAC_TRY(lac_cuda_sort_pairs(op, &list, line_bits));
    }
    each(sort_store, s.lines * s.k, s, x, list.sorted, (char *)a->values.data, (int64_t *)a->index.data);
    return lac_cuda_launched(op);
}

extern "C" int lac_cuda_sort(const lac_a_sort *a) { return sort_run("sort", a); }
extern "C" int lac_cuda_topk(const lac_a_sort *a) { return sort_run("topk", a); }

/* ---- searchsorted ---- */

__global__ void __launch_bounds__(THREADS)
    search_kernel(int dtype, int bytes, bool right, axis_lines sorted, bool shared, view_walk walk, int64_t m,
                  int64_t total, const char *list, const char *values, int64_t *out)
{
    EACH(t, total)
    {
        uint64_t key = key_of(dtype, values + walk.offset(t) * bytes);
        int64_t line = shared ? 0 : t / m, low = 0, count = sorted.n;
        while (count > 0) {
            int64_t half = count / 2;
            uint64_t other = key_of(dtype, list + sorted.at(line, low + half) * bytes);
            bool up = right ? other <= key : other < key;
            low = up ? low + half + 1 : low;
            count = up ? count - half - 1 : half;
        }
        out[t] = low;
    }
}

extern "C" int lac_cuda_searchsorted(const lac_a_searchsorted *a)
{
    const lac_view *v = &a->values;
    int64_t total = numel(v), m = v->ndim ? v->shape[v->ndim - 1] : 1;
    if (total == 0) return 0;
    each(search_kernel, total, v->dtype, (int)dtype_bytes(v->dtype), a->right,
         lines_along(&a->sorted, a->sorted.ndim - 1), a->sorted.ndim == 1, walk_axes(v, 0, v->ndim), m, total,
         (const char *)a->sorted.data, (const char *)v->data, (int64_t *)a->out.data);
    return lac_cuda_launched("searchsorted");
}

/* ---- runs and nonzero ---- */

__global__ void __launch_bounds__(THREADS)
    run_marks(int dtype, int bytes, int64_t step, const char *x, int64_t n, int64_t *marks)
{
    EACH(i, n)
    {
        const char *p = x + i * step * bytes;
        marks[i] = i == 0 || key_of(dtype, p) != key_of(dtype, p - step * bytes);
    }
}

__global__ void __launch_bounds__(THREADS) run_store(index_reader order, int64_t n, const int64_t *numbers,
                                                     int64_t *inverse, int64_t *starts, lac_cuda_reporter bad)
{
    EACH(i, n)
    {
        int64_t at = order.at(i), number = numbers[i] - 1;
        if (at < 0 || at >= n) bad.report(i, at);
        else inverse[at] = number;
        if (i == 0 || numbers[i - 1] != numbers[i]) starts[number] = i;
    }
}

extern "C" int lac_cuda_runs(const lac_a_runs *a)
{
    int64_t n = a->sorted.shape[0];
    *a->count = 0;
    if (n == 0) return 0;
    lac_scratch space("runs", (size_t)n * 16);
    if (!space.data) return LAC_E_MEMORY;
    int64_t *marks = (int64_t *)space.data, *numbers = marks + n;
    int dtype = a->sorted.dtype;
    each(run_marks, n, dtype, (int)dtype_bytes(dtype), a->sorted.stride[0], (const char *)a->sorted.data, n, marks);
    LAC_TRY(lac_cuda_launched("runs"));
    LAC_TRY(lac_cuda_running_sum("runs", marks, numbers, n));
    each(run_store, n, reader_of(&a->order), n, numbers, (int64_t *)a->inverse.data, (int64_t *)a->starts.data,
         lac_cuda_reporter_for("runs: order", n));
    LAC_TRY(lac_cuda_launched("runs"));
    return lac_cuda_read("runs", a->count, numbers + n - 1, 8);
}

__global__ void __launch_bounds__(THREADS)
    nonzero_marks(int dtype, int bytes, view_walk walk, const char *x, int64_t n, int64_t *marks)
{
    EACH(i, n)
    {
        const char *p = x + walk.offset(i) * bytes;
        marks[i] = dtype <= LAC_BF16 ? load_double(dtype, p) != 0 : load_element<int64_t>(dtype, p) != 0;
    }
}

__global__ void __launch_bounds__(THREADS)
    nonzero_store(lac_view x, int64_t n, const int64_t *marks, const int64_t *numbers, int64_t *out)
{
    EACH(i, n)
    {
        if (!marks[i]) continue;
        int64_t *row = out + (numbers[i] - 1) * x.ndim, rest = i;
        for (int d = x.ndim - 1; d >= 0; d--) {
            row[d] = d ? rest % x.shape[d] : rest;
            rest /= x.shape[d];
        }
    }
}

extern "C" int lac_cuda_nonzero(const lac_a_nonzero *a)
{
    const lac_view *x = &a->x;
    int64_t n = numel(x);
    *a->count = 0;
    if (n == 0 || (a->out.data && a->out.shape[0] == 0)) return 0;
    lac_scratch space("nonzero", (size_t)n * 16);
    if (!space.data) return LAC_E_MEMORY;
    int64_t *marks = (int64_t *)space.data, *numbers = marks + n;
    each(nonzero_marks, n, x->dtype, (int)dtype_bytes(x->dtype), walk_axes(x, 0, x->ndim), (const char *)x->data, n,
         marks);
    LAC_TRY(lac_cuda_launched("nonzero"));
    LAC_TRY(lac_cuda_running_sum("nonzero", marks, numbers, n));
    if (!a->out.data) return lac_cuda_read("nonzero", a->count, numbers + n - 1, 8);
    each(nonzero_store, n, *x, n, marks, numbers, (int64_t *)a->out.data);
    *a->count = a->out.shape[0];
    return lac_cuda_launched("nonzero");
}
