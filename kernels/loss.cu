/* loss.cu: cross-entropy on CUDA, from logits and fused with the output projection.
 *
 * The definitions are those of c/cpu/loss.c: with class weights w and smoothing e a row's target is
 * q_c = w_c ((1 - e) t_c + e / V), Q its sum; the loss is Q lse - sum q_c x_c and the gradient (Q softmax_c - q_c) g. A
 * block owns a row. Dense rows with classes as targets, which language models have, are read once, 16 bytes at a time,
 * with a maximum and a sum that are rescaled as the maximum grows; others twice, the second time from the cache. Where
 * the loss and its gradient are wanted together, as in training, and such a row of f32 fits the shared memory of a
 * multiprocessor (some 57,000 classes on Hopper, 41,000 on Ampere), it stays there for its gradient.
 *
 * The fused form computes logits a chunk of rows at a time (512 MB of f32), so that R x V logits never exist. dw is
 * read and written once for each chunk, which in chunks of 64 MB was 32 GB for 32,768 rows and 50,304 classes. In the
 * backward a chunk's gradient is rounded to the dtype of x before it is multiplied into dx and dw, which is what
 * runs on tensor cores; dw adds up in f32. The gradient lies in the logits' own rows, of which it takes the first half:
 * the loss is where a training step holds most, and a place of its own was a quarter of a gigabyte there. f16 has no
 * range for gradients divided by a batch, so there both products run in f32. A target outside [0, V) leaves a note
 * (backend.cu) and the row a loss of 0.
 */
#include "gemm.cuh"
#include "rows.cuh"
#include "short.cuh"

enum { LOSS_THREADS = 512, DENSE_THREADS = 128, DENSE_BLOCKS = 8, CHUNK_ELEMENTS = 1 << 27 };

static int64_t numel(const lac_view *v)
{
    int64_t n = 1;
    for (int d = 0; d < v->ndim; d++) n *= v->shape[d];
    return n;
}

/* what a row's target is, in the compute type C */
template <class C> struct loss_target {
    const void *hard, *soft; /* one of them; soft: storage type of the logits */
    int64_t hard_stride, soft_row, soft_stride, ignore;
    bool wide;           /* hard is i64 */
    const C *weight;     /* [V] or NULL */
    const double *total; /* sum of the weights, or NULL: V */
    C smoothing;
    __device__ int64_t at(int64_t row) const
    {
        int64_t i = row * hard_stride;
        return wide ? ((const int64_t *)hard)[i] : ((const int32_t *)hard)[i];
    }
};

template <class T> struct loss_rows {
    typedef compute_t<T> C;
    const T *logits; /* rows of this chunk */
    int64_t row_stride, stride, first, rows, n;
    C *out, *lse;
    const C *g;
    int64_t g_stride, y_stride; /* y_stride: elements between rows of the gradient */
};

/* q_c for a soft target */
template <class T, class C>
static __device__ __forceinline__ C soft_at(const loss_target<C> &t, int64_t row, int64_t c, int64_t n)
{
    C p = to_compute(((const T *)t.soft)[row * t.soft_row + c * t.soft_stride]);
    return (p * (C(1) - t.smoothing) + t.smoothing / (C)n) * (t.weight ? t.weight[c] : C(1));
}

static __device__ __forceinline__ float exponential(float x) { return expf(x); }
static __device__ __forceinline__ double exponential(double x) { return exp(x); }

/* S: storage type of soft targets (the tensor's, also where the logits are a chunk in f32) */
template <class T, class S>
__global__ void __launch_bounds__(LOSS_THREADS)
    loss_kernel(loss_rows<T> a, loss_target<compute_t<T>> t, lac_cuda_reporter bad)
{
    previous_done();
    typedef compute_t<T> C;
    __shared__ C space[LOSS_THREADS / 32];
    __shared__ double wide_space[LOSS_THREADS / 32];
    for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
        const T *x = a.logits + r * a.row_stride;
        int64_t row = a.first + r;
        C most = -(C)INFINITY;
        for (int64_t c = threadIdx.x; c < a.n; c += LOSS_THREADS) {
            C v = to_compute(x[c * a.stride]);
            most = v > most ? v : most;
        }
        most = block_max(most, space);
        double sum = 0, dot = 0, all = 0;
        for (int64_t c = threadIdx.x; c < a.n; c += LOSS_THREADS) {
            C v = to_compute(x[c * a.stride]);
            sum += (double)exponential(v - most);
            if (t.soft) {
                C q = soft_at<S>(t, row, c, a.n);
                all += (double)q;
                dot += (double)q * (double)v;
            } else if (t.smoothing > 0) {
                dot += (double)v * (t.weight ? (double)t.weight[c] : 1);
            }
        }
        sum = block_sum(sum, wide_space);
        double lse = (double)most + log(sum), loss;
        if (t.soft) {
            all = block_sum(all, wide_space);
            loss = all * lse - block_sum(dot, wide_space);
        } else {
            if (t.smoothing > 0) dot = block_sum(dot, wide_space);
            int64_t k = t.at(row);
            if (k == t.ignore) {
                loss = 0;
            } else if (k < 0 || k >= a.n) {
                if (threadIdx.x == 0) bad.report(row, k);
                loss = 0;
            } else {
                double q = (1 - (double)t.smoothing) * (t.weight ? (double)t.weight[k] : 1);
                loss = q * (lse - (double)to_compute(x[k * a.stride]));
                if (t.smoothing > 0)
                    loss += (double)t.smoothing / (double)a.n * ((t.total ? *t.total : (double)a.n) * lse - dot);
            }
        }
        if (threadIdx.x == 0) a.lse[row] = (C)lse, a.out[row] = (C)loss;
    }
}

/* y [rows, n]; may lie in the logits: U is T, or each row is the beginning of the logits' row. A thread then writes
 * what others have read, so all of them read before any writes; what is written is never ahead of what was read. */
template <class T, class S, class U>
__global__ void __launch_bounds__(LOSS_THREADS)
    gradient_kernel(loss_rows<T> a, loss_target<compute_t<T>> t, U *y, lac_cuda_reporter bad)
{
    previous_done();
    typedef compute_t<T> C;
    __shared__ double wide_space[LOSS_THREADS / 32];
    for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
        const T *x = a.logits + r * a.row_stride;
        U *out = y + r * a.y_stride;
        int64_t row = a.first + r, k = t.soft ? -1 : t.at(row);
        bool dead = !t.soft && (k == t.ignore || k < 0 || k >= a.n);
        if (dead && k != t.ignore && threadIdx.x == 0) bad.report(row, k);
        C lse = a.lse[row], g = a.g[row * a.g_stride], share = t.smoothing / (C)a.n, q = 0;
        double all = 0;
        if (t.soft) {
            for (int64_t c = threadIdx.x; c < a.n; c += LOSS_THREADS) all += (double)soft_at<S>(t, row, c, a.n);
            all = block_sum(all, wide_space);
        } else if (!dead) {
            q = (C(1) - t.smoothing) * (t.weight ? t.weight[k] : C(1));
            all = (double)q + (double)share * (t.total ? *t.total : (double)a.n);
        }
        for (int64_t first = 0; first < a.n; first += LOSS_THREADS) {
            int64_t c = first + threadIdx.x;
            C v = 0;
            if (!dead && c < a.n) {
                C p = exponential((C)to_compute(x[c * a.stride]) - lse) * (C)all;
                if (t.soft) p -= soft_at<S>(t, row, c, a.n);
                else p -= share * (t.weight ? t.weight[c] : C(1)) + (c == k ? q : C(0));
                v = p * g;
            }
            if (sizeof(U) < sizeof(T)) __syncthreads();
            if (c < a.n) out[c] = from_compute<U>(v);
        }
        __syncthreads(); /* in place: nobody may still read the row */
    }
}

/* ---- the same for dense rows and classes as targets, without smoothing ---- */

enum { LOSS_GROUP = 8 }; /* n is a multiple */
/* G neighbours that a thread takes at once: 16 bytes of the narrower side, because half of a sector of 32 bytes that is
 * written alone costs as much as the whole */
template <class T, int G> struct loss_group {
    enum { N = 16 / sizeof(T) };
    row_access<T, N> part[G / N];
    __device__ __forceinline__ void get(float (&v)[G]) const
    {
#pragma unroll
        for (int p = 0; p < G / N; p++) row_unpack<T, N>(part[p], *(float(*)[N])(v + p * N));
    }
    __device__ __forceinline__ void put(const float (&v)[G])
    {
#pragma unroll
        for (int p = 0; p < G / N; p++) part[p] = row_pack<T, N>(*(const float(*)[N])(v + p * N));
    }
};

/* of a half type the result is rounded a thousand times more coarsely than ex2 is wrong */
template <class T> static __device__ __forceinline__ float loss_exp(float x)
{
    if constexpr (std::is_same_v<T, float>) return expf(x);
    else return short_exp(x);
}

/* the larger of two pairs of half numbers, or of two floats; of NaN and a number, the number */
template <class T> static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b)
{
    if constexpr (std::is_same_v<T, float>) {
        return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
    } else {
        typedef std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2> pair;
        pair most = __hmax2(*(const pair *)&a, *(const pair *)&b);
        return *(const uint32_t *)&most;
    }
}
/* of all of COUNT groups */
template <class T, int COUNT, int G> static __device__ __forceinline__ float largest(const loss_group<T, G> *raw)
{
    uint32_t top = raw[0].part[0].word.x;
#pragma unroll
    for (int u = 0; u < COUNT; u++)
#pragma unroll
        for (const auto &p : raw[u].part) {
            const uint32_t word[4] = {p.word.x, p.word.y, p.word.z, p.word.w};
#pragma unroll
            for (uint32_t w : word) top = larger<T>(top, w);
        }
    if constexpr (std::is_same_v<T, float>) {
        return __uint_as_float(top);
    } else {
        float pair[2];
        const uint32_t both = top;
        if constexpr (std::is_same_v<T, bf16>)
            pair[0] = __uint_as_float(both << 16), pair[1] = __uint_as_float(both & 0xffff0000u);
        else pair[0] = __low2float(*(const __half2 *)&both), pair[1] = __high2float(*(const __half2 *)&both);
        return fmaxf(pair[0], pair[1]);
    }
}

/* The log-sum-exp of what one thread reads: sum times e^most. QUICK: both are to the base 2, and `most` the rounded
 * product that is subtracted, so that it takes no accuracy from the result however large it is. */
template <class T, bool QUICK = sizeof(T) == 2> struct running_sum {
    enum { G = 16 / sizeof(T) };
    float most = -INFINITY;
    double sum = 0;
    static __device__ __forceinline__ float power(float x) { return QUICK ? short_exp2(x) : expf(x); }
    template <int COUNT> __device__ __forceinline__ void add(const loss_group<T, G> *raw)
    {
        float top = largest<T, COUNT>(raw), part = 0;
        top = fmaxf(most, QUICK ? top * LOG2_E : top);
        float shift = top > -INFINITY ? top : 0;
        if (top > most) sum *= (double)power(most - shift);
        most = top;
#pragma unroll
        for (int u = 0; u < COUNT; u++) {
            float v[G];
            raw[u].get(v);
#pragma unroll
            for (int i = 0; i < G; i++) part += power(QUICK ? fmaf(v[i], LOG2_E, -shift) : v[i] - shift);
        }
        sum += (double)part;
    }
    /* of a block whose threads have one each */
    __device__ __forceinline__ double lse(float *space, double *wide_space) const
    {
        float all = block_max(most, space);
        double total = block_sum(most < all ? sum * (double)power(most - all) : sum, wide_space);
        return (QUICK ? (double)all / (double)LOG2_E : (double)all) + log(total);
    }
};

/* FLIGHT groups of a row from number c on, STEP apart; those past its end are left out */
template <int STEP, class T, int G, int FLIGHT>
static __device__ __forceinline__ void load_groups(const loss_group<T, G> *x, int c, int groups,
                                                   loss_group<T, G> (&raw)[FLIGHT])
{
#pragma unroll
    for (int u = 0; u < FLIGHT; u++)
        if (c + u * STEP < groups) raw[u] = x[c + u * STEP];
}

/* A thread's next groups, at last those of the block's next row, are on their way while it adds, and while the block
 * adds up. So are the target of the block's next row and the logit of this one's: after the row, the first thread, for
 * which all wait, would wait for memory twice. */
template <class T>
__global__ void __launch_bounds__(DENSE_THREADS, DENSE_BLOCKS)
    loss_dense(loss_rows<T> a, loss_target<float> t, lac_cuda_reporter bad)
{
    previous_done();
    constexpr int G = running_sum<T>::G, FLIGHT = 4;
    __shared__ float space[DENSE_THREADS / 32];
    __shared__ double wide_space[DENSE_THREADS / 32];
    int groups = (int)(a.n / G);
    loss_group<T, G> raw[FLIGHT], next[FLIGHT];
    auto row_at = [&](int64_t r) { return (const loss_group<T, G> *)(a.logits + r * a.row_stride); };
    int64_t k = 0; /* of the first thread */
    if (blockIdx.x < a.rows) {
        load_groups<DENSE_THREADS>(row_at(blockIdx.x), threadIdx.x, groups, raw);
        if (threadIdx.x == 0) k = t.at(a.first + blockIdx.x);
    }
    for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
        const loss_group<T, G> *x = row_at(r);
        running_sum<T> mine;
        bool outside = k < 0 || k >= a.n;
        int64_t next_k = 0;
        T hit = {};
        if (threadIdx.x == 0) {
            if (r + gridDim.x < a.rows) next_k = t.at(a.first + r + gridDim.x);
            if (!outside) hit = a.logits[r * a.row_stride + k];
        }
        for (int c = threadIdx.x; c < groups; c += FLIGHT * DENSE_THREADS) {
            int then = c + FLIGHT * DENSE_THREADS;
            if (then < groups) load_groups<DENSE_THREADS>(x, then, groups, next);
            else if (r + gridDim.x < a.rows)
                load_groups<DENSE_THREADS>(row_at(r + gridDim.x), threadIdx.x, groups, next);
            if (c + (FLIGHT - 1) * DENSE_THREADS < groups) {
                mine.template add<FLIGHT>(raw);
            } else {
#pragma unroll
                for (int u = 0; u < FLIGHT; u++)
                    if (c + u * DENSE_THREADS < groups) mine.template add<1>(raw + u);
            }
#pragma unroll
            for (int u = 0; u < FLIGHT; u++) raw[u] = next[u];
        }
        double lse = mine.lse(space, wide_space), loss = 0;
        if (threadIdx.x) continue;
        int64_t row = a.first + r;
        if (k != t.ignore && outside) bad.report(row, k);
        if (k != t.ignore && !outside) loss = (t.weight ? (double)t.weight[k] : 1) * (lse - (double)to_compute(hit));
        a.lse[row] = (float)lse, a.out[row] = (float)loss;
        k = next_k;
    }
}

template <class T, class U>
__global__ void __launch_bounds__(LOSS_THREADS)
    gradient_dense(loss_rows<T> a, loss_target<float> t, U *y, lac_cuda_reporter bad)
{
    previous_done();
    constexpr int G = 16 / sizeof(U), FLIGHT = sizeof(U) == 4 ? 4 : 2;
    for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
        const loss_group<T, G> *x = (const loss_group<T, G> *)(a.logits + r * a.row_stride);
        loss_group<U, G> *out = (loss_group<U, G> *)(y + r * a.y_stride);
        int64_t row = a.first + r, k = t.at(row);
        bool outside = k < 0 || k >= a.n, dead = k == t.ignore || outside;
        if (outside && k != t.ignore && threadIdx.x == 0) bad.report(row, k);
        float lse = a.lse[row], scale = dead ? 0 : a.g[row * a.g_stride] * (t.weight ? t.weight[k] : 1);
        int groups = (int)(a.n / G), hit = dead ? -1 : (int)(k / G), at = (int)(k % G);
        for (int first = 0; first < groups; first += FLIGHT * LOSS_THREADS) {
            int c = first + (int)threadIdx.x;
            loss_group<T, G> raw[FLIGHT];
            load_groups<LOSS_THREADS>(x, c, groups, raw);
            if (sizeof(U) < sizeof(T)) __syncthreads(); /* as above */
#pragma unroll
            for (int u = 0; u < FLIGHT; u++) {
                int group = c + u * LOSS_THREADS;
                float v[G];
                loss_group<U, G> result;
                if (group >= groups) break;
                raw[u].get(v);
#pragma unroll
                for (int i = 0; i < G; i++) {
                    v[i] = loss_exp<U>(v[i] - lse);
                    if (group == hit && i == at) v[i] -= 1;
                    v[i] = dead ? 0 : v[i] * scale;
                }
                result.put(v);
                out[group] = result;
            }
        }
    }
}

/* ---- loss and gradient at once, of logits in f32 whose rows fit shared memory ---- */

/* of fewer classes the sums over the block would show */
enum { JOINT_THREADS = 1024, JOINT_FLIGHT = 4, JOINT_PARTS = 4, JOINT_LEAST = 16384, JOINT_MOST = 65536 };
static_assert(JOINT_MOST == JOINT_THREADS * JOINT_FLIGHT * JOINT_PARTS * 4, "four numbers a piece");

/* waits for the first part + 1 of the JOINT_PARTS groups that this thread has asked for */
static __device__ __forceinline__ void joint_fetched(int part)
{
    if (part == 0) asm volatile("cp.async.wait_group 3;" ::: "memory");
    if (part == 1) asm volatile("cp.async.wait_group 2;" ::: "memory");
    if (part == 2) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (part == 3) asm volatile("cp.async.wait_group 0;" ::: "memory");
}

template <class U> static __device__ __forceinline__ void store4(U *to, const float (&v)[4])
{
    if constexpr (sizeof(U) == 4) {
        row_store(to, row_pack<U, 4>(v));
    } else {
        const float wide[8] = {v[0], v[1], v[2], v[3]};
        uint4 word = row_pack<U, 8>(wide).word;
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(word.x), "r"(word.y) : "memory");
    }
}

/* One block fills a multiprocessor. A thread fetches by cp.async what it will read itself, which takes no barrier; when
 * it takes a piece for the gradient it asks for the same piece of the block's next row, so that memory is read and
 * written at once; and it adds up what is there while the rest of the row is on its way. y may lie in the logits: a row
 * is read before anything is written. */
template <class U>
__global__ void __launch_bounds__(JOINT_THREADS, 1)
    loss_joint(loss_rows<float> a, loss_target<float> t, U *y, lac_cuda_reporter bad)
{
    previous_done();
    typedef running_sum<float, sizeof(U) == 2> running;
    constexpr int G = running::G;
    typedef loss_group<float, G> piece;
    extern __shared__ float4 joint_row[];
    __shared__ float space[JOINT_THREADS / 32];
    __shared__ double wide_space[JOINT_THREADS / 32];
    int pieces = (int)(a.n / G), count = (pieces - (int)threadIdx.x + JOINT_THREADS - 1) / JOINT_THREADS;
    const piece *mine = (const piece *)joint_row + threadIdx.x;
    uint32_t at = (uint32_t)__cvta_generic_to_shared(mine);
    auto fetch = [&](int64_t r, int i) {
        const piece *from = (const piece *)(a.logits + r * a.row_stride) + threadIdx.x + i * JOINT_THREADS;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at + i * JOINT_THREADS * 16), "l"(from)
                     : "memory");
    };
    auto part_ends = [] { asm volatile("cp.async.commit_group;" ::: "memory"); };
    for (int i = 0; i < JOINT_PARTS * JOINT_FLIGHT; i++) {
        if (blockIdx.x < a.rows && i < count) fetch(blockIdx.x, i);
        if (i % JOINT_FLIGHT == JOINT_FLIGHT - 1) part_ends();
    }
    for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
        int64_t row = a.first + r, k = t.at(row), next = r + gridDim.x;
        bool outside = k < 0 || k >= a.n, dead = k == t.ignore || outside;
        float weight = dead ? 0 : t.weight ? t.weight[k] : 1, scale = dead ? 0 : weight * a.g[row * a.g_stride];
        int hit = dead ? -1 : (int)(k / G);
        running sums;
#pragma unroll
        for (int part = 0; part < JOINT_PARTS; part++) {
            int i = part * JOINT_FLIGHT;
            piece raw[JOINT_FLIGHT];
            joint_fetched(part);
            load_groups<JOINT_THREADS>(mine + i * JOINT_THREADS, 0, (count - i) * JOINT_THREADS, raw);
            if (i + JOINT_FLIGHT <= count) {
                sums.template add<JOINT_FLIGHT>(raw);
            } else {
#pragma unroll
                for (int u = 0; u < JOINT_FLIGHT; u++)
                    if (i + u < count) sums.template add<1>(raw + u);
            }
        }
        double lse = sums.lse(space, wide_space);
        float log_sum = (float)lse;
        if (threadIdx.x == 0) {
            a.lse[row] = log_sum;
            if (dead) a.out[row] = 0;
            if (outside && k != t.ignore) bad.report(row, k);
        }
        for (int i = 0; i < JOINT_PARTS * JOINT_FLIGHT; i += JOINT_FLIGHT) {
            piece raw[JOINT_FLIGHT];
            load_groups<JOINT_THREADS>(mine + i * JOINT_THREADS, 0, (count - i) * JOINT_THREADS, raw);
#pragma unroll
            for (int u = 0; u < JOINT_FLIGHT; u++) {
                int c = (i + u) * JOINT_THREADS + (int)threadIdx.x;
                float v[G];
                if (i + u >= count) break;
                raw[u].get(v);
                if (c == hit) a.out[row] = (float)((double)weight * (lse - (double)((const float *)joint_row)[k]));
#pragma unroll
                for (int j = 0; j < G; j++) {
                    v[j] = loss_exp<U>(v[j] - log_sum);
                    if (c == hit && j == k % G) v[j] -= 1;
                    v[j] = dead ? 0 : v[j] * scale;
                }
                store4(y + r * a.y_stride + (int64_t)c * G, v);
                if (next < a.rows) fetch(next, i + u);
            }
            part_ends();
        }
    }
}

/* ---- launching ---- */

/* may the dense kernels run? */
template <class T> static bool loss_is_dense(const loss_rows<T> &a, const loss_target<compute_t<T>> &t)
{
    return sizeof(T) < 8 && t.hard && !(t.smoothing > 0) && a.stride == 1 && a.row_stride % LOSS_GROUP == 0 &&
           a.n % LOSS_GROUP == 0 && a.n < INT32_MAX && (uintptr_t)a.logits % 16 == 0;
}

static unsigned row_blocks_of(int64_t rows) { return blocks_filling(rows, 1, 16); }

template <class T, class S>
static int run_loss(const char *op, const loss_rows<T> &r, const loss_target<compute_t<T>> &t, lac_cuda_reporter bad)
{
    unsigned blocks = row_blocks_of(r.rows);
    if constexpr (sizeof(T) < 8)
        if (loss_is_dense(r, t)) {
            launch(loss_dense<T>, blocks_filling(r.rows, 1, DENSE_BLOCKS), DENSE_THREADS, 0, r, t, bad);
            return lac_cuda_launched(op);
        }
    launch(loss_kernel<T, S>, blocks, LOSS_THREADS, 0, r, t, bad);
    return lac_cuda_launched(op);
}

template <class T, class S, class U>
static int run_gradient(const char *op, const loss_rows<T> &r, const loss_target<compute_t<T>> &t, U *y,
                        lac_cuda_reporter bad)
{
    unsigned blocks = row_blocks_of(r.rows);
    if constexpr (sizeof(T) < 8)
        if (loss_is_dense(r, t) && (uintptr_t)y % 16 == 0 && r.y_stride % LOSS_GROUP == 0) {
            launch(gradient_dense<T, U>, blocks, LOSS_THREADS, 0, r, t, y, bad);
            return lac_cuda_launched(op);
        }
    launch(gradient_kernel<T, S, U>, blocks, LOSS_THREADS, 0, r, t, y, bad);
    return lac_cuda_launched(op);
}

/* bytes of shared memory that a row may take */
template <class U> static int joint_most(const char *op, int64_t *bytes)
{
    static int most = 0;
    static cudaError_t allowed = [&] {
        cudaError_t e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
        most -= 1 << 10; /* what the kernel has besides */
        return e ? e : cudaFuncSetAttribute(loss_joint<U>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }();
    *bytes = most;
    return lac_cuda_check(op, allowed);
}

/* losses, log-sum-exps and gradients of rows whose gradients g are known before */
template <class T, class S, class U>
static int run_both(const char *op, const loss_rows<T> &r, const loss_target<compute_t<T>> &t, U *y,
                    lac_cuda_reporter bad)
{
    if constexpr (std::is_same_v<T, float>) {
        int64_t most, bytes = r.n * (int64_t)sizeof(T);
        LAC_TRY(joint_most<U>(op, &most));
        if (loss_is_dense(r, t) && r.n >= JOINT_LEAST && r.n <= JOINT_MOST && bytes <= most && (uintptr_t)y % 16 == 0 &&
            r.y_stride % LOSS_GROUP == 0) {
            launch(loss_joint<U>, blocks_filling(r.rows, 1, 1), JOINT_THREADS, (size_t)bytes, r, t, y, bad);
            return lac_cuda_launched(op);
        }
    }
    LAC_TRY((run_loss<T, S>(op, r, t, bad)));
    return run_gradient<T, S>(op, r, t, y, bad);
}

/* ---- arguments ---- */

/* class weights in the compute type and their sum, as scratch */
template <class C> struct loss_weights {
    lac_scratch *space = NULL;
    ~loss_weights() { delete space; }
};
template <class C> __global__ void __launch_bounds__(LOSS_THREADS) weight_sum(const C *w, int64_t n, double *total)
{
    previous_done();
    __shared__ double space[LOSS_THREADS / 32];
    double s = 0;
    for (int64_t i = threadIdx.x; i < n; i += LOSS_THREADS) s += (double)w[i];
    s = block_sum(s, space);
    if (threadIdx.x == 0) *total = s;
}

template <class C>
static int target_of(const char *op, const lac_loss *loss, const lac_view *target, int64_t n, loss_weights<C> *weights,
                     loss_target<C> *t)
{
    *t = {};
    t->ignore = loss->ignore;
    t->smoothing = (C)loss->smoothing;
    if (target->dtype <= LAC_BF16) {
        t->soft = target->data;
        t->soft_row = target->stride[0];
        t->soft_stride = target->stride[1];
    } else {
        t->hard = target->data;
        t->hard_stride = target->stride[0];
        t->wide = target->dtype == LAC_I64;
    }
    if (!loss->weight.data) return 0;
    weights->space = new lac_scratch(op, 8 + (size_t)n * sizeof(C));
    if (!weights->space->data) return LAC_E_MEMORY;
    double *total = (double *)weights->space->data;
    lac_a_copy copy = {};
    copy.x = copy.out = loss->weight;
    copy.out.data = total + 1;
    copy.out.dtype = sizeof(C) == 8 ? LAC_F64 : LAC_F32;
    copy.out.stride[0] = 1;
    LAC_TRY(lac_cuda_copy(&copy));
    t->weight = (C *)(total + 1);
    t->total = total;
    launch(weight_sum<C>, 1, LOSS_THREADS, 0, t->weight, n, total);
    return lac_cuda_launched(op);
}

/* ---- the mean over what the targets weigh, in one launch: the losses are few, and launches are what takes time ----
 */

enum { MEAN_THREADS = 1024 };
template <class C>
__global__ void __launch_bounds__(MEAN_THREADS)
    loss_mean_kernel(loss_target<C> t, int64_t classes, const C *losses, int64_t stride, int64_t rows, C *out, C *total)
{
    previous_done();
    __shared__ double space[MEAN_THREADS / 32];
    double sum = 0, all = 0;
#pragma unroll 4
    for (int64_t r = threadIdx.x; r < rows; r += MEAN_THREADS) {
        int64_t k = t.at(r);
        sum += (double)losses[r * stride];
        if (k != t.ignore) all += !t.weight ? 1 : k >= 0 && k < classes ? (double)t.weight[k] : 0;
    }
    sum = block_sum(sum, space);
    all = block_sum(all, space);
    if (threadIdx.x == 0) *out = (C)(sum / all), *total = (C)all;
}

extern "C" int lac_cuda_loss_mean(const lac_a_loss_mean *a)
{
    const char *op = "loss_mean";
    auto run = [&](auto zero) {
        typedef decltype(zero) C;
        loss_weights<C> weights;
        loss_target<C> t;
        int64_t classes = a->loss.weight.data ? a->loss.weight.shape[0] : 0;
        LAC_TRY(target_of<C>(op, &a->loss, &a->target, classes, &weights, &t));
        launch(loss_mean_kernel<C>, 1, MEAN_THREADS, 0, t, classes, (const C *)a->losses.data, a->losses.stride[0],
               a->losses.shape[0], (C *)a->out.data, (C *)a->total.data);
        return lac_cuda_launched(op);
    };
    return a->losses.dtype == LAC_F64 ? run(0.0) : run(0.0f);
}

/* ---- from logits ---- */

template <class T> static loss_rows<T> rows_of(const lac_view *x)
{
    loss_rows<T> a = {};
    a.logits = (const T *)x->data;
    a.row_stride = x->stride[0];
    a.stride = x->stride[1];
    a.rows = x->shape[0];
    a.n = x->shape[1];
    return a;
}

extern "C" int lac_cuda_cross_entropy(const lac_a_cross_entropy *a)
{
    const char *op = "cross_entropy";
    if (a->logits.shape[0] == 0) return 0;
    lac_cuda_reporter bad = lac_cuda_reporter_for("cross_entropy: target", a->logits.shape[1]);
    return dispatch_float(a->logits.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        typedef compute_t<T> C;
        loss_weights<C> weights;
        loss_target<C> t;
        LAC_TRY(target_of<C>(op, &a->loss, &a->target, a->logits.shape[1], &weights, &t));
        loss_rows<T> r = rows_of<T>(&a->logits);
        r.out = (C *)a->out.data;
        r.lse = (C *)a->lse.data;
        return run_loss<T, T>(op, r, t, bad);
    });
}

extern "C" int lac_cuda_cross_entropy_bwd(const lac_a_cross_entropy_bwd *a)
{
    const char *op = "cross_entropy_bwd";
    if (numel(&a->logits) == 0) return 0;
    lac_cuda_reporter bad = lac_cuda_reporter_for("cross_entropy_bwd: target", a->logits.shape[1]);
    return dispatch_float(a->logits.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        typedef compute_t<T> C;
        loss_weights<C> weights;
        loss_target<C> t;
        LAC_TRY(target_of<C>(op, &a->loss, &a->target, a->logits.shape[1], &weights, &t));
        loss_rows<T> r = rows_of<T>(&a->logits);
        r.lse = (C *)a->lse.data;
        r.g = (const C *)a->g.data;
        r.g_stride = a->g.stride[0];
        r.y_stride = r.n;
        return run_gradient<T, T>(op, r, t, (T *)a->out.data, bad);
    });
}

/* ---- fused with the projection ---- */

/* v as a dense tensor of `dtype`: itself, or a copy in scratch memory */
static int dense_of(const char *op, const lac_view *v, int dtype, lac_scratch **space, const void **data)
{
    *data = v->data;
    if (!v->data || (v->dtype == dtype && view_contiguous(v))) return 0;
    *space = new lac_scratch(op, (size_t)(numel(v) * dtype_bytes(dtype)));
    if (!(*space)->data) return LAC_E_MEMORY;
    lac_a_copy copy = {};
    copy.x = copy.out = *v;
    copy.out.data = (*space)->data;
    copy.out.dtype = dtype;
    for (int64_t d = v->ndim - 1, span = 1; d >= 0; span *= v->shape[d--]) copy.out.stride[d] = span;
    *data = copy.out.data;
    return lac_cuda_copy(&copy);
}

struct projection {
    const char *op;
    int64_t rows, width, classes, chunk;
    int dtype, plain; /* of the products' inputs; of logits: f32 or f64 */
    const void *x, *w, *bias;
    void *logits;
    lac_scratch *space[4] = {};
    ~projection()
    {
        for (lac_scratch *s : space) delete s;
    }
    /* elements between the rows of a chunk's gradient, which is where the logits are */
    int64_t gradient_step() const { return classes * dtype_bytes(plain) / dtype_bytes(dtype); }
    const void *x_at(int64_t row) const { return (const char *)x + row * width * dtype_bytes(dtype); }
};

static int projection_make(projection *p, const char *op, const lac_view *x, const lac_view *w, const lac_view *bias,
                           int64_t chunk, bool backward)
{
    p->op = op;
    p->rows = x->shape[0];
    p->width = x->shape[1];
    p->classes = w->shape[0];
    p->plain = x->dtype == LAC_F64 ? LAC_F64 : LAC_F32;
    p->dtype = backward && x->dtype == LAC_F16 ? LAC_F32 : x->dtype;
    p->chunk = chunk > 0 ? chunk : CHUNK_ELEMENTS / p->classes / 128 * 128;
    if (p->chunk < 128 && chunk <= 0) p->chunk = 128;
    if (p->chunk > p->rows) p->chunk = p->rows;
    LAC_TRY(dense_of(op, x, p->dtype, &p->space[0], &p->x));
    LAC_TRY(dense_of(op, w, p->dtype, &p->space[1], &p->w));
    LAC_TRY(dense_of(op, bias, p->plain, &p->space[2], &p->bias));
    p->space[3] = new lac_scratch(op, (size_t)(p->chunk * p->classes * dtype_bytes(p->plain)));
    p->logits = p->space[3]->data;
    return p->logits ? 0 : LAC_E_MEMORY;
}

/* logits of rows [at, at + m) into the chunk; a f64 bias is added by a copy, because cuBLASLt has no epilogue for it */
static int project(const projection *p, int64_t at, int64_t m)
{
    lac_cuda_gemm_args g = {};
    g.m = m, g.n = p->classes, g.k = p->width, g.batch = 1;
    g.a = p->x_at(at), g.b = p->w, g.c = p->logits;
    g.dtype = p->dtype, g.c_dtype = p->plain;
    g.b_transposed = true;
    g.lda = g.ldb = p->width, g.ldc = p->classes;
    if (p->bias && p->plain == LAC_F64) {
        lac_a_copy copy = {};
        copy.out.data = p->logits;
        copy.out.dtype = copy.x.dtype = p->plain;
        copy.out.ndim = copy.x.ndim = 2;
        copy.out.shape[0] = copy.x.shape[0] = m, copy.out.shape[1] = copy.x.shape[1] = p->classes;
        copy.out.stride[0] = p->classes, copy.out.stride[1] = copy.x.stride[1] = 1;
        copy.x.data = (void *)p->bias;
        LAC_TRY(lac_cuda_copy(&copy));
        g.accumulate = true;
    } else {
        g.bias = p->bias;
    }
    return lac_cuda_gemm(p->op, &g);
}

template <class C> static loss_rows<C> chunk_of(const projection *p, int64_t at, int64_t m)
{
    loss_rows<C> r = {};
    r.logits = (const C *)p->logits;
    r.row_stride = p->classes;
    r.stride = 1;
    r.first = at;
    r.rows = m;
    r.n = p->classes;
    return r;
}

extern "C" int lac_cuda_linear_cross_entropy(const lac_a_linear_ce *a)
{
    const char *op = "linear_cross_entropy";
    if (a->x.shape[0] == 0) return 0;
    lac_cuda_reporter bad = lac_cuda_reporter_for("linear_cross_entropy: target", a->w.shape[0]);
    projection p;
    LAC_TRY(projection_make(&p, op, &a->x, &a->w, &a->bias, a->chunk, false));
    return dispatch_float(a->x.dtype, [&](auto tag) {
        typedef typename decltype(tag)::type S;
        typedef compute_t<S> C;
        loss_weights<C> weights;
        loss_target<C> t;
        LAC_TRY(target_of<C>(op, &a->loss, &a->target, p.classes, &weights, &t));
        for (int64_t at = 0; at < p.rows; at += p.chunk) {
            int64_t m = p.rows - at < p.chunk ? p.rows - at : p.chunk;
            LAC_TRY(project(&p, at, m));
            loss_rows<C> r = chunk_of<C>(&p, at, m);
            r.out = (C *)a->out.data;
            r.lse = (C *)a->lse.data;
            LAC_TRY((run_loss<C, S>(op, r, t, bad)));
        }
        return 0;
    });
}

/* sums[c] (+)= column sums of d [m, n], rows in order and `step` apart */
template <class U>
__global__ void __launch_bounds__(THREADS)
    bias_kernel(const U *d, int64_t m, int64_t n, int64_t step, double *sums, bool first)
{
    previous_done();
    for (int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x; c < n; c += (int64_t)gridDim.x * THREADS) {
        double s = first ? 0 : sums[c];
        for (int64_t r = 0; r < m; r++) s += (double)to_compute(d[r * step + c]);
        sums[c] = s;
    }
}

/* scratch -> result, rounded once */
static int store_result(const void *from, int from_dtype, const lac_view *to)
{
    lac_a_copy copy = {};
    copy.out = copy.x = *to;
    copy.x.data = (void *)from;
    copy.x.dtype = from_dtype;
    return lac_cuda_copy(&copy);
}

/* dx and dw of one chunk, whose gradient lies in the logits' rows in the products' dtype */
static int chunk_products(const projection *p, int64_t at, int64_t m, void *dx, int dx_dtype, void *dw)
{
    lac_cuda_gemm_args g = {};
    g.m = m, g.n = p->width, g.k = p->classes, g.batch = 1;
    g.a = p->logits, g.b = p->w, g.c = (char *)dx + at * p->width * dtype_bytes(dx_dtype);
    g.dtype = p->dtype, g.c_dtype = dx_dtype;
    g.lda = p->gradient_step(), g.ldb = g.ldc = p->width;
    LAC_TRY(lac_cuda_gemm(p->op, &g));
    g.m = p->classes, g.k = m;
    g.b = p->x_at(at), g.c = dw;
    g.c_dtype = p->plain;
    g.a_transposed = true;
    g.accumulate = at > 0;
    return lac_cuda_gemm(p->op, &g);
}

extern "C" int lac_cuda_linear_cross_entropy_bwd(const lac_a_linear_ce_bwd *a)
{
    const char *op = "linear_cross_entropy_bwd";
    lac_a_fill none = {};
    if (a->x.shape[0] == 0) {
        none.x = a->dw;
        if (a->dbias.data) {
            lac_a_fill bias = {};
            bias.x = a->dbias;
            LAC_TRY(lac_cuda_fill(&bias));
        }
        return lac_cuda_fill(&none);
    }
    lac_cuda_reporter bad = lac_cuda_reporter_for("linear_cross_entropy_bwd: target", a->w.shape[0]);
    projection p;
    LAC_TRY(projection_make(&p, op, &a->x, &a->w, &a->bias, a->chunk, true));
    return dispatch_float(p.dtype, [&](auto product) {
        return dispatch_float(a->x.dtype, [&](auto tag) {
            typedef typename decltype(product)::type U;
            typedef typename decltype(tag)::type S;
            typedef compute_t<S> C;
            if constexpr (!std::is_same_v<compute_t<U>, C>) {
                return (int)LAC_E_INTERNAL; /* f64 with anything else: never asked for */
            } else {
                size_t size = (size_t)(p.classes * p.width);
                bool cast_dw = a->dw.dtype != p.plain, cast_dx = a->dx.dtype != p.dtype;
                lac_scratch dw(op, cast_dw ? size * sizeof(C) : 1);
                lac_scratch dx(op, cast_dx ? (size_t)(p.rows * p.width) * sizeof(U) : 1);
                lac_scratch sums(op, a->dbias.data ? (size_t)p.classes * 8 : 1);
                if (!dw.data || !dx.data || !sums.data) return (int)LAC_E_MEMORY;
                U *to = (U *)p.logits;
                void *dw_to = cast_dw ? dw.data : a->dw.data, *dx_to = cast_dx ? dx.data : a->dx.data;
                loss_weights<C> weights;
                loss_target<C> t;
                LAC_TRY(target_of<C>(op, &a->loss, &a->target, p.classes, &weights, &t));
                for (int64_t at = 0; at < p.rows; at += p.chunk) {
                    int64_t m = p.rows - at < p.chunk ? p.rows - at : p.chunk;
                    LAC_TRY(project(&p, at, m));
                    loss_rows<C> r = chunk_of<C>(&p, at, m);
                    r.out = (C *)a->out.data;
                    r.lse = (C *)a->lse.data;
                    r.g = (const C *)a->g.data;
                    r.g_stride = a->g.stride[0];
                    r.y_stride = p.gradient_step();
                    if (r.out) LAC_TRY((run_both<C, S>(op, r, t, to, bad)));
                    else LAC_TRY((run_gradient<C, S>(op, r, t, to, bad)));
                    LAC_TRY(chunk_products(&p, at, m, dx_to, cast_dx ? p.dtype : a->dx.dtype, dw_to));
                    if (!a->dbias.data) continue;
                    launch(bias_kernel<U>, blocks_for(p.classes, THREADS), THREADS, 0, to, m, p.classes, r.y_stride,
                           (double *)sums.data, at == 0);
                    LAC_TRY(lac_cuda_launched(op));
                }
                if (cast_dw) LAC_TRY(store_result(dw.data, p.plain, &a->dw));
                if (cast_dx) LAC_TRY(store_result(dx.data, p.dtype, &a->dx));
                if (a->dbias.data) LAC_TRY(store_result(sums.data, LAC_F64, &a->dbias));
                return 0;
            }
        });
    });
}
