/* launcher.cu: the stream of the operators, and how calls get to the driver: launches, and what else comes in order.
 *
 * A call of the driver is copied into a ring, and a thread makes it (launcher.h). lac_cuda_stream() is the only way to
 * the stream, and it waits for the ring: so whatever is given the stream comes after all that was queued, and no place
 * can forget it. Calls that return nothing that the host needs at once go through the ring as well (lac_cuda_later()):
 * fills, copies on the device and to it, cuBLAS's products, sorting, the marks of streams.cu.
 *
 * What a launch can be refused for is found by its caller. The first launch of a kernel, or with more threads or shared
 * memory than any before, is made by the caller itself, and so is the first product of a shape. So what fails in the
 * thread is mostly a device that is broken, as ever reported by a later call. A kernel's limit of shared memory is
 * only ever raised: lowered, it could meet launches that are still queued.
 *
 * The driver has locks, and a thread that finds one taken sleeps. When attention still asked for its kernels'
 * attributes and launched by <<<>>> while the other thread launched, the fastest training steps took 1.1 to 4
 * times as long as without a thread, but in one of nine cases. So between two waits the script's own thread calls the
 * driver for nothing: what can be known is remembered (lac_cuda_shared()), and all that comes in order goes through the
 * ring.
 *
 * Between the beginning and the end of a capture, and with LACUNA_CUDA_SYNC=1 or LACUNA_CUDA_LAUNCHER=0, every call is
 * its caller's.
 */
#include "launch.cuh"
#include "streams.cuh"
#include <cstdlib>
#include <cstring>
#include <cuda.h>
#include "launcher.h"

enum { KERNELS_KNOWN = 4096, MOST_ARGUMENTS = 64, UPLOAD = 16 << 10 };
struct known_kernel {
    const void *kernel;
    CUfunction function;
    unsigned threads; /* the most that the driver has accepted */
    size_t shared;
    size_t limit;  /* of shared memory that it may ask for; 0: what all may */
    bool overlaps; /* may it start while the kernel before it ends? */
};
static known_kernel known[KERNELS_KNOWN];
static CUresult (*driver_launch)(const CUlaunchConfig *, CUfunction, void **, void **);
static bool device_overlaps; /* has the device programmatic dependent launch? */
static cudaStream_t stream;
static lac_launcher launcher;
static int failed; /* of a call that its caller made */

int64_t lac_cuda_operators;

static int begin(void)
{
    pthread_setname_np(pthread_self(), "lacuna-launcher");
    return cudaSetDevice(0);
}
static void stop(void) { lac_launcher_stop(&launcher); }
static void forked(void) { lac_launcher_forked(&launcher); }

cudaError_t lac_cuda_launcher_open(int major, bool synchronous)
{
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error) return error;
    cudaDriverEntryPointQueryResult found;
    void *entry = NULL;
    error = cudaGetDriverEntryPointByVersion("cuLaunchKernelEx", &entry, 12000, cudaEnableDefault, &found);
    if (error == cudaSuccess && found == cudaDriverEntryPointSuccess)
        driver_launch = (CUresult(*)(const CUlaunchConfig *, CUfunction, void **, void **))entry;
    cudaGetLastError();
    device_overlaps = major >= 9;
    const char *wanted = getenv("LACUNA_CUDA_LAUNCHER");
    if (synchronous || (wanted && strcmp(wanted, "0") == 0)) return cudaSuccess;
    lac_launcher_start(&launcher, begin);
    if (launcher.on && (atexit(stop) || pthread_atfork(NULL, NULL, forked))) lac_launcher_stop(&launcher);
    return cudaSuccess;
}

cudaStream_t lac_cuda_stream(void)
{
    lac_launcher_settle(&launcher);
    return stream;
}

int lac_cuda_failed(int64_t *number)
{
    *number = lac_cuda_operators;
    int code = failed;
    failed = 0;
    return code ? code : lac_launcher_failed(&launcher, number);
}

/* ---- kernels ---- */

/* The driver's name for a kernel, or NULL if the runtime does not say or the table is full. Only what was compiled from
 * PTX of Hopper and later waits by itself (launch.cuh), so only that may start early: not what a Hopper runs that was
 * made from an older device's PTX. */
static known_kernel *function_of(const void *kernel)
{
    uint64_t at = (uint64_t)(uintptr_t)kernel * UINT64_C(0x9e3779b97f4a7c15) >> 52;
    for (int i = 0; i < 16; i++, at = (at + 1) % KERNELS_KNOWN) {
        if (known[at].kernel == kernel) return &known[at];
        if (known[at].kernel) continue;
        CUfunction f = NULL;
        cudaFuncAttributes made;
        if (cudaGetFuncBySymbol((cudaFunction_t *)&f, kernel) != cudaSuccess ||
            cudaFuncGetAttributes(&made, kernel) != cudaSuccess)
            return cudaGetLastError(), (known_kernel *)NULL;
        known[at] = {kernel, f, 0, 0, 0, device_overlaps && made.ptxVersion >= 90};
        return &known[at];
    }
    return NULL;
}

/* a launch; in the ring its arguments follow, `at` bytes from its beginning */
struct kernel_call {
    CUfunction function;
    unsigned grid[3], threads, shared;
    uint16_t overlaps, count, at[MOST_ARGUMENTS];
};

static int launch_now(const kernel_call *k, void **arguments)
{
    CUlaunchAttribute overlap;
    overlap.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    overlap.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig c;
    c.gridDimX = k->grid[0], c.gridDimY = k->grid[1], c.gridDimZ = k->grid[2];
    c.blockDimX = k->threads, c.blockDimY = c.blockDimZ = 1;
    c.sharedMemBytes = k->shared;
    c.hStream = stream;
    c.attrs = &overlap;
    c.numAttrs = k->overlaps;
    CUresult result = driver_launch(&c, k->function, arguments, NULL);
    if (result == CUDA_ERROR_INVALID_CONTEXT || result == CUDA_ERROR_CONTEXT_IS_DESTROYED) { /* a thread's first call */
        cudaSetDevice(0);
        result = driver_launch(&c, k->function, arguments, NULL);
    }
    return (int)result; /* one numbering with the runtime's */
}

static int run_kernel(void *data)
{
    const kernel_call *k = (const kernel_call *)data;
    void *arguments[MOST_ARGUMENTS];
    for (int i = 0; i < k->count; i++) arguments[i] = (char *)data + k->at[i];
    return launch_now(k, arguments);
}

/* where an argument of so many bytes goes: aligned as its type may be */
static size_t place(size_t from, size_t bytes)
{
    enum { HEADER = sizeof(lac_record), LINE = LAC_LAUNCHER_LINE };
    size_t to = bytes & (~bytes + 1);
    if (to > LINE) to = LINE;
    return (HEADER + from + to - 1) / to * to - HEADER;
}

cudaError_t lac_cuda_shared(const void *kernel, size_t bytes)
{
    known_kernel *k = function_of(kernel);
    if (k && bytes <= k->limit) return cudaSuccess;
    lac_launcher_settle(&launcher);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (k && !error) k->limit = bytes;
    return error;
}

static void launch_call(const void *kernel, dim3 grid, unsigned threads, size_t shared, void **arguments,
                        const uint32_t *bytes, int count, bool early)
{
    known_kernel *k = driver_launch ? function_of(kernel) : NULL;
    if (!k) { /* keeps its error itself */
        cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared, lac_cuda_stream());
        return;
    }
    kernel_call c;
    c.function = k->function;
    c.grid[0] = grid.x, c.grid[1] = grid.y, c.grid[2] = grid.z;
    c.threads = threads, c.shared = (unsigned)shared;
    c.overlaps = early && k->overlaps;
    const bool accepted = threads <= k->threads && shared <= k->shared && grid.y < 1 << 16 && grid.z < 1 << 16 &&
                          grid.x && grid.y && grid.z && count <= MOST_ARGUMENTS;
    if (accepted && !lac_cuda_capturing) {
        size_t end = offsetof(kernel_call, at) + sizeof *c.at * (size_t)count;
        const size_t head = end;
        for (int i = 0; i < count; i++) end = (c.at[i] = (uint16_t)place(end, bytes[i])) + bytes[i];
        c.count = (uint16_t)count;
        char *to = end < UINT16_MAX ? (char *)lac_launcher_take(&launcher, end) : NULL;
        if (to) {
            memcpy(to, &c, head);
            for (int i = 0; i < count; i++) memcpy(to + c.at[i], arguments[i], bytes[i]);
            return lac_launcher_give(&launcher, run_kernel, lac_cuda_operators);
        }
    } else {
        lac_launcher_settle(&launcher);
    }
    const int code = launch_now(&c, arguments);
    if (!code) {
        if (k->threads < threads) k->threads = threads;
        if (k->shared < shared) k->shared = shared;
    } else if (!failed) {
        failed = code;
    }
}

void lac_cuda_launch(const void *kernel, dim3 grid, unsigned threads, size_t shared, void **arguments,
                     const uint32_t *bytes, int count)
{
    launch_call(kernel, grid, threads, shared, arguments, bytes, count, true);
}
void lac_cuda_launch_after(const void *kernel, dim3 grid, unsigned threads, size_t shared, void **arguments,
                           const uint32_t *bytes, int count)
{
    launch_call(kernel, grid, threads, shared, arguments, bytes, count, false);
}

/* ---- other calls ---- */

struct other_call {
    int (*run)(const void *data, cudaStream_t to);
};

static int run_other(void *data)
{
    other_call *c = (other_call *)data;
    const int code = c->run(c + 1, stream);
    cudaGetLastError(); /* of this thread, where nobody else asks: CUB would take it for its own */
    return code;
}

int lac_cuda_later(int (*run)(const void *data, cudaStream_t to), const void *data, size_t bytes)
{
    other_call *c = lac_cuda_capturing ? NULL : (other_call *)lac_launcher_take(&launcher, sizeof *c + bytes);
    if (!c) return run(data, stream);
    c->run = run;
    memcpy(c + 1, data, bytes);
    lac_launcher_give(&launcher, run_other, lac_cuda_operators);
    return 0;
}

struct fill_call {
    void *at;
    size_t bytes;
    int byte;
};
static int run_fill(const void *data, cudaStream_t to)
{
    const fill_call *f = (const fill_call *)data;
    return cudaMemsetAsync(f->at, f->byte, f->bytes, to);
}
cudaError_t lac_cuda_fill_bytes(void *at, int byte, size_t bytes)
{
    const fill_call f = {at, bytes, byte};
    return (cudaError_t)lac_cuda_later(run_fill, &f, sizeof f);
}

struct copy_call {
    void *to;
    const void *from;
    size_t bytes;
};
static int run_copy(const void *data, cudaStream_t to)
{
    const copy_call *c = (const copy_call *)data;
    return cudaMemcpyAsync(c->to, c->from, c->bytes, cudaMemcpyDeviceToDevice, to);
}
cudaError_t lac_cuda_copy_bytes(void *to, const void *from, size_t bytes)
{
    const copy_call c = {to, from, bytes};
    return (cudaError_t)lac_cuda_later(run_copy, &c, sizeof c);
}

/* of pageable memory, so the bytes have been read when the driver's call returns; long ones are not copied twice */
struct upload_call {
    void *to;
    size_t bytes;
};
static int run_upload(void *data)
{
    const upload_call *u = (const upload_call *)data;
    const int code = cudaMemcpyAsync(u->to, u + 1, u->bytes, cudaMemcpyHostToDevice, stream);
    cudaGetLastError();
    return code;
}
cudaError_t lac_cuda_upload(void *to, const void *from, size_t bytes)
{
    upload_call *u = NULL;
    if (bytes <= UPLOAD && !lac_cuda_capturing) u = (upload_call *)lac_launcher_take(&launcher, sizeof *u + bytes);
    if (!u) return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, lac_cuda_stream());
    *u = {to, bytes};
    memcpy(u + 1, from, bytes);
    lac_launcher_give(&launcher, run_upload, lac_cuda_operators);
    return cudaSuccess;
}
