/* linear.cu: what a linear layer does beside its product, inside the product, on CUDA.
 *
 * cuBLASLt adds the bias, keeps what goes into the activation and applies it while the result is in registers
 * (linear_act); on the way back it multiplies the gradient by the activation's derivative there and adds up its columns
 * (linear_act_bwd). Its activation is gelu_tanh, to 1e-5, which is good for half types only. What it has no kernel for
 * - gelu by the error function, f32 and f64, widths that are no whole vectors - runs as the operators in turn; the
 * numbers differ by rounding only, because in turn what goes into the activation is rounded before. Rejected: its
 * epilogue for the gradient of a bias beside the weight's. Of 32,768 positions on an H200 it took 88, 279 and 250 us
 * for weights of 768 x 768, 3,072 x 768 and 768 x 3,072, the product and the sum apart 73, 249 and 229.
 */
#include "gemm.cuh"
#include "sum.cuh"

enum {
#define MAP1(name, domain, value, gradient) M1_##name,
#include "maps.def"
};

static bool dense(const lac_view *v) { return view_contiguous(v) && (uintptr_t)v->data % 16 == 0; }

/* a product of whole dense matrices: C [m, n] = A B, either transposed as stored */
static lac_cuda_gemm_args product(const lac_view *a, bool a_transposed, const lac_view *b, bool b_transposed,
                                  const lac_view *c)
{
    lac_cuda_gemm_args g = {};
    g.m = c->shape[0], g.n = c->shape[1], g.k = a->shape[a_transposed ? 0 : 1], g.batch = 1;
    g.a = a->data, g.b = b->data, g.c = c->data;
    g.dtype = g.c_dtype = c->dtype;
    g.a_transposed = a_transposed, g.b_transposed = b_transposed;
    g.lda = a->shape[1], g.ldb = b->shape[1], g.ldc = g.n;
    return g;
}

/* has cuBLASLt an epilogue for these (dense, with rows of whole vectors)? absent ones fit */
static bool fits(const lac_view *const *list, int count)
{
    for (int i = 0; i < count; i++) {
        const lac_view *v = list[i];
        if (!v->data) continue;
        if (v->dtype == LAC_F64 || !dense(v) || v->shape[v->ndim - 1] % (16 / dtype_bytes(v->dtype)) != 0) return false;
        if (v->shape[0] == 0 || v->shape[v->ndim - 1] == 0) return false;
    }
    return true;
}

static lac_view turned(lac_view v)
{
    int64_t rows = v.shape[0], step = v.stride[0];
    v.shape[0] = v.shape[1], v.stride[0] = v.stride[1];
    v.shape[1] = rows, v.stride[1] = step;
    return v;
}

int lac_cuda_column_sums(const lac_view *x, const lac_view *out)
{
    lac_a_reduce sum = {};
    if (!out->data) return 0;
    sum.fn = LAC_SUM, sum.x = sum.out = *x, sum.dims = (1u << (x->ndim - 1)) - 1;
    sum.out.data = out->data;
    for (int d = 0; d < x->ndim; d++) {
        sum.out.stride[d] = out->shape[0];
        if (d < x->ndim - 1) sum.out.shape[d] = 1;
    }
    sum.out.stride[x->ndim - 1] = 1;
    return lac_cuda_reduce(&sum);
}

extern "C" int lac_cuda_linear_act(const lac_a_linear_act *a)
{
    const lac_view *list[] = {&a->x, &a->w, &a->bias, &a->pre, &a->out};
    if (a->fn == M1_gelu_tanh && dtype_bytes(a->x.dtype) == 2 && fits(list, 5)) {
        lac_cuda_gemm_args g = product(&a->x, false, &a->w, true, &a->out);
        g.bias = a->bias.data;
        g.aux = a->pre.data;
        g.epilogue = GEMM_GELU;
        int status = lac_cuda_gemm("linear_act", &g);
        if (status != GEMM_UNKNOWN) return status;
    }
    lac_a_matmul m = {a->x, turned(a->w), a->bias, a->pre.data ? a->pre : a->out};
    lac_a_map1 f = {a->fn, m.out, a->out};
    LAC_TRY(lac_cuda_matmul(&m));
    return lac_cuda_map1(&f);
}

extern "C" int lac_cuda_linear_act_bwd(const lac_a_linear_act_bwd *a)
{
    const lac_view *list[] = {&a->g, &a->w, &a->pre, &a->out, &a->sums};
    if (a->fn == M1_gelu_tanh && dtype_bytes(a->g.dtype) == 2 && fits(list, 5)) {
        lac_cuda_gemm_args g = product(&a->g, false, &a->w, false, &a->out);
        g.aux = a->pre.data;
        g.sums = a->sums.data;
        g.epilogue = GEMM_GELU_GRADIENT;
        int status = lac_cuda_gemm("linear_act_bwd", &g);
        if (status != GEMM_UNKNOWN) return status;
    }
    lac_a_matmul m = {a->g, a->w, {}, a->out};
    lac_a_map1_bwd f = {a->fn, a->pre, a->pre, a->out, a->out};
    LAC_TRY(lac_cuda_matmul(&m));
    LAC_TRY(lac_cuda_map1_bwd(&f));
    return lac_cuda_column_sums(&a->out, &a->sums);
}

extern "C" int lac_cuda_weight_grad(const lac_a_weight_grad *a)
{
    lac_a_matmul m = {turned(a->g), a->x, {}, a->dw};
    LAC_TRY(lac_cuda_matmul(&m));
    return lac_cuda_column_sums(&a->g, &a->sums);
}
