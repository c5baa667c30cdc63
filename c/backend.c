/* backend.c: which table of operators serves a device.
 *
 * The CPU's kernels are compiled once per instruction set (baseline, AVX2, AVX-512; attention also for AMX) from the
 * same sources and the best table that this processor can run is picked at start; LACUNA_CPU or lac_isa() force
 * another one, which is how the tests cover all of them. Linux grants the matrix unit (AMX) to a process that asks for
 * it, unless one of its threads has an alternate stack for signals that is too small for the unit's registers; then, as
 * where the kernel does not know the unit, AVX-512 is the best. Once granted, such small stacks are refused to the
 * process, so it is asked for only when the table is chosen. A CUDA back end is a plug-in that is loaded at run time
 * and exports `lac_backend_v1`; its first fields are the ABI, so a stale plug-in is refused with what to rebuild.
 * Nothing ever moves to another device by itself.
 */
#include "device.h"
#include <cblas.h>
#include <dlfcn.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

extern const lac_backend lac_cpu_baseline_backend;
#ifdef LAC_HAVE_AVX
extern const lac_backend lac_cpu_avx2_backend, lac_cpu_avx512_backend;
int lac_cpu_amx_attend(const lac_a_attend *a);
int lac_cpu_amx_attend_bwd(const lac_a_attend_bwd *w);
int lac_cpu_avx512_map1_bytes(const lac_a_map1 *a);
#endif

static const lac_backend *cpu_backend, *cuda_backend;
static const lac_device *cuda_device;
static char cuda_reason[512] = "the CUDA plug-in is not loaded";

#ifdef LAC_HAVE_AVX
#include <cpuid.h>

/* asked of the processor itself: clang's __builtin_cpu_supports does not know "f16c" */
static bool has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* The matrix unit: Linux lets a process use it, because its registers are 8 KiB, if the process asks. */
static bool has_amx(void)
{
#ifdef __linux__
    enum { TILE = 1 << 24, BF16 = 1 << 22, REQUEST = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA = 18 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE) && (d & BF16) &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

/* AVX-512's table, with what looks bytes up in registers if the processor does (VBMI: all but the first) or, for tests,
 * without */
static const lac_backend *avx512_table(bool plain)
{
    static lac_backend tables[2];
    if (!tables[1].abi) {
        lac_backend best = lac_cpu_avx512_backend, without = best;
        if (__builtin_cpu_supports("avx512vbmi")) best.map1 = lac_cpu_avx512_map1_bytes;
        without.detail = "avx512f";
        tables[0] = best;
        tables[1] = without;
    }
    return &tables[plain];
}

/* the same with another attention */
static const lac_backend *amx_table(void)
{
    static lac_backend table;
    if (!table.abi) {
        lac_backend t = *avx512_table(false);
        t.detail = "amx";
        t.attend = lac_cpu_amx_attend;
        t.attend_bwd = lac_cpu_amx_attend_bwd;
        table = t;
    }
    return &table;
}
#endif

/* can this processor run the named instruction set? */
static bool isa_available(const char *name)
{
    if (strcmp(name, "baseline") == 0) return true;
#ifdef LAC_HAVE_AVX
    __builtin_cpu_init();
    if (strcmp(name, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2") && has_f16c();
    if (strcmp(name, "avx512") == 0 || strcmp(name, "avx512f") == 0)
        return isa_available("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (strcmp(name, "amx") == 0) return isa_available("avx512") && has_amx();
#endif
    return false;
}

static const lac_backend *isa_table(const char *name)
{
    if (!isa_available(name)) return NULL;
#ifdef LAC_HAVE_AVX
    if (strcmp(name, "avx2") == 0) return &lac_cpu_avx2_backend;
    if (strcmp(name, "avx512") == 0) return avx512_table(false);
    if (strcmp(name, "avx512f") == 0) return avx512_table(true);
    if (strcmp(name, "amx") == 0) return amx_table();
#endif
    return &lac_cpu_baseline_backend;
}

__attribute__((constructor)) static void choose_cpu(void)
{
    static const char *const best_first[] = {"amx", "avx512", "avx2", "baseline"};
    const char *forced = getenv("LACUNA_CPU");
    /* a constructor cannot fail: the host compares lac_isa(NULL) with the variable and refuses (lib.lua does) */
    if (forced) cpu_backend = isa_table(forced);
    for (size_t i = 0; !cpu_backend; i++) cpu_backend = isa_table(best_first[i]);
}

bool lac_has_unit(void) { return strcmp(cpu_backend->detail, "amx") == 0; }

const char *lac_isa(const char *name)
{
    if (name) {
        const lac_backend *table = isa_table(name);
        if (!table) {
            lac_fail(LAC_E_DEVICE, "isa: '%s' is not available on this processor or in this build", name);
            return NULL;
        }
        cpu_backend = table;
    }
    return cpu_backend->detail;
}

const lac_device *lac_device_table(void) { return cuda_device; }

const lac_backend *lac_backend_for(int device) { return device == LAC_CPU ? cpu_backend : cuda_backend; }

int lac_backend_missing(const char *op, int device)
{
    if (device == LAC_CPU) LAC_FAIL(DEVICE, "%s: not supported on the cpu (%s)", op, lac_isa(NULL));
    if (!cuda_backend) LAC_FAIL(DEVICE, "%s: there is no CUDA back end: %s", op, cuda_reason);
    LAC_FAIL(DEVICE, "%s: not supported on cuda; move the tensors to the cpu", op);
}

static int plug_in_refuse(const char *reason)
{
    snprintf(cuda_reason, sizeof cuda_reason, "%s", reason);
    LAC_FAIL(DEVICE, "cuda: %s", cuda_reason);
}

static int engine_fail(int status, const char *message) { return lac_fail(status, "%s", message); }

static const lac_engine engine = {.abi = LAC_ABI,
                                  .bytes = sizeof(lac_engine),
                                  .fail = engine_fail,
                                  .scratch_get = lac_scratch_get,
                                  .scratch_put = lac_scratch_put,
                                  .flags = &lac_flags_global,
                                  .settings = &lac_settings_global};

int lac_backend_load(const char *path)
{
    char why[480];
    if (!path) LAC_FAIL(ARGUMENT, "cuda: no path of a plug-in");
    if (cuda_backend) return 0;
    if (access(path, F_OK) != 0)
        return plug_in_refuse("there is no liblacuna_cuda.so beside the engine (make builds it where nvcc is)");
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return plug_in_refuse(dlerror());
    /* the plug-in answers with its table, or with NULL and the reason why this machine cannot use it */
    lac_backend_entry *entry;
    *(void **)&entry = dlsym(library, "lac_backend_v1");
    const char *reason = "it does not export lac_backend_v1";
    const lac_backend *table = entry ? entry(&engine, &reason) : NULL;
    if (!table) {
        snprintf(why, sizeof why, "%s", reason);
        dlclose(library);
        return plug_in_refuse(why);
    }
    if (table->abi != LAC_ABI || table->bytes != (int32_t)sizeof(lac_backend)) {
        snprintf(why, sizeof why, "%s was built for ABI %d (%d bytes), the engine has %d (%d bytes): run `make` again",
                 path, table->abi, table->bytes, LAC_ABI, (int)sizeof(lac_backend));
        dlclose(library);
        return plug_in_refuse(why);
    }
    lac_device_entry *device;
    *(void **)&device = dlsym(library, "lac_device_v1");
    const lac_device *queue = device ? device() : NULL;
    if (!queue || queue->abi != LAC_ABI || queue->bytes != (int32_t)sizeof(lac_device)) {
        dlclose(library);
        return plug_in_refuse("the engine and the plug-in were built from different sources: run `make` again");
    }
    cuda_backend = table;
    cuda_device = queue;
    snprintf(cuda_reason, sizeof cuda_reason, "%s", table->detail);
    return 0;
}

int lac_backend_has(int device, const char *slot)
{
    const lac_backend *table = lac_backend_for(device);
#define LAC_OP(name, args, gradient)                                                                                   \
    if (slot && strcmp(slot, #name) == 0) return table && table->name;
#include "ops.def"
#undef LAC_OP
    return -1;
}

int lac_synchronize(int device)
{
    if (device == LAC_CPU) return 0;
    const lac_backend *table = lac_backend_for(device);
    return table ? table->runtime->synchronize() : lac_backend_missing("synchronize", device);
}

static void set_threads(int n)
{
    omp_set_num_threads(n);
    openblas_set_num_threads(n); /* sets OpenMP's number too, to at most what OpenBLAS was built for */
}

/* A machine or OMP_NUM_THREADS may give more threads than OpenBLAS was built for: what the engine begins with is a
   number that can be set. */
__attribute__((constructor)) static void choose_threads(void) { set_threads(omp_get_max_threads()); }

int lac_threads(int n)
{
    if (n > 0) set_threads(n);
    return omp_get_max_threads();
}

const char *lac_build_info(void)
{
    static char text[1024];
    snprintf(text, sizeof text, "compiler: gcc " __VERSION__ "\nblas: %s\ncpu: %s\ncuda: %s\n", openblas_get_config(),
             lac_isa(NULL), cuda_reason);
    return text;
}
