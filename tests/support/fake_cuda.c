/* fake_cuda.c: a plug-in that pretends to be a device, so that queues and graphs are tested without one.
 *
 * Its operators are the CPU's (it is linked with a second copy of the engine) and its memory is the host's. Graphs are
 * lists of operators with their arguments, run from the start at every launch, with the random numbers replaced as
 * kernels/graph.cu does it. Asynchronous copies are done as late as the contract allows: when somebody waits for them
 * or is ordered after them. What the engine and the Lua layer do with a device is then wrong in the same ways as on a
 * real one, and every run is the same. queue_spec.lua compiles it and runs the specs of the device with it.
 */
#include "device.h"
#include "plan.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const lac_engine *engine;

/* ---- operators: at once, or into the graph that is captured ---- */

typedef struct record {
    int (*run)(const void *args);
    char *args, *present;
    size_t bytes;
    struct record *next;
} record;
typedef struct {
    record *first, **last;
    lac_draws draws;
    int64_t nodes;
} graph;
static graph *now;

static int pass(int status) { return status ? engine->fail(status, lac_last_error()) : 0; }
static int refuse(const char *op, const char *why)
{
    lac_fail(LAC_E_ARGUMENT, "%s: %s", op, why);
    return pass(LAC_E_ARGUMENT);
}

static int submit(const char *op, int slot, int (*run)(const void *), const void *args, size_t bytes)
{
    if (!now) return pass(run(args));
    if (slot == LAC_SLOT_norm_many) return refuse(op, "cannot be captured in a graph: it waits for the device");
    if (slot == LAC_SLOT_nonzero || slot == LAC_SLOT_runs || slot == LAC_SLOT_multinomial)
        return refuse(op, "the host waits for a result here, and a graph runs later: do it outside of the graph");
    record *r = malloc(sizeof *r);
    *r = (record){run, malloc(bytes), malloc(bytes), bytes, NULL};
    memcpy(r->args, args, bytes);
    *now->last = r;
    now->last = &r->next;
    now->nodes++;
    return 0;
}

#define LAC_OP(name, args, gradient)                                                                                   \
    static int run_##name(const void *a) { return lac_backend_for(LAC_CPU)->name(a); }                                 \
    static int fake_##name(const args *a) { return submit(#name, LAC_SLOT_##name, run_##name, a, sizeof *a); }
#include "ops.def"
#undef LAC_OP

/* ---- memory and copies ---- */

enum { COPIES = 4096 };
static struct {
    void *to;
    const void *from;
    size_t bytes;
} copies[COPIES];
static int64_t queued, copied, done, waits;

static void copy_until(int64_t number)
{
    for (; done < number; done++)
        memcpy(copies[(done + 1) % COPIES].to, copies[(done + 1) % COPIES].from, copies[(done + 1) % COPIES].bytes);
}

static int allocate(size_t bytes, void **out)
{
    *out = bytes > (size_t)1 << 36 ? NULL : aligned_alloc(64, (bytes + 63) / 64 * 64);
    return *out ? 0 : engine->fail(LAC_E_MEMORY, "the device refused");
}
static int release(void *p)
{
    free(p);
    return 0;
}
static int synchronize(void)
{
    if (now) return refuse("synchronize", "the host waits for a result here, and a graph runs later");
    copy_until(copied);
    waits++;
    return 0;
}
static int transfer(void *to, const void *from, size_t bytes, bool to_host)
{
    if (now)
        return to_host ? refuse("copy", "the host waits for a result here, and a graph runs later")
                       : refuse("copy", "a graph would repeat the bytes that the cpu has now");
    memcpy(to, from, bytes);
    waits += to_host;
    return 0;
}
static int move(void *to, const void *from, size_t bytes, bool to_host)
{
    (void)to_host;
    if (now) return LAC_E_ARGUMENT;
    memcpy(to, from, bytes);
    return 0;
}
static int memory(size_t *available, size_t *total)
{
    *available = *total = (size_t)1 << 36;
    return 0;
}
static void idle(void) { copy_until(copied); }
static int64_t queued_now(void) { return queued; }
static int copy(void *to, const void *from, size_t bytes, bool to_host, int64_t after, int64_t *number)
{
    (void)to_host, (void)after;
    *number = ++copied;
    if (copied - done >= COPIES) copy_until(copied - COPIES / 2);
    copies[copied % COPIES].to = to, copies[copied % COPIES].from = from, copies[copied % COPIES].bytes = bytes;
    return 0;
}
static bool copy_done(int64_t number) { return number <= done; }
static int after_copy(int64_t number)
{
    copy_until(number);
    return 0;
}

/* ---- events: done when the host has waited for anything since ---- */

typedef struct {
    int64_t waits, time;
} event;
static int event_new(void **e)
{
    *e = calloc(1, sizeof(event));
    return 0;
}
static int event_record(void *e)
{
    *(event *)e = (event){waits, lac_clock()};
    return 0;
}
static int event_done(void *e, int *is)
{
    *is = waits > ((event *)e)->waits;
    return 0;
}
static int event_wait(void *e)
{
    (void)e;
    waits++;
    return 0;
}
static int event_elapsed(void *from, void *to, double *ms)
{
    event_wait(from), event_wait(to);
    *ms = (double)(((event *)to)->time - ((event *)from)->time) / 1e6;
    return 0;
}

/* ---- graphs ---- */

static int begin(void)
{
    idle();
    now = calloc(1, sizeof *now);
    now->last = &now->first;
    return 0;
}

static void drop(void *p)
{
    graph *g = p;
    for (record *r = g->first, *next; r; r = next) {
        next = r->next;
        free(r->args);
        free(r->present);
        free(r);
    }
    free(g);
}

/* present := arguments with the numbers of this run; marks the draws that were found */
static void put_draws(const graph *g, record *r, uint64_t seed, uint64_t offset, char *seen)
{
    memcpy(r->present, r->args, r->bytes);
    for (size_t at = 0; at + 8 <= r->bytes; at += 4) {
        uint64_t word;
        memcpy(&word, r->args + at, 8);
        uint64_t beyond = word - g->draws.offset;
        int64_t draw = beyond % LAC_DRAW_STEP ? -1 : (int64_t)(beyond / LAC_DRAW_STEP);
        if (word == g->draws.seed) word = seed;
        else if (draw >= 0 && draw < g->draws.count) word = offset + (uint64_t)draw, seen[draw] = 1;
        else continue;
        memcpy(r->present + at, &word, 8);
    }
}

static int end(bool keep, const lac_draws *draws, void **out, int64_t *nodes)
{
    graph *g = now;
    now = NULL;
    *out = NULL;
    g->draws = *draws;
    *nodes = g->nodes;
    char *seen = calloc((size_t)draws->count + 1, 1);
    int64_t found = 0;
    for (record *r = g->first; r; r = r->next) put_draws(g, r, 0, 0, seen);
    for (int64_t i = 0; i < draws->count; i++) found += seen[i];
    free(seen);
    if (keep && found == draws->count) return *out = g, 0;
    drop(g);
    return keep ? refuse("graph", "a random draw is in no operator's arguments") : 0;
}

static int launch(void *p, uint64_t seed, uint64_t offset)
{
    graph *g = p;
    int status = 0;
    char *seen = calloc((size_t)g->draws.count + 1, 1);
    for (record *r = g->first; r && !status; r = r->next) {
        put_draws(g, r, seed, offset, seen);
        status = pass(r->run(r->present));
    }
    free(seen);
    return status;
}

/* ---- tables ---- */

static const lac_runtime runtime = {allocate, release, transfer, synchronize, memory};
static const lac_device_graphs graphs = {begin, end, launch, drop};
static const lac_device device = {LAC_ABI,      sizeof(lac_device), allocate,   release,       idle,      queued_now,
                                  copy,         copy_done,          after_copy, after_copy,    event_new, free,
                                  event_record, event_done,         event_wait, event_elapsed, &graphs,   move};
static lac_backend table = {.abi = LAC_ABI,
                            .bytes = sizeof(lac_backend),
                            .name = "cuda",
                            .detail = "cuda:0 none: the CPU pretends",
                            .runtime = &runtime};

__attribute__((visibility("default"))) const lac_device *lac_device_v1(void);
const lac_device *lac_device_v1(void) { return &device; }

__attribute__((visibility("default"))) const lac_backend *lac_backend_v1(const lac_engine *e, const char **reason);
const lac_backend *lac_backend_v1(const lac_engine *e, const char **reason)
{
    (void)reason;
    engine = e;
#define LAC_OP(op, args, gradient) table.op = fake_##op;
#include "ops.def"
#undef LAC_OP
    return &table;
}
