/* backend.cu: the CUDA plug-in's entry point.
 *
 * The engine opens this library at run time and calls lac_backend_v1(). It answers with a table of operators, or
 * with NULL and the reason why this machine cannot run them (no driver, no device, a device that is too old), which
 * `lacuna devices` prints word for word. The CUDA runtime is linked statically, so that a machine without a toolkit
 * needs nothing but the driver. The table's slots are empty so far: an operator asked for on a CUDA device is an
 * error that names it, never a silent move to the CPU. Rejected: linking CUDA into the engine itself, which
 * would make one binary for both kinds of machine impossible.
 */
extern "C" {
#include "backend.h"
}
#include <cstdio>
#include <cuda_runtime.h>

static char text[512];
static lac_backend table;

/* one device per process: the first that is visible (CUDA_VISIBLE_DEVICES chooses) */
extern "C" __attribute__((visibility("default"))) const lac_backend *lac_backend_v1(const char **reason)
{
    int count = 0;
    cudaDeviceProp device;
    cudaError_t error = cudaGetDeviceCount(&count);
    *reason = text;
    if (error == cudaErrorInsufficientDriver) { /* also what the runtime says where there is no driver at all */
        snprintf(text, sizeof text, "no NVIDIA driver, or one too old for CUDA %d.%d", CUDART_VERSION / 1000,
                 CUDART_VERSION % 1000 / 10);
        return nullptr;
    }
    if (error != cudaSuccess || count == 0) {
        snprintf(text, sizeof text, "no usable device: %s", error ? cudaGetErrorString(error) : "none is visible");
        return nullptr;
    }
    error = cudaGetDeviceProperties(&device, 0);
    if (error != cudaSuccess) {
        snprintf(text, sizeof text, "device 0 does not answer: %s", cudaGetErrorString(error));
        return nullptr;
    }
    if (device.major < 8) {
        snprintf(text, sizeof text, "%s has compute capability %d.%d, at least 8.0 is needed", device.name,
                 device.major, device.minor);
        return nullptr;
    }
    snprintf(text, sizeof text, "cuda:0 %s, compute capability %d.%d, %.1f GiB, %d multiprocessors", device.name,
             device.major, device.minor, (double)device.totalGlobalMem / (1 << 30), device.multiProcessorCount);
    table.abi = LAC_ABI;
    table.bytes = (int32_t)sizeof(lac_backend);
    table.name = "cuda";
    table.detail = text;
    return &table;
}
