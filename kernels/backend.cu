/* backend.cu: the CUDA plug-in's entry point, its memory, and how errors reach the script.
 *
 * The engine opens this library at run time and calls lac_backend_v1(). It answers with a table of operators, or
 * with NULL and the reason why this machine cannot run them (no driver, no device, a device that is too old), which
 * `lacuna devices` prints word for word. The CUDA runtime is linked statically, so that a machine without a toolkit
 * needs nothing but the driver. A slot that is still empty is an error that names the operator, never a silent move
 * to the CPU. Rejected: linking CUDA into the engine itself, which would make one binary for both kinds of machine
 * impossible.
 *
 * Kernels run behind the script's back, and most are launched there, too (launcher.cu). An error of a launch is
 * reported at once, or with the operator's name by the next one or a wait. An index outside its axis is found by the
 * kernel, which leaves a note in host memory; the next launch or wait turns it into the same message that the CPU
 * gives. A fault of the hardware (a broken kernel) surfaces at the next launch or wait, with the names of the operators
 * queued since the last wait, and stays: the driver accepts nothing more from this process, so every later call gives
 * that first message again. With LACUNA_CUDA_SYNC=1 every operator waits, and the name is exact.
 */
#include "launch.cuh"
#include "streams.cuh"
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

const lac_engine *lac_cuda_engine;
int lac_cuda_processors;

static char text[512];
static bool synchronous;

extern "C" int lac_fail(int status, const char *format, ...)
{
    char message[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return lac_cuda_engine->fail(status, message);
}

/* ---- errors ---- */

/* KNOWN: more than the launcher's ring holds */
enum { RECENT = 16, KNOWN = 8192, FAULT_NAMES = 32 };
static const char *names[KNOWN];  /* of operators, by their number */
static int64_t waited;            /* how many had been queued at the last wait */
enum { MOST_SHARED = 227 << 10 }; /* what the largest kernels ask for */
static int shared_most = MOST_SHARED;
static char broken[768]; /* the message of the fault that ended the use of the device */
static lac_cuda_fault *fault;
static int *fault_claimed;
static const char *fault_names[FAULT_NAMES];

lac_cuda_reporter lac_cuda_reporter_for(const char *what, int64_t size)
{
    int i = 0;
    for (; i < FAULT_NAMES - 1 && fault_names[i]; i++)
        if (strcmp(fault_names[i], what) == 0) break;
    fault_names[i] = what;
    return {fault, fault_claimed, i, size};
}

/* the note that a kernel left, as an error; the note is cleared */
static int fault_report(void)
{
    if (!*(volatile int *)&fault->raised) return 0;
    lac_cuda_fault f = *fault;
    memset(fault, 0, sizeof *fault);
    cudaMemsetAsync(fault_claimed, 0, sizeof *fault_claimed, lac_cuda_stream());
    LAC_FAIL(INDEX, "%s number %lld is %lld (counted from 0), outside 0..%lld", fault_names[f.op], f.number + 1,
             f.value, f.size - 1);
}

/* did an earlier kernel fail, so that the driver refuses everything from now on? */
static bool is_fault(cudaError_t error)
{
    switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
        return true;
    default:
        return false;
    }
}

/* the first time with the operators that may have done it */
static int report_broken(const char *op, cudaError_t error)
{
    if (!broken[0]) {
        int64_t i = lac_cuda_operators - waited < RECENT ? waited : lac_cuda_operators - RECENT;
        int at = 0;
        char list[400] = "";
        const char *last = NULL;
        for (; i < lac_cuda_operators && at < (int)sizeof list - 40; i++) { /* runs of one name once */
            const char *name = names[i % KNOWN];
            if (last && strcmp(last, name) == 0) continue;
            at += snprintf(list + at, sizeof list - (size_t)at, "%s%s", last ? ", " : "", name);
            last = name;
        }
        snprintf(broken, sizeof broken, "%s: %s in %s%s%s. The device cannot be used any more by this process", op,
                 cudaGetErrorString(error),
                 synchronous ? "operator " : "one of the operators queued since the last wait: ",
                 list[0] ? (synchronous ? last : list) : "none is known",
                 synchronous ? "" : " (LACUNA_CUDA_SYNC=1 waits for each and says which)");
    }
    LAC_FAIL(INTERNAL, "%s", broken);
}

int lac_cuda_check(const char *op, cudaError_t error)
{
    if (error == cudaSuccess) return 0;
    cudaGetLastError();
    if (error >= cudaErrorStreamCaptureUnsupported && error <= cudaErrorCapturedEvent)
        LAC_FAIL(ARGUMENT, "%s: cannot be captured in a graph: it waits for the device or copies from the host", op);
    if (broken[0] || is_fault(error)) return report_broken(op, error);
    if (error == cudaErrorMemoryAllocation) LAC_FAIL(MEMORY, "%s: out of memory on cuda", op);
    if (error == cudaErrorInvalidValue && strcmp(op, "attention") == 0 && shared_most < MOST_SHARED)
        LAC_FAIL(DEVICE,
                 "attention: this device gives a block %d KB of shared memory, and the kernel for this head_dim and "
                 "dtype needs more (up to %d KB): use a smaller head_dim",
                 shared_most >> 10, MOST_SHARED >> 10);
    LAC_FAIL(INTERNAL, "%s: %s: %s", op, cudaGetErrorName(error), cudaGetErrorString(error));
}

/* what a call of the driver returned that was made since this was last asked, by a caller or by the launcher's thread;
 * a fault is nobody's */
static int check_calls(const char *op)
{
    int64_t number;
    const int code = lac_cuda_failed(&number);
    const char *const own = op;
    if (!code) return 0;
    if (number < lac_cuda_operators && lac_cuda_operators - number <= KNOWN && !is_fault((cudaError_t)code))
        op = names[number % KNOWN];
    if (code < LAC_CUDA_BLAS) return lac_cuda_check(op, (cudaError_t)code);
    /* cuBLAS does not say that the device had failed before */
    const cudaError_t device = lac_cuda_capturing ? cudaSuccess : cudaStreamQuery(lac_cuda_stream());
    if (device == cudaErrorNotReady) cudaGetLastError();
    if (broken[0] || is_fault(device)) return lac_cuda_check(own, is_fault(device) ? device : cudaErrorLaunchFailure);
    LAC_FAIL(INTERNAL, "%s: cuBLAS: %s", op, lac_cuda_blas_text(code - LAC_CUDA_BLAS));
}

int lac_cuda_settled(const char *op)
{
    lac_cuda_stream();
    return check_calls(op);
}

static int wait(const char *op)
{
    if (lac_cuda_capturing)
        LAC_FAIL(ARGUMENT, "%s: the host waits for a result here, and a graph runs later: do it outside of the graph",
                 op);
    cudaStream_t stream = lac_cuda_stream();
    LAC_TRY(check_calls(op));
    LAC_TRY(lac_cuda_check(op, cudaStreamSynchronize(stream)));
    waited = lac_cuda_operators;
    return fault_report();
}

int lac_cuda_launched(const char *op)
{
    names[lac_cuda_operators++ % KNOWN] = op;
    cudaError_t error = cudaGetLastError();
    if (broken[0] && !error) error = cudaErrorLaunchFailure;
    LAC_TRY(lac_cuda_check(op, error));
    LAC_TRY(check_calls(op));
    lac_cuda_mark();
    return synchronous ? wait(op) : fault_report();
}

/* ---- memory ---- */

static int runtime_allocate(size_t bytes, void **out)
{
    cudaError_t error = cudaMalloc(out, bytes ? bytes : 1);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        LAC_FAIL(MEMORY, "the device refused");
    }
    return lac_cuda_check("allocate", error);
}

static int runtime_release(void *p)
{
    lac_cuda_stream(); /* what is queued may use it: the driver is to wait for that, too */
    return lac_cuda_check("release", cudaFree(p));
}

static int runtime_transfer(void *to, const void *from, size_t bytes, bool to_host)
{
    if (lac_cuda_capturing && !to_host)
        LAC_FAIL(ARGUMENT,
                 "copy: a graph would repeat the bytes that the cpu has now: bring the tensor over before, or "
                 "give it to the graph as an argument");
    if (lac_cuda_capturing || bytes == 0) return to_host ? wait("copy") : 0;
    if (to_host) CUDA_TRY("copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, lac_cuda_stream()));
    else CUDA_TRY("copy", lac_cuda_upload(to, from, bytes));
    LAC_TRY(lac_cuda_launched("copy"));
    return to_host ? wait("copy") : 0;
}

int lac_cuda_read(const char *op, void *to, const void *from, size_t bytes)
{
    if (lac_cuda_capturing) return wait(op);
    CUDA_TRY(op, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, lac_cuda_stream()));
    return wait(op);
}

static int runtime_synchronize(void)
{
    LAC_TRY(wait("synchronize"));
    return lac_cuda_check("synchronize", lac_cuda_copies_wait());
}

int lac_cuda_idle(const char *op)
{
    if (synchronous) LAC_FAIL(ARGUMENT, "%s: LACUNA_CUDA_SYNC waits for every operator, a graph cannot", op);
    return runtime_synchronize();
}

static int runtime_memory(size_t *available, size_t *total)
{
    return lac_cuda_check("memory", cudaMemGetInfo(available, total));
}

/* ---- loop nests ---- */

bool view_contiguous(const lac_view *v)
{
    int64_t expected = 1;
    for (int i = v->ndim - 1; i >= 0; i--) {
        if (v->shape[i] == 0) return true;
        if (v->shape[i] != 1 && v->stride[i] != expected) return false;
        expected *= v->shape[i];
    }
    return true;
}

static int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

nest nest_make(int views, const lac_view *const *view)
{
    nest r = {};
    const lac_view *out = view[0];
    int order[LAC_MAX_DIMS], n = 0;
    for (int d = 0; d < out->ndim; d++) {
        if (out->shape[d] == 1) continue;
        int at = n++;
        for (; at > 0 && magnitude(out->stride[order[at - 1]]) < magnitude(out->stride[d]); at--)
            order[at] = order[at - 1];
        order[at] = d;
    }
    r.views = views;
    r.total = 1;
    for (int i = 0; i < n; i++) {
        int d = order[i];
        int64_t size = out->shape[d], stride[NEST_VIEWS];
        bool merge = r.ndim > 0;
        for (int v = 0; v < views; v++) {
            stride[v] = view[v]->stride[d] * dtype_bytes(view[v]->dtype);
            merge = merge && r.stride[v][r.ndim - 1] == stride[v] * size;
        }
        if (merge) r.shape[r.ndim - 1] *= size;
        else r.shape[r.ndim++] = size;
        for (int v = 0; v < views; v++) r.stride[v][r.ndim - 1] = stride[v];
        r.total *= size;
    }
    if (r.ndim == 0) {
        r.ndim = 1;
        r.shape[0] = 1;
        for (int v = 0; v < views; v++) r.stride[v][0] = 0;
    }
    r.small = r.total < INT32_MAX;
    for (int v = 0; v < views; v++) {
        int64_t reach = 0;
        r.data[v] = (char *)view[v]->data;
        for (int d = 0; d < r.ndim; d++) reach += magnitude(r.stride[v][d]) * (r.shape[d] - 1);
        r.small = r.small && reach < INT32_MAX;
    }
    return r;
}

int nest_run(const nest &n, int v, int64_t bytes)
{
    if (n.total == 1) return RUN_SCALAR;
    bool scalar = true;
    for (int d = 0; d < n.ndim; d++) scalar = scalar && n.stride[v][d] == 0;
    if (scalar) return RUN_SCALAR;
    return n.ndim == 1 && n.stride[v][0] == bytes ? RUN_DENSE : RUN_STRIDED;
}

nest32 nest_32(const nest &n)
{
    nest32 r = {};
    r.ndim = n.ndim;
    r.views = n.views;
    for (int d = 0; d < n.ndim; d++) {
        r.shape[d] = (uint32_t)n.shape[d];
        r.div[d] = divider((uint32_t)n.shape[d]);
        for (int v = 0; v < n.views; v++) r.stride[v][d] = (int32_t)n.stride[v][d];
    }
    return r;
}

nest64 nest_64(const nest &n)
{
    nest64 r = {};
    r.ndim = n.ndim;
    r.views = n.views;
    for (int d = 0; d < n.ndim; d++) {
        r.shape[d] = n.shape[d];
        for (int v = 0; v < n.views; v++) r.stride[v][d] = n.stride[v][d];
    }
    return r;
}

view_walk walk_axes(const lac_view *v, int first, int last)
{
    view_walk w = {};
    for (int d = first; d < last; d++) {
        if (v->shape[d] == 1) continue;
        int at = w.ndim;
        if (at > 0 && w.stride[at - 1] == v->stride[d] * v->shape[d]) {
            w.shape[at - 1] *= v->shape[d];
            w.stride[at - 1] = v->stride[d];
        } else {
            w.shape[at] = v->shape[d];
            w.stride[at] = v->stride[d];
            w.ndim++;
        }
    }
    return w;
}

/* ---- entry ---- */

/* Operators that exist on this device are declared here; the others' slots stay empty. */
#define LAC_OP(name, args, gradient) extern "C" __attribute__((weak)) int lac_cuda_##name(const args *a);
#include "ops.def"
#undef LAC_OP

static const lac_runtime runtime = {runtime_allocate, runtime_release, runtime_transfer, runtime_synchronize,
                                    runtime_memory};
static lac_backend table;

/* one device per process: the first that is visible (CUDA_VISIBLE_DEVICES chooses) */
static const char *open_device(void)
{
    int count = 0;
    cudaDeviceProp device;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver) { /* also what the runtime says where there is no driver at all */
        snprintf(text, sizeof text, "no NVIDIA driver, or one too old for CUDA %d.%d", CUDART_VERSION / 1000,
                 CUDART_VERSION % 1000 / 10);
        return text;
    }
    if (error != cudaSuccess || count == 0) {
        snprintf(text, sizeof text, "no usable device: %s", error ? cudaGetErrorString(error) : "none is visible");
        return text;
    }
    error = cudaGetDeviceProperties(&device, 0);
    if (error != cudaSuccess) {
        snprintf(text, sizeof text, "device 0 does not answer: %s", cudaGetErrorString(error));
        return text;
    }
    if (device.major < 8) {
        snprintf(text, sizeof text, "%s has compute capability %d.%d, at least 8.0 is needed", device.name,
                 device.major, device.minor);
        return text;
    }
    error = lac_cuda_launcher_open(device.major, synchronous);
    if (!error) error = (cudaError_t)lac_cuda_streams_open();
    if (!error) error = cudaHostAlloc((void **)&fault, sizeof *fault, cudaHostAllocMapped);
    if (!error) error = cudaMalloc((void **)&fault_claimed, sizeof *fault_claimed);
    if (!error) error = cudaMemset(fault_claimed, 0, sizeof *fault_claimed);
    if (error) {
        snprintf(text, sizeof text, "device 0 cannot be used: %s", cudaGetErrorString(error));
        return text;
    }
    memset(fault, 0, sizeof *fault);
    lac_cuda_processors = device.multiProcessorCount;
    shared_most = (int)device.sharedMemPerBlockOptin;
    snprintf(text, sizeof text, "cuda:0 %s, compute capability %d.%d, %.1f GiB, %d multiprocessors", device.name,
             device.major, device.minor, (double)device.totalGlobalMem / (1 << 30), device.multiProcessorCount);
    return NULL;
}

extern "C" __attribute__((visibility("default"))) const lac_backend *lac_backend_v1(const lac_engine *engine,
                                                                                    const char **reason)
{
    if (engine->abi != LAC_ABI || engine->bytes != (int32_t)sizeof(lac_engine)) {
        *reason = "the engine and the plug-in were built from different sources: run `make` again";
        return NULL;
    }
    lac_cuda_engine = engine;
    const char *sync = getenv("LACUNA_CUDA_SYNC");
    synchronous = sync && strcmp(sync, "0") != 0;
    *reason = open_device();
    if (*reason) return NULL;
    table.abi = LAC_ABI;
    table.bytes = (int32_t)sizeof(lac_backend);
    table.name = "cuda";
    table.detail = text;
    table.runtime = &runtime;
#define LAC_OP(name, args, gradient) table.name = lac_cuda_##name;
#include "ops.def"
#undef LAC_OP
    return &table;
}
