/* linear.cu: what a linear layer does beside its product, inside the product, on CUDA.
 *
 * cuBLASLt adds the bias, keeps what goes into the activation and applies it while the result is in registers
 * (linear_act). Its activation is gelu_tanh, to 1e-5, which is good for half types only. What it has no kernel for -
 * gelu by the error function, f32 and f64, widths that are no whole vectors - runs as the operators in turn; the
 * numbers differ by rounding only, because in turn what goes into the activation is rounded before. On the way back
 * half types have a pass after the product (act_bwd.cu).
 *
 * Rejected: cuBLASLt's epilogues for the backward. Of 32,768 positions, hidden layer 3,072, inputs 768, bf16 on an
 * H200: the product alone 205 us, with the derivative of gelu_tanh 271 at best, with that and sums 849 at best. The
 * gradient of a bias beside the weight's took 88, 279 and 250 us for weights of 768 x 768, 3,072 x 768 and 768 x 3,072,
 * the product and the sum apart 73, 249 and 229.
 */
#include "gemm.cuh"
#include "sum.cuh"

enum {
#define MAP1(name, domain, value, gradient) M1_##name,
#include "maps.def"
};

static bool dense(const lac_view *v) { return view_contiguous(v) && (uintptr_t)v->data % 16 == 0; }

/* out = x w^T, all of them dense */
static lac_cuda_gemm_args product(const lac_view *x, const lac_view *w, const lac_view *out)
{
    lac_cuda_gemm_args g = {};
    g.m = out->shape[0], g.n = out->shape[1], g.k = x->shape[1], g.batch = 1;
    g.a = x->data, g.b = w->data, g.c = out->data;
    g.dtype = g.c_dtype = out->dtype;
    g.b_transposed = true;
    g.lda = x->shape[1], g.ldb = w->shape[1], g.ldc = g.n;
    return g;
}

/* are these dense with rows of whole vectors, as cuBLASLt's epilogues and act_bwd.cu want them? absent ones are */
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
        lac_cuda_gemm_args g = product(&a->x, &a->w, &a->out);
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
    const lac_view *list[] = {&a->pre, &a->out, &a->sums, &a->act};
    lac_a_matmul m = {a->g, a->w, {}, a->out};
    lac_a_map1_bwd f = {a->fn, a->pre, a->pre, a->out, a->out};
    lac_a_map1 again = {a->fn, a->pre, a->act};
    LAC_TRY(lac_cuda_matmul(&m));
    if (dtype_bytes(a->g.dtype) == 2 && fits(list, 4))
        return lac_cuda_act_back(a->fn == M1_gelu_tanh, &a->pre, &a->out, &a->sums, &a->act);
    LAC_TRY(lac_cuda_map1_bwd(&f));
    if (a->act.data) LAC_TRY(lac_cuda_map1(&again));
    return lac_cuda_column_sums(&a->out, &a->sums);
}

extern "C" int lac_cuda_weight_grad(const lac_a_weight_grad *a)
{
    lac_a_matmul m = {turned(a->g), a->x, {}, a->dw};
    LAC_TRY(lac_cuda_matmul(&m));
    return lac_cuda_column_sums(&a->g, &a->sums);
}
