/* scatter.cu: writing and combining elements at indexed places on CUDA: scatter and index_put.
 *
 * (destination, position) pairs are sorted stably; the first of each run takes its run in the order of positions, in
 * double (or int64_t), and writes the destination once, rounded once. So "the last one wins" means what it says and
 * sums do not depend on timing; atomics promise neither. A destination that receives very many sources is combined by
 * one thread, which has some on their way at a time: correct, and slow only there. An index outside its axis writes
 * nothing and leaves a note (backend.cu).
 */
#include "lists.cuh"

/* what sources of a type are combined in */
template <class T> using whole_t = std::conditional_t<is_float_v<T>, double, int64_t>;
template <class T> __device__ __forceinline__ whole_t<T> to_whole(T x) { return (whole_t<T>)to_compute(x); }
template <class T> __device__ __forceinline__ void store_whole(int dtype, T *to, whole_t<T> v)
{
    if constexpr (is_float_v<T>) store_double(dtype, (char *)to, v);
    else store_element<int64_t>(dtype, (char *)to, v);
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
    int mode, dtype;
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

template <class T>
__global__ void __launch_bounds__(THREADS)
    scatter_store(scatter_args a, const uint64_t *keys, const int64_t *values, T *dst, const T *src)
{
    EACH(t, a.n)
    {
        uint64_t key = keys[t];
        if (key == ~0ull || (t > 0 && keys[t - 1] == key)) continue;
        T *to = dst + a.dst.offset((int64_t)key);
        const int64_t end = run_end(keys, t, a.n);
        auto source = [&](int64_t k) { return src[a.src.offset(values[k])]; };
        if (a.mode == LAC_SCATTER_SET) {
            *to = source(end - 1);
        } else {
            combined<whole_t<T>> c = {to_whole(*to), 0, a.mode, a.self};
            take_run(t, end, source, [&](T x) { c.add(to_whole(x)); });
            store_whole(a.dtype, to, c.value());
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
                      a->self};
    for (int d = a->dim + 1; d < a->index.ndim; d++) s.after *= a->index.shape[d];
    if (s.n == 0) return 0;
    pair_list list(op, s.n);
    if (!list.space.data) return LAC_E_MEMORY;
    each(scatter_keys, s.n, s, list.keys, list.values, lac_cuda_reporter_for("scatter: index", a->dst.shape[a->dim]));
    LAC_TRY(lac_cuda_launched(op));
    LAC_TRY(lac_cuda_sort_pairs(op, &list, 64));
    return dispatch_any(s.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        each(scatter_store<T>, s.n, s, list.sorted_keys, list.sorted, (T *)a->dst.data, (const T *)a->src.data);
        return lac_cuda_launched(op);
    });
}

/* ---- index_put: whole slices ---- */

struct put_args {
    index_reader index;
    view_walk outer_dst, outer_src, inner_dst, inner_src;
    int64_t n, inner, dst_step, src_step;
    int mode, dtype;
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
template <class T>
__global__ void __launch_bounds__(THREADS)
    put_store(put_args a, int64_t outers, const uint64_t *keys, const int64_t *values, T *dst, const T *src)
{
    previous_done();
    uint64_t key = keys[blockIdx.x];
    const int64_t first = blockIdx.x;
    if (key == ~0ull || (first > 0 && keys[first - 1] == key)) return;
    const int64_t end = run_end(keys, first, a.n);
    for (int64_t o = blockIdx.y; o < outers; o += gridDim.y) {
        int64_t to_row = a.outer_dst.offset(o) + (int64_t)key * a.dst_step, from_row = a.outer_src.offset(o);
        for (int64_t e = threadIdx.x; e < a.inner; e += THREADS) {
            T *to = dst + to_row + a.inner_dst.offset(e);
            const int64_t from = from_row + a.inner_src.offset(e);
            auto source = [&](int64_t k) { return src[from + values[k] * a.src_step]; };
            if (a.mode == LAC_SCATTER_SET) {
                *to = source(end - 1);
                continue;
            }
            whole_t<T> s = to_whole(*to), alpha = (whole_t<T>)a.alpha;
            take_run(first, end, source, [&](T x) {
                if constexpr (is_float_v<T>) s += alpha * to_whole(x);
                else s = F_add(s, F_mul(alpha, to_whole(x)));
            });
            store_whole(a.dtype, to, s);
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
    return dispatch_any(p.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        launch(put_store<T>, grid, THREADS, 0, p, outers, list.sorted_keys, list.sorted, (T *)a->dst.data,
               (const T *)a->src.data);
        return lac_cuda_launched(op);
    });
}
