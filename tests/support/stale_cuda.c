/* stale_cuda.c: a plug-in from other sources, which the engine must refuse. queue_spec.lua compiles it with STALE:
 * what is wrong. 0: it has no entry, 1: the ABI of its table, 2: the table's size, 3: the ABI of its queue, 4: the
 * queue's size, 5: there is no queue, 6: it says that this machine cannot use it.
 */
#include "device.h"

static const lac_backend table = {
    .abi = LAC_ABI - (STALE == 1), .bytes = sizeof(lac_backend) - (STALE == 2), .name = "cuda", .detail = "stale"};
static const lac_device device = {.abi = LAC_ABI - (STALE == 3), .bytes = sizeof(lac_device) - (STALE == 4)};

#if STALE > 0
__attribute__((visibility("default"))) const lac_backend *lac_backend_v1(const lac_engine *e, const char **reason);
const lac_backend *lac_backend_v1(const lac_engine *e, const char **reason)
{
    (void)e;
    *reason = "there is no driver";
    return STALE == 6 ? NULL : &table;
}
#endif

__attribute__((visibility("default"))) const lac_device *lac_device_v1(void);
const lac_device *lac_device_v1(void)
{
    (void)table;
    return STALE == 5 ? NULL : &device;
}
