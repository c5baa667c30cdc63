/* copies.c: copies between host and device that run beside the operators, and events.
 *
 * Only page-locked host memory can be copied by the device itself; from other memory the driver has to stage the bytes,
 * and the call returns when that is done. So asynchronous copies take page-locked tensors (heap LAC_PINNED of the pool)
 * and refuse others. Each copy has a number, and the storages at both ends keep it until somebody looks at them
 * (lac_view_get): operators on the device are then ordered after the copy, the host waits for it. The pool does the
 * same with blocks that are given back meanwhile. So nothing that goes through the engine can see half a copy; a
 * pointer that a script has taken before can, which is the script's own affair.
 *
 * An event is a place in the queue of the device, to be waited for or timed; on the CPU, where nothing is queued, it is
 * a reading of the clock. Rejected: streams that a script can name (order between them would be the script's to keep,
 * and what there is to gain is copies beside operators).
 */
#include "device.h"
#include <stdlib.h>

static const lac_device *queue(void) { return lac_device_table(); }

int lac_copy_settle(lac_storage *s)
{
    int64_t number = s->copying;
    s->copying = 0;
    return s->device == LAC_CPU ? queue()->copy_wait(number) : queue()->after_copy(number);
}

int lac_tensor_pinned(const lac_tensor *t) { return t && t->storage && t->storage->pinned; }

/* what an asynchronous copy can read */
static int check_source(const lac_tensor *src, const lac_view *x, const lac_tensor *out)
{
    if (out->device == src->device) LAC_FAIL(DEVICE, "copy: an asynchronous copy goes from the cpu to cuda or back");
    if (out->device != LAC_CPU && out->device != LAC_CUDA)
        LAC_FAIL(DEVICE, "copy: there is no device %d to copy to", out->device);
    if (src->device == LAC_CPU && !src->storage->pinned)
        LAC_FAIL(ARGUMENT, "copy: an asynchronous copy needs page-locked memory: pin the tensor first");
    if (!lac_view_contiguous(x))
        LAC_FAIL(SHAPE, "copy: an asynchronous copy needs a contiguous tensor, got %s with gaps", lac_describe(src));
    return 0;
}

int lac_copy_async(const lac_tensor *src, lac_tensor *out)
{
    lac_view x, y;
    int64_t number = 0;
    if (!out) LAC_FAIL(ARGUMENT, "copy: no tensor to fill");
    out->storage = NULL;
    LAC_TRY(lac_view_get("copy", "src", src, &x));
    LAC_TRY(check_source(src, &x, out));
    bool to_host = out->device == LAC_CPU;
    LAC_TRY(lac_tensor_new("copy", src->dtype, to_host ? LAC_PINNED : LAC_CUDA, src->ndim, src->shape, out, &y));
    size_t bytes = (size_t)lac_view_numel(&x) * lac_dtype_size(src->dtype);
    if (bytes == 0) return 0;
    /* to the device: after what used the block before; from it: after all that may write the source */
    int64_t after = to_host ? queue()->queued() : lac_storage_given(out->storage);
    int status = queue()->copy(y.data, x.data, bytes, to_host, after, &number);
    if (status) {
        lac_tensor_drop(out);
        return status;
    }
    lac_storage *ends[] = {src->storage, out->storage};
    for (int i = 0; i < 2; i++) {
        ends[i]->copying = number;
        if (ends[i]->block) lac_storage_copied(ends[i], number);
    }
    return 0;
}

/* ---- events ---- */

struct lac_event {
    int device;
    bool recorded;
    int64_t time; /* of the CPU's clock */
    void *mark;   /* the device's */
};

int lac_event_new(int device, lac_event **out)
{
    if (!out) LAC_FAIL(ARGUMENT, "event: nowhere to put it");
    *out = NULL;
    if (device != LAC_CPU && !lac_backend_for(LAC_CUDA)) return lac_backend_missing("event", device);
    lac_event *e = calloc(1, sizeof *e);
    if (!e) LAC_FAIL(MEMORY, "out of memory for an event");
    e->device = device;
    int status = device == LAC_CPU ? 0 : queue()->event_new(&e->mark);
    if (status) free(e);
    else *out = e;
    return status;
}

void lac_event_drop(lac_event *e)
{
    if (e && e->mark) queue()->event_drop(e->mark);
    free(e);
}

int lac_event_record(lac_event *e)
{
    if (!e) LAC_FAIL(ARGUMENT, "event: there is none to record");
    e->time = lac_clock();
    if (e->mark) LAC_TRY(queue()->event_record(e->mark));
    e->recorded = true;
    return 0;
}

int lac_event_done(const lac_event *e, int *done)
{
    if (!e || !done) LAC_FAIL(ARGUMENT, "event: nothing to ask");
    *done = 1;
    return e->mark && e->recorded ? queue()->event_done(e->mark, done) : 0;
}

int lac_event_wait(const lac_event *e)
{
    if (!e) LAC_FAIL(ARGUMENT, "event: there is none to wait for");
    return e->mark && e->recorded ? queue()->event_wait(e->mark) : 0;
}

int lac_event_elapsed(const lac_event *from, const lac_event *to, double *ms)
{
    if (!from || !to || !ms) LAC_FAIL(ARGUMENT, "event: two events are needed");
    if (!from->recorded || !to->recorded)
        LAC_FAIL(ARGUMENT, "event: %s was not recorded yet", from->recorded ? "the second one" : "the first one");
    if (from->device != to->device) LAC_FAIL(DEVICE, "event: the two are of different devices");
    *ms = (double)(to->time - from->time) / 1e6;
    return from->mark ? queue()->event_elapsed(from->mark, to->mark, ms) : 0;
}
