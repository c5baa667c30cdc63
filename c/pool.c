/* pool.c: the one caching allocator; every byte of a tensor and of an operator's workspace comes from here.
 *
 * Why a cache: a training step makes and drops the same sizes over and over; the system's allocator returns large
 * blocks to the kernel each time, and the page faults of getting them back cost more than the arithmetic of a
 * small operator. Blocks are rounded up to a size class, four per octave (at most 25% waste), and kept on a free
 * list per class when dropped. Splitting and coalescing were rejected: more code, and fragmentation that a script
 * can not explain. One mutex guards the lists (about 20 ns, uncontended).
 *
 * Limits. `limit` is hard: a request that would take live bytes over it fails with status "memory", after which
 * everything is as before. Large requests are also compared with the memory that the system says is available,
 * because overcommit would otherwise hand out pages that do not exist and the process would be killed later.
 * The soft limit fails in the same way, but only until the host has freed what it can and excuses the retry: so
 * garbage never takes the pool over it, and what is needed may. `pace` only raises flags.pressure, and the host
 * collects its garbage at the next opportunity. Rejected: a callback into the host (it may not run inside a call).
 *
 * Blocks in use form a list, so that a report can say what is alive without the host having kept books; what a
 * tensor is for and which line made it are numbers that the host may leave in its storage. While recording is on,
 * every change of the pool is written down too. Neither costs a lock of its own.
 *
 * Large blocks start at a huge page and ask for such pages: an array then crosses a page of 4 KB, at which the
 * processor's prefetching stops, 512 times less often (a copy ran 1.3 times as fast, first writes five times).
 *
 * Heaps. There is one for the host, one for the process's CUDA device and one for page-locked host memory, which that
 * device copies from and to by itself; they have the same lists, limits and statistics. A device cannot read headers,
 * and page-locked memory comes in pages, so blocks of these two are described by headers elsewhere.
 *
 * Streams. Operators on the device run in one order, so a block may be handed out again while a kernel that was queued
 * before still uses it. Asynchronous copies run beside them (copies.c) and leave the number of the copy in the blocks
 * at both ends. What takes such a block again comes after that copy: operators on the device by an order among streams,
 * the host by taking another block. A block also remembers how many operators had been queued when it was given back,
 * so that a copy into it need not wait for later ones. Memory goes back to the driver only when nothing is queued.
 *
 * Graphs. A captured graph runs with the addresses that it was captured with. Blocks that are taken meanwhile belong to
 * it until it is dropped: what is given back may be taken again by the same capture, whose order is that of its runs,
 * and by nobody else; they count as live all the time.
 *
 * Guard mode puts a pattern before and after every new block and checks it when the block is freed; tests use it
 * to catch kernels that write outside their tensors.
 */
#include "device.h"
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ALIGNMENT = 64, CLASSES = 48 * 4, GUARD = 64, CHECK_SYSTEM = 64 << 20, HUGE_PAGE = 2 << 20 };
#define GUARD_BYTE 0xa5

/* Stands in front of every block; ALIGNMENT bytes, so that data stays aligned. */
typedef struct block {
    struct block *next, *previous; /* in use: neighbours in the list of those; free: next of its class */
    lac_storage *storage;          /* NULL: an operator's working memory */
    size_t asked;
    int64_t serial;
    int16_t class_index, heap;
    int32_t guarded;
    unsigned char guard[ALIGNMENT - 48];
} block;
_Static_assert(sizeof(block) == ALIGNMENT, "a block header keeps its data aligned");

/* a block of device or of page-locked memory */
typedef struct remote_block {
    block head;
    void *data;
    int64_t given;             /* operators queued on the device when it was last given back */
    int64_t copy;              /* number of the last asynchronous copy from or to it, 0: none */
    const lac_graph *graph;    /* it is reserved for a captured graph */
    struct remote_block *idle; /* the next one of its class that the graph being captured may take again */
    bool unused;               /* of a graph: in nobody's hands */
} remote_block;

enum { HOST, DEVICE, PINNED, HEAPS };
typedef struct {
    block *free_lists[CLASSES], *in_use; /* in_use: the newest */
    lac_memory_stats stats;
    int64_t pace, soft_now; /* soft_now: the soft limit in force, above stats.soft once something was excused */
} heap;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static heap heaps[HEAPS];
static int64_t storages[HEAPS]; /* headers alive; atomic, because a header is counted without the lock */
static int guarding, guard_errors, recording;
static const lac_graph *capture;    /* that takes device memory now */
static remote_block *idle[CLASSES]; /* what it has given back */
static lac_records events = {.size = sizeof(lac_block_info)};

static size_t class_bytes(int index) { return ((size_t)(4 + (index & 3)) << (index >> 2)) * 16; }

/* the smallest class that holds `bytes`: 64, 80, 96, 112, 128, 160, ... */
static int class_of(size_t bytes)
{
    if (bytes <= 64) return 0;
    int octave = 63 - __builtin_clzll((unsigned long long)(bytes - 1)) - 6; /* 0 for 65..128 */
    size_t quarter = (size_t)16 << octave;
    int step = (int)((bytes - 1) / quarter) - 3; /* 1..4 within the octave */
    return octave * 4 + step;
}

/* bytes that the system could still give, or SIZE_MAX if it does not say */
static size_t system_available(void)
{
    FILE *f = fopen("/proc/meminfo", "r");
    char line[128];
    unsigned long long kib = 0;
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "MemAvailable:", 13) == 0) kib = strtoull(line + 13, NULL, 10);
    if (f) fclose(f);
    return kib ? (size_t)kib * 1024 : SIZE_MAX;
}

static int heap_number(int device) { return device == LAC_CPU ? HOST : device == LAC_PINNED ? PINNED : DEVICE; }
static heap *heap_for(int device) { return &heaps[heap_number(device)]; }
static const lac_runtime *runtime(void) { return lac_backend_for(LAC_CUDA)->runtime; }
static const lac_device *queue(void) { return lac_device_table(); }

static remote_block *remote(block *b) { return (remote_block *)b; }
static void *block_data(block *b) { return b->heap == HOST ? b + 1 : remote(b)->data; }

static void trim_locked(heap *h)
{
    if (h->stats.cached == 0 || (capture && h != &heaps[HOST])) return;
    if (h != &heaps[HOST]) queue()->idle();
    for (int i = 0; i < CLASSES; i++)
        while (h->free_lists[i]) {
            block *b = h->free_lists[i];
            h->free_lists[i] = b->next;
            h->stats.cached -= (int64_t)class_bytes(i);
            if (b->heap == DEVICE) runtime()->release(block_data(b));
            if (b->heap == PINNED) queue()->release_host(block_data(b));
            free(b);
        }
}

static void refuse(const heap *h, size_t bytes, const char *why)
{
    const lac_memory_stats *s = &h->stats;
    lac_fail(LAC_E_MEMORY, "out of memory%s: %zu bytes asked for, %s (live %lld, cached %lld, peak %lld, limit %lld)",
             h == &heaps[DEVICE]   ? " on cuda"
             : h == &heaps[PINNED] ? " (page-locked)"
                                   : "",
             bytes, why, (long long)s->live, (long long)s->cached, (long long)s->peak,
             (long long)(s->limit ? s->limit : s->soft));
}

static int refusal; /* the status with which the last block was refused; the lock is held */

/* size bytes from the system or the device's driver; a NULL block if there are none */
static block *raw_block(const heap *h, size_t size)
{
    void *raw;
    refusal = LAC_E_MEMORY;
    if (h == &heaps[HOST]) {
        if (posix_memalign(&raw, size >= HUGE_PAGE ? HUGE_PAGE : ALIGNMENT, sizeof(block) + size)) return NULL;
#ifdef MADV_HUGEPAGE
        if (size >= HUGE_PAGE) madvise(raw, sizeof(block) + size, MADV_HUGEPAGE); /* a wish: no matter if it fails */
#endif
        return raw;
    }
    remote_block *b;
    if (posix_memalign(&raw, ALIGNMENT, (sizeof(remote_block) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT)) return NULL;
    b = raw;
    b->given = b->copy = 0;
    b->graph = NULL;
    refusal = h == &heaps[PINNED] ? queue()->allocate_host(size, &b->data) : runtime()->allocate(size, &b->data);
    if (!refusal) return raw;
    free(raw);
    return NULL;
}

/* a fresh block from the system, or NULL with the message set; the lock is held */
static block *fresh_block(heap *h, int index, size_t bytes)
{
    size_t size = class_bytes(index);
    if (h == &heaps[HOST] && size >= CHECK_SYSTEM && system_available() < size) {
        trim_locked(h);
        if (system_available() < size) {
            refuse(h, bytes, "more than the system has available");
            return NULL;
        }
    }
    block *b = raw_block(h, size);
    if (!b && refusal == LAC_E_MEMORY) {
        trim_locked(h);
        b = raw_block(h, size);
    }
    if (!b && refusal != LAC_E_MEMORY) return NULL; /* the device is broken, and has said so */
    if (!b) {
        refuse(h, bytes, h == &heaps[DEVICE] ? "the device refused" : "the system refused");
        return NULL;
    }
    b->class_index = (int16_t)index;
    b->heap = (int16_t)(h - heaps);
    return b;
}

/* the bytes behind a block of device memory are reached by copies that wait: guard mode is slow there */
static void guard_set(block *b)
{
    b->guarded = guarding && !capture;
    if (!b->guarded) return;
    unsigned char pattern[GUARD], *tail = (unsigned char *)block_data(b) + b->asked;
    memset(b->guard, GUARD_BYTE, sizeof b->guard);
    memset(pattern, GUARD_BYTE, sizeof pattern);
    if (b->heap != DEVICE) memcpy(tail, pattern, sizeof pattern);
    else if (queue()->move(tail, pattern, sizeof pattern, false)) b->guarded = 0; /* the device failed */
}

static void guard_check(block *b)
{
    if (!b->guarded) return;
    unsigned char found[GUARD], *tail = (unsigned char *)block_data(b) + b->asked;
    int bad = 0;
    if (b->heap != DEVICE) memcpy(found, tail, sizeof found);
    else if (queue()->move(found, tail, sizeof found, true)) return; /* the device failed: not a broken guard */
    for (size_t i = 0; i < sizeof b->guard; i++) bad |= b->guard[i] != GUARD_BYTE;
    for (int i = 0; i < GUARD; i++) bad |= found[i] != GUARD_BYTE;
    guard_errors += bad;
}

/* what reports say of a block; the lock is held */
static void block_describe(const block *b, int kind, const char *op, lac_block_info *out)
{
    const lac_storage *s = b->storage;
    *out = (lac_block_info){.serial = b->serial,
                            .time = kind == LAC_BLOCK_ALIVE ? 0 : lac_clock(),
                            .bytes = (int64_t)class_bytes(b->class_index),
                            .asked = (int64_t)b->asked,
                            .op = op,
                            .kind = kind,
                            .role = s ? s->role : LAC_ROLE_WORKSPACE,
                            .site = s ? s->site : 0,
                            .tag = lac_flags_global.tag,
                            .dtype = s ? s->dtype : -1,
                            .ndim = s ? s->ndim : 0};
    if (s) memcpy(out->shape, s->shape, sizeof out->shape);
}

static void block_record(const block *b, int kind, const char *op)
{
    lac_block_info *event = lac_records_push(&events);
    if (event) block_describe(b, kind, op, event);
}

/* may live bytes grow by `size`? the lock is held */
static bool within_limits(const heap *h, int64_t size, size_t bytes)
{
    const char *why = h->stats.limit && h->stats.live + size > h->stats.limit ? "over the limit"
                      : h->stats.soft && h->stats.live + size > h->soft_now   ? "over the soft limit"
                                                                              : NULL;
    if (why) refuse(h, bytes, why);
    return !why;
}

/* May a cached block be used now? An asynchronous copy may be under way: operators on the device are told to wait for
 * it, the host, which will not wait for them, is given another block. */
static bool block_ready(block *b)
{
    if (b->heap == HOST || !remote(b)->copy) return true;
    if (b->heap == PINNED && !queue()->copy_done(remote(b)->copy)) return false;
    if (b->heap == DEVICE && queue()->after_copy(remote(b)->copy)) return false;
    remote(b)->copy = 0;
    return true;
}

/* a block from the cache or the system, not yet accounted for, or NULL with the message set; the lock is held */
static block *block_find(heap *h, int index, int64_t size, size_t bytes)
{
    if (!within_limits(h, size, bytes)) return NULL;
    block **at = &h->free_lists[index], *b;
    while (*at && !block_ready(*at)) at = &(*at)->next;
    b = *at;
    if (b) {
        *at = b->next;
        h->stats.cached -= size;
        h->stats.reused++;
        return b;
    }
    int64_t most = h->stats.soft ? h->stats.soft : h->stats.limit; /* cached blocks of other sizes count, too */
    if (most && h->stats.live + h->stats.cached + size > most) trim_locked(h);
    return fresh_block(h, index, bytes);
}

/* a block that the graph being captured has given back; it is accounted for already */
static block *block_again(int index, lac_storage *storage, size_t bytes)
{
    remote_block *b = idle[index];
    if (!b) return NULL;
    idle[index] = b->idle;
    b->unused = false;
    b->head.asked = bytes;
    b->head.storage = storage;
    return &b->head;
}

static int block_take(heap *h, const char *op, lac_storage *storage, size_t bytes, block **out)
{
    if (bytes > (size_t)1 << 46) LAC_FAIL(MEMORY, "out of memory: %zu bytes asked for", bytes);
    pthread_mutex_lock(&lock);
    int index = class_of(bytes + (guarding ? GUARD : 0));
    int64_t size = (int64_t)class_bytes(index);
    bool captured = capture && h == &heaps[DEVICE];
    block *b = captured ? block_again(index, storage, bytes) : NULL;
    if (b) {
        *out = b;
        pthread_mutex_unlock(&lock);
        return 0;
    }
    refusal = LAC_E_MEMORY;
    b = block_find(h, index, size, bytes);
    if (b) {
        if (captured) remote(b)->graph = capture, remote(b)->unused = false;
        b->asked = bytes;
        b->storage = storage;
        guard_set(b);
        h->stats.live += size;
        h->stats.live_blocks++;
        b->serial = ++h->stats.allocations;
        if (h->stats.live > h->stats.peak) h->stats.peak = h->stats.live;
        if (h->pace && h->stats.live > h->pace) lac_flags_global.pressure = lac_flags_global.attention = 1;
        b->previous = NULL;
        b->next = h->in_use;
        if (h->in_use) h->in_use->previous = b;
        h->in_use = b;
        if (recording) block_record(b, LAC_BLOCK_TAKEN, op);
        *out = b;
    }
    int status = b ? 0 : refusal ? refusal : LAC_E_MEMORY;
    pthread_mutex_unlock(&lock);
    return status;
}

static void give_locked(block *b)
{
    heap *h = &heaps[b->heap];
    guard_check(b);
    if (recording) block_record(b, LAC_BLOCK_GIVEN, b->storage ? b->storage->op : NULL);
    if (b->next) b->next->previous = b->previous;
    if (b->previous) b->previous->next = b->next;
    else h->in_use = b->next;
    int64_t size = (int64_t)class_bytes(b->class_index);
    h->stats.live -= size;
    h->stats.live_blocks--;
    h->stats.cached += size;
    if (h->stats.live < h->stats.soft - h->stats.soft / 8) h->soft_now = h->stats.soft;
    if (b->heap == DEVICE) remote(b)->given = queue()->queued();
    b->next = h->free_lists[b->class_index];
    h->free_lists[b->class_index] = b;
}

static void block_give(block *b)
{
    pthread_mutex_lock(&lock);
    remote_block *r = b->heap == DEVICE ? remote(b) : NULL;
    if (r && r->graph) {
        b->storage = NULL;
        r->unused = true;
        if (r->graph == capture) r->idle = idle[b->class_index], idle[b->class_index] = r;
    } else {
        give_locked(b);
    }
    pthread_mutex_unlock(&lock);
}

int lac_storage_new(const char *op, int device, int dtype, int ndim, const int64_t *shape, size_t bytes,
                    lac_storage **out)
{
    if (device != LAC_CPU && !lac_backend_for(LAC_CUDA)) return lac_backend_missing(op, LAC_CUDA);
    if (device != LAC_CPU && device != LAC_CUDA && device != LAC_PINNED)
        LAC_FAIL(DEVICE, "%s: a process has one CUDA device, cuda:0 (choose it by CUDA_VISIBLE_DEVICES), not cuda:%d",
                 op, device - LAC_CUDA);
    lac_storage *s = malloc(sizeof *s);
    block *b;
    if (!s) LAC_FAIL(MEMORY, "out of memory for a storage header");
    atomic_init(&s->references, 1); /* field by field: compilers clear a whole one with a slow instruction */
    s->device = device == LAC_PINNED ? LAC_CPU : device;
    s->pinned = device == LAC_PINNED;
    s->bytes = bytes;
    s->dtype = dtype;
    s->ndim = ndim;
    s->role = s->site = 0;
    for (int i = 0; i < LAC_MAX_DIMS; i++) s->shape[i] = i < ndim ? shape[i] : 0;
    s->copying = 0;
    s->op = op;
    int status = block_take(heap_for(device), op, s, bytes, &b);
    if (status) {
        free(s);
        return status;
    }
    s->data = block_data(b);
    s->owner = b;
    s->block = class_bytes(b->class_index);
    __atomic_add_fetch(&storages[b->heap], 1, __ATOMIC_RELAXED);
    *out = s;
    return 0;
}

static void storage_free_bytes(lac_storage *s)
{
    void *data = s->data;
    s->data = NULL;
    if (!data) return;
    if (s->block) block_give(s->owner);
    else if (s->bytes) munmap(data, s->bytes);
}

/* ---- graphs ---- */

void lac_pool_capture(lac_graph *graph)
{
    pthread_mutex_lock(&lock);
    capture = graph;
    memset(idle, 0, sizeof idle);
    pthread_mutex_unlock(&lock);
}

static bool of_graph(const void *owner, const lac_graph *graph)
{
    const remote_block *b = owner;
    return b && b->head.heap == DEVICE && b->graph == graph;
}

bool lac_pool_captured(const lac_storage *s, const lac_graph *graph) { return s->block && of_graph(s->owner, graph); }

void lac_pool_end(void *owner)
{
    block *b = owner;
    pthread_mutex_lock(&lock);
    if (b->storage) b->storage->data = NULL;
    b->storage = NULL;
    remote(b)->unused = true;
    pthread_mutex_unlock(&lock);
}

int lac_pool_revive(void *owner, const lac_tensor *t, lac_storage **out)
{
    block *b = owner;
    if (b->storage) {
        lac_storage_retain(b->storage);
        *out = b->storage;
        return 0;
    }
    lac_storage *s = calloc(1, sizeof *s);
    if (!s) LAC_FAIL(MEMORY, "out of memory for a storage header");
    *s = (lac_storage){.references = 1,
                       .device = LAC_CUDA,
                       .bytes = b->asked,
                       .dtype = t->dtype,
                       .ndim = t->ndim,
                       .op = "graph",
                       .data = block_data(b),
                       .owner = b,
                       .block = class_bytes(b->class_index)};
    for (int i = 0; i < t->ndim; i++) s->shape[i] = t->shape[i];
    pthread_mutex_lock(&lock);
    b->storage = s;
    remote(b)->unused = false;
    pthread_mutex_unlock(&lock);
    __atomic_add_fetch(&storages[DEVICE], 1, __ATOMIC_RELAXED);
    *out = s;
    return 0;
}

int64_t lac_pool_reserved(const lac_graph *graph)
{
    int64_t bytes = 0;
    pthread_mutex_lock(&lock);
    for (const block *b = heaps[DEVICE].in_use; b; b = b->next)
        if (of_graph(b, graph)) bytes += (int64_t)class_bytes(b->class_index);
    pthread_mutex_unlock(&lock);
    return bytes;
}

void lac_pool_uncapture(const lac_graph *graph)
{
    pthread_mutex_lock(&lock);
    for (block *b = heaps[DEVICE].in_use, *next; b; b = next) {
        next = b->next;
        if (!of_graph(b, graph)) continue;
        remote(b)->graph = NULL;
        if (remote(b)->unused) give_locked(b);
    }
    pthread_mutex_unlock(&lock);
}

void lac_storage_copied(lac_storage *s, int64_t copy)
{
    pthread_mutex_lock(&lock);
    remote(s->owner)->copy = copy;
    pthread_mutex_unlock(&lock);
}

int64_t lac_storage_given(const lac_storage *s) { return remote(s->owner)->given; }

void lac_storage_retain(lac_storage *s) { atomic_fetch_add(&s->references, 1); }

void lac_storage_drop(lac_storage *s)
{
    if (!s || atomic_fetch_sub(&s->references, 1) != 1) return;
    storage_free_bytes(s);
    __atomic_sub_fetch(&storages[s->pinned ? PINNED : heap_number(s->device)], 1, __ATOMIC_RELAXED);
    free(s);
}

void *lac_workspace_get(const char *op, size_t bytes)
{
    block *b = NULL;
    if (block_take(&heaps[HOST], op, NULL, bytes, &b)) {
        char why[512];
        snprintf(why, sizeof why, "%s", lac_last_error());
        lac_fail(LAC_E_MEMORY, "%s: workspace: %s", op, why);
        return NULL;
    }
    return b + 1;
}

void lac_workspace_put(void *p)
{
    if (p) block_give((block *)p - 1);
}

void *lac_scratch_get(const char *op, size_t bytes, void **handle)
{
    block *b = NULL;
    if (block_take(&heaps[DEVICE], op, NULL, bytes, &b)) {
        char why[512];
        snprintf(why, sizeof why, "%s", lac_last_error());
        lac_fail(LAC_E_MEMORY, "%s: workspace: %s", op, why);
        return NULL;
    }
    *handle = b;
    return block_data(b);
}

void lac_scratch_put(void *handle) { block_give(handle); }

int lac_memory(int device, lac_memory_stats *out)
{
    if (!out) LAC_FAIL(ARGUMENT, "memory: no struct to fill");
    pthread_mutex_lock(&lock);
    *out = heap_for(device)->stats;
    pthread_mutex_unlock(&lock);
    out->storages = __atomic_load_n(&storages[heap_number(device)], __ATOMIC_RELAXED);
    return 0;
}

int lac_memory_limit(int device, int64_t bytes)
{
    if (bytes < 0) LAC_FAIL(ARGUMENT, "memory: the limit must not be negative, got %lld", (long long)bytes);
    pthread_mutex_lock(&lock);
    heap_for(device)->stats.limit = bytes;
    pthread_mutex_unlock(&lock);
    return 0;
}

int lac_memory_pace(int device, int64_t bytes)
{
    if (bytes < 0) LAC_FAIL(ARGUMENT, "memory: the pace must not be negative, got %lld", (long long)bytes);
    pthread_mutex_lock(&lock);
    heap_for(device)->pace = bytes;
    pthread_mutex_unlock(&lock);
    return 0;
}

int lac_memory_soft_limit(int device, int64_t bytes)
{
    if (bytes < 0) LAC_FAIL(ARGUMENT, "memory: the soft limit must not be negative, got %lld", (long long)bytes);
    pthread_mutex_lock(&lock);
    heap_for(device)->stats.soft = heap_for(device)->soft_now = bytes;
    pthread_mutex_unlock(&lock);
    return 0;
}

int lac_memory_excuse(int on)
{
    pthread_mutex_lock(&lock);
    for (heap *h = heaps; h < heaps + HEAPS; h++) {
        int64_t room =
            h->stats.live + h->stats.live / 8; /* so that the host does not collect for every further tensor */
        h->soft_now = on ? INT64_MAX : room > h->stats.soft ? room : h->stats.soft;
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

int lac_memory_trim(void)
{
    pthread_mutex_lock(&lock);
    for (heap *h = heaps; h < heaps + HEAPS; h++) trim_locked(h);
    pthread_mutex_unlock(&lock);
    malloc_trim(0);
    return 0;
}

int lac_memory_empty(int device)
{
    pthread_mutex_lock(&lock);
    trim_locked(heap_for(device));
    pthread_mutex_unlock(&lock);
    if (device == LAC_CPU) malloc_trim(0);
    return 0;
}

int64_t lac_memory_blocks(int device, lac_block_info *out, int64_t n)
{
    int64_t count = 0;
    pthread_mutex_lock(&lock);
    for (const block *b = heap_for(device)->in_use; b; b = b->next, count++)
        if (count < n) block_describe(b, LAC_BLOCK_ALIVE, b->storage ? b->storage->op : NULL, out + count);
    pthread_mutex_unlock(&lock);
    return count;
}

int lac_memory_record(int on)
{
    pthread_mutex_lock(&lock);
    if (on) lac_records_clear(&events);
    recording = on > 0;
    pthread_mutex_unlock(&lock);
    return 0;
}

int64_t lac_memory_events(int64_t first, int64_t n, lac_block_info *out)
{
    pthread_mutex_lock(&lock);
    int64_t got = lac_records_read(&events, first, n, out);
    pthread_mutex_unlock(&lock);
    return got;
}

int lac_tensor_role(const lac_tensor *t, int role)
{
    if (!t || !t->storage) LAC_FAIL(RELEASED, "role: the tensor has no storage");
    if (role < LAC_ROLE_NONE || role >= LAC_ROLE_WORKSPACE)
        LAC_FAIL(ARGUMENT, "role: %d is not a role of tensors", role);
    t->storage->role = role;
    return 0;
}

int lac_tensor_site(const lac_tensor *t, int site)
{
    if (!t || !t->storage) return 0;
    if (site >= 0) t->storage->site = site;
    return t->storage->site;
}

int lac_tensor_block(const lac_tensor *t, lac_block_info *out)
{
    if (!t || !out) LAC_FAIL(ARGUMENT, "block: no tensor or no struct to fill");
    if (!t->storage || !t->storage->data || !t->storage->block) LAC_FAIL(RELEASED, "block: the tensor has no block");
    pthread_mutex_lock(&lock);
    block_describe(t->storage->owner, LAC_BLOCK_ALIVE, t->storage->op, out);
    pthread_mutex_unlock(&lock);
    return 0;
}

int lac_memory_reset_peak(void)
{
    pthread_mutex_lock(&lock);
    for (heap *h = heaps; h < heaps + HEAPS; h++) h->stats.peak = h->stats.live;
    pthread_mutex_unlock(&lock);
    return 0;
}

int lac_memory_guard(int on)
{
    pthread_mutex_lock(&lock);
    guarding = on != 0;
    pthread_mutex_unlock(&lock);
    return 0;
}

int lac_memory_guard_errors(void)
{
    pthread_mutex_lock(&lock);
    int errors = guard_errors;
    pthread_mutex_unlock(&lock);
    return errors;
}

int lac_tensor_release(lac_tensor *t)
{
    if (!t || !t->storage) LAC_FAIL(RELEASED, "release: the tensor has no storage");
    if (lac_graph_holds(t->storage)) return 0; /* a graph reads or writes it: the bytes go with the last of them */
    storage_free_bytes(t->storage);
    return 0;
}

int lac_map_file(const char *path, lac_tensor *out)
{
    if (!path || !out) LAC_FAIL(ARGUMENT, "map_file: no path or no tensor");
    memset(out, 0, sizeof *out);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0) LAC_FAIL(SYSTEM, "map_file: cannot open '%s': %s", path, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        LAC_FAIL(SYSTEM, "map_file: '%s' is not a regular file", path);
    }
    /* private: a script that writes into the tensor changes its own copy of the page, never the file */
    size_t bytes = (size_t)st.st_size;
    void *data = bytes ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0) : (void *)heaps;
    int error = errno;
    close(fd);
    if (data == MAP_FAILED) LAC_FAIL(SYSTEM, "map_file: cannot map '%s': %s", path, strerror(error));
    lac_storage *s = malloc(sizeof *s);
    if (!s) {
        if (bytes) munmap(data, bytes);
        LAC_FAIL(MEMORY, "out of memory for a storage header");
    }
    *s = (lac_storage){.references = 1, .device = LAC_CPU, .data = data, .bytes = bytes, .block = 0, .op = "map_file"};
    __atomic_add_fetch(&storages[HOST], 1, __ATOMIC_RELAXED);
    *out = (lac_tensor){.storage = s, .dtype = LAC_U8, .ndim = 1, .shape = {(int64_t)bytes}, .stride = {1}};
    return 0;
}
