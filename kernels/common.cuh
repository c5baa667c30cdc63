/* common.cuh: what the CUDA kernels share: the stream, errors, types, loop nests, block reductions.
 *
 * The plug-in is a library of its own and sees of the engine only headers and the services that the engine hands over
 * when it loads (backend.h, lac_engine): messages and scratch memory from the one pool. All work goes to one stream, in
 * order, so memory that the pool takes back while a kernel still reads it is safe to hand to the next kernel.
 *
 * Types. A kernel is a template over the storage type; arithmetic runs in compute_t<T>: double, float (also for f16 and
 * bf16) or int64_t, as on the CPU, and values are rounded once when they are stored. dispatch_*() turn a dtype number
 * into a type. bool is stored as bytes 0 and 1.
 *
 * Positions are 64 bits wide wherever a tensor may have more than 2^31 elements; strided nests count in 32 bits when
 * they can, because 64-bit division is a long subroutine on a GPU.
 * Rejected: one kernel per combination of strides, Thrust and CUB for what is a few lines here.
 */
#ifndef LAC_CUDA_COMMON_CUH
#define LAC_CUDA_COMMON_CUH
extern "C" {
#include "backend.h"
}
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>

/* ---- the device, as backend.cu found it ---- */

extern const lac_engine *lac_cuda_engine;
extern int lac_cuda_processors; /* multiprocessors */
/* The stream of the operators, after waiting until all that was queued is with the driver (launcher.cu): what is given
 * this stream comes after it. Asked for at each use, never kept. */
cudaStream_t lac_cuda_stream(void);
/* Queues a call of the driver like a launch: run is given a copy of the data and the stream, here or in another thread,
 * and returns 0, a CUDA error, or LAC_CUDA_BLAS + an error of cuBLAS. Returns what run returned, 0 if it was queued. */
int lac_cuda_later(int (*run)(const void *data, cudaStream_t to), const void *data, size_t bytes);
enum { LAC_CUDA_BLAS = 1 << 16 };
/* memset and memcpy on the device, queued so; and a copy of pageable host memory, which may be written at once */
cudaError_t lac_cuda_fill_bytes(void *at, int byte, size_t bytes);
cudaError_t lac_cuda_copy_bytes(void *to, const void *from, size_t bytes);
cudaError_t lac_cuda_upload(void *to, const void *from, size_t bytes);
/* Lets launches of a kernel have so much shared memory. The driver is asked only for more than before: it has locks,
 * and while the launcher's thread holds one, a call of the driver here may take as long as a sleep. */
cudaError_t lac_cuda_shared(const void *kernel, size_t bytes);
/* as <<<>>> does, of a kernel whose `count` arguments have so many bytes (launch.cuh has one that is easier to call) */
void lac_cuda_launch_after(const void *kernel, dim3 grid, unsigned threads, size_t shared, void **arguments,
                           const uint32_t *bytes, int count);
/* a CUDA error of `op` as a status; 0 for success */
int lac_cuda_check(const char *op, cudaError_t error);
/* after a launch: reports what the launch itself refused, remembers the operator for errors that surface later */
int lac_cuda_launched(const char *op);
/* device memory to the host; waits */
int lac_cuda_read(const char *op, void *to, const void *from, size_t bytes);
/* Index errors are found on the device: a kernel leaves a note in host memory, and the host reads it at its next launch
 * or wait. Only the first thread that finds one writes. */
struct lac_cuda_fault {
    int raised, op; /* op: number of the operator's name */
    long long number, value, size;
};
struct lac_cuda_reporter {
    lac_cuda_fault *cell; /* pinned host memory */
    int *claimed;         /* device memory */
    int op;
    int64_t size; /* of the axis */
    __device__ void report(int64_t number, int64_t value) const
    {
        if (atomicExch(claimed, 1)) return;
        cell->op = op;
        cell->number = number;
        cell->value = value;
        cell->size = size;
        __threadfence_system();
        *(volatile int *)&cell->raised = 1;
    }
};
/* `what` ("gather: index") must live for ever */
lac_cuda_reporter lac_cuda_reporter_for(const char *what, int64_t size);

#define CUDA_TRY(op, expression) LAC_TRY(lac_cuda_check(op, expression))

/* device memory for the duration of one operator; `data` is NULL (and the message set) when there is none */
struct lac_scratch {
    void *data, *block;
    lac_scratch(const char *op, size_t bytes) { data = lac_cuda_engine->scratch_get(op, bytes, &block); }
    ~lac_scratch()
    {
        if (data) lac_cuda_engine->scratch_put(block);
    }
    lac_scratch(const lac_scratch &) = delete;
    lac_scratch &operator=(const lac_scratch &) = delete;
};

/* every operator of the table; those that do not exist on this device have no definition (backend.cu) */
#define LAC_OP(name, args, gradient) extern "C" int lac_cuda_##name(const args *a);
#include "ops.def"
#undef LAC_OP

/* ---- types ---- */

typedef __half f16;
typedef __nv_bfloat16 bf16;
struct bool8 { /* a bool tensor's element; distinct from u8 so that stores normalise */
    uint8_t value;
};

template <class T> struct compute {
    typedef int64_t type;
};
template <> struct compute<double> {
    typedef double type;
};
template <> struct compute<float> {
    typedef float type;
};
template <> struct compute<f16> {
    typedef float type;
};
template <> struct compute<bf16> {
    typedef float type;
};
template <class T> using compute_t = typename compute<T>::type;
template <class T> inline constexpr bool is_float_v = !std::is_same_v<compute_t<T>, int64_t>;

template <class T> __device__ __forceinline__ compute_t<T> to_compute(T x) { return (compute_t<T>)x; }
template <> __device__ __forceinline__ float to_compute<f16>(f16 x) { return __half2float(x); }
template <> __device__ __forceinline__ float to_compute<bf16>(bf16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ int64_t to_compute<bool8>(bool8 x) { return x.value; }

template <class T, class C> __device__ __forceinline__ T from_compute(C x) { return (T)x; }
template <> __device__ __forceinline__ f16 from_compute<f16, float>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 from_compute<bf16, float>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ bool8 from_compute<bool8, int64_t>(int64_t x) { return {(uint8_t)(x != 0)}; }

inline int64_t dtype_bytes(int dtype)
{
    static const uint8_t bytes[LAC_DTYPES] = {8, 4, 2, 2, 8, 4, 1, 1};
    return bytes[dtype];
}

template <class T> struct type_tag {
    typedef T type;
};
/* calls f with the tag of a floating-point dtype */
template <class F> int dispatch_float(int dtype, F &&f)
{
    switch (dtype) {
    case LAC_F64:
        return f(type_tag<double>());
    case LAC_F32:
        return f(type_tag<float>());
    case LAC_F16:
        return f(type_tag<f16>());
    default:
        return f(type_tag<bf16>());
    }
}
template <class F> int dispatch_any(int dtype, F &&f)
{
    switch (dtype) {
    case LAC_I64:
        return f(type_tag<int64_t>());
    case LAC_I32:
        return f(type_tag<int32_t>());
    case LAC_U8:
        return f(type_tag<uint8_t>());
    case LAC_BOOL:
        return f(type_tag<bool8>());
    default:
        return dispatch_float(dtype, f);
    }
}
/* by size alone: for operators that only move bytes */
template <class F> int dispatch_bytes(int dtype, F &&f)
{
    switch (dtype_bytes(dtype)) {
    case 1:
        return f(type_tag<uint8_t>());
    case 2:
        return f(type_tag<uint16_t>());
    case 4:
        return f(type_tag<uint32_t>());
    default:
        return f(type_tag<uint64_t>());
    }
}

/* ---- loop nests over strided views of one shape ---- */

enum { NEST_VIEWS = 5 };
/* axes sorted by the first view's strides and merged where all views allow it; the last axis is the innermost */
struct nest {
    int ndim, views;
    int64_t total;
    int64_t shape[LAC_MAX_DIMS], stride[NEST_VIEWS][LAC_MAX_DIMS]; /* bytes */
    char *data[NEST_VIEWS];
    bool small; /* positions and byte offsets fit 31 bits */
};
nest nest_make(int views, const lac_view *const *view);
/* is view v of the nest one contiguous run (true) or a repeated scalar? -1: neither */
enum { RUN_STRIDED = -1, RUN_SCALAR = 0, RUN_DENSE = 1 };
int nest_run(const nest &n, int v, int64_t bytes);

/* Division by a constant (Granlund and Montgomery 1994): n / d for n, d < 2^31 */
struct divider {
    uint32_t d, multiply, shift;
    divider() = default;
    explicit divider(uint32_t by) : d(by), multiply(0), shift(0)
    {
        while (((uint64_t)1 << shift) < d) shift++;
        multiply = (uint32_t)((((uint64_t)1 << 32) * (((uint64_t)1 << shift) - d)) / d + 1);
    }
    __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiply) + n) >> shift; }
};

/* what a strided kernel gets: offsets in bytes of every view at row-major position `at` */
struct nest32 {
    int ndim, views;
    divider div[LAC_MAX_DIMS];
    uint32_t shape[LAC_MAX_DIMS];
    int32_t stride[NEST_VIEWS][LAC_MAX_DIMS];
    template <int V> __device__ __forceinline__ void offsets(uint32_t at, int32_t (&offset)[V]) const
    {
#pragma unroll
        for (int v = 0; v < V; v++) offset[v] = 0;
#pragma unroll
        for (int d = LAC_MAX_DIMS - 1; d >= 0; d--) {
            if (d >= ndim) continue;
            uint32_t q = d ? div[d].divide(at) : 0, i = at - q * shape[d];
            at = q;
#pragma unroll
            for (int v = 0; v < V; v++) offset[v] += (int32_t)i * stride[v][d];
        }
    }
};
struct nest64 {
    int ndim, views;
    int64_t shape[LAC_MAX_DIMS];
    int64_t stride[NEST_VIEWS][LAC_MAX_DIMS];
    template <int V> __device__ __forceinline__ void offsets(int64_t at, int64_t (&offset)[V]) const
    {
#pragma unroll
        for (int v = 0; v < V; v++) offset[v] = 0;
        for (int d = ndim - 1; d >= 0; d--) {
            int64_t q = d ? at / shape[d] : 0, i = at - q * shape[d];
            at = q;
#pragma unroll
            for (int v = 0; v < V; v++) offset[v] += i * stride[v][d];
        }
    }
};
nest32 nest_32(const nest &n);
nest64 nest_64(const nest &n);

/* elements from v's start to row-major position `at` (any rank), for kernels that take single views */
struct view_walk {
    int ndim;
    int64_t shape[LAC_MAX_DIMS], stride[LAC_MAX_DIMS];
    __device__ __forceinline__ int64_t offset(int64_t at) const
    {
        int64_t to = 0;
        for (int d = ndim - 1; d >= 0; d--) {
            int64_t q = d ? at / shape[d] : 0;
            to += (at - q * shape[d]) * stride[d];
            at = q;
        }
        return to;
    }
};
/* axes [first, last) of v, merged */
view_walk walk_axes(const lac_view *v, int first, int last);
bool view_contiguous(const lac_view *v);

/* ---- launch shapes ---- */

enum { THREADS = 256 };
inline unsigned blocks_for(int64_t work, int64_t per_block)
{
    int64_t blocks = (work + per_block - 1) / per_block;
    return (unsigned)(blocks < 1 ? 1 : blocks > 0x7fffffff ? 0x7fffffff : blocks);
}
/* blocks of a grid whose threads loop: enough to fill the device `waves` times, no more than the work */
inline unsigned blocks_filling(int64_t work, int64_t per_block, int waves = 8)
{
    int64_t blocks = (work + per_block - 1) / per_block, most = (int64_t)lac_cuda_processors * waves;
    return (unsigned)(blocks < 1 ? 1 : blocks > most ? most : blocks);
}

/* ---- reductions inside a warp and a block, in a fixed order ---- */

template <class T> __device__ __forceinline__ T warp_sum(T x)
{
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
template <class T> __device__ __forceinline__ T warp_max(T x)
{
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        T y = __shfl_xor_sync(0xffffffffu, x, o);
        x = y > x ? y : x;
    }
    return x;
}
/* sums over the block, the same in every thread; `space` holds one value per warp and may be reused after the call */
template <class T> __device__ __forceinline__ T block_sum(T x, T *space)
{
    int warps = (int)(blockDim.x + 31) / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    x = warp_sum(x);
    if (lane == 0) space[warp] = x;
    __syncthreads();
    T total = 0;
    for (int w = 0; w < warps; w++) total += space[w];
    __syncthreads();
    return total;
}
template <class T> __device__ __forceinline__ T block_max(T x, T *space)
{
    int warps = (int)(blockDim.x + 31) / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    x = warp_max(x);
    if (lane == 0) space[warp] = x;
    __syncthreads();
    T best = space[0];
    for (int w = 1; w < warps; w++) best = space[w] > best ? space[w] : best;
    __syncthreads();
    return best;
}

#endif
