/* scatter.cu: writing and combining elements at indexed places on CUDA: scatter and index_put.
 *
 * (destination, position) pairs are sorted stably; the first of each run takes its run in the order of positions, in
 * double (or int64_t), and writes the destination once, rounded once. So "the last one wins" means what it says and
 * sums do not depend on timing; atomics promise neither. A destination that receives very many sources is combined by
 * one thread: correct, and slow only there. An index outside its axis writes nothing and leaves a note (backend.cu).
 */
#include "lists.cuh"

static __device__ __forceinline__ void move_element(int bytes, char *to, const char *from)
{
    if (bytes == 8) *(uint64_t *)to = *(const uint64_t *)from;
    else if (bytes == 4) *(uint32_t *)to = *(const uint32_t *)from;
    else if (bytes == 2) *(uint16_t *)to = *(const uint16_t *)from;
    else *to = *from;
}

/* sources in order into one place: dst (mode) src[0], src[1], ... */
template <class C> struct combined {
    C sum;
    int64_t count;
    int mode;
    bool self;
    __device__ void add(C v)
    {
        if (count++ == 0 && !self) sum = v;
        else if (mode == LAC_SCATTER_MAX) sum = sum != sum || sum > v ? sum : v; /* NaN wins */
        else if (mode == LAC_SCATTER_MIN) sum = sum != sum || sum < v ? sum : v;
        else sum = F_add(sum, v);
    }
    __device__ C value() const
    {
        if constexpr (std::is_same_v<C, double>)
            if (mode == LAC_SCATTER_MEAN) return sum / (double)(count + self);
        return sum;
    }
};

/* ---- scatter ---- */

struct scatter_args {
    index_reader index;
    view_walk src, dst;
    int64_t n, lines, after; /* lines: size of the index along the axis; after: of the axes behind it */
    int mode, dtype, bytes;
    bool self;
};

__global__ void __launch_bounds__(THREADS)
    scatter_keys(scatter_args a, uint64_t *keys, int64_t *values, lac_cuda_reporter bad)
{
    EACH(t, a.n)
    {
        int64_t i = a.index.at(t), before = t / (a.lines * a.after), behind = t % a.after;
        bool inside = i >= 0 && i < bad.size;
        if (!inside) bad.report(t, i);
        keys[t] = inside ? (uint64_t)((before * bad.size + i) * a.after + behind) : ~0ull;
        values[t] = t;
    }
}

__global__ void __launch_bounds__(THREADS)
    scatter_store(scatter_args a, const uint64_t *keys, const int64_t *values, char *dst, const char *src)
{
    EACH(t, a.n)
    {
        uint64_t key = keys[t];
        if (key == ~0ull || (t > 0 && keys[t - 1] == key)) continue;
        char *to = dst + a.dst.offset((int64_t)key) * a.bytes;
        int64_t end = t + 1;
        while (end < a.n && keys[end] == key) end++;
        if (a.mode == LAC_SCATTER_SET) {
            move_element(a.bytes, to, src + a.src.offset(values[end - 1]) * a.bytes);
        } else if (a.dtype <= LAC_BF16) {
            combined<double> c = {load_double(a.dtype, to), 0, a.mode, a.self};
            for (int64_t k = t; k < end; k++) c.add(load_double(a.dtype, src + a.src.offset(values[k]) * a.bytes));
            store_double(a.dtype, to, c.value());
        } else {
            combined<int64_t> c = {load_element<int64_t>(a.dtype, to), 0, a.mode, a.self};
            for (int64_t k = t; k < end; k++)
                c.add(load_element<int64_t>(a.dtype, src + a.src.offset(values[k]) * a.bytes));
            store_element<int64_t>(a.dtype, to, c.value());
        }
    }
}

extern "C" int lac_cuda_scatter(const lac_a_scatter *a)
{
    const char *op = "scatter";
    scatter_args s = {reader_of(&a->index),
                      walk_axes(&a->src, 0, a->src.ndim),
                      walk_axes(&a->dst, 0, a->dst.ndim),
                      numel(&a->index),
                      a->index.shape[a->dim],
                      1,
                      a->mode,
                      a->dst.dtype,
                      (int)dtype_bytes(a->dst.dtype),
                      a->self};
    for (int d = a->dim + 1; d < a->index.ndim; d++) s.after *= a->index.shape[d];
    if (s.n == 0) return 0;
    pair_list list(op, s.n);
    if (!list.space.data) return LAC_E_MEMORY;
    each(scatter_keys, s.n, s, list.keys, list.values, lac_cuda_reporter_for("scatter: index", a->dst.shape[a->dim]));
    LAC_TRY(lac_cuda_launched(op));
    LAC_TRY(lac_cuda_sort_pairs(op, &list, 64));
    each(scatter_store, s.n, s, list.sorted_keys, list.sorted, (char *)a->dst.data, (const char *)a->src.data);
    return lac_cuda_launched(op);
}

/* ---- index_put: whole slices ---- */

struct put_args {
    index_reader index;
    view_walk outer_dst, outer_src, inner_dst, inner_src;
    int64_t n, inner, dst_step, src_step;
    int mode, dtype, bytes;
    double alpha;
};

__global__ void __launch_bounds__(THREADS)
    put_keys(index_reader index, int64_t n, uint64_t *keys, int64_t *values, lac_cuda_reporter bad)
{
    EACH(t, n)
    {
        int64_t i = index.at(t);
        bool inside = i >= 0 && i < bad.size;
        if (!inside) bad.report(t, i);
        keys[t] = inside ? (uint64_t)i : ~0ull;
        values[t] = t;
    }
}

/* block (i, outer): if sorted pair i is the first of its run, the run's slices into its row */
__global__ void __launch_bounds__(THREADS)
    put_store(put_args a, int64_t outers, const uint64_t *keys, const int64_t *values, char *dst, const char *src)
{
    previous_done();
    uint64_t key = keys[blockIdx.x];
    int64_t first = blockIdx.x, end = first + 1;
    if (key == ~0ull || (first > 0 && keys[first - 1] == key)) return;
    while (end < a.n && keys[end] == key) end++;
    for (int64_t o = blockIdx.y; o < outers; o += gridDim.y) {
        int64_t to_row = a.outer_dst.offset(o) + (int64_t)key * a.dst_step, from_row = a.outer_src.offset(o);
        for (int64_t e = threadIdx.x; e < a.inner; e += THREADS) {
            char *to = dst + (to_row + a.inner_dst.offset(e)) * a.bytes;
            int64_t from = from_row + a.inner_src.offset(e);
            auto at = [&](int64_t k) { return src + (from + values[k] * a.src_step) * a.bytes; };
            if (a.mode == LAC_SCATTER_SET) {
                move_element(a.bytes, to, at(end - 1));
            } else if (a.dtype <= LAC_BF16) {
                double s = load_double(a.dtype, to);
                for (int64_t k = first; k < end; k++) s += a.alpha * load_double(a.dtype, at(k));
                store_double(a.dtype, to, s);
            } else {
                int64_t s = load_element<int64_t>(a.dtype, to), alpha = (int64_t)a.alpha;
                for (int64_t k = first; k < end; k++) s = F_add(s, F_mul(alpha, load_element<int64_t>(a.dtype, at(k))));
                store_element<int64_t>(a.dtype, to, s);
            }
        }
    }
}

extern "C" int lac_cuda_index_put(const lac_a_index_put *a)
{
    const char *op = "index_put";
    int nd = a->dst.ndim;
    put_args p = {reader_of(&a->index),
                  walk_axes(&a->dst, 0, a->dim),
                  walk_axes(&a->src, 0, a->dim),
                  walk_axes(&a->dst, a->dim + 1, nd),
                  walk_axes(&a->src, a->dim + 1, nd),
                  numel(&a->index),
                  1,
                  a->dst.stride[a->dim],
                  a->src.stride[a->dim],
                  a->mode,
                  a->dst.dtype,
                  (int)dtype_bytes(a->dst.dtype),
                  a->alpha};
    int64_t outers = 1;
    for (int d = 0; d < a->dim; d++) outers *= a->dst.shape[d];
    for (int d = a->dim + 1; d < nd; d++) p.inner *= a->dst.shape[d];
    if (p.n == 0) return 0;
    pair_list list(op, p.n);
    if (!list.space.data) return LAC_E_MEMORY;
    each(put_keys, p.n, p.index, p.n, list.keys, list.values,
         lac_cuda_reporter_for("index_put: index", a->dst.shape[a->dim]));
    LAC_TRY(lac_cuda_launched(op));
    if (outers * p.inner == 0) return 0;
    LAC_TRY(lac_cuda_sort_pairs(op, &list, 64));
    dim3 grid((unsigned)p.n, (unsigned)(outers < 65535 ? outers : 65535));
    launch(put_store, grid, THREADS, 0, p, outers, list.sorted_keys, list.sorted, (char *)a->dst.data,
           (const char *)a->src.data);
    return lac_cuda_launched(op);
}
