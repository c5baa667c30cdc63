/* engine_stress.c: operators and attention from several threads at once, bit by bit as from one.
 *
 * LuaJIT has one thread, but the engine promises more: the pool, the plan cache and every call may be used from
 * several threads, and the number of threads of an operator changes no bit. A job is made from a number: it draws an
 * operator, shapes and inputs from it (attention with a random pattern, forward and backward, one in two), runs it and
 * gives a hash of every result. First all jobs run one after the other on one thread; then threads draw them in
 * different orders, each with a number of OpenMP threads of its own; every hash must be the same. Between jobs the
 * threads take and give back memory, ask for pool statistics and provoke errors, whose message belongs to the thread.
 * At the end nothing may be alive. threads_spec.lua compiles and runs it; under `make tsan` it is instrumented, and
 * with the argument `race` it makes a data race on purpose, so that the gate proves that it sees one.
 */
#include "lacuna.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 5, JOBS = 160, ROUNDS = 3 };
static uint64_t expected[JOBS];
static int failures;
static char first_failure[256];

static void fail(const char *what, int job)
{
    if (__atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED) == 0)
        snprintf(first_failure, sizeof first_failure, "job %d: %s: %s", job, what, lac_last_error());
}

typedef struct {
    uint64_t state, hash;
    int job;
} work;

static int64_t draw(work *w, int64_t low, int64_t high) /* low .. high */
{
    w->state = w->state * 6364136223846793005u + 1442695040888963407u;
    return low + (int64_t)((w->state >> 33) % (uint64_t)(high - low + 1));
}

static lac_tensor filled(work *w, int dtype, int ndim, const int64_t *shape)
{
    lac_tensor t = {.dtype = dtype, .device = LAC_CPU, .ndim = ndim};
    memcpy(t.shape, shape, (size_t)ndim * sizeof *shape);
    if (lac_empty(&t)) fail("empty", w->job);
    else if (lac_random(&t, LAC_NORMAL, 0, 1, (uint64_t)draw(w, 0, 1 << 20), 0)) fail("random", w->job);
    return t;
}

static void digest(work *w, lac_tensor *t)
{
    void *data;
    static const int bytes[LAC_DTYPES] = {8, 4, 2, 2, 8, 4, 1, 1};
    if (!t->storage) return;
    int64_t n = bytes[t->dtype];
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    if (n > 0 && !lac_tensor_data(t, &data))
        for (int64_t i = 0; i < n; i++) w->hash = (w->hash ^ ((uint8_t *)data)[i]) * 1099511628211u;
    lac_tensor_drop(t);
}

static void attention(work *w, int dtype)
{
    static const int64_t widths[] = {1, 8, 16, 33, 64};
    lac_attn_desc d = {.batch = draw(w, 1, 2), .n = draw(w, 1, 150), .head_dim = (int32_t)widths[draw(w, 0, 4)]};
    d.m = draw(w, 0, 2) ? d.n : draw(w, 1, 150);
    d.kv_heads = (int32_t)draw(w, 1, 2);
    d.heads = d.kv_heads * (int32_t)draw(w, 1, 3);
    d.branches = (int32_t)draw(w, 1, 3);
    d.heads_scheme = d.heads >= d.branches ? (int32_t)draw(w, 0, 1) : LAC_HEADS_ALL;
    d.offset_rule = (int32_t)draw(w, 0, 2);
    d.merge = (int32_t)draw(w, 0, 3);
    if (d.heads_scheme == LAC_HEADS_SPLIT && d.merge > LAC_MERGE_SUM) d.merge = LAC_MERGE_MEAN;
    d.causal = (int32_t)draw(w, 0, 1);
    d.window = draw(w, 0, 3) ? -1 : draw(w, 1, 40);
    for (int i = 0; i < d.branches; i++) {
        d.dilation[i] = draw(w, 1, 4);
        d.segment[i] = draw(w, d.dilation[i], 80); /* so that every offset is inside the segment */
    }
    int64_t qs[] = {d.batch, d.n, d.heads, d.head_dim}, ks[] = {d.batch, d.m, d.kv_heads, d.head_dim};
    lac_tensor q = filled(w, dtype, 4, qs), k = filled(w, dtype, 4, ks), v = filled(w, dtype, 4, ks);
    lac_tensor g = filled(w, dtype, 4, qs), out = {0}, lse = {0}, branch = {0}, dq = {0}, dk = {0}, dv = {0};
    lac_attn_args args = {.q = &q, .k = &k, .v = &v, .dropout = draw(w, 0, 3) ? 0 : 0.25, .seed = 7};
    lac_plan *plan = NULL;
    if (lac_plan_get(&d, &plan)) {
        fail("plan", w->job);
    } else {
        if (lac_attend(plan, &args, &out, &lse, &branch)) fail("attend", w->job);
        else if (lac_attend_bwd(plan, &args, &out, &lse, branch.storage ? &branch : NULL, &g, NULL, &dq, &dk, &dv,
                                NULL))
            fail("attend_bwd", w->job);
        lac_plan_drop(plan);
    }
    lac_tensor *all[] = {&q, &k, &v, &g, &out, &lse, &branch, &dq, &dk, &dv};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) digest(w, all[i]);
}

static void operators(work *w, int dtype)
{
    int64_t rows = draw(w, 1, 300), columns = draw(w, 1, 200), inner = draw(w, 1, 60);
    int64_t xs[] = {rows, columns}, as[] = {rows, inner}, bs[] = {inner, columns}, ws[] = {columns};
    lac_tensor x = filled(w, dtype, 2, xs), y = filled(w, dtype, 2, xs), a = filled(w, dtype, 2, as);
    lac_tensor b = filled(w, dtype, 2, bs), gamma = filled(w, dtype, 1, ws), r[9] = {{0}};
    int bad = lac_map2(lac_map_id(2, "mul"), &x, &y, &r[0]) || lac_map1(lac_map_id(1, "tanh"), &x, &r[1]) ||
              lac_matmul(&a, &b, NULL, &r[2]) || lac_softmax(&x, 1, 0, &r[3]) ||
              lac_reduce((int)draw(w, 0, 3), &x, (uint32_t)draw(w, 0, 3), 0, &r[4]) ||
              lac_layernorm(&x, &gamma, &gamma, 1e-5, &r[5], &r[6], &r[7]) || lac_dropout(&x, 0.3, 5, 0, &r[8]);
    if (bad) fail("operators", w->job);
    lac_tensor *all[] = {&x, &y, &a, &b, &gamma};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) digest(w, all[i]);
    for (size_t i = 0; i < sizeof r / sizeof *r; i++) digest(w, &r[i]);
}

static uint64_t run(int job)
{
    work w = {.state = (uint64_t)job * 7919 + 17, .hash = 14695981039346656037u, .job = job};
    int dtype = (int)draw(&w, LAC_F64, LAC_BF16);
    if (job % 2) attention(&w, dtype);
    else operators(&w, dtype);
    return w.hash;
}

/* the pool's statistics, an error of this thread, blocks of many sizes */
static void disturb(work *w)
{
    lac_memory_stats stats;
    lac_tensor t[4], wrong = {.dtype = LAC_F32, .device = LAC_CPU, .ndim = 1, .shape = {-5 - w->job}};
    char text[32];
    for (int i = 0; i < 4; i++) {
        int64_t shape[] = {draw(w, 0, 20000)};
        t[i] = filled(w, LAC_F32, 1, shape);
    }
    snprintf(text, sizeof text, "%d", -5 - w->job);
    if (lac_memory(LAC_CPU, &stats) || stats.live < 0) fail("statistics", w->job);
    if (lac_empty(&wrong) == 0 || !strstr(lac_last_error(), text)) fail("the message is not this thread's", w->job);
    for (int i = 0; i < 4; i++) lac_tensor_drop(&t[i]);
    if (draw(w, 0, 20) == 0) lac_memory_trim();
}

static void *thread_main(void *argument)
{
    int me = (int)(intptr_t)argument;
    work w = {.state = (uint64_t)me + 99, .job = me};
    lac_threads(1 + me % 3);
    for (int i = 0; i < JOBS; i++) {
        int job = (i * (2 * me + 1) + me * 31) % JOBS;
        if (run(job) != expected[job]) fail("other bits than on one thread", job);
        disturb(&w);
    }
    return NULL;
}

static int64_t raced;
static void *race(void *unused)
{
    for (int i = 0; i < 100000; i++) raced++;
    return unused;
}

static void in_threads(void *(*f)(void *))
{
    pthread_t thread[THREADS];
    for (intptr_t i = 0; i < THREADS; i++) pthread_create(&thread[i], NULL, f, (void *)i);
    for (int i = 0; i < THREADS; i++) pthread_join(thread[i], NULL);
}

int main(int argc, char **argv)
{
    lac_memory_stats stats;
    if (argc > 1 && strcmp(argv[1], "race") == 0) {
        in_threads(race);
        return 0;
    }
    lac_threads(1);
    for (int i = 0; i < JOBS; i++) expected[i] = run(i);
    for (int i = 0; i < ROUNDS; i++) in_threads(thread_main);
    lac_plan_cache_resize(0);
    lac_memory(LAC_CPU, &stats);
    printf("%d failures in %d jobs, %lld bytes alive %s\n", failures, THREADS * JOBS * ROUNDS, (long long)stats.live,
           first_failure);
    return failures || stats.live ? 1 : 0;
}
