/* hopper.cuh: what the attention kernels for Hopper (sm_90a) share: instructions that have no C++ name, products of a
 * warpgroup, tensor maps.
 *
 * Barriers live in shared memory and are named by their address. One phase of a barrier is over when all arrivals, and
 * all bytes that were promised for it, have come; whoever waits knows the parity of the phase. Bulk copies are asked
 * for by one thread and announce their bytes to a barrier. Products read both operands, or the right one, from shared
 * memory, run beside the instructions that follow, and are waited for by groups.
 *
 * Tensor maps. A row of a lattice is a token's D numbers; row i lies (t0 + i r) T + head bytes from the beginning, T a
 * token's bytes. The map has the dimensions {D | i: 2^30 rows, r T | token, T | head | wrap, 2^34 - r T}, and row i of
 * a lattice of n rows is at (2^30 - n + i, t0 + n r, head, 2^30): the offsets add up to (t0 + i r) T modulo 2^64, and
 * i >= n is out of bounds, so that it is read as zero and never written. One map a tensor and dilation serves every
 * segment, offset and ragged end, and a dilated lattice costs what a dense one does (kernels/HOPPER.md).
 *
 * Only compiled for sm_90a: elsewhere kernels that use this are empty, and the host must not choose them. Rejected:
 * CUTLASS (its layouts are a language of their own), maps with element strides (boxes of at most 256 / r rows).
 */
#ifndef LAC_CUDA_HOPPER_CUH
#define LAC_CUDA_HOPPER_CUH
#include "common.cuh"
#include <cuda.h>
#include <type_traits>

enum { HOPPER_WRAP = 1 << 30 }; /* rows of a clipping map */

/* ---- the host's side (hopper.cu) ---- */

/* can x, [B, N, H, D], be read through a tensor map? if not, *why says what is wrong */
bool hopper_readable(const lac_view *x, const char **why);
/* tokens from one batch item to the next */
int hopper_batch_step(const lac_view *x);
/* the map of x for dilation r, in boxes of `rows` rows of 128 bytes */
int hopper_map(CUtensorMap *map, const lac_view *x, int64_t r, int rows);
/* Is the device a Hopper, and was `kernel` compiled for it? Else it is empty: made from an older device's PTX. */
bool hopper_compiled(const void *kernel);

/* ---- barriers, bulk copies, fences (PTX ISA 8.0, chapters 9.7.8 and 9.7.12) ---- */

#define HOPPER_FN static __device__ __forceinline__

HOPPER_FN void hopper_barrier(uint32_t at, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
HOPPER_FN void hopper_expect(uint32_t at, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
HOPPER_FN void hopper_arrive(uint32_t at)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
HOPPER_FN void hopper_wait(uint32_t at, int parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(at),
                 "r"(parity)
                 : "memory");
}
/* has the phase ended? for those who do not wait */
HOPPER_FN bool hopper_ended(uint32_t at, int parity)
{
    int ended;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.s32 %0, 1, 0, done;\n"
                 "}"
                 : "=r"(ended)
                 : "r"(at), "r"(parity)
                 : "memory");
    return ended;
}
/* a box of a tensor map: columns from `column`, 64 rows from `row`, of (z, head) */
HOPPER_FN void hopper_load(uint32_t to, const CUtensorMap *map, uint32_t full, int column, int row, int z, int head)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
                 "l"(map), "r"(full), "r"(column), "r"(row), "r"(z), "r"(head), "r"((int)HOPPER_WRAP)
                 : "memory");
}
HOPPER_FN void hopper_store(const CUtensorMap *map, uint32_t from, int column, int row, int z, int head)
{
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
        "r"(from), "r"(column), "r"(row), "r"(z), "r"(head), "r"((int)HOPPER_WRAP)
        : "memory");
}
HOPPER_FN void hopper_load_flat(uint32_t to, const void *from, int bytes, uint32_t full)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(full)
                 : "memory");
}
HOPPER_FN void hopper_store_flat(float *to, uint32_t from, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}
HOPPER_FN void hopper_add_flat(float *to, uint32_t from, int bytes)
{
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}
HOPPER_FN void hopper_bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
HOPPER_FN void hopper_bulk_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
HOPPER_FN void hopper_bulk_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
/* what this thread wrote to shared memory, before tensor cores and bulk copies read it */
HOPPER_FN void hopper_shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
HOPPER_FN void hopper_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }
/* named barriers: wait for `threads` arrivals; wait and learn whether `mine` is true of any; arrive without waiting */
HOPPER_FN void hopper_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
HOPPER_FN bool hopper_sync_or(int id, int threads, bool mine)
{
    int any;
    asm volatile("{\n"
                 ".reg .pred mine, any;\n"
                 "setp.ne.s32 mine, %3, 0;\n"
                 "bar.red.or.pred any, %1, %2, mine;\n"
                 "selp.s32 %0, 1, 0, any;\n"
                 "}"
                 : "=r"(any)
                 : "r"(id), "r"(threads), "r"((int)mine)
                 : "memory");
    return any;
}
HOPPER_FN void hopper_meet(int id, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* registers of every thread of the warpgroup from here on */
template <int N> HOPPER_FN void hopper_fewer() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> HOPPER_FN void hopper_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

/* ---- products of a warpgroup ---- */

HOPPER_FN void hopper_product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HOPPER_FN void hopper_product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> HOPPER_FN void hopper_product_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* Keeps the compiler from moving ordinary accesses to registers across products that still use them. */
template <int N> HOPPER_FN void hopper_pin(float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> HOPPER_FN void hopper_pin(uint32_t (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}
/* Operands in shared memory: panels of 128-byte rows, 16-byte chunk c of row r at chunk c ^ r % 8. The low word holds
 * the address and the distance of panels, both in units of 16 bytes; made uniform in the warp, because sums of
 * descriptors then run beside the other instructions. */
HOPPER_FN uint32_t hopper_operand(uint32_t address, uint32_t panel)
{
    return __shfl_sync(~0u, address >> 4 | panel >> 4 << 16, 0);
}
HOPPER_FN uint64_t hopper_descriptor(uint32_t operand, uint32_t offset)
{
    return (uint64_t)(0x40000000u | 1024 >> 4) << 32 | (uint64_t)(operand + (offset >> 4));
}

/* clang-format off */
#define HOPPER_REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HOPPER_REGISTERS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HOPPER_REGISTERS_40 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define HOPPER_REGISTERS_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define HOPPER_F8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
    "+f"(x[i + 6]), "+f"(x[i + 7])
#define HOPPER_F32(x, i) HOPPER_F8(x, i), HOPPER_F8(x, i + 8), HOPPER_F8(x, i + 16), HOPPER_F8(x, i + 24)
#define HOPPER_PRODUCT(WIDTH, TYPE) "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32." TYPE "." TYPE " {"
/* clang-format on */

/* x (+)= A B^T (ACROSS 0: B's rows are columns of x) or x (+)= A B (ACROSS 1), 64 x 64, 64 x 80 and 64 x 128, 16
 * deep */
template <class T, int ACROSS> HOPPER_FN void hopper_product(float (&x)[32], uint64_t a, uint64_t b, int add)
{
#define PRODUCT(TYPE)                                                                                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" HOPPER_PRODUCT("64", TYPE) HOPPER_REGISTERS_32       \
                 "}, %32, %33, add, 1, 1, 0, %35;\n}"                                                                  \
                 : HOPPER_F32(x, 0)                                                                                    \
                 : "l"(a), "l"(b), "r"(add), "n"(ACROSS))
    if constexpr (std::is_same_v<T, bf16>) PRODUCT("bf16");
    else PRODUCT("f16");
#undef PRODUCT
}
template <class T, int ACROSS> HOPPER_FN void hopper_product(float (&x)[40], uint64_t a, uint64_t b, int add)
{
#define PRODUCT(TYPE)                                                                                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %42, 0;\n" HOPPER_PRODUCT("80", TYPE) HOPPER_REGISTERS_40       \
                 "}, %40, %41, add, 1, 1, 0, %43;\n}"                                                                  \
                 : HOPPER_F32(x, 0), HOPPER_F8(x, 32)                                                                  \
                 : "l"(a), "l"(b), "r"(add), "n"(ACROSS))
    if constexpr (std::is_same_v<T, bf16>) PRODUCT("bf16");
    else PRODUCT("f16");
#undef PRODUCT
}
template <class T, int ACROSS> HOPPER_FN void hopper_product(float (&x)[64], uint64_t a, uint64_t b, int add)
{
#define PRODUCT(TYPE)                                                                                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n" HOPPER_PRODUCT("128", TYPE) HOPPER_REGISTERS_64      \
                 "}, %64, %65, add, 1, 1, 0, %67;\n}"                                                                  \
                 : HOPPER_F32(x, 0), HOPPER_F32(x, 32)                                                                 \
                 : "l"(a), "l"(b), "r"(add), "n"(ACROSS))
    if constexpr (std::is_same_v<T, bf16>) PRODUCT("bf16");
    else PRODUCT("f16");
#undef PRODUCT
}
/* x += A B with A in registers, 64 x 64, 64 x 128 and 64 x 256, 16 deep */
template <class T> HOPPER_FN void hopper_product_from(float (&x)[32], const uint32_t *a, uint64_t b)
{
#define PRODUCT(TYPE)                                                                                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n" HOPPER_PRODUCT("64", TYPE) HOPPER_REGISTERS_32       \
                 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"                                                      \
                 : HOPPER_F32(x, 0)                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
    if constexpr (std::is_same_v<T, bf16>) PRODUCT("bf16");
    else PRODUCT("f16");
#undef PRODUCT
}
template <class T> HOPPER_FN void hopper_product_from(float (&x)[64], const uint32_t *a, uint64_t b)
{
#define PRODUCT(TYPE)                                                                                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n" HOPPER_PRODUCT("128", TYPE) HOPPER_REGISTERS_64      \
                 "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"                                                      \
                 : HOPPER_F32(x, 0), HOPPER_F32(x, 32)                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
    if constexpr (std::is_same_v<T, bf16>) PRODUCT("bf16");
    else PRODUCT("f16");
#undef PRODUCT
}
template <class T> HOPPER_FN void hopper_product_from(float (&x)[128], const uint32_t *a, uint64_t b)
{
#define PRODUCT(TYPE)                                                                                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %133, 0;\n" HOPPER_PRODUCT("256", TYPE) HOPPER_REGISTERS_128    \
                 "}, {%128, %129, %130, %131}, %132, add, 1, 1, 1;\n}"                                                 \
                 : HOPPER_F32(x, 0), HOPPER_F32(x, 32), HOPPER_F32(x, 64), HOPPER_F32(x, 96)                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
    if constexpr (std::is_same_v<T, bf16>) PRODUCT("bf16");
    else PRODUCT("f16");
#undef PRODUCT
}

/* two numbers in one register, the first in the low half */
template <class T> HOPPER_FN uint32_t hopper_pack(float low, float high)
{
    uint32_t x;
    if constexpr (std::is_same_v<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
/* two numbers from the cache that all processors share, if `wanted`; both stay what they are otherwise */
HOPPER_FN void hopper_fetch(float &x, float &y, const float *from, int wanted)
{
    asm volatile("{\n"
                 ".reg .pred wanted;\n"
                 "setp.ne.s32 wanted, %3, 0;\n"
                 "@wanted ld.global.cg.v2.f32 {%0, %1}, [%2];\n"
                 "}"
                 : "+f"(x), "+f"(y)
                 : "l"(from), "r"(wanted)
                 : "memory");
}
/* a byte, if `wanted`, else 0; asked for here, whatever waits for it later */
HOPPER_FN int hopper_byte(const uint8_t *from, int wanted)
{
    int x = 0;
    asm volatile("{\n"
                 ".reg .pred wanted;\n"
                 "setp.ne.s32 wanted, %2, 0;\n"
                 "@wanted ld.global.nc.u8 %0, [%1];\n"
                 "}"
                 : "+r"(x)
                 : "l"(from), "r"(wanted));
    return x;
}
HOPPER_FN float2 hopper_pair(uint32_t at)
{
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
    return v;
}
HOPPER_FN uint32_t hopper_word(uint32_t at)
{
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at));
    return x;
}
HOPPER_FN void hopper_put_one(uint32_t at, float x)
{
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
HOPPER_FN int4 hopper_four(uint32_t at)
{
    int4 v;
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
HOPPER_FN void hopper_put_two(uint32_t at, int x, int y)
{
    asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}
HOPPER_FN void hopper_put_four(uint32_t at, int4 v)
{
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
/* four 8 x 8 matrices from registers to shared memory; ACROSS: transposed on the way */
template <bool ACROSS> HOPPER_FN void hopper_put(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    if constexpr (ACROSS)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
                     "r"(c), "r"(d)
                     : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
                     "r"(c), "r"(d)
                     : "memory");
}

#endif
