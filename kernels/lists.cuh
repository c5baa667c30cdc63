/* lists.cuh: what the operators share whose work is lists of places: lines along an axis, index tensors, sorting.
 *
 * Sums over what shares a destination, sort, topk, unique and draws without replacement all rest on one stable radix
 * sort of (key, position) pairs, CUB's, compiled once in sort.cu. Stability makes results unique: the same on every
 * device, and the same bits in every run. Atomics would be faster where few places collide and would depend on timing.
 */
#ifndef LAC_CUDA_LISTS_CUH
#define LAC_CUDA_LISTS_CUH
#include "elem.cuh"

inline int64_t numel(const lac_view *v)
{
    int64_t n = 1;
    for (int d = 0; d < v->ndim; d++) n *= v->shape[d];
    return n;
}

/* element i of line t along an axis */
struct axis_lines {
    view_walk outer; /* the other axes */
    int64_t n, step;
    __device__ __forceinline__ int64_t at(int64_t line, int64_t i) const { return outer.offset(line) + i * step; }
};
inline axis_lines lines_along(const lac_view *v, int dim)
{
    lac_view rest = *v;
    rest.ndim = 0;
    for (int d = 0; d < v->ndim; d++)
        if (d != dim) rest.shape[rest.ndim] = v->shape[d], rest.stride[rest.ndim++] = v->stride[d];
    bool scalar = v->ndim == 0;
    return {walk_axes(&rest, 0, rest.ndim), scalar ? 1 : v->shape[dim], scalar ? 0 : v->stride[dim]};
}

struct index_reader {
    view_walk walk;
    const void *data;
    bool wide;
    __device__ __forceinline__ int64_t at(int64_t i) const
    {
        int64_t o = walk.offset(i);
        return wide ? ((const int64_t *)data)[o] : ((const int32_t *)data)[o];
    }
};
inline index_reader reader_of(const lac_view *v) { return {walk_axes(v, 0, v->ndim), v->data, v->dtype == LAC_I64}; }

/* pairs to fill (keys, values), and where they are once sorted */
struct pair_list {
    int64_t n;
    lac_scratch space;
    uint64_t *keys, *sorted_keys;
    int64_t *values, *sorted;
    pair_list(const char *op, int64_t count) : n(count), space(op, (size_t)(count ? count : 1) * 32)
    {
        keys = (uint64_t *)space.data;
        sorted_keys = keys + n;
        values = (int64_t *)(keys + 2 * n);
        sorted = values + n;
    }
};
/* stable, by the lowest `bits` bits of the keys */
int lac_cuda_sort_pairs(const char *op, pair_list *list, int bits);
/* out[i] = in[0] + ... + in[i] */
int lac_cuda_running_sum(const char *op, const int64_t *in, int64_t *out, int64_t n);
inline int bits_of(uint64_t most)
{
    int bits = 1;
    while (bits < 64 && most >> bits) bits++;
    return bits;
}

/* Where the run of equal keys that begins at `first` ends. Short ones take few looks, long ones not many more. */
static __device__ __forceinline__ int64_t run_end(const uint64_t *keys, int64_t first, int64_t n)
{
    const uint64_t key = keys[first];
    int64_t low = first, step = 1; /* keys[low] is one of the run */
    for (; low + step < n && keys[low + step] == key; step *= 2) low += step;
    int64_t end = low + step < n ? low + step : n; /* is not, or there is none */
    while (end - low > 1) {
        const int64_t middle = low + (end - low) / 2;
        if (keys[middle] == key) low = middle;
        else end = middle;
    }
    return end;
}
/* add(load(first)), ..., add(load(end - 1)), in this order: a long run waits once for some loads, not for each */
template <class L, class A>
__device__ __forceinline__ void take_run(int64_t first, int64_t end, const L &load, const A &add)
{
    constexpr int AT_ONCE = 16;
    for (; end - first >= AT_ONCE; first += AT_ONCE) {
        decltype(load(first)) x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) x[i] = load(first + i);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) add(x[i]);
    }
#pragma unroll 1
    for (; first < end; first++) add(load(first));
}

/* a floating-point element of any dtype */
static __device__ __forceinline__ double load_double(int dtype, const char *p)
{
    return dtype == LAC_F64 ? *(const double *)p : (double)load_element<float>(dtype, p);
}
/* rounded once: the low bit of a float in between is set where anything was lost */
static __device__ __forceinline__ void store_double(int dtype, char *p, double v)
{
    if (dtype == LAC_F64) {
        *(double *)p = v;
    } else if (dtype == LAC_F32) {
        *(float *)p = (float)v;
    } else {
        float f = __double2float_rz(v);
        if ((double)f != v && v == v && !isinf(f)) f = __uint_as_float(__float_as_uint(f) | 1u);
        store_element<float>(dtype, p, f);
    }
}

/* threads that loop over n things, once what the kernel reads is there; and their launch */
#define EACH(i, n)                                                                                                     \
    previous_done();                                                                                                   \
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < (n); i += (int64_t)gridDim.x * THREADS)
template <class K, class... A> void each(K *kernel, int64_t n, const A &...given)
{
    launch(kernel, blocks_filling(n, THREADS, 16), THREADS, 0, given...);
}

#endif
