/* index.cu: index_select (the embedding), gather and their gradients on CUDA.
 *
 * Forward moves bytes, 16 at a time where rows allow it. The gradients add everything that shares a destination.
 * Atomics would make the sum depend on timing; here (destination, position) pairs are sorted stably (lists.cuh), the
 * first of each run adds up its run in the order of positions, in double, and rounds once. So the same call gives the
 * same bits, and half precision keeps what adding into bf16 would lose. A destination that receives very many rows is
 * summed by one block: correct, and slow only there. It reads 16 at a time before it adds them: index_add of 2^20 rows
 * of 64 to 16 and to 1000 rows 38.5 and 1.93 ms before, 9.5 and 1.23 with it, to 262,144 1.75 and 1.72 (H200).
 *
 * An index outside its axis reads nothing and leaves a note, which the script sees as an error at its next launch or
 * wait (backend.cu).
 */
#include "lists.cuh"

/* ---- index_select ---- */

struct select_args {
    view_walk outer, inner; /* x's axes before and after `dim` */
    index_reader index;
    int64_t n, step, inner_count, total; /* step: x's stride along dim; in units of U */
};

template <class U>
__global__ void __launch_bounds__(THREADS) select_kernel(select_args a, const U *x, U *out, lac_cuda_reporter bad)
{
    previous_done();
    for (int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x; t < a.total; t += (int64_t)gridDim.x * THREADS) {
        int64_t row = t / a.inner_count, e = t - row * a.inner_count, o = row / a.n, i = row - o * a.n;
        int64_t at = a.index.at(i);
        if (at < 0 || at >= bad.size) bad.report(i, at);
        else out[t] = x[a.outer.offset(o) + at * a.step + a.inner.offset(e)];
    }
}

/* counts strides and sizes in units of `ratio` elements, if everything allows it */
static bool scale_walk(view_walk *w, int64_t ratio)
{
    for (int d = 0; d < w->ndim; d++)
        if (w->stride[d] % ratio) return false;
    for (int d = 0; d < w->ndim; d++) w->stride[d] /= ratio;
    return true;
}

extern "C" int lac_cuda_index_select(const lac_a_index *a)
{
    int64_t n = numel(&a->index), bytes = dtype_bytes(a->x.dtype), ratio = 16 / bytes;
    lac_cuda_reporter bad = lac_cuda_reporter_for("index_select: index", a->x.shape[a->dim]);
    select_args s = {walk_axes(&a->x, 0, a->dim),
                     walk_axes(&a->x, a->dim + 1, a->x.ndim),
                     reader_of(&a->index),
                     n,
                     a->x.stride[a->dim],
                     1,
                     numel(&a->out)};
    if (s.total == 0) return 0;
    for (int d = a->dim + 1; d < a->x.ndim; d++) s.inner_count *= a->x.shape[d];
    select_args v = s;
    bool vector = s.inner.ndim == 1 && s.inner.stride[0] == 1 && s.inner_count % ratio == 0 && s.step % ratio == 0 &&
                  (uintptr_t)a->x.data % 16 == 0 && (uintptr_t)a->out.data % 16 == 0 && scale_walk(&v.outer, ratio);
    if (vector) {
        v.inner.shape[0] /= ratio;
        v.step /= ratio;
        v.inner_count /= ratio;
        v.total /= ratio;
        launch(select_kernel<uint4>, blocks_filling(v.total, THREADS, 32), THREADS, 0, v, (const uint4 *)a->x.data,
               (uint4 *)a->out.data, bad);
        return lac_cuda_launched("index_select");
    }
    return dispatch_bytes(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type U;
        launch(select_kernel<U>, blocks_filling(s.total, THREADS, 32), THREADS, 0, s, (const U *)a->x.data,
               (U *)a->out.data, bad);
        return lac_cuda_launched("index_select");
    });
}

/* ---- gather ---- */

struct gather_args {
    int ndim, dim;
    int64_t shape[LAC_MAX_DIMS], stride[LAC_MAX_DIMS]; /* out's shape, x's strides */
    index_reader index;
    int64_t total;
};

template <class U>
__global__ void __launch_bounds__(THREADS) gather_kernel(gather_args a, const U *x, U *out, lac_cuda_reporter bad)
{
    previous_done();
    for (int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x; t < a.total; t += (int64_t)gridDim.x * THREADS) {
        int64_t rest = t, o = 0, at = a.index.at(t);
        for (int d = a.ndim - 1; d >= 0; d--) {
            int64_t q = rest / a.shape[d];
            if (d != a.dim) o += (rest - q * a.shape[d]) * a.stride[d];
            rest = q;
        }
        if (at < 0 || at >= bad.size) bad.report(t, at);
        else out[t] = x[o + at * a.stride[a.dim]];
    }
}

extern "C" int lac_cuda_gather(const lac_a_index *a)
{
    gather_args g = {a->out.ndim, a->dim, {}, {}, reader_of(&a->index), numel(&a->out)};
    for (int d = 0; d < g.ndim; d++) g.shape[d] = a->out.shape[d], g.stride[d] = a->x.stride[d];
    if (g.total == 0) return 0;
    lac_cuda_reporter bad = lac_cuda_reporter_for("gather: index", a->x.shape[a->dim]);
    return dispatch_bytes(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type U;
        launch(gather_kernel<U>, blocks_filling(g.total, THREADS, 32), THREADS, 0, g, (const U *)a->x.data,
               (U *)a->out.data, bad);
        return lac_cuda_launched("gather");
    });
}

/* ---- sums by destination ---- */

/* key of element t of the index: its destination; bad ones go last, to no destination */
struct key_args {
    index_reader index;
    int64_t n, after, lines; /* lines: size of the indexed axis; 0: the key is the index itself */
};
__global__ void __launch_bounds__(THREADS)
    keys_kernel(key_args a, uint64_t *keys, int64_t *values, lac_cuda_reporter bad)
{
    EACH(t, a.n)
    {
        int64_t i = a.index.at(t), key = i;
        if (a.lines) {
            int64_t before = t / (a.lines * a.after), behind = t % a.after;
            key = (before * bad.size + i) * a.after + behind; /* position in the result */
        }
        if (i < 0 || i >= bad.size) {
            bad.report(t, i);
            key = INT64_MAX;
        }
        keys[t] = (uint64_t)key;
        values[t] = t;
    }
}

static int sort_by_key(const char *op, const key_args &a, const lac_cuda_reporter &bad, pair_list *list)
{
    if (!list->space.data) return LAC_E_MEMORY;
    each(keys_kernel, a.n, a, list->keys, list->values, bad);
    LAC_TRY(lac_cuda_launched(op));
    return lac_cuda_sort_pairs(op, list, 63);
}

struct rows_args {
    view_walk outer, index, inner; /* of g: the axes before, of and after the index */
    const uint64_t *keys;
    const int64_t *values;
    int64_t n, size, inner_count;
};

/* block (i, outer): if sorted pair i is the first of its run, the sum of the run's rows */
template <class T> __global__ void __launch_bounds__(THREADS) sum_rows(rows_args a, const T *g, T *out)
{
    previous_done();
    int64_t i = blockIdx.x, o = blockIdx.y, key = (int64_t)a.keys[i];
    if (key == INT64_MAX || (i > 0 && (int64_t)a.keys[i - 1] == key)) return;
    const int64_t end = run_end(a.keys, i, a.n);
    const T *from = g + a.outer.offset(o);
    for (int64_t e = threadIdx.x; e < a.inner_count; e += THREADS) {
        int64_t inner = a.inner.offset(e);
        double s = 0;
        take_run(
            i, end, [&](int64_t k) { return to_compute(from[a.index.offset(a.values[k]) + inner]); },
            [&](compute_t<T> x) { s += (double)x; });
        out[(o * a.size + key) * a.inner_count + e] = from_compute<T>((compute_t<T>)s);
    }
}

static int zero(const char *op, const lac_view *out)
{
    CUDA_TRY(op, lac_cuda_fill_bytes(out->data, 0, (size_t)(numel(out) * dtype_bytes(out->dtype))));
    return 0;
}

extern "C" int lac_cuda_index_select_bwd(const lac_a_index_bwd *a)
{
    const char *op = "index_select_bwd";
    int axes = a->index.ndim;
    int64_t outer = 1;
    LAC_TRY(zero(op, &a->out));
    rows_args r = {walk_axes(&a->g, 0, a->dim),
                   walk_axes(&a->g, a->dim, a->dim + axes),
                   walk_axes(&a->g, a->dim + axes, a->g.ndim),
                   NULL,
                   NULL,
                   numel(&a->index),
                   a->out.shape[a->dim],
                   1};
    for (int d = 0; d < a->dim; d++) outer *= a->g.shape[d];
    for (int d = a->dim + axes; d < a->g.ndim; d++) r.inner_count *= a->g.shape[d];
    if (r.n == 0 || outer * r.inner_count == 0) return 0;
    if (outer > 65535) LAC_FAIL(SHAPE, "%s: more than 65,535 slices in front of the indexed axis on cuda", op);
    lac_cuda_reporter bad = lac_cuda_reporter_for("index_select_bwd: index", r.size);
    pair_list list(op, r.n);
    LAC_TRY(sort_by_key(op, {reader_of(&a->index), r.n, 1, 0}, bad, &list));
    r.keys = list.sorted_keys;
    r.values = list.sorted;
    return dispatch_float(a->g.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        launch(sum_rows<T>, dim3((unsigned)r.n, (unsigned)outer), THREADS, 0, r, (const T *)a->g.data,
               (T *)a->out.data);
        return lac_cuda_launched(op);
    });
}

/* thread i: if sorted pair i is the first of its run, the sum of the run */
template <class T>
__global__ void __launch_bounds__(THREADS)
    sum_elements(view_walk g_walk, const uint64_t *keys, const int64_t *values, int64_t n, const T *g, T *out)
{
    EACH(i, n)
    {
        int64_t key = (int64_t)keys[i];
        if (key == INT64_MAX || (i > 0 && (int64_t)keys[i - 1] == key)) continue;
        double s = 0;
        take_run(
            i, run_end(keys, i, n), [&](int64_t k) { return to_compute(g[g_walk.offset(values[k])]); },
            [&](compute_t<T> x) { s += (double)x; });
        out[key] = from_compute<T>((compute_t<T>)s);
    }
}

extern "C" int lac_cuda_gather_bwd(const lac_a_index_bwd *a)
{
    const char *op = "gather_bwd";
    key_args k = {reader_of(&a->index), numel(&a->index), 1, a->g.ndim ? a->g.shape[a->dim] : 1};
    LAC_TRY(zero(op, &a->out));
    for (int d = a->dim + 1; d < a->g.ndim; d++) k.after *= a->g.shape[d];
    if (k.n == 0 || numel(&a->out) == 0) return 0;
    lac_cuda_reporter bad = lac_cuda_reporter_for("gather_bwd: index", a->out.shape[a->dim]);
    pair_list list(op, k.n);
    LAC_TRY(sort_by_key(op, k, bad, &list));
    return dispatch_float(a->g.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        each(sum_elements<T>, k.n, walk_axes(&a->g, 0, a->g.ndim), list.sorted_keys, list.sorted, k.n,
             (const T *)a->g.data, (T *)a->out.data);
        return lac_cuda_launched(op);
    });
}
