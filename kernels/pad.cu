/* pad.cu: padding and its gradient on CUDA.
 *
 * Forward, an element of the result asks each axis where it comes from (the rule of c/cpu/pad.c). The gradient goes the
 * other way round: an element of x lists, axis by axis and in ascending order, the places where it was put, and sums
 * over their combinations in double. So it writes once, without atomics, and its order is the CPU's.
 */
#include "lists.cuh"

struct pad_args {
    int ndim, mode, dtype, bytes;
    int64_t size[LAC_MAX_DIMS], padded[LAC_MAX_DIMS], before[LAC_MAX_DIMS]; /* of x, of the result */
    int64_t stride[LAC_MAX_DIMS];                                           /* of what is read */
    int64_t total;                                                          /* elements of what is written */
    uint64_t value;                                                         /* bits of the constant */
};

/* the source of position i of axis d; -1: the constant */
static __device__ __forceinline__ int64_t source_of(const pad_args &a, int d, int64_t i)
{
    int64_t n = a.size[d], p = i - a.before[d];
    if (p >= 0 && p < n) return p;
    if (a.mode == LAC_PAD_CONSTANT) return -1;
    if (a.mode == LAC_PAD_REFLECT) return p < 0 ? -p : 2 * (n - 1) - p;
    if (a.mode == LAC_PAD_REPLICATE) return p < 0 ? 0 : n - 1;
    return (p % n + n) % n;
}

__global__ void __launch_bounds__(THREADS) pad_kernel(pad_args a, const char *x, char *out)
{
    EACH(t, a.total)
    {
        int64_t rest = t, at = 0;
        bool inside = true;
        for (int d = a.ndim - 1; d >= 0; d--) {
            int64_t q = rest / a.padded[d], p = source_of(a, d, rest - q * a.padded[d]);
            rest = q;
            inside = inside && p >= 0;
            at += p * a.stride[d];
        }
        char *to = out + t * a.bytes;
        const char *from = inside ? x + at * a.bytes : (const char *)&a.value;
        if (a.bytes == 8) *(uint64_t *)to = *(const uint64_t *)from;
        else if (a.bytes == 4) *(uint32_t *)to = *(const uint32_t *)from;
        else if (a.bytes == 2) *(uint16_t *)to = *(const uint16_t *)from;
        else *to = *from;
    }
}

/* The first place at or after i where position p of axis d was put; a.padded[d] if there is none. */
static __device__ __forceinline__ int64_t place_from(const pad_args &a, int d, int64_t p, int64_t i)
{
    int64_t n = a.size[d], m = a.padded[d], own = p + a.before[d], none = m;
    if (a.mode == LAC_PAD_CIRCULAR) {
        int64_t first = (own % n + n) % n; /* own modulo n */
        if (i > first) first += (i - first + n - 1) / n * n;
        return first < m ? first : none;
    }
    if (a.mode == LAC_PAD_REPLICATE) {
        int64_t low = p == 0 ? 0 : own, high = p == n - 1 ? m - 1 : own;
        if (p == 0 && own < 0 && n > 1) return none; /* cropped, and what is left of the axis shows others */
        if (p == n - 1 && own >= m && n > 1) return none;
        low = low < 0 ? 0 : low;
        i = i < low ? low : i;
        return i <= high && i < m ? i : none;
    }
    int64_t best = none;
    auto offer = [&](int64_t at) {
        if (at >= i && at >= 0 && at < best) best = at;
    };
    offer(own);
    if (a.mode == LAC_PAD_REFLECT) {
        if (p > 0) offer(a.before[d] - p);
        if (p < n - 1) offer(2 * (n - 1) - p + a.before[d]);
    }
    return best;
}

__global__ void __launch_bounds__(THREADS) pad_bwd_kernel(pad_args a, const char *g, char *out)
{
    EACH(t, a.total)
    {
        int64_t position[LAC_MAX_DIMS], place[LAC_MAX_DIMS], rest = t;
        bool any = true;
        double sum = 0;
        for (int d = a.ndim - 1; d >= 0; d--) {
            int64_t q = rest / a.size[d];
            position[d] = rest - q * a.size[d];
            rest = q;
            place[d] = place_from(a, d, position[d], 0);
            any = any && place[d] < a.padded[d];
        }
        while (any) { /* every combination, the last axis fastest */
            int64_t at = 0;
            int d = a.ndim - 1;
            for (int k = 0; k < a.ndim; k++) at += place[k] * a.stride[k];
            sum += load_double(a.dtype, g + at * a.bytes);
            for (; d >= 0; d--) {
                place[d] = place_from(a, d, position[d], place[d] + 1);
                if (place[d] < a.padded[d]) break;
                place[d] = place_from(a, d, position[d], 0);
            }
            any = d >= 0;
        }
        store_double(a.dtype, out + t * a.bytes, sum);
    }
}

static pad_args pad_make(const lac_view *x, const lac_view *padded, const lac_view *read, const lac_view *written,
                         const int64_t *before, int mode)
{
    pad_args a = {x->ndim, mode, x->dtype, (int)dtype_bytes(x->dtype)};
    for (int d = 0; d < x->ndim; d++) {
        a.size[d] = x->shape[d];
        a.padded[d] = padded->shape[d];
        a.before[d] = before[d];
        a.stride[d] = read->stride[d];
    }
    a.total = numel(written);
    return a;
}

/* `value` as an element of a dtype */
static uint64_t bits_of_value(int dtype, double value)
{
    uint64_t bits = 0;
    float f = (float)value;
    int64_t i = dtype >= LAC_I64 ? (int64_t)value : 0;
    if (dtype == LAC_F64) memcpy(&bits, &value, 8);
    else if (dtype == LAC_F32) memcpy(&bits, &f, 4);
    else if (dtype == LAC_F16) {
        f16 h = __double2half(value);
        memcpy(&bits, &h, 2);
    } else if (dtype == LAC_BF16) {
        bf16 h = __double2bfloat16(value);
        memcpy(&bits, &h, 2);
    } else memcpy(&bits, &i, 8); /* little-endian: the low bytes are the narrower integer */
    return bits;
}

extern "C" int lac_cuda_pad(const lac_a_pad *a)
{
    pad_args p = pad_make(&a->x, &a->out, &a->x, &a->out, a->before, a->mode);
    if (p.total == 0) return 0;
    p.value = bits_of_value(a->x.dtype, a->mode == LAC_PAD_CONSTANT ? a->value : 0);
    each(pad_kernel, p.total, p, (const char *)a->x.data, (char *)a->out.data);
    return lac_cuda_launched("pad");
}

extern "C" int lac_cuda_pad_bwd(const lac_a_pad_bwd *a)
{
    pad_args p = pad_make(&a->out, &a->g, &a->g, &a->out, a->before, a->mode);
    if (p.total == 0) return 0;
    each(pad_bwd_kernel, p.total, p, (const char *)a->g.data, (char *)a->out.data);
    return lac_cuda_launched("pad_bwd");
}
