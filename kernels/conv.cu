/* conv.cu: one-dimensional convolution and its gradients on CUDA, by the definition.
 *
 * A thread sums one element of the result, or of dx, over channels and taps; a block sums one weight's gradient over
 * the batch and the positions, in a fixed order. All in double, rounded once. That is the right shape for the short
 * depthwise convolutions of sequence models, where a tap is a multiply-add per byte; a convolution of hundreds of
 * channels wants products on tensor cores over unfolded windows, which a script can ask for (unfold and matmul).
 */
#include "lists.cuh"

struct conv_args {
    int64_t batch, groups, in, out, k;             /* in, out: channels of a group */
    int64_t n, l, stride, dilation, before, total; /* total: things to compute */
    int64_t x[3], w[3], g[3], bias_stride;         /* strides; g: of the gradient of the result */
    int dtype, bytes;
};

static __device__ __forceinline__ double conv_at(const conv_args &a, const char *p, int64_t at)
{
    return load_double(a.dtype, p + at * a.bytes);
}

__global__ void __launch_bounds__(THREADS)
    conv_kernel(conv_args a, const char *x, const char *w, const char *bias, char *out)
{
    EACH(t, a.total)
    {
        int64_t l = t % a.l, o = t / a.l % (a.groups * a.out), b = t / a.l / (a.groups * a.out), c0 = o / a.out * a.in;
        double s = bias ? conv_at(a, bias, o * a.bias_stride) : 0;
        for (int64_t c = 0; c < a.in; c++)
            for (int64_t k = 0; k < a.k; k++) {
                int64_t n = l * a.stride + k * a.dilation - a.before;
                if (n >= 0 && n < a.n)
                    s += conv_at(a, x, b * a.x[0] + (c0 + c) * a.x[1] + n * a.x[2]) *
                         conv_at(a, w, o * a.w[0] + c * a.w[1] + k * a.w[2]);
            }
        store_double(a.dtype, out + t * a.bytes, s);
    }
}

__global__ void __launch_bounds__(THREADS) conv_dx_kernel(conv_args a, const char *w, const char *g, char *dx)
{
    EACH(t, a.total)
    {
        int64_t n = t % a.n, channel = t / a.n % (a.groups * a.in), b = t / a.n / (a.groups * a.in);
        int64_t group = channel / a.in, c = channel - group * a.in;
        double s = 0;
        for (int64_t o = group * a.out; o < (group + 1) * a.out; o++)
            for (int64_t k = 0; k < a.k; k++) {
                int64_t at = n + a.before - k * a.dilation, l = at / a.stride;
                if (at >= 0 && l * a.stride == at && l < a.l)
                    s += conv_at(a, g, b * a.g[0] + o * a.g[1] + l * a.g[2]) *
                         conv_at(a, w, o * a.w[0] + c * a.w[1] + k * a.w[2]);
            }
        store_double(a.dtype, dx + t * a.bytes, s);
    }
}

/* a block per weight */
__global__ void __launch_bounds__(THREADS) conv_dw_kernel(conv_args a, const char *x, const char *g, char *dw)
{
    __shared__ double space[THREADS / 32];
    previous_done();
    for (int64_t t = blockIdx.x; t < a.total; t += gridDim.x) {
        int64_t k = t % a.k, c = t / a.k % a.in, o = t / a.k / a.in, channel = o / a.out * a.in + c;
        double s = 0;
        for (int64_t i = threadIdx.x; i < a.batch * a.l; i += THREADS) {
            int64_t b = i / a.l, l = i - b * a.l, n = l * a.stride + k * a.dilation - a.before;
            if (n >= 0 && n < a.n)
                s += conv_at(a, x, b * a.x[0] + channel * a.x[1] + n * a.x[2]) *
                     conv_at(a, g, b * a.g[0] + o * a.g[1] + l * a.g[2]);
        }
        s = block_sum(s, space);
        if (threadIdx.x == 0) store_double(a.dtype, dw + t * a.bytes, s);
    }
}

static conv_args conv_make(const lac_view *x, const lac_view *w, int64_t l, int64_t stride, int64_t dilation,
                           int64_t before)
{
    conv_args a = {};
    a.batch = x->shape[0];
    a.in = w->shape[1];
    a.groups = x->shape[1] / a.in;
    a.out = w->shape[0] / a.groups;
    a.k = w->shape[2];
    a.n = x->shape[2];
    a.l = l;
    a.stride = stride;
    a.dilation = dilation;
    a.before = before;
    for (int d = 0; d < 3; d++) a.x[d] = x->stride[d], a.w[d] = w->stride[d];
    a.dtype = x->dtype;
    a.bytes = (int)dtype_bytes(x->dtype);
    return a;
}

extern "C" int lac_cuda_conv1d(const lac_a_conv1d *a)
{
    conv_args c = conv_make(&a->x, &a->w, a->out.shape[2], a->stride, a->dilation, a->before);
    c.total = numel(&a->out);
    if (c.total == 0) return 0;
    if (a->bias.data) c.bias_stride = a->bias.stride[0];
    each(conv_kernel, c.total, c, (const char *)a->x.data, (const char *)a->w.data, (const char *)a->bias.data,
         (char *)a->out.data);
    return lac_cuda_launched("conv1d");
}

extern "C" int lac_cuda_conv1d_bwd(const lac_a_conv1d_bwd *a)
{
    conv_args c = conv_make(&a->x, &a->w, a->g.shape[2], a->stride, a->dilation, a->before);
    const char *g = (const char *)a->g.data;
    for (int d = 0; d < 3; d++) c.g[d] = a->g.stride[d];
    c.total = a->dx.data ? numel(&a->dx) : 0;
    if (c.total) {
        each(conv_dx_kernel, c.total, c, (const char *)a->w.data, g, (char *)a->dx.data);
        LAC_TRY(lac_cuda_launched("conv1d_bwd"));
    }
    c.total = a->dw.data ? numel(&a->dw) : 0;
    if (c.total == 0) return 0;
    launch(conv_dw_kernel, blocks_filling(c.total, 1, 32), THREADS, 0, c, (const char *)a->x.data, g,
           (char *)a->dw.data);
    return lac_cuda_launched("conv1d_bwd");
}
