/* exp, so that the compiler can vectorize it, included once for each REAL.
 *
 *   exp((x - base) / T) 2^-n = 2^(k - n) exp(r / T),   k = round((x - base) / T log2 e),   r = (x - base) - k T ln 2
 *
 * The temperature T enters only the constants and r, which is small: no rounded x / T enters exp either.
 *
 * A reference m = base + n T ln 2 instead of a plain maximum: base is 0 for all but huge logits, so no rounded x - m ever
 * enters exp (at a distance of 20 that alone costs 8 ulp of float32), and the distance from m to the true maximum costs
 * no accuracy. Where base is not 0, |base| >= CE_BASE_LIMIT and x - base is exact for every x that does not underflow
 * (Sterbenz).
 *
 * k T ln 2 is subtracted in parts whose products with k are exact (|k| < 2^13: 11 bits, 11 bits, the rest), or by FMA.
 * exp(r / T) is a polynomial, near-minimax on |r| <= 0.347: relative error 2^-28.3 (degree 6), 2^-57.9 (degree 11).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef CE_VECMATH_COMMON
#define CE_VECMATH_COMMON
#define CE_BASE_LIMIT 4096.0
#define CE_TEMPERATURE_1 ((ce_temperature){1, 0x1.71547652b82fep0, 0x1.62e42feep-1, 0x1.a39ef35793c76p-33})

/* exp(d / T) 2^-n in double precision, for the few scalars of a row */
CE_INLINE double ce_exp_scaled(double d, int64_t n, const ce_temperature *t)
{
    if (!(d > -1e5 * t->value)) /* zero, and NaN passes */
        return d != d ? d : 0.0;
    double k = rint(d * t->log2e);
    double r = ((d - k * t->ln2_high) - k * t->ln2_low) / t->value;
    return ldexp(exp(r), (int)(k - (double)n));
}

/* the first bits of v's mantissa */
CE_INLINE double ce_leading(double v, int bits)
{
    uint64_t u;
    memcpy(&u, &v, sizeof u);
    u &= ~(uint64_t)0 << (53 - bits);
    memcpy(&v, &u, sizeof u);
    return v;
}
#endif

typedef struct {
    REAL base, cutoff; /* x - base < cutoff: the result is 0, for it would be subnormal (20 to 40 times slower) */
    REAL log2e, ln2_a, ln2_b, ln2_c, inverse; /* log2 e / T, T ln 2 in parts, 1 / T */
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

CE_INLINE NAME(exp_args) NAME(exp_prepare)(double base, int64_t n, const ce_temperature *t)
{
    double ln2 = t->ln2_high + t->ln2_low;
    NAME(exp_args) a;
    a.base = (REAL)base;
    a.cutoff = (REAL)((double)(n - BIAS + 2) * ln2);
    a.log2e = (REAL)t->log2e;
    a.inverse = (REAL)(1 / t->value);
#if !REAL_IS_FLOAT
    a.ln2_a = t->ln2_high;
    a.ln2_b = t->ln2_low;
#elif CE_HAVE_FMA
    a.ln2_a = (REAL)ln2;
    a.ln2_b = (REAL)(ln2 - (double)a.ln2_a);
#else
    double b = ln2 - ce_leading(ln2, 11);
    a.ln2_a = (REAL)(ln2 - b);
    a.ln2_b = (REAL)ce_leading(b, 11);
    a.ln2_c = (REAL)(b - ce_leading(b, 11));
#endif
    a.shift = (UINT)BIAS - (UINT)n - MAGIC_BITS;
    return a;
}

CE_INLINE REAL NAME(exp)(REAL x, NAME(exp_args) a)
{
    REAL d = x - a.base;
    REAL t = d * a.log2e + MAGIC;
    REAL k = t - MAGIC;
    REAL r = (d - k * a.ln2_a) - k * a.ln2_b;
#if REAL_IS_FLOAT && !CE_HAVE_FMA
    r -= k * a.ln2_c;
#endif
    r *= a.inverse;
#if REAL_IS_FLOAT
    REAL p = 0x1.6a22bap-10f;
    p = p * r + 0x1.123a98p-7f;
    p = p * r + 0x1.5558f6p-5f;
    p = p * r + 0x1.555490p-3f;
    p = p * r + 0x1.fffffcp-2f;
#else
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

/* The arguments for the reference n T ln 2 of one lane among others, n an integer. */
CE_INLINE NAME(exp_args) NAME(exp_of_lane)(NAME(exp_args) a, REAL ln2, REAL n)
{
    REAL t = n + MAGIC;
    UINT bits;
    memcpy(&bits, &t, sizeof bits); /* MAGIC_BITS + n */
    a.cutoff = (n - (REAL)(BIAS - 2)) * ln2;
    a.shift = (UINT)BIAS - bits;
    return a;
}

/* to the nearest integer, |v| < 2^22 */
CE_INLINE REAL NAME(round)(REAL v)
{
    return (v + MAGIC) - MAGIC;
}

/* 2 atanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), to the last term that counts: terms for |s| <= 1/3 (log1p) */
#if REAL_IS_FLOAT
#define ATANH_TERMS 8
#else
#define ATANH_TERMS 17
#endif

CE_INLINE REAL NAME(atanh_series)(REAL s, int terms)
{
    REAL v = s * s, sum = 0;
#pragma GCC unroll 17
    for (int i = terms; i > 0; i--)
        sum = (sum + (REAL)1 / (REAL)(2 * i + 1)) * v;
    return 2 * (s + s * sum);
}

CE_INLINE REAL NAME(twice_atanh)(REAL s)
{
    return NAME(atanh_series)(s, ATANH_TERMS);
}

#if !REAL_IS_FLOAT
/* log v = k ln 2 + 2 atanh((f - 1) / (f + 1)) of a normal v = 2^k f, sqrt(1/2) <= f < sqrt(2); within 1.5 ulp or 2^-54 */
CE_INLINE double NAME(log)(double v)
{
    const uint64_t root = 0x3fe6a09e667f3bcd, two52 = 0x4330000000000000;
    uint64_t bits, above, exponent, mantissa;
    double k, f;
    memcpy(&bits, &v, sizeof bits);
    above = bits + (0x3ff0000000000000 - root);
    exponent = (above >> 52) | two52;
    mantissa = (above & 0xfffffffffffff) + root;
    memcpy(&k, &exponent, sizeof k);
    memcpy(&f, &mantissa, sizeof f);
    k -= 0x1p52 + 1023;
    return k * 0x1.62e42feep-1 + (NAME(atanh_series)((f - 1) / (f + 1), 10) + k * 0x1.a39ef35793c76p-33);
}
#endif

/* exp(x) - 1 for -0.5 <= x <= 0, by its series */
CE_INLINE REAL NAME(expm1)(REAL x)
{
    REAL sum = 1;
#pragma GCC unroll 14
    for (int i = 14; i > 1; i--)
        sum = 1 + sum * (x * ((REAL)1 / (REAL)i));
    return x * sum;
}

/* log(1 + e) for 0 <= e <= 1, exact also where e is tiny */
CE_INLINE REAL NAME(log1p)(REAL e)
{
    return NAME(twice_atanh)(e / (2 + e));
}

/* k and f of a normal number v = 2^k f, 0.5 < f <= 1 */
CE_INLINE REAL NAME(split)(REAL v, REAL *f)
{
    UINT bits;
    memcpy(&bits, &v, sizeof bits);
    int k = (int)((bits - 1) >> MANTISSA) - (BIAS - 1);
    bits -= (UINT)(SINT)k << MANTISSA;
    memcpy(f, &bits, sizeof bits);
    return (REAL)k;
}

/* 2^n of an integer n <= 0; 0 where it would be subnormal, and of NaN */
CE_INLINE REAL NAME(exp2)(REAL n)
{
    int exponent = n >= 1 - BIAS && n <= 0 ? (int)n : -BIAS;
    UINT bits = (UINT)(exponent + BIAS) << MANTISSA;
    REAL power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

#undef ATANH_TERMS
#undef MAGIC
#undef MANTISSA
#undef BIAS
#undef MAGIC_BITS
