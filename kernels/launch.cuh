/* launch.cuh: launching small kernels: what they cost the host, and the device between two of them.
 *
 * An operator on a small tensor is a launch and little else. launch() goes to the driver's own cuLaunchKernelEx with a
 * function that is looked up once, and from Hopper on it lets a kernel start while the one before it ends
 * ("programmatic dependent launch"), which hides most of what lies between two kernels, from the device and from the
 * host. On an H200 an empty kernel cost its host 3.0 us by <<<>>>, 2.6 us by the driver's function and 2.2 us with
 * both; exp of 50 MB took 25.9 us in a row of such calls instead of 27.5. A kernel that is launched so may touch memory
 * only after previous_done(), which waits until all kernels before it are done and their writes are seen: every one
 * begins with it, or with what touches no memory. Kernels that are launched by <<<>>> wait by themselves. Errors are
 * lac_cuda_launched()'s, as after <<<>>>. Where there are processors enough it is another thread that goes to the
 * driver (launcher.cu), and launch() returns before. Letting the next kernel in before a kernel's own end
 * (let_next_in()) is no faster by itself: it is where the next one has something to do until then, as filling a table,
 * or asking the second-level cache for its first rows (ask_ahead()), and where every kernel between the two lets the
 * next one in. All that waits is waited for, because a kernel is done only when its own wait is over.
 */
#ifndef LAC_CUDA_LAUNCH_CUH
#define LAC_CUDA_LAUNCH_CUH
#include "common.cuh"

/* launcher.cu; the kernel takes `count` arguments of so many bytes */
void lac_cuda_launch(const void *kernel, dim3 grid, unsigned threads, size_t shared, void **arguments,
                     const uint32_t *bytes, int count);

static __device__ __forceinline__ void previous_done()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* From here on the next kernel may start where this one leaves room: it waits itself until this one is done, so this
 * may come before this one's own wait. */
static __device__ __forceinline__ void let_next_in()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/* Asks the second-level cache for what a kernel reads first: all that it may do with memory before previous_done(),
 * because nothing depends on when it happens. A line, or a run whose ends are multiples of 16 bytes: one instruction of
 * one thread, where the lines of a warp are asked for one after the other. */
static __device__ __forceinline__ void ask_ahead(const void *at)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}
static __device__ __forceinline__ void ask_ahead(const void *at, int bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#endif
}
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, const A &...given)
{
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel takes");
    [&](P... values) { /* of the kernel's types */
                       void *arguments[] = {(void *)&values...};
                       static const uint32_t bytes[] = {(uint32_t)sizeof(P)...};
                       lac_cuda_launch((const void *)kernel, grid, threads, shared, arguments, bytes, sizeof...(P));
    }(given...);
}

/* as <<<>>> does: a kernel that does not wait by itself starts when all before it are done */
template <class... P, class... A>
void launch_after(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, const A &...given)
{
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel takes");
    [&](P... values) {
        void *arguments[] = {(void *)&values...};
        static const uint32_t bytes[] = {(uint32_t)sizeof(P)...};
        lac_cuda_launch_after((const void *)kernel, grid, threads, shared, arguments, bytes, sizeof...(P));
    }(given...);
}

#endif
