/* device.h: the contract between the engine and a plug-in about the queue of its device (backend.h: about operators).
 *
 * Operators of a device are queued in one order, so memory may be reused as soon as the call that used it has returned.
 * Copies that run beside the operators are numbered from 1 and are done in that order. The plug-in hands this table out
 * by a symbol of its own; sizes are compared at load, as for the table of operators.
 */
#ifndef LAC_DEVICE_H
#define LAC_DEVICE_H
#include "backend.h"
#include "lacuna_queue.h"

/* The numbers that random operators draw from while a graph is captured: the seed, offsets offset + i step, i < count.
 * No flag is their lowest byte, 0 or 1: what a stack held before is found in a structure's padding, beside its flags.
 */
enum { LAC_DRAW_STEP = 256 };
typedef struct lac_draws {
    uint64_t seed, offset;
    int64_t count;
} lac_draws;
/* one capture at a time; between begin and end nothing may wait for the device */
typedef struct lac_device_graphs {
    int (*begin)(void);
    int (*end)(bool keep, const lac_draws *draws, void **graph, int64_t *nodes);
    int (*launch)(void *graph, uint64_t seed, uint64_t offset); /* the numbers that this run draws from */
    void (*drop)(void *graph);
} lac_device_graphs;

typedef struct lac_device {
    int32_t abi, bytes;
    int (*allocate_host)(size_t bytes, void **out); /* page-locked; fails with status "memory" */
    int (*release_host)(void *p);
    void (*idle)(void);      /* waits for everything, failed or not */
    int64_t (*queued)(void); /* how many operators have been queued; a copy may be told to come after so many */
    int (*copy)(void *to, const void *from, size_t bytes, bool to_host, int64_t after, int64_t *number);
    bool (*copy_done)(int64_t number);
    int (*copy_wait)(int64_t number);  /* the host waits */
    int (*after_copy)(int64_t number); /* operators that are queued from now on wait */
    int (*event_new)(void **event);
    void (*event_drop)(void *event);
    int (*event_record)(void *event);
    int (*event_done)(void *event, int *done);
    int (*event_wait)(void *event);
    int (*event_elapsed)(void *from, void *to, double *ms);
    const lac_device_graphs *graphs;
    /* moves bytes and waits, for guards: leaves what kernels have noted for whom it concerns; fails without a message,
     * also while a graph is captured */
    int (*move)(void *to, const void *from, size_t bytes, bool to_host);
} lac_device;

typedef const lac_device *lac_device_entry(void); /* "lac_device_v1" of a plug-in */

/* the loaded plug-in's; NULL if there is none (backend.c) */
const lac_device *lac_device_table(void);

/* pool.c: device memory that is taken from now on belongs to a graph, also when it is given back; NULL ends that */
void lac_pool_capture(lac_graph *graph);
bool lac_pool_captured(const lac_storage *s, const lac_graph *graph); /* is its block of that graph? */
/* the tensors of a graph's block are released; a new reference to its storage, which is made for one like t if need be
 */
void lac_pool_end(void *block);
int lac_pool_revive(void *block, const lac_tensor *t, lac_storage **out);
int64_t lac_pool_reserved(const lac_graph *graph); /* bytes */
void lac_pool_uncapture(const lac_graph *graph);   /* its blocks are as others again */
/* graph.c: while a graph is captured, what front ends read and make, and what back ends have run; does a graph need s?
 */
extern lac_graph *lac_graph_now;
void lac_graph_view(const char *op, const char *name, const lac_tensor *t);
int lac_graph_check(const char *op, int slot);
bool lac_graph_holds(const lac_storage *s);

/* pool.c: notes the asynchronous copy that reads or writes a block of device or page-locked memory */
void lac_storage_copied(lac_storage *s, int64_t copy);
/* how many operators had been queued on the device when the storage's block was last given back */
int64_t lac_storage_given(const lac_storage *s);
/* copies.c: comes after the asynchronous copy from or to the storage; the host waits for one of host memory */
int lac_copy_settle(lac_storage *s);

#endif
