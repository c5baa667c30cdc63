/* op_conv.c: front ends of the one-dimensional convolution and its gradient.
 *
 * x [B, C, N], w [O, C / groups, K], out [B, O, L], torch's layout and sign (a correlation): position l of the result
 * sees x at l stride + k dilation - before, zeros outside. Padding is two numbers, so that "same" with an even kernel
 * and causal convolutions are the same call; groups follow from the sizes, so they cannot disagree with them. The
 * gradient makes what it is asked for: dx and dw are independent, and a model's first layer wants only dw.
 */
#include "op_front.h"

static int weights_get(const char *op, const lac_tensor *x, const lac_tensor *w, lac_view *vx, lac_view *vw)
{
    LAC_TRY(lac_view_get(op, "x", x, vx));
    LAC_TRY(lac_view_get(op, "w", w, vw));
    LAC_TRY(lac_need_float(op, "x", x));
    LAC_TRY(lac_same_dtype(op, "x", x, "w", w));
    LAC_TRY(lac_same_device(op, "x", x, "w", w));
    bool fits = x->ndim == 3 && w->ndim == 3 && w->shape[1] > 0 && w->shape[2] > 0 && x->shape[1] % w->shape[1] == 0;
    int64_t groups = fits ? x->shape[1] / w->shape[1] : 0;
    if (!fits || groups == 0 || w->shape[0] % groups != 0)
        LAC_FAIL(
            SHAPE,
            "%s: x must be [B, C, N] and w [O, C / groups, K] with O a multiple of groups and K at least 1, got x %s "
            "and w %s",
            op, lac_shape_text(x->shape, x->ndim), lac_shape_text(w->shape, w->ndim));
    return 0;
}

/* L, the number of positions of the result */
static int length_get(const char *op, const lac_tensor *x, const lac_tensor *w, int64_t stride, int64_t dilation,
                      int64_t before, int64_t after, int64_t *length)
{
    const int64_t most = INT64_C(1) << 40;
    if (stride < 1 || dilation < 1 || stride > most || dilation > most)
        LAC_FAIL(ARGUMENT, "%s: stride and dilation must be at least 1, got %lld and %lld", op, (long long)stride,
                 (long long)dilation);
    if (before < 0 || after < 0 || before > most || after > most || w->shape[2] > 1 << 20 || x->shape[2] > most)
        LAC_FAIL(ARGUMENT, "%s: padding must not be negative, got %lld and %lld", op, (long long)before,
                 (long long)after);
    int64_t span = dilation * (w->shape[2] - 1) + 1, padded = x->shape[2] + before + after;
    if (padded < span)
        LAC_FAIL(SHAPE, "%s: a kernel that spans %lld positions does not fit into %lld (N %lld, padding %lld and %lld)",
                 op, (long long)span, (long long)padded, (long long)x->shape[2], (long long)before, (long long)after);
    *length = (padded - span) / stride + 1;
    return 0;
}

int lac_conv1d(const lac_tensor *x, const lac_tensor *w, const lac_tensor *bias, int64_t stride, int64_t dilation,
               int64_t before, int64_t after, lac_tensor *out)
{
    const char *op = "conv1d";
    lac_a_conv1d a = {.stride = stride, .dilation = dilation, .before = before};
    int64_t length;
    LAC_OUT(op, "out", out);
    LAC_TRY(weights_get(op, x, w, &a.x, &a.w));
    LAC_TRY(length_get(op, x, w, stride, dilation, before, after, &length));
    a.bias.data = NULL;
    if (bias) LAC_TRY(lac_front_bias(op, x, w, bias, &a.bias));
    int64_t shape[] = {x->shape[0], w->shape[0], length};
    LAC_TRY(lac_tensor_new(op, x->dtype, x->device, 3, shape, out, &a.out));
    LAC_RUN_OUT(conv1d, x->device, &a, out);
    return 0;
}

int lac_conv1d_bwd(const lac_tensor *x, const lac_tensor *w, const lac_tensor *g, int64_t stride, int64_t dilation,
                   int64_t before, lac_tensor *dx, lac_tensor *dw)
{
    const char *op = "conv1d_bwd";
    lac_a_conv1d_bwd a = {.stride = stride, .dilation = dilation, .before = before};
    int64_t length;
    if (dx) dx->storage = NULL;
    if (dw) dw->storage = NULL;
    LAC_TRY(weights_get(op, x, w, &a.x, &a.w));
    LAC_TRY(lac_view_get(op, "g", g, &a.g));
    LAC_TRY(lac_same_dtype(op, "x", x, "g", g));
    LAC_TRY(lac_same_device(op, "x", x, "g", g));
    if (g->ndim != 3 || g->shape[0] != x->shape[0] || g->shape[1] != w->shape[0] || g->shape[2] < 1 ||
        g->shape[2] > INT64_C(1) << 40)
        LAC_FAIL(SHAPE, "%s: g must be [%lld, %lld, L], got %s", op, (long long)x->shape[0], (long long)w->shape[0],
                 lac_shape_text(g->shape, g->ndim));
    /* whatever padding stands behind: at least none, at most what g's length needs */
    int64_t span =
        (g->shape[2] - 1) * (stride > 0 ? stride : 1) + (w->shape[2] - 1) * (dilation > 0 ? dilation : 1) + 1;
    int64_t after = span - x->shape[2] - before;
    LAC_TRY(length_get(op, x, w, stride, dilation, before, after > 0 ? after : 0, &length));
    if (length != g->shape[2])
        LAC_FAIL(SHAPE, "%s: g has %lld positions, the convolution %lld", op, (long long)g->shape[2],
                 (long long)length);
    a.dx.data = a.dw.data = NULL;
    if (dx) LAC_TRY(lac_tensor_new(op, x->dtype, x->device, 3, x->shape, dx, &a.dx));
    if (dw) LAC_TRY_OUT(lac_tensor_new(op, w->dtype, w->device, 3, w->shape, dw, &a.dw), dx);
    LAC_RUN_OUT(conv1d_bwd, x->device, &a, dx, dw);
    return 0;
}
