/* pad.c: padding and its gradient on the CPU.
 *
 * Each axis gets a table: for every position of the result the position in x, or -1 for the constant; the last one gets
 * a list of what lies together in x instead, and moves it as a block: a roll of a long tensor is two. Trailing axes
 * that are not padded and lie together in x are one unit, so that padding the positions of [B, N, E] moves rows of E.
 * The gradient goes the other way round: for an element of x all
 * places that show it, found by inverting the tables, are summed in double in a fixed order and rounded once.
 * Scattering instead would need atomics or one thread.
 */
#include "cpu.h"
#include "simd.h"

/* the source of position i of an axis of n elements */
static int64_t source_of(int mode, int64_t i, int64_t before, int64_t n)
{
    int64_t p = i - before;
    if (p >= 0 && p < n) return p;
    switch (mode) {
    case LAC_PAD_CONSTANT:
        return -1;
    case LAC_PAD_REFLECT:
        return p < 0 ? -p : 2 * (n - 1) - p;
    case LAC_PAD_REPLICATE:
        return p < 0 ? 0 : n - 1;
    default:
        return (p % n + n) % n;
    }
}

/* ---- forward ---- */

/* positions of the last axis that lie together in x from `from` on, or are all the constant (-1) */
typedef struct {
    int64_t from, units;
} pad_run;

typedef struct {
    const lac_a_pad *a;
    const int64_t *map[LAC_MAX_DIMS]; /* but of the last axis */
    const pad_run *run;               /* of a row of the result */
    int64_t runs;
    int axes;                 /* the axes before the unit */
    int64_t unit, unit_bytes; /* elements that move together */
    const char *value;        /* one element */
} pad_job;

static void fill_units(const pad_job *job, char *out, int64_t units)
{
    int64_t bytes = lac_bytes_of(job->a->x.dtype);
    LAC_CPU(move)((int)bytes, out, bytes, job->value, 0, units * job->unit);
}

/* As memcpy, which goes by the processor's string instruction from a few KiB on: that is slow on Zen 3 where the two
 * places are a few bytes apart but for whole pages, as they are in a roll. */
static void move_block(char *out, const char *x, int64_t bytes)
{
    enum { PIECE = 2048 };
    for (int64_t at = 0; at < bytes; at += PIECE)
        memcpy(out + at, x + at, (size_t)(bytes - at < PIECE ? bytes - at : PIECE));
}

static void pad_row(const pad_job *job, char *out, const char *x)
{
    const int last = job->axes - 1;
    const int64_t bytes = job->unit_bytes, step = job->a->x.stride[last] * lac_bytes_of(job->a->x.dtype);
    for (int64_t r = 0; r < job->runs; r++) {
        const int64_t units = job->run[r].units;
        const char *from = x + job->run[r].from * step;
        if (job->run[r].from < 0) fill_units(job, out, units);
        else if (step == bytes) move_block(out, from, units * bytes);
        else if (job->unit == 1) LAC_CPU(move)((int)bytes, out, bytes, from, step, units);
        else
            for (int64_t k = 0; k < units; k++) memcpy(out + k * bytes, from + k * step, (size_t)bytes);
        out += units * bytes;
    }
}

/* the runs of an axis of n elements, padded to `total`, into `run` if it is given; how many */
static int64_t find_runs(int mode, int64_t before, int64_t n, int64_t total, pad_run *run)
{
    int64_t count = 0, units = 1;
    for (int64_t i = 0; i < total; i += units, count++) {
        const int64_t from = source_of(mode, i, before, n), inside = i - before;
        const bool follows = mode == LAC_PAD_CIRCULAR || (inside >= 0 && inside < n);
        units = follows ? n - from : from < 0 && inside < 0 ? before - i : from < 0 ? total - i : 1;
        units = units < total - i ? units : total - i;
        if (run) run[count] = (pad_run){from, units};
    }
    return count;
}

static void pad_task(void *context, int64_t begin, int64_t end, int thread)
{
    const pad_job *job = context;
    const lac_view *x = &job->a->x, *out = &job->a->out;
    int last = job->axes - 1;
    int64_t row_units = out->shape[last], bytes = lac_bytes_of(x->dtype);
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t rest = t, at = 0;
        bool inside = true;
        for (int d = last - 1; d >= 0; d--) {
            int64_t p = job->map[d][rest % out->shape[d]];
            rest /= out->shape[d];
            inside = inside && p >= 0;
            at += p * x->stride[d];
        }
        char *to = (char *)out->data + t * row_units * job->unit_bytes;
        if (inside) pad_row(job, to, (const char *)x->data + at * bytes);
        else fill_units(job, to, row_units);
    }
}

/* all tables in one workspace: map[d][i], out's sizes */
static int64_t *make_maps(const char *op, int mode, int axes, const int64_t *before, const int64_t *sizes,
                          const int64_t *padded, const int64_t **map)
{
    int64_t total = 1;
    for (int d = 0; d < axes; d++) total += padded[d];
    int64_t *tables = lac_workspace_get(op, (size_t)total * 8), *at = tables;
    for (int d = 0; tables && d < axes; d++) {
        map[d] = at;
        for (int64_t i = 0; i < padded[d]; i++) *at++ = source_of(mode, i, before[d], sizes[d]);
    }
    return tables;
}

int LAC_CPU(pad)(const lac_a_pad *a)
{
    const lac_view *x = &a->x;
    char element[8];
    int64_t numel = lac_view_numel(&a->out), bytes = lac_bytes_of(x->dtype);
    if (numel == 0) return 0;
    pad_job job = {.a = a, .axes = x->ndim, .unit = 1, .value = element};
    lac_view one = {.data = element, .dtype = x->dtype, .ndim = 0};
    lac_a_fill fill = {.x = one, .value = a->value};
    LAC_TRY(LAC_CPU(fill)(&fill));
    if (x->ndim == 0) return memcpy(a->out.data, x->data, (size_t)bytes), 0;
    while (job.axes > 1 && a->before[job.axes - 1] == 0 && x->shape[job.axes - 1] == a->out.shape[job.axes - 1] &&
           (x->shape[job.axes - 1] == 1 || x->stride[job.axes - 1] == job.unit))
        job.unit *= x->shape[--job.axes];
    job.unit_bytes = job.unit * bytes;
    int last = job.axes - 1;
    int64_t n = a->out.shape[last];
    job.runs = find_runs(a->mode, a->before[last], x->shape[last], n, NULL);
    pad_run *run = lac_workspace_get("pad", (size_t)job.runs * sizeof *run);
    int64_t *tables = run ? make_maps("pad", a->mode, last, a->before, x->shape, a->out.shape, job.map) : NULL;
    if (!tables) return lac_workspace_put(run), LAC_E_MEMORY;
    find_runs(a->mode, a->before[last], x->shape[last], n, run);
    job.run = run;
    int status = LAC_CPU(parallel)("pad", numel / job.unit / n, numel, pad_task, &job);
    lac_workspace_put(tables);
    lac_workspace_put(run);
    return status;
}

/* ---- backward ---- */

typedef struct {
    const lac_a_pad_bwd *a;
    const int64_t *start[LAC_MAX_DIMS],
        *place[LAC_MAX_DIMS]; /* place[d][start[d][p] ...]: where p was put, ascending */
    int64_t bytes;
    char *workspace; /* per thread: a row of g, a row of sums, a row rounded */
} pad_bwd_job;

/* adds the row of g at `from` to sums: the places of every element, in order */
static void add_row(const pad_bwd_job *job, const char *from, double *sums, void *space)
{
    const lac_view *g = &job->a->g;
    int last = g->ndim - 1;
    int64_t n = job->a->out.shape[last], m = g->shape[last], bytes = lac_bytes_of(g->dtype);
    const int64_t *start = job->start[last], *place = job->place[last];
    const void *row = LAC_CPU(load)(g->dtype, from, g->stride[last] * bytes, m, space);
    for (int64_t i = 0; i < n; i++)
        for (int64_t e = start[i]; e < start[i + 1]; e++)
            sums[i] += g->dtype == LAC_F64 ? ((const double *)row)[place[e]] : (double)((const float *)row)[place[e]];
}

static void pad_bwd_task(void *context, int64_t begin, int64_t end, int thread)
{
    const pad_bwd_job *job = context;
    const lac_view *g = &job->a->g, *out = &job->a->out;
    int last = out->ndim - 1;
    int64_t n = out->shape[last], m = g->shape[last], bytes = lac_bytes_of(g->dtype);
    char *space = job->workspace + job->bytes * thread;
    double *sums = (double *)(void *)(space + m * 8);
    float *rounded = (float *)(void *)(sums + n);
    for (int64_t t = begin; t < end; t++) {
        int64_t position[LAC_MAX_DIMS], e[LAC_MAX_DIMS], rest = t;
        bool any = true;
        for (int d = last - 1; d >= 0; d--) {
            position[d] = rest % out->shape[d];
            rest /= out->shape[d];
            e[d] = job->start[d][position[d]];
            any = any && e[d] < job->start[d][position[d] + 1];
        }
        memset(sums, 0, (size_t)n * 8);
        while (any) { /* every combination of places of the outer axes */
            int64_t at = 0;
            for (int d = 0; d < last; d++) at += job->place[d][e[d]] * g->stride[d];
            add_row(job, (const char *)g->data + at * bytes, sums, space);
            int d = last - 1;
            for (; d >= 0; d--) {
                if (++e[d] < job->start[d][position[d] + 1]) break;
                e[d] = job->start[d][position[d]];
            }
            any = d >= 0;
        }
        char *to = (char *)out->data + t * n * bytes;
        if (g->dtype == LAC_F64) {
            memcpy(to, sums, (size_t)n * 8);
        } else {
            for (int64_t i = 0; i < n; i++) rounded[i] = g->dtype == LAC_F32 ? (float)sums[i] : v_round_odd(sums[i]);
            LAC_CPU(store)(g->dtype, rounded, to, bytes, n);
        }
    }
}

/* turns the table of an axis into the lists of places, which go to `to`: start [n + 1], then place */
static int64_t *invert(const int64_t *map, int64_t m, int64_t n, int64_t *to)
{
    int64_t *start = to, *place = to + n + 1;
    memset(start, 0, (size_t)(n + 1) * 8);
    for (int64_t i = 0; i < m; i++)
        if (map[i] >= 0) start[map[i] + 1]++;
    for (int64_t p = 0; p < n; p++) start[p + 1] += start[p];
    for (int64_t i = 0; i < m; i++)
        if (map[i] >= 0) place[start[map[i]]++] = i;
    memmove(start + 1, start, (size_t)n * 8);
    start[0] = 0;
    return place + m;
}

int LAC_CPU(pad_bwd)(const lac_a_pad_bwd *a)
{
    const char *op = "pad_bwd";
    const int64_t *map[LAC_MAX_DIMS];
    pad_bwd_job job = {.a = a};
    int axes = a->out.ndim;
    int64_t numel = lac_view_numel(&a->out), room = 1, bytes = lac_bytes_of(a->g.dtype);
    if (numel == 0) return 0;
    if (axes == 0) return memcpy(a->out.data, a->g.data, (size_t)bytes), 0;
    int64_t n = a->out.shape[axes - 1], m = a->g.shape[axes - 1], work = numel + lac_view_numel(&a->g);
    for (int d = 0; d < axes; d++) room += a->out.shape[d] + 1 + a->g.shape[d];
    int64_t *tables = make_maps(op, a->mode, axes, a->before, a->out.shape, a->g.shape, map);
    int64_t *lists = tables ? lac_workspace_get(op, (size_t)room * 8) : NULL, *at = lists;
    int status = lists ? 0 : LAC_E_MEMORY;
    for (int d = 0; d < axes && !status; d++) {
        job.start[d] = at;
        job.place[d] = at + a->out.shape[d] + 1;
        at = invert(map[d], a->g.shape[d], a->out.shape[d], at);
    }
    job.bytes = (m * 8 + n * 12 + 127) / 64 * 64;
    if (!status) job.workspace = lac_workspace_get(op, (size_t)(job.bytes * LAC_CPU(threads)(numel / n, work)));
    if (!status && !job.workspace) status = LAC_E_MEMORY;
    if (!status) status = LAC_CPU(parallel)(op, numel / n, work, pad_bwd_task, &job);
    lac_workspace_put(job.workspace);
    lac_workspace_put(lists);
    lac_workspace_put(tables);
    return status;
}
