/* lru.h: a thread-safe cache of the most recently used values, keyed by bytes.
 *
 * A hash table finds an entry, a doubly linked list keeps the order of use, one mutex guards both. Values are
 * reference-counted by their owner: the cache holds one reference and hands out another with every find, so a
 * value that is evicted while somebody uses it lives on until the last user drops it. Making a value happens outside
 * the lock (it may be slow); when two threads make the same value at the same time, lac_lru_insert() keeps the first
 * and gives it to both. Keys are compared byte for byte: the caller zeroes padding and unused fields.
 *
 * Rejected: reader-writer locks and lock-free tables (a find takes some 100 ns and happens once per attention call,
 * which takes microseconds at least), and a clock approximation of LRU (the list is not longer).
 */
#ifndef LAC_LRU_H
#define LAC_LRU_H
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct lac_lru_entry {
    struct lac_lru_entry *chain, *newer, *older;
    uint64_t hash;
    size_t bytes;
    void *value;
    unsigned char key[];
} lac_lru_entry;

typedef struct lac_lru {
    pthread_mutex_t lock;
    void (*retain)(void *value);
    void (*drop)(void *value);
    int64_t capacity, size, hits, misses, evictions;
    lac_lru_entry **table, *newest, *oldest;
    size_t buckets; /* a power of two, 0 before the first insertion */
} lac_lru;

#define LAC_LRU_INIT(capacity_, retain_, drop_)                                                                        \
    {                                                                                                                  \
        .lock = PTHREAD_MUTEX_INITIALIZER, .retain = retain_, .drop = drop_, .capacity = capacity_                     \
    }

/* FNV-1a over 64 bits, then a final mix so that the low bits depend on all of them */
static inline uint64_t lac_lru_hash(const void *key, size_t bytes)
{
    const unsigned char *k = key;
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++) h = (h ^ k[i]) * 0x100000001b3u;
    h ^= h >> 32;
    return h * 0x9e3779b97f4a7c15u >> 7;
}

static inline lac_lru_entry **lac_lru_slot(lac_lru *c, const void *key, size_t bytes, uint64_t hash)
{
    lac_lru_entry **at = &c->table[hash & (c->buckets - 1)];
    while (*at && ((*at)->hash != hash || (*at)->bytes != bytes || memcmp((*at)->key, key, bytes) != 0))
        at = &(*at)->chain;
    return at;
}

static inline void lac_lru_unlink(lac_lru *c, lac_lru_entry *e)
{
    *(e->newer ? &e->newer->older : &c->newest) = e->older;
    *(e->older ? &e->older->newer : &c->oldest) = e->newer;
}

static inline void lac_lru_push(lac_lru *c, lac_lru_entry *e)
{
    e->newer = NULL;
    e->older = c->newest;
    *(c->newest ? &c->newest->newer : &c->oldest) = e;
    c->newest = e;
}

/* the lock is held; values are dropped inside it, which is safe because a drop never calls back into the cache */
static inline void lac_lru_shrink(lac_lru *c, int64_t size)
{
    while (c->size > size) {
        lac_lru_entry *e = c->oldest;
        *lac_lru_slot(c, e->key, e->bytes, e->hash) = e->chain;
        lac_lru_unlink(c, e);
        c->drop(e->value);
        free(e);
        c->size--;
        c->evictions++;
    }
}

/* keep at most one entry per bucket on average; on failure the table stays as it is, only slower */
static inline void lac_lru_grow(lac_lru *c)
{
    size_t buckets = c->buckets ? c->buckets * 2 : 64;
    if (c->buckets && (size_t)c->size < c->buckets) return;
    lac_lru_entry **table = calloc(buckets, sizeof *table);
    if (!table) return;
    for (lac_lru_entry *e = c->newest; e; e = e->older) {
        e->chain = table[e->hash & (buckets - 1)];
        table[e->hash & (buckets - 1)] = e;
    }
    free(c->table);
    c->table = table;
    c->buckets = buckets;
}

/* the value with one more reference, or NULL */
static inline void *lac_lru_find(lac_lru *c, const void *key, size_t bytes)
{
    uint64_t hash = lac_lru_hash(key, bytes);
    pthread_mutex_lock(&c->lock);
    lac_lru_entry *e = c->table ? *lac_lru_slot(c, key, bytes, hash) : NULL;
    void *value = NULL;
    if (e) {
        lac_lru_unlink(c, e);
        lac_lru_push(c, e);
        value = e->value;
        c->retain(value);
        c->hits++;
    } else c->misses++;
    pthread_mutex_unlock(&c->lock);
    return value;
}

/* Takes over the caller's reference to `value` and returns the value to use with one reference for the caller: `value`
 * itself, or the one that another thread has inserted meanwhile. Without memory or capacity nothing is cached. */
static inline void *lac_lru_insert(lac_lru *c, const void *key, size_t bytes, void *value)
{
    uint64_t hash = lac_lru_hash(key, bytes);
    pthread_mutex_lock(&c->lock);
    lac_lru_grow(c);
    lac_lru_entry *e = c->table ? *lac_lru_slot(c, key, bytes, hash) : NULL;
    if (e) {
        c->drop(value);
        value = e->value;
        c->retain(value);
    } else if (c->table && c->capacity > 0 && (e = malloc(sizeof *e + bytes))) {
        e->hash = hash;
        e->bytes = bytes;
        e->value = value;
        memcpy(e->key, key, bytes);
        e->chain = c->table[hash & (c->buckets - 1)];
        c->table[hash & (c->buckets - 1)] = e;
        lac_lru_push(c, e);
        c->size++;
        c->retain(value);
        lac_lru_shrink(c, c->capacity);
    }
    pthread_mutex_unlock(&c->lock);
    return value;
}

static inline void lac_lru_resize(lac_lru *c, int64_t capacity)
{
    pthread_mutex_lock(&c->lock);
    c->capacity = capacity;
    lac_lru_shrink(c, capacity);
    pthread_mutex_unlock(&c->lock);
}

#endif
