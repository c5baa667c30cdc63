/* op_pad.c: front ends of padding and its gradient.
 *
 * Per axis, before and after say how many elements come in front and behind; negative numbers crop. One rule serves all
 * modes: position i of the result is position i - before of x, and where that lies outside of x the mode says what
 * stands there. So a roll is circular padding by (s, -s), and tiling is circular padding by a multiple of the size:
 * neither needs a kernel. Reflection is limited to size - 1 on each side, where it is defined by one mirror; what wraps
 * or mirrors needs an element to take. The gradient has the same arguments: each element of x gets the sum over the
 * places where it was put.
 */
#include "op_front.h"

static int check_axis(const char *op, int mode, int d, int64_t size, int64_t before, int64_t after)
{
    if (mode == LAC_PAD_CONSTANT || (before <= 0 && after <= 0)) return 0;
    if (size == 0) LAC_FAIL(SHAPE, "%s: dimension %d has no elements to pad with", op, d + 1);
    if (mode == LAC_PAD_REFLECT && (before >= size || after >= size))
        LAC_FAIL(ARGUMENT, "%s: reflection adds at most %lld elements in dimension %d of size %lld, got %lld and %lld",
                 op, (long long)(size - 1), d + 1, (long long)size, (long long)before, (long long)after);
    return 0;
}

static int check_mode(const char *op, int mode)
{
    if (mode >= 0 && mode < LAC_PADS) return 0;
    LAC_FAIL(ARGUMENT, "%s: unknown mode %d (0 constant, 1 reflect, 2 replicate, 3 circular)", op, mode);
}

int lac_pad(const lac_tensor *x, const int64_t *before, const int64_t *after, int mode, double value, lac_tensor *out)
{
    lac_a_pad a = {.mode = mode, .value = value};
    int64_t shape[LAC_MAX_DIMS];
    LAC_OUT("pad", "out", out);
    LAC_TRY(lac_view_get("pad", "x", x, &a.x));
    LAC_TRY(check_mode("pad", mode));
    if (mode == LAC_PAD_CONSTANT) LAC_TRY(lac_front_scalar("pad", "value", x, value));
    for (int d = 0; d < x->ndim; d++) {
        int64_t grown;
        if (__builtin_add_overflow(x->shape[d], before[d], &grown) ||
            __builtin_add_overflow(grown, after[d], &shape[d]) || shape[d] < 0)
            LAC_FAIL(SHAPE, "pad: %lld and %lld crop more than the %lld elements of dimension %d, or overflow",
                     (long long)before[d], (long long)after[d], (long long)x->shape[d], d + 1);
        LAC_TRY(check_axis("pad", mode, d, x->shape[d], before[d], after[d]));
        a.before[d] = before[d];
    }
    LAC_TRY(lac_tensor_new("pad", x->dtype, x->device, x->ndim, shape, out, &a.out));
    LAC_RUN_OUT(pad, x->device, &a, out);
    return 0;
}

int lac_pad_bwd(const lac_tensor *g, const int64_t *shape, const int64_t *before, int mode, lac_tensor *out)
{
    lac_a_pad_bwd a = {.mode = mode};
    LAC_OUT("pad_bwd", "out", out);
    LAC_TRY(lac_view_get("pad_bwd", "g", g, &a.g));
    LAC_TRY(lac_need_float("pad_bwd", "g", g));
    LAC_TRY(check_mode("pad_bwd", mode));
    for (int d = 0; d < g->ndim; d++) {
        int64_t after;
        if (shape[d] < 0 || __builtin_sub_overflow(g->shape[d], shape[d], &after) ||
            __builtin_sub_overflow(after, before[d], &after))
            LAC_FAIL(SHAPE, "pad_bwd: size %lld and padding %lld do not belong to g %s", (long long)shape[d],
                     (long long)before[d], lac_shape_text(g->shape, g->ndim));
        LAC_TRY(check_axis("pad_bwd", mode, d, shape[d], before[d], after));
        a.before[d] = before[d];
    }
    LAC_TRY(lac_tensor_new("pad_bwd", g->dtype, g->device, g->ndim, shape, out, &a.out));
    LAC_RUN_OUT(pad_bwd, g->device, &a, out);
    return 0;
}
