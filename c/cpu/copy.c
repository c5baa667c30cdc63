/* copy.c: moving elements on the CPU: copy and cast, fill, where, arange.
 *
 * copy and where move bytes and know only the element size; a cast goes through the compute types in strips that stay
 * in the first-level cache. A transposing copy works in square tiles, because a strip would touch one cache line per
 * element and drop it before its neighbours are wanted; a tile goes through a buffer, because its lines in memory are
 * often a power of two apart and push each other out of the cache. Large dense results are written past the caches
 * (v_stream). Rejected: a copy that converts directly between every pair of dtypes (56 loops for what two passes over a
 * strip do).
 */
#include "cpu.h"
#include "simd.h"

enum { STRIP = 1024, STREAM_STRIP = 512 };
typedef struct {
    lac_nest nest; /* view 0 is the output */
    int32_t dtype[4];
    bool stream;           /* a dense output larger than the caches: write past them */
    int64_t strip, strips; /* elements of a strip; strips per row */
} move_job;

/* ---- moving bytes: copy, where, fill ---- */

#define MOVE(type)                                                                                                     \
    do {                                                                                                               \
        for (int64_t i = 0; i < n; i++) *(type *)(out + i * so) = *(const type *)(x + i * sx);                         \
    } while (0)

#define REPEAT(type)                                                                                                   \
    do {                                                                                                               \
        type value = *(const type *)x, *to = (type *)out;                                                              \
        for (int64_t i = 0; i < n; i++) to[i] = value;                                                                 \
    } while (0)

void LAC_CPU(move)(int bytes, char *out, int64_t so, const char *x, int64_t sx, int64_t n)
{
    if (so == bytes && sx == bytes) {
        memcpy(out, x, (size_t)(n * bytes));
        return;
    }
    if (so == bytes && sx == 0) {
        switch (bytes) {
        case 1:
            REPEAT(uint8_t);
            return;
        case 2:
            REPEAT(uint16_t);
            return;
        case 4:
            REPEAT(uint32_t);
            return;
        default:
            REPEAT(uint64_t);
            return;
        }
    }
    switch (bytes) {
    case 1:
        MOVE(uint8_t);
        break;
    case 2:
        MOVE(uint16_t);
        break;
    case 4:
        MOVE(uint32_t);
        break;
    default:
        MOVE(uint64_t);
        break;
    }
}

/* Doubles or floats to integers: towards zero, saturating, NaN gives 0. AVX2 makes 32-bit integers of doubles; longer
 * ones below 2^51 it shifts into the mantissa, and what is larger goes one by one. */
LAC_INLINE int64_t to_i64(double v)
{
    return v != v ? 0 : v >= 0x1p63 ? INT64_MAX : (int64_t)(v < -0x1p63 ? -0x1p63 : v);
}
#define TO_INTEGERS(name, T)                                                                                           \
    static void name(int dtype, const T *x, int64_t *to, int64_t n)                                                    \
    {                                                                                                                  \
        const double magic = 0x1.8p52, low = dtype == LAC_I32 ? -0x1p31 : 0;                                           \
        const double high = dtype == LAC_I32 ? 0x1p31 - 1 : 255;                                                       \
        int far = 0;                                                                                                   \
        if (dtype == LAC_BOOL) {                                                                                       \
            for (int64_t i = 0; i < n; i++) to[i] = x[i] != 0;                                                         \
            return;                                                                                                    \
        }                                                                                                              \
        if (dtype != LAC_I64) {                                                                                        \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                        \
            {                                                                                                          \
                double v = (double)x[i];                                                                               \
                v = v > low ? v : low;                                                                                 \
                v = v < high ? v : high;                                                                               \
                to[i] = (int64_t)(int32_t)(x[i] == x[i] ? v : 0);                                                      \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        _Pragma("omp simd reduction(| : far)") for (int64_t i = 0; i < n; i++) far |= !(fabs((double)x[i]) < 0x1p51);  \
        if (far)                                                                                                       \
            for (int64_t i = 0; i < n; i++) to[i] = to_i64((double)x[i]);                                              \
        else                                                                                                           \
            for (int64_t i = 0; i < n; i++)                                                                            \
                to[i] = (int64_t)(v_bits64(trunc((double)x[i]) + magic) - v_bits64(magic));                            \
    }
TO_INTEGERS(to_integers_f, float)
TO_INTEGERS(to_integers_d, double)

/* are all of them 32-bit integers? Those the vector units can make floats of. */
static bool all_short(const int64_t *x, int64_t n)
{
    uint64_t high = 0;
#pragma omp simd reduction(| : high)
    for (int64_t i = 0; i < n; i++) high |= ((uint64_t)x[i] + 0x80000000u) >> 32;
    return !high;
}

/* Values of one compute type in another. To integers: towards zero, saturating, NaN gives 0. What is on its way to a
 * half type is rounded to odd, so that the second rounding is the only one that counts. */
static const void *convert_block(int from, int to, int dtype, const void *x, void *buffer, int64_t n)
{
    if (from == to) return x;
    const float *f = x;
    const double *d = x;
    const int64_t *l = x;
    float *of = buffer;
    double *od = buffer;
    const bool half = dtype == LAC_F16 || dtype == LAC_BF16, narrow = from == C_I64 && all_short(l, n);
    if (to == C_F32 && half)
        for (int64_t i = 0; i < n; i++) of[i] = v_round_odd(from == C_F64 ? d[i] : (double)l[i]);
    else if (to == C_F32 && from == C_F64)
        for (int64_t i = 0; i < n; i++) of[i] = (float)d[i];
    else if (to == C_F32 && narrow)
        for (int64_t i = 0; i < n; i++) of[i] = (float)(int32_t)l[i];
    else if (to == C_F32)
        for (int64_t i = 0; i < n; i++) of[i] = (float)l[i];
    else if (to == C_F64 && from == C_F32)
        for (int64_t i = 0; i < n; i++) od[i] = (double)f[i];
    else if (to == C_F64 && narrow)
        for (int64_t i = 0; i < n; i++) od[i] = (double)(int32_t)l[i];
    else if (to == C_F64)
        for (int64_t i = 0; i < n; i++) od[i] = (double)l[i];
    else if (from == C_F32) to_integers_f(dtype, f, buffer, n);
    else to_integers_d(dtype, d, buffer, n);
    return buffer;
}

static void copy_task(void *context, int64_t begin, int64_t end, int thread)
{
    const move_job *job = context;
    const lac_nest *nest = &job->nest;
    const int last = nest->ndim - 1, to = job->dtype[0], from = job->dtype[1];
    const int64_t length = nest->shape[last];
    double first[STRIP], second[STRIP];
    lac_cursor at;
    (void)thread;
    int64_t strip = begin % job->strips;
    LAC_CPU(cursor_set)(nest, &at, begin / job->strips);
    for (int64_t t = begin; t < end; t++) {
        int64_t start = strip * job->strip, n = length - start < job->strip ? length - start : job->strip;
        int64_t so = nest->stride[0][last], sx = nest->stride[1][last];
        char *out = at.at[0] + start * so;
        const char *x = at.at[1] + start * sx;
        if (length == 1) so = lac_bytes_of(to), sx = lac_bytes_of(from);
        if (job->stream) {
            const void *v = x;
            if (to != from) v = LAC_CPU(load)(from, x, sx, n, first);
            else if (sx != so) LAC_CPU(move)((int)so, (char *)first, so, x, sx, n), v = first;
            if (to != from) {
                v = convert_block(lac_compute_type(from), lac_compute_type(to), to, v, second, n);
                if (!lac_is_native(to)) LAC_CPU(store)(to, v, first, so, n), v = first;
            }
            v_stream(out, v, (size_t)(n * so));
        } else if (to == from) {
            LAC_CPU(move)((int)lac_bytes_of(to), out, so, x, sx, n);
        } else {
            const void *v = LAC_CPU(load)(from, x, sx, n, first);
            v = convert_block(lac_compute_type(from), lac_compute_type(to), to, v, second, n);
            LAC_CPU(store)(to, v, out, so, n);
        }
        if (++strip == job->strips) {
            strip = 0;
            lac_cursor_next(nest, &at);
        }
    }
    if (job->stream) v_stream_end();
}

/* A transposing copy in square tiles: a strip would touch one cache line per element and drop it before its
 * neighbours are wanted. Axis `tile_axis` is contiguous in x, the last axis in out. */
enum { TILE = 32 };
typedef struct {
    lac_nest nest;
    int tile_axis, bytes;
    bool stream; /* a result larger than the caches */
    int64_t tiles_a, tiles_b;
} transpose_job;

/* a tile through a buffer: x is read and out written along their own rows, which may be a power of two apart */
#define TILE_MOVE(type)                                                                                                \
    do {                                                                                                               \
        type tile[TILE][TILE];                                                                                         \
        for (int64_t j = 0; j < nb; j++)                                                                               \
            for (int64_t i = 0; i < na; i++) tile[i][j] = ((const type *)(x + j * xb))[i];                             \
        for (int64_t i = 0; i < na; i++)                                                                               \
            if (job->stream) v_stream(out + i * oa, tile[i], (size_t)nb * sizeof(type));                               \
            else memcpy(out + i * oa, tile[i], (size_t)nb * sizeof(type));                                             \
    } while (0)

static void transpose_task(void *context, int64_t begin, int64_t end, int thread)
{
    const transpose_job *job = context;
    const lac_nest *nest = &job->nest;
    int a = job->tile_axis, b = nest->ndim - 1;
    int64_t oa = nest->stride[0][a], xb = nest->stride[1][b];
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t tb = t % job->tiles_b * TILE, ta = t / job->tiles_b % job->tiles_a * TILE,
                rest = t / job->tiles_b / job->tiles_a;
        char *out = nest->data[0] + ta * oa + tb * job->bytes;
        const char *x = nest->data[1] + ta * job->bytes + tb * xb;
        for (int d = b - 1; d >= 0; d--) {
            if (d == a) continue;
            out += rest % nest->shape[d] * nest->stride[0][d];
            x += rest % nest->shape[d] * nest->stride[1][d];
            rest /= nest->shape[d];
        }
        int64_t na = nest->shape[a] - ta < TILE ? nest->shape[a] - ta : TILE;
        int64_t nb = nest->shape[b] - tb < TILE ? nest->shape[b] - tb : TILE;
        switch (job->bytes) {
        case 1:
            TILE_MOVE(uint8_t);
            break;
        case 2:
            TILE_MOVE(uint16_t);
            break;
        case 4:
            TILE_MOVE(uint32_t);
            break;
        default:
            TILE_MOVE(uint64_t);
            break;
        }
    }
    if (job->stream) v_stream_end();
}

/* fills the job if a and b transpose a plane that is worth tiles */
static bool transpose_fits(const lac_view *out, const lac_view *x, transpose_job *job)
{
    const lac_view *views[] = {out, x};
    if (out->dtype != x->dtype) return false;
    LAC_CPU(nest_make)(&job->nest, 2, views);
    int b = job->nest.ndim - 1;
    job->bytes = (int)lac_bytes_of(out->dtype);
    if (job->nest.stride[0][b] != job->bytes || job->nest.stride[1][b] == job->bytes || job->nest.shape[b] < 8)
        return false;
    for (job->tile_axis = 0; job->tile_axis < b; job->tile_axis++)
        if (job->nest.stride[1][job->tile_axis] == job->bytes && job->nest.shape[job->tile_axis] >= 8) break;
    if (job->tile_axis == b) return false;
    job->stream = LAC_CPU(nest_streams)(&job->nest, out->dtype);
    job->tiles_a = (job->nest.shape[job->tile_axis] + TILE - 1) / TILE;
    job->tiles_b = (job->nest.shape[b] + TILE - 1) / TILE;
    return true;
}

static int move_run(const char *op, lac_task *task, int count, const lac_view *const *views)
{
    if (lac_view_numel(views[0]) == 0) return 0;
    move_job job;
    LAC_CPU(nest_make)(&job.nest, count, views);
    for (int v = 0; v < count; v++) job.dtype[v] = views[v]->dtype;
    job.stream = LAC_CPU(nest_streams)(&job.nest, views[0]->dtype);
    int64_t rows = 1, length = job.nest.shape[job.nest.ndim - 1];
    for (int d = 0; d < job.nest.ndim - 1; d++) rows *= job.nest.shape[d];
    job.strip = job.stream ? STREAM_STRIP : STRIP;
    job.strips = (length + job.strip - 1) / job.strip;
    return LAC_CPU(parallel)(op, rows * job.strips, rows * length, task, &job);
}

int LAC_CPU(copy)(const lac_a_copy *a)
{
    const lac_view *views[] = {&a->out, &a->x};
    transpose_job job;
    int64_t numel = lac_view_numel(&a->out), tiles;
    if (numel >= 4 * TILE * TILE && transpose_fits(&a->out, &a->x, &job)) {
        tiles = job.tiles_a * job.tiles_b;
        for (int d = 0; d < job.nest.ndim - 1; d++)
            if (d != job.tile_axis) tiles *= job.nest.shape[d];
        return LAC_CPU(parallel)("copy", tiles, numel, transpose_task, &job);
    }
    return move_run("copy", copy_task, 2, views);
}

int LAC_CPU(fill)(const lac_a_fill *a)
{
    /* the value, converted once, is a view of stride 0 */
    double value = a->value, converted;
    uint64_t space = 0;
    const void *v = convert_block(C_F64, lac_compute_type(a->x.dtype), a->x.dtype, &value, &converted, 1);
    LAC_CPU(store)(a->x.dtype, v, &space, lac_bytes_of(a->x.dtype), 1);
    lac_view x = a->x;
    x.data = &space;
    for (int i = 0; i < x.ndim; i++) x.stride[i] = 0;
    const lac_view *views[] = {&a->x, &x};
    return move_run("fill", copy_task, 2, views);
}

/* out is an array; x and y are arrays, or one value for all */
#define SELECT_DENSE(type)                                                                                             \
    do {                                                                                                               \
        type *to = (type *)out;                                                                                        \
        const type *tx = (const type *)x, *ty = (const type *)y;                                                       \
        const uint8_t *tc = (const uint8_t *)c;                                                                        \
        const type vx = *tx, vy = *ty;                                                                                 \
        if (s[2] && s[3]) _Pragma("omp simd") for (int64_t i = 0; i < n; i++) to[i] = tc[i] ? tx[i] : ty[i];           \
        else if (s[2]) _Pragma("omp simd") for (int64_t i = 0; i < n; i++) to[i] = tc[i] ? tx[i] : vy;                 \
        else if (s[3]) _Pragma("omp simd") for (int64_t i = 0; i < n; i++) to[i] = tc[i] ? vx : ty[i];                 \
        else _Pragma("omp simd") for (int64_t i = 0; i < n; i++) to[i] = tc[i] ? vx : vy;                              \
    } while (0)
#define SELECT(type)                                                                                                   \
    do {                                                                                                               \
        if (dense) SELECT_DENSE(type);                                                                                 \
        else                                                                                                           \
            for (int64_t i = 0; i < n; i++)                                                                            \
                *(type *)(out + i * s[0]) =                                                                            \
                    *(const uint8_t *)(c + i * s[1]) ? *(const type *)(x + i * s[2]) : *(const type *)(y + i * s[3]);  \
    } while (0)

static void where_task(void *context, int64_t begin, int64_t end, int thread)
{
    const move_job *job = context;
    const lac_nest *nest = &job->nest;
    const int last = nest->ndim - 1;
    const int64_t length = nest->shape[last];
    lac_cursor at;
    (void)thread;
    int64_t strip = begin % job->strips, s[4], bytes = lac_bytes_of(job->dtype[0]);
    double space[STREAM_STRIP];
    for (int v = 0; v < 4; v++) s[v] = nest->stride[v][last];
    bool dense = s[0] == bytes && s[1] == 1 && (s[2] == bytes || s[2] == 0) && (s[3] == bytes || s[3] == 0);
    bool stream = job->stream && dense;
    LAC_CPU(cursor_set)(nest, &at, begin / job->strips);
    for (int64_t t = begin; t < end; t++) {
        int64_t start = strip * job->strip, n = length - start < job->strip ? length - start : job->strip;
        char *place = at.at[0] + start * s[0], *out = stream ? (char *)space : place;
        const char *c = at.at[1] + start * s[1], *x = at.at[2] + start * s[2], *y = at.at[3] + start * s[3];
        switch (bytes) {
        case 1:
            SELECT(uint8_t);
            break;
        case 2:
            SELECT(uint16_t);
            break;
        case 4:
            SELECT(uint32_t);
            break;
        default:
            SELECT(uint64_t);
            break;
        }
        if (stream) v_stream(place, space, (size_t)(n * bytes));
        if (++strip == job->strips) {
            strip = 0;
            lac_cursor_next(nest, &at);
        }
    }
    if (job->stream) v_stream_end();
}

int LAC_CPU(where)(const lac_a_where *a)
{
    const lac_view *views[] = {&a->out, &a->cond, &a->x, &a->y};
    return move_run("where", where_task, 4, views);
}

/* dst [n]: start + i step; integers exactly, floats in double and rounded once */
int LAC_CPU(arange)(const lac_a_arange *a)
{
    const lac_view *v = &a->out;
    int ctype = lac_compute_type(v->dtype);
    int64_t n = v->ndim ? v->shape[0] : 1, stride = v->ndim ? v->stride[0] * lac_bytes_of(v->dtype) : 0;
    double values[STRIP], converted[STRIP];
    for (int64_t at = 0; at < n; at += STRIP) {
        int64_t m = n - at < STRIP ? n - at : STRIP;
        const void *block = values;
        if (ctype == C_I64) {
            int64_t *integers = (int64_t *)values;
            for (int64_t i = 0; i < m; i++)
                integers[i] = (int64_t)((uint64_t)(int64_t)a->start + (uint64_t)(at + i) * (uint64_t)(int64_t)a->step);
        } else {
            /* vector units count in 32 bits */
            for (int32_t i = 0; i < (int32_t)m; i++) values[i] = a->start + ((double)at + (double)i) * a->step;
            block = convert_block(C_F64, ctype, v->dtype, values, converted, m);
        }
        LAC_CPU(store)(v->dtype, block, (char *)v->data + at * stride, stride, m);
        if (lac_interrupted()) LAC_FAIL(INTERRUPTED, "arange: interrupted");
    }
    return 0;
}
