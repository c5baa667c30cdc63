/* optim.cu: optimisers and the global norm over lists of tensors on CUDA.
 *
 * One launch for a whole model (one for each dtype in it): the list of tensors goes to the device once per call, chunks
 * are numbered through all tensors, and a block finds its tensor by looking for the chunk's number. Bound by memory
 * (AdamW reads four streams and writes three). A block takes four elements a thread and is done: blocks begin in order,
 * so what is on its way at any time lies close together in every stream, which memory likes best. On an H200 AdamW of
 * f32 takes 0.92 to 0.97 of the time of blocks that go through 8,192 elements, two vectors a stream at once, of bf16
 * the same (0.98 to 1.04), but 0.79 where all streams lie alike in memory; with four vectors at once it took 1.5 times.
 * Blocks of 128 threads take 0.995 (f32) and 0.98 (bf16) of the time of 256, of 512 1.03 and 1.04; loads that say that
 * nothing is read again 1.04 to 1.11. Where the driver puts the tensors decides more: the same program reached 84 to
 * 96% of a copy's rate in different runs. The rules are those of c/cpu/optim.c, which says where they come from; half
 * parameters may carry an f32 master copy, which is then what is updated, and the half parameter is its rounding. The
 * norm adds squares in double per chunk and the chunks in order in one block, and the host waits for it: clipping needs
 * the number before the update is queued.
 */
#include "launch.cuh"
#include <cmath>
#include <vector>

enum { LANES = 128, CHUNK = 4 * LANES, NORM_CHUNK = 8192 };

struct optim_item {
    void *p, *m, *v, *master;
    const void *g;
    int64_t n, first; /* first: number of its first chunk */
    double lr, weight_decay;
};
struct optim_args {
    int rule;
    double beta1, beta2, eps, dampening, grad_scale, grad_limit, step_scale, root_scale;
    bool nesterov, coupled, first_step;
};

/* the item that chunk t belongs to: the last with first <= t. A warp looks at 32 places at once: each look waits for
 * memory. */
template <class I> static __device__ int item_of(const I *items, int n, int64_t t)
{
    int low = 0, lane = threadIdx.x % 32;
    while (n > 1) { /* among n from `low` on; the first of them is known to fit */
        int step = (n + 31) / 32, at = lane * step;
        unsigned fit = __ballot_sync(0xffffffffu, at < n && items[low + at].first <= t);
        int last = (31 - __clz((int)fit)) * step;
        low += last;
        n = n - last < step ? n - last : step;
    }
    return low;
}

/* one element: p, m and v are updated */
template <class C>
__device__ __forceinline__ void update(const optim_args &a, const optim_item &item, C g, C &p, C &m, C &v)
{
    C lr = (C)item.lr, most = a.grad_limit > 0 ? (C)a.grad_limit : (C)INFINITY;
    C coupled = a.coupled ? (C)item.weight_decay : C(0), keep = a.coupled ? C(1) : (C)(1 - item.lr * item.weight_decay);
    C b1 = (C)a.beta1, b2 = (C)a.beta2, c1 = (C)(1 - a.beta1), c2 = (C)(1 - a.beta2), d = g * (C)a.grad_scale;
    d = d > most ? most : d;
    d = d < -most ? -most : d;
    d += coupled * p;
    if (a.rule == LAC_RULE_ADAMW) {
        m = b1 * m + c1 * d;
        v = b2 * v + c2 * (d * d);
        p = p * keep - (C)(item.lr * a.step_scale) * m / (sqrt(v) * (C)a.root_scale + (C)a.eps);
    } else if (a.rule == LAC_RULE_SGD) {
        if (item.m) {
            C take = a.first_step ? C(1) : (C)(1 - a.dampening);
            m = b1 * m + take * d;
            p = p * keep - lr * (a.nesterov ? b1 * m + d : m);
        } else {
            p = p * keep - lr * d;
        }
    } else {
        C c = b1 * m + c1 * d, s = c > 0 ? C(1) : c;
        s = c < 0 ? C(-1) : s;
        m = b2 * m + c2 * d;
        p = p * keep - lr * s;
    }
}

/* four neighbours of f64, f32 or a half type */
template <class T> struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) four {
    T at[4];
};
template <class T> static __device__ __forceinline__ four<T> four_at(const void *p, int64_t i)
{
    return p ? *(const four<T> *)((const T *)p + i) : four<T>{};
}
template <class T> static __device__ __forceinline__ bool aligned_four(const void *p)
{
    return (uintptr_t)p % alignof(four<T>) == 0;
}

template <class T>
__device__ __forceinline__ void update_chunk(const optim_args &a, const optim_item &item, int64_t chunk)
{
    typedef compute_t<T> C;
    T *p = (T *)item.p;
    const T *g = (const T *)item.g;
    C *m = (C *)item.m, *v = (C *)item.v, *master = (C *)item.master;
    const void *streams[] = {p, g, m, v, master};
#pragma unroll
    for (const void *s : streams) __builtin_assume(__isGlobal(s)); /* a pointer that was read may be of any memory */
    int64_t begin = chunk * CHUNK, end = begin + CHUNK < item.n ? begin + CHUNK : item.n, rest = begin;
    if (aligned_four<T>(p) && aligned_four<T>(g) && aligned_four<C>(m) && aligned_four<C>(v) &&
        aligned_four<C>(master)) {
        int64_t i = begin + 4 * threadIdx.x;
        rest = begin + (end - begin) / 4 * 4;
        if (i < rest) {
            four<C> value = four_at<C>(master, i), mi = four_at<C>(m, i), vi = four_at<C>(v, i);
            four<T> gi = four_at<T>(g, i), pi = four_at<T>(master ? NULL : p, i);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (!master) value.at[k] = to_compute(pi.at[k]);
                update(a, item, (C)to_compute(gi.at[k]), value.at[k], mi.at[k], vi.at[k]);
                pi.at[k] = from_compute<T>(value.at[k]);
            }
            if (m) *(four<C> *)(m + i) = mi;
            if (v) *(four<C> *)(v + i) = vi;
            if (master) *(four<C> *)(master + i) = value;
            *(four<T> *)(p + i) = pi;
        }
    }
    for (int64_t i = rest + threadIdx.x; i < end; i += LANES) {
        C value = master ? master[i] : to_compute(p[i]), mi = m ? m[i] : C(0), vi = v ? v[i] : C(0);
        update(a, item, (C)to_compute(g[i]), value, mi, vi);
        if (m) m[i] = mi;
        if (v) v[i] = vi;
        if (master) master[i] = value;
        p[i] = from_compute<T>(value);
    }
}

template <class T> __global__ void __launch_bounds__(LANES) optim_kernel(optim_args a, const optim_item *items, int n)
{
    previous_done();
    optim_item item = items[item_of(items, n, blockIdx.x)];
    update_chunk<T>(a, item, blockIdx.x - item.first);
}

static int64_t numel(const lac_view *v)
{
    int64_t n = 1;
    for (int d = 0; d < v->ndim; d++) n *= v->shape[d];
    return n;
}

/* list to the device */
template <class I> static int upload(const char *op, const std::vector<I> &list, const lac_scratch &space)
{
    if (!space.data) return LAC_E_MEMORY;
    return lac_cuda_check(op, lac_cuda_upload(space.data, list.data(), list.size() * sizeof(I)));
}

/* the tensors of type T */
template <class T> static int optim_run(const lac_a_optim *a, int dtype, const optim_args &args)
{
    std::vector<optim_item> items;
    int64_t chunks = 0;
    for (int64_t i = 0; i < a->n; i++) {
        const lac_a_optim_item *from = &a->items[i];
        int64_t n = numel(&from->param);
        if (n == 0 || from->param.dtype != dtype) continue;
        items.push_back({from->param.data, from->m.data, from->v.data, from->master.data, from->grad.data, n, chunks,
                         from->lr, from->weight_decay});
        chunks += (n + CHUNK - 1) / CHUNK;
    }
    if (chunks == 0) return 0;
    lac_scratch space(a->name, items.size() * sizeof(optim_item));
    LAC_TRY(upload(a->name, items, space));
    launch(optim_kernel<T>, (unsigned)chunks, LANES, 0, args, (const optim_item *)space.data, (int)items.size());
    return lac_cuda_launched(a->name);
}

extern "C" int lac_cuda_optim_many(const lac_a_optim *a)
{
    optim_args args = {a->rule,       a->beta1, a->beta2, a->eps,      a->dampening, a->grad_scale,
                       a->grad_limit, 1,        1,        a->nesterov, a->coupled,   a->step == 1};
    if (a->rule == LAC_RULE_ADAMW) {
        args.step_scale = 1 / -expm1((double)a->step * log(a->beta1));
        args.root_scale = 1 / sqrt(-expm1((double)a->step * log(a->beta2)));
    }
    for (int dtype : {LAC_F64, LAC_F32, LAC_F16, LAC_BF16})
        LAC_TRY(
            dispatch_float(dtype, [&](auto tag) { return optim_run<typename decltype(tag)::type>(a, dtype, args); }));
    return 0;
}

struct norm_item {
    view_walk walk;
    const void *x;
    int64_t n, first;
    int dtype;
    bool dense;
};

template <class T> __device__ __forceinline__ double square_chunk(const norm_item &item, int64_t chunk)
{
    int64_t begin = chunk * NORM_CHUNK, end = begin + NORM_CHUNK < item.n ? begin + NORM_CHUNK : item.n;
    double s = 0;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
        double v = (double)to_compute(((const T *)item.x)[item.dense ? i : item.walk.offset(i)]);
        s += v * v;
    }
    return s;
}

__global__ void __launch_bounds__(THREADS) square_kernel(const norm_item *items, int n, double *sums)
{
    __shared__ double space[THREADS / 32];
    previous_done();
    norm_item item = items[item_of(items, n, blockIdx.x)];
    int64_t chunk = blockIdx.x - item.first;
    double s = item.dtype == LAC_F64   ? square_chunk<double>(item, chunk)
               : item.dtype == LAC_F32 ? square_chunk<float>(item, chunk)
               : item.dtype == LAC_F16 ? square_chunk<f16>(item, chunk)
                                       : square_chunk<bf16>(item, chunk);
    s = block_sum(s, space);
    if (threadIdx.x == 0) sums[blockIdx.x] = s;
}

__global__ void __launch_bounds__(THREADS) total_kernel(double *sums, int64_t n)
{
    __shared__ double space[THREADS / 32];
    double s = 0;
    previous_done();
    for (int64_t i = threadIdx.x; i < n; i += THREADS) s += sums[i];
    s = block_sum(s, space);
    if (threadIdx.x == 0) sums[n] = s;
}

extern "C" int lac_cuda_norm_many(const lac_a_norm *a)
{
    std::vector<norm_item> items;
    int64_t chunks = 0;
    *a->norm = 0;
    for (int64_t i = 0; i < a->n; i++) {
        const lac_view *v = &a->items[i];
        int64_t n = numel(v);
        if (n == 0) continue;
        items.push_back({walk_axes(v, 0, v->ndim), v->data, n, chunks, v->dtype, view_contiguous(v)});
        chunks += (n + NORM_CHUNK - 1) / NORM_CHUNK;
    }
    if (chunks == 0) return 0;
    lac_scratch space("norm", items.size() * sizeof(norm_item)), sums("norm", (size_t)(chunks + 1) * 8);
    if (!sums.data) return LAC_E_MEMORY;
    LAC_TRY(upload("norm", items, space));
    launch(square_kernel, (unsigned)chunks, THREADS, 0, (const norm_item *)space.data, (int)items.size(),
           (double *)sums.data);
    launch(total_kernel, 1, THREADS, 0, (double *)sums.data, chunks);
    LAC_TRY(lac_cuda_launched("norm"));
    double total;
    LAC_TRY(lac_cuda_read("norm", &total, (double *)sums.data + chunks, 8));
    *a->norm = sqrt(total);
    return 0;
}
