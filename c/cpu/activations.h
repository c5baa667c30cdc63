/* activations.h: activations of a few cache lines of floats at a time.
 *
 * With AVX-512 a permutation looks 16 floats up in one register, or 32 in two, as fast as it multiplies. That makes
 * sigmoid, tanh and gelu short. The sigmoid's powers 2^(j/16) come ready to be scaled by an addition to their
 * exponents. tanh is its addition theorem, tanh(a + t) = tanh a + tanh t (1 - tanh^2 a) / (1 + tanh a tanh t), with a =
 * k/4 looked up. gelu near 0 is 16 polynomials, a register a coefficient; from 3.875 on its relative accuracy needs an
 * exponential, and where a group of lines has such an element, all of it is computed both ways: 30 cycles a line of a
 * Zen 4 instead of 11, as many as without the tables. All else takes one way for all floats: 10 cycles for the sigmoid,
 * 11 for tanh.
 *
 * Two steps of 512 bits start in a cycle there; a division takes as much as two. But its schedulers hold 64 steps that
 * wait, three lines of 20, and a line is one chain. So several lines go abreast, step by step, which no compiler does
 * by itself (0.5 to 1.5 cycles less). The values are the same for any number of lines.
 *
 * Rejected: sigmoid and tanh by polynomials alone (a degree that is exact to the end of their range takes 17 to 19
 * steps instead of 15); (tanh a + tanh t) / (1 + tanh a tanh t), a step less, but 2.8 ulp; 32 powers for the sigmoid
 * (0.3 cycles less, with a polynomial of 5e-8); reciprocals by rcp14 and a step of Newton's, which are longer than a
 * division; gelu's exponential in line, or with its near values as arguments (no faster). Not built: 32 intervals for
 * gelu in steps that shrink, which would reach 6.5 for a step or two more.
 * With AVX2, which permutes 8 floats at most, they have no tables (activations_avx2.h); without: the functions of
 * simd.h.
 */
#ifndef LAC_CPU_ACTIVATIONS_H
#define LAC_CPU_ACTIVATIONS_H
#include "exps.h"

enum { V_ABREAST = 4 }; /* lines at once, at most */
/* and in loops around one of these alone: with AVX2 a line is two vectors already, and 16 registers do not hold the
 * results of four lines until the last is computed */
#if defined(__AVX2__) && !defined(__AVX512F__)
enum { V_ABREAST_SIGMOID = 1, V_ABREAST_TANH = 2, V_ABREAST_GELU = 1 };
#else
enum { V_ABREAST_SIGMOID = V_ABREAST, V_ABREAST_TANH = V_ABREAST, V_ABREAST_GELU = V_ABREAST };
#endif

#if defined(__AVX512F__)
#define V_EACH _Pragma("GCC unroll 4") for (int k = 0; k < lines; k++)

LAC_INLINE __m512 v_set(float x) { return _mm512_set1_ps(x); }
LAC_INLINE __m512 v_look_up(const float *table, __m512 i)
{
    return _mm512_permutexvar_ps(_mm512_castps_si512(i), _mm512_loadu_ps(table));
}

/* 1 + e^-x; 1 over it is within 2.2 ulp. Infinite below -88.73 and 1 from 40 on. The polynomial is e^-r times a number
 * just below 2, where a float is the most exact; the powers are divided by it, and it is the one that makes their
 * roundings the smallest. */
LAC_INLINE void v_logistic(__m512 *x, int lines)
{
    static const int32_t powers[16] = {/* the bits of 2^(j/16) / 1.91652918 less those that j adds to the mantissa */
                                       0x3f059326, 0x3f037d19, 0x3f01aa13, 0x3f001d0c, 0x3efed91d, 0x3efde183,
                                       0x3efd399f, 0x3efce4f8, 0x3efce73e, 0x3efd444a, 0x3efe0021, 0x3eff1ef5,
                                       0x3f00a528, 0x3f02974e, 0x3f04fa2e, 0x3f07d2c6};
    const __m512 magic = v_set(0x1.8p19f); /* its last bit is 1/16 */
    __m512 t[V_ABREAST], n[V_ABREAST], r[V_ABREAST], p[V_ABREAST];
    /* NaN passes as the second argument; at the lower bound 2^128 is still a float, divided as it is */
    V_EACH x[k] = _mm512_min_ps(v_set(40.0f), _mm512_max_ps(v_set(-88.73f), x[k]));
    V_EACH t[k] = _mm512_fnmadd_ps(x[k], v_set(1.44269504f), magic);
    V_EACH n[k] = _mm512_sub_ps(t[k], magic);
    V_EACH r[k] = _mm512_fmadd_ps(n[k], v_set(0.693359375f), x[k]);
    V_EACH r[k] = _mm512_fnmadd_ps(n[k], v_set(2.12194440e-4f), r[k]);
    V_EACH p[k] = _mm512_fnmadd_ps(r[k], v_set(0.319426f), v_set(0.958295643f)); /* on |r| <= ln2/32, 1.6e-9 */
    V_EACH p[k] = _mm512_fmadd_ps(r[k], p[k], v_set(-1.91652918f));
    V_EACH p[k] = _mm512_fmadd_ps(r[k], p[k], v_set(1.91652918f));
    V_EACH
    {
        __m512i i = _mm512_castps_si512(t[k]), power = _mm512_permutexvar_epi32(i, _mm512_loadu_si512(powers));
        t[k] = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(i, 19), power));
    }
    V_EACH x[k] = _mm512_fmadd_ps(t[k], p[k], v_set(1.0f));
}

/* 2.2 ulp; at most 1 */
LAC_INLINE void v_tanh(__m512 *x, int lines)
{
    static const float table[32] = {
        /* tanh(k/4) */
        0.0f,         0.244918659f, 0.462117165f, 0.635148942f, 0.761594176f, 0.848283648f, 0.905148268f, 0.941375554f,
        0.964027584f, 0.978026092f, 0.986614287f, 0.991859734f, 0.995054781f, 0.996997654f, 0.998177886f, 0.998894453f,
        0.999329329f, 0.999593139f, 0.999753237f, 0.999850333f, 0.999909222f, 0.999944925f, 0.999966621f, 0.999979734f,
        0.999987721f, 0.999992549f, 0.99999547f,  0.999997258f, 0.999998331f, 0.999998987f, 0.999999404f, 0.999999642f};
    const __m512 magic = v_set(0x1.8p21f), sign = v_set(-0.0f); /* the last bit is 1/4 */
    __m512 u[V_ABREAST], a[V_ABREAST], t[V_ABREAST], z[V_ABREAST], s[V_ABREAST];
    V_EACH u[k] = _mm512_min_ps(v_set(8.9f), _mm512_andnot_ps(sign, x[k])); /* tanh rounds to 1; NaN passes */
    V_EACH a[k] = _mm512_min_ps(v_set(0x1.8p21f + 7.75f), _mm512_add_ps(u[k], magic));
    V_EACH t[k] = _mm512_sub_ps(u[k], _mm512_sub_ps(a[k], magic));
    V_EACH a[k] =
        _mm512_permutex2var_ps(_mm512_loadu_ps(table), _mm512_castps_si512(a[k]), _mm512_loadu_ps(table + 16));
    /* tanh t on |t| <= 1/8, 8e-9; beyond, where u > 7.875, it is below 1, which is all that counts there */
    V_EACH z[k] = _mm512_mul_ps(t[k], t[k]);
    V_EACH s[k] = _mm512_fmadd_ps(z[k], v_set(0.13216737f), v_set(-0.3333277f));
    V_EACH z[k] = _mm512_mul_ps(z[k], t[k]);
    V_EACH s[k] = _mm512_fmadd_ps(z[k], s[k], t[k]);
    V_EACH z[k] = _mm512_fmadd_ps(a[k], s[k], v_set(1.0f));
    V_EACH s[k] = _mm512_mul_ps(s[k], _mm512_fnmadd_ps(a[k], a[k], v_set(1.0f)));
    V_EACH s[k] = _mm512_add_ps(a[k], _mm512_div_ps(s[k], z[k]));
    V_EACH x[k] = _mm512_or_ps(s[k], _mm512_and_ps(sign, x[k]));
}

/* The upper tail of the normal distribution: Q(u) = erfc(u / sqrt(2)) / 2, in intervals around k/4; relative 6e-8, 2e-7
 * in the last one */
static const float v_table_gelu[6][16] = {
    {0.5f, 0.40129367f, 0.30853754f, 0.22662735f, 0.15865526f, 0.10564978f, 0.0668072f, 0.040059157f, 0.022750132f,
     0.012224472f, 0.0062096654f, 0.002979763f, 0.001349898f, 0.00057702506f, 0.0002326291f, 8.84173e-05f},
    {-0.3989423f, -0.38666812f, -0.35206532f, -0.30113742f, -0.24197072f, -0.18264909f, -0.1295176f, -0.08627732f,
     -0.053990968f, -0.031739652f, -0.017528301f, -0.009093562f, -0.004431848f, -0.0020290476f, -0.0008726823f,
     -0.0003525954f},
    {-4.8283365e-08f, 0.04833325f, 0.088015914f, 0.112926126f, 0.12098509f, 0.1141556f, 0.097138286f, 0.07549283f,
     0.05399115f, 0.035707243f, 0.021910444f, 0.012503665f, 0.006647758f, 0.0032971778f, 0.0015271711f, 0.0006610996f},
    {0.06649189f, 0.060416337f, 0.04400754f, 0.021957424f, -2.4504698e-07f, -0.017123267f, -0.026982477f, -0.029657347f,
     -0.026995031f, -0.021490075f, -0.015337119f, -0.009946081f, -0.0059092105f, -0.0032339015f, -0.0016363763f,
     -0.0007677012f},
    {-2.0332369e-05f, -0.011786569f, -0.020098677f, -0.022867195f, -0.020117108f, -0.01366139f, -0.006086368f,
     0.0003627521f, 0.0044678673f, 0.006114105f, 0.005922109f, 0.004751194f, 0.0033264197f, 0.0020823376f,
     0.0011813678f, 0.00061251316f},
    {-0.009866397f, -0.008427148f, -0.0045467005f, 0.00016779143f, 0.004032821f, 0.0059695384f, 0.0058414256f,
     0.004283279f, 0.0022283497f, 0.00045002176f, -0.00066952204f, -0.0011199786f, -0.00110249f, -0.00085988967f,
     -0.00057399925f, -0.00033878733f},
};
/* gelu's slope at -u, Q(u) - u density(u); 5e-8 of Q(u) + u density(u) */
static const float v_table_gelu_grad[6][16] = {
    {0.5f, 0.30462664f, 0.13250488f, 0.00077428046f, -0.08331547f, -0.12266158f, -0.1274692f, -0.11092615f, -0.0852318f,
     -0.059189744f, -0.037611086f, -0.022027534f, -0.011945647f, -0.006017381f, -0.0028217603f, -0.0012338165f},
    {-0.7978846f, -0.74916947f, -0.6161143f, -0.43288505f, -0.24197073f, -0.07990898f, 0.03237939f, 0.09166964f,
     0.10798193f, 0.09720268f, 0.07449528f, 0.050582945f, 0.031022944f, 0.017373726f, 0.0089449985f, 0.0042531854f},
    {-3.75521e-07f, 0.19031113f, 0.33005816f, 0.3881823f, 0.36295488f, 0.2782549f, 0.16999327f, 0.070775926f,
     1.0635204e-06f, -0.03793842f, -0.049298476f, -0.0445446f, -0.033239204f, -0.021638118f, -0.012599455f,
     -0.006652507f},
    {0.26597333f, 0.22983378f, 0.13569087f, 0.019017333f, -0.08065566f, -0.13686581f, -0.1443557f, -0.115876876f,
     -0.0719868f, -0.030727087f, -0.0020092318f, 0.012508482f, 0.016249165f, 0.014077255f, 0.009935622f, 0.0060714856f},
    {-0.00016037693f, -0.06939264f, -0.11178305f, -0.11368388f, -0.08045217f, -0.03102615f, 0.013416062f, 0.039420515f,
     0.044810247f, 0.035816118f, 0.021362754f, 0.008392882f, 5.9124966e-05f, -0.0036375257f, -0.0042223623f,
     -0.0033612011f},
    {-0.058991496f, -0.047704376f, -0.018220665f, 0.014478973f, 0.036115315f, 0.040039975f, 0.029128673f, 0.012022648f,
     -0.0027130228f, -0.010571833f, -0.011635819f, -0.008642692f, -0.004610931f, -0.0014325373f, 0.00032475428f,
     0.0009246987f},
};
enum { V_GELU_DEGREE = 5 };
#define V_GELU_NEAR 3.875f

/* relu(x), with x's zero and NaN */
LAC_INLINE __m512 v_hinge(__m512 x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }
/* q where x is negative, else 1 - q */
LAC_INLINE __m512 v_reflect(__m512 q, __m512 x)
{
    __mmask16 up = _mm512_cmp_epi32_mask(_mm512_castps_si512(x), _mm512_setzero_si512(), _MM_CMPINT_NLT);
    return _mm512_mask_sub_ps(q, up, v_set(1.0f), q);
}

/* e^(-u^2/2), and z = 1 / (u + c), for 3.875 <= u, which is bounded where the power rounds to 0 */
LAC_INLINE void v_normal_power(__m512 *u, __m512 *e, __m512 *z, float c, int lines)
{
    const __m512 magic = v_set(0x1.8p19f); /* its last bit is 1/16 */
    __m512 t[V_ABREAST], n[V_ABREAST], r[V_ABREAST], p[V_ABREAST];
    V_EACH u[k] = _mm512_min_ps(v_set(14.5f), u[k]); /* NaN passes */
    V_EACH t[k] = _mm512_fmadd_ps(_mm512_mul_ps(u[k], u[k]), v_set(-0.5f * 1.44269504f), magic);
    V_EACH n[k] = _mm512_sub_ps(t[k], magic);
    V_EACH r[k] = _mm512_fmadd_ps(u[k], u[k], _mm512_mul_ps(n[k], v_set(2 * 0.693359375f))); /* u^2 is not rounded */
    V_EACH r[k] = _mm512_fnmadd_ps(n[k], v_set(2 * 2.12194440e-4f), r[k]);
    V_EACH z[k] = _mm512_div_ps(v_set(1.0f), _mm512_add_ps(u[k], v_set(c)));
    V_EACH p[k] = _mm512_fnmadd_ps(r[k], v_set(0.166669f / 8), v_set(0.5000162f / 4)); /* e^(-r/2) */
    V_EACH p[k] = _mm512_fmadd_ps(r[k], p[k], v_set(-0.5f));
    V_EACH p[k] = _mm512_fmadd_ps(r[k], p[k], v_set(1.0f));
    V_EACH e[k] = _mm512_scalef_ps(_mm512_mul_ps(p[k], v_look_up(v_powers, t[k])), n[k]);
}
LAC_INLINE void v_polynomial(const __m512 *x, __m512 *y, const float *c, int degree, int lines)
{
    V_EACH y[k] = v_set(c[degree]);
#pragma GCC unroll 8
    for (int i = degree - 1; i >= 0; i--) V_EACH y[k] = _mm512_fmadd_ps(y[k], x[k], v_set(c[i]));
}
/* gelu or its slope from 3.875 on. Out of line, so that the loops keep their registers, and of V_ABREAST lines. */
#define V_FAR static __attribute__((noinline, cold, unused)) void
V_FAR v_gelu_far(__m512 *y, __m512 x0, __m512 x1, __m512 x2, __m512 x3)
{
    enum { lines = V_ABREAST };
    static const float c[] = {0.3989725f, -0.001538595f, -0.36781052f, -1.1140766f, 1.6267415f}; /* 1.2e-7 */
    __m512 x[] = {x0, x1, x2, x3}, u[lines], e[lines], z[lines], p[lines];
    V_EACH u[k] = _mm512_abs_ps(x[k]);
    v_normal_power(u, e, z, 1.0f, lines);
    v_polynomial(z, p, c, 4, lines);
    V_EACH y[k] = _mm512_fnmadd_ps(e[k], p[k], v_hinge(x[k]));
}
V_FAR v_gelu_grad_far(__m512 *y, __m512 x0, __m512 x1, __m512 x2, __m512 x3)
{
    enum { lines = V_ABREAST };
    static const float c[] = {-0.3989426f, 6.920859e-05f, 0.39653102f, 0.6320391f, 0.059151832f}; /* 1e-7 */
    __m512 x[] = {x0, x1, x2, x3}, u[lines], e[lines], z[lines], p[lines];
    V_EACH u[k] = _mm512_abs_ps(x[k]);
    v_normal_power(u, e, z, 0.75f, lines);
    v_polynomial(z, p, c, 4, lines);
    V_EACH y[k] = v_reflect(_mm512_mul_ps(_mm512_mul_ps(e[k], u[k]), p[k]), x[k]);
}
#undef V_FAR
/* y = a table's polynomial at u */
LAC_INLINE void v_piecewise(const float (*table)[16], const __m512 *u, __m512 *y, int lines)
{
    const __m512 magic = v_set(0x1.8p21f); /* its last bit is 1/4 */
    __m512 i[V_ABREAST], t[V_ABREAST];
    V_EACH i[k] = _mm512_add_ps(u[k], magic);
    V_EACH t[k] = _mm512_sub_ps(u[k], _mm512_sub_ps(i[k], magic));
    V_EACH y[k] = v_look_up(table[V_GELU_DEGREE], i[k]);
#pragma GCC unroll 8
    for (int d = V_GELU_DEGREE - 1; d >= 0; d--) V_EACH y[k] = _mm512_fmadd_ps(y[k], t[k], v_look_up(table[d], i[k]));
}
/* x = y, but what `far` says where u = |x| is beyond the tables */
typedef void v_far_function(__m512 *y, __m512 x0, __m512 x1, __m512 x2, __m512 x3);
LAC_INLINE void v_near_or_far(__m512 *x, const __m512 *y, const __m512 *u, v_far_function *far, int lines)
{
    const __m512i end = _mm512_castps_si512(v_set(V_GELU_NEAR));
    __m512i most = _mm512_castps_si512(u[0]); /* as integers: a NaN is the largest */
    for (int k = 1; k < lines; k++) most = _mm512_max_epi32(most, _mm512_castps_si512(u[k]));
    if (__builtin_expect(_mm512_cmpge_epi32_mask(most, end), 0)) {
        __m512 there[V_ABREAST];
        far(there, x[0], x[lines > 1], x[lines > 2 ? 2 : 0], x[lines > 3 ? 3 : 0]);
        V_EACH x[k] = _mm512_mask_mov_ps(y[k], _mm512_cmpge_epi32_mask(_mm512_castps_si512(u[k]), end), there[k]);
    } else {
        V_EACH x[k] = y[k];
    }
}
/* gelu(x) = relu(x) - |x| Q(|x|): 5.1 ulp, also in the lower tail down to the subnormals */
LAC_INLINE void v_gelu(__m512 *x, int lines)
{
    __m512 u[V_ABREAST], q[V_ABREAST];
    V_EACH u[k] = _mm512_abs_ps(x[k]);
    v_piecewise(v_table_gelu, u, q, lines);
    V_EACH q[k] = _mm512_fnmadd_ps(u[k], q[k], v_hinge(x[k]));
    v_near_or_far(x, q, u, v_gelu_far, lines);
}
/* its slope, 1 - f(-x) for x > 0: 1.1 ulp of 1/8 or of itself, whichever is larger */
LAC_INLINE void v_gelu_grad(__m512 *x, int lines)
{
    __m512 u[V_ABREAST], q[V_ABREAST];
    V_EACH u[k] = _mm512_abs_ps(x[k]);
    v_piecewise(v_table_gelu_grad, u, q, lines);
    V_EACH q[k] = v_reflect(q[k], x[k]);
    v_near_or_far(x, q, u, v_gelu_grad_far, lines);
}
#undef V_EACH
#define V_LINES(name, vector, scalar)                                                                                  \
    LAC_INLINE void name(float(*line)[V_FLOATS], int lines)                                                            \
    {                                                                                                                  \
        __m512 x[V_ABREAST];                                                                                           \
        _Pragma("GCC unroll 4") for (int k = 0; k < lines; k++) x[k] = _mm512_loadu_ps(line[k]);                       \
        vector(x, lines);                                                                                              \
        _Pragma("GCC unroll 4") for (int k = 0; k < lines; k++) _mm512_storeu_ps(line[k], x[k]);                       \
    }
#elif defined(__AVX2__)
#include "activations_avx2.h"
/* two lines at once, or one: the bits are the same */
#define V_LINES(name, vector, scalar)                                                                                  \
    LAC_INLINE void name(float(*line)[V_FLOATS], int lines)                                                            \
    {                                                                                                                  \
        const int step = lines % 2 ? 1 : 2;                                                                            \
        _Pragma("GCC unroll 4") for (int j = 0; j < lines; j += step)                                                  \
        {                                                                                                              \
            __m256 x[V8_ABREAST];                                                                                      \
            _Pragma("GCC unroll 4") for (int k = 0; k < 2 * step; k++) x[k] = _mm256_loadu_ps(line[j] + 8 * k);        \
            vector(x, 2 * step);                                                                                       \
            _Pragma("GCC unroll 4") for (int k = 0; k < 2 * step; k++) _mm256_storeu_ps(line[j] + 8 * k, x[k]);        \
        }                                                                                                              \
    }
#else
LAC_INLINE float v_logisticf(float x) { return 1.0f + v_exp_flushf(-x); }
#define V_LINES(name, vector, scalar)                                                                                  \
    LAC_INLINE void name(float(*line)[V_FLOATS], int lines)                                                            \
    {                                                                                                                  \
        for (int j = 0; j < lines; j++)                                                                                \
            _Pragma("omp simd") for (int k = 0; k < V_FLOATS; k++) line[j][k] = scalar(line[j][k]);                    \
    }
#endif
V_LINES(v_logistic_lines, v_logistic, v_logisticf)
V_LINES(v_tanh_lines, v_tanh, v_tanhf)
V_LINES(v_gelu_lines, v_gelu, v_geluf)
V_LINES(v_gelu_grad_lines, v_gelu_grad, v_gelu_gradf)
#undef V_LINES
/* exponentials, which gain nothing from going abreast */
#define V_EXP_LINES(name, line_)                                                                                       \
    LAC_INLINE void name(float(*line)[V_FLOATS], int lines)                                                            \
    {                                                                                                                  \
        for (int k = 0; k < lines; k++) line_(line[k]);                                                                \
    }
V_EXP_LINES(v_exp_lines, v_exp_line)
V_EXP_LINES(v_exp_down_lines, v_exp_down_line)
#undef V_EXP_LINES

#endif
