/* core.h: what the engine's own files share: storage, views, checks, and small helpers.
 *
 * Storage is a header on the C heap (so that a released or dead tensor can always be recognised) and bytes from
 * the pool. A lac_tensor of the public API is untrusted: front ends (op_*.c) turn it into a lac_view by
 * lac_view_get(), which checks that it is alive and inside its storage, and back ends see only views.
 * No context object is passed round: one process is one Lua state, one device and one rank, so the engine's
 * state (pool, plan cache, flags, back ends) is global and each part guards itself with its own lock.
 */
#ifndef LAC_CORE_H
#define LAC_CORE_H
#include "lacuna.h"
#include "status.h"
#include <stdbool.h>

#ifndef __cplusplus /* CUDA plug-ins include this header for views only: storage is the engine's own business */
#include <stdatomic.h>
struct lac_storage {
    atomic_int references;
    int32_t device;
    void *data;   /* NULL once released */
    size_t bytes; /* as asked for */
    size_t block; /* as taken from the pool; 0 for a mapped file */
    void *owner;  /* the pool's header of it */
    /* for reports only: the tensor that it was made for, what made it, what the host says of it */
    int32_t dtype, ndim, role, site, pinned;
    int64_t shape[LAC_MAX_DIMS], copying;
    const char *op;
};
#endif

/* A checked, typed address: what back ends work on. Strides count elements. */
typedef struct lac_view {
    void *data;
    int32_t dtype, ndim;
    int64_t shape[LAC_MAX_DIMS], stride[LAC_MAX_DIMS];
} lac_view;

/* pool.c */
/* `op` must live for ever: reports name it long after the call */
int lac_storage_new(const char *op, int device, int dtype, int ndim, const int64_t *shape, size_t bytes,
                    lac_storage **out);
void lac_storage_retain(lac_storage *s);
void lac_storage_drop(lac_storage *s);
/* short-lived working memory of an operator, from the same pool; NULL (with the message set) when there is none */
void *lac_workspace_get(const char *op, size_t bytes);
void lac_workspace_put(void *p);
/* the same in the memory of the CUDA device; put takes the handle */
void *lac_scratch_get(const char *op, size_t bytes, void **handle);
void lac_scratch_put(void *handle);

/* tensor.c */
size_t lac_dtype_size(int dtype);
const char *lac_dtype_name(int dtype);
static inline bool lac_dtype_is_float(int dtype) { return dtype <= LAC_BF16; }
int64_t lac_numel(const lac_tensor *t);
static inline int64_t lac_view_numel(const lac_view *v)
{
    int64_t n = 1;
    for (int i = 0; i < v->ndim; i++) n *= v->shape[i];
    return n;
}
bool lac_view_contiguous(const lac_view *v);
/* "[2, 3, 4] f32": the text for messages; the buffers rotate (8 per thread) */
const char *lac_describe(const lac_tensor *t);
const char *lac_shape_text(const int64_t *shape, int ndim);
/* checks that t is a live view inside its storage, then fills v; `op` and `name` go into the message: "softmax: x ..."
 */
int lac_view_get(const char *op, const char *name, const lac_tensor *t, lac_view *v);
/* a new contiguous tensor: storage from the pool, struct filled, view filled if v is not NULL */
int lac_tensor_new(const char *op, int dtype, int device, int ndim, const int64_t *shape, lac_tensor *t, lac_view *v);
/* NumPy broadcasting of two shapes; fails naming both */
int lac_broadcast(const char *op, const lac_tensor *a, const lac_tensor *b, int *ndim, int64_t *shape);
/* the view of v expanded to shape (stride 0 on new and on size-1 axes) */
void lac_view_expand(lac_view *v, int ndim, const int64_t *shape);
int lac_same_dtype(const char *op, const char *na, const lac_tensor *a, const char *nb, const lac_tensor *b);
int lac_same_device(const char *op, const char *na, const lac_tensor *a, const char *nb, const lac_tensor *b);
int lac_same_shape(const char *op, const char *na, const lac_tensor *a, const char *nb, const lac_tensor *b);
int lac_need_float(const char *op, const char *name, const lac_tensor *t);
/* 0-based axis, negative counts from the end */
int lac_axis(const char *op, const lac_tensor *t, int dim, int *axis);
/* Does writing a touch bytes of b? Used to refuse overlapping in-place arguments. Conservative: compares address
 * ranges. */
bool lac_views_overlap(const lac_view *a, const lac_view *b);
/* Do two index tuples of this view share an address (a broadcast or folded view)? Such a view must not be written. */
bool lac_view_self_overlaps(const lac_view *v);

/* profile.c: records in chunks that never move; the owner of the list locks. push: NULL if there is no memory */
typedef struct lac_records {
    size_t size; /* bytes of a record */
    char **chunks;
    int64_t count;
} lac_records;
void *lac_records_push(lac_records *list);
int64_t lac_records_read(const lac_records *list, int64_t first, int64_t n, void *out);
void lac_records_clear(lac_records *list);

/* watch.c: while the watch is on, what front ends read and make */
extern int lac_watch_on;
void lac_watch_view(const char *op, const char *name, const lac_tensor *t, const lac_view *v, bool output);

/* abi.c */
extern lac_flags lac_flags_global;
/* long loops of back ends ask between tiles; cheap */
static inline bool lac_interrupted(void) { return lac_flags_global.interrupted != 0; }

#endif
