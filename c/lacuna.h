/* lacuna.h: the engine's one public header, and its manual.
 *
 * Everything that a host language may call is here. The text between the two ffi markers is embedded in the
 * library and handed out by lac_cdef(), so the declarations that LuaJIT reads can never drift from the
 * binary. In that region: plain C declarations only, no preprocessor lines, no function pointers.
 *
 * Conventions
 *   - Every function returns a status (0 is success) unless its comment says otherwise; the message of the
 *     last failure on this thread is lac_last_error(). Nothing here aborts, exits or throws on bad input.
 *   - Tensors are passed by pointer. An `out` tensor is uninitialised on entry: the call infers shape and
 *     dtype, takes storage from the pool with one reference and fills the struct; on failure it leaves
 *     out->storage NULL. Arguments named `dst` or documented "in place" exist already.
 *   - Inputs may have any strides, also 0 (broadcast) and negative, unless stated otherwise.
 *   - Dimensions, axes and positions are 0-based here; the Lua layer is 1-based.
 *   - Shapes are written [B, N, H, D]: batch, positions, heads, head dimension. R rows, V vocabulary, E width.
 */
#ifndef LACUNA_H
#define LACUNA_H
#include <stddef.h>
#include <stdint.h>

#define LAC_VERSION "0.1.0"
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* one declaration, one line */
/* clang-format off */
/* <ffi> */
enum { LAC_ABI = 2, LAC_MAX_DIMS = 6, LAC_MAX_BRANCHES = 32 };
enum { LAC_F64 = 0, LAC_F32 = 1, LAC_F16 = 2, LAC_BF16 = 3, LAC_I64 = 4, LAC_I32 = 5, LAC_U8 = 6, LAC_BOOL = 7, LAC_DTYPES = 8 };
enum { LAC_CPU = 0, LAC_CUDA = 256 }; /* a CUDA device k is LAC_CUDA + k */

typedef struct lac_storage lac_storage; /* opaque, reference-counted bytes from the pool (or a mapped file) */
typedef struct lac_plan lac_plan;       /* opaque, reference-counted attention plan */

/* A strided view of a storage. Strides and offset count elements. Views that a host makes by copying the
 * struct do not own a reference: they must keep the owner alive. */
typedef struct lac_tensor {
    lac_storage *storage;
    int64_t offset;
    int32_t dtype, device, ndim, reserved;
    int64_t shape[6];
    int64_t stride[6];
} lac_tensor;

typedef struct lac_memory_stats {
    int64_t live, cached, peak, limit;         /* bytes; limit 0 = none */
    int64_t live_blocks, allocations, reused;  /* blocks in use now; allocations ever; of these from the cache */
    int64_t storages;                          /* storage headers alive (released or not) */
    int64_t soft;                              /* bytes; 0 = none */
} lac_memory_stats;

/* What the bytes of a tensor are for; the host says so (lac_tensor_role). WORKSPACE: an operator's own working memory. */
enum { LAC_ROLE_NONE = 0, LAC_ROLE_PARAMETER = 1, LAC_ROLE_GRADIENT = 2, LAC_ROLE_OPTIMIZER = 3, LAC_ROLE_WORKSPACE = 4 };
/* LAC_BLOCK_ALIVE: of lac_memory_blocks; the others: of lac_memory_events */
enum { LAC_BLOCK_ALIVE = 0, LAC_BLOCK_TAKEN = 1, LAC_BLOCK_GIVEN = 2 };
/* One block of the pool, or one change of it. Of a taken block role and site are what they were then: nothing yet. */
typedef struct lac_block_info {
    int64_t serial, time;        /* blocks are numbered from 1 in the order of their making; time of the event, ns, monotonic */
    int64_t bytes, asked;        /* as taken from the pool; as asked for */
    const char *op;              /* what made it */
    int32_t kind, role, site, tag, dtype, ndim; /* dtype -1: not a tensor; tag: lac_flags.tag at the event */
    int64_t shape[6];            /* of the tensor that it was made for */
} lac_block_info;

/* One run of an operator by a back end. Times in ns of the monotonic clock. */
typedef struct lac_profile_event {
    int64_t start, end;
    double flops;                /* by the counting rules in c/profile.c */
    int64_t bytes;               /* every distinct element read once plus every element written once */
    const char *op, *function;   /* the slot of the back end; which of its functions, NULL if it has one */
    int32_t device, tag;         /* tag: lac_flags.tag when it ended */
} lac_profile_event;

/* Flags that the host polls after a call by one load: nonzero `attention` means that one of the others is set. `tag` is the
 * host's to write: recorded events carry it (the Lua layer: 0 forward, 1 backward). */
typedef struct lac_flags { volatile int32_t attention, interrupted, pressure, tag; } lac_flags;

/* ---- library ---- */
const char *lac_cdef(void);              /* the text of this region */
const char *lac_version(void);
const char *lac_last_error(void);        /* message of this thread's last failure, "" if none */
const char *lac_status_name(int status); /* "ok", "shape", "dtype", "memory", ... */
int lac_sizeof(const char *type);        /* bytes of a public struct by name, -1 if unknown: checked at load */
const char *lac_build_info(void);        /* compiler, BLAS, ISA chosen, CUDA plug-in state; one line each */
lac_flags *lac_flags_get(void);
void lac_interrupt(int on);              /* async-signal-safe: ask running operators to stop / clear the request */
int lac_threads(int n);                  /* set the number of threads if n > 0; returns the number in use */
const char *lac_isa(const char *name);   /* force "baseline", "avx2", "avx512f", "avx512", "amx"; NULL asks; NULL: not available */
int lac_backend_load(const char *path);  /* load the CUDA plug-in; fails with the reason (status "device") */
int lac_backend_has(int device, const char *slot); /* 1 if the operator exists there, 0 if not, -1 if there is no such operator */
/* Wait for everything queued on a device; an operator that failed there since the last wait is reported now, by name. */
int lac_synchronize(int device);
int lac_tf32(int on); /* may f32 products on CUDA round their inputs to TF32's 11 bits? -1 asks; returns the choice */

/* ---- profiler ---- */
int64_t lac_clock(void);                 /* ns of the monotonic clock, which all recorded times are of */
int lac_profile(int on);                 /* record every run of an operator: 1 starts afresh, 0 stops, -1 stops and forgets */
int64_t lac_profile_events(int64_t first, int64_t n, lac_profile_event *out); /* returns how many were read from `first` (0-based) on */
int64_t lac_profile_lost(void);          /* events of both recorders so far that no memory was left for */
const char *lac_op_name(int op);         /* slots of the back ends in the order of c/ops.def; NULL past the end */

/* ---- NaN watch ---- */
/* The first operator that made a NaN (kind 1), +inf (2) or -inf (3): which output, the row-major position of the first such
 * element, and how many NaNs and infinities its output and its inputs hold. storage: of the last operator's output. */
typedef struct lac_watch_operand { char name[24]; int32_t dtype, ndim; int64_t shape[6], nan, inf; } lac_watch_operand;
typedef struct lac_watch_info {
    int32_t found, kind, inputs, reserved;
    const lac_storage *storage;
    int64_t first;
    char op[24];
    lac_watch_operand output, input[8];
} lac_watch_info;
int lac_watch(int on);                     /* look at every result from now on: slow; 1 starts afresh, 0 stops */
int lac_watch_last(lac_watch_info *out);

/* ---- storage, pool, tensors ---- */
/* `device`: LAC_CPU or LAC_CUDA; each has a pool of its own */
int lac_memory(int device, lac_memory_stats *out);
int lac_memory_limit(int device, int64_t bytes);     /* hard limit on live bytes, 0 = physical memory only */
int lac_memory_trim(void);               /* give cached blocks back to the system */
int lac_memory_pace(int device, int64_t bytes);      /* raise flags->pressure when live exceeds this many bytes (soft limit); 0 = never */
/* soft limit on live bytes, 0 = none: a request that crosses it fails with status "memory" once, and so asks the host to
 * free what nobody needs and to try again after lac_memory_excuse(1), which lifts the soft limit until excuse(0) */
int lac_memory_soft_limit(int device, int64_t bytes);
int lac_memory_excuse(int on);
int lac_memory_reset_peak(void);
int lac_memory_guard(int on);            /* put guard bytes round every new block and check them when it is freed */
int lac_memory_guard_errors(void);       /* returns how many blocks were found overwritten */
/* the blocks in use, newest first: fills at most n and returns how many there are; out may be NULL if n is 0 */
int64_t lac_memory_blocks(int device, lac_block_info *out, int64_t n);
int lac_memory_record(int on);           /* record every change of the pool: 1 starts afresh, 0 stops, -1 stops and forgets */
int64_t lac_memory_events(int64_t first, int64_t n, lac_block_info *out); /* returns how many were read from `first` (0-based) on */
int lac_tensor_role(const lac_tensor *t, int role); /* what its storage is for; a released tensor: nothing happens */
int lac_tensor_site(const lac_tensor *t, int site); /* a number of the host for where its storage was made, set unless < 0; returns it */
int lac_tensor_block(const lac_tensor *t, lac_block_info *out); /* the block behind t; status "released" if there is none */
int lac_empty(lac_tensor *t);            /* host fills dtype, device, ndim, shape; the call adds storage and strides */
void lac_tensor_drop(lac_tensor *t);     /* drop the owner's reference (idempotent) */
int lac_tensor_release(lac_tensor *t);   /* free the bytes now; later use of any view is an error of status "released" */
int lac_tensor_data(const lac_tensor *t, void **data); /* address of element 0 (host memory), after checks */
int lac_tensor_check(const lac_tensor *t);             /* is it a valid live view inside its storage? */
int lac_map_file(const char *path, lac_tensor *out);   /* u8 [bytes] view of a file, memory-mapped, private copy-on-write */
int lac_fill(lac_tensor *dst, double value);
int lac_copy(const lac_tensor *src, lac_tensor *dst);  /* cast and broadcast src into dst (any strides, may not overlap) */
int lac_arange(lac_tensor *dst, double start, double step); /* dst [n] */

/* ---- elementwise (c/maps.def lists the functions; ids by name) ---- */
/* arity 1, 2, 3: of so many tensors; 0: of one tensor and up to three constants */
int lac_map_id(int arity, const char *name);            /* returns the id, -1 if there is none */
const char *lac_map_name(int arity, int id);            /* returns NULL past the end */
int lac_map1(int fn, const lac_tensor *x, lac_tensor *out);
int lac_map1_bwd(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, lac_tensor *out);
int lac_map2(int fn, const lac_tensor *x, const lac_tensor *y, lac_tensor *out);
int lac_map2_scalar(int fn, const lac_tensor *x, double y, int swapped, lac_tensor *out); /* swapped: fn(y, x) */
/* gradient of map2 towards argument `which` (0 or 1), in the broadcast shape; reduce it with lac_sum_to */
int lac_map2_bwd(int fn, int which, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, lac_tensor *out);
int lac_map2_scalar_bwd(int fn, const lac_tensor *x, double y, int swapped, const lac_tensor *g, lac_tensor *out);
/* both gradients of map2 in one pass */
int lac_map2_bwd_both(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, lac_tensor *dx, lac_tensor *dy);
/* functions with constants (arity 0), in the order of c/maps.def: p, q, r; clamp, hardtanh, threshold take integers too */
int lac_mapp(int fn, const lac_tensor *x, const double *constants, lac_tensor *out);
int lac_mapp_bwd(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, const double *constants, lac_tensor *out);
/* functions of three tensors that broadcast, and one constant; the backward gives the broadcast shape */
int lac_map3(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *z, double constant, lac_tensor *out);
int lac_map3_bwd(int fn, int which, const lac_tensor *x, const lac_tensor *y, const lac_tensor *z, double constant,
                 const lac_tensor *g, lac_tensor *out);
int lac_where(const lac_tensor *cond, const lac_tensor *x, const lac_tensor *y, lac_tensor *out); /* cond bool, all broadcast */
int lac_axpy(double alpha, const lac_tensor *x, lac_tensor *dst); /* in place dst += alpha x; x broadcasts to dst */
int lac_scale(double alpha, lac_tensor *dst);                     /* in place dst *= alpha */

/* ---- reductions ---- */
enum { LAC_SUM = 0, LAC_MEAN = 1, LAC_MAX = 2, LAC_MIN = 3, LAC_ANY = 4, LAC_ALL = 5, LAC_ARGMAX = 6, LAC_ARGMIN = 7, LAC_PROD = 8,
       LAC_NONZERO = 9, LAC_LOGSUMEXP = 10, LAC_VAR = 11, LAC_NORM1 = 12, LAC_NORM2 = 13, LAC_NORM_INF = 14, LAC_REDUCTIONS = 15 };
/* dims: bit mask of axes; 0 means all. ANY/ALL give bool, ARG* give i64 (exactly one axis, or all: flat index).
 * max, min, argmax, argmin: NaN wins; the first of equals. Sum and product of ints and bool
 * are i64, NONZERO (a count) is i64; LOGSUMEXP, VAR (correction 1) and the norms take floats. */
int lac_reduce(int fn, const lac_tensor *x, uint32_t dims, int keepdim, lac_tensor *out);
int lac_var(const lac_tensor *x, uint32_t dims, int keepdim, double correction, lac_tensor *out); /* divides by count - correction */
int lac_sum_to(const lac_tensor *x, const lac_tensor *like, lac_tensor *out);   /* sum the broadcast axes back to like's shape */
int lac_softmax(const lac_tensor *x, int dim, int logarithm, lac_tensor *out);
int lac_softmax_bwd(const lac_tensor *y, const lac_tensor *g, int dim, int logarithm, lac_tensor *out);

/* ---- scans ---- */
enum { LAC_CUMSUM = 0, LAC_CUMPROD = 1, LAC_CUMMAX = 2, LAC_CUMMIN = 3, LAC_LOGCUMSUMEXP = 4, LAC_SCANS = 5 };
/* out[i] = the reduction of x[0 .. i] along `dim` (reverse: of x[i .. n - 1]), in order, floats in f64. Sums and products
 * of ints and bool are i64. index (CUMMAX, CUMMIN, else NULL) i64: where the extreme is, the latest of equals; NaN wins. */
int lac_scan(int fn, const lac_tensor *x, int dim, int reverse, lac_tensor *out, lac_tensor *index);
/* gradient of a forward CUMPROD or LOGCUMSUMEXP with result y; a CUMSUM's is the reverse scan of g, those of CUMMAX and
 * CUMMIN are lac_gather_bwd at their index */
int lac_scan_bwd(int fn, const lac_tensor *x, const lac_tensor *y, const lac_tensor *g, int dim, lac_tensor *dx);

/* ---- matrix product ---- */
/* out[..., M, N] = a[..., M, K] b[..., K, N] (+ bias [N]); batch axes broadcast; views made by transpose are read in
 * place. f16 and bf16 accumulate in f32. bias may be NULL, or `out` itself: out, contiguous, += a b, rounded once. 1-D
 * arguments are refused (use view). */
int lac_matmul(const lac_tensor *a, const lac_tensor *b, const lac_tensor *bias, lac_tensor *out);

/* out = fn(x w^T + bias), where fn is the id of gelu or gelu_tanh; x [R, E], w [V, E], bias [V] or NULL. pre: what goes
 * into fn, kept for the backward, or NULL. On CUDA gelu_tanh is part of the product. */
int lac_linear_act(int fn, const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias, lac_tensor *pre,
                   lac_tensor *out);
/* out = (g w) fn'(pre): the gradient of pre, where fn(pre) [R, H] went into a product with w [V, H] whose gradient is g
 * [R, V]; sums [H]: its column sums, or NULL; act: fn(pre) once more, or NULL */
int lac_linear_act_bwd(int fn, const lac_tensor *g, const lac_tensor *w, const lac_tensor *pre, lac_tensor *out,
                       lac_tensor *sums, lac_tensor *act);
/* gradients of weight and bias of x w^T + bias from g [R, V] and x [R, E]: dw = g^T x, sums [V] = column sums of g */
int lac_weight_grad(const lac_tensor *g, const lac_tensor *x, lac_tensor *dw, lac_tensor *sums);

/* ---- normalisation ---- */
/* over the last axis; gamma, beta [E] may be NULL; mean, rstd [rows] f32 (f64 for f64) are saved for the backward */
int lac_layernorm(const lac_tensor *x, const lac_tensor *gamma, const lac_tensor *beta, double eps,
                  lac_tensor *out, lac_tensor *mean, lac_tensor *rstd);
/* dgamma and dbeta may be NULL; they are of gamma's dtype */
int lac_layernorm_bwd(const lac_tensor *x, const lac_tensor *gamma, const lac_tensor *mean, const lac_tensor *rstd,
                      const lac_tensor *g, lac_tensor *dx, lac_tensor *dgamma, lac_tensor *dbeta);

/* sum = x + dropout(h), out = layernorm(sum), in one pass where the device has a kernel for it; the dropout's bits are
 * those of lac_dropout. p 0: no dropout. The sum is saved for the backward. */
int lac_residual_norm(const lac_tensor *x, const lac_tensor *h, const lac_tensor *gamma, const lac_tensor *beta,
                      double eps, double p, uint64_t seed, uint64_t offset, lac_tensor *sum, lac_tensor *out,
                      lac_tensor *mean, lac_tensor *rstd);
/* g: gradient of out; g_sum: of sum, or NULL; dh may be NULL if p is 0, it is dx then; dgamma and dbeta may be NULL */
int lac_residual_norm_bwd(const lac_tensor *sum, const lac_tensor *gamma, const lac_tensor *mean, const lac_tensor *rstd,
                          const lac_tensor *g, const lac_tensor *g_sum, double p, uint64_t seed, uint64_t offset,
                          lac_tensor *dx, lac_tensor *dh, lac_tensor *dgamma, lac_tensor *dbeta);

/* out = layernorm(gelu(x)), in one pass where the device has a kernel for it. act: what the norm reads, kept for the
 * backward; NULL: that computes it again */
int lac_gelu_norm(const lac_tensor *x, const lac_tensor *gamma, const lac_tensor *beta, double eps, lac_tensor *act,
                  lac_tensor *out, lac_tensor *mean, lac_tensor *rstd);
/* act, dgamma and dbeta may be NULL. out: what gelu_norm gave, once more (beta and eps as there); sums [E]: of dx over
 * rows, which is the gradient of a bias in x; either may be NULL */
int lac_gelu_norm_bwd(const lac_tensor *x, const lac_tensor *act, const lac_tensor *gamma, const lac_tensor *beta,
                      const lac_tensor *mean, const lac_tensor *rstd, const lac_tensor *g, double eps, lac_tensor *dx,
                      lac_tensor *dgamma, lac_tensor *dbeta, lac_tensor *out, lac_tensor *sums);

/* x / sqrt(mean(x^2) + eps) gamma over the last axis; gamma [E] may be NULL; rstd [rows] is saved; dgamma may be NULL */
int lac_rmsnorm(const lac_tensor *x, const lac_tensor *gamma, double eps, lac_tensor *out, lac_tensor *rstd);
int lac_rmsnorm_bwd(const lac_tensor *x, const lac_tensor *gamma, const lac_tensor *rstd, const lac_tensor *g, lac_tensor *dx,
                    lac_tensor *dgamma);

/* ---- convolution ---- */
/* x [B, C, N], w [O, C / groups, K], bias [O] or NULL; out [B, O, L], out[l] sees x at l stride + k dilation - before, zeros
 * outside; L = floor((N + before + after - dilation (K - 1) - 1) / stride) + 1 */
int lac_conv1d(const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias, int64_t stride, int64_t dilation,
               int64_t before, int64_t after, lac_tensor *out);
/* dx or dw may be NULL: not wanted */
int lac_conv1d_bwd(const lac_tensor *x, const lac_tensor *w, const lac_tensor *g, int64_t stride, int64_t dilation,
                   int64_t before, lac_tensor *dx, lac_tensor *dw);

/* ---- losses ---- */
/* logits [R, V]. target [R] i64 or i32 (0-based class); out [R]: with t the one-hot of the target,
 * -sum_c weight_c ((1 - smoothing) t_c + smoothing / V) log softmax(logits)_c; 0 where target == ignore. Or target [R, V] of
 * logits' dtype: t itself (ignore has no meaning). weight [V] of logits' dtype, or NULL: all 1. lse [R] is saved for the
 * backward. A target outside [0, V) that is not `ignore` is an error of status "index". */
int lac_cross_entropy(const lac_tensor *logits, const lac_tensor *target, const lac_tensor *weight, int64_t ignore,
                      double smoothing, lac_tensor *out, lac_tensor *lse);
int lac_cross_entropy_bwd(const lac_tensor *logits, const lac_tensor *target, const lac_tensor *weight, int64_t ignore,
                          double smoothing, const lac_tensor *lse, const lac_tensor *g, lac_tensor *dlogits); /* g [R] */
/* out [] = sum of losses [R] (f32 or f64) over total [], what the targets that are not `ignore` weigh: weight [V] (of the
 * logits' dtype) at the target, or 1 if weight is NULL; NaN where that is 0. Targets must have passed the loss itself. */
int lac_loss_mean(const lac_tensor *losses, const lac_tensor *target, const lac_tensor *weight, int64_t ignore,
                  lac_tensor *out, lac_tensor *total);
/* The same on logits = x w^T (+ bias), x [R, E], w [V, E], bias [V] or NULL, computed `chunk` rows at a time: the
 * logits never exist as a whole, in either direction. chunk 0 chooses. dbias is NULL exactly when bias is; target [R]. */
int lac_linear_cross_entropy(const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias, const lac_tensor *target,
                             const lac_tensor *weight, int64_t ignore, double smoothing, int64_t chunk, lac_tensor *out,
                             lac_tensor *lse);
int lac_linear_cross_entropy_bwd(const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias, const lac_tensor *target,
                                 const lac_tensor *weight, int64_t ignore, double smoothing, int64_t chunk,
                                 const lac_tensor *lse, const lac_tensor *g, lac_tensor *dx, lac_tensor *dw, lac_tensor *dbias);
/* losses and the gradients for g in one go, with one product fewer: for a g that is known before */
int lac_linear_cross_entropy_both(const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias,
                                  const lac_tensor *target, const lac_tensor *weight, int64_t ignore, double smoothing,
                                  int64_t chunk, const lac_tensor *g, lac_tensor *out, lac_tensor *dx, lac_tensor *dw,
                                  lac_tensor *dbias);

/* ---- indexing ---- */
/* idx i64 or i32, 0-based, any shape; out has x's shape with axis `dim` replaced by idx's shape (embedding: dim 0).
 * Index outside the axis: status "index". The backward adds rows in a fixed order (deterministic). */
int lac_index_select(const lac_tensor *x, int dim, const lac_tensor *idx, lac_tensor *out);
int lac_index_select_bwd(const lac_tensor *g, int dim, const lac_tensor *idx, int64_t size, lac_tensor *out);
/* out = x along `dim` at idx, elementwise: idx has out's shape and x's rank (torch.gather) */
int lac_gather(const lac_tensor *x, int dim, const lac_tensor *idx, lac_tensor *out);
int lac_gather_bwd(const lac_tensor *g, int dim, const lac_tensor *idx, int64_t size, lac_tensor *out);

enum { LAC_SCATTER_SET = 0, LAC_SCATTER_ADD = 1, LAC_SCATTER_MEAN = 2, LAC_SCATTER_MAX = 3, LAC_SCATTER_MIN = 4, LAC_SCATTERS = 5 };
/* in place dst[idx] along `dim` := src, or combined with it: idx i64 or i32 (0-based) of dst's sizes except in `dim`, src of
 * idx's shape (or expanded to it) and dst's dtype. Sources are taken in row-major order: SET keeps the last one.
 * include_self 0: elements that are reached start from nothing instead of from dst. Mean wants floats. */
int lac_scatter(lac_tensor *dst, int dim, const lac_tensor *idx, const lac_tensor *src, int mode, int include_self);
/* in place, whole slices: dst[.., idx[i], ..] := src[.., i, ..] (add 0) or += alpha src (add 1); idx [n], src of dst's sizes
 * with n in `dim` (or expanded to that). Order and repeated indices as for lac_scatter. */
int lac_index_put(lac_tensor *dst, int dim, const lac_tensor *idx, const lac_tensor *src, int add, double alpha);
enum { LAC_PAD_CONSTANT = 0, LAC_PAD_REFLECT = 1, LAC_PAD_REPLICATE = 2, LAC_PAD_CIRCULAR = 3, LAC_PADS = 4 };
/* out[i] = x[i - before], per axis; before, after [ndim] elements are added (negative: cropped). Outside of x: the value,
 * the mirror image without the edge (at most size - 1 of it), the edge, or the other end (any number of times). */
int lac_pad(const lac_tensor *x, const int64_t *before, const int64_t *after, int mode, double value, lac_tensor *out);
/* g of the padded shape; shape [g->ndim] is x's */
int lac_pad_bwd(const lac_tensor *g, const int64_t *shape, const int64_t *before, int mode, lac_tensor *out);

/* ---- order ---- */
/* NaN counts as larger than every number and -0 equals 0; equal elements keep their order (stable), also descending.
 * values has x's dtype, index is i64 and 0-based: gather(x, dim, index) = values. */
int lac_sort(const lac_tensor *x, int dim, int descending, lac_tensor *values, lac_tensor *index);
/* the first k of lac_sort: the k largest in descending order, or the k smallest in ascending order */
int lac_topk(const lac_tensor *x, int dim, int64_t k, int largest, lac_tensor *values, lac_tensor *index);
/* sorted [..., n] ascending, values [..., m] of the same leading sizes, or sorted [n] and values of any shape.
 * out i64: how many of `sorted` are below the value (right: below or equal), 0 .. n */
int lac_searchsorted(const lac_tensor *sorted, const lac_tensor *values, int right, lac_tensor *out);
/* runs of equal elements in sorted [n] with its `order` [n] (both from lac_sort): inverse [n], the run of every original
 * position; starts [count], where each run begins. NaNs are one run. */
int lac_runs(const lac_tensor *sorted, const lac_tensor *order, lac_tensor *inverse, lac_tensor *starts);
/* out i64 [count, ndim]: 0-based coordinates of the elements that are not zero (NaN is not), in row-major order */
int lac_nonzero(const lac_tensor *x, lac_tensor *out);

/* ---- positions ---- */
/* x [B, N, H, D], D even; rotates pairs (2i, 2i+1) if interleaved else (i, i + D/2) by angle p base^(-2i/D), p = start + n,
 * or start + positions[n] (i64 or i32 [N], or [B, N]; at least 0; NULL: none).
 * RoPE: Su et al. 2021, eq. 34. scale_base > 0 adds XPOS (Sun et al. 2022, eq. 9): each pair is multiplied by
 * zeta_i^(sign p / scale_base), zeta_i = (2i/D + 0.4)/1.4, sign +1 for queries, -1 for keys. transpose = 1 applies the
 * transposed map, which is the gradient. */
int lac_rope(const lac_tensor *x, const lac_tensor *positions, int64_t start, double base, int interleaved, double scale_base,
             int sign, int transpose, lac_tensor *out);

/* ---- random numbers: Philox4x32-10, counter = position, so results do not depend on threads or device ---- */
enum { LAC_UNIFORM = 0, LAC_NORMAL = 1, LAC_BERNOULLI = 2, LAC_INTEGER = 3 };
/* fill dst: UNIFORM [a, b), NORMAL mean a, deviation b, BERNOULLI(a), INTEGER a <= i < b */
int lac_random(lac_tensor *dst, int kind, double a, double b, uint64_t seed, uint64_t offset);
/* out = x * keep / (1 - p), keep drawn from (seed, offset) by the element's row-major position; its own backward */
int lac_dropout(const lac_tensor *x, double p, uint64_t seed, uint64_t offset, lac_tensor *out);

/* weights [N] or [R, N], not negative, not all 0; out i64 [samples] or [R, samples]: 0-based draws in proportion to them. With
 * replacement sample s of row r is the 64-bit draw r samples + s, looked up in the running sum; without, element i of row r
 * has the key -log(1 - draw r N + i) / weight, and the smallest keys are taken in order (an exponential race: the
 * distribution of drawing one after the other). */
int lac_multinomial(const lac_tensor *weights, int64_t samples, int replacement, uint64_t seed, uint64_t offset, lac_tensor *out);

/* ---- optimisers, over lists of tensors, one call ---- */
/* One parameter; everything contiguous and of one shape. Moments m and v are f32 (f64 for f64 parameters): AdamW has
 * both, Lion m, SGD m when it has momentum; absent ones are NULL. master: NULL, or f32 beside an f16 or bf16 parameter,
 * which is then updated in f32 and becomes its rounding. Gradients are read times grad_scale, then clamped to
 * +- grad_limit (0: not at all). step counts from 1. coupled: weight decay is added to the gradient (L2), else it shrinks
 * the parameter by lr weight_decay. An update is never interrupted half-way. */
typedef struct lac_optim_item { lac_tensor *param; const lac_tensor *grad; lac_tensor *m; lac_tensor *v; double lr, weight_decay; lac_tensor *master; } lac_optim_item;
/* AdamW (Loshchilov and Hutter 2019, algorithm 2); coupled: Adam (Kingma and Ba 2015, algorithm 1) */
int lac_adamw_many(const lac_optim_item *items, int64_t n, double beta1, double beta2, double eps, int coupled, int64_t step, double grad_scale, double grad_limit);
/* SGD: m = momentum m + (1 - dampening) g (m = g at step 1), then param -= lr m, or with nesterov lr (g + momentum m) */
int lac_sgd_many(const lac_optim_item *items, int64_t n, double momentum, double dampening, int nesterov, int coupled, int64_t step, double grad_scale, double grad_limit);
/* Lion (Chen et al. 2023, algorithm 2): param -= lr sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g */
int lac_lion_many(const lac_optim_item *items, int64_t n, double beta1, double beta2, double grad_scale, double grad_limit);
int lac_norm_many(const lac_tensor *const *list, int64_t n, double *norm); /* global 2-norm, accumulated in f64 */

/* ---- checksums ---- */
/* CRC-32C (Castagnoli; RFC 3720, appendix B.4) of host memory, continued: crc is the sum of what came before, 0 at the
 * start. Returns the sum, no status. */
uint32_t lac_crc32c(uint32_t crc, const void *data, int64_t bytes);

/* ---- dilated attention ---- */
enum { LAC_HEADS_SPLIT = 0, LAC_HEADS_ALL = 1 };
enum { LAC_OFFSET_BRANCH = 0, LAC_OFFSET_MOD = 1, LAC_OFFSET_BLOCK = 2 };
enum { LAC_MERGE_MEAN = 0, LAC_MERGE_SUM = 1, LAC_MERGE_LSE = 2, LAC_MERGE_LSE_DETACH = 3 };
enum { LAC_KERNEL_AUTO = 0, LAC_KERNEL_PORTABLE = 1, LAC_KERNEL_HOPPER = 2 };
/* What a plan is keyed by. Zero the struct first; entries past `branches` are ignored. window -1: none, else |p - j| <= window.
 * align_end: the last query sits at the last key (else the first at the first). Any offset rule may go with any scheme;
 * MOD and BLOCK count heads over all of them. A query before position 0 (align_end with n > m) has no keys. */
typedef struct lac_attn_desc {
    int64_t batch, n, m; /* queries n, keys m */
    int32_t heads, kv_heads, head_dim, branches;
    int64_t segment[32], dilation[32];
    int32_t heads_scheme, offset_rule, merge, causal, dedup, align_end;
    int64_t window;
} lac_attn_desc;
/* Heads [head0, head0 + heads) run branch `branch`: segment, dilation, and offset of the kept lattice. */
typedef struct lac_strip { int64_t segment, dilation, offset; int32_t head0, heads, branch, shared; } lac_strip; /* shared: rows may also be written by another strip */
typedef struct lac_plan_info {
    int32_t strips, overlapping; /* overlapping: some rows take part in more than one strip */
    /* (query, key) pairs, summed over heads and branches, one batch item: causal, window and ragged ends are counted
     * exactly; key padding is unknown to a plan, and with dedup a pair counts as often as branches compute it */
    int64_t pairs;
    int64_t rows;                /* (row, head) pairs with at least one strip, one batch item */
    /* whole batch: 4 D a pair forward; 10 D backward (five products, the scores again among them), 14 D where each
     * branch needs a delta of its own (mean, sum, lse_detach with several branches on every head) */
    double flops_forward, flops_backward;
    /* on the CPU with one thread and f16 or bf16 tensors; f32 and f64 accumulate in the results themselves */
    int64_t bytes_workspace_forward, bytes_workspace_backward;   /* tiles of one CPU thread in f32; twice that in f64 */
    int64_t bytes_accumulate_forward, bytes_accumulate_backward; /* f32 sums of f16 and bf16 results, whole batch */
    int64_t bytes_device_backward; /* on a GPU, f16 and bf16: statistics, f32 sums; of a part where calls are cut */
    int64_t references;
} lac_plan_info;
/* Run-time arguments. NULL pointers mean "none". q, out [B, N, H, D]; k, v [B, M, Hk, D]; lse [B, N, H] f32 (f64 for f64). */
typedef struct lac_attn_args {
    const lac_tensor *q, *k, *v;
    const lac_tensor *key_padding;   /* [B, M] bool, true = keep */
    const lac_tensor *key_lengths;   /* [B] i64 or i32: keys at or past it are padding */
    double scale;                    /* 0 = 1/sqrt(D) */
    double dropout;                  /* probability in [0, 1) */
    /* of the dropout's Philox stream: the pair (b, h, n, j) has the bits of element [b, h, n, j] of lac_dropout on a
     * dense f32 [B, H, N, M] tensor, in every branch */
    uint64_t seed, offset;
    int32_t kernel; /* LAC_KERNEL_*; auto: the fastest that can do the call; hopper: it or an error */
    /* Options of single pairs. The matrices are [N, M], [H or 1, N, M] or [B or 1, H or 1, N, M] and count tensor rows;
     * they only ever take pairs away from those that the plan attends to, or change their scores. */
    const lac_tensor *mask;          /* bool, true = attend */
    const lac_tensor *bias;          /* of q's dtype (or f32 for f16 and bf16), added to scaled scores; -inf: do not attend */
    const lac_tensor *alibi;         /* [H] f32 (f64 for f64): scores -= slope |position of the query - of the key| */
    /* bool [ceil(N / block), ceil(M / block)], with axes in front like a mask: which blocks of pairs are active. Costs
     * nothing for those that are not. */
    const lac_tensor *block_mask;
    int64_t block;                   /* at least 16 */
    /* Packed sequences, in host memory: batch item 0, the only one, holds sequence s in rows [starts[s], starts[s + 1]),
     * from 0 to N = M. Each has positions from 0 and is what a call of its own would make of it (with dropout bits of its
     * own). A mask or a bias is that of all rows. No key_lengths, no block_mask. */
    const int64_t *starts;
    int64_t sequences;               /* 0: not packed */
    /* Not 0: q, k and v (f32, f16, bf16) are rounded to e4m3, each head of each item with a scale of its own, the
     * largest finite magnitude of its rows / 448; results have q's dtype. On a GPU f16 and bf16, on Hopper, and what weighs v is
     * rounded too. There is no backward. */
    int32_t fp8;
} lac_attn_args;
int lac_plan_get(const lac_attn_desc *desc, lac_plan **out); /* from the cache or new; one reference for the caller */
void lac_plan_drop(lac_plan *plan);
int lac_plan_describe(const lac_plan *plan, lac_plan_info *out);
int lac_plan_strip(const lac_plan *plan, int32_t index, lac_strip *out);
/* the instruction set (lac_isa) that a CPU computes this in: the matrix unit does not take f64, short rows, small blocks */
const char *lac_plan_isa(const lac_plan *plan, int32_t dtype, int64_t block);
/* bytes that a CPU thread works on at most, of this dtype and with active blocks of `block` rows (0: none) */
int lac_plan_workspace(const lac_plan *plan, int32_t dtype, int64_t block, int64_t *forward, int64_t *backward);
/* NULL: on a Hopper GPU, choice `kernel` (auto or hopper) runs a kernel for Hopper for this plan, dtype and active blocks
 * of `block` rows (0: none), also for the backward or just forward, unless a call has a negative scale or rows that are
 * not aligned, padding, dropout or options of pairs with active blocks (the backward) or a head dimension above 128, or a
 * gradient of its bias, and in f32 any option of pairs; else the reason why not. f32 has kernels of its own there, unless
 * TF32 is allowed, which only 'auto' chooses. */
const char *lac_plan_hopper(const lac_plan *plan, int32_t dtype, int32_t kernel, int64_t block, int backward);
typedef struct lac_cache_stats { int64_t size, capacity, hits, misses, evictions; } lac_cache_stats;
int lac_plan_cache(lac_cache_stats *out);
int lac_plan_cache_resize(int64_t capacity); /* 0 empties it and keeps nothing */
/* out, lse and (merge mean/sum with heads all) branch_lse [G, B, N, H] are made by the call; branch_lse->storage stays
 * NULL where it is not needed for the backward, and branch_lse may be NULL if there will be none. lse is that of the
 * softmax over all branches of the row's head, whatever the merge; a row without keys has out 0 and lse -inf. */
int lac_attend(lac_plan *plan, const lac_attn_args *args, lac_tensor *out, lac_tensor *lse, lac_tensor *branch_lse);
/* dlse [B, N, H] may be NULL (gradient towards the returned lse; exact for every merge). dq, dk, dv are made by the call.
 * branch_lse is needed exactly where the forward makes it. dbias, of args->bias' shape and dtype, may be NULL: not wanted.
 * It is summed over what bias is expanded to in a dense [B, H, N, M] tensor. */
int lac_attend_bwd(lac_plan *plan, const lac_attn_args *args, const lac_tensor *out, const lac_tensor *lse,
                   const lac_tensor *branch_lse, const lac_tensor *dout, const lac_tensor *dlse,
                   lac_tensor *dq, lac_tensor *dk, lac_tensor *dv, lac_tensor *dbias);
/* Decoding. Query i of item b is at position position[b] + i; row j of k and v [B, R, Hk, D] holds the key at position
 * key_start[b] + j. Keys before key_start must be out of reach of all queries (status "index" otherwise); keys past
 * the rows do not exist. Of the plan only heads, head_dim, the pattern and m, the end of all positions, count: made with
 * align_end and n = 1, one plan serves every token of a decoding. A call costs what the rows in reach cost, whatever
 * the position. No dropout, padding or gradient: other fields of args than q, k, v, scale and alibi must be 0. */
int lac_attend_at(const lac_plan *plan, const lac_attn_args *args, const int64_t *position, const int64_t *key_start,
                  lac_tensor *out, lac_tensor *lse);
/* the smallest position that a query at `position` or later may attend to: what lies before it may be forgotten */
int lac_plan_reach(const lac_plan *plan, int64_t position, int64_t *first);
/* </ffi> */
/* clang-format on */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
