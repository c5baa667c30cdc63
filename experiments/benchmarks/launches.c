/* launches.c: what CUDA's driver takes to launch a kernel, in a loop in C: the least that an operator on a GPU costs
 * its host.
 *
 * The benchmark section dispatch compiles this file and loads it; nothing else does. It launches as kernels/launch.cuh
 * does: cuLaunchKernelEx, a kernel that may start while the one before it ends (from Hopper on), 256 threads, one
 * argument of as many bytes as that of an elementwise function, a stream that waits for no other. The kernel adds 16
 * numbers and is written in PTX, so that nothing but a C compiler is needed; the driver's functions are looked up in
 * the process, which has its context already. Rejected: timing the runtime's <<<>>>, which costs more.
 */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

enum { OVERLAP = 6 /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION */, NON_BLOCKING = 1, MAJOR = 75 };
struct attribute {
    int id, pad;
    union {
        int allowed;
        char bytes[64];
    } value;
};
struct config {
    unsigned grid[3], block[3], shared;
    void *stream;
    struct attribute *attributes;
    unsigned count;
};
static struct {
    int (*load)(void **module, const void *image), (*find)(void **function, void *module, const char *name);
    int (*device)(int *device), (*ask)(int *value, int attribute, int device);
    int (*allocate)(uint64_t *at, size_t bytes), (*stream)(void **stream, unsigned flags), (*wait)(void *stream);
    int (*launch)(const struct config *c, void *function, void **arguments, void **extra);
} api;
static struct { /* as dense_args of kernels/elem.cuh */
    uint64_t in[4], out;
    int64_t n;
    double number, constant[3];
    int fn, dtype, out_dtype, slot;
    char scalar[4];
} argument;
static struct attribute overlap = {.id = OVERLAP, .value.allowed = 1};
static struct config config = {{1, 1, 1}, {256, 1, 1}, 0, NULL, &overlap, 0};
static void *function;

#define KERNEL(version, target, wait)                                                                                  \
    ".version " version "\n.target " target "\n.address_size 64\n"                                                     \
    ".visible .entry add(.param .align 8 .b8 a[104]) {\n"                                                              \
    ".reg .b32 %i; .reg .f32 %x, %y; .reg .b64 %a, %b, %c, %d; .reg .pred %p;\n" wait                                  \
    "mov.u32 %i, %tid.x; setp.ge.u32 %p, %i, 16; @%p ret;\n"                                                           \
    "ld.param.u64 %a, [a]; ld.param.u64 %b, [a+8]; ld.param.u64 %c, [a+32]; mul.wide.u32 %d, %i, 4;\n"                 \
    "add.u64 %a, %a, %d; add.u64 %b, %b, %d; add.u64 %c, %c, %d;\n"                                                    \
    "ld.global.f32 %x, [%a]; ld.global.f32 %y, [%b]; add.f32 %x, %x, %y; st.global.f32 [%c], %x; ret; }\n"

/* finds the driver and makes the kernel; NULL, or why there is none */
const char *launches_open(void)
{
    static char text[100];
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), *module;
    if (!driver) return "no driver is loaded";
    *(void **)&api.load = dlsym(driver, "cuModuleLoadData");
    *(void **)&api.find = dlsym(driver, "cuModuleGetFunction");
    *(void **)&api.device = dlsym(driver, "cuCtxGetDevice");
    *(void **)&api.ask = dlsym(driver, "cuDeviceGetAttribute");
    *(void **)&api.allocate = dlsym(driver, "cuMemAlloc_v2");
    *(void **)&api.stream = dlsym(driver, "cuStreamCreate");
    *(void **)&api.wait = dlsym(driver, "cuStreamSynchronize");
    *(void **)&api.launch = dlsym(driver, "cuLaunchKernelEx");
    if (!api.load || !api.find || !api.device || !api.ask || !api.allocate || !api.stream || !api.wait || !api.launch)
        return "the driver is older than CUDA 12";
    int device, major = 0;
    int status = api.device(&device);
    if (!status) status = api.ask(&major, MAJOR, device);
    config.count = major >= 9;
    if (!status)
        status = api.load(&module,
                          major >= 9 ? KERNEL("7.8", "sm_90", "griddepcontrol.wait;\n") : KERNEL("7.0", "sm_80", ""));
    if (!status) status = api.find(&function, module, "add");
    if (!status) status = api.allocate(&argument.out, 256);
    if (!status) status = api.stream(&config.stream, NON_BLOCKING);
    argument.in[0] = argument.in[1] = argument.out;
    if (!status) return NULL;
    snprintf(text, sizeof text, "the driver answers %d", status);
    return text;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Seconds of one launch, of `times` rounds of n into an idle queue, and their waits if `waits`; negative: a launch
 * failed. */
double launches_time(int times, int n, int waits)
{
    void *arguments[] = {&argument};
    double spent = 0;
    int status = 0;
    for (int round = 0; round < times; round++) {
        const double start = now();
        for (int i = 0; i < n; i++) status |= api.launch(&config, function, arguments, NULL);
        const double queued = now() - start;
        status |= api.wait(config.stream);
        spent += waits ? now() - start : queued;
    }
    return status ? -1 : spent / times / n;
}
