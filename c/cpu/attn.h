/* attn.h: what the parts of the CPU's attention share: addresses, tasks, and the list of what a phase runs.
 *
 * attn.c decides what runs when; attn_kernel.inc, compiled for float and for double, computes one task. The names
 * below are everything that passes between them. A forward task is (branch, head, batch item, run of segments or
 * chunk of query rows); a backward task is (unit, batch item, run of segments). Task numbers are decoded
 * arithmetically: a list of tasks would take memory in proportion to N.
 */
#ifndef LAC_CPU_ATTN_H
#define LAC_CPU_ATTN_H
#include "cpu.h"
#include "../plan.h"
#include <sched.h>

enum { ATTN_EDGES = 4 }; /* most chunks of unequal size */

/* one lattice that a phase works on: a (branch, head), or a unit of heads that share keys */
typedef struct attn_item {
    int32_t branch, kv_head, heads;
    int32_t units; /* forward of few rows: neighbouring key heads from kv_head on, each with as many of the heads */
    const int32_t *head; /* [heads] */
    int64_t offset;
    int64_t segment0, segments; /* that hold queries */
    int64_t group;              /* segments of one task */
    int64_t chunks, chunk;      /* of one segment, several only if group is 1; query rows (backward: keys) of one */
    int64_t bunch, pieces;      /* chunks of one task, tasks of one segment */
    int64_t rows, grain; /* query rows of a segment that are cut into even chunks at multiples of the grain, or 0 */
    int64_t edge[ATTN_EDGES]; /* backward, if uneven: where chunks of keys begin */
    bool uneven;
    int64_t blocks, turn; /* backward: blocks of query rows, number of the first turn */
    int64_t first, mates; /* items of one branch are cut alike: number of their first task, how many they are */
    bool few;             /* forward: so few rows that keys are not packed */
} attn_item;

typedef struct attn_job {
    const lac_a_attend *a;
    const lac_a_attend_bwd *bwd; /* NULL in the forward */
    attn_item *items;
    int64_t item_count, tasks;
    int threads;        /* that may work on it */
    int64_t rows, keys; /* the most query rows (of all heads) and keys (backward) of a task: sizes of its buffers */
    bool carry;         /* continue the softmax that earlier phases left in out and lse */
    bool add;           /* add to out instead of storing */
    bool store;         /* the phase is the first one and reaches every row of dq, dk, dv: nothing to add to */
    /* results in the compute type, contiguous: the tensors themselves, or workspace for f16 and bf16; NULL where tasks
     * store straight into an f16 or bf16 tensor */
    void *acc_out, *acc_dq, *acc_dk, *acc_dv;
    void *delta, *new_delta; /* [B, N, H]: deltas of the phase's branches; where they are made, while they are */
    uint32_t whole; /* backward: branches (bits) whose tasks own whole segments and make the deltas themselves */
    int32_t *turns; /* backward: how many tasks have added to a block of rows of dq */
    int64_t turn_count;
    int *stop; /* set by whoever notices an interrupt */
} attn_job;

/* one decoded task */
typedef struct attn_task {
    const attn_item *item;
    int64_t batch, segment0, segment1, chunk; /* chunk: its first one */
} attn_task;

/* row (b, n, h) of a [B, N, H, D] view in the compute type: in place where possible, else in buffer [D] */
static inline const void *attn_load(const lac_view *v, int64_t b, int64_t n, int64_t h, void *buffer)
{
    int64_t bytes = lac_bytes_of(v->dtype), at = b * v->stride[0] + n * v->stride[1] + h * v->stride[2];
    if (v->stride[3] == 1 && lac_is_native(v->dtype)) return (const char *)v->data + at * bytes;
    return LAC_CPU(load)(v->dtype, (const char *)v->data + at * bytes, v->stride[3] * bytes, v->shape[3], buffer);
}

/* Asks for row (b, n, h) ahead of its use: rows of a dilated lattice lie too far apart for the hardware to guess. */
static inline void attn_prefetch(const lac_view *v, int64_t b, int64_t n, int64_t h)
{
    int64_t bytes = lac_bytes_of(v->dtype), at = b * v->stride[0] + n * v->stride[1] + h * v->stride[2];
    const char *row = (const char *)v->data + at * bytes;
    for (int64_t e = 0; e < v->shape[3] * bytes; e += 64) __builtin_prefetch(row + e);
}

/* The first cache has eight lines for addresses that agree modulo 4096. Rows that agree modulo 2048 are copied before
 * several of them are read at once. */
static inline bool attn_crowded(const lac_view *v, int64_t r)
{
    return v->stride[1] * r * lac_bytes_of(v->dtype) % 2048 == 0;
}

/* How many positions ahead to ask for rows that are r positions apart, if they are `bytes` apart: as many as the first
 * cache can hold beside what else is in use. For the same reason tensors are walked through one after the other. */
static inline int64_t attn_ahead(int64_t r, int64_t bytes)
{
    return r * (bytes % 4096 == 0 ? 5 : bytes % 2048 == 0 ? 10 : 12);
}
static inline int64_t attn_ahead_of(const lac_view *v, int64_t r)
{
    return attn_ahead(r, v->stride[1] * r * lac_bytes_of(v->dtype));
}

/* Rows of a head, at, at + step, ..., of which `left` are still to be asked for. */
typedef struct attn_rows {
    const lac_view *t;
    int64_t batch, head, at, step, left;
} attn_rows;

/* What is loaded next, asked for into the second cache in even pieces while the processor multiplies: a copy of a row
 * that is not there yet runs at the pace of memory, with nothing to do meanwhile. */
typedef struct attn_wishes {
    attn_rows rows[5];
    int count;
    int64_t each; /* rows in one go */
} attn_wishes;

static inline void attn_wish(attn_wishes *w, const lac_view *t, int64_t batch, int64_t head, int64_t at, int64_t step,
                             int64_t rows)
{
    if (rows > 0) w->rows[w->count++] = (attn_rows){t, batch, head, at, step, rows};
}

/* Deals the wishes out to `times` calls of attn_ask. */
static inline void attn_share(attn_wishes *w, int64_t times)
{
    w->each = times - 1;
    for (int i = 0; i < w->count; i++) w->each += w->rows[i].left;
    w->each /= times;
}

static inline void attn_ask(attn_wishes *w)
{
    for (int64_t k = 0; k < w->each && w->count; k++) {
        attn_rows *x = &w->rows[w->count - 1];
        const lac_view *t = x->t;
        int64_t bytes = lac_bytes_of(t->dtype);
        const char *row =
            (const char *)t->data + (x->batch * t->stride[0] + x->at * t->stride[1] + x->head * t->stride[2]) * bytes;
        for (int64_t e = 0; e < t->shape[3] * bytes; e += 64) __builtin_prefetch(row + e, 0, 2);
        x->at += x->step;
        if (--x->left == 0) w->count--;
    }
}

/* the first key of a chunk of keys of a segment, and the chunk of a key */
static inline int64_t attn_chunk_at(const attn_item *it, int64_t chunk)
{
    return it->uneven && chunk < it->chunks ? it->edge[chunk] : chunk * it->chunk;
}
static inline int64_t attn_chunk_of(const attn_item *it, int64_t key)
{
    int64_t chunk = it->chunks - 1;
    if (!it->uneven) return key / it->chunk;
    while (chunk > 0 && it->edge[chunk] > key) chunk--;
    return chunk;
}

/* where a chunk of query rows of a segment begins */
static inline int64_t attn_rows_at(const attn_item *it, int64_t chunk)
{
    if (!it->rows) return chunk * it->chunk;
    return chunk == it->chunks ? it->rows
                               : (2 * chunk * it->rows / it->chunks + it->grain) / (2 * it->grain) * it->grain;
}

/* The rows of a chunk of a span: the first one and, returned, how many; none if the span ends before. */
static inline int64_t attn_rows_of(const attn_item *it, lac_span s, int64_t chunk, int64_t *first)
{
    int64_t end = s.q0 + attn_rows_at(it, chunk + 1);
    *first = s.q0 + attn_rows_at(it, chunk);
    return (s.q1 < end ? s.q1 : end) - *first;
}

/* how many tasks have added to a block of rows of dq */
static inline int32_t attn_turn(const attn_job *job, int64_t block)
{
    return __atomic_load_n(job->turns + block, __ATOMIC_ACQUIRE);
}

/* Waits until `turn` tasks have added to a block of rows of dq. Returns false if the job is stopped. */
static inline bool attn_wait(const attn_job *job, int64_t block, int32_t turn)
{
    for (int spins = 0; attn_turn(job, block) != turn; spins++) {
        if (__atomic_load_n(job->stop, __ATOMIC_RELAXED)) return false;
        if (spins > 1000) sched_yield();
    }
    return true;
}

/* keys at or past this are padding in batch item b */
static inline int64_t attn_length(const lac_a_attend *a, int64_t b)
{
    if (!a->lengths.data) return a->plan->desc.m;
    int64_t at = b * a->lengths.stride[0];
    return a->lengths.dtype == LAC_I64 ? ((const int64_t *)a->lengths.data)[at]
                                       : ((const int32_t *)a->lengths.data)[at];
}

/* is key j of batch item b padding? */
static inline bool attn_key_dead(const lac_a_attend *a, int64_t b, int64_t length, int64_t j)
{
    if (j >= length) return true;
    return a->padding.data && !((const uint8_t *)a->padding.data)[b * a->padding.stride[0] + j * a->padding.stride[1]];
}

/* Options of single pairs: do some add to scores, or hide pairs? */
static inline bool attn_adds(const lac_a_attend *a) { return a->bias.data || a->slopes.data; }
static inline bool attn_hides(const lac_a_attend *a) { return a->mask.data || a->bias.data; }

static inline double attn_slope(const lac_a_attend *a, int32_t head)
{
    int64_t at = head * a->slopes.stride[0];
    return a->slopes.dtype == LAC_F64 ? ((const double *)a->slopes.data)[at] : ((const float *)a->slopes.data)[at];
}

/* element (b, head, n, key) of a [B, H, N, M] view, in elements from its start */
static inline int64_t attn_pair_at(const lac_view *v, int64_t b, int32_t head, int64_t n, int64_t key)
{
    return b * v->stride[0] + head * v->stride[1] + n * v->stride[2] + key * v->stride[3];
}

/* the lattice index, of positions base + i r, at which the block of index i ends */
static inline int64_t attn_block_end(const lac_a_attend *a, int64_t base, int64_t r, int64_t i)
{
    return lac_lattice_count(base, r, ((base + i * r) / a->block + 1) * a->block);
}

/* Of the lattice indices [*from, *to), at positions base + i r, the first run of keys that lie in active blocks of
 * query row n. Returns false if there is none; without blocks it is all of them. */
static inline bool attn_run(const lac_a_attend *a, int64_t b, int32_t head, int64_t n, int64_t base, int64_t r,
                            int64_t *from, int64_t *to)
{
    const lac_view *v = &a->blocks;
    if (!v->data) return *from < *to;
    const uint8_t *on = (const uint8_t *)v->data + attn_pair_at(v, b, head, n / a->block, 0);
    int64_t i = *from, end = *to;
    while (i < end && !on[(base + i * r) / a->block * v->stride[3]]) i = attn_block_end(a, base, r, i);
    *from = i;
    while (i < end && on[(base + i * r) / a->block * v->stride[3]]) i = attn_block_end(a, base, r, i);
    *to = i < end ? i : end;
    return *from < end;
}

/* which earlier branches keep position p for head h, one bit each: dedup leaves the pair to the first of them */
static inline uint32_t attn_kept_before(const lac_plan *p, int32_t branch, int32_t h, int64_t position)
{
    uint32_t kept = 0;
    for (int32_t e = 0; e < branch; e++) {
        if (h < p->head0[e] || h >= p->head0[e] + p->heads[e]) continue;
        int64_t at = position % p->segment[e] - lac_plan_offset(&p->desc, e, h);
        if (at >= 0 && at % p->desc.dilation[e] == 0) kept |= (uint32_t)1 << e;
    }
    return kept;
}

#endif
