/* norm.cu: softmax, layer and root-mean-square normalisation on CUDA.
 *
 * All are bound by memory: a row is read once where registers hold it (rows.cuh). Softmax along an axis that is not the
 * last gives each thread one line and neighbouring threads neighbouring lines, in two passes (maximum and sum together,
 * rescaling as the maximum grows).
 * layernorm centres before it squares, as on the CPU: the sum of squares loses everything when the mean is large. Its
 * backward is norm_bwd.cuh's where rows are dense and fit a block. rmsnorm is layernorm with a mean of 0.
 */
#include "norm_bwd_whole.cuh"
#include "norm_whole.cuh"

static __device__ __forceinline__ float exponential(float x) { return expf(x); }
static __device__ __forceinline__ double exponential(double x) { return exp(x); }
static __device__ __forceinline__ float logarithm_of(float x) { return logf(x); }
static __device__ __forceinline__ double logarithm_of(double x) { return log(x); }
/* of what will be rounded to T */
template <class T> static __device__ __forceinline__ compute_t<T> exponential_of(compute_t<T> x)
{
    if constexpr (sizeof(T) == 2) return short_exp(x);
    else return exponential(x);
}
template <class C> __device__ __forceinline__ C infinity() { return (C)INFINITY; }

/* ---- softmax along the last axis ---- */

struct softmax_args {
    view_walk x, g; /* the axes that count rows */
    int64_t rows, n, x_stride, g_stride;
    bool logarithm;
};

template <class T, int ROW, int N, int KEEP>
__global__ void __launch_bounds__(row_threads<ROW>, KEEP ? row_blocks<ROW>(KEEP + ROW_REGISTERS + 14) : 1)
    softmax_rows(softmax_args a, const T *x, T *out)
{
    previous_done();
    typedef compute_t<T> C;
    __shared__ C space[ROW_LONG / 32];
    NEXT_ROWS(ROW, a.rows)
    {
        row<T, ROW, N, KEEP> v(x + a.x.offset(r), a.n, a.x_stride);
        C most = -infinity<C>(), sum = 0;
        v.each([&](C e, int64_t, int) { most = e > most ? e : most; });
        most = row_max<ROW>(most, space);
        if constexpr (KEEP > 0) {
            if (!a.logarithm) { /* every exponential once */
                C e[KEEP];
                v.each([&](C x, int64_t, int k) { sum += e[k] = exponential_of<T>(x - most); });
                C scale = C(1) / row_sum<ROW>(sum, space);
                v.store(out + r * a.n, [&](C, int64_t, int k) { return e[k] * scale; });
                continue;
            }
        }
        v.each([&](C e, int64_t, int) { sum += exponential_of<T>(e - most); });
        sum = row_sum<ROW>(sum, space);
        if (a.logarithm) {
            C lse = logarithm_of(sum);
            v.store(out + r * a.n, [&](C e, int64_t, int) { return (e - most) - lse; });
        } else {
            C scale = C(1) / sum;
            v.store(out + r * a.n, [&](C e, int64_t, int) { return exponential_of<T>(e - most) * scale; });
        }
    }
}

template <class T, int ROW, int N, int KEEP>
__global__ void __launch_bounds__(row_threads<ROW>, KEEP ? row_blocks<ROW>(2 * forward_registers<T, KEEP>) : 1)
    softmax_bwd_rows(softmax_args a, const T *y, const T *g, T *out)
{
    previous_done();
    typedef compute_t<T> C;
    __shared__ C space[ROW_LONG / 32];
    NEXT_ROWS(ROW, a.rows)
    {
        row<T, ROW, N, KEEP> v(y + a.x.offset(r), a.n, a.x_stride), w(g + a.g.offset(r), a.n, a.g_stride);
        C sum = 0;
        v.groups([&](C(&e)[N], int64_t first, int k) {
            C d[N];
            w.group(first, k, d);
#pragma unroll
            for (int i = 0; i < N; i++) sum += a.logarithm ? d[i] : e[i] * d[i];
        });
        sum = row_sum<ROW>(sum, space);
        v.store_groups(out + r * a.n, [&](C(&e)[N], int64_t first, int k) {
            C d[N];
            w.group(first, k, d);
#pragma unroll
            for (int i = 0; i < N; i++) e[i] = a.logarithm ? d[i] - exponential_of<T>(e[i]) * sum : e[i] * (d[i] - sum);
        });
    }
}

/* ---- softmax along another axis: one line a thread ---- */

struct line_args {
    view_walk x, g, out; /* the axes but the normalised one */
    int64_t lines, n, x_step, g_step, out_step;
    bool logarithm;
};

template <class T> __global__ void __launch_bounds__(THREADS) softmax_lines(line_args a, const T *x, T *out)
{
    previous_done();
    typedef compute_t<T> C;
    for (int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x; t < a.lines; t += (int64_t)gridDim.x * THREADS) {
        const T *from = x + a.x.offset(t);
        T *to = out + a.out.offset(t);
        C most = -infinity<C>(), sum = 0;
        for (int64_t i = 0; i < a.n; i++) {
            C e = to_compute(from[i * a.x_step]);
            if (e > most) {
                sum *= exponential(most - e);
                most = e;
            }
            sum += exponential(e - most);
        }
        C scale = C(1) / sum, lse = logarithm_of(sum);
        for (int64_t i = 0; i < a.n; i++) {
            C e = to_compute(from[i * a.x_step]) - most;
            to[i * a.out_step] = from_compute<T>(a.logarithm ? e - lse : exponential(e) * scale);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS) softmax_bwd_lines(line_args a, const T *y, const T *g, T *out)
{
    previous_done();
    typedef compute_t<T> C;
    for (int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x; t < a.lines; t += (int64_t)gridDim.x * THREADS) {
        const T *from = y + a.x.offset(t), *d = g + a.g.offset(t);
        T *to = out + a.out.offset(t);
        C sum = 0;
        for (int64_t i = 0; i < a.n; i++) {
            C e = to_compute(d[i * a.g_step]);
            sum += a.logarithm ? e : e * to_compute(from[i * a.x_step]);
        }
        for (int64_t i = 0; i < a.n; i++) {
            C e = to_compute(from[i * a.x_step]), w = to_compute(d[i * a.g_step]);
            to[i * a.out_step] = from_compute<T>(a.logarithm ? w - exponential(e) * sum : e * (w - sum));
        }
    }
}

/* g NULL: forward */
static int softmax_run(const char *op, const lac_view *x, const lac_view *g, const lac_view *out, int dim,
                       bool logarithm)
{
    int64_t total = numel(out), n = out->ndim ? out->shape[dim] : 1;
    if (total == 0) return 0;
    const lac_view *second = g ? g : x;
    if (out->ndim && dim != out->ndim - 1) {
        line_args a = {lines_along(x, dim).outer,
                       lines_along(second, dim).outer,
                       lines_along(out, dim).outer,
                       total / n,
                       n,
                       x->stride[dim],
                       second->stride[dim],
                       out->stride[dim],
                       logarithm};
        return dispatch_float(x->dtype, [&](auto tag) {
            typedef typename decltype(tag)::type T;
            unsigned blocks = blocks_filling(a.lines, THREADS, 16);
            if (g)
                launch(softmax_bwd_lines<T>, blocks, THREADS, 0, a, (const T *)x->data, (const T *)g->data,
                       (T *)out->data);
            else launch(softmax_lines<T>, blocks, THREADS, 0, a, (const T *)x->data, (T *)out->data);
            return lac_cuda_launched(op);
        });
    }
    softmax_args a = {walk_axes(x, 0, x->ndim ? x->ndim - 1 : 0),
                      walk_axes(second, 0, x->ndim ? x->ndim - 1 : 0),
                      total / n,
                      n,
                      x->ndim ? x->stride[dim] : 1,
                      x->ndim ? second->stride[dim] : 1,
                      logarithm};
    return dispatch_float(x->dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        constexpr int64_t V = 16 / sizeof(T);
        bool dense = rows_dense(x, V) && rows_dense(second, V) && rows_dense(out, V);
        if (g)
            with_rows<T>(n, dense, [&](auto rt, auto nt, auto kt) {
                constexpr int ROW = decltype(rt)::value, threads = row_threads<ROW>;
                launch(softmax_bwd_rows<T, ROW, decltype(nt)::value, decltype(kt)::value>,
                       blocks_filling(a.rows, threads / ROW, 64), threads, 0, a, (const T *)x->data, (const T *)g->data,
                       (T *)out->data);
            });
        else
            with_rows<T>(n, dense, [&](auto rt, auto nt, auto kt) {
                constexpr int ROW = decltype(rt)::value, threads = row_threads<ROW>;
                launch(softmax_rows<T, ROW, decltype(nt)::value, decltype(kt)::value>,
                       blocks_filling(a.rows, threads / ROW, 64), threads, 0, a, (const T *)x->data, (T *)out->data);
            });
        return lac_cuda_launched(op);
    });
}

extern "C" int lac_cuda_softmax(const lac_a_softmax *a)
{
    return softmax_run("softmax", &a->x, NULL, &a->out, a->dim, a->logarithm);
}

extern "C" int lac_cuda_softmax_bwd(const lac_a_softmax_bwd *a)
{
    return softmax_run("softmax_bwd", &a->y, &a->g, &a->out, a->dim, a->logarithm);
}

/* ---- layer normalisation ---- */

struct norm_args {
    view_walk x, g;
    int64_t rows, n, x_stride, g_stride, gamma_stride, beta_stride;
    double eps;
    bool centred; /* false: rmsnorm, whose mean is 0 */
};

/* S: dtype of the statistics, float or double, which is the compute type */
template <class T, int ROW, int N, int KEEP>
__global__ void __launch_bounds__(row_threads<ROW>, KEEP ? row_blocks<ROW>(forward_registers<T, KEEP>) : 1)
    layernorm_rows(norm_args a, const T *x, const T *gamma, const T *beta, T *out, compute_t<T> *mean,
                   compute_t<T> *rstd)
{
    previous_done();
    typedef compute_t<T> C;
    __shared__ C space[ROW_LONG / 32];
    C share_of_mean = a.centred ? C(1) / (C)a.n : C(0);
    NEXT_ROWS(ROW, a.rows)
    {
        row<T, ROW, N, KEEP> v(x + a.x.offset(r), a.n, a.x_stride);
        C sum = 0, square = 0;
        v.each([&](C e, int64_t, int) { sum += e; });
        C m = quotient(row_sum<ROW>(sum, space), (C)a.n, share_of_mean);
        v.each([&](C e, int64_t, int) { square += (e - m) * (e - m); });
        C s = inverse_deviation<T>(row_sum<ROW>(square, space), (C)a.n, (C)a.eps);
        v.store_groups(out + r * a.n, [&](C(&e)[N], int64_t first, int) {
            scale_group<N>(e, m, s, gamma, beta, first, a.gamma_stride, a.beta_stride);
        });
        if (threadIdx.x % ROW) continue;
        if (mean) mean[r] = m;
        rstd[r] = s;
    }
}

static int norm_run(const char *op, const lac_a_layernorm *a)
{
    int last = a->x.ndim - 1;
    int64_t n = a->x.shape[last], total = numel(&a->out);
    if (total == 0) return 0;
    norm_args j = {walk_axes(&a->x, 0, last),
                   {},
                   total / n,
                   n,
                   a->x.stride[last],
                   0,
                   a->gamma.data ? a->gamma.stride[0] : 0,
                   a->beta.data ? a->beta.stride[0] : 0,
                   a->eps,
                   a->mean.data != NULL};
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        typedef compute_t<T> C;
        constexpr int64_t V = 16 / sizeof(T);
        bool dense =
            rows_dense(&a->x, V) && rows_dense(&a->out, V) && parameters_dense(&a->gamma) && parameters_dense(&a->beta);
        if constexpr (std::is_same_v<T, bf16>) {
            whole_rows<T> w = {j.rows,
                               j.x.stride[0],
                               (float)j.eps,
                               (const T *)a->x.data,
                               (const T *)a->gamma.data,
                               (const T *)a->beta.data,
                               (T *)a->out.data,
                               (float *)a->mean.data,
                               (float *)a->rstd.data};
            /* 3,072 elements are no faster so */
            if (dense && j.x.ndim <= 1 && whole_fits<32>(w, n))
                return w.mean ? norm_whole<32, rows_themselves<T>>(op, w)
                              : norm_whole<32, rows_themselves<T>, false>(op, w);
        }
        with_rows<T>(n, dense, [&](auto rt, auto nt, auto kt) {
            constexpr int ROW = decltype(rt)::value, threads = row_threads<ROW>;
            launch(layernorm_rows<T, ROW, decltype(nt)::value, decltype(kt)::value>,
                   blocks_filling(j.rows, threads / ROW, 64), threads, 0, j, (const T *)a->x.data,
                   (const T *)a->gamma.data, (const T *)a->beta.data, (T *)a->out.data, (C *)a->mean.data,
                   (C *)a->rstd.data);
        });
        return lac_cuda_launched(op);
    });
}

extern "C" int lac_cuda_layernorm(const lac_a_layernorm *a) { return norm_run("layernorm", a); }

extern "C" int lac_cuda_rmsnorm(const lac_a_rmsnorm *a)
{
    lac_a_layernorm l = {};
    l.x = a->x, l.gamma = a->gamma, l.out = a->out, l.rstd = a->rstd, l.eps = a->eps;
    return norm_run("rmsnorm", &l);
}

/* dx of rows that registers do not hold, which are read twice */
template <class T, int ROW, int N>
__global__ void __launch_bounds__(row_threads<ROW>)
    layernorm_bwd_rows(norm_args a, const T *x, const T *gamma, const compute_t<T> *mean, const compute_t<T> *rstd,
                       const T *g, T *dx)
{
    previous_done();
    typedef compute_t<T> C;
    __shared__ C space[2 * ROW_LONG / 32];
    C share_of_mean = a.centred ? C(1) / (C)a.n : C(0);
    auto product = [&](const C(&d)[N], int64_t first, C(&p)[N]) { /* g gamma */
#pragma unroll
                                                                  for (int i = 0; i < N; i++) p[i] = 1;
                                                                  if (gamma)
                                                                      load_run<N>(gamma, first, a.gamma_stride, p);
#pragma unroll
                                                                  for (int i = 0; i < N; i++) p[i] *= d[i];
    };
    NEXT_ROWS(ROW, a.rows)
    {
        row<T, ROW, N, 0> v(x + a.x.offset(r), a.n, a.x_stride), w(g + a.g.offset(r), a.n, a.g_stride);
        C m = a.centred ? mean[r] : C(0), s = rstd[r], sum = 0, dot = 0;
        v.groups([&](C(&e)[N], int64_t first, int) {
            C d[N], p[N];
            w.group(first, 0, d);
            product(d, first, p);
#pragma unroll
            for (int i = 0; i < N; i++) sum += p[i], dot += p[i] * ((e[i] - m) * s);
        });
        row_sums<ROW>(&sum, &dot, space);
        sum *= share_of_mean;
        dot /= (C)a.n;
        v.store_groups(dx + r * a.n, [&](C(&e)[N], int64_t first, int) {
            C d[N], p[N];
            w.group(first, 0, d);
            product(d, first, p);
#pragma unroll
            for (int i = 0; i < N; i++) e[i] = s * (p[i] - sum - (e[i] - m) * s * dot);
        });
    }
}

/* rows that fit a block and are equally far apart: dx and the parameters' gradients in one pass */
template <class T> struct layernorm_back {
    enum { STREAMS = 2, COLUMNS = 2, TABLE = 0, OWN = true };
    const T *x, *g;
    int64_t x_step, g_step;
    T *dx;
    __device__ __forceinline__ int64_t step(int stream) const { return stream ? g_step : x_step; }
    __device__ __forceinline__ const T *row(int stream, int64_t r) const { return (stream ? g : x) + r * step(stream); }
    template <int N, int KEEP, int ROWS> struct state {
        template <class X> __device__ __forceinline__ void before(X x, float (&e)[KEEP], int, const void *)
        {
            unpack_kept<T, N>(x, e);
        }
        __device__ __forceinline__ void after(const layernorm_back &, T *dx, int, int, float (&e)[N],
                                              const row_access<T, N> *) const
        {
            row_store(dx, row_pack<T, N>(e));
        }
    };
};

/* shares of dgamma and dbeta for the same rows: a thread per column, a block per run of rows */
template <class T>
__global__ void __launch_bounds__(THREADS) layernorm_shares(norm_args a, const T *x, const compute_t<T> *mean,
                                                            const compute_t<T> *rstd, const T *g, compute_t<T> *share)
{
    previous_done();
    typedef compute_t<T> C;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.n; i += (int64_t)gridDim.x * THREADS) {
        C dgamma = 0, dbeta = 0;
        for (int64_t r = blockIdx.y; r < a.rows; r += gridDim.y) {
            C d = to_compute(g[a.g.offset(r) + i * a.g_stride]);
            C m = a.centred ? mean[r] : C(0);
            dgamma += d * ((to_compute(x[a.x.offset(r) + i * a.x_stride]) - m) * rstd[r]);
            dbeta += d;
        }
        share[blockIdx.y * 2 * a.n + i] = dgamma;
        share[blockIdx.y * 2 * a.n + a.n + i] = dbeta;
    }
}

static int norm_bwd_run(const char *op, const lac_a_layernorm_bwd *a)
{
    int last = a->x.ndim - 1;
    int64_t n = a->x.shape[last], total = numel(&a->dx);
    norm_args j = {walk_axes(&a->x, 0, last),
                   walk_axes(&a->g, 0, last),
                   n ? total / n : 0,
                   n,
                   a->x.stride[last],
                   a->g.stride[last],
                   a->gamma.data ? a->gamma.stride[0] : 0,
                   0,
                   0,
                   a->mean.data != NULL};
    bool shares = a->dgamma.data || a->dbeta.data;
    if (n == 0) return 0;
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        typedef compute_t<T> C;
        constexpr int64_t V = 16 / sizeof(T);
        bool dense =
            rows_dense(&a->x, V) && rows_dense(&a->g, V) && rows_dense(&a->dx, V) && parameters_dense(&a->gamma);
        bool keep = dense && sizeof(T) < 8 && n % V == 0 && n <= ROW_KEPT && j.x.ndim <= 1 && j.g.ndim <= 1;
        const T *x = (const T *)a->x.data, *g = (const T *)a->g.data, *gamma = (const T *)a->gamma.data;
        const C *mean = (const C *)a->mean.data, *rstd = (const C *)a->rstd.data;
        if constexpr (sizeof(T) < 8)
            if (keep) {
                if constexpr (sizeof(T) == 2)
                    if (back_whole_fits<T>(j.rows, n)) {
                        whole_grad<T> w = {j.rows, j.x.stride[0], j.g.stride[0],   x,   g, gamma,
                                           mean,   rstd,          (T *)a->dx.data, NULL};
                        return n == 768 ? norm_bwd_whole<32, back_themselves<T>>(op, w, &a->dgamma, &a->dbeta)
                                        : norm_bwd_whole<128, back_themselves<T>>(op, w, &a->dgamma, &a->dbeta);
                    }
                norm_grad<T> norm = {j.rows, n, gamma, mean, rstd, NULL};
                layernorm_back<T> back = {x, g, j.x.stride[0], j.g.stride[0], (T *)a->dx.data};
                return norm_bwd_run<T>(op, norm, back, &a->dgamma, &a->dbeta);
            }
        int64_t parts = !shares ? 0 : j.rows < 64 ? (j.rows ? j.rows : 1) : 64;
        lac_scratch share(op, parts ? (size_t)(parts * 2 * n) * sizeof(C) : 1);
        if (!share.data) return (int)LAC_E_MEMORY;
        with_rows<T>(n, dense, [&](auto rt, auto nt, auto kt) {
            constexpr int ROW = decltype(rt)::value;
            if constexpr (decltype(kt)::value == 0)
                launch(layernorm_bwd_rows<T, ROW, decltype(nt)::value>,
                       blocks_filling(j.rows, row_threads<ROW> / ROW, 16), row_threads<ROW>, 0, j, x, gamma, mean, rstd,
                       g, (T *)a->dx.data);
        });
        LAC_TRY(lac_cuda_launched(op));
        if (!shares) return 0;
        C *to = (C *)share.data;
        launch(layernorm_shares<T>, dim3(blocks_for(n, THREADS), (unsigned)parts), THREADS, 0, j, x, mean, rstd, g, to);
        launch(layernorm_combine<T>, dim3(blocks_for(n, 32), 2), COMBINE, 0, n, parts, to, (T *)a->dgamma.data,
               (T *)a->dbeta.data, (T *)NULL);
        return lac_cuda_launched(op);
    });
}

extern "C" int lac_cuda_layernorm_bwd(const lac_a_layernorm_bwd *a) { return norm_bwd_run("layernorm_bwd", a); }

extern "C" int lac_cuda_rmsnorm_bwd(const lac_a_rmsnorm_bwd *a)
{
    lac_a_layernorm_bwd l = {};
    l.x = a->x, l.gamma = a->gamma, l.rstd = a->rstd, l.g = a->g, l.dx = a->dx, l.dgamma = a->dgamma;
    return norm_bwd_run("rmsnorm_bwd", &l);
}
