/* op_fp8.c: attention of q, k and v that are rounded to eight bits (e4m3), a scale for each head of each batch item.
 *
 * On a GPU the back end rounds to the same bits and multiplies them, as far as it can (kernels/attn_hopper_fp8.cu). On
 * the CPU the option is a definition, not a gain: inputs are rounded by the slot e4m3 into f32 tensors of what the
 * eight bits stand for, the ordinary kernels attend to them, and the result is rounded to q's dtype. Scores, weights
 * and sums are f32. So everything that attention has (masks, bias, dropout, packed sequences, any head dimension) works
 * with it, and a device's kernels have something to be compared with. Packed sequences have scales of their own, as
 * every call has.
 *
 * Scales are of all rows of a head, whether a branch keeps them or not: who pads rows pads them with small numbers.
 * Rejected: one scale for a tensor (heads differ by orders of magnitude); a scale for each segment, which rows of
 * several branches would need once for each; scales from the caller, which go wrong in silence.
 */
#include "op_attn.h"

enum { PARTS = 4 }; /* q, k, v, out */

int lac_fp8_check(const lac_attn_args *args)
{
    if (args->q->dtype == LAC_F64)
        LAC_FAIL(DTYPE, "attention: fp8 takes f32, f16 or bf16, q is %s; convert it first", lac_describe(args->q));
    return 0;
}

static int rounded(const lac_view *x, int device, lac_tensor *made, lac_view *values)
{
    lac_a_e4m3 a = {.x = *x};
    lac_tensor scale = {0};
    const int64_t heads[] = {x->shape[0], x->shape[2]};
    LAC_TRY(lac_tensor_new("attention", LAC_F32, device, 4, x->shape, made, &a.values));
    LAC_TRY(lac_tensor_new("attention", LAC_F32, device, 2, heads, &scale, &a.scale));
    int status;
    LAC_SLOT(status, e4m3, device, &a);
    lac_tensor_drop(&scale);
    *values = a.values;
    return status;
}

static int attend(const lac_a_attend *a, int device, lac_tensor *made)
{
    lac_a_attend b = *a;
    LAC_TRY(rounded(&a->q, device, &made[0], &b.q));
    LAC_TRY(rounded(&a->k, device, &made[1], &b.k));
    LAC_TRY(rounded(&a->v, device, &made[2], &b.v));
    if (a->out.dtype != LAC_F32)
        LAC_TRY(lac_tensor_new("attention", LAC_F32, device, 4, a->out.shape, &made[3], &b.out));
    LAC_RUN(attend, device, &b);
    if (a->out.dtype != LAC_F32) LAC_RUN(copy, device, (&(lac_a_copy){.x = b.out, .out = a->out}));
    return 0;
}

int lac_fp8_attend(const lac_a_attend *a, int device)
{
    if (!a->fp8 || device >= LAC_CUDA) { /* there the back end rounds */
        LAC_RUN(attend, device, a);
        return 0;
    }
    lac_tensor made[PARTS] = {{0}};
    const int status = attend(a, device, made);
    for (int i = 0; i < PARTS; i++) lac_tensor_drop(&made[i]);
    return status;
}
