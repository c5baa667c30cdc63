/* op_pos.c: front end of the rotary positions (RoPE, XPOS).
 *
 * One function serves queries, keys and the gradient of both: `sign` chooses XPOS's growth or decay, `transpose` the
 * adjoint map. The pairing convention is explicit because published weights come in both: interleaved pairs
 * (2i, 2i+1) as in the RoPE paper, or halves (i, i + D/2) as in most ports. base must be above 1, so that frequency 0
 * is the largest; positions may start anywhere, also below 0, within what a double counts exactly. A tensor of
 * positions serves packed sequences and batches whose rows stand at different places (decoding).
 */
#include "op_front.h"

/* [N], or [B, N] */
static int positions_get(const lac_tensor *t, const lac_tensor *x, lac_view *v)
{
    v->data = NULL;
    if (!t) return 0;
    LAC_TRY(lac_view_get("rope", "positions", t, v));
    LAC_TRY(lac_front_integer_index("rope", "positions", t));
    LAC_TRY(lac_same_device("rope", "x", x, "positions", t));
    bool one = t->ndim == 1 && t->shape[0] == x->shape[1];
    if (one || (t->ndim == 2 && t->shape[0] == x->shape[0] && t->shape[1] == x->shape[1])) return 0;
    LAC_FAIL(SHAPE, "rope: positions must be [%lld] or [%lld, %lld] for x %s, got %s", (long long)x->shape[1],
             (long long)x->shape[0], (long long)x->shape[1], lac_shape_text(x->shape, x->ndim),
             lac_shape_text(t->shape, t->ndim));
}

int lac_rope(const lac_tensor *x, const lac_tensor *positions, int64_t start, double base, int interleaved,
             double scale_base, int sign, int transpose, lac_tensor *out)
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
    LAC_TRY(positions_get(positions, x, &a.positions));
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
