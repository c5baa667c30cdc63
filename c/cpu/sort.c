/* sort.c: sort, topk, searchsorted, runs and nonzero on the CPU.
 *
 * Every dtype becomes an unsigned key whose order is the order of op_sort.c (sign bits folded, -0 made 0, NaN the
 * largest; complemented to descend). A 32-bit key and the position below it make one 64-bit word, so a sort of words
 * is stable whatever the algorithm: short lines use merge sort over insertion-sorted pieces, longer ones a radix sort
 * of 8 bits a pass that skips digits which all elements share. f64 and i64 take the same code on pairs of words. Values
 * are read from the input again through the positions, so their bits (NaN payloads, -0) are the input's. topk with few
 * elements keeps a short sorted list and compares blocks of keys with its worst; otherwise it finds the k-th key by
 * counting digits from the top (radix selection), collects, and sorts k words. Both are linear in n. Rejected:
 * quicksort and std::sort-like introsort (unstable, and three times the work of four radix passes at the sizes of a
 * vocabulary), SIMD sorting networks (a thousand lines for a factor of two).
 */
#include "cpu.h"
#include "simd.h"

enum { INSERTION = 24, RADIX = 256, FEW = 64, MANY = 8192, BLOCK = 64, PIECE = 1 << 16 };

/* key and position: 32-bit keys are packed into one word, 64-bit keys stand next to it */
typedef struct {
    uint64_t key, at;
} pair;

/* ---- keys ---- */

LAC_INLINE uint32_t key_of_float(float f)
{
    uint32_t b = v_bits(f), folded = b ^ (uint32_t)((int32_t)b >> 31 | INT32_MIN);
    folded = (b & 0x7fffffffu) == 0 ? 0x80000000u : folded;
    return (b & 0x7fffffffu) > 0x7f800000u ? 0xffffffffu : folded;
}
LAC_INLINE uint64_t key_of_double(double d)
{
    uint64_t b = v_bits64(d), folded = b ^ (uint64_t)((int64_t)b >> 63 | INT64_MIN);
    folded = (b & 0x7fffffffffffffffu) == 0 ? 0x8000000000000000u : folded;
    return (b & 0x7fffffffffffffffu) > 0x7ff0000000000000u ? 0xffffffffffffffffu : folded;
}

static bool is_wide(int dtype) { return dtype == LAC_F64 || dtype == LAC_I64; }

/* n values in the compute type of a dtype with narrow keys -> keys; flip complements them */
static void keys_narrow(int dtype, const void *values, int64_t n, uint32_t flip, uint32_t *keys)
{
    if (lac_dtype_is_float(dtype))
        for (int64_t i = 0; i < n; i++) keys[i] = key_of_float(((const float *)values)[i]) ^ flip;
    else
        for (int64_t i = 0; i < n; i++) keys[i] = ((uint32_t)((const int64_t *)values)[i] ^ 0x80000000u) ^ flip;
}
static void keys_wide(int dtype, const void *values, int64_t n, uint64_t flip, uint64_t *keys)
{
    if (dtype == LAC_F64)
        for (int64_t i = 0; i < n; i++) keys[i] = key_of_double(((const double *)values)[i]) ^ flip;
    else
        for (int64_t i = 0; i < n; i++) keys[i] = ((uint64_t)((const int64_t *)values)[i] ^ 0x8000000000000000u) ^ flip;
}

/* ---- sorting of words and pairs, ascending ---- */

/* T: element, before(x, y): strictly smaller, digit(x, d): 8 bits counted from the lowest of the key, digits of it */
#define SORTS(S, T, before, digit, digits)                                                                             \
    static void insertion_##S(T *x, int64_t n)                                                                         \
    {                                                                                                                  \
        for (int64_t i = 1; i < n; i++) {                                                                              \
            T v = x[i];                                                                                                \
            int64_t j = i;                                                                                             \
            for (; j > 0 && before(v, x[j - 1]); j--) x[j] = x[j - 1];                                                 \
            x[j] = v;                                                                                                  \
        }                                                                                                              \
    }                                                                                                                  \
    static void merge_##S(const T *x, int64_t middle, int64_t n, T *out)                                               \
    {                                                                                                                  \
        int64_t i = 0, j = middle;                                                                                     \
        for (int64_t k = 0; k < n; k++) {                                                                              \
            bool right = j < n && (i >= middle || before(x[j], x[i]));                                                 \
            out[k] = right ? x[j] : x[i];                                                                              \
            j += right;                                                                                                \
            i += !right;                                                                                               \
        }                                                                                                              \
    }                                                                                                                  \
    static T *merge_sort_##S(T *x, T *space, int64_t n)                                                                \
    {                                                                                                                  \
        for (int64_t at = 0; at < n; at += INSERTION) insertion_##S(x + at, n - at < INSERTION ? n - at : INSERTION);  \
        for (int64_t width = INSERTION; width < n; width *= 2) {                                                       \
            for (int64_t at = 0; at < n; at += 2 * width) {                                                            \
                int64_t size = n - at < 2 * width ? n - at : 2 * width;                                                \
                merge_##S(x + at, size < width ? size : width, size, space + at);                                      \
            }                                                                                                          \
            T *swap = x;                                                                                               \
            x = space;                                                                                                 \
            space = swap;                                                                                              \
        }                                                                                                              \
        return x;                                                                                                      \
    }                                                                                                                  \
    /* the sorted elements are in x or in space: returns which */                                                      \
    static T *sort_##S(T *x, T *space, int64_t n)                                                                      \
    {                                                                                                                  \
        if (n <= 4 * RADIX) return merge_sort_##S(x, space, n);                                                        \
        int64_t(*count)[RADIX] = (int64_t(*)[RADIX])(space + n); /* the caller leaves room */                          \
        memset(count, 0, sizeof(int64_t) * RADIX * digits);                                                            \
        for (int64_t i = 0; i < n; i++)                                                                                \
            for (int d = 0; d < digits; d++) count[d][digit(x[i], d)]++;                                               \
        for (int d = 0; d < digits; d++) {                                                                             \
            int64_t sum = 0;                                                                                           \
            if (count[d][digit(x[0], d)] == n) continue;                                                               \
            for (int b = 0; b < RADIX; b++) {                                                                          \
                int64_t here = count[d][b];                                                                            \
                count[d][b] = sum;                                                                                     \
                sum += here;                                                                                           \
            }                                                                                                          \
            for (int64_t i = 0; i < n; i++) space[count[d][digit(x[i], d)]++] = x[i];                                  \
            T *swap = x;                                                                                               \
            x = space;                                                                                                 \
            space = swap;                                                                                              \
        }                                                                                                              \
        return x;                                                                                                      \
    }
#define WORD_BEFORE(a, b) ((a) < (b))
#define WORD_DIGIT(v, d) ((v) >> (32 + 8 * (d)) & 255)
#define PAIR_BEFORE(a, b) ((a).key < (b).key || ((a).key == (b).key && (a).at < (b).at))
#define PAIR_DIGIT(v, d) ((v).key >> (8 * (d)) & 255)
SORTS(word, uint64_t, WORD_BEFORE, WORD_DIGIT, 4)
SORTS(pair, pair, PAIR_BEFORE, PAIR_DIGIT, 8)

/* ---- lines along the axis ---- */

typedef struct {
    const lac_a_sort *a;
    int64_t n, k, inner; /* line length, results per line, lines per step of the axes before `dim` */
    int64_t bytes;       /* workspace of one thread */
    bool wide, select;   /* 64-bit keys; topk */
    char *workspace;
} sort_job;

/* bytes for a line: its values, two arrays of elements, the counts; multiples of 64 */
static int64_t line_bytes(int64_t n, bool wide)
{
    int64_t element = wide ? (int64_t)sizeof(pair) : 8, counts = (int64_t)sizeof(int64_t) * RADIX * 8;
    return (n * 8 + 63) / 64 * 64 + (2 * n * element + counts + 127) / 64 * 64 + counts;
}

/* address of element 0 of line t of v */
static char *line_of(const lac_view *v, int dim, int64_t t)
{
    int64_t at = 0;
    for (int d = v->ndim - 1; d >= 0; d--) {
        if (d == dim) continue;
        at += t % v->shape[d] * v->stride[d];
        t /= v->shape[d];
    }
    return (char *)v->data + at * lac_bytes_of(v->dtype);
}

/* the k smallest of n keys by a sorted list of at most FEW words; returns k words */
static void select_few(const uint32_t *keys, int64_t n, int64_t k, uint64_t *best)
{
    int64_t have = 0;
    uint32_t worst = 0xffffffffu;
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t m = n - at < BLOCK ? n - at : BLOCK;
        uint32_t least = 0xffffffffu;
#pragma omp simd reduction(min : least)
        for (int64_t i = 0; i < m; i++) least = keys[at + i] < least ? keys[at + i] : least;
        if (have == k && least >= worst) continue;
        for (int64_t i = at; i < at + m; i++) {
            if (have == k && keys[i] >= worst) continue;
            uint64_t word = (uint64_t)keys[i] << 32 | (uint64_t)i;
            int64_t j = have < k ? have++ : k - 1;
            for (; j > 0 && word < best[j - 1]; j--) best[j] = best[j - 1];
            best[j] = word;
            worst = (uint32_t)(best[have - 1] >> 32);
        }
    }
}

/* The same for more elements: candidates below a bound are appended; when 2 k of them are there they are sorted, k
 * stay, and the last of those is the new bound. best has room for 2 k + BLOCK words, and as many and the counts behind
 * them. */
static const uint64_t *select_some(const uint32_t *keys, int64_t n, int64_t k, uint64_t *best)
{
    int64_t have = 0, room = 2 * k + BLOCK;
    uint32_t bound = 0xffffffffu;
    bool bounded = false;
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t m = n - at < BLOCK ? n - at : BLOCK;
        uint32_t least = 0xffffffffu;
#pragma omp simd reduction(min : least)
        for (int64_t i = 0; i < m; i++) least = keys[at + i] < least ? keys[at + i] : least;
        if (bounded && least >= bound) continue;
        for (int64_t i = at; i < at + m; i++)
            if (!bounded || keys[i] < bound) best[have++] = (uint64_t)keys[i] << 32 | (uint64_t)i;
        if (have < 2 * k) continue;
        const uint64_t *sorted = sort_word(best, best + room, have);
        if (sorted != best) memcpy(best, sorted, (size_t)k * sizeof *best);
        have = k;
        bound = (uint32_t)(best[k - 1] >> 32);
        bounded = true;
    }
    return sort_word(best, best + room, have);
}

/* the key of rank k (from 0) among n keys of `digits` bytes, and how many keys are smaller */
#define SELECT(S, K, digits)                                                                                           \
    static K kth_key_##S(const K *keys, int64_t n, int64_t k, int64_t *below)                                          \
    {                                                                                                                  \
        K prefix = 0, mask = 0;                                                                                        \
        *below = 0;                                                                                                    \
        for (int d = digits - 1; d >= 0; d--) {                                                                        \
            int64_t count[RADIX] = {0};                                                                                \
            int b = 0;                                                                                                 \
            for (int64_t i = 0; i < n; i++)                                                                            \
                if ((keys[i] & mask) == prefix) count[keys[i] >> (8 * d) & 255]++;                                     \
            for (; *below + count[b] <= k; b++) *below += count[b];                                                    \
            prefix |= (K)b << (8 * d);                                                                                 \
            mask |= (K)255 << (8 * d);                                                                                 \
        }                                                                                                              \
        return prefix;                                                                                                 \
    }
SELECT(word, uint32_t, 4)
SELECT(pair, uint64_t, 8)

/* values and positions of the first k of a line, from sorted words or pairs */
static void put_line(const sort_job *job, int64_t t, const char *line, const void *sorted)
{
    const lac_a_sort *a = job->a;
    int64_t bytes = lac_bytes_of(a->x.dtype), step = a->x.stride[a->dim] * bytes;
    char *values = line_of(&a->values, a->dim, t);
    int64_t *index = (int64_t *)(void *)line_of(&a->index, a->dim, t), so = a->index.stride[a->dim];
    for (int64_t i = 0; i < job->k; i++) {
        int64_t at =
            job->wide ? (int64_t)((const pair *)sorted)[i].at : (int64_t)(((const uint64_t *)sorted)[i] & 0xffffffffu);
        index[i * so] = at;
        lac_put(bytes, values + i * so * bytes, line + at * step);
    }
}

/* candidates of a selection, or all elements, into x; returns their number */
static int64_t collect_words(const sort_job *job, const uint32_t *keys, uint64_t *x)
{
    if (!job->select || job->k == job->n) {
        for (int64_t i = 0; i < job->n; i++) x[i] = (uint64_t)keys[i] << 32 | (uint64_t)i;
        return job->n;
    }
    int64_t below, m = 0;
    uint32_t last = kth_key_word(keys, job->n, job->k - 1, &below);
    for (int64_t i = 0, ties = job->k - below; i < job->n; i++) {
        if (keys[i] > last || (keys[i] == last && ties-- <= 0)) continue;
        x[m++] = (uint64_t)keys[i] << 32 | (uint64_t)i;
    }
    return m;
}
static int64_t collect_pairs(const sort_job *job, const uint64_t *keys, pair *x)
{
    int64_t below = 0, m = 0, ties = job->n;
    uint64_t last = ~(uint64_t)0;
    if (job->select && job->k < job->n) {
        last = kth_key_pair(keys, job->n, job->k - 1, &below);
        ties = job->k - below;
    }
    for (int64_t i = 0; i < job->n; i++) {
        if (keys[i] > last || (keys[i] == last && ties-- <= 0)) continue;
        x[m++] = (pair){keys[i], (uint64_t)i};
    }
    return m;
}

static void sort_task(void *context, int64_t begin, int64_t end, int thread)
{
    const sort_job *job = context;
    const lac_a_sort *a = job->a;
    int dtype = a->x.dtype;
    int64_t n = job->n, bytes = lac_bytes_of(dtype);
    char *space = job->workspace + job->bytes * thread, *keys = space + (n * 8 + 63) / 64 * 64;
    for (int64_t t = begin; t < end; t++) {
        const char *line = line_of(&a->x, a->dim, t);
        const void *values = LAC_CPU(load)(dtype, line, a->x.stride[a->dim] * bytes, n, space);
        if (job->wide) {
            pair *x = (pair *)(void *)keys;
            keys_wide(dtype, values, n, a->descending ? ~(uint64_t)0 : 0, (uint64_t *)(void *)space);
            int64_t m = collect_pairs(job, (const uint64_t *)(void *)space, x);
            put_line(job, t, line, sort_pair(x, x + n, m));
        } else {
            uint64_t *x = (uint64_t *)(void *)keys;
            uint32_t *narrow = (uint32_t *)(void *)(x + n); /* the second array is free until the sort */
            keys_narrow(dtype, values, n, a->descending ? ~(uint32_t)0 : 0, narrow);
            if (job->select && job->k <= FEW && job->k * 8 < n) {
                select_few(narrow, n, job->k, x);
                put_line(job, t, line, x);
            } else if (job->select && n >= MANY && job->k * 8 <= n) {
                put_line(job, t, line, select_some(narrow, n, job->k, x)); /* below n words: narrow stays */
            } else {
                int64_t m = collect_words(job, narrow, x);
                put_line(job, t, line, sort_word(x, x + n, m));
            }
        }
    }
}

static int sort_lines(const char *op, const lac_a_sort *a, bool select)
{
    sort_job job = {.a = a, .n = a->x.shape[a->dim], .k = a->index.shape[a->dim], .select = select};
    int64_t total = lac_view_numel(&a->index);
    if (total == 0) return 0;
    job.wide = is_wide(a->x.dtype) || job.n > UINT32_MAX;
    int64_t lines = total / job.k, work = lines * job.n * 16;
    job.bytes = line_bytes(job.n, job.wide);
    job.workspace = lac_workspace_get(op, (size_t)(job.bytes * LAC_CPU(threads)(lines, work)));
    if (!job.workspace) return LAC_E_MEMORY;
    int status = LAC_CPU(parallel)(op, lines, work, sort_task, &job);
    lac_workspace_put(job.workspace);
    return status;
}

int LAC_CPU(sort)(const lac_a_sort *a) { return sort_lines("sort", a, false); }
int LAC_CPU(topk)(const lac_a_sort *a) { return sort_lines("topk", a, true); }

/* ---- searchsorted ---- */

typedef struct {
    const lac_a_searchsorted *a;
    int64_t n, m; /* elements of a sorted row, values per row */
    const void *shared;
    int64_t bytes;
    char *workspace;
} search_job;

/* x before y in the order of op_sort.c */
#define BEFORE_FLOAT(x, y) ((x) < (y) || ((y) != (y) && (x) == (x)))
#define BEFORE_INT(x, y) ((x) < (y))
#define SEARCH(name, T, before)                                                                                        \
    static int64_t name(const T *sorted, int64_t n, T v, bool right)                                                   \
    {                                                                                                                  \
        int64_t low = 0;                                                                                               \
        while (n > 0) {                                                                                                \
            int64_t half = n / 2;                                                                                      \
            T s = sorted[low + half];                                                                                  \
            bool up = right ? !before(v, s) : before(s, v);                                                            \
            low = up ? low + half + 1 : low;                                                                           \
            n = up ? n - half - 1 : half;                                                                              \
        }                                                                                                              \
        return low;                                                                                                    \
    }
SEARCH(search_f, float, BEFORE_FLOAT)
SEARCH(search_d, double, BEFORE_FLOAT)
SEARCH(search_i, int64_t, BEFORE_INT)

/* a task is BLOCK values of one row */
static void search_task(void *context, int64_t begin, int64_t end, int thread)
{
    const search_job *job = context;
    const lac_a_searchsorted *a = job->a;
    int ctype = lac_compute_type(a->sorted.dtype), last = a->sorted.ndim - 1;
    int64_t blocks = (job->m + BLOCK - 1) / BLOCK, row_now = -1;
    const void *sorted = job->shared;
    double space[BLOCK];
    for (int64_t t = begin; t < end; t++) {
        int64_t row = t / blocks, at = t % blocks * BLOCK, count = job->m - at < BLOCK ? job->m - at : BLOCK;
        if (!sorted || (!job->shared && row != row_now)) {
            const char *line = line_of(&a->sorted, last, row);
            sorted = LAC_CPU(load)(a->sorted.dtype, line, a->sorted.stride[last] * lac_bytes_of(a->sorted.dtype),
                                   job->n, job->workspace + job->bytes * thread);
            row_now = row;
        }
        const void *v = LAC_CPU(load_linear)(&a->values, row * job->m + at, count, space);
        int64_t *out = (int64_t *)a->out.data + row * job->m + at;
        for (int64_t i = 0; i < count; i++)
            out[i] = ctype == C_F32   ? search_f(sorted, job->n, ((const float *)v)[i], a->right)
                     : ctype == C_F64 ? search_d(sorted, job->n, ((const double *)v)[i], a->right)
                                      : search_i(sorted, job->n, ((const int64_t *)v)[i], a->right);
    }
}

int LAC_CPU(searchsorted)(const lac_a_searchsorted *a)
{
    int64_t total = lac_view_numel(&a->values), last = a->sorted.ndim - 1;
    search_job job = {.a = a, .n = a->sorted.shape[last], .m = total};
    if (total == 0) return 0;
    if (last > 0) job.m = a->values.shape[last];
    int64_t rows = total / job.m, tasks = rows * ((job.m + BLOCK - 1) / BLOCK), work = total * 32;
    job.bytes = (job.n * 8 + 63) / 64 * 64 + 64;
    job.workspace = lac_workspace_get("searchsorted", (size_t)(job.bytes * LAC_CPU(threads)(tasks, work)));
    if (!job.workspace) return LAC_E_MEMORY;
    if (rows == 1)
        job.shared = LAC_CPU(load)(a->sorted.dtype, line_of(&a->sorted, (int)last, 0),
                                   a->sorted.stride[last] * lac_bytes_of(a->sorted.dtype), job.n, job.workspace);
    int status = LAC_CPU(parallel)("searchsorted", tasks, work, search_task, &job);
    lac_workspace_put(job.workspace);
    return status;
}

/* ---- runs ---- */

int LAC_CPU(runs)(const lac_a_runs *a)
{
    int64_t n = a->sorted.shape[0], *order, *inverse = a->inverse.data, *starts = a->starts.data, count = 0;
    bool wide = is_wide(a->sorted.dtype);
    double space[BLOCK];
    uint64_t keys[BLOCK], before = 0;
    uint32_t narrow[BLOCK];
    LAC_TRY(LAC_CPU(indices)("runs", "order", &a->order, n, NULL, &order));
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t m = n - at < BLOCK ? n - at : BLOCK;
        const void *v = LAC_CPU(load_linear)(&a->sorted, at, m, space);
        if (wide) {
            keys_wide(a->sorted.dtype, v, m, 0, keys);
        } else {
            keys_narrow(a->sorted.dtype, v, m, 0, narrow);
            for (int64_t i = 0; i < m; i++) keys[i] = narrow[i];
        }
        for (int64_t i = 0; i < m; i++) {
            if (at + i == 0 || keys[i] != before) starts[count++] = at + i;
            before = keys[i];
            inverse[order[at + i]] = count - 1;
        }
    }
    *a->count = count;
    lac_workspace_put(order);
    return 0;
}

/* ---- nonzero ---- */

typedef struct {
    const lac_a_nonzero *a;
    int64_t total, *found; /* per piece: how many; in the second pass: where its first one goes */
} nonzero_job;

/* flags[i]: is element i of the block not zero? */
static int64_t nonzero_block(const lac_view *x, int64_t at, int64_t m, uint8_t *flags)
{
    double space[4 * BLOCK];
    int64_t count = 0;
    int ctype = lac_compute_type(x->dtype);
    const void *v = LAC_CPU(load_linear)(x, at, m, space);
    if (ctype == C_F32)
        for (int64_t i = 0; i < m; i++) flags[i] = ((const float *)v)[i] != 0;
    else if (ctype == C_F64)
        for (int64_t i = 0; i < m; i++) flags[i] = ((const double *)v)[i] != 0;
    else
        for (int64_t i = 0; i < m; i++) flags[i] = ((const int64_t *)v)[i] != 0;
    for (int64_t i = 0; i < m; i++) count += flags[i];
    return count;
}

static void nonzero_task(void *context, int64_t begin, int64_t end, int thread)
{
    const nonzero_job *job = context;
    const lac_view *x = &job->a->x;
    int64_t *out = job->a->out.data, axes = x->ndim;
    uint8_t flags[4 * BLOCK];
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t stop = job->total - t * PIECE < PIECE ? job->total : (t + 1) * PIECE, found = 0;
        int64_t *row = out ? out + job->found[t] * axes : NULL;
        for (int64_t at = t * PIECE; at < stop; at += 4 * BLOCK) {
            int64_t m = stop - at < 4 * BLOCK ? stop - at : 4 * BLOCK, here = nonzero_block(x, at, m, flags);
            found += here;
            if (!out || !here) continue;
            for (int64_t i = 0; i < m; i++) {
                if (!flags[i]) continue;
                int64_t rest = at + i;
                for (int64_t d = axes - 1; d >= 0; d--) {
                    row[d] = d ? rest % x->shape[d] : rest;
                    rest /= x->shape[d];
                }
                row += axes;
            }
        }
        if (!out) job->found[t] = found;
    }
}

int LAC_CPU(nonzero)(const lac_a_nonzero *a)
{
    nonzero_job job = {.a = a, .total = lac_view_numel(&a->x)};
    lac_a_nonzero counting = *a;
    int64_t pieces = (job.total + PIECE - 1) / PIECE, sum = 0;
    counting.out.data = NULL;
    *a->count = 0;
    if (job.total == 0 || (a->out.data && a->out.shape[0] == 0)) return 0;
    job.found = lac_workspace_get("nonzero", (size_t)pieces * 8);
    if (!job.found) return LAC_E_MEMORY;
    job.a = &counting;
    int status = LAC_CPU(parallel)("nonzero", pieces, job.total, nonzero_task, &job);
    for (int64_t i = 0; i < pieces && !status; i++) {
        int64_t here = job.found[i];
        job.found[i] = sum;
        sum += here;
    }
    *a->count = sum;
    job.a = a;
    if (!status && a->out.data) status = LAC_CPU(parallel)("nonzero", pieces, job.total * 2, nonzero_task, &job);
    lac_workspace_put(job.found);
    return status;
}
