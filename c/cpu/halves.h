/* halves.h: activations of f16 and bf16, a cache line of 32 values at a time, with AVX-512.
 *
 * A half holds 11 or 8 bits, so short polynomials from tables in registers do. What tests/elem_spec.lua finds over all
 * 65,536 values, in units of the last place (0.5 is rounding alone): exp, sigmoid, silu, tanh 0.509, gelu and its slope
 * 0.538 (slopes near their roots in units of 2^-6), the slope times anything 0.575, silu's slope 0.505 (f16 here 0.501
 * for sigmoid and silu). Tails keep that accuracy, as far as the results are normal floats.
 * The words of bf16 at even and at odd places are two vectors of floats after a shift and a mask, and come back by an
 * addition each and a permutation. Values exactly between two bf16 go away from zero; no function here makes any but of
 * subnormals. f16 is converted by the processor: 7 cycles of a Zen 4 for a line there and back, bf16 3.
 * Two functions of bf16 leave floats early or never see them, because a step takes 32 words or 64 bytes as soon as it
 * takes 16 floats: exp has its exponent and a place in a table after one multiply-add, and interpolates words; tanh is
 * subtracted from x as bytes that a table holds for every x (AVX512-VBMI; without, by polynomials).
 * What no table covers (`far`: large arguments, NaN) is computed again out of line, and such elements alone are
 * taken from there: no value depends on its neighbours. A line with an x < -3.92 costs gelu 35 to 40 cycles more, one
 * with |x| > 3.92 costs its gradient 58 to 63; f16's sigmoid and silu, and silu's gradient, have tables up to 7.75.
 * Cycles of a line in the cache, bf16 and f16, of a Zen 4: exp 11, 18; tanh 11 (15 without bytes), 22; gelu 18, 23; its
 * gradient 21, 25; sigmoid 16, silu 17. Of 512 bits a cycle starts two steps, of these one multiplication or
 * comparison, one addition of floats or shift and one permutation, which takes half of each: chains of dependent steps
 * and uneven shares leave 1.5 to 1.7. Of a Xeon (Sapphire Rapids): exp 13, 15; sigmoid 16, 19; silu's gradient 19, 22;
 * tanh 12, 18; gelu 16, 18; its gradient 17, 21. A division takes 10 there, rcp14 and vpermt2w 2, all else here 0.5 or
 * 1: f16's sigmoid by h_power and a division took 25, with an estimate and a Newton step 22, hence its table: 11 steps
 * a vector. Tried, not kept: bf16's words joined by a shift and a masked move (a Xeon 2%, one step more elsewhere); two
 * to four lines stage by stage (3% at best); a table's argument from the middle of its interval (gelu 21.5, and 2^-16.5
 * instead of 2^-15); additions by multipliers beside f16's conversions; vcvtne2ps2bf16, which flushes subnormals and
 * wants a permutation; exp with a fixed point inside a float (two steps fewer with byte permutations and 10 cycles,
 * without them 12.7); bytes for sigmoid, silu or gelu (relative accuracy on both sides of 0 wants 25 tables, and
 * registers hold 12).
 */
#ifndef LAC_CPU_HALVES_H
#define LAC_CPU_HALVES_H
#include "maps.h"

#if defined(__AVX512F__)
#define V_HALF_LINES
enum { HALF_LINE = 32 }; /* values of a line; `half`: f16 (1) or bf16 (2), as everywhere */
typedef __m512i h_words;

LAC_INLINE void h_put(uint16_t *out, h_words w, bool past)
{
    if (past) _mm512_stream_si512((__m512i *)out, w);
    else _mm512_storeu_si512(out, w);
}
/* the even and the odd words of bf16 as floats */
LAC_INLINE void h_split(__m512i w, __m512 *x)
{
    x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    x[1] = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)));
}
/* a line as floats: those of f16 in order, those of bf16 as above */
LAC_INLINE void h_take(int half, const uint16_t *line, __m512 *x)
{
    if (half == 2) {
        h_split(_mm512_loadu_si512(line), x);
    } else {
        x[0] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)line));
        x[1] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)line + 1));
    }
}
/* the places of the upper words of two vectors in turn */
LAC_INLINE __m512i h_high_words(void)
{
    return _mm512_setr_epi32(0x210001, 0x230003, 0x250005, 0x270007, 0x290009, 0x2b000b, 0x2d000d, 0x2f000f, 0x310011,
                             0x330013, 0x350015, 0x370017, 0x390019, 0x3b001b, 0x3d001d, 0x3f001f);
}
LAC_INLINE __m512i h_join(int half, const __m512 *y)
{
    if (half == 1)
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(y[0], 0)), _mm512_cvtps_ph(y[1], 0), 1);
    const __m512i up = _mm512_set1_epi32(0x8000);
    return _mm512_permutex2var_epi16(_mm512_add_epi32(_mm512_castps_si512(y[0]), up), h_high_words(),
                                     _mm512_add_epi32(_mm512_castps_si512(y[1]), up));
}
/* entry t % 32 of a table */
LAC_INLINE __m512 h_entry(const void *table, __m512i t)
{
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), t, _mm512_loadu_ps((const float *)table + 16));
}
/* word t % 64 of a table */
LAC_INLINE __m512i h_word(const void *table, __m512i t)
{
    return _mm512_permutex2var_epi16(_mm512_loadu_si512(table), t, _mm512_loadu_si512((const uint16_t *)table + 32));
}

/* e^x or e^-x for |x| <= 87. e^x = 2^(k + j/32) e^r as in exps.h; the table has the bits of 2^(j/32) less those of j,
 * which t's own bits add together with k. bf16: 1 + r, with half of its error in the table, 2^-15. f16: j/16 and
 * degree 2, 2^-21. */
LAC_INLINE __m512 h_power(int half, __m512 x, bool minus)
{
    static const uint32_t by32[32] = {
        0x3f8000f6, 0x3f7ece82, 0x3f7dabc4, 0x3f7c9915, 0x3f7b96ce, 0x3f7aa54c, 0x3f79c4ec, 0x3f78f60e,
        0x3f783915, 0x3f778e65, 0x3f76f664, 0x3f76717b, 0x3f760016, 0x3f75a2a1, 0x3f75598c, 0x3f75254a,
        0x3f75064f, 0x3f74fd13, 0x3f750a0f, 0x3f752dc0, 0x3f7568a5, 0x3f75bb41, 0x3f762618, 0x3f76a9b2,
        0x3f77469a, 0x3f77fd5e, 0x3f78ce8f, 0x3f79bac0, 0x3f7ac28a, 0x3f7be687, 0x3f7d2754, 0x3f7e8594};
    static const uint32_t by16[16] = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                      0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                      0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
    const __m512 magic = _mm512_set1_ps(half == 2 ? 0x1.8p18f : 0x1.8p19f); /* its last bit is 1/32, 1/16 */
    __m512 t = _mm512_fmadd_ps(x, _mm512_set1_ps(minus ? -1.44269504f : 1.44269504f), magic);
    __m512 n = _mm512_sub_ps(t, magic), ln2 = _mm512_set1_ps(0.693147182f);
    __m512 r = minus ? _mm512_fnmsub_ps(n, ln2, x) : _mm512_fnmadd_ps(n, ln2, x);
    __m512i i = _mm512_castps_si512(t), power;
    if (half == 2) {
        power = _mm512_add_epi32(_mm512_castps_si512(h_entry(by32, i)), _mm512_slli_epi32(i, 18));
    } else {
        power = _mm512_permutexvar_epi32(i, _mm512_loadu_si512(by16));
        power = _mm512_add_epi32(power, _mm512_slli_epi32(i, 19));
        r = _mm512_mul_ps(r, _mm512_fmadd_ps(r, _mm512_set1_ps(0.5f), _mm512_set1_ps(1.0f)));
    }
    return _mm512_fmadd_ps(_mm512_castsi512_ps(power), r, _mm512_castsi512_ps(power));
}
/* e^x of bf16 for |x| <= 87, 32 values at once: 0.503 ulp. x log2(e) comes as integers with 22 bits of fraction. The
 * first six choose an interval of 2^f, the last 16 go on in it along a straight line, in units of 2^-8 ulp; a whole
 * bf16 is the integer's upper word twice, and what the table adds to that. */
LAC_INLINE __m512i h_exp_bf16(__m512i w)
{
    static const int16_t start[64] = {
        /* 2^(j/64) - 1 less j/64, and half a unit for rounding */
        128,   -27,   -178,  -326,  -469,  -608,  -744,  -875,  -1002, -1125, -1244, -1358, -1468, -1574, -1675, -1772,
        -1864, -1952, -2035, -2113, -2187, -2255, -2320, -2379, -2433, -2482, -2526, -2566, -2600, -2628, -2652, -2670,
        -2683, -2690, -2692, -2688, -2679, -2664, -2644, -2617, -2585, -2546, -2502, -2452, -2395, -2333, -2264, -2189,
        -2107, -2019, -1924, -1823, -1715, -1600, -1479, -1351, -1215, -1073, -923,  -766,  -602,  -431,  -252,  -66};
    static const uint16_t slope[64] = {357, 361, 365, 369, 373, 377, 381, 385, 389, 393, 398, 402, 406, 411, 415, 420,
                                       424, 429, 434, 438, 443, 448, 453, 458, 463, 468, 473, 478, 483, 488, 494, 499,
                                       505, 510, 516, 521, 527, 533, 539, 544, 550, 556, 562, 568, 575, 581, 587, 594,
                                       600, 607, 613, 620, 627, 633, 640, 647, 654, 662, 669, 676, 683, 691, 698, 706};
    const __m512 scale = _mm512_set1_ps(1.44269504f * 0x1p22f), bias = _mm512_set1_ps(127 * 0x1p22f);
    const __m512i upper = h_high_words(), lower = _mm512_sub_epi16(upper, _mm512_set1_epi16(1));
    __m512 x[2];
    h_split(w, x);
    __m512i t0 = _mm512_cvtps_epi32(_mm512_fmadd_ps(x[0], scale, bias));
    __m512i t1 = _mm512_cvtps_epi32(_mm512_fmadd_ps(x[1], scale, bias));
    __m512i at = _mm512_permutex2var_epi16(t0, upper, t1), rest = _mm512_permutex2var_epi16(t0, lower, t1);
    __m512i y = _mm512_mulhi_epu16(h_word(slope, at), rest);
    y = _mm512_srai_epi16(_mm512_add_epi16(y, h_word(start, at)), 8);
    return _mm512_add_epi16(_mm512_add_epi16(at, at), y);
}
/* Functions of |x| < 7.75 by intervals around j/2, j modulo 32: 1 / (1 + e^-x), relative 2^-20.9, and the slope of
 * silu, 2^-16.5 of it or of 2^-6 */
static const float h_sigmoid_table[5][32] = {
    {0.49999997f,  0.6224593f,    0.7310586f,    0.8175745f,    0.8807971f,    0.9241418f,    0.95257413f,
     0.97068775f,  0.98201376f,   0.9890131f,    0.9933072f,    0.99592984f,   0.99752736f,   0.9984988f,
     0.99908894f,  0.9994472f,    0.0003353501f, 0.0005527786f, 0.0009110511f, 0.0015011821f, 0.002472623f,
     0.004070137f, 0.0066928505f, 0.010986942f,  0.017986208f,  0.029312229f,  0.047425874f,  0.07585818f,
     0.11920293f,  0.18242554f,   0.26894143f,   0.37754068f},
    {0.24999748f,    0.23500235f,    0.19661243f,    0.14914766f,   0.10499447f,   0.070104085f,  0.04517671f,
     0.028452955f,   0.017662615f,   0.010866154f,   0.006648002f,  0.0040535354f, 0.002466486f,  0.0014989141f,
     0.00091021217f, 0.00055246754f, 0.00033523433f, 0.0005524676f, 0.0009102123f, 0.0014989143f, 0.0024664863f,
     0.004053536f,   0.006648003f,   0.010866155f,   0.017662616f,  0.028452955f,  0.04517671f,   0.07010408f,
     0.10499446f,    0.14914764f,    0.19661242f,    0.23500234f},
    {2.0089897e-06f,  -0.028775869f,  -0.045427855f,  -0.04736543f,   -0.039981883f,  -0.02973434f,   -0.020445967f,
     -0.013392537f,   -0.008513662f,  -0.005313709f,  -0.0032795155f, -0.0020102735f, -0.0012271466f, -0.00074720813f,
     -0.00045427753f, -0.0002759288f, 0.00016751036f, 0.0002759376f,  0.0004542919f,  0.0007472314f,  0.0012271837f,
     0.0020103315f,   0.0032796024f,  0.00531383f,    0.008513806f,   0.013392648f,   0.020445883f,   0.029733753f,
     0.03998048f,     0.047363497f,   0.04542705f,    0.028778056f},
    {-0.02067182f,   -0.01597165f,  -0.0059201997f, 0.0025353413f, 0.0064188046f,  0.006745905f,   0.005485201f,
     0.0039370665f,  0.0026376361f, 0.0016978297f,  0.0010673022f, 0.00066148926f, 0.0004064911f,  0.00024850815f,
     0.00015145232f, 9.212787e-05f, 5.597582e-05f,  9.212603e-05f, 0.0001514493f,  0.00024850326f, 0.00040648328f,
     0.000661477f,   0.0010672834f, 0.0016978028f,  0.0026376017f, 0.003937033f,   0.005485193f,   0.0067459717f,
     0.0064190007f,  0.0025356514f, -0.005919922f,  -0.015971523f},
    {-3.2145603e-05f, 0.004292782f,    0.005106772f,   0.003121882f,   0.0008847619f,  -0.0003796802f, -0.00077401055f,
     -0.0007333312f,  -0.0005592684f,  -0.0003857198f, -0.0002521155f, -0.0001598448f, -9.955639e-05f, -6.135539e-05f,
     -3.7574173e-05f, -2.2923066e-05f, 1.386623e-05f,  2.2781534e-05f, 3.7343543e-05f, 6.0982467e-05f, 9.896121e-05f,
     0.00015891592f,  0.00025072187f,  0.00038377664f, 0.00055694423f, 0.0007315489f,  0.00077534665f, 0.00038907418f,
     -0.00086224335f, -0.003090944f,   -0.0050938153f, -0.0043277945f},
};
static const float h_silu_slope_table[5][32] = {
    {0.49999982f,   0.7399611f,    0.9276705f,     1.0412942f,     1.0907843f,    1.0994011f,    1.0881041f,
     1.0702734f,    1.0526646f,    1.037911f,      1.0265474f,     1.0182245f,    1.0123265f,    1.0082419f,
     1.0054605f,    1.0035908f,    -0.0023465513f, -0.0035907694f, -0.005460497f, -0.008241855f, -0.012326432f,
     -0.018224508f, -0.026547434f, -0.03791109f,   -0.05266462f,   -0.070273355f, -0.088104114f, -0.09940112f,
     -0.09078429f,  -0.04129452f,  0.072329864f,   0.26003873f},
    {0.49998507f,    0.44122285f,    0.302372f,     0.15620495f,    0.050065316f,   -0.008462128f,  -0.03232231f,
     -0.0368422f,    -0.032784443f,  -0.026091361f, -0.019499347f,  -0.014006063f,  -0.009792864f,  -0.0067159245f,
     -0.0045394893f, -0.0030340133f, -0.002009621f, -0.0030340133f, -0.0045394893f, -0.0067159245f, -0.009792864f,
     -0.014006062f,  -0.019499347f,  -0.026091361f, -0.03278444f,   -0.0368422f,    -0.03232231f,   -0.008462127f,
     0.050065342f,   0.15620351f,    0.30236995f,   0.44122285f},
    {2.420261e-05f,  -0.11040584f,   -0.15394624f,  -0.13034083f,   -0.08109601f,   -0.038432434f,  -0.011940996f,
     0.0011149851f,  0.006040983f,   0.0069139763f, 0.006118677f,   0.0048453845f,  0.0036085732f,  0.0025860704f,
     0.0018055333f,  0.0012371126f,  -0.000835733f, -0.0012371124f, -0.0018055332f, -0.0025860704f, -0.0036085732f,
     -0.0048453305f, -0.0061185383f, -0.006913693f, -0.0060405005f, -0.001114347f,  0.0119414795f,  0.03843243f,
     0.08109884f,    0.13038102f,    0.15389712f,   0.110428765f},
    {-0.08236878f,    -0.05510863f,   -0.00334477f,    0.028683363f,    0.032627895f,    0.023141978f,
     0.012650381f,    0.0054929797f,  0.0016144053f,   -0.00014232418f, -0.00076680764f, -0.00086662185f,
     -0.00076091697f, -0.0005997074f, -0.00044536698f, -0.00031864265f, -0.00022225792f, -0.00031864265f,
     -0.00044536698f, -0.0005997074f, -0.000760917f,   -0.0008666311f,  -0.0007668216f,  -0.00014235108f,
     0.001614367f,    0.0054929494f,  0.012650393f,    0.023141958f,    0.032627348f,    0.028713582f,
     -0.0033003015f,  -0.05510881f},
    {-0.00038718485f, 0.024120193f,   0.023437377f,    0.00819994f,     -0.0027744635f, -0.005663544f,  -0.0045163627f,
     -0.0026719496f,  -0.0013097102f, -0.0005287993f,  -0.00014439471f, 1.9434203e-05f, 7.461251e-05f,  8.18329e-05f,
     7.098492e-05f,   5.560121e-05f,  -4.1151052e-05f, -5.5601788e-05f, -7.098574e-05f, -8.183333e-05f, -7.460958e-05f,
     -2.0291041e-05f, 0.00014216984f, 0.0005242737f,   0.0013019934f,   0.0026617462f,  0.0045086415f,  0.0056636105f,
     0.0027293125f,   -0.008830838f,  -0.022640867f,   -0.024487237f},
};
LAC_INLINE __m512 h_quartic(const float (*table)[32], __m512 x)
{
    const __m512 magic = _mm512_set1_ps(0x1.8p22f); /* the last bit of the sum is 1/2 */
    __m512 sum = _mm512_add_ps(x, magic), t = _mm512_sub_ps(x, _mm512_sub_ps(sum, magic));
    __m512i i = _mm512_castps_si512(sum);
    __m512 y = _mm512_fmadd_ps(h_entry(table[4], i), t, h_entry(table[3], i));
    y = _mm512_fmadd_ps(y, t, h_entry(table[2], i));
    y = _mm512_fmadd_ps(y, t, h_entry(table[1], i));
    return _mm512_fmadd_ps(y, t, h_entry(table[0], i));
}
/* bf16: by an estimate, 2^-14 */
LAC_INLINE __m512 h_sigmoid_near(int half, __m512 x)
{
    if (half == 1) return h_quartic(h_sigmoid_table, x);
    return _mm512_rcp14_ps(_mm512_add_ps(h_power(half, x, true), _mm512_set1_ps(1.0f)));
}
LAC_INLINE __m512 h_silu_near(int half, __m512 x) { return _mm512_mul_ps(x, h_sigmoid_near(half, x)); }

/* tanh(u): four intervals between powers of two, up to 4 (bf16, 2^-13.1 at most) or 8 (f16, 2^-17.2); the number of one
 * are bits of u, modulo 32 */
static const float h_tanh_bf16_table[3][32] = {
    {0.65706503f,     0.82120293f,     0.9121278f,     0.9584934f,      0.0f,
     -3.2684543e-06f, -5.4064894e-06f, -8.31821e-06f,  -1.4219469e-05f, -2.605376e-05f,
     -4.3058615e-05f, -6.613819e-05f,  -0.0001127382f, -0.00020569013f, -0.00033812708f,
     -0.00051611743f, -0.00087019935f, -0.0015596732f, -0.0025094287f,  -0.003735007f,
     -0.0060195844f,  -0.010016187f,   -0.014699608f,  -0.019561071f,   -0.02547063f,
     -0.028005444f,   -0.019242298f,   0.0040597413f,  0.065898396f,    0.1906703f,
     0.33759436f,     0.4817823f},
    {0.24056634f, 0.107404605f, 0.04604556f, 0.019268187f, 1.0000159f, 1.000459f,  1.0006416f, 1.0008546f,
     1.001224f,   1.0018306f,   1.0025566f,  1.0034009f,   1.0048598f, 1.0072417f, 1.0100691f, 1.0133257f,
     1.0188694f,  1.0277075f,   1.0378504f,  1.0490674f,   1.0669712f, 1.092641f,  1.1177082f, 1.1400173f,
     1.1633732f,  1.1719948f,   1.1489859f,  1.0959424f,   0.9752817f, 0.7753429f, 0.5787742f, 0.41334343f},
    {-0.043516017f, -0.016489342f, -0.006132667f, -0.0022651695f, -0.00650986f, -0.021441514f, -0.02534373f,
     -0.02924164f,  -0.035025783f, -0.042803902f, -0.050556835f,  -0.05828281f, -0.06970562f,  -0.084977835f,
     -0.10007726f,  -0.114979334f, -0.1366871f,   -0.16503374f,   -0.19212987f, -0.21780647f,  -0.25289893f,
     -0.29415208f,  -0.32771337f,  -0.35331792f,  -0.37640762f,   -0.3837203f,  -0.36861235f,  -0.33841395f,
     -0.27953508f,  -0.19937174f,  -0.1335873f,   -0.086116806f},
};
static const float h_tanh_f16_table[4][32] = {
    {0.3481489f,      0.6001214f,      0.7746137f,
     0.88004285f,     0.9544297f,      0.98942584f,
     0.99773914f,     0.9995448f,      0.0f,
     -7.898067e-08f,  -1.7484312e-07f, -3.6532302e-07f,
     -8.91562e-07f,   -2.433173e-06f,  -5.5984538e-06f,
     -1.1384621e-05f, -2.7664491e-05f, -7.443049e-05f,
     -0.00016818746f, -0.0003354535f,  -0.0007858075f,
     -0.001996269f,   -0.0042133685f,  -0.007767439f,
     -0.015864817f,   -0.032491174f,   -0.053271774f,
     -0.07340937f,    -0.08915288f,    -0.06557202f,
     0.016725793f,    0.14106478f},
    {0.65554565f, 0.3498245f, 0.17346212f, 0.08221238f, 0.026823021f, 0.005217595f, 0.0009595883f, 0.00016943166f,
     1.0f,        1.0000068f, 1.0000131f,  1.0000234f,  1.0000479f,   1.0001068f,   1.0002077f,    1.0003661f,
     1.0007454f,  1.001639f,  1.0031344f,  1.0054231f,  1.0106753f,   1.022254f,    1.0399556f,    1.0643018f,
     1.111653f,   1.191594f,  1.2750264f,  1.3444659f,  1.3917257f,   1.3371317f,   1.1732165f,    0.95993185f},
    {-0.22875702f,    -0.10491117f,    -0.045427706f,   -0.019080672f,   -0.0053157443f, -0.0008640175f,
     -0.00013642576f, -2.1099677e-05f, -7.4526756e-06f, -0.00021019299f, -0.0003468484f, -0.00053236645f,
     -0.0009146305f,  -0.0016657797f,  -0.0027385685f,  -0.004185158f,   -0.007134986f,  -0.012835777f,
     -0.020794531f,   -0.031242058f,   -0.051682368f,   -0.08866202f,    -0.135827f,     -0.19146673f,
     -0.28387013f,    -0.4122062f,     -0.52399355f,    -0.60387486f,    -0.6512088f,    -0.6090761f,
     -0.5001306f,     -0.3780751f},
    {0.027477682f,   0.01072826f,  0.00403352f,  0.0014957506f, 0.00035407513f, 4.7968188e-05f, 6.492692e-06f,
     8.7870694e-07f, -0.33296502f, -0.33088008f, -0.32990962f,  -0.32877997f,   -0.32679588f,   -0.323597f,
     -0.31978753f,   -0.3153829f,  -0.30772617f, -0.29558352f,  -0.2814482f,    -0.26553756f,   -0.23899049f,
     -0.19955681f,   -0.1576189f,  -0.11519734f, -0.055017944f, 0.013772715f,   0.06375615f,    0.09441245f,
     0.11023006f,    0.09939097f,  0.075227365f, 0.051925015f},
};
/* u Q(u) with Q as in simd.h, by eighths up to 3.93; relative 2^-15 */
static const float h_gelu_table[4][32] = {
    {0.0f,          -1.0492763e-05f, -0.00021566864f, -0.0010138856f, -0.0026939723f, -0.005018891f, -0.006881093f,
     -0.006173441f, 3.627591e-05f,   0.015035576f,    0.04178808f,    0.082203075f,   0.13653173f,   0.2030392f,
     0.27804324f,   0.356311f,       0.43175325f,     0.49825785f,    0.55051225f,    0.5846694f,    0.5987498f,
     0.59272677f,   0.5683786f,      0.52885115f,     0.4781506f,     0.4205947f,     0.36031896f,   0.30090606f,
     0.24515544f,   0.1949949f,      0.1515116f,      0.11506653f},
    {0.50000054f, 0.5004023f,   0.50362206f,  0.5112588f,   0.52280337f,  0.5352822f,   0.5435395f,    0.5410988f,
     0.5214236f,  0.47927228f,  0.41187078f,  0.31964457f,  0.20636946f,  0.078731276f, -0.054602988f, -0.18418765f,
     -0.3010746f, -0.39790556f, -0.46967798f, -0.51410073f, -0.5315344f,  -0.5245742f,  -0.49747002f,  -0.4553653f,
     -0.4036277f, -0.34727377f, -0.2905594f,  -0.23675847f, -0.18810421f, -0.14586078f, -0.11047949f,  -0.08179564f},
    {-0.39908987f, -0.40444115f, -0.42161655f, -0.4461377f, -0.47267172f, -0.49504396f, -0.50726277f,  -0.5044681f,
     -0.48367482f, -0.4441682f,  -0.3875377f,  -0.3173586f, -0.2386078f,  -0.15693355f, -0.077906325f, -0.0063762157f,
     0.054000724f, 0.10100326f,  0.13386789f,  0.15312798f, 0.16032363f,  0.1576428f,   0.14758454f,   0.13263334f,
     0.115033396f, 0.096639775f, 0.078850836f, 0.06261018f, 0.048455678f, 0.03659643f,  0.02699968f,   0.019474199f},
    {0.0062552006f,  0.03184973f,    0.06300793f,     0.0894332f,    0.109831385f,  0.1232281f,    0.12926166f,
     0.12820001f,    0.12087026f,    0.108520746f,    0.092653245f,  0.074845746f,  0.056590367f,  0.039164916f,
     0.02354821f,    0.010384186f,   -1.3331816e-05f, -0.007619618f, -0.012636526f, -0.015420336f, -0.016410396f,
     -0.016066227f,  -0.014821931f,  -0.013052086f,   -0.011056237f, -0.009054905f, -0.007194902f, -0.00556064f,
     -0.0041879546f, -0.0030781254f, -0.0022104168f,  -0.0015522602f},
};
/* Q(u) - u density(u) likewise; 2^-16.5 of it, or of 0.02 near its root */
static const float h_slope_table[4][32] = {
    {0.5f,         0.50000584f,  0.5002149f,  0.5015759f,  0.5061482f,   0.5169604f,   0.5355709f,   0.56338686f,
     0.6012741f,   0.6423707f,   0.6785905f,  0.6992716f,  0.6931707f,   0.65073377f,  0.56618935f,  0.43905163f,
     0.27464753f,  0.08356314f,  -0.1198564f, -0.3195975f, -0.500283f,   -0.64917886f, -0.75755036f, -0.82131964f,
     -0.84228927f, -0.82401496f, -0.7741568f, -0.7013975f, -0.61475384f, -0.5224765f,  -0.43138108f, -0.34651712f},
    {-0.7978851f, -0.79808676f, -0.8012104f,  -0.8139292f,  -0.84482366f, -0.9018484f, -0.982598f,  -1.0854977f,
     -1.2071822f, -1.3235985f,  -1.4155191f,  -1.4632434f,  -1.4509708f,  -1.3699199f, -1.219982f,  -1.009821f,
     -0.7554313f, -0.47755986f, -0.19856335f, 0.060653415f, 0.28317833f,  0.4576649f,  0.57881534f, 0.64701325f,
     0.6685811f,  0.6507891f,   0.6039346f,   0.5380752f,   0.46246755f,  0.38474962f, 0.31061536f, 0.2438085f},
    {3.6313973e-05f, 0.0023478863f, 0.018127453f, 0.05798737f,  0.12779906f, 0.22826147f,  0.34519342f,
     0.47219235f,    0.60256845f,   0.7125588f,   0.7903543f,   0.8270751f,  0.818855f,    0.7672428f,
     0.6785858f,     0.5627631f,    0.4315309f,   0.2968185f,   0.16925025f, 0.057102606f, -0.034258213f,
     -0.10242341f,   -0.14757274f,  -0.17188591f, -0.17928053f, -0.1735062f, -0.15882803f, -0.13895562f,
     -0.11696196f,   -0.09514228f,  -0.07503095f, -0.05749954f},
    {0.26528254f,   0.25621858f,   0.22921905f,   0.18731292f,   0.13455124f,   0.07542928f,   0.018917369f,
     -0.033376403f, -0.07997569f,  -0.11463547f,  -0.13659222f,  -0.1460131f,   -0.14418f,     -0.13322204f,
     -0.115744114f, -0.09446273f,  -0.07189255f,  -0.050119653f, -0.030673932f, -0.014498773f, -0.001994247f,
     0.006883124f,  0.012492237f,  0.015381738f,  0.016226854f,  0.0156021565f, 0.014069313f,  0.0120704295f,
     0.009937719f,  0.0078956215f, 0.0060769175f, 0.004543322f},
};

/* y with the sign of x, which `sign` selects */
LAC_INLINE __m512i h_signed(__m512i y, __m512i x, __m512i sign) { return _mm512_ternarylogic_epi32(y, x, sign, 0xd8); }
LAC_INLINE __m512 h_cubic(const float (*table)[32], __m512 u)
{
    __m512i i = _mm512_castps_si512(_mm512_add_ps(u, _mm512_set1_ps(0x1.8p20f))); /* the last bit of the sum is 1/8 */
    __m512 y = _mm512_fmadd_ps(h_entry(table[3], i), u, h_entry(table[2], i));
    y = _mm512_fmadd_ps(y, u, h_entry(table[1], i));
    return _mm512_fmadd_ps(y, u, h_entry(table[0], i));
}

/* what is beyond: out of line, so that the loops keep their registers */
#define H_FAR(name, scalar)                                                                                            \
    static __attribute__((noinline)) __m512i name(int half, const uint16_t *words)                                     \
    {                                                                                                                  \
        float line[HALF_LINE];                                                                                         \
        __m512 x[2];                                                                                                   \
        h_take(half, words, x);                                                                                        \
        memcpy(line, x, sizeof line);                                                                                  \
        _Pragma("omp simd") for (int k = 0; k < HALF_LINE; k++) line[k] = scalar(line[k]);                             \
        memcpy(x, line, sizeof line);                                                                                  \
        return h_join(half, x);                                                                                        \
    }
H_FAR(h_exp_far, v_expf)
H_FAR(h_sigmoid_far, v_sigmoidf)
H_FAR(h_silu_far, f_silu)
#undef H_FAR
static __attribute__((noinline)) __m512i h_silu_bwd_far(int half, const uint16_t *words, const uint16_t *g)
{
    float line[HALF_LINE];
    __m512 x[2], s[2];
    h_take(half, words, x);
    h_take(half, g, s);
    memcpy(line, x, sizeof line);
    _Pragma("omp simd") for (int k = 0; k < HALF_LINE; k++) line[k] = f_silu_grad(line[k]);
    for (int k = 0; k < 2; k++) s[k] = _mm512_mul_ps(s[k], _mm512_loadu_ps(line + 16 * k));
    return h_join(half, s);
}
/* u Q(u), for u >= 3.9: e^(-u^2/2) times a cubic in 1/u^2, relative 2^-18; 0 from 13.2 on. *density: of the normal
 * distribution, *inverse: 1/u, 2^-14 */
LAC_INLINE __m512 h_tail(int half, __m512 u, __m512 *density, __m512 *inverse)
{
    __m512 z = _mm512_mul_ps(u, u), s = _mm512_rcp14_ps(z);
    __m512 h = _mm512_min_ps(_mm512_set1_ps(87.0f), _mm512_mul_ps(z, _mm512_set1_ps(0.5f))); /* NaN passes */
    __m512 e = h_power(half, h, true);
    e = _mm512_mask_mov_ps(e, _mm512_cmp_ps_mask(u, _mm512_set1_ps(13.2f), _CMP_GT_OQ), _mm512_setzero_ps());
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(-2.7996929f), s, _mm512_set1_ps(1.0782317f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-0.39710996f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(0.39893392f));
    *density = _mm512_mul_ps(e, _mm512_set1_ps(0.398942280f));
    *inverse = _mm512_rsqrt14_ps(z);
    return _mm512_mul_ps(e, p);
}
static __attribute__((noinline)) __m512i h_gelu_far(int half, const uint16_t *line)
{
    __m512 x[2], density, inverse;
    h_take(half, line, x);
    for (int k = 0; k < 2; k++)
        x[k] = _mm512_sub_ps(_mm512_setzero_ps(), h_tail(half, _mm512_abs_ps(x[k]), &density, &inverse));
    return h_join(half, x);
}
static __attribute__((noinline)) __m512i h_gelu_bwd_far(int half, const uint16_t *line, const uint16_t *g)
{
    __m512 x[2], s[2], density, inverse;
    h_take(half, line, x);
    h_take(half, g, s);
    for (int k = 0; k < 2; k++) {
        __m512 u = _mm512_abs_ps(x[k]), most = _mm512_min_ps(_mm512_set1_ps(14.0f), u); /* no infinity times 0 */
        __m512 d = h_tail(half, u, &density, &inverse);
        d = _mm512_fnmadd_ps(most, density, _mm512_mul_ps(d, inverse));
        __mmask16 up = _mm512_testn_epi32_mask(_mm512_castps_si512(x[k]), _mm512_set1_epi32(INT32_MIN));
        s[k] = _mm512_mul_ps(s[k], _mm512_mask_sub_ps(d, up, _mm512_set1_ps(1.0f), d));
    }
    return h_join(half, s);
}

/* places of |x| > bound, of NaN as well */
LAC_INLINE __mmask32 h_beyond(__m512i w, int bound)
{
    return _mm512_cmpgt_epu16_mask(_mm512_add_epi16(w, w), _mm512_set1_epi16((short)(2 * bound)));
}
enum { H_EXP_BF16 = 0x42ae, H_EXP_F16 = 0x5400, H_GELU_BF16 = 0x407b, H_GELU_F16 = 0x43dc }; /* 87, 64, 3.92, 3.93 */
enum { H_QUARTIC_BF16 = 0x40f7, H_QUARTIC_F16 = 0x47bf };                                    /* the last below 7.75 */

/* 0 for what is below 0: -0 and NaN are not */
LAC_INLINE __m512i h_relu(int half, const uint16_t *line)
{
    __m512i w = _mm512_loadu_si512(line), from = _mm512_add_epi16(w, _mm512_set1_epi16(0x7fff)); /* from -0's next on */
    const int most = half == 2 ? 0x7f7f : 0x7bff;                                                /* -inf there */
    return _mm512_maskz_mov_epi16(_mm512_cmpgt_epu16_mask(from, _mm512_set1_epi16((short)most)), w);
}

/* y, but `values` where far */
#define H_OR_FAR(y, far, values) (__builtin_expect(far, 0) ? _mm512_mask_mov_epi16(y, far, values) : (y))

/* a function of a line by one of floats */
#define H_MAP(name, near)                                                                                              \
    LAC_INLINE __m512i name(int half, const uint16_t *line)                                                            \
    {                                                                                                                  \
        __mmask32 far = h_beyond(_mm512_loadu_si512(line), half == 2 ? H_EXP_BF16 : H_QUARTIC_F16);                    \
        __m512 x[2];                                                                                                   \
        h_take(half, line, x);                                                                                         \
        x[0] = near(half, x[0]);                                                                                       \
        x[1] = near(half, x[1]);                                                                                       \
        __m512i y = h_join(half, x);                                                                                   \
        return H_OR_FAR(y, far, name##_far(half, line));                                                               \
    }
H_MAP(h_sigmoid, h_sigmoid_near)
H_MAP(h_silu, h_silu_near)
#undef H_MAP
#define H_SILU_BWD /* with AVX2 it goes by floats */
LAC_INLINE __m512i h_silu_bwd(int half, const uint16_t *line, const uint16_t *g)
{
    __mmask32 far = h_beyond(_mm512_loadu_si512(line), half == 2 ? H_QUARTIC_BF16 : H_QUARTIC_F16);
    __m512 x[2], s[2];
    h_take(half, line, x);
    h_take(half, g, s);
    for (int k = 0; k < 2; k++) s[k] = _mm512_mul_ps(s[k], h_quartic(h_silu_slope_table, x[k]));
    __m512i y = h_join(half, s);
    return H_OR_FAR(y, far, h_silu_bwd_far(half, line, g));
}
LAC_INLINE __m512i h_exp(int half, const uint16_t *line)
{
    __m512i y, w = _mm512_loadu_si512(line);
    __mmask32 far = h_beyond(w, half == 2 ? H_EXP_BF16 : H_EXP_F16);
    if (half == 2) {
        y = h_exp_bf16(w);
    } else {
        __m512 x[2];
        h_take(half, line, x);
        x[0] = h_power(half, x[0], false);
        x[1] = h_power(half, x[1], false);
        y = h_join(half, x);
    }
    return H_OR_FAR(y, far, h_exp_far(half, line));
}

/* tanh has no end: its argument is clamped, and NaN passes */
LAC_INLINE __m512i h_tanh_bf16(__m512i w)
{
    __m512i a = _mm512_and_si512(w, _mm512_set1_epi16(0x7fff)), u = _mm512_min_epu16(a, _mm512_set1_epi16(0x407f));
    __mmask32 nan = _mm512_cmpgt_epu16_mask(a, _mm512_set1_epi16(0x7f80));
    __m512i at = _mm512_srli_epi32(_mm512_max_epu16(u, _mm512_set1_epi16(0x3c80)), 5); /* from 2^-6 on */
    __m512 x[2];
    h_split(u, x);
    for (int k = 0; k < 2; k++, at = _mm512_srli_epi32(at, 16)) {
        __m512 y = _mm512_fmadd_ps(h_entry(h_tanh_bf16_table[2], at), x[k], h_entry(h_tanh_bf16_table[1], at));
        x[k] = _mm512_fmadd_ps(y, x[k], h_entry(h_tanh_bf16_table[0], at));
    }
    return _mm512_mask_mov_epi16(h_signed(h_join(2, x), w, _mm512_set1_epi16((short)0x8000)), nan, w);
}
LAC_INLINE __m512 h_tanh_f16(__m512 x)
{
    __m512 u = _mm512_min_ps(_mm512_set1_ps(7.99f), _mm512_abs_ps(x)); /* NaN passes as the second argument */
    __m512i at = _mm512_max_epi32(_mm512_castps_si512(u), _mm512_castps_si512(_mm512_set1_ps(0x1p-5f)));
    at = _mm512_srli_epi32(at, 21);
    __m512 y = _mm512_fmadd_ps(h_entry(h_tanh_f16_table[3], at), u, h_entry(h_tanh_f16_table[2], at));
    y = _mm512_fmadd_ps(y, u, h_entry(h_tanh_f16_table[1], at));
    y = _mm512_fmadd_ps(y, u, h_entry(h_tanh_f16_table[0], at));
    return _mm512_castsi512_ps(h_signed(_mm512_castps_si512(y), _mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN)));
}
LAC_INLINE __m512i h_tanh(int half, const uint16_t *line)
{
    if (half == 2) return h_tanh_bf16(_mm512_loadu_si512(line));
    __m512 x[2];
    h_take(half, line, x);
    x[0] = h_tanh_f16(x[0]);
    x[1] = h_tanh_f16(x[1]);
    return h_join(half, x);
}

/* tanh of bf16, 64 values at once, where the processor looks bytes up: rounded exactly. The bits of x less those of
 * tanh x are a byte, for |x| from 1/16 to 4: six tables, one for each exponent. 0 below, 1 beyond. */
static const uint8_t h_tanh_less[6][2 * V_LINE] = {
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
     0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2,
     2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3,
     4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5},
    {5,  4,  3,  3,  3,  3,  3,  3,  3,  3,  3,  3,  3,  3,  4,  4,  4,  4,  4,  4,  4,  4,  4,  4,  4,  4,
     4,  5,  5,  5,  5,  5,  5,  5,  5,  5,  5,  5,  6,  6,  6,  6,  6,  6,  6,  6,  6,  7,  7,  7,  7,  7,
     7,  7,  7,  7,  8,  8,  8,  8,  8,  8,  8,  8,  9,  9,  9,  9,  9,  9,  9,  9,  10, 10, 10, 10, 10, 10,
     10, 11, 11, 11, 11, 11, 11, 11, 12, 12, 12, 12, 12, 12, 13, 13, 13, 13, 13, 13, 14, 14, 14, 14, 14, 14,
     15, 15, 15, 15, 15, 16, 16, 16, 16, 16, 17, 17, 17, 17, 17, 18, 18, 18, 18, 18, 19, 19, 19, 19},
    {19, 19, 18, 18, 17, 17, 16, 16, 15, 14, 14, 13, 13, 13, 13, 13, 13, 14, 14, 14, 15, 15, 15, 15, 16, 16,
     16, 17, 17, 17, 17, 18, 18, 18, 19, 19, 19, 20, 20, 20, 21, 21, 21, 22, 22, 22, 23, 23, 23, 24, 24, 24,
     25, 25, 26, 26, 26, 27, 27, 27, 28, 28, 29, 29, 29, 30, 30, 31, 31, 31, 32, 32, 33, 33, 34, 34, 34, 35,
     35, 36, 36, 37, 37, 38, 38, 39, 39, 39, 40, 40, 41, 41, 42, 42, 43, 43, 44, 44, 45, 45, 46, 46, 47, 47,
     48, 48, 49, 49, 50, 50, 51, 52, 52, 53, 53, 54, 54, 55, 55, 56, 56, 57, 58, 58, 59, 59, 60, 60},
    {61,  61,  61,  62,  62,  62,  62,  62,  63,  63,  63,  63,  64,  64,  64,  65,  65,  65,  65,  66,  66,  66,
     67,  67,  68,  68,  68,  69,  69,  70,  70,  70,  71,  71,  72,  72,  73,  73,  74,  74,  75,  75,  76,  76,
     77,  77,  78,  78,  79,  79,  80,  80,  81,  82,  82,  83,  83,  84,  85,  85,  86,  86,  87,  88,  88,  89,
     90,  90,  91,  92,  92,  93,  94,  94,  95,  96,  96,  97,  98,  98,  99,  100, 101, 101, 102, 103, 103, 104,
     105, 106, 106, 107, 108, 109, 109, 110, 111, 112, 113, 113, 114, 115, 116, 116, 117, 118, 119, 120, 121, 121,
     122, 123, 124, 125, 125, 126, 127, 128, 129, 130, 130, 131, 132, 133, 134, 135, 135, 136},
    {137, 138, 139, 139, 140, 141, 142, 142, 143, 144, 145, 146, 146, 147, 148, 149, 150, 150, 151, 152, 153, 154,
     155, 156, 156, 157, 158, 159, 160, 161, 162, 163, 163, 164, 165, 166, 167, 168, 169, 170, 171, 172, 173, 173,
     174, 175, 176, 177, 178, 179, 180, 181, 182, 183, 184, 185, 186, 187, 188, 188, 189, 190, 191, 192, 193, 194,
     195, 196, 197, 198, 199, 200, 201, 202, 203, 204, 205, 206, 207, 208, 209, 210, 211, 212, 213, 214, 215, 216,
     217, 218, 219, 220, 221, 222, 222, 223, 224, 225, 226, 227, 228, 229, 230, 231, 232, 233, 234, 235, 236, 237,
     238, 239, 240, 241, 242, 243, 244, 245, 246, 247, 248, 249, 250, 251, 252, 253, 254, 255},
};
#define H_BYTES __attribute__((target("avx512vbmi")))
LAC_INLINE H_BYTES __m512i h_byte(const uint8_t *table, __m512i t)
{
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), t, _mm512_loadu_si512(table + V_LINE));
}
/* the lower or the upper bytes of the words of both, as unpacking puts words back */
LAC_INLINE H_BYTES __m512i h_bytes(__m512i a, __m512i b, bool upper)
{
    const __m512i one = _mm512_set1_epi8(1), lane = _mm512_set_epi64(48, 48, 32, 32, 16, 16, 0, 0);
    __m512i at = _mm512_set4_epi32(0x4e4c4a48, 0x46444240, 0x0e0c0a08, 0x06040200);
    at = _mm512_add_epi8(at, _mm512_shuffle_epi8(lane, _mm512_set4_epi32(0x08080808, 0x08080808, 0, 0)));
    return _mm512_permutex2var_epi8(a, upper ? _mm512_add_epi8(at, one) : at, b);
}
LAC_INLINE H_BYTES void h_tanh_bytes(const uint16_t *line, __m512i *y)
{
    const __m512i sign = _mm512_set1_epi16((short)0x8000), zero = _mm512_setzero_si512();
    __m512i w[2], u[2];
    __mmask32 nan[2];
    for (int k = 0; k < 2; k++) {
        w[k] = _mm512_loadu_si512(line + k * HALF_LINE);
        u[k] = _mm512_andnot_si512(sign, w[k]);
        nan[k] = _mm512_cmpgt_epi16_mask(u[k], _mm512_set1_epi16(0x7f80));
        u[k] = _mm512_min_epi16(u[k], _mm512_set1_epi16(0x407f));
    }
    __m512i at = h_bytes(u[0], u[1], false), two = h_bytes(u[0], u[1], true); /* two: exponents, by twos */
    __mmask64 odd = _mm512_movepi8_mask(at);
    __m512i less =
        _mm512_maskz_mov_epi8(odd & _mm512_cmpeq_epi8_mask(two, _mm512_set1_epi8(0x3d)), h_byte(h_tanh_less[0], at));
    for (int k = 1; k < 6; k += 2) {
        __m512i pair = h_byte(h_tanh_less[k], at);
        if (k < 5) pair = _mm512_mask_mov_epi8(pair, odd, h_byte(h_tanh_less[k + 1], at));
        less = _mm512_mask_mov_epi8(less, _mm512_cmpeq_epi8_mask(two, _mm512_set1_epi8((char)(0x3e + k / 2))), pair);
    }
    u[0] = _mm512_sub_epi16(u[0], _mm512_unpacklo_epi8(less, zero));
    u[1] = _mm512_sub_epi16(u[1], _mm512_unpackhi_epi8(less, zero));
    for (int k = 0; k < 2; k++) y[k] = _mm512_mask_mov_epi16(h_signed(u[k], w[k], sign), nan[k], w[k]);
}

/* gelu(x) = relu(x) - u Q(u), for x > 3.92 with the last Q; NaN comes through relu if it is positive */
LAC_INLINE __m512i h_gelu(int half, const uint16_t *line)
{
    const int bound = half == 2 ? H_GELU_BF16 : H_GELU_F16;
    __m512i w = _mm512_loadu_si512(line);
    __mmask32 far = _mm512_cmpgt_epu16_mask(w, _mm512_set1_epi16((short)(0x8000 | bound)));
    __m512 u[2], x[2];
    if (half == 2) {
        __m512i a = _mm512_and_si512(w, _mm512_set1_epi16(0x7fff));
        h_split(_mm512_min_epu16(a, _mm512_set1_epi16(bound)), u);
        h_split(_mm512_max_epi16(w, _mm512_setzero_si512()), x);
    } else {
        h_take(half, line, x);
        for (int k = 0; k < 2; k++) {
            __m512i b = _mm512_castps_si512(x[k]), most = _mm512_castps_si512(_mm512_set1_ps(3.9296875f));
            u[k] = _mm512_castsi512_ps(_mm512_min_epi32(_mm512_and_si512(b, _mm512_set1_epi32(INT32_MAX)), most));
            x[k] = _mm512_castsi512_ps(_mm512_max_epi32(b, _mm512_setzero_si512()));
        }
    }
    for (int k = 0; k < 2; k++) x[k] = _mm512_sub_ps(x[k], h_cubic(h_gelu_table, u[k]));
    __m512i y = h_join(half, x);
    return H_OR_FAR(y, far, h_gelu_far(half, line));
}
/* the gradient: g times the slope, which is Q(u) - u density(u) or, for x > 0, 1 less that */
LAC_INLINE __m512i h_gelu_bwd(int half, const uint16_t *line, const uint16_t *g)
{
    __m512i w = _mm512_loadu_si512(line);
    __mmask32 far = h_beyond(w, half == 2 ? H_GELU_BF16 : H_GELU_F16);
    __mmask16 up[2];
    __m512 u[2], s[2];
    h_take(half, g, s);
    if (half == 2) {
        h_split(_mm512_and_si512(w, _mm512_set1_epi16(0x7fff)), u);
        up[0] = _mm512_testn_epi32_mask(w, _mm512_set1_epi32(0x8000));
        up[1] = _mm512_testn_epi32_mask(w, _mm512_set1_epi32(INT32_MIN));
    } else {
        h_take(half, line, u);
        for (int k = 0; k < 2; k++) {
            up[k] = _mm512_testn_epi32_mask(_mm512_castps_si512(u[k]), _mm512_set1_epi32(INT32_MIN));
            u[k] = _mm512_abs_ps(u[k]);
        }
    }
    for (int k = 0; k < 2; k++) {
        __m512 d = h_cubic(h_slope_table, u[k]);
        s[k] = _mm512_mul_ps(s[k], _mm512_mask_sub_ps(d, up[k], _mm512_set1_ps(1.0f), d));
    }
    __m512i y = h_join(half, s);
    return H_OR_FAR(y, far, h_gelu_bwd_far(half, line, g));
}
#endif

#endif
