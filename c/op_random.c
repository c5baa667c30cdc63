/* op_random.c: front ends of the random numbers.
 *
 * The caller owns the stream: every call gets a seed and an offset, and the pair, the element's position and nothing
 * else decides the value (rng.h). So the same call gives the same numbers for any number of threads, and dropout needs
 * no stored mask: the backward is the same call on the gradient. The Lua layer advances the offset by one per call.
 * Parameters are checked here, among them the representable range of the destination's dtype; what a uniform draw may
 * become after rounding is bounded in the back end by lac_rng_below, so the upper end is never returned.
 */
#include "op_front.h"

/* bounds that the dtype cannot hold would turn into infinities */
static int check_range(const lac_tensor *dst, double a, double b)
{
    static const double most[] = {1.7976931348623157e308, 3.4028234663852886e38, 65504.0, 3.3895313892515355e38};
    if (fabs(a) <= most[dst->dtype] && fabs(b) <= most[dst->dtype]) return 0;
    LAC_FAIL(ARGUMENT, "random: the bounds %g and %g are outside the range of %s", a, b, lac_dtype_name(dst->dtype));
}

static int check_parameters(const lac_tensor *dst, int kind, double a, double b)
{
    switch (kind) {
    case LAC_UNIFORM:
        LAC_TRY(lac_need_float("random: uniform", "dst", dst));
        if (!isfinite(a) || !isfinite(b) || !(a < b) || !isfinite(b - a))
            LAC_FAIL(ARGUMENT, "random: uniform needs finite bounds a < b, got a = %g, b = %g", a, b);
        return check_range(dst, a, b);
    case LAC_NORMAL:
        LAC_TRY(lac_need_float("random: normal", "dst", dst));
        if (!isfinite(a) || !isfinite(b) || b < 0)
            LAC_FAIL(ARGUMENT, "random: normal needs a finite mean and a deviation >= 0, got %g and %g", a, b);
        return 0;
    case LAC_BERNOULLI:
        if (!(a >= 0 && a <= 1)) LAC_FAIL(ARGUMENT, "random: the probability must be in [0, 1], got %g", a);
        return 0;
    case LAC_INTEGER:
        if (!(a >= -0x1p63 && b <= 0x1p63 && a < b && a == floor(a) && b == floor(b)))
            LAC_FAIL(ARGUMENT, "random: integers need whole bounds a < b within 64 bits, got a = %g, b = %g", a, b);
        if (b >= 0x1p63) LAC_FAIL(ARGUMENT, "random: the upper bound of integers must be below 2^63, got %g", b);
        LAC_TRY(lac_front_scalar("random", "the lower bound", dst, a));
        return lac_front_scalar("random", "the largest value", dst, b - 1);
    default:
        LAC_FAIL(ARGUMENT, "random: unknown kind %d (0 uniform, 1 normal, 2 bernoulli, 3 integer)", kind);
    }
}

int lac_random(lac_tensor *dst, int kind, double a, double b, uint64_t seed, uint64_t offset)
{
    lac_a_random args = {.kind = kind, .a = a, .b = b, .seed = seed, .offset = offset};
    LAC_TRY(lac_view_get("random", "dst", dst, &args.out));
    LAC_TRY(check_parameters(dst, kind, a, b));
    LAC_TRY(lac_front_writable("random", "dst", dst, &args.out));
    LAC_RUN(random, dst->device, &args);
    return 0;
}

int lac_dropout(const lac_tensor *x, double p, uint64_t seed, uint64_t offset, lac_tensor *out)
{
    lac_a_dropout a = {.p = p, .seed = seed, .offset = offset};
    LAC_OUT("dropout", "out", out);
    LAC_TRY(lac_view_get("dropout", "x", x, &a.x));
    LAC_TRY(lac_need_float("dropout", "x", x));
    if (!(p >= 0 && p < 1)) LAC_FAIL(ARGUMENT, "dropout: the probability must be in [0, 1), got %g", p);
    LAC_TRY(lac_tensor_new("dropout", x->dtype, x->device, x->ndim, x->shape, out, &a.out));
    LAC_RUN_OUT(dropout, x->device, &a, out);
    return 0;
}

int lac_multinomial(const lac_tensor *weights, int64_t samples, int replacement, uint64_t seed, uint64_t offset,
                    lac_tensor *out)
{
    const char *op = "multinomial";
    lac_a_multinomial a = {.replacement = replacement != 0, .seed = seed, .offset = offset};
    LAC_OUT(op, "out", out);
    LAC_TRY(lac_view_get(op, "weights", weights, &a.weights));
    LAC_TRY(lac_need_float(op, "weights", weights));
    if (weights->ndim < 1 || weights->ndim > 2 || weights->shape[weights->ndim - 1] < 1)
        LAC_FAIL(SHAPE, "%s: weights must be [N] or [R, N] with N at least 1, got %s", op,
                 lac_shape_text(weights->shape, weights->ndim));
    int64_t n = weights->shape[weights->ndim - 1];
    if (samples < 0 || (!replacement && samples > n))
        LAC_FAIL(ARGUMENT, "%s: cannot draw %lld samples of %lld elements %s replacement", op, (long long)samples,
                 (long long)n, replacement ? "with" : "without");
    int64_t shape[2] = {weights->shape[0], samples};
    LAC_TRY(lac_tensor_new(op, LAC_I64, weights->device, weights->ndim, weights->ndim == 1 ? shape + 1 : shape, out,
                           &a.out));
    LAC_RUN_OUT(multinomial, weights->device, &a, out);
    return 0;
}
