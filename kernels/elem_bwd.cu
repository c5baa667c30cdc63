/* elem_bwd.cu: gradients of the elementwise functions of c/maps.def on CUDA; how they run is in elem.cuh.
 *
 * The partial derivatives of maps.def, times the gradient of the result. Floats only.
 */
#include "elem.cuh"

// clang-format off
/* inputs x, y (the result), z: its gradient */
SELECT(map1_bwd)
#define MAP1(name, domain, value, gradient) CASE(M1_##name, FLOAT, z * (gradient))
#include "maps.def"
CASE(M1_exp_short, FLOAT, z * y)
CASE(M1_sigmoid_short, FLOAT, z * (y * (1 - y)))
CASE(M1_silu_short, FLOAT, z * short_silu_grad((float)x))
CASE(M1_gelu_short, FLOAT, z * short_gelu_grad((float)x))
SELECT_END

SELECT(map2_bwd_x)
#define MAP2(name, domain, value, d_x, d_y) CASE(M2_##name, FLOAT, z * (d_x))
#include "maps.def"
SELECT_END

SELECT(map2_bwd_y)
#define MAP2(name, domain, value, d_x, d_y) CASE(M2_##name, FLOAT, z * (d_y))
#include "maps.def"
SELECT_END

SELECT(mapp_bwd)
#define MAPP(name, domain, count, value, gradient) CASE(MP_##name, FLOAT, z * (gradient))
#include "maps.def"
SELECT_END

/* three numbers a function: towards x, y, z; w is the gradient */
SELECT(map3_bwd)
#define MAP3(name, value, d_x, d_y, d_z) \
    CASE(3 * M3_##name, FLOAT, w * (d_x)) CASE(3 * M3_##name + 1, FLOAT, w * (d_y)) \
    CASE(3 * M3_##name + 2, FLOAT, w * (d_z))
#include "maps.def"
SELECT_END
// clang-format on

KERNELS(map1_bwd, 3)
KERNELS(map2_bwd_x, 3)
KERNELS(map2_bwd_y, 3)
KERNELS(mapp_bwd, 3)
KERNELS(map3_bwd, 4)
QUICK_KERNELS(map1_bwd, 3, quick_map1_list)
QUICK_KERNELS(map2_bwd_x, 3, quick_map2_list)
QUICK_KERNELS(map2_bwd_y, 3, quick_map2_list)

/* does the text of a derivative mention y, the result? If not, it is not read. */
static constexpr bool mentions_y(const char *text)
{
    auto letter = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
    };
    for (int i = 0; text[i]; i++)
        if (text[i] == 'y' && !(i && letter(text[i - 1])) && !letter(text[i + 1])) return true;
    return false;
}
static const bool map1_needs_y[] = {
#define MAP1(name, domain, value, gradient) mentions_y(#gradient),
#include "maps.def"
};

extern "C" int lac_cuda_map1_bwd(const lac_a_map1_bwd *a)
{
    operands o = {{&a->out, &a->x, &a->y, &a->g}, 3, map1_needs_y[a->fn] ? -1 : 1};
    bool half = a->x.dtype == LAC_F16 || a->x.dtype == LAC_BF16;
    int fn = half ? short_of(a->fn) : a->fn;
    return LAUNCH_FLOAT("map1_bwd", map1_bwd, fn, map1_bwd_quick(fn, a->x.dtype), o);
}

extern "C" int lac_cuda_map2_bwd(const lac_a_map2_bwd *a)
{
    bool number = !a->y.data, swapped = number && a->swapped;
    int which = number ? a->swapped : a->which;
    const lac_view *x = &a->x, *y = number ? &a->x : &a->y;
    operands o = {{&a->out, swapped ? y : x, swapped ? x : y, &a->g}, 3, number ? (swapped ? 0 : 1) : -1, a->scalar};
    if (which != 1) LAC_TRY(LAUNCH_FLOAT("map2_bwd", map2_bwd_x, a->fn, map2_bwd_x_quick(a->fn, x->dtype), o));
    if (which == 0) return 0;
    if (which == 2) o.view[0] = &a->out2;
    return LAUNCH_FLOAT("map2_bwd", map2_bwd_y, a->fn, map2_bwd_y_quick(a->fn, x->dtype), o);
}

int elem_mapp_bwd(const lac_a_mapp *a)
{
    const double *c = a->constants;
    operands o = {{&a->out, &a->x, &a->y, &a->g}, 3, -1, 0, {c[0], c[1], c[2]}};
    return LAUNCH_FLOAT("mapp_bwd", mapp_bwd, a->fn, NULL, o);
}

int elem_map3_bwd(const lac_a_map3 *a)
{
    operands o = {{&a->out, &a->x, &a->y, &a->z, &a->g}, 4, -1, 0, {a->constant, 0, 0}};
    return LAUNCH_FLOAT("map3_bwd", map3_bwd, 3 * a->fn + a->which, NULL, o);
}
