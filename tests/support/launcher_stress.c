/* launcher_stress.c: threads queue calls with the launcher (kernels/launcher.h), which knows no CUDA.
 *
 * Every call says who made it, as which of its calls, and carries bytes that follow from both, of any length that goes
 * through the ring and of some that do not. The calls of one thread must come in their order, whole, and each once; and
 * after a wait all of them must have come. Between calls threads pause, so that the launcher's thread sleeps and is
 * woken, calls take as long as they like, so that the ring is full, and some fail, which must be known by their
 * numbers. Then a child is forked, whose calls are its own, and the launcher is stopped while the ring is full, as at
 * the end of a process. threads_spec.lua runs it; under `make tsan` it is instrumented.
 */
#define LAC_LAUNCHER_RING (16 << 10) /* it is full often, and its end is crossed often */
#define LAC_LAUNCHER_SPIN 60000
#define LAC_LAUNCHER_PROCESSORS 1
#include "../../kernels/launcher.h"
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 3, CALLS = 20000, FAILURE = 77, FAILS = 1777 };
typedef struct {
    int caller, call, bytes, wait; /* wait: us */
} given;

static lac_launcher launcher;
static struct {
    int calls;
    char pad[60];
} came[THREADS]; /* written by whoever makes the call; a caller that makes one itself comes after the thread */
static int failures, failed, made_by_caller;

static void fail(const char *what, int number)
{
    if (__atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED) < 5) fprintf(stderr, "%s: %d\n", what, number);
}

static void spend(int us)
{
    for (int64_t end = lac_launcher_now() + us * 1000; us && lac_launcher_now() < end;) lac_launcher_pause();
}

static int run(void *data)
{
    const given *g = (const given *)data;
    const unsigned char *rest = (const unsigned char *)(g + 1);
    if (g->call != came[g->caller].calls) fail("out of its order", g->call);
    came[g->caller].calls = g->call + 1;
    for (int i = 0; i < g->bytes; i++)
        if (rest[i] != (unsigned char)(g->call + i)) fail("not its bytes", g->call), i = g->bytes;
    spend(g->wait);
    return g->call % FAILS == FAILS - 1 ? FAILURE : 0;
}

static void call(const given *g, int64_t number)
{
    given *to = (given *)lac_launcher_take(&launcher, sizeof *g + (size_t)g->bytes), *own = NULL;
    if (!to) to = own = (given *)malloc(sizeof *g + (size_t)g->bytes);
    *to = *g;
    if (own) own->wait = 0; /* calls in quick succession wake the thread */
    for (int i = 0; i < g->bytes; i++) ((unsigned char *)(to + 1))[i] = (unsigned char)(g->call + i);
    if (!own) return lac_launcher_give(&launcher, run, number);
    __atomic_fetch_add(&made_by_caller, 1, __ATOMIC_RELAXED);
    if (run(own)) __atomic_fetch_add(&failed, 1, __ATOMIC_RELAXED);
    free(own);
}

static void check_failed(void)
{
    int64_t number;
    int code = lac_launcher_failed(&launcher, &number);
    if (!code) return;
    if (code != FAILURE || number % FAILS != FAILS - 1) fail("a failure of none", (int)number);
    __atomic_fetch_add(&failed, 1, __ATOMIC_RELAXED);
}

static void *work(void *argument)
{
    const int me = (int)(size_t)argument;
    unsigned state = (unsigned)me * 2654435761u + 1;
    for (int i = 0; i < CALLS; i++) {
        state = state * 1664525u + 1013904223u;
        const unsigned dice = state >> 8;
        given g = {me, i, (int)(dice % 199), dice % 7 == 0 ? (int)(dice >> 8) % 5 : 0};
        if (dice % 97 == 0) g.bytes = (int)(dice >> 10) % 5000; /* some are longer than a record */
        call(&g, i);
        if (dice % 61 == 0) {
            lac_launcher_settle(&launcher);
            if (came[me].calls != i + 1) fail("not there after a wait", i);
        }
        if (me == 0) check_failed();
        if (dice % 1009 == 0) usleep(dice >> 10 & 1 ? 300 : 30); /* the thread sleeps, or nearly */
    }
    lac_launcher_settle(&launcher);
    if (came[me].calls != CALLS) fail("not all came", came[me].calls);
    return NULL;
}

static int begin(void) { return 0; }

int main(void)
{
    pthread_t thread[THREADS];
    lac_launcher_start(&launcher, begin);
    if (!launcher.on) return printf("there is no thread\n"), 1;
    for (size_t i = 0; i < THREADS; i++) pthread_create(&thread[i], NULL, work, (void *)i);
    for (size_t i = 0; i < THREADS; i++) pthread_join(thread[i], NULL);
    check_failed();
    printf("%d failures, some calls failed %d, some were made by their callers %d, not most %d\n", failures, failed > 0,
           made_by_caller > 0, made_by_caller < THREADS * CALLS / 2);

    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        lac_launcher_forked(&launcher);
        lac_launcher_settle(&launcher);
        const int own = lac_launcher_take(&launcher, 8) == NULL;
        lac_launcher_stop(&launcher);
        _exit(own ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    given slow = {0, CALLS, 0, 200};
    for (; slow.call < CALLS + 400; slow.call++) call(&slow, slow.call); /* more than the ring holds */
    lac_launcher_stop(&launcher);
    const int dropped = CALLS + 400 - came[0].calls;
    lac_launcher_settle(&launcher);
    const int own = lac_launcher_take(&launcher, 8) == NULL;
    printf("a child %d, a stop %d with calls dropped %d\n", status, own, dropped > 0);
    return failures || status || !own || dropped <= 0;
}
