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
} lac_device;

typedef const lac_device *lac_device_entry(void); /* "lac_device_v1" of a plug-in */

/* the loaded plug-in's; NULL if there is none (backend.c) */
const lac_device *lac_device_table(void);

/* pool.c: notes the asynchronous copy that reads or writes a block of device or page-locked memory */
void lac_storage_copied(lac_storage *s, int64_t copy);
/* how many operators had been queued on the device when the storage's block was last given back */
int64_t lac_storage_given(const lac_storage *s);
/* copies.c: comes after the asynchronous copy from or to the storage; the host waits for one of host memory */
int lac_copy_settle(lac_storage *s);

#endif
