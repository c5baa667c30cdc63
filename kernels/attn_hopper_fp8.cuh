/* attn_hopper_fp8.cuh: what the forward on Hopper needs for q, k and v of eight bits (e4m3): products, scales, layouts.
 *
 * attn_hopper_fp8.cu rounds q, k and v as the CPU does (c/cpu/e4m3.c) and runs the forward's kernel on the eight bits,
 * an instance of its own. Products of eight bits take operands with the summed dimension along the row, so rows of keys
 * are as they are otherwise, while values lie across: D rows of keys. A lattice's keys are then neighbours, whatever
 * the dilation, and no bulk copy can pick them from a row; so values are gathered where they are rounded, once for each
 * branch: items of [D, keys], an item for each segment, batch item and distinct lattice of a key/value head.
 *
 * Weights go from the products' results to the next products' left operand without leaving the thread. A thread has of
 * 16 keys the results 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t (t its number of four), and as an operand gives 4 t to 4 t + 3. So
 * position 4 t + e of 16 values is that of key 2 t + e % 2 + 8 (e / 2). Only the values' order is changed: scores,
 * masks and lengths know nothing of it. Blocks of keys begin at multiples of 16.
 *
 * Weights are rounded to e4m3 too, relative to the largest so far, which is 2^8: half of the range. So they follow the
 * row's maximum at every rise, and a weight is normal down to 2^-14 of the largest and lost below 2^-18. The sum that
 * results are divided by is that of the weights before they are rounded. Results are summed up block by block, because
 * the tensor cores' own sums of such products keep 14 bits and cut off what is below.
 *
 * Rejected: transposing values in shared memory (they come from the cache for every tile of rows, the work with them);
 * one copy of the values a dilation, by remainders of the position (segments begin anywhere in 16 keys, and what lies
 * beyond their ends are values that may be NaN).
 */
#ifndef LAC_CUDA_ATTN_HOPPER_FP8_CUH
#define LAC_CUDA_ATTN_HOPPER_FP8_CUH
#include "attn_pairs.cuh"
#include "hopper.cuh"

struct e4m3 {
    uint8_t bits;
};

/* of a call: scales, and where the values' items are */
struct hopper_eight {
    const float *q, *k, *v; /* [B, H], [B, Hk], [B, Hk] */
    int half;               /* results are f16 */
    /* of a branch: heads with one item, the first one's number, items of a segment */
    int share[LAC_HOPPER_BRANCHES], first[LAC_HOPPER_BRANCHES], units[LAC_HOPPER_BRANCHES];
};
/* number of the values of head h in segment s, counted from the branch's first */
HOPPER_FN int hopper_values(const hopper_eight &x, const attn_branch &br, int g, int b, int h, int s)
{
    return (b * x.units[g] + h / x.share[g] - x.first[g]) * br.segments + s;
}

/* ---- products ---- */

#define HOPPER_EIGHT(WIDTH) "wgmma.mma_async.sync.aligned.m64n" WIDTH "k32.f32.e4m3.e4m3 {"

/* x (+)= A B^T, 64 x 128, 32 deep */
HOPPER_FN void hopper_product_eight(float (&x)[64], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n" HOPPER_EIGHT("128") HOPPER_REGISTERS_64
                 "}, %64, %65, add, 1, 1;\n}"
                 : HOPPER_F32(x, 0), HOPPER_F32(x, 32)
                 : "l"(a), "l"(b), "r"(add));
}
/* x = A B^T and x += A B^T with A in registers, 64 x 64 and 64 x 128, 32 deep. x is only written by the first: its
 * registers are free before. */
/* clang-format off */
#define HOPPER_N8(x, i) "=f"(x[i]), "=f"(x[i + 1]), "=f"(x[i + 2]), "=f"(x[i + 3]), "=f"(x[i + 4]), "=f"(x[i + 5]), \
    "=f"(x[i + 6]), "=f"(x[i + 7])
#define HOPPER_N32(x, i) HOPPER_N8(x, i), HOPPER_N8(x, i + 8), HOPPER_N8(x, i + 16), HOPPER_N8(x, i + 24)
/* clang-format on */
HOPPER_FN void hopper_product_eight_first(float (&x)[32], const uint32_t *a, uint64_t b)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 0, 0;\n" HOPPER_EIGHT("64") HOPPER_REGISTERS_32
                 "}, {%32, %33, %34, %35}, %36, add, 1, 1;\n}"
                 : HOPPER_N32(x, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
HOPPER_FN void hopper_product_eight_first(float (&x)[64], const uint32_t *a, uint64_t b)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 0, 0;\n" HOPPER_EIGHT("128") HOPPER_REGISTERS_64
                 "}, {%64, %65, %66, %67}, %68, add, 1, 1;\n}"
                 : HOPPER_N32(x, 0), HOPPER_N32(x, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
HOPPER_FN void hopper_product_eight_from(float (&x)[32], const uint32_t *a, uint64_t b)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" HOPPER_EIGHT("64") HOPPER_REGISTERS_32
                 "}, {%32, %33, %34, %35}, %36, add, 1, 1;\n}"
                 : HOPPER_F32(x, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
HOPPER_FN void hopper_product_eight_from(float (&x)[64], const uint32_t *a, uint64_t b)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" HOPPER_EIGHT("128") HOPPER_REGISTERS_64
                 "}, {%64, %65, %66, %67}, %68, add, 1, 1;\n}"
                 : HOPPER_F32(x, 0), HOPPER_F32(x, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
/* four numbers in one register, the first in the lowest byte; above 448: 448 */
HOPPER_FN uint32_t hopper_pack_eight(float a, float b, float c, float d)
{
    uint32_t x;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(x)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return x;
}

/* ---- the host's side ---- */

/* Memory beside tensors while a call runs (explain() states the same, lua/lacuna/attention/module.lua). q and k are
 * rounded row by row, `wide` bytes each; values lie as items of [head_dim, keys], `items` for each batch item, segment
 * and branch: `share` neighbouring heads have one, from number `first` on. Offsets are bytes. */
struct hopper_eight_space {
    int64_t wide, q, k, bytes;
    struct {
        int64_t at, keys, first, items, share;
    } v[LAC_MAX_BRANCHES];
};
inline int64_t hopper_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline void hopper_eight_place(const lac_plan *p, hopper_eight_space *x)
{
    const lac_attn_desc *d = &p->desc;
    x->wide = hopper_up(d->head_dim, 16);
    x->q = hopper_up(2 * d->batch * (d->heads + 2 * d->kv_heads) * 4, 256); /* maxima and scales */
    x->k = x->q + hopper_up(d->batch * d->n * d->heads * x->wide, 256);
    x->bytes = x->k + hopper_up(d->batch * d->m * d->kv_heads * x->wide, 256);
    for (int g = 0; g < d->branches; g++) {
        int64_t first = 0, last = 0, most = p->segment[g] < d->m ? p->segment[g] : d->m;
        lac_plan_segments(p, g, &first, &last);
        const bool one = d->dilation[g] == 1 || d->offset_rule == LAC_OFFSET_BRANCH; /* lattice for all heads */
        x->v[g].at = x->bytes;
        x->v[g].keys = hopper_up((most - 1) / d->dilation[g] + 1, 16);
        x->v[g].share = one ? d->heads / d->kv_heads : 1;
        x->v[g].first = p->head0[g] / x->v[g].share;
        x->v[g].items = p->heads[g] ? (p->head0[g] + p->heads[g] - 1) / x->v[g].share - x->v[g].first + 1 : 0;
        x->bytes +=
            hopper_up(d->batch * (last > first ? last - first : 0) * x->v[g].items * d->head_dim * x->v[g].keys, 256);
    }
}

/* NULL, or why a call with fp8 cannot run */
const char *attn_hopper_fp8_fits(const lac_a_attend *f);
/* the forward; space: memory, hopper_eight_place() */
int attn_hopper_fp8(attn_pair_args &a, const lac_a_attend *f, bool gaps, char *space);

#endif
