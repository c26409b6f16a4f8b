/* exp, so that the compiler can vectorize it, included once for each REAL.
 *
 *   exp(x - base) 2^-n = 2^(k - n) exp(r),   k = round((x - base) log2 e),   r = (x - base) - k ln 2
 *
 * A reference m = base + n ln 2 instead of a plain maximum: base is 0 for all but huge logits, so no rounded x - m ever
 * enters exp (at a distance of 20 that alone costs 8 ulp of float32), and the distance from m to the true maximum costs
 * no accuracy. Where base is not 0, |base| >= CE_BASE_LIMIT and x - base is exact for every x that does not underflow
 * (Sterbenz).
 *
 * k ln 2 is subtracted in parts whose products with k are exact (|k| < 2^13: 11 bits, 11 bits, the rest), or by FMA.
 * exp(r) is a polynomial, near-minimax on |r| <= 0.347: relative error 2^-28.3 (degree 6), 2^-57.9 (degree 11).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef CE_VECMATH_COMMON
#define CE_VECMATH_COMMON
#define CE_BASE_LIMIT 4096.0
#define CE_LOG2E 1.44269504088896340736
#define CE_LN2_HI 0x1.62e42feep-1 /* 32 bits: exact times any |k| < 2^20 */
#define CE_LN2_LO 0x1.a39ef35793c76p-33

/* exp(d) 2^-n in double precision, for the few scalars of a row */
CE_INLINE double ce_exp_scaled(double d, int64_t n)
{
    if (!(d > -1e5)) /* zero, and NaN passes */
        return d != d ? d : 0.0;
    double k = rint(d * CE_LOG2E);
    double r = (d - k * CE_LN2_HI) - k * CE_LN2_LO;
    return ldexp(exp(r), (int)(k - (double)n));
}
#endif

typedef struct {
    REAL base, cutoff; /* x - base < cutoff: the result is 0, for it would be subnormal (20 to 40 times slower) */
    UINT shift;        /* exponent bias - n - the integer bits of MAGIC */
} NAME(exp_args);

#if REAL_IS_FLOAT
#define MAGIC 0x1.8p23f /* adding it rounds to an integer, held in the low bits */
#define MANTISSA 23
#define BIAS 127
#define MAGIC_BITS 0x4B400000u
#else
#define MAGIC 0x1.8p52
#define MANTISSA 52
#define BIAS 1023
#define MAGIC_BITS 0x4338000000000000u
#endif

CE_INLINE NAME(exp_args) NAME(exp_prepare)(double base, int64_t n)
{
    NAME(exp_args) a;
    a.base = (REAL)base;
    a.cutoff = (REAL)((double)(n - BIAS + 2) * 0.6931471805599453);
    a.shift = (UINT)BIAS - (UINT)n - MAGIC_BITS;
    return a;
}

CE_INLINE REAL NAME(exp)(REAL x, NAME(exp_args) a)
{
    REAL d = x - a.base;
    REAL t = d * (REAL)CE_LOG2E + MAGIC;
    REAL k = t - MAGIC;
#if REAL_IS_FLOAT
#if CE_HAVE_FMA
    REAL r = (d - k * 0x1.62e43p-1f) - k * -0x1.05c61p-29f;
#else
    REAL r = ((d - k * 0x1.62cp-1f) - k * 0x1.214p-12f) - k * 0x1.fbe8e8p-23f;
#endif
    REAL p = 0x1.6a22bap-10f;
    p = p * r + 0x1.123a98p-7f;
    p = p * r + 0x1.5558f6p-5f;
    p = p * r + 0x1.555490p-3f;
    p = p * r + 0x1.fffffcp-2f;
#else
    REAL r = (d - k * CE_LN2_HI) - k * CE_LN2_LO;
    REAL p = 0x1.ad7fab91606afp-26;
    p = p * r + 0x1.28adef591de38p-22;
    p = p * r + 0x1.71df25f5aabe7p-19;
    p = p * r + 0x1.a019998a28c10p-16;
    p = p * r + 0x1.a01a0129b33e0p-13;
    p = p * r + 0x1.6c16c1845839ap-10;
    p = p * r + 0x1.1111111127eddp-7;
    p = p * r + 0x1.55555555507b3p-5;
    p = p * r + 0x1.55555555554f9p-3;
    p = p * r + 0x1.000000000000ap-1;
#endif
    p = p * r + (REAL)1;
    p = p * r + (REAL)1;
    UINT bits;
    memcpy(&bits, &t, sizeof bits);
    bits = (bits + a.shift) << MANTISSA;
    REAL power;
    memcpy(&power, &bits, sizeof power);
    return d < a.cutoff ? (REAL)0 : p * power; /* NaN passes, -inf gives 0 */
}

#undef MAGIC
#undef MANTISSA
#undef BIAS
#undef MAGIC_BITS
