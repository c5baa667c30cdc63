/* special.h: elementwise mathematics that both back ends compile from the same text.
 *
 * What the C library does element by element and CUDA does its own way is written here once, free of branches, so that
 * a loop over it becomes vector code on every instruction set, and the two back ends agree.
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

#endif
