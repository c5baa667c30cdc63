/* plan_stress.c: eight threads get, use and drop plans while the cache is resized under them.
 *
 * LuaJIT has one thread, so the cache's locking cannot be tested from a spec; threads_spec.lua compiles this program
 * against the built library and runs it. Every thread asks for plans from a small set in its own order, holds some of
 * them for a while, and checks that a plan describes what was asked for: a plan that was freed while in use, or that
 * was handed out for another key, shows as a wrong count (or as an error under a sanitizer). One thread keeps
 * changing the capacity, also to 0. At the end nothing may be left but what the cache holds.
 */
#include "lacuna.h"
#include <pthread.h>
#include <stdio.h>

enum { THREADS = 8, ROUNDS = 4000, KEYS = 24, HELD = 6 };
static int failures;

static int64_t pairs_of(int key) { return (int64_t)(key + 1) * (key + 1) * 2; }

static lac_plan *get(int key)
{
    lac_attn_desc d = {.batch = 1,
                       .n = key + 1,
                       .m = key + 1,
                       .heads = 2,
                       .kv_heads = 1,
                       .head_dim = 4,
                       .branches = 1,
                       .heads_scheme = LAC_HEADS_ALL,
                       .merge = LAC_MERGE_LSE,
                       .window = -1};
    d.segment[0] = 1000;
    d.dilation[0] = 1;
    d.segment[31] = key * 7; /* past the branches: must not matter */
    lac_plan *plan;
    return lac_plan_get(&d, &plan) ? NULL : plan;
}

static void check(lac_plan *plan, int key)
{
    lac_plan_info info;
    if (!plan || lac_plan_describe(plan, &info) || info.pairs != pairs_of(key) || info.references < 1)
        __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
}

static void *work(void *argument)
{
    unsigned state = (unsigned)(size_t)argument * 2654435761u + 1;
    lac_plan *held[HELD] = {0};
    int key_of[HELD] = {0};
    for (int i = 0; i < ROUNDS; i++) {
        state = state * 1664525u + 1013904223u;
        int slot = (int)(state >> 8) % HELD, key = (int)(state >> 16) % KEYS;
        if (held[slot]) {
            check(held[slot], key_of[slot]);
            lac_plan_drop(held[slot]);
        }
        held[slot] = get(key);
        key_of[slot] = key;
        check(held[slot], key);
        if (argument == NULL && i % 16 == 0) lac_plan_cache_resize(i % 3 ? i % 11 : 0);
    }
    for (int i = 0; i < HELD; i++) lac_plan_drop(held[i]);
    return NULL;
}

int main(void)
{
    pthread_t thread[THREADS];
    lac_cache_stats s;
    for (size_t i = 0; i < THREADS; i++) pthread_create(&thread[i], NULL, work, (void *)i);
    for (size_t i = 0; i < THREADS; i++) pthread_join(thread[i], NULL);
    lac_plan_cache(&s);
    printf("%d failures, %lld finds, capacity kept %d\n", failures, (long long)(s.hits + s.misses),
           s.size <= s.capacity);
    lac_plan_cache_resize(0);
    lac_plan_cache(&s);
    return failures || s.size ? 1 : 0;
}
