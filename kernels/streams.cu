/* streams.cu: copies that run beside the operators, and events.
 *
 * Operators have one stream, copies to and from page-locked host memory another. What orders the two is events of the
 * driver, of which two rings are kept. A mark is recorded after every 32nd launch: a copy into memory that was given
 * back by launch n waits for the first mark after n, not for everything that is queued, so that the batch of the next
 * step crosses while this step computes. After every copy one is recorded, too: copies are done in the order of their
 * numbers, so the event of a later copy, which may have taken an old one's place in the ring, says enough. Waiting
 * between streams costs the host nothing.
 */
#include "streams.cuh"

enum { RING = 64, MARK_EVERY = 32 };

static cudaStream_t copies;
static cudaEvent_t marks[RING], done[RING], now;
static int64_t launches, marked, copied, completed; /* completed: a copy that is known to be done */

int lac_cuda_streams_open(void)
{
    cudaError_t error = cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking);
    for (int i = 0; i < RING && !error; i++) {
        error = cudaEventCreateWithFlags(&marks[i], cudaEventDisableTiming);
        if (!error) error = cudaEventCreateWithFlags(&done[i], cudaEventDisableTiming);
    }
    if (!error) error = cudaEventCreateWithFlags(&now, cudaEventDisableTiming);
    return error;
}

static int mark(const void *place, cudaStream_t stream)
{
    cudaEventRecord(marks[*(const int *)place], stream); /* what may be wrong is reported by the next wait */
    return 0;
}

void lac_cuda_mark(void)
{
    if (lac_cuda_capturing || ++launches % MARK_EVERY) return;
    marked = launches / MARK_EVERY;
    const int place = (int)(marked % RING);
    lac_cuda_later(mark, &place, sizeof place);
}

static int64_t queued(void) { return launches; }

/* copies queued from now on come after launch `after`, and what belongs to it */
static int copies_wait_for(int64_t after)
{
    LAC_TRY(lac_cuda_settled("copy")); /* every mark that is counted is with the driver */
    int64_t mark = after / MARK_EVERY + 1;
    if (mark <= marked) return lac_cuda_check("copy", cudaStreamWaitEvent(copies, marks[mark % RING], 0));
    CUDA_TRY("copy", cudaEventRecord(now, lac_cuda_stream()));
    return lac_cuda_check("copy", cudaStreamWaitEvent(copies, now, 0));
}

static int copy(void *to, const void *from, size_t bytes, bool to_host, int64_t after, int64_t *number)
{
    LAC_TRY(copies_wait_for(after));
    CUDA_TRY("copy",
             cudaMemcpyAsync(to, from, bytes, to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, copies));
    CUDA_TRY("copy", cudaEventRecord(done[(copied + 1) % RING], copies));
    *number = ++copied;
    return 0;
}

static bool copy_done(int64_t number)
{
    if (number > completed && cudaEventQuery(done[number % RING]) == cudaSuccess) completed = number;
    cudaGetLastError(); /* "not ready" is no error */
    return number <= completed;
}

static int copy_wait(int64_t number)
{
    if (number <= completed) return 0;
    CUDA_TRY("copy", cudaEventSynchronize(done[number % RING]));
    completed = number;
    return 0;
}

static int after_copy(int64_t number)
{
    if (copy_done(number)) return 0;
    return lac_cuda_check("copy", cudaStreamWaitEvent(lac_cuda_stream(), done[number % RING], 0));
}

cudaError_t lac_cuda_copies_wait(void) { return cudaStreamSynchronize(copies); }

/* ---- events of the script ---- */

static int event_new(void **event) { return lac_cuda_check("event", cudaEventCreate((cudaEvent_t *)event)); }
static void event_drop(void *event) { cudaEventDestroy((cudaEvent_t)event); }
static int event_record(void *event)
{
    LAC_TRY(lac_cuda_settled("event"));
    return lac_cuda_check("event", cudaEventRecord((cudaEvent_t)event, lac_cuda_stream()));
}

static int event_done(void *event, int *is)
{
    cudaError_t error = cudaEventQuery((cudaEvent_t)event);
    *is = error == cudaSuccess;
    if (error != cudaErrorNotReady) return lac_cuda_check("event", error);
    cudaGetLastError();
    return 0;
}

static int event_wait(void *event) { return lac_cuda_check("event", cudaEventSynchronize((cudaEvent_t)event)); }

static int event_elapsed(void *from, void *to, double *ms)
{
    float t = 0;
    LAC_TRY(event_wait(from));
    LAC_TRY(event_wait(to));
    CUDA_TRY("event", cudaEventElapsedTime(&t, (cudaEvent_t)from, (cudaEvent_t)to));
    *ms = t;
    return 0;
}

/* ---- page-locked memory, and the table ---- */

static int allocate_host(size_t bytes, void **out)
{
    cudaError_t error = cudaHostAlloc(out, bytes ? bytes : 1, cudaHostAllocDefault);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        LAC_FAIL(MEMORY, "the system refused");
    }
    return lac_cuda_check("allocate", error);
}

static int release_host(void *p) { return lac_cuda_check("release", cudaFreeHost(p)); }

static void idle(void)
{
    cudaStreamSynchronize(lac_cuda_stream());
    cudaStreamSynchronize(copies);
}

static int move(void *to, const void *from, size_t bytes, bool to_host)
{
    if (lac_cuda_capturing) return LAC_E_ARGUMENT;
    cudaMemcpyKind kind = to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, lac_cuda_stream());
    if (!error) error = cudaStreamSynchronize(lac_cuda_stream());
    cudaGetLastError(); /* a device that is broken stays so, and the next operator says it */
    return error ? LAC_E_INTERNAL : 0;
}

static const lac_device table = {
    LAC_ABI,    sizeof(lac_device), allocate_host,    release_host, idle,       queued,       copy,
    copy_done,  copy_wait,          after_copy,       event_new,    event_drop, event_record, event_done,
    event_wait, event_elapsed,      &lac_cuda_graphs, move};

extern "C" __attribute__((visibility("default"))) const lac_device *lac_device_v1(void) { return &table; }
