/* launcher.h: a thread that runs calls of the driver in the order in which others queue them.
 *
 * A launch takes its caller some microseconds, nearly all of them inside the driver, and nothing makes it cheaper
 * (experiments/benchmarks/dispatch.lua). So whoever launches copies the call into a ring, which takes a tenth of a
 * microsecond, and a thread makes it. The ring is one stretch of bytes: a record is a function, and the bytes that the
 * function is given; one that would cross the end is preceded by a gap. Two counters of bytes, which only grow, say
 * what has been queued (head) and what has been run (tail). Each is written by one side, on a line of its own, and the
 * callers look at the tail only when their last look leaves no room, because every look fetches the line from another
 * core. Calls from several threads are queued under a lock.
 *
 * What has been queued is not yet with the driver. Whoever uses the driver in another way, and expects to come after
 * what it has queued, calls lac_launcher_settle() first, which waits until all of it was run.
 *
 * The thread spins for a millisecond after its last call, as a caller does who waits for the device, then it sleeps. It
 * is some tens of microseconds until it wakes, so while it sleeps callers are told to make their calls themselves,
 * until some have come in quick succession. With 60 us of spinning it slept twice in a training step of a small model.
 * Callers are told so, too, where the last call was waited for before another came: handing over costs time on both
 * sides, and a caller that waits gains nothing.
 *
 * A call that fails (returns other than 0) leaves its code and its number, and those after it are run. In the child of
 * a fork there is no thread, and no driver that would work: calls are the caller's own there, and fail by themselves.
 * A process that ends stops the thread after the call that it makes: nobody could see what the others would have done.
 * This header is C and C++ and knows no CUDA, so that tests/support/launcher_stress.c works on it alone. Rejected:
 * slots of one size, which have to be as large as the longest list of arguments; a condition to wake a caller that
 * waits, which would cost the thread a look at a caller's line for every call.
 */
#ifndef LAC_LAUNCHER_H
#define LAC_LAUNCHER_H
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#ifndef LAC_LAUNCHER_RING
#define LAC_LAUNCHER_RING (256 << 10) /* bytes: about a thousand launches, and less than a core's own cache */
#endif
#ifndef LAC_LAUNCHER_PROCESSORS
#define LAC_LAUNCHER_PROCESSORS 3 /* where there are fewer, there is no thread */
#endif
#ifndef LAC_LAUNCHER_SPIN
#define LAC_LAUNCHER_SPIN 1000000 /* ns until the thread sleeps, or a caller who waits */
#endif
enum {
    LAC_LAUNCHER_LINE = 64,
    LAC_LAUNCHER_MOST = LAC_LAUNCHER_RING / 4, /* bytes of a record, at most */
    LAC_LAUNCHER_QUICK = 20000,                /* ns between calls in quick succession */
    LAC_LAUNCHER_CALLS = 4,                    /* as many are made by their caller until the thread is woken */
    LAC_LAUNCHER_AHEAD = 1 << 10,              /* bytes that callers must be ahead for the thread to look ahead */
    LAC_LAUNCHER_NAP = 20000                   /* ns of a caller's sleep, until it looks again */
};
#define LAC_LAUNCHER_ALIGNED __attribute__((aligned(LAC_LAUNCHER_LINE)))

typedef struct lac_record {
    int (*run)(void *data); /* NULL: a gap */
    int64_t number;         /* what the caller counts its calls by */
    uint32_t bytes, unused; /* of the record, with this header */
    int64_t space;          /* data begins half a line after the header does */
} lac_record;

typedef struct lac_launcher {
    pthread_mutex_t callers; /* guards what only callers know: */
    uint64_t seen;           /* the tail when somebody looked */
    int64_t last;            /* ns: when the last call was made by its caller while the thread slept */
    int quick, since, alone; /* calls in quick succession; since the last wait; was there one between the last two? */
    LAC_LAUNCHER_ALIGNED uint64_t head;
    LAC_LAUNCHER_ALIGNED uint64_t tail;
    /* seldom written: read by both */
    LAC_LAUNCHER_ALIGNED int on;
    int asleep, stop, failed;
    int64_t failed_number;
    pthread_mutex_t sleep;
    pthread_cond_t wake;
    pthread_t thread;
    int (*begin)(void); /* by the thread, first */
    LAC_LAUNCHER_ALIGNED char ring[LAC_LAUNCHER_RING];
} lac_launcher;

static inline int64_t lac_launcher_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void lac_launcher_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- the thread ---- */

static inline lac_record *lac_launcher_at(lac_launcher *l, uint64_t position)
{
    return (lac_record *)(l->ring + position % LAC_LAUNCHER_RING);
}

/* is there something to do? A caller publishes the head and then looks whether the thread is asleep, the thread says
 * that it is and then looks at the head: one of the two sees the other */
static inline int lac_launcher_rest(lac_launcher *l, uint64_t tail)
{
    for (int64_t end = lac_launcher_now() + LAC_LAUNCHER_SPIN; lac_launcher_now() < end;)
        for (int i = 0; i < 16; i++) {
            if (__atomic_load_n(&l->head, __ATOMIC_ACQUIRE) != tail) return 1;
            if (__atomic_load_n(&l->stop, __ATOMIC_RELAXED)) return 0;
            lac_launcher_pause();
        }
    pthread_mutex_lock(&l->sleep);
    for (;;) {
        __atomic_store_n(&l->asleep, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&l->head, __ATOMIC_SEQ_CST) != tail || __atomic_load_n(&l->stop, __ATOMIC_RELAXED)) break;
        pthread_cond_wait(&l->wake, &l->sleep);
    }
    __atomic_store_n(&l->asleep, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&l->sleep);
    return !__atomic_load_n(&l->stop, __ATOMIC_RELAXED);
}

static void *lac_launcher_work(void *given)
{
    lac_launcher *l = (lac_launcher *)given;
    uint64_t tail = __atomic_load_n(&l->tail, __ATOMIC_RELAXED);
    int code = l->begin ? l->begin() : 0;
    if (code) __atomic_store_n(&l->failed, code, __ATOMIC_RELEASE);
    while (lac_launcher_rest(l, tail))
        for (uint64_t head = __atomic_load_n(&l->head, __ATOMIC_ACQUIRE); tail != head;) {
            lac_record *r = lac_launcher_at(l, tail);
            if (__atomic_load_n(&l->stop, __ATOMIC_RELAXED)) return NULL;
            if (head - tail > LAC_LAUNCHER_AHEAD) /* the next one, while this one runs: it is in another core's cache */
                for (int i = 0; i < 4; i++)
                    __builtin_prefetch((char *)lac_launcher_at(l, tail + r->bytes) + LAC_LAUNCHER_LINE * i);
            code = r->run ? r->run(r + 1) : 0;
            if (code && !__atomic_load_n(&l->failed, __ATOMIC_ACQUIRE)) {
                __atomic_store_n(&l->failed_number, r->number, __ATOMIC_RELAXED);
                __atomic_store_n(&l->failed, code, __ATOMIC_RELEASE);
            }
            tail += r->bytes;
            __atomic_store_n(&l->tail, tail, __ATOMIC_RELEASE);
        }
    return NULL;
}

/* Makes the thread, which takes no signals. l is all 0. */
static inline void lac_launcher_start(lac_launcher *l, int (*begin)(void))
{
    cpu_set_t processors;
    sigset_t all, before;
    if (sched_getaffinity(0, sizeof processors, &processors) || CPU_COUNT(&processors) < LAC_LAUNCHER_PROCESSORS)
        return;
    pthread_mutex_init(&l->callers, NULL);
    pthread_mutex_init(&l->sleep, NULL);
    pthread_cond_init(&l->wake, NULL);
    l->begin = begin;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    l->on = pthread_create(&l->thread, NULL, lac_launcher_work, l) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static inline void lac_launcher_wake(lac_launcher *l)
{
    pthread_mutex_lock(&l->sleep);
    __atomic_store_n(&l->asleep, 0, __ATOMIC_SEQ_CST); /* it is on its way, and need not be woken again */
    pthread_cond_signal(&l->wake);
    pthread_mutex_unlock(&l->sleep);
}

/* Ends the thread after the call that it makes; what is queued is dropped, and later calls are their callers' own. */
static inline void lac_launcher_stop(lac_launcher *l)
{
    if (!__atomic_exchange_n(&l->on, 0, __ATOMIC_SEQ_CST)) return;
    __atomic_store_n(&l->stop, 1, __ATOMIC_SEQ_CST);
    lac_launcher_wake(l);
    pthread_join(l->thread, NULL);
    __atomic_store_n(&l->tail, __atomic_load_n(&l->head, __ATOMIC_SEQ_CST), __ATOMIC_SEQ_CST);
}

/* in the child of a fork, where no thread is but the one that called */
static inline void lac_launcher_forked(lac_launcher *l)
{
    l->on = 0;
    l->tail = l->head;
    l->failed = 0;
}

/* ---- callers ---- */

/* waits until all before `position` was run */
static inline void lac_launcher_until(lac_launcher *l, uint64_t position)
{
    int64_t end = 0;
    for (int i = 1; __atomic_load_n(&l->tail, __ATOMIC_ACQUIRE) < position; i++) {
        lac_launcher_pause();
        if (i % 64) continue;
        if (!end) end = lac_launcher_now() + LAC_LAUNCHER_SPIN;
        if (lac_launcher_now() > end) {
            struct timespec nap = {0, LAC_LAUNCHER_NAP};
            nanosleep(&nap, NULL);
        }
    }
}

/* May a call be made by its caller, now that nothing is queued? The lock is held. */
static inline int lac_launcher_idle(lac_launcher *l)
{
    if (!__atomic_load_n(&l->asleep, __ATOMIC_ACQUIRE)) {
        const int alone = l->alone;
        l->alone = 0; /* the next one is queued, unless there is a wait between */
        return alone && __atomic_load_n(&l->tail, __ATOMIC_ACQUIRE) == l->head;
    }
    if (__atomic_load_n(&l->tail, __ATOMIC_ACQUIRE) != l->head) return 0; /* it is about to see that */
    const int64_t now = lac_launcher_now();
    l->quick = now - l->last < LAC_LAUNCHER_QUICK ? l->quick + 1 : 0;
    l->last = now;
    return l->quick < LAC_LAUNCHER_CALLS || l->since <= LAC_LAUNCHER_CALLS;
}

/* Room for a call with so many bytes of data, which lac_launcher_give() queues; NULL: the caller makes the call itself,
 * now, after all that was queued before. */
static inline void *lac_launcher_take(lac_launcher *l, size_t bytes)
{
    if (!__atomic_load_n(&l->on, __ATOMIC_RELAXED)) return NULL;
    pthread_mutex_lock(&l->callers);
    const size_t whole = (sizeof(lac_record) + bytes + LAC_LAUNCHER_LINE - 1) / LAC_LAUNCHER_LINE * LAC_LAUNCHER_LINE;
    l->since++;
    if (whole > LAC_LAUNCHER_MOST || lac_launcher_idle(l)) {
        const uint64_t head = l->head;
        pthread_mutex_unlock(&l->callers);
        lac_launcher_until(l, head);
        return NULL;
    }
    const size_t left = LAC_LAUNCHER_RING - l->head % LAC_LAUNCHER_RING, gap = left < whole ? left : 0;
    if (l->head + gap + whole - l->seen > LAC_LAUNCHER_RING) {
        lac_launcher_until(l, l->head + gap + whole - LAC_LAUNCHER_RING);
        l->seen = __atomic_load_n(&l->tail, __ATOMIC_ACQUIRE);
    }
    if (gap) {
        lac_record *r = lac_launcher_at(l, l->head);
        r->run = NULL;
        r->bytes = (uint32_t)gap;
        __atomic_store_n(&l->head, l->head + gap, __ATOMIC_RELEASE);
    }
    lac_record *r = lac_launcher_at(l, l->head);
    r->bytes = (uint32_t)whole;
    return r + 1;
}

/* queues what take() made room for */
static inline void lac_launcher_give(lac_launcher *l, int (*run)(void *data), int64_t number)
{
    lac_record *r = lac_launcher_at(l, l->head);
    r->run = run;
    r->number = number;
    __atomic_store_n(&l->head, l->head + r->bytes, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&l->callers);
    if (__atomic_load_n(&l->asleep, __ATOMIC_SEQ_CST)) lac_launcher_wake(l);
}

/* waits until all that was queued was run */
static inline void lac_launcher_settle(lac_launcher *l)
{
    if (!__atomic_load_n(&l->on, __ATOMIC_RELAXED)) return;
    pthread_mutex_lock(&l->callers);
    const uint64_t head = l->head;
    if (l->since) l->alone = l->since == 1, l->since = 0;
    pthread_mutex_unlock(&l->callers);
    lac_launcher_until(l, head);
}

/* the code and the number of the first call that failed since this was last asked, or 0 */
static inline int lac_launcher_failed(lac_launcher *l, int64_t *number)
{
    if (!__atomic_load_n(&l->failed, __ATOMIC_RELAXED)) return 0;
    const int code = __atomic_load_n(&l->failed, __ATOMIC_ACQUIRE);
    *number = __atomic_load_n(&l->failed_number, __ATOMIC_RELAXED);
    __atomic_store_n(&l->failed, 0, __ATOMIC_RELEASE);
    return code;
}

#endif
