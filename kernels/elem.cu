/* elem.cu: elementwise functions of c/maps.def on CUDA, forward; how they run is in elem.cuh, gradients are in
 * elem_bwd.cu.
 *
 * Each family is one switch, written once: select_*(args, visit) calls visit(f) with the function of four compute
 * values that args.fn names. Two files, so that two processors compile them side by side.
 */
#include "elem.cuh"

// clang-format off
SELECT(map1)
#define MAP1(name, domain, value, gradient) CASE(M1_##name, domain, value)
#define CMP1(name, value) CASE(M1_##name, ANY, value)
#define LOGIC1(name, text, value) CASE(M1_##name, BOOL, value)
#define INT1(name, value) CASE(M1_##name, INT, value)
#include "maps.def"
CASE(M1_exp_short, FLOAT, short_exp((float)x))
CASE(M1_sigmoid_short, FLOAT, short_sigmoid((float)x))
CASE(M1_silu_short, FLOAT, x * short_sigmoid((float)x))
CASE(M1_gelu_short, FLOAT, short_gelu((float)x))
SELECT_END

SELECT(map2)
#define MAP2(name, domain, value, d_x, d_y) CASE(M2_##name, domain, value)
#define CMP2(name, value) CASE(M2_##name, ANY, value)
#define LOGIC2(name, text, value) CASE(M2_##name, BOOL, value)
#define INT2(name, value) CASE(M2_##name, INT, value)
#include "maps.def"
SELECT_END

SELECT(mapp)
#define MAPP(name, domain, count, value, gradient) CASE(MP_##name, domain, value)
#include "maps.def"
SELECT_END

SELECT(map3)
#define MAP3(name, value, d_x, d_y, d_z) CASE(M3_##name, FLOAT, value)
#include "maps.def"
SELECT_END

/* 1: dst = alpha x + dst (inputs x, alpha, dst); 0: alpha dst */
SELECT(axpy)
CASE(1, ANY, F_add(F_mul(y, x), z))
CASE(0, ANY, F_mul(y, z))
SELECT_END
// clang-format on

static constexpr quick_entry quick_axpy_list[] = {{1, QUICK_BOTH}};

KERNELS(map1, 1)
KERNELS(map2, 2)
KERNELS(mapp, 1)
KERNELS(map3, 3)
KERNELS(axpy, 3)
QUICK_KERNELS(map1, 1, quick_map1_list)
QUICK_KERNELS(map2, 2, quick_map2_list)
QUICK_KERNELS(axpy, 3, quick_axpy_list)

/* ---- launching ---- */

/* may the dense loop run? fills a.scalar */
static bool dense_fits(const nest &n, const operands &o, dense_args *a)
{
    int64_t size = dtype_bytes(a->dtype), out_size = dtype_bytes(a->out_dtype), per = 16 / size;
    bool fits = a->dtype >= LAC_F32 && a->dtype <= LAC_BF16 && nest_run(n, 0, out_size) != RUN_STRIDED;
    fits = fits && (uintptr_t)n.data[0] % (uintptr_t)(out_size * per) == 0;
    for (int k = 0; k < o.inputs; k++) {
        int kind = k == o.slot ? RUN_SCALAR : nest_run(n, k + 1, size);
        a->scalar[k] = kind == RUN_SCALAR;
        fits = fits && kind != RUN_STRIDED && (a->scalar[k] || (uintptr_t)n.data[k + 1] % 16 == 0);
    }
    return fits;
}

/* are all tensors dense, aligned, and of more than one element? fills a.n and the places: most calls need no nest */
static bool all_plain(const operands &o, dense_args *a)
{
    const lac_view *out = o.view[0];
    bool plain = a->dtype >= LAC_F32 && a->dtype <= LAC_BF16 && view_contiguous(out);
    plain = plain && (uintptr_t)out->data % 16 == 0;
    for (int k = 0; k < o.inputs && plain; k++)
        plain = k == o.slot || (view_contiguous(o.view[k + 1]) && (uintptr_t)o.view[k + 1]->data % 16 == 0);
    if (!plain) return false;
    a->n = 1;
    for (int d = 0; d < out->ndim; d++) a->n *= out->shape[d];
    a->out = (char *)out->data;
    for (int k = 0; k < o.inputs; k++) a->in[k] = (char *)o.view[k + 1]->data, a->scalar[k] = k == o.slot;
    return a->n > 1;
}

static int launch_dense(const char *op, const operands &o, dense_kernel *quick, dense_kernel *dense, dense_args *a)
{
    int64_t vectors = quick ? QUICK_VECTORS : o.inputs > 2 ? 2 : 4; /* dense_vectors */
    int64_t per_turn = THREADS * vectors * (16 / dtype_bytes(a->dtype));
    void *arguments[] = {a};
    const uint32_t bytes = sizeof *a;
    lac_cuda_launch((const void *)(quick ? quick : dense), blocks_for(a->n, per_turn), THREADS, 0, arguments, &bytes,
                    1);
    return lac_cuda_launched(op);
}

int elem_launch(const char *op, const operands &o, int fn, dense_kernel *quick, dense_kernel *dense, map_kernel *floats,
                map_kernel *doubles, map_kernel *integers)
{
    map_args a; /* its nests are large, and mostly not looked at */
    (dense_args &)a = {};
    a.number = o.number;
    for (int i = 0; i < 3; i++) a.constant[i] = o.constant[i];
    a.fn = fn;
    a.dtype = o.view[1]->dtype;
    a.out_dtype = o.view[0]->dtype;
    a.slot = o.slot;
    if (all_plain(o, &a)) return launch_dense(op, o, quick, dense, &a);
    nest n = nest_make(o.inputs + 1, o.view);
    if (n.total == 0) return 0;
    a.n = n.total;
    a.out = n.data[0];
    for (int k = 0; k < o.inputs; k++) a.in[k] = n.data[k + 1];
    if (dense_fits(n, o, &a))
        return launch_dense(op, o, n.total == 1 ? NULL /* one element is a scalar too */ : quick, dense, &a);
    a.small = n.small;
    if (n.small) a.nest_small = nest_32(n);
    else a.nest_large = nest_64(n);
    map_kernel *kernel = a.dtype == LAC_F64 ? doubles : a.dtype <= LAC_BF16 ? floats : integers;
    void *arguments[] = {&a};
    const uint32_t bytes = sizeof a;
    lac_cuda_launch((const void *)kernel, blocks_filling(n.total, 2 * THREADS, 32), THREADS, 0, arguments, &bytes, 1);
    return lac_cuda_launched(op);
}

extern "C" int lac_cuda_map1(const lac_a_map1 *a)
{
    operands o = {{&a->out, &a->x}, 1, -1};
    bool half = a->x.dtype == LAC_F16 || a->x.dtype == LAC_BF16;
    int fn = half ? short_of(a->fn) : a->fn;
    return LAUNCH_ANY("map1", map1, fn, map1_quick(fn, a->x.dtype), o);
}

/* the view that stands in for a number is x's; it is never read */
extern "C" int lac_cuda_map2(const lac_a_map2 *a)
{
    bool number = !a->y.data;
    const lac_view *x = &a->x, *y = number ? &a->x : &a->y;
    operands o = {{&a->out, a->swapped ? y : x, a->swapped ? x : y}, 2, number ? (a->swapped ? 0 : 1) : -1, a->scalar};
    return LAUNCH_ANY("map2", map2, a->fn, map2_quick(a->fn, x->dtype), o);
}

int elem_mapp_bwd(const lac_a_mapp *a);
int elem_map3_bwd(const lac_a_map3 *a);

extern "C" int lac_cuda_mapp(const lac_a_mapp *a)
{
    const double *c = a->constants;
    if (a->g.data) return elem_mapp_bwd(a);
    operands o = {{&a->out, &a->x}, 1, -1, 0, {c[0], c[1], c[2]}};
    return LAUNCH_ANY("mapp", mapp, a->fn, NULL, o);
}

extern "C" int lac_cuda_map3(const lac_a_map3 *a)
{
    if (a->g.data) return elem_map3_bwd(a);
    operands o = {{&a->out, &a->x, &a->y, &a->z}, 3, -1, 0, {a->constant, 0, 0}};
    return LAUNCH_FLOAT("map3", map3, a->fn, NULL, o);
}

extern "C" int lac_cuda_axpy(const lac_a_axpy *a)
{
    const lac_view *x = a->x.data ? &a->x : &a->dst;
    operands o = {{&a->dst, x, x, &a->dst}, 3, 1, a->alpha};
    int fn = a->x.data != NULL;
    return LAUNCH_ANY("axpy", axpy, fn, axpy_quick(fn, a->dst.dtype), o);
}
