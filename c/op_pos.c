/* op_pos.c: front end of the rotary positions (RoPE, XPOS).
 *
 * One function serves queries, keys and the gradient of both: `sign` chooses XPOS's growth or decay, `transpose` the
 * adjoint map. The pairing convention is explicit because published weights come in both: interleaved pairs
 * (2i, 2i+1) as in the RoPE paper, or halves (i, i + D/2) as in most ports. base must be above 1, so that frequency 0
 * is the largest; positions may start anywhere, also below 0, within what a double counts exactly.
 */
#include "op_front.h"

int lac_rope(const lac_tensor *x, int64_t start, double base, int interleaved, double scale_base, int sign,
             int transpose, lac_tensor *out)
{
    lac_a_rope a = {.start = start,
                    .base = base,
                    .scale_base = scale_base,
                    .interleaved = interleaved != 0,
                    .transpose = transpose != 0,
                    .sign = sign};
    LAC_OUT("rope", "out", out);
    LAC_TRY(lac_view_get("rope", "x", x, &a.x));
    LAC_TRY(lac_need_float("rope", "x", x));
    if (x->ndim != 4)
        LAC_FAIL(SHAPE, "rope: x must be [batch, positions, heads, width], got %s", lac_shape_text(x->shape, x->ndim));
    if (x->shape[3] % 2)
        LAC_FAIL(SHAPE, "rope: the width of a head must be even, got %lld in x %s", (long long)x->shape[3],
                 lac_shape_text(x->shape, x->ndim));
    if (!(base > 1 && isfinite(base))) LAC_FAIL(ARGUMENT, "rope: base must be finite and above 1, got %g", base);
    if (!(scale_base >= 0 && isfinite(scale_base)))
        LAC_FAIL(ARGUMENT, "rope: scale_base must be finite and positive, or 0 for none, got %g", scale_base);
    if (sign != 1 && sign != -1) LAC_FAIL(ARGUMENT, "rope: sign must be 1 (queries) or -1 (keys), got %d", sign);
    if (start > (INT64_C(1) << 52) || start < -(INT64_C(1) << 52) || x->shape[1] > (INT64_C(1) << 52))
        LAC_FAIL(ARGUMENT, "rope: positions must be below 2^52, got a start of %lld", (long long)start);
    LAC_TRY(lac_tensor_new("rope", x->dtype, x->device, 4, x->shape, out, &a.out));
    LAC_RUN_OUT(rope, x->device, &a, out);
    return 0;
}
