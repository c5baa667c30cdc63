/* gaps.c: for how much of a stretch of the device's work no kernel runs, told by CUPTI (NVIDIA's tracing library).
 *
 * The benchmark section cuda_step compiles this file and loads it; nothing else does, and nothing of Lacuna needs
 * CUPTI, which comes with the CUDA toolkit and with PyTorch and is looked for when it is asked for. The few
 * declarations of its activity interface that are needed are written down here: every record of a kernel, a copy or a
 * fill begins with its kind and has its begin and end, in nanoseconds of the device, at bytes 16 and 24. Tracing adds
 * to the time between kernels, never takes from it, so what comes out is an upper bound. Rejected: events round a graph
 * and round its kernels one by one (an event costs as much as the gaps in question).
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MEMCPY = 1, MEMSET = 2, CONCURRENT_KERNEL = 10, BUFFER = 8 << 20, SPANS = 1 << 20 };

typedef void request_fn(uint8_t **buffer, size_t *size, size_t *records);
typedef void complete_fn(void *context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid);
static struct {
    int (*enable)(int kind), (*disable)(int kind), (*callbacks)(request_fn *, complete_fn *), (*flush)(uint32_t flag);
    int (*next)(uint8_t *buffer, size_t valid, void **record);
} api;
static struct span {
    uint64_t begin, end;
} spans[SPANS];
static int64_t count; /* more than SPANS: some are lost */

static void give(uint8_t **buffer, size_t *size, size_t *records)
{
    *buffer = aligned_alloc(8, BUFFER);
    *size = *buffer ? BUFFER : 0;
    *records = 0;
}

static void take(void *context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid)
{
    void *record = NULL;
    (void)context, (void)stream, (void)size;
    while (valid > 0 && api.next(buffer, valid, &record) == 0) {
        int32_t kind;
        memcpy(&kind, record, sizeof kind);
        if (kind != MEMCPY && kind != MEMSET && kind != CONCURRENT_KERNEL) continue;
        if (count < SPANS) memcpy(&spans[count], (char *)record + 16, sizeof(struct span));
        count++;
    }
    free(buffer);
}

static int by_begin(const void *a, const void *b)
{
    uint64_t x = ((const struct span *)a)->begin, y = ((const struct span *)b)->begin;
    return x < y ? -1 : x > y;
}

/* begins to trace, with the CUPTI at `path`; NULL, or why it cannot */
const char *gaps_start(const char *path)
{
    static char text[300];
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return dlerror();
    *(void **)&api.enable = dlsym(library, "cuptiActivityEnable");
    *(void **)&api.disable = dlsym(library, "cuptiActivityDisable");
    *(void **)&api.callbacks = dlsym(library, "cuptiActivityRegisterCallbacks");
    *(void **)&api.flush = dlsym(library, "cuptiActivityFlushAll");
    *(void **)&api.next = dlsym(library, "cuptiActivityGetNextRecord");
    if (!api.enable || !api.disable || !api.callbacks || !api.flush || !api.next) return "it is no CUPTI";
    int status = api.callbacks(give, take);
    for (int i = 0; i < 3 && status == 0; i++)
        status = api.enable(((const int[]){MEMCPY, MEMSET, CONCURRENT_KERNEL})[i]);
    if (status == 0) return NULL;
    snprintf(text, sizeof text, "CUPTI answers %d", status);
    return text;
}

/* forgets what was traced; the device is idle */
void gaps_reset(void)
{
    api.flush(1);
    count = 0;
}

/* nanoseconds from the first begin to the last end, and those in which something ran; returns how many things ran, or
 * -1 if there were too many. The device is idle. */
int64_t gaps_read(double *span, double *busy)
{
    uint64_t until = 0;
    *span = *busy = 0;
    api.flush(1);
    if (count > SPANS) return -1;
    qsort(spans, (size_t)count, sizeof *spans, by_begin);
    for (int64_t i = 0; i < count; i++) {
        uint64_t from = spans[i].begin > until ? spans[i].begin : until;
        if (spans[i].end <= from) continue;
        *busy += (double)(spans[i].end - from);
        until = spans[i].end;
    }
    if (count) *span = (double)(until - spans[0].begin);
    return count;
}

void gaps_stop(void)
{
    for (int i = 0; i < 3; i++) api.disable(((const int[]){MEMCPY, MEMSET, CONCURRENT_KERNEL})[i]);
}
