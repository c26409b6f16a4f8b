/* exp, so that the compiler can vectorize it, included once for each REAL.
 *
 *   exp((x - base) / T) 2^-n = 2^(k - n) 2^r,   k + r = (x - base) log2 e / T,   k an integer, |r| <= 1/2
 *
 * The temperature T enters only the constant log2 e / T, of twice the digits: no rounded x / T enters exp either.
 *
 * A reference m = base + n T ln 2 instead of a plain maximum: base is 0 for all but huge logits, so no rounded x - m ever
 * enters exp (at a distance of 20 that alone costs 8 ulp of float32), and the distance from m to the true maximum costs
 * no accuracy. Where base is not 0, |base| >= CE_BASE_LIMIT and x - base is exact for every x that does not underflow
 * (Sterbenz).
 *
 * r comes of FMA, or, without it, of subtracting k T ln 2 in parts whose products with k are exact (|k| < 2^13: 11 bits,
 * 11 bits, the rest). 2 2^r is a polynomial, near-minimax on |r| <= 1/2: relative error 2^-28.3 (degree 6), 2^-57.7 (degree
 * 11); twice, for 2^(k - n - 1) is then the one factor that can be 0, and the product is not subnormal.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef CE_VECMATH_COMMON
#define CE_VECMATH_COMMON
#define CE_BASE_LIMIT 4096.0
#define CE_TEMPERATURE_1 \
    ((ce_temperature){1, 0x1.71547652b82fep0, 0x1.777d0ffda0d24p-56, 0x1.62e42feep-1, 0x1.a39ef35793c76p-33})

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
    REAL base, cutoff; /* x - base <= cutoff: the result is 0, for it would be subnormal (20 to 40 times slower) */
    REAL log2e, log2e_low;    /* log2 e / T */
    REAL ln2_a, ln2_b, ln2_c; /* T ln 2 in parts, where there is no FMA */
    REAL magic;               /* adding it rounds to an integer k, held in the low bits as exponent bias - 1 - n + k */
} NAME(exp_args);

#if REAL_IS_FLOAT
#define MAGIC 0x1.8p23f /* adding it rounds to an integer */
#define MANTISSA 23
#define BIAS 127
#else
#define MAGIC 0x1.8p52
#define MANTISSA 52
#define BIAS 1023
#endif

/* a b + c of two products: told which of them is fused, two loops of one formula give the same bits */
#if REAL_IS_FLOAT
static const float ce_ln2_high_float32 = 0x1.62e4p-1f, ce_ln2_low_float32 = 0x1.7f7d1cp-20f; /* 16 bits, the rest */
CE_INLINE float ce_abs_float32(float v) { return fabsf(v); }
CE_INLINE float ce_fma_float32(float a, float b, float c) { return CE_HAVE_FMA ? __builtin_fmaf(a, b, c) : a * b + c; }
#define LARGE 0x1p100f
#else
static const double ce_ln2_high_float64 = 0x1.62e42feep-1, ce_ln2_low_float64 = 0x1.a39ef35793c76p-33;
CE_INLINE double ce_abs_float64(double v) { return fabs(v); }
CE_INLINE double ce_fma_float64(double a, double b, double c) { return CE_HAVE_FMA ? __builtin_fma(a, b, c) : a * b + c; }
#define LARGE 0x1p900
#endif

CE_INLINE NAME(exp_args) NAME(exp_prepare)(double base, int64_t n, const ce_temperature *t)
{
    double ln2 = t->ln2_high + t->ln2_low;
    NAME(exp_args) a = {0};
    a.base = (REAL)base;
    a.cutoff = (REAL)((double)(n - BIAS + 1) * ln2);
    a.log2e = (REAL)t->log2e;
    a.log2e_low = REAL_IS_FLOAT ? (REAL)(t->log2e - (double)a.log2e) : (REAL)t->log2e_low;
    a.magic = MAGIC + (REAL)(BIAS - 1 - n);
#if CE_HAVE_FMA
#elif REAL_IS_FLOAT
    double b = ln2 - ce_leading(ln2, 11);
    a.ln2_a = (REAL)(ln2 - b);
    a.ln2_b = (REAL)ce_leading(b, 11);
    a.ln2_c = (REAL)(b - ce_leading(b, 11));
#else
    a.ln2_a = t->ln2_high;
    a.ln2_b = t->ln2_low;
#endif
    return a;
}

/* x - base, or as low as the result is 0; NaN passes */
CE_INLINE REAL NAME(exp_distance)(REAL x, NAME(exp_args) a)
{
    REAL d = x - a.base;
    return d < a.cutoff ? a.cutoff : d;
}

CE_INLINE REAL NAME(exp_of_distance)(REAL d, NAME(exp_args) a)
{
    REAL t = d * a.log2e + a.magic;
    REAL k = t - a.magic;
#if CE_HAVE_FMA
    REAL r = NAME(fma)(d, a.log2e_low, NAME(fma)(d, a.log2e, -k));
#else
    REAL r = (((d - k * a.ln2_a) - k * a.ln2_b) - k * a.ln2_c) * a.log2e;
#endif
#if REAL_IS_FLOAT
    REAL p = 0x1.4172eap-12f;
    p = p * r + 0x1.5f0980p-9f;
    p = p * r + 0x1.3b2ddap-6f;
    p = p * r + 0x1.c6af7ap-4f;
    p = p * r + 0x1.ebfbdcp-2f;
    p = p * r + 0x1.62e430p0f;
#else
    REAL p = 0x1.e819cbf1f7076p-31;
    p = p * r + 0x1.e6136d2edd5aep-27;
    p = p * r + 0x1.b52607f03e5c3p-23;
    p = p * r + 0x1.62bfcccdaa849p-19;
    p = p * r + 0x1.ffcbfbfaabf40p-16;
    p = p * r + 0x1.4309130c71929p-12;
    p = p * r + 0x1.5d87fe78b386fp-9;
    p = p * r + 0x1.3b2ab6fba0fa1p-6;
    p = p * r + 0x1.c6b08d704a0d4p-4;
    p = p * r + 0x1.ebfbdff82c59dp-2;
    p = p * r + 0x1.62e42fefa39efp0;
#endif
    p = p * r + 2;
    UINT bits;
    memcpy(&bits, &t, sizeof bits);
    bits <<= MANTISSA;
    REAL power;
    memcpy(&power, &bits, sizeof power); /* 2^(k - n - 1); 0 at the cutoff */
    return p * power;
}

CE_INLINE REAL NAME(exp)(REAL x, NAME(exp_args) a)
{
    return NAME(exp_of_distance)(NAME(exp_distance)(x, a), a);
}

/* The arguments for the reference n T ln 2 of one lane among others, n an integer. */
CE_INLINE NAME(exp_args) NAME(exp_of_lane)(NAME(exp_args) a, REAL ln2, REAL n)
{
    a.cutoff = (n - (REAL)(BIAS - 1)) * ln2;
    a.magic = MAGIC + ((REAL)(BIAS - 1) - n);
    return a;
}

/* to the nearest integer, |v| < 2^22 */
CE_INLINE REAL NAME(round)(REAL v)
{
    return (v + MAGIC) - MAGIC;
}

/* exp(x) - 1 for -0.5 <= x <= 0, by its series */
CE_INLINE REAL NAME(expm1)(REAL x)
{
    REAL sum = 1;
#pragma GCC unroll 14
    for (int i = 14; i > 1; i--)
        sum = 1 + sum * (x * ((REAL)1 / (REAL)i));
    return x * sum;
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

/* log(1 + e) for 0 <= e <= 1, of full relative accuracy, without a division: minimax, 2^-24.0 and 2^-53.7 */
CE_INLINE REAL NAME(log1p_unit)(REAL e)
{
#if REAL_IS_FLOAT
    REAL q = 0x1.5f968ap-8f;
    q = q * e - 0x1.ec98c8p-6f;
    q = q * e + 0x1.446bdap-4f;
    q = q * e - 0x1.19ad7cp-3f;
    q = q * e + 0x1.88444ap-3f;
    q = q * e - 0x1.fd131ep-3f;
    q = q * e + 0x1.5535d8p-2f;
    q = q * e - 0x1.ffff14p-2f;
#else
    REAL q = 0x1.a8f73377f2695p-16;
    q = q * e - 0x1.31ef0113eaf0ap-12;
    q = q * e + 0x1.a2504c90fe75dp-10;
    q = q * e - 0x1.6b45dfaeba522p-8;
    q = q * e + 0x1.c5766e72968a9p-7;
    q = q * e - 0x1.b62c3d3d17f5bp-6;
    q = q * e + 0x1.5a85b55402e6dp-5;
    q = q * e - 0x1.d70e613421d53p-5;
    q = q * e + 0x1.202cf73b1d685p-4;
    q = q * e - 0x1.4b019e63ca003p-4;
    q = q * e + 0x1.712dc13aa19acp-4;
    q = q * e - 0x1.98d2860430d99p-4;
    q = q * e + 0x1.c6f6a42a4215dp-4;
    q = q * e - 0x1.fffa8b10005b9p-4;
    q = q * e + 0x1.2491feccba40cp-3;
    q = q * e - 0x1.55554fbd1f39ap-3;
    q = q * e + 0x1.99999951e5924p-3;
    q = q * e - 0x1.fffffffdd3c3ap-3;
    q = q * e + 0x1.555555555102ap-2;
    q = q * e - 0x1.fffffffffff9fp-2;
#endif
    return e * (q * e + 1); /* e * e would be subnormal */
}

/* k, and log f, of a normal v = 2^k f, 2^-0.5 <= f < 2^0.5: 2 s + s^3 q(s^2), s = (f - 1) / (f + 1); 2^-30.1, 2^-58.8 */
CE_INLINE REAL NAME(log_parts)(REAL v, REAL *k)
{
    UINT bits, half = (UINT)BIAS << MANTISSA, integer;
    REAL f, lowest = (REAL)0x1.6a09e667f3bcdp-1, two = (REAL)((UINT)1 << MANTISSA);
    memcpy(&bits, &lowest, sizeof bits);
    half -= bits;
    UINT least = bits;
    memcpy(&bits, &v, sizeof bits);
    bits += half;
    memcpy(&integer, &two, sizeof integer);
    integer |= bits >> MANTISSA; /* an exponent becomes a floating number without a conversion */
    memcpy(k, &integer, sizeof integer);
    *k -= two + (REAL)BIAS;
    bits = (bits & (((UINT)1 << MANTISSA) - 1)) + least;
    memcpy(&f, &bits, sizeof f);
    REAL s = (f - 1) / (f + 1), w = s * s;
#if REAL_IS_FLOAT
    REAL q = 0x1.31e466p-2f;
    q = q * w + 0x1.995eb0p-2f;
    q = q * w + 0x1.55557ap-1f;
#else
    REAL q = 0x1.2f0b12baec2e1p-3;
    q = q * w + 0x1.39a135bd35654p-3;
    q = q * w + 0x1.74664398f9cbfp-3;
    q = q * w + 0x1.c71c51f4e194dp-3;
    q = q * w + 0x1.2492494207435p-2;
    q = q * w + 0x1.999999997fc63p-2;
    q = q * w + 0x1.5555555555593p-1;
#endif
    return NAME(fma)(s * w, q, 2 * s);
}

/* log(v) of v >= 0, within 1.5 ulp or 2^-54; less than -100 where v is 0 */
CE_INLINE REAL NAME(log)(REAL v)
{
    REAL k, small = v < REAL_MIN ? 24 : 0;
    REAL f = NAME(log_parts)(v < REAL_MIN ? v * (REAL)0x1p24 : v, &k);
    k -= small;
    return v == v ? k * NAME(ln2_high) + (k * NAME(ln2_low) + f) : v;
}

/* log(1 - x) of 0 <= x <= 1, within 2 ulp: what 1 - x rounds is added again; exact from 0.5 on */
CE_INLINE REAL NAME(log1m)(REAL x)
{
    REAL v = 1 - x, lost = (1 - v) - x;
    return NAME(log)(v) + lost / (v < (REAL)0.5 ? (REAL)0.5 : v);
}

/* a b, 0 where that would be less than `least`: no such product is made, for it may be subnormal */
CE_INLINE REAL NAME(times)(REAL a, REAL b, REAL least)
{
    REAL size = NAME(abs)(a * (b * LARGE));
    return a * (size < least * LARGE ? 0 : b);
}

#if !REAL_IS_FLOAT
/* a b - product, what the product rounds */
CE_INLINE double ce_lost(double a, double b, double product)
{
#if CE_HAVE_FMA
    return __builtin_fma(a, b, -product);
#else
    double a1 = ce_leading(a, 26), b1 = ce_leading(b, 26), a2 = a - a1, b2 = b - b1;
    return ((a1 * b1 - product) + (a1 * b2 + a2 * b1)) + a2 * b2;
#endif
}
#endif

#undef LARGE
#undef MAGIC
#undef MANTISSA
#undef BIAS
