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

/* </ffi> */
/* clang-format on */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
