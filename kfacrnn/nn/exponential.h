/* exp and what is made of it, for type `real`, which is float or double: inline, so that loops over them vectorise. */

#include <stdint.h>
#include <string.h>

/* exp(x) - less, less being 0 or 1, of x in a range in which that is a normal number; other x count as its ends. As
   exp and expm1 but, unlike them, done for several x at once: x = n ln 2 + r, then Taylor's series in r. */
static inline real exponential(real x, real less)
{
    static const double inverse_factorials[] = {
        1.0,         1.0,          1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,       1.0 / 720,
        1.0 / 5040,  1.0 / 40320,  1.0 / 362880,  1.0 / 3628800,  1.0 / 39916800,  1.0 / 479001600, 1.0 / 6227020800,
    };
    const int is_float = sizeof(real) == sizeof(float);
    const real largest = is_float ? 87 : 708;
    const real rounding = is_float ? 12582912.0 : 6755399441055744.0; /* 1.5 * 2^23 or 2^52 leaves n in the low bits */
    const real ln2 = is_float ? 0.693359375 : 0.693147180369123816490; /* short of bits, so that n * ln2 is exact */
    const real ln2_rest = is_float ? -2.12194440e-4 : 1.90821492927058770002e-10;
    x = x < -largest ? -largest : x > largest ? largest : x; /* lets NaN through */
    const real shifted = x * (real)1.44269504088896340736 + rounding, n = shifted - rounding;
    const real r = (x - n * ln2) - n * ln2_rest;
    real series = inverse_factorials[is_float ? 7 : 13], power;
    for (int k = is_float ? 6 : 12; k > 0; k--) series = series * r + (real)inverse_factorials[k];
    if (is_float) {
        uint32_t bits;
        memcpy(&bits, &shifted, sizeof power);
        bits = (bits << 23) + 0x3f800000u;
        memcpy(&power, &bits, sizeof power);
    } else {
        uint64_t bits;
        memcpy(&bits, &shifted, sizeof power);
        bits = (bits << 52) + 0x3ff0000000000000u;
        memcpy(&power, &bits, sizeof power);
    }
    return power * (series * r) + (power - less);
}

static inline real sigmoid(real x) { return 1 / (1 + exponential(-x, 0)); }

static inline real hyperbolic_tangent(real x)
{
    const real e = exponential(2 * x, 1);
    return e / (e + 2);
}
