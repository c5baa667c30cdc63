/* launch.cuh: launching small kernels: what they cost the host, and the device between two of them.
 *
 * An operator on a small tensor is a launch and little else. launch() goes to the driver's own cuLaunchKernelEx with a
 * function that is looked up once, and from Hopper on it lets a kernel start while the one before it ends
 * ("programmatic dependent launch"), which hides most of what lies between two kernels, from the device and from the
 * host. On an H200 an empty kernel cost its host 3.0 us by <<<>>>, 2.6 us by the driver's function and 2.2 us with
 * both; exp of 50 MB took 25.9 us in a row of such calls instead of 27.5. A kernel that is launched so may touch memory
 * only after previous_done(), which waits until all kernels before it are done and their writes are seen: every one
 * begins with it. Kernels that are launched by <<<>>> wait by themselves. Errors are lac_cuda_launched()'s, as after
 * <<<>>>. Rejected: letting the next kernel in before a kernel's own end (griddepcontrol.launch_dependents): no faster.
 */
#ifndef LAC_CUDA_LAUNCH_CUH
#define LAC_CUDA_LAUNCH_CUH
#include "common.cuh"

/* backend.cu */
void lac_cuda_launch(const void *kernel, dim3 grid, unsigned threads, size_t shared, void **arguments);

static __device__ __forceinline__ void previous_done()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, const A &...given)
{
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel takes");
    [&](P... values) { /* of the kernel's types */
                       void *arguments[] = {(void *)&values...};
                       lac_cuda_launch((const void *)kernel, grid, threads, shared, arguments);
    }(given...);
}

#endif
