/* special.h: elementwise mathematics that both back ends compile from the same text.
 *
 * What the C library does element by element and CUDA does its own way is written here once, free of branches, so that
 * a loop over it becomes vector code on every instruction set, and the two back ends agree.
 * Results in f32 are those of f64 or of shorter polynomials in f64, rounded once: within 0.6 units in the last place,
 * but near digamma's roots and lgamma's roots below 0, where it is the terms that the error is measured by. In f64, in
 * the same sense: erfinv 5 units, lgamma 8, digamma and trigamma 6; erfinv's derivative 12 y^2 + 8.
 * SPECIAL is what a function is declared with: static inline on the CPU, a function of the device in CUDA.
 */
#ifndef LAC_SPECIAL_H
#define LAC_SPECIAL_H
#include <math.h>
#include <stdint.h>
#ifndef SPECIAL
#error "define SPECIAL before special.h"
#endif

/* ---- quotients rounded down ---- */

/* floor(x / y), as Python and PyTorch have it: infinite or NaN where y is 0, NaN where x is infinite, and -1 where the
 * signs differ and y is infinite. Floats have 24 bits: the quotient of two of them that is not whole is 2^-24 / |y| or
 * more from what is, which a double sees up to 2^29, where a float has no fractions any more. */
SPECIAL float special_floor_divide_f(float x, float y)
{
    double q = (double)x / (double)y, f = floor(q);
    f = q == 0 && x != 0 && (x < 0) != (y < 0) ? -1.0 : f;
    f = x - x == 0 ? f : (double)NAN;
    return (float)(y == 0 ? q : f);
}
/* the same from r = fmod(x, y), whose quotient (x - r) / y is whole but for its rounding */
SPECIAL double special_floor_divide_d(double x, double y, double r)
{
    double q = (x - r) / y;
    q = r != 0 && (r < 0) != (y < 0) ? q - 1 : q;
    double f = floor(q);
    f = q - f > 0.5 ? f + 1 : f;
    return y == 0 ? x / y : f;
}

/* ---- the inverse of erf ----
 *
 * With w = -log(1 - x^2), erfinv(x) / x is a smooth function of w; where |x| is near 1, erfinv is one of the root of
 * -log(1 - |x|). Polynomials for the middle (`near`), there and beyond for all of [-1, 1]. */

#define SPECIAL_ERFINV_NEAR_F 0.9966f
SPECIAL double special_erfinv_near_f(float x)
{
    double a = fabs((double)x), t = -SPECIAL_LOG((1 - a) * (1 + a)) - 2.5;
    double p = -8.931925970244222e-09; /* w in 0 to 5: 1e-8 */
    p = p * t + 2.3335967195708108e-08;
    p = p * t + 4.6813134805534123e-07;
    p = p * t - 3.4639852676333717e-06;
    p = p * t - 4.9724196894547514e-06;
    p = p * t + 0.00021834938623976644;
    p = p * t - 0.001252726391773229;
    p = p * t - 0.004177392875203149;
    p = p * t + 0.24664027905463662;
    p = p * t + 1.501409360450329;
    return p * x;
}
SPECIAL double special_erfinv_f(float x)
{
    double a = fabs((double)x), t = sqrt(-SPECIAL_LOG(1 - a)) - 3.2;
    double p = 6.84448659785126e-06; /* 5e-9 */
    p = p * t - 2.150342764312196e-05;
    p = p * t + 5.011738069228692e-05;
    p = p * t - 0.00012138978545833922;
    p = p * t + 0.0002002443636285196;
    p = p * t + 0.00028762560023585615;
    p = p * t - 0.0053284522828759865;
    p = p * t + 1.0395941970483848;
    p = p * t + 2.9228949107269573;
    p = a == 1 ? (double)INFINITY : p;
    return a < (double)SPECIAL_ERFINV_NEAR_F ? special_erfinv_near_f(x) : copysign(p, (double)x);
}
#define SPECIAL_ERFINV_NEAR_D 0.999
SPECIAL double special_erfinv_near_d(double x)
{
    double a = fabs(x), t = -SPECIAL_LOG((1 - a) * (1 + a)) - 3.125, z = a * a;
    double p = -2.362369698566107e-22; /* w in 0 to 6.25: 2e-16 */
    p = p * t - 1.6787330615256773e-19;
    p = p * t + 1.1027771591500033e-18;
    p = p * t + 1.1125794759379464e-17;
    p = p * t - 1.290702354613073e-16;
    p = p * t + 2.166994626283574e-17;
    p = p * t + 6.581955305929239e-15;
    p = p * t - 4.0554139746886e-14;
    p = p * t - 8.106594456438496e-14;
    p = p * t + 2.6335724924608484e-12;
    p = p * t - 1.2977505202014966e-11;
    p = p * t - 5.4154417754696635e-11;
    p = p * t + 1.0512202440121784e-09;
    p = p * t - 4.112633104297614e-09;
    p = p * t - 2.907038666019143e-08;
    p = p * t + 4.2347877672780653e-07;
    p = p * t - 1.3654691796592068e-06;
    p = p * t - 1.3882523361276876e-05;
    p = p * t + 0.0001867342080212427;
    p = p * t - 0.0007407025341669402;
    p = p * t - 0.006033670871427011;
    p = p * t + 0.2401581824255897;
    p = p * t + 1.6536545626831027;
    double q = 0.10550662128212428; /* (erfinv(x) / x - sqrt(pi) / 2) / x^2 for |x| < 1/2: 4e-18 */
    q = q * z - 0.07149491865212719;
    q = q * z + 0.06817372602086855;
    q = q * z + 0.0070964318544930495;
    q = q * z + 0.02840398253201691;
    q = q * z + 0.027471565564100565;
    q = q * z + 0.03174242865628117;
    q = q * z + 0.03646205072856101;
    q = q * z + 0.04283691074721262;
    q = q * z + 0.05173127597421693;
    q = q * z + 0.06495961785882823;
    q = q * z + 0.08655212924043351;
    q = q * z + 0.12755617530560226;
    q = q * z + 0.2320136665346545;
    return (a < 0.5 ? 0.88622692545275801365 + z * q : p) * x;
}
/* erfinv of [-1, 1]: 3 units in the last place */
SPECIAL double special_erfinv_d(double x)
{
    double a = fabs(x), t = sqrt(-SPECIAL_LOG(1 - a)) - 2.6;
    double p = 4.8745419854867685e-06; /* 1e-18 */
    p = p * t + 0.00032801084785239745;
    p = p * t + 0.007539230976189014;
    p = p * t + 0.0837240070586674;
    p = p * t + 0.5169492334176891;
    p = p * t + 1.8786921642545067;
    p = p * t + 4.0121303496195475;
    p = p * t + 4.673374975011301;
    p = p * t + 2.297196469735651;
    double q = 4.874452990736971e-06;
    q = q * t + 0.0003153596654355555;
    q = q * t + 0.006732783051367358;
    q = q * t + 0.06683637655359408;
    q = q * t + 0.35281463751416414;
    q = q * t + 1.0297085382733948;
    q = q * t + 1.5790376253142036;
    q = q * t + 1.0;
    p = a == 1 ? (double)INFINITY : p / q;
    return a < SPECIAL_ERFINV_NEAR_D ? special_erfinv_near_d(x) : copysign(p, x);
}
/* its derivative, from y = erfinv(x), for results in f32 */
SPECIAL double special_erfinv_slope(double y) { return 0.88622692545275801365 * SPECIAL_EXP(y * y); }

/* ---- the gamma function and its logarithm's derivatives ----
 *
 * Above 8 by Stirling's series; below, lgamma is moved to log Gamma(2 + u) of u in [-1/2, 1], divided by its root u: so
 * its roots at 1 and 2 are exact and what is beside them is precise. digamma and trigamma are moved above 8; the sum of
 * fractions that this takes is brought to one denominator. Left of 0 by reflection (Abramowitz and Stegun, 6.1.15 to
 * 6.4.7). */

/* sin and cos of pi x, x finite */
SPECIAL void special_sincos_pi(double x, double *sine, double *cosine)
{
    double d = x - rint(x), z = d * d; /* exact */
    double s = 7.697826768224191e-07;  /* sin(pi d) / d: 1e-18 */
    s = s * z - 2.1903497074626018e-05;
    s = s * z + 0.0004662998161898394;
    s = s * z - 0.007370430505916944;
    s = s * z + 0.0821458865731029;
    s = s * z - 0.5992645293189447;
    s = s * z + 2.5501640398773007;
    s = s * z - 5.167712780049969;
    s = s * z + 3.141592653589793;
    double c = 1.3479054836358117e-07; /* (1 - cos(pi d)) / d^2: 1e-19 */
    c = c * z - 4.301203720851614e-06;
    c = c * z + 0.00010463763434072599;
    c = c * z - 0.0019295742401671152;
    c = c * z + 0.025806891384027284;
    c = c * z - 0.23533063035860233;
    c = c * z + 1.3352627688545824;
    c = c * z - 4.0587121264167685;
    c = c * z + 4.934802200544679;
    *sine = s * d;
    *cosine = 1 - z * c; /* but for its sign, which is that of sin(pi x) / sin(pi d) */
}

/* log Gamma(x), x >= 0 */
SPECIAL double special_lgamma_positive(double x)
{
    double z = x, product = 1;
    for (int k = 0; k < 5; k++) {
        z = z >= 3 ? z - 1 : z;
        product = z < x - k ? product * z : product;
    }
    double u = x < 0.5 ? x : x < 1.5 ? x - 1 : z - 2, t = u - 0.25;
    double p = 8.5699910650775e-09; /* log Gamma(2 + u) / u: 3e-17 */
    p = p * t - 2.024580464728951e-08;
    p = p * t + 2.3850160710733153e-08;
    p = p * t - 5.6970251267594097e-08;
    p = p * t + 1.65431107528329e-07;
    p = p * t - 3.971845009178381e-07;
    p = p * t + 9.392289679994473e-07;
    p = p * t - 2.2805233000703057e-06;
    p = p * t + 5.584129116022191e-06;
    p = p * t - 1.3772558011890478e-05;
    p = p * t + 3.4336129617730365e-05;
    p = p * t - 8.680571322121892e-05;
    p = p * t + 0.00022352008957534215;
    p = p * t - 0.0005901656847461332;
    p = p * t + 0.0016148854201974152;
    p = p * t - 0.004662626670755061;
    p = p * t + 0.014688323717322928;
    p = p * t - 0.054295403852157774;
    p = p * t + 0.29223842821659285;
    p = p * t + 0.4994868595695864;
    double l = SPECIAL_LOG(x < 0.5 ? x * (x + 1) : x < 1.5 || x >= 8 ? x : product);
    p = x < 1.5 ? u * p - l : u * p + l;
    double r = 1 / x, v = r * r;
    double s = 0.005065905360156132; /* (log Gamma(x) - Stirling) x: 6e-19 */
    s = s * v - 0.001890382993887715;
    s = s * v + 0.0008414700852503147;
    s = s * v - 0.0005952365845057049;
    s = s * v + 0.0007936507897524059;
    s = s * v - 0.002777777777773988;
    s = s * v + 0.08333333333333333;
    s = (x - 0.5) * (l - 1) + (0.41893853320467274178 + s * r);
    return x < 8 ? p : s;
}
/* log |Gamma(x)| of any x below 2^-1000 */
SPECIAL double special_lgamma_low(double x)
{
    double s, c;
    special_sincos_pi(x, &s, &c);
    double y = SPECIAL_LOG(3.14159265358979323846 / fabs(s)) - special_lgamma_positive(1 - x);
    y = x < -0x1p1000 ? (double)INFINITY : y; /* whole numbers all, and -inf */
    double tiny = 693.14718055994530942 - SPECIAL_LOG(fabs(x) * 0x1p1000);
    return fabs(x) < 0x1p-1000 ? tiny : y;
}

/* the derivative of log Gamma(x), x >= 0 (-0: of x < 0) */
SPECIAL double special_digamma_positive(double x)
{
    double sum = 1, product = x;
    for (int k = 1; k < 8; k++) {
        sum = sum * (x + k) + product;
        product = product * (x + k);
    }
    double w = x < 8 ? x + 8 : x, r = 1 / w, v = r * r;
    double p = 0.06362150587634356; /* (log x - 1 / 2x - digamma(x)) x^2: 9e-18 */
    p = p * v - 0.020697987372370493;
    p = p * v + 0.007571689620283902;
    p = p * v - 0.0041666448230497;
    p = p * v + 0.0039682539119537084;
    p = p * v - 0.008333333333278636;
    p = p * v + 0.08333333333333333;
    double y = SPECIAL_LOG(w) - (0.5 * r + v * p);
    return x < 8 ? y - sum / product : y;
}
SPECIAL double special_digamma_low(double x) /* x < 0; NaN at its poles */
{
    double s, c;
    special_sincos_pi(x, &s, &c);
    double y = special_digamma_positive(1 - x) - 3.14159265358979323846 * c / s;
    y = x == rint(x) ? (double)NAN : y;
    return x > -0x1p-60 ? -1 / x : y;
}

/* its derivative, x >= 0 */
SPECIAL double special_trigamma_positive(double x)
{
    double product = x * x, sum = 1;
    for (int k = 1; k < 8; k++) {
        double square = (x + k) * (x + k);
        sum = sum * square + product;
        product = product * square;
    }
    double w = x < 8 ? x + 8 : x, r = 1 / w, v = r * r;
    double p = -4.575304142113963; /* (trigamma(x) - 1 / x - 1 / 2x^2) x^3: 4e-18 */
    p = p * v + 1.1093601965597248;
    p = p * v - 0.2523946862734603;
    p = p * v + 0.07575246348177586;
    p = p * v - 0.03333331335581846;
    p = p * v + 0.023809523770911365;
    p = p * v - 0.03333333333330476;
    p = p * v + 0.16666666666666666;
    double y = r + v * (0.5 + r * p);
    return x < 8 ? y + sum / product : y;
}
SPECIAL double special_trigamma_low(double x) /* x < 0 */
{
    double s, c;
    special_sincos_pi(x, &s, &c);
    double cosecant = 3.14159265358979323846 / s;
    return cosecant * cosecant - special_trigamma_positive(1 - x);
}

SPECIAL double special_lgamma(double x) { return x < 0x1p-1000 ? special_lgamma_low(x) : special_lgamma_positive(x); }
SPECIAL double special_digamma(double x) { return x < 0 ? special_digamma_low(x) : special_digamma_positive(x); }
SPECIAL double special_trigamma(double x) { return x < 0 ? special_trigamma_low(x) : special_trigamma_positive(x); }

#endif
