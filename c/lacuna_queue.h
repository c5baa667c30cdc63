/* lacuna_queue.h: the public header's second part: what a script says to the queue of a device.
 *
 * Same rules as lacuna.h, whose conventions hold; its region is handed out by lac_cdef() after lacuna.h's. It is a file
 * of its own because no operator needs it: CUDA kernels include lacuna.h and take minutes to compile again.
 */
#ifndef LACUNA_QUEUE_H
#define LACUNA_QUEUE_H
#include "lacuna.h"

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* clang-format off */
/* <ffi> */
/* ---- page-locked memory, copies beside the operators, events (c/copies.c) ---- */
/* Page-locked host memory, which the CUDA device copies from and to by itself: a pool of its own for the functions of
 * statistics and limits. lac_empty takes it as the device of a tensor, which is then on LAC_CPU. */
enum { LAC_PINNED = 128 };
typedef struct lac_event lac_event;         /* opaque place in the queue of a device */

int lac_memory_empty(int device);           /* give cached blocks of one pool back to the system */
int lac_tensor_pinned(const lac_tensor *t); /* 1 if its memory is page-locked */
/* Host fills out->device: LAC_CUDA for a page-locked tensor of the host, LAC_CPU for one of the device; the call makes a
 * tensor like src (page-locked on the host) and returns before its bytes are there. Every later call that is given src or
 * out comes after the copy by itself: operators on the device without making the host wait. */
int lac_copy_async(const lac_tensor *src, lac_tensor *out);
int lac_event_new(int device, lac_event **out);
void lac_event_drop(lac_event *e);
int lac_event_record(lac_event *e);         /* done when everything that is queued now is */
int lac_event_done(const lac_event *e, int *done); /* one that was never recorded is done */
int lac_event_wait(const lac_event *e);
int lac_event_elapsed(const lac_event *from, const lac_event *to, double *ms); /* both recorded; waits for them */

/* ---- graphs: a step that is captured once and launched as a whole (c/graph.c) ---- */
typedef struct lac_graph lac_graph;
/* Operators on cuda are captured from now on, not run. The host draws random numbers from the given seed and offset on,
 * `step` apart, until the end, so that the graph can draw others. */
int lac_graph_begin(lac_graph **out, uint64_t *seed, uint64_t *offset, int *step);
/* `draws`: how many numbers of the stream were used; keep 0: the capture is given up. On failure the graph is dropped. */
int lac_graph_end(lac_graph *g, int keep, int64_t draws);
int lac_graph_result(lac_graph *g, const lac_tensor *t, int *number); /* before the end: t is wanted after every launch */
int lac_graph_launch(lac_graph *g, uint64_t seed, uint64_t offset);
int lac_graph_take(lac_graph *g, int number, lac_tensor *out); /* a result of the last launch; the next one releases it */
/* is t the very memory that the graph has as a result? 1 or 0 */
int lac_graph_same(const lac_graph *g, int number, const lac_tensor *t);
int64_t lac_graph_nodes(const lac_graph *g);
int64_t lac_graph_bytes(const lac_graph *g); /* device memory that is reserved for it */
void lac_graph_drop(lac_graph *g);

/* </ffi> */
/* clang-format on */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
