/* cpu.h: what the CPU's kernels share.
 *
 * Every file in this directory is compiled once per instruction set with -DLAC_ISA=baseline|avx2|avx512; all symbols
 * that are not static go through LAC_CPU(name), so that the builds live in one library and the table of the best
 * one is chosen at run time.
 *
 * Threads. Work is cut into tasks by shape alone; lac_cpu_*_parallel() hands each thread one run of tasks. No task
 * depends on another and no reduction crosses tasks, except through partial results that are combined in task order
 * afterwards: the number of threads can not change a bit. Small work runs on the caller, without OpenMP.
 * Long loops notice an interrupt between pieces.
 *
 * Blocks. Kernels see short contiguous arrays in a compute type: double, float (also for f16 and bf16) or int64_t (all
 * integers and bool). load/store below convert and gather; contiguous data of the compute type is used in place.
 */
#ifndef LAC_CPU_H
#define LAC_CPU_H
#include "../backend.h"
#include <string.h>

#ifndef LAC_ISA
#error "compile with -DLAC_ISA=baseline, avx2 or avx512"
#endif
#define LAC_CPU_PASTE(isa, name) lac_cpu_##isa##_##name
#define LAC_CPU_EXPAND(isa, name) LAC_CPU_PASTE(isa, name)
#define LAC_CPU(name) LAC_CPU_EXPAND(LAC_ISA, name)
#define LAC_CPU_TEXT2(x) #x
#define LAC_CPU_TEXT(x) LAC_CPU_TEXT2(x)

enum { C_F32 = 0, C_F64 = 1, C_I64 = 2 }; /* compute types */
static inline int lac_compute_type(int dtype) { return dtype == LAC_F64 ? C_F64 : dtype <= LAC_BF16 ? C_F32 : C_I64; }
static inline size_t lac_compute_size(int ctype) { return ctype == C_F32 ? 4 : 8; }
/* is memory of this dtype already an array of its compute type? */
static inline bool lac_is_native(int dtype) { return dtype <= LAC_F32 || dtype == LAC_I64; }
static inline int64_t lac_bytes_of(int dtype)
{
    static const uint8_t bytes[LAC_DTYPES] = {8, 4, 2, 2, 8, 4, 1, 1};
    return bytes[dtype];
}

#ifndef LAC_PARALLEL_WORK
#define LAC_PARALLEL_WORK 32768 /* elements, or as costly: fewer are not worth threads; `make tsan` takes 1 */
#endif

/* tasks [begin, end) of a kernel; thread: 0 .. lac_cpu_*_threads(...) - 1, for per-thread workspace */
typedef void lac_task(void *context, int64_t begin, int64_t end, int thread);
/* Runs all tasks; `work` is the cost of all of them in elements. Returns 0 or "interrupted". */
int LAC_CPU(parallel)(const char *op, int64_t tasks, int64_t work, lac_task *task, void *context);
/* how many threads parallel() will use for that */
int LAC_CPU(threads)(int64_t tasks, int64_t work);
/* linear.c: out [E] = sums of x [..., E] over rows; nothing where out has no data */
int LAC_CPU(column_sums)(const lac_view *x, const lac_view *out);

/* n elements of dtype, `stride` bytes apart, as the compute type of dtype; returns x itself if it already is that,
 * else fills buffer and returns it */
const void *LAC_CPU(load)(int dtype, const void *x, int64_t stride, int64_t n, void *buffer);
/* the reverse: rounds to nearest even; integers wrap */
void LAC_CPU(store)(int dtype, const void *values, void *x, int64_t stride, int64_t n);

/* The same for the elements at row-major positions [start, start + n) of a view of any strides. load_linear returns an
 * address inside the view where it can. */
const void *LAC_CPU(load_linear)(const lac_view *v, int64_t start, int64_t n, void *buffer);
void LAC_CPU(store_linear)(const lac_view *v, int64_t start, int64_t n, const void *values);

/* An output of so many bytes does not stay in the last-level cache: v_stream() (simd.h) then writes past the caches,
 * which saves reading every line before it is overwritten. Half of the common 32 MiB, because an output that just fits
 * is wanted in the cache by whoever reads it next; asking the system gives the sum of a socket's caches on AMD. */
enum { LAC_STREAM_BYTES = 16 << 20 };

/* One loop nest over several views of one shape: axes sorted by the first view's strides and merged where all views
 * allow it. The innermost axis is the last. */
enum { LAC_NEST_VIEWS = 5 };
typedef struct {
    int ndim, views;
    int64_t shape[LAC_MAX_DIMS], stride[LAC_NEST_VIEWS][LAC_MAX_DIMS]; /* strides in bytes */
    char *data[LAC_NEST_VIEWS];
} lac_nest;
void LAC_CPU(nest_make)(lac_nest *nest, int views, const lac_view *const *view);
/* Makes a short last axis longer, for what treats every element by itself (the first views are its outputs). Where
 * inputs have their row again for each index of the axis before (a bias, a table of positions), both become one axis; a
 * bit is set for each such view, whose stride is still that of its row, of *cycle elements, at most `most`. Otherwise
 * an axis much longer than a very short one takes its place. */
uint32_t LAC_CPU(nest_lengthen)(lac_nest *nest, int outputs, int64_t most, int64_t *cycle);
/* addresses of all views at row `row` (all axes but the last, row-major); advances index[] by one row */
typedef struct {
    int64_t index[LAC_MAX_DIMS];
    char *at[LAC_NEST_VIEWS];
} lac_cursor;
void LAC_CPU(cursor_set)(const lac_nest *nest, lac_cursor *c, int64_t row);
static inline void lac_cursor_next(const lac_nest *nest, lac_cursor *c)
{
    for (int d = nest->ndim - 2; d >= 0; d--) {
        for (int v = 0; v < nest->views; v++) c->at[v] += nest->stride[v][d];
        if (++c->index[d] < nest->shape[d]) return;
        for (int v = 0; v < nest->views; v++) c->at[v] -= nest->stride[v][d] * nest->shape[d];
        c->index[d] = 0;
    }
}

/* Should view 0 be written past the caches? It is dense and large, and not memory that another view reads (such lines
 * are in the cache already). */
bool LAC_CPU(nest_streams)(const lac_nest *nest, int dtype);

/* one element of `bytes` bytes */
static inline void lac_put(int64_t bytes, char *to, const char *from)
{
    switch (bytes) {
    case 8:
        memcpy(to, from, 8);
        break;
    case 4:
        memcpy(to, from, 4);
        break;
    case 2:
        memcpy(to, from, 2);
        break;
    default:
        *to = *from;
    }
}
/* n elements of `bytes` bytes each, so and sx bytes apart; sx = 0 repeats one (copy.c) */
void LAC_CPU(move)(int bytes, char *out, int64_t so, const char *x, int64_t sx, int64_t n);

/* C = A B (+ C) (+ bias): C [batch, m, n] has dense rows ldc elements apart; A [batch, m, k] and B [batch, k, n] are
 * given by element strides. Any float dtypes with one compute type; half types multiply and accumulate in f32. matmul.c
 */
typedef struct {
    int64_t m, n, k;
    const void *a, *b;
    int a_dtype, b_dtype, c_dtype;
    int64_t a_rs, a_cs, b_rs, b_cs, ldc;
    void *c;
    bool accumulate;
    const lac_view *bias; /* [n] or NULL */
    int batch_axes;       /* c steps m * ldc from one batch item to the next */
    int64_t batch_shape[LAC_MAX_DIMS], a_batch[LAC_MAX_DIMS], b_batch[LAC_MAX_DIMS];
} lac_gemm;
int LAC_CPU(gemm)(const char *op, const lac_gemm *g);
/* how far from the start of A and B their item of the batch begins, in elements */
static inline void lac_gemm_item(const lac_gemm *g, int64_t item, int64_t *a, int64_t *b)
{
    *a = *b = 0;
    for (int d = g->batch_axes - 1; d >= 0; d--) {
        int64_t i = item % g->batch_shape[d];
        item /= g->batch_shape[d];
        *a += i * g->a_batch[d];
        *b += i * g->b_batch[d];
    }
}
/* few.c: the same for a handful of rows and one B with contiguous columns; few_fits() says whether it is that */
bool LAC_CPU(few_fits)(const lac_gemm *g);
int LAC_CPU(few)(const char *op, const lac_gemm *g);

/* One tile of an f32 product by one thread: C [m, n] = A B (+ C), k > 0; A's rows are contiguous, of B one
 * stride is 1. `space` is sgemm_bytes() of workspace. Only for what sgemm_takes(): the rest is BLAS's. sgemm.c */
typedef struct {
    int64_t m, n, k;
    const float *a, *b;
    int64_t a_rs, b_rs, b_cs;
    float *c;
    int64_t ldc;
    bool accumulate;
} lac_sgemm;
bool LAC_CPU(sgemm_takes)(int64_t m, int64_t n, int64_t k, bool rows); /* rows: those of A are contiguous */
size_t LAC_CPU(sgemm_bytes)(void);
void LAC_CPU(sgemm)(const lac_sgemm *g, float *space);

/* sgemm_amx.c: what gemm() does, for what gemm_unit_takes() and processors with a matrix unit (lac_has_unit) */
#ifdef __AVX512F__
#define LAC_MATRIX_UNIT
#endif
bool LAC_CPU(gemm_unit_takes)(const lac_gemm *g);
int LAC_CPU(gemm_unit)(const char *op, const lac_gemm *g);

/* The largest of each of w columns of n floats, w at most 1024, in rows `stride` bytes apart, and the sum of e^(x - m);
 * m passes over NaN, the sum does not. softmax.c */
void LAC_CPU(columns_state)(const void *x, int64_t stride, int64_t n, int64_t w, float *m, double *total);
/* double or float sums of short arrays, in a fixed order (reduce.c) */
double LAC_CPU(sum)(int ctype, const void *x, int64_t n);
/* the index tensor as int64_t in row-major order in new workspace; every value must be in [0, size) or equal *ignore */
int LAC_CPU(indices)(const char *op, const char *what, const lac_view *index, int64_t size, const int64_t *ignore,
                     int64_t **out);
/* the same: the tensor itself if it is that already and no `copy` is asked for (by whoever writes to memory that may be
 * the tensor's), else *own, which is NULL otherwise */
int LAC_CPU(index_list)(const char *op, const char *what, const lac_view *index, int64_t size, const int64_t *ignore,
                        bool copy, const int64_t **out, int64_t **own);

#define LAC_OP(name, args, gradient) int LAC_CPU(name)(const args *a);
#include "../ops.def"
#undef LAC_OP

#endif
