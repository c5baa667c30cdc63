/* linear.c: linear layers with their activation, and the gradients of weight and bias, on the CPU.
 *
 * The operators in turn. Applying gelu while a tile of the product is in the cache was measured: 1.0 ns an element from
 * memory as from cache, because it is bound by arithmetic (lua/lacuna/nn/longnet.lua).
 */
#include "cpu.h"

static lac_view turned(lac_view v)
{
    int64_t rows = v.shape[0], step = v.stride[0];
    v.shape[0] = v.shape[1], v.stride[0] = v.stride[1];
    v.shape[1] = rows, v.stride[1] = step;
    return v;
}

int LAC_CPU(column_sums)(const lac_view *x, const lac_view *out)
{
    lac_a_reduce sum = {.fn = LAC_SUM, .x = *x, .out = *x, .dims = (1u << (x->ndim - 1)) - 1};
    if (!out->data) return 0;
    sum.out.data = out->data;
    for (int d = 0; d < x->ndim; d++) {
        sum.out.stride[d] = out->shape[0];
        if (d < x->ndim - 1) sum.out.shape[d] = 1;
    }
    sum.out.stride[x->ndim - 1] = 1;
    return LAC_CPU(reduce)(&sum);
}

int LAC_CPU(linear_act)(const lac_a_linear_act *a)
{
    lac_a_matmul m = {.a = a->x, .b = turned(a->w), .bias = a->bias, .out = a->pre.data ? a->pre : a->out};
    lac_a_map1 f = {.fn = a->fn, .x = m.out, .out = a->out};
    LAC_TRY(LAC_CPU(matmul)(&m));
    return LAC_CPU(map1)(&f);
}

int LAC_CPU(linear_act_bwd)(const lac_a_linear_act_bwd *a)
{
    lac_a_matmul m = {.a = a->g, .b = a->w, .out = a->out};
    lac_a_map1_bwd f = {.fn = a->fn, .x = a->pre, .y = a->pre, .g = a->out, .out = a->out};
    lac_a_map1 again = {.fn = a->fn, .x = a->pre, .out = a->act};
    LAC_TRY(LAC_CPU(matmul)(&m));
    LAC_TRY(LAC_CPU(map1_bwd)(&f));
    if (a->act.data) LAC_TRY(LAC_CPU(map1)(&again));
    return LAC_CPU(column_sums)(&a->out, &a->sums);
}

int LAC_CPU(weight_grad)(const lac_a_weight_grad *a)
{
    lac_a_matmul m = {.a = turned(a->g), .b = a->x, .out = a->dw};
    LAC_TRY(LAC_CPU(matmul)(&m));
    return LAC_CPU(column_sums)(&a->g, &a->sums);
}
